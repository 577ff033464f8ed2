package grpcgateway

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

// listener is an application at a WebSocket; each message is checked against the description.
type listener struct {
	t testing.TB
	*websocket.Conn
}

func (w *world) listen(t testing.TB, token, query string) *listener {
	t.Helper()
	h, _ := w.Addresses()
	c, _, err := websocket.Dial(t.Context(), "ws://"+h.String()+"/api/v1/ws/events"+query, &websocket.DialOptions{
		HTTPClient: client(t), Subprotocols: []string{"Bearer", token},
	})
	if err != nil {
		t.Fatal(err)
	}
	c.SetReadLimit(4 << 20)
	t.Cleanup(func() { _ = c.CloseNow() })
	want(t, "protocol", c.Subprotocol(), "Bearer")
	return &listener{t, c}
}

func (l *listener) say(format string, args ...any) {
	l.t.Helper()
	if err := l.Write(l.t.Context(), websocket.MessageText, fmt.Appendf(nil, format, args...)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *listener) raw() []byte {
	l.t.Helper()
	ctx, cancel := context.WithTimeout(l.t.Context(), 20*time.Second)
	defer cancel()
	kind, b, err := l.Read(ctx)
	if err != nil {
		l.t.Fatal(err)
	}
	want(l.t, "kind", kind, websocket.MessageText)
	c, err := checker()
	if err != nil {
		l.t.Fatal(err)
	}
	if err := c.CheckMessage("/api/v1/ws/events", b); err != nil {
		l.t.Errorf("%v\n%s", err, b)
	}
	return b
}

// frame is what tests look at of a message.
type frame struct {
	Result struct {
		SubscriptionID, CorrelationID, ResumeToken string
		OperationProcessed                         *struct {
			ErrorStatus struct{ Code, Message string }
			Lagged      bool
		}
		SubscriptionCanceled *struct{}
		ResourceChanged      *struct {
			ResourceID struct{ DeviceID, Href string }
			Content    json.RawMessage
		}
		DeviceRegistered, DeviceUnregistered *struct{ DeviceIDs []string }
	}
	Error *struct {
		Code    int
		Details []struct{ Reason string }
	}
}

func frameOf(t testing.TB, b []byte) frame {
	t.Helper()
	var f frame
	if err := json.Unmarshal(b, &f); err != nil {
		t.Fatalf("%s: %v", b, err)
	}
	return f
}

func (l *listener) hear() frame { l.t.Helper(); return frameOf(l.t, l.raw()) }

// word is one word for what was said.
func (f frame) word() string {
	r := f.Result
	switch {
	case f.Error != nil:
		return "error " + f.Error.Details[0].Reason
	case r.OperationProcessed != nil:
		code, _, _ := strings.Cut(r.OperationProcessed.ErrorStatus.Message, ":")
		return strings.TrimSpace(r.OperationProcessed.ErrorStatus.Code + " " + code)
	case r.SubscriptionCanceled != nil:
		return "canceled"
	case r.ResourceChanged != nil:
		return r.ResourceChanged.ResourceID.Href + " " + string(r.ResourceChanged.Content)
	case r.DeviceRegistered != nil:
		return "+" + r.DeviceRegistered.DeviceIDs[0][34:]
	case r.DeviceUnregistered != nil:
		return "-" + r.DeviceUnregistered.DeviceIDs[0][34:]
	}
	return "?"
}

func (l *listener) expect(words ...string) frame {
	l.t.Helper()
	var f frame
	for _, w := range words {
		f = l.hear()
		want(l.t, "heard", f.word(), w)
	}
	return f
}

func TestWebSocketConversation(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.identities.devices = func(context.Context, hub.Owner) ([]hub.DeviceID, error) {
		return []hub.DeviceID{lampA, lampB, bobs}, nil // a device is its new owner's before the directory hears of it: the stamps decide
	}
	w.run(t)
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"]},"correlationId":"one"}`)
	ack := l.expect("OK")
	want(t, "correlation", ack.Result.CorrelationID, "one")
	if ack.Result.SubscriptionID == "" || ack.Result.ResumeToken == "" {
		t.Errorf("%+v", ack.Result)
	}
	// It is live once it is acknowledged.
	w.directory.happen(lampA, reports("/light/1", 1))
	w.directory.happen(bobs, reports("/light/1", 2))
	w.directory.happen(lampB, reports("/light/1", 3), hub.Event{Kind: hub.LinksUnpublished, Hrefs: []hub.Href{"/x"}}, reports("/light/1", 4))
	ev := l.expect("/light/1 1")
	want(t, "subscription", ev.Result.SubscriptionID, ack.Result.SubscriptionID)
	want(t, "correlation", ev.Result.CorrelationID, "one")
	l.expect("/light/1 3", "/light/1 4")
	// Cancelling: what is over says so, then the operation is answered; the stream stays.
	l.say(`{"cancelSubscription":{"subscriptionId":%q},"correlationId":"two"}`, ack.Result.SubscriptionID)
	want(t, "subscription", l.expect("canceled").Result.SubscriptionID, ack.Result.SubscriptionID)
	want(t, "correlation", l.expect("OK").Result.CorrelationID, "two")
	l.say(`{"cancelSubscription":{"subscriptionId":%q},"correlationId":"again"}`, ack.Result.SubscriptionID)
	l.expect("NOT_FOUND subscription-unknown")
	l.say(`{"cancelSubscription":{}}`)
	l.expect("NOT_FOUND subscription-unknown")
	w.directory.happen(lampA, reports("/light/1", 5)) // nobody hears it
	// Ownership takes effect at once, for both.
	b := w.listen(t, "bob", "")
	b.say(`{"createSubscription":{}}`)
	b.expect("OK")
	l.say(`{"createSubscription":{}}`)
	l.expect("OK")
	w.directory.transfer(lampA, bob)
	w.directory.happen(lampA, reports("/light/1", 6))
	w.directory.happen(lampB, reports("/light/1", 7))
	l.expect("-a1", "/light/1 7")
	b.expect("+a1", "/light/1 6")
	// Who names another's device is told nothing of it, until it is theirs.
	b = w.listen(t, "bob", "")
	b.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"deviceIdFilter":[%q],"includeCurrentState":true}}`, lampB)
	b.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"resourceIdFilter":[{"resourceId":{"deviceId":%q,"href":"/light/1"}}]}}`, lampB)
	b.expect("OK", "OK")
	w.directory.happen(lampB, reports("/light/1", 8))
	w.directory.transfer(lampB, bob)
	w.directory.happen(lampB, reports("/light/1", 9))
	b.expect("/light/1 9", "/light/1 9")
}

