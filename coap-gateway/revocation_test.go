package coapgateway

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"golang.org/x/crypto/ocsp"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/revocation"
)

// elsewhere is an authority that is not the hub's, and publishes what it revokes.
type elsewhere struct {
	*ca
	t   *testing.T
	srv *httptest.Server

	mu     sync.Mutex // guards all below
	answer http.HandlerFunc
	number int64
}

func newElsewhere(t *testing.T) *elsewhere {
	t.Helper()
	e := &elsewhere{t: t, ca: &ca{}, answer: func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) }}
	e.cert, e.key = e.make(t, &x509.Certificate{
		Subject: pkix.Name{CommonName: "elsewhere"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	e.srv = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		e.mu.Lock()
		answer := e.answer
		e.mu.Unlock()
		answer(w, r)
	}))
	t.Cleanup(e.srv.Close)
	return e
}

func (e *elsewhere) serve(answer http.HandlerFunc) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.answer = answer
}

// publish makes a list of some certificates, which has ended already if late.
func (e *elsewhere) publish(late bool, revoked ...tls.Certificate) {
	e.t.Helper()
	e.number++
	l := &x509.RevocationList{Number: big.NewInt(e.number), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: time.Now().Add(time.Hour)}
	if late {
		l.NextUpdate = time.Now().Add(-time.Hour)
	}
	for _, c := range revoked {
		l.RevokedCertificateEntries = append(l.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.Leaf.SerialNumber, RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, l, e.cert, e.key)
	if err != nil {
		e.t.Fatal(err)
	}
	e.serve(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(der) })
}

// set trusts the authority beside the hub's own.
func (e *elsewhere) set(change func(*revocation.CASetConfig)) func(*Config, *Deps) {
	return func(c *Config, _ *Deps) {
		s := revocation.CASetConfig{Name: "elsewhere", CAs: []string{e.pem()}, Lists: []string{e.srv.URL + "/a.crl"}}
		if change != nil {
			change(&s)
		}
		c.API.CoAP.TLS.CAPool, c.API.CoAP.TLS.CASets = []string{house.ca.pem()}, []revocation.CASetConfig{s}
	}
}

// fetched waits for a list that says this of a certificate.
func (h *hall) fetched(e *elsewhere, cert tls.Certificate, want revocation.Status) {
	h.t.Helper()
	h.w.await(h.t, "the list", func() bool { return h.gw.revocation.Known([]*x509.Certificate{cert.Leaf, e.cert}) == want })
}

// enter connects the device with a certificate, and is what its sign-in brings.
func (h *hall) enter(id hub.DeviceID, cert tls.Certificate) (*device, reply) {
	h.t.Helper()
	d := h.connect(h.device(id), h.gw.Addresses().Secure, h.tlsFor(cert))
	return d, d.signIn("token")
}

func owned(t *testing.T, setup func(*Config, *Deps)) *hall {
	t.Helper()
	h := start(t, setup)
	h.w.own(lampID, "alice")
	h.w.own(fanID, "alice")
	h.issue("code", "token", hub.Claims{})
	return h
}

// TestListsOfOtherAuthorities: what another authority has revoked does not come in, and what it revokes ends its session, and no
// other; the hub's own devices do not notice.
func TestListsOfOtherAuthorities(t *testing.T) {
	t.Parallel()
	e := newElsewhere(t)
	first, second, other := e.identity(t, lampID, nil), e.identity(t, lampID, nil), e.identity(t, fanID, nil)
	e.publish(true, first) // and so it is asked for again soon
	h := owned(t, e.set(func(s *revocation.CASetConfig) { s.Policy = revocation.PolicyOpen }))
	h.fetched(e, first, revocation.Revoked)
	h.refusedInHandshake(t, first, "revoked")
	if _, err := h.shake(t, dtls.WithCertificates(first)); err == nil || !strings.Contains(err.Error(), "CertificateRevoked") {
		t.Errorf("over DTLS: %v", err)
	}
	lamp, got := h.enter(lampID, second)
	lamp.want(got, "2.04", "")
	fan, got := h.enter(fanID, other)
	fan.want(got, "2.04", "")
	e.publish(false, first, second)
	h.awaitEnded(lamp, "certificate-revoked")
	fan.alive()
	h.refusedInHandshake(t, second, "revoked")
	lamp, got = h.enter(lampID, h.ca.identity(t, lampID, nil))
	lamp.want(got, "2.04", "")
}

