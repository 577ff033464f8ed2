package load

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"sync"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/test/device"
)

// lights are the observed resources of each device.
const lights = 3

func lightHref(i int) string { return "/light/" + strconv.Itoa(i+1) }

var errGone = errors.New("the connection is gone")

// peer is a device. It answers what it is asked for, and does nothing by itself.
type peer struct {
	id         string
	owner      int // whose it is, by number
	on         device.Onboarding
	n          *confirmables
	uid, token string // since the sign-up

	asking    sync.Mutex // one request at a time
	notifying sync.Mutex // notifications leave in the order of their numbers: the hub drops what is older than it has

	mu      sync.Mutex // guards all below
	l       link
	ended   chan struct{} // closed when the connection is gone
	changed chan struct{} // closed and made anew with each observation
	tokens  [lights][]byte
	values  [lights]uint64
	number  uint32 // of the newest notification
	msgID   int32
	reqTok  uint64
	answer  chan reply // of the request under way
}

type reply struct {
	code    codes.Code
	payload []byte
}

// uintOption encodes an option's number (RFC 7252, Section 3.2).
func uintOption(id message.OptionID, n uint32) message.Option {
	b := binary.BigEndian.AppendUint32(nil, n)
	for len(b) > 0 && b[0] == 0 {
		b = b[1:]
	}
	return message.Option{ID: id, Value: b}
}

const ocfCBOR = 10000

// state is about 90 bytes of CBOR with one number, which begins at its fifth byte.
var state = func() []byte {
	rest, err := cbor.Marshal(map[string]any{"state": true, "name": "a light that is measured, of which nobody is to say that it is small"})
	if err != nil {
		panic(err) // constant input
	}
	b := append([]byte{rest[0] + 1, 0x61, 't', 0x1b}, make([]byte, 8)...)
	return append(b, rest[1:]...)
}()

// firstValue keeps values at eight bytes, as CBOR's shortest form has them then.
const firstValue = 1 << 40

func stateOf(v uint64) []byte {
	b := bytes.Clone(state)
	binary.BigEndian.PutUint64(b[4:], v)
	return b
}

// connect opens a connection.
func (p *peer) connect(ctx context.Context) error {
	l, err := dial(ctx, p.on, p.n)
	if err != nil {
		return err
	}
	p.mu.Lock()
	p.l, p.ended, p.changed, p.tokens = l, make(chan struct{}), make(chan struct{}), [lights][]byte{}
	ended := p.ended
	p.mu.Unlock()
	go func() { // ends with the connection
		defer close(ended)
		defer l.close()
		for {
			m, err := l.recv()
			if err != nil || !p.take(l, m) {
				return
			}
		}
	}()
	return nil
}

func (p *peer) datagrams() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.l != nil && p.l.datagrams()
}

// disconnect closes the connection, if there is one, and waits for its end.
func (p *peer) disconnect() {
	p.mu.Lock()
	l, ended := p.l, p.ended
	p.mu.Unlock()
	if l != nil {
		l.close()
		<-ended
	}
}

// take deals with a message; false ends the connection.
func (p *peer) take(l link, m message.Message) bool {
	switch {
	case m.Code == codes.Ping:
		return l.send(message.Message{Code: codes.Pong, Token: m.Token}) == nil
	case m.Code == codes.CSM || m.Code == codes.Pong:
		return true
	case m.Code == codes.Release || m.Code == codes.Abort:
		return false
	case l.datagrams() && m.Type == message.Reset: // RFC 7641, Section 3.6: it ends the observation
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, tok := range p.tokens {
			if tok != nil && bytes.Equal(tok, m.Token) {
				p.tokens[i] = nil
			}
		}
		return true
	case m.Code == codes.Empty:
		if l.datagrams() && m.Type == message.Confirmable { // RFC 7252, Section 4.3: the CoAP ping
			return l.send(message.Message{Type: message.Reset, MessageID: m.MessageID}) == nil
		}
		return true
	case m.Code>>5 == 0:
		return l.send(p.serve(m)) == nil
	}
	if l.datagrams() && m.Type == message.Confirmable {
		if l.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID}) != nil {
			return false
		}
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.answer != nil && bytes.Equal(m.Token, binary.BigEndian.AppendUint64(nil, p.reqTok)) {
		p.answer <- reply{m.Code, bytes.Clone(m.Payload)} // has room for it
		p.answer = nil
	}
	return true
}

