package device

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/google/uuid"
)

// Fleet is many devices that behave.
type Fleet struct {
	// Devices is how many there are.
	Devices int
	// HubAddr as of Config, asked of Onboard when empty.
	HubAddr  string
	Provider string
	// Rate is notifications a second, of all devices together; 0: none.
	Rate float64
	// Resources is the further resources of each device.
	Resources int
	// StartRate is how many devices start in a second; 0: 100. A fleet that starts at once measures TLS handshakes only.
	StartRate int
	// Seed makes the devices' IDs: the same seed gives the same devices. Empty: "coaphub simulate".
	Seed string
	// Onboard is asked for what a device needs: before it connects first, and when it has to sign up again. It may be called by
	// several devices at once.
	Onboard func(ctx context.Context, id string) (Onboarding, error)
	// Progress takes the counts every second, and once at the end; nil: nobody does.
	Progress func(Counts)
	Log      *slog.Logger // nil: nowhere
}

// Onboarding is what a device needs to sign up.
type Onboarding struct {
	Code     string
	HubAddr  string      // used if the Fleet names none
	Provider string      // used if the Fleet names none
	TLS      *tls.Config // nil for coap+tcp and coap
	PSK      *PSK        // in place of TLS, for coaps
}

// Counts is a fleet at one moment.
type Counts struct {
	Elapsed    time.Duration
	Devices    int // started
	Online     int64
	SignUps    int64
	Published  int64
	Notified   int64
	Requests   int64
	Refreshes  int64
	Reconnects int64
	Failures   int64
	PerSecond  float64 // notifications, since the counts before
}

// String is a progress line.
func (c Counts) String() string {
	return fmt.Sprintf("%5ds  devices %d  online %d  signed up %d  links %d  notified %d (%.0f/s)  requests %d  refreshed %d  reconnects %d  failures %d",
		int(c.Elapsed.Seconds()), c.Devices, c.Online, c.SignUps, c.Published, c.Notified, c.PerSecond, c.Requests,
		c.Refreshes, c.Reconnects, c.Failures)
}

// DeviceID returns the ID of the i-th device, from 0.
func (f Fleet) DeviceID(i int) string {
	seed := f.Seed
	if seed == "" {
		seed = "coaphub simulate"
	}
	return uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "%s %d", seed, i)).String()
}

// notifiers share the fleet: one device whose connection is stuck holds up a share of it for writeTimeout.
const notifiers = 8

// Run starts the devices and lets them live until ctx ends, which is no error.
func (f Fleet) Run(ctx context.Context) (Counts, error) {
	switch {
	case f.Devices <= 0:
		return Counts{}, errors.New("a fleet needs at least one device")
	case f.Onboard == nil:
		return Counts{}, errors.New("a fleet needs a way to onboard its devices")
	case f.Rate < 0 || f.StartRate < 0 || f.Resources < 0:
		return Counts{}, errors.New("rate, start rate and resources cannot be negative")
	}
	if f.StartRate == 0 {
		f.StartRate = 100
	}
	var (
		stats   Stats
		begin   = time.Now()
		mu      sync.Mutex // guards started
		started []*Device  // in order
		wg      sync.WaitGroup
	)
	last := Counts{}
	counts := func() Counts {
		mu.Lock()
		n := len(started)
		mu.Unlock()
		c := Counts{
			Elapsed: time.Since(begin), Devices: n, Online: stats.Online.Load(), SignUps: stats.SignUps.Load(),
			Published: stats.Published.Load(), Notified: stats.Notified.Load(), Requests: stats.Requests.Load(),
			Refreshes: stats.Refreshes.Load(), Reconnects: stats.Reconnects.Load(), Failures: stats.Failures.Load(),
		}
		if d := (c.Elapsed - last.Elapsed).Seconds(); d > 0 {
			c.PerSecond = float64(c.Notified-last.Notified) / d
		}
		last = c
		return c
	}

	wg.Go(func() {
		tick := time.NewTicker(max(time.Second/time.Duration(f.StartRate), 1))
		defer tick.Stop()
		for i := range f.Devices {
			wg.Go(func() {
				f.live(ctx, f.DeviceID(i), &stats, func(d *Device) {
					mu.Lock()
					defer mu.Unlock()
					started = append(started, d)
				})
			})
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	})
	if f.Rate > 0 {
		shares := min(notifiers, f.Devices)
		for share := range shares {
			wg.Go(func() {
				f.notify(ctx, f.Rate/float64(shares), func(k int) *Device {
					mu.Lock()
					defer mu.Unlock()
					if mine := (len(started) - share + shares - 1) / shares; mine > 0 {
						return started[share+k%mine*shares]
					}
					return nil
				})
			})
		}
	}
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case <-tick.C:
			if ctx.Err() != nil {
				break
			}
			c := counts()
			if f.Progress != nil {
				f.Progress(c)
			}
		case <-ctx.Done():
		}
	}
	// The last counts say what was online before everybody went, and the rate over the whole time.
	online := last.Online
	wg.Wait()
	end := counts()
	end.Online, end.PerSecond = online, float64(end.Notified)/end.Elapsed.Seconds()
	if f.Progress != nil {
		f.Progress(end)
	}
	return end, nil
}

// live is one device. What it was onboarded with first is kept until the hub refuses it.
func (f Fleet) live(ctx context.Context, id string, stats *Stats, ready func(*Device)) {
	log := f.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	var on Onboarding
	for wait := firstRetry; ; wait = min(2*wait, lastRetry) {
		var err error
		if on, err = f.Onboard(ctx, id); err == nil {
			break
		}
		if ctx.Err() != nil {
			return
		}
		stats.Failures.Add(1)
		log.Warn("onboard", "device", id, "error", err)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
	cfg := Config{
		ID: id, Name: "simulated " + id[:8], HubAddr: f.HubAddr, Provider: f.Provider, TLS: on.TLS, PSK: on.PSK,
		Resources: f.Resources, Stats: stats, Log: log,
	}
	if cfg.HubAddr == "" {
		cfg.HubAddr = on.HubAddr
	}
	if cfg.Provider == "" {
		cfg.Provider = on.Provider
	}
	d, err := New(cfg)
	if err != nil {
		stats.Failures.Add(1)
		log.Error("make a device", "device", id, "error", err)
		return
	}
	ready(d)
	code := on.Code
	_ = d.Run(ctx, func(ctx context.Context) (string, error) { // it only ends with ctx
		if c := code; c != "" {
			code = "" // a code works once
			return c, nil
		}
		on, err := f.Onboard(ctx, id)
		return on.Code, err
	})
}

// notify gives devices new values in turn, rate a second.
func (f Fleet) notify(ctx context.Context, rate float64, device func(k int) *Device) {
	const step = 20 * time.Millisecond
	tick := time.NewTicker(step)
	defer tick.Stop()
	due := rand.Float64() // so that slow fleets do not notify in bursts
	for k := 0; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		// A ticker drops ticks when we are late: the rate is then missed, and the counts show it.
		for due += rate * step.Seconds(); due >= 1; due-- {
			if ctx.Err() != nil {
				return
			}
			d := device(k)
			if d == nil {
				continue
			}
			if d.Observed(resHref)+d.Observed("/light/1") > 0 {
				_, _ = d.Set("/light/1", map[string]any{"name": "Light", "state": k%2 == 0, "power": uint64(k % 101)})
			}
			k++
		}
	}
}
