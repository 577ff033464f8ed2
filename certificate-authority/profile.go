package certificateauthority

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// usage is what a profile lets a leaf's key do.
type usage struct {
	key x509.KeyUsage
	ext []x509.ExtKeyUsage
	oid []asn1.ObjectIdentifier
	// lists is the URL below which each issuer's revocation list has its name (RFC 5280, Section 4.2.1.13). "": none is named.
	lists string
	rsa   bool // keys of RSA are taken, too
	// responders are URLs at which its status can be asked for (RFC 5280, Section 4.2.2.1).
	responders []string
	extra      []pkix.Extension
}

var (
	// OCF Security, 9.4.2.2: identity certificates carry digitalSignature and keyAgreement, and peers play both roles.
	deviceUsage = usage{
		key: x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement,
		ext: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		oid: []asn1.ObjectIdentifier{OCFIdentity},
	}
	hubUsage = deviceUsage
	// What applications and services of an owner show to each other has no OCF usage, and is under another root than devices:
	// it identifies none at the devices' door.
	clientUsage  = usage{key: x509.KeyUsageDigitalSignature, ext: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}, rsa: true}
	serviceUsage = usage{
		key: x509.KeyUsageDigitalSignature, ext: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, rsa: true,
	}
	serverUsage = usage{key: x509.KeyUsageDigitalSignature, ext: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
)

// sign makes a key and a certificate for it. Hosts were checked by the caller.
func (s signer) sign(name string, validity time.Duration, use usage, hosts []string) (*x509.Certificate, crypto.Signer, error) {
	key, err := newECDSA()
	if err != nil {
		return nil, nil, err
	}
	cert, err := s.signKey(key.Public(), name, validity, use, hosts)
	return cert, key, err
}

// signKey makes a certificate for a key that somebody else has.
func (s signer) signKey(key crypto.PublicKey, name string, validity time.Duration, use usage, hosts []string) (*x509.Certificate, error) {
	now := time.Now()
	if !now.Before(s.issuing.NotAfter) || now.Before(s.issuing.NotBefore) {
		return nil, hub.NewError(hub.Unavailable, "issuing-certificate-expired", "the hub's issuing certificate is not valid now")
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	info, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode the public key of %s: %w", name, err)
	}
	id := sha256.Sum256(info)
	t := &x509.Certificate{
		SerialNumber:          serial,
		SubjectKeyId:          id[:20], // RFC 5280, Section 4.2.1.2, made as RFC 7093, Section 2 (4) has it
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             later(now.Add(-backdate), s.issuing.NotBefore),
		NotAfter:              earlier(now.Add(validity), s.issuing.NotAfter),
		KeyUsage:              use.key,
		ExtKeyUsage:           use.ext,
		UnknownExtKeyUsage:    use.oid,
		BasicConstraintsValid: true,
		OCSPServer:            use.responders,
		ExtraExtensions:       use.extra,
	}
	t.CRLDistributionPoints = listOf(use.lists, s.issuing)
	for _, h := range hosts {
		if ip, err := netip.ParseAddr(h); err == nil {
			t.IPAddresses = append(t.IPAddresses, net.IP(ip.WithZone("").AsSlice()))
		} else {
			t.DNSNames = append(t.DNSNames, h)
		}
	}
	if t.KeyUsage&x509.KeyUsageKeyAgreement != 0 {
		switch key.(type) {
		case *ecdsa.PublicKey:
		case *rsa.PublicKey: // it agrees on nothing, and the answer to a renewal by SCEP is encrypted to it
			t.KeyUsage ^= x509.KeyUsageKeyAgreement | x509.KeyUsageKeyEncipherment
		default:
			t.KeyUsage &^= x509.KeyUsageKeyAgreement // a key of Ed25519 signs only (RFC 8410, Section 5)
		}
	}
	return create(t, s.issuing, key, s.key)
}

