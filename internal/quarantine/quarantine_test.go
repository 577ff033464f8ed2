package quarantine

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

const (
	lamp = hub.DeviceID("11111111-0000-4000-8000-000000000001")
	fan  = hub.DeviceID("11111111-0000-4000-8000-000000000002")
)

// ward is who is in quarantine, by generation.
type ward struct {
	mu  sync.Mutex
	has map[hub.DeviceID]uint64
}

func (w *ward) in(dev hub.DeviceID) (uint64, bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	g, is := w.has[dev]
	return g, is
}

func (w *ward) set(dev hub.DeviceID, generation uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.has[dev] = generation; generation == 0 {
		delete(w.has, dev)
	}
}

func opened(t *testing.T, docs store.Documents, w *ward, l limits) *Store {
	t.Helper()
	s, err := open(t.Context(), docs, w.in, prometheus.NewRegistry(), l)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func own(dev hub.DeviceID) hub.Ownership {
	return hub.Ownership{Device: dev, Owner: "alice", Generation: 1}
}

// change is a write that came from a host, as the message of a session.
func change(host string, session, message uint64, size int) hub.KeptWrite {
	return hub.KeptWrite{
		Time: time.Now(), Session: session, Message: message, Kind: hub.KeptChanged, From: hub.KeptFrom{Remote: host + ":5684"},
		Changes: []hub.KeptChange{{Href: "/light", Format: hub.FormatCBOR, Data: make([]byte, size)}},
	}
}

func keep(t *testing.T, s *Store, dev hub.DeviceID, w hub.KeptWrite) uint64 {
	t.Helper()
	n, err := s.Keep(t.Context(), own(dev), w)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// content is what is kept: hosts and numbers, and how many were dropped.
func content(t *testing.T, s *Store, o hub.Ownership) string {
	t.Helper()
	k, err := s.Kept(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, w := range k.Writes {
		fmt.Fprintf(&b, "%s%d ", strings.TrimSuffix(w.From.Remote, ":5684"), w.Number)
	}
	return fmt.Sprintf("%sdropped %d", b.String(), k.Dropped)
}

// countOf is how many writes of a device are kept.
func countOf(t *testing.T, s *Store, dev hub.DeviceID) string {
	t.Helper()
	n, dropped, err := s.Count(t.Context(), dev)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%d dropped %d", n, dropped)
}

// stay are the devices that have documents.
func stay(t *testing.T, docs store.Documents) string {
	t.Helper()
	var devs []string
	for _, c := range []string{collection, collBooks} {
		for doc, err := range docs.Range(t.Context(), c, "", "") {
			if err != nil {
				t.Fatal(err)
			}
			dev, _, _ := strings.Cut(doc.Key, "/")
			devs = append(devs, dev)
		}
	}
	slices.Sort(devs)
	return strings.Join(slices.Compact(devs), " ")
}

func want(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}

// TestKeptSurvivesARestart, and only for the ownership under which it was kept.
func TestKeptSurvivesARestart(t *testing.T) {
	t.Parallel()
	docs, w := storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1, fan: 1}}
	s := opened(t, docs, w, bounds)
	in := change("a", 0, 0, 0)
	in.Kind = hub.KeptSignedIn
	session := keep(t, s, lamp, in)
	keep(t, s, lamp, change("a", session, 1, 10))
	if n := keep(t, s, lamp, change("a", session, 2, 10)); n != 3 {
		t.Errorf("number %d", n)
	}
	keep(t, s, fan, change("b", 7, 1, 10))
	for _, s := range []*Store{s, opened(t, docs, w, bounds)} {
		want(t, "lamp", content(t, s, own(lamp)), "a1 a2 a3 dropped 0")
		want(t, "another ownership", content(t, s, hub.Ownership{Device: lamp, Owner: "bob", Generation: 2}), "dropped 0")
		k, _ := s.Kept(t.Context(), own(lamp))
		if k.Writes[0].Session != 1 || len(k.Writes[1].Changes[0].Data) != 10 || k.Writes[2].Message != 2 || k.Writes[2].Time.IsZero() {
			t.Errorf("%+v", k)
		}
	}
	w.set(lamp, 2) // another owner's, and in quarantine again: a crash came between
	s = opened(t, docs, w, bounds)
	want(t, "the next owner", content(t, s, hub.Ownership{Device: lamp, Owner: "bob", Generation: 2}), "dropped 0")
	want(t, "fan", content(t, s, own(fan)), "b1 dropped 0")
	next := change("b", 1, 1, 10)
	if _, err := s.Keep(t.Context(), own(lamp), next); !hub.IsKind(err, hub.Precondition) {
		t.Errorf("a write of the former owner's device: %v", err)
	}
	if n, err := s.Keep(t.Context(), hub.Ownership{Device: lamp, Owner: "bob", Generation: 2}, next); n != 4 || err != nil {
		t.Errorf("number %d, %v", n, err)
	}
	want(t, "the former owner's", content(t, s, own(lamp)), "dropped 0")
	want(t, "the next owner's", content(t, s, hub.Ownership{Device: lamp, Owner: "bob", Generation: 2}), "b4 dropped 0")
	for doc, err := range docs.Range(t.Context(), collection, string(lamp), string(lamp)+"/0000000000000004") {
		t.Errorf("left: %s, %v", doc.Key, err)
	}
}

// TestBounds: the oldest goes, is counted, and of two rivals the busy one does not hide the other.
func TestBounds(t *testing.T) {
	t.Parallel()
	docs, w := storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1, fan: 1}}
	small := limits{writes: 4, bytes: 1 << 20, allWrites: 6, allBytes: 1 << 20}
	s := opened(t, docs, w, small)
	keep(t, s, lamp, change("a", 1, 1, 10))
	for i := range uint64(8) {
		keep(t, s, lamp, change("b", 2, i+1, 10))
	}
	for _, s := range []*Store{s, opened(t, docs, w, small)} {
		want(t, "by number", content(t, s, own(lamp)), "a1 b7 b8 b9 dropped 5")
	}
	for i := range uint64(3) { // 7 in all are one too many
		keep(t, s, fan, change("c", 3, i+1, 1))
	}
	want(t, "in all, of the one with the most", content(t, s, own(lamp)), "b7 b8 b9 dropped 6")
	want(t, "the other", content(t, s, own(fan)), "c1 c2 c3 dropped 0")
	want(t, "counted", countOf(t, s, lamp), "3 dropped 6")
	s = opened(t, docs, w, limits{writes: 100, bytes: 3000, allWrites: 100, allBytes: 1 << 20})
	for i := range uint64(4) {
		keep(t, s, lamp, change("b", 4, i+1, 900)) // base64 makes 1200 of them
	}
	want(t, "by size", content(t, s, own(lamp)), "b12 b13 dropped 11")
}

