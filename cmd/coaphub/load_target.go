package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/oauth2"
	"golang.org/x/oauth2/clientcredentials"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/load"
)

// loadTarget is the hub that is measured: the one of this data folder, or any with --server.
type loadTarget struct {
	api    apiFlags
	owners int
	scheme string
	psk    bool
	mine   bool

	coap, provider         string
	deviceCA, deviceCAKey  string // files
	codes                  string // file
	clientID, clientSecret string // the latter a file
}

func (l *loadTarget) add(cmd *cobra.Command) {
	l.api.add(cmd)
	fl := cmd.Flags()
	fl.Lookup("json").Usage = "print the figures as JSON"
	fl.Lookup("token-file").Usage = "file with the access tokens for --server, one for each owner; - is standard input"
	fl.IntVar(&l.owners, "owners", 1, "how many owners the devices are spread over; with --server as many as it has tokens")
	fl.StringVar(&l.scheme, "scheme", "coaps+tcp", "how the devices get to the hub: coaps+tcp, coaps, coap+tcp or coap")
	fl.BoolVar(&l.psk, "psk", false, "the devices have pre-shared keys in place of certificates, with --scheme coaps")
	fl.StringVar(&l.coap, "coap", "", "where devices get to the hub of --server, like coaps://hub.example:5684 (default what the hub says)")
	fl.StringVar(&l.deviceCA, "device-ca", "", "file with a CA that the hub of --server takes devices' certificates of (PEM); theirs are made with it")
	fl.StringVar(&l.deviceCAKey, "device-ca-key", "", "file with the key of --device-ca (PEM)")
	fl.StringVar(&l.codes, "code-file", "", "file with the authorization codes, or JWTs, that devices of --server sign up with: one for each device, or for each owner one that works again and again")
	fl.StringVar(&l.provider, "provider", "", "authorization provider of the devices of --server")
	fl.StringVar(&l.clientID, "client-id", "", "OAuth client that gets the token for --server by its own credentials, in place of --token")
	fl.StringVar(&l.clientSecret, "client-secret-file", "", "file with the secret of --client-id")
	fl.BoolVar(&l.mine, "yes-this-is-mine", false, "measure a hub that is not on this machine's loopback")
}

// maxOwners bounds the accounts that load makes.
const maxOwners = 1000

func (l *loadTarget) check() error {
	elsewhere := l.coap + l.provider + l.deviceCA + l.deviceCAKey + l.codes + l.clientID + l.clientSecret
	switch {
	case l.owners < 1 || l.owners > maxOwners:
		return usage("--owners must be from 1 to %d", maxOwners)
	case l.psk && l.scheme != "coaps":
		return usage("--psk goes with --scheme coaps")
	case !slices.Contains([]string{"coaps+tcp", "coaps", "coap+tcp", "coap"}, l.scheme):
		return usage("--scheme: %q is none of coaps+tcp, coaps, coap+tcp and coap", l.scheme)
	case l.api.server == "" && l.api.token+l.api.tokenFile+l.api.ca != "":
		return usage("--token, --token-file and --ca belong to --server")
	case l.api.server == "" && elsewhere != "":
		return usage("--coap, --provider, --device-ca, --device-ca-key, --code-file, --client-id and --client-secret-file belong to --server")
	case l.api.server != "" && l.psk:
		return usage("--psk is for the hub of this data folder")
	case (l.deviceCA == "") != (l.deviceCAKey == ""):
		return usage("--device-ca and --device-ca-key go together")
	case (l.clientID == "") != (l.clientSecret == ""):
		return usage("--client-id and --client-secret-file go together")
	case l.clientID != "" && l.api.token+l.api.tokenFile != "":
		return usage("--client-id is in place of --token and --token-file")
	}
	return nil
}

// open fills in where the hub is, who asks, and how devices are let in.
func (l *loadTarget) open(cmd *cobra.Command, p process, cfg *load.Config) error {
	if l.api.server == "" {
		return l.here(cmd, cfg)
	}
	return l.elsewhere(cmd, p, cfg)
}

// allowed refuses what is not on loopback, so that nobody is measured by mistake.
func (l *loadTarget) allowed(ctx context.Context, at string) error {
	if l.mine || loopback(ctx, net.DefaultResolver.LookupNetIP, at) {
		return nil
	}
	return fmt.Errorf("%s is not this machine's loopback: say --yes-this-is-mine if nobody else lives there", at)
}

