package coapgateway

import (
	"bytes"
	"fmt"
	"io"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// askedFor is one request of the hub that reached a device.
type askedFor struct {
	at   time.Duration // since the beginning
	path string
	etag string
	tok  string
}

// dozer is a device over DTLS, behind a NAT, that hears nothing while it sleeps.
type dozer struct {
	t     *testing.T
	w     *world // the hub's side, for those who prepare it
	nat   *simnet.NAT
	conn  io.ReadWriter // datagrams
	begin time.Time

	mu      sync.Mutex // guards all below
	asleep  bool
	tired   bool // hears no more than the answers to what it asks
	missed  int  // messages that came while it slept
	asked   []askedFor
	heard   func() // called for each request
	number  uint32
	value   map[string]string     // of each resource; the ETag is the same
	refuse  map[string]codes.Code // Empty: a reset
	plain   map[string]bool       // answers without Observe option
	busy    map[string]bool       // a POST is acknowledged and never answered
	maxAge  uint32                // 0: none
	tokens  map[string]message.Token
	answers chan message.Message
	next    int32
}

func newDozer(t *testing.T) *dozer {
	return &dozer{
		t: t, begin: time.Now(), value: map[string]string{}, refuse: map[string]codes.Code{}, plain: map[string]bool{},
		busy: map[string]bool{}, tokens: map[string]message.Token{}, answers: make(chan message.Message, 100), next: 1000,
	}
}

func (d *dozer) write(m message.Message) {
	n, err := coder.DefaultCoder.Size(m)
	if err != nil {
		d.t.Error(err)
		return
	}
	b := make([]byte, n)
	if _, err = coder.DefaultCoder.Encode(m, b); err == nil {
		_, err = d.conn.Write(b)
	}
	if err != nil {
		d.t.Error(err)
	}
}

// state is a representation of a resource as an observer gets it; mu is held.
func (d *dozer) state(path, etag string) message.Message {
	d.number++
	m := message.Message{Code: codes.Content, Payload: []byte(d.value[path])}
	if !d.plain[path] {
		m.Options = coap.AddUint(m.Options, message.Observe, d.number)
	}
	m.Options = coap.AddOption(m.Options, message.ETag, []byte(d.value[path]))
	if d.maxAge > 0 {
		m.Options = coap.AddUint(m.Options, message.MaxAge, d.maxAge)
	}
	if etag != "" && etag == d.value[path] {
		m.Code, m.Payload = codes.Valid, nil
	}
	return m
}

// serve hears the hub until the association ends.
func (d *dozer) serve() {
	b := make([]byte, 2048)
	for {
		n, err := d.conn.Read(b)
		if err != nil {
			return
		}
		m := message.Message{Options: make(message.Options, 0, 32)}
		if _, err := coder.DefaultCoder.Decode(bytes.Clone(b[:n]), &m); err != nil {
			d.t.Errorf("the hub sent %x: %v", b[:n], err)
			continue
		}
		if out, ok := d.hear(m); ok {
			d.write(out)
		}
	}
}

func (d *dozer) hear(m message.Message) (out message.Message, ok bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.asleep, d.tired && m.Code == codes.GET:
		d.missed++
		return out, false
	case m.Code == codes.Empty && m.Type == message.Confirmable: // asks for a sign of life
		return message.Message{Type: message.Reset, MessageID: m.MessageID}, true
	case m.Code == codes.POST:
		path, _ := m.Options.Path()
		d.asked = append(d.asked, askedFor{at: time.Since(d.begin).Truncate(time.Second), path: "update " + path})
		if d.busy[path] {
			return message.Message{Type: message.Acknowledgement, MessageID: m.MessageID}, true
		}
		return message.Message{Type: message.Acknowledgement, Code: codes.Changed, MessageID: m.MessageID, Token: m.Token}, true
	case m.Code != codes.GET:
		select {
		case d.answers <- m:
		default:
		}
		return message.Message{Type: message.Acknowledgement, MessageID: m.MessageID}, m.Type == message.Confirmable
	}
	path, _ := m.Options.Path()
	etag, _ := m.Options.GetBytes(message.ETag)
	observe, err := m.Options.Observe()
	if err == nil && observe == 1 {
		path = "end " + path
	}
	if d.heard != nil {
		d.heard()
	}
	d.asked = append(d.asked, askedFor{time.Since(d.begin).Truncate(time.Second), path, string(etag), string(m.Token)})
	code, refused := d.refuse[path]
	switch _, has := d.value[path]; {
	case refused && code == codes.Empty:
		return message.Message{Type: message.Reset, MessageID: m.MessageID}, true
	case refused:
		out.Code = code
	case !has:
		out.Code = codes.NotFound
	default:
		if err == nil {
			d.tokens[path] = slices.Clone(m.Token)
		}
		out = d.state(path, string(etag))
	}
	out.Type, out.MessageID, out.Token = message.Acknowledgement, m.MessageID, m.Token
	return out, true
}

