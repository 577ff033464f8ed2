package certificateauthority

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

func (o *office) roll(r Root, step Step) {
	o.t.Helper()
	if err := o.a.Roll(r, step, nil); err != nil {
		o.t.Fatal(err)
	}
}

// revocationsOf is the serials on the list of an issuer, which has signed it.
func (o *office) revocationsOf(by signer) (out []*big.Int) {
	o.t.Helper()
	der, err := o.List(o.t.Context(), by.name)
	if err != nil {
		o.t.Fatal(err)
	}
	l, err := x509.ParseRevocationList(der)
	if err != nil {
		o.t.Fatal(err)
	}
	if err := l.CheckSignatureFrom(by.issuing); err != nil {
		o.t.Error(err)
	}
	for _, e := range l.RevokedCertificateEntries {
		out = append(out, e.SerialNumber)
	}
	return out
}

// believes tells whether a device's certificate lets it in: by root and intermediates alone, and not revoked.
func (o *office) believes(c *x509.Certificate) bool {
	between := x509.NewCertPool()
	for _, ca := range o.a.DeviceIntermediates() {
		between.AddCert(ca)
	}
	_, err := c.Verify(x509.VerifyOptions{Roots: o.a.DevicePool(), Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	return err == nil && !o.Revoked(c)
}

func read(t *testing.T, parts ...string) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(parts...))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// After a new issuing key has taken over, what the former one has signed is good, and each has a list of its own, until the former
// is retired. All is so after a restart.
func TestRollIssuing(t *testing.T) {
	o := newOffice(t)
	sign := func() *x509.Certificate {
		c, err := o.sign("alice", testDev)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	old, first := o.a.signer(Device), sign()
	good := sign()
	o.roll(Device, RollIssuing)
	second := sign()
	now := o.a.signer(Device)
	if now.name == old.name || now.root != o.a.line(Device).roots[0].cert || second.CheckSignatureFrom(now.issuing) != nil {
		t.Fatal("the former key signs")
	}
	if now.issuing.Subject.String() == old.issuing.Subject.String() {
		t.Error("both have the same name, so their lists would be one")
	}
	if got := o.list(hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(second.SerialNumber)}}); len(got) != 1 || got[0].Issuer != now.name {
		t.Errorf("the ledger has %+v", got)
	}
	if want := "https://hub.example:8080" + ListsPath + now.name; !slices.Equal(second.CRLDistributionPoints, []string{want}) {
		t.Errorf("its list is %v", second.CRLDistributionPoints)
	}
	for _, c := range []*x509.Certificate{first, second} {
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(c.SerialNumber)}}, 0); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{"abcd"}}, 0); err != nil { // nobody knows who has signed it
		t.Fatal(err)
	}
	check := func(when string) {
		t.Helper()
		for by, c := range map[string]*x509.Certificate{old.name: first, now.name: second} {
			s, _ := o.a.issuer(by)
			got := o.revocationsOf(s)
			if len(got) != 2 || !slices.ContainsFunc(got, func(n *big.Int) bool { return n.Cmp(c.SerialNumber) == 0 }) {
				t.Errorf("%s: on the list of %s is %v, want %v and abcd", when, by, got, c.SerialNumber)
			}
		}
		if o.believes(first) || !o.believes(good) || o.believes(second) || !o.believes(sign()) {
			t.Errorf("%s: %t %t %t", when, o.believes(first), o.believes(good), o.believes(second))
		}
	}
	check("at once")
	o.start(open(t, o.a.dir))
	check("after a restart")

	for _, c := range []*x509.Certificate{good, sign()} { // and each is renewed
		if _, ours := o.RenewAt(c); !ours || o.Vouch(t.Context(), []*x509.Certificate{c}) != nil {
			t.Errorf("a certificate of %s is not renewed", c.Issuer)
		}
	}

	wantCode(t, "retiring what signs", o.a.Retire(now.name, nil), hub.Precondition, "issuer-in-use")
	wantCode(t, "retiring the root", o.a.Retire(o.a.line(Device).roots[0].name, nil), hub.Precondition, "issuer-in-use")
	wantCode(t, "retiring what is not there", o.a.Retire(testHub, nil), hub.NotFound, "issuer-unknown")
	key := read(t, o.a.dir, "device-issuing.pem")
	for range 2 {
		if err := o.a.Retire(old.name, nil); err != nil {
			t.Error(err)
		}
	}
	// Whoever has the retired key signs with it, and has the certificate say that the other has.
	var forged []*x509.Certificate
	for _, ski := range [][]byte{nil, now.issuing.SubjectKeyId, []byte("x")} {
		issuing := *old.issuing
		issuing.SubjectKeyId = ski
		c, err := signer{issuing: &issuing, key: old.key}.signKey(newKey(t).Public(), "uuid:"+string(testDev), time.Hour, deviceUsage, nil)
		if err != nil {
			t.Fatal(err)
		}
		forged = append(forged, c)
	}
	gone := func(when string) {
		t.Helper()
		for i, c := range forged {
			if !o.Revoked(c) || o.Vouch(t.Context(), []*x509.Certificate{c, old.issuing}) == nil {
				t.Errorf("%s: forged certificate %d is good", when, i)
			}
		}
		if o.believes(good) || !o.Revoked(good) || !o.believes(sign()) {
			t.Errorf("%s: a certificate of the retired issuer is good: %t, one of the other: %t", when, o.believes(good), o.believes(sign()))
		}
		_, err := o.List(t.Context(), old.name)
		wantCode(t, when+", its list", err, hub.NotFound, "issuer-unknown")
		if _, err := os.Stat(filepath.Join(o.a.dir, "device-issuing.pem")); !os.IsNotExist(err) || bytes.Contains(read(t, o.a.dir, "device-issuing.retired.pem"), []byte("PRIVATE")) {
			t.Errorf("%s: the retired key is there: %v", when, err)
		}
	}
	gone("at once")
	o.start(open(t, o.a.dir))
	gone("after a restart")
	// A crash may have come after the one file was written and before the other was removed.
	if err := os.WriteFile(filepath.Join(o.a.dir, "device-issuing.pem"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	o.start(open(t, o.a.dir))
	gone("after a crash")
}

// A new root is given out first; then the hub and devices come under it, and who knows only one of the two believes the hub.
func TestRollRoot(t *testing.T) {
	o := newOffice(t)
	roots := func() []*x509.Certificate {
		pemText, err := o.a.RootPEM(Device)
		if err != nil {
			t.Fatal(err)
		}
		var out []*x509.Certificate
		for block, rest := pem.Decode(pemText); block != nil; block, rest = pem.Decode(rest) {
			c, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, c)
		}
		return out
	}
	device := func() *x509.Certificate {
		c, err := o.sign("alice", testDev)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	believed := func(when string, by ...*x509.Certificate) {
		t.Helper()
		cert, err := o.a.HubCertificate([]string{"hub.example"})
		if err != nil {
			t.Fatal(err)
		}
		for i, root := range by {
			if err := clientOf(root, cert); err != nil {
				t.Errorf("%s the hub is not believed by who knows root %d: %v", when, i, err)
			}
		}
	}
	old := roots()[0]
	early := device()
	wantCode(t, "finishing", o.a.Roll(Device, RollFinish, nil), hub.Precondition, "roll-not-begun")
	wantCode(t, "an unknown step", o.a.Roll(Device, "forth", nil), hub.Invalid, "roll-unknown")
	wantCode(t, "an unknown root", o.a.Roll("other", RollRoot, nil), hub.NotFound, "root-unknown")

	o.roll(Device, RollRoot)
	overlap := roots()
	if len(overlap) != 2 || !overlap[0].Equal(old) {
		t.Fatalf("%d roots are given out, the one in use first: %t", len(overlap), overlap[0].Equal(old))
	}
	// RFC 7030, Section 4.1.3: old with old, new with new, and new with old.
	anchors := o.Anchors()
	if len(anchors) != 4 || !anchors[0].Equal(old) || !anchors[1].Equal(overlap[1]) || anchors[2].CheckSignatureFrom(old) != nil ||
		!bytes.Equal(anchors[2].RawSubjectPublicKeyInfo, overlap[1].RawSubjectPublicKeyInfo) {
		t.Errorf("devices that enrol are given %d anchors", len(anchors))
	}
	between := device()
	if between.AuthorityKeyId == nil || between.CheckSignatureFrom(o.a.signer(Device).issuing) != nil || o.a.signer(Device).root.Equal(overlap[1]) {
		t.Error("something is signed under the new root")
	}
	believed("announced,", old)
	wantCode(t, "a third", o.a.Roll(Device, RollRoot, nil), hub.Precondition, "roots-overlap")
	o.roll(Device, RollIssuing) // does not wait
	if o.a.signer(Device).root.Equal(overlap[1]) {
		t.Error("a new issuing key is under the new root")
	}

	o.start(open(t, o.a.dir))
	o.roll(Device, RollFinish)
	if got := roots(); len(got) != 2 || !got[0].Equal(overlap[1]) || !got[1].Equal(old) {
		t.Error("the new root does not come first")
	}
	late := device()
	if !o.a.signer(Device).root.Equal(overlap[1]) || !o.believes(early) || !o.believes(between) || !o.believes(late) {
		t.Errorf("believed: %t %t %t", o.believes(early), o.believes(between), o.believes(late))
	}
	believed("at once", old, overlap[1])
	o.start(open(t, o.a.dir))
	believed("after a restart", old, overlap[1])

	if err := o.a.Retire(nameOf(old.RawSubjectPublicKeyInfo), nil); err != nil {
		t.Fatal(err)
	}
	for _, when := range []string{"at once", "after a restart"} {
		if got := roots(); len(got) != 1 || !got[0].Equal(overlap[1]) || o.believes(early) || o.believes(between) || !o.believes(late) {
			t.Errorf("retired, %s: %d roots; believed: %t %t %t", when, len(got), o.believes(early), o.believes(between), o.believes(late))
		}
		if all := o.a.DeviceRoots(); len(all) != 2 || !all[0].Equal(old) {
			t.Errorf("retired, %s: the first of all roots is not known", when)
		}
		believed("retired, "+when, overlap[1])
		o.start(open(t, o.a.dir))
	}
	o.roll(Device, RollRoot)
	o.roll(Device, RollFinish)
	believed("once more", overlap[1], roots()[0])
}

// clientOf is what a client does that knows a root alone.
func clientOf(root *x509.Certificate, cert tls.Certificate) error {
	roots, between := x509.NewCertPool(), x509.NewCertPool()
	roots.AddCert(root)
	for _, der := range cert.Certificate[1:] {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return err
		}
		between.AddCert(c)
	}
	_, err := cert.Leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, DNSName: "hub.example"})
	return err
}

