package coap

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// behind opens a socket behind a NAT.
func behind(t testing.TB, nat *simnet.NAT, addr string) net.PacketConn {
	t.Helper()
	c, err := nat.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A session lives through a change of its peer's address, if the peer has a connection ID (RFC 9146).
func TestDTLSMove(t *testing.T) {
	for _, cert := range []bool{false, true} {
		t.Run(fmt.Sprintf("certificate=%t", cert), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				nat := s.net.NAT("203.0.113.1", 0)
				opts := pskOptions("lamp", testKey, true)
				if cert {
					opts = append(certOptions(s.ca, nil), dtls.WithCertificates(s.ca.issue(t, "device", time.Time{})),
						dtls.WithConnectionIDGenerator(dtls.RandomCIDGenerator(4)))
				}
				d, err := s.shake(t, behind(t, nat, "10.0.0.2:5000"), opts...)
				if err != nil {
					t.Fatal(err)
				}
				d.ask("/before")
				c := s.conn(t)
				first := c.Info().Remote.String()
				for i := range 5 {
					nat.Rebind()
					began := time.Now()
					d.ask(fmt.Sprintf("/after/%d", i))
					if took := time.Since(began); took > 0 {
						t.Errorf("the answer took %v: it went to the old address", took)
					}
					at := c.Info().Remote.String()
					if at == first {
						t.Errorf("the session is still at %s", at)
					}
					first = at
				}
				s.stillOpen(t)
				if n := s.count("connections_opened_total"); n != 1 {
					t.Errorf("%v sessions", n)
				}
				// Our own requests find it too.
				r := do(c, t.Context(), get("/light"))
				for {
					p, m, ok := d.next(time.Minute)
					if !ok {
						t.Fatal("no request")
					}
					if p.code == codes.GET {
						d.send(appendPacket(nil, acknowledgement, p.id, &Message{Code: codes.Content, Token: m.Token, Payload: []byte("on")}))
						break
					}
					d.send(emptyPacket(reset, p.id))
				}
				if got := <-r; got.err != nil || string(got.msg.Payload) != "on" {
					t.Errorf("%+v", got)
				}
				d.close()
				wantReason(t, s.reason(t), io.EOF)
			})
		})
	}
}

// Without a connection ID a new address is that of a stranger, and the session waits for its peer.
func TestDTLSMoveWithoutCID(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		nat := s.net.NAT("203.0.113.1", 0)
		d, err := s.shake(t, behind(t, nat, "10.0.0.2:5000"), pskOptions("lamp", testKey, false)...)
		if err != nil {
			t.Fatal(err)
		}
		d.ask("/before")
		nat.Rebind()
		if m := d.try(get("/after")); m != nil {
			t.Errorf("an answer %v", m)
		}
		if s.count("messages_dropped_total", "unknown") == 0 {
			t.Error("nothing was dropped")
		}
		s.stillOpen(t)
		d.crash()
	})
}