// faulty fails as it is told, before or after the write.
type faulty struct {
	store.Documents
	before, after error
}

func (f *faulty) Put(ctx context.Context, c string, d store.Doc) (uint64, error) {
	if f.before != nil {
		return 0, f.before
	}
	rev, err := f.Documents.Put(ctx, c, d)
	if err == nil {
		err = f.after
	}
	return rev, err
}

// TestWhatIsNotStoredIsNotKept: it is an error, and to try again keeps it once, whatever happened the first time.
func TestWhatIsNotStoredIsNotKept(t *testing.T) {
	t.Parallel()
	down := &hub.Error{Kind: hub.Unavailable}
	for name, c := range map[string]struct{ before, after error }{"not stored": {down, nil}, "stored, and nobody knows": {nil, down}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			docs, w := &faulty{Documents: storetest.NewMemory()}, &ward{has: map[hub.DeviceID]uint64{lamp: 1}}
			s := opened(t, docs, w, bounds)
			keep(t, s, lamp, change("a", 1, 1, 1))
			docs.before, docs.after = c.before, c.after
			if _, err := s.Keep(t.Context(), own(lamp), change("a", 1, 2, 1)); !hub.IsKind(err, hub.Unavailable) {
				t.Fatal(err)
			}
			docs.before, docs.after = nil, nil
			keep(t, s, lamp, change("a", 1, 2, 1))
			keep(t, s, lamp, change("a", 1, 3, 1))
			want(t, "kept", content(t, s, own(lamp)), "a1 a2 a3 dropped 0")
		})
	}
}

