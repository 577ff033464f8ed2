package coapgateway

import (
	"context"
	"fmt"
	"iter"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// observe registers (0) or deregisters (1) for a resource of the lamp's.
func observe(href string, token byte, value byte, opts ...option) message.Message {
	m := get(at(lampID, href), token)
	m.Options = coap.AddUint(m.Options, message.Observe, uint32(value))
	for _, o := range opts {
		m.Options = coap.AddOption(m.Options, o.ID, o.Value)
	}
	return m
}

// is fails unless m is the state with that payload; it returns the number of the notification, -1 for none.
func (n *neighbour) is(m message.Message, code codes.Code, payload string) int64 {
	n.t.Helper()
	if m.Code != code || !strings.HasPrefix(string(m.Payload), payload) {
		n.t.Fatalf("%v %q, want %v %q", m.Code, m.Payload, code, payload)
	}
	v, err := m.Options.GetUint32(message.Observe)
	if err != nil {
		return -1
	}
	return int64(v)
}

// watched waits until the hub has so many watches, and readers of feeds to match.
func (h *hall) watched(n int) {
	h.t.Helper()
	h.w.await(h.t, fmt.Sprintf("%d observations", n), func() bool {
		h.gw.watches.mu.Lock()
		defer h.gw.watches.mu.Unlock()
		return h.gw.watches.n == n && (h.w.feeds > 0) == (n > 0)
	})
}

// RFC 7641 from its beginning to its ends.
func TestObserveAnotherDevice(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.published("/light", "/other")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "\xe7\x01")
	n := h.neighbour(fanID)

	a := n.ask(observe("/light", 5, 0))
	last := n.is(a, codes.Content, "\xa0")
	if etag, _ := a.Options.GetBytes(message.ETag); last < 0 || string(etag) != "\xe7\x01" {
		t.Fatalf("%d, ETag %x", last, etag)
	}
	next := func(token byte, payload string) {
		t.Helper()
		m := n.answer(token)
		number := n.is(m, codes.Content, payload)
		if format, err := m.Options.ContentFormat(); number <= last || err != nil || format != message.AppOcfCbor {
			t.Fatalf("number %d after %d, format %v", number, last, format)
		}
		last = number
	}
	for i := range 3 {
		h.report("/light", hub.FormatOCFCBOR, string(rune('a'+i)), "")
		next(5, string(rune('a'+i)))
	}
	// What is nothing new is not told: another resource, and the same state from elsewhere.
	h.report("/other", hub.FormatOCFCBOR, "x", "")
	unlock := h.w.lock()
	h.w.commit(lampID, hub.Event{Kind: hub.Registered}) // it wakes all
	unlock()
	w := h.watch("/light")
	h.w.await(t, "the feed to be read", func() bool {
		h.gw.watches.mu.Lock()
		defer h.gw.watches.mu.Unlock()
		return h.w.fed == len(h.w.commits) && !w.woken && !w.running
	})
	n.quiet(5)

	// The same token again takes the place of the first, and its numbers go on; with an interface it is the twin all the same.
	m := n.ask(observe("/light", 5, 0, query("if=oic.if.rw"), with(message.ETag, "\x09")))
	if number := n.is(m, codes.Content, "c"); number <= last {
		t.Fatalf("number %d after %d", number, last)
	} else {
		last = number
	}
	h.watched(1)
	h.report("/light", hub.FormatOCFCBOR, "d", "\x0d")
	next(5, "d")
	n.quiet(5)

	// A valid ETag is confirmed, and the notifications go on (Section 3.3.2).
	if number := n.is(n.ask(observe("/light", 6, 0, with(message.ETag, "\x0d"))), codes.Valid, ""); number < 0 {
		t.Fatal("not registered")
	}
	h.watched(2)
	h.report("/light", hub.FormatOCFCBOR, "e", "")
	next(5, "e")
	n.is(n.answer(6), codes.Content, "e")

	// Section 3.6: the answer to a deregistration is that to a GET.
	if number := n.is(n.ask(observe("/light", 6, 1)), codes.Content, "e"); number != -1 {
		t.Errorf("Observe %d", number)
	}
	h.watched(1)
	h.report("/light", hub.FormatOCFCBOR, "f", "")
	next(5, "f")
	n.quiet(6)

	// It comes back in the middle: the last state is told.
	h.w.mu.Lock()
	h.w.unpublishNow("/light")
	h.w.links[lampID]["/light"] = hub.Link{Href: "/light"}
	h.w.mu.Unlock()
	h.report("/light", hub.FormatOCFCBOR, "g", "")
	next(5, "g")

	// The end of the target.
	unlock = h.w.lock()
	h.w.unpublishNow("/light")
	unlock()
	m = n.answer(5)
	if number := n.is(m, codes.ServiceUnavailable, "resource-gone: "); number != -1 {
		t.Errorf("Observe %d", number)
	}
	if age, err := m.Options.GetUint32(message.MaxAge); err != nil || age == 0 {
		t.Errorf("Max-Age %d", age)
	}
	h.watched(0)
}

