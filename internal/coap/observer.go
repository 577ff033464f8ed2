package coap

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Observer is the peer's entry in our list of observers: its interest in one resource of ours (RFC 7641, Section 4.1). It ends
// by Cancel, by an error notification, with its connection, when the same token registers again, and over UDP when the peer
// rejects a notification or does not acknowledge it.
//
// Over UDP every notification is confirmable: so none overtakes another, a peer that is gone is noticed, and congestion
// control is that of all confirmable messages. While one is under way only the newest of the others is kept (RFC 7641, Section
// 4.5.2). An observer that was told nothing for almost 24 h is told the state once more, so that one that went away does not
// stay in the list (Section 4.5).
type Observer struct {
	c     *Conn
	req   *Message
	from  *Message // the request as the handler has it
	state func() Response
	ended func()

	// Guarded by Conn.mu.
	told    time.Duration // when the last notification, or the registration, was
	number  uint32
	over    bool
	busy    bool      // a notification is under way, or the answer that registers
	ending  bool      // an error is to be told, and nothing after it
	waiting *Response // the newest one behind it
}

// AddObserver enters the peer, whose request with Observe 0 the handler is answering, into the list of observers. The answer
// must be a 2.xx with Observer.Number as its Observe option, or the entry is to be cancelled. What it is notified of before
// that answer is on its way waits for it, so that the answer is not taken for newer. state says how the resource is, whenever
// the observer is to be told although nothing changed, and may be Silent; it must not wait for the peer. ended, if not nil, is
// called once when the entry is over for another reason than Cancel and the connection's end; it must not block. The error is
// of kind Exhausted when there are Config.MaxObservations.
func (c *Conn) AddObserver(req *Message, state func() Response, ended func()) (*Observer, error) {
	const op = "coap.AddObserver"
	o := &Observer{c: c, req: clone(req), from: req, state: state, ended: ended, told: c.srv.now(), busy: true}
	o.req.Token, o.req.Payload = req.Token, nil
	c.mu.Lock()
	o.number = c.lastNumber + 1
	old := c.observers[string(req.Token)]
	if old == nil && len(c.observers) >= c.srv.cfg.MaxObservations {
		c.mu.Unlock()
		return nil, errObservation.With(op, nil)
	}
	if c.observers == nil {
		c.observers = make(map[string]*Observer)
	}
	c.observers[string(req.Token)] = o
	if old != nil {
		// RFC 7641, Section 4.1: the same endpoint and token is the same entry, renewed. Its numbers go on.
		old.over, old.waiting = true, nil
		o.number = old.number + 1
	}
	c.mu.Unlock()
	if c.dg != nil {
		c.dg.mu.Lock()
		c.dg.schedule(o.told + confirmEvery)
		c.dg.mu.Unlock()
	}
	if old != nil && old.ended != nil {
		old.ended()
	}
	return o, nil
}

// confirmEvery is how long an observer over UDP may be told nothing: less than the 24 h of RFC 7641, Section 4.5 by what the
// message layer may take.
const confirmEvery = 24*time.Hour - 10*time.Minute

// remind has those told once more who were told nothing for too long, and returns when it is to look again, zero for never.
func (c *Conn) remind(now time.Duration) (next time.Duration) {
	var due []*Observer
	c.mu.Lock()
	for _, o := range c.observers {
		if now-o.told >= confirmEvery {
			o.told = now // also if there is no room for it now: then it is for the next day
			due = append(due, o)
		}
		if at := o.told + confirmEvery; next == 0 || at < next {
			next = at
		}
	}
	c.mu.Unlock()
	for _, o := range due {
		if c.reserve(messageCost) {
			c.push(item{observer: o, size: messageCost})
		}
	}
	return next
}

// tell sends the observer the state as it is now.
func (o *Observer) tell() {
	r := o.c.guarded(func(context.Context) Response { return o.state() })
	if r.Silent {
		return
	}
	if err := o.Notify(o.c.ctx, r); err != nil {
		o.c.srv.metrics.dropped.WithLabelValues("unsent").Inc()
	}
}

// Observer returns the peer's entry with the token of req, which has Observe 1, nil if there is none; the handler cancels it
// (RFC 7641, Section 3.6).
func (c *Conn) Observer(req *Message) *Observer {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.observers[string(req.Token)]
}

// Number is the value for the Observe option of the answer that registers.
func (o *Observer) Number() uint32 {
	o.c.mu.Lock()
	defer o.c.mu.Unlock()
	return o.number & 0xffffff
}

// Cancel ends the entry; what is under way may still arrive, what waits for it is dropped. Cancelling again does nothing.
func (o *Observer) Cancel() { o.finish() }

// finish takes the entry out of the list and reports whether it was there.
func (o *Observer) finish() bool {
	o.c.mu.Lock()
	defer o.c.mu.Unlock()
	if o.over {
		return false
	}
	o.over, o.waiting = true, nil
	o.c.lastNumber = max(o.c.lastNumber, o.number)
	if o.c.observers[string(o.req.Token)] == o {
		delete(o.c.observers, string(o.req.Token))
	}
	return true
}

