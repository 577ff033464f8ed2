package coap

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus"
)

// wsSim is an engine behind an HTTP server on the simulated network.
type wsSim struct {
	*sim
	http  *simListener
	leave func() // ends the way in over WebSocket
}

// bubbleWebSocket runs f with an engine that speaks WebSocket in a synctest bubble.
func bubbleWebSocket(t *testing.T, h handlerFuncs, change func(*Config), f func(t *testing.T, s *wsSim)) {
	t.Helper()
	bubble(t, h, change, func(t *testing.T, s *sim) {
		ln := newSimListener()
		web := &wsSim{s, ln, sync.OnceFunc(serveWebSocket(t, s.srv, ln))}
		defer web.leave()
		f(t, web)
	})
}

// serveWebSocket mounts the engine on an HTTP server. stop ends the engine's part first, as the hub does.
func serveWebSocket(t testing.TB, srv *Server, ln net.Listener, origins ...string) (stop func()) {
	t.Helper()
	ws := srv.NewWebSocket(origins)
	mux := http.NewServeMux()
	mux.Handle(WebSocketPath, ws)
	hs := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute, ErrorLog: slog.NewLogLogger(slog.DiscardHandler, 0)}
	ctx, cancel := context.WithCancel(context.Background())
	done, served := make(chan struct{}), make(chan struct{})
	go func() { defer close(done); ws.Serve(ctx, func() {}) }()
	go func() { defer close(served); _ = hs.Serve(ln) }()
	for serving := false; !serving; { // until then everybody gets 503
		if l := ws.enter(); l != nil {
			l.wg.Done()
			serving = true
		}
	}
	return func() {
		cancel()
		<-done
		_ = hs.Close()
		<-served
	}
}

const opening = "GET /.well-known/coap HTTP/1.1\r\nHost: example.org\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
	"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: coap\r\nSec-WebSocket-Version: 13\r\n\r\n"

// webPeer is a client that speaks in bytes, behind the handshake.
type webPeer struct{ *peer }

// dial connects, upgrades and reads the engine's CSM.
func (s *wsSim) dial(t *testing.T) webPeer {
	t.Helper()
	p := s.dialRoom(t, 1<<20)
	if m := p.read(); m.Code != codes.CSM {
		t.Fatalf("first message is %v, want CSM", m.Code)
	}
	return p
}

func (s *wsSim) dialRoom(t *testing.T, room int) webPeer {
	t.Helper()
	c := s.http.dial(0, room)
	t.Cleanup(func() { _ = c.Close() })
	p := webPeer{&peer{t: t, Conn: c, r: bufio.NewReader(c)}}
	p.raw([]byte(opening))
	res, err := http.ReadResponse(p.r, nil)
	if err != nil {
		t.Fatal(err)
	}
	_ = res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		t.Fatalf("status %s", res.Status)
	}
	return p
}

// masked makes a client's frame; its first byte is fin and opcode.
func masked(first byte, payload []byte) []byte {
	key := [4]byte{0x37, 0xfa, 0x21, 0x3d} // of the example in RFC 6455, Section 5.7
	b := []byte{first}
	switch n := len(payload); {
	case n < 126:
		b = append(b, 0x80|byte(n))
	case n < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, 0x80|126), uint16(n))
	default:
		b = binary.BigEndian.AppendUint64(append(b, 0x80|127), uint64(n))
	}
	b = append(b, key[:]...)
	for i, c := range payload {
		b = append(b, c^key[i%4])
	}
	return b
}

// body is a message as RFC 8323, Section 4.2 forms it, made of what TCP has.
func body(m *Message) []byte {
	b := appendFrame(nil, m)
	h, _, _ := parseHeader(b)
	return append([]byte{byte(h.tkl), byte(h.code)}, b[h.size:]...)
}

func (p webPeer) send(m *Message) { p.t.Helper(); p.raw(masked(0x82, body(m))) }

