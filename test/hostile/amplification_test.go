package hostile_test

import (
	"bytes"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/test/dose"
)

// listening is how long a victim counts what it gets: a few retransmissions of each kind, nightly all of them (RFC 7252, Section
// 4.8.2: MAX_TRANSMIT_SPAN and MAX_TRANSMIT_WAIT end after 93 s).
var listening = dose.Of(6*time.Second, 12*time.Second, 100*time.Second)

// victims are sockets whose addresses others forge: they ask, as the hub sees it, and never answer. Each gets no more than
// three times what was sent in its name.
func (w *world) victims(addr string, asks map[string][][]byte) {
	w.t.Helper()
	var all sync.WaitGroup
	var answered atomic.Int64
	for name, datagrams := range asks {
		c := socket(w.t, addr)
		all.Go(func() {
			sent, got := 0, 0
			for _, b := range datagrams {
				_, _ = c.Write(b)
				sent += len(b)
			}
			b := make([]byte, 64<<10)
			_ = c.SetReadDeadline(time.Now().Add(listening))
			for {
				n, err := c.Read(b)
				if err != nil {
					break
				}
				got += n
			}
			if got > 0 {
				answered.Add(1)
			}
			if got > 3*sent {
				w.t.Errorf("%s: the hub sent %d bytes for %d", name, got, sent)
			}
		})
	}
	all.Wait()
	if n := int(answered.Load()); n < len(asks)/4 {
		w.t.Errorf("only %d of %d were answered at all: this shows nothing", n, len(asks))
	}
}

// TestAmplificationOverUDP: whatever is asked over plain UDP in the name of an address that never answers (RFC 7252, Section
// 11.3).
func TestAmplificationOverUDP(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "coapGateway.api.coap.plainAddress=127.0.0.1:0")
	bare := func(code codes.Code) message.Message { return message.Message{Code: code} }
	core := get("/.well-known/core")
	block := func(m message.Message, id message.OptionID, v uint32) message.Message {
		m.Options = withUint(append(message.Options(nil), m.Options...), id, v)
		return m
	}
	requests := map[string]message.Message{
		"nothing but the header":  bare(codes.GET),
		"root":                    bare(codes.POST),
		"core":                    core,
		"core, all types":         get("/.well-known/core", "rt=*"),
		"core, smallest blocks":   block(core, message.Block2, 0),
		"core, larger blocks":     block(core, message.Block2, 6),
		"core, a later block":     block(core, message.Block2, 3<<4|2),
		"core observed":           block(core, message.Observe, 0),
		"discovery":               get("/oic/res"),
		"discovery of one type":   get("/oic/res", "rt=oic.wk.d"),
		"directory":               get("/oic/rd"),
		"another's resource":      get("/api/v1/devices/" + lamp + "/light/1"),
		"sign-up":                 post("/oic/sec/account", map[string]any{"di": deviceID(3), "accesstoken": "x"}),
		"sign-up of nobody":       post("/oic/sec/account", map[string]any{}),
		"sign-in":                 post("/oic/sec/session", map[string]any{"di": deviceID(3), "uid": "x", "accesstoken": "x", "login": true}),
		"refresh":                 post("/oic/sec/tokenrefresh", map[string]any{"di": deviceID(3), "uid": "x", "refreshtoken": "x"}),
		"unknown path":            get("/" + strings.Repeat("x", 200)),
		"unknown method":          {Code: 31, Options: core.Options},
		"critical option":         {Code: codes.GET, Options: message.Options{{ID: 65001, Value: []byte{1}}}},
		"proxy":                   {Code: codes.GET, Options: message.Options{{ID: message.ProxyURI, Value: []byte("coap://x")}}},
		"first block of a body":   block(message.Message{Code: codes.POST, Options: post("/oic/rd", 0).Options, Payload: make([]byte, 16)}, message.Block1, 8),
		"second block of a body":  block(message.Message{Code: codes.POST, Options: post("/oic/rd", 0).Options, Payload: make([]byte, 16)}, message.Block1, 1<<4|8),
		"notification":            {Code: codes.Content, Token: []byte{1, 2}, Options: withUint(nil, message.Observe, 7), Payload: []byte("x")},
		"error":                   {Code: codes.InternalServerError},
		"reserved class":          {Code: 6 << 5},
		"signal":                  bare(codes.Ping),
		"token without a request": {Code: codes.Empty, Token: []byte{1}},
	}
	asks := map[string][][]byte{
		"pings":                  {datagram(message.Confirmable, 1, bare(codes.Empty)), datagram(message.Confirmable, 2, bare(codes.Empty))},
		"one that is cut off":    {datagram(message.Confirmable, 1, core)[:9]},
		"a long one, then short": append([][]byte{datagram(message.Confirmable, 1, get("/"+strings.Repeat("x", 1000)))}, many(30, message.Confirmable, bare(codes.GET))...),
	}
	for name, m := range requests {
		asks[name+", CON"] = [][]byte{datagram(message.Confirmable, 7, m)}
		asks[name+", NON"] = [][]byte{datagram(message.NonConfirmable, 7, m)}
		asks[name+", again and again"] = repeated(datagram(message.Confirmable, 7, m), 20)
		asks[name+", many"] = many(20, message.Confirmable, m)
	}
	w.victims(w.CoAPPlainUDP, asks)
	if n := w.usage().connections() - w.before.connections(); n > len(asks) {
		t.Errorf("%d sessions for %d addresses", n, len(asks))
	}
	w.costs(20, 48*mebibyte)
	w.undisturbed()
}

