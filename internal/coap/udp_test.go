package coap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

const (
	hubAddr    = "192.0.2.1:5683"
	deviceAddr = "192.0.2.2:40000"
)

// udpSim is an engine with a UDP socket on a simulated network.
type udpSim struct {
	*sim
	net *simnet.Network
}

// startUDP starts an engine on a simulated network, inside a bubble.
func startUDP(t *testing.T, h handlerFuncs, change func(*Config)) *udpSim {
	t.Helper()
	cfg := DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	s := &udpSim{
		sim: &sim{t: t, conns: make(chan *Conn, 100), closed: make(chan error, 100), logs: new(bytes.Buffer), reg: prometheus.NewRegistry()},
		net: simnet.New(1, nil),
	}
	open, closed := h.open, h.closed
	h.open = func(c *Conn) error {
		if open != nil {
			if err := open(c); err != nil {
				return err
			}
		}
		s.conns <- c
		return nil
	}
	h.closed = func(err error) {
		if closed != nil {
			closed(err)
		}
		s.closed <- err
	}
	s.srv = NewServer(cfg, h, slog.New(slog.NewTextHandler(s, nil)), NewMetrics(s.reg))
	pc, err := s.net.Listen(hubAddr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.srv.ServeUDP(ctx, pc) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeUDP: %v", err)
		}
		if s.srv.budget.left != cfg.MaxBuffered {
			t.Errorf("%d bytes of the budget never came back", cfg.MaxBuffered-s.srv.budget.left)
		}
		if s.srv.count != 0 {
			t.Errorf("%d sessions are still counted", s.srv.count)
		}
	})
	return s
}

// udpBubble runs f with an engine in a synctest bubble.
func udpBubble(t *testing.T, h handlerFuncs, change func(*Config), f func(t *testing.T, s *udpSim)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := startUDP(t, h, change)
		defer s.stop()
		f(t, s)
	})
}

// udpPeer is a device that speaks in datagrams.
type udpPeer struct {
	t    testing.TB
	conn net.PacketConn
	hub  net.Addr
	id   uint16
}

// heard is a datagram that a device received.
type heardPacket struct {
	packet
	*Message
}

func (s *udpSim) device(t *testing.T, addr string) *udpPeer {
	t.Helper()
	c, err := s.net.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return &udpPeer{t: t, conn: c, hub: simnet.Addr(hubAddr), id: 1000}
}

func (p *udpPeer) raw(b []byte) {
	p.t.Helper()
	if _, err := p.conn.WriteTo(b, p.hub); err != nil {
		p.t.Fatal(err)
	}
}

// send sends a message under the next ID and returns the ID.
func (p *udpPeer) send(typ messageType, m *Message) uint16 {
	p.t.Helper()
	p.id++
	p.raw(appendPacket(nil, typ, p.id, m))
	return p.id
}

// again sends a message under an ID that was used.
func (p *udpPeer) again(typ messageType, id uint16, m *Message) {
	p.t.Helper()
	p.raw(appendPacket(nil, typ, id, m))
}

func (p *udpPeer) empty(typ messageType, id uint16) { p.t.Helper(); p.raw(emptyPacket(typ, id)) }

// next reads a datagram within d; ok is false when none came.
func (p *udpPeer) next(d time.Duration) (heardPacket, bool) {
	p.t.Helper()
	_ = p.conn.SetReadDeadline(time.Now().Add(d))
	b := make([]byte, maxUDP)
	n, _, err := p.conn.ReadFrom(b)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return heardPacket{}, false
	}
	if err != nil {
		p.t.Fatal(err)
	}
	h, err := parsePacket(b[:n])
	if err != nil {
		p.t.Fatalf("the hub sent %x: %v", b[:n], err)
	}
	m, _, err := decodePacket(h)
	if err != nil {
		p.t.Fatalf("the hub sent %x: %v", b[:n], err)
	}
	return heardPacket{h, m}, true
}

// read reads a datagram of a type.
func (p *udpPeer) read(want messageType) heardPacket {
	p.t.Helper()
	m, ok := p.next(5 * time.Minute)
	if !ok {
		p.t.Fatal("nothing came")
	}
	if m.typ != want {
		p.t.Fatalf("got %s, want type %d", m, want)
	}
	return m
}

// quiet checks that nothing comes for a while.
func (p *udpPeer) quiet(d time.Duration) {
	p.t.Helper()
	if m, ok := p.next(d); ok {
		p.t.Fatalf("unexpected: %s", m)
	}
}

func (h heardPacket) String() string {
	return fmt.Sprintf("%s %v id %d token %x %s %q", [...]string{"CON", "NON", "ACK", "RST"}[h.typ], h.packet.code, h.id, h.Token, describe(h.Options), h.Payload)
}

// ask sends a confirmable request and reads the piggybacked answer.
func (p *udpPeer) ask(m *Message) heardPacket {
	p.t.Helper()
	id := p.send(confirmable, m)
	r := p.read(acknowledgement)
	if r.id != id || !bytes.Equal(r.Token, m.Token) {
		p.t.Fatalf("%s answers id %d token %x", r, id, m.Token)
	}
	return r
}

// begin makes a session whose address is proven, and returns the hub's side.
func (s *udpSim) begin(t *testing.T, p *udpPeer) *Conn {
	t.Helper()
	wantCode(t, p.ask(get("/hello")).Message, codes.Content)
	c := <-s.conns
	c.tr.ping()
	m := p.read(confirmable)
	if m.packet.code != codes.Empty {
		t.Fatalf("a ping looks like %s", m)
	}
	p.empty(reset, m.id)
	synctest.Wait()
	return c
}

