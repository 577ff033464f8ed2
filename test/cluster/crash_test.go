package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
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

// patience is how long anything may take. What it took is logged: how fast a cluster should be is not for a machine that does other
// things besides.
const patience = time.Minute

// simulated is a device that lives, and counts.
type simulated struct {
	*device.Device
	over   string
	code   string
	bounce chan struct{} // it comes anew

	n        atomic.Uint64 // what it counted to last
	hurry    atomic.Bool   // it is being measured
	measured chan struct{} // that begins
	mu       sync.Mutex    // guards acked
	acked    []uint64      // what the hub acknowledged
}

// simulate is a device that comes over TLS through the door in front of the gateways, or over DTLS to one of them.
func (w *world) simulate(i int, front *door) *simulated {
	w.t.Helper()
	id := uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "cluster %d", i)).String()
	o, err := w.parts["app-1"].control.Onboard(w.t.Context(), bundle.OnboardRequest{DeviceID: id, Certificate: true})
	if err != nil {
		w.t.Fatal(err)
	}
	s := &simulated{over: "TLS", code: o.AuthorizationCode, bounce: make(chan struct{}, 1), measured: make(chan struct{}, 1)}
	at := "coaps+tcp://" + front.addr()
	if i%4 == 3 {
		s.over, at = "DTLS", fmt.Sprintf("coaps://127.0.0.%d:%s", 1+i/4%2, w.coap)
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
			s.stay(ctx)
		}
		s.Close()
		pause(ctx, 200*time.Millisecond)
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
		case <-time.After(2 * time.Second):
		}
		own, cancel := context.WithTimeout(ctx, 5*time.Second)
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

// count counts on whenever the hub observes.
func (s *simulated) count(ctx context.Context) {
	for ctx.Err() == nil {
		if s.Observed("/oic/res")+s.Observed("/light/1") > 0 {
			n := s.n.Add(1)
			told, err := s.Set("/light/1", map[string]any{"name": "Light", "state": n%2 == 0, "power": n})
			if s.over == "DTLS" && err == nil && told > 0 {
				s.mu.Lock()
				s.acked = append(s.acked, n)
				s.mu.Unlock()
			}
		}
		select {
		case <-s.measured:
		case <-time.After(map[bool]time.Duration{true: time.Second, false: 4 * time.Second}[s.hurry.Load()]):
		case <-ctx.Done():
		}
	}
}

// subscriber hears all events, and judges them.
type subscriber struct {
	name string

	mu      sync.Mutex
	live    bool
	last    map[client.ResourceID]uint64    // version
	values  map[string]map[uint64]time.Time // of a device, and when
	best    map[string]uint64               // of a device
	answers map[string]bool                 // to commands
	events  int
	again   int      // events that came twice, and were dropped
	wrong   []string // what must not be
	breaks  int
}

func newSubscriber(name string) *subscriber {
	return &subscriber{
		name: name, last: map[client.ResourceID]uint64{}, values: map[string]map[uint64]time.Time{}, best: map[string]uint64{}, answers: map[string]bool{},
	}
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
	last, known := s.last[at]
	if known && version <= last {
		s.again++
		return
	}
	if known && version != last+1 {
		s.wrong = append(s.wrong, fmt.Sprintf("%s%s: %s with version %d after %d", dev, at.Href, e.Kind, version, last))
	}
	s.last[at] = version
	switch e.Kind {
	case client.Updated:
		s.answers[e.Change.By.CorrelationID] = true
	case client.Changed:
		var v struct{ Power *uint64 }
		if at.Href != "/light/1" || e.Change.Decode(&v) != nil || v.Power == nil {
			return
		}
		if s.values[dev] == nil {
			s.values[dev] = map[uint64]time.Time{}
		}
		if s.values[dev][*v.Power].IsZero() {
			s.values[dev][*v.Power] = time.Now()
		}
		if *v.Power < s.best[dev] {
			s.wrong = append(s.wrong, fmt.Sprintf("%s: %d after %d", dev, *v.Power, s.best[dev]))
		}
		s.best[dev] = max(s.best[dev], *v.Power)
	}
}

