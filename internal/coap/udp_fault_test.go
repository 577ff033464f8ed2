package coap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// The answer leaves from the address that was asked, whichever the socket is bound to.
func TestReplyAddress(t *testing.T) {
	for _, tc := range []struct{ listen, hub string }{
		{"0.0.0.0:0", "127.0.0.2"},
		{"[::]:0", "127.0.0.3"},
		{"[::]:0", "::1"},
		{"127.0.0.1:0", "127.0.0.1"},
	} {
		t.Run(tc.listen+" "+tc.hub, func(t *testing.T) {
			conns := make(chan *Conn, 1)
			addr, _ := listenUDP(t, handlerFuncs{open: func(c *Conn) error { conns <- c; return nil }}, tc.listen, nil)
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				t.Fatal(err)
			}
			to := net.JoinHostPort(tc.hub, port)
			nc, err := net.Dial("udp", to) // connected: the kernel drops what comes from elsewhere
			if err != nil {
				t.Fatal(err)
			}
			defer nc.Close()
			if _, err := nc.Write(appendPacket(nil, confirmable, 7, get("/a"))); err != nil {
				t.Fatal(err)
			}
			_ = nc.SetReadDeadline(time.Now().Add(20 * time.Second))
			b := make([]byte, 1500)
			n, err := nc.Read(b)
			if err != nil {
				t.Fatal(err)
			}
			if p, err := parsePacket(b[:n]); err != nil || p.id != 7 || p.code != codes.Content {
				t.Fatalf("%x: %v", b[:n], err)
			}
			if got := (<-conns).Info().Local.String(); got != to {
				t.Fatalf("local address %s, want %s", got, to)
			}
		})
	}
}

// A handler that is stuck stalls neither other sessions nor the timers, and what its session queues is bounded.
func TestUDPStuckHandler(t *testing.T) {
	var stuck chan struct{}
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/stuck" {
			<-stuck
		}
		return Response{Code: codes.Content}
	}}
	udpBubble(t, h, func(c *Config) { c.QueueLength = 10 }, func(t *testing.T, s *udpSim) {
		stuck = make(chan struct{})
		p, q := s.device(t, deviceAddr), s.device(t, "192.0.2.3:3")
		c := s.begin(t, p)
		cq := s.begin(t, q)
		for i := range 100 {
			p.send(nonConfirmable, get("/stuck"))
			if i%10 == 0 {
				wantCode(t, q.ask(get("/a")).Message, codes.Content)
			}
		}
		c.mu.Lock()
		queued := c.queued
		c.mu.Unlock()
		if queued != 10 {
			t.Errorf("%d are queued", queued)
		}
		r := do(cq, t.Context(), get("/b"))
		first := q.read(confirmable)
		again := q.read(confirmable) // the timers run
		q.raw(appendPacket(nil, acknowledgement, first.id, reply(again.Message, codes.Content, "b")))
		if got := <-r; got.err != nil {
			t.Fatal(got.err)
		}
		close(stuck)
	})
}

// The round trip is taken from what was sent once.
func TestRoundTrip(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		s.net.SetPath(simnet.Path{Delay: 200 * time.Millisecond})
		ack := func(skip int) {
			t.Helper()
			r := do(c, t.Context(), get("/a"))
			for range skip {
				p.read(confirmable)
			}
			m := p.read(confirmable)
			p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "a")))
			if got := <-r; got.err != nil {
				t.Fatal(got.err)
			}
		}
		ack(0)
		if d := c.Stats().RoundTrip; d != 400*time.Millisecond {
			t.Fatalf("%v", d)
		}
		s.net.SetPath(simnet.Path{Delay: 300 * time.Millisecond})
		ack(1)
		if d := c.Stats().RoundTrip; d != 400*time.Millisecond {
			t.Fatalf("%v from a message that was sent twice", d)
		}
	})
}

// What waits for its turn is bounded, whoever never acknowledges.
func TestUDPBacklog(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		for range 1000 {
			c.tr.ping()
		}
		c.dg.mu.Lock()
		n := len(c.dg.sent)
		c.dg.mu.Unlock()
		if n != maxBacklog {
			t.Fatalf("%d messages wait", n)
		}
		p.read(confirmable)
		wantCode(t, p.ask(get("/a")).Message, codes.Content)
	})
}

