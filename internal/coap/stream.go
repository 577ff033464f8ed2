package coap

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

const (
	smallBuffer = 512      // what an idle connection reads into
	bigBuffer   = 16 << 10 // a TLS record
	keepBuffer  = 64 << 10 // larger write buffers are not kept
)

var errQueueFull = errors.New("write queue is full")

// stream is the transport of RFC 8323: frames over TCP or TLS, or messages over WebSocket (websocket.go). One goroutine reads;
// another writes, only while there is something to write, everything that has collected in one call.
type stream struct {
	c   *Conn
	nc  net.Conn // what is read and written: TLS, or raw itself
	raw net.Conn
	ws  *webSocket // nil: frames follow each other without anything between them

	peerMax    atomic.Uint32 // from the peer's CSM
	peerBlocks atomic.Bool
	frameSince atomic.Int64 // when the message that is now arriving began; 0 when none is

	mu       sync.Mutex
	pending  []byte // framed messages, from writeBuffers
	room     chan struct{}
	writing  bool
	finished bool          // no more sends; the writer ends our direction once pending is empty
	done     chan struct{} // closed when our direction has ended
	failed   error         // of a write

	small [smallBuffer]byte
}

// Buffers are only lent: what handlers get is copied into memory of its own.
var (
	readBuffers  = sync.Pool{New: func() any { b := make([]byte, bigBuffer); return &b }}
	writeBuffers = sync.Pool{New: func() any { b := make([]byte, 0, 4<<10); return &b }}
)

func newStream(c *Conn, nc, raw net.Conn, ws *webSocket) *stream {
	s := &stream{c: c, nc: nc, raw: raw, ws: ws, done: make(chan struct{})}
	s.peerMax.Store(baseMessageSize)
	c.tr = s
	return s
}

func (s *stream) info() ConnInfo {
	info := ConnInfo{Stream: true, Local: s.raw.LocalAddr(), Remote: s.raw.RemoteAddr()}
	if tc, ok := s.nc.(*tls.Conn); ok {
		state := tc.ConnectionState()
		info.Secure, info.TLS = true, &state
	}
	if s.ws != nil {
		info.Host = s.ws.host
	}
	return info
}

func (s *stream) size(m *Message) int {
	if s.ws != nil {
		return 2 + len(m.Token) + bodySize(m) // RFC 8323, Section 4.2: no extended length
	}
	return frameSize(m)
}

func (s *stream) limits() (int, bool) {
	largest := s.peerMax.Load()
	// RFC 8323, Section 6: BERT needs both options.
	return int(min(largest, 1<<30)), s.peerBlocks.Load() && largest > baseMessageSize
}

func (s *stream) ping() {
	if err := s.send(s.c.ctx, &Message{Code: codes.Ping}, false); errors.Is(err, errQueueFull) {
		s.c.srv.metrics.dropped.WithLabelValues("ping").Inc() // the write deadline decides about this peer
	}
}

func (s *stream) expired(now time.Duration) error {
	since := time.Duration(s.frameSince.Load())
	if since != 0 && now-since >= s.c.srv.cfg.MessageTimeout {
		return ErrSlow
	}
	return nil
}

// run owns the connection: it reads until the end, then takes everything down in order.
func (s *stream) run() {
	c := s.c
	read := s.read
	if s.ws != nil {
		read = s.readWebSocket
	}
	err := read()
	var ce *CloseError
	switch {
	case errors.As(err, &ce):
		if errors.Is(err, ErrAborted) {
			c.shut(err, false) // nobody listens any more
		} else {
			s.abort(err)
		}
		// What the peer still sends is read and thrown away: closing with unread bytes would reset the connection and the
		// peer might never see what it was told. Bounded in time: the wheel cuts the connection.
		s.discard()
	case errors.Is(err, io.EOF):
		// The peer ended its direction. What it sent before is still handled and answered.
		c.shut(io.EOF, true)
	default:
		c.shut(err, false)
		s.cut()
	}
	<-s.done
	s.cut()
	c.end(err)
}

func (s *stream) discard() {
	for {
		if _, err := s.nc.Read(s.small[:]); err != nil {
			return
		}
	}
}

// intake is what has arrived and is not taken yet: buf[r:w]. An idle connection reads into the stream's small buffer, a busy
// one into a large one that it borrows.
type intake struct {
	s    *stream
	buf  []byte
	r, w int
	big  *[]byte
}

func (s *stream) intake() *intake { return &intake{s: s, buf: s.small[:]} }

// bytes returns what is there.
func (in *intake) bytes() []byte { return in.buf[in.r:in.w] }

