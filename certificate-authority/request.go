package certificateauthority

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// maxRequest bounds a certificate signing request in PEM. One with a P-384 key and a dozen names has less than 2 KiB.
const maxRequest = 16 << 10

// request is what is taken of a certificate signing request: the key, and whose it is to be. All else in it is the profile's to
// say, so names, usages and extensions that it asks for are not even read.
type request struct {
	key    crypto.PublicKey
	spki   []byte // the same, DER
	device hub.DeviceID
	// vouched: a manufacturer says which device it is, so its ID does not count among those that the owner chose to keep.
	vouched bool
}

var commonName = asn1.ObjectIdentifier{2, 5, 4, 3}

// parseRequest reads a request for the device that it names: its subject is one common name, the device's ID with or without
// "uuid:" in front. All errors are Invalid or TooLarge.
func parseRequest(b []byte) (request, error) {
	csr, err := parseCSR(b, deviceUsage)
	if err != nil {
		return request{}, err
	}
	dev, err := subjectDevice(csr)
	return request{key: csr.PublicKey, spki: csr.RawSubjectPublicKeyInfo, device: dev}, err
}

// parseKey reads a request whose device others know. It returns the device that it names as identity certificates do, too; "" if
// its subject is anything else. rsaToo lets the key be RSA, too.
func parseKey(b []byte, rsaToo bool) (req request, named hub.DeviceID, err error) {
	use := deviceUsage
	use.rsa = rsaToo
	csr, err := parseCSR(b, use)
	if err != nil {
		return request{}, "", err
	}
	return request{key: csr.PublicKey, spki: csr.RawSubjectPublicKeyInfo}, identityIn(csr.Subject), nil
}

// identityIn is the device that a subject names by one common name "uuid:<id>" (OCF Security, 9.4.2.2.2); "" if it names none.
func identityIn(subject pkix.Name) hub.DeviceID {
	var dev hub.DeviceID
	for _, n := range subject.Names {
		if !n.Type.Equal(commonName) {
			continue
		}
		text, _ := n.Value.(string)
		id, ok := cutPrefix(text)
		parsed, err := hub.ParseDeviceID(id)
		if !ok || err != nil || dev != "" {
			return ""
		}
		dev = parsed
	}
	return dev
}

// cutPrefix takes "uuid:" off, which some write in capitals.
func cutPrefix(name string) (id string, ok bool) {
	const prefix = "uuid:"
	if len(name) > len(prefix) && strings.EqualFold(name[:len(prefix)], prefix) {
		return name[len(prefix):], true
	}
	return name, false
}

// parseCSR reads a PKCS #10 request (RFC 2986), PEM or DER, whose signature proves that the sender has the key, which is of a kind
// that the profile takes.
func parseCSR(b []byte, use usage) (*x509.CertificateRequest, error) {
	if len(b) > maxRequest {
		return nil, hub.NewError(hub.TooLarge, "csr-too-large", "a certificate signing request has at most 16 KiB")
	}
	if block, rest := pem.Decode(b); block != nil {
		// RFC 7468, Section 7 names the first; OpenSSL wrote the second for long.
		if block.Type != "CERTIFICATE REQUEST" && block.Type != "NEW CERTIFICATE REQUEST" || len(bytes.TrimSpace(rest)) > 0 {
			return nil, hub.NewError(hub.Invalid, "csr-invalid", "one PEM block of a certificate request is wanted")
		}
		b = block.Bytes
	}
	csr, err := x509.ParseCertificateRequest(b)
	if err != nil {
		return nil, hub.NewError(hub.Invalid, "csr-invalid", "this is no certificate signing request").With("x509", err)
	}
	if err := checkKey(csr.PublicKey, use); err != nil { // before its signature, which may cost more the larger the key
		return nil, err
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, hub.NewError(hub.Invalid, "csr-signature", "the request is not signed by its own key").With("x509", err)
	}
	return csr, nil
}

// checkKey takes the kinds of keys that a profile has.
func checkKey(key crypto.PublicKey, use usage) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
	case ed25519.PublicKey:
		return nil
	case *rsa.PublicKey:
		// NIST SP 800-56B, 6.2: an odd exponent above 2^16. Larger moduli cost who verifies, and give little.
		if bits := k.N.BitLen(); use.rsa && bits >= 2048 && bits <= 4096 && k.E > 1<<16 && k.E%2 == 1 {
			return nil
		}
	}
	if use.rsa {
		return hub.NewError(hub.Invalid, "csr-key", "the key must be of P-256, P-384, Ed25519 or RSA with 2048 to 4096 bits")
	}
	return hub.NewError(hub.Invalid, "csr-key", "the key must be of P-256, P-384 or Ed25519")
}

// subjectDevice is the device that a request names.
func subjectDevice(csr *x509.CertificateRequest) (hub.DeviceID, error) {
	bad := hub.NewError(hub.Invalid, "csr-name", "the request's common name must be uuid: and the device's ID, once")
	var name string
	for i, n := range csr.Subject.Names {
		text, ok := n.Value.(string)
		if i > 0 || !ok || !n.Type.Equal(commonName) {
			return "", bad
		}
		name = text
	}
	name, _ = cutPrefix(name)
	dev, err := hub.ParseDeviceID(name)
	if err != nil {
		return "", bad
	}
	return dev, nil
}
