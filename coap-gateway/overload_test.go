package coapgateway

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/test/dose"
)

// dock is a gateway for a bubble, to which devices come over pipes.
type dock struct {
	*hall
	ln    pipes
	reg   *prometheus.Registry
	other fakeProvider
}

// visitor is a device there. What the hub asks it answers as quiet does.
type visitor struct {
	*quiet
	t       *testing.T
	id      hub.DeviceID
	owner   hub.Owner
	conn    net.Conn
	answers chan message.Message
	gone    chan struct{} // closed at the end of the connection
	token   byte
}

// docked runs a test at one with other limits than the default.
func docked(t *testing.T, change func(*LimitsConfig), test func(t *testing.T, d *dock)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		d := &dock{hall: &hall{t: t, w: w}, ln: make(pipes), reg: prometheus.NewRegistry(), other: w.prov}
		cfg := Default()
		cfg.API.CoAP.Address, cfg.API.CoAP.PlainAddress = "", "127.0.0.1:0"
		change(&cfg.Limits)
		var err error
		d.gw, err = New(cfg, Deps{
			Directory: &w.dir, Identities: &w.ids, Verifier: &w.ver, HubID: hubID, Service: "gateway-1",
			Providers: []NamedProvider{{Name: "main", Provider: &w.prov}, {Name: "other", Provider: &d.other}},
		}, slog.New(slog.DiscardHandler), d.reg)
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- d.gw.engine.ServeTCP(ctx, d.ln, nil) }()
		test(t, d)
		cancel()
		close(d.ln)
		if err := <-ended; err != nil && !errors.Is(err, context.Canceled) && !errors.Is(err, net.ErrClosed) {
			t.Errorf("the engine ended with %v", err)
		}
	})
}

// visit connects a device that is its owner's and has a token. The connection ends with leave.
func (d *dock) visit(t *testing.T, id hub.DeviceID, owner hub.Owner) *visitor {
	t.Helper()
	d.w.mu.Lock()
	_, known := d.w.owned[id]
	d.w.mu.Unlock()
	if !known {
		d.w.own(id, owner)
		d.w.grant("token of "+string(id), hub.Claims{Owner: owner, Expiry: time.Now().Add(24 * time.Hour)})
	}
	here, there := net.Pipe()
	d.ln <- there
	v := &visitor{
		quiet: &quiet{asked: map[string][]time.Duration{}, open: map[string]message.Token{}},
		t:     t, id: id, owner: owner, conn: here, answers: make(chan message.Message, 1000), gone: make(chan struct{}),
	}
	r := &raw{t: t, conn: patient{here}}
	v.send = func(m message.Message) {
		if _, err := here.Write(r.encode(m)); err != nil && !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("send: %v", err)
		}
	}
	go func() {
		defer close(v.gone)
		for {
			m, ok := r.read()
			switch {
			case !ok:
				return
			case m.Code>>5 != 0 && m.Code != codes.Ping:
				v.answers <- m
			default:
				v.hear(m, 0)
			}
		}
	}()
	v.send(message.Message{Code: codes.CSM})
	return v
}

func (v *visitor) leave() {
	_ = v.conn.Close()
	<-v.gone
	synctest.Wait()
}

// ask returns the answer to m; the zero message at the end of the connection.
func (v *visitor) ask(m message.Message) message.Message {
	v.token++
	m.Token = message.Token{v.token}
	v.send(m)
	for {
		select {
		case a := <-v.answers:
			if string(a.Token) == string(m.Token) {
				return a
			}
		case <-v.gone:
			select {
			case a := <-v.answers:
				if string(a.Token) == string(m.Token) {
					return a
				}
				continue
			default:
			}
			return message.Message{}
		}
	}
}

func (v *visitor) signIn(login bool) message.Message {
	b, err := encoding.Marshal(body{"di": string(v.id), "uid": string(v.owner), "accesstoken": "token of " + string(v.id), "login": login})
	if err != nil {
		v.t.Fatal(err)
	}
	return v.ask(post("/oic/sec/session", 0, b))
}

// report notifies a value of /a.
func (v *visitor) report(value string) {
	v.mu.Lock()
	token := v.tokens["/a"]
	v.mu.Unlock()
	v.send(message.Message{Code: codes.Content, Token: token, Options: coap.AddUint(nil, message.Observe, 3), Payload: []byte(value)})
}

