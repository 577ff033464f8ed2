package certificateauthority

import (
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/revocation"
)

// Who says what is revoked is found from a device's certificate alone, also where he is above the group's CA: what a device leaves
// out does not bring it past its manufacturer's list.
func TestRevokedAboveTheGroupsCA(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	root := caOf("lamp root")
	root.KeyUsage |= x509.KeyUsageCRLSign
	f.root = f.make(root, nil, &f.rootKey.PublicKey, f.rootKey)
	key := newKey(t)
	issuing := f.make(caOf("lamp issuing"), f.root, &key.PublicKey, f.rootKey)
	leaf := f.make(&x509.Certificate{BasicConstraintsValid: true}, issuing, &newKey(t).PublicKey, key)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Chain = string(certPEM(issuing)) + string(certPEM(f.root)) })

	list := func(revoked ...*x509.Certificate) *revocation.Checker {
		t.Helper()
		l := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now().Add(-time.Hour), NextUpdate: time.Now().Add(time.Hour)}
		for _, c := range revoked {
			l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now()})
		}
		der, err := x509.CreateRevocationList(rand.Reader, l, f.root, f.rootKey)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), "crl")
		if err := os.WriteFile(file, der, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := revocation.New([]revocation.Set{{Name: "lamps", CAs: []*x509.Certificate{f.root}, Lists: []string{file}, Refresh: time.Hour}},
			"", slog.New(slog.DiscardHandler), nil)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	for _, c := range []struct {
		name         string
		lists        *revocation.Checker
		vouch, enrol string
	}{
		{"nobody says anything", nil, "", ""},
		{"its CA is revoked", list(issuing), "certificate-revoked", "certificate-revoked"},
		{"its CA has no list", list(), "", "revocation-unknown"}, // and is not in the set
	} {
		o.Factories(c.lists)
		err := o.Vouch(t.Context(), []*x509.Certificate{leaf})
		if code, _ := hub.Public(err); err != nil && code != c.vouch || err == nil && c.vouch != "" {
			t.Errorf("%s, in the handshake: %v", c.name, err)
		}
		_, err = o.enrol(shown(leaf), "")
		if code, _ := hub.Public(err); err != nil && code != c.enrol || err == nil && c.enrol != "" {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
