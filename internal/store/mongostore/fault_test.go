package mongostore_test

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// nth does something to the n-th command of a name to a collection, and nothing to all others.
func nth(n int32, name, collection string, do action) func(command) action {
	var count atomic.Int32
	return func(c command) action {
		if c.name == name && c.collection == collection && count.Add(1) == n {
			return do
		}
		return action{}
	}
}

// The connection breaks before or after the server acted, or the server's answer leaves open what became of a commit: what Append
// says is what is stored, and each commit is stored and published once.
func TestAppendSettlesWhatBecameOfIt(t *testing.T) {
	t.Parallel()
	unsure := bson.D{
		{Key: "ok", Value: 1.0},
		{Key: "n", Value: int32(1)},
		{Key: "writeConcernError", Value: bson.D{{Key: "code", Value: int32(64)}, {Key: "errmsg", Value: "waiting for replication timed out"}}},
	}
	for name, do := range map[string]action{
		"Before":       {before: true},
		"After":        {after: true},
		"NotPrimary":   {answer: fails(10107, "NotWritablePrimary")},
		"SteppingDown": {after: true, answer: fails(11602, "InterruptedDueToReplStateChange")},
		"NotMajority":  {after: true, answer: unsure},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, feed := newProxy(t), storetest.NewFeed()
			s := open(t, config(p.uri(), database(t)), opts(feed), fast)
			ctx := t.Context()
			one, many, several := storetest.Device(1), storetest.Device(2), storetest.Device(3)

			p.on(nth(1, "insert", "commits", do))
			must(t, add(ctx, s, one, 1))
			p.on(nth(1, "insert", "commits", do))
			must(t, errors.Join(s.Append(ctx, []store.Entry{entry(one, 2), entry(many, 1)})...)) // of many devices, unordered
			p.on(nth(1, "insert", "commits", do))
			var entries []store.Entry
			for seq := range uint64(20) {
				entries = append(entries, entry(several, seq+1))
			}
			must(t, errors.Join(s.Append(ctx, entries)...)) // in order
			p.on(nil)
			must(t, add(ctx, s, one, 3)) // and the log goes on
			wantLog(t, s, feed, one, 3)
			wantLog(t, s, feed, many, 1)
			wantLog(t, s, feed, several, 20)
			eventually(t, "everything is published and folded", s.Done)
			closeStore(t, s)
		})
	}
}

// The connection breaks, and before the insert is repeated somebody else stores that seq: the repetition meets a duplicate, and
// that is not ours.
func TestAppendThatSomebodyOvertook(t *testing.T) {
	t.Parallel()
	for name, ordered := range map[string]bool{"Single": false, "Ordered": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p, feed, db, dev, other := newProxy(t), storetest.NewFeed(), database(t), storetest.Device(1), storetest.Device(2)
			a, b := open(t, config(p.uri(), db), opts(feed), fast), open(t, config(uri, db), opts(feed), fast)
			var tries atomic.Int32
			p.on(func(c command) action {
				switch {
				case c.name != "insert" || c.collection != "commits":
				case tries.Add(1) == 1:
					return action{before: true}
				case tries.Load() == 2:
					if err := add(context.Background(), b, dev, 1); err != nil {
						t.Errorf("the other: %v", err)
					}
				}
				return action{}
			})
			entries := []store.Entry{entry(dev, 1, "mine"), entry(other, 1)}
			if ordered {
				entries[1] = entry(dev, 2, "mine")
			}
			errs := a.Append(t.Context(), entries)
			if !hub.IsKind(errs[0], hub.Conflict) || hub.IsKind(errs[1], hub.Conflict) != ordered || !ordered && errs[1] != nil {
				t.Errorf("outcomes: %v", errs)
			}
			wantLog(t, a, feed, dev, 1)
			eventually(t, "a commit that was refused is done with", a.Done)
			closeStore(t, a)
			closeStore(t, b)
		})
	}
}

