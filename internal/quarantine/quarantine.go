// Package quarantine keeps apart what devices in quarantine write: durable, bounded, for people to look at.
//
// It must not know doors or services: they hand it hub's words, and say which devices are in quarantine.
package quarantine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const collection = "quarantine"

// limits bound what is kept; beyond them the oldest goes.
type limits struct {
	writes, bytes       int // of a device
	allWrites, allBytes int
}

// bounds are such that the API's answer about one device stays small, and that of the rest of the store little is taken.
var bounds = limits{writes: 256, bytes: 1 << 20, allWrites: 20_000, allBytes: 64 << 20}

// maxTries bounds how often a place for a write is looked for that another one took after an error that left it unknown.
const maxTries = 8

var errOver = hub.NewError(hub.Precondition, "quarantine-over", "the device is not in quarantine any more")

// Store keeps what is written. All methods are safe for concurrent use. A device's writes wait for each other, and for no other
// device's.
type Store struct {
	docs    store.Documents
	in      func(hub.DeviceID) (generation uint64, is bool)
	max     limits
	metrics *metrics

	mu            sync.Mutex // guards all below
	devs          map[hub.DeviceID]*device
	writes, bytes int // of all devices
}

// device is what is kept of one. turn holds one token, and whoever has it may write documents of the device and change what is
// below, with Store.mu where the counts change; either is enough to read.
type device struct {
	turn  chan struct{}
	kept  []entry // oldest first
	last  uint64  // the highest number given; they go up by one, so that this tells how many were dropped
	bytes int
}

func (d *device) dropped() uint64 { return d.last - uint64(len(d.kept)) }

// entry is a write that is kept, without what it says.
type entry struct {
	number, rev uint64
	size        int
	host        string
}

// stored is a document: a write, and under which ownership it was made.
type stored struct {
	Generation uint64 `json:"generation"`
	hub.KeptWrite
}

// Open reads what is kept, and removes what is of devices that are not in quarantine any more. in says which are, and under which
// generation of their ownership; it must not block.
func Open(ctx context.Context, docs store.Documents, in func(hub.DeviceID) (uint64, bool), reg prometheus.Registerer) (*Store, error) {
	return open(ctx, docs, in, reg, bounds)
}

func open(ctx context.Context, docs store.Documents, in func(hub.DeviceID) (uint64, bool), reg prometheus.Registerer, max limits) (*Store, error) {
	s := &Store{docs: docs, in: in, max: max, devs: map[hub.DeviceID]*device{}}
	s.metrics = newMetrics(reg, s)
	var old []store.Doc
	for doc, err := range docs.Range(ctx, collection, "", "") {
		if err != nil {
			return nil, fmt.Errorf("read the quarantine: %w", err)
		}
		w, err := decode(doc)
		if err != nil {
			return nil, err
		}
		dev := deviceOf(doc.Key)
		if generation, is := in(dev); !is || generation != w.Generation {
			old = append(old, store.Doc{Key: doc.Key, Rev: doc.Rev})
			continue
		}
		s.enter(s.device(dev), &w, doc.Rev, len(doc.Value))
	}
	for _, doc := range old {
		if err := docs.Delete(ctx, collection, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return nil, fmt.Errorf("empty the quarantine: %w", err)
		}
	}
	return s, nil
}

func key(dev hub.DeviceID, number uint64) string { return fmt.Sprintf("%s/%016x", dev, number) }

func deviceOf(key string) hub.DeviceID {
	dev, _, _ := strings.Cut(key, "/")
	return hub.DeviceID(dev)
}

func decode(doc store.Doc) (w stored, err error) {
	if err := json.Unmarshal(doc.Value, &w); err != nil {
		return w, &hub.Error{Kind: hub.Internal, Op: "quarantine.read", Err: fmt.Errorf("%.64s: %w", doc.Key, err)}
	}
	return w, nil
}

