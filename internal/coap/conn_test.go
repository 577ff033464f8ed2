package coap

import (
	"context"
	"errors"
	"io"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// The frames are recorded ones.
func TestRequestAndAnswer(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.frame("41e10123100000")
		for _, tc := range []struct{ name, frame, token string }{
			{"GET /oic/rd", "7301d00047b36f6963027264", "\xd0\x00\x47"},
			{"empty token", "7001b36f6963027264", ""},
			{"OCF version options", "d30501d00049b36f6963027264622710e206e30800420800", "\xd0\x00\x49"},
			{"elective option 2048", "b301d00048b36f6963027264e106e801", "\xd0\x00\x48"},
		} {
			p.frame(tc.frame)
			m := p.read()
			if m.Code != codes.Content || string(m.Token) != tc.token || string(m.Payload) != "/oic/rd" {
				t.Fatalf("%s: %v %x %q", tc.name, m.Code, m.Token, m.Payload)
			}
		}
		p.frame("710177b36f6963027264 710177b36f6963027264") // the same token twice at once
		for range 2 {
			if m := p.read(); m.Code != codes.Content || string(m.Token) != "\x77" {
				t.Fatalf("%v %x", m.Code, m.Token)
			}
		}
	})
}

// RFC 7252, Sections 5.4.1 and 5.10.2: such requests never reach the handler; the connection lives.
func TestRefusedOptions(t *testing.T) {
	for _, tc := range []struct {
		name, frame string
		want        codes.Code
	}{
		{"recorded: unknown critical option 9", "9301d000479101236f6963027264", codes.BadOption},
		{"Accept of three bytes", "5001 d304010203", codes.BadOption},
		{"Proxy-Uri", "3001 d11661", codes.ProxyingNotSupported},
		{"Proxy-Scheme", "3001 d11a61", codes.ProxyingNotSupported},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var called atomic.Bool
			h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
				called.Store(Path(m) != "/alive")
				return Response{Code: codes.Content}
			}}
			bubble(t, h, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				p.frame(tc.frame)
				wantCode(t, p.read(), tc.want)
				wantCode(t, p.ask(get("/alive")), codes.Content)
				if called.Load() {
					t.Error("the handler was called")
				}
			})
		})
	}
}

func TestMessageCut(t *testing.T) {
	whole := appendFrame(nil, post("/oic/rd", pattern(70_000)))
	for _, n := range []int{1, 2, 3, 5, 20, 600, 20_000, len(whole) - 1} {
		var called atomic.Bool
		h := handlerFuncs{request: func(context.Context, *Message) Response { called.Store(true); return Response{Code: codes.Changed} }}
		bubble(t, h, nil, func(t *testing.T, s *sim) {
			p := s.dial(t)
			p.raw(whole[:n])
			_ = p.Close()
			wantReason(t, s.reason(t), io.ErrUnexpectedEOF)
			if called.Load() {
				t.Errorf("%d bytes of a message were handled", n)
			}
		})
	}
}

// A message that comes byte by byte is one message.
func TestMessageInPieces(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		for _, b := range appendFrame(nil, post("/a/b", pattern(700))) {
			p.raw([]byte{b})
			synctest.Wait()
		}
		if m := p.read(); string(m.Payload) != "/a/b" {
			t.Fatalf("%v %q", m.Code, m.Payload)
		}
	})
}

// Messages of all sizes arrive as they were sent, alone and pipelined.
func TestSizes(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response { return Response{Code: codes.Content, Payload: m.Payload} }}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.csm(1<<20, true)
		sizes := []int{0, 1, 12, 13, 490, 512, 600, 16_370, 16_384, 16_400, 40_000, 65_805, 140_000, MaxBody}
		passAll(t, p, sizes)
	})
}

