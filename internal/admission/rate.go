// Package admission decides what may begin when more is asked for than can be done: rates with a burst, and places with a
// bounded queue before them. It knows neither what is done, nor how a door refuses.
package admission

import (
	"math/rand/v2"
	"sync/atomic"
	"time"
)

// MaxDebt bounds what Rate.Owe adds beyond the burst, so that whoever asked for too much is back at its full rate that long
// after it stopped.
const MaxDebt = 2 * time.Second

// Rate is how often something may happen. The zero Rate is no limit.
type Rate struct {
	each  time.Duration // what one costs; 0: nothing
	burst time.Duration // what a full bucket is worth
	begin time.Time     // buckets count from here, on the monotonic clock
}

// Bucket is what somebody has left of a Rate. The zero Bucket is full.
//
// It is a single word (the generic cell rate algorithm of ATM, ITU-T I.371, Annex A): the time when the bucket will be full
// again, which each taking moves into the future.
type Bucket struct{ full atomic.Int64 }

// NewRate makes a rate of so many a second and a burst of so many more at once, at least one; 0 a second is no limit.
func NewRate(perSecond, burst int) Rate {
	if perSecond <= 0 {
		return Rate{}
	}
	each := max(1, time.Second/time.Duration(perSecond))
	return Rate{each: each, burst: each * time.Duration(max(1, burst)), begin: time.Now()}
}

// Left is how many the bucket has, at most n.
func (r *Rate) Left(b *Bucket, n int) int {
	if r.each == 0 {
		return n
	}
	now := time.Since(r.begin)
	left := r.burst - max(0, time.Duration(b.full.Load())-now)
	return int(min(time.Duration(n), max(0, left/r.each)))
}

// Take takes n, or nothing: then it returns how long it takes until they are there.
func (r *Rate) Take(b *Bucket, n int) (wait time.Duration) {
	if r.each == 0 {
		return 0
	}
	now := time.Since(r.begin)
	for {
		full := b.full.Load()
		next := max(time.Duration(full), now) + time.Duration(n)*r.each
		if over := next - now - r.burst; over > 0 {
			return over
		}
		if b.full.CompareAndSwap(full, int64(next)) {
			return 0
		}
	}
}

// Owe takes n that are not there: the bucket has less than nothing then, but never more than MaxDebt less.
func (r *Rate) Owe(b *Bucket, n int) {
	if r.each == 0 {
		return
	}
	now := time.Since(r.begin)
	for {
		full := b.full.Load()
		next := min(max(time.Duration(full), now)+time.Duration(n)*r.each, now+r.burst+MaxDebt)
		if b.full.CompareAndSwap(full, int64(next)) {
			return
		}
	}
}

// Return gives back n that were taken and not used.
func (r *Rate) Return(b *Bucket, n int) { b.full.Add(-int64(n) * int64(r.each)) }

// Again is when somebody may come again who was refused and has to wait at least so long: not all of them at the same time.
func Again(wait time.Duration) time.Duration { return max(wait, time.Second) + rand.N(4*time.Second) }
