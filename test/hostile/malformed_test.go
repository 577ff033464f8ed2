package hostile_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/coder/websocket"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// everyWay opens all doors for devices.
var everyWay = []string{"coapGateway.api.coap.plainAddress=127.0.0.1:0", "coapGateway.api.coap.webSocket.enabled=true"}

// broken are frames that end a connection with an Abort (RFC 8323, Section 5.6), by what is wrong with them and what of it the
// hub says.
var broken = map[string]struct {
	frame []byte
	says  string
}{
	"length beyond all bounds":    {[]byte{0xf0, 0xff, 0xff, 0xff, 0xff, 1}, "over the limit"},
	"length one beyond the bound": {[]byte{0xf0, 0, 3, 0xfe, 0xf3 + 8, 1}, "over the limit"}, // 320 KiB, and the header counts
	"reserved token length":       {[]byte{0x09, 1}, "token length"},
	"reserved option delta":       {[]byte{0x20, 1, 0xf0, 0}, "reserved value"},
	"reserved option length":      {[]byte{0x20, 1, 0x0f, 0}, "reserved value"},
	"option over the end":         {[]byte{0x20, 1, 0xb8, 'x'}, "over the end"},
	"length of an option cut off": {[]byte{0x10, 1, 0x0e}, "over the end"},
	"option numbers without end":  {slices.Concat([]byte{0x60, 1}, []byte{0xe0, 0xff, 0xff, 0xe0, 0xff, 0xff}), "65535"},
	"marker without payload":      {[]byte{0x10, 1, 0xff}, "without payload"},
	"critical option in a CSM":    {[]byte{0x10, byte(codes.CSM), 0x10}, "not understood"},
	"critical option in a Ping":   {[]byte{0x10, byte(codes.Ping), 0x10}, "not understood"},
	"no message is small enough":  {[]byte{0x20, byte(codes.CSM), 0x21, 1}, "no room"},
	"options of a signal cut off": {[]byte{0x10, byte(codes.Pong), 0x05}, "over the end"},
}

// odd are frames that end nothing.
var odd = map[string][]byte{
	"empty message":              {0x00, 0},
	"empty message with a token": {0x02, 0, 1, 2},
	"reserved class":             {0x00, 1 << 5},
	"another reserved class":     {0x00, 6 << 5},
	"unknown signal":             {0x00, 7<<5 | 31},
	"CSM with unknown options":   {0x30, byte(codes.CSM), 0x60, 0x20, 0x60},
	"CSM with a long number":     {0x60, byte(codes.CSM), 0x25, 1, 2, 3, 4, 5},
	"second CSM":                 {0x30, byte(codes.CSM), 0x22, 0xff, 0xff},
	"Pong nobody asked for":      {0x01, byte(codes.Pong), 1},
	"answer nobody asked for":    {0x01, byte(codes.Content), 1},
	"notification of nobody":     {0x21, byte(codes.Content), 1, 0x61, 7},
}

// TestMalformedFrames: over TCP and TLS a frame that is none ends its connection, with what was wrong; what only means nothing is
// passed over.
func TestMalformedFrames(t *testing.T) {
	t.Parallel()
	w := newWorld(t, everyWay...)
	ways := map[string]func() *stranger{
		"TCP": func() *stranger { return &stranger{Conn: dial(t, w.CoAPPlain), t: t} },
		"TLS": func() *stranger { return w.secure(deviceID(3)) },
	}
	for way, connect := range ways {
		for name, b := range broken {
			c := connect()
			write(c, b.frame)
			if said, over := c.end(); !over || !strings.Contains(said, b.says) {
				t.Errorf("%s, %s: the hub aborted with %q, ended %t", way, name, said, over)
			}
		}
		c := connect()
		for name, b := range odd {
			write(c, b)
			if !c.answers() {
				t.Errorf("%s: the connection is gone after %s", way, name)
				c = connect()
			}
		}
		_ = c.Close()
	}
	w.undisturbed()
	w.givenBack()
}

