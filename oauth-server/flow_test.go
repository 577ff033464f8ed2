package oauthserver

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"html"
	"io"
	"net/http"
	"net/http/cookiejar"
	"net/http/httptest"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

const (
	password = "correct horse battery"
	verifier = "a-verifier-of-more-than-forty-three-characters"
)

// site is a server over HTTP, with one account per role: admin, user and viewer, all with the same password.
type site struct {
	*Server
	url  string // of the issuer
	docs *storetest.Memory
	t    *testing.T
}

func newSite(t *testing.T, configure func(*Config), own Ownership) *site {
	t.Helper()
	docs, web := storetest.NewMemory(), httptest.NewUnstartedServer(nil)
	cfg := Default()
	cfg.BaseURL = "http://" + web.Listener.Addr().String()
	cfg.Clients.Device.RedirectURIs = []string{"myapp://onboard"}
	cfg.Machines = []MachineConfig{{ID: "robot", Secret: "a secret with a % sign", Owner: "user", Scopes: []string{hub.ScopeRead, hub.ScopeAdmin}}}
	if configure != nil {
		configure(&cfg)
	}
	s, err := openWith(t.Context(), cfg, docs, own, quiet(), prometheus.NewRegistry(), cheap)
	if err != nil {
		t.Fatal(err)
	}
	web.Config.Handler = s.Handler()
	web.Start()
	t.Cleanup(func() {
		web.Close()
		if n := testutil.ToFloat64(s.metrics.panics); n != 0 {
			t.Errorf("%v panics", n)
		}
	})
	for _, role := range []string{RoleUser, RoleViewer} {
		must[string](t)(s.AddUser(t.Context(), role, password, []string{role}))
	}
	must[string](t)(s.SetPassword(t.Context(), "admin", password))
	return &site{Server: s, url: s.Issuer(), docs: docs, t: t}
}

