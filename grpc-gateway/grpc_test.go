package grpcgateway

import (
	"context"
	"errors"
	"io"
	"iter"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// dial serves the world's gRPC server over memory.
func (w *world) dial(t testing.TB) *grpc.ClientConn {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	done := make(chan struct{})
	go func() { defer close(done); _ = w.GRPCServer().Serve(l) }()
	c, err := grpc.NewClient("passthrough:///hub", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); w.GRPCServer().Stop(); <-done })
	return c
}

func as(t testing.TB, token string) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	if token == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
}

func all[M any](s grpc.ServerStreamingClient[M], err error) ([]*M, error) {
	if err != nil {
		return nil, err
	}
	var out []*M
	for {
		m, err := s.Recv()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return out, err
		}
		out = append(out, m)
	}
}

func must[M any](t testing.TB) func(ms []M, err error) []M {
	return func(ms []M, err error) []M {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return ms
	}
}

// reasonOf returns code and stable code of a gRPC error.
func reasonOf(t testing.TB, err error) (codes.Code, string) {
	t.Helper()
	s := status.Convert(err)
	for _, d := range s.Details() {
		if i, ok := d.(*errdetails.ErrorInfo); ok {
			want(t, "domain", i.GetDomain(), "coaphub")
			return s.Code(), i.GetReason()
		}
	}
	t.Errorf("no ErrorInfo: %v", err)
	return s.Code(), ""
}

func TestGRPCReads(t *testing.T) {
	w := newWorld(t)
	history(w)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	ctx := as(t, "alice")

	devices := must[*pb.Device](t)(all(c.GetDevices(ctx, &pb.GetDevicesRequest{})))
	want(t, "devices", len(devices), 2)
	want(t, "name", devices[0].GetName(), "lamp A")
	want(t, "status", devices[1].GetMetadata().GetConnection().GetStatus(), rapb.Connection_OFFLINE)
	want(t, "manufacturer", devices[0].GetManufacturerName()[0].GetValue(), "Example Maker")
	want(t, "owned", devices[0].GetOwnershipStatus(), pb.Device_OWNED)
	want(t, "no cursor unless asked", devices[0].Cursor == nil && devices[1].Cursor == nil, true)
	for _, r := range []struct {
		req  *pb.GetDevicesRequest
		want int
	}{
		{&pb.GetDevicesRequest{StatusFilter: []pb.GetDevicesRequest_Status{pb.GetDevicesRequest_OFFLINE}}, 1},
		{&pb.GetDevicesRequest{StatusFilter: []pb.GetDevicesRequest_Status{7}}, 0},
		{&pb.GetDevicesRequest{StatusFilter: []pb.GetDevicesRequest_Status{0, 1}}, 2},
		{&pb.GetDevicesRequest{TypeFilter: []string{"x.none"}}, 0},
		{&pb.GetDevicesRequest{DeviceIdFilter: []string{string(lampB)}}, 1},
		{&pb.GetDevicesRequest{DeviceIdFilter: []string{string(unknown)}}, 0},
		{&pb.GetDevicesRequest{DeviceIdFilter: []string{string(bobs)}}, 0},
	} {
		want(t, r.req.String(), len(must[*pb.Device](t)(all(c.GetDevices(ctx, r.req)))), r.want)
	}

	id := func(d hub.DeviceID, href string) *rapb.ResourceId {
		return &rapb.ResourceId{DeviceId: string(d), Href: href}
	}
	for _, r := range []struct {
		what string
		req  *pb.GetResourcesRequest
		want int
	}{
		{"all", &pb.GetResourcesRequest{}, 19},
		{"device", &pb.GetResourcesRequest{DeviceIdFilter: []string{string(lampA)}}, 9},
		{"device and type", &pb.GetResourcesRequest{DeviceIdFilter: []string{string(lampA)}, TypeFilter: []string{"x.text", "x.json"}}, 2},
		{"resource", &pb.GetResourcesRequest{ResourceIdFilter: []*pb.ResourceIdFilter{{ResourceId: id(lampA, "/light/1")}}}, 1},
		{"resource without slash", &pb.GetResourcesRequest{ResourceIdFilter: []*pb.ResourceIdFilter{{ResourceId: id(lampA, "light/1")}}}, 1},
		{"empty href", &pb.GetResourcesRequest{ResourceIdFilter: []*pb.ResourceIdFilter{{ResourceId: id(lampA, "")}}}, 9},
		{"of bob", &pb.GetResourcesRequest{DeviceIdFilter: []string{string(bobs)}}, 0},
	} {
		want(t, r.what, len(must[*pb.Resource](t)(all(c.GetResources(ctx, r.req)))), r.want)
	}
	for _, r := range []*pb.GetResourcesRequest{
		{ResourceIdFilter: []*pb.ResourceIdFilter{{ResourceId: id(lampA, "/light/1"), Etag: [][]byte{[]byte("\xb1\xb2")}}}},
		{HttpResourceIdFilter: []string{string(lampA) + "/light/1?etag=sbI="}},
	} {
		rs := must[*pb.Resource](t)(all(c.GetResources(ctx, r)))
		want(t, "etag matches", rs[0].GetData().GetStatus(), rapb.Status_NOT_MODIFIED)
		want(t, "format", rs[0].GetData().GetContent().GetCoapContentFormat(), -1)
		want(t, "content", len(rs[0].GetData().GetContent().GetData()), 0)
	}

	links := must[*rapb.ResourceLinksPublished](t)(all(c.GetResourceLinks(ctx, &pb.GetResourceLinksRequest{TypeFilter: []string{"core.light"}})))
	want(t, "links", len(links), 2)
	meta := must[*rapb.DeviceMetadataUpdated](t)(all(c.GetDevicesMetadata(ctx, &pb.GetDevicesMetadataRequest{DeviceIdFilter: []string{string(lampB)}})))
	want(t, "metadata", len(meta), 1)

	events := must[*pb.GetEventsResponse](t)(all(c.GetEvents(ctx, &pb.GetEventsRequest{})))
	want(t, "events", len(events), 5)
	want(t, "event", events[2].GetResourceChanged().GetAuditContext().GetCorrelationId(), "corr")
	events = must[*pb.GetEventsResponse](t)(all(c.GetEvents(ctx, &pb.GetEventsRequest{TimestampFilter: t0 + 3})))
	want(t, "newer events", len(events), 2)
	events = must[*pb.GetEventsResponse](t)(all(c.GetEvents(ctx, &pb.GetEventsRequest{ResourceIdFilter: []*pb.ResourceIdFilter{{ResourceId: id(lampA, "/other")}}})))
	want(t, "of a resource", len(events), 1)

	conf, err := c.GetHubConfiguration(as(t, ""), &pb.HubConfigurationRequest{}, grpc.UseCompressor(gzip.Name))
	if err != nil {
		t.Fatal(err)
	}
	want(t, "id", conf.GetId(), hubID)
	want(t, "ttl", conf.GetDefaultCommandTimeToLive(), int64(10*time.Second))
	want(t, "the console's client", conf.GetWebOauthClient().GetClientId(), "web")
	want(t, "build", conf.GetBuildInfo().GetVersion(), "v0")
}