// RFC 7252, Section 5.2.1; a duplicate gets the same bytes, and the handler is asked once.
func TestPiggybacked(t *testing.T) {
	calls := 0
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		calls++
		return Response{Code: codes.Content, Payload: fmt.Append(nil, calls)}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		first := p.ask(get("/a"))
		wantCode(t, first.Message, codes.Content)
		info := (<-s.conns).Info()
		if info.Stream || info.Secure || info.Remote.String() != deviceAddr || info.Local.String() != hubAddr {
			t.Fatalf("info %+v", info)
		}
		for range 3 {
			<-time.After(time.Minute)
			p.again(confirmable, first.id, get("/a"))
			if m := p.read(acknowledgement); m.id != first.id || !bytes.Equal(m.Payload, first.Payload) {
				t.Fatalf("a duplicate got %s", m)
			}
		}
		// Another message under an old ID: the device has rebooted and counts from the beginning.
		p.again(confirmable, first.id, get("/b"))
		if m := p.read(acknowledgement); string(m.Payload) != "2" {
			t.Fatalf("another message under the same ID got %s", m)
		}
		// After EXCHANGE_LIFETIME the same bytes are a new message.
		<-time.After(300 * time.Second)
		p.again(confirmable, first.id, get("/a"))
		if m := p.read(acknowledgement); string(m.Payload) != "3" {
			t.Fatalf("after EXCHANGE_LIFETIME: %s", m)
		}
		if n := s.count("messages_dropped_total", "duplicate"); n != 3 {
			t.Errorf("%v duplicates counted", n)
		}
	})
}

// RFC 7252, Section 5.2.2: an empty ACK after a second, then a confirmable response, sent again until it is acknowledged;
// duplicates meanwhile get the ACK only.
func TestSeparate(t *testing.T) {
	var goOn chan struct{}
	calls := 0
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if calls++; Path(m) == "/slow" {
			<-goOn
		}
		return Response{Code: codes.Content, Payload: []byte("at last")}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		goOn = make(chan struct{}) // the bubble's
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		start := time.Now()
		id := p.send(confirmable, get("/slow"))
		if m := p.read(acknowledgement); m.packet.code != codes.Empty || m.id != id {
			t.Fatalf("%s", m)
		}
		if d := time.Since(start); d < time.Second || d > 1200*time.Millisecond {
			t.Fatalf("the ACK came after %v", d)
		}
		p.again(confirmable, id, get("/slow"))
		if m := p.read(acknowledgement); m.packet.code != codes.Empty || m.id != id {
			t.Fatalf("a duplicate got %s", m)
		}
		p.quiet(time.Minute)
		goOn <- struct{}{}
		m := p.read(confirmable)
		if string(m.Payload) != "at last" || !bytes.Equal(m.Token, get("/slow").Token) || m.id == id {
			t.Fatalf("%s", m)
		}
		if again := p.read(confirmable); again.id != m.id || string(again.Payload) != "at last" {
			t.Fatalf("not acknowledged, and sent again: %s", again)
		}
		p.empty(acknowledgement, m.id)
		p.quiet(5 * time.Minute)
		if calls != 2 {
			t.Fatalf("the handler was asked %d times", calls-1)
		}

		// A duplicate within the second is told at once that we are at it.
		id = p.send(confirmable, get("/slow"))
		<-time.After(100 * time.Millisecond)
		p.again(confirmable, id, get("/slow"))
		if m, ok := p.next(100 * time.Millisecond); !ok || m.typ != acknowledgement || m.packet.code != codes.Empty {
			t.Fatalf("an early duplicate got %v", m)
		}
		goOn <- struct{}{}
		m = p.read(confirmable)
		p.empty(reset, m.id) // the device does not want it any more
		p.quiet(5 * time.Minute)
	})
}

// A request in a NON is answered in a NON; its duplicate is ignored (RFC 7252, Sections 4.5 and 5.2.3).
func TestNonConfirmable(t *testing.T) {
	calls := 0
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		calls++
		return Response{Code: codes.Content, Payload: []byte("x")}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		id := p.send(nonConfirmable, get("/a"))
		if m := p.read(nonConfirmable); string(m.Payload) != "x" || m.Token[0] != 7 {
			t.Fatalf("%s", m)
		}
		p.again(nonConfirmable, id, get("/a"))
		p.quiet(5 * time.Minute)
		bad := get("/a")
		bad.Options = AddOption(bad.Options, 65001, []byte{1}) // critical, unknown
		p.send(nonConfirmable, bad)
		p.quiet(time.Minute)
		if m := p.ask(bad); m.packet.code != codes.BadOption {
			t.Fatalf("a critical option in a CON got %s", m)
		}
		if calls != 2 {
			t.Fatalf("asked %d times", calls)
		}
	})
}

// RFC 7252, Sections 4.2, 4.3 and 3: what is wrong with a datagram never ends a session, its own or another's.
func TestUDPBadInput(t *testing.T) {
	largest := 0
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		largest = max(largest, len(m.Payload))
		return Response{Code: codes.Content}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		o := observe(c, t.Context(), "/light")
		reg := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, reg.id, &Message{Code: codes.Content, Token: reg.Token, Options: AddUint(nil, ObserveOption, 1)}))
		if r := <-o; r.err != nil || r.obs == nil {
			t.Fatal(r.err)
		}
		for _, tc := range []struct {
			name string
			b    []byte
			rst  bool
		}{
			{"empty datagram", nil, false},
			{"one byte", []byte{0x40}, false},
			{"version 2", []byte{0x80, 1, 0, 1}, false},
			{"version 0", []byte{0x00, 1, 0, 2}, false},
			{"token length 9 in a CON", []byte{0x49, 1, 0, 3, 1, 2, 3, 4, 5, 6, 7, 8, 9}, true},
			{"token length 15 in a CON", []byte{0x4f, 1, 0, 4}, true},
			{"token length 9 in a NON", []byte{0x59, 1, 0, 5, 1, 2, 3, 4, 5, 6, 7, 8, 9}, false},
			{"token cut off", []byte{0x44, 1, 0, 6, 1}, true},
			{"empty message with bytes", []byte{0x40, 0, 0, 7, 1}, true},
			{"empty message with a token", []byte{0x41, 0, 0, 8, 1}, true},
			{"empty NON", []byte{0x50, 0, 0, 9}, false},
			{"ping", []byte{0x40, 0, 0, 10}, true},
			{"reserved class 1", []byte{0x40, 0x20, 0, 11}, true},
			{"reserved class 6 in a NON", []byte{0x50, 0xc0, 0, 12}, false},
			{"signalling code", []byte{0x40, 0xe1, 0, 13}, true},
			{"marker without payload", []byte{0x40, 1, 0, 14, 0xff}, true},
			{"option over the end", []byte{0x40, 1, 0, 15, 0xb5, 'a'}, true},
			{"reserved option nibble", []byte{0x40, 1, 0, 16, 0xf1, 1, 1}, true},
			{"marker without payload in a NON", []byte{0x50, 1, 0, 17, 0xff}, false},
			{"request in an ACK", []byte{0x60, 1, 0, 18}, false},
			{"ACK of nothing", []byte{0x60, 0, 0, 19}, false},
			{"RST of nothing", []byte{0x70, 0, 0, 20}, false},
			{"RST with a code", []byte{0x70, 1, 0, 21}, false},
			{"answer to nothing in an ACK", []byte{0x61, 0x45, 0, 22, 1}, false},
			{"answer to nothing in a CON", []byte{0x41, 0x45, 0, 23, 1}, true},
			{"answer to nothing in a NON", []byte{0x51, 0x45, 0, 24, 1}, true},
		} {
			p.raw(tc.b)
			if !tc.rst {
				if m, ok := p.next(time.Second); ok {
					t.Errorf("%s got %s", tc.name, m)
				}
				continue
			}
			if m, ok := p.next(time.Second); !ok || m.typ != reset || m.id != uint16(tc.b[3]) {
				t.Errorf("%s got %v, want a RST", tc.name, m)
			}
			// From an address without a session nothing else.
			stranger := s.device(t, "192.0.2.9:9")
			stranger.raw(tc.b)
			if m := stranger.read(reset); m.id != uint16(tc.b[3]) {
				t.Errorf("%s from a stranger got %s", tc.name, m)
			}
			_ = stranger.conn.Close()
		}
		big := append([]byte{0x40, 1, 1, 1, 0xff}, make([]byte, maxUDP-5)...)
		p.raw(big)
		if m, ok := p.next(time.Second); !ok || m.packet.code != codes.Content || largest != maxUDP-5 {
			t.Errorf("the largest datagram got %v, the handler %d bytes", m, largest)
		}
		wantCode(t, p.ask(get("/still")).Message, codes.Content)
		if len(s.conns) != 0 || len(s.closed) != 0 {
			t.Fatalf("%d sessions began, %d ended", len(s.conns), len(s.closed))
		}
	})
}

