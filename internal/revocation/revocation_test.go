package revocation

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"io"
	"log/slog"
	"math/big"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// authority is a CA of a test, with what it publishes.
type authority struct {
	t    testing.TB
	cert *x509.Certificate
	key  crypto.Signer
	by   *authority
}

var serials int64

func newAuthority(t testing.TB, name string, by *authority, change ...func(*x509.Certificate)) *authority {
	t.Helper()
	tmpl := &x509.Certificate{
		Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	for _, f := range change {
		f(tmpl)
	}
	a := &authority{t: t, by: by}
	a.cert, a.key = issue(t, by, tmpl)
	return a
}

func issue(t testing.TB, by *authority, tmpl *x509.Certificate) (*x509.Certificate, crypto.Signer) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	serials++
	tmpl.SerialNumber = big.NewInt(0x1000 + serials)
	tmpl.NotBefore, tmpl.NotAfter = time.Now().Add(-time.Hour), time.Now().AddDate(10, 0, 0)
	parent, signer := tmpl, crypto.Signer(key)
	if by != nil {
		parent, signer = by.cert, by.key
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

// device makes a certificate of a device, and returns its chain.
func (a *authority) device(change ...func(*x509.Certificate)) []*x509.Certificate {
	a.t.Helper()
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "lamp"}, KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true}
	for _, f := range change {
		f(tmpl)
	}
	cert, _ := issue(a.t, a, tmpl)
	chain := []*x509.Certificate{cert}
	for ca := a; ca != nil; ca = ca.by {
		chain = append(chain, ca.cert)
	}
	return chain
}

// crl makes a list that is good for a day, of some certificates.
func (a *authority) crl(number int64, revoked []*x509.Certificate, change ...func(*x509.RevocationList)) []byte {
	a.t.Helper()
	tmpl := &x509.RevocationList{Number: big.NewInt(number), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(24 * time.Hour)}
	for _, c := range revoked {
		tmpl.RevokedCertificateEntries = append(tmpl.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: c.SerialNumber, RevocationTime: time.Now(), ReasonCode: 1})
	}
	for _, f := range change {
		f(tmpl)
	}
	der, err := x509.CreateRevocationList(rand.Reader, tmpl, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	return der
}

// internet is what can be fetched, without a network.
type internet struct {
	mu    sync.Mutex
	pages map[string]func(*http.Request) (*http.Response, error)
	times map[string][]time.Time // when what was asked for
}

func newInternet() *internet {
	return &internet{pages: map[string]func(*http.Request) (*http.Response, error){}, times: map[string][]time.Time{}}
}

func (n *internet) RoundTrip(r *http.Request) (*http.Response, error) {
	n.mu.Lock()
	n.times[r.URL.String()] = append(n.times[r.URL.String()], time.Now())
	f := n.pages[r.URL.String()]
	n.mu.Unlock()
	if f == nil {
		return nil, errors.New("no route to host")
	}
	return f(r)
}

func (n *internet) serve(url string, f func(*http.Request) (*http.Response, error)) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pages[url] = f
}

func (n *internet) has(url string, body []byte) {
	n.serve(url, func(*http.Request) (*http.Response, error) { return page(200, body), nil })
}

func (n *internet) asked(url string) []time.Time {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.times[url]
}

func page(status int, body []byte) *http.Response {
	return &http.Response{StatusCode: status, Status: http.StatusText(status), Header: http.Header{}, Body: io.NopCloser(bytes.NewReader(body))}
}

const at = "http://lists.example/a.crl"

// start makes a checker of one set that goes to n, and has it run until the test ends.
func start(t *testing.T, n *internet, dir string, s Set) (*Checker, *prometheus.Registry) {
	t.Helper()
	if s.Name == "" {
		s.Name = "a"
	}
	if s.Refresh == 0 {
		s.Refresh = time.Hour
	}
	if err := s.Check(); err != nil {
		t.Fatal(err)
	}
	reg := prometheus.NewRegistry()
	c, err := New([]Set{s}, dir, slog.New(slog.DiscardHandler), reg)
	if err != nil {
		t.Fatal(err)
	}
	c.client.Transport = n
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = c.Run(ctx, func() {}) }()
	t.Cleanup(func() { cancel(); <-done })
	return c, reg
}

func wantStatus(t *testing.T, what string, got, want Status) {
	t.Helper()
	if got != want {
		t.Errorf("%s: %s, want %s", what, words[got], words[want])
	}
}

