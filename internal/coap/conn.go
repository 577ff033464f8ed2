package coap

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// transport is what a connection needs of the bytes below it: a stream or datagrams. A stream's reader calls Conn.receive for
// each message; datagrams come through datagram.deliver.
type transport interface {
	// send queues m to be written. With wait it waits for room until ctx or the connection ends; else a full queue is
	// errQueueFull.
	send(ctx context.Context, m *Message, wait bool) error
	// limits returns the largest whole message the peer takes, and whether it takes several blocks in one (BERT).
	limits() (largest int, bert bool)
	// size returns what m will count against the peer's limit.
	size(m *Message) int
	// ping asks the peer for a sign of life; it does not block.
	ping()
	// finish lets what is queued be written, then ends our direction. Later sends fail. It does not block.
	finish()
	// abort tells the peer, as far as there is room to say it, why its connection ends, and shuts the connection.
	abort(err error)
	// cut ends both directions at once. It does not block.
	cut()
	// expired reports a reason to close that only the transport sees, such as a message that never becomes whole.
	expired(now time.Duration) error
	info() ConnInfo
}

// Conn is one connection with a peer, for both roles. All methods may be called from any goroutine, also from handlers.
type Conn struct {
	srv     *Server
	tr      transport
	dg      *datagram // tr when that is one; nil on streams
	id      string
	handler ConnHandler // set before the reader starts
	ctx     context.Context
	cancel  context.CancelFunc
	since   time.Time
	born    time.Duration
	timer   timer
	wg      sync.WaitGroup // worker and fetcher

	lastIn       atomic.Int64 // of the last bytes; a time of the server's clock
	lastPing     atomic.Int64
	pingTime     atomic.Int64
	bytesIn      atomic.Uint64
	bytesOut     atomic.Uint64
	messagesIn   atomic.Uint64
	messagesOut  atomic.Uint64
	nextToken    atomic.Uint64
	next         atomic.Pointer[chan struct{}] // of Next; nil when nobody asked
	able         atomic.Bool                   // the peer answered a request while an earlier one was out
	pingUnsettle bool                          // a Ping was sent and nothing came since; the wheel's alone

	// mu guards what follows. Order of locks: mu before the wheel's, the budget's and the transport's.
	mu           sync.Mutex
	queue        []item        // not yet taken by the worker
	queued       int           // waiting or being handled
	queuedBytes  int           //
	space        chan struct{} // not nil while the reader waits for queue space
	paused       chan struct{} // not nil while the worker waits because of Pacer
	slow         bool          // it had to wait before it handed over what it did last
	working      bool
	later        int             // answers that are made beside the worker
	reason       error           // not nil: the connection is closing
	ours         bool            // the reason is from Close: the peer is there
	has          bool            // the handler is there
	released     bool            // the peer was sent elsewhere: it is about to close the connection, or we are
	answered     time.Duration   // until when an answer that ends the connection has time to arrive; 0: there was none
	ended        bool            // all is given back
	drain        bool            // closing, but what is queued is still handled
	outstanding  int             // requests of ours that have no answer yet
	waiting      []chan struct{} // those that wait for one of them, in order
	exchanges    map[string]*exchange
	asked        uint64 // counts their sending
	observations map[string]*Observation
	observers    map[string]*Observer // by token
	echo         []byte               // the Echo value of the peer's last answer, until the next request (RFC 9175, Section 2.3)
	lastNumber   uint32               // no number of an observation that is over was higher (RFC 7641, Section 4.4)
	fetches      []*Observation       // observations with a fetch to do; at most one entry each
	fetching     bool

	blocks blocks
}

// item is a request or a notification on its way to the handler, or a reminder that an observer is to be told the state.
type item struct {
	msg         *Message     // nil: a reminder
	observation *Observation // of a notification
	observer    *Observer    // of a reminder
	ended       bool
	size        int        // taken from the budget
	from        *reception // of a notification in a datagram, to be acknowledged when it has been handled
}

// inbound is a received message with room for the usual number of options, in one piece of memory.
type inbound struct {
	Message
	room [6]message.Option
}

