package bundle

import (
	"context"
	"crypto/x509"
	"net/http"
	"time"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	"github.com/coaphub/coaphub/hub"
)

// DeviceAccess is how a device stands with the hub.
type DeviceAccess struct {
	DeviceID string `json:"deviceId"`
	hub.Access
}

type accessRequest struct {
	DeviceID string `json:"deviceId"`
	Reason   string `json:"reason,omitempty"`
}

func (q accessRequest) target() string { return q.DeviceID }

// Denial is an entry of the deny list.
type Denial = hub.Denial

type denyRequest struct {
	Of     hub.DenialOf `json:"of"`
	Value  string       `json:"value"`
	Reason string       `json:"reason,omitempty"`
	Until  time.Time    `json:"until,omitzero"`
}

func (q denyRequest) target() string { return string(q.Of) + " " + q.Value }

// The operator's calls about who is let in. Whose device it is does not matter.

func (a *assembly) deviceAccess(ctx context.Context, q accessRequest) (DeviceAccess, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err != nil {
		return DeviceAccess{}, err
	}
	access, err := a.identities.Access(ctx, dev, "")
	return DeviceAccess{string(dev), access}, err
}

func (a *assembly) disableDevice(ctx context.Context, q accessRequest) (DeviceAccess, error) {
	return a.changeAccess(ctx, q, func(dev hub.DeviceID) error { return a.identities.Disable(ctx, dev, "", callerOf(ctx), q.Reason) })
}

func (a *assembly) quarantineDevice(ctx context.Context, q accessRequest) (DeviceAccess, error) {
	return a.changeAccess(ctx, q, func(dev hub.DeviceID) error {
		return a.identities.Quarantine(ctx, dev, "", callerOf(ctx), q.Reason)
	})
}

// InQuarantine is a device in quarantine.
type InQuarantine struct {
	DeviceAccess
	Writes  int    `json:"writes"`
	Dropped uint64 `json:"dropped"`
}

func (a *assembly) listQuarantine(ctx context.Context, _ struct{}) ([]InQuarantine, error) {
	out := []InQuarantine{} // an empty list for scripts, not null
	for _, dev := range a.identities.InQuarantine() {
		access, err := a.identities.Access(ctx, dev, "")
		if hub.IsKind(err, hub.NotFound) { // it has just left
			continue
		}
		if err != nil {
			return nil, err
		}
		n, dropped, err := a.quarantine.Count(ctx, dev)
		if err != nil {
			return nil, err
		}
		out = append(out, InQuarantine{DeviceAccess{string(dev), access}, n, dropped})
	}
	return out, nil
}

func (a *assembly) showQuarantine(ctx context.Context, q accessRequest) (hub.Kept, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err != nil {
		return hub.Kept{}, err
	}
	return keptWrites{a}.Kept(ctx, dev, "")
}

var errNotOwned = hub.NewError(hub.NotFound, "device-not-owned", "the device has no owner, or another one")

// keptWrites is grpcgateway.Quarantine.
type keptWrites struct{ a *assembly }

// Kept is of grpcgateway.Quarantine. The owner "" is an operator.
func (k keptWrites) Kept(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Kept, error) {
	own, err := k.a.identities.Owner(ctx, dev)
	if err == nil && owner != "" && own.Owner != owner {
		err = errNotOwned
	}
	if err != nil {
		return hub.Kept{}, err
	}
	return k.a.quarantine.Kept(ctx, own)
}

func (a *assembly) enableDevice(ctx context.Context, q accessRequest) (DeviceAccess, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err == nil {
		err = a.identities.Enable(ctx, dev, "")
	}
	if err != nil {
		return DeviceAccess{}, err
	}
	access, err := a.deviceAccess(ctx, q)
	if hub.IsKind(err, hub.NotFound) { // it was removed, and is nobody's
		return DeviceAccess{string(dev), hub.Access{State: hub.AccessAdmitted}}, nil
	}
	return access, err
}

