package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	enrolmentgateway "github.com/coaphub/coaphub/enrolment-gateway"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// manufacturer makes a CA and says where its certificate is.
func manufacturer(t *testing.T) (ca tls.Certificate, file string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "Lamps Ltd"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if ca.Leaf, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	ca.Certificate, ca.PrivateKey = [][]byte{der}, key
	file = filepath.Join(t.TempDir(), "factory-ca.pem")
	if err := os.WriteFile(file, certsPEM(ca.Leaf), 0o600); err != nil {
		t.Fatal(err)
	}
	return ca, file
}

// factoryMade is a device as it leaves the factory: the arguments that show its certificate.
func factoryMade(t *testing.T, ca tls.Certificate, id string) []string {
	t.Helper()
	chain, key, err := device.Issue(ca, id)
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	cert, secret := filepath.Join(dir, "f.pem"), filepath.Join(dir, "f.key")
	for file, text := range map[string][]byte{cert: chain, secret: key} {
		if err := os.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return []string{"--cert", cert, "--key", secret}
}

// rootFile has the hub's root for devices.
func rootFile(t *testing.T, h *hubtest.Hub) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, []byte(runs(t, "ca", "root", "--data", h.Data).out), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

func agents(t *testing.T, args ...string) result {
	t.Helper()
	return runs(t, append([]string{"agent", "enroll"}, args...)...)
}

// pairIn is what any program finds in an identity's folder.
func pairIn(t *testing.T, dir string) *tls.Certificate {
	t.Helper()
	cfg, err := device.TLSFiles(filepath.Join(dir, "ca.pem"), filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem"), "")
	if err != nil {
		t.Fatalf("%s: %v", dir, err)
	}
	return &cfg.Certificates[0]
}

// A device gets its certificate in each way that there is, over DTLS and TLS, by the command line that the operator was shown for a
// token, and comes in with it.
func TestAgentEnrolls(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { return runs(t, append(args, "--data", h.Data)...) }
	factory, caFile := manufacturer(t)
	if r := on("enroll", "group", "add", "lamps", "--ca", caFile); r.code != exitOK {
		t.Fatal(r)
	}
	root := rootFile(t, h)
	tcp := strings.Replace(h.Endpoints.Enrolment, "coaps:", "coaps+tcp:", 1)
	shown := func() []string {
		out := on("enroll", "token", "add", "--device-id", lamp).out
		found := regexp.MustCompile(`(?m)^  coaphub agent enroll (.*) --out DIR$`).FindStringSubmatch(out)
		if found == nil {
			t.Fatalf("token add printed no command line: %q", out)
		}
		return strings.Fields(found[1])
	}
	identity, key := h.PSK(t, lamp)
	for _, c := range []struct {
		name string
		args []string
		id   string
	}{
		{"token", shown(), lamp},
		{"token, TLS", append(shown(), "--server", tcp), lamp},
		{"factory", append(factoryMade(t, factory, fan), "--server", h.Endpoints.Enrolment, "--ca", root), fan},
		{"factory, TLS", append(factoryMade(t, factory, heater), "--server", tcp, "--ca-sha256", colons(t, root)), heater},
		{"pre-shared key", []string{"--psk-identity", identity, "--psk", string(key), "--server", h.Endpoints.Enrolment}, lamp},
	} {
		dir := filepath.Join(t.TempDir(), "device")
		args := append(c.args, "--out", dir)
		agents(t, args...).want(t, exitOK, `^wrote cert.pem, key.pem and ca.pem: \S+ has a certificate of device `+c.id+` until `, "^$")
		leaf := pairIn(t, dir).Leaf
		again := as[struct {
			DeviceID, Serial string
			Issued           bool
		}](t, agents(t, append(args, "--json")...))
		if again.DeviceID != c.id || again.Serial != hub.SerialOf(leaf.SerialNumber) || again.Issued {
			t.Errorf("%s: the same command once more: %+v", c.name, again)
		}
		for file, want := range map[string]os.FileMode{"cert.pem": 0o644, "key.pem": 0o600, "ca.pem": 0o644} {
			info, err := os.Stat(filepath.Join(dir, file))
			if err != nil || info.Mode().Perm() != want {
				t.Errorf("%s: %s: %v, %v, want %o", c.name, file, info, err, want)
			}
		}
		if ca, err := os.ReadFile(filepath.Join(dir, "ca.pem")); err != nil || bytes.Count(ca, []byte("BEGIN CERT")) != 2 {
			t.Errorf("%s: ca.pem has %d certificates, %v", c.name, bytes.Count(ca, []byte("BEGIN CERT")), err)
		}
		if c.name == "token" {
			runs(t, "simulate", "--device-id", c.id, "--cert", dir, "--code", h.Code(t, c.id), "--server", h.Endpoints.CoAPSTCP, "--duration", "2s").
				want(t, exitOK, "^device "+c.id+" is online", "^$")
		}
	}
}

const heater = "d0000000-0000-4000-8000-00000000000e"

// colons is a certificate's fingerprint as openssl x509 -fingerprint -sha256 writes it.
func colons(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	sum := sha256.Sum256(block.Bytes)
	return strings.ReplaceAll(strings.ToUpper(fmt.Sprintf("% x", sum)), " ", ":")
}

// A device renews what it enrolled with, or was onboarded with, under that and for a new key; not before it is time.
func TestAgentRenews(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	for _, server := range []string{h.Endpoints.Enrolment, strings.Replace(h.Endpoints.Enrolment, "coaps:", "coaps+tcp:", 1)} {
		dir := filepath.Join(t.TempDir(), "device")
		renew := []string{"--server", server, "--out", dir, "--renew"}
		agents(t, renew...).want(t, exitFailure, "^$", "there is no certificate in .* to renew")
		runs(t, "ca", "issue", "--device-id", lamp, "--out", dir, "--data", h.Data).want(t, exitOK, "wrote", "^$")
		agents(t, append(renew, "--before", "30d")...).want(t, exitOK, "^nothing to do: .* device "+lamp+" until", "^$")
		before := pairIn(t, dir)
		for range 2 { // plain files, then links
			agents(t, append(renew, "--before", "366d")...).want(t, exitOK, "^wrote .* device "+lamp+" until", "^$")
			now := pairIn(t, dir)
			if now.Leaf.SerialNumber.Cmp(before.Leaf.SerialNumber) == 0 || now.Leaf.PublicKey.(*ecdsa.PublicKey).Equal(before.Leaf.PublicKey) {
				t.Error("the certificate, or its key, is the one before")
			}
			before = now
		}
		if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 2 { // the link, and what it leads to
			t.Errorf("the folder has %v, %v", left, err)
		}
		// A revoked one is worth nothing, and neither is one that has ended.
		runs(t, "certs", "revoke", "--device-id", lamp, "--data", h.Data).want(t, exitOK, "", "^$")
		agents(t, renew...).want(t, exitFailure, "^$", "take this certificate.*coaphub status --refused")
		runs(t, "ca", "issue", "--device-id", lamp, "--out", dir, "--validity", "1s", "--data", h.Data).want(t, exitOK, "wrote", "^$")
		for end := pairIn(t, dir).Leaf.NotAfter; !time.Now().After(end); {
			<-time.After(50 * time.Millisecond)
		}
		agents(t, renew...).want(t, exitFailure, "^$", "the certificate in .* ended on .*; enrol without --renew")
	}
}

// A device that renews while the hub's root is rolled over goes on when the former root is gone.
func TestAgentFollowsTheRoot(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	dir := filepath.Join(t.TempDir(), "device")
	renew := []string{"--server", h.Endpoints.Enrolment, "--out", dir, "--renew"}
	runs(t, "ca", "issue", "--device-id", lamp, "--out", dir, "--data", h.Data).want(t, exitOK, "wrote", "^$")
	for _, roll := range []string{"--root", "--finish"} {
		runs(t, "ca", "roll", roll, "--data", h.Data).want(t, exitOK, "", "")
		agents(t, renew...).want(t, exitOK, "^wrote .* device "+lamp+" until", "^$")
	}
	now := pairIn(t, dir)
	if root, err := os.ReadFile(rootFile(t, h)); err != nil {
		t.Fatal(err)
	} else if _, err := now.Leaf.Verify(x509.VerifyOptions{Roots: poolOf(t, root), Intermediates: poolOf(t, certsPEM(parse(t, now.Certificate[1]))), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Errorf("its certificate does not lead to the new root: %v", err)
	}
}

func poolOf(t *testing.T, text []byte) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(text) {
		t.Fatalf("%q has no certificate", text)
	}
	return pool
}

func parse(t *testing.T, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// A device that somebody has to allow asks until its time is over, and goes on with the same key when it is started again.
func TestAgentWaitsForAPerson(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	factory, caFile := manufacturer(t)
	runs(t, "enroll", "group", "add", "lamps", "--ca", caFile, "--approval", "--data", h.Data).want(t, exitOK, "by a person", "^$")
	dir := filepath.Join(t.TempDir(), "device")
	args := append(factoryMade(t, factory, lamp), "--server", h.Endpoints.Enrolment, "--ca", rootFile(t, h), "--out", dir)
	// It says that it waits, for whom and for how long, and is stopped then.
	stopped, cancel := context.WithCancel(t.Context())
	defer cancel()
	var out bytes.Buffer
	errs := &stopsAt{text: "asking again in 1m0s\n", stop: cancel}
	code := execute(stopped, append([]string{"agent", "enroll"}, args...), process{nil, &out, errs, nil})
	if said := regexp.MustCompile(`^somebody has to allow this device.*coaphub enroll list shows it as factory certificate \S+ of Lamps Ltd ` +
		`\[enrolment-waiting\]; asking again in 1m0s\ncoaphub: stopped; the same command goes on`); code != exitFailure || !said.MatchString(errs.b.String()) {
		t.Errorf("stopped by a signal it ends with %d, %q", code, errs.b.String())
	}
	key, err := os.ReadFile(filepath.Join(dir, fileNext))
	if err != nil {
		t.Fatal(err)
	}
	runs(t, "enroll", "approve", lamp, "--data", h.Data).want(t, exitOK, "allowed", "^$")
	agents(t, args...).want(t, exitOK, "^wrote", "^$")
	if now, err := os.ReadFile(filepath.Join(dir, "key.pem")); err != nil || !bytes.Equal(now, key) {
		t.Errorf("the key is another one, %v", err)
	}
	runs(t, "enroll", "refuse", lamp, "--data", h.Data).want(t, exitOK, "refused", "^$")
	agents(t, append(args, "--out", filepath.Join(t.TempDir(), "other"))...).want(t, exitDenied, "^$", `enrolment-refused`)
}

// stopsAt takes what a command says, and stops it when it has said a text.
type stopsAt struct {
	text string
	stop func()
	b    bytes.Buffer
}

func (s *stopsAt) Write(p []byte) (int, error) {
	s.b.Write(p)
	if strings.Contains(s.b.String(), s.text) {
		s.stop()
	}
	return len(p), nil
}

// doorTo is an enrolment gateway that shows a certificate and asks an authority.
func doorTo(t *testing.T, cert tls.Certificate, authority enrolmentgateway.Authority) (port string) {
	t.Helper()
	secure, packets, err := coap.Listen(t.Context(), "127.0.0.1:0", true, true)
	if err != nil {
		t.Fatal(err)
	}
	g, err := enrolmentgateway.New(enrolmentgateway.Default(), enrolmentgateway.Deps{
		Authority: authority, Certificate: func() (*tls.Certificate, error) { return &cert, nil }, Refused: func(net.Addr, string) {},
		EngineMetrics: coap.NewMetrics(nil), CoAP: secure, DTLS: packets,
	}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- g.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	_, port, err = net.SplitHostPort(secure.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}

// busy is an authority that has no time at first, and counts.
type busy struct {
	enrolmentgateway.Authority // nil: what is not asked for here
	root                       *x509.Certificate
	asked                      atomic.Int32
	answer                     func(n int32, csr []byte) (hub.Enrolled, error)
}

func (b *busy) Anchors() []*x509.Certificate { return []*x509.Certificate{b.root} }

func (b *busy) Enrol(_ context.Context, _ hub.EnrolmentProof, csr []byte, _ bool) (hub.Enrolled, error) {
	return b.answer(b.asked.Add(1), csr)
}

// server makes a certificate for a host, or without one a device's, as identity certificates are for servers, too.
func server(t *testing.T, ca tls.Certificate, hosts ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "uuid:" + lamp}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	for _, h := range hosts {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.ParseIP(h))
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.Leaf, key.Public(), ca.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// The hub says when to come again, and the agent does with the same request; what it gets it looks at before it takes it.
func TestAgentComesAgainAndLooksAtWhatItGets(t *testing.T) {
	t.Parallel()
	ca, caFile := manufacturer(t)
	other, _ := manufacturer(t)
	issue := func(by tls.Certificate, key any) (hub.Enrolled, error) {
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
			SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "uuid:" + lamp}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}, by.Leaf, key, by.PrivateKey)
		if err != nil {
			return hub.Enrolled{}, err
		}
		leaf, err := x509.ParseCertificate(der)
		return hub.Enrolled{Device: lamp, Serial: "3", Chain: []*x509.Certificate{leaf}}, err
	}
	keyOf := func(csr []byte) any {
		block, _ := pem.Decode(csr)
		req, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			t.Error(err)
		}
		return req.PublicKey
	}
	var asked []byte
	for name, c := range map[string]struct {
		answer   func(n int32, csr []byte) (hub.Enrolled, error)
		code     int
		out, err string
	}{
		"later": {func(n int32, csr []byte) (hub.Enrolled, error) {
			if n > 1 && !bytes.Equal(asked, csr) {
				t.Error("it comes again with another request")
			}
			if asked = csr; n < 3 {
				return hub.Enrolled{}, &hub.Error{Kind: hub.Exhausted, Code: "enrolments-busy", Text: "too many", RetryAfter: time.Second}
			}
			return issue(ca, keyOf(csr))
		}, exitOK, "^wrote", `^(too many \[enrolments-busy\]; asking again in 1s\n){2}$`},
		"another key": {func(int32, []byte) (hub.Enrolled, error) {
			return issue(ca, ca.PrivateKey.(*ecdsa.PrivateKey).Public())
		}, exitFailure, "^$", "is of another key"},
		"another CA": {func(_ int32, csr []byte) (hub.Enrolled, error) { return issue(other, keyOf(csr)) }, exitFailure, "^$", "unknown authority|ECDSA verification failure"},
	} {
		b := &busy{root: ca.Leaf, answer: c.answer}
		port := doorTo(t, server(t, ca, "127.0.0.1"), b)
		dir := filepath.Join(t.TempDir(), "device")
		r := agents(t, "--server", "coaps://127.0.0.1:"+port, "--ca", caFile, "--token", "t", "--out", dir)
		if r.want(t, c.code, c.out, c.err); c.code != exitOK {
			if _, err := os.Stat(filepath.Join(dir, "cert.pem")); err == nil {
				t.Errorf("%s: there is a certificate", name)
			}
		}
	}
}

// Nobody but the hub hears the token: not who has a certificate of another CA, and not a device with one of the hub's.
func TestAgentTrustsOnlyTheHub(t *testing.T) {
	t.Parallel()
	ca, caFile := manufacturer(t)
	_, otherFile := manufacturer(t)
	b := &busy{root: ca.Leaf, answer: func(int32, []byte) (hub.Enrolled, error) {
		t.Error("the token was sent")
		return hub.Enrolled{}, &hub.Error{Kind: hub.Denied}
	}}
	hubs, devices := doorTo(t, server(t, ca, "127.0.0.1"), b), doorTo(t, server(t, ca), b)
	for _, scheme := range []string{"coaps", "coaps+tcp"} {
		for _, c := range []struct{ port, trust, file, err string }{
			{hubs, "--ca", otherFile, "verify the hub's certificate"},
			{hubs, "--ca-sha256", strings.Repeat("0", 64), "is not the one of --ca-sha256"},
			{devices, "--ca", caFile, "is for another address"},
			{devices, "--ca-sha256", colons(t, caFile), "is for another address"},
		} {
			agents(t, "--server", scheme+"://127.0.0.1:"+c.port, c.trust, c.file, "--token", "t", "--out", t.TempDir()).want(t, exitFailure, "^$", c.err)
		}
	}
	agents(t, "--server", "coaps://127.0.0.1:1", "--ca", caFile, "--token", "t", "--out", t.TempDir()).want(t, exitLater, "^$", "cannot be reached")
}

// Wherever a replacement stops, the folder has a certificate and its key, and the next one goes through.
func TestIdentityFolderIsNeverHalf(t *testing.T) {
	t.Parallel()
	ca, _ := manufacturer(t)
	next := func() (*x509.Certificate, *ecdsa.PrivateKey) {
		chain, text, err := device.Issue(ca, lamp)
		if err != nil {
			t.Fatal(err)
		}
		key, err := parseKey(text)
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(chain)
		leaf, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return leaf, key
	}
	for stop := 0; ; stop++ {
		dir := t.TempDir()
		chain, key, err := device.Issue(ca, lamp)
		if err != nil {
			t.Fatal(err)
		}
		if err := writeIdentity(dir, bundle.Identity{Chain: string(chain), Key: string(key), CA: string(certsPEM(ca.Leaf))}); err != nil {
			t.Fatal(err)
		}
		id, err := openIdentity(dir)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := openIdentity(dir); err == nil {
			t.Error("two have the folder at a time")
		}
		done := false
		for range 2 { // plain files are replaced, then links
			before := pairIn(t, dir).Leaf
			leaf, key := next()
			text, err := keyPEM(key)
			if err != nil {
				t.Fatal(err)
			}
			if err := writeFile(id.path(fileNext), text, 0o600); err != nil {
				t.Fatal(err)
			}
			steps, err := id.steps([]*x509.Certificate{leaf}, key, []*x509.Certificate{ca.Leaf})
			if err != nil {
				t.Fatal(err)
			}
			done = stop >= len(steps)
			for _, step := range steps[:min(stop, len(steps))] {
				if err := step(); err != nil {
					t.Fatal(err)
				}
			}
			if now := pairIn(t, dir).Leaf; !now.Equal(before) && !now.Equal(leaf) {
				t.Errorf("after %d steps it has neither", stop)
			}
			have, err := id.current()
			if err != nil {
				t.Fatal(err)
			}
			if next, err := id.nextKey(have); err != nil || next.(*ecdsa.PrivateKey).PublicKey.Equal(have.Leaf.PublicKey) {
				t.Errorf("after %d steps the next certificate would be for the same key, %v", stop, err)
			}
			leaf, key = next()
			if err := id.install([]*x509.Certificate{leaf}, key, []*x509.Certificate{ca.Leaf}); err != nil {
				t.Fatal(err)
			}
			if now := pairIn(t, dir).Leaf; !now.Equal(leaf) {
				t.Errorf("after %d steps, and all of the next: another certificate", stop)
			}
			if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) != 2 {
				t.Errorf("after %d steps, and all of the next, the folder has %v", stop, left)
			}
		}
		id.close()
		if done {
			break
		}
	}
}

// A hub that does not answer is waited for no longer than was said.
func TestAgentGivesUp(t *testing.T) {
	t.Parallel()
	silent, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = silent.Close() }()
	_, caFile := manufacturer(t)
	agents(t, "--server", "coaps+tcp://"+silent.Addr().String(), "--ca", caFile, "--token", "x", "--out", filepath.Join(t.TempDir(), "device"), "--timeout", "1s").
		want(t, exitLater, "^$", "it took too long, and the same command goes on")
}
