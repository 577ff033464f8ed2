package mongostore

import (
	"context"
	"fmt"
	"iter"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Pages bound what an iteration holds in memory. Between pages, while the caller works, nothing is held on the server.
const (
	pageItems = 256
	pageBytes = 4 << 20
	// moves is how often a device may be folded while it is being read.
	moves = 50
)

// reading begins a call that reads.
func (s *Store) reading(ctx context.Context, op string) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	return s.enter()
}

func between(from, to string) bson.D {
	return bson.D{{Key: "_id", Value: bson.D{{Key: "$gte", Value: from}, {Key: "$lt", Value: to}}}}
}

// find reads at most limit documents in the order of their keys, all if limit is 0.
func find[T any](ctx context.Context, s *Store, c *mongo.Collection, op string, filter bson.D, limit int, fields ...string) ([]T, error) {
	o := options.Find().SetSort(bson.D{{Key: "_id", Value: 1}})
	if limit > 0 {
		o.SetLimit(int64(limit))
	}
	if len(fields) > 0 {
		var d bson.D
		for _, f := range fields {
			d = append(d, bson.E{Key: f, Value: 1})
		}
		o.SetProjection(d)
	}
	var out []T
	err := s.again(ctx, op, func(ctx context.Context) error {
		out = nil
		cur, err := c.Find(ctx, filter, o)
		if err != nil {
			return err
		}
		return cur.All(ctx, &out)
	})
	return out, err
}

func (s *Store) records(ctx context.Context, ids []string) ([]record, error) {
	return find[record](ctx, s, s.devices, "record", bson.D{{Key: "_id", Value: bson.D{{Key: "$in", Value: ids}}}}, 0)
}

// record reads a device's record; without an ID if there is none.
func (s *Store) record(ctx context.Context, dev hub.DeviceID) (record, error) {
	recs, err := find[record](ctx, s, s.devices, "record", bson.D{{Key: "_id", Value: string(dev)}}, 1)
	if err != nil || len(recs) == 0 {
		return record{}, err
	}
	return recs[0], nil
}

// commitPage reads a device's commits from the seq on, and whether there may be more.
func (s *Store) commitPage(ctx context.Context, dev hub.DeviceID, from uint64) (page []hub.Commit, more bool, err error) {
	err = s.again(ctx, "Commits", func(ctx context.Context) error {
		page, more = nil, false
		cur, err := s.commits.Find(ctx, between(commitKey(dev, from), past(dev)), options.Find().
			SetSort(bson.D{{Key: "_id", Value: 1}}).SetLimit(pageItems).SetProjection(bson.D{{Key: "c", Value: 1}}))
		if err != nil {
			return err
		}
		defer cur.Close(ctx)
		for bytes := 0; cur.Next(ctx); {
			var d commitDoc
			if err := cur.Decode(&d); err != nil {
				return err
			}
			c, err := store.DecodeCommit(d.Commit)
			if err == nil {
				c.Seq, err = seqOf(d.ID)
			}
			if err != nil {
				return &hub.Error{Kind: hub.Internal, Op: "mongostore.Commits", Code: "data-damaged", Err: fmt.Errorf("commit %s: %w", d.ID, err)}
			}
			c.Device = dev
			page = append(page, c)
			if bytes += len(d.Commit); bytes >= pageBytes || len(page) == pageItems {
				more = true
				return nil
			}
		}
		return cur.Err()
	})
	return page, more, err
}

// Load reads a device. What this process has of its documents is stored first, so that the state is as new as it can be.
func (s *Store) Load(ctx context.Context, dev hub.DeviceID) (store.State, error) {
	if err := checkDevice(dev); err != nil {
		return store.State{}, err
	}
	if err := s.reading(ctx, "Load"); err != nil {
		return store.State{}, err
	}
	defer s.calls.Done()
	if err := s.foldDevice(ctx, dev); err != nil {
		s.log.Debug("documents were not stored before a load; its commits have what they lack", "device", dev, "error", err)
	}
	for range moves {
		st, whole, err := s.loadOnce(ctx, dev)
		if err != nil || whole {
			return st, err
		}
	}
	return store.State{}, errUnreachable.With("mongostore.Load", fmt.Errorf("device %s changed %d times while it was read", dev, moves))
}

