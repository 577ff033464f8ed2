package grpcgateway

import (
	"context"
	"errors"
	"log/slog"
	"path"
	"runtime/debug"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip" // clients may ask for it
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/tap"

	capb "github.com/coaphub/coaphub/api/gen/certificateauthoritypb"
	dppb "github.com/coaphub/coaphub/api/gen/deviceprovisioningservicepb"
	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// public are the calls that need no token: what the hub is, whether it lives, and how to talk to it.
var public = map[string]bool{
	pb.GrpcGateway_GetHubConfiguration_FullMethodName:                true,
	grpc_health_v1.Health_Check_FullMethodName:                       true,
	grpc_health_v1.Health_List_FullMethodName:                        true,
	grpc_health_v1.Health_Watch_FullMethodName:                       true,
	"/grpc.reflection.v1.ServerReflection/ServerReflectionInfo":      true,
	"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": true,
}

// lasting are the calls that go on for as long as the caller wants. Their number is bounded.
var lasting = map[string]bool{
	pb.GrpcGateway_SubscribeToEvents_FullMethodName: true,
	grpc_health_v1.Health_Watch_FullMethodName:      true,
}

// reads are the calls for which a token that may read is enough; all others change something.
var reads = map[string]bool{
	pb.GrpcGateway_GetDevices_FullMethodName:            true,
	pb.GrpcGateway_GetResourceLinks_FullMethodName:      true,
	pb.GrpcGateway_GetResources_FullMethodName:          true,
	pb.GrpcGateway_GetResourceFromDevice_FullMethodName: true,
	pb.GrpcGateway_GetDevicesMetadata_FullMethodName:    true,
	pb.GrpcGateway_GetEvents_FullMethodName:             true,
	pb.GrpcGateway_GetPendingCommands_FullMethodName:    true,
	pb.GrpcGateway_SubscribeToEvents_FullMethodName:     true,

	capb.CertificateAuthority_GetSigningRecords_FullMethodName: true,

	dppb.DeviceProvisionService_GetProvisioningRecords_FullMethodName: true,
	dppb.DeviceProvisionService_GetEnrollmentGroups_FullMethodName:    true,
	dppb.DeviceProvisionService_GetHubs_FullMethodName:                true,
	dppb.DeviceProvisionService_GetEnrolments_FullMethodName:          true,
	dppb.DeviceProvisionService_GetEnrolmentTokens_FullMethodName:     true,
}

// administers are the calls for administrators.
var administers = map[string]bool{
	dppb.DeviceProvisionService_CreateEnrollmentGroup_FullMethodName: true,
	dppb.DeviceProvisionService_UpdateEnrollmentGroup_FullMethodName: true,
}

// known are the calls of the services.
var known = func() map[string]bool {
	out := map[string]bool{}
	for _, d := range []grpc.ServiceDesc{pb.GrpcGateway_ServiceDesc, capb.CertificateAuthority_ServiceDesc, dppb.DeviceProvisionService_ServiceDesc} {
		for _, m := range d.Methods {
			out["/"+d.ServiceName+"/"+m.MethodName] = true
		}
		for _, m := range d.Streams {
			out["/"+d.ServiceName+"/"+m.StreamName] = true
		}
	}
	return out
}()

func (g *Gateway) newGRPC() (*grpc.Server, *health.Server) {
	s := grpc.NewServer(
		grpc.InTapHandle(g.tap), grpc.ChainUnaryInterceptor(g.unary), grpc.ChainStreamInterceptor(g.stream),
		grpc.MaxConcurrentStreams(uint32(g.cfg.Limits.MaxStreams)),
		grpc.MaxRecvMsgSize(g.cfg.Limits.MaxBodyBytes),
		grpc.MaxHeaderListSize(uint32(g.cfg.Limits.MaxHeaderBytes)),
		grpc.ConnectionTimeout(g.cfg.Limits.HeaderTimeout),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
		// A peer that is gone without a word is noticed, and its streams end.
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: time.Minute, Timeout: g.cfg.Limits.StallTimeout}),
		grpc.WaitForHandlers(true),
		grpc.UnknownServiceHandler(func(any, grpc.ServerStream) error { return errNoCall }), // with a reason, as all errors
	)
	pb.RegisterGrpcGatewayServer(s, &server{g: g})
	capb.RegisterCertificateAuthorityServer(s, &certificateServer{g: g})
	dppb.RegisterDeviceProvisionServiceServer(s, &provisioningServer{g: g})
	h := health.NewServer()
	h.SetServingStatus(pb.GrpcGateway_ServiceDesc.ServiceName, grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(s, h)
	reflection.Register(s)
	return s, h
}

