package simulation

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// forgets is how long the feed knows a commit again that comes twice, as a stream does for a while.
const forgets = 10 * time.Second

// feed is what all processes publish to and read from.
type feed struct {
	*chance
	drops bool // mutation: says that it has a commit, and has not

	mu    sync.Mutex // guards all below
	all   []store.FeedEntry
	seen  map[[16]byte]time.Time
	moved chan struct{}
	// trouble is out of how many publications one fails or is not acknowledged; 0: none.
	trouble int
	dropped bool
}

func newFeed(c *chance) *feed {
	return &feed{chance: c, seen: map[[16]byte]time.Time{}, moved: make(chan struct{})}
}

// view is the feed as one process has it.
type view struct {
	*feed
	p *path
}

var _ store.PublishedFeed = (*view)(nil)

// Publish implements store.PublishedFeed.
func (v *view) Publish(ctx context.Context, commits []hub.Commit) []error {
	errs := make([]error, len(commits))
	fail := func(from int) []error {
		for i := from; i < len(errs); i++ {
			errs[i] = errAway
		}
		return errs
	}
	commits = slices.Clone(commits)
	if err := v.p.pass(ctx, true); err != nil {
		if v.one(2) { // it is on its way
			go func() {
				if v.p.pass(context.Background(), true) == nil {
					v.add(commits)
				}
			}()
		}
		return fail(0)
	}
	v.p.n.mu.Lock()
	wait := v.p.delay()
	v.p.n.mu.Unlock()
	time.Sleep(wait)
	v.mu.Lock()
	trouble := v.trouble
	v.mu.Unlock()
	if trouble > 0 && v.one(trouble) {
		n := v.pick(len(commits) + 1)
		v.add(commits[:n])
		if v.one(2) {
			n = 0 // and nobody is told
		}
		return fail(n)
	}
	v.add(commits)
	if err := v.p.pass(ctx, false); err != nil {
		return fail(0)
	}
	return errs
}

func (f *feed) add(commits []hub.Commit) {
	f.mu.Lock()
	defer f.mu.Unlock()
	now := time.Now()
	for _, c := range commits {
		if at, is := f.seen[c.ID]; is && now.Sub(at) < forgets {
			continue
		}
		f.seen[c.ID] = now
		if f.drops && !f.dropped && len(f.all) > 10 && f.one(10) {
			f.dropped = true
			continue
		}
		f.all = append(f.all, store.FeedEntry{Position: hub.Position{Day: 10957, N: uint64(len(f.all) + 1)}, Commit: c})
	}
	close(f.moved)
	f.moved = make(chan struct{})
}

// LogID implements store.Feed.
func (f *feed) LogID() string { return "feed" }

// reach waits for an answer.
func (v *view) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, up := range []bool{true, false} {
		if v.p.pass(ctx, up) != nil {
			return errAway
		}
	}
	return nil
}

// Head implements store.Feed.
func (v *view) Head(ctx context.Context) (hub.Position, error) {
	if err := v.reach(ctx); err != nil {
		return hub.Position{}, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.all) == 0 {
		return hub.Position{}, nil
	}
	return v.all[len(v.all)-1].Position, nil
}

// ReadFeed implements store.Feed.
func (v *view) ReadFeed(ctx context.Context, after hub.Position, limit int) ([]store.FeedEntry, hub.Position, bool, error) {
	if err := v.reach(ctx); err != nil {
		return nil, after, false, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	from := int(after.N)
	entries := slices.Clone(v.all[from:min(from+limit, len(v.all))])
	if len(entries) > 0 {
		after = entries[len(entries)-1].Position
	}
	return entries, after, false, nil
}

// WaitFeed implements store.Feed.
func (v *view) WaitFeed(ctx context.Context, after hub.Position) error {
	for {
		v.mu.Lock()
		n, moved := len(v.all), v.moved
		v.mu.Unlock()
		if int(after.N) < n {
			return v.reach(ctx)
		}
		select {
		case <-moved:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Known implements store.PublishedFeed.
func (v *view) Known() hub.Position {
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.all) == 0 {
		return hub.Position{}
	}
	return v.all[len(v.all)-1].Position
}

// Remember implements store.PublishedFeed: this feed is never set back.
func (v *view) Remember(context.Context, hub.Position) error { return nil }

// TrimFeed implements store.Feed; no seed lasts that long.
func (v *view) TrimFeed(context.Context, uint32) error { return nil }
