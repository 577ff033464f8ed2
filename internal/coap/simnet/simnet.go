// Package simnet is a network of datagrams inside the process: loss, delay, reordering, duplication, limited bandwidth, NAT,
// and addresses that change hands, all from one seed. It must not know CoAP; time is the time package's, so that inside a
// testing/synctest bubble nothing ever sleeps.
package simnet

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Path is what happens to datagrams on their way. The zero value delivers everything at once.
type Path struct {
	// Loss, Duplicate and Reorder are probabilities between 0 and 1: to be lost, to arrive twice, and to be held back by
	// another Delay, so that later ones overtake it.
	Loss, Duplicate, Reorder float64
	// Delay is how long each datagram takes; Jitter is added at random, evenly.
	Delay, Jitter time.Duration
	// Bandwidth is bytes a second of one sender; zero has no limit. What does not fit into a second's backlog is lost.
	Bandwidth int
	// MTU loses datagrams that are larger; zero has no limit.
	MTU int
}

// Event is one line of a trace.
type Event struct {
	At       time.Duration // since New
	From, To netip.AddrPort
	Size     int
	What     string // "sent", "arrived", "lost", "duplicated", "delayed", "overflow", "nobody", "no mapping"
}

// String renders an event as one line.
func (e Event) String() string {
	return fmt.Sprintf("%9.3fs %s > %s %d %s", e.At.Seconds(), e.From, e.To, e.Size, e.What)
}

// Network connects sockets. All methods may be called from any goroutine.
type Network struct {
	start time.Time
	trace func(Event)

	mu    sync.Mutex // guards what follows, and everything in sockets and NATs
	rng   *rand.Rand
	path  Path
	paths map[[2]netip.Addr]Path
	socks map[netip.AddrPort]*Conn
	nats  map[netip.Addr]*NAT // by public address
	free  map[netip.Addr]time.Time
	port  uint16
}

// New makes a network. The same seed and the same sends in the same order give the same fates. trace, if not nil, is told of
// everything that happens; it is called with a lock held and must not call the network.
func New(seed uint64, trace func(Event)) *Network {
	return &Network{
		start: time.Now(), trace: trace, rng: rand.New(rand.NewPCG(seed, seed)), paths: make(map[[2]netip.Addr]Path), //nolint:gosec // to be repeated
		socks: make(map[netip.AddrPort]*Conn), nats: make(map[netip.Addr]*NAT), free: make(map[netip.Addr]time.Time), port: 49151,
	}
}

// SetPath sets the fate of datagrams between all hosts that have no path of their own.
func (n *Network) SetPath(p Path) {
	n.mu.Lock()
	n.path = p
	n.mu.Unlock()
}

// SetPathFrom sets the fate of datagrams in one direction between two public addresses.
func (n *Network) SetPathFrom(from, to netip.Addr, p Path) {
	n.mu.Lock()
	n.paths[[2]netip.Addr{from, to}] = p
	n.mu.Unlock()
}

// Addr makes an address of a text like "192.0.2.1:5683"; it panics on another one.
func Addr(s string) *net.UDPAddr { return net.UDPAddrFromAddrPort(netip.MustParseAddrPort(s)) }

// Listen opens a socket; port 0 chooses one. Closing it frees the address at once, so that somebody else, or a rebooted peer,
// may take it: what is still under way arrives there.
func (n *Network) Listen(addr string) (*Conn, error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.listen(ap, nil)
}

// listen opens a socket; mu is held.
func (n *Network) listen(ap netip.AddrPort, behind *NAT) (*Conn, error) {
	for ap.Port() == 0 {
		n.port = max(n.port+1, 49152)
		if try := netip.AddrPortFrom(ap.Addr(), n.port); n.socks[try] == nil {
			ap = try
		}
	}
	if n.socks[ap] != nil {
		return nil, fmt.Errorf("simnet: %v is taken", ap)
	}
	c := &Conn{n: n, addr: ap, nat: behind, changed: make(chan struct{})}
	n.socks[ap] = c
	return c, nil
}

func (n *Network) note(from, to netip.AddrPort, size int, what string) {
	if n.trace != nil {
		n.trace(Event{At: time.Since(n.start), From: from, To: to, Size: size, What: what})
	}
}

