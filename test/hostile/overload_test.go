package hostile_test

import (
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// TestCommandsBeyondTheQueue: of more commands than may wait for a device the rest is refused with a time to come again (RFC 6585,
// Section 4; RFC 9110, Section 10.2.3); those that wait are carried out, and so are others later.
func TestCommandsBeyondTheQueue(t *testing.T) {
	t.Parallel()
	const most, offered = 4, 40
	w := newWorld(t, "resourceDirectory.limits.commands=4", "resourceDirectory.defaultCommandTimeToLive=30s")
	c := w.signedIn(deviceID(3))
	link := map[string]any{"href": "/valve", "rt": []string{"x"}, "if": []string{"oic.if.baseline"}, "p": map[string]any{"bm": 3}}
	c.want(codes.Changed, post("/oic/rd", map[string]any{"di": c.id, "ttl": 0, "links": []any{link}}, "rt=oic.wk.rdpub"))
	asks := c.asked("/valve")
	write(c, frame(content(codes.Content, next(t, asks).Token, 1, map[string]any{"open": 1})))

	command := func() (status int, retry string) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, w.HTTP+"/api/v1/devices/"+c.id+"/resources/valve", strings.NewReader(`{"open":2}`))
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		req.Header.Set("Authorization", "Bearer "+w.token)
		req.Header.Set("Content-Type", "application/json")
		resp, err := w.client.Do(req)
		if err != nil {
			t.Error(err)
			return 0, ""
		}
		_ = resp.Body.Close()
		return resp.StatusCode, resp.Header.Get("Retry-After")
	}
	var done, refused atomic.Int64
	var asking sync.WaitGroup
	for range offered {
		asking.Go(func() {
			switch status, retry := command(); {
			case status == http.StatusOK:
				done.Add(1)
			case status == http.StatusTooManyRequests && retry != "":
				refused.Add(1)
			default:
				t.Errorf("a command got %d, Retry-After %q", status, retry)
			}
		})
	}
	w.until("all but those that wait to be refused", func() bool { return refused.Load() == offered-most })
	w.costs(most*10+20, 48*mebibyte)
	w.undisturbed()
	answer := func() {
		m := next(t, asks)
		for m.Code != codes.POST {
			m = next(t, asks)
		}
		write(c, frame(content(codes.Changed, m.Token, 0, map[string]any{"open": 2})))
	}
	for range most {
		answer()
	}
	asking.Wait()
	if n := done.Load(); n != most {
		t.Errorf("%d commands were carried out, want %d", n, most)
	}
	asking.Go(func() {
		if status, _ := command(); status != http.StatusOK {
			t.Errorf("a command afterwards got %d", status)
		}
	})
	answer()
	asking.Wait()
	_ = c.Close()
	w.givenBack()
}

// TestDevicesBeyondTheBound: devices that come when all places are taken are turned away at once, those that are there stay, and
// when some have gone others find room.
func TestDevicesBeyondTheBound(t *testing.T) {
	t.Parallel()
	const most = 10
	w := newWorld(t, "coapGateway.api.coap.maxConnections=10")
	held := make([]*stranger, most-w.before.connections())
	for i := range held {
		held[i] = w.secure(deviceID(10 + i))
	}
	w.until("all places to be taken", func() bool { return w.usage().connections() == most })
	for i := range 20 {
		if said, over := ended(dial(t, w.CoAPS)); !over || len(said) > 0 {
			t.Fatalf("connection %d: the hub said %x, ended %t", i, said, over)
		}
	}
	for i, c := range held {
		if !c.answers() {
			t.Errorf("device %d lost its place", i)
		}
	}
	w.undisturbed()
	for _, c := range held {
		_ = c.Close()
	}
	w.newcomer(deviceID(3), w.Endpoints.CoAPSTCP)
	w.newcomer(deviceID(4), w.Endpoints.CoAPS)
	w.givenBack()
}
