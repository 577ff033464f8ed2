package certificateauthority

import (
	"bytes"
	"context"
	"crypto"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/crypto/ocsp"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// askFor is a question about a certificate, DER.
func askFor(t *testing.T, cert, issuer *x509.Certificate, hash crypto.Hash) []byte {
	t.Helper()
	der, err := ocsp.CreateRequest(cert, issuer, &ocsp.RequestOptions{Hash: hash})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// answered reads an answer of the device authority.
func (o *office) answered(cert *x509.Certificate, der []byte) *ocsp.Response {
	o.t.Helper()
	r, err := ocsp.ParseResponseForCert(der, cert, o.a.signer(Device).issuing)
	if err != nil {
		o.t.Fatal(err)
	}
	return r
}

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOffice(t)
		issuing := o.a.signer(Device).issuing
		cert, err := o.sign("alice", testDev)
		if err != nil {
			t.Fatal(err)
		}
		if want := "https://hub.example:8080" + StatusPath; len(cert.OCSPServer) != 1 || cert.OCSPServer[0] != want {
			t.Errorf("the certificate says that %q answers, want %q", cert.OCSPServer, want)
		}
		for _, hash := range []crypto.Hash{crypto.SHA1, crypto.SHA256, crypto.SHA384, crypto.SHA512} {
			st := o.Status(t.Context(), askFor(t, cert, issuing, hash))
			r := o.answered(cert, st.DER)
			if r.Status != ocsp.Good || r.IssuerHash != hash {
				t.Errorf("%v: status %d of hash %v", hash, r.Status, r.IssuerHash)
			}
			if !r.ThisUpdate.Equal(st.From) || !r.NextUpdate.Equal(st.Until) || time.Until(r.NextUpdate) > time.Hour || time.Until(r.NextUpdate) < 50*time.Minute || time.Since(r.ThisUpdate) > 6*time.Minute {
				t.Errorf("%v: it is good from %v until %v, and said %v until %v", hash, r.ThisUpdate, r.NextUpdate, st.From, st.Until)
			}
			// RFC 6960, Section 4.2.2.2: who signs is the issuer's delegate, and nobody needs to ask about him.
			if c := r.Certificate; c == nil || len(c.ExtKeyUsage) != 1 || c.ExtKeyUsage[0] != x509.ExtKeyUsageOCSPSigning || c.KeyUsage != x509.KeyUsageDigitalSignature || c.IsCA ||
				c.NotAfter.Before(r.NextUpdate) || c.CheckSignatureFrom(issuing) != nil {
				t.Errorf("%v: signed by %+v", hash, c)
			}
			if again := o.Status(t.Context(), askFor(t, cert, issuing, hash)); !bytes.Equal(again.DER, st.DER) {
				t.Errorf("%v: who asks again costs another signature", hash)
			}
		}
		first := o.Status(t.Context(), askFor(t, cert, issuing, crypto.SHA1)).DER
		<-time.After(answerAge + time.Second)
		if bytes.Equal(o.Status(t.Context(), askFor(t, cert, issuing, crypto.SHA1)).DER, first) {
			t.Error("an old answer was given out again")
		}
		// The key that signs is another one before its certificate ends.
		<-time.After(responderValidity)
		if r := o.answered(cert, o.Status(t.Context(), askFor(t, cert, issuing, crypto.SHA1)).DER); r.Certificate.NotAfter.Before(time.Now()) {
			t.Error("the certificate of the key that signs has ended")
		}

		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(cert.SerialNumber)}}, hub.RevokedKeyCompromise); err != nil {
			t.Fatal(err)
		}
		r := o.answered(cert, o.Status(t.Context(), askFor(t, cert, issuing, crypto.SHA1)).DER)
		if r.Status != ocsp.Revoked || r.RevocationReason != ocsp.KeyCompromise || time.Since(r.RevokedAt) > time.Second {
			t.Errorf("revoked: status %d, reason %d, at %v", r.Status, r.RevocationReason, r.RevokedAt)
		}

		stranger := *cert
		stranger.SerialNumber = big.NewInt(4711)
		if r := o.answered(&stranger, o.Status(t.Context(), askFor(t, &stranger, issuing, crypto.SHA256)).DER); r.Status != ocsp.Unknown {
			t.Errorf("a certificate that nobody made has status %d", r.Status)
		}
	})
}

