package oauthserver

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/coaphub/coaphub/hub"
)

// newProvider makes the library's provider. Only its authorize, token, device_authorization and end_session endpoints are
// served, each behind a guard.
func (s *Server) newProvider() (*op.Provider, error) {
	options := []op.Option{
		op.WithLogger(s.log), op.WithCORSOptions(nil), op.WithCrypto(randomCodes{}),
		op.WithAccessTokenVerifierOpts(op.WithSupportedAccessTokenSigningAlgorithms(string(jose.ES256))),
		op.WithIDTokenHintVerifierOpts(op.WithSupportedIDTokenHintSigningAlgorithms(string(jose.ES256))),
	}
	if strings.HasPrefix(s.issuer, "http://") {
		options = append(options, op.WithAllowInsecure())
	}
	return op.NewProvider(&op.Config{
		CodeMethodS256: true, AuthMethodPost: true, GrantTypeRefreshToken: true, DefaultLogoutRedirectURI: s.path() + "/signed-out",
		DeviceAuthorization: op.DeviceAuthorizationConfig{
			Lifetime: deviceGrantLifetime, PollInterval: pollInterval, UserFormURL: s.url("/device"), UserCode: op.UserCodeBase20,
		},
	}, storage{s}, op.StaticIssuer(s.issuer), options...)
}

// randomCodes is the library's Crypto, with which it makes codes out of request IDs. Ours say nothing, and there are no opaque
// access tokens to read.
type randomCodes struct{}

func (randomCodes) Encrypt(string) (string, error) { return newCode(), nil }

func (randomCodes) Decrypt(string) (string, error) {
	return "", errors.New("there are no opaque tokens")
}

// url is the address of an endpoint: where the hub is now, at the issuer's path.
func (s *Server) url(endpoint string) string {
	if s.cfg.BaseURL == "" {
		return s.issuer + endpoint
	}
	return strings.TrimSuffix(s.cfg.BaseURL, "/") + s.path() + endpoint
}

// discovery is the metadata of OpenID Connect Discovery 1.0, Section 3, and RFC 8414. The library's own promises what is not
// there.
func (s *Server) discovery(w http.ResponseWriter, _ *http.Request) {
	scopes := slices.Concat(protocolScopes, []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin, hub.ScopeDevice, hub.ScopeDeviceSignUp})
	methods := []string{"client_secret_basic", "client_secret_post", "none"}
	writeJSON(w, http.StatusOK, map[string]any{
		"issuer":                                        s.issuer,
		"authorization_endpoint":                        s.url("/authorize"),
		"token_endpoint":                                s.url("/token"),
		"jwks_uri":                                      s.url("/keys"),
		"userinfo_endpoint":                             s.url("/userinfo"),
		"revocation_endpoint":                           s.url("/revoke"),
		"introspection_endpoint":                        s.url("/introspect"),
		"end_session_endpoint":                          s.url("/end_session"),
		"device_authorization_endpoint":                 s.url("/device_authorization"),
		"scopes_supported":                              scopes,
		"response_types_supported":                      []string{"code"},
		"response_modes_supported":                      []string{"query"},
		"grant_types_supported":                         grantTypes,
		"subject_types_supported":                       []string{"public"},
		"id_token_signing_alg_values_supported":         []string{string(jose.ES256)},
		"code_challenge_methods_supported":              []string{"S256"},
		"token_endpoint_auth_methods_supported":         methods,
		"revocation_endpoint_auth_methods_supported":    methods,
		"introspection_endpoint_auth_methods_supported": methods[:2],
		"claims_supported":                              []string{"sub", "iss", "aud", "exp", "iat", "auth_time", "nonce", "amr", "preferred_username"},
		"request_parameter_supported":                   false,
		"request_uri_parameter_supported":               false,
	})
}

// publicKeys is the key set (RFC 7517).
func (s *Server) publicKeys(w http.ResponseWriter, r *http.Request) {
	set, err := s.Keys(r.Context())
	if err != nil {
		s.log.WarnContext(r.Context(), "key set not served", "error", err)
		unavailable().write(w)
		return
	}
	// Shorter than publishedAhead by far: a new key is known everywhere before it signs.
	w.Header().Set("Cache-Control", "public, max-age=300")
	writeJSON(w, http.StatusOK, set)
}

