package run_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/internal/run"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// story collects what happened, in order.
type story struct {
	mu    sync.Mutex
	lines []string
}

func (s *story) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, fmt.Sprintf(format, args...))
}

func (s *story) want(t *testing.T, lines ...string) {
	t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !slices.Equal(s.lines, lines) {
		t.Errorf("it went\n  %s\nwant\n  %s", strings.Join(s.lines, "\n  "), strings.Join(lines, "\n  "))
	}
}

// part takes its time to start and to stop.
func part(s *story, name string, up, down time.Duration) run.Part {
	return run.Part{Name: name, Run: func(ctx context.Context, ready func()) error {
		s.say("%s starts", name)
		time.Sleep(up) // a bubble's clock
		ready()
		ready() // once more does nothing
		<-ctx.Done()
		time.Sleep(down)
		s.say("%s stopped", name)
		return ctx.Err()
	}}
}

func options(s *story) run.Options {
	return run.Options{Started: func() { s.say("all started") }, Log: slog.New(slog.DiscardHandler)}
}

func TestStartsInOrderAndStopsInReverse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &story{}
		ctx, end := context.WithTimeout(t.Context(), time.Minute)
		defer end()
		err := run.Run(ctx, options(s), part(s, "a", time.Second, time.Second), part(s, "b", 2*time.Second, 0), part(s, "c", 0, time.Second))
		if err != nil {
			t.Errorf("err = %v, want nil", err)
		}
		s.want(t, "a starts", "b starts", "c starts", "all started", "c stopped", "b stopped", "a stopped")
	})
}

// Whoever asks whether the process serves must hear no before the first part stops, whatever ended it.
func TestStoppingIsSaidBeforeAnyPartStops(t *testing.T) {
	stopping := func(s *story) run.Options {
		o := options(s)
		o.Stopping = func() { s.say("stopping") }
		return o
	}
	t.Run("told", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := &story{}
			ctx, end := context.WithTimeout(t.Context(), time.Minute)
			defer end()
			if err := run.Run(ctx, stopping(s), part(s, "a", 0, time.Second), part(s, "b", 0, time.Second)); err != nil {
				t.Errorf("err = %v, want nil", err)
			}
			s.want(t, "a starts", "b starts", "all started", "stopping", "b stopped", "a stopped")
		})
	})
	t.Run("a part did not start", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			s := &story{}
			broken := run.Part{Name: "b", Run: func(context.Context, func()) error { return errors.New("broken") }}
			if err := run.Run(t.Context(), stopping(s), part(s, "a", 0, time.Second), broken); err == nil {
				t.Error("no error")
			}
			s.want(t, "a starts", "stopping", "a stopped")
		})
	})
}

func TestAFailingPartEndsTheWhole(t *testing.T) {
	broken := errors.New("broken")
	for _, c := range []struct {
		name string
		part func(ctx context.Context, ready func()) error
		want string
	}{
		{"before it is ready", func(context.Context, func()) error { return broken }, "b: broken"},
		{"later", func(_ context.Context, ready func()) error { ready(); time.Sleep(time.Minute); return broken }, "b: broken"},
		{"by ending early", func(_ context.Context, ready func()) error { ready(); return nil }, "b: ended without being asked to"},
		{"by a panic", func(context.Context, func()) error { panic("oh") }, "b: panic: oh"},
		{"while stopping", func(ctx context.Context, ready func()) error { ready(); <-ctx.Done(); return broken }, "b: broken"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := &story{}
				ctx, end := context.WithTimeout(t.Context(), time.Hour)
				defer end()
				err := run.Run(ctx, options(s), part(s, "a", 0, 0), run.Part{Name: "b", Run: c.part})
				if err == nil || !strings.HasPrefix(err.Error(), c.want) {
					t.Errorf("err = %v, want %q", err, c.want)
				}
				if last := s.lines[len(s.lines)-1]; last != "a stopped" {
					t.Errorf("the last thing to happen was %q, want a's orderly stop", last)
				}
			})
		})
	}
}

func TestNothingStartsAfterAFailure(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &story{}
		fails := run.Part{Name: "b", Run: func(context.Context, func()) error { return errors.New("taken") }}
		if err := run.Run(t.Context(), options(s), part(s, "a", 0, 0), fails, part(s, "c", 0, 0)); err == nil {
			t.Error("no error")
		}
		s.want(t, "a starts", "a stopped")
	})
}

func TestCancelledWhileStarting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &story{}
		ctx, end := context.WithTimeout(t.Context(), time.Second)
		defer end()
		never := run.Part{Name: "b", Run: func(ctx context.Context, _ func()) error { <-ctx.Done(); return nil }}
		if err := run.Run(ctx, options(s), part(s, "a", 0, 0), never, part(s, "c", 0, 0)); err != nil {
			t.Errorf("err = %v, want nil", err)
		}
		s.want(t, "a starts", "a stopped")
	})
}

func TestStoppingTakesFiveSecondsAtMost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &story{}
		ctx, end := context.WithCancel(t.Context())
		go func() { time.Sleep(time.Second); end() }()
		err := run.Run(ctx, options(s), part(s, "a", 0, 0), part(s, "hangs", 0, time.Hour), part(s, "slow", 0, 3*time.Second), part(s, "d", 0, 0))
		if err == nil || !strings.Contains(err.Error(), "did not stop: hangs") {
			t.Errorf("err = %v, want it to name the part that hangs and no other", err)
		}
		if took := time.Since(start(t)); took > 6*time.Second {
			t.Errorf("took %s", took)
		}
		// a is told to stop in any case, although the part above it hangs.
		s.want(t, "a starts", "hangs starts", "slow starts", "d starts", "all started", "d stopped", "slow stopped", "a stopped")
		time.Sleep(2 * time.Hour) // the part that hangs ends before the bubble does
	})
}

// start is the bubble's beginning.
func start(t *testing.T) time.Time {
	t.Helper()
	return time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
}
