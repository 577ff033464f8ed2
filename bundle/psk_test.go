package bundle

import (
	"bytes"
	"sync"
	"testing"

	"github.com/coaphub/coaphub/hub"
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
