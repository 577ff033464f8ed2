package oauthserver

import (
	"crypto/sha256"
	"crypto/subtle"
	"slices"
	"strings"
	"time"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/coaphub/coaphub/hub"
)

// protocolScopes are OpenID's own, which say nothing about devices.
var protocolScopes = []string{oidc.ScopeOpenID, oidc.ScopeProfile, oidc.ScopeOfflineAccess}

// apiScopes are the ones that an application may have.
var apiScopes = []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin, hub.ScopeDeviceSignUp}

// client is op.Client.
type client struct {
	id        string
	name      string // for the login page
	kind      op.ApplicationType
	secret    [sha256.Size]byte // of machines
	owner     string            // of machines: the account it acts for
	redirects []string
	logouts   []string
	grants    []oidc.GrantType
	scopes    []string
	login     string // path of the login page
	dev       bool   // http redirect URIs are allowed, because the hub itself is on http
}

// clients makes the table of all clients from the configuration. base is where the hub is reached.
func clients(cfg Config, base, login string) map[string]*client {
	dev := strings.HasPrefix(base, "http://")
	web := cfg.Clients.Web.RedirectURIs
	if len(web) == 0 && base != "" {
		web = []string{base + "/", base + "/callback"}
	}
	cli := cfg.Clients.CLI.RedirectURIs
	if len(cli) == 0 {
		// RFC 8252, Section 7.3: the port is chosen by the application at the time of the request.
		cli = []string{"http://127.0.0.1/callback", "http://[::1]/callback", "http://localhost/callback"}
	}
	user := slices.Concat(protocolScopes, []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin})
	out := map[string]*client{
		cfg.Clients.Web.ID: {
			id: cfg.Clients.Web.ID, name: "the hub's web console", kind: op.ApplicationTypeUserAgent, redirects: web, logouts: web, login: login, dev: dev,
			grants: []oidc.GrantType{oidc.GrantTypeCode, oidc.GrantTypeRefreshToken}, scopes: user,
		},
		cfg.Clients.CLI.ID: {
			id: cfg.Clients.CLI.ID, name: "the command line", kind: op.ApplicationTypeNative, redirects: cli, login: login,
			grants: []oidc.GrantType{oidc.GrantTypeCode, oidc.GrantTypeRefreshToken, oidc.GrantTypeDeviceCode}, scopes: user,
		},
		cfg.Clients.Device.ID: { // no grants: its codes and tokens are exchanged by the hub itself, never over HTTP
			id: cfg.Clients.Device.ID, name: "a device that joins the hub", kind: op.ApplicationTypeNative, redirects: cfg.Clients.Device.RedirectURIs,
			login: login, dev: dev, scopes: []string{oidc.ScopeOpenID, oidc.ScopeOfflineAccess, hub.ScopeDevice},
		},
	}
	for _, m := range cfg.Machines {
		out[m.ID] = &client{
			id: m.ID, name: m.ID, kind: op.ApplicationTypeWeb, secret: sha256.Sum256([]byte(m.Secret.Reveal())), owner: strings.ToLower(m.Owner),
			grants: []oidc.GrantType{oidc.GrantTypeClientCredentials}, scopes: m.Scopes, login: login,
		}
	}
	return out
}

// is reports whether the secret is the machine's. Clients without a secret have none that is right.
func (c *client) is(secret string) bool {
	sum := sha256.Sum256([]byte(secret))
	return c.kind == op.ApplicationTypeWeb && subtle.ConstantTimeCompare(sum[:], c.secret[:]) == 1
}

func (c *client) GetID() string                       { return c.id }
func (c *client) RedirectURIs() []string              { return c.redirects }
func (c *client) PostLogoutRedirectURIs() []string    { return c.logouts }
func (c *client) ApplicationType() op.ApplicationType { return c.kind }

// AuthMethod is Basic for machines; everybody else is public.
func (c *client) AuthMethod() oidc.AuthMethod {
	if c.kind == op.ApplicationTypeWeb {
		return oidc.AuthMethodBasic
	}
	return oidc.AuthMethodNone
}

func (c *client) ResponseTypes() []oidc.ResponseType {
	if c.kind == op.ApplicationTypeWeb {
		return nil
	}
	return []oidc.ResponseType{oidc.ResponseTypeCode}
}
func (c *client) GrantTypes() []oidc.GrantType         { return c.grants }
func (c *client) LoginURL(id string) string            { return c.login + "?request=" + id }
func (c *client) AccessTokenType() op.AccessTokenType  { return op.AccessTokenTypeJWT }
func (c *client) IDTokenLifetime() time.Duration       { return time.Hour }
func (c *client) DevMode() bool                        { return c.dev }
func (c *client) IsScopeAllowed(scope string) bool     { return slices.Contains(c.scopes, scope) }
func (c *client) IDTokenUserinfoClaimsAssertion() bool { return false }
func (c *client) ClockSkew() time.Duration             { return 0 }
func (c *client) RestrictAdditionalIdTokenScopes() func([]string) []string {
	return func(scopes []string) []string { return scopes }
}

func (c *client) RestrictAdditionalAccessTokenScopes() func([]string) []string {
	return func(scopes []string) []string { return scopes }
}

var _ op.Client = (*client)(nil)
