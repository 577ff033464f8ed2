package enrolmentgateway

import (
	"bufio"
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/tcp/coder"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
	"github.com/coaphub/coaphub/test/device"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const lampID = "d0000000-0000-4000-8000-00000000000a"

// fake is an authority that does what a test wants, and remembers what it was asked for.
type fake struct {
	Authority // nil: nobody asks for more

	vouch func(*x509.Certificate) error
	certs []*x509.Certificate // the device's, and the root

	mu    sync.Mutex                     // guards all below
	enrol func(hub.EnrolmentProof) error // nil: it is issued
	asked []question
}

type question struct {
	proof hub.EnrolmentProof
	csr   string
	renew bool
}

func (f *fake) Vouch(_ context.Context, chain []*x509.Certificate) error {
	if f.vouch == nil {
		return nil
	}
	return f.vouch(chain[0])
}

func (f *fake) Enrol(_ context.Context, proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error) {
	f.mu.Lock()
	f.asked = append(f.asked, question{proof, string(csr), renew})
	enrol := f.enrol
	f.mu.Unlock()
	if enrol != nil {
		if err := enrol(proof); err != nil {
			return hub.Enrolled{}, err
		}
	}
	return hub.Enrolled{Device: lampID, Serial: "1", Chain: f.certs}, nil
}

func (f *fake) Anchors() []*x509.Certificate { return f.certs[1:] }

func (f *fake) does(enrol func(hub.EnrolmentProof) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.enrol = enrol
}

// last is what was asked last, and no more than one question since.
func (f *fake) last(t *testing.T) (q question) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.asked) != 1 {
		t.Fatalf("the authority was asked %d times", len(f.asked))
	}
	q, f.asked = f.asked[0], nil
	return q
}

func (f *fake) unasked(t *testing.T) {
	t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.asked) > 0 {
		t.Errorf("the authority was asked %d times", len(f.asked))
		f.asked = nil
	}
}

