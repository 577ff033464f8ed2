package identitystore

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
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

// kept is what handshakes ask for: they do not wait for a store. It has what this process wrote, or read when it started.
type kept struct {
	mu       sync.RWMutex // guards all below
	disabled map[hub.DeviceID]struct{}
	apart    map[hub.DeviceID]uint64 // those in quarantine, with the generation of their owner
	denied   map[string]hub.Denial   // by denialKey
	told     func(hub.DeviceID)
}

func denialKey(of hub.DenialOf, value string) string { return string(of) + " " + value }

func (k *kept) disable(dev hub.DeviceID, is bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if is {
		k.disabled[dev] = struct{}{}
	} else {
		delete(k.disabled, dev)
	}
}

// tell says that dev is not let in any more, or, if it is "", that somebody is not.
func (k *kept) tell(dev hub.DeviceID) {
	k.mu.RLock()
	told := k.told
	k.mu.RUnlock()
	if told != nil {
		told(dev)
	}
}

// keep reads who is not let in.
func (s *Store) keep(ctx context.Context) error {
	s.kept.disabled, s.kept.denied, s.kept.apart = map[hub.DeviceID]struct{}{}, map[string]hub.Denial{}, map[hub.DeviceID]uint64{}
	for doc, err := range s.docs.Find(ctx, collDevices, indexQuarantined) {
		if err != nil {
			return err
		}
		rec, err := decode(doc)
		if err != nil {
			return err
		}
		s.kept.apart[hub.DeviceID(doc.Key)] = rec.Generation
	}
	for id, err := range s.docs.FindKeys(ctx, collDevices, indexDisabled) {
		if err != nil {
			return err
		}
		s.kept.disabled[hub.DeviceID(id)] = struct{}{}
	}
	for doc, err := range s.docs.Range(ctx, collDenied, "", "") {
		if err != nil {
			return err
		}
		var d hub.Denial
		if err := json.Unmarshal(doc.Value, &d); err != nil {
			return &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "an entry of the deny list is damaged", Err: err}
		}
		s.kept.denied[doc.Key] = d
	}
	return nil
}

// Barred has f called when a device was disabled, denied, or put into quarantine or let out of it, or, with "", when something
// was denied that others may come with, once that is stored and Denied or Quarantined says so. f must not block.
func (s *Store) Barred(f func(hub.DeviceID)) {
	s.kept.mu.Lock()
	defer s.kept.mu.Unlock()
	s.kept.told = f
}

// EndCredentials has f called for each device that is removed, when nobody can sign in with it any more and before the removal
// is done: an error has it tried again later. It must be called before the Store is used.
func (s *Store) EndCredentials(f func(context.Context, hub.Ownership) error) { s.ends = f }

// Denied refuses a device that is disabled or denied, and whoever comes with a certificate that is, by itself, by its key or
// by a CA that vouches for it; the chain was verified and begins with the device's own. The device may be "", and the chain nil.
// It is Denied then, with "device-disabled", "device-denied", "key-denied", "certificate-denied" or "ca-denied". It does not
// block.
func (s *Store) Denied(dev hub.DeviceID, chain []*x509.Certificate) error {
	k := &s.kept
	k.mu.RLock()
	defer k.mu.RUnlock()
	if _, is := k.disabled[dev]; is {
		return errDisabled
	}
	if len(k.denied) == 0 { // and nothing is hashed
		return nil
	}
	now := time.Now()
	if dev != "" {
		if err := k.about(now, hub.DenyDevice, string(dev)); err != nil {
			return err
		}
	}
	if len(chain) == 0 {
		return nil
	}
	leaf := chain[0]
	own := []string{sum(leaf.Raw)}
	for _, ca := range chain[1:] { // one of them has issued it
		own = append(own, sum(ca.RawSubjectPublicKeyInfo)+"/"+hub.SerialOf(leaf.SerialNumber))
	}
	err := errors.Join(k.about(now, hub.DenyKey, sum(leaf.RawSubjectPublicKeyInfo)), k.about(now, hub.DenyCertificate, own...))
	for _, ca := range chain[1:] {
		if err == nil {
			err = k.about(now, hub.DenyCA, sum(ca.RawSubjectPublicKeyInfo), sum(ca.Raw))
		}
	}
	return err
}

