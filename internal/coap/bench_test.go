package coap

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/mux"
	coapnet "github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
)

// benchPeer is a client that costs as little as possible, so that what is measured is the server.
type benchPeer struct {
	*tls.Conn
	r *bufio.Reader
}

func dialBench(tb testing.TB, addr string, conf *tls.Config) *benchPeer {
	tb.Helper()
	c, err := tls.Dial("tcp", addr, conf)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { _ = c.Close() })
	return &benchPeer{c, bufio.NewReaderSize(c, 64<<10)}
}

// skip reads one message and returns its code and token without looking at the rest.
func (p *benchPeer) skip(tb testing.TB) (codes.Code, [8]byte) {
	var tok [8]byte
	b, err := p.r.Peek(2)
	for n := 2; err == nil; n++ {
		h, ok, _ := parseHeader(b)
		if ok {
			if b, err = p.r.Peek(h.size + h.tkl); err != nil {
				break
			}
			copy(tok[:], b[h.size:])
			if _, err = p.r.Discard(h.whole()); err != nil {
				break
			}
			return h.code, tok
		}
		b, err = p.r.Peek(n + 1)
	}
	tb.Fatal(err)
	return 0, tok
}

// echo sends b.N requests, many at a time, and reads the answers.
func echo(b *testing.B, p *benchPeer) {
	const window = 64
	req := appendFrame(nil, post("/echo", make([]byte, 90)))
	burst := bytes.Repeat(req, window)
	b.ReportAllocs()
	b.ResetTimer()
	for left := b.N; left > 0; left -= window {
		n := min(left, window)
		if _, err := p.Write(burst[:n*len(req)]); err != nil {
			b.Fatal(err)
		}
		for got := 0; got < n; {
			if code, _ := p.skip(b); code>>5 == 2 {
				got++
			}
		}
	}
}

// BenchmarkEchoTLS compares the two servers in one run: go test -bench EchoTLS -count 5.
func BenchmarkEchoTLS(b *testing.B) {
	server, device := testTLS(b)
	b.Run("coaphub", func(b *testing.B) {
		addr, _, _ := startTCP(b, handlerFuncs{request: func(_ context.Context, m *Message) Response {
			return Response{Code: codes.Content, Payload: m.Payload}
		}}, server, nil)
		echo(b, dialBench(b, addr, device))
	})
	b.Run("go-coap", func(b *testing.B) {
		ln, err := coapnet.NewTLSListener("tcp", "127.0.0.1:0", server)
		if err != nil {
			b.Fatal(err)
		}
		router := mux.NewRouter()
		_ = router.Handle("/echo", mux.HandlerFunc(func(w mux.ResponseWriter, r *mux.Message) {
			body, _ := io.ReadAll(r.Body())
			_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader(body))
		}))
		srv := tcp.NewServer(options.WithMux(router), options.WithPeriodicRunner(func(func(time.Time) bool) {}))
		done := make(chan error, 1)
		go func() { done <- srv.Serve(ln) }()
		b.Cleanup(func() {
			srv.Stop()
			_ = ln.Close()
			<-done
		})
		echo(b, dialBench(b, ln.Addr().String(), device))
	})
}

// BenchmarkNotifications is a device that notifies as fast as it can, over TLS.
func BenchmarkNotifications(b *testing.B) {
	server, device := testTLS(b)
	seen := make(chan int, 1<<16)
	addr, conns, _ := startTCP(b, handlerFuncs{notifications: func(_ context.Context, ns []Notification) { seen <- len(ns) }}, server, nil)
	p := dialBench(b, addr, device)
	c := <-conns
	registered := make(chan error, 1)
	go func() {
		_, _, err := c.Observe(context.Background(), get("/light"))
		registered <- err
	}()
	code, tok := p.skip(b)
	for code != codes.GET {
		code, tok = p.skip(b)
	}
	m := &Message{Code: codes.Content, Token: tok[:], Options: AddUint(AddUint(nil, ObserveOption, 5), ContentFormatOpt, 10000), Payload: make([]byte, 90)}
	frame := appendFrame(nil, m)
	if _, err := p.Write(frame); err != nil {
		b.Fatal(err)
	}
	if err := <-registered; err != nil {
		b.Fatal(err)
	}
	const burst = 20
	frames := bytes.Repeat(frame, burst)
	b.ReportAllocs()
	b.ResetTimer()
	go func() {
		for left := b.N; left > 0; left -= burst {
			if _, err := p.Write(frames[:min(left, burst)*len(frame)]); err != nil {
				return
			}
		}
	}()
	for got := 0; got < b.N; {
		got += <-seen
	}
}