// issuer makes a CA with which test/device makes certificates.
func issuer(t testing.TB) (ca tls.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(100 * time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if ca.Leaf, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	ca.Certificate, ca.PrivateKey = [][]byte{der}, key
	return ca
}

func pair(t testing.TB, ca tls.Certificate, id string) *tls.Certificate {
	t.Helper()
	chain, key, err := device.Issue(ca, id)
	if err != nil {
		t.Fatal(err)
	}
	p, err := tls.X509KeyPair(chain, key)
	if err != nil {
		t.Fatal(err)
	}
	return &p
}

// door is a gateway that runs until the test ends.
type door struct {
	*fake
	t       *testing.T
	ca      tls.Certificate
	http    string // host:port, and so on
	secure  string
	dtls    string
	mu      sync.Mutex // guards refused
	refused []string
}

// start starts a gateway on loopback sockets, or where deps says.
func start(t *testing.T, cfg Config, f *fake, deps Deps) *door {
	t.Helper()
	d := &door{fake: f, t: t, ca: issuer(t)}
	f.certs = []*x509.Certificate{pair(t, d.ca, lampID).Leaf, d.ca.Leaf}
	own := pair(t, d.ca, "hub")
	deps.Authority, deps.EngineMetrics = f, coap.NewMetrics(nil)
	deps.Certificate = func() (*tls.Certificate, error) { return own, nil }
	deps.Refused = func(_ net.Addr, reason string) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.refused = append(d.refused, reason)
	}
	if deps.CoAP == nil && deps.HTTP == nil {
		var err error
		if deps.CoAP, deps.DTLS, err = coap.Listen(t.Context(), "127.0.0.1:0", true, true); err != nil {
			t.Fatal(err)
		}
		if deps.HTTP, err = new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
		d.http, d.secure, d.dtls = deps.HTTP.Addr().String(), "coaps+tcp://"+deps.CoAP.Addr().String(), "coaps://"+deps.CoAP.Addr().String()
	}
	g, err := New(cfg, deps, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended, ready := make(chan error, 1), make(chan struct{})
	go func() { ended <- g.Run(ctx, func() { close(ready) }) }()
	<-ready
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return d
}

func (d *door) conf(own *tls.Certificate) *tls.Config {
	c, err := device.TLS([]byte(est.PEM(d.ca.Leaf)), nil, nil, "")
	if err != nil {
		d.t.Fatal(err)
	}
	if own != nil {
		c.Certificates = []tls.Certificate{*own}
	}
	return c
}

// connected is a device at an endpoint of CoAP.
func (d *door) connected(at string, own *tls.Certificate) (*device.Device, error) {
	dev, err := device.New(device.Config{ID: "x", HubAddr: at, TLS: d.conf(own), Blockwise: true})
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(dev.Close)
	ctx, cancel := context.WithTimeout(d.t.Context(), 20*time.Second)
	defer cancel()
	return dev, dev.Connect(ctx)
}

func (d *door) wantRefused(reason string) {
	d.t.Helper()
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(time.Millisecond) {
		d.mu.Lock()
		got := strings.Join(d.refused, "\n")
		d.mu.Unlock()
		if strings.Contains(got, reason) {
			return
		}
		if time.Now().After(deadline) {
			d.t.Fatalf("refused: %q, want %q", got, reason)
		}
	}
}

var errFull = &hub.Error{Kind: hub.Exhausted, Code: "enrolments-busy", Text: "full", RetryAfter: 1500 * time.Millisecond}

// What is asked over HTTPS reaches the authority as it was meant, or is refused without it.
func TestHTTP(t *testing.T) {
	f := &fake{}
	d := start(t, Default(), f, Deps{})
	client := &http.Client{Transport: &http.Transport{TLSClientConfig: d.conf(pair(t, d.ca, "factory"))}}
	defer client.CloseIdleConnections()
	const pkcs10, simple = "application/pkcs10", est.Path + "simpleenroll"
	csr := "\x30\x03abc"
	text := base64.StdEncoding.EncodeToString([]byte(csr))
	fails := func(err error) func(hub.EnrolmentProof) error {
		return func(hub.EnrolmentProof) error { return err }
	}
	for _, c := range []struct {
		method, path, format, auth, body string
		enrol                            func(hub.EnrolmentProof) error
		status                           int
		says, retry                      string
		want                             *question // nil: the authority is not asked
	}{
		{"GET", est.Path + "cacerts", "", "", "", nil, 200, "MII", "", nil},
		{"GET", est.Path + "csrattrs", "", "", "", nil, 200, "M", "", nil},
		{"POST", simple, pkcs10, "", text, nil, 200, "MII", "", &question{csr: csr}},
		{"POST", simple, "", "", csr, nil, 200, "MII", "", &question{csr: csr}},
		{"POST", simple, "Application/PKCS10; charset=x", "", text, nil, 200, "MII", "", &question{csr: csr}},
		{"POST", est.Path + "simplereenroll", pkcs10, "", text, nil, 200, "MII", "", &question{csr: csr, renew: true}},
		{"POST", simple, pkcs10, "Basic " + base64.StdEncoding.EncodeToString([]byte("any:tok:en")), text, nil, 200, "MII", "", &question{proof: hub.EnrolmentProof{Token: "tok:en"}, csr: csr}},
		{"POST", simple, pkcs10, "bearer token", text, nil, 200, "MII", "", &question{proof: hub.EnrolmentProof{Token: "token"}, csr: csr}},
		{"POST", simple, pkcs10, "Basic !", text, nil, 200, "MII", "", &question{csr: csr}},
		{"POST", est.Path + "simplereenroll", pkcs10, "Bearer token", text, nil, 200, "MII", "", &question{csr: csr, renew: true}},
		{"POST", tokenPath, "application/json", "", `{"token":"t","csr":"c"}`, nil, 200, lampID, "", &question{proof: hub.EnrolmentProof{Token: "t"}, csr: "c"}},

		{"POST", tokenPath, "application/json", "", `{"token":"t"}`, nil, 400, "body-invalid: ", "", nil},
		{"POST", tokenPath, "application/json", "", `{"token":1,"csr":"c"}`, nil, 400, "body-invalid: ", "", nil},
		{"POST", tokenPath, "application/json", "", ``, nil, 400, "body-invalid: ", "", nil},
		{"POST", tokenPath, pkcs10, "", `{"token":"t","csr":"c"}`, nil, 415, "format-unsupported: ", "", nil},
		{"POST", simple, "text/plain", "", text, nil, 415, "format-unsupported: ", "", nil},
		{"POST", simple, "application/", "", text, nil, 415, "format-unsupported: ", "", nil},
		{"POST", simple, pkcs10, "", "", nil, 400, "csr-invalid: ", "", nil},
		{"POST", simple, pkcs10, "", "\x00\x01", nil, 400, "csr-invalid: ", "", nil},
		{"POST", simple, pkcs10, "", strings.Repeat("A", maxBody+1), nil, 413, "body-too-large: ", "", nil},
		{"GET", simple, "", "", "", nil, 405, "", "", nil},
		{"POST", est.Path + "cacerts", "", "", "", nil, 405, "", "", nil},
		{"GET", "/", "", "", "", nil, 404, "path-unknown: ", "", nil},
		{"POST", simple + "/", pkcs10, "", text, nil, 404, "path-unknown: ", "", nil},

		{"POST", simple, pkcs10, "", text, fails(hub.NewError(hub.Unauthenticated, "x", "")), 401, "x: ", "", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, fails(hub.NewError(hub.Denied, "x", "")), 403, "x: ", "", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, fails(errFull), 503, "enrolments-busy: ", "2", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, fails(&hub.Error{Kind: hub.Unavailable, Code: "enrolment-waiting", RetryAfter: time.Minute}), 202, "enrolment-waiting: ", "60", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, fails(hub.NewError(hub.Unavailable, "disk-full", "")), 503, "disk-full: ", "5", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, fails(fmt.Errorf("secret: %w", errors.New("details"))), 500, "internal: ", "", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, func(hub.EnrolmentProof) error { panic("details") }, 500, "internal: ", "", &question{csr: csr}},
		{"POST", simple, pkcs10, "", text, nil, 200, "MII", "", &question{csr: csr}}, // it goes on
	} {
		f.does(c.enrol)
		what := fmt.Sprintf("%s %s %s %.40q", c.method, c.path, c.format, c.body)
		req, err := http.NewRequestWithContext(t.Context(), c.method, "https://"+d.http+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		for name, value := range map[string]string{"Content-Type": c.format, "Authorization": c.auth} {
			if value != "" {
				req.Header.Set(name, value)
			}
		}
		resp, err := client.Do(req)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		body, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil || resp.StatusCode != c.status || !strings.Contains(string(body), c.says) || resp.Header.Get("Retry-After") != c.retry {
			t.Errorf("%s: %s, retry after %q, %q, %v; want %d, %q, %q", what, resp.Status, resp.Header.Get("Retry-After"), body, err, c.status, c.retry, c.says)
		}
		if strings.Contains(string(body), "details") {
			t.Errorf("%s tells what went wrong inside: %q", what, body)
		}
		if resp.Header.Get("Cache-Control") != "no-store" && c.status != 405 {
			t.Errorf("%s may be kept", what)
		}
		if (resp.Header.Get("WWW-Authenticate") != "") != (c.status == 401) || (resp.Header.Get("Allow") != "") != (c.status == 405) {
			t.Errorf("%s: headers %v", what, resp.Header)
		}
		if c.want == nil {
			f.unasked(t)
			continue
		}
		// A token stands alone; else it is the certificate.
		q := f.last(t)
		if q.csr != c.want.csr || q.renew != c.want.renew || q.proof.Token != c.want.proof.Token || (len(q.proof.Chain) > 0) != (c.want.proof.Token == "") {
			t.Errorf("%s: the authority was asked %+v", what, q)
		}
	}
	// A body that does not come whole is not asked about either.
	conn, err := (&tls.Dialer{Config: d.conf(nil)}).DialContext(t.Context(), "tcp", d.http)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = fmt.Fprintf(conn, "POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n%s", simple, text)
	_ = conn.(*tls.Conn).CloseWrite()
	if resp, err := http.ReadResponse(bufio.NewReader(conn), nil); err == nil {
		if _ = resp.Body.Close(); resp.StatusCode != 400 {
			t.Errorf("half a body: %s", resp.Status)
		}
	}
	_ = conn.Close()
	f.unasked(t)
}

// The same over CoAP, over TLS and DTLS.
func TestCoAP(t *testing.T) {
	f := &fake{}
	d := start(t, Default(), f, Deps{})
	body := func(token, csr any) []byte {
		b, err := cbor.Marshal(map[string]any{"token": token, "csr": csr})
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const csr = "\x30\x03abc"
	fails := func(err error) func(hub.EnrolmentProof) error {
		return func(hub.EnrolmentProof) error { return err }
	}
	for _, at := range []string{d.secure, d.dtls} {
		dev, err := d.connected(at, pair(t, d.ca, "factory"))
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range []struct {
			code           codes.Code
			path           string
			format, accept message.MediaType
			body           []byte
			enrol          func(hub.EnrolmentProof) error
			want           codes.Code
			says           string
			as, age        int
			asked          *question
		}{
			{codes.GET, est.Path + "crts", 0, 0, nil, nil, codes.Content, "", 281, -1, nil},
			{codes.GET, est.Path + "crts", 0, 287, nil, nil, codes.Content, "", 287, -1, nil},
			{codes.GET, est.Path + "att", 0, 285, nil, nil, codes.Content, "", 285, -1, nil},
			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), nil, codes.Changed, "", 281, -1, &question{csr: csr}},
			{codes.POST, est.Path + "sen", 286, 287, []byte(csr), nil, codes.Changed, string(f.certs[0].Raw), 287, -1, &question{csr: csr}},
			{codes.POST, est.Path + "sren", 286, 0, []byte(csr), nil, codes.Changed, "", 281, -1, &question{csr: csr, renew: true}},
			{codes.POST, est.Path + "sen", 286, 0, bytes.Repeat([]byte("x"), maxBody), nil, codes.Changed, "", 281, -1, &question{csr: strings.Repeat("x", maxBody)}},
			{codes.POST, tokenPath, 60, 0, body("t", "c"), nil, codes.Changed, lampID, 60, -1, &question{proof: hub.EnrolmentProof{Token: "t"}, csr: "c"}},
			{codes.POST, tokenPath, 60, 10000, body("t", "c"), nil, codes.Changed, lampID, 10000, -1, &question{proof: hub.EnrolmentProof{Token: "t"}, csr: "c"}},

			{codes.GET, est.Path + "crts", 0, 60, nil, nil, codes.NotAcceptable, "", -1, -1, nil},
			{codes.GET, est.Path + "sen", 0, 0, nil, nil, codes.MethodNotAllowed, "", -1, -1, nil},
			{codes.PUT, est.Path + "sen", 286, 0, []byte(csr), nil, codes.MethodNotAllowed, "", -1, -1, nil},
			{codes.POST, est.Path + "skg", 286, 0, []byte(csr), nil, codes.NotFound, "path-unknown: ", -1, -1, nil},
			{codes.POST, "/oic/sec/account", 60, 0, body("t", "c"), nil, codes.NotFound, "path-unknown: ", -1, -1, nil},
			{codes.POST, est.Path + "sen", 60, 0, []byte(csr), nil, codes.UnsupportedMediaType, "format-unsupported: ", -1, -1, nil},
			{codes.POST, tokenPath, 60, 0, body("", "c"), nil, codes.BadRequest, "body-invalid: ", -1, -1, nil},
			{codes.POST, tokenPath, 60, 0, body(1, "c"), nil, codes.BadRequest, "body-invalid: ", -1, -1, nil},
			{codes.POST, tokenPath, 60, 0, []byte("\xa0\xa0"), nil, codes.BadRequest, "body-invalid: ", -1, -1, nil},
			{codes.POST, tokenPath, 50, 0, body("t", "c"), nil, codes.UnsupportedMediaType, "format-unsupported: ", -1, -1, nil},

			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), fails(hub.NewError(hub.Unauthenticated, "x", "")), codes.Unauthorized, "x: ", -1, -1, &question{csr: csr}},
			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), fails(hub.NewError(hub.Denied, "x", "")), codes.Forbidden, "x: ", -1, -1, &question{csr: csr}},
			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), fails(errFull), codes.ServiceUnavailable, "enrolments-busy: ", -1, 2, &question{csr: csr}},
			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), fails(errors.New("details")), codes.ServiceUnavailable, "internal: ", -1, 5, &question{csr: csr}},
			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), func(hub.EnrolmentProof) error { panic("details") }, codes.InternalServerError, "", -1, -1, &question{csr: csr}},
			{codes.POST, est.Path + "sen", 286, 0, []byte(csr), nil, codes.Changed, "", 281, -1, &question{csr: csr}}, // it goes on
		} {
			f.does(c.enrol)
			what := fmt.Sprintf("%s: %v %s format %d, accept %d, %.40q", at, c.code, c.path, c.format, c.accept, c.body)
			q := device.Request{Code: c.code, Path: c.path, Format: c.format, Accept: c.accept}
			if c.body != nil {
				q.Body = c.body
			}
			ans, err := dev.Do(t.Context(), q)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if ans.Code != c.want || !strings.Contains(string(ans.Raw), c.says) || ans.Format != c.as || c.age >= 0 && ans.MaxAge != c.age {
				t.Errorf("%s: %v as %d, Max-Age %d; want %v %q, %d, %d", what, ans, ans.Format, ans.MaxAge, c.want, c.says, c.as, c.age)
			}
			if strings.Contains(string(ans.Raw), "details") {
				t.Errorf("%s tells what went wrong inside: %q", what, ans.Raw)
			}
			if c.asked == nil {
				f.unasked(t)
				continue
			}
			got := f.last(t)
			if got.csr != c.asked.csr || got.renew != c.asked.renew || got.proof.Token != c.asked.proof.Token || (len(got.proof.Chain) > 0) != (c.asked.proof.Token == "") {
				t.Errorf("%s: the authority was asked %.200v", what, got)
			}
		}
		f.does(nil)
		if ans, err := dev.Do(t.Context(), device.Request{Code: codes.POST, Path: est.Path + "sen", Format: 286, Body: bytes.Repeat([]byte("x"), maxBody+1)}); err != nil || ans.Code != codes.RequestEntityTooLarge {
			t.Errorf("%s: a byte too many: %v, %v", at, ans, err)
		}
		f.unasked(t)
		for query, n := range map[string]int{"": 5, "rt=ace.est*": 4, "rt=ace.est.sen": 1, "rt=ace.est": 0, "href=/api/*": 1} {
			q := device.Request{Code: codes.GET, Path: "/.well-known/core"}
			if query != "" {
				q.Query = []string{query}
			}
			if ans, err := dev.Do(t.Context(), q); err != nil || ans.Code != codes.Content || ans.Format != 40 || strings.Count(string(ans.Raw), "</") != n {
				t.Errorf("%s: discovery of %q: %v, %v", at, query, ans, err)
			}
		}
		if ans, err := dev.Do(t.Context(), device.Request{Code: codes.GET, Path: "/.well-known/core", Accept: 60}); err != nil || ans.Code != codes.NotAcceptable {
			t.Errorf("%s: discovery in CBOR: %v, %v", at, ans, err)
		}
	}
}