var words = []string{Good: "good", Revoked: "revoked", Unknown: "unknown"}

// value reads a metric of the set.
func value(t *testing.T, reg *prometheus.Registry, name string, labels ...string) float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			var have []string
			for _, l := range m.GetLabel() {
				have = append(have, l.GetValue())
			}
			if f.GetName() == "coaphub_revocation_"+name && strings.Join(have, " ") == strings.Join(labels, " ") {
				return m.GetCounter().GetValue() + m.GetGauge().GetValue()
			}
		}
	}
	return 0
}

func TestList(t *testing.T) {
	for _, form := range []string{"DER", "PEM", "file", "file URL"} {
		t.Run(form, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority(t, "a", nil)
				good, bad := a.device(), a.device()
				list := a.crl(1, bad[:1])
				if form == "PEM" {
					list = pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: list})
				}
				n, place := newInternet(), at
				n.has(at, list)
				if strings.HasPrefix(form, "file") {
					place = filepath.Join(t.TempDir(), "a.crl")
					if err := os.WriteFile(place, list, 0o600); err != nil {
						t.Fatal(err)
					}
					if form == "file URL" {
						place = "file://" + place
					}
				}
				c, reg := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{place}})
				synctest.Wait()
				wantStatus(t, "not on the list", c.Known(good), Good)
				wantStatus(t, "on the list", c.Known(bad), Revoked)
				wantStatus(t, "asked", c.Ask(t.Context(), bad), Revoked)
				wantStatus(t, "of another authority", c.Known(newAuthority(t, "other", nil).device()), Good)
				<-time.After(time.Minute)
				if age := value(t, reg, "list_age_seconds", "a"); age != 60 {
					t.Errorf("the list is %v s old", age)
				}
				if n := value(t, reg, "lists_missing", "a"); n != 0 {
					t.Errorf("%v lists are missing", n)
				}
			})
		})
	}
}

// Of a set without sources nobody asks, and nothing is known.
func TestSetWithoutSources(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		c, _ := start(t, newInternet(), "", Set{CAs: []*x509.Certificate{a.cert}})
		wantStatus(t, "a device", c.Ask(t.Context(), a.device()), Good)
	})
}

type answerer = func(*http.Request) (*http.Response, error)

// broken is a connection that breaks off, and zeros a body that never ends.
type (
	broken struct{}
	zeros  struct{}
)

func (broken) Read([]byte) (int, error) { return 0, errors.New("connection reset") }

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }

// endless is a list that does not say how long it is good.
func (a *authority) endless() []byte {
	a.t.Helper()
	rl, err := x509.ParseRevocationList(a.crl(9, nil))
	if err != nil {
		a.t.Fatal(err)
	}
	tbs := pkix.TBSCertificateList{ //nolint:staticcheck // of what is not deprecated none can leave the end out
		Version: 1, Signature: pkix.AlgorithmIdentifier{Algorithm: asn1.ObjectIdentifier{1, 2, 840, 10045, 4, 3, 2}},
		ThisUpdate: time.Now().UTC(), Extensions: rl.Extensions,
	}
	if _, err := asn1.Unmarshal(a.cert.RawSubject, &tbs.Issuer); err != nil {
		a.t.Fatal(err)
	}
	der, err := asn1.Marshal(tbs)
	if err != nil {
		a.t.Fatal(err)
	}
	sum := sha256.Sum256(der)
	sig, err := a.key.Sign(rand.Reader, sum[:], crypto.SHA256)
	if err != nil {
		a.t.Fatal(err)
	}
	list, err := asn1.Marshal(pkix.CertificateList{ //nolint:staticcheck // likewise
		TBSCertList: pkix.TBSCertificateList{Raw: der}, SignatureAlgorithm: tbs.Signature, //nolint:staticcheck // likewise
		SignatureValue: asn1.BitString{Bytes: sig, BitLength: 8 * len(sig)},
	})
	if err != nil {
		a.t.Fatal(err)
	}
	return list
}

func extension(oid asn1.ObjectIdentifier, value ...byte) func(*x509.RevocationList) {
	return func(l *x509.RevocationList) {
		l.ExtraExtensions = append(l.ExtraExtensions, pkix.Extension{Id: oid, Critical: true, Value: value})
	}
}

func serves(b []byte) answerer {
	return func(*http.Request) (*http.Response, error) { return page(200, b), nil }
}

