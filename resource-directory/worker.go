package resourcedirectory

import (
	"container/list"
	"context"
	"crypto/rand"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	// maxRound bounds the requests that one append carries, so that the first of them does not wait for thousands.
	maxRound = 1024
	// maxRoundBytes bounds the commits of one append; what does not fit waits for the next.
	maxRoundBytes = 8 << 20
	// maxTries is how often a request is decided again after conflicts; more means that two processes fight over a device.
	maxTries = 8
	// loaders is how many devices a worker loads at a time.
	loaders = 2
	// sweepEvery is how often cold devices and lost connections are looked for.
	sweepEvery = 2 * time.Second
	// commitRoom is what events may take of a commit.
	commitRoom = hub.MaxCommitBytes - commitOverhead
	// entryCost is about what an entry takes of memory beside its state.
	entryCost = 512
)

// worker decides for its devices. Its goroutine alone touches the fields from devices to alarm; it never waits for the store: one append
// is under way while the next collects, loads run beside.
type worker struct {
	d  *Directory
	in chan *request // full: see Directory.enqueue

	devices map[hub.DeviceID]*entry
	bytes   int64                  // of all entries, see weigh
	woke    bool                   // a load was taken since the last round
	pressed chan struct{}          // one place: other workers ask to evict
	coldest list.List              // of *entry, least recently used first
	ready   []*request             // in order of arrival, together with parked ones at most cfg.Queue
	asked   int                    // requests taken and not answered
	under   []*build               // the append under way, nil when there is none
	done    chan []error           // its outcome, one place
	load    chan *entry            // at most asked entries wait here, so it never blocks
	loaded  chan loading           //
	live    map[hub.DeviceID]*live // sessions of this process, at most one a device; they outlive cold state
	gone    map[hub.DeviceID]*live // those of live whose OFFLINE is not stored yet
	due     deadlines              // of commands
	alarm   *time.Timer            // rings at the first of due

	lostMu sync.Mutex
	// left is guarded by leftMu: of which partitions everything in memory is to be forgotten; lefts says that there are some.
	leftMu sync.Mutex
	left   *[partitions]bool
	lefts  chan struct{}
	// lost is guarded by lostMu: sessions whose OFFLINE was refused, until the next sweep. One a device that was signed in
	// here, so it needs no bound of its own.
	lost map[hub.DeviceID]uint64
}

// entry is a device in memory.
type entry struct {
	dev hub.DeviceID
	// state is what is stored; nil while it is not known.
	state   *state
	public  atomic.Pointer[state] // the same for readers; nil: they ask the store
	loading bool
	parked  []*request // wait for the load, in order
	held    int        // requests that it was loaded for and that are not decided yet
	under   bool       // a part of the append under way
	stale   bool       // others may have written it since: it is loaded anew before anything else is decided
	size    int64      // as counted in worker.bytes
	used    time.Time
	place   *list.Element
}

// live is how to reach a session of this process.
type live struct {
	session uint64
	to      hub.Deliverer
	retry   *request // the last try to store its OFFLINE that nobody waits for
}

type loading struct {
	e   *entry
	s   *state
	err error
}

// build is what one append holds of one device.
type build struct {
	e       *entry
	tip     *state // after all commits
	open    bool   // the last commit takes more events
	commits []*draft
	reqs    []resting
}

// resting is a request that is answered when the first n commits are stored.
type resting struct {
	r   *request
	err error
	n   int
	// wrote: it made events, so that the store has found that the picture was right.
	wrote bool
}

type draft struct {
	c       hub.Commit
	size    int
	changed []string
	after   *state
}

func newWorker(d *Directory) *worker {
	return &worker{
		d: d, in: make(chan *request, d.cfg.Queue), devices: map[hub.DeviceID]*entry{}, done: make(chan []error, 1),
		pressed: make(chan struct{}, 1), lefts: make(chan struct{}, 1),
		load: make(chan *entry, d.cfg.Queue+1), loaded: make(chan loading), live: map[hub.DeviceID]*live{},
		gone: map[hub.DeviceID]*live{}, lost: map[hub.DeviceID]uint64{}, due: deadlines{byID: map[string]*deadline{}},
	}
}

