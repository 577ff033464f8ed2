package cluster_test

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/dose"
)

// patience is how long anything may take.
const patience = time.Minute

// What the hub promises: a device is served again so soon after a part of it crashed or MongoDB was away; after a part was told to stop; and
// after NATS was away, when all parts have to find each other, and all devices come at once.
const (
	crashed  = 10 * time.Second
	stopped  = 10 * time.Second // a second, once a gateway that stops sends its devices away one after the other
	reunited = 20 * time.Second
)

// A device notices by itself, if nobody tells it, that its gateway is gone: it asks every pingEvery whether that is there, and waits for
// pingWait. That is part of crashed.
const (
	pingEvery = 2 * time.Second
	pingWait  = 3 * time.Second
)

// simulated is a device that lives, and counts.
type simulated struct {
	*device.Device
	over   string
	code   string
	bounce chan struct{} // it comes anew
	due    chan struct{} // it is to count on as soon as it is observed

	n     atomic.Uint64 // what it counted to last
	mu    sync.Mutex    // guards all below
	acked []uint64      // what the hub acknowledged
	broke time.Time     // when its last session ended
	until uint64        // what it had counted to then
}

// simulate is a device that comes over TLS through the door in front of the gateways, or over DTLS to one of them.
func (w *world) simulate(i int, front *door) *simulated {
	w.t.Helper()
	id := uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "cluster %d", i)).String()
	o, err := w.parts["app-1"].control.Onboard(w.t.Context(), bundle.OnboardRequest{DeviceID: id, Certificate: true})
	if err != nil {
		w.t.Fatal(err)
	}
	s := &simulated{over: "TLS", code: o.AuthorizationCode, bounce: make(chan struct{}, 1), due: make(chan struct{}, 1)}
	at := "coaps+tcp://" + front.addr()
	if i%4 == 3 {
		s.over, at = "DTLS", "coaps://"+w.gateways()[i/4%2]
	}
	cfg := device.Config{ID: id, HubAddr: at}
	if cfg.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID); err != nil {
		w.t.Fatal(err)
	}
	if s.Device, err = device.New(cfg); err != nil {
		w.t.Fatal(err)
	}
	return s
}

// live has the device come again until ctx ends, sooner than devices do that have a battery.
func (s *simulated) live(ctx context.Context) {
	defer s.Close()
	for ctx.Err() == nil {
		if s.enter(ctx) == nil {
			nudge(s.due)
			s.stay(ctx)
			s.mu.Lock()
			s.broke, s.until = time.Now(), s.n.Load()
			s.mu.Unlock()
		}
		s.Close()
		pause(ctx, 200*time.Millisecond)
	}
}

// nudge leaves word in a channel that has room for one.
func nudge(to chan struct{}) {
	select {
	case to <- struct{}{}:
	default:
	}
}

// pause is between two attempts of somebody.
func pause(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

func (s *simulated) stay(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.Done():
			return
		case <-s.bounce:
			return
		case <-time.After(pingEvery):
		}
		own, cancel := context.WithTimeout(ctx, pingWait)
		err := s.Ping(own)
		cancel()
		if err != nil {
			return
		}
	}
}

func (s *simulated) enter(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := s.Connect(ctx); err != nil {
		return err
	}
	if s.Credentials().Access == "" {
		if err := good(s.SignUp(ctx, s.code)); err != nil {
			return err
		}
	}
	if err := good(s.SignIn(ctx)); err != nil {
		return err
	}
	return good(s.Publish(ctx))
}

func good(a device.Answer, err error) error {
	if err == nil && !a.OK() {
		err = errors.New(a.String())
	}
	return err
}

