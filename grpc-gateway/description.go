package grpcgateway

import (
	"encoding/json"
	"sync"

	"github.com/coaphub/coaphub/hub"
)

// description is what a device says of itself in /oic/d.
type description struct {
	name, model, piid string
	manufacturer      []localized
}

// newDescription reads a content of /oic/d; nil when that is no object that can be decoded.
func newDescription(c hub.Content) *description {
	doc, ok := appendDecoded(nil, c)
	var members map[string]json.RawMessage
	if !ok || json.Unmarshal(doc, &members) != nil || members == nil {
		return nil
	}
	d := &description{}
	// A member of a wrong type stays empty: it must not hide the device.
	_ = json.Unmarshal(members["n"], &d.name)
	_ = json.Unmarshal(members["dmno"], &d.model)
	_ = json.Unmarshal(members["piid"], &d.piid)
	if json.Unmarshal(members["dmn"], &d.manufacturer) != nil {
		d.manufacturer = nil
		var plain string // as devices of OCF 1.0 have it
		if json.Unmarshal(members["dmn"], &plain) == nil && plain != "" {
			d.manufacturer = []localized{{Value: plain}}
		}
	}
	return d
}

// size is how many bytes the texts of a description take, those of a list each with their headers.
func (d *description) size() int {
	const headers = 32
	n := len(d.name) + len(d.model) + len(d.piid)
	for _, m := range d.manufacturer {
		n += headers + len(m.Language) + len(m.Value)
	}
	return n
}

// maxDescribed bounds the devices whose descriptions are remembered, and maxDescription the bytes that the texts of one may
// take; beyond them what a device says is read each time. With all that belongs to it, an entry with a name, a model and a
// manufacturer takes some 300 bytes, and the largest 1.8 KiB.
const (
	maxDescribed   = 100_000
	maxDescription = 1 << 10
)

// descriptions remembers what devices say of themselves: it changes seldom, and reading it is half of what a list costs. The
// zero value is empty.
type descriptions struct {
	mu      sync.RWMutex // guards what follows
	devices map[hub.DeviceID]described
}

// described is a description and the event that brought it: a commit's number is used once for a device, and in it each
// version.
type described struct {
	seq, version uint64
	*description
}

// of returns what r, the device's /oic/d, says; nil as newDescription.
func (k *descriptions) of(dev hub.DeviceID, r *hub.Resource) *description {
	k.mu.RLock()
	known, ok := k.devices[dev]
	k.mu.RUnlock()
	if ok && known.seq == r.Seq && known.version == r.Version {
		return known.description
	}
	d := newDescription(r.Content)
	k.mu.Lock()
	defer k.mu.Unlock()
	if d != nil && d.size() > maxDescription {
		delete(k.devices, dev)
		return d
	}
	if k.devices == nil {
		k.devices = map[hub.DeviceID]described{}
	}
	if !ok && len(k.devices) >= maxDescribed {
		for other := range k.devices { // whichever comes first
			delete(k.devices, other)
			break
		}
	}
	k.devices[dev] = described{r.Seq, r.Version, d}
	return d
}