// answers reports whether the hub still answers on this connection.
func (s *stranger) answers() bool {
	s.t.Helper()
	m := get("/nothing/here")
	m.Token = []byte{0xaa}
	write(s, frame(m))
	for {
		a, ok := s.read()
		if !ok || string(a.Token) == string(m.Token) && a.Code == codes.NotFound {
			return ok
		}
	}
}

// TestMalformedWebSocketMessages: the same over a WebSocket, where a message has no length of its own (RFC 8323, Section 4.2).
func TestMalformedWebSocketMessages(t *testing.T) {
	t.Parallel()
	w := newWorld(t, everyWay...)
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	for name, m := range map[string]struct {
		kind websocket.MessageType
		data []byte
		want websocket.StatusCode // RFC 6455, Section 7.4.1
	}{
		"text":                  {websocket.MessageText, []byte{0, 1}, websocket.StatusUnsupportedData},
		"nothing":               {websocket.MessageBinary, nil, websocket.StatusProtocolError},
		"a length":              {websocket.MessageBinary, []byte{0x20, 1, 0x11, 1}, websocket.StatusProtocolError},
		"reserved token length": {websocket.MessageBinary, []byte{0x09, 1}, websocket.StatusProtocolError},
		"token cut off":         {websocket.MessageBinary, []byte{0x04, 1, 1}, websocket.StatusProtocolError},
		"option over the end":   {websocket.MessageBinary, []byte{0, 1, 0xb8, 'x'}, websocket.StatusProtocolError},
		"beyond the bound":      {websocket.MessageBinary, append([]byte{0, 2, 0xff}, make([]byte, 400<<10)...), websocket.StatusMessageTooBig},
	} {
		c, _, err := websocket.Dial(ctx, "ws://"+host(w.HTTP)+"/.well-known/coap", &websocket.DialOptions{Subprotocols: []string{"coap"}})
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Write(ctx, m.kind, m.data)
		for err == nil {
			_, _, err = c.Read(ctx)
		}
		if websocket.CloseStatus(err) != m.want {
			t.Errorf("%s: %v, want %v", name, err, m.want)
		}
		_ = c.CloseNow()
	}
	w.undisturbed()
	w.givenBack()
}

