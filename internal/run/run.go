// Package run starts the parts of a process in order, waits for their end, and stops them in reverse.
//
// It must not know what a part does: a part is a name and a function.
package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

// Part is a piece of the process with a life of its own.
type Part struct {
	Name string
	// Run calls ready once it can serve (later calls do nothing), blocks until ctx ends, and leaves nothing behind. An error
	// at any time ends the whole process in order; so does a return before ctx ended.
	Run func(ctx context.Context, ready func()) error
}

// Options of a run.
type Options struct {
	// Grace is how long stopping may take in all; zero means 5 s. When four fifths of it are gone the parts that still run
	// are told to stop all at once, and what is left at its end is given up and named in the error.
	Grace time.Duration
	// Started is called once, after the last part is ready and unless the context ended before. It must not block; nil is
	// allowed.
	Started func()
	// Stopping is called once, before the first part is told to stop, also when not all were started. It must not block; nil
	// is allowed.
	Stopping func()
	Log      *slog.Logger // never nil
}

// Run starts the parts in order, each after the one before is ready, and stops them in reverse when ctx ends or a part
// fails. It returns the errors of all parts; nil means that the context's end was the only reason and everything stopped in
// time. A panic in a part's own goroutine is such an error.
func Run(ctx context.Context, o Options, parts ...Part) error {
	if o.Grace == 0 {
		o.Grace = 5 * time.Second
	}
	// Whoever fails first ends the whole; the context of the parts is another one, so that they end in their turn only.
	ctx, end := context.WithCancel(ctx)
	defer end()

	var (
		mu   sync.Mutex // guards errs
		errs []error
	)
	fail := func(err error) {
		mu.Lock()
		errs = append(errs, err)
		mu.Unlock()
		end()
	}

	live := make([]running, 0, len(parts))
	for _, p := range parts {
		r := start(context.WithoutCancel(ctx), p, fail)
		live = append(live, r)
		select {
		case <-r.ready:
			o.Log.Debug("part is ready", "part", p.Name)
		case <-ctx.Done():
		}
		if ctx.Err() != nil {
			break
		}
	}
	if ctx.Err() == nil && o.Started != nil {
		o.Started()
	}
	<-ctx.Done()

	if o.Stopping != nil {
		o.Stopping()
	}
	if err := stop(live, o); err != nil {
		mu.Lock()
		errs = append(errs, err)
		mu.Unlock()
	}
	mu.Lock()
	defer mu.Unlock()
	return errors.Join(errs...)
}

// running is a part that was started.
type running struct {
	name  string
	ready <-chan struct{}
	done  <-chan struct{}
	stop  context.CancelFunc
}

func start(ctx context.Context, p Part, fail func(error)) running {
	own, stop := context.WithCancel(ctx)
	ready, done := make(chan struct{}), make(chan struct{})
	go func() { // ends with the part; stop waits for done
		defer close(done)
		err := guard(own, p, sync.OnceFunc(func() { close(ready) }))
		switch {
		case err != nil && own.Err() != nil && errors.Is(err, context.Canceled):
			// The end it was told to come to, reported as an error: not worth a line.
		case err != nil:
			fail(fmt.Errorf("%s: %w", p.Name, err))
		case own.Err() == nil:
			// A part that is simply gone would leave a hub that looks alive and serves half of what it promises.
			fail(fmt.Errorf("%s: ended without being asked to", p.Name))
		}
	}()
	return running{p.Name, ready, done, stop}
}

func guard(ctx context.Context, p Part, ready func()) (err error) {
	defer func() {
		if v := recover(); v != nil {
			err = fmt.Errorf("panic: %v\n%s", v, debug.Stack())
		}
	}()
	return p.Run(ctx, ready)
}

// stop ends the parts, last started first.
func stop(parts []running, o Options) error {
	begun := time.Now()
	orderly := time.NewTimer(o.Grace * 4 / 5)
	defer orderly.Stop()
	last := time.NewTimer(o.Grace)
	defer last.Stop()

	hurry := false
	var left []string
	for i := len(parts) - 1; i >= 0; i-- {
		p := parts[i]
		p.stop()
		if !hurry {
			select {
			case <-p.done:
				continue
			case <-orderly.C:
				hurry = true
				o.Log.Warn("stopping takes long, stopping everything at once", "part", p.name)
				for _, q := range parts[:i] {
					q.stop()
				}
			}
		}
		select {
		case <-p.done:
		case <-last.C:
			for _, q := range parts[:i+1] {
				select {
				case <-q.done:
				default:
					left = append(left, q.name)
				}
			}
			return fmt.Errorf("gave up after %s on parts that did not stop: %s", o.Grace, strings.Join(left, ", "))
		}
	}
	o.Log.Debug("all parts stopped", "took", time.Since(begun))
	return nil
}
