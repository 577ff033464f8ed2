package coap

import (
	"bytes"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// peerOf seals what a's peer would, beside it.
func peerOf(a *association) *cipherState {
	c := &cipherState{out: a.keys.in, outIV: a.keys.inIV}
	if a.hasCID {
		c.outCID = a.cid[:]
	}
	return c
}

// RFC 6347, Section 4.1.2.6: each record is taken once, and one that is too old to tell is not taken.
func TestReplayWindow(t *testing.T) {
	var w replayWindow
	for _, c := range []struct {
		seq           uint64
		again, newest bool
	}{
		{0, false, true},
		{0, true, false},
		{2, false, true},
		{1, false, false},
		{1, true, false},
		{2, true, false},
		{65, false, true},
		{1, true, false},
		{2, true, false},
		{3, false, false},
		{64, false, false},
		{64, true, false},
		{66, false, true},
		{2, true, false},
		{4, false, false},
		{1 << 40, false, true},
		{1<<40 - 63, false, false},
		{1<<40 - 64, true, false},
		{66, true, false},
		{1<<40 - 63, true, false},
	} {
		if again, newest := w.take(c.seq); again != c.again || newest != c.newest {
			t.Errorf("%d: again %t, newest %t", c.seq, again, newest)
		}
	}
}

// What somebody on the way records and sends again is not for the session, wherever it comes from.
func TestDTLSReplay(t *testing.T) {
	for name, cid := range map[string]bool{"without a connection ID": false, "with a connection ID": true} {
		t.Run(name, func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				d := s.dialPSK(t, "198.51.100.1:5000", cid)
				d.ask("/a")
				a := s.conn(t).dg.link.(*association)
				other := s.socket(t, "198.51.100.2:5000")
				b := peerOf(a).seal(nil, 1000, recordData, appendPacket(nil, nonConfirmable, 7, get("/once")))
				for i := range 5 {
					if _, err := d.sock.WriteTo(b, s.hub); err != nil {
						t.Fatal(err)
					}
					if _, err := other.WriteTo(b, s.hub); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if _, _, ok := d.next(time.Second); ok != (i == 0) {
						t.Errorf("answered: %t", ok)
					}
				}
				if n := s.count("messages_dropped_total", "record"); cid && n != 9 || !cid && n != 4 { // else the address is unknown
					t.Errorf("%v were dropped", n)
				}
				if sent, _ := s.traffic("198.51.100.2:5000"); sent != 0 {
					t.Errorf("%d bytes were sent to whoever repeats", sent)
				}
				// The device's own numbers are behind the one of above.
				peer := peerOf(a)
				if _, err := d.sock.WriteTo(peer.seal(nil, 1001, recordAlert, []byte{alertWarning, alertClose}), s.hub); err != nil {
					t.Fatal(err)
				}
				wantReason(t, s.reason(t), io.EOF)
			})
		})
	}
}

// recording keeps the sealed records that pass, by their numbers.
type recording struct {
	net.PacketConn
	double bool // the network brings the flight with the client's keys twice

	mu  sync.Mutex
	out [][]byte                   // what the device sealed
	in  map[uint64]map[string]bool // what the hub did
}

func (p *recording) WriteTo(b []byte, to net.Addr) (int, error) {
	p.mu.Lock()
	for rest := b; len(rest) > 0; {
		r, more, ok := nextRecord(rest)
		if !ok {
			break
		}
		if r.epoch == dataEpoch {
			p.out = append(p.out, bytes.Clone(r.raw))
		}
		rest = more
	}
	p.mu.Unlock()
	if r, _, ok := nextRecord(b); ok && p.double && r.epoch == 0 && r.typ == recordHandshake && isClientFlight(r.body) {
		if _, err := p.PacketConn.WriteTo(b, to); err != nil {
			return 0, err
		}
	}
	return p.PacketConn.WriteTo(b, to)
}

func (p *recording) ReadFrom(b []byte) (int, net.Addr, error) {
	n, from, err := p.PacketConn.ReadFrom(b)
	p.mu.Lock()
	defer p.mu.Unlock()
	for rest := b[:max(n, 0)]; len(rest) > 0; {
		r, more, ok := nextRecord(rest)
		if !ok {
			break
		}
		if r.epoch == dataEpoch {
			if p.in[r.seq] == nil {
				p.in[r.seq] = map[string]bool{}
			}
			p.in[r.seq][string(r.raw)] = true
		}
		rest = more
	}
	return n, from, err
}

