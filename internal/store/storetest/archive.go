package storetest

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// RunArchive runs the suite for what is copied into a back end. open gives an empty archive, and what closes it and opens the same as a
// store that serves.
func RunArchive(t *testing.T, open func(t *testing.T) (a store.Archive, serve func() store.Store)) {
	t.Run("Import", func(t *testing.T) {
		a, serve := open(t)
		imported(t, a, serve)
	})
	t.Run("ImportKeepsLimits", func(t *testing.T) {
		a, _ := open(t)
		importKeepsLimits(t, a)
	})
	t.Run("Collections", func(t *testing.T) {
		a, _ := open(t)
		collections(t, a)
	})
}

// whole is a device as another store has it.
type whole struct {
	first, last uint64
	commit      func(dev hub.DeviceID, seq uint64) hub.Commit
	docs, bases []store.StateDoc
}

func imported(t *testing.T, a store.Archive, serve func() store.Store) {
	ctx := deadline(t)
	all := map[hub.DeviceID]whole{
		Device(1): {
			first: 5, last: 12, commit: Commit, bases: []store.StateDoc{{Key: "b1", Value: []byte("base")}, {Key: "b2", Value: []byte{}}},
			docs: []store.StateDoc{{Key: "a", Value: []byte("A")}, {Key: "z\x00ä", Value: []byte{}}},
		},
		Device(2): {first: 1, last: 3, commit: FullCommit, docs: []store.StateDoc{{Key: "a", Value: []byte("A2")}}},
		Device(3): {first: 1 << 40, last: 1<<40 + 600, commit: Commit}, // pages
	}
	copyIn := func() {
		t.Helper()
		for dev, w := range all {
			var page []hub.Commit
			for seq := w.first; seq <= w.last; seq++ {
				if page = append(page, w.commit(dev, seq)); len(page) < 200 && seq < w.last {
					continue
				}
				if err := a.ImportCommits(ctx, page); err != nil {
					t.Fatal(err)
				}
				page = nil
			}
			for i := range w.docs {
				if err := a.ImportDocs(ctx, dev, w.last, w.docs[i:i+1]); err != nil {
					t.Fatal(err)
				}
			}
			if err := a.ImportDocs(ctx, dev, w.last, nil); err != nil {
				t.Fatal(err)
			}
			for i := range w.bases {
				if err := a.Trim(ctx, dev, w.first, w.bases[i:i+1]); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	check := func() {
		t.Helper()
		if devs := must(t, a.Devices(ctx, "")); !slices.Equal(devs, []hub.DeviceID{Device(1), Device(2), Device(3)}) {
			t.Errorf("the devices are %v", devs)
		}
		for dev, w := range all {
			seq := w.first
			for _, c := range must(t, a.Commits(ctx, dev, 0)) {
				SameCommit(t, c, w.commit(dev, seq))
				seq++
			}
			if seq != w.last+1 {
				t.Errorf("the log of %s ends with %d", dev, seq-1)
			}
			st, err := a.Load(ctx, dev)
			docs := slices.Concat(w.docs, w.bases)
			slices.SortFunc(docs, byKey)
			if err != nil || st.FoldedTo != w.last || st.LastSeq != w.last || len(st.Commits) != 0 || fmt.Sprintf("%q", st.Docs) != fmt.Sprintf("%q", docs) {
				t.Errorf("device %s is %+v, %v, want %q", dev, st, err, docs)
			}
		}
	}
	copyIn()
	check()
	copyIn() // after a crash
	check()

	s := serve()
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if entries, _, lagged, err := s.ReadFeed(ctx, head, 10); err != nil || lagged || len(entries) > 0 {
		t.Errorf("at its head the feed has %v, lagged %t, %v", entries, lagged, err)
	}
	if seq, err := s.SeqAt(ctx, Device(1), time.Unix(7, 0)); seq != 7 || err != nil {
		t.Errorf("at second 7 there was %d, %v", seq, err)
	}
	dev, w := Device(1), all[Device(1)]
	for _, taken := range []uint64{1, w.first, w.last, w.last + 2} {
		wantKind(t, fmt.Sprintf("seq %d", taken), appendOne(ctx, s, Commit(dev, taken)), hub.Conflict)
	}
	next := Commit(dev, w.last+1)
	if err := appendOne(ctx, s, next, store.StateDoc{Key: "a", Value: []byte("new")}, store.StateDoc{Key: "z\x00ä"}); err != nil {
		t.Fatal(err)
	}
	entries, _, lagged, err := s.ReadFeed(ctx, head, 10)
	if err != nil || lagged || len(entries) != 1 {
		t.Fatalf("behind its head the feed has %v, lagged %t, %v", entries, lagged, err)
	}
	SameCommit(t, entries[0].Commit, next)
	// The bases are as old as the log, so later ones take their place.
	if err := s.Trim(ctx, dev, 8, []store.StateDoc{{Key: "b1", Value: []byte("later")}, {Key: "b2"}}); err != nil {
		t.Fatal(err)
	}
	st, err := s.Load(ctx, dev)
	want := []store.StateDoc{{Key: "a", Value: []byte("new")}, {Key: "b1", Value: []byte("later")}}
	if err != nil || fmt.Sprintf("%q", st.Docs) != fmt.Sprintf("%q", want) && len(st.Commits) == 0 {
		t.Errorf("afterwards the device is %+v, %v", st, err)
	}
	if got := seqs(must(t, s.Commits(ctx, dev, 0))); len(got) == 0 || got[0] != 8 || got[len(got)-1] != w.last+1 {
		t.Errorf("afterwards the log is %v", got)
	}
}

func byKey(a, b store.StateDoc) int {
	switch {
	case a.Key < b.Key:
		return -1
	case a.Key > b.Key:
		return 1
	}
	return 0
}

func importKeepsLimits(t *testing.T, a store.Archive) {
	ctx := deadline(t)
	if err := a.ImportCommits(ctx, nil); err != nil {
		t.Errorf("no commits: %v", err)
	}
	wantKind(t, "a hole", a.ImportCommits(ctx, []hub.Commit{Commit(Device(1), 1), Commit(Device(1), 3)}), hub.Internal)
	wantKind(t, "two devices", a.ImportCommits(ctx, []hub.Commit{Commit(Device(1), 1), Commit(Device(2), 2)}), hub.Internal)
	empty := Commit(Device(1), 1)
	empty.Events = nil
	wantKind(t, "a commit without events", a.ImportCommits(ctx, []hub.Commit{empty}), hub.Invalid)
	nobody := Commit(Device(1), 1)
	nobody.Device = "DEVICE"
	wantKind(t, "no device", a.ImportCommits(ctx, []hub.Commit{nobody}), hub.Invalid)
	wantKind(t, "documents of no device", a.ImportDocs(ctx, "DEVICE", 1, nil), hub.Invalid)
	wantKind(t, "a large document", a.ImportDocs(ctx, Device(1), 1, []store.StateDoc{{Key: "k", Value: make([]byte, store.MaxValue+1)}}), hub.TooLarge)
	if devs := must(t, a.Devices(ctx, "")); len(devs) > 0 {
		t.Errorf("what was refused has left %v", devs)
	}
}

func collections(t *testing.T, a store.Archive) {
	ctx := deadline(t)
	if got, err := a.Collections(ctx); err != nil || len(got) > 0 {
		t.Errorf("an empty archive has %v, %v", got, err)
	}
	for i, c := range []string{"long-name", "b", "a", "ä\x00", "a-", "gone"} {
		rev, err := a.Put(ctx, c, store.Doc{Key: fmt.Sprint(i), Value: []byte("v"), Index: []string{"x"}})
		if err == nil && c == "gone" {
			err = a.Delete(ctx, c, fmt.Sprint(i), rev)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if got, err := a.Collections(ctx); err != nil || !slices.Equal(got, []string{"a", "a-", "b", "long-name", "ä\x00"}) {
		t.Errorf("the collections are %q, %v", got, err)
	}
}