const bobsID hub.DeviceID = "d0000000-0000-4000-8000-0000000000b0"

// wants asks, and expects an answer that begins with text; one that has any says when to come again, which it returns.
func (v *visitor) wants(m message.Message, code codes.Code, text string) time.Duration {
	v.t.Helper()
	a := v.ask(m)
	if a.Code != code || !strings.HasPrefix(string(a.Payload), text) {
		v.t.Errorf("got %v %q, want %v %q", a.Code, a.Payload, code, text)
	}
	age, err := a.Options.GetUint32(message.MaxAge)
	if refused := text != ""; refused != (err == nil && age > 0) {
		v.t.Errorf("%v %q has Max-Age %d, %v", a.Code, a.Payload, age, err)
	}
	return time.Duration(age) * time.Second
}

// Each of the three rates, and whom it concerns: the device, the devices of its owner, all. Who is refused learns when to come
// again, and is served then. The keep-alive is never refused, and nobody is signed out.
func TestRates(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		code      string
		limit     func(*LimitsConfig) *RateConfig
		elsewhere codes.Code // on paths that are not OCF's
		fan, bobs bool       // whether they are refused, too
	}{
		{"device-rate", func(c *LimitsConfig) *RateConfig { return &c.Device }, codes.TooManyRequests, false, false},
		{"owner-rate", func(c *LimitsConfig) *RateConfig { return &c.Owner }, codes.TooManyRequests, true, false},
		{"hub-rate", func(c *LimitsConfig) *RateConfig { return &c.Hub }, codes.ServiceUnavailable, true, true},
	} {
		t.Run(c.code, func(t *testing.T) {
			docked(t, func(l *LimitsConfig) { *c.limit(l) = RateConfig{Rate: 1, Burst: 20} }, func(t *testing.T, d *dock) {
				lamp, fan, bobs := d.visit(t, lampID, "alice"), d.visit(t, fanID, "alice"), d.visit(t, bobsID, "bob")
				for _, v := range []*visitor{lamp, fan, bobs} {
					if a := v.signIn(true); a.Code != codes.Changed {
						t.Fatalf("sign-in of %s: %v %q", v.id, a.Code, a.Payload)
					}
				}
				after(time.Hour) // what the twins asked for is over
				for range 20 {
					lamp.wants(get("/oic/res", 0), codes.Content, "")
				}
				again := lamp.wants(get("/oic/res", 0), codes.ServiceUnavailable, c.code+": ")
				lamp.wants(get("/x.plgd.dev/time", 0), c.elsewhere, c.code+": ")
				lamp.wants(get("/api/v1/devices/"+string(fanID)+"/a", 0), c.elsewhere, c.code+": ")
				lamp.wants(get("/nowhere", 0), codes.NotFound, "")
				lamp.wants(get("/oic/rd", 0), codes.Content, "")
				if n := testutil.ToFloat64(d.gw.metrics.overload.WithLabelValues(c.code)); n != 3 {
					t.Errorf("%v refusals are counted, want 3", n)
				}
				for v, refused := range map[*visitor]bool{fan: c.fan, bobs: c.bobs} {
					if refused {
						v.wants(get("/oic/res", 0), codes.ServiceUnavailable, c.code+": ")
					} else {
						v.wants(get("/oic/res", 0), codes.Content, "")
					}
				}
				if again > 10*time.Second {
					t.Errorf("the next one is there in a second, and it may come again in %v", again)
				}
				after(again)
				lamp.wants(get("/oic/res", 0), codes.Content, "")
				after(time.Minute)
				for range 20 { // as before
					lamp.wants(get("/oic/res", 0), codes.Content, "")
				}
				for _, v := range []*visitor{lamp, fan, bobs} {
					v.leave()
					if n := d.w.count("offline " + string(v.id)); n != 1 {
						t.Errorf("%s went offline %d times", v.id, n)
					}
				}
				if n := len(d.gw.rates.owners); n != 0 {
					t.Errorf("%d owners are remembered, and none is here", n)
				}
			})
		})
	}
}

