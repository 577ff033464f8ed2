package coap

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	coapnet "github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/udp"
	"github.com/plgd-dev/go-coap/v3/udp/client"
	"github.com/prometheus/client_golang/prometheus"
)

// listenUDP starts an engine on a loopback socket.
func listenUDP(t testing.TB, h Handler, address string, change func(*Config)) (addr string, srv *Server) {
	t.Helper()
	cfg := DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	pc, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	srv = NewServer(cfg, h, slog.New(slog.DiscardHandler), NewMetrics(prometheus.NewRegistry()))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.ServeUDP(ctx, pc) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeUDP: %v", err)
		}
	})
	return pc.LocalAddr().String(), srv
}

// testServer is a small server for other implementations' clients: /large can be read and written, /tick observed, and /still,
// which never changes; /separate takes longer than a piggybacked response may, /methods says how it was asked.
type testServer struct {
	mu    sync.Mutex
	large []byte
	ticks chan *Observer
	conns chan *Conn
}

func newTestServer() *testServer {
	return &testServer{large: []byte(strings.Repeat("0123456789", 500)), ticks: make(chan *Observer, 10), conns: make(chan *Conn, 10_000)}
}

func (s *testServer) Open(c *Conn) (ConnHandler, error) {
	s.conns <- c
	return &testServerConn{s: s, c: c}, nil
}

type testServerConn struct {
	s *testServer
	c *Conn
}

func (h *testServerConn) Notifications(context.Context, []Notification) {}
func (h *testServerConn) Closed(error)                                  {}

func (h *testServerConn) Request(ctx context.Context, m *Message) Response {
	h.s.mu.Lock()
	defer h.s.mu.Unlock()
	switch Path(m) {
	case "/large":
		if m.Code == codes.PUT {
			h.s.large = bytes.Clone(m.Payload)
			return Response{Code: codes.Changed}
		}
		return Response{Code: codes.Content, Payload: h.s.large}
	case "/separate":
		t := time.NewTimer(1500 * time.Millisecond)
		defer t.Stop()
		select {
		case <-t.C:
		case <-ctx.Done():
		}
		return Response{Code: codes.Content, Payload: []byte("done")}
	case "/methods":
		return Response{Code: codes.Content, Payload: fmt.Appendf(nil, "%d:%s", m.Code, m.Payload)}
	case "/tick", "/still":
		r := Response{Code: codes.Content, Payload: []byte("tick 0")}
		v, ok := m.Uint(ObserveOption)
		switch {
		case ok && v == 0:
			o, err := h.c.AddObserver(m, func() Response { return Response{Code: codes.Content, Payload: []byte("tick 0")} }, nil)
			if err != nil {
				return busy()
			}
			r.Options = AddUint(nil, ObserveOption, o.Number())
			if Path(m) == "/tick" {
				h.s.ticks <- o
			}
		case ok && v == 1:
			if o := h.c.Observer(m); o != nil {
				o.Cancel()
			}
		}
		return r
	}
	return Response{Code: codes.NotFound}
}

// dialUDP connects go-coap's client.
func dialUDP(t testing.TB, addr string, opts ...udp.Option) *client.Conn {
	t.Helper()
	opts = append(opts, options.WithPeriodicRunner(func(f func(time.Time) bool) {}))
	cc, err := udp.Dial(addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cc.Close()
		<-cc.Done()
	})
	return cc
}

