package bundle

import (
	"context"
	"fmt"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	"github.com/coaphub/coaphub/internal/auth"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
)

// providerName is what devices call the embedded provider (authprovider).
const providerName = "coaphub"

// authorization makes the verifier, and the providers that devices may name: the embedded one, or those that are configured.
func (a *assembly) authorization(ctx context.Context) ([]coapgateway.NamedProvider, error) {
	issuers := a.cfg.Authorization.Resolve(a.cfg.Authorization.Issuers...)
	var providers []coapgateway.NamedProvider
	if a.cfg.Embedded() {
		cfg := a.cfg.OAuthServer
		cfg.BaseURL = a.httpURL
		var err error
		if a.provider, err = oauthserver.Open(ctx, cfg, a.documents, a.identities, a.log.With("part", "oauth-server"), a.registry); err != nil {
			return nil, err
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