func (a *assembly) removeDevice(ctx context.Context, q accessRequest) (DeviceAccess, error) {
	return a.changeAccess(ctx, q, func(dev hub.DeviceID) error { return a.identities.Remove(ctx, dev, "", callerOf(ctx), q.Reason) })
}

func (a *assembly) changeAccess(ctx context.Context, q accessRequest, change func(hub.DeviceID) error) (DeviceAccess, error) {
	dev, err := hub.ParseDeviceID(q.DeviceID)
	if err == nil {
		err = change(dev)
	}
	if err != nil {
		return DeviceAccess{}, err
	}
	return a.deviceAccess(ctx, q)
}

func (a *assembly) listDenials(context.Context, struct{}) ([]Denial, error) {
	return append([]Denial{}, a.identities.Denials()...), nil // an empty list for scripts, not null
}

func (a *assembly) deny(ctx context.Context, q denyRequest) (Denial, error) {
	d, err := hub.ParseDenial(q.Of, q.Value)
	if err != nil {
		return d, err
	}
	d.Reason, d.Until, d.User = q.Reason, q.Until.UTC(), callerOf(ctx)
	d, err = a.identities.Deny(ctx, d)
	if err == nil {
		a.log.InfoContext(ctx, "denied", "of", d.Of, "value", d.Value, "reason", d.Reason, "user", d.User)
	}
	return d, err
}

func (a *assembly) undeny(ctx context.Context, q denyRequest) (struct{}, error) {
	d, err := hub.ParseDenial(q.Of, q.Value)
	if err == nil {
		err = a.identities.Undeny(ctx, d.Of, d.Value)
	}
	return struct{}{}, err
}

// endCredentials makes what the hub has given a removed device worth nothing. It may be repeated.
func (a *assembly) endCredentials(ctx context.Context, own hub.Ownership) error {
	revoked, err := a.certificates.Revoke(ctx, hub.CertificateFilter{All: true, Devices: []hub.DeviceID{own.Device}}, hub.RevokedCessation)
	a.logRevoked(ctx, revoked)
	if err == nil {
		err = a.psk.forget(ctx, own.Device)
	}
	if err == nil && a.provider != nil {
		err = a.provider.EndDevice(ctx, own.Owner, own.Device)
	}
	return err
}

// handedOver ends the certificates that former owners of a device still have, and the pre-shared key that one was shown, unless the
// device has come with no certificate: it may have nothing else.
func (a *assembly) handedOver(ctx context.Context, dev hub.DeviceID, owner hub.Owner, cert *x509.Certificate) error {
	serial := ""
	if cert != nil {
		serial = hub.SerialOf(cert.SerialNumber)
	}
	revoked, err := a.certificates.HandOver(ctx, dev, owner, serial)
	a.logRevoked(ctx, revoked)
	if err == nil && cert != nil {
		err = a.psk.handOver(ctx, dev, owner)
	}
	return err
}

// rivals records that a device is in two places at once, and puts it into quarantine if that is configured.
func (a *assembly) rivals(ctx context.Context, dev hub.DeviceID, where string) {
	e := hub.AuditEntry{Door: "hub", Call: "rivals", Target: string(dev) + " " + where, User: "hub", Outcome: a.cfg.CoAPGateway.Rivals}
	if a.cfg.CoAPGateway.Rivals == coapgateway.RivalsQuarantine {
		if err := a.identities.Quarantine(ctx, dev, "", "hub", "the same identity was in two places at once: "+where); err != nil {
			e.Outcome, _ = hub.Public(err)
			a.log.ErrorContext(ctx, "a device in two places at once was put into quarantine, but that could not be stored", "device", dev, "error", err)
		}
	}
	if err := a.audit.Record(ctx, e); err != nil {
		a.log.ErrorContext(ctx, "a device in two places at once is missing in the audit log", "device", dev, "error", err)
	}
}

