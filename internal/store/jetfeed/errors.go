package jetfeed

import (
	"context"
	"errors"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/coaphub/coaphub/hub"
)

var (
	errClosed  = hub.NewError(hub.Unavailable, "store-closed", "the hub is stopping")
	errAway    = hub.NewError(hub.Unavailable, "feed-away", "the feed's servers cannot be reached, try again later")
	errSilent  = hub.NewError(hub.Unavailable, "feed-silent", "the feed's servers did not answer in time")
	errRefused = hub.NewError(hub.Unavailable, "feed-refused", "the feed's servers refuse what the hub asks of them, try again later")
)

// failure is what a call that did not succeed ends with; err is the last trouble it had.
func (f *Feed) failure(op string, err error) error {
	var he *hub.Error
	var api *jetstream.APIError
	var unfit unfitError
	op = "jetfeed." + op
	switch {
	case errors.As(err, &he):
		return err
	case f.life.Err() != nil:
		return errClosed.With(op, err)
	case !f.connected.Load(), errors.Is(err, nats.ErrReconnectBufExceeded):
		return errAway.With(op, err)
	case errors.As(err, &api), errors.As(err, &unfit), errors.Is(err, nats.ErrNoResponders): // nobody does what was asked: JetStream is off, or the stream has no leader
		return errRefused.With(op, err)
	}
	return errSilent.With(op, err)
}

// pause is how long to wait before the n-th repetition: longer each time, and never in step with others.
func pause(n int) time.Duration {
	d := min(20*time.Millisecond<<min(n, 10), time.Second)
	return d/2 + rand.N(d/2)
}

func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// again runs an operation, each time for one attempt's time at most, until it succeeds, fails with an error that has a kind, or ctx
// ends.
func again[T any](ctx context.Context, f *Feed, op string, run func(context.Context) (T, error)) (T, error) {
	var last error
	for n := 0; ; n++ {
		v, err := once(ctx, f, run)
		if err == nil {
			return v, nil
		}
		if ctx.Err() == nil || last == nil {
			last = err // the one that the context's end made says less
		}
		if he := (*hub.Error)(nil); errors.As(err, &he) || wait(ctx, pause(n)) != nil {
			return v, f.failure(op, last)
		}
	}
}

// once runs one attempt. A connection whose other side takes nothing holds up whoever writes to it, for as long as bus.Dial says:
// the caller does not wait for that.
func once[T any](ctx context.Context, f *Feed, run func(context.Context) (T, error)) (T, error) {
	type outcome struct {
		v   T
		err error
	}
	ctx, cancel := context.WithTimeout(ctx, f.times.attempt)
	done := make(chan outcome, 1)
	f.attempts.Go(func() {
		defer cancel()
		v, err := run(ctx)
		done <- outcome{v, err}
	})
	select {
	case o := <-done:
		return o.v, o.err
	case <-ctx.Done():
		select {
		case o := <-done:
			return o.v, o.err
		default:
			var none T
			return none, ctx.Err()
		}
	}
}
