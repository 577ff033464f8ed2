package identitystore

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// patience is for how long what is kept may be believed after it was last compared with the documents that others change, too.
const patience = 10 * time.Second

var errAway = &hub.Error{
	Kind: hub.Unavailable, Code: "identities-away", RetryAfter: 5 * time.Second,
	Text: "which devices are let in cannot be found out now",
}

// kept is what handshakes ask for: they do not wait for a store. A Store has in it what it wrote, or read, and a Client what Stores
// told it.
type kept struct {
	mu       sync.RWMutex // guards all below
	disabled map[hub.DeviceID]struct{}
	apart    map[hub.DeviceID]uint64 // those in quarantine, with the generation of their owner
	denied   map[string]hub.Denial   // by denialKey
	told     func(hub.DeviceID)
	keyless  func(hub.DeviceID)
	version  uint64 // goes up with every change, so that what was read before one is not kept after it
	// shared is that others change the documents, too: then all this holds as of heard, which is zero until it was compared first.
	shared bool
	heard  time.Time
}

// standing is what is kept of a device.
type standing struct {
	Device     hub.DeviceID `cbor:"1,keyasint"`
	Disabled   bool         `cbor:"2,keyasint,omitempty"`
	Apart      bool         `cbor:"3,keyasint,omitempty"`
	Generation uint64       `cbor:"4,keyasint,omitempty"` // while it is apart
}

// everything is what is kept of all devices.
type everything struct {
	disabled map[hub.DeviceID]struct{}
	apart    map[hub.DeviceID]uint64
	denied   map[string]hub.Denial
}

func newEverything() everything {
	return everything{map[hub.DeviceID]struct{}{}, map[hub.DeviceID]uint64{}, map[string]hub.Denial{}}
}

func denialKey(of hub.DenialOf, value string) string { return string(of) + " " + value }

// Barred has f called when a device was disabled, denied, or put into quarantine or let out of it, or, with "", when something
// was denied that others may come with, or when it is not known whom it is about, once Denied or Quarantined says so. f must not
// block.
func (k *kept) Barred(f func(hub.DeviceID)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.told = f
}

// KeysEnded has f called when a device's pre-shared key has ended, or, with "", when it is not known whose have, since more was missed
// than is kept. f must not block.
func (k *kept) KeysEnded(f func(hub.DeviceID)) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.keyless = f
}

// tellKey says that a device's key has ended, or, if it is "", that somebody's has.
func (k *kept) tellKey(dev hub.DeviceID) {
	k.mu.RLock()
	f := k.keyless
	k.mu.RUnlock()
	if f != nil {
		f(dev)
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

// Denied refuses a device that is disabled or denied, and whoever comes with a certificate that is, by itself, by its key or
// by a CA that vouches for it; the chain was verified and begins with the device's own. The device may be "", and the chain nil.
// It is Denied then, with "device-disabled", "device-denied", "key-denied", "certificate-denied" or "ca-denied". Where others
// decide on devices, too, and could not be heard for 10 s, it is Unavailable ("identities-away") for all others. It does not block.
func (k *kept) Denied(dev hub.DeviceID, chain []*x509.Certificate) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	// Those who are known not to be let in come first: their sessions are to end, whatever else is known.
	if err := k.refuses(dev, chain); err != nil {
		return err
	}
	if k.shared && (k.heard.IsZero() || time.Since(k.heard) > patience) {
		return errAway
	}
	return nil
}

// refuses is Denied of what is kept. k.mu is held.
func (k *kept) refuses(dev hub.DeviceID, chain []*x509.Certificate) error {
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

// unreachable is why no commands are sent to a device, as far as is known, however long ago that was: those who have a session
// go on with it.
func (k *kept) unreachable(dev hub.DeviceID) error {
	k.mu.RLock()
	defer k.mu.RUnlock()
	if k.shared && k.heard.IsZero() {
		return errAway
	}
	if err := k.refuses(dev, nil); err != nil {
		return err
	}
	if _, apart := k.apart[dev]; apart {
		return errQuarantined
	}
	return nil
}

// Quarantined reports whether a device is in quarantine, and the generation of the ownership under which it was put there. It
// does not block.
func (k *kept) Quarantined(dev hub.DeviceID) (generation uint64, is bool) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	generation, is = k.apart[dev]
	return generation, is
}

// InQuarantine lists the devices in quarantine, in ID order.
func (k *kept) InQuarantine() []hub.DeviceID {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return slices.Sorted(maps.Keys(k.apart))
}

// Denials is the deny list, in order of what is denied.
func (k *kept) Denials() []hub.Denial {
	k.mu.RLock()
	all := slices.Collect(maps.Values(k.denied))
	k.mu.RUnlock()
	slices.SortFunc(all, func(a, b hub.Denial) int {
		return strings.Compare(denialKey(a.Of, a.Value), denialKey(b.Of, b.Value))
	})
	return all
}

func (k *kept) disable(dev hub.DeviceID, is bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version++
	if is {
		k.disabled[dev] = struct{}{}
	} else {
		delete(k.disabled, dev)
	}
}

func (k *kept) setApart(dev hub.DeviceID, generation uint64) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version++
	k.apart[dev] = generation
}

