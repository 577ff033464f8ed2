package coapgateway

import (
	"bytes"
	"io"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/tcp/coder"
)

// raw is a connection on which a test decides every byte.
type raw struct {
	t    *testing.T
	conn net.Conn
	buf  []byte
	hubs []message.Message // requests of the hub that came while an answer was awaited
}

func (h *hall) rawPlain() *raw {
	h.t.Helper()
	conn, err := net.Dial("tcp", h.gw.Addresses().Plain)
	if err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() { _ = conn.Close() })
	return &raw{t: h.t, conn: conn}
}

func request(code codes.Code, path string, token byte, payload []byte) message.Message {
	m := message.Message{Code: code, Token: message.Token{token}, Payload: payload}
	var buf [256]byte
	m.Options, _, _ = m.Options.SetPath(buf[:], path)
	return m
}

func post(path string, token byte, payload []byte) message.Message {
	return request(codes.POST, path, token, payload)
}

func get(path string, token byte) message.Message { return request(codes.GET, path, token, nil) }

func (r *raw) encode(ms ...message.Message) []byte {
	r.t.Helper()
	var all bytes.Buffer
	for _, m := range ms {
		n, err := coder.DefaultCoder.Size(m)
		if err != nil {
			r.t.Fatal(err)
		}
		b := make([]byte, n)
		if _, err := coder.DefaultCoder.Encode(m, b); err != nil {
			r.t.Fatal(err)
		}
		all.Write(b)
	}
	return all.Bytes()
}

// write sends all messages in one segment.
func (r *raw) write(ms ...message.Message) { r.bytes(r.encode(ms...)) }

func (r *raw) bytes(b []byte) {
	r.t.Helper()
	if _, err := r.conn.Write(b); err != nil {
		r.t.Fatal(err)
	}
}

// read returns the next message, false at the end of the connection.
func (r *raw) read() (message.Message, bool) {
	r.t.Helper()
	_ = r.conn.SetReadDeadline(time.Now().Add(30 * time.Second))
	for {
		m := message.Message{Options: make(message.Options, 0, 32)}
		var head coder.MessageHeader
		if _, err := coder.DefaultCoder.DecodeHeader(r.buf, &head); err == nil && len(r.buf) >= int(head.MessageLength) {
			whole := bytes.Clone(r.buf[:head.MessageLength])
			r.buf = r.buf[head.MessageLength:]
			if _, err := coder.DefaultCoder.Decode(whole, &m); err != nil {
				r.t.Fatalf("the hub sent %x: %v", whole, err)
			}
			return m, true
		}
		chunk := make([]byte, 4096)
		k, err := r.conn.Read(chunk)
		r.buf = append(r.buf, chunk[:k]...)
		if err == io.EOF || err != nil && !err.(net.Error).Timeout() {
			return m, false
		}
		if err != nil {
			r.t.Fatalf("no message came: %v", err)
		}
	}
}

// readAnswer returns the next answer to a request of the test, skipping signals, of which it answers pings (RFC 8323, Section
// 5.4), and the hub's own requests.
func (r *raw) readAnswer() message.Message {
	r.t.Helper()
	for {
		m, ok := r.read()
		if !ok {
			r.t.Fatal("the hub closed the connection")
		}
		if m.Code == codes.Ping {
			r.write(message.Message{Code: codes.Pong, Token: m.Token})
		}
		if m.Code >= 64 && m.Code < 224 {
			return m
		}
	}
}