func TestGRPCPages(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	ctx := as(t, "alice")
	var got []string
	cursor := ""
	for range 20 {
		page := must[*pb.Resource](t)(all(c.GetResources(ctx, &pb.GetResourcesRequest{DeviceIdFilter: []string{string(lampA)}, Limit: 4, Cursor: cursor})))
		for _, r := range page {
			got = append(got, r.GetTypes()[0])
		}
		if cursor = page[len(page)-1].GetCursor(); cursor == "" {
			break
		}
	}
	wantList(t, "pages", got, "x.odd", "x.cbor", "x.json", "x.late", "core.light", "x.octets", "oic.wk.d", "x.text", "x.types")
	_, err := all(c.GetResources(ctx, &pb.GetResourcesRequest{Cursor: "x"}))
	code, reason := reasonOf(t, err)
	want(t, "bad cursor", code, codes.InvalidArgument)
	want(t, "bad cursor", reason, "cursor-invalid")
	at := must[*pb.Device](t)(all(c.GetDevices(ctx, &pb.GetDevicesRequest{At: t0})))
	want(t, "looking back", len(at), 2)
}

func TestGRPCDeleteDevices(t *testing.T) { // C1
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	for _, req := range []*pb.DeleteDevicesRequest{{}, {DeviceIdFilter: []string{""}}, {DeviceIdFilter: []string{string(lampA), ""}}, {All: true, DeviceIdFilter: []string{string(lampA)}}} {
		_, err := c.DeleteDevices(as(t, "alice"), req)
		code, _ := reasonOf(t, err)
		want(t, req.String(), code, codes.InvalidArgument)
	}
	want(t, "deleted", len(w.signOffs), 0)
	_, err := c.DeleteDevices(as(t, "reader"), &pb.DeleteDevicesRequest{All: true})
	code, reason := reasonOf(t, err)
	want(t, "a reader", code, codes.PermissionDenied)
	want(t, "a reader", reason, "scope-missing")
	r, err := c.DeleteDevices(as(t, "alice"), &pb.DeleteDevicesRequest{DeviceIdFilter: []string{string(lampA), string(unknown), string(bobs)}})
	if err != nil {
		t.Fatal(err)
	}
	wantList(t, "deleted", r.GetDeviceIds(), string(lampA))
	if r, err = c.DeleteDevices(as(t, "alice"), &pb.DeleteDevicesRequest{All: true}); err != nil {
		t.Fatal(err)
	}
	want(t, "the rest", len(r.GetDeviceIds()), 3)
}

