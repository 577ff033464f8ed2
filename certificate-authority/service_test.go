package certificateauthority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// owners is who owns what.
type owners map[hub.DeviceID]hub.Owner

func (o owners) Owner(_ context.Context, dev hub.DeviceID) (hub.Ownership, error) {
	if own, ok := o[dev]; ok {
		return hub.Ownership{Device: dev, Owner: own}, nil
	}
	return hub.Ownership{}, hub.NewError(hub.NotFound, "device-not-owned", "")
}

// refused is an owner in whose place the device is refused.
const refused hub.Owner = "device-removed"

func (o owners) Admits(_ context.Context, dev hub.DeviceID, _ []byte) error {
	if o[dev] == refused {
		return hub.NewError(hub.Denied, "device-removed", "")
	}
	return nil
}

// Denied refuses a certificate whose common name stands for refused, wherever it is in a chain.
func (o owners) Denied(_ hub.DeviceID, chain []*x509.Certificate) error {
	for _, c := range chain {
		if o[hub.DeviceID(c.Subject.CommonName)] == refused {
			return hub.NewError(hub.Denied, "ca-denied", "")
		}
	}
	return nil
}

// office is a Service over a store that can be restarted, with what it told.
type office struct {
	*Service
	t     *testing.T
	docs  *storetest.Memory
	own   owners
	mu    sync.Mutex
	ended []string
}

func newOffice(t *testing.T) *office {
	t.Helper()
	o := &office{t: t, docs: storetest.NewMemory(), own: owners{}}
	o.start(open(t, filepath.Join(t.TempDir(), "ca")))
	return o
}

func (o *office) start(a *Authority) {
	o.t.Helper()
	var err error
	o.Service, err = NewService(o.t.Context(), a, o.docs, o.own, "https://hub.example:8080", slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		o.t.Fatal(err)
	}
	o.Ended(func(serial string) {
		o.mu.Lock()
		defer o.mu.Unlock()
		o.ended = append(o.ended, serial)
	})
}

func newKey(t testing.TB) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func csrOf(t testing.TB, key crypto.Signer, tmpl x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
}

func named(name string) x509.CertificateRequest {
	return x509.CertificateRequest{Subject: pkix.Name{CommonName: name}}
}

// sign has a certificate made for the owner's device.
func (o *office) sign(owner hub.Owner, dev hub.DeviceID) (*x509.Certificate, error) {
	o.t.Helper()
	chain, err := o.Sign(o.t.Context(), owner, "user of "+string(owner), csrOf(o.t, newKey(o.t), named("uuid:"+string(dev))))
	if err != nil {
		return nil, err
	}
	return firstOf(o.t, chain), nil
}

