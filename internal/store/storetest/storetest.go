// Package storetest is the conformance suite of internal/store: what every back end must do, sentence by sentence of the
// contract. A back end's tests call Run.
//
// It must not know any back end.
package storetest

import (
	"context"
	"encoding/binary"
	"reflect"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Commit makes a small commit of one event, different for each device and seq.
func Commit(dev hub.DeviceID, seq uint64) hub.Commit {
	c := hub.Commit{
		Device: dev, Seq: seq, Writer: "storetest", Number: seq, Time: int64(seq) * int64(time.Second), Owner: "alice", Generation: 1,
		Events: []hub.Event{{
			Kind: hub.ResourceChanged, Href: "/light/1", Version: seq - 1, Session: 1, Message: seq, Connection: "c1", User: "alice",
			Status: hub.StatusOK, ETag: []byte{1, byte(seq)}, Types: []string{"core.light"},
			Content: hub.Content{Type: "application/cbor", Format: hub.FormatCBOR, Data: []byte{0xa1, 0x61, 0x76, byte(seq)}},
		}},
	}
	binary.BigEndian.PutUint64(c.ID[8:], seq)
	copy(c.ID[:8], dev)
	return c
}

// SameCommit fails the test when the commits differ.
func SameCommit(tb testing.TB, got, want hub.Commit) {
	tb.Helper()
	if !reflect.DeepEqual(got, want) {
		tb.Errorf("commit is\n%+v, want\n%+v", got, want)
	}
}

// Run runs the suite. open gives an empty store and closes it at the test's end.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	t.Run("AppendThenLoad", func(t *testing.T) {
		s := open(t)
		ctx := context.Background()
		dev := hub.DeviceID("00000000-0000-0000-0000-000000000001")
		for seq := uint64(1); seq <= 3; seq++ {
			if errs := s.Append(ctx, []store.Entry{{Commit: Commit(dev, seq), Docs: []store.StateDoc{{Key: "dev", Value: []byte{byte(seq)}}}}}); errs[0] != nil {
				t.Fatal(errs[0])
			}
		}
		st, err := s.Load(ctx, dev)
		if err != nil || st.LastSeq != 3 || len(st.Docs) != 1 || st.Docs[0].Value[0] != 3 {
			t.Errorf("loaded %+v, %v", st, err)
		}
		entries, _, lagged, err := s.ReadFeed(ctx, hub.Position{}, 10)
		if err != nil || lagged || len(entries) != 3 {
			t.Errorf("feed: %d entries, lagged %v, %v", len(entries), lagged, err)
		}
		rev, err := s.Put(ctx, "c", store.Doc{Key: "k", Value: []byte("v"), Index: []string{"owner=a"}})
		if err != nil {
			t.Fatal(err)
		}
		for d, err := range s.Find(ctx, "c", "owner=a") {
			if err != nil || d.Rev != rev || d.Key != "k" {
				t.Errorf("found %+v, %v", d, err)
			}
		}
	})
}