// send decides the fate of one datagram between public addresses; mu is held.
func (n *Network) send(from, to netip.AddrPort, b []byte) {
	p, ok := n.paths[[2]netip.Addr{from.Addr(), to.Addr()}]
	if !ok {
		p = n.path
	}
	n.note(from, to, len(b), "sent")
	if p.MTU > 0 && len(b) > p.MTU {
		n.note(from, to, len(b), "lost")
		return
	}
	copies := 1
	if p.Duplicate > 0 && n.rng.Float64() < p.Duplicate {
		copies = 2
		n.note(from, to, len(b), "duplicated")
	}
	data := append([]byte(nil), b...)
	for range copies {
		if p.Loss > 0 && n.rng.Float64() < p.Loss {
			n.note(from, to, len(b), "lost")
			continue
		}
		delay := p.Delay
		if p.Jitter > 0 {
			delay += time.Duration(n.rng.Int64N(int64(p.Jitter)))
		}
		if p.Reorder > 0 && n.rng.Float64() < p.Reorder {
			delay += max(p.Delay, time.Millisecond)
			n.note(from, to, len(b), "delayed")
		}
		if p.Bandwidth > 0 {
			now := time.Now()
			at := n.free[from.Addr()]
			if at.Before(now) {
				at = now
			}
			if at.Sub(now) > time.Second {
				n.note(from, to, len(b), "overflow")
				continue
			}
			at = at.Add(time.Duration(len(b)) * time.Second / time.Duration(p.Bandwidth))
			n.free[from.Addr()] = at
			delay += at.Sub(now)
		}
		if delay <= 0 {
			n.arrive(from, to, data)
			continue
		}
		time.AfterFunc(delay, func() {
			n.mu.Lock()
			n.arrive(from, to, data)
			n.mu.Unlock()
		})
	}
}

// arrive puts a datagram into its receiver's queue; mu is held.
func (n *Network) arrive(from, to netip.AddrPort, b []byte) {
	public := to
	if nat := n.nats[to.Addr()]; nat != nil {
		inside, ok := nat.inward(from, to)
		if !ok {
			n.note(from, to, len(b), "no mapping")
			return
		}
		to = inside
	}
	c := n.socks[to]
	switch {
	case c == nil:
		n.note(from, public, len(b), "nobody")
		return
	case len(c.queue) >= maxQueue:
		n.note(from, public, len(b), "overflow")
		return
	}
	n.note(from, public, len(b), "arrived")
	c.queue = append(c.queue, datagram{from, b})
	c.change()
}

// maxQueue bounds what waits to be read from one socket, as a receive buffer does.
const maxQueue = 1024

type datagram struct {
	from netip.AddrPort
	b    []byte
}

// Conn is a socket: a net.PacketConn.
type Conn struct {
	n    *Network
	addr netip.AddrPort
	nat  *NAT // nil: the address is public

	queue   []datagram
	closed  bool
	rd      time.Time
	changed chan struct{}
}

func (c *Conn) change() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// ReadFrom implements net.PacketConn.
func (c *Conn) ReadFrom(b []byte) (int, net.Addr, error) {
	for {
		c.n.mu.Lock()
		changed, deadline := c.changed, c.rd
		switch {
		case c.closed:
			c.n.mu.Unlock()
			return 0, nil, &net.OpError{Op: "read", Net: "sim", Err: net.ErrClosed}
		case !deadline.IsZero() && !time.Now().Before(deadline):
			c.n.mu.Unlock()
			return 0, nil, os.ErrDeadlineExceeded
		case len(c.queue) > 0:
			d := c.queue[0]
			c.queue[0] = datagram{}
			c.queue = c.queue[1:]
			c.n.mu.Unlock()
			return copy(b, d.b), net.UDPAddrFromAddrPort(d.from), nil
		}
		c.n.mu.Unlock()
		var fire <-chan time.Time
		var t *time.Timer
		if !deadline.IsZero() {
			t = time.NewTimer(time.Until(deadline))
			fire = t.C
		}
		select {
		case <-changed:
		case <-fire:
		}
		if t != nil {
			t.Stop()
		}
	}
}

var errAddress = errors.New("simnet: not an address of this network")

