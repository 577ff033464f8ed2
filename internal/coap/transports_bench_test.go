package coap

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	godtls "github.com/plgd-dev/go-coap/v3/dtls"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/mux"
	coapnet "github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/udp"
)

// The engine beside go-coap's own servers, transport by transport: the same requests of the same clients, which cost as little
// as possible. One command prints both:
//
//	go test -run '^$' -bench 'Transports' -count 5 ./internal/coap

// benchTransport is a transport as the two servers serve it.
type benchTransport struct {
	name     string
	ours     func(tb testing.TB) (addr string)
	theirs   func(tb testing.TB) (addr string) // nil: go-coap has none
	dial     func(addr string) (benchClient, error)
	window   int // requests under way at a time
	sessions int // idle ones that are counted
}

var benchTransports = []benchTransport{
	{"udp", benchUDP, goCoAPUDP, dialPackets, 32, 1000},
	{"dtls", benchDTLS, goCoAPDTLS, dialBenchDTLS, 16, 300},
	{"tcp", func(tb testing.TB) string { return benchStream(tb, nil) }, func(tb testing.TB) string { return goCoAPStream(tb, nil) }, dialStream, 64, 1000},
	{"tls", func(tb testing.TB) string { return benchStream(tb, anyoneTLS(tb)) }, func(tb testing.TB) string { return goCoAPStream(tb, anyoneTLS(tb)) }, dialSecureStream, 64, 500},
	{"dtls-cert", benchDTLSCert, nil, dialBenchDTLSCert, 16, 300},
	{"tls-cert", func(tb testing.TB) string { return benchStream(tb, benchIdentity(tb)) }, nil, dialIdentifiedStream, 64, 500},
	{"ws", func(tb testing.TB) string { return startPlainWeb(tb) }, nil, dialWebSocket, 64, 1000},
}

// BenchmarkTransports sends confirmable requests of 90 bytes, many at a time on one connection, and counts the answers, which
// are as long.
func BenchmarkTransports(b *testing.B) {
	each(b, func(b *testing.B, tr benchTransport, addr string) {
		c, err := tr.dial(addr)
		if err != nil {
			b.Fatal(err)
		}
		defer c.close()
		if n := tally(c, 1); n != 1 {
			b.Fatal("no answer")
		}
		b.ReportAllocs()
		b.ResetTimer()
		answers := 0
		for left := b.N; left > 0; left -= tr.window {
			answers += tally(c, min(left, tr.window))
		}
		b.ReportMetric(float64(answers)/b.Elapsed().Seconds(), "msg/s")
		b.ReportMetric(float64(b.N-answers), "lost") // over UDP, where a socket's buffer was full
	})
}

// BenchmarkTransportsIdle reports what a session costs in heap and stack, and in goroutines, when its client has asked once
// and said nothing for three seconds. The clients live in another process.
func BenchmarkTransportsIdle(b *testing.B) {
	each(b, func(b *testing.B, tr benchTransport, addr string) {
		for range b.N {
			before := measure()
			leave := holdSessions(b, tr.name, addr, tr.sessions)
			t := time.NewTimer(3 * time.Second)
			<-t.C
			after := measure()
			leave()
			b.ReportMetric(float64(after.bytes-before.bytes)/float64(tr.sessions), "B/session")
			b.ReportMetric(float64(after.goroutines-before.goroutines)/float64(tr.sessions), "goroutines/session")
		}
	})
}

// TestIdleCost watches what the memory target (40 KiB a connection) rests on: an idle session has no large buffer, over a
// stream one goroutine, over UDP and DTLS none. The bounds are generous, for the race detector's sake.
func TestIdleCost(t *testing.T) {
	most := map[string]cost{
		"udp": {8 << 10, 0}, "dtls": {12 << 10, 0}, "tcp": {24 << 10, 1}, "tls": {48 << 10, 1}, "dtls-cert": {24 << 10, 0}, "tls-cert": {64 << 10, 1}, "ws": {24 << 10, 1},
	}
	for _, tr := range benchTransports {
		t.Run(tr.name, func(t *testing.T) {
			const n = 50
			addr := tr.ours(t)
			holdSessions(t, tr.name, addr, 1)() // what comes once
			before := measure()
			leave := holdSessions(t, tr.name, addr, n)
			defer leave()
			// Goroutines that are on their way out, of handshakes and of workers, take some time.
			deadline := time.Now().Add(30 * time.Second)
			var is cost
			for {
				after := measure()
				is = cost{after.bytes - before.bytes, after.goroutines - before.goroutines}
				if is.bytes <= n*most[tr.name].bytes && is.goroutines <= n*most[tr.name].goroutines+5 {
					t.Logf("%d bytes and %d goroutines", is.bytes/n, is.goroutines)
					return
				}
				if time.Now().After(deadline) {
					t.Fatalf("an idle session costs %d bytes, and %d of them have %d goroutines", is.bytes/n, n, is.goroutines)
				}
				runtime.Gosched()
			}
		})
	}
}

