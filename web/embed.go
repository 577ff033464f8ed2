// Package web is the console: pages for people, which this package serves from the binary. It knows nothing of devices: the
// pages do everything with the hub's HTTP API, as any other application would.
package web

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"fmt"
	"io/fs"
	"mime"
	"net/http"
	"path"
	"strconv"
	"strings"
)

//go:generate ./generate

//go:embed all:dist
var dist embed.FS

// pages are the first segments of the console's own addresses. Their document is the same: what is shown is decided there.
var pages = map[string]bool{"": true, "devices": true, "add": true, "events": true, "security": true, "system": true}

// Console serves the console's files.
type Console struct {
	files  map[string]*file // by path
	policy string
}

// file is one of them, compressed once where that makes it smaller: all of it is small.
type file struct {
	plain, zipped []byte // zipped is nil where plain is shorter
	kind, etag    string
	forever       bool // its name changes with its content
}

// New makes the console. providers are origins (scheme, host and port) besides the hub's own that the page may fetch from: of
// the OpenID provider, where that is not the hub itself.
func New(providers ...string) (*Console, error) {
	c := &Console{files: map[string]*file{}}
	root, err := fs.Sub(dist, "dist")
	if err != nil {
		return nil, fmt.Errorf("read the console: %w", err)
	}
	err = fs.WalkDir(root, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || strings.HasPrefix(d.Name(), ".") {
			return err
		}
		b, err := fs.ReadFile(root, name)
		if err != nil {
			return err
		}
		sum := sha256.Sum256(b)
		f := &file{plain: b, kind: mime.TypeByExtension(path.Ext(name)), etag: base64.RawURLEncoding.EncodeToString(sum[:12])}
		switch path.Ext(name) { // what the system's tables say of these differs
		case ".js":
			f.kind = "text/javascript; charset=utf-8"
		case ".html":
			f.kind = "text/html; charset=utf-8"
		}
		base := path.Base(name)
		f.forever = strings.Contains(strings.TrimSuffix(base, path.Ext(base)), "-") // Vite puts a hash behind a dash
		f.zipped = zip(b)
		c.files["/"+name] = f
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the console: %w", err)
	}
	// Nothing is loaded or asked from elsewhere, nobody frames it, and no text on a page is ever run. 'self' of connect-src is
	// also for WebSockets (CSP Level 3, Section 6.7.2.8).
	c.policy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src " +
		strings.Join(append([]string{"'self'"}, providers...), " ") + "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
	return c, nil
}

func zip(b []byte) []byte {
	var out bytes.Buffer
	w, _ := gzip.NewWriterLevel(&out, gzip.BestCompression) // the level is a good one
	_, _ = w.Write(b)                                       // into memory
	_ = w.Close()
	if out.Len() >= len(b) {
		return nil
	}
	return out.Bytes()
}

// Serves reports whether a path is the console's.
func (c *Console) Serves(p string) bool {
	first, _, _ := strings.Cut(strings.TrimPrefix(p, "/"), "/")
	return pages[first] || first == "console"
}

// ServeHTTP answers with the file at the path, or with the document of the pages.
func (c *Console) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		http.Error(w, "405 method not allowed", http.StatusMethodNotAllowed)
		return
	}
	f := c.files[r.URL.Path]
	if f == nil {
		if first, _, _ := strings.Cut(strings.TrimPrefix(r.URL.Path, "/"), "/"); !pages[first] {
			http.NotFound(w, r)
			return
		}
		f = c.files["/index.html"]
	}
	h := w.Header()
	h.Set("Content-Security-Policy", c.policy)
	h.Set("Referrer-Policy", "no-referrer")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Content-Type", f.kind)
	h.Set("Vary", "Accept-Encoding")
	h.Set("Cache-Control", "no-cache") // an update of the hub is seen at once
	if f.forever {
		h.Set("Cache-Control", "public, max-age=31536000, immutable") // RFC 8246
	}
	body, etag := f.plain, `"`+f.etag+`"`
	if f.zipped != nil && acceptsGzip(r) {
		body, etag = f.zipped, `"`+f.etag+`-gzip"`
		h.Set("Content-Encoding", "gzip")
	}
	h.Set("ETag", etag)
	h.Set("Content-Length", strconv.Itoa(len(body)))
	for tag := range strings.SplitSeq(r.Header.Get("If-None-Match"), ",") {
		if strings.TrimPrefix(strings.TrimSpace(tag), "W/") == etag { // RFC 9110, Section 13.1.2: weak comparison
			h.Del("Content-Type")
			h.Del("Content-Encoding")
			h.Del("Content-Length")
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	_, _ = w.Write(body) // who is gone is gone
}

// acceptsGzip reads Accept-Encoding (RFC 9110, Section 12.5.3); a weight of 0 means no.
func acceptsGzip(r *http.Request) bool {
	for part := range strings.SplitSeq(r.Header.Get("Accept-Encoding"), ",") {
		name, q, weighed := strings.Cut(strings.ReplaceAll(part, " ", ""), ";q=")
		if name == "gzip" && (!weighed || strings.Trim(q, "0.") != "") {
			return true
		}
	}
	return false
}
