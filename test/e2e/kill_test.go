package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// ledger is what the hub acknowledged to one device or to somebody who read its twin.
type ledger struct {
	mu    sync.Mutex
	links map[string]int // href -> revision of the last publish answered 2.04
	seen  int            // highest counter an HTTP answer showed
	sent  int            // highest counter sent
	made  int            // highest revision published
}

// TestKill9 kills the hub at random moments under load and compares, after each restart, everything it had acknowledged:
// publishes answered 2.04 and values that an HTTP answer had shown. 20 rounds, 200 nightly.
func TestKill9(t *testing.T) {
	const devices = 6
	rounds := 20
	if nightly() {
		rounds = 200
	}
	data := t.TempDir()
	p := serve(t, data)
	ctx := t.Context()
	token := trim(p.run("token", "--ttl", "24h"))
	var ons [devices]onboarded
	var accounts [devices]signedUp
	var books [devices]*ledger
	for i := range devices {
		ons[i], books[i] = p.onboard(deviceID(i+1)), &ledger{links: map[string]int{}}
		pe, err := dialPeer(ctx, p.coaps(), ons[i].tls)
		if err != nil {
			t.Fatal(err)
		}
		if accounts[i], err = signUp(ctx, pe, deviceID(i+1), ons[i].Code); err != nil {
			t.Fatal(err)
		}
		pe.close()
	}
	acked := 0
	for round := range rounds {
		run, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for i := range devices {
			wg.Go(func() {
				if err := load(run, p, i, round, ons[i], accounts[i], books[i], token); err != nil {
					t.Errorf("round %d, device %d: %v", round, i+1, err)
				}
			})
		}
		moment := time.NewTimer(time.Duration(100+rand.IntN(400)) * time.Millisecond)
		<-moment.C
		p.kill()
		stop()
		wg.Wait()
		p = serve(t, data)
		for i, b := range books {
			acked += len(b.links)
			if lost := b.compare(ctx, t, p, token, deviceID(i+1)); lost != "" {
				t.Fatalf("round %d, device %d lost: %s", round, i+1, lost)
			}
		}
	}
	if acked == 0 {
		t.Fatal("nothing was ever acknowledged: the test showed nothing")
	}
	p.kill()
	if out, stderr, err := command(ctx, "verify", "--data", data); err != nil {
		t.Fatalf("verify: %v\n%s%s", err, out, stderr)
	}
	t.Logf("%d rounds, %d links compared", rounds, acked)
}

// load is a device that publishes and notifies, and a reader of its twin, until the hub dies.
func load(ctx context.Context, p *process, i, round int, on onboarded, acc signedUp, b *ledger, token string) error {
	id := deviceID(i + 1)
	pe, err := dialPeer(ctx, p.coaps(), on.tls)
	if err != nil {
		return nil //nolint:nilerr // killed before we came
	}
	defer pe.close()
	pe.serve("/count", map[string]any{"n": b.sent})
	for href := range b.links { // what a device has, it shows; the hub unpublishes the rest
		pe.serve(href, map[string]any{"n": 0})
	}
	if err := signIn(ctx, pe, id, acc); err != nil {
		if pe.waitClosed(time.Second) {
			return nil
		}
		return err
	}
	if _, err := publish(ctx, pe, id, 0, "/count"); err != nil {
		return err
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { // notifies as fast as the connection takes it
		for ctx.Err() == nil && !pe.waitClosed(time.Millisecond) {
			if pe.observed("/count") {
				b.mu.Lock()
				b.sent++
				n := b.sent
				b.mu.Unlock()
				if pe.notify("/count", map[string]any{"n": n}) != nil {
					return
				}
			}
		}
	})
	wg.Go(func() { // what an application was told must stay true
		for ctx.Err() == nil {
			n, ok := counter(ctx, p, token, id)
			if !ok {
				if pe.waitClosed(5 * time.Millisecond) {
					return
				}
				continue
			}
			b.mu.Lock()
			b.seen = max(b.seen, n)
			b.mu.Unlock()
		}
	})
	for k := 0; ctx.Err() == nil; k++ {
		b.made++
		href := fmt.Sprintf("/r/%d", (round+k)%30)
		ok, err := publish(ctx, pe, id, b.made, href)
		if err != nil {
			if pe.waitClosed(time.Second) {
				return nil
			}
			return err
		}
		if !ok {
			return nil
		}
		b.links[href] = b.made
	}
	return nil
}

func counter(ctx context.Context, p *process, token, id string) (n int, ok bool) {
	status, body := p.get(ctx, token, "/api/v1/devices/"+id+"/resources/count?onlyContent=true")
	var v struct{ N *int }
	if status != 200 || json.Unmarshal(body, &v) != nil || v.N == nil {
		return 0, false
	}
	return *v.N, true
}

// compare returns what of the ledger is missing, or "".
func (b *ledger) compare(ctx context.Context, t *testing.T, p *process, token, id string) string {
	t.Helper()
	status, body := p.get(ctx, token, "/api/v1/devices/"+id+"/resource-links")
	var links struct {
		Resources []struct {
			Href          string
			ResourceTypes []string
		}
	}
	if status == 200 {
		if err := json.Unmarshal(body, &links); err != nil {
			t.Fatalf("links of %s: %v in %s", id, err, body)
		}
	} else if len(b.links) > 0 {
		return fmt.Sprintf("all links (HTTP %d %s)", status, body)
	}
	have := map[string]int{}
	for _, l := range links.Resources {
		n, err := strconv.Atoi(strings.TrimPrefix(strings.Join(l.ResourceTypes, ""), "x.r"))
		if err != nil {
			t.Fatalf("link %s has types %v", l.Href, l.ResourceTypes)
		}
		have[l.Href] = n
	}
	for href, revision := range b.links {
		if have[href] < revision {
			return fmt.Sprintf("link %s in revision %d (now %d)", href, revision, have[href])
		}
	}
	if b.seen > 0 {
		n, ok := counter(ctx, p, token, id)
		if !ok || n < b.seen {
			_, events := p.get(ctx, token, "/api/v1/events?resourceIdFilter="+id+"/count")
			return fmt.Sprintf("value %d (now %d, %v); the last events:\n%s", b.seen, n, ok, events[max(0, len(events)-4000):])
		}
	}
	return ""
}
