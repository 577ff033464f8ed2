package load

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/test/device"
)

// Config is what to measure. The hub is one; API has a token for each owner, and the devices are theirs in turn.
type Config struct {
	Devices   int
	AtOnce    int           // workers of the phases that connect or ask
	UnderWay  int           // notifications under way
	During    time.Duration // of each phase that has no end of its own
	Rate      float64       // notifications a second of the open loop
	Burst     int           // notifications of each device at once
	Listeners int           // of each owner in the fan-out
	Phases    []string      // names of Phases; empty: all
	Rounds    int           // how often all but the setup are measured, in turns
	Transport string        // for the results
	Seed      string        // makes the devices' IDs
	PIDs      []int         // of the hub; none: its CPU and memory are not measured
	API       API
	// Restless says why the hub's memory before its first device is not known; empty: it is.
	Restless string
	// Onboard is asked for what each device needs, device by device of an owner, both by number.
	Onboard func(ctx context.Context, owner, number int, id string) (device.Onboarding, error)

	patience time.Duration // how long a single thing may take before it has failed; 0: ten seconds
}

// The phases, in their order. What a phase is is written where it is carried out.
var phases = []struct {
	name string
	do   func(*run, context.Context) Result
}{
	{"setup", (*run).setup},
	{"idle", (*run).idle},
	{"sign-ins", (*run).signIns},
	{"notify", (*run).notifyClosed},
	{"notify-open", (*run).notifyOpen},
	{"burst", (*run).burst},
	{"commands", func(r *run, ctx context.Context) Result { return r.command(ctx, "commands", r.cfg.AtOnce) }},
	{"command", func(r *run, ctx context.Context) Result { return r.command(ctx, "command", 1) }},
	{"device-reads", func(r *run, ctx context.Context) Result { return r.read(ctx, "device-reads", "?twin=false") }},
	{"twin-reads", func(r *run, ctx context.Context) Result { return r.read(ctx, "twin-reads", "") }},
	{"list", (*run).list},
	{"fan-out", (*run).fanOut},
	{"reconnect", (*run).reconnect},
}

// Phases are the names of the phases in their order.
func Phases() (names []string) {
	for _, p := range phases {
		names = append(names, p.name)
	}
	return names
}

// steady is for how long memory must not have become less.
const steady = 12 * time.Second

type run struct {
	cfg    Config
	n      confirmables
	peers  []*peer
	before int64 // memory before the first device; 0: not known
	value  atomic.Uint64
}

// Run measures, and hands each result on as soon as it is there. When ctx ends the phase under way ends with what it has, and
// no other begins, which is no error. The error is of a setup without which nothing can be measured.
func Run(ctx context.Context, cfg Config, report func(Result)) error {
	for _, name := range cfg.Phases {
		if !slices.Contains(Phases(), name) {
			return fmt.Errorf("there is no phase %q; the phases are %s", name, strings.Join(Phases(), ", "))
		}
	}
	if cfg.patience == 0 {
		cfg.patience = 10 * time.Second
	}
	r := &run{cfg: cfg}
	r.value.Store(firstValue)
	start := Result{Phase: "start", Transport: cfg.Transport} // the hub before its first device
	var err error
	if r.before, err = RSS(cfg.PIDs); err == nil && cfg.Restless != "" {
		err = errors.New(cfg.Restless)
	}
	if err != nil {
		start.Missing, r.before = err.Error(), 0
	} else {
		start.RSS = ptr(float64(r.before) / (1 << 20))
	}
	report(start)
	defer r.disconnect()
	for round := range max(cfg.Rounds, 1) {
		for _, p := range phases {
			setup := p.name == "setup"
			switch {
			case ctx.Err() != nil:
				return nil
			case setup && round > 0, !setup && len(cfg.Phases) > 0 && !slices.Contains(cfg.Phases, p.name):
				continue
			}
			res := p.do(r, ctx)
			report(res)
			if setup && res.Failed > 0 && ctx.Err() == nil {
				return fmt.Errorf("%d of %d devices could not be set up: %s", res.Failed, cfg.Devices, res.Error)
			}
		}
	}
	return nil
}

// disconnect has all devices go.
func (r *run) disconnect() {
	var wg sync.WaitGroup
	for _, p := range r.peers {
		wg.Go(p.disconnect)
	}
	wg.Wait()
}

func (r *run) meter(phase string, atOnce int) *meter {
	return newMeter(phase, r.cfg.Transport, atOnce, r.cfg.PIDs, &r.n)
}

