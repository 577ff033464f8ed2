package certificateauthority

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
)

// factory is a manufacturer: a root, and what signs its devices' certificates.
type factory struct {
	t       *testing.T
	root    *x509.Certificate
	rootKey *ecdsa.PrivateKey
}

func newFactory(t *testing.T) *factory {
	t.Helper()
	f := &factory{t: t, rootKey: newKey(t)}
	f.root = f.make(caOf("factory root"), nil, &f.rootKey.PublicKey, f.rootKey)
	return f
}

func caOf(name string) *x509.Certificate {
	return &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
}

// make signs a certificate with a year to go; parent nil is itself.
func (f *factory) make(t, parent *x509.Certificate, key crypto.PublicKey, by *ecdsa.PrivateKey) *x509.Certificate {
	f.t.Helper()
	serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
	if err != nil {
		f.t.Fatal(err)
	}
	t.SerialNumber = serial
	if t.NotAfter.IsZero() {
		t.NotBefore, t.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(1, 0, 0)
	}
	if parent == nil {
		parent = t
	}
	c, err := create(t, parent, key, by)
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

// device makes a device's factory certificate.
func (f *factory) device(name string, change func(*x509.Certificate)) *x509.Certificate {
	f.t.Helper()
	t := &x509.Certificate{Subject: pkix.Name{CommonName: name}, BasicConstraintsValid: true}
	if change != nil {
		change(t)
	}
	return f.make(t, f.root, &newKey(f.t).PublicKey, f.rootKey)
}

// group makes a group of alice's for the factory's devices.
func (o *office) group(f *factory, change func(*hub.EnrolmentGroup)) hub.EnrolmentGroup {
	o.t.Helper()
	g := hub.EnrolmentGroup{Name: "lamps", Owner: "alice", Chain: string(certPEM(f.root)), User: "operator"}
	if change != nil {
		change(&g)
	}
	g, err := o.SetGroup(o.t.Context(), g)
	if err != nil {
		o.t.Fatal(err)
	}
	return g
}

// enrol asks for a certificate for a new key under a name.
func (o *office) enrol(proof hub.EnrolmentProof, name string) (hub.Enrolled, error) {
	o.t.Helper()
	return o.Enrol(o.t.Context(), proof, csrOf(o.t, newKey(o.t), named(name)), false)
}

func shown(chain ...*x509.Certificate) hub.EnrolmentProof { return hub.EnrolmentProof{Chain: chain} }

const otherDev = hub.DeviceID("11111111-2222-4333-8444-555555555555")

// A device that its manufacturer vouches for gets a certificate with the profile's content, for the ID that the manufacturer or its
// key says, and whoever comes again with the same key gets the same one.
func TestEnrolByFactory(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, nil)
	leaf := f.device("uuid:"+string(testDev), nil)
	greedy := named("anything")
	greedy.DNSNames = []string{"hub.example"}
	greedy.ExtraExtensions = []pkix.Extension{{Id: asn1.ObjectIdentifier{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}}} // cA: true
	csr := csrOf(t, newKey(t), greedy)
	out, err := o.Enrol(t.Context(), shown(leaf), csr, false)
	if err != nil {
		t.Fatal(err)
	}
	c := out.Chain[0]
	if out.Device != testDev || c.Subject.String() != "CN=uuid:"+string(testDev) || c.IsCA || len(c.DNSNames) > 0 || len(out.Chain) != 2 {
		t.Errorf("enrolled as %s: %s, CA %v, names %v, chain of %d", out.Device, c.Subject, c.IsCA, c.DNSNames, len(out.Chain))
	}
	if _, err := c.Verify(x509.VerifyOptions{Roots: o.a.DevicePool(), Intermediates: poolOf(out.Chain[1]), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}); err != nil {
		t.Error(err)
	}
	again, err := o.Enrol(t.Context(), shown(leaf), csr, false)
	if err != nil || again.Serial != out.Serial {
		t.Errorf("the same request once more: %s, %v; want %s", again.Serial, err, out.Serial)
	}
	other, err := o.enrol(shown(leaf), "uuid:"+string(testDev))
	if err != nil || other.Serial == out.Serial || other.Device != testDev {
		t.Errorf("another key: %s of %s, %v", other.Serial, other.Device, err)
	}
	entries := o.list(hub.CertificateFilter{All: true, Serials: []string{out.Serial}})
	if len(entries) != 1 || entries[0].How != hub.ByFactory || entries[0].Owner != "alice" || !strings.Contains(entries[0].Proof, hub.SerialOf(leaf.SerialNumber)) {
		t.Errorf("the ledger has %+v", entries)
	}
	es := o.enrolled(hub.EnrolmentFilter{})
	if len(es) != 1 || es[0].State != hub.EnrolmentIssued || es[0].Group != g.ID || es[0].Serial != other.Serial {
		t.Errorf("enrolments: %+v", es)
	}
	// A key whose manufacturer names no device stands for one all the same, and always the same.
	plain := f.device("serial 4711", nil)
	first, err := o.enrol(shown(plain), "")
	if err != nil {
		t.Fatal(err)
	}
	second, err := o.enrol(shown(plain), "lamp")
	if err != nil || second.Device != first.Device || first.Device == testDev {
		t.Errorf("the same factory key as %s and %s, %v", first.Device, second.Device, err)
	}
}

