package identitystore

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/bus/bustest"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// identities is what others are handed: the Store itself, or a Client of it.
type identities interface {
	SignUp(ctx context.Context, dev hub.DeviceID, owner hub.Owner, pin, user string, authorized time.Time) (hub.Ownership, error)
	Owner(ctx context.Context, dev hub.DeviceID) (hub.Ownership, error)
	SignOff(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string) error
	Remove(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error
	Devices(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error)
	EventsOwned(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error)
	Access(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Access, error)
	Disable(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error
	Enable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error
	Quarantine(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error
	Quarantined(dev hub.DeviceID) (uint64, bool)
	InQuarantine() []hub.DeviceID
	Reachable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error
	Admits(ctx context.Context, dev hub.DeviceID, spki []byte) error
	Denied(dev hub.DeviceID, chain []*x509.Certificate) error
	Denials() []hub.Denial
	Deny(ctx context.Context, d hub.Denial) (hub.Denial, error)
	Undeny(ctx context.Context, of hub.DenialOf, value string) error
	Barred(f func(hub.DeviceID))
	EndKey(ctx context.Context, dev hub.DeviceID) error
	KeysEnded(f func(hub.DeviceID))
	Run(ctx context.Context, ready func()) error
}

var _ = []identities{(*Store)(nil), (*Client)(nil)}

func connect(t *testing.T, url string) *bus.Bus {
	t.Helper()
	b, err := bus.Connect(bus.Config{URLs: []string{url}}, "00000000-0000-4000-8000-00000000000b", "v1", t.Name(), quiet(), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// runs has a part run until the test or stop ends it.
func runs(t *testing.T, part func(context.Context, func()) error) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	ready, over := make(chan struct{}), make(chan error, 1)
	go func() { over <- part(ctx, func() { close(ready) }) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-over; err != nil {
			t.Errorf("it ends with %v", err)
		}
	})
	t.Cleanup(stop)
	select {
	case <-ready:
	case <-time.After(20 * time.Second):
		t.Fatal("it does not get ready")
	}
	return stop
}

// served is a Store that answers on a bus.
func served(t *testing.T, url string, docs store.Documents, dir Directory) (s *Store, stop func()) {
	t.Helper()
	s = storeOn(t, docs, dir)
	srv, err := s.Serve(t.Context(), connect(t, url), quiet())
	if err != nil {
		t.Fatal(err)
	}
	stopReading, stopAnswers := runs(t, s.Run), runs(t, srv.Run)
	return s, func() { stopAnswers(); stopReading() }
}

// listener is a Client with what it was told.
type listener struct {
	*Client
	stop func()
	mu   sync.Mutex // guards told and keys
	told []hub.DeviceID
	keys []hub.DeviceID
}

// ended reports whether it was told that a device's key has ended.
func (l *listener) ended(dev hub.DeviceID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Contains(l.keys, dev)
}

func (l *listener) heard() []hub.DeviceID {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.told)
}

func client(t *testing.T, url string) *listener {
	t.Helper()
	l := &listener{Client: NewClient(Default(), connect(t, url), quiet())}
	l.Barred(func(dev hub.DeviceID) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.told = append(l.told, dev)
	})
	l.KeysEnded(func(dev hub.DeviceID) {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.keys = append(l.keys, dev)
	})
	l.stop = runs(t, l.Run)
	return l
}

// apart is two Stores on the same documents, and two Clients, each with a connection of its own.
func apart(t *testing.T) (docs *storetest.Memory, dir *directory, stores [2]*Store, clients [2]*listener) {
	t.Helper()
	docs, dir = storetest.NewMemory(), newDirectory()
	url := bustest.Server(t, nil).ClientURL()
	for i := range stores {
		stores[i], _ = served(t, url, docs, dir)
	}
	for i := range clients {
		clients[i] = client(t, url)
	}
	return docs, dir, stores, clients
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waiting for %s", what)
		}
	}
}

func code(err error) string {
	if err == nil {
		return ""
	}
	c, _ := hub.Public(err)
	return c
}

