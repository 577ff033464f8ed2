package mongostore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"
	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// device is what this process knows of a device's log.
type device struct {
	id   hub.DeviceID
	lock chan struct{} // capacity 1: full while somebody appends, publishes or takes over
	refs int           // callers who use it; guarded by Store.mu
	// Guarded by lock.
	last      uint64    // newest seq, as it was
	at        time.Time // then; zero: not known
	published uint64    // everything up to here is in the feed
	backlog   []*stored // commits of this process that are stored and not in the feed, all after published
	// Guarded by Store.mu.
	segs   []*segment // documents to fold, in order, none touching the next
	doubts []uint64   // running numbers of commits that were perhaps stored
}

// stored is a commit on its way: stored, then published, then folded.
type stored struct {
	commit hub.Commit
	docs   []store.StateDoc
	number uint64
	cost   lag
}

// commitDoc is a commit as it is stored. Writer and Number are the store's: one opening of it, and how many commits it tried to
// store; they tell whether a stored commit is the one that was tried.
type commitDoc struct {
	ID     string `bson:"_id"`
	Commit []byte `bson:"c"`
	Time   int64  `bson:"t"`
	Writer string `bson:"w"`
	Number int64  `bson:"n"`
}

// part is the entries of one call that concern one device.
type part struct {
	dev  *device
	at   []int // indexes of the call's entries, in order
	docs []any // commitDocs of those that may be stored, from the first on
	own  []*stored
}

// Append stores entries; store.Log has the contract. Entries of many devices go together. Those of one device follow each
// other: the server stores them in order and stops at the first that it refuses.
func (s *Store) Append(ctx context.Context, entries []store.Entry) []error {
	errs := make([]error, len(entries))
	parts, values, cost := s.sort(entries, errs)
	defer s.unpin(parts)
	if len(parts) == 0 {
		return errs
	}
	err := s.append(ctx, entries, errs, parts, values, cost)
	events := 0
	for i := range errs {
		if errs[i] == nil {
			errs[i] = err
		}
		if errs[i] == nil {
			events += len(entries[i].Commit.Events)
			continue
		}
		s.metrics.refused.WithLabelValues(hub.KindOf(errs[i]).String()).Inc()
	}
	s.metrics.events.Add(float64(events))
	return errs
}

// sort checks entries and puts those that are good with their devices, which it pins.
func (s *Store) sort(entries []store.Entry, errs []error) (parts []*part, values [][]byte, cost int64) {
	values = make([][]byte, len(entries))
	byDevice := map[hub.DeviceID]*part{}
	for i := range entries {
		e := &entries[i]
		value := store.AppendCommit(make([]byte, 0, 256), &e.Commit)
		if errs[i] = errors.Join(checkDevice(e.Commit.Device), store.CheckCommit(&e.Commit, len(value)), store.CheckDocs(e.Docs)); errs[i] != nil {
			continue
		}
		values[i] = value
		cost += int64(len(value)) + entryCost
		for j := range e.Docs {
			cost += int64(len(e.Docs[j].Key) + len(e.Docs[j].Value))
		}
		p := byDevice[e.Commit.Device]
		if p == nil {
			p = &part{dev: s.pin(e.Commit.Device)}
			byDevice[e.Commit.Device] = p
			parts = append(parts, p)
		}
		p.at = append(p.at, i)
	}
	slices.SortFunc(parts, func(a, b *part) int { return strings.Compare(string(a.dev.id), string(b.dev.id)) })
	return parts, values, cost
}

// pin returns what is known of a device, and keeps it until unpin.
func (s *Store) pin(id hub.DeviceID) *device {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.known[id]
	if d == nil {
		if len(s.known) >= maxDevices {
			s.forget()
		}
		d = &device{id: id, lock: make(chan struct{}, 1)}
		s.known[id] = d
	}
	d.refs++
	return d
}

