package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/client"
)

// strictProvider gives each refresh token once: one that comes back has been stolen from somebody, and ends the login.
type strictProvider struct {
	*httptest.Server
	mu        sync.Mutex // guards the others
	refreshed int
	stolen    bool
}

func newStrictProvider(t *testing.T) *strictProvider {
	s := &strictProvider{}
	s.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodGet {
			_, _ = fmt.Fprintf(w, `{"token_endpoint":"%s/token"}`, s.URL)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.stolen = s.stolen || r.FormValue("refresh_token") != fmt.Sprint("r", s.refreshed); s.stolen {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"error":"invalid_grant"}`))
			return
		}
		s.refreshed++
		_, _ = fmt.Fprintf(w, `{"access_token":"a%d","refresh_token":"r%d","expires_in":3600}`, s.refreshed, s.refreshed)
	}))
	t.Cleanup(s.Close)
	return s
}

// signedIn has a login in a home of its own, whose access token has ended.
func signedIn(t *testing.T, issuer string) (p process, file string) {
	t.Helper()
	p = process{env: []string{"XDG_CONFIG_HOME=" + t.TempDir()}}
	file, err := loginFile(p, "http://hub")
	if err != nil {
		t.Fatal(err)
	}
	in := login{Server: "http://hub"}
	in.Issuer, in.Access, in.Refresh, in.Expires = issuer, "a0", "r0", time.Unix(0, 0) // before the time of synctest, too
	b, err := json.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return p, file
}

// program is a command that uses the login.
func program(t *testing.T, p process) client.TokenSource {
	t.Helper()
	cfg, err := (&apiFlags{server: "http://hub"}).elsewhere(p)
	if err != nil {
		t.Fatal(err)
	}
	return cfg.Token
}

// A program that runs for long does not come back with the refresh token that it began with: others had the later ones.
func TestProgramsShareALogin(t *testing.T) {
	t.Parallel()
	s := newStrictProvider(t)
	p, file := signedIn(t, s.URL)
	long, other := program(t, p), program(t, p)
	for i, step := range []struct {
		who  client.TokenSource
		want string
	}{
		{long, "a1"},  // refreshed
		{other, "a1"}, // taken from the other
		{other, "a2"}, // that one was refused
		{other, "a3"},
		{long, "a3"},
		{long, "a4"},
		{program(t, p), "a4"},
	} {
		got, err := step.who(t.Context())
		if err != nil || got.Access != step.want || time.Until(got.Expires) < 59*time.Minute {
			t.Fatalf("step %d: %+v, %v; want %s", i, got, err, step.want)
		}
	}
	// Many at once refresh once.
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var in login
	if err := json.Unmarshal(b, &in); err != nil {
		t.Fatal(err)
	}
	in.Expires = time.Now()
	if err := in.write(p); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 8)
	for range cap(got) {
		source := program(t, p)
		go func() { // ends when it has its token; waited for below
			tok, err := source(t.Context())
			got <- fmt.Sprint(tok.Access, err)
		}()
	}
	for range cap(got) {
		if tok := <-got; tok != "a5<nil>" {
			t.Errorf("one of many got %s", tok)
		}
	}
	// It was ended meanwhile: nobody brings it back.
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := long(t.Context()); !errors.Is(err, client.Unauthenticated) || !errors.Is(err, client.ErrLogin) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the login is back: %v", err)
	}
}

// Who waits for another program's refresh gives up in time.
func TestALoginThatStaysLocked(t *testing.T) {
	t.Parallel()
	p, file := signedIn(t, "http://127.0.0.1:1")
	f, err := os.Create(file + ".lock")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = f.Close() }()
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	source := program(t, p)
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		if _, err := source(t.Context()); !errors.Is(err, client.Unavailable) || time.Since(begin) != 30*time.Second {
			t.Errorf("after %s: %v", time.Since(begin), err)
		}
		why := errors.New("interrupted")
		ctx, cancel := context.WithCancelCause(t.Context())
		time.AfterFunc(time.Second+time.Millisecond, func() { cancel(why) })
		begin = time.Now()
		if _, err := source(ctx); !errors.Is(err, why) || time.Since(begin) > 2*time.Second {
			t.Errorf("after %s: %v", time.Since(begin), err)
		}
	})
}
