package grpcgateway

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// maxFilter bounds the entries of one filter list.
const maxFilter = 10_000

// filter is what a list is asked for. Entries of one list are alternatives. devices and resources are united; both empty
// and any false means all devices of the owner.
type filter struct {
	any       bool // a device or resource filter was given, perhaps one that names nothing
	devices   map[hub.DeviceID]bool
	resources map[hub.DeviceID]map[hub.Href][][]byte // ETags the caller has, may be empty
	types     []string
	online    bool // wanted, for devices
	offline   bool
	after     time.Time // events newer than this
	at        time.Time // the state at this time, zero = now
	search    search    // for devices
	order     order     // of devices
	limit     uint32    // 0 = none
	from      place
	pending   pendingFilter // for the list of commands
	serials   []string      // for certificates
	names     []string      // common names, for certificates
	things    []string      // IDs of what is listed, where it is no device
	groups    []string      // of devices
	states    []hub.EnrolmentState
}

// newFilter reads the filters that all lists share. A device ID that is no UUID, and an href that is none, are Invalid with
// the field's name: passing over them would answer another question than the one that was asked.
func newFilter(devices []string, resources []*pb.ResourceIdFilter, httpResources []string) (filter, error) {
	f := filter{any: len(devices)+len(resources)+len(httpResources) > 0, online: true, offline: true}
	if len(devices) > maxFilter || len(resources) > maxFilter || len(httpResources) > maxFilter {
		return f, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	}
	for i, d := range devices {
		id, err := hub.ParseDeviceID(d)
		if err != nil {
			return f, badFilter("deviceIdFilter", i, err)
		}
		f.addDevice(id)
	}
	for i, r := range resources {
		if err := f.addResource(r.GetResourceId().GetDeviceId(), r.GetResourceId().GetHref(), r.GetEtag()); err != nil {
			return f, badFilter("resourceIdFilter", i, err)
		}
	}
	for i, s := range httpResources {
		r := parseResourceFilter(s)
		if err := f.addResource(r.GetResourceId().GetDeviceId(), r.GetResourceId().GetHref(), r.GetEtag()); err != nil {
			return f, badFilter("resourceIdFilter", i, err)
		}
	}
	return f, nil
}

// badFilter says which entry of which filter cannot be read; a client with hundreds of them would search for it otherwise.
func badFilter(field string, i int, err error) error {
	_, text := hub.Public(err)
	return hub.NewError(hub.Invalid, "filter-invalid", fmt.Sprintf("%s, entry %d: %s", field, i+1, text)).With("filter", err)
}

// deviceOf is the filter of a route below one device. What is no UUID is no device: such a path finds nothing.
func deviceOf(name string) filter {
	f := filter{any: true, online: true, offline: true}
	if id, err := hub.ParseDeviceID(name); err == nil {
		f.addDevice(id)
	}
	return f
}

func (f *filter) addDevice(id hub.DeviceID) {
	if f.devices == nil {
		f.devices = map[hub.DeviceID]bool{}
	}
	f.devices[id] = true
}

// addResource takes an empty href for the whole device.
func (f *filter) addResource(device, href string, etags [][]byte) error {
	id, err := hub.ParseDeviceID(device)
	if err != nil {
		return err
	}
	if href == "" {
		f.addDevice(id)
		return nil
	}
	h, err := hub.ParseHref(href)
	if err != nil {
		return err
	}
	if f.resources == nil {
		f.resources = map[hub.DeviceID]map[hub.Href][][]byte{}
	}
	if f.resources[id] == nil {
		f.resources[id] = map[hub.Href][][]byte{}
	}
	f.resources[id][h] = append(f.resources[id][h], etags...)
	return nil
}

// digest is of everything that decides which elements a list has, and in which order: a cursor goes on in that list only.
func (f *filter) digest() []byte {
	h := sha256.New()
	put := func(texts ...string) {
		var n [4]byte
		binary.BigEndian.PutUint32(n[:], uint32(len(texts)))
		h.Write(n[:])
		for _, s := range texts {
			binary.BigEndian.PutUint32(n[:], uint32(len(s)))
			h.Write(n[:])
			h.Write([]byte(s))
		}
	}
	for _, id := range slices.Sorted(maps.Keys(f.devices)) {
		put("device", string(id))
	}
	for _, id := range slices.Sorted(maps.Keys(f.resources)) {
		for _, href := range slices.Sorted(maps.Keys(f.resources[id])) {
			put("resource", string(id), string(href)) // ETags say what the caller has, not what is asked for
		}
	}
	for _, serial := range f.serials {
		put("serial", serial)
	}
	for _, name := range f.names {
		put("name", name)
	}
	put(f.things...)
	put(f.groups...)
	put(fmt.Sprint(f.states))
	put(slices.Sorted(slices.Values(f.types))...)
	put(f.search...)
	put(f.pending.id)
	put(fmt.Sprint(f.pending.kinds, f.pending.hidden))
	put(fmt.Sprint(f.order, f.any, f.online, f.offline, f.after.UnixNano(), f.at.UnixNano()))
	return h.Sum(nil)
}

// ids returns the devices that the filter names, in ID order.
func (f *filter) ids() []hub.DeviceID {
	ids := make([]hub.DeviceID, 0, len(f.devices)+len(f.resources))
	for id := range f.devices {
		ids = append(ids, id)
	}
	for id := range f.resources {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return slices.Compact(ids)
}

// wholeDevice reports whether everything of the device is wanted.
func (f *filter) wholeDevice(id hub.DeviceID) bool { return !f.any || f.devices[id] }

// wants reports whether the resource is wanted, and which ETags the caller has of it.
func (f *filter) wants(id hub.DeviceID, h hub.Href) (etags [][]byte, ok bool) {
	etags, ok = f.resources[id][h]
	return etags, ok || f.wholeDevice(id)
}

// wantsTypes reports whether one of the types is wanted.
func (f *filter) wantsTypes(types []string) bool {
	if len(f.types) == 0 {
		return true
	}
	return slices.ContainsFunc(types, func(t string) bool { return slices.Contains(f.types, t) })
}

func hasETag(etags [][]byte, etag []byte) bool {
	return len(etag) > 0 && slices.ContainsFunc(etags, func(e []byte) bool { return bytes.Equal(e, etag) })
}

// parseResourceFilter reads "<device ID><href>?etag=<base64>&etag=…" with an optional leading slash. ETags are standard
// base64, taken as they stand; bad ones are dropped, as clients of older hubs expect.
func parseResourceFilter(s string) *pb.ResourceIdFilter {
	s = strings.TrimPrefix(s, "/")
	s, query, _ := strings.Cut(s, "?")
	device, href, found := strings.Cut(s, "/")
	r := &pb.ResourceIdFilter{ResourceId: &rapb.ResourceId{DeviceId: device}}
	if found && href != "" {
		r.ResourceId.Href = "/" + href
	}
	for part := range strings.SplitSeq(query, "&") {
		if v, ok := strings.CutPrefix(part, "etag="); ok {
			if e, err := base64.StdEncoding.DecodeString(v); err == nil && len(e) > 0 {
				r.Etag = append(r.Etag, e)
			}
		}
	}
	return r
}
