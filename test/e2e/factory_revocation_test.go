package e2e_test

import (
	"bytes"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"golang.org/x/crypto/ocsp"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// publisher is a manufacturer who says what he has revoked.
type publisher struct {
	*maker
	good, bad [2][]byte // a device's chain and key, PEM
}

func newPublisher(t testing.TB, name string) *publisher {
	t.Helper()
	p := &publisher{maker: &maker{t: t}}
	p.cert, p.key = p.sign(&x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	})
	p.pem = string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.cert.Raw}))
	p.good[0], p.good[1] = p.device("serial good")
	p.bad[0], p.bad[1] = p.device("serial bad")
	return p
}

// list is what he has revoked, signed by by.
func (p *publisher) list(by *publisher, until time.Duration) []byte {
	p.t.Helper()
	block, _ := pem.Decode(p.bad[0])
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		p.t.Fatal(err)
	}
	der, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now().Add(-2 * time.Hour), NextUpdate: time.Now().Add(until),
		RevokedCertificateEntries: []x509.RevocationListEntry{{SerialNumber: c.SerialNumber, RevocationTime: time.Now()}},
	}, by.cert, by.key)
	if err != nil {
		p.t.Fatal(err)
	}
	return der
}

// What a manufacturer has revoked does not enrol, over any transport; while nobody knows, the policy of the CA set decides: closed,
// the handshake goes well and the request is 5.03 or 503 until there is a list, or open. The addresses of lists are the operator's.
func TestRevokedFactoryCertificates(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"closed", "open"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			makers := map[string]*publisher{}
			for _, name := range []string{"known", "late", "forged", "away", "unlisted"} {
				makers[name] = newPublisher(t, name)
			}
			var mu sync.Mutex
			lists := map[string][]byte{
				"/known": makers["known"].list(makers["known"], time.Hour), "/late": makers["late"].list(makers["late"], -time.Hour),
				"/forged": makers["forged"].list(makers["known"], time.Hour),
			}
			srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				mu.Lock()
				defer mu.Unlock()
				if lists[r.URL.Path] == nil {
					w.WriteHeader(http.StatusBadGateway)
				}
				_, _ = w.Write(lists[r.URL.Path])
			}))
			t.Cleanup(srv.Close)
			var sets []string
			for name, m := range makers {
				if name != "unlisted" {
					sets = append(sets, fmt.Sprintf("{name: %s, cas: [%q], lists: [%s/%s], policy: %s}", name, m.pem, srv.URL, name, policy))
				}
			}
			h := hubtest.Start(t, hubtest.WithConfig("enrolmentGateway.tls.caSets=["+strings.Join(sets, ", ")+"]"))
			a := application(t, h)
			for name, m := range makers {
				group := fmt.Sprintf(`{"name":%q,"attestationMechanism":{"x509":{"certificateChain":%q}}}`, name, m.pem)
				if status := a.ask(http.MethodPost, "/device-provisioning-service/api/v1/enrollment-groups", group, &struct{}{}); status != http.StatusOK {
					t.Fatalf("the group got %d", status)
				}
			}
			ways := map[string]func([2][]byte) string{
				"tls":   func(own [2][]byte) string { return provisionOver(t, h, transportOf("tls"), own) },
				"dtls":  func(own [2][]byte) string { return provisionOver(t, h, transportOf("dtls"), own) },
				"https": func(own [2][]byte) string { return enrolOver(t, h, own) },
			}
			await := func(what, want string, ask func() string) {
				t.Helper()
				for deadline := time.Now().Add(40 * time.Second); ; <-time.After(20 * time.Millisecond) {
					got := ask()
					if got == want {
						return
					}
					if time.Now().After(deadline) {
						t.Errorf("%s: %s, want %s", what, got, want)
						return
					}
				}
			}
			await("revoked", "refused in the handshake", func() string { return ways["https"](makers["known"].bad) })
			await("revoked, on a late list", "refused in the handshake", func() string { return ways["https"](makers["late"].bad) })
			unknown := map[string]string{"closed": "unknown", "open": "in"}[policy]
			for way, ask := range ways {
				for _, c := range []struct {
					maker string
					own   [2][]byte
					want  string
				}{
					{"known", makers["known"].bad, "refused in the handshake"},
					{"known", makers["known"].good, "in"},
					{"late", makers["late"].bad, "refused in the handshake"},
					{"late", makers["late"].good, unknown},
					{"forged", makers["forged"].bad, unknown},
					{"away", makers["away"].bad, unknown},
					{"unlisted", makers["unlisted"].good, "in"}, // of no set
				} {
					if got := ask(c.own); got != c.want {
						t.Errorf("over %s, list %s: %s, want %s", way, c.maker, got, c.want)
					}
				}
			}
			if policy == "open" {
				return
			}
			// It is nothing against the device: on the same connection it asks again, and comes in.
			m := makers["late"]
			n, err := comes(t, h, transportOf("tls"), m.good[0], m.good[1])
			if err != nil {
				t.Fatal(err)
			}
			if got := verdict(n.step(codes.GET, provisioning+"ownership", nil)); got != "unknown" {
				t.Errorf("before there is a list: %s", got)
			}
			mu.Lock()
			lists["/late"] = m.list(m, time.Hour)
			mu.Unlock()
			await("once there is a list", "in", func() string { return verdict(n.step(codes.GET, provisioning+"ownership", nil)) })
		})
	}
}

