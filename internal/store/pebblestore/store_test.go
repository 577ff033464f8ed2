package pebblestore_test

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(childMode); mode != "" {
		child(mode)
		return
	}
	goleak.VerifyTestMain(m)
}

// open opens a store that must come up and stay up.
func open(tb testing.TB, fs vfs.FS, dir string) *pebblestore.Store {
	tb.Helper()
	s, err := pebblestore.Open(dir, pebblestore.Options{FS: fs, Fatal: func(err error) { tb.Errorf("the store failed: %v", err) }})
	if err != nil {
		tb.Fatalf("open: %v", err)
	}
	return s
}

func closeStore(tb testing.TB, s *pebblestore.Store) {
	tb.Helper()
	if err := s.Close(); err != nil {
		tb.Errorf("close: %v", err)
	}
}

func appendOne(ctx context.Context, s store.Store, c hub.Commit, docs ...store.StateDoc) error {
	return s.Append(ctx, []store.Entry{{Commit: c, Docs: docs}})[0]
}

// add appends commits first to last of a device.
func add(tb testing.TB, s store.Store, dev hub.DeviceID, first, last uint64) {
	tb.Helper()
	for seq := first; seq <= last; seq++ {
		if err := appendOne(tb.Context(), s, storetest.Commit(dev, seq), store.StateDoc{Key: "last", Value: fmt.Append(nil, seq)}); err != nil {
			tb.Fatalf("append %s/%d: %v", dev, seq, err)
		}
	}
}

func wantCode(t *testing.T, what string, err error, kind hub.Kind, code string) {
	t.Helper()
	if got, _ := hub.Public(err); !hub.IsKind(err, kind) || got != code {
		t.Errorf("%s: got %v, want kind %s, code %s", what, err, kind, code)
	}
}

// verify fails the test for every problem of the store.
func verify(tb testing.TB, s *pebblestore.Store) {
	tb.Helper()
	if err := s.Verify(tb.Context(), func(p pebblestore.Problem) { tb.Errorf("%s: %s", p.Where, p.What) }); err != nil {
		tb.Errorf("verify: %v", err)
	}
}

// What was read just now is not read from the disk again, also when the write buffers are as large as they get.
func TestBlocksAreCached(t *testing.T) {
	t.Parallel()
	s := open(t, vfs.NewMem(), "data")
	defer closeStore(t, s)
	dev := storetest.Device(1)
	add(t, s, dev, 1, 10)
	if err := s.Flush(); err != nil {
		t.Fatal(err)
	}
	large := make([]byte, 256<<10)
	for seq := uint64(1); seq <= 64; seq++ { // twice what the buffers hold
		doc := store.StateDoc{Key: "large", Value: large}
		if err := appendOne(t.Context(), s, storetest.Commit(storetest.Device(2), seq), doc); err != nil {
			t.Fatal(err)
		}
	}
	read := func() int64 {
		before := s.BlocksRead()
		if _, err := s.Load(t.Context(), dev); err != nil {
			t.Fatal(err)
		}
		return s.BlocksRead() - before
	}
	deadline := time.Now().Add(10 * time.Second)
	for n := read(); n != 0; n = read() { // a compaction may come in between
		if time.Now().After(deadline) {
			t.Fatalf("%d blocks are read each time", n)
		}
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	for name, prepare := range map[string]func(*pebblestore.Store){
		"newest commits from memory": func(*pebblestore.Store) {},
		"all from the disk":          (*pebblestore.Store).Forget,
	} {
		t.Run(name, func(t *testing.T) {
			storetest.Run(t, func(t *testing.T) store.Store {
				s := open(t, vfs.NewMem(), "store")
				prepare(s)
				t.Cleanup(func() {
					if t.Failed() {
						_ = s.Close()
						return
					}
					check, cancel := context.WithTimeout(context.Background(), time.Minute)
					defer cancel()
					if err := s.Verify(check, func(p pebblestore.Problem) { t.Errorf("%s: %s", p.Where, p.What) }); err != nil {
						t.Errorf("verify: %v", err)
					}
					closeStore(t, s)
				})
				return s
			})
		})
	}
}

func TestEverythingIsThereAfterReopening(t *testing.T) {
	t.Parallel()
	dir, ctx, dev := t.TempDir(), t.Context(), storetest.Device(1)
	s := open(t, nil, dir)
	add(t, s, dev, 1, 3)
	rev, err := s.Put(ctx, "c", store.Doc{Key: "k", Value: []byte("v"), Index: []string{"i"}})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.TrimFeed(ctx, 1<<30); err != nil {
		t.Fatal(err)
	}
	add(t, s, dev, 4, 4)
	id := s.LogID()
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)

	s = open(t, nil, dir)
	defer closeStore(t, s)
	if s.LogID() != id {
		t.Errorf("log ID changed from %s to %s", id, s.LogID())
	}
	if again, err := s.Head(ctx); err != nil || again != head {
		t.Errorf("head is %v, %v, want %v", again, err, head)
	}
	if _, _, lagged, err := s.ReadFeed(ctx, hub.Position{}, 1); err != nil || !lagged {
		t.Errorf("the feed forgot that it was trimmed: %v, %v", lagged, err)
	}
	st, err := s.Load(ctx, dev)
	if err != nil || st.LastSeq != 4 || len(st.Docs) != 1 || string(st.Docs[0].Value) != "4" {
		t.Errorf("loaded %+v, %v", st, err)
	}
	next, err := s.Put(ctx, "c", store.Doc{Key: "k", Rev: rev})
	if err != nil || next <= rev {
		t.Errorf("the next revision after %d is %d, %v", rev, next, err)
	}
	add(t, s, dev, 5, 6)
	verify(t, s)
}