// The server acts and is gone for longer than anybody waits: the outcome is not known, and said to be. When it is back the commit
// is found, published, and the log goes on behind it.
func TestAppendWhoseOutcomeNobodyKnows(t *testing.T) {
	t.Parallel()
	p, feed, dev := newProxy(t), storetest.NewFeed(), storetest.Device(1)
	cfg := config(p.uri(), database(t))
	cfg.SelectTimeout, cfg.SettleTimeout = time.Second, 3*time.Second
	s := open(t, cfg, opts(feed), fast)
	must(t, add(t.Context(), s, dev, 1))
	p.on(func(c command) action {
		if c.name == "insert" && c.collection == "commits" {
			p.set(func() { p.down = true })
			return action{after: true}
		}
		return action{}
	})
	wantError(t, "append", add(t.Context(), s, dev, 2), hub.Deadline, "store-outcome-unknown")
	p.on(nil)
	wantError(t, "append to a server that is away", add(t.Context(), s, storetest.Device(2), 1), hub.Unavailable, "store-unreachable")
	p.comeBack()
	eventually(t, "what was in doubt is published", func() bool { return len(feed.All()) == 2 && s.Done() })
	st, err := s.Load(t.Context(), dev)
	must(t, err)
	if st.LastSeq != 2 || len(st.Commits) != 1 {
		t.Fatalf("loaded %+v", st)
	}
	must(t, s.Fold(t.Context(), dev, st, entry(dev, 2).Docs))
	must(t, add(t.Context(), s, dev, 3))
	wantLog(t, s, feed, dev, 3)
	wantLog(t, s, feed, storetest.Device(2), 0)
	eventually(t, "documents follow", func() bool { return s.Lag() == 0 })
	closeStore(t, s)
}

// While the server is away everything is refused; nothing is lost, and when it is back everything works without a restart.
func TestServerGoesAndComesBack(t *testing.T) {
	t.Parallel()
	p, feed, dev := newProxy(t), storetest.NewFeed(), storetest.Device(1)
	cfg := config(p.uri(), database(t))
	cfg.SelectTimeout = 100 * time.Millisecond
	s := open(t, cfg, opts(feed), fast)
	ctx := t.Context()
	must(t, add(ctx, s, dev, 1))
	rev, err := s.Put(ctx, "c", store.Doc{Key: "k", Value: []byte("v")})
	must(t, err)
	for range 2 {
		p.leave()
		_, err = s.Load(ctx, dev)
		wantError(t, "load", err, hub.Unavailable, "store-unreachable")
		wantError(t, "append", add(ctx, s, dev, 2), hub.Unavailable, "store-unreachable")
		_, err = s.Get(ctx, "c", "k")
		wantError(t, "get", err, hub.Unavailable, "store-unreachable")
		_, err = s.Put(ctx, "c", store.Doc{Key: "k", Value: []byte("w"), Rev: rev})
		wantError(t, "put", err, hub.Unavailable, "store-unreachable")
		p.comeBack()
		eventually(t, "reads work", func() bool {
			d, err := s.Get(ctx, "c", "k")
			return err == nil && string(d.Value) == "v"
		})
	}
	must(t, add(ctx, s, dev, 2))
	wantLog(t, s, feed, dev, 2)
	closeStore(t, s)
}

