package e2e_test

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/dose"
)

// TestFleet runs `coaphub simulate` against a hub: some devices for a few seconds, and nightly 1000 for ten minutes, where
// the hub's memory at minute ten is at most 1.1 times that at minute two.
func TestFleet(t *testing.T) {
	t.Parallel()
	devices, length := dose.Of(20, 100, 1000), dose.Of(5*time.Second, 12*time.Second, 10*time.Minute+15*time.Second)
	p := serve(t, t.TempDir())
	ctx, cancel := context.WithTimeout(t.Context(), length+time.Minute)
	defer cancel()
	sim := exec.CommandContext(ctx, hubProgram(t), "simulate", "--data", p.data, "--devices", fmt.Sprint(devices), "--duration", length.String())
	out := &lockedBuffer{}
	sim.Stdout, sim.Stderr = out, out
	start := time.Now() // the simulator counts its time from here too
	if err := sim.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- sim.Wait() }()
	defer func() { cancel(); <-ended }()

	if !eventually(ctx, length, func() bool { return p.status().Online == devices }) {
		t.Fatalf("%d of %d devices online\n%s", p.status().Online, devices, out)
	}
	var early, late int
	for {
		select {
		case err := <-ended:
			ended <- err
			if err != nil {
				t.Fatalf("simulate: %v\n%s", err, out)
			}
			if !eventually(t.Context(), 10*time.Second, func() bool { return p.status().Online == 0 }) {
				t.Errorf("%d devices are still online after the fleet left", p.status().Online)
			}
			if dose.Night() {
				t.Logf("RSS at minute 2: %d KiB, at minute 10: %d KiB", early, late)
				if early == 0 || late == 0 || float64(late) > 1.1*float64(early) {
					t.Errorf("memory grows: %d KiB at minute 2, %d KiB at minute 10", early, late)
				}
			}
			return
		case <-time.After(time.Second):
			switch d := time.Since(start); {
			case d >= 2*time.Minute && early == 0:
				early = p.rss()
			case d >= 10*time.Minute && late == 0:
				late = p.rss()
			}
		}
	}
}

func eventually(ctx context.Context, d time.Duration, f func() bool) bool {
	deadline := time.Now().Add(d)
	for time.Now().Before(deadline) && ctx.Err() == nil {
		if f() {
			return true
		}
		wait := time.NewTimer(100 * time.Millisecond)
		<-wait.C
	}
	return f()
}

type status struct {
	HubID   string `json:"hubId"`
	Devices int    `json:"devices"`
	Online  int    `json:"online"`
}

func (p *process) status() status {
	p.t.Helper()
	var s status
	if err := json.Unmarshal([]byte(p.run("status", "--json")), &s); err != nil {
		p.t.Fatal(err)
	}
	return s
}

// rss is the process's resident memory in KiB.
func (p *process) rss() int {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		p.t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			var n int
			if _, err := fmt.Sscan(v, &n); err != nil {
				p.t.Fatal(err)
			}
			return n
		}
	}
	p.t.Fatal("no VmRSS")
	return 0
}