func TestNewerDataIsRefused(t *testing.T) {
	t.Parallel()
	fs := vfs.NewMem()
	s := open(t, fs, "store")
	if err := s.RawSet(pebblestore.SchemaKey, binary.BigEndian.AppendUint32(nil, 2)); err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	for range 2 { // and the lock is free again after the refusal
		_, err := pebblestore.Open("store", pebblestore.Options{FS: fs})
		wantCode(t, "open", err, hub.Precondition, "data-too-new")
	}
}

func TestDamagedRecordsAreRefused(t *testing.T) {
	t.Parallel()
	for what, key := range map[string][]byte{"schema": pebblestore.SchemaKey, "state": pebblestore.StateKey} {
		fs := vfs.NewMem()
		s := open(t, fs, "store")
		if err := s.RawSet(key, []byte("odd")); err != nil {
			t.Fatal(err)
		}
		closeStore(t, s)
		if s, err := pebblestore.Open("store", pebblestore.Options{FS: fs}); err == nil {
			t.Errorf("a store with a damaged %s record was opened", what)
			closeStore(t, s)
		}
	}
}

func TestDataFolderInUse(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s := open(t, nil, dir)
	_, err := pebblestore.Open(dir, pebblestore.Options{})
	wantCode(t, "the same process", err, hub.Precondition, "data-folder-in-use")
	if out, code := runChild(t, "open", dir); code != 3 {
		t.Errorf("another process opened it too, or failed otherwise: code %d, %s", code, out)
	}
	add(t, s, storetest.Device(1), 1, 1) // the refused ones did no harm
	closeStore(t, s)
	if out, code := runChild(t, "open", dir); code != 0 {
		t.Errorf("another process, after it was closed: code %d, %s", code, out)
	}
}