func firstOf(t testing.TB, chain []byte) *x509.Certificate {
	t.Helper()
	block, _ := pem.Decode(chain)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func (o *office) list(f hub.CertificateFilter) (out []hub.Certificate) {
	o.t.Helper()
	for c, err := range o.Certificates(o.t.Context(), f) {
		if err != nil {
			o.t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

func wantCode(t *testing.T, what string, err error, kind hub.Kind, code string) {
	t.Helper()
	if got, _ := hub.Public(err); !hub.IsKind(err, kind) || got != code {
		t.Errorf("%s: %v (%s), want %v with code %s", what, err, got, kind, code)
	}
}

// A request gets what the profile says, whatever it asks for, and is in the ledger.
func TestSign(t *testing.T) {
	o := newOffice(t)
	o.own[testDev] = "alice"
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	_, edwards, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	greedy := x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "UUID:" + strings.ToUpper(string(testDev))}, DNSNames: []string{"hub.example"}, EmailAddresses: []string{"a@b.c"},
		IPAddresses: []net.IP{{127, 0, 0, 1}}, URIs: []*url.URL{{Scheme: "urn", Opaque: "x"}},
		ExtraExtensions: []pkix.Extension{
			{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}, // cA: true
			{Id: asn1.ObjectIdentifier{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}},          // keyCertSign, cRLSign
			{Id: asn1.ObjectIdentifier{1, 2, 3, 4}, Value: []byte{5, 0}},
		},
	}
	for name, c := range map[string]struct {
		key  crypto.Signer
		tmpl x509.CertificateRequest
		use  x509.KeyUsage
	}{
		"P-256":                    {newKey(t), named("uuid:" + string(testDev)), x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement},
		"P-384, the ID alone":      {p384, named(string(testDev)), x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement},
		"Ed25519":                  {edwards, named("uuid:" + string(testDev)), x509.KeyUsageDigitalSignature},
		"all that one can ask for": {newKey(t), greedy, x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement},
	} {
		chain, err := o.Sign(t.Context(), "alice", "sub", csrOf(t, c.key, c.tmpl))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		leaf := firstOf(t, chain)
		if leaf.Subject.String() != "CN=uuid:"+string(testDev) || leaf.IsCA || leaf.KeyUsage != c.use ||
			len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses)+len(leaf.URIs) > 0 ||
			!slices.Equal(leaf.CRLDistributionPoints, []string{"https://hub.example:8080" + ListsPath + o.Issuer()}) ||
			!slices.Equal(leaf.ExtKeyUsage, deviceUsage.ext) || len(leaf.UnknownExtKeyUsage) != 1 || !leaf.UnknownExtKeyUsage[0].Equal(OCFIdentity) {
			t.Errorf("%s: %s, CA %t, usages %b %v %v, names %v", name, leaf.Subject, leaf.IsCA, leaf.KeyUsage, leaf.ExtKeyUsage, leaf.UnknownExtKeyUsage, leaf.DNSNames)
		}
		for _, x := range leaf.Extensions {
			if x.Id.Equal(asn1.ObjectIdentifier{1, 2, 3, 4}) {
				t.Errorf("%s: an extension of the request is in the certificate", name)
			}
		}
		if lasts := time.Until(leaf.NotAfter); lasts < DeviceValidity-time.Minute || lasts > DeviceValidity {
			t.Errorf("%s: it lasts %v", name, lasts)
		}
		inter := x509.NewCertPool()
		inter.AppendCertsFromPEM(chain)
		if _, err := leaf.Verify(x509.VerifyOptions{Roots: o.a.DevicePool(), Intermediates: inter, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		got := o.list(hub.CertificateFilter{Owner: "alice", Serials: []string{hub.SerialOf(leaf.SerialNumber)}})
		if len(got) != 1 || got[0].Device != testDev || got[0].User != "sub" || got[0].How != hub.ByCSR || got[0].Issuer != o.Issuer() ||
			!got[0].NotAfter.Equal(leaf.NotAfter) || !strings.Contains(string(chain), got[0].PEM) || !got[0].Revoked.IsZero() {
			t.Errorf("%s: the ledger has %+v", name, got)
		}
	}
}

// What is no request for a device, or not the caller's to ask, gets nothing and leaves nothing.
func TestSignRefuses(t *testing.T) {
	o := newOffice(t)
	o.own[testDev] = "alice"
	key := newKey(t)
	weak, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	p224, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	good := csrOf(t, key, named("uuid:"+string(testDev)))
	block, _ := pem.Decode(good)
	forged := slices.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	two := pkix.Name{CommonName: "uuid:" + string(testDev), Organization: []string{"x"}}
	for name, c := range map[string]struct {
		owner hub.Owner
		csr   []byte
		kind  hub.Kind
		code  string
	}{
		"nothing":             {"alice", nil, hub.Invalid, "csr-invalid"},
		"no request":          {"alice", []byte("-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n"), hub.Invalid, "csr-invalid"},
		"a certificate":       {"alice", certPEM(o.a.signer(Device).issuing), hub.Invalid, "csr-invalid"},
		"two requests":        {"alice", slices.Concat(good, good), hub.Invalid, "csr-invalid"},
		"too much":            {"alice", append(slices.Clone(good), make([]byte, maxRequest)...), hub.TooLarge, "csr-too-large"},
		"a forged signature":  {"alice", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: forged}), hub.Invalid, "csr-signature"},
		"RSA":                 {"alice", csrOf(t, weak, named("uuid:"+string(testDev))), hub.Invalid, "csr-key"},
		"P-224":               {"alice", csrOf(t, p224, named("uuid:"+string(testDev))), hub.Invalid, "csr-key"},
		"no name":             {"alice", csrOf(t, key, named("")), hub.Invalid, "csr-name"},
		"another name":        {"alice", csrOf(t, key, named("uuid:lamp")), hub.Invalid, "csr-name"},
		"two names":           {"alice", csrOf(t, key, x509.CertificateRequest{Subject: two}), hub.Invalid, "csr-name"},
		"the hub":             {"alice", csrOf(t, key, named("uuid:"+testHub)), hub.Denied, "device-id-of-hub"},
		"a device of another": {"bob", good, hub.Denied, "device-owned-by-other"},
		"no owner":            {"", good, hub.Denied, "owner-missing"},
	} {
		chain, err := o.Sign(t.Context(), c.owner, "sub", c.csr)
		wantCode(t, name, err, c.kind, c.code)
		if len(chain) > 0 {
			t.Errorf("%s: there is a certificate", name)
		}
	}
	if n := len(o.list(hub.CertificateFilter{All: true})); n > 0 {
		t.Errorf("the ledger has %d certificates", n)
	}
}

// An ID that nobody owns is kept for whoever asks first, for a day, and for so many only.
func TestReservations(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		if _, err := o.sign("alice", testDev); err != nil {
			t.Fatal(err)
		}
		_, err := o.sign("bob", testDev)
		wantCode(t, "bob, at once", err, hub.Denied, "device-owned-by-other")
		if _, err = o.sign("alice", testDev); err != nil {
			t.Errorf("alice, once more: %v", err)
		}
		<-time.After(reservedFor + time.Second)
		if _, err = o.sign("bob", testDev); err != nil {
			t.Errorf("bob, a day later: %v", err)
		}
		_, err = o.sign("alice", testDev)
		wantCode(t, "alice, then", err, hub.Denied, "device-owned-by-other")
		o.own[testDev] = "alice" // who has signed it up meanwhile
		if _, err = o.sign("alice", testDev); err != nil {
			t.Errorf("alice, as its owner: %v", err)
		}
		for i := range maxReserved {
			id := hub.DeviceID(fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i+1))
			if err := o.entitled(t.Context(), "carol", id, true); err != nil {
				t.Fatal(err)
			}
		}
		wantCode(t, "one more", o.entitled(t.Context(), "carol", testHub, true), hub.Exhausted, "reservations-limit")
		<-time.After(reservedFor + time.Second)
		if err := o.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := o.entitled(t.Context(), "carol", testHub, true); err != nil {
			t.Errorf("a day later: %v", err)
		}
		for range maxLive - 2 { // one too many; bob's do not count
			_, err = o.sign("alice", testDev)
		}
		wantCode(t, "certificates without end", err, hub.Exhausted, "certificates-limit")
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice", Devices: []hub.DeviceID{testDev}}, hub.RevokedSuperseded); err != nil {
			t.Fatal(err)
		}
		if _, err = o.sign("alice", testDev); err != nil {
			t.Errorf("after the others were revoked: %v", err)
		}
	})
}

