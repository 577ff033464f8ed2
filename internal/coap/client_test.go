package coap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

type result struct {
	msg *Message
	obs *Observation
	err error
}

func start(f func() result) <-chan result {
	ch := make(chan result, 1)
	go func() { ch <- f() }()
	return ch
}

func do(c *Conn, ctx context.Context, m *Message) <-chan result { //nolint:revive // reads like the call it makes
	return start(func() result { r, err := c.Do(ctx, m); return result{msg: r, err: err} })
}

func observe(c *Conn, ctx context.Context, path string) <-chan result { //nolint:revive // likewise
	return start(func() result { o, r, err := c.Observe(ctx, get(path)); return result{msg: r, obs: o, err: err} })
}

func reply(to *Message, code codes.Code, payload string) *Message {
	return &Message{Code: code, Token: to.Token, Payload: []byte(payload)}
}

func wantKind(t *testing.T, err error, k hub.Kind) {
	t.Helper()
	if !hub.IsKind(err, k) {
		t.Fatalf("error %v, want kind %v", err, k)
	}
}

func TestDo(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		req := get("/light")
		req.Options = AddOption(req.Options, URIQuery, []byte("if=oic.if.a"))
		r := do(c, t.Context(), req)
		m := p.read()
		if m.Code != codes.GET || describe(m.Options) != describe(req.Options) || len(m.Token) != 8 {
			t.Fatalf("the peer was asked %v %x %s", m.Code, m.Token, describe(m.Options))
		}
		p.send(reply(m, codes.NotFound, "gone"))
		got := <-r
		if got.err != nil || got.msg.Code != codes.NotFound || string(got.msg.Payload) != "gone" {
			t.Fatalf("%+v", got)
		}
	})
}

// One request at a time by default; the next one goes out when the first has its answer.
func TestOneOutstanding(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		a := do(c, t.Context(), get("/a"))
		first := p.read()
		b := do(c, t.Context(), get("/b"))
		synctest.Wait()
		if p.r.Buffered() > 0 {
			t.Fatal("a second request is out")
		}
		p.send(reply(first, codes.Content, "a"))
		second := p.read()
		p.send(reply(second, codes.Content, "b"))
		if ra, rb := <-a, <-b; string(ra.msg.Payload) != "a" || string(rb.msg.Payload) != "b" {
			t.Fatalf("%v %v", ra, rb)
		}
		waiting, cancel := context.WithCancel(t.Context())
		x := do(c, t.Context(), get("/x"))
		p.read()
		y := do(c, waiting, get("/y"))
		synctest.Wait()
		cancel()
		wantKind(t, (<-y).err, hub.Unavailable)
		c.Close(nil)
		<-time.After(5 * time.Second)
		wantKind(t, (<-x).err, hub.Unavailable)
	})
}

// Over a stream a peer gets more than one request at a time once it answered one while an earlier one was out. One that answers
// in order does not.
func TestOvertaking(t *testing.T) {
	bubble(t, handlerFuncs{}, func(c *Config) { c.MaxProven = 3 }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		if c.Beside() != nil {
			t.Fatal("a turn beside nothing")
		}
		// beside asks for /a and beside it for /b.
		beside := func() (ra, rb <-chan result, a, b *Message) {
			t.Helper()
			ra = do(c, t.Context(), get("/a"))
			a = p.read()
			synctest.Wait() // the peer may have it before the engine knows that it is out
			turn := c.Beside()
			if turn == nil || c.Beside() != nil || c.Free() {
				t.Fatal("not one turn beside the request that is out")
			}
			rb = start(func() result {
				defer turn.End()
				r, err := turn.Do(t.Context(), get("/b"))
				return result{msg: r, err: err}
			})
			return ra, rb, a, p.read()
		}
		ra, rb, a, b := beside()
		p.send(reply(a, codes.Content, "a"))
		<-ra
		third := do(c, t.Context(), get("/c"))
		synctest.Wait()
		if p.r.Buffered() > 0 {
			t.Fatal("the peer that answers in order has two requests")
		}
		p.send(reply(b, codes.Content, "b"))
		<-rb
		p.send(reply(p.read(), codes.Content, "c"))
		<-third
		if n := c.Window(); n != 1 {
			t.Fatalf("a peer that answers in order may have %d requests", n)
		}
		ra, rb, a, b = beside()
		waits := do(c, t.Context(), get("/waits"))
		synctest.Wait()
		p.send(reply(b, codes.Content, "b"))
		<-rb
		if n := c.Window(); n != 3 {
			t.Fatalf("a peer that answered the second request first may have %d", n)
		}
		more := []<-chan result{waits, do(c, t.Context(), get("/more")), do(c, t.Context(), get("/too many"))}
		first, second := p.read(), p.read()
		synctest.Wait()
		if p.r.Buffered() > 0 || c.Free() || c.Beside() != nil {
			t.Fatal("more than three are out")
		}
		p.send(reply(a, codes.Content, "a"))
		<-ra
		for _, m := range []*Message{first, second, p.read()} {
			p.send(reply(m, codes.Content, ""))
		}
		for _, r := range more {
			<-r
		}
		if !c.Free() {
			t.Error("a turn was not given back")
		}
		c.Close(nil)
		if c.Free() || c.Beside() != nil {
			t.Error("a connection that closes gives turns")
		}
	})
}