// A request over the body limit whose frame still fits is 4.13 with the limit, and the connection lives.
func TestBodyLimit(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		m := p.ask(post("/a", pattern(MaxBody+1)))
		wantCode(t, m, codes.RequestEntityTooLarge)
		if n, _ := m.Uint(Size1); n != MaxBody {
			t.Errorf("Size1 %d", n)
		}
		wantCode(t, p.ask(post("/a", pattern(MaxBody))), codes.Content)
	})
}

// RFC 8323, Section 5.3.1: a whole message of the size we announce is taken, though its body may be too much; one byte more
// ends the connection.
func TestMessageLimit(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		limit := s.srv.cfg.MaxMessageSize
		m := post("/a", pattern(limit))
		m.Payload = m.Payload[:len(m.Payload)-(frameSize(m)-limit)]
		if frameSize(m) != limit {
			t.Fatalf("the message has %d bytes", frameSize(m))
		}
		wantCode(t, p.ask(m), codes.RequestEntityTooLarge)
		wantCode(t, p.ask(get("/a")), codes.Content)
		m.Payload = pattern(len(m.Payload) + 1)
		go p.send(m)
		wantCode(t, p.read(), codes.Abort)
		_ = p.Close()
		wantReason(t, s.reason(t), ErrTooLarge)
	})
}

// The handler is told of what the engine refuses, and of nothing else.
func TestRefusedIsTold(t *testing.T) {
	told := make(chan string, 10)
	h := handlerFuncs{refused: func(m *Message) { told <- Path(m) }}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.csm(1<<20, true)
		with := func(m *Message, id message.OptionID, b block) *Message {
			m.Options = AddOption(m.Options, id, b.value())
			return m
		}
		for _, tc := range []struct {
			path string
			m    *Message
			want codes.Code
			told bool
		}{
			{"/plain", get("/plain"), codes.Content, false},
			{"/begun", with(post("/begun", pattern(1024)), Block1, block{0, true, 6}), codes.Continue, false},
			{"/gap", with(post("/gap", pattern(1024)), Block1, block{3, true, 6}), codes.RequestEntityIncomplete, true},
			{"/large", post("/large", pattern(MaxBody+1)), codes.RequestEntityTooLarge, true},
			{"/critical", get("/critical").with(9, 1), codes.BadOption, true},
			{"/lost", with(post("/lost", nil), Block2, block{2, false, 6}), codes.RequestEntityIncomplete, true},
		} {
			wantCode(t, p.ask(tc.m), tc.want)
			synctest.Wait()
			got := ""
			select {
			case got = <-told:
			default:
			}
			if want := map[bool]string{true: tc.path}[tc.told]; got != want {
				t.Errorf("%s: the handler was told of %q", tc.path, got)
			}
		}
	})
}

func TestPanicEndsOneRequest(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/boom" {
			panic("boom")
		}
		return Response{Code: codes.Content}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		m := p.ask(get("/boom"))
		wantCode(t, m, codes.InternalServerError)
		if strings.Contains(string(m.Payload), "boom") {
			t.Errorf("the peer sees %q", m.Payload)
		}
		wantCode(t, p.ask(get("/a")), codes.Content)
		s.mu.Lock()
		logged := s.logs.String()
		s.mu.Unlock()
		if s.count("panics_total") != 1 || !strings.Contains(logged, "conn_test.go") {
			t.Errorf("not counted or logged with its stack: %s", logged)
		}
	})
}

// An answer with Close arrives, then the connection ends; what the peer sent after it is dropped.
func TestAnswerAndClose(t *testing.T) {
	var calls atomic.Int32
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		calls.Add(1)
		return Response{Code: codes.Unauthorized, Payload: []byte("no"), Close: true}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.raw(append(appendFrame(nil, post("/a", nil)), appendFrame(nil, post("/b", nil))...))
		wantCode(t, p.read(), codes.Unauthorized)
		if _, _, err := p.next(); !errors.Is(err, io.EOF) {
			t.Fatalf("got %v, want the end", err)
		}
		_ = p.Close()
		wantReason(t, s.reason(t), ErrAnswered)
		if calls.Load() != 1 {
			t.Errorf("%d requests were handled", calls.Load())
		}
	})
}

