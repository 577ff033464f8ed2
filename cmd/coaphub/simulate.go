package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/test/device"
)

func newSimulate(p process) *cobra.Command {
	var f device.Fleet
	var duration, one, code, certs, server, provider string
	var verbose bool
	cmd := &cobra.Command{
		Use:   "simulate --devices N",
		Short: "Simulate devices that behave: they sign up, publish, notify, obey and come back",
		Long: "simulate runs devices against the hub of this data folder until it is stopped or --duration is over. With\n" +
			"--device-id it is one device with what coaphub onboard --out made for it, for any hub:\n" +
			"  coaphub simulate --device-id ID --cert DIR --code CODE --server coaps+tcp://hub:5684",
		Args: none,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		if duration != "" {
			d, err := conf.ParseDuration(duration)
			if err != nil || d <= 0 {
				return usage("--duration: %q is not a duration above zero; write for example 30s or 10m", duration)
			}
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, d)
			defer cancel()
		}
		log := slog.New(slog.DiscardHandler)
		if verbose {
			log = slog.New(slog.NewTextHandler(p.err, &slog.HandlerOptions{Level: slog.LevelDebug}))
		}
		if one != "" {
			if certs == "" || code == "" || server == "" {
				return usage("--device-id needs --cert, --code and --server, as coaphub onboard --out prints them")
			}
			return simulateOne(ctx, p, one, certs, code, server, provider, f.Rate, log)
		}
		if certs != "" || code != "" || server != "" {
			return usage("--cert, --code and --server belong to --device-id")
		}
		if f.Devices < 1 || f.Devices > 1_000_000 {
			return usage("--devices must be from 1 to 1000000")
		}
		c, err := control(cmd)
		if err != nil {
			return err
		}
		if _, err := c.Status(ctx); err != nil { // one clear error instead of one a device
			return err
		}
		f.Log = log
		f.Onboard = func(ctx context.Context, id string) (device.Onboarding, error) { return onboardDevice(ctx, c, id) }
		show := newCounts(p)
		f.Progress = show.at
		counts, err := f.Run(ctx)
		show.end(counts)
		if err == nil && counts.SignUps == 0 && counts.Online == 0 && counts.Published == 0 {
			err = errors.New("no device could sign up; coaphub status --refused says why, --verbose what the devices saw")
		}
		return err
	}
	fl := cmd.Flags()
	fl.IntVar(&f.Devices, "devices", 1, "how many devices")
	fl.Float64Var(&f.Rate, "rate", 1, "notifications a second, of all devices together")
	fl.IntVar(&f.Resources, "resources", 0, "further resources of each device")
	fl.IntVar(&f.StartRate, "start-rate", 100, "how many devices start in a second")
	fl.StringVar(&f.Seed, "seed", "", "makes the devices' IDs: the same seed gives the same devices")
	fl.StringVar(&duration, "duration", "", "how long (default until it is stopped)")
	fl.StringVar(&one, "device-id", "", "one device with this ID")
	fl.StringVar(&certs, "cert", "", "folder with cert.pem, key.pem and ca.pem of --device-id")
	fl.StringVar(&code, "code", "", "authorization code of --device-id")
	fl.StringVar(&server, "server", "", "hub of --device-id: coaps+tcp://host:port")
	fl.StringVar(&provider, "provider", "coaphub", "authorization provider of --device-id")
	fl.BoolVar(&verbose, "verbose", false, "log what goes wrong")
	return cmd
}

// onboardDevice gets what a device needs from the running hub.
func onboardDevice(ctx context.Context, c *bundle.Control, id string) (device.Onboarding, error) {
	o, err := c.Onboard(ctx, bundle.OnboardRequest{DeviceID: id, Certificate: true})
	if err != nil {
		return device.Onboarding{}, err
	}
	tls, err := device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID)
	if err != nil {
		return device.Onboarding{}, fmt.Errorf("the device's certificate: %w", err)
	}
	return device.Onboarding{Code: o.AuthorizationCode, HubAddr: o.Endpoints.CoAPSTCP, Provider: o.AuthorizationProvider, TLS: tls}, nil
}

// simulateOne is one device with credentials of its own. Its light goes on and off.
func simulateOne(ctx context.Context, p process, id, certs, code, server, provider string, rate float64, log *slog.Logger) error {
	tls, err := device.TLSFiles(filepath.Join(certs, "ca.pem"), filepath.Join(certs, "cert.pem"), filepath.Join(certs, "key.pem"), "")
	if err != nil {
		return err
	}
	d, err := device.New(device.Config{ID: id, HubAddr: server, TLS: tls, Provider: provider, Log: log})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var refused error
	asked := false
	ended := make(chan error, 1)
	go func() { // ends with ctx; waited for below
		ended <- d.Run(ctx, func(context.Context) (string, error) {
			if asked { // a code works once
				refused = errors.New("the hub refused the sign-up; coaphub onboard makes another code, coaphub status --refused says why")
				cancel()
				return "", refused
			}
			asked = true
			return code, nil
		})
	}()
	every := time.Duration(math.MaxInt64)
	if rate > 0 {
		every = time.Duration(float64(time.Second) / rate)
	}
	tick := time.NewTicker(max(every, time.Millisecond))
	defer tick.Stop()
	online := false
	for n := 0; ; {
		select {
		case err := <-ended:
			d.Close()
			if refused != nil {
				return refused
			}
			if ctx.Err() != nil {
				return nil
			}
			return err
		case <-tick.C:
			if s := d.Stats(); s.Online.Load() > 0 && !online {
				online = true
				_, _ = fmt.Fprintf(p.out, "device %s is online at %s\n", id, server)
			} else if s.Online.Load() == 0 {
				online = false
				continue
			}
			n++
			if _, err := d.Set("/light/1", map[string]any{"state": n%2 == 1, "power": n}); err != nil {
				log.Debug("not notified", "error", err)
			}
		}
	}
}

// counts shows how a fleet is: a line that is written over on a terminal, else one line in ten seconds.
type counts struct {
	p        process
	terminal bool
	n        int
}

func newCounts(p process) *counts { return &counts{p: p, terminal: terminal(p.out)} }

func (c *counts) at(now device.Counts) {
	switch {
	case c.terminal:
		_, _ = fmt.Fprintf(c.p.out, "\r%s ", now)
	case c.n%10 == 0:
		_, _ = fmt.Fprintln(c.p.out, now)
	}
	c.n++
}

func (c *counts) end(last device.Counts) {
	if c.terminal {
		_, _ = fmt.Fprint(c.p.out, "\r")
	}
	_, _ = fmt.Fprintln(c.p.out, last)
}
