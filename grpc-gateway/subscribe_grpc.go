package grpcgateway

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
)

// SubscribeToEvents serves one stream of subscriptions. It ends well when the application closes its side.
func (s *server) SubscribeToEvents(ss grpc.BidiStreamingServer[pb.SubscribeToEvents, pb.Event]) error {
	ctx := ss.Context()
	// The interceptor found it good.
	token := bearer(metadata.ValueFromIncomingContext(ctx, "authorization")[0])
	st := s.g.newStream(ctx, "grpc", claimsOf(ctx), token)
	out := newListStream(st.ctx, ss, s.g.cfg.Limits.StallTimeout)
	defer out.close()
	st.send = func(t told) error { return out.SendMsg(t.message()) }
	defer st.close()
	type received struct {
		m   *pb.SubscribeToEvents
		err error
	}
	in := make(chan received)
	go func() { // ends at the latest when gRPC ends the stream, which it does as soon as this call returned
		for {
			m, err := ss.Recv()
			select {
			case in <- received{m, err}:
			case <-st.ctx.Done():
				return
			}
			if err != nil {
				return
			}
		}
	}()
	for {
		select {
		case r := <-in:
			switch {
			case errors.Is(r.err, io.EOF):
				return nil
			case r.err != nil:
				return r.err
			}
			if err := st.handle(r.m); err != nil {
				return err
			}
		case <-st.ctx.Done():
			return context.Cause(st.ctx)
		}
	}
}
