package device

import (
	"context"
	"net"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/udp/coder"
)

// bareHub is a socket that a device over UDP takes for its hub.
type bareHub struct {
	t    *testing.T
	sock net.PacketConn
	peer net.Addr
}

func (h *bareHub) send(m message.Message) {
	h.t.Helper()
	n, err := coder.DefaultCoder.Size(m)
	if err != nil {
		h.t.Fatal(err)
	}
	b := make([]byte, n)
	if _, err := coder.DefaultCoder.Encode(m, b); err != nil {
		h.t.Fatal(err)
	}
	if _, err := h.sock.WriteTo(b, h.peer); err != nil {
		h.t.Fatal(err)
	}
}

// next is the next message of a device that is not an empty one.
func (h *bareHub) next() message.Message {
	h.t.Helper()
	b := make([]byte, 2048)
	for {
		if err := h.sock.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			h.t.Fatal(err)
		}
		n, from, err := h.sock.ReadFrom(b)
		if err != nil {
			h.t.Fatal(err)
		}
		m := message.Message{Options: make(message.Options, 0, 16)}
		if _, err := coder.DefaultCoder.Decode(b[:n], &m); err != nil {
			h.t.Fatal(err)
		}
		if h.peer = from; m.Code != codes.Empty {
			return m
		}
	}
}

// Over UDP a notification is sent until it is acknowledged, and a Reset ends the observation (RFC 7641, 3.6 and 4.5).
func TestNotificationsOverUDP(t *testing.T) {
	t.Parallel()
	sock, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	h := &bareHub{t: t, sock: sock}
	d, err := New(Config{ID: testID, HubAddr: "coap://" + sock.LocalAddr().String()})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = d.Ping(t.Context())
	}()
	ping := h.next()
	h.send(message.Message{Type: message.Acknowledgement, MessageID: ping.MessageID, Code: codes.Content, Token: ping.Token})
	<-done

	h.send(message.Message{
		Type: message.Confirmable, MessageID: 7, Code: codes.GET, Token: []byte("o"),
		Options: message.Options{{ID: message.Observe}, {ID: message.URIPath, Value: []byte("light")}, {ID: message.URIPath, Value: []byte("1")}},
	})
	m := h.next()
	if v, err := m.Options.Observe(); err != nil || m.Type != message.Confirmable || m.Code != codes.Content {
		t.Fatalf("%+v, observe %d, %v", m, v, err)
	}
	h.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID})
	until(t, "the observation", func() bool { return d.Observed("/light/1") == 1 })

	sent := make(chan int, 1)
	set := func(power uint64) {
		n, err := d.Set("/light/1", map[string]any{"power": power})
		if err != nil {
			t.Error(err)
		}
		sent <- n
	}
	go set(1)
	m = h.next()
	if again := h.next(); again.MessageID != m.MessageID || m.Type != message.Confirmable { // it was not acknowledged
		t.Errorf("%+v came behind %+v", again, m)
	}
	h.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID})
	if n := <-sent; n != 1 || d.Observed("/light/1") != 1 {
		t.Errorf("%d notifications, %d observations", n, d.Observed("/light/1"))
	}
	go set(2)
	m = h.next()
	h.send(message.Message{Type: message.Reset, MessageID: m.MessageID})
	if n := <-sent; n != 0 || d.Observed("/light/1") != 0 {
		t.Errorf("%d notifications, %d observations after a Reset", n, d.Observed("/light/1"))
	}
}

// Whoever finds the hub gone need not wait until a notification that nobody acknowledges is given up.
func TestAHubThatIsGoneOverUDP(t *testing.T) {
	t.Parallel()
	sock, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer sock.Close()
	h := &bareHub{t: t, sock: sock}
	d, err := New(Config{ID: testID, HubAddr: "coap://" + sock.LocalAddr().String()})
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	pinged := make(chan error, 1)
	ping := func(within time.Duration) {
		ctx, stop := context.WithTimeout(t.Context(), within)
		defer stop()
		pinged <- d.Ping(ctx)
	}
	go ping(10 * time.Second)
	m := h.next()
	h.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID, Code: codes.Content, Token: m.Token})
	if err := <-pinged; err != nil {
		t.Fatal(err)
	}
	h.send(message.Message{
		Type: message.Confirmable, MessageID: 7, Code: codes.GET, Token: []byte("o"),
		Options: message.Options{{ID: message.Observe}, {ID: message.URIPath, Value: []byte("light")}, {ID: message.URIPath, Value: []byte("1")}},
	})
	m = h.next()
	h.send(message.Message{Type: message.Acknowledgement, MessageID: m.MessageID})
	until(t, "the observation", func() bool { return d.Observed("/light/1") == 1 })

	sent := make(chan error, 1)
	go func() {
		_, err := d.Set("/light/1", map[string]any{"power": 1})
		sent <- err
	}()
	h.next() // and nobody acknowledges it
	ping(100 * time.Millisecond)
	if err := <-pinged; err == nil {
		t.Error("a hub that is gone answered")
	}
	select {
	case <-sent:
		t.Error("the notification was given up first")
	default:
	}
	d.Close()
	if err := <-sent; err != nil {
		t.Error(err)
	}
}
