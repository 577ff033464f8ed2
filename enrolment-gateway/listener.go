package enrolmentgateway

import (
	"errors"
	"net"
	"net/netip"
	"sync"

	"github.com/coaphub/coaphub/internal/coap"
)

// errCrowded refuses a connection of a network that has as many open as it may have.
var errCrowded = errors.New("too-many-connections-of-network")

// networks counts the connections that each network has open, and lets in no more than most of one.
type networks struct {
	most int

	mu   sync.Mutex // guards open
	open map[netip.Prefix]int
}

// enter counts a connection until leave is called, which may be more than once. It returns nil if there is no more room for its network.
func (n *networks) enter(remote net.Addr) (leave func()) {
	network, ok := networkOf(remote)
	if !ok {
		return func() {}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.open[network] >= n.most {
		return nil
	}
	if n.open == nil {
		n.open = map[netip.Prefix]int{}
	}
	n.open[network]++
	return sync.OnceFunc(func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if n.open[network]--; n.open[network] == 0 {
			delete(n.open, network)
		}
	})
}

// networkOf is the network that an address is of; false for an address that is of none, which is one of a test, or of a listener that
// somebody handed in.
func networkOf(a net.Addr) (netip.Prefix, bool) {
	switch a := a.(type) {
	case *net.TCPAddr:
		return coap.Network(a.AddrPort().Addr()), true
	case *net.UDPAddr:
		return coap.Network(a.AddrPort().Addr()), true
	}
	return netip.Prefix{}, false
}

// fairListener closes what comes from a network that has as many connections open as it may have.
type fairListener struct {
	net.Listener
	networks *networks
	refused  func(remote net.Addr, reason string)
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if leave := l.networks.enter(c.RemoteAddr()); leave != nil {
			return &fairConn{c, leave}, nil
		}
		l.refused(c.RemoteAddr(), errCrowded.Error())
		_ = c.Close()
	}
}

type fairConn struct {
	net.Conn
	leave func()
}

func (c *fairConn) Close() error {
	err := c.Conn.Close()
	c.leave()
	return err
}
