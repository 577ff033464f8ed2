package storetest

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Feed is store.PublishedFeed in memory, for back ends that are told one. It knows a commit that came before by its ID, as a
// stream does for a while.
type Feed struct {
	// Fail, when set, is asked before each commit is added.
	Fail func(hub.Commit) error

	mu      sync.Mutex // guards what follows
	id      string
	all     []store.FeedEntry
	seen    map[[16]byte]bool
	trimmed hub.Position
	head    hub.Position
	moved   chan struct{} // closed when there is more
}

var _ store.PublishedFeed = (*Feed)(nil)

// NewFeed makes an empty feed.
func NewFeed() *Feed {
	return &Feed{id: rand.Text(), seen: map[[16]byte]bool{}, moved: make(chan struct{})}
}

// Publish implements store.PublishedFeed.
func (f *Feed) Publish(ctx context.Context, commits []hub.Commit) []error {
	f.mu.Lock()
	defer f.mu.Unlock()
	errs := make([]error, len(commits))
	failed := map[hub.DeviceID]error{}
	for i, c := range commits {
		errs[i] = failed[c.Device]
		if errs[i] == nil {
			errs[i] = ctx.Err()
		}
		if errs[i] == nil && f.Fail != nil {
			errs[i] = f.Fail(c)
		}
		if failed[c.Device] = errs[i]; errs[i] != nil || f.seen[c.ID] {
			continue
		}
		f.seen[c.ID] = true
		f.head = hub.Position{Day: max(uint32(time.Now().Unix()/86400), f.head.Day), N: f.head.N + 1}
		f.all = append(f.all, store.FeedEntry{Position: f.head, Commit: c})
	}
	close(f.moved)
	f.moved = make(chan struct{})
	return errs
}

// Known implements store.PublishedFeed.
func (f *Feed) Known() hub.Position {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.head
}

// Remember implements store.PublishedFeed.
func (f *Feed) Remember(_ context.Context, known hub.Position) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if known.Compare(f.head) > 0 {
		f.id, f.all, f.trimmed, f.head = rand.Text(), nil, hub.Position{Day: known.Day, N: known.N + 1}, hub.Position{Day: known.Day, N: known.N + 1}
	}
	return nil
}

// All returns everything that was published and not trimmed.
func (f *Feed) All() []store.FeedEntry {
	f.mu.Lock()
	defer f.mu.Unlock()
	return append([]store.FeedEntry(nil), f.all...)
}

// LogID implements store.Feed.
func (f *Feed) LogID() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.id
}

// Head implements store.Feed.
func (f *Feed) Head(context.Context) (hub.Position, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.head, nil
}

// ReadFeed implements store.Feed.
func (f *Feed) ReadFeed(_ context.Context, after hub.Position, limit int) (entries []store.FeedEntry, next hub.Position, lagged bool, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	next = after
	if limit > 0 && after.Compare(f.trimmed) < 0 {
		return nil, next, true, nil
	}
	for _, e := range f.all {
		if len(entries) >= limit {
			break
		}
		if e.Position.Compare(after) > 0 {
			entries = append(entries, e)
			next = e.Position
		}
	}
	return entries, next, false, nil
}

// WaitFeed implements store.Feed.
func (f *Feed) WaitFeed(ctx context.Context, after hub.Position) error {
	for {
		f.mu.Lock()
		head, moved := f.head, f.moved
		f.mu.Unlock()
		if after.Compare(head) < 0 {
			return nil
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// TrimFeed implements store.Feed.
func (f *Feed) TrimFeed(_ context.Context, beforeDay uint32) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	n := 0
	for n < len(f.all) && f.all[n].Position.Day < beforeDay {
		f.trimmed = f.all[n].Position
		n++
	}
	f.all = f.all[n:]
	return nil
}
