// Command scaling measures what each part of a cluster costs: it starts the parts as processes of their own, with a NATS server and a
// stand-in for MongoDB, has devices and applications work against them, and prints the CPU time and the memory that each part takes for
// what was done. It builds all from this checkout, and keeps everything on loopback and in a folder below the system's temporary
// directory, which it removes.
//
// The stand-in for MongoDB (the command mongo beside this one) has the commands and neither disk nor copies, and what it takes itself is left out. So how
// many operations there are in a second says nothing here: what one costs the parts does.
package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/load"
	"github.com/coaphub/coaphub/test/load/figures"
)

func main() {
	var s scaling
	flag.IntVar(&s.rounds, "rounds", 3, "how often everything is measured, each time with a fresh cluster")
	flag.IntVar(&s.devices, "devices", 200, "devices of the hub")
	flag.DurationVar(&s.during, "for", 3*time.Second, "how long each phase takes that has no end of its own")
	flag.StringVar(&s.schemes, "schemes", "coaps+tcp,coaps", "how the devices come, in turns")
	write := flag.String("write", "", "file in which the tables take the place of the last ones")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := s.run(ctx)
	out := s.tables()
	fmt.Print(out)
	if err == nil && ctx.Err() == nil && *write != "" {
		err = figures.Replace(*write, "scaling", out)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// parts are the processes, and what each runs. The last one has what stands still while devices and applications work.
var parts = []string{"coap-gateway", "resource-directory", "identity-store", "grpc-gateway", "certificate-authority,oauth-server,enrolment-gateway"}

// phases are what is measured, with what one operation of it is.
var phases = []struct{ name, what string }{
	{"setup", "a device signs up, signs in, publishes four links, and is observed"},
	{"sign-ins", "a device comes back: handshake, sign-in, three observations"},
	{"notify", "a notification, to one subscriber"},
	{"burst", "a notification, 20 at once from each device, no subscriber"},
	{"fan-out", "an event at one of 20 subscribers, with its part of the notification"},
	{"commands", "an update of a resource, until the device's answer"},
	{"twin-reads", "a resource is read from its twin over HTTP"},
	{"list", "the list of all devices over HTTP"},
}

type scaling struct {
	rounds, devices int
	during          time.Duration
	schemes         string

	dir     string
	figures map[key][]float64
	done    []key // those of figures, in their order
}

// key is what a figure is of: µs of CPU time an operation, or bytes of memory.
type key struct{ scheme, phase, part, unit string }

func (s *scaling) note(k key, v float64) {
	if _, known := s.figures[k]; !known {
		s.done = append(s.done, k)
	}
	s.figures[k] = append(s.figures[k], v)
}

func (s *scaling) run(ctx context.Context) (err error) {
	s.figures = map[key][]float64{}
	if s.dir, err = os.MkdirTemp("", "coaphub-scaling-"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(s.dir)) }()
	cmd := exec.CommandContext(ctx, "go", "build", "-ldflags", "-s -w", "-o", s.dir, "./cmd/coaphub", "./test/nats", "./test/load/scaling/mongo")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0") // as in the image
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build: %w\n%s", err, out)
	}
	for round := range s.rounds {
		for scheme := range strings.SplitSeq(s.schemes, ",") {
			fmt.Fprintf(os.Stderr, "round %d of %d: %s\n", round+1, s.rounds, scheme)
			if err := s.round(ctx, scheme); err != nil || ctx.Err() != nil {
				return err
			}
		}
	}
	return nil
}

// process is a program that runs.
type process struct {
	name string
	cmd  *exec.Cmd
	in   io.Closer
	out  io.Reader
	said bytes.Buffer
}

// start starts a program and returns the rest of the line that begins with prefix.
func (s *scaling) start(name, prefix, program string, args ...string) (p *process, line string, err error) {
	p = &process{name: name, cmd: exec.CommandContext(context.Background(), filepath.Join(s.dir, program), args...)}
	p.cmd.Stderr = &p.said
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us: we end them in order
	if p.in, err = p.cmd.StdinPipe(); err != nil {
		return nil, "", err
	}
	if p.out, err = p.cmd.StdoutPipe(); err != nil {
		return nil, "", err
	}
	if err := p.cmd.Start(); err != nil {
		return nil, "", err
	}
	for lines := bufio.NewScanner(p.out); lines.Scan(); {
		if line, ok := strings.CutPrefix(lines.Text(), prefix); ok {
			return p, line, nil
		}
	}
	return nil, "", errors.Join(fmt.Errorf("%s did not start: %s", name, p.said.String()), p.cmd.Wait())
}

func (p *process) end() {
	_ = p.cmd.Process.Signal(os.Interrupt)
	late := time.AfterFunc(time.Minute, func() { _ = p.cmd.Process.Kill() })
	defer late.Stop()
	_ = p.in.Close()
	_, _ = io.Copy(io.Discard, p.out)
	_ = p.cmd.Wait()
}

