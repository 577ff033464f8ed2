package main

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/hubtest"
	"github.com/coaphub/coaphub/test/load"
)

// Every phase measures something over each transport, or says why not.
func TestLoad(t *testing.T) {
	t.Parallel()
	for _, over := range []string{"--scheme coaps+tcp", "--scheme coaps", "--scheme coaps --psk", "--scheme coap+tcp", "--scheme coap"} {
		t.Run(over, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.plainAddress=127.0.0.1:0"))
			args := append([]string{"load", "--devices", "4", "--for", "200ms", "--listeners", "3", "--json"}, strings.Fields(over)...)
			seen := map[string]bool{}
			for _, r := range as[[]load.Result](t, runsWith(t, "", []string{"COAPHUB_DATA=" + h.Data}, args...)) {
				seen[r.Phase] = true
				bursts := r.Phase != "burst" || strings.Contains(over, "tcp") // NSTART
				switch {
				case r.Failed > 0 || r.Error != "":
					t.Errorf("%s: %d failed: %s", r.Phase, r.Failed, r.Error)
				case bursts != (r.Missing == ""):
					t.Errorf("%s: missing: %q", r.Phase, r.Missing)
				case r.Phase == "start" || r.Phase == "idle":
					if r.RSS == nil {
						t.Errorf("%s: no memory", r.Phase)
					}
				case bursts && r.Ops == 0:
					t.Errorf("%s: nothing was done", r.Phase)
				case bursts && r.Phase != "burst" && (r.P50 == nil || *r.P50 <= 0 || *r.Max < *r.P50):
					t.Errorf("%s: latencies %v to %v", r.Phase, r.P50, r.Max)
				}
			}
			for _, name := range append(load.Phases(), "start") {
				if !seen[name] {
					t.Errorf("nothing of %s", name)
				}
			}
		})
	}
}

// Rounds repeat all but the setup, in turns; the table has a row for each.
func TestLoadRounds(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	r := runsWith(t, "", []string{"COAPHUB_DATA=" + h.Data}, "load", "--devices", "2", "--for", "50ms", "--phases", "list,twin-reads", "--rounds", "2")
	var rows []string
	for line := range strings.Lines(r.out) {
		rows = append(rows, strings.Fields(line)[0])
	}
	if want := "phase start setup twin-reads list twin-reads list"; r.code != exitOK || strings.Join(rows, " ") != want {
		t.Errorf("it ended with %d and printed %q, %q; want the rows %s", r.code, r.out, r.err, want)
	}
}

// Ctrl-C ends it with the figures so far.
func TestLoadIsInterrupted(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out, errs strings.Builder
	said := writerFunc(func(p []byte) {
		if errs.Write(p); strings.Contains(errs.String(), "notify: ") { // the next phase begins
			cancel()
		}
	})
	begin := time.Now()
	code := execute(ctx, []string{"load", "--devices", "2", "--for", "1s", "--phases", "notify,commands"}, process{strings.NewReader(""), &out, said, []string{"COAPHUB_DATA=" + h.Data}})
	if code != exitOK || time.Since(begin) > 20*time.Second || !strings.Contains(out.String(), "notify") || !strings.Contains(errs.String(), "ended before all phases") {
		t.Errorf("after %v it ended with %d and printed %q, %q", time.Since(begin), code, out.String(), errs.String())
	}
}

type writerFunc func(p []byte)

func (f writerFunc) Write(p []byte) (int, error) { f(p); return len(p), nil }

func TestLoadRefuses(t *testing.T) {
	t.Parallel()
	for args, want := range map[string]string{
		"--devices 0":                  "--devices must be",
		"--for 0s":                     "--for: ",
		"--for soon":                   "--for: ",
		"--rate 0":                     "must be above zero",
		"--psk":                        "--psk goes with",
		"extra":                        "",
		"--scheme mqtt --devices 1":    "--scheme: ",
		"--scheme coap":                "no coap endpoint",
		"--phases everything --for 1s": "there is no phase",
	} {
		h := hubtest.Start(t)
		r := runsWith(t, "", []string{"COAPHUB_DATA=" + h.Data}, append([]string{"load"}, strings.Fields(args)...)...)
		if r.code == exitOK || !strings.Contains(r.err, want) || r.out != "" {
			t.Errorf("%s: ended with %d, printed %q and %q, want %q", args, r.code, r.out, r.err, want)
		}
	}
	for at, want := range map[string]bool{
		"coaps://127.0.0.1:5684": true, "coaps+tcp://[::1]:5684": true, "http://localhost:8080": true,
		"coaps://192.0.2.1:5684": false, "http://hub.example": false, "": false, "::": false,
	} {
		if got := loopback(at); got != want {
			t.Errorf("loopback(%q) = %t", at, got)
		}
	}
}
