package resourcedirectory

import (
	"context"
	"errors"
	"iter"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	// tailCommits and tailBytes bound, but for a quarter more, the newest piece of the feed that readers share. Who falls behind
	// it reads the store.
	tailCommits = 4096
	tailBytes   = 8 << 20
	// leadCommits is how many commits are read for all at a time.
	leadCommits = 1024
	// pageCommits and pageBytes bound what one reader holds while its caller is slow; a single commit may be larger.
	pageCommits = 64
	pageBytes   = 256 << 10
	// pageLook bounds how far one look into the tail goes, so that a reader whose commits are rare does not keep the others
	// from it.
	pageLook = 1024
)

var errLagged = hub.NewError(hub.Precondition, "feed-lagged", "what came next is no longer kept; the current state follows")

// tail is the newest piece of the feed, read and decoded once for all readers. There is no goroutine that reads it: whoever
// arrives at its end and finds nobody waiting for the store does that for all (see lead). A reader's only claim on it is a
// position, so one that stalls costs nobody anything.
type tail struct {
	most    int        // commits, but for a quarter more
	mu      sync.Mutex // guards all below
	readers int
	known   bool // false: nobody has led since the last reader left
	entries []tailed
	bytes   int
	// The entries are all commits after base up to end.
	base, end hub.Position
	leading   bool
	moved     chan struct{} // closed when end moved, or the leader left
}

type tailed struct {
	hub.Fed
	size int
}

// Reader reads the feed for all who ask in a process. It is part of a Directory, and of its Client where that runs elsewhere. Its methods
// may be called from any goroutine.
type Reader struct {
	from     store.Feed
	tail     tail
	readers  prometheus.Gauge
	caughtUp prometheus.Counter
}

// NewReader makes a reader of a feed.
func NewReader(from store.Feed, reg prometheus.Registerer) (*Reader, error) {
	r := &Reader{
		from: from, tail: tail{most: tailCommits},
		readers: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: ns, Subsystem: sub, Name: "feed_readers", Help: "Subscriptions that follow the feed.",
		}),
		caughtUp: prometheus.NewCounter(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "feed_caught_up_commits_total", Help: "Commits that readers of the feed read from the store, " +
				"because they came back or were slow. When it rises all the time, subscribers are too slow for what they subscribe to.",
		}),
	}
	return r, errors.Join(reg.Register(r.readers), reg.Register(r.caughtUp))
}

// FeedHead is the place behind everything that can be read now.
func (r *Reader) FeedHead(ctx context.Context) (hub.Cursor, error) {
	head, err := r.from.Head(ctx)
	if err != nil {
		return hub.Cursor{}, wrap("directory.FeedHead", err)
	}
	return hub.Cursor{Log: r.from.LogID(), After: head}, nil
}

// Feed yields the commits behind the cursor that carry owner's stamp, in the order of the feed: those up to the position to,
// which a head of the log was, or, if that is zero, all, and those that come, until ctx ends. An error is the last element: of
// kind Precondition with code feed-lagged if commits behind the place it stands at were trimmed away, or the cursor is of
// another log. How slow its caller is concerns nobody else.
func (r *Reader) Feed(ctx context.Context, owner hub.Owner, from hub.Cursor, to hub.Position) iter.Seq2[hub.Fed, error] {
	return func(yield func(hub.Fed, error) bool) {
		fail := func(err error) { yield(hub.Fed{}, wrap("directory.Feed", err)) }
		head, err := r.from.Head(ctx)
		if err != nil {
			fail(err)
			return
		}
		if from.Log != r.from.LogID() || from.After.Compare(head) > 0 {
			fail(errLagged)
			return
		}
		one := &feedReader{of: r, owner: owner, at: from.After, to: to, skipAfter: from.After, skip: int(from.Skip), limit: 16}
		r.tail.enter(1)
		r.readers.Inc()
		defer r.readers.Dec()
		defer r.tail.enter(-1)
		for !one.over() {
			page, err := one.next(ctx)
			if err != nil {
				fail(err)
				return
			}
			for _, f := range page {
				if to != (hub.Position{}) && f.At.Compare(to) > 0 {
					return
				}
				if f.Before == one.skipAfter {
					f.Skip = one.skip
				}
				if f.Skip < len(f.Commit.Events) && !yield(f, nil) {
					return
				}
			}
		}
	}
}

func (t *tail) enter(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.readers += n; t.readers == 0 {
		// What nobody reads is not kept: whoever comes next should not have to read everything since.
		t.known, t.entries, t.bytes = false, nil, 0
	}
}

// feedReader is one reader of the feed.
type feedReader struct {
	of        *Reader
	owner     hub.Owner
	at        hub.Position // everything up to here was given
	to        hub.Position // where it ends; zero: nowhere
	skipAfter hub.Position // of the commit behind it, skip events were given before
	skip      int
	limit     int // commits of the next page from the store
}

// over reports whether there is nothing more to give.
func (r *feedReader) over() bool { return r.to != hub.Position{} && r.at.Compare(r.to) >= 0 }

