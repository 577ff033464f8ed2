package coapgateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/tcp/client"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// device is a device at the other end of a real connection: go-coap's client, not our engine.
type device struct {
	t    *testing.T
	id   hub.DeviceID
	conn *client.Conn

	mu       sync.Mutex // guards all below
	bump     chan struct{}
	res      map[string]resource
	list     any                       // answer to GET /oic/res?if=oic.if.ll; nil: made of res
	batch    func(etags int) *answerOf // answer to GET /oic/res?if=oic.if.b; nil: 4.00
	asked    []string                  // what the hub asked, in order
	got      map[string][]byte         // the body of the last request to a path that had one
	watching map[string]message.Token
	number   uint32 // of notifications
	asking   int    // requests of ours that are under way
	whole    bool   // messages are not cut into blocks
	mute     bool   // nothing that the hub asks is answered
	from     net.IP // its address; nil: any
}

type resource struct {
	code       codes.Code // 0: 2.05
	format     int32
	body       []byte
	observable bool
	etag       []byte
	silent     bool
}

type answerOf struct {
	code codes.Code
	body any
	etag []byte
	once bool // without Observe option
}

func cborOf(t *testing.T, v any) []byte {
	t.Helper()
	b, err := encoding.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (d *device) dial(addr string, conf *tls.Config) error {
	opts := []tcp.Option{
		options.WithMux(mux.HandlerFunc(d.serve)), options.WithErrors(func(error) {}),
		options.WithMaxMessageSize(1 << 20), options.WithLimitClientParallelRequest(0),
		options.WithLimitClientEndpointParallelRequest(0),
		options.WithPeriodicRunner(func(func(time.Time) bool) {}), // its goroutine would outlive the connection
	}
	if d.whole {
		opts = append(opts, options.WithBlockwise(false, 0, time.Second))
	}
	var conn net.Conn
	var err error
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: d.from}}
	if conf != nil {
		conn, err = (&tls.Dialer{NetDialer: dialer, Config: conf}).DialContext(d.t.Context(), "tcp", addr)
	} else {
		conn, err = dialer.DialContext(d.t.Context(), "tcp", addr)
	}
	if err != nil {
		return err
	}
	d.conn, err = tcp.Client(lastWord{conn, d}, append(opts, options.WithCloseSocket())...)
	return err
}

// lastWord tells go-coap of the connection's end when what was asked has its answer: its client drops what it has read and not
// yet handled by then.
type lastWord struct {
	net.Conn
	d *device
}

func (c lastWord) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		c.d.awaitAnswers()
	}
	return n, err
}

// awaitAnswers waits until no request is under way, but not for long: some get no answer.
func (d *device) awaitAnswers() {
	enough := time.After(500 * time.Millisecond)
	for {
		d.mu.Lock()
		asking, bump := d.asking, d.bump
		d.mu.Unlock()
		if asking == 0 {
			return
		}
		select {
		case <-bump:
		case <-enough:
			return
		}
	}
}

// ask notes that one more request is under way, or one less.
func (d *device) ask(more int) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.asking += more
	close(d.bump)
	d.bump = make(chan struct{})
}

