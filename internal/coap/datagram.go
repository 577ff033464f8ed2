package coap

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"hash/maphash"
	mathrand "math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// packetLink carries the datagrams of one session: an address on a plain socket, or a DTLS association. What arrives is
// pushed into the session by datagram.deliver, so that an idle session has no goroutine.
type packetLink interface {
	// WriteDatagram sends one datagram, or loses it; it does not keep b. It must not block: the timer wheel calls it, and a
	// lock is held around it.
	WriteDatagram(b []byte) error
	// Close ends the link. It is called once, last; nothing is delivered afterwards.
	Close() error
	// describe fills in what the link knows: addresses, Secure and credentials.
	describe(info *ConnInfo)
	// proven reports that nobody else can have sent what came from this address. DTLS has seen to it; on plain UDP the
	// session has to (amplification, RFC 7252, Section 11.3).
	proven() bool
}

// messageType is the T of RFC 7252, Section 3.
type messageType uint8

const (
	confirmable messageType = iota
	nonConfirmable
	acknowledgement
	reset
)

// baseHeader is the size of the fixed part of a datagram.
const baseHeader = 4

// packet is the parsed head of a datagram (RFC 7252, Section 3).
type packet struct {
	typ  messageType
	code codes.Code
	id   uint16
	tkl  int
	body []byte // token, options and payload
}

// What is wrong with a datagram. One that is not even a message of this version is ignored (RFC 7252, Section 3); of the
// others Section 4.2 decides.
var (
	errNoMessage   = errors.New("not a message of CoAP version 1")
	errFormatError = errors.New("message format error")
)

// parsePacket reads the head of a datagram. With errFormatError the packet's type and ID can be trusted.
func parsePacket(b []byte) (p packet, err error) {
	if len(b) < baseHeader || b[0]>>6 != 1 {
		return p, errNoMessage
	}
	p = packet{
		typ: messageType(b[0] >> 4 & 3), code: codes.Code(b[1]), id: binary.BigEndian.Uint16(b[2:]), tkl: int(b[0] & 0x0f),
		body: b[baseHeader:],
	}
	switch {
	case p.tkl > maxToken: // RFC 7252, Section 3: 9 to 15 are reserved
		return p, errFormatError
	case p.code == codes.Empty && len(p.body) > 0: // RFC 7252, Section 4.1
		return p, errFormatError
	case p.tkl > len(p.body):
		return p, errFormatError
	}
	class := p.code >> 5
	switch p.typ {
	case confirmable:
		err = reserved(class)
	case nonConfirmable:
		if err = reserved(class); p.code == codes.Empty { // RFC 7252, Section 4.3
			err = errFormatError
		}
	case acknowledgement:
		if err = reserved(class); p.code != codes.Empty && class == 0 { // RFC 7252, Section 4.2: no request in an ACK
			err = errFormatError
		}
	case reset:
		if p.code != codes.Empty {
			err = errFormatError
		}
	}
	return p, err
}

// reserved refuses the classes that mean nothing here; 7 is the streams' own (RFC 8323, Section 5).
func reserved(class codes.Code) error {
	if class == 0 || class == 2 || class == 4 || class == 5 {
		return nil
	}
	return errFormatError
}

// appendPacket appends m as a datagram.
func appendPacket(b []byte, typ messageType, id uint16, m *Message) []byte {
	b = append(b, 1<<6|byte(typ)<<4|byte(len(m.Token)), byte(m.Code))
	b = binary.BigEndian.AppendUint16(b, id)
	b = append(b, m.Token...)
	return appendBody(b, m)
}

// emptyPacket is an empty message: an ACK, a RST or a ping.
func emptyPacket(typ messageType, id uint16) []byte {
	return appendPacket(make([]byte, 0, baseHeader), typ, id, &Message{})
}

