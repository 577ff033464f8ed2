package coapgateway

import (
	"context"
	"iter"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Directory is what the gateway needs from the resource directory. Errors have hub's kinds; hub.Unavailable and
// hub.Internal become 5.03, never 4.01.
type Directory interface {
	// SignIn records that the device is online on conn (its Online, ID, ConnectedAt, Protocol and Service; LocalEndpoints
	// stay what they were) and gives the session's number. to is how the directory reaches the session; a former session of
	// the device is closed through its own Deliverer after the commit. Signing in again on a live session keeps its number:
	// the gateway does not call SignIn for that. Kinds: Denied if own's owner or generation is not the device's current one.
	SignIn(ctx context.Context, own hub.Ownership, conn hub.Connection, user string, to Deliverer) (hub.Session, error)
	// SignOut ends the session and records OFFLINE. A session that is not the current one is Precondition.
	SignOut(ctx context.Context, from hub.Stamp) error
	// Offline records that the session's connection ended. It does not end the session number: an older session's Offline is
	// ignored without error.
	Offline(ctx context.Context, from hub.Stamp) error
	// Publish merges links by href and returns what is now stored for each given one, in the given order.
	Publish(ctx context.Context, from hub.Stamp, links []hub.Link) ([]hub.Link, error)
	// Unpublish removes links by href and, for each removed one, sets its twin to NOT_FOUND. Empty hrefs means all. It
	// returns what was removed.
	Unpublish(ctx context.Context, from hub.Stamp, hrefs []hub.Href) ([]hub.Href, error)
	// Notify stores changes of the session's device in one go, durably on return. Changes that change nothing (same status,
	// content, types and ETag) make no event.
	Notify(ctx context.Context, from hub.Stamp, changes []hub.Change) error
	// SetTwin records the state of the twin's synchronisation.
	SetTwin(ctx context.Context, from hub.Stamp, state hub.TwinState) error
	// SetLocalEndpoints records where the device is reached in its own network. The same again makes no event.
	SetLocalEndpoints(ctx context.Context, from hub.Stamp, endpoints []string) error
	// SetContact records when a device that sleeps is expected; the zero value is one that does not sleep.
	SetContact(ctx context.Context, from hub.Stamp, to hub.Contact) error
	// TakeCommands binds at most n of the commands that wait for the device to the session and returns them; they may be sent
	// once it has returned, to this session and to no other. have are those that the session has: there is never more than one
	// for an href, and those for one href come in order. More says that others wait. Message is not used.
	TakeCommands(ctx context.Context, from hub.Stamp, have []hub.Taken, n int) (taken []hub.Command, more bool, _ error)
	// EndCommand records what the device answered to a command that is bound to the session, or that it did not.
	EndCommand(ctx context.Context, from hub.Stamp, id string, a hub.Answer) error
	// Command stores a command for a device, has it delivered, and returns how it ended. When ctx ends first the command goes on.
	// Kinds: Denied if the device is not owner's, NotFound for a resource that is neither published nor was ever reported,
	// Precondition with code "etag-mismatch", Deadline with code "command-expired" when its time was over, Exhausted, Invalid.
	Command(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error)
	// Device returns the current picture of a device if owner's stamp is on it, else NotFound.
	Device(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (*hub.Device, error)
	// Devices yields pictures of those of the given devices that carry owner's stamp, in ID order.
	Devices(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error]
	// FeedHead is the place behind everything that can be read now.
	FeedHead(ctx context.Context) (hub.Cursor, error)
	// Feed yields the commits behind the cursor that carry owner's stamp: those up to the position to, which a head was, or, if
	// that is zero, all, and those that come, until ctx ends. An error is the last element.
	Feed(ctx context.Context, owner hub.Owner, from hub.Cursor, to hub.Position) iter.Seq2[hub.Fed, error]
	// State yields pictures like Devices, never older than what FeedHead or Feed have told of.
	State(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error]
	// ETags returns the newest ETags of the device's resources, newest first, at most limit.
	ETags(ctx context.Context, dev hub.DeviceID, limit int) ([][]byte, error)
}

// records is what a session reads and writes of its device: a Directory, or, in quarantine, what keeps it apart.
type records interface {
	SignOut(ctx context.Context, from hub.Stamp) error
	Offline(ctx context.Context, from hub.Stamp) error
	Publish(ctx context.Context, from hub.Stamp, links []hub.Link) ([]hub.Link, error)
	Unpublish(ctx context.Context, from hub.Stamp, hrefs []hub.Href) ([]hub.Href, error)
	Notify(ctx context.Context, from hub.Stamp, changes []hub.Change) error
	SetTwin(ctx context.Context, from hub.Stamp, state hub.TwinState) error
	SetLocalEndpoints(ctx context.Context, from hub.Stamp, endpoints []string) error
	SetContact(ctx context.Context, from hub.Stamp, to hub.Contact) error
	Device(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (*hub.Device, error)
	ETags(ctx context.Context, dev hub.DeviceID, limit int) ([][]byte, error)
}

// Quarantine keeps apart what devices in quarantine write.
type Quarantine interface {
	// Quarantined reports whether a device is in quarantine. It does not block, and must say so before EndDenied is told.
	Quarantined(dev hub.DeviceID) bool
	// Keep stores a write, durably on return, and returns its number, which of a sign-in is the session's. The same message of a
	// session again is kept once. Precondition for a device that is not in quarantine (any more).
	Keep(ctx context.Context, own hub.Ownership, w hub.KeptWrite) (uint64, error)
}

// Deliverer is how the directory reaches a session.
type Deliverer = hub.Deliverer

// Identities is what the gateway needs from the identity store.
type Identities interface {
	// SignUp claims the device for the owner and registers it with the directory. A device of another owner is Denied with
	// code "device-owned-by-other". Repeating it for the same owner succeeds and finishes what a crash left half done.
	// Pin names the credential set and is fixed at the first sign-up; another later one is Denied ("device-pinned"). A device that
	// its owner deleted is Denied ("device-removed") unless he authorized it since.
	SignUp(ctx context.Context, dev hub.DeviceID, owner hub.Owner, pin, user string, authorized time.Time) (hub.Ownership, error)
	// Owner returns who owns the device; NotFound if nobody does (any more), also while it is being released.
	Owner(ctx context.Context, dev hub.DeviceID) (hub.Ownership, error)
	// SignOff deletes the device: releasing mark, unregister with the directory, release. NotFound if owner does not own it.
	SignOff(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string) error
	// Devices lists the owner's devices in ID order.
	Devices(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error)
	// Reachable refuses commands for a device of the owner's that is not let in: Precondition. Of others' it says nothing.
	Reachable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error
}

// Verifier checks access tokens. Kinds: Unauthenticated for a bad token, Unavailable while the provider's keys cannot be
// had.
type Verifier interface {
	Verify(ctx context.Context, token string) (hub.Claims, error)
}

// Provider exchanges codes and refresh tokens, of the embedded provider in process or of an external one over HTTP.
// Kinds: Unauthenticated when the provider refused the code or refresh token, Unavailable when it could not be asked.
type Provider interface {
	// Exchange redeems an authorization code for the device, or, if that is "", for the one that the code is for; Invalid if it is
	// for any. credential fingerprints the device's credential (empty: none); the same code for the same device and credential may
	// be repeated for 60 s and gives the same tokens.
	Exchange(ctx context.Context, dev hub.DeviceID, credential, code string) (hub.Tokens, error)
	// Refresh gives new tokens for a refresh token of the device, "" for whichever it was given to.
	Refresh(ctx context.Context, dev hub.DeviceID, refresh string) (hub.Tokens, error)
	// Revoke makes the tokens useless; for codes whose outcome was refused by the gateway.
	Revoke(ctx context.Context, t hub.Tokens) error
}
