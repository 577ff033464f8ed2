package coap

import (
	"context"
	"errors"
	"hash/maphash"
	"net"
	"net/netip"
	"sync/atomic"

	"github.com/coaphub/coaphub/internal/admission"
)

// Relay carries DTLS between gateways behind one address: when records of a session come to another gateway than the one that has it,
// since the load balancer, or a NAT before it, has changed its mind, they are passed on by their connection ID, which begins with the
// number of the gateway that gave it (RFC 9146, Section 3). Answers go back the same way, since the device, or its NAT, takes them from nowhere
// else; a load balancer often does not let them through either.
//
// Who passes them on cannot tell whether a record is genuine. So little is done for it: only records with a connection ID go, nothing is
// remembered of them, and Rates bound them. Who has the association treats them as if they had come by its own socket from a peer that has
// moved: what is not sealed by the peer's key is dropped silently, the address changes by a newer record only, and gets three times what came
// from it until it is proven (RFC 9146, Section 6). What was passed on once is not passed on again.
//
// A record for a gateway that is gone reaches nobody, and nobody says so, as RFC 9146, Section 6 and RFC 6347, Section 4.1.2.7 have it: anybody
// could have sent it. The peer learns it as it learns of any hub that is gone, when its confirmable messages or pings get no
// answer.
type Relay struct {
	number   uint16
	queue    chan outgoing
	listener atomic.Pointer[dtlsListener]

	network, all admission.Rate
	networks     [1 << 10]admission.Bucket // by a hash of the network
	total        admission.Bucket
}

// Bounds of what is passed on.
const (
	// relayQueue is how many datagrams wait to be sent to other gateways; further ones are lost, as datagrams may be.
	relayQueue = 1024
	// From one network (IPv4 /24, IPv6 /56), and from all together, so many datagrams a second and at once are passed on. Many devices may
	// be behind one address, and all of them may move at a time.
	networkRelays, networkRelayBurst = 500, 5_000
	allRelays, allRelayBurst         = 10_000, 20_000
)

// Relayed is a datagram on its way from one gateway to another.
type Relayed struct {
	From      uint16         // the gateway that sent it
	Answer    bool           // it is for the device, from whom the gateway that gets it has passed a record on
	Remote    netip.AddrPort // where the device is, as the gateway sees it that the device reaches
	Local     netip.Addr     // of that gateway
	Interface int
	Data      []byte
}

type outgoing struct {
	to uint16
	Relayed
}

// NewRelay makes the relay of a gateway whose connection IDs begin with that number. It is handed to ServeDTLS by DTLSConfig.
func NewRelay(number uint16) *Relay {
	return &Relay{
		number: number, queue: make(chan outgoing, relayQueue),
		network: admission.NewRate(networkRelays, networkRelayBurst), all: admission.NewRate(allRelays, allRelayBurst),
	}
}

// Number is what the gateway's connection IDs begin with.
func (r *Relay) Number() uint16 { return r.number }

// Run hands datagrams for other gateways to send, one at a time, until ctx ends.
func (r *Relay) Run(ctx context.Context, send func(to uint16, d Relayed)) {
	for {
		select {
		case out := <-r.queue:
			send(out.to, out.Relayed)
		case <-ctx.Done():
			return
		}
	}
}

// Take takes a datagram that another gateway has sent to this one.
func (r *Relay) Take(d Relayed) {
	l := r.listener.Load()
	if l == nil || d.From == r.number || len(d.Data) > maxUDP || !d.Remote.IsValid() || d.Remote.Port() == 0 {
		return
	}
	e := endpoints{local: d.Local, ifc: d.Interface, remote: d.Remote}
	if d.Answer {
		if err := l.sock.write(d.Data, l.sock.control(e), e); err != nil && !errors.Is(err, net.ErrClosed) {
			l.drop("unsent")
		}
		l.srv.metrics.relayed.WithLabelValues("answer").Inc()
		return
	}
	e.via = 1 + uint32(d.From)
	l.srv.metrics.relayed.WithLabelValues("taken").Inc()
	l.take(d.Data, e)
}

// pass has the records of a datagram passed on to the gateway that they are for. It does not block.
func (r *Relay) pass(to uint16, recs []record, e endpoints) bool {
	bucket := &r.networks[maphash.Comparable(seed, Network(e.remote.Addr()))%uint64(len(r.networks))]
	if r.network.Take(bucket, 1) > 0 || r.all.Take(&r.total, 1) > 0 {
		return false
	}
	var data []byte
	for i := range recs {
		data = append(data, recs[i].raw...)
	}
	return r.put(to, Relayed{From: r.number, Remote: e.remote, Local: e.local, Interface: e.ifc, Data: data})
}

// answer has a datagram sent by the gateway through which the peer was heard. It does not block.
func (r *Relay) answer(b []byte, e endpoints) bool {
	return r.put(uint16(e.via-1), Relayed{ //nolint:gosec // it was one
		From: r.number, Answer: true, Remote: e.remote, Local: e.local, Interface: e.ifc, Data: append([]byte(nil), b...),
	})
}

func (r *Relay) put(to uint16, d Relayed) bool {
	select {
	case r.queue <- outgoing{to, d}:
		return true
	default:
		return false
	}
}

// take brings one datagram to its associations. Whoever has one calls it: the reader of the socket, and the relay.
func (l *dtlsListener) take(b []byte, e endpoints) {
	l.taking.Lock()
	defer l.taking.Unlock()
	l.route(b, e)
}

// foreign passes records on whose connection ID another gateway has given, and reports whether they are such.
func (l *dtlsListener) foreign(recs []record, e endpoints) bool {
	r, to := l.conf.Relay, recs[0].cid.gateway()
	if r == nil || e.via != 0 || to == r.number {
		return false
	}
	if r.pass(to, recs, e) {
		l.srv.metrics.relayed.WithLabelValues("passed").Inc()
	} else {
		l.drop("relay")
	}
	return true
}

// write sends a datagram to a peer, by the way that it is reached.
func (l *dtlsListener) write(b, control []byte, e endpoints) error {
	if e.via == 0 {
		return l.sock.write(b, control, e)
	}
	if !l.conf.Relay.answer(b, e) {
		l.drop("relay")
	}
	return nil
}
