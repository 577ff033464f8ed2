package e2e_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/dose"
	"github.com/coaphub/coaphub/test/hubtest"
)

// relay is a NAT between devices and the hub. It has a line for each device, with a port that the hub sees.
type relay struct {
	t    *testing.T
	done sync.WaitGroup // readers, who end with their sockets

	mu    sync.Mutex // guards all below and the fields of lines and ports
	hub   *net.UDPAddr
	rng   *rand.Rand
	delay time.Duration // of each datagram
	loss  float64       // how many of them are lost, 0 to 1
	socks []net.PacketConn
}

// line is a device's way to the hub: the device speaks to addr.
type line struct {
	r      *relay
	addr   string
	in     net.PacketConn
	out    *port
	inside netip.AddrPort // where the device is
	gone   netip.AddrPort // where it was before it lost power
}

// port is what the hub takes for a device's address.
type port struct {
	sock net.PacketConn
	of   *line // nil: nobody's any more
}

// newRelay stands before the hub's door for tr.
func newRelay(t *testing.T, h *hubtest.Hub, tr transport) *relay {
	t.Helper()
	at := h.CoAPSUDP
	if !tr.secure {
		at = h.CoAPPlainUDP
	}
	to, err := net.ResolveUDPAddr("udp", at)
	if err != nil {
		t.Fatal(err)
	}
	r := &relay{t: t, hub: to, rng: rand.New(rand.NewPCG(1, 1))} //nolint:gosec // the same each time
	t.Cleanup(func() {
		r.mu.Lock()
		for _, s := range r.socks {
			_ = s.Close()
		}
		r.mu.Unlock()
		r.done.Wait()
	})
	return r
}

// read opens a socket and hands what comes to take, until the test ends.
func (r *relay) read(take func(b []byte, from netip.AddrPort)) net.PacketConn {
	r.t.Helper()
	sock, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		r.t.Fatal(err)
	}
	r.socks = append(r.socks, sock)
	r.done.Go(func() {
		b := make([]byte, 64<<10)
		for {
			n, from, err := sock.ReadFrom(b)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err == nil {
				take(append([]byte(nil), b[:n]...), from.(*net.UDPAddr).AddrPort())
			}
		}
	})
	return sock
}

// line makes a way for one device.
func (r *relay) line() *line {
	r.t.Helper()
	l := &line{r: r}
	r.mu.Lock()
	defer r.mu.Unlock()
	l.in = r.read(l.outward)
	l.addr = l.in.LocalAddr().String()
	l.out = r.port(l)
	return l
}

// port opens a new one; mu is held.
func (r *relay) port(l *line) *port {
	p := &port{of: l}
	p.sock = r.read(func(b []byte, _ netip.AddrPort) {
		r.mu.Lock()
		to := p.of
		r.mu.Unlock()
		if to == nil {
			return
		}
		r.carry(func() {
			r.mu.Lock()
			at := to.inside
			r.mu.Unlock()
			if at.IsValid() {
				_, _ = to.in.WriteTo(b, net.UDPAddrFromAddrPort(at))
			}
		})
	})
	return p
}

// outward is a datagram of the device.
func (l *line) outward(b []byte, from netip.AddrPort) {
	l.r.mu.Lock()
	if from == l.gone {
		l.r.mu.Unlock()
		return
	}
	l.inside = from
	out, hub := l.out.sock, l.r.hub
	l.r.mu.Unlock()
	l.r.carry(func() { _, _ = out.WriteTo(b, hub) })
}

// carry lets a datagram arrive, or not. What is under way when the test ends finds a closed socket.
func (r *relay) carry(arrive func()) {
	r.mu.Lock()
	lost, delay := r.rng.Float64() < r.loss, r.delay
	r.mu.Unlock()
	switch {
	case lost:
	case delay == 0:
		arrive()
	default:
		time.AfterFunc(delay, arrive)
	}
}

// rebind gives the device another port, as a router does that has restarted.
func (l *line) rebind() {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	l.out.of = nil
	l.out = l.r.port(l)
}

// handOver gives the device's port to another, and the device gets a new one.
func (l *line) handOver(to *line) {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	to.out.of = nil
	to.out, l.out = l.out, l.r.port(l)
	to.out.of = to
}

// cut takes the device's power: nothing of it arrives any more, no goodbye either. Who comes after it on this line has its
// port.
func (l *line) cut() {
	l.r.mu.Lock()
	defer l.r.mu.Unlock()
	l.gone, l.inside = l.inside, netip.AddrPort{}
}

