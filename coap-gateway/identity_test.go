package coapgateway

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
)

// rowSetup configures one row of the table of design: who the device is.
func rowSetup(certificate bool, claim string) func(*Config, *Deps) {
	return func(c *Config, _ *Deps) {
		c.API.CoAP.TLS.ClientCertificateRequired = certificate
		c.API.CoAP.Authorization.DeviceIDClaim = claim
	}
}

const namespaced = "https://example.com/deviceId" // URI-style claims are literal names; the verifier reads them

// The table "TLS and identity" of docs/protocol.md is test/e2e's TestIdentity, but for what stands here: a sign-off with a token in
// its query, which must be shorter than any JWT (RFC 7252, Section 5.10).
func TestSignOffWithAToken(t *testing.T) {
	t.Parallel()
	strict := func(setup func(*Config, *Deps)) func(*Config, *Deps) {
		return func(c *Config, d *Deps) {
			setup(c, d)
			c.API.CoAP.Authorization.StrictDeviceID = true
		}
	}
	lamp, fan := string(lampID), string(fanID)
	rows := map[string]func(*Config, *Deps){
		"neither": rowSetup(false, ""), "claim": rowSetup(false, namespaced),
		"certificate": rowSetup(true, ""), "both": rowSetup(true, namespaced),
	}
	for _, c := range []struct {
		row       string
		strict    bool
		di, claim string
		want      hub.DeviceID
		code      string // of a refusal, with text
		text      string
	}{
		{"neither", false, lamp, "", lampID, "", ""},
		{"neither", false, strings.ToUpper(lamp), "", lampID, "", ""},
		{"neither", false, "", "", "", "4.00", "device-id-missing: "},
		{"neither", false, "lamp", "", "", "4.00", "device-id-invalid: "},
		{"neither", false, "00000000-0000-0000-0000-000000000000", "", "", "4.00", "device-id-invalid: "},
		{"claim", false, fan, lamp, lampID, "", ""},
		{"claim", false, "", strings.ToUpper(lamp), lampID, "", ""},
		{"claim", false, lamp, "", "", "4.01", "device-claim-missing: "},
		{"claim", false, lamp, "lamp", "", "4.01", "device-claim-invalid: "},
		{"claim", true, lamp, lamp, lampID, "", ""},
		{"claim", true, fan, lamp, "", "4.01", "device-id-mismatch: "},
		{"certificate", false, fan, "", lampID, "", ""},
		{"certificate", false, "", "", lampID, "", ""},
		{"certificate", true, lamp, "", lampID, "", ""},
		{"certificate", true, fan, "", "", "4.01", "device-id-mismatch: "},
		{"both", false, fan, lamp, lampID, "", ""},
		{"both", false, lamp, fan, "", "4.01", "device-claim-mismatch: "},
		{"both", false, lamp, "", "", "4.01", "device-claim-missing: "},
		{"both", true, fan, lamp, "", "4.01", "device-id-mismatch: "},
	} {
		t.Run(fmt.Sprintf("%s, strict %v, di %q, claim %q", c.row, c.strict, c.di, c.claim), func(t *testing.T) {
			t.Parallel()
			setup := rows[c.row]
			if c.strict {
				setup = strict(setup)
			}
			h := start(t, setup)
			h.w.own(lampID, "alice")
			h.w.own(fanID, "alice")
			h.w.grant("token", hub.Claims{DeviceID: c.claim})
			var certs []tls.Certificate
			if h.gw.cfg.API.CoAP.TLS.ClientCertificateRequired {
				certs = append(certs, h.ca.identity(t, lampID, nil))
			}
			opts := []option{query("uid=alice"), query("accesstoken=token")}
			if c.di != "" {
				opts = append(opts, query("di="+c.di))
			}
			d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(certs...))
			r := d.do(codes.DELETE, "/oic/sec/account", nil, opts...)
			if c.code == "" {
				d.want(r, "2.02", "")
				h.w.awaitLog(t, "signed-off "+string(c.want))
				return
			}
			d.want(r, c.code, c.text)
			d.awaitClosed()
			for _, line := range h.w.soFar() {
				t.Errorf("%s although it was refused", line)
			}
		})
	}
}