// The hub's own certificates are in no ledger, and good to whoever is shown them; each under its own root.
func TestStatusOfTheHubsOwn(t *testing.T) {
	o := newOffice(t)
	device, err := o.HubCertificate([]string{"hub.example"})
	if err != nil {
		t.Fatal(err)
	}
	https, err := o.HTTPSCertificate([]string{"hub.example"})
	if err != nil {
		t.Fatal(err)
	}
	ask := func(leaf *x509.Certificate, r Root) int {
		t.Helper()
		issuing := o.a.signer(r).issuing
		got, err := ocsp.ParseResponseForCert(o.Status(t.Context(), askFor(t, leaf, issuing, crypto.SHA1)).DER, leaf, issuing)
		if err != nil {
			t.Fatal(err)
		}
		return got.Status
	}
	if got := ask(device.Leaf, Device); got != ocsp.Good {
		t.Errorf("towards devices: %d", got)
	}
	if got := ask(https.Leaf, HTTPS); got != ocsp.Good {
		t.Errorf("towards applications: %d", got)
	}
	if got := ask(device.Leaf, HTTPS); got != ocsp.Unknown {
		t.Errorf("of the other root: %d", got)
	}
	for _, c := range []struct {
		cert *tls.Certificate
		root Root
	}{{&device, Device}, {&https, HTTPS}} {
		st, err := o.Staple(c.cert)
		if err != nil {
			t.Fatal(err)
		}
		if r, err := ocsp.ParseResponseForCert(st.DER, c.cert.Leaf, o.a.signer(c.root).issuing); err != nil || r.Status != ocsp.Good || !r.NextUpdate.Equal(st.Until) {
			t.Errorf("a staple of the %s root: %v, %+v", c.root, err, r)
		}
	}
	other, err := o.a.HubCertificate(nil)
	if err != nil {
		t.Fatal(err)
	}
	_, err = o.Staple(&other)
	wantCode(t, "a certificate that nobody said is shown", err, hub.NotFound, "issuer-unknown")
	// A device's certificate has its status at the device authority only.
	cert, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	if got := ask(cert, HTTPS); got != ocsp.Unknown {
		t.Errorf("a device's at another authority: %d", got)
	}
}

// Each issuing key answers for what it has signed, until it is retired.
func TestStatusWhileKeysAreRolledOver(t *testing.T) {
	o := newOffice(t)
	sign := func() *x509.Certificate {
		t.Helper()
		c, err := o.sign("alice", testDev)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	first, old := sign(), o.a.signer(Device)
	o.roll(Device, RollIssuing)
	second, now := sign(), o.a.signer(Device)
	ask := func(c *x509.Certificate, by signer) (int, error) {
		r, err := ocsp.ParseResponseForCert(o.Status(t.Context(), askFor(t, c, by.issuing, crypto.SHA256)).DER, c, by.issuing)
		if err != nil {
			return -1, err
		}
		return r.Status, nil
	}
	for _, row := range []struct {
		cert *x509.Certificate
		by   signer
		want int
	}{{first, old, ocsp.Good}, {second, now, ocsp.Good}, {first, now, ocsp.Unknown}, {second, old, ocsp.Unknown}} {
		if got, err := ask(row.cert, row.by); got != row.want {
			t.Errorf("of %s at %s: %d, %v", row.cert.Issuer, row.by.issuing.Subject, got, err)
		}
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{"abcd"}}, hub.RevokedSuperseded); err != nil { // nobody knows who has signed it
		t.Fatal(err)
	}
	for _, by := range []signer{old, now} {
		if got, err := ask(&x509.Certificate{SerialNumber: big.NewInt(0xabcd), RawIssuer: by.issuing.RawSubject}, by); got != ocsp.Revoked {
			t.Errorf("of an unrecorded one at %s: %d, %v", by.issuing.Subject, got, err)
		}
	}
	if err := o.a.Retire(old.name, nil); err != nil {
		t.Fatal(err)
	}
	var re ocsp.ResponseError
	if _, err := ask(first, old); !errors.As(err, &re) || re.Status != ocsp.Unauthorized {
		t.Errorf("of a retired issuer: %v", err)
	}
	if got, err := ask(second, now); got != ocsp.Good {
		t.Errorf("beside it: %d, %v", got, err)
	}
}

