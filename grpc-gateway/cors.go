package grpcgateway

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
)

// CORSConfig lets pages of other origins call the API.
type CORSConfig struct {
	// Origins are the origins whose pages may call the API and open WebSockets with an access token, exactly as browsers name
	// them: scheme, host and, unless it is the scheme's own, port, for example https://app.example.com. Cookies never count.
	// Default empty: no page of another origin may.
	Origins []string `yaml:"origins"`
}

// checkOrigin says what is wrong with an origin of the configuration: one that no browser sends would never match.
func checkOrigin(o string) error {
	u, err := url.Parse(o)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.Scheme+"://"+u.Host != o || o != strings.ToLower(o) ||
		strings.ContainsAny(u.Host, "*@ ") || u.Scheme == "https" && u.Port() == "443" || u.Scheme == "http" && u.Port() == "80" {
		return fmt.Errorf("%q is not an origin as browsers name it, like https://app.example.com", o)
	}
	return nil
}

// Headers of the CORS protocol (Fetch, Section 3.2).
const (
	corsMethods = "GET, HEAD, POST, PUT, PATCH, DELETE"
	corsRequest = "Accept, Authorization, Content-Type, ETag, Idempotency-Key, If-Match, If-None-Match, Last-Event-ID"
	corsAnswer  = "Allow, Content-Length, ETag, Retry-After, WWW-Authenticate, X-Request-Id"
	corsMaxAge  = "600" // seconds; a changed configuration is noticed soon enough
)

// crossOrigin reports whether the request comes from a page of an origin that may call the API, and tells the browser so.
// Access-Control-Allow-Credentials is never sent: a cookie authorizes nothing here, and the provider's pages are not shared
// at all.
func (g *Gateway) crossOrigin(w http.ResponseWriter, r *http.Request) bool {
	if len(g.origins) == 0 || !ofAPI(r.URL.Path) && !strings.HasPrefix(r.URL.Path, "/.well-known/") {
		return false
	}
	h := w.Header()
	h.Add("Vary", "Origin") // also for those without: a cache must not give one origin's answer to another
	origin := r.Header.Get("Origin")
	if !g.origins[origin] {
		return false
	}
	h.Set("Access-Control-Allow-Origin", origin)
	h.Set("Access-Control-Expose-Headers", corsAnswer)
	return true
}

// preflight answers OPTIONS of such a page. It needs no token, since browsers send none with it (Fetch, Section 4.8), so it
// says the same for every path: strangers do not learn which there are.
func preflight(w http.ResponseWriter) {
	h := w.Header()
	h.Del("Access-Control-Expose-Headers")
	h.Set("Access-Control-Allow-Methods", corsMethods)
	h.Set("Access-Control-Allow-Headers", corsRequest)
	h.Set("Access-Control-Max-Age", corsMaxAge)
	w.WriteHeader(http.StatusNoContent)
}
