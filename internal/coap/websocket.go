package coap

import (
	"context"
	"crypto/sha1" //nolint:gosec // RFC 6455, Section 4.2.2 asks for it; it proves nothing but that we understood
	"crypto/tls"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"unicode/utf8"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// WebSocketPath is where a WebSocket for CoAP is opened (RFC 8323, Sections 8.3 and 8.4).
const WebSocketPath = "/.well-known/coap"

// WebSocket is the way in over WebSocket (RFC 8323, Section 4): a handler of WebSocketPath for an HTTP server of somebody
// else's. A connection that it takes over is this engine's alone from then on, with one goroutine and the bounds of TCP.
//
// The framing is our own, in the stream's buffers: a library would keep buffers and a lock of its own for each connection,
// write each message by itself, and know nothing of the budget that unfinished messages are taken from.
type WebSocket struct {
	srv     *Server
	origins map[string]bool

	mu sync.Mutex
	l  *listener // nil while not serving
}

// NewWebSocket makes a way in that takes nobody before Serve is called. origins are those of the web pages, besides pages of
// the HTTP server itself, whose scripts may connect, such as "https://console.example.com". Who sends no Origin is no
// browser, and may.
func (s *Server) NewWebSocket(origins []string) *WebSocket {
	w := &WebSocket{srv: s, origins: make(map[string]bool)}
	for _, o := range origins {
		w.origins[strings.ToLower(o)] = true
	}
	return w
}

// Serve takes connections until ctx ends, and calls ready once it does; then it releases them (7.04), closes them, waits for all
// their goroutines and returns. It is called once.
func (w *WebSocket) Serve(ctx context.Context, ready func()) {
	w.srv.enter()
	defer w.srv.leave()
	l := &listener{srv: w.srv, open: make(map[*Conn]struct{})}
	w.set(l)
	defer w.srv.list(l)()
	ready()
	select {
	case <-ctx.Done():
	case <-w.srv.draining.Done():
	}
	w.set(nil)
	<-ctx.Done()
	l.release()
	l.wg.Wait()
}

func (w *WebSocket) set(l *listener) {
	w.mu.Lock()
	w.l = l
	w.mu.Unlock()
}

// enter takes a place among those whom Serve waits for; nil while it does not serve.
func (w *WebSocket) enter() *listener {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.l != nil {
		w.l.wg.Add(1)
	}
	return w.l
}

var (
	errNotWebSocket = hub.NewError(hub.Invalid, "websocket-expected", "CoAP is spoken here over WebSocket (RFC 8323) on HTTP/1.1: send GET with Upgrade: websocket")
	errHandshake    = hub.NewError(hub.Invalid, "websocket-handshake", "the handshake breaks RFC 6455, Section 4.1")
	errSubprotocol  = hub.NewError(hub.Invalid, "websocket-subprotocol", "the subprotocol coap must be offered")
	errOrigin       = hub.NewError(hub.Denied, "websocket-origin", "pages of this origin may not connect")
	errNoRoom       = hub.NewError(hub.Unavailable, "websocket-unavailable", "no further connection is taken now")
)

// ServeHTTP answers the opening handshake (RFC 6455, Section 4.2) and takes the connection over, or says why not.
func (w *WebSocket) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	s := w.srv
	refuse := func(status int, reason string, err *hub.Error) {
		s.refuse(remoteAddr(r.RemoteAddr), reason, err.Text)
		h := rw.Header()
		h.Set("Content-Type", "text/plain; charset=utf-8")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		rw.WriteHeader(status)
		_, _ = io.WriteString(rw, err.Code+": "+err.Text+"\n")
	}
	if status, err := w.check(r, rw.Header()); err != nil {
		refuse(status, "websocket", err)
		return
	}
	l := w.enter()
	if l == nil {
		rw.Header().Set("Retry-After", "5")
		refuse(http.StatusServiceUnavailable, "websocket", errNoRoom)
		return
	}
	if !s.admitProven() {
		l.wg.Done()
		rw.Header().Set("Retry-After", "5")
		refuse(http.StatusServiceUnavailable, "max-connections", errNoRoom)
		return
	}
	nc, buffered, err := http.NewResponseController(rw).Hijack()
	if err == nil && buffered.Reader.Buffered() > 0 {
		// RFC 6455, Section 4.1: the client sends nothing before our answer. There is no way left to say so.
		_ = nc.Close()
		err = errors.New("data before the handshake was answered")
	}
	if err != nil {
		s.gone()
		l.wg.Done()
		s.refuse(remoteAddr(r.RemoteAddr), "websocket", err.Error())
		return
	}
	raw := nc
	if tc, ok := nc.(*tls.Conn); ok {
		raw = tc.NetConn()
	}
	// A goroutine of its own, so that all that HTTP needed for the handshake goes away. It takes over our places.
	go l.serve(nc, raw, &webSocket{host: r.Host, accept: acceptKey(r.Header.Get("Sec-WebSocket-Key"))})
}

