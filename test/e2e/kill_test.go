package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/dose"
)

// ledger is what the hub acknowledged to one device, whatever it came over, or to somebody who read its twin. What is on its way is in none of it:
// the hub may have done it or not.
type ledger struct {
	mu    sync.Mutex
	over  transport
	links map[string]int    // href -> revision of the last publish answered 2.04
	ins   map[string]uint32 // href -> instance ID, from that answer
	gone  map[string]bool   // unpublished by instance ID, answered 2.02, and not published since
	seen  int               // highest counter that an HTTP answer showed, or that was acknowledged in a datagram
	acked int               // how many notifications were acknowledged in a datagram
	sent  int               // highest counter sent
	made  int               // highest revision published
}

// guest is a device that comes to be deleted again, by its own sign-off or by the API.
type guest struct {
	over  transport
	on    onboarded
	acc   signedUp
	state string // what was acknowledged last: owned, gone, or "" when the answer to the last request is missing
	turns int
}

// compared counts what was compared after the kills; nothing of it may stay zero, or the test showed less than it says.
type compared struct{ links, unpublished, values, owned, gone int }

func (n compared) all() bool {
	return n.links > 0 && n.unpublished > 0 && n.values > 0 && n.owned > 0 && n.gone > 0
}

// TestKill9 kills the hub at random moments under load and compares, after each restart, what it had acknowledged: publishes
// answered 2.04, unpublishes by instance answered 2.02, sign-ups answered 2.04, deletions by sign-off (2.02) and by the API
// (200), values that an HTTP answer had shown, and notifications acknowledged in a datagram. Each device comes over another
// transport. 4, 20 or 200 rounds.
func TestKill9(t *testing.T) {
	t.Parallel()
	ways, guestsWays := transports, []transport{transportOf("tls"), transportOf("psk")}
	rounds := dose.Of(4, 20, 200)
	data, config := t.TempDir(), filepath.Join(t.TempDir(), "hub.yaml")
	// A guest comes again with the key and the certificate that it has.
	hubYAML := strings.Replace(everyWay, "{", "{identityStore: {revokeAtRemoval: false}, ", 1)
	if err := os.WriteFile(config, []byte(hubYAML), 0o600); err != nil {
		t.Fatal(err)
	}
	start := func() *process { return serve(t, data, "--config", config) }
	p := start()
	ctx := t.Context()
	token := trim(p.run("token", "--ttl", "24h"))
	control, err := bundle.Dial(data)
	if err != nil {
		t.Fatal(err)
	}
	ons, accounts := make([]onboarded, len(ways)), make([]signedUp, len(ways))
	var books []*ledger
	for i, over := range ways {
		ons[i] = p.onboard(deviceID(i + 1))
		books = append(books, &ledger{over: over, links: map[string]int{}, ins: map[string]uint32{}, gone: map[string]bool{}})
		pe, err := p.dial(ctx, over, deviceID(i+1), ons[i])
		if err != nil {
			t.Fatal(err)
		}
		if accounts[i], err = signUp(ctx, pe, deviceID(i+1), ons[i].Code); err != nil {
			t.Fatal(err)
		}
		pe.close()
	}
	var visitors []*guest
	for i, over := range guestsWays {
		visitors = append(visitors, &guest{over: over, on: p.onboard(guestID(i))})
	}
	var n compared
	// Over each transport something must have been acknowledged. A machine so slow that a guest is always killed half-way, or a
	// device before its first notification, gets more rounds.
	silent := func() (over []string) {
		for _, b := range books {
			if b.over.datagrams && b.acked == 0 || b.seen == 0 || len(b.links) == 0 {
				over = append(over, b.over.name)
			}
		}
		return over
	}
	for round := 0; round < rounds || (!n.all() || len(silent()) > 0) && round < 3*rounds; round++ {
		run, stop := context.WithCancel(ctx)
		var wg sync.WaitGroup
		for i := range ways {
			wg.Go(func() {
				if err := load(run, p, i, round, ons[i], accounts[i], books[i], token); err != nil {
					t.Errorf("round %d, device %d: %v", round, i+1, err)
				}
			})
		}
		for i, g := range visitors {
			wg.Go(func() {
				if err := g.visit(run, p, control, guestID(i), token); err != nil {
					t.Errorf("round %d, guest %d: %v", round, i+1, err)
				}
			})
		}
		moment := time.NewTimer(time.Duration(100+rand.IntN(400)) * time.Millisecond)
		<-moment.C
		p.kill()
		stop()
		wg.Wait()
		p = start()
		for i, b := range books {
			if lost := b.compare(ctx, t, p, token, deviceID(i+1), &n); lost != "" {
				t.Fatalf("round %d, device %d: %s", round, i+1, lost)
			}
		}
		for i, g := range visitors {
			if lost := g.compare(ctx, p, guestID(i), token, &n); lost != "" {
				t.Fatalf("round %d, guest %d: %s", round, i+1, lost)
			}
		}
	}
	if over := silent(); !n.all() || len(over) > 0 {
		t.Fatalf("of something nothing was ever acknowledged, so the test showed nothing of it: %+v, over %v", n, over)
	}
	p.kill()
	if out, stderr, err := command(ctx, "verify", "--data", data); err != nil {
		t.Fatalf("verify: %v\n%s%s", err, out, stderr)
	}
	t.Logf("compared: %+v", n)
}

