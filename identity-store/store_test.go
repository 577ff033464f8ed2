package identitystore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	lamp  = hub.DeviceID("11111111-0000-4000-8000-000000000001")
	meter = hub.DeviceID("11111111-0000-4000-8000-000000000002")
	alice = hub.Owner("alice")
	bob   = hub.Owner("bob")
)

// directory is a Directory of functions that remembers what it was told, the way the real one does: by generation.
type directory struct {
	mu         sync.Mutex
	register   func(hub.Ownership) error
	unregister func(hub.Ownership) error
	seen       map[hub.DeviceID]uint64    // highest generation ever registered
	owner      map[hub.DeviceID]hub.Owner // empty after unregister
	registered int
	cancel     func(hub.DeviceID) error
	cancelled  []hub.DeviceID
	end        func(hub.DeviceID) error
	ended      []hub.DeviceID
}

func newDirectory() *directory {
	return &directory{seen: map[hub.DeviceID]uint64{}, owner: map[hub.DeviceID]hub.Owner{}}
}

func (d *directory) Register(_ context.Context, own hub.Ownership, _ string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.register != nil {
		if err := d.register(own); err != nil {
			return err
		}
	}
	if own.Generation > d.seen[own.Device] {
		d.seen[own.Device], d.owner[own.Device] = own.Generation, own.Owner
		d.registered++
	}
	return nil
}

func (d *directory) CancelCommands(
	_ context.Context, owner hub.Owner, dev hub.DeviceID, pick hub.CommandPick, _, _ string,
) ([]string, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cancel != nil {
		if err := d.cancel(dev); err != nil {
			return nil, err
		}
	}
	if d.owner[dev] != owner || !pick.All {
		return nil, &hub.Error{Kind: hub.Denied}
	}
	d.cancelled = append(d.cancelled, dev)
	return nil, &hub.Error{Kind: hub.NotFound}
}

func (d *directory) EndSession(_ context.Context, owner hub.Owner, dev hub.DeviceID, _ string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.end != nil {
		if err := d.end(dev); err != nil {
			return err
		}
	}
	if d.owner[dev] != owner {
		return &hub.Error{Kind: hub.Denied}
	}
	d.ended = append(d.ended, dev)
	return nil
}

func (d *directory) Unregister(_ context.Context, own hub.Ownership, _ string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.unregister != nil {
		if err := d.unregister(own); err != nil {
			return err
		}
	}
	if own.Generation == d.seen[own.Device] {
		d.owner[own.Device] = ""
	}
	return nil
}