// Message IDs are not used again within EXCHANGE_LIFETIME (RFC 7252, Section 4.4).
func TestMessageIDs(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		d := s.begin(t, p).dg
		d.mu.Lock()
		defer d.mu.Unlock()
		seen := make(map[uint16]bool)
		for {
			id, ok := d.messageID()
			if !ok {
				break
			}
			if seen[id] {
				t.Fatalf("ID %d is used twice", id)
			}
			seen[id] = true
		}
		if len(seen) < 40_000 {
			t.Fatalf("only %d IDs", len(seen))
		}
		d.mu.Unlock()
		<-time.After(248 * time.Second)
		d.mu.Lock()
		if _, ok := d.messageID(); !ok {
			t.Fatal("no ID after EXCHANGE_LIFETIME")
		}
	})
}

// RFC 7252, Section 4.4: where the IDs of a session begin is random, so that nobody guesses them who has not read them.
func TestFirstMessageID(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		first, step := make(map[uint16]bool), make(map[uint16]bool)
		last := uint16(0)
		for i := range 20 {
			p := s.device(t, fmt.Sprintf("192.0.2.2:%d", 40000+i))
			p.ask(get("/a"))
			(<-s.conns).tr.ping()
			m := p.read(confirmable)
			first[m.id], step[m.id-last] = true, true
			last = m.id
			p.empty(reset, m.id)
		}
		if len(first) < 18 || len(step) < 18 { // two may be the same
			t.Errorf("the first IDs of 20 sessions: %v", first)
		}
	})
}

// RFC 7252, Section 4.2: an ICMP error says nothing about whoever is there next. A client that is gone when its answer comes
// makes the system send one, and the engine goes on.
func TestAnswersToNobody(t *testing.T) {
	goOn := make(chan struct{})
	addr, _ := listenUDP(t, handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/gone" {
			<-goOn
		}
		return Response{Code: codes.Content, Payload: []byte(Path(m))}
	}}, "127.0.0.1:0", nil)
	ask := func(path string) net.Conn {
		t.Helper()
		c, err := net.Dial("udp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write(appendPacket(nil, confirmable, 7, get(path))); err != nil {
			t.Fatal(err)
		}
		return c
	}
	answered := func(c net.Conn) {
		t.Helper()
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		b := make([]byte, 1500)
		if n, err := c.Read(b); err != nil || b[0]>>4 != 6 {
			t.Fatalf("%x, %v", b[:n], err)
		}
		_ = c.Close()
	}
	var gone []net.Conn
	for range 20 {
		gone = append(gone, ask("/gone"))
	}
	answered(ask("/a")) // so the others have been read, too
	for _, c := range gone {
		_ = c.Close()
	}
	close(goOn)
	for range 20 {
		answered(ask("/b"))
	}
}

// A NAT that restarts gives the device another address: to plain UDP that is another peer, whose session begins anew. Commands
// to the old one come back as unanswered, and reach nobody else.
func TestUDPNATRebinding(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		nat := s.net.NAT("198.51.100.1", 5*time.Minute)
		inside, err := nat.Listen("10.0.0.1:1000")
		if err != nil {
			t.Fatal(err)
		}
		defer inside.Close()
		p := &udpPeer{t: t, conn: inside, hub: s.device(t, "192.0.2.77:1").hub, id: 1}
		old := s.begin(t, p)
		nat.Rebind()
		r := do(old, t.Context(), get("/light"))
		p.quiet(time.Minute)
		renewed := s.begin(t, p)
		if renewed == old || renewed.Info().Remote.String() == old.Info().Remote.String() || renewed.Info().ID == old.Info().ID {
			t.Fatalf("%v and %v", old.Info(), renewed.Info())
		}
		wantKind(t, (<-r).err, hub.Deadline)
		got := do(renewed, t.Context(), get("/light"))
		m := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "on")))
		if res := <-got; res.err != nil {
			t.Fatal(res.err)
		}
	})
}