// cluster is what runs in a round.
type cluster struct {
	dir     string
	nats    *process
	parts   []*process // nats is the last one
	control *bundle.Control
	ended   func()
}

// begin starts a cluster.
func (s *scaling) begin() (c *cluster, err error) {
	dir, err := os.MkdirTemp(s.dir, "cluster-")
	if err != nil {
		return nil, err
	}
	c = &cluster{dir: dir}
	var all []*process
	c.ended = func() {
		for _, p := range slices.Backward(all) {
			p.end()
		}
		_ = os.RemoveAll(dir)
	}
	defer func() {
		if err != nil {
			c.ended()
		}
	}()
	mongo, uri, err := s.start("MongoDB", "mongodb://", "mongo")
	if err != nil {
		return nil, err
	}
	all = append(all, mongo)
	var at string
	if c.nats, at, err = s.start("NATS", "nats://", "nats", filepath.Join(dir, "nats")); err != nil {
		return nil, err
	}
	all = append(all, c.nats)
	var ports []any
	for range 3 {
		port, err := free()
		if err != nil {
			return nil, err
		}
		ports = append(ports, port)
	}
	config := filepath.Join(dir, "coaphub.yaml")
	text := fmt.Sprintf(`externalAddress: 127.0.0.1
cluster: {hubId: 7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a, secret: a secret of this round}
bus: {urls: ["nats://%s"]}
store: {mongodb: {uri: "mongodb://%s"}, feed: {replicas: 1}}
coapGateway: {api: {coap: {address: "127.0.0.1:%s"}}}
grpcGateway: {api: {http: {address: "127.0.0.1:%s"}, grpc: {address: "127.0.0.1:%s"}}}
enrolmentGateway: {api: {coap: {address: ""}, http: {address: ""}}}
admin: {api: {http: {address: ""}}}
`, append([]any{at, uri}, ports...)...)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		return nil, err
	}
	type started struct {
		p   *process
		err error
	}
	starts := make(chan started, len(parts)) // in any order: they wait for each other
	for _, target := range parts {
		go func() {
			p, _, err := s.start(target, "ready", "coaphub", "serve", "--config", config, "--data", filepath.Join(dir, target), "--target", target)
			starts <- started{p, err}
		}()
	}
	for range parts {
		up := <-starts
		if err = errors.Join(err, up.err); up.err == nil {
			all, c.parts = append(all, up.p), append(c.parts, up.p)
		}
	}
	if err != nil {
		return nil, err
	}
	c.parts = append(c.parts, c.nats)
	c.control, err = bundle.Dial(filepath.Join(dir, "grpc-gateway"))
	return c, err
}

func free() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0") //nolint:noctx // loopback
	if err != nil {
		return "", err
	}
	_, port, err := net.SplitHostPort(l.Addr().String())
	return port, errors.Join(err, l.Close())
}

// taken is what the processes have taken so far, by their names.
type taken struct {
	at       time.Time
	cpu, rss map[string]float64
}

func (c *cluster) taken() (t taken, err error) {
	t = taken{time.Now(), map[string]float64{}, map[string]float64{}}
	for _, p := range c.parts {
		cpu, cpuErr := load.CPU([]int{p.cmd.Process.Pid})
		rss, rssErr := load.RSS([]int{p.cmd.Process.Pid})
		t.cpu[p.name], t.rss[p.name] = cpu, float64(rss)
		err = errors.Join(err, cpuErr, rssErr)
	}
	return t, err
}