// set does something with the device's fields.
func (d *dozer) set(f func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	f()
}

// sleep switches the radio off.
func (d *dozer) sleep() {
	synctest.Wait()
	d.set(func() { d.asleep, d.missed = true, 0 })
}

// twinOf is the hub's side of the only device.
func twinOf(gw *Gateway) *twin {
	gw.quiet.mu.Lock()
	defer gw.quiet.mu.Unlock()
	return gw.quiet.sessions[0].twin
}

// wake switches it on, behind another address.
func (d *dozer) wake() {
	d.nat.Rebind()
	d.set(func() { d.asleep, d.asked = false, nil })
}

// ask sends a request and waits for its answer, or a notification and waits until it is acknowledged. It sends it again as
// RFC 7252, Section 4.2, says.
func (d *dozer) ask(m message.Message) message.Message {
	d.t.Helper()
	for len(d.answers) > 0 {
		<-d.answers
	}
	d.next++
	m.Type, m.MessageID = message.Confirmable, d.next
	isAnswer := func(a message.Message) bool {
		if m.Code == codes.Content {
			return a.Code == codes.Empty && a.MessageID == m.MessageID
		}
		return a.Code != codes.Empty && bytes.Equal(a.Token, m.Token)
	}
	for wait := 2500 * time.Millisecond; wait < 60*time.Second; wait *= 2 {
		d.write(m)
		for late := time.After(wait); late != nil; {
			select {
			case a := <-d.answers:
				if isAnswer(a) {
					return a
				}
			case <-late:
				late = nil
			}
		}
	}
	d.t.Fatal("the hub does not answer")
	return m
}

// notify reports the value of a resource.
func (d *dozer) notify(path, value string) {
	m := d.news(path, value)
	d.next++
	m.Type, m.MessageID = message.NonConfirmable, d.next
	d.write(m)
	synctest.Wait()
}

// news gives a resource another value and makes the notification of it.
func (d *dozer) news(path, value string) message.Message {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.value[path] = value
	m := d.state(path, "")
	m.Token = d.tokens[path]
	return m
}

// heardOf returns what the hub asked since, without deregistrations.
func (d *dozer) heardOf() (paths []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, a := range d.asked {
		paths = append(paths, a.path)
	}
	return paths
}

func (d *dozer) missedSoFar() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.missed
}

// doze runs a gateway and a device over DTLS, which has signed in, in a bubble. The published resources are those named, /x* for
// an observable one; the device has a value for each.
func doze(t *testing.T, published []string, change func(*Config), prepare func(*dozer), test func(t *testing.T, w *world, gw *Gateway, d *dozer)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		h := &hall{t: t, w: w}
		h.published(published...)
		w.own(lampID, "alice")
		w.grant("token", hub.Claims{Expiry: time.Now().Add(10_000 * time.Hour)})
		f := newField(t, w, 1, change)
		defer f.end()
		f.running.Go(func() { f.gw.quiet.run(f.ctx) })

		d := newDozer(t)
		d.w = w
		d.nat = f.net.NAT("203.0.113.1", 0)
		for href := range w.links[lampID] {
			d.value[string(href)] = "1"
		}
		if prepare != nil {
			prepare(d)
		}
		sock, err := d.nat.Listen("10.0.0.2:5000")
		if err != nil {
			t.Fatal(err)
		}
		conn := f.shake(sock)
		defer func() { // in this order: the device says goodbye to nobody
			f.cancel()
			_ = sock.Close()
			_ = conn.Close()
		}()
		d.conn = conn
		f.running.Go(d.serve)
		if a := d.ask(post("/oic/sec/session", 1, cborOf(t, h.device(lampID).session(nil)))); a.Code != codes.Changed {
			t.Fatalf("sign-in: %v", a)
		}
		test(t, w, f.gw, d)
	})
}

