package oauthserver

import (
	"encoding/json"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/internal/store/storetest"
)

// FuzzTokenRequest gives the endpoints that take forms whatever comes: each answer is OAuth's JSON, none is a token, nothing
// panics, nothing is our fault.
func FuzzTokenRequest(f *testing.F) {
	const form = "application/x-www-form-urlencoded"
	for _, seed := range [][5]string{
		{"POST", "", form, "grant_type=authorization_code&code=x&client_id=coaphub-web&code_verifier=y", ""},
		{"POST", "", form, "grant_type=authorization_code&code=x", "Basic JTp4"},                      // %:x
		{"POST", "", form, "grant_type=refresh_token&refresh_token=x", "Basic cm9ib3Q6JXp6"},          // robot:%zz
		{"POST", "", form, "grant_type=client_credentials&client_id=robot&client_secret=x", "Basic "}, //
		{"POST", "", form + "; charset=utf-8", "grant_type=client_credentials&scope=a+b", "Basic cm9ib3Q6eA=="},
		{"POST", "", form, "grant_type=urn:ietf:params:oauth:grant-type:device_code&device_code=x&client_id=coaphub-cli", ""},
		{"POST", "", form, "grant_type=urn:ietf:params:oauth:grant-type:jwt-bearer&assertion=x&client_id=coaphub-web", ""},
		{"POST", "", form, "grant_type=a&grant_type=b", ""},
		{"POST", "", form, "grant_type=%zz&%=%", ""},
		{"POST", "", form, "client_id=%ff&grant_type=%00", ""},
		{"POST", "", "multipart/form-data; boundary=x", "--x\r\n\r\n--x--", ""},
		{"GET", "grant_type=client_credentials&client_id=robot&client_secret=x", "", "", ""},
		{"POST", "client_secret=x", form, "", "Bearer x"},
	} {
		f.Add(seed[0], seed[1], seed[2], seed[3], seed[4])
	}
	cfg := config()
	cfg.Machines = []MachineConfig{{ID: "robot", Secret: "0123456789abcdef", Owner: "admin", Scopes: []string{"devices:read"}}}
	s, err := openWith(f.Context(), cfg, storetest.NewMemory(), owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
	if err != nil {
		f.Fatal(err)
	}
	s.limits.tokens = newLimits(1<<30, 1, 10)
	h := s.Handler()
	f.Fuzz(func(t *testing.T, method, query, contentType, body, authorization string) {
		if method != "GET" && method != "POST" && method != "PUT" { // net/http reads the method
			method = "POST"
		}
		for _, path := range []string{"/token", "/revoke", "/introspect"} {
			r := httptest.NewRequest(method, "/oauth"+path, strings.NewReader(body))
			r.URL.RawQuery = query
			r.Header.Set("Content-Type", contentType)
			if authorization != "" {
				r.Header.Set("Authorization", authorization)
			}
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code >= 500 {
				t.Fatalf("%s: %d %s", path, w.Code, w.Body)
			}
			if strings.Contains(w.Body.String(), "access_token") {
				t.Fatalf("%s gave a token: %s", path, w.Body)
			}
			if w.Code >= 400 {
				var answer struct{ Error string }
				if err := json.Unmarshal(w.Body.Bytes(), &answer); err != nil || answer.Error == "" {
					t.Fatalf("%s: %d %q", path, w.Code, w.Body)
				}
			}
		}
		if testutil.ToFloat64(s.metrics.panics) != 0 {
			t.Fatal("a panic")
		}
	})
}

// FuzzBasic: what parseBasic takes is what was given, and survives another round.
func FuzzBasic(f *testing.F) {
	for _, seed := range []string{"Basic cm9ib3Q6eA==", "basic cm9ib3Q6", "Basic JTp4", "Basic", "", "Bearer x", "Basic cm9ib3Q="} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, header string) {
		id, secret, ok := parseBasic(header)
		if !ok {
			if id != "" || secret != "" {
				t.Fatal("credentials of a refused header")
			}
			return
		}
		r := httptest.NewRequest("POST", "/", nil)
		r.SetBasicAuth(url.QueryEscape(id), url.QueryEscape(secret))
		again, againSecret, ok := parseBasic(r.Header.Get("Authorization"))
		if !ok || again != id || againSecret != secret {
			t.Fatalf("%q: %q %q became %q %q", header, id, secret, again, againSecret)
		}
	})
}

// FuzzAuthorize gives the pages whatever comes in an address: no answer is our fault, and a redirect leads to a place that is
// registered or our own.
func FuzzAuthorize(f *testing.F) {
	for _, seed := range []string{
		"client_id=coaphub-web&response_type=code&redirect_uri=http://127.0.0.1:8080/callback&scope=openid",
		"client_id=coaphub-cli&response_type=code&redirect_uri=http://localhost:1/callback&scope=openid&code_challenge=x",
		"client_id=coaphub-web&redirect_uri=http%253A%252F%252Fevil.example", "client_id=coaphub-web&redirect_uri=//evil.example",
		"id=x", "request=x", "prompt=none&max_age=-1", "%zz", "ui_locales=x&acr_values=y&id_token_hint=a.b.c",
	} {
		f.Add(seed)
	}
	s, err := openWith(f.Context(), config(), storetest.NewMemory(), owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
	if err != nil {
		f.Fatal(err)
	}
	s.limits.pages = newLimits(1<<30, 1, 10)
	h := s.Handler()
	f.Fuzz(func(t *testing.T, query string) {
		for _, path := range []string{"/authorize", "/authorize/callback", "/login", "/device", "/end_session"} {
			r := httptest.NewRequest("GET", "/oauth"+path, nil)
			r.URL.RawQuery = query
			w := httptest.NewRecorder()
			h.ServeHTTP(w, r)
			if w.Code >= 500 || testutil.ToFloat64(s.metrics.panics) != 0 {
				t.Fatalf("%s: %d %s", path, w.Code, w.Body)
			}
			if to := w.Header().Get("Location"); to != "" {
				u, err := url.Parse(to)
				if err != nil {
					t.Fatal(err)
				}
				loopback := u.Hostname() == "127.0.0.1" || u.Hostname() == "localhost" || u.Hostname() == "::1"
				if u.Host != "" && !loopback || u.Host == "" && !strings.HasPrefix(u.Path, "/oauth/") {
					t.Fatalf("%s redirects to %s", path, to)
				}
			}
		}
	})
}
