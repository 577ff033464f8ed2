package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// csrFor makes a key for a device and a request for its certificate.
func csrFor(t testing.TB, id string) (csr, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	if csr, err = x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "uuid:" + id}}, private); err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// enrolled makes a key for a device and has it signed over the API.
func (a *app) enrolled(id string) (chain, key []byte) {
	a.t.Helper()
	text, key := csrFor(a.t, id)
	var answer struct{ Certificate []byte }
	body := fmt.Sprintf(`{"certificateSigningRequest":%q}`, base64.StdEncoding.EncodeToString(text))
	if status := a.ask(http.MethodPost, "/certificate-authority/api/v1/sign/identity-csr", body, &answer); status != http.StatusOK {
		a.t.Fatalf("the request got %d", status)
	}
	return answer.Certificate, key
}

// TestCertificateFromRequestToRevocation: a device makes its own key, has it signed, and comes in with it, over TLS and DTLS;
// when its certificate is revoked its session ends, it does not come in any more, and it is on the list; with another one it does.
func TestCertificateFromRequestToRevocation(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			id, other := deviceID(1), deviceID(2)
			_, stop := h.Device(t, other, "bystander")
			defer stop()
			chain, key := a.enrolled(id)
			cfg := simulation(t, h, tr, id)
			live := func(chain, key []byte) (d *device.Device, ended chan error, leave func()) {
				t.Helper()
				var err error
				if cfg.TLS, err = device.TLS([]byte(h.Onboard(t, other).CA), chain, key, h.ID); err != nil {
					t.Fatal(err)
				}
				if d, err = device.New(cfg); err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				ended = make(chan error, 1)
				code := h.Code(t, id)
				go func() { ended <- d.Run(ctx, func(context.Context) (string, error) { return code, nil }) }()
				return d, ended, func() { cancel(); <-ended }
			}
			_, _, leave := live(chain, key)
			a.until("the device to be in sync", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })

			block, _ := pem.Decode(chain)
			leaf, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			record := fmt.Sprintf("/certificate-authority/api/v1/signing/records?idFilter=%x", leaf.SerialNumber.Bytes())

			// Somebody else's token revokes nothing.
			h.User(t, "mallory", "a long enough password", "user")
			m := application(t, h)
			m.token = h.TokenOf(t, "mallory")
			var count struct{ Count string }
			if status := m.ask(http.MethodDelete, record, "", &count); status != http.StatusOK || count.Count != "0" {
				t.Errorf("mallory revoked: %d, %q", status, count.Count)
			}
			if status := a.ask(http.MethodDelete, record, "", &count); status != http.StatusOK || count.Count != "1" {
				t.Fatalf("revoking got %d, %q", status, count.Count)
			}
			a.until("the device to be gone", func() bool { return strings.HasPrefix(a.twin(id), "OFFLINE") })
			if !a.listed(leaf) {
				t.Error("it is not on the revocation list")
			}
			// It tries to come again, in vain, until it has another certificate.
			a.until("it to be turned away", func() bool {
				refused, err := h.Control.Refused(t.Context())
				return err == nil && slices.ContainsFunc(refused, func(r bundle.Refusal) bool { return strings.Contains(r.Reason, "revoked") })
			})
			leave()
			if got := a.twin(id); !strings.HasPrefix(got, "OFFLINE") {
				t.Errorf("with a revoked certificate it is %s", got)
			}
			if a.twin(other) != "ONLINE IN_SYNC" {
				t.Error("another device noticed it")
			}
			_, _, leave = live(a.enrolled(id))
			a.until("the device to be back", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })
			leave()
		})
	}
}

