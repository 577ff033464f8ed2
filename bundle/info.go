package bundle

import (
	"context"
	"crypto/rand"
	"fmt"
	"net/http"
	"net/url"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/web"
)

// hubInfo is what everybody may know: GetHubConfiguration. It is asked often, so it only puts together what is known.
func (a *assembly) hubInfo() grpcgateway.HubConfiguration {
	e := a.endpoints()
	c := grpcgateway.HubConfiguration{
		OwnerClaim: a.cfg.Authorization.OwnerClaim, DeviceIDClaim: a.cfg.CoAPGateway.API.CoAP.Authorization.DeviceIDClaim,
		CoAPGateway: e.CoAPSTCP, CoAPGatewayDTLS: e.CoAPS, CertificateAuthorities: a.deviceRoots(), HTTPGatewayAddress: a.httpURL, DefaultCommandTTL: a.cfg.ResourceDirectory.DefaultCommandTimeToLive,
		Build: grpcgateway.Build{Version: a.build.Version, Commit: a.build.Commit, CommitDate: a.build.Date},
	}
	if a.provider == nil {
		c.Authority = a.cfg.Authorization.Issuers[0].Authority
		p := a.cfg.CoAPGateway.API.CoAP.Authorization.Providers[0]
		c.DeviceClient = &grpcgateway.OAuthClient{
			ID: p.ClientID, Audience: p.Audience, Scopes: p.Scopes, ProviderName: p.Name, Authority: p.Authority, GrantType: p.GrantType,
		}
		return c
	}
	o := a.cfg.OAuthServer
	c.Authority = a.provider.Issuer()
	c.WebClient = &grpcgateway.OAuthClient{
		ID: o.Clients.Web.ID, Audience: o.Audience, Authority: c.Authority,
		Scopes: []string{"openid", "offline_access", hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin},
	}
	c.DeviceClient = &grpcgateway.OAuthClient{
		ID: o.Clients.Device.ID, Audience: o.Audience, Authority: c.Authority, ProviderName: providerName,
		Scopes: []string{"offline_access", hub.ScopeDevice},
	}
	return c
}

// pages are what the HTTP door serves besides the API: the console, the embedded provider, which knows its issuer's path, and
// the way in for devices over WebSocket.
func (a *assembly) pages() (http.Handler, error) {
	provider := http.NotFoundHandler()
	var elsewhere []string
	if a.provider != nil {
		provider = a.provider.Handler()
	} else {
		u, err := url.Parse(a.cfg.Authorization.Issuers[0].Authority)
		if err != nil {
			return nil, fmt.Errorf("authorization.issuers[0].authority: %w", err)
		}
		elsewhere = []string{u.Scheme + "://" + u.Host}
	}
	console, err := web.New(elsewhere...)
	if err != nil {
		return nil, err
	}
	var ws *coap.WebSocket
	if a.devices != nil {
		ws = a.devices.WebSocket()
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case ws != nil && r.URL.Path == coap.WebSocketPath:
			ws.ServeHTTP(w, r)
		case console.Serves(r.URL.Path):
			console.ServeHTTP(w, r)
		default:
			provider.ServeHTTP(w, r)
		}
	}), nil
}

// secretKey returns a secret of 32 bytes, and makes it in a new hub. It outlives restarts.
func secretKey(ctx context.Context, docs store.Documents, name string) ([]byte, error) {
	doc, err := docs.Get(ctx, secretCollection, name)
	if err == nil && doc.Rev == 0 {
		doc = store.Doc{Key: name, Value: make([]byte, 32)}
		_, _ = rand.Read(doc.Value)                                                       // never fails
		if _, err = docs.Put(ctx, secretCollection, doc); hub.IsKind(err, hub.Conflict) { // another process was faster
			doc, err = docs.Get(ctx, secretCollection, name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("the secret %q: %w", name, err)
	}
	return doc.Value, nil
}