// A device that reports without pause is read as fast as it may report; its connection lives, pings are answered, what it
// reports last is in the twin, and soon after it has stopped all is as before. Nobody else notices.
func TestNotificationsAreSlowed(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.Device = RateConfig{Rate: 100, Burst: 200} }, func(t *testing.T, d *dock) {
		d.published("/a*")
		d.w.mu.Lock()
		d.w.links[fanID] = d.w.links[lampID]
		d.w.mu.Unlock()
		lamp, fan := d.visit(t, lampID, "alice"), d.visit(t, fanID, "alice")
		lamp.signIn(true)
		fan.signIn(true)
		after(time.Minute)
		value := func(id hub.DeviceID) string {
			d.w.mu.Lock()
			defer d.w.mu.Unlock()
			return string(d.w.twin[id]["/a"].Content.Data)
		}
		const most = 2000
		begin := time.Now()
		var slowest time.Duration
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			for i := 1; i <= most; i++ {
				lamp.report(fmt.Sprint(i))
				if i%100 == 0 {
					asked := time.Now()
					lamp.send(message.Message{Code: codes.Ping})
					slowest = max(slowest, time.Since(asked))
				}
			}
		}()
		after(time.Second)
		n := len(d.w.changed("/a"))
		fan.report("mine")
		synctest.Wait()
		if n < 250 || n > 350 || value(fanID) != "mine" {
			t.Errorf("after a second %d reports are stored, want about 300; the other device's twin is %q", n, value(fanID))
		}
		<-sent
		after(maxPause + time.Second)
		if value(lampID) != fmt.Sprint(most) || d.w.count("offline "+string(lampID)) != 0 {
			t.Errorf("the twin ends with %q, want %d", value(lampID), most)
		}
		if took := time.Since(begin); took < 15*time.Second || took > 25*time.Second || slowest > 3*time.Second {
			t.Errorf("it took %v, want about 18 s; a ping was read after %v", took, slowest)
		}
		if testutil.ToFloat64(d.gw.metrics.slowed.WithLabelValues("device-rate")) == 0 {
			t.Error("that it was slowed is not counted")
		}
		after(5 * time.Second)
		for range 100 {
			lamp.wants(get("/oic/res", 0), codes.Content, "")
		}
		lamp.leave()
		fan.leave()
	})
}

// A device that is held up ends at once when it goes.
func TestSlowedDeviceLeaves(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.Device = RateConfig{Rate: 1, Burst: 1} }, func(t *testing.T, d *dock) {
		d.published("/a*")
		lamp := d.visit(t, lampID, "alice")
		lamp.signIn(true)
		after(time.Minute)
		for range 10 {
			lamp.report("on")
		}
		synctest.Wait()
		begin := time.Now()
		d.w.mu.Lock()
		to := d.w.to[lampID]
		d.w.mu.Unlock()
		to.Close("deleted")
		<-lamp.gone
		if took := time.Since(begin); took > 0 {
			t.Errorf("it took %v", took)
		}
		lamp.leave()
	})
}

// Of a device that is held up the hub keeps little: it is the device's to keep.
func TestSlowedDeviceTakesLittleRoom(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.Device = RateConfig{Rate: 1, Burst: 1} }, func(t *testing.T, d *dock) {
		d.published("/a*")
		lamp := d.visit(t, lampID, "alice")
		lamp.signIn(true)
		after(time.Minute)
		var sent atomic.Int32
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 300 {
				lamp.report(strings.Repeat("x", 1000))
				sent.Add(1)
			}
		}()
		after(5 * time.Second)
		first := sent.Load()
		if first > 60 { // what fits one read of the connection comes on top
			t.Errorf("%d reports are in the hub", first)
		}
		after(time.Minute)
		if n := sent.Load() - first; n < 30 || n > 80 || d.w.count("offline "+string(lampID)) != 0 {
			t.Errorf("%d more in a minute", n)
		}
		lamp.leave()
		<-done
	})
}