// Another device behind the same NAT gets the old port. It rejects what was meant for the former: no observation goes on with
// it, and no answer of it is taken for the other's.
func TestUDPAddressReuse(t *testing.T) {
	notified := 0
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) { notified += len(ns) }}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		tok := p.observed(c, "/light", 1)
		_ = p.conn.Close()

		q := s.device(t, deviceAddr) // rebooted, or another one
		q.id = p.id - 3              // it uses IDs that were used before
		r := do(c, t.Context(), get("/light"))
		m := q.read(confirmable)
		q.empty(reset, m.id)
		wantKind(t, (<-r).err, hub.Unavailable)
		for i := range 5 {
			wantCode(t, q.ask(get(fmt.Sprintf("/new%d", i))).Message, codes.Content)
		}
		wrong := bytes.Clone(tok)
		wrong[0]++
		q.notify(nonConfirmable, wrong, 5, "of another observation")
		q.read(reset)
		synctest.Wait()
		if notified != 0 {
			t.Fatal("a notification without observation was handled")
		}
	})
}

// RFC 7252, Section 4.4: an ACK or RST is of the endpoint that it came from. Whoever forges one from another address or port,
// with the right message ID and token, ends neither a request nor an observation, gets no answer and no session; nor does the
// peer itself with an ID that is not under way.
func TestSpoofedAckAndReset(t *testing.T) {
	h := &observable{}
	udpBubble(t, h.funcs(), nil, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 1)
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		p.ask(register(1, 0))
		o := <-h.added
		strangers := []*udpPeer{s.device(t, "192.0.2.66:40000"), s.device(t, "192.0.2.2:40001")}
		forge := func(m heardPacket) {
			t.Helper()
			for _, q := range strangers {
				q.empty(acknowledgement, m.id)
				q.empty(reset, m.id)
				q.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "forged")))
				q.quiet(100 * time.Millisecond)
			}
			p.empty(reset, m.id+1)
			p.empty(acknowledgement, m.id+1)
		}

		r := do(c, t.Context(), get("/light"))
		m := p.read(confirmable)
		forge(m)
		if again := p.read(confirmable); again.id != m.id { // nobody has acknowledged it
			t.Fatalf("%s", again)
		}
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "on")))
		if got := <-r; got.err != nil || string(got.msg.Payload) != "on" {
			t.Fatalf("%+v", got)
		}

		tell(t, o, "1")
		m = p.read(confirmable)
		forge(m)
		if again := p.read(confirmable); again.id != m.id {
			t.Fatalf("%s", again)
		}
		p.empty(acknowledgement, m.id)
		tell(t, o, "2")
		if m = p.read(confirmable); string(m.Payload) != "2" {
			t.Fatalf("%s", m)
		}
		p.empty(acknowledgement, m.id)
		// What was acknowledged is over: a RST that comes behind it, or is sent again, is of nothing.
		p.empty(reset, m.id)
		tell(t, o, "3")
		if m = p.read(confirmable); string(m.Payload) != "3" || h.ended != 0 {
			t.Fatalf("%s, %d ended", m, h.ended)
		}
		p.empty(acknowledgement, m.id)
		if len(s.conns) != 0 {
			t.Errorf("%d sessions of strangers", len(s.conns))
		}
	})
}

// When the engine stops, answers under way still go out, and everything ends.
func TestUDPShutdown(t *testing.T) {
	h := handlerFuncs{request: func(ctx context.Context, m *Message) Response {
		t := time.NewTimer(time.Second / 2)
		defer t.Stop()
		select {
		case <-t.C:
			return Response{Code: codes.Content, Payload: []byte("done")}
		case <-ctx.Done():
			return Response{Code: codes.ServiceUnavailable}
		}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		p.send(confirmable, get("/a"))
		synctest.Wait()
		start := time.Now()
		s.stop()
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("it took %v", d)
		}
		if m, ok := p.next(time.Second); !ok || string(m.Payload) != "done" {
			t.Fatalf("%v", m)
		}
		wantReason(t, s.reason(t), ErrShutdown)
	})
}

