package device

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	coapnet "github.com/plgd-dev/go-coap/v3/net"
	"github.com/plgd-dev/go-coap/v3/net/blockwise"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/tcp/client"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const testID = "00000000-0000-4000-8000-000000000001"

// fakeHub is as much of a hub as a device needs: go-coap's server, which takes everything.
type fakeHub struct {
	t    *testing.T
	addr string

	mu      sync.Mutex // guards all below
	conns   []mux.Conn
	refuse  map[string]codes.Code // by path
	with    message.Options       // of refusals
	expires int64
	seen    []string       // "POST /oic/rd"
	bodies  map[string]any // the last by path
	codes   map[string]int // sign-ups by code
}

func startHub(t *testing.T) *fakeHub {
	t.Helper()
	l, err := coapnet.NewTCPListener("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	h := &fakeHub{t: t, addr: "coap+tcp://" + l.Addr().String(), refuse: map[string]codes.Code{}, expires: -1, bodies: map[string]any{}, codes: map[string]int{}}
	s := tcp.NewServer(
		options.WithMux(mux.HandlerFunc(h.serve)),
		options.WithErrors(func(error) {}),
		options.WithMaxMessageSize(1<<20),
		options.WithBlockwise(true, blockwise.SZX1024, 5*time.Second),
		options.WithPeriodicRunner(func(func(time.Time) bool) {}),
		options.WithOnNewConn(func(cc *client.Conn) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.conns = append(h.conns, cc)
		}),
	)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() {
		s.Stop()
		_ = l.Close()
		<-done
	})
	return h
}

func (h *fakeHub) serve(w mux.ResponseWriter, m *mux.Message) {
	path, _ := m.Path()
	payload, _ := m.ReadBody()
	var body any
	_ = decoder.Unmarshal(payload, &body)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.seen = append(h.seen, m.Code().String()+" "+path)
	h.bodies[path] = body
	fields, _ := body.(map[string]any)
	if code := h.refuse[path]; code != 0 {
		_ = w.SetResponse(code, message.TextPlain, strings.NewReader("refused"), h.with...)
		if path != "/oic/rd" {
			cc := w.Conn()
			time.AfterFunc(20*time.Millisecond, func() { _ = cc.Close() }) // as a hub does
		}
		return
	}
	var out any
	code := codes.Changed
	switch m.Code().String() + " " + path {
	case "POST /oic/sec/account":
		text, _ := fields["accesstoken"].(string)
		h.codes[text]++
		out = map[string]any{"accesstoken": "a", "refreshtoken": "r", "uid": "alice", "expiresin": h.expires, "redirecturi": ""}
	case "POST /oic/sec/tokenrefresh":
		out = map[string]any{"accesstoken": "a2", "refreshtoken": "r2", "expiresin": h.expires}
	case "POST /oic/sec/session":
		out = map[string]any{"expiresin": h.expires}
	case "DELETE /oic/sec/account", "DELETE /oic/rd":
		code = codes.Deleted
	case "POST /oic/rd":
		links, _ := fields["links"].([]any)
		var stored []any // a few: go-coap's server does not get along with Block1 and Block2 in one exchange
		for i, l := range links[:min(len(links), 10)] {
			stored = append(stored, map[string]any{"href": l.(map[string]any)["href"], "ins": 100 + i})
		}
		out = map[string]any{"di": testID, "links": stored}
	case "GET /oic/rd":
		code, out = codes.Content, map[string]any{"sel": 0}
	default:
		code = codes.NotFound
	}
	if out == nil {
		_ = w.SetResponse(code, message.TextPlain, nil)
		return
	}
	b, _ := encoder.Marshal(out)
	_ = w.SetResponse(code, message.AppOcfCbor, bytes.NewReader(b))
}

func (h *fakeHub) set(f func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f()
}

// conn is the hub's side of the newest connection.
func (h *fakeHub) conn() mux.Conn {
	h.t.Helper()
	var cc mux.Conn
	until(h.t, "a connection", func() bool {
		h.set(func() {
			if len(h.conns) > 0 {
				cc = h.conns[len(h.conns)-1]
			}
		})
		return cc != nil
	})
	return cc
}

