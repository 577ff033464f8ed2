// Package hubtest is a whole hub in one line, for tests: in process, or in one of its own, on loopback ports of its own, with a
// data folder of its own, gone at the end of the test.
//
// It must not know the hub's insides: what it gives is addresses, codes, certificates and tokens, as an operator gets them.
package hubtest

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus/bustest"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/test/device"
)

// Hub is a running hub. Its fields change at Restart.
type Hub struct {
	ID        string
	Data      string // the data folder
	CoAPS     string // host:port of CoAP over TLS
	CoAPSUDP  string // host:port of CoAP over DTLS
	CoAPPlain string // host:port of CoAP over TCP; empty unless configured
	// CoAPPlainUDP is host:port of CoAP over UDP; empty unless configured.
	CoAPPlainUDP string
	HTTP         string // base URL of the API
	GRPC         string // host:port
	Admin        string // base URL of probes and metrics
	Issuer       string // of the embedded provider
	Endpoints    bundle.Endpoints
	Control      *bundle.Control

	env   []string
	apart bool
	log   *log
	stop  func() error
}

// Option changes a hub before it starts.
type Option func(*Hub)

// WithConfig sets keys of the configuration, each as KEY=VALUE with the key's full path, as an environment variable would:
// coapGateway.api.coap.plainAddress=127.0.0.1:0.
func WithConfig(settings ...string) Option {
	return func(h *Hub) {
		for _, s := range settings {
			key, value, _ := strings.Cut(s, "=")
			h.env = append(h.env, conf.Variable(bundle.EnvPrefix, key)+"="+value)
		}
	}
}

// WithData starts the hub on a data folder that is there already.
func WithData(path string) Option { return func(h *Hub) { h.Data = path } }

// Apart runs the hub in a process of its own, so that what its metrics say of the process is of the hub alone, and not of the
// tests and of other hubs. It is for tests whose TestMain calls Main.
func Apart() Option { return func(h *Hub) { h.apart = true } }

// dataVariable tells a process that it is to be a hub apart, with this data folder.
const dataVariable = "HUBTEST_DATA"

