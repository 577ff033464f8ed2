package grpcgateway

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/genproto/googleapis/rpc/code"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

func want[T comparable](t testing.TB, what string, got, want T) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func wantList[T comparable](t testing.TB, what string, got []T, want ...T) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: got %v, want %v", what, got, want)
	}
}

func TestGetDevicesListsWhatIsPublishedInOrder(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rs := w.get(t, "/api/v1/devices").results()
	// Neither the device that only signed up nor the one without /oic/d, and none of bob's.
	wantList(t, "devices", ids(rs, "id"), string(lampA), string(lampB))
	d := rs[0]
	want(t, "name", d["name"], any("lamp A"))
	want(t, "modelNumber", d["modelNumber"], any("L-1"))
	want(t, "ownershipStatus", d["ownershipStatus"], any("OWNED"))
	want(t, "piid", d["protocolIndependentId"], any("a0000000-0000-4000-8000-000000000021"))
	meta := d["metadata"].(map[string]any)
	want(t, "twinEnabled", meta["twinEnabled"], any(true))
	conn := meta["connection"].(map[string]any)
	want(t, "status", conn["status"], any("ONLINE"))
	want(t, "protocol", conn["protocol"], any("COAPS_TCP"))
	want(t, "connectedAt is a text", conn["connectedAt"], any(strconv.FormatInt(t0, 10)))
	want(t, "state", meta["twinSynchronization"].(map[string]any)["state"], any("IN_SYNC"))
	want(t, "contact", meta["contactInterval"], any("21600000000000"))
	data := d["data"].(map[string]any)
	want(t, "content is decoded", data["content"].(map[string]any)["n"], any("lamp A"))
	want(t, "hubId", data["eventMetadata"].(map[string]any)["hubId"], any(hubID))
	want(t, "endpoint", d["endpoints"].([]any)[0], any("coaps://[fe80::1]:5684"))
}

func TestDeviceFilters(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, c := range []struct {
		query string
		want  []hub.DeviceID
	}{
		{"deviceIdFilter=" + string(lampB), []hub.DeviceID{lampB}},
		{"deviceidfilter=" + string(lampB), []hub.DeviceID{lampB}},   // names have no case
		{"DEVICEID=" + string(lampB), []hub.DeviceID{lampB}},         // alias
		{"device_id_filter=" + string(lampB), []hub.DeviceID{lampB}}, // protobuf's name
		{"deviceIdFilter=" + strings.ToUpper(string(lampB)), []hub.DeviceID{lampB}},
		{"deviceIdFilter=" + string(lampB) + "&deviceIdFilter=" + string(lampA), []hub.DeviceID{lampA, lampB}},
		{"deviceIdFilter=" + string(unknown), nil},
		{"deviceIdFilter=" + string(bobs), nil},
		{"statusFilter=ONLINE", []hub.DeviceID{lampA}},
		{"status=OFFLINE", []hub.DeviceID{lampB}},
		{"statusFilter=1", []hub.DeviceID{lampB}},
		{"statusFilter=7", nil},
		{"statusFilter=ONLINE&statusFilter=OFFLINE", []hub.DeviceID{lampA, lampB}},
		{"typeFilter=oic.d.light", []hub.DeviceID{lampA, lampB}},
		{"type=oic.d.light&statusFilter=OFFLINE", []hub.DeviceID{lampB}},
		{"typeFilter=core.light", nil}, // a type of another resource
		{"typeFilter=x&typeFilter=oic.wk.d", []hub.DeviceID{lampA, lampB}},
		{"nonsense=1&deviceIdFilter=" + string(lampA), []hub.DeviceID{lampA}},
		{"resourceIdFilter=" + string(lampA), []hub.DeviceID{lampA, lampB}}, // not a filter of this call
	} {
		var got []hub.DeviceID
		for _, id := range ids(w.get(t, "/api/v1/devices?"+c.query).results(), "id") {
			got = append(got, hub.DeviceID(id))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s: got %v, want %v", c.query, got, c.want)
		}
	}
}

func TestGetDevice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.get(t, "/api/v1/devices/"+string(lampA)+"/")
	want(t, "single, without wrapper", a.json()["id"], any(string(lampA)))
	want(t, "other filters are not its", w.get(t, "/api/v1/devices/"+string(lampA)+"?typeFilter=x&statusFilter=OFFLINE").Code, 200)
	for _, id := range []string{string(unknown), string(bobs), string(fresh), "abc"} {
		a := w.get(t, "/api/v1/devices/"+id)
		want(t, id, a.Code, 404)
		want(t, id, a.reason(), "not-found")
	}
}

func TestSimpleAndProtobufForm(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, c := range []struct{ accept, want string }{
		{"", "application/json"},
		{"application/json", "application/json"},
		{"*/*", "application/json"},
		{"text/html", "application/json"},
		{"application/cbor, application/json", "application/json"},
		{"application/protojson, application/json;q=0.5", "application/json"}, // exactly, or not at all
		{"application/protojson", "application/jsonpb"},
	} {
		var h []string
		if c.accept != "" {
			h = []string{"Accept: " + c.accept}
		}
		a := w.get(t, "/api/v1/devices", h...)
		want(t, c.accept, a.Header().Get("Content-Type"), c.want)
		want(t, "headers of a translation", a.Header().Get("Grpc-Metadata-Content-Type"), "")
		want(t, "lines", strings.Count(a.Body.String(), "\n"), 2) // C17: one line feed after each element, in both forms
		data := a.results()[0]["data"].(map[string]any)
		_, raw := data["content"].(map[string]any)["data"]
		want(t, "content in raw form", raw, c.want == "application/jsonpb")
		_, all := data["openTelemetryCarrier"]
		want(t, "empty fields", all, c.want == "application/jsonpb")
	}
	a := w.get(t, "/api/v1/devices?deviceIdFilter="+string(unknown))
	want(t, "empty list", a.Body.String(), "")
	want(t, "type of an empty list", a.Header().Get("Content-Type"), "application/json")
}

