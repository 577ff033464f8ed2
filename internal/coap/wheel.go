package coap

import (
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
	count int
	start time.Time
	wake  chan struct{} // capacity 1: the first timer was set
}

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
	w := &wheel{start: time.Now(), wake: make(chan struct{}, 1)}
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
		select {
		case w.wake <- struct{}{}:
		default:
		}
	}
	t.due = int64((now + d + wheelTick - 1) / wheelTick)
	if t.due <= w.hand {
		t.due = w.hand + 1
	}
	h := &w.slots[t.due%wheelSlots]
	t.prev, t.next = h.prev, h
	t.prev.next, h.prev = t, t
	w.count++
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

// run turns the wheel until done is closed. With no timer set it sleeps.
func (w *wheel) run(done <-chan struct{}) {
	for {
		select {
		case <-done:
			return
		case <-w.wake:
		}
		tick := time.NewTicker(wheelTick)
		for busy := true; busy; {
			select {
			case <-done:
				tick.Stop()
				return
			case <-tick.C:
				busy = w.turn()
			}
		}
		tick.Stop()
	}
}

// turn serves all ticks up to now and reports whether timers are left.
func (w *wheel) turn() bool {
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
	left := w.count > 0
	if left {
		w.mu.Unlock()
		return true
	}
	// A wake-up that came while timers were set is stale: set sends a new one when count leaves zero, under this lock.
	select {
	case <-w.wake:
	default:
	}
	w.mu.Unlock()
	return false
}
