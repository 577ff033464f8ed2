package device

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"strings"
)

// TLS makes a device's side of the handshake from PEM texts: the CA it believes, and its own certificate chain and key, both
// nil for a device without certificate. The hub's host name is not compared, as OCF devices do not have one to compare with:
// with hubID not empty the hub must show the common name uuid:<hubID> (OCF Security: the sid of the cloud configuration).
func TLS(ca, chain, key []byte, hubID string) (*tls.Config, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(ca) {
		return nil, errors.New("the CA has no PEM certificate")
	}
	cfg := &tls.Config{
		MinVersion:         tls.VersionTLS12,
		CurvePreferences:   []tls.CurveID{tls.CurveP256}, // the one that devices have (RFC 7252, Section 9.1.3.2)
		RootCAs:            pool,
		InsecureSkipVerify: true, // VerifyConnection below verifies all but the host name
		VerifyConnection: func(cs tls.ConnectionState) error {
			rest := x509.NewCertPool()
			for _, c := range cs.PeerCertificates[1:] {
				rest.AddCert(c)
			}
			leaf := cs.PeerCertificates[0]
			opts := x509.VerifyOptions{Roots: pool, Intermediates: rest, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
			if _, err := leaf.Verify(opts); err != nil {
				return fmt.Errorf("verify the hub's certificate: %w", err)
			}
			if want := "uuid:" + hubID; hubID != "" && !strings.EqualFold(leaf.Subject.CommonName, want) {
				return fmt.Errorf("the hub's certificate is of %q, not of %q", leaf.Subject.CommonName, want)
			}
			return nil
		},
	}
	if chain != nil {
		pair, err := tls.X509KeyPair(chain, key)
		if err != nil {
			return nil, fmt.Errorf("the device's certificate: %w", err)
		}
		cfg.Certificates = []tls.Certificate{pair}
	}
	return cfg, nil
}

// TLSFiles is TLS with the files that `coaphub onboard --out` and `coaphub ca issue` write; certFile and keyFile may both be
// empty.
func TLSFiles(caFile, certFile, keyFile, hubID string) (*tls.Config, error) {
	ca, err := os.ReadFile(caFile)
	if err != nil {
		return nil, fmt.Errorf("read the CA: %w", err)
	}
	if certFile == "" && keyFile == "" {
		return TLS(ca, nil, nil, hubID)
	}
	chain, err := os.ReadFile(certFile)
	if err != nil {
		return nil, fmt.Errorf("read the device's certificate: %w", err)
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		return nil, fmt.Errorf("read the device's key: %w", err)
	}
	return TLS(ca, chain, key, hubID)
}
