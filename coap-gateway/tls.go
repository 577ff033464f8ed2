package coapgateway

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/revocation"
)

// trusted is who vouches for devices, and the hub's own certificate.
type trusted struct {
	certificate func() (*tls.Certificate, error)
	cas         *x509.CertPool // nil: devices show no certificate
	pins        pins           // of the intermediates in cas
}

// tlsConfig makes the listener's TLS, and what it trusts, from files or from what was handed in.
func (g *Gateway) tlsConfig() (*tls.Config, trusted, error) {
	co := g.cfg.API.CoAP.TLS
	is := trusted{certificate: g.deps.Certificate}
	if co.CertFile != "" {
		cert, err := tls.LoadX509KeyPair(co.CertFile, co.KeyFile)
		if err != nil {
			return nil, is, fmt.Errorf("load the CoAP gateway's certificate: %w", err)
		}
		is.certificate = func() (*tls.Certificate, error) { return &cert, nil }
	}
	if is.certificate == nil {
		return nil, is, errors.New("coap-gateway needs a certificate for its secure listener")
	}
	if g.cfg.API.CoAP.speaks(ProtocolUDP) {
		cert, err := is.certificate()
		if err != nil {
			return nil, is, err
		}
		if cert != nil && !forDTLS(cert.PrivateKey) {
			return nil, is, errors.New("coapGateway.api.coap.tls.keyFile: DTLS needs an ECDSA key; make one, or leave udp out of coapGateway.api.coap.protocols")
		}
	}
	conf := &tls.Config{
		MinVersion:     tls.VersionTLS12,
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return is.certificate() },
		// A resumed session would carry the identity of an earlier handshake past the CA set and the expiry of today.
		SessionTicketsDisabled: true,
		// RFC 8323, Section 8.2: a client on a port other than 5684 must give up when ALPN is not negotiated. One that does not
		// speak of it is taken all the same.
		NextProtos: []string{"coap"},
	}
	if !co.ClientCertificateRequired {
		return conf, is, nil
	}
	var err error
	if g.sets, err = revocation.ReadSets(co.CASets); err != nil {
		return nil, is, fmt.Errorf("coapGateway.api.coap.tls.%w", err)
	}
	if is.cas, is.pins, err = g.trust(g.deps.ClientCAs, g.deps.ClientIntermediates, g.deps.ClientRoots); err != nil {
		return nil, is, err
	}
	conf.ClientCAs = is.cas
	conf.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		now := conf.Clone()
		now.ClientCAs = g.trusted.Load().cas
		return now, nil
	}
	conf.ClientAuth = tls.RequireAndVerifyClientCert
	// VerifyConnection and not VerifyPeerCertificate: the latter is skipped on resumed connections. crypto/tls makes any error
	// of it the alert bad_certificate.
	conf.VerifyConnection = func(state tls.ConnectionState) error { return g.admissible(state.VerifiedChains[0]) }
	return conf, is, nil
}

// admissible decides in the handshake on the chain of a device's own certificate, which was verified.
func (g *Gateway) admissible(chain []*x509.Certificate) error {
	if g.revoked(chain) {
		return coap.ErrRevoked
	}
	dev, err := identify(chain[0], g.deps.HubID)
	if err != nil && g.cfg.API.CoAP.TLS.IdentityPropertiesRequired {
		return err
	}
	return g.letIn(dev, g.trusted.Load().pins.whole(chain))
}

// letIn refuses in the handshake whom nobody wants here. While that is not known the handshake goes on: a request can be answered 5.03,
// and a handshake that fails looks like a bad credential.
func (g *Gateway) letIn(dev hub.DeviceID, chain []*x509.Certificate) error {
	if err := g.deps.Denied(dev, chain); hub.IsKind(err, hub.Denied) {
		return fmt.Errorf("%w: %w", coap.ErrDenied, err)
	}
	return nil
}

// forDTLS tells whether a key is of a kind that the suites of constrained devices use: none of them has RSA.
func forDTLS(key crypto.PrivateKey) bool {
	switch key.(type) {
	case *ecdsa.PrivateKey, ed25519.PrivateKey:
		return true
	}
	return false
}