func verdict(a device.Answer) string {
	switch {
	case a.Code == codes.Content:
		return "in"
	case a.Code == codes.ServiceUnavailable && strings.HasPrefix(a.String(), "5.03"):
		return "unknown"
	case a.Code == codes.Unauthorized && strings.HasPrefix(a.String(), `4.01 "certificate-revoked: `):
		return "revoked"
	}
	return a.String()
}

// provisionOver is what comes of a device's first step of provisioning.
func provisionOver(t *testing.T, h *hubtest.Hub, tr transport, own [2][]byte) string {
	t.Helper()
	n, err := comes(t, h, tr, own[0], own[1])
	if err != nil {
		return "refused in the handshake"
	}
	defer n.Close()
	// In TLS 1.3 the client has done its part before it is refused.
	a, err := n.Do(t.Context(), device.Request{Code: codes.GET, Path: provisioning + "ownership"})
	if err != nil {
		return "refused in the handshake"
	}
	return verdict(a)
}

// enrolOver is what comes of an enrolment over HTTPS.
func enrolOver(t *testing.T, h *hubtest.Hub, own [2][]byte) string {
	t.Helper()
	root, err := h.Control.Root(t.Context(), "device")
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(root))
	pair, err := tls.X509KeyPair(own[0], own[1])
	if err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{pair}}}
	defer transport.CloseIdleConnections()
	csr, _ := csrFor(t, uuid.NewString())
	block, _ := pem.Decode(csr)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, h.Endpoints.EnrolmentHTTP+"/.well-known/est/simpleenroll", bytes.NewReader(block.Bytes))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return "refused in the handshake"
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return err.Error()
	case resp.StatusCode == http.StatusServiceUnavailable && strings.HasPrefix(string(body), "revocation-unknown: ") && resp.Header.Get("Retry-After") == "30":
		return "unknown"
	case resp.StatusCode == http.StatusUnauthorized && strings.HasPrefix(string(body), "certificate-revoked: "):
		return "revoked"
	case resp.StatusCode == http.StatusOK, strings.HasPrefix(string(body), "csr-name: "): // it was let in so far
		return "in"
	}
	return fmt.Sprintf("%d %s", resp.StatusCode, body)
}

// statuses answers for one who made factory certificates (OCSP): what he has revoked is, and everything else is good.
type statuses struct {
	*maker
	away atomic.Bool // he answers nobody

	mu      sync.Mutex // guards all below
	revoked []*big.Int
	asked   map[string]int // how often, by serial number
}