// cost is what lives in heap and stack, and goroutines: of this process, or of a session.
type cost struct{ bytes, goroutines int }

func measure() cost {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return cost{int(m.HeapAlloc + m.StackInuse), runtime.NumGoroutine()} //nolint:gosec // far from overflow
}

// BenchmarkDTLSHandshake makes an association and says nothing; both ends are in this process.
func BenchmarkDTLSHandshake(b *testing.B) {
	addr := benchDTLS(b)
	b.ReportAllocs()
	for range b.N {
		c, err := dialBenchDTLS(addr)
		if err != nil {
			b.Fatal(err)
		}
		c.close()
	}
}

func each(b *testing.B, f func(b *testing.B, tr benchTransport, addr string)) {
	for _, tr := range benchTransports {
		b.Run(tr.name+"/coaphub", func(b *testing.B) { f(b, tr, tr.ours(b)) })
		if tr.theirs != nil {
			b.Run(tr.name+"/go-coap", func(b *testing.B) { f(b, tr, tr.theirs(b)) })
		}
	}
}

// benchClient is a connection's end.
type benchClient interface {
	// send sends n requests.
	send(n int) error
	// answer reads one answer.
	answer() error
	close()
}

// tally sends n requests and returns how many were answered.
func tally(c benchClient, n int) (answers int) {
	if c.send(n) != nil {
		return 0
	}
	for answers < n && c.answer() == nil {
		answers++
	}
	return answers
}

const benchHolds = "COAPHUB_BENCH_HOLDS" // transport, address and number of sessions, for a process of clients

// holdSessions opens sessions of a transport from a process of their own, which asks once in each and ends with leave.
func holdSessions(tb testing.TB, transport, addr string, n int) (leave func()) {
	tb.Helper()
	cmd := exec.Command(os.Args[0])
	// The race detector would wait for a second at the process's end.
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0", fmt.Sprintf("%s=%s %s %d", benchHolds, transport, addr, n))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		tb.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		tb.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		tb.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); line != "holds\n" {
		tb.Fatalf("%q, %v", line, err)
	}
	return func() {
		_ = in.Close()
		if err := cmd.Wait(); err != nil {
			tb.Error(err)
		}
	}
}

// hold is that process.
func hold(args string) error {
	var name, addr string
	var n int
	if _, err := fmt.Sscan(args, &name, &addr, &n); err != nil {
		return err
	}
	for _, tr := range benchTransports {
		if tr.name != name {
			continue
		}
		for range n {
			c, err := tr.dial(addr)
			if err != nil {
				return err
			}
			defer c.close()
			if tally(c, 1) != 1 {
				return errors.New("no answer")
			}
		}
	}
	fmt.Println("holds")
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

func echoBody() handlerFuncs {
	return handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: m.Payload}
	}}
}

var benchRequest = post("/echo", make([]byte, 90))

// packets is a client over UDP, or over what makes an association of it.
type packets struct {
	net.Conn
	id      uint16
	request []byte
	in      [2048]byte
}

func newPackets(c net.Conn) *packets {
	return &packets{Conn: c, request: appendPacket(nil, confirmable, 0, benchRequest)}
}

func dialPackets(addr string) (benchClient, error) {
	c, err := net.Dial("udp", addr)
	if err != nil {
		return nil, err
	}
	return newPackets(c), nil
}

func (d *packets) send(n int) error {
	for range n {
		d.id++
		binary.BigEndian.PutUint16(d.request[2:], d.id)
		if _, err := d.Write(d.request); err != nil {
			return err
		}
	}
	return nil
}

