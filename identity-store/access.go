package identitystore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// collDenied is the deny list, by what is denied.
const collDenied = "identities-denied"

const (
	// maxDenied bounds the deny list: all of it is in memory, and looked at in each handshake.
	maxDenied = 10_000
	// maxReason bounds the words with which somebody says why, in bytes.
	maxReason = 500
)

var (
	errDisabled    = hub.NewError(hub.Denied, "device-disabled", "the device is disabled")
	errQuarantined = hub.NewError(hub.Denied, "device-quarantined", "the device is in quarantine")
	errRemoved     = hub.NewError(hub.Denied, "device-removed", "the device was deleted, and has to be onboarded anew")
	errUnlisted    = hub.NewError(hub.NotFound, "denial-unknown", "this is not on the deny list")
	errFull        = hub.NewError(hub.Exhausted, "denials-limit", "there are too many entries on the deny list; take some off it")
	errReason      = hub.NewError(hub.Invalid, "reason-too-long", "the reason has more than 500 bytes")

	errDenied = map[hub.DenialOf]*hub.Error{
		hub.DenyDevice:      hub.NewError(hub.Denied, "device-denied", "the device is on the hub's deny list"),
		hub.DenyKey:         hub.NewError(hub.Denied, "key-denied", "the device's key is on the hub's deny list"),
		hub.DenyCertificate: hub.NewError(hub.Denied, "certificate-denied", "the device's certificate is on the hub's deny list"),
		hub.DenyCA:          hub.NewError(hub.Denied, "ca-denied", "an authority that vouches for the device is on the hub's deny list"),
	}
)

// denial is the document of an entry of the deny list.
type denial struct {
	hub.Denial
	// Gone says that it was taken off the list: the document only stays until that was announced.
	Gone bool `json:"gone,omitempty"`
	// Unannounced is as record's.
	Unannounced bool `json:"unannounced,omitempty"`
}

func decodeDenial(doc store.Doc) (d denial, err error) {
	if err := json.Unmarshal(doc.Value, &d); err != nil {
		return d, &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "an entry of the deny list is damaged", Err: err}
	}
	return d, nil
}

// keep reads who is not let in.
func (s *Store) keep(ctx context.Context) error {
	for range maxTries {
		version := s.now()
		e, err := s.readKept(ctx)
		if err != nil {
			return err
		}
		s.mu.Lock()
		if s.version != version { // something was decided since
			s.mu.Unlock()
			continue
		}
		tell := s.replace(e)
		s.mu.Unlock()
		if tell {
			s.tell("")
		}
		return nil
	}
	return trouble("read who is not let in", errors.New("too much contention"))
}

func (s *Store) readKept(ctx context.Context) (everything, error) {
	e := newEverything()
	for doc, err := range s.docs.Find(ctx, collDevices, indexQuarantined) {
		if err != nil {
			return e, err
		}
		rec, err := decode(doc)
		if err != nil {
			return e, err
		}
		e.apart[hub.DeviceID(doc.Key)] = rec.Generation
	}
	for id, err := range s.docs.FindKeys(ctx, collDevices, indexDisabled) {
		if err != nil {
			return e, err
		}
		e.disabled[hub.DeviceID(id)] = struct{}{}
	}
	for doc, err := range s.docs.Range(ctx, collDenied, "", "") {
		if err != nil {
			return e, err
		}
		d, err := decodeDenial(doc)
		if err != nil {
			return e, err
		}
		if !d.Gone {
			e.denied[doc.Key] = d.Denial
		}
	}
	return e, nil
}

// EndCredentials has f called for each device that is removed, when nobody can sign in with it any more and before the removal
// is done: an error has it tried again later. It must be called before the Store is used.
func (s *Store) EndCredentials(f func(context.Context, hub.Ownership) error) { s.ends = f }

// Reachable refuses commands for a device of the owner's that is disabled, denied or in quarantine: Precondition, with the codes
// of Denied and "device-quarantined". Of others' it says nothing.
func (s *Store) Reachable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	denied := s.unreachable(dev)
	if denied == nil || hub.IsKind(denied, hub.Unavailable) {
		return denied
	}
	rec, _, err := s.get(ctx, dev)
	if err != nil || rec.Owner != owner {
		return err
	}
	code, text := hub.Public(denied)
	return &hub.Error{Kind: hub.Precondition, Code: code, Text: text}
}