// A handler may refuse a session; nothing of it stays.
func TestUDPRefusedByHandler(t *testing.T) {
	h := handlerFuncs{open: func(*Conn) error { return errors.New("no") }}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		p.send(confirmable, get("/a"))
		p.quiet(time.Minute)
		if n := s.count("connections_refused_total", "handler"); n != 1 {
			t.Errorf("%v refused", n)
		}
	})
}

// A broken socket ends ServeUDP with an error.
func TestUDPBrokenSocket(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := startUDP(t, handlerFuncs{}, nil)
		defer s.stop()
		err := s.srv.ServeUDP(t.Context(), brokenSocket{})
		if !errors.Is(err, os.ErrPermission) {
			t.Fatalf("%v", err)
		}
	})
}

type brokenSocket struct{ net.PacketConn }

func (brokenSocket) ReadFrom([]byte) (int, net.Addr, error) { return 0, nil, os.ErrPermission }
func (brokenSocket) LocalAddr() net.Addr                    { return nil }
func (brokenSocket) Close() error                           { return nil }

// FETCH, PATCH and iPATCH are requests like others (RFC 8132), Hop-Limit is nothing to an endpoint (RFC 8768), and this is no
// proxy (RFC 7252, Section 5.10.2).
func TestUDPMethods(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: fmt.Appendf(nil, "%d %s", m.Code, m.Payload)}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		for code := codes.GET; code <= 7; code++ {
			m := post("/a", []byte("x")).with(HopLimit, 16)
			m.Code = code
			if r := p.ask(m); string(r.Payload) != fmt.Sprintf("%d x", code) {
				t.Errorf("%v got %s", code, r)
			}
		}
		proxied := get("/a")
		proxied.Options = AddOption(proxied.Options, ProxyURI, []byte("coap://elsewhere/"))
		r := p.ask(proxied)
		wantCode(t, r.Message, codes.ProxyingNotSupported)
		if !strings.Contains(string(r.Payload), "proxy") {
			t.Errorf("%s", r)
		}
	})
}

// A device that sleeps is reached when it says something next.
func TestNext(t *testing.T) {
	waits := func(t *testing.T, ch <-chan struct{}) {
		t.Helper()
		synctest.Wait()
		select {
		case <-ch:
			t.Fatal("it did not wait")
		default:
		}
	}
	came := func(t *testing.T, ch <-chan struct{}) {
		t.Helper()
		select {
		case <-ch:
		case <-time.After(time.Minute):
			t.Fatal("it still waits")
		}
	}
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		ch := c.Next()
		waits(t, ch)
		p.raw([]byte{0x80, 0, 0, 0}) // nothing of CoAP
		waits(t, c.Next())
		p.send(nonConfirmable, get("/awake"))
		came(t, ch)
		waits(t, c.Next())
		ch = c.Next()
		p.empty(confirmable, 9)
		came(t, ch)
		ch = c.Next()
		c.Close(nil)
		came(t, ch)
		s.reason(t)
		came(t, c.Next())
	})
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		ch := c.Next()
		waits(t, ch)
		p.ask(get("/awake"))
		came(t, ch)
	})
}

// The handler hears of each message, and after how long a silence it came.
func TestHeard(t *testing.T) {
	var heard []time.Duration
	h := handlerFuncs{heard: func(silence time.Duration) { heard = append(heard, silence.Round(time.Second)) }}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		want := func(silences ...time.Duration) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(heard, silences) {
				t.Fatalf("heard after %v, want %v", heard, silences)
			}
			heard = nil
		}
		want(0, 0)
		<-time.After(time.Minute)
		p.raw([]byte{0x80, 0, 0, 0})    // nothing of CoAP
		p.empty(acknowledgement, 12345) // of nothing
		want()
		id := p.send(nonConfirmable, get("/awake"))
		p.again(nonConfirmable, id, get("/awake")) // a duplicate may be of long ago
		p.read(nonConfirmable)
		want(time.Minute)
		<-time.After(6 * time.Hour)
		p.empty(confirmable, 9)
		p.read(reset)
		want(6 * time.Hour)
		<-time.After(time.Hour)
		r := do(c, t.Context(), get("/light"))
		m := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "on")))
		<-r
		want(time.Hour) // an answer is one, too
	})
}
