// Package e2e holds the end-to-end tests: they see the hub from outside only, over CoAP, HTTP, gRPC and the command line,
// with clients that are not ours where there are any.
package e2e
