package bundle

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// pskCollection has, by device, the salt of its pre-shared key. The key itself is nowhere: it is made of the salt and a secret
// that is a file in the keys folder, so that neither the store nor a backup of it gives it away.
const pskCollection = "psk"

// pskRecord is such a document.
type pskRecord struct {
	Salt    []byte    `json:"salt"`
	Created time.Time `json:"created,omitzero"` // zero in those of older versions
	User    string    `json:"user,omitempty"`
	Owner   hub.Owner `json:"owner,omitempty"` // who was shown it; "" if an operator was, for whoever has the device
}

// preShared has the pre-shared keys of devices. The identity that goes with a key is the device's ID. Nothing is remembered: several
// processes may make keys on the same documents, and with the same secret.
type preShared struct {
	docs   store.Documents
	secret []byte
}

// replace makes a key for a device of an owner, "" for whoever has it, in place of the one it may have had. It is text, as people and
// programs hand it on, and its bytes are the key.
func (p *preShared) replace(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string) (string, pskRecord, error) {
	return p.replaceIf(ctx, dev, owner, user, func(pskRecord) error { return nil })
}

// replaceIf is replace, if may says nothing against the key that there is, or was. One of a device that nobody has is among those that
// wait for their devices.
func (p *preShared) replaceIf(
	ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string, may func(pskRecord) error, index ...string,
) (string, pskRecord, error) {
	for {
		old, rev, err := p.read(ctx, dev)
		if err == nil {
			err = may(old)
		}
		if err != nil {
			return "", pskRecord{}, err
		}
		rec := pskRecord{Salt: make([]byte, 16), Created: time.Now().UTC(), User: user, Owner: owner}
		_, _ = rand.Read(rec.Salt) // never fails
		err = p.write(ctx, dev, rec, rev, index...)
		if err == nil {
			return p.make(dev, rec), rec, nil
		}
		if !hub.IsKind(err, hub.Conflict) {
			return "", pskRecord{}, err
		}
	}
}

func (p *preShared) write(ctx context.Context, dev hub.DeviceID, rec pskRecord, rev uint64, index ...string) error {
	value, err := json.Marshal(rec)
	if err != nil {
		return fmt.Errorf("encode the salt of a pre-shared key: %w", err)
	}
	if _, err = p.docs.Put(ctx, pskCollection, store.Doc{Key: string(dev), Value: value, Rev: rev, Index: index}); err != nil {
		return fmt.Errorf("store the salt of a pre-shared key: %w", err)
	}
	return nil
}

const (
	// maxWaitingKeys bounds an owner's keys of devices that nobody has: anybody can name devices that there are none of.
	maxWaitingKeys = 1000
	// keptFor is how long such a key counts, if there are many: as long as its device's ID is kept for the owner.
	keptFor = 24 * time.Hour

	indexWaiting = "waiting=" // with the owner
)

var (
	errKeyTaken = hub.NewError(hub.Denied, "psk-of-other", "an operator has given the device ID a pre-shared key")
	errKeyLimit = hub.NewError(hub.Exhausted, "psk-limit", "the owner has 1000 pre-shared keys of devices that have not signed up; later it may work")
)

// offered refuses an owner to replace the key of a device that nobody has, if an operator was shown it. One that another owner was
// shown was worth something for as long as the ID was kept for him.
func offered(owner hub.Owner) func(pskRecord) error {
	return func(rec pskRecord) error {
		if rec.Salt != nil && rec.Owner == "" && owner != "" {
			return errKeyTaken
		}
		return nil
	}
}

// offer makes a key for an owner's device, or for one that nobody has and whose ID is kept for the owner, in place of the one it may
// have had; whose says which of the two, or refuses. As with give, nobody is shown a key of a device that changed hands meanwhile.
func (p *preShared) offer(
	ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string, whose func(hub.DeviceID) (hub.Ownership, error),
) (string, error) {
	own, err := whose(dev)
	if err != nil {
		return "", err
	}
	var rec pskRecord
	text := ""
	switch {
	case own.Owner != "":
		text, rec, err = p.replace(ctx, dev, owner, user)
	default:
		if err = p.mayOffer(ctx, dev, owner, whose); err == nil {
			text, rec, err = p.replaceIf(ctx, dev, owner, user, offered(owner), indexWaiting+string(owner))
		}
	}
	if err != nil {
		return "", err
	}
	now, err := whose(dev)
	if err == nil && own.Owner != "" && (now.Owner != own.Owner || now.Generation != own.Generation) {
		err = errNotOwned
	}
	if err != nil {
		return "", errors.Join(err, p.forgetIf(context.WithoutCancel(ctx), dev, rec.same))
	}
	return text, nil
}