func TestGetResources(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	href := func(r map[string]any) string {
		if d, ok := r["data"].(map[string]any); ok {
			return d["resourceId"].(map[string]any)["deviceId"].(string)[34:] + d["resourceId"].(map[string]any)["href"].(string)
		}
		return r["types"].([]any)[0].(string)
	}
	a, b := string(lampA), string(lampB)
	all := []string{"/a/events", "/cbor", "/json", "x.late", "/light/1", "/octets", "/oic/d", "/text", "/types"}
	of := func(n string) (out []string) {
		for _, h := range all {
			if h[0] == '/' {
				h = n + h
			}
			out = append(out, h)
		}
		return out
	}
	for _, c := range []struct {
		query string
		want  []string
	}{
		{"/api/v1/resources", append(append(of("a1"), of("b2")...), "x.x")},
		{"/api/v1/devices/" + a + "/resources", of("a1")},
		{"/api/v1/devices/" + a + "/resources?typeFilter=core.light&deviceIdFilter=" + b, []string{"a1/light/1"}},
		{"/api/v1/devices/" + string(unknown) + "/resources", nil},
		{"/api/v1/devices/abc/resources", nil},
		{"/api/v1/resources?deviceIdFilter=" + b, of("b2")},
		{"/api/v1/resources?type=core.light", []string{"a1/light/1", "b2/light/1"}},
		{"/api/v1/resources?resourceIdFilter=" + a + "/light/1", []string{"a1/light/1"}},
		{"/api/v1/resources?httpResourceIdFilter=" + a + "/light/1", []string{"a1/light/1"}},
		{"/api/v1/resources?resourceId=%2F" + a + "%2Flight%2F1", []string{"a1/light/1"}},
		{"/api/v1/resources?resourceIdFilter=" + a, of("a1")},
		{"/api/v1/resources?resourceIdFilter=" + a + "/nothing", nil},
		{"/api/v1/resources?resourceIdFilter=" + a + "/hidden", nil}, // reported, not published
		{"/api/v1/resources?resourceIdFilter=" + string(bobs) + "/light/1", nil},
		{"/api/v1/resources?deviceIdFilter=" + b + "&resourceIdFilter=" + a + "/light/1", append([]string{"a1/light/1"}, of("b2")...)}, // union
	} {
		var got []string
		for _, r := range w.get(t, c.query).results() {
			got = append(got, href(r))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%s:\ngot  %v\nwant %v", c.query, got, c.want)
		}
	}
}

func TestResourceWithoutReportHasNoData(t *testing.T) { // C24
	w := newWorld(t)
	want(t, "list", w.get(t, "/api/v1/resources?resourceIdFilter="+string(lampA)+"/late").Body.String(), `{"result":{"types":["x.late"]}}`+"\n")
	a := w.get(t, "/api/v1/devices/"+string(lampA)+"/resources/late")
	want(t, "single", a.Body.String(), `{"types":["x.late"]}`+"\n")
	want(t, "no device's ETag", strings.HasPrefix(a.Header().Get("ETag"), `W/"#`), true)
	want(t, "content alone", w.get(t, "/api/v1/devices/"+string(lampA)+"/resources/late?onlyContent=1").Body.String(), "null\n")
}

func TestNotModifiedInList(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rs := w.get(t, "/api/v1/resources?resourceIdFilter="+string(lampA)+"/light/1%3Fetag%3DAAAA%26etag%3DsbI%3D").results()
	d := rs[0]["data"].(map[string]any)
	want(t, "status", d["status"], any("NOT_MODIFIED"))
	want(t, "format", d["content"].(map[string]any)["coapContentFormat"], any(json.Number("-1")))
	want(t, "etag", d["etag"], any("sbI="))
	rs = w.get(t, "/api/v1/resources?resourceIdFilter="+string(lampA)+"/light/1%3Fetag%3D***").results()
	want(t, "bad base64 is dropped", rs[0]["data"].(map[string]any)["status"], any("OK"))
}

const light = "/api/v1/devices/" + string(lampA) + "/resources/light/1"

func TestGetTwinForms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	at := "/api/v1/devices/" + string(lampA) + "/resources/"
	for _, c := range []struct{ path, simple, proto string }{
		{"light/1", `{"name":"Light","power":0,"state":false}`, `{"data":"` + b64(cborOf(map[string]any{"name": "Light", "power": 0, "state": false})) + `","contentType":"application/vnd.ocf+cbor","coapContentFormat":10000}`},
		{"cbor", `{"c":60}`, `{"data":"oWFjGDw=","contentType":"application/cbor","coapContentFormat":60}`},
		{"json", `{"a":1,"b":[1.5,null]}`, `{"data":"` + b64([]byte("{\"a\":1,\n \"b\":[1.5,null]}")) + `","contentType":"application/json","coapContentFormat":50}`},
		{"text", `"plain words"`, `{"data":"cGxhaW4gd29yZHM=","contentType":"text/plain; charset=utf-8","coapContentFormat":0}`},
		{"octets", `{"contentType":"application/octet-stream","coapContentFormat":42,"data":"AQID/w=="}`, `{"data":"AQID/w==","contentType":"application/octet-stream","coapContentFormat":42}`},
	} {
		a := w.get(t, at+c.path+"?onlyContent=true")
		want(t, c.path, sameJSON(t, a.Body.Bytes()), sameJSON(t, []byte(c.simple)))
		want(t, c.path, a.Header().Get("Content-Type"), "application/json")
		content, err := json.Marshal(w.get(t, at+c.path).json()["data"].(map[string]any)["content"])
		if err != nil {
			t.Fatal(err)
		}
		want(t, c.path+" whole", sameJSON(t, content), sameJSON(t, []byte(c.simple)))
		a = w.get(t, at+c.path+"?onlyContent=1", "Accept: application/protojson") // C14
		want(t, c.path+" protojson", sameJSON(t, a.Body.Bytes()), sameJSON(t, []byte(c.proto)))
		want(t, c.path, a.Header().Get("Content-Type"), "application/jsonpb")
	}
}

