package coapgateway

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/coaphub/coaphub/internal/coap"
)

// tlsConfig makes the listener's TLS from files, or from what was handed in.
func (g *Gateway) tlsConfig() (*tls.Config, error) {
	co := g.cfg.API.CoAP.TLS
	certificate := g.deps.Certificate
	if co.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(co.CertFile, co.KeyFile)
		if err != nil {
			return nil, fmt.Errorf("load the CoAP gateway's certificate: %w", err)
		}
		certificate = func() (*tls.Certificate, error) { return &cert, nil }
	}
	if certificate == nil {
		return nil, errors.New("coap-gateway needs a certificate for its secure listener")
	}
	conf := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return certificate() },
		// A resumed session would carry the identity of an earlier handshake past the CA set and the expiry of today.
		SessionTicketsDisabled: true,
	}
	if !co.ClientCertificateRequired {
		return conf, nil
	}
	pool := g.deps.ClientCAs
	if len(co.CAPool) > 0 {
		cas, err := parseCAPool(co.CAPool)
		if err != nil {
			return nil, err
		}
		pool = x509.NewCertPool()
		for _, ca := range cas {
			pool.AddCert(ca)
		}
	}
	if pool == nil {
		return nil, errors.New("coap-gateway needs CAs of device certificates (tls.caPool)")
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
	return conf, nil
}

// credentialOf is what the connection proved in its handshake.
func (g *Gateway) credentialOf(info coap.ConnInfo) credential {
	c := credential{pin: "token"}
	if info.TLS == nil || len(info.TLS.VerifiedChains) == 0 {
		return c
	}
	c.cert = info.TLS.PeerCertificates[0]
	c.pin = pinOf(info.TLS.VerifiedChains[0])
	// Without the identity properties the certificate proves nothing but its CA: no device.
	c.device, _ = identify(c.cert, g.deps.HubID)
	return c
}
