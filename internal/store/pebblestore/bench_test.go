package pebblestore_test

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// BenchmarkAppend appends commits of one event with the resource's document, each appender to devices of its own, on the
// real disk.
func BenchmarkAppend(b *testing.B) {
	for _, appenders := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("underway=%d", appenders), func(b *testing.B) {
			s := open(b, nil, b.TempDir())
			defer closeStore(b, s)
			var todo atomic.Int64
			todo.Store(int64(b.N))
			var wg sync.WaitGroup
			b.ReportAllocs()
			b.ResetTimer()
			for a := range appenders {
				wg.Go(func() {
					dev := hub.DeviceID(fmt.Sprintf("00000000-0000-4000-8000-%012x", a+1))
					doc := make([]byte, 200)
					for seq := uint64(1); todo.Add(-1) >= 0; seq++ {
						e := store.Entry{Commit: storetest.Commit(dev, seq), Docs: []store.StateDoc{{Key: "r/light/1", Value: doc}}}
						if errs := s.Append(context.Background(), []store.Entry{e}); errs[0] != nil {
							b.Error(errs[0])
							return
						}
					}
				})
			}
			wg.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

// BenchmarkAppendBatch appends so many commits of different devices in one call, on the real disk; the figures are of one
// commit.
func BenchmarkAppendBatch(b *testing.B) {
	for _, size := range []int{1, 64, 256} {
		b.Run(fmt.Sprintf("commits=%d", size), func(b *testing.B) {
			s := open(b, nil, b.TempDir())
			defer closeStore(b, s)
			doc := make([]byte, 200)
			entries := make([]store.Entry, size)
			seq := uint64(0)
			b.ReportAllocs()
			for left := b.N; left > 0; left -= size {
				seq++
				entries = entries[:min(size, left)]
				for i := range entries {
					dev := hub.DeviceID(fmt.Sprintf("00000000-0000-4000-8000-%012x", i+1))
					entries[i] = store.Entry{Commit: storetest.Commit(dev, seq), Docs: []store.StateDoc{{Key: "r/light/1", Value: doc}}}
				}
				for _, err := range s.Append(b.Context(), entries) {
					if err != nil {
						b.Fatal(err)
					}
				}
			}
		})
	}
}

// BenchmarkReadFeed reads the feed in pages of 64, as a reader does who is behind, and as one at its head; the figures are of one
// commit.
func BenchmarkReadFeed(b *testing.B) {
	const commits, page = 4096, 64
	for _, c := range []struct {
		name   string
		newest bool
	}{{"disk", false}, {"newest", true}} {
		b.Run(c.name, func(b *testing.B) {
			s := open(b, nil, b.TempDir())
			defer closeStore(b, s)
			if !c.newest {
				s.Forget()
			}
			entries := make([]store.Entry, commits)
			for i := range entries {
				entries[i].Commit = storetest.Commit(storetest.Device(1), uint64(i+1))
			}
			for _, err := range s.Append(b.Context(), entries) {
				if err != nil {
					b.Fatal(err)
				}
			}
			var from hub.Position
			if c.newest {
				head, err := s.Head(b.Context())
				if err != nil {
					b.Fatal(err)
				}
				from = hub.Position{Day: head.Day, N: head.N - page}
			}
			at := from
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; n < b.N; {
				got, next, lagged, err := s.ReadFeed(b.Context(), at, min(page, b.N-n))
				if err != nil || lagged {
					b.Fatal(lagged, err)
				}
				n += len(got)
				if at = next; len(got) == 0 {
					at = from
				}
			}
		})
	}
}