func (s *Server) newConn() *Conn {
	c := &Conn{srv: s, id: rand.Text(), since: time.Now(), born: s.now()}
	c.ctx, c.cancel = context.WithCancel(context.Background()) // ended by the owner alone, so that answers under way can finish
	c.timer.fire = c.tick
	c.nextToken.Store(mathrand.Uint64()) // no secret: tokens are only matched within the connection
	c.lastIn.Store(int64(c.born))
	// RFC 7641, Section 4.4: the same client, token and resource must not see a number again, also from another session or
	// process. Nobody is told something every second for long, so the clock is ahead of what was used.
	c.lastNumber = uint32(c.since.Unix()) //nolint:gosec // 24 bits are used
	return c
}

// Info returns what is known of the connection from its transport.
func (c *Conn) Info() ConnInfo {
	info := c.tr.info()
	info.ID = c.id
	return info
}

// Context returns a context that ends when the connection is gone.
func (c *Conn) Context() context.Context { return c.ctx }

// Stats are the counters of one connection, for diagnostics.
type Stats struct {
	Since        time.Time // when the connection was complete
	LastActivity time.Time // when the last bytes came in
	BytesIn      uint64    // CoAP, without TLS
	BytesOut     uint64
	MessagesIn   uint64
	MessagesOut  uint64
	RoundTrip    time.Duration // of the last answered Ping, over UDP of any confirmable message that was sent once; zero before
}

// Stats returns the connection's counters.
func (c *Conn) Stats() Stats {
	return Stats{
		Since:        c.since,
		LastActivity: c.since.Add(time.Duration(c.lastIn.Load()) - c.born),
		BytesIn:      c.bytesIn.Load(),
		BytesOut:     c.bytesOut.Load(),
		MessagesIn:   c.messagesIn.Load(),
		MessagesOut:  c.messagesOut.Load(),
		RoundTrip:    time.Duration(c.pingTime.Load()),
	}
}

// Next returns a channel that is closed when the peer says something next, or the connection is gone: the moment to reach a
// device that sleeps most of the time. What came before the call does not count.
func (c *Conn) Next() <-chan struct{} {
	for {
		if ch := c.next.Load(); ch != nil {
			return *ch
		}
		ch := make(chan struct{})
		if c.next.CompareAndSwap(nil, &ch) {
			if c.ctx.Err() != nil {
				c.spoke() // end may have looked before
			}
			return ch
		}
	}
}

// spoke tells who waits for Next.
func (c *Conn) spoke() {
	if c.next.Load() == nil {
		return
	}
	if ch := c.next.Swap(nil); ch != nil {
		close(*ch)
	}
}

// hear is spoke for a peer over UDP or DTLS, which had said nothing for so long.
func (c *Conn) hear(silence time.Duration) {
	c.spoke()
	if h, ok := c.handler.(Listener); ok {
		c.Guard("Heard", func() { h.Heard(silence) })
	}
}

// Close ends the connection soon and does not block: what waits to be written is written first, bounded by
// Config.CloseTimeout; what was received but not yet handled is dropped. err is what Closed will be told; nil means
// ErrClosed. Only the first call counts.
func (c *Conn) Close(err error) {
	if err == nil {
		err = ErrClosed
	}
	c.begin(err, false, true)
}

// CloseAnswered is Close after that time, with ErrAnswered, for an answer that was given or is about to be: it has this long to arrive,
// also if Close was called for another reason before, or is meanwhile. Over UDP and DTLS duplicates of the request then get it again for
// a while (Config.Linger).
func (c *Conn) CloseAnswered(delay time.Duration) {
	c.mu.Lock()
	if c.answered == 0 {
		c.answered = c.srv.now() + delay
	}
	c.mu.Unlock()
	time.AfterFunc(delay, func() { c.Close(ErrAnswered) }) // it comes to nothing if the connection has ended
}

// shut begins the end: nothing new is handled; with drain, what is queued still is. The worker (or this call, when it is
// idle) lets the transport finish; the wheel cuts the connection when that takes too long.
func (c *Conn) shut(err error, drain bool) { c.begin(err, drain, false) }