// An ID is kept for who gets something else than a certificate, too.
func TestReserve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		reserve := func(owner hub.Owner, dev hub.DeviceID) error { return o.Reserve(t.Context(), owner, dev) }
		wantCode(t, "nobody", reserve("", testDev), hub.Denied, "owner-missing")
		wantCode(t, "the hub's ID", reserve("alice", testHub), hub.Denied, "device-id-of-hub")
		for range 2 {
			if err := reserve("alice", testDev); err != nil {
				t.Fatal(err)
			}
		}
		wantCode(t, "bob", reserve("bob", testDev), hub.Denied, "device-owned-by-other")
		_, err := o.sign("bob", testDev)
		wantCode(t, "a certificate for bob", err, hub.Denied, "device-owned-by-other")
		<-time.After(reservedFor + time.Second)
		if _, err := o.sign("bob", testDev); err != nil {
			t.Errorf("bob, a day later: %v", err)
		}
		wantCode(t, "alice, then", reserve("alice", testDev), hub.Denied, "device-owned-by-other")
		o.own[testDev] = "alice"
		if err := reserve("alice", testDev); err != nil {
			t.Errorf("alice, as its owner: %v", err)
		}
	})
}

// What the store does not take nobody gets.
func TestNothingOutsideTheLedger(t *testing.T) {
	o := newOffice(t)
	o.docs.Fail = func(op, collection, _ string) error {
		if op == "put" && collection == collCertificates {
			return &hub.Error{Kind: hub.Unavailable}
		}
		return nil
	}
	if _, err := o.sign("alice", testDev); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("a request: %v", err)
	}
	if id, err := o.IssueDevice(t.Context(), testDev, time.Hour, "", "root"); !hub.IsKind(err, hub.Unavailable) || len(id.Chain)+len(id.Key) > 0 {
		t.Errorf("the operator: %v, %d bytes", err, len(id.Chain))
	}
}

