package bundle

import (
	"context"
	"fmt"
	"net/url"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	"github.com/coaphub/coaphub/internal/auth"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
)

// providerName is what devices call the embedded provider (authprovider).
const providerName = "coaphub"

// issuerPath is where the embedded provider's pages are on the HTTP door.
func issuerPath(issuer string) string {
	u, err := url.Parse(issuer)
	if err != nil { // the provider has parsed it
		return ""
	}
	return u.EscapedPath()
}

// authorization makes the verifier, and the providers that devices may name: the embedded one, or those that are configured.
func (a *assembly) authorization(ctx context.Context) ([]coapgateway.NamedProvider, error) {
	issuers := a.cfg.Authorization.Resolve(a.cfg.Authorization.Issuers...)
	var providers []coapgateway.NamedProvider
	if a.cfg.Embedded() {
		cfg := a.cfg.OAuthServer
		cfg.BaseURL = a.httpURL
		// No request comes before all parts are there, and with none of them nothing is revoked.
		cfg.Ended = func(grant string) { a.doors.endGrant(a.provider.Issuer(), grant) }
		cfg.Several = a.bus != nil
		var err error
		if a.provider, err = oauthserver.Open(ctx, cfg, a.documents, a.identities, a.log.With("part", "oauth-server"), a.registry); err != nil {
			return nil, err
		}
		if issuer := a.provider.Issuer(); cfg.Issuer == "" && issuer != a.httpURL+issuerPath(issuer) {
			// With the issuer in the configuration somebody has seen to it that it is reached, by a proxy for instance.
			a.log.Warn("the provider's issuer is not where the hub listens: clients that discover it there do not find it; "+
				"listen where the first start did, or lead the issuer's address here and write it as oauthServer.issuer",
				"issuer", issuer, "http", a.httpURL)
		}
		a.first.name, a.first.password, _ = a.provider.FirstLogin()
		// In one process keys and revocations are asked for by a call: nothing of the hub's own waits for its HTTP door.
		issuers = a.cfg.Authorization.Resolve(auth.IssuerConfig{
			Authority: a.provider.Issuer(), Audience: []string{a.provider.Audience()}, OwnerClaim: "sub",
			DeviceIDClaim: a.cfg.OAuthServer.DeviceIDClaim, Keys: a.provider.Keys,
			Revoked: func(ctx context.Context, t auth.Token) (bool, error) {
				active, err := a.provider.Active(ctx, t.ID)
				return !active, err
			},
			Grant: oauthserver.GrantOf,
		})
		providers = []coapgateway.NamedProvider{{Name: providerName, Provider: a.provider}}
	}
	var err error
	a.verifier, err = auth.New(issuers, auth.Options{ClockSkew: a.cfg.Authorization.ClockSkew, Registerer: a.registry})
	if err != nil {
		return nil, fmt.Errorf("authorization: %w", err)
	}
	for _, p := range a.cfg.CoAPGateway.API.CoAP.Authorization.Providers {
		named := coapgateway.NamedProvider{Name: p.Name, ClientCredentials: p.GrantType == coapgateway.GrantClientCredentials}
		client, err := auth.NewClient(auth.ClientConfig{
			Authority: p.Authority, ClientID: p.ClientID, ClientSecretFile: p.ClientSecretFile, RedirectURL: p.RedirectURL,
			Scopes: p.Scopes, Audience: p.Audience,
		})
		if err != nil {
			return nil, fmt.Errorf("provider %s: %w", p.Name, err)
		}
		a.clients = append(a.clients, client)
		named.Provider = client
		providers = append(providers, named)
	}
	return providers, nil
}
