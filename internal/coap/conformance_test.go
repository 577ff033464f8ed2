package coap

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// These tests are for clauses that docs/conformance.md lists and no other test happens to show.

// RFC 7252, Section 4.2: a responder keeps what it needs to acknowledge the request, also after its separate response has been
// acknowledged.
func TestAckOutlivesSeparateResponse(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/slow" {
			<-time.After(2 * time.Second)
		}
		return Response{Code: codes.Content}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		id := p.send(confirmable, get("/slow"))
		p.read(acknowledgement)
		p.empty(acknowledgement, p.read(confirmable).id)
		for range 3 {
			<-time.After(time.Minute)
			p.again(confirmable, id, get("/slow"))
			if m := p.read(acknowledgement); m.id != id || m.packet.code != codes.Empty {
				t.Fatalf("a duplicate got %s", m)
			}
		}
		p.quiet(5 * time.Minute)
	})
}

// RFC 7252, Section 5.2.2: any ACK of a response ends its retransmission, whatever is in it.
func TestAckWithContentOfResponse(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/slow" {
			<-time.After(2 * time.Second)
		}
		return Response{Code: codes.Content}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		p.send(confirmable, get("/slow"))
		p.read(acknowledgement)
		m := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, reply(m.Message, codes.Content, "what for?")))
		p.quiet(5 * time.Minute)
		if n := s.count("messages_received_total", "response"); n != 0 {
			t.Errorf("%v responses were taken", n)
		}
	})
}

// RFC 7252, Section 5.4: a critical option that is not defined for responses is not understood in one.
func TestMisplacedOptions(t *testing.T) {
	for _, id := range []message.OptionID{IfMatch, URIHost, IfNoneMatch, URIPort, URIPath, URIQuery, AcceptOption, ProxyURI, ProxyScheme} {
		m := &Message{Code: codes.Content, Options: AddOption(nil, id, make([]byte, definitions[id].min))}
		bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
			p := s.dial(t)
			r := do(<-s.conns, t.Context(), get("/a"))
			m.Token = p.read().Token
			p.send(m)
			if got := <-r; !hub.IsKind(got.err, hub.BadOption) {
				t.Errorf("option %d over TCP: %+v", id, got)
			}
		})
		udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
			p := s.device(t, deviceAddr)
			r := do(s.begin(t, p), t.Context(), get("/a"))
			req := p.read(confirmable)
			m.Token = req.Token
			p.send(confirmable, m)
			p.read(reset)
			if got := <-r; !hub.IsKind(got.err, hub.BadOption) {
				t.Errorf("option %d over UDP: %+v", id, got)
			}
		})
	}
}

// RFC 7252, Section 5.4.1: a response with a critical option that is not understood is rejected, wherever it is carried, and a
// rejected notification ends its observation (RFC 7641, Section 3.6).
func TestRejectedResponses(t *testing.T) {
	var got []Notification
	h := handlerFuncs{notifications: func(_ context.Context, ns []Notification) { got = append(got, ns...) }}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		bad := func(m *Message) *Message {
			m.Options = AddOption(m.Options, 65001, []byte{1})
			return m
		}
		r := do(c, t.Context(), get("/a"))
		m := p.read(confirmable)
		p.raw(appendPacket(nil, acknowledgement, m.id, bad(reply(m.Message, codes.Content, "a"))))
		wantKind(t, (<-r).err, hub.BadOption)
		p.quiet(5 * time.Minute)

		tok := p.observed(c, "/light", 1)
		id := p.send(confirmable, bad(p.notification(tok, 2, "2")))
		if m := p.read(reset); m.id != id {
			t.Fatalf("%s", m)
		}
		p.quiet(time.Minute) // and no ACK besides
		synctest.Wait()
		if len(got) != 1 || !got[0].Ended || got[0].Message.Code != codes.BadOption {
			t.Fatalf("%+v", got)
		}
		id = p.notify(confirmable, tok, 3, "3")
		if m := p.read(reset); m.id != id {
			t.Fatalf("%s", m)
		}
	})
}

