package grpcgateway

import (
	"context"
	"net/http"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// maxToken bounds what is handed to the verifier; a longer header is no token of anybody.
const maxToken = 16 << 10

// authorize answers who calls and whether the token may do this kind of thing. It never asks whether the owner may touch a
// device: that is decided by the stamps on devices and events.
func (g *Gateway) authorize(ctx context.Context, authorization, scope string) (hub.Claims, error) {
	token := bearer(authorization)
	if token == "" {
		return hub.Claims{}, errTokenMissing
	}
	if len(token) > maxToken {
		return hub.Claims{}, hub.NewError(hub.Unauthenticated, "token-invalid", "the access token is not valid")
	}
	claims, err := g.deps.Verifier.Verify(ctx, token)
	if err != nil {
		return hub.Claims{}, err
	}
	if claims.Device {
		return hub.Claims{}, errDeviceToken
	}
	if !claims.Has(scope) {
		return hub.Claims{}, errScopeMissing
	}
	return claims, nil
}

// bearer returns the token of an Authorization header, "" if there is none.
func bearer(authorization string) string {
	// RFC 9110, Section 11.1: the scheme is case-insensitive.
	scheme, token, _ := strings.Cut(authorization, " ")
	if !strings.EqualFold(scheme, "Bearer") {
		return ""
	}
	return strings.Trim(token, " ")
}

// authorization returns what a request presents. Pages in a browser can set no header of a WebSocket's handshake but its
// protocols, so the token may stand there, behind the protocol Bearer (RFC 6455, Section 11.3.4). A cookie never authorizes.
func authorization(r *http.Request) string {
	if a := r.Header.Get("Authorization"); a != "" || !upgrade(r) {
		return a
	}
	protocols := strings.Split(strings.Join(r.Header.Values("Sec-WebSocket-Protocol"), ","), ",")
	if len(protocols) == 2 && strings.TrimSpace(protocols[0]) == bearerProtocol {
		return "Bearer " + strings.TrimSpace(protocols[1])
	}
	return ""
}

// bearerProtocol is the WebSocket protocol that says that the next one is a token.
const bearerProtocol = "Bearer"

// upgrade reports whether the request asks for a WebSocket.
func upgrade(r *http.Request) bool { return strings.EqualFold(r.Header.Get("Upgrade"), "websocket") }
