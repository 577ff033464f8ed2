package certificateauthority

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// registrarBits is the size of the registrar's key. Its certificate lasts as long as the one that issues.
const registrarBits = 3072

// registrarUsage is for messages alone. With an extended key usage that TLS has no use for (id-kp-cmcRA, RFC 6402, Section 2.10) it
// neither comes in as a device nor is taken for the hub.
var registrarUsage = usage{
	key: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyEncipherment,
	oid: []asn1.ObjectIdentifier{{1, 3, 6, 1, 5, 5, 7, 3, 28}},
}

// Registrar is the registration authority of SCEP (RFC 8894, Section 2.1.2), whose messages are encrypted to it: its key is RSA, which
// the authorities' are not. The key stays here; others have it decrypt and sign.
type Registrar struct {
	file    string
	issuing func() signer

	mu   sync.Mutex // guards all below
	cert *x509.Certificate
	key  *rsa.PrivateKey
}

// KeyOfRegistrar is what can be done with a Registrar's key, also where it is not.
type KeyOfRegistrar interface {
	crypto.Signer
	crypto.Decrypter
	Certificate() (*x509.Certificate, error)
}

// Registrar returns the one registrar of the authority.
func (a *Authority) Registrar() KeyOfRegistrar { return a.registrar }

func newRegistrar(dir string, issuing func() signer) *Registrar {
	return &Registrar{file: filepath.Join(dir, "device-registrar.pem"), issuing: issuing}
}

// Certificate returns the registrar's certificate, which the device root's issuing certificate has signed. The first one who asks has
// key and certificate made: a hub that no client of SCEP comes to has neither. The key stays when there is another certificate,
// because the old one has ended or another one issues. A file that is damaged is an error and never replaced.
func (r *Registrar) Certificate() (*x509.Certificate, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.fit() {
		return r.cert, nil
	}
	if err := r.read(); err != nil {
		return nil, err
	}
	if r.fit() {
		return r.cert, nil
	}
	key := r.key
	if key == nil {
		var err error
		if key, err = rsa.GenerateKey(rand.Reader, registrarBits); err != nil {
			return nil, fmt.Errorf("make the registrar's key: %w", err)
		}
	}
	cert, err := r.issuing().signKey(&key.PublicKey, "coaphub device registrar", issuingYears*366*24*time.Hour, registrarUsage, nil)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the registrar's key: %w", err)
	}
	text := append(certPEM(cert), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	if r.key == nil {
		err = writeNewSecret(r.file, text)
	} else {
		err = writeSecret(r.file, text)
	}
	if hub.IsKind(err, hub.Conflict) { // another authority with the same folder was faster: there is one key
		if err := r.read(); err != nil {
			return nil, err
		}
		return r.cert, nil
	}
	if err != nil {
		return nil, err
	}
	r.cert, r.key = cert, key
	return cert, nil
}

// read reads the file, if there is one. r.mu is held.
func (r *Registrar) read() error {
	cert, key, err := readRegistrar(r.file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	r.cert, r.key = cert, key
	return nil
}

// fit reports whether there is a certificate that is good. r.mu is held.
func (r *Registrar) fit() bool {
	now := time.Now()
	return r.key != nil && now.After(r.cert.NotBefore) && now.Before(r.cert.NotAfter) && r.cert.CheckSignatureFrom(r.issuing().issuing) == nil
}

var errNoKey = errors.New("the registrar has no key yet")

func (r *Registrar) private() *rsa.PrivateKey {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.key
}

// Public implements crypto.Signer and crypto.Decrypter; nil before there is a certificate.
func (r *Registrar) Public() crypto.PublicKey {
	if key := r.private(); key != nil {
		return &key.PublicKey
	}
	return nil
}

// Sign implements crypto.Signer.
func (r *Registrar) Sign(random io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	key := r.private()
	if key == nil {
		return nil, errNoKey
	}
	return key.Sign(random, digest, opts)
}

// Decrypt implements crypto.Decrypter.
func (r *Registrar) Decrypt(random io.Reader, msg []byte, opts crypto.DecrypterOpts) ([]byte, error) {
	key := r.private()
	if key == nil {
		return nil, errNoKey
	}
	return key.Decrypt(random, msg, opts)
}

// readRegistrar reads the registrar's file: its certificate, and its key. A file that does not exist is fs.ErrNotExist.
func readRegistrar(file string) (*x509.Certificate, *rsa.PrivateKey, error) {
	text, err := readSecret(file)
	if err != nil {
		return nil, nil, err
	}
	first, rest := pem.Decode(text)
	second, rest := pem.Decode(rest)
	if first == nil || second == nil || len(bytes.TrimSpace(rest)) > 0 {
		return nil, nil, damaged(file, errors.New("it is not a certificate and a key"))
	}
	cert, err := x509.ParseCertificate(first.Bytes)
	if err != nil {
		return nil, nil, damaged(file, err)
	}
	private, err := x509.ParsePKCS8PrivateKey(second.Bytes)
	if err != nil {
		return nil, nil, damaged(file, err)
	}
	key, ok := private.(*rsa.PrivateKey)
	if !ok || !key.PublicKey.Equal(cert.PublicKey) {
		return nil, nil, damaged(file, errors.New("certificate and private key do not belong together"))
	}
	return cert, key, nil
}
