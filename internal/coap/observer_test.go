package coap

import (
	"bytes"
	"context"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// observable answers registrations and hands the observers out.
type observable struct {
	c     *Conn
	added chan *Observer
	ended int
	state Response // how it is, when the observer is to be told again
	early string   // what the observer is told before the answer that registers it is on its way
	gone  bool     // and then that it is over
}

func (h *observable) funcs() handlerFuncs {
	return handlerFuncs{
		open: func(c *Conn) error { h.c = c; return nil },
		request: func(_ context.Context, m *Message) Response {
			r := Response{Code: codes.Content, Payload: []byte("first")}
			switch v, ok := m.Uint(ObserveOption); {
			case ok && v == 0:
				o, err := h.c.AddObserver(m, func() Response { return h.state }, func() { h.ended++ })
				if err != nil {
					return busy()
				}
				r.Options = AddUint(nil, ObserveOption, o.Number())
				if h.early != "" {
					_ = o.Notify(h.c.Context(), Response{Code: codes.Content, Payload: []byte("overtaken")})
					_ = o.Notify(h.c.Context(), Response{Code: codes.Content, Payload: []byte(h.early)})
					if h.gone {
						_ = o.Notify(h.c.Context(), Response{Code: codes.ServiceUnavailable})
					}
				}
				h.added <- o
			case ok:
				if o := h.c.Observer(m); o != nil {
					o.Cancel()
				}
			}
			return r
		},
	}
}

func number(m *Message) uint32 {
	v, ok := m.Uint(ObserveOption)
	if !ok {
		return 1 << 31
	}
	return v
}

func register(token byte, v uint32) *Message {
	m := get("/tick").with(ObserveOption, v)
	m.Token = []byte{token}
	return m
}

func tell(t *testing.T, o *Observer, payload string) {
	t.Helper()
	synctest.Wait() // for whoever sent the answer that registered
	if err := o.Notify(t.Context(), Response{Code: codes.Content, Payload: []byte(payload)}); err != nil {
		t.Fatal(err)
	}
}

// RFC 7641, Section 4: registration, numbers that grow, one notification at a time and then the newest, the ways to end.
func TestObserverUDP(t *testing.T) {
	h := &observable{}
	udpBubble(t, h.funcs(), func(c *Config) { c.MaxObservations = 3 }, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 10)
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		first := p.ask(register(1, 0))
		o := <-h.added
		if number(first.Message) != o.Number() {
			t.Fatalf("%s", first)
		}
		tell(t, o, "1")
		m := p.read(confirmable)
		if string(m.Payload) != "1" || m.Token[0] != 1 || number(m.Message) <= number(first.Message) {
			t.Fatalf("%s", m)
		}
		for i := 2; i <= 5; i++ { // while that is under way
			tell(t, o, fmt.Sprint(i))
		}
		p.quiet(time.Second)
		p.empty(acknowledgement, m.id)
		next := p.read(confirmable)
		if string(next.Payload) != "5" || number(next.Message) <= number(m.Message) {
			t.Fatalf("%s", next)
		}
		p.empty(acknowledgement, next.id)
		p.quiet(time.Minute)

		// The same token again is the same entry, and its numbers go on.
		again := p.ask(register(1, 0))
		renewed := <-h.added
		if number(again.Message) <= number(next.Message) || h.ended != 1 {
			t.Fatalf("%s, %d ended", again, h.ended)
		}
		wantKind(t, o.Notify(t.Context(), Response{Code: codes.Content}), hub.Unavailable)

		// Reset.
		tell(t, renewed, "6")
		p.empty(reset, p.read(confirmable).id)
		synctest.Wait()
		if h.ended != 2 {
			t.Fatalf("%d ended", h.ended)
		}
		wantKind(t, renewed.Notify(t.Context(), Response{Code: codes.Content}), hub.Unavailable)

		// Observe 1.
		p.ask(register(2, 0))
		o = <-h.added
		if m := p.ask(register(2, 1)); number(m.Message) != 1<<31 {
			t.Fatalf("%s", m)
		}
		wantKind(t, o.Notify(t.Context(), Response{Code: codes.Content}), hub.Unavailable)

		// An error.
		p.ask(register(3, 0))
		o = <-h.added
		if err := o.Notify(t.Context(), Response{Code: codes.NotFound}); err != nil {
			t.Fatal(err)
		}
		if m = p.read(confirmable); m.packet.code != codes.NotFound || number(m.Message) != 1<<31 {
			t.Fatalf("%s", m)
		}
		p.empty(acknowledgement, m.id)
		wantKind(t, o.Notify(t.Context(), Response{Code: codes.Content}), hub.Unavailable)

		// Larger than a block: the rest is asked for (RFC 7959, Section 3.4).
		p.ask(register(4, 0))
		o = <-h.added
		body := pattern(2000)
		tell(t, o, string(body))
		m = p.read(confirmable)
		p.empty(acknowledgement, m.id)
		if b, _, _ := blockOf(m.Message, Block2); b != (block{more: true, szx: 6}) || number(m.Message) == 1<<31 {
			t.Fatalf("%s", m)
		}
		rest := p.ask(withBlock(get("/tick"), 2, block{num: 1, szx: 6}))
		if !bytes.Equal(append(m.Payload, rest.Payload...), body) || !bytes.Equal(ETag(rest.Message), ETag(m.Message)) {
			t.Fatalf("%s", rest)
		}

		// No more than are allowed.
		p.ask(register(5, 0))
		<-h.added
		p.ask(register(6, 0))
		<-h.added
		wantCode(t, p.ask(register(7, 0)).Message, codes.ServiceUnavailable)

		// Silence.
		before := h.ended
		tell(t, o, "anybody?")
		for range 5 {
			p.read(confirmable)
		}
		p.quiet(2 * time.Minute)
		if h.ended != before+1 {
			t.Fatalf("%d ended", h.ended-before)
		}
	})
}

