package mongostore

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// How documents follow the log. A document is stored in versions, one for each time it is folded, whose key ends in the seq that
// it is the state after. A device's record says up to which seq it is folded; of each document the newest version that is not
// later counts. So writing all versions of a segment and then moving the record shows them all at once, what breaks off in
// between shows none, and who comes late with an old version does no harm. Versions that newer ones replaced are removed
// afterwards; a reader whose record moved meanwhile reads again.

// segment is the documents that a piece of a device's log changed: those of the commits after from up to to, which are published.
type segment struct {
	from, to uint64
	docs     map[string]version // by key
	numbers  []uint64
	cost     lag
}

type version struct {
	seq   uint64
	value []byte // nil: deleted
}

// stateDoc is a version as it is stored.
type stateDoc struct {
	ID    string `bson:"_id"`
	Seq   int64  `bson:"s"`
	Value []byte `bson:"v,omitempty"`
	Empty bool   `bson:"e,omitempty"` // Value is there, and empty
	Trim  bool   `bson:"t,omitempty"` // of Trim: counts once the device is based on Seq
}

// record is a device's record.
type record struct {
	ID     string `bson:"_id"`
	Folded int64  `bson:"f"`
	Based  int64  `bson:"b"`
	Docs   bool   `bson:"d"` // Trim gave it documents
}

const (
	foldDocs  = 1000
	foldBytes = 8 << 20
)

// segmentOf makes the segment of one commit. It keeps copies: the caller's bytes are the caller's.
func segmentOf(own *stored) *segment {
	seq := own.commit.Seq
	g := &segment{from: seq - 1, to: seq, docs: make(map[string]version, len(own.docs)), numbers: []uint64{own.number}, cost: own.cost}
	for _, doc := range own.docs {
		g.docs[doc.Key] = version{seq, slices.Clone(doc.Value)}
	}
	return g
}

// add puts a segment where it belongs, joined with those it touches. Store.mu is held.
func (d *device) add(g *segment) {
	at, _ := slices.BinarySearchFunc(d.segs, g.from, func(h *segment, from uint64) int {
		if h.from < from {
			return -1
		}
		return 1
	})
	d.segs = slices.Insert(d.segs, at, g)
	for i := max(at-1, 0); i+1 < len(d.segs); {
		a, b := d.segs[i], d.segs[i+1]
		if b.from > a.to {
			if i++; i > at {
				return
			}
			continue
		}
		for key, v := range b.docs {
			if old, ok := a.docs[key]; !ok || old.seq <= v.seq {
				a.docs[key] = v
			}
		}
		a.to = max(a.to, b.to)
		a.numbers = append(a.numbers, b.numbers...)
		a.cost.events += b.cost.events
		a.cost.bytes += b.cost.bytes
		d.segs = slices.Delete(d.segs, i+1, i+2)
	}
}

