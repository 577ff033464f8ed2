package web_test

import (
	"compress/gzip"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/web"
)

func get(t *testing.T, c *web.Console, method, path string, header ...string) *http.Response {
	t.Helper()
	r := httptest.NewRequestWithContext(t.Context(), method, path, nil)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	c.ServeHTTP(w, r)
	return w.Result()
}

func body(t *testing.T, r *http.Response) string {
	t.Helper()
	b, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// Each page of the console is the same document, under a policy that lets nothing in from elsewhere.
func TestPagesOfTheConsole(t *testing.T) {
	c, err := web.New("https://login.example")
	if err != nil {
		t.Fatal(err)
	}
	first := body(t, get(t, c, "GET", "/"))
	for _, path := range []string{"/", "/devices/d0000000-0000-4000-8000-000000000001", "/add", "/events", "/security", "/system"} {
		r := get(t, c, "GET", path)
		if !c.Serves(path) || r.StatusCode != http.StatusOK || body(t, r) != first {
			t.Errorf("%s: %v, %s", path, c.Serves(path), r.Status)
		}
		p := r.Header.Get("Content-Security-Policy")
		for _, directive := range []string{"default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self' https://login.example", "frame-ancestors 'none'"} {
			if !strings.Contains(p, directive) {
				t.Errorf("%s: %q is not in %q", path, directive, p)
			}
		}
		if strings.Contains(p, "unsafe") {
			t.Error(p)
		}
	}
	for _, path := range []string{"/oauth/login", "/callback", "/nothing"} {
		if c.Serves(path) {
			t.Errorf("%s is served", path)
		}
	}
	if r := get(t, c, "GET", "/console/nothing.js"); r.StatusCode != http.StatusNotFound {
		t.Error(r.Status)
	}
	if r := get(t, c, "POST", "/"); r.StatusCode != http.StatusMethodNotAllowed || r.Header.Get("Allow") == "" {
		t.Error(r.Status)
	}
}

// A file whose name changes with its content is fetched once; all others are asked about each time, and sent when they are new.
func TestFilesOfTheConsole(t *testing.T) {
	c, err := web.New()
	if err != nil {
		t.Fatal(err)
	}
	page := get(t, c, "GET", "/")
	tag := page.Header.Get("ETag")
	script := regexp.MustCompile(`src="(/console/[^"]+\.js)"`).FindStringSubmatch(body(t, page))
	if script == nil || tag == "" || page.Header.Get("Cache-Control") != "no-cache" {
		t.Fatalf("%v %q %q", script, tag, page.Header)
	}
	if r := get(t, c, "GET", "/", "If-None-Match", "W/"+tag); r.StatusCode != http.StatusNotModified || body(t, r) != "" {
		t.Error(r.Status)
	}
	plain := get(t, c, "GET", script[1])
	if !strings.Contains(plain.Header.Get("Cache-Control"), "immutable") || plain.Header.Get("Content-Encoding") != "" {
		t.Error(plain.Header)
	}
	zipped := get(t, c, "GET", script[1], "Accept-Encoding", "br;q=1.0, gzip;q=0.5")
	if zipped.Header.Get("Content-Encoding") != "gzip" || zipped.Header.Get("ETag") == plain.Header.Get("ETag") {
		t.Fatal(zipped.Header)
	}
	z, err := gzip.NewReader(zipped.Body)
	if err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(z); err != nil || string(b) != body(t, plain) {
		t.Error("what is compressed is something else", err)
	}
	for _, refused := range []string{"gzip;q=0", "gzip;q=0.000", "br", ""} {
		if r := get(t, c, "GET", script[1], "Accept-Encoding", refused); r.Header.Get("Content-Encoding") != "" {
			t.Errorf("%q: %v", refused, r.Header)
		}
	}
}
