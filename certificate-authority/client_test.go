package certificateauthority

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net"
	"slices"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// greedy asks for all that makes a device, a host, and an authority.
func greedy() x509.CertificateRequest {
	return x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "uuid:" + string(testDev), Organization: []string{"x"}}, DNSNames: []string{"hub.example"},
		IPAddresses: []net.IP{{127, 0, 0, 1}}, EmailAddresses: []string{"a@b.c"},
		ExtraExtensions: []pkix.Extension{
			{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 3, 1, 1, 0xff}},                                      // cA: true
			{Id: []int{2, 5, 29, 37}, Value: []byte{0x30, 12, 6, 10, 0x2b, 6, 1, 4, 1, 0x82, 0xde, 0x7c, 1, 6}},                // OCF identity
			{Id: []int{2, 5, 29, 15}, Critical: true, Value: []byte{3, 2, 1, 6}}, {Id: []int{1, 2, 3, 4}, Value: []byte{5, 0}}, // keyCertSign
		},
	}
}

// isNoDevice checks what all certificates have that are no device's.
func (o *office) isNoDevice(what string, chain []byte, p hub.Profile) *x509.Certificate {
	o.t.Helper()
	leaf := firstOf(o.t, chain)
	between := x509.NewCertPool()
	between.AppendCertsFromPEM(chain)
	opts := x509.VerifyOptions{Roots: o.a.Pool(HTTPS), Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	if _, err := leaf.Verify(opts); err != nil {
		o.t.Errorf("%s: %v", what, err)
	}
	for _, c := range o.a.DeviceIntermediates() {
		between.AddCert(c)
	}
	if opts.Roots = o.a.DevicePool(); o.believes(leaf) {
		o.t.Errorf("%s: it is under the root of devices", what)
	} else if _, err := leaf.Verify(opts); err == nil {
		o.t.Errorf("%s: its chain leads to the root of devices", what)
	}
	if leaf.IsCA || leaf.KeyUsage != x509.KeyUsageDigitalSignature || len(leaf.UnknownExtKeyUsage)+len(leaf.EmailAddresses) > 0 || len(leaf.Subject.Names) != 1 {
		o.t.Errorf("%s: CA %t, usages %b %v, %s", what, leaf.IsCA, leaf.KeyUsage, leaf.UnknownExtKeyUsage, leaf.Subject)
	}
	https := o.a.signer(HTTPS)
	if !slices.Equal(leaf.CRLDistributionPoints, []string{"https://hub.example:8080" + ListsPath + https.name}) {
		o.t.Errorf("%s: its list is %v", what, leaf.CRLDistributionPoints)
	}
	got := o.list(hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(leaf.SerialNumber)}})
	if len(got) != 1 || got[0].Device != "" || got[0].Profile != p || got[0].Issuer != https.name || got[0].Name != leaf.Subject.CommonName || got[0].User != "sub" {
		o.t.Errorf("%s: the ledger has %+v", what, got)
	}
	return leaf
}

// An application gets a certificate of its owner, whatever its request asks for.
func TestSignClient(t *testing.T) {
	o := newOffice(t)
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	long := hub.Owner("auth0|" + strings.Repeat("x", 100))
	for owner, want := range map[hub.Owner]string{
		"alice": "owner:alice", hub.Owner(testDev): "owner:" + string(testDev), "uuid:" + hub.Owner(testHub): "owner:uuid:" + testHub,
		long: clientName(long), "a\nb": clientName("a\nb"),
	} {
		chain, err := o.SignClient(t.Context(), owner, "sub", csrOf(t, rsaKey, greedy()))
		if err != nil {
			t.Errorf("%q: %v", owner, err)
			continue
		}
		leaf := o.isNoDevice(string(owner), chain, hub.ForClient)
		if leaf.Subject.CommonName != want || len(want) > maxCommonName || len(leaf.DNSNames)+len(leaf.IPAddresses) > 0 ||
			!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}) {
			t.Errorf("%q: %s, %v, for %v", owner, leaf.Subject, leaf.DNSNames, leaf.ExtKeyUsage)
		}
		if n := len(o.list(hub.CertificateFilter{Owner: owner})); n != 1 {
			t.Errorf("%q sees %d", owner, n)
		}
	}
	if !strings.HasPrefix(clientName(long), "owner-id:") || clientName(long) == clientName(long+"x") {
		t.Errorf("names are %q and %q", clientName(long), clientName(long+"x"))
	}
	_, err = o.SignClient(t.Context(), "", "sub", csrOf(t, rsaKey, greedy()))
	wantCode(t, "no owner", err, hub.Denied, "owner-missing")
}

