package certificateauthority

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
)

func rsaKey(t *testing.T, bits int) *rsa.PrivateKey {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, bits)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// scep asks as the door does for a client of SCEP.
func (o *office) scep(proof hub.EnrolmentProof, key crypto.Signer, name string, renew bool) (hub.Enrolled, error) {
	o.t.Helper()
	proof.Transaction = "transaction"
	return o.Enrol(o.t.Context(), proof, csrOf(o.t, key, named(name)), renew)
}

// token makes a one-time token of alice's.
func (o *office) token(owner hub.Owner, dev hub.DeviceID) (text, id string) {
	o.t.Helper()
	text, tok, err := o.NewToken(o.t.Context(), owner, dev, 0, "operator")
	if err != nil {
		o.t.Fatal(err)
	}
	return text, tok.ID
}

// RSA keys are for SCEP's clients alone, of a size that is worth something; their certificates let them sign and be encrypted to.
func TestRSAKeysBySCEP(t *testing.T) {
	o := newOffice(t)
	key := rsaKey(t, 2048)
	text, _ := o.token("alice", testDev)
	_, err := o.Enrol(t.Context(), hub.EnrolmentProof{Token: text}, csrOf(t, key, named("")), false)
	wantCode(t, "an RSA key that does not come by SCEP", err, hub.Invalid, "csr-key")
	_, err = o.Sign(t.Context(), "alice", "", csrOf(t, key, named("uuid:"+string(testDev))))
	wantCode(t, "an RSA key over the API", err, hub.Invalid, "csr-key")
	_, err = o.scep(hub.EnrolmentProof{Token: text}, rsaKey(t, 1024), "", false)
	wantCode(t, "1024 bits", err, hub.Invalid, "csr-key")
	out, err := o.scep(hub.EnrolmentProof{Token: text}, key, "lamp", false)
	if err != nil {
		t.Fatal(err)
	}
	c := out.Chain[0]
	if c.KeyUsage != x509.KeyUsageDigitalSignature|x509.KeyUsageKeyEncipherment || c.Subject.String() != "CN=uuid:"+string(testDev) {
		t.Errorf("%s, key usage %b", c.Subject, c.KeyUsage)
	}
	if err := o.Vouch(t.Context(), out.Chain); err != nil {
		t.Error(err)
	}
}

// A renewal by SCEP needs a device that enrolled and that nobody refused. A challenge beside it is the one that it enrolled with, or a
// new one of its owner's, which takes the other's place. The ledger has them.
func TestRenewalBySCEP(t *testing.T) {
	o := newOffice(t)
	key := rsaKey(t, 2048)
	text, id := o.token("alice", testDev)
	first, err := o.scep(hub.EnrolmentProof{Token: text}, key, "lamp", false)
	if err != nil {
		t.Fatal(err)
	}
	now := first
	renew := func(challenge string) error {
		t.Helper()
		out, err := o.scep(hub.EnrolmentProof{Chain: now.Chain[:1], Token: challenge}, newKey(t), "lamp", true)
		if err == nil {
			now = out
		}
		return err
	}
	proof := func(want ...string) {
		t.Helper()
		c := o.list(hub.CertificateFilter{All: true, Serials: []string{now.Serial}})
		for _, w := range want {
			if len(c) != 1 || c[0].How != hub.ByRenewal || c[0].Owner != "alice" || !strings.Contains(c[0].Proof, w) {
				t.Errorf("the ledger does not say %q: %+v", w, c)
			}
		}
	}
	if err := renew(""); err != nil {
		t.Fatal(err)
	}
	proof("certificate " + first.Serial)
	if err := renew(text); err != nil {
		t.Errorf("the challenge that it enrolled with: %v", err)
	}
	proof("token " + id)
	wantCode(t, "a challenge that there is not", renew("x"), hub.Unauthenticated, "token-unknown")
	foreign, _ := o.token("alice", otherDev)
	wantCode(t, "another device's challenge", renew(foreign), hub.Unauthenticated, "token-unknown")
	foreign, _ = o.token("bob", "")
	wantCode(t, "another owner's challenge", renew(foreign), hub.Unauthenticated, "token-unknown")
	next, id := o.token("alice", "")
	if err := renew(next); err != nil {
		t.Errorf("a new challenge: %v", err)
	}
	proof("token " + id)
	if err := renew(next); err != nil {
		t.Errorf("the new challenge once more: %v", err)
	}
	wantCode(t, "the former challenge", renew(text), hub.Unauthenticated, "token-unknown")
	if es := o.enrolled(hub.EnrolmentFilter{}); len(es) != 1 || es[0].Proof != "token "+id || es[0].Serial != now.Serial || es[0].Problem != "token-unknown" {
		t.Errorf("the enrolment is %+v", es)
	}
	_, err = o.scep(hub.EnrolmentProof{Chain: now.Chain[:1]}, newKey(t), "uuid:"+string(otherDev), true)
	wantCode(t, "another device's name", err, hub.Invalid, "csr-name")
	_, err = o.scep(hub.EnrolmentProof{Token: foreign}, newKey(t), "", true)
	wantCode(t, "a renewal without certificate", err, hub.Denied, "renewal-without-certificate")

	if _, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, false, "eve"); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "a device that was refused", renew(""), hub.Denied, "enrolment-refused")
	if _, err := o.Forget(t.Context(), hub.EnrolmentFilter{Devices: []hub.DeviceID{testDev}}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "a device of which nobody knows", renew(""), hub.NotFound, "enrolment-unknown")
	wantCode(t, "with its former challenge", renew(next), hub.Unauthenticated, "token-unknown")
	again, _ := o.token("alice", testDev)
	if err := renew(again); err != nil {
		t.Errorf("with a new one: %v", err)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{now.Serial}}, hub.RevokedUnspecified); err != nil {
		t.Fatal(err)
	}
	wantCode(t, "a revoked certificate", renew(""), hub.Unauthenticated, "certificate-revoked")
}