// A handler may wait for its peer.
func TestDoInHandler(t *testing.T) {
	var c *Conn
	h := handlerFuncs{
		open: func(conn *Conn) error { c = conn; return nil },
		request: func(ctx context.Context, m *Message) Response {
			r, err := c.Do(ctx, get("/back"))
			if err != nil {
				return Response{Code: codes.InternalServerError}
			}
			return Response{Code: codes.Content, Payload: r.Payload}
		},
	}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.send(get("/in"))
		m := p.read()
		wantCode(t, m, codes.GET)
		p.send(reply(m, codes.Content, "answer"))
		if m = p.read(); string(m.Payload) != "answer" {
			t.Fatalf("%v %q", m.Code, m.Payload)
		}
	})
}

func TestLateAnswerDropped(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r := do(c, ctx, get("/a"))
		m := p.read()
		wantKind(t, (<-r).err, hub.Deadline)
		p.send(reply(m, codes.Content, "late"))
		p.frame("2145 77 ff78") // and one for a token we never used
		wantCode(t, p.ask(get("/alive")), codes.Content)
		if s.count("messages_dropped_total", "late") != 2 {
			t.Error("not counted")
		}
	})
}

// RFC 7252, Section 5.4.1: a response with a critical option that is not understood is rejected; OCF's are understood.
func TestAnswerOptions(t *testing.T) {
	for _, tc := range []struct {
		name string
		opt  message.Option
		want hub.Kind
		ok   bool
	}{
		{"critical 9", message.Option{ID: 9, Value: []byte{1}}, hub.BadOption, false},
		{"content format version", message.Option{ID: OCFContentVersion, Value: []byte{8, 0}}, 0, true},
		{"accept version", message.Option{ID: OCFAcceptVersion, Value: []byte{8, 0}}, 0, true},
		{"elective 2048", message.Option{ID: 2048}, 0, true},
	} {
		bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
			p := s.dial(t)
			r := do(<-s.conns, t.Context(), get("/a"))
			m := p.read()
			p.send(&Message{Code: codes.Content, Token: m.Token, Options: message.Options{tc.opt}})
			got := <-r
			if tc.ok != (got.err == nil) || got.err != nil && !hub.IsKind(got.err, tc.want) {
				t.Errorf("%s: %v", tc.name, got.err)
			}
		})
	}
}

func TestConnectionEndsDo(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		r := do(c, t.Context(), get("/a"))
		p.read()
		p.cable().cutCable()
		wantKind(t, (<-r).err, hub.Unavailable)
		_, err := c.Do(t.Context(), get("/b"))
		wantKind(t, err, hub.Unavailable)
	})
}

// observed makes an observation of path and returns it with its token.
func (p *peer) observed(t *testing.T, c *Conn, path string) (*Observation, *Message) {
	t.Helper()
	r := observe(c, t.Context(), path)
	m := p.read()
	if v, ok := m.Option(ObserveOption); !ok || len(v) != 0 {
		t.Fatalf("Observe %x (%v)", v, ok)
	}
	p.send(reply(m, codes.Content, "0").with(ObserveOption, 5))
	got := <-r
	if got.err != nil || got.obs == nil || string(got.msg.Payload) != "0" || got.obs.Path() != path {
		t.Fatalf("%+v", got)
	}
	return got.obs, m
}

