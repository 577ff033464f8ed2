package pebblestore_test

import (
	"context"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestArchive(t *testing.T) {
	t.Parallel()
	storetest.RunArchive(t, func(t *testing.T) (store.Archive, func() store.Store) {
		fs := vfs.NewMem()
		s := open(t, fs, "db")
		t.Cleanup(func() { closeStore(t, s) })
		return s, func() store.Store {
			// What was copied keeps every invariant, also once it was opened again and served from.
			whole := func() {
				t.Helper()
				if err := s.Verify(context.Background(), func(p pebblestore.Problem) { t.Errorf("%s: %s", p.Where, p.What) }); err != nil {
					t.Error(err)
				}
			}
			whole()
			closeStore(t, s)
			s = open(t, fs, "db")
			whole()
			t.Cleanup(whole)
			return s
		}
	})
}
