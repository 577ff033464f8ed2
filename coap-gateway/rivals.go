package coapgateway

import (
	"context"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// A device that takes its own session over, because it has rebooted or its network has moved it, looks like a copy of it that
// does. What tells two from one is that they take turns: each comes back to where it was thrown out of. One device on two
// networks seldom does that several times within minutes, and two with one identity do little else.
const (
	rivalryTurns = 3 // so many returns, each after being thrown out from elsewhere
	rivalryTime  = 10 * time.Minute
	rivalryAgain = time.Hour        // a rivalry that goes on is reported that often
	takeoverTime = 5 * time.Second  // between the end of a session that was taken over and its end being noted, at most
	turnsTime    = 2 * time.Second  // another gateway is waited for so long
	rivalsTime   = 10 * time.Second // the report of rivals may take so long
	maxThrown    = 4                // places that are remembered; the one that was thrown out first is forgotten
)

// rivalry is what a device's sessions have done to each other lately.
type rivalry struct {
	thrown []string // hosts whose sessions were taken over from another host; nobody changes the slice
	turns  int
	last   time.Time
	told   time.Time // when it was reported last; zero if it was not
}

// takeover notes that a session from one host was taken over from another one, and reports whether that is a rivalry. Behind one
// address nobody can tell two from one.
func (r *rivalry) takeover(from, to string, now time.Time) bool {
	if from == to {
		return false
	}
	if now.Sub(r.last) > rivalryTime {
		*r = rivalry{told: r.told}
	}
	if slices.Contains(r.thrown, to) {
		r.turns++
	}
	thrown := []string{from}
	for _, host := range r.thrown {
		if host != from && len(thrown) < maxThrown {
			thrown = append(thrown, host)
		}
	}
	r.thrown, r.last = thrown, now
	return r.turns >= rivalryTurns
}

// found is takeover, and reports a rivalry that goes on no more often than rivalryAgain.
func (r *rivalry) found(from, to string, now time.Time) bool {
	if !r.takeover(from, to, now) || now.Sub(r.told) < rivalryAgain {
		return false
	}
	r.told = now
	return true
}

// Turns is what a gateway knows of a device's last session there, and of what the device's sessions have done to each other until then. Each
// gateway that takes a session over from another asks for it, so that what is known of a rivalry is where the device is.
type Turns struct {
	Owner     hub.Owner // whose the device was
	Host      string    // where the session came from
	TakenOver bool      // it is there, or its place was taken just now
	Thrown    []string
	Turns     int
	Last      time.Time
	Told      time.Time
}

// Turns says it of a device, to another gateway where it has signed in.
func (g *Gateway) Turns(dev hub.DeviceID) Turns { return g.devices.turns(dev) }

// tookOver finds out whether a device that took its session over from another gateway is in two places at once. A gateway that does not
// answer is gone, and a rivalry that goes on is found a few turns later.
func (p *peer) tookOver(s *session, gateway string) {
	ctx, cancel := context.WithTimeout(s.ctx, turnsTime)
	defer cancel()
	from, err := p.gw.deps.Turns(ctx, gateway, s.own.Device)
	if err != nil {
		s.log.Debug("the gateway where the device was before does not say where from", "gateway", gateway, "error", err)
		return
	}
	from.Thrown = from.Thrown[:min(len(from.Thrown), maxThrown)]
	if where, found := p.gw.devices.tookOver(s.own.Device, s.number, from); found {
		// Also when the session ends by it.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), rivalsTime)
		defer cancel()
		p.rivals(ctx, s, where)
	}
}

// rivals reports a device that is in two places at once. Whoever is told may put it into quarantine, which entered notices.
func (p *peer) rivals(ctx context.Context, s *session, where string) {
	p.gw.metrics.rivals.Inc()
	s.log.Warn("the same identity is in two places at once, taking turns", "from", where)
	p.gw.Refuse(Refusal{
		Remote: p.conn.Info().Remote.String(), Device: s.own.Device, What: "rivals", Reason: "the same identity signs in from " + where + " in turns",
	})
	if told := p.gw.deps.Rivals; told != nil {
		told(ctx, s.own.Device, where)
	}
}
