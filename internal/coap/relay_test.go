package coap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/internal/coap/simnet"
)

const besideAddr = "192.0.2.11:5684"

// pair is two gateways behind one address; the first is the dtlsSim's.
type pair struct {
	*dtlsSim
	here, there *Relay
	beside      *sim // the second one

	mu     sync.Mutex
	passed []Relayed // in both directions
	lost   bool      // nothing of it arrives
}

func pairBubble(t *testing.T, h handlerFuncs, f func(t *testing.T, p *pair)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		p := &pair{here: NewRelay(0x1111), there: NewRelay(0x2222)}
		p.dtlsSim = startDTLS(t, h, func(_ *Config, c *DTLSConfig) { c.Relay = p.here }, func(pc net.PacketConn) net.PacketConn { return pc })
		p.beside = &sim{t: t, logs: new(bytes.Buffer), reg: prometheus.NewRegistry()}
		p.beside.srv = NewServer(DefaultConfig(), handlerFuncs{request: func(context.Context, *Message) Response {
			return Response{Code: codes.Content, Payload: []byte("beside")}
		}}, slog.New(slog.DiscardHandler), NewMetrics(p.beside.reg))
		conf := dtlsConfig(t, p.ca)
		conf.Relay = p.there
		sock, err := p.net.Listen(besideAddr)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		var all sync.WaitGroup
		all.Go(func() {
			if err := p.beside.srv.ServeDTLS(ctx, sock, conf); err != nil {
				t.Errorf("ServeDTLS: %v", err)
			}
		})
		for _, r := range []*Relay{p.here, p.there} {
			all.Go(func() { r.Run(ctx, p.send) })
		}
		defer func() {
			p.stop()
			cancel()
			all.Wait()
			for _, d := range p.devices {
				d.crash()
			}
		}()
		f(t, p)
	})
}

// send is the bus.
func (p *pair) send(to uint16, d Relayed) {
	p.mu.Lock()
	p.passed = append(p.passed, d)
	lost := p.lost
	p.mu.Unlock()
	for _, r := range []*Relay{p.here, p.there} {
		if r.Number() == to && !lost {
			r.Take(d)
		}
	}
}

// soFar counts what was passed on, and its bytes: of devices, and for them.
func (p *pair) soFar() (up, down, upBytes, downBytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, d := range p.passed {
		if d.Answer {
			down++
			downBytes += len(d.Data)
		} else {
			up++
			upBytes += len(d.Data)
		}
	}
	return up, down, upBytes, downBytes
}

// balanced is the device's socket behind a load balancer, which brings what it says to either gateway. It hears nothing of the other one.
type balanced struct {
	net.PacketConn
	hub net.Addr

	mu sync.Mutex
	at net.Addr
}

func (b *balanced) to(addr string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.at = simnet.Addr(addr)
}

func (b *balanced) now() net.Addr {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.at
}

func (b *balanced) WriteTo(p []byte, _ net.Addr) (int, error) {
	return b.PacketConn.WriteTo(p, b.now())
}

func (b *balanced) ReadFrom(p []byte) (int, net.Addr, error) {
	for {
		n, from, err := b.PacketConn.ReadFrom(p)
		if err != nil || from.String() == b.now().String() {
			return n, b.hub, err
		}
	}
}

func (p *pair) balanced(t *testing.T, addr string) *balanced {
	t.Helper()
	return &balanced{PacketConn: p.socket(t, addr), hub: p.hub, at: p.hub}
}

