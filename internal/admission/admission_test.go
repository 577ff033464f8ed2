package admission

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(10, 5)
		var b Bucket
		takes := func(n int) (taken int) {
			for range n {
				if r.Take(&b, 1) == 0 {
					taken++
				}
			}
			return taken
		}
		if n := takes(20); n != 5 {
			t.Errorf("a full bucket gives %d, want its burst of 5", n)
		}
		if wait := r.Take(&b, 2); wait != 200*time.Millisecond {
			t.Errorf("two are there in %v, want 200ms", wait)
		}
		time.Sleep(200 * time.Millisecond)
		if left := r.Left(&b, 100); left != 2 || takes(20) != 2 {
			t.Errorf("after 200 ms %d are there, want 2", left)
		}
		time.Sleep(time.Hour)
		if left := r.Left(&b, 3); left != 3 || takes(20) != 5 {
			t.Errorf("after an hour %d of 3 are there; it gives more or less than a burst", left)
		}
		r.Return(&b, 3)
		if n := takes(20); n != 3 {
			t.Errorf("3 were given back, it gives %d", n)
		}
	})
}

// Whoever takes more than there is has to wait for longer, and not for ever.
func TestDebtIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(10, 5)
		var b Bucket
		r.Owe(&b, 6)
		if wait := r.Take(&b, 1); wait != 200*time.Millisecond {
			t.Errorf("with one owed the next is there in %v, want 200ms", wait)
		}
		r.Owe(&b, 1000)
		if wait := r.Take(&b, 1); wait != MaxDebt+100*time.Millisecond {
			t.Errorf("with a thousand owed the next is there in %v, want %v", wait, MaxDebt+100*time.Millisecond)
		}
	})
}

func TestNoRate(t *testing.T) {
	for _, r := range []Rate{{}, NewRate(0, 0), NewRate(0, 7)} {
		var b Bucket
		r.Owe(&b, 1000)
		if r.Take(&b, 1_000_000) != 0 || r.Left(&b, 7) != 7 {
			t.Errorf("%+v is a limit", r)
		}
	}
}

// Many who take at the same time get no more than one who does.
func TestRateIsShared(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := NewRate(1, 1000)
		var b Bucket
		var taken atomic.Int64
		var all sync.WaitGroup
		for range 8 {
			all.Go(func() {
				for range 1000 {
					if r.Take(&b, 1) == 0 {
						taken.Add(1)
					}
				}
			})
		}
		all.Wait()
		if taken.Load() != 1000 {
			t.Errorf("%d were taken of 1000", taken.Load())
		}
	})
}

func TestQueueKeepsTheOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(1, 10, time.Minute)
		first, _ := q.Enter(t.Context())
		gone, leave := context.WithCancel(t.Context())
		var mu sync.Mutex
		var in []int
		var all sync.WaitGroup
		for i := range 5 {
			ctx := t.Context()
			if i == 2 {
				ctx = gone
			}
			all.Go(func() {
				p, again := q.Enter(ctx)
				if again > 0 {
					return
				}
				mu.Lock()
				in = append(in, i)
				mu.Unlock()
				p.Leave()
			})
			synctest.Wait()
		}
		if busy, waiting := q.State(); busy != 1 || waiting != 5 {
			t.Errorf("%d have a place and %d wait, want 1 and 5", busy, waiting)
		}
		leave()
		synctest.Wait()
		if _, waiting := q.State(); waiting != 4 {
			t.Errorf("%d wait when one has gone, want 4", waiting)
		}
		first.Leave()
		all.Wait()
		if want := []int{0, 1, 3, 4}; !slices.Equal(in, want) {
			t.Errorf("they came in as %v, want %v", in, want)
		}
		if busy, waiting := q.State(); busy != 0 || waiting != 0 {
			t.Errorf("%d have a place and %d wait, and all have left", busy, waiting)
		}
	})
}

func TestQueueIsBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := NewQueue(1, 1, 3*time.Second)
		place, _ := q.Enter(t.Context())
		begin := time.Now()
		waited := make(chan time.Duration)
		go func() {
			_, again := q.Enter(t.Context())
			if again == 0 {
				t.Error("there was a place")
			}
			waited <- time.Since(begin)
		}()
		synctest.Wait()
		if _, again := q.Enter(t.Context()); again < time.Second || time.Since(begin) != 0 {
			t.Errorf("without room it may come again in %v, told after %v", again, time.Since(begin))
		}
		if d := <-waited; d != 3*time.Second {
			t.Errorf("whoever waits is told after %v, want 3s", d)
		}
		time.Sleep(time.Hour)
		place.Leave() // which took so long that nobody is let wait for the like
		place, again := q.Enter(t.Context())
		if again != 0 {
			t.Fatalf("the only place is free, and one may come again in %v", again)
		}
		if _, again := q.Enter(t.Context()); again < time.Second || again > maxAgain+time.Second {
			t.Errorf("it may come again in %v", again)
		}
		place.Leave()
	})
}

// Devices that come all at once are in after the time that serving them takes, whether they wait or come again; no more wait
// than may, and nobody is sent away over and over: at its time there is room, as far as the queue knew how long serving takes.
func TestAllAtOnce(t *testing.T) {
	for _, c := range []struct{ devices, room int }{{10_000, 10_000}, {10_000, 500}, {20_000, 2000}} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const places, serving = 64, 80 * time.Millisecond // 800 a second
				q := NewQueue(places, c.room, 10*time.Second)
				begin := time.Now()
				var often, late atomic.Int64
				var all sync.WaitGroup
				for range c.devices {
					all.Go(func() {
						promised := time.Now()
						for n := 0; ; n++ {
							p, again := q.Enter(t.Context())
							if again == 0 {
								time.Sleep(serving)
								p.Leave()
								break
							}
							if n == 3 {
								often.Add(1)
							}
							promised = time.Now().Add(again)
							time.Sleep(again)
						}
						if time.Since(promised) > 11*time.Second {
							late.Add(1)
						}
					})
				}
				synctest.Wait()
				if busy, waiting := q.State(); busy > places || waiting > c.room {
					t.Errorf("%d have a place, %d wait", busy, waiting)
				}
				all.Wait()
				needed := time.Duration(c.devices) * serving / places
				if took := time.Since(begin); took > needed*13/10+10*time.Second {
					t.Errorf("all are in after %v; serving them takes %v", took, needed)
				}
				if often.Load() > int64(c.devices)/100 || late.Load() > 0 {
					t.Errorf("%d were sent away four times, %d waited for longer than may be", often.Load(), late.Load())
				}
				if busy, waiting := q.State(); busy != 0 || waiting != 0 {
					t.Errorf("%d have a place and %d wait, and all have left", busy, waiting)
				}
			})
		})
	}
}

// What stands before each request and each notification.
func BenchmarkTake(b *testing.B) {
	r := NewRate(1_000_000_000, 1_000_000_000)
	var bucket Bucket
	b.ReportAllocs()
	for b.Loop() {
		r.Take(&bucket, 1)
	}
}

func BenchmarkEnter(b *testing.B) {
	q := NewQueue(4, 4, time.Second)
	b.ReportAllocs()
	for b.Loop() {
		p, _ := q.Enter(b.Context())
		p.Leave()
	}
}

func TestAdmissionAllocatesNothing(t *testing.T) {
	r, q := NewRate(1_000_000_000, 1_000_000_000), NewQueue(4, 4, time.Second)
	var b Bucket
	if n := testing.AllocsPerRun(100, func() {
		r.Take(&b, 1)
		p, _ := q.Enter(t.Context())
		p.Leave()
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
}
