package pebblestore_test

import (
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// Each damage is done to a good store behind its back, and found with the name of the record.
func TestVerifyFindsEachDamage(t *testing.T) {
	t.Parallel()
	dev := storetest.Device(1)
	d, err := pebblestore.MustDevice(dev)
	if err != nil {
		t.Fatal(err)
	}
	other := storetest.Commit(dev, 3)
	other.Time = 1
	empty := storetest.Commit(dev, 3)
	empty.Events = nil
	ref := func(seq uint64) []byte { return binary.BigEndian.AppendUint64(append([]byte(nil), d[:]...), seq) }
	for name, c := range map[string]struct {
		damage func(s *pebblestore.Store, head hub.Position) error
		where  string
	}{
		"a hole in a log": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawDelete(pebblestore.CommitKey(nil, d, 3))
		}, "commit " + string(dev) + "/4"},
		"an undecodable commit": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.CommitKey(nil, d, 3), []byte("odd"))
		}, "commit " + string(dev) + "/3"},
		"an empty commit": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.CommitKey(nil, d, 3), store.AppendCommit(nil, &empty))
		}, "commit " + string(dev) + "/3"},
		"a time that goes back": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.CommitKey(nil, d, 3), store.AppendCommit(nil, &other))
		}, "commit " + string(dev) + "/3"},
		"a commit the feed lacks": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.CommitKey(nil, d, 6), store.AppendCommit(nil, &other))
		}, "commit " + string(dev) + "/6"},
		"a short commit key": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet([]byte{1, 2, 3}, []byte("x"))
		}, "key 010203"},
		"a document beyond the log": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.StateDoc(nil, d, "last"), binary.BigEndian.AppendUint64(nil, 99))
		}, "state " + string(dev) + "/last"},
		"a short document": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.StateDoc(nil, d, "last"), []byte("x"))
		}, "key 02"},
		"a position missing in the feed": {func(s *pebblestore.Store, head hub.Position) error {
			head.N -= 2
			return s.RawDelete(pebblestore.FeedKey(nil, head))
		}, "feed "},
		"the last position missing": {func(s *pebblestore.Store, head hub.Position) error {
			return s.RawDelete(pebblestore.FeedKey(nil, head))
		}, "feed"},
		"a position beyond the head": {func(s *pebblestore.Store, head hub.Position) error {
			head.N++
			return s.RawSet(pebblestore.FeedKey(nil, head), ref(5))
		}, "feed "},
		"a position of no commit": {func(s *pebblestore.Store, head hub.Position) error {
			return s.RawSet(pebblestore.FeedKey(nil, head), ref(77))
		}, "feed "},
		"a position of no device": {func(s *pebblestore.Store, head hub.Position) error {
			return s.RawSet(pebblestore.FeedKey(nil, head), make([]byte, 24))
		}, "feed "},
		"a damaged position": {func(s *pebblestore.Store, head hub.Position) error {
			return s.RawSet(pebblestore.FeedKey(nil, head), []byte("x"))
		}, "key 03"},
		"an undecodable document": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.DocKey("c", "k"), []byte("x"))
		}, "document c/k"},
		"a revision never given": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.DocKey("c", "k"), append(binary.BigEndian.AppendUint64(nil, 1<<40), 0))
		}, "document c/k"},
		"a secondary key too few": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawDelete(pebblestore.IndexKey("c", "owner=a", "k"))
		}, "document c/k"},
		"a secondary key too many": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet(pebblestore.IndexKey("c", "owner=b", "k"), nil)
		}, "index c/owner=b"},
		"a damaged secondary key": {func(s *pebblestore.Store, _ hub.Position) error {
			return s.RawSet([]byte{5, 1, 'c', 0}, nil)
		}, "key 05"},
	} {
		t.Run(name, func(t *testing.T) {
			fs := vfs.NewMem()
			s := open(t, fs, "store")
			add(t, s, storetest.Device(0), 1, 2)
			add(t, s, dev, 1, 5)
			if _, err := s.Put(t.Context(), "c", store.Doc{Key: "k", Index: []string{"owner=a"}}); err != nil {
				t.Fatal(err)
			}
			verify(t, s)
			head, err := s.Head(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := c.damage(s, head); err != nil {
				t.Fatal(err)
			}
			closeStore(t, s)
			s = open(t, fs, "store")
			defer closeStore(t, s)
			var found []string
			err = s.Verify(t.Context(), func(p pebblestore.Problem) { found = append(found, p.Where+": "+p.What) })
			if err != nil {
				t.Errorf("a damage that can be read is no error: %v", err)
			}
			for _, p := range found {
				if strings.HasPrefix(p, c.where) {
					return
				}
			}
			t.Errorf("nothing at %q, found %q", c.where, found)
		})
	}
}

func TestVerifyEndsWithTheContext(t *testing.T) {
	t.Parallel()
	s := open(t, vfs.NewMem(), "store")
	defer closeStore(t, s)
	add(t, s, storetest.Device(1), 1, 3000)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Verify(ctx, func(pebblestore.Problem) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
}