// A device whose queue was full when it began to be held up, because the store was slow, is read on, too.
func TestSlowedWithAFullQueue(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.Device = RateConfig{Rate: 1, Burst: 1} }, func(t *testing.T, d *dock) {
		d.published("/a*")
		lamp := d.visit(t, lampID, "alice")
		lamp.signIn(true)
		after(time.Minute)
		d.w.mu.Lock()
		notify := d.w.dir.notify
		d.w.dir.notify = func(ctx context.Context, from hub.Stamp, c []hub.Change) error {
			d.w.mu.Lock()
			d.w.dir.notify = notify // once
			d.w.mu.Unlock()
			time.Sleep(2 * time.Second)
			return notify(ctx, from, c)
		}
		d.w.mu.Unlock()
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 1000 {
				lamp.report("x")
			}
		}()
		after(time.Minute)
		if n := len(d.w.changed("/a")); n < 50 || n > 70 || d.w.count("offline "+string(lampID)) != 0 {
			t.Errorf("%d reports are stored in a minute; %q", n, d.w.soFar())
		}
		lamp.leave()
		<-done
	})
}

// Over DTLS nothing stops a device that reports too much. What is confirmable is acknowledged when it is its turn; of the rest
// some is lost, but not what is true in the end.
func TestSlowedOverUDP(t *testing.T) {
	t.Parallel()
	doze(t, []string{"/a*"}, func(c *Config) { c.Limits.Device = RateConfig{Rate: 10, Burst: 10} }, nil,
		func(t *testing.T, w *world, gw *Gateway, d *dozer) {
			after(time.Minute)
			twin := func() string {
				w.mu.Lock()
				defer w.mu.Unlock()
				return string(w.twin[lampID]["/a"].Content.Data)
			}
			for i := range 10 {
				d.notify("/a", fmt.Sprint(i))
			}
			begin := time.Now()
			d.ask(d.news("/a", "first"))
			if took := time.Since(begin); took < 100*time.Millisecond || took > maxPause || twin() != "first" {
				t.Errorf("acknowledged after %v, when the twin is %q", took, twin())
			}
			for i := range 1000 {
				d.notify("/a", fmt.Sprint(i))
			}
			d.notify("/a", "last")
			after(40 * time.Second) // what was taken is stored
			if twin() == "last" {
				t.Fatal("nothing was lost: the test shows nothing")
			}
			after(90 * time.Second)
			if twin() != "last" || w.count("offline "+string(lampID)) != 0 {
				t.Errorf("the twin is %q", twin())
			}
		})
}

// changed is what was reported of a resource, in order.
func (w *world) changed(href hub.Href) (values []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, c := range w.changes {
		if c.Href == href {
			values = append(values, string(c.Content.Data))
		}
	}
	return values
}

