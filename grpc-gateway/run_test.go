package grpcgateway

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"iter"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// run serves the world on ports of the system's choice and returns what stops it. It is stopped at the test's end anyway.
func (w *world) run(t testing.TB) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- w.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		cancel()
		t.Fatal(err)
	}
	var stopped bool
	stop = func() error {
		if stopped {
			return nil
		}
		stopped = true
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(20 * time.Second):
			return fmt.Errorf("does not stop")
		}
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return stop
}

// client is an HTTP client whose connections end with the test.
func client(t testing.TB) *http.Client {
	tr := &http.Transport{}
	t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Transport: tr, Timeout: 20 * time.Second}
}

func TestRunServesBothDoorsUntilItsEnd(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	stop := w.run(t)
	h, g := w.Addresses()
	c := client(t)
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+h.String()+"/api/v1/devices", nil)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer alice")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	body, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil || strings.Count(string(body), "\n") != 2 {
		t.Errorf("%s, %v", body, err)
	}
	conn, err := grpc.NewClient(g.String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := pb.NewGrpcGatewayClient(conn).GetHubConfiguration(as(t, ""), &pb.HubConfigurationRequest{}); err != nil {
		t.Fatal(err)
	}
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(as(t, ""), &grpc_health_v1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	first, err := watch.Recv()
	if err != nil {
		t.Fatal(err)
	}
	want(t, "health", first.GetStatus(), grpc_health_v1.HealthCheckResponse_SERVING)
	begun := time.Now()
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	last, err := watch.Recv() // an open stream is told, and does not keep the door from closing
	if err != nil {
		t.Fatal(err)
	}
	want(t, "health", last.GetStatus(), grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	if took := time.Since(begun); took > 10*time.Second { // stopTime, and a loaded machine
		t.Errorf("stopping took %v", took)
	}
}

func TestRunNamesTheFlagOfABadAddress(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	for flag, change := range map[string]func(*Config, *Deps){
		"--http-address": func(c *Config, _ *Deps) { c.API.HTTP.Address = taken.Addr().String() },
		"--grpc-address": func(c *Config, _ *Deps) { c.API.GRPC.Address = taken.Addr().String() },
		"TLS":            func(c *Config, _ *Deps) { c.API.HTTP.Address = "0.0.0.0:0" },
	} {
		err := newWorld(t, change).Run(t.Context(), func() { t.Error("ready") })
		if err == nil || !strings.Contains(err.Error(), flag) {
			t.Errorf("%s: %v", flag, err)
		}
	}
}

// dialRaw connects and asks, without reading the answer.
func dialRaw(t testing.TB, addr net.Addr, request string) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", addr.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
	return c
}

const rawList = "GET /api/v1/devices HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer alice\r\n\r\n"

// endless makes a list that only its reader can end; ended is closed then.
func endless(w *world) (ended chan struct{}) {
	ended = make(chan struct{})
	w.directory.devices = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		return func(yield func(*hub.Device, error) bool) {
			defer close(ended)
			for yield(w.pictures[lampA], nil) {
			}
		}
	}
	return ended
}

func TestReaderThatStopsReadingIsCutOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.StallTimeout = 100 * time.Millisecond })
	ended := endless(w)
	w.run(t)
	h, _ := w.Addresses()
	dialRaw(t, h, rawList)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("the list still waits for its reader")
	}
}

// Over HTTP/2 a request without a body is none that could still come.
func TestReaderOverHTTP2ThatStopsReadingIsCutOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.StallTimeout = 100 * time.Millisecond })
	ended := endless(w)
	srv := httptest.NewUnstartedServer(w.HTTPHandler())
	srv.EnableHTTP2 = true
	srv.StartTLS()
	defer srv.Close()
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, srv.URL+"/api/v1/devices", nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer alice")
	resp, err := srv.Client().Do(r)
	if err != nil || resp.ProtoMajor != 2 {
		t.Fatalf("%v, %v", resp, err)
	}
	defer func() { _ = resp.Body.Close() }()
	select {
	case <-ended:
	case <-time.After(2 * time.Minute): // what fills the peer's windows, some megabytes, takes its time on a busy machine
		t.Error("the list still waits for its reader")
	}
}

