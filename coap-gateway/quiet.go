package coapgateway

import (
	"container/heap"
	"context"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/coaphub/coaphub/internal/coap"
)

// How often devices are asked for what they have not reported for long.
const (
	quietPace = 5 * time.Millisecond // at most one question, over all devices
	quietGap  = 10 * time.Second     // at most one to a device
	quietLook = time.Minute          // after the last look at a session that has nothing to be asked for
)

// quietQueue has the devices asked for observed resources that were not reported for longer than their Max-Age (RFC 7641, Section
// 3.3.1): over UDP and DTLS a notification that is not confirmable may be lost, and a device may have forgotten who observes
// it. It is one queue of sessions with one timer; a notification does not touch it, a session is looked at when its turn comes.
type quietQueue struct {
	after time.Duration // past the Max-Age, on average; zero: nobody is asked

	mu       sync.Mutex // guards all below; never held while a twin's lock is taken
	sessions sessionQueue
	first    chan struct{} // capacity 1: the first session is another one
}

// turn is a session's place in the queue.
type turn struct {
	at    time.Time
	twin  *twin
	index int // in the queue; -1 when not there
}

func newQuietQueue(after time.Duration) *quietQueue {
	return &quietQueue{after: after, first: make(chan struct{}, 1)}
}

// watch begins to look after a session.
func (q *quietQueue) watch(t *twin) {
	if q.after <= 0 || t.s.rhythm.stream {
		return
	}
	t.turn = &turn{twin: t}
	q.put(t.turn, time.Now().Add(quietLook))
}

// leave ends that.
func (q *quietQueue) leave(t *twin) {
	if t.turn == nil {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if t.turn.index >= 0 {
		heap.Remove(&q.sessions, t.turn.index)
	}
	t.turn.twin = nil
}

func (q *quietQueue) put(e *turn, at time.Time) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if e.twin == nil {
		return // it left meanwhile
	}
	e.at = at
	heap.Push(&q.sessions, e)
	if e.index == 0 {
		select {
		case q.first <- struct{}{}:
		default:
		}
	}
}

// run looks at one session after the other until ctx ends.
func (q *quietQueue) run(ctx context.Context) {
	for ctx.Err() == nil {
		e, t, wait := q.next(time.Now())
		first := q.first
		if e != nil {
			at, asked := t.askQuiet(time.Now(), q.after)
			q.put(e, at)
			if !asked {
				continue
			}
			wait, first = quietPace, nil
		}
		select {
		case <-ctx.Done():
		case <-first:
		case <-time.After(wait):
		}
	}
}

// next takes the session whose turn has come out of the queue; nil if there is none for a while.
func (q *quietQueue) next(now time.Time) (*turn, *twin, time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.sessions) == 0 {
		return nil, nil, time.Hour
	}
	if wait := q.sessions[0].at.Sub(now); wait > 0 {
		return nil, nil, wait
	}
	e := heap.Pop(&q.sessions).(*turn)
	return e, e.twin, 0
}

// askQuiet has the device asked for the observed resource that is stale for longest, if it is for long enough, and returns
// when to look again.
func (t *twin) askQuiet(now time.Time, after time.Duration) (at time.Time, asked bool) {
	if t.s.rhythm.sleeper() {
		return now.Add(wakeful), false // it is never asked: it reports when it wakes
	}
	if ok, again := t.s.rhythm.inReach(now); !ok {
		if again.Before(now) { // it has just turned out to sleep
			again = now.Add(quietLook)
		}
		return again, false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	var oldest *coap.Observation
	for _, w := range t.seen {
		if w.obs == nil {
			continue
		}
		if stale := w.obs.Stale(); oldest == nil || stale.Before(at) {
			oldest, at = w.obs, stale
		}
	}
	switch {
	case oldest == nil:
		return now.Add(quietLook), false
	case now.Before(at.Add(after / 2)):
		// RFC 7641, Section 3.3.1: between 5 and 15 s after it became stale, at random, so that not all ask at once.
		return at.Add(after/2 + rand.N(after)), false //nolint:gosec // no secret
	case t.stale == nil:
		t.stale = oldest
		t.start()
	}
	return now.Add(quietGap), true
}

// refresh asks for an observed resource once more. What the device answers comes as a notification does.
func (t *twin) refresh(o *coap.Observation) {
	err := t.s.request(t.s.ctx, o.Refresh)
	outcome := "answered"
	switch {
	case err == nil:
	case missedBy(err):
		outcome = "silent"
	default: // a reset: the device does not know what it is asked for
		outcome = "refused"
		t.lose(o)
	}
	t.s.gw.metrics.quiet.WithLabelValues(outcome).Inc()
}

// sessionQueue is a heap.Interface, the next turn first.
type sessionQueue []*turn

func (q sessionQueue) Len() int           { return len(q) }
func (q sessionQueue) Less(i, j int) bool { return q[i].at.Before(q[j].at) }
func (q sessionQueue) Swap(i, j int) {
	q[i], q[j] = q[j], q[i]
	q[i].index, q[j].index = i, j
}

// Push implements heap.Interface.
func (q *sessionQueue) Push(x any) {
	e := x.(*turn)
	e.index = len(*q)
	*q = append(*q, e)
}

// Pop implements heap.Interface.
func (q *sessionQueue) Pop() any {
	old := *q
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*q = old[:len(old)-1]
	e.index = -1
	return e
}
