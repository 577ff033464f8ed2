package coap

import (
	"container/list"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Server is an engine: it serves any number of listeners with one handler, one timer wheel and common bounds.
type Server struct {
	cfg     Config
	handler Handler
	log     *slog.Logger
	metrics *Metrics
	start   time.Time
	wheel   *wheel
	budget  *budget

	draining context.Context // over: nobody new is taken on
	drain    context.CancelFunc

	mu       sync.Mutex // guards what follows
	serving  int        // listeners that serve; the wheel turns while there is one
	stop     chan struct{}
	stopped  chan struct{}
	count    int                  // connections, complete or not
	shaking  *list.List           // of *handshake, oldest first
	networks map[netip.Prefix]int // how many of shaking each has
	shakeEnd chan struct{}        // closed when one ends; nil while nobody waits
	unproven *list.List           // of *datagram: sessions over plain UDP, oldest first; some are proven meanwhile
	listed   []lister             // that serve
}

// handshake is a connection that is not complete yet.
type handshake struct {
	raw     net.Conn
	network netip.Prefix
	since   time.Duration // of Server.now
	evicted bool
	at      *list.Element
}

// NewServer makes an engine that has no listener yet. log and m must not be nil.
func NewServer(cfg Config, h Handler, log *slog.Logger, m *Metrics) *Server {
	s := &Server{
		cfg: cfg, handler: h, log: log, metrics: m, start: time.Now(), wheel: newWheel(), shaking: list.New(),
		networks: make(map[netip.Prefix]int), unproven: list.New(),
		budget: &budget{left: cfg.MaxBuffered, gauge: m.buffered},
	}
	s.draining, s.drain = context.WithCancel(context.Background())
	return s
}

// now is the engine's clock: monotonic, so that nobody is silent because the wall clock was set, and never zero, which means
// never.
func (s *Server) now() time.Duration { return time.Since(s.start) + 1 }

// listener is one call of ServeTCP, or of WebSocket.Serve.
type listener struct {
	srv *Server
	tls *tls.Config
	wg  sync.WaitGroup

	mu      sync.Mutex
	closing bool
	open    map[*Conn]struct{}
	shaking map[net.Conn]struct{}
}

// ServeTCP accepts CoAP over TCP (RFC 8323), inside TLS unless tlsConf is nil, until ctx ends; then it releases its
// connections (7.04), closes them and the listener, waits for all their goroutines and returns nil. Drain closes the listener before.
// Another end of the listener is an error.
func (s *Server) ServeTCP(ctx context.Context, ln net.Listener, tlsConf *tls.Config) error {
	s.enter()
	defer s.leave()
	l := &listener{srv: s, tls: tlsConf, open: make(map[*Conn]struct{}), shaking: make(map[net.Conn]struct{})}
	defer s.list(l)()
	for _, ends := range []context.Context{ctx, s.draining} {
		defer context.AfterFunc(ends, func() { _ = ln.Close() })()
	}

	err := l.accept(ctx, ln)
	_ = ln.Close()
	if s.draining.Err() != nil {
		<-ctx.Done()
	}
	l.release()
	l.wg.Wait()
	if ctx.Err() != nil {
		return nil
	}
	return fmt.Errorf("accept coap connections: %w", err)
}

func (s *Server) enter() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.serving++; s.serving == 1 {
		s.stop, s.stopped = make(chan struct{}), make(chan struct{})
		go func(stop, stopped chan struct{}) {
			defer close(stopped)
			s.wheel.run(stop)
		}(s.stop, s.stopped)
	}
}

func (s *Server) leave() {
	s.mu.Lock()
	s.serving--
	last, stop, stopped := s.serving == 0, s.stop, s.stopped
	s.mu.Unlock()
	if last {
		close(stop)
		<-stopped
	}
}

// accept accepts until the listener ends.
func (l *listener) accept(ctx context.Context, ln net.Listener) error {
	s := l.srv
	var pause time.Duration
	for {
		raw, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || !passing(err) {
				return err
			}
			s.metrics.acceptErrors.Inc()
			pause = min(max(2*pause, 5*time.Millisecond), time.Second)
			s.log.Warn("cannot accept connections for now", "error", err, "pause", pause)
			t := time.NewTimer(pause)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
			}
			continue
		}
		pause = 0
		if !s.admitProven() {
			_ = raw.Close()
			s.refuse(raw.RemoteAddr(), "max-connections", fmt.Sprintf("%d connections are open", s.cfg.MaxConnections))
			continue
		}
		if l.tls == nil {
			l.wg.Add(1)
			go l.serve(raw, raw, nil)
			continue
		}
		h := l.begin(ctx, raw)
		l.wg.Add(1)
		go l.handshake(h)
	}
}

