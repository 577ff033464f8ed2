package zlint

import (
	"bufio"
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	zx509 "github.com/zmap/zcrypto/x509"
	"github.com/zmap/zlint/v3"
	"github.com/zmap/zlint/v3/lint"
)

// The rules are those of RFCs, and what the makers of zlint took for mistakes. The others are those of browsers' programs for
// public authorities, of mail and of code: a hub's authority is its own, for devices that have no names in the DNS.
var sources = lint.SourceList{
	lint.RFC3279, lint.RFC5280, lint.RFC5480, lint.RFC5891, lint.RFC6960, lint.RFC6962, lint.RFC8813, lint.Community,
}

// left are the warnings and notices that stay, and why.
var left = map[string]string{
	"w_distribution_point_missing_ldap_or_uri": "RFC 5280, Section 4.2.1.13 would like http beside https; what applications reach from " +
		"elsewhere has TLS only, and docs/certificates.md says what follows from it",
	"n_san_iana_pub_suffix_empty": "localhost is no public suffix of anybody's, and clients on the hub's own machine call it so",
}

// TestProfiles lints one of each profile, and the list of what is revoked.
func TestProfiles(t *testing.T) {
	registry, err := lint.GlobalRegistry().Filter(lint.FilterOptions{IncludeSources: sources})
	if err != nil {
		t.Fatal(err)
	}
	h := serve(t)
	met := map[string]bool{}
	check := func(what string, res *zlint.ResultSet) {
		passed := 0
		for name, r := range res.Results {
			switch {
			case r.Status == lint.Pass:
				passed++
			case r.Status < lint.Error && left[name] != "" && r.Status >= lint.Notice:
				met[name] = true
			case r.Status >= lint.Notice:
				t.Errorf("%s: %v: %s: %s %s", what, r.Status, name, r.LintMetadata.Description, r.Details)
			}
		}
		if passed < 10 {
			t.Errorf("%s: only %d lints have anything to say", what, passed)
		}
		t.Logf("%s: %d lints passed", what, passed)
	}
	for what, cert := range h.certificates(t) {
		c, err := zx509.ParseCertificate(cert.Raw)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		check(what, zlint.LintCertificateEx(c, registry))
	}
	list, err := zx509.ParseRevocationList(h.revocations(t))
	if err != nil {
		t.Fatal(err)
	}
	if len(list.RevokedCertificates) != 1 {
		t.Fatalf("the list has %d certificates", len(list.RevokedCertificates))
	}
	check("the revocation list", zlint.LintRevocationListEx(list, registry))
	for name := range left {
		if !met[name] {
			t.Errorf("nothing warns of %s any more", name)
		}
	}
}

// hub is the program, on ports of its own. Its HTTP port has TLS, with a certificate of the hub's.
type hub struct {
	program, data string
	coaps, http   string // host:port
	enrolment     string // over HTTPS
	client        *http.Client
	device        *x509.Certificate // one that was revoked
}

func serve(t *testing.T) *hub {
	t.Helper()
	dir := t.TempDir()
	h := &hub{program: filepath.Join(dir, "coaphub"), data: filepath.Join(dir, "data")}
	build := exec.CommandContext(t.Context(), "go", "build", "-o", h.program, "./cmd/coaphub")
	build.Dir = filepath.Join("..", "..")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	conf := filepath.Join(dir, "coaphub.yaml")
	if err := os.WriteFile(conf, []byte("grpcGateway: {api: {http: {tls: true}}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(h.program, "serve", "--config", conf, "--data", h.data, "--external-address", "127.0.0.1", "--coap-address", "127.0.0.1:0",
		"--grpc-address", "127.0.0.1:0", "--admin-address", "127.0.0.1:0", "--http-address", "127.0.0.1:0",
		"--enrolment-address", "127.0.0.1:0", "--enrolment-http-address", "127.0.0.1:0")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for lines := bufio.NewScanner(out); h.http == "" && lines.Scan(); {
		for _, f := range strings.Fields(lines.Text()) {
			name, uri, _ := strings.Cut(f, "=")
			_, address, _ := strings.Cut(uri, "://")
			switch name {
			case "coaps+tcp":
				h.coaps = address
			case "http":
				h.http = address
			case "enrolment-http":
				h.enrolment = address
			}
		}
	}
	if h.http == "" {
		t.Fatal("the hub did not start")
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(h.run(t, "ca", "root", "https"))
	h.client = &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}, Timeout: 10 * time.Second}
	return h
}