// What happens while the registration is answered is told behind the answer.
func TestChangeWhileRegistering(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.report("/light", hub.FormatOCFCBOR, "old", "")
	unlock := h.w.lock()
	state := h.w.dir.state
	looks := 0
	h.w.dir.state = func(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		return func(yield func(*hub.Device, error) bool) {
			for d, err := range state(ctx, o, ids) {
				if looks++; looks == 1 {
					h.report("/light", hub.FormatOCFCBOR, "new", "")
					h.w.await(t, "the feed to be read", func() bool {
						h.gw.watches.mu.Lock()
						defer h.gw.watches.mu.Unlock()
						for _, e := range h.gw.watches.ears {
							for w := range e.devices[lampID]["/light"] {
								return w.woken
							}
						}
						return false
					})
				}
				if !yield(d, err) {
					return
				}
			}
		}
	}
	unlock()
	n := h.neighbour(fanID)
	number := n.is(n.ask(observe("/light", 5, 0)), codes.Content, "old")
	if next := n.is(n.answer(5), codes.Content, "new"); next <= number {
		t.Errorf("%d, then %d", number, next)
	}
	// What it is told when nothing happened for a day is the state; what is gone is told by whoever finds it.
	w := h.watch("/light")
	if r := w.state(); r.Code != codes.Content || string(r.Payload) != "new" {
		t.Errorf("%v %q", r.Code, r.Payload)
	}
	unlock = h.w.lock()
	h.w.dir.state = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		return func(yield func(*hub.Device, error) bool) { yield(nil, &hub.Error{Kind: hub.Unavailable}) }
	}
	unlock()
	if r := w.state(); !r.Silent {
		t.Errorf("%v %q", r.Code, r.Payload)
	}
}

// watch returns a watch of the lamp's resource.
func (h *hall) watch(href hub.Href) (w *watch) {
	h.gw.watches.mu.Lock()
	defer h.gw.watches.mu.Unlock()
	for _, e := range h.gw.watches.ears {
		for w = range e.devices[lampID][href] {
			return w
		}
	}
	h.t.Fatalf("nobody watches %s", href)
	return nil
}

// unpublishNow is the lamp's own unpublishing; w.mu is held.
func (w *world) unpublishNow(href hub.Href) {
	delete(w.links[lampID], href)
	w.commit(lampID, hub.Event{Kind: hub.LinksUnpublished, Hrefs: []hub.Href{href}})
	w.store(lampID, hub.Change{Href: href, Status: hub.StatusNotFound})
}

// A resource of which nothing is known yet is answered when something is; one that is not there, at once.
func TestObserveBeforeTheFirstReport(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.KeepAlive.Timeout = 3 * time.Second })
	h.w.own(lampID, "alice")
	h.published("/light", "/silent")
	n := h.neighbour(fanID)
	n.is(n.ask(observe("/none", 4, 0)), codes.NotFound, "resource-unknown: ")
	n.write(observe("/light", 5, 0))
	n.quiet(5) // nothing is held up by it
	h.watched(1)
	h.report("/light", hub.FormatOCFCBOR, "first", "")
	number := n.is(n.answer(5), codes.Content, "first")
	h.report("/light", hub.FormatOCFCBOR, "second", "")
	if next := n.is(n.answer(5), codes.Content, "second"); number < 0 || next <= number {
		t.Errorf("%d, then %d", number, next)
	}
	m := n.ask(observe("/silent", 6, 0)) // until the patience of a request is over
	if age, _ := m.Options.GetUint32(message.MaxAge); age == 0 {
		t.Error("no Max-Age")
	}
	n.is(m, codes.ServiceUnavailable, "resource-silent: ")
	h.watched(1)
	n.write(observe("/silent", 7, 0))
	h.watched(2)
	unlock := h.w.lock()
	h.w.unpublishNow("/silent")
	unlock()
	n.is(n.answer(7), codes.NotFound, "resource-unknown: ")
	h.watched(1)
}