func (c *Conn) begin(err error, drain, ours bool) {
	c.mu.Lock()
	if c.reason != nil {
		c.mu.Unlock()
		return
	}
	if c.released && (errors.Is(err, io.EOF) || errors.Is(err, ErrReleased)) {
		err = ErrShutdown // the peer has done as it was told
	}
	c.reason, c.drain, c.ours = err, drain, ours
	c.srv.wheel.set(&c.timer, c.srv.cfg.CloseTimeout)
	idle := !c.working && !c.due()
	c.wakeReader()
	if c.paused != nil {
		close(c.paused)
		c.paused = nil
	}
	c.mu.Unlock()
	if idle {
		c.finish()
	}
}

// finish lets the transport finish: at once, or when the answer that ends the connection has had its time.
func (c *Conn) finish() {
	c.mu.Lock()
	wait := c.answered - c.srv.now()
	c.mu.Unlock()
	if wait > 0 {
		time.AfterFunc(wait, c.tr.finish)
		return
	}
	c.tr.finish()
}

// due reports that the end is to wait for answers that are made beside the worker; mu is held.
func (c *Conn) due() bool { return c.drain && c.later > 0 }

// end is the last thing a connection's owner does, after reader and writer have ended.
func (c *Conn) end(err error) {
	c.shut(err, false)
	c.cancel() // now handlers and callers that wait for the peer give up
	c.spoke()
	c.wg.Wait()
	c.srv.wheel.stop(&c.timer)
	c.mu.Lock()
	reason := c.reason
	left := c.queuedBytes
	c.queue, c.queuedBytes, c.exchanges, c.observations, c.observers, c.ended = nil, 0, nil, nil, nil, true
	c.mu.Unlock()
	c.srv.budget.give(left)
	c.blocks.clear(c.srv.budget)
	c.srv.metrics.closed.WithLabelValues(Reason(reason)).Inc()
	c.Guard("Closed", func() { c.handler.Closed(reason) })
}

// Closing reports whether the connection has begun to end: nothing new is sent to the peer then. Its context ends later, when
// what is under way is over.
func (c *Conn) Closing() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.parting()
}

// ending returns why the connection is closing, nil while it is not.
func (c *Conn) ending() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason
}

// wakeReader lets a reader that waits for queue space look again; mu is held.
func (c *Conn) wakeReader() {
	if c.space != nil {
		close(c.space)
		c.space = nil
	}
}

// tick is the connection's timer: it cuts a connection that closes too slowly, forgets old transfers and watches for
// silence. It never blocks; the wheel calls it.
func (c *Conn) tick() {
	cfg := &c.srv.cfg
	c.mu.Lock()
	closing := c.reason != nil
	c.mu.Unlock()
	if closing {
		c.cancel()
		c.tr.cut()
		return
	}
	now := c.srv.now()
	c.blocks.expire(now-cfg.TransferTimeout, c.srv.budget)
	if err := c.tr.expired(now); err != nil {
		c.tr.abort(err)
		return
	}
	next := min(cfg.MessageTimeout, cfg.TransferTimeout) / 2
	if c.messagesIn.Load() == 0 {
		silent := now - c.born
		if silent >= cfg.FirstMessageTimeout {
			c.shut(ErrIdle, false)
			return
		}
		next = min(next, cfg.FirstMessageTimeout-silent)
	}
	if half := cfg.KeepAlive / 2; half > 0 {
		last, pinged := time.Duration(c.lastIn.Load()), time.Duration(c.lastPing.Load())
		switch {
		case c.pingUnsettle && last < pinged && now-pinged >= half:
			c.shut(ErrKeepAlive, false)
			return
		case c.pingUnsettle && last < pinged:
			next = min(next, half-(now-pinged))
		case now-last >= half:
			c.pingUnsettle = true
			c.lastPing.Store(int64(now))
			c.tr.ping()
			next = min(next, half)
		default:
			c.pingUnsettle = false
			next = min(next, half-(now-last))
		}
	}
	c.mu.Lock()
	if c.reason == nil { // else shut has set it
		c.srv.wheel.set(&c.timer, next)
	}
	c.mu.Unlock()
}