// RFC 7252, Section 4.2: MAX_RETRANSMIT times, each after twice the time, the first between ACK_TIMEOUT and 1.5 times it.
func TestRetransmission(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		r := do(c, t.Context(), get("/light"))
		first := p.read(confirmable)
		last, wait := time.Now(), time.Duration(0)
		for i := range 4 {
			m := p.read(confirmable)
			d := time.Since(last)
			if last = time.Now(); m.id != first.id || !bytes.Equal(m.Token, first.Token) {
				t.Fatalf("%s is no copy of %s", m, first)
			}
			if i == 0 && (d < 2*time.Second || d > 3100*time.Millisecond) || i > 0 && (d < 2*wait-200*time.Millisecond || d > 2*wait+200*time.Millisecond) {
				t.Fatalf("copy %d after %v, the one before after %v", i+1, d, wait)
			}
			wait = d
		}
		got := <-r
		wantKind(t, got.err, hub.Deadline)
		if d := time.Since(last); d < 2*wait-200*time.Millisecond || d > 2*wait+200*time.Millisecond {
			t.Fatalf("given up after %v", d)
		}
		if n := s.count("retransmissions_total"); n != 4 {
			t.Errorf("%v retransmissions counted", n)
		}
		if len(s.closed) != 0 {
			t.Fatal("the session ended")
		}

		// PROBING_RATE: five datagrams have gone out, so the next one waits for as many seconds as they had bytes.
		began := last.Add(-15 * wait / 8)
		ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
		defer cancel()
		r = do(c, ctx, get("/light"))
		m := p.read(confirmable)
		if d, want := time.Since(began), time.Duration(5*(4+len(first.body)))*time.Second; d < want-time.Second || d > want+3*time.Second {
			t.Fatalf("probed after %v, want %v", d, want)
		}
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "on")))
		if got := <-r; got.err != nil || string(got.msg.Payload) != "on" {
			t.Fatalf("%+v", got)
		}
	})
}

// A sign of life ends the silence: what waits because of it goes out at once.
func TestProbingEnds(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		long := get("/" + strings.Repeat("x", 200)) // what the silence costs is counted in bytes
		r := do(c, t.Context(), long)
		for range 5 {
			p.read(confirmable)
		}
		wantKind(t, (<-r).err, hub.Deadline)
		r = do(c, t.Context(), long)
		p.quiet(10 * time.Second)
		id := p.send(confirmable, get("/awake"))
		for range 2 { // the command may overtake the answer
			switch m, _ := p.next(time.Second); m.typ {
			case confirmable:
				p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "on")))
			case acknowledgement:
				if m.id != id {
					t.Fatalf("%s", m)
				}
			}
		}
		if got := <-r; got.err != nil || string(got.msg.Payload) != "on" {
			t.Fatalf("%+v", got)
		}
	})
}

// A request of ours and all ways to answer it.
func TestDoUDP(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		want := func(r <-chan result, payload string) {
			t.Helper()
			if got := <-r; got.err != nil || string(got.msg.Payload) != payload {
				t.Fatalf("%+v", got)
			}
		}

		r := do(c, t.Context(), get("/a")) // piggybacked
		m := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "a")))
		want(r, "a")

		r = do(c, t.Context(), get("/b")) // ACK, much later a separate response, which is acknowledged, also again
		m = p.read(confirmable)
		p.empty(acknowledgement, m.id)
		p.quiet(10 * time.Minute)
		id := p.send(confirmable, reply(m.Message, codes.Content, "b"))
		if a := p.read(acknowledgement); a.id != id || a.packet.code != codes.Empty {
			t.Fatalf("%s", a)
		}
		p.again(confirmable, id, reply(m.Message, codes.Content, "b"))
		if a := p.read(acknowledgement); a.id != id {
			t.Fatalf("%s", a)
		}
		want(r, "b")

		r = do(c, t.Context(), get("/c")) // the ACK was lost: the response is one, too
		m = p.read(confirmable)
		p.send(nonConfirmable, reply(m.Message, codes.Content, "c"))
		want(r, "c")
		p.quiet(5 * time.Minute)

		r = do(c, t.Context(), get("/d")) // reset
		m = p.read(confirmable)
		p.empty(reset, m.id)
		wantKind(t, (<-r).err, hub.Unavailable)

		r = do(c, t.Context(), get("/e")) // forged: another ID, another token, a code in a RST
		m = p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id+1, reply(m.Message, codes.Content, "forged")))
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(get("/x"), codes.Content, "forged")))
		p.empty(reset, m.id+1)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.POST, "forged"))) // a request in an ACK
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, 3<<5|1, "forged")))     // a reserved class
		p.raw(append(emptyPacket(acknowledgement, m.id), 1))                                    // and an empty message that is not empty
		p.raw(appendPacket(nil, reset, m.id, reply(m.Message, codes.Content, "forged")))
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "e")))
		want(r, "e")

		ctx, cancel := context.WithCancel(t.Context()) // nobody waits any more: no more copies
		r = do(c, ctx, get("/f"))
		m = p.read(confirmable)
		cancel()
		wantKind(t, (<-r).err, hub.Unavailable)
		p.quiet(5 * time.Minute)
		p.send(confirmable, reply(m.Message, codes.Content, "late"))
		p.read(reset)

		r = do(c, t.Context(), get("/g")) // a critical option: rejected (RFC 7252, Section 5.4.1)
		m = p.read(confirmable)
		bad := reply(m.Message, codes.Content, "g")
		bad.Options = AddOption(nil, 65001, nil)
		p.send(confirmable, bad)
		p.read(reset)
		wantKind(t, (<-r).err, hub.BadOption)
	})
}

