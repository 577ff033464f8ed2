package coap

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/test/device"
)

// startWeb starts an engine behind an HTTPS server on loopback that speaks HTTP/2, too.
func startWeb(t *testing.T, h Handler) (addr string, conf *tls.Config) {
	t.Helper()
	srv := NewServer(DefaultConfig(), h, slog.New(slog.DiscardHandler), NewMetrics(prometheus.NewRegistry()))
	ws := srv.NewWebSocket(nil)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); ws.Serve(ctx, func() {}) }()
	hs := httptest.NewUnstartedServer(ws)
	hs.EnableHTTP2 = true
	hs.StartTLS()
	t.Cleanup(func() {
		cancel()
		<-done
		hs.Close()
	})
	roots := x509.NewCertPool()
	roots.AddCert(hs.Certificate())
	return hs.Listener.Addr().String(), &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

// TestGoCoAPClientWebSocket lets another implementation of CoAP ask over another implementation of WebSocket, inside TLS:
// large bodies both ways, observation, and the hub's own question.
func TestGoCoAPClientWebSocket(t *testing.T) {
	ts := newTestServer()
	addr, conf := startWeb(t, ts)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	raw, err := device.DialWebSocket(ctx, addr, conf)
	if err != nil {
		t.Fatal(err)
	}
	router := mux.NewRouter()
	large := pattern(100_000)
	if err := router.Handle("/large", mux.HandlerFunc(func(w mux.ResponseWriter, r *mux.Message) {
		_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(large))
	})); err != nil {
		t.Fatal(err)
	}
	cc, err := tcp.Client(raw, options.WithMux(router), options.WithMaxMessageSize(MaxBody), options.WithCloseSocket(),
		options.WithPeriodicRunner(func(func(time.Time) bool) {}))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = cc.Close()
		<-cc.Done()
	}()
	hubSide := <-ts.conns
	if info := hubSide.Info(); info.Host != addr || !info.Secure || info.TLS == nil || info.TLS.NegotiatedProtocol == "h2" {
		t.Errorf("%+v", info)
	}
	body := func(m *pool.Message, err error) string {
		t.Helper()
		return bodyOf(t, m, err)
	}
	if err := cc.Ping(ctx); err != nil {
		t.Fatal(err)
	}
	if got := body(cc.Get(ctx, "/large")); got != strings.Repeat("0123456789", 500) {
		t.Errorf("%d bytes", len(got))
	}
	body(cc.Put(ctx, "/large", message.AppOctets, bytes.NewReader(large)))
	if got := body(cc.Get(ctx, "/large")); got != string(large) {
		t.Errorf("%d of %d bytes came back", len(got), len(large))
	}
	ticks := make(chan string, 10)
	obs, err := cc.Observe(ctx, "/tick", func(m *pool.Message) { ticks <- body(m, nil) })
	if err != nil {
		t.Fatal(err)
	}
	o := <-ts.ticks
	for i, want := range []string{"tick 0", "tick 1", "tick 2"} {
		if i > 0 {
			if err := o.Notify(ctx, Response{Code: codes.Content, Payload: []byte(want)}); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case got := <-ticks:
			if got != want {
				t.Errorf("%q, want %q", got, want)
			}
		case <-ctx.Done():
			t.Fatalf("%s never came", want)
		}
	}
	if err := obs.Cancel(ctx); err != nil {
		t.Error(err)
	}
	m, err := hubSide.Do(ctx, get("/large"))
	if err != nil || !bytes.Equal(m.Payload, large) {
		t.Errorf("the hub's question: %v, %v", m, err)
	}
}

// Another implementation understands how we close, and is understood.
func TestWebSocketLibraryCloses(t *testing.T) {
	why := make(chan error, 2)
	h := handlerFuncs{closed: func(err error) { why <- err }}
	addr, conf := startWeb(t, h)
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf}}
	defer client.CloseIdleConnections()
	dial := func() *websocket.Conn {
		t.Helper()
		c, _, err := websocket.Dial(ctx, "wss://"+addr+WebSocketPath, &websocket.DialOptions{HTTPClient: client, Subprotocols: []string{"coap"}})
		if err != nil {
			t.Fatal(err)
		}
		if c.Subprotocol() != "coap" {
			t.Errorf("subprotocol %q", c.Subprotocol())
		}
		return c
	}
	c := dial()
	// Its Ping is answered, while it reads.
	read := make(chan error, 1)
	go func() {
		for {
			if _, _, err := c.Read(ctx); err != nil {
				read <- err
				return
			}
		}
	}()
	if err := c.Ping(ctx); err != nil {
		t.Error(err)
	}
	if err := c.Write(ctx, websocket.MessageText, []byte("hello")); err != nil {
		t.Fatal(err)
	}
	err := <-read
	var ce websocket.CloseError
	if !errors.As(err, &ce) || ce.Code != websocket.StatusUnsupportedData || ce.Reason != ErrMalformed.Error() {
		t.Errorf("after a text frame: %v", err)
	}
	wantReason(t, <-why, ErrMalformed)

	if err := dial().Close(4000, "done"); err != nil {
		t.Errorf("its own Close: %v", err)
	}
	if err := <-why; Reason(err) != "eof" {
		t.Errorf("its own Close ended the connection by %v", err)
	}
}

// RFC 8441 is not offered: over HTTP/2 the path says what it needs.
func TestWebSocketOverHTTP2(t *testing.T) {
	addr, conf := startWeb(t, handlerFuncs{})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: conf, ForceAttemptHTTP2: true}}
	defer client.CloseIdleConnections()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+addr+WebSocketPath, nil)
	if err != nil {
		t.Fatal(err)
	}
	res, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.ProtoMajor != 2 || res.StatusCode != http.StatusHTTPVersionNotSupported {
		t.Errorf("%s %s", res.Proto, res.Status)
	}
}