func poolOf(cs ...*x509.Certificate) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range cs {
		p.AddCert(c)
	}
	return p
}

func (o *office) enrolled(f hub.EnrolmentFilter) (out []hub.Enrolment) {
	o.t.Helper()
	for e, err := range o.Enrolments(o.t.Context(), f) {
		if err != nil {
			o.t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// What does not lead to a group's CA is nothing, and what does not belong to the device neither. None of it leaves a certificate.
func TestEnrolRefuses(t *testing.T) {
	o, f, stranger := newOffice(t), newFactory(t), newFactory(t)
	o.group(f, nil)
	o.own[otherDev] = "bob"
	mine := f.device("uuid:"+string(testDev), nil)
	// The same name as the factory's root, and another key.
	twin := &factory{t: t, rootKey: newKey(t)}
	twin.root = twin.make(caOf("factory root"), nil, &twin.rootKey.PublicKey, twin.rootKey)
	// A certificate that is no CA's, and signs all the same.
	betweenKey := newKey(t)
	noCA := f.make(&x509.Certificate{Subject: pkix.Name{CommonName: "no CA"}, BasicConstraintsValid: true}, f.root, &betweenKey.PublicKey, f.rootKey)
	below := f.make(&x509.Certificate{Subject: pkix.Name{CommonName: "below"}, BasicConstraintsValid: true}, noCA, &newKey(t).PublicKey, betweenKey)
	ended := f.device("ended", func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	server := f.device("server", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} })
	hubs := f.device("uuid:"+string(o.a.hubID), nil)
	for name, c := range map[string]struct {
		proof hub.EnrolmentProof
		csr   string // common name
		renew bool
		kind  hub.Kind
		code  string
	}{
		"nothing":                              {hub.EnrolmentProof{}, "", false, hub.Unauthenticated, "enrolment-unproven"},
		"a stranger's CA":                      {shown(stranger.device("x", nil), stranger.root), "", false, hub.Unauthenticated, "enrolment-unproven"},
		"a CA of the same name":                {shown(twin.device("x", nil), twin.root), "", false, hub.Unauthenticated, "enrolment-unproven"},
		"signed by what is no CA":              {shown(below, noCA), "", false, hub.Unauthenticated, "enrolment-unproven"},
		"a factory certificate that has ended": {shown(ended), "", false, hub.Unauthenticated, "enrolment-unproven"},
		"a factory certificate for servers":    {shown(server), "", false, hub.Unauthenticated, "enrolment-unproven"},
		"another device's name":                {shown(mine), "uuid:" + string(otherDev), false, hub.Invalid, "csr-name"},
		"the hub's name":                       {shown(hubs), "", false, hub.Denied, "device-id-of-hub"},
		"another owner's device":               {shown(f.device("uuid:"+string(otherDev), nil)), "", false, hub.Denied, "device-owned-by-other"},
		"a renewal with a factory certificate": {shown(mine), "uuid:" + string(testDev), true, hub.Denied, "renewal-without-certificate"},
		"a token that there is not":            {hub.EnrolmentProof{Token: "x"}, "", false, hub.Unauthenticated, "token-unknown"},
		"the hub's own certificate":            {shown(hubLeaf(t, o)), "", false, hub.Denied, "device-id-of-hub"},
	} {
		_, err := o.Enrol(t.Context(), c.proof, csrOf(t, newKey(t), named(c.csr)), c.renew)
		wantCode(t, name, err, c.kind, c.code)
	}
	block := csrOf(t, newKey(t), named(""))
	_, err := o.Enrol(t.Context(), shown(mine), block[:len(block)/2], false)
	wantCode(t, "half a request", err, hub.Invalid, "csr-invalid")
	if got := o.list(hub.CertificateFilter{All: true}); len(got) > 0 {
		t.Errorf("the ledger has %d certificates of refused devices", len(got))
	}
}

// hubLeaf is what the hub shows to devices.
func hubLeaf(t *testing.T, o *office) *x509.Certificate {
	t.Helper()
	c, err := o.a.HubCertificate([]string{"localhost"})
	if err != nil {
		t.Fatal(err)
	}
	return c.Leaf
}

// Each group means its own devices.
func TestEnrolmentGroups(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	ended := f.device("uuid:"+string(testDev), func(c *x509.Certificate) {
		c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	})
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Allow = []hub.DeviceID{testDev}; g.Expired = true })
	if _, err := o.enrol(shown(ended), ""); err != nil {
		t.Errorf("a factory certificate that has ended, where such are taken: %v", err)
	}
	_, err := o.enrol(shown(f.device("uuid:"+string(otherDev), nil)), "")
	wantCode(t, "a device that the group does not name", err, hub.Denied, "enrolment-not-allowed")
	set := func(what string, g hub.EnrolmentGroup, code string) {
		t.Helper()
		_, err := o.SetGroup(t.Context(), g)
		if code == "" && err != nil || code != "" && !hub.IsKind(err, hub.Precondition) {
			t.Errorf("%s: %v", what, err)
		}
	}
	pem := string(certPEM(f.root))
	set("another owner's, all of the CA", hub.EnrolmentGroup{Owner: "bob", Chain: pem}, "group-ca-taken")
	set("another owner's, the same device", hub.EnrolmentGroup{Owner: "bob", Chain: pem, Allow: []hub.DeviceID{testDev}}, "group-ca-taken")
	set("another owner's, another device", hub.EnrolmentGroup{Owner: "bob", Chain: pem, Allow: []hub.DeviceID{otherDev}}, "")
	out, err := o.enrol(shown(f.device("uuid:"+string(otherDev), nil)), "")
	if err != nil || o.list(hub.CertificateFilter{All: true, Serials: []string{out.Serial}})[0].Owner != "bob" {
		t.Errorf("the other owner's device: %v", err)
	}
	g.Allow, g.Owner = nil, "bob"
	set("a change that takes the other's device", g, "group-ca-taken")
	if gs, err := o.Groups(t.Context(), "alice"); err != nil || len(gs) != 1 || !slices.Equal(gs[0].Allow, []hub.DeviceID{testDev}) {
		t.Errorf("alice's groups: %+v, %v", gs, err)
	}
	if removed, err := o.DeleteGroups(t.Context(), []string{g.ID, "none"}); err != nil || len(removed) != 1 {
		t.Errorf("removed %d groups, %v", len(removed), err)
	}
	o.start(o.a) // what is remembered is not what is stored
	_, err = o.enrol(shown(ended), "")
	wantCode(t, "after its group was removed", err, hub.Unauthenticated, "enrolment-unproven")
	for what, g := range map[string]hub.EnrolmentGroup{
		"no owner": {Chain: pem}, "no certificate": {Owner: "a"}, "a leaf": {Owner: "a", Chain: string(certPEM(ended))},
		"no PEM": {Owner: "a", Chain: "x"}, "a long name": {Owner: "a", Chain: pem, Name: strings.Repeat("x", 257)},
		"a name with a line feed": {Owner: "a", Chain: pem, Name: "a\nb"},
	} {
		if _, err := o.SetGroup(t.Context(), g); !hub.IsKind(err, hub.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
	for what, own := range map[string]*x509.Certificate{"the root": o.a.signer(Device).root, "what issues": o.a.signer(Device).issuing} {
		_, err := o.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: "a", Chain: string(certPEM(own))})
		wantCode(t, what+" of the hub as a manufacturer", err, hub.Invalid, "group-ca-own")
	}
	_, err = o.SetGroup(t.Context(), hub.EnrolmentGroup{ID: g.ID, Chain: pem})
	wantCode(t, "a group that there is not", err, hub.NotFound, "group-unknown")
}

