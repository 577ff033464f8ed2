package hostile_test

import (
	"net"
	"testing"
	"time"
)

// TestHalfOpenTLS: connections that say nothing, and others that stop in the middle of their ClientHello, cost what
// a bounded number of handshakes costs, however many they are. Devices come in beside them, and whoever does not finish is told
// to go.
func TestHalfOpenTLS(t *testing.T) {
	t.Parallel()
	const bound, more = 512, 200 // handshakes that the hub has under way at a time
	w := newWorld(t)
	begun := hello(t)
	conns := make([]net.Conn, bound+more)
	for i := range conns {
		conns[i] = dial(t, w.CoAPS)
		if i%2 == 1 {
			write(conns[i], begun[:len(begun)/2])
		}
	}
	w.until("the oldest to make room", func() bool {
		return w.usage()[`coaphub_coap_handshakes_total{outcome="evicted"}`] >= more
	})
	w.costs(bound+20, 48*mebibyte)
	w.newcomer(deviceID(3), w.Endpoints.CoAPSTCP)
	w.undisturbed()
	for i, c := range conns {
		if said, over := ended(c); !over || len(said) > 0 {
			t.Fatalf("connection %d: the hub said %x, ended %t", i, said, over)
		}
	}
	if n := w.usage()[`coaphub_coap_handshakes_total{outcome="timeout"}`]; n == 0 {
		t.Error("no handshake has timed out")
	}
	w.givenBack()
}

// TestSilentTCP: of connections over plain TCP that say nothing there are no more than are configured, the others are closed at
// once, and those that wait are closed, too, when they do not answer a Ping.
func TestSilentTCP(t *testing.T) {
	t.Parallel()
	const most, more = 50, 50
	w := newWorld(t, "coapGateway.api.coap.plainAddress=127.0.0.1:0", "coapGateway.api.coap.maxConnections=50",
		"coapGateway.api.coap.keepAlive.timeout=5s")
	conns := make([]net.Conn, most+more)
	for i := range conns {
		conns[i] = dial(t, w.CoAPPlain)
	}
	w.until("the hub to refuse some", func() bool {
		return w.usage()[`coaphub_coap_connections_refused_total{reason="max-connections"}`] > more
	})
	if n := w.usage().connections(); n > most {
		t.Errorf("there are %d connections", n)
	}
	w.costs(most+20, 48*mebibyte)
	w.undisturbed()
	for i, c := range conns {
		if _, over := ended(c); !over {
			t.Fatalf("connection %d is still open", i)
		}
	}
	w.givenBack()
	w.newcomer(deviceID(3), w.Endpoints.CoAPSTCP)
}

// fewHandshakes bounds the DTLS handshakes of a hub.
var fewHandshakes = []string{
	"coapGateway.api.coap.dtls.maxHandshakes=20", "coapGateway.api.coap.dtls.maxHandshakesPerNetwork=20",
	"coapGateway.api.coap.dtls.handshakeTimeout=5s",
}

const (
	mostHandshakes = 20
	peers          = 2 * mostHandshakes
	// perHandshake is how many goroutines a handshake has, pion's included.
	perHandshake = 5
)

// TestHelloWithoutCookie: ClientHellos without the hub's cookie, from many ports, begin no more handshakes than are configured.
// Devices come in beside them, and those that do not finish are forgotten.
func TestHelloWithoutCookie(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fewHandshakes...)
	left := make(map[int]net.Conn)
	for i := range peers {
		left[i] = socket(t, w.CoAPSUDP)
	}
	w.until("the hub to ask all for its cookie", func() bool {
		for i, c := range left { // when there are many, it asks those that come again
			_, _ = c.Write(helloDTLS(i, nil, ellipticCurves))
		}
		for i, c := range left {
			if cookieOf(receive(c, 20*time.Millisecond)) != nil {
				delete(left, i)
			}
		}
		return len(left) == 0
	})
	w.until("the oldest to make room", func() bool { return w.madeRoom() >= peers-mostHandshakes })
	w.costs(mostHandshakes*perHandshake+20, 48*mebibyte)
	w.newcomer(deviceID(3), w.Endpoints.CoAPS)
	w.undisturbed()
	w.givenBack()
}

// madeRoom counts the handshakes that nobody went on with.
func (w *world) madeRoom() float64 {
	w.t.Helper()
	u := w.usage()
	return u[`coaphub_coap_handshakes_total{outcome="evicted"}`] + u[`coaphub_coap_handshakes_total{outcome="timeout"}`]
}

// TestHelloAndNoMore: the same for peers that show the cookie and get all that the hub has to say, and stop then. Those that are
// under way do not give way at once, but each peer that comes again has its turn.
func TestHelloAndNoMore(t *testing.T) {
	t.Parallel()
	w := newWorld(t, fewHandshakes...)
	left := make(map[int]net.Conn)
	for i := range peers {
		left[i] = socket(t, w.CoAPSUDP)
	}
	w.until("the hub to begin a handshake with each", func() bool {
		for i, c := range left {
			_, _ = c.Write(helloDTLS(i, nil, ellipticCurves))
			for b := receive(c, 20*time.Millisecond); b != nil; b = receive(c, 20*time.Millisecond) { // also what came since the last time
				if cookie := cookieOf(b); cookie != nil {
					_, _ = c.Write(helloDTLS(i, cookie, ellipticCurves))
				} else if len(b) > 13 && b[0] == recordHandshake && b[13] == serverHello {
					delete(left, i)
				}
			}
		}
		return len(left) == 0
	})
	w.until("the first to make room", func() bool { return w.madeRoom() >= peers-mostHandshakes })
	w.costs(mostHandshakes*perHandshake+20, 48*mebibyte)
	w.newcomer(deviceID(3), w.Endpoints.CoAPS)
	w.undisturbed()
	w.givenBack()
}
