package jetfeed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/coaphub/coaphub/hub"
)

// WaitFeed blocks until there is a commit behind the position, or what is behind it is gone, the context ends, or the feed closes.
// While the servers are away it waits for them. All that wait share one consumer of the stream.
func (f *Feed) WaitFeed(ctx context.Context, after hub.Position) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	beyond := false
	for {
		if f.closing {
			return errClosed.With("jetfeed.WaitFeed", nil)
		}
		n, lagged := f.place(after)
		known := f.seen
		if f.ring.on {
			known = f.ring.end // readers find it there
		}
		if lagged || n < known {
			return nil
		}
		if n > f.seen && !beyond {
			beyond = true // it is asked once whether the stream reaches so far
			f.mu.Unlock()
			head, err := f.Head(ctx)
			f.mu.Lock()
			if err == nil && head.N < n {
				return nil // ReadFeed says that it lags
			}
			continue
		}
		if f.ring.moved == nil {
			f.ring.moved = make(chan struct{})
		}
		moved := f.ring.moved
		f.demand(1)
		f.mu.Unlock()
		var err error
		select {
		case <-moved:
		case <-f.life.Done():
		case <-ctx.Done():
			err = fmt.Errorf("wait for the feed: %w", ctx.Err())
		}
		f.mu.Lock()
		f.demand(-1)
		if err != nil {
			return err
		}
	}
}

// demand counts who waits. The stream is followed from the first one on, until nobody has waited for a while. mu is held.
func (f *Feed) demand(n int) {
	r := &f.ring
	r.waiting += n
	switch {
	case r.waiting == 0 && !f.closing:
		r.idle = time.AfterFunc(f.times.idle, func() {
			f.mu.Lock()
			defer f.mu.Unlock()
			if r.waiting == 0 && r.rest != nil {
				r.rest()
			}
		})
	case n > 0 && r.waiting == 1:
		if r.idle != nil {
			r.idle.Stop()
			r.idle = nil
		}
		select {
		case f.wake <- struct{}{}:
		default: // it is told already
		}
	}
}

// follow follows the stream while somebody waits for it.
func (f *Feed) follow() {
	for {
		select {
		case <-f.wake:
		case <-f.life.Done():
			return
		}
		ctx, cancel := context.WithCancel(f.life)
		f.mu.Lock()
		if f.ring.waiting == 0 { // they are gone again, or this was told while the stream was followed
			cancel()
		} else {
			f.ring.rest = cancel
		}
		f.mu.Unlock()
		for n := 0; ctx.Err() == nil; n++ {
			ran, err := f.live(ctx)
			if ctx.Err() != nil {
				break
			}
			if ran {
				n = 0
			}
			level := slog.LevelDebug
			if n == 0 {
				level = slog.LevelWarn // once for an outage
			}
			f.log.Log(ctx, level, "the feed is not followed; it is tried again", "stream", f.name, "error", err)
			_ = wait(ctx, pause(n))
		}
		f.mu.Lock()
		f.ring.rest = nil
		if f.ring.waiting > 0 { // who came while it ended
			select {
			case f.wake <- struct{}{}:
			default:
			}
		}
		f.mu.Unlock()
		cancel()
	}
}

var errMissing = errors.New("a message did not arrive")

// live puts what is added to the stream into the ring, and ends with the first trouble. ran: it came as far as following.
func (f *Feed) live(ctx context.Context) (ran bool, err error) {
	ctx, stop := f.whileConnected(ctx)
	defer stop()
	st, err := once(ctx, f, f.look)
	if err != nil {
		return false, err
	}
	cons, err := once(ctx, f, func(ctx context.Context) (jetstream.Consumer, error) {
		return f.js.CreateConsumer(ctx, f.name, jetstream.ConsumerConfig{
			DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: st.last + 1, AckPolicy: jetstream.AckNonePolicy,
			Replicas: 1, MemoryStorage: true, InactiveThreshold: time.Minute, MaxDeliver: 1,
		})
	})
	if err != nil {
		return false, err
	}
	defer func() {
		// The servers drop it by themselves when they are not told.
		_, _ = once(context.WithoutCancel(ctx), f, func(ctx context.Context) (struct{}, error) {
			return struct{}{}, f.js.DeleteConsumer(ctx, f.name, cons.CachedInfo().Name)
		})
	}()
	msgs, err := cons.Messages(jetstream.PullMaxMessagesWithBytesLimit(512, 2<<20), jetstream.PullHeartbeat(2*time.Second), jetstream.PullExpiry(10*time.Second))
	if err != nil {
		return false, err
	}
	defer msgs.Stop()
	f.mu.Lock()
	if f.id != st.id {
		f.mu.Unlock()
		return false, errMoving
	}
	f.ring.on = true
	f.clear(st.last) // what is before is read back
	f.mu.Unlock()
	defer func() {
		f.mu.Lock()
		defer f.mu.Unlock()
		f.ring.on = false
		f.clear(f.seen)
	}()
	for received := uint64(1); ; received++ {
		m, err := msgs.Next(jetstream.NextContext(ctx))
		if err != nil {
			return true, errors.Join(err, context.Cause(ctx))
		}
		at, err := m.Metadata()
		if err != nil {
			return true, err
		}
		if at.Sequence.Consumer != received {
			return true, errMissing
		}
		if err := f.arrived(ctx, st.id, at.Sequence.Stream, m.Data()); err != nil {
			return true, err
		}
	}
}

// whileConnected returns a context that also ends when the connection is lost. stop waits for what looks after that.
func (f *Feed) whileConnected(ctx context.Context) (_ context.Context, stop func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	lost, done := f.lostConnection(), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-lost:
			cancel(nats.ErrDisconnected)
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil); <-done }
}

// arrived puts a message of the stream into the ring.
func (f *Feed) arrived(ctx context.Context, id string, n uint64, data []byte) error {
	c, unreadable := decode(data)
	f.mu.Lock()
	jumped := n != f.ring.end+1
	f.mu.Unlock()
	if jumped {
		// What is between was dropped before it came here, and who stands in front of that lags from now on; or it was removed by
		// hand; or the stream is another one.
		if _, err := once(ctx, f, f.look); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.id != id {
		return errMoving
	}
	f.seen = max(f.seen, n)
	if unreadable != nil {
		f.unreadable(n, unreadable)
		f.clear(n) // who stands in front of it reads it back, and lags
		return nil
	}
	f.ring.add(entry{n, c, len(data)})
	f.ring.wake()
	return nil
}
