package e2e_test

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/coaphub/coaphub/internal/bus/bustest"
	"github.com/coaphub/coaphub/test/device"
)

// violations is a log of a NATS server, of which it keeps what clients may not.
type violations struct {
	mu  sync.Mutex
	all []string
}

func (v *violations) Errorf(format string, args ...any) {
	if line := fmt.Sprintf(format, args...); strings.Contains(line, "Violation") {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.all = append(v.all, line)
	}
}
func (v *violations) Noticef(string, ...any) {}
func (v *violations) Warnf(string, ...any)   {}
func (v *violations) Fatalf(string, ...any)  {}
func (v *violations) Debugf(string, ...any)  {}
func (v *violations) Tracef(string, ...any)  {}

func (v *violations) seen() []string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.all)
}

// natsFromDocs starts a NATS server with the configuration of docs/operations.md, but with keys whose seeds it leaves in dir, by target.
func natsFromDocs(t *testing.T, dir string) (s *server.Server, hubID string, targets []string, log *violations) {
	t.Helper()
	b, err := os.ReadFile("../../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), "```conf\n")
	conf, _, ok := strings.Cut(rest, "```\n")
	if !ok {
		t.Fatal("the page has no configuration of a NATS server")
	}
	conf = regexp.MustCompile(`(?m)^([A-Z_]+): U[A-Z2-7]{55}$`).ReplaceAllStringFunc(conf, func(line string) string {
		name, _, _ := strings.Cut(line, ":")
		key, err := nkeys.CreateUser()
		if err != nil {
			t.Fatal(err)
		}
		seed, err := key.Seed()
		if err != nil {
			t.Fatal(err)
		}
		public, err := key.PublicKey()
		if err != nil {
			t.Fatal(err)
		}
		target := strings.ReplaceAll(strings.ToLower(name), "_", "-")
		targets = append(targets, target)
		if err := os.WriteFile(filepath.Join(dir, target+".nkey"), seed, 0o600); err != nil {
			t.Fatal(err)
		}
		return name + ": " + public
	})
	file := filepath.Join(dir, "nats.conf")
	if err := os.WriteFile(file, []byte(strings.Replace(conf, "/data/jetstream", filepath.Join(dir, "jetstream"), 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s = bustest.Server(t, func(o *server.Options) {
		documented, err := server.ProcessConfigFile(file)
		if err != nil {
			t.Fatal(err)
		}
		documented.Host, documented.Port, documented.NoLog, documented.NoSigs = o.Host, o.Port, o.NoLog, o.NoSigs
		*o = *documented
	})
	log = &violations{}
	s.SetLogger(log, false, false)
	return s, regexp.MustCompile(`coaphub\.([0-9a-f-]{36})\.`).FindStringSubmatch(conf)[1], targets, log
}

// mongodb runs test/mongo, a module of its own, and returns its URI.
func mongodb(t *testing.T, dir string) string {
	t.Helper()
	if uri := os.Getenv("COAPHUB_TEST_MONGODB_URI"); uri != "" && !strings.Contains(uri, "@") {
		return uri
	}
	program, data := filepath.Join(dir, "mongo"), filepath.Join(dir, "mongo.data")
	if out, err := exec.CommandContext(t.Context(), "go", "run", "-C", "../mongo", "./build", program).CombinedOutput(); err != nil {
		t.Fatalf("build test/mongo: %v\n%s", err, out)
	}
	if err := os.Mkdir(data, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, data)
	in, err := cmd.StdinPipe() // its end is the server's
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(line)
}

// TestBusPermissions runs each part of a hub in a process of its own, as an account of its own at a NATS server with the permissions that
// docs/operations.md publishes, through what a device and an administrator do: the server refuses nothing of it.
func TestBusPermissions(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	s, hubID, targets, refused := natsFromDocs(t, dir)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	door := ln.Addr().String() // that all processes have to know before
	_ = ln.Close()
	text := fmt.Sprintf(`
cluster: {hubId: %s, secret: 0123456789abcdef0123}
bus: {urls: [%q], nkeyFile: %%q}
store: {mongodb: {uri: %q, database: %q}, feed: {replicas: 1}}
`, hubID, s.ClientURL(), mongodb(t, dir), "coaphub_permissions_"+fmt.Sprint(time.Now().UnixNano()))
	parts := map[string]*process{}
	for _, target := range targets { // some wait for others
		file := filepath.Join(dir, target+".yaml")
		if err := os.WriteFile(file, fmt.Appendf(nil, text, filepath.Join(dir, target+".nkey")), 0o600); err != nil {
			t.Fatal(err)
		}
		parts[target] = launch(t, filepath.Join(dir, target), "--config", file, "--target", target, "--http-address", door)
	}
	for _, p := range parts {
		p.await()
	}
	if len(parts) != 7 {
		t.Fatalf("there are accounts for %v", targets)
	}
	gateway, apps := parts["coap-gateway"], parts["grpc-gateway"]
	o := apps.onboard(deviceID(1))
	leave := lives(t, device.Config{ID: deviceID(1), HubAddr: "coaps+tcp://" + gateway.coaps(), TLS: o.tls, Provider: o.Provider}, o.Code)
	if !eventually(t.Context(), 30*time.Second, func() bool { return gateway.status().Online == 1 }) {
		t.Fatalf("the device does not come\n%q\n%s", refused.seen(), gateway.log)
	}
	for _, p := range []*process{apps, gateway} {
		p.run("user", "passwd", "admin")
		p.run("status", "--refused")
		p.run("ca", "list")
	}
	apps.run("onboard", "--device-id", deviceID(2), "--psk")
	token := trim(apps.run("token"))
	light := "/api/v1/devices/" + deviceID(1) + "/resources/light/1"
	if !eventually(t.Context(), 20*time.Second, func() bool {
		status, body := apps.get(t.Context(), token, light)
		return status == 200 && strings.Contains(string(body), "power")
	}) {
		t.Error("the light's state does not come")
	}
	if status, body := apps.send(t.Context(), "PUT", token, light, `{"power":7}`); status != 200 {
		t.Errorf("the light is not switched: %d %s", status, body)
	}
	leave()
	if !eventually(t.Context(), 30*time.Second, func() bool { return gateway.status().Online == 0 }) {
		t.Error("the device does not leave")
	}
	if lines := refused.seen(); len(lines) > 0 {
		t.Errorf("the NATS server refused %d messages or subscriptions:\n%s", len(lines), strings.Join(slices.Compact(lines), "\n"))
	}

	// The test of the test: one part may not say what another says.
	identity, err := nats.NkeyOptionFromSeed(filepath.Join(dir, "enrolment-gateway.nkey"))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := nats.Connect(s.ClientURL(), identity)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	before := len(refused.seen())
	if err := conn.Publish("coaphub."+hubID+".rd.1.write", nil); err != nil {
		t.Fatal(err)
	}
	if !eventually(t.Context(), 10*time.Second, func() bool { return len(refused.seen()) == before+1 }) {
		t.Error("the NATS server refuses nobody anything")
	}
}
