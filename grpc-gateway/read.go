package grpcgateway

import (
	"context"
	"iter"
	"maps"
	"slices"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// found is an element of a list and its place, where a page may end.
type found struct {
	element
	at place
}

// pictures yields the devices that the filter speaks of, in ID order. Whether they are the owner's is decided by the stamp
// on each, so that named devices need no list of all the owner's.
func (g *Gateway) pictures(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[*hub.Device, error] {
	return func(yield func(*hub.Device, error) bool) {
		ids, err := g.candidates(ctx, owner, f, !f.at.IsZero())
		if err != nil {
			yield(nil, err)
			return
		}
		if f.at.IsZero() {
			g.deps.Directory.Devices(ctx, owner, ids)(yield)
			return
		}
		for _, id := range ids {
			switch d, err := g.deps.Directory.DeviceAt(ctx, owner, id, f.at); {
			case hub.IsKind(err, hub.NotFound): // it was somebody else's then, or nobody's
			case err != nil:
				yield(nil, err)
				return
			default:
				if !yield(d, nil) {
					return
				}
			}
		}
	}
}

// candidates returns the IDs to look at, in order, from the place on. Looking back, released devices count too.
func (g *Gateway) candidates(ctx context.Context, owner hub.Owner, f *filter, back bool) ([]hub.DeviceID, error) {
	var ids []hub.DeviceID
	var err error
	switch {
	case f.any:
		ids = f.ids()
	case back:
		ids, err = g.deps.Identities.EventsOwned(ctx, owner)
	default:
		ids, err = g.deps.Identities.Devices(ctx, owner)
	}
	if err != nil {
		return nil, err
	}
	first, _ := slices.BinarySearch(ids, f.from.device)
	return ids[first:], nil
}

func (g *Gateway) devices(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	switch {
	case f.order != (order{}):
		return g.sortedDevices(ctx, owner, f)
	case len(f.search) > 0 && f.at.IsZero():
		return g.searchedDevices(ctx, owner, f)
	}
	return each(g.pictures(ctx, owner, f), func(d *hub.Device, yield func(found) bool) bool {
		if d.ID == f.from.device {
			return true
		}
		e, ok := g.newDevice(d)
		if !ok || !f.wantsTypes(e.link.Types) || !f.wantsOnline(e.meta.Connection.Online) ||
			len(f.search) > 0 && !f.search.found(newSummary(&e)) {
			return true
		}
		return yield(found{e, place{device: d.ID}})
	})
}

func (g *Gateway) links(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return each(g.pictures(ctx, owner, f), func(d *hub.Device, yield func(found) bool) bool {
		if d.ID == f.from.device {
			return true
		}
		p := published{device: d.ID, cause: d.LinksCause, hubID: g.deps.HubID}
		for l := range d.Links.All() {
			if f.wantsTypes(l.Types) {
				p.links = append(p.links, l)
			}
		}
		if len(p.links) == 0 {
			return true
		}
		return yield(found{p, place{device: d.ID}})
	})
}

func (g *Gateway) metadata(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return each(g.pictures(ctx, owner, f), func(d *hub.Device, yield func(found) bool) bool {
		link, ok := d.Links.Get(deviceHref)
		if d.ID == f.from.device || !ok || !d.MetaCause.Known || !f.wantsTypes(link.Types) {
			return true
		}
		return yield(found{metadataUpdated{device: d.ID, meta: d.Metadata, cause: d.MetaCause, hubID: g.deps.HubID}, place{device: d.ID}})
	})
}

// resources walks the links: what is not published is not listed, even if its twin is still known.
func (g *Gateway) resources(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return each(g.pictures(ctx, owner, f), func(d *hub.Device, yield func(found) bool) bool {
		one := func(l hub.Link) bool {
			if d.ID == f.from.device && l.Href <= f.from.href || !f.wantsTypes(l.Types) {
				return true
			}
			etags, ok := f.wants(d.ID, l.Href)
			if !ok {
				return true
			}
			return yield(found{g.twin(d, l, etags), place{device: d.ID, href: l.Href}})
		}
		if f.wholeDevice(d.ID) {
			for l := range d.Links.All() {
				if !one(l) {
					return false
				}
			}
			return true
		}
		for _, h := range slices.Sorted(maps.Keys(f.resources[d.ID])) { // few of perhaps thousands: no walk over all links
			if l, ok := d.Links.Get(h); ok && !one(l) {
				return false
			}
		}
		return true
	})
}

func (g *Gateway) twin(d *hub.Device, l hub.Link, etags [][]byte) resourceElement {
	e := resourceElement{types: l.Types}
	if r, ok := d.Resources.Get(l.Href); ok {
		e.known, e.data = true, twinOf(d.ID, r, g.deps.HubID)
		if hasETag(etags, r.ETag) {
			e.data = e.data.notModified()
		}
	}
	return e
}

// events yields the history device by device, each in its order. Only events with the owner's stamp are read, so what
// happened before a transfer stays with the former owner.
func (g *Gateway) events(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		ids, err := g.candidates(ctx, owner, f, true)
		if err != nil {
			yield(found{}, err)
			return
		}
		for _, id := range ids {
			after := f.after
			resumed := id == f.from.device
			if resumed {
				// Several commits may have the same time: start one nanosecond early and pass over what was seen.
				if t := time.Unix(0, f.from.time-1); t.After(after) {
					after = t
				}
			}
			for c, err := range g.deps.Directory.History(ctx, owner, id, after) {
				if err != nil {
					yield(found{}, err)
					return
				}
				for i, e := range c.Events {
					at := place{device: id, seq: c.Seq, time: c.Time, index: uint32(i)}
					if resumed && (c.Seq < f.from.seq || c.Seq == f.from.seq && at.index <= f.from.index) || !f.wantsEvent(id, e) {
						continue
					}
					if !yield(found{eventElement{&c, i, g.deps.HubID}, at}, nil) {
						return
					}
				}
			}
		}
	}
}

// wantsEvent: a filter for a resource brings that resource's events only, one for a device also those of links and metadata.
func (f *filter) wantsEvent(id hub.DeviceID, e hub.Event) bool {
	if !inHistory(e.Kind) {
		return false
	}
	if f.wholeDevice(id) {
		return true
	}
	_, ok := f.resources[id][e.Href]
	switch e.Kind {
	case hub.ResourceChanged:
		return ok
	case hub.CommandPending, hub.CommandEnded:
		return ok && !e.Command.Kind.OfTwin()
	case hub.Registered, hub.Unregistered, hub.MetadataUpdated, hub.LinksPublished, hub.LinksUnpublished, hub.LabelsChanged, hub.CommandBound, hub.CommandLate:
	}
	return false
}

// each turns pictures into elements; from gives those of one device and reports whether to go on.
func each(devices iter.Seq2[*hub.Device, error], from func(*hub.Device, func(found) bool) bool) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		for d, err := range devices {
			if err != nil {
				yield(found{}, err)
				return
			}
			if !from(d, func(e found) bool { return yield(e, nil) }) {
				return
			}
		}
	}
}

// page sends at most f.limit elements. If there are more, the last one carries a cursor, which is known only after looking
// one element ahead.
func (g *Gateway) page(l list, owner hub.Owner, f *filter, all iter.Seq2[found, error], send func(e element, cursor string) error) error {
	var held *found
	n := uint32(0)
	for e, err := range all {
		if err != nil {
			return err
		}
		if f.limit == 0 {
			if err := send(e.element, ""); err != nil {
				return err
			}
			continue
		}
		if n == f.limit {
			return send(held.element, g.cursor(l, owner, f, held.at))
		}
		if held != nil {
			if err := send(held.element, ""); err != nil {
				return err
			}
		}
		held = &e
		n++
	}
	if held != nil {
		return send(held.element, "")
	}
	return nil
}
