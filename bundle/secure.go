package bundle

import (
	"crypto/tls"
	"errors"
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

// askAgain is how long the authority is left alone that could not make a certificate anew, while the last one is good.
const askAgain = time.Minute

// shown is a certificate of the hub's under a root, as it is shown. There is a new one when the last one nears its end, and when another
// key signs: that of the last one may be retired soon. Over TLS an answer is shown with it that it is good (RFC 6066, Section 8), and made
// anew at half its time; pion does not know how to show it over DTLS.
type shown struct {
	a    *assembly
	root certificateauthority.Root
	made func() (tls.Certificate, error)

	mu    sync.Mutex // guards all below; it is not held while the authority is asked, which may be in another process
	now   showing
	under *renewal // nil: it is not being made anew
}

// showing is a certificate with an answer that it is good.
type showing struct {
	cert     *tls.Certificate
	restaple time.Time // when the answer is to be made anew
	until    time.Time // to when it is good
	again    time.Time // when the authority is asked again for either
}

// renewal is somebody's asking the authority, for which others wait who have nothing good to show.
type renewal struct {
	done chan struct{}
	cert *tls.Certificate
	err  error
}

// renewed gives a certificate of the hub's under a root.
func (a *assembly) renewed(r certificateauthority.Root, made func() (tls.Certificate, error)) (func() (*tls.Certificate, error), error) {
	s := &shown{a: a, root: r, made: made}
	_, err := s.get() // trouble is found at the start, not at the first handshake
	return s.get, err
}

// errNotMade is for those who wait for somebody that panics.
var errNotMade = errors.New("the hub's certificate was not made")

// get is the certificate to show. When it is to be made anew one caller waits for that, and the others only if the last one is not good.
func (s *shown) get() (*tls.Certificate, error) {
	s.mu.Lock()
	now, is := time.Now(), s.now
	anew := is.cert == nil || is.cert.Leaf.NotAfter.Sub(now) <= renewBefore || !s.a.authority.Signs(s.root, is.cert.Leaf)
	good := is.cert != nil && now.Before(is.cert.Leaf.NotAfter) && now.Before(is.until)
	u := s.under
	switch {
	case !anew && now.Before(is.restaple), good && (u != nil || now.Before(is.again)):
		s.mu.Unlock()
		return is.cert, nil
	case u != nil:
		s.mu.Unlock()
		<-u.done
		return u.cert, u.err
	}
	u = &renewal{done: make(chan struct{}), err: errNotMade}
	s.under = u
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		s.now, s.under = is, nil
		s.mu.Unlock()
		close(u.done)
	}()
	if u.err = s.renew(&is, anew, now); u.err == nil {
		u.cert = is.cert
	}
	return u.cert, u.err
}

// renew brings what is shown up to date.
func (s *shown) renew(is *showing, anew bool, now time.Time) error {
	if anew {
		switch c, err := s.made(); {
		case err == nil:
			is.cert, is.restaple, is.until = &c, now, now
		case is.cert == nil || now.After(is.cert.Leaf.NotAfter):
			return fmt.Errorf("the hub's certificate: %w", err)
		default: // the authority is away, and this one is good for a while
			s.a.log.Warn("the hub's certificate cannot be made anew", "until", is.cert.Leaf.NotAfter, "error", err)
			is.again = now.Add(askAgain)
		}
	}
	if now.Before(is.restaple) {
		return nil
	}
	st, err := s.a.certificates.Staple(is.cert)
	if err != nil { // it is good without, too
		s.a.log.Warn("no answer about the hub's certificate can be made", "error", err)
		st.Until = now.Add(2 * askAgain)
		if now.Before(is.until) { // the last one is good still
			st.DER, st.Until = is.cert.OCSPStaple, is.until
			is.again = now.Add(askAgain)
		}
	}
	next := *is.cert // those who shake hands look at the last one
	next.OCSPStaple = st.DER
	is.cert, is.restaple, is.until = &next, now.Add(st.Until.Sub(now)/2), st.Until
	return nil
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
