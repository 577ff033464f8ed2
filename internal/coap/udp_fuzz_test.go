package coap

import (
	"bytes"
	"context"
	"encoding/binary"
	"log/slog"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/internal/coap/simnet"
)

var seedDatagrams = []string{
	"400107d2b161", "48010001a1a2a3a4a5a6a7a8b36f6963027264", "500107d2", "40000001", "60000001", "70000001", "410107d27f", "4f010001",
	"6245000211", "420100021122b36f6963ff00", "80010001", "40e10001", "5145000a0b", "44050003deadbeefb5666574636839ff7b7d",
	"40020005b2757021d10706", "40020005b2757021d1070eff41414141414141414141414141414141", "41450006016023416f", "40010007c10160",
}

// FuzzPacket checks the decoder of datagrams: what it takes can be written again, and means the same.
func FuzzPacket(f *testing.F) {
	for _, s := range seedDatagrams {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		p, err := parsePacket(b)
		if err != nil {
			return
		}
		if p.tkl > maxToken || p.tkl > len(p.body) || p.typ == reset && p.code != codes.Empty || p.code>>5 == 7 {
			t.Fatalf("%+v", p)
		}
		m, fault, err := decodePacket(p)
		if err != nil || fault.bad() {
			return
		}
		out := appendPacket(nil, p.typ, p.id, m)
		if len(out) > len(b) || len(out) != (&datagram{}).size(m) {
			t.Fatalf("%d bytes for %d", len(out), len(b))
		}
		again, err := parsePacket(out)
		if err != nil {
			t.Fatal(err)
		}
		m2, _, err := decodePacket(again)
		if err != nil || again.typ != p.typ || again.id != p.id || m2.Code != m.Code || !bytes.Equal(m2.Token, m.Token) ||
			describe(m2.Options) != describe(m.Options) || !bytes.Equal(m2.Payload, m.Payload) {
			t.Fatalf("%x became %x: %v", b, out, err)
		}
	})
}

// FuzzDatagrams plays whole sequences to a session that has requests, an observation and transfers under way: pieces of two
// bytes of length and a datagram, in which IDs and tokens of ours can be named by the placeholders fe01 and fe02; a length of
// zero lets time pass. Whatever comes, the session is there afterwards and answers, nothing grows, and nothing is kept.
func FuzzDatagrams(f *testing.F) {
	sequence := func(datagrams ...string) (b []byte) {
		for _, s := range datagrams {
			d := unhex(f, s)
			b = binary.BigEndian.AppendUint16(b, uint16(len(d))) //nolint:gosec // short
			b = append(b, d...)
		}
		return b
	}
	f.Add(sequence(seedDatagrams...))
	f.Add(sequence("6045fe01", "6845fe01fe02fe02fe02fe02", "", "4845000afe02fe02fe02fe026101ff31", "70000000"))
	f.Add(sequence("40020001b27570d1070eff41414141414141414141414141414141", "", "40020002b27570d1071eff41414141414141414141414141414141"))
	f.Fuzz(func(t *testing.T, b []byte) {
		synctest.Test(t, func(t *testing.T) {
			cfg := DefaultConfig()
			cfg.MaxBody, cfg.MaxBuffered, cfg.QueueLength, cfg.MaxDuplicates = 4<<10, 1<<20, 20, 20
			conns := make(chan *Conn, 10)
			srv := NewServer(cfg, handlerFuncs{open: func(c *Conn) error { conns <- c; return nil }}, slog.New(slog.DiscardHandler), NewMetrics(nil))
			network := simnet.New(1, nil)
			pc, err := network.Listen(hubAddr)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			served := make(chan error, 1)
			go func() { served <- srv.ServeUDP(ctx, pc) }()
			s := &udpSim{net: network, sim: &sim{t: t, conns: conns}}
			p := s.device(t, deviceAddr)
			c := s.begin(t, p)
			short, stop := context.WithTimeout(ctx, time.Minute)
			asked, observed := do(c, short, get("/light")), observe(c, short, "/tick")

			for range 200 {
				if len(b) < 2 {
					break
				}
				n := int(binary.BigEndian.Uint16(b))
				n = min(n, len(b)-2)
				d := bytes.Clone(b[2 : 2+n])
				b = b[2+n:]
				if n == 0 {
					<-time.After(3 * time.Second)
					continue
				}
				c.dg.mu.Lock()
				if len(c.dg.sent) > 0 {
					t := c.dg.sent[0]
					d = bytes.ReplaceAll(d, []byte{0xfe, 1}, binary.BigEndian.AppendUint16(nil, t.id))
					if len(t.token) == 8 {
						d = bytes.ReplaceAll(d, []byte{0xfe, 2, 0xfe, 2, 0xfe, 2, 0xfe, 2}, []byte(t.token))
					}
				}
				c.dg.mu.Unlock()
				p.raw(d)
				synctest.Wait()
			}
			<-asked
			<-observed
			stop()
			<-time.After(6 * time.Minute)
			for { // what it said
				_ = p.conn.SetReadDeadline(time.Now().Add(time.Millisecond))
				if _, _, err := p.conn.ReadFrom(make([]byte, maxUDP)); err != nil {
					break
				}
			}
			if p.id += 20000; len(conns) != 0 {
				t.Fatal("another session began")
			}
			p.raw(appendPacket(nil, confirmable, p.id, get("/still")))
			if m := p.read(acknowledgement); m.id != p.id || string(m.Payload) != "/still" {
				t.Fatalf("%s", m)
			}
			c.dg.mu.Lock()
			if n := len(c.dg.rx.order); n > 1 || len(c.dg.sent) > 0 {
				t.Errorf("%d messages are remembered, %d under way", n, len(c.dg.sent))
			}
			c.dg.mu.Unlock()
			cancel()
			if err := <-served; err != nil {
				t.Fatal(err)
			}
			if srv.budget.left != cfg.MaxBuffered {
				t.Fatalf("%d bytes never came back", cfg.MaxBuffered-srv.budget.left)
			}
		})
	})
}