// With a code that is for any device the claim is what the device says.
func TestSignUpWithACodeForAnyDevice(t *testing.T) {
	t.Parallel()
	for di, want := range map[string]string{
		string(lampID): "2.04", "": "4.00 device-id-missing: ", "lamp": "4.00 device-id-invalid: ",
	} {
		h := start(t, rowSetup(false, namespaced))
		h.w.grant("token", hub.Claims{DeviceID: string(lampID)})
		h.w.prov.exchange = func(_ context.Context, dev hub.DeviceID, _, _ string) (hub.Tokens, error) {
			if dev == "" {
				return hub.Tokens{}, hub.NewError(hub.Invalid, "device-id-missing", "the code is for any device: name one")
			}
			return hub.Tokens{Access: "token", Refresh: "r"}, nil
		}
		d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor())
		code, text, _ := strings.Cut(want, " ")
		r := d.post("/oic/sec/account", body{"di": di, "accesstoken": "code"})
		if r.code != code || text != "" && !strings.HasPrefix(r.text(), text) {
			t.Errorf("di %q: %s %q, want %s", di, r.code, r.body, want)
		}
	}
}

// A plain listener knows no certificates: the rows without them hold there, whatever TLS asks for.
func TestPlainListenerHasNoCertificates(t *testing.T) {
	t.Parallel()
	h := start(t, rowSetup(true, ""))
	h.issue("code", "token", hub.Claims{})
	d := h.plain(fanID)
	d.want(d.signUp("code"), "2.04", "")
	h.w.awaitLog(t, "signed-up "+string(fanID)+" alice")
}

func TestCertificatesThatAreRefusedInTheHandshake(t *testing.T) {
	t.Parallel()
	two := func(c *x509.Certificate) {
		c.Subject = pkix.Name{ExtraNames: []pkix.AttributeTypeAndValue{
			{Type: commonName, Value: "uuid:" + string(lampID)}, {Type: commonName, Value: "uuid:" + string(fanID)},
		}}
	}
	for name, c := range map[string]struct {
		id     hub.DeviceID
		spoil  func(*x509.Certificate)
		other  bool // of another CA
		none   bool
		reason string
	}{
		"none":          {lampID, nil, false, true, "certificate"},
		"another CA":    {lampID, nil, true, false, "unknown authority"},
		"no clientAuth": {lampID, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, false, false, "usage"},
		"no OCF usage":  {lampID, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, false, false, "OCF identity"},
		"another OCF usage": {lampID, func(c *x509.Certificate) {
			c.UnknownExtKeyUsage = []asn1.ObjectIdentifier{{1, 3, 6, 1, 4, 1, 44924, 1, 7}}
		}, false, false, "OCF identity"},
		"two common names":   {lampID, two, false, false, "exactly one common name"},
		"no common name":     {lampID, func(c *x509.Certificate) { c.Subject = pkix.Name{Organization: []string{"x"}} }, false, false, "exactly one common name"},
		"name without uuid:": {lampID, func(c *x509.Certificate) { c.Subject.CommonName = string(lampID) }, false, false, "uuid:<device ID>"},
		"name is no UUID":    {lampID, func(c *x509.Certificate) { c.Subject.CommonName = "uuid:lamp" }, false, false, "uuid:<device ID>"},
		"the hub's own ID":   {hubID, nil, false, false, "the hub's own"},
		"expired":            {lampID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, false, false, "expired"},
		"not valid yet":      {lampID, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(10 * time.Minute) }, false, false, "not yet valid"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			h := start(t, nil)
			issuer := h.ca
			if c.other {
				issuer = newCA(t)
			}
			if c.none {
				h.refusedInHandshake(t, tls.Certificate{}, c.reason)
			} else {
				h.refusedInHandshake(t, issuer.identity(t, c.id, c.spoil), c.reason)
			}
		})
	}
}

// refusedInHandshake shows cert (none if it is empty), over TLS and over DTLS, and wants an alert, and a record of the refusal
// with reason in it.
func (h *hall) refusedInHandshake(t *testing.T, cert tls.Certificate, reason string) {
	t.Helper()
	h.refusedOverDTLS(t, cert, reason)
	conf := h.tlsFor()
	if len(cert.Certificate) > 0 {
		// Shown although the hub did not ask for this CA: a client must not be the one that notices.
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }
	}
	start := time.Now()
	conn, err := tls.Dial("tcp", h.gw.Addresses().Secure, conf)
	if err == nil {
		// TLS 1.3: the client is done before the server has looked at its certificate; the alert comes with the first read.
		_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		for err == nil {
			_, err = conn.Read(make([]byte, 64))
		}
		_ = conn.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "remote error: tls:") {
		t.Errorf("the handshake ended with %v, want an alert", err)
	}
	h.recorded(t, start, reason)
}

