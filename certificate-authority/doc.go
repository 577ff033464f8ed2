// Package certificateauthority keeps the hub's own certification authorities and signs with them: identity certificates for
// devices, the hub's certificate on the devices' side, server certificates for HTTPS and for the inside. What a certificate
// says is its profile's to say and never the request's. Each certificate of a device is in a ledger before anybody has it.
//
// It must not know CoAP, HTTP or tokens: the doors say who asks, in hub's words, and this package decides.
package certificateauthority
