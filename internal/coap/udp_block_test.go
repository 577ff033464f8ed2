package coap

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

func withBlock(m *Message, id int, b block) *Message {
	c := *m
	c.Options = AddOption(append(c.Options[:0:0], c.Options...), Block2, b.value())
	if id == 1 {
		c.Options = AddOption(append(m.Options[:0:0], m.Options...), Block1, b.value())
	}
	return &c
}

// RFC 7959, Section 2.4: a body goes in blocks that fit a datagram, each asked for by a token of its own, repeated ones and
// ones out of order alike, in the size that was asked for.
func TestUDPBlock2(t *testing.T) {
	body := pattern(5000)
	calls := 0
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		calls++
		return Response{Code: codes.Content, Payload: body}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin2(t, p)
		token := byte(10)
		fetch := func(num uint32, szx uint8) heardPacket {
			t.Helper()
			m := withBlock(get("/large"), 2, block{num: num, szx: szx})
			token++
			m.Token = []byte{token}
			return p.ask(m)
		}
		first := p.ask(get("/large"))
		b, ok, _ := blockOf(first.Message, Block2)
		if !ok || b != (block{more: true, szx: 6}) || len(ETag(first.Message)) == 0 || baseHeader+len(first.body) > 1152 {
			t.Fatalf("%s", first)
		}
		if size, ok := first.Uint(Size2); !ok || size != 5000 {
			t.Fatalf("Size2 %d", size)
		}
		got := append([]byte(nil), first.Payload...)
		fetch(3, 6)
		fetch(1, 6)
		for num := uint32(1); num < 5; num++ {
			m := fetch(num, 6)
			if b, _, _ := blockOf(m.Message, Block2); b.num != num || b.more != (num < 4) || !bytes.Equal(ETag(m.Message), ETag(first.Message)) {
				t.Fatalf("block %d: %s", num, m)
			}
			got = append(got, m.Payload...)
		}
		if !bytes.Equal(got, body) || calls != 2 {
			t.Fatalf("%d bytes by %d calls", len(got), calls)
		}
		// Early negotiation (RFC 7959, Section 2.4): the size asked for.
		got = nil
		for num := uint32(0); ; num++ {
			m := fetch(num, 2)
			b, _, _ := blockOf(m.Message, Block2)
			if b.szx != 2 || b.num != num || len(m.Payload) > 64 {
				t.Fatalf("%s", m)
			}
			got = append(got, m.Payload...)
			if !b.more {
				break
			}
		}
		if !bytes.Equal(got, body) || calls != 3 {
			t.Fatalf("%d bytes by %d calls", len(got), calls)
		}
		wantCode(t, fetch(0, 7).Message, codes.BadRequest) // reserved; BERT is for streams
		wantCode(t, fetch(77, 6).Message, codes.BadRequest)
	})
}

// RFC 7959, Section 2.5, and its errors.
func TestUDPBlock1(t *testing.T) {
	body := pattern(3000)
	var got *Message
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if got = m; m.Code == codes.GET {
			return Response{Code: codes.Content}
		}
		return Response{Code: codes.Changed}
	}}
	udpBubble(t, h, func(c *Config) { c.MaxBody = 3000 }, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		token := byte(10)
		put := func(num uint32, body []byte) heardPacket {
			t.Helper()
			at := int(num) * 512
			end := min(at+512, len(body))
			m := withBlock(post("/up", body[at:end]), 1, block{num: num, more: end < len(body), szx: 5})
			token++
			m.Token = []byte{token}
			return p.ask(m)
		}
		for num := range uint32(6) {
			m := put(num, body)
			want := codes.Continue
			if num == 5 {
				want = codes.Changed
			}
			wantCode(t, m.Message, want)
			if b, ok, _ := blockOf(m.Message, Block1); !ok || b.num != num || b.szx != 5 {
				t.Fatalf("%s", m)
			}
			if num == 2 {
				wantCode(t, put(2, body).Message, codes.Continue) // once more in a message of its own
			}
		}
		if !bytes.Equal(got.Payload, body) {
			t.Fatalf("%d bytes", len(got.Payload))
		}
		put(0, body)
		wantCode(t, put(2, body).Message, codes.RequestEntityIncomplete) // a hole: RFC 7959, Section 2.9.2
		wantCode(t, put(1, body).Message, codes.RequestEntityIncomplete) // it is over
		large := withBlock(post("/up", pattern(512)), 1, block{more: true, szx: 5}).with(Size1, 3001)
		m := p.ask(large)
		wantCode(t, m.Message, codes.RequestEntityTooLarge)
		if most, ok := m.Uint(Size1); !ok || most != 3000 {
			t.Fatalf("%s", m)
		}
		short := withBlock(post("/up", pattern(500)), 1, block{more: true, szx: 5})
		wantCode(t, p.ask(short).Message, codes.BadRequest)
		wantCode(t, p.ask(withBlock(post("/up", pattern(1024)), 1, block{szx: 7})).Message, codes.BadRequest)

		// Two at a time, told apart by their Request-Tags (RFC 9175, Section 3).
		for num := range uint32(2) {
			for _, tag := range []uint32{1, 2} {
				m := withBlock(post("/up", bytes.Repeat([]byte{byte(tag)}, 16)), 1, block{num: num, more: num == 0, szx: 0}).with(RequestTag, tag)
				if r := p.ask(m); num == 1 && (r.packet.code != codes.Changed || !bytes.Equal(got.Payload, bytes.Repeat([]byte{byte(tag)}, 32))) {
					t.Fatalf("%s, the handler got %x", r, got.Payload)
				}
			}
		}
	})
}

