package grpcgateway

import (
	"context"
	"net/http"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// DeviceStatus is how a device is attached, or was until it went; of this run of the hub only.
type DeviceStatus struct {
	DeviceID       string    `json:"deviceId"`
	Online         bool      `json:"online"`
	Protocol       string    `json:"protocol"`      // coap+tcp, coaps+tcp
	TLS            string    `json:"tls,omitempty"` // its version
	Remote         string    `json:"remote"`
	Session        uint64    `json:"session"`
	ConnectedSince time.Time `json:"connectedSince"` // of the session above, also if it has ended
	LastError      string    `json:"lastError,omitempty"`
	BytesIn        uint64    `json:"bytesIn"` // of its connection, CoAP without TLS
	BytesOut       uint64    `json:"bytesOut"`
	RoundTrip      float64   `json:"roundTripSeconds,omitempty"` // of the last answered ping
	// NextContact is when a device that sleeps is expected to say something, ContactInterval how long it usually sleeps; absent
	// for others.
	NextContact     *time.Time `json:"nextContact,omitempty"`
	ContactInterval float64    `json:"contactIntervalSeconds,omitempty"`
	// EndedAt and EndReason are of the last session that ended: the one above, or the one before it.
	EndedAt   *time.Time `json:"endedAt,omitempty"`
	EndReason string     `json:"endReason,omitempty"`
	// Quarantined is that what it writes in this session is kept apart.
	Quarantined bool `json:"quarantined,omitempty"`
	// RivalsAt is when the device was last reported to be in two places at once, Rivals where.
	RivalsAt *time.Time `json:"rivalsAt,omitempty"`
	Rivals   string     `json:"rivals,omitempty"`
}

// Connections knows how devices are attached.
type Connections interface {
	// Connection says how a device is attached, or was, while it was the owner's. NotFound if it did not sign in since the hub started.
	Connection(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (DeviceStatus, error)
}

func (g *Gateway) getConnection(w http.ResponseWriter, r *request) error {
	if g.deps.Connections == nil {
		return errNoRoute
	}
	id, err := g.owned(r)
	if err != nil {
		return err
	}
	s, err := g.deps.Connections.Connection(r.Context(), id, r.claims.Owner)
	if err != nil {
		return err
	}
	return writeJSON(w, r, s)
}