// listOf is where the revocation list of an issuer is, below lists; nil if that is "".
func listOf(lists string, issuer *x509.Certificate) []string {
	if lists == "" {
		return nil
	}
	return []string{lists + nameOf(issuer.RawSubjectPublicKeyInfo)}
}

// newRoot makes a root's key and self-signed certificate. It signs issuing certificates, which sign leaves, and once the root that
// takes its place. That one is an intermediate to who knows this one only: of the same name, so that it does not count in the path
// (RFC 5280, Section 4.2.1.9), and the path length leaves room for it all the same, since crypto/x509 counts it.
func newRoot(r Root, hubID hub.DeviceID) (*x509.Certificate, crypto.Signer, error) {
	key, err := newECDSA()
	if err != nil {
		return nil, nil, err
	}
	t, err := authorityTemplate(fmt.Sprintf("coaphub %s root %s", r, hubID), rootYears)
	if err != nil {
		return nil, nil, err
	}
	t.MaxPathLen = 2
	cert, err := create(t, t, key.Public(), key)
	return cert, key, err
}

// newCross makes a certificate of a new root by the one before it.
func newCross(root, before *x509.Certificate, beforeKey crypto.Signer, lists string) (*x509.Certificate, error) {
	t, err := authorityTemplate(root.Subject.CommonName, rootYears)
	if err != nil {
		return nil, err
	}
	t.NotBefore, t.NotAfter = later(root.NotBefore, before.NotBefore), earlier(root.NotAfter, before.NotAfter)
	t.MaxPathLen = 1
	t.CRLDistributionPoints = listOf(lists, before)
	t.AuthorityKeyId = before.SubjectKeyId // crypto/x509 leaves it out of what has its issuer's name; OpenSSL would take it for self-signed
	return create(t, before, root.PublicKey, beforeKey)
}

// newIssuing makes the certificate of the key that signs leaves under root, the nth of r. Each has a name of its own: a revocation
// list is of an issuer's name (RFC 5280, Section 5).
func newIssuing(
	r Root, n int, hubID hub.DeviceID, root *x509.Certificate, rootKey crypto.Signer, key crypto.PublicKey, lists string,
) (*x509.Certificate, error) {
	name := fmt.Sprintf("coaphub %s issuing %s", r, hubID)
	if n > 1 {
		name = fmt.Sprintf("coaphub %s issuing %d %s", r, n, hubID)
	}
	t, err := authorityTemplate(name, issuingYears)
	if err != nil {
		return nil, err
	}
	t.NotBefore, t.NotAfter = later(t.NotBefore, root.NotBefore), earlier(t.NotAfter, root.NotAfter)
	t.MaxPathLenZero = true
	t.CRLDistributionPoints = listOf(lists, root)
	return create(t, root, key, rootKey)
}

// newECDSA makes a key of the kind that constrained devices verify best.
func newECDSA() (crypto.Signer, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	return key, nil
}

func authorityTemplate(name string, years int) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	now := time.Now()
	return &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             now.Add(-24 * time.Hour),
		NotAfter:              now.AddDate(years, 0, 0),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil
}

func create(t, parent *x509.Certificate, key crypto.PublicKey, parentKey crypto.Signer) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, t, parent, key, parentKey)
	if err != nil {
		return nil, fmt.Errorf("sign the certificate of %s: %w", t.Subject.CommonName, err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back the certificate of %s: %w", t.Subject.CommonName, err)
	}
	return cert, nil
}

// newSerial returns 128 random bits, positive and never zero (RFC 5280, 4.1.2.2): nothing has to be counted, and a serial
// says nothing about how many there are.
func newSerial() (*big.Int, error) {
	for {
		b := make([]byte, 16)
		if _, err := rand.Read(b); err != nil {
			return nil, fmt.Errorf("make a serial number: %w", err)
		}
		if n := new(big.Int).SetBytes(b); n.Sign() > 0 {
			return n, nil
		}
	}
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func earlier(a, b time.Time) time.Time {
	if a.Before(b) {
		return a
	}
	return b
}
