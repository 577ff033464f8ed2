package pebblestore

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"iter"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Pages bound what an iteration holds in memory, and for how long it keeps old versions from being cleaned up: between
// pages, while the caller works, nothing is held.
const (
	pageItems = 256
	pageBytes = 1 << 20
)

// view is a snapshot of the database in which everything is durable. Pebble itself shows a batch before it is synced;
// readers must not see what a crash could still take back, so they read from views only.
type view struct {
	snap  *pebble.Snapshot
	state state
	refs  int // guarded by Store.mu; the store itself holds one while the view is the current one
}

// acquire returns the current view. The caller releases it soon.
func (s *Store) acquire() (*view, error) {
	select {
	case <-s.failed:
		return nil, s.broken()
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view == nil {
		return nil, errClosed
	}
	s.view.refs++
	s.readers.Add(1)
	return s.view, nil
}

// release gives back what acquire gave.
func (s *Store) release(v *view) error {
	defer s.readers.Done()
	return s.unref(v)
}

func (s *Store) unref(v *view) error {
	s.mu.Lock()
	v.refs--
	last := v.refs == 0
	s.mu.Unlock()
	if last {
		return v.snap.Close()
	}
	return nil
}

// publish makes everything that is in the database now readable. Only the committer calls it, after a synced batch.
func (s *Store) publish(st state, fresh []recent) error {
	next := &view{snap: s.db.NewSnapshot(), state: st, refs: 1}
	s.mu.Lock()
	old := s.view
	s.view = next
	s.remember(old.state.head, fresh)
	if s.moved != nil && old.state.head != st.head {
		close(s.moved)
		s.moved = nil
	}
	s.mu.Unlock()
	return s.unref(old)
}

// read runs f on the current view.
func (s *Store) read(ctx context.Context, op string, f func(v *view) error) error {
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("%s: %w", op, err)
	}
	v, err := s.acquire()
	if err != nil {
		return err
	}
	if err := errors.Join(f(v), s.release(v)); err != nil {
		return wrap(op, err)
	}
	return nil
}

// wrap says what was being done. Errors without a kind come from the disk: a store that cannot be read is away.
func wrap(op string, err error) error {
	var he *hub.Error
	if errors.As(err, &he) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%s: %w", op, err)
	}
	return &hub.Error{Kind: hub.Unavailable, Op: "pebblestore." + op, Code: "store-read-failed", Err: err}
}

// get reads one value and hands it to f, which must not keep the bytes. f is not called, and the zero T returned, if there
// is none.
func get[T any](r pebble.Reader, key []byte, f func([]byte) (T, error)) (T, error) {
	var zero T
	v, closer, err := r.Get(key)
	if errors.Is(err, pebble.ErrNotFound) {
		return zero, nil
	}
	if err != nil {
		return zero, err
	}
	out, err := f(v)
	return out, errors.Join(err, closer.Close())
}

// clone copies v; what is there but empty is not nil.
func clone(v []byte) ([]byte, error) { return append(make([]byte, 0, len(v)), v...), nil }

func readState(r pebble.Reader) (state, error) { return get(r, metaState, decodeState) }

// each runs f over a range of keys until f returns false. f must not keep the bytes.
func each(r pebble.Reader, from, to []byte, f func(key, value []byte) (more bool, err error)) error {
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: from, UpperBound: to})
	if err != nil {
		return err
	}
	for ok := it.First(); ok; ok = it.Next() {
		v, err := it.ValueAndErr()
		if err != nil {
			return errors.Join(err, it.Close())
		}
		more, err := f(it.Key(), v)
		if err != nil {
			return errors.Join(err, it.Close())
		}
		if !more {
			break
		}
	}
	return it.Close()
}

// ends reads the first and last seq of a device's commits, 0 and 0 if it has none.
func ends(r pebble.Reader, d device) (first, last uint64, err error) {
	prefix := devicePrefix(prefixCommit, d)
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: after(prefix)})
	if err != nil {
		return 0, 0, err
	}
	good := true
	if it.Last() {
		last, good = seqOf(it.Key())
		if good && it.First() {
			first, good = seqOf(it.Key())
		}
	}
	if err := it.Close(); err != nil {
		return 0, 0, err
	}
	if !good {
		return 0, 0, fmt.Errorf("a commit key of device %s is damaged", d.id())
	}
	return first, last, nil
}