// nextFrame reads one frame of the engine's, or returns the error.
func (p webPeer) nextFrame() (first byte, payload []byte, err error) {
	var head [2]byte
	if _, err := io.ReadFull(p.r, head[:]); err != nil {
		return 0, nil, err
	}
	n := uint64(head[1])
	if n > 127 {
		return 0, nil, errors.New("the server masks")
	}
	if n > 125 {
		ext := make([]byte, map[uint64]int{126: 2, 127: 8}[n])
		if _, err := io.ReadFull(p.r, ext); err != nil {
			return 0, nil, err
		}
		n = binary.BigEndian.Uint64(append(make([]byte, 8-len(ext), 8), ext...))
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(p.r, payload)
	return head[0], payload, err
}

func (p webPeer) wantFrame(first byte, payload []byte) {
	p.t.Helper()
	f, b, err := p.nextFrame()
	if err != nil || f != first || !bytes.Equal(b, payload) {
		p.t.Fatalf("frame %x %x, %v, want %x %x", f, b, err, first, payload)
	}
}

// read reads one CoAP message, which must be one binary frame.
func (p webPeer) read() *Message {
	p.t.Helper()
	first, b, err := p.nextFrame()
	if err != nil || first != 0x82 || len(b) < 2 || b[0] > maxToken {
		p.t.Fatalf("frame %x %x, %v, want a CoAP message", first, b, err)
	}
	m := &Message{Code: codes.Code(b[1]), Token: token(b[2:], int(b[0]))}
	if m.Options, m.Payload, _, err = decodeBody(b[2+int(b[0]):], nil, b[1]>>5 == 7); err != nil {
		p.t.Fatal(err)
	}
	return m
}

func (p webPeer) ask(m *Message) *Message {
	p.t.Helper()
	p.send(m)
	r := p.read()
	if !bytes.Equal(r.Token, m.Token) {
		p.t.Fatalf("token %x in the answer to %x", r.Token, m.Token)
	}
	return r
}

// closed reads the engine's Close frame, which must be its last word, closes in turn, and returns what it said.
func (p webPeer) closed() (status int, text string) {
	p.t.Helper()
	first, b, err := p.nextFrame()
	if err != nil || first != 0x88 || len(b) == 1 || len(b) > maxControl {
		p.t.Fatalf("frame %x %q, %v, want Close", first, b, err)
	}
	if status = statusNone; len(b) > 0 {
		status, text = int(binary.BigEndian.Uint16(b)), string(b[2:])
	}
	_, _ = p.Write(masked(0x88, b[:min(2, len(b))])) // the engine may be gone, if we closed first
	if _, _, err := p.nextFrame(); !errors.Is(err, io.EOF) && !errors.Is(err, net.ErrClosed) {
		p.t.Fatalf("after Close: %v, want the end", err)
	}
	_ = p.Close()
	return status, text
}

func (p webPeer) wantClosed(want int) {
	p.t.Helper()
	if status, text := p.closed(); status != want {
		p.t.Fatalf("closed with %d %q, want %d", status, text, want)
	}
}

// RFC 6455, Section 4.2; RFC 8323, Section 4.1.
func TestWebSocketHandshake(t *testing.T) {
	ask := func(t *testing.T, ln *simListener, request string) *http.Response {
		t.Helper()
		c := ln.dial(0, 1<<20)
		defer func() { _ = c.Close() }()
		if _, err := io.WriteString(c, request); err != nil {
			t.Fatal(err)
		}
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil {
			t.Fatal(err)
		}
		if res.StatusCode != http.StatusSwitchingProtocols {
			b, _ := io.ReadAll(res.Body)
			res.Body = io.NopCloser(bytes.NewReader(b))
		}
		return res
	}
	without := func(name string) string {
		var out []string
		for _, line := range strings.Split(opening, "\r\n") {
			if !strings.HasPrefix(line, name+":") {
				out = append(out, line)
			}
		}
		return strings.Join(out, "\r\n")
	}
	with := func(header string) string {
		return strings.TrimSuffix(without(header[:strings.IndexByte(header, ':')]), "\r\n") + header + "\r\n\r\n"
	}
	bubble(t, handlerFuncs{}, func(c *Config) { c.MaxConnections = 50 }, func(t *testing.T, s *sim) {
		ln := newSimListener()
		stop := serveWebSocket(t, s.srv, ln, "https://Console.example.com")
		defer stop()
		for _, tc := range []struct {
			name, request string
			status        int
			says          string
		}{
			{"as the RFC has it", opening, 101, ""},
			{"lists and other cases", strings.NewReplacer("Upgrade: websocket", "upgrade: h2c, WebSocket", "Connection: Upgrade", "connection: keep-alive, upgrade",
				"Protocol: coap", "Protocol: soap, coap").Replace(opening), 101, ""},
			{"extensions are offered", with("Sec-WebSocket-Extensions: permessage-deflate"), 101, ""},
			{"page of the same host", with("Origin: http://example.org"), 101, ""},
			{"page that is configured", with("Origin: https://console.example.com"), 101, ""},
			{"page of another scheme than configured", with("Origin: http://console.example.com"), 403, "websocket-origin"},
			{"another page", with("Origin: https://evil.example"), 403, "websocket-origin"},
			{"page of a host that begins alike", with("Origin: http://example.org.evil.example"), 403, "websocket-origin"},
			{"opaque origin", with("Origin: null"), 403, "websocket-origin"},
			{"two origins", strings.TrimSuffix(with("Origin: http://example.org"), "\r\n") + "Origin: http://evil.example\r\n\r\n", 403, "websocket-origin"},
			{"a browser that looks", "GET /.well-known/coap HTTP/1.1\r\nHost: example.org\r\n\r\n", 426, "websocket-expected"},
			{"no Connection", without("Connection"), 426, "websocket-expected"},
			{"another upgrade", with("Upgrade: h2c"), 426, "websocket-expected"},
			{"POST", "POST" + strings.TrimPrefix(opening, "GET"), 405, "websocket-expected"},
			{"HTTP/1.0", strings.Replace(opening, "HTTP/1.1", "HTTP/1.0", 1), 505, "websocket-expected"},
			{"no subprotocol", without("Sec-WebSocket-Protocol"), 400, "websocket-subprotocol"},
			{"another subprotocol", with("Sec-WebSocket-Protocol: coap2, mqtt"), 400, "websocket-subprotocol"},
			{"no key", without("Sec-WebSocket-Key"), 400, "websocket-handshake"},
			{"short key", with("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j"), 400, "websocket-handshake"},
			{"version 8", with("Sec-WebSocket-Version: 8"), 426, "websocket-handshake"},
			{"a body", with("Content-Length: 2") + "ab", 400, "websocket-handshake"},
			{"a body of unknown length", with("Transfer-Encoding: chunked") + "0\r\n\r\n", 400, "websocket-handshake"},
			{"no host", with("Host: "), 400, "websocket-handshake"},
		} {
			res := ask(t, ln, tc.request)
			h := res.Header
			if res.StatusCode != tc.status {
				t.Errorf("%s: status %s, want %d", tc.name, res.Status, tc.status)
				continue
			}
			if tc.status == 101 {
				// The value is that of the RFC's example.
				if h.Get("Sec-WebSocket-Accept") != "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=" || h.Get("Sec-WebSocket-Protocol") != "coap" ||
					h.Get("Upgrade") != "websocket" || h.Get("Connection") != "Upgrade" || len(h) != 4 {
					t.Errorf("%s: header %v", tc.name, h)
				}
				continue
			}
			b, _ := io.ReadAll(res.Body)
			if code, _, _ := strings.Cut(string(b), ": "); code != tc.says {
				t.Errorf("%s: %q, want %s", tc.name, b, tc.says)
			}
			switch {
			case tc.name == "version 8" && h.Get("Sec-WebSocket-Version") != "13",
				tc.status == 426 && tc.says == "websocket-expected" && h.Get("Upgrade") != "websocket",
				tc.status == 405 && h.Get("Allow") != "GET":
				t.Errorf("%s: what would do is not said: %v", tc.name, h)
			}
		}
		synctest.Wait()
		if n := s.count("connections_refused_total", "websocket"); n != 18 {
			t.Errorf("%v handshakes counted as refused", n)
		}

		// What comes before the answer cannot be told from HTTP's own buffers.
		c := ln.dial(0, 1<<20)
		_, _ = c.Write(append([]byte(opening), masked(0x82, body(get("/a")))...))
		if b, _ := io.ReadAll(c); len(b) != 0 {
			t.Errorf("a client that did not wait got %q", b)
		}
		_ = c.Close()

		var held []net.Conn
		for range 50 {
			c := ln.dial(0, 1<<20)
			held = append(held, c)
			_, _ = io.WriteString(c, opening)
			synctest.Wait()
		}
		if res := ask(t, ln, opening); res.StatusCode != 503 || res.Header.Get("Retry-After") == "" {
			t.Errorf("one connection too many: %s", res.Status)
		}
		for _, c := range held {
			_ = c.Close()
		}
		synctest.Wait()
		if res := ask(t, ln, opening); res.StatusCode != 101 {
			t.Errorf("after they are gone: %s", res.Status)
		}
	})
}

// A way in that is not served yet, or not any more, says so.
func TestWebSocketNotServing(t *testing.T) {
	bubble(t, handlerFuncs{}, nil, func(t *testing.T, s *sim) {
		ln := newSimListener()
		hs := &http.Server{Handler: s.srv.NewWebSocket(nil), ReadHeaderTimeout: time.Minute}
		done := make(chan struct{})
		go func() { defer close(done); _ = hs.Serve(ln) }()
		c := ln.dial(0, 1<<20)
		_, _ = io.WriteString(c, opening)
		if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != 503 {
			t.Errorf("%v, %v", res, err)
		}
		_ = hs.Close()
		<-done
	})
}

// RFC 8323, Section 5.4 has the frames of the Ping and the Pong.
func TestWebSocketExchange(t *testing.T) {
	infos := make(chan ConnInfo, 1)
	h := handlerFuncs{open: func(c *Conn) error { infos <- c.Info(); return nil }}
	bubbleWebSocket(t, h, nil, func(t *testing.T, s *wsSim) {
		p := s.dial(t)
		if info := <-infos; info.Host != "example.org" || !info.Stream || info.Secure || info.TLS != nil {
			t.Errorf("%+v", info)
		}
		p.raw(masked(0x82, unhex(t, "01e242")))
		p.wantFrame(0x82, unhex(t, "01e342"))
		p.raw(masked(0x82, unhex(t, "0000"))) // Empty is ignored
		p.raw(masked(0x82, unhex(t, "0001b36f6963027264")))
		p.wantFrame(0x82, append(unhex(t, "0045ff"), "/oic/rd"...))
		if m := p.ask(get("/a")); string(m.Payload) != "/a" {
			t.Errorf("%v %q", m.Code, m.Payload)
		}
		elsewhere := get("/a")
		elsewhere.Options = sortOptions(AddOption(elsewhere.Options, URIHost, []byte("other.example")))
		if m := p.ask(elsewhere); string(m.Payload) != "/a" { // RFC 8323, Section 8.5: names choose nothing
			t.Errorf("%v %q", m.Code, m.Payload)
		}
		var packet []byte
		for i := range 5 {
			m := get("/b")
			m.Token = []byte{byte(i)}
			packet = append(packet, masked(0x82, body(m))...)
		}
		p.raw(packet)
		for i := range 5 {
			if m := p.read(); m.Token[0] != byte(i) {
				t.Errorf("answer %d is to %x", i, m.Token)
			}
		}
	})
}

// Messages of all sizes pass in both directions; a frame's length has one of three forms.
func TestWebSocketSizes(t *testing.T) {
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response { return Response{Code: codes.Content, Payload: m.Payload} }}
	bubbleWebSocket(t, h, nil, func(t *testing.T, s *wsSim) {
		p := s.dial(t)
		p.send(&Message{Code: codes.CSM, Options: AddOption(AddUint(nil, csmMaxMessageSize, 1<<20), csmBlockWise, nil)})
		over := len(body(post("/echo", pattern(1)))) - 1
		back := len(body(&Message{Code: codes.Content, Token: []byte{1}, Payload: pattern(1)})) - 1
		sizes := []int{0, 1, 490, 512, 600, 40_000, 140_000, MaxBody}
		for _, edge := range []int{125, 126, 127, bigBuffer, bigBuffer + 1, 65_535, 65_536, 65_537} {
			for off := -14; off <= 0; off++ { // the frame's header, too, is somewhere around the edge
				sizes = append(sizes, edge-over+off)
			}
			sizes = append(sizes, edge-back)
		}
		passAll(t, p, sizes)
	})
}