func (h *hub) run(t *testing.T, args ...string) []byte {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), h.program, append(args, "--data", h.data)...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("coaphub %v: %v", args, err)
	}
	return out
}

// certificates are one of each profile.
func (h *hub) certificates(t *testing.T) map[string]*x509.Certificate {
	t.Helper()
	all := map[string]*x509.Certificate{}
	keep := func(what string, text []byte) {
		block, _ := pem.Decode(text)
		if block == nil {
			t.Fatalf("%s: there is no certificate in %q", what, text)
		}
		cert, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		all[what] = cert
	}
	dir := t.TempDir()
	h.run(t, "ca", "issue", "--device-id", id(0), "--out", dir)
	text, err := os.ReadFile(filepath.Join(dir, "cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	keep("a device that the operator made", text)
	token := strings.TrimSpace(string(h.run(t, "token")))
	for i, curve := range []elliptic.Curve{elliptic.P256(), elliptic.P384()} {
		key, err := ecdsa.GenerateKey(curve, rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		keep("a device with a key of "+curve.Params().Name, h.sign(t, token, "identity-csr", id(i+1), key, ""))
		if i == 0 {
			admin := strings.TrimSpace(string(h.run(t, "token", "--scope", "admin", "--scope", "devices:write")))
			keep("an application", h.sign(t, token, "csr", id(4), key, `,"profile":"client"`))
			keep("a service", h.sign(t, admin, "csr", id(5), key, `,"profile":"service","hosts":["service.example.com","192.0.2.1"]`))
		}
	}
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	keep("a device with a key of Ed25519", h.sign(t, token, "identity-csr", id(3), key, ""))
	h.device = all["a device with a key of Ed25519"]
	h.run(t, "certs", "revoke", fmt.Sprintf("%x", h.device.SerialNumber), "--reason", "keyCompromise")
	for _, root := range []string{"device", "https", "internal"} {
		keep("the root "+root, h.run(t, "ca", "root", root))
		text, err := os.ReadFile(filepath.Join(h.data, "keys", root+"-issuing.pem"))
		if err != nil {
			t.Fatal(err)
		}
		keep("what issues for "+root, text)
	}
	// SCEP's registrar is made for the first client that asks for it.
	devices := x509.NewCertPool()
	devices.AppendCertsFromPEM(h.run(t, "ca", "root"))
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+h.enrolment+"/scep?operation=GetCACert", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: devices}}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	_ = resp.Body.Close()
	if text, err = os.ReadFile(filepath.Join(h.data, "keys", "device-registrar.pem")); err != nil {
		t.Fatal(err)
	}
	keep("SCEP's registrar", text)
	for what, address := range map[string]string{"the hub for devices": h.coaps, "the hub for applications": h.http} {
		// The first asks for a certificate; it has shown its own by then.
		conn, err := tls.Dial("tcp", address, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		all[what] = conn.ConnectionState().PeerCertificates[0]
		_ = conn.Close()
	}
	return all
}

func id(n int) string { return fmt.Sprintf("6ba7b810-9dad-41d1-80b4-%012d", n) }

// sign has a certificate signed over the API: kind is the path's last segment, and more is members of the body.
func (h *hub) sign(t *testing.T, token, kind, id string, key crypto.Signer, more string) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "uuid:" + id}}, key)
	if err != nil {
		t.Fatal(err)
	}
	text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})
	body := fmt.Sprintf(`{"certificateSigningRequest":%q%s}`, base64.StdEncoding.EncodeToString(text), more)
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost,
		"https://"+h.http+"/certificate-authority/api/v1/sign/"+kind, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Authorization", "Bearer "+token)
	req.Header.Set("Content-Type", "application/json")
	var answer struct{ Certificate []byte }
	if b := h.do(t, req); json.Unmarshal(b, &answer) != nil || len(answer.Certificate) == 0 {
		t.Fatalf("the request for %s got %s", id, b)
	}
	return answer.Certificate
}

func (h *hub) do(t *testing.T, req *http.Request) []byte {
	t.Helper()
	res, err := h.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %s %v", req.URL, res.Status, bytes.TrimSpace(b), err)
	}
	return b
}

// revocations is the list that a certificate leads to.
func (h *hub) revocations(t *testing.T) []byte {
	t.Helper()
	if len(h.device.CRLDistributionPoints) != 1 {
		t.Fatalf("a device's certificate leads to %q", h.device.CRLDistributionPoints)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, h.device.CRLDistributionPoints[0], http.NoBody)
	if err != nil {
		t.Fatal(err)
	}
	return h.do(t, req)
}
