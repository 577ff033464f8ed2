package coapgateway

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/asn1"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// ocfIdentity is the extended key usage of OCF identity certificates (OCF Security, 9.4.2.2.2).
var ocfIdentity = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 44924, 1, 6}

var commonName = asn1.ObjectIdentifier{2, 5, 4, 3}

// credential is what a connection proved about its device before it said a word.
type credential struct {
	device hub.DeviceID        // from the identity certificate or the pre-shared key, "" when there is none
	cert   *x509.Certificate   // nil when there is none
	chain  []*x509.Certificate // from cert to its root
	psk    bool                // the device has its pre-shared key
	key    [sha256.Size]byte   // of that key
	pin    string              // names the credential set: the certificate's root, "psk", or "token"
}

// print fingerprints the credential, "" without one; the provider repeats a code's answer only to the same one.
func (c credential) print() string {
	if c.psk {
		return "psk:" + string(c.device)
	}
	if c.cert == nil {
		return ""
	}
	sum := sha256.Sum256(c.cert.Raw)
	return hex.EncodeToString(sum[:16])
}

// identify returns the device of an identity certificate: exactly one common name "uuid:<id>", usable by a client, marked as
// an OCF identity, and not the hub itself. The chain was verified by TLS. All refusals are Unauthenticated.
func identify(cert *x509.Certificate, self hub.DeviceID) (hub.DeviceID, error) {
	var names []string
	for _, n := range cert.Subject.Names {
		if n.Type.Equal(commonName) {
			s, _ := n.Value.(string)
			names = append(names, s)
		}
	}
	if len(names) != 1 {
		return "", unauthenticated("certificate-name", "the certificate needs exactly one common name")
	}
	const prefix = "uuid:"
	name := names[0]
	if len(name) < len(prefix) || !strings.EqualFold(name[:len(prefix)], prefix) {
		return "", unauthenticated("certificate-name", "the certificate's common name is not uuid:<device ID>")
	}
	dev, err := hub.ParseDeviceID(name[len(prefix):])
	if err != nil {
		return "", unauthenticated("certificate-name", "the certificate's common name is not uuid:<device ID>")
	}
	if !slices.Contains(cert.ExtKeyUsage, x509.ExtKeyUsageClientAuth) {
		return "", unauthenticated("certificate-usage", "the certificate is not for client authentication")
	}
	if !slices.ContainsFunc(cert.UnknownExtKeyUsage, ocfIdentity.Equal) {
		return "", unauthenticated("certificate-usage", "the certificate is not an OCF identity certificate")
	}
	if dev == self {
		return "", unauthenticated("certificate-of-hub", "the certificate is the hub's own")
	}
	return dev, nil
}

// pins has the trusted certificates that are no roots, and roots that took the place of others, by the certificate's bytes.
type pins map[string]anchor

// anchor is one of them: the pin of whoever comes with a chain that ends there, and how the chain would go on.
type anchor struct {
	pin   string
	above []*x509.Certificate
}

// whole is a verified chain to its root.
func (p pins) whole(chain []*x509.Certificate) []*x509.Certificate {
	if len(chain) == 0 {
		return nil
	}
	return append(slices.Clip(chain), p[string(chain[len(chain)-1].Raw)].above...)
}

// of names the set of CAs that vouched for a verified chain, by its root. A chain that ends at an intermediate has its
// root's name too: a device is the same whether it sends its whole chain or its own certificate only, and stays so when the
// intermediate is replaced.
func (p pins) of(chain []*x509.Certificate) string {
	top := chain[len(chain)-1]
	if a, ok := p[string(top.Raw)]; ok {
		return a.pin
	}
	return pinOf(top)
}

// join gives all roots of a set the pin of the first, and what is under them.
func (p pins) join(set []*x509.Certificate) {
	for _, root := range set {
		is, name := pinOf(root), pinOf(set[0])
		p[string(root.Raw)] = anchor{pin: name}
		for raw, a := range p {
			if a.pin == is {
				p[raw] = anchor{name, a.above}
			}
		}
	}
}

