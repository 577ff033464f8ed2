package oauthserver

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/coaphub/coaphub/hub"
)

// The device grant (RFC 8628) is for programs without a browser, such as the command line on another machine. It has nothing
// to do with CoAP devices.
const (
	deviceGrantLifetime = 10 * time.Minute
	pollInterval        = 5 * time.Second
)

// deviceGrant is the document of a pending device grant, under the device code's fingerprint.
type deviceGrant struct {
	Client   string    `json:"client"`
	Scopes   []string  `json:"scopes"`
	UserCode string    `json:"userCode"` // fingerprint
	Expires  time.Time `json:"expires"`
	Approved bool      `json:"approved,omitempty"`
	Subject  string    `json:"subject,omitempty"`
	AuthTime time.Time `json:"authTime,omitzero"`
}

func (g deviceGrant) index() []string { return []string{"user=" + g.UserCode} }

// userCode folds what a person typed: RFC 8628, Section 6.1, case and punctuation do not count.
func userCode(s string) string {
	return fingerprint(strings.Map(func(r rune) rune {
		if strings.ContainsRune(op.CharSetBase20, r) {
			return r
		}
		return -1
	}, strings.ToUpper(s)))
}

func (st storage) StoreDeviceAuthorization(ctx context.Context, clientID, deviceCode, user string, expires time.Time, scopes []string) error {
	c := st.s.clients[clientID]
	if c == nil {
		return oidc.ErrInvalidClient()
	}
	scopes = slices.DeleteFunc(slices.Clone(scopes), func(s string) bool { return !c.IsScopeAllowed(s) })
	if len(scopes) == 0 {
		return oidc.ErrInvalidScope()
	}
	g := deviceGrant{Client: clientID, Scopes: scopes, UserCode: userCode(user), Expires: expires.UTC()}
	if err := write(ctx, st.s.docs, collDevices, fingerprint(deviceCode), 0, g, g.index()...); err != nil {
		return refuse(ctx, err, oidc.ErrServerError())
	}
	return nil
}

func (st storage) GetDeviceAuthorizatonState(ctx context.Context, clientID, deviceCode string) (*op.DeviceAuthorizationState, error) {
	s, key := st.s, fingerprint(deviceCode)
	if _, ok := s.limits.polls.allow(key); !ok {
		return nil, context.DeadlineExceeded // what the library answers slow_down to (RFC 8628, Section 3.5)
	}
	var g deviceGrant
	rev, err := read(ctx, s.docs, collDevices, key, &g)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrAccessDenied())
	}
	expired := &op.DeviceAuthorizationState{}
	if rev == 0 || g.Client != clientID || !time.Now().Before(g.Expires) {
		return expired, nil
	}
	state := &op.DeviceAuthorizationState{ClientID: clientID, Scopes: g.Scopes, Expires: g.Expires}
	if !g.Approved {
		return state, nil
	}
	a, err := s.account(ctx, g.Subject)
	if err != nil {
		return nil, refuse(ctx, err, oidc.ErrAccessDenied())
	}
	// The library would give a token to each of several polls that see the approval: one of them uses the code up.
	if err := s.docs.Delete(ctx, collDevices, key, rev); hub.IsKind(err, hub.Conflict) {
		return expired, nil
	} else if err != nil {
		return nil, refuse(ctx, trouble("use device code", err), oidc.ErrAccessDenied())
	}
	state.Done, state.Subject, state.AMR, state.AuthTime = true, a.Name, []string{"pwd"}, g.AuthTime
	state.Scopes, state.Audience = allowed(g.Scopes, a), []string{s.cfg.Audience}
	return state, nil
}

// pendingGrant finds what a person's code stands for. NotFound if it is unknown, expired or approved already.
func (s *Server) pendingGrant(ctx context.Context, typed string) (key string, g deviceGrant, rev uint64, err error) {
	for doc, err := range s.docs.Find(ctx, collDevices, "user="+userCode(typed)) {
		if err != nil {
			return "", g, 0, trouble("find user code", err)
		}
		if err := decode(collDevices, doc, &g); err != nil {
			return "", g, 0, err
		}
		if !g.Approved && time.Now().Before(g.Expires) {
			return doc.Key, g, doc.Rev, nil
		}
	}
	return "", deviceGrant{}, 0, hub.NewError(hub.NotFound, "user-code-unknown", "this code is unknown or expired")
}

// approve gives a pending grant to the subject who signed in.
func (s *Server) approve(ctx context.Context, typed, subject string) error {
	key, g, rev, err := s.pendingGrant(ctx, typed)
	if err != nil {
		return err
	}
	g.Approved, g.Subject, g.AuthTime = true, subject, time.Now().UTC()
	return write(ctx, s.docs, collDevices, key, rev, g, g.index()...)
}