// A list that cannot be had, or is not one of the authority's, changes nothing that is known; where nothing is known the set
// decides.
func TestListsThatAreNotTaken(t *testing.T) {
	unknown := asn1.ObjectIdentifier{1, 2, 3}
	for name, row := range map[string]struct {
		why    trouble
		answer func(a *authority, bad []*x509.Certificate) answerer
	}{
		"no route": {unreachable, func(*authority, []*x509.Certificate) answerer { return nil }},
		"not found": {unreachable, func(*authority, []*x509.Certificate) answerer {
			return func(*http.Request) (*http.Response, error) { return page(404, nil), nil }
		}},
		"elsewhere": {unreachable, func(a *authority, _ []*x509.Certificate) answerer {
			list := a.crl(9, nil)
			return func(r *http.Request) (*http.Response, error) {
				if strings.HasSuffix(r.URL.Path, "/moved") {
					return page(200, list), nil
				}
				p := page(302, nil)
				p.Header.Set("Location", at+"/moved")
				return p, nil
			}
		}},
		"broken off": {unreachable, func(a *authority, _ []*x509.Certificate) answerer {
			list := a.crl(9, nil)
			return func(*http.Request) (*http.Response, error) {
				p := page(200, nil)
				p.Body = io.NopCloser(io.MultiReader(bytes.NewReader(list), broken{}))
				return p, nil
			}
		}},
		"huge": {invalid, func(*authority, []*x509.Certificate) answerer {
			return func(*http.Request) (*http.Response, error) {
				p := page(200, nil)
				p.Body = io.NopCloser(zeros{})
				return p, nil
			}
		}},
		"garbage":     {invalid, func(*authority, []*x509.Certificate) answerer { return serves([]byte("<html>")) }},
		"empty":       {invalid, func(*authority, []*x509.Certificate) answerer { return serves(nil) }},
		"PEM of else": {invalid, func(*authority, []*x509.Certificate) answerer { return serves([]byte("-----BEGIN X")) }},
		"certificate": {invalid, func(a *authority, _ []*x509.Certificate) answerer { return serves(a.cert.Raw) }},
		"with a byte changed": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			list := a.crl(9, nil)
			list[len(list)-3] ^= 1
			return serves(list)
		}},
		"another authority's": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(newAuthority(a.t, "other", nil).crl(9, nil))
		}},
		"of the same name": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(newAuthority(a.t, "a", nil).crl(9, nil))
		}},
		"delta": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, extension(oidDelta, 2, 1, 1)))
		}},
		"delta that is not critical": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, func(l *x509.RevocationList) {
				l.ExtraExtensions = []pkix.Extension{{Id: oidDelta, Value: []byte{2, 1, 1}}}
			}))
		}},
		"with another issuer in an entry": {invalid, func(a *authority, bad []*x509.Certificate) answerer {
			return serves(a.crl(9, bad[:1], func(l *x509.RevocationList) {
				l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{{Id: oidOtherIssuer, Value: []byte{0x30, 0}}}
			}))
		}},
		"indirect": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, extension(oidScope, 0x30, 3, 0x84, 1, 0xff)))
		}},
		"of some reasons": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, extension(oidScope, 0x30, 4, 0x83, 2, 1, 0x40)))
		}},
		"of attributes": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, extension(oidScope, 0x30, 3, 0x85, 1, 0xff)))
		}},
		"of an unreadable scope": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, extension(oidScope, 0x30, 3, 0x86, 1, 0xff)))
		}},
		"unknown critical": {invalid, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, extension(unknown, 5, 0)))
		}},
		"unknown critical in an entry": {invalid, func(a *authority, bad []*x509.Certificate) answerer {
			return serves(a.crl(9, bad[:1], func(l *x509.RevocationList) {
				l.RevokedCertificateEntries[0].ExtraExtensions = []pkix.Extension{{Id: unknown, Critical: true, Value: []byte{5, 0}}}
			}))
		}},
		"without an end": {invalid, func(a *authority, _ []*x509.Certificate) answerer { return serves(a.endless()) }},
		"of later": {early, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(9, nil, func(l *x509.RevocationList) { l.ThisUpdate = time.Now().Add(3 * time.Hour) }))
		}},
		"with a number that goes back": {back, func(a *authority, _ []*x509.Certificate) answerer { return serves(a.crl(4, nil)) }},
		"of the time before": {back, func(a *authority, _ []*x509.Certificate) answerer {
			return serves(a.crl(5, nil, func(l *x509.RevocationList) { l.ThisUpdate = time.Now().Add(-time.Minute) }))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority(t, "a", nil)
				good, bad := a.device(), a.device()
				n := newInternet()
				set := Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{at}}
				answer := row.answer(a, bad)
				n.serve(at+"/moved", answer)
				if row.why != back {
					n.serve(at, answer)
					c, reg := start(t, n, "", set)
					synctest.Wait()
					wantStatus(t, "without any list", c.Known(good), Unknown)
					wantStatus(t, "closed", c.Ask(t.Context(), good), Unknown)
					open := set
					open.Open = true
					c, openReg := start(t, n, "", open)
					synctest.Wait()
					wantStatus(t, "open", c.Ask(t.Context(), good), Good)
					if value(t, reg, "unknown_total", "refused", "a") != 1 || value(t, openReg, "unknown_total", "let-in", "a") != 1 || value(t, reg, "lists_missing", "a") != 1 {
						t.Error("it is not counted")
					}
				}
				n.has(at, a.crl(5, bad[:1]))
				c, reg := start(t, n, "", set)
				synctest.Wait()
				n.serve(at, answer)
				<-time.After(2 * time.Hour)
				synctest.Wait()
				wantStatus(t, "what was good", c.Ask(t.Context(), good), Good)
				wantStatus(t, "what was revoked", c.Ask(t.Context(), bad), Revoked)
				for _, why := range []trouble{unreachable, invalid, late, early, back} {
					if n := value(t, reg, "failures_total", "list", string(why), "a"); (n > 0) != (why == row.why) {
						t.Errorf("%v times %s", n, why)
					}
				}
			})
		})
	}
}

