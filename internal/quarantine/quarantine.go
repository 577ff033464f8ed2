// Package quarantine keeps apart what devices in quarantine write: durable, bounded, for people to look at.
//
// It must not know doors or services: they hand it hub's words, and say which devices are in quarantine.
package quarantine

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"math/rand/v2"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	collection = "quarantine"         // the writes, by device and number
	collBooks  = "quarantine-devices" // a book for each device
)

// limits bound what is kept; beyond them the oldest goes.
type limits struct {
	writes, bytes       int // of a device
	allWrites, allBytes int
}

// bounds are such that the API's answer about one device stays small, and that of the rest of the store little is taken.
var bounds = limits{writes: 256, bytes: 1 << 20, allWrites: 20_000, allBytes: 64 << 20}

// slack is the part of the bounds of all devices that is made free when they are reached, and what a process keeps before it looks
// again what others have kept: counting reads the books of all devices.
const slack = 64

const (
	// maxTime bounds for how long a change is decided on again because another process was faster, and maxPause the time to the next
	// try, so that not all of them try again at once.
	maxTime  = 10 * time.Second
	maxPause = 20 * time.Millisecond
	// maxTries bounds how often room is made among all devices; the next write goes on.
	maxTries = 8
	// sweepEvery is how often it is looked for what is over, which goes when it was found twice.
	sweepEvery = time.Minute
)

var errOver = hub.NewError(hub.Precondition, "quarantine-over", "the device is not in quarantine any more")

// Store keeps what is written. All methods are safe for concurrent use, and several processes may work on the same documents: each
// device has a book of what is kept of it, which is changed by compare-and-swap, and nothing of it is remembered between two calls.
// Within a process a device's writes wait for each other, and for no other device's.
type Store struct {
	docs    store.Documents
	in      func(hub.DeviceID) (generation uint64, is bool)
	max     limits
	metrics *metrics

	counting sync.Mutex // held by whoever makes room among all devices

	mu    sync.Mutex // guards all below
	turns map[hub.DeviceID]*turn
	// What all devices had when it was counted last, and what was kept here since.
	writes, bytes         int
	moreWrites, moreBytes int
}

// turn is whose turn it is to write documents of a device in this process: it holds a token then. It goes when nobody waits.
type turn struct {
	token   chan struct{}
	waiting int // and who has it; guarded by Store.mu
}

// book is the document of a device: what is kept of it. A write's document is stored first, under the next number, and then entered
// here; who finds the number taken enters what it finds there, so that a process that dies between the two holds up nobody. What is
// not entered although its number was given has been dropped, even if it is still there. The book is there before the first write
// and outlives the last one for a while, so that no number is given twice as long as somebody remembers it.
type book struct {
	Generation uint64  `json:"generation"` // of the ownership that all this is of
	Last       uint64  `json:"last"`       // the highest number given
	Dropped    uint64  `json:"dropped"`
	Kept       []entry `json:"kept"` // by number
}

// entry is a write that is kept, without what it says.
type entry struct {
	Number  uint64 `json:"n"`
	Rev     uint64 `json:"r"` // of its document
	Size    int    `json:"z"`
	Host    string `json:"h"`
	Session uint64 `json:"s"`
	Message uint64 `json:"m,omitempty"`
}

func (b *book) bytes() (n int) {
	for _, e := range b.Kept {
		n += e.Size
	}
	return n
}

func (b *book) enter(e entry) {
	at, is := slices.BinarySearchFunc(b.Kept, e.Number, func(e entry, n uint64) int { return cmp.Compare(e.Number, n) })
	if !is {
		b.Kept = slices.Insert(b.Kept, at, e)
	}
	b.Last = max(b.Last, e.Number)
}

func (b *book) drop(at int) entry {
	e := b.Kept[at]
	b.Kept = slices.Delete(b.Kept, at, at+1)
	b.Dropped++
	return e
}

