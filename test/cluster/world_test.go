package cluster_test

import (
	"bufio"
	"bytes"
	crand "crypto/rand"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
)

// programsVariable tells a test that another one runs where the programs are.
const programsVariable = "COAPHUB_TEST_PROGRAMS"

// ours is the version that the programs say they are.
const ours = "v1.0.0"

// programs is the folder with the processes' programs: coaphub as a user builds it, without the race detector, and its servers.
var programs string

func TestMain(m *testing.M) {
	code, err := build(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

func build(run func() int) (int, error) {
	if programs = os.Getenv(programsVariable); programs != "" {
		return run(), nil
	}
	var err error
	if programs, err = os.MkdirTemp("", "coaphub-cluster"); err != nil {
		return 0, err
	}
	defer os.RemoveAll(programs)
	for _, args := range [][]string{
		{"build", "-ldflags", "-s -w -X main.version=" + ours, "-o", programs, "github.com/coaphub/coaphub/cmd/coaphub", "github.com/coaphub/coaphub/test/nats"},
		{"run", "-C", "../mongo", "./build", filepath.Join(programs, "mongo")},
	} {
		if out, err := exec.Command("go", args...).CombinedOutput(); err != nil {
			return 0, fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
		}
	}
	return run(), nil
}

// buffer keeps what a process says.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// eventually polls until ok is true, for limit at most.
func eventually(limit time.Duration, ok func() bool) bool {
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); {
		if ok() {
			return true
		}
		<-time.After(20 * time.Millisecond)
	}
	return ok()
}

func until(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	if !eventually(limit, ok) {
		t.Fatalf("waited %v for %s", limit, what)
	}
}

// process is a running program that ends when its standard input does, or by a signal.
type process struct {
	cmd   *exec.Cmd
	in    io.Closer
	line  chan string // the first line that begins as it was waited for
	log   *buffer
	ended chan struct{}
	err   error // once it has ended
}

func start(t *testing.T, log *buffer, prefix, program string, args ...string) *process {
	t.Helper()
	return startCommand(t, log, prefix, exec.Command(filepath.Join(programs, program), args...))
}

func startCommand(t *testing.T, log *buffer, prefix string, cmd *exec.Cmd) *process {
	t.Helper()
	p := &process{cmd: cmd, line: make(chan string, 1), log: log, ended: make(chan struct{})}
	p.cmd.Stderr = log
	in, err := p.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { // ends with the process
		defer close(p.ended)
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.HasPrefix(lines.Text(), prefix) {
				select {
				case p.line <- lines.Text():
				default:
				}
			}
		}
		p.err = p.cmd.Wait()
	}()
	return p
}

// end sends a signal and waits for the process's end.
func (p *process) end(s syscall.Signal) {
	_ = p.cmd.Process.Signal(s)
	<-p.ended
}

// ready waits for the line.
func (p *process) ready(t *testing.T, limit time.Duration) string {
	t.Helper()
	select {
	case line := <-p.line:
		return line
	case <-p.ended:
		t.Fatalf("%s ended before it was ready: %v\n%s", p.cmd, p.err, tail(p.log))
	case <-time.After(limit):
		t.Fatalf("%s is not ready after %v\n%s", p.cmd, limit, tail(p.log))
	}
	return ""
}

func tail(log *buffer) string {
	s := log.String()
	return s[max(0, len(s)-8<<10):]
}

// door is what clients of several servers connect to; a server that is away is passed over. It can be closed.
type door struct {
	l net.Listener

	mu     sync.Mutex // guards all below
	inTurn bool       // each connection begins with another server; else the first is preferred
	to     []string
	next   int
	cut    bool
	conns  map[net.Conn]struct{}
	all    sync.WaitGroup
}

func open(t *testing.T, to ...string) *door {
	t.Helper()
	return openAt(t, "127.0.0.1", to...)
}

func openAt(t *testing.T, host string, to ...string) *door {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	d := &door{l: l, inTurn: true, to: to, conns: map[net.Conn]struct{}{}}
	d.all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			d.all.Go(func() { d.serve(c) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		d.close(true)
		d.all.Wait()
	})
	return d
}

func (d *door) addr() string { return d.l.Addr().String() }

// close closes the door, and all connections through it, or opens it.
func (d *door) close(cut bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.cut = cut; cut {
		for c := range d.conns {
			_ = c.Close()
		}
	}
}

// lead has the door lead somewhere else.
func (d *door) lead(to string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.to, d.next = []string{to}, 0
}

