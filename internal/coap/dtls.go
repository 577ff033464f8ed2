package coap

import (
	"container/list"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/pion/dtls/v3"

	"github.com/coaphub/coaphub/hub"
)

// PeerCredential is what a peer has proven in a DTLS handshake. All empty: it is anonymous.
type PeerCredential struct {
	Chain       []*x509.Certificate // from the peer's certificate to one of DTLSConfig's CAs; as it was sent with AnyCertificate
	PSKIdentity []byte              // whose key the peer has (RFC 4279); nil without one
	PSKHash     [sha256.Size]byte   // of that key, to tell it from one that replaced it
	Suite       string              // the cipher suite's name (IANA); "" where there was no handshake
}

// DTLSConfig is what ServeDTLS needs besides Config. Start from DefaultDTLSConfig.
type DTLSConfig struct {
	// Credentials is asked at each handshake for the server's certificate, whose key must be ECDSA or Ed25519, and for the
	// CAs of clients; a nil pool asks clients for no certificate. Nil: only pre-shared keys.
	Credentials func() (tls.Certificate, *x509.CertPool, error)
	// AnyCertificate asks clients for a certificate, whoever signed it, and takes those that have none; the pool is not used. What
	// its chain is worth is for Verify to find out, which sees the certificates as they were sent; the peer has the key of the first.
	AnyCertificate bool
	// PSK returns the key of an identity, nil when there is none: a random key is taken then, so that nobody learns which
	// identities exist (RFC 4279, Section 2). An error ends the handshake with internal_error. Nil: only certificates.
	PSK func(ctx context.Context, identity []byte) ([]byte, error)
	// Verify decides on a peer that has proven its credential; it is here that one is demanded. An error ends the handshake
	// with bad_certificate, with certificate_revoked if it is ErrRevoked, with access_denied if it is ErrDenied, or with
	// handshake_failure if the peer has proven nothing. It is called once for each association. Nil takes everybody, also who has proven nothing.
	Verify func(PeerCredential) error
	// Gateway is the first part of all connection IDs, by which a load balancer can find this gateway. With a Relay it is the relay's.
	Gateway uint16
	// Relay reaches other gateways behind the same address, whose connection IDs begin otherwise. Nil: there are none.
	Relay *Relay
	// HandshakeTimeout ends a handshake that takes longer; slow radio needs its time. Default 120 s.
	HandshakeTimeout time.Duration
	// FlightInterval is the first time before an unanswered flight is sent again, doubled each time. RFC 7925, Section 11
	// wants 9 s for slow radio, which is the default; a peer that repeats its ClientHello gets our flight at once.
	FlightInterval time.Duration
	// MaxHandshakes bounds the handshakes under way, those before and those after the cookie each. Beyond it the oldest is
	// given up. Default 1024.
	MaxHandshakes int
	// MaxPerPrefix is the same for one network (IPv4 /24, IPv6 /56). Default 256.
	MaxPerPrefix int
	// MTU is the largest datagram of a handshake. Default 1200.
	MTU int
}

// DefaultDTLSConfig returns the defaults named at each field.
func DefaultDTLSConfig() DTLSConfig {
	return DTLSConfig{
		HandshakeTimeout: 120 * time.Second,
		FlightInterval:   9 * time.Second,
		MaxHandshakes:    1024,
		MaxPerPrefix:     256,
		MTU:              1200,
	}
}

// DeviceKeys makes a DTLSConfig.PSK of the keys of devices, whose IDs are the identities. What is no ID has no key.
func DeviceKeys(of func(context.Context, hub.DeviceID) ([]byte, error)) func(context.Context, []byte) ([]byte, error) {
	return func(ctx context.Context, identity []byte) ([]byte, error) {
		dev, err := hub.ParseDeviceID(string(identity))
		if err != nil {
			return nil, nil
		}
		return of(ctx, dev)
	}
}

