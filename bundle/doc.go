// Package bundle puts the parts together: one configuration, one data folder, one process, and the socket through which the
// hub's own machine talks to it.
//
// It knows every service; nothing but the command line and tests may know it. Who runs where is decided in wire.go and
// nowhere else.
package bundle