// passing reports that a failed accept says nothing about the next one.
func passing(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED, syscall.EPROTO} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// admit counts one more connection, unless there are too many.
func (s *Server) admit() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.count >= s.cfg.MaxConnections {
		return false
	}
	s.count++
	return true
}

// admitProven is admit for a peer that has shown that its address is its own: a session over plain UDP that anybody may have
// forged gives way to it.
func (s *Server) admitProven() bool { return s.admit() || s.evict() && s.admit() }

// evict ends the oldest session whose address was never proven, and reports whether there was one.
func (s *Server) evict() bool {
	s.mu.Lock()
	at := s.forgeable()
	if at == nil {
		s.mu.Unlock()
		return false
	}
	d := s.unproven.Remove(at).(*datagram)
	s.mu.Unlock()
	d.c.shut(ErrEvicted, false)
	d.vacate() // its end may take a moment
	return true
}

// forgeable is the oldest session whose address is not proven; nil when there is none. s.mu is held.
func (s *Server) forgeable() *list.Element {
	for at := s.unproven.Front(); at != nil; at = s.unproven.Front() {
		d := at.Value.(*datagram)
		d.mu.Lock()
		proven := d.proven
		d.mu.Unlock()
		if !proven {
			return at
		}
		s.unproven.Remove(at)
	}
	return nil
}

func (s *Server) gone() {
	s.mu.Lock()
	s.count--
	s.mu.Unlock()
}

// refuse records a connection that did not become one.
func (s *Server) refuse(remote net.Addr, reason, detail string) {
	s.metrics.refused.WithLabelValues(reason).Inc()
	s.log.Debug("connection refused", "remote", remote, "reason", reason, "detail", detail)
	if s.cfg.Refused != nil {
		s.cfg.Refused(remote, reason, detail)
	}
}

// handshakeGrace is how long a handshake may take at least, however many others want its place: else a fleet that comes back
// at once would push itself out for ever.
const handshakeGrace = time.Second

// begin makes room for one more handshake. When all places are taken, the oldest of the network that holds most of them gives
// way: at once to another network, and to its own after handshakeGrace. So peers that never finish neither keep others out
// nor slow down the accepting of connections.
func (l *listener) begin(ctx context.Context, raw net.Conn) *handshake {
	s := l.srv
	h := &handshake{raw: raw, network: networkOf(raw.RemoteAddr()), since: s.now()}
	s.mu.Lock()
	for s.shaking.Len() >= s.cfg.MaxHandshakes {
		victim := s.victim()
		wait := handshakeGrace - (s.now() - victim.since)
		if victim.network != h.network || wait <= 0 || ctx.Err() != nil {
			victim.evicted = true
			s.shaken(victim)
			_ = victim.raw.Close()
			continue
		}
		if s.shakeEnd == nil {
			s.shakeEnd = make(chan struct{})
		}
		ended := s.shakeEnd
		s.mu.Unlock()
		t := time.NewTimer(wait)
		select {
		case <-ended:
		case <-t.C:
		case <-ctx.Done():
		}
		t.Stop()
		s.mu.Lock()
	}
	h.at = s.shaking.PushBack(h)
	s.networks[h.network]++
	s.mu.Unlock()

	l.mu.Lock()
	l.shaking[raw] = struct{}{}
	l.mu.Unlock()
	return h
}

// victim is the oldest handshake of a network that has most of them. s.mu is held, and there is one.
func (s *Server) victim() *handshake {
	var v *handshake
	for e := s.shaking.Front(); e != nil; e = e.Next() {
		if h := e.Value.(*handshake); v == nil || s.networks[h.network] > s.networks[v.network] {
			v = h
		}
	}
	return v
}

// shaken takes a handshake off the list. s.mu is held.
func (s *Server) shaken(h *handshake) {
	s.shaking.Remove(h.at)
	if s.networks[h.network]--; s.networks[h.network] == 0 {
		delete(s.networks, h.network)
	}
}

// networkOf is what counts as one source: 24 bits of an IPv4 address, 64 of an IPv6 one, which one subscriber has at his
// disposal. Addresses of other kinds are one network.
func networkOf(a net.Addr) netip.Prefix {
	tcp, ok := a.(*net.TCPAddr)
	if !ok {
		return netip.Prefix{}
	}
	ip := tcp.AddrPort().Addr().Unmap().WithZone("")
	bits := 64
	if ip.Is4() {
		bits = 24
	}
	p, _ := ip.Prefix(bits) // fails for no address at all, which is a network too
	return p
}

