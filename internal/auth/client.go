package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// ClientConfig is the hub's account at an external provider, for devices' codes and refresh tokens.
type ClientConfig struct {
	Authority string // the issuer's URL: https, or http on loopback
	ClientID  string
	// ClientSecretFile holds the secret; blanks around it are cut. Empty: a public client, which sends its ID only.
	ClientSecretFile string
	RedirectURL      string   // must be the one the code was asked for with; empty: not sent
	Scopes           []string // asked for at refresh and exchange where a provider wants that; empty: not sent
	Audience         string   // sent as "audience" where a provider wants that; empty: not sent
	// AuthStyle is inHeader (HTTP Basic), inParams (in the form), or empty: what the provider says it can.
	AuthStyle string
	CAPool    []string // files with PEM certificates to trust besides the system's
	// HTTPClient asks the provider; nil: one that trusts CAPool.
	HTTPClient *http.Client
}

// Client exchanges codes and refresh tokens with an OpenID provider over HTTP. Any goroutine may use it.
//
// Devices lose answers: on a connection that breaks in time they ask again with the same code or refresh token, which the
// provider takes only once. So an answer may be had again for a while by who asks for the same thing in the same way.
type Client struct {
	cfg    ClientConfig
	secret string
	http   *http.Client
	kept   *answers

	stop context.CancelFunc
	ctx  context.Context
	done sync.WaitGroup // requests under way

	mu    sync.Mutex // guards all below
	meta  discovery
	until time.Time // when meta is asked for again
}

// metaTTL is how long a provider's metadata is believed.
const metaTTL = time.Hour