// Digits above 2^53 stay (C12), empty values inside a content stay (C11), tags of HTML are escaped (C10).
func TestContentKeepsDigitsAndEmptyValues(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	body := w.get(t, "/api/v1/devices/"+string(lampA)+"/resources/types").Body.String()
	for _, s := range []string{
		`"big":9007199254740993`, `"emptyObj":{}`, `"empty":""`, `"null":null`, `"nested":{"x":{"y":[]}}`, `"arr":[1,"a",true,[]]`,
		`"html":"\u003ca\u003e\u0026b"`, `"bytes":"AQID"`, `"neg":-3`, `"float":1.5`,
	} {
		if !strings.Contains(body, s) {
			t.Errorf("%s is not in %s", s, body)
		}
	}
	if strings.Contains(body, "correlationId") {
		t.Errorf("an empty member of the message is there: %s", body)
	}
}

func TestHrefsInPaths(t *testing.T) { // C16
	w := newWorld(t)
	d := "/api/v1/devices/" + string(lampA) + "/resources"
	for _, path := range []string{"/light/1", "/light/1/", "//light/1", "/%2Flight%2F1", "/light%2F1", "/light//1", "/%6Cight/1"} {
		a := w.get(t, d+path)
		if a.Code != 200 {
			t.Errorf("%s: status %d", path, a.Code)
			continue
		}
		want(t, path, a.json()["data"].(map[string]any)["resourceId"].(map[string]any)["href"], any("/light/1"))
	}
	for _, path := range []string{"/light/%2E%2E/1", "/%00", "/a/%2e", "/%ff", "/" + strings.Repeat("a", 1025)} {
		a := w.get(t, d+path)
		want(t, path, a.Code, 400)
		want(t, path, a.reason(), "href-invalid")
	}
	for _, path := range []string{"/nothing", "/LIGHT/1", "/hidden"} {
		want(t, path, w.get(t, d+path).Code, 404)
	}
	// Only a segment "events" of its own is the route; behind an encoded slash it belongs to the href.
	want(t, "resource named events", w.get(t, d+"/a%2Fevents").json()["types"].([]any)[0], any("x.odd"))
	want(t, "events of /a", len(w.get(t, d+"/a/events").results()), 0)
	want(t, "events alone is an href", w.get(t, d+"/events").Code, 404)
}

func TestSingleReadsOfUnknownThings(t *testing.T) { // C20 for reads
	w := newWorld(t)
	for _, target := range []string{
		"/api/v1/devices/" + string(unknown) + "/resources/light/1", "/api/v1/devices/" + string(bobs) + "/resources/light/1",
		"/api/v1/devices/abc/resources/light/1", "/api/v1/devices/" + string(unknown) + "/resource-links",
		"/api/v1/devices/" + string(bobs) + "/resource-links", "/api/v1/devices/" + string(lampA) + "/resource-links?typeFilter=x.none",
	} {
		a := w.get(t, target)
		want(t, target, a.Code, 404)
		want(t, target, a.json()["code"], any(json.Number("5")))
		want(t, target, a.reason(), "not-found")
	}
	// What is looked for is named, by its href and not by how that was written, and cut if it is long.
	for target, named := range map[string]string{
		devA + "/resources/none": "/none", devA + "/resources/%2Fa%22b//c?onlyContent=1": "/a\"b/c",
		"/api/v1/devices/" + string(bobs) + "/resources/light/1": "/light/1", "/api/v1/devices/abc/resources/light/1": "/light/1",
		devA + "/resources/" + strings.Repeat("\u00e9", 200): "/" + strings.Repeat("\u00e9", 127),
	} {
		a := w.get(t, target)
		want(t, target, a.Code, 404)
		want(t, target, a.json()["message"], any(fmt.Sprintf("not found: %q", named)))
	}
}

func TestETags(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const octets = "/api/v1/devices/" + string(lampA) + "/resources/octets" // the device gave it no ETag
	for _, c := range []struct {
		target string
		header string
		want   int
	}{
		{light, "", 200},
		{light, "ETag: sbI=", 304},
		{light, "ETag: AAAA", 200},
		{light, "ETag: ***", 200},
		{light + "?etag=sbI%3D", "", 304},
		{light + "?etag=AAAA&etag=sbI%3D", "", 304},
		{light + "?etag=sbI%3D", "ETag: AAAA", 200},      // the header wins
		{light + "?onlyContent=true", "ETag: sbI=", 304}, // C15
		{light, `If-None-Match: "sbI="`, 304},
		{light, `If-None-Match: W/"x", W/"sbI="`, 304},
		{light, `If-None-Match: *`, 304},
		{light, `If-None-Match: "AAAA"`, 200},
		{octets, `If-None-Match: W/"@17"`, 304},
		{octets, `If-None-Match: W/"@16"`, 200},
		{octets, `ETag: `, 200},
	} {
		var h []string
		if c.header != "" {
			h = []string{c.header}
		}
		a := w.get(t, c.target, h...)
		want(t, c.target+" "+c.header, a.Code, c.want)
		tag := `W/"sbI="`
		if strings.HasPrefix(c.target, octets) {
			tag = `W/"@17"`
		}
		want(t, "ETag", a.Header().Get("ETag"), tag)
		if c.want == 304 && a.Body.Len() > 0 {
			t.Errorf("304 with a body: %s", a.Body)
		}
	}
}