// serve answers the hub's requests.
func (d *device) serve(w mux.ResponseWriter, r *mux.Message) {
	path, _ := r.Path()
	queries, _ := r.Queries()
	line := coap.Dotted(r.Code()) + " " + path
	obs, err := r.Observe()
	if err == nil {
		line += fmt.Sprintf(" observe=%d", obs)
	}
	observing := err == nil && obs == 0
	etags := make([][]byte, 8)
	n, _ := r.GetOptionAllBytes(message.ETag, etags)
	for _, e := range etags[:n] {
		line += fmt.Sprintf(" etag=%x", e)
	}
	n2, _ := r.GetOptionAllBytes(message.IfMatch, etags)
	for _, e := range etags[:n2] {
		line += fmt.Sprintf(" if-match=%x", e)
	}
	for _, q := range queries {
		line += " ?" + q
	}
	d.mu.Lock()
	d.asked = append(d.asked, line)
	close(d.bump)
	d.bump = make(chan struct{})
	if b, err := r.ReadBody(); err == nil && len(b) > 0 {
		d.got[path] = b
	}
	res, known := d.res[path]
	mute, list, batch := d.mute, d.list, d.batch
	if list == nil {
		list = d.links()
	}
	if observing {
		d.watching[path] = slices.Clone(r.Token())
	} else if err == nil {
		delete(d.watching, path)
	}
	d.mu.Unlock()
	if mute || res.silent {
		return // nothing is answered, and go-coap goes on
	}
	set := func(code codes.Code, format int32, body, etag []byte, observe bool) {
		var opts message.Options
		if len(etag) > 0 {
			opts = append(opts, message.Option{ID: message.ETag, Value: etag})
		}
		if observe {
			opts = append(opts, message.Option{ID: message.Observe, Value: []byte{2}})
		}
		var rd *bytes.Reader
		if body != nil {
			rd = bytes.NewReader(body)
			_ = w.SetResponse(code, message.MediaType(format), rd, opts...)
			return
		}
		_ = w.SetResponse(code, message.MediaType(format), nil, opts...)
	}
	switch {
	case path == "/oic/res" && slices.Contains(queries, "if=oic.if.ll"):
		if c, ok := list.(codes.Code); ok {
			set(c, 0, nil, nil, false)
			return
		}
		b, ok := list.([]byte)
		if !ok {
			b = cborOf(d.t, list)
		}
		set(codes.Content, 10000, b, nil, false)
	case path == "/oic/res" && slices.Contains(queries, "if=oic.if.b"):
		if batch == nil {
			set(codes.BadRequest, 0, nil, nil, false)
			return
		}
		a := batch(n)
		var body []byte
		if raw, ok := a.body.([]byte); ok {
			body = raw
		} else if a.body != nil {
			body = cborOf(d.t, a.body)
		}
		set(a.code, 10000, body, a.etag, observing && !a.once)
	case !known:
		set(codes.NotFound, 0, nil, nil, false)
	case res.code != 0 && res.code != codes.Content:
		set(res.code, res.format, res.body, nil, false)
	default:
		set(codes.Content, res.format, res.body, res.etag, observing && res.observable)
	}
}

// links are the device's own, as it lists them.
func (d *device) links() []map[string]any {
	var out []map[string]any
	for h, r := range d.res {
		bm := 1
		if r.observable {
			bm = 3
		}
		out = append(out, map[string]any{"href": h, "rt": []string{"x.test"}, "p": map[string]any{"bm": bm}})
	}
	res := map[string]any{"href": "/oic/res", "rt": []string{"oic.wk.res"}, "if": []string{"oic.if.ll"}, "p": map[string]any{"bm": 1}}
	if d.batch != nil {
		res["if"], res["p"] = []string{"oic.if.ll", "oic.if.b"}, map[string]any{"bm": 3}
	}
	return append(out, res)
}

// notify sends a notification of what the hub observes at path.
func (d *device) notify(path string, code codes.Code, format int32, body, etag []byte) {
	d.t.Helper()
	d.mu.Lock()
	token, ok := d.watching[path]
	d.number++
	n := d.number + 10
	d.mu.Unlock()
	if !ok {
		d.t.Fatalf("the hub does not observe %s", path)
	}
	d.send(code, token, format, body, etag, n)
}

func (d *device) send(code codes.Code, token message.Token, format int32, body, etag []byte, observe uint32) {
	m := d.conn.AcquireMessage(d.conn.Context())
	defer d.conn.ReleaseMessage(m)
	m.SetCode(code)
	m.SetToken(token)
	if len(etag) > 0 {
		_ = m.SetETag(etag)
	}
	if observe > 0 {
		m.SetObserve(observe)
	}
	if body != nil {
		m.SetContentFormat(message.MediaType(format))
		m.SetBody(bytes.NewReader(body))
	}
	if err := d.conn.WriteMessage(m); err != nil {
		d.t.Errorf("send notification: %v", err)
	}
}

// awaitAsked waits until the hub asked for line.
func (d *device) awaitAsked(line string) {
	d.t.Helper()
	timeout := time.After(30 * time.Second)
	for {
		d.mu.Lock()
		ok, bump, asked := slices.Contains(d.asked, line), d.bump, slices.Clone(d.asked)
		d.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-bump:
		case <-timeout:
			d.t.Fatalf("the hub did not ask %q but %q", line, asked)
		}
	}
}

// reply is an answer of the hub.
type reply struct {
	code   string
	format int32 // -1: none
	body   []byte
	etag   []byte
	maxAge uint32
}

