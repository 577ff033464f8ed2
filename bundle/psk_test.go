package bundle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestPreSharedKeys(t *testing.T) {
	t.Parallel()
	const lamp, fan hub.DeviceID = "d0000000-0000-4000-8000-000000000001", "d0000000-0000-4000-8000-000000000002"
	ctx, docs := t.Context(), openTestStore(t)
	keys := &preShared{docs, []byte("the secret of this hub")}
	if k, err := keys.key(ctx, lamp); k != nil || err != nil {
		t.Errorf("before there is one: %q, %v", k, err)
	}
	first, _, err := keys.replace(ctx, lamp, "", "root")
	if err != nil || len(first) != 24 {
		t.Fatalf("the first key: %q, %v", first, err)
	}
	other, _, err := keys.replace(ctx, fan, "", "root")
	if err != nil || other == first {
		t.Fatalf("another device's key: %q, %v", other, err)
	}
	if k, err := keys.key(ctx, lamp); string(k) != first || err != nil {
		t.Errorf("the device's key is %q, %v; want %q", k, err, first)
	}
	second, _, err := keys.replace(ctx, lamp, "", "root")
	if err != nil || second == first {
		t.Fatalf("the second key: %q, %v", second, err)
	}
	if k, err := keys.key(ctx, lamp); string(k) != second || err != nil {
		t.Errorf("the device's key is %q, %v; want the second one", k, err)
	}
	doc, err := docs.Get(ctx, pskCollection, string(lamp))
	if err != nil || bytes.Contains(doc.Value, []byte(second)) {
		t.Errorf("the store has the key: %s, %v", doc.Value, err)
	}
	elsewhere := &preShared{docs, []byte("the secret of another hub")}
	if k, err := elsewhere.key(ctx, lamp); err != nil || string(k) == second {
		t.Errorf("the store alone gives the key away: %q, %v", k, err)
	}
	// Made by several at once, one of them is the key.
	var all sync.Map
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			k, _, err := keys.replace(ctx, lamp, "", "root")
			if err != nil {
				t.Error(err)
			}
			all.Store(k, true)
		})
	}
	wg.Wait()
	k, err := keys.key(ctx, lamp)
	if _, ok := all.Load(string(k)); !ok || err != nil {
		t.Errorf("the key is none of those given out: %q, %v", k, err)
	}
}

// A key that an owner was shown is worth nothing once the device is another's; an operator's is for whoever has the device.
func TestAFormerOwnersKey(t *testing.T) {
	t.Parallel()
	const lamp hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	for shown, stays := range map[hub.Owner]bool{"alice": false, "bob": true, "": true} {
		ctx, keys := t.Context(), &preShared{openTestStore(t), []byte("the secret of this hub")}
		if err := keys.handOver(ctx, lamp, "bob"); err != nil {
			t.Errorf("of a device without key: %v", err)
		}
		if _, _, err := keys.replace(ctx, lamp, shown, "somebody"); err != nil {
			t.Fatal(err)
		}
		if err := keys.handOver(ctx, lamp, "bob"); err != nil {
			t.Error(err)
		}
		if k, err := keys.key(ctx, lamp); (k != nil) != stays || err != nil {
			t.Errorf("the key that %q was shown is bob's device's still: %v, %v", shown, k != nil, err)
		}
	}
}

// meanwhile is documents to which something happens after they were first read.
type meanwhile struct {
	store.Documents
	happens func()
}

func (m *meanwhile) Get(ctx context.Context, collection, key string) (store.Doc, error) {
	doc, err := m.Documents.Get(ctx, collection, key)
	if happens := m.happens; happens != nil {
		m.happens = nil
		happens()
	}
	return doc, err
}

