package cluster_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
)

// meter is what a migration reaches the database through. After so many bytes something happens.
type meter struct {
	l     net.Listener
	to    string
	bytes atomic.Int64
	limit atomic.Int64           // 0: none
	event atomic.Pointer[func()] // once
	cut   atomic.Bool            // and nothing gets through any more
}

func newMeter(t *testing.T, to string) *meter {
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	m := &meter{l: l, to: to}
	done := make(chan struct{})
	go func() { // ends with the listener
		defer close(done)
		for {
			front, err := l.Accept()
			if err != nil {
				return
			}
			go m.serve(front) // ends with its connection, which the migration's end closes
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return m
}

func (m *meter) serve(front net.Conn) {
	defer front.Close()
	back, err := net.DialTimeout("tcp", m.to, 5*time.Second)
	if err != nil {
		return
	}
	defer back.Close()
	go func() { _, _ = io.Copy(front, back); _ = front.Close() }()
	for b := make([]byte, 512); ; {
		n, err := front.Read(b)
		if err != nil {
			return
		}
		if limit := m.limit.Load(); m.bytes.Add(int64(n)) > limit && limit > 0 {
			if event := m.event.Swap(nil); event != nil {
				(*event)()
			}
			if m.cut.Load() {
				return
			}
		}
		if _, err := back.Write(b[:n]); err != nil {
			return
		}
	}
}

// move is a hub that moves, and what moves it.
type move struct {
	*world
	meter   *meter
	one     string // configuration of a hub on one machine
	through string // of the cluster, through the meter
}

// coaphub runs a command to its end.
func (w *world) coaphub(args ...string) (stdout, stderr string, err error) {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(w.t.Context(), 2*patience)
	defer cancel()
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, filepath.Join(programs, "coaphub"), args...)
	cmd.Stdout, cmd.Stderr = &out, &said
	err = cmd.Run()
	return out.String(), said.String(), err
}

// refused wants a command to end with a code.
func (w *world) refused(code string, args ...string) {
	w.t.Helper()
	out, said, err := w.coaphub(args...)
	if err == nil || !strings.Contains(said, "["+code+"]") {
		w.t.Errorf("coaphub %s: %v, want the code %s\n%s%s", strings.Join(args, " "), err, code, out, said)
	}
}

func (w *world) write(name, text string) string {
	w.t.Helper()
	path := filepath.Join(w.dir, name)
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		w.t.Fatal(err)
	}
	return path
}

// serve starts a whole hub in one process.
func (w *world) serve(name, config, data string) *part {
	w.t.Helper()
	p := &part{w: w, name: name, data: data, log: &buffer{}, args: []string{"serve", "--config", config, "--data", data}}
	w.parts[name] = p
	w.order = append(w.order, name)
	p.begin()
	p.p.ready(w.t, 2*time.Minute)
	var err error
	if p.control, err = bundle.Dial(data); err != nil {
		w.t.Fatal(err)
	}
	return p
}

func (w *world) verified(args ...string) (v bundle.Verified) {
	w.t.Helper()
	out, said, err := w.coaphub(append([]string{"verify", "--json"}, args...)...)
	if err == nil {
		err = json.Unmarshal([]byte(out), &v)
	}
	if err != nil {
		w.t.Fatalf("verify %v: %v\n%s%s", args, err, out, said)
	}
	return v
}

// The ways in which a migration is broken off.
const (
	never       = iota
	killed      // kill -9
	interrupted // Ctrl-C
	lost        // the connection to the database
	asleep      // it stands still until somebody wakes it
)

// begin runs a migration that is broken off after some bytes.
func (m *move) begin(how int, limit int64, to, data string) (cmd *exec.Cmd, stdout, stderr *bytes.Buffer, happened chan struct{}) {
	m.t.Helper()
	cmd = exec.CommandContext(m.t.Context(), filepath.Join(programs, "coaphub"), "migrate", to, "--json", "--config", m.through, "--data", data)
	stdout, stderr, happened = &bytes.Buffer{}, &bytes.Buffer{}, make(chan struct{})
	cmd.Stdout, cmd.Stderr = stdout, stderr
	begun := make(chan struct{}) // the bytes may come before Start has returned
	event := func() {
		defer close(happened)
		<-begun
		if s := map[int]os.Signal{killed: syscall.SIGKILL, interrupted: syscall.SIGINT, asleep: syscall.SIGSTOP}[how]; s != nil {
			_ = cmd.Process.Signal(s)
		}
	}
	m.meter.event.Store(&event)
	m.meter.cut.Store(how == killed || how == lost)
	m.meter.bytes.Store(0)
	m.meter.limit.Store(limit)
	if err := cmd.Start(); err != nil {
		m.t.Fatal(err)
	}
	close(begun)
	return cmd, stdout, stderr, happened
}

