package bundle_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
	"github.com/coaphub/coaphub/test/issuer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const lamp = "d0000000-0000-4000-8000-00000000000a"

// client does not keep connections, so that a test leaves nothing behind.
var client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 10 * time.Second}

func get(t *testing.T, url, token string) (int, string) {
	t.Helper()
	return getWith(t, client, url, token)
}

func getWith(t *testing.T, client *http.Client, url, token string) (int, string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

// eventually polls until what it asks is so, for at most ten seconds.
func eventually(t *testing.T, what string, is func() bool) {
	t.Helper()
	deadline, tick := time.Now().Add(10*time.Second), time.NewTicker(10*time.Millisecond)
	defer tick.Stop()
	for !is() {
		if time.Now().After(deadline) {
			t.Fatalf("not so after 10 s: %s", what)
		}
		<-tick.C
	}
}

// join makes a device, signs it up and in, and publishes.
func join(t *testing.T, h *hubtest.Hub, id string) *device.Device {
	t.Helper()
	o := h.Onboard(t, id)
	conf, err := device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID)
	if err != nil {
		t.Fatal(err)
	}
	d, err := device.New(device.Config{ID: id, HubAddr: o.Endpoints.CoAPSTCP, TLS: conf, Provider: o.AuthorizationProvider})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, step := range []func() (device.Answer, error){
		func() (device.Answer, error) { return d.SignUp(t.Context(), o.Code) },
		func() (device.Answer, error) { return d.SignIn(t.Context()) },
		func() (device.Answer, error) { return d.Publish(t.Context()) },
	} {
		if a, err := step(); err != nil || !a.OK() {
			t.Fatalf("%v, %v", a, err)
		}
	}
	return d
}

func TestAHubWithoutConfiguration(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	if _, err := hub.ParseDeviceID(h.ID); err != nil {
		t.Errorf("the hub's ID is %q", h.ID)
	}
	for path, want := range map[string]os.FileMode{"": 0o700, "hub.sock": 0o600, "first-login": 0o600, "keys": 0o700, "store": 0o700} {
		info, err := os.Stat(filepath.Join(h.Data, path))
		if err != nil {
			t.Error(err)
		} else if info.Mode().Perm() != want {
			t.Errorf("%q has mode %o, want %o", path, info.Mode().Perm(), want)
		}
	}
	for _, path := range []string{"/live", "/ready", "/metrics"} {
		if code, body := get(t, h.Admin+path, ""); code != http.StatusOK {
			t.Errorf("%s = %d %s", path, code, body)
		}
	}
	if code, body := get(t, h.HTTP+"/.well-known/configuration", ""); code != http.StatusOK || !strings.Contains(body, h.ID) || !strings.Contains(body, h.Endpoints.CoAPSTCP) {
		t.Errorf("the hub's configuration is %d %s", code, body)
	}
	if code, body := get(t, h.Issuer+"/.well-known/openid-configuration", ""); code != http.StatusOK || !strings.Contains(body, h.Issuer+"/token") {
		t.Errorf("the provider's is %d %s", code, body)
	}
	if code, _ := get(t, h.HTTP+"/api/v1/devices", ""); code != http.StatusUnauthorized {
		t.Errorf("devices without a token: %d", code)
	}
	if code, body := get(t, h.HTTP+"/api/v1/devices", h.Token(t)); code != http.StatusOK || body != "" {
		t.Errorf("devices: %d %q", code, body)
	}
	s, err := h.Control.Status(t.Context())
	if err != nil || s.HubID != h.ID || len(s.NotReady) != 0 || s.FirstLogin != filepath.Join(h.Data, "first-login") {
		t.Errorf("status %+v, %v", s, err)
	}
}

