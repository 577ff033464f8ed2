package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

var logTests = map[string]func(*testing.T, store.Store){
	"AppendThenLoad":                 appendThenLoad,
	"AppendKeepsEveryField":          appendKeepsEveryField,
	"AppendRefusesOtherSeqs":         appendRefusesOtherSeqs,
	"AppendJudgesEachByItself":       appendJudgesEachByItself,
	"AppendRacesHaveOneWinner":       appendRacesHaveOneWinner,
	"AppendKeepsLimits":              appendKeepsLimits,
	"AppendAfterTheContextEnded":     appendAfterTheContextEnded,
	"AppendCopiesItsArguments":       appendCopiesItsArguments,
	"StateDocsAreReplacedAndDeleted": stateDocsAreReplacedAndDeleted,
	"LoadIsOneSnapshot":              loadIsOneSnapshot,
	"CommitsInPages":                 commitsInPages,
	"CommitsEndWithTheContext":       commitsEndWithTheContext,
	"SeqAtFindsTheMoment":            seqAtFindsTheMoment,
	"DevicesInOrder":                 devicesInOrder,
	"TrimKeepsTheNewest":             trimKeepsTheNewest,
	"TrimDoesNotReplaceNewerDocs":    trimDoesNotReplaceNewerDocs,
}

func appendThenLoad(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	if st, err := s.Load(ctx, dev); err != nil || st.LastSeq != 0 || len(st.Docs)+len(st.Commits) != 0 {
		t.Errorf("an unknown device is %+v, %v", st, err)
	}
	for seq := uint64(1); seq <= 3; seq++ {
		if err := appendOne(ctx, s, Commit(dev, seq), store.StateDoc{Key: "d", Value: []byte{byte(seq)}}); err != nil {
			t.Fatal(err)
		}
		st, err := s.Load(ctx, dev)
		if err != nil || st.LastSeq != seq || len(st.Docs) != 1 || !slices.Equal(st.Docs[0].Value, []byte{byte(seq)}) {
			t.Errorf("after commit %d: %+v, %v", seq, st, err)
		}
		if st.FoldedTo+uint64(len(st.Commits)) != seq {
			t.Errorf("after commit %d documents are folded to %d, and %d commits come after", seq, st.FoldedTo, len(st.Commits))
		}
		if err := s.Fold(ctx, dev, st, st.Docs); err != nil {
			t.Errorf("fold what is there already: %v", err)
		}
	}
	if errs := s.Append(ctx, nil); len(errs) != 0 {
		t.Errorf("appending nothing gives %v", errs)
	}
}

func appendKeepsEveryField(t *testing.T, s store.Store) {
	ctx, want := deadline(t), FullCommit(Device(1), 1)
	if err := appendOne(ctx, s, want); err != nil {
		t.Fatal(err)
	}
	got := must(t, s.Commits(ctx, want.Device, 1))
	if len(got) != 1 {
		t.Fatalf("%d commits", len(got))
	}
	SameCommit(t, got[0], want)
	feed, _, _, err := s.ReadFeed(ctx, hub.Position{}, 1)
	if err != nil || len(feed) != 1 {
		t.Fatalf("feed: %v, %v", feed, err)
	}
	SameCommit(t, feed[0].Commit, want)
}

func appendRefusesOtherSeqs(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	wantKind(t, "the second commit first", appendOne(ctx, s, Commit(dev, 2)), hub.Conflict)
	add(t, s, dev, 1, 2)
	for _, seq := range []uint64{1, 2, 4} {
		doc := store.StateDoc{Key: "refused", Value: []byte("x")}
		wantKind(t, fmt.Sprintf("commit %d after 2", seq), appendOne(ctx, s, Commit(dev, seq), doc), hub.Conflict)
	}
	if st, err := s.Load(ctx, dev); err != nil || st.LastSeq != 2 || len(st.Docs) != 0 {
		t.Errorf("refused commits left %+v, %v", st, err)
	}
	if feed, _, _, err := s.ReadFeed(ctx, hub.Position{}, 10); err != nil || len(feed) != 2 {
		t.Errorf("the feed has %d commits, %v", len(feed), err)
	}
}