// NSTART is 1: a second request waits for the first one's answer, a second message for the ACK.
func TestUDPOneOutstanding(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		a, b := do(c, t.Context(), get("/a")), (<-chan result)(nil)
		first := p.read(confirmable)
		b = do(c, t.Context(), get("/b"))
		p.empty(acknowledgement, first.id)
		p.quiet(time.Minute)
		p.send(nonConfirmable, reply(first.Message, codes.Content, "a"))
		second := p.read(confirmable)
		c.tr.ping()
		p.quiet(100 * time.Millisecond)
		p.raw(appendPacket(nil, acknowledgement, second.id, reply(second.Message, codes.Content, "b")))
		if ra, rb := <-a, <-b; string(ra.msg.Payload) != "a" || string(rb.msg.Payload) != "b" {
			t.Fatalf("%v %v", ra, rb)
		}
		if m := p.read(confirmable); m.packet.code != codes.Empty {
			t.Fatalf("%s", m)
		}
	})
}

// RFC 7252, Section 4.7: a peer that answers gets more than one request at a time, until something is lost.
func TestUDPProven(t *testing.T) {
	udpBubble(t, handlerFuncs{}, func(c *Config) { c.MaxProven = 3 }, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		// atOnce has ten requests answered and returns how many of them were under way at most.
		atOnce := func(separate bool) int {
			t.Helper()
			const all = 10
			var results []<-chan result
			for i := range all {
				results = append(results, do(c, t.Context(), get(fmt.Sprintf("/%d", i))))
				synctest.Wait() // in order
			}
			most := 0
			for answered := 0; answered < all; {
				var open []heardPacket
				for m, ok := p.next(time.Millisecond); ok; m, ok = p.next(time.Millisecond) {
					open = append(open, m)
				}
				most = max(most, len(open))
				for _, m := range open {
					if separate {
						p.empty(acknowledgement, m.id)
						p.send(nonConfirmable, reply(m.Message, codes.Content, Path(m.Message)))
					} else {
						p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, Path(m.Message))))
					}
					answered++
				}
				synctest.Wait()
			}
			for i, r := range results {
				if got := <-r; got.err != nil || string(got.msg.Payload) != fmt.Sprintf("/%d", i) {
					t.Fatalf("%d got %+v", i, got)
				}
			}
			return most
		}
		if n := atOnce(false); n != 2 { // the fifth
			t.Errorf("%d at once", n)
		}
		if n := atOnce(true); n != 3 { // four times two later
			t.Errorf("%d at once", n)
		}
		if n := atOnce(false); n != 3 {
			t.Errorf("%d at once", n)
		}
		// That is the bound of what is on the network. What the peer works at is another matter, and shown by its answers.
		if n := c.Window(); n != 1 {
			t.Errorf("a peer that answered everything in order takes %d", n)
		}
		var both []<-chan result
		var asked []heardPacket
		for range 2 {
			both = append(both, do(c, t.Context(), get("/beside")))
			asked = append(asked, p.read(confirmable))
		}
		for _, m := range []heardPacket{asked[1], asked[0]} {
			p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "")))
			synctest.Wait()
		}
		<-both[0]
		<-both[1]
		if n := c.Window(); n != 3 {
			t.Errorf("a peer that answered one beside another takes %d", n)
		}
		// One is lost.
		r := do(c, t.Context(), get("/lost"))
		p.read(confirmable)
		m := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "")))
		<-r
		if atOnce(false); c.Window() != 1 {
			t.Errorf("after a loss it takes %d", c.Window())
		}
		r = do(c, t.Context(), get("/lost"))
		p.read(confirmable)
		m = p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "")))
		<-r
		a, b := do(c, t.Context(), get("/a")), (<-chan result)(nil)
		m = p.read(confirmable)
		b = do(c, t.Context(), get("/b"))
		ctx, cancel := context.WithCancel(t.Context())
		gaveUp := do(c, ctx, get("/never"))
		synctest.Wait()
		cancel()
		wantKind(t, (<-gaveUp).err, hub.Unavailable)
		p.quiet(100 * time.Millisecond)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "a")))
		<-a
		m = p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "b")))
		if got := <-b; got.err != nil || string(got.msg.Payload) != "b" {
			t.Fatalf("%+v", got)
		}
		p.quiet(time.Minute)
	})
}

