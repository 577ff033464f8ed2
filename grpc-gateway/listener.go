package grpcgateway

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
)

// limitListener accepts no more connections while as many as it has slots are open; they wait in the system's queue, and
// when that is full clients see refused or slow connects.
type limitListener struct {
	net.Listener
	slots chan struct{}
	done  chan struct{}
	once  sync.Once
}

func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.done:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitConn{Conn: c, release: sync.OnceFunc(func() { <-l.slots })}, nil
}

func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return l.Listener.Close()
}

type limitConn struct {
	net.Conn
	release func()
	kept    atomic.Bool // also when it is handed over
}

// placeKey is the key of a request's limitConn in its context.
type placeKey struct{}

func withPlace(ctx context.Context, c net.Conn) context.Context {
	return context.WithValue(ctx, placeKey{}, limited(c))
}

// keepPlace has the request's connection count among the door's until it is closed, although it will be handed over.
func keepPlace(r *http.Request) {
	if c, _ := r.Context().Value(placeKey{}).(*limitConn); c != nil {
		c.kept.Store(true)
	}
}

// limited is what limitListener made, nil if it was not that.
func limited(c net.Conn) *limitConn {
	if tc, ok := c.(*tls.Conn); ok {
		c = tc.NetConn()
	}
	lc, _ := c.(*limitConn)
	return lc
}

// CloseWrite ends our direction, so that what was said last is read before the connection ends.
func (c *limitConn) CloseWrite() error {
	if half, ok := c.Conn.(interface{ CloseWrite() error }); ok {
		return half.CloseWrite()
	}
	return c.Conn.Close()
}

// handedOver gives the slot of a connection back that is none of the door's any more: whoever took it over has bounds of his
// own, and must not take the places of those who only ask. The door's own WebSockets keep theirs.
func handedOver(c net.Conn, state http.ConnState) {
	if lc := limited(c); state == http.StateHijacked && lc != nil && !lc.kept.Load() {
		lc.release()
	}
}

func (c *limitConn) Close() error {
	err := c.Conn.Close()
	c.release()
	return err
}