// TestDiscard: all of the device goes, nothing of others, and what was on its way is not kept.
func TestDiscard(t *testing.T) {
	t.Parallel()
	docs, w := storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1, fan: 1}}
	s := opened(t, docs, w, bounds)
	keep(t, s, fan, change("c", 9, 1, 1))
	var writers sync.WaitGroup
	for host := range 4 {
		writers.Go(func() { // ends when the quarantine does
			for i := uint64(1); ; i++ {
				if _, err := s.Keep(context.Background(), own(lamp), change(fmt.Sprint(host), uint64(host), i, 1)); err != nil {
					if code, _ := hub.Public(err); code != "quarantine-over" || !hub.IsKind(err, hub.Precondition) {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	for deadline := time.Now().Add(30 * time.Second); !strings.HasPrefix(countOf(t, s, lamp), "256 "); {
		if time.Now().After(deadline) {
			t.Fatalf("they have not kept 256 writes: %s", countOf(t, s, lamp))
		}
	}
	w.set(lamp, 0)
	if err := s.Discard(t.Context(), lamp); err != nil {
		t.Fatal(err)
	}
	writers.Wait()
	for doc, err := range docs.Range(t.Context(), collection, "", "") {
		if err != nil || !strings.HasPrefix(doc.Key, string(fan)) {
			t.Errorf("left: %s, %v", doc.Key, err)
		}
	}
	if err := s.Discard(t.Context(), lamp); err != nil {
		t.Error(err)
	}
	w.set(lamp, 1)
	n := keep(t, s, lamp, change("a", 1, 1, 1))
	want(t, "begun anew", content(t, s, own(lamp)), fmt.Sprintf("a%d dropped 0", n))
}

// TestTwoProcesses keep writes of one device under one count and one bound, and either may forget them all.
func TestTwoProcesses(t *testing.T) {
	t.Parallel()
	docs, w := storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1, fan: 1}}
	small := limits{writes: 8, bytes: 1 << 20, allWrites: 12, allBytes: 1 << 20}
	a, b := opened(t, docs, w, small), opened(t, docs, w, small)
	if n := keep(t, a, lamp, change("a", 1, 1, 1)); n != 1 {
		t.Errorf("the first has number %d", n)
	}
	if n := keep(t, b, lamp, change("b", 2, 1, 1)); n != 2 {
		t.Errorf("the other's has number %d", n)
	}
	if n := keep(t, a, lamp, change("b", 2, 1, 1)); n != 2 {
		t.Errorf("the same message again has number %d", n)
	}
	for _, s := range []*Store{a, b} {
		want(t, "kept by both", content(t, s, own(lamp)), "a1 b2 dropped 0")
		want(t, "counted by both", countOf(t, s, lamp), "2 dropped 0")
	}
	var writers sync.WaitGroup
	var mu sync.Mutex
	numbers := map[uint64]bool{1: true, 2: true}
	for i, s := range []*Store{a, b} {
		for j := range 2 {
			writers.Go(func() {
				for n := range uint64(25) {
					number, err := s.Keep(context.Background(), own(lamp), change("c", uint64(10*i+j+10), n+1, 1))
					mu.Lock()
					if err != nil || numbers[number] {
						t.Errorf("number %d (given before: %v), %v", number, numbers[number], err)
					}
					numbers[number] = true
					mu.Unlock()
				}
			})
		}
	}
	writers.Wait()
	// One that was dropped before its own process had entered it was entered twice.
	k, err := a.Kept(t.Context(), own(lamp))
	if err != nil || len(k.Writes) != 8 || k.Dropped < 94 || k.Writes[7].Number != 8+k.Dropped {
		t.Fatalf("the bound of one: %+v, %v", k, err)
	}
	for _, s := range []*Store{a, b} {
		want(t, "counted by both", countOf(t, s, lamp), fmt.Sprintf("8 dropped %d", k.Dropped))
	}
	for i := range uint64(4) {
		keep(t, []*Store{a, b}[i%2], fan, change("d", 1, i+1, 1))
	}
	want(t, "there is still room", countOf(t, a, lamp), fmt.Sprintf("8 dropped %d", k.Dropped))
	keep(t, b, fan, change("d", 1, 5, 1))
	want(t, "the bound of all", countOf(t, a, lamp), fmt.Sprintf("7 dropped %d", k.Dropped+1))

	w.set(lamp, 0)
	if err := b.Discard(t.Context(), lamp); err != nil {
		t.Fatal(err)
	}
	w.set(lamp, 1)
	for _, s := range []*Store{a, b} {
		want(t, "discarded by the other", content(t, s, own(lamp)), "dropped 0")
	}
	if n := keep(t, a, lamp, change("a", 1, 1, 1)); n != 9+k.Dropped {
		t.Errorf("after that number %d is given", n)
	}
	want(t, "the other's device", countOf(t, a, fan), "5 dropped 0")
}

// TestAProcessDiesWhileItKeeps a write, between the document and the book: the others find it.
func TestAProcessDiesWhileItKeeps(t *testing.T) {
	t.Parallel()
	docs, w := storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1}}
	a, b := opened(t, docs, w, bounds), opened(t, docs, w, bounds)
	keep(t, a, lamp, change("a", 1, 1, 1))
	docs.Fail = func(op, collection, _ string) error {
		if op == "put" && collection == collBooks {
			return &hub.Error{Kind: hub.Unavailable}
		}
		return nil
	}
	if _, err := a.Keep(t.Context(), own(lamp), change("a", 1, 2, 1)); !hub.IsKind(err, hub.Unavailable) {
		t.Fatal(err)
	}
	docs.Fail = nil
	want(t, "it is there", content(t, b, own(lamp)), "a1 a2 dropped 0")
	if n := keep(t, b, lamp, change("b", 2, 1, 1)); n != 3 {
		t.Errorf("the next has number %d", n)
	}
	want(t, "and stays", content(t, b, own(lamp)), "a1 a2 b3 dropped 0")
	want(t, "and counts", countOf(t, b, lamp), "3 dropped 0")
}

// TestWithoutABook: writes of before there were books are kept, and counted, with what comes.
func TestWithoutABook(t *testing.T) {
	t.Parallel()
	docs, w := storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1}}
	s := opened(t, docs, w, bounds)
	for i := range uint64(3) {
		keep(t, s, lamp, change("a", 1, i+1, 1))
	}
	delete(docs.Docs[collection], key(lamp, 1))
	delete(docs.Docs, collBooks)
	want(t, "kept", content(t, s, own(lamp)), "a2 a3 dropped 0")
	keep(t, s, lamp, change("a", 1, 4, 1))
	want(t, "kept with what comes", content(t, s, own(lamp)), "a2 a3 a4 dropped 1")
}

