package coap

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coaphub/coaphub/hub"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// exchange is a request of ours that has no answer yet.
type exchange struct {
	answer      chan answer  // capacity 1
	begun, sent uint64       // before and after it was given to the transport, as Conn.asked counts; sent is 0 before
	observation *Observation // to be registered when the answer has an Observe option
	cancel      bool         // notifications with the same token may still come first
	refresh     bool         // the answer is a notification, too
	block       uint32       // of a body in blocks: the number of the one that is sent
	again       bool         // asked once more, with the Echo value that the peer wanted

	// Of a refresh over UDP: its ACK came without the answer, and something came that is older by its number.
	acknowledged, outdated bool
}

type answer struct {
	msg   *Message
	fault fault
	err   error // there is no answer
}

// Observation is an entry in the peer's list of observers. It ends by Cancel, by a notification with Ended, or with its
// connection.
type Observation struct {
	c         *Conn
	path      string
	req       *Message // with Observe 0
	tag       atomic.Value
	cancelled atomic.Bool

	// Over UDP: the newest Observe value and when it came (RFC 7641, Section 3.4), the ETag of the newest representation, nil
	// for none, and when its Max-Age is over; guarded by Conn.mu.
	number uint32
	seen   time.Duration
	etag   []byte
	stale  time.Duration

	fetch  *fetch // the newest notification that came in blocks; guarded by Conn.mu
	listed bool   // is in Conn.fetches
}

// tagged lets atomic.Value hold tags of different types.
type tagged struct{ v any }

// Path returns the path that is observed, with a leading slash.
func (o *Observation) Path() string { return o.path }

// SetTag attaches a value of the handler's own.
func (o *Observation) SetTag(v any) { o.tag.Store(tagged{v}) }

// Tag returns what SetTag attached, nil before.
func (o *Observation) Tag() any {
	t, _ := o.tag.Load().(tagged)
	return t.v
}

// Do sends a request to the peer and returns its answer, whole even if one or the other went in blocks (RFC 7959). The
// token of req is ignored; the engine makes its own. req is not changed and may be shared. Error responses are answers, not
// errors. No more requests are under way than the peer takes (see Turn), further ones wait for ctx. Errors are of kind Deadline
// or Unavailable (ctx ended, connection gone), TooLarge (the peer's limit or ours), Exhausted (Config.MaxBuffered leaves no room
// for an answer in blocks), Invalid or BadOption (an answer that breaks the protocol).
//
// A handler may call it. If the peer fills its queue meanwhile, the answer is not read before the handler returns, and the
// connection may end with ErrOverload: handlers that wait long for their peer do that in a goroutine of their own.
func (c *Conn) Do(ctx context.Context, req *Message) (*Message, error) {
	t, err := c.Turn(ctx)
	if err != nil {
		return nil, err
	}
	defer t.End()
	return t.Do(ctx, req)
}

// Turn is the right to have one request under way. Whoever has it ends it.
type Turn struct {
	c   *Conn
	end sync.Once
}

// Turn waits until a request may be sent at once. Errors are Deadline or Unavailable (ctx ended, connection gone).
func (c *Conn) Turn(ctx context.Context) (*Turn, error) {
	if err := c.slot(ctx, "coap.Turn"); err != nil {
		return nil, err
	}
	return &Turn{c: c}, nil
}

// Beside gives a turn beside the one request that is under way to a peer over a stream that has not proved that it takes more
// than one (see Window): what it answers, and when, tells. Nil when nothing is under way, or already two; over UDP and DTLS,
// where RFC 7252, Section 4.7 sets the bound, nil unless a usual turn is free.
func (c *Conn) Beside() *Turn {
	c.mu.Lock()
	defer c.mu.Unlock()
	most := c.nstart()
	if c.dg == nil && !c.able.Load() {
		most++
	}
	if c.reason != nil || c.outstanding == 0 || c.outstanding >= most {
		return nil
	}
	c.outstanding++
	return &Turn{c: c}
}

// Free reports whether Turn would not wait.
func (c *Conn) Free() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason == nil && len(c.waiting) == 0 && c.outstanding < c.nstart()
}

// Window is how many requests the peer proved to take at once: Config.MaxOutstanding before it answered one while an earlier
// one was out. Then it is, over UDP and DTLS, what RFC 7252, Section 4.7 and the peer's retransmissions leave, of which the next
// begins anew; over a stream, which paces itself, Config.MaxProven.
func (c *Conn) Window() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.able.Load() {
		return max(1, c.srv.cfg.MaxOutstanding)
	}
	return c.nstart()
}