// refusedOverDTLS is refusedInHandshake over DTLS.
func (h *hall) refusedOverDTLS(t *testing.T, cert tls.Certificate, reason string) {
	t.Helper()
	opts := []dtls.ClientOption{}
	if len(cert.Certificate) > 0 {
		opts = append(opts, dtls.WithGetClientCertificate(func(*dtls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }))
	}
	start := time.Now()
	conn, err := h.shake(t, opts...)
	if err == nil {
		_ = conn.Close()
	}
	if err == nil || !strings.Contains(err.Error(), "alert") {
		t.Errorf("the DTLS handshake ended with %v, want an alert", err)
	}
	h.recorded(t, start, reason)
}

// shake makes a DTLS association with the gateway.
func (h *hall) shake(t *testing.T, opts ...dtls.ClientOption) (*dtls.Conn, error) {
	t.Helper()
	at, err := net.ResolveUDPAddr("udp", h.gw.Addresses().SecureUDP)
	if err != nil {
		t.Fatal(err)
	}
	sock, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	opts = append([]dtls.ClientOption{dtls.WithRootCAs(h.ca.pool()), dtls.WithServerName("localhost")}, opts...)
	conn, err := dtls.ClientWithOptions(sock, at, opts...)
	if err == nil {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if err = conn.HandshakeContext(ctx); err == nil {
			return conn, nil
		}
		_ = conn.Close()
	}
	_ = sock.Close()
	return nil, err
}

// recorded waits for the record of a connection that was refused since start.
func (h *hall) recorded(t *testing.T, start time.Time, reason string) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		refused := h.gw.Refused()
		if slices.ContainsFunc(refused, func(r Refusal) bool {
			return !r.Time.Before(start) && r.What == "connection" && strings.Contains(r.Reason, reason)
		}) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the refusal is not recorded with %q: %+v", reason, refused)
		}
	}
}

// A certificate that was revoked opens no connection, whatever else is demanded of it; another one of the same device does.
func TestRevokedCertificateIsRefusedInTheHandshake(t *testing.T) {
	t.Parallel()
	for name, properties := range map[string]bool{"identity demanded": true, "any certificate of the CA": false} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var l ledger
			h := start(t, func(c *Config, deps *Deps) {
				c.API.CoAP.TLS.IdentityPropertiesRequired = properties
				deps.Revoked = l.revoked
			})
			bad, good := h.ca.identity(t, lampID, nil), h.ca.identity(t, lampID, nil)
			l.revoke(bad)
			h.refusedInHandshake(t, bad, "the certificate was revoked")
			if _, err := h.shake(t, dtls.WithCertificates(bad)); err == nil || !strings.Contains(err.Error(), "CertificateRevoked") {
				t.Errorf("the DTLS handshake ended with %v, want the alert certificate_revoked", err)
			}
			h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(good)).alive()
			conn, err := h.shake(t, dtls.WithCertificates(good))
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.Close()
		})
	}
}

// The name may have its prefix and hex digits in capitals.
func TestCertificateNameInCapitals(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	cert := h.ca.identity(t, lampID, func(c *x509.Certificate) { c.Subject.CommonName = "UUID:" + strings.ToUpper(string(lampID)) })
	h.issue("code", "token", hub.Claims{})
	d := h.connect(h.device(fanID), h.gw.Addresses().Secure, h.tlsFor(cert))
	d.want(d.signUp("code"), "2.04", "")
	h.w.awaitLog(t, "signed-up "+string(lampID)+" alice")
}

// identityPropertiesRequired: false lets any certificate of the CA shake hands, but it names no device.
func TestCertificateWithoutIdentityProperties(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.TLS.IdentityPropertiesRequired = false })
	cert := h.ca.identity(t, lampID, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil })
	h.issue("code", "token", hub.Claims{})
	d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(cert))
	d.want(d.do(codes.GET, "/x.plgd.dev/time", nil), "2.05", "")
	d.want(d.signUp("code"), "4.01", "device-id-missing: ")
	d.awaitClosed()
	// One with the properties is identified all the same.
	e := h.secure(fanID)
	e.want(e.signUp("code"), "2.04", "")
	h.w.awaitLog(t, "signed-up "+string(fanID)+" alice")
}

// caPool replaces the hub's own device CA: PEM texts and files.
func TestConfiguredCAPool(t *testing.T) {
	t.Parallel()
	foreign := newCA(t)
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.TLS.CAPool = []string{foreign.pem()} })
	d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(foreign.identity(t, lampID, nil)))
	d.alive()
}