// An address that has not answered gets no more than three times what it sent; a longer answer waits until it has answered
// an empty CON.
func TestAmplification(t *testing.T) {
	body := pattern(500)
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: body}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		for i, typ := range []messageType{confirmable, nonConfirmable} {
			p := s.device(t, fmt.Sprintf("192.0.2.2:%d", 40000+i))
			req := get("/big")
			id := p.send(typ, req)
			ping := p.read(confirmable)
			if ping.packet.code != codes.Empty {
				t.Fatalf("%s before the address is proven", ping)
			}
			if typ == confirmable {
				p.again(confirmable, id, req)
			}
			p.quiet(time.Second)
			p.empty(reset, ping.id)
			m, ok := p.next(time.Second)
			if !ok || !bytes.Equal(m.Payload, body) || typ == confirmable && m.id != id {
				t.Fatalf("%v after the proof", m)
			}
			p.send(typ, req) // from now on at once
			if m, ok := p.next(time.Second); !ok || !bytes.Equal(m.Payload, body) {
				t.Fatalf("%v", m)
			}
			p.quiet(5 * time.Minute)
		}

		// Neither many requests that were not answered nor a request of ours change that.
		p := s.device(t, "192.0.2.4:4")
		for range 50 {
			p.send(nonConfirmable, post("/a", nil).with(NoResponse, 2))
		}
		p.send(nonConfirmable, get("/big"))
		if m := p.read(confirmable); m.packet.code != codes.Empty {
			t.Fatalf("%s before the address is proven", m)
		}
		q := s.device(t, "192.0.2.5:5")
		q.send(nonConfirmable, post("/a", nil).with(NoResponse, 2))
		synctest.Wait()
		var c *Conn
		for len(s.conns) > 0 {
			c = <-s.conns
		}
		r := do(c, t.Context(), post("/light", pattern(100)))
		ping := q.read(confirmable)
		if ping.packet.code != codes.Empty {
			t.Fatalf("%s before the address is proven", ping)
		}
		q.empty(reset, ping.id)
		m := q.read(confirmable)
		q.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Changed, "")))
		if got := <-r; got.err != nil {
			t.Fatal(got.err)
		}

		// Repetitions count: what is as short as a ping gets no more than three of them.
		p = s.device(t, "192.0.2.6:6")
		p.raw(appendPacket(nil, confirmable, 1, &Message{Code: codes.GET}))
		got := 0
		for m, ok := p.next(10 * time.Minute); ok; m, ok = p.next(10 * time.Minute) {
			got += baseHeader + len(m.body)
		}
		if got == 0 || got > 3*baseHeader {
			t.Fatalf("%d bytes for %d", got, baseHeader)
		}

		// A forged address never answers: what it gets is pings, and it is forgotten soon.
		p = s.device(t, "192.0.2.3:3")
		sent := 0
		got = 0
		for range 10 {
			req := appendPacket(nil, confirmable, uint16(sent), get("/big")) //nolint:gosec // small
			p.raw(req)
			sent += len(req)
		}
		for {
			m, ok := p.next(10 * time.Minute)
			if !ok {
				break
			}
			if got += baseHeader + len(m.body); m.packet.code != codes.Empty {
				t.Fatalf("%s to an address that is not proven", m)
			}
		}
		if got > 3*sent {
			t.Fatalf("%d bytes for %d", got, sent)
		}
		wantReason(t, s.reason(t), ErrSilent)
	})
}

// An engine that handles nothing does not acknowledge: the message comes again when there is room.
func TestUDPOverload(t *testing.T) {
	var goOn chan struct{}
	var got []string
	h := handlerFuncs{
		request: func(_ context.Context, m *Message) Response {
			if Path(m) == "/slow" {
				<-goOn
			}
			return Response{Code: codes.Content}
		},
		notifications: func(_ context.Context, ns []Notification) {
			for _, n := range ns {
				got = append(got, string(n.Message.Payload))
			}
		},
	}
	udpBubble(t, h, func(c *Config) { c.QueueLength = 2 }, func(t *testing.T, s *udpSim) {
		goOn = make(chan struct{}) // the bubble's
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		tok := p.observed(c, "/light", 1)
		slow := p.send(confirmable, get("/slow"))
		first := p.notify(confirmable, tok, 2, "2")
		second := p.notify(confirmable, tok, 3, "3") // no room
		req := p.send(confirmable, get("/full"))     // likewise
		if m := p.read(acknowledgement); m.id != slow || m.packet.code != codes.Empty {
			t.Fatalf("%s", m)
		}
		p.quiet(time.Minute)
		p.again(confirmable, first, p.notification(tok, 2, "2")) // not handled yet: nothing to say
		p.quiet(time.Minute)
		goOn <- struct{}{}
		for range 2 { // the first notification is acknowledged now that it is handled
			switch m, _ := p.next(time.Second); {
			case m.typ == confirmable:
				p.empty(acknowledgement, m.id)
			case m.typ != acknowledgement || m.id != first:
				t.Fatalf("%s", m)
			}
		}
		p.again(confirmable, second, p.notification(tok, 3, "3"))
		if m := p.read(acknowledgement); m.id != second {
			t.Fatalf("%s", m)
		}
		p.again(confirmable, req, get("/full"))
		if m := p.read(acknowledgement); m.id != req {
			t.Fatalf("%s", m)
		}
		if fmt.Sprint(got) != "[2 3]" {
			t.Fatalf("handled %v", got)
		}
		if n := s.count("messages_dropped_total", "overload"); n != 2 {
			t.Errorf("%v dropped", n)
		}
	})
}

// observed answers the engine's registration for a path and returns the token.
func (p *udpPeer) observed(c *Conn, path string, number uint32) []byte {
	p.t.Helper()
	r := observe(c, context.Background(), path)
	m := p.read(confirmable)
	p.raw(appendPacket(nil, acknowledgement, m.id, p.notification(m.Token, number, "first")))
	if got := <-r; got.err != nil || got.obs == nil {
		p.t.Fatalf("%+v", got)
	}
	return m.Token
}

func (p *udpPeer) notification(tok []byte, number uint32, payload string) *Message {
	return &Message{Code: codes.Content, Token: tok, Options: AddUint(nil, ObserveOption, number), Payload: []byte(payload)}
}

func (p *udpPeer) notify(typ messageType, tok []byte, number uint32, payload string) uint16 {
	p.t.Helper()
	return p.send(typ, p.notification(tok, number, payload))
}

