package coap

import (
	"sync"

	"github.com/prometheus/client_golang/prometheus"
)

// budget bounds bytes that all connections of a server keep together.
type budget struct {
	mu    sync.Mutex
	left  int64
	freed chan struct{} // closed and replaced when bytes come back and somebody waits; nil when nobody does
	gauge prometheus.Gauge
}

// take takes n bytes if there are as many.
func (b *budget) take(n int) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.left < int64(n) {
		return false
	}
	b.left -= int64(n)
	b.gauge.Add(float64(n))
	return true
}

// give returns n bytes.
func (b *budget) give(n int) {
	if n == 0 {
		return
	}
	b.mu.Lock()
	b.left += int64(n)
	b.gauge.Sub(float64(n))
	if b.freed != nil {
		close(b.freed)
		b.freed = nil
	}
	b.mu.Unlock()
}

// wait returns a channel that is closed when bytes come back; ask for it before the take that decides whether to wait.
func (b *budget) wait() <-chan struct{} {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.freed == nil {
		b.freed = make(chan struct{})
	}
	return b.freed
}

// share is what one owner has taken of a budget.
type share struct {
	of *budget
	n  int
}

func (s *share) take(n int) bool {
	if !s.of.take(n) {
		return false
	}
	s.n += n
	return true
}

// drop gives back all of it.
func (s *share) drop() {
	s.of.give(s.n)
	s.n = 0
}
