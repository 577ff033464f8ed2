// Package hostile holds the tests of peers that mean harm: what they cost the hub is bounded and given back, they are answered as
// the protocols say, and devices and applications beside them notice nothing.
//
// It sees the hub from outside only: over its doors and by its metrics.
package hostile
