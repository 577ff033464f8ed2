package grpcgateway

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

const (
	devA  = "/api/v1/devices/" + string(lampA)
	linkA = devA + "/resource-links/light/1"
)

func TestConvert(t *testing.T) {
	t.Parallel()
	reported := func(media string) *hub.Resource {
		return &hub.Resource{Content: hub.Content{Type: media, Format: hub.FormatNone, Data: []byte{0}}}
	}
	ocf, text, octets := reported(mediaOCFCBOR), reported("text/plain; charset=utf-8"), reported("application/octet-stream")
	for name, c := range map[string]struct {
		media, data string
		twin        *hub.Resource
		format      int32
		want        string // "": as it came
		code        string // of the error
	}{
		"JSON as CBOR":            {mediaJSON, ` {"n":-1,"a":[1,2.5,true,null],"s":"ü"} `, ocf, 10000, "\xa3\x61n\x20\x61a\x84\x01\xfb\x40\x04\x00\x00\x00\x00\x00\x00\xf5\xf6\x61s\x62ü", ""},
		"one value":               {mediaJSON, `5`, ocf, 10000, "\x05", ""},
		"JSON as plain CBOR":      {mediaJSON, `{}`, reported(cborType), 60, "\xa0", ""},
		"JSON as it is":           {mediaJSON, `{"n": 1}`, reported(mediaJSON), 50, "", ""},
		"with a parameter":        {"application/JSON; charset=utf-8", `{}`, ocf, 10000, "\xa0", ""},
		"never reported":          {mediaJSON, `{"n": 1}`, nil, 50, "", ""},
		"an error was reported":   {mediaJSON, `{}`, text, 10000, "\xa0", ""},
		"CBOR as JSON":            {mediaOCFCBOR, "\xa1\x61n\x01", reported(mediaJSON), 50, `{"n":1}`, ""},
		"CBOR as the other":       {cborType, "\xa1\x61n\x01", ocf, 10000, "", ""},
		"text":                    {"text/plain", "x", text, 0, "", ""},
		"octets":                  {"application/octet-stream", "x", octets, 42, "", ""},
		"large numbers":           {mediaJSON, `[18446744073709551615,-18446744073709551616,18446744073709551616,-18446744073709551617,1.0]`, ocf, 10000, "\x85\x1b\xff\xff\xff\xff\xff\xff\xff\xff\x3b\xff\xff\xff\xff\xff\xff\xff\xff\xc2\x49\x01\x00\x00\x00\x00\x00\x00\x00\x00\xc3\x49\x01\x00\x00\x00\x00\x00\x00\x00\x00\xfb\x3f\xf0\x00\x00\x00\x00\x00\x00", ""},
		"text for a CBOR one":     {"text/plain", "x", ocf, 0, "", "content-type-unsupported"},
		"CBOR for octets":         {cborType, "\xa0", octets, 60, "", ""},
		"no type":                 {"", "x", ocf, 0, "", "content-type-unknown"},
		"a type without a format": {"image/png", "x", ocf, 0, "", "content-type-unknown"},
		"nothing":                 {mediaJSON, "", ocf, 0, "", "content-missing"},
		"half":                    {mediaJSON, `{"n":`, ocf, 0, "", "content-invalid"},
		"two":                     {mediaJSON, `{} {}`, ocf, 0, "", "content-invalid"},
		"twice":                   {mediaJSON, `{"a":1,"a":2}`, ocf, 0, "", "content-invalid"},
		"twice, as it is":         {mediaJSON, `{"a":1,"a":2}`, reported(mediaJSON), 0, "", "content-invalid"},
		"no UTF-8":                {mediaJSON, "\"\xff\"", ocf, 0, "", "content-invalid"},
		"deep":                    {mediaJSON, strings.Repeat("[", 100) + strings.Repeat("]", 100), ocf, 0, "", "content-invalid"},
		"endless number":          {mediaJSON, strings.Repeat("9", 2000), ocf, 0, "", "content-invalid"},
		"beyond floats":           {mediaJSON, "1e999", ocf, 0, "", "content-invalid"},
		"half CBOR":               {cborType, "\xa1", ocf, 0, "", "content-invalid"},
		"CBOR that is no JSON":    {cborType, "\xa2\x01\x01\x61\x31\x02", reported(mediaJSON), 0, "", "content-invalid"},
		"too large":               {mediaJSON, `"` + strings.Repeat("x", hub.MaxContent) + `"`, ocf, 0, "", "content-too-large"},
		"too large as CBOR":       {mediaJSON, "[" + strings.Repeat("1.0,", 50_000) + "1]", ocf, 0, "", "content-too-large"},
	} {
		got, err := convert(hub.Content{Type: c.media, Format: hub.FormatNone, Data: []byte(c.data)}, c.twin)
		if c.code != "" {
			code, _ := hub.Public(err)
			want(t, name, code, c.code)
			continue
		}
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.want == "" {
			c.want = c.data
		}
		want(t, name, string(got.Data), c.want)
		want(t, name, got.Format, c.format)
		want(t, name, got.Type, hub.MediaType(c.format))
	}
}