// TestMalformedDatagrams: over UDP and DTLS a datagram that is no message is rejected if it is confirmable, and passed over else
// (RFC 7252, Sections 4.2 and 4.3); it ends nothing.
func TestMalformedDatagrams(t *testing.T) {
	t.Parallel()
	w := newWorld(t, everyWay...)
	for way, c := range map[string]net.Conn{"UDP": socket(t, w.CoAPPlainUDP), "DTLS": w.association(deviceID(3))} {
		id := uint16(100)
		ask := func(typ message.Type, code byte, body ...byte) (reply message.Message, ok bool) {
			id++
			_, _ = c.Write(append([]byte{0x40 | byte(typ)<<4, code, byte(id >> 8), byte(id)}, body...))
			last := id
			id++ // what comes first shows whether that was answered
			_, _ = c.Write(datagram(message.Confirmable, id, get("/nothing/here")))
			for {
				m, parsed := parse(receive(c, patience))
				switch {
				case !parsed:
					t.Fatalf("%s: a request behind %x is not answered", way, body)
				case m.Type == message.Confirmable && m.Code == codes.Empty: // is the address ours?
					_, _ = c.Write(datagram(message.Reset, uint16(m.MessageID), message.Message{}))
				case m.MessageID == int32(last) || m.Type == message.NonConfirmable && string(m.Token) != "\x01":
					reply, ok = m, true
				case m.MessageID == int32(id):
					return reply, ok
				}
			}
		}
		ask(message.Confirmable, 1) // over UDP an address that is not proven waits for most answers
		for name, body := range map[string][]byte{
			"reserved option delta":  {0xf0, 0},
			"option over the end":    {0xb8, 'x'},
			"option cut off":         {0x0e},
			"marker without payload": {0xff},
		} {
			if m, ok := ask(message.Confirmable, 1, body...); !ok || m.Type != message.Reset {
				t.Errorf("%s, %s in a CON: %v, %t", way, name, m, ok)
			}
			if m, ok := ask(message.NonConfirmable, 1, body...); ok {
				t.Errorf("%s, %s in a NON: %v", way, name, m)
			}
		}
		for _, class := range []byte{1, 3, 6, 7} { // reserved (RFC 7252, Section 3), or of streams only
			if m, ok := ask(message.Confirmable, class<<5); !ok || m.Type != message.Reset {
				t.Errorf("%s, class %d in a CON: %v, %t", way, class, m, ok)
			}
			if m, ok := ask(message.NonConfirmable, class<<5); ok {
				t.Errorf("%s, class %d in a NON: %v", way, class, m)
			}
		}
		// Critical options that nobody understands (RFC 7252, Section 5.4.1): 9 is one.
		if m, ok := ask(message.Confirmable, 1, 0x90); !ok || m.Code != codes.BadOption {
			t.Errorf("%s, a critical option in a CON: %v, %t", way, m, ok)
		}
		if m, ok := ask(message.NonConfirmable, 1, 0x90); ok {
			t.Errorf("%s, a critical option in a NON: %v", way, m)
		}
		// As much as a datagram, or a record, holds: far more than one should (RFC 7252, Section 4.6).
		large := append([]byte{0xb1, 'x', 0xff}, make([]byte, map[string]int{"UDP": 60_000, "DTLS": 8_000}[way])...)
		if m, ok := ask(message.Confirmable, 2, large...); !ok || m.Code != codes.NotFound {
			t.Errorf("%s, a large request: %v, %t", way, m, ok)
		}
		if m, ok := ask(message.Confirmable, 1, 0xb1, 'x'); !ok || m.Code != codes.NotFound {
			t.Errorf("%s, a request: %v, %t", way, m, ok)
		}
	}
	w.undisturbed()
}

// TestUploadsWithoutEnd: bodies that come block by block are held up to a bound, and only as many as are configured at a time; what
// does not fit together is refused as RFC 7959 says.
func TestUploadsWithoutEnd(t *testing.T) {
	t.Parallel()
	const maxBody, transfers = 256 << 10, 4
	w := newWorld(t)
	c := w.signedIn(deviceID(3))
	piece := make([]byte, 1024)
	upload := func(tag byte, num, szx uint32, n int) message.Message {
		m := post("/oic/rd", nil)
		m.Options = withUint(m.Options, message.Block1, num<<4|8|szx)
		m.Options = m.Options.Add(message.Option{ID: 292, Value: []byte{tag}}) // Request-Tag (RFC 9175, Section 3)
		m.Payload = piece[:n]
		return m
	}
	for num := range uint32(maxBody / 1024) {
		c.want(codes.Continue, upload(1, num, 6, 1024))
	}
	a := c.want(codes.RequestEntityTooLarge, upload(1, maxBody/1024, 6, 1024)) // RFC 7959, Section 2.9.3
	if n, err := a.Options.GetUint32(message.Size1); err != nil || n != maxBody {
		t.Errorf("what would do is %d, %v", n, err)
	}
	for range 3 { // RFC 7959, Section 2.9.2: nothing is held any more, and nothing begins in the middle
		c.want(codes.RequestEntityIncomplete, upload(1, maxBody/1024+1, 6, 1024))
		c.want(codes.RequestEntityIncomplete, upload(2, 1<<20-1, 6, 1024))
		c.want(codes.RequestEntityIncomplete, upload(3, 1, 0, 16))
	}
	c.want(codes.Continue, upload(4, 0, 6, 1024))
	c.want(codes.RequestEntityIncomplete, upload(4, 1, 2, 64)) // the same number of another size is another place
	c.want(codes.BadRequest, upload(5, 0, 6, 1000))            // RFC 7959, Section 2.2: all but the last are full
	for tag := range byte(100) {
		for num := range uint32(20) {
			c.want(codes.Continue, upload(100+tag, num, 6, 1024))
		}
	}
	if n := int(w.usage()["coaphub_coap_buffered_bytes"]); n > transfers*20<<10+remembered {
		t.Errorf("%d bytes are held for %d transfers", n, transfers)
	}
	w.costs(20, 48*mebibyte)
	w.undisturbed()
	_ = c.Close()
	w.givenBack()
}

