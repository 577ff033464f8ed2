package auth

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-jose/go-jose/v4"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/issuer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newVerifier trusts the given issuers through their RoundTrippers, the first with plain owner names.
func newVerifier(t *testing.T, edit func(*IssuerConfig), from ...*issuer.Issuer) *Verifier {
	t.Helper()
	var cfg []IssuerConfig
	for i, is := range from {
		c := IssuerConfig{Authority: is.URL(), Audience: []string{issuer.Audience}}
		if i > 0 {
			c.OwnerPrefix = fmt.Sprintf("ext%d:", i)
		}
		if edit != nil {
			edit(&c)
		}
		cfg = append(cfg, c)
	}
	opts := Options{ClockSkew: 30 * time.Second}
	if len(from) == 1 {
		opts.HTTPClient = &http.Client{Transport: from[0]}
	}
	v, err := New(cfg, opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Close)
	t.Cleanup(http.DefaultClient.CloseIdleConnections)
	return v
}

func mustVerify(t *testing.T, v *Verifier, token string) hub.Claims {
	t.Helper()
	c, err := v.Verify(t.Context(), token)
	if err != nil {
		t.Fatalf("a good token: %v", err)
	}
	return c
}

func wantKind(t *testing.T, v *Verifier, token string, want hub.Kind) {
	t.Helper()
	c, err := v.Verify(t.Context(), token)
	if !hub.IsKind(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
	if err != nil && c.Owner != "" {
		t.Errorf("claims %+v were returned with the error", c)
	}
}

func TestVerifyGoodToken(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	v := newVerifier(t, nil, is)
	exp := time.Now().Add(time.Hour).Truncate(time.Second)
	c := mustVerify(t, v, is.Mint(map[string]any{"client_id": "app", "jti": "7", "exp": exp.Unix()}))
	if c.Issuer != is.URL() || c.Subject != "alice" || c.Owner != "alice" || c.ClientID != "app" || c.TokenID != "7" || !c.Expiry.Equal(exp) {
		t.Errorf("claims %+v", c)
	}
	if c.MarksDevices { // no claim and no client says which tokens are devices'
		t.Errorf("claims %+v", c)
	}
	if !c.Has(hub.ScopeRead) || !c.Has(hub.ScopeWrite) || c.Has(hub.ScopeAdmin) || c.Device {
		t.Errorf("scopes %v, device %v", c.Scopes, c.Device)
	}
}

func TestVerifyRefuses(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	v := newVerifier(t, nil, is)
	good := is.Mint(nil)
	now := time.Now()
	for _, tc := range []struct{ name, token string }{
		{"empty", ""},
		{"no token at all", "hello"},
		{"two parts", "a.b"},
		{"huge", good + strings.Repeat("A", maxToken)},
		{"huge claims", is.Mint(map[string]any{"x": strings.Repeat("A", maxToken)})},
		{"wrong audience", is.Mint(map[string]any{"aud": "https://other.example"})},
		{"wrong audiences", is.Mint(map[string]any{"aud": []string{"a", "b"}})},
		{"no audience", is.Mint(map[string]any{"aud": nil})},
		{"audience is a number", is.Mint(map[string]any{"aud": 7})},
		{"no exp", is.Mint(map[string]any{"exp": nil})},
		{"exp is text", is.Mint(map[string]any{"exp": "tomorrow"})},
		{"exp is huge", is.Mint(map[string]any{"exp": 1e300})},
		{"exp is negative", is.Mint(map[string]any{"exp": -1})},
		{"expired", is.Mint(map[string]any{"exp": now.Add(-31 * time.Second).Unix()})},
		{"not valid yet", is.Mint(map[string]any{"nbf": now.Add(time.Minute).Unix()})},
		{"not valid yet, issued now", is.Mint(map[string]any{"iat": now.Unix(), "nbf": now.Add(time.Minute).Unix()})},
		{"issued in the future by somebody else", is.MintWithForeignKey(map[string]any{"iat": now.Add(time.Minute).Unix()})},
		{"no owner", is.Mint(map[string]any{"sub": nil})},
		{"empty owner", is.Mint(map[string]any{"sub": ""})},
		{"owner is a number", is.Mint(map[string]any{"sub": 1})},
		{"owner too long", is.Mint(map[string]any{"sub": strings.Repeat("a", maxOwner+1)})},
		{"owner with a control character", is.Mint(map[string]any{"sub": "a\x00b"})},
		{"unknown issuer", is.Mint(map[string]any{"iss": "https://evil.example"})},
		{"no issuer", is.Mint(map[string]any{"iss": nil})},
		{"ID token with nonce", is.Mint(map[string]any{"nonce": "n", "scope": nil})},
		{"ID token with at_hash", is.Mint(map[string]any{"at_hash": "h", "scope": nil})},
		{"ID token by token_use", is.Mint(map[string]any{"token_use": "id"})},
		{"no kid", is.MintWithUnknownKey("", nil)},
		{"signed by a foreign key under a known kid", is.MintWithForeignKey(nil)},
		{"algorithm none", is.MintNone(nil)},
		{"HS256 with the public key", is.MintHS256(nil)},
		{"signature cut", good[:len(good)-4]},
		{"scope is a number", is.Mint(map[string]any{"scope": 1})},
	} {
		t.Run(tc.name, func(t *testing.T) { wantKind(t, v, tc.token, hub.Unauthenticated) })
	}
	mustVerify(t, v, good)
}

func TestVerifyAllowsForTheClock(t *testing.T) {
	is := issuer.New(t)
	v := newVerifier(t, nil, is)
	now := time.Now()
	mustVerify(t, v, is.Mint(map[string]any{"exp": now.Add(-20 * time.Second).Unix()}))
	mustVerify(t, v, is.Mint(map[string]any{"nbf": now.Add(20 * time.Second).Unix(), "iat": now.Add(20 * time.Second).Unix()}))
}

// The machine's clock was stepped back, or is not set yet: every token made before seems to come from the future. That is no
// fault of the token, and a device that is told that it is drops its credentials.
func TestClockSteppedBackIsNeverARefusal(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		ahead := time.Now().Add(time.Hour)
		claims := map[string]any{"iat": ahead.Unix(), "nbf": ahead.Unix(), "exp": ahead.Add(time.Hour).Unix()}
		token := is.Mint(claims)
		outside := newVerifier(t, nil, is)
		wantKind(t, outside, token, hub.Unavailable)
		wantKind(t, outside, is.MintWithForeignKey(claims), hub.Unauthenticated)
		inside := newVerifier(t, func(c *IssuerConfig) { c.Keys = httpKeys(&http.Client{Transport: is}, is.URL()) }, is)
		mustVerify(t, inside, token)
		wantKind(t, inside, is.MintWithForeignKey(claims), hub.Unauthenticated)
		time.Sleep(time.Hour) // the clock is right again
		mustVerify(t, outside, token)
		time.Sleep(time.Hour + time.Minute)
		wantKind(t, outside, token, hub.Unauthenticated)
		wantKind(t, inside, token, hub.Unauthenticated)
	})
}

