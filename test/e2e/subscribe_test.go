package e2e_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/coaphub/coaphub/test/dose"
)

// event is what these tests look at of a frame.
type event struct {
	Result struct {
		ResumeToken        string
		OperationProcessed *struct{ ErrorStatus struct{ Code string } }
		ResourceChanged    *struct {
			ResourceID    struct{ Href string }
			Content       struct{ Power int }
			EventMetadata struct{ Version string }
		}
	}
}

func eventOf(b []byte) (e event, err error) {
	if err := json.Unmarshal(b, &e); err != nil {
		return e, fmt.Errorf("%.200q: %w", b, err)
	}
	return e, nil
}

// seen is a lamp that applications see.
func seen(t *testing.T, p *process) *peer {
	t.Helper()
	id := deviceID(1)
	pe := signedIn(t, p, id, map[string]any{"/light": map[string]any{"power": 0}})
	token := trim(p.run("token"))
	if !eventually(t.Context(), 10*time.Second, func() bool {
		status, _ := p.get(t.Context(), token, "/api/v1/devices/"+id+"/resources/light?onlyContent=true")
		return status == 200 && pe.observed("/light")
	}) {
		t.Fatalf("the lamp is not seen\n%s", p.log)
	}
	return pe
}

// TestCurlEvents listens as a person with curl would, breaks off, and goes on with the ID of the last event.
func TestCurlEvents(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("curl"); err != nil {
		t.Skip("curl is not installed")
	}
	p := serve(t, t.TempDir())
	pe := seen(t, p)
	auth := "Authorization: Bearer " + trim(p.run("token"))
	// listen runs curl until it has shown so many events; the first says that it is live.
	listen := func(n int, live func(), args ...string) (ids []string, events []event) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		cmd := exec.CommandContext(ctx, "curl", append(args, "-sSN", "-H", auth, p.http("/api/v1/events/stream?eventFilter=RESOURCE_CHANGED&hrefFilter=/light"))...)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		for len(events) < n && lines.Scan() {
			switch name, value, _ := bytes.Cut(lines.Bytes(), []byte(": ")); string(name) {
			case "id":
				ids = append(ids, string(value))
			case "data":
				e, err := eventOf(value)
				if err != nil {
					t.Fatal(err)
				}
				if events = append(events, e); len(events) == 1 {
					live()
				}
			}
		}
		cancel()
		_ = cmd.Wait() // it was killed
		if len(events) != n || len(ids) != n {
			t.Fatalf("curl showed %d of %d events\n%s", len(events), n, p.log)
		}
		return ids, events
	}
	notify := func(from, to int) func() {
		return func() {
			for v := from; v <= to; v++ {
				if err := pe.notify("/light", map[string]any{"power": v}); err != nil {
					t.Error(err)
				}
			}
		}
	}
	ids, events := listen(3, notify(1, 4))
	if events[0].Result.OperationProcessed == nil || events[1].Result.ResourceChanged.Content.Power != 1 || events[2].Result.ResourceChanged.Content.Power != 2 {
		t.Errorf("curl showed %+v", events)
	}
	_, events = listen(4, notify(5, 5), "-H", "Last-Event-ID: "+ids[2])
	for i, e := range events[1:] {
		if e.Result.ResourceChanged.Content.Power != i+3 {
			t.Errorf("after %s curl showed power %d, want %d", ids[2], e.Result.ResourceChanged.Content.Power, i+3)
		}
	}
}