// mayOffer says what offer would say about a device that nobody has.
func (p *preShared) mayOffer(ctx context.Context, dev hub.DeviceID, owner hub.Owner, whose func(hub.DeviceID) (hub.Ownership, error)) error {
	rec, err := p.record(ctx, dev)
	if err == nil {
		err = offered(owner)(rec)
	}
	if err != nil {
		return err
	}
	return p.room(ctx, dev, owner, whose)
}

// room refuses another key of a device that nobody has to an owner who has many. Those whose devices have come, and those that
// are kept no longer, count no more from then on.
func (p *preShared) room(ctx context.Context, dev hub.DeviceID, owner hub.Owner, whose func(hub.DeviceID) (hub.Ownership, error)) error {
	n := 0
	for key, err := range p.docs.FindKeys(ctx, pskCollection, indexWaiting+string(owner)) {
		if err != nil {
			return fmt.Errorf("count pre-shared keys: %w", err)
		}
		if hub.DeviceID(key) == dev { // it makes room for itself
			return nil
		}
		n++
	}
	if n < maxWaitingKeys {
		return nil
	}
	for doc, err := range p.docs.Find(ctx, pskCollection, indexWaiting+string(owner)) {
		if err != nil {
			return fmt.Errorf("look through pre-shared keys: %w", err)
		}
		left, err := p.settle(ctx, doc, owner, whose)
		if err != nil && !hub.IsKind(err, hub.Conflict) {
			return err
		}
		if left {
			n--
		}
	}
	if n >= maxWaitingKeys {
		return errKeyLimit
	}
	return nil
}

// settle reports whether a key waits no more: its device is the owner's, or it is kept no longer.
func (p *preShared) settle(ctx context.Context, doc store.Doc, owner hub.Owner, whose func(hub.DeviceID) (hub.Ownership, error)) (bool, error) {
	var rec pskRecord
	if err := json.Unmarshal(doc.Value, &rec); err != nil {
		return false, fmt.Errorf("the salt of a pre-shared key: %w", err)
	}
	dev := hub.DeviceID(doc.Key)
	own, err := whose(dev)
	switch {
	case err == nil && own.Owner == owner:
		return true, p.write(ctx, dev, rec, doc.Rev)
	case err != nil && !hub.IsKind(err, hub.Denied):
		return false, err
	case time.Since(rec.Created) < keptFor:
		return false, nil
	}
	return true, p.docs.Delete(ctx, pskCollection, doc.Key, doc.Rev)
}

// same reports whether it is the same key.
func (rec pskRecord) same(other pskRecord) bool { return bytes.Equal(rec.Salt, other.Salt) }

// key returns a device's key, nil if it has none.
func (p *preShared) key(ctx context.Context, dev hub.DeviceID) ([]byte, error) {
	rec, err := p.record(ctx, dev)
	if err != nil || rec.Salt == nil {
		return nil, err
	}
	return []byte(p.make(dev, rec)), nil
}

// record is what is known of a device's key; without salt if it has none.
func (p *preShared) record(ctx context.Context, dev hub.DeviceID) (pskRecord, error) {
	rec, _, err := p.read(ctx, dev)
	return rec, err
}

func (p *preShared) read(ctx context.Context, dev hub.DeviceID) (rec pskRecord, rev uint64, err error) {
	doc, err := p.docs.Get(ctx, pskCollection, string(dev))
	if err != nil {
		return rec, 0, fmt.Errorf("read the salt of a pre-shared key: %w", err)
	}
	if doc.Rev == 0 {
		return rec, 0, nil
	}
	if err := json.Unmarshal(doc.Value, &rec); err != nil {
		return rec, 0, fmt.Errorf("the salt of a pre-shared key: %w", err)
	}
	return rec, doc.Rev, nil
}

// give makes a key for whoever has the device, whom owner finds out, in place of the one it may have had. Nobody is shown a key who has
// the device no more: whoever hands it over or removes it while the key is made has not seen it, and it goes.
func (p *preShared) give(ctx context.Context, dev hub.DeviceID, user string, owner func() (hub.Ownership, error)) (string, pskRecord, error) {
	own, err := owner()
	if err != nil {
		return "", pskRecord{}, err
	}
	text, rec, err := p.replace(ctx, dev, own.Owner, user)
	if err != nil {
		return "", pskRecord{}, err
	}
	now, err := owner()
	if err == nil && (now.Owner != own.Owner || now.Generation != own.Generation) {
		err = errNotOwned
	}
	if err != nil {
		return "", pskRecord{}, errors.Join(err, p.forgetIf(context.WithoutCancel(ctx), dev, rec.same))
	}
	return text, rec, nil
}