// makeRoom drops what is too much. Of the hosts the one with the most loses its oldest, so that of two rivals the busy one does not
// hide the other.
func (b *book) makeRoom(most limits) (gone []entry) {
	bytes := b.bytes()
	for len(b.Kept) > most.writes || bytes > most.bytes && len(b.Kept) > 1 {
		of := map[string]int{}
		busy := ""
		for _, e := range b.Kept {
			if of[e.Host] += e.Size; of[e.Host] > of[busy] {
				busy = e.Host
			}
		}
		at := slices.IndexFunc(b.Kept, func(e entry) bool { return e.Host == busy })
		if at == len(b.Kept)-1 { // what has just been acknowledged stays
			at = 0
		}
		bytes -= b.Kept[at].Size
		gone = append(gone, b.drop(at))
	}
	return gone
}

// stored is a write's document, and under which ownership it was made.
type stored struct {
	Generation uint64 `json:"generation"`
	hub.KeptWrite
}

// Open counts what is kept. in says which devices are in quarantine, and under which generation of their ownership; it must not
// block, and may know of none yet.
func Open(ctx context.Context, docs store.Documents, in func(hub.DeviceID) (uint64, bool), reg prometheus.Registerer) (*Store, error) {
	return open(ctx, docs, in, reg, bounds)
}

func open(ctx context.Context, docs store.Documents, in func(hub.DeviceID) (uint64, bool), reg prometheus.Registerer, max limits) (*Store, error) {
	s := &Store{docs: docs, in: in, max: max, turns: map[hub.DeviceID]*turn{}}
	s.metrics = newMetrics(reg, s)
	if _, err := s.count(ctx); err != nil {
		return nil, fmt.Errorf("read the quarantine: %w", err)
	}
	return s, nil
}

func key(dev hub.DeviceID, number uint64) string { return fmt.Sprintf("%s/%016x", dev, number) }

// writesOf are all documents of a device's writes, in their order.
func (s *Store) writesOf(ctx context.Context, dev hub.DeviceID) iter.Seq2[store.Doc, error] {
	return s.docs.Range(ctx, collection, string(dev)+"/", string(dev)+"0") // which follows the slash
}

func decode(doc store.Doc) (w stored, e entry, err error) {
	if err := json.Unmarshal(doc.Value, &w); err != nil {
		return w, e, damaged(doc.Key, err)
	}
	host, _, err := net.SplitHostPort(w.From.Remote)
	if err != nil {
		host = w.From.Remote
	}
	return w, entry{w.Number, doc.Rev, len(doc.Value), host, w.Session, w.Message}, nil
}

func decodeBook(doc store.Doc) (b book, err error) {
	if err := json.Unmarshal(doc.Value, &b); err != nil {
		return b, damaged(doc.Key, err)
	}
	return b, nil
}

func damaged(key string, err error) error {
	return &hub.Error{Kind: hub.Internal, Op: "quarantine.read", Err: fmt.Errorf("%.64s: %w", key, err)}
}

// book reads a device's book. If there is none, rev is 0.
func (s *Store) book(ctx context.Context, dev hub.DeviceID) (b book, rev uint64, err error) {
	doc, err := s.docs.Get(ctx, collBooks, string(dev))
	if err != nil || doc.Rev == 0 {
		return b, 0, err
	}
	b, err = decodeBook(doc)
	return b, doc.Rev, err
}

func (s *Store) writeBook(ctx context.Context, dev hub.DeviceID, b book, rev uint64) (uint64, error) {
	value, err := json.Marshal(b)
	if err != nil {
		return 0, fmt.Errorf("encode what is kept of a device: %w", err)
	}
	return s.docs.Put(ctx, collBooks, store.Doc{Key: string(dev), Value: value, Rev: rev})
}

