package grpcgateway

import (
	"bytes"
	"encoding/base64"
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
	limit     uint32    // 0 = none
	from      place
	pending   pendingFilter // for the list of commands
}

// newFilter reads the filters that all lists share. Device IDs and hrefs that are none are kept out but count as given: who
// asks for what cannot exist gets nothing, not everything.
func newFilter(devices []string, resources []*pb.ResourceIdFilter, httpResources []string) (filter, error) {
	f := filter{any: len(devices)+len(resources)+len(httpResources) > 0, online: true, offline: true}
	if len(devices) > maxFilter || len(resources) > maxFilter || len(httpResources) > maxFilter {
		return f, hub.NewError(hub.TooLarge, "filter-too-long", "a filter has at most 10000 entries")
	}
	for _, d := range devices {
		f.addDevice(d)
	}
	for _, r := range resources {
		f.addResource(r.GetResourceId().GetDeviceId(), r.GetResourceId().GetHref(), r.GetEtag())
	}
	for _, s := range httpResources {
		r := parseResourceFilter(s)
		f.addResource(r.GetResourceId().GetDeviceId(), r.GetResourceId().GetHref(), r.GetEtag())
	}
	return f, nil
}

func (f *filter) addDevice(s string) {
	if id, err := hub.ParseDeviceID(s); err == nil {
		if f.devices == nil {
			f.devices = map[hub.DeviceID]bool{}
		}
		f.devices[id] = true
	}
}

// addResource takes an empty href for the whole device.
func (f *filter) addResource(device, href string, etags [][]byte) {
	if href == "" {
		f.addDevice(device)
		return
	}
	id, err := hub.ParseDeviceID(device)
	if err != nil {
		return
	}
	h, err := hub.ParseHref(href)
	if err != nil {
		return
	}
	if f.resources == nil {
		f.resources = map[hub.DeviceID]map[hub.Href][][]byte{}
	}
	if f.resources[id] == nil {
		f.resources[id] = map[hub.Href][][]byte{}
	}
	f.resources[id][h] = append(f.resources[id][h], etags...)
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
