// Package coap is the CoAP engine: it reads and writes each connection and owns message layer, signalling, block-wise
// transfer, observation, keep-alive and their timers, for both roles on one connection (RFC 7252, 7641, 7959, 8323), over
// streams (TCP, TLS, WebSocket) and datagrams (UDP, DTLS).
//
// It must not know services, stores or what a path means; from go-coap it borrows message and option types and encoders.
package coap
