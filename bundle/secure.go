package bundle

import (
	"crypto/tls"
	"fmt"
	"net"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/mongostore"
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
	get, err := a.renewed(certificateauthority.HTTPS, func() (tls.Certificate, error) {
		return a.certificates.HTTPSCertificate([]string{a.external, "localhost", "127.0.0.1", "::1"})
	})
	if err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Op: "https certificate", Err: err}
	}
	return &tls.Config{
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return get() },
		MinVersion:     tls.VersionTLS12, NextProtos: []string{"h2", "http/1.1"},
	}, nil
}

// renewBefore is how long before its end a certificate of the hub's is made anew.
const renewBefore = 30 * 24 * time.Hour

// hubCertificate gives the hub's certificate towards devices.
func (a *assembly) hubCertificate() (func() (*tls.Certificate, error), error) {
	hosts := []string{"localhost", "127.0.0.1", "::1"}
	if a.external != "127.0.0.1" {
		hosts = append([]string{a.external}, hosts...)
	}
	if h, _, err := net.SplitHostPort(a.cfg.CoAPGateway.API.CoAP.ExternalAddress); err == nil && h != "" {
		hosts = append(hosts, h)
	}
	return a.renewed(certificateauthority.Device, func() (tls.Certificate, error) { return a.certificates.HubCertificate(hosts) })
}

// renewed gives a certificate of the hub's under a root. There is a new one when the last one nears its end, and when another key
// signs: that of the last one may be retired soon. Over TLS an answer is shown with it that it is good (RFC 6066, Section 8), and made
// anew at half its time; pion does not know how to show it over DTLS.
func (a *assembly) renewed(r certificateauthority.Root, made func() (tls.Certificate, error)) (func() (*tls.Certificate, error), error) {
	var (
		mu       sync.Mutex // guards all below
		cert     *tls.Certificate
		restaple time.Time
		warned   time.Time
	)
	get := func() (*tls.Certificate, error) {
		mu.Lock()
		defer mu.Unlock()
		now := time.Now()
		if cert == nil || cert.Leaf.NotAfter.Sub(now) <= renewBefore || !a.authority.Signs(r, cert.Leaf) {
			switch c, err := made(); {
			case err == nil:
				cert, restaple = &c, now
			case cert == nil || now.After(cert.Leaf.NotAfter):
				return nil, fmt.Errorf("the hub's certificate: %w", err)
			case now.After(warned.Add(time.Minute)): // the authority is away, and this one is good for a while
				a.log.Warn("the hub's certificate cannot be made anew", "until", cert.Leaf.NotAfter, "error", err)
				warned = now
			}
		}
		if now.Before(restaple) {
			return cert, nil
		}
		st, err := a.certificates.Staple(cert)
		if err != nil { // it is good without, too
			a.log.Warn("no answer about the hub's certificate can be made", "error", err)
			st.Until = now.Add(2 * time.Minute)
		}
		next := *cert // those who shake hands look at the last one
		next.OCSPStaple = st.DER
		cert, restaple = &next, now.Add(st.Until.Sub(now)/2)
		return cert, nil
	}
	_, err := get() // trouble is found at the start, not at the first handshake
	return get, err
}

// historyShare is the part of the disk that history takes at most when nobody says how much.
const historyShare = 10

// directoryConfig fills in what only the process can know: how large the disk is. That of a database elsewhere nobody knows.
func (a *assembly) directoryConfig() resourcedirectory.Config {
	cfg := a.cfg.ResourceDirectory
	if _, shared := a.store.(*mongostore.Store); shared {
		return cfg
	}
	var disk unix.Statfs_t
	if cfg.History.MaxBytes == 0 && unix.Statfs(a.folder.Path, &disk) == nil {
		cfg.History.MaxBytes = int64(disk.Blocks) * int64(disk.Bsize) / historyShare
	}
	return cfg
}