// BenchmarkDecode is what one message costs before anybody looks at it.
func BenchmarkDecode(b *testing.B) {
	m := post("/oic/rd", make([]byte, 90)).with(ContentFormatOpt, 10000).with(OCFContentVersion, 2048)
	frame := appendFrame(nil, m)
	b.ReportAllocs()
	for b.Loop() {
		h, _, _ := parseHeader(frame)
		in := &inbound{}
		in.Options, in.Payload, _, _ = decodeBody(frame[h.size+h.tkl:], in.room[:0], false)
	}
}

// idleCost opens n connections, lets each say and hear something, and returns the bytes of heap and stack that each costs in
// this process, both ends together and the client's end alone.
func idleCost(tb testing.TB, n int) (both, client float64) {
	server, device := testTLS(tb)
	measure := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	addr, conns, _ := startTCP(tb, handlerFuncs{}, server, nil)
	before := measure()
	for range n {
		p := dialBench(tb, addr, device)
		if _, err := p.Write(appendFrame(nil, get("/a"))); err != nil {
			tb.Fatal(err)
		}
		for code := codes.Empty; code>>5 != 2; {
			code, _ = p.skip(tb)
		}
		p.r = nil
		<-conns
	}
	both = float64(measure()-before) / float64(n)

	// The same clients against a server that keeps nothing but the TLS connection.
	ln, err := tls.Listen("tcp", "127.0.0.1:0", server)
	if err != nil {
		tb.Fatal(err)
	}
	held := make(chan net.Conn, n)
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				close(held)
				return
			}
			go func() { _ = c.(*tls.Conn).Handshake(); held <- c }()
		}
	}()
	before = measure()
	var keep []net.Conn
	for range n {
		p := dialBench(tb, ln.Addr().String(), device)
		p.r = nil
		keep = append(keep, <-held)
	}
	client = float64(measure()-before) / float64(n)
	_ = ln.Close()
	for _, c := range keep {
		_ = c.Close()
	}
	return both, client
}

// BenchmarkIdle reports the bytes of an idle TLS connection: ours with its client, and two bare ends of crypto/tls.
func BenchmarkIdle(b *testing.B) {
	for b.Loop() {
		both, bare := idleCost(b, 300)
		b.ReportMetric(both, "B/conn-both-ends")
		b.ReportMetric(bare, "B/bare-tls-both-ends")
		b.ReportMetric(both-bare/2, "B/conn")
	}
}

// TestIdleConnectionCost watches what the memory target (40 KiB a connection) rests on: an idle connection has one goroutine
// and no large buffer. The bound is for both ends together and generous, for the race detector's sake.
func TestIdleConnectionCost(t *testing.T) {
	const n = 100
	before := runtime.NumGoroutine()
	both, _ := idleCost(t, n)
	if both > 96<<10 {
		t.Errorf("an idle connection costs %.0f bytes with its client", both)
	}
	// The engine's are still open, the bare ones are not; a worker may be on its way out.
	deadline := time.Now().Add(5 * time.Second)
	for runtime.NumGoroutine() > before+n+5 {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines for %d idle connections", runtime.NumGoroutine()-before, n)
		}
		runtime.Gosched()
	}
}
