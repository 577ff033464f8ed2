package bundle

import (
	"crypto/tls"
	"net"

	"github.com/coaphub/coaphub/hub"
)

// secure puts TLS in front of a listener that others than this machine can reach, with a certificate by the hub's own CA.
// Loopback stays plain: who can listen there can read the hub's memory too.
func (a *assembly) secure(ln net.Listener) (net.Listener, error) {
	if loopback(ln.Addr().String()) {
		return ln, nil
	}
	cfg, err := a.httpsConfig()
	if err != nil {
		return nil, err
	}
	return tls.NewListener(ln, cfg), nil
}

// httpsConfig is the server's side of TLS towards applications and people.
func (a *assembly) httpsConfig() (*tls.Config, error) {
	cert, err := a.authority.HTTPSCertificate([]string{a.external, "localhost", "127.0.0.1", "::1"})
	if err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Op: "https certificate", Err: err}
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"}}, nil
}
