package identitystore

import (
	"sync"

	"github.com/coaphub/coaphub/hub"
)

// lists caches which devices each owner has, at most max IDs in all (an empty list counts as one).
type lists struct {
	mu    sync.Mutex // guards everything below
	max   int
	used  int
	epoch uint64 // counts drops: a list that was read before a drop is not kept after it
	of    map[hub.Owner][]hub.DeviceID
}

func newLists(max int) *lists { return &lists{max: max, of: make(map[hub.Owner][]hub.DeviceID)} }

// get returns the list, or the epoch to give to put once it was read from the store.
func (l *lists) get(owner hub.Owner) (ids []hub.DeviceID, epoch uint64, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	ids, ok = l.of[owner]
	return ids, l.epoch, ok
}

// put keeps a list unless something was dropped since epoch: it might be the old one. When the cache is full, lists of other
// owners make room.
func (l *lists) put(owner hub.Owner, ids []hub.DeviceID, epoch uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.epoch != epoch || cost(ids) > l.max {
		return
	}
	l.forget(owner)
	for other := range l.of {
		if l.used+cost(ids) <= l.max {
			break
		}
		l.forget(other)
	}
	l.of[owner] = ids
	l.used += cost(ids)
}

// drop forgets the owner's list. The empty owner, of a record that was released, drops nothing: the mark before dropped it.
func (l *lists) drop(owner hub.Owner) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch++
	l.forget(owner)
}

// dropAll forgets all of them.
func (l *lists) dropAll() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.epoch++
	clear(l.of)
	l.used = 0
}

func (l *lists) forget(owner hub.Owner) {
	if ids, ok := l.of[owner]; ok {
		l.used -= cost(ids)
		delete(l.of, owner)
	}
}

func cost(ids []hub.DeviceID) int { return max(1, len(ids)) }
