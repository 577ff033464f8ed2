package coap

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"
)

// refusals collects what Config.Refused is told.
type refusals struct {
	mu  sync.Mutex
	got []string
}

func (r *refusals) refused(_ net.Addr, reason, detail string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.got = append(r.got, reason+": "+detail)
}

func (r *refusals) want(t *testing.T, reasons ...string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.got) != len(reasons) {
		t.Fatalf("refused %q, want %q", r.got, reasons)
	}
	for i := range reasons {
		if !strings.HasPrefix(r.got[i], reasons[i]+": ") {
			t.Fatalf("refused %q, want %q", r.got, reasons)
		}
	}
}

func TestMaxConnections(t *testing.T) {
	var r refusals
	bubble(t, handlerFuncs{}, func(c *Config) { c.MaxConnections, c.Refused = 2, r.refused }, func(t *testing.T, s *sim) {
		a, _ := s.dial(t), s.dial(t)
		c := s.dialWith(t, 0, 1000)
		c.ended()
		synctest.Wait() // it is recorded after the connection was closed
		r.want(t, "max-connections")
		_ = a.Close()
		_ = s.reason(t)
		synctest.Wait()
		s.dial(t) // there is room again
	})
}

func TestOpenRefuses(t *testing.T) {
	var r refusals
	h := handlerFuncs{open: func(*Conn) error { return errors.New("not today") }}
	bubble(t, h, func(c *Config) { c.Refused = r.refused }, func(t *testing.T, s *sim) {
		p := s.dial(t)
		if _, _, err := p.next(); !errors.Is(err, io.EOF) {
			t.Fatalf("got %v, want the end and no reason", err)
		}
		_ = p.Close()
		synctest.Wait()
		r.want(t, "handler")
		if len(s.closed) != 0 {
			t.Error("Closed was called for a connection that was never opened")
		}
	})
}

// The end: Release (RFC 8323, Section 5.5) and an orderly close; answers under way still go out.
func TestShutdown(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		<-time.After(time.Second)
		return Response{Code: codes.Changed}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		busy, idle, deaf := s.dial(t), s.dial(t), s.dialWith(t, 0, 20)
		busy.send(post("/slow", nil))
		synctest.Wait()
		start := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			wantCode(t, busy.read(), codes.Release)
			wantCode(t, busy.read(), codes.Changed)
			busy.ended()
			_ = busy.Close()
		})
		wg.Go(func() {
			wantCode(t, idle.read(), codes.Release)
			idle.ended()
			_ = idle.Close()
		})
		s.stop() // deaf never reads and never closes
		wg.Wait()
		_ = deaf.Close()
		if d := time.Since(start); d > s.srv.cfg.CloseTimeout+wheelTick {
			t.Errorf("took %v", d)
		}
		for range 3 {
			wantReason(t, s.reason(t), ErrShutdown)
		}
	})
}

// A handler that waits for its context does not hold up the end for more than CloseTimeout.
func TestShutdownEndsHandlers(t *testing.T) {
	h := handlerFuncs{request: func(ctx context.Context, _ *Message) Response {
		<-ctx.Done()
		return Response{Code: codes.ServiceUnavailable}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		p := s.dial(t)
		p.send(get("/forever"))
		synctest.Wait()
		start := time.Now()
		s.stop()
		if d := time.Since(start); d > s.srv.cfg.CloseTimeout+wheelTick {
			t.Errorf("took %v", d)
		}
	})
}

// failingListener fails for a while.
type failingListener struct {
	*simListener
	errs chan error
}

func (l *failingListener) Accept() (net.Conn, error) {
	select {
	case err := <-l.errs:
		return nil, err
	default:
		return l.simListener.Accept()
	}
}

