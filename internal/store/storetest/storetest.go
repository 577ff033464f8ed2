// Package storetest is the conformance suite of internal/store: what every back end must do, sentence by sentence of the
// contract. A back end's tests call Run.
//
// It must not know any back end.
package storetest

import (
	"context"
	"encoding/binary"
	"fmt"
	"iter"
	"reflect"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Run runs the suite. open gives an empty store of its own each time it is called, and sees to its end.
func Run(t *testing.T, open func(t *testing.T) store.Store) {
	for _, group := range []map[string]func(*testing.T, store.Store){logTests, storeFeedTests, documentTests} {
		for name, test := range group {
			t.Run(name, func(t *testing.T) { test(t, open(t)) })
		}
	}
	runFeed(t, func(t *testing.T) source { return sourceOf(open(t)) })
}

// Device returns the n-th device's ID; they sort as their numbers do.
func Device(n int) hub.DeviceID {
	return hub.DeviceID(fmt.Sprintf("00000000-0000-4000-8000-%012x", n))
}

// Commit makes a small commit of one event, different for each device and seq. Its time is seq seconds after 1970.
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
	copy(c.ID[:8], dev[len(dev)-8:])
	return c
}

// FullCommit makes a commit in which every field of every type is set.
func FullCommit(dev hub.DeviceID, seq uint64) hub.Commit {
	c := Commit(dev, seq)
	c.Events[0].Correlation = "corr"
	c.Events = append(c.Events,
		hub.Event{Kind: hub.Registered, User: "bob"},
		hub.Event{Kind: hub.LinksPublished, Version: 1 << 40, Links: []hub.Link{{
			Href: "/ä/1", Types: []string{"a", "b"}, Interfaces: []string{"oic.if.a"}, Anchor: "ocf://x", Title: "Lamp",
			ContentTypes: []string{"application/cbor"}, Policy: 3, Endpoints: []hub.Endpoint{{URI: "coaps://[::1]:5684", Priority: 7}},
			ValidUntil: 1 << 60,
		}, {Href: "/b"}}},
		hub.Event{Kind: hub.LinksUnpublished, Hrefs: []hub.Href{"/a", "/b"}},
		hub.Event{Kind: hub.MetadataUpdated, Metadata: &hub.Metadata{
			Connection: hub.Connection{
				Online: true, ID: "c2", ConnectedAt: 5, Protocol: hub.ProtocolCoAPSTCP, Service: "gw", LocalEndpoints: []string{"coap://x"},
			},
			Twin:    hub.Twin{Enabled: true, State: hub.TwinSyncing, SyncingAt: 1, InSyncAt: 2, ForcedAt: -3},
			Contact: hub.Contact{Interval: 4, Next: 5},
		}},
		hub.Event{Kind: hub.ResourceChanged, Href: "/none", Content: hub.Content{Format: hub.FormatNone}},
		hub.Event{Kind: hub.CommandEnded, Href: "/none", Command: &hub.CommandEvent{
			Kind: hub.CommandRetrieve, End: hub.CommandExpired, Interface: "oic.if.a", ETags: [][]byte{{1, 2}, {3}}, ValidUntil: 1 << 60,
			Key: "key", Digest: []byte{9}, Session: 1 << 40, Code: 0x45, IfMatch: [][]byte{nil, {1}},
		}},
	)
	return c
}

// SameCommit fails the test when the commits differ.
func SameCommit(tb testing.TB, got, want hub.Commit) {
	tb.Helper()
	if !reflect.DeepEqual(got, want) {
		tb.Errorf("commit is\n%+v, want\n%+v", got, want)
	}
}

// deadline ends a test's context before go test would end the test: waits that never end say where they hang.
func deadline(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// add appends commits first to last of a device, one call each, and fails the test when one is refused.
func add(t *testing.T, s store.Store, dev hub.DeviceID, first, last uint64) {
	t.Helper()
	for seq := first; seq <= last; seq++ {
		if err := appendOne(t.Context(), s, Commit(dev, seq)); err != nil {
			t.Fatalf("append %s/%d: %v", dev, seq, err)
		}
	}
}

func appendOne(ctx context.Context, s store.Store, c hub.Commit, docs ...store.StateDoc) error {
	return s.Append(ctx, []store.Entry{{Commit: c, Docs: docs}})[0]
}

// collect reads an iteration to its end; an error must be its last element.
func collect[T any](t *testing.T, it iter.Seq2[T, error]) ([]T, error) {
	t.Helper()
	var out []T
	var failed error
	for v, err := range it {
		if failed != nil {
			t.Fatal("an error was not the last element")
		}
		if err != nil {
			failed = err
			continue
		}
		out = append(out, v)
	}
	return out, failed
}

// must is collect without an error.
func must[T any](t *testing.T, it iter.Seq2[T, error]) []T {
	t.Helper()
	out, err := collect(t, it)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func seqs(commits []hub.Commit) []uint64 {
	out := make([]uint64, len(commits))
	for i, c := range commits {
		out[i] = c.Seq
	}
	return out
}

func wantKind(t *testing.T, what string, err error, kind hub.Kind) {
	t.Helper()
	if !hub.IsKind(err, kind) {
		t.Errorf("%s: got %v, want an error of kind %s", what, err, kind)
	}
}
