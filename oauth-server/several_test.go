package oauthserver

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func several() Config {
	cfg := config()
	cfg.Several = true
	return cfg
}

// keyIDs are the keys that a server publishes.
func keyIDs(t *testing.T, s *Server) string {
	t.Helper()
	set, err := s.Keys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, k := range set.Keys {
		ids = append(ids, k.KeyID)
	}
	return strings.Join(ids, " ")
}

// Processes that start at the same time, each the first, agree on issuer, keys and secrets, and one of them shows the password, which
// those that start later leave as it is.
func TestFirstStartOfSeveral(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	servers := make([]*Server, 8)
	var starts sync.WaitGroup
	for i := range servers {
		starts.Go(func() {
			cfg := several()
			cfg.BaseURL = fmt.Sprintf("http://127.0.0.1:%d", 8080+i)
			var err error
			servers[i], err = openWith(context.Background(), cfg, docs, owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
			if err != nil {
				t.Error(err)
			}
		})
	}
	starts.Wait()
	if t.Failed() {
		t.FailNow()
	}
	servers = append(servers, openServer(t, several(), docs, owners(nobody)))
	var shown []string
	for _, s := range servers {
		if _, password, ok := s.FirstLogin(); ok {
			shown = append(shown, password)
		}
		if s.Issuer() != servers[0].Issuer() {
			t.Errorf("issuers %q and %q", s.Issuer(), servers[0].Issuer())
		}
		if a, b := keyIDs(t, s), keyIDs(t, servers[0]); a != b || strings.Contains(a, " ") {
			t.Errorf("keys %q and %q", a, b)
		}
		if !slices.Equal(s.secrets.refresh, servers[0].secrets.refresh) {
			t.Error("they have different secrets")
		}
	}
	if len(shown) != 1 {
		t.Fatalf("%d one-time passwords are shown", len(shown))
	}
	for _, s := range servers {
		must[account](t)(s.signIn(t.Context(), "1.2.3.4", firstAccount, shown[0]))
	}
	// From a secret it comes to all of them, and may be another as long as it was not used.
	cfg := several()
	cfg.InitialPassword = "from a secret of the cluster"
	s := openServer(t, cfg, docs, owners(nobody))
	must[account](t)(s.signIn(t.Context(), "1.2.3.4", firstAccount, cfg.InitialPassword.Reveal()))
}

// The next key is made once, however many processes find that it is time.
func TestSeveralRotateOnce(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	servers := make([]*Server, 4)
	for i := range servers {
		s, h := serverAt(t, docs)
		h.passed = s.cfg.KeyLifetime - time.Hour
		servers[i] = s
	}
	var rotations sync.WaitGroup
	for _, s := range servers {
		rotations.Go(func() {
			if _, _, err := s.keys.current(context.Background()); err != nil {
				t.Error(err)
			}
		})
	}
	rotations.Wait()
	all := keyIDs(t, servers[0])
	if strings.Count(all, " ") != 1 {
		t.Errorf("the keys are %q, want two", all)
	}
	for _, s := range servers {
		if keyIDs(t, s) != all {
			t.Errorf("keys %q and %q", keyIDs(t, s), all)
		}
	}
}

// A process whose clock leapt signs with a key at once that it has just made: the others have it as soon as they are asked.
func TestKeyThatAnotherProcessMade(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	a, h := serverAt(t, docs)
	b, _ := serverAt(t, docs)
	before := keyIDs(t, b)
	h.set = year
	tokens := must[hub.Tokens](t)(a.Exchange(t.Context(), lamp, "", onboardAt(t, a)))
	after := keyIDs(t, b)
	if after == before || !strings.HasPrefix(after, before+" ") {
		t.Errorf("the keys are %q, and were %q", after, before)
	}
	if _, ok := unverifiedTokenID(tokens.Access); !ok {
		t.Error("no token")
	}
	set, err := storage{b}.KeySet(t.Context())
	if err != nil || len(set) != 2 {
		t.Errorf("%d keys over HTTP, %v", len(set), err)
	}
	// Without the store nobody can say that a key is not there.
	docs.Fail = func(string, string, string) error { return &hub.Error{Kind: hub.Unavailable} }
	if _, err := b.Keys(t.Context()); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("without the store: %v", err)
	}
}

