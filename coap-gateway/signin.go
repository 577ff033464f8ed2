package coapgateway

import (
	"context"
	"crypto/tls"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// sessionRequest is the body of POST /oic/sec/session (OCF Cloud Security, oic.r.session): sign-in with login true, else
// sign-out.
type sessionRequest struct {
	Device string `cbor:"di"`
	UID    string `cbor:"uid"`
	Token  string `cbor:"accesstoken"`
	Login  bool   `cbor:"login"`
}

type signInResponse struct {
	ExpiresIn int64 `cbor:"expiresin" json:"expiresin"`
}

// signOutResponse is an empty map: devices expect a body.
type signOutResponse struct{}

// expiryMargin is how much earlier than the end of its session a device is told to refresh its token.
const expiryMargin = 10 * time.Second

func (p *peer) signInOrOut(ctx context.Context, req *coap.Message, format int32) (coap.Response, error) {
	var body sessionRequest
	if err := decodeBody(req.Payload, &body); err != nil {
		p.refuse("sign-in", "", "", err)
		return coap.Response{}, err
	}
	if !body.Login {
		return p.signOut(ctx, &body, format)
	}
	claims, dev, err := p.signIn(ctx, &body)
	if err != nil {
		p.refuse("sign-in", dev, body.Device, err)
		return coap.Response{}, err
	}
	return success(codes.Changed, format, signInResponse{ExpiresIn: sessionSeconds(p.deadline(claims))})
}

var errExpired = unauthenticated("token-expired", "the credential has expired")

// signIn makes the connection a session of the device. It never waits for the device: the twin's requests go out beside the
// answer.
func (p *peer) signIn(ctx context.Context, body *sessionRequest) (hub.Claims, hub.DeviceID, error) {
	if body.UID == "" || body.Token == "" {
		return hub.Claims{}, "", invalid("body-incomplete", "uid and accesstoken are needed")
	}
	claims, dev, err := p.authenticate(ctx, body.Device, body.UID, body.Token)
	if err != nil {
		return claims, dev, err
	}
	if time.Until(p.deadline(claims)) <= 0 {
		return claims, dev, errExpired
	}
	// Not before: whoever's issuer does not give its keys away waits for them without a place.
	place, err := p.enter(ctx, p.gw.signIns, errSignIns)
	if err != nil {
		return claims, dev, err
	}
	defer place.Leave()
	if time.Until(p.deadline(claims)) <= 0 { // while it waited
		return claims, dev, errExpired
	}
	own, err := p.ownership(ctx, dev, claims.Owner)
	if err != nil {
		return claims, dev, err
	}
	info := p.conn.Info()
	var before *session
	switch {
	case p.sess == nil:
	case p.sess.own != own, p.sess.misplaced(): // the device or its ownership is another one, or its quarantine began or ended
		p.endSession("other-sign-in", true)
	case !info.Stream && !info.Secure:
		// Over plain UDP a device that has rebooted is where it was, and only this tells of it: it has forgotten what we observe.
		// The next session supersedes this one, so that nobody goes offline, and needs the connection. What this one still
		// writes would be refused from then on.
		before = p.sess
		before.to.detached.Store(true)
		before.stop()
	default:
		p.renew(p.sess, claims) // repeated: it keeps its number, its observations and its ONLINE
		return claims, dev, p.entered(ctx, p.sess, body.Token)
	}
	s := &session{
		gw: p.gw, conn: p.conn, cert: p.cred.cert, chain: p.cred.chain, keyHash: p.cred.key, uid: body.UID, to: &deliverer{conn: p.conn, absences: &p.gw.absences},
		turn: make(chan struct{}, 1), early: map[*coap.Observation]map[hub.Href]bool{},
	}
	conn := hub.Connection{
		Online: true, ID: info.ID, ConnectedAt: time.Now().UnixNano(), Protocol: p.protocol(), Service: p.gw.deps.Service,
	}
	var got hub.Session
	if s.apart = p.gw.quarantined(dev); s.apart {
		s.records, got, err = p.keepApart(ctx, own, conn)
	} else {
		s.records = p.gw.deps.Directory
		got, own, err = p.announce(ctx, own, conn, claims, s.to)
	}
	if err != nil {
		return claims, dev, err // which closes the connection, and what session it has goes offline then
	}
	if before != nil {
		p.endSession("signed-in-again", false)
	}
	s.own, s.number = own, got.Number
	s.share = p.gw.rates.join(own.Owner)
	s.log = p.log.With("device", dev, "owner", own.Owner, "session", got.Number)
	if s.apart {
		s.log = s.log.With("quarantined", true)
	}
	s.ctx, s.cancel = context.WithCancel(p.conn.Context())
	p.renew(s, claims)
	p.sess = s
	p.gw.metrics.signedIn.Add(1)
	d := Diagnostics{
		Device: dev, Owner: own.Owner, ConnectedSince: time.Unix(0, conn.ConnectedAt), Protocol: conn.Protocol, Remote: info.Remote.String(),
		Session: got.Number, Quarantined: s.apart,
	}
	switch {
	case info.TLS != nil:
		d.TLSVersion, d.Suite = tls.VersionName(info.TLS.Version), tls.CipherSuiteName(info.TLS.CipherSuite)
	case info.Secure:
		d.TLSVersion, d.Suite = "DTLS 1.2", info.Peer.Suite // the only one we have
	}
	if !info.Stream {
		d.Contact = got.Contact
	}
	elsewhere := got.Former != "" && got.Former != p.gw.deps.Service
	where, rivals := p.gw.devices.begin(d, p.conn.Stats, elsewhere)
	s.log.Info("device came", "protocol", conn.Protocol.String()) // JSON would have its number
	s.rhythm = newRhythm(info.Stream, got.Contact, time.Now())
	s.twin = newTwin(s, got.TwinEnabled)
	p.listening.Store(s)
	s.twin.resync()
	p.gw.quiet.watch(s.twin)
	switch {
	case rivals:
		p.rivals(ctx, s, where)
	case elsewhere && !s.apart && p.gw.deps.Turns != nil:
		p.helpers.Go(func() { p.tookOver(s, got.Former) }) // it must not hold up the sign-in
	}
	if err := p.entered(ctx, s, body.Token); err != nil {
		return claims, dev, err
	}
	if s.apart {
		return claims, dev, nil // it is asked what it has to say, and told nothing
	}
	s.to.box.begin(s, got.Commands, !got.TwinEnabled) // last: whoever may not stay gets no commands
	p.gw.renewals.watch(s)
	return claims, dev, nil
}

// authenticate verifies a token and says which device it is used for. uid must be the token's owner.
func (p *peer) authenticate(ctx context.Context, di, uid, token string) (hub.Claims, hub.DeviceID, error) {
	dev, err := p.before(di)
	if err != nil {
		return hub.Claims{}, dev, err
	}
	claims, err := p.gw.deps.Verifier.Verify(ctx, token)
	if err != nil {
		return claims, dev, err
	}
	if uid != string(claims.Owner) {
		return claims, dev, unauthenticated("uid-mismatch", "uid is not the token's owner")
	}
	named, err := p.named(dev, di, claims)
	return claims, named, err
}

// ownership asks who owns the device; it must be the token's owner, and the device must come with the set of credentials that
// it signed up with.
func (p *peer) ownership(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Ownership, error) {
	own, err := p.gw.deps.Identities.Owner(ctx, dev)
	switch {
	case hub.IsKind(err, hub.NotFound):
		// 4.01: the device's credentials are good for nothing until it signs up again, and that is what it does on 4.01.
		return own, unauthenticated("device-not-registered", "the device is not registered").(*hub.Error).With("look up owner", err)
	case err != nil:
		return own, err
	case own.Releasing:
		return own, unauthenticated("device-not-registered", "the device is being deleted")
	case own.Owner != owner:
		return own, unauthenticated("device-owned-by-other", "the device belongs to another owner")
	}
	return own, p.pinned(own)
}

// pinned refuses a device that comes with another set of credentials than it signed up with: somebody who only has a token
// of it, for instance, while it has a certificate.
func (p *peer) pinned(own hub.Ownership) error {
	if own.Pin != "" && own.Pin != p.cred.pin {
		return unauthenticated("device-pinned", "the device signed up with another set of credentials before")
	}
	return nil
}

// announce signs in at the directory. If the directory knows another ownership than we were told, somebody was faster: it is
// asked for once more, and if both still disagree that is trouble of ours and no fault of the credential.
func (p *peer) announce(
	ctx context.Context, own hub.Ownership, conn hub.Connection, claims hub.Claims, to Deliverer,
) (hub.Session, hub.Ownership, error) {
	// The connection may go while the directory is asked; its answer is needed all the same, to record OFFLINE then.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), p.gw.cfg.API.CoAP.KeepAlive.Timeout)
	defer cancel()
	got, err := p.gw.deps.Directory.SignIn(ctx, own, conn, claims.Subject, to)
	if !hub.IsKind(err, hub.Denied) {
		return got, own, err
	}
	if own, err = p.ownership(ctx, own.Device, claims.Owner); err != nil {
		return got, own, err
	}
	if got, err = p.gw.deps.Directory.SignIn(ctx, own, conn, claims.Subject, to); hub.IsKind(err, hub.Denied) {
		err = hub.NewError(hub.Unavailable, "ownership-unsettled", "the device's ownership is being settled, try again").With("sign in", err)
	}
	return got, own, err
}

// sessionSeconds is expiresin of sign-in: whole seconds until the device should have refreshed its token, which is a margin
// before its session ends.
func sessionSeconds(end time.Time) int64 {
	left := time.Until(end)
	return max(1, int64(max(left-expiryMargin, left/2)/time.Second))
}

// signOut ends the session. Values that the body lacks are those of the session; without a session all are needed, and there
// is nothing to end.
func (p *peer) signOut(ctx context.Context, body *sessionRequest, format int32) (coap.Response, error) {
	s := p.sess
	if s == nil && (body.UID == "" || body.Token == "") {
		return coap.Response{}, invalid("body-incomplete", "uid and accesstoken are needed without a session")
	}
	_, dev, err := p.whose(ctx, body.Device, body.UID, body.Token)
	if err != nil {
		return coap.Response{}, err
	}
	if s != nil {
		if dev != s.own.Device {
			return coap.Response{}, invalid("device-id-mismatch", "another device is signed in on this connection")
		}
		s.stop()
		// A session that is not the current one any more has nothing to sign out of.
		if err := s.write(ctx, s.records.SignOut); err != nil && !hub.IsKind(err, hub.Precondition) {
			return coap.Response{}, err // the connection closes and records OFFLINE
		}
		p.endSession("sign-out", false)
	}
	return success(codes.Changed, format, signOutResponse{})
}

// whose authenticates a sign-out or sign-off and returns the device it is about. What is missing comes from the session.
func (p *peer) whose(ctx context.Context, di, uid, token string) (hub.Claims, hub.DeviceID, error) {
	s := p.sess
	if s != nil {
		if uid == "" {
			uid = s.uid
		}
		if di == "" {
			di = string(s.own.Device)
		}
	}
	if token != "" {
		return p.authenticate(ctx, di, uid, token)
	}
	// The token is the one that the session was signed in with, and it is still good: the session would have ended.
	if uid != string(s.claims.Owner) {
		return s.claims, "", unauthenticated("uid-mismatch", "uid is not the session's owner")
	}
	rules := p.rules()
	dev, err := rules.before(p.cred, di)
	if err == nil {
		dev, err = rules.device(p.cred, dev, di, s.claims)
	}
	return s.claims, dev, err
}