// A handshake without a certificate is good, one with a certificate that nobody vouches for is not, at each door.
func TestHandshakes(t *testing.T) {
	f := &fake{vouch: func(c *x509.Certificate) error {
		switch c.Subject.CommonName {
		case "uuid:known":
			return nil
		case "uuid:revoked":
			return hub.NewError(hub.Unauthenticated, "certificate-revoked", "it was revoked")
		}
		return hub.NewError(hub.Unauthenticated, "enrolment-unproven", "nobody knows "+c.Subject.CommonName)
	}}
	d := start(t, Default(), f, Deps{})
	over := map[string]func(own *tls.Certificate) error{
		"https": func(own *tls.Certificate) error {
			client := &http.Client{Transport: &http.Transport{TLSClientConfig: d.conf(own), DisableKeepAlives: true}}
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+d.http+est.Path+"cacerts", http.NoBody)
			if err != nil {
				return err
			}
			resp, err := client.Do(req)
			if err == nil {
				_ = resp.Body.Close()
			}
			return err
		},
	}
	for name, at := range map[string]string{"tls": d.secure, "dtls": d.dtls} {
		over[name] = func(own *tls.Certificate) error {
			dev, err := d.connected(at, own)
			if err == nil {
				_, err = dev.Get(t.Context(), est.Path+"crts")
			}
			dev.Close()
			return err
		}
	}
	for name, ask := range over {
		if err := ask(nil); err != nil {
			t.Errorf("%s: without a certificate: %v", name, err)
		}
		if err := ask(pair(t, d.ca, "known")); err != nil {
			t.Errorf("%s: with a good certificate: %v", name, err)
		}
		if err := ask(pair(t, d.ca, "stranger of "+name)); err == nil {
			t.Errorf("%s: a stranger got in", name)
		}
		d.wantRefused("nobody knows uuid:stranger of " + name)
		if err := ask(pair(t, d.ca, "revoked")); err == nil {
			t.Errorf("%s: a revoked certificate got in", name)
		}
		d.wantRefused("revoked")
	}
	if _, err := d.connected(d.dtls, pair(t, d.ca, "revoked")); err == nil || !strings.Contains(err.Error(), "CertificateRevoked") {
		t.Errorf("dtls: the alert of a revoked certificate: %v", err)
	}
}

