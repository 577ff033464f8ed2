package enrolmentgateway

import (
	"net"
	"net/netip"
	"sync"

	"github.com/coaphub/coaphub/internal/coap"
)

// fairListener closes what comes from a network that has as many connections open as it may have. CoAP's handshakes have such a bound in
// the engine.
type fairListener struct {
	net.Listener
	most    int
	refused func(remote net.Addr, reason string)

	mu   sync.Mutex // guards open
	open map[netip.Prefix]int
}

func (l *fairListener) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		tcp, ok := c.RemoteAddr().(*net.TCPAddr)
		if !ok { // of a test, or a listener that somebody handed in: it has no network
			return c, nil
		}
		network := coap.Network(tcp.AddrPort().Addr())
		if l.enter(network) {
			return &fairConn{c, sync.OnceFunc(func() { l.leave(network) })}, nil
		}
		l.refused(c.RemoteAddr(), "too-many-connections-of-network")
		_ = c.Close()
	}
}

func (l *fairListener) enter(network netip.Prefix) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[network] >= l.most {
		return false
	}
	l.open[network]++
	return true
}

func (l *fairListener) leave(network netip.Prefix) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.open[network]--; l.open[network] == 0 {
		delete(l.open, network)
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