func (a *assembly) logRevoked(ctx context.Context, cs []hub.Certificate) {
	for _, c := range cs {
		a.log.InfoContext(ctx, "certificate revoked", "serial", c.Serial, "device", c.Device, "reason", c.Reason.String(), "user", callerOf(ctx))
	}
}

// readmit lets a device that was removed sign up again: somebody onboards it, the owner who had it then, or an operator (""). One that
// is disabled or denied stays so.
func (a *assembly) readmit(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	err := a.identities.Admits(ctx, dev, nil)
	if code, _ := hub.Public(err); err != nil && code == "device-removed" {
		if err = a.identities.Enable(ctx, dev, owner); hub.IsKind(err, hub.NotFound) { // somebody was faster, or it was another owner's
			err = nil
			if owner != "" {
				err = a.identities.Admits(ctx, dev, nil)
			}
		}
	}
	return err
}

// Access says how a device stands with the hub. NotFound for one that nobody has and that was not removed.
func (c *Control) Access(ctx context.Context, deviceID string) (a DeviceAccess, err error) {
	err = c.call(ctx, http.MethodPost, "/devices/access", accessRequest{DeviceID: deviceID}, &a)
	return a, err
}

// DisableDevice keeps a device out, which stays its owner's.
func (c *Control) DisableDevice(ctx context.Context, deviceID, reason string) (a DeviceAccess, err error) {
	err = c.call(ctx, http.MethodPost, "/devices/disable", accessRequest{deviceID, reason}, &a)
	return a, err
}

// QuarantineDevice lets a device in, and has what it writes kept apart.
func (c *Control) QuarantineDevice(ctx context.Context, deviceID, reason string) (a DeviceAccess, err error) {
	err = c.call(ctx, http.MethodPost, "/devices/quarantine", accessRequest{deviceID, reason}, &a)
	return a, err
}

// Quarantine lists the devices in quarantine.
func (c *Control) Quarantine(ctx context.Context) (ds []InQuarantine, err error) {
	err = c.call(ctx, http.MethodGet, "/quarantine", nil, &ds)
	return ds, err
}

// Kept is what is kept of a device in quarantine.
func (c *Control) Kept(ctx context.Context, deviceID string) (k hub.Kept, err error) {
	err = c.call(ctx, http.MethodPost, "/quarantine/show", accessRequest{DeviceID: deviceID}, &k)
	return k, err
}

// EnableDevice lets a device in again that was disabled or removed, and ends its quarantine.
func (c *Control) EnableDevice(ctx context.Context, deviceID string) (a DeviceAccess, err error) {
	err = c.call(ctx, http.MethodPost, "/devices/enable", accessRequest{DeviceID: deviceID}, &a)
	return a, err
}

// RemoveDevice deletes a device, which does not come back by itself.
func (c *Control) RemoveDevice(ctx context.Context, deviceID, reason string) (a DeviceAccess, err error) {
	err = c.call(ctx, http.MethodPost, "/devices/remove", accessRequest{deviceID, reason}, &a)
	return a, err
}

// Denials is the deny list.
func (c *Control) Denials(ctx context.Context) (ds []Denial, err error) {
	err = c.call(ctx, http.MethodGet, "/deny", nil, &ds)
	return ds, err
}

// Deny puts something on the deny list; of the entry, what, reason and end are taken.
func (c *Control) Deny(ctx context.Context, d Denial) (Denial, error) {
	err := c.call(ctx, http.MethodPost, "/deny", denyRequest{d.Of, d.Value, d.Reason, d.Until}, &d)
	return d, err
}

// Undeny takes something off the deny list.
func (c *Control) Undeny(ctx context.Context, of hub.DenialOf, value string) error {
	return c.call(ctx, http.MethodPost, "/deny/remove", denyRequest{Of: of, Value: value}, nil)
}