// There is room for so many connections, and for another one when one has gone.
func TestConnectionsAreBounded(t *testing.T) {
	cfg := Default()
	cfg.API.CoAP.MaxConnections, cfg.API.HTTP.MaxConnections = 1, 1
	d := start(t, cfg, &fake{}, Deps{})
	first, err := d.connected(d.secure, nil)
	if err != nil {
		t.Fatal(err)
	}
	asks := func(dev *device.Device) error {
		_, err := dev.Get(t.Context(), est.Path+"crts")
		return err
	}
	if err := asks(first); err != nil {
		t.Fatal(err)
	}
	if second, err := d.connected(d.secure, nil); err == nil {
		if err := asks(second); err == nil {
			t.Error("a second connection was served")
		}
	}
	if err := asks(first); err != nil {
		t.Errorf("the first one suffered: %v", err)
	}
	first.Close()
	var third *device.Device
	for deadline := time.Now().Add(10 * time.Second); ; {
		var err error
		if third, err = d.connected(d.secure, nil); err == nil {
			err = asks(third)
		}
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("there is no room again: %v", err)
		}
	}
	// Over HTTPS a further one waits.
	conn, err := (&tls.Dialer{Config: d.conf(nil)}).DialContext(t.Context(), "tcp", d.http)
	if err != nil {
		t.Fatal(err)
	}
	next := make(chan error, 1)
	go func() { // ends once the first one has gone
		c, err := (&tls.Dialer{Config: d.conf(nil)}).DialContext(context.Background(), "tcp", d.http)
		if err == nil {
			err = c.Close()
		}
		next <- err
	}()
	// As long as the first asks for nothing more than the time that this takes.
	for range 20 {
		if err := asks(third); err != nil {
			t.Fatal(err)
		}
	}
	select {
	case <-next:
		t.Fatal("a second connection was served")
	default:
	}
	if _, err := fmt.Fprintf(conn, "GET %scacerts HTTP/1.1\r\nHost: x\r\n\r\n", est.Path); err != nil {
		t.Fatal(err)
	}
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil || resp.StatusCode != http.StatusOK || !resp.Close {
		t.Fatalf("%v, %v", resp, err)
	}
	_ = resp.Body.Close()
	if err := <-next; err != nil { // the first keeps nobody out once it has its answer
		t.Error(err)
	}
	_ = conn.Close()
}

