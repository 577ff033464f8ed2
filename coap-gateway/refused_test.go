package coapgateway

import (
	"fmt"
	"strings"
	"testing"
)

// A flood from one host is one entry, however many ports it comes from; the others stay.
func TestFloodIsOneRefusal(t *testing.T) {
	t.Parallel()
	var r refusals
	r.add(Refusal{Remote: "192.0.2.1:1", What: "sign-in", Device: lampID, Reason: "token-expired"})
	for i := range 3 * maxRefusals {
		r.add(Refusal{Remote: fmt.Sprintf("[2001:db8::7]:%d", i+1), What: "connection", Reason: "handshake-evicted"})
	}
	r.add(Refusal{Remote: "192.0.2.1:2", What: "connection", Reason: "handshake-evicted"})
	got := r.newest()
	if len(got) != 3 || got[0].Remote != "192.0.2.1:2" || got[2].Device != lampID || got[2].Reason != "token-expired" {
		t.Fatalf("%+v", got)
	}
	if flood := got[1]; flood.Count != 3000 || flood.Reason != "handshake-evicted (3000 times)" || flood.Remote != "[2001:db8::7]:3000" {
		t.Errorf("%+v", flood)
	}
	if again := r.newest(); strings.Count(again[1].Reason, "times") != 1 {
		t.Errorf("asked again: %q", again[1].Reason)
	}
}

// What differs is kept apart, up to the bound; then the oldest goes.
func TestRefusalsAreBounded(t *testing.T) {
	t.Parallel()
	var r refusals
	for i := range maxRefusals + 5 {
		r.add(Refusal{Remote: "192.0.2.1:1", What: "connection", Reason: fmt.Sprint(i)})
	}
	if got := r.newest(); len(got) != maxRefusals || got[0].Reason != fmt.Sprint(maxRefusals+4) || got[len(got)-1].Reason != "5" {
		t.Errorf("%d, from %+v to %+v", len(got), got[0], got[len(got)-1])
	}
}
