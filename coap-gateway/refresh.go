package coapgateway

import (
	"context"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/coap"
)

// refreshRequest is the body of POST /oic/sec/tokenrefresh (OCF Cloud Security, oic.r.tokenrefresh).
type refreshRequest struct {
	Device   string `cbor:"di"`
	UID      string `cbor:"uid"`
	Token    string `cbor:"refreshtoken"`
	Provider string `cbor:"authprovider"` // empty: whoever takes the token
}

type refreshResponse struct {
	AccessToken  string `cbor:"accesstoken" json:"accesstoken"`
	RefreshToken string `cbor:"refreshtoken" json:"refreshtoken"`
	ExpiresIn    int64  `cbor:"expiresin" json:"expiresin"`
}

// refresh gives the device new tokens. On a session of the same device they replace the old ones: no sign-in is needed.
func (p *peer) refresh(ctx context.Context, req *coap.Message, format int32) (coap.Response, error) {
	var body refreshRequest
	resp, dev, err := p.tryRefresh(ctx, req, format, &body)
	if err != nil {
		p.refuse("refresh", dev, body.Device, err)
	}
	return resp, err
}

func (p *peer) tryRefresh(ctx context.Context, req *coap.Message, format int32, body *refreshRequest) (coap.Response, hub.DeviceID, error) {
	if err := decodeBody(req.Payload, body); err != nil {
		return coap.Response{}, "", err
	}
	if body.UID == "" || body.Token == "" {
		return coap.Response{}, "", invalid("body-incomplete", "uid and refreshtoken are needed")
	}
	dev, err := p.before(body.Device)
	if err != nil {
		return coap.Response{}, dev, err
	}
	candidates := p.gw.deps.Providers
	if body.Provider != "" {
		one, err := p.gw.provider(body.Provider)
		if err != nil {
			return coap.Response{}, dev, err
		}
		candidates = []NamedProvider{one}
	}
	provider, tokens, place, err := p.refreshAt(ctx, candidates, dev, body.Token)
	if err != nil {
		return coap.Response{}, dev, err
	}
	defer place.Leave()
	if tokens.Refresh == "" { // RFC 6749, Section 6: the old one stays good
		tokens.Refresh = body.Token
	}
	dev, claims, err := p.check(ctx, dev, body.Device, tokens)
	var own hub.Ownership
	if err == nil {
		own, err = p.ownership(ctx, dev, claims.Owner)
	}
	if err != nil {
		p.revoke(ctx, provider, tokens, err)
		return coap.Response{}, dev, err
	}
	if p.sess != nil && p.sess.own == own {
		p.renew(p.sess, claims)
		if err := p.entered(ctx, p.sess, tokens.Access); err != nil {
			return coap.Response{}, dev, err
		}
	}
	resp, err := success(codes.Changed, format, refreshResponse{
		AccessToken: tokens.Access, RefreshToken: tokens.Refresh, ExpiresIn: tokenSeconds(tokens, claims),
	})
	return resp, dev, err
}

// refreshAt asks one provider after the other. Only if all of them refuse the token is it bad: one that could not be asked
// might have taken it. Of the one that took it the place is the caller's to leave.
func (p *peer) refreshAt(ctx context.Context, providers []NamedProvider, dev hub.DeviceID, token string) (NamedProvider, hub.Tokens, admission.Place, error) {
	var trouble, refused error
	for _, np := range providers {
		place, err := p.enter(ctx, p.gw.exchanges[np.Name], errSignIns)
		if err != nil {
			trouble = err
			continue
		}
		t, err := np.Provider.Refresh(ctx, dev, token)
		if err == nil {
			return np, t, place, nil
		}
		place.Leave()
		if hub.IsKind(err, hub.Unauthenticated) {
			refused = err
		} else {
			trouble = err
		}
	}
	if trouble != nil {
		return NamedProvider{}, hub.Tokens{}, admission.Place{}, trouble
	}
	return NamedProvider{}, hub.Tokens{}, admission.Place{}, &hub.Error{
		Kind: hub.Unauthenticated, Code: "refresh-token-refused", Text: "the provider refused the refresh token", Op: "refresh", Err: refused,
	}
}
