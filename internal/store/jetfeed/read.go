package jetfeed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// What one ReadFeed returns at most, whatever the limit.
const (
	maxPage      = 1024
	maxPageBytes = 4 << 20
)

// entry is a commit of the stream.
type entry struct {
	n      uint64
	commit hub.Commit
	size   int
}

// page is what was read behind a place.
type page struct {
	entries []entry
	lagged  bool
}

// ReadFeed reads on from a position; store.Feed has the contract. It may return fewer commits than there are. The commits are shared
// with other readers. A reader also lags when a message behind its place is no commit that this version can read, and when the
// place is behind the stream's end: then the stream has lost what its reader had.
func (f *Feed) ReadFeed(ctx context.Context, after hub.Position, limit int) (entries []store.FeedEntry, next hub.Position, lagged bool, err error) {
	if limit = min(limit, maxPage); limit <= 0 {
		return nil, after, false, nil
	}
	ctx, leave, err := f.enter(ctx, "ReadFeed")
	if err != nil {
		return nil, after, false, err
	}
	defer leave()
	p, err := again(ctx, f, "ReadFeed", func(ctx context.Context) (page, error) { return f.read(ctx, after, limit) })
	if err != nil || p.lagged || len(p.entries) == 0 {
		return nil, after, p.lagged, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	entries = make([]store.FeedEntry, len(p.entries))
	for i, e := range p.entries {
		entries[i] = store.FeedEntry{Position: f.position(e.n), Commit: e.commit}
	}
	return entries, entries[len(entries)-1].Position, false, nil
}

// place returns the number of a position, and whether what is behind it is gone, as far as is known. mu is held.
func (f *Feed) place(after hub.Position) (n uint64, lagged bool) {
	if after == (hub.Position{}) {
		// Before everything, but only of the stream that Open found: who stands there since then has missed all of that.
		return f.start - 1, f.renewed || f.kept > f.start
	}
	return after.N, after.N+1 < f.kept
}

func (f *Feed) read(ctx context.Context, after hub.Position, limit int) (page, error) {
	f.mu.Lock()
	n, lagged := f.place(after)
	recent, suspect := f.ring.behind(n, limit), f.suspect
	f.mu.Unlock()
	switch {
	case suspect:
		if _, err := f.look(ctx); err != nil {
			return page{}, err
		}
		return f.read(ctx, after, limit)
	case lagged:
		return page{lagged: true}, nil
	case len(recent) > 0:
		return page{entries: recent}, nil
	}
	select {
	case f.reading <- struct{}{}:
		defer func() { <-f.reading }()
	case <-ctx.Done():
		return page{}, ctx.Err()
	}
	entries, broken, err := f.readBack(ctx, n, limit)
	if errors.Is(err, nats.ErrNoResponders) { // the stream is gone, or has no leader at the moment
		_, err2 := f.look(ctx)
		return page{}, errors.Join(err, err2)
	}
	if err != nil {
		return page{}, err
	}
	if len(entries) > 0 && !gap(n, entries) {
		f.metrics.caughtUp.Add(float64(len(entries)))
		return page{entries: entries}, nil
	}
	// Nothing, or not all: the stream says what it still has, after it was read.
	st, err := f.look(ctx)
	if err != nil {
		return page{}, err
	}
	f.mu.Lock()
	n, lagged = f.place(after) // in the stream as it is now
	f.mu.Unlock()
	switch {
	case lagged, n > st.last:
		return page{lagged: true}, nil
	case len(entries) > 0:
		f.metrics.caughtUp.Add(float64(len(entries)))
		return page{entries: whole(n, st.first, entries)}, nil
	case broken:
		return page{lagged: true}, nil
	case n < st.last:
		return page{}, errBehind
	}
	return page{}, nil
}

// errBehind: whoever was asked knows less than the stream's leader. It will be asked again.
var errBehind = errors.New("a server has less of the feed than another")

// gap reports whether numbers are missing in front of an entry: commits that were dropped before they could be read, or a message
// that somebody removed by hand.
func gap(n uint64, entries []entry) bool {
	for _, e := range entries {
		if e.n != n+1 {
			return true
		}
		n = e.n
	}
	return false
}

// whole returns the entries in front of the first gap that reaches below first: what was in the others may have been dropped.
func whole(n, first uint64, entries []entry) []entry {
	for i, e := range entries {
		if e.n != n+1 && n+1 < first {
			return entries[:i]
		}
		n = e.n
	}
	return entries
}

// directGet is how a server is asked for messages in one piece: it answers with one message each, and one at the end.
type directGet struct {
	Seq      uint64 `json:"seq"`
	Batch    int    `json:"batch"`
	MaxBytes int    `json:"max_bytes"`
}

// readBack reads at most limit commits behind number n. broken: the next message is there, but cannot be read.
func (f *Feed) readBack(ctx context.Context, n uint64, limit int) (entries []entry, broken bool, err error) {
	inbox := f.conn.NewInbox()
	sub, err := f.conn.SubscribeSync(inbox)
	if err != nil {
		return nil, false, err
	}
	defer func() { _ = sub.Unsubscribe() }() // of a connection that is closed there is nothing to take back
	ask, err := json.Marshal(directGet{Seq: n + 1, Batch: limit, MaxBytes: maxPageBytes})
	if err != nil {
		return nil, false, err
	}
	if err := f.conn.PublishRequest("$JS.API.DIRECT.GET."+f.name, inbox, ask); err != nil {
		return nil, false, err
	}
	for last := uint64(0); ; {
		m, err := sub.NextMsgWithContext(ctx)
		if err != nil {
			return nil, false, err
		}
		switch status := m.Header.Get("Status"); status {
		case "":
		case "503":
			return nil, false, nats.ErrNoResponders
		case "404": // nothing is behind n
			return nil, false, nil
		case "204":
			if at, err := number(m, "Nats-Last-Sequence"); err != nil || at != last {
				return nil, false, fmt.Errorf("the end of what was read is missing: %w", errors.Join(err, errDamaged))
			}
			return entries, broken, nil
		default:
			return nil, false, fmt.Errorf("the feed is not read: %s %s", status, m.Header.Get("Description"))
		}
		at, err := number(m, "Nats-Sequence")
		before, err2 := number(m, "Nats-Last-Sequence")
		if err := errors.Join(err, err2); err != nil || before != last {
			return nil, false, fmt.Errorf("a piece of what was read is missing: %w", errors.Join(err, errDamaged))
		}
		last = at
		if broken {
			continue
		}
		c, err := decode(m.Data)
		if broken = err != nil; broken {
			f.unreadable(at, err)
			continue
		}
		entries = append(entries, entry{at, c, len(m.Data)})
	}
}

func number(m *nats.Msg, header string) (uint64, error) {
	return strconv.ParseUint(m.Header.Get(header), 10, 64)
}

func (f *Feed) unreadable(n uint64, err error) {
	f.metrics.unreadable.Inc()
	f.log.Error("a message of the feed cannot be read; subscribers start again behind it", "stream", f.name, "number", n, "error", err)
}

// ringBytes bounds the newest commits that are kept for all readers, and ringCommits their number.
const (
	ringBytes   = 4 << 20
	ringCommits = 8192
)

// ring is the newest commits of the stream: all that are behind base, up to end.
type ring struct {
	most      int // bytes
	entries   []entry
	bytes     int
	base, end uint64
	on        bool          // it follows the stream
	moved     chan struct{} // closed when end or on changes; nil while nobody waits
	waiting   int
	idle      *time.Timer        // runs while nobody waits
	rest      context.CancelFunc // ends the following; nil while nobody follows
}

// behind returns at most limit entries behind n, none if they are not there. Its result is not changed later.
func (r *ring) behind(n uint64, limit int) []entry {
	if n < r.base || n >= r.end {
		return nil
	}
	i, _ := slices.BinarySearchFunc(r.entries, n+1, func(e entry, n uint64) int {
		switch {
		case e.n < n:
			return -1
		case e.n > n:
			return 1
		}
		return 0
	})
	return slices.Clone(r.entries[i:min(i+limit, len(r.entries))])
}

func (r *ring) add(e entry) {
	r.entries = append(r.entries, e)
	r.bytes += e.size
	r.end = e.n
	if r.bytes <= r.most+r.most/4 && len(r.entries) <= ringCommits+ringCommits/4 {
		return // dropping moves the rest, so it is done seldom
	}
	drop := 0
	for drop < len(r.entries) && (r.bytes > r.most || len(r.entries)-drop > ringCommits) {
		r.bytes -= r.entries[drop].size
		r.base = r.entries[drop].n
		drop++
	}
	r.entries = slices.Delete(r.entries, 0, drop) // it clears what it leaves behind
}

func (r *ring) wake() {
	if r.moved != nil {
		close(r.moved)
		r.moved = nil
	}
}

// clear empties the ring: what comes next is behind n. mu is held.
func (f *Feed) clear(n uint64) {
	f.ring.entries, f.ring.bytes, f.ring.base, f.ring.end = nil, 0, n, n
	f.ring.wake()
}