// browser keeps cookies and does not follow redirects.
func (w *site) browser() *http.Client {
	jar, err := cookiejar.New(nil)
	if err != nil {
		w.t.Fatal(err)
	}
	tr := &http.Transport{}
	w.t.Cleanup(tr.CloseIdleConnections)
	return &http.Client{Jar: jar, Transport: tr, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

type reply struct {
	*http.Response
	body string
}

func (r reply) json(t *testing.T) map[string]any {
	t.Helper()
	out := map[string]any{}
	if err := json.Unmarshal([]byte(r.body), &out); err != nil {
		t.Fatalf("%d %q: %v", r.StatusCode, r.body, err)
	}
	return out
}

func (w *site) do(c *http.Client, method, path string, form url.Values, headers ...string) reply {
	w.t.Helper()
	if !strings.HasPrefix(path, "http") {
		path = w.url + path
	}
	req, err := http.NewRequestWithContext(w.t.Context(), method, path, strings.NewReader(form.Encode()))
	if err != nil {
		w.t.Fatal(err)
	}
	if form != nil {
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	}
	for i := 0; i+1 < len(headers); i += 2 {
		if headers[i+1] != "" {
			req.Header.Set(headers[i], headers[i+1])
		}
	}
	resp, err := c.Do(req)
	if err != nil {
		w.t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		w.t.Fatal(err)
	}
	return reply{resp, string(body)}
}

var field = regexp.MustCompile(`<input[^>]* name="([^"]+)"(?:[^>]* value="([^"]*)")?`)

// fill fills in the form of a page.
func (r reply) fill(values ...string) url.Values {
	form := url.Values{}
	for _, m := range field.FindAllStringSubmatch(r.body, -1) {
		form.Set(m[1], html.UnescapeString(m[2]))
	}
	for i := 0; i+1 < len(values); i += 2 {
		form.Set(values[i], values[i+1])
	}
	return form
}

func challenge(verifier string) string {
	h := sha256.Sum256([]byte(verifier))
	return base64.RawURLEncoding.EncodeToString(h[:])
}

func (w *site) redirectURI() string { return strings.TrimSuffix(w.url, "/oauth") + "/callback" }

// authorizeQuery is what the web console asks with.
func (w *site) authorizeQuery(change ...string) url.Values {
	q := url.Values{
		"client_id": {"coaphub-web"}, "response_type": {"code"}, "redirect_uri": {w.redirectURI()}, "state": {"st"}, "nonce": {"no"},
		"scope": {"openid profile offline_access devices:read devices:write admin unknown"}, "code_challenge": {challenge(verifier)},
		"code_challenge_method": {"S256"},
	}
	for i := 0; i+1 < len(change); i += 2 {
		if q.Del(change[i]); change[i+1] != "" {
			q.Set(change[i], change[i+1])
		}
	}
	return q
}

// signIn goes from the authorize request to the redirect with the code.
func (w *site) signIn(c *http.Client, name string, query url.Values) *url.URL {
	w.t.Helper()
	r := w.do(c, "GET", "/authorize?"+query.Encode(), nil)
	if r.StatusCode != http.StatusFound {
		w.t.Fatalf("authorize: %d %s", r.StatusCode, r.body)
	}
	origin := strings.TrimSuffix(w.url, "/oauth")
	r = w.do(c, "GET", origin+r.Header.Get("Location"), nil)
	if r.StatusCode != http.StatusOK {
		w.t.Fatalf("login page: %d %s", r.StatusCode, r.body)
	}
	r = w.do(c, "POST", "/login", r.fill("username", name, "password", password))
	if r.StatusCode != http.StatusSeeOther {
		w.t.Fatalf("login: %d %s", r.StatusCode, r.body)
	}
	r = w.do(c, "GET", origin+r.Header.Get("Location"), nil)
	if r.StatusCode != http.StatusFound {
		w.t.Fatalf("callback: %d %s", r.StatusCode, r.body)
	}
	u, err := url.Parse(r.Header.Get("Location"))
	if err != nil {
		w.t.Fatal(err)
	}
	return u
}

func (w *site) codeForm(code string, change ...string) url.Values {
	form := url.Values{
		"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {w.redirectURI()}, "client_id": {"coaphub-web"},
		"code_verifier": {verifier},
	}
	for i := 0; i+1 < len(change); i += 2 {
		if form.Del(change[i]); change[i+1] != "" {
			form.Set(change[i], change[i+1])
		}
	}
	return form
}

func (w *site) tokens(name string, query url.Values) map[string]any {
	w.t.Helper()
	c := w.browser()
	u := w.signIn(c, name, query)
	r := w.do(c, "POST", "/token", w.codeForm(u.Query().Get("code")))
	if r.StatusCode != http.StatusOK {
		w.t.Fatalf("token: %d %s", r.StatusCode, r.body)
	}
	return r.json(w.t)
}

func TestSignInWithABrowser(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	u := w.signIn(c, "user", w.authorizeQuery())
	if !strings.HasPrefix(u.String(), w.redirectURI()+"?") || u.Query().Get("state") != "st" {
		t.Fatal(u)
	}
	r := w.do(c, "POST", "/token", w.codeForm(u.Query().Get("code")))
	if r.StatusCode != http.StatusOK || r.Header.Get("Cache-Control") != "no-store" {
		t.Fatalf("%d %s %v", r.StatusCode, r.body, r.Header)
	}
	got := r.json(t)
	claims := verify(t, w.Server, got["access_token"].(string))
	// Requested ∩ client ∩ roles: a user is no admin, and nobody knows "unknown".
	want := "openid profile offline_access devices:read devices:write"
	if claims["scope"] != want || got["scope"] != want {
		t.Errorf("scope %q and %q", claims["scope"], got["scope"])
	}
	for claim, want := range map[string]any{
		"sub": "user", "client_id": "coaphub-web", "token_use": "access", "iss": w.url, "device_id": nil,
	} {
		if claims[claim] != want {
			t.Errorf("%s is %v, want %v", claim, claims[claim], want)
		}
	}
	parsed := must[*jwt.JSONWebToken](t)(jwt.ParseSigned(got["id_token"].(string), []jose.SignatureAlgorithm{jose.ES256}))
	var id struct {
		jwt.Claims
		Nonce string `json:"nonce"`
	}
	if err := parsed.Claims(must[jose.JSONWebKeySet](t)(w.Keys(t.Context())), &id); err != nil {
		t.Fatal(err)
	}
	if len(id.Audience) != 1 || id.Audience[0] != "coaphub-web" || id.Nonce != "no" || id.Subject != "user" {
		t.Errorf("the ID token is of %q for %v, nonce %q: it is not for the hub", id.Subject, id.Audience, id.Nonce)
	}
	auth := "Bearer " + got["access_token"].(string)
	if info := w.do(c, "GET", "/userinfo", nil, "Authorization", auth).json(t); info["sub"] != "user" || info["preferred_username"] != "user" {
		t.Errorf("userinfo %v", info)
	}
	for name, header := range map[string]string{"an ID token": "Bearer " + got["id_token"].(string), "nonsense": "Bearer x", "nothing": ""} {
		if r := w.do(c, "GET", "/userinfo", nil, "Authorization", header); r.StatusCode != http.StatusUnauthorized {
			t.Errorf("userinfo with %s: %d", name, r.StatusCode)
		}
	}
	if r := w.do(c, "GET", "/userinfo?access_token="+got["access_token"].(string), nil); r.StatusCode != http.StatusUnauthorized {
		t.Errorf("userinfo with a token in the address: %d", r.StatusCode)
	}
}

// The cookie ties forms to a browser and is no session: after a sign-in it gives neither a code nor an answer.
func TestLoginCookieAuthorizesNothing(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	origin := strings.TrimSuffix(w.url, "/oauth")
	r := w.do(c, "GET", "/authorize?"+w.authorizeQuery().Encode(), nil)
	r = w.do(c, "GET", origin+r.Header.Get("Location"), nil)
	cookies := r.Cookies()
	if len(cookies) != 1 || !cookies[0].HttpOnly || cookies[0].SameSite != http.SameSiteLaxMode || cookies[0].Path != "/oauth/" {
		t.Fatalf("cookies %v; want one, hidden from scripts, that is not sent to the API", cookies)
	}
	w.signIn(c, "user", w.authorizeQuery())
	if r := w.do(c, "GET", "/userinfo", nil); r.StatusCode != http.StatusUnauthorized {
		t.Errorf("userinfo: %d", r.StatusCode)
	}
	r = w.do(c, "GET", "/authorize?"+w.authorizeQuery().Encode(), nil)
	if to := r.Header.Get("Location"); !strings.HasPrefix(to, "/oauth/login?") {
		t.Errorf("another application's request leads to %q, not to the login page", to)
	}
}

func TestLoopbackRedirectForTheCommandLine(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c, uri := w.browser(), "http://127.0.0.1:53219/callback"
	u := w.signIn(c, "viewer", w.authorizeQuery("client_id", "coaphub-cli", "redirect_uri", uri))
	r := w.do(c, "POST", "/token", w.codeForm(u.Query().Get("code"), "client_id", "coaphub-cli", "redirect_uri", uri))
	if r.StatusCode != http.StatusOK || r.json(t)["scope"] != "openid profile offline_access devices:read" {
		t.Fatalf("%d %s", r.StatusCode, r.body)
	}
}

func TestRefreshOverHTTP(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	first := w.tokens("user", w.authorizeQuery())
	c := w.browser()
	refresh := func(token any, change ...string) reply {
		form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {token.(string)}, "client_id": {"coaphub-web"}}
		for i := 0; i+1 < len(change); i += 2 {
			form.Set(change[i], change[i+1])
		}
		return w.do(c, "POST", "/token", form)
	}
	if r := refresh(first["refresh_token"], "client_id", "coaphub-cli"); r.StatusCode != http.StatusBadRequest {
		t.Fatalf("another client: %d %s", r.StatusCode, r.body)
	}
	if r := refresh(first["refresh_token"], "scope", "admin"); r.json(t)["error"] != "invalid_scope" {
		t.Fatalf("more than was granted: %s", r.body)
	}
	second := refresh(first["refresh_token"], "scope", "devices:read").json(t)
	if got := verify(t, w.Server, second["access_token"].(string))["scope"]; got != "devices:read" {
		t.Fatalf("narrowed scope is %v", got)
	}
	if again := refresh(first["refresh_token"]).json(t); again["refresh_token"] != second["refresh_token"] {
		t.Fatal("a repeat gives another refresh token")
	}
	if err := w.SetRoles(t.Context(), "user", []string{RoleViewer}); err != nil {
		t.Fatal(err)
	}
	third := refresh(second["refresh_token"]).json(t)
	if got := verify(t, w.Server, third["access_token"].(string))["scope"]; got != "openid profile offline_access devices:read" {
		t.Fatalf("scope after the role was taken away: %v", got)
	}
	if r := refresh(first["refresh_token"]); r.json(t)["error"] != "invalid_grant" {
		t.Fatalf("used up: %s", r.body)
	}
	if r := refresh(third["refresh_token"]); r.json(t)["error"] != "invalid_grant" {
		t.Fatalf("a replay must end the grant: %s", r.body)
	}
}

func TestParallelRedemptionsOverHTTPGiveOneToken(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	u := w.signIn(w.browser(), "user", w.authorizeQuery())
	var wg sync.WaitGroup
	var mu sync.Mutex
	given := 0
	for range 8 {
		c := w.browser()
		wg.Go(func() {
			r := w.do(c, "POST", "/token", w.codeForm(u.Query().Get("code")))
			mu.Lock()
			defer mu.Unlock()
			if r.StatusCode == http.StatusOK {
				given++
			} else if r.json(t)["error"] != "invalid_grant" {
				t.Errorf("%d %s", r.StatusCode, r.body)
			}
		})
	}
	wg.Wait()
	if given != 1 || len(w.docs.Docs[collGrants]) != 1 {
		t.Fatalf("%d tokens on %d grants", given, len(w.docs.Docs[collGrants]))
	}
}

func TestCodeIsBoundToItsRequest(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	code := w.signIn(c, "user", w.authorizeQuery()).Query().Get("code")
	for name, form := range map[string]url.Values{
		"no verifier":      w.codeForm(code, "code_verifier", ""),
		"wrong verifier":   w.codeForm(code, "code_verifier", verifier+"x"),
		"the challenge":    w.codeForm(code, "code_verifier", challenge(verifier)), // what plain would take
		"another client":   w.codeForm(code, "client_id", "coaphub-cli"),
		"the device's":     w.codeForm(code, "client_id", "coaphub-device"),
		"another redirect": w.codeForm(code, "redirect_uri", w.redirectURI()+"/x"),
		"no code":          w.codeForm(code, "code", ""),
		"another code":     w.codeForm(code, "code", code+"x"),
	} {
		if r := w.do(c, "POST", "/token", form); r.StatusCode < 400 || r.StatusCode >= 500 {
			t.Errorf("%s: %d %s", name, r.StatusCode, r.body)
		}
	}
	if r := w.do(c, "POST", "/token", w.codeForm(code)); r.StatusCode != http.StatusOK {
		t.Errorf("after wrong tries: %d %s", r.StatusCode, r.body)
	}
	if r := w.do(c, "POST", "/token", w.codeForm(code)); r.json(t)["error"] != "invalid_grant" {
		t.Errorf("used twice: %d %s", r.StatusCode, r.body)
	}
}

func TestAuthorizeRefuses(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	for name, try := range map[string]struct {
		query url.Values
		err   string // error parameter of the redirect; empty: a page, because nobody may be redirected
	}{
		"unknown client":       {w.authorizeQuery("client_id", "who"), ""},
		"machine":              {w.authorizeQuery("client_id", "robot"), ""},
		"foreign redirect":     {w.authorizeQuery("redirect_uri", "https://evil.example/"), ""},
		"longer redirect":      {w.authorizeQuery("redirect_uri", w.redirectURI()+"/../x"), ""},
		"escaped redirect":     {w.authorizeQuery("redirect_uri", url.QueryEscape(w.redirectURI())), ""},
		"no redirect":          {w.authorizeQuery("redirect_uri", ""), ""},
		"no PKCE":              {w.authorizeQuery("code_challenge", "", "code_challenge_method", ""), "invalid_request"},
		"plain PKCE":           {w.authorizeQuery("code_challenge_method", "plain"), "invalid_request"},
		"PKCE without method":  {w.authorizeQuery("code_challenge_method", ""), "invalid_request"},
		"short challenge":      {w.authorizeQuery("code_challenge", "short"), "invalid_request"},
		"token in the browser": {w.authorizeQuery("response_type", "id_token token"), "unauthorized_client"},
		"silent":               {w.authorizeQuery("prompt", "none"), "login_required"},
		"form_post":            {w.authorizeQuery("response_mode", "form_post"), "invalid_request"},
		"request object":       {w.authorizeQuery("request", "x.y.z"), "request_not_supported"},
		"device ID":            {w.authorizeQuery("device_id", string(lamp)), "invalid_request"},
		"no scope":             {w.authorizeQuery("scope", ""), "invalid_request"},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.do(c, "GET", "/authorize?"+try.query.Encode(), nil)
			if try.err == "" {
				if r.StatusCode != http.StatusBadRequest || r.Header.Get("Location") != "" {
					t.Fatalf("%d to %q", r.StatusCode, r.Header.Get("Location"))
				}
				return
			}
			u, err := url.Parse(r.Header.Get("Location"))
			if err != nil || u.Query().Get("error") != try.err && !strings.Contains(u.Fragment, "error="+try.err) {
				t.Fatalf("%d to %q", r.StatusCode, r.Header.Get("Location"))
			}
		})
	}
	q := w.authorizeQuery()
	if r := w.do(c, "GET", "/authorize?"+q.Encode()+"&client_id=coaphub-web", nil); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a parameter twice: %d", r.StatusCode)
	}
}

