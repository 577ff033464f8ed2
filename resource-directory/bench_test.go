package resourcedirectory

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// onDisk is a house whose store is synced to the real disk.
func onDisk(b *testing.B) *house {
	s, err := pebblestore.Open(b.TempDir(), pebblestore.Options{FS: vfs.Default, MinFree: -1})
	if err != nil {
		b.Fatal(err)
	}
	h := &house{t: b, base: s, st: s, cfg: Default(), log: &logBuffer{}}
	h.d, h.stop = run(b, h.cfg, s, h.log)
	b.Cleanup(h.close)
	return h
}

// BenchmarkNotify stores notifications of 64 devices at once, each waiting for its answer before it sends the next.
func BenchmarkNotify(b *testing.B) {
	for _, devices := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("under-way=%d", devices), func(b *testing.B) {
			h := onDisk(b)
			xs := make([]*device, devices)
			var wait sync.WaitGroup
			for i := range xs {
				wait.Go(func() {
					h.must(h.d.Register(b.Context(), own(testID(i), alice, 1), ""))
					xs[i] = h.signIn(testID(i), alice, 1, "c")
				})
			}
			wait.Wait()
			var n atomic.Int64
			b.ReportAllocs()
			b.ResetTimer()
			for _, x := range xs {
				wait.Go(func() {
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						if err := x.notify(value("/temperature", i)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wait.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

// BenchmarkNotifyApart is BenchmarkNotify over the bus: one gateway and two directories, which share a store that is synced to the
// real disk. cpu-ns/op is of all of them and of the NATS server.
func BenchmarkNotifyApart(b *testing.B) {
	for _, devices := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("under-way=%d", devices), func(b *testing.B) {
			w := newTown(b)
			w.directories(2)
			gw := w.start(GatewayPart, "gw")
			xs := make([]*guest, devices)
			var wait sync.WaitGroup
			for i := range xs {
				wait.Go(func() {
					dev := testID(i)
					w.must(gw.c.Register(b.Context(), own(dev, alice, 1), ""))
					xs[i] = w.signIn(gw, "gw", dev, fmt.Sprint("conn-", i))
				})
			}
			wait.Wait()
			var n atomic.Int64
			b.ReportAllocs()
			b.ResetTimer()
			cpu := cpuTime(b)
			for _, x := range xs {
				wait.Go(func() {
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						if err := gw.c.Notify(b.Context(), x.stamp(), []hub.Change{value("/temperature", i)}); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wait.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
			b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N), "cpu-ns/op")
		})
	}
}

// switched is a store whose appends, once they are free, cost nothing and keep nothing.
type switched struct {
	store.Store
	free *atomic.Bool
}

func (s switched) Append(ctx context.Context, entries []store.Entry) []error {
	if s.free.Load() {
		return make([]error, len(entries))
	}
	return s.Store.Append(ctx, entries)
}

// BenchmarkDecide is the way of a notification from its session through the directory without the store: the worker decides,
// makes the commit and its documents, applies and answers.
func BenchmarkDecide(b *testing.B) {
	for _, devices := range []int{1, 64} {
		b.Run(fmt.Sprintf("under-way=%d", devices), func(b *testing.B) {
			var free atomic.Bool
			h := open(b, func(h *house) {
				h.wrap = func(s store.Store) store.Store { return switched{s, &free} }
			})
			xs := make([]*device, devices)
			for i := range xs {
				xs[i] = h.registered(testID(i))
				h.must(xs[i].notify(value("/temperature", 0)))
			}
			free.Store(true)
			var wait sync.WaitGroup
			var n atomic.Int64
			b.ReportAllocs()
			b.ResetTimer()
			for _, x := range xs {
				wait.Go(func() {
					for i := n.Add(1); i <= int64(b.N); i = n.Add(1) {
						if err := x.notify(value("/temperature", i)); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wait.Wait()
			b.StopTimer() // what follows is stored again, and refused: the directory is ahead of the store
		})
	}
}

// BenchmarkApply makes the next state of a device with three resources from a commit of one event.
func BenchmarkApply(b *testing.B) {
	h := open(b)
	x := h.registered(lamp)
	h.must(x.notify(value("/light/1", 1), value("/light/2", 1), value("/light/3", 1)))
	s, err := h.d.read(b.Context(), lamp)
	h.must(err)
	c := &hub.Commit{Device: lamp, Seq: s.seq + 1, Owner: alice, Generation: 1, Time: s.time}
	change := value("/light/2", 2)
	c.Events = []hub.Event{s.changed(x.stamp(), &change)}
	b.ReportAllocs()
	for b.Loop() {
		s.fold(c)
	}
}

// BenchmarkNotifyBySize shows that an event costs a device with 10 000 resources what it costs one with two.
func BenchmarkNotifyBySize(b *testing.B) {
	for _, resources := range []int{2, 10000} {
		b.Run(fmt.Sprintf("resources=%d", resources), func(b *testing.B) {
			h := open(b)
			x := h.registered(lamp)
			links, changes := make([]hub.Link, resources), make([]hub.Change, resources)
			for i := range resources {
				href := hub.Href(fmt.Sprintf("/r/%d", i))
				links[i], changes[i] = link(href, "x.r"), value(href, "start")
			}
			_, err := x.publish(links...)
			h.must(err)
			h.must(x.notify(changes...))
			b.ReportAllocs()
			b.ResetTimer()
			for i := range b.N {
				h.must(x.notify(value(links[i%resources].Href, i)))
			}
		})
	}
}

// BenchmarkByHistory shows that an event costs the same whatever is in the log already: 1, 100 or 10 000 times 50 commits, of
// one device or of many. So do the reads that do not ask for all of it: the newest events, the end of the feed, a twin in memory
// and one that is not. The store's files are in memory, and cpu-ns/op has its work in the background, which ns/op may not have.
func BenchmarkByHistory(b *testing.B) {
	for _, devices := range []int{1, 50} {
		for _, times := range []int{1, 100, 10_000} {
			b.Run(fmt.Sprintf("devices=%d/history=%d", devices, times), func(b *testing.B) {
				h := open(b)
				xs := make([]*device, devices)
				var wait sync.WaitGroup
				for i := range xs {
					wait.Go(func() {
						h.must(h.d.Register(b.Context(), own(testID(i), alice, 1), ""))
						xs[i] = h.signIn(testID(i), alice, 1, "c")
						for n := range 50 * times / devices {
							h.must(xs[i].notify(value("/temperature", n)))
						}
					})
				}
				wait.Wait()
				x := xs[0]
				var cursor hub.Cursor
				var since time.Time
				for n := range 10 {
					if n == 1 {
						var err error
						cursor, err = h.d.FeedHead(b.Context())
						h.must(err)
						since = time.Now()
					}
					h.must(x.notify(value("/temperature", -n)))
				}
				head, err := h.d.FeedHead(b.Context())
				h.must(err)
				measure := func(what string, do func(i int)) {
					b.Run(what, func(b *testing.B) {
						b.ReportAllocs()
						cpu := cpuTime(b)
						for i := 0; b.Loop(); i++ {
							do(i)
						}
						b.ReportMetric(float64(cpuTime(b)-cpu)/float64(b.N), "cpu-ns/op")
					})
				}
				nine := func(n int) {
					if n != 9 {
						b.Fatalf("%d commits, want 9", n)
					}
				}
				measure("read=events", func(int) {
					n := 0
					for _, err := range h.d.History(b.Context(), alice, testID(0), since) {
						h.must(err)
						n++
					}
					nine(n)
				})
				measure("read=feed", func(int) {
					n := 0
					for _, err := range h.d.Feed(b.Context(), alice, cursor, head.After) {
						h.must(err)
						n++
					}
					nine(n)
				})
				measure("read=twin", func(int) { h.device(alice, testID(0)) })
				measure("read=cold-twin", func(int) {
					_, err := h.d.codec.load(b.Context(), h.st, testID(0))
					h.must(err)
				})
				measure("notify", func(i int) { h.must(xs[i%devices].notify(value("/temperature", fmt.Sprint("measured ", i)))) })
			})
		}
	}
}

// cpuTime is what the process has taken of all processors.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkDevice reads the picture of a device in memory.
func BenchmarkDevice(b *testing.B) {
	h := open(b)
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.d.Device(b.Context(), alice, lamp); err != nil {
			b.Fatal(err)
		}
	}
}