func (d *packets) answer() error {
	_ = d.SetReadDeadline(time.Now().Add(5 * time.Second))
	for {
		n, err := d.Read(d.in[:])
		if err != nil {
			return err
		}
		p, err := parsePacket(d.in[:n])
		switch {
		case err != nil:
			return err
		case p.code>>5 == 2:
			return nil
		case p.typ == confirmable: // a ping, which clients reject
			_, _ = d.Write(emptyPacket(reset, p.id))
		}
	}
}

func (d *packets) close() { _ = d.Close() }

func benchUDP(tb testing.TB) string {
	addr, _ := listenUDP(tb, echoBody(), "127.0.0.1:0", nil)
	return addr
}

func benchDTLS(tb testing.TB) string {
	conf := DefaultDTLSConfig()
	conf.PSK = func(context.Context, []byte) ([]byte, error) { return testKey, nil }
	conf.MaxPerPrefix = conf.MaxHandshakes
	return listenDTLS(tb, echoBody(), conf)
}

func benchDTLSCert(tb testing.TB) string {
	server := benchIdentity(tb)
	conf := DefaultDTLSConfig()
	conf.Credentials = func() (tls.Certificate, *x509.CertPool, error) { return server.Certificates[0], server.ClientCAs, nil }
	conf.MaxPerPrefix = conf.MaxHandshakes
	return listenDTLS(tb, echoBody(), conf)
}

func dialBenchDTLS(addr string) (benchClient, error) {
	return dialAssociation(addr, pskOptions("lamp", testKey, false)...)
}

func dialBenchDTLSCert(addr string) (benchClient, error) {
	cert, err := identity()
	if err != nil {
		return nil, err
	}
	return dialAssociation(addr, dtls.WithCertificates(cert), dtls.WithInsecureSkipVerify(true), dtls.WithCipherSuites(certificateSuites[0]))
}

const benchCert = "COAPHUB_BENCH_CERT" // file with a certificate and its key, for a process of clients

// benchIdentity is a server that wants certificates, of which the clients of the process to come have one.
func benchIdentity(tb testing.TB) *tls.Config {
	tb.Helper()
	server, device := testTLS(tb)
	key, err := x509.MarshalPKCS8PrivateKey(device.Certificates[0].PrivateKey)
	if err != nil {
		tb.Fatal(err)
	}
	b := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key})
	b = append(b, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: device.Certificates[0].Certificate[0]})...)
	file := filepath.Join(tb.TempDir(), "identity.pem")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		tb.Fatal(err)
	}
	tb.Setenv(benchCert, file)
	return server
}

func identity() (tls.Certificate, error) {
	return tls.LoadX509KeyPair(os.Getenv(benchCert), os.Getenv(benchCert))
}

func dialAssociation(addr string, opts ...dtls.ClientOption) (benchClient, error) {
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, err
	}
	sock, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	c, err := dtls.ClientWithOptions(sock, to, opts...)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return newPackets(c), c.HandshakeContext(ctx)
}

// frames is a client over a stream.
type frames struct {
	net.Conn
	r       *bufio.Reader
	request []byte
}

func (f *frames) send(n int) error {
	_, err := f.Write(bytes.Repeat(f.request, n))
	return err
}

// answer reads messages without looking at what is in them.
func (f *frames) answer() error {
	for n := 2; ; n++ {
		b, err := f.r.Peek(n)
		if err != nil {
			return err
		}
		h, whole, err := parseHeader(b)
		if err != nil {
			return err
		}
		if !whole {
			continue
		}
		if _, err := f.r.Discard(h.whole()); err != nil || h.code>>5 == 2 {
			return err
		}
		n = 1
	}
}

func (f *frames) close() { _ = f.Close() }

func dialStream(addr string) (benchClient, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	return &frames{c, bufio.NewReaderSize(c, 64<<10), appendFrame(nil, benchRequest)}, nil
}

func dialSecureStream(addr string) (benchClient, error) {
	return dialTLS(addr, &tls.Config{InsecureSkipVerify: true}) //nolint:gosec // its price is asked, not who it is
}

func dialIdentifiedStream(addr string) (benchClient, error) {
	cert, err := identity()
	if err != nil {
		return nil, err
	}
	return dialTLS(addr, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{cert}}) //nolint:gosec // the same
}

func dialTLS(addr string, conf *tls.Config) (benchClient, error) {
	c, err := tls.Dial("tcp", addr, conf)
	if err != nil {
		return nil, err
	}
	return &frames{c, bufio.NewReaderSize(c, 64<<10), appendFrame(nil, benchRequest)}, nil
}

