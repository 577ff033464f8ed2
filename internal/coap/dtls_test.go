package coap

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// authority is a CA with a certificate for everybody who asks.
type authority struct {
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
	pool *x509.CertPool
}

func newAuthority(t testing.TB) *authority {
	t.Helper()
	a := &authority{pool: x509.NewCertPool()}
	var err error
	if a.key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &a.key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	a.pool.AddCert(a.cert)
	return a
}

// issue makes a certificate that is valid until then; zero is long.
func (a *authority) issue(t testing.TB, name string, until time.Time) tls.Certificate {
	t.Helper()
	if until.IsZero() {
		until = time.Unix(1<<32, 0)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotBefore: time.Unix(0, 0), NotAfter: until,
		KeyUsage: x509.KeyUsageDigitalSignature, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if name == "server" {
		tmpl.ExtKeyUsage = tmpl.ExtKeyUsage[:1]
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// withLargeKey puts a CA behind a certificate whose key has more bits than anybody has to verify with.
func (a *authority) withLargeKey(t testing.TB, c tls.Certificate) tls.Certificate {
	t.Helper()
	n := new(big.Int).Lsh(big.NewInt(1), maxRSA+7)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(3), Subject: pkix.Name{CommonName: "large"}, NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1<<32, 0),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537}, a.key)
	if err != nil {
		t.Fatal(err)
	}
	c.Certificate = append(c.Certificate, der)
	return c
}

var errNoCredential = errors.New("a certificate or a pre-shared key is needed")

// dtlsSim is an engine that serves DTLS on a simulated network.
type dtlsSim struct {
	*sim
	net     *simnet.Network
	hub     *net.UDPAddr
	ca      *authority
	refused chan string
	stop    func()
	wrap    func(net.PacketConn) net.PacketConn // what the hub reads from and writes to

	mu      sync.Mutex
	devices []*dtlsDevice
	sent    map[netip.AddrPort]int // bytes of the hub, by where they went
	got     map[netip.AddrPort]int // bytes to the hub
}

func (s *dtlsSim) trace(e simnet.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.What == "sent" && e.From.String() == dtlsAddr {
		s.sent[e.To] += e.Size
	}
	if e.What == "arrived" && e.To.String() == dtlsAddr {
		s.got[e.From] += e.Size
	}
}

func (s *dtlsSim) traffic(addr string) (sent, got int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ap := netip.MustParseAddrPort(addr)
	return s.sent[ap], s.got[ap]
}

const dtlsAddr = "192.0.2.1:5684"

var testKey = []byte("0123456789abcdef")

// dtlsConfig takes certificates of ca and the identity "lamp".
func dtlsConfig(t testing.TB, ca *authority) DTLSConfig {
	cert := ca.issue(t, "hub", time.Time{})
	conf := DefaultDTLSConfig()
	conf.Gateway = 0x1234
	conf.Credentials = func() (tls.Certificate, *x509.CertPool, error) { return cert, ca.pool, nil }
	conf.PSK = func(_ context.Context, identity []byte) ([]byte, error) {
		switch string(identity) {
		case "lamp":
			return testKey, nil
		case "trouble":
			return nil, errors.New("the store is away")
		}
		return nil, nil
	}
	conf.Verify = func(p PeerCredential) error {
		if len(p.Chain) == 0 && p.PSKIdentity == nil {
			return errNoCredential
		}
		return nil
	}
	return conf
}

func startDTLS(t *testing.T, h handlerFuncs, change func(*Config, *DTLSConfig), wrap func(net.PacketConn) net.PacketConn) *dtlsSim {
	t.Helper()
	s := &dtlsSim{
		wrap: wrap,
		sim:  &sim{t: t, conns: make(chan *Conn, 1000), closed: make(chan error, 1000), logs: new(bytes.Buffer), reg: prometheus.NewRegistry()},
		hub:  simnet.Addr(dtlsAddr), ca: newAuthority(t), refused: make(chan string, 10_000),
		sent: make(map[netip.AddrPort]int), got: make(map[netip.AddrPort]int),
	}
	s.net = simnet.New(1, s.trace)
	cfg, conf := DefaultConfig(), dtlsConfig(t, s.ca)
	cfg.Refused = func(_ net.Addr, reason, detail string) { s.refused <- reason + ": " + detail }
	if change != nil {
		change(&cfg, &conf)
	}
	open, closed := h.open, h.closed
	h.open = func(c *Conn) error {
		if open != nil {
			if err := open(c); err != nil {
				return err
			}
		}
		s.conns <- c
		return nil
	}
	h.closed = func(err error) {
		if closed != nil {
			closed(err)
		}
		s.closed <- err
	}
	s.srv = NewServer(cfg, h, slog.New(slog.NewTextHandler(s.sim, nil)), NewMetrics(s.reg))
	pc, err := s.net.Listen(dtlsAddr)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.srv.ServeDTLS(ctx, s.wrap(pc), conf) }()
	s.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeDTLS: %v", err)
		}
		if left := s.srv.budget.left; left != cfg.MaxBuffered {
			t.Errorf("%d bytes of the budget never came back", cfg.MaxBuffered-left)
		}
		if s.srv.count != 0 {
			t.Errorf("%d connections are still counted", s.srv.count)
		}
	})
	return s
}

