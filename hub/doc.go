// Package hub is the vocabulary of coaphub: devices, owners, links, contents, events, sessions, claims and the kinds of
// errors, as plain values that nobody changes after they were handed on.
//
// It must not know anything else of this module, nor any technology: it imports the standard library only. CoAP, HTTP,
// protobuf and the stores each translate between themselves and these words.
package hub
