package oauthserver

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"github.com/go-jose/go-jose/v4/jwt"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const (
	lamp  = hub.DeviceID("11111111-0000-4000-8000-000000000001")
	meter = hub.DeviceID("11111111-0000-4000-8000-000000000002")
	admin = hub.Owner("admin")
	base  = "http://127.0.0.1:8080"
)

// cheap keeps hashing out of the tests' time; TestPasswords uses the real cost once.
var cheap = cost{time: 1, memory: 8, threads: 1}

// owners is an Ownership of a function.
type owners func(hub.DeviceID) (hub.Ownership, error)

func (o owners) Owner(_ context.Context, dev hub.DeviceID) (hub.Ownership, error) { return o(dev) }

func nobody(hub.DeviceID) (hub.Ownership, error) {
	return hub.Ownership{}, &hub.Error{Kind: hub.NotFound}
}

func ownedBy(owner hub.Owner) owners {
	return func(dev hub.DeviceID) (hub.Ownership, error) {
		return hub.Ownership{Device: dev, Owner: owner, Generation: 1}, nil
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func config() Config {
	cfg := Default()
	cfg.BaseURL = base
	return cfg
}

func openServer(t *testing.T, cfg Config, docs *storetest.Memory, own Ownership) *Server {
	t.Helper()
	s, err := openWith(t.Context(), cfg, docs, own, quiet(), prometheus.NewRegistry(), cheap)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func newServer(t *testing.T) *Server {
	return openServer(t, config(), storetest.NewMemory(), owners(nobody))
}

func wantKind(t *testing.T, err error, kind hub.Kind, code string) {
	t.Helper()
	if !hub.IsKind(err, kind) {
		t.Fatalf("error %v, want kind %s", err, kind)
	}
	if got, _ := hub.Public(err); code != "" && got != code {
		t.Fatalf("code %q, want %q", got, code)
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// verify checks a token as a door would, with the keys of the process, and returns its claims.
func verify(t *testing.T, s *Server, token string) map[string]any {
	t.Helper()
	parsed, err := jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})
	if err != nil {
		t.Fatal(err)
	}
	set := must[jose.JSONWebKeySet](t)(s.Keys(t.Context()))
	var std jwt.Claims
	claims := map[string]any{}
	if err := parsed.Claims(set, &claims, &std); err != nil {
		t.Fatalf("signature: %v", err)
	}
	err = std.ValidateWithLeeway(jwt.Expected{Issuer: s.Issuer(), AnyAudience: jwt.Audience{s.Audience()}, Time: time.Now()}, 0)
	if err != nil {
		t.Fatal(err)
	}
	return claims
}

func onboard(t *testing.T, s *Server, dev hub.DeviceID) string {
	t.Helper()
	text, expires, err := s.OnboardCode(t.Context(), admin, dev, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d := time.Until(expires); d > 15*time.Minute || d < 14*time.Minute {
		t.Fatalf("the code lives %s", d)
	}
	return text
}

// A device is awaited from its code to the code's use, and so long only.
func TestAwaited(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	awaited := func(owner hub.Owner) []hub.DeviceID {
		t.Helper()
		all, err := s.Awaited(t.Context(), owner)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Sorted(maps.Keys(all))
	}
	onboard(t, s, "")
	text := onboard(t, s, lamp)
	onboard(t, s, meter)
	if got := awaited(admin); !slices.Equal(got, []hub.DeviceID{lamp, meter}) {
		t.Errorf("awaited: %v", got)
	}
	if got := awaited("bob"); len(got) > 0 {
		t.Errorf("bob awaits %v", got)
	}
	if _, err := s.Exchange(t.Context(), lamp, "cert", text); err != nil {
		t.Fatal(err)
	}
	if got := awaited(admin); !slices.Equal(got, []hub.DeviceID{meter}) {
		t.Errorf("awaited, once it has come: %v", got)
	}
}

func TestDeviceCodeGivesADevicesToken(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	for name, dev := range map[string]hub.DeviceID{"for the device": lamp, "for any device": ""} {
		t.Run(name, func(t *testing.T) {
			text := onboard(t, s, dev)
			tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text))
			claims := verify(t, s, tokens.Access)
			for claim, want := range map[string]any{
				"sub": "admin", "device_id": string(lamp), "scope": "device", "token_use": "access", "client_id": "coaphub-device",
				"iss": base + "/oauth",
			} {
				if claims[claim] != want {
					t.Errorf("%s is %v, want %v", claim, claims[claim], want)
				}
			}
			if d := time.Until(tokens.Expiry); d > time.Hour || d < 54*time.Minute-5*time.Second || tokens.Refresh == "" {
				t.Errorf("lives %s, refresh token %q", d, tokens.Refresh)
			}
			if ok, err := s.Active(t.Context(), claims["jti"].(string)); err != nil || !ok {
				t.Errorf("Active: %v, %v", ok, err)
			}
		})
	}
}

// Devices that come together do not refresh together: each token ends at another time, which the answer says. Those of people
// and programs live as long as configured.
func TestDeviceTokensEndAtDifferentTimes(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	ends := map[int64]bool{}
	check := func(tokens hub.Tokens) {
		t.Helper()
		end := int64(verify(t, s, tokens.Access)["exp"].(float64))
		if left := time.Until(tokens.Expiry); tokens.Expiry.Unix() != end || left > time.Hour || left < 54*time.Minute-5*time.Second {
			t.Errorf("the answer says that it ends at %d, in %v, and it ends at %d", tokens.Expiry.Unix(), left, end)
		}
		ends[end] = true
	}
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", onboard(t, s, lamp)))
	check(tokens)
	for range 20 {
		tokens = must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, tokens.Refresh))
		check(tokens)
	}
	if len(ends) < 10 {
		t.Errorf("21 tokens end at %d different times", len(ends))
	}
	claims := verify(t, s, must[string](t)(s.IssueToken(t.Context(), admin, nil, 0)))
	if lives := claims["exp"].(float64) - claims["iat"].(float64); lives < 3599 || lives > 3600 {
		t.Errorf("an owner's token lives %v s", lives)
	}
}

