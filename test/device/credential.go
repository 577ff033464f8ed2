package device

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
)

// The resources by which a device's certificate is renewed (OCF Security, 13.2 and 13.3). They are not published.
const (
	csrHref  = "/oic/sec/csr"
	credHref = "/oic/sec/cred"
)

// identity is the device's side of the handshake, with the certificate that it has now.
func (d *Device) identity() *tls.Config {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.tls
}

// Certificate is the certificate that the device has now; nil for one without.
func (d *Device) Certificate() *x509.Certificate {
	conf := d.identity()
	if conf == nil || len(conf.Certificates) == 0 {
		return nil
	}
	return conf.Certificates[0].Leaf
}

// csr asks for another certificate for the key that the device has, as iotivity-lite does. Callers hold mu.
func (d *Device) csr() reply {
	if d.tls == nil || len(d.tls.Certificates) == 0 {
		return notFound
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "uuid:" + d.cfg.ID}},
		d.tls.Certificates[0].PrivateKey)
	if err != nil {
		return reply{code: codes.InternalServerError, text: "the request cannot be signed"}
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	return reply{code: codes.Content, body: map[string]any{"csr": string(text), "encoding": "oic.sec.encoding.pem"}}
}

// takeCertificate takes a certificate for the device's key; it is shown in the next handshake. Callers hold mu.
func (d *Device) takeCertificate(m *pool.Message) reply {
	refused := reply{code: codes.BadRequest, text: "there is no certificate for the device's key"}
	payload, err := m.ReadBody()
	if err != nil || d.tls == nil || len(d.tls.Certificates) == 0 {
		return refused
	}
	var body struct {
		Creds []struct {
			Type   int    `cbor:"credtype"`
			Usage  string `cbor:"credusage"`
			Public struct {
				Data string `cbor:"data"`
			} `cbor:"publicdata"`
		} `cbor:"creds"`
	}
	if decoder.Unmarshal(payload, &body) != nil || len(body.Creds) != 1 || body.Creds[0].Type != 8 || body.Creds[0].Usage != "oic.sec.cred.cert" {
		return refused
	}
	next := tls.Certificate{PrivateKey: d.tls.Certificates[0].PrivateKey}
	for rest := bytes.TrimSpace([]byte(body.Creds[0].Public.Data)); len(rest) > 0; {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			return refused
		}
		next.Certificate = append(next.Certificate, block.Bytes)
	}
	if len(next.Certificate) == 0 {
		return refused
	}
	if next.Leaf, err = x509.ParseCertificate(next.Certificate[0]); err != nil {
		return refused
	}
	key, ok := next.PrivateKey.(crypto.Signer)
	public, comparable := next.Leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !comparable || !public.Equal(key.Public()) {
		return refused
	}
	d.tls = d.tls.Clone()
	d.tls.Certificates = []tls.Certificate{next}
	return reply{code: codes.Changed}
}