func TestVerifyRefusesAChangedPayload(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	v := newVerifier(t, nil, is)
	a, b := strings.Split(is.Mint(nil), "."), strings.Split(is.Mint(map[string]any{"sub": "bob"}), ".")
	wantKind(t, v, a[0]+"."+b[1]+"."+a[2], hub.Unauthenticated)
}

func TestClaimNames(t *testing.T) {
	is := issuer.New(t)
	v := newVerifier(t, func(c *IssuerConfig) {
		c.OwnerClaim, c.DeviceIDClaim = "https://hub.example/owner", "https://hub.example/deviceId"
		c.DeviceClients = []string{"lamp-firmware"}
		c.DefaultScopes = []string{hub.ScopeRead}
	}, is)
	const dev = "00000000-0000-4000-8000-000000000001"
	for _, tc := range []struct {
		name   string
		claims map[string]any
		owner  hub.Owner
		device bool
		id     string
		scopes []string
	}{
		{"other owner claim", map[string]any{}, "o1", false, "", []string{hub.ScopeRead, hub.ScopeWrite}},
		{"device ID claim", map[string]any{"https://hub.example/deviceId": dev}, "o1", true, dev, nil},
		{"device ID claim empty", map[string]any{"https://hub.example/deviceId": ""}, "o1", false, "", nil},
		{"device client by client_id", map[string]any{"client_id": "lamp-firmware"}, "o1", true, "", nil},
		{"device client by azp", map[string]any{"azp": "lamp-firmware"}, "o1", true, "", nil},
		{"device scope", map[string]any{"scope": "device"}, "o1", true, "", []string{hub.ScopeDevice}},
		{"scp as list", map[string]any{"scope": nil, "scp": []string{"devices:read", "admin"}}, "o1", false, "", []string{hub.ScopeRead, hub.ScopeAdmin}},
		{"permissions", map[string]any{"scope": nil, "permissions": []string{"devices:write"}}, "o1", false, "", []string{hub.ScopeWrite}},
		{"default scopes", map[string]any{"scope": nil}, "o1", false, "", []string{hub.ScopeRead}},
		{"empty scope is no scope", map[string]any{"scope": ""}, "o1", false, "", []string{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.claims["https://hub.example/owner"] = "o1"
			c := mustVerify(t, v, is.Mint(tc.claims))
			if c.Owner != tc.owner || c.Device != tc.device || c.DeviceID != tc.id || !c.MarksDevices {
				t.Errorf("claims %+v", c)
			}
			if tc.scopes != nil && strings.Join(c.Scopes, " ") != strings.Join(tc.scopes, " ") {
				t.Errorf("scopes %v, want %v", c.Scopes, tc.scopes)
			}
		})
	}
	wantKind(t, v, is.Mint(nil), hub.Unauthenticated) // sub is not the owner here
}

