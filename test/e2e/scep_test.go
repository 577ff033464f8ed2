package e2e_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"io"
	"math/big"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/smallstep/pkcs7"

	"github.com/coaphub/coaphub/internal/scep/sceptest"
)

// scepHub is a hub with what a client of SCEP needs to know of it.
type scepHub struct {
	*process
	url       string
	root, all string // files: the device root; registrar, root and issuing certificate
	registrar *x509.Certificate
	client    *http.Client
}

func serveSCEP(t *testing.T) *scepHub {
	t.Helper()
	h := &scepHub{process: serve(t, t.TempDir())}
	h.url = h.ready["enrolment-http"] + "/scep"
	root := h.run("ca", "root")
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(root))
	h.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}, Timeout: 20 * time.Second}
	t.Cleanup(h.client.CloseIdleConnections)
	p, err := pkcs7.Parse(h.ask("GetCACert", nil))
	if err != nil || len(p.Certificates) != 3 {
		t.Fatalf("the hub's certificates: %v", err)
	}
	h.registrar = p.Certificates[0]
	var all []byte
	for _, c := range p.Certificates {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	h.root, h.all = filepath.Join(t.TempDir(), "root.pem"), filepath.Join(t.TempDir(), "all.pem")
	for file, b := range map[string][]byte{h.root: []byte(root), h.all: all} {
		if err := os.WriteFile(file, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *scepHub) ask(operation string, body []byte) []byte {
	h.t.Helper()
	req, err := http.NewRequestWithContext(h.t.Context(), http.MethodPost, h.url+"?operation="+operation, bytes.NewReader(body))
	if err != nil {
		h.t.Fatal(err)
	}
	res, err := h.client.Do(req)
	if err != nil {
		h.t.Fatal(err)
	}
	defer res.Body.Close()
	out, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		h.t.Fatalf("%s: %s, %q, %v", operation, res.Status, out, err)
	}
	return out
}

// challenge is a one-time token for a device.
func (h *scepHub) challenge(id string) string {
	h.t.Helper()
	var token struct{ Token string }
	if err := json.Unmarshal([]byte(h.run("enroll", "token", "add", "--device-id", id, "--json")), &token); err != nil {
		h.t.Fatal(err)
	}
	return token.Token
}

// certificate reads a device's certificate, which OpenSSL has to find good.
func (h *scepHub) certificate(file string) *x509.Certificate {
	h.t.Helper()
	if openssl, err := exec.LookPath("openssl"); err == nil {
		verify := exec.CommandContext(h.t.Context(), openssl, "verify", "-x509_strict", "-purpose", "sslclient", "-CAfile", h.root, "-untrusted", h.all, file)
		if out, err := verify.CombinedOutput(); err != nil {
			h.t.Errorf("OpenSSL: %v: %s", err, out)
		}
	}
	b, err := os.ReadFile(file)
	if err != nil {
		h.t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		h.t.Fatalf("%s has no certificate", file)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		h.t.Fatal(err)
	}
	return c
}

// signsIn has a device sign up and in with its certificate.
func (h *scepHub) signsIn(tr transport, id, cert, key string) error {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), 20*time.Second)
	defer cancel()
	on := h.onboard(id)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		h.t.Fatal(err)
	}
	on.tls.Certificates = []tls.Certificate{pair}
	pe, err := h.dial(ctx, tr, id, on)
	if err != nil {
		return err
	}
	defer pe.close()
	s, err := signUp(ctx, pe, id, on.Code)
	if err != nil {
		return err
	}
	return signIn(ctx, pe, id, s)
}

