package pebblestore_test

import (
	"context"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open opens a store that must come up, on fs.
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

func TestConformance(t *testing.T) {
	storetest.Run(t, func(t *testing.T) store.Store {
		s := open(t, vfs.NewMem(), "store")
		t.Cleanup(func() { closeStore(t, s) })
		return s
	})
}

func TestCommitsAreThereAfterReopening(t *testing.T) {
	dir := t.TempDir()
	s := open(t, nil, dir)
	ctx := context.Background()
	dev := hub.DeviceID("11111111-2222-3333-4444-555555555555")
	want := storetest.Commit(dev, 1)
	if errs := s.Append(ctx, []store.Entry{{Commit: want, Docs: []store.StateDoc{{Key: "d", Value: []byte("v")}}}}); errs[0] != nil {
		t.Fatal(errs[0])
	}
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
	st, err := s.Load(ctx, dev)
	if err != nil || st.LastSeq != 1 || len(st.Docs) != 1 || string(st.Docs[0].Value) != "v" {
		t.Errorf("loaded %+v, %v", st, err)
	}
	for c, err := range s.Commits(ctx, dev, 1) {
		if err != nil {
			t.Fatal(err)
		}
		storetest.SameCommit(t, c, want)
	}
}