// pinsUnder has the pins of those CAs that chain to one of the roots, and an error if one does not or may not sign.
func pinsUnder(roots *x509.CertPool, cas []*x509.Certificate) (pins, error) {
	between := x509.NewCertPool()
	for _, ca := range cas {
		between.AddCert(ca)
	}
	known := make(pins)
	var errs []error
	for _, ca := range cas {
		chains, err := ca.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		switch {
		case err != nil:
			errs = append(errs, err)
		case !ca.BasicConstraintsValid || !ca.IsCA:
			errs = append(errs, fmt.Errorf("%s is not a CA", ca.Subject))
		default:
			known[string(ca.Raw)] = anchor{pinOf(chains[0][len(chains[0])-1]), chains[0][1:]}
		}
	}
	return known, errors.Join(errs...)
}

func pinOf(root *x509.Certificate) string {
	sum := sha256.Sum256(root.Raw)
	return "identity-ca:" + hex.EncodeToString(sum[:8])
}

// rules decides which device a request on the account paths is about (the table in docs/protocol.md). claimed tells whether
// a device ID claim is configured.
type rules struct {
	certificate bool // clientCertificateRequired, on a secure connection
	claim       bool // deviceIDClaim is set
	strict      bool // strictDeviceID
}

// before returns the device as far as it is known before there is a token: the certificate's, else the request's di. In the
// row that takes the device from the claim alone it is "".
func (r rules) before(cred credential, di string) (hub.DeviceID, error) {
	if r.certificate {
		if cred.device == "" {
			return "", unauthenticated("device-id-missing", "the certificate has no device ID")
		}
		return cred.device, r.compare(cred.device, di)
	}
	switch {
	case r.claim:
		return "", nil // di is ignored; the claim decides
	case di == "":
		return "", invalid("device-id-missing", "di is missing")
	}
	return hub.ParseDeviceID(di)
}

// device returns the device that the request is about, once its token was verified. guess is what before returned.
func (r rules) device(cred credential, guess hub.DeviceID, di string, c hub.Claims) (hub.DeviceID, error) {
	dev := guess
	// An application's token, whatever its scopes, must not act as a device: it would sign it in, or off.
	if c.MarksDevices && !c.Device {
		return "", unauthenticated("token-not-of-device", "the token is not a device's")
	}
	if r.claim {
		claimed, err := hub.ParseDeviceID(c.DeviceID)
		switch {
		case c.DeviceID == "":
			return "", unauthenticated("device-claim-missing", "the token has no device ID")
		case err != nil:
			return "", unauthenticated("device-claim-invalid", "the token's device ID is not a UUID")
		case r.certificate && claimed != cred.device:
			return "", unauthenticated("device-claim-mismatch", "the token is for another device than the certificate")
		}
		dev = claimed
		if err := r.compare(dev, di); err != nil {
			return "", err
		}
	}
	// A device's own token is good for that device alone, also where no claim is configured.
	if c.Device && c.DeviceID != "" {
		if own, err := hub.ParseDeviceID(c.DeviceID); err != nil || own != dev {
			return "", unauthenticated("device-claim-mismatch", "the token is for another device")
		}
	}
	return dev, nil
}

// compare refuses a di that names another device than the credential, if strictDeviceID asks for it.
func (r rules) compare(dev hub.DeviceID, di string) error {
	if !r.strict || di == "" {
		return nil
	}
	if named, err := hub.ParseDeviceID(di); err != nil || named != dev {
		return unauthenticated("device-id-mismatch", "di names another device than the credential")
	}
	return nil
}

// before is rules.before, and refuses the device if it is not let in.
func (p *peer) before(di string) (hub.DeviceID, error) {
	dev, err := p.rules().before(p.cred, di)
	if err == nil {
		err = p.gw.deps.Denied(dev, nil)
	}
	return dev, err
}

// named is rules.device, and refuses the device if it is not let in. What it was guessed to be is returned beside an error.
func (p *peer) named(guess hub.DeviceID, di string, c hub.Claims) (hub.DeviceID, error) {
	dev, err := p.rules().device(p.cred, guess, di, c)
	if err != nil {
		return guess, err
	}
	return dev, p.gw.deps.Denied(dev, nil)
}
