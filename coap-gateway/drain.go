package coapgateway

import (
	"context"
	"sync"
	"time"
)

// comeBackTime is how long a device that a draining gateway sent elsewhere has to come back before this one records it offline. A
// gateway that ends earlier leaves that to the directories, who take its sessions for ended some seconds after it has left.
const comeBackTime = 5 * time.Second

// Drain hands the devices over to other gateways, of which there must be some: nobody new is let in, commands under way end, and devices
// are told to go, in turns spread over coapGateway.drain.spread. A device that went is not recorded offline before it had the time to
// come back elsewhere. It returns when all have gone, or ctx ends. Run goes on until its own context ends; it is called once, meanwhile.
func (g *Gateway) Drain(ctx context.Context) {
	begun := time.Now()
	g.log.Info("devices are sent to other gateways", "sessions", g.live.count(), "spread", g.cfg.Drain.Spread)
	g.absences.begin()
	g.engine.Drain(ctx, g.cfg.Drain.Spread, g.cfg.Drain.Commands)
	g.log.Info("devices have been sent to other gateways", "took", time.Since(begun))
}

// absences are the sessions that ended while the gateway drains, and of whose devices it is not known whether they are back elsewhere:
// no more than it had. The directory tells of those that are, by closing the session.
type absences struct {
	writes sync.WaitGroup

	mu       sync.Mutex // guards all below
	draining bool
	waiting  map[*deliverer]*time.Timer
}

func (a *absences) begin() {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.draining, a.waiting = true, map[*deliverer]*time.Timer{}
}

// add has the end of a session wait for its device to come back, and record called if it does not. It returns false if the end is to be
// recorded at once. Of a device that is back already there is nothing to record, and the directories have enough to do with the others.
func (a *absences) add(s *session, record func()) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case !a.draining || s.apart:
		return false
	case s.to.succeeded.Load():
		return true
	}
	a.waiting[s.to] = time.AfterFunc(comeBackTime, func() {
		if a.take(s.to) {
			defer a.writes.Done()
			record()
		}
	})
	return true
}

// take makes the end of a session that waits the caller's to record, in writes.
func (a *absences) take(to *deliverer) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.waiting[to] == nil {
		return false
	}
	delete(a.waiting, to)
	a.writes.Add(1)
	return true
}

// back says that the device of a session has another one.
func (a *absences) back(to *deliverer) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if t := a.waiting[to]; t != nil {
		t.Stop()
		delete(a.waiting, to)
	}
}

// end leaves those that still wait to the directories. There are no sessions any more.
func (a *absences) end() {
	a.mu.Lock()
	for to, t := range a.waiting {
		t.Stop()
		delete(a.waiting, to)
	}
	a.mu.Unlock()
	a.writes.Wait()
}

// Leave implements coap.Leaver: what the device has been sent is waited for, and what is not sent yet waits for its next session.
func (p *peer) Leave(gone func()) {
	if s := p.listening.Load(); s != nil {
		s.to.box.leave(gone)
		return
	}
	gone()
}
