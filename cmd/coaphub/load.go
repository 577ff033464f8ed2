package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/test/load"
)

func newLoad(p process) *cobra.Command {
	cfg := load.Config{}
	var during, scheme string
	var psk, mine, asJSON bool
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Measure the hub: sign-ins, notifications, commands, reads, memory",
		Long: "load runs devices and applications against the hub of this data folder, as fast as it takes them or at a fixed rate,\n" +
			"and prints what it took. It runs beside what it measures, so it says how much of the CPU time was its own.\n\n" +
			"Its devices are real ones to the hub, and stay there: measure a hub of its own, not one that is in use.\n\n" +
			"The phases, which --phases chooses from:\n" + phaseTexts +
			"\nCtrl-C ends it with the figures so far.",
		Example: "  coaphub load --devices 1000\n  coaphub load --scheme coaps --psk --phases sign-ins,notify --for 20s --json",
		Args:    none,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		ctx := cmd.Context()
		var err error
		if cfg.During, err = conf.ParseDuration(during); err != nil || cfg.During <= 0 {
			return usage("--for: %q is not a duration above zero; write for example 10s or 1m", during)
		}
		switch {
		case cfg.Devices < 1 || cfg.Devices > 100_000:
			return usage("--devices must be from 1 to 100000")
		case cfg.AtOnce < 1 || cfg.UnderWay < 1 || cfg.Rounds < 1 || cfg.Burst < 1 || cfg.Listeners < 1 || cfg.Rate <= 0:
			return usage("--at-once, --under-way, --rounds, --burst, --listeners and --rate must be above zero")
		case psk && scheme != "coaps":
			return usage("--psk goes with --scheme coaps")
		}
		c, err := control(cmd)
		if err != nil {
			return err
		}
		st, err := c.Status(ctx)
		if err != nil {
			return err
		}
		at, known := endpoint(st.Endpoints, scheme)
		switch {
		case !known || strings.HasSuffix(scheme, "+ws"):
			return usage("--scheme: %q is none of coaps+tcp, coaps, coap+tcp and coap", scheme)
		case at == "":
			return fmt.Errorf("the hub has no %s endpoint", scheme)
		}
		for _, a := range []string{at, st.Endpoints.HTTP} {
			if !mine && !loopback(a) {
				return fmt.Errorf("%s is not this machine's loopback: say --yes-this-is-mine if nobody else lives there", a)
			}
		}
		if len(cfg.PIDs) == 0 && st.PID > 0 {
			cfg.PIDs = []int{st.PID}
		}
		token, err := c.Token(ctx, bundle.TokenRequest{TTL: 24 * time.Hour})
		if err != nil {
			return fmt.Errorf("a token for the applications: %w", err)
		}
		cfg.API = load.API{URL: st.Endpoints.HTTP, Token: token.AccessToken}
		if strings.HasPrefix(cfg.API.URL, "https:") {
			if cfg.API.TLS, err = webTLS(ctx, c); err != nil {
				return err
			}
		}
		cfg.Transport = scheme
		if psk {
			cfg.Transport += ", PSK"
		}
		cfg.Seed = fmt.Sprint(time.Now().UnixNano()) // so that each run begins with devices that the hub does not know
		cfg.Onboard = (&onboarder{control: c, scheme: scheme, psk: psk}).onboard
		var all []load.Result
		err = load.Run(ctx, cfg, func(r load.Result) {
			all = append(all, r)
			if !asJSON {
				_, _ = fmt.Fprintf(p.err, "%s: %s\n", r.Phase, outcome(r))
			}
		})
		if len(all) > 0 {
			if asJSON {
				enc := json.NewEncoder(p.out)
				enc.SetIndent("", "  ")
				err = errors.Join(err, enc.Encode(all))
			} else {
				err = errors.Join(err, loadTable(p, all))
			}
		}
		if err == nil && ctx.Err() != nil {
			_, _ = fmt.Fprintln(p.err, "ended before all phases were measured")
		}
		return err
	}
	fl := cmd.Flags()
	fl.IntVar(&cfg.Devices, "devices", 100, "how many devices; each has three observed resources")
	fl.IntVar(&cfg.AtOnce, "at-once", 16, "how many connect, or ask, at once")
	fl.IntVar(&cfg.UnderWay, "under-way", 64, "notifications under way in the phase notify")
	fl.StringVar(&during, "for", "10s", "how long each phase takes that has no end of its own")
	fl.Float64Var(&cfg.Rate, "rate", 400, "notifications a second in the phase notify-open")
	fl.IntVar(&cfg.Burst, "burst", 20, "notifications of each device at once in the phase burst")
	fl.IntVar(&cfg.Listeners, "listeners", 20, "subscribers in the phase fan-out")
	fl.IntVar(&cfg.Rounds, "rounds", 1, "how often the phases behind the setup are measured, in turns")
	fl.StringSliceVar(&cfg.Phases, "phases", nil, "which phases, by name (default all)")
	fl.IntSliceVar(&cfg.PIDs, "pid", nil, "processes of the hub, to measure their CPU and memory (default the one of this data folder)")
	fl.StringVar(&scheme, "scheme", "coaps+tcp", "how the devices get to the hub: coaps+tcp, coaps, coap+tcp or coap")
	fl.BoolVar(&psk, "psk", false, "the devices have pre-shared keys in place of certificates, with --scheme coaps")
	fl.BoolVar(&mine, "yes-this-is-mine", false, "measure a hub that is not on this machine's loopback")
	fl.BoolVar(&asJSON, "json", false, "print the figures as JSON")
	return cmd
}

