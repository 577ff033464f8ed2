package coapgateway

import (
	"fmt"
	"slices"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// These tests are about what a device says while a question of ours is under way: its answer was made before the hub had
// heard it, whatever arrives first. Each byte's place matters, so the device is a bare connection.

// signedIn is a bare connection of the lamp, signed in, with the hub's first request of it.
func (h *hall) signedIn() (*raw, message.Message) {
	h.t.Helper()
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	r := h.rawPlain()
	r.write(post("/oic/sec/session", 1, cborOf(h.t, h.device(lampID).session(nil))))
	return r, r.readRequest("/oic/res")
}

// readRequest returns the hub's next request, which must be for path.
func (r *raw) readRequest(path string) message.Message {
	r.t.Helper()
	for {
		var m message.Message
		if len(r.hubs) > 0 {
			m, r.hubs = r.hubs[0], r.hubs[1:]
		} else {
			var ok bool
			if m, ok = r.read(); !ok {
				r.t.Fatalf("the hub closed the connection instead of asking for %s", path)
			}
		}
		if m.Code < codes.GET || m.Code > 31 {
			continue
		}
		if got, _ := m.Options.Path(); got != path {
			r.t.Fatalf("the hub asked for %s, not for %s", got, path)
		}
		return m
	}
}

// ask sends a request and awaits its answer, which must have that code. What the hub asks meanwhile is kept.
func (r *raw) ask(m message.Message, code codes.Code) {
	r.t.Helper()
	r.write(m)
	for {
		got, ok := r.read()
		if !ok {
			r.t.Fatal("the hub closed the connection")
		}
		if got.Code >= codes.GET && got.Code <= 31 {
			r.hubs = append(r.hubs, got)
		}
		if got.Code < 64 || string(got.Token) != string(m.Token) {
			continue // a signal, or the answer to the sign-in
		}
		if got.Code != code {
			r.t.Fatalf("the answer is %s %q, not %s", coap.Dotted(got.Code), got.Payload, coap.Dotted(code))
		}
		return
	}
}

// answer answers a request of the hub; observe below 0 stands for no Observe option.
func (r *raw) answer(to message.Message, code codes.Code, v any, observe int) {
	r.t.Helper()
	m := message.Message{Code: code, Token: to.Token}
	if observe >= 0 {
		m.Options = coap.AddUint(m.Options, message.Observe, uint32(observe))
	}
	if v != nil {
		m.Options = coap.AddUint(m.Options, message.ContentFormat, 10000)
		m.Payload = cborOf(r.t, v)
	}
	r.write(m)
}

// lists answers with the device's links, and then that it does not say where it is in its own network.
func (r *raw) lists(to message.Message, links []body) {
	r.t.Helper()
	r.answer(to, codes.Content, links, -1)
	where := r.readRequest("/oic/res")
	if q, err := where.Options.Queries(); err != nil || !slices.Contains(q, "rt=oic.wk.d") {
		r.t.Fatalf("the hub did not ask where the device is, but for %q, %v", q, err)
	}
	r.answer(where, codes.NotFound, nil, -1)
}

// noBatch is a device's own link that says it does not observe in batch.
var noBatch = body{"href": "/oic/res", "p": body{"bm": 1}}

func publishing(t *testing.T, token byte, hrefs ...string) message.Message {
	ls := make([]body, len(hrefs))
	for i, s := range hrefs {
		ls[i] = body{"href": s, "p": body{"bm": 3}}
	}
	return post("/oic/rd", token, cborOf(t, body{"di": string(lampID), "ttl": 0, "links": ls}))
}

func unpublishing(token byte, href hub.Href) message.Message {
	m := request(codes.DELETE, "/oic/rd", token, nil)
	m.Options = coap.AddOption(m.Options, message.URIQuery, []byte("di="+string(lampID)))
	m.Options = coap.AddOption(m.Options, message.URIQuery, fmt.Appendf(nil, "ins=%d", href.InstanceID()))
	return m
}

// A list of the device's links says nothing about what is published after it was asked for.
func TestPublishWhileTheDeviceListsItsLinks(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/ghost", "/back*")
	r, list := h.signedIn()
	r.ask(publishing(t, 2, "/late", "/back"), codes.Changed)
	r.lists(list, []body{noBatch})
	r.answer(r.readRequest("/back"), codes.Content, body{"n": 2}, 2)
	r.answer(r.readRequest("/late"), codes.Content, body{"n": 3}, 2)
	h.awaitValue("/back", 2)
	h.awaitValue("/late", 3)
	h.w.awaitLog(t, "unpublished /ghost")
	for _, l := range []string{"unpublished /late", "unpublished /back"} {
		if h.w.count(l) > 0 {
			t.Errorf("%s: a publish that was acknowledged is lost", l)
		}
	}
}

// Nor does a list unpublish anything if more was published meanwhile than the twin can remember.
func TestPublishOfMuchWhileTheDeviceListsItsLinks(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.MaxLinks = 2 })
	r, list := h.signedIn()
	r.ask(publishing(t, 2, "/a", "/b"), codes.Changed)
	r.ask(publishing(t, 3, "/c"), codes.Changed)
	r.lists(list, []body{noBatch})
	r.answer(r.readRequest("/a"), codes.Content, body{"n": 1}, 2)
	h.awaitValue("/a", 1)
	for _, l := range []string{"unpublished /a", "unpublished /b", "unpublished /c"} {
		if h.w.count(l) > 0 {
			t.Errorf("%s: a publish that was acknowledged is lost", l)
		}
	}
}