// datagram is the transport of RFC 7252: the message layer of one session. All it waits for hangs on one timer of the wheel;
// whoever reads the socket calls deliver. Nothing a datagram contains ends a session: anybody can forge one.
type datagram struct {
	c     *Conn
	g     *sessions
	link  packetLink
	timer timer

	mu       sync.Mutex // the last in the order of locks but for the wheel's and the budget's
	due      time.Duration
	begun    bool // it has its handler, who is to hear of its end
	early    bool // it was ended before
	finished bool // the Conn has ended or is about to; what is left answers duplicates
	closed   bool // the link is closed
	linger   time.Duration
	vacated  atomic.Bool

	rx        receptions
	sent      []*transmission // confirmable messages that are not settled, in order
	inFlight  int             // those of them that are under way
	notifying int             // those of them that are notifications
	nstart    atomic.Int32    // how many may be; read without mu
	clean     int             // requests in a row that were answered without a retransmission
	nextID    uint16
	usedIDs   [4]time.Duration // when the last ID of each quarter was used

	proven    bool          // the address has answered
	moved     bool          // the address changed after it was proven: only an answer to what was sent since proves it
	confirmed func()        // told when the address is proven after it changed, with mu held; nil on plain UDP
	credit    int           // bytes that may go to an address that is not proven
	held      []*reception  // answers that wait for the proof
	probing   *transmission // the ping that asks for it
	echo      []byte        // a request with this proves it, too; nil before the first challenge

	// What we said on our own account since we last heard anything.
	silentSince time.Duration
	unheard     int
	unheardSize int
}

// sessions are the sessions of one call of ServeUDP or ServeDTLS.
type sessions struct {
	srv *Server
	wg  sync.WaitGroup // one for each session, until its link is closed

	mu      sync.Mutex
	closing bool
	open    map[*datagram]struct{}
}

func (s *Server) newSessions() *sessions {
	return &sessions{srv: s, open: make(map[*datagram]struct{})}
}

var (
	errStopping        = errors.New("the engine stops")
	errHandlerPanicked = errors.New("handler panicked")
)

// start makes a session of a link that is complete and has been admitted (Server.admit). After an error the link is the
// caller's to close, and the admission to give back. Calls of deliver must not overlap.
func (g *sessions) start(link packetLink) (*datagram, error) {
	s := g.srv
	c := s.newConn()
	d := &datagram{c: c, g: g, link: link, proven: link.proven(), nextID: uint16(mathrand.Uint32())} //nolint:gosec // any 16 bits
	d.timer.fire = d.tick
	d.nstart.Store(int32(max(1, s.cfg.MaxOutstanding))) //nolint:gosec // small
	c.tr, c.dg = d, d

	g.mu.Lock()
	if g.closing {
		g.mu.Unlock()
		c.cancel()
		return nil, errStopping
	}
	g.open[d] = struct{}{}
	g.wg.Add(1)
	g.mu.Unlock()

	var err error
	if !c.Guard("Open", func() { c.handler, err = s.handler.Open(c) }) {
		err = errHandlerPanicked
	}
	if err != nil {
		var info ConnInfo
		link.describe(&info)
		s.refuse(info.Remote, "handler", err.Error())
		c.cancel()
		g.mu.Lock()
		delete(g.open, d)
		g.mu.Unlock()
		g.wg.Done()
		return nil, err
	}
	s.metrics.opened.Inc()
	s.metrics.connections.Inc()
	d.mu.Lock()
	d.begun = true
	early := d.early
	d.schedule(s.now() + d.silence())
	d.mu.Unlock()
	if early {
		d.finish()
	}
	g.mu.Lock()
	closing := g.closing
	g.mu.Unlock()
	if closing { // it began to stop meanwhile, and may have missed us
		c.shut(ErrShutdown, true)
	}
	c.begun()
	return d, nil
}

// release ends all sessions in order and waits for them.
func (g *sessions) release() {
	g.mu.Lock()
	g.closing = true
	open := make([]*datagram, 0, len(g.open))
	for d := range g.open {
		open = append(open, d)
	}
	g.mu.Unlock()
	for _, d := range open {
		d.c.shut(ErrShutdown, true)
		d.mu.Lock()
		if d.linger != 0 {
			d.linger = 1
			d.schedule(d.linger)
		}
		d.mu.Unlock()
	}
	g.wg.Wait()
}

func (d *datagram) info() ConnInfo {
	var info ConnInfo
	d.link.describe(&info)
	info.Stream = false
	return info
}

func (d *datagram) size(m *Message) int { return baseHeader + len(m.Token) + bodySize(m) }

// limits: RFC 7252, Section 4.6 has no way to announce a limit; its assumption is what everybody takes. BERT is for streams
// (RFC 8323, Section 6).
func (d *datagram) limits() (int, bool) { return d.c.srv.cfg.MaxDatagram, false }

func (d *datagram) expired(time.Duration) error { return nil }

func (d *datagram) abort(err error) { d.c.shut(err, false) }