// since is when it first heard of a value of the device's above n; zero: not yet.
func (s *subscriber) since(dev string, n uint64) (first time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for v, at := range s.values[dev] {
		if v > n && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	return first
}

// fleet is devices, and who follows them.
type fleet struct {
	w           *world
	devices     []*simulated
	subscribers []*subscriber
	apps        []*client.Client
	commands    sync.Mutex
	obeyed      []string // commands that were answered with success
}

// served measures how long it takes from a fault on until each subscriber has heard of each device; then is what follows the fault.
func (f *fleet) served(what string, fault, then func()) {
	t := f.w.t
	t.Helper()
	fault()
	began := time.Now()
	before := map[string]uint64{}
	for _, d := range f.devices {
		before[d.ID()] = d.n.Load()
		d.hurry.Store(true)
		select {
		case d.measured <- struct{}{}:
		default:
		}
	}
	anew := len(f.devices) - 2
	for _, d := range f.devices[anew:] {
		select {
		case d.bounce <- struct{}{}:
		default:
		}
	}
	then()
	took := map[string]time.Duration{} // by what connects the device
	slow := ""
	ok := eventually(patience, func() bool {
		clear(took)
		slow = ""
		for i, d := range f.devices {
			var heard time.Time
			for _, s := range f.subscribers {
				at := s.since(d.ID(), before[d.ID()])
				if at.IsZero() {

					slow = fmt.Sprintf("device %d (%s, %s) at %s", i, d.ID(), d.over, s.name)
					return false
				}
				if heard.IsZero() || at.Before(heard) {
					heard = at
				}
			}
			group := d.over
			if i >= anew {
				group = "signed in anew"
			}
			took[group] = max(took[group], heard.Sub(began))
		}
		return true
	})
	for _, d := range f.devices {
		d.hurry.Store(false)
	}
	if !ok {
		t.Errorf("%s: after %v one still waits for %s", what, patience, slow)
		return
	}
	line := what + ": served again after"
	for _, k := range slices.Sorted(maps.Keys(took)) {
		line += fmt.Sprintf("  %s %v", k, took[k].Round(10*time.Millisecond))
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
			f.commands.Lock()
			f.obeyed = append(f.obeyed, change.By.CorrelationID)
			f.commands.Unlock()
		}
		pause(ctx, time.Second)
	}
}

// TestCluster: whatever process is killed or stopped, and whatever server is away for a while, nothing that was acknowledged is lost, no
// subscriber misses an event or hears it twice, and all devices are served again.
func TestCluster(t *testing.T) {
	w := run(t)
	f := &fleet{w: w}
	token := w.token()
	for i := range 2 {
		f.apps = append(f.apps, w.app(i, token))
	}
	ctx, cancel := context.WithCancel(t.Context())
	var all sync.WaitGroup
	stop := sync.OnceFunc(func() { cancel(); all.Wait() })
	t.Cleanup(stop)
	for i, c := range f.apps {
		s := newSubscriber(fmt.Sprintf("subscriber-%d", 1+i))
		f.subscribers = append(f.subscribers, s)
		all.Go(func() { s.follow(ctx, c) })
		until(t, patience, s.name, func() bool { s.mu.Lock(); defer s.mu.Unlock(); return s.live })
	}
	front := open(t, "127.0.0.1:"+w.coap, "127.0.0.2:"+w.coap)
	for i := range dose.Of(20, 20, 60) {
		f.devices = append(f.devices, w.simulate(i, front))
	}
	counting, enough := context.WithCancel(ctx)
	var counters sync.WaitGroup
	f.served("all come", func() {}, func() {
		for _, d := range f.devices {
			all.Go(func() { d.live(ctx) })
			counters.Go(func() { d.count(counting) })
		}
	})
	counters.Go(func() { f.command(counting) })
	for range dose.Of(1, 1, 5) {
		f.faults()
	}
	f.served("nothing happened", func() {}, func() {})
	enough()
	counters.Wait()
	f.judge()
	stop()
}

func (f *fleet) faults() {
	w := f.w
	for _, fault := range []struct {
		name   string
		signal syscall.Signal
	}{
		// Sessions of a gateway that stops are served until it tells them to go: measured is what comes after its end.
		{"rd-1", syscall.SIGKILL},
		{"gw-1", syscall.SIGKILL},
		{"app-1", syscall.SIGKILL},
		{"is", syscall.SIGKILL},
		{"ca", syscall.SIGKILL},
		{"rd-2", syscall.SIGTERM},
		{"gw-2", syscall.SIGTERM},
	} {
		p := w.parts[fault.name]
		f.served(fault.name+" "+fault.signal.String(), func() {
			_ = p.p.cmd.Process.Signal(fault.signal)
			if strings.HasPrefix(fault.name, "gw") {
				<-p.p.ended
			}
		}, func() {
			<-p.p.ended
			if fault.signal == syscall.SIGTERM && p.p.err != nil {
				w.t.Logf("%s did not stop in time: %v", fault.name, p.p.err) // whoever it kept waiting asked another
			}
			p.begin()
		})
		p.p.ready(w.t, patience)
	}
	f.served("NATS stopped and started", func() {
		_ = w.nats.in.Close()
		<-w.nats.ended
	}, w.startNATS)
	f.served("MongoDB cut off for three seconds", func() { w.store.close(true) }, func() {
		pause(w.t.Context(), 3*time.Second)
		w.store.close(false)
	})
}

// judge compares what the hub has with what was acknowledged.
func (f *fleet) judge() {
	t := f.w.t
	t.Helper()
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
	}
	for _, s := range f.subscribers {
		heard := func() (missed []string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			for i, d := range f.devices {
				if s.best[d.ID()] != d.n.Load() {
					missed = append(missed, fmt.Sprintf("device %d (%s, %s): %d, said %d", i, d.ID(), d.over, s.best[d.ID()], d.n.Load()))
				}
				for _, n := range d.acked {
					if s.values[d.ID()][n].IsZero() {
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
}
