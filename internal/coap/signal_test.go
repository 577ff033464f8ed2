package coap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// RFC 8323, Section 5.3: our CSM comes first and says what we take.
func TestCSMFirst(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dialWith(t, 0, 1<<20)
		m := p.read()
		wantCode(t, m, codes.CSM)
		if got := describe(m.Options); got != "2:050000 4:" || len(m.Token) != 0 {
			t.Fatalf("options %s, token %x", got, m.Token)
		}
	})
}

// RFC 8323, Section 5.3.1: the peer's limit counts the whole message; 1152 when it says none. What does not fit goes in
// blocks; with both options in several blocks a message (Section 6).
func TestPeerLimit(t *testing.T) {
	body := pattern(10_000)
	h := handlerFuncs{request: func(context.Context, *Message) Response { return Response{Code: codes.Content, Payload: body} }}
	for _, tc := range []struct {
		name    string
		csm     func(p *peer)
		largest int
		block   string // of the first answer; none: whole
	}{
		{"no CSM", func(*peer) {}, 1152, "0e"},
		{"empty CSM", func(p *peer) { p.frame("00e1") }, 1152, "0e"},
		{"recorded device, 1 MiB", func(p *peer) { p.frame("41e10123100000") }, 1 << 20, ""},
		{"500 bytes", func(p *peer) { p.csm(500, true) }, 500, "0c"},
		{"BERT", func(p *peer) { p.csm(5000, true) }, 5000, "0f"},
		{"5000 bytes without blocks", func(p *peer) { p.csm(5000, false) }, 5000, "0e"},
		{"changed later", func(p *peer) { p.csm(1<<20, true); p.csm(600, true) }, 600, "0d"},
		{"a limit of five bytes is ignored", func(p *peer) { p.frame("60e1250000000001") }, 1152, "0e"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, h, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				tc.csm(p)
				p.send(get("/big"))
				m, n, err := p.next()
				if err != nil {
					t.Fatal(err)
				}
				wantCode(t, m, codes.Content)
				v, has := m.Option(Block2)
				if fmt.Sprintf("%x", v) != tc.block || has != (tc.block != "") || n > tc.largest {
					t.Fatalf("Block2 %x (%v), %d bytes", v, has, n)
				}
			})
		})
	}
}

// RFC 8323, Section 5.2: an unknown critical signalling option ends the connection with Abort, which names it if it was in
// a CSM (Section 5.6).
func TestUnknownCriticalSignal(t *testing.T) {
	for _, tc := range []struct{ name, frame, options string }{
		{"in CSM", "10e1 10", "2:01"},
		{"in Ping", "20e2 30 10", ""},
		{"in Pong", "10e3 10", ""},
		{"in Release", "10e4 10", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				p.frame(tc.frame)
				m := p.read()
				wantCode(t, m, codes.Abort)
				if describe(m.Options) != tc.options || len(m.Payload) == 0 {
					t.Fatalf("options %q, payload %q", describe(m.Options), m.Payload)
				}
				p.ended()
				_ = p.Close()
				wantReason(t, s.reason(t), ErrBadSignal)
			})
		})
	}
}

func TestUnknownElectiveSignal(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("20e1 6101") // CSM with option 6
		p.frame("10e2 40")   // Ping with option 4
		wantCode(t, p.read(), codes.Pong)
		wantCode(t, p.ask(get("/a")), codes.Content)
	})
}

// RFC 8323, Section 5.4; as recorded: the Pong has the Ping's token.
func TestPing(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("02e2aa01")
		m := p.read()
		wantCode(t, m, codes.Pong)
		if string(m.Token) != "\xaa\x01" || len(m.Options) != 0 {
			t.Fatalf("token %x, options %s", m.Token, describe(m.Options))
		}
		p.frame("12e2aa0220") // with Custody: nothing is under way
		if m = p.read(); m.Code != codes.Pong || describe(m.Options) != "2:" {
			t.Fatalf("%v with options %q", m.Code, describe(m.Options))
		}
	})
}

