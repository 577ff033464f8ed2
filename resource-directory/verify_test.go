package resourcedirectory

import (
	"context"
	"iter"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// damaged is a store in which one document or commit is not what it should be.
type damaged struct {
	store.Store
	docs    func([]store.StateDoc) []store.StateDoc
	commits func(hub.Commit) (hub.Commit, bool)
}

func (d damaged) Load(ctx context.Context, dev hub.DeviceID) (store.State, error) {
	st, err := d.Store.Load(ctx, dev)
	if d.docs != nil {
		st.Docs = d.docs(st.Docs)
	}
	return st, err
}

func (d damaged) Commits(ctx context.Context, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		for c, err := range d.Store.Commits(ctx, dev, from) {
			if d.commits != nil && err == nil {
				var keep bool
				if c, keep = d.commits(c); !keep {
					continue
				}
			}
			if !yield(c, err) {
				return
			}
		}
	}
}

func TestVerifyFindsDamage(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/light"))
	h.must(err)
	h.must(x.notify(value("/heat", 1)))
	h.must(x.notify(value("/light", 1)))
	if _, err := h.d.trimDevice(t.Context(), lamp, time.Now().Add(time.Hour), time.Second); err != nil {
		t.Fatal(err)
	}
	h.must(x.notify(value("/light", 2)))
	h.must(x.notify(value("/light", 3)))
	edit := func(key string, change func(*store.StateDoc)) func([]store.StateDoc) []store.StateDoc {
		return func(docs []store.StateDoc) []store.StateDoc {
			for i := range docs {
				if docs[i].Key == key {
					change(&docs[i])
				}
			}
			return docs
		}
	}
	without := func(key string) func([]store.StateDoc) []store.StateDoc {
		return func(docs []store.StateDoc) []store.StateDoc {
			var out []store.StateDoc
			for _, d := range docs {
				if d.Key != key {
					out = append(out, d)
				}
			}
			return out
		}
	}
	flip := func(d *store.StateDoc) { d.Value[len(d.Value)-1] ^= 1 }
	for name, c := range map[string]struct {
		st   damaged
		want string
	}{
		"a twin of other bytes":     {damaged{docs: edit("r/light", flip)}, "differs"},
		"a missing twin":            {damaged{docs: without("r/light")}, "missing"},
		"a missing page of links":   {damaged{docs: without(pageKey("/light"))}, "missing"},
		"a missing base":            {damaged{docs: without("br/heat")}, "of no event"},
		"a twin of no event":        {damaged{docs: edit("r/heat", func(d *store.StateDoc) { d.Key = "r/heaz" })}, "of no event"},
		"a device doc cut short":    {damaged{docs: edit("d", func(d *store.StateDoc) { d.Value = d.Value[:5] })}, "decode document"},
		"a base that cannot be":     {damaged{docs: edit("bd", func(d *store.StateDoc) { d.Value = nil })}, "decode document"},
		"a key that is not known":   {damaged{docs: edit("r/heat", func(d *store.StateDoc) { d.Key = "x" })}, "not known"},
		"a base later than the doc": {damaged{docs: edit("d", func(d *store.StateDoc) { *d = store.StateDoc{Key: "d", Value: h.baseDoc()} })}, ""},
		"a hole in the log":         {damaged{commits: func(c hub.Commit) (hub.Commit, bool) { return c, c.Seq != 6 }}, "hole"},
		"a log without its end":     {damaged{commits: func(c hub.Commit) (hub.Commit, bool) { return c, c.Seq < 7 }}, "the log ends at"},
		"a time that goes back":     {damaged{commits: func(c hub.Commit) (hub.Commit, bool) { c.Time -= int64(time.Hour); return c, true }}, "is before"},
		"a version left out": {damaged{commits: func(c hub.Commit) (hub.Commit, bool) {
			for i := range c.Events {
				c.Events[i].Version += 5
			}
			return c, true
		}}, "version"},
	} {
		t.Run(name, func(t *testing.T) {
			c.st.Store = h.base
			var problems []string
			n, err := Verify(t.Context(), c.st, func(dev hub.DeviceID, p string) { problems = append(problems, string(dev)+": "+p) })
			if err != nil || n != 1 {
				t.Errorf("%d devices, %v", n, err)
			}
			if got := strings.Join(problems, "\n"); got == "" || !strings.Contains(got, c.want) {
				t.Errorf("reported %q, want something with %q", got, c.want)
			}
		})
	}
}

