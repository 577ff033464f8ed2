package oauthserver

import (
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

// MaxTokenLifetime bounds every access token, so that a key can be forgotten that long after its last use.
const MaxTokenLifetime = 30 * 24 * time.Hour

// Config is the section `oauthServer` of the configuration.
type Config struct {
	// Issuer is the `iss` of all tokens, an http or https URL. It is fixed at the first start: another one later is an error,
	// because devices and applications hold tokens with the old one. Default: the hub's HTTP address then, and /oauth.
	Issuer string `yaml:"issuer"`
	// Audience is the `aud` of all access tokens, that the hub's doors ask for. Default coaphub.
	Audience string `yaml:"audience"`
	// DeviceIDClaim names the claim with the device's ID in a device's token. Default device_id.
	DeviceIDClaim string `yaml:"deviceIDClaim"`
	// AccessTokenLifetime is how long an access token is good, at most 30d. A device's is good for up to a tenth less, so that
	// devices that came together do not refresh together. Default 1h.
	AccessTokenLifetime time.Duration `yaml:"accessTokenLifetime"`
	// RefreshTokenLifetime is how long a refresh token is good after its last use; a device that is off for longer has to be
	// onboarded again. Default 90d.
	RefreshTokenLifetime time.Duration `yaml:"refreshTokenLifetime"`
	// CodeLifetime is how long a device has to sign up with its authorization code. Default 15m.
	CodeLifetime time.Duration `yaml:"codeLifetime"`
	// KeyLifetime is how long one key signs before the next one, which was published long before, takes over. Default 30d.
	KeyLifetime time.Duration `yaml:"keyLifetime"`
	// InitialPassword is the first password of the account admin, which must be changed at its first use. Default: a random
	// one that the hub shows at its start.
	InitialPassword conf.Secret `yaml:"initialPassword"`
	// Clients are the hub's own clients.
	Clients ClientsConfig `yaml:"clients"`
	// Machines are programs that get tokens with a secret of their own (client credentials).
	Machines []MachineConfig `yaml:"machines"`

	// BaseURL is where the hub's HTTP listener is reached now; set by whoever wires the parts. Endpoints are published below
	// it, at the issuer's path.
	BaseURL string `yaml:"-"`
	// Several says that other processes serve the same documents at the same time. Then a start leaves the one-time password of the first
	// account as another one has set and shown it.
	Several bool `yaml:"-"`
	// Ended is told that the tokens of a grant (GrantOf) were ended here before their time, once that is stored; for one grant maybe
	// more than once. It must not block. Nil: nobody wants to know. See Follow for what others end.
	Ended func(grant string) `yaml:"-"`
}

// ClientsConfig are the clients that every hub has.
type ClientsConfig struct {
	// Web is the web console: public, with PKCE.
	Web ClientConfig `yaml:"web"`
	// CLI is the command line: public, with PKCE on a loopback address with any port, or with the device grant.
	CLI ClientConfig `yaml:"cli"`
	// Device is what devices' codes and tokens are issued to. Its codes are redeemed by the hub alone, at sign-up.
	Device ClientConfig `yaml:"device"`
}

// ClientConfig is one of the hub's own clients.
type ClientConfig struct {
	// ID is the client_id.
	ID string `yaml:"id"`
	// RedirectURIs are where codes may be sent, compared exactly. Default for web: the hub's HTTP address with / and
	// /callback; for cli: /callback on loopback; for device: none.
	RedirectURIs []string `yaml:"redirectURIs"`
}

// MachineConfig is a program with client credentials.
type MachineConfig struct {
	// ID is the client_id.
	ID string `yaml:"id"`
	// Secret is the client_secret, at least 16 characters.
	Secret conf.Secret `yaml:"secret"`
	// Owner is the account it acts for; that account's roles bound its scopes.
	Owner string `yaml:"owner"`
	// Scopes are what it may ask for.
	Scopes []string `yaml:"scopes"`
}

// Default returns the configuration of a hub without a configuration file.
func Default() Config {
	return Config{
		Audience: "coaphub", DeviceIDClaim: "device_id",
		AccessTokenLifetime: time.Hour, RefreshTokenLifetime: 90 * 24 * time.Hour, CodeLifetime: 15 * time.Minute,
		KeyLifetime: 30 * 24 * time.Hour,
		Clients: ClientsConfig{
			Web:    ClientConfig{ID: "coaphub-web"},
			CLI:    ClientConfig{ID: "coaphub-cli"},
			Device: ClientConfig{ID: "coaphub-device"},
		},
	}
}

// registered are the claims that a device ID cannot be in.
var registeredClaims = []string{"iss", "sub", "aud", "exp", "nbf", "iat", "jti", "client_id", "scope", "token_use"}

// Validate reports all mistakes, each with the full path of its key.
func (c Config) Validate() []error {
	var errs []error
	bad := func(key, format string, args ...any) {
		errs = append(errs, fmt.Errorf("oauthServer.%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if c.Issuer != "" {
		u, err := url.Parse(c.Issuer)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" ||
			u.User != nil || strings.HasSuffix(c.Issuer, "/") {
			bad("issuer", "%q is not an http or https URL without query, fragment and final slash", c.Issuer)
		}
	}
	if c.Audience == "" {
		bad("audience", "must not be empty")
	}
	if c.DeviceIDClaim == "" || slices.Contains(registeredClaims, c.DeviceIDClaim) {
		bad("deviceIDClaim", "%q cannot hold the device ID", c.DeviceIDClaim)
	}
	within := func(key string, d, low, high time.Duration) {
		if d < low || d > high {
			bad(key, "%s is not between %s and %s", d, low, high)
		}
	}
	within("accessTokenLifetime", c.AccessTokenLifetime, time.Second, MaxTokenLifetime)
	within("refreshTokenLifetime", c.RefreshTokenLifetime, time.Minute, 10*365*24*time.Hour)
	within("codeLifetime", c.CodeLifetime, time.Second, 24*time.Hour)
	within("keyLifetime", c.KeyLifetime, time.Hour, 10*365*24*time.Hour)
	seen := map[string]bool{}
	id := func(key, v string) {
		if v == "" || seen[v] {
			bad(key, "%q is empty or not unique among the clients", v)
		}
		seen[v] = true
	}
	id("clients.web.id", c.Clients.Web.ID)
	id("clients.cli.id", c.Clients.CLI.ID)
	id("clients.device.id", c.Clients.Device.ID)
	for name, client := range map[string]ClientConfig{"web": c.Clients.Web, "cli": c.Clients.CLI, "device": c.Clients.Device} {
		for _, uri := range client.RedirectURIs {
			if u, err := url.Parse(uri); err != nil || u.Scheme == "" || u.Fragment != "" || strings.Contains(uri, "*") {
				bad("clients."+name+".redirectURIs", "%q is not an absolute URI without fragment", uri)
			}
		}
	}
	for i, m := range c.Machines {
		key := fmt.Sprintf("machines[%d].", i)
		id(key+"id", m.ID)
		if len(m.Secret.Reveal()) < 16 {
			bad(key+"secret", "is shorter than 16 characters")
		}
		if _, err := accountName(m.Owner); err != nil {
			bad(key+"owner", "%q is not an account's name", m.Owner)
		}
		for _, s := range m.Scopes {
			if !slices.Contains(machineScopes, s) {
				bad(key+"scopes", "%q is none of %s", s, strings.Join(machineScopes, ", "))
			}
		}
	}
	return errs
}

var machineScopes = []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin, hub.ScopeDeviceSignUp}
