package simulation

import (
	"time"
)

// stillFor is how long a process stands still at most.
const stillFor = 30 * time.Second

// misfortunes has things go wrong until it is enough.
func (w *world) misfortunes() {
	c := newChance(w.seed, ofMisfortunes)
	for !w.calm() {
		select {
		case <-time.After(c.between(500*time.Millisecond, 8*time.Second)):
		case <-w.heal:
			return
		}
		s := w.slots[c.pick(len(w.slots))]
		p := s.process()
		lasts := c.between(100*time.Millisecond, 15*time.Second)
		n := c.pick(10)
		if n < 3 && !s.leave() {
			continue // it is not back yet
		}
		switch n {
		case 0, 1: // it crashes, and is started again
			w.tell("%s crashes for %v", p.name, lasts/2)
			p.crash()
			w.undo.Go(func() {
				w.wait(lasts / 2)
				s.start(w)
			})
		case 2:
			w.tell("%s is stopped", p.name)
			p.term()
			w.undo.Go(func() {
				<-p.done
				w.wait(lasts / 4)
				s.start(w)
			})
		case 3, 4:
			if c.one(2) {
				lasts = stillFor
			}
			w.tell("%s stands still for %v", p.name, lasts)
			p.pause()
			w.undo.Go(func() {
				w.wait(lasts)
				w.tell("%s goes on", p.name)
				p.resume()
			})
		case 5, 6: // it and a service do not hear each other, or one does not hear the other
			x := p.paths()[c.pick(len(p.paths()))]
			way := c.pick(3)
			up, down := [...]int{1, 1, 0}[way], [...]int{1, 0, 1}[way]
			w.tell("%s is cut off from %s for %v: up %d, down %d", p.name, x.what(p), lasts, up, down)
			x.hold(up, down)
			cuts := c.one(2)
			w.undo.Go(func() {
				w.wait(lasts)
				if cuts {
					x.cut()
				}
				x.hold(-up, -down)
			})
		case 7: // slow, with connections that break
			x := p.paths()[c.pick(len(p.paths()))]
			w.tell("%s and %s are slow for %v", p.name, x.what(p), lasts)
			x.slowed(c.between(10*time.Millisecond, 3*time.Second))
			w.undo.Go(func() {
				w.wait(lasts)
				x.slowed(0)
			})
		case 8: // answers of the database get lost
			p = w.slots[c.pick(2)].process()
			w.tell("%s loses connections to the database for %v", p.name, lasts)
			c := newChance(c.r.Uint64(), ofMisfortunes)
			w.undo.Go(func() {
				for until := time.Now().Add(lasts); time.Now().Before(until) && !w.calm(); {
					w.wait(c.between(10*time.Millisecond, time.Second))
					p.database.cut()
				}
			})
		case 9: // messages get lost or come twice, and the feed has its troubles
			w.tell("bad weather for %v", lasts)
			w.storm(true)
			w.undo.Go(func() {
				w.wait(lasts)
				w.storm(false)
			})
		}
	}
}

// wait waits, until it is to be over at the latest.
func (w *world) wait(d time.Duration) {
	select {
	case <-time.After(d):
	case <-w.heal:
	}
}

func (w *world) storm(on bool) {
	w.smu.Lock()
	w.weather = on
	w.smu.Unlock()
	w.feed.mu.Lock()
	defer w.feed.mu.Unlock()
	w.feed.trouble = 0
	if on {
		w.feed.trouble = 4
	}
}

func (p *path) what(of *process) string {
	if p == of.database {
		return "the database"
	}
	return "NATS"
}