// half breaks a migration off, and returns what it said.
func (m *move) half(how int, limit int64, to, data string) string {
	m.t.Helper()
	cmd, _, stderr, _ := m.begin(how, limit, to, data)
	if err := cmd.Wait(); err == nil {
		m.t.Fatalf("it was not broken off: %d bytes were enough", m.meter.bytes.Load())
	}
	said := stderr.String()
	if want := map[int]string{interrupted: "run the same again to go on", lost: "[store-unreachable]"}[how]; !strings.Contains(said, want) {
		m.t.Errorf("a migration that was broken off says\n%s", said)
	}
	return said
}

// migrate runs a migration that is broken off in all ways, later each time, until it has its way.
func (m *move) migrate(to, data string, step int64) (out bundle.Migrated) {
	m.t.Helper()
	for n := int64(1); ; n++ {
		cmd, stdout, stderr, _ := m.begin(int((n-1)%3)+killed, n*step, to, data)
		err := cmd.Wait()
		m.t.Logf("%s, after %d bytes of %d: %v %s", to, m.meter.bytes.Load(), n*step, err, stderr)
		switch {
		case err == nil && n < 4:
			m.t.Errorf("it was broken off %d times only: %d bytes were enough", n-1, m.meter.bytes.Load())
		case err != nil && n < 20:
			continue
		case err != nil:
			m.t.Fatalf("migrate %s: %v\n%s", to, err, stderr)
		}
		if err := json.Unmarshal(stdout.Bytes(), &out); err != nil {
			m.t.Fatalf("%v\n%s", err, stdout)
		}
		return out
	}
}

// picture is what an application sees of a device.
type picture struct {
	twin    string
	history []string
}

func pictures(t *testing.T, c *client.Client, ids []string) map[string]picture {
	t.Helper()
	out := map[string]picture{}
	for _, id := range ids {
		r, err := c.GetResource(t.Context(), id, "/light/1")
		if err != nil {
			t.Fatal(err)
		}
		p := picture{twin: string(r.Raw)}
		for ev, err := range c.ListEvents(t.Context(), client.EventQuery{DeviceIDs: []string{id}}) {
			if err != nil {
				t.Fatal(err)
			}
			p.history = append(p.history, string(ev.Raw))
		}
		out[id] = p
	}
	return out
}

