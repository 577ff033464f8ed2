package grpcgateway

import (
	"context"
	"iter"
	"net/http"
	"strings"
	"sync"

	"github.com/coaphub/coaphub/hub"
)

// maxIndexed bounds the devices that the index remembers, and maxSummary the bytes that the texts of one may take; beyond them
// devices are read again each time. With all that belongs to it, an entry with a name and two types takes some 420 bytes, one
// with twelve labels besides 900, and the largest 1.4 KiB: 140 MiB for all, however long the names are.
const (
	maxIndexed = 100_000
	maxSummary = 1 << 10
)

// summary is what devices are searched and sorted by. Texts are in lower case, since searching and sorting have no case.
type summary struct {
	id          hub.DeviceID
	name, model string
	plainTypes  []string // as they are, for the filter
	texts       []string // all that is searched, besides the ID
	online      bool
	connectedAt int64 // Unix nanoseconds
}

func newSummary(e *deviceElement) *summary {
	d := &summary{
		id: e.id, name: strings.ToLower(e.says.name), model: strings.ToLower(e.says.model), plainTypes: e.link.Types,
		online: e.meta.Connection.Online, connectedAt: e.meta.Connection.ConnectedAt,
	}
	d.texts = append(make([]string, 0, 1+len(e.link.Types)+len(e.labels)), d.name)
	for _, t := range e.link.Types {
		d.texts = append(d.texts, strings.ToLower(t))
	}
	for name, value := range e.labels {
		d.texts = append(d.texts, strings.ToLower(name+"="+value))
	}
	return d
}

// size is how many bytes the texts of a summary take, each with its header.
func (d *summary) size() int {
	const header = 16
	n := len(d.model)
	for _, texts := range [][]string{d.texts, d.plainTypes} { // the first of texts is the name
		for _, t := range texts {
			n += header + len(t)
		}
	}
	return n
}

// has reports whether the word, in lower case, occurs.
func (d *summary) has(word string) bool {
	if strings.Contains(string(d.id), word) {
		return true
	}
	for _, t := range d.texts {
		if strings.Contains(t, word) {
			return true
		}
	}
	return false
}

// index remembers the summaries of devices, so that looking for one does not read and decode them all. An entry holds while
// Directory.Changes says the same number as before the device was read. The zero value is empty.
type index struct {
	mu      sync.Mutex // guards what follows
	devices map[hub.DeviceID]indexed
}

type indexed struct {
	changes uint64
	owner   hub.Owner
	summary *summary // nil: the device is in no list
}

func (x *index) get(id hub.DeviceID, owner hub.Owner, changes uint64) (*summary, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	e, ok := x.devices[id]
	return e.summary, ok && e.changes == changes && e.owner == owner
}

func (x *index) put(id hub.DeviceID, e indexed) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if e.summary != nil && e.summary.size() > maxSummary {
		delete(x.devices, id)
		return
	}
	if x.devices == nil {
		x.devices = map[hub.DeviceID]indexed{}
	}
	if _, there := x.devices[id]; !there && len(x.devices) >= maxIndexed {
		for other := range x.devices { // whichever comes first
			delete(x.devices, other)
			break
		}
	}
	x.devices[id] = e
}

// candidate is what is known of a device, and the device itself if it was read to know it: nil when the index knew.
type candidate struct {
	*summary
	read *deviceElement
}

// summaries yields what is known of the devices that the filter wants, in ID order, from the place on.
func (g *Gateway) summaries(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[candidate, error] {
	return func(yield func(candidate, error) bool) {
		if !f.at.IsZero() { // of the past nothing is remembered
			then := *f
			then.order = order{}
			for e, err := range g.devices(ctx, owner, &then) {
				if err != nil {
					yield(candidate{}, err)
					return
				}
				d := e.element.(deviceElement)
				if !yield(candidate{newSummary(&d), &d}, nil) {
					return
				}
			}
			return
		}
		ids, err := g.candidates(ctx, owner, f, false)
		for _, id := range ids {
			if err = ctx.Err(); err != nil {
				break
			}
			if id == f.from.device {
				continue
			}
			var d candidate
			if d, err = g.candidate(ctx, owner, id); err != nil {
				break
			}
			if d.summary == nil || !f.wantsTypes(d.plainTypes) || !f.wantsOnline(d.online) || !f.search.found(d.summary) {
				continue
			}
			if !yield(d, nil) {
				return
			}
		}
		if err != nil {
			yield(candidate{}, err)
		}
	}
}

// candidate returns what is known of a device, without a summary if it is in no list of owner's.
func (g *Gateway) candidate(ctx context.Context, owner hub.Owner, id hub.DeviceID) (d candidate, _ error) {
	changes := g.deps.Directory.Changes(id) // before it is read: see index
	if s, ok := g.index.get(id, owner, changes); ok {
		return candidate{summary: s}, nil
	}
	for picture, err := range g.deps.Directory.Devices(ctx, owner, []hub.DeviceID{id}) {
		if err != nil {
			return candidate{}, err
		}
		if e, ok := g.newDevice(picture); ok {
			d = candidate{newSummary(&e), &e}
		}
	}
	g.index.put(id, indexed{changes, owner, d.summary})
	return d, nil
}

// deviceCounts is how many devices a caller's list of devices has, and how many of them are online.
type deviceCounts struct {
	Devices int `json:"devices"`
	Online  int `json:"online"`
}

func (g *Gateway) getDevicesCounts(w http.ResponseWriter, r *request) error {
	n, err := g.deviceCounts(r.Context(), r.claims.Owner)
	if err != nil {
		return err
	}
	return writeJSON(w, r, n)
}

// deviceCounts reads the devices that the index does not know all together, and no others.
func (g *Gateway) deviceCounts(ctx context.Context, owner hub.Owner) (n deviceCounts, err error) {
	count := func(d *summary) {
		if d == nil {
			return
		}
		n.Devices++
		if d.online {
			n.Online++
		}
	}
	ids, err := g.deps.Identities.Devices(ctx, owner)
	if err != nil {
		return n, err
	}
	var unknown []hub.DeviceID
	var changes []uint64 // of those, before they are read: see index
	for _, id := range ids {
		c := g.deps.Directory.Changes(id)
		if d, ok := g.index.get(id, owner, c); ok {
			count(d)
			continue
		}
		unknown, changes = append(unknown, id), append(changes, c)
	}
	at := 0
	upTo := func(id hub.DeviceID) { // those before it are not the owner's any more
		for ; at < len(unknown) && unknown[at] < id; at++ {
			g.index.put(unknown[at], indexed{changes[at], owner, nil})
		}
	}
	for picture, err := range g.deps.Directory.Devices(ctx, owner, unknown) {
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return n, err
		}
		upTo(picture.ID)
		var d *summary
		if e, ok := g.newDevice(picture); ok {
			d = newSummary(&e)
		}
		count(d)
		g.index.put(picture.ID, indexed{changes[at], owner, d})
		at++
	}
	upTo("~") // behind all of them
	return n, ctx.Err()
}