// foldDevice folds what this process has of a device.
func (s *Store) foldDevice(ctx context.Context, dev hub.DeviceID) error {
	s.mu.Lock()
	d := s.known[dev]
	if d == nil {
		s.mu.Unlock()
		return nil
	}
	_, dirty := s.dirty[d]
	d.refs++
	s.mu.Unlock()
	defer s.unpin([]*part{{dev: d}})
	if !dirty {
		return nil
	}
	return s.fold(ctx, []*device{d})
}

// loadOnce reads record, documents, record and commits, in this order. It is whole if the record stood still and the commits
// follow it.
func (s *Store) loadOnce(ctx context.Context, dev hub.DeviceID) (st store.State, whole bool, err error) {
	rec, err := s.record(ctx, dev)
	if err != nil || rec.ID == "" {
		return store.State{}, true, err // the record is older than anything else
	}
	docs, err := find[stateDoc](ctx, s, s.state, "Load", between(string(dev)+"|", past(dev)), 0)
	if err != nil {
		return store.State{}, false, err
	}
	again, err := s.record(ctx, dev)
	if err != nil || again != rec {
		return store.State{}, false, err
	}
	st = store.State{FoldedTo: uint64(rec.Folded), LastSeq: uint64(rec.Folded)}
	if st.Docs, err = visible(dev, docs, rec); err != nil {
		return store.State{}, false, err
	}
	for more := true; more; {
		var page []hub.Commit
		if page, more, err = s.commitPage(ctx, dev, st.LastSeq+1); err != nil {
			return store.State{}, false, err
		}
		if len(page) > 0 && page[0].Seq != st.LastSeq+1 {
			return store.State{}, false, nil // it was folded and trimmed meanwhile
		}
		st.Commits = append(st.Commits, page...)
		if len(page) > 0 {
			st.LastSeq = page[len(page)-1].Seq
		}
	}
	return st, true, nil
}

// visible returns the documents that count by the record, of all versions in the order of their keys.
func visible(dev hub.DeviceID, docs []stateDoc, rec record) ([]store.StateDoc, error) {
	var out []store.StateDoc
	last := ""        // the document that the versions are of
	deleted := false  // its newest version so far says so
	flush := func() { // the document is over
		if deleted {
			out = out[:len(out)-1]
		}
		deleted = false
	}
	for _, d := range docs {
		key := d.ID[len(dev)+1:]
		if d.Trim {
			key = key[:len(key)-1]
		}
		if len(key) < seqDigits+len(separator) {
			return nil, damaged(d.ID)
		}
		key = key[:len(key)-seqDigits-len(separator)]
		if d.Trim && d.Seq > rec.Based || !d.Trim && d.Seq > rec.Folded {
			continue
		}
		doc := store.StateDoc{Value: d.Value}
		if doc.Value == nil && d.Empty {
			doc.Value = []byte{}
		}
		if last == "" || key != last {
			flush()
			last = key
			out = append(out, store.StateDoc{})
		}
		var ok bool
		if doc.Key, ok = decodeText(key); !ok {
			return nil, damaged(d.ID)
		}
		out[len(out)-1], deleted = doc, doc.Value == nil
	}
	flush()
	return out, nil
}

func damaged(id string) error {
	return &hub.Error{Kind: hub.Internal, Op: "mongostore", Code: "data-damaged", Err: fmt.Errorf("the key of document %.64q is damaged", id)}
}

// Commits reads a device's commits from the seq on. Between pages newer commits may appear, and older ones be trimmed; what was
// trimmed is left out, as at the start.
func (s *Store) Commits(ctx context.Context, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		if err := checkDevice(dev); err != nil {
			yield(hub.Commit{}, err)
			return
		}
		for more := true; more; {
			var page []hub.Commit
			var err error
			if page, more, err = s.commitsCall(ctx, dev, from); err != nil {
				yield(hub.Commit{}, err)
				return
			}
			for _, c := range page {
				if !yield(c, nil) {
					return
				}
				from = c.Seq + 1
			}
		}
	}
}

func (s *Store) commitsCall(ctx context.Context, dev hub.DeviceID, from uint64) (page []hub.Commit, more bool, err error) {
	if err := s.reading(ctx, "Commits"); err != nil {
		return nil, false, err
	}
	defer s.calls.Done()
	return s.commitPage(ctx, dev, from)
}