func TestStatusRefuses(t *testing.T) {
	o := newOffice(t)
	issuing := o.a.signer(Device).issuing
	cert, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	good := askFor(t, cert, issuing, crypto.SHA1)
	other := open(t, filepath.Join(t.TempDir(), "other")).signer(Device).issuing
	foreign := askFor(t, cert, other, crypto.SHA1)
	half, _ := ocsp.ParseRequest(good)
	half.IssuerKeyHash = bytes.Repeat([]byte{1}, 20) // the name alone is not enough
	halfDER, err := half.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	id := rawID(t, good)
	for name, c := range map[string]struct {
		request []byte
		want    ocsp.ResponseStatus
	}{
		"nothing":                   {nil, ocsp.Malformed},
		"garbage":                   {[]byte("GET / HTTP/1.1"), ocsp.Malformed},
		"cut":                       {good[:len(good)-1], ocsp.Malformed},
		"with something behind":     {append(bytes.Clone(good), 0), ocsp.Malformed},
		"version 2":                 {requestOf(t, []asn1.RawValue{id}, nil, 1), ocsp.Malformed},
		"of nothing":                {requestOf(t, nil, nil, 0), ocsp.Malformed},
		"of too many":               {requestOf(t, many(id, maxQuestions+1), nil, 0), ocsp.Malformed},
		"empty nonce":               {requestOf(t, []asn1.RawValue{id}, nonceOf(t, 0), 0), ocsp.Malformed},
		"long nonce":                {requestOf(t, []asn1.RawValue{id}, nonceOf(t, 129), 0), ocsp.Malformed},
		"two nonces":                {requestOf(t, []asn1.RawValue{id}, append(nonceOf(t, 16), nonceOf(t, 16)...), 0), ocsp.Malformed},
		"nonce that is none":        {requestOf(t, []asn1.RawValue{id}, []pkix.Extension{{Id: oidOCSPNonce, Value: []byte{1, 2, 3}}}, 0), ocsp.Malformed},
		"unknown critical":          {requestOf(t, []asn1.RawValue{id}, []pkix.Extension{{Id: asn1.ObjectIdentifier{1, 2, 3}, Critical: true, Value: []byte{5, 0}}}, 0), ocsp.Malformed},
		"another issuer":            {foreign, ocsp.Unauthorized},
		"another issuer's key":      {halfDER, ocsp.Unauthorized},
		"ours and another issuer's": {requestOf(t, []asn1.RawValue{id, rawID(t, foreign)}, nil, 0), ocsp.Unauthorized},
	} {
		t.Run(name, func(t *testing.T) {
			st := o.Status(t.Context(), c.request)
			_, err := ocsp.ParseResponse(st.DER, issuing)
			var re ocsp.ResponseError
			if !errors.As(err, &re) || re.Status != c.want {
				t.Errorf("%v, want %v", err, c.want)
			}
			if !st.From.IsZero() || !st.Until.IsZero() {
				t.Error("caches would keep it")
			}
		})
	}
	t.Run("several, with a nonce", func(t *testing.T) {
		st := o.Status(t.Context(), requestOf(t, many(id, maxQuestions), append(nonceOf(t, maxNonce), pkix.Extension{Id: asn1.ObjectIdentifier{1, 2, 3}, Value: []byte{5, 0}}), 0))
		if r := o.answered(cert, st.DER); r.Status != ocsp.Good {
			t.Errorf("status %d", r.Status)
		}
		if !bytes.Contains(st.DER, nonceOf(t, maxNonce)[0].Value) {
			t.Error("the nonce is missing")
		}
		if !st.Until.IsZero() {
			t.Error("caches would keep an answer for one")
		}
	})
}