// RFC 8768, Section 3: Hop-Limit is for proxies, but one that is not 1 to 255 is 4.00.
func TestHopLimit(t *testing.T) {
	cases := []struct {
		values [][]byte
		want   codes.Code
	}{
		{[][]byte{{1}}, codes.Content},
		{[][]byte{{255}}, codes.Content},
		{[][]byte{{0}}, codes.BadRequest},
		{[][]byte{{}}, codes.BadRequest},
		{[][]byte{{1, 0}}, codes.BadRequest},
		{[][]byte{{1}, {0}}, codes.Content}, // RFC 7252, Section 5.4.5: only the first counts
	}
	with := func(values [][]byte) *Message {
		m := get("/a")
		for _, v := range values {
			m.Options = AddOption(m.Options, HopLimit, v)
		}
		return m
	}
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		for _, tc := range cases {
			if m := p.ask(with(tc.values)); m.Code != tc.want {
				t.Errorf("%x over TCP: %v", tc.values, m.Code)
			}
		}
	})
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		for _, tc := range cases {
			if m := p.ask(with(tc.values)); m.packet.code != tc.want {
				t.Errorf("%x over UDP: %s", tc.values, m)
			}
		}
		p.send(nonConfirmable, with([][]byte{{0}})) // a NON is answered, too: the option is elective
		if m := p.read(nonConfirmable); m.packet.code != codes.BadRequest {
			t.Errorf("%s", m)
		}
	})
}

// FETCH, PATCH and iPATCH (RFC 8132) in our requests, body and answer in blocks.
func TestMethodsAsClient(t *testing.T) {
	body := pattern(3000)
	calls := make(map[codes.Code]int)
	served := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		calls[m.Code]++
		return Response{Code: codes.Content, Payload: append([]byte{byte(m.Code)}, m.Payload...)}
	}}
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		dev := s.engine(t, deviceAddr, served, nil)
		if _, err := dev.Do(t.Context(), get("/hello")); err != nil {
			t.Fatal(err)
		}
		c := <-s.conns
		for code := codes.GET; code <= 7; code++ {
			req := post("/a", body)
			if req.Code = code; code == codes.GET || code == codes.DELETE {
				req.Payload = nil
			}
			r, err := c.Do(t.Context(), req)
			if err != nil || r.Code != codes.Content || r.Payload[0] != byte(code) || !bytes.Equal(r.Payload[1:], req.Payload) {
				t.Errorf("%v: %+v, %v", code, r, err)
			}
			if calls[code] != 1 {
				t.Errorf("%v was carried out %d times", code, calls[code])
			}
		}
	})
}

// RFC 7967, Section 2.1: each bit stands for a class of responses; the empty value asks for all.
func TestNoResponseClasses(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: map[string]codes.Code{"/hello": codes.Content, "/2": codes.Changed, "/4": codes.BadRequest, "/5": codes.InternalServerError}[Path(m)]}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		for value, silent := range map[uint32]string{0: "", 2: "2", 8: "4", 16: "5", 26: "245"} {
			for _, class := range "245" {
				id := p.send(confirmable, post("/"+string(class), nil).with(NoResponse, value))
				m := p.read(acknowledgement)
				want := class != '2' && class != '4' && class != '5'
				for _, q := range silent {
					want = want || q == class
				}
				if m.id != id || (m.packet.code == codes.Empty) != want {
					t.Errorf("No-Response %d, class %c: %s", value, class, m)
				}
			}
		}
	})
}

