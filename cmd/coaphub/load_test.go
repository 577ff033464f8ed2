package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"math/big"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/test/hubtest"
	"github.com/coaphub/coaphub/test/issuer"
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

// The devices are spread over the owners, and each phase is of all of them; accounts of an earlier run are used again.
func TestLoadOwners(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	for run := range 2 {
		r := runsWith(t, "", []string{"COAPHUB_DATA=" + h.Data}, "load", "--owners", "3", "--devices", "4", "--for", "200ms", "--listeners", "2", "--json",
			"--phases", "notify,notify-open,burst,commands,device-reads,twin-reads,list,fan-out")
		measured(t, r, 10)
		if start := as[[]load.Result](t, r)[0]; (start.Missing != "") != (run == 0) { // making accounts takes memory
			t.Errorf("run %d: %+v", run, start)
		}
	}
	for owner, want := range map[string]int{"": 4, "load-2": 2, "load-3": 2} { // of two runs
		c, err := client.New(client.Config{Server: h.HTTP, Token: client.Static(h.TokenOf(t, owner))})
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, err := range c.ListDevices(t.Context(), client.DeviceQuery{}) {
			if err != nil {
				t.Fatal(err)
			}
			n++
		}
		if c.Close(); n != want {
			t.Errorf("%q has %d devices, want %d", owner, n, want)
		}
	}
}

// measured expects that so many phases have done something, and that nothing failed.
func measured(t *testing.T, r result, phases int) {
	t.Helper()
	all := as[[]load.Result](t, r)
	if len(all) != phases {
		t.Errorf("%d phases were measured, want %d", len(all), phases)
	}
	for _, r := range all {
		if r.Phase != "start" && (r.Failed > 0 || r.Error != "" || r.Missing != "" || r.Ops == 0) {
			t.Errorf("%s: %d done, %d failed: %s %s", r.Phase, r.Ops, r.Failed, r.Error, r.Missing)
		}
	}
}

// A hub that is only known by its API, with its own authorities for tokens and for devices, is measured as the one of a data
// folder is, but for what only a process on this machine can say.
func TestLoadElsewhere(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	file := func(name, text string) string {
		t.Helper()
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return name
	}
	caCert, caKey := authority(t)
	ca, key, secret := file("ca.pem", caCert), file("ca.key", caKey), file("secret", issuer.ClientSecret)
	op := issuer.Start(t)
	list := func(v any) string {
		b, err := json.Marshal([]any{v})
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.plainAddress=127.0.0.1:0", "coapGateway.api.coap.tls.caPool="+list(ca),
		"authorization.issuers="+list(map[string]any{"authority": op.URL(), "audience": []string{issuer.Audience}}),
		"coapGateway.api.coap.authorization.providers="+list(map[string]any{
			"name": "op", "authority": op.URL(), "clientID": issuer.ClientID, "clientSecretFile": secret, "redirectURL": issuer.RedirectURL,
		}),
	))
	codes := func(owners ...string) string {
		var text strings.Builder
		for i := range 4 {
			text.WriteString(op.Code(map[string]any{"sub": owners[i%len(owners)]}) + "\n")
		}
		return file("codes", text.String())
	}
	tokens := file("tokens", op.Mint(map[string]any{"sub": "alice"})+"\n"+op.Mint(map[string]any{"sub": "bob"})+"\n")
	args := func(more ...string) []string {
		return append([]string{"load", "--server", h.HTTP, "--devices", "4", "--for", "200ms", "--json", "--phases", "sign-ins,notify,commands,list"}, more...)
	}
	certificates := []string{"--device-ca", ca, "--device-ca-key", key}
	for _, at := range []string{"", h.Endpoints.CoAPS, h.Endpoints.CoAPTCP} { // the first is what the hub says
		more := append([]string{"--token-file", tokens, "--code-file", codes("alice", "bob"), "--coap", at, "--provider", "op"}, certificates...)
		r := runsWith(t, "", nil, args(more...)...)
		measured(t, r, 6)
		for _, r := range as[[]load.Result](t, r) {
			if r.RSS != nil || r.HubCPU != nil || r.OwnCPU != nil || r.Phase == "start" && r.Missing == "" {
				t.Errorf("%s: the hub's process was measured without --pid", r.Phase)
			}
		}
	}
	own := append([]string{"--client-id", issuer.ClientID, "--client-secret-file", secret, "--code-file", codes(issuer.ClientID)}, certificates...)
	measured(t, runsWith(t, "", nil, args(own...)...), 6)

	token := []string{"COAPHUB_TOKEN=" + op.Mint(nil)}
	for _, c := range []struct{ args, want string }{
		{strings.Join(certificates, " "), "--code-file"},
		{strings.Join(certificates, " ") + " --code-file " + file("three", "a b c"), "there are 3 codes"},
		{"--code-file " + codes("alice"), "--device-ca"},
		{"--code-file " + codes("alice") + " --scheme coap", "the hub says coaps+tcp://"},
		{"--code-file " + codes("alice") + " --owners 2", "there are 1 tokens"},
		{"--coap mqtt://127.0.0.1:1", "--coap: "},
		{"--coap coap://192.0.2.1", "is not this machine's loopback"},
		{"--server http://192.0.2.1", "is not this machine's loopback"},
		{"--psk --scheme coaps", "--psk is for"},
		{"--device-ca " + ca, "go together"},
		{"--client-id x", "go together"},
		{"--client-id x --client-secret-file " + secret, "a token for the applications"},
		{"--client-id x --client-secret-file " + secret + " --token x", "in place of"},
	} {
		r := runsWith(t, "", token, args(strings.Fields(c.args)...)...)
		if r.code == exitOK || !strings.Contains(r.err, c.want) || r.out != "" {
			t.Errorf("%s: ended with %d, printed %q and %q, want %q", c.args, r.code, r.out, r.err, c.want)
		}
	}
}