// FuzzConvert: whatever JSON becomes CBOR reads as the same JSON again.
func FuzzConvert(f *testing.F) {
	for _, s := range []string{`{"a":[1,-1,1.5,"x",null,true,{}]}`, `1e5`, `-0`, `"\u2028"`, `18446744073709551616`, strings.Repeat("3", 400)} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := cborOfJSON(data)
		if err != nil {
			return
		}
		again, err := appendCBOR(nil, b)
		if err != nil {
			t.Fatalf("%q became %x, which JSON cannot show", data, b)
		}
		var was, is any
		var tooLarge *json.UnmarshalTypeError
		if errors.As(json.Unmarshal(data, &was), &tooLarge) { // a number beyond those that Go compares here
			if !json.Valid(again) {
				t.Fatalf("%q became %q", data, again)
			}
			return
		}
		if json.Unmarshal(again, &is) != nil || fmt.Sprint(was) != fmt.Sprint(is) {
			t.Fatalf("%q became %q", data, again)
		}
	})
}

// What a repeat is known by does not change with what the resource reports meanwhile, and one that came too late for its
// conversion still has the outcome of the first.
func TestRepeatedCommand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	command, known := w.directory.command, true
	w.directory.command = func(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error) {
		out, err := command(ctx, owner, o)
		if o.Repeat && !known {
			return hub.Outcome{}, &hub.Error{Kind: hub.NotFound}
		}
		return out, err
	}
	repeat := func(reported *hub.Content, headers ...string) answer {
		rs := resourceSet{}
		if reported != nil {
			rs = resourceSet{{Href: "/light/1", Owner: alice, Content: *reported}}
		}
		d := *w.pictures[lampA]
		d.Resources = rs
		w.pictures[lampA] = &d
		return w.send(t, "alice", "PUT", light, "\xa0", append(headers, "Content-Type: application/cbor")...)
	}
	asJSON, octets := hub.Content{Type: mediaJSON, Data: []byte("{}")}, hub.Content{Type: "application/octet-stream", Data: []byte{0}}
	for i, reported := range []*hub.Content{nil, &asJSON, &octets} {
		want(t, "repeat", repeat(reported, "Idempotency-Key: k").Code, 200)
		want(t, "asked", fmt.Sprint(w.orders[i].Asked), fmt.Sprint(w.orders[0].Asked))
		want(t, "content", string(w.orders[i].Content.Data), []string{"\xa0", "{}", "\xa0"}[i])
	}
	// One that cannot be converted is a repeat or nothing.
	text := func(headers ...string) answer {
		return w.send(t, "alice", "PUT", light, `{"contentType":"text/plain","data":"eA=="}`, append(headers, "Content-Type: application/protojson")...)
	}
	_ = repeat(&asJSON)
	w.orders = nil
	want(t, "a repeat", text("Idempotency-Key: k").Code, 200)
	want(t, "only that", len(w.orders) == 1 && w.orders[0].Repeat && string(w.orders[0].Asked.Data) == "x", true)
	known = false
	want(t, "no repeat", text("Idempotency-Key: k").reason(), "content-type-unsupported")
	want(t, "no key", text().reason(), "content-type-unsupported")
	want(t, "orders", len(w.orders), 2)
}