// TestPreSharedKeysOfTwoProcesses: what one does to a device's key while the other does something, too.
func TestPreSharedKeysOfTwoProcesses(t *testing.T) {
	t.Parallel()
	const lamp hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	ctx := t.Context()
	pair := func() (a, b *preShared, between *meanwhile) {
		docs := storetest.NewMemory()
		between = &meanwhile{Documents: docs}
		return &preShared{between, []byte("the secret of this hub")}, &preShared{docs, []byte("the secret of this hub")}, between
	}
	put := func(p *preShared, owner hub.Owner) string {
		t.Helper()
		text, _, err := p.replace(ctx, lamp, owner, "somebody")
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	is := func(what string, p *preShared, want string) {
		t.Helper()
		if k, err := p.key(ctx, lamp); string(k) != want || err != nil {
			t.Errorf("%s: the key is %q, want %q, %v", what, k, want, err)
		}
	}

	a, b, between := pair()
	put(a, "alice")
	bobs := ""
	between.happens = func() { bobs = put(b, "bob") }
	if err := a.handOver(ctx, lamp, "bob"); err != nil {
		t.Fatal(err)
	}
	is("handed over, while the new owner makes a key", b, bobs)

	a, b, between = pair()
	between.happens = func() { put(b, "alice") }
	last := put(a, "alice")
	is("both make one", b, last)

	a, b, between = pair()
	put(a, "alice")
	between.happens = func() {
		if err := b.forget(ctx, lamp); err != nil {
			t.Error(err)
		}
	}
	last = put(a, "alice")
	is("one makes one that the other forgets", b, last)
	between.happens = func() {
		if err := b.forget(ctx, lamp); err != nil {
			t.Error(err)
		}
	}
	if err := a.forget(ctx, lamp); err != nil {
		t.Error(err)
	}
	is("both forget it", b, "")

	// The device gets another owner, or none, between the look at whose it is and the key.
	for name, next := range map[string]func() (hub.Ownership, error){
		"another owner":   func() (hub.Ownership, error) { return hub.Ownership{Owner: "bob", Generation: 2}, nil },
		"the same, again": func() (hub.Ownership, error) { return hub.Ownership{Owner: "alice", Generation: 2}, nil },
		"nobody": func() (hub.Ownership, error) {
			return hub.Ownership{}, hub.NewError(hub.NotFound, "device-not-owned", "no")
		},
	} {
		a, b, _ = pair()
		asked := 0
		owner := func() (hub.Ownership, error) {
			if asked++; asked == 1 {
				return hub.Ownership{Owner: "alice", Generation: 1}, nil
			}
			return next()
		}
		if text, _, err := a.give(ctx, lamp, "alice", owner); text != "" || !hub.IsKind(err, hub.NotFound) {
			t.Errorf("%s: the former owner is shown a key, %v", name, err)
		}
		is(name, b, "")
	}
	a, b, _ = pair()
	text, _, err := a.give(ctx, lamp, "alice", func() (hub.Ownership, error) { return hub.Ownership{Owner: "alice", Generation: 1}, nil })
	if err != nil {
		t.Fatal(err)
	}
	is("given", b, text)
}

// whoseIn answers from who has which device.
func whoseIn(own map[hub.DeviceID]hub.Owner, asker hub.Owner) func(hub.DeviceID) (hub.Ownership, error) {
	return func(dev hub.DeviceID) (hub.Ownership, error) {
		switch of := own[dev]; of {
		case "":
			return hub.Ownership{}, nil
		case asker:
			return hub.Ownership{Device: dev, Owner: of, Generation: 1}, nil
		}
		return hub.Ownership{}, errOther
	}
}

// An owner is shown keys of devices of his own and of free ones, but none that changed hands meanwhile, and none in place of an operator's.
func TestOfferedKeys(t *testing.T) {
	t.Parallel()
	const lamp, fan hub.DeviceID = "d0000000-0000-4000-8000-000000000001", "d0000000-0000-4000-8000-000000000002"
	ctx, docs := t.Context(), storetest.NewMemory()
	between := &meanwhile{Documents: docs}
	keys, own := &preShared{between, []byte("the secret of this hub")}, map[hub.DeviceID]hub.Owner{}
	offer := func(dev hub.DeviceID, to hub.Owner) (string, error) {
		return keys.offer(ctx, dev, to, "somebody", whoseIn(own, to))
	}
	is := func(what string, dev hub.DeviceID, want string) {
		t.Helper()
		if k, err := keys.key(ctx, dev); string(k) != want || err != nil {
			t.Errorf("%s: the key is %q, want %q, %v", what, k, want, err)
		}
	}
	first, err := offer(lamp, "alice")
	if err != nil {
		t.Fatal(err)
	}
	is("of a free device", lamp, first)
	between.happens = func() { own[lamp] = "bob" }
	if text, err := offer(lamp, "alice"); text != "" || !hub.IsKind(err, hub.Denied) {
		t.Errorf("bob signs the device up meanwhile: %q, %v", text, err)
	}
	is("bob's device", lamp, "")
	bobs, err := offer(lamp, "bob")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := offer(lamp, "alice"); text != "" || !hub.IsKind(err, hub.Denied) {
		t.Errorf("of bob's device: %q, %v", text, err)
	}
	is("bob's", lamp, bobs)
	between.happens = func() { delete(own, lamp) }
	if text, err := offer(lamp, "bob"); text != "" || !hub.IsKind(err, hub.NotFound) {
		t.Errorf("bob's device leaves meanwhile: %q, %v", text, err)
	}
	is("nobody's device", lamp, "")

	operators, _, err := keys.replace(ctx, fan, "", "root")
	if err != nil {
		t.Fatal(err)
	}
	if text, err := offer(fan, "alice"); text != "" || !errors.Is(err, errKeyTaken) {
		t.Errorf("an operator's: %q, %v", text, err)
	}
	is("an operator's", fan, operators)
	own[fan] = "alice"
	now, err := offer(fan, "alice")
	if err != nil {
		t.Errorf("once the device is alice's: %v", err)
	}
	is("alice's", fan, now)
}

// Devices that nobody has are bounded, since anybody can name some; those that came, and those that did not come for a day, count no more.
func TestKeysThatWaitAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		ctx, docs, own := t.Context(), storetest.NewMemory(), map[hub.DeviceID]hub.Owner{}
		keys := &preShared{docs, []byte("the secret of this hub")}
		id := func(i int) hub.DeviceID { return hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012d", i)) }
		offer := func(i int, to hub.Owner) error {
			_, err := keys.offer(ctx, id(i), to, "somebody", whoseIn(own, to))
			return err
		}
		for i := range maxWaitingKeys {
			if err := offer(i, "alice"); err != nil {
				t.Fatal(err)
			}
		}
		if err := offer(maxWaitingKeys, "alice"); !errors.Is(err, errKeyLimit) {
			t.Errorf("one more: %v", err)
		}
		if err := offer(0, "alice"); err != nil {
			t.Errorf("another one for a device that waits: %v", err)
		}
		if err := offer(maxWaitingKeys, "bob"); err != nil {
			t.Errorf("bob's: %v", err)
		}
		own[id(1)], own[id(2)] = "alice", "bob"
		if err := offer(maxWaitingKeys+1, "alice"); err != nil {
			t.Errorf("after a device came: %v", err)
		}
		if k, err := keys.key(ctx, id(1)); k == nil || err != nil {
			t.Errorf("the key of the device that came is gone: %v", err)
		}
		<-time.After(keptFor)
		if err := offer(maxWaitingKeys+2, "alice"); err != nil {
			t.Errorf("a day later: %v", err)
		}
		if k, err := keys.key(ctx, id(3)); k != nil || err != nil {
			t.Errorf("the key of a device that did not come is there still: %v", err)
		}
		if k, err := keys.key(ctx, id(1)); k == nil || err != nil {
			t.Errorf("the key of the device that came is gone, a day later: %v", err)
		}
	})
}

