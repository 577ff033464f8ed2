package bundle

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	"github.com/coaphub/coaphub/hub"
)

// authorizeURL is the page of an external provider where a person gets a device's code: its authorization endpoint, as its
// discovery document names it, with what the hub will redeem the code with.
func authorizeURL(ctx context.Context, p coapgateway.ProviderConfig) (string, error) {
	away := func(err error) error {
		return &hub.Error{Kind: hub.Unavailable, Code: "provider-unavailable", Text: "the provider " + p.Name + " does not answer at " + p.Authority, Err: err}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(p.Authority, "/")+"/.well-known/openid-configuration", nil)
	if err != nil {
		return "", away(err)
	}
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment}}
	resp, err := client.Do(r)
	if err != nil {
		return "", away(err)
	}
	defer func() { _ = resp.Body.Close() }()
	var doc struct {
		Authorization string `json:"authorization_endpoint"`
	}
	if resp.StatusCode != http.StatusOK {
		return "", away(fmt.Errorf("it answered %s", resp.Status))
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&doc); err != nil {
		return "", away(err)
	}
	u, err := url.Parse(doc.Authorization)
	if err != nil || u.Host == "" {
		return "", away(fmt.Errorf("it names no authorization endpoint"))
	}
	q := u.Query()
	q.Set("response_type", "code")
	q.Set("client_id", p.ClientID)
	for name, value := range map[string]string{"redirect_uri": p.RedirectURL, "scope": strings.Join(p.Scopes, " "), "audience": p.Audience} {
		if value != "" {
			q.Set(name, value)
		}
	}
	u.RawQuery = q.Encode()
	return u.String(), nil
}
