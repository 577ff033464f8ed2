// Package zlint looks at what the hub signs as others would: every profile of certificate and the revocation list, with the checks
// of zlint. It is a module of its own, so that zlint does not lift the product's versions.
//
// It must not know the hub but as a program with ports and files.
package zlint