// serve answers a request of the hub's.
func (p *peer) serve(m message.Message) message.Message {
	out := message.Message{Code: codes.NotFound, Token: m.Token, Type: message.Acknowledgement, MessageID: m.MessageID}
	path, _ := m.Options.Path()
	if path == "/oic/d" && m.Code == codes.GET {
		out.Code, out.Options = codes.Content, message.Options{uintOption(message.ContentFormat, ocfCBOR)}
		out.Payload, _ = cbor.Marshal(map[string]any{"n": "load " + p.id[:8], "di": p.id, "rt": []string{"oic.wk.d", "oic.d.light"}})
		return out
	}
	n, ok := 0, false
	for i := range lights {
		if path == lightHref(i) {
			n, ok = i, true
		}
	}
	if !ok {
		return out
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	out.Payload = stateOf(p.values[n])
	switch m.Code {
	case codes.GET:
		out.Code = codes.Content
		switch v, err := m.Options.Observe(); {
		case err == nil && v == 0:
			p.tokens[n] = bytes.Clone(m.Token)
			p.number++
			out.Options = message.Options{uintOption(message.Observe, p.number)}
			close(p.changed)
			p.changed = make(chan struct{})
		case err == nil:
			p.tokens[n] = nil
		}
	case codes.POST:
		out.Code = codes.Changed
	default:
		out.Code, out.Payload = codes.MethodNotAllowed, nil
		return out
	}
	out.Options = append(out.Options, uintOption(message.ContentFormat, ocfCBOR))
	return out
}

var errNotObserved = errors.New("a notification could not be sent: the resource is not observed")

// notify sends a resource's value to the hub.
func (p *peer) notify(light int, v uint64) error {
	p.notifying.Lock()
	defer p.notifying.Unlock()
	p.mu.Lock()
	tok := p.tokens[light]
	if tok == nil {
		p.mu.Unlock()
		return errNotObserved
	}
	p.values[light] = v
	p.number++
	p.msgID = (p.msgID + 1) & 0xffff
	m := message.Message{
		Code: codes.Content, Token: tok, Type: message.Confirmable, MessageID: p.msgID, Payload: stateOf(v),
		Options: message.Options{uintOption(message.Observe, p.number&0xffffff), uintOption(message.ContentFormat, ocfCBOR)},
	}
	l := p.l
	p.mu.Unlock()
	if err := l.send(m); err != nil {
		return fmt.Errorf("a notification could not be sent: %w", err)
	}
	return nil
}

// observed waits until the hub observes all lights.
func (p *peer) observed(ctx context.Context) error {
	for {
		p.mu.Lock()
		n := 0
		for _, tok := range p.tokens {
			if tok != nil {
				n++
			}
		}
		changed, ended := p.changed, p.ended
		p.mu.Unlock()
		if n == lights {
			return nil
		}
		select {
		case <-changed:
		case <-ended:
			return errGone
		case <-ctx.Done():
			return fmt.Errorf("the hub observes %d of %d resources: %w", n, lights, ctx.Err())
		}
	}
}

// ask sends a POST with a body in CBOR and waits for its answer.
func (p *peer) ask(ctx context.Context, path string, body any) (reply, error) {
	payload, err := cbor.Marshal(body)
	if err != nil {
		return reply{}, err
	}
	return p.do(ctx, codes.POST, path, payload)
}

func (p *peer) get(ctx context.Context, path string) (reply, error) {
	return p.do(ctx, codes.GET, path, nil)
}

func (p *peer) do(ctx context.Context, code codes.Code, path string, payload []byte) (reply, error) {
	p.asking.Lock()
	defer p.asking.Unlock()
	opts, _, err := message.Options{}.SetPath(make([]byte, 64), path)
	if err != nil {
		return reply{}, err
	}
	answer := make(chan reply, 1)
	p.mu.Lock()
	p.reqTok++
	p.msgID = (p.msgID + 1) & 0xffff
	p.answer = answer
	m := message.Message{
		Code: code, Token: binary.BigEndian.AppendUint64(nil, p.reqTok), Type: message.Confirmable, MessageID: p.msgID,
		Options: opts, Payload: payload,
	}
	if payload != nil {
		m.Options = append(m.Options, uintOption(message.ContentFormat, ocfCBOR))
	}
	l, ended := p.l, p.ended
	p.mu.Unlock()
	if err := l.send(m); err != nil {
		return reply{}, err
	}
	select {
	case r := <-answer:
		if r.code>>5 != 2 {
			return r, fmt.Errorf("%s: %d.%02d %q", path, r.code>>5, r.code&31, r.payload)
		}
		return r, nil
	case <-ended:
		return reply{}, fmt.Errorf("%s: %w", path, errGone)
	case <-ctx.Done():
		return reply{}, fmt.Errorf("%s: no answer: %w", path, ctx.Err())
	}
}

// signUp redeems the code.
func (p *peer) signUp(ctx context.Context) error {
	r, err := p.ask(ctx, "/oic/sec/account", map[string]any{"di": p.id, "accesstoken": p.on.Code, "authprovider": p.on.Provider})
	if err != nil {
		return err
	}
	var body struct {
		Token string `cbor:"accesstoken"`
		UID   string `cbor:"uid"`
	}
	if err := cbor.Unmarshal(r.payload, &body); err != nil {
		return fmt.Errorf("the answer to the sign-up: %w", err)
	}
	p.token, p.uid = body.Token, body.UID
	return nil
}

func (p *peer) signIn(ctx context.Context) error {
	_, err := p.ask(ctx, "/oic/sec/session", map[string]any{"di": p.id, "uid": p.uid, "accesstoken": p.token, "login": true})
	return err
}

// publish publishes the lights, and what the device is.
func (p *peer) publish(ctx context.Context) error {
	link := func(href, rt string, bitmask int) map[string]any {
		return map[string]any{"href": href, "rt": []string{rt}, "if": []string{"oic.if.rw", "oic.if.baseline"}, "p": map[string]any{"bm": bitmask}}
	}
	links := []any{link("/oic/d", "oic.wk.d", 1)}
	for i := range lights {
		links = append(links, link(lightHref(i), "core.light", 3))
	}
	_, err := p.ask(ctx, "/oic/rd", map[string]any{"di": p.id, "ttl": 0, "links": links})
	return err
}
