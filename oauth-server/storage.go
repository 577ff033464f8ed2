package oauthserver

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/coaphub/coaphub/hub"
)

// call is what a guard and the storage below the provider library tell each other about one HTTP request.
type call struct {
	device  string // device_id of an authorize request, as it came
	browser string // the login cookie's value
	// trouble is set when something of ours failed. The library makes refusals of all errors of its storage; the guard
	// answers 503 instead.
	trouble error
}

type callKey struct{}

func callOf(ctx context.Context) *call {
	if c, ok := ctx.Value(callKey{}).(*call); ok {
		return c
	}
	return &call{}
}

// storage is op.Storage on top of the Server. Its errors are OAuth's; trouble of ours goes into the call.
type storage struct{ s *Server }

// refuse makes a failure one of OAuth's errors, and keeps its cause out of the answer.
func refuse(ctx context.Context, err error, as *oidc.Error) error {
	if ours(err) {
		callOf(ctx).trouble = err
		return oidc.ErrServerError().WithDescription("temporarily unavailable")
	}
	return as.WithParent(err)
}

var errNotServed = errors.New("this is not served by the library")

func (st storage) CreateAuthRequest(ctx context.Context, req *oidc.AuthRequest, _ string) (op.AuthRequest, error) {
	s, c := st.s, callOf(ctx)
	bad := func(text string) (op.AuthRequest, error) {
		return nil, oidc.ErrInvalidRequest().WithDescription("%s", text)
	}
	isDevice := req.ClientID == s.cfg.Clients.Device.ID
	var dev hub.DeviceID
	switch {
	case slices.Contains(req.Prompt, oidc.PromptNone): // there are no sessions: each sign-in asks
		return nil, oidc.ErrLoginRequired()
	case req.ResponseMode != "" && req.ResponseMode != oidc.ResponseModeQuery:
		return bad("response_mode is not supported")
	case isDevice && req.CodeChallenge != "":
		return bad("a device's code is redeemed by the hub, which has no code_verifier")
	case !isDevice && req.CodeChallenge == "":
		return bad("PKCE is required: code_challenge is missing")
	case !isDevice && req.CodeChallengeMethod != oidc.CodeChallengeMethodS256:
		// RFC 7636, Section 4.3: without a method it is plain, which protects nothing from who sees the request.
		return bad("code_challenge_method must be S256")
	case !isDevice && !isChallenge(req.CodeChallenge):
		return bad("code_challenge is not a SHA-256 hash in base64url")
	case !isDevice && c.device != "":
		return bad("device_id is for the device client only")
	}
	if c.device != "" {
		var err error
		if dev, err = hub.ParseDeviceID(c.device); err != nil {
			return bad("device_id is not a UUID")
		}
	}
	return s.newRequest(request{
		Client: req.ClientID, RedirectURI: req.RedirectURI, Scopes: req.Scopes, State: req.State, Nonce: req.Nonce,
		Challenge: req.CodeChallenge, Device: dev, Expires: time.Now().Add(requestLifetime).UTC(),
	})
}

// isChallenge: RFC 7636, Section 4.2: BASE64URL(SHA256(verifier)) without padding, 43 characters.
func isChallenge(s string) bool {
	if len(s) != 43 {
		return false
	}
	for _, c := range []byte(s) {
		if c != '-' && c != '_' && (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') {
			return false
		}
	}
	return true
}

func (st storage) AuthRequestByID(ctx context.Context, id string) (op.AuthRequest, error) {
	r, err := st.s.openRequest(id)
	if err != nil {
		return nil, oidc.ErrInvalidRequest().WithDescription("the sign-in took too long, or was not begun here")
	}
	// The code goes to the browser that signed in, and to no other that got hold of the address.
	if r.SignedIn && r.Browser != fingerprint(callOf(ctx).browser) {
		return nil, oidc.ErrInvalidRequest().WithDescription("the sign-in was done in another browser")
	}
	return r, nil
}

func (st storage) SaveAuthCode(ctx context.Context, id, text string) error {
	s := st.s
	r, err := s.openRequest(id)
	if err != nil || !r.SignedIn {
		return oidc.ErrInvalidRequest()
	}
	if err := s.mayHave(ctx, r.Subject, r.Device); err != nil {
		return refuse(ctx, err, oidc.ErrAccessDenied().WithDescription("the device belongs to another owner"))
	}
	lifetime := browserCodeLifetime
	if r.Client == s.cfg.Clients.Device.ID {
		lifetime = s.cfg.CodeLifetime
	}
	c := code{
		Client: r.Client, Subject: r.Subject, Scopes: r.Scopes, Device: r.Device, AuthTime: r.AuthTime, AMR: r.GetAMR(),
		Issued: s.clock.Now().UTC(), Expires: s.clock.Now().Add(lifetime).UTC(), RedirectURI: r.RedirectURI, Challenge: r.Challenge, Nonce: r.Nonce,
	}
	if err := write(ctx, s.docs, collCodes, fingerprint(text), 0, c, s.codeIndex(c)...); err != nil {
		return refuse(ctx, err, oidc.ErrServerError())
	}
	return nil
}

