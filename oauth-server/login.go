package oauthserver

import (
	"bytes"
	"context"
	"crypto/hmac"
	"embed"
	"encoding/base64"
	"errors"
	"html/template"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
)

//go:embed pages
var pageFiles embed.FS

var pages = template.Must(template.ParseFS(pageFiles, "pages/*.html"))

// loginCookie ties forms to the browser they were made for. It says nothing about who uses it, and authorizes nothing.
const loginCookie = "coaphub_login"

// changeLifetime is how long a person has to choose a new password.
const changeLifetime = 10 * time.Minute

// page is what the templates show.
type page struct {
	Path     string // of the issuer
	Title    string
	Message  string // what went wrong, or what happened
	Client   string // who asks
	Scopes   []string
	Device   hub.DeviceID
	Account  string
	Request  string // the sealed request
	UserCode string
	Ticket   string // the sealed right to change a password
	CSRF     string
	Minimum  int

	target string // where a form of the page may lead
}

// change is the right of an account that gave its one-time password to choose another, once: it names the password it is for.
type passwordChange struct {
	Subject  string    `json:"s"`
	Password string    `json:"p"` // fingerprint of the stored hash
	Request  string    `json:"r,omitempty"`
	UserCode string    `json:"u,omitempty"`
	Expires  time.Time `json:"e"`
}

func browserOf(r *http.Request) string {
	c, err := r.Cookie(loginCookie)
	if err != nil || len(c.Value) > 64 {
		return ""
	}
	return c.Value
}

// show renders a page, with the login cookie and the token that belongs to it in its forms.
func (s *Server) show(w http.ResponseWriter, r *http.Request, status int, name string, p page) {
	browser := browserOf(r)
	if browser == "" {
		browser = newNonce()
		http.SetCookie(w, &http.Cookie{
			Name: loginCookie, Value: browser, Path: s.path() + "/", HttpOnly: true, SameSite: http.SameSiteLaxMode,
			Secure: strings.HasPrefix(s.url(""), "https://"),
		})
	}
	p.Path, p.CSRF, p.Minimum = s.path(), s.csrf(browser), minPassword
	var b bytes.Buffer
	if err := pages.ExecuteTemplate(&b, name, p); err != nil {
		panic(err) // a fault of ours, found by the first test
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy",
		"default-src 'none'; style-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action 'self' "+formTarget(p.target))
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes())
}

func (s *Server) csrf(browser string) string {
	return base64.RawURLEncoding.EncodeToString(mac(s.secrets.csrf, []byte(browser)))
}

// failPage tells a person what went wrong.
func (s *Server) failPage(w http.ResponseWriter, r *http.Request, status int, message string, retry time.Duration) {
	if retry > 0 {
		w.Header().Set("Retry-After", strconv.Itoa(int((retry+time.Second-1)/time.Second)))
	}
	s.show(w, r, status, "message.html", page{Title: "This did not work", Message: message})
}

func style(w http.ResponseWriter, _ *http.Request) {
	css, err := pageFiles.ReadFile("pages/style.css")
	if err != nil {
		panic(err)
	}
	w.Header().Set("Content-Type", "text/css; charset=utf-8")
	w.Header().Set("Cache-Control", "public, max-age=3600")
	_, _ = w.Write(css)
}

func (s *Server) signedOut(w http.ResponseWriter, r *http.Request) {
	s.show(w, r, http.StatusOK, "message.html", page{Title: "Signed out", Message: "You can close this page."})
}

// loginPage asks for name and password, for the application that began the request.
func (s *Server) loginPage(w http.ResponseWriter, r *http.Request) {
	if text := readPage(w, r); text != "" {
		s.failPage(w, r, http.StatusBadRequest, text, 0)
		return
	}
	p, ok := s.requestPage(r.Form.Get("request"))
	if !ok {
		s.failPage(w, r, http.StatusBadRequest, "This sign-in took too long. Go back to the application and begin again.", 0)
		return
	}
	s.show(w, r, http.StatusOK, "login.html", p)
}

func (s *Server) requestPage(id string) (page, bool) {
	req, err := s.openRequest(id)
	if err != nil || req.SignedIn || s.clients[req.Client] == nil {
		return page{}, false
	}
	return page{
		Title: "Sign in", Client: s.clients[req.Client].name, Scopes: req.Scopes, Device: req.Device, Request: id, target: req.RedirectURI,
	}, true
}

// devicePage is where a person gives a program without a browser what it asks for (RFC 8628, Section 3.3).
func (s *Server) devicePage(w http.ResponseWriter, r *http.Request) {
	if text := readPage(w, r); text != "" {
		s.failPage(w, r, http.StatusBadRequest, text, 0)
		return
	}
	s.show(w, r, http.StatusOK, "login.html", page{Title: "Connect a program", Client: "a program that shows this code", UserCode: r.Form.Get("user_code")})
}