// A CA signs lists only if its certificate lets it.
func TestListOfACAThatMayNot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root", nil)
		mute := newAuthority(t, "mute", root)
		list := mute.crl(1, nil)
		mute.cert.KeyUsage = x509.KeyUsageCertSign
		n := newInternet()
		n.has(at, list)
		c, _ := start(t, n, "", Set{CAs: []*x509.Certificate{root.cert, mute.cert}, Lists: []string{at}})
		synctest.Wait()
		wantStatus(t, "a device", c.Known(mute.device()), Unknown)
	})
}

// Clocks may differ by five minutes, and not by more. What was revoked stays so, whatever the clock says.
func TestClocksThatDiffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		good, bad := a.device(), a.device()
		n := newInternet()
		ahead := func(d time.Duration) []byte {
			return a.crl(1, bad[:1], func(l *x509.RevocationList) { l.ThisUpdate = time.Now().Add(d) })
		}
		set := Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{at}}
		n.has(at, ahead(6*time.Minute))
		c, _ := start(t, n, "", set)
		synctest.Wait()
		wantStatus(t, "six minutes ahead", c.Known(good), Unknown)
		n.has(at, ahead(4*time.Minute))
		c, reg := start(t, n, "", set)
		synctest.Wait()
		wantStatus(t, "four minutes ahead", c.Known(good), Good)

		<-time.After(24*time.Hour + 4*time.Minute)
		wantStatus(t, "four minutes after its end", c.Known(good), Good)
		<-time.After(2 * time.Minute)
		wantStatus(t, "six minutes after its end", c.Known(good), Unknown)
		wantStatus(t, "revoked before its end", c.Known(bad), Revoked)
		<-time.After(10 * time.Minute)
		if value(t, reg, "failures_total", "list", "late", "a") == 0 || value(t, reg, "lists_missing", "a") != 1 {
			t.Error("nobody is told that the list is late")
		}
		n.has(at, a.crl(2, bad[:1]))
		<-time.After(lastRetry)
		wantStatus(t, "with a new list", c.Known(good), Good)
	})
}