func TestTwoIssuersWithTheSameSubAreTwoOwners(t *testing.T) {
	t.Parallel()
	a, b := issuer.Start(t), issuer.Start(t)
	v := newVerifier(t, nil, a, b)
	ca, cb := mustVerify(t, v, a.Mint(nil)), mustVerify(t, v, b.Mint(nil))
	if ca.Owner != "alice" || cb.Owner != "ext1:alice" {
		t.Errorf("owners %q and %q", ca.Owner, cb.Owner)
	}
	// A name of the first issuer that looks like one of the second's must not become it.
	wantKind(t, v, a.Mint(map[string]any{"sub": "ext1:alice"}), hub.Unauthenticated)
	// A token of one issuer signed by the other.
	wantKind(t, v, a.Mint(map[string]any{"iss": b.URL()}), hub.Unauthenticated)
}

func TestIssuerWithSlashAtTheEnd(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	v := newVerifier(t, func(c *IssuerConfig) { c.Authority += "/" }, is)
	mustVerify(t, v, is.Mint(nil))
	mustVerify(t, v, is.Mint(map[string]any{"iss": is.URL() + "/"}))
}

func TestKeysThatRotate(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		old := is.Mint(nil)
		mustVerify(t, v, old)
		time.Sleep(time.Minute)
		is.Rotate()
		mustVerify(t, v, is.Mint(nil))
		mustVerify(t, v, old)
		if n := is.KeyFetches(); n != 2 {
			t.Errorf("%d fetches, want 2: one at first, one for the new key", n)
		}
	})
}

func TestKeyThatLeftTheSetIsNoLongerGood(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		old := is.Mint(map[string]any{"exp": time.Now().Add(24 * time.Hour).Unix()})
		mustVerify(t, v, old)
		is.Rotate()
		is.DropOldKeys()
		time.Sleep(2*keysTTL + time.Second)
		wantKind(t, v, old, hub.Unauthenticated) // though it was remembered
	})
}