// TestSCEPClient: Debian's scepclient gets a certificate for a challenge, once, renews it, and the device comes in with it. The client
// knows nothing but DES and SHA-1.
func TestSCEPClient(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("scepclient"); err != nil {
		t.Skip("scepclient is not installed (Debian: scep)")
	}
	h := serveSCEP(t)
	fingerprint := sha256.Sum256(h.registrar.Raw)
	client := func(dir string, args ...string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		args = append([]string{"-server-url", h.url, "-ca-fingerprint", hex.EncodeToString(fingerprint[:]), "-private-key", filepath.Join(dir, "key.pem")}, args...)
		cmd := exec.CommandContext(ctx, "scepclient", args...)
		cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+h.root)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}
	id, dir := deviceID(1), t.TempDir()
	challenge := h.challenge(id)
	for name, wrong := range map[string]string{"none": "", "a wrong one": "wrong"} {
		if out, err := client(t.TempDir(), "-challenge", wrong); err == nil || !strings.Contains(out, "badRequest") {
			t.Errorf("challenge: %s: %v, %s", name, err, out)
		}
	}
	if out, err := client(dir, "-challenge", challenge); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	file := filepath.Join(dir, "client.pem")
	first := h.certificate(file)
	if first.Subject.String() != "CN=uuid:"+id {
		t.Errorf("the certificate is for %s", first.Subject)
	}
	if out, err := client(t.TempDir(), "-challenge", challenge); err == nil || !strings.Contains(out, "badRequest") {
		t.Errorf("the challenge once more, for another key: %v, %s", err, out)
	}
	if out, err := client(dir); err != nil {
		t.Fatalf("renewal: %v: %s", err, out)
	}
	second := h.certificate(file)
	if second.SerialNumber.Cmp(first.SerialNumber) == 0 || second.Subject.String() != "CN=uuid:"+id {
		t.Errorf("renewed is %s of %s", second.SerialNumber, second.Subject)
	}
	for _, tr := range []string{"tls", "dtls"} {
		if err := h.signsIn(transportOf(tr), id, file, filepath.Join(dir, "key.pem")); err != nil {
			t.Errorf("with a certificate of an RSA key over %s: %v", tr, err)
		}
	}
	h.run("certs", "revoke", hex.EncodeToString(second.SerialNumber.FillBytes(make([]byte, 16))))
	if out, err := client(dir); err == nil || !strings.Contains(out, "badRequest") {
		t.Errorf("renewal of what is revoked: %v, %s", err, out)
	}
	if err := h.signsIn(transportOf("tls"), id, file, filepath.Join(dir, "key.pem")); err == nil {
		t.Error("a device came in with a certificate that is revoked")
	}
	if got := h.run("enroll", "list", "--json"); strings.Contains(got, challenge) || !strings.Contains(got, `"token `) {
		t.Errorf("the enrolment is %s", got)
	}
	if strings.Contains(h.log.String(), challenge) {
		t.Error("the challenge is in the log")
	}
}

// TestStrongSwan: strongSwan's pki knows AES and SHA-256, speaks no TLS for SCEP, and takes a new key to renew with.
func TestStrongSwan(t *testing.T) {
	t.Parallel()
	if out, _ := exec.CommandContext(t.Context(), "pki", "--help").CombinedOutput(); !strings.Contains(string(out), "--scep ") {
		t.Skip("strongSwan's pki is not installed, or too old (Debian: strongswan-pki)")
	}
	h := serveSCEP(t)
	target, err := url.Parse(h.ready["enrolment-http"])
	if err != nil {
		t.Fatal(err)
	}
	front := httptest.NewServer(&httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) }, Transport: h.client.Transport,
	})
	defer front.Close()
	dir := t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	if err := os.WriteFile(file("ra.pem"), pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: h.registrar.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	enrol := func(name string, args ...string) *x509.Certificate {
		t.Helper()
		key, err := rsa.GenerateKey(rand.Reader, 2048)
		if err != nil {
			t.Fatal(err)
		}
		private := pem.EncodeToMemory(&pem.Block{Type: "RSA PRIVATE KEY", Bytes: x509.MarshalPKCS1PrivateKey(key)})
		if err := os.WriteFile(file(name+".key"), private, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, "pki", append([]string{
			"--scep", "--url", front.URL + "/scep", "--in", file(name + ".key"), "--dn", "CN=lamp", "--cacert-enc", file("ra.pem"),
			"--cacert-sig", file("ra.pem"), "--cacert", h.root, "--outform", "pem", "--digest", "sha256", "--cipher", "aes",
		}, args...)...)
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		if err := cmd.Run(); err != nil {
			if strings.Contains(stderr.String(), "no capable fetcher") {
				t.Skip("strongSwan's pki has no HTTP (Debian: libstrongswan-extra-plugins)")
			}
			t.Fatalf("%v: %s", err, stderr.String())
		}
		if err := os.WriteFile(file(name+".pem"), stdout.Bytes(), 0o600); err != nil {
			t.Fatal(err)
		}
		c := h.certificate(file(name + ".pem"))
		if !key.PublicKey.Equal(c.PublicKey) || c.Subject.String() != "CN=uuid:"+deviceID(1) {
			t.Errorf("%s is for %s, or another key", name, c.Subject)
		}
		return c
	}
	first := enrol("first", "--password", h.challenge(deviceID(1)))
	second := enrol("second", "--cert", file("first.pem"), "--key", file("first.key"))
	if first.SerialNumber.Cmp(second.SerialNumber) == 0 {
		t.Error("the renewal is the same certificate")
	}
}

