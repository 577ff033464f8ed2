package oauthserver

import (
	"context"
	"encoding/base64"
	"encoding/hex"
	"errors"
	mathrand "math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"

	"github.com/coaphub/coaphub/hub"
)

// previousLifetime bounds how long a refresh token may be repeated after its successor was given out: long enough for a
// device whose answer was lost, short enough for a token that was stolen.
const previousLifetime = 24 * time.Hour

// olderKept is how many refresh tokens before the previous one are remembered, to notice that one comes back.
const olderKept = 4

var (
	errRefresh = hub.NewError(hub.Unauthenticated, "refresh-token-invalid", "the refresh token is unknown, expired, used up or revoked")
	errOther   = hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner")
	errScope   = hub.NewError(hub.Denied, "scope-not-allowed", "none of the scopes asked for is allowed")
)

// grant is what tokens were issued on: one sign-in of an application, or one sign-up of a device. Every access token names
// its grant in its jti, so that ending the grant ends its tokens.
type grant struct {
	Subject  string       `json:"subject"`
	Client   string       `json:"client"`
	Scopes   []string     `json:"scopes"` // as granted first; what the roles still allow of them is computed at each issuance
	Device   hub.DeviceID `json:"device,omitempty"`
	AuthTime time.Time    `json:"authTime"`
	AMR      []string     `json:"amr,omitempty"`
	// Expires is when the grant can be forgotten: nothing issued on it is good any more. A moment that the clock leapt over comes
	// later (see clock.Watch), and the next refresh moves it on.
	Expires   time.Time `json:"expires"`
	Revoked   bool      `json:"revoked,omitempty"`
	RevokedAt time.Time `json:"revokedAt,omitzero"` // about
	// Fingerprints of refresh tokens: the one to use next, the one before, which works until the next one was used, and older
	// ones, whose use means that somebody has a copy.
	Current       string    `json:"current,omitempty"`
	Previous      string    `json:"previous,omitempty"`
	PreviousUntil time.Time `json:"previousUntil,omitzero"`
	Older         []string  `json:"older,omitempty"`
}

func grantIndex(g grant) []string {
	index := []string{"subject=" + g.Subject}
	if !g.RevokedAt.IsZero() {
		index = append(index, revokedIn(g.RevokedAt))
	}
	return index
}

func (s *Server) ended(g grant) bool { return g.Revoked || s.clock.Ended(g.Expires) }

func newGrantID() string { return hex.EncodeToString(random(16)) }

// A refresh token is the grant's ID and 32 bytes that only its holder knows.
func refreshToken(id string, secret []byte) string {
	raw, _ := hex.DecodeString(id) // our own hex
	return base64.RawURLEncoding.EncodeToString(append(raw, secret...))
}

func parseRefreshToken(token string) (id string, secret []byte, ok bool) {
	if len(token) != 64 {
		return "", nil, false
	}
	raw, err := base64.RawURLEncoding.DecodeString(token)
	if err != nil || len(raw) != 48 {
		return "", nil, false
	}
	return hex.EncodeToString(raw[:16]), raw[16:], true
}

// next derives the token that follows; the same for everybody who asks, so that a lost answer can be given again.
func (s *Server) next(id string, secret []byte) string {
	return refreshToken(id, mac(s.secrets.refresh, []byte(id), secret))
}

// sign makes an access token on the grant. One for a device lives up to a tenth shorter than lifetime.
func (s *Server) sign(ctx context.Context, id string, g grant, scopes []string, lifetime time.Duration) (token string, expiry time.Time, err error) {
	key, _, err := s.keys.current(ctx)
	if err != nil {
		return "", time.Time{}, err
	}
	signer, err := jose.NewSigner(jose.SigningKey{Algorithm: jose.ES256, Key: jose.JSONWebKey{Key: key.key, KeyID: key.ID}},
		(&jose.SignerOptions{}).WithType("JWT"))
	if err != nil {
		return "", time.Time{}, &hub.Error{Kind: hub.Internal, Op: "sign token", Err: err}
	}
	if g.Device != "" { // devices that came at the same time must not all refresh at the same time
		lifetime -= mathrand.N(lifetime/10 + 1)
	}
	now := s.clock.Now()
	expiry = now.Add(lifetime).Truncate(time.Second).UTC()
	claims := s.privateClaims(g, scopes)
	for k, v := range map[string]any{
		"iss": s.issuer, "sub": g.Subject, "aud": []string{s.cfg.Audience}, "client_id": g.Client, "jti": newTokenID(id),
		"iat": now.Unix(), "nbf": now.Unix(), "exp": expiry.Unix(),
	} {
		claims[k] = v
	}
	token, err = jwt.Signed(signer).Claims(claims).Serialize()
	if err != nil {
		return "", time.Time{}, &hub.Error{Kind: hub.Internal, Op: "sign token", Err: err}
	}
	return token, expiry, nil
}

// privateClaims are those that the provider library does not know of.
func (s *Server) privateClaims(g grant, scopes []string) map[string]any {
	claims := map[string]any{"scope": strings.Join(scopes, " "), "token_use": "access"}
	if g.Device != "" {
		claims[s.cfg.DeviceIDClaim] = string(g.Device)
	}
	return claims
}

// A jti is the grant's ID, a dot, and what tells its tokens apart.
func newTokenID(id string) string { return id + "." + hex.EncodeToString(random(8)) }

// GrantOf returns the grant that the token with this jti was issued on.
func GrantOf(tokenID string) string {
	id, _, _ := strings.Cut(tokenID, ".")
	return id
}

