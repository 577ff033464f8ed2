package grpcgateway

import (
	"context"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// maxToken bounds what is handed to the verifier; a longer header is no token of anybody.
const maxToken = 16 << 10

// authorize answers who calls and whether the token may do this kind of thing. It never asks whether the owner may touch a
// device: that is decided by the stamps on devices and events.
func (g *Gateway) authorize(ctx context.Context, authorization, scope string) (hub.Claims, error) {
	// RFC 9110, Section 11.1: the scheme is case-insensitive.
	scheme, token, _ := strings.Cut(authorization, " ")
	token = strings.Trim(token, " ")
	if !strings.EqualFold(scheme, "Bearer") || token == "" {
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