// Somebody on the way who sends a device's records from another address gets no more than three times their bytes sent there
// (RFC 9146, Section 6).
func TestDTLSMoveAmplification(t *testing.T) {
	big := bytes.Repeat([]byte("x"), 900)
	h := handlerFuncs{request: func(context.Context, *Message) Response { return Response{Code: codes.Content, Payload: big} }}
	dtlsBubble(t, h, nil, func(t *testing.T, s *dtlsSim) {
		nat := s.net.NAT("203.0.113.1", 0)
		d, err := s.shake(t, behind(t, nat, "10.0.0.2:5000"), pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		if m := d.try(get("/big")); m == nil || len(m.Payload) != len(big) {
			t.Fatalf("%v", m)
		}
		c := s.conn(t)
		nat.Rebind()
		ask := appendPacket(nil, confirmable, 999, get("/big"))
		d.send(ask)
		synctest.Wait()
		at := c.Info().Remote.String()
		for range 20 { // the victim is silent; our own retransmissions count too
			<-time.After(5 * time.Second)
			d.send(ask)
			synctest.Wait()
			if sent, got := s.traffic(at); got == 0 || sent > 3*got {
				t.Fatalf("%d bytes sent for %d", sent, got)
			}
		}
		// Once the peer has answered there, it gets everything.
		for {
			p, m, ok := d.next(10 * time.Second)
			if !ok {
				d.send(ask)
				continue
			}
			if p.typ == acknowledgement && len(m.Payload) == len(big) {
				break
			}
			if p.typ == confirmable && p.code == codes.Empty {
				d.send(emptyPacket(reset, p.id))
			}
		}
		s.stillOpen(t)
		d.close()
		wantReason(t, s.reason(t), io.EOF)
	})
}

// An answer that waits for the proof of an address survives another move: a repeat of the request gets it from there, and the
// request is not carried out again.
func TestDTLSMovesWhileAnAnswerWaits(t *testing.T) {
	big, calls := bytes.Repeat([]byte("x"), 900), 0
	h := handlerFuncs{request: func(context.Context, *Message) Response {
		calls++
		return Response{Code: codes.Content, Payload: big}
	}}
	dtlsBubble(t, h, nil, func(t *testing.T, s *dtlsSim) {
		nat := s.net.NAT("203.0.113.1", 0)
		d, err := s.shake(t, behind(t, nat, "10.0.0.2:5000"), pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		d.try(get("/first"))
		nat.Rebind()
		ask := appendPacket(nil, confirmable, 999, get("/big"))
		d.send(ask)
		synctest.Wait()
		nat.Rebind()
		// As a client does: five transmissions of the request (RFC 7252, Section 4.2), and a RST for each ping.
		for tries := 0; tries < 5; {
			p, m, ok := d.next(2 << tries * time.Second)
			switch {
			case !ok:
				d.send(ask)
				tries++
			case p.typ == confirmable && p.code == codes.Empty:
				d.send(emptyPacket(reset, p.id))
			case p.typ == acknowledgement && len(m.Payload) == len(big):
				if calls != 2 {
					t.Errorf("%d requests were carried out", calls)
				}
				return
			}
		}
		t.Error("there was no answer")
	})
}

// The port that a NAT gave to one device, it may give to another one later.
func TestDTLSReuse(t *testing.T) {
	for _, cid := range []bool{true, false} {
		t.Run(fmt.Sprintf("connection ID of the second device %t", cid), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				nat := s.net.NAT("203.0.113.1", 0)
				first, err := s.shake(t, behind(t, nat, "10.0.0.2:5000"), pskOptions("lamp", testKey, true)...)
				if err != nil {
					t.Fatal(err)
				}
				first.ask("/first")
				a := s.conn(t)
				old := a.Info().Remote.String()
				nat.Forget()
				second, err := s.shake(t, behind(t, nat, "10.0.0.3:5000"), pskOptions("lamp", testKey, cid)...)
				if err != nil {
					t.Fatal(err)
				}
				second.ask("/second")
				b := s.conn(t)
				if b.Info().Remote.String() != old {
					t.Fatalf("the port was not used again: %v, %v", old, b.Info().Remote)
				}
				// What is for the first device does not go to the second one.
				before, _ := s.traffic(old)
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				if _, err := a.Do(ctx, get("/light")); err == nil {
					t.Error("an answer")
				}
				cancel()
				if after, _ := s.traffic(old); after != before {
					t.Errorf("%d bytes went to the other device", after-before)
				}
				first.ask("/first/again")
				second.ask("/second/again")
				if a.Info().Remote.String() == old || b.Info().Remote.String() != old {
					t.Errorf("at %v and %v", a.Info().Remote, b.Info().Remote)
				}
				if n := a.Stats().MessagesIn; n < 2 {
					t.Errorf("the first session has %d messages", n)
				}
				s.stillOpen(t)
				first.close()
				second.close()
				wantReason(t, s.reason(t), io.EOF)
				wantReason(t, s.reason(t), io.EOF)
			})
		})
	}
}

// A device that lost its state makes a new association from the same address (RFC 6347, Section 4.2.8).
func TestDTLSReboot(t *testing.T) {
	for _, cid := range []bool{false, true} {
		t.Run(fmt.Sprintf("connection ID %t", cid), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				s.net.SetPath(simnet.Path{Delay: 200 * time.Millisecond})
				d := s.dialPSK(t, "198.51.100.1:5000", cid)
				d.ask("/before")
				s.conn(t)
				d.sock.Close()
				began := time.Now()
				again := s.dialPSK(t, "198.51.100.1:5000", cid)
				again.ask("/after")
				if took := time.Since(began); took > 10*time.Second {
					t.Errorf("back after %v", took)
				}
				s.conn(t)
				if !cid {
					wantReason(t, s.reason(t), ErrReplaced)
				}
				synctest.Wait()
				s.stillOpen(t)
				again.ask("/still")
				again.close()
				wantReason(t, s.reason(t), io.EOF)
				_ = d.conn.Close()
			})
		})
	}
}

