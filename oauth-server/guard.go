package oauthserver

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"mime"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/zitadel/oidc/v3/pkg/oidc"

	"github.com/coaphub/coaphub/hub"
)

// Bounds of what is read from anybody.
const (
	maxForm       = 64 << 10 // bytes of a body
	maxQuery      = 16 << 10 // bytes of a query; a sealed request is about 1 KiB
	maxParameters = 64
)

// refusal is an OAuth error answer (RFC 6749, Section 5.2).
type refusal struct {
	status int
	code   string
	text   string
	basic  bool          // ask for Basic credentials
	retry  time.Duration // zero: none
}

func (f *refusal) write(w http.ResponseWriter) {
	if f.basic {
		w.Header().Set("WWW-Authenticate", `Basic realm="coaphub", charset="UTF-8"`)
	}
	if f.retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((f.retry+time.Second-1)/time.Second)))
	}
	if f.status == http.StatusMethodNotAllowed {
		w.Header().Set("Allow", http.MethodPost)
	}
	writeJSON(w, f.status, map[string]string{"error": f.code, "error_description": f.text})
}

func writeJSON(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(v) // the connection is gone: nobody to tell
}

func invalidRequest(text string) *refusal {
	return &refusal{status: http.StatusBadRequest, code: "invalid_request", text: text}
}

func invalidClient(text string) *refusal {
	return &refusal{status: http.StatusUnauthorized, code: "invalid_client", text: text, basic: true}
}

func unavailable() *refusal {
	return &refusal{
		status: http.StatusServiceUnavailable, code: "temporarily_unavailable", text: hub.Unavailable.Sentence(), retry: 5 * time.Second,
	}
}

// credentials are what a request to the token endpoint and its likes authenticates with.
type credentials struct {
	id, secret string
	given      bool // a secret was given, maybe an empty one
}

// readForm reads and checks a form that carries secrets, before the library sees it: it takes them from the query too, and
// panics on escapes in Basic that are none.
func readForm(w http.ResponseWriter, r *http.Request) (credentials, *refusal) {
	var c credentials
	if r.Method != http.MethodPost {
		return c, &refusal{status: http.StatusMethodNotAllowed, code: "invalid_request", text: "use POST"}
	}
	// RFC 6749, Section 3.2 and 2.3.1: POST, and no credentials in the URI, which ends in logs.
	if r.URL.RawQuery != "" || r.URL.ForceQuery {
		return c, invalidRequest("parameters belong in the body")
	}
	if mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type")); err != nil || mediaType != "application/x-www-form-urlencoded" {
		return c, &refusal{status: http.StatusUnsupportedMediaType, code: "invalid_request", text: "the body must be application/x-www-form-urlencoded"}
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		var tooLarge *http.MaxBytesError
		if errors.As(err, &tooLarge) {
			return c, &refusal{status: http.StatusRequestEntityTooLarge, code: "invalid_request", text: "the body is too large"}
		}
		return c, invalidRequest("the body is not a form")
	}
	if f := checkParameters(r.PostForm); f != nil {
		return c, f
	}
	if r.PostForm.Has("client_assertion") || r.PostForm.Has("client_assertion_type") {
		return c, invalidClient("client assertions are not supported")
	}
	c.id, c.secret, c.given = r.PostForm.Get("client_id"), r.PostForm.Get("client_secret"), r.PostForm.Has("client_secret")
	headers := r.Header.Values("Authorization")
	if len(headers) == 0 {
		return c, nil
	}
	id, secret, ok := parseBasic(headers[0])
	switch {
	case len(headers) > 1 || !ok:
		return c, invalidClient("the Authorization header is not well-formed Basic")
	case c.given: // RFC 6749, Section 2.3: not more than one method a request
		return c, invalidRequest("credentials are in the header and in the body")
	case c.id != "" && c.id != id:
		return c, invalidRequest("header and body name different clients")
	}
	return credentials{id: id, secret: secret, given: true}, nil
}

// checkParameters: RFC 6749, Section 3.1 and 3.2, a parameter must not be there more than once.
func checkParameters(form url.Values) *refusal {
	if len(form) > maxParameters {
		return invalidRequest("there are too many parameters")
	}
	for name, values := range form {
		if len(values) > 1 {
			return invalidRequest("a parameter is there more than once")
		}
		if !utf8.ValidString(name) || !utf8.ValidString(values[0]) || strings.ContainsRune(values[0], 0) {
			return invalidRequest("a parameter is not text")
		}
	}
	return nil
}

