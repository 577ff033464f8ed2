package coapgateway

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

const foreignID = hub.DeviceID("d0000000-0000-4000-8000-000000000009")

// at is the path of another device's resource.
func at(dev hub.DeviceID, href string) string { return "/api/v1/devices/" + string(dev) + href }

// report stores a representation in the lamp's twin, as if the lamp had reported it.
func (h *hall) report(href hub.Href, format int32, data, etag string, status ...hub.Status) {
	defer h.w.lock()()
	c := hub.Change{
		Href: href, Status: hub.StatusOK, ETag: []byte(etag),
		Content: hub.Content{Type: hub.MediaType(format), Format: format, Data: []byte(data)},
	}
	for _, s := range status {
		c.Status = s
	}
	h.w.store(lampID, c)
}

func with(id message.OptionID, value string) option { return option{ID: id, Value: []byte(value)} }

// A GET is answered from the twin, whether the device is there or not.
func TestRoutedRead(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.published("/light", "/silent", "/back")
	h.w.own(foreignID, "mallory")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "\xe7\x01")
	h.report("/text", hub.FormatText, "words", "")
	h.report("/octets", 42, "\x01\x02", "a tag that CoAP has no room for")
	h.report("/plain", hub.FormatNone, "", "")
	h.report("/gone", hub.FormatNone, "", "", hub.StatusNotFound)
	h.report("/back", hub.FormatNone, "", "", hub.StatusNotFound)
	h.report("/refused", hub.FormatText, "no", "", hub.StatusForbidden)
	h.report("/401", hub.FormatText, "no", "", hub.StatusUnauthorized)
	h.report("/broken", hub.FormatText, "no", "", hub.StatusError)
	h.report("/a b/ü", hub.FormatText, "escaped by nobody", "")
	d := h.online(fanID, mute)
	for name, c := range map[string]struct {
		path   string
		opts   []option
		code   string
		format int32
		text   string
	}{
		"content":               {at(lampID, "/light"), nil, "2.05", 10000, "\xa0"},
		"capitals":              {strings.ToUpper(string(lampID)) + "/light", nil, "2.05", 10000, "\xa0"},
		"text":                  {at(lampID, "/text"), nil, "2.05", 0, "words"},
		"octets":                {at(lampID, "/octets"), nil, "2.05", 42, "\x01\x02"},
		"no format":             {at(lampID, "/plain"), nil, "2.05", -1, ""},
		"slash behind":          {at(lampID, "/light/"), nil, "2.05", 10000, "\xa0"},
		"strange letters":       {at(lampID, "/a b/ü"), nil, "2.05", 0, "escaped by nobody"},
		"empty interface":       {at(lampID, "/light"), []option{query("if=")}, "2.05", 10000, "\xa0"},
		"other query":           {at(lampID, "/light"), []option{query("rt=x")}, "2.05", 10000, "\xa0"},
		"CBOR is OCF's CBOR":    {at(lampID, "/light"), []option{accept(60)}, "2.05", 60, "\xa0"},
		"the same format":       {at(lampID, "/light"), []option{accept(10000)}, "2.05", 10000, "\xa0"},
		"another format":        {at(lampID, "/light"), []option{accept(50)}, "4.06", -1, "not-acceptable: "},
		"text for CBOR":         {at(lampID, "/text"), []option{accept(60)}, "4.06", -1, "not-acceptable: "},
		"anything for nothing":  {at(lampID, "/plain"), []option{accept(50)}, "2.05", -1, ""},
		"same ETag":             {at(lampID, "/light"), []option{with(message.ETag, "\x01"), with(message.ETag, "\xe7\x01")}, "2.03", -1, ""},
		"other ETag":            {at(lampID, "/light"), []option{with(message.ETag, "\x01")}, "2.05", 10000, "\xa0"},
		"If-Match":              {at(lampID, "/light"), []option{with(coap.IfMatch, "\x01"), with(coap.IfMatch, "\xe7\x01")}, "2.05", 10000, "\xa0"},
		"If-Match any":          {at(lampID, "/light"), []option{with(coap.IfMatch, "")}, "2.05", 10000, "\xa0"},
		"If-Match another":      {at(lampID, "/light"), []option{with(coap.IfMatch, "\x01")}, "4.12", -1, "etag-mismatch: "},
		"If-None-Match":         {at(lampID, "/light"), []option{with(coap.IfNoneMatch, "")}, "4.12", -1, "etag-mismatch: "},
		"cancelled by nobody":   {at(lampID, "/light"), []option{with(message.Observe, "\x01")}, "2.05", 10000, "\xa0"},
		"nothing known":         {at(lampID, "/silent"), nil, "4.04", -1, "resource-unknown: "},
		"gone":                  {at(lampID, "/gone"), nil, "4.04", -1, "resource-unknown: "},
		"gone and back":         {at(lampID, "/back"), nil, "4.04", -1, "resource-unknown: "},
		"no such resource":      {at(lampID, "/none"), nil, "4.04", -1, "resource-unknown: "},
		"no such device":        {at("d0000000-0000-4000-8000-000000000099", "/light"), nil, "4.04", -1, "resource-unknown: "},
		"device of another":     {at(foreignID, "/light"), nil, "4.04", -1, "resource-unknown: "},
		"refused by the device": {at(lampID, "/refused"), nil, "4.03", -1, "device-error: "},
		"never 4.01":            {at(lampID, "/401"), nil, "4.03", -1, "device-error: "},
		"broken":                {at(lampID, "/broken"), nil, "5.02", -1, "device-error: "},
		"no device":             {"/api/v1/devices", nil, "4.00", -1, "device-id-missing: "},
		"no UUID":               {"/api/v1/devices/lamp/light", nil, "4.00", -1, "device-id-invalid: "},
		"no href":               {at(lampID, ""), nil, "4.00", -1, "href-invalid: "},
		"dots":                  {at(lampID, "/a/../b"), nil, "4.00", -1, "href-invalid: "},
		"broken query":          {at(lampID, "/light"), []option{query("if=%zz")}, "4.00", -1, "query-invalid: "},
	} {
		t.Run(name, func(t *testing.T) {
			path := c.path
			if !strings.HasPrefix(path, "/") {
				path = "/api/v1/devices/" + path
			}
			r := d.want(d.do(codes.GET, path, nil, c.opts...), c.code, c.text)
			if r.format != c.format || c.code[0] == '2' && r.text() != c.text {
				t.Errorf("%q in %d", r.body, r.format)
			}
			want := ""
			if strings.HasSuffix(strings.TrimSuffix(path, "/"), "/light") && c.code[0] == '2' {
				want = "\xe7\x01"
			}
			if string(r.etag) != want {
				t.Errorf("ETag %x", r.etag)
			}
		})
	}
	// What looks like a separator inside of a segment is none (RFC 7252, Section 6.5).
	m := get("/api/v1/devices/"+string(lampID), 9)
	m.Options = coap.AddOption(m.Options, message.URIPath, []byte("a/b"))
	n := h.neighbour("d0000000-0000-4000-8000-000000000007")
	if a := n.ask(m); a.Code != codes.BadRequest {
		t.Errorf("%v %q", a.Code, a.Payload)
	}
	// Problem details for who asks for them (RFC 9290); a device that reads CBOR may still be one that takes them for content.
	if r := d.do(codes.GET, at(lampID, "/none"), nil, accept(hub.FormatProblem)); r.code != "4.04" || r.format != hub.FormatProblem {
		t.Errorf("%+v", r)
	}
	d.alive()
	if len(h.w.orders) > 0 {
		t.Errorf("commands %+v", h.w.orders)
	}
}

