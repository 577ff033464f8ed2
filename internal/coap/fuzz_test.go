package coap

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"
)

// Frames as devices sent them, and the edges of each length class.
var seedFrames = []string{
	"41e10123100000", "0000", "0200aa05", "02e2aa01", "12e2aa0220", "02e4aa03", "02e5aa04",
	"7301d00047b36f6963027264", "9301d000479101236f6963027264", "b301d00048b36f6963027264e106e801",
	"d30501d00049b36f6963027264622710e206e30800420800", "7001b36f6963027264",
	"d34102d0004ab36f6963027264122710d1020affa3626469782464303030303030302d303030302d343030302d383030302d3030303030303030303030326374746c00656c696e6b7381a46170a162626d036269",
	"a345d00047c22710ffa16373656c00", "09", "f0ffffffffff", "f00005000001", "e0ffff45", "d8ff45", "10e110", "1001ff", "10011f",
}

func FuzzFrame(f *testing.F) {
	for _, s := range seedFrames {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		h, ok, err := parseHeader(b)
		if err != nil || !ok {
			if ok {
				t.Fatal("an error and a header")
			}
			return
		}
		if h.size < 2 || h.size > maxHeader || h.tkl < 0 || h.tkl > maxToken || h.body < 0 {
			t.Fatalf("header %+v", h)
		}
		if h.whole() > len(b) {
			return
		}
		start := h.size + h.tkl
		opts, payload, fault, err := decodeBody(b[start:h.whole()], nil, false)
		if err != nil || fault.bad() || fault.hops { // what is wrong with Hop-Limit may be its length, and then it is gone
			return
		}
		// What was understood can be written and read again; it is never longer than what came.
		m := &Message{Code: h.code, Token: b[h.size:start], Options: opts, Payload: payload}
		out := appendFrame(nil, m)
		if len(out) != frameSize(m) || len(out) > h.whole() {
			t.Fatalf("%d bytes for %d, frameSize says %d", len(out), h.whole(), frameSize(m))
		}
		again, ok, err := parseHeader(out)
		if !ok || err != nil || again.code != h.code || again.tkl != h.tkl {
			t.Fatalf("%+v became %+v", h, again)
		}
		o2, p2, f2, err := decodeBody(out[again.size+again.tkl:], nil, false)
		if err != nil || f2 != fault || describe(o2) != describe(opts) || !bytes.Equal(p2, payload) {
			t.Fatalf("%s %x became %s %x", describe(opts), payload, describe(o2), p2)
		}
	})
}

func FuzzOptions(f *testing.F) {
	for _, s := range []string{"", "b36f6963027264", "9101236f6963", "e106f30041 00", "d304010203", "ff", "ff01", "f100", "1f", "b5", "e0ffff", "d11661", "c1320132"} {
		f.Add(unhex(f, s), false)
		f.Add(unhex(f, s), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, signal bool) {
		opts, payload, fault, err := decodeBody(b, nil, signal)
		if err != nil {
			if opts != nil || payload != nil {
				t.Fatal("an error and a result")
			}
			return
		}
		if len(opts) > maxOptions || payload != nil && len(payload) == 0 {
			t.Fatalf("%d options, payload %v", len(opts), payload)
		}
		last, total := message.OptionID(0), len(payload)
		for _, o := range opts {
			if o.ID < last {
				t.Fatal("options out of order")
			}
			if d, known := definitions[o.ID]; !signal && (known && (len(o.Value) < d.min || len(o.Value) > d.max || o.ID == last && last != 0 && !d.repeat) || !known && o.ID&1 == 1) {
				t.Fatalf("option %d with %d bytes was let through", o.ID, len(o.Value))
			}
			last = o.ID
			total += len(o.Value)
		}
		if total > len(b) || signal && fault.option != 0 {
			t.Fatalf("%d bytes out of %d", total, len(b))
		}
		m := &Message{Options: opts, Payload: payload}
		Path(m)
		Queries(m)
		ContentFormat(m)
		Accept(m)
		ETags(m)
		cacheKey(m)
	})
}