func TestADeviceIsSeenAndSurvivesARestart(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	d := join(t, h, lamp)
	token := h.Token(t, hub.ScopeRead)
	eventually(t, "the lamp is observed", func() bool { return d.Observed("/light/1") > 0 || d.Observed("/oic/res") > 0 })
	if _, err := d.Set("/light/1", map[string]any{"state": true, "power": 42}); err != nil {
		t.Fatal(err)
	}
	light := h.HTTP + "/api/v1/devices/" + lamp + "/resources/light/1"
	eventually(t, "the twin has the last value", func() bool { _, b := get(t, light, token); return strings.Contains(b, `"power":42`) })
	if s, err := h.Control.Status(t.Context()); err != nil || s.Devices != 1 || s.Online != 1 || s.Feed.N == 0 {
		t.Errorf("status %+v, %v", s, err)
	}

	if d, err := h.Control.Device(t.Context(), lamp); err != nil || !d.Online || d.Protocol != "coaps+tcp" || d.TLS != "TLS 1.3" ||
		d.BytesIn == 0 || d.BytesOut == 0 || d.EndedAt != nil || time.Since(d.ConnectedSince) > time.Minute {
		t.Errorf("the device's attachment: %+v, %v", d, err)
	}
	if _, err := h.Control.Device(t.Context(), "d0000000-0000-4000-8000-00000000000f"); !hub.IsKind(err, hub.NotFound) {
		t.Errorf("that of one that was never here: %v", err)
	}

	id, issuer, root := h.ID, h.Issuer, rootOf(t, h)
	h.Restart(t)
	if h.ID != id || h.Issuer != issuer || rootOf(t, h) != root {
		t.Error("the hub is another one after a restart")
	}
	light = h.HTTP + "/api/v1/devices/" + lamp + "/resources/light/1"
	if code, b := get(t, light, token); code != http.StatusOK || !strings.Contains(b, `"power":42`) {
		t.Errorf("after a restart, with the token from before: %d %s", code, b)
	}
	// The device was signed in when the hub stopped, so it is offline now.
	eventually(t, "it is offline", func() bool {
		_, b := get(t, h.HTTP+"/api/v1/devices/"+lamp, token)
		return strings.Contains(b, "OFFLINE")
	})
	var far [2]int64
	if v, err := bundle.Verify(t.Context(), h.Data, func(p string) { t.Error(p) }, func(done, total int64) { far = [2]int64{done, total} }); far != [2]int64{2, 2} || err != nil || v.Devices != 1 || v.Digest == "" {
		t.Errorf("verified %+v, %v, %v", v, far, err)
	}
}

func rootOf(t *testing.T, h *hubtest.Hub) string {
	t.Helper()
	pem, err := h.Control.Root(t.Context(), "device")
	if err != nil {
		t.Fatal(err)
	}
	return pem
}

func TestASecondHubIsRefused(t *testing.T) {
	h := hubtest.Start(t)
	cfg := bundle.Default()
	cfg.Data = h.Data
	err := bundle.Run(t.Context(), cfg, bundle.Options{})
	if !hub.IsKind(err, hub.Conflict) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("err = %v", err)
	}
	if _, err := h.Control.Status(t.Context()); err != nil {
		t.Errorf("the first one is gone: %v", err)
	}
}