// lastSeq is the half of ends that writers need.
func lastSeq(r pebble.Reader, d device) (uint64, error) {
	prefix := devicePrefix(prefixCommit, d)
	it, err := r.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: after(prefix), KeyTypes: pebble.IterKeyTypePointsOnly})
	if err != nil {
		return 0, err
	}
	last, good := uint64(0), true
	if it.Last() {
		last, good = seqOf(it.Key())
	}
	if err := it.Close(); err != nil {
		return 0, err
	}
	if !good {
		return 0, fmt.Errorf("a commit key of device %s is damaged", d.id())
	}
	return last, nil
}

func decodeCommit(d device, seq uint64, v []byte) (hub.Commit, error) {
	c, err := store.DecodeCommit(v)
	if err != nil {
		return hub.Commit{}, fmt.Errorf("commit %s/%d: %w", d.id(), seq, err)
	}
	c.Device, c.Seq = d.id(), seq
	return c, nil
}

// Load reads a device's documents and its last seq in one snapshot. Pebble writes documents in the batch of their commit, so
// State.Commits is always empty.
func (s *Store) Load(ctx context.Context, dev hub.DeviceID) (store.State, error) {
	d, err := parseDevice(dev)
	if err != nil {
		return store.State{}, err
	}
	var st store.State
	err = s.read(ctx, "Load", func(v *view) error {
		var err error
		if st.LastSeq, err = lastSeq(v.snap, d); err != nil {
			return err
		}
		st.FoldedTo = st.LastSeq
		prefix := devicePrefix(prefixState, d)
		it, err := v.snap.NewIter(&pebble.IterOptions{LowerBound: prefix, UpperBound: after(prefix)})
		if err != nil {
			return err
		}
		// The next document is looked for, not stepped to: between the two is all that this one was before, which of a busy device
		// are thousands of values until the write buffer is flushed.
		var next []byte
		for ok := it.First(); ok; ok = it.SeekGE(next) {
			key := it.Key()
			value, err := it.ValueAndErr()
			if err == nil && len(value) < 8 {
				err = fmt.Errorf("state document %s/%q is damaged", dev, key[17:])
			}
			if err != nil {
				return errors.Join(err, it.Close())
			}
			doc := store.StateDoc{Key: string(key[17:]), Value: append(make([]byte, 0, len(value)-8), value[8:]...)}
			st.Docs = append(st.Docs, doc)
			next = append(append(next[:0], key...), 0) // the very next key that can exist
		}
		return it.Close()
	})
	if err != nil {
		return store.State{}, err
	}
	return st, nil
}

// Fold has nothing to do: documents never lag behind.
func (s *Store) Fold(context.Context, hub.DeviceID, store.State, []store.StateDoc) error { return nil }

// Commits reads a device's commits from the seq on. Between pages newer commits may appear, and older ones be trimmed; what
// was trimmed is left out, as at the start.
func (s *Store) Commits(ctx context.Context, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		d, err := parseDevice(dev)
		if err != nil {
			yield(hub.Commit{}, err)
			return
		}
		to := after(devicePrefix(prefixCommit, d))
		next := commitKey(nil, d, from)
		for {
			var page []hub.Commit
			bytes, full := 0, false
			err := s.read(ctx, "Commits", func(v *view) error {
				return each(v.snap, next, to, func(key, value []byte) (bool, error) {
					seq, ok := seqOf(key)
					if !ok {
						return false, fmt.Errorf("a commit key of device %s is damaged", dev)
					}
					c, err := decodeCommit(d, seq, value)
					if err != nil {
						return false, err
					}
					page = append(page, c)
					next = commitKey(next[:0], d, seq+1)
					bytes += len(value)
					full = len(page) == pageItems || bytes >= pageBytes
					return !full, nil
				})
			})
			for _, c := range page {
				if !yield(c, nil) {
					return
				}
			}
			if err != nil {
				yield(hub.Commit{}, err)
				return
			}
			if !full {
				return
			}
		}
	}
}