// next returns the reader's next commits, perhaps none at its end; it blocks while there are no new ones of anybody.
func (r *feedReader) next(ctx context.Context) ([]hub.Fed, error) {
	t := &r.of.tail
	for {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		t.mu.Lock()
		if t.known && r.at.Compare(t.base) >= 0 && r.at.Compare(t.end) < 0 {
			page := r.look(t)
			t.mu.Unlock()
			if len(page) > 0 || r.over() {
				return page, nil
			}
			continue
		}
		if t.known && r.at.Compare(t.end) >= 0 {
			// The live edge. A reader beyond it has been told a newer head and waits until the tail is there, or leads from there.
			if !t.leading {
				t.leading = true
				if r.at.Compare(t.end) > 0 {
					t.entries, t.bytes, t.base, t.end = nil, 0, r.at, r.at
				}
				from := t.end
				t.mu.Unlock()
				if err := r.of.lead(ctx, from); err != nil {
					return nil, err
				}
				continue
			}
			if t.moved == nil {
				t.moved = make(chan struct{})
			}
			moved := t.moved
			t.mu.Unlock()
			select {
			case <-moved:
			case <-ctx.Done():
			}
			continue
		}
		t.mu.Unlock()
		page, more, err := r.catchUp(ctx)
		if err != nil || len(page) > 0 || r.over() {
			return page, err
		}
		if !more {
			t.mu.Lock()
			if !t.known {
				t.known, t.base, t.end = true, r.at, r.at
			}
			t.mu.Unlock()
		}
	}
}

// look takes the reader's commits out of the tail; mu is held. It copies, so that a reader that stalls keeps its own page
// from being freed and nothing else.
func (r *feedReader) look(t *tail) []hub.Fed {
	i, _ := slices.BinarySearchFunc(t.entries, r.at, func(e tailed, at hub.Position) int { // the first behind at
		if e.At.Compare(at) <= 0 {
			return -1
		}
		return 1
	})
	var page []hub.Fed
	size := 0
	for n := 0; i < len(t.entries) && n < pageLook && len(page) < pageCommits && size < pageBytes; i, n = i+1, n+1 {
		e := &t.entries[i]
		if e.Commit.Owner == r.owner {
			page = append(page, e.Fed)
			size += e.size
		}
		r.at = e.At
	}
	return page
}

// catchUp reads a page from the store. more is false at the feed's end.
func (r *feedReader) catchUp(ctx context.Context) (page []hub.Fed, more bool, err error) {
	entries, next, lagged, err := r.of.from.ReadFeed(ctx, r.at, r.limit)
	switch {
	case err != nil:
		return nil, false, err
	case lagged:
		return nil, false, errLagged
	case len(entries) == 0:
		return nil, false, nil
	}
	size, before := 0, r.at
	for i := range entries {
		e := &entries[i]
		s := commitSize(&e.Commit)
		if i > 0 && size+s > pageBytes {
			entries, next = entries[:i], before // these are larger than those before were; they are read again
			break
		}
		size += s
		if e.Commit.Owner == r.owner {
			c := e.Commit
			page = append(page, hub.Fed{Before: before, At: e.Position, Commit: &c})
		}
		before = e.Position
	}
	r.at = next
	r.of.caughtUp.Add(float64(len(entries)))
	// As many as fit the page, going by those that were read just now.
	r.limit = max(1, min(pageCommits, pageBytes*len(entries)/max(size, 1)))
	return page, true, nil
}

// lead waits for what comes after from and puts it into the tail, for all readers. The leader's own end, or its trouble, is
// not that of the others: one of them leads next.
func (r *Reader) lead(ctx context.Context, from hub.Position) error {
	var (
		entries []store.FeedEntry
		lagged  bool
	)
	err := r.from.WaitFeed(ctx, from)
	if err == nil {
		entries, _, lagged, err = r.from.ReadFeed(ctx, from, leadCommits)
	}
	t := &r.tail
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leading = false
	if t.moved != nil {
		close(t.moved)
		t.moved = nil
	}
	if err != nil {
		return err
	}
	if lagged {
		t.known, t.entries, t.bytes = false, nil, 0 // each reader finds out by itself
		return nil
	}
	for i := range entries {
		c := entries[i].Commit
		size := commitSize(&c)
		t.entries = append(t.entries, tailed{hub.Fed{Before: t.end, At: entries[i].Position, Commit: &c}, size})
		t.end, t.bytes = entries[i].Position, t.bytes+size
	}
	if len(t.entries) <= t.most+t.most/4 && t.bytes <= tailBytes+tailBytes/4 {
		return nil // dropping moves the rest, so it is done seldom
	}
	drop := 0
	for len(t.entries)-drop > t.most || t.bytes > tailBytes {
		t.bytes -= t.entries[drop].size
		t.base = t.entries[drop].At
		drop++
	}
	t.entries = slices.Delete(t.entries, 0, drop) // it clears what it leaves behind
	return nil
}

func commitSize(c *hub.Commit) int {
	n := 0
	for i := range c.Events {
		n += eventSize(&c.Events[i])
	}
	return n
}

// State yields pictures like Devices, each with all commits in it that FeedHead was behind when State was called: with the
// feed from that head on, less the commits up to each picture's Seq, a reader has everything once.
func (d *Directory) State(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return func(yield func(*hub.Device, error) bool) {
		for _, id := range ids {
			s, err := d.readAll(ctx, id)
			if err != nil {
				yield(nil, wrap("directory.State", err))
				return
			}
			if s.owner == owner && owner != "" && !yield(s.picture(), nil) {
				return
			}
		}
	}
}

// readAll is read, but never behind the store: a commit is readable there a moment before the worker that wrote it publishes
// the state with it.
func (d *Directory) readAll(ctx context.Context, dev hub.DeviceID) (*state, error) {
	s, err := d.read(ctx, dev)
	if err != nil {
		return nil, err
	}
	last, err := d.store.SeqAt(ctx, dev, time.Unix(0, math.MaxInt64))
	if err != nil || s.seq >= last {
		return s, err
	}
	return d.codec.load(ctx, d.store, dev)
}
