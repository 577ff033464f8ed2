// Package est has what EST (RFC 7030) is over HTTP and over CoAP alike: the paths, and the bodies that go to and fro.
//
// It must not know HTTP, CoAP, or who decides.
package est

import (
	"context"
	"crypto/x509"
	"encoding/asn1"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/smallstep/pkcs7"

	"github.com/coaphub/coaphub/hub"
)

// Path is where EST begins, over HTTP and CoAP alike (RFC 7030, Section 3.2.2; RFC 9148, Section 5.1).
const Path = "/.well-known/est/"

// Authority decides who gets a certificate.
type Authority interface {
	// Enrol gives a device a certificate; renew allows only another one in place of that which it showed. While somebody has to
	// decide, the error is Unavailable with the code "enrolment-waiting".
	Enrol(ctx context.Context, proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error)
	// Anchors are the device root in use, then another that there is while it is rolled over, and what issues under them.
	Anchors() []*x509.Certificate
}

// Anchors is the body with which a client is told whom to trust: all in FormatCertsOnly, or the root in FormatCert (RFC 9148,
// Section 5.3).
func Anchors(a Authority, format int32) ([]byte, error) {
	anchors := a.Anchors()
	if format == hub.FormatCert {
		return anchors[0].Raw, nil
	}
	return CertsOnly(anchors)
}

// Certificate is the body with which an enrolment is answered, in FormatCertsOnly or FormatCert: only the certificate that was issued
// (RFC 7030, Section 4.2.3).
func Certificate(out hub.Enrolled, format int32) ([]byte, error) {
	if format == hub.FormatCert {
		return out.Chain[0].Raw, nil
	}
	return CertsOnly(out.Chain[:1])
}

// CertsOnly packs certificates into a PKCS #7 SignedData that signs nothing (RFC 5272, Section 4.1), DER, in their order.
func CertsOnly(certs []*x509.Certificate) ([]byte, error) {
	var der []byte
	for _, c := range certs {
		der = append(der, c.Raw...)
	}
	b, err := pkcs7.DegenerateCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("pack certificates: %w", err)
	}
	return b, nil
}

// PEM is certificates as text, in their order.
func PEM(certs ...*x509.Certificate) string {
	var b strings.Builder
	for _, c := range certs {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a Builder takes all
	}
	return b.String()
}

// Roots are those of an authority's anchors that stand under no other: two while the root is rolled over, and the next one under the
// last is none.
func Roots(a Authority) []*x509.Certificate {
	return slices.DeleteFunc(slices.Clone(a.Anchors()), func(c *x509.Certificate) bool { return c.CheckSignatureFrom(c) != nil })
}

// Attributes is what the hub wants to see in a request (RFC 7030, Section 4.5.2), DER: a key of P-256, and its signature with
// SHA-256. Other keys are taken, too; most devices have code for this one.
var Attributes = attributes()

func attributes() []byte {
	type attribute struct {
		Type   asn1.ObjectIdentifier
		Values []asn1.ObjectIdentifier `asn1:"set"`
	}
	der, err := asn1.Marshal([]any{
		attribute{asn1.ObjectIdentifier{1, 2, 840, 10045, 2, 1}, []asn1.ObjectIdentifier{{1, 2, 840, 10045, 3, 1, 7}}},
		asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2},
	})
	if err != nil {
		panic(err) // constants
	}
	return der
}

var errBase64 = errors.New("the body is neither base64 nor DER")

// Decode reads a body of EST over HTTPS. It is base64, with line breaks or without; the transfer encoding that RFC 7030 had clients
// declare says nothing (RFC 8951, Section 3.1). DER is taken as it is, since some clients send it.
func Decode(body []byte) ([]byte, error) {
	if len(body) > 0 && body[0] == 0x30 { // a SEQUENCE: in base64 that would be the digit 0, with which none of ours begins
		return body, nil
	}
	text := make([]byte, 0, len(body))
	for _, c := range body {
		switch c {
		case ' ', '\t', '\r', '\n':
		default:
			text = append(text, c)
		}
	}
	der, err := base64.StdEncoding.AppendDecode(nil, text)
	if err != nil || len(der) == 0 {
		return nil, errBase64
	}
	return der, nil
}

// Encode writes a body of EST over HTTPS: base64 in lines of 64 (RFC 7030 examples; RFC 8951, Section 3.1 lets them be).
func Encode(der []byte) []byte {
	text := base64.StdEncoding.EncodeToString(der)
	out := make([]byte, 0, len(text)+len(text)/64+1)
	for len(text) > 64 {
		out = append(append(out, text[:64]...), '\n')
		text = text[64:]
	}
	return append(append(out, text...), '\n')
}