// An answer that ends the connection has its time to arrive, and arrives, also if something else ends the connection while it is made
// or right after it; that is the reason then.
func TestCloseAnswered(t *testing.T) {
	const delay = 100 * time.Millisecond
	revoked := errors.New("revoked")
	for name, tc := range map[string]struct {
		before, after bool
		reason        error
	}{
		"nothing else":  {false, false, ErrAnswered},
		"while it made": {true, false, revoked},
		"right after":   {false, true, revoked},
	} {
		t.Run(name, func(t *testing.T) {
			var conn *Conn
			var at time.Time
			h := handlerFuncs{request: func(context.Context, *Message) Response {
				if tc.before {
					conn.Close(revoked)
					<-time.After(delay / 2)
				}
				at = time.Now()
				conn.CloseAnswered(delay)
				conn.CloseAnswered(10 * delay) // the first one counts
				return Response{Code: codes.Unauthorized, Payload: []byte("no")}
			}}
			bubble(t, h, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				conn = <-s.conns
				p.send(post("/a", nil))
				wantCode(t, p.read(), codes.Unauthorized)
				if tc.after {
					conn.Close(revoked)
				}
				if m, _, err := p.next(); !errors.Is(err, io.EOF) || time.Since(at) != delay {
					t.Errorf("%v later there is %v, %v, want the end after %v", time.Since(at), m, err, delay)
				}
				_ = p.Close()
				wantReason(t, s.reason(t), tc.reason)
			})
		})
	}
}

func TestCloseByHandler(t *testing.T) {
	second := errors.New("second session")
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		c := <-s.conns
		c.Close(second)
		c.Close(errors.New("too late"))
		start := time.Now()
		p.ended()
		// The peer does not close: it is cut off after CloseTimeout.
		wantReason(t, s.reason(t), second)
		if d := time.Since(start); d > s.srv.cfg.CloseTimeout+wheelTick {
			t.Errorf("closed after %v", d)
		}
		select {
		case <-c.Context().Done():
		default:
			t.Error("the context outlives the connection")
		}
		if _, err := c.Do(t.Context(), get("/a")); err == nil {
			t.Error("a request over a closed connection succeeded")
		}
	})
}

// What came before the peer's FIN is handled and answered.
func TestPeerEndsItsDirection(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.send(get("/last"))
		_ = p.cable().CloseWrite()
		if m := p.read(); string(m.Payload) != "/last" {
			t.Fatalf("%v %q", m.Code, m.Payload)
		}
		p.ended()
		wantReason(t, s.reason(t), io.EOF)
	})
}

func TestCableCut(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.cable().cutCable()
		err := s.reason(t)
		if !errors.Is(err, syscall.ECONNRESET) || Reason(err) != "network" {
			t.Fatalf("closed because of %v (%s)", err, Reason(err))
		}
	})
}

func TestSilentFromTheStart(t *testing.T) {
	bubble(t, handlerFuncs{}, func(c *Config) { c.KeepAlive = 0; c.FirstMessageTimeout = 7 * time.Second }, func(t *testing.T, s *sim) {
		start := time.Now()
		_ = s.dial(t)
		wantReason(t, s.reason(t), ErrIdle)
		if d := time.Since(start); d < 7*time.Second || d > 10*time.Second {
			t.Errorf("closed after %v", d)
		}
	})
}

// compat 13: a Ping after T/2 without a message, the end after another T/2.
func TestKeepAlive(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		start := time.Now()
		p := s.dial(t)
		p.frame("00e1")
		for i := range 3 { // answered pings keep it open
			wantCode(t, p.read(), codes.Ping)
			if d := time.Since(start) - time.Duration(i)*10*time.Second; d < 10*time.Second || d > 10*time.Second+time.Duration(i+2)*wheelTick {
				t.Fatalf("ping %d after %v", i, time.Since(start))
			}
			<-time.After(20 * time.Millisecond)
			p.frame("00e3")
		}
		synctest.Wait()
		c := <-s.conns
		if rtt := c.Stats().RoundTrip; rtt != 20*time.Millisecond {
			t.Errorf("round trip %v", rtt)
		}
		last := time.Now()
		wantCode(t, p.read(), codes.Ping)
		p.ended()
		if d := time.Since(last); d < 20*time.Second-wheelTick || d > 20*time.Second+3*wheelTick {
			t.Errorf("closed %v after the last message", d)
		}
		wantReason(t, s.reason(t), ErrKeepAlive)
	})
}

