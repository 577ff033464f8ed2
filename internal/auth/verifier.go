package auth

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/clock"
)

// maxToken bounds a token's text. Providers' tokens have 1 to 4 KB.
const maxToken = 16 << 10

// doubtRetry is when a device should come again whose token's end is doubtful: soon enough to be there again shortly after it
// refreshed its token or the clock was set right, seldom enough for a fleet that all wait.
const doubtRetry = time.Minute

// algorithms are those with a public key; "none" and HMAC are not among them (RFC 8725, 3.1).
var algorithms = []jose.SignatureAlgorithm{
	jose.RS256, jose.RS384, jose.RS512, jose.PS256, jose.PS384, jose.PS512, jose.ES256, jose.ES384, jose.ES512,
}

var errExpired = errors.New("the token has expired")

// Options are what a Verifier needs besides the issuers.
type Options struct {
	// ClockSkew is how far an issuer's clock may be off; zero is none. Default() has 30 s.
	ClockSkew time.Duration
	// HTTPClient asks the issuers. Nil: one for each, that trusts the issuer's CAPool.
	HTTPClient *http.Client
	// Registerer takes the metrics; nil: there are none.
	Registerer prometheus.Registerer
	// Clock says whether a token's end has come. Nil: a watch of the system's clock.
	Clock *clock.Watch
}

// Verifier checks access tokens. Any goroutine may use it.
type Verifier struct {
	issuers map[string]*trusted // by Authority without a slash at the end; never changes
	skew    time.Duration
	clock   *clock.Watch
	metrics *metrics
	tokens  *remembered

	stop context.CancelFunc
	done sync.WaitGroup // fetches under way
}

// trusted is an issuer with its keys.
type trusted struct {
	IssuerConfig
	keys     *keySet
	reserved []string // prefixes of other issuers
}

// New makes a Verifier for the issuers, the first of which has the plain owner names. Mistakes in the configuration are
// returned all together. Nothing is fetched before the first token. Close ends it.
func New(issuers []IssuerConfig, opts Options) (*Verifier, error) {
	issuers = slices.Clone(issuers)
	for i := range issuers {
		if issuers[i].OwnerClaim == "" {
			issuers[i].OwnerClaim = "sub"
		}
	}
	if errs := validate(issuers); len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	if opts.ClockSkew < 0 || opts.ClockSkew > maxSkew {
		return nil, fmt.Errorf("authorization.clockSkew: %v is not between 0 and %v", opts.ClockSkew, maxSkew)
	}
	m, err := newMetrics(opts.Registerer)
	if err != nil {
		return nil, fmt.Errorf("register the metrics of auth: %w", err)
	}
	ctx, stop := context.WithCancel(context.Background())
	v := &Verifier{
		issuers: map[string]*trusted{}, skew: opts.ClockSkew, clock: opts.Clock, metrics: m, tokens: newRemembered(), stop: stop,
	}
	if v.clock == nil {
		v.clock = clock.New()
	}
	for i, cfg := range issuers {
		is := &trusted{IssuerConfig: cfg}
		is.keys = &keySet{
			fetch: cfg.Keys, ttl: embedTTL, metrics: m, ctx: ctx, done: &v.done, unknown: map[string]time.Time{},
		}
		if cfg.Keys == nil {
			client := opts.HTTPClient
			if client == nil {
				if client, err = newHTTPClient(cfg.CAPool); err != nil {
					stop()
					return nil, fmt.Errorf("authorization.issuers[%d].%w", i, err)
				}
			}
			is.keys.fetch, is.keys.ttl, is.keys.interval = httpKeys(client, cfg.Authority), keysTTL, fetchInterval
		}
		if i == 0 {
			for _, other := range issuers[1:] {
				is.reserved = append(is.reserved, other.OwnerPrefix)
			}
		}
		v.issuers[strings.TrimSuffix(cfg.Authority, "/")] = is
	}
	return v, nil
}

// Close ends fetches under way and waits for them. What was remembered still verifies, nothing new does.
func (v *Verifier) Close() {
	v.stop()
	v.done.Wait()
}

// Verify checks an access token and returns what it says. Kinds: Unauthenticated for a token that is missing, malformed,
// expired, revoked, for somebody else, or not signed by its issuer; Unavailable while that cannot be found out, while our
// clock is behind the issuer's, or while it is doubtful whether the end of a device's token, issued in this process, was leapt
// over by the clock.
func (v *Verifier) Verify(ctx context.Context, raw string) (hub.Claims, error) {
	claims, result, err := v.verify(ctx, raw)
	switch {
	case err == nil:
	case hub.IsKind(err, hub.Unauthenticated):
		result = "refused"
	default:
		result = "unavailable"
	}
	v.metrics.token(result)
	return claims, err
}

