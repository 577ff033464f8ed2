package oauthserver

import (
	"testing"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/clock"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

const year = 365 * 24 * time.Hour

// hand is a clock that tests set; it goes on from the machine's, for what the library looks at itself.
type hand struct {
	start       time.Time
	set, passed time.Duration
}

func (h *hand) read() (time.Time, time.Duration) { return h.start.Add(h.set + h.passed), h.passed }

func serverAt(t *testing.T, docs *storetest.Memory) (*Server, *hand) {
	t.Helper()
	h := &hand{start: time.Now()}
	s, err := openAt(t.Context(), config(), docs, owners(nobody), quiet(), prometheus.NewRegistry(), cheap, clock.With(h.read))
	if err != nil {
		t.Fatal(err)
	}
	return s, h
}

// Without a clock of its own, a hub is years behind until NTP sets its clock. What devices got before is as good as its age.
func TestClockSetForwardCostsNoDeviceItsCredential(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	s, h := serverAt(t, docs)
	ctx := t.Context()
	printed, repeated := onboard(t, s, meter), onboard(t, s, lamp)
	tokens := must[hub.Tokens](t)(s.Exchange(ctx, lamp, "", repeated))
	_, secret, _ := parseRefreshToken(tokens.Refresh)
	id, _, _ := parseRefreshToken(tokens.Refresh)
	jti, _ := unverifiedTokenID(tokens.Access)

	h.set = 6 * year // farther than any key, token or grant lives
	s.sweep(ctx)
	if ok, err := s.Active(ctx, jti); err != nil || !ok {
		t.Fatalf("the grant ended: %v", err)
	}
	if again := must[hub.Tokens](t)(s.Exchange(ctx, lamp, "", repeated)); again != tokens {
		t.Error("the repeat of a code gives other tokens")
	}
	must[hub.Tokens](t)(s.Exchange(ctx, meter, "", printed))
	set := must[jose.JSONWebKeySet](t)(s.Keys(ctx))
	parsed := must[*jwt.JSONWebToken](t)(jwt.ParseSigned(tokens.Access, []jose.SignatureAlgorithm{jose.ES256}))
	if err := parsed.Claims(set, &jwt.Claims{}); err != nil {
		t.Errorf("the key of tokens from before was forgotten: %v", err)
	}
	next := must[hub.Tokens](t)(s.Refresh(ctx, lamp, tokens.Refresh))
	if next.Refresh != s.next(id, secret) {
		t.Error("another refresh token than the next")
	}
	latest := h.start.Add(h.set + s.cfg.AccessTokenLifetime)
	if early := latest.Sub(next.Expiry); early < -time.Second || early > s.cfg.AccessTokenLifetime/10+2*time.Second {
		t.Errorf("the new token ends at %v, want up to a tenth before %v", next.Expiry, latest)
	}
	must[hub.Tokens](t)(s.Refresh(ctx, lamp, tokens.Refresh)) // the answer was lost

	// Refreshed once, the device needs nobody to remember the leap.
	var g grant
	if _, err := read(ctx, docs, collGrants, id, &g); err != nil || g.Expires.Before(h.start.Add(h.set)) {
		t.Errorf("the grant ends at %v: %v", g.Expires, err)
	}
}

// By the time that passes, everything still ends.
func TestWhatTheClockLeaptOverEndsLater(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	s, h := serverAt(t, docs)
	ctx := t.Context()
	tokens := must[hub.Tokens](t)(s.Exchange(ctx, lamp, "", onboard(t, s, lamp)))
	printed := onboard(t, s, meter)
	h.set = year
	s.sweep(ctx) // looks at the clock
	h.passed = 15*time.Minute + time.Second
	_, err := s.Exchange(ctx, meter, "", printed)
	wantKind(t, err, hub.Unauthenticated, "code-invalid")
	h.passed = s.cfg.RefreshTokenLifetime + time.Second
	_, err = s.Refresh(ctx, lamp, tokens.Refresh)
	wantKind(t, err, hub.Unauthenticated, "refresh-token-invalid")
	h.passed += repeatWindow
	s.sweep(ctx)
	for _, collection := range []string{collGrants, collCodes} {
		if n := len(docs.Docs[collection]); n != 0 {
			t.Errorf("%d documents left in %s", n, collection)
		}
	}
}

// A slip of a hand, put right within the hour, leaves everything as it was.
func TestClockSetForwardByMistake(t *testing.T) {
	t.Parallel()
	s, h := serverAt(t, storetest.NewMemory())
	ctx := t.Context()
	kids := func() map[string]bool {
		out := map[string]bool{}
		for _, k := range must[jose.JSONWebKeySet](t)(s.Keys(ctx)).Keys {
			out[k.KeyID] = true
		}
		return out
	}
	tokens := must[hub.Tokens](t)(s.Exchange(ctx, lamp, "", onboard(t, s, lamp)))
	before := kids()
	h.set = 6 * year
	must[string](t)(s.IssueToken(ctx, admin, nil, 0))
	s.sweep(ctx)
	h.set = 0
	for kid := range before {
		if !kids()[kid] {
			t.Errorf("key %s is gone", kid)
		}
	}
	tokens = must[hub.Tokens](t)(s.Refresh(ctx, lamp, tokens.Refresh))
	// The key that was made meanwhile begins in six years, the one before it ends in a month.
	for range 14 {
		h.passed += 30 * 24 * time.Hour
		tokens = must[hub.Tokens](t)(s.Refresh(ctx, lamp, tokens.Refresh))
	}
}

// A clock that was ahead made keys that begin later than now; they sign all the same, or the hub could not issue anything.
func TestKeysSignThoughTheClockWasSetBack(t *testing.T) {
	t.Parallel()
	for name, ahead := range map[string]time.Duration{"an hour": time.Hour, "a year": year} {
		h := &hand{start: time.Now()}
		k := &keys{lifetime: 30 * 24 * time.Hour, clock: clock.With(h.read)}
		ring := must[[]signingKey](t)(k.rotate(nil, h.start.Add(ahead)))
		ring = must[[]signingKey](t)(k.rotate(ring, h.start))
		if key, ok := signer(ring, h.start); !ok || key.ID != ring[0].ID {
			t.Errorf("set back by %s: no key signs", name)
		}
	}
}
