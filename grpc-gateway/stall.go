package grpcgateway

import (
	"context"
	"time"

	"google.golang.org/grpc"

	"github.com/coaphub/coaphub/hub"
)

var errStalled = &hub.Error{Kind: hub.Deadline, Op: "send", Text: "nothing was read for too long"}

// listStream is the stream of a list: it ends when its reader takes nothing for a while. gRPC has no deadline for one message, and
// a reader that takes nothing but answers pings would hold the list, and the device it stands at, for ever.
type listStream struct {
	grpc.ServerStream
	ctx   context.Context //nolint:containedctx // this is how a stream interceptor hands on a context
	stall *time.Timer
	after time.Duration
	next  chan any   // to the goroutine that sends; it is idle whenever SendMsg is called
	sent  chan error // what came of it; room for one, so that it never waits for us
	err   error      // why this stream sends no more
}

// newListStream starts the goroutine that sends. It ends after close, at once or, if it hangs in a message, when gRPC ends
// the stream, which it does as soon as the call returned.
func newListStream(ctx context.Context, ss grpc.ServerStream, after time.Duration) *listStream {
	s := &listStream{ServerStream: ss, ctx: ctx, stall: time.NewTimer(after), after: after, next: make(chan any), sent: make(chan error, 1)}
	go func() {
		for m := range s.next {
			s.sent <- ss.SendMsg(m)
		}
	}()
	return s
}

func (s *listStream) close() {
	s.stall.Stop()
	close(s.next)
}

func (s *listStream) Context() context.Context { return s.ctx }

// SendMsg sends m, which nobody may change any more. Not for concurrent use, like every stream's.
func (s *listStream) SendMsg(m any) error {
	if s.err != nil {
		return s.err
	}
	s.stall.Reset(s.after)
	s.next <- m
	select {
	case err := <-s.sent:
		return err
	case <-s.stall.C:
		s.err = errStalled
	case <-s.ctx.Done():
		s.err = s.ctx.Err()
	}
	return s.err
}
