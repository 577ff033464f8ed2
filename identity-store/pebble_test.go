package identitystore

import (
	"slices"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// The fake of the other tests is more forgiving than a real store about what is written while a list is read.
func TestOverPebbleWithARestart(t *testing.T) {
	fs, dir := vfs.NewMem(), newDirectory()
	open := func() (*Store, func()) {
		docs, err := pebblestore.Open("data", pebblestore.Options{FS: fs, MinFree: -1, Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		s, err := New(t.Context(), Default(), docs, dir, quiet(), prometheus.NewRegistry())
		if err != nil {
			t.Fatal(err)
		}
		return s, func() {
			if err := docs.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	s, stop := open()
	signUp(t, s, lamp, alice)
	signUp(t, s, meter, alice)
	dir.unregister = func(hub.Ownership) error { return &hub.Error{Kind: hub.Unavailable} }
	wantKind(t, s.SignOff(t.Context(), lamp, alice, "user"), hub.Unavailable, "")
	stop()
	dir.unregister = nil
	s, stop = open()
	defer stop()
	start(t, s)
	if ids, err := s.Devices(t.Context(), alice); err != nil || !slices.Equal(ids, []hub.DeviceID{meter}) {
		t.Fatalf("%v, %v", ids, err)
	}
	if ids, err := s.EventsOwned(t.Context(), alice); err != nil || !slices.Equal(ids, []hub.DeviceID{lamp, meter}) {
		t.Fatalf("%v, %v", ids, err)
	}
	if own := signUp(t, s, lamp, bob); own.Generation != 2 {
		t.Fatalf("%+v", own)
	}
	s.sweep(t.Context())
}