func TestObservationOfAnotherDeviceEnds(t *testing.T) {
	for name, c := range map[string]struct {
		happens func(h *hall, n *neighbour)
		code    codes.Code // 0: nothing is told
		text    string
	}{
		"error":             {func(h *hall, _ *neighbour) { h.report("/light", 0, "no", "", hub.StatusForbidden) }, codes.Forbidden, "device-error: "},
		"4.01":              {func(h *hall, _ *neighbour) { h.report("/light", 0, "no", "", hub.StatusUnauthorized) }, codes.Forbidden, "device-error: "},
		"another format":    {func(h *hall, _ *neighbour) { h.report("/light", 0, "words", "") }, codes.NotAcceptable, "not-acceptable: "}, // Section 4.2
		"the device's end":  {func(h *hall, _ *neighbour) { defer h.w.lock()(); h.w.unregister(lampID) }, codes.ServiceUnavailable, "resource-gone: "},
		"another owner":     {func(h *hall, _ *neighbour) { h.transfer("mallory") }, codes.ServiceUnavailable, "resource-gone: "},
		"the same owner":    {func(h *hall, _ *neighbour) { h.transfer("alice") }, codes.ServiceUnavailable, "resource-gone: "},
		"sign-out":          {func(h *hall, n *neighbour) { n.signOut() }, 0, ""},
		"end of connection": {func(h *hall, n *neighbour) { _ = n.conn.Close() }, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t, nil)
			h.w.own(lampID, "alice")
			h.published("/light", "/silent")
			h.report("/light", hub.FormatOCFCBOR, "\xa0", "")
			n := h.neighbour(fanID)
			n.is(n.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
			n.write(observe("/silent", 6, 0)) // one that waits
			h.watched(2)
			w := h.watch("/light")
			c.happens(h, n)
			switch {
			case c.code != 0:
				if number := n.is(n.answer(5), c.code, c.text); number != -1 {
					t.Errorf("Observe %d", number)
				}
				if c.text == "resource-gone: " {
					n.is(n.answer(6), codes.NotFound, "resource-unknown: ")
					h.watched(0)
				} else {
					h.watched(1)
				}
				h.report("/light", hub.FormatOCFCBOR, "x", "")
				n.quiet(5)
			default:
				h.watched(0)
				h.report("/light", hub.FormatOCFCBOR, "x", "")
				if name == "sign-out" {
					n.quiet(5)
				}
				if w.p.conn.Observer(&coap.Message{Token: []byte{5}}) != nil {
					t.Error("the engine still has the observer")
				}
			}
		})
	}
}

// Over UDP, too, an observer hears that it is one no more, also when it has not acknowledged what it was told before.
func TestObservationEndsForASlowObserver(t *testing.T) {
	t.Parallel()
	doze(t, nil, nil, func(d *dozer) { d.w.own(fanID, "alice") }, func(t *testing.T, w *world, gw *Gateway, d *dozer) {
		report := func(value string) {
			defer w.lock()()
			w.store(fanID, hub.Change{Href: "/fan", Content: hub.Content{Format: hub.FormatOCFCBOR, Data: []byte(value)}})
		}
		report("1")
		m := get(at(fanID, "/fan"), 5)
		m.Options = coap.AddUint(m.Options, message.Observe, 0)
		if a := d.ask(m); a.Code != codes.Content || string(a.Payload) != "1" {
			t.Fatalf("%v", a)
		}
		d.sleep()
		report("2")
		synctest.Wait()
		unlock := w.lock()
		w.unregister(fanID)
		unlock()
		w.await(t, "the end of the observation", func() bool {
			gw.watches.mu.Lock()
			defer gw.watches.mu.Unlock()
			return gw.watches.n == 0
		})
		d.set(func() { d.asleep = false })
		after(time.Minute)
		var got []string
		for len(d.answers) > 0 {
			a := <-d.answers
			got = append(got, fmt.Sprintf("%v %s", a.Code, a.Payload))
		}
		if len(got) != 2 || got[0] != "Content 2" || !strings.HasPrefix(got[1], "ServiceUnavailable resource-gone: ") {
			t.Errorf("it was told %q", got)
		}
	})
}

