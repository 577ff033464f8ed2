package identitystore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// maxTries bounds how often a step is decided again after somebody else was faster. Contention on one device is between a few
// sign-ups of the same device; who loses this often is told to come back later.
const maxTries = 32

// maxOwner bounds an owner's name in bytes, so that every key made of it fits a store.
const maxOwner = 1000

// How often half-done steps are tried again, and outlived notes of former owners are removed.
const (
	finishEvery = 30 * time.Second
	sweepEvery  = time.Hour
)

var (
	errOther = hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner")
	errPin   = hub.NewError(hub.Denied, "device-pinned", "the device signed up with another set of credentials before")
	errNone  = hub.NewError(hub.NotFound, "device-not-owned", "the device has no owner, or another one")
)

// Store is who owns which device. All methods are safe for concurrent use; several processes may work on the same documents, if
// each of them serves. The lists of Devices are cached, and dropped at once when this process changes them, as is in memory who is
// not let in; what other processes change arrives within a second.
type Store struct {
	kept
	cfg     Config
	docs    store.Documents
	dir     Directory
	log     *slog.Logger
	lists   *lists
	metrics *metrics
	ends    func(context.Context, hub.Ownership) error // what EndCredentials was told; nil: nobody
	frees   func(context.Context, hub.DeviceID) error  // what Released was told; nil: nobody

	// deciding is held from reading a record until what is kept of it in memory is as it was written.
	deciding sync.Mutex
	changes  *changes // nil: nobody shares the documents
}

// New makes a Store on docs that tells dir about every claim and release. It reads who is not let in, and fails when it cannot:
// then nobody could be. Run must run for half-done steps to be finished without anybody asking.
func New(ctx context.Context, cfg Config, docs store.Documents, dir Directory, log *slog.Logger, reg prometheus.Registerer) (*Store, error) {
	if errs := cfg.Validate(); len(errs) > 0 {
		return nil, &hub.Error{Kind: hub.Invalid, Op: "identityStore", Code: "config-invalid", Err: errors.Join(errs...)}
	}
	s := &Store{
		cfg: cfg, docs: docs, dir: dir, log: log, lists: newLists(cfg.CachedDevices), metrics: newMetrics(reg),
	}
	if err := s.keep(ctx); err != nil {
		return nil, fmt.Errorf("read who is not let in: %w", err)
	}
	return s, nil
}

// Run finishes what a crash left half done, calls ready, and goes on doing so until ctx ends. The error is always nil.
func (s *Store) Run(ctx context.Context, ready func()) error {
	if s.changes != nil {
		var reading sync.WaitGroup
		defer reading.Wait()
		reading.Go(func() { s.changes.run(ctx) })
	}
	s.finishAll(ctx)
	ready()
	finish, sweep := time.NewTicker(finishEvery), time.NewTicker(sweepEvery)
	defer finish.Stop()
	defer sweep.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-finish.C:
			s.finishAll(ctx)
		case <-sweep.C:
			s.sweep(ctx)
		}
	}
}

// SignUp claims the device for the owner and registers it with the directory. A device of another owner is Denied
// ("device-owned-by-other"). Repeating it for the same owner succeeds and finishes what a crash left half done. Pin names the
// credential set, is fixed at the claim and kept until the release; another one is Denied ("device-pinned"). So is a device that
// was removed ("device-removed"), unless the owner authorized it since then, and one that is disabled. Trouble of store or
// directory is Unavailable (or Exhausted, Deadline).
func (s *Store) SignUp(ctx context.Context, dev hub.DeviceID, owner hub.Owner, pin, user string, authorized time.Time) (hub.Ownership, error) {
	const op = "identity.SignUp"
	if dev == "" || owner == "" || len(owner) > maxOwner {
		return hub.Ownership{}, &hub.Error{Kind: hub.Invalid, Op: op, Code: "owner-invalid", Text: "the owner's name is empty or too long"}
	}
	for range maxTries {
		rec, rev, err := s.get(ctx, dev)
		if err != nil {
			return hub.Ownership{}, err
		}
		switch {
		case rec.State == releasing: // whoever released it is not there any more, or not done: the new owner waits for neither
			err = s.release(ctx, dev, rec, rev)
		case rec.State == free && rec.Removed != nil && !authorized.After(rec.Removed.Since):
			s.metrics.signUps.WithLabelValues("removed").Inc()
			return hub.Ownership{}, errRemoved.With(op, nil)
		case rec.State == free:
			rec = record{State: claimed, Owner: owner, Generation: rec.Generation + 1, Pin: pin, User: user, Unannounced: rec.Unannounced}
			if rev, err = s.put(ctx, dev, rec, rev); err == nil {
				err = s.register(ctx, dev, rec, rev)
			}
		case rec.Owner != owner:
			s.metrics.signUps.WithLabelValues("owned-by-other").Inc()
			return hub.Ownership{}, errOther.With(op, nil)
		case rec.Pin != pin:
			s.metrics.signUps.WithLabelValues("pinned").Inc()
			return hub.Ownership{}, errPin.With(op, nil)
		case rec.Disabled != nil:
			s.metrics.signUps.WithLabelValues("disabled").Inc()
			return hub.Ownership{}, errDisabled.With(op, nil)
		case rec.State == claimed:
			err = s.register(ctx, dev, rec, rev)
		default:
			s.metrics.signUps.WithLabelValues("ok").Inc()
			return rec.ownership(dev), nil
		}
		if err != nil && !hub.IsKind(err, hub.Conflict) {
			s.metrics.signUps.WithLabelValues("failed").Inc()
			return hub.Ownership{}, err
		}
	}
	s.metrics.signUps.WithLabelValues("failed").Inc()
	return hub.Ownership{}, trouble(op, errors.New("too much contention"))
}