func newStore(t *testing.T, docs *storetest.Memory, dir *directory) *Store {
	t.Helper()
	s, err := New(t.Context(), Default(), docs, dir, quiet(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func wantKind(t *testing.T, err error, kind hub.Kind, code string) {
	t.Helper()
	if !hub.IsKind(err, kind) {
		t.Fatalf("error %v, want kind %s", err, kind)
	}
	if got, _ := hub.Public(err); code != "" && got != code {
		t.Fatalf("code %q, want %q", got, code)
	}
}

func signUp(t *testing.T, s *Store, dev hub.DeviceID, owner hub.Owner) hub.Ownership {
	t.Helper()
	own, err := s.SignUp(t.Context(), dev, owner, "pin", "user", time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	return own
}

func TestSignUpClaimsAndRegisters(t *testing.T) {
	t.Parallel()
	dir := newDirectory()
	s := newStore(t, storetest.NewMemory(), dir)
	want := hub.Ownership{Device: lamp, Owner: alice, Generation: 1, Pin: "pin"}
	if own := signUp(t, s, lamp, alice); own != want {
		t.Fatalf("got %+v, want %+v", own, want)
	}
	if own := signUp(t, s, lamp, alice); own != want { // a repeat changes nothing
		t.Fatalf("repeat: got %+v, want %+v", own, want)
	}
	if dir.owner[lamp] != alice || dir.registered != 1 {
		t.Fatalf("directory: owner %q after %d registrations", dir.owner[lamp], dir.registered)
	}
	own, err := s.Owner(t.Context(), lamp)
	if err != nil || own != want {
		t.Fatalf("Owner: %+v, %v", own, err)
	}
	_, err = s.Owner(t.Context(), meter)
	wantKind(t, err, hub.NotFound, "")
}

func TestSecondOwnerIsRefused(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	signUp(t, s, lamp, alice)
	_, err := s.SignUp(t.Context(), lamp, bob, "pin", "user", time.Time{})
	wantKind(t, err, hub.Denied, "device-owned-by-other")
	wantKind(t, s.SignOff(t.Context(), lamp, bob, "user"), hub.NotFound, "")
	if own, err := s.Owner(t.Context(), lamp); err != nil || own.Owner != alice {
		t.Fatalf("owner is %+v, %v", own, err)
	}
}

func TestOwnersThatNoStoreCouldHoldAreInvalid(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	for _, owner := range []hub.Owner{"", hub.Owner(strings.Repeat("x", maxOwner+1))} {
		_, err := s.SignUp(t.Context(), lamp, owner, "pin", "user", time.Time{})
		wantKind(t, err, hub.Invalid, "owner-invalid")
	}
	_, err := s.SignUp(t.Context(), "", alice, "pin", "user", time.Time{})
	wantKind(t, err, hub.Invalid, "")
}

func TestPinIsFixedUntilRelease(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	signUp(t, s, lamp, alice)
	_, err := s.SignUp(t.Context(), lamp, alice, "another", "user", time.Time{})
	wantKind(t, err, hub.Denied, "device-pinned")
	if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.SignUp(t.Context(), lamp, alice, "another", "user", time.Time{}); err != nil {
		t.Fatalf("after the release: %v", err)
	}
}

func TestParallelSignUpsHaveOneWinner(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	// Two stores on the same documents are two processes of a cluster.
	stores := []*Store{newStore(t, docs, dir), newStore(t, docs, dir)}
	var wg sync.WaitGroup
	errs := make([]error, 32)
	for i := range errs {
		wg.Go(func() {
			_, errs[i] = stores[i%2].SignUp(t.Context(), lamp, hub.Owner(fmt.Sprintf("owner-%d", i)), "pin", "user", time.Time{})
		})
	}
	wg.Wait()
	winners := 0
	for i, err := range errs {
		if err == nil {
			winners++
			if dir.owner[lamp] != hub.Owner(fmt.Sprintf("owner-%d", i)) {
				t.Errorf("owner-%d won, the directory says %q", i, dir.owner[lamp])
			}
			continue
		}
		wantKind(t, err, hub.Denied, "device-owned-by-other")
	}
	if winners != 1 || dir.registered != 1 {
		t.Fatalf("%d winners, %d registrations", winners, dir.registered)
	}
}

func TestSignOffReleasesAndGenerationGoesOn(t *testing.T) {
	t.Parallel()
	dir := newDirectory()
	s := newStore(t, storetest.NewMemory(), dir)
	signUp(t, s, lamp, alice)
	if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
		t.Fatal(err)
	}
	_, err := s.Owner(t.Context(), lamp)
	wantKind(t, err, hub.NotFound, "")
	wantKind(t, s.SignOff(t.Context(), lamp, alice, "user"), hub.NotFound, "")
	if own := signUp(t, s, lamp, bob); own.Generation != 2 {
		t.Fatalf("generation %d after a release, want 2", own.Generation)
	}
	if dir.owner[lamp] != bob {
		t.Fatalf("directory says %q", dir.owner[lamp])
	}
}

// A crash between two steps is a step that fails and a new Store on the same documents.
func TestCrashBetweenStepsIsFinishedLater(t *testing.T) {
	t.Parallel()
	away := errors.New("directory away")
	for _, how := range []string{"sign-up", "sign-in", "start"} {
		t.Run("claimed, finished at "+how, func(t *testing.T) {
			docs, dir := storetest.NewMemory(), newDirectory()
			dir.register = func(hub.Ownership) error { return away }
			_, err := newStore(t, docs, dir).SignUp(t.Context(), lamp, alice, "pin", "user", time.Time{})
			wantKind(t, err, hub.Unavailable, "")
			_, err = newStore(t, docs, dir).Owner(t.Context(), lamp)
			wantKind(t, err, hub.Unavailable, "") // not NotFound: the device would drop its credentials
			_, err = newStore(t, docs, dir).SignUp(t.Context(), lamp, bob, "pin", "user", time.Time{})
			wantKind(t, err, hub.Denied, "device-owned-by-other") // the claim stands
			dir.register = nil
			s := newStore(t, docs, dir)
			switch how {
			case "sign-up":
				signUp(t, s, lamp, alice)
			case "sign-in":
				if own, err := s.Owner(t.Context(), lamp); err != nil || own.Generation != 1 {
					t.Fatalf("%+v, %v", own, err)
				}
			case "start":
				start(t, s)
			}
			if dir.owner[lamp] != alice {
				t.Fatalf("directory says %q", dir.owner[lamp])
			}
		})
	}
	for _, how := range []string{"sign-off", "sign-in", "sign-up of another", "start"} {
		t.Run("releasing, finished at "+how, func(t *testing.T) {
			docs, dir := storetest.NewMemory(), newDirectory()
			s := newStore(t, docs, dir)
			signUp(t, s, lamp, alice)
			dir.unregister = func(hub.Ownership) error { return away }
			wantKind(t, s.SignOff(t.Context(), lamp, alice, "user"), hub.Unavailable, "")
			_, err := s.Owner(t.Context(), lamp)
			wantKind(t, err, hub.NotFound, "")
			if ids, err := s.Devices(t.Context(), alice); err != nil || len(ids) != 0 {
				t.Fatalf("a device being released is listed: %v, %v", ids, err)
			}
			_, err = s.SignUp(t.Context(), lamp, bob, "pin", "user", time.Time{})
			wantKind(t, err, hub.Unavailable, "")
			dir.unregister = nil
			s = newStore(t, docs, dir)
			switch how {
			case "sign-off":
				if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
					t.Fatal(err)
				}
			case "sign-in":
				_, err := s.Owner(t.Context(), lamp)
				wantKind(t, err, hub.NotFound, "")
			case "sign-up of another":
				if own := signUp(t, s, lamp, bob); own.Generation != 2 {
					t.Fatalf("generation %d", own.Generation)
				}
				if dir.owner[lamp] != bob {
					t.Fatalf("directory says %q", dir.owner[lamp])
				}
				return
			case "start":
				start(t, s)
			}
			if dir.owner[lamp] != "" {
				t.Fatalf("directory says %q", dir.owner[lamp])
			}
		})
	}
}

// start runs the store until it is ready, and ends it.
func start(t *testing.T, s *Store) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- s.Run(ctx, func() { close(ready) }) }()
	<-ready
	stop()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// A registration that was delayed in one process while another signed the device off must not bring the old owner back.
func TestLateRegistrationDoesNotReviveAnOwner(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s, other := newStore(t, docs, dir), newStore(t, docs, dir)
	paused := false
	dir.register = func(own hub.Ownership) error {
		if paused {
			return nil
		}
		paused = true
		dir.mu.Unlock() // what follows happens while the first registration is on its way
		defer dir.mu.Lock()
		if err := other.SignOff(t.Context(), lamp, alice, "user"); err != nil {
			t.Error(err)
		}
		return nil
	}
	own, err := s.SignUp(t.Context(), lamp, alice, "pin", "user", time.Time{})
	if err != nil || own.Generation != 2 {
		t.Fatalf("%+v, %v: the sign-up goes on with a claim of its own", own, err)
	}
	if dir.owner[lamp] != alice || dir.seen[lamp] != 2 {
		t.Fatalf("directory: %q at generation %d", dir.owner[lamp], dir.seen[lamp])
	}
}

// Else a registration that is still on its way somewhere would come after the release and stand.
func TestSignOffOfAClaimRegistersFirst(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	dir.register = func(hub.Ownership) error { return errors.New("away") }
	s := newStore(t, docs, dir)
	_, err := s.SignUp(t.Context(), lamp, alice, "pin", "user", time.Time{})
	wantKind(t, err, hub.Unavailable, "")
	var calls []string
	dir.register = func(hub.Ownership) error { calls = append(calls, "register"); return nil }
	dir.unregister = func(hub.Ownership) error { calls = append(calls, "unregister"); return nil }
	if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(calls, []string{"register", "unregister"}) {
		t.Fatal(calls)
	}
}

func TestDevicesAreListedInOrderAndCached(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	s := newStore(t, docs, newDirectory())
	list := func() []hub.DeviceID {
		ids, err := s.Devices(t.Context(), alice)
		if err != nil {
			t.Fatal(err)
		}
		return ids
	}
	if ids := list(); len(ids) != 0 {
		t.Fatal(ids)
	}
	signUp(t, s, meter, alice)
	signUp(t, s, lamp, alice)
	signUp(t, s, "11111111-0000-4000-8000-000000000003", bob)
	if ids := list(); !slices.Equal(ids, []hub.DeviceID{lamp, meter}) {
		t.Fatal(ids)
	}
	docs.Fail = func(string, string, string) error { return errors.New("must be answered from the cache") }
	if ids := list(); len(ids) != 2 {
		t.Fatal(ids)
	}
	docs.Fail = nil
	if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
		t.Fatal(err)
	}
	if ids := list(); !slices.Equal(ids, []hub.DeviceID{meter}) {
		t.Fatalf("after a sign-off: %v", ids)
	}
}