// What one client has decided it knows at once, and all others hear of it, whichever Store was asked.
func TestDecisionsAreHeardEverywhere(t *testing.T) {
	t.Parallel()
	_, _, stores, clients := apart(t)
	here, there := clients[0], clients[1]
	signUp(t, stores[0], lamp, alice)
	mine := chain(t)
	ctx := t.Context()
	everywhere := func(what, want string, of func(identities) string) {
		t.Helper()
		if got := of(here); got != want {
			t.Fatalf("%s: who did it finds %q, want %q", what, got, want)
		}
		for i, x := range []identities{there, stores[0], stores[1]} {
			await(t, fmt.Sprintf("%s (%d)", what, i), func() bool { return of(x) == want })
		}
	}
	denied := func(x identities) string { return code(x.Denied(lamp, nil)) }
	chained := func(x identities) string { return code(x.Denied(meter, mine)) }
	apart := func(x identities) string {
		generation, is := x.Quarantined(lamp)
		return fmt.Sprint(generation, is, x.InQuarantine())
	}
	listed := func(x identities) string { return fmt.Sprint(len(x.Denials())) }
	told := func(what string, dev hub.DeviceID, n int) {
		t.Helper()
		for _, c := range clients {
			await(t, what+" to be told", func() bool { return len(c.heard()) >= n && c.heard()[n-1] == dev })
		}
	}
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	// Half a millisecond from the call to the other client's Denied, 18 ms at worst of 200, with the servers in this process and the
	// documents in memory; within a second when all wakes are lost.
	do(here.Disable(ctx, lamp, alice, "alice", "stolen"))
	everywhere("disabled", "device-disabled", denied)
	told("disabled", lamp, 1)
	do(here.Enable(ctx, lamp, alice))
	everywhere("enabled", "", denied)

	do(here.Quarantine(ctx, lamp, "", "root", "a copy"))
	everywhere("in quarantine", fmt.Sprint(1, true, []hub.DeviceID{lamp}), apart)
	told("in quarantine", lamp, 2)
	do(here.Enable(ctx, lamp, ""))
	everywhere("out of quarantine", fmt.Sprint(0, false, []hub.DeviceID{}), apart)
	told("out of quarantine", lamp, 3)

	d, err := here.Deny(ctx, hub.Denial{Of: hub.DenyDevice, Value: string(lamp), Reason: "lost", User: "root"})
	if do(err); d.Since.IsZero() {
		t.Errorf("%+v", d)
	}
	everywhere("denied", "device-denied", denied)
	told("denied", lamp, 4)
	if ds := there.Denials(); len(ds) != 1 || ds[0].Reason != "lost" || ds[0].User != "root" || !ds[0].Since.Equal(d.Since) || !ds[0].Until.IsZero() {
		t.Errorf("listed %+v", ds)
	}
	_, err = here.Deny(ctx, hub.Denial{Of: hub.DenyCA, Value: sum(mine[1].Raw), Until: time.Now().Add(time.Hour)})
	do(err)
	everywhere("its CA denied", "ca-denied", chained)
	told("its CA denied", "", 5)
	do(here.Undeny(ctx, hub.DenyDevice, string(lamp)))
	do(here.Undeny(ctx, hub.DenyCA, sum(mine[1].Raw)))
	everywhere("not denied", "", denied)
	everywhere("its CA not denied", "", chained)
	everywhere("the list is empty", "0", listed)

	// What is decided on a device ends with its owner, everywhere, and is not told as if it began.
	do(here.Disable(ctx, lamp, alice, "alice", ""))
	do(here.Quarantine(ctx, lamp, alice, "alice", ""))
	everywhere("disabled again", "device-disabled", denied)
	do(here.Remove(ctx, lamp, alice, "alice", "sold"))
	everywhere("removed", "", denied)
	everywhere("removed from quarantine", fmt.Sprint(0, false, []hub.DeviceID{}), apart)
	if _, err := here.SignUp(ctx, lamp, bob, "pin", "user", time.Now()); err != nil {
		t.Fatal(err)
	}

	// The same of what nobody asked over the bus for.
	do(stores[1].Disable(ctx, lamp, bob, "bob", ""))
	await(t, "a decision of a Store", func() bool { return denied(here) == "device-disabled" && denied(there) == "device-disabled" })
}