// A large command goes in blocks, in the size the peer wants; an answer to another block is none.
func TestUDPUpload(t *testing.T) {
	body := pattern(3000)
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		r := do(c, t.Context(), post("/up", body))
		var got []byte
		for done := false; !done; {
			m := p.read(confirmable)
			b, ok, _ := blockOf(m.Message, Block1)
			if !ok || baseHeader+len(m.body) > 1152 || b.offset() != len(got) {
				t.Fatalf("%s after %d bytes", m, len(got))
			}
			if size, has := m.Uint(Size1); has != (b.num == 0) || has && size != 3000 {
				t.Fatalf("Size1 %d in block %d", size, b.num)
			}
			if _, ok := m.Option(RequestTag); !ok {
				t.Fatalf("%s has no Request-Tag", m)
			}
			got = append(got, m.Payload...)
			answer := &Message{Code: codes.Continue, Token: m.Token, Options: AddOption(nil, Block1, block{num: b.num, more: b.more, szx: 4}.value())}
			if done = !b.more; done {
				answer.Code = codes.Changed
			}
			p.raw(appendPacket(nil, acknowledgement, m.id, answer))
		}
		if res := <-r; res.err != nil || res.msg.Code != codes.Changed || !bytes.Equal(got, body) {
			t.Fatalf("%+v, the peer got %d bytes", res, len(got))
		}

		r = do(c, t.Context(), post("/up", body))
		for range 2 {
			m := p.read(confirmable)
			p.raw(appendPacket(nil, acknowledgement, m.id, &Message{Code: codes.Continue, Token: m.Token, Options: AddOption(nil, Block1, block{more: true, szx: 6}.value())}))
		}
		wantKind(t, (<-r).err, hub.Invalid)

		// The answer to a block that was answered already, in a message of its own: it is acknowledged, and the next one counts.
		r = do(c, t.Context(), post("/up", body))
		m := p.read(confirmable)
		first := &Message{Code: codes.Continue, Token: m.Token, Options: AddOption(nil, Block1, block{more: true, szx: 6}.value())}
		p.raw(appendPacket(nil, acknowledgement, m.id, first))
		m = p.read(confirmable)
		p.send(confirmable, first)
		p.read(acknowledgement)
		p.raw(appendPacket(nil, acknowledgement, m.id, &Message{Code: codes.Changed, Token: m.Token, Options: AddOption(nil, Block1, block{num: 1, szx: 6}.value())}))
		if res := <-r; res.err != nil || res.msg.Code != codes.Changed {
			t.Fatalf("%+v", res)
		}

		// The peer refuses from the beginning.
		r = do(c, t.Context(), post("/up", body))
		m = p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.RequestEntityTooLarge, "")))
		if res := <-r; res.err != nil || res.msg.Code != codes.RequestEntityTooLarge {
			t.Fatalf("%+v", res)
		}
	})
}

