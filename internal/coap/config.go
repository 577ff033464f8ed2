package coap

import (
	"net"
	"time"
)

// MaxBody is the largest body of a request or of a block-wise answer in bytes by default; MaxMessageSize leaves room for
// options beside it.
const MaxBody = 256 << 10

// Config is what an engine may use and how long it waits. The zero value of a field is not a default: start from
// DefaultConfig.
type Config struct {
	// MaxMessageSize is the largest whole message in bytes (framing, token, options and payload) that is accepted; it is
	// announced in the CSM (RFC 8323, Section 5.3.1). A larger one ends the connection with Abort. Default 320 KiB.
	MaxMessageSize int
	// MaxBody is the largest request body in bytes, in one message or in blocks; one byte more is answered with 4.13. The
	// same bound holds for bodies that are fetched in blocks. Default 256 KiB.
	MaxBody int
	// MaxConnections bounds connections and sessions that are complete or in their handshake; further ones are closed at
	// once. The oldest session over plain UDP whose address is not proven gives way to one that does not come over plain UDP, and
	// to one that does when it tries again. Default 50 000.
	MaxConnections int
	// HandshakeTimeout ends a TLS handshake that takes longer. Default 10 s.
	HandshakeTimeout time.Duration
	// MaxHandshakes bounds handshakes under way. When it is reached, the oldest of the network (IPv4 /24, IPv6 /64) with most
	// of them is given up: at once for a connection from another network, else once it is a second old. Default 512.
	MaxHandshakes int
	// FirstMessageTimeout closes a connection that has not brought one whole message by then. Default 20 s.
	FirstMessageTimeout time.Duration
	// KeepAlive is T: after T/2 without a message a Ping is sent, after another T/2 the connection is closed. Zero turns
	// it off. Default 20 s.
	KeepAlive time.Duration
	// MessageTimeout closes a connection on which one message takes longer to arrive. Default 60 s.
	MessageTimeout time.Duration
	// WriteTimeout closes a connection whose peer takes nothing for so long. Default 10 s.
	WriteTimeout time.Duration
	// WriteQueue bounds the bytes that wait to be written to one connection; while it is full, answers and requests wait,
	// Pongs are dropped. One message may exceed it. Default 512 KiB.
	WriteQueue int
	// QueueLength and QueueBytes bound the requests and notifications of one connection that wait or are being handled.
	// While one of them is reached the engine does not read from the connection; one message may exceed QueueBytes.
	// Defaults 256 and 512 KiB.
	QueueLength int
	QueueBytes  int
	// OverloadTimeout closes a connection whose queue stays full for so long (devices wait 4 s for a Pong). Default 3 s.
	OverloadTimeout time.Duration
	// MaxBuffered bounds in bytes, over all connections of a server, what is queued and what block-wise transfers keep.
	// While it is reached, connections are not read (as with a full queue) and new transfers are answered with 5.03.
	// Default 256 MiB.
	MaxBuffered int64
	// MaxOutstanding bounds the requests to one peer that have no answer yet (NSTART of RFC 7252, Section 4.7); further
	// calls of Do wait. Default 1.
	MaxOutstanding int
	// MaxProven is what MaxOutstanding grows to: for a peer over UDP or DTLS that answers without a retransmission, of which the
	// first one begins anew; for one over a stream that answered a request while an earlier one was out. Default 4.
	MaxProven int
	// MaxObservations bounds the observations of one connection. Default 1024.
	MaxObservations int
	// MaxTransfers bounds the block-wise transfers kept for one connection in each direction; a new one replaces the oldest.
	// Default 4.
	MaxTransfers int
	// TransferTimeout forgets a block-wise transfer that made no progress for so long. Default 60 s.
	TransferTimeout time.Duration
	// CloseTimeout bounds how long an orderly close may take: answers under way, flushing, and the peer's own close.
	// Default 2 s.
	CloseTimeout time.Duration

	// What follows is for UDP and DTLS. The names in capitals are those of RFC 7252, Section 4.8.

	// AckTimeout is ACK_TIMEOUT: the shortest time before a confirmable message is sent again. Default 2 s.
	AckTimeout time.Duration
	// AckRandomFactor is ACK_RANDOM_FACTOR: the first time is between AckTimeout and so many times AckTimeout, each further
	// one doubles. Default 1.5.
	AckRandomFactor float64
	// MaxRetransmit is MAX_RETRANSMIT: how often a confirmable message is sent again. Default 4.
	MaxRetransmit int
	// ProbingRate is PROBING_RATE: bytes a second, on average, to a peer that does not answer. Default 1.
	ProbingRate float64
	// AckDelay is how long a handler may take before a confirmable request gets an empty ACK, and its answer a message of
	// its own. Below AckTimeout, or every slow answer costs a retransmission. Default 1 s.
	AckDelay time.Duration
	// MaxDuplicates and DuplicateBytes bound, for one session, the received messages that are remembered for their
	// duplicates, and what they take with their answers. The oldest is forgotten first; its duplicate would be handled
	// again. Defaults 256 and 64 KiB.
	MaxDuplicates  int
	DuplicateBytes int
	// MaxDatagram is the largest datagram in bytes that is sent, from the CoAP header on; larger bodies go in blocks. RFC
	// 7252, Section 4.6 assumes 1152, which is the default.
	MaxDatagram int
	// MaxSilence ends a session whose peer has said nothing for so long. Default 25 h, so that a device may report once a
	// day.
	MaxSilence time.Duration
	// Linger is how long a session that was ended by an answer (Response.Close, Conn.CloseAnswered) still repeats that to duplicates of
	// the request. Default 10 s.
	Linger time.Duration

	// Refused is told of each connection that did not become one: reason is a word of a small set ("handshake-failed",
	// "handshake-timeout", "handshake-evicted", "websocket", "max-connections", "handler"), detail is for people. May be nil;
	// must not block.
	Refused func(remote net.Addr, reason, detail string)
}

