package resourcedirectory

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coaphub/coaphub/hub"
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