// The peer's limit counts the message as it is here, without a length of its own.
func TestWebSocketPeerLimit(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
		p := s.dial(t)
		c := <-s.conns
		m := post("/a", pattern(1000))
		p.send(&Message{Code: codes.CSM, Options: AddUint(nil, csmMaxMessageSize, uint32(len(body(m))+7))}) // token of 8 bytes
		synctest.Wait()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		answered := make(chan error, 1)
		go func() {
			_, err := c.Do(ctx, m)
			answered <- err
		}()
		got := p.read()
		if !bytes.Equal(got.Payload, m.Payload) || len(got.Token) != 8 {
			t.Fatalf("token %x, %d bytes", got.Token, len(got.Payload))
		}
		p.send(&Message{Code: codes.Changed, Token: got.Token})
		if err := <-answered; err != nil {
			t.Error(err)
		}
	})
}

// conversation is frames of every kind, and what they are answered with.
func conversation() (frames []byte, check func(p webPeer)) {
	long := body(post("/long", pattern(700)))
	frames = masked(0x82, body(get("/a")))
	frames = append(frames, masked(0x89, []byte("ping"))...)
	frames = append(frames, masked(0x02, long[:1])...)
	frames = append(frames, masked(0x89, nil)...)
	frames = append(frames, masked(0x00, nil)...)
	frames = append(frames, masked(0x00, long[1:300])...)
	frames = append(frames, masked(0x8a, []byte("a pong nobody asked for"))...)
	frames = append(frames, masked(0x80, long[300:])...)
	frames = append(frames, masked(0x82, body(post("/b", pattern(300))))...)
	frames = append(frames, masked(0x88, append([]byte{0x0b, 0xb8}, "bye"...))...)
	return frames, func(p webPeer) {
		p.t.Helper()
		var said []string
		for {
			first, b, err := p.nextFrame()
			if err != nil {
				p.t.Fatalf("after %q: %v", said, err)
			}
			if first == 0x82 {
				b = b[1+2:]
				b = b[bytes.IndexByte(b, '/'):]
			}
			said = append(said, fmt.Sprintf("%x %s", first, b))
			if first == 0x88 {
				break
			}
		}
		// Pongs come from the reader, answers from the worker: their order among each other says nothing.
		count := map[string]int{}
		for _, s := range said {
			count[s]++
		}
		for _, want := range []string{"82 /a", "8a ping", "8a ", "82 /long", "82 /b", "88 \x0b\xb8"} {
			if count[want] != 1 {
				p.t.Fatalf("%q in %q", want, said)
			}
		}
		if len(said) != 6 || said[5][:2] != "88" {
			p.t.Fatalf("%q", said)
		}
	}
}