// A second factory key for the same device is a person's to decide on.
func TestASecondFactoryKey(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	if _, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), ""); err != nil {
		t.Fatal(err)
	}
	second := shown(f.device("uuid:"+string(testDev), nil))
	_, err := o.enrol(second, "")
	wantCode(t, "another factory key", err, hub.Denied, "enrolment-device-taken")
	if gone, err := o.Forget(t.Context(), hub.EnrolmentFilter{Devices: []hub.DeviceID{testDev}}); err != nil || len(gone) != 1 {
		t.Fatalf("forgot %d, %v", len(gone), err)
	}
	if _, err := o.enrol(second, ""); err != nil {
		t.Errorf("after the first was forgotten: %v", err)
	}
}

// Where a person decides, the device waits, comes again, and gets its certificate once it is allowed.
func TestEnrolmentWaits(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Approval = true })
	leaf := shown(f.device("uuid:"+string(testDev), nil))
	for range 3 {
		_, err := o.enrol(leaf, "")
		wantCode(t, "before anybody decided", err, hub.Unavailable, "enrolment-waiting")
	}
	if es := o.enrolled(hub.EnrolmentFilter{States: []hub.EnrolmentState{hub.EnrolmentWaiting}}); len(es) != 1 || es[0].Device != testDev {
		t.Fatalf("waiting: %+v", es)
	}
	decide := func(allow bool) {
		t.Helper()
		if es, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, allow, "eve"); err != nil || len(es) != 1 {
			t.Fatalf("decided on %d, %v", len(es), err)
		}
	}
	decide(false)
	_, err := o.enrol(leaf, "")
	wantCode(t, "refused", err, hub.Denied, "enrolment-refused")
	decide(true)
	out, err := o.enrol(leaf, "")
	if err != nil {
		t.Fatal(err)
	}
	if c := o.list(hub.CertificateFilter{All: true, Serials: []string{out.Serial}}); len(c) != 1 || c[0].User != "eve" {
		t.Errorf("the ledger does not say who allowed it: %+v", c)
	}
	decide(false) // from now on
	_, err = o.enrol(leaf, "")
	wantCode(t, "refused after it had one", err, hub.Denied, "enrolment-refused")
	_, err = o.Enrol(t.Context(), shown(out.Chain[0]), csrOf(t, newKey(t), named("uuid:"+string(testDev))), true)
	wantCode(t, "a renewal of a device that was refused", err, hub.Denied, "enrolment-refused")
	_, err = o.Decide(t.Context(), "", []hub.DeviceID{otherDev}, true, "eve")
	wantCode(t, "a device that never came", err, hub.NotFound, "enrolment-unknown")
}