// A list is fetched before it ends, and after Refresh at the latest; whoever does not answer is tried again, less and less often.
func TestWhenListsAreFetched(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		n := newInternet()
		n.serve(at, func(r *http.Request) (*http.Response, error) {
			if r.Header.Get("If-None-Match") == `"1"` {
				return page(304, nil), nil
			}
			p := page(200, a.crl(1, nil))
			p.Header.Set("ETag", `"1"`)
			return p, nil
		})
		c, reg := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{at}, Refresh: 6 * time.Hour})
		synctest.Wait()
		begun := time.Now()
		<-time.After(24*time.Hour - time.Minute)
		times := n.asked(at)
		if len(times) < 5 {
			t.Fatalf("it was fetched %d times", len(times))
		}
		for i, at := range times[1:4] {
			if d := at.Sub(times[i]); d > 6*time.Hour || d < 5*time.Hour {
				t.Errorf("it was fetched again after %v", d)
			}
		}
		if before := begun.Add(24*time.Hour - 24*time.Hour/10); times[len(times)-1].Before(before.Add(-6 * time.Hour)) {
			t.Error("it was not fetched before its end")
		}
		if n := value(t, reg, "failures_total", "list", "unreachable", "a"); n != 0 {
			t.Errorf("304 is a failure, %v times", n)
		}
		wantStatus(t, "a device", c.Known(a.device()), Good)

		n.serve(at, nil)
		<-time.After(12 * time.Hour)
		failed := n.asked(at)[len(times):]
		if len(failed) < 12*12 || len(failed) > 12*60 {
			t.Errorf("without an answer it was tried %d times in 12 hours", len(failed))
		}
		for i := range failed[1:] {
			if d := failed[i+1].Sub(failed[i]); d > lastRetry {
				t.Errorf("it was tried again after %v", d)
			}
		}
	})
}

// A start without a network knows what the last one knew; one that knew nothing has the set decide.
func TestStartWithoutANetwork(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		good, bad := a.device(), a.device()
		dir := filepath.Join(t.TempDir(), "lists")
		n := newInternet()
		set := Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{at}}
		n.has(at, a.crl(5, bad[:1]))
		_, _ = start(t, n, dir, set)
		synctest.Wait()
		n.serve(at, nil)
		c, _ := start(t, n, dir, set)
		wantStatus(t, "good", c.Ask(t.Context(), good), Good)
		wantStatus(t, "revoked", c.Ask(t.Context(), bad), Revoked)
		// Its number is not forgotten, either.
		n.has(at, a.crl(4, nil))
		<-time.After(2 * time.Hour)
		wantStatus(t, "revoked, when an older list comes", c.Known(bad), Revoked)
		<-time.After(25 * time.Hour)
		n.serve(at, nil)
		c, _ = start(t, n, dir, set)
		wantStatus(t, "with a list that has ended", c.Ask(t.Context(), good), Unknown)
		wantStatus(t, "revoked, with a list that has ended", c.Ask(t.Context(), bad), Revoked)

		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("kept are %v, %v", files, err)
		}
		if err := os.WriteFile(files[0], []byte("damaged"), 0o600); err != nil {
			t.Fatal(err)
		}
		c, _ = start(t, n, dir, set)
		wantStatus(t, "with a damaged file", c.Ask(t.Context(), good), Unknown)
	})
}

// Of several lists of an issuer each is about its part; none takes the place of another, whichever comes from where.
func TestListsOfAPart(t *testing.T) {
	point := func(url string) func(*x509.RevocationList) {
		return extension(oidScope, append([]byte{0x30, byte(6 + len(url)), 0xa0, byte(4 + len(url)), 0xa0, byte(2 + len(url)), 0x86, byte(len(url))}, url...)...)
	}
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root", nil)
		a := newAuthority(t, "a", root)
		at1, at2 := "http://a.example/1", "http://a.example/2"
		of := func(url string) func(*x509.Certificate) {
			return func(c *x509.Certificate) { c.CRLDistributionPoints = []string{url} }
		}
		good1, bad1, good2, bad2, other := a.device(of(at1)), a.device(of(at1)), a.device(of(at2)), a.device(of(at2)), a.device()
		n := newInternet()
		n.has("http://mirror.example/1", a.crl(1, bad1[:1], point(at1)))
		n.has("http://mirror.example/2", a.crl(1, bad2[:1], point(at2)))
		c, _ := start(t, n, "", Set{CAs: []*x509.Certificate{root.cert, a.cert}, Lists: []string{"http://mirror.example/1", "http://mirror.example/2"}})
		synctest.Wait()
		wantAll := func() {
			t.Helper()
			wantStatus(t, "good 1", c.Known(good1), Good)
			wantStatus(t, "bad 1", c.Known(bad1), Revoked)
			wantStatus(t, "good 2", c.Known(good2), Good)
			wantStatus(t, "bad 2", c.Known(bad2), Revoked)
			wantStatus(t, "of no part", c.Known(other), Unknown)
		}
		wantAll()
		n.has("http://mirror.example/1", a.crl(7, nil, point("http://a.example/3")))
		n.has("http://mirror.example/2", root.crl(7, nil))
		<-time.After(2 * time.Hour)
		wantAll()
	})
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		n := newInternet()
		n.has(at, a.crl(1, nil, extension(oidScope, 0x30, 3, 0x82, 1, 0xff)))
		c, _ := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{at}})
		synctest.Wait()
		wantStatus(t, "a device, with a list of CAs", c.Known(a.device()), Unknown)
		n.has(at, a.crl(2, nil, extension(oidScope, 0x30, 3, 0x81, 1, 0xff)))
		<-time.After(time.Hour)
		wantStatus(t, "a device, with a list of users", c.Known(a.device()), Good)
	})
}

