package bundle

import (
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

func openTestStore(t *testing.T) *pebblestore.Store {
	t.Helper()
	s, err := pebblestore.Open(filepath.Join(t.TempDir(), "store"), pebblestore.Options{MinFree: -1, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestSecretsAreFilesAndNotInTheStore(t *testing.T) {
	t.Parallel()
	ctx, s, dir := t.Context(), openTestStore(t), t.TempDir()
	docs := &withSecrets{Documents: s, dir: dir}

	put := func(key, value string, rev uint64) (uint64, error) {
		return docs.Put(ctx, secretCollection, store.Doc{Key: key, Value: []byte(value), Rev: rev})
	}
	if d, err := docs.Get(ctx, secretCollection, "master"); err != nil || d.Rev != 0 {
		t.Errorf("before there is one: %+v, %v", d, err)
	}
	rev, err := put("master", "one", 0)
	if err != nil || rev == 0 {
		t.Fatalf("put: %d, %v", rev, err)
	}
	if _, err := put("master", "two", 0); !hub.IsKind(err, hub.Conflict) {
		t.Errorf("a second maker gets %v", err)
	}
	if rev, err = put("master", "two", rev); err != nil {
		t.Fatal(err)
	}
	// Another start reads the same.
	docs = &withSecrets{Documents: s, dir: dir}
	if d, err := docs.Get(ctx, secretCollection, "master"); err != nil || string(d.Value) != "two" || d.Rev != rev {
		t.Errorf("after a restart: %+v, %v", d, err)
	}
	if d, err := s.Get(ctx, secretCollection, "master"); err != nil || d.Rev != 0 {
		t.Errorf("the store has it: %+v, %v", d, err)
	}
	if m := mode(t, filepath.Join(dir, "oauth-master.json")); m != 0o600 {
		t.Errorf("the file has mode %o", m)
	}
	if err := docs.Delete(ctx, secretCollection, "master", rev-1); !hub.IsKind(err, hub.Conflict) {
		t.Errorf("deleting an old revision: %v", err)
	}
	if err := docs.Delete(ctx, secretCollection, "master", rev); err != nil {
		t.Error(err)
	}
	for _, key := range []string{"", "../x", ".x", "a/b"} {
		if _, err := put(key, "x", 0); err == nil {
			t.Errorf("the name %q is accepted", key)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "oauth-bad.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := docs.Get(ctx, secretCollection, "bad"); code(err) != "data-damaged" {
		t.Errorf("a damaged file: %v", err)
	}

	// Everything else is the store's.
	if rev, err = docs.Put(ctx, "accounts", store.Doc{Key: "a", Value: []byte("v"), Index: []string{"i=1"}}); err != nil {
		t.Fatal(err)
	}
	n := 0
	for d, err := range docs.Find(ctx, "accounts", "i=1") {
		n++
		if err != nil || d.Key != "a" {
			t.Errorf("found %+v, %v", d, err)
		}
	}
	for range docs.Range(ctx, "accounts", "", "") {
		n++
	}
	if err := docs.Delete(ctx, "accounts", "a", rev); err != nil || n != 2 {
		t.Errorf("found %d, delete: %v", n, err)
	}
}
