package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/test/device"
)

func newSimulate(p process) *cobra.Command {
	var f device.Fleet
	var duration, scheme string
	var one single
	var psk, verbose bool
	cmd := &cobra.Command{
		Use:   "simulate --devices N",
		Short: "Simulate devices that behave: they sign up, publish, notify, obey and come back",
		Long: "simulate runs devices against the hub of this data folder until it is stopped or --duration is over. They come over\n" +
			"TLS, or as --scheme says: coaps is DTLS, coaps+ws a WebSocket of the HTTP port; coap+tcp, coap and coap+ws are TCP, UDP\n" +
			"and a WebSocket without encryption.\n" +
			"With --device-id it is one device with what coaphub onboard --out made for it, for any hub; the server's scheme says\n" +
			"how it gets there, and --key in place of --cert is the key that coaphub onboard --psk printed:\n" +
			"  coaphub simulate --device-id ID --cert DIR --code CODE --server coaps+tcp://hub:5684\n" +
			"  coaphub simulate --device-id ID --key KEY --code CODE --server coaps://hub:5684",
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
		if one.id != "" {
			if err := one.check(); err != nil {
				return err
			}
			return one.simulate(ctx, p, f.Rate, log)
		}
		if one.certs != "" || one.key != "" || one.code != "" || one.server != "" {
			return usage("--cert, --key, --code and --server belong to --device-id")
		}
		if psk && scheme != "coaps" {
			return usage("--psk goes with --scheme coaps")
		}
		if f.Devices < 1 || f.Devices > 1_000_000 {
			return usage("--devices must be from 1 to 1000000")
		}
		c, err := control(cmd)
		if err != nil {
			return err
		}
		st, err := c.Status(ctx) // one clear error instead of one a device
		if err != nil {
			return err
		}
		if at, known := endpoint(st.Endpoints, scheme); !known {
			return usage("--scheme: %q is none of coaps+tcp, coaps, coaps+ws, coap+tcp, coap and coap+ws", scheme)
		} else if at == "" {
			return fmt.Errorf("the hub has no %s endpoint", scheme)
		}
		f.Log = log
		o := onboarder{control: c, scheme: scheme, psk: psk}
		if scheme == "coaps+ws" {
			if o.web, err = webTLS(ctx, c); err != nil {
				return err
			}
		}
		f.Onboard = o.onboard
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
	fl.StringVar(&scheme, "scheme", "coaps+tcp", "how the devices get to the hub: coaps+tcp, coaps, coaps+ws, coap+tcp, coap or coap+ws")
	fl.BoolVar(&psk, "psk", false, "the devices have pre-shared keys in place of certificates, with --scheme coaps")
	fl.StringVar(&one.id, "device-id", "", "one device with this ID")
	fl.StringVar(&one.certs, "cert", "", "folder with cert.pem, key.pem and ca.pem of --device-id")
	fl.StringVar(&one.key, "key", "", "pre-shared key of --device-id, in place of --cert, for a server at coaps://")
	fl.StringVar(&one.code, "code", "", "authorization code of --device-id")
	fl.StringVar(&one.server, "server", "", "hub of --device-id: coaps+tcp://host:port, coaps://, coaps+ws://, coap+tcp://, coap:// or coap+ws://")
	fl.StringVar(&one.provider, "provider", "coaphub", "authorization provider of --device-id")
	fl.BoolVar(&verbose, "verbose", false, "log what goes wrong")
	return cmd
}

// endpoint is where the hub is reached by a scheme, "" if it is not; known is whether there is such a scheme.
func endpoint(e bundle.Endpoints, scheme string) (at string, known bool) {
	at, known = map[string]string{
		"coaps+tcp": e.CoAPSTCP, "coaps": e.CoAPS, "coaps+ws": e.CoAPSWS, "coap+tcp": e.CoAPTCP, "coap": e.CoAP, "coap+ws": e.CoAPWS,
	}[scheme]
	return at, known
}

// onboarder gets what a fleet's devices need from the running hub.
type onboarder struct {
	control *bundle.Control
	scheme  string
	psk     bool
	owner   string      // account of the devices; empty: the first administrator
	web     *tls.Config // for coaps+ws, where devices have no certificates
	keys    sync.Map    // by device ID: a further key would make the first one worth nothing
}

// webTLS trusts the hub's HTTP port.
func webTLS(ctx context.Context, c *bundle.Control) (*tls.Config, error) {
	pem, err := c.Root(ctx, "https")
	if err != nil {
		return nil, err
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM([]byte(pem))
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}, nil
}

// onboard is Fleet.Onboard.
func (o *onboarder) onboard(ctx context.Context, id string) (device.Onboarding, error) {
	key, had := o.keys.Load(id)
	secure := o.scheme == "coaps" || o.scheme == "coaps+tcp"
	got, err := o.control.Onboard(ctx, bundle.OnboardRequest{
		DeviceID: id, Owner: o.owner, Certificate: secure && !o.psk, PSK: o.psk && !had,
	})
	if err != nil {
		return device.Onboarding{}, err
	}
	at, _ := endpoint(got.Endpoints, o.scheme)
	out := device.Onboarding{Code: got.AuthorizationCode, HubAddr: at, Provider: got.AuthorizationProvider, TLS: o.web}
	switch {
	case o.psk && had:
		out.PSK = key.(*device.PSK)
	case o.psk:
		out.PSK = &device.PSK{Identity: got.PSKIdentity, Key: []byte(got.PSK)}
		o.keys.Store(id, out.PSK)
	case secure:
		if out.TLS, err = device.TLS([]byte(got.CA), []byte(got.Identity.Chain), []byte(got.Identity.Key), got.HubID); err != nil {
			return device.Onboarding{}, fmt.Errorf("the device's certificate: %w", err)
		}
	}
	return out, nil
}

// single is one device with credentials of its own.
type single struct{ id, certs, key, code, server, provider string }

func (s *single) check() error {
	switch {
	case s.code == "" || s.server == "":
		return usage("--device-id needs --code and --server, as coaphub onboard prints them")
	case s.certs != "" && s.key != "":
		return usage("--cert and --key exclude each other")
	case s.key != "" && !strings.HasPrefix(s.server, "coaps://"):
		return usage("--key is for a server at coaps://")
	case s.certs != "" && s.web():
		return usage("--cert is not for a server at coaps+ws://, which asks a device for none and is checked as web servers are")
	case s.certs == "" && s.key == "" && strings.HasPrefix(s.server, "coaps") && !s.web():
		return usage("--device-id needs --cert, or --key, for a server at coaps+tcp:// or coaps://, as coaphub onboard makes them")
	}
	return nil
}

func (s *single) web() bool { return strings.HasPrefix(s.server, "coaps+ws://") }

// simulate lets the device's light go on and off until ctx ends.
func (s *single) simulate(ctx context.Context, p process, rate float64, log *slog.Logger) error {
	cfg := device.Config{ID: s.id, HubAddr: s.server, Provider: s.provider, Log: log}
	if s.key != "" {
		cfg.PSK = &device.PSK{Identity: s.id, Key: []byte(s.key)}
	}
	switch {
	case s.web():
		cfg.TLS = &tls.Config{MinVersion: tls.VersionTLS12} // the system's CAs
	case s.certs != "":
		in := func(name string) string { return filepath.Join(s.certs, name) }
		var err error
		if cfg.TLS, err = device.TLSFiles(in("ca.pem"), in("cert.pem"), in("key.pem"), ""); err != nil {
			return err
		}
	}
	d, err := device.New(cfg)
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
			return s.code, nil
		})
	}()
	every := time.Duration(math.MaxInt64)
	if period := float64(time.Second) / rate; rate > 0 && period < math.MaxInt64 {
		every = time.Duration(period)
	}
	tick := time.NewTicker(max(every, time.Millisecond))
	defer tick.Stop()
	look := time.NewTicker(100 * time.Millisecond)
	defer look.Stop()
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
		case <-look.C:
			now := d.Stats().Online.Load() > 0
			if now && !online {
				_, _ = fmt.Fprintf(p.out, "device %s is online at %s\n", s.id, s.server)
			}
			online = now
		case <-tick.C:
			if !online {
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