// browserCodeLifetime is how long an application has to redeem its code (RFC 6749, Section 4.1.2: at most ten minutes).
const browserCodeLifetime = time.Minute

func (st storage) AuthRequestByCode(ctx context.Context, text string) (op.AuthRequest, error) {
	s := st.s
	var c code
	key := fingerprint(text)
	rev, err := read(ctx, s.docs, collCodes, key, &c)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrInvalidGrant())
	}
	// Devices' codes are redeemed by the hub in process, for the device that has them, never over HTTP.
	if rev == 0 || !c.Used.IsZero() || s.clock.Ended(c.Expires) || c.Client == s.cfg.Clients.Device.ID {
		return nil, errCode
	}
	a, err := s.account(ctx, c.Subject)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrInvalidGrant())
	}
	return &request{
		Client: c.Client, RedirectURI: c.RedirectURI, Scopes: allowed(c.Scopes, a), Nonce: c.Nonce, Challenge: c.Challenge,
		Subject: c.Subject, AuthTime: c.AuthTime, SignedIn: true, s: s, code: &c, codeKey: key, codeRev: rev,
	}, nil
}

// DeleteAuthRequest has nothing to do: requests are carried by the browser, and codes are consumed when a token is made.
func (st storage) DeleteAuthRequest(context.Context, string) error { return nil }

func (st storage) CreateAccessToken(ctx context.Context, r op.TokenRequest) (string, time.Time, error) {
	id, _, expiry, err := st.create(ctx, r, "", false)
	return id, expiry, err
}

func (st storage) CreateAccessAndRefreshTokens(ctx context.Context, r op.TokenRequest, current string) (string, string, time.Time, error) {
	return st.create(ctx, r, current, true)
}

// create stores what the token that the library is about to sign stands on.
func (st storage) create(ctx context.Context, r op.TokenRequest, current string, withRefresh bool) (tokenID, refresh string, expiry time.Time, err error) {
	s, now := st.s, st.s.clock.Now()
	expiry = now.Add(s.cfg.AccessTokenLifetime).UTC()
	g := grant{Subject: r.GetSubject(), Scopes: r.GetScopes(), Expires: expiry}
	switch r := r.(type) {
	case *refreshRequest:
		id, _, successor, err := s.rotate(ctx, current, func(g grant) error {
			if g.Client != r.g.Client {
				return errRefresh
			}
			return nil
		})
		if err != nil {
			return "", "", time.Time{}, refuse(ctx, err, oidc.ErrInvalidGrant())
		}
		return newTokenID(id), successor, expiry, nil
	case *request:
		// The library checked code, client, redirect URI and verifier, for as many requests as came at the same time: one of
		// them uses the code up.
		used := *r.code
		used.Used = now.UTC()
		if err := write(ctx, s.docs, collCodes, r.codeKey, r.codeRev, used); err != nil {
			if hub.IsKind(err, hub.Conflict) {
				return "", "", time.Time{}, oidc.ErrInvalidGrant().WithDescription("invalid code")
			}
			return "", "", time.Time{}, refuse(ctx, err, oidc.ErrInvalidGrant())
		}
		g.Client, g.AuthTime, g.AMR, g.Scopes = r.Client, r.AuthTime, r.GetAMR(), r.code.Scopes
	case *machineRequest:
		g.Client, g.AuthTime = r.client, now.UTC()
	case *op.DeviceAuthorizationState:
		g.Client, g.AuthTime, g.AMR = r.ClientID, r.AuthTime, r.AMR
	default:
		return "", "", time.Time{}, oidc.ErrUnsupportedGrantType()
	}
	id := newGrantID()
	if withRefresh {
		refresh = refreshToken(id, random(32))
		g.Current, g.Expires = fingerprint(refresh), now.Add(s.cfg.RefreshTokenLifetime).UTC()
	}
	if err := write(ctx, s.docs, collGrants, id, 0, g, grantIndex(g)...); err != nil {
		return "", "", time.Time{}, refuse(ctx, err, oidc.ErrServerError())
	}
	return newTokenID(id), refresh, expiry, nil
}

func (st storage) TokenRequestByRefreshToken(ctx context.Context, token string) (op.RefreshTokenRequest, error) {
	s := st.s
	id, _, ok := parseRefreshToken(token)
	if !ok {
		return nil, errRefresh
	}
	g, active, err := s.activeGrant(ctx, id)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrInvalidGrant())
	}
	// Devices refresh through the gateway, which knows which device asks.
	if !active || g.Client == s.cfg.Clients.Device.ID {
		return nil, errRefresh
	}
	if mark := fingerprint(token); mark != g.Current && mark != g.Previous {
		// Used up: rotate refuses it, and ends the grant if it is an old one that came back.
		_, _, _, err := s.rotate(ctx, token, func(grant) error { return nil })
		return nil, refuse(ctx, err, oidc.ErrInvalidGrant())
	}
	a, err := s.account(ctx, g.Subject)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrInvalidGrant())
	}
	return &refreshRequest{s: s, g: g, scopes: allowed(g.Scopes, a)}, nil
}

