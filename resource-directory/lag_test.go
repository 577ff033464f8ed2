package resourcedirectory

import (
	"context"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// late is a store whose documents follow its log only when settle is called, as those of a cluster do after a while, and are
// lost with the process until then.
type late struct {
	store.Store
	mu   sync.Mutex // guards what follows
	devs map[hub.DeviceID]*lateDevice
	fail error // of Fold
}

type lateDevice struct {
	docs   map[string][]byte
	folded uint64
	waits  []lateDocs
}

// lateDocs are documents that commits after from up to to changed.
type lateDocs struct {
	from, to uint64
	docs     []store.StateDoc
}

// lagged puts l in front of the store.
func lagged(l *late) func(*house) {
	l.devs = map[hub.DeviceID]*lateDevice{}
	return func(h *house) {
		h.wrap = func(s store.Store) store.Store {
			l.Store = s
			return l
		}
	}
}

func (l *late) device(dev hub.DeviceID) *lateDevice {
	if l.devs[dev] == nil {
		l.devs[dev] = &lateDevice{docs: map[string][]byte{}}
	}
	return l.devs[dev]
}

func (l *late) Append(ctx context.Context, entries []store.Entry) []error {
	bare := slices.Clone(entries)
	for i := range bare {
		bare[i].Docs = nil
	}
	errs := l.Store.Append(ctx, bare)
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, e := range entries {
		if errs[i] == nil {
			d := l.device(e.Commit.Device)
			d.waits = append(d.waits, lateDocs{e.Commit.Seq - 1, e.Commit.Seq, e.Docs})
		}
	}
	return errs
}

func (l *late) Load(ctx context.Context, dev hub.DeviceID) (store.State, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.device(dev)
	st := store.State{FoldedTo: d.folded, LastSeq: d.folded}
	for _, key := range slices.Sorted(maps.Keys(d.docs)) {
		st.Docs = append(st.Docs, store.StateDoc{Key: key, Value: d.docs[key]})
	}
	for c, err := range l.Commits(ctx, dev, d.folded+1) {
		if err != nil {
			return store.State{}, err
		}
		st.Commits = append(st.Commits, c)
		st.LastSeq = c.Seq
	}
	return st, nil
}

func (l *late) Fold(_ context.Context, dev hub.DeviceID, st store.State, docs []store.StateDoc) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.fail != nil {
		return l.fail
	}
	d := l.device(dev)
	d.waits = append(d.waits, lateDocs{st.FoldedTo, st.LastSeq, docs})
	return nil
}

func (l *late) Trim(ctx context.Context, dev hub.DeviceID, below uint64, docs []store.StateDoc) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.device(dev).put(docs)
	return l.Store.Trim(ctx, dev, min(below, l.device(dev).folded+1), nil)
}

func (d *lateDevice) put(docs []store.StateDoc) {
	for _, doc := range docs {
		if doc.Value == nil {
			delete(d.docs, doc.Key)
		} else {
			d.docs[doc.Key] = doc.Value
		}
	}
}

// settle lets documents follow as far as there is no hole.
func (l *late) settle() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.devs {
		for _, w := range d.waits {
			if w.from <= d.folded && d.folded < w.to {
				d.put(w.docs)
				d.folded = w.to
			}
		}
		d.waits = nil
	}
}

// lose forgets the documents that have not followed yet.
func (l *late) lose() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, d := range l.devs {
		d.waits = nil
	}
}

// whole fails the test if a device's documents do not end where its log does, or are not what the log says.
func (l *late) whole(t *testing.T, dev hub.DeviceID) {
	t.Helper()
	st, err := l.Load(t.Context(), dev)
	if err != nil || st.FoldedTo != st.LastSeq {
		t.Errorf("the documents contain seq %d, the log ends with %d: %v", st.FoldedTo, st.LastSeq, err)
	}
	_, err = Verify(t.Context(), l, func(dev hub.DeviceID, problem string) { t.Errorf("device %s: %s", dev, problem) })
	if err != nil {
		t.Error(err)
	}
}

// The process ends before documents followed the log: the next one sees everything, and what it appends makes the documents
// whole again.
func TestDocumentsThatLagAreFolded(t *testing.T) {
	t.Parallel()
	l := &late{}
	h := open(t, lagged(l))
	x := h.registered(lamp)
	_, err := x.publish(link("/light"), link("/gone"))
	h.must(err)
	h.must(x.notify(value("/light", "old"), value("/gone", 1)))
	l.settle()
	l.whole(t, lamp)
	h.must(x.notify(value("/light", "new")))
	_, err = h.d.Unpublish(t.Context(), x.stamp(), []hub.Href{"/gone"})
	h.must(err)
	l.lose()
	h.restart() // and sets the session of the former process offline
	h.eventually("offline", func() bool { return !h.device(alice, lamp).Metadata.Connection.Online })
	if d := h.device(alice, lamp); twinOf(t, d, "/light") != "new" || d.Links.Len() != 1 {
		t.Errorf("after the restart: %s, %d links", twinOf(t, d, "/light"), d.Links.Len())
	}
	l.settle()
	l.whole(t, lamp)
	y := h.signIn(lamp, alice, 1, "conn-2")
	h.must(y.notify(value("/light", "newest")))
	l.settle()
	l.whole(t, lamp)
}