func appendJudgesEachByItself(t *testing.T, s store.Store) {
	ctx := deadline(t)
	add(t, s, Device(2), 1, 1)
	errs := s.Append(ctx, []store.Entry{
		{Commit: Commit(Device(1), 1)},
		{Commit: Commit(Device(1), 2)},
		{Commit: Commit(Device(2), 1)}, // was there before
		{Commit: Commit(Device(1), 3)},
		{Commit: Commit(Device(3), 1)},
		{Commit: Commit(Device(3), 3)}, // a hole, and so for what follows
		{Commit: Commit(Device(3), 4)},
		{Commit: Commit("not-a-device", 1)},
	})
	want := []hub.Kind{99, 99, hub.Conflict, 99, 99, hub.Conflict, hub.Conflict, hub.Invalid}
	if len(errs) != len(want) {
		t.Fatalf("%d outcomes of %d entries", len(errs), len(want))
	}
	for i, kind := range want {
		if kind == 99 {
			if errs[i] != nil {
				t.Errorf("entry %d: %v", i, errs[i])
			}
			continue
		}
		wantKind(t, fmt.Sprintf("entry %d", i), errs[i], kind)
	}
	for dev, last := range map[hub.DeviceID]uint64{Device(1): 3, Device(2): 1, Device(3): 1} {
		if st, err := s.Load(ctx, dev); err != nil || st.LastSeq != last {
			t.Errorf("%s: last seq %d, %v, want %d", dev, st.LastSeq, err, last)
		}
	}
}

func appendRacesHaveOneWinner(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	const writers, rounds = 16, 20
	var won [rounds]atomic.Int32
	var winners [rounds]atomic.Int32
	var wg sync.WaitGroup
	for w := range writers {
		wg.Go(func() {
			for i := range rounds {
				c := Commit(dev, uint64(i+1))
				c.ID[0] = byte(w)
				for {
					err := appendOne(ctx, s, c, store.StateDoc{Key: "winner", Value: []byte{byte(w)}})
					if err == nil {
						won[i].Add(1)
						winners[i].Store(int32(w))
						break
					}
					if !hub.IsKind(err, hub.Conflict) {
						t.Errorf("writer %d, commit %d: %v", w, i+1, err)
						return
					}
					// Either another writer has this seq, or this writer is ahead of the log.
					st, err := s.Load(ctx, dev)
					if err != nil {
						t.Error(err)
						return
					}
					if st.LastSeq > uint64(i) {
						break
					}
				}
			}
		})
	}
	wg.Wait()
	got := must(t, s.Commits(ctx, dev, 1))
	if len(got) != rounds {
		t.Fatalf("%d commits, want %d", len(got), rounds)
	}
	for i := range rounds {
		if n := won[i].Load(); n != 1 {
			t.Errorf("commit %d has %d winners", i+1, n)
		}
		if got[i].ID[0] != byte(winners[i].Load()) {
			t.Errorf("commit %d is of writer %d, but %d was told so", i+1, got[i].ID[0], winners[i].Load())
		}
	}
	st, err := s.Load(ctx, dev)
	if err != nil || st.Docs[0].Value[0] != byte(winners[rounds-1].Load()) {
		t.Errorf("the document is not the last winner's: %v, %v", st.Docs, err)
	}
}