// noting collects notifications.
func noting() (handlerFuncs, chan Notification) {
	ch := make(chan Notification, 1000)
	return handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			ch <- n
		}
	}}, ch
}

// RFC 8323, Section 7.1: over a stream the order is the transport's; the values of Observe say nothing.
func TestNotificationsInOrder(t *testing.T) {
	h, notes := noting()
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		o, m := p.observed(t, <-s.conns, "/light")
		o.SetTag("tag")
		values := []uint32{9, 8, 7, 0, 1 << 23, 1}
		for i, v := range values {
			p.send(reply(m, codes.Content, fmt.Sprint(i)).with(ObserveOption, v))
		}
		for i := range values {
			n := <-notes
			if n.Observation != o || n.Observation.Tag() != "tag" || n.Ended || string(n.Message.Payload) != fmt.Sprint(i) {
				t.Fatalf("notification %d: %+v", i, n)
			}
		}
	})
}

// What comes while the handler is busy is brought together.
func TestNotificationsBatch(t *testing.T) {
	var free chan struct{}
	batches := make(chan int, 10)
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		batches <- len(ns)
		<-free
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		free = make(chan struct{})
		p := s.dial(t)
		_, m := p.observed(t, <-s.conns, "/light")
		p.send(reply(m, codes.Content, "1").with(ObserveOption, 1))
		synctest.Wait()
		for range 50 {
			p.send(reply(m, codes.Content, "2").with(ObserveOption, 2))
		}
		synctest.Wait()
		close(free)
		synctest.Wait()
		if a, b := <-batches, <-batches; a != 1 || b != 50 {
			t.Fatalf("batches of %d and %d", a, b)
		}
	})
}

// RFC 7641, Sections 3.1, 3.6 and 4.2.
func TestObservationEnds(t *testing.T) {
	h, notes := noting()
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns

		r := observe(c, t.Context(), "/plain") // no Observe option in the answer: a plain answer
		p.send(reply(p.read(), codes.Content, "x"))
		if got := <-r; got.err != nil || got.obs != nil || string(got.msg.Payload) != "x" {
			t.Fatalf("%+v", got)
		}
		r = observe(c, t.Context(), "/none") // an error code, even with the option
		p.send(reply(p.read(), codes.NotFound, "").with(ObserveOption, 1))
		if got := <-r; got.err != nil || got.obs != nil || got.msg.Code != codes.NotFound {
			t.Fatalf("%+v", got)
		}

		for _, last := range []func(m *Message) *Message{
			func(m *Message) *Message { return reply(m, codes.NotFound, "") },
			func(m *Message) *Message { return reply(m, codes.Content, "last") },
			func(m *Message) *Message { return reply(m, codes.Content, "").with(ObserveOption, 1).with(9, 1) },
		} {
			_, m := p.observed(t, c, "/light")
			p.send(last(m))
			p.send(reply(m, codes.Content, "too late").with(ObserveOption, 9))
			n := <-notes
			if !n.Ended || string(n.Message.Payload) == "too late" {
				t.Fatalf("%+v", n)
			}
		}
		wantCode(t, p.ask(get("/alive")), codes.Content)
		if len(notes) != 0 || s.count("messages_dropped_total", "late") != 3 {
			t.Errorf("%d more notifications, %v late", len(notes), s.count("messages_dropped_total", "late"))
		}
	})
}