// End gives the turn back. A second time it does nothing.
func (t *Turn) End() { t.end.Do(t.c.release) }

// Do is Conn.Do in this turn, which goes on.
func (t *Turn) Do(ctx context.Context, req *Message) (*Message, error) {
	const op = "coap.Do"
	c := t.c
	m := clone(req)
	first, err := c.upload(ctx, op, m)
	if err != nil {
		return nil, err
	}
	whole, held, err := c.rest(ctx, op, m, first)
	c.srv.budget.give(held) // from now on it is the caller's
	return whole, err
}

// Observe registers for a resource (RFC 7641, Section 3.1): it sends req, a GET or FETCH, with Observe 0 and returns the
// first answer, an error code included. The observation is nil if the answer has no Observe option. Notifications may reach
// ConnHandler.Notifications before Observe returns; Observation.Path tells them apart even then. A notification with
// more than Config.MaxBody arrives as 4.13 without payload, one whose further blocks cannot be fetched as 5.04, as does a
// 2.03 for a representation that is not the newest known, all not ended; one with a critical option that is not understood as
// 4.02, ended. Errors are those of Do, and Exhausted when the connection has Config.MaxObservations.
func (c *Conn) Observe(ctx context.Context, req *Message) (*Observation, *Message, error) {
	const op = "coap.Observe"
	if err := c.slot(ctx, op); err != nil {
		return nil, nil, err
	}
	defer c.release()
	c.mu.Lock()
	full := len(c.observations) >= c.srv.cfg.MaxObservations
	c.mu.Unlock()
	if full {
		return nil, nil, errObservation.With(op, nil)
	}
	m := clone(req)
	m.Options = AddOption(without(m.Options, ObserveOption), ObserveOption, nil) // 0 is the empty value
	m.Token = c.token()
	o := &Observation{c: c, path: Path(m), req: m}
	first, err := c.roundTrip(ctx, op, m, &exchange{answer: make(chan answer, 1), observation: o})
	if err != nil {
		// The peer may have registered us all the same, and its answer may just have come. Whatever it answers to this is
		// dropped.
		c.forget(o)
		c.unwanted(m)
		return nil, nil, err
	}
	whole, held, err := c.rest(ctx, op, m, first)
	c.srv.budget.give(held) // from now on it is the caller's
	c.mu.Lock()
	registered := c.observations[string(m.Token)] == o || o.cancelled.Load()
	_, observed := first.Option(ObserveOption)
	c.mu.Unlock()
	switch {
	case err != nil:
		if registered {
			c.forget(o)
			c.unwanted(m)
		}
		return nil, nil, err
	case observed && first.Code>>5 == 2:
		return o, whole, nil // also if its last notification has come already: the handler saw Ended
	}
	return nil, whole, nil
}

