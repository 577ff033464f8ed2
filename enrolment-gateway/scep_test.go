package enrolmentgateway

import (
	"bytes"
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/smallstep/pkcs7"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/scep"
	"github.com/coaphub/coaphub/internal/scep/sceptest"
)

// scepWorld is a door with SCEP, and a client of it.
type scepWorld struct {
	Authority // nil: nobody asks for more

	t      *testing.T
	door   http.Handler
	gw     *Gateway
	ra     *x509.Certificate
	key    *rsa.PrivateKey
	own    *x509.Certificate
	ownKey *rsa.PrivateKey
	enrol  func(proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error)
	list   func(issuer []byte, serial *big.Int) ([]byte, error)
	asked  int // how often the authority was asked
	broken error
}

type fakeRegistrar struct {
	*rsa.PrivateKey
	w *scepWorld
}

func (r fakeRegistrar) Certificate() (*x509.Certificate, error) { return r.w.ra, r.w.broken }

func (*scepWorld) Vouch(context.Context, []*x509.Certificate) error { return nil }

func (w *scepWorld) Anchors() []*x509.Certificate { return []*x509.Certificate{w.own, w.own} }

func (w *scepWorld) Enrol(_ context.Context, proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error) {
	w.asked++
	return w.enrol(proof, csr, renew)
}

func (w *scepWorld) ListOf(_ context.Context, issuer []byte, serial *big.Int) ([]byte, error) {
	w.asked++
	return w.list(issuer, serial)
}

func newSCEPWorld(t *testing.T) *scepWorld {
	t.Helper()
	w := &scepWorld{t: t}
	for _, key := range []**rsa.PrivateKey{&w.key, &w.ownKey} {
		var err error
		if *key, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
			t.Fatal(err)
		}
	}
	w.ra, w.own = sceptest.SelfSigned(t, w.key), sceptest.SelfSigned(t, w.ownKey)
	w.enrol = func(hub.EnrolmentProof, []byte, bool) (hub.Enrolled, error) {
		return hub.Enrolled{Device: "dev", Chain: []*x509.Certificate{w.ra, w.own}}, nil
	}
	deps := Deps{Authority: w, Registrar: fakeRegistrar{w.key, w}, EngineMetrics: coap.NewMetrics(prometheus.NewRegistry())}
	g, err := New(Default(), deps, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	w.door, w.gw = g.handler(), g
	return w
}

func (w *scepWorld) ask(method, target string, body []byte) *http.Response {
	w.t.Helper()
	rec := httptest.NewRecorder()
	w.door.ServeHTTP(rec, httptest.NewRequestWithContext(w.t.Context(), method, target, bytes.NewReader(body)))
	return rec.Result()
}

func (w *scepWorld) message(m sceptest.Message) []byte {
	w.t.Helper()
	return m.Sign(w.t, w.ra, w.own, w.ownKey)
}

// told is what the client is told, a message.
func (w *scepWorld) told(res *http.Response) sceptest.Answer {
	w.t.Helper()
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK || res.Header.Get("Content-Type") != "application/x-pki-message" {
		w.t.Fatalf("%s, %s: %q, %v", res.Status, res.Header.Get("Content-Type"), body, err)
	}
	return sceptest.Read(w.t, body, w.ra, w.own, w.ownKey)
}

const pkiOperation = "/scep?operation=PKIOperation"