// Frames in packets split at every byte, and one byte at a time.
func TestWebSocketInPieces(t *testing.T) {
	frames, check := conversation()
	bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
		for i := range len(frames) {
			p := s.dial(t)
			<-s.conns
			p.raw(frames[:i])
			synctest.Wait()
			p.raw(frames[i:])
			check(p)
			_ = p.Close()
			wantReason(t, s.reason(t), io.EOF)
		}
		p := s.dial(t)
		for i := range frames {
			p.raw(frames[i : i+1])
			synctest.Wait()
		}
		check(p)
	})
}

// A message in fragments of every size, with control frames in between, is one message.
func TestWebSocketFragments(t *testing.T) {
	whole := post("/up", pattern(9000))
	var calls atomic.Int32
	h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
		calls.Add(1)
		if Path(m) != "/up" || !bytes.Equal(m.Payload, whole.Payload) {
			return Response{Code: codes.BadRequest}
		}
		return Response{Code: codes.Changed}
	}}
	bubbleWebSocket(t, h, nil, func(t *testing.T, s *wsSim) {
		p := s.dial(t)
		b := body(whole)
		rounds := 0
		for _, size := range []int{1, 2, 3, 100, 125, 126, 1000, 8999, len(b) - 1, len(b)} {
			for at := 0; at < len(b); at += size {
				first := byte(0)
				if at == 0 {
					first = opBinary
				}
				if at+size >= len(b) {
					first |= finBit
				}
				p.raw(masked(first, b[at:min(at+size, len(b))]))
			}
			wantCode(t, p.read(), codes.Changed)
			rounds++
		}
		// Room is made twice as large each time, or many fragments would be copied over and over.
		for i := range 100 {
			p.raw(masked(map[bool]byte{true: opBinary}[i == 0], b[i:i+1]))
		}
		synctest.Wait()
		if n := s.count("buffered_bytes"); n != 128 {
			t.Errorf("100 fragments of a byte take %v", n)
		}
		p.raw(masked(0x80, b[100:]))
		wantCode(t, p.read(), codes.Changed)
		rounds++
		// The end may be a fragment of its own without bytes.
		p.raw(masked(0x02, b))
		synctest.Wait()
		if n := s.count("buffered_bytes"); n < float64(len(b)) {
			t.Errorf("an unfinished message of %d bytes is counted as %v", len(b), n)
		}
		p.raw(masked(0x80, nil))
		wantCode(t, p.read(), codes.Changed)
		if int(calls.Load()) != rounds+1 {
			t.Errorf("%d calls", calls.Load())
		}
	})
}

