package oauthserver

import (
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// That a grant stands is read once a second, however often it is asked for. What this process ends has ended at once; what
// another one ends, within a second.
func TestActiveGrantsAreRemembered(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newServer(t)
		docs := s.standing.Documents.(*storetest.Memory)
		begin := func() (tokens hub.Tokens, jti string) {
			tokens = must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
			return tokens, verify(t, s, tokens.Access)["jti"].(string)
		}
		active := func(jti string) bool {
			t.Helper()
			return must[bool](t)(s.Active(t.Context(), jti))
		}
		tokens, jti := begin()
		before := docs.Gets
		for range 100 {
			if !active(jti) {
				t.Fatal("not active")
			}
		}
		if n := docs.Gets - before; n != 1 {
			t.Errorf("it was read %d times", n)
		}
		time.Sleep(recallFor)
		if active(jti); docs.Gets-before != 2 {
			t.Error("it is remembered for longer than a second")
		}
		if err := s.Revoke(t.Context(), tokens); err != nil {
			t.Fatal(err)
		}
		if active(jti) {
			t.Error("active after it was revoked")
		}

		tokens, jti = begin()
		active(jti)
		other := openServer(t, config(), docs, owners(nobody))
		if err := other.Revoke(t.Context(), tokens); err != nil {
			t.Fatal(err)
		}
		time.Sleep(recallFor)
		if active(jti) {
			t.Error("active a second after another process revoked it")
		}

		// What was read before a change is not remembered after it.
		_, since := s.standing.recalls("x")
		s.standing.forget(collGrants, "y")
		s.standing.remember("x", since)
		if ok, _ := s.standing.recalls("x"); ok {
			t.Error("an old reading is remembered")
		}
	})
}