// Owner returns who owns the device; NotFound if nobody does, also while it is being released. A claim that was not registered
// yet is registered first; if that fails the error is Unavailable.
func (s *Store) Owner(ctx context.Context, dev hub.DeviceID) (hub.Ownership, error) {
	const op = "identity.Owner"
	for range maxTries {
		rec, rev, err := s.get(ctx, dev)
		if err != nil {
			return hub.Ownership{}, err
		}
		switch rec.State {
		case free:
			return hub.Ownership{}, errNone.With(op, nil)
		case registered:
			return rec.ownership(dev), nil
		case releasing:
			// The answer does not depend on whether this succeeds; Run tries again.
			if err := s.release(ctx, dev, rec, rev); err != nil && !hub.IsKind(err, hub.Conflict) {
				s.log.WarnContext(ctx, "release not finished", "device", dev, "error", err)
			}
			return hub.Ownership{}, errNone.With(op, nil)
		}
		if err := s.register(ctx, dev, rec, rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			return hub.Ownership{}, err
		}
	}
	return hub.Ownership{}, trouble(op, errors.New("too much contention"))
}

// SignOff deletes the device, which wants it so: releasing mark, unregister with the directory, release. NotFound if owner does
// not own it. After an error it may be repeated and goes on where it stopped. The generation outlives the release.
func (s *Store) SignOff(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string) error {
	return s.leave(ctx, dev, owner, user, nil)
}