// A service gets the hosts that the operator has named, and none that its request asks for.
func TestSignService(t *testing.T) {
	o := newOffice(t)
	chain, err := o.SignService(t.Context(), "admin", "sub", []string{"a.example", "*.b.example", "::1"}, csrOf(t, newKey(t), greedy()))
	if err != nil {
		t.Fatal(err)
	}
	leaf := o.isNoDevice("service", chain, hub.ForService)
	if leaf.Subject.CommonName != "a.example" || !slices.Equal(leaf.DNSNames, []string{"a.example", "*.b.example"}) || len(leaf.IPAddresses) != 1 ||
		!slices.Equal(leaf.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}) {
		t.Errorf("%s, %v %v, for %v", leaf.Subject, leaf.DNSNames, leaf.IPAddresses, leaf.ExtKeyUsage)
	}
	for name, c := range map[string]struct {
		hosts []string
		kind  hub.Kind
		code  string
	}{
		"none":             {nil, hub.Invalid, "hosts-missing"},
		"too many":         {slices.Repeat([]string{"a.example"}, maxHosts+1), hub.TooLarge, "hosts-too-many"},
		"with a port":      {[]string{"a.example:443"}, hub.Invalid, "host-invalid"},
		"a device":         {[]string{"a.example", string(testDev)}, hub.Invalid, "host-invalid"},
		"a device in full": {[]string{"uuid:" + string(testDev)}, hub.Invalid, "host-invalid"},
		"the hub":          {[]string{testHub}, hub.Invalid, "host-invalid"},
		"too long":         {[]string{strings.Repeat("a", maxCommonName) + ".example"}, hub.Invalid, "host-invalid"},
	} {
		_, err := o.SignService(t.Context(), "admin", "sub", c.hosts, csrOf(t, newKey(t), greedy()))
		wantCode(t, name, err, c.kind, c.code)
	}
}

// Keys are of the kinds that a profile has: RSA is for servers and applications, and not for devices.
func TestKeysOfProfiles(t *testing.T) {
	o := newOffice(t)
	for bits, good := range map[int]bool{1024: false, 2048: true, 4096: true, 4104: false} {
		key := &rsa.PublicKey{N: new(big.Int).Lsh(big.NewInt(1), uint(bits-1)), E: 1<<16 + 1}
		if err := checkKey(key, clientUsage); (err == nil) != good {
			t.Errorf("%d bits: %v", bits, err)
		}
		if err := checkKey(key, deviceUsage); err == nil {
			t.Errorf("%d bits for a device", bits)
		}
		key.E = 3
		if err := checkKey(key, clientUsage); err == nil {
			t.Errorf("%d bits with an exponent of 3", bits)
		}
	}
	csr := csrOf(t, newKey(t), greedy())
	block, _ := pem.Decode(csr)
	block.Bytes[len(block.Bytes)-1] ^= 1
	_, err := o.SignClient(t.Context(), "alice", "sub", block.Bytes)
	wantCode(t, "a forged signature", err, hub.Invalid, "csr-signature")
}

// What is no device's is bounded by its name, revoked like all others, on the list of its own issuer, and a key that is known to
// somebody gets none.
func TestOthersEnd(t *testing.T) {
	o := newOffice(t)
	key := newKey(t)
	var err error
	for range maxLive {
		if _, err = o.SignClient(t.Context(), "alice", "sub", csrOf(t, key, greedy())); err != nil {
			t.Fatal(err)
		}
	}
	_, err = o.SignClient(t.Context(), "alice", "sub", csrOf(t, key, greedy()))
	wantCode(t, "one more", err, hub.Exhausted, "certificates-limit")
	if _, err = o.SignClient(t.Context(), "bob", "sub", csrOf(t, key, greedy())); err != nil {
		t.Errorf("bob: %v", err)
	}
	if cs, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "alice", Names: []string{"owner:alice"}}, hub.RevokedKeyCompromise); err != nil || len(cs) != maxLive {
		t.Errorf("%d, %v", len(cs), err)
	}
	if n := len(o.revocationsOf(o.a.signer(HTTPS))); n != maxLive {
		t.Errorf("%d are on the list", n)
	}
	if n := len(o.revocationsOf(o.a.signer(Device))); n != 0 {
		t.Errorf("%d are on the list of devices", n)
	}
	_, err = o.SignClient(t.Context(), "alice", "sub", csrOf(t, key, greedy()))
	wantCode(t, "the same key", err, hub.Denied, "csr-key-compromised")
	if _, err = o.SignClient(t.Context(), "alice", "sub", csrOf(t, newKey(t), greedy())); err != nil {
		t.Errorf("after the others were revoked: %v", err)
	}
	if r, err := o.Report(t.Context(), "", 2*clientValidity); err != nil || r.Good+r.Revoked+r.Expires != 0 {
		t.Errorf("devices: %+v, %v", r, err)
	}
	o.docs.Fail = func(op, collection, _ string) error {
		if op == "put" && collection == collCertificates {
			return &hub.Error{Kind: hub.Unavailable}
		}
		return nil
	}
	if chain, err := o.SignClient(t.Context(), "carol", "sub", csrOf(t, newKey(t), greedy())); !hub.IsKind(err, hub.Unavailable) || chain != nil {
		t.Errorf("a store that takes nothing: %v", err)
	}
}