// FuzzBlockwise feeds a connection arbitrary bytes, seeded with transfers in both directions, while the engine is a client
// on the same connection. Nothing may panic, nothing may outlive the connection, and no bound may be exceeded.
func FuzzBlockwise(f *testing.F) {
	block1 := func(num uint32, more bool, szx uint8, n int) []byte {
		m := post("/up", make([]byte, n))
		m.Options = AddOption(m.Options, Block1, block{num, more, szx}.value())
		return appendFrame(nil, m)
	}
	block2 := func(num uint32, szx uint8) []byte {
		m := get("/big")
		m.Options = AddOption(m.Options, Block2, block{num, false, szx}.value())
		return appendFrame(nil, m)
	}
	answer := func(num uint32, more bool, observe bool) []byte {
		m := &Message{Code: codes.Content, Token: make([]byte, 8), Payload: make([]byte, 16)}
		m.Token[7] = 1
		if observe {
			m.Options = AddUint(m.Options, ObserveOption, 1)
		}
		m.Options = AddOption(m.Options, Block2, block{num, more, 0}.value())
		return appendFrame(nil, m)
	}
	f.Add(bytes.Join([][]byte{block1(0, true, 6, 1024), block1(1, true, 6, 1024), block1(2, false, 6, 7)}, nil))
	f.Add(bytes.Join([][]byte{block1(0, true, 7, 4096), block1(9, false, 7, 7)}, nil))
	f.Add(bytes.Join([][]byte{block2(0, 6), block2(1, 6), block2(2, 2), block2(1<<19, 6)}, nil))
	f.Add(bytes.Join([][]byte{answer(0, true, true), answer(1, true, false), answer(0, true, true)}, nil))
	f.Add(bytes.Join([][]byte{unhex(f, "41e10123100000"), block2(0, 7), unhex(f, "20e122"), block2(1, 7)}, nil))
	for _, s := range seedFrames {
		f.Add(unhex(f, s))
	}
	log := slog.New(slog.DiscardHandler)
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg := DefaultConfig()
		cfg.MaxBuffered, cfg.MaxBody, cfg.MaxMessageSize = 40_000, 8<<10, 16<<10
		cfg.CloseTimeout = 50 * time.Millisecond
		metrics := NewMetrics(prometheus.NewRegistry())
		got := make(chan struct{})
		h := handlerFuncs{
			open: func(c *Conn) error {
				c.nextToken.Store(0) // known to the seeds
				go func() {
					defer close(got)
					ctx, cancel := context.WithTimeout(c.Context(), time.Second)
					defer cancel()
					if o, m, err := c.Observe(ctx, get("/o")); err == nil && (m == nil || len(m.Payload) > cfg.MaxBody || o != nil && o.Path() != "/o") {
						t.Errorf("observation %v, answer %v", o, m)
					}
				}()
				return nil
			},
			request: func(_ context.Context, m *Message) Response {
				if len(m.Payload) > cfg.MaxBody {
					t.Errorf("a body of %d bytes", len(m.Payload))
				}
				return Response{Code: codes.Content, Payload: make([]byte, 3000)}
			},
			notifications: func(_ context.Context, ns []Notification) {
				for _, n := range ns {
					if n.Observation == nil || n.Message == nil {
						t.Error("an empty notification")
					}
				}
			},
		}
		srv := NewServer(cfg, h, log, metrics)
		ln := newSimListener()
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- srv.ServeTCP(ctx, ln, nil) }()
		c := ln.dial(0, 1<<20)
		go func() {
			_, _ = c.Write(b)
			_ = c.CloseWrite()
		}()
		_, _ = io.Copy(io.Discard, net.Conn(c))
		_ = c.Close()
		<-got
		cancel()
		if err := <-done; err != nil {
			t.Fatal(err)
		}
		srv.budget.mu.Lock()
		defer srv.budget.mu.Unlock()
		if srv.budget.left != cfg.MaxBuffered {
			t.Fatalf("%d bytes of the budget are missing", cfg.MaxBuffered-srv.budget.left)
		}
	})
}