func (v *Verifier) verify(ctx context.Context, raw string) (hub.Claims, string, error) {
	const op = "auth.Verify"
	refuse := func(text string, err error) (hub.Claims, string, error) {
		return hub.Claims{}, "", badToken(op, text, err)
	}
	switch {
	case raw == "":
		return refuse("the token is missing", nil)
	case len(raw) > maxToken:
		return refuse("the token is too long", nil)
	}
	now := v.clock.Now()
	hash := sha256.Sum256([]byte(raw))
	if known, ok := v.tokens.get(hash); ok {
		switch {
		case !now.Before(known.claims.Expiry.Add(v.skew)):
			v.tokens.drop(hash) // what follows says why it is refused
		case known.issuer.keys.current(known.version):
			if err := v.revoked(ctx, known); err != nil {
				return hub.Claims{}, "", err
			}
			return clone(known.claims), "remembered", nil
		}
	}
	// RFC 7515, 3.1: three parts; anything else, JSON forms included, is refused before it is looked at.
	jws, err := jose.ParseSignedCompact(raw, algorithms)
	if err != nil {
		return refuse("the token is malformed", err)
	}
	head := jws.Signatures[0].Protected
	if !accessType(head) {
		return refuse("the token is of another type", nil)
	}
	if head.KeyID == "" || len(head.KeyID) > maxOwner {
		return refuse("the token names no key", nil)
	}
	payload := jws.UnsafePayloadWithoutVerification()
	c, err := parseClaims(payload)
	if err != nil {
		return refuse("the token is malformed", err)
	}
	// What the token says is checked before its signature: it is cheaper, and a token that could not be good in any case
	// makes nobody fetch keys. Nothing of it is returned before the signature was found good.
	iss, err := c.text("iss")
	if err != nil {
		return refuse("the token is malformed", err)
	}
	is, ok := v.issuers[strings.TrimSuffix(iss, "/")]
	if !ok || iss == "" {
		return refuse("the token is of an unknown issuer", nil)
	}
	claims, issued, err := is.check(c, now, v.skew)
	late := false
	if errors.Is(err, errExpired) {
		if claims, issued, late, err = v.leapt(is, c); !late {
			return hub.Claims{}, "", expired(op)
		}
	}
	if err != nil {
		return refuse("the token is not good here", err)
	}
	key, version, err := is.keys.key(ctx, head.KeyID, issued)
	if err != nil {
		return hub.Claims{}, "", verdict(err)
	}
	// RFC 8725, 3.1: a key that is for one algorithm is not used with another. go-jose compares the key's type itself.
	if key.Algorithm != "" && key.Algorithm != head.Algorithm {
		return refuse("the signature is not good", errors.New("the key is for "+key.Algorithm))
	}
	if _, err := jws.Verify(key.Key); err != nil {
		return refuse("the signature is not good", err)
	}
	if is.Keys == nil && now.Add(v.skew).Before(issued) {
		// Nobody issues ahead of time, so one of two clocks is wrong, and the signature says that the token is not: a device
		// that is told so drops a good credential. An issuer in this process has our own clock, which was stepped back since:
		// for its tokens there is nothing to wait for.
		return hub.Claims{}, "", &hub.Error{
			Kind: hub.Unavailable, Op: op, Text: "the hub's clock is behind the identity provider's", RetryAfter: fetchInterval,
			Err: fmt.Errorf("the token was issued at %v, it is %v", issued, now),
		}
	}
	done := &verified{hash: hash, claims: claims, issued: issued, issuer: is, version: version}
	if err := v.revoked(ctx, done); err != nil {
		return hub.Claims{}, "", err
	}
	if late {
		// RFC 7519, 4.1.4: it must not be accepted. But the clock did this and not the device, which would drop a good
		// credential; its refresh token still works (see oauth-server).
		return hub.Claims{}, "", &hub.Error{
			Kind: hub.Unavailable, Op: op, Text: "the hub's clock was set forward", RetryAfter: doubtRetry,
			Err: fmt.Errorf("the clock leapt over the token's end, %v", claims.Expiry),
		}
	}
	v.tokens.put(done)
	return clone(claims), "verified", nil
}

// leapt looks at an expired token once more, as of the moment before its end, and reports whether it is one of a device, issued
// in this process, whose end was leapt over not long ago. An application's is left expired: it signs in again, while on a machine
// that merely slept it would be kept waiting. An issuer elsewhere has a clock of its own, and ours is right now, or will be.
func (v *Verifier) leapt(is *trusted, c claimSet) (hub.Claims, time.Time, bool, error) {
	exp, err := c.when("exp")
	if err != nil || is.Keys == nil || !v.clock.Doubtful(exp.Add(v.skew)) {
		return hub.Claims{}, time.Time{}, false, err
	}
	claims, issued, err := is.check(c, exp.Add(-time.Second), v.skew)
	return claims, issued, err == nil && claims.Device, err
}

// revoked asks the issuer's hook. That it cannot answer is trouble of ours.
func (v *Verifier) revoked(ctx context.Context, t *verified) error {
	const op = "auth.Verify"
	if t.issuer.Revoked == nil {
		return nil
	}
	gone, err := t.issuer.Revoked(ctx, Token{
		ID: t.claims.TokenID, Issuer: t.claims.Issuer, Subject: t.claims.Subject, ClientID: t.claims.ClientID,
		IssuedAt: t.issued, Expiry: t.claims.Expiry,
	})
	switch {
	case err != nil:
		return unavailable(op, fmt.Errorf("ask whether the token was revoked: %w", err))
	case gone:
		v.tokens.drop(t.hash)
		return (&hub.Error{Kind: hub.Unauthenticated, Code: "token-revoked", Text: "the token was revoked"}).With(op, nil)
	}
	return nil
}

func expired(op string) error {
	return (&hub.Error{Kind: hub.Unauthenticated, Code: "token-expired", Text: "the token has expired"}).With(op, nil)
}

// accessType accepts what access tokens call themselves (RFC 9068, 2.1; RFC 8725, 3.11). Others, such as logout tokens and
// proofs of possession, are signed with the same keys.
func accessType(h jose.Header) bool {
	typ, ok := h.ExtraHeaders[jose.HeaderType]
	if !ok {
		return true
	}
	s, ok := typ.(string)
	if !ok {
		return false
	}
	switch strings.TrimPrefix(strings.ToLower(s), "application/") {
	case "", "jwt", "at+jwt":
		return true
	}
	return false
}

// clone keeps callers from changing what is remembered.
func clone(c hub.Claims) hub.Claims {
	c.Scopes, c.Audience = slices.Clone(c.Scopes), slices.Clone(c.Audience)
	return c
}
