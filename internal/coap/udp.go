package coap

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"time"

	"golang.org/x/net/ipv4"
	"golang.org/x/net/ipv6"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// maxUDP is the largest payload of a UDP datagram over IPv4, and of ours.
const maxUDP = 65507

// endpoints are the two ends of a datagram. local is not valid when the socket cannot tell.
type endpoints struct {
	local  netip.Addr
	ifc    int // the interface, for link-local addresses
	remote netip.AddrPort
	via    uint32 // the number of the gateway to whose socket the remote end speaks, plus one; 0: to ours
}

// socket reads and writes datagrams and knows which of our addresses each was for, so that the answer leaves from there: a
// peer, or the NAT in front of it, takes it from no other.
type socket struct {
	conn net.PacketConn
	udp  *net.UDPConn // nil: conn is something else, with one address
	oob  []byte       // of the reader
}

// newSocket wraps a socket; one reader and any number of writers may use it.
func newSocket(conn net.PacketConn) (*socket, error) {
	s := &socket{conn: conn}
	u, ok := conn.(*net.UDPConn)
	if !ok {
		return s, nil
	}
	s.udp = u
	s.oob = make([]byte, 128)
	// A socket of IPv6 that takes IPv4, too, wants both: each datagram is described in its own family.
	err4 := ipv4.NewPacketConn(u).SetControlMessage(ipv4.FlagDst|ipv4.FlagInterface, true)
	err6 := ipv6.NewPacketConn(u).SetControlMessage(ipv6.FlagDst|ipv6.FlagInterface, true)
	if err4 != nil && err6 != nil {
		return nil, fmt.Errorf("ask for the addresses of datagrams: %w", errors.Join(err4, err6))
	}
	return s, nil
}

// read reads one datagram. ok is false for one that is not for us alone, or from nowhere.
func (s *socket) read(b []byte) (n int, e endpoints, ok bool, err error) {
	if s.udp == nil {
		n, from, err := s.conn.ReadFrom(b)
		if err != nil {
			return 0, e, false, err
		}
		e.remote, ok = addrPort(from)
		local, _ := addrPort(s.conn.LocalAddr())
		e.local = local.Addr()
		return n, e, ok, nil
	}
	n, oobn, _, from, err := s.udp.ReadMsgUDPAddrPort(b, s.oob)
	if err != nil {
		return 0, e, false, err
	}
	e.remote = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
	var dst net.IP
	if e.remote.Addr().Is6() {
		var cm ipv6.ControlMessage
		if cm.Parse(s.oob[:oobn]) == nil {
			dst, e.ifc = cm.Dst, cm.IfIndex
		}
	} else {
		var cm ipv4.ControlMessage
		if cm.Parse(s.oob[:oobn]) == nil {
			dst, e.ifc = cm.Dst, cm.IfIndex
		}
	}
	if a, found := netip.AddrFromSlice(dst); found {
		e.local = a.Unmap()
	}
	if !e.local.IsLinkLocalUnicast() {
		e.ifc = 0
	}
	// RFC 7252, Section 8: a request to a group is another matter; we belong to none.
	group := e.local.IsMulticast() || e.local == netip.AddrFrom4([4]byte{255, 255, 255, 255})
	return n, e, e.remote.Port() != 0 && !group, nil
}

// control makes the control message with which answers leave from e's local address; nil when that is the socket's matter.
func (s *socket) control(e endpoints) []byte {
	switch {
	case s.udp == nil || !e.local.IsValid():
		return nil
	case e.local.Is6():
		a := e.local.As16()
		cm := ipv6.ControlMessage{Src: a[:], IfIndex: e.ifc}
		return cm.Marshal()
	}
	a := e.local.As4()
	cm := ipv4.ControlMessage{Src: a[:]}
	return cm.Marshal()
}

// write sends one datagram; control is that of the endpoints.
func (s *socket) write(b, control []byte, e endpoints) error {
	if s.udp == nil {
		_, err := s.conn.WriteTo(b, net.UDPAddrFromAddrPort(e.remote))
		return err
	}
	_, _, err := s.udp.WriteMsgUDPAddrPort(b, control, e.remote)
	return err
}

// localAddr is our end of e, for people.
func (s *socket) localAddr(e endpoints) net.Addr {
	if a, ok := addrPort(s.conn.LocalAddr()); ok && e.local.IsValid() {
		return net.UDPAddrFromAddrPort(netip.AddrPortFrom(e.local, a.Port()))
	}
	return s.conn.LocalAddr()
}

func addrPort(a net.Addr) (netip.AddrPort, bool) {
	if u, ok := a.(*net.UDPAddr); ok {
		ap := u.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port()), ap.IsValid()
	}
	return netip.AddrPort{}, false
}

// udpListener is one call of ServeUDP: it reads the socket and routes by address.
type udpListener struct {
	srv      *Server
	sock     *socket
	sessions *sessions

	mu    sync.Mutex
	peers map[endpoints]*udpLink
}

// udpLink is the link of a plain session: an address.
type udpLink struct {
	l       *udpListener
	ends    endpoints
	control []byte
	session *datagram     // the reader's alone
	closed  bool          // guarded by the server's mu, with at
	at      *list.Element // in Server.unproven
}

