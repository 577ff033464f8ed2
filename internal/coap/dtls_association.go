package coap

import (
	"bytes"
	"container/list"
	"context"
	"crypto/sha256"
	"crypto/x509"
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
	// maxRecord is the largest datagram that pion reads, and that we seal.
	maxRecord = 8192
	// ringLength and ringBytes bound what waits for pion, or for the session to begin; further datagrams are lost.
	ringLength = 64
	ringBytes  = 32 << 10
)

var (
	errWrongKey    = errors.New("the key is not that of the identity")
	errEvictedHalf = errors.New("too many handshakes under way")
	errRestarted   = errors.New("the peer began again")
)

// route is one way to the peer: an address of ours and one of the peer's. pion takes it for the peer's net.Addr.
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
	since  time.Duration   // when its ClientHello came
	conn   *dtls.Conn      // of the handshake, whose goroutine alone uses it; nil afterwards
	ctx    context.Context // of the handshake
	cancel context.CancelCauseFunc
	prefix netip.Prefix

	// Guarded by the listener's mu.
	half            *halfOpen // where it is listed, at inAll and inPrefix
	inAll, inPrefix *list.Element
	listed          time.Duration
	muted           *list.Element

	cid  connectionID // set when hasCID is
	peer PeerCredential

	mu      sync.Mutex
	changed *sync.Cond // on mu: what pion's reader and the drain wait for
	stage   stage
	hasCID  bool
	route   *route // in use
	routes  []*route
	keys    *cipherState // once the handshake is complete
	ring    []arrival    // what waits for pion, or for the session
	bytes   int          // in the ring
	waiting bool         // pion waits for a datagram: it has done with all before
	sealing bool         // our Finished is on its way: from now on all is sealed, and not for pion
	expired bool         // pion wants no more to read
	closed  bool         // pion has closed
	session *datagram
	opened  bool // the reader brings the session what comes
	heard   bool // application data came

	// During the handshake.
	taken   int
	inSeq   uint64 // of epoch 0, as pion sees it
	cookie  []byte
	flight  [][]byte // what we sent since we last took something
	flown   int
	repeats int
	nextSeq uint64 // of epoch 0
	chain   []*x509.Certificate
	asked   bool              // the key of an identity was asked for
	keyHash [sha256.Size]byte // of that key
	sealed  int               // encrypted records since
	said    []byte            // an alert of the peer that proves nothing
	refused bool              // pion would have sent bad_certificate
	nothing bool              // the peer has shown no credential, and one is demanded
}

// arrival is a datagram of one association, without the records that are not taken.
type arrival struct {
	from endpoints
	b    []byte
}

// wire is the association as pion sees it.
type wire struct{ *association }

// ReadFrom gives pion the next datagram. It is called from one goroutine of pion's.
func (w wire) ReadFrom(b []byte) (int, net.Addr, error) {
	a := w.association
	a.mu.Lock()
	defer a.mu.Unlock()
	for (len(a.ring) == 0 || a.sealing) && !a.closed && !a.expired { // what follows our Finished is not for pion
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
	next := a.ring[0].b
	a.ring[0] = arrival{}
	a.ring = a.ring[1:]
	a.bytes -= len(next)
	return copy(b, next), a.route, nil
}

// WriteTo sends one datagram of pion's, all of which belong to the handshake.
func (w wire) WriteTo(b []byte, _ net.Addr) (int, error) {
	a := w.association
	a.mu.Lock()
	if a.closed {
		a.mu.Unlock()
		return 0, net.ErrClosed
	}
	was := a.stage
	if a.stage >= complete { // the close_notify of a connection that goes on without pion
		a.mu.Unlock()
		return len(b), nil
	}
	a.sent(b)
	if a.withholds(b) {
		a.mu.Unlock()
		return len(b), nil
	}
	verifiedNow, r := was == unverified && a.stage == verified, a.route
	a.mu.Unlock()
	if verifiedNow {
		a.l.promote(a)
	}
	a.write(r, b)
	if verifiedNow {
		a.l.callIn()
	}
	return len(b), nil
}

// write sends a datagram, or loses it as the network may; that is no reason for anybody to give up.
func (a *association) write(r *route, b []byte) {
	if err := a.l.write(b, r.control, r.ends); err != nil && !errors.Is(err, net.ErrClosed) {
		a.l.drop("unsent")
	}
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
	w.changed.Broadcast()
	return nil
}

func (w wire) LocalAddr() net.Addr { return w.l.sock.localAddr(w.first) }

func (w wire) SetDeadline(t time.Time) error { return w.SetReadDeadline(t) }

// SetReadDeadline is how pion ends a read: a time long ago now, none afterwards.
func (w wire) SetReadDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.expired = !t.IsZero()
	w.changed.Broadcast()
	return nil
}

func (w wire) SetWriteDeadline(time.Time) error { return nil }