// There is a code for each device, or for each owner.
func TestCodes(t *testing.T) {
	t.Parallel()
	l := loadTarget{codes: filepath.Join(t.TempDir(), "codes")}
	for text, want := range map[string]string{"a b c d": "abcd", "a\nb\n": "abab", "a b c": ""} {
		if err := os.WriteFile(l.codes, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got := ""
		code, err := l.readCodes(4, 2)
		for i := 0; err == nil && i < 4; i++ {
			got += code(i%2, i)
		}
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// authority makes a CA and its key, PEM.
func authority(t *testing.T) (cert, key string) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	about := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "devices"}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, about, about, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	text, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block := func(kind string, b []byte) string {
		return string(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}))
	}
	return block("CERTIFICATE", der), block("PRIVATE KEY", text)
}

// Rounds repeat all but the setup, in turns; the table has a row for each.
func TestLoadRounds(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	r := runsWith(t, "", []string{"COAPHUB_DATA=" + h.Data}, "load", "--devices", "2", "--for", "50ms", "--phases", "list,twin-reads", "--rounds", "2")
	var rows []string
	for line := range strings.Lines(r.out) {
		if strings.Contains(line, "the figures may be") { // hub and load are one process here
			continue
		}
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
		"--owners 0":                   "--owners must be",
		"--owners 101":                 "--owners must not be",
		"--code-file codes":            "belong to --server",
		"--token x":                    "belong to --server",
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
}

// A host is on loopback if all its addresses are, whatever its name.
func TestLoopback(t *testing.T) {
	t.Parallel()
	hosts := map[string][]string{
		"127.0.0.1": {"127.0.0.1"}, "::1": {"::1"}, "192.0.2.1": {"192.0.2.1"}, "localhost": {"127.0.0.1", "::1"},
		"mapped.example": {"::ffff:127.0.0.1"}, "hub.example": {"192.0.2.1"}, "both.example": {"127.0.0.1", "192.0.2.1"}, "none.example": {},
	}
	lookup := func(_ context.Context, _, host string) (ips []netip.Addr, err error) {
		texts, ok := hosts[host]
		if !ok {
			return nil, &net.DNSError{Name: host, IsNotFound: true}
		}
		for _, text := range texts {
			ips = append(ips, netip.MustParseAddr(text))
		}
		return ips, nil
	}
	for at, want := range map[string]bool{
		"coaps://127.0.0.1:5684": true, "coaps+tcp://[::1]:5684": true, "http://localhost:8080": true, "http://mapped.example": true,
		"coaps://192.0.2.1:5684": false, "http://hub.example": false, "http://both.example": false, "http://none.example": false,
		"http://unknown.example": false, "": false, "::": false,
	} {
		if got := loopback(t.Context(), lookup, at); got != want {
			t.Errorf("loopback(%q) = %t", at, got)
		}
	}
}