// Who has to wait asks again with the name of the transaction alone, and with the same factory key; the answer may get lost.
func TestSCEPWaits(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Approval = true })
	leaf := f.device("uuid:"+string(testDev), nil)
	poll := func(transaction string, chain ...*x509.Certificate) (hub.Enrolled, error) {
		return o.Enrol(t.Context(), hub.EnrolmentProof{Chain: chain, Transaction: transaction}, nil, false)
	}
	_, err := poll("transaction", leaf)
	wantCode(t, "before it asked", err, hub.NotFound, "enrolment-unknown")
	key := rsaKey(t, 2048)
	_, err = o.scep(shown(leaf), key, "lamp", false)
	wantCode(t, "at first", err, hub.Unavailable, "enrolment-waiting")
	_, err = poll("transaction", leaf)
	wantCode(t, "later", err, hub.Unavailable, "enrolment-waiting")
	o.start(o.a) // it is kept
	if _, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, true, "eve"); err != nil {
		t.Fatal(err)
	}
	_, err = poll("another", leaf)
	wantCode(t, "another transaction", err, hub.NotFound, "enrolment-unknown")
	_, err = poll("transaction", f.device("uuid:"+string(testDev), nil))
	wantCode(t, "another key", err, hub.NotFound, "enrolment-unknown")
	_, err = poll("transaction", newFactory(t).device("uuid:"+string(testDev), nil))
	wantCode(t, "a stranger", err, hub.Unauthenticated, "enrolment-unproven")
	_, err = poll("transaction")
	wantCode(t, "nobody", err, hub.Unauthenticated, "enrolment-unproven")
	_, err = o.Enrol(t.Context(), shown(leaf), nil, false)
	wantCode(t, "no request and no transaction", err, hub.Invalid, "csr-invalid")
	out, err := poll("transaction", leaf)
	if err != nil || !key.PublicKey.Equal(out.Chain[0].PublicKey) {
		t.Fatalf("after it was allowed: %v", err)
	}
	if again, err := poll("transaction", leaf); err != nil || again.Serial != out.Serial {
		t.Errorf("once more: %s, %v; want %s", again.Serial, err, out.Serial)
	}
}

