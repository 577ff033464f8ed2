package auth

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

// Config is the section "authorization": which tokens the doors accept. The fields next to Issuers hold for every issuer
// that does not say otherwise.
type Config struct {
	// OwnerClaim names the top-level claim that is the principal. Default "sub".
	OwnerClaim string `yaml:"ownerClaim"`
	// DeviceIDClaim names the top-level claim with the device's ID, taken literally (URIs are usual). Default empty: none.
	DeviceIDClaim string `yaml:"deviceIDClaim"`
	// Audience lists what a token's aud must contain one of. Default empty: each issuer must then name its own.
	Audience []string `yaml:"audience"`
	// DefaultScopes are the scopes of a token that says nothing about scopes. Default empty: such a token may do nothing.
	DefaultScopes []string `yaml:"defaultScopes"`
	// DeviceClients are the client IDs (azp, client_id) whose tokens are devices' tokens. Default empty.
	DeviceClients []string `yaml:"deviceClients"`
	// ClockSkew is how far the provider's clock may be off. Default 30s, at most 5m.
	ClockSkew time.Duration `yaml:"clockSkew"`
	// Issuers are external providers. Default empty: only the embedded one.
	Issuers []IssuerConfig `yaml:"issuers"`
	// WebClient is the console's client at the first issuer, a public one with PKCE whose redirect URI is the hub's HTTP address with
	// a slash. Default empty: nobody can sign in to the console. The embedded provider has one of its own.
	WebClient WebClientConfig `yaml:"webClient"`
}

// WebClientConfig is a client at an external provider.
type WebClientConfig struct {
	// ID is the client_id.
	ID string `yaml:"id"`
	// Audience goes into the authorize request, where a provider wants it to give tokens for this API. Default empty: it is not sent.
	Audience string `yaml:"audience"`
	// Scopes are what the console asks for. Default empty: openid, offline_access and what the API asks for.
	Scopes []string `yaml:"scopes"`
}

// IssuerConfig is one issuer whose tokens are accepted.
type IssuerConfig struct {
	// Authority is the issuer's URL, the same as in the tokens' iss except for a slash at the end. https, or http on
	// loopback.
	Authority string `yaml:"authority"`
	// Audience, OwnerClaim, DeviceIDClaim, DefaultScopes and DeviceClients are those of authorization; empty takes what is said there.
	Audience      []string `yaml:"audience"`
	OwnerClaim    string   `yaml:"ownerClaim"`
	DeviceIDClaim string   `yaml:"deviceIDClaim"`
	DefaultScopes []string `yaml:"defaultScopes"`
	DeviceClients []string `yaml:"deviceClients"`
	// OwnerPrefix stands before the owner claim's text, so that equal texts of two issuers are two owners. The first issuer
	// has none, every further one needs one of its own.
	OwnerPrefix string `yaml:"ownerPrefix"`
	// CAPool are files with PEM certificates to trust besides the system's for the issuer's HTTPS. Default empty.
	CAPool []string `yaml:"caPool"`

	// Keys gives the key set of an issuer in this process; no HTTP is done then, and Authority may be any URL.
	Keys func(context.Context) (jose.JSONWebKeySet, error) `yaml:"-"`
	// Revoked reports whether a token with these claims was revoked before its end; nil: none is. It is asked for every
	// token, also for a remembered one, so it must be quick.
	Revoked func(context.Context, Token) (bool, error) `yaml:"-"`
	// Grant returns what a token with this jti was issued on, which becomes hub.Claims.Grant; nil: the issuer tells no ends.
	Grant func(tokenID string) string `yaml:"-"`
}

// Token is what a Revoked function may look at.
type Token struct {
	ID       string // jti, may be empty
	Issuer   string
	Subject  string
	ClientID string
	IssuedAt time.Time // zero when the token has no iat
	Expiry   time.Time
}

// Default returns the configuration that an empty file means.
func Default() Config { return Config{OwnerClaim: "sub", ClockSkew: 30 * time.Second} }

const maxSkew = 5 * time.Minute