// The clock may step back; days and feed positions do not.
func TestDaysNeverGoBack(t *testing.T) {
	t.Parallel()
	fs := vfs.NewMem()
	s := open(t, fs, "store")
	add(t, s, storetest.Device(1), 1, 1)
	before, err := s.Head(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	closeStore(t, s)
	synctest.Test(t, func(t *testing.T) { // the bubble's clock starts in the year 2000
		s := open(t, fs, "store")
		defer closeStore(t, s)
		add(t, s, storetest.Device(1), 2, 2)
		if head, err := s.Head(t.Context()); err != nil || head.Day != before.Day || head.Compare(before) <= 0 {
			t.Errorf("after %v the clock went back and the head is %v, %v", before, head, err)
		}
		entries, _, _, err := s.ReadFeed(t.Context(), before, 5)
		if err != nil || len(entries) != 1 || entries[0].Commit.Seq != 2 {
			t.Errorf("after %v comes %v, %v", before, entries, err)
		}
	})
}

func TestDaysGoOn(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		fs := vfs.NewMem()
		var positions []hub.Position
		put := func(s *pebblestore.Store) {
			t.Helper()
			seq := uint64(len(positions) + 1)
			add(t, s, storetest.Device(1), seq, seq)
			head, err := s.Head(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			positions = append(positions, head)
		}
		// A day ends while the store is open, and another while it is not: an open one has timers that run ten times a second.
		time.Sleep(24*time.Hour - time.Second)
		s := open(t, fs, "store")
		put(s)
		time.Sleep(2 * time.Second)
		put(s)
		closeStore(t, s)
		time.Sleep(24 * time.Hour)
		s = open(t, fs, "store")
		defer closeStore(t, s)
		put(s)
		if positions[1].Day != positions[0].Day+1 || positions[2].Day != positions[0].Day+2 || positions[2].N != 3 {
			t.Errorf("positions are %v", positions)
		}
		// Only whole days before the given one go.
		if err := s.TrimFeed(t.Context(), positions[1].Day); err != nil {
			t.Fatal(err)
		}
		if _, _, lagged, err := s.ReadFeed(t.Context(), hub.Position{}, 5); err != nil || !lagged {
			t.Errorf("from the start: lagged %v, %v", lagged, err)
		}
		entries, _, lagged, err := s.ReadFeed(t.Context(), positions[0], 5)
		if err != nil || lagged || len(entries) != 2 {
			t.Errorf("from the last trimmed position: %v, lagged %v, %v", entries, lagged, err)
		}
		verify(t, s)
	})
}

func TestClosedStoreRefuses(t *testing.T) {
	t.Parallel()
	s := open(t, vfs.NewMem(), "store")
	ctx, dev := t.Context(), storetest.Device(1)
	add(t, s, dev, 1, 600)
	waits := make(chan error, 1)
	head, err := s.Head(ctx)
	if err != nil {
		t.Fatal(err)
	}
	go func() { waits <- s.WaitFeed(ctx, head) }()
	n, failed := 0, error(nil)
	for _, err := range s.Commits(ctx, dev, 1) { // an iteration under way ends
		if n == 0 {
			closeStore(t, s)
		}
		n++
		failed = err
	}
	wantCode(t, "an iteration", failed, hub.Unavailable, "store-closed")
	wantCode(t, "a wait", <-waits, hub.Unavailable, "store-closed")
	_, loadErr := s.Load(ctx, dev)
	_, putErr := s.Put(ctx, "c", store.Doc{Key: "k"})
	for what, err := range map[string]error{
		"Append": appendOne(ctx, s, storetest.Commit(dev, 601)), "Load": loadErr, "Put": putErr,
		"WaitFeed": s.WaitFeed(ctx, head), "TrimFeed": s.TrimFeed(ctx, 1), "Checkpoint": s.Checkpoint(ctx, "copy"),
	} {
		wantCode(t, what, err, hub.Unavailable, "store-closed")
	}
	closeStore(t, s) // closing twice is fine
	_, err = s.DiskBytes(ctx)
	wantCode(t, "DiskBytes", err, hub.Unavailable, "store-closed")
}

// Close answers all who wait, with what became of their write.
func TestCloseWhileWriting(t *testing.T) {
	t.Parallel()
	fs := vfs.NewMem()
	s := open(t, fs, "store")
	var wg sync.WaitGroup
	var stored [16]uint64
	running := make(chan struct{}, len(stored))
	for i := range stored {
		wg.Go(func() {
			for seq := uint64(1); ; seq++ {
				err := appendOne(context.Background(), s, storetest.Commit(storetest.Device(i), seq))
				if err != nil {
					if !hub.IsKind(err, hub.Unavailable) {
						t.Errorf("writer %d: %v", i, err)
					}
					return
				}
				stored[i] = seq
				if seq == 20 {
					running <- struct{}{}
				}
			}
		})
	}
	for range stored {
		<-running
	}
	closeStore(t, s)
	wg.Wait()
	s = open(t, fs, "store")
	defer closeStore(t, s)
	for i, want := range stored {
		if st, err := s.Load(t.Context(), storetest.Device(i)); err != nil || st.LastSeq != want {
			t.Errorf("writer %d was told %d commits are stored, there are %d, %v", i, want, st.LastSeq, err)
		}
	}
	verify(t, s)
}