// forget drops a sixteenth of what is known of devices that nobody works with. mu is held.
func (s *Store) forget() {
	n := 0
	for id, d := range s.known {
		if _, busy := s.dirty[d]; d.refs == 0 && !busy {
			delete(s.known, id)
			if n++; n >= maxDevices/16 {
				return
			}
		}
	}
}

func (s *Store) unpin(parts []*part) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range parts {
		p.dev.refs--
	}
}

func (d *device) take(ctx context.Context) error {
	select {
	case d.lock <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (d *device) leave() { <-d.lock }

// append does what Append does with good entries. What it returns is the outcome of all that have none in errs.
func (s *Store) append(ctx context.Context, entries []store.Entry, errs []error, parts []*part, values [][]byte, cost int64) error {
	notStored := func(err error) error { return &hub.Error{Kind: hub.Unavailable, Op: "mongostore.Append", Err: err} }
	if err := ctx.Err(); err != nil {
		return notStored(err)
	}
	if err := s.enter(); err != nil {
		return err
	}
	defer s.calls.Done()
	cost = min(cost, maxRoom)
	if err := s.room.Acquire(ctx, cost); err != nil {
		return hub.NewError(hub.Exhausted, "store-busy", "the store has more to write than it can, try again later").With("mongostore.Append", err)
	}
	defer s.room.Release(cost)
	if err := s.keepUp(ctx, "Append"); err != nil {
		return err
	}
	// In the order of their IDs, so that two calls never wait for each other.
	for _, p := range parts {
		if err := p.dev.take(ctx); err != nil {
			return notStored(err)
		}
		defer p.dev.leave()
	}
	// From here on every wait has a bound of its own, and what happened is reported as it happened.
	ctx = context.WithoutCancel(ctx)
	s.decide(ctx, entries, errs, parts, values)
	s.insert(ctx, errs, parts)
	s.publish(ctx, parts)
	return nil
}

// decide finds out which entries may be stored, and refuses the others.
func (s *Store) decide(ctx context.Context, entries []store.Entry, errs []error, parts []*part, values [][]byte) {
	failed := make([]error, len(parts))
	var look []func()
	for k, p := range parts {
		d, seq := p.dev, entries[p.at[0]].Commit.Seq
		if s.fresh(d) && seq <= d.last+1 {
			continue
		}
		look = append(look, func() { // with a seq that is too high perhaps somebody else went on
			failed[k] = s.ready(ctx, d, s.fresh(d) && seq > d.last+1)
		})
	}
	together(look)
	var first []any
	var news []*part
	for k, p := range parts {
		d, err := p.dev, failed[k]
		next := d.last + 1
		if err == nil && next == 1 {
			first = append(first, record{ID: string(d.id)})
			news = append(news, p)
		}
		for _, i := range p.at {
			c := &entries[i].Commit
			if err == nil && c.Seq != next {
				err = errConflict
			}
			if err != nil {
				errs[i] = err // and so for all that follow it
				continue
			}
			next++
			own := &stored{commit: *c, docs: entries[i].Docs, cost: lag{len(c.Events), int64(len(values[i])) + entryCost}}
			for j := range own.docs {
				own.cost.bytes += int64(len(own.docs[j].Key) + len(own.docs[j].Value))
			}
			own.number = s.nextNumber()
			p.own = append(p.own, own)
			p.docs = append(p.docs, commitDoc{commitKey(d.id, c.Seq), values[i], c.Time, s.writerID, int64(own.number)})
		}
	}
	if len(first) == 0 {
		return
	}
	// A device's record is there before its first commit, so that nobody who looks for devices misses one.
	err := s.makeRecords(ctx, first)
	if err == nil {
		return
	}
	for _, p := range news {
		s.refuse(p, 0, errs, wrap("Append", err))
	}
}

// together runs what may wait for the server, a few at a time.
func together(all []func()) {
	var g errgroup.Group
	g.SetLimit(16) // half of the connections that there are without a word in the configuration
	for _, f := range all {
		g.Go(func() error { f(); return nil })
	}
	_ = g.Wait() // none returns one
}

// makeRecords makes those records that are not there.
func (s *Store) makeRecords(ctx context.Context, recs []any) error {
	return s.again(ctx, "make records", func(ctx context.Context) error {
		_, err := s.devices.InsertMany(ctx, recs, options.InsertMany().SetOrdered(false))
		return ignoreDuplicates(err)
	})
}

// ignoreDuplicates drops the errors of documents that are there already.
func ignoreDuplicates(err error) error {
	var bulk mongo.BulkWriteException
	if !errors.As(err, &bulk) || bulk.WriteConcernError != nil {
		return err
	}
	for _, e := range bulk.WriteErrors {
		if e.Code != codeDuplicate {
			return err
		}
	}
	return nil
}

func (s *Store) nextNumber() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.number++
	s.open[s.number] = struct{}{}
	return s.number
}

// refuse gives the entries of p that may be stored, from the n-th on, the outcome err, and drops them.
func (s *Store) refuse(p *part, n int, errs []error, err error) {
	unknown := hub.IsKind(err, hub.Deadline)
	s.mu.Lock()
	for i, own := range p.own[n:] {
		errs[p.at[n+i]] = err
		if unknown {
			p.dev.doubts = append(p.dev.doubts, own.number)
			s.dirty[p.dev] = struct{}{}
		} else {
			delete(s.open, own.number)
		}
	}
	s.mu.Unlock()
	if len(p.own) > n && !hub.IsKind(err, hub.Unavailable) {
		p.dev.at = time.Time{} // what is stored may not be what this process took it for
	}
	p.own, p.docs = p.own[:n], p.docs[:n]
}

// insert stores what may be stored, and leaves in p.own what was.
func (s *Store) insert(ctx context.Context, errs []error, parts []*part) {
	var single []*part
	var docs []any
	var inserts []func()
	for _, p := range parts {
		switch len(p.docs) {
		case 0:
		case 1:
			single = append(single, p)
			docs = append(docs, p.docs[0])
		default: // the device's commits alone and in order, so that none is stored behind one that was refused
			inserts = append(inserts, func() {
				out := s.insertSettled(ctx, p.docs, true)
				if n := slices.IndexFunc(out, func(err error) bool { return err != nil }); n >= 0 {
					s.refuse(p, n, errs, out[n])
				}
			})
		}
	}
	if len(docs) > 0 {
		inserts = append(inserts, func() {
			for i, err := range s.insertSettled(ctx, docs, false) {
				if err != nil {
					s.refuse(single[i], 0, errs, err)
				}
			}
		})
	}
	together(inserts)
	now := time.Now()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range parts {
		for _, own := range p.own {
			p.dev.last, p.dev.at = own.commit.Seq, now
			p.dev.backlog = append(p.dev.backlog, own)
			s.lag.events += own.cost.events
			s.lag.bytes += own.cost.bytes
			s.dirty[p.dev] = struct{}{}
		}
	}
}

// insertSettled inserts commits and returns what became of each: nil, conflict, unavailable (it is not stored), or deadline (nobody
// knows). When a connection breaks the same commits are inserted again; of one that is there already its writer and number say
// whose it is. With ordered, commits are of one device and none is stored behind one that is not.
func (s *Store) insertSettled(ctx context.Context, docs []any, ordered bool) []error {
	whole, cancel := context.WithTimeout(ctx, s.cfg.SettleTimeout)
	defer cancel()
	t := &insertion{s: s, docs: docs, ordered: ordered, out: make([]error, len(docs)), left: make([]int, len(docs))}
	for i := range t.left {
		t.left[i] = i
	}
	begin := time.Now()
	for n := 0; ; n++ {
		batch := make([]any, len(t.left))
		for k, i := range t.left {
			batch[k] = docs[i]
		}
		err := s.once(whole, func(ctx context.Context) error {
			_, err := s.commits.InsertMany(ctx, batch, options.InsertMany().SetOrdered(ordered))
			return err
		})
		var bulk mongo.BulkWriteException
		switch {
		case err == nil:
			t.settle(func(int) (bool, error) { return true, nil })
		case errors.As(err, &bulk):
			err = errors.Join(t.judge(whole, bulk), err)
		case notSent(err):
			// Before an attempt that may have stored something: nothing is. A primary that moves is waited for as one that is away is.
			if !t.tried && (!movedPrimary(err) || time.Since(begin) > s.cfg.SelectTimeout) {
				return t.giveUp(err)
			}
		case transient(err):
			t.tried = true
		default: // the server refused the command and is done with it: what is not there now will not come
			t.tried = true
			if lookErr := t.look(whole, errRefused.With("mongostore.Append", err)); lookErr != nil {
				err = errors.Join(lookErr, err)
			}
		}
		if len(t.left) == 0 {
			return t.out
		}
		s.metrics.repeated.Inc()
		if pause(whole, n) != nil {
			return t.giveUp(err)
		}
	}
}

// insertion is what is known of the outcome of an insert.
type insertion struct {
	s       *Store
	docs    []any
	ordered bool
	out     []error
	left    []int // indexes of those whose outcome is not known, in order
	tried   bool  // an attempt may have stored some of them
}

// settle gives an outcome to those for which is knows one. Behind one that was refused nothing of the same device is stored.
func (t *insertion) settle(is func(i int) (known bool, outcome error)) {
	var left []int
	var refused error
	for _, i := range t.left {
		known, err := true, refused
		if refused == nil {
			known, err = is(i)
		}
		if !known {
			left = append(left, i)
			continue
		}
		t.out[i] = err
		if t.ordered && err != nil {
			refused = err
		}
		switch {
		case !t.tried:
		case err == nil:
			t.s.metrics.settled.WithLabelValues("stored").Inc()
		default:
			t.s.metrics.settled.WithLabelValues("refused").Inc()
		}
	}
	t.left = left
}

// giveUp ends all that are left.
func (t *insertion) giveUp(err error) []error {
	for _, i := range t.left {
		if t.tried {
			t.out[i] = errUnknown.With("mongostore.Append", err)
			t.s.metrics.settled.WithLabelValues("unknown").Inc()
		} else {
			t.out[i] = errUnreachable.With("mongostore.Append", err)
		}
	}
	return t.out
}

// judge takes what an answer says of each document. Those of which it does not say enough are left.
func (t *insertion) judge(ctx context.Context, bulk mongo.BulkWriteException) error {
	failed := map[int]mongo.BulkWriteError{} // by index in docs
	end := len(t.left)
	for _, e := range bulk.WriteErrors {
		failed[t.left[e.Index]] = e
		if t.ordered {
			end = min(end, e.Index)
		}
	}
	sent := map[int]bool{} // without an error, and not behind one
	for _, i := range t.left[:end] {
		_, bad := failed[i]
		sent[i] = !bad
	}
	there := false // one may be from an earlier attempt
	t.settle(func(i int) (bool, error) {
		e, bad := failed[i]
		switch {
		case bad && e.Code != codeDuplicate:
			return true, errRefused.With("mongostore.Append", e)
		case bad && !t.tried:
			return true, errConflict
		case bad:
			there = true
			return false, nil
		}
		// With a write concern error it is stored, but not yet where it survives.
		return sent[i] && bulk.WriteConcernError == nil, nil
	})
	if len(t.left) == 0 {
		return nil
	}
	t.tried = true
	if !there {
		return nil
	}
	return t.look(ctx, nil)
}

// look reads whose commits stand where those that are left should. Of what is not there absent is the outcome, or none if it is
// nil: not known yet, or not yet where it survives.
func (t *insertion) look(ctx context.Context, absent error) error {
	whose, err := t.s.writersOf(ctx, t.docs, t.left)
	if err != nil {
		return err
	}
	t.settle(func(i int) (bool, error) {
		d := t.docs[i].(commitDoc)
		switch is, ok := whose[d.ID]; {
		case !ok:
			return absent != nil, absent
		case is.Writer == d.Writer && is.Number == d.Number:
			return true, nil
		default:
			return true, errConflict
		}
	})
	return nil
}

// writersOf reads who wrote the commits that stand where docs should.
func (s *Store) writersOf(ctx context.Context, docs []any, at []int) (map[string]commitDoc, error) {
	if len(at) == 0 {
		return nil, nil
	}
	ids := make(bson.A, len(at))
	for k, i := range at {
		ids[k] = docs[i].(commitDoc).ID
	}
	var found []commitDoc
	err := s.once(ctx, func(ctx context.Context) error {
		cur, err := s.commits.Find(ctx, bson.D{{Key: "_id", Value: bson.D{{Key: "$in", Value: ids}}}},
			options.Find().SetProjection(bson.D{{Key: "w", Value: 1}, {Key: "n", Value: 1}}))
		if err != nil {
			return err
		}
		return cur.All(ctx, &found)
	})
	out := make(map[string]commitDoc, len(found))
	for _, f := range found {
		out[f.ID] = f
	}
	return out, err
}

// fresh reports whether what is known of a device's last seq is young, and everything up to it published. Its lock is held.
func (s *Store) fresh(d *device) bool {
	return len(d.backlog) == 0 && !d.at.IsZero() && time.Since(d.at) < s.times.fresh
}

// ready brings what is known of a device up to date unless it is young enough, and publishes what may not be in the feed: no
// commit is stored before all in front of it are. The device's lock is held.
func (s *Store) ready(ctx context.Context, d *device, now bool) error {
	if err := s.publishBacklog(ctx, d); err != nil {
		return err
	}
	if !now && s.fresh(d) {
		return nil
	}
	at := time.Now()
	rec, err := s.record(ctx, d.id)
	if err != nil {
		return wrap("Append", err)
	}
	// Documents contain only what is in the feed.
	last := uint64(rec.Folded)
	d.published = max(d.published, last)
	for more := true; more; {
		var page []hub.Commit
		if page, more, err = s.commitPage(ctx, d.id, last+1); err != nil {
			return wrap("Append", err)
		}
		if len(page) == 0 {
			break
		}
		if page[0].Seq != last+1 {
			return fmt.Errorf("append to device %s: commit %d is missing", d.id, last+1)
		}
		last = page[len(page)-1].Seq
		var unpublished []hub.Commit
		for _, c := range page {
			if c.Seq > d.published {
				unpublished = append(unpublished, c)
			}
		}
		if err := s.tell(ctx, unpublished); err != nil {
			return err
		}
		d.published = max(d.published, last)
	}
	d.last, d.at = last, at
	s.mu.Lock()
	// The commits whose outcome nobody knew are among those, or were never stored.
	for _, n := range d.doubts {
		delete(s.open, n)
	}
	d.doubts = nil
	s.mu.Unlock()
	return nil
}

// keepUp waits while documents and feed are too far behind the log, and refuses when that does not get better.
func (s *Store) keepUp(ctx context.Context, op string) error {
	var patience <-chan time.Time
	for {
		s.mu.Lock()
		if s.lag.events < s.limits.events && s.lag.bytes < s.limits.bytes {
			s.mu.Unlock()
			return nil
		}
		if s.eased == nil {
			s.eased = make(chan struct{})
		}
		eased := s.eased
		s.mu.Unlock()
		s.poke()
		if patience == nil {
			t := time.NewTimer(s.limits.patience)
			defer t.Stop()
			patience = t.C
		}
		select {
		case <-eased:
		case <-patience:
			return errBehind.With("mongostore."+op, nil)
		case <-ctx.Done():
			return &hub.Error{Kind: hub.Unavailable, Op: "mongostore." + op, Err: ctx.Err()}
		}
	}
}

func (s *Store) poke() {
	select {
	case s.wake <- struct{}{}:
	default: // it is awake already
	}
}
