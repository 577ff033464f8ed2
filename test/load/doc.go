// Package load measures a hub from outside: devices that do no more than what is measured, applications that ask and listen,
// clocks and /proc. It knows the protocols and nothing of the hub, and must import none of its parts. What it uses itself
// counts, since it runs beside what it measures: it says how much that was.
package load