// parseBasic reads credentials the way of RFC 6749, Section 2.3.1: both parts are form-encoded before Basic.
func parseBasic(header string) (id, secret string, ok bool) {
	scheme, encoded, found := strings.Cut(header, " ")
	if !found || !strings.EqualFold(scheme, "Basic") {
		return "", "", false
	}
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(encoded))
	if err != nil {
		return "", "", false
	}
	user, password, found := strings.Cut(string(raw), ":")
	if !found {
		return "", "", false
	}
	id, err1 := url.QueryUnescape(user)
	secret, err2 := url.QueryUnescape(password)
	if err1 != nil || err2 != nil || id == "" || !utf8.ValidString(id) || !utf8.ValidString(secret) {
		return "", "", false
	}
	return id, secret, true
}

// grantTypes are the ones served. The library has more, that nobody asked for.
var grantTypes = []string{
	string(oidc.GrantTypeCode), string(oidc.GrantTypeRefreshToken), string(oidc.GrantTypeClientCredentials), string(oidc.GrantTypeDeviceCode),
}

// token guards the library's token endpoint.
func (s *Server) token(w http.ResponseWriter, r *http.Request) {
	kind := "other"
	outcome := func(err error) { s.metrics.issued(kind, err) }
	refused := errors.New("refused")
	limited := s.limited(r, "token", s.limits.tokens)
	if limited != nil {
		limited.write(w)
		outcome(refused)
		return
	}
	c, f := readForm(w, r)
	if f == nil {
		if grant := r.PostForm.Get("grant_type"); slices.Contains(grantTypes, grant) {
			kind = grant[strings.LastIndexByte(grant, ':')+1:]
		} else if grant == "" {
			f = invalidRequest("grant_type is missing")
		} else {
			f = &refusal{status: http.StatusBadRequest, code: "unsupported_grant_type", text: "this grant type is not supported"}
		}
	}
	if f == nil {
		f = s.checkClient(c)
	}
	if f != nil {
		f.write(w)
		outcome(refused)
		return
	}
	rec, calling := s.library(r, "/oauth/token")
	switch {
	case calling.trouble != nil:
		s.log.WarnContext(r.Context(), "token request failed", "grant", kind, "error", calling.trouble)
		unavailable().write(w)
		outcome(calling.trouble)
	case rec.status >= 400:
		rec.copyTo(w)
		outcome(refused)
	default:
		rec.copyTo(w)
		outcome(nil)
	}
}

// checkClient wants a known client, and the secret of one that has it (RFC 6749, Section 3.2.1). A secret that a public
// client sends is none it was given: it must not get through as if it had been checked.
func (s *Server) checkClient(c credentials) *refusal {
	known := s.clients[c.id]
	switch {
	case c.id == "":
		return invalidClient("the client is not named")
	case known == nil, known.owner != "" && !known.is(c.secret), known.owner == "" && c.given && c.secret != "":
		return invalidClient("unknown client or wrong secret")
	}
	return nil
}

// limited counts the request for its source.
func (s *Server) limited(r *http.Request, name string, l *limits) *refusal {
	wait, ok := l.allow(source(r))
	if ok {
		return nil
	}
	s.metrics.limited.WithLabelValues(name).Inc()
	return &refusal{status: http.StatusTooManyRequests, code: "slow_down", text: "too many requests", retry: max(wait, time.Second)}
}

// library lets the provider library answer a request into a buffer, under the path it knows.
func (s *Server) library(r *http.Request, path string) (*recorder, *call) {
	c := &call{browser: browserOf(r)}
	if r.Form != nil {
		c.device = r.Form.Get("device_id")
	}
	r2 := r.Clone(context.WithValue(r.Context(), callKey{}, c))
	r2.URL.Path, r2.URL.RawPath = path, ""
	rec := &recorder{header: http.Header{}}
	s.provider.ServeHTTP(rec, r2)
	if rec.status == 0 {
		rec.status = http.StatusOK
	}
	return rec, c
}

// recorder is a ResponseWriter into memory. The library's answers are a few KiB.
type recorder struct {
	header http.Header
	status int
	body   bytes.Buffer
}