func TestDeviceIDClaimIsConfigurable(t *testing.T) {
	t.Parallel()
	cfg := config()
	cfg.DeviceIDClaim = "https://plgd.dev/deviceId"
	s := openServer(t, cfg, storetest.NewMemory(), owners(nobody))
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
	if got := verify(t, s, tokens.Access)["https://plgd.dev/deviceId"]; got != string(lamp) {
		t.Fatalf("claim is %v", got)
	}
}

func TestCodesAreRefused(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		text := onboard(t, s, lamp)
		_, err := s.Exchange(t.Context(), meter, "cert", text)
		wantKind(t, err, hub.Unauthenticated, "code-invalid") // for another device, and good afterwards
		for _, bad := range []string{"", "nonsense", text + "x"} {
			_, err := s.Exchange(t.Context(), lamp, "cert", bad)
			wantKind(t, err, hub.Unauthenticated, "code-invalid")
		}
		time.Sleep(15*time.Minute + time.Second)
		_, err = s.Exchange(t.Context(), lamp, "cert", text)
		wantKind(t, err, hub.Unauthenticated, "code-invalid")
		_, _, err = s.OnboardCode(t.Context(), "stranger", lamp, 0)
		wantKind(t, err, hub.NotFound, "account-unknown")
		_, _, err = s.OnboardCode(t.Context(), admin, lamp, 48*time.Hour)
		wantKind(t, err, hub.Invalid, "ttl-invalid")
	})
}

// Where only the token says which device it is, the code and the refresh token do.
func TestExchangeForTheDeviceOfTheCode(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	text := onboard(t, s, lamp)
	first := must[hub.Tokens](t)(s.Exchange(t.Context(), "", "", text))
	for _, dev := range []hub.DeviceID{"", lamp} { // it is the same device that asks again
		if again := must[hub.Tokens](t)(s.Exchange(t.Context(), dev, "", text)); again != first {
			t.Errorf("a repeat as %q gives other tokens", dev)
		}
	}
	next := must[hub.Tokens](t)(s.Refresh(t.Context(), "", first.Refresh))
	for _, token := range []string{first.Access, next.Access} {
		if got := verify(t, s, token)["device_id"]; got != string(lamp) {
			t.Errorf("the token is for %v", got)
		}
	}
	_, err := s.Refresh(t.Context(), meter, next.Refresh)
	wantKind(t, err, hub.Unauthenticated, "refresh-token-invalid")
	anyone := onboard(t, s, "")
	_, err = s.Exchange(t.Context(), "", "", anyone)
	wantKind(t, err, hub.Invalid, "device-id-missing")
	must[hub.Tokens](t)(s.Exchange(t.Context(), meter, "", anyone)) // it is good afterwards
}