// What breaks WebSocket or CoAP ends the connection with Abort (RFC 8323, Section 5.6) and the status that fits.
func TestWebSocketMalformed(t *testing.T) {
	good := body(get("/a"))
	unmasked := append([]byte{0x82, byte(len(good))}, good...)
	for _, tc := range []struct {
		name   string
		bytes  []byte
		status int
		why    error
		says   string // in the diagnostic
	}{
		{"text", masked(0x81, good), statusUnsupported, ErrMalformed, "text"},
		{"text, first fragment", masked(0x01, good), statusUnsupported, ErrMalformed, ""},
		{"no mask", unmasked, statusProtocolError, ErrMalformed, "mask"},
		{"reserved bit 1", masked(0xc2, good), statusProtocolError, ErrMalformed, "reserved"},
		{"reserved bit 3", masked(0x92, good), statusProtocolError, ErrMalformed, ""},
		{"reserved data opcode", masked(0x83, good), statusProtocolError, ErrMalformed, ""},
		{"reserved control opcode", masked(0x8b, nil), statusProtocolError, ErrMalformed, ""},
		{"ping in fragments", masked(0x09, nil), statusProtocolError, ErrMalformed, "control"},
		{"ping of 126 bytes", masked(0x89, pattern(126)), statusProtocolError, ErrMalformed, ""},
		{"length of two bytes for 125", append([]byte{0x82, 0xfe, 0, 125, 0, 0, 0, 0}, pattern(125)...), statusProtocolError, ErrMalformed, "shortest"},
		{"length of eight bytes for 65535", []byte{0x82, 0xff, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0}, statusProtocolError, ErrMalformed, ""},
		{"length over 63 bits", []byte{0x82, 0xff, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}, statusProtocolError, ErrMalformed, ""},
		{"continuation of nothing", masked(0x80, good), statusProtocolError, ErrMalformed, "order"},
		{"new message in the middle of one", append(masked(0x02, good), masked(0x82, good)...), statusProtocolError, ErrMalformed, "order"},
		{"close of one byte", masked(0x88, []byte{3}), statusProtocolError, ErrMalformed, ""},
		{"close with 1005", masked(0x88, []byte{0x03, 0xed}), statusProtocolError, ErrMalformed, "Close"},
		{"close with 999", masked(0x88, []byte{0x03, 0xe7}), statusProtocolError, ErrMalformed, ""},
		{"close with no UTF-8", masked(0x88, []byte{0x03, 0xe8, 0xff}), statusProtocolError, ErrMalformed, ""},
		{"empty message", masked(0x82, nil), statusProtocolError, ErrMalformed, "ends"},
		{"message of one byte", masked(0x82, []byte{0}), statusProtocolError, ErrMalformed, ""},
		{"Len of 5", masked(0x82, unhex(t, "5001b16103")), statusProtocolError, ErrMalformed, "Len"},
		{"Len of 5 in fragments", append(masked(0x02, unhex(t, "50")), masked(0x80, unhex(t, "01b16103"))...), statusProtocolError, ErrMalformed, "Len"},
		{"token length 9", masked(0x82, unhex(t, "0901010203040506070809")), statusProtocolError, ErrMalformed, "token"},
		{"token cut", masked(0x82, unhex(t, "04010102")), statusProtocolError, ErrMalformed, "ends"},
		{"option over the end", masked(0x82, unhex(t, "0001b561")), statusProtocolError, ErrMalformed, ""},
		{"marker without payload", masked(0x82, unhex(t, "0001ff")), statusProtocolError, ErrMalformed, ""},
		{"critical option in a Ping", masked(0x82, unhex(t, "00e210")), statusProtocolError, ErrBadSignal, "critical option 1"},
		{"length of 4 GiB", []byte{0x82, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0}, statusTooBig, ErrTooLarge, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var called atomic.Bool
			h := handlerFuncs{request: func(context.Context, *Message) Response { called.Store(true); return Response{} }}
			bubbleWebSocket(t, h, nil, func(t *testing.T, s *wsSim) {
				p := s.dial(t)
				p.raw(tc.bytes)
				m := p.read()
				wantCode(t, m, codes.Abort)
				if !bytes.Contains(m.Payload, []byte(tc.says)) || len(m.Payload) == 0 {
					t.Errorf("Abort says %q", m.Payload)
				}
				status, text := p.closed()
				if status != tc.status || text == "" {
					t.Errorf("closed with %d %q, want %d", status, text, tc.status)
				}
				wantReason(t, s.reason(t), tc.why)
				if called.Load() {
					t.Error("it reached the handler")
				}
			})
		})
	}
}

