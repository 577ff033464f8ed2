package revocation

import (
	"context"
	"crypto"
	"crypto/x509"
	"crypto/x509/pkix"
	"io"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ocsp"
)

const responder = "http://ocsp.example/"

// answer makes an answer of the authority, good for an hour, about the certificate that is asked for.
func (a *authority) answer(status int, change func(*ocsp.Response), by ...*authority) answerer {
	return func(r *http.Request) (*http.Response, error) {
		b, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		q, err := ocsp.ParseRequest(b)
		if err != nil {
			a.t.Error(err)
			return page(400, nil), nil
		}
		tmpl := ocsp.Response{
			Status: status, SerialNumber: q.SerialNumber, ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour), RevokedAt: time.Now(), IssuerHash: q.HashAlgorithm,
		}
		if change != nil {
			change(&tmpl)
		}
		cert, key := a.cert, a.key
		if len(by) > 0 {
			cert, key = by[0].cert, by[0].key
			tmpl.Certificate = cert
		}
		der, err := ocsp.CreateResponse(a.cert, cert, tmpl, key)
		if err != nil {
			a.t.Error(err)
		}
		return page(200, der), nil
	}
}

// delegate is somebody whom the authority has issued a certificate.
func (a *authority) delegate(change func(*x509.Certificate)) *authority {
	tmpl := &x509.Certificate{Subject: pkix.Name{CommonName: "delegate"}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageOCSPSigning}}
	if change != nil {
		change(tmpl)
	}
	d := &authority{t: a.t, by: a}
	d.cert, d.key = issue(a.t, a, tmpl)
	return d
}