// TestSweep: what a process kept after the quarantine was over goes once it was there for a minute, and never what is of a quarantine
// that others have heard of and this one has not.
func TestSweep(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		docs := storetest.NewMemory()
		here, there := &ward{has: map[hub.DeviceID]uint64{lamp: 1}}, &ward{has: map[hub.DeviceID]uint64{lamp: 1, fan: 1}}
		a, b := opened(t, docs, here, bounds), opened(t, docs, there, bounds)
		keep(t, b, lamp, change("b", 1, 1, 1))
		here.set(lamp, 0)
		if err := a.Discard(t.Context(), lamp); err != nil {
			t.Fatal(err)
		}
		keep(t, b, lamp, change("b", 1, 2, 1)) // it has not heard
		keep(t, b, fan, change("b", 1, 1, 1))  // and of this one only it has
		known := errOver.With("not yet", nil)
		var mu sync.Mutex // guards known
		says := func(err *hub.Error) {
			mu.Lock()
			defer mu.Unlock()
			known = err
		}
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() {
			_ = a.Run(ctx, func() error {
				mu.Lock()
				defer mu.Unlock()
				if known != nil {
					return known
				}
				return nil
			}, func() {})
		})
		pass := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		both := string(lamp) + " " + string(fan)
		pass(5 * sweepEvery)
		want(t, "as long as it does not know", stay(t, docs), both)
		says(nil)
		there.set(lamp, 0)
		pass(sweepEvery)
		want(t, "found for the first time", stay(t, docs), both)
		here.set(fan, 1)
		pass(sweepEvery)
		want(t, "found for the second time", stay(t, docs), string(fan))
		// A quarantine that ended and began again here while the other has not heard of either.
		here.set(fan, 0)
		pass(sweepEvery)
		keep(t, b, fan, change("b", 1, 2, 1))
		pass(sweepEvery)
		want(t, "somebody keeps writes yet", content(t, b, own(fan)), "b1 b2 dropped 0")
		here.set(fan, 1)
		pass(10 * sweepEvery)
		want(t, "it is in quarantine", content(t, b, own(fan)), "b1 b2 dropped 0")
		here.set(fan, 2)
		there.set(fan, 2)
		pass(3 * sweepEvery)
		want(t, "of a former owner", stay(t, docs), "")
		cancel()
		run.Wait()
	})
}

// TestNothingStaysInMemory of a device that is quiet.
func TestNothingStaysInMemory(t *testing.T) {
	t.Parallel()
	s := opened(t, storetest.NewMemory(), &ward{has: map[hub.DeviceID]uint64{lamp: 1}}, bounds)
	keep(t, s, lamp, change("a", 1, 1, 1))
	if len(s.turns) != 0 {
		t.Errorf("%d devices are remembered", len(s.turns))
	}
}
