package oauthserver_test

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
)

type unowned struct{}

func (unowned) Owner(context.Context, hub.DeviceID) (hub.Ownership, error) {
	return hub.Ownership{}, &hub.Error{Kind: hub.NotFound}
}

// A device is onboarded: an administrator gets a code, the device redeems it at its sign-up, and refreshes its tokens later.
func ExampleServer_OnboardCode() {
	ctx := context.Background()
	docs, err := pebblestore.Open("data", pebblestore.Options{FS: vfs.NewMem(), MinFree: -1})
	if err != nil {
		fmt.Println(err)
		return
	}
	defer docs.Close()
	cfg := oauthserver.Default()
	cfg.BaseURL = "https://hub.example:8080"
	s, err := oauthserver.Open(ctx, cfg, docs, unowned{}, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		fmt.Println(err)
		return
	}
	lamp := hub.DeviceID("11111111-0000-4000-8000-000000000001")
	code, expires, err := s.OnboardCode(ctx, "admin", lamp, 0)
	if err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("a code for", time.Until(expires).Round(time.Minute))
	tokens, err := s.Exchange(ctx, lamp, "certificate", code)
	fmt.Println("signed up:", tokens.Access != "", err)
	tokens, err = s.Refresh(ctx, lamp, tokens.Refresh)
	fmt.Println("refreshed:", tokens.Access != "", err)
	_, err = s.Exchange(ctx, lamp, "another certificate", code)
	fmt.Println(hub.Public(err))
	// Output:
	// a code for 15m0s
	// signed up: true <nil>
	// refreshed: true <nil>
	// code-used the authorization code was used already
}