// A token is good once, for one device and one key; who lost the answer gets it again.
func TestEnrolByToken(t *testing.T) {
	o := newOffice(t)
	o.own[otherDev] = "bob"
	token, made, err := o.NewToken(t.Context(), "alice", testDev, 0, "operator")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(dump(o), token) {
		t.Error("the store has the token's text")
	}
	proof := hub.EnrolmentProof{Token: token}
	_, err = o.enrol(proof, "uuid:"+string(otherDev))
	wantCode(t, "for another device", err, hub.Invalid, "csr-name")
	csr := csrOf(t, newKey(t), named("uuid:"+string(testDev)))
	out, err := o.Enrol(t.Context(), proof, csr, false)
	if err != nil || out.Device != testDev {
		t.Fatalf("%s, %v", out.Device, err)
	}
	if again, err := o.Enrol(t.Context(), proof, csr, false); err != nil || again.Serial != out.Serial {
		t.Errorf("the same once more: %s, %v", again.Serial, err)
	}
	_, err = o.enrol(proof, "uuid:"+string(testDev))
	wantCode(t, "another key", err, hub.Unauthenticated, "token-unknown")
	// Refused, and its certificate revoked, it gets no other one for what is used up; a new token is a new decision.
	if _, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, false, "eve"); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{out.Serial}}, hub.RevokedUnspecified); err != nil {
		t.Fatal(err)
	}
	_, err = o.Enrol(t.Context(), proof, csr, false)
	wantCode(t, "the same once more after it was refused", err, hub.Denied, "enrolment-refused")
	if ts, err := o.Tokens(t.Context(), "alice"); err != nil || len(ts) != 1 || ts[0].ID != made.ID || ts[0].UsedBy != testDev {
		t.Errorf("tokens: %+v, %v", ts, err)
	}
	_, _, err = o.NewToken(t.Context(), "alice", otherDev, 0, "operator")
	wantCode(t, "a token for another owner's device", err, hub.Denied, "device-owned-by-other")
	_, _, err = o.NewToken(t.Context(), "alice", o.a.hubID, 0, "operator")
	wantCode(t, "a token for the hub", err, hub.Denied, "device-id-of-hub")
	// One for any device is for none of others, and is not used up by whoever tries.
	open, _, err := o.NewToken(t.Context(), "alice", "", time.Hour, "operator")
	if err != nil {
		t.Fatal(err)
	}
	_, err = o.enrol(hub.EnrolmentProof{Token: open}, "uuid:"+string(otherDev))
	wantCode(t, "any device, but another owner's", err, hub.Denied, "device-owned-by-other")
	if _, err := o.enrol(hub.EnrolmentProof{Token: open}, ""); err != nil {
		t.Errorf("any device: %v", err)
	}
	gone, made, err := o.NewToken(t.Context(), "alice", testDev, 0, "operator")
	if err != nil {
		t.Fatal(err)
	}
	if ts, err := o.DeleteTokens(t.Context(), "", []string{made.ID, "x"}); err != nil || len(ts) != 1 {
		t.Errorf("removed %d, %v", len(ts), err)
	}
	_, err = o.enrol(hub.EnrolmentProof{Token: gone}, "")
	wantCode(t, "a token that was removed", err, hub.Unauthenticated, "token-unknown")
}

