package coapgateway

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// value is a resource with a small CBOR content.
func value(t *testing.T, n int, observable bool) resource {
	return resource{format: 10000, body: cborOf(t, body{"n": n}), observable: observable}
}

// awaitValue waits until the twin of a resource has the CBOR value {n: …}.
func (h *hall) awaitValue(href hub.Href, n int) {
	h.t.Helper()
	want := cborOf(h.t, body{"n": n})
	h.w.await(h.t, fmt.Sprintf("%s to be %d", href, n), func() bool { return bytes.Equal(h.w.twin[lampID][href].Content.Data, want) })
}

// published makes links be in the directory before the device comes.
func (h *hall) published(hrefs ...string) {
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	h.w.links[lampID] = links{}
	for _, s := range hrefs {
		l := hub.Link{Href: hub.Href(strings.TrimSuffix(s, "*")), Policy: 1}
		if strings.HasSuffix(s, "*") {
			l.Policy = 3
		}
		h.w.links[lampID][l.Href] = l
	}
}

func (d *device) asks() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.asked)
}

func TestPerResourceObservation(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*", "/info")
	d := h.online(lampID, func(d *device) {
		d.res["/light"], d.res["/info"], d.res["/late"] = value(t, 1, true), value(t, 2, false), value(t, 3, true)
	})
	h.w.awaitLog(t, "twin 3")
	want := []string{"0.01 /oic/res ?if=oic.if.ll", "0.01 /oic/res ?if=oic.if.ll ?rt=oic.wk.d", "0.01 /info", "0.01 /light observe=0"}
	if got := d.asks(); !slices.Equal(got, want) {
		t.Errorf("the hub asked %q, want %q", got, want)
	}
	h.awaitValue("/light", 1)
	h.awaitValue("/info", 2)
	if i, j := slices.Index(h.w.log, "twin 2"), slices.Index(h.w.log, "changed /info 1"); i < 0 || i > j {
		t.Errorf("SYNCING was not reported first: %q", h.w.log)
	}
	d.notify("/light", codes.Content, 10000, cborOf(t, body{"n": 5}), []byte{0xe7, 1})
	h.awaitValue("/light", 5)
	if c := h.w.twin[lampID]["/light"]; !bytes.Equal(c.ETag, []byte{0xe7, 1}) || c.Content.Type != "application/vnd.ocf+cbor" {
		t.Errorf("stored is %+v", c)
	}
	// What is published later is observed too; what was observed already is left alone.
	d.want(d.publish("/light*", "/late*"), "2.04", "")
	h.awaitValue("/late", 3)
	if n := len(slices.DeleteFunc(d.asks(), func(s string) bool { return !strings.HasPrefix(s, "0.01 /light") })); n != 1 {
		t.Errorf("/light was asked for %d times", n)
	}
	// And what is unpublished is not observed any more.
	d.want(d.do(codes.DELETE, "/oic/rd", nil, query("di="+string(lampID)), query(fmt.Sprintf("ins=%d", hub.Href("/late").InstanceID()))), "2.02", "")
	d.awaitAsked("0.01 /late observe=1")
}

func TestBatchObservation(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*")
	h.w.etag = [][]byte{{0xe7, 4}, {0xe7, 3}}
	element := func(href string, n int, etag byte) body {
		return body{"href": href, "rep": body{"n": n}, "etag": []byte{0xe7, etag}}
	}
	d := h.online(lampID, func(d *device) {
		d.res["/light"] = value(t, 1, true)
		d.batch = func(etags int) *answerOf {
			return &answerOf{code: codes.Content, body: []body{element("/light", 1, 6), element("ocf://"+string(fanID)+"/info", 2, 5)}, etag: []byte{0xe7, 6}}
		}
	})
	h.w.awaitLog(t, "twin 3")
	want := []string{"0.01 /oic/res ?if=oic.if.ll", "0.01 /oic/res ?if=oic.if.ll ?rt=oic.wk.d", "0.01 /oic/res observe=0 etag=e704 ?if=oic.if.b ?incChanges=5wM"}
	if got := d.asks(); !slices.Equal(got, want) {
		t.Errorf("the hub asked %q, want %q", got, want)
	}
	h.awaitValue("/light", 1)
	h.awaitValue("/info", 2) // the device's ID in an href is not looked at: it is the session's
	if h.w.changes[len(h.w.changes)-1].Href != "/light" {
		t.Errorf("the element with the message's ETag is not last: %v", h.w.log)
	}
	d.notify("/oic/res", codes.Content, 10000, cborOf(t, []body{element("/light", 7, 7), {"href": "/info", "rep": body{}}}), nil)
	h.awaitValue("/light", 7)
	h.w.awaitLog(t, "changed /info 5") // an empty map: the device has nothing to show there
	// A publish brings no observation of its own: the batch has it.
	d.want(d.publish("/light*", "/more*"), "2.04", "")
	d.notify("/oic/res", codes.Content, 60, cborOf(t, []body{element("/light", 8, 8)}), nil)
	h.awaitValue("/light", 8)
	if got := d.asks(); len(got) != 3 {
		t.Errorf("the hub asked for more: %q", got)
	}
}