func TestATakenPortIsNamedAndLeavesNothing(t *testing.T) {
	t.Parallel()
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = taken.Close() }()
	for flag, set := range map[string]func(*bundle.Config) *string{
		"--coap-address":           func(c *bundle.Config) *string { return &c.CoAPGateway.API.CoAP.Address },
		"--http-address":           func(c *bundle.Config) *string { return &c.GRPCGateway.API.HTTP.Address },
		"--grpc-address":           func(c *bundle.Config) *string { return &c.GRPCGateway.API.GRPC.Address },
		"--enrolment-address":      func(c *bundle.Config) *string { return &c.EnrolmentGateway.API.CoAP.Address },
		"--enrolment-http-address": func(c *bundle.Config) *string { return &c.EnrolmentGateway.API.HTTP.Address },
		"--admin-address":          func(c *bundle.Config) *string { return &c.Admin.API.HTTP.Address },
	} {
		cfg := loopback(t)
		*set(&cfg) = taken.Addr().String()
		err := bundle.Run(t.Context(), cfg, bundle.Options{})
		if err == nil || !strings.Contains(err.Error(), flag) || !strings.Contains(err.Error(), taken.Addr().String()) {
			t.Errorf("%s: %v", flag, err)
		}
		f, err := bundle.OpenFolder(cfg.Data)
		if err != nil {
			t.Errorf("%s: the folder is still held: %v", flag, err)
			continue
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
}

// loopback is a configuration with ports of its own.
func loopback(t *testing.T) bundle.Config {
	t.Helper()
	c := bundle.Default()
	c.Data = filepath.Join(t.TempDir(), "data")
	c.ExternalAddress = "127.0.0.1"
	c.Store.MinFree = 0
	for _, a := range []*string{&c.CoAPGateway.API.CoAP.Address, &c.GRPCGateway.API.HTTP.Address, &c.GRPCGateway.API.GRPC.Address, &c.Admin.API.HTTP.Address, &c.EnrolmentGateway.API.CoAP.Address, &c.EnrolmentGateway.API.HTTP.Address} {
		*a = "127.0.0.1:0"
	}
	return c
}

// runOnce starts a hub, calls do once it is ready, stops it, and returns what it printed.
func runOnce(t *testing.T, cfg bundle.Config, terminal bool, do func()) string {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var out bytes.Buffer
	err := bundle.Run(ctx, cfg, bundle.Options{Out: &out, Terminal: terminal, Started: func(bundle.Status) {
		go func() { defer stop(); do() }() // Started must not block; Run ends with stop
	}})
	if err != nil {
		t.Fatal(err)
	}
	return out.String()
}

func TestTheReadyLine(t *testing.T) {
	t.Parallel()
	cfg := loopback(t)
	line := runOnce(t, cfg, false, func() {})
	for _, want := range []string{
		`^ready hub=[0-9a-f-]{36} coaps\+tcp=coaps\+tcp://127\.0\.0\.1:\d+ coaps=coaps://127\.0\.0\.1:\d+ http=http://127\.0\.0\.1:\d+ grpc=127\.0\.0\.1:\d+ admin=http://127\.0\.0\.1:\d+ `,
		` oauth=http://127\.0\.0\.1:\d+/oauth `, ` data=` + regexp.QuoteMeta(cfg.Data) + ` first-login=` + regexp.QuoteMeta(cfg.Data) + `/first-login\n$`,
	} {
		if !regexp.MustCompile(want).MatchString(line) {
			t.Errorf("%q does not match %s", line, want)
		}
	}
	if strings.Count(line, "\n") != 1 {
		t.Errorf("it is not one line: %q", line)
	}
}

// The address that is configured for the secure listener is said of it over both protocols, and of no other.
func TestTheExternalAddressIsTheSecureListeners(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.externalAddress=nat.example:443", "coapGateway.api.coap.plainAddress=127.0.0.1:0"))
	e := h.Endpoints
	if e.CoAPSTCP != "coaps+tcp://nat.example:443" || e.CoAPS != "coaps://nat.example:443" {
		t.Errorf("the secure endpoints are %s and %s", e.CoAPSTCP, e.CoAPS)
	}
	if !strings.HasPrefix(e.CoAPTCP, "coap+tcp://127.0.0.1:") || e.CoAP != "coap"+strings.TrimPrefix(e.CoAPTCP, "coap+tcp") {
		t.Errorf("the plain endpoints are %s and %s", e.CoAPTCP, e.CoAP)
	}
}

// A hub that stops says so to probes until it is gone: the call that is still read on the socket holds up the other parts.
func TestReadinessSaysStopping(t *testing.T) {
	t.Parallel()
	cfg := loopback(t)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	started, ended := make(chan bundle.Status, 1), make(chan error, 1)
	go func() { // ends with stop; awaited below
		ended <- bundle.Run(ctx, cfg, bundle.Options{Started: func(s bundle.Status) { started <- s }})
	}()
	var admin string
	select {
	case s := <-started:
		admin = s.Endpoints.Admin
	case err := <-ended:
		t.Fatal(err)
	}
	slow, err := new(net.Dialer).DialContext(t.Context(), "unix", filepath.Join(cfg.Data, "hub.sock"))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = slow.Close() }()
	if _, err := io.WriteString(slow, "POST /token HTTP/1.1\r\nHost: hub\r\nContent-Length: 99\r\nExpect: 100-continue\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(slow).ReadString('\n'); err != nil || line != "HTTP/1.1 100 Continue\r\n" {
		t.Fatalf("the call is not being read: %q, %v", line, err)
	}
	if code, body := get(t, admin+"/ready", ""); code != http.StatusOK {
		t.Errorf("before the stop: %d %s", code, body)
	}
	stop()
	eventually(t, "/ready says that the hub stops", func() bool {
		code, body := get(t, admin+"/ready", "")
		return code == http.StatusServiceUnavailable && strings.Contains(body, `"hub":"starting or stopping"`)
	})
	if code, _ := get(t, admin+"/live", ""); code != http.StatusOK { // else whoever watches kills it while it writes
		t.Errorf("/live = %d while stopping", code)
	}
	_ = slow.Close()
	if err := <-ended; err != nil {
		t.Errorf("the hub did not stop well: %v", err)
	}
}

// The issuer is what tokens say, fixed at the first start; the provider is reached where the hub listens now.
func TestTheProvidersAddressAfterAMove(t *testing.T) {
	t.Parallel()
	warning := regexp.MustCompile(`level=WARN msg="the provider's issuer is not where the hub listens[^"]*" issuer=(\S+) http=(\S+)`)
	cfg := loopback(t)
	start := func() (s bundle.Status, warned []string) {
		ctx, stop := context.WithCancel(t.Context())
		defer stop()
		var out, log bytes.Buffer
		err := bundle.Run(ctx, cfg, bundle.Options{Out: &out, Log: &log, Started: func(now bundle.Status) {
			s = now
			go func() { // Started must not block; Run ends with stop
				defer stop()
				code, body := get(t, now.Endpoints.OAuth+"/.well-known/openid-configuration", "")
				if code != http.StatusOK || !strings.Contains(body, `"issuer":"`+now.Issuer+`"`) {
					t.Errorf("discovery at %s is %d %s", now.Endpoints.OAuth, code, body)
				}
			}()
		}})
		if err != nil {
			t.Fatal(err)
		}
		if want := s.Endpoints.HTTP + "/oauth"; s.Endpoints.OAuth != want || !strings.Contains(out.String(), " oauth="+want+" ") {
			t.Errorf("oauth is %s in the status of a hub at %s; it printed %q", s.Endpoints.OAuth, s.Endpoints.HTTP, out.String())
		}
		return s, warning.FindStringSubmatch(log.String())
	}
	first, warned := start()
	if first.Issuer != first.Endpoints.OAuth || warned != nil {
		t.Errorf("the first start: issuer %s at %s, warning %q", first.Issuer, first.Endpoints.OAuth, warned)
	}
	// Another port for the second start: this one is ours, or somebody else's already.
	if taken, err := new(net.ListenConfig).Listen(t.Context(), "tcp", strings.TrimPrefix(first.Endpoints.HTTP, "http://")); err == nil {
		defer func() { _ = taken.Close() }()
	}
	second, warned := start()
	if second.Issuer != first.Issuer || second.Endpoints.HTTP == first.Endpoints.HTTP {
		t.Errorf("the second start: issuer %s after %s, at %s after %s", second.Issuer, first.Issuer, second.Endpoints.HTTP, first.Endpoints.HTTP)
	}
	if len(warned) != 3 || warned[1] != first.Issuer || warned[2] != second.Endpoints.HTTP {
		t.Errorf("the second start's warning: %q", warned)
	}
	// Who says where the issuer is has something there.
	cfg.OAuthServer.Issuer = first.Issuer
	if _, warned := start(); warned != nil {
		t.Errorf("with the issuer in the configuration: %q", warned)
	}
}

