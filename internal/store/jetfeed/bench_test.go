package jetfeed

import (
	"crypto/rand"
	"errors"
	"fmt"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// commits makes small ones, of as many devices, that were never published.
func commits(n int, seq uint64) []hub.Commit {
	out := make([]hub.Commit, n)
	for i := range out {
		out[i] = storetest.Commit(storetest.Device(i), seq)
		_, _ = rand.Read(out[i].ID[:])
	}
	return out
}

// BenchmarkPublish publishes batches of small commits of as many devices, one batch after the other, and from 64 callers at once.
func BenchmarkPublish(b *testing.B) {
	for _, size := range []int{1, 64, 1024} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			f := openFeed(b, options(startNode(b).url()), nil)
			b.ReportAllocs()
			for seq := uint64(1); b.Loop(); seq++ {
				if err := errors.Join(f.Publish(b.Context(), commits(size, seq))...); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(b.N*size)/b.Elapsed().Seconds(), "commits/s")
		})
	}
	b.Run("batch=1,callers=64", func(b *testing.B) {
		f := openFeed(b, options(startNode(b).url()), nil)
		b.SetParallelism(32) // of two processors
		b.ReportAllocs()
		b.RunParallel(func(pb *testing.PB) {
			for seq := uint64(1); pb.Next(); seq++ {
				if err := f.Publish(b.Context(), commits(1, seq))[0]; err != nil {
					b.Error(err)
					return
				}
			}
		})
		b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "commits/s")
	})
}

// BenchmarkRead reads 20 000 small commits: back from the stream, and at its end while they are published.
func BenchmarkRead(b *testing.B) {
	const total, batch = 20_480, 1024
	f := openFeed(b, options(startNode(b).url()), nil)
	fill := func() error {
		for seq := uint64(1); seq <= total/batch; seq++ {
			if err := errors.Join(f.Publish(b.Context(), commits(batch, seq))...); err != nil {
				return err
			}
		}
		return nil
	}
	read := func(b *testing.B, at hub.Position) {
		for n := 0; n < total; {
			if err := f.WaitFeed(b.Context(), at); err != nil {
				b.Fatal(err)
			}
			entries, next, lagged, err := f.ReadFeed(b.Context(), at, 1<<20)
			if err != nil || lagged {
				b.Fatal(lagged, err)
			}
			n, at = n+len(entries), next
		}
	}
	at, err := f.Head(b.Context())
	if err == nil {
		err = fill()
	}
	if err != nil {
		b.Fatal(err)
	}
	b.Run("back", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			read(b, at)
		}
		b.ReportMetric(float64(b.N*total)/b.Elapsed().Seconds(), "commits/s")
	})
	b.Run("live", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			at, err := f.Head(b.Context())
			if err != nil {
				b.Fatal(err)
			}
			done := make(chan error, 1)
			go func() { done <- fill() }()
			read(b, at)
			if err := <-done; err != nil {
				b.Fatal(err)
			}
		}
		b.ReportMetric(float64(b.N*total)/b.Elapsed().Seconds(), "commits/s")
	})
}
