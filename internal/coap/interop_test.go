package coap

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/tcp/client"
	"github.com/prometheus/client_golang/prometheus"
)

// testTLS returns configurations of a server and a client that trust each other, also in a synctest bubble, whose clock
// starts in the year 2000.
func testTLS(t testing.TB) (server, device *tls.Config) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "hub"}, NotBefore: time.Unix(0, 0),
		NotAfter: time.Unix(1<<32, 0), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage:    x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(leaf)
	cert := tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	server = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert}
	device = &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{cert}, RootCAs: pool}
	return server, device
}

// startTCP starts an engine on a loopback socket and returns its address and the connections that open.
func startTCP(t testing.TB, h handlerFuncs, tlsConf *tls.Config, change func(*Config)) (addr string, conns chan *Conn, srv *Server) {
	t.Helper()
	cfg := DefaultConfig()
	if change != nil {
		change(&cfg)
	}
	conns = make(chan *Conn, 10_000)
	open := h.open
	h.open = func(c *Conn) error {
		conns <- c
		if open != nil {
			return open(c)
		}
		return nil
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv = NewServer(cfg, h, slog.New(slog.DiscardHandler), NewMetrics(prometheus.NewRegistry()))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.ServeTCP(ctx, ln, tlsConf) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeTCP: %v", err)
		}
	})
	return ln.Addr().String(), conns, srv
}

// dialDevice connects go-coap's client.
func dialDevice(t testing.TB, addr string, conf *tls.Config, opts ...tcp.Option) *client.Conn {
	t.Helper()
	// Without a clock of its own: the usual one outlives the connection by seconds.
	opts = append(opts, options.WithTLS(conf), options.WithPeriodicRunner(func(func(time.Time) bool) {}))
	cc, err := tcp.Dial(addr, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cc.Close()
		<-cc.Done()
	})
	return cc
}

func pattern(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(i*7 + i>>8*13 + i>>16)
	}
	return b
}

// passAll sends an echo a message of each size, one after the other, and reads what comes back.
func passAll(t *testing.T, p interface {
	send(*Message)
	read() *Message
}, sizes []int,
) {
	t.Helper()
	go func() {
		for i, n := range sizes {
			m := post("/echo", pattern(n))
			m.Token = []byte{byte(i)}
			p.send(m)
		}
	}()
	for i, n := range sizes {
		m := p.read()
		if m.Token[0] != byte(i) || !bytes.Equal(m.Payload, pattern(n)) {
			t.Fatalf("message %d of %d bytes came back as %x with %d bytes", i, n, m.Token, len(m.Payload))
		}
	}
}

// bodyOf is what another implementation's client got.
func bodyOf(t *testing.T, m *pool.Message, err error) string {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	b, err := m.ReadBody()
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// TestGoCoAPClient lets another implementation be the device: requests, large bodies both ways, pings.
func TestGoCoAPClient(t *testing.T) {
	for _, size := range []int{0, 90, 1100, 1 << 10, 5000, 200_000, MaxBody} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			server, device := testTLS(t)
			body := pattern(size)
			got := make(chan *Message, 1)
			addr, _, _ := startTCP(t, handlerFuncs{request: func(_ context.Context, m *Message) Response {
				got <- m
				return Response{Code: codes.Changed, Options: AddUint(nil, ContentFormatOpt, 42), Payload: body}
			}}, server, nil)
			cc := dialDevice(t, addr, device)
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if err := cc.Ping(ctx); err != nil {
				t.Fatal(err)
			}
			resp, err := cc.Post(ctx, "/oic/rd", message.AppOctets, bytes.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			m := <-got
			if Path(m) != "/oic/rd" || !bytes.Equal(m.Payload, body) {
				t.Fatalf("the hub got %s with %d bytes", Path(m), len(m.Payload))
			}
			answer, err := resp.ReadBody()
			if err != nil {
				t.Fatal(err)
			}
			if resp.Code() != codes.Changed || !bytes.Equal(answer, body) {
				t.Fatalf("the device got %v with %d bytes", resp.Code(), len(answer))
			}
		})
	}
}

