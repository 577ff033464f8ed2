package grpcgateway

import (
	"context"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// A parameter that is wrong is refused wherever it means something, before anything is read.
func TestBadQueriesAreRefusedEverywhere(t *testing.T) {
	t.Parallel()
	const device = "/api/v1/devices/" + string(lampA)
	long := strings.Repeat("&deviceIdFilter=x", maxFilter+1)[1:]
	for _, c := range []struct {
		query, reason string
		code          int
		paths         []string
	}{
		{"at=yesterday", "query-invalid", 400, []string{
			"/api/v1/devices", device, "/api/v1/resource-links", device + "/resource-links", "/api/v1/resources",
			device + "/resources", "/api/v1/devices-metadata", light,
		}},
		{"at=-1", "query-invalid", 400, []string{"/api/v1/devices", light}},
		{"limit=many", "query-invalid", 400, []string{
			"/api/v1/devices", "/api/v1/resource-links", "/api/v1/resources", device + "/resources", "/api/v1/devices-metadata",
			"/api/v1/events", device + "/events", light + "/events",
		}},
		{"limit=-1", "query-invalid", 400, []string{"/api/v1/devices"}},
		{"limit=4294967296", "query-invalid", 400, []string{"/api/v1/devices"}},
		{"cursor=abc", "cursor-invalid", 400, []string{
			"/api/v1/devices", "/api/v1/resource-links", "/api/v1/resources", device + "/resources", "/api/v1/devices-metadata",
			"/api/v1/events", device + "/events", light + "/events",
		}},
		{"timestampFilter=now", "query-invalid", 400, []string{"/api/v1/events", device + "/events", light + "/events"}},
		{"statusFilter=ASLEEP", "query-invalid", 400, []string{"/api/v1/devices"}},
		{"deviceIdFilter=abc", "filter-invalid", 400, []string{
			"/api/v1/devices", "/api/v1/resource-links", "/api/v1/resources", "/api/v1/devices-metadata", "/api/v1/events",
		}},
		{"deviceIdFilter=", "filter-invalid", 400, []string{"/api/v1/devices", "/api/v1/resources"}},
		{"resourceIdFilter=abc/light", "filter-invalid", 400, []string{"/api/v1/resources", "/api/v1/events"}},
		{"resourceIdFilter=" + string(lampA) + "/../light", "filter-invalid", 400, []string{"/api/v1/resources", "/api/v1/events"}},
		{"x=%", "query-invalid", 400, []string{"/api/v1/devices", device, device + "/resources", light, "/api/v1/events"}},
		// net/url reads no more parameters than a filter may have entries.
		{long, "query-invalid", 400, []string{
			"/api/v1/devices", "/api/v1/resource-links", "/api/v1/resources", "/api/v1/devices-metadata", "/api/v1/events",
		}},
	} {
		w := newWorld(t) // whose directory must not be asked
		w.directory.devices, w.directory.deviceAt, w.directory.history = nil, nil, nil
		for _, path := range c.paths {
			a := w.get(t, path+"?"+c.query)
			what := path + "?" + c.query[:min(len(c.query), 40)]
			want(t, what, a.Code, c.code)
			want(t, what, a.reason(), c.reason)
		}
	}
	w := newWorld(t)
	want(t, "delete", w.do(t, "alice", "DELETE", "/api/v1/devices?"+long).reason(), "query-invalid")
	want(t, "deleted", len(w.signOffs), 0)
}

func TestGRPCLongFiltersAreRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	ctx := as(t, "alice")
	devices := make([]string, maxFilter+1)
	resources := make([]*pb.ResourceIdFilter, maxFilter+1)
	for i := range resources {
		resources[i] = &pb.ResourceIdFilter{}
	}
	errs := map[string]error{}
	_, errs["devices"] = all(c.GetDevices(ctx, &pb.GetDevicesRequest{DeviceIdFilter: devices}))
	_, errs["links"] = all(c.GetResourceLinks(ctx, &pb.GetResourceLinksRequest{DeviceIdFilter: devices}))
	_, errs["resources"] = all(c.GetResources(ctx, &pb.GetResourcesRequest{ResourceIdFilter: resources}))
	_, errs["http filter"] = all(c.GetResources(ctx, &pb.GetResourcesRequest{HttpResourceIdFilter: devices}))
	_, errs["metadata"] = all(c.GetDevicesMetadata(ctx, &pb.GetDevicesMetadataRequest{DeviceIdFilter: devices}))
	_, errs["events"] = all(c.GetEvents(ctx, &pb.GetEventsRequest{DeviceIdFilter: devices}))
	_, errs["delete"] = c.DeleteDevices(ctx, &pb.DeleteDevicesRequest{DeviceIdFilter: devices})
	for what, err := range errs {
		code, reason := reasonOf(t, err)
		want(t, what, code, codes.InvalidArgument)
		want(t, what, reason, "filter-too-long")
	}
	want(t, "deleted", len(w.signOffs), 0)
}