func dtlsBubble(t *testing.T, h handlerFuncs, change func(*Config, *DTLSConfig), f func(t *testing.T, s *dtlsSim)) {
	t.Helper()
	dtlsBubbleOn(t, h, change, func(pc net.PacketConn) net.PacketConn { return pc }, f)
}

func dtlsBubbleOn(t *testing.T, h handlerFuncs, change func(*Config, *DTLSConfig), wrap func(net.PacketConn) net.PacketConn, f func(t *testing.T, s *dtlsSim)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s := startDTLS(t, h, change, wrap)
		defer func() {
			s.stop()
			for _, d := range s.devices {
				d.crash()
			}
		}()
		f(t, s)
	})
}

// dtlsDevice is a device: a socket and an association.
type dtlsDevice struct {
	t    testing.TB
	sock net.PacketConn
	conn *dtls.Conn
	id   uint16
}

func (s *dtlsSim) socket(t testing.TB, addr string) *simnet.Conn {
	t.Helper()
	c, err := s.net.Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// shake makes an association over a socket.
func (s *dtlsSim) shake(t testing.TB, sock net.PacketConn, opts ...dtls.ClientOption) (*dtlsDevice, error) {
	d, err := shakeWith(t, sock, s.hub, opts...)
	if err == nil {
		s.mu.Lock()
		s.devices = append(s.devices, d)
		s.mu.Unlock()
	}
	return d, err
}

// polite lets pion say its close_notify before its reader, which has been told to end, closes the socket.
type polite struct {
	net.PacketConn
	complete atomic.Bool
}

func (p *polite) SetReadDeadline(t time.Time) error {
	if p.complete.Load() {
		return nil
	}
	return p.PacketConn.SetReadDeadline(t)
}

func shakeWith(t testing.TB, sock net.PacketConn, hub net.Addr, opts ...dtls.ClientOption) (*dtlsDevice, error) {
	t.Helper()
	p := &polite{PacketConn: sock}
	conn, err := dtls.ClientWithOptions(p, hub, opts...)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = sock.Close()
		return nil, err
	}
	p.complete.Store(true)
	return &dtlsDevice{t: t, sock: sock, conn: conn}, nil
}