// Fold takes the documents that commits of other writers changed; store.Log has the contract.
func (s *Store) Fold(ctx context.Context, dev hub.DeviceID, st store.State, docs []store.StateDoc) error {
	if err := errors.Join(checkDevice(dev), store.CheckDocs(docs)); err != nil {
		return err
	}
	if st.LastSeq <= st.FoldedTo {
		return nil
	}
	if err := s.reading(ctx, "Fold"); err != nil {
		return err
	}
	defer s.calls.Done()
	if err := s.keepUp(ctx, "Fold"); err != nil {
		return err
	}
	p := []*part{{dev: s.pin(dev)}}
	defer s.unpin(p)
	d := p[0].dev
	if err := d.take(ctx); err != nil {
		return fmt.Errorf("Fold: %w", err)
	}
	defer d.leave()
	// Only what is published is folded, and somebody else may have stored more since this process looked.
	if err := s.ready(context.WithoutCancel(ctx), d, d.published < st.LastSeq); err != nil {
		return err
	}
	g := &segment{from: st.FoldedTo, to: st.LastSeq, docs: make(map[string]version, len(docs))}
	for _, doc := range docs {
		g.docs[doc.Key] = version{st.LastSeq, slices.Clone(doc.Value)}
		g.cost.bytes += int64(len(doc.Key) + len(doc.Value))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lag.bytes += g.cost.bytes
	d.add(g)
	s.dirty[d] = struct{}{}
	return nil
}

// work folds and publishes what is left to, until the store closes.
func (s *Store) work() {
	tick := time.NewTicker(s.times.fold)
	defer tick.Stop()
	failures := 0
	for {
		select {
		case <-tick.C:
		case <-s.wake:
		case <-s.life.Done():
			return
		}
		err := s.settleAll(s.life)
		switch {
		case err == nil:
			failures = 0
			continue
		case s.life.Err() != nil:
			return
		case failures == 0:
			s.log.Warn("documents do not follow the log; it is tried again", "error", err)
		}
		if failures++; pause(s.life, failures) != nil {
			return
		}
	}
}

// settleAll publishes backlogs, looks after doubts, and folds everything there is.
func (s *Store) settleAll(ctx context.Context) error {
	s.mu.Lock()
	all := slices.Collect(maps.Keys(s.dirty))
	for _, d := range all {
		d.refs++
	}
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		for _, d := range all {
			d.refs--
		}
	}()
	var failed error
	for _, d := range all {
		if failed == nil {
			failed = s.catchUp(ctx, d)
		}
	}
	return errors.Join(failed, s.fold(ctx, all))
}

// catchUp publishes a device's backlog and finds out what became of the commits in doubt.
func (s *Store) catchUp(ctx context.Context, d *device) error {
	select {
	case d.lock <- struct{}{}:
	default:
		return nil // somebody works with it, which does the same; or next time
	}
	defer d.leave()
	s.mu.Lock()
	doubts := len(d.doubts) > 0
	s.mu.Unlock()
	if doubts {
		return s.ready(ctx, d, true)
	}
	err := s.publishBacklog(ctx, d)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(d.backlog)+len(d.doubts)+len(d.segs) == 0 {
		delete(s.dirty, d)
	}
	return err
}

// foldAlone waits until nobody else of this process writes records; the caller gives back s.folding.
func (s *Store) foldAlone(ctx context.Context) error {
	select {
	case s.folding <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("fold: %w", ctx.Err())
	}
}

// fold writes the segments of the devices.
func (s *Store) fold(ctx context.Context, devs []*device) error {
	if err := s.foldAlone(ctx); err != nil {
		return err
	}
	defer func() { <-s.folding }()
	var failed error
	for len(devs) > 0 && failed == nil {
		type piece struct {
			d *device
			g *segment
		}
		var batch []piece
		docs, bytes := 0, int64(0)
		s.mu.Lock()
		for len(devs) > 0 && docs < foldDocs && bytes < foldBytes {
			d := devs[0]
			devs = devs[1:]
			if len(d.segs) == 0 {
				continue
			}
			g := d.segs[0] // what is behind a hole waits until the hole is filled
			d.segs = slices.Delete(d.segs, 0, 1)
			batch = append(batch, piece{d, g})
			docs += len(g.docs)
			bytes += g.cost.bytes
		}
		s.mu.Unlock()
		ready := make(map[string]*segment, len(batch))
		for _, p := range batch {
			ready[string(p.d.id)] = p.g
		}
		var folded map[string]bool
		folded, failed = s.writeSegments(ctx, ready)
		s.mu.Lock()
		for _, p := range batch {
			if !folded[string(p.d.id)] {
				p.d.add(p.g) // back
				continue
			}
			for _, n := range p.g.numbers {
				delete(s.open, n)
			}
			s.lag.events -= p.g.cost.events
			s.lag.bytes -= p.g.cost.bytes
		}
		if len(folded) > 0 && s.eased != nil {
			close(s.eased)
			s.eased = nil
		}
		s.mu.Unlock()
	}
	return failed
}

