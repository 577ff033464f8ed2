package oauthserver

import (
	"errors"
	"time"

	"github.com/zitadel/oidc/v3/pkg/oidc"
	"github.com/zitadel/oidc/v3/pkg/op"

	"github.com/coaphub/coaphub/hub"
)

// Lifetimes of what a browser carries.
const (
	requestLifetime = 15 * time.Minute // from the authorize request to the password
	doneLifetime    = time.Minute      // from the password to the code
)

// request is an authorize request. It is not stored: whoever opens the login page could fill a store. Sealed, it is its own
// ID, and travels in the pages' addresses and forms.
type request struct {
	Client      string       `json:"c"`
	RedirectURI string       `json:"r"`
	Scopes      []string     `json:"s,omitempty"`
	State       string       `json:"t,omitempty"`
	Nonce       string       `json:"n,omitempty"`
	Challenge   string       `json:"h,omitempty"`
	Device      hub.DeviceID `json:"d,omitempty"`
	Expires     time.Time    `json:"e"`
	// Once the user signed in.
	Subject  string    `json:"u,omitempty"`
	AuthTime time.Time `json:"a,omitzero"`
	Browser  string    `json:"b,omitempty"` // fingerprint of the login cookie
	SignedIn bool      `json:"x,omitempty"`

	id      string
	s       *Server
	idToken bool // the audience asked for next is that of the ID token
	// When it came back with its code.
	code    *code
	codeKey string
	codeRev uint64
}

// newRequest seals a request.
func (s *Server) newRequest(r request) (*request, error) {
	id, err := seal(s.secrets.ticket, "request", r)
	if err != nil {
		return nil, &hub.Error{Kind: hub.Internal, Op: "seal request", Err: err}
	}
	r.id, r.s = id, s
	return &r, nil
}

// openRequest reads a sealed request that did not expire.
func (s *Server) openRequest(id string) (*request, error) {
	r := &request{id: id, s: s}
	if err := open(s.secrets.ticket, "request", id, r); err != nil {
		return nil, err
	}
	if !time.Now().Before(r.Expires) {
		return nil, errors.New("expired")
	}
	return r, nil
}

// audience is the hub's for an access token, the application's for an ID token.
func audience(s *Server, client string, idToken bool) []string {
	if idToken {
		return []string{client}
	}
	return []string{s.cfg.Audience}
}

func (r *request) GetID() string          { return r.id }
func (r *request) GetACR() string         { return "" }
func (r *request) GetAMR() []string       { return []string{"pwd"} } // RFC 8176
func (r *request) GetAudience() []string  { return audience(r.s, r.Client, r.idToken) }
func (r *request) GetAuthTime() time.Time { return r.AuthTime }
func (r *request) GetClientID() string    { return r.Client }

// GetCodeChallenge is never nil for a code that is redeemed over HTTP, so the library always asks for the verifier.
func (r *request) GetCodeChallenge() *oidc.CodeChallenge {
	return &oidc.CodeChallenge{Challenge: r.Challenge, Method: oidc.CodeChallengeMethodS256}
}
func (r *request) GetNonce() string                   { return r.Nonce }
func (r *request) GetRedirectURI() string             { return r.RedirectURI }
func (r *request) GetResponseType() oidc.ResponseType { return oidc.ResponseTypeCode }
func (r *request) GetResponseMode() oidc.ResponseMode { return oidc.ResponseModeQuery }
func (r *request) GetScopes() []string                { return r.Scopes }
func (r *request) GetState() string                   { return r.State }
func (r *request) GetSubject() string                 { return r.Subject }
func (r *request) Done() bool                         { return r.SignedIn }

// refreshRequest is a grant whose refresh token came over HTTP.
type refreshRequest struct {
	s       *Server
	g       grant
	scopes  []string
	idToken bool
}

func (r *refreshRequest) GetAMR() []string            { return r.g.AMR }
func (r *refreshRequest) GetAudience() []string       { return audience(r.s, r.g.Client, r.idToken) }
func (r *refreshRequest) GetAuthTime() time.Time      { return r.g.AuthTime }
func (r *refreshRequest) GetClientID() string         { return r.g.Client }
func (r *refreshRequest) GetScopes() []string         { return r.scopes }
func (r *refreshRequest) GetSubject() string          { return r.g.Subject }
func (r *refreshRequest) SetCurrentScopes(s []string) { r.scopes = s }

// machineRequest is a program's request with its own secret.
type machineRequest struct {
	client, subject, audience string
	scopes                    []string
}

func (r *machineRequest) GetSubject() string    { return r.subject }
func (r *machineRequest) GetAudience() []string { return []string{r.audience} }
func (r *machineRequest) GetScopes() []string   { return r.scopes }

var (
	_ op.AuthRequest         = &request{}
	_ op.RefreshTokenRequest = &refreshRequest{}
	_ op.TokenRequest        = &machineRequest{}
)