// A session goes on when the load balancer brings its records to another gateway, and back, whoever begins to speak.
func TestRelay(t *testing.T) {
	for _, cert := range []bool{false, true} {
		t.Run(fmt.Sprintf("certificate=%t", cert), func(t *testing.T) {
			pairBubble(t, handlerFuncs{}, func(t *testing.T, p *pair) {
				opts := pskOptions("lamp", testKey, true)
				if cert {
					opts = append(certOptions(p.ca, nil), dtls.WithCertificates(p.ca.issue(t, "device", time.Time{})),
						dtls.WithConnectionIDGenerator(dtls.RandomCIDGenerator(4)))
				}
				sock := p.balanced(t, deviceAddr)
				d, err := p.shake(t, sock, opts...)
				if err != nil {
					t.Fatal(err)
				}
				d.ask("/before")
				c := p.conn(t)
				for i, addr := range []string{besideAddr, besideAddr, dtlsAddr, besideAddr} {
					sock.to(addr)
					began := time.Now()
					d.ask(fmt.Sprintf("/after/%d", i)) // the other one would answer otherwise
					if took := time.Since(began); took > 0 {
						t.Errorf("the answer took %v: it went by the way of before", took)
					}
					if at := c.Info().Remote.String(); at != deviceAddr {
						t.Errorf("the session is at %s", at)
					}
					r := do(c, t.Context(), get("/light"))
					for {
						q, m, ok := d.next(time.Minute)
						if !ok {
							t.Fatal("no request")
						}
						if q.code == codes.GET {
							d.send(appendPacket(nil, acknowledgement, q.id, &Message{Code: codes.Content, Token: m.Token, Payload: []byte("on")}))
							break
						}
						d.send(emptyPacket(reset, q.id))
					}
					if got := <-r; got.err != nil || string(got.msg.Payload) != "on" {
						t.Errorf("%+v", got)
					}
				}
				p.stillOpen(t)
				if n := p.count("connections_opened_total"); n != 1 {
					t.Errorf("%v sessions", n)
				}
				if n := p.beside.count("connections_opened_total"); n != 0 {
					t.Errorf("%v sessions at the other one", n)
				}
				if n := p.beside.count("relayed_total", "passed"); n == 0 {
					t.Error("nothing was passed on")
				}
				p.stop() // what it says last goes that way, too
				_ = d.conn.SetReadDeadline(time.Now().Add(time.Minute))
				if _, err := d.conn.Read(make([]byte, 100)); !errors.Is(err, io.EOF) {
					t.Errorf("the device read %v", err)
				}
			})
		})
	}
}