// What is revoked is known at once, told, on the list, and stays so over a restart; whose it is not nobody can revoke or see.
func TestRevoke(t *testing.T) {
	o := newOffice(t)
	o.own[testDev] = "alice"
	first, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	second, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	serial := hub.SerialOf(first.SerialNumber)
	for what, f := range map[string]hub.CertificateFilter{
		"bob's": {Owner: "bob", Serials: []string{serial}}, "nobody's": {Serials: []string{serial}},
		"of another device": {Owner: "alice", Serials: []string{serial}, Devices: []hub.DeviceID{testHub}},
		"unknown":           {Owner: "alice", Serials: []string{"00"}},
	} {
		if got, err := o.Revoke(t.Context(), f, 0); err != nil || len(got) > 0 || len(o.list(f)) > 0 {
			t.Errorf("%s: %v, %v", what, got, err)
		}
	}
	before, err := o.List(t.Context(), o.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	got, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice", Serials: []string{serial}}, hub.RevokedKeyCompromise)
	if err != nil || len(got) != 1 || got[0].Serial != serial || got[0].Revoked.IsZero() {
		t.Fatalf("%+v, %v", got, err)
	}
	if again, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, 0); err != nil || len(again) > 0 {
		t.Errorf("again: %+v, %v", again, err)
	}
	if !slices.Equal(o.ended, []string{serial}) {
		t.Errorf("told of %q", o.ended)
	}
	check := func(when string) {
		t.Helper()
		if !o.Revoked(first) || o.Revoked(second) {
			t.Errorf("%s: revoked %t and %t", when, o.Revoked(first), o.Revoked(second))
		}
		der, err := o.List(t.Context(), o.Issuer())
		if err != nil {
			t.Fatal(err)
		}
		l, err := x509.ParseRevocationList(der)
		if err != nil {
			t.Fatal(err)
		}
		old, _ := x509.ParseRevocationList(before)
		if l.CheckSignatureFrom(o.a.signer(Device).issuing) != nil || len(l.RevokedCertificateEntries) != 1 || l.Number.Cmp(old.Number) <= 0 ||
			l.RevokedCertificateEntries[0].SerialNumber.Cmp(first.SerialNumber) != 0 || l.RevokedCertificateEntries[0].ReasonCode != 1 {
			t.Errorf("%s: %v", when, l.RevokedCertificateEntries)
		}
	}
	check("at once")
	o.start(o.a)
	check("after a restart")
	_, err = o.List(t.Context(), "another")
	wantCode(t, "another issuer", err, hub.NotFound, "issuer-unknown")
	other := open(t, filepath.Join(t.TempDir(), "other"))
	forged, err := other.signer(Device).signKey(&newKey(t).PublicKey, "x", time.Hour, deviceUsage, nil)
	if err != nil {
		t.Fatal(err)
	}
	forged.SerialNumber = first.SerialNumber
	if o.Revoked(forged) {
		t.Error("another authority's certificate of the same serial is revoked")
	}
}

// OpenSSL, which is not ours, takes chain and list, and knows what is revoked.
func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	o := newOffice(t)
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	run := func(args ...string) (string, error) {
		out, err := exec.CommandContext(t.Context(), openssl, args...).CombinedOutput()
		return string(out), err
	}
	if out, err := run("req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=uuid:"+string(testDev),
		"-keyout", filepath.Join(dir, "key.pem"), "-out", filepath.Join(dir, "csr.pem")); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	csr, err := os.ReadFile(filepath.Join(dir, "csr.pem"))
	if err != nil {
		t.Fatal(err)
	}
	chain, err := o.Sign(t.Context(), "alice", "sub", csr)
	if err != nil {
		t.Fatal(err)
	}
	cert := file("cert.pem", chain)
	root := file("root.pem", slices.Concat(certPEM(o.a.signer(Device).root), certPEM(o.a.signer(Device).issuing)))
	verify := func() (string, error) {
		der, err := o.List(t.Context(), o.Issuer())
		if err != nil {
			t.Fatal(err)
		}
		crl := file("crl.pem", pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: der}))
		return run("verify", "-x509_strict", "-purpose", "sslclient", "-crl_check", "-CRLfile", crl, "-CAfile", root, cert)
	}
	if out, err := verify(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice", Devices: []hub.DeviceID{testDev}}, hub.RevokedKeyCompromise); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(); err == nil || !strings.Contains(out, "certificate revoked") {
		t.Errorf("%v: %s", err, out)
	}
}