// All else is a command for the device, and its answer is the answer.
func TestRoutedCommands(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID], h.w.off[fanID] = true, true // the twins ask nothing
	h.published("/light", "/made", "/text")
	lamp := h.online(lampID, func(d *device) {
		d.res["/light"] = resource{format: 10000, body: []byte{0xa1, 0x61, 'n', 1}, etag: []byte{0xe7, 1}}
		d.res["/made"] = resource{code: codes.Created, format: 10000, body: []byte{0xa0}}
		d.res["/text"] = resource{format: 0, body: []byte("words")}
	})
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "\xe7\x01")
	d := h.online(fanID, nil)
	body := []byte{0xa1, 0x61, 'p', 2}
	for name, c := range map[string]struct {
		code  codes.Code
		path  string
		body  []byte
		opts  []option
		asked string // what the lamp is asked
		want  string
		text  string
	}{
		"read by an interface": {codes.GET, "/light", nil, []option{query("if=oic.if.rw"), with(message.ETag, "\x05")}, "0.01 /light etag=05 ?if=oic.if.rw", "2.05", "\xa1an\x01"},
		"update":               {codes.POST, "/light", body, nil, "0.02 /light", "2.04", "\xa1an\x01"},
		"by an interface":      {codes.POST, "/light", body, []option{query("x=y&if=oic.if.rw")}, "0.02 /light ?if=oic.if.rw", "2.04", "\xa1an\x01"},
		"on a condition":       {codes.POST, "/light", body, []option{with(coap.IfMatch, "\xe7\x01")}, "0.02 /light", "2.04", "\xa1an\x01"},
		"on another condition": {codes.POST, "/light", body, []option{with(coap.IfMatch, "\x01")}, "", "4.12", "etag-mismatch: "},
		"create":               {codes.POST, "/made", body, []option{query("if=oic.if.create")}, "0.02 /made ?if=oic.if.create", "2.01", "\xa0"},
		"update that creates":  {codes.POST, "/made", body, nil, "0.02 /made", "2.01", "\xa0"},
		"delete":               {codes.DELETE, "/light", nil, []option{query("if=oic.if.rw")}, "0.04 /light ?if=oic.if.rw", "2.02", "\xa1an\x01"},
		"FETCH":                {codes.Code(5), "/light", body, nil, "0.05 /light", "2.05", "\xa1an\x01"},
		"PATCH":                {codes.Code(6), "/light", body, nil, "0.06 /light", "2.04", "\xa1an\x01"},
		"iPATCH":               {codes.Code(7), "/light", body, []option{query("if=oic.if.rw")}, "0.07 /light ?if=oic.if.rw", "2.04", "\xa1an\x01"},
		"format of a read":     {codes.GET, "/text", nil, []option{query("if=oic.if.rw"), accept(60)}, "0.01 /text ?if=oic.if.rw", "4.06", "not-acceptable: "},
		"format of an update":  {codes.POST, "/text", body, []option{accept(60)}, "0.02 /text", "2.04", ""},
		"no such resource":     {codes.POST, "/none", body, nil, "", "4.04", "resource-unknown: "},
	} {
		t.Run(name, func(t *testing.T) {
			before := len(lamp.commands())
			r := d.want(d.do(c.code, at(lampID, c.path), c.body, c.opts...), c.want, c.text)
			asked := lamp.commands()[before:]
			if c.want[0] == '2' && r.text() != c.text {
				t.Errorf("%q", r.body)
			}
			if c.asked == "" && len(asked) > 0 || c.asked != "" && !slices.Equal(asked, []string{c.asked}) {
				t.Errorf("the lamp was asked %q", asked)
			}
		})
	}
	for _, o := range h.w.orders {
		if o.User != "sub-of-alice" || o.Connection == "" || o.TTL != 0 || o.Force || o.Async {
			t.Errorf("%+v", o)
		}
		if wanted := o.Kind != hub.CommandDelete && (o.Kind != hub.CommandRetrieve || o.Method != 0); wanted != bytes.Equal(o.Content.Data, body) || wanted != (o.Content.Format == 10000) {
			t.Errorf("content %+v of %d", o.Content, o.Kind)
		}
	}
	d.want(d.do(codes.POST, at(foreignID, "/light"), body), "4.03", "device-not-yours: ")
	h.w.own(foreignID, "mallory")
	d.want(d.do(codes.DELETE, at(foreignID, "/light"), nil), "4.03", "device-not-yours: ")
}