func TestWebSocketForms(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	l := w.listen(t, "alice", "?accept=application/protojson")
	l.say(`{"createSubscription":{},"correlationId":"x"}`)
	l.raw()
	w.directory.happen(lampA, reports("/light/1", 1))
	var m struct{ Result json.RawMessage }
	if err := json.Unmarshal(l.raw(), &m); err != nil {
		t.Fatal(err)
	}
	got := sameJSON(t, m.Result)
	for _, part := range []string{`"contentType":"application/json","data":"MQ=="`, `"openTelemetryCarrier":{}`, `"correlationId":"x"`, `"lagged"`} {
		if strings.Contains(got, part) == (part == `"lagged"`) {
			t.Errorf("%s in %s", part, got)
		}
	}
	simple := w.listen(t, "alice", "")
	simple.say(`{"createSubscription":{}}`)
	ack := simple.hear()
	want(t, "the acknowledgement", sameJSON(t, bytesOf(t, ack.Result.OperationProcessed)), `{"ErrorStatus":{"Code":"OK","Message":""},"Lagged":false}`)
	w.directory.transfer(lampB, alice)
	got = sameJSON(t, simple.raw())
	if !strings.Contains(got, `"deviceUnregistered":{"deviceIds":["`+string(lampB)+`"],"eventMetadata":{"hubId":"`+hubID+`"}}`) {
		t.Error(got)
	}
}

func bytesOf(t testing.TB, v any) []byte {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Whatever a client says, it is answered, and the connection stays.
func TestWebSocketBadInput(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.MaxBodyBytes = 64 << 10 })
	w.run(t)
	l := w.listen(t, "alice", "")
	const good = `{"createSubscription":{"eventFilter":["REGISTERED"]},"correlationId":"good"}`
	for _, c := range []struct{ says, words string }{
		{`hello`, "error message-invalid"},
		{`[]`, "error message-invalid"},
		{`null`, "error message-invalid"},
		{`5`, "error message-invalid"},
		{`{"createSubscription":`, "error message-invalid"},
		{`{"createSubscription":{},"cancelSubscription":{"subscriptionId":"x"}}`, "error message-invalid"},
		{`{"createSubscription":{"eventFilter":"x"}}`, "error message-invalid"},
		{good + `x`, "OK, error message-invalid"},
		{strings.Repeat("a", 64<<10+1), "error message-too-large"},
		{`{"correlationId":"` + strings.Repeat("a", 200<<10) + `"}`, "error message-too-large"},
		{`{}`, "ERROR action-missing"},
		{`{"correlationId":"x"}`, "ERROR action-missing"},
		{`{"createSubscription":{"deviceIdFilter":["abc"]}}`, "ERROR filter-invalid"},
		{`{"createSubscription":{"resourceIdFilter":["garbage"]}}`, "ERROR filter-invalid"},
		{`{"createSubscription":{"resumeToken":"abc"}}`, "ERROR resume-token-invalid"},
		{``, ""},
		{"\n", ""},
		{good + "\n" + good + "\n", "OK, OK"},
		{good + good, "OK, OK"},
		{`{"createSubscription":{"eventFilter":["REGISTERED"],"nope":1},"y":2}`, "OK"},
	} {
		l.say("%s", c.says)
		if c.words != "" {
			l.expect(strings.Split(c.words, ", ")...)
		}
		l.say("%s", good)
		want(t, fmt.Sprintf("after %.40q", c.says), l.expect("OK").Result.CorrelationID, "good")
	}
	// What is many times the limit is not read to its end.
	if err := l.Write(t.Context(), websocket.MessageBinary, make([]byte, 20*(64<<10))); err == nil {
		l.expect("error message-too-large")
	}
	_, _, err := l.Read(t.Context())
	if code := websocket.CloseStatus(err); code != websocket.StatusMessageTooBig && code != -1 { // -1: it was faster than we read
		t.Errorf("closed with %v: %v", code, err)
	}
}

