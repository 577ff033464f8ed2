package coapgateway

import (
	"context"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// signUpRequest is the body of POST /oic/sec/account (OCF Cloud Security, oic.r.account).
type signUpRequest struct {
	Device   string `cbor:"di"`
	Token    string `cbor:"accesstoken"` // an authorization code, or a JWT where the provider takes client credentials
	Code     string `cbor:"authcode"`    // legacy name of accesstoken
	Provider string `cbor:"authprovider"`
}

type signUpResponse struct {
	AccessToken  string `cbor:"accesstoken" json:"accesstoken"`
	RefreshToken string `cbor:"refreshtoken" json:"refreshtoken"`
	UID          string `cbor:"uid" json:"uid"`
	ExpiresIn    int64  `cbor:"expiresin" json:"expiresin"`
	RedirectURI  string `cbor:"redirecturi" json:"redirecturi"` // always empty: the device stays here
}

// signUp exchanges a code for tokens and claims the device for the owner that they name. What the exchange returned is what
// is checked: if a check refuses it, the tokens are revoked and nothing is registered.
func (p *peer) signUp(ctx context.Context, req *coap.Message, format int32) (coap.Response, error) {
	var body signUpRequest
	resp, dev, err := p.trySignUp(ctx, req, format, &body)
	if err != nil {
		p.refuse("sign-up", dev, body.Device, err)
	}
	return resp, err
}

func (p *peer) trySignUp(ctx context.Context, req *coap.Message, format int32, body *signUpRequest) (coap.Response, hub.DeviceID, error) {
	if err := decodeBody(req.Payload, body); err != nil {
		return coap.Response{}, "", err
	}
	code := body.Token
	if code == "" {
		code = body.Code
	}
	if code == "" {
		return coap.Response{}, "", invalid("code-missing", "accesstoken with an authorization code is missing")
	}
	dev, err := p.before(body.Device)
	if err != nil {
		return coap.Response{}, dev, err
	}
	provider, err := p.gw.provider(body.Provider)
	if err != nil {
		return coap.Response{}, dev, err
	}
	place, err := p.enter(ctx, p.gw.exchanges[provider.Name], errSignIns)
	if err != nil {
		return coap.Response{}, dev, err
	}
	defer place.Leave()
	if provider.ClientCredentials {
		// The device shows a JWT in place of a code: it must be for this hub, which the verifier checks, and for this use.
		c, err := p.gw.deps.Verifier.Verify(ctx, code)
		if err != nil {
			return coap.Response{}, dev, err
		}
		if !c.Has(hub.ScopeDeviceSignUp) {
			return coap.Response{}, dev, unauthenticated("sign-up-scope", "the token is not for signing up")
		}
	}
	tokens, err := provider.Provider.Exchange(ctx, dev, p.cred.print(), code)
	if dev == "" && hub.IsKind(err, hub.Invalid) && body.Device != "" {
		// The code is for any device: the claim will be what the device says now.
		if dev, err = hub.ParseDeviceID(body.Device); err == nil {
			tokens, err = provider.Provider.Exchange(ctx, dev, p.cred.print(), code)
		}
	}
	if err != nil {
		if hub.IsKind(err, hub.Unauthenticated) {
			// compat answers 5.03 here and the device would try the same code for ever; a bad code is a bad credential.
			err = &hub.Error{Kind: hub.Unauthenticated, Code: "code-refused", Text: "the provider refused the code", Op: "exchange code", Err: err}
		}
		return coap.Response{}, dev, err
	}
	if provider.ClientCredentials {
		if tokens.Refresh == "" {
			tokens.Refresh = tokens.Access
		}
		tokens.Authorized = time.Time{} // nobody was asked
	}
	dev, claims, err := p.check(ctx, dev, body.Device, tokens)
	if err == nil {
		_, err = p.gw.deps.Identities.SignUp(ctx, dev, claims.Owner, p.cred.pin, claims.Subject, tokens.Authorized)
	}
	if err == nil && p.gw.deps.HandedOver != nil {
		err = p.gw.deps.HandedOver(ctx, dev, claims.Owner, p.cred.cert)
	}
	if err != nil {
		p.revoke(ctx, provider, tokens, err)
		return coap.Response{}, dev, err
	}
	p.log.Info("device signed up", "device", dev, "owner", claims.Owner)
	resp, err := success(codes.Changed, format, signUpResponse{
		AccessToken: tokens.Access, RefreshToken: tokens.Refresh, UID: string(claims.Owner), ExpiresIn: tokenSeconds(tokens, claims),
	})
	return resp, dev, err
}

// check verifies what a provider gave and returns the device that it is for.
func (p *peer) check(ctx context.Context, dev hub.DeviceID, di string, t hub.Tokens) (hub.DeviceID, hub.Claims, error) {
	claims, err := p.gw.deps.Verifier.Verify(ctx, t.Access)
	if err != nil {
		return dev, claims, err
	}
	if t.Refresh == "" {
		// Devices do not take an answer without one (iotivity-lite). It is the provider's fault, not the credential's.
		return dev, claims, hub.NewError(hub.Unavailable, "provider-no-refresh-token", "the provider gave no refresh token")
	}
	named, err := p.named(dev, di, claims)
	return named, claims, err
}

// revoke makes tokens useless that were refused. After trouble of ours they are kept: the device repeats its code and gets
// the same ones.
func (p *peer) revoke(ctx context.Context, provider NamedProvider, t hub.Tokens, cause error) {
	if ours(cause) {
		return
	}
	if err := provider.Provider.Revoke(ctx, t); err != nil {
		p.log.Warn("could not revoke refused tokens", "error", err)
	}
}

// refuse records a refused account request for people. Trouble of ours is recorded too: it is a reason why a device does not
// come.
func (p *peer) refuse(what string, dev hub.DeviceID, di string, err error) {
	if dev == "" {
		dev, _ = hub.ParseDeviceID(di)
	}
	code, text := hub.Public(err)
	p.gw.Refuse(Refusal{Remote: p.conn.Info().Remote.String(), Device: dev, What: what, Reason: code + ": " + text})
}

// tokenSeconds is expiresin of sign-up and refresh: whole seconds that the access token is good for.
func tokenSeconds(t hub.Tokens, c hub.Claims) int64 {
	end := t.Expiry
	if end.IsZero() { // the provider did not say; tokens without exp are refused, so the token does
		end = c.Expiry
	}
	return max(1, int64(time.Until(end)/time.Second))
}