// A server that refuses a commit for good is not asked for ever.
func TestServerRefusesACommit(t *testing.T) {
	t.Parallel()
	p, feed, dev := newProxy(t), storetest.NewFeed(), storetest.Device(1)
	s := open(t, config(p.uri(), database(t)), opts(feed), fast)
	p.on(nth(1, "insert", "commits", action{answer: fails(14031, "OutOfDiskSpace")}))
	wantError(t, "a command that fails", add(t.Context(), s, dev, 1), hub.Unavailable, "store-refused")
	p.on(nth(1, "insert", "commits", action{answer: bson.D{
		{Key: "ok", Value: 1.0}, {Key: "n", Value: int32(0)}, {Key: "writeErrors", Value: bson.A{bson.D{
			{Key: "index", Value: int32(0)}, {Key: "code", Value: int32(14031)}, {Key: "errmsg", Value: "disk full"},
		}}},
	}}))
	wantError(t, "a document that is refused", add(t.Context(), s, dev, 1), hub.Unavailable, "store-refused")
	// Refused, although it was stored before: only reading tells.
	p.on(nth(1, "insert", "commits", action{after: true, answer: fails(14031, "OutOfDiskSpace")}))
	must(t, add(t.Context(), s, dev, 1))
	wantLog(t, s, feed, dev, 1)
	closeStore(t, s)
}

// Documents of collections: the same for Put and Delete.
func TestPutSettlesWhatBecameOfIt(t *testing.T) {
	t.Parallel()
	for name, do := range map[string]action{"Before": {before: true}, "After": {after: true}, "NotPrimary": {answer: fails(10107, "NotWritablePrimary")}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := newProxy(t)
			s := open(t, config(p.uri(), database(t)), opts(storetest.NewFeed()), fast)
			ctx := t.Context()
			want := func(rev uint64, value string) {
				t.Helper()
				if d, err := s.Get(ctx, "c", name); err != nil || d.Rev != rev || string(d.Value) != value {
					t.Errorf("got %+v, %v; want revision %d with %q", d, err, rev, value)
				}
			}
			p.on(nth(1, "insert", "documents", do))
			rev, err := s.Put(ctx, "c", store.Doc{Key: name, Value: []byte("1")})
			must(t, err)
			want(rev, "1")
			p.on(nth(1, "update", "documents", do))
			next, err := s.Put(ctx, "c", store.Doc{Key: name, Value: []byte("2"), Rev: rev})
			must(t, err)
			want(next, "2")
			p.on(nth(1, "update", "documents", do))
			if _, err = s.Put(ctx, "c", store.Doc{Key: name, Value: []byte("3"), Rev: rev}); !hub.IsKind(err, hub.Conflict) {
				t.Errorf("an old revision: %v", err)
			}
			p.on(nth(1, "update", "documents", do))
			must(t, s.Delete(ctx, "c", name, next))
			want(0, "")
			p.on(nth(1, "update", "documents", do)) // takes the place of what was deleted
			rev, err = s.Put(ctx, "c", store.Doc{Key: name, Value: []byte("4")})
			must(t, err)
			want(rev, "4")
			p.on(nil)
			_, err = s.Put(ctx, "c", store.Doc{Key: name, Value: []byte("5")})
			if !hub.IsKind(err, hub.Conflict) {
				t.Errorf("a document that should not be there: %v", err)
			}
			closeStore(t, s)
		})
	}
}

// writeSome appends commits to a device, each behind what is there, as a directory that shares it with others does, until it
// wrote count.
func writeSome(ctx context.Context, s *mongostore.Store, dev hub.DeviceID, name string, count int) ([]uint64, error) {
	var mine []uint64
	known := false
	var last uint64
	for len(mine) < count {
		if !known {
			st, err := s.Load(ctx, dev)
			if err != nil {
				return mine, err
			}
			if last = st.LastSeq; len(st.Commits) > 0 {
				docs := entry(dev, last).Docs
				if st.FoldedTo == 0 {
					docs = append(docs, store.StateDoc{Key: "first", Value: []byte("1")})
				}
				if err := s.Fold(ctx, dev, st, docs); err != nil {
					return mine, err
				}
			}
			known = true
		}
		switch err := s.Append(ctx, []store.Entry{entry(dev, last+1, name)})[0]; {
		case err == nil:
			last++
			mine = append(mine, last)
		case hub.IsKind(err, hub.Conflict):
			known = false
		default:
			return mine, err
		}
	}
	return mine, nil
}

