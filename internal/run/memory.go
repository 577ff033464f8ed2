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
)

// GiveBackMemory returns memory to the system when the process becomes quiet, until ctx ends. Go keeps about as much as lives
// for the time up to the next collection, and a process that allocates little does not get there. Most hubs are quiet most of
// the time, and their idle devices are what they keep. Under load it does nothing.
func GiveBackMemory(ctx context.Context) {
	look := time.NewTicker(lookEvery)
	defer look.Stop()
	samples := []metrics.Sample{{Name: "/gc/heap/allocs:bytes"}, {Name: "/gc/heap/live:bytes"}}
	var s spare
	for {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
		}
		metrics.Read(samples)
		if s.due(samples[0].Value.Uint64(), samples[1].Value.Uint64()) {
			debug.FreeOSMemory()
		}
	}
}

// spare decides when memory is given back. The zero value has never done it.
type spare struct{ last, given uint64 }

// due takes how many bytes have been allocated since the start, and how many live.
func (s *spare) due(allocated, live uint64) bool {
	since := allocated - s.last
	s.last = allocated
	if since > max(live/quietShare, quietBytes) || allocated-s.given < max(live/worthShare, worthBytes) {
		return false
	}
	s.given = allocated
	return true
}