// Any message keeps the connection open.
func TestTrafficKeepsAlive(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		for range 30 {
			wantCode(t, p.ask(get("/a")), codes.Content)
			<-time.After(9 * time.Second)
		}
		if n := s.count("messages_sent_total", "signal"); n != 1 { // the CSM
			t.Errorf("%v signalling messages sent", n)
		}
	})
}

// A large message over a slow link is no silence; one that never becomes whole is.
func TestSlowMessage(t *testing.T) {
	for _, tc := range []struct {
		name  string
		every time.Duration
		want  error
	}{{"slow link", 2 * time.Second, nil}, {"one byte at a time", 9 * time.Second, ErrSlow}, {"no more bytes", time.Hour, ErrKeepAlive}} {
		t.Run(tc.name, func(t *testing.T) {
			bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
				p := s.dial(t)
				p.frame("00e1")
				b := appendFrame(nil, post("/a", pattern(20)))
				start := time.Now()
				for _, x := range b {
					if _, err := p.Write([]byte{x}); err != nil {
						break
					}
					select {
					case err := <-s.closed:
						wantReason(t, err, tc.want)
						if d := time.Since(start); d > s.srv.cfg.MessageTimeout+12*time.Second {
							t.Errorf("closed after %v", d)
						}
						return
					case <-time.After(tc.every):
					}
				}
				if tc.want != nil {
					t.Fatal("the connection lives")
				}
				for {
					if m := p.read(); m.Code != codes.Ping {
						wantCode(t, m, codes.Content)
						return
					}
				}
			})
		})
	}
}

// A peer that stops reading costs WriteQueue and WriteTimeout, then its connection.
func TestPeerStopsReading(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		return Response{Code: codes.Content, Payload: make([]byte, 1000)}
	}}
	bubble(t, h, func(c *Config) { c.WriteQueue = 10_000 }, func(t *testing.T, s *sim) {
		p := s.dialWith(t, 0, 1000)
		p.csm(5000, true)
		for range 40 {
			p.send(get("/a"))
		}
		wantReason(t, s.reason(t), ErrStuck)
	})
}

// A peer that pings and never reads does not make us keep its Pongs.
func TestPongsAreBounded(t *testing.T) {
	bubble(t, handlerFuncs{}, func(c *Config) { c.WriteQueue = 1000 }, func(t *testing.T, s *sim) {
		p := s.dialWith(t, 0, 100)
		c := <-s.conns
		for range 2000 {
			p.frame("08e2 0102030405060708")
		}
		synctest.Wait()
		st := c.tr.(*stream)
		st.mu.Lock()
		n := len(st.pending)
		st.mu.Unlock()
		if n > 1100 || s.count("messages_dropped_total", "unread") == 0 {
			t.Errorf("%d bytes wait to be written", n)
		}
	})
}