// deep is CBOR that nests n arrays.
func deep(n int) []byte { return append(bytes.Repeat([]byte{0x81}, n), 0) }

// TestMonstersFromDevices: what devices publish and report may be deeply nested or huge; it is refused, or stored as it is, and
// whoever reads it gets an answer.
func TestMonstersFromDevices(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.signedIn(deviceID(3))
	publish := post("/oic/rd", nil, "rt=oic.wk.rdpub")
	for name, body := range map[string][]byte{
		"nesting":                deep(200_000),
		"array without elements": {0x9b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"text without text":      {0xa1, 0x62, 'd', 'i', 0x7b, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 0xff},
		"map without members":    {0xbb, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff},
		"text without end":       append([]byte{0xa1, 0x7f}, bytes.Repeat([]byte{0x61, 'x'}, 100_000)...),
		"number without end":     append([]byte{0xc2, 0x5a, 0, 3, 0, 0}, make([]byte, 3<<16)...),
		"nothing":                nil,
	} {
		publish.Payload = body
		if a := c.ask(publish); a.Code != codes.BadRequest {
			t.Errorf("publishing %s: %v %q", name, a.Code, a.Payload)
		}
	}
	long := map[string]any{"href": "/" + strings.Repeat("x", 200<<10), "rt": []string{"x"}, "if": []string{"x"}}
	if a := c.ask(post("/oic/rd", map[string]any{"di": c.id, "ttl": 0, "links": []any{long}}, "rt=oic.wk.rdpub")); a.Code != codes.BadRequest {
		t.Errorf("publishing a long href: %v %q", a.Code, a.Payload)
	}
	values := map[string][]byte{
		"/nested":   deep(100_000),
		"/endless":  {0x9b, 0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff},
		"/large":    append([]byte{0x7a, 0, 3, 0, 0}, bytes.Repeat([]byte{'x'}, 3<<16)...),
		"/not-utf8": {0x62, 0xff, 0xfe},
	}
	var links []any
	for href := range values {
		links = append(links, map[string]any{"href": href, "rt": []string{"x"}, "if": []string{"oic.if.baseline"}, "p": map[string]any{"bm": 3}})
	}
	publish = post("/oic/rd", map[string]any{"di": c.id, "ttl": 0, "links": links}, "rt=oic.wk.rdpub")
	publish.Token = []byte("publish")
	write(c, frame(publish)) // the hub may ask for what is published before it answers
	var serving sync.WaitGroup
	serving.Go(func() { // ends with the connection
		for m, ok := c.read(); ok; m, ok = c.read() {
			switch {
			case bytes.Equal(m.Token, publish.Token):
				if m.Code != codes.Changed {
					t.Errorf("publishing: %v %q", m.Code, m.Payload)
				}
			case m.Code == codes.GET:
				path, _ := m.Options.Path()
				a := message.Message{Code: codes.NotFound, Token: m.Token}
				if body, known := values[path]; known {
					a.Code, a.Payload = codes.Content, body
					a.Options = withUint(withUint(nil, message.Observe, 1), message.ContentFormat, uint32(message.AppOcfCbor))
				}
				write(c, frame(a))
			}
		}
	})
	for href := range values {
		for _, accept := range []string{"", "?onlyContent=true"} {
			w.until("what was reported to be known", func() bool {
				status, b, err := w.request(t.Context(), http.MethodGet, "/api/v1/devices/"+c.id+"/resources"+href+accept, "")
				if err != nil || status >= http.StatusInternalServerError {
					t.Fatalf("%s: %d %.100q, %v", href, status, b, err)
				}
				return status == http.StatusOK
			})
		}
	}
	if n := w.usage().connections(); n != w.before.connections()+1 {
		t.Errorf("there are %d connections", n)
	}
	w.costs(20, 48*mebibyte)
	w.undisturbed()
	_ = c.Close()
	serving.Wait()
	w.givenBack()
}

// TestMonstersFromApplications: the same from the other side.
func TestMonstersFromApplications(t *testing.T) {
	t.Parallel()
	const limit = 1 << 20
	w := newWorld(t)
	light := "/api/v1/devices/" + lamp + "/resources/light/1"
	nested := strings.Repeat("[", limit/2-1) + strings.Repeat("]", limit/2-1)
	for name, c := range map[string]struct {
		method, path, body string
		status             []int
	}{
		"nesting":              {http.MethodPut, light, nested, []int{http.StatusRequestEntityTooLarge}},
		"nesting in a member":  {http.MethodPut, light, `{"name":` + nested[:1000] + nested[len(nested)-1000:] + "}", []int{http.StatusBadRequest}},
		"nesting without end":  {http.MethodPut, light, strings.Repeat(`{"a":`, limit/30), []int{http.StatusBadRequest}},
		"number without end":   {http.MethodPut, light, `{"power":` + strings.Repeat("9", limit/10) + "}", []int{http.StatusBadRequest}},
		"exponent":             {http.MethodPut, light, `{"power":1e999999999}`, []int{http.StatusBadRequest}},
		"text":                 {http.MethodPut, light, `{"name":"` + strings.Repeat("x", limit-100) + `"}`, []int{http.StatusRequestEntityTooLarge}},
		"as much as there may": {http.MethodPut, light, `"` + strings.Repeat("x", limit-2) + `"`, []int{http.StatusRequestEntityTooLarge}},
		"a byte more":          {http.MethodPut, light, strings.Repeat(" ", limit+1), []int{http.StatusRequestEntityTooLarge}},
		"no UTF-8":             {http.MethodPut, light, "{\"name\":\"\xff\xfe\"}", []int{http.StatusBadRequest}},
		"labels":               {http.MethodPut, "/api/v1/devices/" + lamp + "/labels", nested, []int{http.StatusBadRequest}},
		"query":                {http.MethodGet, "/api/v1/devices?search=" + strings.Repeat("x", 40_000), "", []int{http.StatusBadRequest}},
		"path":                 {http.MethodGet, "/api/v1/devices/" + strings.Repeat("x/", 20_000), "", []int{http.StatusBadRequest, http.StatusNotFound}},
		"head":                 {http.MethodGet, "/api/v1/devices?" + strings.Repeat("x", 100_000), "", []int{http.StatusRequestHeaderFieldsTooLarge}},
		"filters":              {http.MethodGet, "/api/v1/devices?" + strings.Repeat("typeFilter=x&", 4000), "", []int{http.StatusOK}}, // of none
	} {
		status, b, err := w.request(t.Context(), c.method, c.path, c.body)
		if err != nil || !slices.Contains(c.status, status) {
			t.Errorf("%s: %d %.200q, %v", name, status, b, err)
		}
	}
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	c, _, err := websocket.Dial(ctx, "ws://"+host(w.HTTP)+"/api/v1/ws/events", &websocket.DialOptions{Subprotocols: []string{"Bearer", w.token}})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = c.CloseNow() }()
	for name, m := range map[string]string{
		"nesting": nested, "no JSON": "\x00", "nothing": "null", "nesting in a member": `{"createSubscription":` + nested[:limit/4],
		"too much": strings.Repeat(" ", limit+1), "filters": fmt.Sprintf(`{"createSubscription":{"deviceIdFilter":[%s"x"]}}`, strings.Repeat(`"x",`, limit/5)),
	} {
		if err := c.Write(ctx, websocket.MessageText, []byte(m)); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if _, b, err := c.Read(ctx); err != nil || !bytes.Contains(b, []byte(`"error`)) {
			t.Errorf("%s over a WebSocket: %.200q, %v", name, b, err)
		}
	}
	w.costs(20, 64*mebibyte)
	w.undisturbed()
	w.givenBack()
}