// A client finds out what the hub can do and whom to encrypt to.
func TestSCEPCapabilities(t *testing.T) {
	w := newSCEPWorld(t)
	for _, path := range []string{"/scep", "/scep/pkiclient.exe", "/cgi-bin/pkiclient.exe"} {
		res := w.ask(http.MethodGet, path+"?operation=GetCACaps", nil)
		body, err := io.ReadAll(res.Body)
		caps := strings.Fields(string(body))
		if err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", path, res.Status, err)
		}
		for _, c := range []string{"AES", "POSTPKIOperation", "Renewal", "SHA-256", "SCEPStandard"} {
			if !strings.Contains("\n"+string(body), "\n"+c+"\n") {
				t.Errorf("%s: %q is not among %q", path, c, caps)
			}
		}
		for _, c := range caps {
			if c == "DES3" || c == "SHA-1" {
				t.Errorf("%s: %s is announced", path, c)
			}
		}
	}
	res := w.ask(http.MethodGet, "/scep?operation=GetCACert&message=any", nil)
	body, err := io.ReadAll(res.Body)
	if err != nil || res.Header.Get("Content-Type") != "application/x-x509-ca-ra-cert" {
		t.Fatalf("%s, %v", res.Header.Get("Content-Type"), err)
	}
	p, err := pkcs7.Parse(body)
	if err != nil || len(p.Certificates) != 3 || !p.Certificates[0].Equal(w.ra) {
		t.Errorf("the certificates are %v, %v", p, err)
	}
}

// The authority is asked with what the message says, which comes by POST or by GET, however its base64 is written.
func TestSCEPOperation(t *testing.T) {
	w := newSCEPWorld(t)
	csr := sceptest.CSR(t, "lamp", "the challenge", w.ownKey)
	var renewed bool
	w.enrol = func(proof hub.EnrolmentProof, got []byte, renew bool) (hub.Enrolled, error) {
		renewed = renew
		if proof.Token != "the challenge" || proof.Transaction != "one+two" || len(proof.Chain) != 1 || !proof.Chain[0].Equal(w.own) || !bytes.Equal(got, csr) {
			t.Errorf("asked with %+v and %d bytes", proof, len(got))
		}
		return hub.Enrolled{Chain: []*x509.Certificate{w.ra}}, nil
	}
	m := sceptest.Message{Content: csr, Transaction: "one+two"}
	message := w.message(m)
	std, other := base64.StdEncoding.EncodeToString(message), base64.URLEncoding.EncodeToString(message)
	for name, target := range map[string]string{
		"POST": "", "GET": url.QueryEscape(std), "not escaped": std, "the other alphabet": other, "in lines": url.QueryEscape(std[:64] + "\r\n" + std[64:]),
	} {
		method, body := http.MethodPost, message
		if target != "" {
			method, body, target = http.MethodGet, nil, "&message="+target
		}
		if a := w.told(w.ask(method, pkiOperation+target, body)); a.Status != "0" || !a.Certificate.Equal(w.ra) || a.Transaction != "one+two" || renewed {
			t.Errorf("%s: %+v", name, a)
		}
	}
	m.Type = "17"
	if a := w.told(w.ask(http.MethodPost, pkiOperation, w.message(m))); a.Status != "0" || !renewed {
		t.Errorf("a renewal: %+v", a)
	}
	w.enrol = func(proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error) {
		if proof.Transaction != "one+two" || len(proof.Chain) != 1 || csr != nil || renew {
			t.Errorf("polled with %+v and %d bytes", proof, len(csr))
		}
		return hub.Enrolled{}, &hub.Error{Kind: hub.Unavailable, Code: "enrolment-waiting", RetryAfter: time.Minute}
	}
	m.Type, m.Content = "20", []byte("issuer and subject")
	if a := w.told(w.ask(http.MethodPost, pkiOperation, w.message(m))); a.Status != "3" {
		t.Errorf("a poll: %+v", a)
	}
}