func onboardAt(t *testing.T, s *Server) string {
	t.Helper()
	text, _, err := s.OnboardCode(t.Context(), admin, lamp, 0)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// A code gives one device its tokens, the same wherever it asks, and a refresh token one successor.
func TestCodesAndRefreshTokensOfSeveral(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	a, b := openServer(t, several(), docs, owners(nobody)), openServer(t, several(), docs, owners(nobody))
	ask := func(what string, f func(s *Server, i int) (hub.Tokens, error)) (got []hub.Tokens) {
		var mu sync.Mutex
		var asks sync.WaitGroup
		for i, s := range []*Server{a, b, a, b} {
			asks.Go(func() {
				tokens, err := f(s, i)
				mu.Lock()
				defer mu.Unlock()
				if err == nil {
					got = append(got, tokens)
				} else if !hub.IsKind(err, hub.Unauthenticated) {
					t.Errorf("%s: %v", what, err)
				}
			})
		}
		asks.Wait()
		return got
	}
	text := onboard(t, a, "")
	got := ask("one credential", func(s *Server, _ int) (hub.Tokens, error) { return s.Exchange(context.Background(), lamp, "c", text) })
	if len(got) != 4 || got[0].Access != got[3].Access || got[0].Refresh != got[1].Refresh || got[1].Access != got[2].Access {
		t.Errorf("the repeats give %d answers, %+v", len(got), got)
	}
	text = onboard(t, b, "")
	other := ask("four credentials", func(s *Server, i int) (hub.Tokens, error) {
		return s.Exchange(context.Background(), lamp, fmt.Sprint(i), text)
	})
	if len(other) != 1 {
		t.Errorf("one code was redeemed %d times", len(other))
	}
	next := ask("refresh", func(s *Server, _ int) (hub.Tokens, error) {
		return s.Refresh(context.Background(), lamp, got[0].Refresh)
	})
	if len(next) != 4 || slices.ContainsFunc(next, func(n hub.Tokens) bool { return n.Refresh != next[0].Refresh }) {
		t.Errorf("one refresh token has the successors %+v", next)
	}
	must[hub.Tokens](t)(b.Refresh(t.Context(), lamp, next[0].Refresh))
}

// What one process ends, the sessions of another one end for within a second.
func TestGrantsThatAnotherProcessEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		docs := storetest.NewMemory()
		var mu sync.Mutex // guards heard
		heard := map[string]int{}
		hear := func(grant string) {
			mu.Lock()
			defer mu.Unlock()
			heard[grant]++
		}
		count := func(grant string) int {
			mu.Lock()
			defer mu.Unlock()
			return heard[grant]
		}
		a, b := openServer(t, several(), docs, owners(nobody)), openServer(t, several(), docs, owners(nobody))
		ctx, cancel := context.WithCancel(t.Context())
		var run sync.WaitGroup
		run.Go(func() { _ = b.Follow(ctx, hear, func() {}) })
		begin := func() (tokens hub.Tokens, grant string) {
			tokens = must[hub.Tokens](t)(a.Exchange(t.Context(), lamp, "", onboard(t, a, lamp)))
			return tokens, GrantOf(verify(t, b, tokens.Access)["jti"].(string))
		}
		tokens, grant := begin()
		_, stays := begin()
		time.Sleep(time.Second)
		if count(grant) != 0 {
			t.Error("it has not ended")
		}
		if err := a.Revoke(t.Context(), tokens); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if count(grant) != 1 || count(stays) != 0 {
			t.Errorf("a second later it was told %d times, and another %d times", count(grant), count(stays))
		}
		time.Sleep(time.Hour)
		if count(grant) != 1 {
			t.Errorf("it was told %d times", count(grant))
		}

		// What ended while the store was away from this process, it is told of later.
		tokens, grant = begin()
		away := true
		docs.Mu.Lock()
		docs.Fail = func(op, _, _ string) error {
			if op == "find" && away {
				return &hub.Error{Kind: hub.Unavailable}
			}
			return nil
		}
		docs.Mu.Unlock()
		time.Sleep(time.Minute)
		if err := a.Revoke(t.Context(), tokens); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Hour)
		docs.Mu.Lock()
		away = false
		docs.Mu.Unlock()
		time.Sleep(time.Second)
		synctest.Wait()
		if count(grant) != 1 {
			t.Errorf("told %d times of what ended meanwhile", count(grant))
		}

		// And of what was stored long after it was decided, by a process that was paused.
		tokens, grant = begin()
		slow := &paused{Documents: docs, before: 10 * time.Minute}
		c, err := openWith(t.Context(), several(), slow, owners(nobody), quiet(), prometheus.NewRegistry(), cheap)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Revoke(t.Context(), tokens); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if count(grant) != 1 {
			t.Errorf("told %d times of what was stored late", count(grant))
		}
		cancel()
		run.Wait()
	})
}

// paused is the documents of a process that is paused before it first writes a grant.
type paused struct {
	store.Documents
	before time.Duration
	once   sync.Once
}

func (p *paused) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	if collection == collGrants {
		p.once.Do(func() { time.Sleep(p.before) })
	}
	return p.Documents.Put(ctx, collection, doc)
}

// The right to choose a password in place of a one-time one is used once, wherever.
func TestOneTimePasswordIsReplacedOnce(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	a, b := openServer(t, several(), docs, owners(nobody)), openServer(t, several(), docs, owners(nobody))
	was := fingerprint(must[account](t)(a.account(t.Context(), firstAccount)).Password)
	if err := a.setPassword(t.Context(), firstAccount, "the one that was first", false, was); err != nil {
		t.Fatal(err)
	}
	if err := b.setPassword(t.Context(), firstAccount, "the one that was late", false, was); !errors.Is(err, errChanged) {
		t.Errorf("a second time: %v", err)
	}
	must[account](t)(b.signIn(t.Context(), "1.2.3.4", firstAccount, "the one that was first"))
}

// meet has two processes write an account after both have decided to.
type meet struct {
	store.Documents
	both *sync.WaitGroup
	once sync.Once
}

func (m *meet) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	if collection == collAccounts {
		m.once.Do(func() { m.both.Done(); m.both.Wait() })
	}
	return m.Documents.Put(ctx, collection, doc)
}

// Two administrators who are taken the role at the same time do not leave a hub without.
func TestLastAdministratorsOfSeveral(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	must[string](t)(openServer(t, several(), docs, owners(nobody)).AddUser(t.Context(), "root", password, []string{RoleAdmin}))
	var both, calls sync.WaitGroup
	both.Add(2)
	for _, name := range []string{firstAccount, "root"} {
		s := openServer(t, several(), docs, owners(nobody))
		s.docs = &meet{Documents: s.docs, both: &both}
		calls.Go(func() {
			if err := s.SetRoles(context.Background(), name, []string{RoleUser}); err != nil && !hub.IsKind(err, hub.Precondition) {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	must[hub.Owner](t)(openServer(t, several(), docs, owners(nobody)).Administrator(t.Context()))
}
