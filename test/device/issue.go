package device

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"fmt"
	"math/big"
	"time"
)

// ocfIdentity is the extended key usage of OCF identity certificates (OCF Security, 9.4.2.2.2).
var ocfIdentity = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 44924, 1, 6}

// Issue makes an identity certificate of a device, signed by a CA, which comes behind it in the chain, and its key, both PEM.
func Issue(ca tls.Certificate, id string) (chain, key []byte, err error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make a key: %w", err)
	}
	now := time.Now()
	leaf, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber:       new(big.Int).SetBytes([]byte(rand.Text()[:16])),
		Subject:            pkix.Name{CommonName: "uuid:" + id},
		NotBefore:          now.Add(-time.Hour), // for clocks that are behind
		NotAfter:           now.Add(7 * 24 * time.Hour),
		KeyUsage:           x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement,
		ExtKeyUsage:        []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{ocfIdentity}, BasicConstraintsValid: true,
	}, ca.Leaf, private.Public(), ca.PrivateKey)
	if err != nil {
		return nil, nil, fmt.Errorf("sign the certificate: %w", err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		return nil, nil, fmt.Errorf("write the key: %w", err)
	}
	for _, c := range append([][]byte{leaf}, ca.Certificate...) {
		chain = append(chain, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	return chain, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}