// issuing makes a CA under c, as a hub has one under its root.
func (c *ca) issuing(t *testing.T, spoil func(*x509.Certificate)) *ca {
	t.Helper()
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: "test issuing CA"}, IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign,
	}
	if spoil != nil {
		spoil(tmpl)
	}
	u := &ca{}
	u.cert, u.key = c.make(t, tmpl)
	return u
}

// libcoap's clients with -c, and some devices, send their own certificate without the one that issued it. They are let in,
// and are the same devices as with the whole chain.
func TestClientThatSendsItsCertificateOnly(t *testing.T) {
	t.Parallel()
	root := newCA(t)
	issuing := root.issuing(t, nil)
	whole := func(c tls.Certificate) tls.Certificate {
		c.Certificate = append(slices.Clone(c.Certificate), issuing.cert.Raw)
		return c
	}
	for name, setup := range map[string]func(*Config, *Deps){
		"the hub's own": func(_ *Config, d *Deps) {
			d.ClientCAs, d.ClientIntermediates = root.pool(), []*x509.Certificate{issuing.cert}
		},
		"configured": func(c *Config, _ *Deps) { c.API.CoAP.TLS.CAPool = []string{root.pem() + issuing.pem()} },
	} {
		t.Run(name, func(t *testing.T) {
			h := start(t, setup)
			cert := issuing.identity(t, lampID, nil)
			h.issue("code", "token", hub.Claims{})
			d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(cert))
			d.want(d.signUp("code"), "2.04", "")
			if pin := h.w.pin(lampID); pin != pinOf(root.cert) {
				t.Errorf("pinned to %q, want the root's %q", pin, pinOf(root.cert))
			}
			e := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(whole(cert)))
			h.issue("code2", "token2", hub.Claims{})
			e.want(e.signUp("code2"), "2.04", "") // the world refuses another pin
		})
	}
}

// Nobody else comes in by the issuing certificate that the hub adds.
func TestIntermediateAdmitsNobodyElse(t *testing.T) {
	t.Parallel()
	root, foreign := newCA(t), newCA(t)
	issuing := root.issuing(t, nil)
	same := foreign.issuing(t, nil)     // the same names, another root
	below := issuing.issuing(t, nil)    // a CA that an issuing one may not make (path length 0)
	sibling := root.issuing(t, nil)     // under the root, but not one that the hub knows
	var client tls.Certificate          // a device that signs for others
	asCA := func(c *x509.Certificate) { // with everything an identity has
		c.IsCA, c.BasicConstraintsValid, c.KeyUsage = true, true, c.KeyUsage|x509.KeyUsageCertSign
	}
	client = issuing.identity(t, fanID, asCA)
	forger := &ca{cert: client.Leaf, key: client.PrivateKey.(*ecdsa.PrivateKey)}
	h := start(t, func(_ *Config, d *Deps) {
		d.ClientCAs, d.ClientIntermediates = root.pool(), []*x509.Certificate{issuing.cert}
	})
	for name, c := range map[string]struct {
		from   *ca
		chain  []*x509.Certificate
		spoil  func(*x509.Certificate)
		reason string
	}{
		"an issuing CA of the same name":       {same, nil, nil, "unknown authority"},
		"with its chain":                       {same, []*x509.Certificate{same.cert, foreign.cert}, nil, "unknown authority"},
		"signed by nobody, with ours as cover": {same, []*x509.Certificate{issuing.cert}, nil, "unknown authority"},
		"a CA below the issuing one":           {below, []*x509.Certificate{below.cert}, nil, "too many intermediates"},
		"signed by a device":                   {forger, []*x509.Certificate{client.Leaf}, nil, "too many intermediates"},
		"an unknown issuing CA":                {sibling, nil, nil, "unknown authority"},
		"no clientAuth": {issuing, nil, func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}
		}, "usage"},
		"no OCF usage": {issuing, nil, func(c *x509.Certificate) { c.UnknownExtKeyUsage = nil }, "OCF identity"},
		"expired":      {issuing, nil, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }, "expired"},
	} {
		t.Run(name, func(t *testing.T) {
			cert := c.from.identity(t, lampID, c.spoil)
			for _, above := range c.chain {
				cert.Certificate = append(cert.Certificate, above.Raw)
			}
			h.refusedInHandshake(t, cert, c.reason)
		})
	}
	// And what the configuration names is all there is, the hub's own issuing certificate included.
	h = start(t, func(c *Config, d *Deps) {
		d.ClientCAs, d.ClientIntermediates = root.pool(), []*x509.Certificate{issuing.cert}
		c.API.CoAP.TLS.CAPool = []string{foreign.pem()}
	})
	h.refusedInHandshake(t, issuing.identity(t, lampID, nil), "unknown authority")
}