// readPost reads a form of our own pages. It answers what does not come from one.
func (s *Server) readPost(w http.ResponseWriter, r *http.Request) bool {
	if r.URL.RawQuery != "" {
		s.failPage(w, r, http.StatusBadRequest, "The request is malformed.", 0)
		return false
	}
	if text := readPage(w, r); text != "" {
		s.failPage(w, r, http.StatusBadRequest, text, 0)
		return false
	}
	browser := browserOf(r)
	if browser == "" || !hmac.Equal([]byte(s.csrf(browser)), []byte(r.PostForm.Get("csrf"))) {
		s.failPage(w, r, http.StatusForbidden, "This form is not one of this browser. Allow cookies, go back and try again.", 0)
		return false
	}
	return true
}

// login checks name and password, for an authorize request or a device grant.
func (s *Server) login(w http.ResponseWriter, r *http.Request) {
	if !s.readPost(w, r) {
		return
	}
	isDevice := r.URL.Path == s.path()+"/device"
	p := page{Title: "Connect a program", Client: "a program that shows this code", UserCode: r.PostForm.Get("user_code")}
	if !isDevice {
		var ok bool
		if p, ok = s.requestPage(r.PostForm.Get("request")); !ok {
			s.failPage(w, r, http.StatusBadRequest, "This sign-in took too long. Go back to the application and begin again.", 0)
			return
		}
	}
	p.Account = r.PostForm.Get("username")
	again := func(status int, message string) {
		p.Message = message
		s.show(w, r, status, "login.html", p)
	}
	a, err := s.signIn(r.Context(), source(r), p.Account, r.PostForm.Get("password"))
	switch {
	case hub.IsKind(err, hub.Unauthenticated):
		again(http.StatusForbidden, "Name or password is wrong.")
		return
	case hub.IsKind(err, hub.Exhausted):
		w.Header().Set("Retry-After", "30")
		again(http.StatusTooManyRequests, "There were too many tries. Wait half a minute.")
		return
	case err != nil:
		s.log.WarnContext(r.Context(), "sign-in failed", "error", err)
		w.Header().Set("Retry-After", "5")
		again(http.StatusServiceUnavailable, "The hub cannot do this now. Try again in a moment.")
		return
	}
	if isDevice {
		if _, _, _, err := s.pendingGrant(r.Context(), p.UserCode); hub.IsKind(err, hub.NotFound) {
			again(http.StatusForbidden, "This code is unknown or expired.")
			return
		}
	}
	if a.MustChange {
		ticket, err := seal(s.secrets.ticket, "password", passwordChange{
			Subject: a.Name, Password: fingerprint(a.Password), Request: p.Request, UserCode: p.UserCode, Expires: time.Now().Add(changeLifetime).UTC(),
		})
		if err != nil {
			panic(err)
		}
		s.show(w, r, http.StatusOK, "password.html", page{Title: "Choose a password", Account: a.Name, Ticket: ticket, target: p.target})
		return
	}
	s.finish(w, r, a.Name, p.Request, p.UserCode)
}

// signIn checks a password. Unauthenticated if name or password is wrong, Exhausted when there were too many tries for this
// account or from this source, wherever the right one was.
func (s *Server) signIn(ctx context.Context, from, name, password string) (account, error) {
	const op = "sign in"
	wrong := &hub.Error{Kind: hub.Unauthenticated, Op: op, Code: "login-refused", Text: "name or password is wrong"}
	name, err := accountName(name)
	if err != nil || password == "" {
		name = "" // counted and timed like a wrong one
	}
	// The source first: one that is over its limit must not use up the account's.
	for _, l := range []struct {
		limit, key string
		*limits
	}{{"login_source", from, s.limits.sources}, {"login_account", name, s.limits.accounts}} {
		if wait, ok := l.allow(l.key); !ok {
			s.metrics.limited.WithLabelValues(l.limit).Inc()
			s.metrics.logins.WithLabelValues("limited").Inc()
			return account{}, &hub.Error{Kind: hub.Exhausted, Op: op, RetryAfter: wait}
		}
	}
	var a account
	if name != "" {
		if a, err = s.account(ctx, name); err != nil && !hub.IsKind(err, hub.NotFound) {
			return account{}, err
		}
	}
	ok, err := s.hasher.check(ctx, a.Password, password)
	if err != nil {
		s.metrics.logins.WithLabelValues("failed").Inc()
		return account{}, err
	}
	if !ok {
		s.metrics.logins.WithLabelValues("refused").Inc()
		s.log.WarnContext(ctx, "sign-in refused", "owner", name, "source", from)
		return account{}, wrong
	}
	s.limits.accounts.refund(name)
	s.limits.sources.refund(from)
	s.metrics.logins.WithLabelValues("ok").Inc()
	s.log.InfoContext(ctx, "signed in", "owner", name, "source", from)
	return a, nil
}

