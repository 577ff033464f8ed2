package coap

import (
	"bytes"
	"container/list"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/netip"
	"sync"
	"time"

	"github.com/pion/dtls/v3"
)

// dtlsListener is one call of ServeDTLS. It reads the socket and brings each record to its association: by connection ID,
// else by the pair of addresses. At most three associations have one pair: the one that is a session, one whose handshake is
// under way, and one that has not shown its cookie; none of them can end one that has come further.
type dtlsListener struct {
	srv      *Server
	conf     DTLSConfig
	sock     *socket
	sessions *sessions
	wg       sync.WaitGroup // handshakes and drains
	ctx      context.Context
	stop     context.CancelFunc
	taking   sync.Mutex // held by who brings a datagram; before all others in their order

	mu       sync.Mutex
	closing  bool
	byCID    map[connectionID]*association
	open     map[endpoints]*association // sessions
	fresh    map[endpoints]*association // unverified
	shaking  map[endpoints]*association // verified
	mute     *list.List                 // sessions whose address somebody else has now, oldest first
	halfOpen [2]halfOpen                // by stage: unverified, verified
	grey     *greylist                  // made when it is first needed
	waiting  [2]waitingRoom             // by the stage that they would come to
}

// halfOpen are handshakes of one stage, oldest first. The stages have lists of their own, so that a flood of ClientHellos
// with forged addresses pushes out no peer whose address is proven.
type halfOpen struct {
	all    *list.List
	prefix map[netip.Prefix]*list.List
}

func (h *halfOpen) add(a *association, now time.Duration) {
	if h.all == nil {
		h.all, h.prefix = list.New(), make(map[netip.Prefix]*list.List)
	}
	p := h.prefix[a.prefix]
	if p == nil {
		p = list.New()
		h.prefix[a.prefix] = p
	}
	a.half, a.inAll, a.inPrefix, a.listed = h, h.all.PushBack(a), p.PushBack(a), now
}

// unlist takes a out of the list it is in.
func (a *association) unlist() {
	h := a.half
	if h == nil {
		return
	}
	h.all.Remove(a.inAll)
	p := h.prefix[a.prefix]
	if p.Remove(a.inPrefix); p.Len() == 0 {
		delete(h.prefix, a.prefix)
	}
	a.half, a.inAll, a.inPrefix = nil, nil, nil
}

// over returns the one that has to go for another one of that prefix, if any. It is none of those who have begun just now in a
// network that is full; then full says so.
func (h *halfOpen) over(prefix netip.Prefix, conf *DTLSConfig, now time.Duration) (victim *association, full bool) {
	if p := h.prefix[prefix]; p != nil && p.Len() >= conf.MaxPerPrefix {
		if oldest := p.Front().Value.(*association); now-oldest.listed >= begunTime {
			return oldest, false
		}
		full = true
	}
	if h.all != nil && h.all.Len() >= conf.MaxHandshakes {
		return h.all.Front().Value.(*association), full
	}
	return nil, full
}

// of counts those of a prefix.
func (h *halfOpen) of(prefix netip.Prefix) int {
	if p := h.prefix[prefix]; p != nil {
		return p.Len()
	}
	return 0
}

// crowdedHere reports that half of what there is for that prefix is taken.
func (h *halfOpen) crowdedHere(prefix netip.Prefix, conf *DTLSConfig) bool {
	return 2*h.of(prefix) >= conf.MaxPerPrefix
}

// crowded reports that half of what there is for that prefix, or for all, is taken.
func (h *halfOpen) crowded(prefix netip.Prefix, conf *DTLSConfig) bool {
	return h.crowdedHere(prefix, conf) || h.all != nil && 2*h.all.Len() >= conf.MaxHandshakes
}

// greylist remembers ClientHellos for a while, roughly. pion makes the cookie, and keeps one association for each; when
// these get many, only who asks twice gets one. A flood with forged addresses seldom repeats itself, a device always does.
type greylist [1 << 16]struct{ sum, at uint32 } // at: milliseconds, zero is never

const (
	greyAfter = 500 * time.Millisecond // RFC 6347, Section 4.2.4.1: the first repetition is due after a second
	greyUntil = 70 * time.Second       // and no later than after a minute
)

