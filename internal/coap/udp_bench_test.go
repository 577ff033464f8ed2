package coap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/mux"
	coapnet "github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/udp"
)

// startGoCoAPUDP starts go-coap's server, which echoes.
func startGoCoAPUDP(tb testing.TB) string {
	tb.Helper()
	ln, err := coapnet.NewListenUDP("udp4", "127.0.0.1:0")
	if err != nil {
		tb.Fatal(err)
	}
	router := mux.NewRouter()
	_ = router.Handle("/echo", mux.HandlerFunc(func(w mux.ResponseWriter, r *mux.Message) {
		body, _ := io.ReadAll(r.Body())
		_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(body))
	}))
	srv := udp.NewServer(options.WithMux(router), options.WithPeriodicRunner(func(func(time.Time) bool) {}))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(ln) }()
	tb.Cleanup(func() {
		srv.Stop()
		_ = ln.Close()
		<-done
	})
	return ln.LocalAddr().String()
}

func echoBody() handlerFuncs {
	return handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: m.Payload}
	}}
}

// udpExchange sends one request and reads the answer; pings are rejected, as clients do.
func udpExchange(tb testing.TB, c net.Conn, req []byte) {
	tb.Helper()
	b := make([]byte, 2000)
	for try := 0; ; try++ {
		if _, err := c.Write(req); err != nil {
			tb.Fatal(err)
		}
		_ = c.SetReadDeadline(time.Now().Add(time.Second))
		for {
			n, err := c.Read(b)
			if errors.Is(err, os.ErrDeadlineExceeded) && try < 10 {
				break
			}
			if err != nil {
				tb.Fatal(err)
			}
			p, err := parsePacket(b[:n])
			if err != nil {
				tb.Fatal(err)
			}
			if p.typ == confirmable && p.code == codes.Empty {
				_, _ = c.Write(emptyPacket(reset, p.id))
			} else if p.code>>5 == 2 {
				return
			}
		}
	}
}

// echoUDP keeps a window of confirmable requests under way and counts the answers.
func echoUDP(b *testing.B, addr string) {
	const window = 32
	c, err := net.Dial("udp", addr)
	if err != nil {
		b.Fatal(err)
	}
	defer c.Close()
	req := appendPacket(nil, confirmable, 0, post("/echo", make([]byte, 90)))
	udpExchange(b, c, req)
	id := uint16(1)
	in := make([]byte, 2000)
	b.ReportAllocs()
	b.ResetTimer()
	lost := 0
	for left := b.N; left > 0; left -= window {
		n := min(left, window)
		for range n {
			id++
			binary.BigEndian.PutUint16(req[2:], id)
			if _, err := c.Write(req); err != nil {
				b.Fatal(err)
			}
		}
		for got := 0; got < n; {
			_ = c.SetReadDeadline(time.Now().Add(time.Second))
			m, err := c.Read(in)
			if err != nil {
				lost++ // a socket's buffer was full
				break
			}
			if p, _ := parsePacket(in[:m]); p.code == codes.Empty {
				_, _ = c.Write(emptyPacket(reset, p.id))
			} else {
				got++
			}
		}
	}
	b.ReportMetric(float64(lost), "lost-windows")
}

// BenchmarkEchoUDP compares the two servers in one run: go test -bench EchoUDP -count 5.
func BenchmarkEchoUDP(b *testing.B) {
	b.Run("coaphub", func(b *testing.B) {
		addr, _ := listenUDP(b, echoBody(), "127.0.0.1:0", nil)
		echoUDP(b, addr)
	})
	b.Run("go-coap", func(b *testing.B) { echoUDP(b, startGoCoAPUDP(b)) })
}

// idleUDP opens n sessions, each with one exchange, and returns what each costs in bytes of heap and stack, with its client's
// socket, and in goroutines.
func idleUDP(tb testing.TB, addr string, n int, later func()) (bytes, goroutines float64) {
	tb.Helper()
	measure := func() (uint64, int) {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse, runtime.NumGoroutine()
	}
	before, running := measure()
	conns := make([]net.Conn, n)
	for i := range conns {
		c, err := net.Dial("udp", addr)
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { _ = c.Close() })
		conns[i] = c
		udpExchange(tb, c, appendPacket(nil, confirmable, 1, post("/echo", make([]byte, 90))))
	}
	later()
	after, now := measure()
	return float64(after-before) / float64(n), float64(now-running) / float64(n)
}

// BenchmarkIdleUDP reports the cost of an idle session, with its client's bare socket: right after its exchange, and when its
// duplicates have been forgotten.
func BenchmarkIdleUDP(b *testing.B) {
	const n = 1000
	b.Run("coaphub", func(b *testing.B) {
		for b.Loop() {
			addr, _ := listenUDP(b, echoBody(), "127.0.0.1:0", nil)
			size, routines := idleUDP(b, addr, n, func() {})
			b.ReportMetric(size, "B/session")
			b.ReportMetric(routines, "goroutines/session")
		}
	})
	b.Run("go-coap", func(b *testing.B) {
		for b.Loop() {
			size, routines := idleUDP(b, startGoCoAPUDP(b), n, func() {})
			b.ReportMetric(size, "B/session")
			b.ReportMetric(routines, "goroutines/session")
		}
	})
}

// TestIdleSessionCost watches that an idle session has no goroutine and little memory. The bound is generous, for the race
// detector's sake, and has the client's socket in it.
func TestIdleSessionCost(t *testing.T) {
	const n = 200
	addr, _ := listenUDP(t, echoBody(), "127.0.0.1:0", nil)
	size, routines := idleUDP(t, addr, n, func() {})
	if size > 24<<10 {
		t.Errorf("an idle session costs %.0f bytes", size)
	}
	if routines > 0.1 {
		t.Errorf("an idle session costs %.2f goroutines", routines)
	}
}