// RFC 8323, Section 5.3.1, in one frame and in many: the limit is kept before anything beyond it is.
func TestWebSocketMessageLimit(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
		limit := s.srv.cfg.MaxMessageSize
		m := post("/a", pattern(limit))
		m.Payload = m.Payload[:2*len(m.Payload)-len(body(m))]
		b := body(m)
		if len(b) != limit {
			t.Fatalf("the message has %d bytes", len(b))
		}
		p := s.dial(t)
		p.raw(masked(0x82, b))
		wantCode(t, p.read(), codes.RequestEntityTooLarge) // the body is too much, the message is not
		p.raw(masked(0x02, b[:1000]))
		p.raw(masked(0x80, b[1000:]))
		wantCode(t, p.read(), codes.RequestEntityTooLarge)
		p.raw(masked(0x02, b))
		p.raw(masked(0x80, []byte{0})[:6]) // its header is enough
		wantCode(t, p.read(), codes.Abort)
		p.wantClosed(statusTooBig)
		wantReason(t, s.reason(t), ErrTooLarge)

		for _, length := range []byte{0x00, 0x7f} { // what an int of 32 bits just holds, and what none holds, beside what is there
			p = s.dial(t)
			p.raw(masked(0x02, b[:1000]))
			p.raw([]byte{0x80, 0xff, length, 0, 0, 0, 0x7f, 0xff, 0xff, 0xff, 1, 2, 3, 4})
			wantCode(t, p.read(), codes.Abort)
			p.wantClosed(statusTooBig)
			wantReason(t, s.reason(t), ErrTooLarge)
		}

		p = s.dial(t)
		p.raw(masked(0x82, append(b, 0))[:20])
		wantCode(t, p.read(), codes.Abort)
		p.wantClosed(statusTooBig)
		wantReason(t, s.reason(t), ErrTooLarge)
	})
}

// RFC 6455, Sections 5.5.1 and 7: the closing handshake from both sides.
func TestWebSocketClose(t *testing.T) {
	for _, tc := range []struct {
		name string
		do   func(t *testing.T, s *wsSim, p webPeer, release func())
		want int
		why  error
	}{
		{"the peer closes, and still gets its answers", func(t *testing.T, _ *wsSim, p webPeer, release func()) {
			p.send(get("/slow"))
			p.raw(masked(0x88, []byte{0x0b, 0xb8}))
			synctest.Wait()
			release()
			wantCode(t, p.read(), codes.Content)
		}, 3000, io.EOF},
		{"the peer closes without a status", func(_ *testing.T, _ *wsSim, p webPeer, _ func()) {
			p.raw(masked(0x88, nil))
		}, statusNone, io.EOF},
		{"the peer ends the connection without closing", func(_ *testing.T, _ *wsSim, p webPeer, _ func()) {
			_ = p.cable().CloseWrite()
		}, statusNormal, io.EOF},
		{"the peer releases", func(_ *testing.T, _ *wsSim, p webPeer, _ func()) {
			p.send(&Message{Code: codes.Release})
		}, statusNormal, ErrReleased},
		{"the peer aborts", func(_ *testing.T, _ *wsSim, p webPeer, _ func()) {
			p.send(&Message{Code: codes.Abort, Payload: []byte("enough")})
		}, statusNormal, ErrAborted},
		{"an answer closes", func(t *testing.T, _ *wsSim, p webPeer, _ func()) {
			wantCode(t, p.ask(get("/out")), codes.Unauthorized)
		}, statusNormal, ErrAnswered},
		{"the hub closes", func(_ *testing.T, s *wsSim, _ webPeer, _ func()) {
			(<-s.conns).Close(nil)
		}, statusNormal, ErrClosed},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var release chan struct{} // made in the bubble
			h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
				switch Path(m) {
				case "/slow":
					<-release
				case "/out":
					return Response{Code: codes.Unauthorized, Close: true}
				}
				return Response{Code: codes.Content, Payload: []byte(Path(m))}
			}}
			bubbleWebSocket(t, h, nil, func(t *testing.T, s *wsSim) {
				release = make(chan struct{})
				p := s.dial(t)
				tc.do(t, s, p, func() { close(release) })
				since := time.Now()
				p.wantClosed(tc.want)
				wantReason(t, s.reason(t), tc.why)
				if time.Since(since) != 0 {
					t.Errorf("both were done, and the connection ended %v later", time.Since(since))
				}
			})
		})
	}
}

// A peer that does not close in turn, and goes on asking, is cut off.
func TestWebSocketCloseUnanswered(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
		p := s.dial(t)
		(<-s.conns).Close(nil)
		since := time.Now()
		if first, b, err := p.nextFrame(); first != 0x88 || err != nil {
			t.Fatalf("%x %x %v", first, b, err)
		}
		p.send(get("/a"))
		wantReason(t, s.reason(t), ErrClosed)
		if took := time.Since(since); took < s.srv.cfg.CloseTimeout || took > s.srv.cfg.CloseTimeout+time.Second {
			t.Errorf("it was waited for %v", took)
		}
		if b, err := io.ReadAll(p.r); len(b) != 0 {
			t.Errorf("after its Close the hub said %x, %v", b, err)
		}
	})
}

