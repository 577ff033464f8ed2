package hostile_test

import (
	"crypto/tls"
	"encoding/binary"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/tcp/coder"
	udpcoder "github.com/plgd-dev/go-coap/v3/udp/coder"
)

// What hostile devices have in common: messages in go-coap's coding, or broken by hand, and still no engine.

// get makes a GET; post a POST of a body in CBOR.
func get(path string, query ...string) message.Message {
	m := message.Message{Code: codes.GET, Token: []byte{1}}
	for seg := range strings.SplitSeq(strings.TrimPrefix(path, "/"), "/") {
		m.Options = m.Options.Add(message.Option{ID: message.URIPath, Value: []byte(seg)})
	}
	for _, q := range query {
		m.Options = m.Options.Add(message.Option{ID: message.URIQuery, Value: []byte(q)})
	}
	return m
}

func post(path string, body any, query ...string) message.Message {
	m := get(path, query...)
	m.Code = codes.POST
	m.Options = withUint(m.Options, message.ContentFormat, uint32(message.AppOcfCbor))
	b, err := cbor.Marshal(body)
	if err != nil {
		panic(err) // of values in these tests
	}
	m.Payload = b
	return m
}

// withUint adds an option whose value is a number (RFC 7252, Section 3.2).
func withUint(o message.Options, id message.OptionID, v uint32) message.Options {
	b := binary.BigEndian.AppendUint32(nil, v)
	for len(b) > 0 && b[0] == 0 {
		b = b[1:]
	}
	return o.Add(message.Option{ID: id, Value: b})
}

// frame encodes a message for a stream (RFC 8323, Section 3.2).
func frame(m message.Message) []byte {
	n, err := coder.DefaultCoder.Size(m)
	if err != nil {
		panic(err) // of messages in these tests
	}
	b := make([]byte, n)
	if _, err := coder.DefaultCoder.Encode(m, b); err != nil {
		panic(err)
	}
	return b
}

// datagram encodes a message for UDP (RFC 7252, Section 3).
func datagram(typ message.Type, id uint16, m message.Message) []byte {
	m.Type, m.MessageID = typ, int32(id)
	n, err := udpcoder.DefaultCoder.Size(m)
	if err != nil {
		panic(err) // of messages in these tests
	}
	b := make([]byte, n)
	if _, err := udpcoder.DefaultCoder.Encode(m, b); err != nil {
		panic(err)
	}
	return b
}

// parse decodes a datagram.
func parse(b []byte) (m message.Message, ok bool) {
	m.Options = make(message.Options, 0, 32)
	_, err := udpcoder.DefaultCoder.Decode(b, &m)
	return m, err == nil
}

// stranger is a connection over TLS of a device that has a certificate and does what a test says.
type stranger struct {
	net.Conn
	t   *testing.T
	raw *net.TCPConn
	id  string
	buf []byte // what was read and is no whole message yet
}

// secure dials the hub's TLS door with a device's certificate.
func (w *world) secure(id string) *stranger {
	w.t.Helper()
	raw := dial(w.t, w.CoAPS)
	c := tls.Client(raw, w.Onboard(w.t, id).TLS)
	if err := c.HandshakeContext(w.t.Context()); err != nil {
		w.t.Fatal(err)
	}
	return &stranger{Conn: c, t: w.t, raw: raw.(*net.TCPConn), id: id}
}

// signedIn is a device that has signed up and in. It says that it takes large messages.
func (w *world) signedIn(id string) *stranger {
	w.t.Helper()
	s := w.secure(id)
	write(s, frame(message.Message{Code: codes.CSM, Options: withUint(nil, 2, 1<<20)})) // Max-Message-Size
	s.signIn(s.signUp(w.Code(w.t, id)))
	return s
}

// tokens are what sign-up brings.
type tokens struct {
	UID     string `cbor:"uid"`
	Access  string `cbor:"accesstoken"`
	Refresh string `cbor:"refreshtoken"`
}

func (s *stranger) signUp(code string) (got tokens) {
	s.t.Helper()
	a := s.want(codes.Changed, post("/oic/sec/account", map[string]any{"di": s.id, "accesstoken": code}))
	if err := cbor.Unmarshal(a.Payload, &got); err != nil {
		s.t.Fatal(err)
	}
	return got
}

func (s *stranger) signIn(with tokens) {
	s.t.Helper()
	s.want(codes.Changed, signIn(s.id, with))
}

func signIn(id string, with tokens) message.Message {
	return post("/oic/sec/session", map[string]any{"di": id, "uid": with.UID, "accesstoken": with.Access, "login": true})
}

// want asks and wants an answer with this code.
func (s *stranger) want(code codes.Code, m message.Message) message.Message {
	s.t.Helper()
	a := s.ask(m)
	if a.Code != code {
		s.t.Fatalf("%v: %v %q, want %v", m.Code, a.Code, a.Payload, code)
	}
	return a
}

// ask sends a request and returns its answer. To what the hub asks meanwhile it says that there is nothing.
func (s *stranger) ask(m message.Message) message.Message {
	s.t.Helper()
	if !write(s, frame(m)) {
		s.t.Fatalf("%v: the hub has closed the connection", m.Code)
	}
	for {
		a, ok := s.read()
		switch class := a.Code >> 5; {
		case !ok:
			s.t.Fatalf("%v: no answer", m.Code)
		case class == 0 && a.Code != codes.Empty:
			write(s, frame(message.Message{Code: codes.NotFound, Token: a.Token}))
		case class != 0 && class != 7 && string(a.Token) == string(m.Token):
			return a
		}
	}
}

// read reads the next message; ok is false at the end of the connection.
func (s *stranger) read() (m message.Message, ok bool) {
	_ = s.SetReadDeadline(time.Now().Add(patience))
	chunk := make([]byte, 64<<10)
	for {
		var h coder.MessageHeader
		if len(s.buf) > 1 {
			if _, err := coder.DefaultCoder.DecodeHeader(s.buf, &h); err == nil && uint32(len(s.buf)) >= h.MessageLength {
				m.Options = make(message.Options, 0, 32)
				if _, err := coder.DefaultCoder.Decode(s.buf[:h.MessageLength], &m); err != nil {
					s.t.Fatalf("the hub's message: %v", err)
				}
				s.buf = s.buf[h.MessageLength:]
				return m, true
			}
		}
		n, err := s.Read(chunk)
		if err != nil {
			return m, false
		}
		s.buf = append(s.buf[:len(s.buf):len(s.buf)], chunk[:n]...)
	}
}

// end reads to the end of the connection and returns the hub's Abort, if it sent one, and whether there was an end.
func (s *stranger) end() (abort string, over bool) {
	s.t.Helper()
	for {
		m, ok := s.read()
		if !ok {
			_, over = ended(s)
			return abort, over
		}
		if m.Code == codes.Abort {
			abort = string(m.Payload)
		}
	}
}