// listed reports whether the list of a certificate's issuer has it. It needs no token.
func (a *app) listed(c *x509.Certificate) bool {
	a.t.Helper()
	var record struct {
		Result struct {
			Credential struct {
				Serial   string
				IssuerID string `json:"issuerId"`
			}
		}
	}
	if status := a.ask(http.MethodGet, "/certificate-authority/api/v1/signing/records", "", &record); status != http.StatusOK {
		a.t.Fatalf("the records got %d", status)
	}
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodGet, a.base+"/certificate-authority/api/v1/signing/crl/"+record.Result.Credential.IssuerID, http.NoBody)
	if err != nil {
		a.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer resp.Body.Close()
	der, err := io.ReadAll(resp.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	list, err := x509.ParseRevocationList(der)
	if err != nil {
		a.t.Fatal(err)
	}
	for _, e := range list.RevokedCertificateEntries {
		if e.SerialNumber.Cmp(c.SerialNumber) == 0 && time.Since(e.RevocationTime) < 10*time.Minute { // as the list, it is dated back
			return true
		}
	}
	return false
}

// TestTheHubRenewsACertificate: a certificate that nears its end is renewed over the device's session, and the device comes in with
// the new one when the old one is worth nothing any more.
func TestTheHubRenewsACertificate(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			id := deviceID(1)
			short, err := h.Control.Issue(t.Context(), id, 10*time.Minute)
			if err != nil {
				t.Fatal(err)
			}
			cfg := simulation(t, h, tr, id)
			if cfg.TLS, err = device.TLS([]byte(short.CA), []byte(short.Chain), []byte(short.Key), h.ID); err != nil {
				t.Fatal(err)
			}
			d, err := device.New(cfg)
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			ended, code := make(chan error, 1), h.Code(t, id)
			go func() { ended <- d.Run(ctx, func(context.Context) (string, error) { return code, nil }) }()
			defer func() { cancel(); <-ended }()
			a.until("the certificate to be renewed", func() bool {
				cs, err := h.Control.Certificates(t.Context(), bundle.CertificatesRequest{DeviceID: id})
				has := hub.SerialOf(d.Certificate().SerialNumber) // and the device has it, not only the ledger
				return err == nil && slices.ContainsFunc(cs, func(c bundle.Certificate) bool {
					return c.Method == "renewal" && c.Serial == has && c.NotAfter.After(time.Now().Add(24*time.Hour))
				})
			})
			block, _ := pem.Decode([]byte(short.Chain))
			first, err := x509.ParseCertificate(block.Bytes)
			if err != nil {
				t.Fatal(err)
			}
			sessions := d.Stats().SignIns.Load()
			if _, err := h.Control.RevokeCertificates(t.Context(), bundle.CertificatesRequest{Serials: []string{hub.SerialOf(first.SerialNumber)}}); err != nil {
				t.Fatal(err)
			}
			a.until("it to be here again", func() bool { return d.Stats().SignIns.Load() > sessions && a.twin(id) == "ONLINE IN_SYNC" })
		})
	}
}

// TestOthersAreNoDevices: what is signed for applications and services lets nobody in at the devices' door, not even where somebody
// has configured their root there, too.
func TestOthersAreNoDevices(t *testing.T) {
	t.Parallel()
	first := hubtest.Start(t)
	var roots []string
	for _, which := range []string{"device", "https"} {
		text, err := first.Control.Root(t.Context(), which)
		if err != nil {
			t.Fatal(err)
		}
		file := filepath.Join(t.TempDir(), which)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		roots = append(roots, fmt.Sprintf("%q", file))
	}
	first.Stop(t)
	for _, c := range []struct{ name, config, reason string }{
		{"as it comes", "coapGateway.api.coap.tls.identityPropertiesRequired=true", "unknown authority"},
		{"with the root of HTTPS", "coapGateway.api.coap.tls.caPool=[" + strings.Join(roots, ",") + "]", "common name"},
	} {
		h := hubtest.Start(t, hubtest.WithData(first.Data), hubtest.WithConfig(c.config))
		a := application(t, h)
		for _, body := range []string{`"profile":"client"`, `"profile":"service","hosts":["hub.example"]`} {
			id := deviceID(1)
			text, key := csrFor(t, id)
			var answer struct{ Certificate []byte }
			body := fmt.Sprintf(`{%s,"certificateSigningRequest":%q}`, body, base64.StdEncoding.EncodeToString(text))
			if status := a.ask(http.MethodPost, "/certificate-authority/api/v1/sign/csr", body, &answer); status != http.StatusOK {
				t.Fatalf("%s got %d", body, status)
			}
			pair, err := tls.X509KeyPair(answer.Certificate, key)
			if err != nil {
				t.Fatal(err)
			}
			conf := &tls.Config{ // shown although the hub does not ask for this CA
				InsecureSkipVerify: true, MinVersion: tls.VersionTLS12, MaxVersion: tls.VersionTLS12,
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil },
			}
			if conn, err := tls.Dial("tcp", h.CoAPS, conf); err == nil {
				_ = conn.Close()
				t.Errorf("%s, %s: it is let in", c.name, body)
			}
			a.until("the refusal", func() bool {
				refused, err := h.Control.Refused(t.Context())
				return err == nil && len(refused) > 0 && strings.Contains(refused[0].Reason, c.reason)
			})
		}
		h.Stop(t)
	}
}
