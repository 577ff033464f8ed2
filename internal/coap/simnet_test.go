package coap

import (
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// A network inside the process, for testing/synctest: connections with delay, bounded buffers, half-close and cuts.

type simListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newSimListener() *simListener {
	return &simListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *simListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.conns:
		return c, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *simListener) Close() error   { l.once.Do(func() { close(l.done) }); return nil }
func (l *simListener) Addr() net.Addr { return simAddr("hub") }

// dial makes a connection whose every byte takes delay, with room for so many unread bytes in each direction.
func (l *simListener) dial(delay time.Duration, room int) *simConn {
	up, down := newSimHalf(delay, room), newSimHalf(delay, room)
	l.conns <- &simConn{in: up, out: down, local: "hub", remote: "device"}
	return &simConn{in: down, out: up, local: "device", remote: "hub"}
}

type simAddr string

func (a simAddr) Network() string { return "sim" }
func (a simAddr) String() string  { return string(a) }

type segment struct {
	at   time.Time
	data []byte
}

// simHalf is one direction.
type simHalf struct {
	delay time.Duration
	room  int

	mu      sync.Mutex
	segs    []segment
	unread  int
	fin     bool
	broken  bool
	changed chan struct{}
}

func newSimHalf(delay time.Duration, room int) *simHalf {
	return &simHalf{delay: delay, room: room, changed: make(chan struct{})}
}

func (h *simHalf) change() {
	close(h.changed)
	h.changed = make(chan struct{})
}

type simConn struct {
	in, out       *simHalf
	local, remote simAddr
	mu            sync.Mutex
	rd, wd        time.Time
	closed        bool
}

func (c *simConn) deadline(read bool) time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	if read {
		return c.rd
	}
	return c.wd
}

// wait waits for a change of h, the time at, or the deadline, which it reports.
func (c *simConn) wait(changed chan struct{}, at time.Time, read bool) bool {
	deadline := c.deadline(read)
	until := at
	if until.IsZero() || !deadline.IsZero() && deadline.Before(until) {
		until = deadline
	}
	var fire <-chan time.Time
	if !until.IsZero() {
		t := time.NewTimer(time.Until(until))
		defer t.Stop()
		fire = t.C
	}
	select {
	case <-changed:
	case <-fire:
	}
	return !deadline.IsZero() && !time.Now().Before(deadline)
}

func (c *simConn) Read(b []byte) (int, error) {
	h := c.in
	for {
		h.mu.Lock()
		changed := h.changed
		var at time.Time
		switch {
		case c.isClosed():
			h.mu.Unlock()
			return 0, net.ErrClosed
		case h.broken:
			h.mu.Unlock()
			return 0, &net.OpError{Op: "read", Net: "sim", Err: syscall.ECONNRESET}
		case len(h.segs) > 0:
			if at = h.segs[0].at; !at.After(time.Now()) {
				n := copy(b, h.segs[0].data)
				if h.segs[0].data = h.segs[0].data[n:]; len(h.segs[0].data) == 0 {
					h.segs = h.segs[1:]
				}
				h.unread -= n
				h.change()
				h.mu.Unlock()
				return n, nil
			}
		case h.fin:
			h.mu.Unlock()
			return 0, io.EOF
		}
		h.mu.Unlock()
		if c.wait(changed, at, true) {
			return 0, os.ErrDeadlineExceeded
		}
	}
}

func (c *simConn) Write(b []byte) (int, error) {
	h, n := c.out, 0
	for {
		h.mu.Lock()
		changed := h.changed
		if c.isClosed() || h.fin {
			h.mu.Unlock()
			return n, net.ErrClosed
		}
		if h.broken {
			h.mu.Unlock()
			return n, &net.OpError{Op: "write", Net: "sim", Err: syscall.EPIPE}
		}
		if m := min(h.room-h.unread, len(b)-n); m > 0 {
			h.segs = append(h.segs, segment{time.Now().Add(h.delay), append([]byte(nil), b[n:n+m]...)})
			h.unread += m
			n += m
			h.change()
		}
		h.mu.Unlock()
		if n == len(b) {
			return n, nil
		}
		if c.wait(changed, time.Time{}, false) {
			return n, os.ErrDeadlineExceeded
		}
	}
}

func (c *simConn) isClosed() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

func (c *simConn) CloseWrite() error {
	c.out.mu.Lock()
	defer c.out.mu.Unlock()
	c.out.fin = true
	c.out.change()
	return nil
}

func (c *simConn) Close() error {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	_ = c.CloseWrite()
	c.in.mu.Lock()
	c.in.fin = true
	c.in.change()
	c.in.mu.Unlock()
	return nil
}

// cutCable breaks the connection for both sides.
func (c *simConn) cutCable() {
	for _, h := range []*simHalf{c.in, c.out} {
		h.mu.Lock()
		h.broken = true
		h.change()
		h.mu.Unlock()
	}
}

func (c *simConn) LocalAddr() net.Addr  { return c.local }
func (c *simConn) RemoteAddr() net.Addr { return c.remote }

func (c *simConn) SetDeadline(t time.Time) error {
	_ = c.SetReadDeadline(t)
	return c.SetWriteDeadline(t)
}

func (c *simConn) SetReadDeadline(t time.Time) error {
	c.mu.Lock()
	c.rd = t
	c.mu.Unlock()
	c.in.mu.Lock()
	c.in.change()
	c.in.mu.Unlock()
	return nil
}

func (c *simConn) SetWriteDeadline(t time.Time) error {
	c.mu.Lock()
	c.wd = t
	c.mu.Unlock()
	c.out.mu.Lock()
	c.out.change()
	c.out.mu.Unlock()
	return nil
}
