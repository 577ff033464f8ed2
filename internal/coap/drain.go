package coap

import (
	"context"
	"slices"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// releaseTime is how long a peer over a stream has to close the connection after we released it (RFC 8323, Section 5.5). What comes
// meanwhile is handled and answered, as that section expects. libcoap closes at once; go-coap leaves it to its application, most of
// which do nothing. So our direction ends after that time, which every client takes for the end, and what the peer had reported until
// it learned of it is still taken.
const releaseTime = 250 * time.Millisecond

// Leaver is implemented by a ConnHandler that may have something under way when its peer is to go elsewhere (Server.Drain). From
// the call of Leave on it begins nothing new with the peer; it calls gone once nothing is under way any more, at once or later, from any
// goroutine, and may do so more than once. Leave must not block.
type Leaver interface {
	Leave(gone func())
}

// Drain has the server take on nobody new, and send those whom it has elsewhere: peers over streams by a Release (RFC 8323, Section
// 5.5), over DTLS by a close_notify, which clients answer by coming again at once. Nobody is told to wait (Hold-Off), since few read that:
// that they do not all come at once is our matter, so each is told in its turn, the turns are spread evenly over that time. Whoever
// has something under way (Leaver) is told when that is over, but not later than finish after the last turn. Over plain UDP there is
// nothing to say; such a session just ends.
//
// It returns when all are gone, or ctx ends. Whoever serves goes on doing so until its own context ends. It is called once.
func (s *Server) Drain(ctx context.Context, spread, finish time.Duration) {
	s.drain()
	begun := time.Now()
	all := s.conns()
	next := time.NewTimer(0)
	defer next.Stop()
	for i, c := range all { // in no order
		next.Reset(time.Until(begun.Add(spread / time.Duration(len(all)) * time.Duration(i))))
		select {
		case <-next.C:
		case <-ctx.Done():
			return
		}
		c.leave()
	}
	next.Reset(time.Until(begun.Add(spread + finish)))
	for _, c := range all {
		select {
		case <-c.ctx.Done():
		case <-next.C:
			next.Reset(0) // for the others, too
			c.dismiss()
		case <-ctx.Done():
			return
		}
	}
	for _, c := range append(all, s.conns()...) { // some have come to the end of their handshake since
		c.dismiss()
		select {
		case <-c.ctx.Done():
		case <-ctx.Done():
			return
		}
	}
}

// lister has connections.
type lister interface{ conns() []*Conn }

// list has Drain know of what a listener has, until the function that it returns is called.
func (s *Server) list(l lister) (unlist func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.listed = append(s.listed, l)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.listed = slices.DeleteFunc(s.listed, func(o lister) bool { return o == l })
	}
}

func (s *Server) conns() (all []*Conn) {
	s.mu.Lock()
	ls := slices.Clone(s.listed)
	s.mu.Unlock()
	for _, l := range ls {
		all = append(all, l.conns()...)
	}
	return all
}

func (l *listener) conns() (all []*Conn) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for c := range l.open {
		all = append(all, c)
	}
	return all
}

func (g *sessions) conns() (all []*Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for d := range g.open {
		all = append(all, d.c)
	}
	return all
}

// begun notes that the connection has its handler, which may have come too late.
func (c *Conn) begun() {
	c.mu.Lock()
	c.has = true
	c.mu.Unlock()
	if c.srv.draining.Err() != nil {
		c.leave()
	}
}

// leave sends the peer elsewhere once nothing is under way.
func (c *Conn) leave() {
	c.mu.Lock()
	has := c.has
	c.mu.Unlock()
	if !has {
		return // begun sees to it
	}
	h, is := c.handler.(Leaver)
	if !is || !c.Guard("Leave", func() { h.Leave(c.dismiss) }) {
		c.dismiss()
	}
}

// dismiss sends the peer elsewhere.
func (c *Conn) dismiss() {
	c.mu.Lock()
	if c.released || c.reason != nil {
		c.mu.Unlock()
		return
	}
	c.released = true
	c.mu.Unlock()
	if c.dg != nil {
		c.shut(ErrShutdown, true)
		return
	}
	_ = c.tr.send(c.ctx, &Message{Code: codes.Release}, false) // no room: the peer does not read anyway
	time.AfterFunc(releaseTime, func() { c.shut(ErrShutdown, true) })
}

// reports tells whether notifications are still taken: a peer that was sent elsewhere reports until it learns of it. c.mu is held.
func (c *Conn) reports() bool { return c.reason == nil || c.released && c.drain }

// parting tells whether nothing new is sent to the peer: RFC 8323, Section 5.5 recommends that no request follows a Release. c.mu is held.
func (c *Conn) parting() bool { return c.reason != nil || c.released }