// Devices that come at once are signed in one after the other, in the order in which they came. Who gave up is passed over,
// for whom there is no room learns when to come again, and who has a session is served meanwhile.
func TestSignInsQueue(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.SignIns = SignInsConfig{UnderWay: 1, Waiting: 3, MaxWait: 10 * time.Second} }, func(t *testing.T, d *dock) {
		here := d.visit(t, bobsID, "bob")
		here.signIn(true)
		after(time.Minute)
		hold := make(chan struct{})
		const slowID hub.DeviceID = "d0000000-0000-4000-8000-0000000000c0"
		d.w.mu.Lock()
		verify, store := d.w.ver.verify, d.w.dir.signIn
		d.w.ver.verify = func(ctx context.Context, token string) (hub.Claims, error) {
			if token == "token of "+string(slowID) { // its issuer does not give its keys away
				<-hold
			}
			return verify(ctx, token)
		}
		d.w.dir.signIn = func(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
			<-hold
			return store(ctx, own, c, user, to)
		}
		d.w.mu.Unlock()
		var come []*visitor
		var results [4]message.Message
		slow := d.visit(t, slowID, "alice")
		var all sync.WaitGroup
		all.Go(func() { slow.signIn(true) })
		synctest.Wait()
		if busy, waiting := d.gw.signIns.State(); busy != 0 || waiting != 0 {
			t.Errorf("whoever waits for keys has a place: %d, %d", busy, waiting)
		}
		for i := range results {
			v := d.visit(t, hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012d", i)), "alice")
			come = append(come, v)
			all.Go(func() { results[i] = v.signIn(true) })
			synctest.Wait()
		}
		if busy, waiting := d.gw.signIns.State(); busy != 1 || waiting != 3 {
			t.Errorf("%d are under way and %d wait, want 1 and 3", busy, waiting)
		}
		want := `
			# HELP coaphub_coap_gateway_account_requests Account requests by kind (sign-in; exchange: sign-ups and refreshes, by provider) that are under way or waiting for that. Many wait for long: identity store, store, or for exchange the provider is slow, or limits.signIns.underWay is too low.
			# TYPE coaphub_coap_gateway_account_requests gauge
			coaphub_coap_gateway_account_requests{kind="exchange",provider="main",state="under-way"} 0
			coaphub_coap_gateway_account_requests{kind="exchange",provider="main",state="waiting"} 0
			coaphub_coap_gateway_account_requests{kind="exchange",provider="other",state="under-way"} 0
			coaphub_coap_gateway_account_requests{kind="exchange",provider="other",state="waiting"} 0
			coaphub_coap_gateway_account_requests{kind="sign-in",provider="",state="under-way"} 1
			coaphub_coap_gateway_account_requests{kind="sign-in",provider="",state="waiting"} 3
		`
		if err := testutil.GatherAndCompare(d.reg, strings.NewReader(want), "coaphub_coap_gateway_account_requests"); err != nil {
			t.Error(err)
		}
		here.wants(get("/oic/rd", 0), codes.Content, "")
		here.wants(get("/oic/res", 0), codes.Content, "")
		late := d.visit(t, lampID, "alice")
		request := body{"di": string(lampID), "uid": "alice", "accesstoken": "token of " + string(lampID), "login": true}
		late.wants(post("/oic/sec/session", 0, cborOf(t, request)), codes.ServiceUnavailable, "sign-ins-full: ")
		<-late.gone // devices rely on that
		if n := testutil.ToFloat64(d.gw.metrics.overload.WithLabelValues("sign-ins-full")); n != 1 {
			t.Errorf("%v refusals are counted, want 1", n)
		}
		come[2].leave()
		close(hold)
		all.Wait()
		for i, a := range results {
			if i == 2 == (a.Code == codes.Changed) {
				t.Errorf("sign-in %d: %v %q", i, a.Code, a.Payload)
			}
		}
		var order []string
		for _, line := range d.w.soFar() {
			if id, ok := strings.CutPrefix(line, "online d0000000-0000-4000-8000-00000000000"); ok {
				order = append(order, id)
			}
		}
		if got := strings.Join(order, " "); got != "0 1 3" {
			t.Errorf("they came in as %s", got)
		}
		for _, v := range append(come, here, slow) {
			v.leave()
		}
	})
}

// A token that ends while its sign-in waits for a place signs nobody in.
func TestTokenEndsWhileItsSignInWaits(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.SignIns = SignInsConfig{UnderWay: 1, Waiting: 3, MaxWait: 10 * time.Second} }, func(t *testing.T, d *dock) {
		hold := make(chan struct{})
		d.w.mu.Lock()
		store := d.w.dir.signIn
		d.w.dir.signIn = func(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
			<-hold
			return store(ctx, own, c, user, to)
		}
		d.w.mu.Unlock()
		var all sync.WaitGroup
		first, second := d.visit(t, lampID, "alice"), d.visit(t, fanID, "alice")
		all.Go(func() { first.signIn(true) })
		synctest.Wait()
		d.w.grant("token of "+string(fanID), hub.Claims{Owner: "alice", Expiry: time.Now().Add(5 * time.Second)})
		var a message.Message
		all.Go(func() { a = second.signIn(true) })
		after(8 * time.Second)
		close(hold)
		all.Wait()
		if a.Code != codes.Unauthorized || !strings.HasPrefix(string(a.Payload), "token-expired: ") {
			t.Errorf("it got %v %q", a.Code, a.Payload)
		}
		if d.w.count("online "+string(fanID)) != 0 {
			t.Error("it was online")
		}
		first.leave()
		<-second.gone
	})
}

