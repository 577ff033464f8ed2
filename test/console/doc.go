// Package console holds the tests of the console in a browser: they start the hub's program, simulated devices and Chromium. What
// people see and do is in web/e2e; this package knows only how to start that, and what came of it.
package console
