package enrolmentgateway

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

// A proxy that ends TLS in front of the hub says which certificate a device has shown to it, whole, in the header of RFC 9440. It is
// believed that the device has the key, and nothing else: the authority verifies the certificate as any other. So whoever may say so
// must be known, by a client certificate of a CA that the operator named, or because he may open a Unix socket. From anybody else the
// header is refused rather than passed over: a proxy that is not known would enrol its devices without their certificates.

// maxChain bounds the certificates behind a device's own.
const maxChain = 8

// proxies are those whose word about certificates is taken.
type proxies struct {
	cas *x509.CertPool // nil: none over TLS
}

func newProxies(c ProxiesConfig) (proxies, error) {
	if len(c.CAPool) == 0 {
		return proxies{}, nil
	}
	cas, err := conf.Certificates(c.CAPool)
	if err != nil {
		return proxies{}, fmt.Errorf("api.http.proxies.caPool: %w", err)
	}
	p := proxies{x509.NewCertPool()}
	for _, ca := range cas {
		p.cas.AddCert(ca)
	}
	return p, nil
}

// include reports whether the peer of a TLS connection is one of them.
func (p proxies) include(state *tls.ConnectionState) bool {
	if p.cas == nil || len(state.PeerCertificates) == 0 {
		return false
	}
	between := x509.NewCertPool()
	for _, c := range state.PeerCertificates[1:] {
		between.AddCert(c)
	}
	_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
		Roots: p.cas, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
	return err == nil
}

var errProxy = hub.NewError(hub.Invalid, "client-cert-untrusted", "only a proxy that the hub knows may say which certificate a device has shown")

// shown is the certificates that a request's device has shown, to us or to a proxy. A connection over a Unix socket has no TLS.
func (g *Gateway) shown(r *http.Request) ([]*x509.Certificate, error) {
	certs, chain := r.Header.Values("Client-Cert"), r.Header.Values("Client-Cert-Chain")
	proxy := r.TLS == nil || g.proxies.include(r.TLS)
	switch {
	case !proxy && len(certs)+len(chain) > 0:
		return nil, errProxy
	case !proxy:
		return r.TLS.PeerCertificates, nil
	case len(certs) == 0 && len(chain) == 0:
		return nil, nil // of a device that has none; the proxy's own is no device's
	case len(certs) != 1:
		return nil, clientCert(errors.New("there is not one certificate"))
	}
	var out []*x509.Certificate
	items := certs
	if list := strings.Join(chain, ","); strings.TrimSpace(list) != "" {
		items = append(items[:1:1], strings.Split(list, ",")...)
	}
	if len(items) > 1+maxChain {
		return nil, clientCert(errors.New("the chain is too long"))
	}
	for _, item := range items {
		c, err := parseItem(item)
		if err != nil {
			return nil, clientCert(err)
		}
		out = append(out, c)
	}
	return out, nil
}

func clientCert(err error) error {
	return hub.NewError(hub.Invalid, "client-cert-invalid", "the proxy's header is no certificate (RFC 9440)").With("client-cert", err)
}

// parseItem reads a certificate as a Byte Sequence (RFC 9440, Section 2.1; RFC 8941, Section 3.3.5).
func parseItem(item string) (*x509.Certificate, error) {
	item = strings.Trim(item, " \t")
	if len(item) < 2 || item[0] != ':' || item[len(item)-1] != ':' {
		return nil, errors.New("no colons around the certificate")
	}
	der, err := base64.StdEncoding.DecodeString(item[1 : len(item)-1])
	if err != nil {
		return nil, fmt.Errorf("base64: %w", err)
	}
	return x509.ParseCertificate(der)
}