// Discovery is for a few at a time. Others wait, for whom there is no room learns when to come again, and all else goes on.
func TestDiscoveriesQueue(t *testing.T) {
	t.Parallel()
	docked(t, func(*LimitsConfig) {}, func(t *testing.T, d *dock) {
		d.gw.discoveries = admission.NewQueue(1, 1, discoveryMaxWait)
		lamp, fan, bobs := d.visit(t, lampID, "alice"), d.visit(t, fanID, "alice"), d.visit(t, bobsID, "bob")
		for _, v := range []*visitor{lamp, fan, bobs} {
			v.signIn(true)
		}
		after(time.Minute)
		hold := make(chan struct{})
		d.w.mu.Lock()
		devices := d.w.dir.devices
		d.w.dir.devices = func(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
			<-hold
			return devices(ctx, owner, ids)
		}
		d.w.mu.Unlock()
		var all sync.WaitGroup
		for _, v := range []*visitor{lamp, fan} {
			all.Go(func() { v.wants(get("/oic/res", 0), codes.Content, "") })
			synctest.Wait()
		}
		bobs.wants(get("/oic/rd", 0), codes.Content, "")
		again := bobs.wants(get("/oic/res", 0), codes.ServiceUnavailable, "discoveries-full: ")
		if n := testutil.ToFloat64(d.gw.metrics.overload.WithLabelValues("discoveries-full")); n != 1 {
			t.Errorf("%v refusals are counted, want 1", n)
		}
		close(hold)
		all.Wait()
		after(again)
		bobs.wants(get("/oic/res", 0), codes.Content, "")
		for _, v := range []*visitor{lamp, fan, bobs} {
			v.leave()
		}
	})
}

// A discovery goes on no longer than its device waits, however many devices there are.
func TestDiscoveryEndsWithItsTime(t *testing.T) {
	t.Parallel()
	docked(t, func(*LimitsConfig) {}, func(t *testing.T, d *dock) {
		lamp := d.visit(t, lampID, "alice")
		lamp.signIn(true)
		after(time.Minute)
		read := 0
		d.w.mu.Lock()
		d.w.dir.devices = func(_ context.Context, owner hub.Owner, _ []hub.DeviceID) iter.Seq2[*hub.Device, error] {
			return func(yield func(*hub.Device, error) bool) {
				for range 1000 {
					<-time.After(time.Second) // as long as reading one takes
					if read++; !yield(&hub.Device{ID: lampID, Owner: owner, Links: links{}}, nil) {
						return
					}
				}
			}
		}
		d.w.mu.Unlock()
		lamp.wants(get("/oic/res", 0), codes.ServiceUnavailable, "deadline: ")
		if most := int(d.gw.cfg.API.CoAP.KeepAlive.Timeout/time.Second) + 1; read > most {
			t.Errorf("%d devices were read, a second each, want at most %d", read, most)
		}
		lamp.leave()
	})
}

// While a provider hangs, those who need it wait, or are told to come again, and those who have a token are signed in.
func TestProviderThatHangsKeepsNobodyOut(t *testing.T) {
	t.Parallel()
	docked(t, func(l *LimitsConfig) { l.SignIns = SignInsConfig{UnderWay: 2, MaxWait: time.Second} }, func(t *testing.T, d *dock) {
		hang := make(chan struct{})
		d.w.prov.exchange = func(ctx context.Context, _ hub.DeviceID, _, _ string) (hub.Tokens, error) {
			select {
			case <-hang:
			case <-ctx.Done():
			}
			return hub.Tokens{}, &hub.Error{Kind: hub.Unavailable}
		}
		d.w.prov.refresh = func(ctx context.Context, dev hub.DeviceID, _ string) (hub.Tokens, error) {
			return d.w.prov.exchange(ctx, dev, "", "")
		}
		request := cborOf(t, body{"di": string(fanID), "uid": "alice", "accesstoken": "code", "refreshtoken": "r"})
		var all sync.WaitGroup
		paths := []string{"/oic/sec/account", "/oic/sec/tokenrefresh"}
		for _, path := range paths {
			v := d.visit(t, fanID, "alice")
			all.Go(func() { v.wants(post(path, 0, request), codes.ServiceUnavailable, "unavailable: ") })
		}
		synctest.Wait()
		for _, path := range paths {
			v := d.visit(t, fanID, "alice")
			v.wants(post(path, 0, request), codes.ServiceUnavailable, "sign-ins-full: ")
			v.leave()
		}
		lamp := d.visit(t, lampID, "alice")
		if a := lamp.signIn(true); a.Code != codes.Changed {
			t.Errorf("sign-in: %v %q", a.Code, a.Payload)
		}
		lamp.leave()
		// Nor anybody who has another provider.
		refresh := cborOf(t, body{"di": string(fanID), "uid": "alice", "refreshtoken": "unknown", "authprovider": "other"})
		fan := d.visit(t, fanID, "alice")
		if a := fan.ask(post("/oic/sec/tokenrefresh", 0, refresh)); a.Code != codes.Unauthorized {
			t.Errorf("refresh at another provider: %v %q", a.Code, a.Payload)
		}
		fan.leave()
		close(hang)
		all.Wait()
	})
}

