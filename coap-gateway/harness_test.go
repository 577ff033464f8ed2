package coapgateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/hex"
	"encoding/pem"
	"flag"
	"fmt"
	"log/slog"
	"math/big"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
)

func TestMain(m *testing.M) {
	// Refusals come late and tests wait for them: more of them at once than there are CPUs.
	if err := flag.Set("test.parallel", "8"); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const (
	hubID  hub.DeviceID = "b2a4c0de-0000-4000-8000-000000000001"
	lampID hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	fanID  hub.DeviceID = "d0000000-0000-4000-8000-000000000002"
)

// ca is a certificate authority of a test.
type ca struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(t *testing.T) *ca {
	t.Helper()
	c := &ca{}
	c.cert, c.key = c.make(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return c
}

func (c *ca) make(t *testing.T, tmpl *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if tmpl.SerialNumber == nil {
		if tmpl.SerialNumber, err = rand.Int(rand.Reader, big.NewInt(1<<62)); err != nil {
			t.Fatal(err)
		}
	}
	if tmpl.NotBefore.IsZero() {
		tmpl.NotBefore = time.Now().Add(-time.Hour)
	}
	if tmpl.NotAfter.IsZero() {
		tmpl.NotAfter = time.Now().Add(48 * time.Hour)
	}
	parent, signer := c.cert, c.key
	if parent == nil {
		parent, signer = tmpl, key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

func (c *ca) pem() string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw}))
}

func (c *ca) pool() *x509.CertPool {
	p := x509.NewCertPool()
	p.AddCert(c.cert)
	return p
}

// identity issues a device's identity certificate; spoil may change it before it is signed.
func (c *ca) identity(t *testing.T, id hub.DeviceID, spoil func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	tmpl := &x509.Certificate{
		Subject:            pkix.Name{CommonName: "uuid:" + string(id)},
		KeyUsage:           x509.KeyUsageDigitalSignature,
		ExtKeyUsage:        []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		UnknownExtKeyUsage: []asn1.ObjectIdentifier{ocfIdentity},
		DNSNames:           []string{"localhost"},
	}
	if spoil != nil {
		spoil(tmpl)
	}
	cert, key := c.make(t, tmpl)
	return tls.Certificate{Certificate: [][]byte{cert.Raw}, PrivateKey: key, Leaf: cert}
}

// ledger is what authorities know of the end of their certificates.
type ledger struct {
	mu   sync.Mutex // guards gone
	gone map[string]bool
}

func (l *ledger) key(c *x509.Certificate) string {
	return fmt.Sprintf("%x %x", c.AuthorityKeyId, c.SerialNumber)
}

// revoke stores the end of a certificate, of which nobody is told yet, and returns its serial.
func (l *ledger) revoke(c tls.Certificate) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.gone == nil {
		l.gone = map[string]bool{}
	}
	l.gone[l.key(c.Leaf)] = true
	return hex.EncodeToString(c.Leaf.SerialNumber.Bytes())
}

func (l *ledger) revoked(c *x509.Certificate) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.gone[l.key(c)]
}

// hall is a running gateway with a world behind it.
type hall struct {
	t  *testing.T
	w  *world
	gw *Gateway
	ca *ca
}

// house is the CA of all halls and the hub's certificate: made once, because a thousand halls are started.
var house struct {
	once sync.Once
	ca   *ca
	hub  tls.Certificate
}

// start runs a gateway on loopback with both listeners.
func start(t *testing.T, change func(*Config, *Deps)) *hall {
	t.Helper()
	return startPatient(t, 300*time.Millisecond, change)
}

// startPatient has writes tried again for so long.
func startPatient(t *testing.T, patience time.Duration, change func(*Config, *Deps)) *hall {
	t.Helper()
	house.once.Do(func() {
		house.ca = newCA(t)
		house.hub = house.ca.identity(t, hubID, nil)
	})
	h := &hall{t: t, w: newWorld(), ca: house.ca}
	cfg := Default()
	cfg.API.CoAP.Address, cfg.API.CoAP.PlainAddress = "127.0.0.1:0", "127.0.0.1:0"
	deps := Deps{
		Directory: &h.w.dir, Identities: &h.w.ids, Verifier: &h.w.ver,
		Providers:   []NamedProvider{{Name: "main", Provider: &h.w.prov}},
		Certificate: func() (*tls.Certificate, error) { return &house.hub, nil },
		ClientCAs:   h.ca.pool(), HubID: hubID, Service: "gateway-1",
	}
	if change != nil {
		change(&cfg, &deps)
	}
	gw, err := New(cfg, deps, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	gw.patience = patience
	h.gw = gw
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- gw.Run(ctx, func() { close(ready) }) }()
	select {
	case <-ready:
	case err := <-done:
		t.Fatalf("the gateway did not start: %v", err)
	}
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("the gateway ended with %v", err)
		}
	})
	return h
}

func (h *hall) device(id hub.DeviceID) *device {
	return &device{
		t: h.t, id: id, bump: make(chan struct{}), res: map[string]resource{}, got: map[string][]byte{}, watching: map[string]message.Token{},
	}
}

func (h *hall) connect(d *device, addr string, conf *tls.Config) *device {
	h.t.Helper()
	if err := d.dial(addr, conf); err != nil {
		h.t.Fatalf("connect: %v", err)
	}
	h.t.Cleanup(func() { _ = d.conn.Close(); <-d.conn.Done() })
	return d
}

// plain connects a device without TLS: it is whoever it says.
func (h *hall) plain(id hub.DeviceID) *device {
	h.t.Helper()
	return h.connect(h.device(id), h.gw.Addresses().Plain, nil)
}

func (h *hall) tlsFor(certs ...tls.Certificate) *tls.Config {
	return &tls.Config{RootCAs: h.ca.pool(), ServerName: "localhost", Certificates: certs}
}

// secure connects a device with its identity certificate.
func (h *hall) secure(id hub.DeviceID) *device {
	h.t.Helper()
	return h.connect(h.device(id), h.gw.Addresses().Secure, h.tlsFor(h.ca.identity(h.t, id, nil)))
}

// online connects a plain device of alice, signed in, with what prepare gives it.
func (h *hall) online(id hub.DeviceID, prepare func(*device)) *device {
	h.t.Helper()
	d := h.device(id)
	if prepare != nil {
		prepare(d)
	}
	h.connect(d, h.gw.Addresses().Plain, nil)
	h.w.own(id, "alice")
	d.want(d.signIn(h.w.grant(fmt.Sprintf("token-%s", id), hub.Claims{})), "2.04", "")
	return d
}

// mute prepares a device that answers nothing the hub asks, so that the twin leaves what is published alone.
func mute(d *device) { d.mute = true }