// dump is all that the store has.
func dump(o *office) string {
	o.docs.Mu.Lock()
	defer o.docs.Mu.Unlock()
	var b strings.Builder
	for _, docs := range o.docs.Docs {
		for key, d := range docs {
			b.WriteString(key + string(d.Value))
		}
	}
	return b.String()
}

// Of many that come with one token at a time one gets a certificate.
func TestOneTokenManyKeys(t *testing.T) {
	o := newOffice(t)
	token, _, err := o.NewToken(t.Context(), "alice", "", 0, "operator")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var mu sync.Mutex
	got := 0
	for range 16 {
		csr := csrOf(t, newKey(t), named(""))
		wg.Go(func() {
			_, err := o.Enrol(context.Background(), hub.EnrolmentProof{Token: token}, csr, false)
			mu.Lock()
			defer mu.Unlock()
			if err == nil {
				got++
			} else if !hub.IsKind(err, hub.Unauthenticated) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if n := len(o.list(hub.CertificateFilter{All: true})); got != 1 || n != 1 {
		t.Errorf("%d got a certificate, the ledger has %d", got, n)
	}
}

// A device renews under the certificate that it has, as long as that is good, whoever owns it meanwhile.
func TestRenewal(t *testing.T) {
	o := newOffice(t)
	o.own[testDev] = "alice"
	first, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	renew := func(c *x509.Certificate, csr []byte) (hub.Enrolled, error) {
		return o.Enrol(t.Context(), shown(c), csr, true)
	}
	csr := csrOf(t, newKey(t), named("uuid:"+string(testDev)))
	out, err := renew(first, csr)
	if err != nil || out.Device != testDev {
		t.Fatal(err)
	}
	if again, err := renew(first, csr); err != nil || again.Serial != out.Serial {
		t.Errorf("the same once more: %s, %v", again.Serial, err)
	}
	// Its new certificate, and the same key again: that is a renewal of its own.
	if next, err := renew(out.Chain[0], csr); err != nil || next.Serial == out.Serial {
		t.Errorf("with the same key: %s, %v", next.Serial, err)
	}
	_, err = renew(first, csrOf(t, newKey(t), named("")))
	wantCode(t, "without its name", err, hub.Invalid, "csr-name")
	_, err = renew(first, csrOf(t, newKey(t), named("uuid:"+string(otherDev))))
	wantCode(t, "under another name", err, hub.Invalid, "csr-name")
	o.own[testDev] = "bob"
	late, err := renew(first, csrOf(t, newKey(t), named("uuid:"+string(testDev))))
	if err != nil || o.list(hub.CertificateFilter{All: true, Serials: []string{late.Serial}})[0].Owner != "bob" {
		t.Errorf("after its owner changed: %v", err)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(first.SerialNumber)}}, hub.RevokedUnspecified); err != nil {
		t.Fatal(err)
	}
	_, err = renew(first, csr)
	wantCode(t, "under a revoked certificate", err, hub.Unauthenticated, "certificate-revoked")
	wantCode(t, "the handshake with a revoked certificate", o.Vouch(t.Context(), []*x509.Certificate{first}), hub.Unauthenticated, "certificate-revoked")
	_, err = o.Enrol(t.Context(), shown(first, out.Chain[1]), csr, false)
	wantCode(t, "under a revoked certificate, and not as a renewal", err, hub.Unauthenticated, "certificate-revoked")
	if err := o.Vouch(t.Context(), []*x509.Certificate{late.Chain[0]}); err != nil {
		t.Errorf("the handshake with a good one: %v", err)
	}
}

// Who has the device's pre-shared key gets its certificate, and no other's.
func TestEnrolByPSK(t *testing.T) {
	o := newOffice(t)
	o.own[testDev] = "alice"
	out, err := o.enrol(hub.EnrolmentProof{PSK: testDev}, "")
	if err != nil || out.Device != testDev {
		t.Fatal(err)
	}
	if c := o.list(hub.CertificateFilter{All: true}); len(c) != 1 || c[0].How != hub.ByPSK || c[0].Owner != "alice" {
		t.Errorf("the ledger has %+v", c)
	}
	_, err = o.enrol(hub.EnrolmentProof{PSK: testDev}, "uuid:"+string(otherDev))
	wantCode(t, "another device's name", err, hub.Invalid, "csr-name")
}

// Whatever write fails, nobody has a certificate that the ledger does not, and the device gets one when it comes again.
func TestEnrolWhenTheStoreFails(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	o.start(o.a)
	leaf := shown(f.device("uuid:"+string(testDev), nil))
	down := &hub.Error{Kind: hub.Unavailable, Code: "disk-full", Text: "full"}
	csr := csrOf(t, newKey(t), named(""))
	for n := 0; ; n++ {
		count := 0
		o.docs.Mu.Lock()
		o.docs.Fail = func(string, string, string) error {
			if count++; count == n+1 {
				return down
			}
			return nil
		}
		o.docs.Mu.Unlock()
		out, err := o.Enrol(t.Context(), leaf, csr, false)
		o.docs.Mu.Lock()
		o.docs.Fail = nil
		o.docs.Mu.Unlock()
		if err != nil {
			if !hub.IsKind(err, hub.Unavailable) || out.Chain != nil {
				t.Fatalf("failure %d: %v, a chain of %d", n, err, len(out.Chain))
			}
			continue
		}
		if n < 5 {
			t.Fatalf("only %d operations of the store", n)
		}
		break
	}
	if n := len(o.list(hub.CertificateFilter{All: true})); n != 1 {
		t.Errorf("the ledger has %d certificates for one key", n)
	}
}

// Tokens end, and what nobody decides on is forgotten.
func TestEnrolmentTimes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, f := newOffice(t), newFactory(t)
		o.group(f, func(g *hub.EnrolmentGroup) { g.Approval = true })
		token, _, err := o.NewToken(t.Context(), "alice", testDev, time.Hour, "operator")
		if err != nil {
			t.Fatal(err)
		}
		leaf := shown(f.device("waits", nil))
		_, err = o.enrol(leaf, "")
		wantCode(t, "waits", err, hub.Unavailable, "enrolment-waiting")
		time.Sleep(time.Hour)
		_, err = o.enrol(hub.EnrolmentProof{Token: token}, "")
		wantCode(t, "a token that has ended", err, hub.Unauthenticated, "token-unknown")
		time.Sleep(waitsFor - 2*time.Hour)
		_, err = o.enrol(leaf, "")
		wantCode(t, "comes again", err, hub.Unavailable, "enrolment-waiting")
		sweep := func(left int) {
			t.Helper()
			if err := o.sweep(t.Context()); err != nil {
				t.Fatal(err)
			}
			if n := len(o.enrolled(hub.EnrolmentFilter{})); n != left {
				t.Errorf("%d enrolments, want %d", n, left)
			}
		}
		time.Sleep(2 * time.Hour)
		sweep(1) // it asked two hours ago
		if ts, err := o.Tokens(t.Context(), ""); err != nil || len(ts) != 1 {
			t.Errorf("%d tokens, %v", len(ts), err)
		}
		time.Sleep(waitsFor)
		sweep(0)
		if ts, err := o.Tokens(t.Context(), ""); err != nil || len(ts) != 0 {
			t.Errorf("%d tokens, %v", len(ts), err)
		}
	})
}

