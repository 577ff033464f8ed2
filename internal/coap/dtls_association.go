package coap

import (
	"bytes"
	"container/list"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/pion/dtls/v3"
)

// stage is how far an association has come.
type stage uint8

const (
	unverified stage = iota // its address has not been seen to receive anything
	verified                // the cookie came back; the handshake is under way
	complete                // a session, or about to become one
	over
)

// Bounds of what one association may keep.
const (
	// maxHandshakeInput is what a handshake may cost in bytes received: pion keeps fragments until they are whole.
	maxHandshakeInput = 64 << 10
	// maxUnverifiedInput is the same before the cookie came back.
	maxUnverifiedInput = 4 << 10
	// maxFlight bounds what is kept of our last flight, to repeat it.
	maxFlight = 16 << 10
	// maxSealed is the largest encrypted record that is taken during a handshake, where only a Finished can be due.
	maxSealed = 512
	// maxRepeats bounds how often the peer can make us repeat a flight.
	maxRepeats = 8
	// maxRecord is the largest datagram that pion reads.
	maxRecord = 8192
)

var (
	errWrongKey    = errors.New("the key is not that of the identity")
	errEvictedHalf = errors.New("too many handshakes under way")
	errRestarted   = errors.New("the peer began again")
)

// route is one way to the peer: an address of ours and one of the peer's. pion takes it for the peer's net.Addr and compares
// pointers, so there is one for each pair of addresses of an association.
type route struct {
	ends    endpoints
	control []byte
	remote  net.Addr

	// Guarded by the association's mu.
	in, out int  // bytes, while the route is not proven
	proven  bool // the peer has answered what only went there
	stale   bool // somebody else is there now
}

func (r *route) Network() string { return "udp" }
func (r *route) String() string  { return r.remote.String() }

// maxRoutes bounds the routes an association remembers besides the one in use.
const maxRoutes = 4

// association is one DTLS association: below pion it is a net.PacketConn (through wire), above it the link of a session.
//
// Order of locks: the session's, pion's and the listener's before the association's. Neither of the last two is held while pion
// or the session is called.
type association struct {
	l      *dtlsListener
	first  endpoints
	random helloRandom
	since  time.Duration // when its ClientHello came
	conn   *dtls.Conn
	ctx    context.Context // of the handshake
	cancel context.CancelCauseFunc
	prefix netip.Prefix

	// Guarded by the listener's mu.
	half            *halfOpen // where it is listed, at inAll and inPrefix
	inAll, inPrefix *list.Element
	muted           *list.Element

	cid  connectionID // set when hasCID is
	peer PeerCredential

	mu      sync.Mutex
	changed *sync.Cond // on mu: what pion's reader and the drain wait for
	stage   stage
	hasCID  bool
	route   *route // in use
	routes  []*route
	ring    []arrival
	bytes   int // in the ring
	reads   uint64
	waiting bool   // pion waits for a datagram: it has done with all before
	given   *route // not nil: pion looks at a datagram that came by another route
	sealing bool   // our Finished is on its way: from now on application data may come
	moved   bool   // the route has changed, and the session does not know
	expired bool   // pion wants no more to read
	closed  bool   // pion has closed
	drains  bool   // a drain is running
	session *datagram
	heard   bool // application data came

	// During the handshake.
	taken   int
	inSeq   uint64 // of epoch 0, as pion sees it
	cookie  []byte
	flight  [][]byte // what we sent since we last took something
	flown   int
	repeats int
	nextSeq uint64            // of epoch 0
	asked   bool              // the key of an identity was asked for
	keyHash [sha256.Size]byte // of that key
	sealed  int               // encrypted records since
	said    []byte            // an alert of the peer that proves nothing
	refused bool              // pion would have sent bad_certificate
	nothing bool              // the peer has shown no credential, and one is demanded
}

// arrival is a datagram of one association, without what is not for pion.
type arrival struct {
	from *route
	b    []byte
}

// wire is the association as pion sees it.
type wire struct{ *association }