// A device that sleeps six hours at a time, each time behind another address: one session, which is in sync when it listens,
// and nothing goes out while it does not.
func TestSleeper(t *testing.T) {
	t.Parallel()
	const hours = 6 * time.Hour
	doze(t, []string{"/a*", "/b"}, func(c *Config) { c.API.CoAP.MaxSilence = 3 * hours }, nil, func(t *testing.T, w *world, gw *Gateway, d *dozer) {
		inSync := func(n int) {
			t.Helper()
			if got := w.count("twin 3"); got != n {
				t.Fatalf("in sync %d times, want %d; asked for %q; %q", got, n, d.heardOf(), w.log)
			}
		}
		after(time.Second)
		inSync(1)
		resync := func() { // stands for whatever is for the device
			twinOf(gw).resync()
			synctest.Wait()
		}
		ping := func() {
			t.Helper()
			if a := d.ask(get("/oic/rd", 2)); a.Code != codes.Content {
				t.Fatalf("the keep-alive got %v", a.Code)
			}
		}

		// Nobody knows yet that it sleeps: what is for it finds nobody, twice, and then waits, with a trial once in a while.
		d.sleep()
		resync()
		after(time.Minute)
		lost := d.missedSoFar()
		after(hours - time.Minute)
		if more := d.missedSoFar() - lost; lost == 0 || more > 4*16 { // in 1, 5, 30, 30 … minutes, each of at most four datagrams
			t.Errorf("%d messages went nowhere, then %d", lost, more)
		}
		inSync(1)
		d.wake()
		ping()
		after(time.Second)
		inSync(2)
		if got := d.heardOf(); !slices.Equal(got, []string{"/oic/res", "/oic/res"}) { // the rest was seen in this session
			t.Errorf("asked for %q", got)
		}
		if len(w.contacts) != 0 {
			t.Errorf("one nap is no habit: %v", w.contacts)
		}

		// The second time it is known.
		d.sleep()
		after(hours)
		d.wake()
		woke := time.Now()
		d.notify("/a", "2")
		after(time.Second)
		if string(w.twin[lampID]["/a"].Content.Data) != "2" {
			t.Errorf("the twin has %s", w.twin[lampID]["/a"].Content.Data)
		}
		c := w.contacts[lampID]
		if c.Interval < hours || c.Interval > hours+time.Minute || time.Unix(0, c.Next).Sub(woke) != c.Interval {
			t.Errorf("expected in %v, at %v", c.Interval, time.Unix(0, c.Next).Sub(woke))
		}
		if x, _ := gw.Diagnostics(lampID); x.Contact != c || !x.Online {
			t.Errorf("diagnostics: %+v", x)
		}

		// From now on nothing is tried: it waits, and goes out at once.
		d.sleep()
		after(2 * time.Minute) // it may have listened a little longer
		resync()
		after(hours)
		if n := d.missedSoFar(); n != 0 {
			t.Errorf("%d messages went to a device that sleeps", n)
		}
		inSync(2)
		d.wake()
		began, before := time.Now(), len(w.log)
		d.notify("/a", "3")
		w.await(t, "the synchronisation", func() bool { return slices.Contains(w.log[before:], "twin 3") })
		if took := time.Since(began); took > 0 {
			t.Errorf("it waited %v for a device that listens", took)
		}
		inSync(3)
		if n := w.count("online " + string(lampID)); n != 1 || w.count("offline "+string(lampID)) != 0 {
			t.Errorf("%d sessions", n)
		}

		// It does not come any more: until maxSilence it is late, then it is gone.
		d.sleep()
		after(3*hours - time.Hour)
		if w.count("offline "+string(lampID)) != 0 {
			t.Fatal("it went too early")
		}
		after(2 * time.Hour)
		if w.count("offline "+string(lampID)) != 1 {
			t.Fatalf("it is still online: %q", w.log)
		}
		x, _ := gw.Diagnostics(lampID)
		if x.EndReason != "silent" || x.Contact.Interval < hours {
			t.Errorf("diagnostics: %+v", x)
		}
		if n := d.missedSoFar(); n > 1 { // the alert that ends the association
			t.Errorf("%d messages went to a device that sleeps", n)
		}
	})
}