// TestMigrate: a hub with devices, history, commands, accounts, keys and certificates moves to a cluster and back, broken off again and
// again, and nobody but its operator notices.
func TestMigrate(t *testing.T) {
	w := prepare(t, nil)
	ctx := t.Context()
	w.startNATS()
	w.startMongo()
	at := w.store.to[0]
	m := &move{world: w, meter: newMeter(t, at)}
	rest := fmt.Sprintf(`coapGateway: {api: {coap: {address: "127.0.0.1:%s"}}}
enrolmentGateway: {api: {coap: {address: ""}, http: {address: ""}}}
grpcGateway: {api: {http: {address: "127.0.0.1:%s"}, grpc: {address: "127.0.0.1:0"}}}
admin: {api: {http: {address: ""}}}
externalAddress: 127.0.0.1
`, w.coap, w.http)
	m.one = w.write("one.yaml", rest+"store: {minFree: 0}\n")
	data := filepath.Join(w.dir, "one")
	one := w.serve("one", m.one, data)
	status, err := one.control.Status(ctx)
	if err != nil {
		t.Fatal(err)
	}
	cluster := func(name, hubID, host, more string) string {
		return w.write(name, rest+fmt.Sprintf(`cluster: {hubId: %s, secret: 0123456789abcdef0123}
bus: {urls: ["nats://%s"]}
store:
  minFree: 0
  mongodb: {uri: "mongodb://%s/", database: coaphub, selectTimeout: 1s, timeout: 2s, settleTimeout: 3s%s}
  feed: {replicas: 1, maxBytes: 256MiB}
`, hubID, w.toNATS, host, more))
	}
	w.config = cluster("cluster.yaml", status.HubID, at, "")
	m.through = cluster("through.yaml", status.HubID, m.meter.l.Addr().String(), "")

	// A hub with something of everything.
	token, err := one.control.Token(ctx, bundle.TokenRequest{})
	if err != nil {
		t.Fatal(err)
	}
	app, err := client.New(client.Config{Server: "http://127.0.0.1:" + w.http, Token: client.Static(token.AccessToken)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(app.Close)
	w.parts["app-1"] = one
	if _, err := one.control.AddUser(ctx, bundle.UserRequest{Name: "bob", Password: "a long enough password", Roles: []string{"user"}}); err != nil {
		t.Fatal(err)
	}
	var devs []*guest
	var ids []string
	for i := range 4 {
		id := uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "moves %d", i)).String()
		devs = append(devs, w.enters(id, 1, i == 3, ""))
		ids = append(ids, id)
	}
	slices.Sort(ids)
	values := func(from, to int) {
		t.Helper()
		for _, d := range devs {
			until(t, patience, "the hub to observe "+d.id, func() bool { return d.Observed("/oic/res")+d.Observed("/light/1") > 0 })
			for n := from; n <= to; n++ {
				if _, err := d.Set("/light/1", map[string]any{"name": "Light", "state": true, "power": n}); err != nil {
					t.Fatal(err)
				}
			}
			until(t, patience, "the last value of "+d.id, func() bool {
				r, err := app.GetResource(ctx, d.id, "/light/1")
				return err == nil && strings.Contains(string(r.Raw), fmt.Sprintf(`"power":%d`, to))
			})
		}
	}
	values(1, 20)
	if _, err := app.UpdateResource(ctx, ids[0], "/light/1", map[string]any{"state": false}, client.CommandOptions{}); err != nil {
		t.Fatal(err)
	}
	label := "cellar"
	if _, err := app.UpdateLabels(ctx, ids[1], map[string]*string{"room": &label}); err != nil {
		t.Fatal(err)
	}
	before := pictures(t, app, ids)
	resume := ""
	for ev, err := range app.Watch(ctx, client.EventFilter{State: true}) {
		if err != nil {
			t.Fatal(err)
		}
		if ev.ResumeToken != "" && ev.Kind != client.Live {
			resume = ev.ResumeToken
			break
		}
	}
	books := func(c *bundle.Control) string {
		t.Helper()
		users, err := c.Users(ctx)
		if err != nil {
			t.Fatal(err)
		}
		certs, err := c.Certificates(ctx, bundle.CertificatesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		issued := map[string]bool{} // the hub's own come and go
		for _, c := range certs {
			if slices.Contains(ids, c.DeviceID) {
				issued[c.Serial+c.DeviceID] = true
			}
		}
		return fmt.Sprintf("%+v %v", users, issued)
	}
	inBooks := books(one.control)

	// Nobody moves a hub that runs, to where something is, or to somewhere else than is meant.
	w.refused("data-folder-in-use", "migrate", "to-cluster", "--config", w.config, "--data", data)
	one.p.end(syscall.SIGKILL)
	for _, d := range devs {
		d.Close()
	}
	w.refused("store-of-another-hub", "migrate", "to-cluster", "--config", cluster("wrong.yaml", uuid.NewString(), at, ""), "--data", data)
	w.refused("store-unreachable", "migrate", "to-cluster", "--config", cluster("wrong.yaml", status.HubID, "127.0.0.1:1", ""), "--data", data)
	w.refused("cluster-config-missing", "migrate", "to-cluster", "--config", m.one, "--data", data)
	w.refused("data-missing", "migrate", "to-cluster", "--config", w.config, "--data", filepath.Join(w.dir, "nowhere"))
	w.refused("database-empty", "migrate", "from-cluster", "--config", w.config, "--data", filepath.Join(w.dir, "nowhere"))
	w.refused("database-empty", "verify", "--config", w.config)

	// Half a hub is no hub, on either side.
	m.half(killed, 30_000, "to-cluster", data)
	w.refused("migration-unfinished", "serve", "--config", w.config, "--data", filepath.Join(w.dir, "cluster"))
	w.refused("migration-unfinished", "verify", "--config", w.config)
	// A hub that runs on the source meanwhile makes what was copied an old picture.
	one.begin()
	one.p.ready(t, patience)
	one.p.end(syscall.SIGTERM)
	whole := w.verified("--data", data)
	if said := m.half(killed, 30_000, "to-cluster", data); !strings.Contains(said, "begins anew") {
		t.Errorf("after the hub ran: %s", said)
	}
	moved := m.migrate("to-cluster", data, 10_000)
	if !moved.Resume || moved.Digest != whole.Digest || moved.Tally != whole.Tally || moved.Keys != filepath.Join(data, "keys") {
		t.Errorf("moved %+v, the folder has %+v", moved, whole)
	}
	if v := w.verified("--config", w.config); v != whole {
		t.Errorf("the database has %+v, the folder %+v", v, whole)
	}
	w.refused("target-not-empty", "migrate", "to-cluster", "--config", w.config, "--data", data)

	// The cluster serves the same.
	clusterData := filepath.Join(w.dir, "cluster")
	copyKeys(t, filepath.Join(data, "keys"), filepath.Join(clusterData, "keys"))
	hub := w.serve("cluster", w.config, clusterData)
	w.parts["app-1"] = hub
	same := func() {
		t.Helper()
		if now := books(w.parts["app-1"].control); now != inBooks {
			t.Errorf("accounts and certificates were\n%s, and are\n%s", inBooks, now)
		}
		now := pictures(t, app, ids)
		for id, was := range before { // a device that went is another event
			is := now[id]
			if is.twin != was.twin || len(is.history) < len(was.history) || !slices.Equal(is.history[:len(was.history)], was.history) {
				t.Errorf("an application saw of %s\n%v, and sees\n%v", id, was, is)
			}
		}
		for _, d := range devs {
			again(t, w, d)
		}
	}
	same()
	for ev, err := range app.Watch(ctx, client.EventFilter{Resume: resume}) {
		if err != nil || ev.Kind != client.Live && ev.Kind != client.Lagged {
			t.Errorf("a subscriber of the former log hears %+v, %v", ev, err)
		}
		if ev.Kind != client.Live {
			break
		}
	}
	values(21, 40)
	before = pictures(t, app, ids)
	w.refused("database-in-use", "migrate", "from-cluster", "--config", w.config, "--data", filepath.Join(w.dir, "nowhere"))
	w.refused("database-in-use", "migrate", "to-cluster", "--config", w.config, "--data", data)
	if v := w.verified("--config", w.config); v.Digest != "" || v.Devices != 4 {
		t.Errorf("of a cluster that runs: %+v", v)
	}

	// And back.
	hub.p.end(syscall.SIGKILL)
	for _, d := range devs {
		d.Close()
	}
	back := filepath.Join(w.dir, "back")
	w.refused("keys-missing", "migrate", "from-cluster", "--config", w.config, "--data", back)
	copyKeys(t, filepath.Join(clusterData, "keys"), filepath.Join(back, "keys"))
	m.startedMeanwhile(hub, back)
	moved = m.migrate("from-cluster", back, 4_000)
	whole = w.verified("--config", w.config)
	if v := w.verified("--data", back); v != whole || moved.Digest != whole.Digest {
		t.Errorf("the database has %+v, the folder %+v, moved %+v", whole, v, moved)
	}
	one = w.serve("back", m.one, back)
	w.parts["app-1"] = one
	same()
	values(41, 42)
}

// startedMeanwhile has a migration from the cluster stand still in the middle, and the hub start on the database.
func (m *move) startedMeanwhile(hub *part, data string) {
	m.t.Helper()
	cmd, _, said, happened := m.begin(asleep, 10_000, "from-cluster", data)
	<-happened
	hub.begin()
	hub.p.ready(m.t, patience)
	hub.p.end(syscall.SIGTERM)
	_ = cmd.Process.Signal(syscall.SIGCONT)
	if err := cmd.Wait(); err == nil || !strings.Contains(said.String(), "[migration-source-changed]") {
		m.t.Errorf("a hub started on what was copied: %v\n%s", err, said.String())
	}
}

// again has a device sign in with what it had.
func again(t *testing.T, w *world, d *guest) {
	t.Helper()
	var err error
	if !eventually(patience, func() bool {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err = d.Connect(ctx); err == nil {
			err = good(d.SignIn(ctx))
		}
		if err != nil {
			d.Close()
		}
		return err == nil
	}) {
		t.Fatalf("device %s comes again: %v", d.id, err)
	}
}

// copyKeys does what the operator does by hand: all but the secrets that moved.
func copyKeys(t *testing.T, from, to string) {
	t.Helper()
	if err := os.MkdirAll(to, 0o700); err != nil {
		t.Fatal(err)
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), "oauth-") {
			continue
		}
		b, err := os.ReadFile(filepath.Join(from, e.Name()))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, e.Name()), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// TestMovingAsWritten types the commands of the section about moving in docs/operations.md. What they do to /etc and /var happens in a
