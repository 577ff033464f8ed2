package grpcgateway

import (
	"context"
	"iter"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Directory is what the door needs from the resource directory. Reads never wait for writers and do not warm devices.
type Directory interface {
	// Devices yields pictures of those of the given devices that carry owner's stamp, in ID order. An error is the last
	// element.
	Devices(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error]
	// Changes returns a number that differs from an earlier one if the device looks different in a list since: its ownership,
	// metadata, links, labels or /oic/d. What was read after the number holds while the number does.
	Changes(dev hub.DeviceID) uint64
	// DeviceAt returns the device as it was at t (time-travel read): NotFound if it had no owner's stamp then, or t is before
	// what retention kept.
	DeviceAt(ctx context.Context, owner hub.Owner, dev hub.DeviceID, t time.Time) (*hub.Device, error)
	// SetLabels changes the labels of owner's device and returns them. NotFound if it does not carry owner's stamp; Invalid and
	// TooLarge as hub.LabelChange.Apply.
	SetLabels(ctx context.Context, owner hub.Owner, dev hub.DeviceID, change hub.LabelChange, user string) (hub.Labels, error)
	// History yields the commits of the device that carry owner's stamp and are newer than after (zero: from the start), in
	// order.
	History(ctx context.Context, owner hub.Owner, dev hub.DeviceID, after time.Time) iter.Seq2[hub.Commit, error]
	// Command stores a command, has it delivered, and returns how it ended; with Async, as soon as it is stored. Denied for a
	// device that is not owner's, NotFound for a resource that is not there, Precondition for a condition that is not met,
	// Exhausted when too many commands of the device wait, Deadline when it expired.
	Command(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error)
	// CancelCommands ends commands of a device and returns their IDs. Denied for a device that is not owner's, NotFound if
	// there is nothing to cancel.
	CancelCommands(ctx context.Context, owner hub.Owner, dev hub.DeviceID, pick hub.CommandPick, user, connection string) ([]string, error)
	// FeedHead is the place behind everything that has happened to any device.
	FeedHead(ctx context.Context) (hub.Cursor, error)
	// Feed yields the commits behind the cursor that carry owner's stamp: those up to the position to, which a head was, or, if
	// that is zero, all, and those that come, until ctx ends. An error is the last element: Precondition with code feed-lagged if
	// commits behind the cursor are no longer kept. Nobody else waits for a slow caller.
	Feed(ctx context.Context, owner hub.Owner, from hub.Cursor, to hub.Position) iter.Seq2[hub.Fed, error]
	// State is Devices, but each picture has all commits in it that FeedHead was behind when State was called.
	State(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error]
}

// Identities is what the door needs from the identity store.
type Identities interface {
	// Devices lists the owner's devices in ID order.
	Devices(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error)
	// Remove deletes the device, closes its session, and keeps it from coming back by itself. NotFound if owner does not own it.
	Remove(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error
	// Access says how a device stands that is owner's, or was when it was removed. NotFound for others.
	Access(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Access, error)
	// Disable keeps a device out, which stays owner's, and ends its session; Enable lets it in again, also one that was removed.
	// Quarantine lets it in and keeps apart what it writes, until Enable. NotFound for others, Invalid for a reason that is too long.
	Quarantine(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error
	Disable(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error
	Enable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error
	// Reachable refuses commands for a device of the owner's that is not let in: Precondition. Of others' it says nothing.
	Reachable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error
	// EventsOwned lists devices whose log may hold events with the owner's stamp, in ID order: those owned now and those
	// released within retention.
	EventsOwned(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error)
}

// Quarantine is what is kept apart of devices in quarantine.
type Quarantine interface {
	// Kept returns what was kept of a device of the owner's since its quarantine began, nothing for one that is in none. NotFound for
	// others.
	Kept(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Kept, error)
}

// Certificates is what the door needs from the certificate authority.
type Certificates interface {
	// Sign answers a certificate signing request (PKCS #10, PEM or DER) with a certificate in PEM, and the one that issued it
	// behind it. user asks. Invalid and TooLarge for what is wrong with the request, Denied for a device that is not owner's and
	// not free, Exhausted when there are too many certificates.
	Sign(ctx context.Context, owner hub.Owner, user string, csr []byte) ([]byte, error)
	// SignClient answers a request with a certificate for an application of the owner, and SignService with one for a server of these
	// hosts, which only an operator may ask for. Of the request only the key is taken. Errors are as those of Sign.
	SignClient(ctx context.Context, owner hub.Owner, user string, csr []byte) ([]byte, error)
	SignService(ctx context.Context, owner hub.Owner, user string, hosts []string, csr []byte) ([]byte, error)
	// Certificates yields what is known of the certificates that the filter means, in no order. An error is the last element.
	Certificates(ctx context.Context, f hub.CertificateFilter) iter.Seq2[hub.Certificate, error]
	// Revoke ends those certificates that the filter means and that have not ended yet, and returns them; also beside an error,
	// after which it may be repeated.
	Revoke(ctx context.Context, f hub.CertificateFilter, reason hub.RevocationReason) ([]hub.Certificate, error)
	// Report says how the owner's devices are off for certificates; what ends within that time ends soon.
	Report(ctx context.Context, owner hub.Owner, within time.Duration) (hub.CertificateReport, error)
	// List returns the revocation list of an issuer, DER (RFC 5280, Section 5). It is cheap to ask again. NotFound for an issuer
	// that is not ours.
	List(ctx context.Context, issuer string) ([]byte, error)
	// Status answers an OCSP request (RFC 6960), whatever it is. How many are answered at a time is the authority's to bound.
	Status(ctx context.Context, request []byte) hub.CertificateStatus
}

// Enrolments is what the door needs from the certificate authority about devices that get an identity by themselves.
type Enrolments interface {
	// Groups returns an owner's groups, oldest first.
	Groups(ctx context.Context, owner hub.Owner) ([]hub.EnrolmentGroup, error)
	// SetGroup makes a group if it has no ID, or replaces that of the ID, whose owner stays, and its pre-shared key if HasPSK says so.
	SetGroup(ctx context.Context, g hub.EnrolmentGroup) (hub.EnrolmentGroup, error)
	// AcceptTerms keeps that a user agreed to the version of the terms of an owner's group, and returns that. NotFound for another
	// group, Precondition for another version.
	AcceptTerms(ctx context.Context, owner hub.Owner, id, version, user string) (hub.EnrolmentGroup, error)
	// DeleteGroups removes groups, whoever's they are, and returns those that there were.
	DeleteGroups(ctx context.Context, ids []string) ([]hub.EnrolmentGroup, error)
	// ProvisioningRecords yields what is known of how devices were provisioned, in no order. An error is the last element.
	ProvisioningRecords(ctx context.Context, f hub.ProvisioningFilter) iter.Seq2[hub.ProvisioningRecord, error]
	// DeleteProvisioningRecords removes the records that the filter means, and returns their IDs.
	DeleteProvisioningRecords(ctx context.Context, f hub.ProvisioningFilter) ([]string, error)
	// Enrolments yields how far devices have come, in no order. An error is the last element.
	Enrolments(ctx context.Context, f hub.EnrolmentFilter) iter.Seq2[hub.Enrolment, error]
	// Decide allows or refuses devices, and returns those for which that is new. NotFound for one that has not come, or is not the
	// owner's.
	Decide(ctx context.Context, owner hub.Owner, devices []hub.DeviceID, allow bool, user string) ([]hub.Enrolment, error)
	// NewToken makes a one-time token for a device, "" for any, which is good for life, 0 for a day. Its text is returned here only.
	NewToken(ctx context.Context, owner hub.Owner, dev hub.DeviceID, life time.Duration, user string) (string, hub.EnrolmentToken, error)
	// Tokens returns an owner's tokens, newest first.
	Tokens(ctx context.Context, owner hub.Owner) ([]hub.EnrolmentToken, error)
	// DeleteTokens removes tokens of an owner, and returns those that there were.
	DeleteTokens(ctx context.Context, owner hub.Owner, ids []string) ([]hub.EnrolmentToken, error)
}

// Verifier checks access tokens. Kinds: Unauthenticated for a bad token, Unavailable while the provider's keys cannot be
// had.
type Verifier interface {
	Verify(ctx context.Context, token string) (hub.Claims, error)
}
