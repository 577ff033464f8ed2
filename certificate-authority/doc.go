// Package certificateauthority keeps the hub's own certification authorities and signs with them: identity certificates for
// devices, the hub's certificate on the devices' side, server certificates for HTTPS and for the inside.
//
// It must not know CoAP, HTTP, who asks, or whether they may: the doors decide that and hand over requests in hub's words.
package certificateauthority