// The registrar's key and certificate are made when somebody asks, and stay; a damaged file is left alone. It is no device's and not
// the hub's.
func TestRegistrar(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	file := filepath.Join(dir, "device-registrar.pem")
	a := open(t, dir)
	if _, err := os.Stat(file); err == nil {
		t.Error("there is a registrar that nobody asked for")
	}
	if _, err := a.Registrar().Sign(rand.Reader, make([]byte, 32), crypto.SHA256); err == nil {
		t.Error("it signed without a key")
	}
	var all sync.WaitGroup
	for range 4 {
		all.Go(func() {
			if _, err := a.Registrar().Certificate(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	cert, err := a.Registrar().Certificate()
	if err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(file); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("its file is %v, %v", info.Mode(), err)
	}
	if again, err := open(t, dir).Registrar().Certificate(); err != nil || !again.Equal(cert) {
		t.Errorf("after a restart it is another one, %v", err)
	}
	use := x509.VerifyOptions{Roots: a.DevicePool(), Intermediates: poolOf(a.DeviceIntermediates()...), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}}
	if _, err := cert.Verify(use); err != nil {
		t.Error(err)
	}
	for _, as := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
		use.KeyUsages = []x509.ExtKeyUsage{as}
		if _, err := cert.Verify(use); err == nil {
			t.Errorf("it is good for %v", as)
		}
	}
	if cert.IsCA || identityIn(cert.Subject) != "" || cert.NotAfter.Before(time.Now().AddDate(9, 0, 0)) {
		t.Errorf("%s, CA %v, until %v", cert.Subject, cert.IsCA, cert.NotAfter)
	}
	o := &office{t: t, own: owners{}}
	o.docs = newOffice(t).docs
	o.start(a)
	wantCode(t, "the registrar as a device", o.Vouch(t.Context(), []*x509.Certificate{cert}), hub.Unauthenticated, "enrolment-unproven")

	// Another issuing certificate signs it anew, for the same key.
	if err := a.Roll(Device, RollIssuing, nil); err != nil {
		t.Fatal(err)
	}
	again, err := a.Registrar().Certificate()
	if err != nil || again.Equal(cert) || again.CheckSignatureFrom(a.signer(Device).issuing) != nil || !again.PublicKey.(*rsa.PublicKey).Equal(cert.PublicKey) {
		t.Errorf("under another issuing certificate: %v", err)
	}
	for what, text := range map[string]string{"empty": "", "only a certificate": string(certPEM(cert)), "another key": string(certPEM(cert)) + keyText(t, rsaKey(t, 2048))} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := open(t, dir).Registrar().Certificate(); err == nil {
			t.Errorf("%s: taken", what)
		}
		if left, err := os.ReadFile(file); err != nil || string(left) != text {
			t.Errorf("%s: it was replaced", what)
		}
	}
	if err := os.Chmod(file, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, dir).Registrar().Certificate(); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a file that others can read: %v", err)
	}
}

func keyText(t *testing.T, key *rsa.PrivateKey) string {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

// A certificate that is named by issuer and serial number is looked for on the list of that issuer, also after another one has taken
// its place; of other issuers there is none.
func TestListOf(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	got, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), "uuid:"+string(testDev))
	if err != nil {
		t.Fatal(err)
	}
	leaf := got.Chain[0]
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{got.Serial}}, 0); err != nil {
		t.Fatal(err)
	}
	if err := o.a.Roll(Device, RollIssuing, nil); err != nil {
		t.Fatal(err)
	}
	for serial, by := range map[string]*x509.Certificate{got.Serial: got.Chain[1], "77": o.a.signer(Device).issuing} {
		n, _ := new(big.Int).SetString(serial, 16)
		der, err := o.ListOf(t.Context(), by.RawSubject, n)
		if err != nil {
			t.Fatal(err)
		}
		l, err := x509.ParseRevocationList(der)
		if err != nil || l.CheckSignatureFrom(by) != nil {
			t.Errorf("the list for %s is of %s, %v", serial, l.Issuer, err)
		}
		if on := len(l.RevokedCertificateEntries) == 1; on != (serial == got.Serial) {
			t.Errorf("the list for %s has %d certificates", serial, len(l.RevokedCertificateEntries))
		}
	}
	if _, err := o.ListOf(t.Context(), f.root.RawSubject, leaf.SerialNumber); !hub.IsKind(err, hub.NotFound) {
		t.Errorf("of another issuer: %v", err)
	}
}
