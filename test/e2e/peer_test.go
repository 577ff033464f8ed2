package e2e_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/tcp/coder"

	"github.com/coaphub/coaphub/test/device"
)

// peer is a device as bytes on a connection: it sends what a test tells it to, malformed frames included, answers the
// hub's requests from a table of resources, and sees when the hub closes. It uses go-coap's coders and no engine at all.
type peer struct {
	conn   net.Conn
	closed chan struct{} // the connection is gone
	// datagrams is nil on a stream.
	datagrams *datagrams

	// inOrder is held from looking at a resource until what it was has been written: what is newer comes later.
	inOrder sync.Mutex

	heard chan message.Message // of what it observes

	mu        sync.Mutex
	wait      map[string]chan message.Message // answers by token
	observing map[string]message.Token        // by path
	next      uint32
	resources map[string]*served
	endpoints []string // where it says that it is
	requests  []string // what the hub asked, "GET /oic/res?if=oic.if.ll"
}

// served is one resource of a peer.
type served struct {
	value   any
	etag    []byte
	format  message.MediaType
	raw     []byte // sent in place of value when not nil
	token   []byte // of the hub's observation
	observe uint32
	code    codes.Code // answered instead of 2.05 when not zero
	silent  bool       // nothing is answered
}

func dialPeer(ctx context.Context, addr string, conf *tls.Config) (*peer, error) {
	d := net.Dialer{Timeout: 5 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	if conf != nil {
		tc := tls.Client(conn, conf)
		if err := tc.HandshakeContext(ctx); err != nil {
			conn.Close()
			return nil, err
		}
		conn = tc
	}
	return startPeer(conn)
}

// dialWebSocket is a peer over WebSocket, at an endpoint of scheme coap+ws.
func dialWebSocket(ctx context.Context, endpoint string) (*peer, error) {
	conn, err := device.DialWebSocket(ctx, strings.TrimPrefix(endpoint, "coap+ws://"), nil)
	if err != nil {
		return nil, err
	}
	return startPeer(conn)
}

// startPeer makes a peer of a stream: it says what it takes.
func startPeer(conn net.Conn) (*peer, error) {
	p := newPeer(conn, nil)
	csm := message.Message{Code: codes.CSM, Options: message.Options{{ID: message.OptionID(2), Value: []byte{0x10, 0, 0}}}}
	if err := p.send(csm); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

// newPeer begins to read from conn.
func newPeer(conn net.Conn, d *datagrams) *peer {
	p := &peer{
		conn: conn, datagrams: d, closed: make(chan struct{}), wait: map[string]chan message.Message{}, resources: map[string]*served{},
		heard: make(chan message.Message, 64), observing: map[string]message.Token{},
	}
	go p.read()
	return p
}

func (p *peer) close() {
	p.conn.Close()
	<-p.closed
}

func (p *peer) send(m message.Message) error {
	if p.datagrams != nil {
		return p.sendDatagram(m, nil)
	}
	n, err := coder.DefaultCoder.Size(m)
	if err != nil {
		return err
	}
	buf := make([]byte, n)
	if _, err := coder.DefaultCoder.Encode(m, buf); err != nil {
		return err
	}
	_, err = p.conn.Write(buf)
	return err
}

// read owns the connection's reading side; it ends with the connection.
func (p *peer) read() {
	defer close(p.closed)
	defer p.conn.Close()
	if p.datagrams != nil {
		p.readDatagrams()
		return
	}
	var buf []byte
	chunk := make([]byte, 64<<10)
	for {
		for {
			m, n, err := decode(buf)
			if err != nil {
				break
			}
			buf = buf[n:]
			p.take(m)
		}
		n, err := p.conn.Read(chunk)
		if err != nil {
			return
		}
		buf = append(buf, chunk[:n]...)
	}
}

func decode(buf []byte) (message.Message, int, error) {
	m := message.Message{Options: make(message.Options, 0, 32)}
	if len(buf) < 2 {
		return m, 0, message.ErrShortRead
	}
	var h coder.MessageHeader
	if _, err := coder.DefaultCoder.DecodeHeader(buf, &h); err != nil {
		return m, 0, err
	}
	if uint32(len(buf)) < h.MessageLength {
		return m, 0, message.ErrShortRead
	}
	// The coder takes all it gets for this message's.
	n, err := coder.DefaultCoder.Decode(buf[:h.MessageLength], &m)
	if err != nil {
		return m, 0, err
	}
	m.Token = bytes.Clone(m.Token)
	m.Payload = bytes.Clone(m.Payload)
	for i := range m.Options {
		m.Options[i].Value = bytes.Clone(m.Options[i].Value)
	}
	return m, n, nil
}

func (p *peer) take(m message.Message) {
	switch {
	case m.Code == codes.Ping:
		_ = p.send(message.Message{Code: codes.Pong, Token: m.Token})
	case m.Code >= codes.GET && m.Code < 0x20:
		p.inOrder.Lock()
		a, answered := p.answer(m)
		if !answered {
			p.inOrder.Unlock()
			return
		}
		a.Type, a.MessageID = message.Acknowledgement, m.MessageID // over TCP they mean nothing
		_ = p.send(a)
		p.inOrder.Unlock()
	case m.Code >= 0xe0 || m.Code == 0:
	default:
		p.mu.Lock()
		ch := p.wait[string(m.Token)]
		delete(p.wait, string(m.Token))
		p.mu.Unlock()
		if ch == nil {
			ch = p.heard // the hub sends nothing else that has no request
		}
		select {
		case ch <- m:
		default: // nobody listens
		}
	}
}

// answer serves the hub's request from the table; false: not at all.
func (p *peer) answer(req message.Message) (message.Message, bool) {
	path, _ := req.Options.Path()
	queries, _ := req.Options.Queries()
	observe, observeErr := req.Options.Observe()
	p.mu.Lock()
	defer p.mu.Unlock()
	said := methods[req.Code] + " " + path
	if len(queries) > 0 {
		said += "?" + strings.Join(queries, "&")
	}
	if observeErr == nil {
		said += fmt.Sprintf(" observe=%d", observe)
	}
	p.requests = append(p.requests, said)
	res := message.Message{Code: codes.Content, Token: req.Token}
	if path == "/oic/res" {
		var links []map[string]any
		for href := range p.resources {
			link := map[string]any{"href": href, "p": map[string]any{"bm": 3}}
			if href == "/oic/d" {
				var eps []map[string]any
				for _, e := range p.endpoints {
					eps = append(eps, map[string]any{"ep": e, "pri": 1})
				}
				link["rt"], link["eps"] = []string{"oic.wk.d"}, eps
			}
			links = append(links, link)
		}
		res.Payload, _ = cbor.Marshal(links)
		res.Options = withFormat(nil, message.AppOcfCbor)
		return res, true
	}
	r := p.resources[path]
	switch {
	case r == nil:
		res.Code = codes.NotFound
		return res, true
	case r.silent:
		return res, false
	case req.Code != codes.GET && r.code == 0:
		return p.command(r, path, req), true
	}
	if observeErr == nil && observe == 0 {
		r.token = req.Token
	} else if observeErr == nil {
		r.token = nil
	}
	return p.represent(r, req.Token), true
}

// command does what a request other than GET asks: a POST or iPATCH puts its members over the value, or makes a resource of its
// body; FETCH names the members that it wants; PATCH it does not know. p.mu is held.
func (p *peer) command(r *served, path string, req message.Message) message.Message {
	res := message.Message{Code: codes.Changed, Token: req.Token}
	queries, _ := req.Options.Queries()
	var body map[string]any
	bad := cbor.Unmarshal(req.Payload, &body) != nil
	var wanted []string
	switch {
	case methods[req.Code] == "PATCH":
		res.Code = codes.MethodNotAllowed
		return res
	case methods[req.Code] == "FETCH" && cbor.Unmarshal(req.Payload, &wanted) == nil:
		res.Code = codes.Content
		all, _ := cbor.Marshal(r.value)
		_ = cbor.Unmarshal(all, &body)
		maps.DeleteFunc(body, func(name string, _ any) bool { return !slices.Contains(wanted, name) })
	case req.Code == codes.DELETE:
		res.Code = codes.Deleted
		delete(p.resources, path)
		return res
	case bad:
		res.Code = codes.BadRequest
		return res
	case slices.Contains(queries, "if=oic.if.create"):
		res.Code = codes.Created
		p.resources[path+"/1"] = &served{format: r.format, value: body["rep"]}
		body["href"] = path + "/1"
	default:
		var value map[string]any
		old, _ := cbor.Marshal(r.value)
		_ = cbor.Unmarshal(old, &value)
		if value == nil {
			value = map[string]any{}
		}
		maps.Copy(value, body)
		r.value, body = value, value
	}
	res.Payload, _ = cbor.Marshal(body)
	res.Options = withFormat(nil, message.AppOcfCbor)
	return res
}

// asked returns what the hub has asked since the last call.
func (p *peer) asked() []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := p.requests
	p.requests = nil
	return out
}

// ignores makes a resource that never answers.
func (p *peer) ignores(href string) {
	p.serve(href, nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resources[href].silent = true
}

// represent makes a response of the resource; p.mu is held.
func (p *peer) represent(r *served, token []byte) message.Message {
	m := message.Message{Code: codes.Content, Token: token}
	if r.code != 0 {
		m.Code = r.code
		return m
	}
	if r.token != nil {
		r.observe++
		m.Options = addUint(m.Options, message.Observe, r.observe)
	}
	if r.etag != nil {
		m.Options = m.Options.Add(message.Option{ID: message.ETag, Value: r.etag})
	}
	m.Options = withFormat(m.Options, r.format)
	m.Payload = r.raw
	if m.Payload == nil {
		m.Payload, _ = sorted.Marshal(r.value)
	}
	return m
}

// sorted writes the same value in the same bytes: else it would be a change each time it is asked for.
var sorted, _ = cbor.CanonicalEncOptions().EncMode()

// serve sets a resource; notify also tells the hub if it observes it.
func (p *peer) serve(href string, value any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.resources[href]
	if r == nil {
		r = &served{format: message.AppOcfCbor}
		p.resources[href] = r
	}
	r.value = value
}

// tags gives a resource an ETag.
func (p *peer) tags(href string, etag []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.resources[href].etag = etag
}

// livesAt makes the device say where it is in its own network.
func (p *peer) livesAt(endpoints ...string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.endpoints = endpoints
}

// drop takes a resource away.
func (p *peer) drop(href string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.resources, href)
}

// notify sets a resource and tells the hub, which must observe it.
func (p *peer) notify(href string, value any) error { return p.notifyAsking(href, value, nil) }

// notifyAsking is notify; over datagrams heard, which may be nil and must have room, is told whether the hub acknowledged it.
func (p *peer) notifyAsking(href string, value any, heard chan<- bool) error {
	p.inOrder.Lock()
	defer p.inOrder.Unlock()
	p.serve(href, value)
	p.mu.Lock()
	r := p.resources[href]
	if r.token == nil {
		p.mu.Unlock()
		return errors.New("the hub does not observe " + href)
	}
	m := p.represent(r, r.token)
	p.mu.Unlock()
	if p.datagrams != nil {
		return p.sendDatagram(m, heard)
	}
	return p.send(m)
}

func (p *peer) serves(href string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.resources[href] != nil
}

func (p *peer) observed(href string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	r := p.resources[href]
	return r != nil && r.token != nil
}

// do sends a request and waits for its whole answer. closed reports that the connection ended before one came.
func (p *peer) do(ctx context.Context, m message.Message) (res message.Message, closed bool, err error) {
	var body []byte
	for next := uint32(0); ; next++ {
		if next > 0 { // RFC 7959, Section 2.4
			m.Options = addUint(m.Options.Remove(message.Block2), message.Block2, next<<4|6)
			m.Payload = nil
		}
		res, closed, err = p.exchange(ctx, m)
		body = append(body, res.Payload...)
		if b, e := res.Options.GetUint32(message.Block2); closed || err != nil || e != nil || b&8 == 0 {
			res.Payload = body
			return res, closed, err
		}
	}
}

func (p *peer) exchange(ctx context.Context, m message.Message) (res message.Message, closed bool, err error) {
	ch := make(chan message.Message, 1)
	p.mu.Lock()
	if m.Token == nil {
		p.next++
		m.Token = binary.BigEndian.AppendUint32([]byte{0xd0}, p.next)
	}
	p.wait[string(m.Token)] = ch
	p.mu.Unlock()
	if err := p.send(m); err != nil {
		return res, true, nil //nolint:nilerr // a write to a closed connection is the answer
	}
	select {
	case res := <-ch:
		return res, false, nil
	case <-p.closed:
		select {
		case res := <-ch:
			return res, false, nil
		default:
			return res, true, nil
		}
	case <-ctx.Done():
		return res, false, ctx.Err()
	}
}

// observe registers (0) or deregisters (1) for a resource; what comes after the answer is heard.
func (p *peer) observe(ctx context.Context, target string, value uint32) (message.Message, error) {
	m := request(codes.GET, target, nil)
	m.Options = addUint(m.Options, message.Observe, value)
	p.mu.Lock()
	if p.observing[target] == nil {
		p.next++
		p.observing[target] = binary.BigEndian.AppendUint32([]byte{0x0b}, p.next)
	}
	m.Token = p.observing[target]
	p.mu.Unlock()
	res, closed, err := p.exchange(ctx, m)
	if closed && err == nil {
		err = net.ErrClosed
	}
	return res, err
}

// waitClosed reports whether the hub closed the connection within d.
func (p *peer) waitClosed(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-p.closed:
		return true
	case <-t.C:
		return false
	}
}

