package pebblestore

import (
	"context"
	"fmt"
	"slices"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Problem is something in a store that must not be.
type Problem struct {
	Where string // the record: "commit <device>/7", "feed 20417/12", "document owners/alice"
	What  string // one sentence
}

// Verify reads the whole store and reports every broken invariant: seqs without holes and times that do not go back, feed
// positions that count on and refer to commits in each device's order, state documents not newer than their device's log,
// and documents and secondary keys that belong together. An error means that it could not be read to the end (or ctx
// ended), not that there are problems. It holds a few dozen bytes for each device, and old versions in the database for as
// long as it runs: on a running hub, verify a Checkpoint.
func (s *Store) Verify(ctx context.Context, report func(Problem)) error {
	return s.read(ctx, "Verify", func(v *view) error {
		c := checker{ctx: ctx, v: v, report: report, logs: make(map[device]*logEnds)}
		for _, part := range []func() error{c.commits, c.states, c.feed, c.documents, c.indexes} {
			if err := part(); err != nil {
				return err
			}
		}
		return nil
	})
}

type checker struct {
	ctx    context.Context
	v      *view
	report func(Problem)
	logs   map[device]*logEnds
}

// logEnds is what is known of a device: the ends of its log, and of what the feed has of it.
type logEnds struct{ first, last, feedFirst, feedLast uint64 }

func (c *checker) problem(where, what string, args ...any) {
	c.report(Problem{Where: where, What: fmt.Sprintf(what, args...)})
}

// each walks all keys with a first byte.
func (c *checker) each(prefix byte, f func(key, value []byte) error) error {
	n := 0
	return each(c.v.snap, []byte{prefix}, []byte{prefix + 1}, func(key, value []byte) (bool, error) {
		if n++; n%1024 == 0 && c.ctx.Err() != nil {
			return false, c.ctx.Err()
		}
		return true, f(key, value)
	})
}

func (c *checker) commits() error {
	var dev device
	var log *logEnds
	var when int64
	return c.each(prefixCommit, func(key, value []byte) error {
		seq, ok := seqOf(key)
		if !ok {
			c.problem(fmt.Sprintf("key %x", key), "a commit's key has the wrong length")
			return nil
		}
		d, _ := deviceOf(key)
		where := fmt.Sprintf("commit %s/%d", d.id(), seq)
		commit, err := decodeCommit(d, seq, value)
		if err != nil {
			c.problem(where, "it cannot be decoded")
		} else if err := store.CheckCommit(&commit, len(value)); err != nil {
			c.problem(where, "it breaks the limits: %v", err)
		}
		switch {
		case log == nil || d != dev:
			dev, log = d, &logEnds{first: seq}
			c.logs[d] = log
		case seq != log.last+1:
			c.problem(where, "the commit before it is %d", log.last)
		case err == nil && commit.Time < when:
			c.problem(where, "its time is before that of the commit before it")
		}
		log.last, when = seq, commit.Time
		return nil
	})
}

func (c *checker) states() error {
	return c.each(prefixState, func(key, value []byte) error {
		d, ok := deviceOf(key)
		if !ok || len(key) == 17 || len(value) < 8 {
			c.problem(fmt.Sprintf("key %x", key), "a state document is damaged")
			return nil
		}
		seq := uint64(0)
		for _, b := range value[:8] {
			seq = seq<<8 | uint64(b)
		}
		last := uint64(0)
		if log := c.logs[d]; log != nil {
			last = log.last
		}
		if seq > last {
			c.problem(fmt.Sprintf("state %s/%s", d.id(), key[17:]), "its seq %d is beyond the log's last, %d", seq, last)
		}
		return nil
	})
}

func (c *checker) feed() error {
	st := c.v.state
	before := st.trimmed
	err := c.each(prefixFeed, func(key, value []byte) error {
		pos, ok := positionOf(key)
		d, seq, ok2 := parseRef(value)
		if !ok || !ok2 {
			c.problem(fmt.Sprintf("key %x", key), "a feed record is damaged")
			return nil
		}
		where := fmt.Sprintf("feed %d/%d", pos.Day, pos.N)
		if pos.N != before.N+1 || pos.Day < before.Day {
			c.problem(where, "the position before it is %d/%d", before.Day, before.N)
		}
		before = pos
		log := c.logs[d]
		if log == nil {
			c.problem(where, "it refers to commit %s/%d, but the device has no log", d.id(), seq)
			return nil
		}
		switch {
		case seq > log.last:
			c.problem(where, "it refers to commit %s/%d, which does not exist", d.id(), seq)
		case log.feedLast == 0 && st.trimmed == (hub.Position{}) && seq != 1:
			c.problem(where, "the feed begins with commit %s/%d, though nothing was trimmed", d.id(), seq)
		case log.feedLast != 0 && seq != log.feedLast+1:
			c.problem(where, "it refers to commit %s/%d after %d", d.id(), seq, log.feedLast)
		}
		if log.feedFirst == 0 {
			log.feedFirst = seq
		}
		log.feedLast = seq
		return nil
	})
	if err != nil {
		return err
	}
	if before != st.head {
		c.problem("feed", "its last position is %d/%d, the store's head %d/%d", before.Day, before.N, st.head.Day, st.head.N)
	}
	for d, log := range c.logs {
		if log.feedLast != log.last && (log.feedLast != 0 || st.trimmed == (hub.Position{})) {
			c.problem(fmt.Sprintf("commit %s/%d", d.id(), log.last), "the feed ends with the device's commit %d", log.feedLast)
		}
	}
	return nil
}

func (c *checker) documents() error {
	return c.each(prefixDoc, func(key, value []byte) error {
		collection, name, ok := splitCollection(key)
		if !ok {
			c.problem(fmt.Sprintf("key %x", key), "a document's key is damaged")
			return nil
		}
		where := fmt.Sprintf("document %s/%s", collection, name)
		h, _, err := decodeDocHead(value)
		if err != nil {
			c.problem(where, "it cannot be decoded")
			return nil
		}
		if h.rev == 0 || h.rev > c.v.state.rev {
			c.problem(where, "its revision %d was never given, the last is %d", h.rev, c.v.state.rev)
		}
		for _, ix := range h.index {
			found, err := get(c.v.snap, indexKey(collection, ix, name), func([]byte) (bool, error) { return true, nil })
			if err != nil {
				return err
			}
			if !found {
				c.problem(where, "its secondary key %q is not in the index", ix)
			}
		}
		return nil
	})
}

func (c *checker) indexes() error {
	return c.each(prefixIndex, func(key, _ []byte) error {
		collection, rest, ok := splitCollection(key)
		size := 0
		if ok && len(rest) >= 2 {
			size = int(rest[0])<<8 | int(rest[1])
		}
		if !ok || len(rest) < 2+size+1 {
			c.problem(fmt.Sprintf("key %x", key), "a secondary key is damaged")
			return nil
		}
		ix, name := rest[2:2+size], rest[2+size:]
		h, err := get(c.v.snap, docKey(collection, name), func(v []byte) (docHead, error) {
			h, _, err := decodeDocHead(v)
			if err != nil {
				return docHead{}, nil // reported with the document
			}
			return h, nil
		})
		if err != nil {
			return err
		}
		if !slices.Contains(h.index, ix) {
			c.problem(fmt.Sprintf("index %s/%s", collection, ix), "it names document %q, which does not carry it", name)
		}
		return nil
	})
}

// splitCollection takes the collection's name off a document's or secondary key's key.
func splitCollection(key []byte) (collection, rest string, ok bool) {
	if len(key) < 2 || len(key) < 2+int(key[1])+1 {
		return "", "", false
	}
	n := 2 + int(key[1])
	return string(key[2:n]), string(key[n:]), true
}