func TestFirstLogin(t *testing.T) {
	t.Parallel()
	cfg := loopback(t)
	file := filepath.Join(cfg.Data, "first-login")
	// On a terminal the one-time password is shown and in no file.
	line := runOnce(t, cfg, true, func() {})
	if !regexp.MustCompile(` first-login=admin:[a-z0-9-]{16,}\n$`).MatchString(line) {
		t.Errorf("the terminal shows %q", line)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("there is a file too: %v", err)
	}
	// Without one it is in a file, and a new one, since the first was never used.
	runOnce(t, cfg, false, func() {
		b, err := os.ReadFile(file)
		if err != nil || !regexp.MustCompile(`^name: admin\npassword: [a-z0-9-]{16,}\n$`).Match(b) {
			t.Errorf("the file is %q, %v", b, err)
		}
		c, err := bundle.Dial(cfg.Data)
		if err != nil {
			t.Error(err)
			return
		}
		if _, err := c.SetPassword(t.Context(), bundle.UserRequest{Name: "admin", Password: "correct horse battery"}); err != nil {
			t.Error(err)
		}
		s, err := c.Status(t.Context())
		if err != nil || s.FirstLogin != "" {
			t.Errorf("after the password was set: %+v, %v", s, err)
		}
		if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the file is still there: %v", err)
		}
	})
	if line := runOnce(t, cfg, true, func() {}); strings.Contains(line, "first-login") {
		t.Errorf("the next start shows %q", line)
	}
}

func TestAFullDiskStartsReadOnly(t *testing.T) {
	t.Parallel()
	cfg := loopback(t)
	file := filepath.Join(cfg.Data, "first-login")
	var password []byte
	runOnce(t, cfg, false, func() {
		var err error
		if password, err = os.ReadFile(file); err != nil {
			t.Error(err)
		}
	})
	cfg.Store.MinFree = 1 << 60
	line := runOnce(t, cfg, false, func() {
		c, err := bundle.Dial(cfg.Data)
		if err != nil {
			t.Error(err)
			return
		}
		s, err := c.Status(t.Context())
		if err != nil || !strings.Contains(s.ReadOnly, "less than 1048576TiB free (store.minFree)") || len(s.NotReady) > 0 {
			t.Errorf("status %+v, %v", s, err)
		}
		if us, err := c.Users(t.Context()); err != nil || len(us) != 1 {
			t.Errorf("reading: %+v, %v", us, err)
		}
		_, err = c.AddUser(t.Context(), bundle.UserRequest{Name: "bob", Roles: []string{"user"}})
		if code, _ := hub.Public(err); !hub.IsKind(err, hub.Unavailable) || code != "disk-full" {
			t.Errorf("writing: %v", err)
		}
	})
	if !strings.Contains(line, " first-login="+file) {
		t.Errorf("the ready line is %q", line)
	}
	// The password of the first start is the one that works.
	if b, err := os.ReadFile(file); err != nil || !bytes.Equal(b, password) {
		t.Errorf("the first login became %q, %v; it was %q", b, err, password)
	}
	// A hub that was never started has nothing to read.
	fresh := loopback(t)
	fresh.Store.MinFree = 1 << 60
	err := bundle.Run(t.Context(), fresh, bundle.Options{})
	if !hub.IsKind(err, hub.Unavailable) || !strings.Contains(err.Error(), "disk is full") {
		t.Errorf("the first start: %v", err)
	}
}