// The ledger keeps what has ended for a while and no longer; what is good stays.
func TestLedgerForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		ctx, cancel := context.WithCancel(t.Context())
		var running sync.WaitGroup
		running.Go(func() { _ = o.Run(ctx, func() {}) })
		if _, err := o.IssueDevice(t.Context(), testDev, 40*24*time.Hour, "", "root"); err != nil {
			t.Fatal(err)
		}
		if _, err := o.sign("alice", testDev); err != nil {
			t.Fatal(err)
		}
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true}, 0); err != nil {
			t.Fatal(err)
		}
		begun := time.Now()
		for _, c := range []struct{ days, want int }{{125, 2}, {135, 1}, {450, 1}, {460, 0}} {
			<-time.After(time.Until(begun.Add(time.Duration(c.days) * 24 * time.Hour)))
			synctest.Wait()
			if n := len(o.list(hub.CertificateFilter{All: true})); n != c.want {
				t.Errorf("after %d days there are %d, want %d", c.days, n, c.want)
			}
		}
		if len(o.revoked) > 0 {
			t.Errorf("%d serials are remembered", len(o.revoked))
		}
		cancel()
		running.Wait()
	})
}

// Whatever a request holds, it is an error, or a device and a key of a kind that is signed.
func FuzzRequest(f *testing.F) {
	key := newKey(f)
	good := csrOf(f, key, named("uuid:"+string(testDev)))
	block, _ := pem.Decode(good)
	for _, b := range [][]byte{good, block.Bytes, nil, bytes.Repeat([]byte{0x30, 0x80}, 100), csrOf(f, key, named("x")), []byte("-----BEGIN CERTIFICATE REQUEST-----\n")} {
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		req, err := parseRequest(b)
		if err != nil {
			var e *hub.Error
			if !errors.As(err, &e) || e.Kind != hub.Invalid && e.Kind != hub.TooLarge || e.Code == "" {
				t.Errorf("%v", err)
			}
			return
		}
		if id, err := hub.ParseDeviceID(string(req.device)); err != nil || id != req.device || checkKey(req.key, deviceUsage) != nil {
			t.Errorf("%q, %T", req.device, req.key)
		}
	})
}

// What ends soon and has no other, and keys that several devices have, are reported; what was revoked is no more of either.
func TestReport(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		id := func(n int) hub.DeviceID { return hub.DeviceID(fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", n)) }
		issue := func(n int, days time.Duration) string {
			made, err := o.IssueDevice(t.Context(), id(n), days*24*time.Hour, "alice", "root")
			if err != nil {
				t.Fatal(err)
			}
			return hub.SerialOf(made.leaf.SerialNumber)
		}
		issue(1, 20)           // ends soon
		issue(2, 20)           // ends soon, but
		issue(2, 200)          // has another
		issue(3, 10)           // ends first
		issue(4, 1)            // will have ended
		revoked := issue(5, 5) // will be revoked
		key := newKey(t)       // is that of two devices,
		for n := range 2 {
			if _, err := o.Sign(t.Context(), "bob", "sub", csrOf(t, key, named(string(id(6+n))))); err != nil {
				t.Fatal(err)
			}
		}
		other := newKey(t) // and another that of two, one of them revoked
		for n := range 2 {
			if _, err := o.Sign(t.Context(), "bob", "sub", csrOf(t, other, named(string(id(8+n))))); err != nil {
				t.Fatal(err)
			}
		}
		for _, f := range []hub.CertificateFilter{{All: true, Serials: []string{revoked}}, {All: true, Devices: []hub.DeviceID{id(9)}}} {
			if _, err := o.Revoke(t.Context(), f, 0); err != nil {
				t.Fatal(err)
			}
		}
		<-time.After(2 * 24 * time.Hour)
		r, err := o.Report(t.Context(), "", 30*24*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		devices := func(cs []hub.Certificate) (out []hub.DeviceID) {
			for _, c := range cs {
				out = append(out, c.Device)
			}
			return out
		}
		if r.Good != 7 || r.Ended != 1 || r.Revoked != 2 || r.Expires != 2 || r.SharedKeys != 1 ||
			!slices.Equal(devices(r.Expiring), []hub.DeviceID{id(3), id(1)}) || !slices.Equal(devices(r.Shared), []hub.DeviceID{id(6), id(7)}) {
			t.Errorf("%d good, %d ended, %d revoked, %d expire: %v, %d keys are shared: %v", r.Good, r.Ended, r.Revoked, r.Expires,
				devices(r.Expiring), r.SharedKeys, devices(r.Shared))
		}
	})
}

// Whatever others had made for a device, its owner gets a certificate, sees theirs, and ends them.
func TestOwnersDoNotBlockEachOther(t *testing.T) {
	o := newOffice(t)
	var theirs *x509.Certificate
	for range maxLive {
		var err error
		if theirs, err = o.sign("mallory", testDev); err != nil {
			t.Fatal(err)
		}
	}
	o.own[testDev] = "alice"
	if _, err := o.sign("alice", testDev); err != nil {
		t.Error(err)
	}
	his := hub.CertificateFilter{Owner: "alice", Devices: []hub.DeviceID{testDev}}
	if n := len(o.list(his)); n != maxLive+1 {
		t.Errorf("she sees %d", n)
	}
	if n := len(o.list(hub.CertificateFilter{Owner: "alice"})); n != 1 {
		t.Errorf("%d were signed for her", n)
	}
	if cs, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice", Serials: []string{hub.SerialOf(theirs.SerialNumber)}}, 0); err != nil || len(cs) != 1 {
		t.Errorf("%d by its serial, %v", len(cs), err)
	}
	if cs, err := o.Revoke(t.Context(), his, 0); err != nil || len(cs) != maxLive {
		t.Errorf("%d, %v", len(cs), err)
	}
	if _, err := o.sign("mallory", testDev); !hub.IsKind(err, hub.Denied) {
		t.Errorf("mallory again: %v", err)
	}
}

