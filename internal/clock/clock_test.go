package clock

import (
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"
)

var epoch = time.Date(2020, 1, 1, 0, 0, 0, 0, time.UTC)

// hand is a clock that tests set.
type hand struct {
	wall time.Time
	up   time.Duration
}

func (h *hand) read() (time.Time, time.Duration) { return h.wall, h.up }
func (h *hand) pass(d time.Duration)             { h.wall, h.up = h.wall.Add(d), h.up+d }
func (h *hand) set(d time.Duration)              { h.wall = h.wall.Add(d) }

const (
	day  = 24 * time.Hour
	year = 365 * day
)

func TestEnded(t *testing.T) {
	for name, tc := range map[string]struct {
		do              func(w *Watch, h *hand)
		ended, doubtful bool // of what ends two hours after the start
	}{
		"nothing happened":            {func(*Watch, *hand) {}, false, false},
		"time passed":                 {func(_ *Watch, h *hand) { h.pass(2 * time.Hour) }, true, false},
		"a year passed":               {func(_ *Watch, h *hand) { h.pass(year) }, true, false},
		"set forward":                 {func(_ *Watch, h *hand) { h.set(year) }, false, true},
		"set forward, an hour passed": {func(w *Watch, h *hand) { h.set(year); w.Now(); h.pass(time.Hour) }, false, false},
		"set forward, it has come":    {func(w *Watch, h *hand) { h.set(year); w.Now(); h.pass(2 * time.Hour) }, true, false},
		"set forward by less than the rest": {
			func(w *Watch, h *hand) { h.set(time.Hour); w.Now(); h.pass(59 * time.Minute) }, false, false,
		},
		"set forward by little": {func(_ *Watch, h *hand) { h.pass(2*time.Hour - Leap); h.set(Leap) }, true, false},
		"come before it was set": {
			func(w *Watch, h *hand) { h.pass(2 * time.Hour); w.Now(); h.set(year) }, true, false,
		},
		"set forward twice":             {func(w *Watch, h *hand) { h.set(year); w.Now(); h.set(year) }, false, true},
		"set forward, and right again":  {func(w *Watch, h *hand) { h.set(year); w.Now(); h.set(-year) }, false, false},
		"set forward, right, come":      {func(w *Watch, h *hand) { h.set(year); w.Now(); h.set(-year); h.pass(2 * time.Hour) }, true, false},
		"set forward, back to after it": {func(w *Watch, h *hand) { h.set(year); w.Now(); h.set(-year + day) }, false, true},
		"set back":                      {func(_ *Watch, h *hand) { h.set(-year) }, false, false},
		"set back, and right again":     {func(w *Watch, h *hand) { h.set(-year); w.Now(); h.set(year) }, false, false},
		"set forward over and over": {func(w *Watch, h *hand) {
			for range 3 * maxLeaps {
				h.set(day)
				w.Now()
			}
		}, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			h := &hand{wall: epoch}
			w := With(h.read)
			end := epoch.Add(2 * time.Hour)
			tc.do(w, h)
			if got := w.Ended(end); got != tc.ended {
				t.Errorf("ended: %v, want %v", got, tc.ended)
			}
			if got := w.Doubtful(end); got != tc.doubtful {
				t.Errorf("doubtful: %v, want %v", got, tc.doubtful)
			}
			if len(w.leaps) > maxLeaps {
				t.Errorf("%d leaps are remembered", len(w.leaps))
			}
		})
	}
}

// Whatever is done to the clock: what ends by both the clock and the time that passed has ended, what ends by neither has not,
// and leaps stay in order, apart, and not ahead of the clock.
func TestAnyClock(t *testing.T) {
	for seed := range uint64(500) {
		r := rand.New(rand.NewPCG(seed, 0))
		h := &hand{wall: epoch}
		w := With(h.read)
		for range 40 {
			life := time.Duration(r.Int64N(int64(4 * day)))
			end, upEnd, passed := h.wall.Add(life), h.up+life, h.wall
			forwardOnly := true
			for range r.IntN(5) {
				switch r.IntN(3) {
				case 0:
					h.pass(time.Duration(r.Int64N(int64(2 * day))))
				case 1:
					h.set(time.Duration(r.Int64N(int64(4 * day))))
				case 2:
					h.set(-time.Duration(r.Int64N(int64(2 * day))))
					forwardOnly = false
				}
				w.Now()
			}
			ended := w.Ended(end)
			if forwardOnly && h.up >= upEnd && !ended {
				t.Fatalf("seed %d: made at %v to end at %v, which has come at %v", seed, passed, end, h.wall)
			}
			if h.wall.Before(end) && ended {
				t.Fatalf("seed %d: made at %v, ended at %v before %v", seed, passed, h.wall, end)
			}
			for i, l := range w.leaps {
				if !l.from.Before(l.to) || l.to.After(h.wall) || i > 0 && l.from.Before(w.leaps[i-1].to) {
					t.Fatalf("seed %d: leaps %v at %v", seed, w.leaps, h.wall)
				}
			}
		}
	}
}

func TestSystemClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w, end := New(), time.Now().Add(time.Hour)
		if w.Ended(end) {
			t.Error("ended at once")
		}
		time.Sleep(time.Hour)
		if !w.Ended(end) || w.Doubtful(end) || !w.Now().Equal(time.Now()) {
			t.Error("an hour that passed is no leap")
		}
	})
}
