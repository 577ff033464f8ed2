package store_test

import (
	"bytes"
	"reflect"
	"testing"

	"pgregory.net/rapid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestCommitsSurviveTheirStoredForm(t *testing.T) {
	t.Parallel()
	for _, want := range []hub.Commit{
		storetest.Commit(storetest.Device(1), 1),
		storetest.FullCommit(storetest.Device(1), 1<<63),
		{Events: []hub.Event{}},
		{Time: -1, Number: 1<<64 - 1, Events: []hub.Event{{Kind: 255, Status: 255, Content: hub.Content{Format: -1 << 31}}}},
	} {
		got, err := store.DecodeCommit(store.AppendCommit(nil, &want))
		if err != nil {
			t.Errorf("%+v: %v", want, err)
			continue
		}
		got.Device, got.Seq = want.Device, want.Seq // they are the key
		storetest.SameCommit(t, got, want)
		if when, err := store.CommitTime(store.AppendCommit(nil, &want)); err != nil || when != want.Time {
			t.Errorf("time %d, %v, want %d", when, err, want.Time)
		}
	}
}

// Every field of hub's types is set in turn, found by reflection: a field that is added to them and forgotten here fails.
func TestNoFieldIsForgotten(t *testing.T) {
	t.Parallel()
	full := storetest.FullCommit(storetest.Device(1), 1)
	for _, v := range []any{full.Events[2].Links[0], *full.Events[4].Metadata, *full.Events[6].Command} {
		eachField(reflect.ValueOf(v), func(path string, f reflect.Value) {
			if f.IsZero() {
				t.Errorf("storetest.FullCommit leaves %T%s empty, so that nothing tests that it is stored", v, path)
			}
		})
	}
	set := map[string]bool{}
	for _, e := range full.Events {
		v := reflect.ValueOf(e)
		for i := range v.NumField() {
			if !v.Field(i).IsZero() {
				set[v.Type().Field(i).Name] = true
			}
		}
	}
	for i := range reflect.TypeFor[hub.Event]().NumField() {
		if name := reflect.TypeFor[hub.Event]().Field(i).Name; !set[name] {
			t.Errorf("storetest.FullCommit has no event with %s, so that nothing tests that it is stored", name)
		}
	}
}

func eachField(v reflect.Value, f func(path string, field reflect.Value)) {
	for i := range v.NumField() {
		name := "." + v.Type().Field(i).Name
		if v.Field(i).Kind() == reflect.Struct {
			eachField(v.Field(i), func(path string, field reflect.Value) { f(name+path, field) })
			continue
		}
		f(name, v.Field(i))
	}
}

func TestDamagedCommitsAreRefused(t *testing.T) {
	t.Parallel()
	full := storetest.FullCommit(storetest.Device(1), 1)
	good := store.AppendCommit(nil, &full)
	for n := range len(good) {
		if _, err := store.DecodeCommit(good[:n]); err == nil {
			t.Errorf("%d of %d bytes were accepted", n, len(good))
		}
	}
	if _, err := store.DecodeCommit(append(bytes.Clone(good), 0)); err == nil {
		t.Error("a byte too many was accepted")
	}
	newer := bytes.Clone(good)
	newer[0]++
	if _, err := store.DecodeCommit(newer); err == nil {
		t.Error("another format was accepted")
	}
	for _, b := range [][]byte{nil, {}, {1}, {2, 0}, {1, 0x80}} {
		if _, err := store.CommitTime(b); err == nil {
			t.Errorf("the time of %x was read", b)
		}
	}
}

func TestAnyCommitSurvives(t *testing.T) {
	t.Parallel()
	texts := func(t *rapid.T, what string) []string {
		if out := rapid.SliceOfN(rapid.StringN(0, 8, 32), 0, 3).Draw(t, what); len(out) > 0 {
			return out
		}
		return nil
	}
	rapid.Check(t, func(t *rapid.T) {
		want := hub.Commit{Events: []hub.Event{}, Writer: rapid.String().Draw(t, "writer"), Time: rapid.Int64().Draw(t, "time")}
		for range rapid.IntRange(0, 5).Draw(t, "events") {
			e := hub.Event{
				Kind: hub.EventKind(rapid.Byte().Draw(t, "kind")), Href: hub.Href(rapid.String().Draw(t, "href")),
				Version: rapid.Uint64().Draw(t, "version"), Message: rapid.Uint64().Draw(t, "message"),
				Correlation: rapid.String().Draw(t, "correlation"), Types: texts(t, "types"),
				Content: hub.Content{Type: rapid.String().Draw(t, "type"), Format: rapid.Int32().Draw(t, "format")},
			}
			if data := rapid.SliceOf(rapid.Byte()).Draw(t, "data"); len(data) > 0 {
				e.Content.Data = data
			}
			for range rapid.IntRange(0, 2).Draw(t, "links") {
				e.Links = append(e.Links, hub.Link{
					Title: rapid.String().Draw(t, "title"), Interfaces: texts(t, "if"), Policy: rapid.Int32().Draw(t, "policy"),
					ValidUntil: rapid.Int64().Draw(t, "until"),
				})
			}
			want.Events = append(want.Events, e)
		}
		got, err := store.DecodeCommit(store.AppendCommit(nil, &want))
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("got %+v, %v, want %+v", got, err, want)
		}
	})
}

// FuzzDecodeCommit: no bytes make it panic, and what it accepts is written back to something that reads the same.
func FuzzDecodeCommit(f *testing.F) {
	for _, c := range []hub.Commit{storetest.Commit(storetest.Device(1), 1), storetest.FullCommit(storetest.Device(1), 2)} {
		f.Add(store.AppendCommit(nil, &c))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		c, err := store.DecodeCommit(b)
		if err != nil {
			return
		}
		again, err := store.DecodeCommit(store.AppendCommit(nil, &c))
		if err != nil || !reflect.DeepEqual(again, c) {
			t.Errorf("read %+v, then %+v, %v", c, again, err)
		}
	})
}

func BenchmarkDecodeCommit(b *testing.B) {
	c := storetest.Commit(storetest.Device(1), 1)
	stored := store.AppendCommit(nil, &c)
	b.ReportAllocs()
	for b.Loop() {
		if _, err := store.DecodeCommit(stored); err != nil {
			b.Fatal(err)
		}
	}
}