// A device that went to sleep in the middle of its first synchronisation is in sync after the first message of the next day.
func TestSleepInTheMiddle(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*", "/b*", "/c"}, nil, func(d *dozer) { d.tired = true }, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
		after(20 * time.Hour)
		if w.count("twin 2") == 0 || w.count("twin 3") != 0 || len(d.heardOf()) != 0 {
			t.Fatalf("%q", w.log)
		}
		d.set(func() { d.tired = false })
		d.wake()
		began := time.Now()
		if a := d.ask(get("/oic/rd", 2)); a.Code != codes.Content {
			t.Fatalf("%v", a)
		}
		w.await(t, "the synchronisation", func() bool { return slices.Contains(w.log, "twin 3") })
		if took := time.Since(began); took > 0 || len(w.twin[lampID]) != 3 || w.count("online "+string(lampID)) != 1 {
			t.Errorf("after %v: %q", took, w.log)
		}
	})
}

// A synchronisation that was asked for anew stays that when the device falls asleep in it: no ETag saves it from telling all.
func TestSleepInAForcedSynchronisation(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*"}, nil, func(d *dozer) { d.w.etag = [][]byte{{7}} }, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
		h := &hall{t: t, w: w}
		after(time.Second)
		tagged := func() (n int) {
			d.set(func() {
				for _, a := range d.asked {
					if a.etag == "\x07" {
						n++
					}
				}
			})
			return n
		}
		if w.count("twin 3") != 1 || tagged() != 1 {
			t.Fatalf("asked for %v; %q", d.asked, w.log)
		}
		d.sleep()
		h.give(command("sync", hub.CommandTwinSync, ""))
		after(10 * time.Minute)
		if w.ends["sync"].Status != hub.StatusOK || w.count("twin 3") != 1 {
			t.Fatalf("%v; %q", w.ends, w.log)
		}
		d.wake()
		d.ask(get("/oic/rd", 2))
		synctest.Wait()
		if w.count("twin 3") != 2 || tagged() != 0 || !slices.Contains(d.heardOf(), "/a") {
			t.Errorf("asked for %v; %q", d.asked, w.log)
		}
	})
}

// A twin that is switched off in the middle of a synchronisation is never said to be in sync.
func TestTwinIsSwitchedOffInASynchronisation(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*", "/b*", "/c*"}, nil, func(d *dozer) {
		d.heard = func() {
			if len(d.asked) == 3 { // all but the first of them is still to be asked for
				d.heard = nil
				synctest.Wait() // the session may take commands only since its sign-in was answered
				if to := d.w.to[lampID]; to.Ready("/light", nil) || !to.Ready("", nil) {
					d.t.Error("while it is asked a device takes what needs not be sent, and nothing else")
				} else {
					to.Deliver(command("off", hub.CommandTwinOff, ""))
				}
				synctest.Wait()
			}
		}
	}, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
		after(time.Minute)
		if w.count("twin 2") != 1 || w.count("twin 3") != 0 || w.ends["off"].Status != hub.StatusOK || slices.Contains(d.heardOf(), "/c") {
			t.Errorf("asked for %q; %q", d.heardOf(), w.log)
		}
	})
}

// What a device has not reported for longer than its Max-Age is asked for.
func TestQuietObservation(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*", "/b"}, nil, nil, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
		since := func() (out []askedFor) {
			d.set(func() { out, d.asked = d.asked, nil })
			return out
		}
		after(10 * time.Second)
		first := since()
		registration := first[slices.IndexFunc(first, func(a askedFor) bool { return a.path == "/a" })]
		after(54 * time.Second)
		if got := since(); len(got) != 0 {
			t.Fatalf("asked for %v while it was fresh", got)
		}
		after(12 * time.Second) // 5 to 15 s after the Max-Age
		got := since()
		if len(got) != 1 || got[0].path != "/a" || got[0].etag != "1" || got[0].tok != registration.tok {
			t.Fatalf("asked for %v, want the registration of %v again", got, registration)
		}
		changes := len(w.changes)
		d.set(func() { d.maxAge = 600 })
		after(76 * time.Second)
		if got = since(); len(got) != 1 || len(w.changes) != changes {
			t.Fatalf("asked for %v, changed %v", got, w.changes[changes:])
		}
		after(570 * time.Second) // which the device said last
		if got = since(); len(got) != 0 {
			t.Fatalf("asked for %v while it was fresh", got)
		}
		d.set(func() { d.value["/a"], d.maxAge = "2", 0 }) // the notification is lost
		after(50 * time.Second)
		if got = since(); len(got) != 1 || string(w.twin[lampID]["/a"].Content.Data) != "2" {
			t.Fatalf("asked for %v, the twin has %q", got, w.twin[lampID]["/a"].Content.Data)
		}
		after(20 * time.Second)
		d.notify("/a", "3")
		after(60 * time.Second)
		if got = since(); len(got) != 0 {
			t.Fatalf("asked for %v although it was reported", got)
		}

		// Its end is that of any observation.
		d.set(func() { d.plain["/a"] = true })
		after(20 * time.Second)
		if got = since(); len(got) != 2 || got[1].tok == got[0].tok {
			t.Fatalf("asked for %v, want a new registration", got)
		}
		after(time.Hour)
		if got = since(); len(got) != 0 {
			t.Fatalf("asked for %v, which is not observed", got)
		}
	})
}