func TestWebSocketLimitsSubscriptions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	l := w.listen(t, "alice", "")
	var first frame
	for i := range maxSubscriptions {
		l.say(`{"createSubscription":{}}`)
		f := l.expect("OK")
		if i == 0 {
			first = f
		}
	}
	l.say(`{"createSubscription":{}}`)
	l.expect("ERROR subscriptions-limit")
	if n := testutil.ToFloat64(w.metrics.refused.WithLabelValues("subscriptions-limit")); n != 1 {
		t.Errorf("%v refusals are counted, want 1", n)
	}
	l.say(`{"cancelSubscription":{"subscriptionId":%q}}`, first.Result.SubscriptionID)
	l.expect("canceled", "OK")
	l.say(`{"createSubscription":{}}`)
	l.expect("OK")
}

func TestWebSocketDoor(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.API.HTTP.CORS.Origins = []string{"https://console.example"} })
	w.run(t)
	h, _ := w.Addresses()
	bearer := func(token string) []string { return []string{"Bearer, " + token} }
	for _, c := range []struct {
		what   string
		header http.Header
		status int
		reason string
	}{
		{"authorization header", http.Header{"Authorization": {"Bearer alice"}}, 101, ""},
		{"protocol", http.Header{"Sec-Websocket-Protocol": bearer("alice")}, 101, ""},
		{"a reader", http.Header{"Sec-Websocket-Protocol": bearer("reader")}, 101, ""},
		{"no token", nil, 401, "token-missing"},
		{"protocol in lower case", http.Header{"Sec-Websocket-Protocol": {"bearer, alice"}}, 401, "token-missing"},
		{"protocol alone", http.Header{"Sec-Websocket-Protocol": {"Bearer"}}, 401, "token-missing"},
		{"cookie", http.Header{"Cookie": {"token=alice"}}, 401, "token-missing"},
		{"bad token", http.Header{"Sec-Websocket-Protocol": bearer("nonsense")}, 401, "token-invalid"},
		{"scope", http.Header{"Sec-Websocket-Protocol": bearer("scopeless")}, 403, "scope-missing"},
		{"device", http.Header{"Sec-Websocket-Protocol": bearer("lamp")}, 403, "device-token"},
		{"own origin", http.Header{"Authorization": {"Bearer alice"}, "Origin": {"http://" + h.String()}}, 101, ""},
		{"configured origin", http.Header{"Authorization": {"Bearer alice"}, "Origin": {"https://console.example"}}, 101, ""},
		{"other scheme", http.Header{"Authorization": {"Bearer alice"}, "Origin": {"http://console.example"}}, 403, "cross-origin"},
		{"other port", http.Header{"Authorization": {"Bearer alice"}, "Origin": {"https://console.example:8443"}}, 403, "cross-origin"},
		{"longer name", http.Header{"Authorization": {"Bearer alice"}, "Origin": {"https://console.example.evil.example"}}, 403, "cross-origin"},
		{"null", http.Header{"Authorization": {"Bearer alice"}, "Origin": {"null"}}, 403, "cross-origin"},
		{"host", http.Header{"Authorization": {"Bearer alice"}, "Host": {"evil.example"}}, 421, "host-not-allowed"},
	} {
		opts := &websocket.DialOptions{HTTPClient: client(t), HTTPHeader: c.header, Host: c.header.Get("Host")}
		if p := c.header.Get("Sec-Websocket-Protocol"); p != "" {
			opts.Subprotocols = strings.Split(p, ", ")
			c.header.Del("Sec-Websocket-Protocol")
		}
		conn, resp, err := websocket.Dial(t.Context(), "ws://"+h.String()+"/api/v1/ws/events/", opts)
		if resp == nil {
			t.Errorf("%s: %v", c.what, err)
			continue
		}
		want(t, c.what, resp.StatusCode, c.status)
		if err == nil {
			_ = conn.Close(websocket.StatusNormalClosure, "")
			continue
		}
		b, _ := io.ReadAll(resp.Body) // the library keeps the first 1024 bytes
		if !strings.Contains(string(b), `"reason":"`+c.reason+`"`) {
			t.Errorf("%s: %s", c.what, b)
		}
	}
	want(t, "without upgrade", w.get(t, "/api/v1/ws/events").reason(), "method-not-allowed")
	want(t, "at another path", w.get(t, "/api/v1/ws/other", "Connection: Upgrade", "Upgrade: websocket").Code, http.StatusNotFound)
	want(t, "without upgrade, without token", w.do(t, "", "GET", "/api/v1/ws/events").reason(), "token-missing")
	want(t, "refused", w.counter(t, "coaphub_api_refused_total", "origin"), 4)
}

