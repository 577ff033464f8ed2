package load

import (
	"context"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/plgd-dev/go-coap/v3/message/codes"

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

// The current state, with which a subscription begins, is not taken for a notification.
func TestCurrentStateIsNoNotification(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	var current atomic.Value // the last twin that was read
	mux := http.NewServeMux()
	mux.HandleFunc("GET /api/v1/devices/", func(w http.ResponseWriter, r *http.Request) {
		c := caller{api: API{URL: h.HTTP, Tokens: []string{h.Token(t)}}}
		defer c.close()
		if _, _, err := c.do(r.Context(), 0, r.Method, r.URL.Path, ""); err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		current.Store(c.body.String())
		_, _ = w.Write(c.body.Bytes())
	})
	mux.HandleFunc("GET /api/v1/ws/events", func(w http.ResponseWriter, r *http.Request) {
		subscribed(w, r, func(c *websocket.Conn) {
			_ = c.Write(r.Context(), websocket.MessageText, []byte(current.Load().(string)))
			_, _, _ = c.Read(r.Context())
		})
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	var got Result
	if err := Run(t.Context(), Config{
		Devices: 1, AtOnce: 1, Listeners: 1, During: time.Millisecond, Burst: 5, Phases: []string{"burst", "fan-out"}, patience: time.Second,
		API: API{URL: s.URL, Tokens: []string{"x"}},
		Onboard: func(_ context.Context, _, _ int, id string) (device.Onboarding, error) {
			o := h.Onboard(t, id)
			return device.Onboarding{Code: o.Code, HubAddr: h.Endpoints.CoAPSTCP, Provider: "coaphub", TLS: o.TLS}, nil
		},
	}, func(r Result) { got = r }); err != nil {
		t.Fatal(err)
	}
	if got.Phase != "fan-out" || got.Ops != 0 || got.Failed != 1 {
		t.Errorf("%+v", got)
	}
}

// subscribed acknowledges a subscription; then the rest is what comes of it.
func subscribed(w http.ResponseWriter, r *http.Request, rest func(*websocket.Conn)) {
	c, err := websocket.Accept(w, r, nil)
	if err != nil {
		return
	}
	defer func() { _ = c.CloseNow() }()
	if _, _, err = c.Read(r.Context()); err == nil {
		err = c.Write(r.Context(), websocket.MessageText, []byte(`{"result":{"operationProcessed":{"errorStatus":{"code":"OK"}}}}`))
	}
	if err == nil {
		rest(c)
	}
}

// front stands before a hub's API and does not let through what a phase needs: commands are refused, lists and answers are
// empty, and a subscription is acknowledged and then silent, or at its end.
func front(t *testing.T, h *hubtest.Hub, silent bool) string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("PUT /", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "not here", http.StatusForbidden) })
	mux.HandleFunc("GET /", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /api/v1/ws/events", func(w http.ResponseWriter, r *http.Request) {
		subscribed(w, r, func(c *websocket.Conn) {
			if silent {
				_, _, _ = c.Read(r.Context())
			}
		})
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return s.URL
}

// Where nothing is done, nothing is measured, and it says why: there are no zeros.
func TestWhatCannotBeMeasured(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	run := func(api string, pids []int, phases ...string) map[string]Result {
		t.Helper()
		got := map[string]Result{}
		if err := Run(t.Context(), Config{
			Devices: 2, AtOnce: 2, UnderWay: 2, During: 10 * time.Millisecond, Rate: 200, Burst: 2, Listeners: 2, Phases: phases, PIDs: pids,
			API: API{URL: api, Tokens: []string{"x"}}, Seed: api, patience: time.Second,
			Onboard: func(_ context.Context, _, _ int, id string) (device.Onboarding, error) {
				o := h.Onboard(t, id)
				return device.Onboarding{Code: o.Code, HubAddr: h.Endpoints.CoAPSTCP, Provider: "coaphub", TLS: o.TLS}, nil
			},
		}, func(r Result) { got[r.Phase] = r }); err != nil {
			t.Fatal(err)
		}
		return got
	}
	missing := func(got map[string]Result, phase, why string) {
		t.Helper()
		r := got[phase]
		if !strings.Contains(r.Missing, why) || r.Ops != 0 || r.PerSecond != 0 || r.HubCPU != nil || r.P50 != nil || r.PerDevice != nil {
			t.Errorf("%s: %+v, want missing: %s", phase, r, why)
		}
	}
	got := run(front(t, h, true), nil, "idle", "notify", "notify-open", "burst", "commands", "device-reads", "twin-reads", "list", "fan-out")
	for phase, why := range map[string]string{
		"start": errNoPID.Error(), "idle": errNoPID.Error(), "notify": errNotHeard.Error(), "notify-open": errNotHeard.Error(), "fan-out": errNotHeard.Error(),
		"burst": "a twin did not end at the last value", "commands": "403", "device-reads": "less than 1 of", "twin-reads": "less than 1 of",
		"list": "less than 2 of",
	} {
		missing(got, phase, why)
	}
	if r := got["setup"]; r.Missing != "" || r.Ops != 2 || r.OwnCPU != nil {
		t.Errorf("%+v", r)
	}
	got = run(front(t, h, false), []int{1 << 30}, "idle", "notify", "notify-open", "fan-out") // there is no such process
	for phase, why := range map[string]string{
		"start": "read the memory of process", "idle": "read the memory of process", "notify": "the subscription ended", "notify-open": "the subscription ended",
		"fan-out": "the subscription ended",
	} {
		missing(got, phase, why)
	}
}

// Whoever reads the figures is told when they may be the load's.
func TestDoubts(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		r    Result
		want string
	}{
		{Result{Ops: 1000, Late: 10, LateBy: ptr(20.0), OwnCPU: ptr(0.5), OwnCores: ptr(0.1)}, ""},
		{Result{Ops: 1000, Late: 11, LateBy: ptr(20.0)}, "the load was late with 11 of 1000 sends, by up to 20.0 ms"},
		{Result{Ops: 1000, OwnCPU: ptr(0.51)}, "the load took 51% of the CPU time"},
		{Result{Ops: 1000, OwnCores: ptr(float64(runtime.NumCPU()))}, "cores busy"},
	} {
		if got := strings.Join(c.r.Doubts(), "; "); !strings.Contains(got, c.want) || (got == "") != (c.want == "") {
			t.Errorf("%+v: %q, want %q", c.r, got, c.want)
		}
	}
}