func TestGetLinks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rs := w.get(t, "/api/v1/resource-links").results()
	wantList(t, "devices", ids(rs, "deviceId"), string(lampA), string(lampB), string(nameless))
	rs = w.get(t, "/api/v1/resource-links?typeFilter=core.light").results()
	wantList(t, "devices", ids(rs, "deviceId"), string(lampA), string(lampB))
	want(t, "only matching links", len(rs[0]["resources"].([]any)), 1)
	a := w.get(t, "/api/v1/devices/"+string(lampA)+"/resource-links?typeFilter=oic.wk.d").json()
	l := a["resources"].([]any)[0].(map[string]any)
	want(t, "href", l["href"], any("/oic/d"))
	want(t, "policy", l["policy"].(map[string]any)["bitFlags"], any(json.Number("3")))
	want(t, "endpoint", l["endpointInformations"].([]any)[0].(map[string]any)["endpoint"], any("coaps://[fe80::1]:5684"))
	want(t, "validUntil", l["validUntil"], any(strconv.FormatInt(t0, 10)))
	want(t, "version", a["eventMetadata"].(map[string]any)["version"], any("1"))
	want(t, "owner", a["auditContext"].(map[string]any)["owner"], any("alice"))
	want(t, "deviceIdFilter", len(w.get(t, "/api/v1/resource-links?deviceIdFilter="+string(lampB)).results()), 1)
}

func TestGetDevicesMetadata(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	rs := w.get(t, "/api/v1/devices-metadata").results()
	wantList(t, "devices", ids(rs, "deviceId"), string(lampA), string(lampB))
	want(t, "twinEnabled", rs[0]["twinEnabled"], any(true))
	want(t, "canceled", rs[0]["canceled"], any(false))
	want(t, "sequence", rs[0]["twinSynchronization"].(map[string]any)["commandMetadata"].(map[string]any)["sequence"], any("9"))
	want(t, "offline", rs[1]["connection"].(map[string]any)["status"], any("OFFLINE"))
	want(t, "when it is expected", rs[0]["nextContact"], any(strconv.FormatInt(t0+2, 10)))
	want(t, "type", len(w.get(t, "/api/v1/devices-metadata?typeFilter=x.none").results()), 0)
	want(t, "device", len(w.get(t, "/api/v1/devices-metadata?deviceIdFilter="+string(lampB)).results()), 1)
}

// history is three commits of lamp A, the second with two events.
func history(w *world) {
	c := func(seq uint64, owner hub.Owner, e ...hub.Event) hub.Commit {
		return hub.Commit{Device: lampA, Seq: seq, Time: t0 + int64(seq), Owner: owner, Generation: 1, Events: e}
	}
	w.commits[lampA] = []hub.Commit{
		c(1, bob, hub.Event{Kind: hub.ResourceChanged, Href: "/light/1", Content: ocf("bob's secret")}),
		c(2, alice, hub.Event{Kind: hub.Registered}, hub.Event{Kind: hub.MetadataUpdated, Version: 0, Metadata: &hub.Metadata{Connection: hub.Connection{Online: true, ID: "c"}}, User: "alice-sub", Connection: "c", Message: 1}),
		c(3, alice, hub.Event{Kind: hub.LinksPublished, Links: []hub.Link{{Href: "/light/1", Types: []string{"core.light"}}}},
			hub.Event{Kind: hub.ResourceChanged, Href: "/light/1", Version: 5, Status: hub.StatusOK, Content: ocf(map[string]any{"power": 1}), ETag: []byte{1}, Types: []string{"core.light"}, Correlation: "corr"}),
		c(4, alice, hub.Event{Kind: hub.ResourceChanged, Href: "/other", Status: hub.StatusNotFound, Content: hub.Content{Format: hub.FormatNone}},
			hub.Event{Kind: hub.LinksUnpublished, Hrefs: []hub.Href{"/other"}}, hub.Event{Kind: hub.Unregistered}),
	}
}

func kinds(rs []map[string]any) []string {
	var out []string
	for _, r := range rs {
		for k := range r {
			if k != "cursor" {
				out = append(out, k)
			}
		}
	}
	return out
}

func TestGetEvents(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	history(w)
	all := []string{"deviceMetadataUpdated", "resourceLinksPublished", "resourceChanged", "resourceChanged", "resourceLinksUnpublished"}
	rs := w.get(t, "/api/v1/events").results()
	wantList(t, "all, without what happened under another owner", kinds(rs), all...)
	changed := rs[2]["resourceChanged"].(map[string]any)
	want(t, "content", changed["content"].(map[string]any)["power"], any(json.Number("1")))
	want(t, "version", changed["eventMetadata"].(map[string]any)["version"], any("5"))
	want(t, "time", changed["eventMetadata"].(map[string]any)["timestamp"], any(strconv.FormatInt(t0+3, 10)))
	want(t, "correlation", changed["auditContext"].(map[string]any)["correlationId"], any("corr"))
	want(t, "hrefs", rs[4]["resourceLinksUnpublished"].(map[string]any)["hrefs"].([]any)[0], any("/other"))
	want(t, "bob has his own", len(w.do(t, "bob", "GET", "/api/v1/events?deviceIdFilter="+string(lampA)).results()), 1)

	for _, c := range []struct {
		target string
		want   []string
	}{
		{"/api/v1/devices/" + string(lampA) + "/events", all},
		{"/api/v1/devices/" + string(unknown) + "/events", nil},
		{"/api/v1/devices/abc/events", nil},
		{light + "/events", []string{"resourceChanged"}},
		{"/api/v1/devices/" + string(lampA) + "/resources/nothing/events", nil},
		{"/api/v1/events?resourceIdFilter=" + string(lampA) + "/light/1", []string{"resourceChanged"}},
		{"/api/v1/events?timestampFilter=" + strconv.FormatInt(t0+3, 10), all[3:]},
		{"/api/v1/events?timestampFilter=9000000000000000000", nil},
		{"/api/v1/events?timestampFilter=-1", all},
	} {
		wantList(t, c.target, kinds(w.get(t, c.target).results()), c.want...)
	}
	a := w.get(t, "/api/v1/events?timestampFilter=abc")
	want(t, "bad time", a.Code, 400)
	want(t, "bad time", a.reason(), "query-invalid")
	// Protobuf's JSON has the same events.
	wantList(t, "protojson", kinds(w.get(t, "/api/v1/events", "Accept: application/protojson").results()), all...)
}

