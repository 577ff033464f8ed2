package pebblestore

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	// maxPending bounds what waits for the committer, in bytes. When it is full, writers wait until there is room or their
	// context ends (hub.Exhausted).
	maxPending = 32 << 20
	// requestCost is what a request counts at least, so that many small ones are bounded too (to 32 Ki).
	requestCost = 1 << 10
	// maxGroup is how many bytes go into one synced batch at most, one request always.
	maxGroup = 4 << 20
	// maxSeqs bounds the committer's memory of last seqs. When it is full, some are forgotten and read again when needed.
	maxSeqs = 1 << 16
)

// request is something to write, and the caller who waits for it.
type request struct {
	// build checks the request against the group's picture of the store, and adds what it writes to the group's batch. What
	// it finds out for its caller becomes known only after the batch is durable. Its error is of the disk: nothing was added
	// for this request.
	build func(g *group) error
	// alone asks for a batch of its own, since build reads what others in the same batch may just be changing.
	alone bool
	// frees marks requests that make room; they are let through while the disk is nearly full.
	frees bool
	cost  int64
	err   error         // valid after done is closed
	done  chan struct{} // closed when the outcome is known
}

// group is the picture in which one batch is built: the durable store and what the batch adds to it.
type group struct {
	s     *Store
	batch *pebble.Batch
	state state
	seqs  map[device]uint64 // last seq of devices, kept from group to group
	docs  map[string]docHead
	buf   []byte
	fresh []recent // commits that the batch adds, in order
}

// submit hands a request to the committer and waits for its outcome. Once the committer has it, the wait goes on past the
// context's end: what happened is reported as it happened.
func (s *Store) submit(ctx context.Context, op string, r *request) error {
	if err := ctx.Err(); err != nil {
		return &hub.Error{Kind: hub.Unavailable, Op: "pebblestore." + op, Err: err}
	}
	r.cost = min(max(r.cost, requestCost), maxPending)
	if !s.room.TryAcquire(r.cost) {
		s.metrics.waits.Inc()
		if err := s.room.Acquire(ctx, r.cost); err != nil {
			return hub.NewError(hub.Exhausted, "store-busy", "the store has more to write than it can, try again later").
				With("pebblestore."+op, err)
		}
	}
	defer s.room.Release(r.cost)
	r.done = make(chan struct{})
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return errClosed
	}
	s.pending = append(s.pending, r)
	s.mu.Unlock()
	s.poke()
	select {
	case <-r.done:
		return r.err
	case <-s.failed:
		return s.broken()
	}
}

func (s *Store) poke() {
	select {
	case s.wake <- struct{}{}:
	default: // it is awake already, and looks at pending before it sleeps
	}
}

// commitLoop is the only writer of the database. While one group is synced the next collects, so that groups grow with the
// load. It ends when the store closes, after everything that waited is done; after a failure it stays with Pebble, in
// pebbleLogger.Fatalf, or ends here.
func (s *Store) commitLoop() {
	defer close(s.committer)
	g := &group{s: s, seqs: make(map[device]uint64), docs: make(map[string]docHead)}
	g.state = s.view.state
	var poll <-chan time.Time // nil: nothing is refused ahead, so nothing is asked for
	if s.space.minFree >= 0 {
		ticker := time.NewTicker(spaceInterval)
		defer ticker.Stop()
		poll = ticker.C
	}
	for {
		s.gather()
		s.mu.Lock()
		work, closing := s.pending, s.closing
		s.pending = nil
		s.mu.Unlock()
		if len(work) == 0 {
			if closing {
				return
			}
			select {
			case <-s.wake:
			case <-poll:
				s.space.check()
			}
			continue
		}
		select {
		case <-poll:
			s.space.check()
		default:
		}
		for len(work) > 0 {
			n, size := 1, work[0].cost
			for n < len(work) && !work[0].alone && !work[n].alone && size+work[n].cost <= maxGroup {
				size += work[n].cost
				n++
			}
			if !s.commit(g, work[:n]) {
				return
			}
			work = work[n:]
		}
	}
}