// The first event of a stream of server-sent events says that it is live; its ID and all later ones are where to resume.
func TestServerSentEvents(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	s := w.events(t, "alice", "eventFilter=RESOURCE_CHANGED&deviceIdFilter="+string(lampA), "")
	id, f := s.next()
	want(t, "first", f.word(), "OK")
	want(t, "id", id, f.Result.ResumeToken)
	w.directory.happen(lampA, reports("/light/1", 1), reports("/light/1", 2))
	w.directory.happen(lampB, reports("/light/1", 3))
	id, f = s.next()
	want(t, "event", f.word(), "/light/1 1")
	s.close()
	// It goes on in the middle of a commit, in another form, and for nobody else.
	w.directory.happen(lampA, reports("/light/1", 4))
	s = w.events(t, "alice", "eventFilter=16&deviceIdFilter="+string(lampA)+"&accept=application/protojson", id)
	_, f = s.next()
	want(t, "first", f.word(), "OK")
	_, f = s.next()
	want(t, "protobuf's JSON", strings.Contains(f.word(), `"data":"Mg=="`), true)
	for what, a := range map[string]answer{
		"bob":           w.do(t, "bob", "GET", "/api/v1/events/stream", "Last-Event-ID: "+id),
		"damaged":       w.get(t, "/api/v1/events/stream?resumeToken="+strings.ToUpper(id)),
		"a cursor":      w.get(t, "/api/v1/events/stream?resumeToken="+w.cursor(listEvents, alice, &filter{}, place{device: lampA})),
		"no base64":     w.get(t, "/api/v1/events/stream?resumeToken=!"),
		"too long":      w.get(t, "/api/v1/events/stream?resumeToken="+strings.Repeat("A", 2000)),
		"another hub's": newWorld(t, func(_ *Config, d *Deps) { d.CursorKey = []byte("another key of 32 bytes, for HMAC") }).get(t, "/api/v1/events/stream?resumeToken="+id),
	} {
		want(t, what, a.Code, 400)
		want(t, what, a.reason(), "resume-token-invalid")
	}
	want(t, "a filter", w.get(t, "/api/v1/events/stream?deviceIdFilter=abc").reason(), "filter-invalid")
	want(t, "a kind", w.get(t, "/api/v1/events/stream?eventFilter=NOPE").reason(), "query-invalid")
	want(t, "a flag", w.get(t, "/api/v1/events/stream?includeCurrentState=perhaps").reason(), "query-invalid")
	want(t, "no token", w.do(t, "", "GET", "/api/v1/events/stream").Code, 401)
	want(t, "HEAD", w.do(t, "alice", "HEAD", "/api/v1/events/stream").Code, 501)
}

// eventStream reads server-sent events.
type eventStream struct {
	t     testing.TB
	resp  *http.Response
	lines *bufio.Scanner
	body  strings.Builder
}

func (w *world) events(t testing.TB, token, query, last string) *eventStream {
	t.Helper()
	h, _ := w.Addresses()
	r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+h.String()+"/api/v1/events/stream?"+query, nil)
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Accept", "text/event-stream")
	if last != "" {
		r.Header.Set("Last-Event-ID", last)
	}
	resp, err := client(t).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	if resp.StatusCode != 200 || resp.Header.Get("Content-Type") != "text/event-stream" {
		t.Fatalf("%s, %v", resp.Status, resp.Header)
	}
	s := &eventStream{t: t, resp: resp, lines: bufio.NewScanner(resp.Body)}
	t.Cleanup(s.close)
	return s
}

// next returns the next event; "" and nothing at the end of the stream.
func (s *eventStream) next() (id string, f frame) {
	s.t.Helper()
	for s.lines.Scan() {
		line := s.lines.Text()
		s.body.WriteString(line + "\n")
		switch name, value, _ := strings.Cut(line, ": "); name {
		case "id":
			id = value
		case "data":
			f = frameOf(s.t, []byte(value))
		case "":
			if line == "" && (f.Error != nil || f.Result.ResumeToken != "") {
				return id, f
			}
		}
	}
	return "", frame{}
}

func (s *eventStream) close() {
	_ = s.resp.Body.Close()
	c, err := checker()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := c.Check("GET", s.resp.Request.URL, s.resp.StatusCode, s.resp.Header, []byte(s.body.String())); err != nil {
		s.t.Error(err)
	}
}