// DefaultConfig returns the defaults named at each field.
func DefaultConfig() Config {
	return Config{
		MaxMessageSize:      MaxBody + 64<<10,
		MaxBody:             MaxBody,
		MaxConnections:      50_000,
		HandshakeTimeout:    10 * time.Second,
		MaxHandshakes:       512,
		FirstMessageTimeout: 20 * time.Second,
		KeepAlive:           20 * time.Second,
		MessageTimeout:      time.Minute,
		WriteTimeout:        10 * time.Second,
		WriteQueue:          512 << 10,
		QueueLength:         256,
		QueueBytes:          512 << 10,
		OverloadTimeout:     3 * time.Second,
		MaxBuffered:         256 << 20,
		MaxOutstanding:      1,
		MaxProven:           4,
		MaxObservations:     1024,
		MaxTransfers:        4,
		TransferTimeout:     time.Minute,
		CloseTimeout:        2 * time.Second,
		AckTimeout:          2 * time.Second,
		AckRandomFactor:     1.5,
		MaxRetransmit:       4,
		ProbingRate:         1,
		AckDelay:            time.Second,
		MaxDuplicates:       256,
		DuplicateBytes:      64 << 10,
		MaxDatagram:         baseMessageSize,
		MaxSilence:          25 * time.Hour,
		Linger:              10 * time.Second,
	}
}

// exchangeLifetime is EXCHANGE_LIFETIME (RFC 7252, Section 4.8.2), 247 s with the defaults: how long a message ID means the
// same message.
func (c *Config) exchangeLifetime() time.Duration {
	const maxLatency = 100 * time.Second
	span := time.Duration(float64(c.AckTimeout) * float64(int(1)<<c.MaxRetransmit-1) * c.AckRandomFactor)
	return span + 2*maxLatency + c.AckTimeout
}