// onLine makes a device of tr that speaks to the hub through l; change, if not nil, may change it.
func onLine(t *testing.T, h *hubtest.Hub, tr transport, l *line, id string, change func(*device.Config)) *device.Device {
	t.Helper()
	cfg := simulation(t, h, tr, id)
	cfg.HubAddr = tr.scheme + "://" + l.addr
	if change != nil {
		change(&cfg)
	}
	d, err := device.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	return d
}

// come connects, signs up unless the device has credentials, signs in, publishes and waits until the hub knows everything.
func come(t *testing.T, h *hubtest.Hub, a *app, d *device.Device, hrefs ...string) {
	t.Helper()
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	must := func(is device.Answer, err error) {
		t.Helper()
		if err != nil || !is.OK() {
			t.Fatalf("%v, %v", is, err)
		}
	}
	if d.Credentials().Access == "" {
		must(d.SignUp(t.Context(), h.Code(t, d.ID())))
	}
	must(d.SignIn(t.Context()))
	must(d.Publish(t.Context(), hrefs...))
	a.until("the device to be in sync", func() bool { return a.twin(d.ID()) == "ONLINE IN_SYNC" && d.Observed("/light/1") > 0 })
}

// shows changes the device's light and waits until the hub knows it.
func (a *app) shows(d *device.Device, name string, power int) {
	a.t.Helper()
	if n, err := d.Set("/light/1", map[string]any{"name": name, "state": true, "power": uint64(power)}); err != nil || n != 1 {
		a.t.Fatalf("%s: %d notifications, %v", name, n, err)
	}
	a.until("what the device says", func() bool { return a.light(d.ID()) == light{name, true, power} })
}

// reaches lets the hub ask the device for something that it has not asked for before.
func (a *app) reaches(d *device.Device, href string) {
	a.t.Helper()
	asked := d.Stats().Requests.Load()
	if p, err := d.Publish(a.t.Context(), href); err != nil || !p.OK() {
		a.t.Fatalf("%v, %v", p, err)
	}
	a.until("the hub to observe "+href, func() bool { return d.Observed(href) == 1 && a.twin(d.ID()) == "ONLINE IN_SYNC" })
	if d.Stats().Requests.Load() == asked {
		a.t.Errorf("nobody asked for %s", href)
	}
}

// connection is what the hub calls a device's connection.
func (a *app) connection(id string) string {
	a.t.Helper()
	var d struct {
		Metadata struct{ Connection struct{ ID string } }
	}
	a.ask(http.MethodGet, "/api/v1/devices/"+id, "", &d)
	if d.Metadata.Connection.ID == "" {
		a.t.Fatalf("%s has no connection", id)
	}
	return d.Metadata.Connection.ID
}

var (
	overDTLS = transportOf("dtls")
	overPSK  = transportOf("psk")
	overUDP  = transportOf("udp")

	overDatagrams = []transport{overDTLS, overPSK, overUDP}
)

// TestPortChanges: a device with a connection ID stays signed in although its router gives it another port, in both
// directions and as often as it likes (RFC 9146). One without, or over plain UDP, is a stranger at its new port: its session
// waits where it was until the device has come again.
func TestPortChanges(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{overDTLS, overPSK} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t)
			a := application(t, h)
			l := newRelay(t, h, tr).line()
			d := onLine(t, h, tr, l, deviceID(1), func(c *device.Config) { c.PerResource, c.Resources = true, 3 })
			come(t, h, a, d, "/oic/d", "/light/1")
			was := a.connection(d.ID())
			for i, href := range []string{"/sensor/1", "/sensor/2", "/sensor/3"} {
				l.rebind()
				a.shows(d, "after a change", i)
				a.reaches(d, href)
			}
			if now := a.connection(d.ID()); now != was {
				t.Errorf("it is another session: %s, was %s", now, was)
			}
		})
	}
	t.Run("without connection ID", func(t *testing.T) {
		t.Parallel()
		h := hubtest.Start(t)
		a := application(t, h)
		l := newRelay(t, h, overPSK).line()
		d := onLine(t, h, overPSK, l, deviceID(1), func(c *device.Config) { c.PerResource, c.NoConnectionID = true, true })
		come(t, h, a, d, "/oic/d", "/light/1")
		was := a.connection(d.ID())
		l.rebind()
		ctx, stop := context.WithCancel(t.Context())
		heard := make(chan error, 1)
		go func() { heard <- d.Ping(ctx) }()
		a.until("the stranger's records to be dropped", func() bool {
			return strings.Contains(a.metrics(h), `coaphub_coap_messages_dropped_total{reason="unknown"} `)
		})
		stop()
		if err := <-heard; err == nil {
			t.Error("the hub answered a stranger")
		}
		if now := a.connection(d.ID()); now != was || a.twin(d.ID()) != "ONLINE IN_SYNC" {
			t.Errorf("%s on %s, was on %s", a.twin(d.ID()), now, was)
		}
		come(t, h, a, d, "/oic/d", "/light/1")
		a.shows(d, "again", 1)
		if a.connection(d.ID()) == was {
			t.Error("it is the same session")
		}
	})
	t.Run("udp", func(t *testing.T) {
		t.Parallel()
		h := hubtest.Start(t, hubtest.WithConfig(overUDP.config()...))
		a := application(t, h)
		l := newRelay(t, h, overUDP).line()
		d := onLine(t, h, overUDP, l, deviceID(1), func(c *device.Config) { c.PerResource = true })
		come(t, h, a, d, "/oic/d", "/light/1")
		was := a.connection(d.ID())
		l.rebind()
		// The keep-alive of a stranger: he has to sign in.
		if is, err := d.Do(t.Context(), device.Request{Code: codes.GET, Path: "/oic/rd"}); err != nil || is.Code != codes.Unauthorized {
			t.Errorf("%v, %v", is, err)
		}
		if now := a.connection(d.ID()); now != was || a.twin(d.ID()) != "ONLINE IN_SYNC" {
			t.Errorf("%s on %s, was on %s", a.twin(d.ID()), now, was)
		}
		come(t, h, a, d, "/oic/d", "/light/1")
		a.shows(d, "again", 1)
		if a.connection(d.ID()) == was {
			t.Error("it is the same session")
		}
	})
}

