// Package revocation knows which certificates of other authorities were revoked: it fetches their lists (RFC 5280) and asks their
// responders (RFC 6960) at places that a configuration names, never at those that a certificate does, and decides what becomes of a
// certificate of which nothing is known. A look in a handshake reads maps and waits for nobody.
//
// It must not know CoAP or stores, nor the hub's own authority, whose ledger says more than a list.
package revocation