// deviceQuery is what an application asks with that onboards a device.
func deviceQuery(dev hub.DeviceID) url.Values {
	q := url.Values{
		"client_id": {"coaphub-device"}, "response_type": {"code"}, "redirect_uri": {"myapp://onboard"}, "scope": {"openid offline_access device"},
	}
	if dev != "" {
		q.Set("device_id", string(dev))
	}
	return q
}

func TestDeviceIDOfTheAuthorizeRequestReachesTheTokenAndStays(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	code := w.signIn(c, "user", deviceQuery(lamp)).Query().Get("code")
	form := url.Values{"grant_type": {"authorization_code"}, "code": {code}, "redirect_uri": {"myapp://onboard"}, "client_id": {"coaphub-device"}}
	if r := w.do(c, "POST", "/token", form); r.StatusCode == http.StatusOK {
		t.Fatal("a device's code is redeemed over HTTP")
	}
	_, err := w.Exchange(t.Context(), meter, "cert", code)
	wantKind(t, err, hub.Unauthenticated, "code-invalid")
	tokens := must[hub.Tokens](t)(w.Exchange(t.Context(), lamp, "cert", code))
	for range 2 {
		claims := verify(t, w.Server, tokens.Access)
		if claims["device_id"] != string(lamp) || claims["scope"] != "device" || claims["sub"] != "user" {
			t.Fatalf("%v", claims)
		}
		if r := w.do(c, "POST", "/token", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {tokens.Refresh}, "client_id": {"coaphub-device"}}); r.StatusCode == http.StatusOK {
			t.Fatal("a device's token is refreshed over HTTP")
		}
		tokens = must[hub.Tokens](t)(w.Refresh(t.Context(), lamp, tokens.Refresh))
	}
	r := w.do(c, "GET", "/authorize?"+deviceQuery("no-uuid").Encode(), nil)
	if u, err := url.Parse(r.Header.Get("Location")); err != nil || u.Query().Get("error") != "invalid_request" {
		t.Fatalf("%d %q", r.StatusCode, r.Header.Get("Location"))
	}
}