// receive handles one whole message of the peer. b is token and body, given away; held bytes of the budget are given away
// too. An error ends the connection with Abort. It blocks while the queue is full.
func (c *Conn) receive(code codes.Code, token, body []byte, held int) error {
	m := c.srv.metrics
	c.messagesIn.Add(1)
	c.spoke()
	size := held
	defer func() { c.srv.budget.give(held) }()

	if code == codes.Empty {
		m.in[kindEmpty].Inc()
		return nil // RFC 8323, Section 3.4: to be ignored, whatever is in it
	}
	in := &inbound{Message: Message{Code: code, Token: token}}
	class := code >> 5
	var f fault
	var err error
	in.Options, in.Payload, f, err = decodeBody(body, in.room[:0], false)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	f.misplaced(code, in.Options)
	msg := &in.Message
	if size == 0 {
		size = len(body) + messageCost
	}
	switch class {
	case 0:
		m.in[kindRequest].Inc()
		if refusal, bad := refuse(f); bad {
			refusal.Token = token
			c.sendNow(refusal)
			c.refused(msg)
			return nil
		}
		if held == 0 {
			return c.enqueue(item{msg: msg, size: size}, false)
		}
		held = 0
		return c.enqueue(item{msg: msg, size: size}, true)
	case 2, 4, 5:
		m.in[kindResponse].Inc()
		it, what := c.response(msg, f, true, false)
		if what != isNotification {
			return nil
		}
		it.size = size
		taken := held != 0
		held = 0
		return c.enqueue(it, taken)
	}
	// Classes 1, 3 and 6 are reserved (RFC 7252, Section 3), 7 is the stream's own: nothing to answer.
	m.in[kindOther].Inc()
	m.dropped.WithLabelValues("reserved").Inc()
	return nil
}

// refuse answers a request that must not reach a handler.
func refuse(f fault) (*Message, bool) {
	switch {
	case f.bad(): // RFC 7252, Section 5.4.1
		return &Message{Code: codes.BadOption, Payload: []byte(f.String())}, true
	case f.hops: // RFC 8768, Section 3
		return &Message{Code: codes.BadRequest, Payload: []byte(f.String())}, true
	case f.proxy: // RFC 7252, Section 5.10.2
		return &Message{Code: codes.ProxyingNotSupported, Payload: []byte(f.String())}, true
	}
	return nil, false
}

// refused tells the handler, if it wants to know, that the engine answered m with an error.
func (c *Conn) refused(m *Message) {
	if h, ok := c.handler.(Refuser); ok {
		c.Guard("Refused", func() { h.Refused(m) })
	}
}

// sendNow sends an answer that is worth no waiting.
func (c *Conn) sendNow(m *Message) {
	if err := c.tr.send(c.ctx, m, false); errors.Is(err, errQueueFull) {
		c.srv.metrics.dropped.WithLabelValues("unread").Inc()
	}
}

// enqueue hands an item to the worker. While the queue of the connection or the common buffer is full it waits: the peer is
// not read, which is how a stream is slowed down. After OverloadTimeout the connection ends. taken says that the budget
// already has the item's size.
func (c *Conn) enqueue(it item, taken bool) error {
	cfg := &c.srv.cfg
	var timeout *time.Timer
	turn := false // something was handled while this waited
	for {
		c.mu.Lock()
		if c.reason != nil && (it.observation == nil || !c.reports()) {
			c.mu.Unlock()
			if taken {
				c.srv.budget.give(it.size)
			}
			c.srv.metrics.dropped.WithLabelValues("closing").Inc()
			return nil
		}
		var space, freed <-chan struct{}
		// A peer that is slowed down brings one for each that is handled, however many it brought before that began: the reader
		// must get on, or there are no Pongs.
		if c.room(c.slow && !turn) {
			if !taken {
				if taken = c.srv.budget.take(it.size); !taken {
					freed = c.srv.budget.wait()
					taken = c.srv.budget.take(it.size)
				}
			}
			if taken {
				c.queue = append(c.queue, it)
				c.queued++
				c.queuedBytes += it.size
				if !c.working {
					c.working = true
					c.wg.Add(1)
					go c.work()
				}
				c.mu.Unlock()
				if timeout != nil {
					timeout.Stop()
				}
				return nil
			}
		} else {
			if c.space == nil {
				c.space = make(chan struct{})
			}
			space = c.space
		}
		c.mu.Unlock()
		var late <-chan time.Time // never over UDP: nobody waits for a Pong there, and only what we fetched comes this way
		if c.dg == nil {
			if timeout == nil {
				c.srv.metrics.queueFull.Inc()
				timeout = time.NewTimer(cfg.OverloadTimeout)
			}
			late = timeout.C
		}
		select {
		case <-space:
			turn = true
		case <-freed:
		case <-late:
			if taken {
				c.srv.budget.give(it.size)
			}
			return ErrOverload
		case <-c.ctx.Done():
		}
	}
}

