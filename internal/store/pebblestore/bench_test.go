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