func TestGRPCSubscription(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	c := pb.NewGrpcGatewayClient(w.dial(t))
	s, err := c.SubscribeToEvents(as(t, "alice"))
	if err != nil {
		t.Fatal(err)
	}
	say := func(m *pb.SubscribeToEvents) {
		t.Helper()
		if err := s.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	hear := func() *pb.Event {
		t.Helper()
		m, err := s.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	say(&pb.SubscribeToEvents{CorrelationId: "no action"})
	m := hear()
	want(t, "no action", m.GetOperationProcessed().GetErrorStatus().GetCode(), pb.Event_OperationProcessed_ErrorStatus_ERROR)
	want(t, "no action", m.GetCorrelationId(), "no action")
	want(t, "no action", m.GetSubscriptionId(), "")
	say(&pb.SubscribeToEvents{CorrelationId: "all", Action: &pb.SubscribeToEvents_CreateSubscription_{CreateSubscription: &pb.SubscribeToEvents_CreateSubscription{}}})
	ack := hear()
	want(t, "ack", ack.GetOperationProcessed().GetErrorStatus().GetCode(), pb.Event_OperationProcessed_ErrorStatus_OK)
	w.directory.transfer(fresh, alice)
	w.directory.happen(
		lampA, hub.Event{Kind: hub.MetadataUpdated, Metadata: &hub.Metadata{Connection: hub.Connection{Online: true, ID: "c"}}},
		hub.Event{Kind: hub.LinksPublished, Links: []hub.Link{{Href: "/x"}}}, hub.Event{Kind: hub.LinksUnpublished, Hrefs: []hub.Href{"/x"}}, reports("/x", 1),
	)
	want(t, "unregistered", hear().GetDeviceUnregistered().GetDeviceIds()[0], string(fresh))
	m = hear()
	want(t, "registered", m.GetDeviceRegistered().GetDeviceIds()[0], string(fresh))
	want(t, "hub", m.GetDeviceRegistered().GetEventMetadata().GetHubId(), hubID)
	want(t, "metadata", hear().GetDeviceMetadataUpdated().GetConnection().GetId(), "c")
	want(t, "published", hear().GetResourcePublished().GetResources()[0].GetHref(), "/x")
	want(t, "unpublished", hear().GetResourceUnpublished().GetHrefs()[0], "/x")
	m = hear()
	want(t, "changed", m.GetResourceChanged().GetResourceId().GetHref(), "/x")
	want(t, "subscription", m.GetSubscriptionId(), ack.GetSubscriptionId())
	say(&pb.SubscribeToEvents{Action: &pb.SubscribeToEvents_CancelSubscription_{CancelSubscription: &pb.SubscribeToEvents_CancelSubscription{SubscriptionId: ack.GetSubscriptionId()}}})
	if m = hear(); m.GetSubscriptionCanceled() == nil {
		t.Error(m)
	}
	want(t, "canceled", hear().GetOperationProcessed().GetErrorStatus().GetCode(), pb.Event_OperationProcessed_ErrorStatus_OK)
	if err := s.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("after closing: %v", err)
	}
	s, err = c.SubscribeToEvents(as(t, "scopeless"))
	if err == nil {
		_, err = s.Recv()
	}
	want(t, "scope", status.Code(err), codes.PermissionDenied)
}

// The current state and what happens while it is read are told without gap and without repeating an event.
func TestCurrentState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	w.directory.happen(lampA, reports("/light/1", 1), reports("/other", 1))
	w.directory.happen(lampB, reports("/light/1", 5))
	n := 0
	w.directory.stateHas = func() { // each time that a picture was taken something happens to two devices
		n++
		if n == 1 {
			w.directory.happen(lampA, reports("/light/1", 2)) // after the picture: it comes as an event
			w.directory.happen(lampB, reports("/light/1", 6)) // before the picture: it is in there
		}
	}
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light/1"],"includeCurrentState":true}}`)
	ack := l.expect("OK", "/light/1 1")
	half := l.expect("/light/1 6") // of B's picture
	whole := l.expect("/light/1 2")
	resume := func(token string) *listener {
		l := w.listen(t, "alice", "")
		l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light/1"],"resumeToken":%q}}`, token)
		l.expect("OK")
		return l
	}
	// Who goes away before the state was told whole, and what came beside it, has a gap; with the last message, none.
	w.directory.happen(lampA, reports("/light/1", 3))
	w.directory.happen(lampA, reports("/light/1", 4))
	for _, token := range []string{ack.Result.ResumeToken, half.Result.ResumeToken} {
		again := resume(token)
		want(t, "lagged", again.expect("OK feed-lagged").Result.OperationProcessed.Lagged, true)
		again.expect("/light/1 4", "/light/1 6")
	}
	resume(whole.Result.ResumeToken).expect("/light/1 3", "/light/1 4")
	l.expect("/light/1 3", "/light/1 4")

	// When nothing happened meanwhile, it is the last message, too.
	l = w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light/1"],"includeCurrentState":true}}`)
	whole = l.expect("OK", "/light/1 4", "/light/1 6")
	w.directory.happen(lampA, reports("/light/1", 5))
	w.directory.happen(lampA, reports("/light/1", 6))
	resume(whole.Result.ResumeToken).expect("/light/1 5", "/light/1 6")
}

// A state that has nothing to tell leaves no gap: whoever comes back before anything happened, or after what does not concern
// it, gets the state again, and is told of what it missed, if there is any.
func TestEmptyState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	const filter = `"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/none"]`
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{` + filter + `,"includeCurrentState":true}}`)
	token := l.expect("OK").Result.ResumeToken
	resume := func() *listener {
		l := w.listen(t, "alice", "")
		l.say(`{"createSubscription":{`+filter+`,"resumeToken":%q}}`, token)
		return l
	}
	resume().expect("OK")
	w.directory.happen(lampA, reports("/light/1", 1))
	again := resume()
	again.expect("OK")
	w.directory.happen(lampA, reports("/none", 1))
	again.expect("/none 1")
	l.expect("/none 1")
	token = resume().expect("OK", "OK feed-lagged").Result.ResumeToken
	resume().expect("OK", "/none 1") // the gap is said once
	want(t, "lagged", w.counter(t, "coaphub_api_subscriptions_lagged_total"), 1)
}

// What happens from the acknowledgement on is in the state or told; a command's end is in no state, so it is told.
func TestCommandEndsBesideTheState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	devices := w.identities.devices
	once := false
	w.identities.devices = func(ctx context.Context, o hub.Owner) ([]hub.DeviceID, error) {
		if !once { // behind the acknowledgement, before the pictures
			once = true
			w.directory.happen(lampA, ordered(hub.CommandEnded, hub.CommandUpdate, "/light/1"), reports("/light/1", 3))
		}
		return devices(ctx, o)
	}
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED","RESOURCE_UPDATED"],"hrefFilter":["/light/1"],"deviceIdFilter":[%q],"includeCurrentState":true}}`, lampA)
	l.expect("OK", "/light/1 3")
	if b := string(l.raw()); !strings.Contains(b, `"resourceUpdated"`) {
		t.Errorf("%s", b)
	}
}