// Certificates of a fleet that came at once are due at different times, all of them well before their end.
func TestRenewAt(t *testing.T) {
	o := newOffice(t)
	seen := map[time.Duration]bool{}
	for range 20 {
		id, err := o.IssueDevice(t.Context(), testDev, DeviceValidity, "", "operator")
		if err != nil {
			t.Fatal(err)
		}
		c := firstOf(t, id.Chain)
		at, ours := o.RenewAt(c)
		left := c.NotAfter.Sub(at).Round(time.Second)
		if !ours || left > 60*24*time.Hour || left < 30*24*time.Hour {
			t.Errorf("due %v before its end, ours %v", left, ours)
		}
		seen[left] = true
	}
	if len(seen) < 15 {
		t.Errorf("20 certificates are due at %d times", len(seen))
	}
	short, err := o.IssueDevice(t.Context(), testDev, 5*time.Hour, "", "operator")
	if err != nil {
		t.Fatal(err)
	}
	c := firstOf(t, short.Chain)
	if at, _ := o.RenewAt(c); c.NotAfter.Sub(at) > 2*time.Hour || c.NotAfter.Sub(at) < time.Hour {
		t.Errorf("one of six hours is due %v before its end", c.NotAfter.Sub(at))
	}
	if _, ours := o.RenewAt(newFactory(t).root); ours {
		t.Error("another authority's certificate is taken for ours")
	}
}