// Two processes that both take a device for theirs: no seq is stored twice, none is left out, nobody is told what is not so, and
// the documents are the last one's.
func TestTwoProcessesWriteOneDevice(t *testing.T) {
	t.Parallel()
	const each = 25
	feed, db, dev := storetest.NewFeed(), database(t), storetest.Device(1)
	a, b := open(t, config(uri, db), opts(feed), fast), open(t, config(uri, db), opts(feed), fast)
	var wg sync.WaitGroup
	wrote := map[string][]uint64{"a-------": nil, "b-------": nil}
	var mu sync.Mutex
	for name, s := range map[string]*mongostore.Store{"a-------": a, "b-------": b} {
		wg.Go(func() {
			mine, err := writeSome(t.Context(), s, dev, name, each)
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			mu.Lock()
			defer mu.Unlock()
			wrote[name] = mine
		})
	}
	wg.Wait()
	closeStore(t, b)
	by := map[uint64]string{}
	for name, mine := range wrote {
		for _, seq := range mine {
			if by[seq] != "" {
				t.Errorf("seq %d was stored twice", seq)
			}
			by[seq] = name
		}
	}
	next := uint64(1)
	for c, err := range a.Commits(t.Context(), dev, 1) {
		must(t, err)
		if c.Seq != next || string(c.ID[:8]) != by[next] {
			t.Errorf("seq %d is of %q, want seq %d of %q", c.Seq, c.ID[:8], next, by[next])
		}
		next++
	}
	if next != 2*each+1 {
		t.Errorf("%d commits", next-1)
	}
	told := uint64(0)
	for _, e := range feed.All() {
		if e.Commit.Seq == told+1 {
			told++
		} else if e.Commit.Seq > told {
			t.Fatalf("the feed goes from seq %d to %d", told, e.Commit.Seq)
		}
	}
	if told != 2*each {
		t.Errorf("the feed ends with seq %d", told)
	}
	eventually(t, "all documents are there", func() bool {
		st, err := a.Load(t.Context(), dev)
		must(t, err)
		return len(st.Docs) == 2 && string(st.Docs[0].Value) == "1" && string(st.Docs[1].Value) == fmt.Sprint(st.FoldedTo) && st.FoldedTo == 2*each
	})
	closeStore(t, a)
}

// A process ends between storing and publishing: another one publishes what it left, and the documents follow once somebody
// has loaded the device.
func TestDeadWriterIsTakenOver(t *testing.T) {
	t.Parallel()
	broken, feed, db := storetest.NewFeed(), storetest.NewFeed(), database(t)
	dead := &sameLog{broken, feed.LogID()}
	a := open(t, config(uri, db), opts(dead), fast)
	one, two := storetest.Device(1), storetest.Device(2)
	must(t, add(t.Context(), a, one, 1))
	eventually(t, "the first is published and folded", a.Done)
	broken.Fail = func(hub.Commit) error { return errors.New("no answer") }
	must(t, errors.Join(a.Append(t.Context(), []store.Entry{entry(one, 2), entry(two, 1)})...))
	a.Kill()

	b := open(t, config(uri, db), opts(feed), fast)
	eventually(t, "what was left is published", func() bool { return len(feed.All()) == 2 })
	for _, e := range feed.All() {
		if e.Commit.Device == one && e.Commit.Seq == 1 {
			t.Error("what the dead writer said to be done was published again")
		}
	}
	var before int64
	for _, w := range writers(t, db) {
		before += w.Beat
	}
	eventually(t, "the writers are looked at again", func() bool {
		now := -before
		for _, w := range writers(t, db) {
			now += w.Beat
		}
		return now >= 3
	})
	if len(writers(t, db)) != 2 {
		t.Error("the dead writer is forgotten before its documents are folded")
	}
	st, err := b.Load(t.Context(), one)
	must(t, err)
	if st.FoldedTo != 1 || len(st.Commits) != 1 || st.LastSeq != 2 {
		t.Errorf("loaded %+v", st)
	}
	for _, dev := range []hub.DeviceID{one, two} {
		st, err := b.Load(t.Context(), dev)
		must(t, err)
		docs := entry(dev, st.LastSeq).Docs
		if st.FoldedTo == 0 {
			docs = entry(dev, 1).Docs
		}
		must(t, b.Fold(t.Context(), dev, st, docs))
		must(t, add(t.Context(), b, dev, st.LastSeq+1))
	}
	eventually(t, "nothing is left of the dead writer", func() bool { return len(writers(t, db)) == 1 })
	if st, err = b.Load(t.Context(), one); err != nil || st.FoldedTo != 3 || len(st.Docs) != 2 {
		t.Errorf("loaded %+v, %v", st, err)
	}
	closeStore(t, b)
	if left := writers(t, db); len(left) != 0 {
		t.Errorf("after an orderly end there are writers: %v", left)
	}
}

