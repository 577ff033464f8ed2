package coap

import (
	"context"
	"time"
)

// Conn is one connection with a peer, for both roles. All methods may be called from any goroutine, also from handlers.
type Conn struct {
	info ConnInfo
	ctx  context.Context
}

// Info returns what is known of the connection from its transport.
func (c *Conn) Info() ConnInfo { return c.info }

// Context returns a context that ends when the connection is gone.
func (c *Conn) Context() context.Context { return c.ctx }

// Stats are the counters of one connection, for diagnostics.
type Stats struct {
	Since        time.Time // when the connection was complete
	LastActivity time.Time // when the last bytes of a message came in
	BytesIn      uint64    // CoAP, without TLS
	BytesOut     uint64
	MessagesIn   uint64
	MessagesOut  uint64
	RoundTrip    time.Duration // of the last answered Ping; zero before
}

// Stats returns the connection's counters.
func (c *Conn) Stats() Stats { return Stats{} }

// Close ends the connection soon and does not block: what waits to be written is written first, bounded by
// Config.CloseTimeout. err is what Closed will be told; nil means ErrClosed. Only the first call counts.
func (c *Conn) Close(err error) {}