// What a device may do wrong, or change, while it is read block by block.
func TestUDPFetch(t *testing.T) {
	body, other := pattern(2500), bytes.Repeat([]byte{'x'}, 2000)
	for _, tc := range []struct {
		name string
		// answer changes the correct answer to block num of the n-th request
		answer func(n int, num uint32, m *Message)
		want   []byte
		kind   hub.Kind
	}{
		{"in order", func(int, uint32, *Message) {}, body, 0},
		{"changes once", func(n int, num uint32, m *Message) {
			if n > 0 {
				*m = *part(other, 2, num, 5, m.Token)
			}
		}, other, 0},
		{"keeps changing", func(n int, num uint32, m *Message) {
			*m = *part(body, byte(n), num, 5, m.Token)
		}, nil, hub.Invalid},
		{"answers block 3 with block 2", func(_ int, num uint32, m *Message) {
			if num == 3 {
				*m = *part(body, 1, 2, 5, m.Token)
			}
		}, nil, hub.Invalid},
		{"ends early", func(_ int, num uint32, m *Message) {
			if num == 2 {
				m.Payload = m.Payload[:10]
			}
		}, nil, hub.Invalid},
		{"a last block that is too long", func(_ int, num uint32, m *Message) {
			if num == 4 {
				m.Payload = pattern(600)
			}
		}, nil, hub.Invalid},
		{"says BERT", func(n int, num uint32, m *Message) {
			m.Options = AddOption(without(m.Options, Block2), Block2, block{num: num, more: true, szx: 7}.value())
		}, nil, hub.Invalid},
		{"gets larger than allowed", func(n int, num uint32, m *Message) {
			*m = *part(pattern(100_000), 1, num, 5, m.Token)
		}, nil, hub.TooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			udpBubble(t, handlerFuncs{}, func(c *Config) { c.MaxBody = 50_000 }, func(t *testing.T, s *udpSim) {
				p := s.device(t, deviceAddr)
				c := s.begin(t, p)
				r := do(c, t.Context(), get("/large"))
				tokens := make(map[string]bool)
				for n := 0; ; n++ {
					m, ok := p.next(time.Second)
					if !ok {
						break
					}
					if tokens[string(m.Token)] {
						t.Fatalf("token %x is used twice", m.Token)
					}
					tokens[string(m.Token)] = true
					b, _, _ := blockOf(m.Message, Block2)
					answer := part(body, 1, b.num, 5, m.Token)
					tc.answer(n, b.num, answer)
					p.raw(appendPacket(nil, acknowledgement, m.id, answer))
				}
				res := <-r
				if tc.want == nil {
					wantKind(t, res.err, tc.kind)
					return
				}
				if res.err != nil || !bytes.Equal(res.msg.Payload, tc.want) {
					t.Fatalf("%+v", res)
				}
			})
		})
	}
}

// part is block num of a body with an ETag.
func part(body []byte, etag byte, num uint32, szx uint8, token []byte) *Message {
	b := block{num: num, szx: szx}
	at := min(b.offset(), len(body))
	end := min(at+b.size(), len(body))
	b.more = end < len(body)
	return &Message{
		Code: codes.Content, Token: token, Payload: body[at:end],
		Options: AddOption(AddOption(nil, ETagOption, []byte{etag}), Block2, b.value()),
	}
}

// A notification larger than a block is fetched (RFC 7959, Section 3.4); a newer one on the way makes the older one void.
func TestUDPLargeNotification(t *testing.T) {
	var mu sync.Mutex
	var got [][]byte
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		mu.Lock()
		defer mu.Unlock()
		for _, n := range ns {
			got = append(got, n.Message.Payload)
		}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		tok := p.observed(c, "/light", 1)
		body := pattern(2000)
		var early []heardPacket // the first request for the rest may overtake the ACK
		ask := func() heardPacket {
			t.Helper()
			if len(early) == 0 {
				return p.read(confirmable)
			}
			m := early[0]
			early = early[1:]
			return m
		}
		note := func(number uint32, body []byte, etag byte) {
			m := part(body, etag, 0, 5, tok)
			m.Options = AddUint(m.Options, ObserveOption, number)
			id := p.send(confirmable, &Message{Code: m.Code, Token: m.Token, Payload: m.Payload, Options: sortOptions(m.Options)})
			for {
				a, ok := p.next(time.Minute)
				if ok && a.typ == confirmable {
					early = append(early, a)
					continue
				}
				if !ok || a.typ != acknowledgement || a.id != id {
					t.Fatalf("%s", a)
				}
				return
			}
		}
		note(2, body, 1)
		for num := uint32(1); num < 4; num++ {
			m := ask()
			b, _, _ := blockOf(m.Message, Block2)
			if _, has := m.Option(ObserveOption); has || b.num != num || Path(m.Message) != "/light" || bytes.Equal(m.Token, tok) {
				t.Fatalf("%s", m)
			}
			p.raw(appendPacket(nil, acknowledgement, m.id, part(body, 1, num, 5, m.Token)))
		}
		synctest.Wait()
		if len(got) != 1 || !bytes.Equal(got[0], body) {
			t.Fatalf("handled %d", len(got))
		}
		note(3, body, 1)
		m := ask()
		p.notify(nonConfirmable, tok, 4, "small and newer")
		p.raw(appendPacket(nil, acknowledgement, m.id, part([]byte("small and newer"), 2, 0, 5, m.Token)))
		for {
			m, ok := p.next(time.Second)
			if !ok {
				break
			}
			p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "small and newer")))
		}
		synctest.Wait()
		if len(got) != 2 || string(got[1]) != "small and newer" {
			t.Fatalf("handled %d: %q", len(got), got[1:])
		}
	})
}

