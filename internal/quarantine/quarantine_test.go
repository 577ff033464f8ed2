package quarantine

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
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
	for doc, err := range docs.Range(t.Context(), collection, "", "") {
		if err != nil || deviceOf(doc.Key) != fan {
			t.Errorf("left: %s, %v", doc.Key, err)
		}
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
	if n, dropped := s.Count(lamp); n != 3 || dropped != 6 {
		t.Errorf("counted %d, dropped %d", n, dropped)
	}
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
	for {
		if n, _ := s.Count(lamp); n > 20 {
			break
		}
	}
	w.set(lamp, 0)
	if err := s.Discard(t.Context(), lamp); err != nil {
		t.Fatal(err)
	}
	writers.Wait()
	for doc, err := range docs.Range(t.Context(), collection, "", "") {
		if err != nil || deviceOf(doc.Key) != fan {
			t.Errorf("left: %s, %v", doc.Key, err)
		}
	}
	if err := s.Discard(t.Context(), lamp); err != nil {
		t.Error(err)
	}
	w.set(lamp, 1)
	keep(t, s, lamp, change("a", 1, 1, 1))
	want(t, "begun anew", content(t, s, own(lamp)), "a1 dropped 0")
}
