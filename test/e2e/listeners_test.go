package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/dose"
	"github.com/coaphub/coaphub/test/hubtest"
)

// TestListenersThatComeAndGo: devices report, listeners hang up in the middle and resume, and the hub is restarted. Each listener
// hears what the event log has of each device: everything, once, in its order. What happens when is random, from a seed.
func TestListenersThatComeAndGo(t *testing.T) {
	t.Parallel()
	for seed := range dose.Of[uint64](1, 2, 20) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			t.Parallel()
			comeAndGo(t, rand.New(rand.NewPCG(seed, 0)))
		})
	}
}

func comeAndGo(t *testing.T, rng *rand.Rand) {
	const devices, listeners, phases, reports = 3, 4, 3, 20
	h := hubtest.Start(t)
	creds := make([]device.Credentials, devices)
	power := make([]uint64, devices)
	crowd := make([]*patientListener, listeners)
	for i := range crowd {
		crowd[i] = &patientListener{rng: rand.New(rand.NewPCG(rng.Uint64(), 0)), heard: map[string][]string{}}
	}
	var a *app
	for phase := range phases {
		if phase > 0 {
			h.Restart(t)
		}
		a = application(t, h)
		ctx, leave := context.WithCancel(t.Context())
		var running sync.WaitGroup
		fleet := make([]*device.Device, devices)
		begin := func(i int) {
			id := deviceID(i + 1)
			cfg := simulation(t, h, transports[0], id)
			cfg.PerResource = true
			d, err := device.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			d.SetCredentials(creds[i])
			code := h.Code(t, id)
			running.Go(func() {
				if err := d.Run(ctx, func(context.Context) (string, error) { return code, nil }); !errors.Is(err, context.Canceled) {
					t.Errorf("device %d: %v", i, err)
				}
			})
			fleet[i] = d
		}
		for i, l := range crowd {
			if i > 0 || phase == 0 { // the first one leaves for good
				running.Go(func() { l.listen(ctx, t, h.HTTP, a.token) })
				a.until("a listener to be there before the first device", l.live.Load)
			}
		}
		for i := range fleet {
			begin(i)
		}
		for i, d := range fleet {
			a.until("a device to be in sync", func() bool { return a.twin(d.ID()) == "ONLINE IN_SYNC" && d.Observed("/light/1") > 0 })
			creds[i] = d.Credentials()
		}
		for range reports {
			i := rng.IntN(devices)
			power[i]++
			if _, err := fleet[i].Set("/light/1", map[string]any{"name": "x", "state": true, "power": power[i]}); err != nil {
				t.Fatal(err)
			}
		}
		for i, d := range fleet {
			a.until("the last value", func() bool { return power[i] == 0 || uint64(a.light(d.ID()).Power) == power[i] })
		}
		if phase == phases-1 {
			wantAllHeard(t, a, crowd)
		}
		leave() // in the middle of what they hear
		running.Wait()
	}
}

// wantAllHeard compares what the listeners have heard with the log.
func wantAllHeard(t *testing.T, a *app, crowd []*patientListener) {
	t.Helper()
	for i := range 3 {
		id := deviceID(i + 1)
		var log []string
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, a.base+"/api/v1/events?resourceIdFilter="+id+"/light/1", nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Authorization", "Bearer "+a.token)
		resp, err := checked(t).Do(req)
		if err != nil {
			t.Fatal(err)
		}
		for dec := json.NewDecoder(resp.Body); dec.More(); {
			var m told
			if err := dec.Decode(&m); err != nil {
				t.Fatal(err)
			}
			log = append(log, m.Result.ResourceChanged.EventMetadata.Version)
		}
		_ = resp.Body.Close()
		if len(log) == 0 {
			t.Fatalf("the log has nothing of %s", id)
		}
		for n, l := range crowd {
			if n == 0 { // it left with the first phase, for good
				l.mu.Lock()
				heard := slices.Clone(l.heard[id])
				l.mu.Unlock()
				if len(heard) > len(log) || !slices.Equal(heard, log[:len(heard)]) {
					t.Errorf("the one that left heard %v of %s, the log has %v", heard, id, log)
				}
				continue
			}
			if !eventually(t.Context(), 20*time.Second, func() bool {
				l.mu.Lock()
				defer l.mu.Unlock()
				return len(l.heard[id]) >= len(log)
			}) {
				t.Fatalf("listener %d waits for something of %s", n, id)
			}
			l.mu.Lock()
			if heard := l.heard[id]; !slices.Equal(heard, log) {
				t.Errorf("listener %d heard %v of %s, the log has %v", n, heard, id, log)
			}
			l.mu.Unlock()
		}
	}
}

// told is what these tests look at.
type told struct {
	Result struct {
		ResumeToken        string
		OperationProcessed *struct{ ErrorStatus struct{ Code string } }
		ResourceChanged    *struct {
			ResourceID    struct{ DeviceID, Href string }
			EventMetadata struct{ Version string }
		}
	}
}

// patientListener hears what changes and goes on where it was, however often it is interrupted.
type patientListener struct {
	rng  *rand.Rand // of the goroutine that listens
	live atomic.Bool

	mu     sync.Mutex // guards all below
	resume string
	heard  map[string][]string // versions, by device
}

func (l *patientListener) listen(ctx context.Context, t *testing.T, base, token string) {
	for ctx.Err() == nil {
		if err := l.hear(ctx, base, token, 1+l.rng.IntN(12)); err != nil && ctx.Err() == nil {
			t.Errorf("a listener: %v", err)
			return
		}
	}
}

// hear listens until it has heard enough, and hangs up without a word.
func (l *patientListener) hear(ctx context.Context, base, token string, enough int) error {
	c, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(base, "http")+"/api/v1/ws/events", &websocket.DialOptions{Subprotocols: []string{"Bearer", token}})
	if err != nil {
		return err
	}
	defer func() { _ = c.CloseNow() }()
	l.mu.Lock()
	ask := fmt.Sprintf(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light/1"],"resumeToken":%q}}`, l.resume)
	l.mu.Unlock()
	if err := c.Write(ctx, websocket.MessageText, []byte(ask)); err != nil {
		return err
	}
	for enough > 0 {
		_, b, err := c.Read(ctx)
		if err != nil {
			return err
		}
		var m told
		if err := json.Unmarshal(b, &m); err != nil {
			return err
		}
		l.mu.Lock()
		l.resume = m.Result.ResumeToken
		if r := m.Result.ResourceChanged; r != nil {
			l.heard[r.ResourceID.DeviceID] = append(l.heard[r.ResourceID.DeviceID], r.EventMetadata.Version)
			enough--
		} else if p := m.Result.OperationProcessed; p == nil || p.ErrorStatus.Code != "OK" {
			enough = 0
			err = fmt.Errorf("it was told %s", b)
		}
		l.mu.Unlock()
		if err != nil {
			return err
		}
		l.live.Store(true)
	}
	return nil
}