func TestCommandsOverHTTP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	body := cborOf(map[string]any{"power": 1})
	for _, c := range []struct {
		method, target, body string
		headers              []string
		want                 hub.Order
	}{
		{"PUT", light, `{"power":1}`, nil, hub.Order{Kind: hub.CommandUpdate, Href: "/light/1"}},
		{"PUT", light + "?interface=oic.if.rw&timeToLive=500000000&force=true&supersede=true&idempotencyKey=k", `{"power":1}`, nil, hub.Order{
			Kind: hub.CommandUpdate, Href: "/light/1", Interface: "oic.if.rw", TTL: 500 * time.Millisecond, Force: true, Supersede: true, Key: "k",
		}},
		{"PUT", light, `{"power":1}`, []string{"Content-Type: application/x-www-form-urlencoded", "Idempotency-Key: h"}, hub.Order{Kind: hub.CommandUpdate, Href: "/light/1", Key: "h"}},
		{"PUT", light, string(body), []string{"Content-Type: application/cbor"}, hub.Order{Kind: hub.CommandUpdate, Href: "/light/1"}},
		{"PUT", light, `{"contentType":"application/cbor","data":"` + base64.StdEncoding.EncodeToString(body) + `"}`, []string{"Content-Type: application/protojson"}, hub.Order{Kind: hub.CommandUpdate, Href: "/light/1"}},
		{"PUT", light, `{"power":1}`, []string{`If-Match: W/"` + base64.StdEncoding.EncodeToString([]byte{1}) + `", "@17",*`}, hub.Order{
			Kind: hub.CommandUpdate, Href: "/light/1", IfMatch: [][]byte{{1}, nil}, IfSeq: []uint64{17},
		}},
		{"DELETE", linkA + "?forward_if_match=1", "", []string{`If-Match: "` + base64.StdEncoding.EncodeToString([]byte{1}) + `"`}, hub.Order{
			Kind: hub.CommandDelete, Href: "/light/1", IfMatch: [][]byte{{1}}, ForwardIfMatch: true,
		}},
		{"POST", linkA + "?resourceInterface=x&onlyContent=1", `{"power":1}`, nil, hub.Order{Kind: hub.CommandCreate, Href: "/light/1"}},
		{"DELETE", linkA + "?resourceInterface=oic.if.a", "", nil, hub.Order{Kind: hub.CommandDelete, Href: "/light/1", Interface: "oic.if.a"}},
		{"GET", light + "?twin=false&etag=AQ==&timeToLive=100000000", "", nil, hub.Order{Kind: hub.CommandRetrieve, Href: "/light/1", ETags: [][]byte{{1}}, TTL: 100 * time.Millisecond}},
		{"GET", light + "?twin=maybe&force=true", "", nil, hub.Order{Kind: hub.CommandRetrieve, Href: "/light/1"}},
		{"GET", light + "?interface=oic.if.baseline", "", []string{"ETag: Ag=="}, hub.Order{Kind: hub.CommandRetrieve, Href: "/light/1", Interface: "oic.if.baseline", ETags: [][]byte{{2}}}},
	} {
		what := c.method + " " + c.target
		w.orders = nil
		a := w.send(t, "alice", c.method, c.target, c.body, c.headers...)
		if a.Code != 200 || len(w.orders) != 1 {
			t.Errorf("%s: %d %s", what, a.Code, a.Body)
			continue
		}
		got := w.orders[0]
		c.want.Device, c.want.User = lampA, "alice-sub"
		if got.Connection == "" {
			t.Errorf("%s: no caller", what)
		}
		got.Connection = ""
		c.want.Content = hub.Content{Format: hub.FormatNone}
		if c.want.Key != "" {
			c.want.Asked = hub.Content{Type: mediaJSON, Format: hub.FormatNone, Data: []byte(c.body)}
		}
		if c.method == "PUT" || c.method == "POST" {
			c.want.Content = hub.Content{Type: mediaOCFCBOR, Format: hub.FormatOCFCBOR, Data: body}
		}
		want(t, what, fmt.Sprintf("%+v", got), fmt.Sprintf("%+v", c.want))
		data := a.json()["data"].(map[string]any)
		want(t, what, data["status"], any("OK"))
		want(t, what, data["auditContext"].(map[string]any)["correlationId"], any("c1"))
		if _, has := data["etag"]; has != (c.method == "GET") {
			t.Errorf("%s: %v", what, data)
		}
	}
	// The form of the answer.
	want(t, "only content", w.send(t, "alice", "PUT", light+"?onlyContent=true", `{"power":1}`).Body.String(), "{\"power\":7}\n")
	inCBOR := w.send(t, "alice", "PUT", light, `{"power":1}`, "Accept: application/cbor")
	want(t, "CBOR", inCBOR.Header().Get("Content-Type"), cborType)
	if v, err := appendCBOR(nil, inCBOR.Body.Bytes()); err != nil || !strings.Contains(string(v), `"content":{"power":7}`) {
		t.Errorf("in CBOR: %s, %v", v, err)
	}
	want(t, "only content in CBOR", w.send(t, "alice", "PUT", light+"?onlyContent=true", `{"power":1}`, "Accept: application/cbor").Body.String(), "\xa1\x65power\x07")
	want(t, "only content of the device", w.get(t, light+"?twin=0&onlyContent=1").Body.String(), "{\"power\":7}\n")
	a := w.get(t, light+"?twin=0")
	want(t, "ETag", a.Header().Get("ETag"), `W/"5wE="`)
	for _, target := range []string{light + "?async=1", light + "?async=1&onlyContent=1"} {
		want(t, "async", w.send(t, "alice", "PUT", target, `{"power":1}`).Body.String(), "{}\n")
		w.orders = nil
		for _, accept := range []string{"application/json", "application/cbor", "application/protojson"} {
			a := w.get(t, target+"&twin=0", "Accept: "+accept)
			want(t, "async retrieve", a.Code == 200 && a.Header().Get("ETag") == "", true)
			if accept == "application/json" {
				want(t, "async retrieve", a.Body.String(), "{}\n")
			}
		}
		for _, o := range w.orders {
			want(t, "order", o.Kind == hub.CommandRetrieve && o.Async, true)
		}
		want(t, "orders", len(w.orders), 3)
		want(t, "a twin is there at once", strings.Contains(w.get(t, target).Body.String(), `"power":0`), true)
		want(t, "and is no command", len(w.orders), 3)
	}
	a = w.send(t, "alice", "PUT", light, `{"contentType":"application/json","data":"e30="}`, "Content-Type: application/protojson; charset=utf-8")
	want(t, "protojson", a.Header().Get("Content-Type"), "application/jsonpb")
	if _, ok := a.json()["data"].(map[string]any)["content"].(map[string]any)["data"]; !ok {
		t.Errorf("protojson: %s", a.Body)
	}
	w.outcome = func(o hub.Order) hub.Outcome {
		return hub.Outcome{Kind: o.Kind, Device: o.Device, Href: o.Href, Cause: cause(5), Answer: hub.Answer{End: hub.CommandCompleted, Status: hub.StatusNotModified}}
	}
	for _, target := range []string{light + "?twin=0", light + "?twin=0&onlyContent=1"} {
		a := w.get(t, target)
		want(t, "not modified", a.Code, 304)
		want(t, "not modified", a.Body.Len(), 0)
	}
}