// RFC 7641, Section 3.4: no notification older than the newest known, for 128 s.
func TestUDPObserve(t *testing.T) {
	var got []string
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			got = append(got, string(n.Message.Payload))
			if n.Ended {
				got = append(got, "end")
			}
		}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		tok := p.observed(c, "/light", 5)
		want := func(values ...string) {
			t.Helper()
			synctest.Wait()
			if fmt.Sprint(got) != fmt.Sprint(values) {
				t.Fatalf("handled %v, want %v", got, values)
			}
			got = nil
		}
		p.notify(nonConfirmable, tok, 7, "7")
		p.notify(nonConfirmable, tok, 6, "6") // overtaken
		p.notify(nonConfirmable, tok, 7, "7") // the same again
		want("7")
		id := p.notify(confirmable, tok, 3, "3") // old, and acknowledged all the same
		if m := p.read(acknowledgement); m.id != id {
			t.Fatalf("%s", m)
		}
		want()
		id = p.notify(confirmable, tok, 8, "8")
		if m := p.read(acknowledgement); m.id != id {
			t.Fatalf("%s", m)
		}
		p.again(confirmable, id, p.notification(tok, 8, "8"))
		if m := p.read(acknowledgement); m.id != id {
			t.Fatalf("%s", m)
		}
		want("8")
		p.notify(nonConfirmable, tok, 1<<23+10, "far") // more than half way round is behind
		want()
		p.notify(nonConfirmable, tok, 1<<23+7, "near")
		p.notify(nonConfirmable, tok, 1<<24-1, "last")
		p.notify(nonConfirmable, tok, 0, "round")
		want("near", "last", "round")
		p.notify(nonConfirmable, tok, 1000, "1000")
		<-time.After(127 * time.Second)
		p.notify(nonConfirmable, tok, 1, "old")
		<-time.After(2 * time.Second)
		p.notify(nonConfirmable, tok, 1, "rebooted") // RFC 7641, Section 3.4: after 128 s any number is newer
		want("1000", "rebooted")
		p.send(confirmable, &Message{Code: codes.NotFound, Token: tok, Payload: []byte("gone")})
		p.read(acknowledgement)
		want("gone", "end")
		id = p.notify(nonConfirmable, tok, 2, "x") // nobody waits any more (RFC 7641, Section 3.6)
		if m := p.read(reset); m.id != id {
			t.Fatalf("%s", m)
		}
		want()
	})
}

// A notification may overtake the answer to the registration.
func TestUDPObserveOvertaken(t *testing.T) {
	var got []string
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			got = append(got, string(n.Message.Payload))
		}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		r := observe(c, t.Context(), "/light")
		m := p.read(confirmable)
		p.notify(nonConfirmable, m.Token, 6, "newer")
		res := <-r
		if res.err != nil || res.obs == nil || string(res.msg.Payload) != "newer" {
			t.Fatalf("%+v", res)
		}
		p.raw(appendPacket(nil, acknowledgement, m.id, p.notification(m.Token, 5, "older")))
		synctest.Wait()
		if len(got) != 0 {
			t.Fatalf("handled %v", got)
		}

		done := start(func() result { return result{err: res.obs.Cancel(t.Context())} })
		cancel := p.read(confirmable)
		if v, ok := cancel.Uint(ObserveOption); !ok || v != 1 || !bytes.Equal(cancel.Token, m.Token) {
			t.Fatalf("cancelled by %s", cancel)
		}
		id := p.notify(confirmable, m.Token, 7, "crossing")
		if a := p.read(reset); a.id != id {
			t.Fatalf("%s", a)
		}
		p.raw(appendPacket(nil, acknowledgement, cancel.id, reply(cancel.Message, codes.Content, "last")))
		if res := <-done; res.err != nil {
			t.Fatal(res.err)
		}
	})
}

// RFC 7641, Sections 3.3.1 and 3.3.2: the registration is renewed with its token and the newest ETag; what is answered is a
// notification, and newer than all before.
func TestUDPRefresh(t *testing.T) {
	var got []string
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			got = append(got, fmt.Sprintf("%d.%02d %s", n.Message.Code>>5, n.Message.Code&31, n.Message.Payload))
			if n.Ended {
				got = append(got, "end")
			}
		}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		want := func(values ...string) {
			t.Helper()
			synctest.Wait()
			if !slices.Equal(got, values) {
				t.Fatalf("handled %q, want %q", got, values)
			}
			got = nil
		}
		registration := get("/light").with(URIQuery, 7)
		r := start(func() result {
			o, m, err := c.Observe(t.Context(), registration)
			return result{msg: m, obs: o, err: err}
		})
		first := p.read(confirmable)
		state := func(number, age uint32, etag byte, payload string) *Message {
			m := p.notification(first.Token, number, payload)
			m.Options = AddOption(AddUint(m.Options, MaxAge, age), ETagOption, []byte{etag})
			return m
		}
		p.raw(appendPacket(nil, acknowledgement, first.id, state(100, 30, 1, "1")))
		o := (<-r).obs
		stale := func(d time.Duration) {
			t.Helper()
			if got := time.Until(o.Stale()).Round(time.Second); got != d {
				t.Errorf("stale in %v, want %v", got, d)
			}
		}
		stale(30 * time.Second)
		p.notify(nonConfirmable, first.Token, 101, "no age, no ETag")
		want("2.05 no age, no ETag")
		stale(time.Minute)
		refresh := func(etag []byte) (heardPacket, <-chan result) {
			t.Helper()
			r := start(func() result { return result{err: o.Refresh(t.Context())} })
			m := p.read(confirmable)
			v, ok := m.Uint(ObserveOption)
			q, _ := m.Option(URIQuery)
			if !ok || v != 0 || !bytes.Equal(m.Token, first.Token) || Path(m.Message) != "/light" || !bytes.Equal(q, []byte{7}) ||
				!bytes.Equal(ETag(m.Message), etag) || len(m.Options) != len(first.Options)+len(etag) {
				t.Fatalf("%s, want ETag %x", m, etag)
			}
			return m, r
		}
		m, r := refresh(nil)
		p.raw(appendPacket(nil, acknowledgement, m.id, state(7, 90, 2, "2"))) // the device has rebooted, so its numbers began again
		if res := <-r; res.err != nil {
			t.Fatal(res.err)
		}
		want("2.05 2")
		stale(90 * time.Second)
		p.notify(nonConfirmable, first.Token, 101, "of before")
		want("2.05 of before") // which, by the numbers, is newer
		p.send(nonConfirmable, state(102, 60, 2, "2"))
		want("2.05 2")

		valid := func(number uint32, etag byte) *Message {
			m := state(number, 80, etag, "")
			m.Code = codes.Valid
			return m
		}
		m, r = refresh([]byte{2})
		p.raw(appendPacket(nil, acknowledgement, m.id, valid(103, 2)))
		<-r
		want("2.03 ")
		stale(80 * time.Second)
		// From now on a 2.03 may be a notification; one of what we do not have any more is worth nothing.
		p.send(nonConfirmable, state(104, 60, 3, "3"))
		p.send(nonConfirmable, valid(105, 2))
		want("2.05 3", "5.04 ")

		// Not answered: the observation goes on.
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		r = start(func() result { return result{err: o.Refresh(ctx)} })
		wantKind(t, (<-r).err, hub.Deadline)
		cancel()
		for _, ok := p.next(time.Second); ok; _, ok = p.next(time.Second) {
		}
		p.send(nonConfirmable, state(106, 60, 3, "3"))
		want("2.05 3")

		// A separate answer; then one that ends it.
		m, r = refresh([]byte{3})
		p.empty(acknowledgement, m.id)
		p.send(confirmable, state(107, 60, 4, "4"))
		p.read(acknowledgement)
		<-r
		want("2.05 4")
		// The device has rebooted and answers separately: what is older by its number could as well be a notification that was
		// overtaken on its way, so all we know is that we do not know.
		m, r = refresh([]byte{4})
		p.empty(acknowledgement, m.id)
		p.send(confirmable, state(3, 60, 5, "5"))
		p.read(acknowledgement)
		if res := <-r; res.err != nil {
			t.Fatal(res.err)
		}
		want("5.04 ")
		p.notify(nonConfirmable, first.Token, 2, "of before")
		want()
		p.send(nonConfirmable, state(108, 60, 5, "5"))
		want("2.05 5")

		// An old notification that comes late is no answer: the request, which was lost, is sent again.
		m, r = refresh([]byte{5})
		p.notify(nonConfirmable, first.Token, 2, "of before")
		if again := p.read(confirmable); again.id != m.id {
			t.Fatalf("%s, want %s once more", again, m)
		}
		// Its answer comes before the ACK, which says that the request had arrived.
		p.send(confirmable, state(1, 60, 6, "6"))
		p.read(acknowledgement)
		want()
		p.empty(acknowledgement, m.id)
		if res := <-r; res.err != nil {
			t.Fatal(res.err)
		}
		want("5.04 ")

		// A peer that wants to know first that we are who asks (RFC 9175) has not ended anything by that.
		challenge := func(id uint16) {
			t.Helper()
			p.raw(appendPacket(nil, acknowledgement, id, &Message{Code: codes.Unauthorized, Token: first.Token, Options: AddOption(nil, EchoOption, []byte("12345678"))}))
		}
		m, r = refresh([]byte{5})
		challenge(m.id)
		m = p.read(confirmable)
		if v, _ := m.Option(EchoOption); string(v) != "12345678" {
			t.Fatalf("asked again with %s", m)
		}
		p.raw(appendPacket(nil, acknowledgement, m.id, state(109, 60, 6, "6")))
		<-r
		want("2.05 6")

		m, r = refresh([]byte{6})
		p.raw(appendPacket(nil, acknowledgement, m.id, &Message{Code: codes.NotFound, Token: m.Token}))
		<-r
		want("4.04 ", "end")
		if err := o.Refresh(t.Context()); err != nil { // it is over
			t.Fatal(err)
		}
		p.quiet(time.Minute)
	})
}