// RFC 8323, Section 5.5: a hub that stops releases its connections, and says in WebSocket's words that it goes away.
func TestWebSocketShutdown(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
		idle, busy := s.dial(t), s.dial(t)
		busy.raw(masked(0x02, []byte{0})) // in the middle of a message
		synctest.Wait()
		done := make(chan struct{})
		go func() { defer close(done); s.leave() }()
		for _, p := range []webPeer{idle, busy} {
			wantCode(t, p.read(), codes.Release)
			p.wantClosed(statusGoingAway)
			wantReason(t, s.reason(t), ErrShutdown)
		}
		<-done
	})
}

// What is incomplete when the connection ends never reaches a handler.
func TestWebSocketCut(t *testing.T) {
	small := masked(0x82, body(post("/a", pattern(200))))
	large := masked(0x82, body(post("/a", pattern(70_000))))
	half := append(masked(0x02, body(post("/a", pattern(200)))), masked(0x89, nil)...)
	var cuts [][]byte
	for n := 1; n < len(small); n++ {
		cuts = append(cuts, small[:n])
	}
	cuts = append(cuts, large[:100], large[:20_000], large[:len(large)-1], half[:len(half)-1])
	var called atomic.Bool
	h := handlerFuncs{request: func(context.Context, *Message) Response { called.Store(true); return Response{Code: codes.Changed} }}
	bubbleWebSocket(t, h, nil, func(t *testing.T, s *wsSim) {
		for _, b := range cuts {
			p := s.dial(t)
			<-s.conns
			p.raw(b)
			_ = p.Close()
			wantReason(t, s.reason(t), io.ErrUnexpectedEOF)
		}
		// Between two fragments, too.
		p := s.dial(t)
		p.raw(half)
		_ = p.Close()
		if err := s.reason(t); err == nil {
			t.Error("no reason")
		}
		if called.Load() {
			t.Error("a part of a message was handled")
		}
	})
}

// Control frames are a sign of life, but neither a first message nor progress of one.
func TestWebSocketTimes(t *testing.T) {
	pinging := func(p webPeer, stop <-chan struct{}) {
		for {
			select {
			case <-time.After(5 * time.Second):
				if _, err := p.Write(masked(0x89, nil)); err != nil {
					return
				}
			case <-stop:
				return
			}
		}
	}
	for _, tc := range []struct {
		name  string
		begin []byte
		pings bool
		why   error
		text  codes.Code // what the hub says first
	}{
		{"only pings", nil, true, ErrIdle, 0},
		{"a message that never ends", append(masked(0x82, body(get("/a"))), masked(0x02, []byte{0})...), true, ErrSlow, codes.Abort},
		{"a frame that never ends", append(masked(0x82, body(get("/a"))), masked(0x82, body(get("/b")))[:5]...), false, ErrKeepAlive, codes.Ping},
		{"silence", masked(0x82, body(get("/a"))), false, ErrKeepAlive, codes.Ping},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
				p := s.dial(t)
				p.raw(tc.begin)
				stop := make(chan struct{})
				ended := make(chan struct{})
				go func() {
					defer close(ended)
					if tc.pings {
						pinging(p, stop)
					}
				}()
				var said []codes.Code
				status := 0
				for status == 0 {
					first, b, err := p.nextFrame()
					switch {
					case err != nil:
						t.Fatal(err)
					case first == 0x82 && b[1] != byte(codes.Content):
						said = append(said, codes.Code(b[1]))
					case first == 0x89:
						t.Error("RFC 8323, Section 4.4: no WebSocket Ping of ours")
					case first == 0x88:
						status = int(binary.BigEndian.Uint16(b))
					}
				}
				close(stop)
				_ = p.Close()
				<-ended
				wantReason(t, s.reason(t), tc.why)
				if status != statusPolicy {
					t.Errorf("status %d", status)
				}
				if tc.text != 0 && (len(said) != 1 || said[0] != tc.text) || tc.text == 0 && len(said) != 0 {
					t.Errorf("the hub said %v", said)
				}
			})
		})
	}
}

// A live connection that only answers the hub's Pings stays.
func TestWebSocketKeepAlive(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, nil, func(t *testing.T, s *wsSim) {
		p := s.dial(t)
		b := body(get("/a"))
		for _, frames := range [][]byte{masked(0x82, b), append(masked(0x02, b[:2]), masked(0x80, b[2:])...)} {
			// A message that came in pieces is over once it is whole: none takes too long from then on.
			p.raw(frames[:5])
			synctest.Wait()
			p.raw(frames[5:])
			wantCode(t, p.read(), codes.Content)
			for range 10 {
				m := p.read()
				wantCode(t, m, codes.Ping)
				p.send(&Message{Code: codes.Pong, Token: m.Token})
			}
		}
		wantCode(t, p.ask(get("/a")), codes.Content)
	})
}

// Pings whose sender reads no Pong cost the write queue and no more; he goes by the write deadline.
func TestWebSocketPongsAreBounded(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, func(c *Config) { c.WriteQueue = 4 << 10 }, func(t *testing.T, s *wsSim) {
		p := s.dialRoom(t, 2000)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			ping := masked(0x89, pattern(maxControl))
			for { // bursts, so that the time of the bubble goes on
				for range 100 {
					if _, err := p.Write(ping); err != nil {
						return
					}
				}
				<-time.After(time.Second)
			}
		}()
		wantReason(t, s.reason(t), ErrStuck)
		_ = p.Close()
		<-ended
		if s.count("messages_dropped_total", "pong") == 0 {
			t.Error("no Pong was dropped")
		}
	})
}