type claimsKey struct{}

type targetKey struct{}

// targetOf is what the entry of a call in the audit log says that it is about, for the call to add to.
func targetOf(ctx context.Context) *string { return ctx.Value(targetKey{}).(*string) }

// claimsOf returns whose call this is. Only the interceptor puts it there; every call that is not public has it.
func claimsOf(ctx context.Context) hub.Claims { return ctx.Value(claimsKey{}).(hub.Claims) }

// tap gives a call its time before its message is there: interceptors come after that, and whoever sends none, which needs no
// token, would keep a goroutine for ever. It is as long again as interceptors give, whose end says why.
func (g *Gateway) tap(ctx context.Context, info *tap.Info) (context.Context, error) {
	if lasting[info.FullMethodName] {
		return ctx, nil
	}
	timed, cancel := context.WithTimeout(ctx, 2*g.cfg.Limits.RequestTimeout)
	context.AfterFunc(ctx, cancel)
	return timed, nil
}

// begin is what applies to every call before it runs.
func (g *Gateway) begin(ctx context.Context, method string) (context.Context, error) {
	if public[method] {
		return ctx, nil
	}
	scope := hub.ScopeWrite
	if reads[method] || !known[method] { // whoever may do anything learns that there is no such call
		scope = hub.ScopeRead
	}
	if administers[method] {
		scope = hub.ScopeAdmin
	}
	var authorization string
	if v := metadata.ValueFromIncomingContext(ctx, "authorization"); len(v) > 0 {
		authorization = v[0]
	}
	claims, err := g.authorize(ctx, authorization, scope)
	return context.WithValue(ctx, claimsKey{}, claims), err
}

// end is what applies to every call after it ran. It must be deferred: it turns a panic into an error of this call alone.
func (g *Gateway) end(ctx context.Context, method, id string, begun time.Time, err *error) {
	if p := recover(); p != nil {
		g.metrics.panics.WithLabelValues("grpc").Inc()
		g.log.Error("a call ended in a panic", "request", id, "method", method, "panic", p, "stack", string(debug.Stack()))
		*err = &hub.Error{Kind: hub.Internal, Op: method}
	}
	outcome := "ok"
	if *err != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) { // the transport may have noticed first, and says it without a reason
			*err = &hub.Error{Kind: hub.Deadline, Op: method}
		}
		kind := hub.KindOf(*err)
		outcome = kind.String()
		if _, is := status.FromError(*err); is || gone(ctx) { // is: from the transport, which lost the peer
			outcome = "gone"
		} else if kind == hub.Internal {
			g.log.Error("a call failed", "request", id, "method", method, "error", *err)
		}
		if _, is := status.FromError(*err); !is {
			*err = toStatus(*err).Err()
		}
	}
	call := path.Base(method)
	if !known[method] {
		call = "other" // health, reflection, and what anybody makes up
	}
	took := time.Since(begun)
	g.metrics.requests.WithLabelValues("grpc", call, outcome).Inc()
	if method != pb.GrpcGateway_SubscribeToEvents_FullMethodName { // how long somebody listened says nothing about us
		g.metrics.seconds.WithLabelValues("grpc", call).Observe(took.Seconds())
	}
	g.log.LogAttrs(ctx, slog.LevelDebug, "call", slog.String("request", id), slog.String("method", method), slog.String("outcome", outcome), slog.Duration("took", took))
}

func (g *Gateway) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, handle grpc.UnaryHandler) (resp any, err error) {
	id := requestID()
	_ = grpc.SetHeader(ctx, metadata.Pairs("x-request-id", id)) // fails only without a stream
	defer g.end(ctx, info.FullMethod, id, time.Now(), &err)
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Limits.RequestTimeout)
	defer cancel()
	if ctx, err = g.begin(ctx, info.FullMethod); err != nil {
		return nil, err
	}
	if public[info.FullMethod] {
		return handle(ctx, req)
	}
	in, err := g.admit.enter(ctx, claimsOf(ctx).Owner, false)
	if err != nil {
		return nil, err
	}
	defer in.leave()
	ctx = context.WithValue(ctx, admittedKey{}, in)
	if !known[info.FullMethod] || reads[info.FullMethod] {
		return handle(ctx, req)
	}
	e := auditGRPC(ctx, path.Base(info.FullMethod), id, req)
	ctx = context.WithValue(ctx, targetKey{}, &e.Target)
	err = g.audited(ctx, &e, claimsOf(ctx), func() (err error) {
		resp, err = handle(ctx, req)
		return err
	})
	return resp, err
}