// forget makes a device's key useless, if it has one.
func (p *preShared) forget(ctx context.Context, dev hub.DeviceID) error {
	return p.forgetIf(ctx, dev, func(pskRecord) bool { return true })
}

// forgetIf makes a device's key useless if it is the one, and no other that was made meanwhile.
func (p *preShared) forgetIf(ctx context.Context, dev hub.DeviceID, is func(pskRecord) bool) error {
	for {
		rec, rev, err := p.read(ctx, dev)
		if err != nil || rev == 0 || !is(rec) {
			return err
		}
		if err = p.docs.Delete(ctx, pskCollection, string(dev), rev); !hub.IsKind(err, hub.Conflict) {
			return err
		}
	}
}

// handOver makes a key useless that an owner was shown who has the device no more.
func (p *preShared) handOver(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	return p.forgetIf(ctx, dev, func(rec pskRecord) bool { return rec.Owner != "" && rec.Owner != owner })
}

func (p *preShared) make(dev hub.DeviceID, rec pskRecord) string {
	mac := hmac.New(sha256.New, p.secret)
	mac.Write([]byte(dev))
	mac.Write(rec.Salt)
	// 144 bits: no padding, and no more than the 64 bytes that RFC 4279, Section 5.3 asks devices to take.
	return base64.RawURLEncoding.EncodeToString(mac.Sum(nil)[:18])
}

// deviceKeys is what owners do with their devices' keys over the API.
type deviceKeys struct{ a *assembly }

var errNoKey = hub.NewError(hub.NotFound, "psk-unknown", "the device has no pre-shared key")

// Key is of grpcgateway.PreSharedKeys.
func (k deviceKeys) Key(ctx context.Context, dev hub.DeviceID) (grpcgateway.PreSharedKey, error) {
	rec, err := k.a.psk.record(ctx, dev)
	if err == nil && rec.Salt == nil {
		err = errNoKey
	}
	return grpcgateway.PreSharedKey{Identity: string(dev), Created: rec.Created, User: rec.User}, err
}

// NewKey is of grpcgateway.PreSharedKeys.
func (k deviceKeys) NewKey(ctx context.Context, dev hub.DeviceID, user string) (grpcgateway.PreSharedKey, error) {
	if err := k.a.takesKeys(); err != nil {
		return grpcgateway.PreSharedKey{}, err
	}
	text, rec, err := k.a.psk.give(ctx, dev, user, func() (hub.Ownership, error) { return k.a.identities.Owner(ctx, dev) })
	if err != nil {
		return grpcgateway.PreSharedKey{}, err
	}
	k.a.doors.endKey(ctx, dev) // whoever has the former one
	return grpcgateway.PreSharedKey{Identity: string(dev), Key: text, Created: rec.Created, User: user}, nil
}

// ForgetKey is of grpcgateway.PreSharedKeys.
func (k deviceKeys) ForgetKey(ctx context.Context, dev hub.DeviceID) error {
	if _, err := k.Key(ctx, dev); err != nil {
		return err
	}
	if err := k.a.psk.forget(ctx, dev); err != nil {
		return err
	}
	k.a.doors.endKey(ctx, dev)
	return nil
}

// enrolmentKey is a device's key at the door for enrolment. One that an owner was shown is none there until the device is his: who
// comes with it gets a certificate for whoever has the device, and that may be somebody else one day.
func (a *assembly) enrolmentKey(ctx context.Context, dev hub.DeviceID) ([]byte, error) {
	rec, err := a.psk.record(ctx, dev)
	if err != nil || rec.Salt == nil {
		return nil, err
	}
	if rec.Owner != "" {
		own, err := a.identities.Owner(ctx, dev)
		if hub.IsKind(err, hub.NotFound) || err == nil && own.Owner != rec.Owner {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return []byte(a.psk.make(dev, rec)), nil
}

// takesKeys reports whether devices can come with pre-shared keys.
func (a *assembly) takesKeys() error {
	if a.cfg.CoAPGateway.API.CoAP.TLS.PSK && a.doors.endpoint(hub.ProtocolCoAPS) != "" {
		return nil
	}
	return hub.NewError(hub.Precondition, "psk-off", "pre-shared keys are off: see coapGateway.api.coap.tls.psk and protocols")
}