func (s *statuses) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	if err != nil || s.away.Load() {
		w.WriteHeader(http.StatusBadGateway)
		return
	}
	q, err := ocsp.ParseRequest(body)
	if err != nil {
		s.t.Errorf("the hub asks %x: %v", body, err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked[q.SerialNumber.String()]++
	answer := ocsp.Response{Status: ocsp.Good, SerialNumber: q.SerialNumber, ThisUpdate: time.Now().Add(-time.Minute), NextUpdate: time.Now().Add(time.Hour)}
	if slices.ContainsFunc(s.revoked, func(n *big.Int) bool { return n.Cmp(q.SerialNumber) == 0 }) {
		answer.Status, answer.RevokedAt = ocsp.Revoked, time.Now().Add(-time.Hour)
	}
	der, err := ocsp.CreateResponse(s.cert, s.cert, answer, s.key)
	if err != nil {
		s.t.Error(err)
		return
	}
	_, _ = w.Write(der)
}

func serialOf(t *testing.T, chain []byte) *big.Int {
	t.Helper()
	block, _ := pem.Decode(chain)
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c.SerialNumber
}

// A manufacturer without lists answers for each certificate: what he has revoked does not enrol, over any transport, and is refused in
// the handshake from then on. While he does not answer the policy decides; over the same connection a device comes in once he does.
func TestFactoryCertificatesAreAskedFor(t *testing.T) {
	t.Parallel()
	for _, policy := range []string{"closed", "open"} {
		t.Run(policy, func(t *testing.T) {
			t.Parallel()
			there := &statuses{maker: newMaker(t, "there"), asked: map[string]int{}}
			away := &statuses{maker: newMaker(t, "away"), asked: map[string]int{}}
			away.away.Store(true)
			var sets []string
			for name, s := range map[string]*statuses{"there": there, "away": away} {
				srv := httptest.NewServer(s)
				t.Cleanup(srv.Close)
				sets = append(sets, fmt.Sprintf("{name: %s, cas: [%q], responder: %s, policy: %s}", name, s.pem, srv.URL, policy))
			}
			h := hubtest.Start(t, hubtest.WithConfig("enrolmentGateway.tls.caSets=["+strings.Join(sets, ", ")+"]"))
			a := application(t, h)
			for _, s := range []*statuses{there, away} {
				group := fmt.Sprintf(`{"name":%q,"attestationMechanism":{"x509":{"certificateChain":%q}}}`, s.cert.Subject.CommonName, s.pem)
				if status := a.ask(http.MethodPost, "/device-provisioning-service/api/v1/enrollment-groups", group, &struct{}{}); status != http.StatusOK {
					t.Fatalf("the group got %d", status)
				}
			}
			unknown := map[string]string{"closed": "unknown", "open": "in"}[policy]
			for way, ask := range map[string]func([2][]byte) string{
				"tls":   func(own [2][]byte) string { return provisionOver(t, h, transportOf("tls"), own) },
				"dtls":  func(own [2][]byte) string { return provisionOver(t, h, transportOf("dtls"), own) },
				"https": func(own [2][]byte) string { return enrolOver(t, h, own) },
			} {
				device := func(s *statuses, name string) (own [2][]byte) {
					own[0], own[1] = s.device("serial " + name + " " + way)
					return own
				}
				good, bad := device(there, "good"), device(there, "bad")
				there.mu.Lock()
				there.revoked = append(there.revoked, serialOf(t, bad[0]))
				there.mu.Unlock()
				for _, c := range []struct {
					what, want string
					own        [2][]byte
				}{
					{"good", "in", good},
					{"good, again", "in", good},
					{"revoked", "revoked", bad},
					{"revoked, again", "refused in the handshake", bad},
					{"nobody answers", unknown, device(away, "any")},
				} {
					if got := ask(c.own); got != c.want {
						t.Errorf("over %s, %s: %s, want %s", way, c.what, got, c.want)
					}
				}
				there.mu.Lock()
				for what, own := range map[string][2][]byte{"good": good, "revoked": bad} {
					if n := there.asked[serialOf(t, own[0]).String()]; n != 1 { // what is said holds for an hour
						t.Errorf("over %s, %s: it was asked for %d times", way, what, n)
					}
				}
				there.mu.Unlock()
			}
			if policy == "open" {
				return
			}
			chain, key := away.device("serial late")
			n, err := comes(t, h, transportOf("dtls"), chain, key)
			if err != nil {
				t.Fatal(err)
			}
			ask := func() string { return verdict(n.step(codes.GET, provisioning+"ownership", nil)) }
			if got := ask(); got != "unknown" {
				t.Errorf("before there is an answer: %s", got)
			}
			away.away.Store(false)
			a.until("it to come in once there is an answer", func() bool { return ask() == "in" })
		})
	}
}
