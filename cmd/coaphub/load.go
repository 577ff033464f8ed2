package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/test/load"
)

func newLoad(p process) *cobra.Command {
	cfg := load.Config{}
	var l loadTarget
	var during string
	cmd := &cobra.Command{
		Use:   "load",
		Short: "Measure the hub: sign-ins, notifications, commands, reads, memory",
		Long: "load runs devices and applications against the hub of this data folder, as fast as it takes them or at a fixed rate,\n" +
			"and prints what it took. It runs beside what it measures, so it says how much of the CPU time was its own.\n\n" +
			"With --server it is any hub with the same protocols. What lets devices in there is given: certificates are made with\n" +
			"--device-ca, and --code-file has what they sign up with. Its memory and CPU are known if --pid names its processes here.\n\n" +
			"Its devices and owners are real ones to the hub, and stay there: measure a hub of its own, not one that is in use.\n\n" +
			"The phases, which --phases chooses from:\n" + phaseTexts +
			"\nCtrl-C ends it with the figures so far.",
		Example: "  coaphub load --devices 1000 --owners 10\n  coaphub load --scheme coaps --psk --phases sign-ins,notify --for 20s --json\n" +
			"  coaphub load --server https://hub.example:8080 --token-file tokens --code-file codes --device-ca ca.pem --device-ca-key ca.key --yes-this-is-mine",
		Args: none,
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
		case l.owners > cfg.Devices:
			return usage("--owners must not be more than --devices")
		case cfg.AtOnce < 1 || cfg.UnderWay < 1 || cfg.Rounds < 1 || cfg.Burst < 1 || cfg.Listeners < 1 || cfg.Rate <= 0:
			return usage("--at-once, --under-way, --rounds, --burst, --listeners and --rate must be above zero")
		}
		if err := l.check(); err != nil {
			return err
		}
		if err := l.open(cmd, p, &cfg); err != nil {
			return err
		}
		cfg.Seed = fmt.Sprint(time.Now().UnixNano()) // so that each run begins with devices that the hub does not know
		var all []load.Result
		err = load.Run(ctx, cfg, func(r load.Result) {
			all = append(all, r)
			if !l.api.asJSON {
				_, _ = fmt.Fprintf(p.err, "%s: %s\n", r.Phase, outcome(r))
			}
		})
		if len(all) > 0 {
			if l.api.asJSON {
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
	l.add(cmd)
	fl := cmd.Flags()
	fl.IntVar(&cfg.Devices, "devices", 100, "how many devices; each has three observed resources")
	fl.IntVar(&cfg.AtOnce, "at-once", 16, "how many connect, or ask, at once")
	fl.IntVar(&cfg.UnderWay, "under-way", 64, "notifications under way in the phase notify")
	fl.StringVar(&during, "for", "10s", "how long each phase takes that has no end of its own")
	fl.Float64Var(&cfg.Rate, "rate", 400, "notifications a second in the phase notify-open")
	fl.IntVar(&cfg.Burst, "burst", 20, "notifications of each device at once in the phase burst")
	fl.IntVar(&cfg.Listeners, "listeners", 20, "subscribers of each owner in the phase fan-out")
	fl.IntVar(&cfg.Rounds, "rounds", 1, "how often the phases behind the setup are measured, in turns")
	fl.StringSliceVar(&cfg.Phases, "phases", nil, "which phases, by name (default all)")
	fl.IntSliceVar(&cfg.PIDs, "pid", nil, "processes of the hub, to measure their CPU and memory (default the one of this data folder)")
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
	"  list          read the list of all devices of an owner\n" +
	"  fan-out       notifications to --listeners subscribers of each owner; counts what they hear\n" +
	"  reconnect     all devices come back at once\n"

// outcome is a result in a line.
func outcome(r load.Result) string {
	switch {
	case r.Missing != "":
		return "not measured: " + r.Missing
	case r.Phase == "start":
		return fmt.Sprintf("%.0f MiB before the first device", *r.RSS)
	case r.PerDevice != nil:
		return fmt.Sprintf("%.1f KiB for each device", *r.PerDevice)
	case r.Phase == "idle":
		return fmt.Sprintf("%.0f MiB, no more than before the first device", *r.RSS)
	case r.Ops+r.Failed == 0:
		return "not measured: it was ended before anything was done"
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
	_, _ = fmt.Fprintln(w, "phase\tat once\tper s\tfailed\thub CPU s/1000\town CPU\tp50 ms\tp90 ms\tp99 ms\tmax ms\tfirst byte ms\tlate\tretransmitted\thub MiB\tKiB/device\t")
	for _, r := range all {
		rate, atOnce, failed, late, again := "-", "-", "-", "-", "-"
		if r.Ops > 0 {
			rate = fmt.Sprintf("%.0f", r.PerSecond)
		}
		if r.Ops+r.Failed > 0 {
			failed = fmt.Sprint(r.Failed)
		}
		if r.AtOnce > 0 {
			atOnce = fmt.Sprint(r.AtOnce)
		}
		if r.LateBy != nil {
			late = fmt.Sprint(r.Late)
		}
		if r.Retransmitted != nil {
			again = fmt.Sprint(*r.Retransmitted)
		}
		share := r.OwnCPU
		if share != nil {
			percent := *share * 100
			share = &percent
		}
		_, _ = fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\t\n", r.Phase, atOnce, rate, failed, f(r.HubCPU, "%.3f"),
			f(share, "%.0f%%"), f(r.P50, "%.2f"), f(r.P90, "%.2f"), f(r.P99, "%.2f"), f(r.Max, "%.1f"), f(r.FirstByte, "%.2f"), late, again,
			f(r.RSS, "%.0f"), f(r.PerDevice, "%.1f"))
	}
	if err := w.Flush(); err != nil {
		return err
	}
	for _, r := range all {
		for _, doubt := range r.Doubts() {
			if _, err := fmt.Fprintf(p.out, "%s: %s: the figures may be the load's\n", r.Phase, doubt); err != nil {
				return err
			}
		}
	}
	return nil
}