// room reports whether the queue has room for one more; mu is held. Of a peer that is slowed down it takes little: what it wants
// to say is the peer's to keep, else many such peers together would use up what is for all.
func (c *Conn) room(little bool) bool {
	length, bytes := c.srv.cfg.QueueLength, c.srv.cfg.QueueBytes
	if little {
		length, bytes = max(1, length/16), max(1, bytes/16)
	}
	return c.queued < length && c.queuedBytes < bytes
}

// reserve takes room in the queue for one item of that size, without waiting; push uses it, unreserve gives it back.
func (c *Conn) reserve(size int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.reason != nil || !c.room(c.slow) || !c.srv.budget.take(size) {
		return false
	}
	c.queued++
	c.queuedBytes += size
	return true
}

func (c *Conn) unreserve(size int) { c.handled([]item{{size: size}}) }

// push hands an item for which there is room to the worker.
func (c *Conn) push(it item) {
	c.mu.Lock()
	if c.reason != nil {
		c.mu.Unlock()
		c.lose([]item{it})
		return
	}
	c.queue = append(c.queue, it)
	if !c.working {
		c.working = true
		c.wg.Add(1)
		go c.work()
	}
	c.mu.Unlock()
}

// work is the worker: it exists while there is something to handle, and hands it over in the order of arrival.
func (c *Conn) work() {
	defer c.wg.Done()
	for {
		c.mu.Lock()
		closing := c.reason != nil
		if len(c.queue) == 0 || closing && !c.drain {
			c.working, c.slow = false, false
			left := c.queue
			c.queue = nil
			closing = closing && !c.due()
			c.mu.Unlock()
			c.lose(left)
			if closing {
				c.finish()
			}
			return
		}
		items := c.queue
		c.queue = nil
		c.mu.Unlock()

		for len(items) > 0 && !c.stopped() {
			n := 1
			switch {
			case items[0].observer != nil:
				items[0].observer.tell()
			case items[0].observation == nil:
				c.serve(items[0].msg)
			default:
				for n < len(items) && items[n].observation != nil {
					n++
				}
				if n = c.pace(n); c.stopped() {
					continue // it ended meanwhile
				}
				c.notify(items[:n])
			}
			c.handled(items[:n])
			items = items[n:]
		}
		c.lose(items)
	}
}

// pace asks the handler how many of n notifications it takes now, and waits as long as it says, or until the connection is
// closing.
func (c *Conn) pace(n int) int {
	h, ok := c.handler.(Pacer)
	if !ok {
		return n
	}
	some, after := h.Pace(n)
	if after <= 0 && !c.slow { // only the worker changes it
		return some
	}
	c.mu.Lock()
	c.slow = after > 0
	if after <= 0 {
		c.mu.Unlock()
		return some
	}
	if c.reason != nil { // what is still to be handled then, CloseTimeout bounds
		c.mu.Unlock()
		return some
	}
	paused := make(chan struct{})
	c.paused = paused
	c.mu.Unlock()
	t := time.NewTimer(after)
	defer t.Stop()
	select {
	case <-t.C:
	case <-paused:
	}
	c.mu.Lock()
	c.paused = nil
	c.mu.Unlock()
	return some
}