func TestPagesHaveNoGapsAndNoRepeats(t *testing.T) {
	t.Parallel()
	for _, path := range []string{"/api/v1/devices", "/api/v1/resource-links", "/api/v1/resources", "/api/v1/devices-metadata", "/api/v1/events"} {
		w := newWorld(t)
		history(w)
		var whole []string
		for line := range strings.Lines(w.get(t, path).Body.String()) {
			whole = append(whole, line)
		}
		for limit := 1; limit <= len(whole)+1; limit++ {
			var paged []string
			cursor := ""
			for range 100 {
				rs := w.get(t, path+"?limit="+strconv.Itoa(limit)+"&cursor="+cursor)
				lines := slices.Collect(strings.Lines(rs.Body.String()))
				next := ""
				for i, r := range rs.results() {
					if c, ok := r["cursor"]; ok {
						want(t, "only the last has a cursor", i, len(lines)-1)
						next = c.(string)
						lines[i] = strings.Replace(lines[i], `,"cursor":"`+next+`"`, "", 1)
					}
				}
				if len(lines) > limit {
					t.Fatalf("%s: %d elements for limit %d", path, len(lines), limit)
				}
				paged = append(paged, lines...)
				if cursor = next; cursor == "" {
					break
				}
			}
			if !slices.Equal(paged, whole) {
				t.Errorf("%s in pages of %d:\ngot  %v\nwant %v", path, limit, paged, whole)
			}
		}
	}
}

func TestCursorIsBoundToCallAndOwner(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cursor := w.get(t, "/api/v1/devices?limit=1").results()[0]["cursor"].(string)
	want(t, "good", w.get(t, "/api/v1/devices?cursor="+cursor).Code, 200)
	damaged := []byte(cursor)
	damaged[10] ^= 1
	for what, a := range map[string]answer{
		"another owner": w.do(t, "bob", "GET", "/api/v1/devices?cursor="+cursor),
		"another call":  w.get(t, "/api/v1/resources?cursor="+cursor),
		"damaged":       w.get(t, "/api/v1/devices?cursor="+string(damaged)),
		"garbage":       w.get(t, "/api/v1/devices?cursor=***"),
		"short":         w.get(t, "/api/v1/devices?cursor=AAAA"),
		"another type":  w.get(t, "/api/v1/devices?typeFilter=oic.wk.d&cursor="+cursor),
		"other devices": w.get(t, "/api/v1/devices?deviceIdFilter="+string(lampB)+"&cursor="+cursor),
		"other states":  w.get(t, "/api/v1/devices?statusFilter=ONLINE&cursor="+cursor),
		"another time":  w.get(t, "/api/v1/devices?at="+strconv.FormatInt(t0, 10)+"&cursor="+cursor),
	} {
		want(t, what, a.Code, 400)
		want(t, what, a.reason(), "cursor-invalid")
	}
	want(t, "limit", w.get(t, "/api/v1/devices?limit=many").reason(), "query-invalid")
}

func TestTimeTravel(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	var asked []time.Time
	w.directory.deviceAt = func(_ context.Context, o hub.Owner, id hub.DeviceID, at time.Time) (*hub.Device, error) {
		asked = append(asked, at)
		if id != lampA || o != alice {
			return nil, hub.NewError(hub.NotFound, "", "")
		}
		d := lamp(lampA, "then", false)
		return d, nil
	}
	w.identities.eventsOwned = func(context.Context, hub.Owner) ([]hub.DeviceID, error) {
		return []hub.DeviceID{lampA, lampB, unknown}, nil
	}
	then := time.Unix(0, t0)
	for _, at := range []string{strconv.FormatInt(t0, 10), then.UTC().Format(time.RFC3339Nano)} {
		asked = nil
		rs := w.get(t, "/api/v1/devices?at="+at).results()
		wantList(t, "devices", ids(rs, "id"), string(lampA))
		want(t, "name", rs[0]["name"], any("then"))
		want(t, "asked for all that were ever owned", len(asked), 3)
		if !asked[0].Equal(then) {
			t.Errorf("asked for %v", asked[0])
		}
		want(t, "resources", len(w.get(t, "/api/v1/resources?at="+at).results()), 9)
		want(t, "resource", w.get(t, light+"?at="+at).Code, 200)
		want(t, "other device", w.get(t, "/api/v1/devices/"+string(lampB)+"/resources/light/1?at="+at).Code, 404)
	}
	for _, at := range []string{"yesterday", "-5", "0"} {
		want(t, at, w.get(t, "/api/v1/devices?at="+at).reason(), "query-invalid")
	}
}