// dtlsConfig makes the listener's DTLS of what TLS trusts.
func (g *Gateway) dtlsConfig() coap.DTLSConfig {
	co := &g.cfg.API.CoAP
	conf := coap.DefaultDTLSConfig()
	conf.Gateway, conf.Relay = co.DTLS.Gateway, g.relay
	conf.HandshakeTimeout, conf.FlightInterval = co.DTLS.HandshakeTimeout, co.DTLS.FlightInterval
	conf.MaxHandshakes, conf.MaxPerPrefix = co.DTLS.MaxHandshakes, co.DTLS.MaxHandshakesPerNetwork
	conf.Credentials = func() (tls.Certificate, *x509.CertPool, error) {
		is := g.trusted.Load()
		cert, err := is.certificate()
		if err != nil {
			return tls.Certificate{}, nil, err
		}
		return *cert, is.cas, nil
	}
	if co.TLS.PSK && g.deps.PSK != nil {
		conf.PSK = coap.DeviceKeys(g.deps.PSK)
	}
	conf.Verify = func(peer coap.PeerCredential) error {
		switch {
		case peer.PSKIdentity != nil: // whoever has the key is the device, and learns how it stands; nobody else does
			dev, err := hub.ParseDeviceID(string(peer.PSKIdentity))
			if err != nil {
				return err
			}
			return g.letIn(dev, nil)
		case !co.TLS.ClientCertificateRequired:
			return nil
		case len(peer.Chain) == 0:
			return errors.New("the device showed neither certificate nor pre-shared key")
		}
		return g.admissible(peer.Chain)
	}
	return conf
}

// trust is which CAs may vouch for devices: those of the configuration alone, else those that were handed in. crypto/tls
// takes intermediates from the peer only, so ours stand beside the roots: a chain may end at one of them.
func (g *Gateway) trust(own *x509.CertPool, intermediates, set []*x509.Certificate) (*x509.CertPool, pins, error) {
	if sources := g.cfg.API.CoAP.TLS.CAPool; len(sources) > 0 || len(g.sets) > 0 {
		cas, err := conf.Certificates(sources)
		if err != nil {
			return nil, nil, err
		}
		if err := apart(g.sets, cas); err != nil {
			return nil, nil, err
		}
		for _, s := range g.sets {
			cas = append(cas, s.CAs...)
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
		known.join(set)
		return pool, known, nil
	}
	if own == nil {
		return nil, nil, errors.New("coap-gateway needs CAs of device certificates (tls.caPool)")
	}
	known, err := pinsUnder(own, intermediates)
	if err != nil {
		return nil, nil, fmt.Errorf("the hub's certificate that issues devices' certificates: %w", err)
	}
	known.join(set)
	pool := own.Clone()
	for _, ca := range intermediates {
		pool.AddCert(ca)
	}
	return pool, known, nil
}

// Trust takes other ClientCAs, ClientIntermediates and ClientRoots than those of Deps from now on: the hub's authority was rolled
// over. Sessions go on, but for those whose certificate counts as revoked now.
func (g *Gateway) Trust(cas *x509.CertPool, intermediates, roots []*x509.Certificate) error {
	is := g.trusted.Load()
	if is == nil || is.cas == nil {
		return nil // devices show no certificates
	}
	next := *is
	var err error
	if next.cas, next.pins, err = g.trust(cas, intermediates, roots); err != nil {
		return err
	}
	g.trusted.Store(&next)
	g.endRevoked()
	return nil
}

// credentialOf is what the connection proved in its handshake.
func (g *Gateway) credentialOf(info coap.ConnInfo) credential {
	c := credential{pin: "token"}
	var chain []*x509.Certificate
	switch {
	case info.Peer.PSKIdentity != nil:
		c.device, _ = hub.ParseDeviceID(string(info.Peer.PSKIdentity)) // or it would have no key
		c.psk, c.key, c.pin = true, info.Peer.PSKHash, "psk"
		return c
	case info.TLS != nil && len(info.TLS.VerifiedChains) > 0:
		chain = info.TLS.VerifiedChains[0]
	default:
		chain = info.Peer.Chain
	}
	if len(chain) == 0 {
		return c
	}
	known := g.trusted.Load().pins
	c.cert, c.chain = chain[0], known.whole(chain)
	c.pin = known.of(chain)
	// Without the identity properties the certificate proves nothing but its CA: no device.
	c.device, _ = identify(c.cert, g.deps.HubID)
	return c
}
