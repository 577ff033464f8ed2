package grpcgateway

import (
	"slices"
	"time"

	"google.golang.org/grpc"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
)

// pageRequest is what all requests for lists have in common.
type pageRequest interface {
	GetLimit() uint32
	GetCursor() string
}

// sendList sends a list as the messages of a stream.
func sendList[M any](g *Gateway, l list, out grpc.ServerStreamingServer[M], f filter, r pageRequest, read reader) error {
	ctx := out.Context()
	owner := claimsOf(ctx).Owner
	var err error
	f.limit = r.GetLimit()
	if at, ok := r.(interface{ GetAt() int64 }); ok {
		f.at = sinceNanos(at.GetAt())
	}
	if f.from, err = g.place(l, owner, &f, r.GetCursor()); err != nil {
		return err
	}
	return g.page(l, owner, &f, read(ctx, owner, &f), func(e element, cursor string) error {
		return out.SendMsg(e.message(cursor))
	})
}

// sinceNanos reads Unix nanoseconds; 0 and negative numbers mean no time.
func sinceNanos(ns int64) time.Time {
	if ns <= 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// setStatus: none or both mean all. A number that is no status matches nothing.
func (f *filter) setStatus(s []pb.GetDevicesRequest_Status) {
	if len(s) == 0 {
		return
	}
	f.online = slices.Contains(s, pb.GetDevicesRequest_ONLINE)
	f.offline = slices.Contains(s, pb.GetDevicesRequest_OFFLINE)
}

func (f *filter) wantsOnline(online bool) bool { return online && f.online || !online && f.offline }
