package grpcgateway

import (
	"strings"
	"testing"
)

const page = "https://app.example.com"

func TestCORS(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.API.HTTP.CORS.Origins = []string{page} })
	target := "/api/v1/devices/" + string(lampA)

	a := w.do(t, "", "OPTIONS", target, "Origin: "+page, "Access-Control-Request-Method: DELETE", "Access-Control-Request-Headers: authorization")
	want(t, "preflight", a.Code, 204)
	want(t, "origin", a.Header().Get("Access-Control-Allow-Origin"), page)
	for header, part := range map[string]string{
		"Access-Control-Allow-Methods": "DELETE", "Access-Control-Allow-Headers": "Authorization", "Access-Control-Max-Age": "600", "Vary": "Origin",
	} {
		if !strings.Contains(strings.Join(a.Header().Values(header), ","), part) {
			t.Errorf("%s is %q", header, a.Header().Values(header))
		}
	}
	a = w.get(t, target, "Origin: "+page, "Sec-Fetch-Site: cross-site")
	want(t, "read", a.Code, 200)
	want(t, "origin", a.Header().Get("Access-Control-Allow-Origin"), page)
	if !strings.Contains(a.Header().Get("Access-Control-Expose-Headers"), "ETag") {
		t.Error("the page may not read the ETag")
	}
	a = w.do(t, "alice", "DELETE", target, "Origin: "+page, "Sec-Fetch-Site: cross-site")
	want(t, "change", a.Code, 200)
	want(t, "the authority's", w.get(t, records, "Origin: "+page).Header().Get("Access-Control-Allow-Origin"), page)
	want(t, "an error is readable too", w.do(t, "", "GET", target, "Origin: "+page).Header().Get("Access-Control-Allow-Origin"), page)

	for _, origin := range []string{"https://app.example.com:8443", "http://app.example.com", "https://app.example.com.evil.org", "null", "https://APP.example.com"} {
		a := w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(lampB), "Origin: "+origin, "Sec-Fetch-Site: cross-site")
		want(t, origin, a.Code, 403)
		want(t, origin, a.Header().Get("Access-Control-Allow-Origin"), "")
		a = w.do(t, "", "OPTIONS", target, "Origin: "+origin, "Access-Control-Request-Method: DELETE")
		want(t, "preflight of "+origin, a.Header().Get("Access-Control-Allow-Origin"), "")
		if a.Code < 400 {
			t.Errorf("preflight of %s is %d", origin, a.Code)
		}
	}
	for _, a := range []answer{
		w.get(t, target, "Origin: "+page), w.do(t, "", "OPTIONS", target, "Origin: "+page, "Access-Control-Request-Method: GET"),
	} {
		want(t, "credentials", a.Header().Get("Access-Control-Allow-Credentials"), "")
	}
	// The provider's pages, with their cookie, are not shared.
	want(t, "outside the API", w.get(t, "/login", "Origin: "+page).Header().Get("Access-Control-Allow-Origin"), "")
}

func TestCORSIsOffByDefault(t *testing.T) {
	w := newWorld(t)
	a := w.get(t, "/api/v1/devices", "Origin: "+page)
	want(t, "origin", a.Header().Get("Access-Control-Allow-Origin"), "")
	want(t, "preflight", w.do(t, "", "OPTIONS", "/api/v1/devices", "Origin: "+page, "Access-Control-Request-Method: GET").Code, 501)
}

func TestOriginsAreCheckedExactly(t *testing.T) {
	for origin, good := range map[string]bool{
		page: true, "http://localhost:3000": true, "https://[::1]:8443": true,
		"*": false, "null": false, "": false, "https://app.example.com/": false, "app.example.com": false, "https://*.example.com": false,
		"https://App.example.com": false, "ftp://app.example.com": false, "https://user@app.example.com": false, "https://app.example.com:443": false,
	} {
		c := Default()
		c.API.HTTP.CORS.Origins = []string{origin}
		errs := c.Validate()
		if (len(errs) == 0) != good {
			t.Errorf("%q: %v", origin, errs)
		}
		if !good && len(errs) == 1 && !strings.Contains(errs[0].Error(), "api.http.cors.origins[0]") {
			t.Errorf("%q: the error does not name the key: %v", origin, errs[0])
		}
	}
}
