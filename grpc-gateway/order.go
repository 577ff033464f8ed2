package grpcgateway

import (
	"cmp"
	"container/heap"
	"context"
	"fmt"
	"iter"
	"slices"
	"strings"

	"github.com/coaphub/coaphub/hub"
)

// Searching and sorting devices. Both walk over what the index (index.go) says about the caller's devices and read only those
// devices that are sent; however many there are, it takes no more memory than the page that is asked for.

const (
	maxSearch = 256 // bytes
	maxWords  = 8
	// maxSorted is the largest page of a sorted list, which is put together in memory, and the size of one without limit.
	maxSorted = 1000
	// maxKey is how much of a text counts for the order, so that a cursor stays short.
	maxKey = 256
)

// search is words that must all occur.
type search []string

func newSearch(s string) (search, error) {
	if len(s) > maxSearch {
		return nil, invalid("query-invalid", fmt.Sprintf("search is longer than %d bytes", maxSearch))
	}
	words := strings.Fields(strings.ToLower(s))
	if len(words) > maxWords {
		return nil, invalid("query-invalid", fmt.Sprintf("search has more than %d words", maxWords))
	}
	return words, nil
}

// found reports whether each word occurs in the ID, the name, one of the types or one of the labels.
func (s search) found(d *summary) bool {
	for _, w := range s {
		if !d.has(w) {
			return false
		}
	}
	return true
}

// sortKeys are the fields that devices can be sorted by. Keys are texts whose bytes are in the order of the field.
var sortKeys = map[string]func(*summary) string{
	"id":          func(*summary) string { return "" }, // decides among equals anyway
	"name":        func(d *summary) string { return d.name },
	"modelNumber": func(d *summary) string { return d.model },
	"connectedAt": func(d *summary) string { return fmt.Sprintf("%016x", uint64(max(d.connectedAt, 0))) },
	"status": func(d *summary) string {
		if d.online {
			return "0" // ONLINE is 0 in the API too
		}
		return "1"
	},
}

// order is how a list of devices is sorted; the zero value is by ID as it is read.
type order struct {
	field string
	down  bool
}

func newOrder(s string) (order, error) {
	if s == "" {
		return order{}, nil
	}
	field, down := strings.CutPrefix(s, "-")
	if sortKeys[field] == nil {
		return order{}, invalid("query-invalid", "sort is none of id, name, modelNumber, connectedAt and status, nor one of them after a minus")
	}
	return order{field, down}, nil
}

func (o order) key(d *summary) string {
	k := sortKeys[o.field](d)
	return k[:min(len(k), maxKey)]
}

// compare orders by key, then by ID; down turns both around, so that the list is exactly the other one backwards.
func (o order) compare(a, b place) int {
	c := cmp.Or(strings.Compare(string(a.href), string(b.href)), cmp.Compare(a.device, b.device))
	if o.down {
		return -c
	}
	return c
}

// first is a heap of the places that come first, the last of them on top.
type first struct {
	order order
	all   []place
}

func (h *first) Len() int           { return len(h.all) }
func (h *first) Less(i, j int) bool { return h.order.compare(h.all[i], h.all[j]) > 0 }
func (h *first) Swap(i, j int)      { h.all[i], h.all[j] = h.all[j], h.all[i] }
func (h *first) Push(x any)         { h.all = append(h.all, x.(place)) }
func (h *first) Pop() any {
	last := h.all[len(h.all)-1]
	h.all = h.all[:len(h.all)-1]
	return last
}

// sortedDevices yields the next page of devices in their order, and one more if there is one. A place is a device with its
// key (in href): a device that changed its name between two pages may be missed or come twice, all others do not.
func (g *Gateway) sortedDevices(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	if f.limit == 0 || f.limit > maxSorted {
		f.limit = maxSorted // before the page is counted
	}
	return func(yield func(found, error) bool) {
		const tries = 3
		for try := 1; ; try++ {
			page, whole, err := g.sortedPage(ctx, owner, f)
			if err == nil && !whole && try < tries { // a device changed between being chosen and being read: choose again
				continue
			}
			for _, e := range page {
				if err == nil && !yield(e, nil) {
					return
				}
			}
			if err != nil {
				yield(found{}, err)
			}
			return
		}
	}
}

// sortedPage reports whether all devices that it chose could be read.
func (g *Gateway) sortedPage(ctx context.Context, owner hub.Owner, f *filter) (page []found, whole bool, err error) {
	all := *f
	all.from = place{} // a place in this order is none in the order of reading
	h := &first{order: f.order}
	for d, err := range g.summaries(ctx, owner, &all) {
		if err != nil {
			return nil, false, err
		}
		at := place{device: d.id, href: hub.Href(f.order.key(d.summary))}
		if f.from.device != "" && f.order.compare(at, f.from) <= 0 {
			continue
		}
		heap.Push(h, at)
		if h.Len() > int(f.limit)+1 {
			heap.Pop(h)
		}
	}
	slices.SortFunc(h.all, f.order.compare)
	chosen := filter{any: true, online: true, offline: true, at: f.at, devices: make(map[hub.DeviceID]bool, len(h.all))}
	for _, at := range h.all {
		chosen.devices[at.device] = true
	}
	read := make(map[hub.DeviceID]element, len(h.all))
	for e, err := range g.devices(ctx, owner, &chosen) {
		if err != nil {
			return nil, false, err
		}
		read[e.at.device] = e.element
	}
	for _, at := range h.all {
		if e, ok := read[at.device]; ok {
			page = append(page, found{e, at})
		}
	}
	return page, len(page) == len(h.all), nil
}

// searchedDevices yields the devices that are found, in ID order. It reads no others that the index knows, and none twice.
func (g *Gateway) searchedDevices(ctx context.Context, owner hub.Owner, f *filter) iter.Seq2[found, error] {
	return func(yield func(found, error) bool) {
		for d, err := range g.summaries(ctx, owner, f) {
			if err != nil {
				yield(found{}, err)
				return
			}
			if d.read != nil {
				if !yield(found{*d.read, place{device: d.id}}, nil) {
					return
				}
				continue
			}
			one := filter{any: true, online: true, offline: true, devices: map[hub.DeviceID]bool{d.id: true}}
			for e, err := range g.devices(ctx, owner, &one) { // none if it went meanwhile
				if !yield(e, err) || err != nil {
					return
				}
			}
		}
	}
}
