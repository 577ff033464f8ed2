package pebblestore

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/cockroachdb/pebble/v2"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Head returns the position of the newest readable commit.
func (s *Store) Head(ctx context.Context) (hub.Position, error) {
	var head hub.Position
	err := s.read(ctx, "Head", func(v *view) error {
		head = v.state.head
		return nil
	})
	return head, err
}

// maxFeedPage bounds what one ReadFeed returns, whatever the limit.
const (
	maxFeedPage  = 4096
	maxFeedBytes = 4 << 20
)

// recent is a commit of the newest, as it was given to Append, and the size of its encoding.
type recent struct {
	store.FeedEntry
	size int
}

// recentBytes bounds the commits that are remembered, and so their number.
const recentBytes = 512 << 10

// remember keeps the newest commits: most readers are at the feed's head, and reading back and decoding what has just been
// written cost a tenth of a notification. before is the head that fresh follow. mu is held.
func (s *Store) remember(before hub.Position, fresh []recent) {
	if len(s.recent) == 0 {
		s.before = before
	}
	s.recent = append(s.recent, fresh...)
	for i := range fresh {
		s.bytes += fresh[i].size
	}
	if s.bytes <= s.remembers+s.remembers/2 {
		return // dropping moves the rest, so it is done seldom
	}
	drop := 0
	for drop < len(s.recent) && s.bytes > s.remembers {
		s.bytes -= s.recent[drop].size
		s.before = s.recent[drop].Position
		drop++
	}
	s.recent = slices.Delete(s.recent, 0, drop) // it clears what it leaves behind
}

// remembered returns what follows the position, and false if that is not remembered.
func (s *Store) remembered(from hub.Position, limit int) (entries []store.FeedEntry, ok bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.view == nil || from.Compare(s.before) < 0 || from.Compare(s.view.state.head) >= 0 || from.Compare(s.view.state.trimmed) < 0 {
		return nil, false
	}
	i, _ := slices.BinarySearchFunc(s.recent, from, func(r recent, at hub.Position) int { // the first behind from
		if r.Position.Compare(at) <= 0 {
			return -1
		}
		return 1
	})
	for _, r := range s.recent[i:min(i+limit, len(s.recent))] {
		entries = append(entries, r.FeedEntry)
	}
	return entries, len(entries) > 0
}

// ReadFeed reads on from a position; store.Feed has the contract. It may return fewer commits than there are.
func (s *Store) ReadFeed(ctx context.Context, from hub.Position, limit int) (entries []store.FeedEntry, next hub.Position, lagged bool, err error) {
	limit = min(limit, maxFeedPage)
	next = from
	if limit <= 0 {
		return nil, next, false, nil
	}
	if entries, ok := s.remembered(from, limit); ok && ctx.Err() == nil && s.failure.Load() == nil {
		return entries, entries[len(entries)-1].Position, false, nil
	}
	err = s.read(ctx, "ReadFeed", func(v *view) error {
		if from.Compare(v.state.trimmed) < 0 {
			lagged = true
			return nil
		}
		if from.Compare(v.state.head) >= 0 {
			return nil
		}
		size := 0
		start := feedKey(nil, hub.Position{Day: from.Day, N: from.N + 1})
		key := make([]byte, 0, 25)
		return each(v.snap, start, []byte{prefixFeed + 1}, func(k, ref []byte) (bool, error) {
			pos, ok := positionOf(k)
			d, seq, ok2 := parseRef(ref)
			if !ok || !ok2 {
				return false, errors.New("a feed record is damaged")
			}
			value, closer, err := v.snap.Get(commitKey(key, d, seq))
			if errors.Is(err, pebble.ErrNotFound) {
				// The device's log was trimmed beyond the feed. Everything before this place is still given; who asks again
				// from here has lagged.
				lagged = len(entries) == 0
				return false, nil
			}
			if err != nil {
				return false, err
			}
			c, err := decodeCommit(d, seq, value)
			size += len(value)
			if err := errors.Join(err, closer.Close()); err != nil {
				return false, err
			}
			entries = append(entries, store.FeedEntry{Position: pos, Commit: c})
			next = pos
			return len(entries) < limit && size < maxFeedBytes, nil
		})
	})
	if err != nil {
		return nil, from, false, err
	}
	return entries, next, lagged, nil
}

// WaitFeed blocks until there is a commit after the position, the context ends, or the store closes or fails.
func (s *Store) WaitFeed(ctx context.Context, from hub.Position) error {
	for {
		s.mu.Lock()
		if s.view == nil {
			s.mu.Unlock()
			return errClosed
		}
		if from.Compare(s.view.state.head) < 0 {
			s.mu.Unlock()
			return nil
		}
		if s.moved == nil {
			s.moved = make(chan struct{})
		}
		moved := s.moved
		s.mu.Unlock()
		select {
		case <-moved:
		case <-s.failed:
			return s.broken()
		case <-ctx.Done():
			return fmt.Errorf("wait for the feed: %w", ctx.Err())
		}
	}
}

// TrimFeed removes all positions of days before the given one, with one range deletion.
func (s *Store) TrimFeed(ctx context.Context, beforeDay uint32) error {
	return s.submit(ctx, "TrimFeed", &request{frees: true, alone: true, build: func(g *group) error {
		end := feedKey(nil, hub.Position{Day: beforeDay})
		it, err := g.s.db.NewIter(&pebble.IterOptions{LowerBound: []byte{prefixFeed}, UpperBound: end})
		if err != nil {
			return err
		}
		found, good := it.Last(), true
		var newest hub.Position
		if found {
			newest, good = positionOf(it.Key())
		}
		if err := it.Close(); err != nil {
			return err
		}
		if !good {
			return errors.New("a feed record is damaged")
		}
		if !found {
			return nil
		}
		if err := g.batch.DeleteRange([]byte{prefixFeed}, end, nil); err != nil {
			return err
		}
		g.state.trimmed = newest
		return nil
	}})
}
