package auth

import (
	"bytes"
	"context"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/issuer"
)

const (
	lamp = hub.DeviceID("00000000-0000-4000-8000-000000000001")
	oven = hub.DeviceID("00000000-0000-4000-8000-000000000002")
)

func newClient(t *testing.T, is *issuer.Issuer, edit func(*ClientConfig)) *Client {
	t.Helper()
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte(issuer.ClientSecret+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg := ClientConfig{
		Authority: is.URL(), ClientID: issuer.ClientID, ClientSecretFile: secret, RedirectURL: issuer.RedirectURL,
		HTTPClient: &http.Client{Transport: is},
	}
	if edit != nil {
		edit(&cfg)
	}
	c, err := NewClient(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func TestExchangeAndRefresh(t *testing.T) {
	t.Parallel()
	for _, style := range []string{"", "inHeader", "inParams"} {
		t.Run("style "+style, func(t *testing.T) {
			is := issuer.New(t)
			c := newClient(t, is, func(cfg *ClientConfig) { cfg.AuthStyle = style })
			v := newVerifier(t, nil, is)
			tok, err := c.Exchange(t.Context(), lamp, "pin", is.Code(map[string]any{"sub": "bob"}))
			if err != nil {
				t.Fatal(err)
			}
			if got := mustVerify(t, v, tok.Access).Owner; got != "bob" {
				t.Errorf("owner %q", got)
			}
			if d := time.Until(tok.Expiry); tok.Refresh == "" || d < 59*time.Minute || d > time.Hour {
				t.Errorf("tokens %+v", tok)
			}
			next, err := c.Refresh(t.Context(), lamp, tok.Refresh)
			if err != nil {
				t.Fatal(err)
			}
			mustVerify(t, v, next.Access)
			if next.Refresh == tok.Refresh {
				t.Error("the refresh token did not change")
			}
		})
	}
}

func TestCodeMayBeRepeatedForAMinuteBySameDeviceAndCredential(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		c := newClient(t, is, nil)
		code := is.Code(nil)
		first, err := c.Exchange(t.Context(), lamp, "pin", code)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(59 * time.Second)
		again, err := c.Exchange(t.Context(), lamp, "pin", code)
		if err != nil || again != first {
			t.Errorf("a repeat gave %+v %v, want %+v", again, err, first)
		}
		for name, ask := range map[string]func() error{
			"other device":     func() error { _, err := c.Exchange(t.Context(), oven, "pin", code); return err },
			"other credential": func() error { _, err := c.Exchange(t.Context(), lamp, "other", code); return err },
			"shifted fields":   func() error { _, err := c.Exchange(t.Context(), lamp+"p", "in", code); return err },
		} {
			if err := ask(); !hub.IsKind(err, hub.Unauthenticated) {
				t.Errorf("%s: %v, want Unauthenticated", name, err)
			}
		}
		time.Sleep(2 * time.Second)
		if _, err := c.Exchange(t.Context(), lamp, "pin", code); !hub.IsKind(err, hub.Unauthenticated) {
			t.Errorf("after the window: %v, want Unauthenticated", err)
		}
	})
}

func TestParallelExchangesOfOneCodeAskOnce(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, nil)
	code := is.Code(nil)
	var mu sync.Mutex
	got := map[hub.Tokens]bool{}
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			tok, err := c.Exchange(t.Context(), lamp, "pin", code)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			got[tok] = true
		})
	}
	wg.Wait()
	if len(got) != 1 || is.Exchanges() != 1 {
		t.Errorf("%d different answers from %d exchanges, want 1 and 1", len(got), is.Exchanges())
	}
}

func TestExchangeGoesOnWhenTheCallerLeaves(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		hold := make(chan struct{})
		c := newClient(t, is, func(cfg *ClientConfig) {
			cfg.HTTPClient = &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
				<-hold
				return is.RoundTrip(r)
			})}
		})
		code := is.Code(nil)
		ctx, leave := context.WithTimeout(t.Context(), time.Second)
		defer leave()
		if _, err := c.Exchange(ctx, lamp, "pin", code); !hub.IsKind(err, hub.Unavailable) {
			t.Errorf("got %v, want Unavailable", err)
		}
		close(hold)
		if _, err := c.Exchange(t.Context(), lamp, "pin", code); err != nil {
			t.Errorf("the device that came back: %v", err)
		}
		if n := is.Exchanges(); n != 1 {
			t.Errorf("%d exchanges, want 1", n)
		}
	})
}

