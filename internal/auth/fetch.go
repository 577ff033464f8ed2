package auth

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
)

const (
	// fetchTimeout bounds one request to a provider, all of it.
	fetchTimeout = 10 * time.Second
	// maxBody bounds what is read of a provider's answer; more is an error. Key sets of large providers have some 10 KB.
	maxBody = 256 << 10
)

// discovery is what we use of an OpenID provider's metadata (OpenID Connect Discovery, 3).
type discovery struct {
	Issuer             string   `json:"issuer"`
	JWKSURI            string   `json:"jwks_uri"`
	TokenEndpoint      string   `json:"token_endpoint"`
	RevocationEndpoint string   `json:"revocation_endpoint"`
	TokenAuthMethods   []string `json:"token_endpoint_auth_methods_supported"`
}

func newHTTPClient(caPool []string) (*http.Client, error) {
	cfg, err := tlsConfig(caPool)
	if err != nil {
		return nil, err
	}
	tr := &http.Transport{
		Proxy: http.ProxyFromEnvironment, TLSClientConfig: cfg, ForceAttemptHTTP2: true,
		MaxIdleConnsPerHost: 4, MaxConnsPerHost: 16, IdleConnTimeout: 30 * time.Second, TLSHandshakeTimeout: fetchTimeout,
	}
	return &http.Client{Transport: tr, CheckRedirect: sameSchemeRedirects}, nil
}

// sameSchemeRedirects keeps a provider's redirect from leaving https.
func sameSchemeRedirects(r *http.Request, via []*http.Request) error {
	if len(via) >= 3 {
		return errors.New("more than 3 redirects")
	}
	if r.URL.Scheme != via[0].URL.Scheme {
		return fmt.Errorf("redirect from %s to %s", via[0].URL.Scheme, r.URL.Scheme)
	}
	return nil
}

// discover reads the provider's metadata and checks that it speaks for itself (OpenID Connect Discovery, 4.3).
func discover(ctx context.Context, client *http.Client, authority string) (discovery, error) {
	var d discovery
	if err := getJSON(ctx, client, strings.TrimSuffix(authority, "/")+"/.well-known/openid-configuration", &d); err != nil {
		return d, fmt.Errorf("discover %s: %w", authority, err)
	}
	if !sameIssuer(d.Issuer, authority) {
		return d, fmt.Errorf("discover %s: it says that it is %q", authority, d.Issuer)
	}
	base, err := url.Parse(authority)
	if err != nil {
		return d, fmt.Errorf("discover %s: %w", authority, err)
	}
	for name, s := range map[string]string{"jwks_uri": d.JWKSURI, "token_endpoint": d.TokenEndpoint, "revocation_endpoint": d.RevocationEndpoint} {
		if s == "" {
			continue
		}
		if u, err := url.Parse(s); err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != base.Scheme {
			return d, fmt.Errorf("discover %s: %s is %q", authority, name, s)
		}
	}
	return d, nil
}

// httpKeys fetches a provider's key set. The metadata is asked anew each time: fetches are rare, and a provider may move
// its key set.
func httpKeys(client *http.Client, authority string) func(context.Context) (jose.JSONWebKeySet, error) {
	return func(ctx context.Context) (jose.JSONWebKeySet, error) {
		var set jose.JSONWebKeySet
		d, err := discover(ctx, client, authority)
		if err != nil {
			return set, err
		}
		if d.JWKSURI == "" {
			return set, fmt.Errorf("discover %s: there is no jwks_uri", authority)
		}
		// Keys of a type we do not know must not spoil those we know (RFC 7517, 5), so they are read one by one.
		var raw struct {
			Keys []json.RawMessage `json:"keys"`
		}
		if err := getJSON(ctx, client, d.JWKSURI, &raw); err != nil {
			return set, fmt.Errorf("fetch the keys of %s: %w", authority, err)
		}
		for _, r := range raw.Keys {
			var k jose.JSONWebKey
			if k.UnmarshalJSON(r) == nil {
				set.Keys = append(set.Keys, k)
			}
		}
		return set, nil
	}
}

func getJSON(ctx context.Context, client *http.Client, address string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, address, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET %s: %s", address, resp.Status)
	}
	body, err := readBody(resp.Body)
	if err != nil {
		return fmt.Errorf("GET %s: %w", address, err)
	}
	if err := json.Unmarshal(body, into); err != nil {
		return fmt.Errorf("GET %s: %w", address, err)
	}
	return nil
}

func readBody(r io.Reader) ([]byte, error) {
	body, err := io.ReadAll(io.LimitReader(r, maxBody+1))
	if err != nil {
		return nil, err
	}
	if len(body) > maxBody {
		return nil, fmt.Errorf("the answer is larger than %d bytes", maxBody)
	}
	return body, nil
}