// A queue that stays full closes the connection, and the peer may try again later.
func TestWebSocketOverload(t *testing.T) {
	var release chan struct{} // made in the bubble
	h := handlerFuncs{request: func(context.Context, *Message) Response { <-release; return Response{Code: codes.Content} }}
	bubbleWebSocket(t, h, func(c *Config) { c.QueueLength = 2 }, func(t *testing.T, s *wsSim) {
		release = make(chan struct{})
		p := s.dial(t)
		for range 4 {
			p.send(get("/a"))
		}
		wantCode(t, p.read(), codes.Abort)
		close(release)
		status := 0
		for status == 0 {
			first, b, err := p.nextFrame()
			if err != nil {
				t.Fatal(err)
			}
			if first == 0x88 {
				status = int(binary.BigEndian.Uint16(b))
			}
		}
		_ = p.Close()
		if status != statusTryLater {
			t.Errorf("status %d", status)
		}
		wantReason(t, s.reason(t), ErrOverload)
	})
}

// Messages in fragments that are never finished take from the common budget, and no more than that.
func TestWebSocketBudget(t *testing.T) {
	bubbleWebSocket(t, handlerFuncs{}, func(c *Config) { c.MaxBuffered = 300_000 }, func(t *testing.T, s *wsSim) {
		a, b := s.dial(t), s.dial(t)
		part := masked(0x02, pattern(200_000))
		a.raw(part)
		synctest.Wait()
		b.raw(part)
		synctest.Wait()
		if n := s.count("buffered_bytes"); n > 300_000 || n < 200_000 {
			t.Errorf("%v bytes are buffered", n)
		}
		wantReason(t, s.reason(t), ErrOverload)
	})
}

// FuzzWebSocket feeds a connection arbitrary bytes behind the handshake. Nothing may panic, nothing may outlive the
// connection, no bound may be exceeded, and every byte of the budget comes back.
func FuzzWebSocket(f *testing.F) {
	frames, _ := conversation()
	f.Add(frames)
	f.Add([]byte{})
	for _, s := range seedFrames {
		f.Add(masked(0x82, unhex(f, s)))
	}
	big := body(post("/big", pattern(20_000)))
	f.Add(masked(0x82, big))
	f.Add(append(masked(0x02, big[:9000]), masked(0x80, big[9000:])...))
	f.Add(append(masked(0x02, big[:9000]), masked(0x00, big[9000:])...))
	f.Add(masked(0x82, body(post("/big", pattern(40_000)))))
	f.Add(masked(0x81, []byte("text")))
	f.Add(append(masked(0x82, body(&Message{Code: codes.Release})), 0x82))
	f.Add([]byte{0x82, 0xff, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{0x88, 0x82, 0, 0, 0, 0, 0x03, 0xe8})
	log := slog.New(slog.DiscardHandler)
	f.Fuzz(func(t *testing.T, b []byte) {
		cfg := DefaultConfig()
		cfg.MaxBuffered, cfg.MaxBody, cfg.MaxMessageSize = 60_000, 24<<10, 32<<10
		cfg.CloseTimeout = 5 * time.Second // a busy machine may need some of it for the last word
		why := make(chan error, 1)
		h := handlerFuncs{request: func(_ context.Context, m *Message) Response {
			if len(m.Payload) > cfg.MaxBody {
				t.Errorf("a body of %d bytes", len(m.Payload))
			}
			return Response{Code: codes.Content, Payload: []byte(Path(m))}
		}, closed: func(err error) { why <- err }}
		srv := NewServer(cfg, h, log, NewMetrics(prometheus.NewRegistry()))
		ln := newSimListener()
		stop := serveWebSocket(t, srv, ln)
		c := ln.dial(0, 1<<20)
		_, _ = io.WriteString(c, opening)
		r := bufio.NewReader(c)
		if res, err := http.ReadResponse(r, nil); err != nil || res.StatusCode != http.StatusSwitchingProtocols {
			t.Fatalf("%v, %v", res, err)
		}
		go func() {
			_, _ = c.Write(b)
			_ = c.CloseWrite()
		}()
		p := webPeer{&peer{t: t, Conn: c, r: r}}
		last := byte(0)
		for {
			first, payload, err := p.nextFrame()
			if err != nil {
				if !errors.Is(err, io.EOF) {
					t.Fatalf("after a frame %x: %v", last, err)
				}
				break
			}
			if last == 0x88 || first != 0x82 && first != 0x88 && first != 0x8a || first != 0x82 && len(payload) > maxControl {
				t.Fatalf("a frame %x with %d bytes after %x", first, len(payload), last)
			}
			last = first
		}
		_ = c.Close()
		// Whoever goes in the middle of a frame may miss it.
		if err := <-why; last != 0x88 && (errors.Is(err, ErrMalformed) || errors.Is(err, ErrTooLarge) || errors.Is(err, io.EOF)) {
			t.Fatalf("the last frame is %x, and the connection ended by %v", last, err)
		}
		stop()
		srv.budget.mu.Lock()
		defer srv.budget.mu.Unlock()
		if srv.budget.left != cfg.MaxBuffered {
			t.Fatalf("%d bytes of the budget are missing", cfg.MaxBuffered-srv.budget.left)
		}
	})
}