func TestUnknownKeyStormIsAnsweredFromTheNegativeCache(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		mustVerify(t, v, is.Mint(nil))
		time.Sleep(time.Minute)
		storm := is.MintWithUnknownKey("nobody", nil)
		var wg sync.WaitGroup
		for range 200 {
			wg.Go(func() { wantKind(t, v, storm, hub.Unauthenticated) })
		}
		wg.Wait()
		if n := is.KeyFetches(); n != 2 {
			t.Errorf("%d fetches after a storm of one key ID, want 2", n)
		}
		// Many key IDs: whatever the answers, the issuer is asked once an interval at most.
		for i := range 500 {
			_, err := v.Verify(t.Context(), is.MintWithUnknownKey(fmt.Sprintf("nobody-%d", i), nil))
			if !hub.IsKind(err, hub.Unauthenticated) && !hub.IsKind(err, hub.Unavailable) {
				t.Fatalf("got %v", err)
			}
			time.Sleep(10 * time.Millisecond)
		}
		if n := is.KeyFetches(); n > 4 {
			t.Errorf("%d fetches after 5 s of unknown key IDs, want at most 4", n)
		}
		if n := len(v.issuers[is.URL()].keys.unknown); n > maxNegative {
			t.Errorf("%d unknown key IDs are remembered", n)
		}
	})
}

func TestRememberedUnknownKeysAreBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		v, err := New([]IssuerConfig{{
			Authority: "inside", Audience: []string{"a"},
			Keys: func(context.Context) (jose.JSONWebKeySet, error) { return jose.JSONWebKeySet{}, nil },
		}}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		s := v.issuers["inside"].keys
		for i := range 3 * maxNegative {
			if _, _, err := s.key(t.Context(), fmt.Sprint(i), time.Time{}); !errors.Is(err, errUnknownKey) {
				t.Fatal(err)
			}
			if len(s.unknown) > maxNegative {
				t.Fatalf("%d are remembered", len(s.unknown))
			}
		}
	})
}

// A token that is newer than the keys we have may be signed by a key we have not seen; it must not cost a device its
// credentials that we were asked too soon after the last fetch.
func TestNewKeyRightAfterAFetchIsUnavailableNotUnauthenticated(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		mustVerify(t, v, is.Mint(nil))
		time.Sleep(time.Second)
		is.Rotate()
		fresh := is.Mint(nil)
		wantKind(t, v, fresh, hub.Unavailable)
		wantKind(t, v, is.MintWithUnknownKey("other", map[string]any{"iat": time.Now().Add(-time.Hour).Unix()}), hub.Unauthenticated)
		time.Sleep(fetchInterval)
		mustVerify(t, v, fresh)
	})
}

func TestOutageIsUnavailableNeverUnauthenticated(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		good := is.Mint(map[string]any{"exp": time.Now().Add(48 * time.Hour).Unix()})
		is.Down()
		for range 20 {
			wantKind(t, v, good, hub.Unavailable)
		}
		if n := is.Discoveries(); n != 1 {
			t.Errorf("a provider that is away was asked %d times at once, want 1", n)
		}
		is.Up()
		time.Sleep(fetchInterval)
		mustVerify(t, v, good)

		// From now on the key is known: an outage hurts only new keys.
		is.Down()
		for range 20 {
			time.Sleep(time.Hour)
			mustVerify(t, v, good)
			mustVerify(t, v, is.Mint(nil))
			wantKind(t, v, is.MintWithUnknownKey("new", nil), hub.Unavailable)
			wantKind(t, v, is.MintWithForeignKey(nil), hub.Unauthenticated)
		}
		time.Sleep(5 * time.Hour)
		wantKind(t, v, is.Mint(nil), hub.Unavailable) // keys of more than a day ago are trusted no more
		is.Up()
		time.Sleep(fetchInterval)
		mustVerify(t, v, is.Mint(nil))
	})
}

