// Package device simulates OCF devices that use a hub: they sign up, sign in, publish, notify, obey and come back. It serves
// the tests and `coaphub simulate`.
//
// It must not know the hub's insides, its CoAP engine included: it is built on go-coap's clients, so that the hub is not only
// shown to agree with itself.
package device
