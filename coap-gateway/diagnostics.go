package coapgateway

import (
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// maxEnded is how many devices without a session are remembered; beyond that the one that left first is forgotten.
const maxEnded = 10_000

// Diagnostics is what the gateway knows of a device's attachment, for people.
type Diagnostics struct {
	Device         hub.DeviceID
	Online         bool
	ConnectedSince time.Time // of the current or last session
	Protocol       hub.Protocol
	Remote         string
	TLSVersion     string // "" when not secure
	Session        uint64
	LastError      string // the last error response, "" for none
	EndedAt        time.Time
	EndReason      string // why the last session ended
}

// diagnostics keeps them by device.
type diagnostics struct {
	mu    sync.Mutex // guards all below
	byDev map[hub.DeviceID]*Diagnostics
	ended []hub.DeviceID // devices whose session ended, oldest first; may name a device that is back
}

func newDiagnostics() *diagnostics { return &diagnostics{byDev: map[hub.DeviceID]*Diagnostics{}} }

func (d *diagnostics) begin(x Diagnostics) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if old := d.byDev[x.Device]; old != nil {
		x.EndedAt, x.EndReason = old.EndedAt, old.EndReason
	}
	x.Online = true
	d.byDev[x.Device] = &x
}

func (d *diagnostics) failed(dev hub.DeviceID, session uint64, reason string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if x := d.byDev[dev]; x != nil && x.Session == session {
		x.LastError = reason
	}
}

// end notes why a session ended; that of an older session than the current one is of no interest.
func (d *diagnostics) end(dev hub.DeviceID, session uint64, reason string, at time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	x := d.byDev[dev]
	if x == nil || x.Session != session {
		return
	}
	x.Online, x.EndedAt, x.EndReason = false, at, reason
	d.ended = append(d.ended, dev)
	for len(d.ended) > maxEnded {
		gone := d.ended[0]
		d.ended = d.ended[1:]
		if y := d.byDev[gone]; y != nil && !y.Online {
			delete(d.byDev, gone)
		}
	}
}

func (d *diagnostics) get(dev hub.DeviceID) (Diagnostics, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if x := d.byDev[dev]; x != nil {
		return *x, true
	}
	return Diagnostics{}, false
}
