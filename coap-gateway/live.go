package coapgateway

import (
	"cmp"
	"context"
	"crypto/sha256"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// live finds the sessions that stand on a credential which ends before its time: on the grant of their token, on a device's
// pre-shared key, or on its certificate, and those of a device. It holds sessions and nothing else, so connections bound it, and it costs nothing as
// long as nothing ends: nobody asks again and again for 100 000 tokens.
//
// That no end is missed rests on an order. Whoever ends a credential stores that first and tells it then. A session's
// credential is checked, then the session enters, and if anything was told since before that check, it is checked once more.
type live struct {
	mu     sync.Mutex // guards all below
	told   uint64     // how many ends were told
	grants map[grant]sessions
	keys   map[hub.DeviceID]sessions
	certs  map[string]sessions // by serial, which two authorities may both have given
	devs   map[hub.DeviceID]sessions
}

// grant is what tokens of an issuer were issued on.
type grant struct{ issuer, id string }

type sessions map[*session]struct{}

func newLive() *live {
	return &live{grants: map[grant]sessions{}, keys: map[hub.DeviceID]sessions{}, certs: map[string]sessions{}, devs: map[hub.DeviceID]sessions{}}
}

// count is how many sessions there are.
func (l *live) count() (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ss := range l.devs {
		n += len(ss)
	}
	return n
}

// withCertificate are the sessions that came with one.
func (l *live) withCertificate() (out []*session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, ss := range l.certs {
		out = slices.AppendSeq(out, maps.Keys(ss))
	}
	return out
}

// soFar counts the ends that were told.
func (l *live) soFar() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.told
}

// enter makes s stand on the credentials that it has now; those that it stood on before are forgotten. A token whose issuer
// names no grant is not found again: nobody could tell its end.
func (l *live) enter(s *session, key hub.DeviceID) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.remove(s)
	s.grant, s.key = grant{s.claims.Issuer, s.claims.Grant}, key
	if s.grant.id != "" {
		add(l.grants, s.grant, s)
	}
	if key != "" {
		add(l.keys, key, s)
	}
	if s.cert != nil {
		add(l.certs, hub.SerialOf(s.cert.SerialNumber), s)
	}
	add(l.devs, s.own.Device, s)
}

func (l *live) leave(s *session) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.remove(s)
}

func (l *live) remove(s *session) {
	drop(l.grants, s.grant, s)
	drop(l.keys, s.key, s)
	if s.cert != nil {
		drop(l.certs, hub.SerialOf(s.cert.SerialNumber), s)
	}
	drop(l.devs, s.own.Device, s)
}

func add[K comparable](m map[K]sessions, k K, s *session) {
	if m[k] == nil {
		m[k] = sessions{}
	}
	m[k][s] = struct{}{}
}

func drop[K comparable](m map[K]sessions, k K, s *session) {
	delete(m[k], s)
	if len(m[k]) == 0 {
		delete(m, k)
	}
}

// ended notes that an end was told and returns who stands on what ended.
func ended[K comparable](l *live, m map[K]sessions, k K) []*session {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told++
	return slices.Collect(maps.Keys(m[k]))
}

// EndGrant ends the sessions whose token was issued on a grant of the issuer (hub.Claims), as if the token had expired. It is
// called once the grant's end is stored, so that the same token signs nobody in again; it does not block. It may be called
// more than once, and for grants that no session stands on.
func (g *Gateway) EndGrant(issuer, id string) {
	for _, s := range ended(g.live, g.live.grants, grant{issuer, id}) {
		s.conn.Close(closing{"revoked"})
	}
}

// endRevoked ends all sessions whose certificate counts as revoked, where nobody says which they are.
func (g *Gateway) endRevoked() {
	g.live.mu.Lock()
	g.live.told++
	var on []*session
	for _, of := range g.live.certs {
		on = slices.AppendSeq(on, maps.Keys(of))
	}
	g.live.mu.Unlock()
	for _, s := range on {
		if g.revoked(s.chain) {
			s.conn.Close(closing{"certificate-revoked"})
		}
	}
}

// EndKey ends the sessions that came with a pre-shared key which is the device's no more, after another one was stored, or that it was
// forgotten; with "" those of all devices: nobody knows whose it was. The word may come late, when the device is back with its new key, so
// keys are compared first. It does not block.
func (g *Gateway) EndKey(dev hub.DeviceID) {
	if dev != "" {
		g.keys.check(ended(g.live, g.live.keys, dev))
		return
	}
	g.live.mu.Lock()
	g.live.told++
	var on []*session
	for _, of := range g.live.keys {
		on = slices.AppendSeq(on, maps.Keys(of))
	}
	g.live.mu.Unlock()
	g.keys.check(on)
}

const (
	// keyTime bounds the looking up of one key, and keyAgain is the pause before it is tried again.
	keyTime, keyAgain = 3 * time.Second, time.Second
)

// keyChecks are sessions whose pre-shared keys are to be compared with those that their devices have now: no more than there are.
type keyChecks struct {
	wake chan struct{} // has one when there are some

	mu      sync.Mutex // guards waiting
	waiting sessions
}

func (k *keyChecks) check(on []*session) {
	if len(on) == 0 {
		return
	}
	k.mu.Lock()
	for _, s := range on {
		k.waiting[s] = struct{}{}
	}
	k.mu.Unlock()
	select {
	case k.wake <- struct{}{}:
	default:
	}
}