// Admits refuses to give a device anything by which it comes in: one that is disabled, denied, in quarantine or removed, and a
// public key (SubjectPublicKeyInfo) that is denied. Denied then, with the codes of Denied, Reachable and SignUp. Both may be empty.
func (s *Store) Admits(ctx context.Context, dev hub.DeviceID, spki []byte) error {
	if err := s.Denied(dev, nil); err != nil {
		return err
	}
	if _, apart := s.Quarantined(dev); apart { // of two rivals nobody knows which it is
		return errQuarantined
	}
	s.mu.RLock()
	err := s.about(time.Now(), hub.DenyKey, sum(spki))
	s.mu.RUnlock()
	if err != nil || dev == "" {
		return err
	}
	rec, _, err := s.get(ctx, dev)
	if err == nil && rec.Removed != nil {
		err = errRemoved
	}
	return err
}

// Access says how a device stands with the hub. The owner "" is an operator. NotFound for a device that is not the owner's, and
// was not when it was removed.
func (s *Store) Access(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Access, error) {
	rec, _, err := s.get(ctx, dev)
	if err != nil {
		return hub.Access{}, err
	}
	a, of := hub.Access{State: hub.AccessAdmitted}, rec.Owner
	if m := rec.Quarantined; m != nil {
		a = hub.Access{State: hub.AccessQuarantined, Reason: m.Reason, User: m.User, Since: m.Since}
	}
	if m := rec.Disabled; m != nil {
		a = hub.Access{State: hub.AccessDisabled, Reason: m.Reason, User: m.User, Since: m.Since}
	}
	if m := rec.Removed; m != nil {
		a, of = hub.Access{State: hub.AccessRemoved, Reason: m.Reason, User: m.User, Since: m.Since}, m.Owner
	}
	s.mu.RLock()
	d, denied := s.denied[denialKey(hub.DenyDevice, string(dev))]
	s.mu.RUnlock()
	if denied && (d.Until.IsZero() || time.Now().Before(d.Until)) {
		a = hub.Access{State: hub.AccessDenied, Reason: d.Reason, User: d.User, Since: d.Since, Until: d.Until}
	}
	switch {
	case owner != "" && of != owner, a.State == hub.AccessAdmitted && of == "":
		return hub.Access{}, errNone.With("identity.Access", nil)
	}
	return a, nil
}

// Disable keeps a device out until Enable, and ends its session. Its owner stays its owner. The owner "" is an operator.
// NotFound for a device that is not the owner's. A device that is disabled stays as it was. After trouble of the store it is
// kept out all the same, until the next start.
func (s *Store) Disable(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error {
	if len(reason) > maxReason {
		return errReason.With("identity.Disable", nil)
	}
	s.deciding.Lock()
	defer s.deciding.Unlock()
	found := false
	err := s.decide(ctx, dev, func(rec *record) (bool, error) {
		found = rec.State == registered && (owner == "" || rec.Owner == owner)
		switch {
		case !found:
			return false, errNone.With("identity.Disable", nil)
		case rec.Disabled != nil:
			return false, nil
		}
		rec.Disabled = &mark{Since: time.Now().UTC(), Owner: rec.Owner, User: user, Reason: reason}
		rec.Unannounced = s.changes != nil
		return true, nil
	})
	if found {
		s.disable(dev, true)
		s.tell(dev)
	}
	if err != nil {
		return err
	}
	return s.settle(ctx, dev)
}

// Enable lets a device in again that was disabled, or removed while it was the owner's, and ends its quarantine: what was kept of
// it is gone, its session ends, and it signs in anew. The owner "" is an operator. NotFound for another owner's. After an error it
// may be repeated.
func (s *Store) Enable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	s.deciding.Lock()
	defer s.deciding.Unlock()
	if _, apart := s.Quarantined(dev); apart {
		// One may have been asked for at the moment of the quarantine; nothing of that time is carried out later.
		if err := s.cancel(ctx, dev, owner); err != nil {
			return err
		}
	}
	err := s.decide(ctx, dev, func(rec *record) (bool, error) {
		of := rec.Owner
		if rec.Removed != nil {
			of = rec.Removed.Owner
		}
		switch {
		case of == "", owner != "" && of != owner, rec.State == releasing:
			return false, errNone.With("identity.Enable", nil)
		case rec.Disabled == nil && rec.Removed == nil && rec.Quarantined == nil:
			return false, nil
		}
		rec.Disabled, rec.Removed, rec.Quarantined, rec.Stopping = nil, nil, nil, false
		rec.Unannounced = s.changes != nil
		return true, nil
	})
	if err == nil {
		s.disable(dev, false)
		err = s.free(ctx, dev, true)
	}
	if err != nil {
		return err
	}
	return s.settle(ctx, dev)
}