func (a *app) metrics(h *hubtest.Hub) string {
	a.t.Helper()
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodGet, h.Admin+"/metrics", http.NoBody)
	if err != nil {
		a.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return string(b)
}

// TestPortReused: a router gives a device's port to another device. Both have their sessions, and neither gets what is the
// other's.
func TestPortReused(t *testing.T) {
	t.Parallel()
	for _, cid := range []bool{true, false} {
		t.Run(fmt.Sprintf("connection ID=%t", cid), func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t)
			a := application(t, h)
			r := newRelay(t, h, overPSK)
			first, second := r.line(), r.line()
			change := func(c *device.Config) { c.PerResource, c.Resources, c.NoConnectionID = true, 3, !cid }
			lamp := onLine(t, h, overDTLS, first, deviceID(1), change)
			fan := onLine(t, h, overPSK, second, deviceID(2), change)
			come(t, h, a, lamp, "/oic/d", "/light/1")
			a.shows(lamp, "lamp", 1)
			was := a.connection(lamp.ID())
			first.handOver(second)
			come(t, h, a, fan, "/oic/d", "/light/1")
			if !cid { // RFC 6347, 4.2.8: who shakes hands at an address is there, and whoever was there is not
				a.until("the lamp to be gone", func() bool { return a.twin(lamp.ID()) == "OFFLINE OUT_OF_SYNC" })
				come(t, h, a, lamp, "/oic/d", "/light/1")
			}
			for i, href := range []string{"/sensor/1", "/sensor/2", "/sensor/3"} {
				a.shows(fan, "fan", i)
				a.shows(lamp, "lamp", 10+i)
				asked := fan.Stats().Requests.Load()
				a.reaches(lamp, href)
				if n := fan.Stats().Requests.Load(); n != asked || fan.Observed(href) != 0 {
					t.Error("the fan was asked for the lamp's " + href)
				}
				a.reaches(fan, href)
				if got := (light{"fan", true, i}); a.light(fan.ID()) != got {
					t.Errorf("the fan shows %v, want %v", a.light(fan.ID()), got)
				}
			}
			if now := a.connection(lamp.ID()); (now == was) != cid {
				t.Errorf("the lamp's session is %s, was %s", now, was)
			}
		})
	}
}

