package oauthserver

import (
	"context"
	"runtime"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestPasswords(t *testing.T) {
	h := newHasher(defaultCost)
	phc := must[string](t)(h.hash(t.Context(), "correct horse battery", false))
	if !strings.HasPrefix(phc, "$argon2id$v=19$m=65536,t=3,p=1$") {
		t.Fatal(phc)
	}
	for password, want := range map[string]bool{"correct horse battery": true, "correct horse": false, "": false, strings.Repeat("x", 300): false} {
		if ok, err := h.check(t.Context(), phc, password); err != nil || ok != want {
			t.Errorf("%q: %v, %v", password, ok, err)
		}
	}
	oneTime := must[string](t)(h.hash(t.Context(), "abcd-efgh", true))
	for password, want := range map[string]bool{"abcd-efgh": true, "abcd-efgi": false} {
		if ok, err := h.check(t.Context(), oneTime, password); err != nil || ok != want {
			t.Errorf("%q: %v, %v", password, ok, err)
		}
	}
	if ok, err := newHasher(cheap).check(t.Context(), "", "anything"); ok || err != nil {
		t.Error("an account that does not exist has a password")
	}
	for _, broken := range []string{"x", "$argon2id$v=19$m=8,t=1,p=1$!$!", "$bcrypt$v=19$m=8,t=1,p=1$AAAA$AAAA", "$argon2id$v=1$m=8,t=1,p=1$AAAA$AAAA"} {
		if _, err := h.check(t.Context(), broken, "x"); !hub.IsKind(err, hub.Internal) {
			t.Errorf("%q: %v", broken, err)
		}
	}
}

func TestPasswordHashingIsBounded(t *testing.T) {
	t.Parallel()
	h := newHasher(cheap)
	var releases []func()
	for range hashesAtOnce {
		releases = append(releases, must[func()](t)(h.slot(t.Context())))
	}
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	for range hashesWaiting {
		wg.Go(func() {
			if _, err := h.slot(ctx); !hub.IsKind(err, hub.Unavailable) {
				t.Errorf("waiting ended with %v", err)
			}
		})
	}
	for len(h.queue) < cap(h.queue) { // until all of them wait
		runtime.Gosched()
	}
	if _, err := h.slot(t.Context()); !hub.IsKind(err, hub.Exhausted) {
		t.Errorf("one more than the queue holds: %v", err)
	}
	stop()
	wg.Wait()
	for _, release := range releases {
		release()
	}
	must[string](t)(h.hash(t.Context(), "works again", false))
}

func TestAccounts(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	ctx := t.Context()
	oneTime := must[string](t)(s.AddUser(ctx, "Alice", "", []string{RoleUser}))
	if len(oneTime) != 24 {
		t.Fatalf("one-time password %q", oneTime)
	}
	_, err := s.AddUser(ctx, "alice", "long enough password", []string{RoleUser})
	wantKind(t, err, hub.Conflict, "account-exists")
	for _, bad := range []string{"", "-x", "ünal", "a b", strings.Repeat("x", 65), "a/b"} {
		_, err := s.AddUser(ctx, bad, "long enough password", []string{RoleUser})
		wantKind(t, err, hub.Invalid, "account-name-invalid")
	}
	_, err = s.AddUser(ctx, "bob", "short", []string{RoleUser})
	wantKind(t, err, hub.Invalid, "password-invalid")
	_, err = s.AddUser(ctx, "bob", "long enough password", []string{"root"})
	wantKind(t, err, hub.Invalid, "role-unknown")
	_, err = s.AddUser(ctx, "bob", "long enough password", nil)
	wantKind(t, err, hub.Invalid, "role-unknown")
	all := must[[]Account](t)(s.ListUsers(ctx))
	if len(all) != 2 || all[0].Name != "admin" || all[1].Name != "alice" || !all[1].MustChange {
		t.Fatalf("%+v", all)
	}
	if first := must[hub.Owner](t)(s.Administrator(ctx)); first != admin {
		t.Fatal(first)
	}
	wantKind(t, s.SetRoles(ctx, "admin", []string{RoleUser}), hub.Precondition, "last-administrator")
	if err := s.SetRoles(ctx, "alice", []string{RoleAdmin, RoleUser, RoleUser}); err != nil {
		t.Fatal(err)
	}
	if err := s.SetRoles(ctx, "admin", []string{RoleViewer}); err != nil {
		t.Fatal(err)
	}
	if first := must[hub.Owner](t)(s.Administrator(ctx)); first != "alice" {
		t.Fatal(first)
	}
	wantKind(t, s.SetRoles(ctx, "carol", []string{RoleUser}), hub.NotFound, "account-unknown")
	_, err = s.SetPassword(ctx, "carol", "long enough password")
	wantKind(t, err, hub.NotFound, "account-unknown")
	_, err = s.SetPassword(ctx, "alice", "short")
	wantKind(t, err, hub.Invalid, "password-invalid")
}

func TestSetPasswordEndsApplicationsNotDevices(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	api := verify(t, s, must[string](t)(s.IssueToken(t.Context(), admin, nil, 0)))["jti"].(string)
	device := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", onboard(t, s, lamp)))
	must[string](t)(s.SetPassword(t.Context(), "admin", "long enough password"))
	if ok := must[bool](t)(s.Active(t.Context(), api)); ok {
		t.Error("an application's token outlived the password")
	}
	must[hub.Tokens](t)(s.Refresh(t.Context(), lamp, device.Refresh))
}

func TestRolesBoundDevices(t *testing.T) {
	t.Parallel()
	s := newServer(t)
	must[string](t)(s.AddUser(t.Context(), "alice", "long enough password", []string{RoleUser}))
	text, _, err := s.OnboardCode(t.Context(), "alice", lamp, 0)
	if err != nil {
		t.Fatal(err)
	}
	tokens := must[hub.Tokens](t)(s.Exchange(t.Context(), lamp, "", text))
	if err := s.SetRoles(t.Context(), "alice", []string{RoleViewer}); err != nil {
		t.Fatal(err)
	}
	_, _, err = s.OnboardCode(t.Context(), "alice", lamp, 0)
	wantKind(t, err, hub.Denied, "scope-not-allowed")
	_, err = s.Refresh(t.Context(), lamp, tokens.Refresh)
	wantKind(t, err, hub.Unauthenticated, "")
}

func TestFirstLogin(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	s := openServer(t, config(), docs, owners(nobody))
	name, first, ok := s.FirstLogin()
	if !ok || name != "admin" || len(first) != 24 {
		t.Fatalf("%q %q %v", name, first, ok)
	}
	s = openServer(t, config(), docs, owners(nobody)) // lost with the terminal: the next start gives another
	_, second, ok := s.FirstLogin()
	if !ok || second == first {
		t.Fatal("no new one-time password")
	}
	must[string](t)(s.SetPassword(t.Context(), "admin", "long enough password"))
	s = openServer(t, config(), docs, owners(nobody))
	if _, _, ok := s.FirstLogin(); ok {
		t.Fatal("a password that was chosen was replaced")
	}
	cfg := config()
	cfg.InitialPassword = "from a secret"
	s = openServer(t, cfg, storetest.NewMemory(), owners(nobody))
	if _, _, ok := s.FirstLogin(); ok {
		t.Fatal("a configured password is shown")
	}
	if a := must[account](t)(s.account(t.Context(), "admin")); !a.MustChange {
		t.Fatal("a configured password need not be changed")
	}
}

func TestLimits(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		l := newLimits(3, time.Second, 2)
		for range 3 {
			if _, ok := l.allow("a"); !ok {
				t.Fatal("refused within the burst")
			}
		}
		if wait, ok := l.allow("a"); ok || wait != time.Second {
			t.Fatalf("%s %v", wait, ok)
		}
		if _, ok := l.allow("b"); !ok {
			t.Fatal("another key is refused")
		}
		time.Sleep(time.Second)
		if _, ok := l.allow("a"); !ok {
			t.Fatal("refused after the wait")
		}
		l.allow("c")
		if len(l.buckets) != 2 {
			t.Fatalf("%d buckets are kept", len(l.buckets))
		}
	})
}