func guestID(i int) string { return deviceID(100 + i) }

// visit signs the device up and deletes it again, until the hub dies. Now and then it waits for that with what it has, as
// most of a turn something is on its way.
func (g *guest) visit(ctx context.Context, p *process, control *bundle.Control, id, token string) error {
	for ; ctx.Err() == nil; g.turns++ {
		again, err := g.stay(ctx, p, control, id, token)
		if err != nil || !again {
			return err
		}
	}
	return nil
}

// stay is one visit; again is false when the hub is dead or the guest waits. A hub that still carries out what an earlier one began says 5.03.
func (g *guest) stay(ctx context.Context, p *process, control *bundle.Control, id, token string) (again bool, err error) {
	on, err := control.Onboard(ctx, bundle.OnboardRequest{DeviceID: id})
	if err != nil {
		return false, nil //nolint:nilerr // killed
	}
	pe, err := p.dial(ctx, g.over, id, g.on)
	if err != nil {
		return false, nil //nolint:nilerr // killed
	}
	defer pe.close()
	g.state = ""
	body, err := cbor.Marshal(map[string]any{"di": id, "accesstoken": on.AuthorizationCode})
	if err != nil {
		return false, err
	}
	res, closed, err := pe.do(ctx, request(codes.POST, "/oic/sec/account", body))
	switch {
	case err != nil || closed:
		return false, nil //nolint:nilerr // killed
	case res.Code == codes.ServiceUnavailable:
		return true, nil
	case res.Code != codes.Changed:
		return false, fmt.Errorf("sign-up: %v %s", res.Code, res.Payload)
	}
	g.state = "owned"
	g.acc = signedUp{}
	if err := cbor.Unmarshal(res.Payload, &g.acc); err != nil {
		return false, err
	}
	if rand.IntN(3) == 0 {
		return false, nil
	}
	if g.turns%2 == 0 {
		g.state = ""
		status, answer := p.do(ctx, http.MethodDelete, token, "/api/v1/devices/"+id)
		switch {
		case status == 0:
			return false, nil
		case status == http.StatusOK && strings.Contains(string(answer), id):
			g.state = "gone"
			return rand.IntN(3) > 0, nil
		default:
			return false, fmt.Errorf("delete: %d %s", status, answer)
		}
	}
	if err := signIn(ctx, pe, id, g.acc); err != nil {
		if ctx.Err() != nil || pe.waitClosed(time.Second) {
			return false, nil
		}
		return false, err
	}
	g.state = ""
	res, closed, err = pe.do(ctx, request(codes.DELETE, "/oic/sec/account?di="+id+"&uid="+g.acc.UID, nil))
	switch {
	case err != nil || closed:
		return false, nil //nolint:nilerr // killed
	case res.Code != codes.Deleted:
		return false, fmt.Errorf("sign-off: %v %s", res.Code, res.Payload)
	}
	g.state = "gone"
	return rand.IntN(3) > 0, nil
}

// compare returns what was acknowledged and is not so, or "". A device that only signed up is in no list of the API, so it is
// asked for as a device: whether its credential is good, and as an owner: whether there is anything to delete.
func (g *guest) compare(ctx context.Context, p *process, id, token string, n *compared) string {
	if g.state == "" {
		return ""
	}
	pe, err := p.dial(ctx, g.over, id, g.on)
	if err != nil {
		return "cannot connect: " + err.Error()
	}
	defer pe.close()
	err = signIn(ctx, pe, id, g.acc)
	if g.state == "owned" {
		if n.owned++; err != nil {
			return fmt.Sprintf("signed up, and now %v", err)
		}
		return ""
	}
	if n.gone++; err == nil || !strings.Contains(err.Error(), "Unauthorized") {
		return fmt.Sprintf("deleted, and now sign-in ends with %v", err)
	}
	if status, answer := p.do(ctx, http.MethodDelete, token, "/api/v1/devices/"+id); status != http.StatusOK || strings.Contains(string(answer), id) {
		return fmt.Sprintf("deleted, and back: %d %s", status, answer)
	}
	return ""
}