// pipes is a listener without sockets, for simulated time.
type pipes struct {
	conns chan net.Conn
	once  sync.Once
	ended chan struct{}
}

func newPipes() *pipes { return &pipes{conns: make(chan net.Conn), ended: make(chan struct{})} }

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.ended:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error { p.once.Do(func() { close(p.ended) }); return nil }

func (*pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

// atAddress is one end of a pipe that seems to be one of a connection.
type atAddress struct{ net.Conn }

func (atAddress) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 2} }
func (atAddress) LocalAddr() net.Addr  { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1} }

func (d *door) shake(p *pipes) *tls.Conn {
	d.t.Helper()
	here, there := net.Pipe()
	p.conns <- atAddress{there}
	c := tls.Client(here, d.conf(nil))
	if err := c.HandshakeContext(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	return c
}

// A body that drips in is given up, and the connection with it.
func TestSlowBody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, p := &fake{}, newPipes()
		d := start(t, Default(), f, Deps{HTTP: p})
		c := d.shake(p)
		begin := time.Now()
		var drip sync.WaitGroup
		drip.Go(func() { // ends with the connection
			_, err := fmt.Fprintf(c, "POST %ssimpleenroll HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n", est.Path)
			for err == nil {
				time.Sleep(time.Second)
				_, err = c.Write([]byte("M"))
			}
		})
		r := bufio.NewReader(c)
		resp, err := http.ReadResponse(r, nil)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if took := time.Since(begin); resp.StatusCode != http.StatusBadRequest || !strings.HasPrefix(string(body), "body-incomplete: ") || took != bodyTime {
			t.Errorf("%s after %v: %q", resp.Status, took, body)
		}
		if n, err := r.Read(make([]byte, 1)); err == nil {
			t.Errorf("the connection goes on with %d bytes", n)
		}
		_ = c.Close()
		drip.Wait()
		f.unasked(t)
	})
}