// A hub that is full ends a session whose address is somebody else's now for a device that is there, and not for whoever forges
// a ClientHello.
func TestDTLSFullHub(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(c *Config, _ *DTLSConfig) { c.MaxConnections = 2 }, func(t *testing.T, s *dtlsSim) {
		nat := s.net.NAT("203.0.113.1", 0)
		dial := func(sock net.PacketConn) *dtlsDevice {
			d, err := s.shake(t, sock, pskOptions("lamp", testKey, true)...)
			if err != nil {
				t.Fatal(err)
			}
			d.ask("/a")
			s.conn(t)
			return d
		}
		a := dial(behind(t, nat, "10.0.0.2:5000"))
		nat.Forget()
		b := dial(behind(t, nat, "10.0.0.3:5000")) // its port was a's
		s.forge(t, "198.18.0.1:9", hello(1))
		<-time.After(time.Second)
		synctest.Wait()
		s.stillOpen(t)
		c := dial(s.socket(t, "198.51.100.1:5000"))
		wantReason(t, s.reason(t), ErrReplaced)
		b.ask("/still")
		_ = a.conn.Close()
		b.close()
		c.close()
	})
}

// A ClientHello with the random of the session that is there comes late; a device that begins with the same one after each reboot
// is heard again once nothing can come as late as that.
func TestDTLSSameRandom(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		d := s.dialPSK(t, "198.51.100.1:5000", false)
		d.ask("/a")
		a := s.conn(t).dg.link.(*association)
		d.sock.Close()
		again := hello(0)
		copy(again[27:59], a.random[:])
		begun := func() int {
			s.forge(t, "198.51.100.1:5000", again)
			synctest.Wait()
			a.l.mu.Lock()
			defer a.l.mu.Unlock()
			return len(a.l.fresh)
		}
		if n := begun(); n != 0 {
			t.Errorf("%d handshakes began at once", n)
		}
		<-time.After(5 * time.Minute)
		if n := begun(); n != 1 {
			t.Errorf("%d handshakes began after a while", n)
		}
		_ = d.conn.Close()
	})
}

// A reboot in the middle of a handshake.
func TestDTLSRebootDuringHandshake(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		for _, after := range []int{1, 2, 3} {
			addr := fmt.Sprintf("198.51.100.%d:5000", after)
			sock := s.socket(t, addr)
			dying := &mute{PacketConn: sock, left: after}
			go func() {
				conn, err := dtls.ClientWithOptions(dying, s.hub, pskOptions("lamp", testKey, false)...)
				if err != nil {
					t.Error(err)
					return
				}
				ctx, cancel := context.WithTimeout(context.Background(), time.Second)
				defer cancel()
				_ = conn.HandshakeContext(ctx)
				_ = conn.Close()
			}()
			<-time.After(2 * time.Second)
			_ = sock.Close()
			began := time.Now()
			s.dialPSK(t, addr, false).ask("/back")
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("died after %d datagrams: back after %v", after, took)
			}
		}
	})
}

// mute sends so many datagrams and no more.
type mute struct {
	net.PacketConn
	left int
}

func (m *mute) WriteTo(b []byte, to net.Addr) (int, error) {
	if m.left--; m.left < 0 {
		return len(b), nil
	}
	return m.PacketConn.WriteTo(b, to)
}

// hello is a ClientHello of nobody in particular.
func hello(n int) []byte {
	body := []byte{0xfe, 0xfd}
	random := make([]byte, 32)
	binary.BigEndian.PutUint64(random, uint64(n))
	body = append(body, random...)
	body = append(body, 0, 0, 0, 2, 0xc0, 0xa8, 1, 0)
	b := []byte{recordHandshake, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, byte(len(body) + handshakeHeader)}
	b = append(b, helloRequest, 0, 0, byte(len(body)), 0, 0, 0, 0, 0, 0, 0, byte(len(body)))
	return append(b, body...)
}