// An intermediate that is not under the CAs, or may not sign, would let in who should not: the gateway does not start.
func TestIntermediateMustBeUnderTheCAs(t *testing.T) {
	root := newCA(t)
	for name, cert := range map[string]*x509.Certificate{
		"of another root": newCA(t).issuing(t, nil).cert,
		"not a CA":        root.identity(t, lampID, nil).Leaf,
		"expired":         root.issuing(t, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }).cert,
	} {
		t.Run(name, func(t *testing.T) {
			cfg, deps := Default(), Deps{
				Providers: make([]NamedProvider, 1), Certificate: func() (*tls.Certificate, error) { return nil, nil },
				ClientCAs: root.pool(), ClientIntermediates: []*x509.Certificate{cert}, HubID: hubID,
			}
			if _, err := New(cfg, deps, slog.New(slog.DiscardHandler), prometheus.NewRegistry()); err == nil {
				t.Error("the gateway took it")
			}
		})
	}
}

func TestSessionEndsWithItsCertificate(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	cert := h.ca.identity(t, lampID, func(c *x509.Certificate) { c.NotAfter = time.Now().Add(2 * time.Second).Truncate(time.Second) })
	d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(cert))
	r := d.want(d.signIn("token"), "2.04", "")
	if n := r.members(t)["expiresin"].(uint64); n > 2 {
		t.Errorf("expiresin is %d, want the certificate's", n)
	}
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
}

// A session is never resumed from a ticket: identity is proved anew on each connection.
func TestNoTLSResumption(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		conf := h.tlsFor(h.ca.identity(t, lampID, nil))
		conf.MaxVersion = version
		conf.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		for range 2 {
			conn, err := tls.Dial("tcp", h.gw.Addresses().Secure, conf)
			if err != nil {
				t.Fatal(err)
			}
			_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
			if _, err := conn.Read(make([]byte, 1)); err != nil { // the hub's CSM, and any ticket before it
				t.Fatal(err)
			}
			if s := conn.ConnectionState(); s.DidResume || s.Version != version {
				t.Errorf("resumed %v with %s", s.DidResume, tls.VersionName(s.Version))
			}
			_ = conn.Close()
		}
	}
	old := h.tlsFor(h.ca.identity(t, lampID, nil))
	old.MinVersion, old.MaxVersion = tls.VersionTLS11, tls.VersionTLS11
	if conn, err := tls.Dial("tcp", h.gw.Addresses().Secure, old); err == nil {
		_ = conn.Close()
		t.Error("TLS 1.1 is accepted")
	}
}

// Whatever an application's token may do over HTTP, it is no device: it neither signs one in nor deletes it. Only an issuer
// that marks devices' tokens can tell.
func TestApplicationsActForNoDevice(t *testing.T) {
	for name, c := range map[string]struct {
		claims hub.Claims
		code   string
	}{
		"application":       {hub.Claims{MarksDevices: true, Scopes: []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin}}, "4.01"},
		"no scope":          {hub.Claims{MarksDevices: true}, "4.01"},
		"device":            {hub.Claims{MarksDevices: true, Device: true, DeviceID: string(lampID)}, "2.0"},
		"for signing up":    {hub.Claims{MarksDevices: true, Scopes: []string{hub.ScopeDeviceSignUp}}, "4.01"}, // once a code, never a session
		"marks no devices":  {hub.Claims{}, "2.0"},
		"of another device": {hub.Claims{MarksDevices: true, Device: true, DeviceID: string(fanID)}, "4.01"},
	} {
		for _, path := range []string{"sign-up", "sign-in", "sign-out", "sign-off", "refresh"} {
			t.Run(name+", "+path, func(t *testing.T) {
				t.Parallel()
				h := start(t, nil)
				h.issue("code", "token", c.claims)
				h.w.refresh["r"] = hub.Tokens{Access: "token", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
				if path != "sign-up" {
					h.w.own(lampID, "alice")
				}
				d := h.plain(lampID)
				b := body{"di": string(lampID), "uid": "alice"}
				var r reply
				switch path {
				case "sign-up":
					b["accesstoken"] = "code"
					r = d.post("/oic/sec/account", b)
				case "sign-in", "sign-out":
					b["accesstoken"], b["login"] = "token", path == "sign-in"
					r = d.post("/oic/sec/session", b)
				case "refresh":
					b["refreshtoken"] = "r"
					r = d.post("/oic/sec/tokenrefresh", b)
				case "sign-off":
					r = d.do(codes.DELETE, "/oic/sec/account", nil, query("uid=alice"), query("accesstoken=token"), query("di="+string(lampID)))
				}
				if got := r.code; !strings.HasPrefix(got, c.code) {
					t.Fatalf("%s %q, want %s", got, r.body, c.code)
				}
				if c.code == "4.01" {
					d.awaitClosed()
					for _, l := range []string{"online " + string(lampID), "signed-off " + string(lampID), "signed-up " + string(lampID) + " alice"} {
						if h.w.count(l) > 0 {
							t.Errorf("%s although it was refused", l)
						}
					}
				}
			})
		}
	}
}

