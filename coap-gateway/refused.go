package coapgateway

import (
	"fmt"
	"net"
	"slices"
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
	// What is "connection", "sign-up", "sign-in", "refresh", "enrolment", or "account": one of sign-up to refresh, before it was
	// looked at. With "rivals" none was refused, and that is the trouble.
	What   string
	Reason string // stable code or the handshake's error; Refused adds how often, if more than once
	Count  int    // how many equal ones this stands for, the last of them at Time
}

// same reports that a and b differ in no more than the time, the port and the number: one cause that goes on.
func (a Refusal) same(b Refusal) bool {
	return a.Device == b.Device && a.What == b.What && a.Reason == b.Reason && hostOf(a.Remote) == hostOf(b.Remote)
}

func hostOf(remote string) string {
	if host, _, err := net.SplitHostPort(remote); err == nil {
		return host
	}
	return remote
}

// refusals are the last different ones: who knocks a thousand times does not push out the others.
type refusals struct {
	mu   sync.Mutex // guards what follows
	list []Refusal  // oldest first
}

func (r *refusals) add(x Refusal) {
	r.mu.Lock()
	defer r.mu.Unlock()
	x.Count = 1
	// From the newest: a flood finds its own at once.
	for i := len(r.list) - 1; i >= 0; i-- {
		if r.list[i].same(x) {
			x.Count += r.list[i].Count
			r.list = slices.Delete(r.list, i, i+1)
			break
		}
	}
	if len(r.list) >= maxRefusals {
		r.list = slices.Delete(r.list, 0, 1)
	}
	r.list = append(r.list, x)
}

// newest returns them, newest first.
func (r *refusals) newest() []Refusal {
	r.mu.Lock()
	out := slices.Clone(r.list)
	r.mu.Unlock()
	slices.Reverse(out)
	for i := range out {
		if n := out[i].Count; n > 1 {
			out[i].Reason += fmt.Sprintf(" (%d times)", n)
		}
	}
	return out
}