// opening reports whether a record may come during the handshake, or in the clear; one that may not is dropped, so that
// nobody who forges one ends it. mu is held.
func (a *association) opening(r record) bool {
	switch {
	case a.sealing:
		// It waits until the keys are here. Our last flight may have been lost, and the peer's repetition of its own is known by
		// the Finished: what nothing seals is not believed.
		return r.epoch == dataEpoch && r.typ != recordChange
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
	switch {
	case a.stage == over, a.closed && a.keys == nil:
		a.mu.Unlock()
		return
	case a.opened:
		a.mu.Unlock()
		for i := range recs {
			a.accept(&recs[i], e)
		}
		return
	case a.route.ends != e && !a.sealing: // a handshake has one way
		a.mu.Unlock()
		a.l.drop("record")
		return
	}
	size := 0
	for i := range recs {
		if r := &recs[i]; !a.opening(*r) {
			r.raw = nil
		}
		size += len(recs[i].raw)
	}
	wrongKey := a.sealed >= 3 && !a.sealing
	room := size <= maxRecord && len(a.ring) < ringLength && a.bytes+size <= ringBytes
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
		a.ring = append(a.ring, arrival{e, b})
		a.bytes += size
		if !a.sealing {
			a.flight, a.flown = nil, 0
		}
		a.changed.Broadcast()
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

// established takes the keys from pion and lets it go.
func (a *association) established() error {
	a.mu.Lock()
	a.stage = complete // nothing of pion's gets out any more: what it numbers from here on would take a number of ours
	a.mu.Unlock()
	keys, err := newCipherState(a.conn)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.keys = keys
	a.mu.Unlock()
	_ = a.conn.Close()
	a.conn = nil
	return nil
}

// open brings the session what has come already; what comes afterwards is the reader's to bring.
func (a *association) open() {
	for {
		a.mu.Lock()
		early := a.ring
		a.ring, a.bytes = nil, 0
		if len(early) == 0 || a.stage == over {
			a.opened = true
			a.mu.Unlock()
			return
		}
		a.mu.Unlock()
		for _, at := range early {
			for rest := at.b; len(rest) > 0; {
				r, more, ok := nextRecord(rest)
				if !ok {
					break
				}
				a.accept(&r, at.from)
				rest = more
			}
		}
	}
}

// accept opens one record and brings what is in it to the session. Calls must not overlap.
func (a *association) accept(r *record, e endpoints) {
	typ, content, newest, ok := a.keys.open(r)
	if !ok {
		a.l.drop("record")
		return
	}
	if typ == recordHandshake {
		a.repeat() // it may be an old one, and says nothing of where the peer is
		return
	}
	a.mu.Lock()
	left := a.route
	from := left
	if from.ends != e {
		from = a.way(e)
	}
	moved := newest && from != left
	if moved {
		// RFC 9146, Section 6: the address changes with a record that is valid and the newest.
		a.route = from
		from.proven, from.stale, from.in, from.out = false, false, 0, 0
	}
	from.in += len(r.raw)
	found := from.stale && from == a.route // whoever had the address since has gone
	if found {
		from.stale = false
	}
	a.mu.Unlock()
	if moved || found {
		a.l.rerouted(a, left, from)
	}
	if moved {
		a.session.relocated(len(content))
	}
	switch {
	case typ == recordData:
		a.mu.Lock()
		a.heard, a.flight = true, nil
		a.mu.Unlock()
		a.session.deliver(content)
	case typ == recordAlert && len(content) == 2 && (content[0] == alertFatal || content[1] == alertClose):
		// The peer's key has sealed it (RFC 5246, Section 7.2.1). Warnings end nothing.
		a.session.lost(io.EOF)
	}
}

// repeat sends our last flight again to a peer that repeats its own, whose Finished this was (RFC 6347, Section 4.2.4), until
// it says something.
func (a *association) repeat() {
	a.mu.Lock()
	if a.heard || a.repeats >= maxRepeats || !a.route.proven || a.route.stale {
		a.mu.Unlock()
		return
	}
	a.repeats++
	flight, r := a.flight, a.route
	a.mu.Unlock()
	for _, b := range flight {
		a.write(r, b)
	}
}

// way finds or makes the route of a datagram that the peer has sealed, of an association with a connection ID. mu is held.
func (a *association) way(e endpoints) *route {
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
	if a.l.write(b, r.control, r.ends) != nil {
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
		a.write(r, b)
	}
}

// confirmed notes that the session has proven the route.
func (a *association) confirmed() {
	a.mu.Lock()
	a.route.proven = true
	a.mu.Unlock()
}

var sealBuffers = sync.Pool{New: func() any { return new([maxRecord + maxOverhead]byte) }}

// WriteDatagram implements packetLink.
func (a *association) WriteDatagram(b []byte) error { return a.send(recordData, b) }

// send seals one record and sends it by the route in use, or loses it.
func (a *association) send(typ byte, content []byte) error {
	buf := sealBuffers.Get().(*[maxRecord + maxOverhead]byte)
	defer sealBuffers.Put(buf)
	a.mu.Lock()
	if a.stage == over || a.keys.next > maxSequence {
		a.mu.Unlock()
		return net.ErrClosed
	}
	r := a.route
	size := a.keys.size(len(content))
	switch {
	case r.stale:
		a.mu.Unlock()
		return nil // it would only reach somebody else
	case !r.proven && r.out+size > 3*r.in:
		// RFC 9146, Section 6: the new address may be somebody else's, to whom the peer wants us to send.
		a.mu.Unlock()
		a.l.drop("unproven")
		return nil
	case !r.proven:
		r.out += size
	}
	seq := a.keys.next
	a.keys.next++
	a.mu.Unlock()
	a.write(r, a.keys.seal(buf[:0], seq, typ, content))
	return nil
}

// Close implements packetLink: it says close_notify and forgets the association.
func (a *association) Close() error {
	err := a.send(recordAlert, []byte{alertWarning, alertClose})
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