// TestGoCoAPClientUDP lets another implementation ask: large bodies both ways, a slow answer, observation, ping.
func TestGoCoAPClientUDP(t *testing.T) {
	t.Parallel()
	ts := newTestServer()
	addr, _ := listenUDP(t, ts, "127.0.0.1:0", nil)
	cc := dialUDP(t, addr)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	body := func(m *pool.Message, err error) string {
		t.Helper()
		return bodyOf(t, m, err)
	}
	if err := cc.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	if got := body(cc.Get(ctx, "/large")); len(got) != 5000 {
		t.Fatalf("GET /large: %d bytes", len(got))
	}
	want := string(pattern(5000))
	if m, err := cc.Put(ctx, "/large", message.AppOctets, strings.NewReader(want)); err != nil || m.Code() != codes.Changed {
		t.Fatalf("PUT /large: %v, %v", m, err)
	}
	if got := body(cc.Get(ctx, "/large")); got != want {
		t.Fatalf("GET /large: %d bytes", len(got))
	}
	if got := body(cc.Get(ctx, "/separate")); got != "done" {
		t.Fatalf("GET /separate: %q", got)
	}
	seen := make(chan string, 100)
	obs, err := cc.Observe(ctx, "/tick", func(m *pool.Message) {
		b, _ := m.ReadBody()
		seen <- string(b)
	})
	if err != nil {
		t.Fatal(err)
	}
	o := <-ts.ticks
	// None larger than a block: go-coap asks for the rest of a confirmable notification in the ACK, which must be ignored (RFC
	// 7252, Section 4.2).
	for i, want := range []string{"tick 0", "tick 1", "tick 2", "tick 3"} {
		if i > 0 {
			if err := o.Notify(ctx, Response{Code: codes.Content, Payload: []byte(want)}); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case got := <-seen:
			if got != want {
				t.Fatalf("notification %d: %d bytes %.20q", i, len(got), got)
			}
		case <-ctx.Done():
			t.Fatalf("notification %d never came", i)
		}
	}
	if err := obs.Cancel(ctx); err != nil {
		t.Fatal(err)
	}
	if err := o.Notify(ctx, Response{Code: codes.Content}); err == nil {
		t.Fatal("the observer is still there after its cancellation")
	}
}

// TestGoCoAPDeviceUDP lets the engine ask another implementation: large bodies both ways, observation.
func TestGoCoAPDeviceUDP(t *testing.T) {
	body := pattern(5000)
	router := mux.NewRouter()
	observed := make(chan func(i int), 1)
	handle := func(path string, f func(w mux.ResponseWriter, r *mux.Message)) {
		if err := router.Handle(path, mux.HandlerFunc(f)); err != nil {
			t.Fatal(err)
		}
	}
	handle("/big", func(w mux.ResponseWriter, r *mux.Message) {
		if r.Code() == codes.POST {
			if b, err := r.ReadBody(); err != nil || !bytes.Equal(b, body) {
				_ = w.SetResponse(codes.BadRequest, message.TextPlain, nil)
				return
			}
		}
		_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(body))
	})
	handle("/light", func(w mux.ResponseWriter, r *mux.Message) {
		if obs, err := r.Options().Observe(); err != nil || obs == 1 {
			_ = w.SetResponse(codes.Content, message.TextPlain, bytes.NewReader([]byte("off")))
			return
		}
		conn, tok := w.Conn(), bytes.Clone(r.Token())
		observed <- func(i int) {
			msg := conn.AcquireMessage(context.Background())
			defer conn.ReleaseMessage(msg)
			msg.SetCode(codes.Content)
			msg.SetToken(tok)
			msg.SetObserve(uint32(2 + i)) //nolint:gosec // small
			msg.SetContentFormat(message.TextPlain)
			msg.SetBody(bytes.NewReader(fmt.Append(nil, i)))
			if err := conn.WriteMessage(msg); err != nil {
				t.Error(err)
			}
		}
		_ = w.SetResponse(codes.Content, message.TextPlain, bytes.NewReader([]byte("0")), message.Option{ID: message.Observe, Value: []byte{2}})
	})
	ln, err := coapnet.NewListenUDP("udp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	device := udp.NewServer(options.WithMux(router))
	served := make(chan error, 1)
	go func() { served <- device.Serve(ln) }()
	t.Cleanup(func() {
		device.Stop()
		_ = ln.Close()
		<-served
	})

	notes := make(chan string, 100)
	c := clientUDP(t, handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			notes <- string(n.Message.Payload)
		}
	}}, ln.LocalAddr().(*net.UDPAddr).AddrPort())
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if m, err := c.Do(ctx, get("/big")); err != nil || m.Code != codes.Content || !bytes.Equal(m.Payload, body) {
		t.Fatalf("GET: %v, %v", m, err)
	}
	if m, err := c.Do(ctx, post("/big", body)); err != nil || m.Code != codes.Content || !bytes.Equal(m.Payload, body) {
		t.Fatalf("POST: %v, %v", m, err)
	}
	o, first, err := c.Observe(ctx, get("/light"))
	if err != nil || o == nil || string(first.Payload) != "0" {
		t.Fatalf("%v, %v", first, err)
	}
	send := <-observed
	for i := 1; i <= 20; i++ {
		send(i)
		select {
		case got := <-notes:
			if got != fmt.Sprint(i) {
				t.Fatalf("notification %d: %q", i, got)
			}
		case <-ctx.Done():
			t.Fatalf("notification %d never came", i)
		}
	}
	if err := o.Cancel(ctx); err != nil {
		t.Fatal(err)
	}
}

