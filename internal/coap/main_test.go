package coap

import (
	"bufio"
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if args, ok := os.LookupEnv(benchHolds); ok {
		if err := hold(args); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	// Those that run side by side wait for other programs most of their time: more of them at once than there are CPUs.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

// handlerFuncs is a ConnHandler and its Handler; nil functions have harmless defaults.
type handlerFuncs struct {
	open          func(*Conn) error
	request       func(context.Context, *Message) Response
	notifications func(context.Context, []Notification)
	closed        func(error)
	refused       func(*Message)
	heard         func(time.Duration)
	leave         func(gone func())
}

func (h handlerFuncs) Open(c *Conn) (ConnHandler, error) {
	if h.open != nil {
		if err := h.open(c); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func (h handlerFuncs) Request(ctx context.Context, m *Message) Response {
	if h.request == nil {
		return Response{Code: codes.Content, Payload: []byte(Path(m))}
	}
	return h.request(ctx, m)
}

func (h handlerFuncs) Notifications(ctx context.Context, ns []Notification) {
	if h.notifications != nil {
		h.notifications(ctx, ns)
	}
}

func (h handlerFuncs) Refused(m *Message) {
	if h.refused != nil {
		h.refused(m)
	}
}

func (h handlerFuncs) Heard(silence time.Duration) {
	if h.heard != nil {
		h.heard(silence)
	}
}

func (h handlerFuncs) Leave(gone func()) {
	if h.leave == nil {
		gone()
		return
	}
	h.leave(gone)
}

func (h handlerFuncs) Closed(err error) {
	if h.closed != nil {
		h.closed(err)
	}
}

// sim is an engine on a simulated network, inside a synctest bubble.
type sim struct {
	t      *testing.T
	srv    *Server
	ln     *simListener
	conns  chan *Conn // as they open
	closed chan error // as they close
	logs   *bytes.Buffer
	stop   func()
	reg    *prometheus.Registry
	mu     sync.Mutex
}

func (s *sim) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.logs.Write(b)
}

// startSim starts an engine; its end waits for everything.
func startSim(t *testing.T, h handlerFuncs, change func(*Config)) *sim {
	t.Helper()
	cfg := DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	s := &sim{t: t, ln: newSimListener(), conns: make(chan *Conn, 100), closed: make(chan error, 100), logs: new(bytes.Buffer), reg: prometheus.NewRegistry()}
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
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.srv.ServeTCP(ctx, s.ln, nil) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeTCP: %v", err)
		}
		if s.srv.budget.left != cfg.MaxBuffered {
			t.Errorf("%d bytes of the budget never came back", cfg.MaxBuffered-s.srv.budget.left)
		}
	})
	return s
}

// bubble runs f with an engine in a synctest bubble.
func bubble(t *testing.T, h handlerFuncs, change func(*Config), f func(t *testing.T, s *sim)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := startSim(t, h, change)
		defer s.stop()
		f(t, s)
	})
}

// reason returns why the connection that closes next was closed.
func (s *sim) reason(t *testing.T) error {
	t.Helper()
	select {
	case err := <-s.closed:
		return err
	case <-time.After(time.Hour):
		t.Fatal("the connection is still open")
		return nil
	}
}

// peer is a device that speaks in bytes.
type peer struct {
	t testing.TB
	net.Conn
	r *bufio.Reader
}

// dial connects a peer and reads the engine's CSM.
func (s *sim) dial(t *testing.T) *peer {
	t.Helper()
	p := s.dialWith(t, 0, 1<<20)
	if m := p.read(); m.Code != codes.CSM {
		t.Fatalf("first message is %v, want CSM", m.Code)
	}
	return p
}

func (s *sim) dialWith(t *testing.T, delay time.Duration, room int) *peer {
	t.Helper()
	c := s.ln.dial(delay, room)
	p := &peer{t: t, Conn: c, r: bufio.NewReader(c)}
	t.Cleanup(func() { _ = c.Close() })
	return p
}