// A client that asks for a revocation list by a certificate gets that of its issuer, and of others' issuers none.
func TestSCEPGetCRL(t *testing.T) {
	w := newSCEPWorld(t)
	ca := issuer(t)
	ca.Leaf.KeyUsage, ca.Leaf.SubjectKeyId = x509.KeyUsageCRLSign, []byte{1}
	list, err := x509.CreateRevocationList(rand.Reader, &x509.RevocationList{
		Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour),
	}, ca.Leaf, ca.PrivateKey.(crypto.Signer))
	if err != nil {
		t.Fatal(err)
	}
	about := pair(t, ca, lampID).Leaf
	w.list = func(issuer []byte, serial *big.Int) ([]byte, error) {
		if serial.Cmp(about.SerialNumber) != 0 {
			return nil, hub.NewError(hub.Invalid, "unexpected", "x")
		}
		if !bytes.Equal(issuer, about.RawIssuer) {
			return nil, hub.NewError(hub.NotFound, "issuer-unknown", "x")
		}
		return list, nil
	}
	ask := func(content []byte) sceptest.Answer {
		t.Helper()
		return w.told(w.ask(http.MethodPost, pkiOperation, w.message(sceptest.Message{Type: "22", Content: content})))
	}
	if a := ask(sceptest.Named(t, about)); a.Status != "0" || a.List == nil || !bytes.Equal(a.List.Raw, list) {
		t.Errorf("asked for a list: %+v", a)
	}
	other := *about
	other.RawIssuer = w.own.RawSubject
	if a := ask(sceptest.Named(t, &other)); a.Status != "2" || a.FailInfo != string(scep.BadCertID) {
		t.Errorf("asked for the list of another issuer: %+v", a)
	}
	w.asked = 0
	if a := ask([]byte("nonsense")); a.Status != "2" || a.FailInfo != string(scep.BadRequest) || w.asked > 0 {
		t.Errorf("asked with nonsense: %+v", a)
	}
	w.list = func([]byte, *big.Int) ([]byte, error) { return nil, hub.NewError(hub.Unavailable, "disk-full", "x") }
	if res := w.ask(http.MethodPost, pkiOperation, w.message(sceptest.Message{Type: "22", Content: sceptest.Named(t, about)})); res.StatusCode != http.StatusServiceUnavailable {
		t.Errorf("while there is none: %s", res.Status)
	}
}

// Lists are large, and made for each client that asks: who does not take his keeps those waiting that ask for one, and none that enrols.
func TestSCEPListsAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newSCEPWorld(t)
		w.list = func([]byte, *big.Int) ([]byte, error) { return []byte("list"), nil }
		var places []admission.Place
		for range maxLists {
			place, again := w.gw.listing.Enter(t.Context())
			if again > 0 {
				t.Fatal("there is no place")
			}
			places = append(places, place)
		}
		getCRL := w.message(sceptest.Message{Type: "22", Content: sceptest.Named(t, w.own)})
		if res := w.ask(http.MethodPost, pkiOperation, getCRL); res.StatusCode != http.StatusServiceUnavailable || res.Header.Get("Retry-After") == "" || w.asked > 0 {
			t.Errorf("one list more is %s, and the authority was asked %d times", res.Status, w.asked)
		}
		enrol := w.message(sceptest.Message{Content: sceptest.CSR(t, "lamp", "x", w.ownKey)})
		if a := w.told(w.ask(http.MethodPost, pkiOperation, enrol)); a.Status != "0" {
			t.Errorf("who enrols is told %+v", a)
		}
		places[0].Leave()
		for range 2 { // the place is given back
			if res := w.ask(http.MethodPost, pkiOperation, getCRL); res.StatusCode != http.StatusOK {
				t.Errorf("with a place: %s", res.Status)
			}
		}
	})
}

