package device

import (
	"context"
	"errors"
	"fmt"
	"math"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
)

func runDevice(t *testing.T, d *Device, code func(context.Context) (string, error)) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- d.Run(ctx, code) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("Run returned %v", err)
		}
	})
}

func newDevice(t *testing.T, h *fakeHub) *Device {
	t.Helper()
	d, err := New(Config{ID: testID, HubAddr: h.addr})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestRunComesBackAfterABreak(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	var asked atomic.Int64
	runDevice(t, d, func(context.Context) (string, error) { return fmt.Sprintf("code-%d", asked.Add(1)), nil })
	until(t, "publish", func() bool { return d.Stats().Online.Load() == 1 })
	_ = h.conn().Close()
	until(t, "second session", func() bool { return d.Stats().SignIns.Load() == 2 && d.Stats().Online.Load() == 1 })
	if asked.Load() != 1 || d.Stats().SignUps.Load() != 1 {
		t.Errorf("%d codes, %d sign-ups, want one", asked.Load(), d.Stats().SignUps.Load())
	}
}

// A hub that releases the connection (RFC 8323, 5.5) leaves it to the device to close it.
func TestRunComesBackAfterARelease(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	runDevice(t, d, func(context.Context) (string, error) { return "code", nil })
	until(t, "publish", func() bool { return d.Stats().Online.Load() == 1 })
	m := pool.NewMessage(t.Context())
	m.SetCode(codes.Release)
	if err := h.conn().WriteMessage(m); err != nil {
		t.Fatal(err)
	}
	until(t, "second session", func() bool { return d.Stats().SignIns.Load() == 2 && d.Stats().Online.Load() == 1 })
}

func TestRunRefreshesARefusedToken(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	d.SetCredentials(Credentials{UID: "alice", Access: "bad", Refresh: "r"})
	h.set(func() { h.refuse["/oic/sec/session"] = codes.Unauthorized })
	runDevice(t, d, func(context.Context) (string, error) { return "", errors.New("no code is needed") })
	until(t, "refresh", func() bool { return h.saw("POST /oic/sec/tokenrefresh") > 0 })
	h.set(func() { delete(h.refuse, "/oic/sec/session") })
	until(t, "session", func() bool { return d.Stats().Online.Load() == 1 })
	if d.Stats().SignUps.Load() != 0 {
		t.Error("it signed up again")
	}
}

func TestRunSignsUpAgainWhenNothingIsLeft(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	d.SetCredentials(Credentials{UID: "alice", Refresh: "bad"})
	h.set(func() { h.refuse["/oic/sec/tokenrefresh"] = codes.Unauthorized })
	runDevice(t, d, func(context.Context) (string, error) { return "code", nil })
	until(t, "session", func() bool { return d.Stats().Online.Load() == 1 })
	if d.Stats().SignUps.Load() != 1 {
		t.Error("it did not sign up")
	}
}

// Trouble of the hub's costs a device nothing.
func TestRunKeepsItsCredentialsOn503(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	want := Credentials{UID: "alice", Access: "a", Refresh: "r"}
	d.SetCredentials(want)
	h.set(func() { h.refuse["/oic/sec/session"] = codes.ServiceUnavailable })
	runDevice(t, d, func(context.Context) (string, error) { return "", errors.New("no code is needed") })
	until(t, "second attempt", func() bool { return h.saw("POST /oic/sec/session") > 1 })
	if got := d.Credentials(); got != want {
		t.Errorf("credentials %+v", got)
	}
	if h.saw("POST /oic/sec/tokenrefresh") != 0 {
		t.Error("it refreshed a token that nobody refused")
	}
}

// A device comes again when the hub says, and not before.
func TestRunWaitsForMaxAge(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	d.SetCredentials(Credentials{UID: "alice", Access: "a", Refresh: "r"})
	h.set(func() {
		h.refuse["/oic/sec/session"] = codes.ServiceUnavailable
		h.with = message.Options{{ID: message.MaxAge, Value: []byte{2}}}
	})
	begin := time.Now()
	runDevice(t, d, func(context.Context) (string, error) { return "", errors.New("no code is needed") })
	until(t, "second attempt", func() bool { return h.saw("POST /oic/sec/session") > 1 })
	if took := time.Since(begin); took < 2*time.Second {
		t.Errorf("it came again after %v", took)
	}
}

func TestRunRefreshesBeforeExpiry(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := newDevice(t, h)
	h.set(func() { h.expires = 1 })
	runDevice(t, d, func(context.Context) (string, error) { return "code", nil })
	until(t, "refresh", func() bool { return d.Stats().Refreshes.Load() > 0 })
	if d.Stats().Reconnects.Load() != 0 {
		t.Error("it reconnected for it")
	}
}

func TestFleet(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	var lines atomic.Int64
	var enough atomic.Bool
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	f := Fleet{
		Devices: 20, HubAddr: h.addr, Rate: 200, Resources: 3, StartRate: 1000,
		Onboard: func(_ context.Context, id string) (Onboarding, error) { return Onboarding{Code: "code-" + id}, nil },
		Progress: func(c Counts) {
			lines.Add(1)
			if c.Online == 20 && c.Published == 20*7 {
				enough.Store(true)
				stop()
			}
			if !strings.Contains(c.String(), "online") {
				t.Errorf("progress line %q", c)
			}
		},
	}
	time.AfterFunc(10*time.Second, stop)
	c, err := f.Run(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if !enough.Load() || c.SignUps != 20 || c.Devices != 20 {
		t.Errorf("counts %v", c)
	}
	if same := (Fleet{}); f.DeviceID(3) != same.DeviceID(3) || f.DeviceID(3) == f.DeviceID(4) {
		t.Error("device IDs are not the same for the same seed, or not different")
	}
	h.set(func() {
		for code, n := range h.codes {
			if n != 1 {
				t.Errorf("%s was used %d times", code, n)
			}
		}
	})
}

func TestFleetNotifiesWhatIsObserved(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	time.AfterFunc(10*time.Second, stop)
	f := Fleet{
		Devices: 1, HubAddr: h.addr, Rate: 500,
		Onboard: func(context.Context, string) (Onboarding, error) { return Onboarding{Code: "c"}, nil },
		Progress: func(c Counts) {
			if c.Notified > 10 {
				stop()
			}
		},
	}
	done := make(chan Counts, 1)
	go func() {
		c, err := f.Run(ctx)
		if err != nil {
			t.Error(err)
		}
		done <- c
	}()
	until(t, "publish", func() bool { return h.saw("POST /oic/rd") > 0 })
	if _, err := h.conn().Observe(t.Context(), "/oic/res", nothing, q("if=oic.if.b")); err != nil {
		t.Fatal(err)
	}
	if c := <-done; c.Notified <= 10 {
		t.Errorf("counts %v", c)
	}
}

// All devices start at once if so many may.
func TestFleetStartsAtOnce(t *testing.T) {
	t.Parallel()
	ctx, stop := context.WithCancel(t.Context())
	asked := 0
	f := Fleet{Devices: 1, StartRate: math.MaxInt, Onboard: func(context.Context, string) (Onboarding, error) {
		asked++
		stop()
		return Onboarding{}, errors.New("enough")
	}}
	if _, err := f.Run(ctx); err != nil || asked != 1 {
		t.Errorf("%d devices, %v", asked, err)
	}
}

func TestFleetMistakes(t *testing.T) {
	t.Parallel()
	for _, f := range []Fleet{{}, {Devices: 1}, {Devices: 1, Rate: -1, Onboard: func(context.Context, string) (Onboarding, error) { return Onboarding{}, nil }}} {
		if _, err := f.Run(t.Context()); err == nil {
			t.Errorf("%+v was accepted", f)
		}
	}
}

func nothing(*pool.Message) {}
