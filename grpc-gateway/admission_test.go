package grpcgateway

import (
	"context"
	"fmt"
	"iter"
	"net/http"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	rapb "github.com/coaphub/coaphub/api/gen/resourceaggregatepb"
	"github.com/coaphub/coaphub/hub"
)

// holds makes an owner's reads wait until the returned channel is closed.
func (w *world) holds(owner hub.Owner) chan struct{} {
	hold, devices := make(chan struct{}), w.directory.devices
	w.directory.devices = func(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
		if o == owner {
			<-hold
		}
		return devices(ctx, o, ids)
	}
	return hold
}

// refusedFor checks that an answer says when to come again, and returns that.
func refusedFor(t *testing.T, a answer, code int, reason string) time.Duration {
	t.Helper()
	want(t, reason, a.Code, code)
	want(t, reason, a.reason(), reason)
	n, err := strconv.Atoi(a.Header().Get("Retry-After"))
	if err != nil || n < 1 {
		t.Errorf("%s: Retry-After is %q", reason, a.Header().Get("Retry-After"))
	}
	return time.Duration(n) * time.Second
}

// refusedCall is refusedFor of a call over gRPC.
func refusedCall(t *testing.T, err error, code codes.Code, reason string) {
	t.Helper()
	got, why := reasonOf(t, err)
	want(t, "code", got, code)
	want(t, "reason", why, reason)
	for _, d := range status.Convert(err).Details() {
		if r, ok := d.(*errdetails.RetryInfo); ok && r.GetRetryDelay().AsDuration() >= time.Second {
			return
		}
	}
	t.Errorf("%v does not say when to come again", err)
}

// eventually waits until something holds.
func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !holds(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// An owner who has as many requests under way as one may gets no further ones in, over either door; another one, and what needs
// no token, is served; and when one has ended the next one is.
func TestOwnerRequestsUnderWay(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.OwnerRequests = 2 })
	hold := w.holds(alice)
	conn := w.dial(t)
	c := pb.NewGrpcGatewayClient(conn)
	answers := make(chan answer)
	for range 2 {
		go func() { answers <- w.get(t, "/api/v1/devices") }()
	}
	eventually(t, "two requests are under way", func() bool { return w.gauge(t, "coaphub_api_requests", "under-way") == 2 })
	refusedFor(t, w.get(t, "/api/v1/devices"), 429, "owner-requests")
	_, err := all(c.GetDevices(as(t, "alice"), &pb.GetDevicesRequest{}))
	refusedCall(t, err, codes.ResourceExhausted, "owner-requests")
	_, err = c.DeleteDevices(as(t, "alice"), &pb.DeleteDevicesRequest{})
	refusedCall(t, err, codes.ResourceExhausted, "owner-requests")
	want(t, "refused", w.counter(t, "coaphub_api_refused_total", "owner-requests"), 3)
	want(t, "bob", w.do(t, "bob", "GET", "/api/v1/devices").Code, 200)
	if _, err := all(c.GetDevices(as(t, "bob"), &pb.GetDevicesRequest{})); err != nil {
		t.Errorf("bob: %v", err)
	}
	want(t, "public", w.do(t, "", "GET", "/.well-known/configuration").Code, 200)
	if _, err := grpc_health_v1.NewHealthClient(conn).Check(as(t, ""), &grpc_health_v1.HealthCheckRequest{}); err != nil {
		t.Errorf("health: %v", err)
	}
	close(hold)
	for range 2 {
		want(t, "those before", (<-answers).Code, 200)
	}
	want(t, "when they have ended", w.get(t, "/api/v1/devices").Code, 200)
	want(t, "under way", w.gauge(t, "coaphub_api_requests", "under-way"), 0)
}

func TestOwnerRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.OwnerRate, c.Limits.OwnerBurst = 1, 3 })
		for range 3 {
			want(t, "within the burst", w.get(t, "/api/v1/devices").Code, 200)
		}
		again := refusedFor(t, w.get(t, "/api/v1/devices"), 429, "owner-rate")
		want(t, "bob", w.do(t, "bob", "GET", "/api/v1/devices").Code, 200)
		want(t, "refused", w.counter(t, "coaphub_api_refused_total", "owner-rate"), 1)
		time.Sleep(again)
		want(t, "when told", w.get(t, "/api/v1/devices").Code, 200)
	})
}

// Streams of events are counted apart from requests, and whatever door they come through.
func TestOwnerStreams(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.OwnerStreams, c.Limits.OwnerRequests = 1, 1 })
	w.run(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	h, _ := w.Addresses()
	s := w.events(t, "alice", "", "")
	s.next()
	socket := func() int {
		conn, resp, err := websocket.Dial(t.Context(), "ws://"+h.String()+"/api/v1/ws/events", &websocket.DialOptions{
			HTTPClient: client(t), HTTPHeader: http.Header{"Authorization": {"Bearer alice"}},
		})
		if err == nil {
			_ = conn.CloseNow()
		} else if resp == nil || resp.Header.Get("Retry-After") == "" {
			t.Errorf("%v, %v", resp, err)
		}
		return resp.StatusCode
	}
	want(t, "WebSocket", socket(), 429)
	refusedFor(t, w.get(t, "/api/v1/events/stream"), 429, "owner-streams")
	subscribe, err := c.SubscribeToEvents(as(t, "alice"))
	if err == nil {
		_, err = subscribe.Recv()
	}
	refusedCall(t, err, codes.ResourceExhausted, "owner-streams")
	want(t, "a request", w.get(t, "/api/v1/devices").Code, 200)
	other := w.events(t, "bob", "", "")
	other.next()
	s.close()
	eventually(t, "there is room again", func() bool { return socket() == 101 })
}

