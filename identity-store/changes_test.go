package identitystore

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// alone is Stores on the same documents that are not woken, and read when they are told to.
func alone(t *testing.T, docs store.Documents, dir Directory, n int) (stores []*Store) {
	t.Helper()
	for range n {
		s := storeOn(t, docs, dir)
		if err := s.share(t.Context(), func() {}, func(func()) (func(), error) { return func() {}, nil }); err != nil {
			t.Fatal(err)
		}
		stores = append(stores, s)
	}
	return stores
}

// A writer that was paused for a whole round does not write over what others wrote, nor in front of it.
func TestPausedWriter(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	stores := alone(t, docs, newDirectory(), 2)
	paused, other := stores[0], stores[1]
	if err := paused.announce(t.Context(), change{Owner: alice}); err != nil {
		t.Fatal(err)
	}
	once := true
	paused.changes.docs = &hooked{docs, func(coll, _ string) { // between the look at the slot and the write
		if !once || coll != collChanges {
			return
		}
		once = false
		for range slots {
			if err := other.announce(t.Context(), change{Owner: bob}); err != nil {
				t.Error(err)
			}
		}
	}}
	if err := paused.announce(t.Context(), change{Owner: alice}); err != nil {
		t.Fatal(err)
	}
	if err := other.changes.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	if at := other.changes.last(); at != slots+2 || paused.changes.last() != at {
		t.Errorf("they are at %d and %d", at, paused.changes.last())
	}
	if since, _, _, ok := other.changes.since(slots + 1); !ok || len(since) != 1 {
		t.Errorf("%v, %v", since, ok)
	} else if _, is := since[change{Owner: alice}]; !is {
		t.Errorf("the last record says %v", since)
	}
}

// hooked calls after once a document was read.
type hooked struct {
	store.Documents
	after func(coll, key string)
}

func (h *hooked) Get(ctx context.Context, coll, key string) (store.Doc, error) {
	doc, err := h.Documents.Get(ctx, coll, key)
	h.after(coll, key)
	return doc, err
}

// What another Store has announced is not read over what was decided here meanwhile.
func TestDecidedWhileReading(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := alone(t, docs, dir, 1)[0]
	signUp(t, s, lamp, alice)
	once := true
	s.docs = &hooked{docs, func(coll, _ string) {
		if !once || coll != collDevices {
			return
		}
		once = false
		if err := s.Disable(t.Context(), lamp, alice, "alice", ""); err != nil {
			t.Error(err)
		}
	}}
	if err := s.follow(t.Context(), []change{{Device: lamp}}); err != nil {
		t.Fatal(err)
	}
	wantKind(t, s.Denied(lamp, nil), hub.Denied, "device-disabled")
}

// Nobody pays for records of changes where there is nobody to read them; where there is, a sign-up writes one more.
func TestOnlyWhoSharesAnnounces(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name string
		of   func(*testing.T, store.Documents) *Store
		puts map[string]int
	}{
		{"alone", func(t *testing.T, docs store.Documents) *Store { return storeOn(t, docs, newDirectory()) }, map[string]int{collDevices: 2}},
		{"shared", func(t *testing.T, docs store.Documents) *Store { return alone(t, docs, newDirectory(), 1)[0] }, map[string]int{collDevices: 2, collChanges: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			docs := storetest.NewMemory()
			puts := map[string]int{}
			docs.Fail = func(op, coll, _ string) error {
				if op == "put" {
					puts[coll]++
				}
				return nil
			}
			s := c.of(t, docs)
			for range 3 { // two of them change nothing
				signUp(t, s, lamp, alice)
			}
			if fmt.Sprint(puts) != fmt.Sprint(c.puts) {
				t.Errorf("written: %v, want %v", puts, c.puts)
			}
		})
	}
}

// Whoever claims a device that somebody left half released settles what others were not told.
func TestClaimSettlesWhatTheReleaseLeft(t *testing.T) {
	t.Parallel()
	for done, writes := false, int64(1); !done; writes++ {
		docs, dir := storetest.NewMemory(), newDirectory()
		mortal := &dying{Documents: docs}
		mortal.left.Store(1000)
		first := alone(t, mortal, dir, 1)[0]
		signUp(t, first, lamp, alice)
		if err := first.Disable(t.Context(), lamp, alice, "alice", ""); err != nil {
			t.Fatal(err)
		}
		stores := alone(t, docs, dir, 2)
		second, third := stores[0], stores[1]
		wantKind(t, third.Denied(lamp, nil), hub.Denied, "device-disabled")
		mortal.left.Store(writes)
		done = first.SignOff(t.Context(), lamp, alice, "user") == nil
		signUp(t, second, lamp, bob)
		if err := third.changes.refresh(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := third.Denied(lamp, nil); err != nil {
			t.Errorf("after %d writes the next owner's device is kept out: %v", writes, err)
		}
	}
}

// dying lets some writes through, and fails whatever comes after them.
type dying struct {
	store.Documents
	left atomic.Int64
}

var errDead = errors.New("the process is not there any more")

func (d *dying) Get(ctx context.Context, coll, key string) (store.Doc, error) {
	if d.left.Load() <= 0 {
		return store.Doc{}, errDead
	}
	return d.Documents.Get(ctx, coll, key)
}

func (d *dying) Put(ctx context.Context, coll string, doc store.Doc) (uint64, error) {
	if d.left.Add(-1) < 0 {
		return 0, errDead
	}
	return d.Documents.Put(ctx, coll, doc)
}

func (d *dying) Delete(ctx context.Context, coll, key string, rev uint64) error {
	if d.left.Add(-1) < 0 {
		return errDead
	}
	return d.Documents.Delete(ctx, coll, key, rev)
}

func storeOn(t *testing.T, docs store.Documents, dir Directory) *Store {
	t.Helper()
	s, err := New(t.Context(), Default(), docs, dir, quiet(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Those who give up while nothing can be written leave no more behind than can be written later, and that is written.
func TestChangesThatWaitAreBounded(t *testing.T) {
	t.Parallel()
	s := alone(t, storetest.NewMemory(), newDirectory(), 1)[0]
	over, stop := context.WithCancel(t.Context())
	stop()
	s.changes.turn <- struct{}{}
	for i := range maxWaiting*maxChanges + 1 {
		wantKind(t, s.announce(over, change{Owner: hub.Owner(fmt.Sprint(i))}), hub.Unavailable, "")
	}
	if n := len(s.changes.waiting); n != maxWaiting {
		t.Errorf("%d records wait", n)
	}
	<-s.changes.turn
	s.changes.waiting = s.changes.waiting[1:]
	if err := s.announce(t.Context(), change{Owner: alice}); err != nil {
		t.Fatal(err)
	}
	if n := s.changes.last(); n != maxWaiting || len(s.changes.waiting) != 0 {
		t.Errorf("%d records were written, and %d wait", n, len(s.changes.waiting))
	}
}
