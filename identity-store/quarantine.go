package identitystore

import (
	"context"
	"errors"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Released has f called for each device whose quarantine is over, once Quarantined says so, before Enable returns or the device is
// anybody else's: what was kept of it is to go. An error has it tried again. It must be called before the Store is used.
func (s *Store) Released(f func(context.Context, hub.DeviceID) error) { s.frees = f }

// Quarantine lets a device in, but keeps it apart until Enable: its session ends, so that the next one is another kind, its
// commands end, and further ones are refused. Once this returned without an error, nothing that it has on its way to the directory is
// stored any more. The owner "" is an operator. NotFound for a device that is not the owner's. A device that is in quarantine stays as
// it was. After trouble of the store it is kept apart all the same, until the next start.
func (s *Store) Quarantine(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error {
	if len(reason) > maxReason {
		return errReason.With("identity.Quarantine", nil)
	}
	s.deciding.Lock()
	defer s.deciding.Unlock()
	found, generation := false, uint64(0)
	err := s.decide(ctx, dev, func(rec *record) (bool, error) {
		found, generation = rec.State == registered && (owner == "" || rec.Owner == owner), rec.Generation
		switch {
		case !found:
			return false, errNone.With("identity.Quarantine", nil)
		case rec.Quarantined != nil:
			return false, nil
		}
		rec.Quarantined = &mark{Since: time.Now().UTC(), Owner: rec.Owner, User: user, Reason: reason}
		rec.Stopping, rec.Unannounced = true, s.changes != nil
		return true, nil
	})
	if found {
		s.setApart(dev, generation)
		s.tell(dev)
	}
	if err != nil {
		return err
	}
	if err := s.settle(ctx, dev); err != nil {
		return err
	}
	return s.separateInTurn(ctx, dev)
}

// free forgets that a device is in quarantine, and has forgotten what was kept of it. s.deciding is held.
func (s *Store) free(ctx context.Context, dev hub.DeviceID, apart bool) error {
	if !apart {
		return nil
	}
	if s.endApart(dev) {
		s.tell(dev)
	}
	if s.frees == nil {
		return nil
	}
	if err := s.frees(ctx, dev); err != nil {
		return trouble("end a quarantine", err)
	}
	return nil
}

// separate ends, with the directory, the commands and the session of a device in quarantine, whose record says so until it is done.
func (s *Store) separate(ctx context.Context, dev hub.DeviceID) error {
	s.deciding.Lock()
	defer s.deciding.Unlock()
	return s.separateInTurn(ctx, dev)
}

// separateInTurn is separate. s.deciding is held.
func (s *Store) separateInTurn(ctx context.Context, dev hub.DeviceID) error {
	// Not one after the other's error: neither needs the other.
	if err := errors.Join(s.cancel(ctx, dev, ""), s.endSession(ctx, dev)); err != nil {
		return err
	}
	return s.decide(ctx, dev, func(rec *record) (bool, error) {
		was := rec.Stopping
		rec.Stopping = false
		return was, nil
	})
}

// endSession ends the session of a device with the directory: the gateways, which were told before, begin none that writes there, but
// may have looked before that and write yet.
func (s *Store) endSession(ctx context.Context, dev hub.DeviceID) error {
	rec, _, err := s.get(ctx, dev)
	if err != nil {
		return err
	}
	if err := s.dir.EndSession(ctx, rec.Owner, dev, "hub"); err != nil && !hub.IsKind(err, hub.Denied) { // as in cancel
		return trouble("end the device's session", err)
	}
	return nil
}

// cancel ends all commands of a device, if it is the owner's, and whosever it is with "".
func (s *Store) cancel(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	rec, _, err := s.get(ctx, dev)
	if err != nil || owner != "" && rec.Owner != owner {
		return err
	}
	_, err = s.dir.CancelCommands(ctx, rec.Owner, dev, hub.CommandPick{All: true}, "hub", "")
	// Denied is a device that is being released, whose commands end with it.
	if err != nil && !hub.IsKind(err, hub.NotFound) && !hub.IsKind(err, hub.Denied) {
		return trouble("end the device's commands", err)
	}
	return nil
}
