package auth

import (
	"container/list"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxRemembered bounds the tokens that need no second signature check. When it is full, the one not seen for longest goes:
// it costs a signature check when it comes back.
const maxRemembered = 10_000

// remembered are validated tokens by the SHA-256 of their text, so that a dump of the memory gives nobody a token.
type remembered struct {
	mu    sync.Mutex // guards all below
	items map[[32]byte]*list.Element
	order *list.List // of *verified, last used first
}

type verified struct {
	hash    [32]byte
	claims  hub.Claims
	issued  time.Time
	issuer  *trusted
	version uint64 // of the issuer's keys
}

func newRemembered() *remembered {
	return &remembered{items: map[[32]byte]*list.Element{}, order: list.New()}
}

func (r *remembered) get(hash [32]byte) (*verified, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	e, ok := r.items[hash]
	if !ok {
		return nil, false
	}
	r.order.MoveToFront(e)
	return e.Value.(*verified), true
}

func (r *remembered) put(v *verified) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.items[v.hash]; ok {
		e.Value = v
		r.order.MoveToFront(e)
		return
	}
	if len(r.items) >= maxRemembered {
		last := r.order.Back()
		delete(r.items, last.Value.(*verified).hash)
		r.order.Remove(last)
	}
	r.items[v.hash] = r.order.PushFront(v)
}

func (r *remembered) drop(hash [32]byte) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if e, ok := r.items[hash]; ok {
		delete(r.items, hash)
		r.order.Remove(e)
	}
}
