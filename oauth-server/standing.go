package oauthserver

import (
	"context"
	"sync"
	"time"

	"github.com/coaphub/coaphub/internal/store"
)

const (
	// recallFor is how long it is believed that a grant stands that another process may end: as long as it takes an application's
	// stream to look at its token again.
	recallFor   = time.Second
	maxStanding = 10_000
)

// standing is the store, and remembers for a moment which grants stand, since each request asks for its token's. What is stored
// through it is known at once.
type standing struct {
	store.Documents

	mu      sync.Mutex // guards all below
	changes uint64     // of grants: what was read before the newest is not remembered
	until   map[string]time.Time
}

// Put is of store.Documents.
func (s *standing) Put(ctx context.Context, collection string, doc store.Doc) (uint64, error) {
	defer s.forget(collection, doc.Key) // also after an error: perhaps it was stored
	return s.Documents.Put(ctx, collection, doc)
}

// Delete is of store.Documents.
func (s *standing) Delete(ctx context.Context, collection, key string, rev uint64) error {
	defer s.forget(collection, key)
	return s.Documents.Delete(ctx, collection, key, rev)
}

func (s *standing) forget(collection, key string) {
	if collection != collGrants {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.changes++
	delete(s.until, key)
}

// recalls reports whether the grant is known to stand; if not, since is for remember.
func (s *standing) recalls(id string) (stands bool, since uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.until[id]), s.changes
}

// remember notes that the grant stood when it was read, which was after since.
func (s *standing) remember(id string, since uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if since != s.changes {
		return
	}
	if s.until == nil || len(s.until) >= maxStanding {
		s.until = map[string]time.Time{}
	}
	s.until[id] = time.Now().Add(recallFor)
}
