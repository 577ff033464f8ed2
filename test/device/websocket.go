package device

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/coder/websocket"
)

// DialWebSocket opens a WebSocket for CoAP (RFC 8323, 4) at a hub's host:port, inside TLS unless conf is nil, as a
// connection for a CoAP engine that speaks over TCP: what is written and read are that transport's messages, each Write one or
// more whole ones, for which there is writeTimeout. Deadlines are not kept.
func DialWebSocket(ctx context.Context, addr string, conf *tls.Config) (net.Conn, error) {
	var raw net.Conn
	transport := &http.Transport{
		TLSClientConfig: conf,
		DialContext: func(ctx context.Context, network, addr string) (_ net.Conn, err error) {
			raw, err = (&net.Dialer{}).DialContext(ctx, network, addr)
			return raw, err
		},
	}
	scheme := "ws"
	if conf != nil {
		scheme = "wss"
	}
	conn, res, err := websocket.Dial(ctx, scheme+"://"+addr+"/.well-known/coap", &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: transport}, Subprotocols: []string{"coap"},
	})
	transport.CloseIdleConnections()
	if err != nil {
		if res != nil && res.Body != nil {
			_ = res.Body.Close()
		}
		return nil, err
	}
	conn.SetReadLimit(maxMessage)
	return &webSocket{conn: conn, raw: raw}, nil
}

// webSocket puts the length into each message that comes and takes it out of each that goes (RFC 8323, 4.2).
type webSocket struct {
	conn *websocket.Conn
	raw  net.Conn
	rest []byte // of the message that is being read
}

func (w *webSocket) Read(b []byte) (int, error) {
	if len(w.rest) == 0 {
		kind, m, err := w.conn.Read(context.Background())
		if err != nil {
			return 0, err
		}
		if kind != websocket.MessageBinary || len(m) < 2 || m[0] > 8 || len(m) < 2+int(m[0]) {
			_ = w.conn.Close(websocket.StatusProtocolError, "no CoAP message")
			return 0, fmt.Errorf("a WebSocket message of %d bytes is no CoAP message", len(m))
		}
		w.rest = lengthen(m)
	}
	n := copy(b, w.rest)
	w.rest = w.rest[n:]
	return n, nil
}

// lengthen gives a message its length: a nibble, and one, two or four bytes where that is not enough (RFC 8323, 3.2).
func lengthen(m []byte) []byte {
	n := len(m) - 2 - int(m[0])
	var head []byte
	switch {
	case n < 13:
		head = []byte{byte(n)<<4 | m[0]}
	case n < 269:
		head = []byte{13<<4 | m[0], byte(n - 13)}
	case n < 65805:
		head = binary.BigEndian.AppendUint16([]byte{14<<4 | m[0]}, uint16(n-269))
	default:
		head = binary.BigEndian.AppendUint32([]byte{15<<4 | m[0]}, uint32(n-65805))
	}
	return append(head, m[1:]...)
}

func (w *webSocket) Write(b []byte) (int, error) {
	ctx, stop := context.WithTimeout(context.Background(), writeTimeout)
	defer stop()
	for left := b; len(left) > 0; {
		m, n, err := shorten(left)
		if err == nil {
			err = w.conn.Write(ctx, websocket.MessageBinary, m)
		}
		if err != nil {
			return len(b) - len(left), err
		}
		left = left[n:]
	}
	return len(b), nil
}

// shorten is the way back for the first of the messages in b; n is how many bytes it had.
func shorten(b []byte) (m []byte, n int, err error) {
	var wide [4]byte
	ext := map[byte]int{13: 1, 14: 2, 15: 4}[b[0]>>4]
	if len(b) < 2+ext {
		return nil, 0, fmt.Errorf("a CoAP message ends in its header")
	}
	copy(wide[4-ext:], b[1:1+ext])
	n = int(binary.BigEndian.Uint32(wide[:])) + map[int]int{0: int(b[0] >> 4), 1: 13, 2: 269, 4: 65805}[ext] + 2 + ext + int(b[0]&0x0f)
	if n > len(b) {
		return nil, 0, fmt.Errorf("a CoAP message ends after %d of %d bytes", len(b), n)
	}
	return append([]byte{b[0] & 0x0f}, b[1+ext:n]...), n, nil
}

// Close says so to the other side and waits for its answer, but not for long.
func (w *webSocket) Close() error { return w.conn.Close(websocket.StatusNormalClosure, "") }

func (w *webSocket) LocalAddr() net.Addr            { return w.raw.LocalAddr() }
func (w *webSocket) RemoteAddr() net.Addr           { return w.raw.RemoteAddr() }
func (*webSocket) SetDeadline(time.Time) error      { return nil }
func (*webSocket) SetReadDeadline(time.Time) error  { return nil }
func (*webSocket) SetWriteDeadline(time.Time) error { return nil }
