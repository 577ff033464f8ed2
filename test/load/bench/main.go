// Command bench measures a fresh hub and bare go-coap servers in turns, in the same run, and prints the medians with their
// ranges beside what is to be reached. It builds both from this checkout, and keeps everything on loopback.
package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/load"
	"github.com/coaphub/coaphub/test/load/figures"
)

func main() {
	var b bench
	flag.IntVar(&b.rounds, "rounds", 3, "how often everything is measured, in turns")
	flag.IntVar(&b.devices, "devices", 1000, "devices of the hub")
	flag.DurationVar(&b.during, "for", 5*time.Second, "how long each phase takes that has no end of its own")
	flag.BoolVar(&b.all, "all", false, "all phases and transports, not only the main ones")
	write := flag.String("write", "", "file in which the tables take the place of the last ones")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	err := b.run(ctx)
	out := b.tables()
	fmt.Print(out)
	if err == nil && ctx.Err() == nil && *write != "" {
		err = figures.Replace(*write, "bench-full", out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// main phases: those that something is to be reached in.
var mainPhases = []string{"idle", "sign-ins", "notify", "notify-open", "burst", "commands", "command", "twin-reads", "list"}

// goal is what is to be reached: at least floor, and better target; at most where less is true. Zero: nothing is set.
type goal struct {
	transport, phase, measure string
	floor, target             float64
	less                      bool
}

var goals = []goal{
	{"coaps+tcp", "sign-ins", "per s", 700, 900, false},
	{"coaps+tcp", "sign-ins", "CPU s/1000", 0, 0.9, true},
	{"coaps+tcp", "notify", "per s", 10_000, 20_000, false},
	{"coaps+tcp", "notify", "CPU s/1000", 0, 0.07, true},
	{"coaps+tcp", "notify-open", "p50 ms", 3, 1.5, true},
	{"coaps+tcp", "notify-open", "p99 ms", 15, 6, true},
	{"coaps+tcp", "burst", "per s", 20_000, 40_000, false},
	{"coaps+tcp", "commands", "per s", 2_500, 4_000, false},
	{"coaps+tcp", "commands", "CPU s/1000", 0, 0.35, true},
	{"coaps+tcp", "command", "p50 ms", 2, 1, true},
	{"coaps+tcp", "command", "p99 ms", 8, 4, true},
	{"coaps+tcp", "twin-reads", "per s", 12_000, 20_000, false},
	{"coaps+tcp", "twin-reads", "CPU s/1000", 0, 0.06, true},
	{"coaps+tcp", "list", "per s", 80, 150, false},
	{"coaps+tcp", "list", "first byte ms", 0, 5, true},
	{"coaps+tcp", "idle", "KiB/device", 70, 40, true},
	{"coaps+tcp", "start", "hub MiB", 80, 50, true},
	{"coaps+tcp", "start", "ready ms", 1000, 300, true},
	{"coaps", "sign-ins", "per s", 250, 300, false},
	{"coaps", "notify", "per s", 6_000, 12_000, false},
	{"coaps", "idle", "KiB/device", 95, 30, true},
}

// measures are what is taken of a result, in the order of the tables.
var measures = []struct {
	name string
	of   func(load.Result) *float64
}{
	{"per s", func(r load.Result) *float64 {
		if r.Ops == 0 || r.Phase == "start" {
			return nil
		}
		return &r.PerSecond
	}},
	{"CPU s/1000", func(r load.Result) *float64 { return r.HubCPU }},
	{"p50 ms", func(r load.Result) *float64 { return r.P50 }},
	{"p99 ms", func(r load.Result) *float64 { return r.P99 }},
	{"first byte ms", func(r load.Result) *float64 { return r.FirstByte }},
	{"KiB/device", func(r load.Result) *float64 { return r.PerDevice }},
	{"hub MiB", func(r load.Result) *float64 { return r.RSS }},
	{"own CPU", func(r load.Result) *float64 { return r.OwnCPU }},
	{"sent again", func(r load.Result) *float64 {
		if r.Retransmitted == nil {
			return nil
		}
		n := float64(*r.Retransmitted)
		return &n
	}},
}

type bench struct {
	rounds, devices int
	during          time.Duration
	all             bool

	dir     string
	size    int64 // of the binary
	results []load.Result
	ready   []float64 // ms from the start of the process
}

func (b *bench) run(ctx context.Context) (err error) {
	if b.dir, err = os.MkdirTemp("", "coaphub-bench-"); err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(b.dir) }()
	for name, pkg := range map[string]string{"coaphub": "./cmd/coaphub", "raw": "./test/load/raw"} {
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-ldflags", "-s -w", "-o", filepath.Join(b.dir, name), pkg)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w\n%s", pkg, err, out)
		}
	}
	if st, err := os.Stat(filepath.Join(b.dir, "coaphub")); err == nil {
		b.size = st.Size()
	}
	transports := [][]string{{"--scheme", "coaps+tcp"}, {"--scheme", "coaps"}}
	if b.all {
		transports = append(transports, []string{"--scheme", "coaps", "--psk"})
	}
	for round := range b.rounds {
		if err := b.raw(ctx); err != nil {
			return fmt.Errorf("the bare servers: %w", err)
		}
		for _, t := range transports {
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, b.rounds, strings.Join(t[1:], " "))
			if err := b.hub(ctx, t); err != nil {
				return err
			}
		}
	}
	return nil
}