func (k *udpLink) WriteDatagram(b []byte) error { return k.l.sock.write(b, k.control, k.ends) }

func (k *udpLink) proven() bool { return false }

func (k *udpLink) describe(info *ConnInfo) {
	info.Local, info.Remote = k.l.sock.localAddr(k.ends), net.UDPAddrFromAddrPort(k.ends.remote)
}

func (k *udpLink) Close() error {
	k.l.mu.Lock()
	if k.l.peers[k.ends] == k {
		delete(k.l.peers, k.ends)
	}
	k.l.mu.Unlock()
	s := k.l.srv
	s.mu.Lock()
	defer s.mu.Unlock()
	if k.closed = true; k.at != nil {
		s.unproven.Remove(k.at)
	}
	return nil
}

// ServeUDP serves CoAP over plain UDP (RFC 7252) until ctx ends; then it closes its sessions and the socket, waits for all
// their goroutines and returns nil. Another end of the socket is an error. A peer's session begins with its first request; a
// session is the pair of addresses, ends after Config.MaxSilence, and sooner when the peer never proved that the address is
// its own. Answers leave from the address that was asked.
func (s *Server) ServeUDP(ctx context.Context, conn net.PacketConn) error {
	sock, err := newSocket(conn)
	if err != nil {
		_ = conn.Close()
		return err
	}
	s.enter()
	defer s.leave()
	l := &udpListener{srv: s, sock: sock, sessions: s.newSessions(), peers: make(map[endpoints]*udpLink)}
	defer s.list(l.sessions)()
	ended := make(chan error, 1)
	go func() { ended <- l.srv.readDatagrams(l.sock, l.route) }()
	select {
	case <-ctx.Done():
		l.sessions.release() // the socket is read on: answers under way may need the peer's
		_ = conn.Close()
		<-ended
		return nil
	case err := <-ended:
		l.sessions.release()
		_ = conn.Close()
		if ctx.Err() != nil {
			return nil
		}
		return fmt.Errorf("read coap datagrams: %w", err)
	}
}

// readDatagrams hands each datagram of the socket to route until the socket is closed.
func (s *Server) readDatagrams(sock *socket, route func(b []byte, e endpoints)) error {
	b := make([]byte, maxUDP)
	for row := 0; ; {
		n, e, ok, err := sock.read(b)
		switch {
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil:
			// Errors that say something of one datagram or of the moment must not end the door; a socket that gives nothing
			// else is broken.
			if row++; row == 100 {
				return err
			}
			s.metrics.acceptErrors.Inc()
			t := time.NewTimer(5 * time.Millisecond)
			<-t.C
		default:
			row = 0
			if ok {
				route(b[:n], e)
			}
		}
	}
}

// route delivers a datagram to the session of its addresses, or begins one.
func (l *udpListener) route(b []byte, e endpoints) {
	l.mu.Lock()
	k := l.peers[e]
	l.mu.Unlock()
	if k != nil && k.session.deliver(b) {
		return
	}
	if l.srv.draining.Err() != nil { // said by nobody: the next attempt goes to another server
		l.srv.metrics.dropped.WithLabelValues("closing").Inc()
		return
	}
	if !l.opens(b, e) {
		return
	}
	if d := l.session(e); d != nil {
		d.deliver(b)
	}
}

// session begins a session with an address, if there is room and the handler wants it. The reader calls it.
func (l *udpListener) session(e endpoints) *datagram {
	if !l.srv.admit() {
		// The next time the peer tries there may be room.
		l.srv.evict()
		l.srv.refuse(net.UDPAddrFromAddrPort(e.remote), "max-connections", fmt.Sprintf("%d connections are open", l.srv.cfg.MaxConnections))
		return nil
	}
	k := &udpLink{l: l, ends: e, control: l.sock.control(e)}
	l.mu.Lock()
	l.peers[e] = k // before the start, which may end the session at once; only this goroutine looks k's session up
	l.mu.Unlock()
	d, err := l.sessions.start(k)
	if err != nil {
		_ = k.Close()
		l.srv.gone()
		return nil
	}
	k.session = d
	l.srv.mu.Lock()
	if !k.closed {
		k.at = l.srv.unproven.PushBack(d)
	}
	l.srv.mu.Unlock()
	return d
}

// opens reports whether a datagram from an unknown address begins a session: only a request does. The others are answered
// without remembering anything.
func (l *udpListener) opens(b []byte, e endpoints) bool {
	p, err := parsePacket(b)
	if errors.Is(err, errNoMessage) {
		l.srv.metrics.dropped.WithLabelValues("malformed").Inc()
		return false
	}
	if err == nil && p.code != codes.Empty && p.code>>5 == 0 {
		if _, _, err = decodePacket(p); err == nil {
			return true
		}
	}
	why := "malformed"
	if err == nil {
		why = "unmatched"
	}
	l.srv.metrics.dropped.WithLabelValues(why).Inc()
	// RFC 7252, Section 4.2: rejected for lack of context (such as a notification for a session that is gone), for its
	// format, or because it is a ping. A notification in a NON gets the same, so that its sender stops.
	if p.typ == confirmable || p.typ == nonConfirmable && err == nil {
		_ = l.sock.write(emptyPacket(reset, p.id), l.sock.control(e), e)
	}
	return false
}