// openBook makes the book of an ownership, out of what is there of it without a book, in place of an earlier ownership's, which is over.
func (s *Store) openBook(ctx context.Context, own hub.Ownership, was book, rev uint64) error {
	b := book{Generation: own.Generation, Last: was.Last}
	var over []store.Doc
	for doc, err := range s.writesOf(ctx, own.Device) {
		if err != nil {
			return err
		}
		w, e, err := decode(doc)
		if err != nil {
			return err
		}
		switch {
		case w.Generation == own.Generation:
			b.enter(e)
		case w.Generation > own.Generation:
			return errOver.With("quarantine.Keep", nil)
		default:
			b.Last = max(b.Last, e.Number)
			over = append(over, store.Doc{Key: doc.Key, Rev: doc.Rev})
		}
	}
	if rev == 0 && len(b.Kept) > 0 {
		b.Dropped = b.Last - uint64(len(b.Kept)) // without a book numbers began with 1
	}
	if _, err := s.writeBook(ctx, own.Device, b, rev); err != nil {
		return err
	}
	for _, doc := range over {
		if err := s.docs.Delete(ctx, collection, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return nil
}

// takeTurn waits for the turn to write documents of a device.
func (s *Store) takeTurn(ctx context.Context, dev hub.DeviceID) (release func(), err error) {
	s.mu.Lock()
	t := s.turns[dev]
	if t == nil {
		t = &turn{token: make(chan struct{}, 1)}
		s.turns[dev] = t
	}
	t.waiting++
	s.mu.Unlock()
	leave := func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		if t.waiting--; t.waiting == 0 {
			delete(s.turns, dev)
		}
	}
	select {
	case t.token <- struct{}{}:
		return func() { <-t.token; leave() }, nil
	case <-ctx.Done():
		leave()
		return nil, &hub.Error{Kind: hub.Deadline, Op: "quarantine", Err: ctx.Err()}
	}
}

// Quarantined reports whether a device is in quarantine. It does not block.
func (s *Store) Quarantined(dev hub.DeviceID) bool {
	_, is := s.in(dev)
	return is
}

// Keep stores a write, durably on return, and returns its number; a sign-in's session is set to that. The same message of a session
// again is kept once. Where there is too much, the oldest makes room: of a device there is never more than its bounds, of all devices
// no more than theirs and what other processes have kept since this one looked, a 64th of them each. Precondition
// ("quarantine-over") for a device that is not in quarantine under that ownership, Unavailable or Exhausted when it could not be
// stored: then it may be tried again.
func (s *Store) Keep(ctx context.Context, own hub.Ownership, w hub.KeptWrite) (uint64, error) {
	const op = "quarantine.Keep"
	release, err := s.takeTurn(ctx, own.Device)
	if err != nil {
		return 0, err
	}
	w.Time = w.Time.UTC()
	number, err := s.keep(ctx, own, w)
	release()
	var e *hub.Error
	switch {
	case err == nil:
		s.makeRoomForAll(ctx)
		return number, nil
	case errors.As(err, &e) && (e.Kind == hub.Precondition || e.Kind == hub.Internal): // it is over, or something is damaged
		return 0, err
	}
	return 0, trouble(op, err)
}

func (s *Store) keep(ctx context.Context, own hub.Ownership, w hub.KeptWrite) (uint64, error) {
	var mine *entry // once it is stored
	for t := begin(); ; {
		if err := t.again(ctx); err != nil {
			return 0, err
		}
		b, rev, err := s.book(ctx, own.Device)
		if err != nil {
			return 0, err
		}
		// In the turn, which Discard waits for: what comes after it in this process is not kept. And others may have heard more.
		generation, is := s.in(own.Device)
		over := !is || generation != own.Generation || b.Generation > own.Generation
		switch {
		case mine != nil && (over || rev == 0):
			_ = s.docs.Delete(ctx, collection, key(own.Device, mine.Number), mine.Rev) // or whoever begins the next book does it
			return 0, errOver.With("quarantine.Keep", nil)
		case over:
			return 0, errOver.With("quarantine.Keep", nil)
		case mine != nil && slices.ContainsFunc(b.Kept, func(e entry) bool { return e.Number == mine.Number && e.Rev == mine.Rev }):
			return mine.Number, nil // another process entered it
		case mine != nil && b.Last >= mine.Number:
			// The number had been given, and its write dropped, before ours was stored under it; or ours was dropped since.
			err := s.docs.Delete(ctx, collection, key(own.Device, mine.Number), mine.Rev)
			if err != nil && !hub.IsKind(err, hub.Conflict) {
				return 0, err
			}
			mine = nil
			continue
		case mine == nil:
			if rev == 0 || b.Generation != own.Generation {
				if err := s.openBook(ctx, own, b, rev); err != nil && !hub.IsKind(err, hub.Conflict) {
					return 0, err
				}
				continue
			}
			for _, e := range b.Kept {
				if w.Message != 0 && e.Message == w.Message && e.Session == w.Session {
					return e.Number, nil
				}
			}
		}
		next := mine
		if next == nil {
			if next, mine, err = s.put(ctx, own, w, b.Last+1); err != nil {
				return 0, err
			}
			if next == nil {
				continue
			}
		}
		b.enter(*next)
		gone := b.makeRoom(s.max)
		if _, err := s.writeBook(ctx, own.Device, b, rev); hub.IsKind(err, hub.Conflict) {
			continue
		} else if err != nil {
			return 0, err
		}
		s.account(next.Size)
		s.remove(ctx, own.Device, gone)
		if mine != nil {
			return mine.Number, nil
		}
	}
}

// tries are those of a change that others are faster with.
type tries struct {
	began time.Time
	n     int
}

func begin() *tries { return &tries{began: time.Now()} }

// again waits for the next try, a while from the third on. An error says that it is enough.
func (t *tries) again(ctx context.Context) error {
	if t.n++; t.n <= 2 {
		return nil
	}
	if time.Since(t.began) > maxTime {
		return errors.New("too much contention")
	}
	pause := time.NewTimer(rand.N(maxPause))
	defer pause.Stop()
	select {
	case <-pause.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// put stores a write under a number. If another one has it, that is what is to be entered next, unless it has gone again or is an
// earlier ownership's.
func (s *Store) put(ctx context.Context, own hub.Ownership, w hub.KeptWrite, number uint64) (next, mine *entry, err error) {
	w.Number = number
	if w.Kind == hub.KeptSignedIn {
		w.Session = number
	}
	value, err := json.Marshal(stored{own.Generation, w})
	if err != nil {
		return nil, nil, fmt.Errorf("encode a write: %w", err)
	}
	doc := store.Doc{Key: key(own.Device, number), Value: value}
	doc.Rev, err = s.docs.Put(ctx, collection, doc)
	taken := hub.IsKind(err, hub.Conflict)
	if taken {
		doc, err = s.docs.Get(ctx, collection, doc.Key)
	}
	if err != nil || doc.Rev == 0 {
		return nil, nil, err
	}
	is, e, err := decode(doc)
	switch {
	case err != nil:
		return nil, nil, err
	case !taken:
		return &e, &e, nil
	case is.Generation > own.Generation:
		return nil, nil, errOver.With("quarantine.Keep", nil)
	case is.Generation < own.Generation: // of a process that has not heard of us
		if err := s.docs.Delete(ctx, collection, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return nil, nil, err
		}
		return nil, nil, nil
	}
	return &e, nil, nil
}

// remove deletes what a book has no more. What cannot be removed stays until the quarantine is over, and is not shown.
func (s *Store) remove(ctx context.Context, dev hub.DeviceID, gone []entry) {
	for _, e := range gone {
		s.metrics.dropped.Inc()
		s.account(-e.Size)
		_ = s.docs.Delete(ctx, collection, key(dev, e.Number), e.Rev)
	}
}

// account adds a write of size bytes to what was kept here, or takes one from it if size is below 0.
func (s *Store) account(size int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.moreBytes += size
	if size < 0 {
		s.moreWrites--
	} else {
		s.moreWrites++
	}
}

// counted is a device's book when all were counted.
type counted struct {
	book
	dev   hub.DeviceID
	rev   uint64
	bytes int
	gone  []entry
}

// count reads the books of all devices.
func (s *Store) count(ctx context.Context) ([]*counted, error) {
	s.mu.Lock()
	moreWrites, moreBytes := s.moreWrites, s.moreBytes
	s.mu.Unlock()
	var all []*counted
	writes, bytes := 0, 0
	for doc, err := range s.docs.Range(ctx, collBooks, "", "") {
		if err != nil {
			return nil, err
		}
		b, err := decodeBook(doc)
		if err != nil {
			return nil, err
		}
		c := &counted{book: b, dev: hub.DeviceID(doc.Key), rev: doc.Rev, bytes: b.bytes()}
		writes, bytes = writes+len(b.Kept), bytes+c.bytes
		if len(b.Kept) > 0 {
			all = append(all, c)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.writes, s.bytes = writes, bytes
	// What was kept while the books were read is counted twice at worst, until the next time.
	s.moreWrites, s.moreBytes = s.moreWrites-moreWrites, s.moreBytes-moreBytes
	return all, nil
}

// crowded reports whether it is time to count, and what is too much if so, as far as is known.
func (s *Store) crowded() (writes, bytes int, count bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	writes, bytes = s.writes+s.moreWrites-s.max.allWrites, s.bytes+s.moreBytes-s.max.allBytes
	return writes, bytes, writes > 0 || bytes > 0 || s.moreWrites >= s.max.allWrites/slack || s.moreBytes >= s.max.allBytes/slack
}

// makeRoomForAll drops what is too much of all devices: that with the most loses its oldest. Where it fails the next one does it.
func (s *Store) makeRoomForAll(ctx context.Context) {
	if _, _, count := s.crowded(); !count || !s.counting.TryLock() { // who counts does it for all
		return
	}
	defer s.counting.Unlock()
	for range maxTries {
		all, err := s.count(ctx)
		if err != nil {
			return
		}
		writes, bytes, _ := s.crowded()
		if writes <= 0 && bytes <= 0 {
			return
		}
		writes, bytes = writes+s.max.allWrites/slack, bytes+s.max.allBytes/slack
		for writes > 0 || bytes > 0 {
			var most *counted
			for _, c := range all {
				if len(c.Kept) > 0 && (most == nil || c.bytes > most.bytes) {
					most = c
				}
			}
			if most == nil {
				break
			}
			e := most.drop(0)
			most.gone = append(most.gone, e)
			most.bytes -= e.Size
			writes, bytes = writes-1, bytes-e.Size
		}
		again := false
		for _, c := range all {
			if len(c.gone) == 0 {
				continue
			}
			switch _, err := s.writeBook(ctx, c.dev, c.book, c.rev); {
			case err == nil:
				s.remove(ctx, c.dev, c.gone)
			case hub.IsKind(err, hub.Conflict): // perhaps another process makes room, too
				again = true
			default:
				return
			}
		}
		if !again {
			return
		}
	}
}

// Kept is what is kept of a device in quarantine under that ownership, nothing for others.
func (s *Store) Kept(ctx context.Context, own hub.Ownership) (hub.Kept, error) {
	const op = "quarantine.Kept"
	k := hub.Kept{Writes: []hub.KeptWrite{}} // an empty list for scripts, not null
	if generation, is := s.in(own.Device); !is || generation != own.Generation {
		return k, nil
	}
	b, rev, err := s.book(ctx, own.Device)
	if err != nil {
		return k, trouble(op, err)
	}
	if rev != 0 && b.Generation == own.Generation {
		k.Dropped = b.Dropped
	}
	for doc, err := range s.writesOf(ctx, own.Device) {
		if err != nil {
			return k, trouble(op, err)
		}
		w, _, err := decode(doc)
		if err != nil {
			return k, err
		}
		dropped := w.Number <= b.Last && !slices.ContainsFunc(b.Kept, func(e entry) bool { return e.Number == w.Number })
		if w.Generation == own.Generation && !dropped {
			k.Writes = append(k.Writes, w.KeptWrite)
		}
	}
	return k, nil
}

// Count is how many writes of a device are kept, and how many made room for them.
func (s *Store) Count(ctx context.Context, dev hub.DeviceID) (kept int, dropped uint64, err error) {
	b, _, err := s.book(ctx, dev)
	if err != nil {
		return 0, 0, trouble("quarantine.Count", err)
	}
	return len(b.Kept), b.Dropped, nil
}

// Discard forgets all that is kept of a device, which is not in quarantine any more, whichever process kept it. What another process
// keeps that has not heard yet goes later: see Run. It may be repeated.
func (s *Store) Discard(ctx context.Context, dev hub.DeviceID) error {
	release, err := s.takeTurn(ctx, dev)
	if err != nil {
		return err
	}
	defer release()
	for t := begin(); ; {
		if err := t.again(ctx); err != nil {
			return trouble("quarantine.Discard", err)
		}
		b, rev, err := s.book(ctx, dev)
		var writes []entry
		if err == nil {
			writes, err = s.entries(ctx, dev)
		}
		if err == nil {
			_, err = s.empty(ctx, dev, b, rev, writes)
		}
		if err == nil {
			return nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return trouble("quarantine.Discard", err)
		}
	}
}

// entries are all writes that are stored of a device, entered or not.
func (s *Store) entries(ctx context.Context, dev hub.DeviceID) (all []entry, err error) {
	for doc, err := range s.writesOf(ctx, dev) {
		if err != nil {
			return nil, err
		}
		_, e, err := decode(doc)
		if err != nil {
			return nil, err
		}
		all = append(all, e)
	}
	return all, nil
}

// empty removes writes of a device and all that is in its book, and returns the revision that the book has then. Conflict if somebody
// has changed it since it was read.
func (s *Store) empty(ctx context.Context, dev hub.DeviceID, b book, rev uint64, writes []entry) (uint64, error) {
	kept := b.Kept
	b.Kept, b.Dropped = nil, 0
	for _, e := range writes {
		b.Last = max(b.Last, e.Number)
	}
	if rev != 0 { // first, so that nobody takes what goes for kept
		var err error
		if rev, err = s.writeBook(ctx, dev, b, rev); err != nil {
			return 0, err
		}
		for _, e := range kept {
			s.account(-e.Size)
		}
	}
	for _, e := range writes {
		if err := s.docs.Delete(ctx, collection, key(dev, e.Number), e.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return 0, err
		}
	}
	return rev, nil
}

// Run removes what is over and was left behind, by a process that died or had not heard that a quarantine is over, until ctx ends.
// known fails while it is not sure that what is said of quarantines is true of some time in the last minute; it must not block. The
// error is always nil.
func (s *Store) Run(ctx context.Context, known func() error, ready func()) error {
	ready()
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	var left map[hub.DeviceID]leftover
	for {
		left = s.sweep(ctx, known, left)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// leftover is a book of a device that is not in quarantine: which revision was found, and when.
type leftover struct {
	rev uint64
	at  time.Time
}

// sweep removes what was found to be over a minute ago already, unless it was changed since, and returns what is left. In a minute we
// hear of a quarantine in which another process has kept something by then, and whoever has not heard that one is over does. So neither
// clocks nor the order in which processes hear matter: what was there a minute ago, and is of no quarantine that we have heard of, is
// over.
func (s *Store) sweep(ctx context.Context, known func() error, before map[hub.DeviceID]leftover) map[hub.DeviceID]leftover {
	left := map[hub.DeviceID]leftover{}
	for doc, err := range s.docs.Range(ctx, collBooks, "", "") {
		if err != nil {
			return nil // the next time
		}
		dev := hub.DeviceID(doc.Key)
		b, err := decodeBook(doc)
		if err != nil {
			continue // Keep and Kept say so
		}
		generation, is := s.in(dev)
		if known() != nil {
			return nil
		}
		if is && generation == b.Generation {
			continue
		}
		was, is := before[dev]
		switch {
		case !is || was.rev != doc.Rev:
			left[dev] = leftover{doc.Rev, time.Now()}
		case time.Since(was.at) < sweepEvery:
			left[dev] = was
		default:
			s.forget(ctx, dev, b, doc.Rev)
		}
	}
	return left
}

// forget removes a device's book and what is in it, unless it was changed since it had that revision; then, and after trouble, it is
// found again. What is not entered may be of a quarantine that has only just begun: it is entered, and goes the next time if not.
func (s *Store) forget(ctx context.Context, dev hub.DeviceID, b book, rev uint64) {
	writes, err := s.entries(ctx, dev)
	if err != nil {
		return
	}
	last := b.Last
	for _, e := range writes {
		if e.Number > last {
			b.enter(e)
		}
	}
	if b.Last > last {
		_, _ = s.writeBook(ctx, dev, b, rev)
		return
	}
	if rev, err = s.empty(ctx, dev, b, rev, writes); err == nil {
		_ = s.docs.Delete(ctx, collBooks, string(dev), rev)
	}
}

func trouble(op string, err error) error {
	kind := hub.Unavailable
	if k := hub.KindOf(err); k == hub.Exhausted || k == hub.Deadline || k == hub.TooLarge {
		kind = k
	}
	return &hub.Error{Kind: kind, Op: op, Err: err}
}

// all is how many writes are kept, as far as is known.
func (s *Store) all() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return float64(s.writes + s.moreWrites)
}
