package certificateauthority

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"encoding/asn1"
	"fmt"
	"net/netip"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Root names one of the three certification authorities. They share nothing, so that trust in one is never trust in
// another: a device that is told to believe the device root must not come to believe the console's certificate.
type Root string

// The roots.
const (
	Device   Root = "device"   // devices' identities and the hub's certificate towards them
	HTTPS    Root = "https"    // the applications' and people's side
	Internal Root = "internal" // between parts of a hub
)

// Roots returns all roots in order.
func Roots() []Root { return []Root{Device, HTTPS, Internal} }

// OCFIdentity is the extended key usage of identity certificates (OCF Security, 9.4.2.2: 1.3.6.1.4.1.44924.1.6).
var OCFIdentity = asn1.ObjectIdentifier{1, 3, 6, 1, 4, 1, 44924, 1, 6}

const (
	rootYears    = 30
	issuingYears = 10
	// serverValidity keeps below the 398 days that browsers accept for a server.
	serverValidity = 397 * 24 * time.Hour
	// backdate is for peers whose clock is a little behind ours.
	backdate = time.Hour
)

// Authority signs with the issuing keys of one data folder. Any goroutine may use it, also while it is rolled over.
type Authority struct {
	hubID hub.DeviceID
	dir   string
	keys  Keys   // nil: issuing keys are in dir
	lists string // as usage.lists, for what the roots sign

	changing sync.Mutex // held by who changes dir
	lines    atomic.Pointer[map[Root]line]
	changed  atomic.Pointer[func()] // called after changes of dir; nil: nobody else has to know

	registrar *Registrar
}

// Keys has issuing keys elsewhere than in files: in a hardware security module, or with a key management service. Root keys are
// files all the same: they are used once in years, and kept offline between.
type Keys interface {
	// Create makes the key of a new issuing certificate under a root.
	Create(r Root) (crypto.Signer, error)
	// Key finds the key of an issuing certificate, by its public key.
	Key(issuing *x509.Certificate) (crypto.Signer, error)
}

// Open loads the authorities kept in dir (created with 0700 when missing) for the hub whose ID is hubID, a UUID. What is
// missing on a first start, or after a first start that was cut short, is made; what is there is never replaced. Files that
// are damaged, do not belong together, or can be read by others are an error that names the file.
func Open(dir string, hubID string) (*Authority, error) { return OpenWith(dir, hubID, nil, "") }

// OpenWith is Open with issuing keys that are elsewhere; nil: they are in dir. A key that is in a file all the same, since it was
// made before the others were, is used until another takes its place. What the roots sign from now on names their revocation lists
// below base, as NewService has it; "": it names none.
func OpenWith(dir string, hubID string, keys Keys, base string) (*Authority, error) {
	id, err := hub.ParseDeviceID(hubID)
	if err != nil {
		return nil, fmt.Errorf("hub ID %q of the certification authority: %w", hubID, err)
	}
	if err := makeDir(dir); err != nil {
		return nil, err
	}
	a := &Authority{hubID: id, dir: dir, keys: keys}
	if base != "" {
		a.lists = base + ListsPath
	}
	lines := make(map[Root]line)
	for _, r := range Roots() {
		if lines[r], err = openLine(dir, r, id, keys, a.lists); err != nil {
			return nil, err
		}
	}
	a.lines.Store(&lines)
	a.registrar = newRegistrar(dir, func() signer { return a.signer(Device) })
	return a, nil
}

// line returns one of the three as it is now.
func (a *Authority) line(r Root) line { return (*a.lines.Load())[r] }

// known is line for a name from outside.
func (a *Authority) known(r Root) (line, error) {
	l, ok := (*a.lines.Load())[r]
	if !ok {
		return l, errRoot
	}
	return l, nil
}

// signer returns what signs under r now.
func (a *Authority) signer(r Root) signer {
	l := a.line(r)
	return l.signer()
}

// issuerOf finds which issuing certificate has signed a certificate: that of the name which its chain was found by. The key that it
// names (RFC 5280, Section 4.2.1.1) only saves work: whoever has a retired key can have it name another, or none.
func (a *Authority) issuerOf(c *x509.Certificate) (signer, bool) {
	for _, l := range *a.lines.Load() {
		for _, s := range l.issuers {
			if bytes.Equal(c.RawIssuer, s.issuing.RawSubject) &&
				(bytes.Equal(c.AuthorityKeyId, s.issuing.SubjectKeyId) || c.CheckSignatureFrom(s.issuing) == nil) {
				return s, true
			}
		}
	}
	return signer{}, false
}