// TestStockGRPCSubscription subscribes with what reflection tells any client.
func TestStockGRPCSubscription(t *testing.T) {
	t.Parallel()
	p := serve(t, t.TempDir())
	pe := seen(t, p)
	conn, err := grpc.NewClient(strings.TrimPrefix(p.ready["grpc"], "grpc://"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	found, err := reflected(ctx, t, conn).FindDescriptorByName("grpcgateway.pb.GrpcGateway.SubscribeToEvents")
	if err != nil {
		t.Fatal(err)
	}
	method := found.(protoreflect.MethodDescriptor)
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+trim(p.run("token")))
	stream, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/grpcgateway.pb.GrpcGateway/SubscribeToEvents")
	if err != nil {
		t.Fatal(err)
	}
	ask := dynamicpb.NewMessage(method.Input())
	if err := protojson.Unmarshal([]byte(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"]},"correlationId":"c"}`), ask); err != nil {
		t.Fatal(err)
	}
	if err := stream.SendMsg(ask); err != nil {
		t.Fatal(err)
	}
	hear := func() string {
		t.Helper()
		m := dynamicpb.NewMessage(method.Output())
		if err := stream.RecvMsg(m); err != nil {
			t.Fatal(err)
		}
		b, err := protojson.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return strings.ReplaceAll(string(b), " ", "")
	}
	if m := hear(); !strings.Contains(m, `"operationProcessed"`) || !strings.Contains(m, `"correlationId":"c"`) {
		t.Errorf("the first message is %s", m)
	}
	if err := pe.notify("/light", map[string]any{"power": 7}); err != nil {
		t.Fatal(err)
	}
	if m := hear(); !strings.Contains(m, `"resourceChanged"`) || !strings.Contains(m, `"href":"/light"`) {
		t.Errorf("the event is %s", m)
	}
}

// TestStalledSubscribers: of 200 WebSockets (fewer for bare go test) every tenth stops reading. The others notice nothing, the
// hub's memory stays within its bounds, and when those read on they have missed nothing either.
func TestStalledSubscribers(t *testing.T) {
	t.Parallel()
	const asks = 9
	subscribers := dose.Of(50, 200, 200)
	stalled := subscribers / 10
	notifications := dose.Of(100, 100, 500) // fewer do not fill the connections of those that stall
	// The buffers of a connection take much, so those that stall have small ones and ask for each event several times.
	small := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
		if err == nil {
			err = c.(*net.TCPConn).SetReadBuffer(64 << 10)
		}
		return c, err
	}}}
	defer small.CloseIdleConnections()
	times := func(i int) int {
		if i < stalled {
			return asks
		}
		return 1
	}
	// On a busy machine the others take longer than the hub would wait for those that stall.
	patient := filepath.Join(t.TempDir(), "hub.yaml")
	if err := os.WriteFile(patient, []byte("grpcGateway: {limits: {stallTimeout: 10m}}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	p := serve(t, t.TempDir(), "--config", patient)
	pe := seen(t, p)
	token := trim(p.run("token"))
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	conns := make([]*websocket.Conn, subscribers)
	for i := range conns {
		options := &websocket.DialOptions{Subprotocols: []string{"Bearer", token}}
		if i < stalled {
			options.HTTPClient = small
		}
		c, _, err := websocket.Dial(ctx, "ws"+strings.TrimPrefix(p.ready["http"], "http")+"/api/v1/ws/events", options)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = c.CloseNow() }()
		c.SetReadLimit(1 << 20)
		for k := range times(i) {
			ask := fmt.Appendf(nil, `{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light"]},"correlationId":"%d"}`, k)
			if err := c.Write(ctx, websocket.MessageText, ask); err != nil {
				t.Fatal(err)
			}
			if _, b, err := c.Read(ctx); err != nil || !bytes.Contains(b, []byte("operationProcessed")) || checkFrame(b) != nil {
				t.Fatalf("%s, %v, %v", b, err, checkFrame(b))
			}
		}
		conns[i] = c
	}
	before := p.rss()
	// read takes all events of a connection, each of which must follow the one before in its subscription.
	read := func(i int) error {
		var last [asks]int
		for n := range times(i) * notifications {
			_, b, err := conns[i].Read(ctx)
			if err != nil {
				return fmt.Errorf("subscriber %d, event %d: %w", i, n, err)
			}
			_, corr, _ := bytes.Cut(b, []byte(`"correlationId":"`))
			if len(corr) == 0 || corr[0] < '0' || corr[0] >= '0'+asks {
				return fmt.Errorf("subscriber %d: %.300s", i, b)
			}
			last[corr[0]-'0']++
			want := last[corr[0]-'0']
			if !bytes.Contains(b, fmt.Appendf(nil, `"power":%d}`, want)) && !bytes.Contains(b, fmt.Appendf(nil, `"power":%d,`, want)) {
				return fmt.Errorf("subscriber %d, event %d: %.300s", i, want, b)
			}
			if want == 1 || want == notifications { // all would take this test's time, and they are alike
				if err := checkFrame(b); err != nil {
					return fmt.Errorf("subscriber %d, event %d: %w", i, want, err)
				}
			}
		}
		return nil
	}
	all := func(from, to int) {
		t.Helper()
		var wg sync.WaitGroup
		errs := make(chan error, subscribers)
		for i := from; i < to; i++ {
			wg.Go(func() { errs <- read(i) })
		}
		wg.Wait()
		close(errs)
		for err := range errs {
			if err != nil {
				t.Error(err)
			}
		}
		if t.Failed() {
			t.Fatalf("the hub's log:\n%s", p.log)
		}
	}
	padding := strings.Repeat("x", 4<<10)
	sent := make(chan error, 1)
	go func() {
		for v := 1; v <= notifications; v++ {
			if err := pe.notify("/light", map[string]any{"power": v, "padding": padding}); err != nil {
				sent <- err
				return
			}
		}
		sent <- nil
	}()
	all(stalled, subscribers)
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	if told := p.metric(`coaphub_api_subscription_messages_total{door="websocket"}`); told >= ((subscribers-stalled)+asks*stalled)*(notifications+1) {
		t.Error("nobody has stalled: what was not read fits the connections")
	}
	// 20 pages of 256 KiB, 10 MiB of the feed, 4 MiB of encoded events, and twice that for the garbage collector and buffers.
	if grown := p.rss() - before; grown > 96<<10 {
		t.Errorf("the hub's memory grew by %d KiB", grown)
	}
	all(0, stalled)
}

// metrics are all of them, as the hub shows them.
func (p *process) metrics() string {
	p.t.Helper()
	req, err := http.NewRequestWithContext(p.t.Context(), http.MethodGet, "http://"+strings.TrimPrefix(p.ready["admin"], "http://")+"/metrics", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// metric reads a metric by its name and labels, as the hub shows it.
func (p *process) metric(name string) int {
	p.t.Helper()
	for line := range strings.Lines(p.metrics()) {
		if v, ok := strings.CutPrefix(line, name+" "); ok {
			var f float64
			if _, err := fmt.Sscan(v, &f); err != nil {
				p.t.Fatal(err)
			}
			return int(f)
		}
	}
	p.t.Fatalf("there is no metric %s", name)
	return 0
}