func TestAnswers(t *testing.T) {
	at := func(from, until time.Duration) func(*ocsp.Response) {
		return func(r *ocsp.Response) { r.ThisUpdate, r.NextUpdate = time.Now().Add(from), time.Now().Add(until) }
	}
	for name, row := range map[string]struct {
		answer func(a *authority) answerer
		want   Status
		why    trouble
	}{
		"good":             {func(a *authority) answerer { return a.answer(ocsp.Good, nil) }, Good, ""},
		"revoked":          {func(a *authority) answerer { return a.answer(ocsp.Revoked, nil) }, Revoked, ""},
		"unknown":          {func(a *authority) answerer { return a.answer(ocsp.Unknown, nil) }, Unknown, ""},
		"by a delegate":    {func(a *authority) answerer { return a.answer(ocsp.Good, nil, a.delegate(nil)) }, Good, ""},
		"four minutes ago": {func(a *authority) answerer { return a.answer(ocsp.Good, at(-time.Hour, -4*time.Minute)) }, Good, ""},
		"in four minutes":  {func(a *authority) answerer { return a.answer(ocsp.Good, at(4*time.Minute, time.Hour)) }, Good, ""},
		"late":             {func(a *authority) answerer { return a.answer(ocsp.Good, at(-time.Hour, -6*time.Minute)) }, Unknown, late},
		"early":            {func(a *authority) answerer { return a.answer(ocsp.Good, at(6*time.Minute, time.Hour)) }, Unknown, early},
		"for ever": {func(a *authority) answerer {
			return a.answer(ocsp.Good, func(r *ocsp.Response) { r.NextUpdate = time.Time{} })
		}, Unknown, invalid},
		"about another": {func(a *authority) answerer {
			return a.answer(ocsp.Good, func(r *ocsp.Response) { r.SerialNumber = a.cert.SerialNumber })
		}, Unknown, invalid},
		"by a device": {func(a *authority) answerer {
			return a.answer(ocsp.Good, nil, a.delegate(func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }))
		}, Unknown, invalid},
		"by another authority": {func(a *authority) answerer {
			return newAuthority(a.t, "a", nil).answer(ocsp.Good, nil)
		}, Unknown, invalid},
		"by another's delegate": {func(a *authority) answerer {
			return a.answer(ocsp.Good, nil, newAuthority(a.t, "a", nil).delegate(nil))
		}, Unknown, invalid},
		"with SHA-1": {func(a *authority) answerer {
			return a.answer(ocsp.Good, func(r *ocsp.Response) { r.SignatureAlgorithm = x509.ECDSAWithSHA1 })
		}, Unknown, invalid},
		"later":   {func(*authority) answerer { return serves(ocsp.TryLaterErrorResponse) }, Unknown, unreachable},
		"garbage": {func(*authority) answerer { return serves([]byte("<html>")) }, Unknown, invalid},
		"huge":    {func(*authority) answerer { return serves(make([]byte, maxAnswer+1)) }, Unknown, invalid},
		"503": {func(*authority) answerer {
			return func(*http.Request) (*http.Response, error) { return page(503, nil), nil }
		}, Unknown, unreachable},
		"no route": {func(*authority) answerer { return nil }, Unknown, unreachable},
		"silence": {func(*authority) answerer {
			return func(r *http.Request) (*http.Response, error) { <-r.Context().Done(); return nil, r.Context().Err() }
		}, Unknown, unreachable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := newAuthority(t, "a", nil)
				chain := a.device()
				n := newInternet()
				n.serve(responder, row.answer(a))
				c, reg := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Responder: responder})
				told := false
				c.Changed(func() { told = true })
				wantStatus(t, "in the handshake", c.Known(chain), Unknown)
				if len(n.asked(responder)) > 0 {
					t.Error("the handshake asks")
				}
				begun := time.Now()
				wantStatus(t, "asked", c.Ask(t.Context(), chain), row.want)
				if took := time.Since(begun); took > askTimeout {
					t.Errorf("it took %v", took)
				}
				wantStatus(t, "in the next handshake", c.Known(chain), row.want)
				if told != (row.want == Revoked) {
					t.Errorf("told: %v", told)
				}
				for _, why := range []trouble{unreachable, invalid, late, early} {
					if n := value(t, reg, "failures_total", "ocsp", string(why), "a"); (n > 0) != (why == row.why) {
						t.Errorf("%v times %s", n, why)
					}
				}
				open, _ := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Responder: responder, Open: true})
				if row.want == Unknown {
					row.want = Good
				}
				wantStatus(t, "asked by an open set", open.Ask(t.Context(), chain), row.want)
			})
		})
	}
}

// An answer is asked for once for all who wait for it, remembered until it ends, and not again and again where there is none.
func TestQuestionsAreFew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		chain := a.device()
		n := newInternet()
		release := make(chan struct{})
		good := a.answer(ocsp.Good, nil)
		n.serve(responder, func(r *http.Request) (*http.Response, error) {
			select {
			case <-release:
				return good(r)
			case <-r.Context().Done():
				return nil, r.Context().Err()
			}
		})
		c, _ := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Responder: responder})
		var asking sync.WaitGroup
		for range 50 {
			asking.Go(func() { wantStatus(t, "one of many", c.Ask(t.Context(), chain), Good) })
		}
		gone, cancel := context.WithCancel(t.Context())
		asking.Go(func() { wantStatus(t, "one who goes", c.Ask(gone, chain), Unknown) })
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(release)
		asking.Wait()
		if n := len(n.asked(responder)); n > 2 { // the one who went may have been the first
			t.Errorf("it was asked %d times", n)
		}
		before := len(n.asked(responder))
		<-time.After(59 * time.Minute)
		wantStatus(t, "an hour long", c.Ask(t.Context(), chain), Good)
		if len(n.asked(responder)) != before {
			t.Error("it was asked again")
		}
		<-time.After(10 * time.Minute)
		wantStatus(t, "after that", c.Known(chain), Unknown)

		n.serve(responder, nil)
		for range 100 {
			wantStatus(t, "without an answer", c.Ask(t.Context(), a.device()), Unknown)
		}
		if n := len(n.asked(responder)); n != before+1 {
			t.Errorf("a responder that is away was asked %d times", n-before)
		}
		n.serve(responder, good)
		<-time.After(askPause)
		wantStatus(t, "when it is back", c.Ask(t.Context(), chain), Good)
	})
}