// RFC 7641, Section 3.6: Observe 1 with the same token; notifications on the way do not count as its answer.
func TestCancel(t *testing.T) {
	h, notes := noting()
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		o, m := p.observed(t, <-s.conns, "/light")
		done := start(func() result { return result{err: o.Cancel(t.Context())} })
		c := p.read()
		if v, _ := c.Uint(ObserveOption); c.Code != codes.GET || v != 1 || !bytes.Equal(c.Token, m.Token) || Path(c) != "/light" {
			t.Fatalf("%v %x %s", c.Code, c.Token, describe(c.Options))
		}
		p.send(reply(m, codes.Content, "on its way").with(ObserveOption, 9))
		synctest.Wait()
		if len(done) != 0 {
			t.Fatal("a notification was taken for the answer")
		}
		p.send(reply(m, codes.Content, "bye"))
		if r := <-done; r.err != nil {
			t.Fatal(r.err)
		}
		if err := o.Cancel(t.Context()); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(notes) != 0 {
			t.Errorf("notification %+v after Cancel", <-notes)
		}
	})
}

// A registration whose answer comes too late is taken back.
func TestObserveTimesOut(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		r := observe(<-s.conns, ctx, "/light")
		m := p.read()
		wantKind(t, (<-r).err, hub.Deadline)
		c := p.read()
		if v, _ := c.Uint(ObserveOption); v != 1 || !bytes.Equal(c.Token, m.Token) {
			t.Fatalf("%v %x %s", c.Code, c.Token, describe(c.Options))
		}
	})
}

func TestObservationsAreBounded(t *testing.T) {
	bubble(t, handlerFuncs{}, func(c *Config) { c.MaxObservations = 2 }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		p.observed(t, c, "/1")
		p.observed(t, c, "/2")
		_, _, err := c.Observe(t.Context(), get("/3"))
		wantKind(t, err, hub.Exhausted)
	})
}

// device answers GET of one resource in blocks, as a server of its own.
func (p *peer) serveBlocks(m *Message, body []byte, szx uint8, etag byte) {
	p.t.Helper()
	b, has, _ := blockOf(m, Block2)
	if !has {
		b.szx = szx
	}
	at := b.offset()
	end := min(at+b.size(), len(body))
	opts := AddOption(nil, ETagOption, []byte{etag})
	if _, ok := m.Option(ObserveOption); ok {
		opts = AddUint(opts, ObserveOption, 1)
	}
	opts = AddOption(opts, Block2, block{num: b.num, more: end < len(body), szx: b.szx}.value())
	p.send(&Message{Code: codes.Content, Token: m.Token, Options: opts, Payload: body[at:end]})
}

// RFC 7959, Section 2.4: an answer in blocks is fetched and whole; the ETag must stay the same, else it begins again.
func TestDoFetchesBlocks(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		r := do(<-s.conns, t.Context(), get("/big"))
		old, body := pattern(5000), bytes.Repeat([]byte("new"), 2000)
		p.serveBlocks(p.read(), old, 6, 1)
		p.serveBlocks(p.read(), old, 6, 1)
		p.serveBlocks(p.read(), body, 6, 2) // changed under way
		for range 6 {
			p.serveBlocks(p.read(), body, 6, 2)
		}
		got := <-r
		if got.err != nil || !bytes.Equal(got.msg.Payload, body) || describe(got.msg.Options) != "4:02" {
			t.Fatalf("%v, %v", got.err, got.msg)
		}
	})
}

func TestDoRefusesBadBlocks(t *testing.T) {
	for _, tc := range []struct {
		name   string
		first  *Message
		second *Message
		want   hub.Kind
	}{
		{"begins in the middle", (&Message{Code: codes.Content, Payload: pattern(16)}).with(Block2, 1<<4|8), nil, hub.Invalid},
		{"not a whole block", (&Message{Code: codes.Content, Payload: pattern(15)}).with(Block2, 8), nil, hub.Invalid},
		{"a gap", (&Message{Code: codes.Content, Payload: pattern(16)}).with(Block2, 8), (&Message{Code: codes.Content, Payload: pattern(16)}).with(Block2, 2<<4), hub.Invalid},
		{"no block option", (&Message{Code: codes.Content, Payload: pattern(16)}).with(Block2, 8), &Message{Code: codes.Content, Payload: pattern(16)}, hub.Invalid},
		{"announced too large", (&Message{Code: codes.Content, Payload: pattern(16)}).with(Block2, 8).with(Size2, MaxBody+1), nil, hub.TooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				r := do(<-s.conns, t.Context(), get("/big"))
				for _, m := range []*Message{tc.first, tc.second} {
					if m != nil {
						a := *m
						a.Token = p.read().Token
						p.send(&a)
					}
				}
				wantKind(t, (<-r).err, tc.want)
			})
		})
	}
}