func (p *peer) cable() *simConn { return p.Conn.(*simConn) }

// frame sends frames written as hex digits; blanks are for the reader.
func (p *peer) frame(digits string) {
	p.t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(digits, " ", ""))
	if err != nil {
		p.t.Fatal(err)
	}
	p.raw(b)
}

func (p *peer) raw(b []byte) {
	p.t.Helper()
	if _, err := p.Write(b); err != nil {
		p.t.Fatalf("write: %v", err)
	}
}

func (p *peer) send(m *Message) { p.t.Helper(); p.raw(appendFrame(nil, m)) }

// csm announces what the peer takes.
func (p *peer) csm(largest uint32, blocks bool) {
	p.t.Helper()
	opts := AddUint(nil, csmMaxMessageSize, largest)
	if blocks {
		opts = AddOption(opts, csmBlockWise, nil)
	}
	p.send(&Message{Code: codes.CSM, Options: opts})
}

// next reads one message, or returns the error.
func (p *peer) next() (*Message, int, error) {
	for n := 2; ; n++ { // no message is shorter
		head, err := p.r.Peek(n)
		if err != nil {
			return nil, 0, err
		}
		h, ok, err := parseHeader(head)
		if err != nil {
			return nil, 0, err
		}
		if !ok {
			continue
		}
		b := make([]byte, h.whole())
		if _, err := io.ReadFull(p.r, b); err != nil {
			return nil, 0, err
		}
		m := &Message{Code: h.code, Token: token(b[h.size:], h.tkl)}
		m.Options, m.Payload, _, err = decodeBody(b[h.size+h.tkl:], nil, h.code>>5 == 7)
		return m, len(b), err
	}
}

func (p *peer) read() *Message {
	p.t.Helper()
	m, _, err := p.next()
	if err != nil {
		p.t.Fatalf("read: %v", err)
	}
	return m
}

// ended reads until the engine has closed.
func (p *peer) ended() {
	p.t.Helper()
	for {
		m, _, err := p.next()
		if errors.Is(err, io.EOF) || errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			p.t.Fatalf("read: %v", err)
		}
		p.t.Logf("before the end: %v %q", m.Code, m.Payload)
	}
}

// ask sends a request and reads the answer.
func (p *peer) ask(m *Message) *Message {
	p.t.Helper()
	p.send(m)
	r := p.read()
	if !bytes.Equal(r.Token, m.Token) {
		p.t.Fatalf("token %x in the answer to %x", r.Token, m.Token)
	}
	return r
}

func get(path string) *Message {
	return &Message{Code: codes.GET, Token: []byte{7}, Options: AddPath(nil, path)}
}

func post(path string, payload []byte) *Message {
	return &Message{Code: codes.POST, Token: []byte{8}, Options: AddPath(nil, path), Payload: payload}
}

func (m *Message) with(id message.OptionID, n uint32) *Message {
	c := *m
	c.Options = AddUint(append(message.Options(nil), m.Options...), id, n)
	return &c
}

// count returns a metric's value: the sum over its labels, or of the one with that label value.
func (s *sim) count(name string, label ...string) float64 {
	s.t.Helper()
	families, err := s.reg.Gather()
	if err != nil {
		s.t.Fatal(err)
	}
	sum := 0.0
	for _, f := range families {
		if f.GetName() != "coaphub_coap_"+name {
			continue
		}
		for _, m := range f.GetMetric() {
			if len(label) == 0 || m.GetLabel()[0].GetValue() == label[0] {
				sum += m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return sum
}

func wantCode(t *testing.T, m *Message, want codes.Code) {
	t.Helper()
	if m.Code != want {
		t.Fatalf("code %v (%q), want %v", m.Code, m.Payload, want)
	}
}

func wantReason(t *testing.T, got, want error) {
	t.Helper()
	if !errors.Is(got, want) {
		t.Fatalf("closed because of %v, want %v", got, want)
	}
}