func appendKeepsLimits(t *testing.T, s store.Store) {
	ctx := deadline(t)
	sized := func(n int, data int) hub.Commit {
		c := Commit(Device(n), 1)
		c.Events[0].Content.Data = make([]byte, data)
		return c
	}
	many := func(n, events int) hub.Commit {
		c := Commit(Device(n), 1)
		for len(c.Events) < events {
			c.Events = append(c.Events, c.Events[0])
		}
		return c
	}
	empty := Commit(Device(9), 1)
	empty.Events = nil
	good := []hub.Commit{many(1, hub.MaxCommitEvents), sized(2, hub.MaxCommitBytes-1024), sized(3, hub.MaxContent)}
	for _, c := range good {
		if err := appendOne(ctx, s, c); err != nil {
			t.Errorf("%d events: %v", len(c.Events), err)
		}
		got := must(t, s.Commits(ctx, c.Device, 1))
		if len(got) == 1 {
			SameCommit(t, got[0], c)
		} else {
			t.Errorf("%d commits of %s", len(got), c.Device)
		}
	}
	wantKind(t, "257 events", appendOne(ctx, s, many(4, hub.MaxCommitEvents+1)), hub.TooLarge)
	wantKind(t, "480 KiB of content", appendOne(ctx, s, sized(5, hub.MaxCommitBytes)), hub.TooLarge)
	wantKind(t, "no events", appendOne(ctx, s, empty), hub.Invalid)
	wantKind(t, "seq 0", appendOne(ctx, s, Commit(Device(6), 0)), hub.Invalid)
	for what, doc := range map[string]store.StateDoc{
		"a long key":    {Key: string(make([]byte, store.MaxKey+1)), Value: []byte("x")},
		"a large value": {Key: "k", Value: make([]byte, store.MaxValue+1)},
	} {
		wantKind(t, what, appendOne(ctx, s, Commit(Device(7), 1), doc), hub.TooLarge)
	}
	largest := store.StateDoc{Key: string(make([]byte, store.MaxKey)), Value: make([]byte, store.MaxValue)}
	if err := appendOne(ctx, s, Commit(Device(8), 1), largest); err != nil {
		t.Errorf("the largest document: %v", err)
	}
	wantKind(t, "an empty key", appendOne(ctx, s, Commit(Device(8), 2), store.StateDoc{Value: []byte("x")}), hub.Invalid)
	if got := must(t, s.Devices(ctx, "")); !slices.Equal(got, []hub.DeviceID{Device(1), Device(2), Device(3), Device(8)}) {
		t.Errorf("devices: %v", got)
	}
}

func appendAfterTheContextEnded(t *testing.T, s store.Store) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := appendOne(ctx, s, Commit(Device(1), 1))
	wantKind(t, "append", err, hub.Unavailable)
	if st, err := s.Load(deadline(t), Device(1)); err != nil || st.LastSeq != 0 {
		t.Errorf("it was stored all the same: %+v, %v", st, err)
	}
	// A context that ends while writes are under way: each outcome is the truth.
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var wg sync.WaitGroup
	var stored [8]uint64
	for i := range stored {
		wg.Go(func() {
			for seq := uint64(1); seq < 1<<20; seq++ {
				if seq == 20 {
					stop()
				}
				if err := appendOne(ctx, s, Commit(Device(10+i), seq)); err != nil {
					return
				}
				stored[i] = seq
			}
		})
	}
	wg.Wait()
	for i, want := range stored {
		if st, err := s.Load(deadline(t), Device(10+i)); err != nil || st.LastSeq != want {
			t.Errorf("writer %d was told %d commits are stored, there are %d (%v)", i, want, st.LastSeq, err)
		}
	}
}

func appendCopiesItsArguments(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	doc := []byte("before")
	if err := appendOne(ctx, s, Commit(dev, 1), store.StateDoc{Key: "k", Value: doc}); err != nil {
		t.Fatal(err)
	}
	copy(doc, "AFTER!")
	st, err := s.Load(ctx, dev)
	if err != nil || string(st.Docs[0].Value) != "before" {
		t.Fatalf("loaded %q, %v", st.Docs[0].Value, err)
	}
	copy(st.Docs[0].Value, "AFTER!")
	if st, err := s.Load(ctx, dev); err != nil || string(st.Docs[0].Value) != "before" {
		t.Errorf("loaded again %q, %v", st.Docs[0].Value, err)
	}
}

