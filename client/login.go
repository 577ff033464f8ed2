package client

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Provider says which OpenID provider a login is at, and for which program.
type Provider struct {
	Issuer   string `json:"issuer"`   // as Configuration.Authority has it
	ClientID string `json:"clientId"` // a public client that may use the device grant; empty: "coaphub-cli"
	// TLS says whom to trust, as in Config.
	TLS *tls.Config `json:"-"`
}

// Grant is what a login brings: access tokens, until it ends or is revoked. It is a secret. As JSON it can be kept.
type Grant struct {
	Provider
	Token
	Refresh string `json:"refreshToken,omitempty"`
}

// Prompt is what a person has to do, in any browser: open URL and type Code, or open Complete.
type Prompt struct {
	URL, Code string
	Complete  string // URL with the code in it; may be empty
	Expires   time.Time
}

// Login asks for a login by the device grant (RFC 8628): it tells what a person has to do, and waits until that is done. tell
// must not wait for it. A person who refuses, or takes too long, is Unauthenticated.
func Login(ctx context.Context, p Provider, scopes []string, tell func(Prompt) error) (Grant, error) {
	if p.ClientID == "" {
		p.ClientID = "coaphub-cli"
	}
	hc := newHTTP(p.TLS)
	defer hc.CloseIdleConnections()
	return (&provider{Provider: p, http: hc}).login(ctx, scopes, tell)
}

// Source gives the grant's access tokens. Each time that it got another one, keep is called with the grant as it is then: an
// error of it is that of the call the token was for, since a provider may take a refresh token once only. Nil: it need not be
// kept.
func (g Grant) Source(keep func(Grant) error) TokenSource {
	turn := make(chan struct{}, 1) // several clients may share it; whoever fills it has g and first
	first := true                  // the grant's own token was not used yet
	return func(ctx context.Context) (Token, error) {
		select {
		case turn <- struct{}{}:
		case <-ctx.Done():
			return Token{}, context.Cause(ctx)
		}
		defer func() { <-turn }()
		if first && (g.Expires.IsZero() || time.Until(g.Expires) > early) {
			first = false
			return g.Token, nil
		}
		first = false
		hc := newHTTP(g.TLS)
		defer hc.CloseIdleConnections()
		next, err := (&provider{Provider: g.Provider, http: hc}).refresh(ctx, g)
		if err != nil {
			return Token{}, err
		}
		if keep != nil {
			if err := keep(next); err != nil {
				return Token{}, err
			}
		}
		g = next
		return g.Token, nil
	}
}

// Revoke ends the grant: its tokens are worth nothing afterwards (RFC 7009).
func (g Grant) Revoke(ctx context.Context) error {
	hc := newHTTP(g.TLS)
	defer hc.CloseIdleConnections()
	p := &provider{Provider: g.Provider, http: hc}
	if err := p.discover(ctx); err != nil {
		return err
	}
	if p.at.Revoke == "" {
		return &Error{Kind: Unsupported, Code: ErrLogin, Message: p.Issuer + " does not revoke tokens"}
	}
	token := g.Refresh
	if token == "" {
		token = g.Access
	}
	return outward(p.post(ctx, p.at.Revoke, url.Values{"token": {token}, "client_id": {p.ClientID}}, nil))
}

// provider is an OpenID provider that is asked something.
type provider struct {
	Provider
	http *http.Client
	at   struct { // OpenID Connect Discovery 1.0, Section 3; RFC 8628, Section 4
		Device string `json:"device_authorization_endpoint"`
		Token  string `json:"token_endpoint"`
		Revoke string `json:"revocation_endpoint"`
	}
}

func (p *provider) discover(ctx context.Context) error {
	if p.at.Token != "" {
		return nil
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(p.Issuer, "/")+"/.well-known/openid-configuration", nil)
	if err != nil {
		return &Error{Kind: Invalid, Code: ErrLogin, Message: p.Issuer + " is no issuer", Err: err}
	}
	if err := p.do(ctx, r, &p.at); err != nil {
		return err
	}
	if p.at.Token == "" {
		return &Error{Kind: Invalid, Code: ErrLogin, Message: p.Issuer + " is no OpenID provider"}
	}
	return nil
}