// clientUDP is the engine as a client of an address.
func clientUDP(t testing.TB, h Handler, to netip.AddrPort) *Conn {
	t.Helper()
	srv := NewServer(DefaultConfig(), h, slog.New(slog.DiscardHandler), NewMetrics(nil))
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return dialEngine(t, srv, pc, to)
}

// libcoap runs one of libcoap's programs and returns what it prints. Where it is not installed the test is skipped, which the
// runner reports.
func libcoap(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("%s is not installed (Debian: libcoap3-bin)", name)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	b, err := exec.CommandContext(ctx, path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, b)
	}
	return string(b)
}

// TestLibcoapClientUDP lets libcoap's client ask.
func TestLibcoapClientUDP(t *testing.T) {
	t.Parallel()
	for _, name := range []string{"coap-client-notls", "coap-client-openssl", "coap-client-gnutls"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			ts := newTestServer()
			addr, _ := listenUDP(t, ts, "127.0.0.1:0", nil)
			libcoapAsks(t, ts, name, "coap://"+addr)
		})
	}
}

// libcoapAsks lets libcoap's client ask for everything there is; more are arguments of each call.
func libcoapAsks(t *testing.T, ts *testServer, name, base string, more ...string) {
	t.Helper()
	ask := func(args ...string) string {
		t.Helper()
		return libcoap(t, name, append(slices.Clone(more), args...)...)
	}
	dir := t.TempDir()
	large := strings.Repeat("0123456789", 500)
	out := filepath.Join(dir, "out")
	read := func() string {
		b, err := os.ReadFile(out)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	ask("-m", "get", "-B", "20", "-o", out, base+"/large")
	if read() != large {
		t.Fatalf("GET /large: %d bytes", len(read()))
	}
	in := filepath.Join(dir, "in")
	body := strings.Repeat("abcdefghij", 500)
	if err := os.WriteFile(in, []byte(body), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, size := range []string{"1024", "64"} {
		ts.mu.Lock()
		ts.large = nil
		ts.mu.Unlock()
		ask("-m", "put", "-B", "20", "-b", size, "-f", in, base+"/large")
		ts.mu.Lock()
		got := string(ts.large)
		ts.mu.Unlock()
		if got != body {
			t.Fatalf("PUT /large in blocks of %s: %d bytes", size, len(got))
		}
	}
	ask("-m", "get", "-B", "20", "-b", "256", "-o", out, base+"/large")
	if read() != body {
		t.Fatalf("GET /large: %d bytes", len(read()))
	}
	if got := ask("-m", "get", "-B", "20", base+"/separate"); strings.TrimSpace(got) != "done" {
		t.Fatalf("GET /separate: %q", got)
	}
	if got := ask("-m", "get", "-N", "-B", "20", base+"/methods"); !strings.Contains(got, "1:") {
		t.Fatalf("GET in a NON: %q", got)
	}
	for method, number := range map[string]string{"fetch": "5:", "patch": "6:", "ipatch": "7:"} {
		if got := ask("-m", method, "-e", "x", "-B", "20", base+"/methods"); !strings.Contains(got, number+"x") {
			t.Fatalf("%s: %q", method, got)
		}
	}
	ticking := make(chan struct{})
	go func() {
		defer close(ticking)
		o := <-ts.ticks
		for i := 1; ; i++ {
			t := time.NewTimer(200 * time.Millisecond)
			<-t.C
			if err := o.Notify(context.Background(), Response{Code: codes.Content, Payload: fmt.Appendf(nil, "tick %d\n", i)}); err != nil {
				return // cancelled
			}
		}
	}()
	got := ask("-m", "get", "-s", "2", "-B", "4", base+"/tick")
	if !strings.Contains(got, "tick 0") || !strings.Contains(got, "tick 1") || !strings.Contains(got, "tick 3") {
		t.Fatalf("observing /tick: %q", got)
	}
	<-ticking
	// It pings when it hears nothing. Over UDP and DTLS the answer is a Reset, and what asks for it an empty CON (RFC 7252,
	// Section 4.3), over TCP and TLS there are messages for it (RFC 8323, Section 5.4).
	ping, pong := "t:CON c:0.00", "t:RST c:0.00"
	if strings.Contains(base, "+tcp://") {
		ping, pong = "c:Ping", "c:Pong"
	}
	got = ask("-v", "7", "-K", "1", "-m", "get", "-s", "2", "-B", "4", base+"/still") // -v 7 shows the messages
	if _, behind, ok := strings.Cut(got, ping); !ok || !strings.Contains(behind, pong) {
		t.Fatalf("a ping: %q", got)
	}
	if !strings.HasPrefix(base, "coap://") {
		return
	}
	// Over plain UDP it is asked whether it is there before it gets much, and its answer is a Reset, too.
	got = ask("-v", "7", "-m", "get", "-B", "20", base+"/large")
	if _, behind, ok := strings.Cut(got, ping); !ok || !strings.Contains(behind, pong) {
		t.Fatalf("its answer to a ping: %q", got)
	}
}

// TestLibcoapServerUDP lets the engine be the client of libcoap's server: discovery, a large body there and back, observation.
func TestLibcoapServerUDP(t *testing.T) {
	t.Parallel()
	path, err := exec.LookPath("coap-server-notls")
	if err != nil {
		t.Skip("coap-server-notls is not installed (Debian: libcoap3-bin)")
	}
	free, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	to := free.LocalAddr().(*net.UDPAddr).AddrPort()
	_ = free.Close()
	cmd := exec.CommandContext(t.Context(), path, "-A", "127.0.0.1", "-p", fmt.Sprint(to.Port()), "-d", "10")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})

	notes := make(chan string, 100)
	c := clientUDP(t, handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			notes <- string(n.Message.Payload)
		}
	}}, to)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	// Its first copies may come before the server is there.
	m, err := c.Do(ctx, get("/.well-known/core"))
	if err != nil || m.Code != codes.Content || !bytes.Contains(m.Payload, []byte("</time>")) {
		t.Fatalf("%v, %v", m, err)
	}
	body := pattern(5000)
	put := post("/new", body)
	put.Code = codes.PUT
	if m, err = c.Do(ctx, put); err != nil || m.Code != codes.Created {
		t.Fatalf("PUT: %v, %v", m, err)
	}
	if m, err = c.Do(ctx, get("/new")); err != nil || !bytes.Equal(m.Payload, body) {
		t.Fatalf("GET: %v, %v", m, err)
	}
	if m, err = c.Do(ctx, get("/nothing")); err != nil || m.Code != codes.NotFound {
		t.Fatalf("%v, %v", m, err)
	}
	o, first, err := c.Observe(ctx, get("/time"))
	if err != nil || o == nil || len(first.Payload) == 0 {
		t.Fatalf("%v, %v", first, err)
	}
	select {
	case got := <-notes:
		if got == string(first.Payload) {
			t.Fatalf("%q twice", got)
		}
	case <-ctx.Done():
		t.Fatal("no notification")
	}
	if err := o.Cancel(ctx); err != nil {
		t.Fatal(err)
	}
}
