package grpcgateway

import (
	"cmp"
	"context"
	"iter"
	"slices"
	"strconv"
	"sync"

	"github.com/coaphub/coaphub/hub"
)

// fakeFeed is a feed in memory. Its commits change the devices of a world as far as State shows them.
type fakeFeed struct {
	mu       sync.Mutex
	log      string
	entries  []hub.Fed
	trimmed  hub.Position
	moved    chan struct{}
	seqs     map[hub.DeviceID]uint64
	owners   map[hub.DeviceID]hub.Owner
	twins    map[hub.DeviceID]map[hub.Href]hub.Event
	headErr  error
	stateHas func() // called between the pictures of State
}

func newFakeFeed(w *world) *fakeFeed {
	f := &fakeFeed{
		log: "log-1", moved: make(chan struct{}), seqs: map[hub.DeviceID]uint64{}, owners: map[hub.DeviceID]hub.Owner{},
		twins: map[hub.DeviceID]map[hub.Href]hub.Event{},
	}
	for id, d := range w.pictures {
		f.seqs[id], f.owners[id] = d.Seq, d.Owner
	}
	return f
}

func (f *fakeFeed) head() hub.Position {
	if len(f.entries) == 0 {
		return f.trimmed
	}
	return f.entries[len(f.entries)-1].At
}

// happen commits events of a device, stamped with its owner.
func (f *fakeFeed) happen(dev hub.DeviceID, events ...hub.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.commit(dev, f.owners[dev], events...)
}

func (f *fakeFeed) commit(dev hub.DeviceID, owner hub.Owner, events ...hub.Event) {
	f.seqs[dev]++
	c := &hub.Commit{Device: dev, Seq: f.seqs[dev], Time: t0, Owner: owner, Events: events}
	before := f.head()
	f.entries = append(f.entries, hub.Fed{Before: before, At: hub.Position{Day: 1, N: before.N + 1}, Commit: c})
	for _, ev := range events {
		if ev.Kind == hub.ResourceChanged {
			if f.twins[dev] == nil {
				f.twins[dev] = map[hub.Href]hub.Event{}
			}
			f.twins[dev][ev.Href] = ev
		}
	}
	close(f.moved)
	f.moved = make(chan struct{})
}

// transfer gives the device to another owner.
func (f *fakeFeed) transfer(dev hub.DeviceID, to hub.Owner) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.owners[dev] != "" {
		f.commit(dev, f.owners[dev], hub.Event{Kind: hub.Unregistered})
	}
	f.owners[dev] = to
	delete(f.twins, dev)
	f.commit(dev, to, hub.Event{Kind: hub.Registered})
}

// trim forgets everything so far.
func (f *fakeFeed) trim() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.trimmed, f.entries = f.head(), nil
}

func (f *fakeFeed) FeedHead(context.Context) (hub.Cursor, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return hub.Cursor{Log: f.log, After: f.head()}, f.headErr
}

func (f *fakeFeed) Feed(ctx context.Context, owner hub.Owner, from hub.Cursor, to hub.Position) iter.Seq2[hub.Fed, error] {
	return func(yield func(hub.Fed, error) bool) {
		at := from.After
		f.mu.Lock()
		other := from.Log != f.log // a log is another one after a restart, which no reader outlives
		f.mu.Unlock()
		for {
			f.mu.Lock()
			lagged, moved := other || at.Compare(f.trimmed) < 0, f.moved
			i := slices.IndexFunc(f.entries, func(e hub.Fed) bool { return e.At.Compare(at) > 0 })
			var e hub.Fed
			if i >= 0 {
				e = f.entries[i]
			}
			f.mu.Unlock()
			switch {
			case lagged:
				yield(hub.Fed{}, hub.NewError(hub.Precondition, "feed-lagged", "what came next is no longer kept"))
				return
			case to != hub.Position{} && (i < 0 || e.At.Compare(to) > 0):
				return
			case i < 0:
				select {
				case <-moved:
				case <-ctx.Done():
					yield(hub.Fed{}, ctx.Err())
					return
				}
				continue
			}
			if e.Before == from.After {
				e.Skip = int(from.Skip)
			}
			at = e.At
			if e.Commit.Owner == owner && e.Skip < len(e.Commit.Events) && !yield(e, nil) {
				return
			}
		}
	}
}

func (f *fakeFeed) State(_ context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return func(yield func(*hub.Device, error) bool) {
		for _, id := range ids {
			f.mu.Lock()
			d := &hub.Device{ID: id, Owner: f.owners[id], Seq: f.seqs[id], Links: linkSet{}}
			var rs resourceSet
			for h, ev := range f.twins[id] {
				rs = append(rs, &hub.Resource{Href: h, Owner: d.Owner, Content: ev.Content, Version: ev.Version, Status: ev.Status, Types: ev.Types, Time: t0})
			}
			f.mu.Unlock()
			slices.SortFunc(rs, func(a, b *hub.Resource) int { return cmp.Compare(a.Href, b.Href) })
			d.Resources = rs
			if f.stateHas != nil {
				f.stateHas()
			}
			if d.Owner == owner && !yield(d, nil) {
				return
			}
		}
	}
}

// reports is a resource that changed.
func reports(h hub.Href, v int, types ...string) hub.Event {
	return hub.Event{
		Kind: hub.ResourceChanged, Href: h, Version: uint64(v), Status: hub.StatusOK, Types: types,
		Content: hub.Content{Type: "application/json", Format: hub.FormatJSON, Data: []byte(strconv.Itoa(v))},
	}
}