// endApart reports whether the device was in quarantine.
func (k *kept) endApart(dev hub.DeviceID) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version++
	_, was := k.apart[dev]
	delete(k.apart, dev)
	return was
}

func (k *kept) deny(d hub.Denial) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version++
	k.denied[denialKey(d.Of, d.Value)] = d
}

// endDenial reports whether it was on the list.
func (k *kept) endDenial(key string) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.version++
	_, was := k.denied[key]
	delete(k.denied, key)
	return was
}

// now is the version, for those who read documents to compare them with what is kept.
func (k *kept) now() uint64 {
	k.mu.RLock()
	defer k.mu.RUnlock()
	return k.version
}

// hear says that what is kept was compared with what had happened until then.
func (k *kept) hear(then time.Time) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.heard = then
}

// stand keeps how a device stands, and reports whether that is to be told. k.mu is held.
func (k *kept) stand(st standing) (tell bool) {
	if _, was := k.disabled[st.Device]; st.Disabled && !was {
		k.disabled[st.Device] = struct{}{}
		tell = true
	} else if !st.Disabled {
		delete(k.disabled, st.Device)
	}
	generation, was := k.apart[st.Device]
	switch {
	case st.Apart:
		k.apart[st.Device] = st.Generation
	case was:
		delete(k.apart, st.Device)
	}
	return tell || was != st.Apart || was && generation != st.Generation
}

// list keeps an entry of the deny list, and reports whether that is to be told. k.mu is held.
func (k *kept) list(d hub.Denial) (tell bool) {
	key := denialKey(d.Of, d.Value)
	old, was := k.denied[key]
	k.denied[key] = d
	return !was || !old.Since.Equal(d.Since)
}

// concerns is whom to tell of an entry.
func concerns(d hub.Denial) hub.DeviceID {
	if d.Of == hub.DenyDevice {
		return hub.DeviceID(d.Value)
	}
	return ""
}

// standings is what is kept of devices, and listed of denials, and which of those are not there.
func (k *kept) standings(devs []hub.DeviceID, denials []string) (sts []standing, on []hub.Denial, off []string) {
	k.mu.RLock()
	defer k.mu.RUnlock()
	for _, dev := range devs {
		st := standing{Device: dev}
		_, st.Disabled = k.disabled[dev]
		st.Generation, st.Apart = k.apart[dev]
		sts = append(sts, st)
	}
	for _, key := range denials {
		if d, is := k.denied[key]; is {
			on = append(on, d)
		} else {
			off = append(off, key)
		}
	}
	return sts, on, off
}

// all is standings of whatever is kept.
func (k *kept) all() (sts []standing, on []hub.Denial) {
	k.mu.RLock()
	devs := slices.AppendSeq(slices.Collect(maps.Keys(k.disabled)), maps.Keys(k.apart))
	denials := slices.Collect(maps.Keys(k.denied))
	k.mu.RUnlock()
	slices.Sort(devs)
	sts, on, _ = k.standings(slices.Compact(devs), denials)
	return sts, on
}

// replace keeps e and nothing else, and reports whether somebody is to be told. k.mu is held.
func (k *kept) replace(e everything) (tell bool) {
	for dev := range e.disabled {
		_, was := k.disabled[dev]
		tell = tell || !was
	}
	for key, d := range e.denied {
		old, was := k.denied[key]
		tell = tell || !was || !old.Since.Equal(d.Since)
	}
	tell = tell || !maps.Equal(k.apart, e.apart)
	k.disabled, k.apart, k.denied = e.disabled, e.apart, e.denied
	return tell
}
