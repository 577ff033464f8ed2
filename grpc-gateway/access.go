package grpcgateway

import (
	"net/http"

	"github.com/coaphub/coaphub/hub"
)

// accessBody is what a caller wants: that a device is let in, or not.
type accessBody struct {
	State  hub.AccessState `json:"state"`
	Reason string          `json:"reason"`
}

func (g *Gateway) getAccess(w http.ResponseWriter, r *request) error {
	id, err := hub.ParseDeviceID(r.vars.device)
	if err != nil {
		return errNotFound
	}
	a, err := g.deps.Identities.Access(r.Context(), id, r.claims.Owner)
	if hub.IsKind(err, hub.NotFound) {
		return errNotFound
	}
	if err != nil {
		return err
	}
	return writeJSON(w, r, a)
}

// getQuarantine answers what was kept of a device in quarantine.
func (g *Gateway) getQuarantine(w http.ResponseWriter, r *request) error {
	id, err := hub.ParseDeviceID(r.vars.device)
	if err != nil || g.deps.Quarantine == nil {
		return errNotFound
	}
	k, err := g.deps.Quarantine.Kept(r.Context(), id, r.claims.Owner)
	if hub.IsKind(err, hub.NotFound) {
		return errNotFound
	}
	if err != nil {
		return err
	}
	return writeJSON(w, r, k)
}

// putAccess disables a device, puts it into quarantine, or admits it again, and answers how it stands then.
func (g *Gateway) putAccess(w http.ResponseWriter, r *request) error {
	var body accessBody
	if err := readJSON(r, &body); err != nil {
		return err
	}
	id, err := hub.ParseDeviceID(r.vars.device)
	if err != nil {
		return errNotFound
	}
	switch body.State {
	case hub.AccessDisabled:
		err = g.deps.Identities.Disable(r.Context(), id, r.claims.Owner, r.claims.Subject, body.Reason)
	case hub.AccessQuarantined:
		err = g.deps.Identities.Quarantine(r.Context(), id, r.claims.Owner, r.claims.Subject, body.Reason)
	case hub.AccessAdmitted:
		err = g.deps.Identities.Enable(r.Context(), id, r.claims.Owner)
	case hub.AccessRemoved, hub.AccessDenied:
		fallthrough
	default:
		return invalid("access-invalid", "the state is admitted, quarantined or disabled; a device is removed by deleting it, and denied by an operator")
	}
	if hub.IsKind(err, hub.NotFound) {
		return errNotFound
	}
	if err != nil {
		return err
	}
	return g.getAccess(w, r)
}
