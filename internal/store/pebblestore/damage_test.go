package pebblestore_test

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// TestADamagedFileFailsWhatNeedsIt turns one byte of a file around, as a dying disk does: reading over it is an error that is
// nobody's but ours, everything else goes on, and the process lives.
func TestADamagedFileFailsWhatNeedsIt(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var log bytes.Buffer
	open := func() *pebblestore.Store {
		s, err := pebblestore.Open(dir, pebblestore.Options{
			Log: slog.New(slog.NewTextHandler(&log, nil)), MinFree: -1, Fatal: func(err error) { t.Errorf("the process would end: %v", err) },
		})
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	shut := func(s *pebblestore.Store) {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	}
	const docs = 500
	s := open()
	value := make([]byte, 1024)
	noise := rand.NewChaCha8([32]byte{1})
	for i := range docs {
		_, _ = noise.Read(value) // never fails; what cannot be compressed keeps its place in the file
		if _, err := s.Put(t.Context(), "c", store.Doc{Key: fmt.Sprintf("%04d", i), Value: value}); err != nil {
			t.Fatal(err)
		}
	}
	shut(s)
	shut(open()) // makes a table of the log
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil || len(tables) != 1 {
		t.Fatalf("tables %v, %v", tables, err)
	}
	b, err := os.ReadFile(tables[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 0xff
	if err := os.WriteFile(tables[0], b, 0o600); err != nil {
		t.Fatal(err)
	}

	s = open()
	defer shut(s)
	bad := 0
	for i := range docs {
		_, err := s.Get(t.Context(), "c", fmt.Sprintf("%04d", i))
		if err == nil {
			continue
		}
		bad++
		if k := hub.KindOf(err); k != hub.Internal && k != hub.Unavailable {
			t.Errorf("document %d: %v", i, err)
		}
	}
	if bad == 0 || bad > docs/10 {
		t.Errorf("%d of %d documents cannot be read", bad, docs)
	}
	if err := s.Verify(t.Context(), func(pebblestore.Problem) {}); err == nil || !strings.Contains(err.Error(), "corruption") {
		t.Errorf("verify: %v", err)
	}
	if err := appendOne(t.Context(), s, storetest.Commit(storetest.Device(1), 1)); err != nil {
		t.Errorf("writing beside the damage: %v", err)
	}
	if !strings.Contains(log.String(), "restore a backup") || !strings.Contains(log.String(), filepath.Base(tables[0])) {
		t.Errorf("the log does not name the file: %s", log.String())
	}
}