// decide changes a device's record, unless change says that there is nothing to store. s.deciding is held.
func (s *Store) decide(ctx context.Context, dev hub.DeviceID, change func(*record) (bool, error)) error {
	for range maxTries {
		rec, rev, err := s.get(ctx, dev)
		if err != nil {
			return err
		}
		if rec.State == claimed {
			if err := s.register(ctx, dev, rec, rev); err != nil && !hub.IsKind(err, hub.Conflict) {
				return err
			}
			continue
		}
		write, err := change(&rec)
		if err != nil || !write {
			return err
		}
		if _, err = s.put(ctx, dev, rec, rev); !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
	return trouble("decide on a device", errors.New("too much contention"))
}

// Deny puts something on the deny list, or changes what the list says of it. Sessions of those who come with it end. Exhausted
// when the list has 10 000 entries ("denials-limit"). After other trouble of the store they are kept out all the same, until
// the next start.
func (s *Store) Deny(ctx context.Context, d hub.Denial) (hub.Denial, error) {
	const op = "identity.Deny"
	switch now := time.Now(); {
	case len(d.Reason) > maxReason:
		return d, errReason.With(op, nil)
	case !d.Until.IsZero() && !now.Before(d.Until):
		return d, hub.NewError(hub.Invalid, "denial-ended", "the entry's end is over").With(op, nil)
	default:
		d.Since = now.UTC()
	}
	key := denialKey(d.Of, d.Value)
	s.deciding.Lock()
	defer s.deciding.Unlock()
	s.mu.RLock()
	_, old := s.denied[key]
	full := !old && len(s.denied) >= maxDenied
	s.mu.RUnlock()
	if full {
		return d, errFull.With(op, nil)
	}
	err := s.putDenial(ctx, key, d)
	s.deny(d)
	s.tell(concerns(d))
	if err == nil {
		err = s.settleDenial(ctx, key)
	}
	return d, err
}

func (s *Store) putDenial(ctx context.Context, key string, d hub.Denial) error {
	for range maxTries {
		doc, err := s.docs.Get(ctx, collDenied, key)
		if err == nil {
			err = s.writeDenial(ctx, key, denial{Denial: d, Unannounced: s.changes != nil}, doc.Rev)
		}
		if err == nil {
			return nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return trouble("write a denial", err)
		}
	}
	return trouble("write a denial", errors.New("too much contention"))
}

func (s *Store) writeDenial(ctx context.Context, key string, d denial, rev uint64) error {
	doc := store.Doc{Key: key, Rev: rev}
	if d.Unannounced {
		doc.Index = []string{indexPending}
	}
	var err error
	if doc.Value, err = json.Marshal(d); err != nil {
		return fmt.Errorf("encode a denial: %w", err)
	}
	_, err = s.docs.Put(ctx, collDenied, doc)
	return err
}

// Undeny takes something off the deny list; NotFound if it is not on it.
func (s *Store) Undeny(ctx context.Context, of hub.DenialOf, value string) error {
	s.deciding.Lock()
	defer s.deciding.Unlock()
	return s.undeny(ctx, denialKey(of, value))
}

// undeny is Undeny. s.deciding is held.
func (s *Store) undeny(ctx context.Context, key string) error {
	doc, err := s.docs.Get(ctx, collDenied, key)
	found := false
	if err == nil && doc.Rev != 0 {
		var d denial
		if d, err = decodeDenial(doc); err != nil {
			return err
		}
		found = !d.Gone
		switch {
		case s.changes == nil:
			err = s.docs.Delete(ctx, collDenied, key, doc.Rev)
		case found:
			d.Gone, d.Unannounced = true, true
			err = s.writeDenial(ctx, key, d, doc.Rev)
		}
	}
	if err != nil && !hub.IsKind(err, hub.Conflict) { // another process has it now as it wants it
		return trouble("delete a denial", err)
	}
	if was := s.endDenial(key); !was && !found {
		return errUnlisted.With("identity.Undeny", nil)
	}
	return s.settleDenial(ctx, key)
}

// forgetEnded takes off the list what has ended.
func (s *Store) forgetEnded(ctx context.Context) {
	s.deciding.Lock()
	defer s.deciding.Unlock()
	for _, d := range s.Denials() {
		if d.Until.IsZero() || time.Now().Before(d.Until) {
			continue
		}
		if err := s.undeny(ctx, denialKey(d.Of, d.Value)); err != nil {
			s.log.WarnContext(ctx, "denials that have ended could not be taken off the list", "error", err)
			return
		}
	}
}