func request(code codes.Code, target string, payload []byte) message.Message {
	m := message.Message{Code: code, Payload: payload}
	path, query, _ := strings.Cut(target, "?")
	for seg := range strings.SplitSeq(strings.Trim(path, "/"), "/") {
		if seg != "" {
			m.Options = m.Options.Add(message.Option{ID: message.URIPath, Value: []byte(seg)})
		}
	}
	if payload != nil {
		m.Options = withFormat(m.Options, message.AppOcfCbor)
	}
	if query != "" {
		for q := range strings.SplitSeq(query, "&") {
			m.Options = m.Options.Add(message.Option{ID: message.URIQuery, Value: []byte(q)})
		}
	}
	return m
}

func withFormat(o message.Options, f message.MediaType) message.Options {
	return addUint(o, message.ContentFormat, uint32(f))
}

func addUint(o message.Options, id message.OptionID, v uint32) message.Options {
	b := binary.BigEndian.AppendUint32(nil, v)
	b = bytes.TrimLeft(b, "\x00")
	return o.Add(message.Option{ID: id, Value: b})
}

// codeText is "2.04" for codes.Changed.
func codeText(c codes.Code) string { return fmt.Sprintf("%d.%02d", c>>5, c&0x1f) }

var methods = []string{"", "GET", "POST", "PUT", "DELETE", "FETCH", "PATCH", "iPATCH"}

func parseMethod(s string) (codes.Code, error) {
	i := slices.Index(methods, s)
	if i < 1 {
		return 0, fmt.Errorf("no method %q", s)
	}
	return codes.Code(i), nil
}