// RFC 9146, Section 6, holds for what comes by another gateway: an old record changes nothing, and a new address gets three times what
// came from it until it is proven.
func TestRelayMoves(t *testing.T) {
	big := bytes.Repeat([]byte("x"), 900)
	h := handlerFuncs{request: func(context.Context, *Message) Response { return Response{Code: codes.Content, Payload: big} }}
	pairBubble(t, h, func(t *testing.T, p *pair) {
		sock := &recorder{PacketConn: p.socket(t, deviceAddr)}
		d, err := p.shake(t, sock, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		if m := d.try(get("/big")); m == nil {
			t.Fatal("no answer")
		}
		c := p.conn(t)
		stranger := p.socket(t, "192.0.2.66:6")
		defer func() { _ = stranger.Close() }()
		steal := func(b []byte) {
			t.Helper()
			if _, err := stranger.WriteTo(b, simnet.Addr(besideAddr)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		steal(sock.sent[len(sock.sent)-1])
		if at := c.Info().Remote.String(); at != deviceAddr {
			t.Fatalf("after a record that was repeated the session is at %s", at)
		}
		if up, down, _, _ := p.soFar(); up != 1 || down != 0 {
			t.Errorf("%d were passed on, %d answered", up, down)
		}
		sock.hold = true
		for id := range uint16(20) { // who has stolen them cannot answer
			d.send(appendPacket(nil, confirmable, 7000+id, get("/big")))
			steal(sock.sent[len(sock.sent)-1])
			<-time.After(5 * time.Second)
			if _, down, in, out := p.soFar(); down == 0 || out > 3*in {
				t.Fatalf("%d bytes went out for %d", out, in)
			}
		}
		if at := c.Info().Remote.String(); at != "192.0.2.66:6" {
			t.Errorf("a newer record came, and the session is at %s", at)
		}
		sock.hold = false
		if m := d.try(get("/back")); m == nil {
			t.Error("the device is not heard any more")
		}
	})
}

// What nobody has sealed, or nobody has, gets no answer, goes over the bus at most once, and no more of it than there is room for.
func TestRelayOfForgedRecords(t *testing.T) {
	pairBubble(t, handlerFuncs{}, func(t *testing.T, p *pair) {
		sock := &recorder{PacketConn: p.socket(t, deviceAddr)}
		d, err := p.shake(t, sock, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		d.ask("/a")
		good := sock.sent[len(sock.sent)-1]
		other := p.socket(t, "192.0.2.66:6")
		defer func() { _ = other.Close() }()
		say := func(b []byte, to string) {
			t.Helper()
			if _, err := other.WriteTo(b, simnet.Addr(to)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		forged := bytes.Clone(good)
		forged[len(forged)-1] ^= 1
		unknown := bytes.Clone(good)
		copy(unknown[11:], []byte{0x11, 0x11, 9, 9, 9, 9, 9, 9})
		nobody := bytes.Clone(good)
		copy(nobody[11:], []byte{0x77, 0x77, 9, 9, 9, 9, 9, 9})
		for _, b := range [][]byte{forged, unknown, nobody} {
			say(b, besideAddr)
			say(b, dtlsAddr)
		}
		// To the first: forged is its own, unknown too, nobody's is passed on by either.
		if up, down, _, _ := p.soFar(); up != 4 || down != 0 {
			t.Errorf("%d were passed on, %d answered", up, down)
		}
		if sent, _ := p.traffic("192.0.2.66:6"); sent != 0 {
			t.Errorf("%d bytes went back", sent)
		}
		for range networkRelayBurst + 100 {
			if _, err := other.WriteTo(nobody, simnet.Addr(besideAddr)); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		if up, _, _, _ := p.soFar(); up > networkRelayBurst+networkRelays {
			t.Errorf("%d were passed on", up)
		}
		if p.beside.count("messages_dropped_total", "relay") == 0 {
			t.Error("nothing was dropped")
		}
		// Other networks have their own.
		elsewhere := p.balanced(t, "203.0.113.9:5000")
		e, err := p.shake(t, elsewhere, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		elsewhere.to(besideAddr)
		e.ask("/b")
		// Only records with connection IDs are taken from others, and nothing from oneself.
		for _, b := range [][]byte{hello(1), {recordData, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 9, 0, 1, 7}} {
			p.here.Take(Relayed{From: 0x2222, Remote: netip.MustParseAddrPort("192.0.2.66:6"), Data: b})
		}
		p.here.Take(Relayed{From: 0x1111, Remote: netip.MustParseAddrPort("192.0.2.66:6"), Data: good})
		synctest.Wait()
		if sent, _ := p.traffic("192.0.2.66:6"); sent != 0 {
			t.Errorf("%d bytes went back", sent)
		}
	})
}

// Records for a gateway that is gone, or that cannot be reached, get no answer from anybody.
func TestRelayToNobody(t *testing.T) {
	pairBubble(t, handlerFuncs{}, func(t *testing.T, p *pair) {
		sock := p.balanced(t, deviceAddr)
		d, err := p.shake(t, sock, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		d.ask("/a")
		p.mu.Lock()
		p.lost = true
		p.mu.Unlock()
		sock.to(besideAddr)
		if m := d.try(get("/b")); m != nil {
			t.Errorf("it was answered %v", m.Code)
		}
		// The device takes it for gone, and comes again: to the gateway that it reaches now.
		next := p.balanced(t, "198.51.100.77:5001")
		next.to(besideAddr)
		again, err := p.shake(t, next, pskOptions("lamp", testKey, true)...)
		if err != nil {
			t.Fatal(err)
		}
		if m := again.try(get("/c")); m == nil || string(m.Payload) != "beside" {
			t.Errorf("%v", m)
		}
	})
}
