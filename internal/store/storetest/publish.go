package storetest

import (
	"context"
	"errors"
	"sync"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// RunPublished runs the suite of feeds that are told of commits. open gives an empty feed of its own each time it is called, and
// sees to its end.
func RunPublished(t *testing.T, open func(t *testing.T) store.PublishedFeed) {
	runFeed(t, func(t *testing.T) source {
		f := open(t)
		return source{f, func(ctx context.Context, commits ...hub.Commit) []error { return f.Publish(ctx, commits) }}
	})
	for name, test := range publishedTests {
		t.Run(name, func(t *testing.T) { test(t, open(t)) })
	}
}

var publishedTests = map[string]func(*testing.T, store.PublishedFeed){
	"PublishKeepsEveryField":       publishKeepsEveryField,
	"PublishKeepsTheDevicesOrder":  publishKeepsTheDevicesOrder,
	"PublishKnowsWhatCameBefore":   publishKnowsWhatCameBefore,
	"PublishAfterTheContextEnded":  publishAfterTheContextEnded,
	"ManyPublishAndEachOrderHolds": manyPublishAndEachOrderHolds,
	"AReaderReadsItsOwn":           aReaderReadsItsOwn,
	"WaitFeedEndsForTheTrimmed":    waitFeedEndsForTheTrimmed,
	"WhatWasKnownIsRemembered":     whatWasKnownIsRemembered,
}

// everything reads a feed from a position to its end.
func everything(t *testing.T, f store.Feed, at hub.Position) (out []store.FeedEntry) {
	t.Helper()
	for ctx := deadline(t); ; {
		entries, next, lagged, err := f.ReadFeed(ctx, at, 100)
		if err != nil || lagged {
			t.Fatalf("reading from %v: lagged %v, %v", at, lagged, err)
		}
		if len(entries) == 0 {
			return out
		}
		out, at = append(out, entries...), next
	}
}

func publishKeepsEveryField(t *testing.T, f store.PublishedFeed) {
	want := FullCommit(Device(1), 1)
	if err := errors.Join(f.Publish(deadline(t), []hub.Commit{want})...); err != nil {
		t.Fatal(err)
	}
	all := everything(t, f, hub.Position{})
	if len(all) != 1 {
		t.Fatalf("%d commits", len(all))
	}
	SameCommit(t, all[0].Commit, want)
	if errs := f.Publish(deadline(t), nil); len(errs) != 0 {
		t.Errorf("publishing nothing gives %v", errs)
	}
}

func publishKeepsTheDevicesOrder(t *testing.T, f store.PublishedFeed) {
	var commits []hub.Commit
	for seq := uint64(1); seq <= 20; seq++ {
		for n := range 5 {
			if int(seq)%(n+1) == 0 { // so that the devices have more and less
				commits = append(commits, Commit(Device(n), seq/uint64(n+1)))
			}
		}
	}
	errs := f.Publish(deadline(t), commits)
	if err := errors.Join(errs...); err != nil || len(errs) != len(commits) {
		t.Fatalf("%d outcomes for %d commits: %v", len(errs), len(commits), err)
	}
	last := map[hub.DeviceID]uint64{}
	all := everything(t, f, hub.Position{})
	for _, e := range all {
		if e.Commit.Seq != last[e.Commit.Device]+1 {
			t.Errorf("%s/%d after %d", e.Commit.Device, e.Commit.Seq, last[e.Commit.Device])
		}
		last[e.Commit.Device] = e.Commit.Seq
	}
	if len(all) != len(commits) {
		t.Errorf("%d of %d commits", len(all), len(commits))
	}
}

func publishKnowsWhatCameBefore(t *testing.T, f store.PublishedFeed) {
	ctx := deadline(t)
	one, two := Commit(Device(1), 1), Commit(Device(1), 2)
	for _, commits := range [][]hub.Commit{{one}, {one, two}, {two}, {one, two}} {
		if err := errors.Join(f.Publish(ctx, commits)...); err != nil {
			t.Fatal(err)
		}
	}
	if all := everything(t, f, hub.Position{}); len(all) != 2 || all[0].Commit.ID != one.ID || all[1].Commit.ID != two.ID {
		t.Errorf("two commits, published again and again, are %d in the feed", len(all))
	}
}

func publishAfterTheContextEnded(t *testing.T, f store.PublishedFeed) {
	ctx, cancel := context.WithCancel(deadline(t))
	cancel()
	for i, err := range f.Publish(ctx, []hub.Commit{Commit(Device(1), 1), Commit(Device(2), 1)}) {
		if err != nil && !hub.IsKind(err, hub.Unavailable) {
			t.Errorf("commit %d: %v", i, err)
		}
	}
	// Whatever became of them, they can be published again.
	if err := errors.Join(f.Publish(deadline(t), []hub.Commit{Commit(Device(1), 1), Commit(Device(2), 1)})...); err != nil {
		t.Error(err)
	}
	if all := everything(t, f, hub.Position{}); len(all) != 2 {
		t.Errorf("%d commits", len(all))
	}
}

func manyPublishAndEachOrderHolds(t *testing.T, f store.PublishedFeed) {
	ctx := deadline(t)
	const writers, each, batch = 16, 12, 5
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for first := uint64(1); first <= each*batch; first += batch {
				var commits []hub.Commit
				for seq := first; seq < first+batch; seq++ {
					commits = append(commits, Commit(Device(2*w), seq), Commit(Device(2*w+1), seq))
				}
				if err := errors.Join(f.Publish(ctx, commits)...); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	last := map[hub.DeviceID]uint64{}
	all := everything(t, f, hub.Position{})
	for _, e := range all {
		if e.Commit.Seq != last[e.Commit.Device]+1 {
			t.Fatalf("%s/%d after %d", e.Commit.Device, e.Commit.Seq, last[e.Commit.Device])
		}
		last[e.Commit.Device]++
	}
	if len(all) != 2*writers*each*batch {
		t.Errorf("%d of %d commits", len(all), 2*writers*each*batch)
	}
}

// aReaderReadsItsOwn: what was published is there for whoever published it, without waiting, wherever the reader stands.
func aReaderReadsItsOwn(t *testing.T, f store.PublishedFeed) {
	ctx := deadline(t)
	var at hub.Position
	for seq := uint64(1); seq <= 30; seq++ {
		if err := errors.Join(f.Publish(ctx, []hub.Commit{Commit(Device(1), seq)})...); err != nil {
			t.Fatal(err)
		}
		head, err := f.Head(ctx)
		if err != nil || head.Compare(at) <= 0 {
			t.Fatalf("head is %v after %v, %v", head, at, err)
		}
		if seq%3 == 0 {
			if err := f.WaitFeed(ctx, at); err != nil {
				t.Fatal(err)
			}
		}
		entries, next, lagged, err := f.ReadFeed(ctx, at, 10)
		if err != nil || lagged || len(entries) != 1 || entries[0].Commit.Seq != seq || next != head {
			t.Fatalf("after commit %d: %d entries up to %v, head %v, lagged %v, %v", seq, len(entries), next, head, lagged, err)
		}
		at = next
	}
}

func waitFeedEndsForTheTrimmed(t *testing.T, f store.PublishedFeed) {
	ctx := deadline(t)
	if err := errors.Join(f.Publish(ctx, []hub.Commit{Commit(Device(1), 1), Commit(Device(1), 2)})...); err != nil {
		t.Fatal(err)
	}
	first := everything(t, f, hub.Position{})[0].Position
	if err := f.TrimFeed(ctx, first.Day+1); err != nil {
		t.Fatal(err)
	}
	for _, at := range []hub.Position{{}, first} {
		if err := f.WaitFeed(ctx, at); err != nil {
			t.Fatal(err)
		}
		if _, _, lagged, err := f.ReadFeed(ctx, at, 1); err != nil || !lagged {
			t.Errorf("from %v: lagged %v, %v", at, lagged, err)
		}
	}
}

// A feed that is as far as it was known to be goes on; one that is not is another log, in which all that was known lags.
func whatWasKnownIsRemembered(t *testing.T, f store.PublishedFeed) {
	ctx := deadline(t)
	one := func(seq uint64) {
		t.Helper()
		if err := errors.Join(f.Publish(ctx, []hub.Commit{Commit(Device(1), seq)})...); err != nil {
			t.Fatal(err)
		}
	}
	one(1)
	at, id := f.Known(), f.LogID()
	if head, err := f.Head(ctx); err != nil || head != at {
		t.Errorf("known up to %v, and the head is %v, %v", at, head, err)
	}
	if err := f.Remember(ctx, at); err != nil || f.LogID() != id {
		t.Errorf("it is as far, and becomes another log: %v", err)
	}
	one(2)
	if err := f.Remember(ctx, at); err != nil || f.LogID() != id {
		t.Errorf("it is farther, and becomes another log: %v", err)
	}
	lost := hub.Position{Day: at.Day, N: f.Known().N + 10}
	if err := f.Remember(ctx, lost); err != nil || f.LogID() == id {
		t.Errorf("it has lost commits, and stays the same log: %v", err)
	}
	head, err := f.Head(ctx)
	if err != nil || head.Compare(lost) < 0 {
		t.Errorf("the head is %v, %v, and %v was known", head, err, lost)
	}
	for seq := range uint64(20) {
		one(seq + 3)
	}
	for _, at := range []hub.Position{at, lost} {
		if entries, _, lagged, err := f.ReadFeed(ctx, at, 10); err != nil || !lagged || len(entries) != 0 {
			t.Errorf("from %v: %d entries, lagged %v, %v; it should lag", at, len(entries), lagged, err)
		}
	}
	if n := len(everything(t, f, head)); n != 20 {
		t.Errorf("%d commits behind the head, want 20", n)
	}
}