// TestRebootOnTheSameAddress: a device loses its power, and starts again at the address at which the hub still has its
// session: within ten seconds the hub has the new one's values, and nothing of the old one's comes after them.
func TestRebootOnTheSameAddress(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		over transport
		cid  bool
	}{
		"certificate": {overDTLS, true}, "key": {overPSK, true}, "key without connection ID": {overPSK, false}, "udp": {overUDP, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(c.over.config()...))
			a := application(t, h)
			l := newRelay(t, h, c.over).line()
			change := func(cfg *device.Config) { cfg.PerResource, cfg.NoConnectionID = true, !c.cid }
			before := onLine(t, h, c.over, l, deviceID(1), change)
			come(t, h, a, before, "/oic/d", "/light/1")
			for i := range 20 { // so that the numbers of its notifications are higher than those that come
				a.shows(before, "before", i)
			}
			l.cut()
			before.Close()

			after := onLine(t, h, c.over, l, deviceID(1), change)
			after.SetCredentials(before.Credentials())
			if _, err := after.Set("/light/1", map[string]any{"name": "after", "state": true, "power": uint64(0)}); err != nil {
				t.Fatal(err)
			}
			ctx, leave := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			go func() {
				ended <- after.Run(ctx, func(context.Context) (string, error) { return "", errors.New("it has credentials") })
			}()
			defer func() { leave(); <-ended }()
			a.within(10*time.Second, "the device to be back", func() bool {
				return a.light(after.ID()) == light{"after", true, 0} && a.twin(after.ID()) == "ONLINE IN_SYNC"
			})
			for i := range 3 {
				a.shows(after, "later", i)
			}
			if n := after.Stats().Failures.Load(); n != 0 {
				t.Errorf("it failed %d times on its way back", n)
			}
		})
	}
}

// TestHubLosesPower: a hub that is gone and back says no goodbye over datagrams, and knows no association of before. Its devices
// find out by what nobody acknowledges, and come back with what they say then.
func TestHubLosesPower(t *testing.T) {
	t.Parallel()
	for _, tr := range dose.Of([]transport{overPSK}, overDatagrams, overDatagrams) {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			r := newRelay(t, h, tr)
			d := onLine(t, h, tr, r.line(), deviceID(1), func(c *device.Config) { c.PerResource = true })
			ctx, leave := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			code := h.Code(t, d.ID())
			go func() { ended <- d.Run(ctx, func(context.Context) (string, error) { return code, nil }) }()
			defer func() { leave(); <-ended }()
			a.until("the device to be in sync", func() bool { return a.twin(d.ID()) == "ONLINE IN_SYNC" && d.Observed("/light/1") > 0 })
			a.shows(d, "before", 1)

			r.mu.Lock()
			r.loss = 1
			r.mu.Unlock()
			h.Restart(t)
			to, err := net.ResolveUDPAddr("udp", map[bool]string{true: h.CoAPSUDP, false: h.CoAPPlainUDP}[tr.secure])
			if err != nil {
				t.Fatal(err)
			}
			r.mu.Lock()
			r.hub, r.loss = to, 0
			r.mu.Unlock()
			a = application(t, h)
			power := 1
			a.within(2*time.Minute, "the device to be back", func() bool {
				power++ // it has something to say, or it would not find out
				_, err := d.Set("/light/1", map[string]any{"name": "after", "state": true, "power": uint64(power)})
				return err == nil && a.twin(d.ID()) == "ONLINE IN_SYNC" && a.light(d.ID()).Name == "after"
			})
			a.until("the last value", func() bool { return a.light(d.ID()) == light{"after", true, power} })
			if n := d.Stats().SignUps.Load(); n != 1 {
				t.Errorf("it signed up %d times", n)
			}
		})
	}
}

// TestLossyRadio: a device gets in over a radio that is slow and loses every tenth datagram, from the handshake to the twin,
// and what it says is known. Each datagram takes a while, and nightly, when nobody minds waiting for a minute, a second; for
// bare go test, which should not wait for many retransmissions, fewer are lost.
func TestLossyRadio(t *testing.T) {
	t.Parallel()
	delay, loss := dose.Of(30*time.Millisecond, 100*time.Millisecond, time.Second), dose.Of(0.03, 0.1, 0.1)
	for _, tr := range dose.Of([]transport{overPSK}, overDatagrams, overDatagrams) {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			r := newRelay(t, h, tr)
			r.delay, r.loss = delay, loss
			d := onLine(t, h, tr, r.line(), deviceID(1), nil)
			ctx, leave := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			code := h.Code(t, d.ID())
			go func() { ended <- d.Run(ctx, func(context.Context) (string, error) { return code, nil }) }()
			defer func() { leave(); <-ended }()
			a.within(3*time.Minute, "the device to be in sync", func() bool { return a.twin(d.ID()) == "ONLINE IN_SYNC" })
			name := "lamp" + strings.Repeat(" on and off", 150) // several blocks
			if _, err := d.Set("/light/1", map[string]any{"name": name, "state": true, "power": uint64(1)}); err != nil {
				t.Fatal(err)
			}
			a.within(time.Minute, "the notification", func() bool { return a.light(d.ID()) == light{name, true, 1} })
		})
	}
}