// TestGoCoAPDevice lets the engine be the client of another implementation: large bodies both ways, observation.
func TestGoCoAPDevice(t *testing.T) {
	server, device := testTLS(t)
	notes := make(chan Notification, 1000)
	addr, conns, _ := startTCP(t, handlerFuncs{notifications: func(_ context.Context, ns []Notification) {
		for _, n := range ns {
			notes <- n
		}
	}}, server, nil)

	body := pattern(200_000)
	router := mux.NewRouter()
	observer := make(chan []byte, 1)
	handle := func(path string, f func(w mux.ResponseWriter, r *mux.Message)) {
		if err := router.Handle(path, mux.HandlerFunc(f)); err != nil {
			t.Fatal(err)
		}
	}
	handle("/big", func(w mux.ResponseWriter, r *mux.Message) {
		if r.Code() == codes.POST {
			b, err := r.ReadBody()
			if err != nil || !bytes.Equal(b, body) {
				_ = w.SetResponse(codes.BadRequest, message.TextPlain, nil)
				return
			}
		}
		_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(body))
	})
	handle("/light", func(w mux.ResponseWriter, r *mux.Message) {
		obs, err := r.Options().Observe()
		if err != nil || obs == 1 {
			_ = w.SetResponse(codes.Content, message.TextPlain, bytes.NewReader([]byte("off")))
			return
		}
		observer <- append([]byte(nil), r.Token()...)
		_ = w.SetResponse(codes.Content, message.TextPlain, bytes.NewReader([]byte("0")), message.Option{ID: message.Observe, Value: []byte{2}})
	})
	cc := dialDevice(t, addr, device, options.WithMux(router))
	c := <-conns
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()

	info := c.Info()
	if !info.Secure || !info.Stream || info.TLS == nil || len(info.TLS.PeerCertificates) != 1 || info.ID == "" {
		t.Fatalf("info %+v", info)
	}

	m, err := c.Do(ctx, get("/big"))
	if err != nil {
		t.Fatal(err)
	}
	if m.Code != codes.Content || !bytes.Equal(m.Payload, body) {
		t.Fatalf("GET: %v with %d bytes", m.Code, len(m.Payload))
	}
	if m, err = c.Do(ctx, post("/big", body)); err != nil {
		t.Fatal(err)
	}
	if m.Code != codes.Content || !bytes.Equal(m.Payload, body) {
		t.Fatalf("POST: %v with %d bytes", m.Code, len(m.Payload))
	}

	o, first, err := c.Observe(ctx, get("/light"))
	if err != nil {
		t.Fatal(err)
	}
	if o == nil || o.Path() != "/light" || string(first.Payload) != "0" {
		t.Fatalf("observation %v, first answer %v", o, first)
	}
	tok := <-observer
	const count = 200
	for i := range count {
		msg := cc.AcquireMessage(ctx)
		msg.SetCode(codes.Content)
		msg.SetToken(tok)
		msg.SetObserve(uint32(3 + i)) //nolint:gosec // small
		msg.SetContentFormat(message.TextPlain)
		msg.SetBody(bytes.NewReader(fmt.Append(nil, i)))
		if err := cc.WriteMessage(msg); err != nil {
			t.Fatal(err)
		}
		cc.ReleaseMessage(msg)
	}
	for i := range count {
		n := <-notes
		if n.Observation != o || n.Ended || string(n.Message.Payload) != fmt.Sprint(i) {
			t.Fatalf("notification %d: %q, ended %v", i, n.Message.Payload, n.Ended)
		}
	}
	if err := o.Cancel(ctx); err != nil {
		t.Fatal(err)
	}
	if s := c.Stats(); s.BytesIn < 400_000 || s.MessagesIn < count || s.BytesOut == 0 {
		t.Fatalf("stats %+v", s)
	}
}