// Devices that have signed up are no reservations any more.
func TestReservationsEndWithTheSignUp(t *testing.T) {
	o := newOffice(t)
	for i := range maxReserved {
		id := hub.DeviceID(fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i+1))
		if err := o.entitled(t.Context(), "alice", id, true); err != nil {
			t.Fatal(err)
		}
		o.own[id] = "alice"
	}
	if _, err := o.sign("alice", testDev); err != nil {
		t.Error(err)
	}
}

// What is made of a device is bounded, also when it is revoked at once, and when many ask at a time.
func TestCertificatesOfADeviceAreBounded(t *testing.T) {
	o := newOffice(t)
	var all sync.WaitGroup
	for range 3 * maxLive {
		all.Go(func() { _, _ = o.sign("alice", testDev) })
	}
	all.Wait()
	if n := len(o.list(hub.CertificateFilter{All: true})); n != maxLive {
		t.Errorf("%d are good", n)
	}
	for {
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true}, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := o.sign("alice", testDev); err != nil {
			wantCode(t, "one more", err, hub.Exhausted, "certificates-limit")
			break
		}
	}
	if n := len(o.list(hub.CertificateFilter{All: true})); n != maxMade {
		t.Errorf("%d were made", n)
	}
}

// A key that somebody else is known to have gets no certificate any more, for no device.
func TestCompromisedKey(t *testing.T) {
	o := newOffice(t)
	key := newKey(t)
	csr := csrOf(t, key, named(string(testDev)))
	if _, err := o.Sign(t.Context(), "alice", "sub", csr); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true}, hub.RevokedKeyCompromise); err != nil {
		t.Fatal(err)
	}
	_, err := o.Sign(t.Context(), "alice", "sub", csr)
	wantCode(t, "the same request", err, hub.Denied, "csr-key-compromised")
	_, err = o.Sign(t.Context(), "bob", "sub", csrOf(t, key, named("aaaaaaaa-0000-4000-8000-000000000001")))
	wantCode(t, "another device", err, hub.Denied, "csr-key-compromised")
	if _, err := o.sign("alice", testDev); err != nil {
		t.Errorf("another key: %v", err)
	}
}