func TestVerifyFindsADamagedFile(t *testing.T) {
	t.Parallel()
	cfg := loopback(t)
	runOnce(t, cfg, false, func() {})
	dir := filepath.Join(cfg.Data, "store")
	s, err := pebblestore.Open(dir, pebblestore.Options{MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	value := make([]byte, 1024)
	noise := rand.NewChaCha8([32]byte{1})
	for i := range 300 {
		_, _ = noise.Read(value) // never fails; what cannot be compressed keeps its place in the file
		if _, err := s.Put(t.Context(), "filler", store.Doc{Key: strconv.Itoa(i), Value: value}); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	verify := func() (problems []string) {
		t.Helper()
		if _, err := bundle.Verify(t.Context(), cfg.Data, func(p string) { problems = append(problems, p) }, nil); err != nil {
			t.Errorf("verify: %v", err)
		}
		return problems
	}
	if ps := verify(); len(ps) > 0 { // and makes a table of the log
		t.Errorf("before the damage: %q", ps)
	}
	tables, err := filepath.Glob(filepath.Join(dir, "*.sst"))
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		b, err := os.ReadFile(table)
		if err != nil {
			t.Fatal(err)
		}
		if len(b) < 200<<10 {
			continue
		}
		b[len(b)/2] ^= 0xff
		if err := os.WriteFile(table, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if ps := verify(); len(ps) != 1 || !strings.Contains(ps[0], "the store cannot be read to the end, restore a backup: ") || strings.Contains(ps[0], "\n") {
		t.Errorf("after the damage: %q", ps)
	}
}

func TestTheSocketTakesALongPath(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t, hubtest.WithData(filepath.Join(t.TempDir(), strings.Repeat("long", 30), "data")))
	if s, err := h.Control.Status(t.Context()); err != nil || s.HubID != h.ID {
		t.Errorf("%+v, %v", s, err)
	}
	h.Restart(t) // over the socket that is there
	if _, err := h.Control.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestEachCallIsAudited(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	h.Token(t)
	if _, err := h.Control.Issue(t.Context(), "no-uuid", 0); !hub.IsKind(err, hub.Invalid) {
		t.Errorf("issue for no UUID: %v", err)
	}
	for _, want := range []string{`call="POST /token" answer=200`, `call="POST /ca/issue" answer=400`} {
		re := regexp.MustCompile(`administrator's call over the socket.*peer="uid=\d+,pid=\d+" user=\S+ ` + want)
		if !re.MatchString(h.Log()) {
			t.Errorf("the log has no %s:\n%s", want, h.Log())
		}
	}
	if strings.Contains(h.Log(), "eyJ") {
		t.Error("a token is in the log")
	}
}

func TestOnboard(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	o := h.Onboard(t, lamp)
	if o.HubID != h.ID || o.Endpoints.CoAPSTCP != "coaps+tcp://"+h.CoAPS || o.AuthorizationProvider != "coaphub" || o.Owner != "admin" || o.Code == "" {
		t.Errorf("%+v", o.Onboarding)
	}
	if left := time.Until(o.ExpiresAt); left < 14*time.Minute || left > 15*time.Minute {
		t.Errorf("the code lives for %s", left)
	}
	for _, c := range []struct {
		name string
		q    bundle.OnboardRequest
		kind hub.Kind
	}{
		{"no device", bundle.OnboardRequest{}, hub.Invalid},
		{"one and any", bundle.OnboardRequest{DeviceID: lamp, AnyDevice: true}, hub.Invalid},
		{"no UUID", bundle.OnboardRequest{DeviceID: "lamp"}, hub.Invalid},
		{"a certificate for any", bundle.OnboardRequest{AnyDevice: true, Certificate: true}, hub.Invalid},
		{"nobody's", bundle.OnboardRequest{DeviceID: lamp, Owner: "nobody"}, hub.NotFound},
		{"the hub's own ID", bundle.OnboardRequest{DeviceID: h.ID, Certificate: true}, hub.Denied},
	} {
		if _, err := h.Control.Onboard(t.Context(), c.q); !hub.IsKind(err, c.kind) {
			t.Errorf("%s: %v, want %v", c.name, err, c.kind)
		}
	}
	if o, err := h.Control.Onboard(t.Context(), bundle.OnboardRequest{AnyDevice: true}); err != nil || o.AuthorizationCode == "" || o.Identity != nil {
		t.Errorf("any device: %+v, %v", o, err)
	}
}

func TestAccountsAndTokens(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	ctx := t.Context()
	a, err := h.Control.AddUser(ctx, bundle.UserRequest{Name: "alice", Roles: []string{"viewer"}})
	if err != nil || a.Password == "" || !a.User.MustChange {
		t.Fatalf("%+v, %v", a, err)
	}
	if _, err := h.Control.AddUser(ctx, bundle.UserRequest{Name: "alice", Roles: []string{"user"}}); !hub.IsKind(err, hub.Conflict) {
		t.Errorf("the same name again: %v", err)
	}
	if _, err := h.Control.SetRoles(ctx, bundle.UserRequest{Name: "alice", Roles: []string{"emperor"}}); !hub.IsKind(err, hub.Invalid) {
		t.Errorf("an unknown role: %v", err)
	}
	if a, err := h.Control.SetRoles(ctx, bundle.UserRequest{Name: "alice", Roles: []string{"user"}}); err != nil || a.User.Roles[0] != "user" {
		t.Errorf("%+v, %v", a, err)
	}
	us, err := h.Control.Users(ctx)
	if err != nil || len(us) != 2 {
		t.Errorf("%+v, %v", us, err)
	}
	if code, _ := get(t, h.HTTP+"/api/v1/devices", h.TokenOf(t, "alice", hub.ScopeRead)); code != http.StatusOK {
		t.Errorf("alice's token: %d", code)
	}
	if _, err := h.Control.Token(ctx, bundle.TokenRequest{Owner: "alice", TTL: 31 * 24 * time.Hour}); !hub.IsKind(err, hub.Invalid) {
		t.Errorf("a token for 31 days: %v", err)
	}
	tok, err := h.Control.Token(ctx, bundle.TokenRequest{TTL: 30 * 24 * time.Hour})
	if err != nil || time.Until(tok.ExpiresAt) < 29*24*time.Hour {
		t.Errorf("a token for 30 days: %+v, %v", tok, err)
	}
}

// What administrators do and see over the API, and that the audit log has it after a restart, beside the calls of the socket.
func TestAdministrationOverTheAPI(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	admin := h.TokenOf(t, "admin", hub.ScopeAdmin, hub.ScopeRead, hub.ScopeWrite)
	send := func(method, path, body string, code int) map[string]any {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), method, h.HTTP+path, strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer "+admin)
		resp, err := client.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = resp.Body.Close() }()
		var v map[string]any
		if err := json.NewDecoder(resp.Body).Decode(&v); err != nil || resp.StatusCode != code {
			t.Fatalf("%s %s: %s %v, %v", method, path, resp.Status, v, err)
		}
		return v
	}
	if a := send("POST", "/api/v1/accounts", `{"name":"carol","roles":["viewer"]}`, 200); a["password"] == nil {
		t.Errorf("no one-time password: %v", a)
	}
	send("PUT", "/api/v1/accounts/carol/roles", `{"roles":["user"]}`, 200)
	send("PUT", "/api/v1/accounts/carol/roles", `{"roles":["emperor"]}`, 400)
	send("PUT", "/api/v1/accounts/carol/password", `{"password":"correct horse battery"}`, 200)
	send("PUT", "/api/v1/accounts/nobody/password", `{}`, 404)
	if _, list := get(t, h.HTTP+"/api/v1/accounts", admin); !strings.Contains(list, `"name":"carol","roles":["user"],"mustChange":false`) {
		t.Errorf("accounts: %s", list)
	}
	if code, _ := get(t, h.HTTP+"/api/v1/accounts", h.TokenOf(t, "carol", hub.ScopeRead)); code != http.StatusForbidden {
		t.Errorf("carol reads accounts: %d", code)
	}

	join(t, h, lamp)
	send("PATCH", "/api/v1/devices/"+lamp+"/labels", `{"labels":{"room":"kitchen"}}`, 200)
	// A device is in lists when its /oic/d has come, which is some time after its publishing was answered.
	eventually(t, "the device is found by its label", func() bool {
		_, list := get(t, h.HTTP+"/api/v1/devices?search=room%3Dkitchen", admin)
		return strings.Contains(list, `"labels":{"room":"kitchen"}`)
	})
	if code, thing := get(t, h.HTTP+"/api/v1/things/"+lamp, admin); code != http.StatusOK || !strings.Contains(thing, `"base":"`+h.HTTP+`/api/v1/"`) ||
		!strings.Contains(thing, `"href":"devices/`+lamp+`/resources/light/1?onlyContent=true"`) {
		t.Errorf("thing: %d %s", code, thing)
	}
	// A device that is not let in is known to administrators.
	o := h.Onboard(t, "d0000000-0000-4000-8000-0000000000bb")
	conf, err := device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID)
	if err != nil {
		t.Fatal(err)
	}
	d, err := device.New(device.Config{ID: o.DeviceID, HubAddr: o.Endpoints.CoAPSTCP, TLS: conf, Provider: o.AuthorizationProvider})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	if a, err := d.SignUp(t.Context(), "no-code"); err == nil && a.OK() {
		t.Fatal("signed up without a code")
	}
	eventually(t, "the refusal is listed", func() bool {
		_, list := get(t, h.HTTP+"/api/v1/refusals", admin)
		return strings.Contains(list, `"what":"sign-up"`)
	})

	h.Restart(t)
	admin = h.TokenOf(t, "admin", hub.ScopeAdmin, hub.ScopeRead, hub.ScopeWrite)
	if _, list := get(t, h.HTTP+"/api/v1/devices?search=room%3Dkitchen", admin); !strings.Contains(list, `"labels":{"room":"kitchen"}`) {
		t.Errorf("labels after a restart: %s", list)
	}
	_, log := get(t, h.HTTP+"/api/v1/audit", admin)
	for _, want := range []string{
		`"door":"http","call":"addAccount","target":"/api/v1/accounts","user":"admin","owner":"admin"`, `"call":"putRoles".*"outcome":"role-unknown"`,
		`"call":"patchLabels","target":"/api/v1/devices/` + lamp + `/labels"`, `"door":"socket","call":"POST /token","target":"carol"`,
		`"call":"POST /onboard","target":"` + lamp + `"`,
	} {
		if !regexp.MustCompile(want).MatchString(log) {
			t.Errorf("the audit log has no %s:\n%s", want, log)
		}
	}
	for _, secret := range []string{"eyJ", "battery"} {
		if strings.Contains(log, secret) {
			t.Errorf("%s is in the audit log", secret)
		}
	}
	es, err := h.Control.Audit(t.Context(), 0, 1)
	if err != nil || len(es) != 1 || es[0].Call != "POST /token" {
		t.Errorf("over the socket: %+v, %v", es, err)
	}
	if _, err := h.Control.Audit(t.Context(), 0, 0); !hub.IsKind(err, hub.Invalid) {
		t.Errorf("no limit: %v", err)
	}
}

func TestBackupAndRestore(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	join(t, h, lamp)
	token := h.Token(t)
	root := rootOf(t, h)
	before, err := h.Control.Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	ctx, at := t.Context(), func(name string) string { return filepath.Join(dir, name) }
	phrase := []byte("correct horse battery")

	var done, total int64
	m, err := bundle.Backup(ctx, h.Data, at("running"), nil, "v1", func(d, n int64) { done, total = d, n })
	if err != nil || m.HubID != h.ID || m.Keys || done != total || total == 0 {
		t.Fatalf("of a running hub: %+v, %d of %d, %v", m, done, total, err)
	}
	if _, err := bundle.Backup(ctx, h.Data, at("running"), nil, "v1", nil); !hub.IsKind(err, hub.Precondition) {
		t.Errorf("over another backup: %v", err)
	}
	if left, err := os.ReadDir(filepath.Join(h.Data, "scratch")); err != nil || len(left) > 0 {
		t.Errorf("the hub keeps checkpoints: %v, %v", left, err)
	}
	h.Stop(t)
	if _, err := bundle.Backup(ctx, h.Data, at("stopped"), phrase, "v1", nil); err != nil {
		t.Fatalf("of a stopped hub: %v", err)
	}
	for _, name := range []string{"running", "stopped"} {
		noSecrets(t, at(name))
	}

	// Without keys: the same hub and its devices, a new log and new keys.
	if _, err := bundle.Restore(ctx, at("running"), at("without"), nil, nil); err != nil {
		t.Fatal(err)
	}
	r := hubtest.Start(t, hubtest.WithData(at("without")))
	s, err := r.Control.Status(ctx)
	if err != nil || s.HubID != h.ID || s.Devices != 1 || s.Feed.LogID == before.Feed.LogID || rootOf(t, r) == root {
		t.Errorf("restored without keys: %+v, %v", s, err)
	}
	if code, _ := get(t, r.HTTP+"/api/v1/devices", token); code != http.StatusUnauthorized {
		t.Errorf("the token from before: %d", code)
	}
	r.Stop(t)
	if _, err := bundle.Restore(ctx, at("running"), at("without"), nil, nil); !hub.IsKind(err, hub.Precondition) {
		t.Errorf("over a data folder: %v", err)
	}

	// With keys nobody notices.
	if _, err := bundle.Restore(ctx, at("stopped"), at("with"), []byte("something else"), nil); !hub.IsKind(err, hub.Invalid) {
		t.Errorf("a wrong passphrase: %v", err)
	}
	if _, err := os.Stat(at("with")); err == nil {
		t.Error("a wrong passphrase leaves a folder")
	}
	if _, err := bundle.Restore(ctx, at("running"), at("with"), phrase, nil); !hub.IsKind(err, hub.Precondition) {
		t.Errorf("keys of a backup without: %v", err)
	}
	if _, err := bundle.Restore(ctx, at("stopped"), at("with"), phrase, nil); err != nil {
		t.Fatal(err)
	}
	r = hubtest.Start(t, hubtest.WithData(at("with")))
	if rootOf(t, r) != root {
		t.Error("the root is another one")
	}
	if code, b := get(t, r.HTTP+"/api/v1/devices", token); code != http.StatusOK || !strings.Contains(b, lamp) {
		t.Errorf("the token from before: %d %s", code, b)
	}
	r.Stop(t)
	if v, err := bundle.Verify(ctx, at("with"), func(p string) { t.Error(p) }, nil); err != nil || v.Devices != 1 {
		t.Errorf("verified %+v, %v", v, err)
	}

	for _, bad := range []string{dir, at("nowhere")} {
		if _, err := bundle.Restore(ctx, bad, at("x"), nil, nil); !hub.IsKind(err, hub.NotFound) {
			t.Errorf("restoring %s: %v", bad, err)
		}
		if _, err := bundle.Backup(ctx, bad, at("x"), nil, "", nil); !hub.IsKind(err, hub.NotFound) {
			t.Errorf("backing up %s: %v", bad, err)
		}
	}
}

// noSecrets looks for private keys in a backup, in whatever form.
func noSecrets(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := os.ReadFile(path)
		for _, mark := range []string{"PRIVATE KEY", `"private":`, "oauth-secrets"} {
			if bytes.Contains(b, []byte(mark)) {
				t.Errorf("%s has %q", path, mark)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// stopsQuickly stops a hub, which tells its device.
func stopsQuickly(t *testing.T, h *hubtest.Hub, d *device.Device) {
	t.Helper()
	begin := time.Now()
	h.Stop(t)
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("stopping took %s", took)
	}
	select {
	case <-d.Done():
	case <-time.After(5 * time.Second):
		t.Error("the device was not told")
	}
}

func TestStoppingIsOrderlyAndQuick(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	d := join(t, h, lamp)
	idle, err := net.Dial("tcp", strings.TrimPrefix(h.HTTP, "http://")) // says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = idle.Close() }()
	stopsQuickly(t, h, d)
	var e *hub.Error
	if _, err := h.Control.Status(t.Context()); !errors.As(err, &e) || e.Code != bundle.ErrNoHub || !strings.Contains(e.Text, "coaphub serve") {
		t.Errorf("afterwards: %v", err)
	}
}

func TestAnExternalProvider(t *testing.T) {
	t.Parallel()
	op := issuer.Start(t)
	setting := func(v any) string {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	h := hubtest.Start(t, hubtest.WithConfig(
		"authorization.issuers="+setting([]map[string]any{{"authority": op.URL(), "audience": []string{"hub"}}}),
		"coapGateway.api.coap.authorization.providers="+setting([]map[string]any{{"name": "op", "authority": op.URL(), "clientID": "cloud", "redirectURL": "https://localhost/devices"}}),
	))
	if h.Issuer != "" {
		t.Errorf("the embedded provider runs as %s", h.Issuer)
	}
	token := op.Mint(map[string]any{"sub": "alice", "aud": "hub", "scope": "devices:read"})
	if code, b := get(t, h.HTTP+"/api/v1/devices", token); code != http.StatusOK {
		t.Errorf("its token: %d %s", code, b)
	}
	if code, _ := get(t, h.HTTP+"/api/v1/devices", op.Mint(map[string]any{"sub": "alice", "aud": "other", "scope": "devices:read"})); code != http.StatusUnauthorized {
		t.Errorf("a token for somebody else: %d", code)
	}
	o, err := h.Control.Onboard(t.Context(), bundle.OnboardRequest{DeviceID: lamp, Certificate: true})
	if err != nil || o.AuthorizationCode != "" || o.AuthorizationProvider != "op" || !strings.HasPrefix(o.AuthorizeURL, op.URL()) ||
		!strings.Contains(o.AuthorizeURL, "client_id=cloud") || !strings.Contains(o.AuthorizeURL, "response_type=code") {
		t.Errorf("onboard: %+v, %v", o, err)
	}
	alice := caller{h, op.Mint(map[string]any{"sub": "alice", "aud": "hub", "scope": "devices:read devices:write"})}
	bob := caller{h, op.Mint(map[string]any{"sub": "bob", "aud": "hub", "scope": "devices:read devices:write"})}
	a := alice.onboards(t, `{"deviceId":"`+lamp+`","certificate":true}`)
	if a.AuthorizationCode != "" || !a.ExpiresAt.IsZero() || a.AuthorizationProvider != "op" || a.AuthorizeURL != o.AuthorizeURL || a.Identity == nil {
		t.Errorf("over the API: %+v", a)
	}
	bob.refused(t, "an ID that is kept for alice", `{"deviceId":"`+lamp+`","certificate":true}`, "device-owned-by-other")
	if code, text := alice.ask(t, http.MethodGet, "/api/v1/refusals", ""); code != http.StatusOK || text != "" {
		t.Errorf("alice's refusals: %d %s", code, text)
	}
	var e *hub.Error
	if _, err := h.Control.Token(t.Context(), bundle.TokenRequest{}); !errors.As(err, &e) || e.Code != "no-embedded-provider" {
		t.Errorf("token: %v", err)
	}
	if _, err := h.Control.Users(t.Context()); !errors.As(err, &e) || e.Code != "no-embedded-provider" {
		t.Errorf("users: %v", err)
	}
	if s, err := h.Control.Status(t.Context()); err != nil || s.Endpoints.OAuth != "" {
		t.Errorf("status: %+v, %v", s, err)
	}
}