func TestListsAreBounded(t *testing.T) {
	t.Parallel()
	l := newLists(3)
	l.put("a", []hub.DeviceID{"1", "2"}, 0)
	l.put("b", []hub.DeviceID{"3", "4"}, 0)
	if _, _, ok := l.get("a"); ok || l.used != 2 {
		t.Fatalf("a was kept, %d used", l.used)
	}
	l.put("c", make([]hub.DeviceID, 4), 0)
	if _, _, ok := l.get("c"); ok {
		t.Fatal("a list over the limit was kept")
	}
	l.drop("b")
	l.put("b", []hub.DeviceID{"3"}, 0)
	if _, _, ok := l.get("b"); ok || l.used != 0 {
		t.Fatal("a list read before a drop was kept after it")
	}
}

func TestEventsOwnedKeepsFormerOwnersUntilRetention(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		docs := storetest.NewMemory()
		s := newStore(t, docs, newDirectory())
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx, func() {}) }()
		signUp(t, s, lamp, alice)
		signUp(t, s, meter, alice)
		if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
			t.Fatal(err)
		}
		signUp(t, s, lamp, bob)
		want := func(owner hub.Owner, ids ...hub.DeviceID) {
			t.Helper()
			got, err := s.EventsOwned(t.Context(), owner)
			if err != nil || !slices.Equal(got, ids) {
				t.Fatalf("%s: %v, %v; want %v", owner, got, err, ids)
			}
		}
		want(alice, lamp, meter)
		want(bob, lamp)
		want("al") // a prefix of an owner's name is another owner
		time.Sleep(s.cfg.Retention + sweepEvery)
		synctest.Wait()
		want(alice, meter)
		if n := len(docs.Docs[collPast]); n != 0 {
			t.Fatalf("%d notes of former owners left", n)
		}
		stop()
		<-done
	})
}