// check returns what is wrong with a handshake, and the HTTP status that says so; h gets the headers that belong to it.
func (w *WebSocket) check(r *http.Request, h http.Header) (int, *hub.Error) {
	switch {
	case r.ProtoMajor != 1 || r.ProtoMinor < 1:
		return http.StatusHTTPVersionNotSupported, errNotWebSocket // HTTP/2 has no Upgrade, and we no RFC 8441
	case r.Method != http.MethodGet:
		h.Set("Allow", http.MethodGet)
		return http.StatusMethodNotAllowed, errNotWebSocket
	case !names(r.Header["Connection"], "upgrade") || !names(r.Header["Upgrade"], "websocket"):
		h.Set("Upgrade", "websocket")
		h.Set("Connection", "Upgrade")
		return http.StatusUpgradeRequired, errNotWebSocket
	case !w.allows(r):
		return http.StatusForbidden, errOrigin
	case !names(r.Header["Sec-Websocket-Version"], "13"):
		h.Set("Sec-WebSocket-Version", "13") // RFC 6455, Section 4.4
		return http.StatusUpgradeRequired, errHandshake
	}
	key, err := base64.StdEncoding.DecodeString(r.Header.Get("Sec-WebSocket-Key"))
	switch {
	case err != nil || len(key) != 16 || len(r.Header["Sec-Websocket-Key"]) != 1 || r.Host == "" || r.ContentLength != 0:
		return http.StatusBadRequest, errHandshake
	case !names(r.Header["Sec-Websocket-Protocol"], "coap"):
		return http.StatusBadRequest, errSubprotocol // RFC 8323, Section 4.1: the client MUST include it
	}
	return 0, nil
}

// allows tells whether the page behind a handshake may connect: browsers ask no server before they open a WebSocket
// (RFC 6455, Section 10.2).
func (w *WebSocket) allows(r *http.Request) bool {
	sent := r.Header["Origin"]
	if len(sent) == 0 {
		return true
	}
	origin := strings.ToLower(sent[0])
	if len(sent) > 1 || w.origins[origin] {
		return len(sent) == 1
	}
	u, err := url.Parse(origin)
	return err == nil && u.Host != "" && u.Host == strings.ToLower(r.Host) // a page of our own
}

// names tells whether a header that is a list has a word, in any case.
func names(values []string, word string) bool {
	for _, v := range values {
		for w := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(w), word) {
				return true
			}
		}
	}
	return false
}

// acceptKey is RFC 6455, Section 4.2.2, number 5, step 4.
func acceptKey(key string) string {
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) //nolint:gosec // see the import
	return base64.StdEncoding.EncodeToString(sum[:])
}

// remoteAddr is an address as net/http has it.
type remoteAddr string

func (a remoteAddr) Network() string { return "tcp" }
func (a remoteAddr) String() string  { return string(a) }

// webSocket is what a stream that is one has besides.
type webSocket struct {
	host, accept string
	status       atomic.Uint32 // of the peer's Close frame; 0 before it came
}

// upgrade answers the handshake, in the same write as our CSM.
func (s *stream) upgrade() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = append(s.buffer(), "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: "+s.ws.accept+"\r\nSec-WebSocket-Protocol: coap\r\n\r\n"...)
}

// Opcodes of RFC 6455, Section 5.2.
const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10

	finBit  = 0x80
	maskBit = 0x80
	// maxControl is the most a control frame may carry (RFC 6455, Section 5.5).
	maxControl = 125
)

// wsFrame is the header of a frame from a client.
type wsFrame struct {
	fin  bool
	op   byte
	size int // of the header itself
	n    int // of the payload
	key  [4]byte
}

var (
	errTextFrame = errors.New("a text frame; CoAP goes in binary ones")
	errReserved  = errors.New("a WebSocket frame with reserved bits or opcode")
	errUnmasked  = errors.New("a WebSocket frame without mask")
	errControl   = errors.New("a WebSocket control frame in fragments or over 125 bytes")
	errLength    = errors.New("a WebSocket length that is not the shortest form")
	errFragment  = errors.New("WebSocket fragments out of order")
	errCloseCode = errors.New("a WebSocket Close frame with a status that must not be sent")
	errLenNibble = errors.New("Len is not zero")
	errShort     = errors.New("message ends in its header")
)