// Whoever changed a list finds it changed, from whichever Store; others soon do. Repeated because which Store answers is chance.
func TestListsOfDevices(t *testing.T) {
	t.Parallel()
	_, _, stores, clients := apart(t)
	here, there := clients[0], clients[1]
	want := func(x identities, ids ...hub.DeviceID) bool {
		t.Helper()
		got, err := x.Devices(t.Context(), alice)
		if err != nil || got == nil {
			t.Fatalf("%v, %v", got, err)
		}
		return slices.Equal(got, ids)
	}
	for i := range 20 {
		for _, x := range []identities{here, there, stores[0], stores[1]} { // and so all have it in memory
			await(t, "the list to be empty", func() bool { return want(x) })
		}
		if own, err := here.SignUp(t.Context(), lamp, alice, "pin", "user", time.Now()); err != nil || own.Owner != alice {
			t.Fatalf("%+v, %v", own, err)
		}
		if !want(here, lamp) {
			t.Fatalf("%d: who signed it up does not find it", i)
		}
		for _, x := range []identities{there, stores[0], stores[1]} {
			await(t, "the list of others", func() bool { return want(x, lamp) })
		}
		if i%2 == 0 {
			if err := here.SignOff(t.Context(), lamp, alice, "user"); err != nil {
				t.Fatal(err)
			}
		} else if err := here.Remove(t.Context(), lamp, alice, "user", ""); err != nil {
			t.Fatal(err)
		}
		if !want(here) {
			t.Fatalf("%d: who signed it off still finds it", i)
		}
	}
	if ids, err := there.EventsOwned(t.Context(), alice); err != nil || !slices.Equal(ids, []hub.DeviceID{lamp}) {
		t.Errorf("former devices: %v, %v", ids, err)
	}
}

// A client answers what the Store does: the same values, and the same kinds and codes.
func TestClientAnswersAsTheStore(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	url := bustest.Server(t, nil).ClientURL()
	s, stop := served(t, url, docs, dir)
	c := client(t, url)
	ctx := t.Context()
	key := chain(t)[0].RawSubjectPublicKeyInfo

	own, err := c.SignUp(ctx, lamp, alice, "pin", "user", time.Now())
	if want := (hub.Ownership{Device: lamp, Owner: alice, Generation: 1, Pin: "pin"}); err != nil || own != want {
		t.Fatalf("%+v, %v", own, err)
	}
	if again, err := c.Owner(ctx, lamp); err != nil || again != own {
		t.Errorf("%+v, %v", again, err)
	}
	if err := c.Reachable(ctx, lamp, alice); err != nil {
		t.Errorf("commands are refused: %v", err)
	}
	if err := c.Admits(ctx, lamp, key); err != nil {
		t.Errorf("nothing is given to it: %v", err)
	}
	if err := c.Disable(ctx, lamp, alice, "alice", "stolen"); err != nil {
		t.Fatal(err)
	}
	a, err := c.Access(ctx, lamp, alice)
	b, err2 := s.Access(ctx, lamp, alice)
	if err := errors.Join(err, err2); err != nil || !a.Since.Equal(b.Since) || a.State != hub.AccessDisabled || a.Reason != "stolen" || a.User != "alice" || !a.Until.IsZero() {
		t.Errorf("%+v, %+v, %v", a, b, err)
	}
	if _, err := c.Deny(ctx, hub.Denial{Of: hub.DenyKey, Value: sum(key)}); err != nil {
		t.Fatal(err)
	}
	signUp(t, s, meter, bob)
	if err := c.Remove(ctx, meter, "", "root", "sold"); err != nil {
		t.Fatal(err)
	}

	first := func(_ any, err error) error { return err }
	signUp := func(x identities, dev hub.DeviceID, owner hub.Owner, pin string, authorized time.Time) error {
		return first(x.SignUp(ctx, dev, owner, pin, "user", authorized))
	}
	long := string(make([]byte, maxReason+1))
	for name, f := range map[string]func(identities) error{
		"owner-invalid":         func(x identities) error { return signUp(x, lamp, "", "pin", time.Now()) },
		"device-owned-by-other": func(x identities) error { return signUp(x, lamp, bob, "pin", time.Now()) },
		"device-pinned":         func(x identities) error { return signUp(x, lamp, alice, "other", time.Now()) },
		"device-disabled":       func(x identities) error { return signUp(x, lamp, alice, "pin", time.Now()) },
		"device-removed":        func(x identities) error { return signUp(x, meter, bob, "pin", time.Time{}) },
		"owner":                 func(x identities) error { return first(x.Owner(ctx, meter)) },
		"sign-off":              func(x identities) error { return x.SignOff(ctx, lamp, bob, "bob") },
		"remove":                func(x identities) error { return x.Remove(ctx, lamp, bob, "bob", "") },
		"access":                func(x identities) error { return first(x.Access(ctx, lamp, bob)) },
		"disable":               func(x identities) error { return x.Disable(ctx, lamp, bob, "bob", "") },
		"disable, reason":       func(x identities) error { return x.Disable(ctx, lamp, alice, "alice", long) },
		"enable":                func(x identities) error { return x.Enable(ctx, lamp, bob) },
		"quarantine":            func(x identities) error { return x.Quarantine(ctx, lamp, bob, "bob", "") },
		"reachable":             func(x identities) error { return x.Reachable(ctx, lamp, alice) },
		"reachable, other":      func(x identities) error { return x.Reachable(ctx, lamp, bob) },
		"admits":                func(x identities) error { return x.Admits(ctx, lamp, nil) },
		"admits, removed":       func(x identities) error { return x.Admits(ctx, meter, nil) },
		"admits, key":           func(x identities) error { return x.Admits(ctx, "", key) },
		"deny, ended": func(x identities) error {
			return first(x.Deny(ctx, hub.Denial{Of: hub.DenyDevice, Value: string(lamp), Until: time.Now().Add(-time.Second)}))
		},
		"undeny": func(x identities) error { return x.Undeny(ctx, hub.DenyDevice, string(meter)) },
	} {
		got, want := f(c), f(s)
		if code(got) != code(want) || want != nil && hub.KindOf(got) != hub.KindOf(want) || want == nil && name != "reachable, other" {
			t.Errorf("%s: %v, and the Store says %v", name, got, want)
		}
	}

	const newer bus.Method[request, answer] = "id.newer"
	_, err = newer.Call(ctx, c.bus, subject, request{})
	wantKind(t, err, hub.Unsupported, "")

	docs.Mu.Lock()
	docs.Fail = func(op, _, _ string) error {
		if op == "put" {
			return &hub.Error{Kind: hub.Exhausted}
		}
		return nil
	}
	docs.Mu.Unlock()
	wantKind(t, c.SignOff(ctx, lamp, alice, "user"), hub.Exhausted, "")
	stop()
	_, err = c.Owner(ctx, lamp)
	wantKind(t, err, hub.Unavailable, "part-away")
}