func TestLostRefreshAnswerStrandsNobody(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		is := issuer.New(t)
		c := newClient(t, is, nil)
		v := newVerifier(t, nil, is)
		start, err := c.Exchange(t.Context(), lamp, "", is.Code(nil))
		if err != nil {
			t.Fatal(err)
		}
		lost, err := c.Refresh(t.Context(), lamp, start.Refresh)
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Minute)
		again, err := c.Refresh(t.Context(), lamp, start.Refresh)
		if err != nil || again != lost {
			t.Fatalf("a repeat gave %+v %v, want %+v", again, err, lost)
		}
		if _, err := c.Refresh(t.Context(), oven, start.Refresh); !hub.IsKind(err, hub.Unauthenticated) {
			t.Errorf("another device: %v, want Unauthenticated", err)
		}
		// So late that the kept access token has expired.
		time.Sleep(3 * time.Hour)
		late, err := c.Refresh(t.Context(), lamp, start.Refresh)
		if err != nil {
			t.Fatal(err)
		}
		mustVerify(t, v, late.Access)
		// Once the new one is used, the one before is worth nothing.
		if _, err := c.Refresh(t.Context(), lamp, late.Refresh); err != nil {
			t.Fatal(err)
		}
		if _, err := c.Refresh(t.Context(), lamp, lost.Refresh); !hub.IsKind(err, hub.Unauthenticated) {
			t.Errorf("a used refresh token: %v, want Unauthenticated", err)
		}
	})
}

func TestUsedRefreshTokenIsNotKept(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, nil)
	tok, err := c.Exchange(t.Context(), lamp, "", is.Code(nil))
	if err != nil {
		t.Fatal(err)
	}
	first := tok.Refresh
	for range 5 {
		if tok, err = c.Refresh(t.Context(), lamp, tok.Refresh); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Refresh(t.Context(), lamp, first); !hub.IsKind(err, hub.Unauthenticated) {
		t.Errorf("got %v, want Unauthenticated", err)
	}
	c.kept.mu.Lock()
	defer c.kept.mu.Unlock()
	if n := len(c.kept.items); n > 2 {
		t.Errorf("%d answers are kept, want that of the code and the last", n)
	}
}

func TestProviderTroubleIsUnavailableRefusalIsUnauthenticated(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, nil)
	exchange := func() error { _, err := c.Exchange(t.Context(), lamp, "", is.Code(nil)); return err }
	for status, want := range map[int]hub.Kind{
		400: hub.Unauthenticated, 401: hub.Unauthenticated, 403: hub.Unauthenticated,
		302: hub.Unavailable, 404: hub.Unavailable, 409: hub.Unavailable, 429: hub.Unavailable, 500: hub.Unavailable, 502: hub.Unavailable, 503: hub.Unavailable,
	} {
		is.RefuseTokens(status)
		if err := exchange(); !hub.IsKind(err, want) {
			t.Errorf("status %d: %v, want %v", status, err, want)
		}
		if _, err := c.Refresh(t.Context(), lamp, "r"); !hub.IsKind(err, want) {
			t.Errorf("refresh, status %d: %v, want %v", status, err, want)
		}
	}
	is.RefuseTokens(0)
	is.Down()
	if err := exchange(); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("away: %v, want Unavailable", err)
	}
	is.Up()
	if err := exchange(); err != nil {
		t.Errorf("back again: %v", err)
	}
	if _, err := c.Exchange(t.Context(), lamp, "", "no such code"); !hub.IsKind(err, hub.Unauthenticated) {
		t.Errorf("unknown code: %v, want Unauthenticated", err)
	}
	for _, code := range []string{"", strings.Repeat("c", maxToken+1)} {
		if _, err := c.Exchange(t.Context(), lamp, "", code); !hub.IsKind(err, hub.Invalid) {
			t.Errorf("code of %d bytes: %v, want Invalid", len(code), err)
		}
	}
}

// That the hub's own account at the provider is wrong must not cost devices their credentials.
func TestRefusedHubIsUnavailable(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, func(cfg *ClientConfig) { cfg.ClientID = "wrong" })
	if _, err := c.Exchange(t.Context(), lamp, "", is.Code(nil)); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("got %v, want Unavailable", err)
	}
}

