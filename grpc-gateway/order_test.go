package grpcgateway

import (
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"testing"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

func TestSearchDevices(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.pictures[lampA].Labels = hub.Labels{"room": "Kitchen", "floor": "1"}
	w.pictures[lampB].Labels = hub.Labels{"room": "hall"}
	for search, want := range map[string][]string{
		"":                     {string(lampA), string(lampB)},
		"lamp":                 {string(lampA), string(lampB)},
		"LAMP a":               {string(lampA), string(lampB)}, // "a" is in every ID and type
		"\"lamp":               nil,
		"00b2":                 {string(lampB)},
		"oic.d.LIGHT":          {string(lampA), string(lampB)},
		"core.light":           nil, // a type of another resource
		"room=kit":             {string(lampA)},
		"room= floor=1":        {string(lampA)},
		"kitchen hall":         nil,
		"  hall  lamp ":        {string(lampB)},
		"kitchen oic.d. 00a1 ": {string(lampA)},
		"bob":                  nil,
	} {
		wantList(t, search, ids(w.get(t, "/api/v1/devices?search="+url.QueryEscape(search)).results(), "id"), want...)
		devices, err := all(pb.NewGrpcGatewayClient(w.dial(t)).GetDevices(as(t, "alice"), &pb.GetDevicesRequest{Search: search}))
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, d := range devices {
			got = append(got, d.GetId())
		}
		wantList(t, "gRPC: "+search, got, want...)
	}
	want(t, "with a filter", len(w.get(t, "/api/v1/devices?search=lamp&status=OFFLINE").results()), 1)
	for _, bad := range []string{strings.Repeat("x", 257), "1 2 3 4 5 6 7 8 9"} {
		a := w.get(t, "/api/v1/devices?search="+url.QueryEscape(bad))
		want(t, bad, a.reason(), "query-invalid")
		want(t, "names the field", strings.Contains(a.Body.String(), "search"), true)
	}
}

// fleet gives alice devices with names, models, times and states in no order.
func fleet(w *world, n int) {
	for id, d := range w.pictures {
		if d.Owner == alice {
			delete(w.pictures, id)
		}
	}
	for i := range n {
		id := hub.DeviceID(fmt.Sprintf("d2000000-0000-4000-8000-%012x", i))
		d := lamp(id, []string{"Zoë", "alpha", "Beta", "beta", ""}[i*7%5]+strconv.Itoa(i%3), i%4 != 0)
		d.Metadata.Connection.ConnectedAt = t0 + int64(i*13%n)
		w.pictures[id] = d
	}
}

func TestSortDevices(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const n = 11
	fleet(w, n)
	keys := map[string]func(map[string]any) string{
		"id":   func(map[string]any) string { return "" },
		"name": func(d map[string]any) string { s, _ := d["name"].(string); return strings.ToLower(s) },
		"modelNumber": func(d map[string]any) string {
			s, _ := d["modelNumber"].(string)
			return strings.ToLower(s)
		},
		"connectedAt": func(d map[string]any) string {
			return d["metadata"].(map[string]any)["connection"].(map[string]any)["connectedAt"].(string)
		},
		"status": func(d map[string]any) string { // ONLINE first
			if d["metadata"].(map[string]any)["connection"].(map[string]any)["status"] == "ONLINE" {
				return "0"
			}
			return "1"
		},
	}
	want(t, "fields", len(keys), len(sortKeys))
	for field, key := range keys {
		rs := w.get(t, "/api/v1/devices?sort="+field).results()
		want(t, field, len(rs), n)
		if !slices.IsSortedFunc(rs, func(a, b map[string]any) int {
			return strings.Compare(key(a)+" "+a["id"].(string), key(b)+" "+b["id"].(string))
		}) {
			t.Errorf("%s is not sorted", field)
		}
		up := ids(rs, "id")
		down := ids(w.get(t, "/api/v1/devices?sort=-"+field).results(), "id")
		slices.Reverse(down)
		wantList(t, "backwards: "+field, down, up...)
		for _, limit := range []int{1, 4, n - 1, n, n + 1} {
			for _, sign := range []string{"", "-"} {
				var paged []string
				cursor := ""
				for range n + 1 {
					rs := w.get(t, fmt.Sprintf("/api/v1/devices?sort=%s%s&limit=%d&cursor=%s", sign, field, limit, cursor)).results()
					if len(rs) > limit {
						t.Fatalf("%d elements for limit %d", len(rs), limit)
					}
					paged = append(paged, ids(rs, "id")...)
					if cursor, _ = rs[len(rs)-1]["cursor"].(string); cursor == "" {
						break
					}
				}
				if sign == "-" {
					slices.Reverse(paged)
				}
				wantList(t, fmt.Sprintf("%s%s in pages of %d", sign, field, limit), paged, up...)
			}
		}
	}
	// A name that changed between two pages costs no other device its place.
	first := w.get(t, "/api/v1/devices?sort=name&limit=10").results()
	cursor := first[9]["cursor"].(string)
	w.pictures[hub.DeviceID(first[0]["id"].(string))] = later(lamp(hub.DeviceID(first[0]["id"].(string)), "zzz", true))
	second := w.get(t, "/api/v1/devices?sort=name&limit=100&cursor="+cursor).results()
	want(t, "the rest, and the one that moved", len(second), n-10+1)

	want(t, "another order's cursor", w.get(t, "/api/v1/devices?sort=-name&cursor="+cursor).reason(), "cursor-invalid")
	want(t, "another search's cursor", w.get(t, "/api/v1/devices?sort=name&search=lamp&cursor="+cursor).reason(), "cursor-invalid")
	want(t, "no such field", w.get(t, "/api/v1/devices?sort=colour").reason(), "query-invalid")
	devices, err := all(pb.NewGrpcGatewayClient(w.dial(t)).GetDevices(as(t, "alice"), &pb.GetDevicesRequest{Sort: "-connectedAt", Limit: 2}))
	if err != nil {
		t.Fatal(err)
	}
	want(t, "gRPC", len(devices), 2)
	want(t, "gRPC", devices[0].GetMetadata().GetConnection().GetConnectedAt(), t0+n-1)
	want(t, "gRPC", devices[1].GetCursor() != "", true)
}

// A sorted list is put together in memory, so it comes in pages even if nobody asks for them.
func TestSortedListsAreBounded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	fleet(w, maxSorted+5)
	rs := w.get(t, "/api/v1/devices?sort=id").results()
	want(t, "first page", len(rs), maxSorted)
	cursor, _ := rs[maxSorted-1]["cursor"].(string)
	want(t, "the rest", len(w.get(t, "/api/v1/devices?sort=id&cursor="+cursor).results()), 5)
}