// A handler that closes the session because nothing could be stored leaves the notification unacknowledged.
func TestUDPNotStored(t *testing.T) {
	var c *Conn
	h := handlerFuncs{notifications: func(context.Context, []Notification) { c.Close(nil) }}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c = s.begin(t, p)
		tok := p.observed(c, "/light", 5)
		id := p.notify(confirmable, tok, 6, "6")
		wantReason(t, s.reason(t), ErrClosed)
		p.quiet(time.Second)
		p.again(confirmable, id, p.notification(tok, 6, "6")) // and then the device learns that nobody is there
		if m := p.read(reset); m.id != id {
			t.Fatalf("%s", m)
		}
	})
}

// RFC 7967, Section 2: no response, but the ACK that ends the retransmissions.
func TestUDPNoResponse(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		id := p.send(confirmable, post("/a", nil).with(NoResponse, 2))
		if m, ok := p.next(100 * time.Millisecond); !ok || m.typ != acknowledgement || m.id != id || m.packet.code != codes.Empty {
			t.Fatalf("%v", m)
		}
		p.send(nonConfirmable, post("/a", nil).with(NoResponse, 2))
		p.quiet(time.Minute)
	})
}

// An answer that ends the session is repeated to duplicates for a while, and a new session may begin at once.
func TestUDPLinger(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Unauthorized, Payload: []byte("no"), Close: Path(m) == "/bad"}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		m := p.ask(get("/bad"))
		wantCode(t, m.Message, codes.Unauthorized)
		wantReason(t, s.reason(t), ErrAnswered)
		p.again(confirmable, m.id, get("/bad"))
		if again := p.read(acknowledgement); again.packet.code != codes.Unauthorized || again.id != m.id {
			t.Fatalf("%s", again)
		}
		if n := len(s.conns); n != 1 {
			t.Fatalf("%d sessions", n)
		}
		<-time.After(20 * time.Second)
		p.again(confirmable, m.id, get("/bad")) // a new session: nothing is known of it
		wantCode(t, p.read(acknowledgement).Message, codes.Unauthorized)
		wantReason(t, s.reason(t), ErrAnswered)
		wantCode(t, p.ask(get("/other")).Message, codes.Unauthorized)
		if n := len(s.conns); n != 3 {
			t.Fatalf("%d sessions", n)
		}
	})
}

// What comes behind an answer that ends the session is neither carried out nor acknowledged: its retransmission begins another
// session.
func TestUDPUnansweredAtTheEnd(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Silent: Path(m) == "/late"}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		id := p.send(confirmable, get("/late"))
		p.quiet(5 * time.Second)
		p.again(confirmable, id, get("/late")) // asked again, and again without an answer
		p.quiet(5 * time.Second)
		c.Close(ErrAnswered)
		wantReason(t, s.reason(t), ErrAnswered)
		p.again(confirmable, id, get("/late"))
		<-s.conns // another session
		p.quiet(5 * time.Second)
	})
}

// Neither does one that waited behind another when the session ended: it comes again, and another session answers it.
func TestUDPUnhandledAtTheEnd(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/slow" {
			<-time.After(500 * time.Millisecond)
		}
		return Response{Code: codes.Content}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		p.send(confirmable, get("/slow"))
		id := p.send(confirmable, get("/behind"))
		synctest.Wait()
		c.Close(ErrAnswered)
		wantReason(t, s.reason(t), ErrAnswered)
		p.read(acknowledgement) // of the first
		p.quiet(2 * time.Second)
		p.again(confirmable, id, get("/behind"))
		<-s.conns
		if a := p.read(acknowledgement); a.id != id || a.Code != codes.Content {
			t.Fatalf("%s", a)
		}
	})
}

