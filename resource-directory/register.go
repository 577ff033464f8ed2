package resourcedirectory

import (
	"context"
	"errors"

	"github.com/coaphub/coaphub/hub"
)

// Register appends a registered event with owner and generation to the device's log, unless that generation is already
// there. What a former ownership left is deleted and its session closed. Precondition for a generation that is older than the
// device's, or the same one of another owner.
func (d *Directory) Register(ctx context.Context, own hub.Ownership, user string) error {
	const op = "directory.Register"
	decide := func(s *state, _ int64) ([]hub.Event, error) {
		switch {
		case own.Owner == "" || own.Generation == 0:
			return nil, hub.NewError(hub.Invalid, "ownership-invalid", "an ownership needs an owner and a generation")
		case own.Generation < s.generation, own.Generation == s.generation && s.owner != "" && s.owner != own.Owner:
			return nil, hub.NewError(hub.Precondition, "generation-stale", "the device was claimed again since")
		case own.Generation == s.generation:
			return nil, nil
		case len(s.commands) > 0:
			return nil, errCommandsLeft
		}
		return []hub.Event{{Kind: hub.Registered, User: user}}, nil
	}
	for {
		w, session := d.worker(own.Device), &closing{}
		r := &request{dev: own.Device, op: op, fresh: true, owner: own}
		r.decide = func(s *state, now int64) ([]hub.Event, error) {
			events, err := decide(s, now)
			if len(events) > 0 {
				session = w.closes(s, "deleted")
			}
			return events, err
		}
		r.stored = func(w *worker) {
			w.closeOther(own.Device, "deleted")
			session.begin()
		}
		err := d.do(ctx, r)
		if err == nil {
			session.wait(ctx)
		}
		if !errors.Is(err, errCommandsLeft) {
			return err
		}
		// They end in a commit of their own, which has the former owner's stamp.
		end := &request{dev: own.Device, op: op}
		end.decide = func(s *state, _ int64) ([]hub.Event, error) { return s.endAll(user), nil }
		if err := d.do(ctx, end); err != nil {
			return err
		}
	}
}

var errCommandsLeft = hub.NewError(hub.Conflict, "commands-left", "commands of the former owner wait")

// Unregister appends an unregistered event, ends the commands that wait, deletes links and twin, and closes the live session.
// The log stays until retention. Repeating it, or asking it of a device that has a newer generation, does nothing.
func (d *Directory) Unregister(ctx context.Context, own hub.Ownership, user string) error {
	w, session := d.worker(own.Device), &closing{}
	r := &request{dev: own.Device, op: "directory.Unregister", fresh: true}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if s.owner == "" || s.owner != own.Owner || s.generation != own.Generation {
			return nil, nil
		}
		session = w.closes(s, "deleted")
		return append(s.endAll(user), hub.Event{Kind: hub.Unregistered, Connection: s.meta.Connection.ID, User: user}), nil
	}
	r.stored = func(w *worker) {
		w.closeOther(own.Device, "deleted")
		session.begin()
	}
	err := d.do(ctx, r)
	if err == nil { // else the worker may be at it still
		session.wait(ctx)
	}
	return err
}

// closeOther closes the device's session in this process if the device's state knows it no more.
func (w *worker) closeOther(dev hub.DeviceID, reason string) {
	l := w.live[dev]
	if l == nil {
		return
	}
	if e := w.devices[dev]; e != nil && e.state != nil && e.state.session <= l.session {
		return // nothing was changed: the session is the current one
	}
	delete(w.live, dev)
	delete(w.gone, dev)
	if l.to != nil {
		l.to.Close(reason)
	}
}