// transfer gives the lamp to an owner, with what the former one had of it.
func (h *hall) transfer(to hub.Owner) {
	unlock := h.w.lock()
	h.w.unregister(lampID)
	unlock()
	h.w.own(lampID, to)
	defer h.w.lock()()
	h.w.commit(lampID, hub.Event{Kind: hub.Registered})
}

func (n *neighbour) signOut() {
	n.t.Helper()
	out := body{"di": string(fanID), "uid": "alice", "accesstoken": "token", "login": false}
	if a := n.ask(post("/oic/sec/session", 31, cborOf(n.t, out))); a.Code != codes.Changed {
		n.t.Fatalf("%v %q", a.Code, a.Payload)
	}
}

// RFC 7959, Section 7: what is left of an answer is for who asked, not for who comes later on the same connection.
func TestSignOutForgetsAnswers(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.published("/light")
	h.report("/light", hub.FormatOCFCBOR, strings.Repeat("x", 40), "")
	n := h.neighbour(fanID)
	block := func(num uint32) message.Message { // of 16 bytes
		m := get(at(lampID, "/light"), 5)
		m.Options = coap.AddUint(m.Options, coap.Block2, num<<4)
		return n.ask(m)
	}
	n.is(block(0), codes.Content, strings.Repeat("x", 16))
	n.is(block(1), codes.Content, strings.Repeat("x", 16))
	n.signOut()
	n.is(block(1), codes.Unauthorized, "not-signed-in: ")
}

