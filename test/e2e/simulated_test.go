package e2e_test

import (
	"context"
	"encoding/json"
	"errors"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/dose"
	"github.com/coaphub/coaphub/test/hubtest"
)

// TestSimulatedDevice lets a simulated device live over each way to the hub (over two for bare go test): it comes, reports and
// goes.
func TestSimulatedDevice(t *testing.T) {
	t.Parallel()
	for _, tr := range dose.Of(transports[:2], transports, transports) {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			id := deviceID(1)
			d, err := device.New(simulation(t, h, tr, id))
			if err != nil {
				t.Fatal(err)
			}
			ctx, leave := context.WithCancel(t.Context())
			ended := make(chan error, 1)
			code := h.Code(t, id)
			go func() { ended <- d.Run(ctx, func(context.Context) (string, error) { return code, nil }) }()
			a := application(t, h)
			a.until("the device to be in sync", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })
			// The first value has several blocks: it fits into no datagram.
			for power, name := range []string{strings.Repeat("on and off. ", 300), "short"} {
				if n, err := d.Set("/light/1", map[string]any{"name": name, "state": true, "power": uint64(power)}); err != nil || n == 0 {
					t.Fatalf("%d notifications, %v", n, err)
				}
				a.until("the notification", func() bool { return a.light(id) == (light{name, true, power}) })
			}
			// And it obeys.
			if status := a.ask(http.MethodPut, "/api/v1/devices/"+id+"/resources/light/1", `{"name":"obeys","power":7}`, nil); status != http.StatusOK {
				t.Errorf("the command got %d", status)
			}
			a.until("what it was told", func() bool { return a.light(id) == (light{"obeys", true, 7}) })
			leave()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			a.until("the device to be gone", func() bool { return a.twin(id) == "OFFLINE OUT_OF_SYNC" })
			if n := d.Stats().Failures.Load(); n != 0 {
				t.Errorf("%d failures", n)
			}
		})
	}
}

// simulation is a device that comes over tr.
func simulation(t *testing.T, h *hubtest.Hub, tr transport, id string) device.Config {
	t.Helper()
	e := h.Endpoints
	cfg := device.Config{ID: id, HubAddr: map[string]string{
		"coaps+tcp": e.CoAPSTCP, "coaps": e.CoAPS, "coap+tcp": e.CoAPTCP, "coap": e.CoAP, "coap+ws": e.CoAPWS,
	}[tr.scheme]}
	switch {
	case tr.name == "psk":
		cfg.PSK = &device.PSK{}
		cfg.PSK.Identity, cfg.PSK.Key = h.PSK(t, id)
	case tr.secure:
		o := h.Onboard(t, id)
		var err error
		if cfg.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), h.ID); err != nil {
			t.Fatal(err)
		}
	}
	return cfg
}

// app is an application that uses the HTTP door.
type app struct {
	t      *testing.T
	base   string
	token  string
	accept string // the form that it asks for; empty: simple JSON
}

func application(t *testing.T, h *hubtest.Hub) *app {
	return &app{t: t, base: h.HTTP, token: h.Token(t)}
}

// ask asks and decodes what came into v, if v is not nil.
func (a *app) ask(method, path, body string, v any) int {
	a.t.Helper()
	req, err := http.NewRequestWithContext(a.t.Context(), method, a.base+path, strings.NewReader(body))
	if err != nil {
		a.t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+a.token)
	if body != "" {
		req.Header.Set("Content-Type", "application/json")
	}
	if a.accept != "" {
		req.Header.Set("Accept", a.accept)
	}
	resp, err := checked(a.t).Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	if v != nil && resp.StatusCode == http.StatusOK {
		if err := json.NewDecoder(resp.Body).Decode(v); err != nil {
			a.t.Fatalf("%s %s: %v", method, path, err)
		}
	}
	return resp.StatusCode
}

// twin is a device's status and whether its twin is what it is: "ONLINE IN_SYNC".
func (a *app) twin(id string) string {
	a.t.Helper()
	var d struct {
		Metadata struct {
			Connection          struct{ Status string }
			TwinSynchronization struct{ State string }
		}
	}
	a.ask(http.MethodGet, "/api/v1/devices/"+id, "", &d)
	return d.Metadata.Connection.Status + " " + d.Metadata.TwinSynchronization.State
}

// light is the value of a device's light as the hub knows it.
func (a *app) light(id string) (v light) {
	a.t.Helper()
	a.ask(http.MethodGet, "/api/v1/devices/"+id+"/resources/light/1?onlyContent=true", "", &v)
	return v
}

type light struct {
	Name  string
	State bool
	Power int
}

// until waits for what the hub comes to know in its own time.
func (a *app) until(what string, ok func() bool) {
	a.t.Helper()
	a.within(2*time.Minute, what, ok) // others may have the machine, and devices come back by themselves
}

func (a *app) within(limit time.Duration, what string, ok func() bool) {
	a.t.Helper()
	if !eventually(a.t.Context(), limit, ok) {
		a.t.Fatalf("waited %v for %s", limit, what)
	}
}