// phaseTexts says what the phases are.
const phaseTexts = "  setup         sign-up, sign-in, publish, until the hub observes; always\n" +
	"  idle          memory while the devices say nothing\n" +
	"  sign-ins      connect, handshake and sign-in, --at-once at a time\n" +
	"  notify        device to hub to subscriber, --under-way at a time\n" +
	"  notify-open   the same at a fixed --rate, timed from when each was due\n" +
	"  burst         --burst notifications of each device at once, until the twins have the last\n" +
	"  commands      update a resource over HTTP until the device's answer, --at-once at a time\n" +
	"  command       the same, one at a time\n" +
	"  device-reads  read a resource from the device\n" +
	"  twin-reads    read a resource from the twin\n" +
	"  list          read the list of all devices\n" +
	"  fan-out       notifications to --listeners subscribers; counts what they hear\n" +
	"  reconnect     all devices come back at once\n"

// loopback reports whether the host of a URL is this machine to itself.
func loopback(at string) bool {
	u, err := url.Parse(at)
	if err != nil {
		return false
	}
	if u.Hostname() == "localhost" {
		return true
	}
	ip := net.ParseIP(u.Hostname())
	return ip != nil && ip.IsLoopback()
}

// outcome is a result in a line.
func outcome(r load.Result) string {
	switch {
	case r.Missing != "":
		return "not measured: " + r.Missing
	case r.Phase == "start":
		return fmt.Sprintf("%.0f MiB before the first device", *r.RSS)
	case r.PerDevice != nil:
		return fmt.Sprintf("%.1f KiB for each device", *r.PerDevice)
	case r.Error != "":
		return fmt.Sprintf("%d, %d failed: %s", r.Ops, r.Failed, r.Error)
	}
	return fmt.Sprintf("%d in %.1f s", r.Ops, r.Seconds)
}

// loadTable prints all results. What was not measured is a dash, never a zero.
func loadTable(p process, all []load.Result) error {
	f := func(v *float64, format string) string {
		if v == nil {
			return "-"
		}
		return fmt.Sprintf(format, *v)
	}
	w := tabwriter.NewWriter(p.out, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintln(w, "phase\tat once\tper s\tfailed\thub CPU s/1000\town CPU\tp50 ms\tp90 ms\tp99 ms\tmax ms\tfirst byte ms\tlate\thub MiB\tKiB/device\t")
	for _, r := range all {
		rate, atOnce := "-", "-"
		if r.Missing == "" && r.Ops+r.Failed > 0 {
			rate = fmt.Sprintf("%.0f", r.PerSecond)
		}
		if r.AtOnce > 0 {
			atOnce = fmt.Sprint(r.AtOnce)
		}
		share := r.OwnCPU
		if share != nil {
			percent := *share * 100
			share = &percent
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t\n", r.Phase, atOnce, rate, r.Failed, f(r.HubCPU, "%.3f"),
			f(share, "%.0f%%"), f(r.P50, "%.2f"), f(r.P90, "%.2f"), f(r.P99, "%.2f"), f(r.Max, "%.1f"), f(r.FirstByte, "%.2f"), r.Late,
			f(r.RSS, "%.0f"), f(r.PerDevice, "%.1f"))
	}
	return w.Flush()
}