// sameLog is a feed that says it is another, as the other end of the same stream does.
type sameLog struct {
	*storetest.Feed
	id string
}

func (f *sameLog) LogID() string { return f.id }

// The feed does not take commits: they are stored, which is what an answer promises, but nothing more of those devices is
// until they are taken, since nobody may see a later commit before an earlier one.
func TestFeedGoesAndComesBack(t *testing.T) {
	t.Parallel()
	feed := storetest.NewFeed()
	var away atomic.Bool
	one, two := storetest.Device(1), storetest.Device(2)
	feed.Fail = func(c hub.Commit) error {
		if away.Load() && c.Device == one {
			return errors.New("no answer")
		}
		return nil
	}
	s := open(t, config(uri, database(t)), opts(feed), fast)
	away.Store(true)
	must(t, add(t.Context(), s, one, 1))
	wantError(t, "the next of the device", add(t.Context(), s, one, 2), hub.Unavailable, "feed-unavailable")
	must(t, add(t.Context(), s, two, 1))
	away.Store(false)
	eventually(t, "the feed has what it did not take", func() bool { return len(feed.All()) == 2 && s.Done() })
	must(t, add(t.Context(), s, one, 2))
	wantLog(t, s, feed, one, 2)
	closeStore(t, s)
}

// Documents do not follow: appends wait, and are refused in the end. When they follow again appends go on.
func TestLagIsBounded(t *testing.T) {
	t.Parallel()
	p, feed := newProxy(t), storetest.NewFeed()
	tuning := fast
	tuning.Lag, tuning.Patience = 10, 20*time.Millisecond
	s := open(t, config(p.uri(), database(t)), opts(feed), tuning)
	ctx, dev := t.Context(), storetest.Device(1)
	hold := make(chan struct{})
	release := sync.OnceFunc(func() { close(hold) })
	defer release()
	p.on(func(c command) action {
		if c.name == "insert" && c.collection == "state" {
			return action{hold: hold}
		}
		return action{}
	})
	n := uint64(0)
	var err error
	for ; n < 100 && err == nil; n++ {
		err = add(ctx, s, dev, n+1)
	}
	wantError(t, "append", err, hub.Unavailable, "store-behind")
	if n-1 != 10 || s.Lag() != 10 {
		t.Errorf("refused after %d commits with a lag of %d events, the limit is 10", n-1, s.Lag())
	}
	st, err := s.Load(withTimeout(t, 50*time.Millisecond), dev) // waits for documents, as appends do
	if err == nil && st.LastSeq != 10 {
		t.Errorf("loaded %+v", st)
	}
	wantError(t, "documents of other writers", s.Fold(ctx, dev, store.State{LastSeq: 1}, nil), hub.Unavailable, "store-behind")
	release()
	eventually(t, "documents follow", func() bool { return s.Lag() == 0 })
	must(t, add(ctx, s, dev, 11))
	wantLog(t, s, feed, dev, 11)
	closeStore(t, s)
}