// A device hears of another's errors by their own codes, but for those that would cost it its credentials or that
// iotivity-lite takes for success.
func TestErrorsOfOtherDevices(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.off[lampID], h.w.off[fanID] = true, true
	want := map[codes.Code]string{
		codes.BadRequest: "4.00", codes.Unauthorized: "4.03", codes.BadOption: "4.02", codes.Forbidden: "4.03", codes.NotFound: "4.04",
		codes.MethodNotAllowed: "4.05", codes.NotAcceptable: "4.06", codes.RequestEntityIncomplete: "4.00", codes.Code(137): "4.09",
		codes.PreconditionFailed: "4.00", codes.RequestEntityTooLarge: "4.13", codes.UnsupportedMediaType: "4.15", codes.Code(150): "4.22",
		codes.TooManyRequests: "5.03", codes.InternalServerError: "5.00", codes.NotImplemented: "5.01", codes.BadGateway: "5.02",
		codes.ServiceUnavailable: "5.03", codes.GatewayTimeout: "5.04",
	}
	var hrefs []string
	for code := range want {
		hrefs = append(hrefs, "/"+coap.Dotted(code))
	}
	h.published(hrefs...)
	h.online(lampID, func(d *device) {
		for code := range want {
			d.res["/"+coap.Dotted(code)] = resource{code: code, format: hub.FormatText, body: []byte("device says so")}
		}
	})
	d := h.online(fanID, nil)
	for code, want := range want {
		r := d.want(d.do(codes.POST, at(lampID, "/"+coap.Dotted(code)), []byte{0xa0}), want, "device-error: ")
		if want == "5.03" && r.maxAge == 0 {
			t.Errorf("%v: no Max-Age", code)
		}
	}
	d.alive()

	// How else a command ends.
	h.published("/light")
	for name, c := range map[string]struct {
		out        hub.Outcome
		err        error
		code, text string
	}{
		"cancelled":            {hub.Outcome{Answer: hub.Answer{End: hub.CommandCancelled, Status: hub.StatusCanceled}}, nil, "5.03", "command-cancelled: "},
		"unavailable":          {hub.Outcome{Answer: hub.Answer{End: hub.CommandUnavailable, Status: hub.StatusUnavailable}}, nil, "5.03", "command-unavailable: "},
		"expired":              {hub.Outcome{}, hub.NewError(hub.Deadline, "command-expired", "late"), "5.03", "command-expired: "},
		"many":                 {hub.Outcome{}, hub.NewError(hub.Exhausted, "commands-full", "many"), "5.03", "commands-full: "},
		"unreadable":           {hub.Outcome{Answer: hub.Answer{End: hub.CommandCompleted, Status: hub.StatusError}}, nil, "5.02", "device-error: "},
		"not to be sent":       {hub.Outcome{Answer: hub.Answer{End: hub.CommandCompleted, Status: hub.StatusBadRequest}}, nil, "4.00", "device-error: "},
		"a code of no answers": {hub.Outcome{Answer: hub.Answer{End: hub.CommandCompleted, Status: hub.StatusError, Code: 1}}, nil, "5.02", "device-error: "},
		"valid":                {hub.Outcome{Answer: hub.Answer{End: hub.CommandCompleted, Status: hub.StatusAccepted}}, nil, "2.03", ""},
		"panic":                {hub.Outcome{Answer: hub.Answer{End: 99}}, nil, "5.03", "internal: "},
	} {
		h.w.mu.Lock()
		h.w.dir.command = func(context.Context, hub.Owner, hub.Order) (hub.Outcome, error) {
			if c.out.End == 99 {
				panic("on purpose")
			}
			return c.out, c.err
		}
		h.w.mu.Unlock()
		t.Run(name, func(*testing.T) { d.want(d.do(codes.POST, at(lampID, "/light"), []byte{0xa0}), c.code, c.text) })
	}
}