func TestCommandsThatAreRefused(t *testing.T) {
	for _, c := range []struct {
		method, target, body string
		headers              []string
		code                 int
		reason               string
	}{
		{"PUT", light + "?timeToLive=-1", `{}`, nil, 400, "time-to-live-invalid"},
		{"PUT", light + "?timeToLive=soon", `{}`, nil, 400, "query-invalid"},
		{"GET", light + "?twin=false&timeToLive=-5", "", nil, 400, "time-to-live-invalid"},
		{"PUT", light + "?supersede=maybe", `{}`, nil, 400, "query-invalid"},
		{"PUT", light + "?forwardIfMatch=maybe", `{}`, nil, 400, "query-invalid"},
		{"PUT", light, `{"power":`, nil, 400, "content-invalid"},
		{"PUT", light, "", nil, 400, "content-missing"},
		{"POST", linkA, "", nil, 400, "content-missing"},
		{"PUT", light, "\xa1\x65power", []string{"Content-Type: application/vnd.ocf+cbor"}, 400, "content-invalid"},
		{"PUT", light, `{"contentType":"text/plain","data":"eHg="}`, []string{"Content-Type: application/protojson"}, 400, "content-type-unsupported"},
		{"PUT", light, `{"contentType":"image/png","data":"eHg="}`, []string{"Content-Type: application/protojson"}, 400, "content-type-unknown"},
		{"PUT", light, `{"contentType":5}`, []string{"Content-Type: application/protojson"}, 400, "body-invalid"},
		{"PUT", light, `{}`, []string{"If-Match: 5"}, 400, "etag-invalid"},
		{"PUT", light, `{}`, []string{`If-Match: "@x"`}, 400, "etag-invalid"},
		{"PUT", "/api/v1/devices/" + string(unknown) + "/resources/light/1", `{}`, nil, 403, "device-not-yours"},
		{"PUT", "/api/v1/devices/" + string(bobs) + "/resources/light/1?force=true", `{}`, nil, 403, "device-not-yours"},
		{"PUT", "/api/v1/devices/x/resources/light/1", `{}`, nil, 403, "device-not-yours"},
		{"DELETE", "/api/v1/devices/" + string(bobs) + "/resource-links/light/1", "", nil, 403, "device-not-yours"},
		{"GET", "/api/v1/devices/" + string(bobs) + "/resources/light/1?twin=false", "", nil, 403, "device-not-yours"},
		{"PUT", "/api/v1/devices/" + string(bobs) + "/metadata", `{"twinEnabled":true}`, nil, 403, "device-not-yours"},
		{"PUT", devA + "/metadata", `{}`, nil, 400, "metadata-empty"},
		{"PUT", devA + "/metadata", "", nil, 400, "metadata-empty"},
		{"PUT", devA + "/metadata", `{"twinForceSynchronization":false}`, nil, 400, "metadata-empty"},
		{"PUT", devA + "/metadata", `{`, nil, 400, "body-invalid"},
		{"PUT", devA + "/metadata", `{"twinEnabled":"maybe"}`, nil, 400, "body-invalid"},
		{"PUT", devA + "/metadata", `{"twinEnabled":true,"timeToLive":"-1"}`, nil, 400, "time-to-live-invalid"},
		{"DELETE", "/api/v1/pending-commands", "", nil, 400, "href-invalid"},
		{"DELETE", "/api/v1/pending-commands?resourceId.href=/a", "", nil, 400, "device-id-missing"},
		{"DELETE", "/api/v1/pending-commands?resourceId.href=/a&resourceId.deviceId=" + string(bobs), "", nil, 403, "device-not-yours"},
		{"DELETE", devA + "/pending-metadata-updates?correlationIdFilter=", "", nil, 400, "filter-empty"},
		{"GET", "/api/v1/pending-commands?commandFilter=RESOURCE_EAT", "", nil, 400, "query-invalid"},
	} {
		w := newWorld(t)
		a := w.send(t, "alice", c.method, c.target, c.body, c.headers...)
		want(t, c.method+" "+c.target+" "+c.body, a.Code, c.code)
		want(t, c.method+" "+c.target+" "+c.body, a.reason(), c.reason)
	}
	w := newWorld(t)
	want(t, "a reader may not command", w.send(t, "reader", "PUT", light, `{}`).Code, 403)
	want(t, "but ask the device", w.do(t, "reader", "GET", light+"?twin=false").Code, 200)
	want(t, "too large", w.send(t, "alice", "PUT", light, strings.Repeat(" ", Default().Limits.MaxBodyBytes+1)).reason(), "body-too-large")
	for err, code := range map[*hub.Error]int{
		hub.NewError(hub.NotFound, "resource-unknown", "the device has no resource /light/1"): 404,
		hub.NewError(hub.Precondition, "etag-mismatch", ""):                                   412,
		hub.NewError(hub.Exhausted, "commands-full", ""):                                      429,
		hub.NewError(hub.Deadline, "command-expired", ""):                                     504,
	} {
		w.directory.command = func(context.Context, hub.Owner, hub.Order) (hub.Outcome, error) { return hub.Outcome{}, err }
		a := w.send(t, "alice", "PUT", light, `{}`)
		want(t, err.Code, a.Code, code)
		want(t, err.Code, a.reason(), err.Code)
		_, text := hub.Public(err) // it may name the resource
		want(t, err.Code, a.json()["message"], any(text))
		_, failed := pb.NewGrpcGatewayClient(w.dial(t)).GetResourceFromDevice(as(t, "alice"), &pb.GetResourceFromDeviceRequest{
			ResourceId: &rapb.ResourceId{DeviceId: string(lampA), Href: "/light/1"},
		})
		want(t, err.Code, status.Convert(failed).Message(), text)
	}
}

func TestMetadataCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for body, kind := range map[string]hub.CommandKind{
		`{"twinEnabled":true}`:                                   hub.CommandTwinOn,
		`{"twinEnabled":false,"x":1}`:                            hub.CommandTwinOff,
		`{"twin_enabled":false}`:                                 hub.CommandTwinOff,
		`{"twinForceSynchronization":true,"twinEnabled":false}`:  hub.CommandTwinSync,
		`{"twinEnabled":true,"timeToLive":"200000000"}`:          hub.CommandTwinOn,
		`{"twinEnabled":true,"timeToLive":200000000,"async":1}`:  hub.CommandTwinOn,
		` {"twinEnabled":true,"idempotencyKey":"k"} `:            hub.CommandTwinOn,
		`{"twinForceSynchronization":true,"timeToLive":"0"}`:     hub.CommandTwinSync,
		`{"twinForceSynchronization":false,"twinEnabled":false}`: hub.CommandTwinOff,
	} {
		w.orders = nil
		a := w.send(t, "alice", "PUT", devA+"/metadata?async=true", body)
		if a.Code != 200 || len(w.orders) != 1 {
			t.Errorf("%s: %d %s", body, a.Code, a.Body)
			continue
		}
		o := w.orders[0]
		want(t, body, o.Kind, kind)
		want(t, body, o.TTL == 200*time.Millisecond, strings.Contains(body, "200000000"))
		want(t, body, o.Key == "k", strings.Contains(body, `"k"`))
		data := a.json()["data"].(map[string]any)
		want(t, body, data["twinEnabled"], any(kind != hub.CommandTwinOff))
		want(t, body, data["canceled"], any(false))
		proto := w.send(t, "alice", "PUT", devA+"/metadata", body, "Accept: application/protojson")
		want(t, body, proto.json()["data"].(map[string]any)["deviceId"], any(string(lampA)))
	}
}

// What a device answers comes with its code and its event, in both forms and over gRPC.
func TestErrorsOfDevices(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	for _, e := range []struct {
		end    hub.CommandEnd
		status hub.Status
		coap   uint8
		http   int
		code   codes.Code
		reason string
	}{
		{hub.CommandCompleted, hub.StatusBadRequest, 0, 400, codes.InvalidArgument, "device-error"},
		{hub.CommandCompleted, hub.StatusUnauthorized, 0, 401, codes.Unauthenticated, "device-error"},
		{hub.CommandCompleted, hub.StatusForbidden, 0, 403, codes.PermissionDenied, "device-error"},
		{hub.CommandCompleted, hub.StatusNotFound, 0, 404, codes.NotFound, "device-error"},
		{hub.CommandCompleted, hub.StatusMethodNotAllowed, 0, 405, 4097, "device-error"},
		{hub.CommandCompleted, hub.StatusUnavailable, 0, 503, codes.Unavailable, "device-error"},
		{hub.CommandCompleted, hub.StatusNotImplemented, 0, 501, codes.Unimplemented, "device-error"},
		{hub.CommandCompleted, hub.StatusError, 0, 500, codes.Internal, "device-error"},
		{hub.CommandCompleted, hub.StatusError, codePreconditionFailed, 412, codes.FailedPrecondition, "device-condition"},
		{hub.CommandCompleted, hub.StatusNotImplemented, codeBadOption, 501, codes.Unimplemented, "condition-unsupported"},
		{hub.CommandCompleted, hub.StatusError, codeBadOption, 500, codes.Internal, "device-error"},
		{hub.CommandUnavailable, hub.StatusUnavailable, 0, 503, codes.Unavailable, "command-unavailable"},
		{hub.CommandCancelled, hub.StatusCanceled, 0, 500, codes.Unknown, "command-cancelled"},
	} {
		w.outcome = func(o hub.Order) hub.Outcome {
			return hub.Outcome{
				Kind: o.Kind, Device: o.Device, Href: o.Href, Cause: cause(5),
				Answer: hub.Answer{
					End: e.end, Status: e.status, Code: e.coap, Content: hub.Content{Type: "text/plain; charset=utf-8", Data: []byte("device says no")},
				},
			}
		}
		what := fmt.Sprint(e.status)
		a := w.send(t, "alice", "PUT", light, `{}`)
		want(t, what, a.Code, e.http)
		want(t, what, a.reason(), e.reason)
		want(t, what, a.json()["code"], any(json.Number(fmt.Sprint(int(e.code)))))
		event := a.json()["details"].([]any)[0].(map[string]any)
		want(t, what, event["@type"], any("type.googleapis.com/resourceaggregate.pb.ResourceUpdated"))
		want(t, what, event["status"], any(rapb.Status_name[int32(e.status)]))
		want(t, what, event["content"], any("device says no"))
		a = w.do(t, "alice", "GET", light+"?twin=0", "Accept: application/protojson")
		event = a.json()["details"].([]any)[0].(map[string]any)
		want(t, what, event["@type"], any("type.googleapis.com/resourceaggregate.pb.ResourceRetrieved"))
		if _, raw := event["content"].(map[string]any)["data"].(string); !raw {
			t.Errorf("%s: %v", what, event)
		}
		_, err := c.DeleteResource(as(t, "alice"), &pb.DeleteResourceRequest{ResourceId: &rapb.ResourceId{DeviceId: string(lampA), Href: "light/1"}})
		code, reason := reasonOf(t, err)
		want(t, what, code, e.code)
		want(t, what, reason, e.reason)
		deleted, ok := status.Convert(err).Details()[0].(*rapb.ResourceDeleted)
		want(t, what, ok && deleted.GetStatus() == rapb.Status(e.status) && string(deleted.GetContent().GetData()) == "device says no", true)
		want(t, "the log is not about us", strings.Contains(w.log.String(), "failed"), false)
	}
	meta := w.send(t, "alice", "PUT", devA+"/metadata", `{"twinEnabled":true}`)
	want(t, "metadata", meta.Code, 500)
	event := meta.json()["details"].([]any)[0].(map[string]any)
	want(t, "metadata", event["canceled"], any(true))
}

func TestGRPCCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	ctx := as(t, "alice")
	id := &rapb.ResourceId{DeviceId: strings.ToUpper(string(lampA)), Href: "light/1"}
	content := &pb.Content{ContentType: mediaJSON, Data: []byte(`{"power":1}`)}
	u, err := c.UpdateResource(ctx, &pb.UpdateResourceRequest{
		ResourceId: id, Content: content, ResourceInterface: "if", TimeToLive: int64(time.Second), Force: true, IdempotencyKey: "k", Supersede: true,
		IfMatch: [][]byte{{1}, {}}, ForwardIfMatch: true,
	})
	want(t, "update", err == nil && u.GetData().GetStatus() == rapb.Status_OK && u.GetData().GetAuditContext().GetCorrelationId() == "c1", true)
	o := w.orders[0]
	want(t, "order", o.Device == lampA && o.Href == "/light/1" && o.Interface == "if" && o.TTL == time.Second && o.Force && o.Key == "k" && o.Supersede && o.Connection != "", true)
	conditional := func(o hub.Order) bool {
		return o.ForwardIfMatch && len(o.IfMatch) == 2 && string(o.IfMatch[0]) == "\x01" && len(o.IfMatch[1]) == 0
	}
	want(t, "condition", conditional(o), true)
	cr, err := c.CreateResource(ctx, &pb.CreateResourceRequest{ResourceId: id, Content: content, IfMatch: [][]byte{{1}, {}}, ForwardIfMatch: true})
	want(t, "create", err == nil && conditional(w.orders[1]) && cr.GetData().GetResourceId().GetHref() == "/light/1", true)
	r, err := c.GetResourceFromDevice(ctx, &pb.GetResourceFromDeviceRequest{ResourceId: id, Etag: [][]byte{{1}}})
	want(t, "retrieve", err == nil && string(r.GetData().GetEtag()) == "\xe7\x01" && string(w.orders[2].ETags[0]) == "\x01", true)
	r, err = c.GetResourceFromDevice(ctx, &pb.GetResourceFromDeviceRequest{ResourceId: id, Async: true})
	want(t, "async retrieve", err == nil && r.GetData() == nil && w.orders[3].Async && w.orders[3].Kind == hub.CommandRetrieve, true)
	w.orders = w.orders[:3]
	d, err := c.DeleteResource(ctx, &pb.DeleteResourceRequest{ResourceId: id, Async: true, IfMatch: [][]byte{{1}, {}}, ForwardIfMatch: true})
	want(t, "async", err == nil && conditional(w.orders[3]) && d.GetData() == nil, true)
	for i, m := range []*pb.UpdateDeviceMetadataRequest{{}, {TwinEnabled: true}, {TwinEnabled: false, TwinForceSynchronization: true}} {
		m.DeviceId = string(lampA)
		meta, err := c.UpdateDeviceMetadata(ctx, m)
		want(t, "metadata", err == nil && meta.GetData().GetTwinEnabled() == (i > 0), true)
		want(t, "metadata", w.orders[4+i].Kind, []hub.CommandKind{hub.CommandTwinOff, hub.CommandTwinOn, hub.CommandTwinSync}[i])
	}
	got, err := c.CancelPendingCommands(ctx, &pb.CancelPendingCommandsRequest{ResourceId: id, CorrelationIdFilter: []string{"c1"}})
	want(t, "cancel", err == nil && slices.Equal(got.GetCorrelationIds(), []string{"c1", "c2"}) && w.picks[0].Href == "/light/1" && !w.picks[0].Twin, true)
	_, err = c.CancelPendingMetadataUpdates(ctx, &pb.CancelPendingMetadataUpdatesRequest{DeviceId: string(lampA)})
	want(t, "cancel metadata", err == nil && w.picks[1].Twin, true)
	errs := map[string]error{}
	foreign := &rapb.ResourceId{DeviceId: string(bobs), Href: "/light/1"}
	_, errs["no resource ID: device-id-missing"] = c.UpdateResource(ctx, &pb.UpdateResourceRequest{Content: content})
	_, errs["no href: href-invalid"] = c.UpdateResource(ctx, &pb.UpdateResourceRequest{ResourceId: &rapb.ResourceId{DeviceId: string(lampA)}, Content: content})
	_, errs["no content: content-missing"] = c.UpdateResource(ctx, &pb.UpdateResourceRequest{ResourceId: id})
	_, errs["negative: time-to-live-invalid"] = c.DeleteResource(ctx, &pb.DeleteResourceRequest{ResourceId: id, TimeToLive: -1})
	_, errs["nothing to cancel: device-id-missing"] = c.CancelPendingMetadataUpdates(ctx, &pb.CancelPendingMetadataUpdatesRequest{})
	for what, err := range errs {
		code, reason := reasonOf(t, err)
		want(t, what, code, codes.InvalidArgument)
		want(t, what, reason, what[strings.Index(what, ": ")+2:])
	}
	_, err = c.UpdateResource(ctx, &pb.UpdateResourceRequest{ResourceId: foreign, Content: content})
	want(t, "foreign", status.Code(err), codes.PermissionDenied)
	_, err = c.CancelPendingCommands(ctx, &pb.CancelPendingCommandsRequest{ResourceId: foreign})
	want(t, "foreign", status.Code(err), codes.PermissionDenied)
}