func TestDeviceIDOfAnotherOwnerIsDeniedInTheBrowser(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, ownedBy("somebody"))
	if u := w.signIn(w.browser(), "user", deviceQuery(lamp)); u.Query().Get("error") != "access_denied" || u.Query().Has("code") {
		t.Fatal(u)
	}
}

func TestClientCredentials(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	basic := "Basic " + base64.StdEncoding.EncodeToString([]byte("robot:"+url.QueryEscape("a secret with a % sign")))
	r := w.do(c, "POST", "/token", url.Values{"grant_type": {"client_credentials"}}, "Authorization", basic)
	if r.StatusCode != http.StatusOK {
		t.Fatalf("%d %s", r.StatusCode, r.body)
	}
	got := r.json(t)
	claims := verify(t, w.Server, got["access_token"].(string))
	if claims["scope"] != "devices:read" || claims["sub"] != "user" || claims["client_id"] != "robot" || got["refresh_token"] != nil {
		t.Fatalf("%v", claims) // its owner is no admin, so it is none either
	}
	introspect := func(token, header string) reply {
		return w.do(c, "POST", "/introspect", url.Values{"token": {token}}, "Authorization", header)
	}
	in := introspect(got["access_token"].(string), basic).json(t)
	if in["active"] != true || in["sub"] != "user" || in["scope"] != "devices:read" || in["exp"] == nil {
		t.Fatalf("%v", in)
	}
	if in := introspect("nonsense", basic).json(t); in["active"] != false || len(in) != 1 {
		t.Fatalf("%v", in)
	}
	if r := w.do(c, "POST", "/introspect", url.Values{"token": {"x"}, "client_id": {"coaphub-web"}}); r.StatusCode != http.StatusUnauthorized {
		t.Fatalf("introspection by a public client: %d", r.StatusCode)
	}
	revoke := func(form url.Values, header string) int {
		return w.do(c, "POST", "/revoke", form, "Authorization", header).StatusCode
	}
	tokenForm := url.Values{"token": {got["access_token"].(string)}}
	if status := revoke(url.Values{"token": tokenForm["token"], "client_id": {"coaphub-web"}}, ""); status != http.StatusOK {
		t.Fatal(status)
	}
	if in := introspect(got["access_token"].(string), basic).json(t); in["active"] != true {
		t.Fatal("another client revoked the token")
	}
	if status := revoke(tokenForm, basic); status != http.StatusOK {
		t.Fatal(status)
	}
	if in := introspect(got["access_token"].(string), basic).json(t); in["active"] != false {
		t.Fatal("a revoked token is active")
	}
	if status := revoke(tokenForm, basic); status != http.StatusOK {
		t.Fatal("a repeat is an error")
	}
	if r := w.do(c, "POST", "/token", url.Values{"grant_type": {"client_credentials"}, "scope": {"admin"}}, "Authorization", basic); r.json(t)["error"] != "invalid_scope" {
		t.Fatal(r.body)
	}
	for name, header := range map[string]string{
		"wrong secret": "Basic " + base64.StdEncoding.EncodeToString([]byte("robot:wrong")),
		"public":       "Basic " + base64.StdEncoding.EncodeToString([]byte("coaphub-web:")),
	} {
		if r := w.do(c, "POST", "/token", url.Values{"grant_type": {"client_credentials"}}, "Authorization", header); r.StatusCode != http.StatusUnauthorized {
			t.Errorf("%s: %d %s", name, r.StatusCode, r.body)
		}
	}
}

