package hostile_test

import (
	"bufio"
	"bytes"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/test/dose"
)

// trickle writes b one byte at a time on each connection, as long as they take it, and returns when none does any more or all
// of b is written. Each then shows with ended what became of it.
func trickle(conns []net.Conn, b []byte, pause time.Duration) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	open := append([]net.Conn(nil), conns...)
	for i := 0; i < len(b) && len(open) > 0; i++ {
		<-tick.C
		left := open[:0]
		for _, c := range open {
			if write(c, b[i:i+1]) {
				left = append(left, c)
			}
		}
		open = left
	}
}

// TestTLSHandshakeByteByByte: a handshake that goes on, but slowly, has no more time than any other.
func TestTLSHandshakeByteByByte(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conns := make([]net.Conn, 20)
	for i := range conns {
		conns[i] = dial(t, w.CoAPS)
	}
	trickle(conns, hello(t), 100*time.Millisecond) // it has about 250 bytes
	for i, c := range conns {
		if said, over := ended(c); !over || len(said) > 0 {
			t.Fatalf("connection %d: the hub said %x, ended %t", i, said, over)
		}
	}
	if n := w.usage()[`coaphub_coap_handshakes_total{outcome="timeout"}`]; int(n) != len(conns) {
		t.Errorf("%v handshakes have timed out, want %d", n, len(conns))
	}
	w.undisturbed()
	w.givenBack()
}

// TestMessageByteByByte: messages that are announced as long as the hub takes them, and come a byte at a time, cost
// what has come of them. Nightly, the hub loses its patience with them and says so (RFC 8323, Section 5.6).
func TestMessageByteByByte(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "coapGateway.api.coap.plainAddress=127.0.0.1:0")
	conns := make([]net.Conn, 400)
	for i := range conns {
		if i%20 > 0 {
			conns[i] = dial(t, w.CoAPPlain)
		} else {
			conns[i] = w.secure(deviceID(3)).Conn
		}
		write(conns[i], frame(message.Message{Code: codes.CSM})) // who says nothing whole has less time
	}
	// RFC 8323, Section 3.2: four bytes of length, a POST, no token, no option, a payload of 250 KiB.
	large := append([]byte{0xf0, 0, 0x03, 0xe8 - 0x10, 0, 2, 0xff}, make([]byte, dose.Of(100, 200, 1000))...)
	trickle(conns, large, dose.Of(20*time.Millisecond, 20*time.Millisecond, 100*time.Millisecond))
	if n := w.usage().connections() - w.before.connections(); !dose.Night() && n != len(conns) {
		t.Errorf("%d of %d connections are there", n, len(conns))
	}
	w.costs(len(conns)+20, dose.Of(48, 48, 96)*mebibyte)
	w.undisturbed()
	for i, c := range conns {
		if dose.Night() {
			if said, over := ended(c); !over || !strings.Contains(string(said), "took too long") {
				t.Fatalf("connection %d: the hub said %q, ended %t", i, said, over)
			}
		}
		_ = c.Close()
	}
	w.givenBack()
}

// TestPeerThatNeverReads: who asks and asks, and never reads an answer, is let go, and what waits for it is bounded.
func TestPeerThatNeverReads(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "coapGateway.deviceToDevice.mode=off")
	c := w.signedIn(deviceID(3))
	if err := c.raw.SetReadBuffer(4 << 10); err != nil {
		t.Fatal(err)
	}
	long := "/" + strings.Repeat("x", 200)
	links := make([]map[string]any, 50)
	for i := range links {
		links[i] = map[string]any{"href": fmt.Sprint(long, i), "rt": []string{long}, "if": []string{long}}
	}
	c.want(codes.Changed, post("/oic/rd", map[string]any{"di": deviceID(3), "ttl": 0, "links": links}, "rt=oic.wk.rdpub"))
	many := bytes.Repeat(frame(get("/oic/res")), 1000)
	for write(c, many) {
	}
	w.costs(20, 48*mebibyte)
	u := w.usage()
	if n := u[`coaphub_coap_connections_closed_total{reason="write-timeout"}`] + u[`coaphub_coap_connections_closed_total{reason="overload"}`]; n != 1 {
		t.Error("the connection was not closed for what was not read")
	}
	w.undisturbed()
	w.givenBack()
}

