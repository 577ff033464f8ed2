package coapgateway

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/coaphub/coaphub/internal/coap"
)

// tlsConfig makes the listener's TLS, and the pins of what it trusts, from files or from what was handed in.
func (g *Gateway) tlsConfig() (*tls.Config, pins, error) {
	co := g.cfg.API.CoAP.TLS
	certificate := g.deps.Certificate
	if co.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(co.CertFile, co.KeyFile)
		if err != nil {
			return nil, nil, fmt.Errorf("load the CoAP gateway's certificate: %w", err)
		}
		certificate = func() (*tls.Certificate, error) { return &cert, nil }
	}
	if certificate == nil {
		return nil, nil, errors.New("coap-gateway needs a certificate for its secure listener")
	}
	conf := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate() },
		// A resumed session would carry the identity of an earlier handshake past the CA set and the expiry of today.
		SessionTicketsDisabled: true,
	}
	if !co.ClientCertificateRequired {
		return conf, nil, nil
	}
	pool, known, err := g.trust()
	if err != nil {
		return nil, nil, err
	}
	conf.ClientCAs = pool
	conf.ClientAuth = tls.RequireAndVerifyClientCert
	if co.IdentityPropertiesRequired {
		// VerifyConnection and not VerifyPeerCertificate: the latter is skipped on resumed connections.
		conf.VerifyConnection = func(state tls.ConnectionState) error {
			_, err := identify(state.PeerCertificates[0], g.deps.HubID)
			return err
		}
	}
	return conf, known, nil
}

// trust is which CAs may vouch for devices: those of the configuration alone, else those that were handed in. crypto/tls
// takes intermediates from the peer only, so ours stand beside the roots: a chain may end at one of them.
func (g *Gateway) trust() (*x509.CertPool, pins, error) {
	if sources := g.cfg.API.CoAP.TLS.CAPool; len(sources) > 0 {
		cas, err := parseCAPool(sources)
		if err != nil {
			return nil, nil, err
		}
		pool, roots := x509.NewCertPool(), x509.NewCertPool()
		for _, ca := range cas {
			pool.AddCert(ca)
			if ca.CheckSignatureFrom(ca) == nil {
				roots.AddCert(ca)
			}
		}
		// An intermediate may be all that is configured: then it is trusted and pinned as it stands.
		known, _ := pinsUnder(roots, cas)
		return pool, known, nil
	}
	if g.deps.ClientCAs == nil {
		return nil, nil, errors.New("coap-gateway needs CAs of device certificates (tls.caPool)")
	}
	known, err := pinsUnder(g.deps.ClientCAs, g.deps.ClientIntermediates)
	if err != nil {
		return nil, nil, fmt.Errorf("the hub's certificate that issues devices' certificates: %w", err)
	}
	pool := g.deps.ClientCAs.Clone()
	for _, ca := range g.deps.ClientIntermediates {
		pool.AddCert(ca)
	}
	return pool, known, nil
}

// credentialOf is what the connection proved in its handshake.
func (g *Gateway) credentialOf(info coap.ConnInfo) credential {
	c := credential{pin: "token"}
	if info.TLS == nil || len(info.TLS.VerifiedChains) == 0 {
		return c
	}
	c.cert = info.TLS.PeerCertificates[0]
	c.pin = g.pins.of(info.TLS.VerifiedChains[0])
	// Without the identity properties the certificate proves nothing but its CA: no device.
	c.device, _ = identify(c.cert, g.deps.HubID)
	return c
}