func TestRevokeARefreshTokenOverHTTP(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	got, c := w.tokens("user", w.authorizeQuery()), w.browser()
	refresh := got["refresh_token"].(string)
	id, _, _ := parseRefreshToken(refresh)
	for _, token := range []string{refreshToken(id, make([]byte, 32)), "nonsense", refresh} {
		if active := must[bool](t)(w.Active(t.Context(), id)); !active {
			t.Fatal("a guess ended the grant")
		}
		if r := w.do(c, "POST", "/revoke", url.Values{"token": {token}, "client_id": {"coaphub-web"}}); r.StatusCode != http.StatusOK {
			t.Fatalf("%d %s", r.StatusCode, r.body)
		}
	}
	if active := must[bool](t)(w.Active(t.Context(), id)); active {
		t.Fatal("a revoked refresh token's grant stands")
	}
}

func TestDeviceGrant(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	w.Server.limits.polls = newLimits(100, pollInterval, 10) // the test polls faster than it may
	begin := func() map[string]any {
		r := w.do(c, "POST", "/device_authorization", url.Values{"client_id": {"coaphub-cli"}, "scope": {"devices:read devices:write admin offline_access"}})
		if r.StatusCode != http.StatusOK {
			t.Fatalf("%d %s", r.StatusCode, r.body)
		}
		return r.json(t)
	}
	poll := func(code any) reply {
		return w.do(c, "POST", "/token", url.Values{
			"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {code.(string)}, "client_id": {"coaphub-cli"},
		})
	}
	got := begin()
	if r := poll(got["device_code"]); r.json(t)["error"] != "authorization_pending" {
		t.Fatal(r.body)
	}
	page := w.do(c, "GET", got["verification_uri_complete"].(string), nil)
	typed := strings.ToLower(strings.ReplaceAll(got["user_code"].(string), "-", " "))
	r := w.do(c, "POST", "/device", page.fill("user_code", typed, "username", "user", "password", password))
	if r.StatusCode != http.StatusOK || !strings.Contains(r.body, "may go on") {
		t.Fatalf("%d %s", r.StatusCode, r.body)
	}
	var wg sync.WaitGroup
	replies := make([]reply, 8)
	for i := range replies {
		wg.Go(func() { replies[i] = poll(got["device_code"]) })
	}
	wg.Wait()
	given := 0
	for _, r := range replies {
		if r.StatusCode != http.StatusOK {
			if r.StatusCode != http.StatusBadRequest {
				t.Errorf("%d %s", r.StatusCode, r.body)
			}
			continue
		}
		given++
		claims := verify(t, w.Server, r.json(t)["access_token"].(string))
		if claims["scope"] != "devices:read devices:write offline_access" || claims["sub"] != "user" || r.json(t)["refresh_token"] == nil {
			t.Errorf("%v", r.body)
		}
	}
	if given != 1 {
		t.Fatalf("%d tokens for one device code", given)
	}
	if r := w.do(c, "POST", "/device", page.fill("user_code", "WRONG-ONE", "username", "user", "password", password)); r.StatusCode != http.StatusForbidden {
		t.Fatalf("unknown code: %d", r.StatusCode)
	}
	if r := poll("unknown"); r.json(t)["error"] != "expired_token" {
		t.Fatal(r.body)
	}
	w.Server.limits.polls = newLimits(1, pollInterval, 10)
	next := begin()
	poll(next["device_code"])
	if r := poll(next["device_code"]); r.json(t)["error"] != "slow_down" {
		t.Fatal(r.body)
	}
	if r := w.do(c, "POST", "/device_authorization", url.Values{"client_id": {"coaphub-web"}, "scope": {"devices:read"}}); r.StatusCode < 400 {
		t.Fatal("the web console may not use the device grant")
	}
	if r := w.do(c, "POST", "/device_authorization", url.Values{"client_id": {"coaphub-cli"}, "scope": {"device"}}); r.StatusCode != http.StatusBadRequest {
		t.Fatalf("no scope is left: %d %s", r.StatusCode, r.body)
	}
}