func (g *Gateway) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, handle grpc.StreamHandler) (err error) {
	id := requestID()
	_ = ss.SetHeader(metadata.Pairs("x-request-id", id)) // fails only after the first message
	defer g.end(ss.Context(), info.FullMethod, id, time.Now(), &err)
	ctx, err := g.begin(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	if public[info.FullMethod] && !lasting[info.FullMethod] {
		return handle(srv, &contextStream{ss, ctx})
	}
	var owner hub.Owner // nobody's, for those who watch the health
	if !public[info.FullMethod] {
		owner = claimsOf(ctx).Owner
	}
	in, err := g.admit.enter(ctx, owner, lasting[info.FullMethod])
	if err != nil {
		return err
	}
	defer in.leave()
	if lasting[info.FullMethod] {
		return handle(srv, &contextStream{ss, ctx})
	}
	ctx, cancel := context.WithTimeout(ctx, g.cfg.Limits.RequestTimeout)
	defer cancel()
	l := newListStream(ctx, ss, g.cfg.Limits.StallTimeout)
	defer l.close()
	return handle(srv, l)
}

type contextStream struct {
	grpc.ServerStream
	ctx context.Context //nolint:containedctx // this is how a stream interceptor hands on a context
}

func (s *contextStream) Context() context.Context { return s.ctx }

// server is the service over gRPC.
type server struct {
	pb.UnimplementedGrpcGatewayServer
	g *Gateway
}

func (s *server) GetDevices(r *pb.GetDevicesRequest, out grpc.ServerStreamingServer[pb.Device]) error {
	f, err := newFilter(r.GetDeviceIdFilter(), nil, nil)
	if err != nil {
		return err
	}
	f.types = r.GetTypeFilter()
	f.setStatus(r.GetStatusFilter())
	if f.search, err = newSearch(r.GetSearch()); err != nil {
		return err
	}
	if f.order, err = newOrder(r.GetSort()); err != nil {
		return err
	}
	return sendList(s.g, listDevices, out, f, r, s.g.devices)
}

func (s *server) GetResourceLinks(r *pb.GetResourceLinksRequest, out grpc.ServerStreamingServer[rapb.ResourceLinksPublished]) error {
	f, err := newFilter(r.GetDeviceIdFilter(), nil, nil)
	if err != nil {
		return err
	}
	f.types = r.GetTypeFilter()
	return sendList(s.g, listLinks, out, f, r, s.g.links)
}

func (s *server) GetResources(r *pb.GetResourcesRequest, out grpc.ServerStreamingServer[pb.Resource]) error {
	f, err := newFilter(r.GetDeviceIdFilter(), r.GetResourceIdFilter(), r.GetHttpResourceIdFilter()) //nolint:staticcheck // old clients use it
	if err != nil {
		return err
	}
	f.types = r.GetTypeFilter()
	return sendList(s.g, listResources, out, f, r, s.g.resources)
}

func (s *server) GetDevicesMetadata(r *pb.GetDevicesMetadataRequest, out grpc.ServerStreamingServer[rapb.DeviceMetadataUpdated]) error {
	f, err := newFilter(r.GetDeviceIdFilter(), nil, nil)
	if err != nil {
		return err
	}
	f.types = r.GetTypeFilter()
	return sendList(s.g, listMetadata, out, f, r, s.g.metadata)
}

func (s *server) GetEvents(r *pb.GetEventsRequest, out grpc.ServerStreamingServer[pb.GetEventsResponse]) error {
	f, err := newFilter(r.GetDeviceIdFilter(), r.GetResourceIdFilter(), r.GetHttpResourceIdFilter()) //nolint:staticcheck // old clients use it
	if err != nil {
		return err
	}
	f.after = sinceNanos(r.GetTimestampFilter())
	return sendList(s.g, listEvents, out, f, r, s.g.events)
}

func (s *server) DeleteDevices(ctx context.Context, r *pb.DeleteDevicesRequest) (*pb.DeleteDevicesResponse, error) {
	d, err := s.g.deleteDevices(ctx, claimsOf(ctx), r.GetDeviceIdFilter(), r.GetAll())
	if err != nil {
		return nil, err
	}
	return d.response(), nil
}

func (s *server) GetHubConfiguration(context.Context, *pb.HubConfigurationRequest) (*pb.HubConfigurationResponse, error) {
	return s.g.configuration().response(), nil
}