// A notification in blocks is brought whole; the rest is asked for without Observe (RFC 7959, Section 3.4). A newer one
// takes its place.
func TestNotificationInBlocks(t *testing.T) {
	h, notes := noting()
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		o, m := p.observed(t, <-s.conns, "/big")
		body := pattern(2500)
		p.serveBlocks(m, body, 6, 1)
		for range 2 {
			g := p.read()
			if _, has := g.Option(ObserveOption); has || bytes.Equal(g.Token, m.Token) {
				t.Fatalf("asked with %s and token %x", describe(g.Options), g.Token)
			}
			p.serveBlocks(g, body, 6, 1)
		}
		if n := <-notes; n.Observation != o || n.Ended || !bytes.Equal(n.Message.Payload, body) {
			t.Fatalf("%d bytes", len(n.Message.Payload))
		}

		p.serveBlocks(m, body, 6, 2)
		g := p.read()
		p.send(reply(m, codes.Content, "newer").with(ObserveOption, 3))
		p.serveBlocks(g, body, 6, 2)
		p.serveBlocks(p.read(), body, 6, 2)
		if n := <-notes; string(n.Message.Payload) != "newer" {
			t.Fatalf("%d bytes", len(n.Message.Payload))
		}
		synctest.Wait()
		if len(notes) != 0 {
			t.Error("the older representation came after the newer one")
		}

		p.serveBlocks(m, make([]byte, MaxBody+2000), 6, 3)
		for {
			if len(notes) > 0 {
				break
			}
			if g, _, err := p.next(); err == nil {
				p.serveBlocks(g, make([]byte, MaxBody+2000), 6, 3)
			}
			synctest.Wait()
		}
		if n := <-notes; n.Message.Code != codes.RequestEntityTooLarge || n.Ended {
			t.Errorf("%v, ended %v", n.Message.Code, n.Ended)
		}
	})
}

// receiveBlocks plays the device for an upload; it returns the body and the sizes of its messages.
func (p *peer) receiveBlocks(t *testing.T, largest int, szx uint8) []byte {
	t.Helper()
	var body []byte
	for {
		m, n, err := p.next()
		if err != nil {
			t.Fatal(err)
		}
		if n > largest {
			t.Fatalf("a message of %d bytes, the peer takes %d", n, largest)
		}
		b, has, _ := blockOf(m, Block1)
		if !has || b.offset() != len(body) {
			t.Fatalf("Block1 %+v (%v) after %d bytes", b, has, len(body))
		}
		body = append(body, m.Payload...)
		code := codes.Changed
		if b.more {
			code = codes.Continue
		}
		p.send(&Message{Code: code, Token: m.Token, Options: AddOption(nil, Block1, block{b.num, b.more, min(b.szx, szx)}.value())})
		if !b.more {
			return body
		}
	}
}

func TestDoSendsBlocks(t *testing.T) {
	for _, tc := range []struct {
		name    string
		csm     func(*peer)
		largest int
		szx     uint8
	}{
		{"no CSM", func(*peer) {}, 1152, 7},
		{"300 bytes", func(p *peer) { p.csm(300, true) }, 300, 7},
		{"BERT", func(p *peer) { p.csm(9000, true) }, 9000, 7},
		{"smaller on request", func(*peer) {}, 1152, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				tc.csm(p)
				synctest.Wait()
				body := pattern(20_000)
				r := do(<-s.conns, t.Context(), post("/big", body))
				if got := p.receiveBlocks(t, tc.largest, tc.szx); !bytes.Equal(got, body) {
					t.Fatalf("%d bytes arrived", len(got))
				}
				if got := <-r; got.err != nil || got.msg.Code != codes.Changed {
					t.Fatalf("%+v", got)
				}
			})
		})
	}
}

// A peer that takes less than headers need gets nothing, and the caller the reason.
func TestPeerTooSmall(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.csm(40, true)
		synctest.Wait()
		c := <-s.conns
		_, err := c.Do(t.Context(), post("/big", pattern(100)))
		wantKind(t, err, hub.TooLarge)
		if code, _ := hub.Public(err); code != "too-large-for-device" {
			t.Errorf("code %s", code)
		}
	})
}