// writeSegments writes one segment for each of the devices, moves their records, and removes what was replaced. It returns the
// devices that are folded up to their segment's end.
func (s *Store) writeSegments(ctx context.Context, segs map[string]*segment) (folded map[string]bool, err error) {
	var docs []any
	var moves []mongo.WriteModel
	for id, g := range segs {
		for key, v := range g.docs {
			docs = append(docs, newStateDoc(hub.DeviceID(id), key, v, false))
		}
		moves = append(moves, mongo.NewUpdateOneModel().
			SetFilter(bson.D{{Key: "_id", Value: id}, {Key: "f", Value: bson.D{{Key: "$gte", Value: int64(g.from)}, {Key: "$lt", Value: int64(g.to)}}}}).
			SetUpdate(bson.D{{Key: "$set", Value: bson.D{{Key: "f", Value: int64(g.to)}}}}))
	}
	if len(moves) == 0 {
		return nil, nil
	}
	if err := s.insertVersions(ctx, docs); err != nil {
		return nil, err
	}
	moved := int64(0)
	err = s.again(ctx, "fold", func(ctx context.Context) error {
		res, err := s.devices.BulkWrite(ctx, moves, options.BulkWrite().SetOrdered(false))
		if err == nil {
			moved = res.ModifiedCount
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	folded = make(map[string]bool, len(segs))
	if moved == int64(len(moves)) {
		for id := range segs {
			folded[id] = true
		}
	} else { // somebody else folded further, or there is a hole in front
		recs, err := s.records(ctx, slices.Collect(maps.Keys(segs)))
		if err != nil {
			return nil, err
		}
		for _, rec := range recs {
			folded[rec.ID] = uint64(rec.Folded) >= segs[rec.ID].to
		}
		maps.DeleteFunc(folded, func(_ string, is bool) bool { return !is })
	}
	var removes []mongo.WriteModel
	for id := range folded { // of the others the old versions are those that count
		if segs[id].from == 0 {
			continue // there were none
		}
		for key, v := range segs[id].docs {
			removes = append(removes, removeBefore(hub.DeviceID(id), key, newStateDoc(hub.DeviceID(id), key, v, false).ID))
		}
	}
	s.remove(ctx, removes)
	return folded, nil
}

func newStateDoc(dev hub.DeviceID, key string, v version, trim bool) stateDoc {
	doc := stateDoc{ID: statePrefix(dev, key) + seqText(v.seq), Seq: int64(v.seq), Value: v.value, Trim: trim}
	doc.Empty = v.value != nil && len(v.value) == 0
	if trim {
		doc.ID += "t"
	}
	return doc
}

// insertVersions stores versions. One that is there already is the same: a version is what the log says.
func (s *Store) insertVersions(ctx context.Context, docs []any) error {
	if len(docs) == 0 {
		return nil
	}
	return s.again(ctx, "fold", func(ctx context.Context) error {
		_, err := s.state.InsertMany(ctx, docs, options.InsertMany().SetOrdered(false))
		return ignoreDuplicates(err)
	})
}

// removeBefore removes all versions of a document before one.
func removeBefore(dev hub.DeviceID, key, id string) mongo.WriteModel {
	return mongo.NewDeleteManyModel().SetFilter(bson.D{{Key: "_id", Value: bson.D{{Key: "$gte", Value: statePrefix(dev, key)}, {Key: "$lt", Value: id}}}})
}

// remove removes versions that nobody needs. If it fails they stay until the next version of their documents.
func (s *Store) remove(ctx context.Context, models []mongo.WriteModel) {
	if len(models) == 0 {
		return
	}
	err := s.once(ctx, func(ctx context.Context) error {
		_, err := s.state.BulkWrite(ctx, models, options.BulkWrite().SetOrdered(false))
		return err
	})
	if err != nil {
		s.log.Debug("old versions of documents were not removed", "error", err)
	}
}

// Behind is how many events are stored that the feed or the documents do not have yet.
func (s *Store) Behind() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.lag.events
}
