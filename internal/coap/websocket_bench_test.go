package coap

import (
	"bufio"
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"
)

// startPlainWeb starts an engine behind an HTTP server on loopback.
func startPlainWeb(tb testing.TB, h handlerFuncs) (addr string) {
	tb.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	srv := NewServer(DefaultConfig(), h, slog.New(slog.DiscardHandler), NewMetrics(prometheus.NewRegistry()))
	tb.Cleanup(serveWebSocket(tb, srv, ln))
	return ln.Addr().String()
}

// dialWeb opens a WebSocket and reads the engine's CSM.
func dialWeb(tb testing.TB, addr string) webPeer {
	tb.Helper()
	c, err := net.Dial("tcp", addr)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	p := webPeer{&peer{t: tb, Conn: c, r: bufio.NewReaderSize(c, 64<<10)}}
	p.raw([]byte(opening))
	if res, err := http.ReadResponse(p.r, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
		tb.Fatalf("%v, %v", res, err)
	}
	wantMessage(tb, p, codes.CSM)
	return p
}

func wantMessage(tb testing.TB, p webPeer, want codes.Code) {
	tb.Helper()
	if m := p.read(); m.Code != want {
		tb.Fatalf("%v, want %v", m.Code, want)
	}
}

// BenchmarkEchoWebSocket is BenchmarkEchoTLS without TLS and over WebSocket.
func BenchmarkEchoWebSocket(b *testing.B) {
	addr := startPlainWeb(b, handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: m.Payload}
	}})
	p := dialWeb(b, addr)
	const window = 64
	req := masked(0x82, body(post("/echo", make([]byte, 90))))
	burst := bytes.Repeat(req, window)
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= window {
		n := min(left, window)
		p.raw(burst[:n*len(req)])
		for range n {
			head, err := p.r.Peek(2)
			if err == nil {
				_, err = p.r.Discard(2 + int(head[1])) // none is over 125 bytes
			}
			if err != nil {
				b.Fatal(err)
			}
		}
	}
}

// An idle WebSocket costs what an idle TCP connection does: one goroutine and no buffer of the HTTP server's.
func TestWebSocketIdleCost(t *testing.T) {
	const n = 100
	measure := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
	}
	addr := startPlainWeb(t, handlerFuncs{})
	dialWeb(t, addr) // what comes once
	before, goroutines := measure(), runtime.NumGoroutine()
	for range n {
		p := dialWeb(t, addr)
		p.send(get("/a"))
		wantMessage(t, p, codes.Content)
		p.r = nil // the client's share is not asked about
	}
	// HTTP's goroutines, and the workers, may be on their way out.
	deadline := time.Now().Add(10 * time.Second)
	for runtime.NumGoroutine() > goroutines+n {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines for %d idle connections", runtime.NumGoroutine()-goroutines, n)
		}
		runtime.Gosched()
	}
	cost := float64(measure()-before) / n
	t.Logf("%.0f bytes", cost)
	if cost > 32<<10 { // generous, for the race detector's sake
		t.Errorf("an idle connection costs %.0f bytes with its client", cost)
	}
}
