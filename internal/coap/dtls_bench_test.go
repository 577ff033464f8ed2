package coap

import (
	"bytes"
	"context"
	"net"
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
)

func benchDTLS(b *testing.B, h handlerFuncs) string {
	b.Helper()
	conf := DefaultDTLSConfig()
	conf.PSK = func(context.Context, []byte) ([]byte, error) { return testKey, nil }
	conf.MaxPerPrefix = conf.MaxHandshakes
	return listenDTLS(b, h, conf)
}

func benchDial(b *testing.B, addr string, cid bool) *dtlsDevice {
	b.Helper()
	to, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		b.Fatal(err)
	}
	sock, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	d, err := shakeWith(b, sock, to, pskOptions("lamp", testKey, cid)...)
	if err != nil {
		b.Fatal(err)
	}
	return d
}

// echoDTLS keeps a window of confirmable requests under way and counts the answers.
func echoDTLS(b *testing.B, d *dtlsDevice) {
	const window = 16
	buf := make([]byte, 2048)
	req := get("/light")
	b.ReportAllocs()
	b.ResetTimer()
	sent, done := 0, 0
	for done < b.N {
		for sent < b.N && sent-done < window {
			d.send(appendPacket(nil, confirmable, uint16(sent), req)) //nolint:gosec // wraps
			sent++
		}
		_ = d.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := d.conn.Read(buf); err != nil {
			b.Fatal(err)
		}
		done++
	}
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
}

func BenchmarkDTLSEcho(b *testing.B) {
	body := []byte("0123456789")
	b.Run("engine", func(b *testing.B) {
		addr := benchDTLS(b, handlerFuncs{request: func(context.Context, *Message) Response {
			return Response{Code: codes.Content, Payload: body}
		}})
		d := benchDial(b, addr, false)
		defer d.close()
		echoDTLS(b, d)
	})
	b.Run("go-coap", func(b *testing.B) {
		d := benchDial(b, goCoapDTLS(b), false)
		defer d.close()
		echoDTLS(b, d)
	})
}

func goCoapDTLS(b *testing.B) string {
	b.Helper()
	ln, err := coapnet.NewDTLSListener("udp4", "127.0.0.1:0", coapnet.NewDTLSServerOptions(
		dtls.WithPSK(func([]byte) ([]byte, error) { return testKey, nil }), dtls.WithCipherSuites(pskSuites...),
	))
	if err != nil {
		b.Fatal(err)
	}
	router := mux.NewRouter()
	_ = router.Handle("/light", mux.HandlerFunc(func(w mux.ResponseWriter, _ *mux.Message) {
		_ = w.SetResponse(codes.Content, message.AppOctets, bytes.NewReader([]byte("0123456789")))
	}))
	srv := godtls.NewServer(options.WithMux(router), options.WithPeriodicRunner(func(func(time.Time) bool) {}))
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }()
	b.Cleanup(func() {
		srv.Stop()
		_ = ln.Close()
		<-served
	})
	return ln.Addr().String()
}

// BenchmarkDTLSHandshake makes an association and says nothing; both ends are in this process.
func BenchmarkDTLSHandshake(b *testing.B) {
	addr := benchDTLS(b, handlerFuncs{})
	b.ReportAllocs()
	for range b.N {
		benchDial(b, addr, true).close()
	}
}

// BenchmarkDTLSIdle tells what an idle association costs the engine: the clients are counted first, at the same time.
func BenchmarkDTLSIdle(b *testing.B) {
	addr := benchDTLS(b, handlerFuncs{})
	for range b.N {
		const n = 500
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		goroutines := runtime.NumGoroutine()
		var all []*dtlsDevice
		for range n {
			d := benchDial(b, addr, true)
			d.ask("/a")
			all = append(all, d)
		}
		t := time.NewTimer(3 * drainPause)
		<-t.C
		runtime.GC()
		runtime.ReadMemStats(&after)
		b.ReportMetric(float64(after.HeapInuse+after.StackInuse-before.HeapInuse-before.StackInuse)/n, "B/pair")
		b.ReportMetric(float64(runtime.NumGoroutine()-goroutines)/n, "goroutines/pair")
		for _, d := range all {
			d.close()
		}
	}
}