// What a device says of itself may be anything. It is listed when it is an object; members of wrong types stay empty.
func TestOddDescriptionsOfDevices(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		content hub.Content
		listed  bool
		title   any
		maker   string // the first manufacturer's name
	}{
		{"no CBOR", hub.Content{Type: "application/vnd.ocf+cbor", Format: hub.FormatOCFCBOR, Data: []byte{0xff}}, false, nil, ""},
		{"cut CBOR", hub.Content{Type: "application/vnd.ocf+cbor", Format: hub.FormatOCFCBOR, Data: []byte{0xa1, 0x61, 'n'}}, false, nil, ""},
		{"an array", ocf([]any{1}), false, nil, ""},
		{"null", ocf(nil), false, nil, ""},
		{"a text", hub.Content{Type: "text/plain", Data: []byte(`{"n":"x"}`)}, false, nil, ""},
		{"unknown format", hub.Content{Type: "application/x", Format: 65000, Data: []byte(`{"n":"x"}`)}, false, nil, ""},
		{"nothing", hub.Content{Format: -1}, false, nil, ""},
		{"JSON", hub.Content{Type: "application/json", Format: 50, Data: []byte(`{"n":"x"}`)}, true, "x", ""},
		{"an empty object", ocf(map[string]any{}), true, nil, ""},
		{"wrong types", ocf(map[string]any{"n": 1, "dmno": []any{}, "piid": map[string]any{}, "dmn": 5}), true, nil, ""},
		{"a plain manufacturer", ocf(map[string]any{"n": "x", "dmn": "Maker"}), true, "x", "Maker"},
		{"an empty manufacturer first", ocf(map[string]any{"dmn": []any{map[string]any{}, map[string]any{"value": "Maker"}}}), true, nil, "Maker"},
	} {
		w := newWorld(t)
		d := w.pictures[lampA]
		set := d.Resources.(resourceSet)
		for i, r := range set {
			if r.Href == deviceHref {
				odd := *r
				odd.Content = c.content
				set[i] = &odd
			}
		}
		a := w.get(t, "/api/v1/devices/"+string(lampA))
		want(t, c.name+": one", a.Code == 200, c.listed)
		want(t, c.name+": in the list", strings.Contains(w.get(t, "/api/v1/devices").Body.String(), string(lampA)), c.listed)
		want(t, c.name+": still readable", w.get(t, "/api/v1/devices/"+string(lampA)+"/resources/oic/d").Code, 200)
		if !c.listed {
			continue
		}
		want(t, c.name+": name", a.json()["name"], c.title)
		var maker string
		if m, ok := a.json()["manufacturerName"].([]any); ok {
			maker, _ = m[0].(map[string]any)["value"].(string)
		}
		want(t, c.name+": maker", maker, c.maker)
	}
}

// Deleting many is not one act: what was deleted before a failure stays deleted, the rest is not touched, and asking again
// finishes it.
func TestDeleteStopsAtAFailure(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	signOff := w.identities.signOff
	w.identities.signOff = func(ctx context.Context, id hub.DeviceID, o hub.Owner, user string) error {
		if len(w.signOffs) == 1 {
			return &hub.Error{Kind: hub.Unavailable, Code: "disk-full", RetryAfter: time.Second}
		}
		return signOff(ctx, id, o, user)
	}
	a := w.do(t, "alice", "DELETE", "/api/v1/devices?all=true")
	want(t, "status", a.Code, 503)
	want(t, "reason", a.reason(), "disk-full")
	want(t, "deleted before", len(w.signOffs), 1)
	w.identities.signOff = signOff
	want(t, "the rest", len(w.do(t, "alice", "DELETE", "/api/v1/devices?all=true").json()["deviceIds"].([]any)), 3)

	w.identities.devices = func(context.Context, hub.Owner) ([]hub.DeviceID, error) {
		return nil, &hub.Error{Kind: hub.Unavailable, Code: "store-read-failed"}
	}
	want(t, "nobody knows which", w.do(t, "alice", "DELETE", "/api/v1/devices?all=true").reason(), "store-read-failed")
	want(t, "nothing to read", w.get(t, "/api/v1/devices").reason(), "store-read-failed")
}