// again reports whether the same was seen, long enough ago to be a repetition.
func (g *greylist) again(sum uint64, now time.Duration) bool {
	ms := uint32(now/time.Millisecond) | 1 //nolint:gosec // wraps after 49 days, which costs a repetition
	e := &g[sum%uint64(len(g))]
	if tag := uint32(sum >> 32); e.at == 0 || e.sum != tag || ms-e.at > uint32(greyUntil/time.Millisecond) { //nolint:gosec // cut on purpose
		e.sum, e.at = tag, ms
		return false
	}
	return ms-e.at >= uint32(greyAfter/time.Millisecond)
}

// Network is what is taken for one owner of addresses: the smallest networks that are routed by themselves (IPv4 /24, IPv6 /56).
func Network(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 24
	if a.Is6() {
		bits = 56
	}
	p, _ := a.Prefix(bits)
	return p
}

func (l *dtlsListener) drop(why string) { l.srv.metrics.dropped.WithLabelValues(why).Inc() }

func (l *dtlsListener) newRoute(e endpoints) *route {
	r := &route{ends: e, remote: net.UDPAddrFromAddrPort(e.remote)}
	if e.via == 0 {
		r.control = l.sock.control(e)
	}
	return r
}

// route brings the records of one datagram to their associations. b is the caller's.
func (l *dtlsListener) route(b []byte, e endpoints) {
	var room [8]record
	recs := room[:0]
	for rest := b; len(rest) > 0; {
		r, more, ok := nextRecord(rest)
		if !ok {
			l.drop("record")
			break
		}
		recs, rest = append(recs, r), more
	}
	// Runs of records for the same association go together. There are few: a datagram with several is part of a handshake.
	for len(recs) > 0 {
		n := 1
		for n < len(recs) && sameWay(recs[0], recs[n]) {
			n++
		}
		l.deliver(recs[:n], e)
		recs = recs[n:]
	}
}

// sameWay reports that two records of one datagram are for the same association.
func sameWay(a, b record) bool {
	if a.typ == recordCID || b.typ == recordCID {
		return a.typ == b.typ && a.cid == b.cid
	}
	return !opensHandshake(a) && !opensHandshake(b) && (a.epoch == 0) == (b.epoch == 0)
}

func opensHandshake(r record) bool {
	return r.epoch == 0 && r.typ == recordHandshake && isClientHello(r.body)
}

func (l *dtlsListener) deliver(recs []record, e endpoints) {
	r := recs[0]
	if e.via != 0 && r.typ != recordCID { // nothing else is passed on
		l.drop("record")
		return
	}
	if opensHandshake(r) {
		if l.srv.draining.Err() != nil { // its next one goes to another server
			l.drop("closing")
			return
		}
		l.hello(recs[:1], e)
		return
	}
	l.mu.Lock()
	var to [2]*association
	switch {
	case r.typ == recordCID:
		to[0] = l.byCID[r.cid]
	case r.epoch == 0:
		if to[0] = l.shaking[e]; to[0] == nil {
			to[0] = l.open[e]
		}
		if r.typ == recordAlert && to[0] == nil {
			to[0] = l.fresh[e]
		}
	default:
		// After a reboot nobody can tell whose it is but by the key. A peer that has a connection ID uses it (RFC 9146,
		// Section 3).
		to[0] = l.shaking[e]
		if a := l.open[e]; a != nil && !a.hasCID {
			to[1] = a
		}
	}
	l.mu.Unlock()
	if to[0] == nil && to[1] == nil {
		if r.typ == recordCID && l.foreign(recs, e) {
			return
		}
		l.drop("unknown") // of an association that is gone, mostly; RFC 6347, Section 4.1.2.7: discarded silently
		return
	}
	for i, a := range to {
		if a == nil {
			continue
		}
		mine := recs
		if i == 0 && to[1] != nil {
			mine = append([]record(nil), recs...) // push picks among them
		}
		a.push(mine, e)
	}
}