// Stale returns when the Max-Age of what the peer said last is over: from then on nobody knows whether that still holds (RFC
// 7641, Section 3.3.1). Over a stream it is the zero time: there one Ping tells of all observations (RFC 8323, Section 7.3).
func (o *Observation) Stale() time.Time {
	c := o.c
	if c.dg == nil {
		return time.Time{}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.since.Add(o.stale - c.born)
}

// Refresh asks for the resource once more and renews the registration, by the request that began it, with its token (RFC 7641,
// Section 3.3.1) and with the ETag of the newest representation, so that the peer may say 2.03. What it answers comes to
// ConnHandler.Notifications, in order with all others and newer than those before: with Ended if it is an error or has no
// Observe option, and as 5.04 if it is separate and its number is older, as that of a notification would be that was
// overtaken. Errors are those of Do; the observation goes on. Refreshing one that is over does nothing.
func (o *Observation) Refresh(ctx context.Context) error {
	const op = "coap.Refresh"
	c := o.c
	if err := c.slot(ctx, op); err != nil {
		return err
	}
	defer c.release()
	m := clone(o.req)
	m.Token = o.req.Token
	c.mu.Lock()
	known := c.observations[string(m.Token)] == o
	if len(o.etag) > 0 {
		// All options are those of the registration but for the ETags.
		m.Options = AddOption(without(m.Options, ETagOption), ETagOption, o.etag)
	}
	c.mu.Unlock()
	if !known {
		return nil
	}
	_, err := c.roundTrip(ctx, op, m, &exchange{answer: make(chan answer, 1), refresh: true})
	return err
}

// doubt reports that the separate answer to x, the refresh of an observation, may have come with a number that is older than the
// newest: of a peer that has rebooted, or it was a notification that was overtaken on its way. The token is the same, so nobody
// can tell. Then what the resource is like is not known, and x is over. Conn.mu is held.
func (c *Conn) doubt(token string, x *exchange) bool {
	if !x.acknowledged || !x.outdated {
		return false
	}
	delete(c.exchanges, token)
	x.answer <- answer{msg: unknownState([]byte(token))}
	return true
}

// unknownState is the notification that says that there is something newer than what we know, and no more than that.
func unknownState(token []byte) *Message { return &Message{Code: codes.GatewayTimeout, Token: token} }

// awaited notes that the answer to a request comes in a message of its own (RFC 7252, Section 5.2.2).
func (c *Conn) awaited(token string) {
	room := c.reserve(messageCost)
	c.mu.Lock()
	x, o := c.exchanges[token], c.observations[token]
	told := false
	if x != nil && x.refresh && o != nil {
		x.acknowledged = true
		told = room && c.doubt(token, x) // without room it is over with its time
	}
	c.mu.Unlock()
	switch {
	case told:
		c.push(item{msg: unknownState([]byte(token)), observation: o, size: messageCost})
	case room:
		c.unreserve(messageCost)
	}
}

// Cancel ends the observation: no notifications are delivered from now on (one call of Notifications may be under way), and
// the peer is told by the request with Observe 1 and the token of the observation (RFC 7641, Section 3.6). Errors are those
// of Do; the observation is over in any case. Cancelling one that is over does nothing.
func (o *Observation) Cancel(ctx context.Context) error {
	const op = "coap.Cancel"
	c := o.c
	if !c.forget(o) {
		return nil
	}
	if err := c.slot(ctx, op); err != nil {
		c.unwanted(o.req) // it is worth a try without an answer
		return err
	}
	defer c.release()
	_, err := c.roundTrip(ctx, op, deregister(o.req), &exchange{answer: make(chan answer, 1), cancel: true})
	return err
}

// unwanted tells the peer that the observation that req began is not wanted, without waiting. Over UDP its next notification
// gets a RST, which says the same (RFC 7641, Section 3.6).
func (c *Conn) unwanted(req *Message) {
	if c.dg == nil {
		c.sendNow(deregister(req))
	}
}

// deregister makes the request that ends the observation that req began.
func deregister(req *Message) *Message {
	m := clone(req)
	m.Token = req.Token
	m.Options = AddUint(without(m.Options, ObserveOption), ObserveOption, 1)
	return m
}

// forget takes an observation out of the books and reports whether it was there.
func (c *Conn) forget(o *Observation) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	o.cancelled.Store(true)
	o.fetch = nil
	if c.observations[string(o.req.Token)] != o {
		return false
	}
	delete(c.observations, string(o.req.Token))
	return true
}

// clone copies a request so far that its options can be changed.
func clone(m *Message) *Message {
	return &Message{Code: m.Code, Options: append(make(message.Options, 0, len(m.Options)+4), sortOptions(m.Options)...), Payload: m.Payload}
}

// without removes options in place.
func without(opts message.Options, ids ...message.OptionID) message.Options {
	out := opts[:0]
next:
	for _, o := range opts {
		for _, id := range ids {
			if o.ID == id {
				continue next
			}
		}
		out = append(out, o)
	}
	return out
}

// slot waits for its turn among the outstanding requests, first come, first served.
func (c *Conn) slot(ctx context.Context, op string) error {
	c.mu.Lock()
	if c.parting() {
		c.mu.Unlock()
		return errGone.With(op, nil)
	}
	if len(c.waiting) == 0 && c.outstanding < c.nstart() {
		c.outstanding++
		c.mu.Unlock()
		return nil
	}
	turn := make(chan struct{})
	c.waiting = append(c.waiting, turn)
	c.mu.Unlock()
	var err error
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
		err = contextError(ctx, op)
	case <-c.ctx.Done():
		err = errGone.With(op, nil)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if i := slices.Index(c.waiting, turn); i >= 0 {
		c.waiting = slices.Delete(c.waiting, i, i+1)
	} else { // its turn has just come
		c.outstanding--
		c.admit()
	}
	return err
}

func (c *Conn) release() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.outstanding--
	c.admit()
}

