// Package resourcedirectory owns what devices are: links, twins, sessions, presence and history. It turns requests into
// commits of the log, one worker a device, and answers reads from immutable pictures.
//
// It must not know CoAP, HTTP, protobuf or who its callers are: it takes hub's words and a store.
package resourcedirectory
