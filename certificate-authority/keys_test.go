package certificateauthority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/internal/store/storetest"
)

// vault is a module that has keys, signs with them, and never gives them away.
type vault struct{ held []*held }

type held struct {
	key    *ecdsa.PrivateKey
	signed int
}

func (h *held) Public() crypto.PublicKey { return h.key.Public() }

func (h *held) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	h.signed++
	return h.key.Sign(random, digest, opts)
}

func (v *vault) Create(Root) (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	v.held = append(v.held, &held{key: key})
	return v.held[len(v.held)-1], err
}

func (v *vault) Key(c *x509.Certificate) (crypto.Signer, error) {
	for _, h := range v.held {
		if h.key.PublicKey.Equal(c.PublicKey) {
			return h, nil
		}
	}
	return nil, errors.New("the module has no such key")
}

// Issuing keys may be in a module: their certificates are files without them, and everything is signed there.
func TestIssuingKeysElsewhere(t *testing.T) {
	dir, v := filepath.Join(t.TempDir(), "ca"), &vault{}
	if _, err := OpenWith(dir, testHub, v, ""); err != nil {
		t.Fatal(err)
	}
	a, err := OpenWith(dir, testHub, v, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range Roots() {
		text, err := os.ReadFile(filepath.Join(dir, string(r)+"-issuing.pem"))
		if err != nil || bytes.Contains(text, []byte("PRIVATE")) {
			t.Errorf("the %s issuing file has a key: %v", r, err)
		}
	}
	if len(v.held) != len(Roots()) {
		t.Fatalf("%d keys were made", len(v.held))
	}
	s, err := NewService(t.Context(), a, storetest.NewMemory(), owners{}, "", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	chain, err := s.Sign(t.Context(), "alice", "sub", csrOf(t, newKey(t), named(string(testDev))))
	if err != nil {
		t.Fatal(err)
	}
	between := x509.NewCertPool()
	between.AppendCertsFromPEM(chain)
	if _, err := firstOf(t, chain).Verify(x509.VerifyOptions{
		Roots: a.DevicePool(), Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}); err != nil {
		t.Error(err)
	}
	if _, err := s.List(t.Context(), s.Issuer()); err != nil {
		t.Error(err)
	}
	if v.held[0].signed != 2 {
		t.Errorf("the device issuing key has signed %d times, want a certificate and a list", v.held[0].signed)
	}
	for what, keys := range map[string]Keys{"no module": nil, "another module": &vault{}, "a module that errs": liar{}} {
		if _, err := OpenWith(dir, testHub, keys, ""); err == nil || !strings.Contains(err.Error(), "device-issuing.pem") {
			t.Errorf("%s: %v, want an error that names the file", what, err)
		}
	}
}

// liar finds another key than the one it was asked for.
type liar struct{}

func (liar) Create(Root) (crypto.Signer, error)           { return newECDSA() }
func (liar) Key(*x509.Certificate) (crypto.Signer, error) { return newECDSA() }

// Keys that were in files before there was a module go on.
func TestIssuingKeysInFilesGoOn(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	open(t, dir)
	a, err := OpenWith(dir, testHub, &vault{}, "")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.IssueDevice(testDev, time.Hour); err != nil {
		t.Error(err)
	}
}