// Notify tells the observer of a new state; r needs no Observe option, and its Content-Format must be that of the answer that
// registered (RFC 7641, Section 4.2). Over a stream it waits for room until ctx ends; over UDP it never waits, and a state
// that is overtaken by a newer one may never be sent. An error code ends the entry when its turn comes, and nothing overtakes it
// (RFC 7641, Section 4.2); Cancel would take it back. Errors are of kind Unavailable (the entry or the connection is over or
// about to be, or there is no room) and Deadline.
func (o *Observer) Notify(ctx context.Context, r Response) error {
	const op = "coap.Notify"
	c := o.c
	c.mu.Lock()
	switch {
	case o.over || o.ending || c.reason != nil:
		c.mu.Unlock()
		return errGone.With(op, nil)
	case o.busy:
		o.waiting, o.ending = &r, r.ends()
		c.mu.Unlock()
		return nil
	}
	o.busy, o.ending = c.dg != nil, r.ends()
	number := o.next()
	c.mu.Unlock()
	err := o.say(ctx, r, number)
	if err == nil {
		return nil
	}
	c.mu.Lock()
	o.ending = o.waiting != nil && o.waiting.ends() // r was not told
	c.mu.Unlock()
	o.settled(nil) // what came meanwhile is newer, and its turn
	switch {
	case ctx.Err() != nil:
		return contextError(ctx, op)
	case errors.Is(err, net.ErrClosed):
		return errGone.With(op, err)
	}
	return &hub.Error{Kind: hub.Unavailable, Op: op, Err: err}
}

// next returns the number of the next notification, which is about to go; Conn.mu is held.
func (o *Observer) next() uint32 {
	o.number++
	o.told = o.c.srv.now()
	return o.number
}

// ends reports whether r, as a notification, ends the observation (RFC 7641, Section 4.2).
func (r *Response) ends() bool { return r.Code>>5 != 2 }

// say sends a notification, and ends the entry with one that says so.
func (o *Observer) say(ctx context.Context, r Response, number uint32) error {
	err := o.send(ctx, r, number)
	if err == nil && r.ends() {
		o.finish()
	}
	return err
}

// send sends one notification, or its first block; the peer fetches the others (RFC 7959, Section 3.4).
func (o *Observer) send(ctx context.Context, r Response, number uint32) error {
	c := o.c
	out := &Message{Code: r.Code, Token: o.req.Token, Options: sortOptions(r.Options), Payload: r.Payload}
	if r.Code>>5 == 2 {
		out.Options = AddUint(append(out.Options[:0:0], out.Options...), ObserveOption, number&0xffffff)
	}
	largest, bert := c.tr.limits()
	b, asked, _ := blockOf(o.req, Block2)
	b.num = 0
	if c.tr.size(out) > largest || asked && r.Code>>5 == 2 && len(r.Payload) > b.size() {
		c.slice(o.req, out, b, asked, largest, bert)
	}
	if c.dg == nil {
		return c.tr.send(ctx, out, true)
	}
	return c.dg.notify(out, func(err error) { o.settled(err) })
}

// registering returns what is to be told how the peer took m where m goes in a confirmable message of its own: nil unless it is
// the answer that registers an observer. That is a notification, too (RFC 7641, Section 4.2), so a RST of it, or silence, ends
// the entry.
func (c *Conn) registering(m *Message) func(error) {
	if _, observed := m.Option(ObserveOption); !observed || m.from == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.observers[string(m.Token)]
	if o == nil || o.from.from != m.from {
		return nil
	}
	return func(err error) {
		if err != nil { // the ACK says nothing new: whatever is told meanwhile waits for it by NSTART
			o.settled(err)
		}
	}
}

// registered says that the answer to m, which may have entered an observer, is on its way.
func (c *Conn) registered(m *Message) {
	c.mu.Lock()
	o := c.observers[string(m.Token)]
	c.mu.Unlock()
	if o != nil && o.from == m {
		o.settled(nil)
	}
}

// settled is told how the notification that was under way ended.
func (o *Observer) settled(err error) {
	c := o.c
	if err != nil {
		// RFC 7641, Sections 4.5 and 3.6: rejected, or never acknowledged: the peer is not interested any more.
		if o.finish() && o.ended != nil {
			o.ended()
		}
		return
	}
	for {
		c.mu.Lock()
		next := o.waiting
		o.waiting = nil
		if next == nil {
			o.busy = false
			c.mu.Unlock()
			return
		}
		number := o.next() // still busy: what is told while this one goes is newer
		c.mu.Unlock()
		if err := o.say(c.ctx, *next, number); err != nil {
			c.srv.metrics.dropped.WithLabelValues("unsent").Inc()
			if next.ends() {
				o.finish()
			}
		} else if c.dg != nil {
			return // until it is acknowledged
		}
	}
}

// notify sends a notification in a confirmable message; settled is told nil when it is acknowledged.
func (d *datagram) notify(m *Message, settled func(error)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.finished {
		return net.ErrClosed
	}
	d.c.messagesOut.Add(1)
	d.c.srv.metrics.out[kindOf(m.Code)].Inc()
	return d.confirm(m, settled)
}
