package coap

import (
	"bytes"
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// laterHandler answers /slow beside the worker, after three seconds, with the beginning of what it was sent.
func laterHandler(ended chan error) handlerFuncs {
	return handlerFuncs{request: func(_ context.Context, m *Message) Response {
		switch Path(m) {
		case "/slow":
			return Response{Later: func(ctx context.Context) Response {
				select {
				case <-time.After(3 * time.Second):
					return Response{Code: codes.Changed, Payload: m.Payload[:min(len(m.Payload), 1000)]}
				case <-ctx.Done():
					ended <- ctx.Err()
					return busy()
				}
			}}
		case "/soon":
			return Response{Later: func(context.Context) Response {
				<-time.After(time.Second)
				return Response{Code: codes.Changed}
			}}
		case "/panics":
			return Response{Later: func(context.Context) Response { panic("on purpose") }}
		}
		return Response{Code: codes.Content}
	}}
}

// What is answered later holds up nothing, and its memory is given back.
func TestAnswersMadeLater(t *testing.T) {
	ended := make(chan error, 1)
	bubble(t, laterHandler(ended), func(c *Config) { c.MaxBody = 4096 }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		slow := post("/slow", []byte("body"))
		slow.Token = []byte{1}
		p.send(slow)
		wantCode(t, p.ask(get("/quick")), codes.Content)
		wantCode(t, p.ask(post("/panics", nil)), codes.InternalServerError)
		if m := p.read(); m.Code != codes.Changed || m.Token[0] != 1 || string(m.Payload) != "body" {
			t.Fatalf("%v %x %q", m.Code, m.Token, m.Payload)
		}

		// In blocks: the answer to the last one is that to the whole (RFC 7959, Section 2.5).
		body := pattern(1500)
		wantCode(t, p.ask(withBlock(post("/slow", body[:1024]), 1, block{more: true, szx: 6})), codes.Continue)
		m := p.ask(withBlock(post("/slow", body[1024:]), 1, block{num: 1, szx: 6}))
		if b, ok, _ := blockOf(m, Block1); m.Code != codes.Changed || !bytes.Equal(m.Payload, body[:1000]) || !ok || b.num != 1 {
			t.Fatalf("%v, %d bytes, block %v %v", m.Code, len(m.Payload), ok, b)
		}
		synctest.Wait()
		if n := s.count("buffered_bytes"); n != 0 {
			t.Errorf("%v bytes are still taken", n)
		}

		// After a Release the answers under way are still given.
		p.send(post("/soon", nil))
		p.frame("02e4aa03")
		wantCode(t, p.read(), codes.Changed)
		p.ended()
		_ = p.Close()
		wantReason(t, s.reason(t), ErrReleased)

		// Nobody waits for an answer that nobody can get.
		p = s.dial(t)
		p.send(slow)
		wantCode(t, p.ask(get("/quick")), codes.Content)
		_ = p.Close()
		s.reason(t)
		if err := <-ended; err == nil {
			t.Error("the context goes on")
		}
	})
}

// When all kept answers are forgotten, one that was still being made is not kept either.
func TestAnswersMadeLaterAreForgotten(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		return Response{Later: func(context.Context) Response {
			<-time.After(time.Second)
			return Response{Code: codes.Changed, Payload: pattern(3000)}
		}}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		for _, forget := range []bool{false, true} {
			p.send(withBlock(post("/slow", []byte("go")), 2, block{szx: 6}))
			synctest.Wait()
			if forget {
				c.ForgetAnswers()
			}
			if m := p.read(); m.Code != codes.Changed || len(m.Payload) != 1024 {
				t.Fatalf("%v, %d bytes", m.Code, len(m.Payload))
			}
			m := p.ask(withBlock(post("/slow", nil), 2, block{num: 1, szx: 6}))
			if want := map[bool]codes.Code{false: codes.Changed, true: codes.RequestEntityIncomplete}[forget]; m.Code != want {
				t.Errorf("forgotten %v: %v, want %v", forget, m.Code, want)
			}
		}
	})
}

// Memory is bounded for all: what finds none is refused for the time being.
func TestAnswersMadeLaterAreBounded(t *testing.T) {
	bubble(t, laterHandler(make(chan error, 1)), func(c *Config) { c.MaxBuffered = 4 * messageCost }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		for i := range byte(3) {
			m := post("/slow", bytes.Repeat([]byte{1}, 128))
			m.Token = []byte{i}
			p.send(m)
		}
		want := map[codes.Code]int{codes.Changed: 1, codes.ServiceUnavailable: 2}
		for range 3 {
			want[p.read().Code]--
		}
		if want[codes.Changed] != 0 || want[codes.ServiceUnavailable] != 0 {
			t.Errorf("left over: %v", want)
		}
	})
}

// RFC 7252, Section 5.2.2: over UDP the acknowledgement goes ahead, and a duplicate gets it again.
func TestAnswersMadeLaterUDP(t *testing.T) {
	udpBubble(t, laterHandler(make(chan error, 1)), nil, func(t *testing.T, s *udpSim) {
		p := s.device(t, deviceAddr)
		s.begin(t, p)
		m := post("/slow", []byte("body"))
		m.Token = []byte{1}
		id := p.send(confirmable, m)
		wantCode(t, p.ask(get("/quick")).Message, codes.Content)
		if ack := p.read(acknowledgement); ack.id != id || ack.Code != codes.Empty {
			t.Fatalf("%s", ack)
		}
		answer := p.read(confirmable)
		if answer.Code != codes.Changed || answer.Token[0] != 1 || string(answer.Payload) != "body" {
			t.Fatalf("%s", answer)
		}
		p.empty(acknowledgement, answer.id)
	})
}