// An error ends the entry, and is the last word: it waits for what is under way, and nothing newer takes its place (RFC 7641,
// Section 4.2).
func TestErrorNotificationWaits(t *testing.T) {
	// underWay ends an observation while a notification, which is first, is not acknowledged, and another one waits unless it is "".
	underWay := func(t *testing.T, waiting string, then func(t *testing.T, h *observable, p *udpPeer, o *Observer, first heardPacket)) {
		h := &observable{}
		udpBubble(t, h.funcs(), nil, func(t *testing.T, s *udpSim) {
			h.added = make(chan *Observer, 10)
			p := s.device(t, deviceAddr)
			s.begin(t, p)
			p.ask(register(1, 0))
			o := <-h.added
			tell(t, o, "1")
			first := p.read(confirmable)
			if waiting != "" {
				tell(t, o, waiting)
			}
			if err := o.Notify(t.Context(), Response{Code: codes.ServiceUnavailable}); err != nil {
				t.Fatal(err)
			}
			then(t, h, p, o, first)
		})
	}
	t.Run("notification under way", func(t *testing.T) {
		underWay(t, "2", func(t *testing.T, _ *observable, p *udpPeer, o *Observer, first heardPacket) {
			wantKind(t, o.Notify(t.Context(), Response{Code: codes.Content}), hub.Unavailable)
			p.empty(acknowledgement, first.id)
			m := p.read(confirmable)
			if m.packet.code != codes.ServiceUnavailable || m.Token[0] != 1 || number(m.Message) != 1<<31 {
				t.Fatalf("%s", m)
			}
			p.empty(acknowledgement, m.id)
			synctest.Wait()
			if o.c.Observer(register(1, 1)) != nil {
				t.Fatal("the entry is still there")
			}
			p.quiet(time.Minute)
		})
	})
	t.Run("cancelled", func(t *testing.T) {
		underWay(t, "", func(_ *testing.T, _ *observable, p *udpPeer, _ *Observer, first heardPacket) {
			p.ask(register(1, 1)) // the peer knows that it is over
			p.empty(acknowledgement, first.id)
			p.quiet(time.Minute)
		})
	})
	t.Run("registered again", func(t *testing.T) {
		underWay(t, "", func(t *testing.T, h *observable, p *udpPeer, _ *Observer, first heardPacket) {
			p.ask(register(1, 0)) // it would take the error for the end of the new entry
			p.empty(acknowledgement, first.id)
			p.quiet(time.Minute)
			tell(t, <-h.added, "2")
			if m := p.read(confirmable); string(m.Payload) != "2" {
				t.Fatalf("%s", m)
			}
		})
	})
	t.Run("answer that registers under way", func(t *testing.T) {
		h := &observable{early: "second", gone: true}
		bubble(t, h.funcs(), nil, func(t *testing.T, s *sim) {
			h.added = make(chan *Observer, 10)
			p := s.dial(t)
			if first := p.ask(register(1, 0)); string(first.Payload) != "first" {
				t.Fatalf("%q", first.Payload)
			}
			if m := p.read(); m.Code != codes.ServiceUnavailable || m.Token[0] != 1 {
				t.Fatalf("%v %q", m.Code, m.Payload)
			}
		})
	})
}