// lost is the link's own end, such as a close_notify: the session ends.
func (d *datagram) lost(err error) { d.c.shut(err, false) }

func (d *datagram) cut() { d.finish() }

// finish ends the session: its owner is made now, since an idle session has none. One whose handler is being made ends when it
// is there.
func (d *datagram) finish() {
	d.mu.Lock()
	if d.early = d.early || !d.begun; d.finished || !d.begun {
		d.mu.Unlock()
		return
	}
	d.finished = true
	d.mu.Unlock()
	go d.end() // counted in g.wg since start
}

func (d *datagram) end() {
	c := d.c
	c.mu.Lock()
	reason := c.reason
	c.mu.Unlock()
	c.end(reason)
	c.mu.Lock()
	answered := errors.Is(reason, ErrAnswered) || c.ours && c.answered != 0 // only end has waited for who answers
	c.mu.Unlock()
	c.srv.metrics.connections.Dec()
	d.mu.Lock()
	d.g.mu.Lock()
	closing := d.g.closing
	d.g.mu.Unlock()
	if answered && !closing && c.srv.cfg.Linger > 0 {
		// The answer that ended the session may be lost on its way; duplicates of the request get it again.
		d.linger = c.srv.now() + c.srv.cfg.Linger
		d.schedule(d.linger)
		d.mu.Unlock()
		return
	}
	d.mu.Unlock()
	d.close()
}

// close is the end of the link, once.
func (d *datagram) close() {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return
	}
	d.closed = true
	d.sent, d.notifying, d.held, d.probing = nil, 0, nil, nil
	d.rx.clear(d.c.srv.budget)
	d.mu.Unlock()
	_ = d.link.Close()
	d.c.srv.wheel.stop(&d.timer)
	d.g.mu.Lock()
	delete(d.g.open, d)
	d.g.mu.Unlock()
	d.vacate()
	d.g.wg.Done()
}

// vacate gives back the session's place among the connections, once.
func (d *datagram) vacate() {
	if d.vacated.CompareAndSwap(false, true) {
		d.c.srv.gone()
	}
}

// silence is how long the peer may say nothing. Who has not proven its address gets no longer than a message may take, so
// that forged addresses do not stay.
func (d *datagram) silence() time.Duration {
	cfg := &d.c.srv.cfg
	if !d.proven && !d.link.proven() {
		return min(cfg.MaxSilence, cfg.exchangeLifetime())
	}
	return cfg.MaxSilence
}

// relocated says that the peer's datagrams come from another address, as one of n bytes did (RFC 9146, Section 6). Until it has
// answered there, it gets no more than from an address that was never proven.
func (d *datagram) relocated(n int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return
	}
	if t := d.probing; t != nil { // it went to another address
		d.remove(t)
	}
	d.proven, d.moved, d.credit = false, true, 3*n
	for _, t := range d.sent {
		t.stale = t.tries > 0
	}
	d.probe()
}

// schedule makes the timer fire no later than at; mu is held.
func (d *datagram) schedule(at time.Duration) {
	if d.closed || d.due != 0 && d.due <= at {
		return
	}
	d.due = at
	d.c.srv.wheel.set(&d.timer, max(0, at-d.c.srv.now()))
}

// tick is the session's timer: acknowledgements that are due, retransmissions, what may be forgotten, silence. The wheel
// calls it.
func (d *datagram) tick() {
	c, cfg := d.c, &d.c.srv.cfg
	now := c.srv.now()
	transfers := c.blocks.expire(now-cfg.TransferTimeout, c.srv.budget)
	remind := c.remind(now)

	d.mu.Lock()
	d.due = 0
	if d.closed {
		d.mu.Unlock()
		return
	}
	if d.linger != 0 && now >= d.linger {
		d.mu.Unlock()
		go d.close() // closing a link may take its time; counted in g.wg
		return
	}
	if d.linger != 0 {
		d.schedule(d.linger)
	}
	d.rx.acknowledgeDue(d, now)
	d.rx.expire(now, cfg, c.srv.budget)
	if at := d.rx.next(now, cfg); at != 0 {
		d.schedule(at)
	}
	failed := d.retransmit(now)
	silent := false
	if !d.finished {
		quiet := time.Duration(c.lastIn.Load()) + d.silence()
		if silent = now >= quiet; !silent {
			d.schedule(quiet)
		}
		if remind != 0 {
			d.schedule(remind)
		}
		if transfers {
			d.schedule(now + cfg.TransferTimeout/2)
		}
	}
	d.mu.Unlock()
	for _, t := range failed {
		t.fail(d, errNoReaction)
	}
	if silent {
		c.shut(ErrSilent, false)
	}
}