func TestDeleteDevices(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.do(t, "alice", "DELETE", "/api/v1/devices?deviceIdFilter="+string(lampB)+"&deviceIdFilter="+string(unknown)+"&deviceIdFilter="+string(bobs))
	want(t, "one of three", a.Body.String(), `{"deviceIds":["`+string(lampB)+`"]}`+"\n")
	want(t, "again", w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(lampB)).Body.String(), "{}\n")
	want(t, "no UUID", w.do(t, "alice", "DELETE", "/api/v1/devices/abc").Body.String(), "{}\n")
	want(t, "single", w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(fresh), "Accept: application/protojson").json()["deviceIds"].([]any)[0], any(string(fresh)))
	want(t, "reader", w.do(t, "reader", "DELETE", "/api/v1/devices/"+string(lampA)).reason(), "scope-missing")
	wantList(t, "signed off", w.signOffs, lampB, fresh)
}

func TestDeleteNeedsAFilterOrAll(t *testing.T) { // C1
	for _, c := range []struct{ query, reason string }{
		{"", "filter-empty"},
		{"?deviceIdFilter=", "filter-empty"},
		{"?deviceIdFilter=&deviceIdFilter=" + string(lampA), "filter-empty"},
		{"?all=false", "filter-empty"},
		{"?all=maybe", "query-invalid"},
		{"?all=true&deviceIdFilter=" + string(lampA), "filter-and-all"},
		{"?deviceIdFilter=%zz", "query-invalid"},
		{"?deviceIdFilter=abc&deviceIdFilter=" + string(lampA), "filter-invalid"},
	} {
		w := newWorld(t)
		a := w.do(t, "alice", "DELETE", "/api/v1/devices"+c.query)
		want(t, c.query, a.Code, 400)
		want(t, c.query, a.reason(), c.reason)
		want(t, c.query+": deleted", len(w.signOffs), 0)
	}
	w := newWorld(t)
	a := w.do(t, "alice", "DELETE", "/api/v1/devices?all=true")
	want(t, "all", len(a.json()["deviceIds"].([]any)), 4)
	if w.pictures[bobs] == nil {
		t.Error("bob's device is gone")
	}
}

func TestConfiguration(t *testing.T) {
	w := newWorld(t)
	for _, path := range []string{"/.well-known/configuration", "/.well-known/hub-configuration"} {
		a := w.do(t, "", "GET", path)
		c := a.json()
		want(t, "id", c["id"], any(hubID))
		if n, ok := c["currentTime"].(json.Number); !ok || len(n) < 19 {
			t.Errorf("currentTime is %v, no number of nanoseconds", c["currentTime"])
		}
		want(t, "default ttl is a number", c["defaultCommandTimeToLive"], any(json.Number("10000000000")))
		want(t, "empty members stay", c["jwtDeviceIdClaim"], any(""))
		m2m, there := c["m2mOauthClient"]
		want(t, "m2m is null", m2m == nil && there, true)
		for _, h := range []string{path + "?accept=application/protojson", path} {
			a := w.do(t, "", "GET", h, "Accept: application/protojson")
			want(t, "type", a.Header().Get("Content-Type"), "application/protojson")
			want(t, "ttl is a text", a.json()["defaultCommandTimeToLive"], any("10000000000"))
		}
	}
	want(t, "query", w.do(t, "", "GET", "/.well-known/configuration?accept=application/protojson").Header().Get("Content-Type"), "application/protojson")
}

func TestPublicPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	want(t, "root", w.do(t, "", "GET", "/").Code, 200)
	want(t, "openapi", w.do(t, "", "GET", "/api/v1/openapi.json").json()["openapi"], any("3.1.0"))
	want(t, "unknown page", w.do(t, "", "GET", "/some/page").Code, 404)
	w = newWorld(t, func(_ *Config, d *Deps) {
		d.Pages = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, "page "+r.URL.Path) })
	})
	want(t, "page", w.do(t, "", "GET", "/login").Body.String(), "page /login")
	want(t, "probes of the root still find it alive", w.do(t, "", "GET", "/").json()["name"], any("coaphub"))
	want(t, "the API is not", w.get(t, "/api/v1/nothing").Code, 404)
	want(t, "counted", w.counter(t, "coaphub_api_requests_total", "page", "http", "ok"), 1)
	w = newWorld(t, func(_ *Config, d *Deps) {
		d.Pages = http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("page") })
	})
	want(t, "a page's panic ends one request", w.do(t, "", "GET", "/page").Code, 500)
}

func TestUnknownPathsAndMethods(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.get(t, "/api/v1/nothing")
	want(t, "unknown path", a.Code, 404)
	want(t, "text", a.json()["message"], any("Not Found"))
	want(t, "without token", w.do(t, "", "GET", "/api/v1/nothing").Code, 401)
	for _, path := range []string{"/api/v1/devices/x/y", "/api/v1/devices/x/events/y", "/api/v1/devices/{deviceId}/metadata/x", "/api/v1//devices"} {
		want(t, path, w.get(t, path).Code, 404)
	}
	for _, c := range []struct{ method, path, allow string }{
		{"POST", "/api/v1/devices", "DELETE, GET, HEAD"},
		{"PUT", "/api/v1/resources", "GET, HEAD"},
		{"PATCH", "/api/v1/devices/" + string(lampA), "DELETE, GET, HEAD"},
		{"OPTIONS", "/api/v1/devices", "DELETE, GET, HEAD"},
		{"POST", "/api/v1/ws/events", "GET"},
	} {
		a := w.do(t, "", c.method, c.path) // even without token
		want(t, c.method+c.path, a.Code, 501)
		want(t, "code", a.json()["code"], any(json.Number("12")))
		want(t, "text", a.json()["message"], any("Method Not Allowed"))
		want(t, "Allow", a.Header().Get("Allow"), c.allow)
	}
	want(t, "HEAD", w.do(t, "alice", "HEAD", "/api/v1/devices").Code, 200)
}