// gather lets other goroutines run as long as they bring more work. Those who were just answered come back with their next
// write at once; taking the first of them alone would make the others wait for a sync of its own.
func (s *Store) gather() {
	for before := -1; ; {
		s.mu.Lock()
		n := len(s.pending)
		s.mu.Unlock()
		if n == 0 || n == before {
			return
		}
		before = n
		runtime.Gosched()
	}
}

// commit writes one group. False: the store failed, nobody was answered by it.
func (s *Store) commit(g *group, work []*request) bool {
	start := time.Now()
	full := s.space.refuse()
	g.batch = s.db.NewBatch()
	before := g.state
	for _, r := range work {
		if full != nil && !r.frees {
			r.err = full
			continue
		}
		if r.err = r.build(g); r.err != nil {
			r.err = wrap("write", r.err)
		}
	}
	if s.failure.Load() != nil {
		return false
	}
	written := g.batch.Len()
	if !g.batch.Empty() {
		if g.state != before {
			if err := g.batch.Set(metaState, g.state.encode(g.buf[:0]), nil); err != nil {
				s.fail(fmt.Errorf("build a batch: %w", err))
				return false
			}
		}
		if err := s.db.Apply(g.batch, pebble.Sync); err != nil {
			s.fail(fmt.Errorf("write a batch: %w", err))
			return false
		}
		s.metrics.batchSeconds.Observe(time.Since(start).Seconds())
		s.metrics.batchRequests.Observe(float64(len(work)))
		s.metrics.bytes.Add(float64(written))
		if err := s.publish(g.state, g.fresh); err != nil {
			s.fail(fmt.Errorf("publish a batch: %w", err))
			return false
		}
	}
	if err := g.batch.Close(); err != nil {
		s.fail(fmt.Errorf("close a batch: %w", err))
		return false
	}
	g.batch = nil
	clear(g.fresh)
	g.fresh = g.fresh[:0]
	clear(g.docs)
	for d := range g.seqs {
		if len(g.seqs) <= maxSeqs {
			break
		}
		delete(g.seqs, d)
	}
	for _, r := range work {
		close(r.done)
	}
	return true
}

// last returns the device's last seq in the group's picture.
func (g *group) last(d device) (uint64, error) {
	if seq, ok := g.seqs[d]; ok {
		return seq, nil
	}
	seq, err := lastSeq(g.s.db, d)
	if err != nil {
		return 0, err
	}
	g.seqs[d] = seq
	return seq, nil
}

// next gives the next feed position. Days never go back, whatever the clock does, and the number goes on from day to day.
func (g *group) next() hub.Position {
	day := max(today(), g.state.head.Day)
	g.state.head = hub.Position{Day: day, N: g.state.head.N + 1}
	return g.state.head
}

func today() uint32 { return uint32(max(0, time.Now().Unix()) / 86400) }

// prepared is an entry whose checks and encoding were done on its caller's goroutine.
type prepared struct {
	dev   device
	value []byte
}

var errConflict = hub.NewError(hub.Conflict, "", "").With("pebblestore.Append", nil)

// Append stores entries; store.Log has the contract.
func (s *Store) Append(ctx context.Context, entries []store.Entry) []error {
	errs := make([]error, len(entries))
	if len(entries) == 0 {
		return errs
	}
	ready := make([]prepared, len(entries))
	r := &request{}
	good, events := 0, 0
	for i := range entries {
		p, err := prepare(&entries[i])
		if err != nil {
			errs[i] = err
			continue
		}
		good++
		events += len(entries[i].Commit.Events)
		ready[i] = p
		r.cost += int64(len(p.value)) + requestCost
		for _, doc := range entries[i].Docs {
			r.cost += int64(len(doc.Key) + len(doc.Value))
		}
	}
	if good == 0 {
		return errs
	}
	outcome := make([]error, len(entries)) // the committer's; the caller may have left after a failure
	r.build = func(g *group) error {
		for i := range entries {
			if ready[i].value != nil {
				outcome[i] = g.append(&entries[i], &ready[i])
			}
		}
		return nil
	}
	if err := s.submit(ctx, "Append", r); err != nil {
		for i := range errs {
			if errs[i] == nil {
				errs[i] = err
			}
		}
		s.metrics.refused.WithLabelValues(hub.KindOf(err).String()).Add(float64(good))
		return errs
	}
	for i := range errs {
		if errs[i] == nil && outcome[i] != nil {
			errs[i] = outcome[i]
			events -= len(entries[i].Commit.Events)
			s.metrics.refused.WithLabelValues(hub.KindOf(outcome[i]).String()).Inc()
		}
	}
	s.metrics.events.Add(float64(events))
	return errs
}