// free gives the large buffer back.
func (in *intake) free() {
	if in.big != nil {
		readBuffers.Put(in.big)
		in.big, in.buf = nil, in.s.small[:]
	}
}

// enlarge makes room behind what is there.
func (in *intake) enlarge() {
	rest := in.bytes()
	if in.big == nil {
		in.big = readBuffers.Get().(*[]byte)
		in.buf = *in.big
	}
	in.r, in.w = 0, copy(in.buf, rest)
}

// more reads more bytes behind those that are there. The end of the stream behind an unfinished message is
// io.ErrUnexpectedEOF.
func (in *intake) more() error {
	s := in.s
	if in.r == in.w {
		// A busy connection keeps the large buffer; an idle one gives it back at its next short read.
		full := in.w == len(in.buf) || in.w > smallBuffer
		in.r, in.w = 0, 0
		if full && in.big == nil {
			in.enlarge()
		} else if !full {
			in.free()
		}
	} else {
		s.begin()
		in.enlarge()
	}
	n, err := s.nc.Read(in.buf[in.w:])
	if n > 0 {
		s.arrived(n)
		in.w += n
		return nil
	}
	if in.w > 0 && errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// begin notes since when the message that is arriving does.
func (s *stream) begin() {
	if s.frameSince.Load() == 0 {
		s.frameSince.Store(int64(s.c.srv.now()))
	}
}

// read reads frames until the connection fails or a message ends it.
func (s *stream) read() error {
	in := s.intake()
	defer in.free()
	for {
		b := in.bytes()
		h, ok, err := parseHeader(b)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrMalformed, err)
		}
		if !ok {
			if err := in.more(); err != nil {
				return err
			}
			continue
		}
		n := h.whole()
		if n > s.c.srv.cfg.MaxMessageSize {
			return fmt.Errorf("%w: %d bytes", ErrTooLarge, n)
		}
		var own []byte
		held := 0
		switch {
		case len(b) >= n:
			own = append(make([]byte, 0, n-h.size), b[h.size:n]...)
			in.r += n
		case n <= bigBuffer:
			if err := in.more(); err != nil {
				return err
			}
			continue
		default: // a large message gets its own memory at once, and no more of it than has arrived
			in.r += h.size
			if own, held, err = in.gather(nil, 0, n-h.size, true); err != nil {
				s.c.srv.budget.give(held)
				return err
			}
		}
		s.frameSince.Store(0)
		if err := s.deliver(h, own, held); err != nil {
			return err
		}
	}
}

// arrived counts bytes. Bytes of an unfinished message count as a sign of life, too: a large one over a slow link leaves no
// room for a Pong; MessageTimeout bounds it.
func (s *stream) arrived(n int) {
	s.c.bytesIn.Add(uint64(n)) //nolint:gosec // not negative
	s.c.srv.metrics.bytesIn.Add(float64(n))
	s.c.lastIn.Store(int64(s.c.srv.now()))
}

// gather takes n more bytes behind own, which ends with them if last is set. Memory grows with what has arrived, and is taken
// from the budget; held is what was taken, before and after, also with an error.
func (in *intake) gather(own []byte, held, n int, last bool) ([]byte, int, error) {
	s := in.s
	s.begin()
	for need := len(own) + n; len(own) < need; {
		if have := len(own); have == cap(own) {
			step := need
			if !last {
				step = max(need, 2*have) // or many small pieces would be copied over and over
			}
			step = min(step, max(4*bigBuffer, 2*have))
			for !s.c.srv.budget.take(step - held) {
				if err := s.c.waitBudget(step - held); err != nil {
					return nil, held, err
				}
			}
			held = step
			own = append(make([]byte, 0, step), own...)
		}
		room := own[len(own):min(need, cap(own))]
		if k := copy(room, in.bytes()); k > 0 {
			in.r += k
			own = own[:len(own)+k]
			continue
		}
		k, err := s.nc.Read(room)
		if k > 0 {
			s.arrived(k)
			own = own[:len(own)+k]
		} else if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, held, err
		}
	}
	return own, held, nil
}

// deliver hands a whole message on: own is token and body.
func (s *stream) deliver(h header, own []byte, held int) error {
	if h.code>>5 == 7 {
		defer s.c.srv.budget.give(held)
		return s.signal(h.code, token(own, h.tkl), own[h.tkl:])
	}
	return s.c.receive(h.code, token(own, h.tkl), own[h.tkl:], held)
}

// token returns the first n bytes of b as a token; nil for an empty one.
func token(b []byte, n int) []byte {
	if n == 0 {
		return nil
	}
	return b[:n:n]
}