// ReadFrom gives pion the next datagram. It is called from one goroutine of pion's.
func (w wire) ReadFrom(b []byte) (int, net.Addr, error) {
	a := w.association
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.given != nil {
		a.mu.Unlock()
		a.judged()
		a.mu.Lock()
	}
	a.reads++
	a.changed.Broadcast()
	for len(a.ring) == 0 && !a.closed && !a.expired {
		a.waiting = true
		a.changed.Wait()
	}
	a.waiting = false
	switch {
	case a.closed:
		return 0, nil, net.ErrClosed
	case a.expired:
		return 0, nil, os.ErrDeadlineExceeded
	}
	next := &a.ring[0]
	from, p := next.from, next.b
	if from != a.route {
		// One record at a time, so that it is known which of them moved the peer.
		if r, rest, ok := nextRecord(p); ok && len(rest) > 0 {
			p, next.b = r.raw, rest
		} else {
			next = nil
		}
		a.given = from
	} else {
		next = nil
	}
	if next == nil {
		a.ring[0] = arrival{}
		if a.ring = a.ring[1:]; len(a.ring) == 0 {
			a.ring = nil
		}
	}
	a.bytes -= len(p)
	return copy(b, p), from, nil
}

// judged notes what pion made of a datagram that came by another route. RFC 9146, Section 6: the address changes with a record
// that is valid and the newest.
func (a *association) judged() {
	chosen, _ := a.conn.RemoteAddr().(*route)
	a.mu.Lock()
	a.given = nil
	left := a.route
	moved := chosen != nil && chosen != left
	if moved {
		a.route, a.moved = chosen, true
		chosen.proven, chosen.stale, chosen.out = false, false, 0
	}
	a.mu.Unlock()
	if moved {
		a.l.rerouted(a, left, chosen)
	}
}

// WriteTo sends one datagram of pion's by the route it has chosen.
func (w wire) WriteTo(b []byte, to net.Addr) (int, error) {
	a := w.association
	r, ok := to.(*route)
	if !ok {
		return 0, &net.AddrError{Err: "not a route of this association", Addr: to.String()}
	}
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return 0, net.ErrClosed
	}
	was := a.stage
	if a.stage < complete {
		a.sent(b)
		if a.withholds(b) {
			a.mu.Unlock()
			return len(b), nil
		}
	}
	verifiedNow := was == unverified && a.stage == verified
	switch {
	case r.stale:
		a.mu.Unlock()
		return len(b), nil // it would only reach somebody else
	case !r.proven && a.stage == complete:
		// RFC 9146, Section 6: the new address may be somebody else's, to whom the peer wants us to send.
		if r.out+len(b) > 3*r.in {
			a.mu.Unlock()
			a.l.drop("unproven")
			return len(b), nil
		}
		r.out += len(b)
	}
	a.mu.Unlock()
	if verifiedNow {
		a.l.promote(a)
	}
	if err := a.l.sock.write(b, r.control, r.ends); err != nil && !errors.Is(err, net.ErrClosed) {
		a.l.drop("unsent") // as if the network had lost it; no reason for pion to give up
	}
	return len(b), nil
}

// sent looks at what pion sends during the handshake; mu is held.
func (a *association) sent(b []byte) {
	rec, _, ok := nextRecord(b)
	if !ok {
		return
	}
	if rec.epoch == 0 && rec.typ == recordHandshake {
		switch rec.body[0] {
		case helloVerify:
			a.cookie = bytes.Clone(verifyCookie(rec.body))
		case helloAnswer:
			if a.stage == unverified {
				a.stage = verified
				a.route.proven = true // RFC 6347, Section 4.2.1
			}
		}
	}
	// What is sealed has the peer's connection ID, of another size than ours; nothing of epoch 0 follows it.
	for r, rest, ok := nextRecord(b); ok && r.epoch == 0 && r.typ != recordCID; r, rest, ok = nextRecord(rest) {
		a.nextSeq = max(a.nextSeq, r.seq+1)
		a.sealing = a.sealing || r.typ == recordChange // the Finished is next
	}
	if a.flown+len(b) <= maxFlight {
		a.flown += len(b)
		a.flight = append(a.flight, bytes.Clone(b))
	}
}

// withholds reports whether b is pion's alert for a certificate, which is bad_certificate whatever is wrong with it: the
// listener sends one that says why. mu is held.
func (a *association) withholds(b []byte) bool {
	r, _, ok := nextRecord(b)
	if !ok || r.epoch != 0 || r.typ != recordAlert || !bytes.Equal(r.body, []byte{alertFatal, alertBadCertificate}) || a.stage != verified || a.sealing {
		return false
	}
	a.refused = true
	return true
}

// Close ends the reading; pion calls it.
func (w wire) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	w.ring, w.bytes, w.given = nil, 0, nil
	w.changed.Broadcast()
	return nil
}

