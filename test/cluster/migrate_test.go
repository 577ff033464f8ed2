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

// meter is what a migration reaches the database through. After so many bytes it has the migration killed.
type meter struct {
	l     net.Listener
	to    string
	bytes atomic.Int64
	limit atomic.Int64 // 0: none
	kill  atomic.Pointer[func()]
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
			if kill := m.kill.Swap(nil); kill != nil {
				(*kill)()
			}
			return
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

// migrate runs a migration, which is killed after some bytes, and then again with more, until it has its way.
func (m *move) migrate(to string, data string, steps ...int64) (out bundle.Migrated) {
	m.t.Helper()
	for _, limit := range append(steps, 0) {
		cmd := exec.CommandContext(m.t.Context(), filepath.Join(programs, "coaphub"), "migrate", to, "--json", "--config", m.through, "--data", data)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		kill := func() { _ = cmd.Process.Kill() }
		m.meter.kill.Store(&kill)
		m.meter.bytes.Store(0)
		m.meter.limit.Store(limit)
		err := cmd.Run()
		m.t.Logf("%s, after %d bytes of %d: %v %s", to, m.meter.bytes.Load(), limit, err, stderr.String())
		if err == nil {
			if limit != 0 && limit == steps[0] {
				m.t.Errorf("nothing was broken off: %d bytes were enough", m.meter.bytes.Load())
			}
			if err := json.Unmarshal(stdout.Bytes(), &out); err != nil {
				m.t.Fatalf("%v\n%s", err, stdout.String())
			}
			return out
		}
		if limit == 0 {
			m.t.Fatalf("migrate %s: %v\n%s", to, err, stderr.String())
		}
	}
	return out
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
	whole := w.verified("--data", data)
	half := func(limit int64) string {
		t.Helper()
		var said bytes.Buffer
		cmd := exec.CommandContext(ctx, filepath.Join(programs, "coaphub"), "migrate", "to-cluster", "--config", m.through, "--data", data)
		cmd.Stderr = &said
		kill := func() { _ = cmd.Process.Kill() }
		m.meter.kill.Store(&kill)
		m.meter.bytes.Store(0)
		m.meter.limit.Store(limit)
		if err := cmd.Run(); err == nil {
			t.Fatal("it was not broken off")
		}
		return said.String()
	}
	half(30_000)
	w.refused("migration-unfinished", "serve", "--config", w.config, "--data", filepath.Join(w.dir, "cluster"))
	w.refused("migration-unfinished", "verify", "--config", w.config)
	// A hub that runs on the source meanwhile makes what was copied an old picture.
	one.begin()
	one.p.ready(t, patience)
	one.p.end(syscall.SIGTERM)
	whole = w.verified("--data", data)
	if said := half(30_000); !strings.Contains(said, "begins anew") {
		t.Errorf("after the hub ran: %s", said)
	}
	moved := m.migrate("to-cluster", data, 20_000, 40_000, 60_000, 80_000, 120_000, 200_000)
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
	values(21, 40)
	before = pictures(t, app, ids)
	w.refused("database-in-use", "migrate", "from-cluster", "--config", w.config, "--data", filepath.Join(w.dir, "nowhere"))
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
	moved = m.migrate("from-cluster", back, 5_000, 10_000, 20_000, 30_000, 50_000)
	whole = w.verified("--config", w.config)
	if v := w.verified("--data", back); v != whole || moved.Digest != whole.Digest {
		t.Errorf("the database has %+v, the folder %+v, moved %+v", whole, v, moved)
	}
	one = w.serve("back", m.one, back)
	w.parts["app-1"] = one
	same()
	values(41, 42)
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