// Devices drop their credentials when they hear that these are bad: trouble of ours must never look like that.
func TestTroubleIsUnavailable(t *testing.T) {
	t.Parallel()
	broken := map[string]error{
		"plain":           errors.New("disk on fire"),
		"denied":          &hub.Error{Kind: hub.Denied},
		"unauthenticated": &hub.Error{Kind: hub.Unauthenticated},
		"not found":       &hub.Error{Kind: hub.NotFound},
		"unavailable":     &hub.Error{Kind: hub.Unavailable},
	}
	for name, cause := range broken {
		t.Run(name, func(t *testing.T) {
			for _, op := range []string{"get", "put", "range", "find", "register", "unregister"} {
				docs, dir := storetest.NewMemory(), newDirectory()
				s := newStore(t, docs, dir)
				signUp(t, s, meter, bob)
				docs.Fail = func(at, _, _ string) error {
					if at == op {
						return cause
					}
					return nil
				}
				switch op {
				case "register":
					dir.register = func(hub.Ownership) error { return cause }
				case "unregister":
					dir.unregister = func(hub.Ownership) error { return cause }
				}
				_, up := s.SignUp(t.Context(), lamp, alice, "pin", "user", time.Time{})
				off := s.SignOff(t.Context(), meter, bob, "user")
				_, devices := s.Devices(t.Context(), alice)
				_, owned := s.EventsOwned(t.Context(), alice)
				_, owner := s.Owner(t.Context(), lamp)
				failed := 0
				for _, err := range []error{up, off, devices, owned} {
					if err != nil {
						failed++
						wantKind(t, err, hub.Unavailable, "")
					}
				}
				if failed == 0 {
					t.Errorf("%s: nothing failed", op)
				}
				if op == "get" {
					wantKind(t, owner, hub.Unavailable, "")
				}
			}
		})
	}
}

func TestConfigReportsAllMistakes(t *testing.T) {
	if errs := Default().Validate(); len(errs) != 0 {
		t.Fatal(errs)
	}
	if errs := (Config{}).Validate(); len(errs) != 2 {
		t.Fatal(errs)
	}
	if _, err := New(t.Context(), Config{}, storetest.NewMemory(), newDirectory(), slog.Default(), prometheus.NewRegistry()); !hub.IsKind(err, hub.Invalid) {
		t.Fatal(err)
	}
}
