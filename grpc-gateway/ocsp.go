package grpcgateway

import (
	"net/http"
	"net/url"
	"strings"
)

// ocspPath is where questions about single certificates are answered. Whoever is shown a certificate may ask, so it is open.
const ocspPath = "/certificate-authority/api/v1/signing/ocsp"

// maxQuestion bounds a question; one about a certificate has 80 bytes, and a nonce or a signature come on top.
const maxQuestion = 4 << 10

// questionIn finds a question in a path (RFC 6960, Appendix A.1): base64, which may have slashes in it, and clients differ in what
// they escape.
func questionIn(path string) (question string, ok bool) {
	rest, ok := strings.CutPrefix(path, ocspPath+"/")
	if !ok || rest == "" {
		return "", false
	}
	question, err := url.PathUnescape(rest)
	return question, err == nil
}

// postStatus answers a question in the body. Its type is not looked at: that it is one shows by itself.
func (g *Gateway) postStatus(w http.ResponseWriter, r *request) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxQuestion)
	b, err := r.body()
	if err != nil {
		return err
	}
	return g.writeStatus(w, r, b)
}

func (g *Gateway) getStatus(w http.ResponseWriter, r *request) error {
	if g.deps.Certificates == nil {
		return errNoRoute
	}
	if len(r.vars.question) > maxQuestion {
		return errBody
	}
	b, err := fromBase64(r.vars.question)
	if err != nil {
		b = nil // an answer says so, as of anything else that is no question
	}
	return g.writeStatus(w, r, b)
}

// writeStatus answers as RFC 5019, Section 6.2 has it. Caches may keep an answer for a minute, as they may the list, and not until
// it ends: a certificate may be revoked before.
func (g *Gateway) writeStatus(w http.ResponseWriter, r *request, question []byte) error {
	st := g.deps.Certificates.Status(r.Context(), question)
	const contentType = "application/ocsp-response"
	if st.Until.IsZero() {
		w.Header().Set("Cache-Control", "no-store")
		return writeBody(w, r, contentType, st.DER)
	}
	w.Header().Set("Cache-Control", "max-age=60, public, no-transform, must-revalidate")
	w.Header().Set("Last-Modified", st.From.UTC().Format(http.TimeFormat))
	w.Header().Set("Expires", st.Until.UTC().Format(http.TimeFormat))
	return writeTagged(w, r, contentType, st.DER)
}
