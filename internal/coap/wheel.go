package coap

import (
	"math"
	"sync"
	"time"
)

// wheel is the one clock of all connections: a ring of slots, each with the timers that are due when the hand reaches it.
// Setting a timer costs a list insertion; no connection has a runtime timer or a goroutine for waiting. Timers fire up to
// one tick late, never early.
type wheel struct {
	mu    sync.Mutex
	slots [wheelSlots]timer // heads of rings
	hand  int64             // the last tick that was served
	next  int64             // the tick that run waits for
	count int
	start time.Time
	wake  chan struct{} // capacity 1: next came nearer
}

// never is a tick that does not come.
const never = math.MaxInt64

const (
	wheelTick  = 100 * time.Millisecond
	wheelSlots = 512 // 51 s a turn; timers further away go round again
)

// timer is one entry of a wheel. Its owner sets fire once; it is called from the wheel's goroutine and must not block.
type timer struct {
	next, prev *timer // nil when not set
	due        int64  // tick
	fire       func()
}

func newWheel() *wheel {
	w := &wheel{next: never, start: time.Now(), wake: make(chan struct{}, 1)}
	for i := range w.slots {
		h := &w.slots[i]
		h.next, h.prev = h, h
	}
	return w
}

// set arms t to fire d from now, whether it was set or not.
func (w *wheel) set(t *timer, d time.Duration) {
	w.mu.Lock()
	defer w.mu.Unlock()
	t.unlink(w)
	now := time.Since(w.start)
	if w.count == 0 {
		w.hand = int64(now / wheelTick) // the hand stood still while there was nothing to do
	}
	t.due = int64((now + d + wheelTick - 1) / wheelTick)
	if t.due <= w.hand {
		t.due = w.hand + 1
	}
	h := &w.slots[t.due%wheelSlots]
	t.prev, t.next = h.prev, h
	t.prev.next, h.prev = t, t
	w.count++
	if t.due < w.next {
		w.next = t.due
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
}

// stop disarms t. Its fire may still be running.
func (w *wheel) stop(t *timer) {
	w.mu.Lock()
	t.unlink(w)
	w.mu.Unlock()
}

func (t *timer) unlink(w *wheel) {
	if t.next == nil {
		return
	}
	t.prev.next, t.next.prev = t.next, t.prev
	t.next, t.prev = nil, nil
	w.count--
}

// run turns the wheel until done is closed. It sleeps while no timer is near: a hub with few connections wakes a few times
// a minute, not ten times a second.
func (w *wheel) run(done <-chan struct{}) {
	sleep := time.NewTimer(0)
	defer sleep.Stop()
	for {
		select {
		case <-done:
			return
		case <-w.wake:
		case <-sleep.C:
		}
		if d, ok := w.turn(); ok {
			sleep.Reset(d)
		}
	}
}

// turn serves all ticks up to now. It returns how long nothing is to be done, which is at most one round, or false if no
// timer is left.
func (w *wheel) turn() (time.Duration, bool) {
	w.mu.Lock()
	now := int64(time.Since(w.start) / wheelTick)
	if now-w.hand > wheelSlots {
		w.hand = now - wheelSlots // after a pause one turn serves every slot
	}
	for w.hand < now {
		w.hand++
		h := &w.slots[w.hand%wheelSlots]
		for t := h.next; t != h; {
			next := t.next
			if t.due <= now {
				t.unlink(w)
				// The lock is given up around fire, which may set timers. They never land in this slot's past, but next may
				// be moved or stopped meanwhile; starting over is cheap because what was due is gone.
				w.mu.Unlock()
				t.fire()
				w.mu.Lock()
				next = h.next
			}
			t = next
		}
	}
	defer w.mu.Unlock()
	w.next = never
	if w.count == 0 {
		return 0, false
	}
	for n := w.hand + 1; w.next == never; n++ { // each timer is in one of the slots
		if h := &w.slots[n%wheelSlots]; h.next != h {
			w.next = n
		}
	}
	return time.Duration(w.next)*wheelTick - time.Since(w.start), true
}