// baseDoc is the device document of the base.
func (h *house) baseDoc() []byte {
	st, err := h.base.Load(context.Background(), lamp)
	h.must(err)
	for _, d := range st.Docs {
		if d.Key == "bd" {
			return d.Value
		}
	}
	h.t.Fatal("there is no base")
	return nil
}

// Documents may lag behind the log (MongoDB): loading replays from foldedTo, also what some documents already have.
func TestLoadReplaysWhatDocumentsLack(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/light", "old"), link("/b"))
	h.must(err)
	h.must(x.notify(value("/light", 1)))
	early, err := h.base.Load(t.Context(), lamp)
	h.must(err)
	_, err = x.publish(link("/light", "new"), link("/c"))
	h.must(err)
	_, err = h.d.Unpublish(t.Context(), x.stamp(), []hub.Href{"/b"})
	h.must(err)
	h.must(x.notify(value("/light", 2)))
	late, err := h.base.Load(t.Context(), lamp)
	h.must(err)
	k, err := newCodec()
	h.must(err)
	want, err := k.read(lamp, late.Docs, "")
	h.must(err)
	for name, docs := range map[string][]store.StateDoc{
		"all documents early":                 early.Docs,
		"the device early, the others late":   mix(late.Docs, early.Docs, deviceKey),
		"the device and a twin early":         mix(late.Docs, early.Docs, deviceKey, "r/light"),
		"the device and a page of links":      mix(late.Docs, early.Docs, deviceKey, pageKey("/light")),
		"no documents at all, all of the log": nil,
	} {
		t.Run(name, func(t *testing.T) {
			st := lagging{h.base, docs}
			got, err := k.load(t.Context(), st, lamp)
			h.must(err)
			keys := []string{deviceKey, "r/light", "r/b", pageKey("/light"), pageKey("/b"), pageKey("/c")}
			a, err := k.docs(got, append([]string(nil), keys...), "")
			h.must(err)
			b, err := k.docs(want, append([]string(nil), keys...), "")
			h.must(err)
			for i := range a {
				if string(a[i].Value) != string(b[i].Value) {
					t.Errorf("document %s differs", a[i].Key)
				}
			}
			if got.links.n != 2 || got.linkBytes != want.linkBytes || got.twinBytes != want.twinBytes {
				t.Errorf("%d links of %d bytes, twins of %d bytes", got.links.n, got.linkBytes, got.twinBytes)
			}
		})
	}
}

// mix is late with the documents of the keys as they were early.
func mix(late, early []store.StateDoc, keys ...string) []store.StateDoc {
	out := append([]store.StateDoc(nil), late...)
	for i := range out {
		for _, key := range keys {
			if out[i].Key != key {
				continue
			}
			for _, d := range early {
				if d.Key == key {
					out[i] = d
				}
			}
		}
	}
	return out
}

// lagging is a store whose documents are older than its log.
type lagging struct {
	store.Store
	docs []store.StateDoc
}

func (l lagging) Load(ctx context.Context, dev hub.DeviceID) (store.State, error) {
	st, err := l.Store.Load(ctx, dev)
	if err != nil {
		return st, err
	}
	st.Docs = l.docs
	for c, err := range l.Store.Commits(ctx, dev, 0) {
		if err != nil {
			return st, err
		}
		st.Commits = append(st.Commits, c)
	}
	return st, nil
}