func (s *scaling) round(ctx context.Context, scheme string) error {
	c, err := s.begin()
	if err != nil {
		return err
	}
	defer c.ended()
	st, err := c.control.Status(ctx)
	if err != nil {
		return err
	}
	token, err := c.control.Token(ctx, bundle.TokenRequest{TTL: 24 * time.Hour})
	if err != nil {
		return err
	}
	endpoint := map[string]string{"coaps+tcp": st.Endpoints.CoAPSTCP, "coaps": st.Endpoints.CoAPS}[scheme]
	if endpoint == "" {
		return fmt.Errorf("the hub has no %s endpoint", scheme)
	}
	cfg := load.Config{
		Devices: s.devices, AtOnce: 16, UnderWay: 64, During: s.during, Rate: 400, Burst: 20, Listeners: 20, Rounds: 1, Transport: scheme,
		Seed: fmt.Sprint(time.Now().UnixNano()), API: load.API{URL: st.Endpoints.HTTP, Tokens: []string{token.AccessToken}},
		Onboard: func(ctx context.Context, _, _ int, id string) (device.Onboarding, error) {
			o, err := c.control.Onboard(ctx, bundle.OnboardRequest{DeviceID: id, Certificate: true})
			if err != nil {
				return device.Onboarding{}, err
			}
			on := device.Onboarding{Code: o.AuthorizationCode, HubAddr: endpoint, Provider: o.AuthorizationProvider}
			on.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID)
			return on, err
		},
	}
	for _, p := range c.parts {
		cfg.PIDs = append(cfg.PIDs, p.cmd.Process.Pid)
	}
	for _, p := range phases[1:] {
		cfg.Phases = append(cfg.Phases, p.name)
	}
	cfg.Phases = append(cfg.Phases, "idle")
	select { // until what the start took is given back
	case <-time.After(20 * time.Second):
	case <-ctx.Done():
		return nil
	}
	last, err := c.taken()
	if err != nil {
		return err
	}
	began := last
	var idle map[string]float64 // CPU seconds a second
	return errors.Join(load.Run(ctx, cfg, func(r load.Result) {
		now, takenErr := c.taken()
		if err = errors.Join(err, takenErr); err != nil {
			return
		}
		fmt.Fprintf(os.Stderr, "%s: %d in %.1f s, %d failed %s\n", r.Phase, r.Ops, r.Seconds, r.Failed, r.Error+r.Missing)
		for _, p := range c.parts {
			spent := now.cpu[p.name] - last.cpu[p.name]
			switch {
			case r.Phase == "start":
				s.note(key{scheme, "start", p.name, "bytes"}, now.rss[p.name])
			case r.Phase == "idle":
				s.note(key{scheme, "idle", p.name, "bytes"}, now.rss[p.name])
				s.note(key{scheme, "idle", p.name, "device"}, (now.rss[p.name]-began.rss[p.name])/float64(s.devices))
				s.note(key{scheme, "idle", p.name, "share"}, spent/now.at.Sub(last.at).Seconds())
			case r.Ops > 0:
				s.note(key{scheme, r.Phase, p.name, "op"}, (spent-idle[p.name]*now.at.Sub(last.at).Seconds())/float64(r.Ops)*1e6)
				s.note(key{scheme, "most", p.name, "bytes"}, now.rss[p.name])
			}
		}
		if r.Phase == "idle" {
			idle = map[string]float64{}
			for _, p := range c.parts {
				idle[p.name] = (now.cpu[p.name] - last.cpu[p.name]) / now.at.Sub(last.at).Seconds()
			}
		}
		last, _ = c.taken() // without what was just done
	}), err)
}

// tables are the figures in Markdown.
func (s *scaling) tables() string {
	var out strings.Builder
	p := func(format string, args ...any) { fmt.Fprintf(&out, format, args...) }
	p("%s\n\n", load.Machine())
	p("%d rounds with a fresh cluster each, %d devices with three observed resources, payload about 90 bytes of CBOR. Median of the rounds, with the lowest and the highest.\n",
		s.rounds, s.devices)
	names := append(slices.Clone(parts), "NATS")
	for scheme := range strings.SplitSeq(s.schemes, ",") {
		header := func(first string) {
			p("\n| %s |", first)
			for _, n := range names {
				p(" %s |", strings.ReplaceAll(n, ",", ", "))
			}
			p("\n|---|%s\n", strings.Repeat("---|", len(names)))
		}
		row := func(what, phase, unit string, scale float64) {
			p("| %s |", what)
			for _, n := range names {
				p(" %s |", cell(s.figures[key{scheme, phase, n, unit}], scale))
			}
			p("\n")
		}
		p("\n**%s**: µs of CPU time for one of\n", scheme)
		header("what")
		for _, ph := range phases {
			row(ph.what, ph.name, "op", 1)
		}
		p("\nMemory, and CPU time while nothing happens:\n")
		header("what")
		row("resident before the first device, MiB", "start", "bytes", 1<<20)
		row("resident with all devices idle, MiB", "idle", "bytes", 1<<20)
		row("of that for a device, KiB", "idle", "device", 1<<10)
		row("resident at the end of a phase, MiB", "most", "bytes", 1<<20)
		row("percent of a core while devices are idle", "idle", "share", 0.01)
	}
	return out.String()
}

// cell is the median with the range.
func cell(vs []float64, scale float64) string {
	if len(vs) == 0 {
		return "–"
	}
	vs = slices.Clone(vs)
	slices.Sort(vs)
	number := func(v float64) string {
		switch v /= scale; {
		case v >= 100 || v <= -100:
			return fmt.Sprintf("%.0f", v)
		case v >= 10 || v <= -10:
			return fmt.Sprintf("%.1f", v)
		}
		return fmt.Sprintf("%.2f", v)
	}
	if len(vs) == 1 {
		return number(vs[0])
	}
	return fmt.Sprintf("%s (%s–%s)", number(vs[len(vs)/2]), number(vs[0]), number(vs[len(vs)-1]))
}