// Between a device and the CAs of the set everything must be known; of those only what says that they are revoked counts.
func TestChains(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		root := newAuthority(t, "root", nil)
		a := newAuthority(t, "a", root)
		between := newAuthority(t, "between", a)
		dev, below := a.device(), between.device()
		n := newInternet()
		n.has("http://root.example/", root.crl(1, nil))
		n.has("http://a.example/", a.crl(1, nil))
		n.has("http://between.example/", between.crl(1, nil))
		all := []string{"http://root.example/", "http://a.example/", "http://between.example/"}
		c, _ := start(t, n, "", Set{CAs: []*x509.Certificate{root.cert, a.cert}, Lists: all})
		synctest.Wait()
		wantStatus(t, "under a CA of the set", c.Known(dev), Good)
		wantStatus(t, "and without its root", c.Known(dev[:2]), Good)
		wantStatus(t, "under one that is none", c.Known(below), Unknown)

		c, _ = start(t, n, "", Set{CAs: []*x509.Certificate{root.cert, a.cert, between.cert}, Lists: all[1:]})
		synctest.Wait()
		wantStatus(t, "under one of the set without a list of the root", c.Known(dev), Good)
		wantStatus(t, "and below", c.Known(below), Good)
		told := make(chan struct{}, 10)
		c.Changed(func() { told <- struct{}{} })
		n.has("http://a.example/", a.crl(2, []*x509.Certificate{between.cert}))
		<-told
		wantStatus(t, "under a CA that was revoked", c.Known(below), Revoked)
		wantStatus(t, "when the chain does not show it", c.Known(below[:2]), Revoked)
		wantStatus(t, "beside it", c.Known(dev), Good)
	})
}

func TestSetsThatAreNone(t *testing.T) {
	a := newAuthority(t, "a", nil)
	leaf := a.device()[0]
	if _, err := New([]Set{{Name: "a", CAs: []*x509.Certificate{a.cert}}, {Name: "b", CAs: []*x509.Certificate{a.cert}}}, "", slog.New(slog.DiscardHandler), nil); err == nil {
		t.Error("a CA is in two sets")
	}
	if _, err := New([]Set{{Name: "a", CAs: []*x509.Certificate{leaf}}}, "", slog.New(slog.DiscardHandler), nil); err == nil {
		t.Error("a device is a CA")
	}
	for _, s := range []Set{
		{Lists: []string{""}},
		{Lists: []string{"ftp://x/y"}},
		{Lists: []string{"ldap://x"}},
		{Lists: []string{"http://"}},
		{Lists: []string{"file://host/x"}},
		{Lists: []string{"https://user:secret@x/"}},
		{Responder: "x"},
		{Responder: "file:///x"},
		{Responder: "http://user@x/"},
	} {
		if err := s.Check(); err == nil || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: %v", s, err)
		}
	}
}

// FuzzList has whatever is fetched read; a list is taken only if its authority made it.
func FuzzList(f *testing.F) {
	a := newAuthority(f, "a", nil)
	c, err := New([]Set{{Name: "a", CAs: []*x509.Certificate{a.cert}}}, "", slog.New(slog.DiscardHandler), nil)
	if err != nil {
		f.Fatal(err)
	}
	good := a.crl(1, a.device()[:1], extension(oidScope, 0x30, 3, 0x81, 1, 0xff))
	f.Add(good)
	f.Add(pem.EncodeToMemory(&pem.Block{Type: "X509 CRL", Bytes: good}))
	f.Add(a.cert.Raw)
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := c.sets[0].parse(b)
		if err == nil && l.issuer == nil {
			t.Error("a list of nobody")
		}
		_, _ = parseScope(b)
	})
}