// hello takes a ClientHello. One on a live address begins a second association, which replaces the old one when its
// handshake is complete (RFC 6347, Section 4.2.8).
func (l *dtlsListener) hello(recs []record, e endpoints) {
	h, ok := parseClientHello(recs[0].body)
	if !ok {
		l.drop("record")
		return
	}
	l.mu.Lock()
	fresh, shaking, old := l.fresh[e], l.shaking[e], l.open[e]
	l.mu.Unlock()
	if len(h.cookie) > 0 {
		for _, a := range []*association{fresh, shaking} {
			if a == nil {
				continue
			}
			a.mu.Lock()
			known := len(a.cookie) > 0 && bytes.Equal(a.cookie, h.cookie)
			first := a.stage == unverified
			a.mu.Unlock()
			switch {
			case known && first:
				if l.full(verified, a.prefix) {
					l.putOff(recs[0], verified, e)
					return
				}
				l.mu.Lock()
				l.waiting[verified].forget(e)
				l.mu.Unlock()
				a.push(recs, e)
				return
			case known:
				a.again()
				return
			}
		}
		// A cookie that is not ours, or an old one. pion would end the handshake that is under way.
		l.drop("cookie")
		return
	}
	for _, a := range []*association{shaking, old} {
		// One that comes late, but no later than the network can be: a device that begins with the same random after each reboot
		// is not to wait for the end of its old session.
		if a != nil && a.random == h.random && l.srv.now()-a.since < l.srv.cfg.exchangeLifetime() {
			l.drop("duplicate")
			return
		}
	}
	if fresh != nil && fresh.random == h.random {
		// The HelloVerifyRequest was lost, or one of two was (RFC 6347, Section 4.2.1: each is answered).
		fresh.again()
		return
	}
	if prefix := Network(e.remote.Addr()); l.tooMany(h, e) || l.full(unverified, prefix) {
		l.mu.Lock()
		own := l.halfOpen[unverified].crowdedHere(prefix, &l.conf)
		l.mu.Unlock()
		if own {
			l.putOff(recs[0], unverified, e)
		} else { // a flood from everywhere: who waited would go around the greylist
			l.lose(1)
		}
		return
	}
	l.begin(recs, h, e)
}

// begunTime is for how long a handshake does not give way to others of its own network: what a device with a slow radio needs
// between two of its messages (RFC 7925, Section 11). One that gave way has to begin anew, with another cookie, and few devices
// do before they have given up.
const begunTime = 9 * time.Second

// full reports that a network has as many handshakes of a stage as it may, and that the oldest of them has begun just now. It
// goes on rather than give way, else none of a fleet that comes back at once, behind one address, gets to its end. Whoever came
// now waits, and comes again (RFC 6347, Section 4.2.4).
func (l *dtlsListener) full(s stage, prefix netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	_, full := l.halfOpen[s].over(prefix, &l.conf, l.srv.now())
	return full
}

// tooMany reports that a ClientHello has to come again before it is worth an association.
func (l *dtlsListener) tooMany(h clientHello, e endpoints) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.halfOpen[unverified].crowded(Network(e.remote.Addr()), &l.conf) {
		return false
	}
	if l.grey == nil {
		l.grey = new(greylist)
	}
	return !l.grey.again(maphash.Comparable(seed, greyKey{e.remote, h.random}), l.srv.now())
}

type greyKey struct {
	from   netip.AddrPort
	random helloRandom
}