// A body of which nobody knows the length is bounded like any other; one that was asked for is not read before it is wanted.
func TestBodiesWithoutLengthAndUnasked(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.MaxBodyBytes = 4096 })
	w.run(t)
	h, _ := w.Addresses()
	const put = "PATCH /api/v1/devices/" + string(lampA) + "/labels HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
	chunk := "1000\r\n" + strings.Repeat(" ", 4096) + "\r\n"
	for what, c := range map[string]struct{ ask, want string }{
		"chunked":            {put + "Authorization: Bearer alice\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat(chunk, 20) + "0\r\n\r\n", "413"},
		"expect, no token":   {put + "Content-Length: 1000\r\nExpect: 100-continue\r\n\r\n", "401"},
		"expect, with token": {put + "Authorization: Bearer alice\r\nContent-Length: 1000\r\nExpect: 100-continue\r\n\r\n", "100"},
	} {
		conn := dialRaw(t, h, c.ask)
		_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
		line, err := bufio.NewReader(conn).ReadString('\n')
		if err != nil || !strings.HasPrefix(line, "HTTP/1.1 "+c.want) {
			t.Errorf("%s: %q, %v, want %s", what, line, err, c.want)
		}
	}
}

func TestListEndsAtItsDeadline(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.RequestTimeout = 300 * time.Millisecond })
	endless(w)
	w.run(t)
	h, _ := w.Addresses()
	c := dialRaw(t, h, rawList)
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var tail []byte
	buf := make([]byte, 64<<10)
	for err == nil {
		var n int
		n, err = resp.Body.Read(buf)
		tail = append(tail, buf[:n]...)
		tail = tail[max(0, len(tail)-400):]
	}
	if err == io.EOF { //nolint:errorlint // exactly: the body must not look complete
		t.Error("the list looks complete")
	}
	if !strings.Contains(string(tail), `{"error":{"code":4,`) || !strings.Contains(string(tail), `"deadline"`) {
		t.Errorf("the last line is no error: %q", tail)
	}
}

func TestConnectionThatSaysNothingIsClosed(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.HeaderTimeout = 100 * time.Millisecond })
	w.run(t)
	h, g := w.Addresses()
	for what, c := range map[string]net.Conn{
		"http silent": dialRaw(t, h, ""), "http half": dialRaw(t, h, "GET / HTTP/1.1\r\nHost: loc"), "grpc silent": dialRaw(t, g, ""),
	} {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
			t.Errorf("%s: still open", what)
		}
	}
}

// TestBodyThatStopsIsCutOff: a body that does not come is waited for as long as a request may take, whether somebody reads it or
// the request was refused before, which is told all the same, and its connection ends then.
func TestBodyThatStopsIsCutOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, d *Deps) {
		c.Limits.RequestTimeout, c.Limits.StallTimeout = 300*time.Millisecond, 100*time.Millisecond
		d.Pages = http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
			if _, err := io.ReadAll(r.Body); err != nil {
				rw.WriteHeader(http.StatusBadRequest)
			}
		})
	})
	w.run(t)
	h, _ := w.Addresses()
	const head = " HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n"
	for want, ask := range map[string]string{
		"504": "PUT /api/v1/devices/" + string(lampA) + "/resources/light/1" + head + "Authorization: Bearer alice\r\n\r\n{",
		"401": "PUT /api/v1/devices/" + string(lampA) + "/resources/light/1" + head + "\r\n{",
		"400": "POST /page" + head + "\r\n{",
	} {
		c := dialRaw(t, h, ask)
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		b, err := io.ReadAll(c)
		if err != nil || !strings.HasPrefix(string(b), "HTTP/1.1 "+want) {
			t.Errorf("want %s and the end, got %.60q, %v", want, b, err)
		}
	}
	// One that comes in time leaves the connection to the next request.
	c := dialRaw(t, h, "POST /page"+head+"\r\n"+strings.Repeat("1", 100))
	answers := bufio.NewReader(c)
	for i := range 2 {
		_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
		resp, err := http.ReadResponse(answers, nil)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("request %d: %v, %v", i, resp, err)
		}
		_ = resp.Body.Close()
		_, _ = io.WriteString(c, "GET /page HTTP/1.1\r\nHost: localhost\r\n\r\n")
	}
}