// raw measures the bare servers.
func (b *bench) raw(ctx context.Context) error {
	key := make([]byte, 16)
	_, _ = rand.Read(key)
	text := []byte(hex.EncodeToString(key))
	cmd := exec.CommandContext(ctx, filepath.Join(b.dir, "raw"))
	cmd.Env = append(os.Environ(), "RAW_KEY="+string(text))
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		return err
	}
	defer func() {
		_ = in.Close()
		_ = cmd.Wait()
	}()
	var at map[string]string
	if err := json.NewDecoder(out).Decode(&at); err != nil {
		return err
	}
	for _, scheme := range []string{"coap", "coap+tcp", "coaps+tcp", "coaps"} {
		on := device.Onboarding{HubAddr: at[scheme]}
		switch scheme {
		case "coaps+tcp":
			on.TLS = &tls.Config{InsecureSkipVerify: true}
		case "coaps":
			on.PSK = &device.PSK{Identity: "bench", Key: text}
		}
		b.results = append(b.results, load.Echo(ctx, scheme, on, 64, b.during, []int{cmd.Process.Pid}))
	}
	return nil
}

// hub measures a hub that has nothing yet.
func (b *bench) hub(ctx context.Context, transport []string) error {
	data, err := os.MkdirTemp(b.dir, "hub-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(data) }()
	name := filepath.Join(b.dir, "coaphub")
	hub := exec.CommandContext(context.WithoutCancel(ctx), name, "serve", "--data", data, "--coap-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0",
		"--grpc-address", "127.0.0.1:0", "--admin-address", "", "--enrolment-address", "", "--enrolment-http-address", "")
	var said bytes.Buffer
	hub.Stderr = &said
	out, err := hub.StdoutPipe()
	if err != nil {
		return err
	}
	begin := time.Now()
	if err := hub.Start(); err != nil {
		return err
	}
	defer func() {
		_ = hub.Process.Signal(os.Interrupt)
		_, _ = io.Copy(io.Discard, out)
		_ = hub.Wait()
	}()
	lines := bufio.NewScanner(out)
	for ready := false; !ready; ready = strings.HasPrefix(lines.Text(), "ready ") {
		if !lines.Scan() {
			return fmt.Errorf("the hub did not start: %s", said.String())
		}
	}
	b.ready = append(b.ready, float64(time.Since(begin))/float64(time.Millisecond))
	args := append([]string{"load", "--data", data, "--json", "--devices", fmt.Sprint(b.devices), "--for", b.during.String()}, transport...)
	if !b.all {
		args = append(args, "--phases", strings.Join(mainPhases, ","))
	}
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.Stderr = os.Stderr
	figures, err := cmd.Output()
	var got []load.Result
	if jsonErr := json.Unmarshal(figures, &got); jsonErr != nil {
		return errors.Join(err, fmt.Errorf("the figures of coaphub load: %w", jsonErr))
	}
	b.results = append(b.results, got...)
	return err
}

// tables are the results in Markdown.
func (b *bench) tables() string {
	var out strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&out, format, args...) }
	p("%s\n\n", load.Machine())
	p("%d rounds, %d devices with three observed resources each, payload about 90 bytes of CBOR, %s for each timed phase; binary %.0f MB. ",
		b.rounds, b.devices, b.during, float64(b.size)/1e6)
	p("Median of the rounds, with the lowest and the highest; \"own CPU\" is what the load took of all CPU time.\n\n")
	p("| transport | phase | measure | median | range | floor | target | |\n|---|---|---|---|---|---|---|---|\n")
	for _, g := range goals {
		vs := b.values(g.transport, g.phase, g.measure)
		if len(vs) == 0 {
			p("| %s | %s | %s | not measured | | %s | %s | |\n", g.transport, g.phase, g.measure, number(g.floor), number(g.target))
			continue
		}
		v := vs[len(vs)/2]
		reached := func(goal float64) bool { return goal != 0 && (v >= goal) != g.less }
		verdict := "**below the floor**"
		switch {
		case reached(g.target):
			verdict = "target"
		case g.floor == 0:
			verdict = "below the target"
		case reached(g.floor):
			verdict = "floor"
		}
		p("| %s | %s | %s | %s | %s–%s | %s | %s | %s |\n", g.transport, g.phase, g.measure, number(v), number(vs[0]), number(vs[len(vs)-1]),
			number(g.floor), number(g.target), verdict)
	}
	p("\nAll that was measured:\n\n| transport | phase |")
	for _, m := range measures {
		p(" %s |", m.name)
	}
	p(" failed |\n|---|---|%s---|\n", strings.Repeat("---|", len(measures)))
	var done []string
	for _, r := range b.results {
		key := r.Transport + " | " + r.Phase
		if slices.Contains(done, key) {
			continue
		}
		done = append(done, key)
		p("| %s |", key)
		for _, m := range measures {
			cell := "–"
			if vs := b.values(r.Transport, r.Phase, m.name); len(vs) > 0 {
				if cell = "0"; vs[len(vs)/2] != 0 {
					cell = number(vs[len(vs)/2])
				}
			}
			p(" %s |", cell)
		}
		failed, tried := 0, false
		for _, x := range b.results {
			if x.Transport == r.Transport && x.Phase == r.Phase {
				failed += x.Failed
				tried = tried || x.Ops+x.Failed > 0
			}
		}
		if tried {
			p(" %d |\n", failed)
		} else {
			p(" – |\n")
		}
	}
	said := map[string]bool{}
	for _, r := range b.results {
		if why := fmt.Sprintf("\n%s, %s was not measured: %s.\n", r.Transport, r.Phase, r.Missing); r.Missing != "" && !said[why] {
			said[why] = true
			p("%s", why)
		}
	}
	for _, r := range b.results {
		for _, doubt := range r.Doubts() {
			p("\n%s, %s: %s: the figures may be the load's.\n", r.Transport, r.Phase, doubt)
		}
	}
	return out.String()
}

// values are those of one measure, sorted.
func (b *bench) values(transport, phase, measure string) (vs []float64) {
	if measure == "ready ms" {
		vs = slices.Clone(b.ready)
		slices.Sort(vs)
		return vs
	}
	for _, r := range b.results {
		if r.Transport != transport || r.Phase != phase || r.Missing != "" {
			continue
		}
		for _, m := range measures {
			if m.name == measure {
				if v := m.of(r); v != nil {
					vs = append(vs, *v)
				}
			}
		}
	}
	slices.Sort(vs)
	return vs
}

func number(v float64) string {
	switch {
	case v == 0:
		return "–"
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.3g", v)
}