func withTimeout(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// A process ends before documents followed: who loads the device gets documents as they were and the commits after.
func TestLoadAfterACrash(t *testing.T) {
	t.Parallel()
	feed, db, dev := storetest.NewFeed(), database(t), storetest.Device(1)
	never := mongostore.Tuning{Fold: time.Hour}
	a := open(t, config(uri, db), opts(feed), never)
	must(t, add(t.Context(), a, dev, 1))
	_, err := a.Load(t.Context(), dev) // folds
	must(t, err)
	must(t, errors.Join(a.Append(t.Context(), []store.Entry{entry(dev, 2), entry(dev, 3)})...))
	a.Kill()

	b := open(t, config(uri, db), opts(feed), never)
	st, err := b.Load(t.Context(), dev)
	must(t, err)
	if st.FoldedTo != 1 || st.LastSeq != 3 || len(st.Commits) != 2 || len(st.Docs) != 2 || string(st.Docs[1].Value) != "1" {
		t.Fatalf("loaded %+v", st)
	}
	must(t, b.Fold(t.Context(), dev, st, entry(dev, 3).Docs))
	must(t, add(t.Context(), b, dev, 4))
	st, err = b.Load(t.Context(), dev)
	if err != nil || st.FoldedTo != 4 || st.LastSeq != 4 || len(st.Docs) != 2 || string(st.Docs[1].Value) != "4" {
		t.Errorf("loaded %+v, %v", st, err)
	}
	wantLog(t, b, feed, dev, 4)
	closeStore(t, b)
}

// Reading goes on while connections break.
func TestReadsAreRepeated(t *testing.T) {
	t.Parallel()
	p, feed, dev := newProxy(t), storetest.NewFeed(), storetest.Device(1)
	s := open(t, config(p.uri(), database(t)), opts(feed), mongostore.Tuning{Fold: time.Hour, Beat: time.Hour})
	for seq := range uint64(5) {
		must(t, add(t.Context(), s, dev, seq+1))
	}
	var finds atomic.Int32
	p.on(func(c command) action {
		if c.name != "find" {
			return action{}
		}
		n := finds.Add(1)
		return action{after: n == 1, before: n == 3 || n == 4}
	})
	wantLog(t, s, feed, dev, 5)
	if seq, err := s.SeqAt(t.Context(), dev, time.Unix(3, 0)); err != nil || seq != 3 {
		t.Errorf("the third second: seq %d, %v", seq, err)
	}
	p.on(nil)
	closeStore(t, s)
}

// Another process folds a device between two reads of one that loads it: what is loaded is one picture.
func TestLoadWhileOthersFold(t *testing.T) {
	t.Parallel()
	p, feed, db, dev := newProxy(t), storetest.NewFeed(), database(t), storetest.Device(1)
	never := mongostore.Tuning{Fold: time.Hour}
	a, b := open(t, config(p.uri(), db), opts(feed), never), open(t, config(uri, db), opts(feed), never)
	must(t, add(t.Context(), b, dev, 1))
	seq := uint64(1)
	for _, collection := range []string{"state", "devices", "commits"} {
		var once sync.Once
		p.on(func(c command) action {
			if c.name == "find" && c.collection == collection {
				once.Do(func() {
					seq++
					if err := add(context.Background(), b, dev, seq); err != nil {
						t.Error(err)
					}
					if _, err := b.Load(context.Background(), dev); err != nil { // folds
						t.Error(err)
					}
				})
			}
			return action{}
		})
		st, err := a.Load(t.Context(), dev)
		if err != nil || len(st.Docs) != 2 || string(st.Docs[1].Value) != fmt.Sprint(st.FoldedTo) || st.LastSeq != seq {
			t.Errorf("%s: at seq %d loaded %+v, %v", collection, seq, st, err)
		}
	}
	p.on(nil)
	closeStore(t, a)
	closeStore(t, b)
}

// Documents of a commit do not count before those of all commits in front of it do, whoever has them.
func TestDocumentsFollowInOrder(t *testing.T) {
	t.Parallel()
	feed, db, dev := storetest.NewFeed(), database(t), storetest.Device(1)
	never := mongostore.Tuning{Fold: time.Hour}
	a := open(t, config(uri, db), opts(feed), never)
	must(t, add(t.Context(), a, dev, 1))
	a.Kill()
	b := open(t, config(uri, db), opts(feed), never)
	must(t, add(t.Context(), b, dev, 2)) // without the documents of the first
	st, err := b.Load(t.Context(), dev)
	must(t, err)
	if st.FoldedTo != 0 || len(st.Docs) != 0 || len(st.Commits) != 2 {
		t.Fatalf("loaded %+v", st)
	}
	must(t, b.Fold(t.Context(), dev, st, append(entry(dev, 2).Docs, entry(dev, 1).Docs[1])))
	if st, err = b.Load(t.Context(), dev); err != nil || st.FoldedTo != 2 || len(st.Docs) != 2 || string(st.Docs[1].Value) != "2" {
		t.Errorf("loaded %+v, %v", st, err)
	}
	closeStore(t, b)
}

// Whoever looks for what is not published looks behind what is folded: nothing is folded before the feed has it, also when another
// process stored it.
func TestOnlyWhatIsPublishedIsFolded(t *testing.T) {
	t.Parallel()
	broken, feed, db, dev := storetest.NewFeed(), storetest.NewFeed(), database(t), storetest.Device(1)
	broken.Fail = func(c hub.Commit) error {
		if c.Seq == 1 {
			return nil
		}
		return errors.New("no answer")
	}
	never := mongostore.Tuning{Fold: time.Hour, Beat: time.Hour}
	a := open(t, config(uri, db), opts(feed), never)
	must(t, add(t.Context(), a, dev, 1)) // and so a knows the device
	b := open(t, config(uri, db), opts(&sameLog{broken, feed.LogID()}), never)
	must(t, add(t.Context(), b, dev, 2))
	b.Kill()
	st, err := a.Load(t.Context(), dev)
	must(t, err)
	must(t, a.Fold(t.Context(), dev, st, entry(dev, 2).Docs))
	if st, err = a.Load(t.Context(), dev); err != nil || st.FoldedTo != 2 {
		t.Errorf("loaded %+v, %v", st, err)
	}
	wantLog(t, a, feed, dev, 2)
	closeStore(t, a)
}

// Pages are bounded in bytes, too: a device whose commits are large is read like any other.
func TestLargeCommitsAreReadInPages(t *testing.T) {
	t.Parallel()
	feed, db, dev := storetest.NewFeed(), database(t), storetest.Device(1)
	s := open(t, config(uri, db), opts(feed), mongostore.Tuning{Fold: time.Hour})
	var all []store.Entry
	for seq := range uint64(12) {
		e := entry(dev, seq+1)
		e.Commit.Events[0].Content.Data = make([]byte, 400<<10)
		all = append(all, e)
	}
	must(t, errors.Join(s.Append(t.Context(), all)...))
	next := uint64(1)
	for c, err := range s.Commits(t.Context(), dev, 1) {
		must(t, err)
		if c.Seq != next || len(c.Events[0].Content.Data) != 400<<10 {
			t.Fatalf("seq %d, want %d", c.Seq, next)
		}
		next++
	}
	if next != 13 {
		t.Errorf("%d commits", next-1)
	}
	s.Kill() // and so nothing is folded
	s = open(t, config(uri, db), opts(feed), mongostore.Tuning{Fold: time.Hour})
	if st, err := s.Load(t.Context(), dev); err != nil || len(st.Commits) != 12 || st.LastSeq != 12 {
		t.Errorf("loaded %d commits up to seq %d, %v", len(st.Commits), st.LastSeq, err)
	}
	closeStore(t, s)
}