// RFC 7959, Section 2.3: blocks with another Content-Format are of another body; Section 2.4: the M bit of a request for a block
// says nothing.
func TestBlocksThatDoNotMatch(t *testing.T) {
	bubble(t, echoHandler(), nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.csm(1<<20, true)
		part := func(num uint32, more bool, format uint32) *Message {
			m := post("/up", pattern(1024)).with(ContentFormatOpt, format)
			m.Options = AddOption(m.Options, Block1, block{num, more, 6}.value())
			return m
		}
		wantCode(t, p.ask(part(0, true, 60)), codes.Continue)
		wantCode(t, p.ask(part(1, false, 50)), codes.RequestEntityIncomplete)

		plain := p.ask(get("/big").with(Block2, 1<<4|6))
		set := p.ask(get("/big").with(Block2, 1<<4|8|6))
		if plain.Code != codes.Content || set.Code != codes.Content || !bytes.Equal(plain.Payload, set.Payload) || len(set.Payload) != 1024 {
			t.Fatalf("%v and %v, %d bytes", plain.Code, set.Code, len(set.Payload))
		}
	})
}

// RFC 7959, Section 2.10: If-None-Match goes with the first block only, and means the whole request.
func TestIfNoneMatchInBlocks(t *testing.T) {
	var conditional []bool
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		_, has := m.Option(IfNoneMatch)
		conditional = append(conditional, has)
		if m.Code == codes.GET {
			return Response{Code: codes.Content}
		}
		return Response{Code: codes.Changed}
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		conditional = nil
		body := pattern(3000)
		req := post("/up", body)
		req.Options = AddOption(req.Options, IfNoneMatch, nil)
		r := do(c, t.Context(), req)
		for done := false; !done; {
			m := p.read(confirmable)
			b, _, _ := blockOf(m.Message, Block1)
			if _, has := m.Option(IfNoneMatch); has != (b.num == 0) {
				t.Errorf("block %d: If-None-Match is %t", b.num, has)
			}
			answer := &Message{Code: codes.Continue, Token: m.Token, Options: AddOption(nil, Block1, b.value())}
			if done = !b.more; done {
				answer.Code = codes.Created
			}
			p.raw(appendPacket(nil, acknowledgement, m.id, answer))
		}
		if res := <-r; res.err != nil || res.msg.Code != codes.Created {
			t.Fatalf("%+v", res)
		}
		for num := range uint32(3) {
			m := withBlock(post("/up", body[num*1024:min(3000, (num+1)*1024)]), 1, block{num: num, more: num < 2, szx: 6})
			if num == 0 {
				m.Options = AddOption(m.Options, IfNoneMatch, nil)
			}
			want := codes.Continue
			if num == 2 {
				want = codes.Changed
			}
			wantCode(t, p.ask(m).Message, want)
		}
		wantCode(t, p.ask(withBlock(post("/up", body[:16]), 1, block{})).Message, codes.Changed)
		if !slices.Equal(conditional, []bool{true, false}) {
			t.Errorf("the handler saw %v", conditional)
		}
	})
}

// RFC 7641, Section 4.4: the numbers that a client sees with a token go on over the end of an observation, and of a session.
func TestObserverNumbersGoOn(t *testing.T) {
	h := &observable{}
	udpBubble(t, h.funcs(), nil, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 10)
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		last := uint32(0)
		newer := func(m heardPacket) {
			t.Helper()
			if n := number(m.Message); n <= last || n >= 1<<24 {
				t.Fatalf("number %d after %d", n, last)
			}
			last = number(m.Message)
		}
		for i := range 3 {
			newer(p.ask(register(1, 0)))
			o := <-h.added
			for range 3 {
				tell(t, o, "x")
				m := p.read(confirmable)
				newer(m)
				p.empty(acknowledgement, m.id)
				synctest.Wait()
			}
			switch i {
			case 0:
				tell(t, o, "x")
				m := p.read(confirmable)
				newer(m)
				p.empty(reset, m.id) // forgotten by the client
				synctest.Wait()
			case 1: // forgotten by us
				c.Close(nil)
				wantReason(t, s.reason(t), ErrClosed)
				<-time.After(10 * time.Second)
				s.begin(t, p)
			}
		}
	})
}

