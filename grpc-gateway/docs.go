package grpcgateway

import (
	"embed"
	"net/http"
)

// The page that shows the OpenAPI description to people. It is ours, so that it needs nothing of anybody else's servers.
//
//go:embed docs/index.html docs/docs.js docs/docs.css
var docsFiles embed.FS

// docsPolicy lets the page load what this hub serves, and nothing else; neither may anybody frame it.
const docsPolicy = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
	"base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

var docsTypes = map[string]string{
	"index.html": "text/html; charset=utf-8", "docs.js": "text/javascript; charset=utf-8", "docs.css": "text/css; charset=utf-8",
}

// docsFile serves a file of the page.
func docsFile(name string) func(*Gateway, http.ResponseWriter, *request) error {
	b, err := docsFiles.ReadFile("docs/" + name)
	return func(_ *Gateway, w http.ResponseWriter, r *request) error {
		if err != nil { // it is built in
			return err
		}
		h := w.Header()
		h.Set("Content-Security-Policy", docsPolicy)
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-cache") // an update of the hub is seen at once
		return writeTagged(w, r, docsTypes[name], b)
	}
}