// run works until the directory closes and all that was taken is answered.
func (w *worker) run(ctx context.Context) {
	var helpers sync.WaitGroup
	over := make(chan struct{})
	for range loaders {
		helpers.Go(func() {
			for e := range w.load {
				s, err := w.d.codec.loadToAppend(ctx, w.d.store, e.dev)
				w.d.metrics.loads.Inc()
				select {
				case w.loaded <- loading{e, s, err}:
				case <-over: // nobody waits for it: it was not loaded for a request
				}
			}
		})
	}
	defer helpers.Wait()
	defer close(w.load)
	defer close(over)
	sweep := time.NewTicker(sweepEvery)
	defer sweep.Stop()
	w.alarm = time.NewTimer(time.Hour)
	defer w.alarm.Stop()
	closing := w.d.closing
	for {
		in := w.in
		if w.asked >= w.d.cfg.Queue {
			in = nil // what is taken is bounded too; callers wait in the queue
		}
		loaded := w.loaded
		if w.woke && w.under != nil && w.over() {
			// A load that was taken stays in memory until its requests are decided, which waits for the append. With too much in
			// memory only one a round is taken; one, so that the loads go on however busy the worker is.
			loaded = nil
		}
		if closing == nil && w.asked == 0 && len(w.in) == 0 {
			return
		}
		select {
		case r := <-in:
			w.take(r)
		case errs := <-w.done:
			w.settle(errs)
		case l := <-loaded:
			w.wake(l)
		case <-w.pressed:
			w.evict()
		case <-w.lefts:
			w.forget()
		case now := <-sweep.C:
			if closing != nil { // else what cannot be stored would be tried for ever
				w.sweep(now)
			}
		case now := <-w.alarm.C:
			if closing != nil {
				w.expire(now)
			}
		case <-closing:
			closing = nil
		}
		for more := true; more && w.asked < w.d.cfg.Queue; {
			select {
			case r := <-w.in:
				w.take(r)
			default:
				more = false
			}
		}
		for w.under == nil && len(w.ready) > 0 {
			w.round(ctx, helpers.Go)
		}
	}
}

// take accepts a request; it is answered exactly once.
func (w *worker) take(r *request) {
	w.asked++
	w.ready = append(w.ready, r)
	if r.taken != nil {
		r.taken(w)
	}
}

func (w *worker) reply(r *request, err error) {
	w.asked--
	if err != nil {
		w.d.metrics.refused.WithLabelValues(hub.KindOf(err).String()).Inc()
	}
	if r.settled.CompareAndSwap(false, true) {
		r.answer <- err
	} else if err == nil && r.orphaned != nil {
		r.orphaned(w)
	}
}

// entry returns the device's place in memory, as the most recently used.
func (w *worker) entry(dev hub.DeviceID) *entry {
	e := w.devices[dev]
	if e == nil {
		e = &entry{dev: dev}
		e.place = w.coldest.PushBack(e)
		w.devices[dev] = e
		w.d.devices.Store(dev, e)
		w.d.metrics.loaded.Inc()
		w.weigh(e)
	}
	e.used = time.Now()
	w.coldest.MoveToBack(e.place)
	return e
}

// round decides what is ready and appends what came of it.
func (w *worker) round(ctx context.Context, start func(func())) {
	w.woke = false
	now := time.Now().UnixNano()
	builds := map[*entry]*build{}
	var order []*build
	bytes, n := 0, 0
	for ; n < len(w.ready) && n < maxRound && bytes < maxRoundBytes; n++ {
		r := w.ready[n]
		if r.holds != nil {
			r.holds.held--
			r.holds = nil
		}
		if err := r.ctx.Err(); err != nil { // nobody waits any more, and nothing was done
			w.reply(r, wrap(r.op, err))
			continue
		}
		e := w.entry(r.dev)
		if e.stale && !e.loading {
			e.stale, e.state = false, nil
		}
		if e.state == nil {
			e.parked = append(e.parked, r)
			w.fetch(e)
			continue
		}
		b := builds[e]
		if b == nil {
			b = &build{e: e, tip: e.state}
			builds[e] = b
			order = append(order, b)
		}
		bytes += w.decide(b, r, now)
	}
	w.ready = append(w.ready[:0], w.ready[n:]...)

	var entries []store.Entry
	for _, b := range order {
		if len(b.commits) == 0 {
			for _, q := range b.reqs {
				w.finish(q.r, q.err, false)
			}
			continue
		}
		made, err := w.entries(b)
		if err != nil {
			for _, q := range b.reqs {
				w.reply(q.r, wrap(q.r.op, err))
			}
			continue
		}
		entries = append(entries, made...)
		b.e.under = true
		w.under = append(w.under, b)
	}
	if w.under == nil {
		w.evict() // what was loaded for these requests may go
		return
	}
	w.d.metrics.batch.Observe(float64(len(entries)))
	start(func() {
		begin := time.Now()
		errs := w.d.store.Append(ctx, entries)
		w.d.metrics.append.Observe(time.Since(begin).Seconds())
		w.done <- errs
	})
}