// What is trimmed away while the state is told is a gap like any other.
func TestLaggedInTheState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	w.directory.happen(lampA, reports("/light/1", 1))
	n := 0
	w.directory.stateHas = func() {
		if n++; n == 1 {
			w.directory.happen(lampA, reports("/light/1", 2))
			w.directory.trim()
			w.directory.happen(lampA, reports("/light/1", 3))
		}
	}
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"hrefFilter":["/light/1"],"includeCurrentState":true}}`)
	l.expect("OK", "OK feed-lagged", "/light/1 3")
	w.directory.happen(lampA, reports("/light/1", 4))
	l.expect("/light/1 4")
}

// All that a picture has is told.
func TestStateHasEverything(t *testing.T) {
	t.Parallel()
	d := lamp(lampA, "lamp", true)
	waits := func(id string, kind hub.CommandKind, href hub.Href, version uint64) hub.Command {
		return hub.Command{
			CommandEvent: hub.CommandEvent{Kind: kind, ValidUntil: t0}, Device: lampA, ID: id, Href: href,
			Cause: hub.Cause{Known: true, Version: version, Time: t0, Correlation: id},
		}
	}
	d.Commands = []hub.Command{waits("c1", hub.CommandUpdate, "/light/1", 7), waits("c2", hub.CommandTwinOff, "", 3)}
	kinds := map[hub.EventKind]int{}
	var waiting []string
	for c := range stateOf(d) {
		want(t, "device", c.Device, lampA)
		ev := &c.Events[0]
		kinds[ev.Kind]++
		if ev.Kind == hub.CommandPending {
			waiting = append(waiting, fmt.Sprint(ev.Correlation, ev.Href, ev.Command.Kind, ev.Command.ValidUntil == t0, ev.Version))
		}
	}
	wantList(t, "commands", waiting, fmt.Sprint("c1/light/1", hub.CommandUpdate, true, 7), fmt.Sprint("c2", hub.CommandTwinOff, true, 3))
	want(t, "resources", kinds[hub.ResourceChanged], d.Resources.Len())
	want(t, "others", kinds[hub.Registered]+kinds[hub.MetadataUpdated]+kinds[hub.LinksPublished], 3)
	var many linkSet
	for i := range linksPiece + 1 {
		many = append(many, hub.Link{Href: hub.Href(fmt.Sprintf("/%05d", i))})
	}
	d.Links, kinds = many, map[hub.EventKind]int{}
	links := 0
	for c := range stateOf(d) {
		kinds[c.Events[0].Kind]++
		links += len(c.Events[0].Links)
	}
	want(t, "pieces", kinds[hub.LinksPublished], 2)
	want(t, "links", links, many.Len())
	for range stateOf(d) { // stopping early is fine
		break
	}
	want(t, "a device that only signed up", len(collect(stateOf(signedUp(fresh)))), 1)
}

func collect[T any](seq func(func(T) bool)) (out []T) {
	for v := range seq {
		out = append(out, v)
	}
	return out
}

// Whoever was away for too long is told so, and gets the current state.
func TestLagged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"]}}`)
	token := l.expect("OK").Result.ResumeToken
	w.directory.happen(lampA, reports("/light/1", 1))
	w.directory.happen(lampA, reports("/light/1", 2))
	l.expect("/light/1 1", "/light/1 2")
	w.directory.trim()
	late := w.listen(t, "alice", "")
	late.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"resumeToken":%q}}`, token)
	f := late.expect("OK", "OK feed-lagged")
	want(t, "lagged", f.Result.OperationProcessed.Lagged, true)
	f = late.expect("/light/1 2")
	w.directory.happen(lampA, reports("/light/1", 3))
	late.expect("/light/1 3")
	l.expect("/light/1 3") // it had everything, and lags by nothing
	// So does who comes with the place of a log that was restored from a backup.
	w.directory.mu.Lock()
	w.directory.log = "log-2"
	w.directory.mu.Unlock()
	late = w.listen(t, "alice", "")
	late.say(`{"createSubscription":{"eventFilter":["RESOURCE_CHANGED"],"resumeToken":%q}}`, f.Result.ResumeToken)
	late.expect("OK", "OK feed-lagged", "/light/1 3")
	want(t, "lagged", w.counter(t, "coaphub_api_subscriptions_lagged_total"), 2)
}

// A stream ends when its token does, and says why.
func TestStreamEndsWithItsToken(t *testing.T) {
	w := newWorld(t)
	verify := w.verifier.verify
	revoked := make(chan struct{})
	w.verifier.verify = func(ctx context.Context, token string) (hub.Claims, error) {
		select {
		case <-revoked:
			return hub.Claims{}, hub.NewError(hub.Unauthenticated, "token-revoked", "the token was revoked")
		default:
			return verify(ctx, token)
		}
	}
	w.run(t)
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{}}`)
	l.expect("OK")
	s := w.events(t, "alice", "", "")
	s.next()
	g := w.streams(t, "alice")
	close(revoked)
	l.expect("error token-revoked")
	_, _, err := l.Read(t.Context())
	want(t, "WebSocket", websocket.CloseStatus(err), websocket.StatusPolicyViolation)
	_, f := s.next()
	want(t, "server-sent events", f.word(), "error token-revoked")
	_, err = g.Recv()
	code, reason := reasonOf(t, err)
	want(t, "gRPC", code, codes.Unauthenticated)
	want(t, "gRPC", reason, "token-revoked")
}

