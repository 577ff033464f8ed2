package load

import (
	"context"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// A hub that goes away in the middle is measured as one: what was under way has failed, and says why.
func TestHubGoes(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	cfg := Config{
		Devices: 2, AtOnce: 2, UnderWay: 2, During: time.Second, Rate: 100, Burst: 2, Listeners: 1, Rounds: 1, Transport: "coaps+tcp",
		Phases: []string{"twin-reads", "command"}, PIDs: []int{os.Getpid()}, API: API{URL: h.HTTP, Tokens: []string{h.Token(t)}},
		Onboard: func(_ context.Context, _, _ int, id string) (device.Onboarding, error) {
			o := h.Onboard(t, id)
			return device.Onboarding{Code: o.Code, HubAddr: h.Endpoints.CoAPSTCP, Provider: "coaphub", TLS: o.TLS}, nil
		},
	}
	got := map[string]Result{}
	if err := Run(t.Context(), cfg, func(r Result) {
		got[r.Phase] = r
		if r.Phase == "command" {
			h.Stop(t)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if r := got["command"]; r.Failed > 0 || r.Ops == 0 {
		t.Errorf("%+v", r)
	}
	if r := got["twin-reads"]; r.Failed == 0 || !strings.Contains(r.Missing, "refused") || r.Ops != 0 {
		t.Errorf("%+v", r)
	}
	// Without devices that could be set up there is nothing to measure.
	at := h.Endpoints.CoAPSTCP
	cfg.Onboard = func(context.Context, int, int, string) (device.Onboarding, error) {
		return device.Onboarding{HubAddr: at}, nil
	}
	if err := Run(t.Context(), cfg, func(Result) {}); err == nil || !strings.Contains(err.Error(), "could not be set up") {
		t.Errorf("%v", err)
	}
}

func TestQuantiles(t *testing.T) {
	t.Parallel()
	var sorted []time.Duration
	for i := range 100 {
		sorted = append(sorted, time.Duration(i+1)*time.Millisecond)
	}
	for q, want := range map[float64]float64{0: 1, 0.5: 51, 0.99: 100, 1: 100} {
		if got := *quantile(sorted, q); got != want {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
}

func TestValueInAnEvent(t *testing.T) {
	t.Parallel()
	for text, want := range map[string]uint64{`{"content":{"t":1099511627776,"x":1}}`: 1 << 40, `{"t":5}`: 5, `{"t":}`: 0, `{}`: 0, `{"t":7`: 0} {
		if got, err := valueIn([]byte(text)); got != want || (err == nil) != (want != 0) {
			t.Errorf("%s: %d, %v", text, got, err)
		}
	}
}
