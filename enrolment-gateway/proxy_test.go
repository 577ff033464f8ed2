package enrolmentgateway

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// office is an authority that takes everybody and says what it was shown.
type office struct {
	ca    tls.Certificate
	proof chan hub.EnrolmentProof
}

func (o *office) Vouch(_ context.Context, chain []*x509.Certificate) error {
	if chain[0].Issuer.CommonName != "factory" {
		return hub.NewError(hub.Unauthenticated, "enrolment-unproven", "no")
	}
	return nil
}

func (o *office) Enrol(_ context.Context, proof hub.EnrolmentProof, _ []byte, _ bool) (hub.Enrolled, error) {
	o.proof <- proof
	return hub.Enrolled{Device: "d", Serial: "0a", Chain: []*x509.Certificate{o.ca.Leaf}}, nil
}

func (*office) Applicant(context.Context, []*x509.Certificate) (hub.Applicant, error) {
	return hub.Applicant{}, nil
}

func (*office) Admit(context.Context, []*x509.Certificate, hub.DeviceID) (hub.Applicant, error) {
	return hub.Applicant{}, nil
}

func (*office) ListOf(context.Context, []byte, *big.Int) ([]byte, error) { return nil, nil }

func (*office) Provisioned(context.Context, []*x509.Certificate, hub.Applicant, hub.Provisioned) error {
	return nil
}

func (o *office) Anchors() []*x509.Certificate { return []*x509.Certificate{o.ca.Leaf} }

// issue makes a certificate; without a parent it is its own.
func issue(t *testing.T, parent *tls.Certificate, name string, isCA bool) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: isCA, BasicConstraintsValid: true, DNSNames: []string{"localhost"},
	}
	by, signer := tmpl, key
	if parent != nil {
		by, signer = parent.Leaf, parent.PrivateKey.(*ecdsa.PrivateKey)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func pemOf(c tls.Certificate) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Leaf.Raw}))
}

// serve runs a gateway's HTTP side on loopback and on a Unix socket.
func serve(t *testing.T, o *office, change func(*Config)) (address, socket string) {
	t.Helper()
	cfg := Default()
	cfg.API.CoAP.Address = ""
	change(&cfg)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	socket = filepath.Join(t.TempDir(), "s")
	unix, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	g, err := New(cfg, Deps{
		Authority: o, Certificate: func() (*tls.Certificate, error) { return &o.ca, nil }, Refused: func(net.Addr, string) {},
		EngineMetrics: coap.NewMetrics(nil), HTTP: ln, Socket: unix,
	}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx, func() {}) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().String(), socket
}

// What a proxy says of a device's certificate is taken from a proxy that is known, and from nobody else.
func TestProxies(t *testing.T) {
	ca := issue(t, nil, "hub", true)
	o := &office{ca: ca, proof: make(chan hub.EnrolmentProof, 1)}
	proxyCA, factory := issue(t, nil, "proxies", true), issue(t, nil, "factory", true)
	proxy, device := issue(t, &proxyCA, "proxy", false), issue(t, &factory, "lamp", false)
	address, socket := serve(t, o, func(c *Config) { c.API.HTTP.Proxies.CAPool = []string{pemOf(proxyCA)} })
	pool := x509.NewCertPool()
	pool.AddCert(ca.Leaf)
	over := func(certs ...tls.Certificate) *http.Transport {
		return &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, ServerName: "localhost", Certificates: certs}}
	}
	local := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}
	item := func(c tls.Certificate) string { return ":" + base64.StdEncoding.EncodeToString(c.Leaf.Raw) + ":" }
	for name, c := range map[string]struct {
		via    *http.Transport
		header http.Header
		status int
		code   string
		shown  []tls.Certificate
	}{
		"a device itself":              {over(device), nil, 200, "", []tls.Certificate{device}},
		"a proxy over TLS":             {over(proxy), http.Header{"Client-Cert": {item(device)}}, 200, "", []tls.Certificate{device}},
		"with its chain":               {over(proxy), http.Header{"Client-Cert": {item(device)}, "Client-Cert-Chain": {item(factory) + ", " + item(ca)}}, 200, "", []tls.Certificate{device, factory, ca}},
		"a chain in several headers":   {over(proxy), http.Header{"Client-Cert": {item(device)}, "Client-Cert-Chain": {item(factory), item(ca)}}, 200, "", []tls.Certificate{device, factory, ca}},
		"a proxy over the socket":      {local, http.Header{"Client-Cert": {item(device)}}, 200, "", []tls.Certificate{device}},
		"a proxy's device has none":    {over(proxy), nil, 200, "", nil},
		"the socket's device has none": {local, nil, 200, "", nil},
		"nobody":                       {over(), http.Header{"Client-Cert": {item(device)}}, 400, "client-cert-untrusted", nil},
		"a device that says it":        {over(device), http.Header{"Client-Cert": {item(device)}}, 400, "client-cert-untrusted", nil},
		"a chain alone, from nobody":   {over(), http.Header{"Client-Cert-Chain": {item(device)}}, 400, "client-cert-untrusted", nil},
		"two certificates":             {over(proxy), http.Header{"Client-Cert": {item(device), item(factory)}}, 400, "client-cert-invalid", nil},
		"a chain without certificate":  {over(proxy), http.Header{"Client-Cert-Chain": {item(factory)}}, 400, "client-cert-invalid", nil},
		"no byte sequence":             {over(proxy), http.Header{"Client-Cert": {strings.Trim(item(device), ":")}}, 400, "client-cert-invalid", nil},
		"no certificate":               {over(proxy), http.Header{"Client-Cert": {":AAAA:"}}, 400, "client-cert-invalid", nil},
		"a chain that is too long":     {over(proxy), http.Header{"Client-Cert": {item(device)}, "Client-Cert-Chain": {strings.Repeat(item(factory)+",", maxChain) + item(factory)}}, 400, "client-cert-invalid", nil},
	} {
		t.Run(name, func(t *testing.T) {
			base := "https://" + address
			if c.via == local {
				base = "http://hub"
			}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, base+"/.well-known/est/simpleenroll", bytes.NewReader([]byte{0x30, 0}))
			if err != nil {
				t.Fatal(err)
			}
			for k, vs := range c.header {
				req.Header[k] = vs
			}
			req.Header.Set("Content-Type", "application/pkcs10")
			resp, err := c.via.RoundTrip(req)
			if err != nil {
				t.Fatal(err)
			}
			defer c.via.CloseIdleConnections()
			body, _ := io.ReadAll(resp.Body)
			_ = resp.Body.Close()
			if resp.StatusCode != c.status || !strings.HasPrefix(string(body), c.code) {
				t.Fatalf("got %d %q, want %d %s", resp.StatusCode, body, c.status, c.code)
			}
			if c.status != 200 {
				return
			}
			proof := <-o.proof
			if len(proof.Chain) != len(c.shown) {
				t.Fatalf("the authority sees %d certificates, want %d", len(proof.Chain), len(c.shown))
			}
			for i, want := range c.shown {
				if !proof.Chain[i].Equal(want.Leaf) {
					t.Errorf("certificate %d is %s", i, proof.Chain[i].Subject)
				}
			}
		})
	}
	// A certificate of nobody who is known fails in the handshake.
	strangers := issue(t, nil, "strangers", true)
	stranger := over(issue(t, &strangers, "x", false))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+address+"/.well-known/est/cacerts", nil)
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := stranger.RoundTrip(req); err == nil {
		_ = resp.Body.Close()
		t.Errorf("a stranger's certificate got %d", resp.StatusCode)
	}
}
