package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/dose"
)

// TestBurst: 50, 200 or 1000 devices send 20 notifications each, all at once. Each twin ends at the last of them, and a
// subscriber hears every one, those of a device in order.
func TestBurst(t *testing.T) {
	t.Parallel()
	const burst, atOnce = 20, 16
	devices := dose.Of(50, 200, 1000)
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	data, config := t.TempDir(), filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(config, []byte(everyWay), 0o600); err != nil {
		t.Fatal(err)
	}
	p := serve(t, data, "--config", config)
	token := trim(p.run("token"))
	control, err := bundle.Dial(data)
	if err != nil {
		t.Fatal(err)
	}
	peers := make([]*peer, devices)
	each := func(do func(i int) error) {
		t.Helper()
		next, errs := make(chan int), make(chan error, devices)
		var wg sync.WaitGroup
		for range atOnce {
			wg.Go(func() {
				for i := range next {
					if err := do(i); err != nil {
						errs <- fmt.Errorf("device %d: %w", i, err)
					}
				}
			})
		}
		for i := range devices {
			next <- i
		}
		close(next)
		wg.Wait()
		close(errs)
		for err := range errs {
			t.Fatalf("%v\n%s", err, p.log)
		}
	}
	each(func(i int) error {
		id := deviceID(i + 1)
		on, err := control.Onboard(ctx, bundle.OnboardRequest{DeviceID: id})
		if err != nil {
			return err
		}
		pe, err := p.dial(ctx, transportOf("tcp"), id, onboarded{})
		if err != nil {
			return err
		}
		t.Cleanup(pe.close)
		peers[i] = pe
		acc, err := signUp(ctx, pe, id, on.AuthorizationCode)
		if err != nil {
			return err
		}
		pe.serve("/light", map[string]any{"n": 0})
		if err := signIn(ctx, pe, id, acc); err != nil {
			return err
		}
		if ok, err := publish(ctx, pe, id, 1, "/light"); err != nil || !ok {
			return fmt.Errorf("published %t, %w", ok, err)
		}
		if !eventually(ctx, time.Minute, func() bool { return pe.observed("/light") }) {
			return errors.New("it is not observed")
		}
		return nil
	})
	values := func() map[string]int {
		t.Helper()
		var all struct {
			Result struct {
				Data struct {
					ResourceID struct{ DeviceID string } `json:"resourceId"`
					Content    struct{ N int }
				}
			}
		}
		status, b := p.get(ctx, token, "/api/v1/resources?typeFilter=x.r1")
		if status != http.StatusOK {
			t.Fatalf("%d %.300s", status, b)
		}
		at := map[string]int{}
		for d := json.NewDecoder(strings.NewReader(string(b))); d.More(); {
			if err := d.Decode(&all); err != nil {
				t.Fatal(err)
			}
			at[all.Result.Data.ResourceID.DeviceID] = all.Result.Data.Content.N
		}
		return at
	}
	await(t, "all twins", func() bool { return len(values()) == devices })

	c, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(p.ready["http"], "http")+"/api/v1/ws/events", &websocket.DialOptions{Subprotocols: []string{"Bearer", token}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseNow() }()
	if err := c.Write(ctx, websocket.MessageText, []byte(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light"]},"correlationId":"all"}`)); err != nil {
		t.Fatal(err)
	}
	if _, b, err := c.Read(ctx); err != nil || !strings.Contains(string(b), "operationProcessed") || checkFrame(b) != nil {
		t.Fatalf("%s, %v, %v", b, err, checkFrame(b))
	}
	sent := make(chan error, devices)
	for _, pe := range peers {
		go func() {
			for n := 1; n <= burst; n++ {
				if err := pe.notify("/light", map[string]any{"n": n}); err != nil {
					sent <- err
					return
				}
			}
			sent <- nil
		}()
	}
	heard := map[string]int{}
	for range devices * burst {
		_, b, err := c.Read(ctx)
		if err != nil {
			t.Fatalf("%v after %d devices\n%s", err, len(heard), p.log)
		}
		var e struct {
			Result struct {
				ResourceChanged struct {
					ResourceID struct{ DeviceID string } `json:"resourceId"`
					Content    struct{ N int }
				}
			}
		}
		if err := json.Unmarshal(b, &e); err != nil {
			t.Fatalf("%s: %v", b, err)
		}
		if err := checkFrame(b); err != nil {
			t.Fatal(err)
		}
		id, n := e.Result.ResourceChanged.ResourceID.DeviceID, e.Result.ResourceChanged.Content.N
		if heard[id]++; id == "" || n != heard[id] {
			t.Fatalf("%q says %d, want %d: %s", id, n, heard[id], b)
		}
	}
	for range peers {
		if err := <-sent; err != nil {
			t.Error(err)
		}
	}
	for id, n := range values() {
		if n != burst {
			t.Errorf("the twin of %s ended at %d", id, n)
		}
	}
	if len(heard) != devices {
		t.Errorf("%d devices were heard", len(heard))
	}
}