// keep notes a connection; false if the door is closed.
func (d *door) keep(c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[c] = struct{}{}
	return !d.cut
}

func (d *door) drop(c net.Conn) {
	_ = c.Close()
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, c)
}

func (d *door) serve(front net.Conn) {
	defer d.drop(front)
	if !d.keep(front) {
		return
	}
	d.mu.Lock()
	to := slices.Concat(d.to[d.next:], d.to[:d.next])
	if d.inTurn {
		d.next = (d.next + 1) % len(d.to)
	}
	d.mu.Unlock()
	for _, address := range to {
		back, err := net.DialTimeout("tcp", address, 5*time.Second)
		if err != nil {
			continue
		}
		defer d.drop(back)
		if !d.keep(back) {
			return
		}
		d.all.Go(func() {
			_, _ = io.Copy(back, front)
			_, _ = back.Close(), front.Close()
		})
		_, _ = io.Copy(front, back)
		return
	}
}

// world is a hub in several processes, and its servers.
type world struct {
	t      *testing.T
	dir    string
	config string
	nats   *process
	mongo  *process
	toNATS string // host:port
	store  *door  // to MongoDB
	coap   string // port of the gateways for devices, each on its own address of loopback
	http   string // of those for applications
	parts  map[string]*part
	order  []string
	far    *namespace // where gw-1 runs; nil: here, as all do
}

// part is a process of the hub.
type part struct {
	w       *world
	name    string
	args    []string
	data    string
	log     *buffer
	p       *process
	control *bundle.Control
}

// layout is which parts run where.
var layout = []struct{ name, target string }{
	{"rd-1", "resource-directory"},
	{"rd-2", "resource-directory"},
	{"rd-3", "resource-directory"},
	{"is", "identity-store"},
	{"ca", "certificate-authority,oauth-server"},
	{"app-1", "grpc-gateway"},
	{"app-2", "grpc-gateway"},
	{"gw-1", "coap-gateway"},
	{"gw-2", "coap-gateway"},
}