// RFC 7641, Section 4.5: the answer that registers is a notification, too. Where it is a message of its own, a RST of it, or
// silence, ends the observation.
func TestAnswerThatRegistersIsNotWanted(t *testing.T) {
	h := &observable{}
	funcs := h.funcs()
	atOnce := funcs.request
	funcs.request = func(ctx context.Context, m *Message) Response {
		if _, ok := m.Option(ObserveOption); ok {
			<-time.After(2 * time.Second)
		}
		return atOnce(ctx, m)
	}
	udpBubble(t, funcs, nil, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 10)
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		for i, react := range []func(id uint16){
			func(id uint16) { p.empty(acknowledgement, id) },
			func(id uint16) { p.empty(reset, id) },
			func(uint16) {
				for range 4 {
					p.read(confirmable)
				}
				p.quiet(2 * time.Minute)
			},
		} {
			p.send(confirmable, register(byte(i), 0))
			p.read(acknowledgement)
			m := p.read(confirmable)
			o := <-h.added
			if number(m.Message) != o.Number() {
				t.Fatalf("%s", m)
			}
			react(m.id)
			synctest.Wait()
			if h.ended != i {
				t.Fatalf("%d: %d ended", i, h.ended)
			}
			err := o.Notify(t.Context(), Response{Code: codes.Content, Payload: []byte("next")})
			if i == 0 {
				if err != nil {
					t.Fatal(err)
				}
				p.empty(acknowledgement, p.read(confirmable).id)
				continue
			}
			wantKind(t, err, hub.Unavailable)
		}
	})
}

// RFC 7641, Section 7: a notification goes in the association of its registration, and never in a later one of the same address.
func TestObserverEndsWithItsAssociation(t *testing.T) {
	h := &observable{}
	dtlsBubble(t, h.funcs(), nil, func(t *testing.T, s *dtlsSim) {
		h.added = make(chan *Observer, 10)
		const addr = "192.0.2.7:5684"
		first := s.dialPSK(t, addr, false)
		if m := first.try(register(1, 0)); m == nil || number(m) == 1<<31 {
			t.Fatalf("%+v", m)
		}
		old := <-h.added
		first.crash()
		second := s.dialPSK(t, addr, false)
		if m := second.try(get("/tick")); m == nil {
			t.Fatal("no answer")
		}
		synctest.Wait() // the second may be answered a moment before the first has ended
		before, _ := s.traffic(addr)
		wantKind(t, old.Notify(t.Context(), Response{Code: codes.Content, Payload: []byte("for the first")}), hub.Unavailable)
		if p, m, ok := second.next(2 * time.Minute); ok {
			t.Fatalf("%v %q", p.code, m.Payload)
		}
		if after, _ := s.traffic(addr); after != before {
			t.Errorf("%d bytes came", after-before)
		}
		if m := second.try(register(1, 0)); m == nil || number(m) == 1<<31 {
			t.Fatalf("%+v", m)
		}
		tell(t, <-h.added, "for the second")
		if _, m, ok := second.next(time.Second); !ok || string(m.Payload) != "for the second" {
			t.Fatalf("%v %+v", ok, m)
		}
	})
}