// handshake completes a TLS connection. It has a goroutine of its own: the handshake's deep stack goes away with it, and the
// reader starts with a small one.
func (l *listener) handshake(h *handshake) {
	s := l.srv
	tc := tls.Server(h.raw, l.tls)
	_ = h.raw.SetDeadline(time.Now().Add(s.cfg.HandshakeTimeout))
	err := tc.Handshake() //nolint:noctx // the deadline bounds it, and evicting or stopping closes the connection
	_ = h.raw.SetDeadline(time.Time{})

	s.mu.Lock()
	evicted := h.evicted
	if !evicted {
		s.shaken(h)
	}
	if s.shakeEnd != nil {
		close(s.shakeEnd)
		s.shakeEnd = nil
	}
	s.mu.Unlock()
	l.mu.Lock()
	delete(l.shaking, h.raw)
	l.mu.Unlock()

	if err != nil || evicted {
		outcome := "failed"
		switch {
		case evicted:
			outcome, err = "evicted", errors.New("too many handshakes under way")
		case errors.Is(err, os.ErrDeadlineExceeded):
			outcome, err = "timeout", fmt.Errorf("not complete after %v", s.cfg.HandshakeTimeout)
		}
		s.metrics.handshakes.WithLabelValues(outcome).Inc()
		_ = h.raw.Close()
		s.refuse(h.raw.RemoteAddr(), "handshake-"+outcome, withoutAddresses(err).Error())
		s.gone()
		l.wg.Done()
		return
	}
	s.metrics.handshakes.WithLabelValues("ok").Inc()
	go l.serve(tc, h.raw, nil) // takes over this goroutine's place in l.wg
}

// withoutAddresses is a network's error without both ends' addresses, so that equal causes read alike.
func withoutAddresses(err error) error {
	if op, ok := errors.AsType[*net.OpError](err); ok {
		return fmt.Errorf("%s: %w", op.Op, op.Err)
	}
	return err
}

// serve owns a complete connection from Open to Closed. ws is nil unless it is a WebSocket.
func (l *listener) serve(nc, raw net.Conn, ws *webSocket) {
	s := l.srv
	defer l.wg.Done()
	defer s.gone()
	c := s.newConn()
	st := newStream(c, nc, raw, ws)
	if ws != nil {
		st.upgrade() // before anybody else can find the connection and say something on it
	}

	l.mu.Lock()
	closing := l.closing
	if !closing {
		l.open[c] = struct{}{}
	}
	l.mu.Unlock()
	if closing {
		c.cancel()
		_ = raw.Close()
		return
	}
	defer func() {
		l.mu.Lock()
		delete(l.open, c)
		l.mu.Unlock()
	}()

	// RFC 8323, Section 5.3: our first message; we do not wait for the peer's, some never send one.
	_ = st.send(c.ctx, s.csm(), false)
	var err error
	if !c.Guard("Open", func() { c.handler, err = s.handler.Open(c) }) {
		err = errors.New("handler panicked")
	}
	if err != nil {
		s.refuse(raw.RemoteAddr(), "handler", err.Error())
		c.handler = noHandler{}
		c.shut(err, false)
	} else {
		s.metrics.opened.Inc()
		s.metrics.connections.Inc()
		defer s.metrics.connections.Dec()
		c.mu.Lock()
		if c.reason == nil {
			s.wheel.set(&c.timer, min(s.cfg.FirstMessageTimeout, s.cfg.MessageTimeout/2, keepAliveHalf(s.cfg.KeepAlive)))
		}
		c.mu.Unlock()
		c.begun()
	}
	st.run()
}

func keepAliveHalf(d time.Duration) time.Duration {
	if d <= 0 {
		return time.Hour
	}
	return d / 2
}

// noHandler stands in for the one that Open refused to make.
type noHandler struct{}

func (noHandler) Request(context.Context, *Message) Response {
	return Response{Code: codes.ServiceUnavailable}
}
func (noHandler) Notifications(context.Context, []Notification) {}
func (noHandler) Closed(error)                                  {}

// release ends all connections of the listener in order (RFC 8323, Section 5.5).
func (l *listener) release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closing = true
	for raw := range l.shaking {
		_ = raw.Close()
	}
	for c := range l.open {
		_ = c.tr.send(c.ctx, &Message{Code: codes.Release}, false) // no room: the peer does not read anyway
		c.shut(ErrShutdown, true)
	}
}