// Validate returns all mistakes together, each with its path below "authorization". It accepts a Config without issuers:
// the embedded provider is added by whoever runs it.
func (c Config) Validate() []error {
	var errs []error
	if c.OwnerClaim == "" {
		errs = append(errs, errors.New("authorization.ownerClaim: is empty; the default is sub"))
	}
	if c.ClockSkew < 0 || c.ClockSkew > maxSkew {
		errs = append(errs, fmt.Errorf("authorization.clockSkew: %v is not between 0 and %v", c.ClockSkew, maxSkew))
	}
	if len(c.Issuers) == 0 && c.WebClient.ID != "" {
		errs = append(errs, errors.New("authorization.webClient.id: is for an external provider (authorization.issuers); the embedded one has oauthServer.clients.web.id"))
	}
	if len(c.Issuers) > 0 {
		errs = append(errs, validate(c.Resolve(c.Issuers...))...)
	}
	return errs
}

// Resolve fills what the given issuers leave empty with what c says for all.
func (c Config) Resolve(issuers ...IssuerConfig) []IssuerConfig {
	out := make([]IssuerConfig, len(issuers))
	for i, is := range issuers {
		if len(is.Audience) == 0 {
			is.Audience = c.Audience
		}
		if is.OwnerClaim == "" {
			is.OwnerClaim = c.OwnerClaim
		}
		if is.DeviceIDClaim == "" {
			is.DeviceIDClaim = c.DeviceIDClaim
		}
		if len(is.DefaultScopes) == 0 {
			is.DefaultScopes = c.DefaultScopes
		}
		if len(is.DeviceClients) == 0 {
			is.DeviceClients = c.DeviceClients
		}
		out[i] = is
	}
	return out
}

func validate(issuers []IssuerConfig) []error {
	var errs []error
	bad := func(i int, key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("authorization.issuers[%d].%s: %s", i, key, fmt.Sprintf(format, args...)))
	}
	if len(issuers) == 0 {
		errs = append(errs, errors.New("authorization.issuers: there is no issuer"))
	}
	for i, is := range issuers {
		if is.Keys == nil {
			if err := checkURL(is.Authority); err != nil {
				bad(i, "authority", "%v", err)
			}
		} else if is.Authority == "" {
			bad(i, "authority", "is empty")
		}
		if len(is.Audience) == 0 {
			// Without it, a token that the same provider made for any other service would be good here.
			bad(i, "audience", "is empty: name the audience that tokens for this hub carry")
		}
		for _, a := range is.Audience {
			if a == "" {
				bad(i, "audience", "has an empty entry")
			}
		}
		if i == 0 && is.OwnerPrefix != "" {
			bad(i, "ownerPrefix", "the first issuer's owners keep their plain names; only further issuers have a prefix")
		}
		if i > 0 && is.OwnerPrefix == "" {
			bad(i, "ownerPrefix", "is empty: owners of a further issuer need a prefix of their own, such as %q", "partner:")
		}
		for j, other := range issuers[:i] {
			if sameIssuer(is.Authority, other.Authority) {
				bad(i, "authority", "is the same as that of issuers[%d]", j)
			}
			if j > 0 && is.OwnerPrefix != "" && other.OwnerPrefix != "" &&
				(strings.HasPrefix(is.OwnerPrefix, other.OwnerPrefix) || strings.HasPrefix(other.OwnerPrefix, is.OwnerPrefix)) {
				bad(i, "ownerPrefix", "%q and %q of issuers[%d] begin alike, so two principals could get one name", is.OwnerPrefix, other.OwnerPrefix, j)
			}
		}
	}
	return errs
}

// checkURL wants https, or http to this machine: keys and secrets that come in the clear are no keys and no secrets.
func checkURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case err != nil:
		return errors.New("is no URL")
	case u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil:
		return fmt.Errorf("%q is not of the form https://host[:port][/path]", s)
	case u.Scheme == "https":
		return nil
	case u.Scheme == "http" && loopback(u.Hostname()):
		return nil
	}
	return fmt.Errorf("%q is neither https nor http on loopback", s)
}

func loopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// sameIssuer compares without a slash at the end: providers and their users disagree about it.
func sameIssuer(a, b string) bool { return strings.TrimSuffix(a, "/") == strings.TrimSuffix(b, "/") }

// tlsConfig trusts the system's roots and those in files.
func tlsConfig(files []string) (*tls.Config, error) {
	cfg := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(files) == 0 {
		return cfg, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool() // a machine without any
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			return nil, fmt.Errorf("caPool: %w", err)
		}
		if !pool.AppendCertsFromPEM(text) {
			return nil, fmt.Errorf("caPool: %s has no PEM certificate", f)
		}
	}
	cfg.RootCAs = pool
	return cfg, nil
}