func (r *recorder) Header() http.Header { return r.header }

func (r *recorder) Write(b []byte) (int, error) { return r.body.Write(b) }

func (r *recorder) WriteHeader(status int) {
	if r.status == 0 { // the library writes a second answer after some errors: the first counts
		r.status = status
	}
}

func (r *recorder) copyTo(w http.ResponseWriter) {
	for _, name := range []string{"Content-Type", "Location", "WWW-Authenticate"} {
		if v := r.header.Get(name); v != "" {
			w.Header().Set(name, v)
		}
	}
	w.WriteHeader(r.status)
	_, _ = w.Write(r.body.Bytes())
}

// authorize guards the library's authorize endpoint.
func (s *Server) authorize(w http.ResponseWriter, r *http.Request) {
	if f := s.limited(r, "authorize", s.limits.pages); f != nil {
		s.failPage(w, r, f.status, "Too many requests. Try again in a moment.", f.retry)
		return
	}
	if text := readPage(w, r); text != "" {
		s.failPage(w, r, http.StatusBadRequest, text, 0)
		return
	}
	// The library compares the unescaped redirect URI and redirects to the one as it came: let only those through where both
	// are the same.
	if uri := r.Form.Get("redirect_uri"); strings.ContainsAny(uri, "%+\r\n\\") {
		s.failPage(w, r, http.StatusBadRequest, "The application's redirect URI is not registered.", 0)
		return
	}
	rec, c := s.library(r, "/authorize")
	s.answerPage(w, r, rec, c)
}

// callback guards the library's way back from the login page.
func (s *Server) callback(w http.ResponseWriter, r *http.Request) {
	// Each call of a browser that signed in makes a code, and each code is a document.
	if f := s.limited(r, "authorize", s.limits.pages); f != nil {
		s.failPage(w, r, f.status, "Too many requests. Try again in a moment.", f.retry)
		return
	}
	if text := readPage(w, r); text != "" {
		s.failPage(w, r, http.StatusBadRequest, text, 0)
		return
	}
	rec, c := s.library(r, "/authorize/callback")
	s.answerPage(w, r, rec, c)
}

// endSession guards the library's sign-out.
func (s *Server) endSession(w http.ResponseWriter, r *http.Request) {
	if text := readPage(w, r); text != "" {
		s.failPage(w, r, http.StatusBadRequest, text, 0)
		return
	}
	rec, c := s.library(r, "/end_session")
	s.answerPage(w, r, rec, c)
}

// answerPage passes redirects on; everything else a person sees as a page.
func (s *Server) answerPage(w http.ResponseWriter, r *http.Request, rec *recorder, c *call) {
	switch {
	case c.trouble != nil:
		s.log.WarnContext(r.Context(), "sign-in failed", "error", c.trouble)
		s.failPage(w, r, http.StatusServiceUnavailable, "The hub cannot do this now. Try again in a moment.", 5*time.Second)
	case rec.status >= 300 && rec.status < 400:
		rec.copyTo(w)
	default:
		s.log.InfoContext(r.Context(), "sign-in refused", "reason", strings.TrimSpace(rec.body.String()))
		s.failPage(w, r, http.StatusBadRequest, "The application's request is not one that this hub accepts.", 0)
	}
}

// readPage reads the parameters of a page's GET or POST.
func readPage(w http.ResponseWriter, r *http.Request) string {
	if len(r.URL.RawQuery) > maxQuery {
		return "The address is too long."
	}
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		return "The request is malformed."
	}
	if f := checkParameters(r.Form); f != nil {
		return "The request is malformed."
	}
	return ""
}

// recovered ends one request, not the process, when something panics.
func (s *Server) recovered(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			v := recover()
			if v == nil {
				return
			}
			if err, ok := v.(error); ok && errors.Is(err, http.ErrAbortHandler) {
				panic(v)
			}
			s.metrics.panics.Inc()
			s.log.ErrorContext(r.Context(), "panic in a request", "path", r.URL.Path, "panic", v, "stack", string(debug.Stack()))
			writeJSON(w, http.StatusInternalServerError, map[string]string{"error": "server_error", "error_description": hub.Internal.Sentence()})
		}()
		next.ServeHTTP(w, r)
	})
}
