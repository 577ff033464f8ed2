package auth

import (
	"context"
	"net/http"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/clock"
	"github.com/coaphub/coaphub/test/issuer"
)

// A hub without a clock of its own issues tokens, then NTP sets its clock: each token's end is in the past at once. A device
// that is told so drops its credential.
func TestClockSetForwardIsNeverARefusalOfADevice(t *testing.T) {
	t.Parallel()
	const year = 365 * 24 * time.Hour
	start := time.Now()
	var set, passed time.Duration
	read := func() (time.Time, time.Duration) { return start.Add(set + passed), passed }
	is := issuer.New(t)
	revoked := false
	open := func(inside bool) *Verifier {
		cfg := IssuerConfig{Authority: is.URL(), Audience: []string{issuer.Audience}, DeviceIDClaim: "device_id"}
		client := &http.Client{Transport: is}
		if inside {
			cfg.Keys = httpKeys(client, is.URL())
			cfg.Revoked = func(context.Context, Token) (bool, error) { return revoked, nil }
		}
		v, err := New([]IssuerConfig{cfg}, Options{ClockSkew: 30 * time.Second, HTTPClient: client, Clock: clock.With(read)})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(v.Close)
		return v
	}
	inside, outside := open(true), open(false)

	device := func(more map[string]any) map[string]any {
		claims := map[string]any{
			"device_id": "11111111-0000-4000-8000-000000000001", "scope": hub.ScopeDevice,
			"iat": start.Unix(), "exp": start.Add(2 * time.Hour).Unix(),
		}
		for k, v := range more {
			claims[k] = v
		}
		return claims
	}
	lamp := is.Mint(device(nil))
	old := is.Mint(device(map[string]any{"exp": start.Add(-time.Minute).Unix()}))
	forged := is.MintWithForeignKey(device(nil))
	elsewhere := is.Mint(device(map[string]any{"aud": "https://other.example"}))
	app := is.Mint(map[string]any{"exp": start.Add(2 * time.Hour).Unix()})
	mustVerify(t, inside, lamp)
	mustVerify(t, outside, lamp)
	mustVerify(t, inside, app)

	set = year
	for range 2 {
		wantKind(t, inside, lamp, hub.Unavailable) // remembered, then anew
	}
	wantKind(t, inside, old, hub.Unauthenticated)
	wantKind(t, inside, forged, hub.Unauthenticated)
	wantKind(t, inside, elsewhere, hub.Unauthenticated)
	wantKind(t, inside, app, hub.Unauthenticated)
	wantKind(t, outside, lamp, hub.Unauthenticated)
	mustVerify(t, inside, is.Mint(device(map[string]any{"iat": start.Add(set).Unix(), "exp": start.Add(set + time.Hour).Unix()})))

	revoked = true
	wantKind(t, inside, lamp, hub.Unauthenticated)
	revoked = false
	wantKind(t, inside, lamp, hub.Unavailable)

	set = 0 // it was a mistake
	mustVerify(t, inside, lamp)
	mustVerify(t, inside, app)

	set = year // nobody sets it right
	wantKind(t, inside, lamp, hub.Unavailable)
	passed = clock.Mistrust
	wantKind(t, inside, lamp, hub.Unauthenticated)
}