// Observations are bounded for a session and for all; one that takes another's place needs no room.
func TestObservationsOfOtherDevicesAreBounded(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) {
		c.DeviceToDevice.MaxObservations, c.DeviceToDevice.MaxObservationsInAll = 2, 3
	})
	h.w.own(lampID, "alice")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "")
	n, m := h.neighbour(fanID), h.neighbour("d0000000-0000-4000-8000-000000000007")
	for range 2 {
		n.is(n.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
		n.is(n.ask(observe("/light", 6, 0)), codes.Content, "\xa0")
	}
	n.is(n.ask(observe("/light", 7, 0)), codes.ServiceUnavailable, "too-many-observations: ")
	m.is(m.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
	m.is(m.ask(observe("/light", 6, 0)), codes.ServiceUnavailable, "too-many-observations: ")
	if n := testutil.ToFloat64(h.gw.metrics.overload.WithLabelValues("too-many-observations")); n != 2 {
		t.Errorf("%v refusals are counted, want 2", n)
	}
	n.is(n.ask(observe("/light", 5, 1)), codes.Content, "\xa0")
	m.is(m.ask(observe("/light", 6, 0)), codes.Content, "\xa0")
	h.report("/light", hub.FormatOCFCBOR, "b", "")
	for _, x := range []struct {
		*neighbour
		token byte
	}{{n, 6}, {m, 5}, {m, 6}} {
		x.is(x.answer(x.token), codes.Content, "b")
	}
}

// While the directory is away an observation misses nothing but states in between.
func TestObservationOutlivesTrouble(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "")
	n := h.neighbour(fanID)
	n.is(n.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
	trouble := &hub.Error{Kind: hub.Unavailable}
	broken := make(chan string, 8)

	// The feed loses its place, and cannot be had at first; what happened meanwhile is found.
	unlock := h.w.lock()
	feed, head, state := h.w.dir.feed, h.w.dir.head, h.w.dir.state
	var tries atomic.Int32
	h.w.dir.head = func(ctx context.Context) (hub.Cursor, error) {
		if tries.Add(1) == 1 {
			broken <- "head"
			return hub.Cursor{}, trouble
		}
		return head(ctx)
	}
	var cut atomic.Bool
	h.w.dir.feed = func(ctx context.Context, o hub.Owner, from hub.Cursor) iter.Seq2[hub.Fed, error] {
		return func(yield func(hub.Fed, error) bool) {
			for f, err := range feed(ctx, o, from) {
				if err == nil && cut.CompareAndSwap(false, true) { // else it is the reader for the first watch, which has gone
					broken <- "feed"
					yield(hub.Fed{}, trouble)
					return
				}
				if !yield(f, err) {
					return
				}
			}
		}
	}
	unlock()
	n.is(n.ask(observe("/light", 5, 1)), codes.Content, "\xa0") // it was read before
	h.watched(0)
	tries.Store(1)
	n.is(n.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
	tries.Store(0)
	h.report("/light", hub.FormatOCFCBOR, "b", "") // its reader breaks off in place of this
	n.is(n.answer(5), codes.Content, "b")
	if a, b := <-broken, <-broken; a != "feed" || b != "head" {
		t.Errorf("%s and %s broke", a, b)
	}

	// The state cannot be read for a while.
	unlock = h.w.lock()
	var back atomic.Bool
	h.w.dir.state = func(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		if !back.Load() {
			select {
			case broken <- "state":
			default:
			}
			return func(yield func(*hub.Device, error) bool) { yield(nil, trouble) }
		}
		return state(ctx, o, ids)
	}
	unlock()
	h.report("/light", hub.FormatOCFCBOR, "c", "")
	<-broken
	h.report("/light", hub.FormatOCFCBOR, "d", "")
	back.Store(true)
	n.is(n.answer(5), codes.Content, "d")
	n.quiet(5)
}

// A panic beside the requests ends the connection: its peer would take an old state for the last one.
func TestPanicOfAnObservation(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "")
	n := h.neighbour(fanID)
	n.is(n.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
	unlock := h.w.lock()
	h.w.dir.state = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] { panic("on purpose") }
	unlock()
	h.report("/light", hub.FormatOCFCBOR, "b", "")
	for {
		if _, ok := n.read(); !ok {
			break
		}
	}
	h.watched(0)
}

// One where the feed is read does not: it is read on from its end, and each watch looks.
func TestPanicOfAFeed(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "")
	n := h.neighbour(fanID)
	unlock := h.w.lock()
	feed := h.w.dir.feed
	var panicked atomic.Bool
	h.w.dir.feed = func(ctx context.Context, o hub.Owner, from hub.Cursor) iter.Seq2[hub.Fed, error] {
		return func(yield func(hub.Fed, error) bool) {
			for f, err := range feed(ctx, o, from) {
				if !panicked.Load() {
					break // the fake's lock is held by no one who panics
				}
				if !yield(f, err) {
					return
				}
			}
			if panicked.CompareAndSwap(false, true) {
				panic("on purpose")
			}
		}
	}
	unlock()
	n.is(n.ask(observe("/light", 5, 0)), codes.Content, "\xa0")
	h.report("/light", hub.FormatOCFCBOR, "b", "")
	n.is(n.answer(5), codes.Content, "b")
	h.report("/light", hub.FormatOCFCBOR, "c", "")
	n.is(n.answer(5), codes.Content, "c")
	if !panicked.Load() {
		t.Error("nothing panicked")
	}
}

// A client of another house: go-coap's.
func TestStockClientObservesAnotherDevice(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.report("/light", hub.FormatOCFCBOR, "a", "")
	d := h.online(fanID, mute)
	told := make(chan string, 8)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second) // go-coap's client waits for ever
	defer cancel()
	obs, err := d.conn.Observe(ctx, at(lampID, "/light"), func(m *pool.Message) {
		b, _ := m.ReadBody()
		told <- coap.Dotted(m.Code()) + " " + string(b)
	})
	if err != nil {
		t.Fatal(err)
	}
	next := func(want string) {
		t.Helper()
		select {
		case got := <-told:
			if got != want {
				t.Fatalf("told %q, want %q", got, want)
			}
		case <-time.After(10 * time.Second):
			t.Fatalf("was not told %q", want)
		}
	}
	next("2.05 a")
	for _, s := range []string{"b", "c"} {
		h.report("/light", hub.FormatOCFCBOR, s, "")
		next("2.05 " + s)
	}
	if err := obs.Cancel(ctx); err != nil {
		t.Fatal(err)
	}
	h.watched(0)
}