// forged is a socket that sends from any address.
func (s *dtlsSim) forge(t testing.TB, from string, b []byte) {
	t.Helper()
	c, err := s.net.Listen(from)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.WriteTo(b, s.hub); err != nil {
		t.Fatal(err)
	}
}

// A flood of ClientHellos from forged addresses takes bounded room, and keeps nobody out.
func TestDTLSFlood(t *testing.T) {
	t.Parallel()
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.MaxHandshakes, c.MaxPerPrefix = 50, 10 }, func(t *testing.T, s *dtlsSim) {
		synctest.Wait()
		s.dialPSK(t, "203.0.113.8:5000", false)
		l := s.conn(t).dg.link.(*association).l
		halfOpen := func() int {
			l.mu.Lock()
			defer l.mu.Unlock()
			n := l.halfOpen[unverified].all.Len()
			if len(l.fresh) != n {
				t.Errorf("%d in the list, %d in the map", n, len(l.fresh))
			}
			return n
		}
		// One network fills no more than its part, even if it asks twice.
		for range 2 {
			for i := range 100 {
				s.forge(t, fmt.Sprintf("198.51.100.%d:9", 1+i), hello(i))
			}
			<-time.After(time.Second)
		}
		if n := halfOpen(); n != 10 {
			t.Errorf("%d handshakes of one network, want 10", n)
		}
		if n := s.count("messages_dropped_total", "crowded"); n < 80 {
			t.Errorf("%v were dropped", n)
		}
		// Nor do many networks that ask twice get more than there is.
		for range 2 {
			for i := range 200 {
				s.forge(t, fmt.Sprintf("172.16.%d.1:9", i), hello(500+i))
			}
			<-time.After(time.Second)
		}
		if n := halfOpen(); n != 50 {
			t.Errorf("%d handshakes, want 50", n)
		}
		// Many networks, for a minute, while a device begins.
		flood := func() {
			for i := range 60_000 {
				s.forge(t, fmt.Sprintf("10.%d.%d.%d:9", i>>14, i>>6&255, i&63), hello(1000+i))
				if i%100 == 99 {
					<-time.After(100 * time.Millisecond)
				}
			}
		}
		over := make(chan struct{})
		go func() { defer close(over); flood() }()
		for i := range 5 {
			<-time.After(5 * time.Second)
			began := time.Now()
			s.net.SetPathFrom(netip.MustParseAddr("203.0.113.7"), s.hub.AddrPort().Addr(), simnet.Path{Delay: 300 * time.Millisecond})
			s.dialPSK(t, fmt.Sprintf("203.0.113.7:500%d", i), i%2 == 0).ask("/a")
			if took := time.Since(began); took > 10*time.Second {
				t.Errorf("in after %v", took)
			}
			if n := halfOpen(); n > 50 {
				t.Errorf("%d handshakes", n)
			}
		}
		<-over
		<-time.After(3 * time.Minute)
		synctest.Wait()
		if n := s.count("handshakes_total", "timeout"); n == 0 {
			t.Error("none has timed out")
		}
		if n := halfOpen(); n != 0 {
			t.Errorf("%d handshakes are left", n)
		}
	})
}