// NewClient makes a Client; nothing is asked of the provider yet. Close ends it.
func NewClient(cfg ClientConfig) (*Client, error) {
	var errs []error
	if err := checkURL(cfg.Authority); err != nil {
		errs = append(errs, fmt.Errorf("authority: %w", err))
	}
	if cfg.ClientID == "" {
		errs = append(errs, errors.New("clientID: is empty"))
	}
	if !slices.Contains([]string{"", "autoDetect", "inHeader", "inParams"}, cfg.AuthStyle) {
		errs = append(errs, fmt.Errorf("authStyle: %q is none of autoDetect, inHeader, inParams", cfg.AuthStyle))
	}
	c := &Client{cfg: cfg, http: cfg.HTTPClient, kept: newAnswers()}
	if cfg.ClientSecretFile != "" {
		text, err := os.ReadFile(cfg.ClientSecretFile)
		if err != nil {
			errs = append(errs, fmt.Errorf("clientSecretFile: %w", err))
		} else if c.secret = strings.TrimSpace(string(text)); c.secret == "" {
			errs = append(errs, fmt.Errorf("clientSecretFile: %s is empty", cfg.ClientSecretFile))
		}
	}
	if c.http == nil {
		var err error
		if c.http, err = newHTTPClient(cfg.CAPool); err != nil {
			errs = append(errs, err)
		}
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	c.ctx, c.stop = context.WithCancel(context.Background())
	return c, nil
}

// Close ends requests under way and waits for them.
func (c *Client) Close() {
	c.stop()
	c.done.Wait()
	c.http.CloseIdleConnections()
}

// Exchange redeems a code for the device. The same code for the same device and credential gives the same tokens again for
// 60 s; whoever asks while the provider is being asked waits for that answer. Kinds: Invalid for an empty code,
// Unauthenticated when the provider refused the code, Unavailable for everything else that goes wrong, also when the
// provider refuses the hub itself.
func (c *Client) Exchange(ctx context.Context, dev hub.DeviceID, credential, code string) (hub.Tokens, error) {
	const op = "auth.Exchange"
	if code == "" || len(code) > maxToken {
		return hub.Tokens{}, hub.NewError(hub.Invalid, "code-invalid", "the code is empty or too long").With(op, nil)
	}
	q := inquire("code", string(dev), credential, code)
	t, _, err := c.once(ctx, op, q, func(ctx context.Context) (hub.Tokens, time.Duration, error) {
		form := url.Values{"grant_type": {"authorization_code"}, "code": {code}}
		if c.cfg.RedirectURL != "" {
			form.Set("redirect_uri", c.cfg.RedirectURL)
		}
		t, err := c.token(ctx, op, form)
		// A provider does not tell when it gave the code. It is good once and for minutes (RFC 6749, Section 4.1.2), so it was lately.
		t.Authorized = time.Now().UTC()
		return t, codeWindow, err
	})
	return t, err
}

// Refresh gives new tokens for a refresh token of the device. Where the provider sends no new refresh token the old one is
// returned and stays good (RFC 6749, 6). A refresh token whose answer was lost may be used again until the new one has been
// used, at most 24 h. Kinds as of Exchange.
func (c *Client) Refresh(ctx context.Context, dev hub.DeviceID, refresh string) (hub.Tokens, error) {
	const op = "auth.Refresh"
	if refresh == "" || len(refresh) > maxToken {
		return hub.Tokens{}, hub.NewError(hub.Invalid, "refresh-token-invalid", "the refresh token is empty or too long").With(op, nil)
	}
	return c.refresh(ctx, dev, refresh, true)
}

// refresh is Refresh. byDevice is false when we go on with a refresh token that the device never got.
func (c *Client) refresh(ctx context.Context, dev hub.DeviceID, refresh string, byDevice bool) (hub.Tokens, error) {
	const op = "auth.Refresh"
	q := inquire("refresh", string(dev), "", refresh)
	t, repeated, err := c.once(ctx, op, q, func(ctx context.Context) (hub.Tokens, time.Duration, error) {
		form := url.Values{"grant_type": {"refresh_token"}, "refresh_token": {refresh}}
		t, err := c.token(ctx, op, form)
		window := refreshWindow
		if err == nil && (t.Refresh == "" || t.Refresh == refresh) {
			t.Refresh, window = refresh, 0 // not used up by its use, so nothing has to be kept
		}
		return t, window, err
	})
	if err != nil {
		return hub.Tokens{}, err
	}
	if byDevice {
		c.kept.used(q) // the device has this refresh token, so it will not ask with the one before
	}
	if t.Refresh == refresh {
		return t, nil
	}
	c.kept.follow(inquire("refresh", string(dev), "", t.Refresh), q)
	if repeated && !t.Expiry.IsZero() && !time.Now().Before(t.Expiry) {
		// A repeat so late that the kept access token has expired. The device does not have the kept refresh token; we do.
		return c.refresh(ctx, dev, t.Refresh, false)
	}
	return t, nil
}

// Revoke asks the provider to make the tokens useless (RFC 7009). Kinds: Unsupported when the provider has no revocation
// endpoint, otherwise Unavailable.
func (c *Client) Revoke(ctx context.Context, t hub.Tokens) error {
	const op = "auth.Revoke"
	meta, err := c.metadata(ctx)
	if err != nil {
		return unavailable(op, err)
	}
	if meta.RevocationEndpoint == "" {
		return hub.NewError(hub.Unsupported, "revocation-unsupported", "the identity provider cannot revoke tokens").With(op, nil)
	}
	c.kept.forget(t)
	for hint, token := range map[string]string{"refresh_token": t.Refresh, "access_token": t.Access} {
		if token == "" {
			continue
		}
		status, _, err := c.post(ctx, meta, meta.RevocationEndpoint, url.Values{"token": {token}, "token_type_hint": {hint}})
		if err != nil {
			return unavailable(op, err)
		}
		if status != http.StatusOK {
			return unavailable(op, fmt.Errorf("revoke the %s: status %d", hint, status))
		}
	}
	return nil
}

// once gives the kept answer of an inquiry, waits for the one under way, or asks; repeated is false in the last case. Asking goes on
// when the caller leaves: a code is used up by it, and the device that comes back must get the answer.
func (c *Client) once(
	ctx context.Context, op string, q inquiry, ask func(context.Context) (hub.Tokens, time.Duration, error),
) (t hub.Tokens, repeated bool, err error) {
	if c.ctx.Err() != nil {
		return hub.Tokens{}, false, unavailable(op, c.ctx.Err())
	}
	t, found, f, first := c.kept.join(q)
	switch {
	case found:
		return t, true, nil
	case f == nil:
		return hub.Tokens{}, false, unavailable(op, errors.New("too many requests to the provider are under way"))
	case first:
		c.done.Go(func() {
			ctx, stop := context.WithTimeout(c.ctx, 2*fetchTimeout)
			defer stop()
			t, window, err := ask(ctx)
			c.kept.end(q, f, t, window, err)
		})
	}
	select {
	case <-f.ready:
		return f.tokens, !first, f.err
	case <-ctx.Done():
		return hub.Tokens{}, false, unavailable(op, ctx.Err())
	}
}

// token asks the token endpoint (RFC 6749, 5).
func (c *Client) token(ctx context.Context, op string, form url.Values) (hub.Tokens, error) {
	meta, err := c.metadata(ctx)
	if err != nil {
		return hub.Tokens{}, unavailable(op, err)
	}
	if meta.TokenEndpoint == "" {
		return hub.Tokens{}, unavailable(op, fmt.Errorf("%s has no token endpoint", c.cfg.Authority))
	}
	if len(c.cfg.Scopes) > 0 && form.Get("grant_type") == "refresh_token" {
		form.Set("scope", strings.Join(c.cfg.Scopes, " "))
	}
	if c.cfg.Audience != "" {
		form.Set("audience", c.cfg.Audience)
	}
	asked := time.Now()
	status, body, err := c.post(ctx, meta, meta.TokenEndpoint, form)
	if err != nil {
		return hub.Tokens{}, unavailable(op, err)
	}
	switch status {
	case http.StatusOK:
	case http.StatusBadRequest, http.StatusUnauthorized, http.StatusForbidden:
		return hub.Tokens{}, refused(op, status, body)
	default:
		return hub.Tokens{}, unavailable(op, fmt.Errorf("the token endpoint answered %d", status))
	}
	var a struct {
		Access  string          `json:"access_token"`
		Type    string          `json:"token_type"`
		Refresh string          `json:"refresh_token"`
		Expires json.RawMessage `json:"expires_in"`
	}
	if err := json.Unmarshal(body, &a); err != nil {
		return hub.Tokens{}, unavailable(op, fmt.Errorf("read the token endpoint's answer: %w", err))
	}
	if a.Access == "" || a.Type != "" && !strings.EqualFold(a.Type, "Bearer") {
		return hub.Tokens{}, unavailable(op, fmt.Errorf("the token endpoint gave no bearer token but type %q", a.Type))
	}
	t := hub.Tokens{Access: a.Access, Refresh: a.Refresh}
	if text := strings.Trim(string(a.Expires), `"`); text != "" && text != "null" { // some providers send it as text
		sec, err := json.Number(text).Float64()
		if err != nil || sec < 0 || sec > 100*365*24*3600 {
			return hub.Tokens{}, unavailable(op, fmt.Errorf("the token endpoint's expires_in is %q", text))
		}
		t.Expiry = asked.Add(time.Duration(sec * float64(time.Second))).UTC().Round(0) // a kept answer is the same one
	}
	return t, nil
}

// refused tells a refused code from a refused hub (RFC 6749, 5.2). Only the first is the device's fault; if the hub's own
// account at the provider is wrong, no device may lose its credentials over it.
func refused(op string, status int, body []byte) error {
	var e struct {
		Code string `json:"error"`
		Text string `json:"error_description"`
	}
	_ = json.Unmarshal(body, &e) // providers send web pages too; then the status alone decides
	cause := fmt.Errorf("the token endpoint answered %d %q %q", status, e.Code, e.Text)
	switch e.Code {
	case "invalid_client", "unauthorized_client", "unsupported_grant_type", "invalid_scope", "server_error", "temporarily_unavailable":
		return unavailable(op, cause)
	}
	return (&hub.Error{Kind: hub.Unauthenticated, Code: "code-refused", Text: "the identity provider refused it"}).With(op, cause)
}

func (c *Client) post(ctx context.Context, meta discovery, address string, form url.Values) (int, []byte, error) {
	ctx, stop := context.WithTimeout(ctx, fetchTimeout)
	defer stop()
	// OpenID Connect Discovery, 3: client_secret_basic when the provider says nothing.
	inForm := c.secret == "" || c.cfg.AuthStyle == "inParams" || c.cfg.AuthStyle != "inHeader" &&
		len(meta.TokenAuthMethods) > 0 && !slices.Contains(meta.TokenAuthMethods, "client_secret_basic")
	if inForm {
		form.Set("client_id", c.cfg.ClientID)
		if c.secret != "" {
			form.Set("client_secret", c.secret)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, address, strings.NewReader(form.Encode()))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	req.Header.Set("Accept", "application/json")
	if !inForm {
		req.SetBasicAuth(url.QueryEscape(c.cfg.ClientID), url.QueryEscape(c.secret)) // RFC 6749, 2.3.1
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := readBody(resp.Body)
	if err != nil {
		return 0, nil, fmt.Errorf("POST %s: %w", address, err)
	}
	return resp.StatusCode, body, nil
}

// metadata is asked for at most once an hour; while it cannot be had, the old one is used.
func (c *Client) metadata(ctx context.Context) (discovery, error) {
	c.mu.Lock()
	meta, until := c.meta, c.until
	c.mu.Unlock()
	if time.Now().Before(until) {
		return meta, nil
	}
	ctx, stop := context.WithTimeout(ctx, fetchTimeout)
	defer stop()
	fresh, err := discover(ctx, c.http, c.cfg.Authority)
	if err != nil {
		if meta.TokenEndpoint != "" {
			return meta, nil
		}
		return discovery{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.meta, c.until = fresh, time.Now().Add(metaTTL)
	return fresh, nil
}
