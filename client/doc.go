// Package client is for applications in Go that work with a hub: they read devices, twins and history, give commands and hear
// what happens, over the hub's HTTP API.
//
// A [Client] is for one hub and one caller, and any number of goroutines use it at once. Calls end with their context. What
// fails is an [*Error], which errors.Is compares with a [Kind] or a [Code]:
//
//	if errors.Is(err, client.NotFound) { … }                 // what sort of failure it is
//	if errors.Is(err, client.Code("command-expired")) { … }  // exactly this one; docs/errors.md lists the codes
//
// Lists are iterators. They fetch pages as the loop goes on, so a loop may take as long as it likes over each element, and one
// that is left early fetches no more. A failure is the last element. Values that come from the hub also hold what it sent
// ([JSON]), for members that this package does not know.
//
// It must not know the hub's insides: it imports nothing but the standard library, so that it adds nothing else to a program.
// So it has kinds of its own, where the hub has those of package hub.
package client