func TestBadSignatureFetchesNothing(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		mustVerify(t, v, is.Mint(nil))
		for range 50 {
			time.Sleep(10 * time.Second)
			wantKind(t, v, is.MintWithForeignKey(nil), hub.Unauthenticated)
			wantKind(t, v, is.MintWithUnknownKey("x", map[string]any{"aud": "other"}), hub.Unauthenticated)
		}
		if n := is.KeyFetches(); n != 1 {
			t.Errorf("%d fetches, want 1", n)
		}
	})
}

func TestProviderThatHangsIsBounded(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		hang := roundTripper(func(r *http.Request) (*http.Response, error) {
			<-r.Context().Done()
			return nil, r.Context().Err()
		})
		is := issuer.New(t)
		v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}}}, Options{HTTPClient: &http.Client{Transport: hang}})
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		start := time.Now()
		wantKind(t, v, is.Mint(nil), hub.Unavailable)
		if d := time.Since(start); d > fetchTimeout {
			t.Errorf("waited %v", d)
		}
		time.Sleep(fetchInterval)
		ctx, stop := context.WithTimeout(t.Context(), time.Second)
		defer stop()
		start = time.Now()
		if _, err := v.Verify(ctx, is.Mint(nil)); !hub.IsKind(err, hub.Unavailable) {
			t.Errorf("got %v, want Unavailable", err)
		}
		if d := time.Since(start); d > time.Second {
			t.Errorf("waited %v though the caller had a second", d)
		}
	})
}

type roundTripper func(*http.Request) (*http.Response, error)

func (f roundTripper) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestProviderThatTalksNonsense(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	for name, body := range map[string]string{
		"not JSON": "<html>", "of another issuer": `{"issuer":"https://evil.example","jwks_uri":"https://evil.example/keys"}`,
		"keys over plain HTTP": `{"issuer":"https://issuer.invalid","jwks_uri":"http://issuer.invalid/keys"}`,
		"no keys":              `{"issuer":"https://issuer.invalid"}`,
		"endless":              strings.Repeat(" ", 2*maxBody),
	} {
		t.Run(name, func(t *testing.T) {
			answer := roundTripper(func(r *http.Request) (*http.Response, error) {
				return &http.Response{StatusCode: 200, Body: readCloser{strings.NewReader(body)}, Request: r}, nil
			})
			v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}}}, Options{HTTPClient: &http.Client{Transport: answer}})
			if err != nil {
				t.Fatal(err)
			}
			defer v.Close()
			wantKind(t, v, is.Mint(nil), hub.Unavailable)
		})
	}
}

type readCloser struct{ *strings.Reader }

func (readCloser) Close() error { return nil }

func TestRememberedTokenEndsWithItsExpiry(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		v := newVerifier(t, nil, is)
		token := is.Mint(map[string]any{"exp": time.Now().Add(time.Minute).Unix()})
		mustVerify(t, v, token)
		time.Sleep(time.Minute + 29*time.Second)
		mustVerify(t, v, token)
		time.Sleep(2 * time.Second)
		wantKind(t, v, token, hub.Unauthenticated)
		if len(v.tokens.items) != 0 {
			t.Error("it is still remembered")
		}
	})
}

func TestRevokedTokenIsRefusedThoughRemembered(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	gone, broken := "", false
	v := newVerifier(t, func(c *IssuerConfig) {
		c.Revoked = func(_ context.Context, tok Token) (bool, error) {
			if broken {
				return false, errors.New("the store is away")
			}
			return tok.ID == gone, nil
		}
	}, is)
	token := is.Mint(map[string]any{"jti": "t1"})
	mustVerify(t, v, token)
	gone = "t1"
	wantKind(t, v, token, hub.Unauthenticated)
	wantKind(t, v, token, hub.Unauthenticated)
	mustVerify(t, v, is.Mint(nil))
	broken = true
	wantKind(t, v, is.Mint(nil), hub.Unavailable)
}

