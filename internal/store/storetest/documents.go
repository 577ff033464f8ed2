package storetest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

var documentTests = map[string]func(*testing.T, store.Store){
	"PutComparesRevisions":      putComparesRevisions,
	"RevisionsNeverComeBack":    revisionsNeverComeBack,
	"CountingByCompareAndSwap":  countingByCompareAndSwap,
	"RangeInOrder":              rangeInOrder,
	"FindFollowsSecondaryKeys":  findFollowsSecondaryKeys,
	"DocumentsKeepLimits":       documentsKeepLimits,
	"DocumentsAreCopies":        documentsAreCopies,
	"DocumentsEndWithTheCtx":    documentsEndWithTheContext,
	"DocumentsAndCommitsShared": documentsAndCommitsTogether,
}

func put(t *testing.T, s store.Store, collection string, doc store.Doc) uint64 {
	t.Helper()
	rev, err := s.Put(t.Context(), collection, doc)
	if err != nil {
		t.Fatalf("put %s/%s: %v", collection, doc.Key, err)
	}
	return rev
}

func keys(docs []store.Doc) []string {
	out := []string{}
	for _, d := range docs {
		out = append(out, d.Key)
	}
	return out
}

func putComparesRevisions(t *testing.T, s store.Store) {
	ctx := deadline(t)
	if d, err := s.Get(ctx, "c", "k"); err != nil || d.Rev != 0 || d.Key != "k" {
		t.Errorf("a missing document is %+v, %v", d, err)
	}
	_, err := s.Put(ctx, "c", store.Doc{Key: "k", Rev: 7})
	wantKind(t, "replacing nothing", err, hub.Conflict)
	wantKind(t, "deleting nothing", s.Delete(ctx, "c", "k", 0), hub.Conflict)
	one := put(t, s, "c", store.Doc{Key: "k", Value: []byte("one"), Index: []string{"x"}})
	_, err = s.Put(ctx, "c", store.Doc{Key: "k", Value: []byte("other")})
	wantKind(t, "making it twice", err, hub.Conflict)
	two := put(t, s, "c", store.Doc{Key: "k", Value: []byte("two"), Rev: one})
	if one == 0 || two == 0 || one == two {
		t.Errorf("revisions are %d and %d", one, two)
	}
	_, err = s.Put(ctx, "c", store.Doc{Key: "k", Value: []byte("late"), Rev: one})
	wantKind(t, "replacing an old revision", err, hub.Conflict)
	wantKind(t, "deleting an old revision", s.Delete(ctx, "c", "k", one), hub.Conflict)
	if d, err := s.Get(ctx, "c", "k"); err != nil || d.Rev != two || string(d.Value) != "two" || len(d.Index) != 0 {
		t.Errorf("the document is %+v, %v", d, err)
	}
	if d, err := s.Get(ctx, "other", "k"); err != nil || d.Rev != 0 {
		t.Errorf("another collection has %+v, %v", d, err)
	}
	if err := s.Delete(ctx, "c", "k", two); err != nil {
		t.Fatal(err)
	}
	wantKind(t, "deleting it twice", s.Delete(ctx, "c", "k", two), hub.Conflict)
	if d, err := s.Get(ctx, "c", "k"); err != nil || d.Rev != 0 {
		t.Errorf("the deleted document is %+v, %v", d, err)
	}
}

// Somebody who read a document before it was deleted and made again must not replace the new one.
func revisionsNeverComeBack(t *testing.T, s store.Store) {
	ctx := deadline(t)
	seen := map[uint64]bool{}
	for range 20 {
		rev := put(t, s, "c", store.Doc{Key: "k"})
		if seen[rev] {
			t.Fatalf("revision %d came twice", rev)
		}
		seen[rev] = true
		for old := range seen {
			if old == rev {
				continue
			}
			_, err := s.Put(ctx, "c", store.Doc{Key: "k", Rev: old})
			wantKind(t, "an old revision", err, hub.Conflict)
		}
		if err := s.Delete(ctx, "c", "k", rev); err != nil {
			t.Fatal(err)
		}
	}
}