// A whole fleet that comes at once is in after the time that signing it in takes.
func TestFleetComesAtOnce(t *testing.T) {
	t.Parallel()
	devices := dose.Of(300, 1000, 10_000)
	const serving = 80 * time.Millisecond
	docked(t, func(l *LimitsConfig) {
		l.SignIns = SignInsConfig{UnderWay: 8, Waiting: devices / 10, MaxWait: 10 * time.Second}
	}, func(t *testing.T, d *dock) {
		store := d.w.dir.signIn
		d.w.dir.signIn = func(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
			time.Sleep(serving)
			return store(ctx, own, c, user, to)
		}
		begin := time.Now()
		var refused atomic.Int64
		var all sync.WaitGroup
		var mu sync.Mutex
		var in []*visitor
		for i := range devices {
			all.Go(func() {
				for {
					v := d.visit(t, hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012d", i)), "alice")
					a := v.signIn(true)
					if a.Code == codes.Changed {
						mu.Lock()
						in = append(in, v)
						mu.Unlock()
						return
					}
					age, err := a.Options.GetUint32(message.MaxAge)
					if a.Code != codes.ServiceUnavailable || err != nil {
						t.Errorf("got %v %q, %v", a.Code, a.Payload, err)
						return
					}
					refused.Add(1)
					_ = v.conn.Close()
					<-v.gone
					time.Sleep(time.Duration(age) * time.Second)
				}
			})
		}
		all.Wait()
		needed := time.Duration(devices) * serving / 8
		if took := time.Since(begin); took > needed*3/2+10*time.Second {
			t.Errorf("all are in after %v; signing them in takes %v", took, needed)
		}
		if refused.Load() == 0 || refused.Load() > int64(3*devices) {
			t.Errorf("%d were told to come again", refused.Load())
		}
		for _, v := range in {
			_ = v.conn.Close()
			<-v.gone
		}
	})
}

// What one rate refuses counts for none of the others.
func TestRefusedCountsNowhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, c := range map[string]LimitsConfig{
			"owner": {Device: RateConfig{1, 5}, Owner: RateConfig{1, 1}, Hub: RateConfig{1, 5}},
			"hub":   {Device: RateConfig{1, 5}, Owner: RateConfig{1, 5}, Hub: RateConfig{1, 1}},
		} {
			p := limitedPeer(c)
			for range 10 {
				_ = p.admit(routes["/oic/res"])
			}
			r := p.gw.rates
			left := []int{r.device.Left(&p.bucket, 9), r.owner.Left(&p.sess.share.bucket, 9), r.hub.Left(&r.all, 9)}
			if slices.Sort(left); !slices.Equal(left, []int{0, 4, 4}) {
				t.Errorf("%s: one of ten was taken, and %v are left", name, left)
			}
		}
	})
}

// What stands before each request and each notification costs no memory.
func TestRatesAllocateNothing(t *testing.T) {
	p := limitedPeer(noLimits)
	if n := testing.AllocsPerRun(100, func() {
		if some, wait := p.Pace(3); some != 3 || wait != 0 || p.admit(routes["/oic/res"]) != nil {
			t.Error("refused")
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkRates(b *testing.B) {
	p := limitedPeer(noLimits)
	b.ReportAllocs()
	for b.Loop() {
		p.Pace(1)
	}
}

// noLimits has all three rates, and nobody reaches them.
var noLimits = LimitsConfig{
	Device: RateConfig{1_000_000, 10_000_000}, Owner: RateConfig{1_000_000, 10_000_000}, Hub: RateConfig{1_000_000, 10_000_000},
}

// limitedPeer is one of a session of alice's.
func limitedPeer(c LimitsConfig) *peer {
	r := newRates(c)
	return &peer{gw: &Gateway{rates: r, metrics: newMetrics(nil, nil, nil)}, sess: &session{share: r.join("alice")}}
}
