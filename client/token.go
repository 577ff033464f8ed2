package client

import (
	"context"
	"time"
)

// Token is an access token.
type Token struct {
	Access  string    `json:"accessToken"`
	Expires time.Time `json:"expires,omitzero"` // zero: it is used until the hub refuses it
}

// TokenSource gives an access token. A client asks for the first one, for another shortly before that ends, and when the hub
// refused it: one call at a time. An error is that of the call the token was for.
type TokenSource func(ctx context.Context) (Token, error)

// Static is a source of one token, until it ends.
func Static(token string) TokenSource {
	return func(context.Context) (Token, error) { return Token{Access: token}, nil }
}

// early is how long before its end a token is replaced: a request that takes a while must not outlive it on its way.
const early = 30 * time.Second

// tokens remembers the newest token of a source.
type tokens struct {
	source TokenSource
	turn   chan struct{} // capacity 1; whoever fills it has the field below
	newest Token
}

// get returns a token other than the refused one, if the source has another.
func (t *tokens) get(ctx context.Context, refused string) (string, error) {
	select {
	case t.turn <- struct{}{}:
	case <-ctx.Done():
		return "", context.Cause(ctx)
	}
	defer func() { <-t.turn }()
	n := t.newest
	if n.Access != "" && n.Access != refused && (n.Expires.IsZero() || time.Until(n.Expires) > early) {
		return n.Access, nil
	}
	n, err := t.source(ctx)
	if err != nil {
		return "", err
	}
	t.newest = n
	return n.Access, nil
}
