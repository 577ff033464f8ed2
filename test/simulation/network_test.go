package simulation

import (
	"bytes"
	"context"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// network is all connections between processes and services. What is sent arrives later, in order for each connection, as TCP has it.
type network struct {
	*chance
	mu sync.Mutex // guards paths and connections
}

// path is between one run of a process and one service.
type path struct {
	n        *network
	up, down int           // how many faults hold what goes to the service, and what comes from it
	slow     time.Duration // what a message may take on top
	dead     bool          // the process has crashed
	changed  chan struct{} // closed when any of that is another
	conns    map[*conn]struct{}
	serve    func(c *conn) (take func([]byte) error, gone func())
}

func (n *network) path(serve func(c *conn) (func([]byte) error, func())) *path {
	return &path{n: n, changed: make(chan struct{}), conns: map[*conn]struct{}{}, serve: serve}
}

// conn is the process's end of a connection.
type conn struct {
	p      *path
	take   func([]byte) error
	gone   func()
	to     flow // the service
	from   flow
	in     []byte // has arrived and was not read
	closed bool
	late   bool // what was sent before the end arrives all the same
	// greeting is until the first PONG: NATS's client holds a lock while it connects, for which nobody may have to wait in simulated time.
	greeting bool
	wake     chan struct{}
	until    time.Time // of reading
}

// flow is one direction of a connection.
type flow struct {
	due     time.Time // of what was sent last
	arrived [][]byte  // nil: the end
	busy    bool
}

// delay is how long a message takes.
func (p *path) delay() time.Duration {
	d := p.n.between(100*time.Microsecond, time.Millisecond)
	if p.slow > 0 {
		d += p.n.between(0, p.slow)
	}
	return d
}

// send has a message arrive later. n.mu is held.
func (c *conn) send(f *flow, msg []byte, after time.Duration) {
	at := time.Now().Add(c.p.delay() + after)
	if !at.After(f.due) {
		at = f.due.Add(1)
	}
	f.due = at
	time.AfterFunc(time.Until(at), func() {
		c.p.n.mu.Lock()
		defer c.p.n.mu.Unlock()
		f.arrived = append(f.arrived, msg)
		c.deliver(f)
	})
}

// deliver hands over what has arrived, unless it is held. n.mu is held, and given up meanwhile.
func (c *conn) deliver(f *flow) {
	if f.busy {
		return
	}
	f.busy = true
	for len(f.arrived) > 0 && !c.held(f) {
		msg := f.arrived[0]
		f.arrived = f.arrived[1:]
		switch {
		case f == &c.from:
			if !c.closed {
				c.in = append(c.in, msg...)
				c.signal()
			}
		case msg == nil:
			c.p.n.mu.Unlock()
			c.gone()
			c.p.n.mu.Lock()
		case !c.closed || c.late:
			c.p.n.mu.Unlock()
			err := c.take(msg)
			c.p.n.mu.Lock()
			if err != nil {
				panic(err) // the simulated service does not know what the real one does
			}
		}
	}
	f.busy = false
}

func (c *conn) held(f *flow) bool {
	if f == &c.to {
		return c.p.up > 0
	}
	return c.p.down > 0
}

func (c *conn) signal() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// hold has faults hold what goes up or down; negative ends them.
func (p *path) hold(up, down int) {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	p.up += up
	p.down += down
	p.change()
	for c := range p.conns {
		c.deliver(&c.to)
		c.deliver(&c.from)
	}
}

func (p *path) change() {
	close(p.changed)
	p.changed = make(chan struct{})
}

func (p *path) slowed(by time.Duration) {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	p.slow = by
}

// cut breaks all connections.
func (p *path) cut() {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	for c := range p.conns {
		c.end()
	}
}

// die breaks all connections and lets no more be made.
func (p *path) die() {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	p.dead = true
	p.change()
	for c := range p.conns {
		c.end()
	}
}

// end ends a connection; n.mu is held. The service hears of it late, or not before a partition is over.
func (c *conn) end() {
	if c.closed {
		return
	}
	c.closed, c.in = true, nil
	c.late = c.p.n.one(2)
	c.signal()
	after := time.Duration(0)
	if c.p.n.one(5) {
		after = c.p.n.between(0, 8*time.Second)
	}
	c.send(&c.to, nil, after)
}

// pass waits until nothing holds what goes up, or down.
func (p *path) pass(ctx context.Context, up bool) error {
	for {
		p.n.mu.Lock()
		held, dead, changed := p.down, p.dead, p.changed
		if up {
			held = p.up
		}
		p.n.mu.Unlock()
		switch {
		case dead:
			return net.ErrClosed
		case held == 0:
			return ctx.Err()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// dial makes a connection.
func (p *path) dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	for _, up := range []bool{true, false} {
		if err := p.pass(ctx, up); err != nil {
			return nil, err
		}
	}
	return p.connect(false), nil
}

// greet makes a connection to NATS, if that takes no time.
func (p *path) greet() (net.Conn, error) {
	p.n.mu.Lock()
	away := p.dead || p.up > 0 || p.down > 0
	p.n.mu.Unlock()
	if away {
		return nil, net.ErrClosed
	}
	return p.connect(true), nil
}

func (p *path) connect(greeting bool) net.Conn {
	c := &conn{p: p, greeting: greeting, wake: make(chan struct{}, 1)}
	p.n.mu.Lock()
	p.conns[c] = struct{}{}
	p.n.mu.Unlock()
	take, gone := p.serve(c)
	c.take, c.gone = take, func() {
		gone()
		p.n.mu.Lock()
		defer p.n.mu.Unlock()
		delete(p.conns, c)
	}
	return c
}

// reply sends a message to the process.
func (c *conn) reply(msg []byte) {
	c.p.n.mu.Lock()
	defer c.p.n.mu.Unlock()
	switch {
	case c.closed:
	case c.greeting:
		c.greeting = !bytes.HasPrefix(msg, []byte("PONG"))
		c.in = append(c.in, msg...)
		c.signal()
	default:
		c.send(&c.from, msg, 0)
	}
}

// Read implements net.Conn.
func (c *conn) Read(p []byte) (int, error) {
	for {
		c.p.n.mu.Lock()
		n := copy(p, c.in)
		c.in = c.in[n:]
		closed, until := c.closed, c.until
		c.p.n.mu.Unlock()
		switch {
		case n > 0:
			return n, nil
		case closed:
			return 0, io.EOF
		case until.IsZero():
			<-c.wake
			continue
		case !time.Now().Before(until):
			return 0, os.ErrDeadlineExceeded
		}
		t := time.NewTimer(time.Until(until))
		select {
		case <-c.wake:
		case <-t.C:
		}
		t.Stop()
	}
}

// Write implements net.Conn; it never waits, as with a large window.
func (c *conn) Write(p []byte) (int, error) {
	c.p.n.mu.Lock()
	defer c.p.n.mu.Unlock()
	switch {
	case c.closed:
		return 0, net.ErrClosed
	case c.greeting:
		c.p.n.mu.Unlock()
		err := c.take(p)
		c.p.n.mu.Lock()
		return len(p), err
	}
	c.send(&c.to, slices.Clone(p), 0)
	return len(p), nil
}

// Close implements net.Conn.
func (c *conn) Close() error {
	c.p.n.mu.Lock()
	defer c.p.n.mu.Unlock()
	c.end()
	return nil
}

// SetReadDeadline implements net.Conn.
func (c *conn) SetReadDeadline(t time.Time) error {
	c.p.n.mu.Lock()
	defer c.p.n.mu.Unlock()
	c.until = t
	c.signal()
	return nil
}

// SetDeadline implements net.Conn.
func (c *conn) SetDeadline(t time.Time) error { return c.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn: nothing waits.
func (c *conn) SetWriteDeadline(time.Time) error { return nil }

// LocalAddr implements net.Conn.
func (c *conn) LocalAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 2), Port: 1} }

// RemoteAddr implements net.Conn.
func (c *conn) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 1} }

var errAway = hub.NewError(hub.Unavailable, "feed-away", "the simulated feed does not answer")