// While the queue is full the peer is not read; after OverloadTimeout the connection ends. Others do not notice.
func TestOverload(t *testing.T) {
	var free chan struct{} // made inside the bubble, or time would stand still while somebody waits for it
	h := handlerFuncs{request: func(ctx context.Context, m *Message) Response {
		if Path(m) == "/slow" {
			select {
			case <-free:
			case <-ctx.Done():
			}
		}
		return Response{Code: codes.Changed}
	}}
	bubble(t, h, func(c *Config) { c.QueueLength = 10 }, func(t *testing.T, s *sim) {
		free = make(chan struct{})
		slow, other := s.dialWith(t, 0, 2000), s.dial(t)
		start := time.Now()
		sent := 0
		_ = slow.SetWriteDeadline(start.Add(time.Second))
		for {
			n, err := slow.Write(appendFrame(nil, get("/slow")))
			if err != nil {
				break
			}
			sent += n
		}
		if sent > 10_000 {
			t.Errorf("%d bytes were taken", sent)
		}
		wantCode(t, other.ask(get("/fast")), codes.Changed)
		wantReason(t, s.reason(t), ErrOverload)
		if d := time.Since(start); d < 3*time.Second || d > 3*time.Second+s.srv.cfg.CloseTimeout+wheelTick {
			t.Errorf("closed after %v", d)
		}
		if s.count("queue_full_total") != 1 {
			t.Error("not counted")
		}
	})
}

// A short stall loses nothing.
func TestStall(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		<-time.After(20 * time.Millisecond)
		return Response{Code: codes.Changed}
	}}
	bubble(t, h, func(c *Config) { c.QueueLength = 4 }, func(t *testing.T, s *sim) {
		p := s.dialWith(t, time.Millisecond, 1<<20)
		wantCode(t, p.read(), codes.CSM)
		for i := range 200 {
			m := get("/a")
			m.Token = []byte{byte(i)}
			p.send(m)
		}
		for i := range 200 {
			if m := p.read(); m.Token[0] != byte(i) {
				t.Fatalf("answer %d is for %x", i, m.Token)
			}
		}
	})
}

// The bound over all connections holds back one reader when another has it all.
func TestCommonBudget(t *testing.T) {
	var free chan struct{} // made inside the bubble, or time would stand still while somebody waits for it
	h := handlerFuncs{request: func(ctx context.Context, m *Message) Response {
		if Path(m) == "/slow" {
			<-free
		}
		return Response{Code: codes.Changed}
	}}
	bubble(t, h, func(c *Config) { c.MaxBuffered = 150_000 }, func(t *testing.T, s *sim) {
		free = make(chan struct{})
		a, b := s.dial(t), s.dial(t)
		a.send(post("/slow", pattern(100_000)))
		synctest.Wait()
		b.send(post("/fast", pattern(100_000)))
		synctest.Wait()
		if s.count("buffered_bytes") > 150_000 || s.count("queue_full_total") != 1 {
			t.Errorf("%v bytes buffered, %v times full", s.count("buffered_bytes"), s.count("queue_full_total"))
		}
		close(free)
		wantCode(t, a.read(), codes.Changed)
		wantCode(t, b.read(), codes.Changed)
	})
}

func TestStats(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		start := time.Now()
		p := s.dial(t)
		c := <-s.conns
		<-time.After(time.Second)
		m := get("/a")
		in := len(appendFrame(nil, m))
		p.ask(m)
		synctest.Wait()
		got := c.Stats()
		if !got.Since.Equal(start) || !got.LastActivity.Equal(start.Add(time.Second)) || got.BytesIn != uint64(in) ||
			got.MessagesIn != 1 || got.MessagesOut != 2 || got.BytesOut == 0 {
			t.Errorf("%+v", got)
		}
		if info := c.Info(); info.ID == "" || info.Secure || !info.Stream || info.TLS != nil || info.Remote.String() != "device" {
			t.Errorf("%+v", info)
		}
	})
}

// RFC 7967, Section 2.1.
func TestNoResponse(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/bad" {
			return Response{Code: codes.BadRequest}
		}
		return Response{Code: codes.Changed, Payload: []byte(Path(m))}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.send(post("/quiet", nil).with(NoResponse, 2))
		if m := p.ask(post("/bad", nil).with(NoResponse, 2)); m.Code != codes.BadRequest {
			t.Fatalf("%v %q", m.Code, m.Payload)
		}
	})
}

// A handler that forgets to answer is a fault of ours, not a silence.
func TestEmptyAnswer(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response { return Response{} }}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		wantCode(t, s.dial(t).ask(get("/a")), codes.InternalServerError)
	})
}
