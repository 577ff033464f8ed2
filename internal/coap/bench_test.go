package coap

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"
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

// BenchmarkDecode is what one notification costs before anybody looks at it: framing, options and payload.
func BenchmarkDecode(b *testing.B) {
	m := &Message{
		Code: codes.Content, Token: make([]byte, 8), Options: AddUint(AddUint(nil, ObserveOption, 5), ContentFormatOpt, 10000), Payload: make([]byte, 90),
	}
	b.Run("tcp", func(b *testing.B) {
		frame := appendFrame(nil, m)
		b.ReportAllocs()
		for b.Loop() {
			h, _, _ := parseHeader(frame)
			in := &inbound{Message: Message{Code: h.code, Token: frame[h.size : h.size+h.tkl]}}
			in.Options, in.Payload, _, _ = decodeBody(frame[h.size+h.tkl:], in.room[:0], false)
		}
	})
	b.Run("udp", func(b *testing.B) {
		datagram := appendPacket(nil, confirmable, 1, m)
		b.ReportAllocs()
		for b.Loop() {
			p, err := parsePacket(datagram)
			if err != nil {
				b.Fatal(err)
			}
			if _, _, err := decodePacket(p); err != nil {
				b.Fatal(err)
			}
		}
	})
}