// pendings are one command of each kind, of three resources of which one is hidden, and one that is over.
func (w *world) pendings() {
	until := time.Now().Add(time.Hour).UnixNano()
	add := func(seq uint64, kind hub.CommandKind, href hub.Href, change func(*hub.Command)) {
		c := hub.Command{
			CommandEvent: hub.CommandEvent{Kind: kind, ValidUntil: until}, Device: lampA, ID: fmt.Sprint("c", seq), Href: href, Seq: seq,
			Content: hub.Content{Format: hub.FormatNone}, Cause: cause(seq), Types: []string{"core.light"},
		}
		c.Cause.Correlation = c.ID
		if change != nil {
			change(&c)
		}
		w.pictures[lampA].Commands = append(w.pictures[lampA].Commands, c)
	}
	add(1, hub.CommandUpdate, "/light/1", func(c *hub.Command) { c.Content, c.Interface = ocf(map[string]any{"power": 7}), "oic.if.rw" })
	add(2, hub.CommandRetrieve, "/light/1", func(c *hub.Command) { c.ETags = [][]byte{{1}, {2}} })
	add(3, hub.CommandTwinOff, "", func(c *hub.Command) { c.Types = nil })
	add(4, hub.CommandTwinSync, "", func(c *hub.Command) { c.Types = nil })
	add(5, hub.CommandCreate, "/late", func(c *hub.Command) { c.Content = ocf([]any{}); c.Types = nil })
	add(6, hub.CommandDelete, "/hidden", nil)
	add(7, hub.CommandDelete, "/light/1", func(c *hub.Command) { c.ValidUntil = 1 })
	w.pictures[bobs].Commands = w.pictures[lampA].Commands
}

func TestPendingCommands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.pendings()
	for target, ids := range map[string]string{
		"/api/v1/pending-commands":                                                            "c1 c2 c3 c4 c5",
		"/api/v1/pending-commands?includeHiddenResources=true":                                "c1 c2 c3 c4 c5 c6",
		"/api/v1/pending-commands?deviceIdFilter=" + string(lampA):                            "c1 c2 c3 c4 c5",
		"/api/v1/pending-commands?deviceIdFilter=" + string(bobs):                             "",
		"/api/v1/pending-commands?deviceIdFilter=" + string(unknown):                          "",
		"/api/v1/pending-commands?resourceIdFilter=" + string(lampA) + "/light/1":             "c1 c2",
		"/api/v1/pending-commands?typeFilter=core.light":                                      "c1 c2",
		"/api/v1/pending-commands?command=RESOURCE_UPDATE&commandFilter=4":                    "c1 c3 c4",
		"/api/v1/pending-commands?commandFilter=DEVICE_METADATA_UPDATE&typeFilter=core.light": "",
		devA + "/pending-commands":                                                            "c1 c2 c5",
		devA + "/pending-commands?commandFilter=DEVICE_METADATA_UPDATE":                       "c1 c2 c5",
		devA + "/pending-commands?commandFilter=RESOURCE_CREATE":                              "c5",
		devA + "/pending-metadata-updates":                                                    "c3 c4",
		light + "/pending-commands":                                                           "c1 c2",
		light + "/pending-commands?commandFilter=RESOURCE_RETRIEVE":                           "c2",
		light + "/pending-commands/c2":                                                        "c2",
		light + "/pending-commands/c9":                                                        "",
		devA + "/resources/hidden/pending-commands":                                           "c6",
		"/api/v1/devices/" + string(bobs) + "/pending-commands":                               "",
	} {
		var got []string
		for _, r := range w.get(t, target).results() {
			for _, e := range r {
				got = append(got, e.(map[string]any)["auditContext"].(map[string]any)["correlationId"].(string))
			}
		}
		want(t, target, strings.Join(got, " "), ids)
	}
	rs := w.get(t, "/api/v1/pending-commands").results()
	update := rs[0]["resourceUpdatePending"].(map[string]any)
	want(t, "content", fmt.Sprint(update["content"]), "map[power:7]")
	want(t, "interface", update["resourceInterface"], any("oic.if.rw"))
	want(t, "off", rs[2]["deviceMetadataUpdatePending"].(map[string]any)["twinEnabled"], any(false))
	want(t, "sync", rs[3]["deviceMetadataUpdatePending"].(map[string]any)["twinForceSynchronization"], any(true))
	// Pages have no gaps and no repeats, over both doors.
	var pages []string
	for cursor := ""; ; {
		rs := w.get(t, "/api/v1/pending-commands?limit=2&cursor="+cursor).results()
		cursor = ""
		for _, r := range rs {
			if c, ok := r["cursor"].(string); ok {
				cursor = c
			}
			delete(r, "cursor")
			for _, e := range r {
				pages = append(pages, e.(map[string]any)["auditContext"].(map[string]any)["correlationId"].(string))
			}
		}
		if cursor == "" {
			break
		}
	}
	want(t, "pages", strings.Join(pages, " "), "c1 c2 c3 c4 c5")
	cursor := func(target string) string { return w.get(t, target+"limit=1").results()[0]["cursor"].(string) }
	for target, from := range map[string]string{
		"/api/v1/pending-commands?commandFilter=RESOURCE_UPDATE": "/api/v1/pending-commands?",
		"/api/v1/pending-commands?includeHiddenResources=true":   "/api/v1/pending-commands?",
		light + "/pending-commands/c2?":                          light + "/pending-commands?",
	} {
		want(t, "a cursor of "+from+" in "+target, w.get(t, target+"&cursor="+cursor(from)).reason(), "cursor-invalid")
	}
	c := pb.NewGrpcGatewayClient(w.dial(t))
	all, err := all(c.GetPendingCommands(as(t, "reader"), &pb.GetPendingCommandsRequest{IncludeHiddenResources: true, Limit: 5}))
	want(t, "over gRPC", err == nil && len(all) == 5 && all[4].GetCursor() != "" && all[0].GetResourceUpdatePending().GetResourceInterface() == "oic.if.rw", true)
	for target, pick := range map[string]hub.CommandPick{
		"/api/v1/pending-commands?resourceId.deviceId=" + string(lampA) + "&resourceId.href=light/1&correlationIdFilter=c1": {Href: "/light/1", IDs: []string{"c1"}},
		light + "/pending-commands": {Href: "/light/1"},
		light + "/pending-commands?correlationIdFilter=a&correlationIdFilter=b": {Href: "/light/1", IDs: []string{"a", "b"}},
		light + "/pending-commands/c%2F1":                                       {Href: "/light/1", IDs: []string{"c/1"}},
		devA + "/pending-metadata-updates":                                      {Twin: true},
		devA + "/pending-metadata-updates?correlationIdFilter=a":                {Twin: true, IDs: []string{"a"}},
		devA + "/pending-metadata-updates/c1":                                   {Twin: true, IDs: []string{"c1"}},
	} {
		w.picks = nil
		a := w.do(t, "alice", "DELETE", target)
		want(t, target, a.Body.String(), "{\"correlationIds\":[\"c1\",\"c2\"]}\n")
		want(t, target, fmt.Sprint(w.picks), fmt.Sprint([]hub.CommandPick{pick}))
		want(t, target, w.do(t, "reader", "DELETE", target).Code, http.StatusForbidden)
	}
}