// A ledger that cannot be read is no reason to say anything about a certificate.
func TestStatusWhileTheStoreIsAway(t *testing.T) {
	o := newOffice(t)
	cert, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	o.docs.Fail = func(string, string, string) error { return errors.New("away") }
	_, err = ocsp.ParseResponse(o.Status(t.Context(), askFor(t, cert, o.a.signer(Device).issuing, crypto.SHA1)).DER, nil)
	var re ocsp.ResponseError
	if !errors.As(err, &re) || re.Status != ocsp.TryLater {
		t.Errorf("%v", err)
	}
}

// slowDocs lets reads wait, so that something happens meanwhile.
type slowDocs struct {
	store.Documents
	reading chan struct{} // told by who reads, then waits for another one
}

func (d *slowDocs) Get(ctx context.Context, coll, key string) (store.Doc, error) {
	doc, err := d.Documents.Get(ctx, coll, key)
	if d.reading != nil {
		d.reading <- struct{}{}
		<-d.reading
	}
	return doc, err
}

// An answer from before a revocation is not given out after it.
func TestStatusDuringARevocation(t *testing.T) {
	o := newOffice(t)
	cert, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	request := askFor(t, cert, o.a.signer(Device).issuing, crypto.SHA1)
	slow := &slowDocs{Documents: o.docs, reading: make(chan struct{})}
	o.Service.docs = slow
	var asking sync.WaitGroup
	var meanwhile hub.CertificateStatus
	asking.Go(func() { meanwhile = o.Status(t.Context(), request) })
	<-slow.reading
	o.Service.end(hub.SerialOf(cert.SerialNumber))
	slow.reading <- struct{}{}
	asking.Wait()
	slow.reading = nil
	if r := o.answered(cert, meanwhile.DER); r.Status != ocsp.Revoked {
		t.Errorf("who asked before it got status %d", r.Status)
	}
	if r := o.answered(cert, o.Status(t.Context(), request).DER); r.Status != ocsp.Revoked {
		t.Errorf("status %d", r.Status)
	}
}

func many(id asn1.RawValue, n int) (ids []asn1.RawValue) {
	for range n {
		ids = append(ids, id)
	}
	return ids
}

func nonceOf(t *testing.T, n int) []pkix.Extension {
	t.Helper()
	value, err := asn1.Marshal(bytes.Repeat([]byte{'n'}, n))
	if err != nil {
		t.Fatal(err)
	}
	return []pkix.Extension{{Id: oidOCSPNonce, Value: value}}
}

// rawID takes the CertID out of a request.
func rawID(t *testing.T, request []byte) asn1.RawValue {
	t.Helper()
	q, err := parseQuestion(request)
	if err != nil {
		t.Fatal(err)
	}
	return asn1.RawValue{FullBytes: q.ids[0].raw}
}