func prepare(e *store.Entry) (prepared, error) {
	d, err := parseDevice(e.Commit.Device)
	if err != nil {
		return prepared{}, err
	}
	value := store.AppendCommit(make([]byte, 0, 256), &e.Commit)
	if err := errors.Join(store.CheckCommit(&e.Commit, len(value)), store.CheckDocs(e.Docs)); err != nil {
		return prepared{}, err
	}
	return prepared{dev: d, value: value}, nil
}

// append adds one entry to the batch. Its documents need no comparison with the stored seqs: no document of the device can
// have a seq above its last commit's, and this commit is the next.
func (g *group) append(e *store.Entry, p *prepared) error {
	last, err := g.last(p.dev)
	if err != nil {
		return wrap("Append", err)
	}
	if e.Commit.Seq != last+1 {
		return errConflict
	}
	g.buf = commitKey(g.buf[:0], p.dev, e.Commit.Seq)
	err = g.batch.Set(g.buf, p.value, nil)
	at := g.next()
	err = errors.Join(err, g.batch.Set(feedKey(nil, at), g.buf[1:], nil))
	for i := range e.Docs {
		err = errors.Join(err, g.setState(p.dev, &e.Docs[i], e.Commit.Seq))
	}
	if err != nil {
		// Setting a key fails only for programming errors. Half an entry must not be written, so nothing goes on.
		g.s.fail(fmt.Errorf("add commit %s/%d to a batch: %w", p.dev.id(), e.Commit.Seq, err))
		return err
	}
	g.seqs[p.dev] = e.Commit.Seq
	g.fresh = append(g.fresh, recent{store.FeedEntry{Position: at, Commit: e.Commit}, len(p.value)})
	return nil
}

// setState writes a state document with its seq before it, or deletes it.
func (g *group) setState(d device, doc *store.StateDoc, seq uint64) error {
	if doc.Value == nil {
		return g.batch.Delete(stateKey(nil, d, doc.Key), nil)
	}
	op := g.batch.SetDeferred(1+len(d)+len(doc.Key), 8+len(doc.Value))
	op.Key[0] = prefixState
	copy(op.Key[1:], d[:])
	copy(op.Key[1+len(d):], doc.Key)
	binary.BigEndian.PutUint64(op.Value, seq)
	copy(op.Value[8:], doc.Value)
	return op.Finish()
}

// Trim removes commits below seq and stores the documents that stand for them; store.Log has the contract. A document of
// Trim carries the seq of the last commit it stands for, below-1.
func (s *Store) Trim(ctx context.Context, dev hub.DeviceID, below uint64, docs []store.StateDoc) error {
	d, err := parseDevice(dev)
	if err != nil {
		return err
	}
	if err := store.CheckDocs(docs); err != nil {
		return err
	}
	r := &request{alone: true, frees: true}
	for i := range docs {
		r.cost += int64(len(docs[i].Key) + len(docs[i].Value))
	}
	r.build = func(g *group) error {
		last, err := g.last(d)
		if err != nil {
			return err
		}
		below := min(below, last) // never the newest
		seq := max(below, 1) - 1
		var write []*store.StateDoc
		for i := range docs {
			stored, err := get(g.s.db, stateKey(nil, d, docs[i].Key), func(v []byte) (uint64, error) {
				if len(v) < 8 {
					return 0, fmt.Errorf("state document %s/%q is damaged", dev, docs[i].Key)
				}
				return binary.BigEndian.Uint64(v), nil
			})
			if err != nil {
				return err
			}
			if stored <= seq {
				write = append(write, &docs[i])
			}
		}
		if below > 1 {
			err = g.batch.DeleteRange(commitKey(nil, d, 0), commitKey(nil, d, below), nil)
		}
		for _, doc := range write {
			err = errors.Join(err, g.setState(d, doc, seq))
		}
		return err
	}
	return s.submit(ctx, "Trim", r)
}