// Both ends of a command are in the history, in both forms.
// commandEvents is what a device's log has of a command of each kind.
func commandEvents(w *world) []hub.Event {
	var events []hub.Event
	for kind := hub.CommandCreate; kind <= hub.CommandTwinSync; kind++ {
		pending := hub.Event{Kind: hub.CommandPending, Href: "/light/1", Correlation: "c", Content: ocf(map[string]any{"n": 1}), Command: &hub.CommandEvent{Kind: kind, ValidUntil: 5}}
		ended := hub.Event{
			Kind: hub.CommandEnded, Href: "/light/1", Correlation: "c", Status: hub.StatusOK, Content: ocf(map[string]any{"n": 2}), ETag: []byte{1},
			Command: &hub.CommandEvent{Kind: kind, End: hub.CommandCompleted},
		}
		if kind.OfTwin() {
			meta := w.pictures[lampA].Metadata
			pending.Href, ended.Href, ended.Metadata = "", "", &meta
		}
		events = append(events, pending, hub.Event{Kind: hub.CommandBound, Correlation: "c", Command: &hub.CommandEvent{Kind: kind}}, ended,
			hub.Event{Kind: hub.CommandLate, Correlation: "c", Command: &hub.CommandEvent{Kind: kind}})
	}
	return events
}

func TestCommandsInTheHistory(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.commits[lampA] = []hub.Commit{{Device: lampA, Seq: 1, Time: t0, Owner: alice, Events: commandEvents(w)}}
	var kinds []string
	for _, r := range w.get(t, devA+"/events").results() {
		for k := range r {
			kinds = append(kinds, k)
		}
	}
	wantList(t, "kinds", kinds, "resourceCreatePending", "resourceCreated", "resourceRetrievePending", "resourceRetrieved", "resourceUpdatePending",
		"resourceUpdated", "resourceDeletePending", "resourceDeleted", "deviceMetadataUpdatePending", "deviceMetadataUpdated",
		"deviceMetadataUpdatePending", "deviceMetadataUpdated", "deviceMetadataUpdatePending", "deviceMetadataUpdated")
	proto := w.get(t, devA+"/events", "Accept: application/protojson").results()
	for i, r := range w.get(t, devA+"/events").results() {
		for k := range r {
			if _, ok := proto[i][k]; !ok {
				t.Errorf("event %d is %v and %v", i, r, proto[i])
			}
		}
	}
	want(t, "of the resource", len(w.get(t, light+"/events").results()), 8)
}

// A resource that a device has published and not reported yet takes what OCF devices take; one that is forced, what was sent.
func TestCommandBeforeTheFirstReport(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	of := "/api/v1/devices/" + string(lampA) + "/resources"
	for _, c := range []struct {
		target, contentType, body string
		format                    int32
		data                      string
	}{
		{of + "/late", mediaJSON, `{"n":1}`, hub.FormatOCFCBOR, "\xa1\x61n\x01"},
		{of + "/late", "application/cbor", "\xa1\x61n\x01", 60, "\xa1\x61n\x01"},
		{of + "/nowhere?force=true", mediaJSON, `{"n":1}`, hub.FormatJSON, `{"n":1}`},
	} {
		w.orders = nil
		if a := w.send(t, "alice", "PUT", c.target, c.body, "Content-Type: "+c.contentType); a.Code != 200 || len(w.orders) != 1 {
			t.Fatalf("%s: %d %s", c.target, a.Code, a.Body)
		}
		got := w.orders[0].Content
		want(t, c.target+" "+c.contentType, fmt.Sprintf("%d %x", got.Format, got.Data), fmt.Sprintf("%d %x", c.format, c.data))
	}
}