// A store that does not take the documents of a device gets no more commits of it either: they would never make a whole.
func TestNothingIsAppendedBeforeItIsFolded(t *testing.T) {
	t.Parallel()
	l := &late{}
	h := open(t, lagged(l))
	x := h.registered(lamp)
	h.must(h.d.Offline(t.Context(), x.stamp()))
	before := len(h.commits(lamp))
	l.lose()
	h.stop()
	l.fail = hub.NewError(hub.Unavailable, "store-behind", "")
	h.d, h.stop = run(t, h.cfg, h.st, h.log)
	_, err := h.d.SignIn(t.Context(), own(lamp, alice, 1), conn("conn-2"), "user-1", newEnd())
	wantKind(t, err, hub.Unavailable, "store-behind")
	if n := len(h.commits(lamp)); n != before {
		t.Errorf("%d commits, there were %d", n, before)
	}
	l.mu.Lock()
	l.fail = nil
	l.mu.Unlock()
	h.signIn(lamp, alice, 1, "conn-2")
	l.settle()
	l.whole(t, lamp)
}

// Nobody comes for a device whose documents lag: the trimmer keeps what they lack, and has them follow.
func TestTrimmerFoldsWhatNobodyComesFor(t *testing.T) {
	t.Parallel()
	l := &late{}
	h := open(t, lagged(l))
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1)))
	h.must(x.notify(value("/light", 2)))
	l.settle()
	folded := uint64(len(h.commits(lamp)))
	h.must(x.notify(value("/light", 3)))
	h.must(h.d.Offline(t.Context(), x.stamp()))
	l.lose()
	h.restart()
	trim := func() {
		t.Helper()
		if _, err := h.d.trimDevice(t.Context(), lamp, time.Now().Add(30*24*time.Hour), 24*time.Hour); err != nil {
			t.Error(err)
		}
	}
	trim()
	if cs := h.commits(lamp); len(cs) == 0 || cs[0].Seq != folded+1 {
		t.Errorf("%d commits are left, the documents contain seq %d", len(cs), folded)
	}
	l.settle()
	l.whole(t, lamp)
	trim()
	if cs := h.commits(lamp); len(cs) != 1 {
		t.Errorf("%d commits are left", len(cs))
	}
	if d := h.device(alice, lamp); twinOf(t, d, "/light") != "3" {
		t.Errorf("the twin is %s", twinOf(t, d, "/light"))
	}
}

// Whoever looks at a device whose documents lag sees it as it is once they have followed.
func TestWholeDevicesOfDocumentsThatLag(t *testing.T) {
	t.Parallel()
	l := &late{}
	h := open(t, lagged(l))
	x := h.registered(lamp)
	_, err := x.publish(link("/light"), link("/gone"))
	h.must(err)
	h.must(x.notify(value("/light", "old"), value("/gone", 1)))
	l.settle()
	st, err := l.Load(t.Context(), lamp)
	h.must(err)
	for i := range st.Docs {
		st.Docs[i].Key = basePrefix + st.Docs[i].Key
	}
	h.must(l.Trim(t.Context(), lamp, st.LastSeq+1, st.Docs))
	h.must(x.notify(value("/light", "new")))
	_, err = h.d.Unpublish(t.Context(), x.stamp(), []hub.Href{"/gone"})
	h.must(err)
	w, err := NewWhole()
	h.must(err)
	docs, bases, last, err := w.Load(t.Context(), l, lamp)
	h.must(err)
	l.settle()
	later, laterBases, laterLast, err := w.Load(t.Context(), l, lamp)
	h.must(err)
	same := func(a, b store.StateDoc) bool { return a.Key == b.Key && string(a.Value) == string(b.Value) }
	if !slices.EqualFunc(docs, later, same) || !slices.EqualFunc(bases, laterBases, same) || last != laterLast || len(bases) != len(st.Docs) || len(docs) < 3 {
		t.Errorf("while its documents lag the device is at %d\n%q %q, then at %d\n%q %q", last, docs, bases, laterLast, later, laterBases)
	}
	if st, err := l.Load(t.Context(), lamp); err != nil || len(st.Commits) > 0 {
		t.Errorf("the documents did not follow: %+v, %v", st, err)
	}
}