// Sessions end by silence: soon when the address was never proven, else after MaxSilence; an idle one costs no timer turns
// of its own.
func TestUDPSilence(t *testing.T) {
	t.Parallel()
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		start := time.Now()
		s.begin(t, p)
		q := s.device(t, "192.0.2.3:3")
		q.ask(get("/a"))
		wantReason(t, s.reason(t), ErrSilent)
		if d := time.Since(start); d < 240*time.Second || d > 300*time.Second {
			t.Fatalf("not proven, ended after %v", d)
		}
		for time.Since(start) < 20*time.Hour {
			<-time.After(time.Hour)
		}
		p.ask(get("/here"))
		heard := time.Now()
		<-time.After(24 * time.Hour)
		if len(s.closed) != 0 {
			t.Fatal("ended early")
		}
		select {
		case err := <-s.closed:
			wantReason(t, err, ErrSilent)
		case <-time.After(2 * time.Hour):
			t.Fatal("never ended")
		}
		if d := time.Since(heard); d < 25*time.Hour || d > 25*time.Hour+time.Minute {
			t.Fatalf("ended after %v", d)
		}
	})
}

// MaxConnections holds; a session whose address is not proven gives way to the next one that tries twice.
func TestUDPMaxConnections(t *testing.T) {
	udpBubble(t, handlerFuncs{}, func(c *Config) { c.MaxConnections = 3 }, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		for i := range 2 {
			s.device(t, fmt.Sprintf("192.0.2.3:%d", 1+i)).ask(get("/a"))
		}
		q := s.device(t, "192.0.2.4:4")
		id := q.send(confirmable, get("/a"))
		q.quiet(time.Second)
		wantReason(t, s.reason(t), ErrEvicted)
		q.again(confirmable, id, get("/a"))
		q.read(acknowledgement)
		wantCode(t, p.ask(get("/a")).Message, codes.Content)
		if n := s.count("connections_refused_total", "max-connections"); n != 1 {
			t.Errorf("%v refused", n)
		}
	})
}

// A session that anybody may have forged gives way to a peer that has an address of its own; one of those gives way to nobody.
func TestForgedSessionsGiveWay(t *testing.T) {
	addr, srv := listenUDP(t, handlerFuncs{}, "127.0.0.1:0", func(c *Config) { c.MaxConnections = 1 })
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- srv.ServeTCP(ctx, ln, nil) }()
	defer func() { cancel(); <-done }()

	forged, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer forged.Close()
	if _, err := forged.Write(appendPacket(nil, nonConfirmable, 7, get("/a"))); err != nil {
		t.Fatal(err)
	}
	_ = forged.SetReadDeadline(time.Now().Add(20 * time.Second))
	if _, err := forged.Read(make([]byte, 100)); err != nil { // before its answer it may not have become one that gives way
		t.Fatal(err)
	}
	for _, taken := range []bool{true, false} {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := c.Read(make([]byte, 1)); (err == nil) != taken {
			t.Errorf("a connection over TCP: %v, want to be taken %t", err, taken)
		}
	}
}

// The memory for duplicates is bounded, in number and in bytes.
func TestDuplicateBounds(t *testing.T) {
	body := pattern(900)
	for _, most := range []struct{ number, bytes int }{{5, 1 << 20}, {1000, 8 << 10}} {
		calls := make(map[string]int)
		h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
			calls[Path(m)]++
			return Response{Code: codes.Content, Payload: body}
		}}
		udpBubble(t, h, func(c *Config) { c.MaxDuplicates, c.DuplicateBytes = most.number, most.bytes }, func(t *testing.T, s *udpSim) {
			p := s.device(t, deviceAddr)
			s.begin2(t, p)
			c := <-s.conns
			for i := range 50 {
				p.ask(get(fmt.Sprintf("/%d", i)))
			}
			rx := &c.dg.rx
			if len(rx.order) > most.number || len(rx.byID) > most.number || rx.size > most.bytes || len(rx.order) < 5 {
				t.Fatalf("%d messages, %d bytes are kept", len(rx.order), rx.size)
			}
			p.again(confirmable, p.id, get("/49"))
			p.read(acknowledgement)
			p.again(confirmable, p.id-20, get("/29")) // forgotten: handled again
			p.read(acknowledgement)
			if calls["/49"] != 1 || calls["/29"] != 2 {
				t.Fatalf("calls %v", calls)
			}
			<-time.After(5 * time.Minute)
			c.dg.mu.Lock()
			defer c.dg.mu.Unlock()
			if rx.order != nil || rx.byID != nil || rx.size != 0 {
				t.Fatalf("an idle session keeps %d messages, %d bytes", len(rx.order), rx.size)
			}
		})
	}
}

// What the common budget has no room for is not kept for duplicates, which then get nothing and are still no new requests.
func TestDuplicatesArePaid(t *testing.T) {
	calls := 0
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		calls++
		return Response{Code: codes.Content, Payload: pattern(900)}
	}}
	udpBubble(t, h, func(c *Config) { c.MaxBuffered = 1500 }, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin2(t, p)
		c := <-s.conns
		for i := range 20 {
			p.ask(get(fmt.Sprintf("/%d", i)))
		}
		synctest.Wait()
		c.dg.mu.Lock()
		kept, paid := 0, 0
		for _, r := range c.dg.rx.order {
			kept += len(r.reply)
			paid += r.taken
		}
		c.dg.mu.Unlock()
		if kept != paid || paid == 0 {
			t.Errorf("%d bytes are kept, and %d paid for", kept, paid)
		}
		p.again(confirmable, p.id, get("/19"))
		p.quiet(time.Minute)
		if calls != 21 {
			t.Errorf("%d calls", calls)
		}
	})
}

// begin2 proves the address of a peer whose first answer is large.
func (s *udpSim) begin2(t *testing.T, p *udpPeer) {
	t.Helper()
	p.send(confirmable, get("/first"))
	m := p.read(confirmable)
	p.empty(reset, m.id)
	wantCode(t, p.read(acknowledgement).Message, codes.Content)
}