func TestAuthorization(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, c := range []struct {
		header, reason, challenge string
		code                      int
	}{
		{"", "token-missing", `Bearer realm="coaphub"`, 401},
		{"Basic dTpw", "token-missing", `Bearer realm="coaphub"`, 401},
		{"Bearer", "token-missing", `Bearer realm="coaphub"`, 401},
		{"Bearer nonsense", "token-invalid", `Bearer realm="coaphub", error="invalid_token"`, 401},
		{"Bearer " + strings.Repeat("a", maxToken+1), "token-invalid", `Bearer realm="coaphub", error="invalid_token"`, 401},
		{"Bearer lamp", "device-token", "", 403},
		{"Bearer scopeless", "scope-missing", `Bearer realm="coaphub", error="insufficient_scope"`, 403},
		{"bearer alice", "", "", 200},
	} {
		a := w.do(t, "", "GET", "/api/v1/devices", "Authorization: "+c.header)
		want(t, c.header[:min(len(c.header), 20)], a.Code, c.code)
		if c.code != 200 {
			want(t, c.header[:min(len(c.header), 20)], a.reason(), c.reason)
		}
		want(t, "challenge", a.Header().Get("WWW-Authenticate"), c.challenge)
	}
	w.verifier.verify = func(context.Context, string) (hub.Claims, error) {
		return hub.Claims{}, &hub.Error{Kind: hub.Unavailable, Code: "provider-unavailable", RetryAfter: 1500 * time.Millisecond, Err: errors.New("dial tcp 10.0.0.1")}
	}
	a := w.get(t, "/api/v1/devices")
	want(t, "provider away", a.Code, 503)
	want(t, "reason", a.reason(), "provider-unavailable")
	want(t, "Retry-After", a.Header().Get("Retry-After"), "2")
	want(t, "no challenge: the token may be good", a.Header().Get("WWW-Authenticate"), "")
	if strings.Contains(a.Body.String(), "10.0.0.1") {
		t.Errorf("the cause is shown: %s", a.Body)
	}
}

func TestHostsAndOrigins(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.API.HTTP.Hosts = []string{"hub.example", "fe80::1"} })
	for host, code := range map[string]int{
		"localhost:8080": 200, "127.0.0.1": 200, "[::1]:8080": 200, "hub.example": 200, "HUB.example.:8080": 200, "[fe80::1]:1": 200,
		"example.com": 200, "evil.example": 421, "": 421, "hub.example.evil.example": 421, "localhost.evil": 421,
	} {
		a := w.do(t, "", "GET", "/.well-known/configuration", "Host: "+host)
		want(t, host, a.Code, code)
		if code == 421 {
			want(t, host, a.reason(), "host-not-allowed")
		}
	}
	a := w.do(t, "alice", "DELETE", "/api/v1/devices?all=true", "Origin: https://evil.example", "Sec-Fetch-Site: cross-site")
	want(t, "cross-origin", a.Code, 403)
	want(t, "cross-origin", a.reason(), "cross-origin")
	want(t, "deleted", len(w.signOffs), 0)
}

func TestBodyLimit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.do(t, "alice", "GET", "/api/v1/devices")
	want(t, "none", a.Code, 200)
	r, _ := http.NewRequest("DELETE", "http://localhost/api/v1/devices/"+string(lampA), io.LimitReader(zeros{}, 1<<20+1))
	r.Header.Set("Authorization", "Bearer alice")
	r.ContentLength = 1<<20 + 1
	rec := newRecorder()
	w.HTTPHandler().ServeHTTP(rec, r)
	checkAnswer(t, r, rec)
	want(t, "one byte more", rec.Code, 413)
	want(t, "deleted", len(w.signOffs), 0)
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

func failing(n int, w *world, err error) func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		return func(yield func(*hub.Device, error) bool) {
			for range n {
				if !yield(w.pictures[lampA], nil) {
					return
				}
			}
			yield(nil, err)
		}
	}
}

func TestErrorBeforeAndInAList(t *testing.T) { // C18
	away := &hub.Error{Kind: hub.Unavailable, Op: "directory.Devices", Err: errors.New("disk on fire")}
	w := newWorld(t)
	for _, n := range []int{0, 1} { // what is not sent yet is taken back
		w.directory.devices = failing(n, w, away)
		a := w.get(t, "/api/v1/devices")
		want(t, "status", a.Code, 503)
		want(t, "no wrapper", a.reason(), "unavailable")
		want(t, "Retry-After", a.Header().Get("Retry-After"), "5")
		if strings.Contains(a.Body.String(), "fire") {
			t.Errorf("the cause is shown: %s", a.Body)
		}
	}
	w.directory.devices = failing(1000, w, away)
	a := w.abort(t, "/api/v1/devices")
	want(t, "status", a.Code, 200)
	lines := strings.Split(strings.TrimSuffix(a.Body.String(), "\n"), "\n")
	var last struct{ Error struct{ Code int } }
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &last); err != nil {
		t.Fatal(err)
	}
	want(t, "last line", last.Error.Code, 14)
	want(t, "counted", w.counter(t, "coaphub_api_requests_total", "getDevices", "http", "unavailable"), 3)
}