func (h *fakeHub) saw(what string) (n int) {
	h.set(func() {
		for _, s := range h.seen {
			if s == what {
				n++
			}
		}
	})
	return n
}

func (h *fakeHub) body(path string) (m map[string]any) {
	h.set(func() { m, _ = h.bodies[path].(map[string]any) })
	return m
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(10 * time.Second)
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("no %s within 10 s", what)
		}
		<-tick.C
	}
}

func connect(t *testing.T, h *fakeHub, edit func(*Config)) *Device {
	t.Helper()
	cfg := Config{ID: testID, HubAddr: h.addr, Provider: "plgd.web"}
	if edit != nil {
		edit(&cfg)
	}
	d, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(d.Close)
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	return d
}

// ask is a request of the hub to the device.
func ask(t *testing.T, cc mux.Conn, code codes.Code, path string, body any, opts ...message.Option) Answer {
	t.Helper()
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Second)
	defer stop()
	req := cc.AcquireMessage(ctx)
	defer cc.ReleaseMessage(req)
	token, err := message.GetToken()
	if err != nil {
		t.Fatal(err)
	}
	req.SetToken(token)
	req.SetCode(code)
	if err := req.SetPath(path); err != nil {
		t.Fatal(err)
	}
	for _, o := range opts {
		req.AddOptionBytes(o.ID, o.Value)
	}
	if body != nil {
		b, err := encoder.Marshal(body)
		if err != nil {
			t.Fatal(err)
		}
		req.SetContentFormat(message.AppOcfCbor)
		req.SetBody(bytes.NewReader(b))
	}
	resp, err := cc.Do(req)
	if err != nil {
		t.Fatalf("%v %s: %v", code, path, err)
	}
	defer cc.ReleaseMessage(resp)
	return answerOf(t, resp)
}

func answerOf(t *testing.T, m *pool.Message) Answer {
	a := Answer{Code: m.Code(), Format: -1}
	if m.Body() != nil {
		var err error
		if a.Raw, err = m.ReadBody(); err != nil {
			t.Error(err)
		}
	}
	if f, err := m.ContentFormat(); err == nil {
		a.Format = int(f)
		if err := decoder.Unmarshal(a.Raw, &a.Body); err != nil {
			t.Error(err)
		}
	}
	if e, err := m.ETag(); err == nil {
		a.ETag = bytes.Clone(e)
	}
	return a
}

func q(s string) message.Option { return message.Option{ID: message.URIQuery, Value: []byte(s)} }

func etag(b []byte) message.Option { return message.Option{ID: message.ETag, Value: b} }