// stopped reports that the rest of the queue is not to be handled.
func (c *Conn) stopped() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.reason != nil && !c.drain
}

// lose drops what was not handled because the connection is closing. Over UDP a request is as if it had been lost on its way: it
// gets no ACK, comes again, and then finds a session that is over, or another one.
func (c *Conn) lose(items []item) {
	for i := range items {
		if m := items[i].msg; c.dg != nil && m != nil && m.Code>>5 == 0 && m.from != nil {
			c.dg.forget(m.from, "closing")
		} else {
			c.srv.metrics.dropped.WithLabelValues("closing").Inc()
		}
	}
	c.handled(items)
}

// handled makes room for what was handled.
func (c *Conn) handled(items []item) {
	if len(items) == 0 {
		return
	}
	n := 0
	for i := range items {
		n += items[i].size
	}
	c.mu.Lock()
	if c.ended { // which has given everything back
		c.mu.Unlock()
		return
	}
	c.queued -= len(items)
	c.queuedBytes -= n
	c.wakeReader()
	c.mu.Unlock()
	c.srv.budget.give(n)
}

// notify brings a run of notifications to the handler.
func (c *Conn) notify(items []item) {
	ns := make([]Notification, 0, len(items))
	for i := range items {
		if o := items[i].observation; !o.cancelled.Load() {
			ns = append(ns, Notification{Observation: o, Message: items[i].msg, Ended: items[i].ended})
		}
	}
	if c.dg != nil {
		defer c.stored(items)
	}
	if len(ns) == 0 {
		return
	}
	if !c.Guard("Notifications", func() { c.handler.Notifications(c.ctx, ns) }) {
		// Nobody knows how much of it was stored. A new connection makes the device report again.
		c.Close(ErrPanic)
	}
}

// stored acknowledges the notifications that have been handled. What closed the connection was not: the peer sends it again
// and learns that nobody is there.
func (c *Conn) stored(items []item) {
	c.mu.Lock()
	closing := c.reason != nil && !c.drain
	c.mu.Unlock()
	if closing {
		return
	}
	for i := range items {
		c.dg.acknowledge(items[i].from)
	}
}

// request asks the handler. A panic ends this request only.
func (c *Conn) request(m *Message) Response {
	return c.guarded(func(ctx context.Context) Response { return c.handler.Request(ctx, m) })
}

func (c *Conn) guarded(f func(context.Context) Response) (r Response) {
	if !c.Guard("Request", func() { r = f(c.ctx) }) {
		return Response{Code: codes.InternalServerError, Payload: []byte("internal: something went wrong in the hub")}
	}
	return r
}

// beside has the answer to m made in a goroutine, and sent when it is there. Until then size bytes are taken from the budget;
// false if there are none. The worker calls it, which keeps the connection from ending meanwhile.
func (c *Conn) beside(size int, answer func(context.Context) Response, send func(Response)) bool {
	if !c.srv.budget.take(size) {
		return false
	}
	c.mu.Lock()
	c.later++
	c.mu.Unlock()
	c.wg.Go(func() {
		send(c.guarded(answer))
		c.srv.budget.give(size)
		c.mu.Lock()
		last := c.due() && c.later == 1 && !c.working
		c.later--
		c.mu.Unlock()
		if last {
			c.finish()
		}
	})
	return true
}

// Guard calls f and reports whether it returned without a panic; one is logged with its stack and counted. The engine calls
// its handler so, and handlers call so what they do in goroutines of their own.
func (c *Conn) Guard(what string, f func()) (ok bool) {
	return c.srv.guard(what, f, "connection", c.id)
}

// Guard is Conn.Guard for what handlers do for more than one connection.
func (s *Server) Guard(what string, f func()) (ok bool) { return s.guard(what, f) }

func (s *Server) guard(what string, f func(), attrs ...any) (ok bool) {
	defer func() {
		if v := recover(); v != nil {
			ok = false
			s.metrics.panics.Inc()
			s.log.With(attrs...).Error("handler panicked", "call", what, "panic", fmt.Sprint(v), "stack", string(debug.Stack()))
		}
	}()
	f()
	return true
}