// TestCallThatSendsNothingEnds: a call whose one message does not come is waited for as long as a request may take.
func TestCallThatSendsNothingEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.RequestTimeout = 300 * time.Millisecond })
	w.run(t)
	_, g := w.Addresses()
	conn, err := grpc.NewClient(g.String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for _, method := range []string{
		pb.GrpcGateway_GetHubConfiguration_FullMethodName, pb.GrpcGateway_UpdateResource_FullMethodName,
		pb.GrpcGateway_GetDevices_FullMethodName, grpc_health_v1.Health_Check_FullMethodName,
		"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
	} {
		ctx := metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer alice")
		s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.RecvMsg(&pb.HubConfigurationResponse{}); status.Code(err) != codes.DeadlineExceeded || ctx.Err() != nil {
			t.Errorf("%s: %v", method, err)
		}
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	t.Parallel()
	const ask = "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
	for name, begin := range map[string]string{
		"request": ask,
		"WebSocket": "GET /api/v1/ws/events HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer alice\r\nConnection: Upgrade\r\n" +
			"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n", // RFC 6455, Section 1.3
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.MaxConnections = 1 })
			w.run(t)
			h, _ := w.Addresses()
			first := dialRaw(t, h, begin)
			if line, err := bufio.NewReader(first).ReadString('\n'); err != nil || !strings.HasPrefix(line, "HTTP/1.1 200") && !strings.HasPrefix(line, "HTTP/1.1 101") {
				t.Fatalf("%q, %v", line, err)
			}
			second := dialRaw(t, h, ask)
			_ = second.SetReadDeadline(time.Now().Add(100 * time.Millisecond))
			if n, err := second.Read(make([]byte, 1)); err == nil {
				t.Fatalf("a second connection was answered: %d", n)
			}
			_ = first.Close()
			_ = second.SetReadDeadline(time.Now().Add(20 * time.Second))
			line, err := bufio.NewReader(second).ReadString('\n')
			if err != nil || !strings.HasPrefix(line, "HTTP/1.1 200") {
				t.Errorf("after the first ended: %q, %v", line, err)
			}
		})
	}
}

func TestLargeHeadIsRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	h, _ := w.Addresses()
	c := dialRaw(t, h, "GET /api/v1/devices?x="+strings.Repeat("a", 80<<10)+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
	line, _ := bufio.NewReader(c).ReadString('\n')
	if !strings.Contains(line, "431") && !strings.Contains(line, "414") {
		t.Errorf("answered %q", line)
	}
}

// An address that is not loopback is served over TLS alone. The listener of the test is on loopback all the same.
func TestOtherAddressesAreTLS(t *testing.T) {
	t.Parallel()
	cert := httptest.NewTLSServer(nil) // for its certificate
	cert.Close()
	w := newWorld(t, func(c *Config, d *Deps) {
		c.API.HTTP.Address, c.API.GRPC.Address = "192.0.2.1:443", "192.0.2.1:444" // RFC 5737
		d.TLS = &tls.Config{Certificates: cert.TLS.Certificates, MinVersion: tls.VersionTLS12}
		d.Listen = func(ctx context.Context, _ string) (net.Listener, error) {
			return new(net.ListenConfig).Listen(ctx, "tcp", "127.0.0.1:0")
		}
	})
	w.run(t)
	h, g := w.Addresses()
	roots := x509.NewCertPool()
	roots.AddCert(cert.Certificate())
	client := &tls.Config{RootCAs: roots, ServerName: "example.com", MinVersion: tls.VersionTLS12}
	tr := &http.Transport{TLSClientConfig: client, ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), "GET", "https://"+h.String()+"/.well-known/configuration", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := tr.RoundTrip(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	want(t, "status", resp.StatusCode, 200)
	want(t, "protocol", resp.Proto, "HTTP/2.0")
	conn, err := grpc.NewClient(g.String(), grpc.WithTransportCredentials(credentials.NewTLS(client)))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	if _, err := pb.NewGrpcGatewayClient(conn).GetHubConfiguration(as(t, ""), &pb.HubConfigurationRequest{}); err != nil {
		t.Error(err)
	}
	c := dialRaw(t, h, "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n") // plain
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second))
	line, _ := bufio.NewReader(c).ReadString('\n')
	if strings.Contains(line, " 200 ") {
		t.Errorf("plain HTTP was answered: %q", line)
	}
}