// When the hub has as many requests under way as it may, a few wait for a place, those for whom there is no room, or for whom
// none gets free in time, learn when to come again; and an owner who has its share does not take the places in the queue.
func TestHubBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(c *Config, _ *Deps) {
			c.Limits.MaxRequests, c.Limits.MaxWaiting, c.Limits.MaxWait, c.Limits.OwnerRequests = 1, 1, time.Second, 2
		})
		hold := w.holds(alice)
		ask := func(token string) chan answer {
			a := make(chan answer, 1)
			go func() { a <- w.do(t, token, "GET", "/api/v1/devices") }()
			synctest.Wait()
			return a
		}
		first, second := ask("alice"), ask("bob")
		want(t, "waiting", w.gauge(t, "coaphub_api_requests", "waiting"), 1)
		begin := time.Now()
		refusedFor(t, <-ask("bob"), 503, "hub-busy")
		want(t, "time that it took to refuse", time.Since(begin), 0)
		refusedFor(t, <-second, 503, "hub-busy")
		want(t, "time that it waited", time.Since(begin), time.Second)
		want(t, "refused", w.counter(t, "coaphub_api_refused_total", "hub-busy"), 2)
		third := ask("bob")
		close(hold)
		want(t, "who had the place", (<-first).Code, 200)
		want(t, "who waited", (<-third).Code, 200)
		want(t, "after it", w.do(t, "bob", "GET", "/api/v1/devices").Code, 200)
	})
}

// However many owners there are, no more are remembered than may be, and those that have something under way are.
func TestOwnersAreForgotten(t *testing.T) {
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.OwnerRate, c.Limits.OwnerBurst = 1, 1 })
	stays, err := w.admit.enter(t.Context(), "stays", true)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2*maxOwners + 5 {
		in, err := w.admit.enter(t.Context(), hub.Owner(fmt.Sprint(i)), false)
		if err != nil {
			t.Fatal(err)
		}
		in.leave()
		if n := len(w.admit.owners); n > maxOwners {
			t.Fatalf("%d owners are remembered", n)
		}
	}
	if n := len(w.admit.owners); n > maxOwners || w.admit.owners["stays"] == nil {
		t.Errorf("%d owners are remembered", n)
	}
	stays.leave()
}

// Commands that wait for their devices keep their owner from further ones, and from nothing else: they are read, and ended.
func TestCommandsThatWait(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.OwnerRequests, c.Limits.MaxRequests, c.Limits.MaxWaiting = 2, 2, 0 })
	hold, asked, command := make(chan struct{}), make(chan struct{}, 3), w.directory.command
	var mu sync.Mutex
	w.directory.command = func(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error) {
		asked <- struct{}{}
		<-hold
		mu.Lock() // the world notes what it was asked
		defer mu.Unlock()
		return command(ctx, owner, o)
	}
	answers := make(chan answer)
	for range 2 {
		go func() { answers <- w.send(t, "alice", "PUT", light, "{}", "Content-Type: application/json") }()
		<-asked
	}
	refusedFor(t, w.send(t, "alice", "PUT", light, "{}", "Content-Type: application/json"), 429, "owner-requests")
	_, err := pb.NewGrpcGatewayClient(w.dial(t)).DeleteResource(as(t, "alice"), &pb.DeleteResourceRequest{
		ResourceId: &rapb.ResourceId{DeviceId: string(lampA), Href: "/light/1"},
	})
	refusedCall(t, err, codes.ResourceExhausted, "owner-requests")
	want(t, "a read", w.get(t, "/api/v1/devices").Code, 200)
	close(hold)
	for range 2 {
		want(t, "those that waited", (<-answers).Code, 200)
	}
	want(t, "the next", w.send(t, "alice", "PUT", light, "{}", "Content-Type: application/json").Code, 200)
}

func TestAdmissionAllocatesOnce(t *testing.T) {
	w := newWorld(t)
	if n := testing.AllocsPerRun(100, func() {
		in, err := w.admit.enter(t.Context(), alice, false)
		if err != nil {
			t.Error(err)
		}
		in.leave()
	}); n > 1 {
		t.Errorf("%v allocations", n)
	}
}

func BenchmarkAdmission(b *testing.B) {
	w := newWorld(b, func(c *Config, _ *Deps) { c.Limits.OwnerRate, c.Limits.OwnerBurst = 1_000_000_000, 1_000_000_000 })
	b.ReportAllocs()
	for b.Loop() {
		in, _ := w.admit.enter(b.Context(), alice, false)
		in.leave()
	}
}