func TestAcceptBacksOff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := &failingListener{newSimListener(), make(chan error, 100)}
		for range 10 {
			ln.errs <- &net.OpError{Op: "accept", Err: syscall.EMFILE}
		}
		srv := NewServer(DefaultConfig(), handlerFuncs{}, slog.New(slog.DiscardHandler), NewMetrics(prometheus.NewRegistry()))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		start := time.Now()
		go func() { done <- srv.ServeTCP(ctx, ln, nil) }()
		c := ln.dial(0, 1000)
		if d := time.Since(start); d < 2*time.Second || d > 10*time.Second {
			t.Errorf("accepted after %v", d)
		}
		_ = c.Close()
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}

		ln = &failingListener{newSimListener(), make(chan error, 1)}
		ln.errs <- errors.New("the network card is on fire")
		if err := srv.ServeTCP(t.Context(), ln, nil); err == nil || !strings.Contains(err.Error(), "on fire") {
			t.Errorf("got %v", err)
		}
	})
}

// startSimTLS serves TLS on the simulated network.
func startSimTLS(t *testing.T, conf *tls.Config, change func(*Config)) (*simListener, *prometheus.Registry) {
	cfg := DefaultConfig()
	change(&cfg)
	ln, reg := newSimListener(), prometheus.NewRegistry()
	srv := NewServer(cfg, handlerFuncs{}, slog.New(slog.DiscardHandler), NewMetrics(reg))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.ServeTCP(ctx, ln, conf) }()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return ln, reg
}

// A handshake has a deadline, and is no connection before it is complete.
func TestHandshakeTimeout(t *testing.T) {
	conf, _ := testTLS(t)
	synctest.Test(t, func(t *testing.T) {
		var r refusals
		ln, _ := startSimTLS(t, conf, func(c *Config) { c.Refused = r.refused })
		c := ln.dial(0, 1000)
		start := time.Now()
		if _, err := io.ReadAll(c); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d != 10*time.Second {
			t.Errorf("closed after %v", d)
		}
		synctest.Wait()
		r.want(t, "handshake-timeout")
	})
}

// Peers that never finish their handshake do not keep others out: the oldest makes room.
func TestHandshakesAreBounded(t *testing.T) {
	conf, device := testTLS(t)
	synctest.Test(t, func(t *testing.T) {
		var r refusals
		ln, _ := startSimTLS(t, conf, func(c *Config) { c.MaxHandshakes, c.Refused = 3, r.refused })
		for range 3 {
			c := ln.dial(0, 1000)
			defer c.Close() //nolint:errcheck // a test's
		}
		start := time.Now()
		raw := ln.dial(0, 1<<20)
		device = device.Clone()
		device.ServerName = "127.0.0.1"
		tc := tls.Client(raw, device)
		if err := tc.Handshake(); err != nil {
			t.Fatal(err)
		}
		if d := time.Since(start); d > 2*time.Second {
			t.Errorf("had to wait %v", d)
		}
		_ = raw.Close()
		synctest.Wait()
		r.want(t, "handshake-evicted")
	})
}

// fromConn is a connection that says where it comes from.
type fromConn struct {
	net.Conn
	from net.Addr
}

func (c fromConn) RemoteAddr() net.Addr { return c.from }

// A flood of silent connections does not slow down the accepting: a handshake that had its second gives way at once, and one
// of another network need not even wait for that. Who floods loses his own, not the slow handshake of somebody else.
func TestSilentFloodDoesNotThrottle(t *testing.T) {
	conf, _ := testTLS(t)
	synctest.Test(t, func(t *testing.T) {
		ln, _ := startSimTLS(t, conf, func(c *Config) { c.MaxHandshakes = 10 })
		from := func(ip string) *simConn {
			up, down := newSimHalf(0, 1000), newSimHalf(0, 1000)
			ln.conns <- fromConn{&simConn{in: up, out: down, local: "hub", remote: "device"}, &net.TCPAddr{IP: net.ParseIP(ip), Port: 5684}}
			c := &simConn{in: down, out: up, local: "device", remote: "hub"}
			t.Cleanup(func() { _ = c.Close() })
			return c
		}
		slow := from("198.51.100.1")
		start := time.Now()
		for range 9 {
			from("203.0.113.7")
		}
		synctest.Wait()
		from("192.0.2.1")
		from("2001:db8::1")
		synctest.Wait()
		if d := time.Since(start); d != 0 {
			t.Errorf("other networks waited %v", d)
		}
		<-time.After(2 * time.Second)
		start = time.Now()
		for range 7 { // as many as are old
			from("203.0.113.8")
		}
		synctest.Wait()
		if d := time.Since(start); d != 0 {
			t.Errorf("waited %v for handshakes that had their second", d)
		}
		for range 21 { // three rounds; with one eviction a second this took 21 s
			from("203.0.113.9")
		}
		synctest.Wait()
		if d := time.Since(start); d > 3*time.Second {
			t.Errorf("21 more took %v", d)
		}
		_ = slow.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, err := slow.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the only one of its network: %v", err)
		}
	})
}