// begin makes an association for a ClientHello.
func (l *dtlsListener) begin(recs []record, h clientHello, e endpoints) {
	if !l.srv.room() && !l.replaceable() {
		l.srv.refuse(net.UDPAddrFromAddrPort(e.remote), "max-connections", fmt.Sprintf("%d connections are open", l.srv.cfg.MaxConnections))
		return
	}
	a := &association{l: l, first: e, random: h.random, since: l.srv.now(), route: l.newRoute(e), prefix: Network(e.remote.Addr())}
	a.changed = sync.NewCond(&a.mu)
	a.routes = []*route{a.route}
	ctx, cancel := context.WithTimeout(l.ctx, l.conf.HandshakeTimeout)
	a.ctx, a.cancel = context.WithCancelCause(ctx)
	conn, err := dtls.ServerWithOptions(wire{a}, a.route, l.options(a)...)
	if err != nil {
		cancel()
		l.srv.log.Error("cannot begin a DTLS handshake", "error", err)
		l.srv.refuse(a.route.remote, "handshake-failed", err.Error())
		return
	}
	a.conn = conn
	half := &l.halfOpen[unverified]
	l.mu.Lock()
	if l.closing {
		l.mu.Unlock()
		cancel()
		return
	}
	restarted := l.fresh[e]
	if restarted != nil && restarted.random == h.random { // it came again while the one that waited was called in
		l.mu.Unlock()
		cancel()
		return
	}
	victim, full := half.over(a.prefix, &l.conf, l.srv.now())
	if full { // since hello looked
		l.mu.Unlock()
		cancel()
		l.putOff(recs[0], unverified, e)
		return
	}
	l.waiting[unverified].forget(e)
	if victim != nil {
		victim.unlist()
		delete(l.fresh, victim.first)
	}
	if restarted != nil {
		restarted.unlist()
	}
	l.fresh[e] = a
	half.add(a, l.srv.now())
	l.wg.Add(1)
	l.mu.Unlock()
	if victim != nil {
		victim.cancel(errEvictedHalf)
	}
	if restarted != nil {
		restarted.cancel(errRestarted)
	}
	a.push(recs, e)
	go func() {
		defer l.wg.Done()
		defer cancel()
		l.handshake(a)
	}()
}

// promote moves an association on: its cookie came back.
func (l *dtlsListener) promote(a *association) {
	half := &l.halfOpen[verified]
	l.mu.Lock()
	a.unlist()
	if l.fresh[a.first] == a {
		delete(l.fresh, a.first)
	}
	// There may be more of a network than it may have, as many as it had cookies out when it became full.
	victim, _ := half.over(a.prefix, &l.conf, l.srv.now())
	if victim != nil {
		victim.unlist()
		delete(l.shaking, victim.first)
	}
	restarted := l.shaking[a.first]
	if restarted != nil {
		restarted.unlist()
	}
	l.shaking[a.first] = a
	half.add(a, l.srv.now())
	l.mu.Unlock()
	if victim != nil {
		victim.cancel(errEvictedHalf)
	}
	if restarted != nil {
		restarted.cancel(errRestarted)
	}
}

// newCID makes and registers the association's connection ID, once its peer has asked for one.
func (l *dtlsListener) newCID(a *association) []byte {
	id := l.conf.newCID()
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.byCID[id] != nil {
		id = l.conf.newCID()
	}
	l.byCID[id] = a
	a.mu.Lock()
	a.cid, a.hasCID = id, true
	a.mu.Unlock()
	return id[:]
}

// handshake completes an association, or says why not.
func (l *dtlsListener) handshake(a *association) {
	s := l.srv
	err := a.conn.HandshakeContext(a.ctx)
	if err == nil {
		err = a.established()
	}
	if err == nil {
		s.metrics.handshakes.WithLabelValues("ok").Inc()
		l.begun(a)
		l.callIn()
		return
	}
	cause := context.Cause(a.ctx)
	a.mu.Lock()
	refused, nothing := a.refused, a.nothing
	a.mu.Unlock()
	if refused {
		a.alert(alertOf(err, nothing))
	}
	a.cancel(nil)
	_ = a.conn.Close()
	a.mu.Lock()
	a.stage = over
	said := a.said
	a.mu.Unlock()
	l.forget(a)
	l.callIn()
	outcome, reason := "failed", err
	switch {
	case errors.Is(cause, errRestarted):
		outcome, reason = "restarted", cause
	case errors.Is(cause, errEvictedHalf):
		outcome, reason = "evicted", cause
	case errors.Is(cause, errWrongKey):
		reason = cause
	case errors.Is(cause, context.DeadlineExceeded):
		outcome, reason = "timeout", errors.New("the peer did not go on")
	case cause != nil: // the engine stops
		return
	}
	s.metrics.handshakes.WithLabelValues(outcome).Inc()
	if outcome == "restarted" {
		return
	}
	detail := reason.Error()
	if len(said) == 2 {
		detail = fmt.Sprintf("%s; the peer sent alert %d", detail, said[1])
	}
	s.refuse(a.route.remote, "handshake-"+outcome, detail)
}