// The suites, by kind of credential; the client's order decides. They are listed because pion's defaults do not mix kinds.
// The first of each is what RFC 7252, Section 9.1 demands. No CBC, and no RSA: devices have neither need nor room for them.
var (
	certificateSuites = []dtls.CipherSuiteID{
		dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8,
		dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM,
		dtls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
		dtls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	}
	pskSuites = []dtls.CipherSuiteID{
		dtls.TLS_PSK_WITH_AES_128_CCM_8,
		dtls.TLS_PSK_WITH_AES_128_CCM,
		dtls.TLS_PSK_WITH_AES_128_GCM_SHA256,
		dtls.TLS_PSK_WITH_AES_256_CCM_8,
	}
)

// ErrRevoked is DTLSConfig.Verify's of a certificate that was revoked.
var ErrRevoked = errors.New("the certificate was revoked")

// ErrDenied is DTLSConfig.Verify's of a peer whose credential is good, and that is not let in.
var ErrDenied = errors.New("the peer is not let in")

var errNoCredentials = errors.New("dtls needs a certificate or pre-shared keys")

// newCID makes a connection ID.
func (c *DTLSConfig) newCID() (id connectionID) {
	binary.BigEndian.PutUint16(id[:], c.Gateway)
	_, _ = rand.Read(id[2:]) // never fails
	return id
}

// options are pion's for one association.
func (l *dtlsListener) options(a *association) []dtls.ServerOption {
	conf := &l.conf
	opts := []dtls.ServerOption{
		dtls.WithFlightInterval(conf.FlightInterval),
		dtls.WithMTU(conf.MTU),
		// Asked for, not demanded: what it protects from needs resumption or renegotiation (RFC 7627, Section 1), and we
		// have neither; small stacks in the field lack it.
		dtls.WithExtendedMasterSecret(dtls.RequestExtendedMasterSecret),
		// No session store: pion's resumed sessions skip VerifyConnection.
		dtls.WithConnectionIDGenerator(func() []byte { return l.newCID(a) }),
		dtls.WithVerifyConnection(func(s *dtls.State) error { return l.verify(a, s) }),
	}
	var suites []dtls.CipherSuiteID
	if conf.Credentials != nil {
		cert, cas, err := conf.Credentials()
		if err == nil {
			suites = append(suites, certificateSuites...)
			opts = append(opts, dtls.WithCertificates(cert))
			switch {
			case conf.AnyCertificate:
				opts = append(opts, dtls.WithClientAuth(dtls.RequestClientCert), dtls.WithVerifyPeerCertificate(a.shown))
			case cas != nil:
				// What demands a certificate is Verify: under "require" pion refuses pre-shared keys in some versions. Pion names
				// the CAs, and is kept from verifying: it would do so with keys of any size.
				opts = append(opts, dtls.WithClientAuth(dtls.RequestClientCert), dtls.WithClientCAs(cas),
					dtls.WithVerifyPeerCertificate(func(ders [][]byte, _ [][]*x509.Certificate) error { return a.vouched(ders, cas) }))
			}
		} else {
			l.srv.log.Error("no certificate for a DTLS handshake", "error", err)
		}
	}
	if conf.PSK != nil {
		suites = append(suites, pskSuites...)
		opts = append(opts, dtls.WithPSK(func(identity []byte) ([]byte, error) { return l.key(a, identity) }))
	}
	return append(opts, dtls.WithCipherSuites(suites...))
}

// key returns the key of an identity.
func (l *dtlsListener) key(a *association, identity []byte) ([]byte, error) {
	key, err := l.conf.PSK(a.ctx, identity)
	if err != nil {
		return nil, err
	}
	if len(key) == 0 {
		key = make([]byte, 16)
		_, _ = rand.Read(key) // never fails
	}
	a.mu.Lock()
	a.asked, a.keyHash = true, sha256.Sum256(key)
	a.mu.Unlock()
	return key, nil
}

// maxRSA bounds the keys that a chain is verified with, in bits, as crypto/tls does: a key of what a handshake may hold costs more than a
// second.
const maxRSA = 8192