func TestGRPCAuthorization(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	for _, r := range []struct {
		token  string
		code   codes.Code
		reason string
	}{
		{"", codes.Unauthenticated, "token-missing"},
		{"nonsense", codes.Unauthenticated, "token-invalid"},
		{"lamp", codes.PermissionDenied, "device-token"},
		{"scopeless", codes.PermissionDenied, "scope-missing"},
	} {
		_, err := all(c.GetDevices(as(t, r.token), &pb.GetDevicesRequest{}))
		code, reason := reasonOf(t, err)
		want(t, r.token, code, r.code)
		want(t, r.token, reason, r.reason)
	}
	_, err := all(c.GetDevices(metadata.AppendToOutgoingContext(as(t, ""), "authorization", "alice"), &pb.GetDevicesRequest{}))
	code, reason := reasonOf(t, err)
	want(t, "no scheme", code, codes.Unauthenticated)
	want(t, "no scheme", reason, "token-missing")
	w.verifier.verify = func(context.Context, string) (hub.Claims, error) {
		return hub.Claims{}, &hub.Error{Kind: hub.Unavailable, RetryAfter: time.Second}
	}
	_, err = all(c.GetDevices(as(t, "alice"), &pb.GetDevicesRequest{}))
	want(t, "provider away", status.Code(err), codes.Unavailable)
	var retry *errdetails.RetryInfo
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok {
			retry = r
		}
	}
	want(t, "when to try again", retry.GetRetryDelay().AsDuration(), time.Second)
}

func TestGRPCReaderMayNotCommand(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	_, err := c.UpdateResource(as(t, "reader"), &pb.UpdateResourceRequest{})
	want(t, "a reader may not command", status.Code(err), codes.PermissionDenied)
}

func TestGRPCEveryKindHasItsCode(t *testing.T) {
	t.Parallel()
	for _, k := range hub.Kinds() {
		w := newWorld(t)
		c := pb.NewGrpcGatewayClient(w.dial(t))
		w.directory.devices = failing(1, w, &hub.Error{Kind: k, Op: "test", Err: errors.New("the cause")})
		got, err := all(c.GetDevices(as(t, "alice"), &pb.GetDevicesRequest{}))
		want(t, "what came before", len(got), 1)
		code, reason := reasonOf(t, err)
		want(t, k.String(), code, codeOf[k])
		want(t, k.String(), reason, k.String())
		want(t, k.String(), status.Convert(err).Message(), k.Sentence())
	}
}

// A reader that takes nothing loses its list, and learns that the list is not whole.
func TestGRPCReaderThatStopsReadingIsCutOff(t *testing.T) {
	t.Parallel()
	for what, change := range map[string]func(*Config, *Deps){
		"stalled":  func(c *Config, _ *Deps) { c.Limits.StallTimeout = 100 * time.Millisecond },
		"too long": func(c *Config, _ *Deps) { c.Limits.RequestTimeout = 100 * time.Millisecond },
	} {
		w := newWorld(t, change)
		ended := endless(w)
		ctx, cancel := context.WithTimeout(as(t, "alice"), 20*time.Second)
		defer cancel()
		s, err := pb.NewGrpcGatewayClient(w.dial(t)).GetDevices(ctx, &pb.GetDevicesRequest{})
		if err != nil {
			t.Fatal(err)
		}
		select {
		case <-ended:
		case <-ctx.Done():
			t.Fatalf("%s: the list still waits for its reader", what)
		}
		n := 0
		for ; err == nil; n++ {
			_, err = s.Recv()
		}
		code, reason := reasonOf(t, err)
		want(t, what+": after what had been sent", code, codes.DeadlineExceeded)
		want(t, what, reason, "deadline")
		if n < 2 {
			t.Errorf("%s: nothing had been sent", what)
		}
	}
}

// The time limit of a request is none of a watcher's.
func TestGRPCUnknownCallsHaveAReason(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conn := w.dial(t)
	for _, method := range []string{"/grpcgateway.pb.GrpcGateway/DoNothing", "/some.other.Service/Call"} {
		err := conn.Invoke(as(t, "reader"), method, &pb.HubConfigurationRequest{}, &pb.HubConfigurationResponse{})
		code, reason := reasonOf(t, err)
		want(t, method, code, codes.Unimplemented)
		want(t, method, reason, "no-such-call")
		code, _ = reasonOf(t, conn.Invoke(t.Context(), method, &pb.HubConfigurationRequest{}, &pb.HubConfigurationResponse{}))
		want(t, "a stranger: "+method, code, codes.Unauthenticated)
	}
}

