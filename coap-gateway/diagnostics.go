package coapgateway

import (
	"container/list"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// maxEnded is how many devices without a session are remembered; beyond that the one that left first is forgotten.
const maxEnded = 10_000

// Diagnostics is what the gateway knows of a device's attachment, for people.
type Diagnostics struct {
	Device         hub.DeviceID
	Owner          hub.Owner // whose the current or last session was
	Online         bool
	ConnectedSince time.Time // of the current or last session
	Protocol       hub.Protocol
	Remote         string
	TLSVersion     string // "" when not secure
	Suite          string // the cipher suite's name (IANA); "" when not secure
	Session        uint64
	Quarantined    bool   // the session's writes are kept apart
	LastError      string // the code of the session's last error response, "" for none
	Contact        hub.Contact
	// Of the connection of the current or last session, as CoAP without TLS.
	BytesIn, BytesOut uint64
	RoundTrip         time.Duration // of the last answered Ping; zero before
	EndedAt           time.Time
	EndReason         string // why the last session that ended did
	// RivalsAt is when the device was last reported to be in two places at once, Rivals where; zero and "" if it was not.
	RivalsAt time.Time
	Rivals   string
}

// diagnostics keeps them by device.
type diagnostics struct {
	mu    sync.Mutex // guards all below
	byDev map[hub.DeviceID]*attachment
	ended *list.List // of the devices without a session, who left first in front
}

type attachment struct {
	Diagnostics
	stats func() coap.Stats // of the connection; nil without a session, so that a connection that is gone is not kept
	place *list.Element     // in ended; nil with a session
	rivalry
	// before are the device's other sessions, oldest first, where they do not end each other: in quarantine.
	before []*attachment
}

func newDiagnostics() *diagnostics {
	return &diagnostics{byDev: map[hub.DeviceID]*attachment{}, ended: list.New()}
}

// begin reports true when the device is found to be in two places at once, which x.Rivals then names. Of a session that it took over from
// elsewhere, at another gateway, tookOver decides.
func (d *diagnostics) begin(x Diagnostics, stats func() coap.Stats, elsewhere bool) (rivals string, found bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var r rivalry
	if old := d.byDev[x.Device]; old != nil {
		if old.Owner == x.Owner { // where a device was is its owner's to know
			x.EndedAt, x.EndReason, x.Rivals, x.RivalsAt = old.EndedAt, old.EndReason, old.Rivals, old.RivalsAt
		}
		r = old.rivalry
		now := time.Now()
		if x.Quarantined { // both may be here then; what they did to each other counts anew when it is over
			r = rivalry{}
		}
		if old.takenOver(now) && !elsewhere && !x.Quarantined && !old.Quarantined {
			if found = r.found(hostOf(old.Remote), hostOf(x.Remote), now); found {
				x.Rivals, x.RivalsAt = hostOf(old.Remote)+" and "+hostOf(x.Remote), now
			}
		}
		if old.place != nil {
			d.ended.Remove(old.place)
		}
	}
	x.Online = true
	a := &attachment{Diagnostics: x, stats: stats, rivalry: r}
	if old := d.byDev[x.Device]; old != nil && old.Online && old.Quarantined && x.Quarantined {
		a.before, old.before = append(old.before, old), nil
	}
	d.byDev[x.Device] = a
	return x.Rivals, found
}

// takenOver reports whether a session that begins now takes the place of this one, whose end may have come first.
func (a *attachment) takenOver(now time.Time) bool {
	return a.Online || a.EndReason == "second-session" && now.Sub(a.EndedAt) < takeoverTime
}

// turns is Gateway.Turns.
func (d *diagnostics) turns(dev hub.DeviceID) Turns {
	d.mu.Lock()
	defer d.mu.Unlock()
	a := d.byDev[dev]
	if a == nil || a.Quarantined {
		return Turns{}
	}
	return Turns{
		Owner: a.Owner, Host: hostOf(a.Remote), TakenOver: a.takenOver(time.Now()), Thrown: a.thrown, Turns: a.rivalry.turns, Last: a.last, Told: a.told,
	}
}

// tookOver notes that a session took over that of another gateway, and reports whether the device is found to be in two places at once.
func (d *diagnostics) tookOver(dev hub.DeviceID, session uint64, from Turns) (rivals string, found bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.byDev[dev]
	if x == nil || x.Session != session || x.Owner != from.Owner || !from.TakenOver {
		return "", false
	}
	if from.Last.After(x.last) {
		told := x.told
		x.rivalry = rivalry{thrown: from.Thrown, turns: from.Turns, last: from.Last, told: from.Told}
		if told.After(x.told) {
			x.told = told
		}
	}
	now := time.Now()
	if found = x.found(from.Host, hostOf(x.Remote), now); found {
		x.Rivals, x.RivalsAt = from.Host+" and "+hostOf(x.Remote), now
	}
	return x.Rivals, found
}

func (d *diagnostics) failed(dev hub.DeviceID, session uint64, reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if x := d.byDev[dev]; x != nil && x.Session == session {
		x.LastError = reason
	}
}

// expect notes when a device that sleeps is expected.
func (d *diagnostics) expect(dev hub.DeviceID, session uint64, c hub.Contact) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if x := d.byDev[dev]; x != nil && x.Session == session {
		x.Contact = c
	}
}

// end notes why a session ended; that of an older session than the current one is of no interest, nor is a second end. A device that has
// another session is where that one is.
func (d *diagnostics) end(dev hub.DeviceID, session uint64, reason string, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.byDev[dev]
	if x == nil || !x.Online {
		return
	}
	if x.Session != session {
		x.before = slices.DeleteFunc(x.before, func(b *attachment) bool { return b.Session == session })
		return
	}
	if n := len(x.before); n > 0 { // another one is here
		next := x.before[n-1]
		next.before, next.EndedAt, next.EndReason, next.Rivals, next.RivalsAt = x.before[:n-1], at, reason, x.Rivals, x.RivalsAt
		d.byDev[dev] = next
		return
	}
	x.count()
	x.Online, x.EndedAt, x.EndReason, x.stats = false, at, reason, nil
	x.place = d.ended.PushBack(dev)
	if d.ended.Len() > maxEnded {
		delete(d.byDev, d.ended.Remove(d.ended.Front()).(hub.DeviceID))
	}
}

func (d *diagnostics) get(dev hub.DeviceID) (Diagnostics, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.byDev[dev]
	if x == nil {
		return Diagnostics{}, false
	}
	x.count()
	return x.Diagnostics, true
}

// count reads the connection's counters; d.mu is held.
func (x *attachment) count() {
	if x.stats != nil {
		s := x.stats()
		x.BytesIn, x.BytesOut, x.RoundTrip = s.BytesIn, s.BytesOut, s.RoundTrip
	}
}

// Security is how sessions are encrypted.
type Security struct {
	TLSVersion string // "" : they are not
	Suite      string
}

// security counts the sessions that there are.
func (d *diagnostics) security() map[Security]int {
	d.mu.Lock()
	defer d.mu.Unlock()
	out := map[Security]int{}
	for _, a := range d.byDev {
		for _, b := range append(a.before[:len(a.before):len(a.before)], a) {
			if b.Online {
				out[Security{b.TLSVersion, b.Suite}]++
			}
		}
	}
	return out
}