// While the gateway serves, the hub's authority gets another issuing key, and another root. Who signed up under the first is the same
// device under the next, who is retired is out at once, and nobody else notices.
func TestAuthorityRollsOver(t *testing.T) {
	t.Parallel()
	var l ledger
	root, next := newCA(t), newCA(t)
	issuing, under := root.issuing(t, nil), next.issuing(t, nil)
	set := []*x509.Certificate{root.cert, next.cert}
	h := start(t, func(_ *Config, d *Deps) {
		d.ClientCAs, d.ClientIntermediates, d.ClientRoots = root.pool(), []*x509.Certificate{issuing.cert}, set[:1]
		d.Revoked = l.revoked
	})
	enter := func(id hub.DeviceID, cert tls.Certificate, code string) *device {
		t.Helper()
		h.issue(code, "token-of-"+code, hub.Claims{})
		d := h.connect(h.device(id), h.gw.Addresses().Secure, h.tlsFor(cert))
		d.want(d.signUp(code), "2.04", "") // the world refuses another pin
		d.want(d.signIn("token-of-"+code), "2.04", "")
		return d
	}
	late := func() tls.Certificate {
		c := under.identity(t, lampID, nil)
		c.Certificate = append(c.Certificate, under.cert.Raw)
		return c
	}
	first := issuing.identity(t, lampID, nil)
	enter(lampID, first, "1")
	pin := h.w.pin(lampID)
	h.refusedInHandshake(t, late(), "unknown authority")

	both := root.pool()
	both.AddCert(next.cert)
	if err := h.gw.Trust(both, []*x509.Certificate{issuing.cert, under.cert}, set); err != nil {
		t.Fatal(err)
	}
	old := issuing.identity(t, fanID, nil)
	fan := enter(fanID, old, "2")
	enter(lampID, late(), "3")
	lamp := enter(lampID, under.identity(t, lampID, nil), "4") // without its chain
	if got := h.w.pin(lampID); got != pin || h.w.pin(fanID) != pin || pin != pinOf(root.cert) {
		t.Errorf("pinned to %q, then to %q, want the first root's", pin, got)
	}

	if err := h.gw.Trust(next.pool(), []*x509.Certificate{newCA(t).cert}, set); err == nil {
		t.Error("an intermediate of another root is trusted")
	}
	l.revoke(old) // what counts as revoked is the authority's to say; nobody is told of a serial
	if err := h.gw.Trust(next.pool(), []*x509.Certificate{under.cert}, set); err != nil {
		t.Fatal(err)
	}
	h.awaitEnded(fan, "certificate-revoked")
	lamp.alive()
	h.refusedInHandshake(t, issuing.identity(t, fanID, nil), "unknown authority")
	enter(lampID, late(), "5")
	if got := h.w.pin(lampID); got != pin {
		t.Errorf("once the first root has gone it is pinned to %q", got)
	}
}

// What the configuration names is not replaced, whatever happens to the hub's own authority.
func TestConfiguredCAsStayWhenTheAuthorityRollsOver(t *testing.T) {
	t.Parallel()
	root, other := newCA(t), newCA(t)
	h := start(t, func(c *Config, _ *Deps) { c.API.CoAP.TLS.CAPool = []string{other.pem()} })
	if err := h.gw.Trust(root.pool(), nil, []*x509.Certificate{root.cert}); err != nil {
		t.Fatal(err)
	}
	h.refusedInHandshake(t, root.identity(t, lampID, nil), "unknown authority")
	h.issue("code", "token", hub.Claims{})
	d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(other.identity(t, lampID, nil)))
	d.want(d.signUp("code"), "2.04", "")
}