func TestCodeIsRepeatableForTheSameDeviceFor60s(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		text := onboard(t, s, "")
		first := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text))
		time.Sleep(59 * time.Second)
		if again := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text)); again != first {
			t.Fatal("a repeat gives other tokens")
		}
		_, err := s.Exchange(t.Context(), meter, "cert", text)
		wantKind(t, err, hub.Unauthenticated, "code-used")
		_, err = s.Exchange(t.Context(), lamp, "another", text)
		wantKind(t, err, hub.Unauthenticated, "code-used")
		time.Sleep(2 * time.Second)
		_, err = s.Exchange(t.Context(), lamp, "cert", text)
		wantKind(t, err, hub.Unauthenticated, "code-used")
	})
}

func TestParallelDeviceRedemptionsGiveOneToken(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	stores := []*Server{openServer(t, config(), docs, owners(nobody)), openServer(t, config(), docs, owners(nobody))}
	text := onboard(t, stores[0], "")
	tokens, errs := make([]hub.Tokens, 8), make([]error, 8)
	var wg sync.WaitGroup
	for i := range tokens {
		wg.Go(func() { // two devices with one code
			tokens[i], errs[i] = stores[i%2].Exchange(t.Context(), []hub.DeviceID{lamp, meter}[i%2], "cert", text)
		})
	}
	wg.Wait()
	given := map[hub.Tokens]bool{}
	for i, err := range errs {
		if err != nil {
			wantKind(t, err, hub.Unauthenticated, "code-used")
			continue
		}
		given[tokens[i]] = true
	}
	if len(given) != 1 || len(docs.Docs[collGrants]) != 1 {
		t.Fatalf("%d different tokens, %d grants", len(given), len(docs.Docs[collGrants]))
	}
}

func TestCrashBetweenCodeAndGrantIsFinishedByARepeat(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	s := openServer(t, config(), docs, owners(nobody))
	text := onboard(t, s, lamp)
	docs.Fail = func(op, collection, _ string) error {
		if op == "put" && collection == collGrants {
			return errors.New("power cut")
		}
		return nil
	}
	_, err := s.Exchange(t.Context(), lamp, "cert", text)
	wantKind(t, err, hub.Unavailable, "")
	docs.Fail = nil
	s = openServer(t, config(), docs, owners(nobody))
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text))
	must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, tokens.Refresh))
}

func TestDeviceIDIsGrantedForUnownedAndOwnDevicesOnly(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	own := owners(nobody)
	s := openServer(t, config(), docs, owners(func(dev hub.DeviceID) (hub.Ownership, error) { return own(dev) }))
	text := onboard(t, s, lamp)
	own = ownedBy("somebody")
	_, err := s.Exchange(t.Context(), lamp, "cert", text)
	wantKind(t, err, hub.Denied, "device-owned-by-other")
	_, _, err = s.OnboardCode(t.Context(), admin, lamp, 0)
	wantKind(t, err, hub.Denied, "device-owned-by-other")
	own = func(hub.DeviceID) (hub.Ownership, error) { return hub.Ownership{}, errors.New("away") }
	_, err = s.Exchange(t.Context(), lamp, "cert", text)
	wantKind(t, err, hub.Unavailable, "") // not a refusal
	own = ownedBy(admin)
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text))
	own = ownedBy("somebody") // the device changed hands: the old owner's tokens end
	_, err = s.Refresh(t.Context(), lamp, tokens.Refresh)
	wantKind(t, err, hub.Unauthenticated, "")
}

func TestRefreshRotates(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		refresh := func(token string) hub.Tokens {
			t.Helper()
			return must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, token))
		}
		first := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
		second := refresh(first.Refresh)
		if second.Refresh == first.Refresh || second.Access == first.Access {
			t.Fatal("nothing is new")
		}
		if got := verify(t, s, second.Access)["device_id"]; got != string(lamp) {
			t.Fatalf("device_id after a refresh is %v", got)
		}
		time.Sleep(23 * time.Hour) // the answer was lost: the previous one works and gives the same
		if again := refresh(first.Refresh); again.Refresh != second.Refresh {
			t.Fatal("a repeat gives another refresh token")
		}
		third := refresh(second.Refresh)
		_, err := s.Refresh(t.Context(), lamp, first.Refresh) // the new one was used: the one before ends, and the grant with it
		wantKind(t, err, hub.Unauthenticated, "refresh-token-invalid")
		_, err = s.Refresh(t.Context(), lamp, third.Refresh)
		wantKind(t, err, hub.Unauthenticated, "refresh-token-invalid")
	})
}