// RFC 8323, Section 5.3: a CSM that comes late counts from then on; one with an absurd limit ends the connection or is
// honoured, and never stalls anything.
func TestAbsurdCSM(t *testing.T) {
	body := pattern(3000)
	h := handlerFuncs{request: func(context.Context, *Message) Response { return Response{Code: codes.Content, Payload: body} }}
	for _, tc := range []struct {
		name  string
		limit uint32
		abort bool
	}{
		{"nothing fits", 0, true},
		{"no token fits", 13, true},
		{"no block fits", 14, false},
		{"a block of 16", 96, false},
		{"4 GiB", 1<<32 - 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, h, nil, func(t *testing.T, s *sim) {
				p, other := s.dial(t), s.dial(t)
				wantCode(t, p.ask(get("/a")), codes.Content) // before any CSM: 1152
				p.csm(tc.limit, true)
				if tc.abort {
					m := p.read()
					wantCode(t, m, codes.Abort)
					if describe(m.Options) != "2:02" || len(m.Payload) == 0 {
						t.Errorf("options %q, payload %q", describe(m.Options), m.Payload)
					}
					p.ended()
					_ = p.Close()
					wantReason(t, s.reason(t), ErrBadSignal)
				} else {
					p.send(get("/a"))
					m, n, err := p.next()
					if err != nil || n > int(min(tc.limit, 1<<20)) {
						t.Fatalf("%v, %d bytes, %v", m, n, err)
					}
					if want := map[bool]codes.Code{true: codes.InternalServerError, false: codes.Content}[tc.limit == 14]; m.Code != want {
						t.Errorf("%v", m.Code)
					}
				}
				wantCode(t, other.ask(get("/a")), codes.Content)
			})
		})
	}
}

// RFC 9175, Sections 2.3 and 2.4: a long answer on a path that allows it is a challenge first; the request that echoes it proves
// the address. A value that was not given out proves nothing.
func TestEcho(t *testing.T) {
	body := pattern(900)
	calls := 0
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		calls++
		r := Response{Code: codes.Content, Payload: []byte("x"), Challenge: true}
		switch Path(m) {
		case "/slow":
			<-time.After(5 * time.Second)
			fallthrough
		case "/big":
			r.Payload = body
		}
		return r
	}}
	udpBubble(t, h, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		wantCode(t, p.ask(get("/small")).Message, codes.Content) // no longer than three times the request
		echo := func(v []byte) *Message {
			m := get("/big")
			m.Options = AddOption(m.Options, EchoOption, v)
			return m
		}
		first := p.ask(get("/big"))
		v, ok := first.Option(EchoOption)
		if first.packet.code != codes.Unauthorized || !ok || len(first.Payload) > 0 || baseHeader+len(first.body) > 3*(baseHeader+len(appendBody(nil, get("/big")))+1) {
			t.Fatalf("%s", first)
		}
		wrong := bytes.Clone(v)
		wrong[0]++
		if m := p.ask(echo(wrong)); m.packet.code != codes.Unauthorized || !bytes.Equal(mustOption(m.Message), v) {
			t.Fatalf("a forged value got %s", m)
		}
		// Neither of a wrong length nor as the second one it counts (RFC 9175, Section 2.2.1).
		if m := p.ask(echo(append(bytes.Clone(v), make([]byte, 33)...))); m.packet.code != codes.Unauthorized {
			t.Fatalf("41 bytes got %s", m)
		}
		two := echo(wrong)
		two.Options = AddOption(two.Options, EchoOption, v)
		if m := p.ask(two); m.packet.code != codes.Unauthorized {
			t.Fatalf("two values got %s", m)
		}
		// Another address cannot use it.
		q := s.device(t, "192.0.2.9:9")
		if m := q.ask(echo(v)); m.packet.code != codes.Unauthorized || bytes.Equal(mustOption(m.Message), v) {
			t.Fatalf("a value of another address got %s", m)
		}
		// When the ACK is out already, it is not in a confirmable message, whose retransmissions would go to anybody's address.
		id := p.send(confirmable, get("/slow"))
		if m := p.read(acknowledgement); m.id != id || m.packet.code != codes.Empty {
			t.Fatalf("%s", m)
		}
		if m := p.read(nonConfirmable); m.packet.code != codes.Unauthorized || !bytes.Equal(mustOption(m.Message), v) {
			t.Fatalf("%s", m)
		}
		p.again(confirmable, id, get("/slow"))
		if m := p.read(acknowledgement); m.id != id || m.packet.code != codes.Empty {
			t.Fatalf("the duplicate got %s", m)
		}
		if m := p.ask(echo(v)); !bytes.Equal(m.Payload, body) {
			t.Fatalf("the echo got %s", m)
		}
		if m := p.ask(get("/big")); !bytes.Equal(m.Payload, body) { // from now on
			t.Fatalf("%s", m)
		}
		p.quiet(5 * time.Minute) // and no ping was needed
		if calls != 9 {
			t.Errorf("%d calls", calls)
		}
	})
}

