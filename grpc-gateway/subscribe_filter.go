package grpcgateway

import (
	"slices"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// anything is what a filter's entry says for all devices, or all hrefs.
const anything = "*"

// resourcePlace is a device and an href of a resource filter; "" is any.
type resourcePlace struct {
	device hub.DeviceID
	href   hub.Href
}

// matcher is a list of a filter: what it names, or everything.
type matcher[K ~string] struct {
	all  bool
	some map[K]bool
}

func (m *matcher[K]) add(k K) {
	if m.some == nil {
		m.some = map[K]bool{}
	}
	m.some[k] = true
}

func (m matcher[K]) has(k K) bool { return m.all || m.some[k] }

// eventFilter says which events a subscription wants. It is not the filter of lists: the same words mean other things here,
// and clients know them so.
type eventFilter struct {
	kinds map[apiKind]bool // nil: all
	// Events of devices: these devices.
	devices matcher[hub.DeviceID]
	// Events of resources: these places, and every pair of a device and an href of the product, if there is one.
	places      map[resourcePlace]bool
	product     bool
	productDevs matcher[hub.DeviceID]
	hrefs       matcher[hub.Href]
	types       map[string]bool // nil: all
}

// newEventFilter reads the filters of a subscription. Lists that are empty match everything. A device ID that is none is
// refused, since what it should have matched would be missed in silence; hrefs are taken as they stand.
func newEventFilter(m *pb.SubscribeToEvents_CreateSubscription) (*eventFilter, error) {
	resources := slices.Clone(m.GetResourceIdFilter())
	for _, s := range m.GetHttpResourceIdFilter() { //nolint:staticcheck // old clients use it
		resources = append(resources, parseResourceFilter(s))
	}
	if max(len(m.GetDeviceIdFilter()), len(m.GetHrefFilter()), len(resources), len(m.GetLeadResourceTypeFilter()), len(m.GetEventFilter())) > maxFilter {
		return nil, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	}
	f := &eventFilter{}
	for _, k := range m.GetEventFilter() {
		if f.kinds == nil {
			f.kinds = map[apiKind]bool{}
		}
		f.kinds[k] = true
	}
	for _, t := range m.GetLeadResourceTypeFilter() {
		if t == ">" || t == anything || t == "" {
			f.types = nil
			break
		}
		if f.types == nil {
			f.types = map[string]bool{}
		}
		f.types[t] = true
	}
	named := matcher[hub.DeviceID]{all: len(m.GetDeviceIdFilter()) == 0}
	star := false // all devices were asked for, in so many words
	for _, d := range m.GetDeviceIdFilter() {
		if d == anything {
			named.all, star = true, true
			continue
		}
		id, err := hub.ParseDeviceID(d)
		if err != nil {
			return nil, invalid("filter-invalid", "deviceIdFilter: an entry is neither a device ID nor *")
		}
		named.add(id)
	}
	hrefs := matcher[hub.Href]{all: len(m.GetHrefFilter()) == 0 || slices.Contains(m.GetHrefFilter(), anything)}
	for _, h := range m.GetHrefFilter() {
		hrefs.add(hub.Href(h))
	}
	if len(resources) == 0 {
		f.devices, f.product, f.productDevs, f.hrefs = named, true, named, hrefs
		return f, nil
	}
	var ofPlaces matcher[hub.DeviceID] // the devices of the resource filter
	f.places = make(map[resourcePlace]bool, len(resources))
	for _, r := range resources {
		var p resourcePlace
		d, h := r.GetResourceId().GetDeviceId(), r.GetResourceId().GetHref()
		if d == anything {
			ofPlaces.all = true
		} else {
			id, err := hub.ParseDeviceID(d)
			if err != nil {
				return nil, invalid("filter-invalid", "resourceIdFilter: the device of an entry is neither a device ID nor *")
			}
			p.device = id
			ofPlaces.add(id)
		}
		if h == "" { // it asks for the device's own events, and those of no resource
			continue
		}
		if h != anything {
			p.href = hub.Href(h)
		}
		f.places[p] = true
	}
	// Beside a resource filter the device filter brings the devices' own events, and those of resources only together with an
	// href filter; an href filter by itself speaks of the devices of the resource filter. So other hubs have it.
	f.devices = matcher[hub.DeviceID]{all: ofPlaces.all || star, some: ofPlaces.some}
	for d := range named.some {
		f.devices.add(d)
	}
	f.product, f.hrefs = !hrefs.all, hrefs
	if f.productDevs = named; named.all {
		f.productDevs = matcher[hub.DeviceID]{all: ofPlaces.all, some: ofPlaces.some}
	}
	return f, nil
}

// wants reports whether the subscription is told of the event.
func (f *eventFilter) wants(k *subscribable, dev hub.DeviceID, ev *hub.Event) bool {
	if f.kinds != nil && !f.kinds[k.api] {
		return false
	}
	switch k.reach {
	case ofOwner: // no filter but that for kinds applies
		return true
	case ofDevice:
		return f.devices.has(dev)
	case ofResource:
	}
	if f.types != nil && !slices.ContainsFunc(ev.Types, func(t string) bool { return f.types[t] }) {
		return false
	}
	if f.product && f.productDevs.has(dev) && f.hrefs.has(ev.Href) {
		return true
	}
	return f.places[resourcePlace{dev, ev.Href}] || f.places[resourcePlace{dev, ""}] || f.places[resourcePlace{"", ev.Href}] || f.places[resourcePlace{}]
}
