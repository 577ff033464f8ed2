package grpcgateway

import (
	"net/http"
	"strings"
)

// pageErrors turns "not found" and "method not allowed" of pages that are none of the API's into our error body, for a client
// that asked for JSON: it mistyped a path of the API, and text made for people would be one more thing to puzzle over.
type pageErrors struct {
	http.ResponseWriter
	replaced bool
}

// pagesFor returns what Deps.Pages writes to.
func pagesFor(w http.ResponseWriter, r *http.Request) http.ResponseWriter {
	for _, accept := range r.Header.Values("Accept") {
		if strings.Contains(accept, "application/json") || strings.Contains(accept, "application/protojson") {
			return &pageErrors{ResponseWriter: w}
		}
	}
	return w
}

// forPeople reports whether a browser asks for a page: at the root, where programs get the hub's name, that decides.
func forPeople(r *http.Request) bool {
	for _, accept := range r.Header.Values("Accept") {
		if strings.Contains(accept, "text/html") {
			return true
		}
	}
	return false
}

func (p *pageErrors) Unwrap() http.ResponseWriter { return p.ResponseWriter }

func (p *pageErrors) WriteHeader(status int) {
	err := errNoRoute
	switch {
	case strings.HasPrefix(p.Header().Get("Content-Type"), "application/json"): // it speaks JSON already
		p.ResponseWriter.WriteHeader(status)
		return
	case status == http.StatusNotFound:
	case status == http.StatusMethodNotAllowed:
		err = errNoMethod
	default:
		p.ResponseWriter.WriteHeader(status)
		return
	}
	p.replaced = true
	p.Header().Del("Content-Length")
	writeErrorAs(p.ResponseWriter, status, err)
}

func (p *pageErrors) Write(b []byte) (int, error) {
	if p.replaced {
		return len(b), nil
	}
	return p.ResponseWriter.Write(b)
}