// 4.04 does not unpublish a resource that was published after the question.
func TestPublishWhileTheResourceIsAskedFor(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x")
	r, list := h.signedIn()
	r.lists(list, []body{noBatch, {"href": "/x"}})
	first := r.readRequest("/x")
	r.ask(publishing(t, 2, "/x"), codes.Changed)
	r.answer(first, codes.NotFound, nil, -1)
	again := r.readRequest("/x")
	if n, err := again.Options.Observe(); err != nil || n != 0 {
		t.Errorf("the link that was published says observable, but the hub does not observe: %d, %v", n, err)
	}
	r.answer(again, codes.Content, body{"n": 2}, 2)
	h.awaitValue("/x", 2)
	if h.w.count("unpublished /x") > 0 {
		t.Error("a publish that was acknowledged is lost")
	}
}

// What was published while another resource was asked for says nothing against a later answer.
func TestPublishWhileAnotherResourceIsAskedFor(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/a")
	r, list := h.signedIn()
	r.lists(list, []body{noBatch, {"href": "/a"}})
	first := r.readRequest("/a")
	r.ask(publishing(t, 2, "/x"), codes.Changed)
	r.answer(first, codes.Content, body{"n": 1}, -1)
	r.answer(r.readRequest("/x"), codes.NotFound, nil, -1)
	h.w.awaitLog(t, "unpublished /x")
}

// The same for a batch: of what it reports, that is left out which the device has unpublished since it was asked.
func TestUnpublishWhileTheBatchIsAskedFor(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*", "/y*")
	r, list := h.signedIn()
	inBatch := body{"href": "/oic/res", "if": []string{"oic.if.b"}, "p": body{"bm": 3}}
	r.lists(list, []body{inBatch, {"href": "/x"}, {"href": "/y"}})
	batch := r.readRequest("/oic/res")
	r.ask(unpublishing(2, "/x"), codes.Deleted)
	elements := []body{{"href": "/x", "rep": body{"n": 1}}, {"href": "/y", "rep": body{"n": 2}}}
	r.answer(batch, codes.Content, elements, 2)
	h.awaitValue("/y", 2)
	h.w.awaitLog(t, "twin 3")
	if h.w.count(fmt.Sprintf("changed /x %d", hub.StatusOK)) > 0 {
		t.Error("the batch was stored over the NOT_FOUND of the unpublished resource")
	}
}