// Wakes may be lost: everybody looks by himself, too.
func TestNobodyIsWoken(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	url := bustest.Server(t, nil).ClientURL()
	first := alone(t, docs, dir, 1)[0]
	second, _ := served(t, url, docs, dir)
	c := client(t, url)
	signUp(t, first, lamp, alice)
	if err := first.Disable(t.Context(), lamp, alice, "alice", ""); err != nil {
		t.Fatal(err)
	}
	await(t, "the Store", func() bool { return code(second.Denied(lamp, nil)) == "device-disabled" })
	await(t, "the client", func() bool { return code(c.Denied(lamp, nil)) == "device-disabled" })
	if err := first.EndKey(t.Context(), lamp); err != nil {
		t.Fatal(err)
	}
	await(t, "the end of a key", func() bool { return c.ended(lamp) })
}

// The end of a pre-shared key is told to everybody, whichever Store was asked; who missed more than is kept is told that any may have ended.
func TestEndedKeys(t *testing.T) {
	t.Parallel()
	_, _, stores, clients := apart(t)
	if err := clients[0].EndKey(t.Context(), lamp); err != nil {
		t.Fatal(err)
	}
	if !clients[0].ended(lamp) {
		t.Error("who has ended it does not know yet")
	}
	await(t, "the other client", func() bool { return clients[1].ended(lamp) })
	clients[1].mu.Lock()
	clients[1].keys = nil
	clients[1].mu.Unlock()
	before := clients[1].last()
	clients[1].stop()
	for range slots + 1 {
		if err := stores[1].announce(t.Context(), change{Owner: bob}); err != nil {
			t.Fatal(err)
		}
	}
	if clients[1].last() != before {
		t.Fatal("it has not stopped")
	}
	if _, err := clients[1].hearNews(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	if !clients[1].ended("") {
		t.Error("it does not know what it missed")
	}
	// With nobody to tell it is told here.
	var told []hub.DeviceID
	s := storeOn(t, storetest.NewMemory(), newDirectory())
	s.KeysEnded(func(dev hub.DeviceID) { told = append(told, dev) })
	if err := s.EndKey(t.Context(), lamp); err != nil || !slices.Equal(told, []hub.DeviceID{lamp}) {
		t.Errorf("%v, %v", told, err)
	}
}

// What is decided while the bus is away is heard when it is back.
func TestTheBusComesBack(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	port := bustest.Port(t)
	first := bustest.Server(t, func(o *server.Options) { o.Port = port })
	s, _ := served(t, first.ClientURL(), docs, dir)
	c := client(t, first.ClientURL())
	signUp(t, s, lamp, alice)
	if ids, err := c.Devices(t.Context(), alice); err != nil || len(ids) != 1 {
		t.Fatalf("%v, %v", ids, err)
	}
	first.Shutdown()
	first.WaitForShutdown()
	await(t, "the bus to be away", func() bool { return c.bus.Health(t.Context()) != nil })
	wantKind(t, c.Disable(t.Context(), lamp, alice, "alice", ""), hub.Unavailable, "bus-away")
	if err := s.Disable(t.Context(), lamp, alice, "alice", ""); err != nil { // the documents are all that a Store needs
		t.Fatal(err)
	}
	signUp(t, s, meter, alice)
	if err := c.Denied(lamp, nil); err != nil {
		t.Errorf("it cannot have heard: %v", err)
	}
	bustest.Server(t, func(o *server.Options) { o.Port = port })
	await(t, "the decision", func() bool { return code(c.Denied(lamp, nil)) == "device-disabled" && slices.Contains(c.heard(), lamp) })
	await(t, "the list", func() bool {
		ids, err := c.Devices(t.Context(), alice)
		return err == nil && len(ids) == 2
	})
}

// A Store that dies behind any of its writes: another one finds what is left to do, and who was not told is told.
func TestStoreDiesBeforeItAnnounces(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		before func(*Store) error
		do     func(*Store) error
		after  func(identities) bool
	}{
		"disable": {nil, func(s *Store) error { return s.Disable(t.Context(), lamp, alice, "alice", "") }, func(x identities) bool {
			return code(x.Denied(lamp, nil)) == "device-disabled"
		}},
		"quarantine": {nil, func(s *Store) error { return s.Quarantine(t.Context(), lamp, alice, "alice", "") }, func(x identities) bool {
			_, is := x.Quarantined(lamp)
			return is
		}},
		"enable": {
			func(s *Store) error { return s.Disable(t.Context(), lamp, alice, "alice", "") },
			func(s *Store) error { return s.Enable(t.Context(), lamp, alice) },
			func(x identities) bool { return x.Denied(lamp, nil) == nil },
		},
		"deny": {nil, func(s *Store) error {
			_, err := s.Deny(t.Context(), hub.Denial{Of: hub.DenyDevice, Value: string(lamp)})
			return err
		}, func(x identities) bool { return code(x.Denied(lamp, nil)) == "device-denied" }},
		"undeny": {func(s *Store) error {
			_, err := s.Deny(t.Context(), hub.Denial{Of: hub.DenyDevice, Value: string(lamp)})
			return err
		}, func(s *Store) error { return s.Undeny(t.Context(), hub.DenyDevice, string(lamp)) }, func(x identities) bool {
			return len(x.Denials()) == 0 && x.Denied(lamp, nil) == nil
		}},
		"sign-up": {nil, func(s *Store) error {
			_, err := s.SignUp(t.Context(), meter, alice, "pin", "user", time.Now())
			return err
		}, func(x identities) bool {
			ids, err := x.Devices(t.Context(), alice)
			return err == nil && slices.Equal(ids, []hub.DeviceID{lamp, meter})
		}},
		"sign-off": {
			func(s *Store) error { return s.Disable(t.Context(), lamp, alice, "alice", "") },
			func(s *Store) error { return s.SignOff(t.Context(), lamp, alice, "user") },
			func(x identities) bool {
				ids, err := x.Devices(t.Context(), alice)
				return err == nil && len(ids) == 0 && x.Denied(lamp, nil) == nil
			},
		},
		"remove": {
			func(s *Store) error {
				return errors.Join(s.Disable(t.Context(), lamp, alice, "alice", ""), s.Quarantine(t.Context(), lamp, alice, "alice", ""))
			},
			func(s *Store) error { return s.Remove(t.Context(), lamp, alice, "alice", "") },
			func(x identities) bool {
				ids, err := x.Devices(t.Context(), alice)
				return err == nil && len(ids) == 0 && x.Denied(lamp, nil) == nil && len(x.InQuarantine()) == 0
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for writes := int64(1); ; writes++ {
				docs, dir := storetest.NewMemory(), newDirectory()
				url := bustest.Server(t, nil).ClientURL()
				mortal := &dying{Documents: docs}
				mortal.left.Store(1000)
				first := storeOn(t, mortal, dir) // it is asked here, and answers nobody
				if _, err := first.Serve(t.Context(), connect(t, url), quiet()); err != nil {
					t.Fatal(err)
				}
				signUp(t, first, lamp, alice)
				if c.before != nil {
					if err := c.before(first); err != nil {
						t.Fatal(err)
					}
				}
				second, stopSecond := served(t, url, docs, dir)
				x := client(t, url)
				if _, err := x.Devices(t.Context(), alice); err != nil { // it has the list of before in memory
					t.Fatal(err)
				}
				mortal.left.Store(writes)
				done := c.do(first) == nil
				for range 3 { // what Run does now and then
					second.finishAll(t.Context())
				}
				await(t, fmt.Sprintf("the client to hear of it after %d writes", writes), func() bool { return c.after(x) })
				docs.Mu.Lock()
				for _, coll := range []string{collDevices, collDenied} {
					for key, doc := range docs.Docs[coll] {
						if slices.Contains(doc.Index, indexPending) {
							t.Errorf("after %d writes %s %s is not done: %s", writes, coll, key, doc.Value)
						}
					}
				}
				docs.Mu.Unlock()
				x.stop()
				stopSecond()
				if done {
					break
				}
			}
		})
	}
}