func mustOption(m *Message) []byte {
	v, _ := m.Option(EchoOption)
	return v
}

// RFC 9175, Section 2.3, as client: 4.01 with Echo is asked again with the value, once; the value of any other answer goes with
// the next request, and no further.
func TestEchoAsClient(t *testing.T) {
	udpBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		answer := func(code codes.Code, echo string) []byte {
			t.Helper()
			m := p.read(confirmable)
			a := reply(m.Message, code, "answer")
			if echo != "" {
				a.Options = AddOption(nil, EchoOption, []byte(echo))
			}
			p.raw(appendPacket(nil, acknowledgement, m.id, a))
			return mustOption(m.Message)
		}
		want := func(got []byte, echo string) {
			t.Helper()
			if string(got) != echo {
				t.Errorf("the request has Echo %q, want %q", got, echo)
			}
		}
		r := do(c, t.Context(), post("/lock", []byte("open")))
		want(answer(codes.Unauthorized, "fresh"), "")
		want(answer(codes.Changed, "next"), "fresh")
		if got := <-r; got.err != nil || got.msg.Code != codes.Changed {
			t.Fatalf("%+v", got)
		}
		r = do(c, t.Context(), get("/a"))
		want(answer(codes.Content, ""), "next")
		<-r
		r = do(c, t.Context(), get("/a"))
		want(answer(codes.Unauthorized, "one"), "")
		want(answer(codes.Unauthorized, "two"), "one") // it does not go round
		if got := <-r; got.err != nil || got.msg.Code != codes.Unauthorized {
			t.Fatalf("%+v", got)
		}
		r = do(c, t.Context(), get("/a"))
		want(answer(codes.Unauthorized, ""), "two") // a plain refusal is one
		if got := <-r; got.err != nil || got.msg.Code != codes.Unauthorized {
			t.Fatalf("%+v", got)
		}
		p.quiet(time.Minute)
	})
}

// RFC 9146, Section 3: what we send has the client's connection ID, whatever its length, and no other format if that is empty;
// what comes without ours is dropped.
func TestDTLSConnectionIDOnTheWire(t *testing.T) {
	for _, n := range []int{0, 1, 8, 20, 64} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				opts := pskOptions("lamp", testKey, true)
				if n > 0 {
					opts = append(opts, dtls.WithConnectionIDGenerator(dtls.RandomCIDGenerator(n)))
				}
				sock := s.socket(t, deviceAddr)
				d, err := s.shake(t, sock, opts...)
				if err != nil {
					t.Fatal(err)
				}
				d.ask("/a") // pion takes no record with another ID than its own
				s.conn(t)
				before := s.count("messages_dropped_total", "unknown")
				forged := append([]byte{recordData, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 1, 0, 0, 32}, make([]byte, 32)...)
				if _, err := sock.WriteTo(forged, s.hub); err != nil {
					t.Fatal(err)
				}
				synctest.Wait()
				if got := s.count("messages_dropped_total", "unknown"); got != before+1 {
					t.Errorf("a record without ID was not dropped before the key is asked: %v, %v", before, got)
				}
				d.ask("/b")
				s.stillOpen(t)
				d.close()
				wantReason(t, s.reason(t), io.EOF)
			})
		})
	}
}

// recorder keeps what a device sends, and holds it back when it is told to.
type recorder struct {
	net.PacketConn
	sent [][]byte
	hold bool
}

