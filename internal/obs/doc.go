// Package obs is what an operator sees of a process: its log, its metrics, its health and what was built.
//
// It must not know services: they are given a logger and a registerer, and answer for their health through a function.
package obs
