package oauthserver

import (
	"context"
	"encoding/base64"
	"errors"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// repeatWindow is how long a code that was redeemed may be repeated by the same device with the same credential: the answer
// may have been lost on the way.
const repeatWindow = 60 * time.Second

var (
	errCode     = hub.NewError(hub.Unauthenticated, "code-invalid", "the authorization code is unknown, expired or for another device")
	errCodeUsed = hub.NewError(hub.Unauthenticated, "code-used", "the authorization code was used already")
)

// code is the document of an authorization code, under the code's fingerprint.
type code struct {
	Client   string       `json:"client"`
	Subject  string       `json:"subject"`
	Scopes   []string     `json:"scopes"`
	Device   hub.DeviceID `json:"device,omitempty"` // empty: any
	AuthTime time.Time    `json:"authTime"`
	AMR      []string     `json:"amr,omitempty"`
	Issued   time.Time    `json:"issued,omitzero"`
	Expires  time.Time    `json:"expires"`
	// Of the authorize request, for codes that a browser brought.
	RedirectURI string `json:"redirectURI,omitempty"`
	Challenge   string `json:"challenge,omitempty"` // S256 always
	Nonce       string `json:"nonce,omitempty"`

	// Once it was redeemed by a device: when, by whom, the grant, and the answer, sealed so that only the code opens it.
	Used   time.Time `json:"used,omitzero"`
	UsedBy string    `json:"usedBy,omitempty"`
	Grant  string    `json:"grant,omitempty"`
	Answer string    `json:"answer,omitempty"`
}

// answer is what a device got for its code, and the grant, in case a crash kept it from being stored.
type answer struct {
	Tokens hub.Tokens
	Grant  grant
}

// devicesAccount is an account that may have devices.
func (s *Server) devicesAccount(ctx context.Context, owner hub.Owner) (account, error) {
	a, err := s.account(ctx, string(owner))
	if err == nil && !slices.Contains(a.scopes(), hub.ScopeDevice) {
		return account{}, errScope.With("onboard", nil)
	}
	return a, err
}

// MayHaveDevices reports whether there is such an account (else NotFound), and whether it may have devices (else Denied).
func (s *Server) MayHaveDevices(ctx context.Context, owner hub.Owner) error {
	_, err := s.devicesAccount(ctx, owner)
	return err
}

// OnboardCode makes an authorization code with which the device, or any device if it is empty, signs up for the owner. A ttl
// of zero means Config.CodeLifetime. Kinds: NotFound for an unknown account, Invalid for a ttl over a day, Denied if the device
// belongs to somebody else or the account's roles allow no devices.
func (s *Server) OnboardCode(ctx context.Context, owner hub.Owner, dev hub.DeviceID, ttl time.Duration) (string, time.Time, error) {
	if ttl == 0 {
		ttl = s.cfg.CodeLifetime
	}
	if ttl < time.Second || ttl > 24*time.Hour {
		return "", time.Time{}, hub.NewError(hub.Invalid, "ttl-invalid", "a code may live between one second and a day")
	}
	a, err := s.devicesAccount(ctx, owner)
	if err != nil {
		return "", time.Time{}, err
	}
	if err := s.mayHave(ctx, a.Name, dev); err != nil {
		return "", time.Time{}, err
	}
	now := s.clock.Now()
	c := code{
		Client: s.cfg.Clients.Device.ID, Subject: a.Name, Scopes: []string{hub.ScopeDevice}, Device: dev, AuthTime: now.UTC(),
		Issued: now.UTC(), Expires: now.Add(ttl).UTC(),
	}
	text := newCode()
	if err := write(ctx, s.docs, collCodes, fingerprint(text), 0, c, s.codeIndex(c)...); err != nil {
		return "", time.Time{}, err
	}
	return text, c.Expires, nil
}

// codeIndex finds the codes for a device that are not used: one that is redeemed is written without it.
func (s *Server) codeIndex(c code) []string {
	if c.Device == "" || c.Client != s.cfg.Clients.Device.ID {
		return nil
	}
	return []string{"awaited=" + c.Subject}
}

// Awaited returns the devices for which the owner has a code that was not used, also one whose time was over lately.
func (s *Server) Awaited(ctx context.Context, owner hub.Owner) (map[hub.DeviceID]bool, error) {
	out := map[hub.DeviceID]bool{}
	for doc, err := range s.docs.Find(ctx, collCodes, "awaited="+string(owner)) {
		if err != nil {
			return nil, trouble("look for codes", err)
		}
		var c code
		if err := decode(collCodes, doc, &c); err != nil {
			return nil, err
		}
		out[c.Device] = true
	}
	return out, nil
}

func newCode() string { return base64.RawURLEncoding.EncodeToString(random(24)) }

// mayHave refuses a device ID for a subject that does not own the device, unless nobody does.
func (s *Server) mayHave(ctx context.Context, subject string, dev hub.DeviceID) error {
	if dev == "" {
		return nil
	}
	own, err := s.ownership.Owner(ctx, dev)
	switch {
	case hub.IsKind(err, hub.NotFound):
		return nil
	case err != nil:
		return trouble("ask for the owner", err)
	case own.Owner != hub.Owner(subject):
		return errOther.With("ask for the owner", nil)
	}
	return nil
}

// Exchange redeems an authorization code for the device, or, if that is "", for the one that the code is for. credential
// fingerprints the device's credential (empty: none); the same code for the same device and credential may be repeated for 60 s
// and gives the same tokens. Kinds: Unauthenticated when the code is refused, Invalid if it is for any device and dev is "", Denied
// ("device-owned-by-other") if the device belongs to somebody else; the code stays good then.
func (s *Server) Exchange(ctx context.Context, dev hub.DeviceID, credential, text string) (hub.Tokens, error) {
	tokens, err := s.exchange(ctx, dev, credential, text)
	s.metrics.issued("device_code", err)
	return tokens, err
}

func (s *Server) exchange(ctx context.Context, dev hub.DeviceID, credential, text string) (hub.Tokens, error) {
	const op = "redeem code"
	key, replayKey := fingerprint(text), mac(s.secrets.replay, []byte(text))
	for range maxTries {
		var c code
		rev, err := read(ctx, s.docs, collCodes, key, &c)
		if err != nil {
			return hub.Tokens{}, err
		}
		now := s.clock.Now()
		if dev == "" {
			dev = c.Device
		}
		by := fingerprint(string(dev) + "\x00" + credential)
		switch {
		case rev == 0, c.Client != s.cfg.Clients.Device.ID, c.Device != "" && c.Device != dev:
			return hub.Tokens{}, errCode.With(op, nil)
		case dev == "":
			return hub.Tokens{}, hub.NewError(hub.Invalid, "device-id-missing", "the code is for any device: name one").With(op, nil)
		case !c.Used.IsZero():
			if c.UsedBy != by || s.clock.Ended(c.Used.Add(repeatWindow)) {
				return hub.Tokens{}, errCodeUsed.With(op, nil)
			}
			var a answer
			if err := open(replayKey, "answer", c.Answer, &a); err != nil {
				return hub.Tokens{}, &hub.Error{Kind: hub.Internal, Op: op, Err: err}
			}
			return s.keep(ctx, c.Grant, a)
		case s.clock.Ended(c.Expires):
			return hub.Tokens{}, errCode.With(op, errors.New("expired"))
		}
		acc, err := s.account(ctx, c.Subject)
		if hub.IsKind(err, hub.NotFound) || err == nil && !slices.Contains(acc.scopes(), hub.ScopeDevice) {
			return hub.Tokens{}, errCode.With(op, errors.New("the account is gone, or may have no devices any more"))
		}
		if err != nil {
			return hub.Tokens{}, err
		}
		if err := s.mayHave(ctx, c.Subject, dev); err != nil {
			return hub.Tokens{}, err
		}
		// A device's token has the scope of devices and no other, whatever the request asked for.
		g := grant{
			Subject: c.Subject, Client: c.Client, Scopes: []string{hub.ScopeDevice}, Device: dev, AuthTime: c.AuthTime, AMR: c.AMR,
			Expires: now.Add(s.cfg.RefreshTokenLifetime).UTC(),
		}
		id := newGrantID()
		a := answer{Tokens: hub.Tokens{Refresh: refreshToken(id, random(32)), Authorized: c.Issued}}
		g.Current = fingerprint(a.Tokens.Refresh)
		a.Grant = g
		if a.Tokens.Access, a.Tokens.Expiry, err = s.sign(ctx, id, g, g.Scopes, s.cfg.AccessTokenLifetime); err != nil {
			return hub.Tokens{}, err
		}
		c.Used, c.UsedBy, c.Grant = now.UTC(), by, id
		if c.Answer, err = seal(replayKey, "answer", a); err != nil {
			return hub.Tokens{}, &hub.Error{Kind: hub.Internal, Op: op, Err: err}
		}
		// First the code, so that it can never be redeemed twice; a repeat stores the grant if a crash comes in between.
		if err := write(ctx, s.docs, collCodes, key, rev, c); hub.IsKind(err, hub.Conflict) {
			continue
		} else if err != nil {
			return hub.Tokens{}, err
		}
		return s.keep(ctx, id, a)
	}
	return hub.Tokens{}, trouble(op, errors.New("too much contention"))
}

// keep stores the answer's grant, unless it is there.
func (s *Server) keep(ctx context.Context, id string, a answer) (hub.Tokens, error) {
	err := write(ctx, s.docs, collGrants, id, 0, a.Grant, grantIndex(a.Grant)...)
	if hub.IsKind(err, hub.Conflict) {
		var ok bool
		if _, ok, err = s.activeGrant(ctx, id); err == nil && !ok {
			err = errCodeUsed.With("redeem code", errors.New("its tokens were revoked"))
		}
	}
	if err != nil {
		return hub.Tokens{}, err
	}
	return a.Tokens, nil
}

// Refresh gives new tokens for a refresh token of the device, "" for whichever it was given to. The old one keeps working until the new one was used, at most
// 24 h, and gives the same new one. Kinds: Unauthenticated when it is refused, also when the device changed hands.
func (s *Server) Refresh(ctx context.Context, dev hub.DeviceID, refresh string) (hub.Tokens, error) {
	tokens, err := s.refresh(ctx, dev, refresh)
	s.metrics.issued("device_refresh", err)
	return tokens, err
}

func (s *Server) refresh(ctx context.Context, dev hub.DeviceID, refresh string) (hub.Tokens, error) {
	id, g, successor, err := s.rotate(ctx, refresh, func(g grant) error {
		if g.Client != s.cfg.Clients.Device.ID || dev != "" && g.Device != dev {
			return errRefresh.With("refresh", errors.New("of another device or client"))
		}
		a, err := s.account(ctx, g.Subject)
		if hub.IsKind(err, hub.NotFound) || err == nil && !slices.Contains(a.scopes(), hub.ScopeDevice) {
			return errRefresh.With("refresh", errors.New("the account is gone, or may have no devices any more"))
		}
		if err != nil {
			return err
		}
		err = s.mayHave(ctx, g.Subject, g.Device)
		if hub.IsKind(err, hub.Denied) {
			return errRefresh.With("refresh", err)
		}
		return err
	})
	if err != nil {
		return hub.Tokens{}, err
	}
	access, expiry, err := s.sign(ctx, id, g, g.Scopes, s.cfg.AccessTokenLifetime)
	if err != nil {
		return hub.Tokens{}, err
	}
	return hub.Tokens{Access: access, Refresh: successor, Expiry: expiry}, nil
}

// EndDevice ends all that was given to a device of the owner: its tokens are worth nothing any more.
func (s *Server) EndDevice(ctx context.Context, owner hub.Owner, dev hub.DeviceID) error {
	return s.revokeSubject(ctx, string(owner), func(g grant) bool { return g.Device == dev })
}

// Revoke makes the tokens useless, whichever of the two is given. Tokens that are not ours, or ended, are no error.
func (s *Server) Revoke(ctx context.Context, t hub.Tokens) error {
	anyGrant := func(grant) bool { return true }
	if id, _, ok := parseRefreshToken(t.Refresh); ok {
		if err := s.revokeGrant(ctx, id, anyGrant); err != nil {
			return err
		}
	}
	if id, ok := unverifiedTokenID(t.Access); ok {
		return s.revokeGrant(ctx, GrantOf(id), anyGrant)
	}
	return nil
}