// count counts on, every few seconds and when it is due, while the hub observes.
func (s *simulated) count(ctx context.Context) {
	due, next := false, time.Now().Add(rand.N(calm))
	for ctx.Err() == nil {
		observed := s.Observed("/oic/res")+s.Observed("/light/1") > 0
		if now := time.Now(); observed && (due || now.After(next)) {
			due, next = false, now.Add(calm)
			n := s.n.Add(1)
			told, err := s.Set("/light/1", map[string]any{"name": "Light", "state": n%2 == 0, "power": n})
			if s.over == "DTLS" && err == nil && told > 0 {
				s.mu.Lock()
				s.acked = append(s.acked, n)
				s.mu.Unlock()
			}
		}
		wait := time.Until(next)
		if due || !observed {
			wait = 50 * time.Millisecond
		}
		select {
		case <-s.due:
			due = true
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// calm is how often a device has something to say when nobody asks for it.
const calm = 5 * time.Second

// heard is a value of a device's, and when somebody first heard of it.
type heard struct {
	value uint64
	at    time.Time
}

// subscriber hears all events, and judges them.
type subscriber struct {
	name string

	mu      sync.Mutex
	live    bool
	last    map[client.ResourceID]uint64 // version
	values  map[string][]heard           // of a device, in order
	answers map[string]bool              // to commands
	events  int
	again   int      // events that came twice, and were dropped
	wrong   []string // what must not be
	breaks  int
}

func newSubscriber(name string) *subscriber {
	return &subscriber{name: name, last: map[client.ResourceID]uint64{}, values: map[string][]heard{}, answers: map[string]bool{}}
}

func (s *subscriber) follow(ctx context.Context, c *client.Client) {
	for e, err := range c.Watch(ctx, client.EventFilter{Broken: func(error) { s.mu.Lock(); defer s.mu.Unlock(); s.breaks++ }}) {
		if err != nil {
			if ctx.Err() == nil {
				s.mu.Lock()
				s.wrong = append(s.wrong, fmt.Sprintf("the subscription ended: %v", err))
				s.mu.Unlock()
			}
			return
		}
		s.take(e)
	}
}

func (s *subscriber) take(e client.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var version uint64
	switch {
	case e.Kind == client.Live:
		s.live = true
		return
	case e.Kind == client.Lagged:
		s.wrong = append(s.wrong, "it lagged")
		return
	case e.Change != nil:
		version = e.Change.Event.Version
	case e.Command != nil:
		version = e.Command.Event.Version
	case e.Metadata != nil:
		version = e.Metadata.Event.Version
	default:
		return
	}
	s.events++
	dev := e.DeviceIDs[0]
	at := client.ResourceID{DeviceID: dev, Href: e.Href()}
	var light struct{ Power *uint64 }
	counts := e.Kind == client.Changed && at.Href == "/light/1" && e.Change.Decode(&light) == nil && light.Power != nil
	last, known := s.last[at]
	if known && version <= last {
		// It came twice, which a crash may bring about: it must be the same that came then.
		if s.again++; counts && !s.has(dev, *light.Power) {
			s.wrong = append(s.wrong, fmt.Sprintf("%s%s: version %d again, with %d, which it did not have", dev, at.Href, version, *light.Power))
		}
		return
	}
	if known && version != last+1 {
		s.wrong = append(s.wrong, fmt.Sprintf("%s%s: %s with version %d after %d", dev, at.Href, e.Kind, version, last))
	}
	s.last[at] = version
	switch {
	case e.Kind == client.Updated:
		s.answers[e.Change.By.CorrelationID] = true
	case counts:
		// A new session begins with what the device had said last.
		if best := s.best(dev); *light.Power < best {
			s.wrong = append(s.wrong, fmt.Sprintf("%s: %d after %d", dev, *light.Power, best))
		} else if *light.Power > best {
			s.values[dev] = append(s.values[dev], heard{*light.Power, time.Now()})
		}
	}
}

// best is the last value of the device's that it heard of; s.mu is held, and so below.
func (s *subscriber) best(dev string) uint64 {
	if all := s.values[dev]; len(all) > 0 {
		return all[len(all)-1].value
	}
	return 0
}

func (s *subscriber) has(dev string, n uint64) bool {
	_, ok := s.find(dev, n)
	return ok
}

func (s *subscriber) find(dev string, n uint64) (int, bool) {
	return slices.BinarySearchFunc(s.values[dev], n, func(h heard, n uint64) int { return cmp.Compare(h.value, n) })
}

// since is when it first heard of a value of the device's above n; zero: not yet.
func (s *subscriber) since(dev string, n uint64) time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	i, _ := s.find(dev, n+1)
	if i == len(s.values[dev]) {
		return time.Time{}
	}
	return s.values[dev][i].at
}

// fleet is devices, and who follows them.
type fleet struct {
	w           *world
	devices     []*simulated
	subscribers []*subscriber
	apps        []*client.Client
	stop        func()   // ends all of them
	rest        func()   // has devices count no more, and applications give no more commands
	obeyed      []string // commands that were answered with success; of who rests
}

// crowd has a fleet of devices come to the hub, and subscribers follow them.
func (w *world) crowd(devices, subscribers int) *fleet {
	t := w.t
	t.Helper()
	f := &fleet{w: w}
	token := w.token()
	for i := range 2 {
		f.apps = append(f.apps, w.app(i, token))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	f.stop = sync.OnceFunc(func() { cancel(); all.Wait() })
	t.Cleanup(f.stop)
	for i := range subscribers {
		s := newSubscriber(fmt.Sprintf("subscriber-%d", 1+i))
		f.subscribers = append(f.subscribers, s)
		all.Go(func() { s.follow(ctx, f.apps[i%len(f.apps)]) })
		until(t, patience, s.name, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.live })
	}
	front := open(t, w.gateways()...)
	for i := range devices {
		f.devices = append(f.devices, w.simulate(i, front))
	}
	counting, enough := context.WithCancel(ctx)
	var counters sync.WaitGroup
	f.rest = sync.OnceFunc(func() { enough(); counters.Wait() })
	f.suffer(fault{name: "all come", bound: patience, end: func() {
		for _, d := range f.devices {
			all.Go(func() { d.live(ctx) })
			counters.Go(func() { d.count(counting) })
		}
	}})
	counters.Go(func() { f.command(counting) })
	return f
}

// fault is what befalls the hub, and what the hub promises then.
type fault struct {
	name  string
	bound time.Duration
	begin func() // it begins
	end   func() // and is over when this returns: what is measured begins there
	after func() // is waited for in the end
	// gentle: who is sent away meanwhile is served again within bound, too, counted from then. Else all is counted from the end.
	gentle bool
}

// suffer measures how long it takes from a fault on until each subscriber has heard of each device.
func (f *fleet) suffer(x fault) {
	t := f.w.t
	t.Helper()
	began := time.Now()
	if x.begin != nil {
		x.begin()
	}
	anew := len(f.devices) - 2
	for _, d := range f.devices[anew:] {
		nudge(d.bounce)
	}
	x.end()
	over := time.Now()
	if x.after != nil {
		defer x.after()
	}
	type mark struct {
		from time.Time
		n    uint64
	}
	marks := make([]mark, len(f.devices))
	for i, d := range f.devices {
		marks[i] = mark{over, d.n.Load()}
		d.mu.Lock()
		if x.gentle && i < anew && d.broke.After(began) && d.broke.Before(over) {
			marks[i] = mark{d.broke, d.until}
		}
		d.mu.Unlock()
		nudge(d.due)
	}
	took := map[string]time.Duration{} // by what connects the device
	slow := ""
	ok := eventually(patience, func() bool {
		clear(took)
		slow = ""
		for i, d := range f.devices {
			var first time.Time
			for _, s := range f.subscribers {
				at := s.since(d.ID(), marks[i].n)
				if at.IsZero() {
					slow = fmt.Sprintf("device %d (%s, %s) at %s", i, d.ID(), d.over, s.name)
					return false
				}
				if first.IsZero() || at.Before(first) {
					first = at
				}
			}
			group := d.over
			if i >= anew {
				group = "signed in anew"
			}
			took[group] = max(took[group], first.Sub(marks[i].from))
		}
		return true
	})
	if !ok {
		t.Errorf("%s: after %v one still waits for %s", x.name, patience, slow)
		return
	}
	line := x.name + ": served again after"
	for _, k := range slices.Sorted(maps.Keys(took)) {
		line += fmt.Sprintf("  %s %v", k, took[k].Round(10*time.Millisecond))
		if took[k] > x.bound {
			t.Errorf("%s: %s was served again after %v: more than %v", x.name, k, took[k], x.bound)
		}
	}
	t.Log(line)
}

// command gives commands in turn until ctx ends.
func (f *fleet) command(ctx context.Context) {
	for i := 0; ctx.Err() == nil; i++ {
		own, cancel := context.WithTimeout(ctx, 15*time.Second)
		change, err := f.apps[i%len(f.apps)].UpdateResource(own, f.devices[i%len(f.devices)].ID(), "/light/1", map[string]any{"name": fmt.Sprint(i)}, client.CommandOptions{TTL: 10 * time.Second})
		cancel()
		if err == nil {
			f.obeyed = append(f.obeyed, change.By.CorrelationID)
		}
		pause(ctx, time.Second)
	}
}

// TestCluster: whatever process is killed, stopped or held up, and whatever server is away for a while, nothing that was acknowledged is
// lost, no subscriber misses an event or hears it twice, and all devices are served again in time. By day one of each part is killed, and
// one told to stop; by night each process is, and each sleeps for half a minute, too.
func TestCluster(t *testing.T) {
	w := run(t)
	f := w.crowd(dose.Of(40, 200, 200), dose.Of(4, 20, 20))
	kill, stop := []string{"rd-1", "gw-1", "app-1", "is", "ca"}, []string{"rd-2", "gw-2", "app-2"}
	away := 10 * time.Second
	if dose.Night() {
		kill, stop, away = w.order, w.order, time.Minute
	}
	for _, name := range kill {
		f.suffer(w.parts[name].kill())
	}
	for _, name := range stop {
		f.suffer(w.parts[name].stop())
	}
	if dose.Night() {
		for _, name := range w.order {
			f.suffer(w.parts[name].sleep(30 * time.Second))
		}
	}
	f.suffer(fault{name: fmt.Sprintf("NATS away for %v", away), bound: reunited, begin: func() {
		_ = w.nats.in.Close()
		<-w.nats.ended
	}, end: func() {
		pause(t.Context(), away)
		w.startNATS()
	}})
	f.suffer(fault{name: "MongoDB cut off for three seconds", bound: crashed, begin: func() { w.store.close(true) }, end: func() {
		pause(t.Context(), 3*time.Second)
		w.store.close(false)
	}})
	f.suffer(fault{name: "nothing", bound: crashed, end: func() {}})
	f.judge()
}

func (p *part) kill() fault {
	return fault{name: p.name + " killed", bound: crashed, begin: func() { p.p.end(syscall.SIGKILL) }, end: p.begin, after: p.ready}
}

// stop has a part stop in order. Sessions of a gateway that stops are served until it tells them to go.
func (p *part) stop() fault {
	return fault{name: p.name + " told to stop", bound: stopped, gentle: true, begin: func() { _ = p.p.cmd.Process.Signal(syscall.SIGTERM) }, end: func() {
		if <-p.p.ended; p.p.err != nil {
			p.w.t.Errorf("%s did not stop well: %v", p.name, p.p.err)
		}
		p.begin()
	}, after: p.ready}
}

// sleep has a part do nothing for a while, and then believe that nothing happened.
func (p *part) sleep(d time.Duration) fault {
	return fault{name: fmt.Sprintf("%s asleep for %v", p.name, d), bound: crashed, begin: func() { _ = p.p.cmd.Process.Signal(syscall.SIGSTOP) }, end: func() {
		pause(p.w.t.Context(), d)
		_ = p.p.cmd.Process.Signal(syscall.SIGCONT)
	}}
}

// judge compares what the hub has with what was acknowledged.
func (f *fleet) judge() {
	t := f.w.t
	t.Helper()
	f.rest()
	for i, d := range f.devices {
		want := d.n.Load()
		for _, c := range f.apps {
			var v struct{ Power uint64 }
			if !eventually(patience, func() bool {
				r, err := c.GetResource(t.Context(), d.ID(), "/light/1")
				return err == nil && r.Data != nil && r.Data.Decode(&v) == nil && v.Power == want
			}) {
				t.Errorf("device %d (%s, %s) said %d, its twin says %d", i, d.ID(), d.over, want, v.Power)
			}
		}
		if !eventually(patience, func() bool {
			s, err := f.w.parts["app-1"].control.Device(t.Context(), d.ID())
			return err == nil && s.Online
		}) {
			t.Errorf("device %d (%s, %s) is not shown as online", i, d.ID(), d.over)
		}
	}
	for _, s := range f.subscribers {
		heard := func() (missed []string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			for i, d := range f.devices {
				if best := s.best(d.ID()); best != d.n.Load() {
					missed = append(missed, fmt.Sprintf("device %d (%s, %s): %d, said %d", i, d.ID(), d.over, best, d.n.Load()))
				}
				for _, n := range d.acked {
					if !s.has(d.ID(), n) {
						missed = append(missed, fmt.Sprintf("device %d (%s, %s): %d, which was acknowledged", i, d.ID(), d.over, n))
					}
				}
			}
			for _, id := range f.obeyed {
				if !s.answers[id] {
					missed = append(missed, "the answer to command "+id)
				}
			}
			return missed
		}
		eventually(patience, func() bool { return len(heard()) == 0 })
		missed := heard()
		s.mu.Lock()
		for _, what := range slices.Concat(s.wrong, missed[:min(len(missed), 20)]) {
			t.Errorf("%s: %s", s.name, what)
		}
		t.Logf("%s: %d events, %d of them again, %d breaks", s.name, s.events, s.again, s.breaks)
		s.mu.Unlock()
	}
	acked := 0
	for _, d := range f.devices {
		acked += len(d.acked)
	}
	t.Logf("%d devices, %d acknowledged notifications, %d acknowledged commands", len(f.devices), acked, len(f.obeyed))
	if acked == 0 || len(f.obeyed) == 0 {
		t.Error("nothing was acknowledged")
	}
	f.stop()
}