func TestRememberedTokensAreBounded(t *testing.T) {
	t.Parallel()
	r := newRemembered()
	for i := range maxRemembered + 10 {
		r.put(&verified{hash: [32]byte{byte(i), byte(i >> 8), byte(i >> 16)}})
		r.get([32]byte{0}) // the first stays in use
	}
	if len(r.items) != maxRemembered || r.order.Len() != maxRemembered {
		t.Errorf("%d remembered, want %d", len(r.items), maxRemembered)
	}
	if _, ok := r.get([32]byte{0}); !ok {
		t.Error("the one in use went")
	}
	if _, ok := r.get([32]byte{1}); ok {
		t.Error("the one not used for longest stayed")
	}
}

func TestCallersCannotChangeWhatIsRemembered(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	v := newVerifier(t, nil, is)
	token := is.Mint(nil)
	for range 2 {
		c := mustVerify(t, v, token)
		c.Scopes[0], c.Audience[0] = hub.ScopeAdmin, "changed"
	}
	if c := mustVerify(t, v, token); c.Has(hub.ScopeAdmin) || c.Audience[0] != issuer.Audience {
		t.Errorf("claims %+v", c)
	}
}

func TestIssuerInThisProcess(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		var broken error
		v := newVerifier(t, func(c *IssuerConfig) {
			fetch := httpKeys(&http.Client{Transport: is}, is.URL())
			c.Keys = func(ctx context.Context) (jose.JSONWebKeySet, error) {
				if broken != nil {
					return jose.JSONWebKeySet{}, broken
				}
				return fetch(ctx)
			}
		}, is)
		mustVerify(t, v, is.Mint(nil))
		is.Rotate()
		mustVerify(t, v, is.Mint(nil)) // at once: asking costs nothing here
		broken = errors.New("the store is away")
		mustVerify(t, v, is.Mint(nil))
		is.Rotate()
		wantKind(t, v, is.Mint(nil), hub.Unavailable)
		broken = nil
		mustVerify(t, v, is.Mint(nil))
		wantKind(t, v, is.MintWithUnknownKey("nobody", nil), hub.Unauthenticated)
	})
}

func TestVerifyAfterCloseIsUnavailable(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	v := newVerifier(t, nil, is)
	v.Close()
	wantKind(t, v, is.Mint(nil), hub.Unavailable)
}

func TestDuplicateClaimsAreRefused(t *testing.T) {
	t.Parallel()
	if _, err := parseClaims([]byte(`{"sub":"a","sub":"b"}`)); err == nil {
		t.Error("a claim that is there twice was accepted")
	}
	if c, err := parseClaims([]byte(`{"SUB":"a"}`)); err != nil || c.has("sub") {
		t.Errorf("%v %v: names were not taken literally", c, err)
	}
}

func TestConfigMistakes(t *testing.T) {
	t.Parallel()
	one := func(edit func(*IssuerConfig)) []IssuerConfig {
		c := IssuerConfig{Authority: "https://a.example", Audience: []string{"hub"}}
		edit(&c)
		return []IssuerConfig{c}
	}
	two := func(edit func(*IssuerConfig)) []IssuerConfig {
		b := IssuerConfig{Authority: "https://b.example", Audience: []string{"hub"}, OwnerPrefix: "b:"}
		edit(&b)
		return append(one(func(*IssuerConfig) {}), b)
	}
	for _, tc := range []struct {
		name string
		cfg  []IssuerConfig
		want string
	}{
		{"no issuer", nil, "authorization.issuers"},
		{"no audience", one(func(c *IssuerConfig) { c.Audience = nil }), "issuers[0].audience"},
		{"empty audience", one(func(c *IssuerConfig) { c.Audience = []string{""} }), "issuers[0].audience"},
		{"no authority", one(func(c *IssuerConfig) { c.Authority = "" }), "issuers[0].authority"},
		{"plain HTTP", one(func(c *IssuerConfig) { c.Authority = "http://a.example" }), "issuers[0].authority"},
		{"query", one(func(c *IssuerConfig) { c.Authority = "https://a.example?x" }), "issuers[0].authority"},
		{"prefix on the first", one(func(c *IssuerConfig) { c.OwnerPrefix = "a:" }), "issuers[0].ownerPrefix"},
		{"no prefix on the second", two(func(c *IssuerConfig) { c.OwnerPrefix = "" }), "issuers[1].ownerPrefix"},
		{"same issuer twice", two(func(c *IssuerConfig) { c.Authority = "https://a.example/" }), "issuers[1].authority"},
		{"prefixes that begin alike", append(two(func(*IssuerConfig) {}),
			IssuerConfig{Authority: "https://c.example", Audience: []string{"hub"}, OwnerPrefix: "b:c:"}), "issuers[2].ownerPrefix"},
		{"CA file that is not there", one(func(c *IssuerConfig) { c.CAPool = []string{"/nowhere.pem"} }), "issuers[0].caPool"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v, err := New(tc.cfg, Options{})
			if err == nil {
				v.Close()
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("%v does not name %s", err, tc.want)
			}
		})
	}
	all := []IssuerConfig{{}, {}}
	if errs := validate(all); len(errs) < 5 {
		t.Errorf("not all mistakes are reported together: %v", errs)
	}
}