// vouched is pion's VerifyPeerCertificate: the peer has shown a certificate and has its key, and some CA must vouch for it.
func (a *association) vouched(ders [][]byte, cas *x509.CertPool) error {
	sent, err := parseChain(ders)
	if err != nil || len(sent) == 0 {
		return err
	}
	between := x509.NewCertPool()
	for _, c := range sent[1:] {
		if key, ok := c.PublicKey.(*rsa.PublicKey); ok && key.N.BitLen() > maxRSA {
			return fmt.Errorf("a key of the chain has %d bits", key.N.BitLen())
		}
		between.AddCert(c)
	}
	chains, err := sent[0].Verify(x509.VerifyOptions{Roots: cas, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return fmt.Errorf("verify the peer's certificate: %w", err)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.chain = chains[0]
	return nil
}

// shown is pion's VerifyPeerCertificate with AnyCertificate: the peer has shown certificates, and has the key of the first.
func (a *association) shown(ders [][]byte, _ [][]*x509.Certificate) error {
	chain, err := parseChain(ders)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.chain = chain
	return nil
}

func parseChain(ders [][]byte) (chain []*x509.Certificate, err error) {
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("read a certificate: %w", err)
		}
		chain = append(chain, c)
	}
	return chain, nil
}

// verify is pion's VerifyConnection: the last thing before our Finished.
func (l *dtlsListener) verify(a *association, s *dtls.State) error {
	a.mu.Lock()
	peer, asked, hash := PeerCredential{Chain: a.chain, Suite: s.CipherSuiteID.String()}, a.asked, a.keyHash
	a.mu.Unlock()
	if asked {
		peer.PSKIdentity, peer.PSKHash = append([]byte{}, s.IdentityHint...), hash
	}
	if l.conf.Verify != nil {
		if err := l.conf.Verify(peer); err != nil {
			a.mu.Lock()
			a.nothing = !asked && len(peer.Chain) == 0
			a.mu.Unlock()
			return err
		}
	}
	a.peer = peer
	return nil
}

// ServeDTLS serves CoAP over DTLS 1.2 (RFC 7252, Section 9.1), with certificates and pre-shared keys on one socket, until ctx
// ends; then it closes its sessions, with a close_notify each, and the socket, waits for all their goroutines and returns
// nil. Another end of the socket is an error. A session is an association, wherever its peer's datagrams come from; it ends
// by close_notify, by a fatal alert, after Config.MaxSilence, or when its peer, having no connection ID, makes a new
// association from the same address.
func (s *Server) ServeDTLS(ctx context.Context, conn net.PacketConn, conf DTLSConfig) error {
	if conf.Credentials == nil && conf.PSK == nil {
		_ = conn.Close()
		return errNoCredentials
	}
	sock, err := newSocket(conn)
	if err != nil {
		_ = conn.Close()
		return err
	}
	s.enter()
	defer s.leave()
	l := &dtlsListener{
		srv: s, conf: conf, sock: sock, sessions: s.newSessions(), mute: list.New(),
		byCID: make(map[connectionID]*association), open: make(map[endpoints]*association),
		fresh: make(map[endpoints]*association), shaking: make(map[endpoints]*association),
	}
	if conf.Relay != nil {
		l.conf.Gateway = conf.Relay.number
		conf.Relay.listener.Store(l)
		defer conf.Relay.listener.Store(nil)
	}
	l.ctx, l.stop = context.WithCancel(context.WithoutCancel(ctx))
	defer s.list(l.sessions)()
	ended := make(chan error, 1)
	go func() { ended <- l.srv.readDatagrams(l.sock, l.take) }()
	select {
	case <-ctx.Done():
		l.release() // the socket is read on: answers under way may need the peer's
		_ = conn.Close()
		<-ended
		return nil
	case err := <-ended:
		l.release()
		_ = conn.Close()
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("read dtls datagrams: %w", err)
	}
}

// release ends handshakes and sessions and waits for them.
func (l *dtlsListener) release() {
	l.mu.Lock()
	l.closing = true
	l.mu.Unlock()
	l.stop()
	l.sessions.release()
	l.wg.Wait()
}
