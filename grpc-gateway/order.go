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

// Searching and sorting devices. Both look at what a list of devices shows anyway, so they cost one walk over the caller's
// devices and, however many there are, no more memory than the page that is asked for.

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
func (s search) found(e *deviceElement) bool {
	if len(s) == 0 {
		return true
	}
	texts := []string{string(e.id), strings.ToLower(e.name)}
	for _, t := range e.link.Types {
		texts = append(texts, strings.ToLower(t))
	}
	for name, value := range e.labels {
		texts = append(texts, strings.ToLower(name+"="+value))
	}
	for _, w := range s {
		if !slices.ContainsFunc(texts, func(t string) bool { return strings.Contains(t, w) }) {
			return false
		}
	}
	return true
}

// sortKeys are the fields that devices can be sorted by. Keys are texts whose bytes are in the order of the field.
var sortKeys = map[string]func(*deviceElement) string{
	"id":          func(*deviceElement) string { return "" }, // decides among equals anyway
	"name":        func(e *deviceElement) string { return strings.ToLower(e.name) },
	"modelNumber": func(e *deviceElement) string { return strings.ToLower(e.model) },
	"connectedAt": func(e *deviceElement) string {
		return fmt.Sprintf("%016x", uint64(max(e.meta.Connection.ConnectedAt, 0)))
	},
	"status": func(e *deviceElement) string {
		if e.meta.Connection.Online {
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

func (o order) key(e *deviceElement) string {
	k := sortKeys[o.field](e)
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

// first is a heap of the elements that come first, the last of them on top.
type first struct {
	order order
	all   []found
}

func (h *first) Len() int           { return len(h.all) }
func (h *first) Less(i, j int) bool { return h.order.compare(h.all[i].at, h.all[j].at) > 0 }
func (h *first) Swap(i, j int)      { h.all[i], h.all[j] = h.all[j], h.all[i] }
func (h *first) Push(x any)         { h.all = append(h.all, x.(found)) }
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
		whole := *f
		whole.from, whole.order = place{}, order{} // a place in this order is none in the order of reading
		h := &first{order: f.order}
		for e, err := range g.devices(ctx, owner, &whole) {
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				yield(found{}, err)
				return
			}
			d := e.element.(deviceElement)
			e.at = place{device: d.id, href: hub.Href(f.order.key(&d))}
			if f.from.device != "" && f.order.compare(e.at, f.from) <= 0 {
				continue
			}
			heap.Push(h, e)
			if h.Len() > int(f.limit)+1 {
				heap.Pop(h)
			}
		}
		slices.SortFunc(h.all, func(a, b found) int { return f.order.compare(a.at, b.at) })
		for _, e := range h.all {
			if !yield(e, nil) {
				return
			}
		}
	}
}