func TestPreviousRefreshTokenEndsAfter24h(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		first := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
		second := must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, first.Refresh))
		time.Sleep(24*time.Hour + time.Second)
		_, err := s.Refresh(t.Context(), lamp, first.Refresh)
		wantKind(t, err, hub.Unauthenticated, "")
		must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, second.Refresh)) // late is no theft
	})
}

func TestRefreshTokenSlidesAndEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
		for range 3 {
			time.Sleep(80 * 24 * time.Hour)
			tokens = must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, tokens.Refresh))
		}
		time.Sleep(91 * 24 * time.Hour)
		_, err := s.Refresh(t.Context(), lamp, tokens.Refresh)
		wantKind(t, err, hub.Unauthenticated, "")
		s.sweep(t.Context())
		for _, collection := range []string{collGrants, collCodes} {
			if n := len(s.standing.Documents.(*storetest.Memory).Docs[collection]); n != 0 {
				t.Errorf("%d documents left in %s", n, collection)
			}
		}
	})
}

func TestRefreshTokensOfOthersAreRefused(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
	id, _, _ := parseRefreshToken(tokens.Refresh)
	for name, try := range map[string]struct {
		dev   hub.DeviceID
		token string
	}{
		"another device": {meter, tokens.Refresh},
		"nonsense":       {lamp, "nonsense"},
		"empty":          {lamp, ""},
		"access token":   {lamp, tokens.Access},
		// Who knows an access token knows the grant: guessing on it must not end it.
		"right grant, wrong secret": {lamp, refreshToken(id, make([]byte, 32))},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.Refresh(t.Context(), try.dev, try.token)
			wantKind(t, err, hub.Unauthenticated, "refresh-token-invalid")
		})
	}
	must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, tokens.Refresh))
}

func TestParallelRefreshesAgree(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
	got := make([]string, 8)
	var wg sync.WaitGroup
	for i := range got {
		wg.Go(func() {
			next, err := s.Refresh(t.Context(), lamp, tokens.Refresh)
			if err != nil {
				t.Error(err)
			}
			got[i] = next.Refresh
		})
	}
	wg.Wait()
	if slices.Sort(got); got[0] != got[7] {
		t.Fatal("parallel refreshes gave different refresh tokens")
	}
}

func TestRevokeEndsTokens(t *testing.T) {
	t.Parallel()
	for name, pick := range map[string]func(hub.Tokens) hub.Tokens{
		"refresh token": func(t hub.Tokens) hub.Tokens { return hub.Tokens{Refresh: t.Refresh} },
		"access token":  func(t hub.Tokens) hub.Tokens { return hub.Tokens{Access: t.Access} },
	} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t)
			text := onboard(t, s, lamp)
			tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", text))
			if err := s.Revoke(t.Context(), pick(tokens)); err != nil {
				t.Fatal(err)
			}
			_, err := s.Refresh(t.Context(), lamp, tokens.Refresh)
			wantKind(t, err, hub.Unauthenticated, "")
			_, err = s.Exchange(t.Context(), lamp, "", text) // within the repeat window
			wantKind(t, err, hub.Unauthenticated, "code-used")
			if ok, err := s.Active(t.Context(), verify(t, s, tokens.Access)["jti"].(string)); ok || err != nil {
				t.Fatalf("Active: %v, %v", ok, err)
			}
		})
	}
	if err := newServer(t).Revoke(t.Context(), hub.Tokens{Access: "x", Refresh: "y"}); err != nil {
		t.Fatal(err)
	}
}