// load is a device that publishes and notifies, and a reader of its twin, until the hub dies.
func load(ctx context.Context, p *process, i, round int, on onboarded, acc signedUp, b *ledger, token string) error {
	id := deviceID(i + 1)
	pe, err := p.dial(ctx, b.over, id, on)
	if err != nil {
		return nil //nolint:nilerr // killed before we came
	}
	defer pe.close()
	pe.serve("/count", map[string]any{"n": b.sent})
	for href := range b.links { // what a device has, it shows; the hub unpublishes the rest
		pe.serve(href, map[string]any{"n": 0})
	}
	if err := signIn(ctx, pe, id, acc); err != nil {
		if ctx.Err() != nil || pe.waitClosed(time.Second) {
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
				heard := make(chan bool, 1)
				if pe.notifyAsking("/count", map[string]any{"n": n}, heard) != nil {
					return
				}
				if pe.datagrams == nil {
					continue
				}
				// RFC 7252, Section 4.2: what is acknowledged need not be sent again, so it is stored.
				select {
				case stored := <-heard:
					if stored {
						b.mu.Lock()
						b.seen, b.acked = max(b.seen, n), b.acked+1
						b.mu.Unlock()
					}
				case <-pe.closed:
				case <-ctx.Done():
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
		do := b.publish
		if k%4 == 3 {
			do = b.unpublish
		}
		ok, err := do(ctx, pe, id, fmt.Sprintf("/r/%d", (round+k)%30))
		if err != nil {
			if ctx.Err() != nil || pe.waitClosed(time.Second) {
				return nil
			}
			return err
		}
		if !ok {
			return nil
		}
	}
	return nil
}

// publish publishes a link anew; false when the hub died.
func (b *ledger) publish(ctx context.Context, pe *peer, id, href string) (bool, error) {
	b.made++
	delete(b.gone, href)
	links, ok, err := publishLinks(ctx, pe, id, b.made, href)
	if err != nil || !ok {
		return false, err
	}
	if len(links) != 1 || links[0].Href != href {
		return false, fmt.Errorf("publish of %s was answered with %+v", href, links)
	}
	b.links[href], b.ins[href] = b.made, links[0].Ins
	return true, nil
}

// unpublish withdraws a link by its instance ID, not href but one that the hub has; false when the hub died.
func (b *ledger) unpublish(ctx context.Context, pe *peer, id, href string) (bool, error) {
	for other := range b.links { // any
		href = other
	}
	if b.links[href] == 0 {
		return true, nil
	}
	delete(b.links, href)
	pe.drop(href)
	res, closed, err := pe.do(ctx, request(codes.DELETE, fmt.Sprintf("/oic/rd?di=%s&ins=%d", id, b.ins[href]), nil))
	switch {
	case err != nil || closed:
		return false, nil //nolint:nilerr // killed
	case res.Code == codes.Deleted:
		b.gone[href] = true
	case res.Code != codes.BadRequest: // the hub's own look at /oic/res was faster
		return false, fmt.Errorf("unpublish of %s: %v %s", href, res.Code, res.Payload)
	}
	return true, nil
}

func counter(ctx context.Context, p *process, token, id string) (n int, ok bool) {
	status, body := p.get(ctx, token, "/api/v1/devices/"+id+"/resources/count?onlyContent=true")
	var v struct{ N *int }
	if status != 200 || json.Unmarshal(body, &v) != nil || v.N == nil {
		return 0, false
	}
	return *v.N, true
}

// compare returns what of the ledger is not so, or "".
func (b *ledger) compare(ctx context.Context, t *testing.T, p *process, token, id string, n *compared) string {
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
		return fmt.Sprintf("lost all links (HTTP %d %s)", status, body)
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
		if n.links++; have[href] < revision {
			return fmt.Sprintf("lost link %s in revision %d (now %d)", href, revision, have[href])
		}
	}
	for href := range b.gone {
		if n.unpublished++; have[href] != 0 {
			return fmt.Sprintf("link %s was unpublished and is back in revision %d", href, have[href])
		}
	}
	if b.seen > 0 {
		n.values++
		value, ok := counter(ctx, p, token, id)
		if !ok || value < b.seen {
			_, events := p.get(ctx, token, "/api/v1/events?resourceIdFilter="+id+"/count")
			return fmt.Sprintf("lost value %d (now %d, %v); the last events:\n%s", b.seen, value, ok, events[max(0, len(events)-4000):])
		}
	}
	return ""
}