// WriteTo implements net.PacketConn.
func (c *Conn) WriteTo(b []byte, to net.Addr) (int, error) {
	u, ok := to.(*net.UDPAddr)
	if !ok {
		return 0, errAddress
	}
	dst := netip.AddrPortFrom(u.AddrPort().Addr().Unmap(), u.AddrPort().Port())
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if c.closed {
		return 0, &net.OpError{Op: "write", Net: "sim", Err: net.ErrClosed}
	}
	from := c.addr
	if c.nat != nil {
		from = c.nat.outward(c.addr, dst)
	}
	c.n.send(from, dst, b)
	return len(b), nil
}

// Close implements net.PacketConn.
func (c *Conn) Close() error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	if !c.closed {
		c.closed = true
		c.queue = nil
		delete(c.n.socks, c.addr)
		c.change()
	}
	return nil
}

// LocalAddr implements net.PacketConn.
func (c *Conn) LocalAddr() net.Addr { return net.UDPAddrFromAddrPort(c.addr) }

// SetDeadline implements net.PacketConn; writing never waits.
func (c *Conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline implements net.PacketConn; writing never waits.
func (c *Conn) SetWriteDeadline(time.Time) error { return nil }

// SetReadDeadline implements net.PacketConn.
func (c *Conn) SetReadDeadline(t time.Time) error {
	c.n.mu.Lock()
	defer c.n.mu.Unlock()
	c.rd = t
	c.change()
	return nil
}

// NAT is a router that shares one public address: each inside address gets a public port while it is used. Only peers that
// were written to may answer (address-dependent filtering, RFC 4787, Section 5).
type NAT struct {
	n       *Network
	public  netip.Addr
	timeout time.Duration
	out     map[netip.AddrPort]*mapping // by inside address
	in      map[uint16]*mapping         // by public port
	first   uint16
	next    uint16
}

type mapping struct {
	inside netip.AddrPort
	port   uint16
	used   time.Time
	peers  map[netip.Addr]bool
}

// NAT puts a router at a public address. A mapping that nobody inside used for timeout is forgotten, and its port is the
// next one that is given out: to whoever comes first.
func (n *Network) NAT(public string, timeout time.Duration) *NAT {
	nat := &NAT{
		n: n, public: netip.MustParseAddr(public), timeout: timeout, first: 20000, next: 20000,
		out: make(map[netip.AddrPort]*mapping), in: make(map[uint16]*mapping),
	}
	n.mu.Lock()
	n.nats[nat.public] = nat
	n.mu.Unlock()
	return nat
}

// Listen opens a socket inside.
func (r *NAT) Listen(addr string) (*Conn, error) {
	ap, err := netip.ParseAddrPort(addr)
	if err != nil {
		return nil, err
	}
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	return r.n.listen(ap, r)
}

// Rebind makes the router forget everything, as a restart does: the next datagram from inside gets a port that was not used
// before.
func (r *NAT) Rebind() {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	clear(r.out)
	clear(r.in)
	r.first = r.next
}

// Forget makes the router forget all mappings and begin again with the first port, so that the next one who sends gets the
// port of somebody else.
func (r *NAT) Forget() {
	r.n.mu.Lock()
	defer r.n.mu.Unlock()
	clear(r.out)
	clear(r.in)
	r.next = r.first
}

// outward returns the public address for a datagram from inside.
func (r *NAT) outward(inside, to netip.AddrPort) netip.AddrPort {
	r.expire()
	m := r.out[inside]
	if m == nil {
		port := r.first
		for r.in[port] != nil {
			port++
		}
		r.next = max(r.next, port+1)
		m = &mapping{inside: inside, port: port, peers: make(map[netip.Addr]bool)}
		r.out[inside], r.in[port] = m, m
	}
	m.used = time.Now()
	m.peers[to.Addr()] = true
	return netip.AddrPortFrom(r.public, m.port)
}

// inward returns the inside address for a datagram from outside.
func (r *NAT) inward(from, to netip.AddrPort) (netip.AddrPort, bool) {
	r.expire()
	m := r.in[to.Port()]
	if m == nil || !m.peers[from.Addr()] {
		return netip.AddrPort{}, false
	}
	return m.inside, true
}

func (r *NAT) expire() {
	if r.timeout <= 0 {
		return
	}
	now := time.Now()
	for port, m := range r.in {
		if now.Sub(m.used) >= r.timeout {
			delete(r.in, port)
			delete(r.out, m.inside)
		}
	}
}