// A store that is away takes no revocation, but whom it concerns does not come in; the list that has all goes on. Repeated, it is
// stored, also if somebody else was faster, or the answer was lost.
func TestRevokeWhileTheStoreIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		first, err := o.sign("alice", testDev)
		if err != nil {
			t.Fatal(err)
		}
		second, err := o.sign("alice", testDev)
		if err != nil {
			t.Fatal(err)
		}
		before, err := o.List(t.Context(), o.Issuer())
		if err != nil {
			t.Fatal(err)
		}
		o.docs.Fail = func(op, _, _ string) error {
			if op == "put" {
				return hub.NewError(hub.Unavailable, "disk-full", "")
			}
			return nil
		}
		<-time.After(listAge + time.Minute)
		if again, err := o.List(t.Context(), o.Issuer()); err != nil || !bytes.Equal(again, before) {
			t.Errorf("the list: %v", err)
		}
		f := hub.CertificateFilter{Owner: "alice", Serials: []string{hub.SerialOf(first.SerialNumber)}}
		if _, err := o.Revoke(t.Context(), f, 0); !hub.IsKind(err, hub.Unavailable) || !o.Revoked(first) || len(o.ended) != 1 {
			t.Errorf("%v; revoked %t, told %q", err, o.Revoked(first), o.ended)
		}
		if _, err := o.List(t.Context(), o.Issuer()); err == nil {
			t.Error("there is a list, which cannot have it")
		}
		o.docs.Fail = nil
		if cs, err := o.Revoke(t.Context(), f, 0); err != nil || len(cs) != 1 {
			t.Errorf("repeated: %v, %v", cs, err)
		}
		other, err := NewService(t.Context(), o.a, o.docs, o.own, "", slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		f.Serials = []string{hub.SerialOf(second.SerialNumber)}
		if _, err := other.Revoke(t.Context(), f, 0); err != nil {
			t.Fatal(err)
		}
		if cs, err := o.Revoke(t.Context(), f, 0); err != nil || len(cs) != 0 || !o.Revoked(second) {
			t.Errorf("after somebody else: %v, %v, revoked %t", cs, err, o.Revoked(second))
		}
	})
}

// A serial that is not in the ledger, as after a backup was restored, can be revoked by an operator.
func TestRevokeUnrecorded(t *testing.T) {
	o := newOffice(t)
	lost, err := o.a.signer(Device).signKey(&newKey(t).PublicKey, "uuid:"+string(testDev), time.Hour, deviceUsage, nil)
	if err != nil {
		t.Fatal(err)
	}
	serial := hub.SerialOf(lost.SerialNumber)
	if cs, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice", Serials: []string{serial}}, 0); err != nil || len(cs) != 0 {
		t.Errorf("alice: %v, %v", cs, err)
	}
	cs, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{serial}}, hub.RevokedKeyCompromise)
	if err != nil || len(cs) != 1 || !o.Revoked(lost) {
		t.Errorf("%v, %v, revoked %t", cs, err, o.Revoked(lost))
	}
	o.start(o.a)
	der, err := o.List(t.Context(), o.Issuer())
	if err != nil {
		t.Fatal(err)
	}
	if l, err := x509.ParseRevocationList(der); err != nil || len(l.RevokedCertificateEntries) != 1 || !o.Revoked(lost) {
		t.Errorf("after a restart: %v, %v, revoked %t", l, err, o.Revoked(lost))
	}
}

// What was revoked is on one list beyond its end (RFC 5280, Section 3.3), and the numbers rise.
func TestListForgets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		if _, err := o.IssueDevice(t.Context(), testDev, time.Hour, "", "root"); err != nil {
			t.Fatal(err)
		}
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true}, 0); err != nil {
			t.Fatal(err)
		}
		var last *x509.RevocationList
		for _, c := range []struct {
			after time.Duration
			want  int
		}{{0, 1}, {2 * time.Hour, 1}, {listValid, 0}} {
			<-time.After(c.after)
			der, err := o.List(t.Context(), o.Issuer())
			if err != nil {
				t.Fatal(err)
			}
			l, err := x509.ParseRevocationList(der)
			if err != nil {
				t.Fatal(err)
			}
			if len(l.RevokedCertificateEntries) != c.want || last != nil && l.Number.Cmp(last.Number) <= 0 || !l.ThisUpdate.Before(time.Now()) {
				t.Errorf("%v later: %d entries, number %v, since %v", c.after, len(l.RevokedCertificateEntries), l.Number, l.ThisUpdate)
			}
			for _, e := range l.RevokedCertificateEntries {
				if e.RevocationTime.After(l.ThisUpdate) || last != nil && !e.RevocationTime.Equal(last.RevokedCertificateEntries[0].RevocationTime) {
					t.Errorf("%v later: revoked at %v, on a list of %v", c.after, e.RevocationTime, l.ThisUpdate)
				}
			}
			last = l
		}
	})
}