// decide adds what r makes of the device to b and returns the bytes it takes.
func (w *worker) decide(b *build, r *request, now int64) int {
	now = max(now, b.tip.time) // times of a device never go back, whatever the clock does
	events, err := r.decide(b.tip, now)
	if err != nil || len(events) == 0 {
		// The answer may rest on commits that are not stored yet, so it waits for them.
		b.reqs = append(b.reqs, resting{r, err, len(b.commits), false})
		return 0
	}
	total := 0
	for i := range events {
		total += eventSize(&events[i])
	}
	if r.fresh || !b.open || !b.last().fits(len(events), total) {
		b.open = false
	}
	for len(events) > 0 {
		if !b.open {
			w.begin(b, r, now)
		}
		c := b.last()
		piece, size := 0, 0
		for piece < len(events) {
			s := eventSize(&events[piece])
			if !c.fits(piece+1, size+s) && (piece > 0 || len(c.c.Events) > 0) {
				break
			}
			piece, size = piece+1, size+s
		}
		for i := range events[:piece] {
			ev := &events[i]
			if piece < len(events) {
				ev.Message = 0 // see state.sent
			}
			ev.Version = b.tip.version(ev)
			c.c.Events = append(c.c.Events, *ev)
			c.changed = b.tip.apply(&c.c, len(c.c.Events)-1, c.changed)
		}
		c.size += size
		events = events[piece:]
		b.open = len(events) == 0
	}
	b.reqs = append(b.reqs, resting{r, nil, len(b.commits), true})
	return total
}

func (b *build) last() *draft { return b.commits[len(b.commits)-1] }

func (c *draft) fits(events, size int) bool {
	return len(c.c.Events)+events <= hub.MaxCommitEvents && c.size+size <= commitRoom
}

// begin opens a commit. The tip becomes a state of its own, which changes until the commit is closed.
func (w *worker) begin(b *build, r *request, now int64) {
	c := &draft{c: hub.Commit{
		Device: b.e.dev, Seq: b.tip.seq + 1, Writer: w.d.writer, Number: w.d.number.Add(1), Time: now,
		Owner: b.tip.owner, Generation: b.tip.generation,
	}}
	if r.owner.Owner != "" {
		c.c.Owner, c.c.Generation = r.owner.Owner, r.owner.Generation
	}
	_, _ = rand.Read(c.c.ID[:]) // never fails (crypto/rand)
	b.tip = b.tip.begin(&c.c)
	c.after = b.tip
	b.commits = append(b.commits, c)
	b.open = true
}

func (w *worker) entries(b *build) ([]store.Entry, error) {
	out := make([]store.Entry, len(b.commits))
	for i, c := range b.commits {
		docs, err := w.d.codec.docs(c.after, append(c.changed, deviceKey), "")
		if err != nil {
			return nil, err
		}
		out[i] = store.Entry{Commit: c.c, Docs: docs}
	}
	return out, nil
}

// settle takes the outcome of the append: apply, publish, answer, in this order.
func (w *worker) settle(errs []error) {
	under := w.under
	w.under = nil
	for _, b := range under {
		b.e.under = false
		mine := errs[:len(b.commits)]
		errs = errs[len(b.commits):]
		n := 0
		for n < len(mine) && mine[n] == nil {
			n++
		}
		w.d.metrics.commits.Add(float64(n))
		if n > 0 {
			w.d.apart.stored(b.e.dev)
		}
		for _, c := range b.commits[:n] {
			w.d.metrics.events.Add(float64(len(c.c.Events)))
			b.e.state = c.after
		}
		var failed error
		if n < len(mine) {
			failed = mine[n]
			switch hub.KindOf(failed) {
			case hub.Exhausted, hub.Unavailable, hub.TooLarge: // nothing was stored, the state is right
			default:
				b.e.state = nil // somebody else wrote, or we do not know what happened: ask the store
			}
		}
		if b.e.stale {
			b.e.stale, b.e.state = false, nil
		}
		b.e.public.Store(b.e.state)
		w.d.changes.count(b) // after readers see it
		for _, c := range b.commits[:n] {
			w.told(&c.c, c.after)
		}
		w.weigh(b.e)
		var again []*request
		for _, q := range b.reqs {
			switch {
			case q.n <= n:
				w.finish(q.r, q.err, q.wrote)
			case hub.IsKind(failed, hub.Conflict) && q.r.tries < maxTries:
				q.r.tries++
				again = append(again, q.r)
			case hub.IsKind(failed, hub.Conflict):
				w.reply(q.r, errContended.With(q.r.op, failed))
			default:
				w.reply(q.r, refused(q.r.op, failed))
			}
		}
		if hub.IsKind(failed, hub.Conflict) {
			w.d.metrics.conflicts.Inc()
		}
		if len(again) > 0 {
			// They go in front of what has arrived for this device since; that finds no state and parks behind them.
			b.e.parked = again
			w.fetch(b.e)
		}
	}
	w.relieve()
}

