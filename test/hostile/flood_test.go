package hostile_test

import (
	"bytes"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/dose"
)

// flood is how many datagrams or messages a flood has.
var flood = dose.Of(5_000, 20_000, 500_000)

// association is a DTLS association of a device that has a certificate and does what a test says.
func (w *world) association(id string) net.Conn {
	w.t.Helper()
	o := w.Onboard(w.t, id)
	conf, err := device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), w.ID)
	if err != nil {
		w.t.Fatal(err)
	}
	at, err := net.ResolveUDPAddr("udp", w.CoAPSUDP)
	if err != nil {
		w.t.Fatal(err)
	}
	c, err := dtls.DialWithOptions("udp", at, device.DTLSOptions(conf, nil, true)...)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = c.Close() })
	return c
}

// TestRepliesToNothing: acknowledgements and resets with any message IDs, from strangers and inside an association, settle nothing,
// get no answer and begin no session (RFC 7252, Section 4.2).
func TestRepliesToNothing(t *testing.T) {
	t.Parallel()
	w := newWorld(t, everyWay...)
	var flooding sync.WaitGroup
	for name, c := range map[string]net.Conn{"UDP": socket(t, w.CoAPPlainUDP), "DTLS": w.association(deviceID(3))} {
		flooding.Go(func() {
			rng := rand.New(rand.NewPCG(1, 1))
			for i := range flood {
				typ, m := message.Acknowledgement, message.Message{}
				switch i % 3 {
				case 1:
					typ = message.Reset
				case 2:
					m = message.Message{Code: codes.Content, Token: []byte{byte(rng.Uint32())}, Payload: []byte("x")}
				}
				_, _ = c.Write(datagram(typ, uint16(rng.Uint32()), m))
			}
			if b := receive(c, 100*time.Millisecond); b != nil {
				t.Errorf("%s: the hub answered with %x", name, b)
			}
		})
	}
	flooding.Wait()
	if n := w.usage()[`coaphub_coap_messages_dropped_total{reason="unmatched"}`]; n == 0 {
		t.Error("nothing was dropped")
	}
	if n := w.usage().connections() - w.before.connections(); n > 1 { // the association
		t.Errorf("there are %d sessions", n)
	}
	w.costs(20, 48*mebibyte)
	w.undisturbed()
}

// TestPings: pings are answered, over UDP without a session, and cost nobody else anything.
func TestPings(t *testing.T) {
	t.Parallel()
	w := newWorld(t, everyWay...)
	for i := range 100 {
		c := socket(t, w.CoAPPlainUDP)
		for id := range uint16(10) {
			_, _ = c.Write(datagram(message.Confirmable, id, message.Message{}))
		}
		if m, ok := parse(receive(c, patience)); !ok || m.Type != message.Reset { // RFC 7252, Section 4.3
			t.Fatalf("socket %d got %v, %t", i, m, ok)
		}
	}
	if n := w.usage().connections(); n != w.before.connections() {
		t.Errorf("there are %d sessions, before %d", n, w.before.connections())
	}
	c := w.secure(deviceID(3))
	ping := message.Message{Code: codes.Ping, Token: []byte{9}}
	var pinging sync.WaitGroup
	pinging.Go(func() { write(c, bytes.Repeat(frame(ping), flood)) })
	for pongs := 0; pongs < flood; {
		m, ok := c.read()
		if !ok {
			t.Fatalf("the connection ended after %d pongs", pongs)
		}
		if m.Code == codes.Pong { // RFC 8323, Section 5.4
			pongs++
		}
	}
	pinging.Wait()
	w.costs(20, 48*mebibyte)
	w.undisturbed()
	_ = c.Close()
	w.givenBack()
}

// TestStrangersOverUDP: requests from more addresses than there is room for, none of which ever answers, take no place from those
// that have proven who they are, nor from those that come.
func TestStrangersOverUDP(t *testing.T) {
	t.Parallel()
	const most = 30
	w := newWorld(t, "coapGateway.api.coap.plainAddress=127.0.0.1:0", "coapGateway.api.coap.maxConnections=30")
	stranger := func() {
		c := socket(t, w.CoAPPlainUDP)
		_, _ = c.Write(datagram(message.NonConfirmable, 1, get("/nothing/here")))
	}
	for range 300 {
		stranger()
	}
	w.until("the first to give way", func() bool {
		return w.usage()[`coaphub_coap_connections_closed_total{reason="evicted"}`] > 0
	})
	w.costs(20, 48*mebibyte)
	for i, endpoint := range []string{w.Endpoints.CoAPSTCP, w.Endpoints.CoAPS, "coap://" + w.CoAPPlainUDP} {
		w.until("all places to be taken", func() bool {
			n := w.usage().connections()
			if n > most {
				t.Errorf("there are %d connections", n)
			}
			if n < most {
				stranger()
			}
			return n >= most
		})
		w.newcomer(deviceID(3+i), endpoint)
	}
	w.undisturbed()
}

// TestRequestsNobodyUnderstands: a flood of requests with unknown critical options and reserved codes is answered or passed over
// message by message, in their order, and no connection ends by it (RFC 7252, Sections 3 and 5.4.1).
func TestRequestsNobodyUnderstands(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	c := w.secure(deviceID(3))
	critical := message.Message{Code: codes.GET, Token: []byte{1}, Options: message.Options{{ID: 65001, Value: []byte(strings.Repeat("x", 100))}}}
	method := message.Message{Code: 31, Token: []byte{2}}
	reserved := []byte{0x01, 3 << 5, 3} // no answer
	round := append(append(frame(critical), frame(method)...), reserved...)
	var asking sync.WaitGroup
	asking.Go(func() { write(c, bytes.Repeat(round, flood/10)) })
	counts := map[codes.Code]int{}
	for i := 0; i < flood/10*2; {
		m, ok := c.read()
		if !ok {
			t.Fatalf("the connection ended after %v", counts)
		}
		if m.Code>>5 != 7 {
			counts[m.Code]++
			i++
		}
	}
	asking.Wait()
	if counts[codes.BadOption] != flood/10 || counts[codes.MethodNotAllowed] != flood/10 {
		t.Errorf("the answers were %v", counts)
	}
	w.costs(20, 48*mebibyte)
	w.undisturbed()
	_ = c.Close()
	w.givenBack()
}
