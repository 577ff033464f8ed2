package mongostore

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/x/mongo/driver"
	"go.mongodb.org/mongo-driver/v2/x/mongo/driver/auth"
	"go.mongodb.org/mongo-driver/v2/x/mongo/driver/topology"

	"github.com/coaphub/coaphub/hub"
)

var (
	errClosed      = hub.NewError(hub.Unavailable, "store-closed", "the hub is stopping")
	errConflict    = hub.NewError(hub.Conflict, "", "").With("mongostore", nil)
	errUnreachable = hub.NewError(hub.Unavailable, "store-unreachable", "the database does not answer, try again later")
	errRefused     = hub.NewError(hub.Unavailable, "store-refused", "the database refuses to do this, try again later")
	errUnknown     = hub.NewError(hub.Deadline, "store-outcome-unknown", "the database did not say in time whether it stored this")
	errBehind      = hub.NewError(hub.Unavailable, "store-behind", "the database does not keep up, try again later")
	errFeed        = hub.NewError(hub.Unavailable, "feed-unavailable", "the feed does not take what is stored, try again later")
)

// Codes of server errors that matter here (mongo/base/error_codes.yml of the server).
const (
	codeUnauthorized       = 13
	codeAuthFailed         = 18
	codeNotWritablePrimary = 10107
	codeNotPrimaryNoSecond = 13435
	codeDuplicate          = 11000
)

func serverCode(err error) int32 {
	if c := (mongo.CommandError{}); errors.As(err, &c) {
		return c.Code
	}
	return 0
}

// notSent reports whether a command that ended with err cannot have changed anything: no server was there to take it, or the
// server refused it as a whole.
func notSent(err error) bool {
	switch serverCode(err) {
	case codeUnauthorized, codeAuthFailed, codeNotWritablePrimary, codeNotPrimaryNoSecond:
		return true
	}
	var selection topology.ServerSelectionError
	var waited topology.WaitQueueTimeoutError
	return errors.As(err, &selection) || errors.As(err, &waited) || errors.Is(err, mongo.ErrClientDisconnected) ||
		errors.Is(err, driver.ErrDeadlineWouldBeExceeded) || badLogin(err)
}

// movedPrimary reports whether the server that was asked is not the primary any more: another is, or will soon be.
func movedPrimary(err error) bool {
	c := serverCode(err)
	return c == codeNotWritablePrimary || c == codeNotPrimaryNoSecond
}

func badLogin(err error) bool {
	var a *auth.Error
	return errors.As(err, &a)
}

// transient reports whether the same command may succeed later.
func transient(err error) bool {
	if c := (mongo.CommandError{}); errors.As(err, &c) {
		// The server answered. A primary that steps down, shuts down or lost its majority says so with one of these
		// (server discovery and monitoring specification, "state change errors"); 50 and 64 are times that ran out.
		return c.HasErrorLabel("RetryableWriteError") || mongo.IsNetworkError(err) ||
			slices.Contains([]int32{50, 64, 91, 189, 262, 9001, 11600, 11602, codeNotWritablePrimary, codeNotPrimaryNoSecond, 13436}, c.Code)
	}
	var bulk mongo.BulkWriteException
	if errors.As(err, &bulk) {
		return len(bulk.WriteErrors) == 0 // only the write concern failed
	}
	var he *hub.Error // ours: the server has nothing to do with it
	return !errors.Is(err, mongo.ErrClientDisconnected) && !errors.As(err, &he)
}

// pause waits before the n-th repetition: longer each time, and never in step with others.
func pause(ctx context.Context, n int) error {
	d := min(20*time.Millisecond<<min(n, 10), 2*time.Second)
	t := time.NewTimer(d/2 + rand.N(d/2))
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// again runs f, which may be run any number of times with the same result, until it succeeds, cannot, or the time is over.
func (s *Store) again(ctx context.Context, op string, f func(ctx context.Context) error) error {
	whole, cancel := context.WithTimeout(ctx, s.cfg.SettleTimeout)
	defer cancel()
	for n := 0; ; n++ {
		err := s.once(whole, f)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", op, ctx.Err())
		}
		// Servers that are away were waited for already.
		if !transient(err) || notSent(err) && serverCode(err) == 0 || pause(whole, n) != nil {
			if ctx.Err() != nil {
				return fmt.Errorf("%s: %w", op, ctx.Err())
			}
			return wrap(op, err)
		}
		s.metrics.repeated.Inc()
	}
}

func (s *Store) once(ctx context.Context, f func(ctx context.Context) error) error {
	one, cancel := context.WithTimeout(ctx, s.cfg.Timeout)
	defer cancel()
	return f(one)
}

// wrap gives an error its op, and a kind if it has none.
func wrap(op string, err error) error {
	var he *hub.Error
	if errors.As(err, &he) {
		return fmt.Errorf("%s: %w", op, err)
	}
	if badLogin(err) || !transient(err) && serverCode(err) != 0 {
		return errRefused.With("mongostore."+op, err)
	}
	return errUnreachable.With("mongostore."+op, err)
}