func TestCloudLife(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := connect(t, h, nil)
	check := func(what string, a Answer, err error, want codes.Code) {
		t.Helper()
		if err != nil || a.Code != want {
			t.Fatalf("%s: %v %v, want %v", what, a, err, want)
		}
	}
	a, err := d.SignUp(t.Context(), "code-1")
	check("sign up", a, err, codes.Changed)
	if b := h.body("/oic/sec/account"); b["di"] != testID || b["accesstoken"] != "code-1" || b["authprovider"] != "plgd.web" || b["devicetype"] != "device" {
		t.Errorf("sign-up body %v", b)
	}
	if c := d.Credentials(); c.UID != "alice" || c.Access != "a" || c.Refresh != "r" || !c.Expires.IsZero() {
		t.Errorf("credentials %+v", c)
	}
	a, err = d.SignIn(t.Context())
	check("sign in", a, err, codes.Changed)
	if b := h.body("/oic/sec/session"); b["uid"] != "alice" || b["login"] != true {
		t.Errorf("sign-in body %v", b)
	}
	a, err = d.Publish(t.Context())
	check("publish", a, err, codes.Changed)
	links, _ := h.body("/oic/rd")["links"].([]any)
	if len(links) != 4 || len(d.Hrefs()) != 4 {
		t.Errorf("%d links, want /oic/d, /oic/p, /light/1, /info", len(links))
	}
	a, err = d.Unpublish(t.Context(), "/info")
	check("unpublish", a, err, codes.Deleted)
	if _, err := d.Unpublish(t.Context(), "/nothing"); err == nil {
		t.Error("unpublished what was never published")
	}
	h.set(func() { h.expires = 3600 })
	a, err = d.Refresh(t.Context())
	check("refresh", a, err, codes.Changed)
	if c := d.Credentials(); c.Access != "a2" || c.Refresh != "r2" || c.UID != "alice" || time.Until(c.Expires) < 59*time.Minute {
		t.Errorf("credentials %+v", c)
	}
	a, err = d.Get(t.Context(), "/oic/rd")
	check("selector", a, err, codes.Content)
	if n, ok := a.Int("sel"); !ok || n != 0 {
		t.Errorf("selector %v", a)
	}
	a, err = d.SignOut(t.Context())
	check("sign out", a, err, codes.Changed)
	a, err = d.SignOff(t.Context())
	check("sign off", a, err, codes.Deleted)
	if c := d.Credentials(); c != (Credentials{}) {
		t.Errorf("credentials %+v after sign-off", c)
	}
	a, err = d.Get(t.Context(), "/nowhere")
	check("unknown path", a, err, codes.NotFound)
	if err := d.Ping(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestNewRefusesBadConfig(t *testing.T) {
	t.Parallel()
	for _, cfg := range []Config{
		{ID: testID, HubAddr: "127.0.0.1:5684"},
		{ID: testID, HubAddr: "http://127.0.0.1"},
		{ID: testID, HubAddr: "coaps+tcp://127.0.0.1:5684"},
		{HubAddr: "coap+tcp://127.0.0.1"},
		{ID: testID, HubAddr: "coaps://127.0.0.1"},
		{ID: testID, HubAddr: "coap://127.0.0.1", PSK: &PSK{}},
		{ID: testID, HubAddr: "coaps+tcp://127.0.0.1", PSK: &PSK{}},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

func TestServesDiscovery(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	connect(t, h, func(c *Config) { c.Resources = 2 })
	cc := h.conn()
	a := ask(t, cc, codes.GET, "/oic/res", nil, q("if=oic.if.ll"))
	links, _ := a.Body.([]any)
	if a.Code != codes.Content || len(links) != 7 {
		t.Fatalf("%d links in %v, want 7", len(links), a)
	}
	first, _ := links[0].(map[string]any)
	if first["href"] != "/oic/res" || first["p"].(map[string]any)["bm"] != uint64(3) || !slices.Contains(first["if"].([]any), any(ifBatch)) {
		t.Errorf("the link of /oic/res is %v", first)
	}
	a = ask(t, cc, codes.GET, "/oic/res", nil, q("if=oic.if.ll"), q("rt=oic.wk.d"))
	links, _ = a.Body.([]any)
	if len(links) != 1 || !strings.Contains(fmt.Sprint(links[0]), "ep:coap+tcp://127.0.0.1:") {
		t.Errorf("oic.wk.d: %v", a)
	}
	a = ask(t, cc, codes.GET, "/oic/d", nil)
	if a.Text("di") != testID || len(a.ETag) != 8 {
		t.Errorf("/oic/d: %v, ETag %x", a, a.ETag)
	}
	if a := ask(t, cc, codes.GET, "/oic/d", nil, etag(a.ETag)); a.Code != codes.Valid || len(a.Raw) != 0 {
		t.Errorf("/oic/d with its ETag: %v, want 2.03", a)
	}
	a = ask(t, cc, codes.GET, "/light/1", nil, q("if=oic.if.baseline"))
	if !strings.Contains(fmt.Sprint(a.Body), "core.light") {
		t.Errorf("baseline: %v", a)
	}
}

func TestPerResourceDeviceHasNoBatch(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	connect(t, h, func(c *Config) { c.PerResource = true })
	cc := h.conn()
	a := ask(t, cc, codes.GET, "/oic/res", nil, q("if=oic.if.ll"))
	first, _ := a.Body.([]any)[0].(map[string]any)
	if first["p"].(map[string]any)["bm"] != uint64(1) || slices.Contains(first["if"].([]any), any(ifBatch)) {
		t.Errorf("the link of /oic/res is %v", first)
	}
	if a := ask(t, cc, codes.GET, "/oic/res", nil, q("if=oic.if.b")); a.Code != codes.BadRequest {
		t.Errorf("batch: %v, want 4.00", a)
	}
}

func TestBatchETags(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := connect(t, h, nil)
	cc := h.conn()
	batch := func(opts ...message.Option) (Answer, []string) {
		a := ask(t, cc, codes.GET, "/oic/res", nil, append([]message.Option{q("if=oic.if.b")}, opts...)...)
		var hrefs []string
		list, _ := a.Body.([]any)
		for _, e := range list {
			m, _ := e.(map[string]any)
			hrefs = append(hrefs, m["href"].(string))
			if b, ok := m["etag"].([]byte); !ok || !bytes.Equal(b, d.ETag(m["href"].(string))) {
				t.Errorf("etag of %v is %x", m["href"], m["etag"])
			}
		}
		return a, hrefs
	}
	a, hrefs := batch()
	if len(hrefs) != 4 || len(a.ETag) != 8 {
		t.Fatalf("batch of %v, ETag %x", hrefs, a.ETag)
	}
	if a, _ := batch(etag(a.ETag)); a.Code != codes.Valid {
		t.Errorf("nothing new: %v, want 2.03", a)
	}
	before := d.ETag("/info")
	if _, err := d.Set("/light/1", map[string]any{"power": 5}); err != nil {
		t.Fatal(err)
	}
	if _, hrefs := batch(etag(before)); fmt.Sprint(hrefs) != "[/light/1]" {
		t.Errorf("after one change: %v, want it alone", hrefs)
	}
	inc := "incChanges=" + base64.RawURLEncoding.EncodeToString(before) + "," + base64.RawURLEncoding.EncodeToString([]byte("old"))
	if _, hrefs := batch(etag([]byte("unknown!")), q(inc)); fmt.Sprint(hrefs) != "[/light/1]" {
		t.Errorf("by incChanges: %v, want the changed one alone", hrefs)
	}
	if _, hrefs := batch(etag([]byte("unknown!"))); len(hrefs) != 4 {
		t.Errorf("by an unknown ETag: %v, want all", hrefs)
	}
}

func TestNotifications(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := connect(t, h, nil)
	cc := h.conn()
	got := make(chan Answer, 100)
	observed, err := cc.Observe(t.Context(), "/oic/res", func(m *pool.Message) { got <- answerOf(t, m) }, q("if=oic.if.b"))
	if err != nil {
		t.Fatal(err)
	}
	if a := <-got; len(a.Body.([]any)) != 4 {
		t.Errorf("the first answer is %v", a)
	}
	if d.Observed("/oic/res") != 1 {
		t.Error("no observation")
	}
	for i := range 20 {
		if n, err := d.Set("/light/1", map[string]any{"power": uint64(i)}); n != 1 || err != nil {
			t.Fatalf("%d notifications, %v", n, err)
		}
	}
	for i := range 20 {
		a := <-got
		e, _ := a.Body.([]any)[0].(map[string]any)
		if rep := e["rep"].(map[string]any); rep["power"] != uint64(i) {
			t.Fatalf("notification %d is %v", i, a)
		}
	}
	// A command: the answer, then the notification.
	if a := ask(t, cc, codes.POST, "/light/1", map[string]any{"state": true}); a.Code != codes.Changed || a.Map()["power"] != uint64(19) || a.Map()["state"] != true {
		t.Errorf("command: %v, want the merged value", a)
	}
	if a := <-got; !strings.Contains(fmt.Sprint(a.Body), "state:true") {
		t.Errorf("notification of the command: %v", a)
	}
	if err := observed.Cancel(t.Context(), q("if=oic.if.b")); err != nil {
		t.Fatal(err)
	}
	if n, _ := d.Set("/light/1", map[string]any{}); n != 0 || d.Observed("/oic/res") != 0 {
		t.Errorf("%d notifications after the observation was cancelled", n)
	}
	if d.Stats().Notified.Load() != 21 {
		t.Errorf("%d counted, want 21", d.Stats().Notified.Load())
	}
}

func TestObserveOneResource(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := connect(t, h, nil)
	cc := h.conn()
	got := make(chan Answer, 10)
	if _, err := cc.Observe(t.Context(), "/light/1", func(m *pool.Message) { got <- answerOf(t, m) }); err != nil {
		t.Fatal(err)
	}
	<-got
	if n, _ := d.Set("/light/1", map[string]any{"power": uint64(3)}); n != 1 {
		t.Errorf("%d notifications", n)
	}
	if a := <-got; a.Map()["power"] != uint64(3) || !bytes.Equal(a.ETag, d.ETag("/light/1")) {
		t.Errorf("notification %v", a)
	}
	if _, err := cc.Observe(t.Context(), "/info", func(m *pool.Message) { got <- answerOf(t, m) }); err != nil {
		t.Fatal(err)
	}
	<-got
	if d.Observed("/info") != 0 {
		t.Error("/info can be observed")
	}
}

func TestCommandsThatFail(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	connect(t, h, func(c *Config) { c.Errors = []int{404, 503} })
	cc := h.conn()
	for _, tc := range []struct {
		code codes.Code
		path string
		body any
		want codes.Code
	}{
		{codes.GET, "/nothing", nil, codes.NotFound},
		{codes.GET, "/err/404", nil, codes.NotFound},
		{codes.POST, "/err/503", map[string]any{}, codes.ServiceUnavailable},
		{codes.POST, "/info", map[string]any{}, codes.MethodNotAllowed},
		{codes.DELETE, "/light/1", nil, codes.MethodNotAllowed},
		{codes.POST, "/light/1", []any{1}, codes.BadRequest},
		{codes.POST, "/light/1", nil, codes.BadRequest},
		{codes.GET, "/light/1?", nil, codes.NotFound},
	} {
		if a := ask(t, cc, tc.code, tc.path, tc.body); a.Code != tc.want {
			t.Errorf("%v %s: %v, want %v", tc.code, tc.path, a, tc.want)
		}
	}
}

func TestSilentDeviceAnswersNothing(t *testing.T) {
	t.Parallel()
	h := startHub(t)
	d := connect(t, h, func(c *Config) { c.Silent = true })
	cc := h.conn()
	ctx, stop := context.WithCancel(t.Context())
	failed := make(chan error, 1)
	go func() {
		_, err := cc.Get(ctx, "/oic/d")
		failed <- err
	}()
	until(t, "request", func() bool { return d.Stats().Requests.Load() == 1 })
	if err := d.Ping(t.Context()); err != nil { // whatever the device had answered would have come before the Pong
		t.Error(err)
	}
	stop()
	if err := <-failed; !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want no answer", err)
	}
}

func TestLargeBodies(t *testing.T) {
	t.Parallel()
	for _, blockwise := range []bool{false, true} {
		t.Run(fmt.Sprintf("blockwise %v", blockwise), func(t *testing.T) {
			h := startHub(t)
			d := connect(t, h, func(c *Config) { c.Resources, c.Blockwise = 200, blockwise })
			if a, err := d.Publish(t.Context()); err != nil || !a.OK() {
				t.Fatalf("publish: %v", err)
			}
			if links, _ := h.body("/oic/rd")["links"].([]any); len(links) != 204 {
				t.Errorf("%d links arrived, want 204", len(links))
			}
			a := ask(t, h.conn(), codes.GET, "/oic/res", nil, q("if=oic.if.b"))
			if list, _ := a.Body.([]any); len(list) != 204 {
				t.Errorf("%d in the batch, want 204", len(list))
			}
		})
	}
}

func TestCSMSaysWhatTheDeviceTakes(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		blockwise bool
		want      []byte
	}{
		{false, []byte{0x40, 0xe1, 0x23, 0x05, 0x00, 0x00}},
		{true, []byte{0x50, 0xe1, 0x23, 0x05, 0x00, 0x00, 0x20}},
	} {
		here, there := net.Pipe()
		got := make([]byte, len(tc.want))
		done := make(chan error, 1)
		go func() { done <- sendCSM(here, tc.blockwise) }()
		if _, err := there.Read(got); err != nil {
			t.Fatal(err)
		}
		if err := <-done; err != nil || !bytes.Equal(got, tc.want) {
			t.Errorf("CSM %x %v, want %x", got, err, tc.want)
		}
		_ = here.Close()
		_ = there.Close()
	}
}
