package grpcgateway

import (
	"context"
	"net/http"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// PreSharedKey is what is known of a device's key. It is shown once, when it is made.
type PreSharedKey struct {
	Identity string    `json:"identity"`           // RFC 4279, Section 2
	Key      string    `json:"key,omitempty"`      // its bytes are the key
	Created  time.Time `json:"createdAt,omitzero"` // zero: nobody knows
	User     string    `json:"createdBy,omitempty"`
}

// PreSharedKeys gives devices keys for DTLS.
type PreSharedKeys interface {
	// Key says what is known of a device's key, without it. NotFound if it has none.
	Key(ctx context.Context, dev hub.DeviceID) (PreSharedKey, error)
	// NewKey makes a key in place of the one that the device may have had, whose session ends. Precondition where devices cannot
	// come with one.
	NewKey(ctx context.Context, dev hub.DeviceID, user string) (PreSharedKey, error)
	// ForgetKey makes a device's key useless, and ends the session of whoever came with it. NotFound if it has none.
	ForgetKey(ctx context.Context, dev hub.DeviceID) error
}

// keyOf finds the caller's device, where devices can have keys.
func (g *Gateway) keyOf(r *request) (hub.DeviceID, error) {
	if g.deps.PreSharedKeys == nil {
		return "", errNoRoute
	}
	return g.owned(r)
}

// owned finds the device that the path names, of the caller's.
func (g *Gateway) owned(r *request) (hub.DeviceID, error) {
	id, err := hub.ParseDeviceID(r.vars.device)
	if err != nil {
		return "", errNotFound
	}
	a, err := g.deps.Identities.Access(r.Context(), id, r.claims.Owner)
	if hub.IsKind(err, hub.NotFound) || err == nil && a.State == hub.AccessRemoved { // it is nobody's
		return "", errNotFound
	}
	return id, err
}

func (g *Gateway) getPreSharedKey(w http.ResponseWriter, r *request) error {
	id, err := g.keyOf(r)
	if err != nil {
		return err
	}
	key, err := g.deps.PreSharedKeys.Key(r.Context(), id)
	if err != nil {
		return err
	}
	return writeJSON(w, r, key)
}

func (g *Gateway) newPreSharedKey(w http.ResponseWriter, r *request) error {
	id, err := g.keyOf(r)
	if err != nil {
		return err
	}
	key, err := g.deps.PreSharedKeys.NewKey(r.Context(), id, r.claims.Subject)
	if err != nil {
		return err
	}
	w.Header().Set("Cache-Control", "no-store")
	return writeJSON(w, r, key)
}

func (g *Gateway) deletePreSharedKey(w http.ResponseWriter, r *request) error {
	id, err := g.keyOf(r)
	if err != nil {
		return err
	}
	if err := g.deps.PreSharedKeys.ForgetKey(r.Context(), id); err != nil {
		return err
	}
	return writeJSON(w, r, struct {
		Identity string `json:"identity"`
	}{string(id)})
}
