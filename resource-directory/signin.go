package resourcedirectory

import (
	"context"
	"slices"

	"github.com/coaphub/coaphub/hub"
)

// SignIn records that the device is online on conn, whose LocalEndpoints are not looked at, and gives the session's number, the
// seq of the commit. A former session
// of the device is closed through its own Deliverer afterwards, with reason "second-session". Denied with code
// "ownership-stale" if own is not the device's current ownership.
//
// If ctx ends first and the commit is stored nevertheless, nobody holds the session: it is set offline again.
func (d *Directory) SignIn(
	ctx context.Context, own hub.Ownership, conn hub.Connection, user string, to hub.Deliverer,
) (hub.Session, error) {
	const op = "directory.SignIn"
	// The index is written first, so that it holds every device that may be online when the process dies.
	if err := d.mark(ctx, onlineIndex, own.Device, d.keeper(conn.Service)); err != nil {
		return hub.Session{}, wrap(op, err)
	}
	var sess hub.Session
	conn.Online = true
	r := &request{dev: own.Device, op: op, fresh: true}
	w, former := d.worker(own.Device), &closing{}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if s.owner == "" || s.owner != own.Owner || s.generation != own.Generation || own.Releasing {
			return nil, errStale
		}
		former = w.closes(s, "second-session")
		meta := s.meta
		// It says later where it is now; mostly that is where it was, and nobody is told of a change that is none.
		conn.LocalEndpoints = meta.Connection.LocalEndpoints
		meta.Connection = conn
		meta.Twin.State = outOfSync(meta.Twin)
		sess = hub.Session{Device: own.Device, Owner: own.Owner, Number: s.seq + 1, TwinEnabled: meta.Twin.Enabled, Contact: meta.Contact}
		if s.meta.Connection.Online {
			sess.Former = s.meta.Connection.Service
		}
		sess.Commands = slices.ContainsFunc(s.commands, func(c *hub.Command) bool { return c.Session == 0 })
		return append(s.endBound(sess.Number), hub.Event{
			Kind: hub.MetadataUpdated, Session: sess.Number, Connection: conn.ID, User: user, Metadata: &meta,
		}), nil
	}
	r.stored = func(w *worker) {
		if d.apart == nil {
			w.attach(own.Device, &live{session: sess.Number, to: to})
		}
		former.begin()
	}
	r.orphaned = func(w *worker) { w.lose(own.Device, sess.Number) }
	if err := d.do(ctx, r); err != nil {
		return hub.Session{}, err
	}
	d.remark(ctx, own.Device)
	return sess, nil
}

var errStale = hub.NewError(hub.Denied, "ownership-stale", "the device is not registered for this owner")

// SignOut ends the session and records OFFLINE. A session that is not the current one is Precondition; repeating the same
// message succeeds.
func (d *Directory) SignOut(ctx context.Context, from hub.Stamp) error {
	r := &request{dev: from.Device, op: "directory.SignOut", fresh: true}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if s.ended.Session == from.Session && s.ended.Message == from.Message && from.Session != 0 {
			return nil, nil
		}
		if done, err := s.fence(from); err != nil {
			return nil, err
		} else if done {
			// Something else was stored under this number or a later one; the session goes on until a new number ends it.
			return nil, hub.NewError(hub.Precondition, "message-number-old", "the message number was used before")
		}
		return s.signedOut(from), nil
	}
	r.stored = func(w *worker) { w.detach(from.Device, from.Session) }
	return d.do(ctx, r)
}

// EndSession ends the session of a device that is online, and records OFFLINE: no write of it that comes after this returned is stored.
// To close its connection is the caller's, and so is what becomes of its commands that do not end with it. Denied for a device that is
// not owner's. A device that is offline stays as it is: what its last session wrote came before that.
func (d *Directory) EndSession(ctx context.Context, owner hub.Owner, dev hub.DeviceID, user string) error {
	var session uint64
	r := &request{dev: dev, op: "directory.EndSession", fresh: true}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		session = s.session
		switch {
		case owner == "" || s.owner != owner:
			return nil, errNotYours
		case !s.meta.Connection.Online:
			return nil, nil
		}
		return s.signedOut(hub.Stamp{User: user}), nil
	}
	r.stored = func(w *worker) { w.detach(dev, session) }
	return d.do(ctx, r)
}