// Equal causes read alike, whatever port the peer came from.
func TestRefusalsNameNoPort(t *testing.T) {
	server, _ := testTLS(t)
	refused := make(chan string, 2)
	addr, _, _ := startTCP(t, handlerFuncs{}, server, func(c *Config) {
		c.HandshakeTimeout = 50 * time.Millisecond
		c.Refused = func(_ net.Addr, reason, detail string) { refused <- reason + ": " + detail }
	})
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if got := <-refused; got != "handshake-timeout: not complete after 50ms" {
		t.Errorf("refused: %s", got)
	}
	_ = c.Close()
	reset := &net.OpError{Op: "read", Net: "tcp", Source: &net.TCPAddr{Port: 1}, Addr: &net.TCPAddr{Port: 2}, Err: syscall.ECONNRESET}
	if got := withoutAddresses(fmt.Errorf("handshake: %w", reset)).Error(); got != "read: connection reset by peer" {
		t.Error(got)
	}
}

func TestNetworkOf(t *testing.T) {
	for in, want := range map[string]string{
		"192.0.2.77": "192.0.2.0/24", "::ffff:192.0.2.1": "192.0.2.0/24", "2001:db8:1:2:3:4:5:6": "2001:db8:1:2::/64",
	} {
		if got := networkOf(&net.TCPAddr{IP: net.ParseIP(in)}).String(); got != want {
			t.Errorf("%s is of %s, want %s", in, got, want)
		}
	}
	if networkOf(&net.TCPAddr{}) != networkOf(simAddr("x")) {
		t.Error("no address")
	}
}

// Bytes that are no TLS, and a peer without a certificate.
func TestHandshakeFails(t *testing.T) {
	server, device := testTLS(t)
	refused := make(chan string, 10)
	addr, conns, _ := startTCP(t, handlerFuncs{}, server, func(c *Config) {
		c.Refused = func(_ net.Addr, reason, _ string) { refused <- reason }
	})
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	_, _ = io.ReadAll(c)
	_ = c.Close()
	if got := <-refused; got != "handshake-failed" {
		t.Errorf("refused: %s", got)
	}
	device.Certificates = nil
	if tc, err := tls.Dial("tcp", addr, device); err == nil {
		_, _ = io.ReadAll(tc)
		_ = tc.Close()
	}
	if got := <-refused; got != "handshake-failed" || len(conns) != 0 {
		t.Errorf("refused: %s; %d connections were opened", got, len(conns))
	}
}