// admit gives those their turn who may have it; mu is held.
func (c *Conn) admit() {
	for len(c.waiting) > 0 && c.outstanding < c.nstart() {
		c.outstanding++
		close(c.waiting[0])
		c.waiting = c.waiting[1:]
	}
	if len(c.waiting) == 0 {
		c.waiting = nil
	}
}

// nstart is how many requests to the peer may be under way.
func (c *Conn) nstart() int {
	most := max(1, c.srv.cfg.MaxOutstanding)
	switch {
	case c.dg != nil:
		return int(c.dg.nstart.Load())
	case c.able.Load():
		return max(most, c.srv.cfg.MaxProven)
	}
	return most
}

// overtook notes that the peer answered x while an earlier request waits: it takes more than one at a time. A peer that answers
// in order may do so as well, but nobody can tell. mu is held.
func (c *Conn) overtook(x *exchange) {
	if c.able.Load() {
		return
	}
	for _, y := range c.exchanges {
		if y.sent != 0 && y.sent < x.begun { // two that are sent at the same time may go in any order
			c.able.Store(true)
			c.admit()
			return
		}
	}
}

// token makes a token that none of our exchanges and observations has: a number that starts anywhere and is never repeated.
func (c *Conn) token() []byte {
	return binary.BigEndian.AppendUint64(nil, c.nextToken.Add(1))
}

// roundTrip sends one request and waits for its answer. The token must be set. A peer that wants to know first that we are
// who asks gets the request once more, with the value it gave (RFC 9175, Section 2.3).
func (c *Conn) roundTrip(ctx context.Context, op string, m *Message, x *exchange) (*Message, error) {
	answer, err := c.attempt(ctx, op, c.echoing(m, false), x)
	if err != nil || answer.Code != codes.Unauthorized {
		return answer, err
	}
	if _, asked := answer.Option(EchoOption); asked {
		x.again = true
		answer, err = c.attempt(ctx, op, c.echoing(m, true), x)
	}
	return answer, err
}

// echoing returns m with the peer's last Echo value if that goes with the next request: it need not, unless the peer has asked
// for it.
func (c *Conn) echoing(m *Message, asked bool) *Message {
	c.mu.Lock()
	v := c.echo
	c.echo = nil
	c.mu.Unlock()
	if v == nil {
		return m
	}
	with := *m
	with.Options = AddOption(append(make(message.Options, 0, len(m.Options)+1), m.Options...), EchoOption, v)
	if largest, _ := c.tr.limits(); !asked && c.tr.size(&with) > largest {
		return m
	}
	return &with
}

// attempt sends one request and waits for its answer.
func (c *Conn) attempt(ctx context.Context, op string, m *Message, x *exchange) (*Message, error) {
	if largest, _ := c.tr.limits(); c.tr.size(m) > largest {
		return nil, errPeerLimit.With(op, nil)
	}
	key := string(m.Token)
	c.mu.Lock()
	if c.parting() {
		c.mu.Unlock()
		return nil, errGone.With(op, nil)
	}
	if c.exchanges == nil {
		c.exchanges = make(map[string]*exchange)
	}
	c.asked++
	x.begun, x.sent, x.acknowledged, x.outdated = c.asked, 0, false, false
	c.exchanges[key] = x
	c.mu.Unlock()
	defer func() {
		c.mu.Lock()
		ours := c.exchanges[key] == x // else it was answered, or the token is that of another request by now
		if ours {
			delete(c.exchanges, key)
		}
		c.mu.Unlock()
		if ours && c.dg != nil {
			c.dg.abandon(m.Token)
		}
	}()
	if err := c.tr.send(ctx, m, true); err != nil {
		if ctx.Err() != nil {
			return nil, contextError(ctx, op)
		}
		return nil, errGone.With(op, err)
	}
	c.mu.Lock()
	c.asked++
	x.sent = c.asked
	c.mu.Unlock()
	select {
	case a := <-x.answer:
		if a.err != nil {
			return nil, transmissionFailed(op, a.err)
		}
		if a.fault.bad() { // RFC 7252, Section 5.4.1: a response with an unrecognised critical option is rejected
			return nil, errAnswerOpt.With(op, errors.New(a.fault.String()))
		}
		return a.msg, nil
	case <-ctx.Done():
		return nil, contextError(ctx, op)
	case <-c.ctx.Done():
		return nil, errGone.With(op, nil)
	}
}

// transmissionFailed gives the fate of a confirmable request the kind it has in the hub: silence is that of a request whose
// time is over.
func transmissionFailed(op string, err error) error {
	kind := hub.Unavailable
	if errors.Is(err, errNoReaction) {
		kind = hub.Deadline
	}
	return &hub.Error{Kind: kind, Op: op, Err: err}
}