func TestQuietObservationThatIsOver(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		code codes.Code
		want string
		asks []string
	}{
		"not found": {codes.NotFound, "unpublished /a", []string{"/a"}},
		"a reset":   {codes.Empty, "", []string{"/a", "end /a", "/a"}},
		"an error":  {codes.ServiceUnavailable, fmt.Sprintf("changed /a %d", hub.StatusUnavailable), []string{"/a", "/a"}},
	} {
		t.Run(name, func(t *testing.T) {
			doze(t, []string{"/a*"}, nil, nil, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
				after(50 * time.Second)
				d.set(func() { d.asked, d.refuse["/a"] = nil, c.code })
				after(30 * time.Second)
				d.set(func() { delete(d.refuse, "/a"); d.value["/a"] = "back" })
				after(2 * time.Minute)
				got := d.heardOf()
				if len(got) < len(c.asks) || !slices.Equal(got[:len(c.asks)], c.asks) {
					t.Errorf("asked for %v, want %v", got, c.asks)
				}
				if c.want != "" && w.count(c.want) == 0 {
					t.Errorf("want %q in %q", c.want, w.log)
				}
				if c.code != codes.NotFound && string(w.twin[lampID]["/a"].Content.Data) != "back" {
					t.Errorf("the twin has %+v", w.twin[lampID]["/a"])
				}
			})
		})
	}
}

// One device is asked for one thing in ten seconds, and never when that is switched off.
func TestQuietObservationsAreAskedForOneByOne(t *testing.T) {
	t.Parallel()
	many := []string{"/a*", "/b*", "/c*", "/d*", "/e*", "/f*", "/g*", "/h*", "/i*", "/j*", "/k*", "/l*", "/m*", "/n*"}
	doze(t, many, nil, nil, func(t *testing.T, _ *world, _ *Gateway, d *dozer) {
		after(30 * time.Second)
		d.set(func() { d.asked = nil })
		after(10 * time.Minute)
		last := time.Duration(0)
		seen := map[string]int{}
		for _, a := range d.asked {
			if a.at-last < quietGap-time.Second {
				t.Errorf("%s was asked for at %v, another at %v", a.path, a.at, last)
			}
			last = a.at
			seen[a.path]++
		}
		if len(d.asked) < 45 || len(seen) != len(many) {
			t.Errorf("%d questions for %d resources", len(d.asked), len(seen))
		}
	})
	doze(t, many, func(c *Config) { c.DeviceTwin.AskQuietAfter = 0 }, nil, func(t *testing.T, _ *world, _ *Gateway, d *dozer) {
		after(30 * time.Second)
		d.set(func() { d.asked = nil })
		after(3 * time.Hour)
		if got := d.heardOf(); len(got) != 0 {
			t.Errorf("asked for %v", got)
		}
	})
}