// issuer finds an issuing certificate that is not retired by the name of its key.
func (a *Authority) issuer(name string) (signer, bool) {
	for _, l := range *a.lines.Load() {
		for _, s := range l.issuers {
			if s.name == name && s.key != nil {
				return s, true
			}
		}
	}
	return signer{}, false
}

// named are the issuing certificates of that subject that are not retired, each authority's oldest first.
func (a *Authority) named(subject []byte) (out []signer) {
	for _, l := range *a.lines.Load() {
		for _, s := range l.issuers {
			if s.key != nil && bytes.Equal(s.issuing.RawSubject, subject) {
				out = append(out, s)
			}
		}
	}
	return out
}

// ours reports whether a certificate is one of the authorities'.
func (a *Authority) ours(c *x509.Certificate) bool {
	for _, r := range Roots() {
		l := a.line(r)
		same := func(own *x509.Certificate) bool {
			return slices.Equal(own.RawSubjectPublicKeyInfo, c.RawSubjectPublicKeyInfo)
		}
		if slices.ContainsFunc(l.roots, func(x anchor) bool { return same(x.cert) }) || slices.ContainsFunc(l.issuers, func(x signer) bool { return same(x.issuing) }) {
			return true
		}
	}
	return false
}

// Signs reports whether a certificate was signed by what signs under r now.
func (a *Authority) Signs(r Root, c *x509.Certificate) bool {
	return bytes.Equal(c.AuthorityKeyId, a.signer(r).issuing.SubjectKeyId)
}

// RootPEM returns the root's certificate, which is public. While it is rolled over there are two, that in use first. An unknown
// root is NotFound.
func (a *Authority) RootPEM(r Root) ([]byte, error) {
	l, err := a.known(r)
	if err != nil {
		return nil, err
	}
	return l.rootPEM(), nil
}

func (l *line) rootPEM() (out []byte) {
	for _, root := range l.anchors(time.Now()) {
		out = append(out, certPEM(root.cert)...)
	}
	return out
}

// DevicePool returns a new pool with the device roots that are believed, and nothing else.
func (a *Authority) DevicePool() *x509.CertPool { return a.Pool(Device) }

// DeviceRoots returns all device roots that there ever were, the oldest first: whoever signed up under one of them is the same
// device under another.
func (a *Authority) DeviceRoots() (out []*x509.Certificate) {
	for _, root := range a.line(Device).roots {
		out = append(out, root.cert)
	}
	return out
}

// DeviceIntermediates returns the certificates under the device root that issue devices' certificates. Some clients send
// their own certificate without its chain (libcoap's with -c), so who verifies devices adds these to what a client sends.
func (a *Authority) DeviceIntermediates() (out []*x509.Certificate) {
	l, now := a.line(Device), time.Now()
	for _, s := range l.believed(now) {
		if now.Before(s.root.NotAfter) {
			out = append(out, s.issuing)
		}
	}
	return out
}

// Pool returns a new pool with the given root only, or both while it is rolled over; an unknown root gives an empty pool, which
// trusts nobody.
func (a *Authority) Pool(r Root) *x509.CertPool {
	pool := x509.NewCertPool()
	if l, err := a.known(r); err == nil {
		for _, root := range l.anchors(time.Now()) {
			pool.AddCert(root.cert)
		}
	}
	return pool
}

// HubCertificate makes the certificate that the hub shows to devices, with a new key: common name uuid:<hub ID>, because
// that is what devices compare with the sid they were given, the OCF identity usage, and hosts (names or addresses without
// port) as subject alternative names. It lasts 397 days. After a new root has come into use it is believed by who knows only the
// one before it, too.
func (a *Authority) HubCertificate(hosts []string) (tls.Certificate, error) {
	return a.serverCertificate(Device, a.hubName(), hosts, hubUsage)
}

func (a *Authority) hubName() string { return "uuid:" + string(a.hubID) }

// HTTPSCertificate makes a server certificate for hosts (names or addresses without port, at least one) under the HTTPS
// root, with a new key. It lasts 397 days.
func (a *Authority) HTTPSCertificate(hosts []string) (tls.Certificate, error) {
	if len(hosts) == 0 {
		return tls.Certificate{}, errNoHosts
	}
	return a.serverCertificate(HTTPS, httpsName, hosts, serverUsage)
}

