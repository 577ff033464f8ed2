// Package oauthserver is the embedded OpenID provider, for installations that have none: local accounts, a login page,
// authorization codes with PKCE, refresh tokens that rotate, client credentials and the device grant, with tokens that the
// hub's doors verify like those of any other provider.
//
// It must not know devices beyond their IDs, and neither CoAP nor what a store is made of. HTTP is only its own pages and
// endpoints.
package oauthserver