// Whatever somebody writes into a group, it is an error of his, or certificates of CAs, each once and in their order.
func FuzzGroup(f *testing.F) {
	key := newKey(f)
	ca, err := create(&x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "factory"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0),
	}, caOf("factory"), &key.PublicKey, key)
	if err != nil {
		f.Fatal(err)
	}
	text := string(certPEM(ca))
	for _, chain := range []string{text, text + text, "\n" + text + "\n", text[:len(text)/2], strings.Replace(text, "MII", "MIJ", 1), "", "-----BEGIN CERTIFICATE-----\n-----END CERTIFICATE-----\n", "x" + text, text + "x"} {
		f.Add("lamps", chain, string(testDev))
		f.Add("\x00", chain, "")
	}
	f.Fuzz(func(t *testing.T, name, chain, dev string) {
		in := hub.EnrolmentGroup{Name: name, Owner: "alice", Chain: chain, Allow: []hub.DeviceID{hub.DeviceID(dev), hub.DeviceID(dev)}}
		g, err := readGroup(in)
		if err != nil {
			if code, _ := hub.Public(err); !hub.IsKind(err, hub.Invalid) && !hub.IsKind(err, hub.TooLarge) || code == "" {
				t.Errorf("%v", err)
			}
			return
		}
		if g.ca == nil || len(g.Allow) != 1 || 1+len(g.above) > strings.Count(chain, "BEGIN CERTIFICATE") {
			t.Errorf("%+v", g)
		}
		for _, c := range append([]*x509.Certificate{g.ca}, g.above...) {
			if !c.IsCA {
				t.Errorf("%s is no CA", c.Subject)
			}
		}
		// What was read can be read again, as it is at the next start.
		if _, err := readGroup(g.EnrolmentGroup); err != nil {
			t.Errorf("the second time: %v", err)
		}
		_, _ = g.verify([]*x509.Certificate{ca}, time.Now())
	})
}