func (r *recorder) WriteTo(b []byte, to net.Addr) (int, error) {
	r.sent = append(r.sent, bytes.Clone(b))
	if r.hold {
		return len(b), nil
	}
	return r.PacketConn.WriteTo(b, to)
}

// RFC 9146, Section 6: the address changes with a record that is newer than all before. One that is sent again, or comes late,
// from elsewhere changes nothing; the late one is good all the same.
func TestDTLSMoveNeedsANewerRecord(t *testing.T) {
	seen := make(map[string]int)
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		seen[Path(m)]++
		return Response{Code: codes.Content, Payload: []byte(Path(m))}
	}}
	dtlsBubble(t, h, nil, func(t *testing.T, s *dtlsSim) {
		sock := &recorder{PacketConn: s.socket(t, deviceAddr)}
		d, err := s.shake(t, sock, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		d.ask("/a")
		c := s.conn(t)
		const elsewhere = "192.0.2.66:6"
		stays := func(what string) {
			t.Helper()
			synctest.Wait()
			if at := c.Info().Remote.String(); at != deviceAddr {
				t.Fatalf("%s: the session is at %s", what, at)
			}
			d.ask("/still")
		}
		s.forge(t, elsewhere, sock.sent[len(sock.sent)-1])
		stays("replayed")
		sock.hold = true
		d.send(appendPacket(nil, nonConfirmable, 7000, get("/late")))
		late := sock.sent[len(sock.sent)-1]
		sock.hold = false
		d.ask("/b")
		s.forge(t, elsewhere, late)
		stays("late")
		if seen["/late"] != 1 {
			t.Errorf("the late record was handed on %d times", seen["/late"])
		}
		if sent, _ := s.traffic(elsewhere); sent != 0 {
			t.Errorf("%d bytes went to another address", sent)
		}
		sock.hold = true
		d.send(appendPacket(nil, nonConfirmable, 7001, get("/new")))
		s.forge(t, elsewhere, sock.sent[len(sock.sent)-1])
		synctest.Wait()
		if at := c.Info().Remote.String(); at != elsewhere {
			t.Errorf("a newer record came, and the session is at %s", at)
		}
	})
}

// RFC 7641, Section 2: an Observe option of more than three bytes is not recognised. It is elective: a request is then a plain
// one, which registers nothing, and a response one that ends the observation.
func TestObserveOption(t *testing.T) {
	h := &observable{}
	var ended []bool
	funcs := h.funcs()
	funcs.notifications = func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			ended = append(ended, n.Ended)
		}
	}
	udpBubble(t, funcs, nil, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 10)
		p := s.device(t, deviceAddr)
		c := s.begin(t, p)
		with := func(values ...[]byte) *Message {
			m := get("/tick")
			m.Options = nil
			for _, v := range values {
				m.Options = append(m.Options, message.Option{ID: ObserveOption, Value: v})
			}
			m.Options = append(m.Options, AddPath(nil, "/tick")...)
			return m
		}
		if m := p.ask(with([]byte{0, 0, 0, 0})); m.packet.code != codes.Content || number(m.Message) != 1<<31 || len(h.added) != 0 {
			t.Errorf("four bytes: %s, %d registered", m, len(h.added))
		}
		// Of two the first counts (RFC 7252, Section 5.4.5); zeros in front are allowed (Section 3.2).
		for _, m := range []*Message{with([]byte{0, 0, 0}), with(nil, []byte{1})} {
			if m := p.ask(m); number(m.Message) == 1<<31 || len(h.added) != 1 {
				t.Fatalf("%s, %d registered", m, len(h.added))
			}
			<-h.added
		}

		tok := p.observed(c, "/light", 1)
		note := p.notification(tok, 2, "2")
		note.Options = AddOption(nil, ObserveOption, []byte{0, 0, 0, 3})
		p.send(confirmable, note)
		p.read(acknowledgement)
		synctest.Wait()
		if !slices.Equal(ended, []bool{true}) {
			t.Errorf("the observation: ended %v", ended)
		}
	})
}