// seed makes what a datagram, or a payload, is remembered by unpredictable.
var seed = maphash.MakeSeed()

// deliver takes one datagram of the peer; b stays the caller's. It never blocks. It returns false when the session is over
// and the datagram none that it knows.
func (d *datagram) deliver(b []byte) bool {
	c, m := d.c, d.c.srv.metrics
	m.bytesIn.Add(float64(len(b)))
	p, err := parsePacket(b)
	if errors.Is(err, errNoMessage) {
		m.dropped.WithLabelValues("malformed").Inc()
		return true
	}
	now := c.srv.now()
	c.bytesIn.Add(uint64(len(b)))
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return false
	}
	d.credit = min(d.credit+3*len(b), maxCredit)
	silence := now - time.Duration(c.lastIn.Load())
	switch {
	case err != nil:
		d.malformed(p)
		d.mu.Unlock()
		return true
	case p.typ == acknowledgement || p.typ == reset:
		t := d.settle(p)
		if t == nil {
			d.mu.Unlock()
			// RFC 7252, Sections 4.2 and 4.3: ours are matched by message ID; what matches nothing is ignored, and proves
			// nothing.
			m.dropped.WithLabelValues("unmatched").Inc()
			return true
		}
		d.heard(now)
		d.mu.Unlock()
		c.hear(silence)
		switch {
		case p.typ == reset:
			t.fail(d, errReset)
		case t.settled != nil:
			t.settled(nil)
		case p.code != codes.Empty && t.request:
			c.messagesIn.Add(1)
			d.piggybacked(p)
		case t.request:
			c.awaited(t.token)
		}
		return true
	case p.code == codes.Empty: // RFC 7252, Section 4.3: a "CoAP ping"
		m.in[kindEmpty].Inc()
		c.lastIn.Store(int64(now))
		d.put(emptyPacket(reset, p.id))
		d.mu.Unlock()
		c.hear(silence)
		return true
	}
	sum := maphash.Bytes(seed, b)
	if r := d.rx.find(p.id, sum, now, c.srv.cfg.exchangeLifetime()); r != nil {
		m.dropped.WithLabelValues("duplicate").Inc()
		d.repeat(r)
		d.mu.Unlock()
		return true
	}
	if d.finished {
		d.mu.Unlock()
		return false
	}
	c.lastIn.Store(int64(now))
	r := d.rx.add(p, sum, now, &c.srv.cfg, c.srv.budget)
	r.size = len(b)
	d.schedule(now + c.srv.cfg.TransferTimeout/2)
	if d.proven {
		d.heard(now)
	}
	d.mu.Unlock()
	c.messagesIn.Add(1)
	c.hear(silence)
	d.dispatch(p, r, len(b), now)
	return true
}

// malformed answers what cannot be understood (RFC 7252, Sections 4.2 and 4.3): a confirmable message is rejected, all others
// are ignored silently.
func (d *datagram) malformed(p packet) {
	d.c.srv.metrics.dropped.WithLabelValues("malformed").Inc()
	if p.typ == confirmable {
		d.put(emptyPacket(reset, p.id))
	}
}

// dispatch brings a request or a response that is no duplicate to where it belongs.
func (d *datagram) dispatch(p packet, r *reception, size int, now time.Duration) {
	c, m := d.c, d.c.srv.metrics
	size += messageCost
	in, f, err := decodePacket(p)
	if err != nil {
		d.mu.Lock()
		d.rx.forget(r, c.srv.budget)
		d.malformed(p)
		d.mu.Unlock()
		return
	}
	if p.code>>5 != 0 {
		m.in[kindResponse].Inc()
		d.response(in, f, r, size, now)
		return
	}
	m.in[kindRequest].Inc()
	in.from = r
	d.echoed(in, now)
	refusal, bad := refuse(f)
	switch {
	case bad && f.bad() && p.typ == nonConfirmable: // RFC 7252, Section 5.4.1
		m.dropped.WithLabelValues("option").Inc()
	case bad:
		refusal.Token, refusal.from = in.Token, r
		c.sendNow(refusal)
	case !c.reserve(size):
		// No room: as if it had been lost. A confirmable one comes again.
		m.queueFull.Inc()
		d.forget(r, "overload")
	default:
		if r.con {
			d.mu.Lock()
			d.rx.await(r, now+c.srv.cfg.AckDelay)
			d.schedule(now + c.srv.cfg.AckDelay)
			d.mu.Unlock()
		}
		c.push(item{msg: in, size: size})
	}
}