// Who lives on tokens of a grant is told of its end, whatever ended it, and once that is stored; a token that took the place of
// another is no end.
func TestEndedGrantsAreTold(t *testing.T) {
	t.Parallel()
	var s *Server
	var told []string
	cfg, docs := config(), storetest.NewMemory()
	cfg.Ended = func(id string) {
		if ok, err := s.Active(t.Context(), id); ok || err != nil {
			t.Errorf("told of a grant that stands: %v, %v", ok, err)
		}
		told = append(told, id)
	}
	s = openServer(t, cfg, docs, owners(nobody))
	if _, err := s.AddUser(t.Context(), "vera", "viewers password", []string{RoleUser}); err != nil {
		t.Fatal(err)
	}
	device := func() (hub.Tokens, string) {
		tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
		return tokens, GrantOf(verify(t, s, tokens.Access)["jti"].(string))
	}
	want := func(what string, ids ...string) {
		t.Helper()
		if !slices.Equal(told, ids) {
			t.Fatalf("%s: told of %q, want %q", what, told, ids)
		}
		told = nil
	}
	tokens, id := device()
	second := must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, tokens.Refresh))
	must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, second.Refresh))
	want("a refresh")
	_, err := s.Refresh(t.Context(), lamp, tokens.Refresh)
	wantKind(t, err, hub.Unauthenticated, "refresh-token-invalid")
	want("a used-up refresh token that came back", id)

	tokens, id = device()
	for range 2 { // the first call may have ended after it was stored and before anybody was told
		if err := s.Revoke(t.Context(), hub.Tokens{Access: tokens.Access}); err != nil {
			t.Fatal(err)
		}
		want("a revocation", id)
	}
	if err := s.Revoke(t.Context(), hub.Tokens{Refresh: refreshToken(newGrantID(), make([]byte, 32))}); err != nil {
		t.Fatal(err)
	}
	want("a grant that never was")

	_, id = device()
	text := must[string](t)(s.IssueToken(t.Context(), "vera", nil, time.Hour))
	if err := s.setPassword(t.Context(), "vera", "another password", false, ""); err != nil {
		t.Fatal(err)
	}
	want("a password", GrantOf(verify(t, s, text)["jti"].(string)))
	if err := s.revokeSubject(t.Context(), firstAccount, func(g grant) bool { return g.Device == lamp && !g.Revoked }); err != nil {
		t.Fatal(err)
	}
	want("all of a subject's devices", id)
}

func TestIssueToken(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	if _, err := s.AddUser(t.Context(), "Vera", "viewers password", []string{RoleViewer}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		owner  hub.Owner
		scopes []string
		ttl    time.Duration
		want   string // scope claim
		kind   hub.Kind
	}{
		{owner: admin, want: "devices:read devices:write admin device:signup"},
		{owner: admin, scopes: []string{hub.ScopeRead, "unknown"}, want: "devices:read"},
		{owner: admin, scopes: []string{hub.ScopeDevice}, kind: hub.Denied}, // only devices get that
		{owner: "vera", want: "devices:read"},
		{owner: "vera", scopes: []string{hub.ScopeAdmin}, kind: hub.Denied},
		{owner: "nobody", kind: hub.NotFound},
		{owner: admin, ttl: 30 * 24 * time.Hour, want: "devices:read devices:write admin device:signup"},
		{owner: admin, ttl: 30*24*time.Hour + time.Second, kind: hub.Invalid},
		{owner: admin, ttl: -time.Second, kind: hub.Invalid},
	} {
		token, err := s.IssueToken(t.Context(), c.owner, c.scopes, c.ttl)
		if c.want == "" {
			wantKind(t, err, c.kind, "")
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		claims := verify(t, s, token)
		if claims["scope"] != c.want || claims["sub"] != string(c.owner) || claims["device_id"] != nil || claims["token_use"] != "access" {
			t.Errorf("%+v: claims %v", c, claims)
		}
		want := c.ttl
		if want == 0 {
			want = time.Hour
		}
		if d := time.Until(time.Unix(int64(claims["exp"].(float64)), 0)); d > want || d < want-5*time.Second {
			t.Errorf("%+v: lives %s", c, d)
		}
	}
}

func TestIssuerIsFixedAtTheFirstStart(t *testing.T) {
	docs := storetest.NewMemory()
	if s := openServer(t, config(), docs, owners(nobody)); s.Issuer() != base+"/oauth" {
		t.Fatal(s.Issuer())
	}
	moved := config()
	moved.BaseURL = "https://elsewhere:443" // listeners may change
	if s := openServer(t, moved, docs, owners(nobody)); s.Issuer() != base+"/oauth" {
		t.Fatal(s.Issuer())
	}
	moved.Issuer = "https://elsewhere/oauth"
	_, err := openWith(t.Context(), moved, docs, owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
	wantKind(t, err, hub.Invalid, "issuer-fixed")
	none := Default()
	_, err = openWith(t.Context(), none, storetest.NewMemory(), owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
	wantKind(t, err, hub.Invalid, "")
}

func TestKeysRotateWithOverlap(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		ctx, stop := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- s.Run(ctx, func() {}) }()
		kid := func(token string) string {
			return must[*jwt.JSONWebToken](t)(jwt.ParseSigned(token, []jose.SignatureAlgorithm{jose.ES256})).Headers[0].KeyID
		}
		published := map[string]time.Time{} // when a verifier could first see the key
		signing := map[string]bool{}
		var long string // the longest possible token, made just before a rotation
		for day := range 100 {
			for _, k := range must[jose.JSONWebKeySet](t)(s.Keys(t.Context())).Keys {
				if _, ok := published[k.KeyID]; !ok {
					published[k.KeyID] = time.Now()
				}
			}
			token := must[string](t)(s.IssueToken(t.Context(), admin, nil, 0))
			verify(t, s, token)
			if id := kid(token); !signing[id] {
				signing[id] = true
				if len(signing) > 1 && time.Since(published[id]) < publishedAhead-sweepEvery {
					t.Errorf("day %d: key signs %s after it was published", day, time.Since(published[id]))
				}
			}
			if day == 29 {
				long = must[string](t)(s.IssueToken(t.Context(), admin, nil, MaxTokenLifetime))
			}
			if day > 29 && day < 59 {
				verify(t, s, long)
			}
			time.Sleep(24 * time.Hour)
		}
		if len(signing) < 3 || len(signing) > 4 {
			t.Errorf("%d keys signed in 100 days", len(signing))
		}
		if n := len(must[jose.JSONWebKeySet](t)(s.Keys(t.Context())).Keys); n > 4 {
			t.Errorf("%d keys are kept", n)
		}
		other := openServer(t, config(), s.standing.Documents.(*storetest.Memory), owners(nobody)) // keys outlive a restart
		verify(t, other, must[string](t)(s.IssueToken(t.Context(), admin, nil, 0)))
		stop()
		<-done
	})
}

