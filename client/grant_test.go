package client_test

import (
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/coaphub/coaphub/client"
)

// A login lasts beyond its access tokens, is kept between two runs of a program, and ends when it is revoked.
func TestGrant(t *testing.T) {
	t.Parallel()
	w := start(t, "lamp")
	w.User(t, "carol", "correct horse battery", "user")
	ctx := t.Context()
	g, err := client.Login(ctx, client.Provider{Issuer: w.Issuer}, []string{"devices:read", "admin"}, func(p client.Prompt) error {
		if p.Complete == "" || time.Until(p.Expires) < time.Minute {
			t.Errorf("%+v", p)
		}
		w.Approve(t, p.URL, p.Code, "carol", "correct horse battery")
		return nil
	})
	if err != nil || g.Access == "" || g.Refresh == "" || time.Until(g.Expires) < time.Minute || g.ClientID != "coaphub-cli" {
		t.Fatalf("%+v, %v", g, err)
	}
	list := func(g client.Grant, keep func(client.Grant) error) error {
		for _, err := range w.client(t, g.Source(keep)).ListDevices(ctx, client.DeviceQuery{}) {
			return err
		}
		return nil
	}
	var kept []client.Grant
	keep := func(g client.Grant) error { kept = append(kept, g); return nil }
	if err := list(g, keep); err != nil || len(kept) != 0 {
		t.Errorf("a token that is good was refreshed %d times: %v", len(kept), err)
	}
	b, err := json.Marshal(g) // as a file
	if err != nil {
		t.Fatal(err)
	}
	var old client.Grant
	if err := json.Unmarshal(b, &old); err != nil || old.Refresh != g.Refresh || !old.Expires.Equal(g.Expires) || old.Issuer != w.Issuer {
		t.Fatalf("%+v, %v", old, err)
	}
	old.Expires = time.Now().Add(time.Second) // it is about to end
	if err := list(old, keep); err != nil || len(kept) != 1 || kept[0].Access == g.Access || kept[0].Refresh == "" || kept[0].Issuer != w.Issuer {
		t.Fatalf("%+v, %v", kept, err)
	}
	full := errors.New("the disk is full")
	kept[0].Expires = time.Now()
	if err := list(kept[0], func(client.Grant) error { return full }); !errors.Is(err, full) {
		t.Errorf("%v", err)
	}
	if err := kept[0].Revoke(ctx); err != nil {
		t.Fatal(err)
	}
	fails(t, list(kept[0], nil), client.Unauthenticated, client.ErrLogin)
	kept[0].Refresh = ""
	fails(t, list(kept[0], nil), client.Unauthenticated, client.ErrLogin)
}