// What a stranger sends changes nothing for the session whose address it bears.
func TestDTLSForged(t *testing.T) {
	alert := func(epoch byte, seq byte, level, what byte) []byte {
		return []byte{recordAlert, 0xfe, 0xfd, 0, epoch, 0, 0, 0, 0, 1, seq, 0, 2, level, what}
	}
	rec := func(typ, epoch byte, body []byte) []byte {
		return append([]byte{typ, 0xfe, 0xfd, 0, epoch, 0, 0, 0, 0, 2, 0, byte(len(body) >> 8), byte(len(body))}, body...)
	}
	finished := append([]byte{20, 0, 0, 12, 0, 3, 0, 0, 0, 0, 0, 12}, make([]byte, 12)...)
	big := append([]byte{11, 0xff, 0xff, 0xff, 0, 7, 0, 0, 0, 0, 0x10, 0}, make([]byte, 4096)...)
	forged := [][]byte{
		{0},
		{recordData},
		make([]byte, 65507), bytes.Repeat([]byte{recordData, 0xfe, 0xfd}, 21000),
		alert(0, 0, 1, 0), alert(0, 1, 2, 40), alert(0, 2, 2, 0), alert(1, 3, 1, 0), alert(1, 4, 2, 10),
		rec(recordData, 0, []byte("hello")), rec(recordData, 1, []byte("hello, this is no record")), rec(recordData, 7, make([]byte, 40)),
		rec(recordChange, 0, []byte{1}), rec(recordChange, 0, []byte{9, 9}), rec(recordChange, 1, []byte{1}),
		rec(recordHandshake, 0, finished), rec(recordHandshake, 1, finished), rec(recordHandshake, 0, []byte{0}),
		rec(recordHandshake, 0, big), rec(24, 0, []byte{1}), rec(recordAlert, 0, []byte{2}), rec(recordAlert, 0, []byte{77, 77, 77}),
		append([]byte{recordCID, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 20}, make([]byte, 20)...),
		hello(7), hello(8), hello(8)[:30], append(hello(9), alert(0, 0, 2, 0)...),
	}
	for _, cid := range []bool{false, true} {
		t.Run(fmt.Sprintf("session, connection ID %t", cid), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				d := s.dialPSK(t, "198.51.100.1:5000", cid)
				d.ask("/a")
				s.conn(t)
				for _, b := range forged {
					if _, err := d.sock.WriteTo(b, s.hub); err != nil {
						t.Fatal(err)
					}
					synctest.Wait()
					if m := d.try(get("/b")); m == nil {
						t.Fatalf("no answer after %x", b[:min(len(b), 40)])
					}
				}
				<-time.After(10 * time.Minute)
				d.ask("/b")
				s.stillOpen(t)
				if n := s.count("connections_opened_total"); n != 1 {
					t.Errorf("%v sessions", n)
				}
				if s.count("messages_dropped_total", "record") == 0 {
					t.Error("nothing was dropped")
				}
			})
		})
	}
	// During the handshake, before each datagram of the device's.
	for _, cert := range []bool{false, true} {
		t.Run(fmt.Sprintf("handshake, certificate %t", cert), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				s.net.SetPath(simnet.Path{Delay: 20 * time.Millisecond})
				opts := pskOptions("lamp", testKey, true)
				if cert {
					opts = certOptions(s.ca, []tls.Certificate{s.ca.issue(t, "device", time.Time{})})
				}
				for i, b := range forged {
					if len(b) > 13 && b[0] == recordHandshake && b[13] == helloRequest && len(b) > 40 {
						continue // a whole ClientHello begins another handshake, and pushes out one of no proven address
					}
					sock := s.socket(t, fmt.Sprintf("198.51.100.%d:5000", i))
					d, err := s.shake(t, &noisy{sock, b}, opts...)
					if err != nil {
						t.Fatalf("forged %x: %v", b[:min(len(b), 30)], err)
					}
					d.ask("/a")
				}
			})
		})
	}
}

// noisy sends something else before each datagram.
type noisy struct {
	net.PacketConn
	noise []byte
}

func (n *noisy) WriteTo(b []byte, to net.Addr) (int, error) {
	if _, err := n.PacketConn.WriteTo(n.noise, to); err != nil {
		return 0, err
	}
	return n.PacketConn.WriteTo(b, to)
}

// 10 % loss and a second each way: everybody gets in, and is heard.
func TestDTLSLossy(t *testing.T) {
	t.Parallel()
	for _, interval := range []time.Duration{time.Second, 9 * time.Second} {
		t.Run(interval.String(), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				s.net.SetPath(simnet.Path{
					Loss: 0.1, Duplicate: 0.05, Reorder: 0.05, Delay: time.Second, Jitter: 200 * time.Millisecond,
				})
				cert := s.ca.issue(t, "device", time.Time{})
				done := make(chan error, 100)
				for i := range 40 {
					go func() {
						opts := append(pskOptions("lamp", testKey, i%3 == 0), dtls.WithFlightInterval(interval))
						if i%2 == 0 {
							opts = append(certOptions(s.ca, []tls.Certificate{cert}), dtls.WithFlightInterval(interval))
						}
						d, err := s.shake(t, s.socket(t, fmt.Sprintf("198.51.100.%d:5000", i)), opts...)
						if err != nil {
							done <- fmt.Errorf("device %d: %w", i, err)
							return
						}
						for range 5 {
							// MAX_RETRANSMIT times in a row happens, if seldom.
							m := d.try(get("/a"))
							if m == nil {
								m = d.try(get("/a"))
							}
							if m == nil {
								done <- fmt.Errorf("device %d: no answer", i)
								return
							}
						}
						done <- nil
					}()
				}
				for range 40 {
					if err := <-done; err != nil {
						t.Error(err)
					}
				}
			})
		})
	}
}