// setup signs all devices up, signs them in, publishes, and waits until the hub observes their resources.
func (r *run) setup(ctx context.Context) Result {
	for i := range r.cfg.Devices {
		id := uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "coaphub load %s %d", r.cfg.Seed, i)).String()
		r.peers = append(r.peers, &peer{id: id, owner: i % len(r.cfg.API.Tokens), n: &r.n})
	}
	m := r.meter("setup", r.cfg.AtOnce)
	m.closed(ctx, r.cfg.AtOnce, len(r.peers), 0, func(ctx context.Context, _, k int) (err error) {
		p := r.peers[k]
		if p.on, err = r.cfg.Onboard(ctx, p.owner, k, p.id); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(ctx, 3*r.cfg.patience)
		defer cancel()
		for _, step := range []func(context.Context) error{p.connect, p.signUp, p.signIn, p.publish, p.observed} {
			if err := step(ctx); err != nil {
				return err
			}
		}
		return nil
	})
	return m.end()
}

// idle is the memory of the hub while all devices are signed in and say nothing, once it gets no less.
func (r *run) idle(ctx context.Context) Result {
	m := r.meter("idle", 0)
	least, err := RSS(r.cfg.PIDs)
	for since := time.Now(); err == nil && ctx.Err() == nil && time.Since(since) < steady; {
		wait(ctx, time.Second)
		var now int64
		if now, err = RSS(r.cfg.PIDs); now < least-least/100 {
			least, since = now, time.Now()
		}
	}
	res := m.end()
	switch {
	case err != nil:
		res.Missing = err.Error()
	case r.cfg.Restless != "":
		res.Missing = r.cfg.Restless
	case r.before > 0 && least > r.before: // else there are too few devices to see them, or the hub was in use before
		res.PerDevice = ptr(float64(least-r.before) / 1024 / float64(len(r.peers)))
	}
	return res
}

func wait(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
	case <-ctx.Done():
	}
}

// signIns has all devices go, and come back some at once: connection, handshake, sign-in.
func (r *run) signIns(ctx context.Context) Result { return r.comeBack(ctx, "sign-ins", r.cfg.AtOnce) }

// reconnect is the same with all devices at once, as after a power failure.
func (r *run) reconnect(ctx context.Context) Result {
	return r.comeBack(ctx, "reconnect", len(r.peers))
}

func (r *run) comeBack(ctx context.Context, phase string, atOnce int) Result {
	r.disconnect()
	m := r.meter(phase, atOnce)
	m.closed(ctx, atOnce, len(r.peers), 0, func(ctx context.Context, _, k int) error {
		ctx, cancel := context.WithTimeout(ctx, 6*r.cfg.patience)
		defer cancel()
		if err := r.peers[k].connect(ctx); err != nil {
			return err
		}
		return r.peers[k].signIn(ctx)
	})
	res := m.end()
	late, cancel := context.WithTimeout(ctx, 3*r.cfg.patience)
	defer cancel()
	for _, p := range r.peers { // not measured: what follows needs it
		if err := p.observed(late); err != nil && ctx.Err() == nil {
			res.Failed++ // it is signed in, but of no use
			res.Error = err.Error()
		}
	}
	return res
}

// failed is a phase that could not begin.
func (r *run) failed(phase string, err error) Result {
	return Result{Phase: phase, Transport: r.cfg.Transport, Missing: err.Error()}
}

// next is the device and the light whose turn it is.
func (r *run) next(k int) (*peer, int) {
	return r.peers[k%len(r.peers)], k / len(r.peers) % lights
}

var (
	errNotHeard = errors.New("a notification was not heard by the subscriber")
	errNotByAll = errors.New("a notification was not heard by all subscribers")
)

// notifyClosed has so many notifications under way, each from its device through the hub to a subscriber.
func (r *run) notifyClosed(ctx context.Context) Result {
	return r.loop(ctx, "notify", r.cfg.UnderWay, 1)
}

// fanOut is the same with more subscribers, each of whom hears everything of its owner; operations are what they heard.
func (r *run) fanOut(ctx context.Context) Result {
	return r.loop(ctx, "fan-out", r.cfg.AtOnce, r.cfg.Listeners)
}