// Roots of before there was a roll-over have a path length of 1. OpenSSL believes a new one by them all the same.
func TestRollRootOfShortPath(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	dir := filepath.Join(t.TempDir(), "ca")
	if err := makeDir(dir); err != nil {
		t.Fatal(err)
	}
	template, err := authorityTemplate("coaphub device root "+testHub, rootYears)
	if err != nil {
		t.Fatal(err)
	}
	template.MaxPathLen = 1
	key := newKey(t)
	old, err := create(template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if err := writePair(filepath.Join(dir, "device-root.pem"), old, key); err != nil {
		t.Fatal(err)
	}
	a := open(t, dir)
	for _, step := range []Step{RollRoot, RollFinish} {
		if err := a.Roll(Device, step, nil); err != nil {
			t.Fatal(err)
		}
	}
	cert, err := a.HubCertificate([]string{"hub.example"})
	if err != nil {
		t.Fatal(err)
	}
	var shown []byte
	for _, der := range cert.Certificate {
		shown = append(shown, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	for name, b := range map[string][]byte{"shown.pem": shown, "old.pem": certPEM(old), "new.pem": certPEM(a.signer(Device).root)} {
		if err := os.WriteFile(filepath.Join(dir, name), b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, root := range []string{"old.pem", "new.pem"} {
		out, err := exec.CommandContext(t.Context(), openssl, "verify", "-x509_strict", "-purpose", "sslserver", "-verify_hostname", "hub.example",
			"-CAfile", filepath.Join(dir, root), "-untrusted", filepath.Join(dir, "shown.pem"), filepath.Join(dir, "shown.pem")).CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", root, err, out)
		}
	}
}

// A root's key leaves the folder once it is safe elsewhere, the hub goes on, and what needs it asks for it.
func TestRootKeyOffline(t *testing.T) {
	o := newOffice(t)
	dir := o.a.dir
	other := open(t, filepath.Join(t.TempDir(), "other"))
	foreign, err := other.RootKeys(Device)
	if err != nil {
		t.Fatal(err)
	}
	safe, err := o.a.RootKeys(Device)
	if err != nil || !bytes.Equal(safe, read(t, dir, "device-root.pem")) {
		t.Fatalf("%q, %v", safe, err)
	}
	for what, b := range map[string][]byte{"nothing": nil, "the certificate": certPEM(o.a.signer(Device).root), "another key": foreign} {
		wantCode(t, "forgetting it for "+what, o.a.ForgetRootKeys(Device, b), hub.Invalid, "root-key-wrong")
	}
	if !bytes.Equal(safe, read(t, dir, "device-root.pem")) {
		t.Fatal("the key is lost")
	}
	if err := o.a.ForgetRootKeys(Device, safe); err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(read(t, dir, "device-root.pem"), []byte("PRIVATE")) || !bytes.Contains(read(t, dir, "https-root.pem"), []byte("PRIVATE")) {
		t.Error("the key is there, or another is not")
	}
	if info, err := os.Stat(filepath.Join(dir, "device-root.pem")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	o.start(open(t, dir))
	if _, err := o.sign("alice", testDev); err != nil {
		t.Error(err)
	}
	_, err = o.a.RootKeys(Device)
	wantCode(t, "once more", err, hub.Precondition, "root-key-missing")
	for _, step := range []Step{RollIssuing, RollRoot} {
		wantCode(t, string(step), o.a.Roll(Device, step, nil), hub.Precondition, "root-key-missing")
		wantCode(t, string(step)+" with another's", o.a.Roll(Device, step, foreign), hub.Invalid, "root-key-wrong")
		wantCode(t, string(step)+" with rubbish", o.a.Roll(Device, step, []byte("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")), hub.Invalid, "root-key-wrong")
		if err := o.a.Roll(Device, step, safe); err != nil {
			t.Error(err)
		}
	}
	if bytes.Contains(read(t, dir, "device-root.pem"), []byte("PRIVATE")) {
		t.Error("the key that was given is kept")
	}
	// The new root's may go, too, before anything is signed by it.
	if safe, err = o.a.RootKeys(Device); err != nil {
		t.Fatal(err)
	}
	if err := o.a.ForgetRootKeys(Device, safe); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "finishing", o.a.Roll(Device, RollFinish, nil), hub.Precondition, "root-key-missing")
	if err := o.a.Roll(Device, RollFinish, safe); err != nil {
		t.Error(err)
	}
	var got []string
	for _, p := range o.a.Parts() {
		if p.Root == Device {
			got = append(got, p.Kind+" "+p.State)
		}
	}
	if want := []string{"root believed", "issuing believed", "issuing believed", "root in use", "issuing in use"}; !slices.Equal(got, want) {
		t.Errorf("there are %q, want %q", got, want)
	}
}

// A file in the middle that was lost is noticed: else the hub would sign with what was to be over.
func TestOpenRefusesGaps(t *testing.T) {
	a := open(t, filepath.Join(t.TempDir(), "ca"))
	for range 2 {
		if err := a.Roll(Device, RollIssuing, nil); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(filepath.Join(a.dir, "device-issuing-2.pem")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(a.dir, testHub); err == nil {
		t.Error("it was not missed")
	}
}

// Issuing certificates that are believed are bounded; those that have ended make room.
func TestIssuersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := open(t, filepath.Join(t.TempDir(), "ca"))
		for range maxIssuers - 1 {
			if err := a.Roll(Device, RollIssuing, nil); err != nil {
				t.Fatal(err)
			}
		}
		wantCode(t, "one more", a.Roll(Device, RollIssuing, nil), hub.Precondition, "issuers-limit")
		<-time.After((issuingYears*365 + 10) * 24 * time.Hour)
		if n := len(a.DeviceIntermediates()); n != 0 {
			t.Errorf("%d that have ended are believed", n)
		}
		if err := a.Roll(Device, RollIssuing, nil); err != nil {
			t.Error(err)
		}
		if _, err := a.IssueDevice(testDev, time.Hour); err != nil {
			t.Error(err)
		}
	})
}