func countingByCompareAndSwap(t *testing.T, s store.Store) {
	ctx := deadline(t)
	const writers, each = 8, 15
	var wg sync.WaitGroup
	for range writers {
		wg.Go(func() {
			for n := 0; n < each; {
				d, err := s.Get(ctx, "c", "count")
				if err != nil {
					t.Error(err)
					return
				}
				value, _ := strconv.Atoi(string(d.Value))
				d.Value = strconv.AppendInt(nil, int64(value+1), 10)
				switch _, err := s.Put(ctx, "c", d); {
				case err == nil:
					n++
				case !hub.IsKind(err, hub.Conflict):
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if d, err := s.Get(ctx, "c", "count"); err != nil || string(d.Value) != fmt.Sprint(writers*each) {
		t.Errorf("the count is %s, %v, want %d", d.Value, err, writers*each)
	}
}

func rangeInOrder(t *testing.T, s store.Store) {
	ctx := deadline(t)
	if got := must(t, s.Range(ctx, "c", "", "")); len(got) != 0 {
		t.Errorf("an empty collection has %v", keys(got))
	}
	var want []string
	var wg sync.WaitGroup
	for n := range 400 {
		key := fmt.Sprintf("k%03d", n)
		want = append(want, key)
		wg.Go(func() { put(t, s, "c", store.Doc{Key: key, Value: []byte(key), Index: []string{"i=" + key}}) })
	}
	wg.Wait()
	for _, other := range []string{"a", "cc", "d", "c\x00"} {
		put(t, s, other, store.Doc{Key: "k100"})
	}
	for _, r := range []struct {
		from, to string
		want     []string
	}{
		{"", "", want},
		{"k100", "k101", want[100:101]},
		{"k100", "k100", nil},
		{"k0999", "k2", want[100:200]},
		{"k399", "", want[399:]},
		{"l", "", nil},
		{"", "k000", nil},
		{"", "k0000", want[:1]},
		{"k2", "k1", nil},
	} {
		got := must(t, s.Range(ctx, "c", r.from, r.to))
		if !slices.Equal(keys(got), append([]string{}, r.want...)) {
			t.Errorf("from %q to %q: %d documents, want %d", r.from, r.to, len(got), len(r.want))
		}
		for _, d := range got {
			if string(d.Value) != d.Key || d.Rev == 0 || !slices.Equal(d.Index, []string{"i=" + d.Key}) {
				t.Errorf("document %+v", d)
			}
		}
	}
	n := 0
	for range s.Range(ctx, "c", "", "") {
		if n++; n == 2 {
			break
		}
	}
	// Deleting while walking is how collections are emptied.
	for d, err := range s.Range(ctx, "c", "", "") {
		if err != nil {
			t.Fatal(err)
		}
		if err := s.Delete(ctx, "c", d.Key, d.Rev); err != nil {
			t.Fatal(err)
		}
	}
	if got := must(t, s.Range(ctx, "c", "", "")); len(got) != 0 {
		t.Errorf("%d documents are left", len(got))
	}
}

func findFollowsSecondaryKeys(t *testing.T, s store.Store) {
	ctx := deadline(t)
	check := func(index string, want ...string) {
		t.Helper()
		got := must(t, s.Find(ctx, "c", index))
		if !slices.Equal(keys(got), append([]string{}, want...)) {
			t.Errorf("%q finds %v, want %v", index, keys(got), want)
		}
		if got := must(t, s.FindKeys(ctx, "c", index)); !slices.Equal(got, want) {
			t.Errorf("%q finds the keys %v, want %v", index, got, want)
		}
	}
	b := put(t, s, "c", store.Doc{Key: "b", Value: []byte("vb"), Index: []string{"owner=a", "kind=x"}})
	put(t, s, "c", store.Doc{Key: "a", Index: []string{"owner=a"}})
	put(t, s, "c", store.Doc{Key: "c", Index: []string{"owner=ab", "owner=ab"}})
	put(t, s, "c", store.Doc{Key: "d", Index: []string{""}})
	put(t, s, "other", store.Doc{Key: "e", Index: []string{"owner=a"}})
	check("owner=a", "a", "b")
	check("owner=ab", "c")
	check("owner=", []string{}...)
	check("", "d")
	check("kind=x", "b")
	for d := range s.Find(ctx, "c", "kind=x") {
		if string(d.Value) != "vb" || d.Rev != b || !slices.Contains(d.Index, "owner=a") || len(d.Index) != 2 {
			t.Errorf("found %+v", d)
		}
	}
	b = put(t, s, "c", store.Doc{Key: "b", Rev: b, Index: []string{"kind=x", "owner=z"}})
	check("owner=a", "a")
	check("owner=z", "b")
	check("kind=x", "b")
	_, err := s.Put(ctx, "c", store.Doc{Key: "b", Rev: b + 1000, Index: []string{"owner=refused"}})
	wantKind(t, "another revision", err, hub.Conflict)
	check("owner=refused", []string{}...)
	if err := s.Delete(ctx, "c", "b", b); err != nil {
		t.Fatal(err)
	}
	check("kind=x", []string{}...)
	check("owner=z", []string{}...)
	var want []string
	for n := range 300 {
		key := fmt.Sprintf("n%03d", n)
		want = append(want, key)
		put(t, s, "c", store.Doc{Key: key, Index: []string{"many"}})
	}
	check("many", want...)
}

func documentsKeepLimits(t *testing.T, s store.Store) {
	ctx := deadline(t)
	text := func(n int) string { return string(make([]byte, n)) }
	many := func(n int) (out []string) {
		for i := range n {
			out = append(out, fmt.Sprint(i))
		}
		return out
	}
	put(t, s, text(store.MaxCollection), store.Doc{
		Key: text(store.MaxKey), Value: make([]byte, store.MaxValue), Index: append(many(store.MaxIndexes-1), text(store.MaxIndex)),
	})
	for what, c := range map[string]struct {
		collection string
		doc        store.Doc
		kind       hub.Kind
	}{
		"collection":     {text(store.MaxCollection + 1), store.Doc{Key: "k"}, hub.TooLarge},
		"no collection":  {"", store.Doc{Key: "k"}, hub.Invalid},
		"key":            {"c", store.Doc{Key: text(store.MaxKey + 1)}, hub.TooLarge},
		"no key":         {"c", store.Doc{}, hub.Invalid},
		"value":          {"c", store.Doc{Key: "k", Value: make([]byte, store.MaxValue+1)}, hub.TooLarge},
		"secondary keys": {"c", store.Doc{Key: "k", Index: many(store.MaxIndexes + 1)}, hub.TooLarge},
		"secondary key":  {"c", store.Doc{Key: "k", Index: []string{text(store.MaxIndex + 1)}}, hub.TooLarge},
	} {
		_, err := s.Put(ctx, c.collection, c.doc)
		wantKind(t, what, err, c.kind)
	}
	if got := must(t, s.Range(ctx, "c", "", "")); len(got) != 0 {
		t.Errorf("refused documents are there: %v", keys(got))
	}
}

func documentsAreCopies(t *testing.T, s store.Store) {
	ctx := deadline(t)
	value, index := []byte("before"), []string{"z", "a"}
	put(t, s, "c", store.Doc{Key: "k", Value: value, Index: index})
	if index[0] != "z" {
		t.Error("Put changed its argument")
	}
	copy(value, "AFTER!")
	d, err := s.Get(ctx, "c", "k")
	if err != nil || string(d.Value) != "before" {
		t.Fatalf("got %q, %v", d.Value, err)
	}
	copy(d.Value, "AFTER!")
	if d, err := s.Get(ctx, "c", "k"); err != nil || string(d.Value) != "before" {
		t.Errorf("got again %q, %v", d.Value, err)
	}
}

func documentsEndWithTheContext(t *testing.T, s store.Store) {
	rev := put(t, s, "c", store.Doc{Key: "k", Index: []string{"i"}})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, getErr := s.Get(ctx, "c", "k")
	_, putErr := s.Put(ctx, "c", store.Doc{Key: "k", Rev: rev})
	_, rangeErr := collect(t, s.Range(ctx, "c", "", ""))
	_, findErr := collect(t, s.Find(ctx, "c", "i"))
	_, keysErr := collect(t, s.FindKeys(ctx, "c", "i"))
	for what, err := range map[string]error{
		"Get": getErr, "Put": putErr, "Delete": s.Delete(ctx, "c", "k", rev), "Range": rangeErr, "Find": findErr,
		"FindKeys": keysErr,
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("%s after the context's end: %v", what, err)
		}
	}
	if d, err := s.Get(deadline(t), "c", "k"); err != nil || d.Rev != rev {
		t.Errorf("the document is %+v, %v", d, err)
	}
}

// Writes of all kinds go on at the same time, and none takes another's place.
func documentsAndCommitsTogether(t *testing.T, s store.Store) {
	ctx := deadline(t)
	var wg sync.WaitGroup
	for n := range 16 {
		wg.Go(func() {
			var rev uint64
			for seq := uint64(1); seq <= 20; seq++ {
				if err := appendOne(ctx, s, Commit(Device(n), seq)); err != nil {
					t.Error(err)
					return
				}
				var err error
				if rev, err = s.Put(ctx, "c", store.Doc{Key: fmt.Sprint(n), Rev: rev, Index: []string{fmt.Sprint(seq)}}); err != nil {
					t.Error(err)
					return
				}
				if seq == 10 {
					if err := s.Trim(ctx, Device(n), 5, nil); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	wg.Wait()
	if got := must(t, s.Find(ctx, "c", "20")); len(got) != 16 {
		t.Errorf("%d documents, want 16", len(got))
	}
	if got := must(t, s.Find(ctx, "c", "19")); len(got) != 0 {
		t.Errorf("%d documents still carry an old secondary key", len(got))
	}
	for n := range 16 {
		if got := must(t, s.Commits(ctx, Device(n), 1)); len(got) != 16 || got[0].Seq != 5 {
			t.Errorf("device %d has commits %v", n, seqs(got))
		}
	}
}
