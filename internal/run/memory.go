package run

import (
	"context"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	lookEvery  = 5 * time.Second
	quietShare = 32      // it is quiet when less than this part of what lives was allocated since the last look,
	quietBytes = 1 << 20 // or less than this
	worthShare = 8       // a collection is worth it when this part of what lives was allocated since the last one of ours,
	worthBytes = 4 << 20 // and at least this
	// pace is how many bytes of what lives are one second between two collections of ours: they take about a millisecond for
	// each megabyte, and shall not take a hundredth of a processor.
	pace = 8 << 20
)

// GiveBackMemory returns memory to the system when the process becomes quiet, until ctx ends. Go keeps about as much as lives
// for the time up to the next collection, and a process that allocates little does not get there. Most hubs are quiet most of
// the time, and their idle devices are what they keep.
func GiveBackMemory(ctx context.Context) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	var s spare
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-look.C:
			metrics.Read(samples)
			if s.due(now, samples[0].Value.Uint64(), samples[1].Value.Uint64()) {
				debug.FreeOSMemory()
			}
		}
	}
}

// spare decides when memory is given back. The zero value has never done it.
type spare struct {
	last, given uint64 // allocated at the last look, and when it was given back last
	at          time.Time
}

// due takes how many bytes have been allocated since the start, and how many live.
func (s *spare) due(now time.Time, allocated, live uint64) bool {
	since := allocated - s.last
	s.last = allocated
	switch {
	case since > max(live/quietShare, quietBytes):
		return false
	case allocated-s.given < max(live/worthShare, worthBytes):
		return false
	case now.Sub(s.at) < time.Duration(live/pace)*time.Second: //nolint:gosec // no process has so much
		return false
	}
	s.given, s.at = allocated, now
	return true
}
