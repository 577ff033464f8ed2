package coapgateway

import (
	"crypto/tls"
	"fmt"
	"net"
	"runtime"
	"testing"
	"testing/synctest"
	"time"
	"weak"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// day is a hub's day: guests come over DTLS and plain UDP, and leave in every way that there is.
type day struct {
	*field
	w     *world
	n     int // guests so far
	gone  []weak.Pointer[session]
	lamp  *guest // is there all day, and has a resource that never answers
	watch int    // resources of the lamp that were observed
	later []func()
}

// guest is a device that has signed up and in, and has published what it has.
type guest struct {
	*dozer
	day   *day
	id    hub.DeviceID
	owner hub.Owner
	token string // its grant has the same name
	sock  net.PacketConn
	conn  *dtls.Conn      // nil over plain UDP
	cert  tls.Certificate // empty: it has a pre-shared key, or nothing
	last  byte            // the newest token of a request
}

// come brings a device. Devices that end in an even number come over DTLS, every other of them with a new certificate.
func (d *day) come(number int) *guest {
	d.t.Helper()
	d.n++
	g := &guest{
		dozer: newDozer(d.t), day: d, id: hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012d", number)), token: fmt.Sprint("token-", d.n),
	}
	g.nat = d.net.NAT(fmt.Sprintf("203.0.%d.%d", d.n/250, d.n%250), 0)
	sock, err := g.nat.Listen(fmt.Sprintf("10.0.%d.%d:5000", d.n/250, d.n%250))
	if err != nil {
		d.t.Fatal(err)
	}
	g.sock, g.dozer.conn = sock, plainSocket{sock}
	switch number % 4 {
	case 0:
		g.cert = d.ca.identity(d.t, g.id, nil)
		g.conn = d.shakeWith(sock, dtls.WithCertificates(g.cert), dtls.WithRootCAs(d.ca.pool()), dtls.WithServerName("localhost"))
	case 2:
		g.conn = d.shakeAs(sock, g.id)
	}
	if g.conn != nil {
		g.dozer.conn = g.conn
	}
	for _, href := range []string{"/a", "/b", "/busy"} {
		g.value[href] = "1"
	}
	g.busy["/busy"] = true
	d.running.Go(g.serve)
	g.owner = "alice"
	if number%5 == 0 {
		g.owner = "bob"
	}
	code := "code-" + g.token
	(&hall{w: d.w}).issue(code, g.token, hub.Claims{Owner: g.owner, Expiry: time.Now().Add(100 * time.Hour), Issuer: "main", Grant: g.token})
	g.must(codes.Changed, g.post("/oic/sec/account", body{"di": string(g.id), "devicetype": "device", "accesstoken": code, "authprovider": "main"}))
	g.must(codes.Changed, g.post("/oic/sec/session", g.session(true)))
	var links []body
	for href := range g.value {
		links = append(links, body{"href": href, "rt": []string{"x.a"}, "if": []string{"oic.if.r"}, "p": body{"bm": 3}})
	}
	g.must(codes.Changed, g.post("/oic/rd", body{"di": string(g.id), "ttl": 0, "links": links}))
	after(time.Minute)
	d.gw.live.mu.Lock()
	defer d.gw.live.mu.Unlock()
	for s := range d.gw.live.grants[grant{"main", g.token}] {
		d.gone = append(d.gone, weak.Make(s))
	}
	return g
}

func (g *guest) session(login bool) body {
	return body{"di": string(g.id), "uid": string(g.owner), "accesstoken": g.token, "login": login}
}

func (g *guest) request(code codes.Code, path string, payload []byte) message.Message {
	g.last++
	return request(code, path, g.last, payload)
}

func (g *guest) post(path string, b body) message.Message {
	return g.request(codes.POST, path, cborOf(g.t, b))
}

func (g *guest) must(code codes.Code, m message.Message) {
	g.t.Helper()
	if a := g.ask(m); a.Code != code {
		g.t.Errorf("%s: %v %q, want %v", g.id, a.Code, a.Payload, code)
	}
}

// say sends a message once, and does not wait for what it brings.
func (g *guest) say(m message.Message) {
	g.next++
	m.Type, m.MessageID = message.Confirmable, g.next
	g.write(m)
	synctest.Wait()
}

// vanish has the device say nothing more.
func (g *guest) vanish() {
	synctest.Wait()
	_ = g.sock.Close()
	if g.conn != nil {
		_ = g.conn.Close()
	}
}

// observe observes a resource of the lamp.
func (g *guest) observe(href string) message.Message {
	m := g.request(codes.GET, at(g.day.lamp.id, href), nil)
	m.Options = coap.AddUint(m.Options, message.Observe, 0)
	return m
}

// A day of devices that come, are commanded, observe each other, sleep, move and leave in every way leaves nothing behind in the
// gateway: nothing in its books, and no session that anything still holds, be it a timer. The bubble sees to the goroutines.
func TestNoGrowth(t *testing.T) {
	t.Parallel()
	const silence = 2 * time.Hour // then a session over datagrams ends
	leave := []func(*guest){
		func(g *guest) { // goodbye
			if g.conn != nil {
				_ = g.conn.Close()
			}
			_ = g.sock.Close()
		},
		(*guest).vanish,
		func(g *guest) { g.must(codes.Changed, g.post("/oic/sec/session", g.session(false))); g.vanish() },
		func(g *guest) { g.must(codes.Deleted, g.request(codes.DELETE, "/oic/sec/account", nil)); g.vanish() },
		func(g *guest) { g.day.gw.EndGrant("main", g.token); g.vanish() },
		func(g *guest) { g.day.gw.EndKey(g.id); g.vanish() },
		func(g *guest) {
			if g.cert.Leaf != nil {
				g.day.gw.EndCertificate(g.day.ledger.revoke(g.cert))
			}
			g.vanish()
		},
		func(g *guest) { // its token ends soon
			g.token += "-short"
			g.day.w.grant(g.token, hub.Claims{Owner: g.owner, Expiry: time.Now().Add(10 * time.Minute), Issuer: "main", Grant: g.token})
			g.must(codes.Changed, g.post("/oic/sec/session", g.session(true)))
			g.day.later = append(g.day.later, g.vanish)
		},
		func(g *guest) { // signed in once more, and with a token that is none
			g.must(codes.Changed, g.post("/oic/sec/session", g.session(true)))
			b := g.session(true)
			b["accesstoken"] = "another"
			g.must(codes.Unauthorized, g.post("/oic/sec/session", b))
			g.vanish()
		},
		func(g *guest) { // another one takes its place
			var number int
			if _, err := fmt.Sscanf(string(g.id[24:]), "%d", &number); err != nil {
				g.t.Fatal(err)
			}
			g.day.come(number).vanish()
			g.vanish()
		},
		func(g *guest) { g.nat.Rebind(); g.ask(g.request(codes.GET, "/oic/rd", nil)); g.vanish() },
		func(g *guest) {
			g.sleep()
			g.day.w.order(g.id, "/a")
			g.day.later = append(g.day.later, func() { g.wake(); g.vanish() })
		},
		func(g *guest) { g.day.w.order(g.id, "/busy"); g.day.w.order(g.id, "/busy"); g.vanish() },
		func(g *guest) { // observes two, cancels one
			for _, href := range []string{"/a", "/b"} {
				if a := g.ask(g.observe(href)); a.Code == codes.Content {
					g.day.watch++
				}
			}
			g.day.lamp.notify("/a", fmt.Sprint(g.day.n))
			m := request(codes.GET, at(g.day.lamp.id, "/b"), g.last, nil)
			m.Options = coap.AddUint(m.Options, message.Observe, 1)
			g.ask(m)
			g.vanish()
		},
		func(g *guest) { g.say(g.observe("/nothing")); g.vanish() },
		func(g *guest) { g.say(g.post(at(g.day.lamp.id, "/busy"), body{})); g.vanish() },
		func(g *guest) { g.say(g.request(codes.GET, "/oic/res", nil)); g.vanish() },
		func(g *guest) {
			m := g.request(codes.POST, "/oic/rd", make([]byte, 64))
			m.Options = coap.AddUint(m.Options, message.Block1, 2|8) // the first block of more
			g.say(m)
			g.vanish()
		},
		func(g *guest) {
			m := g.request(codes.DELETE, "/oic/rd", nil)
			m.Options = coap.AddOption(m.Options, message.URIQuery, []byte("di="+string(g.id)))
			g.ask(m)
			g.say(g.news("/a", "2"))
			g.vanish()
		},
	}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		f := newField(t, w, 1, func(c *Config) { c.API.CoAP.MaxSilence = silence })
		defer f.end()
		f.running.Go(func() { f.gw.quiet.run(f.ctx) })
		f.net.SetPath(simnet.Path{Delay: 20 * time.Millisecond, Loss: 0.02})
		d := &day{field: f, w: w}
		d.lamp = d.come(1)
		for hour := range 24 {
			for i, end := range leave {
				d.lamp.must(codes.Content, d.lamp.request(codes.GET, "/oic/rd", nil))
				end(d.come(10 + (7*hour+i)%30))
			}
			after(40 * time.Minute)
			for _, end := range d.later {
				end()
			}
			d.later = nil
		}
		d.lamp.must(codes.Changed, d.lamp.post("/oic/sec/session", d.lamp.session(false)))
		d.lamp.vanish()
		after(2 * silence)
		if d.watch == 0 || len(w.orders) == 0 {
			t.Errorf("the lamp was observed %d times and given %d commands", d.watch, len(w.orders))
		}
		d.empty()
	})
}