func TestBatchUpToDate(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.etag = [][]byte{{1}}
	h.online(lampID, func(d *device) {
		d.batch = func(int) *answerOf { return &answerOf{code: codes.Valid, etag: []byte{1}} }
	})
	h.w.awaitLog(t, "twin 3")
	if len(h.w.changes) > 0 {
		t.Errorf("2.03 brought %v", h.w.changes)
	}
}

func TestETagsCanBeSwitchedOff(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.DeviceTwin.UseETags = false })
	h.w.etag = [][]byte{{1}}
	d := h.online(lampID, func(d *device) {
		d.batch = func(int) *answerOf { return &answerOf{code: codes.Content, body: []body{}} }
	})
	h.w.awaitLog(t, "twin 3")
	d.awaitAsked("0.01 /oic/res observe=0 ?if=oic.if.b")
}

// A device without a proper batch is observed resource by resource; it is never disconnected for that.
func TestFallBackToPerResource(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(d *device){
		"batch not observable":     nil,
		"does not list its links":  func(d *device) { d.list = codes.NotFound },
		"list does not decode":     func(d *device) { d.list = []byte{0xff} },
		"no /oic/res in its links": func(d *device) { d.list = []body{{"href": "/light"}} },
		"batch without Observe": func(d *device) {
			d.batch = func(int) *answerOf { return &answerOf{code: codes.Content, body: []body{}, once: true} }
		},
		"batch is an error": func(d *device) { d.batch = func(int) *answerOf { return &answerOf{code: codes.InternalServerError} } },
		"batch does not decode": func(d *device) {
			d.batch = func(int) *answerOf { return &answerOf{code: codes.Content, body: []byte{0xff, 0xff}} }
		},
		"batch is no array": func(d *device) { d.batch = func(int) *answerOf { return &answerOf{code: codes.Content, body: body{}} } },
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			h.published("/light*")
			d := h.online(lampID, func(d *device) {
				d.res["/light"] = value(t, 1, true)
				if prepare != nil {
					prepare(d)
				}
			})
			h.w.awaitLog(t, "twin 3")
			h.awaitValue("/light", 1)
			d.notify("/light", codes.Content, 10000, cborOf(t, body{"n": 2}), nil)
			h.awaitValue("/light", 2)
			d.alive()
		})
	}
}

func TestWhatTheDeviceLostIsUnpublished(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*", "/ghost")
	h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, true) })
	h.w.awaitLog(t, "twin 3")
	h.w.awaitLog(t, "unpublished /ghost")
	if _, ok := h.w.links[lampID]["/light"]; !ok {
		t.Error("/light was unpublished too")
	}
}

func TestNothingIsUnpublishedWithoutAList(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*")
	h.online(lampID, func(d *device) { d.res["/light"], d.list = value(t, 1, true), codes.ServiceUnavailable })
	h.w.awaitLog(t, "twin 3")
	if h.w.count("unpublished /light") > 0 {
		t.Error("a device that did not list its links lost one")
	}
}

func TestNotFoundNotificationUnpublishes(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/light*", "/gone")
	d := h.online(lampID, func(d *device) {
		d.res["/light"] = value(t, 1, true)
		d.list = []body{{"href": "/light"}, {"href": "/gone"}, {"href": "/oic/res"}}
	})
	h.w.awaitLog(t, "twin 3")
	h.w.awaitLog(t, "unpublished /gone") // 4.04 as an answer
	d.notify("/light", codes.Content, 10000, cborOf(t, body{"n": 2}), nil)
	d.notify("/light", codes.NotFound, 0, nil, nil) // and as a notification
	h.w.awaitLog(t, "unpublished /light")
	if c := h.w.twin[lampID]["/light"]; c.Status != hub.StatusNotFound || len(c.Content.Data) > 0 {
		t.Errorf("the twin is %+v", c)
	}
	d.alive()
}