func TestFirstUseChangesThePassword(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	oneTime := must[string](t)(w.AddUser(t.Context(), "new", "", []string{RoleUser}))
	c := w.browser()
	origin := strings.TrimSuffix(w.url, "/oauth")
	r := w.do(c, "GET", "/authorize?"+w.authorizeQuery().Encode(), nil)
	login := w.do(c, "GET", origin+r.Header.Get("Location"), nil)
	r = w.do(c, "POST", "/login", login.fill("username", "New", "password", oneTime))
	if r.StatusCode != http.StatusOK || !strings.Contains(r.body, `name="repeat"`) {
		t.Fatalf("%d %s", r.StatusCode, r.body)
	}
	for name, try := range map[string][2]string{"short": {"short", "short"}, "different": {password, password + "x"}, "the old one": {oneTime, oneTime}} {
		if bad := w.do(c, "POST", "/password", r.fill("password", try[0], "repeat", try[1])); bad.StatusCode != http.StatusBadRequest || !strings.Contains(bad.body, `role="alert"`) {
			t.Errorf("%s: %d", name, bad.StatusCode)
		}
	}
	form := r.fill("password", password, "repeat", password)
	next := w.do(c, "POST", "/password", form)
	if next.StatusCode != http.StatusSeeOther {
		t.Fatalf("%d %s", next.StatusCode, next.body)
	}
	if back := w.do(c, "GET", origin+next.Header.Get("Location"), nil); !strings.Contains(back.Header.Get("Location"), "code=") {
		t.Fatalf("%d %s", back.StatusCode, back.Header.Get("Location"))
	}
	if again := w.do(c, "POST", "/password", form); again.StatusCode != http.StatusBadRequest {
		t.Fatalf("the right to change was used twice: %d", again.StatusCode)
	}
	if old := w.do(c, "POST", "/login", login.fill("username", "new", "password", oneTime)); old.StatusCode != http.StatusForbidden {
		t.Fatalf("the one-time password works twice: %d", old.StatusCode)
	}
}

func TestLoginRefusesAndLimits(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	r := w.do(c, "GET", "/authorize?"+w.authorizeQuery().Encode(), nil)
	login := w.do(c, "GET", strings.TrimSuffix(w.url, "/oauth")+r.Header.Get("Location"), nil)
	post := func(name, secret string) int {
		return w.do(c, "POST", "/login", login.fill("username", name, "password", secret)).StatusCode
	}
	for _, name := range []string{"nobody", "", "<script>", strings.Repeat("x", 300)} {
		if status := post(name, "wrong"); status != http.StatusForbidden {
			t.Errorf("%.10q: %d", name, status)
		}
	}
	for range 20 { // right ones are not counted
		if status := post("viewer", password); status != http.StatusSeeOther {
			t.Fatal(status)
		}
	}
	for range 10 {
		if status := post("user", "wrong"); status != http.StatusForbidden {
			t.Fatal(status)
		}
	}
	if status := post("user", password); status != http.StatusTooManyRequests {
		t.Fatalf("eleventh try of one account: %d", status)
	}
	if status := post("viewer", password); status != http.StatusSeeOther {
		t.Fatalf("another account: %d", status)
	}
	for i := range 40 {
		post("name"+string(rune('a'+i%26))+string(rune('a'+i/26)), "wrong")
	}
	if status := post("viewer", password); status != http.StatusTooManyRequests {
		t.Fatalf("after forty accounts were tried from one source: %d", status)
	}
}

func TestFormsAreOfThisBrowserOnly(t *testing.T) {
	w := newSite(t, nil, owners(nobody))
	c, other := w.browser(), w.browser()
	origin := strings.TrimSuffix(w.url, "/oauth")
	r := w.do(c, "GET", "/authorize?"+w.authorizeQuery().Encode(), nil)
	login := w.do(c, "GET", origin+r.Header.Get("Location"), nil)
	form := login.fill("username", "user", "password", password)
	if r := w.do(other, "POST", "/login", form); r.StatusCode != http.StatusForbidden {
		t.Errorf("without the cookie: %d", r.StatusCode)
	}
	form.Set("csrf", "guess")
	if r := w.do(c, "POST", "/login", form); r.StatusCode != http.StatusForbidden {
		t.Errorf("with another token: %d", r.StatusCode)
	}
	form = login.fill("username", "user", "password", password)
	for _, header := range [][]string{{"Sec-Fetch-Site", "cross-site"}, {"Origin", "https://evil.example"}} {
		if r := w.do(c, "POST", "/login", form, header...); r.StatusCode != http.StatusForbidden {
			t.Errorf("%v: %d", header, r.StatusCode)
		}
	}
	if r := w.do(c, "POST", "/login?password=x", form); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a password in the address: %d", r.StatusCode)
	}
	done := w.do(c, "POST", "/login", form)
	if r := w.do(other, "GET", origin+done.Header.Get("Location"), nil); r.StatusCode != http.StatusBadRequest {
		t.Errorf("another browser got the code: %d %s", r.StatusCode, r.Header.Get("Location"))
	}
	if r := w.do(c, "GET", "/authorize/callback?id="+url.QueryEscape(form.Get("request")), nil); strings.Contains(r.Header.Get("Location"), "code=") {
		t.Error("a code without a sign-in")
	}
	if r := w.do(c, "GET", "/login?request="+form.Get("request")+"x", nil); r.StatusCode != http.StatusBadRequest {
		t.Errorf("a request that was changed: %d", r.StatusCode)
	}
	for path, r := range map[string]reply{"login": login, "device": w.do(c, "GET", "/device", nil), "error": w.do(c, "GET", "/authorize", nil)} {
		if csp := r.Header.Get("Content-Security-Policy"); !strings.Contains(csp, "frame-ancestors 'none'") || !strings.Contains(csp, "default-src 'none'") {
			t.Errorf("%s: %q", path, csp)
		}
		if strings.Contains(r.body, "<script") || strings.Contains(r.body, "http://") || strings.Contains(r.body, "https://") {
			t.Errorf("%s has scripts or assets of others", path)
		}
	}
	if r := w.do(c, "GET", "/style.css", nil); r.StatusCode != http.StatusOK || !strings.HasPrefix(r.Header.Get("Content-Type"), "text/css") {
		t.Errorf("style: %d", r.StatusCode)
	}
}

