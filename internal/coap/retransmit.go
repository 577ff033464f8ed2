package coap

import (
	"errors"
	mathrand "math/rand/v2"
	"net"
	"slices"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// transmission is a confirmable message of ours that the peer has not settled (RFC 7252, Section 4.2).
type transmission struct {
	id           uint16
	request      bool
	notification bool // of an observer, which has one at a time
	started      bool
	held         bool   // waits for the proof of the address
	stale        bool   // was sent to another address than the peer has now, and not since
	token        string // of a request: whose exchange fails with it
	b            []byte
	tries        int           // how often it was sent
	wait         time.Duration // after the last time
	due          time.Duration
	settled      func(error) // told of the ACK, by nil, or of a RST or silence; may be nil
}

// maxBacklog bounds the confirmable messages of one session that wait for their turn, but for the notifications: of those
// there is one for each observer, so none is lost for want of room.
const maxBacklog = 64

// What a confirmable message may come back with.
var (
	errNoReaction = &transmissionError{"the peer did not acknowledge it"}
	errReset      = &transmissionError{"the peer rejected it by a reset"}
)

type transmissionError struct{ text string }

func (e *transmissionError) Error() string { return e.text }

// confirm sends m in a confirmable message; mu is held. Requests are known by their token. settled, if not nil, is told
// how it ended, without a lock.
func (d *datagram) confirm(m *Message, settled func(error)) error {
	t := &transmission{request: m.Code>>5 == 0, notification: m.from == nil && m.Code>>5 != 0, settled: settled}
	if t.request {
		t.token = string(m.Token)
		d.c.messagesOut.Add(1)
		d.c.srv.metrics.out[kindRequest].Inc()
	}
	return d.transmit(t, m)
}

// transmit queues t, whose content is m, and starts it if its turn has come; mu is held.
func (d *datagram) transmit(t *transmission, m *Message) error {
	if d.closed {
		return net.ErrClosed
	}
	if t.notification && d.notifying >= d.c.srv.cfg.MaxObservations || !t.notification && len(d.sent)-d.notifying >= maxBacklog {
		return errQueueFull
	}
	id, ok := d.messageID()
	if !ok {
		return errQueueFull
	}
	t.id = id
	t.b = appendPacket(nil, confirmable, id, m)
	d.sent = append(d.sent, t)
	if t.notification {
		d.notifying++
	}
	d.advance(d.c.srv.now())
	return nil
}

// advance starts what may start: at most NSTART messages are under way (RFC 7252, Section 4.7).
func (d *datagram) advance(now time.Duration) {
	most := int(d.nstart.Load())
	for _, t := range d.sent {
		if d.inFlight >= most {
			return
		}
		if t.started {
			continue
		}
		t.started = true
		d.inFlight++
		t.due = now
		if t.request && d.unheard > d.c.srv.cfg.MaxRetransmit {
			// RFC 7252, Section 4.7: a peer that does not answer gets PROBING_RATE bytes a second, on average.
			pause := time.Duration(float64(d.unheardSize) / d.c.srv.cfg.ProbingRate * float64(time.Second))
			t.due = max(now, d.silentSince+pause)
		}
		if t.due > now {
			d.schedule(t.due)
			continue
		}
		d.fire(t, now)
	}
}

// fire sends t once more; mu is held.
func (d *datagram) fire(t *transmission, now time.Duration) {
	cfg := &d.c.srv.cfg
	if !d.put(t.b) && t != d.probing { // a ping for which there are no bytes left is as good as lost
		t.held = true
		t.due = now + cfg.AckTimeout
		d.schedule(t.due)
		d.probe()
		return
	}
	t.held, t.stale = false, false
	if t.tries++; t.tries == 1 {
		// RFC 7252, Section 4.2: a random time between ACK_TIMEOUT and ACK_TIMEOUT * ACK_RANDOM_FACTOR, doubled each time.
		t.wait = cfg.AckTimeout + time.Duration(mathrand.Float64()*(cfg.AckRandomFactor-1)*float64(cfg.AckTimeout)) //nolint:gosec // no secret
	} else {
		t.wait *= 2
		d.congested()
		d.c.srv.metrics.retransmitted.Inc()
	}
	t.due = now + t.wait
	d.schedule(t.due)
	if d.unheard == 0 {
		d.silentSince = now
	}
	d.unheard++
	d.unheardSize += len(t.b)
}

// retransmit sends what is due again and returns what has been sent often enough; mu is held.
func (d *datagram) retransmit(now time.Duration) (failed []*transmission) {
	for _, t := range slices.Clone(d.sent) {
		switch {
		case !t.started:
		case t.due > now:
			d.schedule(t.due)
		case t.held:
			// The address is not proven: once the ping has failed, so has what waits for it.
			if d.probing != nil {
				t.due = now + d.c.srv.cfg.AckTimeout
				d.schedule(t.due)
				continue
			}
			failed = append(failed, t)
			d.remove(t)
		case t.tries > d.c.srv.cfg.MaxRetransmit:
			d.c.srv.metrics.unacknowledged.Inc()
			failed = append(failed, t)
			d.remove(t)
		default:
			d.fire(t, now)
		}
	}
	if len(failed) > 0 {
		d.advance(now)
	}
	return failed
}

// remove takes t out of the books; mu is held.
func (d *datagram) remove(t *transmission) {
	i := slices.Index(d.sent, t)
	if i < 0 {
		return
	}
	d.sent = slices.Delete(d.sent, i, i+1)
	if t.notification {
		d.notifying--
	}
	if t.started && t != d.probing {
		d.inFlight--
	}
	if t == d.probing {
		d.probing = nil
		for _, r := range d.held { // duplicates of the requests ask for the answers, and for the proof, again
			r.held = false
			r.spend()
		}
		d.held = nil
	}
	if len(d.sent) == 0 {
		d.sent = nil
	}
}

// settle finds the message of ours that p acknowledges or rejects; mu is held. A response in an ACK must be for the request
// that the ACK is for (RFC 7252, Section 5.3.2); what is in one for another message of ours says nothing (Section 5.2.2).
func (d *datagram) settle(p packet) *transmission {
	for _, t := range d.sent {
		if t.id != p.id || t.tries == 0 {
			continue
		}
		if p.code != codes.Empty && t.request && t.token != string(p.body[:p.tkl]) {
			return nil
		}
		if t == d.probing {
			d.prove()
		}
		if !t.stale {
			d.moved = false
		}
		now := d.c.srv.now()
		if t.tries == 1 { // of a copy nobody knows which one was answered (Karn)
			d.c.pingTime.Store(int64(now - (t.due - t.wait)))
			d.proved(t)
		}
		d.remove(t)
		d.advance(now)
		return t
	}
	return nil
}

// answered settles the request with that token: its response says more than the ACK that may have been lost (RFC 7252,
// Section 5.2.2). mu is held.
func (d *datagram) answered(token []byte, now time.Duration) {
	for _, t := range d.sent {
		if t.request && t.tries > 0 && t.token == string(token) {
			if !t.stale {
				d.moved = false
			}
			if t.tries == 1 {
				d.proved(t)
			}
			d.remove(t)
			break
		}
	}
	d.heard(now)
	d.advance(now)
}

// proved notes that t was settled at the first try. A peer that answered four times as many requests so as it may have
// at once may have one more, up to Config.MaxProven: RFC 7252, Section 4.7 wants more than one only where something tells of
// congestion, and here the first retransmission does. mu is held.
func (d *datagram) proved(t *transmission) {
	if !t.request {
		return
	}
	now := int(d.nstart.Load())
	if d.clean++; now >= d.c.srv.cfg.MaxProven || d.clean < 4*now {
		return
	}
	d.nstart.Store(int32(now + 1)) //nolint:gosec // small
	d.clean = 0
}

// congested begins anew: something was lost, or the peer has too much to do. mu is held.
func (d *datagram) congested() {
	d.clean = 0
	d.c.able.Store(false)
	d.nstart.Store(int32(max(1, d.c.srv.cfg.MaxOutstanding))) //nolint:gosec // small
}

// abandon stops a request that nobody waits for any more.
func (d *datagram) abandon(token []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, t := range d.sent {
		if t.request && t.token == string(token) {
			d.remove(t)
			d.advance(d.c.srv.now())
			return
		}
	}
}

// heard notes that the peer answers: what came could only be sent by somebody who has read what we sent. mu is held.
func (d *datagram) heard(now time.Duration) {
	d.c.lastIn.Store(int64(now))
	d.unheard, d.unheardSize = 0, 0
	if !d.moved {
		d.prove()
	}
	for _, t := range d.sent {
		if t.started && t.tries == 0 && !t.held { // it waited because of the silence
			d.fire(t, now)
		}
	}
}

// prove notes that the address is the peer's own, and lets out what has waited for that; mu is held.
func (d *datagram) prove() {
	if d.proven {
		return
	}
	d.proven, d.moved = true, false
	if d.confirmed != nil {
		d.confirmed()
	}
	held := d.held
	d.held = nil
	for _, r := range held {
		r.held = false
		if r.reply != nil {
			d.write(r.reply)
		}
		r.spend()
	}
	now := d.c.srv.now()
	for _, t := range slices.Clone(d.sent) {
		if t.held {
			d.fire(t, now)
		}
	}
	if t := d.probing; t != nil {
		d.remove(t)
	}
}

// probe asks the address for a sign of life, so that it gets more than three times what it sent (RFC 9175 has Echo for it,
// which devices of OCF do not know); mu is held.
func (d *datagram) probe() {
	if d.probing != nil || d.proven {
		return
	}
	id, ok := d.messageID()
	if !ok {
		return
	}
	t := &transmission{id: id, started: true, b: emptyPacket(confirmable, id)}
	d.probing = t
	d.sent = append(d.sent, t)
	d.fire(t, d.c.srv.now())
}

// ping asks for a sign of life: a RST (RFC 7252, Section 4.3).
func (d *datagram) ping() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := d.transmit(&transmission{}, &Message{}); errors.Is(err, errQueueFull) {
		d.c.srv.metrics.dropped.WithLabelValues("ping").Inc()
	}
}

// fail tells whoever waits for t; no lock is held.
func (t *transmission) fail(d *datagram, err error) {
	if t.request {
		d.c.failed(t.token, err)
	}
	if t.settled != nil {
		t.settled(err)
	}
}

// messageID returns the next message ID. One must not be used again within EXCHANGE_LIFETIME (RFC 7252, Section 4.4); false
// when that would happen. mu is held.
func (d *datagram) messageID() (uint16, bool) {
	now := d.c.srv.now()
	next := d.nextID + 1
	if q := next >> 14; q != d.nextID>>14 {
		if used := d.usedIDs[q]; used != 0 && now-used < d.c.srv.cfg.exchangeLifetime() {
			return 0, false
		}
	}
	d.nextID = next
	d.usedIDs[next>>14] = now
	return next, true
}