func TestCheckpointOfARunningStore(t *testing.T) {
	s := open(t, nil, t.TempDir())
	defer closeStore(t, s)
	copyDir := t.TempDir() + "/deep/copy"
	var wg sync.WaitGroup
	stop, running := make(chan struct{}), make(chan struct{}, 4)
	for i := range 4 {
		wg.Go(func() {
			for seq := uint64(1); ; seq++ {
				select {
				case <-stop:
					return
				default:
				}
				if err := appendOne(context.Background(), s, storetest.Commit(storetest.Device(i), seq)); err != nil {
					t.Errorf("writer %d: %v", i, err)
					return
				}
				if seq == 50 {
					running <- struct{}{}
				}
			}
		})
	}
	for range 4 {
		<-running
	}
	add(t, s, storetest.Device(9), 1, 5)
	err := s.Checkpoint(t.Context(), copyDir)
	close(stop)
	wg.Wait()
	if err != nil {
		t.Fatal(err)
	}
	wantCode(t, "a second copy there", s.Checkpoint(t.Context(), copyDir), hub.Precondition, "backup-exists")

	c := open(t, nil, copyDir)
	verify(t, c)
	for i, want := range map[int]uint64{0: 50, 1: 50, 2: 50, 3: 50, 9: 5} {
		if st, err := c.Load(t.Context(), storetest.Device(i)); err != nil || st.LastSeq < want {
			t.Errorf("the copy has %d commits of device %d, %v, want at least %d", st.LastSeq, i, err, want)
		}
	}
	if c.LogID() != s.LogID() {
		t.Error("the copy has another log ID")
	}
	closeStore(t, c)
	if err := pebblestore.Renew(copyDir); err != nil {
		t.Fatal(err)
	}
	c = open(t, nil, copyDir)
	defer closeStore(t, c)
	if c.LogID() == s.LogID() || c.LogID() == "" {
		t.Errorf("the renewed copy's log ID is %q, the original's %q", c.LogID(), s.LogID())
	}
	add(t, c, storetest.Device(9), 6, 7)
	verify(t, c)
}

func TestMetricsSayWhatHappens(t *testing.T) {
	t.Parallel()
	reg := prometheus.NewRegistry()
	fs := vfs.NewMem()
	for range 2 { // the second time under the same registerer
		s, err := pebblestore.Open("store", pebblestore.Options{FS: fs, Registerer: reg})
		if err != nil {
			t.Fatal(err)
		}
		st, err := s.Load(t.Context(), storetest.Device(1))
		if err != nil {
			t.Fatal(err)
		}
		add(t, s, storetest.Device(1), st.LastSeq+1, st.LastSeq+3)
		if err := appendOne(t.Context(), s, storetest.Commit(storetest.Device(1), 1)); err == nil {
			t.Error("no conflict")
		}
		families, err := reg.Gather()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]float64{}
		for _, f := range families {
			for _, m := range f.GetMetric() {
				name := f.GetName()
				for _, l := range m.GetLabel() {
					name += "/" + l.GetValue()
				}
				got[name] = m.GetCounter().GetValue() + m.GetGauge().GetValue() + float64(m.GetHistogram().GetSampleCount())
			}
		}
		if got["coaphub_store_events_total"] != 3 || got["coaphub_store_refused_total/conflict"] != 1 ||
			got["coaphub_store_batch_seconds"] != 3 || got["coaphub_store_disk_bytes"] == 0 {
			t.Errorf("metrics are %v", got)
		}
		closeStore(t, s)
	}
	if families, err := reg.Gather(); err != nil || len(families) != 0 {
		t.Errorf("a closed store still shows %d metrics, %v", len(families), err)
	}
}

var errInjected = errors.New("injected")