// streams opens a stream over gRPC, which is live when this returns.
func (w *world) streams(t *testing.T, who string) grpc.BidiStreamingClient[pb.SubscribeToEvents, pb.Event] {
	t.Helper()
	g, err := pb.NewGrpcGatewayClient(w.dial(t)).SubscribeToEvents(as(t, who))
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Send(&pb.SubscribeToEvents{}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Recv(); err != nil {
		t.Fatal(err)
	}
	return g
}

// A provider that cannot be asked ends nobody's stream.
func TestStreamOutlivesTheProvider(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		var kind atomic.Uint32
		kind.Store(uint32(hub.Unavailable))
		w.verifier.verify = func(context.Context, string) (hub.Claims, error) {
			return hub.Claims{}, hub.NewError(hub.Kind(kind.Load()), "", "")
		}
		s := w.newStream(t.Context(), "grpc", w.tokens["alice"], "alice")
		time.Sleep(10 * checkEvery)
		want(t, "cause", context.Cause(s.ctx), nil)
		kind.Store(uint32(hub.Unauthenticated))
		<-s.ctx.Done()
		want(t, "cause", hub.IsKind(context.Cause(s.ctx), hub.Unauthenticated), true)
		s.close()
	})
}

// The hub stops within its time whoever listens, and says that it does.
func TestStopEndsStreams(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	stop := w.run(t)
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{}}`)
	l.expect("OK")
	deaf := w.listen(t, "alice", "") // never reads, so it answers no close
	deaf.say(`{"createSubscription":{}}`)
	s := w.events(t, "alice", "", "")
	s.next()
	g := w.streams(t, "alice")
	stopped := make(chan error, 1)
	go func() { stopped <- stop() }()
	l.expect("error hub-stopping")
	_, _, err := l.Read(t.Context())
	want(t, "WebSocket", websocket.CloseStatus(err), websocket.StatusGoingAway)
	_, f := s.next()
	want(t, "server-sent events", f.word(), "error hub-stopping")
	_, err = g.Recv()
	want(t, "gRPC", status.Code(err), codes.Unavailable)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	for _, door := range []string{"grpc", "websocket", "sse"} {
		want(t, door, w.gauge(t, "coaphub_api_subscriptions", door), 0)
	}
}

// A panic in one subscription ends its stream, and nothing else.
func TestSubscriptionPanicEndsItsStream(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	other := w.listen(t, "bob", "")
	other.say(`{"createSubscription":{}}`)
	other.expect("OK")
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["DEVICE_METADATA_UPDATED"]}}`)
	l.expect("OK")
	w.directory.stateHas = func() { panic("a bug") }
	l.say(`{"createSubscription":{"includeCurrentState":true}}`)
	l.expect("OK", "error internal")
	_, _, err := l.Read(t.Context())
	want(t, "closed", websocket.CloseStatus(err), websocket.StatusInternalError)
	want(t, "panics", w.counter(t, "coaphub_api_panics_total", "subscription"), 1)
	w.directory.happen(bobs, reports("/light/1", 1))
	other.expect("/light/1 1")
}