// pausing takes its time after a change_cipher_spec: the peer's first request is there before pion has noted that the handshake
// is over.
type pausing struct{ net.PacketConn }

func (p pausing) WriteTo(b []byte, to net.Addr) (int, error) {
	n, err := p.PacketConn.WriteTo(b, to)
	if b[0] == recordChange {
		<-time.After(10 * time.Millisecond)
	}
	return n, err
}

// A peer that has our Finished may speak.
func TestDTLSEarlyRequest(t *testing.T) {
	wrap := func(pc net.PacketConn) net.PacketConn { return pausing{pc} }
	dtlsBubbleOn(t, handlerFuncs{}, nil, wrap, func(t *testing.T, s *dtlsSim) {
		d := s.dialPSK(t, "198.51.100.1:5000", false)
		began := time.Now()
		d.ask("/a")
		if took := time.Since(began); took != 10*time.Millisecond {
			t.Errorf("the first answer took %v", took)
		}
	})
}

// A handler that hangs costs its own session only, and bounded room.
func TestDTLSStuck(t *testing.T) {
	var hang chan struct{} // of the bubble
	var once sync.Once     // both associations open at the same time
	h := handlerFuncs{open: func(*Conn) error {
		once.Do(func() { hang = make(chan struct{}) })
		return nil
	}, request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/hang" {
			<-hang
		}
		return Response{Code: codes.Content, Payload: []byte(Path(m))}
	}}
	dtlsBubble(t, h, func(c *Config, _ *DTLSConfig) { c.QueueLength = 8 }, func(t *testing.T, s *dtlsSim) {
		stuck, other := s.dialPSK(t, "198.51.100.1:5000", true), s.dialPSK(t, "198.51.100.2:5000", false)
		for i := range 500 {
			stuck.send(appendPacket(nil, confirmable, uint16(i), get("/hang")))
		}
		synctest.Wait()
		if s.count("messages_dropped_total", "overload") == 0 {
			t.Error("nothing was refused")
		}
		other.ask("/a")
		close(hang)
		stuck.id = 1000
		stuck.ask("/b")
		s.stillOpen(t)
	})
}

// What comes before the session has begun waits for it; more than the ring holds is lost, and counted.
func TestDTLSRing(t *testing.T) {
	var hang chan struct{} // of the bubble
	h := handlerFuncs{open: func(*Conn) error {
		<-hang
		return nil
	}}
	dtlsBubble(t, h, nil, func(t *testing.T, s *dtlsSim) {
		hang = make(chan struct{})
		d := s.dialPSK(t, "198.51.100.1:5000", true)
		for i := range ringLength + 10 {
			d.send(appendPacket(nil, confirmable, uint16(i), get("/early")))
		}
		synctest.Wait()
		if n := s.count("messages_dropped_total", "ring"); n != 10 {
			t.Errorf("%v were dropped", n)
		}
		close(hang)
		if p, _, ok := d.next(time.Second); !ok || p.id != 0 {
			t.Errorf("the first answer is %+v, %t", p, ok)
		}
		d.id = 1000
		d.ask("/b")
	})
}

// The end of the engine is told to devices; a handshake under way is given up.
func TestDTLSShutdown(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		d := s.dialPSK(t, "198.51.100.1:5000", true)
		d.ask("/a")
		s.forge(t, "198.51.100.2:9", hello(1))
		synctest.Wait()
		s.stop()
		wantReason(t, s.reason(t), ErrShutdown)
		_ = d.conn.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := d.conn.Read(make([]byte, 100)); !errors.Is(err, io.EOF) {
			t.Errorf("the device read %v", err)
		}
	})
}