var errContended = hub.NewError(hub.Unavailable, "device-contended", "several parts of the hub write this device, try again later")

func (w *worker) finish(r *request, err error, wrote bool) {
	if !wrote && w.doubts(r, err) {
		return
	}
	if err == nil && r.stored != nil {
		r.stored(w)
	}
	w.reply(r, err)
}

func (w *worker) fetch(e *entry) {
	if !e.loading {
		e.loading = true
		w.load <- e
	}
}

// wake takes a loaded device and lets its requests go on.
func (w *worker) wake(l loading) {
	e := l.e
	e.loading = false
	parked := e.parked
	e.parked = nil
	if l.err != nil {
		for _, r := range parked {
			w.reply(r, wrap(r.op, l.err))
		}
		return
	}
	e.state = l.s
	if !e.stale { // else it may have been read before what others wrote
		e.public.Store(l.s)
	}
	for _, c := range l.s.commands {
		w.watch(c)
	}
	w.d.waiters.look(l.s)
	w.remind(l.s)
	w.weigh(e)
	for _, r := range parked {
		r.holds = e
	}
	e.held += len(parked)
	w.woke = true
	w.ready = append(parked, w.ready...)
	w.relieve()
}

// weigh counts what the entry takes of memory now.
func (w *worker) weigh(e *entry) {
	size := int64(entryCost)
	if e.state != nil {
		size += e.state.bytes()
	}
	w.count(size - e.size)
	e.size = size
}

func (w *worker) count(more int64) {
	w.bytes += more
	w.d.loadedBytes.Add(more)
	w.d.metrics.loadedBytes.Add(float64(more))
}

// over reports whether all workers have too much in memory and this one more than its share. When all have too much, one at
// least is over its share, so if each evicts while it is over, the whole gets below the limit. No worker looks into another's
// devices: a worker over its share may evict devices that are warmer than another's coldest.
func (w *worker) over() bool {
	limit := w.d.cfg.Limits.LoadedBytes
	return w.d.loadedBytes.Load() > limit && w.bytes > limit/int64(len(w.d.workers))
}

// evict drops the coldest devices until the worker is no longer over. Sessions outlive it, see live.
func (w *worker) evict() {
	for at := w.coldest.Front(); at != nil && w.over(); {
		e := at.Value.(*entry)
		at = at.Next()
		if !e.dirty() {
			w.drop(e)
			w.d.metrics.evicted.Inc()
		}
	}
}

// relieve evicts after something has grown here, and asks the others to when that was not enough.
func (w *worker) relieve() {
	w.evict()
	if w.d.loadedBytes.Load() <= w.d.cfg.Limits.LoadedBytes {
		return
	}
	for _, o := range w.d.workers {
		if o == w {
			continue
		}
		select {
		case o.pressed <- struct{}{}:
		default: // it was asked already
		}
	}
}

// dirty entries stay in memory: their outcome is not known yet, or they were loaded for a request that is not decided.
func (e *entry) dirty() bool {
	return e.loading || len(e.parked) > 0 || e.held > 0 || e.under
}

// drop takes the entry, which is not dirty, out of memory.
func (w *worker) drop(e *entry) {
	w.coldest.Remove(e.place)
	delete(w.devices, e.dev)
	w.d.devices.Delete(e.dev)
	w.d.metrics.loaded.Dec()
	w.count(-e.size)
}

// sweep drops cold devices and tries again to store OFFLINE of connections that are gone.
func (w *worker) sweep(now time.Time) {
	for at := w.coldest.Front(); at != nil; {
		e := at.Value.(*entry)
		if now.Sub(e.used) < w.d.cfg.ColdAfter {
			break
		}
		at = at.Next()
		if !e.dirty() {
			w.drop(e)
		}
	}
	w.evict()
	if w.d.apart != nil {
		// Whoever waits here for a command of a device that another directory has by now learns of its end from the log.
		for _, dev := range w.d.waiters.devices() {
			if w.d.worker(dev) == w && !w.d.serves(dev) {
				w.fetch(w.entry(dev))
			}
		}
	}
	w.takeLost()
	w.retryOffline()
}