func TestAnswersOfAResource(t *testing.T) {
	t.Parallel()
	big := bytes.Repeat([]byte{1}, hub.MaxContent)
	for name, c := range map[string]struct {
		res    resource
		status hub.Status
		format int32
		data   []byte
	}{
		"text":                      {resource{format: 0, body: []byte("plain")}, hub.StatusOK, 0, []byte("plain")},
		"JSON":                      {resource{format: 50, body: []byte(`{"a":1}`)}, hub.StatusOK, 50, []byte(`{"a":1}`)},
		"octets":                    {resource{format: 42, body: []byte{0, 255}}, hub.StatusOK, 42, []byte{0, 255}},
		"unknown format":            {resource{format: 61000, body: []byte("?")}, hub.StatusOK, 61000, []byte("?")},
		"CBOR that does not decode": {resource{format: 10000, body: []byte{0xa1, 0xff}}, hub.StatusOK, 10000, []byte{0xa1, 0xff}},
		"256 KiB":                   {resource{format: 42, body: big}, hub.StatusOK, 42, big},
		"one byte more":             {resource{format: 42, body: append(slices.Clone(big), 1)}, hub.StatusError, -1, nil},
		"4.00":                      {resource{code: codes.BadRequest}, hub.StatusBadRequest, -1, nil},
		"4.01":                      {resource{code: codes.Unauthorized}, hub.StatusUnauthorized, -1, nil},
		"4.03":                      {resource{code: codes.Forbidden}, hub.StatusForbidden, -1, nil},
		"4.05":                      {resource{code: codes.MethodNotAllowed}, hub.StatusMethodNotAllowed, -1, nil},
		"4.06":                      {resource{code: codes.NotAcceptable}, hub.StatusError, -1, nil},
		"5.00":                      {resource{code: codes.InternalServerError}, hub.StatusError, -1, nil},
		"5.01":                      {resource{code: codes.NotImplemented}, hub.StatusNotImplemented, -1, nil},
		"5.03":                      {resource{code: codes.ServiceUnavailable}, hub.StatusUnavailable, -1, nil},
	} {
		t.Run(name, func(t *testing.T) {
			for _, link := range []string{"/x", "/x*"} {
				h := start(t, nil)
				h.published(link)
				c.res.observable = true
				d := h.online(lampID, func(d *device) { d.res["/x"] = c.res })
				h.w.await(t, "the twin of /x", func() bool { _, ok := h.w.twin[lampID]["/x"]; return ok })
				got := h.w.twin[lampID]["/x"]
				if got.Status != c.status || got.Content.Format != c.format || !bytes.Equal(got.Content.Data, c.data) {
					t.Errorf("%s: got %d, format %d, %d bytes", link, got.Status, got.Content.Format, len(got.Content.Data))
				}
				if got.Content.Type != hub.MediaType(c.format) {
					t.Errorf("the media type is %q", got.Content.Type)
				}
				d.alive()
			}
		})
	}
}

// A notification over the limit becomes an error status; the session lives and goes on.
func TestNotificationOverTheLimit(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	d := h.online(lampID, func(d *device) { d.res["/x"], d.whole = value(t, 1, true), true })
	h.awaitValue("/x", 1)
	d.notify("/x", codes.Content, 42, make([]byte, hub.MaxContent+1), nil)
	h.w.await(t, "the error status", func() bool { return h.w.twin[lampID]["/x"].Status == hub.StatusError })
	d.notify("/x", codes.Content, 42, make([]byte, hub.MaxContent), nil)
	h.w.await(t, "the good value after it", func() bool { return len(h.w.twin[lampID]["/x"].Content.Data) == hub.MaxContent })
	d.alive()
}

// A resource that does not answer leaves the twin SYNCING and everything else working. TestSilentResourceIsAskedAgain has what
// comes then.
func TestSilentResource(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.KeepAlive.Timeout = 3 * time.Second })
	h.published("/a", "/silent", "/z")
	h.online(lampID, func(d *device) {
		d.res["/a"], d.res["/silent"], d.res["/z"] = value(t, 1, false), resource{silent: true}, value(t, 3, false)
	})
	h.awaitValue("/z", 3)
	if h.w.count("twin 3") > 0 {
		t.Error("the twin is said to be in sync")
	}
	h.w.mu.Lock()
	defer h.w.mu.Unlock()
	if _, ok := h.w.twin[lampID]["/silent"]; ok {
		t.Error("something was stored for a resource that did not answer")
	}
}

