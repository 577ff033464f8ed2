package storetest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// A source is a feed, and how it gets commits: by the store that it is part of, or by being told.
type source struct {
	store.Feed
	add func(ctx context.Context, commits ...hub.Commit) []error
}

var feedTests = map[string]func(*testing.T, source){
	"FeedStartsEmpty":         feedStartsEmpty,
	"FeedInPages":             feedInPages,
	"FeedNeverSkips":          feedNeverSkips,
	"WaitFeedWaits":           waitFeedWaits,
	"TrimFeedMakesCursorsLag": trimFeedMakesCursorsLag,
}

// storeFeedTests are of feeds that are part of a store.
var storeFeedTests = map[string]func(*testing.T, store.Store){
	"TrimFeedKeepsTheLog":          trimFeedKeepsTheLog,
	"FeedBehindATrimmedLogHasLost": feedBehindATrimmedLogHasLost,
}

func runFeed(t *testing.T, open func(t *testing.T) source) {
	for name, test := range feedTests {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
	t.Run("LogIDNamesTheLog", func(t *testing.T) {
		a, b := open(t), open(t)
		first := a.LogID()
		if first == "" || first == b.LogID() || a.LogID() != first {
			t.Errorf("log IDs are %q, then %q, and %q for another log", first, a.LogID(), b.LogID())
		}
	})
}

// sourceOf makes a source of a store.
func sourceOf(s store.Store) source {
	return source{s, func(ctx context.Context, commits ...hub.Commit) []error {
		entries := make([]store.Entry, len(commits))
		for i := range commits {
			entries[i].Commit = commits[i]
		}
		return s.Append(ctx, entries)
	}}
}

// fill adds commits first to last of a device, one call each, and fails the test when one is refused.
func (s source) fill(t *testing.T, dev hub.DeviceID, first, last uint64) {
	t.Helper()
	for seq := first; seq <= last; seq++ {
		if err := s.add(t.Context(), Commit(dev, seq))[0]; err != nil {
			t.Fatalf("add %s/%d: %v", dev, seq, err)
		}
	}
}

func feedStartsEmpty(t *testing.T, s source) {
	ctx := deadline(t)
	if head, err := s.Head(ctx); err != nil || head != (hub.Position{}) {
		t.Errorf("head of an empty feed is %v, %v", head, err)
	}
	entries, next, lagged, err := s.ReadFeed(ctx, hub.Position{}, 10)
	if err != nil || lagged || len(entries) != 0 || next != (hub.Position{}) {
		t.Errorf("an empty feed gives %v, %v, %v, %v", entries, next, lagged, err)
	}
	day := uint32(time.Now().Unix() / 86400)
	s.fill(t, Device(1), 1, 1)
	head, err := s.Head(ctx)
	if err != nil || head.Day < day || head.Day > day+1 || head.Compare(hub.Position{}) <= 0 {
		t.Errorf("head is %v, %v, today is %d", head, err, day)
	}
	if err := s.TrimFeed(ctx, day); err != nil {
		t.Fatal(err)
	}
	if _, _, lagged, err := s.ReadFeed(ctx, hub.Position{}, 10); lagged || err != nil {
		t.Errorf("trimming nothing made a cursor lag: %v, %v", lagged, err)
	}
}

func feedInPages(t *testing.T, s source) {
	ctx := deadline(t)
	const devices, each = 5, 40
	for seq := uint64(1); seq <= each; seq++ {
		var commits []hub.Commit
		for n := range devices {
			commits = append(commits, Commit(Device(n), seq))
		}
		if err := errors.Join(s.add(ctx, commits...)...); err != nil {
			t.Fatal(err)
		}
	}
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, limit := range []int{1, 7, 64, 1 << 20} {
		var at hub.Position
		last := map[hub.DeviceID]uint64{}
		total := 0
		for {
			entries, next, lagged, err := s.ReadFeed(ctx, at, limit)
			if err != nil || lagged || len(entries) > limit {
				t.Fatalf("limit %d: %d entries, lagged %v, %v", limit, len(entries), lagged, err)
			}
			if len(entries) == 0 {
				if next != at {
					t.Errorf("at the head the cursor moved from %v to %v", at, next)
				}
				break
			}
			for _, e := range entries {
				if e.Position.Compare(at) <= 0 {
					t.Fatalf("position %v after %v", e.Position, at)
				}
				at = e.Position
				SameCommit(t, e.Commit, Commit(e.Commit.Device, last[e.Commit.Device]+1))
				last[e.Commit.Device]++
				total++
			}
			if next.Compare(at) < 0 {
				t.Fatalf("next is %v, the last entry was at %v", next, at)
			}
			at = next
		}
		if total != devices*each || at.Compare(head) < 0 {
			t.Errorf("limit %d: %d commits up to %v, head is %v", limit, total, at, head)
		}
	}
	// Reading from any position gives what follows it.
	all, _, _, err := s.ReadFeed(ctx, hub.Position{}, devices*each)
	if err != nil || len(all) != devices*each {
		t.Fatal(len(all), err)
	}
	for i := 0; i < len(all)-1; i += 17 {
		rest, _, _, err := s.ReadFeed(ctx, all[i].Position, 1)
		if err != nil || len(rest) != 1 || rest[0].Position != all[i+1].Position {
			t.Errorf("after %v comes %v, %v, want %v", all[i].Position, rest, err, all[i+1].Position)
		}
	}
	if none, _, _, err := s.ReadFeed(ctx, hub.Position{}, 0); err != nil || len(none) != 0 {
		t.Errorf("limit 0 gives %d commits, %v", len(none), err)
	}
}

func feedNeverSkips(t *testing.T, s source) {
	ctx := deadline(t)
	const writers, each, readers = 64, 30, 3
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for seq := uint64(1); seq <= each; seq++ {
				if err := s.add(ctx, Commit(Device(w), seq))[0]; err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for r := range readers {
		wg.Go(func() {
			var at hub.Position
			last := map[hub.DeviceID]uint64{}
			for total := 0; total < writers*each; {
				if err := s.WaitFeed(ctx, at); err != nil {
					t.Errorf("reader %d after %d commits: %v", r, total, err)
					return
				}
				entries, next, lagged, err := s.ReadFeed(ctx, at, 10+50*r)
				if err != nil || lagged || len(entries) == 0 {
					t.Errorf("reader %d: %d entries, lagged %v, %v", r, len(entries), lagged, err)
					return
				}
				for _, e := range entries {
					if e.Commit.Seq != last[e.Commit.Device]+1 {
						t.Errorf("reader %d: %s/%d after %d", r, e.Commit.Device, e.Commit.Seq, last[e.Commit.Device])
						return
					}
					last[e.Commit.Device]++
					total++
				}
				at = next
			}
		})
	}
	wg.Wait()
}

func waitFeedWaits(t *testing.T, s source) {
	ctx, cancel := context.WithCancel(deadline(t))
	got := make(chan error, 1)
	go func() { got <- s.WaitFeed(ctx, hub.Position{}) }()
	s.fill(t, Device(1), 1, 1)
	if err := <-got; err != nil {
		t.Errorf("waiting from the start: %v", err)
	}
	if err := s.WaitFeed(ctx, hub.Position{}); err != nil {
		t.Errorf("there is a commit already: %v", err)
	}
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	go func() { got <- s.WaitFeed(ctx, head) }()
	select {
	case err := <-got:
		t.Errorf("nothing is after the head, but the wait ended with %v", err)
	case <-time.After(20 * time.Millisecond):
	}
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("after the context's end: %v", err)
	}
}

func trimFeedMakesCursorsLag(t *testing.T, s source) {
	ctx := deadline(t)
	s.fill(t, Device(1), 1, 5)
	all, _, _, err := s.ReadFeed(ctx, hub.Position{}, 10)
	if err != nil || len(all) != 5 {
		t.Fatal(len(all), err)
	}
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.TrimFeed(ctx, head.Day+1); err != nil {
		t.Fatal(err)
	}
	if again, err := s.Head(ctx); err != nil || again != head {
		t.Errorf("trimming moved the head from %v to %v, %v", head, again, err)
	}
	s.fill(t, Device(1), 6, 6)
	for _, at := range []hub.Position{{}, all[0].Position, all[3].Position} {
		entries, _, lagged, err := s.ReadFeed(ctx, at, 10)
		if err != nil || !lagged || len(entries) != 0 {
			t.Errorf("from %v: %d entries, lagged %v, %v", at, len(entries), lagged, err)
		}
	}
	entries, next, lagged, err := s.ReadFeed(ctx, head, 10)
	if err != nil || lagged || len(entries) != 1 || entries[0].Commit.Seq != 6 {
		t.Errorf("from the head: %v, lagged %v, %v", entries, lagged, err)
	}
	if entries, _, lagged, err := s.ReadFeed(ctx, next, 10); err != nil || lagged || len(entries) != 0 {
		t.Errorf("at the new head: %v, lagged %v, %v", entries, lagged, err)
	}
}

func trimFeedKeepsTheLog(t *testing.T, s store.Store) {
	ctx := deadline(t)
	add(t, s, Device(1), 1, 6)
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.TrimFeed(ctx, head.Day+1); err != nil {
		t.Fatal(err)
	}
	if got := must(t, s.Commits(ctx, Device(1), 1)); len(got) != 6 {
		t.Errorf("the device's log has %d commits, want 6: trimming the feed must not touch it", len(got))
	}
}

func feedBehindATrimmedLogHasLost(t *testing.T, s store.Store) {
	ctx := deadline(t)
	add(t, s, Device(2), 1, 1)
	add(t, s, Device(1), 1, 4)
	if err := s.Trim(ctx, Device(1), 4, nil); err != nil {
		t.Fatal(err)
	}
	// What is left is given: all of it, or what stands before the hole and then lagged; never something behind a hole.
	at, seen := hub.Position{}, 0
	for {
		entries, next, lagged, err := s.ReadFeed(ctx, at, 10)
		if err != nil {
			t.Fatal(err)
		}
		if lagged {
			if len(entries) != 0 {
				t.Errorf("lagged, with %d entries", len(entries))
			}
			break
		}
		if len(entries) == 0 {
			if seen != 5 {
				t.Errorf("the feed skipped trimmed commits silently: %d of 5 were given", seen)
			}
			break
		}
		seen += len(entries)
		at = next
	}
}
