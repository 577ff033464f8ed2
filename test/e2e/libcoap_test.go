package e2e_test

import (
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
)

// TestLibcoapIdentities signs devices up and in with libcoap's client, over TLS and DTLS, each with what the hub gives out in one
// way: a certificate that the operator made, one that was signed for openssl's request, a pre-shared key. Then that is ended, and
// lets nobody in any more.
func TestLibcoapIdentities(t *testing.T) {
	t.Parallel()
	for _, client := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		t.Run(client, func(t *testing.T) {
			t.Parallel()
			if _, err := exec.LookPath(client); err != nil {
				t.Skip(client + " is not installed (Debian: libcoap3-bin)")
			}
			p := serve(t, t.TempDir())
			for i, way := range []string{"ca issue", "openssl", "psk"} {
				for j, scheme := range []string{"coaps+tcp", "coaps"} {
					if way == "psk" && scheme == "coaps+tcp" {
						continue // docs/divergences.md
					}
					t.Run(way+" over "+scheme, func(t *testing.T) { libcoapIdentity(t, p, client, way, scheme, deviceID(10*i+j+1)) })
				}
			}
		})
	}
}

func libcoapIdentity(t *testing.T, p *process, client, way, scheme, id string) {
	credential, end := p.identity(t, way, id)
	ask := func(path string, body map[string]any) (said string, answer []byte) {
		t.Helper()
		b, err := cbor.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
		if err := os.WriteFile(in, b, 0o600); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		args := append([]string{"-v", "7", "-B", "5"}, credential...)
		args = append(args, "-m", "post", "-t", "10000", "-f", in, "-o", out, p.ready[scheme]+path)
		log, _ := exec.CommandContext(ctx, client, args...).CombinedOutput() // an error response is an exit code too
		answer, _ = os.ReadFile(out)
		return string(log), answer
	}
	var o struct{ AuthorizationCode string }
	if err := json.Unmarshal([]byte(p.run("onboard", "--device-id", id, "--json")), &o); err != nil {
		t.Fatal(err)
	}
	var tokens struct {
		Access string `cbor:"accesstoken"`
		UID    string `cbor:"uid"`
	}
	said, answer := ask("/oic/sec/account", map[string]any{"di": id, "accesstoken": o.AuthorizationCode})
	if err := cbor.Unmarshal(answer, &tokens); err != nil || tokens.Access == "" {
		t.Fatalf("sign-up: %v, %x: %s", err, answer, said)
	}
	signIn := map[string]any{"di": id, "uid": tokens.UID, "accesstoken": tokens.Access, "login": true}
	var session struct {
		ExpiresIn int `cbor:"expiresin"`
	}
	said, answer = ask("/oic/sec/session", signIn)
	if err := cbor.Unmarshal(answer, &session); err != nil || session.ExpiresIn <= 0 {
		t.Fatalf("sign-in: %v, %x: %s", err, answer, said)
	}
	end()
	if said, answer = ask("/oic/sec/session", signIn); len(answer) > 0 || strings.Contains(said, "incoming 2.04 response") {
		t.Errorf("what was ended lets it in: %x: %s", answer, said)
	}
}

// identity makes a device's credential and returns the client's options for it, and what ends it.
func (p *process) identity(t *testing.T, way, id string) (options []string, end func()) {
	t.Helper()
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	switch way {
	case "psk":
		key := func() (o struct{ PSKIdentity, PSK string }) {
			if err := json.Unmarshal([]byte(p.run("onboard", "--device-id", id, "--psk", "--json")), &o); err != nil {
				t.Fatal(err)
			}
			return o
		}
		first := key()
		return []string{"-u", first.PSKIdentity, "-k", first.PSK}, func() { key() } // a newer key voids the one before
	case "ca issue":
		p.run("ca", "issue", "--device-id", id, "--out", dir)
	case "openssl": // as in docs/certificates.md
		if _, err := exec.LookPath("openssl"); err != nil {
			t.Skip("openssl is not installed")
		}
		out, err := exec.CommandContext(t.Context(), "openssl", "req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
			"-keyout", at("key.pem"), "-subj", "/CN=uuid:"+id, "-out", at("csr.pem")).CombinedOutput()
		if err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		csr, err := os.ReadFile(at("csr.pem"))
		if err != nil {
			t.Fatal(err)
		}
		status, b := p.send(t.Context(), http.MethodPost, trim(p.run("token")), "/certificate-authority/api/v1/sign/identity-csr",
			fmt.Sprintf(`{"certificateSigningRequest":%q}`, base64.StdEncoding.EncodeToString(csr)))
		var answer struct{ Certificate []byte }
		if status != http.StatusOK || json.Unmarshal(b, &answer) != nil {
			t.Fatalf("the request got %d: %s", status, b)
		}
		for name, text := range map[string][]byte{"cert.pem": answer.Certificate, "ca.pem": []byte(p.run("ca", "root"))} {
			if err := os.WriteFile(at(name), text, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	text, err := os.ReadFile(at("cert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(text)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return []string{"-c", at("cert.pem"), "-j", at("key.pem"), "-R", at("ca.pem")}, func() {
		p.run("certs", "revoke", fmt.Sprintf("%x", cert.SerialNumber))
	}
}