func TestSubscriptionWhileTheStoreIsAway(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.run(t)
	w.directory.headErr = hub.NewError(hub.Unavailable, "", "")
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{}}`)
	l.expect("ERROR unavailable")
	want(t, "sse", w.get(t, "/api/v1/events/stream").Code, 503)
}

// Each event is encoded once, however many are told it.
func TestEncodingsAreSharedAndBounded(t *testing.T) {
	t.Parallel()
	var c encodings
	e := eventElement{&hub.Commit{Device: lampA, Events: []hub.Event{reports("/a", 1)}}, 0, hubID}
	first := string(c.append([]byte("{"), e, true))
	e.commit.Events[0] = reports("/a", 2) // nobody does that: it shows where the second answer comes from
	want(t, "the second", string(c.append([]byte("{"), e, true)), first)
	if got := string(c.append([]byte("{"), e, false)); got == first {
		t.Error("what is not shared was taken from the others")
	}
	big := strings.Repeat("x", 100<<10)
	for i := range 100 {
		ev := reports("/a", i)
		ev.Content.Data = []byte(`"` + big + `"`)
		c.append(nil, eventElement{&hub.Commit{Device: lampA, Events: []hub.Event{ev}}, 0, hubID}, true)
	}
	if n := len(c.young) + len(c.older); n > 2*maxEncodings/len(big) {
		t.Errorf("%d are kept", n)
	}
}

// Who reads nothing for too long is cut off, at each door; who goes away is no error.
func TestStreamsOfReadersThatStallOrGo(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(c *Config, _ *Deps) { c.Limits.StallTimeout = 200 * time.Millisecond })
	w.run(t)
	_, grpcAddr := w.Addresses()
	conn, err := grpc.NewClient(grpcAddr.String(), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = conn.Close() }()
	l := w.listen(t, "alice", "")
	l.say(`{"createSubscription":{}}`)
	l.expect("OK")
	s := w.events(t, "alice", "", "")
	s.next()
	g, err := pb.NewGrpcGatewayClient(conn).SubscribeToEvents(as(t, "alice"))
	if err != nil {
		t.Fatal(err)
	}
	if err := g.Send(&pb.SubscribeToEvents{Action: &pb.SubscribeToEvents_CreateSubscription_{CreateSubscription: &pb.SubscribeToEvents_CreateSubscription{}}}); err != nil {
		t.Fatal(err)
	}
	if _, err := g.Recv(); err != nil {
		t.Fatal(err)
	}
	// Nobody reads any more; sooner or later the connections take nothing more either.
	ev := reports("/a", 1)
	ev.Content.Data = []byte(`"` + strings.Repeat("x", 200<<10) + `"`)
	doors := []string{"grpc", "websocket", "sse"}
	ended := func() bool {
		return !slices.ContainsFunc(doors, func(door string) bool { return w.gauge(t, "coaphub_api_subscriptions", door) > 0 })
	}
	for i := 0; i < 100; i++ { // 20 MB
		w.directory.happen(lampA, ev)
	}
	w.until(t, "the stalled streams end", ended)
	for _, of := range [][]string{{"subscribeWebSocket", "http"}, {"subscribeEvents", "http"}, {"SubscribeToEvents", "grpc"}} {
		w.until(t, of[0]+" is counted as stalled", func() bool {
			n := w.counter(t, "coaphub_api_requests_total", of[0], of[1], "deadline")
			if of[0] == "subscribeEvents" { // net/http ends the request with the write that failed, as if the client had gone
				n += w.counter(t, "coaphub_api_requests_total", of[0], of[1], "gone")
			}
			return n == 1
		})
	}
	// And one that is simply gone.
	before := w.counter(t, "coaphub_api_requests_total", "subscribeEvents", "http", "gone")
	l = w.listen(t, "alice", "")
	l.say(`{"createSubscription":{"eventFilter":["REGISTERED"]}}`)
	l.expect("OK")
	_ = l.CloseNow()
	s = w.events(t, "alice", "eventFilter=REGISTERED", "")
	s.next()
	s.close()
	w.until(t, "the streams that are gone end", func() bool {
		return w.counter(t, "coaphub_api_requests_total", "subscribeWebSocket", "http", "gone")+w.counter(t, "coaphub_api_requests_total", "subscribeEvents", "http", "gone") == before+2
	})
	if log := w.log.String(); strings.Contains(log, "level=ERROR") {
		t.Error(log)
	}
}

// until polls until ok.
func (w *world) until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("it never happened: %s", what)
		}
	}
}

// A WebSocket is asked whether its peer is there when nothing was sent for a while; who does not answer in time loses it, and
// no sooner.
func TestWebSocketWithoutPongs(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t)
		near, far := net.Pipe()
		conns := make(chan net.Conn, 1)
		conns <- far
		srv := &http.Server{Handler: w.HTTPHandler()} //nolint:gosec // nobody is slow here
		over := make(chan error, 1)
		go func() { over <- srv.Serve(pipeListener{conns, make(chan struct{})}) }()
		if _, err := io.WriteString(near, "GET /api/v1/ws/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
			"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Protocol: Bearer, alice\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		from := bufio.NewReader(near)
		resp, err := http.ReadResponse(from, nil)
		if err != nil {
			t.Fatal(err)
		}
		_ = resp.Body.Close()
		want(t, "status", resp.StatusCode, http.StatusSwitchingProtocols)
		begun := time.Now()
		opcode := func() (byte, []byte) { // RFC 6455, Section 5.2; frames of a server are not masked, and these are short
			t.Helper()
			head := make([]byte, 2)
			if _, err := io.ReadFull(from, head); err != nil {
				t.Fatal(err)
			}
			size := int64(head[1])
			if size == 126 {
				if _, err := io.ReadFull(from, head); err != nil {
					t.Fatal(err)
				}
				size = int64(head[0])<<8 | int64(head[1])
			}
			body, err := io.ReadAll(io.LimitReader(from, size))
			if err != nil {
				t.Fatal(err)
			}
			return head[0] & 0x0f, body
		}
		ping := func() []byte {
			t.Helper()
			op, body := opcode()
			want(t, "a ping", op, 0x9)
			return body
		}
		for range 3 { // answered, it stays
			body := ping()
			if _, err := near.Write(append([]byte{0x8a, 0x80 | byte(len(body)), 0, 0, 0, 0}, body...)); err != nil {
				t.Fatal(err)
			}
		}
		want(t, "three pings", time.Since(begun), 3*keepAlive)
		ping()
		asked := time.Now()
		_, err = io.Copy(io.Discard, from)
		want(t, "the end", err, nil)
		if d := time.Since(asked); d < w.cfg.Limits.StallTimeout || d > w.cfg.Limits.StallTimeout+10*time.Second {
			t.Errorf("it ended %v after the ping", d)
		}
		_ = srv.Close()
		want(t, "server", errors.Is(<-over, http.ErrServerClosed), true)
	})
}

// pipeListener hands out the connections that are put into it.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
}

func (l pipeListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}
func (l pipeListener) Close() error   { close(l.done); return nil }
func (l pipeListener) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)} }