// TestSCEPWithAFactoryCertificate: a device signs its request with the certificate of its manufacturer, in place of a challenge, asks
// again until somebody has allowed it, and gets what it asked for.
func TestSCEPWithAFactoryCertificate(t *testing.T) {
	t.Parallel()
	h := serveSCEP(t)
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	factoryKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	sign := func(c, parent *x509.Certificate, public *rsa.PublicKey) *x509.Certificate {
		t.Helper()
		c.BasicConstraintsValid, c.NotAfter, c.SerialNumber = true, time.Now().Add(time.Hour), big.NewInt(time.Now().UnixNano())
		if parent == nil {
			parent = c
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, public, factoryKey)
		if err == nil {
			c, err = x509.ParseCertificate(der)
		}
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	ca := sign(&x509.Certificate{Subject: pkix.Name{CommonName: "factory"}, IsCA: true, KeyUsage: x509.KeyUsageCertSign}, nil, &factoryKey.PublicKey)
	leaf := sign(&x509.Certificate{Subject: pkix.Name{CommonName: "uuid:" + deviceID(1)}}, ca, &key.PublicKey)
	csr := sceptest.CSR(t, "lamp", "", key)
	ask := func(kind string, content []byte) sceptest.Answer {
		t.Helper()
		m := sceptest.Message{Type: kind, Content: content}
		return sceptest.Read(t, h.ask("PKIOperation", m.Sign(t, h.registrar, leaf, key, ca)), h.registrar, leaf, key)
	}
	if a := ask("19", csr); a.FailInfo != "2" {
		t.Errorf("before there is a group: %+v", a)
	}
	file := filepath.Join(t.TempDir(), "factory.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	h.run("enroll", "group", "add", "lamps", "--ca", file, "--approval")
	if a := ask("20", []byte("issuer and subject")); a.FailInfo != "4" {
		t.Errorf("a poll before it asked: %+v", a)
	}
	for _, kind := range []string{"19", "20", "19"} {
		if a := ask(kind, csr); a.Status != "3" {
			t.Errorf("before it is allowed, message %s: %+v", kind, a)
		}
	}
	h.run("enroll", "approve", deviceID(1))
	a := ask("20", []byte("issuer and subject"))
	if a.Status != "0" || a.Certificate.Subject.String() != "CN=uuid:"+deviceID(1) || !key.PublicKey.Equal(a.Certificate.PublicKey) {
		t.Fatalf("after it was allowed: %+v", a)
	}
	if again := ask("19", csr); again.Status != "0" || !again.Certificate.Equal(a.Certificate) {
		t.Errorf("once more: %+v", again)
	}
}