// httpsName is the common name of the hub's certificates towards applications and people.
const httpsName = "coaphub"

var errNoHosts = hub.NewError(hub.Invalid, "hosts-missing", "a server certificate needs at least one host")

// Identity is what a device needs to prove who it is. All are PEM.
type Identity struct {
	Chain []byte // the device's certificate, then the issuing one
	Key   []byte // PKCS #8; it is not kept here
	CA    []byte // the device root, which also signs the hub's certificate; two while it is rolled over

	leaf *x509.Certificate // the first of Chain
}

// IssueDevice makes a key and an identity certificate for dev: common name uuid:<dev>, clientAuth, serverAuth and the OCF
// identity usage. It begins an hour ago, for clocks that are behind, and ends after validity, but neither before nor after
// the issuing certificate. The hub's own ID is Denied: its holder would be the hub to every device. A validity that is not
// positive, or an ID that ParseDeviceID did not make, is Invalid.
func (a *Authority) IssueDevice(dev hub.DeviceID, validity time.Duration) (Identity, error) {
	return withKey(func(key crypto.PublicKey) (Identity, error) { return a.issueDeviceFor(key, dev, validity, deviceUsage) })
}

// withKey makes a key, and has a certificate made for it.
func withKey(issue func(crypto.PublicKey) (Identity, error)) (Identity, error) {
	key, err := newECDSA()
	if err != nil {
		return Identity{}, err
	}
	id, err := issue(key.Public())
	if err == nil {
		id.Key, err = keyPEM(key)
	}
	if err != nil {
		return Identity{}, err
	}
	return id, nil
}

// issueDeviceFor is IssueDevice for a key that somebody else has.
func (a *Authority) issueDeviceFor(key crypto.PublicKey, dev hub.DeviceID, validity time.Duration, use usage) (Identity, error) {
	const op = "certificateauthority.IssueDevice"
	id, err := hub.ParseDeviceID(string(dev))
	switch {
	case err != nil:
		return Identity{}, fmt.Errorf("%s: %w", op, err)
	case id == a.hubID:
		return Identity{}, errOfHub.With(op, nil)
	case validity <= 0:
		return Identity{}, hub.NewError(hub.Invalid, "validity-invalid", "the validity is not positive").With(op, nil)
	}
	l := a.line(Device)
	s := l.signer()
	leaf, err := s.signKey(key, "uuid:"+string(id), validity, use, nil)
	if err != nil {
		return Identity{}, fmt.Errorf("%s: %w", op, err)
	}
	return Identity{Chain: slices.Concat(certPEM(leaf), certPEM(s.issuing)), CA: l.rootPEM(), leaf: leaf}, nil
}

var errOfHub = hub.NewError(hub.Denied, "device-id-of-hub", "the ID is the hub's own")

func (a *Authority) serverCertificate(r Root, name string, hosts []string, use usage) (tls.Certificate, error) {
	key, err := newECDSA()
	if err != nil {
		return tls.Certificate{}, err
	}
	c, err := a.serverCertificateFor(key.Public(), r, name, hosts, use)
	if err != nil {
		return tls.Certificate{}, err
	}
	c.PrivateKey = key
	return c, nil
}

// serverCertificateFor is serverCertificate for a key that somebody else has.
func (a *Authority) serverCertificateFor(key crypto.PublicKey, r Root, name string, hosts []string, use usage) (tls.Certificate, error) {
	for _, h := range hosts {
		if !validHost(h) {
			return tls.Certificate{}, hub.NewError(hub.Invalid, "host-invalid", fmt.Sprintf("%q is neither a host name nor an address", h))
		}
	}
	l := a.line(r)
	leaf, err := l.signer().signKey(key, name, serverValidity, use, hosts)
	if err != nil {
		return tls.Certificate{}, fmt.Errorf("certificate for %s under the %s root: %w", name, r, err)
	}
	return tls.Certificate{Certificate: append([][]byte{leaf.Raw}, l.chain(time.Now())...), Leaf: leaf}, nil
}

// validHost accepts what can stand in a subject alternative name: an address, or a name of letters, digits, dots and
// dashes. A port or a scheme in it is a mistake that would otherwise show as a failing handshake much later.
func validHost(h string) bool {
	if _, err := netip.ParseAddr(h); err == nil {
		return true
	}
	if h == "" || len(h) > 253 {
		return false
	}
	for _, c := range []byte(h) {
		if c != '-' && c != '.' && c != '*' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}
