package coap

import (
	"context"
	"fmt"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// A day in the engine's life is short: this is when a session over datagrams ends that says nothing, instead of after a day.
const aDaysSilence = 2 * time.Hour

// empty reports what is left of connections: none, no timer, and no byte of the budget.
func (s *sim) empty(t *testing.T) {
	t.Helper()
	synctest.Wait()
	s.srv.mu.Lock()
	defer s.srv.mu.Unlock()
	s.srv.wheel.mu.Lock()
	defer s.srv.wheel.mu.Unlock()
	s.srv.budget.mu.Lock()
	defer s.srv.budget.mu.Unlock()
	if s.srv.count != 0 || s.srv.wheel.count != 0 || s.srv.budget.left != s.srv.cfg.MaxBuffered {
		t.Errorf("%d connections, %d timers, %d bytes are left", s.srv.count, s.srv.wheel.count, s.srv.cfg.MaxBuffered-s.srv.budget.left)
	}
}

// A day of associations that begin and end in every way, on a network that loses some of it, leaves nothing behind: no session,
// timer, byte of the budget, and no entry in any of the listener's books. The bubble sees to the goroutines.
func TestNoGrowthDTLS(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		return Response{Code: codes.Content, Payload: make([]byte, len(m.Payload)+3000), Close: Path(m) == "/close"}
	}}
	var l *dtlsListener
	dtlsBubble(t, h, func(c *Config, _ *DTLSConfig) { c.MaxSilence = aDaysSilence }, func(t *testing.T, s *dtlsSim) {
		s.net.SetPath(simnet.Path{Delay: 20 * time.Millisecond, Loss: 0.02})
		half := post("/up", pattern(1024))
		half.Options = AddOption(half.Options, Block1, block{0, true, 6}.value())
		n, nat := 0, s.net.NAT("203.0.113.1", 0)
		dial := func() (*dtlsDevice, *Conn) {
			n++
			opts := pskOptions("lamp", testKey, n%2 == 0)
			var sock net.PacketConn
			if n%3 == 0 {
				sock = behind(t, nat, fmt.Sprintf("10.0.%d.%d:5000", n/250, n%250))
			} else {
				sock = s.socket(t, fmt.Sprintf("198.51.100.%d:%d", 1+n%5, 5000+n%7)) // addresses come again
			}
			d, err := s.shake(t, sock, opts...)
			if err != nil {
				t.Fatal(err)
			}
			c := s.conn(t)
			l = c.dg.link.(*association).l
			return d, c
		}
		ends := []func(d *dtlsDevice, c *Conn){
			func(d *dtlsDevice, _ *Conn) { d.close() },
			func(d *dtlsDevice, _ *Conn) { d.crash() },
			func(d *dtlsDevice, _ *Conn) {
				d.send(appendPacket(nil, confirmable, 1, half))
				synctest.Wait()
				d.crash()
			},
			func(d *dtlsDevice, _ *Conn) { d.try(get("/blocks")); d.crash() },
			func(d *dtlsDevice, _ *Conn) { d.try(get("/close")); d.crash() },
			func(d *dtlsDevice, c *Conn) { c.Close(nil); d.crash() },
			func(d *dtlsDevice, c *Conn) { nat.Rebind(); d.try(get("/moved")); d.close() },
			func(d *dtlsDevice, c *Conn) {
				ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
				defer cancel()
				_ = do(c, ctx, get("/x")) // the device does not answer
				d.crash()
			},
		}
		for hour := range 24 {
			for i, end := range ends {
				d, c := dial()
				end(d, c)
				// Strangers: hellos that nobody goes on with, forged records, and half of a handshake.
				s.forge(t, fmt.Sprintf("198.18.%d.%d:9", hour, i), hello(i))
				s.forge(t, fmt.Sprintf("198.18.%d.%d:9", hour, i), []byte{recordData, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1})
				_ = d.sock.Close()
			}
			if _, err := s.shake(t, s.socket(t, "198.51.100.200:5000"), pskOptions("lamp", []byte("a wrong key"), true)...); err == nil {
				t.Error("a wrong key was taken")
			}
			<-time.After(time.Hour)
		}
		<-time.After(aDaysSilence + time.Minute)
		s.empty(t)
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.byCID)+len(l.open)+len(l.fresh)+len(l.shaking)+l.mute.Len() != 0 {
			t.Errorf("%d connection IDs, %d open, %d fresh, %d shaking, %d mute are left", len(l.byCID), len(l.open), len(l.fresh), len(l.shaking), l.mute.Len())
		}
		for stage := range l.halfOpen {
			if h := &l.halfOpen[stage]; h.all != nil && h.all.Len()+len(h.prefix) != 0 {
				t.Errorf("stage %d: %d handshakes of %d networks are left", stage, h.all.Len(), len(h.prefix))
			}
		}
		if len(l.sessions.open) != 0 {
			t.Errorf("%d sessions are left", len(l.sessions.open))
		}
	})
}

// The same over plain UDP, where most of what arrives can be forged.
func TestNoGrowthUDP(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		if Path(m) == "/hello" { // its answer is small enough for an address that is not proven
			return Response{Code: codes.Content}
		}
		return Response{Code: codes.Content, Payload: make([]byte, len(m.Payload)+3000), Close: Path(m) == "/close"}
	}}
	udpBubble(t, h, func(c *Config) { c.MaxSilence = aDaysSilence }, func(t *testing.T, s *udpSim) {
		half := post("/up", pattern(1024))
		half.Options = AddOption(half.Options, Block1, block{0, true, 6}.value())
		ends := []func(p *udpPeer, c *Conn){
			func(*udpPeer, *Conn) {}, // never heard of again
			func(p *udpPeer, _ *Conn) { p.send(confirmable, half) },
			func(p *udpPeer, _ *Conn) { p.send(nonConfirmable, get("/blocks")) },
			func(p *udpPeer, _ *Conn) { p.send(confirmable, get("/close")) },
			func(_ *udpPeer, c *Conn) { c.Close(nil) },
			func(p *udpPeer, c *Conn) { p.observed(c, "/x", 1) },
			func(p *udpPeer, c *Conn) {
				ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
				defer cancel()
				_ = do(c, ctx, get("/x")) // the device does not answer
			},
			func(p *udpPeer, _ *Conn) {
				for id := range uint16(100) {
					p.empty(reset, id)
					p.empty(acknowledgement, id)
				}
			},
		}
		for hour := range 24 {
			for i, end := range ends {
				p := s.device(t, fmt.Sprintf("198.51.100.%d:%d", 1+i, 5000+hour%5)) // addresses come again
				end(p, s.begin(t, p))
				synctest.Wait()
				_ = p.conn.Close()
				// A stranger's request, with an address that is not its own: the answer is for somebody who has not asked.
				stranger := s.device(t, fmt.Sprintf("198.18.%d.%d:9", hour, i))
				stranger.send(confirmable, get("/a"))
				synctest.Wait()
				<-s.conns
				_ = stranger.conn.Close()
			}
			<-time.After(time.Hour)
			for len(s.closed) > 0 {
				<-s.closed
			}
		}
		<-time.After(aDaysSilence + time.Minute)
		s.empty(t)
	})
}