// about is the refusal of one of the values, nil if there is none. k.mu is held.
func (k *kept) about(now time.Time, of hub.DenialOf, values ...string) error {
	for _, v := range values {
		if d, is := k.denied[denialKey(of, v)]; is && (d.Until.IsZero() || now.Before(d.Until)) {
			return errDenied[of]
		}
	}
	return nil
}

func sum(b []byte) string {
	h := sha256.Sum256(b)
	return hex.EncodeToString(h[:])
}

// Reachable refuses commands for a device of the owner's that is disabled, denied or in quarantine: Precondition, with the codes
// of Denied and "device-quarantined". Of others' it says nothing.
func (s *Store) Reachable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	denied := s.Denied(dev, nil)
	if _, apart := s.Quarantined(dev); denied == nil && apart {
		denied = errQuarantined
	}
	if denied == nil {
		return nil
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
	s.kept.mu.RLock()
	err := s.kept.about(time.Now(), hub.DenyKey, sum(spki))
	s.kept.mu.RUnlock()
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
	s.kept.mu.RLock()
	d, denied := s.kept.denied[denialKey(hub.DenyDevice, string(dev))]
	s.kept.mu.RUnlock()
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
		return true, nil
	})
	if found {
		s.kept.disable(dev, true)
		s.kept.tell(dev)
	}
	return err
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
		return true, nil
	})
	if err == nil {
		s.kept.disable(dev, false)
		err = s.free(ctx, dev, true)
	}
	return err
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
	s.kept.mu.RLock()
	_, old := s.kept.denied[key]
	full := !old && len(s.kept.denied) >= maxDenied
	s.kept.mu.RUnlock()
	if full {
		return d, errFull.With(op, nil)
	}
	err := s.putDenial(ctx, key, d)
	s.kept.mu.Lock()
	s.kept.denied[key] = d
	s.kept.mu.Unlock()
	if d.Of == hub.DenyDevice {
		s.kept.tell(hub.DeviceID(d.Value))
	} else {
		s.kept.tell("")
	}
	return d, err
}

func (s *Store) putDenial(ctx context.Context, key string, d hub.Denial) error {
	value, err := json.Marshal(d)
	if err != nil {
		return fmt.Errorf("encode a denial: %w", err)
	}
	for range maxTries {
		doc, err := s.docs.Get(ctx, collDenied, key)
		if err == nil {
			_, err = s.docs.Put(ctx, collDenied, store.Doc{Key: key, Value: value, Rev: doc.Rev})
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

// Undeny takes something off the deny list; NotFound if it is not on it.
func (s *Store) Undeny(ctx context.Context, of hub.DenialOf, value string) error {
	s.deciding.Lock()
	defer s.deciding.Unlock()
	return s.undeny(ctx, denialKey(of, value))
}

// undeny is Undeny. s.deciding is held.
func (s *Store) undeny(ctx context.Context, key string) error {
	doc, err := s.docs.Get(ctx, collDenied, key)
	if err == nil && doc.Rev != 0 {
		err = s.docs.Delete(ctx, collDenied, key, doc.Rev)
	}
	if err != nil && !hub.IsKind(err, hub.Conflict) { // another process has it now as it wants it
		return trouble("delete a denial", err)
	}
	s.kept.mu.Lock()
	defer s.kept.mu.Unlock()
	if _, was := s.kept.denied[key]; !was && doc.Rev == 0 {
		return errUnlisted.With("identity.Undeny", nil)
	}
	delete(s.kept.denied, key)
	return nil
}

// Denials is the deny list, in order of what is denied.
func (s *Store) Denials() []hub.Denial {
	s.kept.mu.RLock()
	all := slices.Collect(maps.Values(s.kept.denied))
	s.kept.mu.RUnlock()
	slices.SortFunc(all, func(a, b hub.Denial) int {
		return strings.Compare(denialKey(a.Of, a.Value), denialKey(b.Of, b.Value))
	})
	return all
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