// However many observers a peer has and however slowly it acknowledges, each is told its newest state in the end.
func TestManyObserversOfASlowPeer(t *testing.T) {
	h := &observable{}
	udpBubble(t, h.funcs(), nil, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 200)
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		const many = 2*maxBacklog + 2
		var observers []*Observer
		for i := range many {
			p.ask(register(byte(i), 0))
			observers = append(observers, <-h.added)
		}
		for _, o := range observers {
			tell(t, o, "first")
		}
		h.early = "newest" // told before the answer that registers
		p.send(confirmable, register(200, 0))
		got := make(map[byte]string)
		for m, ok := p.next(10 * time.Minute); ok; m, ok = p.next(10 * time.Minute) {
			if m.typ == confirmable {
				p.empty(acknowledgement, m.id)
				got[m.Token[0]] = string(m.Payload)
			}
		}
		if len(got) != many+1 || got[0] != "first" || got[many-1] != "first" || got[200] != "newest" {
			t.Errorf("%d observers were told, the last %q and %q", len(got), got[many-1], got[200])
		}
	})
}

// RFC 7641, Section 4.5: at least every 24 h a confirmable notification, so that an observer that is gone does not stay. It is
// the state as the handler says it then, with the Max-Age that it gives it.
func TestObserverIsReminded(t *testing.T) {
	h := &observable{state: Response{Code: codes.Content, Options: AddUint(nil, MaxAge, 3600), Payload: []byte("still")}}
	udpBubble(t, h.funcs(), func(c *Config) { c.MaxSilence = 1000 * time.Hour }, func(t *testing.T, s *udpSim) {
		h.added = make(chan *Observer, 10)
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		first := p.ask(register(1, 0))
		o := <-h.added
		last := number(first.Message)
		for _, quiet := range []time.Duration{0, time.Hour} {
			<-time.After(quiet)
			if quiet > 0 { // what was told meanwhile makes it later
				if err := o.Notify(t.Context(), Response{Code: codes.Content, Payload: []byte("told")}); err != nil {
					t.Fatal(err)
				}
				m := p.read(confirmable)
				p.empty(acknowledgement, m.id)
				last = number(m.Message)
			}
			p.quiet(23 * time.Hour)
			m, ok := p.next(time.Hour)
			if !ok || m.typ != confirmable || string(m.Payload) != "still" || number(m.Message) <= last {
				t.Fatalf("%v %+v", ok, m)
			}
			if age, _ := m.Uint(MaxAge); age != 3600 {
				t.Errorf("Max-Age %d", age)
			}
			last = number(m.Message)
			p.empty(acknowledgement, m.id)
		}
		p.quiet(23 * time.Hour)
		for range 5 { // nobody acknowledges it
			if _, ok := p.next(time.Hour); !ok {
				t.Fatal("it is not sent again")
			}
		}
		p.quiet(25 * time.Hour)
		if h.ended != 1 {
			t.Errorf("%d ended", h.ended)
		}
	})
}

// Over a stream every notification is written, in order.
func TestObserverTCP(t *testing.T) {
	h := &observable{}
	bubble(t, h.funcs(), nil, func(t *testing.T, s *sim) {
		h.added = make(chan *Observer, 10)
		p := s.dial(t)
		last := number(p.ask(register(1, 0)))
		o := <-h.added
		for i := range 5 {
			tell(t, o, fmt.Sprint(i))
		}
		for i := range 5 {
			m := p.read()
			if string(m.Payload) != fmt.Sprint(i) || number(m) <= last {
				t.Fatalf("%v %q", m.Code, m.Payload)
			}
			last = number(m)
		}
		_ = p.Close()
		s.reason(t)
		wantKind(t, o.Notify(t.Context(), Response{Code: codes.Content}), hub.Unavailable)
	})
}

// What an observer is told before the answer that registers it is on its way follows that answer, the newest alone: else the
// answer would be taken for newer, over a stream, where the order of arrival counts (RFC 8323, Section 7.1).
func TestNotificationWaitsForTheAnswerThatRegisters(t *testing.T) {
	t.Run("stream", func(t *testing.T) {
		h := &observable{early: "second"}
		bubble(t, h.funcs(), nil, func(t *testing.T, s *sim) {
			h.added = make(chan *Observer, 10)
			p := s.dial(t)
			first := p.ask(register(1, 0))
			next := p.read()
			if string(first.Payload) != "first" || string(next.Payload) != "second" || number(next) <= number(first) {
				t.Fatalf("%q, then %q", first.Payload, next.Payload)
			}
			tell(t, <-h.added, "third")
			if m := p.read(); string(m.Payload) != "third" {
				t.Fatalf("%q", m.Payload)
			}
		})
	})
	t.Run("datagrams", func(t *testing.T) {
		h := &observable{early: "second"}
		udpBubble(t, h.funcs(), nil, func(t *testing.T, s *udpSim) {
			h.added = make(chan *Observer, 10)
			p := s.device(t, deviceAddr)
			s.begin(t, p)
			first := p.ask(register(1, 0))
			next := p.read(confirmable)
			if string(first.Payload) != "first" || string(next.Payload) != "second" || number(next.Message) <= number(first.Message) {
				t.Fatalf("%s, then %s", first, next)
			}
			p.empty(acknowledgement, next.id)
		})
	})
}