// A panic while notifications are handled ends the connection, so that the device reports again.
func TestPanicInNotifications(t *testing.T) {
	h := handlerFuncs{notifications: func(context.Context, []Notification) { panic(errors.New("boom")) }}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		_, m := p.observed(t, <-s.conns, "/light")
		p.send(reply(m, codes.Content, "1").with(ObserveOption, 1))
		p.ended()
		_ = p.Close()
		wantReason(t, s.reason(t), ErrPanic)
	})
}

// One byte over MaxBody in one message: a notification becomes an error of its resource, an answer an error of its request;
// the connection lives.
func TestAnswerTooLarge(t *testing.T) {
	h, notes := noting()
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		o, m := p.observed(t, c, "/big")
		for _, n := range []int{MaxBody, MaxBody + 1, 1} {
			p.send((&Message{Code: codes.Content, Token: m.Token, Payload: make([]byte, n)}).with(ObserveOption, 1))
		}
		for _, want := range []codes.Code{codes.Content, codes.RequestEntityTooLarge, codes.Content} {
			if n := <-notes; n.Observation != o || n.Ended || n.Message.Code != want {
				t.Fatalf("%v with %d bytes, ended %v", n.Message.Code, len(n.Message.Payload), n.Ended)
			}
		}
		r := do(c, t.Context(), get("/big"))
		p.send(&Message{Code: codes.Content, Token: p.read().Token, Payload: make([]byte, MaxBody+1)})
		wantKind(t, (<-r).err, hub.TooLarge)
	})
}

// What comes in blocks is paid from the common budget while it grows, and no longer.
func TestDownloadsArePaid(t *testing.T) {
	h, notes := noting()
	bubble(t, h, func(c *Config) { c.MaxBuffered = 6000 }, func(t *testing.T, s *sim) {
		paid := func(when string, want int) {
			t.Helper()
			synctest.Wait()
			if n := s.count("buffered_bytes"); n != float64(want) {
				t.Errorf("%s: %v bytes are paid for, want %d", when, n, want)
			}
		}
		p := s.dial(t)
		c := <-s.conns
		body := pattern(3000)
		r := do(c, t.Context(), get("/big"))
		p.serveBlocks(p.read(), body, 6, 1)
		m := p.read()
		paid("one block", messageCost+1024)
		p.serveBlocks(m, body, 6, 1)
		m = p.read()
		paid("two blocks", messageCost+2048)
		p.serveBlocks(m, body, 6, 2) // changed under way: what came before is worth nothing
		m = p.read()
		paid("it begins anew", 0)
		p.serveBlocks(m, body, 6, 2)
		m = p.read()
		paid("one block of the newer", messageCost+1024)
		p.send(reply(m, codes.NotFound, "gone"))
		if got := <-r; got.err != nil || got.msg.Code != codes.NotFound {
			t.Fatal(got.err, got.msg)
		}
		paid("it went away", 0)

		huge := pattern(20_000)
		r = do(c, t.Context(), get("/huge"))
		for range 6 { // the sixth is beyond the budget
			p.serveBlocks(p.read(), huge, 6, 1)
		}
		wantKind(t, (<-r).err, hub.Exhausted)
		paid("too much", 0)

		_, m = p.observed(t, c, "/notes")
		p.serveBlocks(m, body, 6, 1)
		p.serveBlocks(p.read(), body, 6, 1)
		g := p.read()
		paid("two blocks of a notification", messageCost+2048)
		p.serveBlocks(g, body, 6, 1)
		if n := <-notes; !bytes.Equal(n.Message.Payload, body) {
			t.Fatalf("%v", n.Message)
		}
		paid("the notification is handled", 0)
		p.serveBlocks(m, huge, 6, 3)
		for range 5 {
			p.serveBlocks(p.read(), huge, 6, 3)
		}
		if n := <-notes; n.Message.Code != codes.GatewayTimeout || n.Ended {
			t.Errorf("%v, ended %v", n.Message.Code, n.Ended)
		}
		paid("a notification of too much", 0)
	})
}
