package admission

import (
	"container/list"
	"context"
	"math/rand/v2"
	"sync"
	"time"
)

// maxAgain bounds for how long a Queue sends somebody away: what made it slow may be over long before.
const maxAgain = 5 * time.Minute

// firstGuess is for how long a place is held before anybody knows: what a sign-in takes of a machine that has many to do.
const firstGuess = 50 * time.Millisecond

// Queue lets so many do something at a time. Others wait in the order in which they came, and those for whom there is no room
// are sent away, each with a time of its own.
type Queue struct {
	places, room int
	patience     time.Duration

	mu      sync.Mutex // guards all below
	busy    int
	waiting list.List     // of chan struct{}, closed when its turn has come
	took    time.Duration // for how long a place was held, on average
	booked  time.Time     // when whoever was sent away last may come
}

// Place is one of a Queue's; it must be left. The zero Place is none.
type Place struct {
	q     *Queue
	since time.Time
}

// NewQueue makes a queue for so many places; at most room wait for one, each for at most patience.
func NewQueue(places, room int, patience time.Duration) *Queue {
	return &Queue{places: places, room: room, patience: patience, took: firstGuess}
}

// Enter takes a place, if need be after a wait. If there is none in time, or ctx ends, it returns after how long to come
// again; else that is 0.
func (q *Queue) Enter(ctx context.Context) (_ Place, again time.Duration) {
	q.mu.Lock()
	if q.busy < q.places && q.waiting.Len() == 0 {
		q.busy++
		q.mu.Unlock()
		return Place{q, time.Now()}, 0
	}
	// Whoever would wait in vain learns it at once.
	if n := q.waiting.Len() + 1; n > q.room || time.Duration(n)*q.each() > q.patience {
		defer q.mu.Unlock()
		return Place{}, q.book()
	}
	turn := make(chan struct{})
	at := q.waiting.PushBack(turn)
	q.mu.Unlock()
	enough := time.NewTimer(q.patience)
	defer enough.Stop()
	select {
	case <-turn:
		return Place{q, time.Now()}, 0
	case <-enough.C:
	case <-ctx.Done():
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	select {
	case <-turn: // at the same moment
		return Place{q, time.Now()}, 0
	default:
	}
	q.waiting.Remove(at)
	if ctx.Err() != nil { // nobody will come at the time
		return Place{}, time.Second
	}
	return Place{}, q.book()
}

// Leave gives the place to whoever has waited for the longest.
func (p Place) Leave() {
	q := p.q
	if q == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	q.took += (time.Since(p.since) - q.took) / 16
	if first := q.waiting.Front(); first != nil {
		close(q.waiting.Remove(first).(chan struct{}))
		return
	}
	q.busy--
}

// State is how many have a place, and how many wait for one.
func (q *Queue) State() (busy, waiting int) {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.busy, q.waiting.Len()
}

// each is how long one of all places is held. q.mu is held.
func (q *Queue) each() time.Duration { return q.took / time.Duration(q.places) }

// book finds a time for somebody who is sent away: when all who wait are through, and behind all who were sent away before.
// So those who come together come again one by one, as fast as they can be served. q.mu is held.
func (q *Queue) book() time.Duration {
	now := time.Now()
	through := now.Add(time.Duration(q.busy+q.waiting.Len()) * q.each())
	if q.booked.Before(through) {
		q.booked = through
	}
	q.booked = q.booked.Add(q.each())
	if q.booked.Sub(now) > maxAgain {
		q.booked = now.Add(maxAgain)
		return time.Second + rand.N(maxAgain)
	}
	return Again(q.booked.Sub(now))
}