// signedOut ends the session by a commit that is of another, which nobody has.
func (s *state) signedOut(from hub.Stamp) []hub.Event {
	meta := s.offline()
	return append(s.endBound(s.seq+1), hub.Event{
		Kind: hub.MetadataUpdated, Session: s.seq + 1, Message: from.Message, Connection: meta.Connection.ID,
		User: from.User, Metadata: &meta,
	})
}

// Offline records that the session's connection ended; an older session's is ignored without error. If the store is away, the
// queue is full or ctx ends, it is tried again until it is stored or another session comes; the error says only that it is not
// stored yet.
func (d *Directory) Offline(ctx context.Context, from hub.Stamp) error {
	err := d.do(ctx, offline(from))
	if err != nil {
		// The request may never have got as far as the worker, and nobody calls twice for a connection that is gone.
		d.worker(from.Device).noteLost(from)
	}
	return err
}

// noteLost leaves word outside the bounded queue that a session's connection is gone; the next sweep finds it.
func (w *worker) noteLost(from hub.Stamp) {
	w.lostMu.Lock()
	defer w.lostMu.Unlock()
	w.lost[from.Device] = max(w.lost[from.Device], from.Session)
}

// takeLost moves what noteLost left to gone. Word of a session that is not the current one, or is stored, is dropped.
func (w *worker) takeLost() {
	w.lostMu.Lock()
	lost := w.lost
	w.lost = map[hub.DeviceID]uint64{}
	w.lostMu.Unlock()
	for dev, session := range lost {
		if l := w.live[dev]; l != nil && l.session == session {
			w.gone[dev] = l
		}
	}
}

func offline(from hub.Stamp) *request {
	r := &request{dev: from.Device, op: "directory.Offline"}
	r.taken = func(w *worker) {
		if l := w.live[from.Device]; l != nil && l.session == from.Session {
			w.gone[from.Device] = l
		}
	}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if s.session != from.Session || !s.meta.Connection.Online {
			return nil, nil
		}
		meta := s.offline()
		return append(s.endBound(from.Session+1), hub.Event{
			Kind: hub.MetadataUpdated, Session: from.Session, Message: from.Message, Connection: meta.Connection.ID,
			User: from.User, Metadata: &meta,
		}), nil
	}
	r.stored = func(w *worker) { w.detach(from.Device, from.Session) }
	return r
}

// offline is the metadata of the device without its connection; ID, time, protocol and endpoints stay (compat, 18).
func (s *state) offline() hub.Metadata {
	meta := s.meta
	meta.Connection.Online, meta.Connection.Service = false, ""
	meta.Twin.State = outOfSync(meta.Twin)
	return meta
}

func outOfSync(t hub.Twin) hub.TwinState {
	if t.Enabled {
		return hub.TwinOutOfSync
	}
	return hub.TwinDisabled
}

// SetTwin records the state of the twin's synchronisation. Recording the same again makes no event. Precondition if the twin
// is off or the device is offline; Invalid for TwinDisabled, which is no state of a synchronisation.
func (d *Directory) SetTwin(ctx context.Context, from hub.Stamp, to hub.TwinState) error {
	r := &request{dev: from.Device, op: "directory.SetTwin"}
	r.decide = func(s *state, now int64) ([]hub.Event, error) {
		if done, err := s.fence(from); done || err != nil {
			return nil, err
		}
		meta := s.meta
		switch {
		case to != hub.TwinOutOfSync && to != hub.TwinSyncing && to != hub.TwinInSync:
			return nil, hub.NewError(hub.Invalid, "twin-state-invalid", "this is no state of a synchronisation")
		case !meta.Twin.Enabled:
			return nil, hub.NewError(hub.Precondition, "twin-disabled", "the device's twin is switched off")
		case !meta.Connection.Online:
			return nil, hub.NewError(hub.Precondition, "device-offline", "the device is offline")
		case meta.Twin.State == to:
			return nil, nil
		}
		meta.Twin.State = to
		switch to {
		case hub.TwinSyncing:
			meta.Twin.SyncingAt = now
		case hub.TwinInSync:
			meta.Twin.InSyncAt = now
		}
		return []hub.Event{{
			Kind: hub.MetadataUpdated, Session: from.Session, Message: from.Message, Connection: meta.Connection.ID,
			User: from.User, Metadata: &meta,
		}}, nil
	}
	return d.do(ctx, r)
}

