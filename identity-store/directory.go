// Package identitystore knows who owns which device: claim and release with generations, each step repeatable, so that what
// a crash left half done is finished later.
//
// It must not know CoAP or HTTP, nor what devices publish.
package identitystore

import (
	"context"

	"github.com/coaphub/coaphub/hub"
)

// Directory is what the identity store needs from the resource directory: ownership is the identity store's truth, the
// directory stamps events with it.
type Directory interface {
	// Register appends a registered event with owner and generation to the device's log, unless that generation is already
	// there.
	Register(ctx context.Context, own hub.Ownership, user string) error
	// Unregister appends an unregistered event, deletes links, twin and pending commands, and closes the live session. The
	// log stays until retention. Repeating it does nothing.
	Unregister(ctx context.Context, own hub.Ownership, user string) error
	// CancelCommands ends commands of a device and returns their IDs. Denied for a device that is not owner's, NotFound if
	// there is nothing to cancel.
	CancelCommands(ctx context.Context, owner hub.Owner, dev hub.DeviceID, pick hub.CommandPick, user, connection string) ([]string, error)
	// EndSession ends the session of a device that is online: no write of it that comes after this returned is stored. Denied for a device
	// that is not owner's.
	EndSession(ctx context.Context, owner hub.Owner, dev hub.DeviceID, user string) error
}