// dialPSK makes an association as "lamp"; with a connection ID when cid is set.
func (s *dtlsSim) dialPSK(t testing.TB, addr string, cid bool) *dtlsDevice {
	t.Helper()
	d, err := s.shake(t, s.socket(t, addr), pskOptions("lamp", testKey, cid)...)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func pskOptions(identity string, key []byte, cid bool, suites ...dtls.CipherSuiteID) []dtls.ClientOption {
	if suites == nil {
		suites = pskSuites[:1]
	}
	opts := []dtls.ClientOption{
		dtls.WithPSK(func([]byte) ([]byte, error) { return key, nil }), dtls.WithPSKIdentityHint([]byte(identity)),
		dtls.WithCipherSuites(suites...), dtls.WithMTU(1200),
	}
	if cid {
		opts = append(opts, dtls.WithConnectionIDGenerator(dtls.OnlySendCIDGenerator()))
	}
	return opts
}

func certOptions(ca *authority, certs []tls.Certificate, suites ...dtls.CipherSuiteID) []dtls.ClientOption {
	if suites == nil {
		suites = certificateSuites[:1]
	}
	opts := []dtls.ClientOption{dtls.WithRootCAs(ca.pool), dtls.WithServerName("localhost"), dtls.WithCipherSuites(suites...)}
	if len(certs) > 0 {
		opts = append(opts, dtls.WithCertificates(certs...))
	}
	return opts
}

// next reads one datagram within d; false when there is none.
func (d *dtlsDevice) next(wait time.Duration) (packet, *Message, bool) {
	d.t.Helper()
	buf := make([]byte, maxRecord)
	_ = d.conn.SetReadDeadline(time.Now().Add(wait))
	n, err := d.conn.Read(buf)
	if err != nil {
		return packet{}, nil, false
	}
	p, err := parsePacket(buf[:n])
	if err != nil {
		d.t.Fatalf("the hub sent %x: %v", buf[:n], err)
	}
	m, _, err := decodePacket(p)
	if err != nil {
		d.t.Fatalf("the hub sent %x: %v", buf[:n], err)
	}
	return p, m, true
}

func (d *dtlsDevice) send(b []byte) {
	d.t.Helper()
	if _, err := d.conn.Write(b); err != nil {
		d.t.Fatal(err)
	}
}

// try sends a confirmable request as RFC 7252 wants it, and answers pings; nil when there is no answer.
func (d *dtlsDevice) try(m *Message) *Message {
	d.t.Helper()
	d.id++
	req := appendPacket(nil, confirmable, d.id, m)
	for wait, n := 2*time.Second, 0; n < 5; wait, n = 2*wait, n+1 {
		d.send(req)
		for until := time.Now().Add(wait); time.Now().Before(until); {
			p, in, ok := d.next(time.Until(until))
			if !ok {
				break
			}
			switch {
			case p.typ == confirmable && p.code == codes.Empty:
				d.send(emptyPacket(reset, p.id))
			case p.typ == acknowledgement && p.id == d.id && bytes.Equal(in.Token, m.Token):
				return in
			}
		}
	}
	return nil
}

func (d *dtlsDevice) ask(path string) {
	d.t.Helper()
	switch m := d.try(get(path)); {
	case m == nil:
		d.t.Fatalf("no answer to %s", path)
	case m.Code != codes.Content || string(m.Payload) != path:
		d.t.Fatalf("%v %q, want %q", m.Code, m.Payload, path)
	}
}

// close ends the association in order.
func (d *dtlsDevice) close() { _ = d.conn.Close() }

// crash ends the device without a word.
func (d *dtlsDevice) crash() {
	_ = d.sock.Close()
	_ = d.conn.Close()
}

func (s *dtlsSim) conn(t *testing.T) *Conn {
	t.Helper()
	select {
	case c := <-s.conns:
		return c
	case <-time.After(time.Minute):
		t.Fatal("no session")
		return nil
	}
}

func (s *dtlsSim) refusal(t *testing.T, want string) {
	t.Helper()
	select {
	case got := <-s.refused:
		if !strings.Contains(got, want) {
			t.Fatalf("refused: %q, want %q", got, want)
		}
	case <-time.After(10 * time.Minute):
		t.Fatal("nobody was refused")
	}
}

// stillOpen fails when a session has ended.
func (s *dtlsSim) stillOpen(t *testing.T) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-s.closed:
		t.Fatalf("a session ended: %v", err)
	default:
	}
}

func TestDTLSSuites(t *testing.T) {
	for _, suite := range certificateSuites {
		t.Run(suite.String(), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				cert := s.ca.issue(t, "device", time.Time{})
				d, err := s.shake(t, s.socket(t, "198.51.100.1:0"), certOptions(s.ca, []tls.Certificate{cert}, suite)...)
				if err != nil {
					t.Fatal(err)
				}
				d.ask("/a")
				info := s.conn(t).Info()
				if !info.Secure || info.Stream || info.TLS != nil || info.Peer.PSKIdentity != nil || len(info.Peer.Chain) != 2 ||
					info.Peer.Chain[0].Subject.CommonName != "device" {
					t.Fatalf("info %+v", info)
				}
				if info.Local.String() != dtlsAddr || info.Remote.String() != d.conn.LocalAddr().String() {
					t.Fatalf("addresses %v and %v", info.Local, info.Remote)
				}
				d.close()
				wantReason(t, s.reason(t), io.EOF)
			})
		})
	}
	for _, suite := range pskSuites {
		t.Run(suite.String(), func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				d, err := s.shake(t, s.socket(t, "198.51.100.1:0"), pskOptions("lamp", testKey, true, suite)...)
				if err != nil {
					t.Fatal(err)
				}
				d.ask("/a")
				info := s.conn(t).Info()
				if !info.Secure || info.Stream || string(info.Peer.PSKIdentity) != "lamp" || info.Peer.Chain != nil ||
					info.Peer.PSKHash != sha256.Sum256(testKey) {
					t.Fatalf("info %+v", info)
				}
				d.close()
				wantReason(t, s.reason(t), io.EOF)
			})
		})
	}
}