// RFC 7641, Section 3.2: a representation without Observe option ends the observation; the resource is observed anew.
func TestEndedObservationIsRenewed(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	d := h.online(lampID, func(d *device) { d.res["/x"] = value(t, 1, true) })
	h.awaitValue("/x", 1)
	d.mu.Lock()
	d.res["/x"] = value(t, 3, true)
	token := d.watching["/x"]
	d.mu.Unlock()
	d.send(codes.Content, token, 10000, cborOf(t, body{"n": 2}), nil, 0)
	h.awaitValue("/x", 3)
	d.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 4}), nil)
	h.awaitValue("/x", 4)
}

func TestBatchThatEndsOrBreaksIsSynchronisedAnew(t *testing.T) {
	t.Parallel()
	for name, spoil := range map[string]func(d *device, token message.Token){
		"ends": func(d *device, token message.Token) {
			d.send(codes.Content, token, 10000, cborOf(d.t, []body{}), nil, 0)
		},
		"error":           func(d *device, token message.Token) { d.send(codes.InternalServerError, token, 0, nil, nil, 0) },
		"does not decode": func(d *device, token message.Token) { d.send(codes.Content, token, 10000, []byte{0xff}, nil, 50) },
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, nil)
			n := 0
			d := h.online(lampID, func(d *device) {
				d.batch = func(int) *answerOf {
					n++
					return &answerOf{code: codes.Content, body: []body{{"href": "/x", "rep": body{"n": n}}}}
				}
			})
			h.awaitValue("/x", 1)
			d.mu.Lock()
			token := d.watching["/oic/res"]
			d.mu.Unlock()
			spoil(d, token)
			h.awaitValue("/x", 2)
			d.alive()
		})
	}
}

// The last value received is the last value the twin shows, however fast they come.
func TestBurstEndsWithTheLastValue(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*", "/y*")
	d := h.online(lampID, func(d *device) { d.res["/x"], d.res["/y"] = value(t, 0, true), value(t, 0, true) })
	h.w.awaitLog(t, "twin 3")
	const n = 200
	for i := 1; i <= n; i++ {
		d.notify("/x", codes.Content, 10000, cborOf(t, body{"n": i}), nil)
		d.notify("/y", codes.Content, 10000, cborOf(t, body{"n": -i}), nil)
	}
	h.awaitValue("/x", n)
	h.awaitValue("/y", -n)
	i := 0
	for _, c := range h.w.changes {
		if c.Href == "/x" && !bytes.Equal(c.Content.Data, cborOf(t, body{"n": i})) {
			t.Fatalf("change %d of /x is %x: one was lost or out of order", i, c.Content.Data)
		} else if c.Href == "/x" {
			i++
		}
	}
	for i, s := range h.w.stamps {
		if s.Message != uint64(i+1) || s.Session != h.w.current[lampID] || s.User != "sub-of-alice" {
			t.Fatalf("write %d is stamped %+v", i, s)
		}
	}
}

// The first answer of an observation is older than any notification, also if it is stored later.
func TestFirstAnswerDoesNotOverwriteNotifications(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.online(lampID, mute)
	h.w.awaitLog(t, "twin 2")
	o := &coap.Observation{}
	s := &session{
		gw: h.gw, log: h.gw.log, own: h.w.owned[lampID], number: h.w.current[lampID], records: h.gw.deps.Directory, turn: make(chan struct{}, 1), message: 1000,
		early: map[*coap.Observation]map[hub.Href]bool{o: {"/x": true}},
	}
	s.user.Store(new(string))
	s.twin = newTwin(s, true)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	defer s.cancel()
	octet := hub.Content{Format: 42, Data: []byte{1}}
	if err := s.storeFirst(o, []hub.Change{change("/x", hub.StatusOK, octet, nil), change("/y", hub.StatusOK, octet, nil)}); err != nil {
		t.Fatal(err)
	}
	h.w.awaitLog(t, "changed /y 1")
	if h.w.count("changed /x 1") > 0 {
		t.Error("the first answer was stored over a newer notification")
	}
	if o.Tag() != any(s) || len(s.early) > 0 {
		t.Error("the observation is not settled")
	}
}