// many makes n datagrams of a message, with IDs of their own.
func many(n int, typ message.Type, m message.Message) (out [][]byte) {
	for i := range n {
		out = append(out, datagram(typ, uint16(1000+i), m))
	}
	return out
}

// repeated is one datagram n times.
func repeated(b []byte, n int) (out [][]byte) {
	for range n {
		out = append(out, b)
	}
	return out
}

// TestAmplificationOverDTLS: the same for what begins a handshake, or seems to belong to one (RFC 6347, Section 4.2.1).
func TestAmplificationOverDTLS(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "coapGateway.api.coap.dtls.flightInterval=500ms")
	short := helloDTLS(1, nil, nil)
	cut := record(recordHandshake, 0, fragment(clientHello, 0, short[25:25+36])) // random, no session, no cookie, and then nothing
	old := bytes.Clone(short)
	old[2], old[26] = 0xff, 0xff // DTLS 1.0
	asks := map[string][][]byte{
		"hello":                        {short},
		"hello with extensions":        {helloDTLS(2, nil, ellipticCurves)},
		"hello with a connection ID":   {helloDTLS(3, nil, append([]byte{0, 54, 0, 1, 0}, ellipticCurves...))},
		"hello again and again":        repeated(helloDTLS(4, nil, ellipticCurves), 30),
		"hello that is cut":            {cut},
		"hello of an old version":      {old},
		"hello with a cookie of ours":  {helloDTLS(5, make([]byte, 20), ellipticCurves)},
		"hello in pieces":              {record(recordHandshake, 0, append([]byte{clientHello, 0, 0, 60, 0, 0, 0, 0, 0, 0, 0, 20}, make([]byte, 20)...))},
		"hello of much":                {helloDTLS(6, nil, append([]byte{0xfa, 0xfa, 0x04, 0}, make([]byte, 1024)...))},
		"two in one datagram":          {append(helloDTLS(7, nil, nil), helloDTLS(8, nil, nil)...)},
		"twenty in one datagram":       {bytes.Join(hellos(20), nil)},
		"many":                         hellos(30),
		"hello, then an alert":         {short, record(recordAlert, 1, []byte{2, 40}), record(recordAlert, 2, []byte{1, 0})},
		"hello, then a wrong cookie":   {short, helloDTLS(1, make([]byte, 20), nil), helloDTLS(1, make([]byte, 20), nil)},
		"hello, then a key exchange":   {short, record(recordHandshake, 1, fragment(16, 1, make([]byte, 70)))},
		"hello with data behind":       {append(helloDTLS(9, nil, nil), record(23, 1, []byte("hello"))...)},
		"hello without any suite":      {record(recordHandshake, 0, fragment(clientHello, 0, append(bytes.Clone(short[25:25+36]), 0, 0, 1, 0)))},
		"hello with a session to take": {record(recordHandshake, 0, fragment(clientHello, 0, resumption(short)))},
	}
	w.victims(w.CoAPSUDP, asks)
	w.victimsOfNothing(map[string][]byte{
		"alert":              record(recordAlert, 0, []byte{2, 40}),
		"data":               record(23, 0, []byte("hello")),
		"change of cipher":   record(20, 0, []byte{1}),
		"encrypted data":     {23, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 1, 0, 4, 1, 2, 3, 4},
		"unknown connection": append([]byte{25, 0xfe, 0xfd, 0, 1, 0, 0, 0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 0, 20}, make([]byte, 20)...),
		"nothing":            {},
		"zeros":              make([]byte, 1000),
		"a whole datagram":   bytes.Repeat([]byte{recordHandshake, 0xfe, 0xfd}, 20000),
		"CoAP in the clear":  datagram(message.Confirmable, 1, get("/.well-known/core")),
	})
	w.undisturbed()
}

// hellos are ClientHellos of different clients.
func hellos(n int) (out [][]byte) {
	for i := range n {
		out = append(out, helloDTLS(100+i, nil, nil))
	}
	return out
}

// resumption is the body of a ClientHello that names a session of before.
func resumption(hello []byte) []byte {
	body := append(bytes.Clone(hello[25:25+34]), 32)
	return append(append(body, make([]byte, 32)...), 0, 0, 2, 0xc0, 0xae, 1, 0)
}

// victimsOfNothing get no answer at all to what is sent in their names.
func (w *world) victimsOfNothing(asks map[string][]byte) {
	w.t.Helper()
	conns := make(map[string]net.Conn)
	for name, b := range asks {
		conns[name] = socket(w.t, w.CoAPSUDP)
		_, _ = conns[name].Write(b)
	}
	// What is answered later shows that what came before would have been answered.
	c := socket(w.t, w.CoAPSUDP)
	_, _ = c.Write(helloDTLS(99, nil, nil))
	if cookieOf(receive(c, patience)) == nil {
		w.t.Error("a ClientHello was not answered")
	}
	for name, c := range conns {
		if b := receive(c, 10*time.Millisecond); b != nil {
			w.t.Errorf("%s: the hub sent %x", name, b)
		}
	}
}