func TestSignOutEndsTheApplication(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	got, c := w.tokens("user", w.authorizeQuery()), w.browser()
	id, _, _ := parseRefreshToken(got["refresh_token"].(string))
	if r := w.do(c, "GET", "/end_session?client_id=coaphub-web&post_logout_redirect_uri=https://evil.example/", nil); strings.Contains(r.Header.Get("Location"), "evil") {
		t.Fatal("redirects to anywhere")
	}
	if r := w.do(c, "GET", "/end_session?client_id=coaphub-web", nil); r.StatusCode != http.StatusFound || r.Header.Get("Location") != "/oauth/signed-out" {
		t.Fatalf("%d %s", r.StatusCode, r.Header.Get("Location"))
	}
	if !must[bool](t)(w.Active(t.Context(), id)) {
		t.Fatal("anybody can end others' sign-ins")
	}
	q := url.Values{"id_token_hint": {got["id_token"].(string)}, "post_logout_redirect_uri": {w.redirectURI()}}
	if r := w.do(c, "GET", "/end_session?"+q.Encode(), nil); r.Header.Get("Location") != w.redirectURI() {
		t.Fatalf("%d %s %s", r.StatusCode, r.Header.Get("Location"), r.body)
	}
	if must[bool](t)(w.Active(t.Context(), id)) {
		t.Fatal("the tokens outlived the sign-out")
	}
}

func TestCORSIsNotReflected(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	for _, try := range [][2]string{
		{"GET", "/.well-known/openid-configuration"},
		{"GET", "/keys"},
		{"POST", "/token"},
		{"OPTIONS", "/token"},
		{"GET", "/authorize"},
		{"GET", "/userinfo"},
		{"OPTIONS", "/userinfo"},
		{"GET", "/login"},
		{"GET", "/end_session"},
	} {
		r := w.do(c, try[0], try[1], nil, "Origin", "https://evil.example", "Access-Control-Request-Method", "POST")
		for name := range r.Header {
			if strings.HasPrefix(name, "Access-Control-") {
				t.Errorf("%v: %s: %s", try, name, r.Header.Get(name))
			}
		}
	}
}

func TestDiscoverySaysWhatIsThere(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	d := w.do(c, "GET", "/.well-known/openid-configuration", nil).json(t)
	if d["issuer"] != w.url {
		t.Fatalf("issuer %v", d["issuer"])
	}
	for name, v := range d {
		if !strings.HasSuffix(name, "_endpoint") && name != "jwks_uri" {
			continue
		}
		if r := w.do(c, "GET", v.(string), nil); r.StatusCode == http.StatusNotFound {
			t.Errorf("%s: nothing at %v", name, v)
		}
	}
	var set jose.JSONWebKeySet
	if err := json.Unmarshal([]byte(w.do(c, "GET", "/keys", nil).body), &set); err != nil || len(set.Keys) != 1 || !set.Keys[0].IsPublic() {
		t.Fatalf("%v %v", err, set)
	}
	for _, path := range []string{"/healthz", "/ready", "/oauth/token", "/callback"} {
		if r := w.do(c, "GET", path, nil); r.StatusCode != http.StatusNotFound {
			t.Errorf("%s of the library is served: %d", path, r.StatusCode)
		}
	}
}