// SeqAt finds the newest commit at or before t in the device's log itself: its seqs have no holes and its times never go
// back, so no index of times has to be written, trimmed and verified. It goes back from the newest in strides that double, and
// halves what is left once that is shorter: what is near the end, as it mostly is, costs the same however long the log is.
func (s *Store) SeqAt(ctx context.Context, dev hub.DeviceID, t time.Time) (uint64, error) {
	d, err := parseDevice(dev)
	if err != nil {
		return 0, err
	}
	at := t.UnixNano()
	var found uint64
	err = s.read(ctx, "SeqAt", func(v *view) error {
		lo, hi, err := ends(v.snap, d)
		if err != nil || hi == 0 {
			return err
		}
		stride := uint64(0)
		for lo <= hi { // commits before lo are at or before t, those after hi are later
			mid := lo + (hi-lo)/2
			if stride <= hi-mid {
				mid = hi - stride
				stride = 2*stride + 1
			}
			when, err := get(v.snap, commitKey(nil, d, mid), func(v []byte) (*int64, error) {
				when, err := store.CommitTime(v)
				return &when, err
			})
			if err != nil {
				return err
			}
			if when == nil {
				return fmt.Errorf("commit %s/%d is missing", dev, mid)
			}
			if *when <= at {
				found, lo = mid, mid+1
			} else {
				hi = mid - 1
			}
		}
		return nil
	})
	return found, err
}

// Devices walks all devices by jumping from one to the next, so that it costs by devices and not by commits.
func (s *Store) Devices(ctx context.Context, last hub.DeviceID) iter.Seq2[hub.DeviceID, error] {
	return func(yield func(hub.DeviceID, error) bool) {
		from := device{}
		any := last == ""
		if !any {
			var err error
			if from, err = parseDevice(last); err != nil {
				yield("", err)
				return
			}
		}
		for {
			var page []device
			err := s.read(ctx, "Devices", func(v *view) error {
				var err error
				page, err = devicePage(v.snap, from, any)
				return err
			})
			if err != nil {
				yield("", err)
				return
			}
			for _, d := range page {
				if !yield(d.id(), nil) {
					return
				}
			}
			if len(page) < pageItems {
				return
			}
			from, any = page[len(page)-1], false
		}
	}
}

// devicePage returns up to pageItems devices later than from, or from the first on.
func devicePage(r pebble.Reader, from device, first bool) ([]device, error) {
	var its [2]*pebble.Iterator
	var here [2][]byte
	var err error
	defer func() {
		for _, it := range its {
			if it != nil {
				_ = it.Close() // the iterator's error was asked for below
			}
		}
	}()
	for i, prefix := range [...]byte{prefixCommit, prefixState} {
		if its[i], err = r.NewIter(&pebble.IterOptions{LowerBound: []byte{prefix}, UpperBound: []byte{prefix + 1}}); err != nil {
			return nil, err
		}
	}
	seek := func(i int, d device, first bool) error {
		key := devicePrefix([...]byte{prefixCommit, prefixState}[i], d)
		here[i] = nil
		if !first {
			if key = after(key); key == nil {
				return nil
			}
		}
		if its[i].SeekGE(key) {
			here[i] = its[i].Key()
		}
		return its[i].Error()
	}
	for i := range its {
		if err := seek(i, from, first); err != nil {
			return nil, err
		}
	}
	var page []device
	for len(page) < pageItems {
		var least *device
		for i := range here {
			if here[i] == nil {
				continue
			}
			d, ok := deviceOf(here[i])
			if !ok {
				return nil, errors.New("a device's key is damaged")
			}
			if least == nil || bytes.Compare(d[:], least[:]) < 0 {
				least = &d
			}
		}
		if least == nil {
			break
		}
		page = append(page, *least)
		for i := range here {
			if here[i] == nil {
				continue
			}
			if d, _ := deviceOf(here[i]); d == *least {
				if err := seek(i, *least, false); err != nil {
					return nil, err
				}
			}
		}
	}
	return page, nil
}