func TestTokenEndpointNonsense(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	for name, tc := range map[string]struct {
		body string
		ok   bool
	}{
		"not JSON":           {"<html>", false},
		"no access token":    {`{"token_type":"Bearer"}`, false},
		"not bearer":         {`{"access_token":"a","token_type":"DPoP"}`, false},
		"expiry as text":     {`{"access_token":"a","token_type":"bearer","expires_in":"3600"}`, true},
		"expiry as nonsense": {`{"access_token":"a","expires_in":"soon"}`, false},
		"expiry negative":    {`{"access_token":"a","expires_in":-1}`, false},
		"no expiry":          {`{"access_token":"a"}`, true},
		"endless":            {strings.Repeat(" ", 2*maxBody), false},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClient(t, is, func(cfg *ClientConfig) {
				cfg.HTTPClient = &http.Client{Transport: roundTripper(func(r *http.Request) (*http.Response, error) {
					if r.URL.Path != "/token" {
						return is.RoundTrip(r)
					}
					return &http.Response{StatusCode: 200, Body: readCloser{strings.NewReader(tc.body)}, Request: r}, nil
				})}
			})
			_, err := c.Exchange(t.Context(), lamp, "", "code")
			if tc.ok && err != nil || !tc.ok && !hub.IsKind(err, hub.Unavailable) {
				t.Errorf("got %v", err)
			}
		})
	}
}

func TestRevoke(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, nil)
	code := is.Code(nil)
	tok, err := c.Exchange(t.Context(), lamp, "", code)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Revoke(t.Context(), tok); err != nil {
		t.Fatal(err)
	}
	if r := strings.Join(is.Revoked(), " "); !strings.Contains(r, tok.Access) || !strings.Contains(r, tok.Refresh) {
		t.Errorf("revoked %s", r)
	}
	if _, err := c.Exchange(t.Context(), lamp, "", code); err == nil {
		t.Error("revoked tokens were given out again")
	}
	is.Down()
	if err := c.Revoke(t.Context(), tok); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("away: %v, want Unavailable", err)
	}
}

func TestKeptAnswersAreBounded(t *testing.T) {
	t.Parallel()
	s := newAnswers()
	nth := func(i int) inquiry { return inquire(strconv.Itoa(i)) }
	for i := range maxAnswers {
		_, _, f, first := s.join(nth(i))
		if !first {
			t.Fatal("not the first")
		}
		if i > 0 { // the first stays under way
			s.end(nth(i), f, hub.Tokens{}, time.Hour+time.Duration(i)*time.Second, nil)
		}
	}
	_, _, f, first := s.join(inquire("one more"))
	if f == nil || !first || len(s.items) != maxAnswers {
		t.Errorf("%v %v, %d kept", f, first, len(s.items))
	}
	if s.items[nth(0).name] == nil || s.items[nth(1).name] != nil {
		t.Error("not the one that ends first was removed")
	}
	full := newAnswers()
	for i := range maxAnswers {
		full.join(nth(i))
	}
	if _, _, f, _ := full.join(inquire("one more")); f != nil {
		t.Error("there is no end to what may be under way")
	}
}

func TestKeptAnswersAreEncrypted(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, nil)
	code := is.Code(nil)
	tok, err := c.Exchange(t.Context(), lamp, "pin", code)
	if err != nil {
		t.Fatal(err)
	}
	q := inquire("code", string(lamp), "pin", code)
	c.kept.mu.Lock()
	a := c.kept.items[q.name]
	c.kept.mu.Unlock()
	if a == nil || a.flight != nil || len(a.sealed) == 0 {
		t.Fatalf("kept: %+v", a)
	}
	if bytes.Contains(a.sealed, []byte(tok.Access)) || bytes.Contains(a.sealed, []byte(tok.Refresh)) {
		t.Error("the tokens are there in the clear")
	}
	if got, err := q.open(a.sealed); err != nil || got != tok {
		t.Errorf("opened: %+v %v", got, err)
	}
	if _, err := (inquiry{name: q.name, key: q.name}).open(a.sealed); err == nil {
		t.Error("the name opens it")
	}
}

func TestClientConfigMistakes(t *testing.T) {
	t.Parallel()
	_, err := NewClient(ClientConfig{Authority: "ftp://x", AuthStyle: "post", ClientSecretFile: "/nowhere"})
	for _, key := range []string{"authority", "clientID", "authStyle", "clientSecretFile"} {
		if err == nil || !strings.Contains(err.Error(), key) {
			t.Errorf("%v does not name %s", err, key)
		}
	}
}

func TestClientAfterCloseIsUnavailable(t *testing.T) {
	t.Parallel()
	is := issuer.New(t)
	c := newClient(t, is, nil)
	c.Close()
	if _, err := c.Exchange(t.Context(), lamp, "", is.Code(nil)); !hub.IsKind(err, hub.Unavailable) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v, want Unavailable", err)
	}
}