// What is the client's fault it is told in a message, and which; what is not is HTTP's to say, so that it comes again.
func TestSCEPRefusals(t *testing.T) {
	w := newSCEPWorld(t)
	csr := sceptest.CSR(t, "lamp", "x", w.ownKey)
	message := w.message(sceptest.Message{Content: csr})
	for kind, want := range map[*hub.Error]string{
		hub.NewError(hub.Invalid, "csr-key", "x"):                   "0",
		hub.NewError(hub.Invalid, "csr-signature", "x"):             "1",
		hub.NewError(hub.Invalid, "csr-name", "x"):                  "2",
		hub.NewError(hub.Unauthenticated, "token-unknown", "x"):     "2",
		hub.NewError(hub.Denied, "enrolment-refused", "x"):          "2",
		hub.NewError(hub.TooLarge, "csr-too-large", "x"):            "2",
		hub.NewError(hub.NotFound, "enrolment-unknown", "x"):        "4",
		hub.NewError(hub.Exhausted, "enrolments-busy", "x"):         "503",
		hub.NewError(hub.Unavailable, "disk-full", "x"):             "503",
		hub.NewError(hub.Internal, "issuing-certificate-ended", ""): "500",
	} {
		w.enrol = func(hub.EnrolmentProof, []byte, bool) (hub.Enrolled, error) { return hub.Enrolled{}, kind }
		res := w.ask(http.MethodPost, pkiOperation, message)
		if res.StatusCode != http.StatusOK {
			if want != res.Status[:3] || res.StatusCode == http.StatusServiceUnavailable && res.Header.Get("Retry-After") == "" {
				t.Errorf("%v: %s", kind, res.Status)
			}
			continue
		}
		if a := w.told(res); a.Status != "2" || a.FailInfo != want {
			t.Errorf("%v: %+v, want failInfo %s", kind, a, want)
		}
	}
	asked := w.asked
	for name, c := range map[string]struct {
		message sceptest.Message
		info    string
	}{
		"no request":         {sceptest.Message{Content: []byte("x")}, "1"},
		"a cipher of others": {sceptest.Message{Content: csr, Cipher: pkcs7.EncryptionAlgorithmAES256GCM}, "0"},
		"GetCert":            {sceptest.Message{Content: csr, Type: "21"}, "2"},
		"no type":            {sceptest.Message{Content: csr, Type: "x"}, "2"},
	} {
		if a := w.told(w.ask(http.MethodPost, pkiOperation, w.message(c.message))); a.Status != "2" || a.FailInfo != c.info {
			t.Errorf("%s: %+v, want failInfo %s", name, a, c.info)
		}
	}
	for name, c := range map[string]struct {
		method, target string
		body           []byte
		status         int
	}{
		"no operation":      {http.MethodGet, "/scep", nil, http.StatusBadRequest},
		"another operation": {http.MethodGet, "/scep?operation=GetNextCACert", nil, http.StatusBadRequest},
		"another method":    {http.MethodPut, pkiOperation, message, http.StatusMethodNotAllowed},
		"no message":        {http.MethodPost, pkiOperation, nil, http.StatusBadRequest},
		"no message in GET": {http.MethodGet, pkiOperation, nil, http.StatusBadRequest},
		"no base64":         {http.MethodGet, pkiOperation + "&message=%00", nil, http.StatusBadRequest},
		"half a message":    {http.MethodPost, pkiOperation, message[:len(message)/2], http.StatusBadRequest},
		"a large one":       {http.MethodPost, pkiOperation, make([]byte, scep.MaxMessage+1), http.StatusRequestEntityTooLarge},
	} {
		if res := w.ask(c.method, c.target, c.body); res.StatusCode != c.status {
			t.Errorf("%s: %s, want %d", name, res.Status, c.status)
		}
	}
	if w.asked != asked {
		t.Error("the authority was asked all the same")
	}
	w.broken = hub.NewError(hub.Internal, "data-damaged", "x")
	for _, target := range []string{pkiOperation, "/scep?operation=GetCACert"} {
		if res := w.ask(http.MethodPost, target, message); res.StatusCode != http.StatusInternalServerError {
			t.Errorf("without registrar %s is %s", target, res.Status)
		}
	}
}

// A message that was signed long ago, or by a clock that is wrong, is not taken.
func TestSCEPClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newSCEPWorld(t)
		message := w.message(sceptest.Message{Content: sceptest.CSR(t, "lamp", "x", w.ownKey)})
		time.Sleep(23 * time.Hour)
		if a := w.told(w.ask(http.MethodPost, pkiOperation, message)); a.Status != "0" {
			t.Errorf("within a day: %+v", a)
		}
		time.Sleep(2 * time.Hour)
		if a := w.told(w.ask(http.MethodPost, pkiOperation, message)); a.FailInfo != "3" || w.asked != 1 {
			t.Errorf("after a day: %+v, the authority was asked %d times", a, w.asked)
		}
	})
}