// freePort is one that is free on the addresses that the doors listen on. It is none of those that systems give to whoever asks for any:
// between two runs of a process somebody else would have it.
func freePort(t *testing.T) string {
	t.Helper()
	for range 100 {
		port := strconv.Itoa(10_000 + rand.IntN(20_000))
		free := true
		for _, host := range []string{"127.0.0.1:", "127.0.0.2:"} {
			l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", host+port)
			if free = free && err == nil; err == nil {
				_ = l.Close()
			}
		}
		if free {
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// sources are of the programs that no import of the tests names.
var sources = []string{"../mongo/*.*", "../mongo/build/*", "../nats/*", "../../cmd/coaphub/*.go"}

// note has the tests' results count until one of the sources changes: go test notes which files a test reads.
func note(t *testing.T) {
	t.Helper()
	for _, pattern := range sources {
		files, err := filepath.Glob(pattern)
		for _, file := range files {
			_, readErr := os.ReadFile(file)
			err = errors.Join(err, readErr)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// prepare writes the configuration of a cluster whose servers are not there yet; gw-1 will be in the namespace far, if there is one.
func prepare(t *testing.T, far *namespace) *world {
	t.Helper()
	note(t)
	store, nats := "127.0.0.1", "127.0.0.1:"
	if far != nil {
		store, nats = testSide, busTestSide+":"
	}
	w := &world{
		t: t, dir: t.TempDir(), toNATS: nats + freePort(t), store: openAt(t, store, "127.0.0.1:1"), coap: freePort(t), http: freePort(t),
		parts: map[string]*part{}, far: far,
	}
	w.config = filepath.Join(w.dir, "coaphub.yaml")
	text := fmt.Sprintf(`externalAddress: 127.0.0.1
cluster: {hubId: 7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a, secret: 0123456789abcdef0123}
bus: {urls: ["nats://%s"]}
store:
  minFree: 0
  mongodb: {uri: "mongodb://%s/?directConnection=true", database: coaphub-test-%s}
  feed: {replicas: 1, maxBytes: 256MiB}
coapGateway: {api: {coap: {address: "127.0.0.1:%s"}}}
grpcGateway: {api: {http: {address: "127.0.0.1:%s"}, grpc: {address: "127.0.0.1:0"}}}
admin: {api: {http: {address: ""}}}
`, w.toNATS, w.store.addr(), strings.ToLower(crand.Text()[:8]), w.coap, w.http)
	if err := os.WriteFile(w.config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		var all sync.WaitGroup
		for _, name := range w.order {
			all.Go(func() { w.parts[name].p.end(syscall.SIGKILL) })
		}
		all.Wait()
		for _, p := range []*process{w.nats, w.mongo} {
			if p != nil {
				p.end(syscall.SIGKILL)
			}
		}
		if t.Failed() {
			for _, name := range w.order {
				t.Logf("%s:\n%s", name, tail(w.parts[name].log))
			}
		}
	})
	return w
}

func (w *world) startNATS() {
	w.t.Helper()
	w.nats = start(w.t, &buffer{}, "nats://", "nats", filepath.Join(w.dir, "nats"), w.toNATS)
	w.nats.ready(w.t, time.Minute)
}

// startMongo starts a MongoDB server, or takes the one that COAPHUB_TEST_MONGODB_URI names, in which it leaves a database.
func (w *world) startMongo() {
	w.t.Helper()
	if given := os.Getenv("COAPHUB_TEST_MONGODB_URI"); given != "" {
		u, err := url.Parse(given)
		if err != nil || u.User != nil {
			w.t.Fatalf("COAPHUB_TEST_MONGODB_URI must name a primary that wants no login: %v", err)
		}
		w.store.lead(u.Host)
		return
	}
	data := filepath.Join(w.dir, "mongo")
	if err := os.MkdirAll(data, 0o700); err != nil {
		w.t.Fatal(err)
	}
	w.mongo = start(w.t, &buffer{}, "mongodb://", "mongo", data)
	w.store.lead(strings.TrimSuffix(strings.TrimPrefix(w.mongo.ready(w.t, time.Minute), "mongodb://"), "/"))
}

// begin starts all parts, and does not wait for them.
func (w *world) begin() {
	w.t.Helper()
	for _, l := range layout {
		p := &part{w: w, name: l.name, data: filepath.Join(w.dir, l.name), log: &buffer{}}
		p.args = []string{"serve", "--config", w.config, "--data", p.data, "--target", l.target}
		switch n := l.name[len(l.name)-1] - '1'; l.target {
		case "grpc-gateway":
			p.args = append(p.args, "--http-address="+w.doors()[n])
		case "coap-gateway":
			p.args = append(p.args, "--coap-address="+w.gateways()[n])
		}
		w.parts[l.name] = p
		w.order = append(w.order, l.name)
		p.begin()
		var err error
		if p.control, err = bundle.Dial(p.data); err != nil {
			w.t.Fatal(err)
		}
	}
}

func (p *part) begin() {
	p.w.t.Helper()
	if n := p.w.far; n != nil && p.name == "gw-1" {
		cmd := n.inside(append([]string{filepath.Join(programs, "coaphub")}, p.args...)...)
		p.p = startCommand(p.w.t, p.log, "ready", exec.Command(cmd[0], cmd[1:]...))
		return
	}
	p.p = start(p.w.t, p.log, "ready", "coaphub", p.args...)
}

func (p *part) ready() { p.w.t.Helper(); p.p.ready(p.w.t, patience) }

// gateways is where devices find the gateways.
func (w *world) gateways() []string {
	first := "127.0.0.1"
	if w.far != nil {
		first = gatewaySide
	}
	return []string{first + ":" + w.coap, "127.0.0.2:" + w.coap}
}

// doors is where applications find theirs.
func (w *world) doors() []string { return []string{"127.0.0.1:" + w.http, "127.0.0.2:" + w.http} }

func (w *world) ready() {
	w.t.Helper()
	for _, name := range w.order {
		w.parts[name].p.ready(w.t, 2*time.Minute)
	}
}

// run is a cluster that works.
func run(t *testing.T) *world {
	t.Helper()
	return runWith(t, nil)
}

func runWith(t *testing.T, far *namespace) *world {
	t.Helper()
	w := prepare(t, far)
	w.startNATS()
	w.startMongo()
	w.begin()
	w.ready()
	return w
}

// token is one of the first administrator.
func (w *world) token() string {
	w.t.Helper()
	tok, err := w.parts["app-1"].control.Token(w.t.Context(), bundle.TokenRequest{})
	if err != nil {
		w.t.Fatal(err)
	}
	return tok.AccessToken
}

// app is an application that prefers the ith gateway, and has the other one when that is away.
func (w *world) app(i int, token string) *client.Client {
	w.t.Helper()
	hosts := w.doors()
	d := open(w.t, hosts[i], hosts[1-i])
	d.mu.Lock()
	d.inTurn = false
	d.mu.Unlock()
	c, err := client.New(client.Config{Server: "http://" + d.addr(), Token: client.Static(token)})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(c.Close)
	return c
}