func TestDefaultConfigIsValidAndFillsIssuers(t *testing.T) {
	c := Default()
	if errs := c.Validate(); len(errs) > 0 {
		t.Error(errs)
	}
	c.Audience, c.DefaultScopes, c.DeviceClients, c.DeviceIDClaim = []string{"hub"}, []string{"s"}, []string{"d"}, "dev"
	c.Issuers = []IssuerConfig{{Authority: "https://a.example"}, {Authority: "https://b.example", OwnerPrefix: "b:", OwnerClaim: "own"}}
	if errs := c.Validate(); len(errs) > 0 {
		t.Error(errs)
	}
	r := c.Resolve(c.Issuers...)
	if r[0].OwnerClaim != "sub" || r[1].OwnerClaim != "own" || r[1].Audience[0] != "hub" || r[0].DeviceIDClaim != "dev" {
		t.Errorf("resolved %+v", r)
	}
	c.ClockSkew, c.OwnerClaim = time.Hour, ""
	if text := fmt.Sprint(c.Validate()); !strings.Contains(text, "clockSkew") || !strings.Contains(text, "ownerClaim") {
		t.Errorf("got %s", text)
	}
}

func FuzzVerify(f *testing.F) {
	is := issuer.New(f)
	for _, c := range []map[string]any{nil, {"aud": 7}, {"exp": nil}, {"scope": []string{"a"}}} {
		f.Add(is.Mint(c))
	}
	f.Add(is.MintNone(nil))
	f.Add(is.MintHS256(nil))
	f.Add("..")
	f.Add("e30.e30.")
	v, err := New([]IssuerConfig{{Authority: is.URL(), Audience: []string{issuer.Audience}}}, Options{HTTPClient: &http.Client{Transport: is}})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(v.Close)
	good := is.Mint(nil)
	f.Fuzz(func(t *testing.T, raw string) {
		c, err := v.Verify(t.Context(), raw)
		switch {
		case err == nil && (c.Owner == "" || c.Expiry.IsZero()):
			t.Errorf("claims without owner or end: %+v", c)
		case err != nil && !hub.IsKind(err, hub.Unauthenticated) && !hub.IsKind(err, hub.Unavailable):
			t.Errorf("kind of %v", err)
		}
		if _, err := v.Verify(t.Context(), good); err != nil {
			t.Errorf("a good token afterwards: %v", err)
		}
	})
}

func TestTokenNamesItsGrant(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	token := is.Mint(map[string]any{"jti": "grant.1"})
	if c := mustVerify(t, newVerifier(t, nil, is), token); c.Grant != "" {
		t.Errorf("an issuer that tells no ends gave the grant %q", c.Grant)
	}
	v := newVerifier(t, func(c *IssuerConfig) { c.Grant = func(jti string) string { return "of " + jti } }, is)
	for range 2 { // verified, and remembered
		if c := mustVerify(t, v, token); c.Grant != "of grant.1" {
			t.Errorf("the grant is %q", c.Grant)
		}
	}
}