func (st storage) GetPrivateClaimsFromRequest(_ context.Context, r op.TokenRequest, _ []string) (map[string]any, error) {
	// The library asks for the audience once for the access token, then for this, then once for the ID token. An ID token is
	// for the application, not for the hub.
	switch r := r.(type) {
	case *request:
		r.idToken = true
	case *refreshRequest:
		r.idToken = true
	case *op.DeviceAuthorizationState:
		r.Audience = nil
	}
	return st.s.privateClaims(grant{}, r.GetScopes()), nil
}

func (st storage) GetClientByClientID(_ context.Context, id string) (op.Client, error) {
	c := st.s.clients[id]
	if c == nil {
		return nil, oidc.ErrInvalidClient().WithDescription("unknown client")
	}
	return c, nil
}

func (st storage) AuthorizeClientIDSecret(_ context.Context, id, secret string) error {
	if c := st.s.clients[id]; c == nil || !c.is(secret) {
		return oidc.ErrInvalidClient().WithDescription("unknown client or wrong secret")
	}
	return nil
}

func (st storage) ClientCredentials(ctx context.Context, id, secret string) (op.Client, error) {
	if err := st.AuthorizeClientIDSecret(ctx, id, secret); err != nil {
		return nil, err
	}
	return st.s.clients[id], nil
}

func (st storage) ClientCredentialsTokenRequest(ctx context.Context, id string, scopes []string) (op.TokenRequest, error) {
	c := st.s.clients[id]
	if c == nil {
		return nil, oidc.ErrInvalidClient()
	}
	a, err := st.s.account(ctx, c.owner)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrUnauthorizedClient())
	}
	if len(scopes) == 0 {
		scopes = c.scopes
	}
	granted := slices.DeleteFunc(allowed(scopes, a), func(scope string) bool { return !c.IsScopeAllowed(scope) })
	if len(granted) == 0 {
		return nil, oidc.ErrInvalidScope()
	}
	return &machineRequest{client: c.id, subject: c.owner, audience: st.s.cfg.Audience, scopes: granted}, nil
}

// SetUserinfoFromScopes fills the ID token, whose subject the library replaces by this one. Everything else about the user is at
// the userinfo endpoint.
func (st storage) SetUserinfoFromScopes(_ context.Context, info *oidc.UserInfo, subject, _ string, _ []string) error {
	info.Subject = subject
	return nil
}

// TerminateSession ends what the application was given at the user's sign-ins. Without an ID token nobody is known, and
// nothing ends.
func (st storage) TerminateSession(ctx context.Context, subject, clientID string) error {
	if subject == "" || clientID == st.s.cfg.Clients.Device.ID {
		return nil
	}
	if err := st.s.revokeSubject(ctx, subject, func(g grant) bool { return g.Client == clientID }); err != nil {
		return refuse(ctx, err, oidc.ErrServerError())
	}
	return nil
}

func (st storage) SigningKey(ctx context.Context) (op.SigningKey, error) {
	k, _, err := st.s.keys.current(ctx)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrServerError())
	}
	return signingHandle{id: k.ID, key: k.key}, nil
}

func (st storage) SignatureAlgorithms(context.Context) ([]jose.SignatureAlgorithm, error) {
	return []jose.SignatureAlgorithm{jose.ES256}, nil
}

func (st storage) KeySet(ctx context.Context) ([]op.Key, error) {
	ring, err := st.s.keys.published(ctx)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrServerError())
	}
	var out []op.Key
	for _, k := range ring {
		out = append(out, signingHandle{id: k.ID, key: &k.key.PublicKey})
	}
	return out, nil
}

// What follows belongs to endpoints of the library that are not served: ours answer in their place.

func (st storage) RevokeToken(context.Context, string, string, string) *oidc.Error {
	return oidc.ErrServerError()
}

func (st storage) GetRefreshTokenInfo(context.Context, string, string) (string, string, error) {
	return "", "", errNotServed
}

func (st storage) SetUserinfoFromToken(context.Context, *oidc.UserInfo, string, string, string) error {
	return errNotServed
}

func (st storage) SetIntrospectionFromToken(context.Context, *oidc.IntrospectionResponse, string, string, string) error {
	return errNotServed
}

func (st storage) GetPrivateClaimsFromScopes(context.Context, string, string, []string) (map[string]any, error) {
	return nil, errNotServed
}

func (st storage) GetKeyByIDAndClientID(context.Context, string, string) (*jose.JSONWebKey, error) {
	return nil, errNotServed
}

func (st storage) ValidateJWTProfileScopes(context.Context, string, []string) ([]string, error) {
	return nil, errNotServed
}

func (st storage) Health(context.Context) error { return nil }

var (
	_ op.Storage                        = storage{}
	_ op.ClientCredentialsStorage       = storage{}
	_ op.DeviceAuthorizationStorage     = storage{}
	_ op.CanGetPrivateClaimsFromRequest = storage{}
)
