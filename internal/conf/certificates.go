package conf

import (
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"strings"
)

// Certificates reads certificates from files or PEM texts.
func Certificates(sources []string) ([]*x509.Certificate, error) {
	var out []*x509.Certificate
	for _, s := range sources {
		data := []byte(s)
		if !strings.Contains(s, "-----BEGIN ") {
			var err error
			if data, err = os.ReadFile(s); err != nil {
				return nil, fmt.Errorf("read CA file: %w", err)
			}
		}
		before := len(out)
		for len(data) > 0 {
			var block *pem.Block
			if block, data = pem.Decode(data); block == nil {
				break
			}
			if block.Type != "CERTIFICATE" {
				continue
			}
			cert, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				return nil, fmt.Errorf("parse CA certificate: %w", err)
			}
			out = append(out, cert)
		}
		if len(out) == before {
			return nil, fmt.Errorf("a CA file or text has no certificate")
		}
	}
	return out, nil
}