// Remove is SignOff for a device that is not asked: it does not come back by itself, and what the hub has given it ends. The
// owner "" is an operator, who removes whosever it is.
func (s *Store) Remove(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error {
	return s.leave(ctx, dev, owner, user, &mark{Since: time.Now().UTC(), User: user, Reason: reason})
}

func (s *Store) leave(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string, removed *mark) error {
	const op = "identity.SignOff"
	begun := false
	for range maxTries {
		rec, rev, err := s.get(ctx, dev)
		if err != nil {
			return err
		}
		switch {
		case rec.State == free && begun: // another process finished what we began
			return nil
		case rec.State == free, owner != "" && rec.Owner != owner:
			if begun {
				return nil
			}
			return errNone.With(op, nil)
		case rec.State == claimed: // see state: a release starts from registered
			err = s.register(ctx, dev, rec, rev)
		case rec.State == registered && begun: // released and claimed again meanwhile: not ours to release
			return nil
		default:
			if rec.State == registered || removed != nil && rec.Removed == nil {
				rec.State, rec.User = releasing, user
				if rec.Removed = removed; removed != nil {
					removed.Owner = rec.Owner
				}
				rev, err = s.put(ctx, dev, rec, rev)
			}
			if err == nil {
				begun = true
				err = s.release(ctx, dev, rec, rev)
			}
			if err == nil {
				return nil
			}
		}
		if err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return trouble(op, errors.New("too much contention"))
}

// Devices lists the owner's devices in ID order. Nobody changes the returned slice.
func (s *Store) Devices(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error) {
	ids, epoch, ok := s.lists.get(owner)
	if ok {
		return ids, nil
	}
	ids = []hub.DeviceID{}
	for id, err := range s.docs.FindKeys(ctx, collDevices, indexOwner+string(owner)) {
		if err != nil {
			return nil, trouble("list devices", err)
		}
		ids = append(ids, hub.DeviceID(id))
	}
	s.lists.put(owner, ids, epoch)
	return ids, nil
}

// EventsOwned lists devices whose log may hold events with the owner's stamp, in ID order: those owned now and those released
// within Config.Retention.
func (s *Store) EventsOwned(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error) {
	now, err := s.Devices(ctx, owner)
	if err != nil {
		return nil, err
	}
	ids := slices.Clone(now)
	prefix := pastPrefix(owner)
	for doc, err := range s.docs.Range(ctx, collPast, prefix, prefix+"\x7f") {
		if err != nil {
			return nil, trouble("list former devices", err)
		}
		var p past
		if err := json.Unmarshal(doc.Value, &p); err != nil {
			return nil, &hub.Error{Kind: hub.Internal, Op: "decode former owner", Err: err}
		}
		if p.Until.After(time.Now()) {
			ids = append(ids, hub.DeviceID(strings.TrimPrefix(doc.Key, prefix)))
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// register does the second step of a claim. Conflict means: read again.
func (s *Store) register(ctx context.Context, dev hub.DeviceID, rec record, rev uint64) error {
	if err := s.dir.Register(ctx, rec.ownership(dev), rec.User); err != nil {
		return trouble("register with the directory", err)
	}
	c := change{Owner: rec.Owner}
	if rec.Unannounced {
		c.Device = dev
	}
	if err := s.announce(ctx, c); err != nil {
		return err
	}
	rec.State, rec.Unannounced = registered, false
	_, err := s.put(ctx, dev, rec, rev)
	return err
}

// release does the rest of a release. Conflict means: read again.
func (s *Store) release(ctx context.Context, dev hub.DeviceID, rec record, rev uint64) error {
	if err := s.dir.Unregister(ctx, rec.ownership(dev), rec.User); err != nil {
		return trouble("unregister with the directory", err)
	}
	if rec.Removed != nil && s.ends != nil && s.cfg.RevokeAtRemoval {
		if err := s.ends(ctx, rec.ownership(dev)); err != nil {
			return trouble("end the device's credentials", err)
		}
	}
	// Before the record forgets the owner, so that a crash between the two loses nothing.
	if err := s.remember(ctx, dev, rec.Owner); err != nil {
		return err
	}
	if rec.Disabled != nil || rec.Quarantined != nil {
		s.deciding.Lock()
		defer s.deciding.Unlock()
	}
	// Likewise before, so that nobody who owns it next is shown what was kept.
	if err := s.free(ctx, dev, rec.Quarantined != nil); err != nil {
		return err
	}
	if err := s.announce(ctx, change{Owner: rec.Owner}); err != nil {
		return err
	}
	barred := rec.Disabled != nil || rec.Quarantined != nil || rec.Unannounced
	_, err := s.put(ctx, dev, record{State: free, Generation: rec.Generation, Removed: rec.Removed, Unannounced: barred && s.changes != nil}, rev)
	if err == nil && rec.Disabled != nil {
		s.disable(dev, false)
	}
	if err == nil && barred {
		err = s.settle(ctx, dev)
	}
	return err
}

// finishAll tries to finish every half-done step once.
func (s *Store) finishAll(ctx context.Context) {
	left := 0
	for doc, err := range s.docs.Find(ctx, collDevices, indexPending) {
		if err == nil {
			err = s.finish(ctx, doc)
		}
		if err != nil && !hub.IsKind(err, hub.Conflict) {
			left++
			if ctx.Err() == nil {
				s.log.WarnContext(ctx, "half-done sign-up or sign-off not finished", "device", doc.Key, "error", err)
			}
		}
	}
	for key, err := range s.docs.FindKeys(ctx, collDenied, indexPending) {
		if err == nil {
			err = s.settleDenial(ctx, key)
		}
		if err != nil {
			left++
			if ctx.Err() == nil {
				s.log.WarnContext(ctx, "an entry of the deny list is not announced", "entry", key, "error", err)
			}
		}
	}
	s.metrics.pending.Set(float64(left))
}

func (s *Store) finish(ctx context.Context, doc store.Doc) error {
	rec, err := decode(doc)
	if err != nil {
		return err
	}
	dev := hub.DeviceID(doc.Key)
	switch rec.State {
	case claimed:
		return s.register(ctx, dev, rec, doc.Rev)
	case releasing:
		return s.release(ctx, dev, rec, doc.Rev)
	case registered:
		if rec.Stopping {
			if err := s.separate(ctx, dev); err != nil {
				return err
			}
		}
	case free:
	}
	return s.settle(ctx, dev)
}

// sweep removes notes of former owners whose events are gone, and denials that have ended.
func (s *Store) sweep(ctx context.Context) {
	s.forgetEnded(ctx)
	for doc, err := range s.docs.Range(ctx, collPast, "", "") {
		if err != nil {
			s.log.WarnContext(ctx, "sweep of former owners stopped", "error", err)
			return
		}
		var p past
		if json.Unmarshal(doc.Value, &p) == nil && p.Until.After(time.Now()) {
			continue
		}
		if err := s.docs.Delete(ctx, collPast, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
			s.log.WarnContext(ctx, "sweep of former owners stopped", "error", err)
			return
		}
	}
}

// trouble makes store's and directory's failures of a kind that no door takes for a bad credential: a device drops its
// credentials when it is told that they are bad.
func trouble(op string, err error) error {
	kind := hub.Unavailable
	if k := hub.KindOf(err); err != nil && (k == hub.Exhausted || k == hub.Deadline) {
		kind = k
	}
	return &hub.Error{Kind: kind, Op: op, Err: err}
}