// So many questions are under way, and no more.
func TestQuestionsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		n := newInternet()
		var now, most atomic.Int32
		good := a.answer(ocsp.Good, nil)
		n.serve(responder, func(r *http.Request) (*http.Response, error) {
			most.Store(max(most.Load(), now.Add(1)))
			defer now.Add(-1)
			<-time.After(100 * time.Millisecond)
			return good(r)
		})
		c, _ := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Responder: responder})
		var asking sync.WaitGroup
		for range 100 {
			chain := a.device()
			asking.Go(func() { wantStatus(t, "one of many", c.Ask(t.Context(), chain), Good) })
		}
		asking.Wait()
		if most.Load() != maxAsking {
			t.Errorf("%d questions were under way at a time", most.Load())
		}
	})
}

// A list says more than an answer would be needed for; what it does not say, the responder does.
func TestListAndResponder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := newAuthority(t, "a", nil)
		chain, bad := a.device(), a.device()
		d := a.delegate(nil)
		n := newInternet()
		n.has(at, a.crl(1, bad[:1]))
		n.serve(responder, a.answer(ocsp.Good, nil, d))
		c, reg := start(t, n, "", Set{CAs: []*x509.Certificate{a.cert}, Lists: []string{at}, Responder: responder})
		synctest.Wait()
		wantStatus(t, "on no list", c.Ask(t.Context(), chain), Good)
		wantStatus(t, "on the list", c.Ask(t.Context(), bad), Revoked)
		if len(n.asked(responder)) > 0 {
			t.Error("the responder was asked")
		}
		n.serve(at, nil)
		<-time.After(25 * time.Hour)
		wantStatus(t, "when the list has ended", c.Ask(t.Context(), chain), Good)
		wantStatus(t, "revoked, when the list has ended", c.Ask(t.Context(), bad), Revoked)
		if len(n.asked(responder)) != 1 {
			t.Errorf("the responder was asked %d times", len(n.asked(responder)))
		}
		// Who signs answers may be revoked himself.
		n.has(at, a.crl(2, []*x509.Certificate{bad[0], d.cert}))
		<-time.After(lastRetry)
		n.serve(at, nil)
		<-time.After(25 * time.Hour)
		wantStatus(t, "by a delegate who was revoked", c.Ask(t.Context(), chain), Unknown)
		if value(t, reg, "failures_total", "ocsp", "invalid", "a") != 1 {
			t.Error("it is not counted")
		}
	})
}

// Answers are not remembered without end.
func TestAnswersAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := answers{known: map[string]said{}}
		for i := range maxAnswers + 10 {
			a.put(string([]byte{byte(i), byte(i >> 8), byte(i >> 16)}), said{Good, time.Now().Add(time.Hour), nil}, time.Now())
		}
		if len(a.known) != maxAnswers {
			t.Errorf("%d are remembered", len(a.known))
		}
	})
}

// FuzzAnswer has whatever a responder sends read; it says something only if the issuer, or its delegate, signed it.
func FuzzAnswer(f *testing.F) {
	a := newAuthority(f, "a", nil)
	cert := a.device()[0]
	tmpl := ocsp.Response{Status: ocsp.Good, SerialNumber: cert.SerialNumber, ThisUpdate: time.Now(), NextUpdate: time.Now().Add(1000 * time.Hour), IssuerHash: crypto.SHA1}
	der, err := ocsp.CreateResponse(a.cert, a.cert, tmpl, a.key)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add(ocsp.TryLaterErrorResponse)
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := read(b, cert, a.cert, time.Now()); err == nil && s.status == Revoked {
			t.Error("somebody forged an answer")
		}
	})
}
