package coapgateway

import (
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxRefusals is how many refusals are remembered; then the oldest is forgotten.
const maxRefusals = 1000

// Refusal is a connection, sign-up or sign-in that was refused, for people who wonder why a device does not come.
type Refusal struct {
	Time   time.Time
	Remote string
	Device hub.DeviceID // "" if it never got so far
	What   string       // "connection", "sign-up", "sign-in", "refresh"
	Reason string       // stable code or the handshake's error
}

// refusals is a ring of the last ones.
type refusals struct {
	mu   sync.Mutex // guards all below
	ring []Refusal
	next int
}

func (r *refusals) add(x Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.ring) < maxRefusals {
		r.ring = append(r.ring, x)
		return
	}
	r.ring[r.next] = x
	r.next = (r.next + 1) % maxRefusals
}

// list returns them, newest first.
func (r *refusals) list() []Refusal {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := len(r.ring)
	out := make([]Refusal, 0, n)
	for i := range n {
		out = append(out, r.ring[(r.next+n-1-i)%n])
	}
	return out
}
