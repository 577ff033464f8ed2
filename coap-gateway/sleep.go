package coapgateway

import (
	"context"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// How a device over UDP or DTLS is taken for one that sleeps. No protocol it speaks has a word for it (LwM2M has its queue
// mode, OCF nothing), so the hub goes by what it sees: requests that find nobody, and messages after a long silence.
const (
	// asleepAfter requests in a row without a sign of life, the device is taken to sleep, or to be cut off, which is the same
	// from here: what else is for it waits for its next message.
	asleepAfter = 2
	// sleeperAfter such silences that the device itself ended, it is known to sleep. Then it is not even tried before
	// it is late, and the directory knows when it is expected.
	sleeperAfter = 2
	// nap is the shortest silence that counts as sleep: longer than a confirmable message is on its way (MAX_TRANSMIT_WAIT, 93
	// s, RFC 7252, Section 4.8.2).
	nap = 2 * time.Minute
	// wakeful is how long a device must go on talking to be known for one that does not sleep after all.
	wakeful = 15 * time.Minute
	// openFor is how long a device that sleeps is taken to listen after its last message, until it turns out to be less:
	// MAX_TRANSMIT_WAIT, which LwM2M 1.1, Section 6.5 recommends to devices; never less than openAtLeast.
	openFor     = 93 * time.Second
	openAtLeast = 5 * time.Second
	// noReaction is how long a device must say nothing to a request to be found away: one or two retransmissions had their time
	// (RFC 7252, Section 4.8: the first is due after 3 s at most). Commands may have less time than that.
	noReaction = 5 * time.Second
	// tellAtMost is how often a device's rhythm is recorded, each time an event: devices that sleep for shorter than that are
	// expected later in the directory than here.
	tellAtMost = 10 * time.Minute
)

// rhythm is what a session knows of when its device listens.
type rhythm struct {
	stream bool // TCP, TLS: it always listens, its connection proves it

	mu         sync.Mutex // guards all below; the last in the order of locks
	heard      time.Time  // when the device said something last
	woke       time.Time  // when it did for the first time after a silence
	unanswered int        // requests in a row after which it said nothing
	gaveUp     time.Time  // on the last of them
	open       time.Duration
	naps       int              // silences in which requests found nobody
	intervals  [3]time.Duration // between the last times it woke; zero: not known yet
	interval   time.Duration    // the longest of those; zero for a device that is not known to sleep
	untold     bool             // the directory does not know the above
	told       time.Time        // when it was told last
}

// newRhythm begins a session, whose device has just said something; before is what was known of it.
func newRhythm(stream bool, before hub.Contact, now time.Time) *rhythm {
	r := &rhythm{stream: stream, heard: now, woke: now, open: openFor, interval: before.Interval, untold: before.Interval > 0}
	if stream {
		r.interval = 0
		return r
	}
	r.intervals[0] = before.Interval
	if woke := time.Unix(0, before.Next).Add(-before.Interval); r.interval > 0 && now.Sub(woke) >= nap {
		r.slept(now.Sub(woke)) // it signs in each time it wakes
	}
	return r
}

// slept notes an interval; r.mu is held.
func (r *rhythm) slept(interval time.Duration) {
	copy(r.intervals[1:], r.intervals[:])
	r.intervals[0] = interval
	r.interval = max(r.intervals[0], r.intervals[1], r.intervals[2])
}

// hear notes that the device said something after so long a silence. begin says that there may be work now: it was not in
// reach before, or the directory is to be told; rested that it may have slept.
func (r *rhythm) hear(silence time.Duration, now time.Time) (begin, rested bool) {
	if r.stream {
		return false, false
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	listened, _ := r.reach(now)
	listened = listened && r.unanswered < asleepAfter // not because a trial is due
	r.heard = now
	switch rested = silence >= nap; {
	case rested:
		if r.unanswered >= asleepAfter {
			r.naps++
		}
		known := r.interval > 0
		r.slept(now.Sub(r.woke))
		r.woke = now
		switch {
		case !known && r.naps < sleeperAfter:
			r.interval = 0
		case !known || now.Sub(r.told) >= tellAtMost:
			r.untold = true
		}
	case now.Sub(r.woke) >= wakeful:
		r.listens()
	}
	r.unanswered = 0
	return !listened || rested || r.untold, rested
}

// question is a request to the device that is under way.
type question struct {
	sent    time.Time
	silence time.Duration // before it
}

func (r *rhythm) ask(now time.Time) question {
	r.mu.Lock()
	defer r.mu.Unlock()
	return question{now, now.Sub(r.heard)}
}

// missed notes that a request was given up.
func (r *rhythm) missed(q question, now time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stream || r.heard.After(q.sent) {
		return
	}
	r.unanswered++
	r.gaveUp = now
	r.open = max(openAtLeast, min(r.open, q.silence))
}

// answered notes that a request was answered: after a long silence that is what a device does that does not sleep.
func (r *rhythm) answered(q question) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.stream && q.silence >= nap {
		r.listens()
	}
}

// listens notes that the device does not sleep; r.mu is held.
func (r *rhythm) listens() {
	r.untold = r.untold || r.interval > 0
	r.interval, r.naps, r.open = 0, 0, openFor
	r.intervals = [3]time.Duration{}
}

// inReach reports whether the device is taken to listen. If not, again is when to try it nevertheless; the zero time is its
// next message.
func (r *rhythm) inReach(now time.Time) (ok bool, again time.Time) {
	if r.stream {
		return true, time.Time{}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reach(now)
}

// reach is inReach; r.mu is held.
func (r *rhythm) reach(now time.Time) (ok bool, again time.Time) {
	switch {
	case r.interval > 0 && r.unanswered > 0:
		return r.unanswered < asleepAfter && now.Sub(r.heard) <= r.open, time.Time{}
	case r.interval > 0:
		// One that is late is tried once: if it answers, it does not sleep, and only had nothing to say.
		again = r.woke.Add(r.interval + max(r.interval/4, time.Minute))
		return now.Sub(r.heard) <= r.open || !now.Before(again), again
	case r.unanswered < asleepAfter:
		return true, time.Time{}
	}
	again = r.gaveUp.Add(askAgain[min(r.unanswered-asleepAfter, len(askAgain)-1)])
	return !now.Before(again), again
}

// awake reports whether the device is so likely to listen that it can be sent what would be lost otherwise: it has left nothing
// unanswered, and it is not the time at which it sleeps. What may be asked again is sent whenever it is inReach.
func (r *rhythm) awake(now time.Time) bool {
	if r.stream {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.unanswered == 0 && (r.interval == 0 || now.Sub(r.heard) <= r.open)
}

// heardSince reports whether the device said something since it was asked something else, so that it listens.
func (r *rhythm) heardSince(asked time.Time) bool {
	if r.stream {
		return true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	return !r.heard.Before(asked)
}

// sleeper reports whether the device is known to sleep.
func (r *rhythm) sleeper() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.interval > 0
}

// news returns what the directory does not know yet, once; false if it knows all.
func (r *rhythm) news(now time.Time) (hub.Contact, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.untold {
		return hub.Contact{}, false
	}
	r.untold, r.told = false, now
	if r.interval == 0 {
		return hub.Contact{}, true
	}
	return hub.Contact{Interval: r.interval, Next: r.woke.Add(r.interval).UnixNano()}, true
}

// Heard implements coap.Listener: what waits for the device goes out now, while it listens.
func (p *peer) Heard(silence time.Duration) {
	s := p.listening.Load()
	if s == nil {
		return
	}
	if begin, rested := s.rhythm.hear(silence, time.Now()); begin {
		s.twin.wake(rested)
		s.to.box.listens()
	} else {
		s.to.box.heard()
	}
}

// request has do send the device a request, which it has keepAlive.timeout to answer, and notes whether that found anybody.
// What waits for the device to listen is sent only while rhythm.inReach.
func (s *session) request(ctx context.Context, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, s.gw.cfg.API.CoAP.KeepAlive.Timeout)
	defer cancel()
	q := s.rhythm.ask(time.Now())
	err := do(ctx)
	switch {
	case s.ctx.Err() != nil:
	case err == nil:
		s.rhythm.answered(q)
	case missedBy(err) && time.Since(q.sent) >= min(noReaction, s.gw.cfg.API.CoAP.KeepAlive.Timeout):
		s.rhythm.missed(q, time.Now())
	}
	return err
}

// ask is a request with one answer.
func (s *session) ask(req *coap.Message) (*coap.Message, error) { return s.askFor(s.ctx, req) }

// askFor is ask with a context of the session's.
func (s *session) askFor(ctx context.Context, req *coap.Message) (m *coap.Message, err error) {
	err = s.request(ctx, func(ctx context.Context) (err error) {
		m, err = s.conn.Do(ctx, req)
		return err
	})
	return m, err
}

// observe is a request that asks to be told of changes, too; no observation if the device does not take it on.
func (s *session) observe(req *coap.Message) (o *coap.Observation, m *coap.Message, err error) {
	err = s.request(s.ctx, func(ctx context.Context) (err error) {
		o, m, err = s.conn.Observe(ctx, req)
		return err
	})
	return o, m, err
}

// missedBy reports that a request was given up for want of an answer.
func missedBy(err error) bool { return hub.IsKind(err, hub.Deadline) }

// wake goes on with what waited for the device. What did not answer because it slept is asked for at once.
func (t *twin) wake(rested bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if rested {
		t.askFor(t.missing, func(absent) bool { return true })
	}
	t.start()
}

// expect tells the directory when the device is expected.
func (t *twin) expect(c hub.Contact) error {
	s := t.s
	s.gw.devices.expect(s.own.Device, s.number, c)
	return s.write(s.ctx, func(ctx context.Context, from hub.Stamp) error {
		return s.records.SetContact(ctx, from, c)
	})
}
