// Package cluster holds the tests of a hub whose parts run as real processes, on MongoDB and NATS: what devices and applications see of
// it while processes and servers die.
//
// It must not know the insides of the parts.
package cluster