// forget lets a datagram be unheard of, so that its retransmission is taken for the first one.
func (d *datagram) forget(r *reception, why string) {
	d.c.srv.metrics.dropped.WithLabelValues(why).Inc()
	d.mu.Lock()
	d.rx.forget(r, d.c.srv.budget)
	r.state = answered // it gets no ACK any more
	d.mu.Unlock()
}

// decodePacket makes a message of a packet, in memory of its own.
func decodePacket(p packet) (*Message, fault, error) {
	own := append(make([]byte, 0, len(p.body)), p.body...)
	in := &inbound{Message: Message{Code: p.code, Token: token(own, p.tkl)}}
	var f fault
	var err error
	in.Options, in.Payload, f, err = decodeBody(own[p.tkl:], in.room[:0], false)
	f.misplaced(p.code, in.Options)
	return &in.Message, f, err
}

// piggybacked takes the response in an ACK that has settled a request of ours (RFC 7252, Section 5.2.1).
func (d *datagram) piggybacked(p packet) {
	m := d.c.srv.metrics
	msg, f, err := decodePacket(p)
	if err != nil {
		m.dropped.WithLabelValues("malformed").Inc()
		return // as if only the ACK had come: the caller's time decides
	}
	m.in[kindResponse].Inc()
	size := len(p.body) + messageCost
	room := d.c.reserve(size)
	it, what := d.c.response(msg, f, room, true)
	switch {
	case what == isNotification:
		// Of a refresh, or of a registration that had its answer already from a notification that was faster.
		it.size = size
		d.c.push(it)
	case room:
		d.c.unreserve(size)
	}
}

// response takes a response in a message of its own: separate (RFC 7252, Section 5.2.2), to a NON, or a notification.
func (d *datagram) response(msg *Message, f fault, r *reception, size int, now time.Duration) {
	c := d.c
	room := c.reserve(size)
	it, what := c.response(msg, f, room, false)
	if what != isNotification && room {
		c.unreserve(size)
	}
	if what == isAnswer || what == isNotification || what == isTaken {
		d.mu.Lock()
		d.answered(msg.Token, now)
		d.mu.Unlock()
	}
	switch what {
	case isNotification:
		// RFC 7252, Section 4.2 wants the ACK of what was accepted; accepted is what has been stored, so the ACK comes
		// when the handler is done. A peer whose ACK is late sends it again, which changes nothing.
		it.size = size
		if f.bad() && r.con { // RFC 7252, Section 5.4.1: rejected; the observation ends with it (RFC 7641, Section 3.6)
			d.reject(r)
		} else {
			it.from = r
		}
		c.push(it)
	case isAnswer, isTaken, isStale: // which may have been sent before our request arrived, so that does not settle it
		if f.bad() && r.con { // RFC 7252, Section 5.4.1: a response with an unknown critical option is rejected
			d.reject(r)
			return
		}
		d.acknowledge(r)
	case isWithheld: // a full queue: the ACK is withheld, the notification comes again
		c.srv.metrics.queueFull.Inc()
		d.forget(r, "overload")
	case isUnknown:
		// RFC 7641, Section 3.6: this is how a peer learns that nobody wants its notifications; RFC 7252, Section 4.2 for
		// others.
		d.reject(r)
	}
}