func TestTokenEndpointRefuses(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	c := w.browser()
	secret := url.Values{"grant_type": {"client_credentials"}, "client_id": {"robot"}, "client_secret": {"a secret with a % sign"}}
	basic := func(s string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(s)) }
	for name, try := range map[string]struct {
		method, path string
		form         url.Values
		headers      []string
		status       int
	}{
		"secret by GET":               {"GET", "/token?" + secret.Encode(), nil, nil, 405},
		"secret in the query":         {"POST", "/token?" + secret.Encode(), url.Values{}, nil, 400},
		"secret in query and body":    {"POST", "/token?client_secret=x", secret, nil, 400},
		"PUT":                         {"PUT", "/token", secret, nil, 405},
		"JSON":                        {"POST", "/token", secret, []string{"Content-Type", "application/json"}, 415},
		"a parameter twice":           {"POST", "/token", url.Values{"grant_type": {"client_credentials", "client_credentials"}}, nil, 400},
		"no grant type":               {"POST", "/token", url.Values{"client_id": {"coaphub-web"}}, nil, 400},
		"a grant of the library":      {"POST", "/token", url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:jwt-bearer"}, "client_id": {"coaphub-web"}}, nil, 400},
		"token exchange":              {"POST", "/token", url.Values{"grant_type": {"urn:ietf:params:oauth:grant-type:token-exchange"}, "client_id": {"coaphub-web"}}, nil, 400},
		"password grant":              {"POST", "/token", url.Values{"grant_type": {"password"}, "client_id": {"coaphub-web"}}, nil, 400},
		"no client":                   {"POST", "/token", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"x"}}, nil, 401},
		"unknown client":              {"POST", "/token", url.Values{"grant_type": {"refresh_token"}, "client_id": {"x"}}, nil, 401},
		"client assertion":            {"POST", "/token", url.Values{"grant_type": {"client_credentials"}, "client_assertion": {"x"}}, nil, 401},
		"Basic: bad escape in ID":     {"POST", "/token", url.Values{"grant_type": {"client_credentials"}}, []string{"Authorization", basic("%zz:x")}, 401},
		"Basic: bad escape in secret": {"POST", "/token", url.Values{"grant_type": {"authorization_code"}, "code": {"x"}}, []string{"Authorization", basic("robot:%")}, 401},
		"Basic: bad escape, refresh":  {"POST", "/token", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"x"}}, []string{"Authorization", basic("robot:%")}, 401},
		"Basic: bad escape, public":   {"POST", "/token", url.Values{"grant_type": {"refresh_token"}, "refresh_token": {"x"}}, []string{"Authorization", basic("coaphub-web:%")}, 401},
		"Basic: no colon":             {"POST", "/token", url.Values{"grant_type": {"client_credentials"}}, []string{"Authorization", basic("robot")}, 401},
		"Basic: no base64":            {"POST", "/token", url.Values{"grant_type": {"client_credentials"}}, []string{"Authorization", "Basic ???"}, 401},
		"Bearer":                      {"POST", "/token", url.Values{"grant_type": {"client_credentials"}}, []string{"Authorization", "Bearer x"}, 401},
		"Basic and body":              {"POST", "/token", secret, []string{"Authorization", basic("robot:x")}, 400},
		"two clients":                 {"POST", "/token", url.Values{"grant_type": {"client_credentials"}, "client_id": {"coaphub-web"}}, []string{"Authorization", basic("robot:x")}, 400},
		"a secret of a public client": {"POST", "/token", url.Values{"grant_type": {"refresh_token"}, "client_id": {"coaphub-web"}, "client_secret": {"x"}}, nil, 401},
		"large":                       {"POST", "/token", url.Values{"grant_type": {strings.Repeat("x", maxForm)}}, nil, 413},
		"revoke by GET":               {"GET", "/revoke?token=x&client_id=coaphub-web", nil, nil, 405},
		"introspect by GET":           {"GET", "/introspect?token=x", nil, nil, 405},
		"revoke without token":        {"POST", "/revoke", url.Values{"client_id": {"coaphub-web"}}, nil, 400},
		"device grant by GET":         {"GET", "/device_authorization?client_id=coaphub-cli", nil, nil, 405},
	} {
		t.Run(name, func(t *testing.T) {
			r := w.do(c, try.method, try.path, try.form, try.headers...)
			if r.StatusCode != try.status || r.json(t)["error"] == nil {
				t.Fatalf("%d %s", r.StatusCode, r.body)
			}
			if r.Header.Get("Cache-Control") != "no-store" {
				t.Error("may be cached")
			}
		})
	}
	if r := w.do(c, "POST", "/token", secret); r.StatusCode != http.StatusOK { // in the body alone it is fine
		t.Fatalf("%d %s", r.StatusCode, r.body)
	}
}

// The library makes refusals of its storage's failures; applications would sign their users out.
func TestStoreTroubleOverHTTPIs503(t *testing.T) {
	t.Parallel()
	w := newSite(t, nil, owners(nobody))
	got, c := w.tokens("user", w.authorizeQuery()), w.browser()
	code := w.signIn(c, "user", w.authorizeQuery()).Query().Get("code")
	forms := map[string]url.Values{
		"code":    w.codeForm(code),
		"refresh": {"grant_type": {"refresh_token"}, "refresh_token": {got["refresh_token"].(string)}, "client_id": {"coaphub-web"}},
		"machine": {"grant_type": {"client_credentials"}, "client_id": {"robot"}, "client_secret": {"a secret with a % sign"}},
		"device":  {"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {"x"}, "client_id": {"coaphub-cli"}},
	}
	for _, broken := range []string{"get", "put"} {
		w.docs.Mu.Lock()
		w.docs.Fail = func(op, _, _ string) error {
			if op == broken {
				return errors.New("disk on fire in /var/lib")
			}
			return nil
		}
		w.docs.Mu.Unlock()
		for name, form := range forms {
			if name == "device" && broken == "put" {
				continue // an unknown code is only read
			}
			r := w.do(c, "POST", "/token", form)
			if r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("Retry-After") == "" || strings.Contains(r.body, "disk") {
				t.Errorf("%s, %s: %d %s", name, broken, r.StatusCode, r.body)
			}
		}
	}
	w.docs.Mu.Lock()
	w.docs.Fail = nil
	w.docs.Mu.Unlock()
	for _, name := range []string{"code", "refresh"} {
		if r := w.do(c, "POST", "/token", forms[name]); r.StatusCode != http.StatusOK {
			t.Errorf("%s afterwards: %d %s", name, r.StatusCode, r.body)
		}
	}
}

func TestAPanicEndsOneRequest(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	h := s.recovered(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { panic("boom") }))
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest("GET", "/", nil))
	if rec.Code != http.StatusInternalServerError || strings.Contains(rec.Body.String(), "boom") || testutil.ToFloat64(s.metrics.panics) != 1 {
		t.Fatalf("%d %s", rec.Code, rec.Body)
	}
}