// A client asks for what is not older than what it has heard of: another Store may not have heard of it yet.
func TestClientTellsWhatItKnows(t *testing.T) {
	t.Parallel()
	b := connect(t, bustest.Server(t, nil).ClientURL())
	srv := b.Server(true, quiet(), subject)
	bus.Handle(srv, callChanges, func(context.Context, asked) (news, error) { return news{At: 7, All: true}, nil })
	bus.Handle(srv, callSignUp, func(context.Context, request) (answer, error) { return answer{At: 9}, nil })
	var after atomic.Uint64
	bus.Handle(srv, callDevices, func(_ context.Context, q request) (answer, error) {
		after.Store(q.After)
		return answer{At: q.After}, nil
	})
	runs(t, srv.Run)
	c := NewClient(Default(), b, quiet())
	runs(t, c.Run)
	for _, want := range []uint64{7, 9} {
		if _, err := c.Devices(t.Context(), alice); err != nil || after.Load() != want {
			t.Errorf("it asks for what is behind %d, not %d (%v)", after.Load(), want, err)
		}
		if _, err := c.SignUp(t.Context(), lamp, alice, "", "", time.Now()); err != nil {
			t.Fatal(err)
		}
	}
}

// Numbers have no holes, and nothing is left out, however many announce at the same time; whoever was away for longer than records
// are kept reads everything.
func TestRecordsOfChanges(t *testing.T) {
	t.Parallel()
	docs, err := pebblestore.Open("data", pebblestore.Options{FS: vfs.NewMem(), MinFree: -1, Fatal: func(err error) { t.Error(err) }})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := docs.Close(); err != nil {
			t.Error(err)
		}
	}()
	stores := alone(t, docs, newDirectory(), 4)
	reader, writers := stores[0], stores[1:]
	var followed []change
	reader.changes.follow = func(_ context.Context, cs []change) error {
		followed = append(followed, cs...)
		return nil
	}
	const each = 150
	want := map[change]struct{}{}
	var all sync.WaitGroup
	for i, s := range writers {
		for j := range each {
			c := change{Owner: hub.Owner(fmt.Sprint(i, " ", j))}
			want[c] = struct{}{}
			all.Go(func() {
				if err := s.announce(t.Context(), c); err != nil {
					t.Error(err)
				}
			})
		}
	}
	all.Wait()
	if err := reader.changes.refresh(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, c := range followed {
		delete(want, c)
	}
	if len(want) > 0 || len(followed) != len(writers)*each {
		t.Errorf("%d were followed, and %d not at all", len(followed), len(want))
	}
	at := reader.changes.last()
	if at == 0 || at > uint64(len(followed)) {
		t.Errorf("%d records for %d changes", at, len(followed))
	}
	if since, _, more, ok := reader.changes.since(0); !ok || more || len(since) != len(followed) {
		t.Errorf("a client is told of %d, %v, %v", len(since), more, ok)
	}
	reader.changes.follow = reader.follow

	signUp(t, writers[0], lamp, alice)
	if err := writers[0].Disable(t.Context(), lamp, alice, "alice", ""); err != nil {
		t.Fatal(err)
	}
	before := at
	for range slots {
		if err := writers[1].announce(t.Context(), change{Owner: bob}); err != nil {
			t.Fatal(err)
		}
	}
	n, err := reader.news(t.Context(), asked{After: before})
	if err != nil || !n.All || len(n.Devices) != 1 || !n.Devices[0].Disabled || n.At != writers[1].changes.last() {
		t.Errorf("%+v, %v", n, err)
	}
	wantKind(t, reader.Denied(lamp, nil), hub.Denied, "device-disabled")
	// And who comes new begins where the others are.
	again := alone(t, docs, newDirectory(), 1)[0]
	if again.changes.last() != n.At {
		t.Errorf("it begins at %d, not at %d", again.changes.last(), n.At)
	}
	wantKind(t, again.Denied(lamp, nil), hub.Denied, "device-disabled")
}