// The report has what is weak and shared, of one owner or of all, and the metrics have its numbers.
func TestReportOfKeys(t *testing.T) {
	o := newOffice(t)
	o.own[testDev], o.own[otherDev] = "alice", "bob"
	token, _, err := o.NewToken(t.Context(), "bob", otherDev, 0, "operator")
	if err != nil {
		t.Fatal(err)
	}
	scep := hub.EnrolmentProof{Token: token, Transaction: "t"}
	weak, err := o.Enrol(t.Context(), scep, csrOf(t, rsaKey(t, 2048), named("")), false)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.sign("alice", testDev); err != nil {
		t.Fatal(err)
	}
	r, err := o.Report(t.Context(), "", time.Hour)
	if err != nil || r.Good != 2 || r.WeakKeys != 1 || len(r.Weak) != 1 || r.Weak[0].Serial != weak.Serial || r.Keys["RSA-2048"] != 1 || r.Keys["P-256"] != 1 {
		t.Errorf("of all: %+v, %v", r, err)
	}
	if r, err = o.Report(t.Context(), "alice", time.Hour); err != nil || r.Good != 1 || r.WeakKeys != 0 {
		t.Errorf("of alice: %+v, %v", r, err)
	}
	o.measure(t.Context())
	if n := testutil.ToFloat64(o.fleet.WithLabelValues("weak-key")); n != 1 {
		t.Errorf("the metric says %v", n)
	}
}

// What a manufacturer says which device it is does not count among the IDs that an owner may have kept, and is kept all the same.
func TestAProductionLine(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	for i := range maxReserved {
		if err := o.entitled(t.Context(), "alice", hub.DeviceID(fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i+1)), true); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), ""); err != nil {
		t.Errorf("one that a manufacturer vouches for: %v", err)
	}
	_, err := o.sign("alice", otherDev)
	wantCode(t, "one that its owner names", err, hub.Exhausted, "reservations-limit")
	_, err = o.sign("alice", testDev)
	wantCode(t, "the manufacturer's, named by its owner", err, hub.Exhausted, "reservations-limit")
	_, err = o.sign("bob", testDev)
	wantCode(t, "another owner", err, hub.Denied, "device-owned-by-other")
}
