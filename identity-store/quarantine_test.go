package identitystore

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// released collects what Released tells, each time with whether Quarantined had said so.
func released(t *testing.T, s *Store) *[]hub.DeviceID {
	t.Helper()
	var out []hub.DeviceID
	s.Released(func(_ context.Context, dev hub.DeviceID) error {
		if _, is := s.Quarantined(dev); is {
			t.Errorf("%s is in quarantine when what was kept of it goes", dev)
		}
		out = append(out, dev)
		return nil
	})
	return &out
}

// TestQuarantine: by the owner or an operator, and by nobody else; it holds in another process and after a restart, ends the
// device's commands, and gives it nothing new.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := newStore(t, docs, dir)
	told, freed := heard(s), released(t, s)
	signUp(t, s, lamp, alice)
	wantKind(t, s.Quarantine(t.Context(), lamp, bob, "bob", ""), hub.NotFound, "device-not-owned")
	wantKind(t, s.Quarantine(t.Context(), meter, "", "root", ""), hub.NotFound, "device-not-owned")
	if len(*told) != 0 {
		t.Fatalf("told %v", *told)
	}
	for _, reason := range []string{"a copy", "again"} {
		if err := s.Quarantine(t.Context(), lamp, alice, "alice", reason); err != nil {
			t.Fatal(err)
		}
	}
	if len(*told) != 2 || (*told)[0] != lamp || len(dir.cancelled) != 2 || len(dir.ended) != 2 {
		t.Errorf("told %v, cancelled of %v, ended %v", *told, dir.cancelled, dir.ended)
	}
	for _, s := range []*Store{s, newStore(t, docs, dir)} {
		if g, is := s.Quarantined(lamp); !is || g != 1 {
			t.Errorf("in quarantine: %v, generation %d", is, g)
		}
		if err := s.Denied(lamp, nil); err != nil {
			t.Errorf("it is not let in: %v", err)
		}
		if a := wantAccess(t, s, lamp, alice, hub.AccessQuarantined); a.Reason != "a copy" || a.User != "alice" || a.Since.IsZero() {
			t.Errorf("%+v", a)
		}
		wantKind(t, s.Reachable(t.Context(), lamp, alice), hub.Precondition, "device-quarantined")
		wantKind(t, s.Admits(t.Context(), lamp, nil), hub.Denied, "device-quarantined")
		if ds := s.InQuarantine(); len(ds) != 1 || ds[0] != lamp {
			t.Errorf("in quarantine are %v", ds)
		}
	}
	wantKind(t, s.Enable(t.Context(), lamp, bob), hub.NotFound, "device-not-owned")
	if _, is := s.Quarantined(lamp); !is || len(*freed) != 0 {
		t.Error("somebody else ended it")
	}
	if err := s.Enable(t.Context(), lamp, alice); err != nil {
		t.Fatal(err)
	}
	if len(*freed) == 0 || len(*told) != 3 {
		t.Errorf("released %v, told %v", *freed, *told)
	}
	for _, s := range []*Store{s, newStore(t, docs, dir)} {
		wantAccess(t, s, lamp, alice, hub.AccessAdmitted)
		if err := s.Reachable(t.Context(), lamp, alice); err != nil {
			t.Error(err)
		}
	}
}

// A device that is disabled in quarantine is kept out, and both end with one decision.
func TestDisabledInQuarantine(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	signUp(t, s, lamp, alice)
	if err := errors.Join(s.Quarantine(t.Context(), lamp, "", "hub", ""), s.Disable(t.Context(), lamp, "", "root", "")); err != nil {
		t.Fatal(err)
	}
	wantAccess(t, s, lamp, alice, hub.AccessDisabled)
	wantKind(t, s.Reachable(t.Context(), lamp, alice), hub.Precondition, "device-disabled")
	if err := s.Enable(t.Context(), lamp, ""); err != nil {
		t.Fatal(err)
	}
	wantAccess(t, s, lamp, alice, hub.AccessAdmitted)
	if _, is := s.Quarantined(lamp); is {
		t.Error("it is still in quarantine")
	}
}

// TestQuarantineEndsWithTheOwner: what was kept goes before the device is anybody else's, also where that fails at first.
func TestQuarantineEndsWithTheOwner(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := newStore(t, docs, dir)
	fail, freed := true, 0
	s.Released(func(context.Context, hub.DeviceID) error {
		if fail {
			return errors.New("the disk is gone")
		}
		freed++
		return nil
	})
	signUp(t, s, lamp, alice)
	if err := s.Quarantine(t.Context(), lamp, alice, "alice", ""); err != nil {
		t.Fatal(err)
	}
	wantKind(t, s.Remove(t.Context(), lamp, alice, "alice", ""), hub.Unavailable, "")
	_, err := s.SignUp(t.Context(), lamp, bob, "pin", "user", time.Now())
	wantKind(t, err, hub.Unavailable, "")
	fail = false
	if _, err := s.SignUp(t.Context(), lamp, bob, "pin", "user", time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	if _, is := s.Quarantined(lamp); is || freed != 1 {
		t.Errorf("in quarantine: %v, released %d times", is, freed)
	}
	wantAccess(t, newStore(t, docs, dir), lamp, bob, hub.AccessAdmitted)
}

// Commands, or a session, that could not be ended at once are ended later, also after a restart; of the two one does not wait for the
// other.
func TestCommandsAndSessionEndAfterTrouble(t *testing.T) {
	t.Parallel()
	away := func(hub.DeviceID) error { return &hub.Error{Kind: hub.Unavailable} }
	for name, c := range map[string]struct{ cancel, end func(hub.DeviceID) error }{
		"commands": {away, nil}, "session": {nil, away}, "both": {away, away},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			docs, dir := storetest.NewMemory(), newDirectory()
			s := newStore(t, docs, dir)
			signUp(t, s, lamp, alice)
			dir.cancel, dir.end = c.cancel, c.end
			wantKind(t, s.Quarantine(t.Context(), lamp, alice, "alice", ""), hub.Unavailable, "")
			if _, is := s.Quarantined(lamp); !is {
				t.Error("it is not in quarantine")
			}
			if done := len(dir.cancelled) + len(dir.ended); (done == 1) != (c.cancel == nil || c.end == nil) {
				t.Errorf("cancelled %v, ended %v", dir.cancelled, dir.ended)
			}
			if c.cancel != nil {
				wantKind(t, s.Enable(t.Context(), lamp, alice), hub.Unavailable, "")
			}
			dir.cancel, dir.end, dir.cancelled, dir.ended = nil, nil, nil, nil
			s = newStore(t, docs, dir)
			for range 2 {
				s.finishAll(t.Context())
			}
			if len(dir.cancelled) != 1 || len(dir.ended) != 1 {
				t.Errorf("cancelled %d times, ended %d times", len(dir.cancelled), len(dir.ended))
			}
			wantAccess(t, s, lamp, alice, hub.AccessQuarantined)
		})
	}
}