// Whoever waits for another device goes on meanwhile, also if that one waits for it; there may be only so many waits.
func TestWaitingForAnotherDeviceHoldsUpNothing(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.DeviceToDevice.MaxRequests = 2 })
	h.w.off[lampID] = true
	h.published("/slow")
	h.w.own(lampID, "alice") // it is not there, so what it is asked waits
	n := h.neighbour(fanID)
	n.write(post(at(lampID, "/slow"), 20, []byte{0xa0}), post(at(lampID, "/slow"), 21, []byte{0xa0}), post(at(lampID, "/slow"), 22, []byte{0xa0}))
	if a := n.answer(22); a.Code != codes.ServiceUnavailable || !bytes.HasPrefix(a.Payload, []byte("too-many-requests: ")) {
		t.Fatalf("%v %q", a.Code, a.Payload)
	}
	if n := testutil.ToFloat64(h.gw.metrics.overload.WithLabelValues("too-many-requests")); n != 1 {
		t.Errorf("%v refusals are counted, want 1", n)
	}
	if a := n.ask(get("/oic/rd", 23)); a.Code != codes.Content { // the keep-alive of iotivity-lite
		t.Fatalf("%v", a.Code)
	}
	if a := n.ask(post("/oic/rd", 24, cborOf(t, body{"di": string(fanID), "ttl": 0, "links": []body{{"href": "/fan"}}}))); a.Code != codes.Changed {
		t.Fatalf("%v %q", a.Code, a.Payload)
	}
	h.online(lampID, func(d *device) { d.res["/slow"] = resource{format: 10000, body: []byte{0xa0}} })
	for token := range byte(2) {
		if a := n.answer(20 + token); a.Code != codes.Changed {
			t.Fatalf("%v %q", a.Code, a.Payload)
		}
	}

	// A session that ends lets its commands go: they end as all do. The connection's other requests are still answered.
	h.w.mu.Lock()
	to := h.w.to[lampID]
	h.w.mu.Unlock()
	to.Close("second-session")
	h.w.awaitLog(t, "offline "+string(lampID))
	n.write(post(at(lampID, "/slow"), 30, []byte{0xa0}))
	h.w.await(t, "the command", func() bool { return len(h.w.orders) == 3 })
	out := h.device(fanID).session(nil)
	out["login"] = false
	n.write(post("/oic/sec/session", 31, cborOf(t, out)))
	if a := n.answer(30); a.Code != codes.ServiceUnavailable {
		t.Fatalf("%v %q", a.Code, a.Payload)
	}
	if a := n.answer(31); a.Code != codes.Changed {
		t.Fatalf("%v %q", a.Code, a.Payload)
	}
	h.w.await(t, "the command to wait on", func() bool { return len(h.w.queue) == 1 })
}