// An answer that is not taken is given up, and the connection with it.
func TestSlowReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		d := start(t, Default(), &fake{}, Deps{HTTP: p})
		c := d.shake(p)
		if _, err := fmt.Fprintf(c, "GET %scacerts HTTP/1.1\r\nHost: x\r\n\r\n", est.Path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(exchangeTime + time.Second)
		if b, err := io.ReadAll(c); len(b) > 0 {
			t.Errorf("%d bytes of the answer were kept for it, and %v", len(b), err)
		}
		_ = c.Close()
	})
}

// A device that asks for nothing is not kept, though it answers pings; one that asks is, for as long again.
func TestIdleConnection(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPipes()
		d := start(t, Default(), &fake{}, Deps{CoAP: p})
		c := d.shake(p)
		begin := time.Now()
		send := func(m message.Message) {
			b := make([]byte, 256)
			n, err := coder.DefaultCoder.Encode(m, b)
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = c.Write(b[:n])
		}
		if err := c.SetReadDeadline(begin.Add(10 * idleTime)); err != nil {
			t.Fatal(err)
		}
		send(message.Message{Code: codes.CSM})
		half := time.AfterFunc(idleTime/2+time.Second, func() { // between two pings
			opts, _, err := message.Options{}.SetPath(make([]byte, 64), est.Path+"att")
			if err != nil {
				t.Error(err)
			}
			send(message.Message{Code: codes.GET, Token: message.Token{1}, Options: opts})
		})
		defer half.Stop()
		pings, answers := 0, 0
		b, chunk := []byte{}, make([]byte, 4<<10)
		for {
			n, err := c.Read(chunk)
			b = append(b, chunk[:n]...)
			for {
				m := message.Message{Options: make(message.Options, 0, 8)}
				used, err := coder.DefaultCoder.Decode(b, &m)
				if err != nil {
					break
				}
				switch m.Code {
				case codes.Ping:
					pings++
					send(message.Message{Code: codes.Pong, Token: m.Token})
				case codes.Content:
					answers++
				}
				b = b[used:]
			}
			if err != nil {
				break
			}
		}
		if took := time.Since(begin); took != idleTime*3/2+time.Second || pings < 5 || answers != 1 {
			t.Errorf("it ended after %v, %d pings and %d answers", took, pings, answers)
		}
		_ = c.Close()
	})
}
