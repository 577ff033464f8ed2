// Package clock tells a clock that was set forward from time that passed. What is stored with a moment at which it ends asks
// here whether that moment came or was leapt over; it must not know what it is that ends.
package clock

import (
	"sync"
	"time"
)

const (
	// Leap is how far the clock may run ahead of the time that has passed. Beyond it somebody set it, rightly or not: a machine
	// without a clock of its own that NTP put right, or a slip of a hand. A machine that slept looks the same.
	Leap = 10 * time.Minute
	// Mistrust is how long a leap is doubted: long enough to notice that the clock is wrong and to set it right.
	Mistrust = time.Hour
	// maxLeaps bounds what is remembered; the oldest is forgotten first, and what it leapt over has ended then.
	maxLeaps = 16
)

// Watch compares the clock with the time that passes. It looks at each question, so it has to be asked now and then; what it
// does not see is a leap before New. Any goroutine may use it.
type Watch struct {
	read func() (wall time.Time, up time.Duration)

	mu    sync.Mutex // guards all below
	wall  time.Time  // the last reading: what the clock said, and when that was on monotonic time
	up    time.Duration
	leaps []leap // in the order of the clock and apart from each other; none reaches beyond wall
}

// leap is a stretch of the clock in which no time passed.
type leap struct {
	from, to time.Time
	at       time.Duration // when it was seen, on monotonic time
}

// New watches the system's clock.
func New() *Watch {
	start := time.Now()
	return With(func() (time.Time, time.Duration) {
		now := time.Now()
		return now, now.Sub(start) // both are monotonic
	})
}

// With watches the clock that read returns: what it says, and how long it has been running on monotonic time.
func With(read func() (wall time.Time, up time.Duration)) *Watch {
	w := &Watch{read: read}
	wall, up := read()
	w.wall, w.up = wall.Round(0), up
	return w
}

// Now is what the clock says, without monotonic time.
func (w *Watch) Now() time.Time {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	return w.wall
}

// Ended reports whether the moment has come. One that was leapt over comes as much time later as it was away then.
func (w *Watch) Ended(moment time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	end, _ := w.end(moment)
	return !w.wall.Before(end)
}

// Doubtful reports whether the moment was leapt over less than Mistrust ago, and has not Ended.
func (w *Watch) Doubtful(moment time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.look()
	end, by := w.end(moment)
	return by != nil && w.wall.Before(end) && w.up-by.at < Mistrust
}

// end moves a moment that was leapt over to where it comes by the time that passes, and returns the last leap that did.
func (w *Watch) end(moment time.Time) (time.Time, *leap) {
	var by *leap
	for i := range w.leaps {
		if l := &w.leaps[i]; !moment.Before(l.from) && moment.Before(l.to) {
			moment, by = moment.Add(l.to.Sub(l.from)), l
		}
	}
	return moment, by
}

// look takes a reading.
func (w *Watch) look() {
	wall, up := w.read()
	wall = wall.Round(0) // Sub must not use the monotonic time in it
	undisturbed := w.wall.Add(up - w.up)
	w.wall, w.up = wall, up
	if wall.Sub(undisturbed) > Leap {
		if len(w.leaps) == maxLeaps {
			w.leaps = append(w.leaps[:0], w.leaps[1:]...)
		}
		w.leaps = append(w.leaps, leap{from: undisturbed, to: wall, at: up})
		return
	}
	// Set back: as far as that goes, the leap was undone, and time will pass where it was. To keep it would lengthen by a whole
	// leap what ends there.
	for n := len(w.leaps); n > 0 && w.leaps[n-1].to.After(wall); n-- {
		if w.leaps[n-1].from.Before(wall) {
			w.leaps[n-1].to = wall
			break
		}
		w.leaps = w.leaps[:n-1]
	}
}