// Active reports whether the grant behind a verified token's jti still stands. Tokens of other issuers are not active.
func (s *Server) Active(ctx context.Context, tokenID string) (bool, error) {
	id := GrantOf(tokenID)
	ok, since := s.standing.recalls(id)
	if ok {
		return true, nil
	}
	_, ok, err := s.activeGrant(ctx, id)
	if ok {
		s.standing.remember(id, since)
	}
	return ok, err
}

func (s *Server) activeGrant(ctx context.Context, id string) (grant, bool, error) {
	var g grant
	rev, err := read(ctx, s.docs, collGrants, id, &g)
	return g, err == nil && rev != 0 && !s.ended(g), err
}

// rotate uses a refresh token up and returns its successor. check sees the grant first and may refuse it.
func (s *Server) rotate(ctx context.Context, token string, check func(grant) error) (id string, g grant, successor string, err error) {
	const op = "use refresh token"
	id, secret, ok := parseRefreshToken(token)
	if !ok {
		return "", grant{}, "", errRefresh.With(op, errors.New("malformed"))
	}
	mark, now := fingerprint(token), s.clock.Now()
	successor = s.next(id, secret)
	replayed := false
	unchanged := errors.New("nothing to store")
	err = change(ctx, s.docs, collGrants, id, func(stored *grant, rev uint64) error {
		if rev == 0 || s.ended(*stored) {
			return errRefresh.With(op, errors.New("no such grant, or ended"))
		}
		if err := check(*stored); err != nil {
			return err
		}
		switch {
		case stored.Current == mark:
			if stored.Previous != "" {
				stored.Older = append(stored.Older, stored.Previous)
				stored.Older = stored.Older[max(0, len(stored.Older)-olderKept):]
			}
			stored.Previous, stored.PreviousUntil = mark, now.Add(previousLifetime).UTC()
			stored.Current = fingerprint(successor)
			stored.Expires = now.Add(s.cfg.RefreshTokenLifetime).UTC()
			g = *stored
			return nil
		case stored.Previous == mark && !s.clock.Ended(stored.PreviousUntil):
			g = *stored
			return unchanged
		case slices.Contains(stored.Older, mark):
			// RFC 9700, Section 4.14.2: a used-up token that comes back means that two hold it, and nobody knows who is who.
			replayed = true
			s.end(stored)
			return nil
		}
		return errRefresh.With(op, errors.New("used up, or not this grant's"))
	}, grantIndex)
	switch {
	case errors.Is(err, unchanged):
		err = nil
	case err == nil && replayed:
		s.tellEnded(ctx, id)
		s.metrics.replays.Inc()
		s.log.WarnContext(ctx, "a used-up refresh token came back, its grant is revoked", "owner", g.Subject, "client", g.Client)
		err = errRefresh.With(op, errors.New("replayed"))
	}
	if err != nil {
		return "", grant{}, "", err
	}
	return id, g, successor, nil
}

// revokeGrant ends a grant. Unknown ones are ended already.
func (s *Server) revokeGrant(ctx context.Context, id string, may func(grant) bool) error {
	unchanged := errors.New("nothing to store")
	over := false
	err := change(ctx, s.docs, collGrants, id, func(g *grant, rev uint64) error {
		over = rev != 0 && may(*g)
		if !over || g.Revoked {
			return unchanged
		}
		s.end(g)
		return nil
	}, grantIndex)
	if errors.Is(err, unchanged) {
		err = nil
	}
	if err == nil && over {
		// Also if it had ended before: that may have been stored by a call that failed after it, and told nobody.
		s.tellEnded(ctx, id)
	}
	return err
}

// revokeSubject ends the subject's grants that which names.
func (s *Server) revokeSubject(ctx context.Context, subject string, which func(grant) bool) error {
	for doc, err := range s.docs.Find(ctx, collGrants, "subject="+subject) {
		if err != nil {
			return trouble("list grants", err)
		}
		if err := s.revokeGrant(ctx, doc.Key, which); err != nil {
			return err
		}
	}
	return nil
}

// allowed is what the account's roles allow of the scopes. OpenID's own scopes need no role.
func allowed(scopes []string, a account) []string {
	return slices.DeleteFunc(slices.Clone(scopes), func(scope string) bool {
		return !slices.Contains(protocolScopes, scope) && !slices.Contains(a.scopes(), scope)
	})
}

// IssueToken makes an access token for the API, without a sign-in: for whoever is administrator of the hub's machine already.
// No scopes means all that the account's roles allow for the API. ttl zero means Config.AccessTokenLifetime. Kinds: NotFound
// for an unknown owner, Invalid for a ttl over MaxTokenLifetime, Denied when no scope is left.
func (s *Server) IssueToken(ctx context.Context, owner hub.Owner, scopes []string, ttl time.Duration) (string, error) {
	if ttl == 0 {
		ttl = s.cfg.AccessTokenLifetime
	}
	if ttl < time.Second || ttl > MaxTokenLifetime {
		return "", hub.NewError(hub.Invalid, "ttl-invalid", "a token may live between one second and 30 days")
	}
	a, err := s.account(ctx, string(owner))
	if err != nil {
		return "", err
	}
	if len(scopes) == 0 {
		scopes = apiScopes
	}
	granted := slices.DeleteFunc(allowed(scopes, a), func(scope string) bool { return !slices.Contains(apiScopes, scope) })
	if len(granted) == 0 {
		return "", errScope.With("issue token", nil)
	}
	g := grant{Subject: a.Name, Client: s.cfg.Clients.CLI.ID, Scopes: granted, AuthTime: s.clock.Now().UTC(), Expires: s.clock.Now().Add(ttl).UTC()}
	id := newGrantID()
	token, _, err := s.sign(ctx, id, g, granted, ttl)
	if err != nil {
		return "", err
	}
	if err := write(ctx, s.docs, collGrants, id, 0, g, grantIndex(g)...); err != nil {
		return "", err
	}
	return token, nil
}