// The same over the wire: first answer and notification come in one segment, and are handled beside each other.
func TestFirstAnswerAndNotificationInOneSegment(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	for i := range 40 {
		n := 2*i + 1
		r := h.rawPlain()
		r.write(post("/oic/sec/session", 1, cborOf(t, h.device(lampID).session(nil))))
		for answered := false; !answered; {
			m, ok := r.read()
			if !ok {
				t.Fatal("the hub closed the connection")
			}
			if m.Code != codes.GET {
				continue
			}
			path, _ := m.Options.Path()
			answer := func(code codes.Code, observe byte, v int) message.Message {
				a := message.Message{Code: code, Token: m.Token, Payload: cborOf(t, body{"n": v})}
				a.Options = coap.AddOption(nil, message.Observe, []byte{observe})
				a.Options = coap.AddUint(a.Options, message.ContentFormat, 10000)
				return a
			}
			if answered = path == "/x"; answered {
				r.write(answer(codes.Content, 2, n), answer(codes.Content, 3, n+1))
			} else {
				r.write(message.Message{Code: codes.NotFound, Token: m.Token})
			}
		}
		h.w.await(t, "the twin in sync", func() bool {
			return h.w.last[lampID] >= 3 && h.w.log[len(h.w.log)-1] == "twin 3" || slices.Contains(h.w.log[max(0, len(h.w.log)-2):], "twin 3")
		})
		h.awaitValue("/x", n+1)
		_ = r.conn.Close()
		h.w.await(t, "the end of the session", func() bool { return h.w.to[lampID] == nil })
		h.awaitValue("/x", n+1)
	}
}

// A write that cannot be stored ends the connection, so that the device reports again; one that can after a while does not.
func TestNotificationsThatCannotBeStored(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		err   error
		times int // how often it fails, 0: always
		lives bool
		why   string
	}{
		"away":             {&hub.Error{Kind: hub.Unavailable}, 0, false, "not-stored"},
		"broken":           {&hub.Error{Kind: hub.Internal}, 0, false, "not-stored"},
		"superseded":       {&hub.Error{Kind: hub.Precondition}, 0, false, "superseded"},
		"away for a while": {&hub.Error{Kind: hub.Unavailable}, 2, true, ""},
		"busy for a while": {&hub.Error{Kind: hub.Exhausted}, 2, true, ""},
	} {
		t.Run(name, func(t *testing.T) {
			patience := 300 * time.Millisecond
			if c.lives {
				patience = time.Minute
			}
			h := startPatient(t, patience, nil)
			h.published("/x*")
			d := h.online(lampID, func(d *device) { d.res["/x"] = value(t, 1, true) })
			h.w.awaitLog(t, "twin 3")
			var numbers []uint64
			h.w.mu.Lock()
			inner := h.w.dir.notify
			h.w.dir.notify = func(ctx context.Context, from hub.Stamp, cs []hub.Change) error {
				h.w.mu.Lock()
				numbers = append(numbers, from.Message)
				n := len(numbers)
				h.w.mu.Unlock()
				if c.times == 0 || n <= c.times {
					return c.err
				}
				return inner(ctx, from, cs)
			}
			h.w.mu.Unlock()
			d.notify("/x", codes.Content, 10000, cborOf(t, body{"n": 2}), nil)
			if !c.lives {
				d.awaitClosed()
				h.w.await(t, "the reason", func() bool { x, _ := h.gw.Diagnostics(lampID); return x.EndReason == c.why })
				return
			}
			h.awaitValue("/x", 2)
			d.alive()
			if len(slices.Compact(numbers)) != 1 { // an unknown outcome is settled with the same number
				t.Errorf("the write was tried with the numbers %v", numbers)
			}
		})
	}
}

// One change the directory will not have does not take the others with it, nor does it end the session.
func TestRefusedChangeBecomesAnErrorStatus(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	inner := h.w.dir.notify
	h.w.dir.notify = func(ctx context.Context, from hub.Stamp, cs []hub.Change) error {
		for _, c := range cs {
			if c.Href == "/bad" && c.Status == hub.StatusOK {
				return &hub.Error{Kind: hub.TooLarge}
			}
		}
		return inner(ctx, from, cs)
	}
	d := h.online(lampID, func(d *device) {
		d.batch = func(int) *answerOf {
			return &answerOf{code: codes.Content, body: []body{
				{"href": "/a", "rep": body{"n": 1}}, {"href": "/bad", "rep": body{"n": 2}}, {"href": "/z", "rep": body{"n": 3}},
			}}
		}
	})
	h.w.awaitLog(t, "twin 3")
	h.awaitValue("/a", 1)
	h.awaitValue("/z", 3)
	h.w.awaitLog(t, "changed /bad 9")
	d.alive()
}