// next takes one out, nil when there is none.
func (k *keyChecks) next() *session {
	k.mu.Lock()
	defer k.mu.Unlock()
	for s := range k.waiting {
		delete(k.waiting, s)
		return s
	}
	return nil
}

// checkKeys does that until ctx ends. While keys cannot be looked up, sessions go on, and it tries again.
func (g *Gateway) checkKeys(ctx context.Context) {
	for {
		select {
		case <-g.keys.wake:
		case <-ctx.Done():
			return
		}
		for s := g.keys.next(); s != nil && ctx.Err() == nil; s = g.keys.next() {
			if s.over() {
				continue
			}
			own, cancel := context.WithTimeout(ctx, keyTime)
			key, err := g.deps.PSK(own, s.own.Device)
			cancel()
			switch {
			case err != nil:
				s.log.Warn("whether the device has another pre-shared key now cannot be looked up, trying again", "error", err)
				again := time.NewTimer(keyAgain)
				select {
				case <-again.C:
				case <-ctx.Done():
					again.Stop()
				}
				g.keys.check([]*session{s})
			case sha256.Sum256(key) != s.keyHash:
				s.conn.Close(closing{"key-replaced"})
			}
		}
	}
}

// EndCertificate ends the sessions that came with the certificate of the hub's own authority that has the serial (lower case,
// hexadecimal), after it was revoked. It does not block. It may be called more than once, and for certificates that nobody came
// with.
func (g *Gateway) EndCertificate(serial string) {
	for _, s := range ended(g.live, g.live.certs, serial) {
		if g.deps.Revoked(s.cert) { // else it is another authority's with the same serial
			s.conn.Close(closing{"certificate-revoked"})
		}
	}
}

// EndDenied ends the sessions of a device that is not let in any more, or whose quarantine began or ended, or, with "", of
// whoever that is true of. It does not block.
func (g *Gateway) EndDenied(dev hub.DeviceID) {
	for _, s := range g.live.those(dev) {
		err := g.deps.Denied(s.own.Device, s.chain)
		switch {
		case hub.IsKind(err, hub.Denied): // not knowing it is no reason
			code, _ := hub.Public(err)
			s.conn.Close(closing{code})
		case s.misplaced() && s.apart:
			s.conn.Close(closing{"quarantine-over"})
		case s.misplaced():
			s.conn.Close(closing{"device-quarantined"})
		}
	}
}

// those notes that an end was told and returns the sessions of a device, or all of them.
func (l *live) those(dev hub.DeviceID) (out []*session) {
	if dev != "" {
		return ended(l, l.devs, dev)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.told++
	for _, ss := range l.devs {
		out = slices.AppendSeq(out, maps.Keys(ss))
	}
	return out
}

// crowding are the sessions of a device in quarantine that are too many: of its hosts the one with the most loses its oldest, so that of
// two rivals the busy one does not push out the other.
func (l *live) crowding(dev hub.DeviceID) (out []*session) {
	l.mu.Lock()
	here := slices.Collect(maps.Keys(l.devs[dev]))
	l.mu.Unlock()
	if len(here) <= maxApart {
		return nil
	}
	slices.SortFunc(here, func(a, b *session) int { return cmp.Compare(a.number, b.number) })
	of := map[string][]*session{}
	for _, s := range here {
		host := hostOf(s.conn.Info().Remote.String())
		of[host] = append(of[host], s)
	}
	for range len(here) - maxApart {
		most := ""
		for host, ss := range of {
			if len(ss) > len(of[most]) || len(ss) == len(of[most]) && ss[0].number < of[most][0].number {
				most = host
			}
		}
		out = append(out, of[most][0])
		if of[most] = of[most][1:]; len(of[most]) == 0 {
			delete(of, most)
		}
	}
	return out
}

// checkCredential refuses whoever is not let in any more, came with a certificate that was revoked since, or with a pre-shared
// key that was replaced since: its connection outlives all of that. Others pass.
func (p *peer) checkCredential(ctx context.Context) error {
	if err := p.gw.deps.Denied(p.cred.device, p.cred.chain); err != nil {
		return err
	}
	if p.cred.cert != nil && p.gw.deps.Revoked(p.cred.cert) {
		return errCertificateRevoked
	}
	if err := p.checkRevocation(ctx); err != nil {
		return err
	}
	if !p.cred.psk {
		return nil
	}
	key, err := p.gw.deps.PSK(ctx, p.cred.device)
	if err != nil {
		return err
	}
	if sha256.Sum256(key) != p.cred.key {
		return unauthenticated("key-replaced", "the pre-shared key was replaced by another one")
	}
	return nil
}

// entered makes the session stand on what the peer has proven and on its token, and checks both once more if the end of
// anything was told since they were checked first.
func (p *peer) entered(ctx context.Context, s *session, token string) error {
	var key hub.DeviceID
	if p.cred.psk {
		key = p.cred.device
	}
	p.gw.live.enter(s, key)
	if s.apart {
		for _, old := range p.gw.live.crowding(s.own.Device) { // which may be closing already
			old.conn.Close(closing{"second-session"})
		}
	}
	if p.gw.live.soFar() == p.told {
		return nil
	}
	if err := p.checkCredential(ctx); err != nil {
		return err
	}
	if err := p.gw.deps.Denied(s.own.Device, nil); err != nil {
		return err
	}
	if s.misplaced() {
		return errMoved
	}
	_, err := p.gw.deps.Verifier.Verify(ctx, token)
	return err
}