func TestEveryKindHasItsStatus(t *testing.T) {
	t.Parallel()
	for _, k := range hub.Kinds() {
		if _, ok := codeOf[k]; !ok {
			t.Errorf("no gRPC code for %v", k)
		}
		status, ok := statusOf[k]
		if !ok {
			t.Errorf("no HTTP status for %v", k)
		}
		w := newWorld(t)
		w.directory.devices = failing(0, w, &hub.Error{Kind: k, Op: "test", Err: errors.New("the cause")})
		a := w.get(t, "/api/v1/devices")
		want(t, k.String(), a.Code, status)
		want(t, k.String(), a.json()["code"], any(json.Number(strconv.Itoa(int(codeOf[k])))))
		want(t, k.String(), a.reason(), k.String())
		want(t, k.String(), a.json()["message"], any(k.Sentence()))
		want(t, k.String()+" Retry-After", a.Header().Get("Retry-After") != "", k == hub.Unavailable || k == hub.Exhausted)
		want(t, "X-Content-Type-Options", a.Header().Get("X-Content-Type-Options"), "nosniff")
		logged := strings.Contains(w.log.String(), "the cause")
		want(t, k.String()+" logged", logged, k == hub.Internal)
	}
	want(t, "no more", len(codeOf), len(hub.Kinds()))
	want(t, "no more", len(statusOf), len(hub.Kinds()))
}

// The table of doors in docs/errors.md is what callers program against.
func TestDocumentedDoorsAreTheTables(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := map[string][]string{}
	for line := range strings.Lines(string(b)) {
		if cells := strings.Split(line, "|"); len(cells) == 7 { // kind, CoAP, HTTP, gRPC, meaning, and an empty one at each end
			rows[strings.TrimSpace(cells[1])] = cells
		}
	}
	for _, k := range hub.Kinds() {
		r := rows[k.String()]
		if r == nil {
			t.Errorf("docs/errors.md has no row for %v", k)
			continue
		}
		want(t, k.String()+" over HTTP", strings.TrimSpace(r[3]), strconv.Itoa(statusOf[k]))
		want(t, k.String()+" over gRPC", strings.TrimSpace(r[4]), code.Code(codeOf[k]).String())
	}
}

func TestPanicEndsOneRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	good := w.directory.devices
	w.directory.devices = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] { panic("boom") }
	a := w.get(t, "/api/v1/devices")
	want(t, "status", a.Code, 500)
	want(t, "reason", a.reason(), "internal")
	want(t, "counted", w.counter(t, "coaphub_api_panics_total", "http"), 1)
	if !strings.Contains(w.log.String(), "boom") || !strings.Contains(w.log.String(), "http_test.go") {
		t.Errorf("no stack in the log: %s", w.log)
	}
	w.directory.devices = good
	want(t, "the next", w.get(t, "/api/v1/devices").Code, 200)
}

func TestLargeListsAreCompressed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	plain := w.get(t, "/api/v1/resources")
	for _, c := range []struct{ accept, want string }{
		{"gzip", "gzip"}, {"zstd", "zstd"}, {"gzip, deflate, br, zstd", "zstd"}, {"zstd;q=0, gzip;q=0.5", "gzip"}, {"identity", ""}, {"gzip; q=0", ""}, {"br", ""}, {"gzip;q=x", ""},
	} {
		a := w.get(t, "/api/v1/resources", "Accept-Encoding: "+c.accept)
		want(t, c.accept, a.Header().Get("Content-Encoding"), c.want)
		var body io.Reader = a.Body
		var err error
		switch c.want {
		case "gzip":
			body, err = gzip.NewReader(a.Body)
		case "zstd":
			var z *zstd.Decoder
			z, err = zstd.NewReader(a.Body)
			defer z.Close()
			body = z
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(body)
		if err != nil {
			t.Fatal(err)
		}
		want(t, c.accept, string(b), plain.Body.String())
	}
	want(t, "small", w.get(t, light, "Accept-Encoding: gzip").Header().Get("Content-Encoding"), "")
	if !slices.Contains(plain.Header().Values("Vary"), "Accept-Encoding") {
		t.Error("no Vary: Accept-Encoding")
	}
	want(t, "not for shared caches", plain.Header().Get("Cache-Control"), "private, no-cache")
}

func TestCallerThatWentAwayIsNoFault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	ctx, cancel := context.WithCancel(t.Context())
	w.directory.devices = func(ctx context.Context, _ hub.Owner, _ []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		return func(yield func(*hub.Device, error) bool) {
			cancel()
			<-ctx.Done()
			yield(nil, ctx.Err())
		}
	}
	r, err := http.NewRequestWithContext(ctx, "GET", "http://localhost/api/v1/devices", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer alice")
	w.HTTPHandler().ServeHTTP(newRecorder(), r)
	want(t, "outcome", w.counter(t, "coaphub_api_requests_total", "getDevices", "http", "gone"), 1)
}

// What an answer is called, the log calls it too.
func TestAnswersNameTheirRequest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.directory.devices = failing(0, w, errors.New("the cause"))
	a := w.get(t, "/api/v1/devices")
	id := a.Header().Get("X-Request-Id")
	var logged bool
	for line := range strings.Lines(w.log.String()) {
		logged = logged || strings.Contains(line, "the cause") && strings.Contains(line, "request="+id)
	}
	if id == "" || !logged {
		t.Errorf("request %q: %s", id, w.log)
	}
	want(t, "another", w.get(t, "/").Header().Get("X-Request-Id") == id, false)

	w.directory.devices = failing(0, w, errors.New("another cause"))
	s, err := pb.NewGrpcGatewayClient(w.dial(t)).GetDevices(as(t, "alice"), &pb.GetDevicesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	h, err := s.Header()
	if err != nil {
		t.Fatal(err)
	}
	if _, err = s.Recv(); err == nil {
		t.Fatal("no error")
	}
	logged = false
	for line := range strings.Lines(w.log.String()) {
		logged = logged || strings.Contains(line, "another cause") && len(h["x-request-id"]) == 1 && strings.Contains(line, "request="+h["x-request-id"][0])
	}
	want(t, "gRPC", logged, true)
}