func TestDTLSOtherSuites(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		for _, suite := range []dtls.CipherSuiteID{dtls.TLS_ECDHE_ECDSA_WITH_AES_256_CBC_SHA} {
			_, err := s.shake(t, s.socket(t, "198.51.100.1:0"), certOptions(s.ca, nil, suite)...)
			if err == nil || !strings.Contains(err.Error(), "InsufficientSecurity") {
				t.Errorf("%v: %v", suite, err)
			}
			s.refusal(t, "handshake-failed")
		}
	})
}

func TestDTLSKeys(t *testing.T) {
	cases := []struct {
		name, identity, key, device, hub string
	}{
		{"wrong key", "lamp", "another key, 16B", "DecryptError", "the key is not that of the identity"},
		{"unknown identity", "nobody", string(testKey), "DecryptError", "the key is not that of the identity"},
		{"store trouble", "trouble", string(testKey), "InternalError", "the store is away"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
				_, err := s.shake(t, s.socket(t, "198.51.100.1:0"), pskOptions(c.identity, []byte(c.key), false)...)
				if err == nil || !strings.Contains(err.Error(), c.device) {
					t.Errorf("the device saw %v, want %s", err, c.device)
				}
				s.refusal(t, c.hub)
			})
		})
	}
}

func TestDTLSCertificates(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, conf *DTLSConfig) {
		demand := conf.Verify
		conf.Verify = func(p PeerCredential) error {
			if len(p.Chain) > 0 {
				switch p.Chain[0].Subject.CommonName {
				case "revoked":
					return fmt.Errorf("look at the certificate: %w", ErrRevoked)
				case "stranger":
					return errors.New("nobody knows the device")
				}
			}
			return demand(p)
		}
	}, func(t *testing.T, s *dtlsSim) {
		other := newAuthority(t)
		cases := []struct {
			name, why, alert string
			certs            []tls.Certificate
		}{
			{"none", errNoCredential.Error(), "HandshakeFailure", nil},
			{"of another authority", "unknown authority", "UnknownCA", []tls.Certificate{other.issue(t, "device", time.Time{})}},
			{"expired", "expired", "CertificateExpired", []tls.Certificate{s.ca.issue(t, "device", time.Now().Add(-time.Hour))}},
			{"for servers", "incompatible key usage", "UnsupportedCertificate", []tls.Certificate{s.ca.issue(t, "server", time.Time{})}},
			{"revoked", "revoked", "CertificateRevoked", []tls.Certificate{s.ca.issue(t, "revoked", time.Time{})}},
			{"not taken", "nobody knows", "BadCertificate", []tls.Certificate{s.ca.issue(t, "stranger", time.Time{})}},
			{"beside a key that costs too much", "8200 bits", "BadCertificate", []tls.Certificate{s.ca.withLargeKey(t, s.ca.issue(t, "device", time.Time{}))}},
		}
		for _, c := range cases {
			_, err := s.shake(t, s.socket(t, "198.51.100.1:0"), certOptions(s.ca, c.certs)...)
			if err == nil || !strings.Contains(err.Error(), c.alert) {
				t.Errorf("%s: the device saw %v, want %s", c.name, err, c.alert)
			}
			s.refusal(t, c.why)
		}
		if n := s.count("connections_opened_total"); n != 0 {
			t.Errorf("%v sessions", n)
		}
	})
}

func TestDTLSKindsOfCredential(t *testing.T) {
	t.Run("only keys", func(t *testing.T) {
		dtlsBubble(t, handlerFuncs{}, func(_ *Config, conf *DTLSConfig) { conf.Credentials = nil }, func(t *testing.T, s *dtlsSim) {
			s.dialPSK(t, "198.51.100.1:0", false).ask("/a")
			if _, err := s.shake(t, s.socket(t, "198.51.100.1:0"), certOptions(s.ca, nil)...); err == nil {
				t.Error("a certificate suite was taken")
			}
		})
	})
	t.Run("only certificates", func(t *testing.T) {
		dtlsBubble(t, handlerFuncs{}, func(_ *Config, conf *DTLSConfig) { conf.PSK = nil }, func(t *testing.T, s *dtlsSim) {
			if _, err := s.shake(t, s.socket(t, "198.51.100.1:0"), pskOptions("lamp", testKey, false)...); err == nil {
				t.Error("a key was taken")
			}
		})
	})
	t.Run("anonymous where that is allowed", func(t *testing.T) {
		dtlsBubble(t, handlerFuncs{}, func(_ *Config, conf *DTLSConfig) { conf.Verify = nil }, func(t *testing.T, s *dtlsSim) {
			d, err := s.shake(t, s.socket(t, "198.51.100.1:0"), certOptions(s.ca, nil)...)
			if err != nil {
				t.Fatal(err)
			}
			d.ask("/a")
		})
	})
	t.Run("none", func(t *testing.T) {
		pc, err := simnet.New(1, nil).Listen(dtlsAddr)
		if err != nil {
			t.Fatal(err)
		}
		srv := NewServer(DefaultConfig(), handlerFuncs{}, slog.New(slog.DiscardHandler), NewMetrics(nil))
		if err := srv.ServeDTLS(t.Context(), pc, DefaultDTLSConfig()); !errors.Is(err, errNoCredentials) {
			t.Errorf("ServeDTLS: %v", err)
		}
	})
}