func TestDeviceToDeviceModes(t *testing.T) {
	t.Parallel()
	for mode, want := range map[string][3]string{ // a read, an update, the devices that are found
		ModeFull: {"2.05", "2.04", "2"}, ModeRead: {"2.05", "4.03", "2"}, ModeOff: {"4.03", "4.03", "1"},
	} {
		t.Run(mode, func(t *testing.T) {
			h := start(t, func(c *Config, _ *Deps) { c.DeviceToDevice.Mode = mode })
			h.w.off[lampID], h.w.off[fanID] = true, true
			h.published("/light")
			lamp := h.online(lampID, func(d *device) { d.res["/light"] = resource{format: 10000, body: []byte{0xa0}} })
			h.report("/light", 10000, "\xa0", "")
			d := h.online(fanID, nil)
			d.want(d.publish("/fan"), "2.04", "")
			denied := map[bool]string{true: "device-to-device-off: "}
			read, write := denied[want[0] == "4.03"], denied[want[1] == "4.03"]
			d.want(d.do(codes.GET, at(lampID, "/light"), nil), want[0], read)
			d.want(d.do(codes.GET, at(lampID, "/light"), nil, query("if=oic.if.rw")), want[0], read)
			d.want(d.do(codes.GET, at(lampID, "/light"), nil, with(message.Observe, "")), want[0], read)
			d.want(d.do(codes.Code(5), at(lampID, "/light"), []byte{0xa0}), want[0], read)
			d.want(d.do(codes.POST, at(lampID, "/light"), []byte{0xa0}), want[1], write)
			d.want(d.do(codes.Code(7), at(lampID, "/light"), []byte{0xa0}), want[1], write)
			d.want(d.do(codes.POST, at(lampID, "/light"), []byte{0xa0}, query("if=oic.if.create")), strings.Replace(want[1], "2.04", "2.01", 1), write)
			d.want(d.do(codes.DELETE, at(lampID, "/light"), nil), strings.Replace(want[1], "2.04", "2.02", 1), write)
			var ls []map[string]any
			if err := decoding.Unmarshal(d.do(codes.GET, "/oic/res", nil).body, &ls); err != nil || fmt.Sprint(len(ls)) != want[2] {
				t.Errorf("found %v, %v", ls, err)
			}
			asked := map[string]int{ModeFull: 6, ModeRead: 2}[mode] // by an interface and FETCH; the rest of the reads is the twin's
			if got := lamp.commands(); len(got) != asked {
				t.Errorf("the lamp was asked %q", got)
			}
		})
	}
}

// neighbour is a device of alice that is signed in, on a connection of which a test decides every byte.
type neighbour struct {
	*raw
	kept []message.Message // what came while another answer was awaited
}

func (h *hall) neighbour(id hub.DeviceID) *neighbour {
	h.t.Helper()
	h.w.mu.Lock()
	h.w.off[id] = true
	h.w.mu.Unlock()
	h.w.own(id, "alice")
	h.w.grant("token", hub.Claims{})
	n := &neighbour{raw: h.rawPlain()}
	n.write(message.Message{Code: codes.CSM})
	if a := n.ask(post("/oic/sec/session", 1, cborOf(h.t, h.device(id).session(nil)))); a.Code != codes.Changed {
		h.t.Fatalf("%v %q", a.Code, a.Payload)
	}
	return n
}

// answer returns the next answer or notification with that token.
func (n *neighbour) answer(token byte) message.Message {
	n.t.Helper()
	for i, m := range n.kept {
		if m.Token[0] == token {
			n.kept = slices.Delete(n.kept, i, i+1)
			return m
		}
	}
	for {
		m := n.readAnswer()
		if len(m.Token) == 1 && m.Token[0] == token {
			return m
		}
		n.kept = append(n.kept, m)
	}
}

func (n *neighbour) ask(m message.Message) message.Message {
	n.t.Helper()
	n.write(m)
	return n.answer(m.Token[0])
}

// quiet fails if something with that token has come.
func (n *neighbour) quiet(token byte) {
	n.t.Helper()
	mark := byte(200)
	n.ask(get("/x.plgd.dev/time", mark))
	for _, m := range n.kept {
		if m.Token[0] == token {
			n.t.Errorf("%v %q came", m.Code, m.Payload)
		}
	}
}