// impatient is what an HTTP door with short times is told.
var impatient = []string{
	"grpcGateway.limits.headerTimeout=2s", "grpcGateway.limits.requestTimeout=4s", "grpcGateway.limits.stallTimeout=2s",
	"grpcGateway.limits.maxStreams=20",
}

// host is what follows "http://" in a base URL.
func host(base string) string { return strings.TrimPrefix(base, "http://") }

// TestHTTPByteByByte: a head, and a body, have their time, however they come; also those of somebody without a token, and of a
// WebSocket.
func TestHTTPByteByByte(t *testing.T) {
	t.Parallel()
	const light = "PUT /api/v1/devices/00000000-0000-4000-8000-000000000001/resources/light/1 HTTP/1.1\r\nHost: localhost\r\n"
	w := newWorld(t, impatient...)
	for name, c := range map[string]struct{ at, head, slowly, want string }{
		"head": {host(w.HTTP), "", "GET /api/v1/devices HTTP/1.1\r\n" + strings.Repeat("X: y\r\n", 1000), ""},
		"upgrade": {
			host(w.HTTP), "GET /api/v1/ws/events HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n",
			"Sec-WebSocket-Version: 13\r\n" + strings.Repeat("X: y\r\n", 1000), "",
		},
		"body": {
			host(w.HTTP), light + "Content-Type: application/json\r\nContent-Length: 5000\r\nAuthorization: Bearer " + w.token + "\r\n\r\n",
			strings.Repeat(" ", 5000), "HTTP/1.1 504 ",
		},
		"body of a stranger": {host(w.HTTP), light + "Content-Length: 5000\r\n\r\n", strings.Repeat(" ", 5000), "HTTP/1.1 401 "},
		"form of a stranger": {
			host(w.HTTP),
			"POST /oauth/token HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 5000\r\n\r\n",
			strings.Repeat("a", 5000), "HTTP/1.1 400 ",
		},
		"gRPC": {w.GRPC, "", http2.ClientPreface + strings.Repeat("\x00", 1000), ""},
	} {
		t.Run(name, func(t *testing.T) {
			conns := make([]net.Conn, 20)
			for i := range conns {
				conns[i] = dial(t, c.at)
				write(conns[i], []byte(c.head))
			}
			var busy sync.WaitGroup
			busy.Go(func() { trickle(conns, []byte(c.slowly), 20*time.Millisecond) }) // until the hub takes no more
			for i, conn := range conns {
				busy.Go(func() {
					said, over := ended(conn)
					if line, _, _ := strings.Cut(string(said), "\r\n"); !over || c.want != "" && !strings.HasPrefix(line, c.want) {
						t.Errorf("connection %d: the hub said %q, ended %t", i, line, over)
					}
				})
			}
			w.costs(2*len(conns)+20, 48*mebibyte)
			w.undisturbed()
			busy.Wait()
		})
	}
	w.givenBack()
}

// fill adds a device that has more to show than the buffers of a connection hold: 12 MiB.
func (w *world) fill(id string) {
	w.t.Helper()
	const resources = 60
	d := w.device(id, w.Endpoints.CoAPSTCP)
	for i := range resources {
		d.AddResource(fmt.Sprintf("/store/%d", i), true, map[string]any{"stock": strings.Repeat("x", 200<<10)}, "x.store")
	}
	w.runs(d)
	for i := range resources {
		w.until("all of a device to be known", func() bool {
			status, _, err := w.request(w.t.Context(), http.MethodGet, fmt.Sprintf("/api/v1/devices/%s/resources/store/%d", id, i), "")
			return err == nil && status == http.StatusOK
		})
	}
}