func TestWheel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWheel()
		done, ended := make(chan struct{}), make(chan struct{})
		go func() { w.run(done); close(ended) }()
		start := time.Now()
		type fired struct {
			i  int
			at time.Duration
		}
		var mu sync.Mutex
		var got []fired
		delays := []time.Duration{0, time.Millisecond, time.Second, 51 * time.Second, 52 * time.Second, 3 * time.Hour}
		timers := make([]timer, len(delays)+1)
		for i, d := range delays {
			timers[i].fire = func() {
				mu.Lock()
				defer mu.Unlock()
				got = append(got, fired{i, time.Since(start)})
			}
			w.set(&timers[i], d)
		}
		stopped := &timers[len(delays)]
		stopped.fire = func() { t.Error("a stopped timer fired") }
		w.set(stopped, time.Minute)
		w.stop(stopped)
		w.stop(stopped)
		<-time.After(4 * time.Hour)
		mu.Lock()
		for n, f := range got {
			if f.i != n || f.at < delays[n] || f.at > delays[n]+2*wheelTick {
				t.Errorf("timer %d (%v) fired after %v", f.i, delays[f.i], f.at)
			}
		}
		if len(got) != len(delays) {
			t.Errorf("%d timers fired", len(got))
		}
		got = nil
		mu.Unlock()
		// After a rest, while a later one is waited for, and again from within.
		w.set(&timers[3], 51*time.Second)
		<-time.After(10 * time.Second)
		again := 0
		timers[0].fire = func() {
			if again++; again < 3 {
				w.set(&timers[0], time.Second)
			}
		}
		w.set(&timers[0], time.Second)
		<-time.After(10 * time.Second)
		close(done)
		<-ended
		if again != 3 {
			t.Errorf("fired %d times", again)
		}
	})
}

// A day of connections that end in every way leaves nothing behind: no connection, timer, byte of the budget or goroutine.
func TestNoGrowth(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: make([]byte, len(m.Payload)+3000), Close: Path(m) == "/close"}
	}}
	bubble(t, h, nil, func(t *testing.T, s *sim) {
		half := post("/up", pattern(1024))
		half.Options = AddOption(half.Options, Block1, block{0, true, 6}.value())
		ends := []func(p *peer, c *Conn){
			func(p *peer, _ *Conn) { _ = p.Close() },
			func(p *peer, _ *Conn) { p.cable().cutCable() },
			func(p *peer, _ *Conn) { p.send(half); synctest.Wait(); p.cable().cutCable() },
			func(p *peer, _ *Conn) { p.send(get("/blocks")); synctest.Wait(); _ = p.Close() },
			func(p *peer, _ *Conn) { p.frame("09") },
			func(p *peer, _ *Conn) { p.frame("00e4") },
			func(p *peer, _ *Conn) { p.send(get("/close")) },
			func(_ *peer, c *Conn) { c.Close(nil) },
			func(*peer, *Conn) {}, // reboots and is never heard of again
			func(p *peer, c *Conn) { _ = do(c, c.Context(), get("/x")); synctest.Wait(); p.cable().cutCable() },
			func(p *peer, c *Conn) {
				p.observed(t, c, "/x")
				p.raw(appendFrame(nil, post("/cut", pattern(70_000)))[:50_000])
				_ = p.Close()
			},
		}
		for range 24 {
			for _, end := range ends {
				p := s.dial(t)
				end(p, <-s.conns)
			}
			<-time.After(time.Hour)
			for range ends {
				_ = s.reason(t)
			}
		}
		s.empty(t)
	})
}

// Over real TLS: the answer arrives although more was sent behind the request, and the end is a close_notify, no reset.
func TestAnswerAndCloseTLS(t *testing.T) {
	server, device := testTLS(t)
	closed := make(chan error, 1)
	addr, _, _ := startTCP(t, handlerFuncs{
		request: func(context.Context, *Message) Response { return Response{Code: codes.Unauthorized, Close: true} },
		closed:  func(err error) { closed <- err },
	}, server, nil)
	p := dialBench(t, addr, device)
	var b []byte
	for range 100 {
		b = appendFrame(b, post("/oic/sec/session", pattern(300)))
	}
	if _, err := p.Write(b); err != nil {
		t.Fatal(err)
	}
	for code := codes.Empty; code != codes.Unauthorized; {
		code, _ = p.skip(t)
	}
	if _, err := p.r.ReadByte(); !errors.Is(err, io.EOF) {
		t.Errorf("got %v, want the end", err)
	}
	_ = p.Close()
	wantReason(t, <-closed, ErrAnswered)
}
