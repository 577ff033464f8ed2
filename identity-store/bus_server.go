package identitystore

import (
	"context"
	"log/slog"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

// subject is where any Store of the hub answers, and wakes where all are told that there is something to read.
const subject, wakes = "id", "id.changed"

// What a Store is asked over the bus: its methods, and what has changed.
const (
	callSignUp      bus.Method[request, answer] = "id.signUp"
	callOwner       bus.Method[request, answer] = "id.owner"
	callSignOff     bus.Method[request, answer] = "id.signOff"
	callRemove      bus.Method[request, answer] = "id.remove"
	callDevices     bus.Method[request, answer] = "id.devices"
	callEventsOwned bus.Method[request, answer] = "id.eventsOwned"
	callAccess      bus.Method[request, answer] = "id.access"
	callDisable     bus.Method[request, answer] = "id.disable"
	callEnable      bus.Method[request, answer] = "id.enable"
	callQuarantine  bus.Method[request, answer] = "id.quarantine"
	callReachable   bus.Method[request, answer] = "id.reachable"
	callAdmits      bus.Method[request, answer] = "id.admits"
	callDeny        bus.Method[request, answer] = "id.deny"
	callUndeny      bus.Method[request, answer] = "id.undeny"
	callEndKey      bus.Method[request, answer] = "id.endKey"
	callChanges     bus.Method[asked, news]     = "id.changes"

	changed bus.Note[struct{}] = "id.changed"
)

// request is what any of the methods is asked with. Never change the number of a field.
type request struct {
	// After is the number of the last record of changes that who asks knows of: the answer is not older than that.
	After      uint64       `cbor:"1,keyasint,omitempty"`
	Device     hub.DeviceID `cbor:"2,keyasint,omitempty"`
	Owner      hub.Owner    `cbor:"3,keyasint,omitempty"`
	User       string       `cbor:"4,keyasint,omitempty"`
	Reason     string       `cbor:"5,keyasint,omitempty"`
	Pin        string       `cbor:"6,keyasint,omitempty"`
	Authorized time.Time    `cbor:"7,keyasint"`
	SPKI       []byte       `cbor:"8,keyasint,omitempty"`
	Denial     hub.Denial   `cbor:"9,keyasint"`
}

// answer is what any of the methods answers.
type answer struct {
	// At is the number of a record of changes that is not older than what the call changed.
	At        uint64         `cbor:"1,keyasint,omitempty"`
	Ownership hub.Ownership  `cbor:"2,keyasint"`
	Devices   []hub.DeviceID `cbor:"3,keyasint,omitempty"`
	Access    hub.Access     `cbor:"4,keyasint"`
	Denial    hub.Denial     `cbor:"5,keyasint"`
}

// asked is after which record of changes, or that all is wanted that a client keeps.
type asked struct {
	After uint64 `cbor:"1,keyasint,omitempty"`
	All   bool   `cbor:"2,keyasint,omitempty"`
}

// news is what changed up to the record At, in which is whatever was announced before it was asked for, unless there is More. What
// is told of a device may be newer than that. With All it is all that there is, and what is not in it is not so.
type news struct {
	At       uint64       `cbor:"1,keyasint,omitempty"`
	More     bool         `cbor:"2,keyasint,omitempty"`
	All      bool         `cbor:"3,keyasint,omitempty"`
	Devices  []standing   `cbor:"4,keyasint,omitempty"`
	Denials  []hub.Denial `cbor:"5,keyasint,omitempty"`
	Undenied []string     `cbor:"6,keyasint,omitempty"` // by denialKey
	Owners   []hub.Owner  `cbor:"7,keyasint,omitempty"` // whose lists changed
	// Keys is whose pre-shared keys have ended; with All it is not known whose.
	Keys []hub.DeviceID `cbor:"8,keyasint,omitempty"`
}

// Serve has the Store share its documents with other Stores that serve, and with clients: from then on each of its changes is announced
// to them. It returns the server that answers clients. It must be called before the Store is used, and both are to run.
func (s *Store) Serve(ctx context.Context, b *bus.Bus, log *slog.Logger) (*bus.Server, error) {
	wake := func() { _ = changed.Send(b, wakes, struct{}{}) } // who is not woken looks by itself
	listen := func(f func()) (func(), error) { return changed.Listen(b, wakes, func(struct{}) { f() }) }
	if err := s.share(ctx, wake, listen); err != nil {
		return nil, err
	}
	srv := b.Server(true, log, subject)
	handle := func(m bus.Method[request, answer], f func(context.Context, request, *answer) error) {
		bus.Handle(srv, m, func(ctx context.Context, q request) (a answer, err error) {
			if err = s.reach(ctx, q.After); err == nil {
				err = f(ctx, q, &a)
			}
			a.At = s.changes.last()
			return a, err
		})
	}
	handle(callSignUp, func(ctx context.Context, q request, a *answer) (err error) {
		a.Ownership, err = s.SignUp(ctx, q.Device, q.Owner, q.Pin, q.User, q.Authorized)
		return err
	})
	handle(callOwner, func(ctx context.Context, q request, a *answer) (err error) {
		a.Ownership, err = s.Owner(ctx, q.Device)
		return err
	})
	handle(callSignOff, func(ctx context.Context, q request, _ *answer) error {
		return s.SignOff(ctx, q.Device, q.Owner, q.User)
	})
	handle(callRemove, func(ctx context.Context, q request, _ *answer) error {
		return s.Remove(ctx, q.Device, q.Owner, q.User, q.Reason)
	})
	handle(callDevices, func(ctx context.Context, q request, a *answer) (err error) {
		a.Devices, err = s.Devices(ctx, q.Owner)
		return err
	})
	handle(callEventsOwned, func(ctx context.Context, q request, a *answer) (err error) {
		a.Devices, err = s.EventsOwned(ctx, q.Owner)
		return err
	})
	handle(callAccess, func(ctx context.Context, q request, a *answer) (err error) {
		a.Access, err = s.Access(ctx, q.Device, q.Owner)
		return err
	})
	handle(callDisable, func(ctx context.Context, q request, _ *answer) error {
		return s.Disable(ctx, q.Device, q.Owner, q.User, q.Reason)
	})
	handle(callEnable, func(ctx context.Context, q request, _ *answer) error { return s.Enable(ctx, q.Device, q.Owner) })
	handle(callQuarantine, func(ctx context.Context, q request, _ *answer) error {
		return s.Quarantine(ctx, q.Device, q.Owner, q.User, q.Reason)
	})
	handle(callReachable, func(ctx context.Context, q request, _ *answer) error { return s.Reachable(ctx, q.Device, q.Owner) })
	handle(callAdmits, func(ctx context.Context, q request, _ *answer) error { return s.Admits(ctx, q.Device, q.SPKI) })
	handle(callDeny, func(ctx context.Context, q request, a *answer) (err error) {
		a.Denial, err = s.Deny(ctx, q.Denial)
		return err
	})
	handle(callUndeny, func(ctx context.Context, q request, _ *answer) error {
		return s.Undeny(ctx, q.Denial.Of, q.Denial.Value)
	})
	handle(callEndKey, func(ctx context.Context, q request, _ *answer) error { return s.EndKey(ctx, q.Device) })
	bus.Handle(srv, callChanges, s.news)
	return srv, nil
}

// news answers callChanges.
func (s *Store) news(ctx context.Context, q asked) (news, error) {
	if err := s.changes.refresh(ctx); err != nil {
		return news{}, trouble("read what changed", err)
	}
	since, at, more, ok := s.changes.since(q.After)
	if q.All || !ok {
		n := news{At: s.changes.last(), All: true} // before it is read: what is newer comes again
		n.Devices, n.Denials = s.all()
		return n, nil
	}
	n := news{At: at, More: more}
	var devs []hub.DeviceID
	var denials []string
	for c := range since {
		if c.Device != "" {
			devs = append(devs, c.Device)
		}
		if c.Denial != "" {
			denials = append(denials, c.Denial)
		}
		if c.Owner != "" {
			n.Owners = append(n.Owners, c.Owner)
		}
		if c.Key != "" {
			n.Keys = append(n.Keys, c.Key)
		}
	}
	n.Devices, n.Denials, n.Undenied = s.standings(devs, denials)
	return n, nil
}