// acknowledge sends the empty ACK of a confirmable message that has been taken care of, once.
func (d *datagram) acknowledge(r *reception) {
	if r == nil || !r.con {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if r.state == received {
		d.ack(r)
	}
}

// ack sends and remembers an empty ACK; mu is held.
func (d *datagram) ack(r *reception) {
	r.state = acknowledged
	d.rx.keep(r, emptyPacket(acknowledgement, r.id), &d.c.srv.cfg, d.c.srv.budget)
	d.reply(r)
}

// reject sends and remembers a RST.
func (d *datagram) reject(r *reception) {
	d.mu.Lock()
	defer d.mu.Unlock()
	r.state = answered
	d.rx.keep(r, emptyPacket(reset, r.id), &d.c.srv.cfg, d.c.srv.budget)
	d.reply(r)
}

// repeat answers a duplicate (RFC 7252, Section 4.5); mu is held.
func (d *datagram) repeat(r *reception) {
	switch {
	case !r.con && r.state != answered:
		// A duplicate of a NON is ignored.
	case r.state == received && r.ackDue != 0:
		d.ack(r) // it came again before the second was over: say that we are at it
	case r.state != received && !r.held:
		d.reply(r)
	}
}

// reply sends what r's message gets, or holds it until the address is proven; mu is held.
func (d *datagram) reply(r *reception) {
	if r.reply == nil {
		return
	}
	if (d.proven || len(r.reply) <= 3*r.size) && d.put(r.reply) {
		r.spend()
		return
	}
	if len(d.held) < maxHeld {
		r.held = true
		d.held = append(d.held, r)
	} else {
		r.spend()
	}
	d.probe()
}

const (
	maxHeld   = 4       // answers that wait for the proof of an address
	maxCredit = 4 << 10 // bytes that an address that is not proven can have in store
)

// put writes a datagram if the address may get one of this size; mu is held.
func (d *datagram) put(b []byte) bool {
	if d.closed {
		return true
	}
	if !d.proven {
		if len(b) > d.credit {
			return false
		}
		d.credit -= len(b)
	}
	d.write(b)
	return true
}

// write writes a datagram; mu is held.
func (d *datagram) write(b []byte) {
	if err := d.link.WriteDatagram(b); err != nil && !errors.Is(err, net.ErrClosed) {
		d.c.srv.metrics.dropped.WithLabelValues("unsent").Inc() // as if the network had lost it
	}
	d.c.bytesOut.Add(uint64(len(b)))
	d.c.srv.metrics.bytesOut.Add(float64(len(b)))
}

// send sends a request, an answer, or a notification. It never waits: what confirmable messages wait for is in the
// transmissions.
func (d *datagram) send(_ context.Context, m *Message, _ bool) error {
	settled := d.c.registering(m)
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || d.finished && m.from == nil {
		return net.ErrClosed
	}
	if m.from == nil {
		return d.confirm(m, nil)
	}
	r := m.from
	challenged := m.challenge && !d.proven && !d.link.proven() && d.size(m) > 3*r.size
	if challenged {
		m = d.challenge(m)
	}
	d.c.messagesOut.Add(1)
	d.c.srv.metrics.out[kindOf(m.Code)].Inc()
	switch {
	case r.state == answered || r.state == given:
		return nil // one answer a request
	case !r.con, challenged && r.state == acknowledged:
		// RFC 7252, Section 5.2.3; RFC 9175, Section 2.4, item 3: a challenge never goes in a confirmable message of its own.
		id, ok := d.messageID()
		if !ok {
			return errQueueFull
		}
		r.state = given
		if r.con { // duplicates get the ACK
			d.put(appendPacket(nil, nonConfirmable, id, m))
			return nil
		}
		r.reply = appendPacket(nil, nonConfirmable, id, m) // duplicates of a NON get nothing, so it is not kept
		d.reply(r)
		return nil
	case r.state == acknowledged: // RFC 7252, Section 5.2.2
		r.state = given
		return d.confirm(m, settled)
	}
	r.state = answered
	d.rx.keep(r, appendPacket(nil, acknowledgement, r.id, m), &d.c.srv.cfg, d.c.srv.budget)
	d.reply(r)
	return nil
}

// challenge is the answer that stands for m until the address is proven (RFC 9175, Section 2.4, item 3). It is shorter than
// three times any request. The value is of this session, which is one address's; mu is held.
func (d *datagram) challenge(m *Message) *Message {
	if d.echo == nil {
		d.echo = make([]byte, 8)
		_, _ = rand.Read(d.echo) // never fails
	}
	return &Message{Code: codes.Unauthorized, Token: m.Token, Options: AddOption(nil, EchoOption, d.echo), from: m.from}
}

// echoed takes a request that has the value of a challenge for a proof of the address: nobody else has read it.
func (d *datagram) echoed(m *Message, now time.Duration) {
	v, ok := m.Option(EchoOption)
	if !ok {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.proven && d.echo != nil && bytes.Equal(v, d.echo) {
		d.heard(now)
	}
}

// quiet settles a request that gets no answer (RFC 7967, Section 2): a confirmable one is still acknowledged.
func (d *datagram) quiet(m *Message) { d.acknowledge(m.from) }
