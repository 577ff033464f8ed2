package identitystore

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Collections of documents. One document a device in devices, it stays when the device is released, because it carries the
// generation. One document a (former owner, device) in past, until retention.
const (
	collDevices = "identities"
	collPast    = "identities-past"
)

// Secondary keys of collDevices: the owner of a device that is not being released, and marks on every device whose last step
// is not done yet, on every one that is disabled, and on every one in quarantine.
const (
	indexOwner       = "owner="
	indexPending     = "pending"
	indexDisabled    = "disabled"
	indexQuarantined = "quarantined"
)

// state is how far a claim or a release has come. The order of steps makes each of them repeatable:
//
//	free -> claimed -(Directory.Register)-> registered -> releasing -(Directory.Unregister)-> free
//
// A release always starts from registered, so that the directory has seen the generation before it unregisters it: a Register
// that was delayed in another process then finds its generation already there and does nothing.
type state string

const (
	free       state = ""
	claimed    state = "claimed"
	registered state = "registered"
	releasing  state = "releasing"
)

// record is the document of a device.
type record struct {
	State      state     `json:"state,omitempty"`
	Owner      hub.Owner `json:"owner,omitempty"`
	Generation uint64    `json:"generation"` // of the last claim, kept while free
	Pin        string    `json:"pin,omitempty"`
	User       string    `json:"user,omitempty"` // who asked for the step under way
	Disabled   *mark     `json:"disabled,omitempty"`
	// Quarantined says that what the device writes is kept apart; Stopping, with it, that its commands and its session have
	// not ended yet.
	Quarantined *mark `json:"quarantined,omitempty"`
	Stopping    bool  `json:"stopping,omitempty"`
	// Unannounced says that whether the device is let in changed, which others who share the documents were not told yet: see changes.
	Unannounced bool `json:"unannounced,omitempty"`
	// Removed says that it did not leave by itself, from the release on until somebody claims it again.
	Removed *mark `json:"removed,omitempty"`
}

// mark is what somebody decided about a device.
type mark struct {
	Since  time.Time `json:"since"`
	Owner  hub.Owner `json:"owner,omitempty"` // whose it was then
	User   string    `json:"user,omitempty"`
	Reason string    `json:"reason,omitempty"`
}

func (r record) ownership(dev hub.DeviceID) hub.Ownership {
	return hub.Ownership{Device: dev, Owner: r.Owner, Generation: r.Generation, Pin: r.Pin, Releasing: r.State == releasing}
}

func (r record) index() []string {
	var out []string
	if r.State == claimed || r.State == registered {
		out = append(out, indexOwner+string(r.Owner))
	}
	if r.State == claimed || r.State == releasing || r.Stopping || r.Unannounced {
		out = append(out, indexPending)
	}
	if r.Disabled != nil {
		out = append(out, indexDisabled)
	}
	if r.Quarantined != nil {
		out = append(out, indexQuarantined)
	}
	return out
}

// get reads a device's record and its revision; an unknown device is free at generation 0.
func (s *Store) get(ctx context.Context, dev hub.DeviceID) (record, uint64, error) {
	doc, err := s.docs.Get(ctx, collDevices, string(dev))
	if err != nil {
		return record{}, 0, trouble("read identity", err)
	}
	if doc.Rev == 0 {
		return record{}, 0, nil
	}
	rec, err := decode(doc)
	return rec, doc.Rev, err
}

// put stores a record if the revision is still rev; otherwise the error is of kind hub.Conflict and the caller reads again.
func (s *Store) put(ctx context.Context, dev hub.DeviceID, rec record, rev uint64) (uint64, error) {
	value, err := json.Marshal(rec)
	if err != nil {
		return 0, fmt.Errorf("encode identity: %w", err)
	}
	next, err := s.docs.Put(ctx, collDevices, store.Doc{Key: string(dev), Value: value, Rev: rev, Index: rec.index()})
	// Also after an error: what was written then is unknown.
	s.lists.drop(rec.Owner)
	if err != nil && !hub.IsKind(err, hub.Conflict) {
		return 0, trouble("write identity", err)
	}
	return next, err
}

func decode(doc store.Doc) (record, error) {
	var rec record
	if err := json.Unmarshal(doc.Value, &rec); err != nil {
		return record{}, &hub.Error{Kind: hub.Internal, Op: "decode identity", Err: err}
	}
	return rec, nil
}

// past is the document that says that an owner's events may still be in a device's log.
type past struct {
	Until time.Time `json:"until"`
}

// pastPrefix begins the keys of all documents of an owner in collPast. The encoding keeps owners with any characters apart.
func pastPrefix(owner hub.Owner) string {
	return base64.RawURLEncoding.EncodeToString([]byte(owner)) + "/"
}

// remember notes that owner had the device until now.
func (s *Store) remember(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	value, err := json.Marshal(past{Until: time.Now().Add(s.cfg.Retention).UTC()})
	if err != nil {
		return fmt.Errorf("encode former owner: %w", err)
	}
	key := pastPrefix(owner) + string(dev)
	for range maxTries {
		old, err := s.docs.Get(ctx, collPast, key)
		if err != nil {
			return trouble("read former owner", err)
		}
		_, err = s.docs.Put(ctx, collPast, store.Doc{Key: key, Value: value, Rev: old.Rev})
		if err == nil {
			return nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return trouble("write former owner", err)
		}
	}
	return trouble("write former owner", nil)
}