func (w wire) LocalAddr() net.Addr { return w.l.sock.localAddr(w.first) }

func (w wire) SetDeadline(t time.Time) error { return w.SetReadDeadline(t) }

// SetReadDeadline is how pion ends a read: a time long ago now, none afterwards. After the handshake it does so only to close,
// and Close ends the read as well; a reader that ended before would close ahead of the close_notify.
func (w wire) SetReadDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expired = !t.IsZero() && w.stage < complete
	w.changed.Broadcast()
	return nil
}

func (w wire) SetWriteDeadline(time.Time) error { return nil }

// opening reports whether a record may come during the handshake, or in the clear; one that may not is dropped, so that
// nobody who forges one ends it. mu is held.
func (a *association) opening(r record) bool {
	switch {
	case a.sealing:
		// Our last flight may have been lost: the peer repeats its own, until it says something.
		return r.typ == recordHandshake && isClientFlight(r.body) && !a.heard && a.grace(r)
	case r.epoch == 0 && r.typ == recordAlert:
		// Anybody can forge it, so it ends nothing; the peer that sent it is not going to go on.
		a.said = bytes.Clone(r.body[:min(len(r.body), 2)])
		return false
	case a.stage == unverified:
		return r.epoch == 0 && r.typ == recordHandshake && isClientHello(r.body) && a.grace(r)
	case r.epoch == 0:
		return (r.typ == recordHandshake && isClientFlight(r.body) ||
			r.typ == recordChange && len(r.body) == 1 && r.body[0] == 1) && a.grace(r)
	case r.epoch == 1 && (r.typ == recordHandshake || r.typ == recordCID) && len(r.raw) <= maxSealed:
		if a.asked && a.waiting {
			a.sealed++
		}
		return a.grace(r)
	}
	return false
}

// grace bounds what a handshake may cost; mu is held.
func (a *association) grace(r record) bool {
	most := maxHandshakeInput
	if a.stage == unverified {
		most = maxUnverifiedInput
	}
	if a.taken+len(r.raw) > most {
		return false
	}
	a.taken += len(r.raw)
	return true
}

// push takes the records of one datagram that are for this association. It never blocks.
func (a *association) push(recs []record, e endpoints) {
	a.mu.Lock()
	if a.closed || a.stage == over {
		a.mu.Unlock()
		return
	}
	from := a.way(e)
	if from == nil {
		a.mu.Unlock()
		a.l.drop("record")
		return
	}
	size := 0
	for i := range recs {
		r := &recs[i]
		switch {
		case (!a.sealing || r.epoch == 0) && !a.opening(*r):
			r.raw = nil
		case a.sealing && (r.epoch > 1 || r.epoch == 1 && r.typ == recordChange):
			// There is no second epoch. pion would keep its records, and believe a change_cipher_spec, which no key seals.
			r.raw = nil
		}
		size += len(r.raw)
	}
	wrongKey := a.sealed >= 3 && !a.sealing
	conf := &a.l.conf
	room := size <= maxRecord && len(a.ring) < conf.RingLength && a.bytes+size <= conf.RingBytes
	if size > 0 && room {
		b := make([]byte, 0, size)
		for _, r := range recs {
			b = append(b, r.raw...)
			if r.raw != nil && r.epoch == 0 {
				// Nothing seals the number, and one forged high one would make pion take all others for old.
				putUint48(b[len(b)-len(r.raw)+5:], a.inSeq)
				a.inSeq++
			}
		}
		from.in += size
		a.ring = append(a.ring, arrival{from, b})
		a.bytes += size
		if a.stage < complete {
			a.flight, a.flown = nil, 0
		}
		a.changed.Broadcast()
		a.drain()
	}
	a.mu.Unlock()
	switch {
	case size == 0:
		a.l.drop("record")
	case !room:
		a.l.drop("ring") // the newest is lost; the peer sends it again
	}
	if wrongKey {
		a.refuse(errWrongKey, alertDecrypt)
	}
}

// way finds the route of a datagram; nil when it may not come from there. mu is held.
func (a *association) way(e endpoints) *route {
	if a.route.ends == e {
		return a.route
	}
	if a.stage < complete || !a.hasCID {
		return nil
	}
	for _, r := range a.routes {
		if r.ends == e {
			return r
		}
	}
	r := a.l.newRoute(e)
	kept := a.routes[:0]
	for _, old := range a.routes {
		if old == a.route || len(a.routes) < maxRoutes {
			kept = append(kept, old)
		}
	}
	a.routes = append(kept, r)
	return r
}

