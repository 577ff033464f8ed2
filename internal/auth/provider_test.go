package auth

import (
	"crypto/tls"
	"encoding/pem"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/issuer"
)

func TestIssuerOverTLSWithItsOwnCA(t *testing.T) {
	t.Parallel()
	is, ca := issuer.StartTLS(t)
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		pool []string
		want bool
	}{{"known CA", []string{file}, true}, {"unknown CA", nil, false}} {
		t.Run(tc.name, func(t *testing.T) {
			v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}, CAPool: tc.pool}}, Options{})
			if err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			if _, err := v.Verify(t.Context(), is.Mint(nil)); tc.want && err != nil || !tc.want && !hub.IsKind(err, hub.Unavailable) {
				t.Errorf("got %v", err)
			}
		})
	}
	if _, err := tlsConfig([]string{os.DevNull}); err == nil {
		t.Error("a CA file without certificates was accepted")
	}
	if c, err := tlsConfig(nil); err != nil || c.MinVersion < tls.VersionTLS12 {
		t.Errorf("%+v %v", c, err)
	}
}

func TestRedirectsStayOnHTTPS(t *testing.T) {
	t.Parallel()
	request := func(u string) *http.Request {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, u, nil)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	first := request("https://a.example")
	if err := sameSchemeRedirects(request("https://b.example"), []*http.Request{first}); err != nil {
		t.Error(err)
	}
	if sameSchemeRedirects(request("http://a.example"), []*http.Request{first}) == nil {
		t.Error("a redirect to plain HTTP was followed")
	}
	if sameSchemeRedirects(first, []*http.Request{first, first, first}) == nil {
		t.Error("redirects have no end")
	}
}

func TestMetricsCountResults(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	reg := prometheus.NewRegistry()
	v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}}}, Options{HTTPClient: &http.Client{Transport: is}, Registerer: reg})
	if err != nil {
		t.Fatal(err)
	}
	defer v.Close()
	good := is.Mint(nil)
	for range 3 {
		mustVerify(t, v, good)
	}
	wantKind(t, v, "nonsense", hub.Unauthenticated)
	is.Down()
	wantKind(t, v, is.MintWithUnknownKey("new", nil), hub.Unavailable)
	want := `
# HELP coaphub_auth_tokens_total Access tokens checked, by result. If unavailable rises, look at the identity provider; if refused rises, at who calls.
# TYPE coaphub_auth_tokens_total counter
coaphub_auth_tokens_total{result="refused"} 1
coaphub_auth_tokens_total{result="remembered"} 2
coaphub_auth_tokens_total{result="unavailable"} 1
coaphub_auth_tokens_total{result="verified"} 1
`
	if err := testutil.GatherAndCompare(reg, strings.NewReader(want), "coaphub_auth_tokens_total"); err != nil {
		t.Error(err)
	}
}

// FuzzProvider lets a provider answer anything to discovery, key set and token requests: nothing but Unavailable or
// Unauthenticated may come of it, and never a token that is empty.
func FuzzProvider(f *testing.F) {
	is := issuer.New(f)
	f.Add(200, `{"issuer":"https://issuer.invalid","jwks_uri":"https://issuer.invalid/keys","token_endpoint":"https://issuer.invalid/token"}`,
		`{"keys":[{"kty":"RSA","kid":"key-1","n":"AQAB","e":"AQAB"},{"kty":"oct","kid":"key-1","k":"AA"},{"kty":"new"}]}`,
		`{"access_token":"a","token_type":"Bearer","expires_in":3600,"refresh_token":"r"}`)
	f.Add(200, `{"issuer":7}`, `{"keys":null}`, `{"access_token":null,"expires_in":"1e400"}`)
	f.Add(400, `[]`, `{"keys":[[]]}`, `{"error":"invalid_grant"}`)
	token := is.Mint(nil)
	f.Fuzz(func(t *testing.T, status int, meta, keys, answer string) {
		client := &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
			body, code := meta, 200
			switch r.URL.Path {
			case "/keys":
				body = keys
			case "/token":
				body, code = answer, 200+status&511
			}
			return &http.Response{StatusCode: code, Body: readCloser{strings.NewReader(body)}, Header: http.Header{}, Request: r}, nil
		})}
		v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}}}, Options{HTTPClient: client})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		if _, err := v.Verify(t.Context(), token); err == nil || !hub.IsKind(err, hub.Unavailable) && !hub.IsKind(err, hub.Unauthenticated) {
			t.Errorf("verify: %v", err)
		}
		c, err := NewClient(ClientConfig{Authority: is.URL(), ClientID: "hub", HTTPClient: client})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		tok, err := c.Exchange(t.Context(), lamp, "", "code")
		if err == nil && tok.Access == "" || err != nil && !hub.IsKind(err, hub.Unavailable) && !hub.IsKind(err, hub.Unauthenticated) {
			t.Errorf("exchange: %+v %v", tok, err)
		}
	})
}

func BenchmarkVerify(b *testing.B) {
	is := issuer.New(b)
	v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}}}, Options{HTTPClient: &http.Client{Transport: is}})
	if err != nil {
		b.Fatal(err)
	}
	defer v.Close()
	token := is.Mint(nil)
	if _, err := v.Verify(b.Context(), token); err != nil {
		b.Fatal(err)
	}
	b.Run("remembered", func(b *testing.B) {
		for b.Loop() {
			if _, err := v.Verify(b.Context(), token); err != nil {
				b.Fatal(err)
			}
		}
	})
	b.Run("signature", func(b *testing.B) {
		for b.Loop() {
			v.tokens = newRemembered()
			if _, err := v.Verify(b.Context(), token); err != nil {
				b.Fatal(err)
			}
		}
	})
}