func benchStream(tb testing.TB, conf *tls.Config) string {
	addr, _, _ := startTCP(tb, echoBody(), conf, nil)
	return addr
}

// anyoneTLS asks for no certificate.
func anyoneTLS(tb testing.TB) *tls.Config {
	server, _ := testTLS(tb)
	server.ClientAuth = tls.NoClientCert
	return server
}

// webFrames is a client over a WebSocket.
type webFrames struct{ frames }

func dialWebSocket(addr string) (benchClient, error) {
	c, err := net.Dial("tcp", addr)
	if err != nil {
		return nil, err
	}
	w := &webFrames{frames{c, bufio.NewReaderSize(c, 64<<10), masked(0x82, body(benchRequest))}}
	if _, err := w.Write([]byte(opening)); err != nil {
		return nil, err
	}
	if res, err := http.ReadResponse(w.r, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		return nil, fmt.Errorf("%v, %w", res, err)
	}
	return w, nil
}

func (w *webFrames) answer() error {
	for {
		head, err := w.r.Peek(4)
		if err != nil {
			return err
		}
		code := codes.Code(head[3])
		if _, err := w.r.Discard(2 + int(head[1])); err != nil || code>>5 == 2 { // none is over 125 bytes
			return err
		}
	}
}

// startPlainWeb starts an engine behind an HTTP server on loopback.
func startPlainWeb(tb testing.TB) (addr string) {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := NewServer(DefaultConfig(), echoBody(), slog.New(slog.DiscardHandler), NewMetrics(nil))
	tb.Cleanup(serveWebSocket(tb, srv, ln))
	return ln.Addr().String()
}

// What follows are go-coap's servers, which echo.

func goCoAPEcho() *mux.Router {
	router := mux.NewRouter()
	_ = router.Handle("/echo", mux.HandlerFunc(func(w mux.ResponseWriter, r *mux.Message) {
		payload, _ := io.ReadAll(r.Body())
		_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(payload))
	}))
	return router
}

// noPeriods keeps go-coap's timers, which outlive their server, from running.
func noPeriods(func(time.Time) bool) {}

// goCoAPServes has a server of go-coap's end with tb.
func goCoAPServes[L io.Closer](tb testing.TB, ln L, serve func(L) error, stop func()) {
	tb.Helper()
	done := make(chan error, 1)
	go func() { done <- serve(ln) }()
	tb.Cleanup(func() {
		stop()
		_ = ln.Close()
		<-done
	})
}

func goCoAPUDP(tb testing.TB) string {
	ln, err := coapnet.NewListenUDP("udp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := udp.NewServer(options.WithMux(goCoAPEcho()), options.WithPeriodicRunner(noPeriods))
	goCoAPServes(tb, ln, srv.Serve, srv.Stop)
	return ln.LocalAddr().String()
}

func goCoAPDTLS(tb testing.TB) string {
	ln, err := coapnet.NewDTLSListener("udp4", "127.0.0.1:0", coapnet.NewDTLSServerOptions(
		dtls.WithPSK(func([]byte) ([]byte, error) { return testKey, nil }), dtls.WithCipherSuites(pskSuites...),
	))
	if err != nil {
		tb.Fatal(err)
	}
	srv := godtls.NewServer(options.WithMux(goCoAPEcho()), options.WithPeriodicRunner(noPeriods))
	goCoAPServes(tb, ln, func(ln *coapnet.DTLSListener) error { return srv.Serve(ln) }, srv.Stop)
	return ln.Addr().String()
}

func goCoAPStream(tb testing.TB, conf *tls.Config) string {
	srv := tcp.NewServer(options.WithMux(goCoAPEcho()), options.WithPeriodicRunner(noPeriods))
	if conf == nil {
		ln, err := coapnet.NewTCPListener("tcp", "127.0.0.1:0")
		if err != nil {
			tb.Fatal(err)
		}
		goCoAPServes(tb, ln, func(ln *coapnet.TCPListener) error { return srv.Serve(ln) }, srv.Stop)
		return ln.Addr().String()
	}
	ln, err := coapnet.NewTLSListener("tcp", "127.0.0.1:0", conf)
	if err != nil {
		tb.Fatal(err)
	}
	goCoAPServes(tb, ln, func(ln *coapnet.TLSListener) error { return srv.Serve(ln) }, srv.Stop)
	return ln.Addr().String()
}