// What a resource answers is not stored, nor is it observed, once the device has unpublished it.
func TestUnpublishWhileTheResourceIsAskedFor(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/a*", "/x*", "/z*")
	r, list := h.signedIn()
	r.lists(list, []body{noBatch, {"href": "/a"}, {"href": "/x"}, {"href": "/z"}})
	r.answer(r.readRequest("/a"), codes.Content, body{"n": 1}, 2)
	first := r.readRequest("/x")
	r.ask(unpublishing(2, "/z"), codes.Deleted) // not asked for yet: it never is
	r.ask(unpublishing(3, "/x"), codes.Deleted)
	r.answer(first, codes.Content, body{"n": 2}, 2)
	cancel := r.readRequest("/x")
	if n, err := cancel.Options.Observe(); err != nil || n != 1 {
		t.Errorf("the hub asks anew instead of deregistering: %d, %v", n, err)
	}
	r.answer(cancel, codes.Content, body{"n": 2}, -1)
	h.awaitValue("/a", 1)
	h.w.awaitLog(t, "twin 3")
	if h.w.count(fmt.Sprintf("changed /x %d", hub.StatusOK)) > 0 {
		t.Error("the answer was stored over the NOT_FOUND of the unpublished resource")
	}
}

// A resource that was only read is observed once it is published as observable.
func TestPublishedAnewAsObservable(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x")
	r, list := h.signedIn()
	r.lists(list, []body{noBatch, {"href": "/x"}})
	r.answer(r.readRequest("/x"), codes.Content, body{"n": 1}, -1)
	h.awaitValue("/x", 1)
	r.ask(publishing(t, 2, "/x"), codes.Changed)
	again := r.readRequest("/x")
	if n, err := again.Options.Observe(); err != nil || n != 0 {
		t.Fatalf("the hub does not observe: %d, %v", n, err)
	}
	r.answer(again, codes.Content, body{"n": 2}, 2)
	h.awaitValue("/x", 2)
	r.answer(again, codes.Content, body{"n": 3}, 3)
	h.awaitValue("/x", 3)
}

// A resource that is published while it is being observed is not observed twice: what the first observation reported would be
// stored over the newer answer to the second.
func TestPublishWhileTheResourceIsBeingObserved(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	r, list := h.signedIn()
	r.lists(list, []body{noBatch, {"href": "/x"}})
	first := r.readRequest("/x")
	r.ask(publishing(t, 2, "/x"), codes.Changed)
	r.answer(first, codes.Content, body{"n": 1}, 2)
	h.awaitValue("/x", 1)
	r.ask(publishing(t, 3, "/z"), codes.Changed)
	r.answer(r.readRequest("/z"), codes.Content, body{"n": 3}, 2) // and not /x again
	h.awaitValue("/z", 3)
	r.answer(first, codes.Content, body{"n": 2}, 3)
	h.awaitValue("/x", 2)
}

// What still arrives for an observation that was given up is not stored: the resource is NOT_FOUND since it was unpublished.
func TestNotificationAfterUnpublish(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.published("/x*")
	r, list := h.signedIn()
	r.lists(list, []body{noBatch, {"href": "/x"}})
	first := r.readRequest("/x")
	r.answer(first, codes.Content, body{"n": 1}, 2)
	h.awaitValue("/x", 1)
	r.ask(unpublishing(2, "/x"), codes.Deleted)
	cancel := r.readRequest("/x")
	r.answer(first, codes.Content, body{"n": 2}, 3)
	r.ask(publishing(t, 3, "/z"), codes.Changed)
	r.answer(cancel, codes.Content, body{"n": 2}, -1)
	r.answer(r.readRequest("/z"), codes.Content, body{"n": 3}, 2)
	h.awaitValue("/z", 3)
	if n := h.w.count(fmt.Sprintf("changed /x %d", hub.StatusOK)); n != 1 {
		t.Errorf("/x changed %d times, want once: a late notification was stored over its NOT_FOUND", n)
	}
}