// A client that hears nothing for 10 s lets nobody in, and says that this is not the device's fault; it knows whom it kept out, and
// commands go on. When it hears again, all is as it was.
func TestSilence(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		c := newClient(Default(), quiet())
		pass := func(d time.Duration) {
			time.Sleep(d)
			synctest.Wait()
		}
		var heard, ready atomic.Bool
		var asks atomic.Int64
		c.ask = func(context.Context, asked) (news, error) {
			asks.Add(1)
			if !heard.Load() {
				return news{}, errors.New("nobody there")
			}
			return news{At: 1, All: true, Devices: []standing{{Device: lamp, Disabled: true}}}, nil
		}
		wantKind(t, c.Denied(meter, nil), hub.Unavailable, "identities-away")
		ctx, stop := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer stop()
		go func() { _ = c.Run(ctx, func() { ready.Store(true) }) }()
		pass(time.Minute)
		wantKind(t, c.Denied(meter, nil), hub.Unavailable, "identities-away")
		wantKind(t, c.Reachable(ctx, meter, alice), hub.Unavailable, "identities-away")
		if n := asks.Load(); ready.Load() || n < 100 || n > 140 {
			t.Fatalf("ready: %v, after %d questions", ready.Load(), n)
		}
		heard.Store(true)
		pass(time.Second)
		good := func() {
			t.Helper()
			wantKind(t, c.Denied(lamp, nil), hub.Denied, "device-disabled")
			if err := errors.Join(c.Denied(meter, nil), c.Reachable(ctx, meter, alice)); err != nil || !ready.Load() {
				t.Fatalf("%v, ready: %v", err, ready.Load())
			}
		}
		good()
		heard.Store(false)
		pass(9 * time.Second)
		good()
		pass(2 * time.Second)
		wantKind(t, c.Denied(meter, nil), hub.Unavailable, "identities-away")
		wantKind(t, c.Denied(lamp, nil), hub.Denied, "device-disabled")
		if err := c.Reachable(ctx, meter, alice); err != nil {
			t.Errorf("who has a session gets no commands: %v", err)
		}
		heard.Store(true)
		pass(time.Second)
		good()
	})
}

// The same of a Store that cannot read what others announce; and a client does not take its answer for news.
func TestSilenceOfTheStore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		docs := storetest.NewMemory()
		s := alone(t, docs, newDirectory(), 1)[0]
		ctx, stop := context.WithCancel(t.Context())
		defer synctest.Wait()
		defer stop()
		go func() { _ = s.Run(ctx, func() {}) }()
		time.Sleep(time.Minute)
		if err := s.Denied(lamp, nil); err != nil {
			t.Fatal(err)
		}
		fail := func(err error) {
			docs.Mu.Lock()
			defer docs.Mu.Unlock()
			docs.Fail = func(string, string, string) error { return err }
		}
		fail(&hub.Error{Kind: hub.Internal})
		time.Sleep(9 * time.Second)
		if err := s.Denied(lamp, nil); err != nil {
			t.Fatal(err)
		}
		_, err := s.news(ctx, asked{})
		wantKind(t, err, hub.Unavailable, "")
		time.Sleep(2 * time.Second)
		wantKind(t, s.Denied(lamp, nil), hub.Unavailable, "identities-away")
		fail(nil)
		time.Sleep(time.Second)
		if err := s.Denied(lamp, nil); err != nil {
			t.Fatal(err)
		}
	})
}