// failed ends a request that will have no answer.
func (c *Conn) failed(token string, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if x := c.exchanges[token]; x != nil {
		delete(c.exchanges, token)
		x.answer <- answer{err: err}
	}
}

// verdict is what a response turned out to be.
type verdict uint8

const (
	isUnknown      verdict = iota // nobody waits for it
	isAnswer                      // somebody has it
	isStale                       // older than what we have, or wait for
	isTaken                       // of an observation: its blocks are fetched
	isNotification                // to be handled
	isWithheld                    // a notification for which there is no room
)

// response brings a response to whoever waits for it. A notification that is to be handled comes back as an item, if there is
// room for it. settles says that the message layer knows m for the answer to the newest request with its token.
func (c *Conn) response(m *Message, f fault, room, settles bool) (item, verdict) {
	_, observed := m.Option(ObserveOption)
	c.mu.Lock()
	defer c.mu.Unlock()
	x := c.exchanges[string(m.Token)]
	refreshed := x != nil && x.refresh
	if c.dg != nil && x != nil && !settles {
		// A late second answer to a block before: the blocks have one token, see upload.
		if b, ok, _ := blockOf(m, Block1); ok && b.num < x.block {
			c.srv.metrics.dropped.WithLabelValues("late").Inc()
			return item{}, isStale
		}
	}
	_, echo := m.Option(EchoOption)
	challenged := refreshed && echo && !x.again && m.Code == codes.Unauthorized // it is asked again, and that is answered
	if x != nil && (!refreshed || challenged) && !(x.cancel && observed) {
		delete(c.exchanges, string(m.Token))
		c.overtook(x)
		if x.observation != nil && observed && m.Code>>5 == 2 && !f.bad() {
			// Here and not in Observe: the next notification may be right behind.
			if c.observations == nil {
				c.observations = make(map[string]*Observation)
			}
			c.observations[string(m.Token)] = x.observation
		}
		if v, ok := m.Option(EchoOption); ok {
			c.echo = bytes.Clone(v)
		}
		if x.observation != nil && observed {
			x.observation.newer(m, c.srv.now())
			x.observation.learn(m, c.srv.now())
		}
		x.answer <- answer{msg: m, fault: f}
		return item{}, isAnswer
	}
	o := c.observations[string(m.Token)]
	if o == nil && refreshed { // it was cancelled meanwhile
		delete(c.exchanges, string(m.Token))
		x.answer <- answer{msg: m, fault: f}
		return item{}, isAnswer
	}
	if o == nil || !c.reports() {
		// RFC 8323 has no Reset: an answer that nobody waits for is dropped.
		c.srv.metrics.dropped.WithLabelValues("late").Inc()
		return item{}, isUnknown
	}
	it := item{msg: m, observation: o, ended: !observed || m.Code>>5 != 2}
	// RFC 8323, Section 7.1: the stream keeps the order, so the value of the Observe option says nothing.
	if c.dg != nil {
		if !room {
			return item{}, isWithheld
		}
		if settles && refreshed {
			// It was made after the question, so it is newer than all before whatever its number: the peer may have rebooted.
			o.seen = 0
		}
		if observed && !o.newer(m, c.srv.now()) {
			c.srv.metrics.dropped.WithLabelValues("stale").Inc()
			if refreshed {
				x.outdated = true
				if c.doubt(string(m.Token), x) {
					return item{msg: unknownState(m.Token), observation: o}, isNotification
				}
			}
			return item{}, isStale
		}
		if !f.bad() && !o.learn(m, c.srv.now()) {
			// RFC 7641, Section 3.3.2: what the ETag stands for is valid again, and we do not have it any more.
			it.msg = unknownState(m.Token)
		}
	}
	if refreshed {
		// Also if it is a notification that was under way: it is newer than what we had, and the answer comes behind it.
		delete(c.exchanges, string(m.Token))
		x.answer <- answer{msg: m, fault: f}
	}
	switch {
	case f.bad():
		it.msg, it.ended = &Message{Code: codes.BadOption, Token: m.Token, Payload: []byte(f.String())}, true
	case len(m.Payload) > c.srv.cfg.MaxBody:
		it.msg = &Message{Code: codes.RequestEntityTooLarge, Token: m.Token}
	}
	if it.ended {
		delete(c.observations, string(m.Token)) // RFC 7641, Section 4.2
	}
	if b, ok, _ := blockOf(it.msg, Block2); ok && b.more {
		// The rest of it must be fetched, beside the worker. Of one observation only the newest representation counts.
		o.fetch = &fetch{first: m, ended: it.ended}
		if !o.listed {
			o.listed = true
			c.fetches = append(c.fetches, o)
		}
		if !c.fetching {
			c.fetching = true
			c.wg.Add(1)
			go c.fetchAll()
		}
		// Over UDP the first block is acknowledged at once: the rest is asked for by requests of ours, which a peer with one
		// exchange at a time (NSTART) could not answer before.
		return item{}, isTaken
	}
	if m.Code != codes.Valid { // else it says of what is being fetched that it is the newest
		o.fetch = nil
	}
	return it, isNotification
}

