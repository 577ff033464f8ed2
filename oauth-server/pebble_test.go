package oauthserver

import (
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// The fake of the other tests is more forgiving than a real store about what is written while a list is read.
func TestOverPebbleWithARestart(t *testing.T) {
	t.Parallel()
	fs := vfs.NewMem()
	open := func() (*Server, func()) {
		docs, err := pebblestore.Open("data", pebblestore.Options{FS: fs, MinFree: -1, Fatal: func(err error) { t.Error(err) }})
		if err != nil {
			t.Fatal(err)
		}
		s, err := openWith(t.Context(), config(), docs, owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
		if err != nil {
			t.Fatal(err)
		}
		return s, func() {
			if err := docs.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	s, stop := open()
	text := onboard(t, s, lamp)
	first := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text))
	api := must[string](t)(s.IssueToken(t.Context(), admin, nil, 0))
	stop()
	s, stop = open()
	defer stop()
	verify(t, s, api)
	if again := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "cert", text)); again != first {
		t.Fatal("a repeat after a restart gives other tokens")
	}
	second := must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, first.Refresh))
	must[string](t)(s.SetPassword(t.Context(), "admin", "long enough password"))
	if must[bool](t)(s.Active(t.Context(), verify(t, s, api)["jti"].(string))) {
		t.Fatal("an application's token outlived the password")
	}
	must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, second.Refresh))
	s.sweep(t.Context())
	must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, second.Refresh))
}