// However many devices are quiet at once, they are asked one after the other.
func TestQuietDevicesAreAskedAtAPace(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		const devices = 30
		w := newWorld()
		h := &hall{t: t, w: w}
		f := newField(t, w, 1, nil)
		defer f.end()
		var mu sync.Mutex
		var asked []time.Time
		w.grant("token", hub.Claims{Expiry: time.Now().Add(10_000 * time.Hour)})
		for i := range devices {
			id := hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-0000000001%02d", i))
			w.own(id, "alice")
			unlock := w.lock()
			w.links[id] = links{"/a": {Href: "/a", Policy: 3}}
			unlock()
			sock, err := f.net.Listen(fmt.Sprintf("192.0.2.2:%d", 5000+i))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = sock.Close() }()
			d := newDozer(t)
			d.conn, d.value["/a"] = plainSocket{sock}, "1"
			d.heard = func() {
				mu.Lock()
				defer mu.Unlock()
				asked = append(asked, time.Now())
			}
			f.running.Go(d.serve)
			if a := d.ask(post("/oic/sec/session", 1, cborOf(t, h.device(id).session(nil)))); a.Code != codes.Changed {
				t.Fatalf("sign-in: %v", a)
			}
		}
		after(10 * time.Minute) // nobody asks yet, and all are stale
		mu.Lock()
		asked = nil
		mu.Unlock()
		f.running.Go(func() { f.gw.quiet.run(f.ctx) })
		after(quietGap / 2)
		mu.Lock()
		defer mu.Unlock()
		if len(asked) != devices {
			t.Errorf("%d of %d were asked", len(asked), devices)
		}
		for i := 1; i < len(asked); i++ {
			if gap := asked[i].Sub(asked[i-1]); gap < quietPace {
				t.Errorf("question %d came %v after the one before", i, gap)
			}
		}
	})
}

// An observation that ended by an error, or never began because of one, is tried again, ever more rarely.
func TestFailedObservationIsRenewed(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*", "/b*"}, func(c *Config) { c.DeviceTwin.AskQuietAfter = 0 }, func(d *dozer) {
		d.refuse["/b"] = codes.ServiceUnavailable
	}, func(t *testing.T, w *world, _ *Gateway, d *dozer) {
		after(time.Second)
		if w.count("twin 3") != 1 { // an error is an answer
			t.Fatalf("%q", w.log)
		}
		times := func(path string) (at []time.Duration) {
			d.mu.Lock()
			defer d.mu.Unlock()
			for _, a := range d.asked {
				if a.path == path {
					at = append(at, a.at)
				}
			}
			return at
		}
		d.set(func() { d.refuse["/a"] = codes.InternalServerError })
		d.next++
		d.write(message.Message{Type: message.NonConfirmable, MessageID: d.next, Code: codes.InternalServerError, Token: d.tokens["/a"]})
		after(2 * time.Hour)
		want := []time.Duration{0, 61 * time.Second, 361 * time.Second, 2161 * time.Second, 3961 * time.Second, 5761 * time.Second}
		if got := times("/a"); !slices.Equal(got, want) {
			t.Errorf("/a was asked for at %v, want %v", got, want)
		}
		if n := len(times("/b")); n != len(want) {
			t.Errorf("/b was asked for at %v", times("/b"))
		}
		d.set(func() { clear(d.refuse); d.value["/a"] = "2" })
		after(31 * time.Minute)
		if string(w.twin[lampID]["/a"].Content.Data) != "2" || w.count("twin 2") != 1 {
			t.Errorf("%q", w.log)
		}
		d.notify("/a", "3")
		d.notify("/b", "3")
		if string(w.twin[lampID]["/a"].Content.Data) != "3" || string(w.twin[lampID]["/b"].Content.Data) != "3" {
			t.Errorf("they are not observed: %q", w.log)
		}
		n := len(d.heardOf())
		after(3 * time.Hour)
		if got := d.heardOf()[n:]; len(got) != 0 {
			t.Errorf("asked for %v, which are observed", got)
		}
	})
}

// A device that always listens, and that an outage of its network made look otherwise, is found out.
func TestSleeperThatListens(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*"}, func(c *Config) { c.DeviceTwin.AskQuietAfter = 1000 * time.Hour }, nil, func(t *testing.T, w *world, gw *Gateway, d *dozer) {
		after(time.Second)
		resync := func() {
			twinOf(gw).resync()
		}
		for range 2 { // an outage of an hour
			d.sleep()
			resync()
			after(time.Hour)
			d.wake()
			d.notify("/a", "2")
			after(time.Second)
		}
		if c := w.contacts[lampID]; c.Interval < time.Hour || c.Interval > time.Hour+time.Minute {
			t.Fatalf("expected every %v", c.Interval)
		}
		n := w.count("twin 3")
		after(10 * time.Minute)
		resync()
		after(50 * time.Minute)
		if w.count("twin 3") != n {
			t.Fatal("it was asked before it was late")
		}
		after(16 * time.Minute)
		if w.count("twin 3") != n+1 || w.contacts[lampID] != (hub.Contact{}) {
			t.Errorf("it was not asked, or is still expected: %v; %q", w.contacts[lampID], w.log)
		}
		if x, _ := gw.Diagnostics(lampID); x.Contact != (hub.Contact{}) {
			t.Errorf("diagnostics: %+v", x)
		}
	})
}