func stateDocsAreReplacedAndDeleted(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	steps := []struct {
		docs []store.StateDoc
		want string
	}{
		{[]store.StateDoc{{Key: "b", Value: []byte("1")}, {Key: "a", Value: []byte("2")}, {Key: "c", Value: []byte{}}}, "a=2 b=1 c= "},
		{[]store.StateDoc{{Key: "b", Value: nil}, {Key: "missing", Value: nil}}, "a=2 c= "},
		{nil, "a=2 c= "},
		{[]store.StateDoc{{Key: "a", Value: []byte("3")}, {Key: "a\x00", Value: []byte("4")}, {Key: "ab", Value: []byte("5")}}, "a=3 a\x00=4 ab=5 c= "},
		{[]store.StateDoc{{Key: "c", Value: nil}, {Key: "a", Value: nil}, {Key: "b", Value: []byte("6")}}, "a\x00=4 ab=5 b=6 "},
	}
	// The neighbours' documents of the same keys stay what they are.
	for _, n := range []int{0, 2} {
		if err := appendOne(ctx, s, Commit(Device(n), 1), store.StateDoc{Key: "a", Value: []byte("n")}); err != nil {
			t.Fatal(err)
		}
	}
	for i, step := range steps {
		if err := appendOne(ctx, s, Commit(dev, uint64(i+1)), step.docs...); err != nil {
			t.Fatal(err)
		}
		st, err := s.Load(ctx, dev)
		if err != nil {
			t.Fatal(err)
		}
		got := ""
		for _, d := range st.Docs {
			got += d.Key + "=" + string(d.Value) + " "
		}
		if got != step.want {
			t.Errorf("step %d: %q, want %q", i+1, got, step.want)
		}
	}
	for _, n := range []int{0, 2} {
		if st, err := s.Load(ctx, Device(n)); err != nil || len(st.Docs) != 1 || string(st.Docs[0].Value) != "n" {
			t.Errorf("device %d has %+v, %v", n, st.Docs, err)
		}
	}
}