// parseFrame reads the header at the start of b (RFC 6455, Section 5.2). ok is false while b is too short to tell; what is
// wrong is an error as soon as it can be seen.
func parseFrame(b []byte) (f wsFrame, ok bool, err error) {
	if len(b) < 2 {
		return f, false, nil
	}
	f.fin, f.op, f.n = b[0]&finBit != 0, b[0]&0x0f, int(b[1]&0x7f)
	switch {
	case b[0]&0x70 != 0: // no extension was negotiated
		return f, false, errReserved
	case f.op == opText:
		return f, false, errTextFrame // RFC 8323, Section 4.2
	case f.op != opContinuation && f.op != opBinary && (f.op < opClose || f.op > opPong):
		return f, false, errReserved
	case b[1]&maskBit == 0:
		return f, false, errUnmasked // RFC 6455, Section 5.1: a server MUST close
	case f.op >= opClose && (!f.fin || f.n > maxControl):
		return f, false, errControl
	}
	ext := 0
	switch f.n {
	case 126:
		ext = 2
	case 127:
		ext = 8
	}
	if f.size = 2 + ext + len(f.key); len(b) < f.size {
		return f, false, nil
	}
	if ext > 0 {
		var long [8]byte
		copy(long[8-ext:], b[2:2+ext])
		n := binary.BigEndian.Uint64(long[:])
		if n < 126 || ext == 8 && n <= 0xffff || n >= 1<<63 {
			return f, false, errLength
		}
		f.n = int(min(n, 1<<31-1)) //nolint:gosec // bounded, and over every limit
	}
	copy(f.key[:], b[f.size-len(f.key):])
	return f, true, nil
}

// unmask is RFC 6455, Section 5.3, for the whole payload of a frame.
func (f *wsFrame) unmask(b []byte) {
	word := uint64(binary.LittleEndian.Uint32(f.key[:]))
	word |= word << 32
	for ; len(b) >= 8; b = b[8:] {
		binary.LittleEndian.PutUint64(b, binary.LittleEndian.Uint64(b)^word)
	}
	for i := range b {
		b[i] ^= f.key[i&3]
	}
}

// readWebSocket is read for a WebSocket: a CoAP message is the payload of a frame, or of several with control frames in
// between.
func (s *stream) readWebSocket() error {
	in := s.intake()
	defer in.free()
	var (
		own  []byte // of the message in fragments
		held int    // what of the budget own has
		open bool   // a message in fragments is under way
	)
	defer func() { s.c.srv.budget.give(held) }()
	for {
		b := in.bytes()
		f, ok, err := parseFrame(b)
		switch {
		case err != nil:
			return fmt.Errorf("%w: %w", ErrMalformed, err)
		case !ok:
			if err := in.more(); err != nil {
				return err
			}
			continue
		case f.op < opClose && (f.op == opContinuation) != open:
			return fmt.Errorf("%w: %w", ErrMalformed, errFragment)
		case f.op < opClose && f.n > s.c.srv.cfg.MaxMessageSize-len(own): // before anything of it is kept
			return fmt.Errorf("%w: %d bytes and %d more", ErrTooLarge, len(own), f.n)
		}
		whole := f.size + f.n
		if f.op >= opClose || f.fin && !open && whole <= bigBuffer {
			if len(b) < whole {
				if err := in.more(); err != nil {
					return err
				}
				continue
			}
			in.r += whole
			b = b[f.size:whole]
			f.unmask(b)
			if !open {
				s.frameSince.Store(0)
			}
			if f.op >= opClose {
				err = s.control(f.op, b)
			} else {
				err = s.deliverWebSocket(append(make([]byte, 0, len(b)), b...), 0)
			}
		} else {
			in.r += f.size
			start := len(own)
			if own, held, err = in.gather(own, held, f.n, f.fin); err != nil {
				return err
			}
			f.unmask(own[start:])
			if open = !f.fin; !open {
				m, taken := own, held
				own, held = nil, 0
				s.frameSince.Store(0)
				err = s.deliverWebSocket(m, taken)
			}
		}
		if err != nil {
			return err
		}
	}
}

// deliverWebSocket hands on a message as RFC 8323, Section 4.2 forms it: that of TCP with a Len of zero. held bytes of the
// budget are given away.
func (s *stream) deliverWebSocket(m []byte, held int) error {
	var err error
	h := header{size: 2}
	switch {
	case len(m) < h.size:
		err = errShort
	case m[0]>>4 != 0:
		err = errLenNibble
	case m[0] > maxToken:
		err = errTokenLength
	default:
		if h.code, h.tkl = codes.Code(m[1]), int(m[0]); len(m) < h.size+h.tkl {
			err = errShort
		}
	}
	if err != nil {
		s.c.srv.budget.give(held)
		return fmt.Errorf("%w: %w", ErrMalformed, err)
	}
	h.body = len(m) - h.size - h.tkl
	return s.deliver(h, m[h.size:], held)
}