// waitBudget waits until bytes come back to the budget, at most OverloadTimeout.
func (c *Conn) waitBudget(n int) error {
	freed := c.srv.budget.wait()
	if c.srv.budget.take(n) {
		c.srv.budget.give(n)
		return nil
	}
	c.srv.metrics.queueFull.Inc()
	timeout := time.NewTimer(c.srv.cfg.OverloadTimeout)
	defer timeout.Stop()
	select {
	case <-freed:
		return nil
	case <-c.ctx.Done():
		return net.ErrClosed
	case <-timeout.C:
		return ErrOverload
	}
}

func (s *stream) send(ctx context.Context, m *Message, wait bool) error {
	s.mu.Lock()
	for len(s.pending) >= s.c.srv.cfg.WriteQueue && !s.finished {
		if !wait {
			s.mu.Unlock()
			return errQueueFull
		}
		if s.room == nil {
			s.room = make(chan struct{})
		}
		room := s.room
		s.mu.Unlock()
		select {
		case <-room:
		case <-ctx.Done():
			return ctx.Err()
		case <-s.c.ctx.Done():
			return net.ErrClosed
		}
		s.mu.Lock()
	}
	if s.finished {
		s.mu.Unlock()
		return net.ErrClosed
	}
	if s.ws != nil {
		s.pending = appendWebSocketMessage(s.buffer(), m)
	} else {
		s.pending = appendFrame(s.buffer(), m)
	}
	s.startWriter()
	s.mu.Unlock()
	s.c.messagesOut.Add(1)
	s.c.srv.metrics.out[kindOf(m.Code)].Inc()
	return nil
}

// buffer returns what is pending, to append to; mu is held.
func (s *stream) buffer() []byte {
	if s.pending == nil {
		s.pending = *(writeBuffers.Get().(*[]byte))
	}
	return s.pending
}

func (s *stream) startWriter() {
	if !s.writing {
		s.writing = true
		go s.write() // ends when nothing is pending; the owner waits for done
	}
}

func (s *stream) finish() {
	var why error
	if s.ws != nil {
		why = s.c.ending()
	}
	s.mu.Lock()
	if !s.finished {
		s.finished = true
		if s.ws != nil { // the last thing we say (RFC 6455, Section 5.5.1)
			s.pending = s.ws.appendClose(s.buffer(), why)
		}
		s.wakeSenders()
		s.startWriter()
	}
	s.mu.Unlock()
}

func (s *stream) wakeSenders() {
	if s.room != nil {
		close(s.room)
		s.room = nil
	}
}

func (s *stream) cut() { _ = s.raw.Close() }

// write writes what is pending until nothing is.
func (s *stream) write() {
	s.mu.Lock()
	for s.failed == nil && len(s.pending) > 0 {
		out := s.pending
		s.pending = nil
		s.wakeSenders()
		s.mu.Unlock()

		_ = s.nc.SetWriteDeadline(time.Now().Add(s.c.srv.cfg.WriteTimeout))
		n, err := s.nc.Write(out)
		s.c.bytesOut.Add(uint64(n)) //nolint:gosec // not negative
		s.c.srv.metrics.bytesOut.Add(float64(n))
		if cap(out) <= keepBuffer {
			out = out[:0]
			writeBuffers.Put(&out)
		}

		s.mu.Lock()
		if err != nil {
			s.failed = err
		}
	}
	failed, finished := s.failed, s.finished
	if failed != nil {
		s.pending = nil
		if !finished {
			s.finished = true
			s.wakeSenders()
		}
	}
	s.writing = failed != nil || finished // nobody starts another one
	s.mu.Unlock()

	switch {
	case failed != nil:
		if errors.Is(failed, os.ErrDeadlineExceeded) {
			failed = fmt.Errorf("%w: %w", ErrStuck, failed)
		}
		s.c.shut(failed, false)
		s.cut() // also wakes the reader
	case finished:
		s.closeWrite()
	default:
		return
	}
	close(s.done)
}

// closeWrite ends our direction: close_notify, then FIN. The reader goes on until the peer has closed, too, so that what was
// written last arrives.
func (s *stream) closeWrite() {
	type halfCloser interface{ CloseWrite() error }
	if tc, ok := s.nc.(*tls.Conn); ok {
		_ = tc.CloseWrite()
	}
	if hc, ok := s.raw.(halfCloser); ok {
		_ = hc.CloseWrite()
	} else {
		_ = s.raw.Close()
	}
}

// kindOf sorts a message for counting.
func kindOf(code codes.Code) kind {
	switch {
	case code == codes.Empty:
		return kindEmpty
	case code>>5 == 0:
		return kindRequest
	case code>>5 == 7:
		return kindSignal
	}
	return kindResponse
}