// alertOf tells a device what is wrong with the certificate that it showed, or that it has shown nothing (RFC 5246, Sections
// 7.2.2 and 7.4.6).
func alertOf(err error, nothing bool) byte {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case nothing:
		return alertHandshake
	case errors.As(err, &unknown):
		return alertUnknownCA
	case errors.Is(err, ErrRevoked):
		return alertRevoked
	case errors.Is(err, ErrDenied):
		return alertDenied
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return alertExpired
	case errors.As(err, &invalid) && invalid.Reason == x509.IncompatibleUsage:
		return alertUnsupported
	}
	return alertBadCertificate
}

// begun makes a session of a complete association, which takes the place of the one before it.
func (l *dtlsListener) begun(a *association) {
	s := l.srv
	if !s.admitProven() && (!l.makeRoom() || !s.admit()) {
		s.refuse(a.route.remote, "max-connections", fmt.Sprintf("%d connections are open", s.cfg.MaxConnections))
		_ = a.Close()
		return
	}
	d, err := l.sessions.start(a)
	if err != nil {
		_ = a.Close()
		s.gone()
		return
	}
	d.confirmed = a.confirmed
	l.mu.Lock()
	l.unlist(a)
	a.mu.Lock()
	if a.stage == over { // the handler has ended it already
		a.mu.Unlock()
		l.mu.Unlock()
		return
	}
	old := l.open[a.first]
	if old == a { // it has moved during the handshake, and back
		old = nil
	}
	if old != nil { // before anybody there has an answer of ours
		old.mu.Lock()
		if old.route.ends == a.first {
			old.route.stale = true
		}
		old.mu.Unlock()
	}
	a.session = d
	a.mu.Unlock()
	l.open[a.first] = a
	if old != nil && old.hasCID && old.muted == nil {
		// Its peer may come from another address: this one is somebody else's now, or its device has forgotten it.
		old.muted = l.mute.PushBack(old)
	}
	l.mu.Unlock()
	if old != nil && !old.hasCID {
		old.session.lost(ErrReplaced)
	}
	a.open()
}

// room reports whether there is room for one more connection, or can be.
func (s *Server) room() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.count < s.cfg.MaxConnections || s.forgeable() != nil
}

// replaceable reports whether some session cannot be reached, so that it may give way to another. Not to whoever has sent a
// ClientHello: anybody can forge one.
func (l *dtlsListener) replaceable() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.mute.Len() > 0
}

// makeRoom ends the oldest session that cannot be reached, and reports whether there is room now.
func (l *dtlsListener) makeRoom() bool {
	l.mu.Lock()
	var a *association
	if at := l.mute.Front(); at != nil {
		a = at.Value.(*association)
		l.mute.Remove(at)
		a.muted = nil
	}
	l.mu.Unlock()
	if a != nil {
		a.session.lost(ErrReplaced)
		a.session.vacate() // its end may take a moment
	}
	return l.srv.room()
}

// rerouted notes that the peer of a session is elsewhere now, or back where somebody else was meanwhile. An address that another
// session has stays that one's: who forges it must not get its records.
func (l *dtlsListener) rerouted(a *association, left, now *route) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[left.ends] == a {
		delete(l.open, left.ends)
	}
	if l.open[now.ends] == nil {
		l.open[now.ends] = a
	}
	if a.muted != nil {
		l.mute.Remove(a.muted)
		a.muted = nil
	}
}

// unlist takes a handshake out of the lists; mu is held.
func (l *dtlsListener) unlist(a *association) {
	a.unlist()
	if l.fresh[a.first] == a {
		delete(l.fresh, a.first)
	}
	if l.shaking[a.first] == a {
		delete(l.shaking, a.first)
	}
}

// forget takes an association out of all books.
func (l *dtlsListener) forget(a *association) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unlist(a)
	a.mu.Lock()
	at := a.route.ends
	a.mu.Unlock()
	for _, e := range []endpoints{a.first, at} {
		if l.open[e] == a {
			delete(l.open, e)
		}
	}
	if a.hasCID && l.byCID[a.cid] == a {
		delete(l.byCID, a.cid)
	}
	if a.muted != nil {
		l.mute.Remove(a.muted)
		a.muted = nil
	}
}