// control handles a control frame (RFC 6455, Section 5.5). io.EOF is the peer's orderly end: what it sent before is still
// handled and answered.
func (s *stream) control(op byte, b []byte) error {
	switch op {
	case opPing: // RFC 8323, Section 4.4: nobody should, but it is answered (RFC 6455, Section 5.5.2)
		s.pong(b)
	case opClose:
		status := uint32(statusNone)
		if len(b) > 0 {
			if len(b) < 2 || !sendable(binary.BigEndian.Uint16(b)) || !utf8.Valid(b[2:]) {
				return fmt.Errorf("%w: %w", ErrMalformed, errCloseCode)
			}
			status = uint32(binary.BigEndian.Uint16(b))
		}
		s.ws.status.Store(status)
		return io.EOF
	}
	return nil
}

// pong answers a Ping, unless the peer does not read: then one of those that follow is answered (RFC 6455, Section 5.5.3).
func (s *stream) pong(b []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.finished || len(s.pending) >= s.c.srv.cfg.WriteQueue {
		s.c.srv.metrics.dropped.WithLabelValues("pong").Inc()
		return
	}
	s.pending = append(appendFrameHeader(s.buffer(), opPong, len(b)), b...)
	s.startWriter()
}

// Status codes of RFC 6455, Section 7.4.1.
const (
	statusNormal        = 1000
	statusGoingAway     = 1001
	statusProtocolError = 1002
	statusUnsupported   = 1003
	statusNone          = 1005 // never on the wire: a Close frame without status
	statusPolicy        = 1008
	statusTooBig        = 1009
	statusInternal      = 1011
	statusTryLater      = 1013 // of the IANA registry
)

// sendable tells whether a status may stand in a Close frame: those that are defined for it, and those for libraries and
// applications (RFC 6455, Section 7.4.2, and the IANA registry).
func sendable(status uint16) bool {
	return status >= 1000 && status <= 1003 || status >= 1007 && status <= 1014 || status >= 3000 && status <= 4999
}

// closeStatus says why a connection ends in WebSocket's terms.
func closeStatus(why error) int {
	for _, e := range []struct {
		err    error
		status int
	}{
		{errTextFrame, statusUnsupported}, // before what it is wrapped in
		{ErrMalformed, statusProtocolError},
		{ErrBadSignal, statusProtocolError},
		{ErrTooLarge, statusTooBig},
		{ErrShutdown, statusGoingAway},
		{ErrPanic, statusInternal},
		{ErrOverload, statusTryLater},
		{ErrIdle, statusPolicy},
		{ErrKeepAlive, statusPolicy},
		{ErrSlow, statusPolicy},
	} {
		if errors.Is(why, e.err) {
			return e.status
		}
	}
	return statusNormal
}

// appendClose appends the Close frame for the end of a connection: the peer's own status if it closed, else ours with a
// sentence.
func (w *webSocket) appendClose(b []byte, why error) []byte {
	status, text := int(w.status.Load()), ""
	var ce *CloseError
	switch {
	case status == statusNone:
		return appendFrameHeader(b, opClose, 0)
	case status != 0: // RFC 6455, Section 5.5.1: it is echoed
	default:
		status = closeStatus(why)
		if errors.As(why, &ce) {
			text = ce.text[:min(len(ce.text), maxControl-2)]
		}
	}
	b = appendFrameHeader(b, opClose, 2+len(text))
	b = binary.BigEndian.AppendUint16(b, uint16(status)) //nolint:gosec // one of four digits
	return append(b, text...)
}

// appendFrameHeader appends the header of a whole message of n bytes. A server does not mask (RFC 6455, Section 5.1).
func appendFrameHeader(b []byte, op byte, n int) []byte {
	b = append(b, finBit|op)
	switch {
	case n < 126:
		return append(b, byte(n))
	case n <= 0xffff:
		return binary.BigEndian.AppendUint16(append(b, 126), uint16(n))
	}
	return binary.BigEndian.AppendUint64(append(b, 127), uint64(n)) //nolint:gosec // a length
}

// appendWebSocketMessage appends m as one message of one frame (RFC 8323, Section 4.2). What holds for appendFrame holds here.
func appendWebSocketMessage(b []byte, m *Message) []byte {
	b = appendFrameHeader(b, opBinary, 2+len(m.Token)+bodySize(m))
	b = append(b, byte(len(m.Token)), byte(m.Code))
	b = append(b, m.Token...)
	return appendBody(b, m)
}