// Main is a hub apart, in a process that Start made for one; elsewhere it does nothing. Before m.Run there is nothing else in
// the process.
func Main() {
	data, be := os.LookupEnv(dataVariable)
	if !be {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() { // ends with the process that has the other end of the pipe, or when that one closes it
		defer cancel()
		_, _ = io.Copy(io.Discard, os.Stdin)
	}()
	cfg, _, err := bundle.LoadConfig("", os.Environ())
	if err == nil {
		cfg.Data = data
		err = bundle.Run(ctx, cfg, bundle.Options{
			Log: os.Stderr, Version: "test", Started: func(s bundle.Status) { _ = json.NewEncoder(os.Stdout).Encode(s) },
		})
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

// startApart starts the hub's own process.
func (h *Hub) startApart(t testing.TB) {
	t.Helper()
	cmd := exec.CommandContext(context.Background(), os.Args[0])
	cmd.Env = append(slices.Clone(h.env), dataVariable+"="+h.Data)
	cmd.Stderr = h.log
	in, err := cmd.StdinPipe()
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
	h.stop = func() error { _ = in.Close(); return cmd.Wait() }
	late := time.AfterFunc(30*time.Second, func() { _ = cmd.Process.Kill() })
	defer late.Stop()
	var s bundle.Status
	if err := json.NewDecoder(out).Decode(&s); err != nil {
		t.Fatalf("the hub did not start: %v", err)
	}
	h.at(t, s)
}

// Start starts a hub and stops it when the test ends. A hub that does not start or stop fails the test; the hub's log is
// shown when the test failed.
func Start(t testing.TB, options ...Option) *Hub {
	t.Helper()
	h := &Hub{Data: filepath.Join(t.TempDir(), "data"), log: &log{}}
	WithConfig(
		"externalAddress=127.0.0.1", "coapGateway.api.coap.address=127.0.0.1:0", "grpcGateway.api.http.address=127.0.0.1:0",
		"grpcGateway.api.grpc.address=127.0.0.1:0", "admin.api.http.address=127.0.0.1:0", "log.level=debug", "store.minFree=0",
		"enrolmentGateway.api.coap.address=127.0.0.1:0", "enrolmentGateway.api.http.address=127.0.0.1:0",
	)(h)
	if os.Getenv("COAPHUB_TEST_WIRING") == "bus" {
		WithConfig("bus.urls=" + bustest.Server(t, nil).ClientURL())(h)
	}
	for _, o := range options {
		o(h)
	}
	t.Cleanup(func() {
		h.Stop(t)
		if t.Failed() {
			t.Logf("the hub's log:\n%s", h.log)
		}
	})
	h.start(t)
	return h
}

// Restart stops the hub and starts it again on the same data folder.
func (h *Hub) Restart(t testing.TB) {
	t.Helper()
	h.Stop(t)
	h.start(t)
}

// Stop stops the hub in order; a stopped hub stays so.
func (h *Hub) Stop(t testing.TB) {
	t.Helper()
	if h.stop == nil {
		return
	}
	stop := h.stop
	h.stop = nil
	if err := stop(); err != nil {
		t.Errorf("the hub did not stop well: %v", err)
	}
}

func (h *Hub) start(t testing.TB) {
	t.Helper()
	cfg, warnings, err := bundle.LoadConfig("", h.env)
	if err != nil {
		t.Fatalf("the hub's configuration: %v", err)
	}
	for _, w := range warnings { // a slip in a test's key must not pass
		t.Fatalf("the hub's configuration: %s", w)
	}
	if h.apart {
		h.startApart(t)
		return
	}
	cfg.Data = h.Data
	for deadline := time.Now().Add(5 * time.Second); ; {
		ctx, cancel := context.WithCancel(context.Background())
		started, ended := make(chan bundle.Status, 1), make(chan error, 1)
		go func() { // ends with cancel; stop waits for it
			ended <- bundle.Run(ctx, cfg, bundle.Options{Log: h.log, Version: "test", Started: func(s bundle.Status) { started <- s }})
		}()
		h.stop = func() error { cancel(); return <-ended }
		select {
		case s := <-started:
			h.at(t, s)
			return
		case err := <-ended:
			cancel()
			h.stop = nil
			// A process that another test is starting has all that this one had open, the lock of a data folder too, until its
			// own program runs.
			var e *hub.Error
			if errors.As(err, &e) && e.Code == "data-folder-in-use" && time.Now().Before(deadline) {
				<-time.After(10 * time.Millisecond)
				continue
			}
			t.Fatalf("the hub did not start: %v", err)
		case <-time.After(2 * time.Minute): // others may have all of the machine
			t.Fatal("the hub is not ready after two minutes")
		}
	}
}

func (h *Hub) at(t testing.TB, s bundle.Status) {
	t.Helper()
	h.ID, h.Endpoints = s.HubID, s.Endpoints
	h.CoAPS = strings.TrimPrefix(s.Endpoints.CoAPSTCP, "coaps+tcp://")
	h.CoAPSUDP = strings.TrimPrefix(s.Endpoints.CoAPS, "coaps://")
	h.CoAPPlainUDP = strings.TrimPrefix(s.Endpoints.CoAP, "coap://")
	h.CoAPPlain = strings.TrimPrefix(s.Endpoints.CoAPTCP, "coap+tcp://")
	h.HTTP, h.GRPC, h.Admin, h.Issuer = s.Endpoints.HTTP, s.Endpoints.GRPC, s.Endpoints.Admin, s.Issuer
	c, err := bundle.Dial(h.Data)
	if err != nil {
		t.Fatal(err)
	}
	h.Control = c
}

// Onboarding is what a device needs to sign up.
type Onboarding struct {
	bundle.Onboarding
	Code string      // the authorization code
	TLS  *tls.Config // the device's certificate and the hub's CA, for the hub's host
}

// Onboard makes a code and an identity certificate for the device, for the first administrator or the owner that is named.
func (h *Hub) Onboard(t testing.TB, deviceID string, owner ...string) Onboarding {
	t.Helper()
	q := bundle.OnboardRequest{DeviceID: deviceID, Certificate: true}
	if len(owner) > 0 {
		q.Owner = owner[0]
	}
	o, err := h.Control.Onboard(t.Context(), q)
	if err != nil {
		t.Fatalf("onboard %s: %v", deviceID, err)
	}
	cert, err := tls.X509KeyPair([]byte(o.Identity.Chain), []byte(o.Identity.Key))
	if err != nil {
		t.Fatalf("onboard %s: %v", deviceID, err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(o.CA)) {
		t.Fatalf("onboard %s: no CA", deviceID)
	}
	return Onboarding{o, o.AuthorizationCode, &tls.Config{
		Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: "127.0.0.1", MinVersion: tls.VersionTLS12,
	}}
}

// Device is a simulated device that lives over TLS until the test ends, or stop ends it, which may be called again.
func (h *Hub) Device(t testing.TB, deviceID, name string) (d *device.Device, stop func()) {
	t.Helper()
	o := h.Onboard(t, deviceID)
	d, err := device.New(device.Config{ID: deviceID, Name: name, HubAddr: h.Endpoints.CoAPSTCP, TLS: o.TLS})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { // ends with cancel
		defer close(ended)
		_ = d.Run(ctx, func(context.Context) (string, error) { return o.Code, nil })
	}()
	stop = func() { cancel(); <-ended }
	t.Cleanup(stop)
	return d, stop
}

// Code makes another authorization code for the device, for the first administrator or the owner that is named.
func (h *Hub) Code(t testing.TB, deviceID string, owner ...string) string {
	t.Helper()
	q := bundle.OnboardRequest{DeviceID: deviceID}
	if len(owner) > 0 {
		q.Owner = owner[0]
	}
	o, err := h.Control.Onboard(t.Context(), q)
	if err != nil {
		t.Fatalf("onboard %s: %v", deviceID, err)
	}
	return o.AuthorizationCode
}

// PSK makes a pre-shared key for the device.
func (h *Hub) PSK(t testing.TB, deviceID string) (identity string, key []byte) {
	t.Helper()
	o, err := h.Control.Onboard(t.Context(), bundle.OnboardRequest{DeviceID: deviceID, PSK: true})
	if err != nil {
		t.Fatalf("onboard %s: %v", deviceID, err)
	}
	return o.PSKIdentity, []byte(o.PSK)
}

// Token makes an access token of the first administrator; no scopes means all of them.
func (h *Hub) Token(t testing.TB, scopes ...string) string { return h.TokenOf(t, "", scopes...) }

// TokenOf makes an access token of an account.
func (h *Hub) TokenOf(t testing.TB, owner string, scopes ...string) string {
	t.Helper()
	tok, err := h.Control.Token(t.Context(), bundle.TokenRequest{Owner: owner, Scopes: scopes})
	if err != nil {
		t.Fatalf("token: %v", err)
	}
	return tok.AccessToken
}

// User makes an account with a password that need not be changed.
func (h *Hub) User(t testing.TB, name, password string, roles ...string) {
	t.Helper()
	if _, err := h.Control.AddUser(t.Context(), bundle.UserRequest{Name: name, Password: password, Roles: roles}); err != nil {
		t.Fatalf("account %s: %v", name, err)
	}
}

var csrfField = regexp.MustCompile(`name="csrf" value="([^"]+)"`)

// Approve signs an account in on the page that the device grant of a program shows (client.Prompt): a person with a browser.
func (h *Hub) Approve(t testing.TB, page, code, name, password string) {
	t.Helper()
	jar, err := cookiejar.New(nil)
	if err != nil {
		t.Fatalf("approve a login: %v", err)
	}
	browser := &http.Client{Jar: jar, Transport: &http.Transport{DisableKeepAlives: true}}
	ask := func(method string, form url.Values) string {
		req, err := http.NewRequestWithContext(t.Context(), method, page, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatalf("approve a login: %v", err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		resp, err := browser.Do(req)
		if err != nil {
			t.Fatalf("approve a login: %v", err)
		}
		defer func() { _ = resp.Body.Close() }()
		b, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusOK {
			t.Fatalf("approve a login: %s, %v: %s", resp.Status, err, b)
		}
		return string(b)
	}
	found := csrfField.FindStringSubmatch(ask(http.MethodGet, nil))
	if found == nil {
		t.Fatalf("%s has no form", page)
	}
	ask(http.MethodPost, url.Values{"csrf": {html.UnescapeString(found[1])}, "user_code": {code}, "username": {name}, "password": {password}})
}

// Log is what the hub logged so far.
func (h *Hub) Log() string { return h.log.String() }

// log keeps the newest part of a hub's log.
type log struct {
	mu sync.Mutex // guards b
	b  []byte
}

// maxLog bounds what a failed test shows; older lines go.
const maxLog = 256 << 10

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	if over := len(l.b) - maxLog; over > maxLog/4 { // now and then, not at each line
		_, rest, _ := bytes.Cut(l.b[over:], []byte("\n"))
		l.b = append(l.b[:0], rest...)
	}
	return len(p), nil
}

func (l *log) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}