// refuse ends a handshake with an alert that says why.
func (a *association) refuse(why error, description byte) {
	if a.alert(description) {
		a.cancel(why)
	}
}

// alert sends a fatal alert, and reports whether it still could. Nothing is encrypted yet, so pion need not write it.
func (a *association) alert(description byte) bool {
	a.mu.Lock()
	if a.stage != verified || a.sealing {
		a.mu.Unlock()
		return false
	}
	b, r := plainAlert(a.nextSeq, description), a.route
	a.nextSeq++
	a.mu.Unlock()
	if a.l.sock.write(b, r.control, r.ends) != nil {
		a.l.drop("unsent")
	}
	return true
}

// again repeats our last flight to a peer that repeats its ClientHello (RFC 6347, Section 4.2.4): pion waits for its own
// timer, which is a slow one.
func (a *association) again() {
	a.mu.Lock()
	if a.repeats >= maxRepeats || !a.waiting {
		a.mu.Unlock()
		return
	}
	a.repeats++
	flight, r := a.flight, a.route
	a.mu.Unlock()
	for _, b := range flight {
		if a.l.sock.write(b, r.control, r.ends) != nil {
			a.l.drop("unsent")
		}
	}
}

// drain starts the goroutine that brings decrypted datagrams to the session; it ends when there is nothing left, so that an
// idle session has none. mu is held.
func (a *association) drain() {
	if a.session == nil || a.drains {
		return
	}
	a.drains = true
	a.l.wg.Add(1)
	go a.deliver()
}

// drainPause is how long a drain waits for one more datagram.
const drainPause = time.Second

var drainBuffers = sync.Pool{New: func() any { return new([maxRecord]byte) }}

func (a *association) deliver() {
	defer a.l.wg.Done()
	buf := drainBuffers.Get().(*[maxRecord]byte)
	defer drainBuffers.Put(buf)
	for {
		a.mu.Lock()
		// While pion waits it has given away all that it had: what a read finds now is the last.
		idle, reads := a.waiting && len(a.ring) == 0, a.reads
		a.mu.Unlock()
		_ = a.conn.SetReadDeadline(time.Now().Add(drainPause))
		n, err := a.conn.Read(buf[:])
		var late net.Error
		switch {
		case err == nil:
			a.delivered(buf[:n])
		case errors.As(err, &late) && late.Timeout():
			a.mu.Lock()
			if idle && a.waiting && len(a.ring) == 0 && reads == a.reads {
				a.drains = false
				a.mu.Unlock()
				return
			}
			a.mu.Unlock()
		case errors.Is(err, io.EOF), errors.Is(err, net.ErrClosed), errors.Is(err, dtls.ErrConnClosed):
			// A close_notify or a fatal alert that the peer's key has sealed (RFC 5246, Section 7.2.1), or our own end.
			a.session.lost(io.EOF)
			return
		}
		// Other errors are warnings of the peer's, which end nothing.
	}
}

// delivered brings one datagram to the session, after pion has decided where the peer is.
func (a *association) delivered(b []byte) {
	a.mu.Lock()
	for a.given != nil && !a.closed {
		a.changed.Wait()
	}
	moved := a.moved
	a.moved, a.heard = false, true
	unmute := a.route.stale
	a.route.stale = false
	a.flight = nil
	a.mu.Unlock()
	if unmute {
		a.l.unmute(a)
	}
	if moved {
		a.session.relocated(len(b))
	}
	a.session.deliver(b)
}

// confirmed notes that the session has proven the route.
func (a *association) confirmed() {
	a.mu.Lock()
	a.route.proven = true
	a.mu.Unlock()
}

// WriteDatagram implements packetLink.
func (a *association) WriteDatagram(b []byte) error {
	_, err := a.conn.Write(b)
	return err
}

// Close implements packetLink: it says close_notify and forgets the association.
func (a *association) Close() error {
	err := a.conn.Close()
	a.mu.Lock()
	a.stage = over
	a.mu.Unlock()
	a.l.forget(a)
	return err
}

func (a *association) proven() bool { return true }

func (a *association) describe(info *ConnInfo) {
	a.mu.Lock()
	r := a.route
	a.mu.Unlock()
	info.Secure = true
	info.Peer = a.peer
	info.Local, info.Remote = a.l.sock.localAddr(r.ends), r.remote
}