// engine starts a second engine, which begins a session with the hub; it returns its side of it.
func (s *udpSim) engine(t *testing.T, addr string, h handlerFuncs, change func(*Config)) *Conn {
	t.Helper()
	cfg := DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	srv := NewServer(cfg, h, slog.New(slog.DiscardHandler), NewMetrics(nil))
	pc, err := s.net.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	return dialEngine(t, srv, pc, simnet.Addr(hubAddr).AddrPort())
}

// dialEngine begins a session from our side: a client on the same engine.
func dialEngine(t testing.TB, srv *Server, pc net.PacketConn, to netip.AddrPort) *Conn {
	t.Helper()
	sock, err := newSocket(pc)
	if err != nil {
		t.Fatal(err)
	}
	srv.enter()
	l := &udpListener{srv: srv, sock: sock, sessions: srv.newSessions(), peers: make(map[endpoints]*udpLink)}
	e := endpoints{remote: to}
	if a, ok := addrPort(pc.LocalAddr()); ok {
		e.local = a.Addr()
	}
	d := l.session(e)
	c := proven(d)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = l.srv.readDatagrams(l.sock, l.route)
	}()
	t.Cleanup(func() {
		l.sessions.release()
		_ = pc.Close()
		<-done
		srv.leave()
	})
	return c
}

// proven returns the connection of a session whose address we know.
func proven(d *datagram) *Conn {
	d.proven = true
	return d.c
}