// device is that of an ID, which is made if there is none.
func (s *Store) device(dev hub.DeviceID) *device {
	s.mu.Lock()
	defer s.mu.Unlock()
	d := s.devs[dev]
	if d == nil {
		d = &device{turn: make(chan struct{}, 1)}
		s.devs[dev] = d
	}
	return d
}

// enter counts a write that is stored. The caller has the device's turn.
func (s *Store) enter(d *device, w *stored, rev uint64, size int) {
	host, _, err := net.SplitHostPort(w.From.Remote)
	if err != nil {
		host = w.From.Remote
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.kept = append(d.kept, entry{w.Number, rev, size, host})
	d.last = max(d.last, w.Number)
	d.bytes += size
	s.writes, s.bytes = s.writes+1, s.bytes+size
}

// Quarantined reports whether a device is in quarantine. It does not block.
func (s *Store) Quarantined(dev hub.DeviceID) bool {
	_, is := s.in(dev)
	return is
}

// Keep stores a write, durably on return, and returns its number; a sign-in's session is set to that. The same message of a session
// again is kept once. Where there is too much, the oldest makes room. Precondition ("quarantine-over") for a device that is not in
// quarantine under that ownership, Unavailable or Exhausted when it could not be stored: then it may be tried again.
func (s *Store) Keep(ctx context.Context, own hub.Ownership, w hub.KeptWrite) (uint64, error) {
	const op = "quarantine.Keep"
	d := s.device(own.Device)
	select {
	case d.turn <- struct{}{}:
	case <-ctx.Done():
		return 0, &hub.Error{Kind: hub.Deadline, Op: op, Err: ctx.Err()}
	}
	number, err := s.keep(ctx, d, own, w)
	if err == nil {
		s.makeRoom(ctx, own.Device, d)
	}
	<-d.turn
	if err == nil {
		s.makeRoomForAll(ctx)
	}
	return number, err
}

func (s *Store) keep(ctx context.Context, d *device, own hub.Ownership, w hub.KeptWrite) (uint64, error) {
	const op = "quarantine.Keep"
	w.Time = w.Time.UTC()
	for range maxTries {
		// In the turn, which Discard waits for: what comes after it is not kept.
		if generation, is := s.in(own.Device); !is || generation != own.Generation {
			return 0, errOver.With(op, nil)
		}
		w.Number = d.last + 1
		if w.Kind == hub.KeptSignedIn {
			w.Session = w.Number
		}
		doc := stored{Generation: own.Generation, KeptWrite: w}
		value, err := json.Marshal(doc)
		if err != nil {
			return 0, fmt.Errorf("encode a write: %w", err)
		}
		rev, err := s.docs.Put(ctx, collection, store.Doc{Key: key(own.Device, w.Number), Value: value})
		if err == nil {
			s.enter(d, &doc, rev, len(value))
			return w.Number, nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return 0, trouble(op, err)
		}
		// An earlier write was stored all the same, and nobody could say so.
		there, err := s.docs.Get(ctx, collection, key(own.Device, w.Number))
		if err != nil {
			return 0, trouble(op, err)
		}
		if there.Rev == 0 {
			continue
		}
		if doc, err = decode(there); err != nil {
			return 0, err
		}
		s.enter(d, &doc, there.Rev, len(there.Value))
		if w.Message != 0 && doc.Session == w.Session && doc.Message == w.Message && doc.Generation == own.Generation {
			return doc.Number, nil
		}
	}
	return 0, trouble(op, errors.New("too much contention"))
}

// makeRoom drops what is too much of a device. Of its hosts the one with the most loses its oldest, so that of two rivals the busy
// one does not hide the other. The caller has the turn. What cannot be removed now is when the next one comes.
func (s *Store) makeRoom(ctx context.Context, dev hub.DeviceID, d *device) {
	for len(d.kept) > s.max.writes || d.bytes > s.max.bytes && len(d.kept) > 1 {
		of := map[string]int{}
		most := ""
		for _, e := range d.kept {
			if of[e.host] += e.size; of[e.host] > of[most] {
				most = e.host
			}
		}
		at := 0
		for d.kept[at].host != most {
			at++
		}
		if at == len(d.kept)-1 { // what has just been acknowledged stays
			at = 0
		}
		if !s.drop(ctx, dev, d, at) {
			return
		}
	}
}

// makeRoomForAll drops what is too much of all devices: that with the most loses its oldest.
func (s *Store) makeRoomForAll(ctx context.Context) {
	for {
		s.mu.Lock()
		var most *device
		var dev hub.DeviceID
		if s.writes > s.max.allWrites || s.bytes > s.max.allBytes {
			for id, d := range s.devs {
				if len(d.kept) > 0 && (most == nil || d.bytes > most.bytes) {
					dev, most = id, d
				}
			}
		}
		s.mu.Unlock()
		if most == nil {
			return
		}
		select {
		case most.turn <- struct{}{}:
		case <-ctx.Done():
			return // the next one does it
		}
		ok := len(most.kept) == 0 || s.drop(ctx, dev, most, 0) // it may have been discarded meanwhile
		<-most.turn
		if !ok {
			return
		}
	}
}

// drop removes a write of a device; false if that failed. The caller has the turn.
func (s *Store) drop(ctx context.Context, dev hub.DeviceID, d *device, at int) bool {
	e := d.kept[at]
	if err := s.docs.Delete(ctx, collection, key(dev, e.number), e.rev); err != nil && !hub.IsKind(err, hub.Conflict) {
		return false
	}
	s.leave(d, at)
	s.metrics.dropped.Inc()
	return true
}

func (s *Store) leave(d *device, at int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := d.kept[at]
	d.kept = append(d.kept[:at:at], d.kept[at+1:]...)
	d.bytes -= e.size
	s.writes, s.bytes = s.writes-1, s.bytes-e.size
}

// Kept is what is kept of a device in quarantine under that ownership, nothing for others.
func (s *Store) Kept(ctx context.Context, own hub.Ownership) (hub.Kept, error) {
	k := hub.Kept{Writes: []hub.KeptWrite{}} // an empty list for scripts, not null
	if generation, is := s.in(own.Device); !is || generation != own.Generation {
		return k, nil
	}
	for doc, err := range s.docs.Range(ctx, collection, string(own.Device)+"/", string(own.Device)+"0") { // which follows the slash
		if err != nil {
			return k, trouble("quarantine.Kept", err)
		}
		w, err := decode(doc)
		if err != nil {
			return k, err
		}
		if w.Generation == own.Generation {
			k.Writes = append(k.Writes, w.KeptWrite)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devs[own.Device]; d != nil {
		k.Dropped = d.dropped()
	}
	return k, nil
}

// Count is how many writes of a device are kept, and how many made room for them.
func (s *Store) Count(dev hub.DeviceID) (kept int, dropped uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if d := s.devs[dev]; d != nil {
		return len(d.kept), d.dropped()
	}
	return 0, 0
}

// Discard forgets all that is kept of a device, which is not in quarantine any more. It may be repeated.
func (s *Store) Discard(ctx context.Context, dev hub.DeviceID) error {
	const op = "quarantine.Discard"
	s.mu.Lock()
	d := s.devs[dev]
	s.mu.Unlock()
	if d == nil {
		return nil
	}
	select {
	case d.turn <- struct{}{}:
	case <-ctx.Done():
		return &hub.Error{Kind: hub.Deadline, Op: op, Err: ctx.Err()}
	}
	defer func() { <-d.turn }()
	for len(d.kept) > 0 {
		e := d.kept[0]
		if err := s.docs.Delete(ctx, collection, key(dev, e.number), e.rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return trouble(op, err)
		}
		s.leave(d, 0)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	d.last = 0
	return nil
}

func trouble(op string, err error) error {
	kind := hub.Unavailable
	if k := hub.KindOf(err); k == hub.Exhausted || k == hub.Deadline || k == hub.TooLarge {
		kind = k
	}
	return &hub.Error{Kind: kind, Op: op, Err: err}
}

// count is how many writes are kept.
func (s *Store) count() float64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return float64(s.writes)
}