func TestDTLSRecords(t *testing.T) {
	cid := append([]byte{recordCID, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 9, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1}, 42)
	plain := []byte{recordData, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 1, 0, 0, 2, 7, 7}
	r, rest, ok := nextRecord(append(append([]byte(nil), cid...), plain...))
	if !ok || r.cid != (connectionID{1, 2, 3, 4, 5, 6, 7, 8}) || r.seq != 9 || r.epoch != 1 || !bytes.Equal(r.body, []byte{42}) || !bytes.Equal(r.raw, cid) {
		t.Fatalf("%+v %t", r, ok)
	}
	if r, rest, ok = nextRecord(rest); !ok || len(rest) != 0 || r.seq != 256 || !bytes.Equal(r.raw, plain) {
		t.Fatalf("%+v %t", r, ok)
	}
	for _, b := range [][]byte{nil, {25}, cid[:20], cid[:21], plain[:14], {19, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 7}, {23, 3, 3, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 7}} {
		if r, _, ok := nextRecord(b); ok {
			t.Errorf("%x is %+v", b, r)
		}
	}
	h, ok := parseClientHello(hello(5)[recordHeader:])
	if !ok || len(h.cookie) != 0 || h.random[7] != 5 {
		t.Errorf("%+v %t", h, ok)
	}
	for n := range hello(5)[recordHeader:] {
		if _, ok := parseClientHello(hello(5)[recordHeader:][:n]); ok {
			t.Errorf("%d bytes of a ClientHello are one", n)
		}
	}
}

// FuzzDTLS brings any datagrams to a listener that has a session, from the session's address and from another one: the
// session lives, and nothing grows.
func FuzzDTLS(f *testing.F) {
	f.Add(hello(1), []byte{recordAlert, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 5, 0, 2, 1, 0})
	f.Add(append(hello(1), hello(2)...), []byte{recordChange, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 5, 0, 1, 1})
	f.Add([]byte{recordCID, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 1, 0}, bytes.Repeat([]byte{22, 0xfe, 0xfd}, 20))
	f.Add([]byte{recordHandshake, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0, 0, 5, 0, 12, keyExchange, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0}, []byte{1})
	network := simnet.New(1, nil)
	pc, err := network.Listen(dtlsAddr)
	if err != nil {
		f.Fatal(err)
	}
	cfg, conf := DefaultConfig(), DefaultDTLSConfig()
	conf.PSK = func(context.Context, []byte) ([]byte, error) { return testKey, nil }
	conf.MaxHandshakes, conf.HandshakeTimeout = 8, 100*time.Millisecond
	srv := NewServer(cfg, handlerFuncs{}, slog.New(slog.DiscardHandler), NewMetrics(nil))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.ServeDTLS(ctx, pc, conf) }()
	sock, err := network.Listen("198.51.100.1:5000")
	if err != nil {
		f.Fatal(err)
	}
	other, err := network.Listen("198.51.100.2:5000")
	if err != nil {
		f.Fatal(err)
	}
	d, err := shakeWith(f, sock, simnet.Addr(dtlsAddr), pskOptions("lamp", testKey, true)...)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			f.Errorf("ServeDTLS: %v", err)
		}
		d.crash()
	})
	f.Fuzz(func(t *testing.T, a, b []byte) {
		d.t = t
		for _, from := range []net.PacketConn{sock, other} {
			for _, b := range [][]byte{a, b} {
				if _, err := from.WriteTo(b, simnet.Addr(dtlsAddr)); err != nil {
					t.Fatal(err)
				}
			}
		}
		d.ask("/a")
	})
}
