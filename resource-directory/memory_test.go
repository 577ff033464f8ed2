package resourcedirectory

import (
	"context"
	"fmt"
	"math"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// large is about what a device takes in these tests: one resource, and little beside it.
const large = 200 << 10

// room is a configuration whose memory holds n large devices and not one more.
func room(workers, n int) Config {
	cfg := Default()
	cfg.Workers, cfg.Limits.LoadedBytes, cfg.ColdAfter = workers, int64(n*large+large/2), 24*time.Hour
	return cfg
}

// fill gives the device a value of its own and of that size.
func (x *device) fill(v string) error {
	return x.notify(value("/light", v+strings.Repeat(".", large-len(v))))
}

// loaded lists the devices in memory with a state that readers see.
func (h *house) loaded() []hub.DeviceID {
	var ids []hub.DeviceID
	h.d.devices.Range(func(dev, e any) bool {
		if e.(*entry).public.Load() != nil {
			ids = append(ids, dev.(hub.DeviceID))
		}
		return true
	})
	slices.Sort(ids)
	return ids
}

func (h *house) wantLoaded(what string, want ...hub.DeviceID) {
	h.t.Helper()
	synctest.Wait()
	if got := h.loaded(); !slices.Equal(got, want) {
		h.t.Errorf("%s: in memory are %v, want %v", what, got, want)
	}
}

// count is the value of a counter or gauge.
func count(t tb, c prometheus.Collector) float64 {
	t.Helper()
	reg := prometheus.NewRegistry()
	if err := reg.Register(c); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	m := families[0].GetMetric()[0]
	return m.GetCounter().GetValue() + m.GetGauge().GetValue()
}

// weighed checks, once nothing runs, that what was counted is what is there.
func (h *house) weighed() {
	h.t.Helper()
	h.stop()
	var all int64
	for _, w := range h.d.workers {
		var sum int64
		for _, e := range w.devices {
			sum += entryCost
			if e.state != nil {
				sum += e.state.bytes()
			}
			if e.dirty() {
				h.t.Errorf("device %s is dirty at the end", e.dev)
			}
		}
		if sum != w.bytes {
			h.t.Errorf("a worker counts %d bytes and holds %d", w.bytes, sum)
		}
		all += sum
	}
	if got := count(h.t, h.d.metrics.loadedBytes); h.d.loadedBytes.Load() != all || got != float64(all) {
		h.t.Errorf("%d bytes are counted and %g shown, %d are held", h.d.loadedBytes.Load(), got, all)
	}
}

// Devices that write one after another do not fill the memory: the one that was not written for the longest makes room. It
// is read as before, its session goes on, and a second one closes it.
func TestLoadedBytesAreBounded(t *testing.T) {
	t.Parallel()
	inBubble(t, room(1, 3), func(t *testing.T, h *house, _ *fake) {
		defer h.weighed()
		var xs []*device
		for i := range 12 {
			x := h.registered(testID(i))
			h.must(x.fill(fmt.Sprint("first of ", i)))
			xs = append(xs, x)
			synctest.Wait()
			if got, limit := h.d.loadedBytes.Load(), h.d.cfg.Limits.LoadedBytes; got > limit {
				t.Errorf("after %d devices %d bytes are in memory, over %d", i+1, got, limit)
			}
		}
		h.wantLoaded("the last to write", testID(9), testID(10), testID(11))
		if got := count(t, h.d.metrics.evicted); got != 9 {
			t.Errorf("%g devices were evicted, want 9", got)
		}
		if got := twinOf(t, h.device(alice, testID(0)), "/light"); !strings.HasPrefix(got, "first of 0.") {
			t.Errorf("the twin of an evicted device begins with %.20q", got)
		}
		h.wantLoaded("reading warms nothing", testID(9), testID(10), testID(11))

		h.must(xs[9].notify(value("/small", 1)))
		h.must(xs[0].notify(value("/small", 1)))
		h.wantLoaded("a load evicts too, and writing keeps warm", testID(0), testID(9), testID(11))
		h.signIn(testID(4), alice, 1, "conn-2")
		if got := xs[4].end.why(t); got != "second-session" {
			t.Errorf("closed with %q", got)
		}
		wantKind(t, xs[4].notify(value("/small", 1)), hub.Precondition, "session-superseded")
		h.must(xs[5].notify(value("/small", 1)))
		h.must(h.d.Offline(t.Context(), xs[5].stamp()))
		if h.device(alice, testID(5)).Metadata.Connection.Online {
			t.Error("an evicted device stayed online")
		}
	})
}

// One device that is larger than the whole room still writes: it is loaded for each write and leaves afterwards, also when
// the write changes nothing.
func TestDeviceLargerThanTheMemory(t *testing.T) {
	cfg := Default()
	cfg.Limits.LoadedBytes = 1 << 10
	inBubble(t, cfg, func(t *testing.T, h *house, _ *fake) {
		defer h.weighed()
		x := h.registered(lamp)
		for i := range 3 {
			h.must(x.fill(fmt.Sprint(i)))
			h.wantLoaded("after a write")
			h.must(x.fill(fmt.Sprint(i)))
			h.wantLoaded("after a write that changed nothing")
		}
		if got := twinOf(t, h.device(alice, lamp), "/light"); !strings.HasPrefix(got, "2.") {
			t.Errorf("the twin begins with %.20q", got)
		}
	})
}

// A device whose commit is under way stays, though it is the coldest and there is too much in memory. While that lasts, loads
// do not pile up: one is taken and waits for its turn, the others are not.
func TestDirtyDevicesAreNotEvicted(t *testing.T) {
	t.Parallel()
	inBubble(t, room(1, 1), func(t *testing.T, h *house, f *fake) {
		defer h.weighed()
		var xs []*device
		for i := range 8 {
			x := h.registered(testID(i))
			h.must(x.fill("1"))
			xs = append(xs, x)
		}
		h.wantLoaded("before", testID(7))
		first, second := make(chan struct{}), make(chan struct{})
		holds := []chan struct{}{first, second} // the worker has one append under way at a time
		f.set(func(f *fake) {
			f.append = func(ctx context.Context, entries []store.Entry) []error {
				if len(holds) > 0 {
					hold := holds[0]
					holds = holds[1:]
					<-hold
				}
				return f.Store.Append(ctx, entries)
			}
		})
		var wait sync.WaitGroup
		ask := func(do func() error) {
			wait.Go(func() {
				if err := do(); err != nil {
					t.Error(err)
				}
			})
			synctest.Wait()
		}
		// The first append makes the others' requests collect for one round, in this order.
		ask(func() error { return h.d.Register(t.Context(), own(testID(20), alice, 1), "") })
		ask(func() error { return xs[7].fill("2") })
		for i := range 7 {
			ask(func() error { return xs[i].fill("2") })
		}
		close(first)
		synctest.Wait()
		if got := h.loaded(); len(got) != 2 || !slices.Contains(got, testID(7)) {
			t.Errorf("in memory are %v, want the one under way and one that was loaded", got)
		}
		close(second)
		wait.Wait()
		for i := range xs {
			if got := twinOf(t, h.device(alice, testID(i)), "/light"); !strings.HasPrefix(got, "2.") {
				t.Errorf("the twin of device %d begins with %.20q", i, got)
			}
		}
		synctest.Wait()
		if got := h.loaded(); len(got) > 1 {
			t.Errorf("in the end %v are in memory", got)
		}
	})
}

// Each worker counts for itself, and the bound is for all: the one that holds most makes room for another's load.
func TestWorkersEvictForEachOther(t *testing.T) {
	t.Parallel()
	inBubble(t, room(2, 3), func(t *testing.T, h *house, _ *fake) {
		defer h.weighed()
		mine, others := []hub.DeviceID{testID(0)}, []hub.DeviceID{}
		for i := 1; len(mine) < 3 || len(others) < 1; i++ {
			if id := testID(i); h.d.worker(id) == h.d.worker(mine[0]) {
				mine = append(mine, id)
			} else {
				others = append(others, id)
			}
		}
		mine, others = mine[:3], others[:1]
		for _, id := range mine {
			h.must(h.registered(id).fill("1"))
		}
		h.wantLoaded("one worker has it all", mine...)
		h.must(h.registered(others[0]).fill("1"))
		want := append(slices.Clone(mine[1:]), others...)
		slices.Sort(want)
		h.wantLoaded("the other has its share", want...)
	})
}

// What is counted is about what the heap holds, or the bound means nothing. Devices of many small resources are where it
// would go wrong first, and strings are worst where each came from a document of its own.
func TestStateBytes(t *testing.T) {
	const n = 4000
	k, err := newCodec()
	if err != nil {
		t.Fatal(err)
	}
	heap := func() float64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return float64(m.HeapAlloc)
	}
	for name, add := range map[string]func(c *hub.Commit, href hub.Href){
		"links": func(c *hub.Commit, href hub.Href) {
			c.Events = append(c.Events, hub.Event{Kind: hub.LinksPublished, Links: []hub.Link{link(href, "oic.r.switch.binary")}})
		},
		"twins": func(c *hub.Commit, href hub.Href) {
			c.Events = append(c.Events, hub.Event{
				Kind: hub.ResourceChanged, Href: href, Types: []string{"oic.r.switch.binary"}, ETag: []byte("12345678"),
				Connection: "192.0.2.1:56830", User: "00000000-0000-4000-8000-000000000000",
				Content: hub.Content{Type: "application/vnd.ocf+cbor", Format: hub.FormatOCFCBOR, Data: make([]byte, 40)},
			})
		},
		"large twins": func(c *hub.Commit, href hub.Href) {
			c.Events = append(c.Events, hub.Event{Kind: hub.ResourceChanged, Href: href, Content: hub.Content{Data: make([]byte, 4000)}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			docs := func() []store.StateDoc { // what it makes on the way is garbage when it returns
				c := hub.Commit{Device: lamp, Seq: 1, Owner: alice}
				for i := range n {
					add(&c, hub.Href(fmt.Sprintf("/resource/%d", i)))
				}
				s, changed := newState(lamp).fold(&c)
				docs, err := k.docs(s, changed, "")
				if err != nil {
					t.Fatal(err)
				}
				return docs
			}()
			before := heap()
			s, err := k.read(lamp, docs, "")
			if err != nil {
				t.Fatal(err)
			}
			took := heap() - before
			runtime.KeepAlive(docs)
			ratio := float64(s.bytes()) / took
			t.Logf("%d counted, %.0f on the heap", s.bytes(), took)
			if math.IsNaN(ratio) || ratio < 0.8 || ratio > 1.6 {
				t.Errorf("%d bytes are counted, the heap holds %.0f", s.bytes(), took)
			}
		})
	}
}