// SeqAt searches the device's log by its keys, as the other back end does: seqs have no holes, times never go back, and what is
// looked for is mostly near the end. So commits need no index of times.
func (s *Store) SeqAt(ctx context.Context, dev hub.DeviceID, t time.Time) (uint64, error) {
	if err := checkDevice(dev); err != nil {
		return 0, err
	}
	if err := s.reading(ctx, "SeqAt"); err != nil {
		return 0, err
	}
	defer s.calls.Done()
	at := t.UnixNano()
	lo, hi, err := s.ends(ctx, dev)
	if err != nil || hi == 0 {
		return 0, err
	}
	var found, stride uint64
	for lo <= hi { // commits before lo are at or before t, or trimmed; those after hi are later
		mid := lo + (hi-lo)/2
		if stride <= hi-mid {
			mid = hi - stride
			stride = 2*stride + 1
		}
		docs, err := find[commitDoc](ctx, s, s.commits, "SeqAt", bson.D{{Key: "_id", Value: commitKey(dev, mid)}}, 1, "t")
		switch {
		case err != nil:
			return 0, err
		case len(docs) == 0: // trimmed meanwhile
			lo = mid + 1
		case docs[0].Time <= at:
			found, lo = mid, mid+1
		default:
			hi = mid - 1
		}
	}
	return found, nil
}

// ends reads the first and last seq of a device's commits, 0 and 0 if it has none.
func (s *Store) ends(ctx context.Context, dev hub.DeviceID) (first, last uint64, err error) {
	for _, end := range []struct {
		seq   *uint64
		order int
	}{{&last, -1}, {&first, 1}} {
		var docs []commitDoc
		err := s.again(ctx, "ends", func(ctx context.Context) error {
			cur, err := s.commits.Find(ctx, between(string(dev)+"|", past(dev)), options.Find().SetLimit(1).
				SetSort(bson.D{{Key: "_id", Value: end.order}}).SetProjection(bson.D{{Key: "_id", Value: 1}}))
			if err != nil {
				return err
			}
			return cur.All(ctx, &docs)
		})
		if err == nil && len(docs) == 0 {
			return 0, 0, nil
		}
		if err == nil {
			*end.seq, err = seqOf(docs[0].ID)
		}
		if err != nil {
			return 0, 0, err
		}
	}
	return first, last, nil
}

// Devices walks the devices' records. Of one that was never folded and has no base the first commit is looked for, which is not
// trimmed before it is folded: it may never have come.
func (s *Store) Devices(ctx context.Context, after hub.DeviceID) iter.Seq2[hub.DeviceID, error] {
	return func(yield func(hub.DeviceID, error) bool) {
		if after != "" {
			if err := checkDevice(after); err != nil {
				yield("", err)
				return
			}
		}
		for {
			page, last, err := s.devicePage(ctx, after)
			if err != nil {
				yield("", err)
				return
			}
			for _, dev := range page {
				if !yield(dev, nil) {
					return
				}
			}
			if last == "" {
				return
			}
			after = last
		}
	}
}

// devicePage returns devices later than after, and the place to go on from if there may be more.
func (s *Store) devicePage(ctx context.Context, after hub.DeviceID) (page []hub.DeviceID, last hub.DeviceID, err error) {
	if err := s.reading(ctx, "Devices"); err != nil {
		return nil, "", err
	}
	defer s.calls.Done()
	recs, err := find[record](ctx, s, s.devices, "Devices", bson.D{{Key: "_id", Value: bson.D{{Key: "$gt", Value: string(after)}}}}, pageItems)
	if err != nil {
		return nil, "", err
	}
	var doubtful bson.A // keys of first commits that may not be there
	for _, rec := range recs {
		if rec.Folded == 0 && !rec.Docs {
			doubtful = append(doubtful, commitKey(hub.DeviceID(rec.ID), 1))
		}
	}
	begun := map[string]bool{}
	if len(doubtful) > 0 {
		firsts, err := find[commitDoc](ctx, s, s.commits, "Devices", bson.D{{Key: "_id", Value: bson.D{{Key: "$in", Value: doubtful}}}}, 0, "_id")
		if err != nil {
			return nil, "", err
		}
		for _, c := range firsts {
			begun[c.ID] = true
		}
	}
	for _, rec := range recs {
		if dev := hub.DeviceID(rec.ID); rec.Folded != 0 || rec.Docs || begun[commitKey(dev, 1)] {
			page = append(page, dev)
		}
	}
	if len(recs) == pageItems {
		last = hub.DeviceID(recs[len(recs)-1].ID)
	}
	return page, last, nil
}