// requestOf makes a request that no library would.
func requestOf(t testing.TB, ids []asn1.RawValue, exts []pkix.Extension, version int) []byte {
	t.Helper()
	type single struct{ ID asn1.RawValue }
	type tbs struct {
		Version    int `asn1:"explicit,tag:0,default:0,optional"`
		List       []single
		Extensions []pkix.Extension `asn1:"explicit,tag:2,optional,omitempty"`
	}
	v := tbs{Version: version, Extensions: exts, List: []single{}}
	for _, id := range ids {
		v.List = append(v.List, single{id})
	}
	der, err := asn1.Marshal(struct{ TBS tbs }{v})
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// FuzzStatus has whatever comes answered, and an answer is one.
func FuzzStatus(f *testing.F) {
	dir := filepath.Join(f.TempDir(), "ca")
	a, err := Open(dir, testHub)
	if err != nil {
		f.Fatal(err)
	}
	issuing := a.signer(Device).issuing
	der, err := ocsp.CreateRequest(issuing, issuing, nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(der)
	f.Add([]byte{0x30, 0x80})
	q, err := parseQuestion(der)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(requestOf(f, many(asn1.RawValue{FullBytes: q.ids[0].raw}, 3), []pkix.Extension{{Id: oidOCSPNonce, Value: []byte{4, 1, 1}}}, 0))
	r := &responder{signer: a.signer(Device)}
	f.Fuzz(func(t *testing.T, b []byte) {
		q, err := parseQuestion(b)
		if err != nil {
			return
		}
		st, err := r.sign(q, make([]certStatus, len(q.ids)), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := ocsp.ParseResponseForCert(st.DER, &x509.Certificate{SerialNumber: q.ids[0].serial}, issuing); err != nil {
			t.Fatal(err)
		}
	})
}

// What OpenSSL's client makes of the answers (RFC 6960): it asks over HTTP, with a nonce, and verifies who signed.
func TestOpenSSLAsks(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	o := newOffice(t)
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		w.Header().Set("Content-Type", "application/ocsp-response")
		_, _ = w.Write(o.Status(r.Context(), b).DER)
	}))
	defer srv.Close()
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	root := file("root.pem", certPEM(o.a.signer(Device).root))
	issuing := file("issuing.pem", certPEM(o.a.signer(Device).issuing))
	stranger := file("stranger.pem", certPEM(open(t, filepath.Join(t.TempDir(), "other")).signer(Device).issuing))
	one, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	two, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{hub.SerialOf(two.SerialNumber)}}, hub.RevokedSuperseded); err != nil {
		t.Fatal(err)
	}
	certOne, certTwo := file("one.pem", certPEM(one)), file("two.pem", certPEM(two))
	for name, c := range map[string]struct {
		args []string
		want string // "!": without success
	}{
		"good":            {[]string{"-issuer", issuing, "-cert", certOne}, "one.pem: good"},
		"by SHA-256":      {[]string{"-sha256", "-issuer", issuing, "-cert", certOne}, "one.pem: good"},
		"without a nonce": {[]string{"-no_nonce", "-issuer", issuing, "-cert", certOne}, "one.pem: good"},
		"revoked":         {[]string{"-issuer", issuing, "-cert", certTwo}, "two.pem: revoked"},
		"both":            {[]string{"-issuer", issuing, "-cert", certTwo, "-cert", certOne}, "one.pem: good"},
		"unknown":         {[]string{"-issuer", issuing, "-serial", "0x4711"}, "0x4711: unknown"},
		"another issuer":  {[]string{"-issuer", stranger, "-cert", certOne}, "!unauthorized"},
		"signed":          {[]string{"-issuer", issuing, "-cert", certOne, "-signer", filepath.Join(dir, "me.pem"), "-signkey", filepath.Join(dir, "me.key")}, "one.pem: good"},
	} {
		t.Run(name, func(t *testing.T) {
			if name == "signed" {
				if out, err := exec.CommandContext(t.Context(), openssl, "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=me",
					"-keyout", filepath.Join(dir, "me.key"), "-out", filepath.Join(dir, "me.pem")).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
			}
			args := append([]string{"ocsp", "-url", srv.URL + StatusPath, "-CAfile", root}, c.args...)
			out, err := exec.CommandContext(t.Context(), openssl, args...).CombinedOutput()
			if bad, is := strings.CutPrefix(c.want, "!"); is {
				if !strings.Contains(string(out), bad) {
					t.Errorf("%v: %s", err, out)
				}
				return
			}
			if err != nil || !strings.Contains(string(out), "Response verify OK") || !strings.Contains(string(out), c.want) || strings.Contains(string(out), "WARNING") && name != "without a nonce" {
				t.Errorf("%v: %s", err, out)
			}
		})
	}
}