// Everything at once through a bad network: 10 % loss, one second of delay, reordering, duplicates, 20 kbit/s.
func TestLossyNetwork(t *testing.T) {
	body := pattern(5000)
	for seed := range uint64(5) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				calls := make(map[string]int)
				var values []string
				var mu sync.Mutex
				s := startUDP(t, handlerFuncs{
					request: func(_ context.Context, m *Message) Response {
						mu.Lock()
						calls[Path(m)]++
						mu.Unlock()
						return Response{Code: codes.Changed, Payload: body[:len(m.Payload)]}
					},
					notifications: func(_ context.Context, ns []Notification) {
						mu.Lock()
						defer mu.Unlock()
						for _, n := range ns {
							values = append(values, string(n.Message.Payload))
						}
					},
				}, nil)
				defer s.stop()
				s.net = simnet.New(0, nil) // not this one
				var trace []string
				n := simnet.New(seed, func(e simnet.Event) { trace = append(trace, e.String()) })
				defer func() {
					if t.Failed() {
						t.Log("\n" + strings.Join(trace, "\n"))
					}
				}()
				n.SetPath(simnet.Path{
					Loss: 0.1, Duplicate: 0.05, Reorder: 0.05, Delay: time.Second, Jitter: 200 * time.Millisecond, Bandwidth: 2500,
				})
				pc, err := n.Listen(hubAddr)
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				served := make(chan error, 1)
				go func() { served <- s.srv.ServeUDP(ctx, pc) }()
				defer func() {
					cancel()
					if err := <-served; err != nil {
						t.Error(err)
					}
				}()
				var observer *Observer
				dev := &udpSim{sim: s.sim, net: n}
				var c *Conn
				c = dev.engine(t, deviceAddr, handlerFuncs{request: func(_ context.Context, m *Message) Response {
					r := Response{Code: codes.Content, Payload: append([]byte(nil), body...)}
					if _, ok := m.Option(ObserveOption); ok {
						o, err := c.AddObserver(m, nil, nil)
						if err != nil {
							t.Error(err)
						}
						observer = o
						r.Payload = []byte("0")
						r.Options = AddUint(nil, ObserveOption, o.Number())
					}
					return r
				}}, nil)

				for i := range 10 {
					r, err := c.Do(t.Context(), post(fmt.Sprintf("/%d", i), body[:500*i]))
					if err != nil || r.Code != codes.Changed || !bytes.Equal(r.Payload, body[:500*i]) {
						t.Fatalf("request %d: %v, %v", i, r, err)
					}
				}
				for path, n := range calls {
					if n != 1 {
						t.Errorf("%s was handled %d times", path, n)
					}
				}
				up := <-s.conns
				r, err := up.Do(t.Context(), get("/large"))
				if err != nil || !bytes.Equal(r.Payload, body) {
					t.Fatalf("%v, %v", r, err)
				}
				o, _, err := up.Observe(t.Context(), get("/value"))
				if err != nil || o == nil {
					t.Fatal(err)
				}
				for i := range 50 {
					if err := observer.Notify(t.Context(), Response{Code: codes.Content, Payload: fmt.Append(nil, i+1)}); err != nil {
						t.Fatal(err)
					}
					<-time.After(time.Duration(i) * 100 * time.Millisecond)
				}
				<-time.After(2 * time.Minute)
				mu.Lock()
				defer mu.Unlock()
				if len(values) == 0 || values[len(values)-1] != "50" {
					t.Fatalf("the last value is not there: %v", values)
				}
				for i := 1; i < len(values); i++ {
					if len(values[i]) < len(values[i-1]) || len(values[i]) == len(values[i-1]) && values[i] <= values[i-1] {
						t.Fatalf("out of order: %v", values)
					}
				}
			})
		})
	}
}

// A later block of an answer to FETCH that is not kept any more: it is asked anew only with its body, never without.
func TestUDPFetchNoLongerKept(t *testing.T) {
	var bodies []string
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if m.Code == codeFetch {
			bodies = append(bodies, string(m.Payload))
		}
		return Response{Code: codes.Content, Payload: pattern(3000)}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin2(t, p)
		token := byte(10)
		fetch := func(num uint32, body string) heardPacket {
			t.Helper()
			m := withBlock(get("/large"), 2, block{num: num, szx: 6})
			token++
			m.Code, m.Token, m.Payload = codeFetch, []byte{token}, []byte(body)
			return p.ask(m)
		}
		if m := fetch(0, "question"); m.Code != codes.Content {
			t.Fatalf("%s", m)
		}
		p.quiet(5 * time.Minute)
		if m := fetch(1, ""); m.Code != codes.RequestEntityIncomplete {
			t.Errorf("%s", m)
		}
		if m := fetch(1, "question"); m.Code != codes.Content {
			t.Errorf("%s", m)
		}
		if m := fetch(0, "one"); m.Code != codes.Content {
			t.Fatalf("%s", m)
		}
		if m := fetch(1, "one"); m.Code != codes.Content {
			t.Errorf("%s", m)
		}
		if m := fetch(1, "another"); m.Code != codes.Content { // what is kept is not the answer to this
			t.Errorf("%s", m)
		}
		if m := fetch(2, ""); m.Code != codes.Content {
			t.Errorf("%s", m)
		}
		if !slices.Equal(bodies, []string{"question", "question", "one", "another"}) {
			t.Errorf("the handler was asked %q", bodies)
		}
	})
}

// Whoever sends a body and asks for a later block of the answer to it, which is not kept, is refused: the body's bytes are free again,
// else he could use up what all peers share. The end of the test looks.
func TestUDPLaterBlockOfAnUpload(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/up" {
			t.Error("the handler was asked")
		}
		return Response{Code: codes.Content}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		m := withBlock(post("/up", pattern(100)), 1, block{szx: 6})
		m.Options = AddOption(m.Options, Block2, block{num: 3, szx: 6}.value())
		m.Token = []byte{10}
		wantCode(t, p.ask(m).Message, codes.RequestEntityIncomplete)
	})
}