// The engine stops, or the session is ended, while its handler is being made: that handler hears of the end, and once.
func TestDTLSEndsWhileItOpens(t *testing.T) {
	for what, end := range map[string]func(*dtlsSim, *Conn){
		"stop": func(s *dtlsSim, _ *Conn) { go s.stop() }, "close": func(_ *dtlsSim, c *Conn) { c.Close(nil) },
	} {
		opening, proceed := make(chan *Conn, 1), make(chan struct{})
		var ends atomic.Int32
		h := handlerFuncs{
			open:   func(c *Conn) error { opening <- c; <-proceed; return nil },
			closed: func(error) { ends.Add(1) },
		}
		dtlsBubble(t, h, nil, func(t *testing.T, s *dtlsSim) {
			opening, proceed = make(chan *Conn, 1), make(chan struct{})
			ends.Store(0)
			go func() { _, _ = s.shake(t, s.socket(t, "198.51.100.1:5000"), pskOptions("lamp", testKey, true)...) }()
			end(s, <-opening)
			synctest.Wait()
			close(proceed)
			synctest.Wait()
			s.stop()
			if n := ends.Load(); n != 1 {
				t.Errorf("%s: it heard of %d ends", what, n)
			}
		})
	}
}

// A refused account request ends the association after its answer.
func TestDTLSCloseAfterAnswer(t *testing.T) {
	h := handlerFuncs{request: func(context.Context, *Message) Response { return Response{Code: codes.Unauthorized, Close: true} }}
	dtlsBubble(t, h, nil, func(t *testing.T, s *dtlsSim) {
		d := s.dialPSK(t, "198.51.100.1:5000", false)
		if m := d.try(get("/a")); m == nil || m.Code != codes.Unauthorized {
			t.Fatalf("%v", m)
		}
		wantReason(t, s.reason(t), ErrAnswered)
		d.send(appendPacket(nil, confirmable, d.id, get("/a")))
		if p, m, ok := d.next(time.Second); !ok || p.id != d.id || m.Code != codes.Unauthorized {
			t.Errorf("a duplicate got %v %v", p, m)
		}
		_ = d.conn.SetReadDeadline(time.Now().Add(time.Minute))
		if _, err := d.conn.Read(make([]byte, 100)); !errors.Is(err, io.EOF) {
			t.Errorf("the device read %v", err)
		}
	})
}

// With all places taken, a session that cannot be reached gives way.
func TestDTLSMaxConnections(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(c *Config, _ *DTLSConfig) { c.MaxConnections = 2 }, func(t *testing.T, s *dtlsSim) {
		a := s.dialPSK(t, "198.51.100.1:5000", true)
		a.ask("/a")
		_ = a.sock.Close()
		b := s.dialPSK(t, "198.51.100.1:5000", true) // a reboot: nobody knows that it is one
		b.ask("/b")
		c := s.dialPSK(t, "198.51.100.2:5000", true)
		c.ask("/c")
		wantReason(t, s.reason(t), ErrReplaced)
		b.ask("/b")
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		conn, err := dtls.ClientWithOptions(s.socket(t, "198.51.100.3:5000"), s.hub, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.HandshakeContext(ctx); err == nil {
			t.Error("a third session")
		}
		s.refusal(t, "max-connections")
		_ = conn.Close()
		_ = a.conn.Close()
	})
}

// A connection ID says which gateway it is of.
func TestDTLSConnectionID(t *testing.T) {
	conf := DefaultDTLSConfig()
	conf.Gateway = 0xbeef
	a, b := conf.newCID(), conf.newCID()
	if a == b || a[0] != 0xbe || a[1] != 0xef || b[0] != 0xbe || b[1] != 0xef {
		t.Errorf("%x, %x", a, b)
	}
}

// A fleet that comes back at once, behind one address, gets in, although a network may have few handshakes at a time.
func TestDTLSFleetBehindOneAddress(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.MaxPerPrefix = 8 }, func(t *testing.T, s *dtlsSim) {
		s.net.SetPath(simnet.Path{Delay: 100 * time.Millisecond})
		begun := time.Now()
		nat := s.net.NAT("203.0.113.1", 0)
		var all sync.WaitGroup
		for i := range 30 {
			sock := behind(t, nat, fmt.Sprintf("10.0.0.%d:5000", i+1))
			all.Go(func() {
				d, err := s.shake(t, sock, pskOptions("lamp", testKey, true)...)
				if err != nil {
					t.Errorf("device %d: %v", i, err)
					return
				}
				d.ask("/a")
			})
		}
		all.Wait()
		// Their hellos come again after one second, three, and seven.
		if took := time.Since(begun); took > 6*time.Second {
			t.Errorf("the last was in after %v", took)
		}
	})
}