// here measures the hub of this data folder, whose socket makes accounts, tokens and codes.
func (l *loadTarget) here(cmd *cobra.Command, cfg *load.Config) error {
	ctx := cmd.Context()
	c, err := control(cmd)
	if err != nil {
		return err
	}
	st, err := c.Status(ctx)
	if err != nil {
		return err
	}
	at, _ := endpoint(st.Endpoints, l.scheme)
	if at == "" {
		return fmt.Errorf("the hub has no %s endpoint", l.scheme)
	}
	for _, a := range []string{at, st.Endpoints.HTTP} {
		if err := l.allowed(ctx, a); err != nil {
			return err
		}
	}
	if len(cfg.PIDs) == 0 && st.PID > 0 {
		cfg.PIDs = []int{st.PID}
	}
	cfg.API = load.API{URL: st.Endpoints.HTTP}
	if strings.HasPrefix(cfg.API.URL, "https:") {
		if cfg.API.TLS, err = webTLS(ctx, c); err != nil {
			return err
		}
	}
	var owners []*onboarder
	for i := range l.owners {
		name := "" // the first administrator
		if i > 0 {
			name = fmt.Sprintf("load-%d", i+1)
			_, err := c.AddUser(ctx, bundle.UserRequest{Name: name, Password: rand.Text(), Roles: []string{"user"}})
			switch {
			case err == nil:
				cfg.Restless = "an owner's account was made just now, which takes much memory for a moment; another run uses it again"
			case !hub.IsKind(err, hub.Conflict): // else it is there since an earlier run
				return fmt.Errorf("an account for the devices: %w", err)
			}
		}
		token, err := c.Token(ctx, bundle.TokenRequest{Owner: name, TTL: 24 * time.Hour})
		if err != nil {
			return fmt.Errorf("a token for the applications: %w", err)
		}
		cfg.API.Tokens = append(cfg.API.Tokens, token.AccessToken)
		owners = append(owners, &onboarder{control: c, scheme: l.scheme, psk: l.psk, owner: name})
	}
	cfg.Transport = l.scheme
	if l.psk {
		cfg.Transport += ", PSK"
	}
	cfg.Onboard = func(ctx context.Context, owner, _ int, id string) (device.Onboarding, error) {
		return owners[owner].onboard(ctx, id)
	}
	return nil
}

// elsewhere measures the hub of --server, of which nothing is known but its API, and what the flags say.
func (l *loadTarget) elsewhere(cmd *cobra.Command, p process, cfg *load.Config) error {
	ctx := cmd.Context()
	if err := l.allowed(ctx, l.api.server); err != nil {
		return err
	}
	var api client.Config
	var err error
	if l.clientID == "" {
		api, err = l.api.elsewhere(p)
	} else {
		var ca string
		if ca, err = readCA(l.api.ca); err == nil {
			api.Server = l.api.server
			api.TLS, err = trust(ca)
		}
	}
	if err != nil {
		return err
	}
	c, err := client.New(api)
	if err != nil {
		return l.api.malformed()
	}
	defer c.Close()
	about, err := c.GetConfiguration(ctx)
	if err != nil {
		return fmt.Errorf("the hub's configuration: %w", err)
	}
	if l.clientID != "" {
		api.Token = l.ownCredentials(about.Authority, api.TLS)
	}
	token, err := api.Token(ctx)
	if err != nil {
		return fmt.Errorf("a token for the applications: %w", err)
	}
	tokens := strings.Fields(token.Access)
	if cmd.Flags().Changed("owners") && l.owners != len(tokens) {
		return usage("--owners %d: there are %d tokens", l.owners, len(tokens))
	}
	if len(tokens) > cfg.Devices {
		return usage("there are more tokens than --devices")
	}
	at := l.coap
	if at == "" {
		at = about.CoAPGateway
	}
	scheme, _, _ := strings.Cut(at, "://")
	switch {
	case at == "":
		return usage("the hub does not say where devices get to it; --coap does")
	case cmd.Flags().Changed("scheme") && l.scheme != scheme:
		return usage("--scheme: the hub says %s; --coap names another endpoint", at)
	case !slices.Contains([]string{"coaps+tcp", "coaps", "coap+tcp", "coap"}, scheme):
		return usage("--coap: %q is not a URL like coaps+tcp://hub.example:5684", at)
	case strings.HasPrefix(scheme, "coaps") && l.deviceCA == "":
		return usage("%s asks devices for certificates: --device-ca and --device-ca-key make them", at)
	}
	if err := l.allowed(ctx, at); err != nil {
		return err
	}
	code, err := l.readCodes(cfg.Devices, len(tokens))
	if err != nil {
		return err
	}
	issue := func(string) (*tls.Config, error) { return nil, nil }
	if strings.HasPrefix(scheme, "coaps") {
		ca, err := tls.LoadX509KeyPair(l.deviceCA, l.deviceCAKey)
		if err != nil {
			return fmt.Errorf("read the CA of the devices: %w", err)
		}
		issue = func(id string) (*tls.Config, error) {
			chain, key, err := device.Issue(ca, id)
			if err != nil {
				return nil, err
			}
			return device.TLS([]byte(about.DeviceRoots), chain, key, about.HubID)
		}
	}
	cfg.API = load.API{URL: strings.TrimRight(l.api.server, "/"), Tokens: tokens, TLS: api.TLS}
	cfg.Transport = scheme
	cfg.Onboard = func(_ context.Context, owner, number int, id string) (on device.Onboarding, err error) {
		on = device.Onboarding{Code: code(owner, number), HubAddr: at, Provider: l.provider}
		if on.TLS, err = issue(id); err != nil {
			return on, fmt.Errorf("the device's certificate: %w", err)
		}
		return on, nil
	}
	return nil
}