// empty fails if anything is left of those who were there.
func (d *day) empty() {
	t, gw := d.t, d.gw
	t.Helper()
	gw.live.mu.Lock()
	if n := len(gw.live.grants) + len(gw.live.keys) + len(gw.live.certs); n > 0 {
		t.Errorf("%d credentials are stood on", n)
	}
	gw.live.mu.Unlock()
	gw.rates.mu.Lock()
	if n := len(gw.rates.owners); n > 0 {
		t.Errorf("%d owners have a share", n)
	}
	gw.rates.mu.Unlock()
	gw.watches.mu.Lock()
	if gw.watches.n+len(gw.watches.ears) > 0 {
		t.Errorf("%d watches, %d ears", gw.watches.n, len(gw.watches.ears))
	}
	gw.watches.mu.Unlock()
	gw.quiet.mu.Lock()
	if n := len(gw.quiet.sessions); n > 0 {
		t.Errorf("%d sessions wait for their turn", n)
	}
	gw.quiet.mu.Unlock()
	gw.devices.mu.Lock()
	for id, x := range gw.devices.byDev { // what is told about devices without a session is kept, for a bounded number of them
		if x.Online || x.stats != nil || x.place == nil {
			t.Errorf("%s is said to be online", id)
		}
	}
	gw.devices.mu.Unlock()
	if busy, waiting := gw.signIns.State(); busy+waiting > 0 {
		t.Errorf("%d sign-ins, %d wait", busy, waiting)
	}
	if busy, waiting := gw.exchanges["main"].State(); busy+waiting > 0 {
		t.Errorf("%d exchanges, %d wait", busy, waiting)
	}
	if busy, waiting := gw.discoveries.State(); busy+waiting > 0 {
		t.Errorf("%d discoveries, %d wait", busy, waiting)
	}
	if n := testutil.ToFloat64(gw.metrics.sessions); n != 0 {
		t.Errorf("%v sessions are counted", n)
	}
	d.w.mu.Lock()
	clear(d.w.to) // the fake's
	d.w.mu.Unlock()
	for range 3 { // finalizers
		runtime.GC()
		synctest.Wait()
	}
	held := 0
	for _, p := range d.gone {
		if p.Value() != nil {
			held++
		}
	}
	if held > 0 || len(d.gone) < 300 {
		t.Errorf("%d of %d sessions are held by something", held, len(d.gone))
	}
}

// order gives a device a command that nobody waits for.
func (w *world) order(dev hub.DeviceID, href hub.Href) {
	unlock := w.lock()
	w.seq++
	w.queue = append(w.queue, hub.Command{
		CommandEvent: hub.CommandEvent{Kind: hub.CommandUpdate, ValidUntil: time.Now().Add(10 * time.Hour).UnixNano()},
		Device:       dev, ID: fmt.Sprint("order-of-nobody-", w.seq), Href: href,
	})
	to := w.to[dev]
	unlock()
	if to != nil {
		to.Wake()
	}
}
