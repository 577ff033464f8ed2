package resourcedirectory

import (
	"container/heap"
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// commandIndex is the collection of devices that may have commands: one document a device, with the run of the process that
// took the last one. A start fills the deadlines from there instead of reading the whole fleet.
const commandIndex = "commands"

// expireAgain is when a command's end is tried again that could not be stored.
const expireAgain = 2 * time.Second

// waiters are the callers that wait for commands to end.
type waiters struct {
	mu sync.Mutex // guards of
	of map[hub.DeviceID]map[string][]*waiter
}

// waiter is one of them. Its channel gets the outcome, or is closed: then the log has to be asked.
type waiter struct {
	ch     chan hub.Outcome
	stored bool // its command is, or was, in the state; guarded by waiters.mu
}

func (w *waiters) add(dev hub.DeviceID, id string) *waiter {
	x := &waiter{ch: make(chan hub.Outcome, 1)}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.of == nil {
		w.of = map[hub.DeviceID]map[string][]*waiter{}
	}
	if w.of[dev] == nil {
		w.of[dev] = map[string][]*waiter{}
	}
	w.of[dev][id] = append(w.of[dev][id], x)
	return x
}

// listen says that the waiter's command was stored: from now on a state that does not have it means that it has ended.
func (w *waiters) listen(x *waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	x.stored = true
}

func (w *waiters) remove(dev hub.DeviceID, id string, x *waiter) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keep(dev, id, func(y *waiter) bool { return y != x })
}

// keep forgets the waiters that want does not want. w.mu is held.
func (w *waiters) keep(dev hub.DeviceID, id string, want func(*waiter) bool) {
	left := slices.DeleteFunc(w.of[dev][id], func(x *waiter) bool { return !want(x) })
	if len(left) > 0 {
		w.of[dev][id] = left
		return
	}
	delete(w.of[dev], id)
	if len(w.of[dev]) == 0 {
		delete(w.of, dev)
	}
}

// tell gives the outcome to all who wait for it.
func (w *waiters) tell(dev hub.DeviceID, id string, out hub.Outcome) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.keep(dev, id, func(x *waiter) bool {
		x.ch <- out // one place, and who got something is forgotten
		return false
	})
}

// devices is those for whose commands somebody waits.
func (w *waiters) devices() []hub.DeviceID {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Collect(maps.Keys(w.of))
}

// look sends those to the log whose commands a state that was loaded anew does not have: somebody else wrote their end.
func (w *waiters) look(s *state) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for id := range w.of[s.dev] {
		if s.command(id) != nil {
			continue
		}
		w.keep(s.dev, id, func(x *waiter) bool {
			if x.stored {
				close(x.ch)
			}
			return !x.stored
		})
	}
}

// deadline is when a command ends by itself. It outlives cold state.
type deadline struct {
	at    time.Time // monotonic
	dev   hub.DeviceID
	id    string
	place int
	retry *request // the last try to store its end
}

// deadlines are a worker's, the next one first.
type deadlines struct {
	heap []*deadline
	byID map[string]*deadline
}

func (d *deadlines) Len() int           { return len(d.heap) }
func (d *deadlines) Less(i, j int) bool { return d.heap[i].at.Before(d.heap[j].at) }
func (d *deadlines) Swap(i, j int) {
	d.heap[i], d.heap[j] = d.heap[j], d.heap[i]
	d.heap[i].place, d.heap[j].place = i, j
}

// Push is of heap.Interface.
func (d *deadlines) Push(x any) {
	e := x.(*deadline)
	e.place = len(d.heap)
	d.heap = append(d.heap, e)
}

// Pop is of heap.Interface.
func (d *deadlines) Pop() any {
	e := d.heap[len(d.heap)-1]
	d.heap[len(d.heap)-1] = nil
	d.heap = d.heap[:len(d.heap)-1]
	return e
}

// watch sees to it that a command ends at its time.
func (w *worker) watch(c *hub.Command) {
	if w.due.byID[c.ID] != nil {
		return
	}
	// From the wall clock once; from here on monotonic time counts.
	e := &deadline{at: time.Now().Add(time.Until(time.Unix(0, c.ValidUntil))), dev: c.Device, id: c.ID}
	w.due.byID[c.ID] = e
	heap.Push(&w.due, e)
	w.d.metrics.commands.Inc()
	w.arm()
}

func (w *worker) unwatch(id string) {
	if e := w.due.byID[id]; e != nil {
		delete(w.due.byID, id)
		heap.Remove(&w.due, e.place)
		w.d.metrics.commands.Dec()
	}
}

// arm sets the worker's timer to the next deadline.
func (w *worker) arm() {
	if len(w.due.heap) > 0 {
		w.alarm.Reset(time.Until(w.due.heap[0].at))
	}
}

// expire ends what is due. An end that cannot be stored is tried again.
func (w *worker) expire(now time.Time) {
	for len(w.due.heap) > 0 && !w.due.heap[0].at.After(now) {
		e := w.due.heap[0]
		e.at = now.Add(expireAgain)
		heap.Fix(&w.due, 0)
		if w.asked >= w.d.cfg.Queue || e.retry != nil && len(e.retry.answer) == 0 {
			continue
		}
		e.retry = &request{dev: e.dev, op: "directory.expire", ctx: context.Background(), answer: make(chan error, 1)}
		e.retry.decide = func(s *state, _ int64) ([]hub.Event, error) {
			c := s.command(e.id)
			if c == nil {
				return nil, nil
			}
			return []hub.Event{s.ends(c, hub.Answer{End: hub.CommandExpired}, "", "")}, nil
		}
		e.retry.stored = func(w *worker) { w.unwatch(e.id) }
		w.take(e.retry)
	}
	w.arm()
}

// told tells of a stored commit whoever waits for its commands.
func (w *worker) told(c *hub.Commit, s *state) {
	for i := range c.Events {
		switch ev := &c.Events[i]; ev.Kind {
		case hub.CommandPending:
			if cmd := s.command(ev.Correlation); cmd != nil {
				w.watch(cmd)
			}
		case hub.CommandEnded:
			w.unwatch(ev.Correlation)
			w.d.waiters.tell(c.Device, ev.Correlation, hub.OutcomeOf(c, i))
		case hub.Registered, hub.Unregistered, hub.MetadataUpdated, hub.LinksPublished, hub.LinksUnpublished, hub.LabelsChanged, hub.ResourceChanged,
			hub.CommandBound, hub.CommandLate:
		}
	}
}

// offer brings a stored command to the device's session, if it has one here.
func (w *worker) offer(dev hub.DeviceID, id string) {
	e := w.devices[dev]
	if e == nil || e.state == nil {
		return
	}
	to := w.reach(e.state)
	switch c := e.state.command(id); {
	case to == nil, c == nil: // away, or ended in the same breath
	case c.Session == 0:
		to.Wake()
	case c.Session == e.state.session:
		to.Deliver(*c)
	}
}
