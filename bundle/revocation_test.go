package bundle_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/hubtest"
)

// What another authority has revoked is kept in the data folder, for a start without a network.
func TestListsOfOthersAreKept(t *testing.T) {
	t.Parallel()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ca := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "other"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if ca, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}, ca, key)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(list) }))
	defer srv.Close()
	file := filepath.Join(t.TempDir(), "other.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	h := hubtest.Start(t, hubtest.WithConfig(fmt.Sprintf("coapGateway.api.coap.tls.caSets=[{name: other, cas: [%s], lists: [%s/a.crl]}]", file, srv.URL)))
	for deadline := time.Now().Add(10 * time.Second); ; {
		kept, err := filepath.Glob(filepath.Join(h.Data, "revocation", "*.crl"))
		if err != nil {
			t.Fatal(err)
		}
		if len(kept) == 1 {
			if b, err := os.ReadFile(kept[0]); err != nil || string(b) != string(list) {
				t.Errorf("kept is something else, %v", err)
			}
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("no list is kept")
		}
		<-time.After(10 * time.Millisecond)
	}
}