// How a device's rhythm is learnt, and unlearnt.
func TestRhythm(t *testing.T) {
	t.Parallel()
	begin := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	now := begin
	r := newRhythm(false, hub.Contact{}, now)
	silence := func(d time.Duration) (begin, rested bool) {
		now = now.Add(d)
		return r.hear(d, now)
	}
	unanswered := func() {
		now = now.Add(2 * time.Minute)
		q := r.ask(now)
		now = now.Add(20 * time.Second)
		r.missed(q, now)
	}
	reach := func(want bool, again time.Duration) {
		t.Helper()
		ok, at := r.inReach(now)
		if ok != want || !ok && (at.IsZero() != (again == 0) || !at.IsZero() && at.Sub(now) != again) {
			t.Errorf("in reach: %t, again in %v; want %t, %v", ok, at.Sub(now), want, again)
		}
	}
	news := func(want time.Duration) {
		t.Helper()
		c, ok := r.news(now)
		if !ok || c.Interval != want || want > 0 && c.Next != r.woke.Add(want).UnixNano() {
			t.Errorf("told %+v %t, want %v", c, ok, want)
		}
		if _, again := r.news(now); again {
			t.Error("told twice")
		}
	}
	// Silence alone means nothing: it has nothing to say.
	for range 5 {
		silence(time.Hour)
		reach(true, 0)
	}
	if _, ok := r.news(now); ok {
		t.Error("told of a device that is quiet")
	}
	// Requests that find nobody do, with trials ever more rarely.
	unanswered()
	reach(true, 0)
	unanswered()
	reach(false, time.Minute)
	unanswered()
	reach(false, 5*time.Minute)
	unanswered()
	unanswered()
	reach(false, 30*time.Minute)
	now = now.Add(30 * time.Minute)
	reach(true, 0)
	if begin, rested := silence(90 * time.Second); !begin || rested { // what waits goes on, but it did not sleep
		t.Errorf("after a short silence %t, %t", begin, rested)
	}
	unanswered()
	unanswered()
	if begin, rested := silence(2 * time.Hour); !begin || !rested {
		t.Error("it woke")
	}
	if _, ok := r.news(now); ok {
		t.Error("told after one nap")
	}
	unanswered()
	unanswered()
	silence(3 * time.Hour)
	news(r.intervals[0])
	if r.interval < 3*time.Hour || r.interval > 3*time.Hour+10*time.Minute {
		t.Errorf("every %v", r.interval)
	}
	// Now it is reached after its messages, for as long as it has turned out to listen.
	reach(true, 0)
	now = now.Add(openFor + 1)
	late := func() time.Duration { return r.woke.Add(r.interval + r.interval/4).Sub(now) }
	reach(false, late())
	silence(time.Second)
	now = now.Add(30 * time.Second)
	r.missed(r.ask(now), now.Add(20*time.Second))
	now = now.Add(20 * time.Second)
	reach(false, 0)
	silence(time.Hour)
	news(r.intervals[1])
	now = now.Add(30 * time.Second)
	reach(true, 0)
	now = now.Add(1)
	reach(false, late())
	// When it is late it is tried, once.
	now = now.Add(late())
	reach(true, 0)
	r.missed(r.ask(now), now.Add(20*time.Second))
	reach(false, 0)
	silence(5 * time.Hour)
	r.news(now)
	silence(5 * time.Minute)
	if _, ok := r.news(now); ok {
		t.Error("told twice in ten minutes")
	}
	// A device that goes on talking does not sleep.
	for range 20 {
		silence(time.Minute)
	}
	news(0)
	now = now.Add(time.Hour)
	reach(true, 0)
	// Nor does one that answers after a long silence.
	r.interval, r.naps = time.Hour, sleeperAfter
	q := r.ask(now)
	silence(time.Second)
	r.answered(q)
	news(0)
	if r.naps != 0 {
		t.Error("its naps count still")
	}

	// What was known before: the interval, and when it was last there.
	before := hub.Contact{Interval: time.Hour, Next: now.Add(-time.Hour).UnixNano()}
	r = newRhythm(false, before, now)
	news(2 * time.Hour)
	if !r.sleeper() {
		t.Error("it was known to sleep")
	}
	r = newRhythm(true, before, now) // over TCP it cannot
	news(0)
	unanswered()
	unanswered()
	reach(true, 0)
}
