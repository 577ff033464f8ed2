package coap

import (
	"bytes"
	"context"
	"encoding/binary"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
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

// datagrams writes what play reads: pieces of two bytes of length and a datagram.
func datagrams(ds ...[]byte) (b []byte) {
	for _, d := range ds {
		b = append(binary.BigEndian.AppendUint16(b, uint16(len(d))), d...) //nolint:gosec // short
	}
	return b
}

// ours and ourToken name, in a datagram that is played, the ID and token of the oldest message of ours that is not settled.
const ours, ourToken = 0xfe01, "\xfe\x02\xfe\x02\xfe\x02\xfe\x02"

// play sends b's datagrams to a session that is a client, too: it has what ask began under way. A length of zero lets time
// pass. Whatever comes, the session is there afterwards and answers /still by its path, nothing grows, and nothing is kept;
// udpBubble looks at the budget. It returns what the session got.
func play(t *testing.T, s *udpSim, b []byte, ask func(ctx context.Context, c *Conn) []<-chan result) (got []result) {
	t.Helper()
	p := s.device(t, deviceAddr)
	c := s.begin(t, p)
	short, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	asked := ask(short, c)
	for range 200 {
		if len(b) < 2 {
			break
		}
		n := min(int(binary.BigEndian.Uint16(b)), len(b)-2)
		d := bytes.Clone(b[2 : 2+n])
		b = b[2+n:]
		if n == 0 {
			<-time.After(3 * time.Second)
			continue
		}
		c.dg.mu.Lock()
		if len(c.dg.sent) > 0 {
			t := c.dg.sent[0]
			d = bytes.ReplaceAll(d, binary.BigEndian.AppendUint16(nil, ours), binary.BigEndian.AppendUint16(nil, t.id))
			if len(t.token) == 8 {
				d = bytes.ReplaceAll(d, []byte(ourToken), []byte(t.token))
			}
		}
		c.dg.mu.Unlock()
		p.raw(d)
		synctest.Wait()
	}
	for _, a := range asked {
		got = append(got, <-a)
	}
	<-time.After(6 * time.Minute)
	for { // what it said
		_ = p.conn.SetReadDeadline(time.Now().Add(time.Millisecond))
		if _, _, err := p.conn.ReadFrom(make([]byte, maxUDP)); err != nil {
			break
		}
	}
	if p.id += 20000; len(s.conns) != 0 {
		t.Fatal("another session began")
	}
	p.raw(appendPacket(nil, confirmable, p.id, get("/still")))
	if m := p.read(acknowledgement); m.id != p.id || string(m.Payload) != "/still" {
		t.Fatalf("%s", m)
	}
	c.dg.mu.Lock()
	defer c.dg.mu.Unlock()
	if n := len(c.dg.rx.order); n > 1 || len(c.dg.sent) > 0 {
		t.Errorf("%d messages are remembered, %d under way", n, len(c.dg.sent))
	}
	return got
}

// FuzzDatagrams plays whole sequences of datagrams.
func FuzzDatagrams(f *testing.F) {
	sequence := func(hex ...string) []byte {
		var ds [][]byte
		for _, s := range hex {
			ds = append(ds, unhex(f, s))
		}
		return datagrams(ds...)
	}
	f.Add(sequence(seedDatagrams...))
	f.Add(sequence("6045fe01", "6845fe01fe02fe02fe02fe02", "", "4845000afe02fe02fe02fe026101ff31", "70000000"))
	f.Add(sequence("40020001b27570d1070eff41414141414141414141414141414141", "", "40020002b27570d1071eff41414141414141414141414141414141"))
	f.Fuzz(func(t *testing.T, b []byte) {
		small := func(c *Config) { c.MaxBody, c.MaxBuffered, c.QueueLength, c.MaxDuplicates = 4<<10, 1<<20, 20, 20 }
		udpBubble(t, handlerFuncs{}, small, func(t *testing.T, s *udpSim) {
			play(t, s, b, func(ctx context.Context, c *Conn) []<-chan result {
				return []<-chan result{do(c, ctx, get("/light")), observe(c, ctx, "/tick")}
			})
		})
	})
}

// FuzzBlockwiseUDP plays transfers of both directions and roles: the session is asked for bodies of several blocks and is sent
// some, while it fetches, observes and sends others. No body, whole or not, is larger than allowed, whoever asked for it.
func FuzzBlockwiseUDP(f *testing.F) {
	id := uint16(10)
	up := func(num uint32, more bool, szx uint8, n int) []byte {
		id++
		return appendPacket(nil, confirmable, id, withBlock(post("/up", make([]byte, n)), 1, block{num, more, szx}))
	}
	down := func(num uint32, szx uint8) []byte {
		id++
		return appendPacket(nil, confirmable, id, withBlock(get("/big"), 2, block{num, false, szx}))
	}
	answer := func(code codes.Code, option int, b block, etag string, n int) []byte {
		m := &Message{Code: code, Token: []byte(ourToken), Payload: make([]byte, n)}
		if etag != "" {
			m.Options = AddOption(m.Options, ETagOption, []byte(etag))
		}
		return appendPacket(nil, acknowledgement, ours, withBlock(m, option, b))
	}
	rest := []byte(nil) // of length zero: time passes
	f.Add(datagrams(up(0, true, 6, 1024), up(1, true, 6, 1024), up(1, true, 6, 1024), up(2, false, 6, 7)))
	f.Add(datagrams(up(0, true, 6, 1024), up(1, true, 6, 1024), up(2, true, 6, 1024), up(3, true, 6, 1024), up(4, false, 6, 1024)))
	f.Add(datagrams(up(0, true, 6, 1024), up(2, true, 6, 1024), rest, up(9, false, 2, 7), up(0, true, 0, 15)))
	f.Add(datagrams(down(0, 6), down(1, 6), down(0, 2), down(187, 0), down(1<<19, 6)))
	f.Add(datagrams(
		answer(codes.Content, 2, block{0, true, 6}, "a", 1024), answer(codes.Content, 2, block{1, true, 6}, "a", 1024),
		answer(codes.Content, 2, block{2, false, 6}, "a", 5)))
	f.Add(datagrams(
		answer(codes.Content, 2, block{0, true, 6}, "a", 1024), answer(codes.Content, 2, block{3, true, 6}, "a", 1024), rest,
		answer(codes.Content, 2, block{1, true, 2}, "b", 64), answer(codes.Content, 2, block{0, true, 6}, "b", 1024)))
	f.Add(datagrams(
		answer(codes.Continue, 1, block{0, true, 6}, "", 0), answer(codes.Continue, 1, block{1, true, 4}, "", 0), rest,
		answer(codes.RequestEntityTooLarge, 1, block{0, true, 2}, "", 0), answer(codes.Changed, 1, block{2, false, 6}, "", 3)))
	f.Fuzz(func(t *testing.T, b []byte) {
		const most = 4 << 10
		small := func(c *Config) { c.MaxBody, c.MaxBuffered, c.QueueLength, c.MaxDuplicates = most, 40_000, 20, 20 }
		body := func(m *Message) {
			if m != nil && len(m.Payload) > most {
				t.Errorf("a body of %d bytes", len(m.Payload))
			}
		}
		h := handlerFuncs{
			request: func(_ context.Context, m *Message) Response {
				if body(m); Path(m) == "/big" {
					return Response{Code: codes.Content, Payload: make([]byte, 3000)}
				}
				return Response{Code: codes.Content, Payload: []byte(Path(m))}
			},
			notifications: func(_ context.Context, ns []Notification) {
				for _, n := range ns {
					body(n.Message)
				}
			},
		}
		udpBubble(t, h, small, func(t *testing.T, s *udpSim) {
			for _, r := range play(t, s, b, func(ctx context.Context, c *Conn) []<-chan result {
				return []<-chan result{do(c, ctx, get("/large")), do(c, ctx, post("/store", make([]byte, 3000))), observe(c, ctx, "/tick")}
			}) {
				body(r.msg)
			}
		})
	})
}