func (r reply) text() string { return string(r.body) }

// members decodes a CBOR body.
func (r reply) members(t *testing.T) map[string]any {
	t.Helper()
	out := map[string]any{}
	if err := decoding.Unmarshal(r.body, &out); err != nil {
		t.Fatalf("the body %x is no CBOR map: %v", r.body, err)
	}
	return out
}

type option = message.Option

func query(q string) option { return option{ID: message.URIQuery, Value: []byte(q)} }

func accept(format int32) option {
	return option{ID: message.Accept, Value: uintOption(uint32(format))}
}

// try sends a request; the error is the connection's.
func (d *device) try(code codes.Code, path string, body []byte, opts ...option) (reply, error) {
	ctx, cancel := context.WithTimeout(d.t.Context(), 60*time.Second)
	defer cancel()
	m := d.conn.AcquireMessage(ctx)
	defer d.conn.ReleaseMessage(m)
	token, err := message.GetToken()
	if err != nil {
		return reply{}, err
	}
	m.SetCode(code)
	m.SetToken(token)
	m.MustSetPath(path)
	for _, o := range opts {
		m.AddOptionBytes(o.ID, o.Value)
	}
	if body != nil {
		if _, err := m.ContentFormat(); err != nil {
			m.SetContentFormat(message.AppOcfCbor)
		}
		m.SetBody(bytes.NewReader(body))
	}
	d.ask(1)
	defer d.ask(-1)
	resp, err := d.conn.Do(m)
	if err != nil {
		return reply{}, err
	}
	return replyOf(resp)
}

func replyOf(resp *pool.Message) (reply, error) {
	r := reply{code: coap.Dotted(resp.Code()), format: -1}
	if f, err := resp.ContentFormat(); err == nil {
		r.format = int32(f)
	}
	r.etag, _ = resp.ETag()
	r.etag = slices.Clone(r.etag)
	r.maxAge, _ = resp.GetOptionUint32(message.MaxAge)
	var err error
	r.body, err = resp.ReadBody()
	return r, err
}

func (d *device) do(code codes.Code, path string, body []byte, opts ...option) reply {
	d.t.Helper()
	r, err := d.try(code, path, body, opts...)
	if err != nil {
		d.t.Fatalf("%s %s: %v", coap.Dotted(code), path, err)
	}
	return r
}

func (d *device) post(path string, body any, opts ...option) reply {
	d.t.Helper()
	return d.do(codes.POST, path, cborOf(d.t, body), opts...)
}

func (d *device) signIn(token string) reply {
	d.t.Helper()
	return d.post("/oic/sec/session", map[string]any{"di": string(d.id), "uid": "alice", "accesstoken": token, "login": true})
}

// publish publishes hrefs; those with a trailing star are observable.
func (d *device) publish(hrefs ...string) reply {
	d.t.Helper()
	var ls []map[string]any
	for _, h := range hrefs {
		bm := 1
		if strings.HasSuffix(h, "*") {
			bm = 3
		}
		ls = append(ls, map[string]any{"href": strings.TrimSuffix(h, "*"), "rt": []string{"x.test"}, "if": []string{"oic.if.baseline"}, "p": map[string]any{"bm": bm}})
	}
	return d.post("/oic/rd", map[string]any{"di": string(d.id), "ttl": 0, "links": ls})
}

// want checks a reply's code and, for errors, its stable code.
func (d *device) want(r reply, code, text string) reply {
	d.t.Helper()
	if r.code != code || !strings.HasPrefix(r.text(), text) {
		d.t.Fatalf("got %s %q, want %s %q", r.code, r.body, code, text)
	}
	if code[0] >= '4' && r.format != -1 {
		d.t.Errorf("an error has Content-Format %d", r.format)
	}
	return r
}

// awaitClosed waits for the hub to close the connection.
func (d *device) awaitClosed() {
	d.t.Helper()
	select {
	case <-d.conn.Done():
	case <-time.After(30 * time.Second):
		d.t.Fatal("the hub did not close the connection")
	}
}

// alive fails if the connection is closed.
func (d *device) alive() {
	d.t.Helper()
	if r, err := d.try(codes.GET, "/x.plgd.dev/time", nil); err != nil || r.code != "2.05" {
		d.t.Fatalf("the connection does not work any more: %v %v", r, err)
	}
}