func (p *provider) login(ctx context.Context, scopes []string, tell func(Prompt) error) (g Grant, err error) {
	if err := p.discover(ctx); err != nil {
		return g, err
	}
	if p.at.Device == "" {
		return g, &Error{Kind: Unsupported, Code: ErrLogin, Message: p.Issuer + " has no device grant: get a token there in another way"}
	}
	var asked struct { // RFC 8628, Section 3.2
		DeviceCode string `json:"device_code"`
		UserCode   string `json:"user_code"`
		URL        string `json:"verification_uri"`
		Complete   string `json:"verification_uri_complete"`
		ExpiresIn  int64  `json:"expires_in"`
		Interval   int64  `json:"interval"`
	}
	scopes = append(slices.Clone(scopes), "offline_access")
	form := url.Values{"client_id": {p.ClientID}, "scope": {strings.Join(scopes, " ")}}
	if err := p.post(ctx, p.at.Device, form, &asked); err != nil {
		return g, outward(err)
	}
	ends := time.Now().Add(time.Duration(min(max(asked.ExpiresIn, 1), 86400)) * time.Second)
	if err := tell(Prompt{URL: asked.URL, Code: asked.UserCode, Complete: asked.Complete, Expires: ends}); err != nil {
		return g, err
	}
	pause := 5 * time.Second // unless the provider says otherwise
	if asked.Interval > 0 {
		pause = time.Duration(min(asked.Interval, 60)) * time.Second
	}
	form = url.Values{
		"grant_type": {"urn:ietf:params:oauth:grant-type:device_code"}, "device_code": {asked.DeviceCode}, "client_id": {p.ClientID},
	}
	for time.Now().Before(ends) {
		g, err = p.token(ctx, form)
		switch {
		case errors.Is(err, Code("authorization_pending")):
		case errors.Is(err, Code("slow_down")):
			pause += 5 * time.Second // RFC 8628, Section 3.5
		case errors.Is(err, ErrUnreachable):
			pause = min(2*pause, time.Minute) // same place: back off
		default:
			return g, outward(err)
		}
		wait := time.NewTimer(pause)
		select {
		case <-wait.C:
		case <-ctx.Done():
			wait.Stop()
			return g, context.Cause(ctx)
		}
	}
	return g, &Error{Kind: Unauthenticated, Code: ErrLogin, Message: "nobody signed in in time"}
}

func (p *provider) refresh(ctx context.Context, g Grant) (Grant, error) {
	if g.Refresh == "" {
		return g, &Error{Kind: Unauthenticated, Code: ErrLogin, Message: "the login has ended: sign in again"}
	}
	if err := p.discover(ctx); err != nil {
		return g, err
	}
	next, err := p.token(ctx, url.Values{"grant_type": {"refresh_token"}, "refresh_token": {g.Refresh}, "client_id": {p.ClientID}})
	if err != nil {
		return g, outward(err)
	}
	if next.Refresh == "" { // RFC 6749, Section 6: then the old one stays
		next.Refresh = g.Refresh
	}
	return next, nil
}

func (p *provider) token(ctx context.Context, form url.Values) (Grant, error) {
	var t struct { // RFC 6749, Section 5.1
		Access    string `json:"access_token"`
		Refresh   string `json:"refresh_token"`
		ExpiresIn int64  `json:"expires_in"`
	}
	if err := p.post(ctx, p.at.Token, form, &t); err != nil {
		return Grant{}, err
	}
	if t.Access == "" {
		return Grant{}, &Error{Kind: Invalid, Code: ErrLogin, Message: p.Issuer + " gave no token"}
	}
	g := Grant{Provider: p.Provider, Token: Token{Access: t.Access}, Refresh: t.Refresh}
	if t.ExpiresIn > 0 {
		g.Expires = time.Now().Add(time.Duration(min(t.ExpiresIn, 10*365*86400)) * time.Second)
	}
	return g, nil
}

// outward makes of an OAuth error code, which only this file compares, one that callers know.
func outward(err error) error {
	var e *Error
	if errors.As(err, &e) && e.Code != ErrUnreachable && e.Code != ErrLogin {
		e.Code = ErrLogin
	}
	return err
}

func (p *provider) post(ctx context.Context, to string, form url.Values, into any) error {
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, to, strings.NewReader(form.Encode()))
	if err != nil {
		return &Error{Kind: Invalid, Code: ErrLogin, Message: "the provider's address makes no sense: " + to, Err: err}
	}
	r.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	return p.do(ctx, r, into)
}

// do asks the provider. Its OAuth errors are Unauthenticated, with their code.
func (p *provider) do(ctx context.Context, r *http.Request, into any) error {
	r.Header.Set("Accept", "application/json")
	resp, err := p.http.Do(r)
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return &Error{Kind: Unavailable, Code: ErrUnreachable, Message: "the provider at " + p.Issuer + " cannot be reached: " + err.Error(), Err: err}
	}
	defer func() { _ = resp.Body.Close() }()
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxError))
	switch {
	case err != nil:
		return &Error{Kind: Unavailable, Code: ErrUnreachable, Message: "the provider at " + p.Issuer + " broke off", Err: err}
	case resp.StatusCode >= http.StatusInternalServerError || resp.StatusCode == http.StatusTooManyRequests && !strings.Contains(string(b), "slow_down"):
		return &Error{Kind: Unavailable, Code: ErrUnreachable, Message: "the provider at " + p.Issuer + " answered " + resp.Status, Status: resp.StatusCode}
	case resp.StatusCode != http.StatusOK:
		var f struct { // RFC 6749, Section 5.2
			Error       Code   `json:"error"`
			Description string `json:"error_description"`
		}
		if json.Unmarshal(b, &f) != nil || f.Error == "" {
			return &Error{Kind: Invalid, Code: ErrLogin, Message: p.Issuer + " answered " + resp.Status, Status: resp.StatusCode}
		}
		if f.Description == "" {
			f.Description = string(f.Error)
		}
		return &Error{Kind: Unauthenticated, Code: f.Error, Message: "the provider refused: " + f.Description, Status: resp.StatusCode}
	case into == nil:
		return nil
	}
	if err := json.Unmarshal(b, into); err != nil {
		return &Error{Kind: Invalid, Code: ErrLogin, Message: p.Issuer + " gave an answer that is not JSON", Err: err}
	}
	return nil
}