// folder, and systemd is played.
func TestMovingAsWritten(t *testing.T) {
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(b), "\n## Moving to a cluster and back\n")
	section, _, ok2 := strings.Cut(section, "\n## ")
	yaml := regexp.MustCompile("(?s)```yaml\n(.*?)```").FindStringSubmatch(section)
	if !ok || !ok2 || yaml == nil {
		t.Fatal("docs/operations.md has no section about moving, or no configuration in it")
	}
	w := prepare(t, nil)
	w.startNATS()
	w.startMongo()
	for _, dir := range []string{"etc/coaphub", "var/lib/private"} {
		if err := os.MkdirAll(filepath.Join(w.dir, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	// Where it runs is not written there.
	here := fmt.Sprintf(`
coapGateway: {api: {coap: {address: "127.0.0.1:%s"}}}
enrolmentGateway: {api: {coap: {address: ""}, http: {address: ""}}}
grpcGateway: {api: {http: {address: "127.0.0.1:%s"}, grpc: {address: "127.0.0.1:0"}}}
admin: {api: {http: {address: ""}}}
`, w.coap, w.http)
	data := filepath.Join(w.dir, "var/lib/private/coaphub")
	one := w.write("etc/coaphub/coaphub.yaml", "externalAddress: 127.0.0.1\n"+here)
	h := w.serve("systemd", one, data)
	status, err := h.control.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.parts["app-1"] = h
	dev := w.enters(uuid.NewString(), 1, false, "")
	config := w.write("etc/coaphub/cluster.yaml", here+strings.NewReplacer(
		"hub.example.com", "127.0.0.1", "7f8c3a52-3d1c-4b7e-9a41-0c9b8e7d6f5a", status.HubID, "nats.example.com:4222", w.toNATS,
		"mongo.example.com/?replicaSet=rs0", w.store.to[0]+"/", "store: {", "store: {feed: {replicas: 1, maxBytes: 256MiB}, ",
	).Replace(yaml[1]))

	n := 0
	var digests []string
	for _, block := range regexp.MustCompile("(?s)```sh\n(.*?)```").FindAllStringSubmatch(section, -1) {
		for line := range strings.Lines(block[1]) {
			line = strings.TrimSpace(line)
			n++
			switch line {
			case "sudo systemctl disable --now coaphub":
				h.p.end(syscall.SIGTERM)
				dev.Close()
				continue
			case "sudo systemctl enable --now coaphub":
				h.begin()
				h.p.ready(t, patience)
				continue
			}
			line = regexp.MustCompile(`([ '])/(etc|var)\b`).ReplaceAllString(line, "${1}"+w.dir+"/$2")
			sh := exec.CommandContext(t.Context(), "sh", "-ec", `sudo() { "$@"; }`+"\n"+line)
			sh.Env = append(os.Environ(), "PATH="+programs+":"+os.Getenv("PATH"))
			out, err := sh.CombinedOutput()
			if err != nil {
				t.Fatalf("%s\n%v\n%s", line, err, out)
			}
			if strings.Contains(line, "coaphub verify") {
				digests = append(digests, regexp.MustCompile("sha256:[0-9a-f]{64}").FindString(string(out)))
			}
			if strings.Contains(line, "rm ") { // all is there for the cluster: it serves
				c := w.serve("cluster", config, filepath.Join(w.dir, "var/lib/private/coaphub-ca"))
				again(t, w, dev)
				dev.Close()
				c.p.end(syscall.SIGTERM)
			}
		}
	}
	if n < 12 || len(digests) != 3 || digests[0] == "" || digests[0] != digests[1] || digests[2] == "" {
		t.Errorf("%d commands were typed, the digests are %q", n, digests)
	}
	again(t, w, dev)
	if now, err := h.control.Status(t.Context()); err != nil || now.HubID != status.HubID || now.Devices != 1 {
		t.Errorf("it came back as %+v, %v", now, err)
	}
}