func loadIsOneSnapshot(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	const last = 300
	done := make(chan struct{})
	go func() {
		defer close(done)
		for seq := uint64(1); seq <= last; seq++ {
			v := fmt.Appendf(nil, "%d", seq)
			if err := appendOne(ctx, s, Commit(dev, seq), store.StateDoc{Key: "a", Value: v}, store.StateDoc{Key: "z", Value: v}); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	defer func() { <-done }()
	for seen := uint64(0); seen < last; {
		st, err := s.Load(ctx, dev)
		if err != nil {
			t.Fatal(err)
		}
		if st.LastSeq < seen {
			t.Fatalf("the log went back from %d to %d", seen, st.LastSeq)
		}
		seen = st.LastSeq
		// A back end whose documents lag behind gives the commits they lack.
		for _, d := range st.Docs {
			if want := fmt.Sprint(seen - uint64(len(st.Commits))); string(d.Value) != want {
				t.Fatalf("document %s is of commit %s, want %s", d.Key, d.Value, want)
			}
		}
		if ctx.Err() != nil {
			t.Fatal(ctx.Err())
		}
	}
}

func commitsInPages(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	const last = 700
	var entries []store.Entry
	for seq := uint64(1); seq <= last; seq++ {
		entries = append(entries, store.Entry{Commit: Commit(dev, seq)})
	}
	if err := errors.Join(s.Append(ctx, entries)...); err != nil {
		t.Fatal(err)
	}
	add(t, s, Device(0), 1, 2)
	add(t, s, Device(2), 1, 2)
	for _, from := range []uint64{0, 1, 2, 256, 257, last, last + 1} {
		got := must(t, s.Commits(ctx, dev, from))
		first := max(from, 1)
		if len(got) != int(last+1-min(first, last+1)) {
			t.Fatalf("from %d: %d commits", from, len(got))
		}
		for i, c := range got {
			SameCommit(t, c, Commit(dev, first+uint64(i)))
		}
	}
	n := 0
	for range s.Commits(ctx, dev, 1) {
		if n++; n == 300 {
			break
		}
	}
	if n != 300 {
		t.Errorf("broke off after %d", n)
	}
	if got := must(t, s.Commits(ctx, Device(5), 1)); len(got) != 0 {
		t.Errorf("an unknown device has %d commits", len(got))
	}
	_, err := collect(t, s.Commits(ctx, "x", 1))
	wantKind(t, "a device that is none", err, hub.Invalid)
}

func commitsEndWithTheContext(t *testing.T, s store.Store) {
	dev := Device(1)
	var entries []store.Entry
	for seq := uint64(1); seq <= 2000; seq++ {
		entries = append(entries, store.Entry{Commit: Commit(dev, seq)})
	}
	if err := errors.Join(s.Append(deadline(t), entries)...); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	n, failed := 0, error(nil)
	for _, err := range s.Commits(ctx, dev, 1) {
		if failed = err; err == nil {
			n++
		}
		cancel()
	}
	if !errors.Is(failed, context.Canceled) || n == 0 || n == 2000 {
		t.Errorf("after the context's end: %d commits, %v", n, failed)
	}
	if _, err := s.Load(ctx, dev); !errors.Is(err, context.Canceled) {
		t.Errorf("Load after the context's end: %v", err)
	}
}

func seqAtFindsTheMoment(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	times := []int64{10, 20, 20, 20, 35, 40} // nanoseconds; several commits may share one
	for i, when := range times {
		c := Commit(dev, uint64(i+1))
		c.Time = when
		if err := appendOne(ctx, s, c); err != nil {
			t.Fatal(err)
		}
	}
	check := func(cases map[int64]uint64) {
		t.Helper()
		for at, want := range cases {
			if got, err := s.SeqAt(ctx, dev, time.Unix(0, at)); err != nil || got != want {
				t.Errorf("at %d: seq %d, %v, want %d", at, got, err, want)
			}
		}
	}
	check(map[int64]uint64{-5: 0, 9: 0, 10: 1, 11: 1, 19: 1, 20: 4, 34: 4, 35: 5, 39: 5, 40: 6, 1 << 60: 6})
	if err := s.Trim(ctx, dev, 4, nil); err != nil {
		t.Fatal(err)
	}
	check(map[int64]uint64{10: 0, 19: 0, 20: 4, 35: 5, 1 << 60: 6})
	if got, err := s.SeqAt(ctx, Device(2), time.Unix(0, 40)); err != nil || got != 0 {
		t.Errorf("an unknown device: %d, %v", got, err)
	}
	// However long the log is and wherever in it the moment lies.
	dev = Device(3)
	for seq := uint64(1); seq <= 70; seq++ {
		c := Commit(dev, seq)
		c.Time = int64(10 * seq)
		if err := appendOne(ctx, s, c); err != nil {
			t.Fatal(err)
		}
		if !slices.Contains([]uint64{1, 2, 3, 4, 7, 8, 15, 16, 31, 32, 70}, seq) {
			continue // at the lengths that are left a search by halves and doubles takes no other turn
		}
		for at := range int64(seq) + 2 {
			check(map[int64]uint64{10*at - 1: min(seq, uint64(max(at-1, 0))), 10 * at: min(seq, uint64(at))})
		}
	}
}

func devicesInOrder(t *testing.T, s store.Store) {
	ctx := deadline(t)
	if got := must(t, s.Devices(ctx, "")); len(got) != 0 {
		t.Errorf("an empty store has devices %v", got)
	}
	const count = 300 // more than a page
	var entries []store.Entry
	var want []hub.DeviceID
	for n := range count {
		want = append(want, Device(n))
		if n%7 == 3 { // has documents only
			if err := s.Trim(ctx, Device(n), 0, []store.StateDoc{{Key: "only", Value: []byte("doc")}}); err != nil {
				t.Fatal(err)
			}
			continue
		}
		docs := []store.StateDoc{{Key: "a", Value: []byte("x")}, {Key: "b", Value: []byte("y")}}
		entries = append(entries, store.Entry{Commit: Commit(Device(n), 1), Docs: docs}, store.Entry{Commit: Commit(Device(n), 2)})
	}
	slices.Reverse(want)
	last := hub.DeviceID("ffffffff-ffff-ffff-ffff-ffffffffffff")
	want = append(want, last)
	entries = append(entries, store.Entry{Commit: Commit(last, 1)})
	if err := errors.Join(s.Append(ctx, entries)...); err != nil {
		t.Fatal(err)
	}
	slices.Sort(want)
	if got := must(t, s.Devices(ctx, "")); !slices.Equal(got, want) {
		t.Errorf("%d devices, want %d in order", len(got), len(want))
	}
	if got := must(t, s.Devices(ctx, Device(149))); !slices.Equal(got, want[150:]) {
		t.Errorf("%d devices after the 150th, want %d", len(got), len(want)-150)
	}
	if got := must(t, s.Devices(ctx, last)); len(got) != 0 {
		t.Errorf("devices after the last: %v", got)
	}
	for dev, err := range s.Devices(ctx, "") {
		if err != nil || dev != Device(0) {
			t.Errorf("first is %s, %v", dev, err)
		}
		break
	}
}

func trimKeepsTheNewest(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	add(t, s, Device(0), 1, 3)
	add(t, s, dev, 1, 10)
	add(t, s, Device(2), 1, 3)
	for _, step := range []struct{ below, first uint64 }{{0, 1}, {1, 1}, {4, 4}, {2, 4}, {4, 4}, {10, 10}, {11, 10}, {1 << 40, 10}} {
		base := store.StateDoc{Key: "base", Value: fmt.Append(nil, step.first)}
		if err := s.Trim(ctx, dev, step.below, []store.StateDoc{base}); err != nil {
			t.Fatal(err)
		}
		got := seqs(must(t, s.Commits(ctx, dev, 0)))
		if len(got) != int(11-step.first) || got[0] != step.first || got[len(got)-1] != 10 {
			t.Errorf("below %d: %v are left", step.below, got)
		}
		st, err := s.Load(ctx, dev)
		if err != nil || st.LastSeq != 10 || len(st.Docs) != 1 || string(st.Docs[0].Value) != fmt.Sprint(step.first) {
			t.Errorf("below %d: loaded %+v, %v", step.below, st, err)
		}
	}
	add(t, s, dev, 11, 12) // the log goes on
	for _, n := range []int{0, 2} {
		if got := seqs(must(t, s.Commits(ctx, Device(n), 1))); !slices.Equal(got, []uint64{1, 2, 3}) {
			t.Errorf("device %d has %v", n, got)
		}
	}
	if err := s.Trim(ctx, Device(77), 5, nil); err != nil {
		t.Errorf("an unknown device: %v", err)
	}
	wantKind(t, "a large document", s.Trim(ctx, dev, 1, []store.StateDoc{{Key: "k", Value: make([]byte, store.MaxValue+1)}}), hub.TooLarge)
}

func trimDoesNotReplaceNewerDocs(t *testing.T, s store.Store) {
	ctx, dev := deadline(t), Device(1)
	for seq := uint64(1); seq <= 5; seq++ {
		if err := appendOne(ctx, s, Commit(dev, seq), store.StateDoc{Key: fmt.Sprint(seq), Value: []byte("own")}); err != nil {
			t.Fatal(err)
		}
	}
	var docs []store.StateDoc
	for seq := 1; seq <= 5; seq++ {
		docs = append(docs, store.StateDoc{Key: fmt.Sprint(seq), Value: []byte("base")})
	}
	docs[4].Value = nil // a newer document is not deleted either
	if err := s.Trim(ctx, dev, 4, docs); err != nil {
		t.Fatal(err)
	}
	st, err := s.Load(ctx, dev)
	if err != nil || len(st.Docs) != 5 {
		t.Fatalf("loaded %+v, %v", st, err)
	}
	for i, want := range []string{"base", "base", "base", "own", "own"} {
		if string(st.Docs[i].Value) != want {
			t.Errorf("document %s is %q, want %q", st.Docs[i].Key, st.Docs[i].Value, want)
		}
	}
}