// deviceAuthorization guards the library's (RFC 8628, Section 3.1). Each call writes a document, so both one source and all
// together are limited.
func (s *Server) deviceAuthorization(w http.ResponseWriter, r *http.Request) {
	f := s.limited(r, "device_authorization", s.limits.deviceCodes)
	if f == nil {
		if wait, ok := s.limits.allDeviceCodes.allow(""); !ok {
			s.metrics.limited.WithLabelValues("device_authorization_all").Inc()
			f = &refusal{status: http.StatusTooManyRequests, code: "slow_down", text: "too many requests", retry: max(wait, time.Second)}
		}
	}
	var c credentials
	if f == nil {
		c, f = readForm(w, r)
	}
	if f == nil {
		f = s.checkClient(c)
	}
	if f != nil {
		f.write(w)
		return
	}
	rec, calling := s.library(r, "/device_authorization")
	switch {
	case calling.trouble != nil:
		unavailable().write(w)
	case rec.status >= 500: // the library makes 500 of its storage's refusals
		(&refusal{status: http.StatusBadRequest, code: "invalid_scope", text: "no scope that was asked for is allowed"}).write(w)
	default:
		rec.copyTo(w)
	}
}

// verify checks one of our own access tokens and that its grant stands. An ID token is none: it has no token_use.
func (s *Server) verify(ctx context.Context, token string) (accessClaims, bool, error) {
	var c accessClaims
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		return c, false, nil
	}
	set, err := s.Keys(ctx)
	if err != nil {
		return c, false, err
	}
	if err := parsed.Claims(set, &c); err != nil {
		return c, false, nil
	}
	if err := c.ValidateWithLeeway(jwt.Expected{Issuer: s.issuer, Time: time.Now()}, 0); err != nil || c.TokenUse != "access" || c.Expiry == nil {
		return c, false, nil
	}
	ok, err := s.Active(ctx, c.ID)
	return c, ok, err
}

type accessClaims struct {
	jwt.Claims
	Scope    string `json:"scope"`
	TokenUse string `json:"token_use"`
	Client   string `json:"client_id"`
}

// userinfo is OpenID Connect Core 1.0, Section 5.3.
func (s *Server) userinfo(w http.ResponseWriter, r *http.Request) {
	challenge := func(status int, code string) {
		w.Header().Set("WWW-Authenticate", `Bearer realm="coaphub", error="`+code+`"`)
		writeJSON(w, status, map[string]string{"error": code})
	}
	scheme, token, _ := strings.Cut(r.Header.Get("Authorization"), " ")
	// RFC 6750, Section 2.3 allows a token in the query; it would end in logs.
	if !strings.EqualFold(scheme, "Bearer") || r.URL.Query().Has("access_token") {
		challenge(http.StatusUnauthorized, "invalid_request")
		return
	}
	c, ok, err := s.verify(r.Context(), token)
	scopes := strings.Fields(c.Scope)
	switch {
	case err != nil:
		unavailable().write(w)
	case !ok:
		challenge(http.StatusUnauthorized, "invalid_token")
	case !slices.Contains(scopes, oidc.ScopeOpenID):
		challenge(http.StatusForbidden, "insufficient_scope")
	default:
		info := map[string]string{"sub": c.Subject}
		if slices.Contains(scopes, oidc.ScopeProfile) {
			info["preferred_username"] = c.Subject
		}
		writeJSON(w, http.StatusOK, info)
	}
}

// revoke is RFC 7009: unknown tokens and those of other clients are answered like revoked ones (Section 2.2), but stay.
func (s *Server) revoke(w http.ResponseWriter, r *http.Request) {
	if f := s.limited(r, "token", s.limits.tokens); f != nil {
		f.write(w)
		return
	}
	c, f := readForm(w, r)
	if f == nil {
		f = s.checkClient(c)
	}
	if f == nil && r.PostForm.Get("token") == "" {
		f = invalidRequest("token is missing")
	}
	if f != nil {
		f.write(w)
		return
	}
	token := r.PostForm.Get("token")
	var err error
	if id, _, ok := parseRefreshToken(token); ok {
		mark := fingerprint(token)
		err = s.revokeGrant(r.Context(), id, func(g grant) bool {
			return g.Client == c.id && (mark == g.Current || mark == g.Previous)
		})
	} else {
		var claims accessClaims
		if claims, ok, err = s.verify(r.Context(), token); err == nil && ok {
			err = s.revokeGrant(r.Context(), GrantOf(claims.ID), func(g grant) bool { return g.Client == c.id })
		}
	}
	if err != nil {
		s.log.WarnContext(r.Context(), "token not revoked", "error", err)
		unavailable().write(w)
		return
	}
	w.WriteHeader(http.StatusOK)
}