// newer reports that a notification is newer than all before (RFC 7641, Section 3.4), and makes it the newest. Conn.mu is
// held.
func (o *Observation) newer(m *Message, now time.Duration) bool {
	const (
		half  = 1 << 23
		fresh = 128 * time.Second // then the numbers may have gone round, or the peer has rebooted
	)
	v, _ := m.Uint(ObserveOption)
	if o.seen != 0 && now <= o.seen+fresh {
		if old := o.number; !(old < v && v-old < half || old > v && old-v > half) {
			return false
		}
	}
	o.number, o.seen = v, now
	return true
}

// learn notes what a notification says of itself, and reports whether it can be understood: not if it is a 2.03 of another
// representation than the newest. Conn.mu is held.
func (o *Observation) learn(m *Message, now time.Duration) bool {
	if m.Code>>5 != 2 {
		return true
	}
	const defaultMaxAge = 60 // RFC 7252, Section 5.10.5
	age, ok := m.Uint(MaxAge)
	if !ok {
		age = defaultMaxAge
	}
	o.stale = now + time.Duration(age)*time.Second
	tag := ETag(m)
	if m.Code == codes.Valid {
		if known := len(o.etag) > 0; known && len(tag) > 0 && !bytes.Equal(tag, o.etag) {
			return false
		} else if known {
			return true
		}
	}
	o.etag = bytes.Clone(tag) // not the message's memory
	return true
}

// fetch is a notification whose further blocks are to be fetched.
type fetch struct {
	first *Message
	ended bool
}

// fetchAll fetches what notifications in blocks left out, one after the other; it exists while there is some. What is held
// is bounded: one first block for each observation, and one body.
func (c *Conn) fetchAll() {
	defer c.wg.Done()
	for {
		c.mu.Lock()
		if len(c.fetches) == 0 || c.reason != nil {
			c.fetching, c.fetches = false, nil
			c.mu.Unlock()
			return
		}
		o := c.fetches[0]
		c.fetches = c.fetches[1:]
		o.listed = false
		job := o.fetch
		c.mu.Unlock()
		if job == nil {
			continue
		}
		msg, held := c.fetchOne(o, job)
		if msg == nil {
			continue // the connection is gone
		}
		c.mu.Lock()
		current := o.fetch == job
		if current {
			o.fetch = nil
		}
		c.mu.Unlock()
		if !current {
			c.srv.budget.give(held)
			continue // a newer one came; if it has blocks, it is listed
		}
		size := held
		if held == 0 { // one that says that there is no whole
			size = messageCost + len(msg.Payload)
		}
		if err := c.enqueue(item{msg: msg, observation: o, ended: job.ended, size: size}, held > 0); err != nil {
			c.tr.abort(err)
		}
	}
}

// fetchOne returns the whole with the bytes of the budget that it holds, or what says that there is none, or nil when the
// connection is gone.
func (c *Conn) fetchOne(o *Observation, job *fetch) (_ *Message, held int) {
	const op = "coap.fetch"
	ctx, cancel := context.WithTimeout(c.ctx, c.srv.cfg.TransferTimeout)
	defer cancel()
	whole, err := (*Message)(nil), c.slot(ctx, op)
	if err == nil {
		whole, held, err = c.rest(ctx, op, o.req, job.first)
		c.release()
	}
	switch {
	case err == nil:
		return whole, held
	case c.ctx.Err() != nil:
		return nil, 0
	case hub.IsKind(err, hub.TooLarge):
		return &Message{Code: codes.RequestEntityTooLarge, Token: o.req.Token}, 0
	}
	c.srv.log.Debug("cannot fetch the rest of a notification", "connection", c.id, "path", o.path, "error", err)
	return unknownState(o.req.Token), 0
}
