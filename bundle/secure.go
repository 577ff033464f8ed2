package bundle

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/hub"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
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

// renewBefore is how long before its end the hub's certificate is made anew.
const renewBefore = 30 * 24 * time.Hour

// hubCertificate gives the hub's certificate towards devices, and makes a new one when the last one nears its end.
func (a *assembly) hubCertificate() (func() (*tls.Certificate, error), error) {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if a.external != "127.0.0.1" {
		hosts = append([]string{a.external}, hosts...)
	}
	if h, _, err := net.SplitHostPort(a.cfg.CoAPGateway.API.CoAP.ExternalAddress); err == nil && h != "" {
		hosts = append(hosts, h)
	}
	var (
		mu   sync.Mutex // guards cert
		cert *tls.Certificate
	)
	get := func() (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		if cert != nil && time.Until(cert.Leaf.NotAfter) > renewBefore {
			return cert, nil
		}
		c, err := a.authority.HubCertificate(hosts)
		if err != nil {
			return nil, fmt.Errorf("the hub's certificate: %w", err)
		}
		if c.Leaf == nil {
			if c.Leaf, err = x509.ParseCertificate(c.Certificate[0]); err != nil {
				return nil, fmt.Errorf("the hub's certificate: %w", err)
			}
		}
		cert = &c
		return cert, nil
	}
	_, err := get() // trouble is found at the start, not at the first handshake
	return get, err
}

// historyShare is the part of the disk that history takes at most when nobody says how much.
const historyShare = 10

// directoryConfig fills in what only the process can know: how large the disk is.
func (a *assembly) directoryConfig() resourcedirectory.Config {
	cfg := a.cfg.ResourceDirectory
	var disk unix.Statfs_t
	if cfg.History.MaxBytes == 0 && unix.Statfs(a.folder.Path, &disk) == nil {
		cfg.History.MaxBytes = int64(disk.Blocks) * disk.Bsize / historyShare
	}
	return cfg
}