// SetLocalEndpoints records where the device says that it is reached in its own network; nil and empty are nowhere. They stay
// over the end of the session, until others are recorded or the device changes hands. Recording the same again makes no event.
// Nobody may change the slice afterwards.
func (d *Directory) SetLocalEndpoints(ctx context.Context, from hub.Stamp, endpoints []string) error {
	r := &request{dev: from.Device, op: "directory.SetLocalEndpoints"}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if done, err := s.fence(from); done || err != nil {
			return nil, err
		}
		meta := s.meta
		if slices.Equal(meta.Connection.LocalEndpoints, endpoints) {
			return nil, nil
		}
		meta.Connection.LocalEndpoints = endpoints
		return []hub.Event{{
			Kind: hub.MetadataUpdated, Session: from.Session, Message: from.Message, Connection: meta.Connection.ID,
			User: from.User, Metadata: &meta,
		}}, nil
	}
	return d.do(ctx, r)
}

// SetContact records when a device that sleeps is expected next; the zero value says that it does not sleep. Recording the
// same again makes no event. Precondition if the device is offline; Invalid for a negative interval or one without a time.
func (d *Directory) SetContact(ctx context.Context, from hub.Stamp, to hub.Contact) error {
	r := &request{dev: from.Device, op: "directory.SetContact"}
	r.decide = func(s *state, _ int64) ([]hub.Event, error) {
		if done, err := s.fence(from); done || err != nil {
			return nil, err
		}
		meta := s.meta
		switch {
		case to.Interval < 0 || (to.Interval == 0) != (to.Next == 0):
			return nil, hub.NewError(hub.Invalid, "contact-invalid", "an interval and a time are needed, or neither")
		case !meta.Connection.Online:
			return nil, hub.NewError(hub.Precondition, "device-offline", "the device is offline")
		case meta.Contact == to:
			return nil, nil
		}
		meta.Contact = to
		return []hub.Event{{
			Kind: hub.MetadataUpdated, Session: from.Session, Message: from.Message, Connection: meta.Connection.ID,
			User: from.User, Metadata: &meta,
		}}, nil
	}
	return d.do(ctx, r)
}

// attach makes l the device's session in this process and closes a former one. It never waits (Deliverer's contract).
func (w *worker) attach(dev hub.DeviceID, l *live) {
	old := w.live[dev]
	w.live[dev] = l
	delete(w.gone, dev)
	if old != nil && old.to != nil {
		old.to.Close("second-session")
	}
}

// detach forgets the session unless a newer one took its place.
func (w *worker) detach(dev hub.DeviceID, session uint64) {
	if l := w.live[dev]; l != nil && l.session == session {
		delete(w.live, dev)
		delete(w.gone, dev)
	}
}

// lose records OFFLINE of a session that nobody holds.
func (w *worker) lose(dev hub.DeviceID, session uint64) *request {
	r := offline(hub.Stamp{Device: dev, Session: session})
	r.ctx, r.answer = context.Background(), make(chan error, 1)
	w.take(r)
	return r
}

// retryOffline tries once more for the connections whose OFFLINE could not be stored. Their number is bounded by that of the
// sessions of this process.
func (w *worker) retryOffline() {
	for dev, l := range w.gone {
		if w.asked >= w.d.cfg.Queue/2 {
			return // requests of living devices first; the next sweep goes on
		}
		if l.retry == nil || len(l.retry.answer) > 0 { // one at a time, however long the store takes
			l.retry = w.lose(dev, l.session)
		}
	}
}