// Somebody on the way who sends a device's Finished again gets nothing, and does not move the session, although it is the first
// record that we open ourselves.
func TestDTLSReplayedFinished(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		sock := &recording{PacketConn: s.socket(t, "198.51.100.1:5000"), in: map[uint64]map[string]bool{}}
		d, err := s.shake(t, sock, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		c := s.conn(t)
		other := s.socket(t, "198.51.100.2:5000")
		for range 2 * maxRepeats {
			if _, err := other.WriteTo(sock.out[0], s.hub); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if at := c.Info().Remote.String(); at != "198.51.100.1:5000" {
			t.Errorf("the session is at %s", at)
		}
		if sent, _ := s.traffic("198.51.100.2:5000"); sent != 0 {
			t.Errorf("%d bytes were sent to whoever repeats", sent)
		}
		answer := do(c, t.Context(), get("/light"))
		if p, _, ok := d.next(time.Second); !ok || p.code != codes.GET {
			t.Error("the device does not hear the hub")
		}
		c.Close(nil)
		<-answer
	})
}

// No number is used for two records, whichever side of the handover they come from: one key, one nonce, one content.
func TestDTLSNumbersAreUsedOnce(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		for i := range 100 {
			sock := &recording{PacketConn: s.socket(t, fmt.Sprintf("198.51.100.%d:5000", i+1)), double: true, in: map[uint64]map[string]bool{}}
			d, err := s.shake(t, sock, pskOptions("lamp", testKey, false)...)
			if err != nil {
				t.Fatal(err)
			}
			d.ask("/a")
			s.conn(t)
			d.close()
			_ = s.reason(t)
			sock.mu.Lock()
			if len(sock.in) < 2 {
				t.Errorf("%d records", len(sock.in))
			}
			for seq, records := range sock.in {
				if len(records) != 1 {
					t.Errorf("number %d was used for %d records", seq, len(records))
				}
			}
			sock.mu.Unlock()
		}
	})
}

// What a peer seals besides data: padding is taken off (RFC 9146, Section 4), our last flight is sent again as often as it may be
// needed, and of the rest only a fatal alert or close_notify ends the session.
func TestDTLSSealed(t *testing.T) {
	for _, cid := range []bool{false, true} {
		for _, end := range [][]byte{{alertFatal, 20}, {alertWarning, alertClose}} {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				d := s.dialPSK(t, "198.51.100.1:5000", cid)
				a := s.conn(t).dg.link.(*association)
				peer, seq := peerOf(a), uint64(50)
				send := func(typ byte, content []byte) {
					seq++
					if _, err := d.sock.WriteTo(peer.seal(nil, seq, typ, content), s.hub); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
				}
				finished := append([]byte{20, 0, 0, 12, 0, 3, 0, 0, 0, 0, 0, 12}, make([]byte, 12)...)
				before, _ := s.traffic("198.51.100.1:5000")
				send(recordHandshake, finished)
				flight, _ := s.traffic("198.51.100.1:5000")
				if flight -= before; flight == 0 {
					t.Error("our last flight was not repeated")
				}
				for range 50 {
					send(recordHandshake, finished)
				}
				if now, _ := s.traffic("198.51.100.1:5000"); now-before != maxRepeats*flight {
					t.Errorf("%d bytes for 51 repetitions of %d", now-before, flight)
				}
				send(recordData, appendPacket(nil, nonConfirmable, 7, get("/a")))
				if _, m, ok := d.next(time.Second); !ok || string(m.Payload) != "/a" {
					t.Errorf("answered %v", m)
				}
				quiet, _ := s.traffic("198.51.100.1:5000")
				send(recordHandshake, finished)
				send(recordHandshake, nil)
				send(recordChange, []byte{1})
				send(recordAlert, []byte{alertWarning, 90})
				send(recordAlert, []byte{alertFatal})
				send(recordAlert, nil)
				send(77, []byte("what is this"))
				if now, _ := s.traffic("198.51.100.1:5000"); now != quiet {
					t.Errorf("%d bytes were answered", now-quiet)
				}
				if cid {
					// Zeros behind the type are padding; nothing but zeros is no record.
					padded := appendPacket(nil, nonConfirmable, 8, get("/padded"))
					send(0, append(append(padded, recordData), make([]byte, 20)...))
					if _, m, ok := d.next(time.Second); !ok || string(m.Payload) != "/padded" {
						t.Errorf("padding: answered %v", m)
					}
					send(0, make([]byte, 20))
				}
				s.stillOpen(t)
				send(recordAlert, end)
				wantReason(t, s.reason(t), io.EOF)
			})
		}
	}
}