// readCodes returns what a device of an owner signs up with, both by number.
func (l *loadTarget) readCodes(devices, owners int) (func(owner, number int) string, error) {
	if l.codes == "" {
		return nil, usage("--server needs --code-file, for the sign-ups of the devices")
	}
	b, err := os.ReadFile(l.codes)
	if err != nil {
		return nil, fmt.Errorf("read the codes: %w", err)
	}
	switch codes := strings.Fields(string(b)); len(codes) {
	case devices:
		return func(_, number int) string { return codes[number] }, nil
	case owners:
		return func(owner, _ int) string { return codes[owner] }, nil
	default:
		return nil, usage("--code-file: there are %d codes, neither one for each of %d devices nor one for each of %d owners", len(codes), devices, owners)
	}
}

// ownCredentials gets a token for the client itself (RFC 6749, Section 4.4) from the provider that the hub names.
func (l *loadTarget) ownCredentials(authority string, trust *tls.Config) client.TokenSource {
	return func(ctx context.Context) (t client.Token, err error) {
		secret, err := os.ReadFile(l.clientSecret)
		if err != nil {
			return t, fmt.Errorf("read the client's secret: %w", err)
		}
		web := &http.Client{
			Transport: &http.Transport{TLSClientConfig: trust, Proxy: http.ProxyFromEnvironment}, Timeout: 30 * time.Second,
			// A redirect would carry the secret to wherever it points.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		}
		defer web.CloseIdleConnections()
		r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimRight(authority, "/")+"/.well-known/openid-configuration", nil)
		if err != nil {
			return t, err
		}
		resp, err := web.Do(r)
		if err != nil {
			return t, err
		}
		defer func() { _ = resp.Body.Close() }()
		var provider struct {
			TokenEndpoint string `json:"token_endpoint"`
		}
		if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&provider); err != nil {
			return t, fmt.Errorf("the provider's metadata: %w", err)
		}
		if provider.TokenEndpoint == "" {
			return t, errors.New("the provider's metadata have no token endpoint")
		}
		own := clientcredentials.Config{ClientID: l.clientID, ClientSecret: strings.TrimSpace(string(secret)), TokenURL: provider.TokenEndpoint}
		got, err := own.Token(context.WithValue(ctx, oauth2.HTTPClient, web))
		if err != nil {
			return t, err
		}
		return client.Token{Access: got.AccessToken, Expires: got.Expiry}, nil
	}
}

// loopback reports whether a URL leads to this machine itself only, by all addresses of its host.
func loopback(ctx context.Context, lookup func(ctx context.Context, network, host string) ([]netip.Addr, error), at string) bool {
	u, err := url.Parse(at)
	if err != nil || u.Hostname() == "" {
		return false
	}
	ips, err := lookup(ctx, "ip", u.Hostname())
	return err == nil && len(ips) > 0 && !slices.ContainsFunc(ips, func(ip netip.Addr) bool { return !ip.Unmap().IsLoopback() })
}