// RFC 8323, Section 5.4.1: a Pong comes at once, and with Custody only if all before it has been handled.
func TestPingWhileBusy(t *testing.T) {
	var free chan struct{}
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		<-free
		return Response{Code: codes.Changed}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		free = make(chan struct{})
		p.send(post("/slow", nil))
		start := time.Now()
		p.frame("12e2aa0220")
		m := p.read()
		wantCode(t, m, codes.Pong)
		if len(m.Options) != 0 || time.Since(start) != 0 {
			t.Fatalf("options %q after %v", describe(m.Options), time.Since(start))
		}
		close(free)
		wantCode(t, p.read(), codes.Changed)
	})
}

// RFC 8323, Section 5.5: what was asked before a Release is answered, then the hub closes.
func TestRelease(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		<-time.After(time.Second)
		return Response{Code: codes.Changed}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.send(post("/slow", nil))
		p.frame("02e4aa03")
		wantCode(t, p.read(), codes.Changed)
		p.ended()
		_ = p.Close()
		wantReason(t, s.reason(t), ErrReleased)
	})
}

// RFC 8323, Section 5.6.
func TestAbort(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("82e5aa04 ff 67 6f6f64 627965")
		p.ended()
		_ = p.Close()
		err := s.reason(t)
		wantReason(t, err, ErrAborted)
		if !strings.Contains(err.Error(), "goodbye") {
			t.Errorf("the diagnostic is missing: %v", err)
		}
	})
}

// RFC 8323, Section 3.4: Empty messages are ignored, with or without token. compat answers 4.01 and closes.
func TestEmptyMessageIgnored(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("0000")
		p.frame("0200aa05")
		wantCode(t, p.ask(get("/a")), codes.Content)
		if n := s.count("messages_received_total", "empty"); n != 2 {
			t.Errorf("%v empty messages counted", n)
		}
	})
}

// Bytes that are no CoAP end the connection with a diagnostic, whatever came before.
func TestMalformed(t *testing.T) {
	for _, tc := range []struct {
		name, frame string
		want        error
	}{
		{"token length 9", "0901 010203040506070809", ErrMalformed},
		{"reserved option length", "1001 1f", ErrMalformed},
		{"option over the end", "1001 b5", ErrMalformed},
		{"marker without payload", "1001 ff", ErrMalformed},
		{"malformed response", "1045 ff", ErrMalformed},
		{"malformed signal", "10e1 ff", ErrMalformed},
		{"message over the limit", "f000050000 01", ErrTooLarge},
		{"message of 4 GiB", "f0ffffffff 01", ErrTooLarge},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				wantCode(t, p.ask(get("/a")), codes.Content)
				p.frame(tc.frame)
				m := p.read()
				wantCode(t, m, codes.Abort)
				if len(m.Payload) == 0 {
					t.Error("no diagnostic")
				}
				p.ended()
				_ = p.Close()
				wantReason(t, s.reason(t), tc.want)
			})
		})
	}
}

func TestReservedClassIgnored(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("0021") // 1.01
		p.frame("0061") // 3.01
		p.frame("00c1") // 6.01
		p.frame("00e9") // 7.09
		wantCode(t, p.ask(get("/a")), codes.Content)
		if n := s.count("messages_dropped_total"); n != 4 {
			t.Errorf("%v dropped messages counted", n)
		}
	})
}

func TestReasonNames(t *testing.T) {
	for _, tc := range []struct {
		err  error
		want string
	}{
		{io.EOF, "eof"},
		{fmt.Errorf("x: %w", ErrKeepAlive), "keepalive"},
		{&badSignal{}, "bad-signal"},
		{context.Canceled, "canceled"},
		{io.ErrUnexpectedEOF, "network"},
		{errors.New("second session"), "closed"},
	} {
		if got := Reason(tc.err); got != tc.want {
			t.Errorf("%v is %q, want %q", tc.err, got, tc.want)
		}
	}
}