// A filter that cannot be read is an error that says which entry of which field, on both doors and for deleting too.
func TestGRPCBadFiltersAreNamed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	ctx := as(t, "alice")
	bad := []string{string(lampA), "abc"}
	for what, call := range map[string]func() error{
		"devices": func() error { _, err := all(c.GetDevices(ctx, &pb.GetDevicesRequest{DeviceIdFilter: bad})); return err },
		"links": func() error {
			_, err := all(c.GetResourceLinks(ctx, &pb.GetResourceLinksRequest{DeviceIdFilter: bad}))
			return err
		},
		"metadata": func() error {
			_, err := all(c.GetDevicesMetadata(ctx, &pb.GetDevicesMetadataRequest{DeviceIdFilter: bad}))
			return err
		},
		"events": func() error { _, err := all(c.GetEvents(ctx, &pb.GetEventsRequest{DeviceIdFilter: bad})); return err },
		"delete": func() error {
			_, err := c.DeleteDevices(ctx, &pb.DeleteDevicesRequest{DeviceIdFilter: bad})
			return err
		},
	} {
		err := call()
		code, reason := reasonOf(t, err)
		want(t, what, code, codes.InvalidArgument)
		want(t, what, reason, "filter-invalid")
		want(t, what, strings.Contains(err.Error(), "deviceIdFilter, entry 2"), true)
	}
	want(t, "deleted", len(w.signOffs), 0)
}

func TestHealthWatchersStay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.RequestTimeout = 50 * time.Millisecond })
	conn := w.dial(t)
	watch, err := grpc_health_v1.NewHealthClient(conn).Watch(as(t, ""), &grpc_health_v1.HealthCheckRequest{Service: "grpcgateway.pb.GrpcGateway"})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := watch.Recv(); err != nil {
		t.Fatal(err)
	}
	endless(w) // begun later, and over by that limit
	_, err = all(pb.NewGrpcGatewayClient(conn).GetDevices(as(t, "alice"), &pb.GetDevicesRequest{}))
	want(t, "a list", status.Code(err), codes.DeadlineExceeded)
	w.health.SetServingStatus("grpcgateway.pb.GrpcGateway", grpc_health_v1.HealthCheckResponse_NOT_SERVING)
	h, err := watch.Recv()
	if err != nil {
		t.Fatalf("the watcher was cut off: %v", err)
	}
	want(t, "told", h.GetStatus(), grpc_health_v1.HealthCheckResponse_NOT_SERVING)
}

func TestGRPCPanicEndsOneCall(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	good := w.directory.devices
	w.directory.devices = func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error] { panic("boom") }
	_, err := all(c.GetDevices(as(t, "alice"), &pb.GetDevicesRequest{}))
	want(t, "code", status.Code(err), codes.Internal)
	w.identities.devices = func(context.Context, hub.Owner) ([]hub.DeviceID, error) { panic("boom too") }
	_, err = c.DeleteDevices(as(t, "alice"), &pb.DeleteDevicesRequest{All: true})
	want(t, "unary", status.Code(err), codes.Internal)
	want(t, "counted", w.counter(t, "coaphub_api_panics_total", "grpc"), 2)
	if !strings.Contains(w.log.String(), "grpc_test.go") {
		t.Error("no stack in the log")
	}
	w.directory.devices = good
	got, err := all(c.GetDevices(as(t, "alice"), &pb.GetDevicesRequest{DeviceIdFilter: []string{string(lampA)}}))
	want(t, "the next", len(got), 1)
	want(t, "the next", status.Code(err), codes.OK)
}

func TestHealthAndReflectionNeedNoToken(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conn := w.dial(t)
	for _, service := range []string{"", "grpcgateway.pb.GrpcGateway"} {
		h, err := grpc_health_v1.NewHealthClient(conn).Check(as(t, ""), &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil {
			t.Fatal(err)
		}
		want(t, "health", h.GetStatus(), grpc_health_v1.HealthCheckResponse_SERVING)
	}
	s, err := reflectionpb.NewServerReflectionClient(conn).ServerReflectionInfo(as(t, ""))
	if err != nil {
		t.Fatal(err)
	}
	ask := func(r *reflectionpb.ServerReflectionRequest) *reflectionpb.ServerReflectionResponse {
		if err := s.Send(r); err != nil {
			t.Fatal(err)
		}
		a, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	var names []string
	for _, s := range ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}).GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	if !slices.Contains(names, "grpcgateway.pb.GrpcGateway") || !slices.Contains(names, "grpc.health.v1.Health") {
		t.Errorf("services: %v", names)
	}
	files := ask(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_FileContainingSymbol{FileContainingSymbol: "grpcgateway.pb.GrpcGateway.GetDevices"}}).GetFileDescriptorResponse()
	if len(files.GetFileDescriptorProto()) == 0 {
		t.Error("no descriptor of the service")
	}
}