// hisDevices is an identity store that knows who has what, and nothing else.
type hisDevices struct {
	identities
	own map[hub.DeviceID]hub.Owner
}

func (h hisDevices) Owner(_ context.Context, dev hub.DeviceID) (hub.Ownership, error) {
	if of := h.own[dev]; of != "" {
		return hub.Ownership{Device: dev, Owner: of, Generation: 1}, nil
	}
	return hub.Ownership{}, errNotOwned
}

// Who enrols with a pre-shared key gets a certificate for whoever has the device: an owner's key is good for that once he is.
func TestKeysForEnrolment(t *testing.T) {
	t.Parallel()
	const lamp hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	own := map[hub.DeviceID]hub.Owner{}
	a := &assembly{psk: &preShared{storetest.NewMemory(), []byte("the secret of this hub")}, identities: hisDevices{own: own}}
	good := func(what string, want bool) {
		t.Helper()
		if k, err := a.enrolmentKey(t.Context(), lamp); (k != nil) != want || err != nil {
			t.Errorf("%s: there is one: %v, %v", what, k != nil, err)
		}
	}
	shown := func(to hub.Owner) {
		t.Helper()
		if _, _, err := a.psk.replace(t.Context(), lamp, to, "somebody"); err != nil {
			t.Fatal(err)
		}
	}
	good("none", false)
	shown("")
	good("an operator's, of a free device", true)
	shown("alice")
	good("alice's, of a free device", false)
	own[lamp] = "bob"
	good("alice's, of bob's device", false)
	own[lamp] = "alice"
	good("alice's, of hers", true)
}