// Trouble of ours must never look like a bad credential: devices drop theirs.
func TestStoreTroubleIsNeverARefusal(t *testing.T) {
	t.Parallel()
	for _, op := range []string{"get", "put"} {
		docs := storetest.NewMemory()
		s := openServer(t, config(), docs, owners(nobody))
		text := onboard(t, s, lamp)
		tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
		docs.Fail = func(at, _, _ string) error {
			if at == op {
				return &hub.Error{Kind: hub.Denied} // whatever the store says
			}
			return nil
		}
		_, err := s.Exchange(t.Context(), lamp, "", text)
		wantKind(t, err, hub.Unavailable, "")
		_, err = s.Refresh(t.Context(), lamp, tokens.Refresh)
		wantKind(t, err, hub.Unavailable, "")
		wantKind(t, s.Revoke(t.Context(), tokens), hub.Unavailable, "")
		_, err = s.IssueToken(t.Context(), admin, nil, 0)
		wantKind(t, err, hub.Unavailable, "")
		docs.Fail = nil
		must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", text))
		must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, tokens.Refresh))
	}
}

func TestNothingSecretIsStoredInTheClear(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	s := openServer(t, config(), docs, owners(nobody))
	_, password, ok := s.FirstLogin()
	if !ok {
		t.Fatal("no first login")
	}
	text := onboard(t, s, lamp)
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", text))
	for collection, all := range docs.Docs {
		for _, d := range all {
			for name, secret := range map[string]string{"password": password, "code": text, "refresh": tokens.Refresh, "access": tokens.Access} {
				if strings.Contains(d.Key+string(d.Value), secret) {
					t.Errorf("%s: a %s is readable", collection, name)
				}
			}
		}
	}
}

func TestConfigReportsAllMistakes(t *testing.T) {
	if errs := Default().Validate(); len(errs) != 0 {
		t.Fatal(errs)
	}
	bad := Default()
	bad.Issuer, bad.Audience, bad.DeviceIDClaim, bad.AccessTokenLifetime = "ftp://x/", "", "sub", 31*24*time.Hour
	bad.Clients.CLI.ID = bad.Clients.Web.ID
	bad.Clients.Web.RedirectURIs = []string{"https://*.example.com"}
	bad.Machines = []MachineConfig{{ID: "m", Secret: "short", Owner: "Ünknown", Scopes: []string{"device"}}}
	if errs := bad.Validate(); len(errs) != 9 {
		t.Fatalf("%d mistakes: %v", len(errs), errs)
	}
}