// newCiphers returns two ends of an association.
func newCiphers(tb testing.TB, how suite, cid []byte) (from, to *cipherState) {
	tb.Helper()
	c, err := how.cipher(make([]byte, how.keySize))
	if err != nil {
		tb.Fatal(err)
	}
	return &cipherState{out: c, outCID: cid}, &cipherState{in: c, withCID: len(cid) > 0}
}

// Whatever is changed on the way, a record is opened as it was sealed or not at all; each is as large as announced.
func TestCipherState(t *testing.T) {
	for id, how := range suites {
		for _, cid := range [][]byte{nil, {1, 2, 3, 4, 5, 6, 7, 8}} {
			from, to := newCiphers(t, how, cid)
			for n, content := range [][]byte{{}, {1}, bytes.Repeat([]byte("x"), 1152)} {
				b := from.seal(nil, uint64(n), recordData, content)
				if len(b) != from.size(len(content)) {
					t.Errorf("%v: %d bytes are sealed in %d, not %d", id, len(content), len(b), from.size(len(content)))
				}
				for range 50 {
					at := rand.IntN(len(b)) //nolint:gosec // any place
					damaged := bytes.Clone(b)
					damaged[at] ^= byte(1 + rand.IntN(255)) //nolint:gosec // any other byte
					if r, _, ok := nextRecord(damaged); ok {
						if _, _, _, ok := to.open(&r); ok {
							t.Fatalf("%v: a change at %d passed", id, at)
						}
					}
				}
				r, rest, ok := nextRecord(b)
				if !ok || len(rest) != 0 {
					t.Fatalf("%v: %x is no record", id, b)
				}
				if typ, got, newest, ok := to.open(&r); !ok || !newest || typ != recordData || !bytes.Equal(got, content) {
					t.Errorf("%v: opened %d %x, %t, %t", id, typ, got, newest, ok)
				}
			}
		}
	}
}

// FuzzDTLSRecord opens anything: what it takes is what sealing its content gives, but for padding.
func FuzzDTLSRecord(f *testing.F) {
	from, _ := newCiphers(f, suites[pskSuites[0]], nil)
	withID, _ := newCiphers(f, suites[pskSuites[0]], []byte("12345678"))
	f.Add(from.seal(nil, 0, recordData, []byte("hello")))
	f.Add(withID.seal(nil, 1, 0, []byte("hello\x17\x00\x00")))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, cid := range [][]byte{nil, []byte("12345678")} {
			from, to := newCiphers(t, suites[pskSuites[0]], cid)
			r, _, ok := nextRecord(bytes.Clone(b))
			if !ok {
				continue
			}
			typ, content, _, ok := to.open(&r)
			if ok && cid == nil && !bytes.HasPrefix(b, from.seal(nil, r.seq, typ, content)) {
				t.Errorf("%x was opened as %d %x", b, typ, content)
			}
		}
	})
}

func BenchmarkCipherState(b *testing.B) {
	content := bytes.Repeat([]byte("x"), 90)
	for _, c := range []struct {
		name string
		how  suite
	}{{"CCM_8", suites[pskSuites[0]]}, {"GCM", suites[pskSuites[2]]}} {
		from, to := newCiphers(b, c.how, []byte("12345678"))
		buf := make([]byte, 0, 200)
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			to.replay = replayWindow{}     // the numbers begin again
			for seq := range uint64(b.N) { //nolint:gosec // not negative
				buf = from.seal(buf[:0], seq, recordData, content)
				r, _, _ := nextRecord(buf)
				if _, _, _, ok := to.open(&r); !ok {
					b.Fatal("not opened")
				}
			}
		})
	}
}