// TestReadersThatStall: lists and subscriptions whose readers take nothing, and stay, are given up, and hold no more meanwhile than
// what is under way to them.
func TestReadersThatStall(t *testing.T) {
	t.Parallel()
	w := newWorld(t, impatient...)
	w.fill(deviceID(3))
	w.before = w.usage()
	const each = 5
	authorized := " HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer " + w.token + "\r\n"
	for range each {
		for _, ask := range []string{
			"GET /api/v1/resources" + authorized + "\r\n",
			"GET /api/v1/events/stream?includeCurrentState=true" + authorized + "\r\n",
			"GET /api/v1/ws/events" + authorized + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
				"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n" + textFrame(`{"createSubscription":{"includeCurrentState":true}}`),
		} {
			c := dial(t, host(w.HTTP))
			if err := c.(*net.TCPConn).SetReadBuffer(4 << 10); err != nil {
				t.Fatal(err)
			}
			write(c, []byte(ask))
		}
		c := dialHTTP2(t, w.GRPC)
		c.open(t, 1, pb.GrpcGateway_GetResources_FullMethodName, w.token)
		if err := c.WriteData(1, true, make([]byte, 5)); err != nil { // a message with nothing in it
			t.Fatal(err)
		}
	}
	w.until("the subscriptions to be there", func() bool { return w.usage()["coaphub_api_subscriptions"] == 2*each })
	w.costs(4*each*6+20, 64*mebibyte)
	w.undisturbed()
	w.until("all of them to be given up", func() bool {
		u := w.usage()
		return u["coaphub_api_subscriptions"] == 0 && u[`coaphub_api_requests_total{call="GetResources",door="grpc",outcome="deadline"}`] == each &&
			u.goroutines() <= w.before.goroutines()+each*5+10 // connections over HTTP/2 stay
	})
}

// textFrame is a WebSocket message of a client (RFC 6455, Section 5.2), masked with zeros.
func textFrame(text string) string {
	return "\x81" + string([]byte{0x80 | byte(len(text))}) + "\x00\x00\x00\x00" + text
}

// http2Conn is a connection over HTTP/2 (RFC 9113) by a client that does what a test says.
type http2Conn struct {
	*http2.Framer
	net.Conn
}

func dialHTTP2(t *testing.T, addr string) http2Conn {
	t.Helper()
	c := dial(t, addr)
	write(c, []byte(http2.ClientPreface))
	f := http2Conn{http2.NewFramer(c, bufio.NewReader(c)), c}
	f.ReadMetaHeaders = hpack.NewDecoder(4<<10, nil)
	if err := f.WriteSettings(); err != nil {
		t.Fatal(err)
	}
	return f
}

// open begins a call of gRPC: its head, and no message.
func (c http2Conn) open(t *testing.T, stream uint32, method, token string) {
	t.Helper()
	var head strings.Builder
	enc := hpack.NewEncoder(&head)
	for _, f := range []hpack.HeaderField{
		{Name: ":method", Value: http.MethodPost},
		{Name: ":scheme", Value: "http"},
		{Name: ":path", Value: method},
		{Name: ":authority", Value: "localhost"},
		{Name: "content-type", Value: "application/grpc"},
		{Name: "te", Value: "trailers"},
		{Name: "authorization", Value: "Bearer " + token},
	} {
		if err := enc.WriteField(f); err != nil {
			t.Fatal(err)
		}
	}
	err := c.WriteHeaders(http2.HeadersFrameParam{StreamID: stream, BlockFragment: []byte(head.String()), EndHeaders: true})
	if err != nil {
		t.Fatal(err)
	}
}

// TestStreamsThatSendNothing: a client opens more streams than it may on each of its connections, and sends nothing on them: those
// beyond the bound are refused (RFC 9113, Section 5.1.2), the others end with their time.
func TestStreamsThatSendNothing(t *testing.T) {
	t.Parallel()
	const bound, streams = 20, 100
	w := newWorld(t, impatient...)
	conns := make([]http2Conn, 5)
	for i := range conns {
		conns[i] = dialHTTP2(t, w.GRPC)
		for n := range streams {
			conns[i].open(t, uint32(2*n+1), pb.GrpcGateway_UpdateResource_FullMethodName, "")
		}
	}
	w.costs(len(conns)*(bound+5)+20, 48*mebibyte)
	w.undisturbed()
	for i, c := range conns {
		refused, late := 0, 0
		_ = c.SetReadDeadline(time.Now().Add(patience))
		for refused+late < streams {
			f, err := c.ReadFrame()
			if err != nil {
				t.Fatalf("connection %d: %d streams were refused, %d were late: %v", i, refused, late, err)
			}
			switch f := f.(type) {
			case *http2.RSTStreamFrame:
				if f.ErrCode == http2.ErrCodeRefusedStream {
					refused++
				}
			case *http2.MetaHeadersFrame:
				for _, h := range f.Fields {
					if h.Name == "grpc-status" && h.Value == "4" { // DEADLINE_EXCEEDED
						late++
					}
				}
			}
		}
		if late != bound {
			t.Errorf("connection %d: %d streams were late, %d refused", i, late, refused)
		}
		_ = c.Conn.Close()
	}
	w.givenBack()
}
