// Package auth is the hub as a resource server: it checks access tokens of one or more OpenID providers and turns them into
// hub.Claims, and it exchanges codes and refresh tokens with a provider over HTTP on a device's behalf.
//
// It must not know which door asks, what the token will be used for, or any store: whether a principal may do something is
// decided elsewhere. It never takes trouble with a provider for a bad token: the first is hub.Unavailable, only the second
// hub.Unauthenticated, because devices throw their credentials away on the second.
package auth