// relay is a way for datagrams of one device to a hub on which its next notification can be lost.
func relay(t *testing.T, to string) (at string, lose *atomic.Bool) {
	t.Helper()
	in, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	out, err := net.Dial("udp", to)
	if err != nil {
		t.Fatal(err)
	}
	lose = &atomic.Bool{}
	var device atomic.Value
	var wg sync.WaitGroup
	wg.Go(func() {
		for b := make([]byte, 2048); ; {
			n, from, err := in.ReadFrom(b)
			if err != nil {
				return
			}
			device.Store(from)
			notification := n > 1 && b[0]>>4&3 == 0 && b[1] == byte(codes.Content) // confirmable: an answer is an acknowledgement
			if !notification || !lose.CompareAndSwap(true, false) {
				_, _ = out.Write(b[:n])
			}
		}
	})
	wg.Go(func() {
		for b := make([]byte, 2048); ; {
			n, err := out.Read(b)
			if err != nil {
				return
			}
			_, _ = in.WriteTo(b[:n], device.Load().(net.Addr))
		}
	})
	t.Cleanup(func() {
		_, _ = in.Close(), out.Close()
		wg.Wait()
	})
	return in.LocalAddr().String(), lose
}

// A notification that is lost on its way is sent again and arrives; that is no failure, and it is counted.
func TestALostDatagram(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.plainAddress=127.0.0.1:0"))
	at, lose := relay(t, h.CoAPPlainUDP)
	var got Result
	if err := Run(t.Context(), Config{
		// Long enough to begin with one on a busy machine, and over before it is sent again (RFC 7252, Section 4.8: 2 s).
		Devices: 1, AtOnce: 1, UnderWay: 1, During: 500 * time.Millisecond, Phases: []string{"notify"}, API: API{URL: h.HTTP, Tokens: []string{h.Token(t)}},
		Onboard: func(_ context.Context, _, _ int, id string) (device.Onboarding, error) {
			return device.Onboarding{Code: h.Code(t, id), HubAddr: "coap://" + at, Provider: "coaphub"}, nil
		},
	}, func(r Result) {
		got = r
		lose.Store(r.Phase == "setup")
	}); err != nil {
		t.Fatal(err)
	}
	if got.Phase != "notify" || got.Failed > 0 || got.Ops == 0 || got.Retransmitted == nil || *got.Retransmitted != 1 {
		t.Errorf("%+v", got)
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