// introspect is RFC 7662, for clients with a secret.
func (s *Server) introspect(w http.ResponseWriter, r *http.Request) {
	if f := s.limited(r, "token", s.limits.tokens); f != nil {
		f.write(w)
		return
	}
	c, f := readForm(w, r)
	if f == nil {
		f = s.checkClient(c)
	}
	if f == nil && s.clients[c.id].owner == "" {
		f = invalidClient("introspection needs a client with a secret")
	}
	if f != nil {
		f.write(w)
		return
	}
	claims, ok, err := s.verify(r.Context(), r.PostForm.Get("token"))
	switch {
	case err != nil:
		s.log.WarnContext(r.Context(), "token not introspected", "error", err)
		unavailable().write(w)
	case !ok:
		writeJSON(w, http.StatusOK, map[string]bool{"active": false}) // and nothing more (Section 2.2)
	default:
		writeJSON(w, http.StatusOK, map[string]any{
			"active": true, "scope": claims.Scope, "client_id": claims.Client, "sub": claims.Subject, "username": claims.Subject,
			"aud": claims.Audience, "iss": claims.Issuer, "jti": claims.ID, "exp": claims.Expiry, "iat": claims.IssuedAt, "token_type": "Bearer",
		})
	}
}

// Handler serves everything below the issuer's path; mount it there, with the whole path.
func (s *Server) Handler() http.Handler {
	mux, p := http.NewServeMux(), s.path()
	mux.HandleFunc("GET "+p+"/.well-known/openid-configuration", s.discovery)
	mux.HandleFunc("GET "+p+"/keys", s.publicKeys)
	mux.HandleFunc("GET "+p+"/style.css", style)
	mux.HandleFunc("GET "+p+"/authorize", s.authorize)
	mux.HandleFunc("POST "+p+"/authorize", s.authorize) // OpenID Connect Core 1.0, Section 3.1.2.1: both
	mux.HandleFunc("GET "+p+"/authorize/callback", s.callback)
	mux.HandleFunc("GET "+p+"/end_session", s.endSession)
	mux.HandleFunc("POST "+p+"/end_session", s.endSession)
	mux.HandleFunc("GET "+p+"/userinfo", s.userinfo)
	mux.HandleFunc("POST "+p+"/userinfo", s.userinfo)
	mux.HandleFunc(p+"/token", s.token)
	mux.HandleFunc(p+"/device_authorization", s.deviceAuthorization)
	mux.HandleFunc(p+"/revoke", s.revoke)
	mux.HandleFunc(p+"/introspect", s.introspect)
	mux.HandleFunc("GET "+p+"/signed-out", s.signedOut)
	// Forms that a person fills in: only from our own pages.
	forms := http.NewCrossOriginProtection()
	mux.HandleFunc("GET "+p+"/login", s.loginPage)
	mux.Handle("POST "+p+"/login", forms.Handler(http.HandlerFunc(s.login)))
	mux.HandleFunc("GET "+p+"/device", s.devicePage)
	mux.Handle("POST "+p+"/device", forms.Handler(http.HandlerFunc(s.login)))
	mux.Handle("POST "+p+"/password", forms.Handler(http.HandlerFunc(s.password)))
	return s.recovered(headers(mux))
}

// headers are the ones that every answer has.
func headers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("X-Frame-Options", "DENY")
		// Not no-referrer: that makes a browser hide the origin of our own forms.
		h.Set("Referrer-Policy", "same-origin")
		h.Set("Content-Security-Policy", "default-src 'none'; frame-ancestors 'none'")
		h.Set("Cache-Control", "no-store") // RFC 6749, Section 5.1
		h.Set("Pragma", "no-cache")
		next.ServeHTTP(w, r)
	})
}

// formTarget is the source expression of where a redirect after a form may go, for Content-Security-Policy.
func formTarget(redirect string) string {
	u, err := url.Parse(redirect)
	switch {
	case err != nil || u.Scheme == "":
		return ""
	case strings.Contains(u.Host, "["): // Content Security Policy has no words for IPv6 addresses
		return u.Scheme + ":"
	case u.Scheme == "http" || u.Scheme == "https":
		return u.Scheme + "://" + u.Host
	}
	return u.Scheme + ":"
}

// newNonce is the value of the login cookie.
func newNonce() string {
	b := make([]byte, 18)
	_, _ = rand.Read(b) // never fails
	return base64.RawURLEncoding.EncodeToString(b)
}