func (r *run) loop(ctx context.Context, phase string, workers, listeners int) Result {
	heard := make([]chan uint64, workers) // by whom it was sent
	for i := range heard {
		heard[i] = make(chan uint64, 1)
	}
	base := r.value.Load()
	listening, stop := context.WithCancel(ctx)
	defer stop()
	sending, cancel := context.WithCancelCause(ctx) // ends early with a subscription
	defer cancel(nil)
	var others atomic.Int64
	for owner := range r.cfg.API.Tokens {
		for i := range listeners {
			err := listen(listening, r.cfg.API, owner, func(v uint64) {
				if v < base {
					return
				}
				if i > 0 {
					others.Add(1)
					return
				}
				select {
				case heard[(v-base)%uint64(workers)] <- v:
				default: // nobody waits for it any more
				}
			}, func(err error) { cancel(err) })
			if err != nil {
				return r.failed(phase, fmt.Errorf("subscribe: %w", err))
			}
		}
	}
	m := r.meter(phase, workers)
	var begun atomic.Int64
	m.closed(sending, workers, 0, r.cfg.During, func(ctx context.Context, w, k int) error {
		begun.Add(1)
		p, light := r.next(k)
		v := base + uint64(k*workers+w)
		if err := p.notify(light, v); err != nil {
			wait(ctx, 10*time.Millisecond)
			return err
		}
		late := time.NewTimer(r.cfg.patience)
		defer late.Stop()
		for {
			select {
			case got := <-heard[w]:
				if got == v {
					return nil
				}
			case <-late.C:
				return errNotHeard
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	})
	r.value.Add(uint64(begun.Load()+1) * uint64(workers))
	due := m.ops.Load() * int64(listeners-1) // what one has heard the others hear, too
	for until := time.Now().Add(r.cfg.patience); others.Load() < due && sending.Err() == nil && time.Now().Before(until); {
		wait(sending, time.Millisecond)
	}
	if err := context.Cause(sending); err != nil && ctx.Err() == nil {
		m.fail(err)
	}
	m.ops.Add(others.Load())
	if lost := due - others.Load(); lost > 0 && sending.Err() == nil {
		m.fail(errNotByAll)
		m.failed.Add(lost - 1)
	}
	return m.end()
}

// notifyOpen sends at a fixed rate, whatever comes back: latencies are from the moment that a notification was due, so that a
// hub that stalls is charged with all that waits.
func (r *run) notifyOpen(ctx context.Context) Result {
	const phase = "notify-open"
	base := r.value.Load()
	n := int(r.cfg.Rate * r.cfg.During.Seconds())
	if n == 0 {
		return r.failed(phase, errors.New("at this rate no notification is due in the time of the phase"))
	}
	var mu sync.Mutex // guards left, m and started
	left, all := n, make(chan struct{})
	var started time.Time
	due := func(i int) time.Time {
		return started.Add(time.Duration(float64(i) / r.cfg.Rate * float64(time.Second)))
	}
	var m *meter
	listening, stop := context.WithCancel(ctx)
	defer stop()
	sending, cancel := context.WithCancelCause(ctx) // ends early with a subscription
	defer cancel(nil)
	for owner := range r.cfg.API.Tokens {
		err := listen(listening, r.cfg.API, owner, func(v uint64) {
			if v < base || v >= base+uint64(n) {
				return
			}
			mu.Lock()
			defer mu.Unlock()
			m.did(time.Since(due(int(v - base))))
			if left--; left == 0 {
				close(all)
			}
		}, func(err error) { cancel(err) })
		if err != nil {
			return r.failed(phase, fmt.Errorf("subscribe: %w", err))
		}
	}
	mu.Lock()
	m, started = r.meter(phase, 0), time.Now()
	mu.Unlock()
	sent, late, worst := 0, 0, time.Duration(0)
	for i := range n {
		if d := time.Until(due(i)); d > 0 {
			wait(sending, d)
		}
		if sending.Err() != nil {
			break
		}
		by := time.Since(due(i))
		if worst = max(worst, by); by > time.Millisecond {
			late++
		}
		p, light := r.next(i)
		sent++
		if err := p.notify(light, base+uint64(i)); err != nil {
			m.fail(err)
		}
	}
	rest := time.NewTimer(r.cfg.patience)
	defer rest.Stop()
	select {
	case <-all:
	case <-rest.C:
	case <-sending.Done():
	}
	stop()
	r.value.Add(uint64(n))
	if ctx.Err() == nil {
		lost, err := sent-int(m.ops.Load()+m.failed.Load()), context.Cause(sending)
		if err == nil {
			err = errNotHeard
		} else {
			lost = max(lost, 1) // it may have ended before anything was sent
		}
		for range lost {
			m.fail(err)
		}
	}
	res := m.end()
	res.Late, res.LateBy = late, ptr(float64(worst)/float64(time.Millisecond))
	return res
}

// burst has each device send many notifications of one resource at once, and ends when every twin has the last one.
func (r *run) burst(ctx context.Context) Result {
	const phase = "burst"
	if r.peers[0].datagrams() {
		return r.failed(phase, errors.New("over datagrams a device has one message under way, so there are no bursts (NSTART of RFC 7252, Section 4.7)"))
	}
	last := r.value.Add(uint64(r.cfg.Burst)) - 1
	m := r.meter(phase, len(r.peers))
	var wg sync.WaitGroup
	for _, p := range r.peers {
		wg.Go(func() {
			for i := range r.cfg.Burst {
				if err := p.notify(0, last-uint64(r.cfg.Burst-1-i)); err != nil {
					m.fail(err)
					return
				}
			}
		})
	}
	wg.Wait()
	want := []byte(`"t":` + strconv.FormatUint(last, 10))
	c := &caller{api: r.cfg.API}
	defer c.close()
	until := time.Now().Add(6 * r.cfg.patience)
	for _, p := range r.peers {
		for ; ; wait(ctx, 5*time.Millisecond) {
			_, _, err := c.do(ctx, p.owner, "GET", "/api/v1/devices/"+p.id+"/resources"+lightHref(0), "")
			if err == nil && bytes.Contains(c.body.Bytes(), want) {
				m.ops.Add(int64(r.cfg.Burst))
				break
			}
			if ctx.Err() != nil {
				return m.end()
			}
			if time.Now().After(until) {
				if err == nil {
					err = errors.New("a twin did not end at the last value")
				}
				m.fail(err)
				break
			}
		}
	}
	return m.end()
}

// request is one that an application makes; want is what its answer has in it, so that an answer with nothing in it does not
// count as one.
type request struct {
	owner              int
	method, path, body string
	want               string
	times              int // how often
}

// command has applications update resources; each waits for the device's answer.
func (r *run) command(ctx context.Context, phase string, atOnce int) Result {
	return r.call(ctx, phase, atOnce, func(k int) request {
		p, light := r.next(k)
		return request{p.owner, "PUT", "/api/v1/devices/" + p.id + "/resources" + lightHref(light), `{"t":` + strconv.Itoa(k) + `}`, "", 0}
	})
}

// read has applications read resources: from the twin, or from the device.
func (r *run) read(ctx context.Context, phase, query string) Result {
	return r.call(ctx, phase, r.cfg.AtOnce, func(k int) request {
		p, light := r.next(k)
		return request{p.owner, "GET", "/api/v1/devices/" + p.id + "/resources" + lightHref(light) + query, "", `"t":`, 1}
	})
}

// list has one application read the list of all devices, of each owner in turn.
func (r *run) list(ctx context.Context) Result {
	return r.call(ctx, "list", 1, func(k int) request {
		owners := len(r.cfg.API.Tokens)
		owner := k % owners
		return request{owner, "GET", "/api/v1/devices", "", `"result":`, (len(r.peers) + owners - 1 - owner) / owners}
	})
}

func (r *run) call(ctx context.Context, phase string, atOnce int, what func(k int) request) Result {
	callers := make([]*caller, atOnce)
	for i := range callers {
		callers[i] = &caller{api: r.cfg.API}
		defer callers[i].close()
	}
	m := r.meter(phase, atOnce)
	m.closed(ctx, atOnce, 0, r.cfg.During, func(ctx context.Context, w, k int) error {
		ctx, cancel := context.WithTimeout(ctx, r.cfg.patience)
		defer cancel()
		begin := time.Now()
		q := what(k)
		first, _, err := callers[w].do(ctx, q.owner, q.method, q.path, q.body)
		if err == nil && bytes.Count(callers[w].body.Bytes(), []byte(q.want)) < q.times {
			err = fmt.Errorf("%s %s: the answer has less than %d of %s", q.method, q.path, q.times, q.want)
		}
		if err == nil && atOnce == 1 {
			m.mu.Lock()
			m.first = append(m.first, first.Sub(begin))
			m.mu.Unlock()
		}
		return err
	})
	return m.end()
}

// Echo measures a server that answers GET /echo, with so many connections that each have one request under way: what the
// transport can do at all.
func Echo(ctx context.Context, transport string, on device.Onboarding, connections int, during time.Duration, pids []int) Result {
	const phase = "echo"
	peers := make([]*peer, connections)
	var n confirmables
	for i := range peers {
		peers[i] = &peer{on: on, n: &n}
		if err := peers[i].connect(ctx); err != nil {
			return Result{Phase: phase, Transport: transport, Missing: err.Error()}
		}
		defer peers[i].disconnect()
	}
	m := newMeter(phase, transport, connections, pids, &n)
	m.closed(ctx, connections, 0, during, func(ctx context.Context, w, _ int) error {
		_, err := peers[w].get(ctx, "/echo")
		return err
	})
	return m.end()
}