// Where nobody knows whether a certificate was revoked a closed set has its devices come again later: it is not their fault, so it
// is never 4.01. What needs no account goes on.
func TestNobodyKnowsWhetherItWasRevoked(t *testing.T) {
	t.Parallel()
	for name, ask := range map[string]func(*device) reply{
		"sign-in": func(d *device) reply { return d.signIn("token") },
		"sign-up": func(d *device) reply { return d.signUp("code") },
		"sign-out": func(d *device) reply {
			return d.post("/oic/sec/session", body{"uid": "alice", "accesstoken": "token", "login": false})
		},
		"refresh": func(d *device) reply {
			return d.post("/oic/sec/tokenrefresh", body{"uid": "alice", "refreshtoken": "r"})
		},
		"sign-off": func(d *device) reply {
			return d.do(codes.DELETE, "/oic/sec/account", nil, query("uid=alice"), query("accesstoken=token"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			e := newElsewhere(t)
			if name == "refresh" {
				e.publish(true) // a late list is as good as none
			}
			h := owned(t, e.set(nil))
			unlock := h.w.lock()
			h.w.refresh["r"] = hub.Tokens{Access: "token", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
			unlock()
			cert := e.identity(t, lampID, nil)
			conn, err := h.shake(t, dtls.WithCertificates(cert))
			if err != nil {
				t.Fatalf("over DTLS: %v", err)
			}
			_ = conn.Close()
			d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(cert))
			d.alive()
			r := d.want(ask(d), "5.03", "revocation-unknown: ")
			if r.maxAge != 30 {
				t.Errorf("it may come again after %d s", r.maxAge)
			}
			d.awaitClosed()
			for _, what := range []string{"online " + string(lampID), "signed-up " + string(lampID) + " alice", "signed-off " + string(lampID)} {
				if h.w.count(what) > 0 {
					t.Errorf("%s although nobody knows", what)
				}
			}
			// The hub's own devices have nothing to do with it.
			fan, got := h.enter(fanID, h.ca.identity(t, fanID, nil))
			fan.want(got, "2.04", "")
			if name != "sign-in" {
				return
			}
			e.publish(false)
			h.fetched(e, cert, revocation.Good)
			d, got = h.enter(lampID, cert)
			d.want(got, "2.04", "")
		})
	}
}

// A responder is asked behind the handshake; what it said counts in the next one.
func TestRespondersOfOtherAuthorities(t *testing.T) {
	t.Parallel()
	e := newElsewhere(t)
	good, bad := e.identity(t, fanID, nil), e.identity(t, lampID, nil)
	e.serve(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		q, err := ocsp.ParseRequest(b)
		if err != nil {
			t.Error(err)
			return
		}
		a := ocsp.Response{Status: ocsp.Good, SerialNumber: q.SerialNumber, ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
		if q.SerialNumber.Cmp(bad.Leaf.SerialNumber) == 0 {
			a.Status, a.RevokedAt = ocsp.Revoked, time.Now()
		}
		der, err := ocsp.CreateResponse(e.cert, e.cert, a, e.key)
		if err != nil {
			t.Error(err)
		}
		_, _ = w.Write(der)
	})
	h := owned(t, e.set(func(s *revocation.CASetConfig) { s.Lists, s.Responder = nil, e.srv.URL }))
	fan, got := h.enter(fanID, good)
	fan.want(got, "2.04", "")
	lamp, got := h.enter(lampID, bad)
	lamp.want(got, "4.01", "certificate-revoked: ")
	lamp.awaitClosed()
	h.refusedInHandshake(t, bad, "revoked")
	fan.alive()
}

// With sets the hub trusts what is configured and nobody else, as with a pool; a CA is in one of them.
func TestCASetsAreTrustedAlone(t *testing.T) {
	t.Parallel()
	e := newElsewhere(t)
	e.publish(false)
	h := owned(t, func(c *Config, d *Deps) {
		e.set(nil)(c, d)
		c.API.CoAP.TLS.CAPool = nil
	})
	h.w.await(t, "the list", func() bool {
		return h.gw.revocation.Known([]*x509.Certificate{e.identity(t, lampID, nil).Leaf, e.cert}) == 0
	})
	lamp, got := h.enter(lampID, e.identity(t, lampID, nil))
	lamp.want(got, "2.04", "")
	h.refusedInHandshake(t, h.ca.identity(t, lampID, nil), "unknown authority")
	// Nor does a device vouch for another.
	device := e.identity(t, fanID, nil)
	forger := &ca{cert: device.Leaf, key: device.PrivateKey.(*ecdsa.PrivateKey)}
	forged := forger.identity(t, lampID, nil)
	forged.Certificate = append(forged.Certificate, device.Certificate[0])
	h.refusedInHandshake(t, forged, "x509")
}

func TestCASetsThatAreRefused(t *testing.T) {
	t.Parallel()
	e := newElsewhere(t)
	below := &ca{}
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "below"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	below.cert, below.key = e.make(t, tmpl)
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"a CA of the set in the pool": {func(c *Config) { c.API.CoAP.TLS.CAPool = []string{e.pem()} }, "tls.caPool: "},
		"one below it in the pool":    {func(c *Config) { c.API.CoAP.TLS.CAPool = []string{below.pem()} }, "tls.caPool: "},
		"a device in the set": {func(c *Config) {
			leaf := e.identity(t, lampID, nil).Leaf
			c.API.CoAP.TLS.CASets[0].CAs = []string{string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: leaf.Raw}))}
		}, "is not a CA"},
		"a CA in two sets": {func(c *Config) {
			two := c.API.CoAP.TLS.CASets[0]
			two.Name = "two"
			c.API.CoAP.TLS.CASets = append(c.API.CoAP.TLS.CASets, two)
		}, "is in the set elsewhere, too"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := Default()
			deps := Deps{Providers: []NamedProvider{{}}, Certificate: func() (*tls.Certificate, error) { return &house.hub, nil }, Lists: filepath.Join(t.TempDir(), "x")}
			e.set(nil)(&cfg, &deps)
			cfg.API.CoAP.Protocols = []string{ProtocolTCP}
			c.change(&cfg)
			if _, err := New(cfg, deps, slog.New(slog.DiscardHandler), nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}