// password sets the password that replaces a one-time one, and goes on with what the sign-in was for.
func (s *Server) password(w http.ResponseWriter, r *http.Request) {
	if !s.readPost(w, r) {
		return
	}
	var c passwordChange
	text := r.PostForm.Get("ticket")
	if err := open(s.secrets.ticket, "password", text, &c); err != nil || !time.Now().Before(c.Expires) {
		s.failPage(w, r, http.StatusBadRequest, "This took too long. Go back to the application and begin again.", 0)
		return
	}
	p := page{Title: "Choose a password", Account: c.Subject, Ticket: text}
	if req, err := s.openRequest(c.Request); err == nil {
		p.target = req.RedirectURI
	}
	again := func(status int, message string) {
		p.Message = message
		s.show(w, r, status, "password.html", p)
	}
	fail := func(err error) {
		s.log.WarnContext(r.Context(), "password not changed", "owner", c.Subject, "error", err)
		w.Header().Set("Retry-After", "5")
		again(http.StatusServiceUnavailable, "The hub cannot do this now. Try again in a moment.")
	}
	password := r.PostForm.Get("password")
	if err := checkNew(password); err != nil {
		_, text := hub.Public(err)
		again(http.StatusBadRequest, strings.ToUpper(text[:1])+text[1:]+".")
		return
	}
	if password != r.PostForm.Get("repeat") {
		again(http.StatusBadRequest, "The two passwords differ.")
		return
	}
	a, err := s.account(r.Context(), c.Subject)
	if err != nil {
		fail(err)
		return
	}
	changed := func() {
		s.failPage(w, r, http.StatusBadRequest, "The password was changed meanwhile. Go back to the application and sign in.", 0)
	}
	if fingerprint(a.Password) != c.Password {
		changed()
		return
	}
	same, err := s.hasher.check(r.Context(), a.Password, password)
	if err != nil {
		fail(err)
		return
	}
	if same {
		again(http.StatusBadRequest, "This is the old password. Choose another.")
		return
	}
	// The form may have been sent twice at the same time, here or to another process: one of them is taken.
	switch err := s.setPassword(r.Context(), c.Subject, password, false, c.Password); {
	case errors.Is(err, errChanged):
		changed()
		return
	case err != nil:
		fail(err)
		return
	}
	s.log.InfoContext(r.Context(), "password changed", "owner", c.Subject, "source", source(r))
	s.finish(w, r, c.Subject, c.Request, c.UserCode)
}

// finish goes on with what the sign-in was for.
func (s *Server) finish(w http.ResponseWriter, r *http.Request, subject, id, typed string) {
	err := s.changeAccount(r.Context(), subject, func(a *account) error { a.LastLogin = time.Now().UTC(); return nil })
	if err != nil {
		s.log.WarnContext(r.Context(), "time of the sign-in not kept", "owner", subject, "error", err)
	}
	if id == "" {
		s.finishDevice(w, r, subject, typed)
		return
	}
	req, err := s.openRequest(id)
	if err != nil {
		s.failPage(w, r, http.StatusBadRequest, "This sign-in took too long. Go back to the application and begin again.", 0)
		return
	}
	done := *req
	done.SignedIn, done.Subject, done.AuthTime = true, subject, time.Now().UTC()
	done.Browser, done.Expires = fingerprint(browserOf(r)), time.Now().Add(doneLifetime).UTC()
	sealed, err := s.newRequest(done)
	if err != nil {
		panic(err)
	}
	http.Redirect(w, r, s.path()+"/authorize/callback?id="+url.QueryEscape(sealed.id), http.StatusSeeOther)
}

func (s *Server) finishDevice(w http.ResponseWriter, r *http.Request, subject, typed string) {
	switch err := s.approve(r.Context(), typed, subject); {
	case hub.IsKind(err, hub.NotFound), hub.IsKind(err, hub.Conflict):
		s.failPage(w, r, http.StatusForbidden, "This code is unknown or expired.", 0)
	case err != nil:
		s.log.WarnContext(r.Context(), "device grant not approved", "error", err)
		s.failPage(w, r, http.StatusServiceUnavailable, "The hub cannot do this now. Try again in a moment.", 5*time.Second)
	default:
		s.show(w, r, http.StatusOK, "message.html", page{Title: "Connected", Message: "The program may go on. You can close this page."})
	}
}
