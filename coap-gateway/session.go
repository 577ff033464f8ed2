package coapgateway

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// offlineTimeout bounds how long the gateway waits until the end of a session is recorded; beyond that the directory tries
// by itself until it is.
const offlineTimeout = 3 * time.Second

// session is a device that is signed in on a connection. Its fields belong to the connection's goroutine, except where noted.
type session struct {
	gw     *Gateway
	conn   *coap.Conn
	log    *slog.Logger
	own    hub.Ownership
	number uint64
	// records is where it reads and writes; apart says that this is the quarantine. They do not change.
	records records
	apart   bool
	user    atomic.Pointer[string] // sub, for audit; renewed while the twin writes
	uid     string                 // the owner as the device names it
	claims  hub.Claims
	timer   *time.Timer  // closes the connection when the credential expires
	grant   grant        // what live has it under; live guards both
	key     hub.DeviceID // "": it did not come with a pre-shared key
	// keyHash is of that key; it does not change.
	keyHash [sha256.Size]byte
	// cert is what it came with, nil if it did not come with one; it does not change.
	cert  *x509.Certificate
	chain []*x509.Certificate // from cert up

	ctx    context.Context // ends with the session
	cancel context.CancelFunc
	share  *share
	to     *deliverer
	twin   *twin
	rhythm *rhythm      // when the device listens
	aside  atomic.Int32 // its requests that wait for other devices
	// watching has its watches, guarded by the gateway's watches; telling is their goroutines.
	watching map[*watch]struct{}
	telling  sync.WaitGroup

	// turn holds one token; whoever has it may write. It orders the session's writes and guards the fields below.
	turn    chan struct{}
	message uint64 // number of the last write
	// early has, for observations whose first answer is not stored yet, what notifications have stored already: the first
	// answer is older and must not overwrite it.
	early map[*coap.Observation]map[hub.Href]bool
}

// closing is why the gateway itself ends a connection; the word is for logs, metrics and diagnostics.
type closing struct{ word string }

func (c closing) Error() string { return "closed by the gateway: " + c.word }

// closeReason names the end of a connection from a small set of words.
func closeReason(err error) string {
	if c := (closing{}); errors.As(err, &c) {
		return c.word
	}
	return coap.Reason(err)
}

// deliverer is how the directory reaches a session.
type deliverer struct {
	conn *coap.Conn
	box  outbox
	// detached is set while the session itself asks for its device's deletion: the answer must still go out, and the
	// connection stays open after it.
	detached atomic.Bool
	// succeeded is that the device has another session since.
	succeeded atomic.Bool
	absences  *absences
}

// Close implements hub.Deliverer.
func (d *deliverer) Close(reason string) {
	if reason == "second-session" { // it is stored
		d.succeeded.Store(true)
		d.absences.back(d)
	}
	if d.detached.Load() {
		return
	}
	if reason != "second-session" && reason != "deleted" { // the metric's label is bounded
		reason = "directory"
	}
	d.conn.Close(closing{reason})
}

// Ready implements hub.Deliverer.
func (d *deliverer) Ready(href hub.Href, bound []string) bool { return d.box.ready(href, bound) }

// Deliver implements hub.Deliverer.
func (d *deliverer) Deliver(c hub.Command) { d.box.deliver(c) }

// Wake implements hub.Deliverer.
func (d *deliverer) Wake() { d.box.wake() }

// write runs do with the next message number, after all earlier writes of the session and before all later ones. An outcome
// that is unknown, or an overload that may pass, is tried again with the same number until the gateway's patience ends: the
// directory takes a number once, so repeating is harmless. After giving up the number is not used again; a late arrival of
// it is fenced by the next one.
func (s *session) write(ctx context.Context, do func(context.Context, hub.Stamp) error) error {
	select {
	case s.turn <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	defer func() { <-s.turn }()
	return s.writeInTurn(ctx, do)
}

func (s *session) writeInTurn(ctx context.Context, do func(context.Context, hub.Stamp) error) error {
	if s.ctx.Err() == nil && s.misplaced() { // it is about to be closed; its end is to be recorded all the same
		return errMoved
	}
	s.message++
	stamp := hub.Stamp{Device: s.own.Device, Session: s.number, Message: s.message, User: *s.user.Load()}
	return retry(ctx, s.gw.patience, func() error { return do(ctx, stamp) })
}

// retry repeats do while its error is transient, for at most patience.
func retry(ctx context.Context, patience time.Duration, do func() error) error {
	end := time.Now().Add(patience)
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		err := do()
		if err == nil || !transient(err) || time.Now().Add(wait).After(end) {
			return err
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return err
		}
	}
}

// deadline returns when the credentials of the session end: the token, or the certificate if that is earlier.
func (p *peer) deadline(c hub.Claims) time.Time {
	end := c.Expiry
	if p.gw.cfg.API.CoAP.TLS.DisconnectOnExpiredCertificate && p.cred.cert != nil && p.cred.cert.NotAfter.Before(end) {
		end = p.cred.cert.NotAfter
	}
	return end
}

// renew makes c the session's claims and moves its deadline. The time left is taken once from the wall clock and then runs on
// the monotonic one, so that a step of the clock ends no session.
func (p *peer) renew(s *session, c hub.Claims) {
	user := c.Subject
	s.claims = c
	s.user.Store(&user)
	left := time.Until(p.deadline(c))
	if s.timer == nil {
		s.timer = time.AfterFunc(left, func() { s.conn.Close(closing{"expired"}) })
	} else {
		s.timer.Reset(left)
	}
}

// endSession forgets who is signed in; offline records it. The device is not waited for.
func (p *peer) endSession(reason string, offline bool) {
	s := p.sess
	p.sess = nil
	p.gw.live.leave(s)
	p.gw.rates.leave(s.own.Owner)
	p.listening.Store(nil)
	s.stop()
	p.gw.renewals.leave(s) // after the session's context is over, or it could be watched again
	s.conn.ForgetAnswers()
	if offline && !p.gw.absences.add(s, s.recordOffline) {
		s.recordOffline()
	}
	s.twin.forget(p)
	p.gw.metrics.signedIn.Add(-1)
	p.gw.metrics.sessionsEnded.WithLabelValues(reason).Inc()
	p.gw.devices.end(s.own.Device, s.number, reason, time.Now())
	s.log.Info("device went", "reason", reason)
}

// recordOffline records that the session is over.
func (s *session) recordOffline() {
	// Neither the request's nor the connection's context: this must be recorded although both are over.
	ctx, cancel := context.WithTimeout(context.Background(), offlineTimeout)
	defer cancel()
	if err := s.write(ctx, s.records.Offline); err != nil {
		s.log.Warn("could not record that the device is offline", "error", err)
	}
}

// stop ends everything that runs for the session and waits for it. It may be called twice.
func (s *session) stop() {
	s.timer.Stop()
	s.cancel()
	s.to.box.stop() // first: it may turn the twin
	s.gw.watches.leave(s)
	s.twin.stop()
}
