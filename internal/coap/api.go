package coap

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// Message is a CoAP message without its transport's framing.
type Message struct {
	Code    codes.Code
	Token   []byte          // 0 to 8 bytes; empty is a valid token
	Options message.Options // sorted by number
	Payload []byte          // nil when there is none

	from      *reception // the datagram that a request came in, and that an answer answers; nil on streams
	challenge bool       // of an answer: Response.Challenge
	era       int        // of a request: blocks.era when it was taken up
	again     bool       // of a request: it asks for more of an answer that is kept
}

// Response is what a handler answers. The engine adds the token and cuts it into blocks where needed.
type Response struct {
	Code    codes.Code
	Options message.Options
	Payload []byte
	// Close ends the connection once the response has been written (OCF devices rely on it after a refused account request).
	Close bool
	// Challenge has the engine answer 4.01 with an Echo option (RFC 9175, Section 2.3) in place of this, if this is more than
	// three times as long as the request and the peer has not proven its address; that happens over plain UDP alone. Without it
	// such an answer waits until the address has answered an empty CON, which is for paths where 4.01 means something else.
	Challenge bool
	// Silent sends nothing: the connection is ending, and the request was not carried out.
	Silent bool
	// Later, if not nil, makes the answer in place of all the above, in a goroutine of the connection's, so that what it waits
	// for holds up no other request or notification of the peer. Its context is that of Request. The handler bounds how many
	// there are. A panic in it ends this request with 5.00. After a Release the connection waits for it, at most CloseTimeout.
	Later func(ctx context.Context) Response
}

// Notification is one message that arrived for an observation of this connection (RFC 7641, Section 4.2), whole even if it
// came in blocks.
type Notification struct {
	Observation *Observation
	Message     *Message
	// Ended reports that the observation is over: the message is an error response, or has no Observe option.
	Ended bool
}

// Handler makes a ConnHandler for each connection that is complete (after the TLS handshake, before its first message).
type Handler interface {
	// Open may refuse a connection by an error; its text goes to the log, not to the peer.
	Open(c *Conn) (ConnHandler, error)
}

// ConnHandler is the hub's side of one connection, which over UDP and DTLS means one session. The engine calls Request and
// Notifications from one goroutine at a time, in the order of arrival; that goroutine exists only while there is work.
// Responses to Conn.Do are delivered beside it, so handlers may wait for the peer's answers.
type ConnHandler interface {
	// Request answers one request, whole even if it came in blocks. A panic ends this request with 5.00 (logged, counted).
	Request(ctx context.Context, req *Message) Response
	// Notifications brings everything that arrived for observations since the last call, in order, at least one. While it
	// runs, the next ones collect (bounded; then the engine stops reading, and over UDP takes none). Over UDP a confirmable
	// notification is acknowledged when the call has returned, unless it closed the connection.
	Notifications(ctx context.Context, ns []Notification)
	// Closed is called once, last, after the connection is gone; err says why (io.EOF: the peer closed it).
	Closed(err error)
}

// Pacer is implemented by a ConnHandler that slows peers down which report too much. Notifications cannot be refused; what is
// not handed over fills the queue, and then a stream is not read, while over UDP and DTLS what is confirmable gets no ACK and
// comes again.
type Pacer interface {
	// Pace is called when n notifications are about to be handed over. It returns how many of them will be, at least one, and
	// after how long. Nothing else of the peer is handled meanwhile, so that should be well below Config.OverloadTimeout. It
	// must not block. The wait ends early when the connection does.
	Pace(n int) (some int, after time.Duration)
}

// Refuser is implemented by a ConnHandler that wants to know of requests which the engine answers with an error by itself:
// options that are not understood, blocks that do not fit together, bodies over the limit. Refused is called once the answer
// is queued, from any goroutine, and must not block.
type Refuser interface {
	Refused(req *Message)
}

// Listener is implemented by a ConnHandler that wants to know when its peer over UDP or DTLS says something: the moment to reach
// a device that sleeps most of the time. Heard is called for each message that is one of CoAP and no duplicate, before it is
// handled, from one goroutine at a time, with how long the peer had said nothing before. It must not block.
type Listener interface {
	Heard(silence time.Duration)
}

// ConnInfo is what is known of a connection from its transport.
type ConnInfo struct {
	ID     string // random, never reused
	Secure bool
	Stream bool                 // TCP, TLS or WebSocket; else datagrams: UDP or DTLS
	Host   string               // of the handshake of a WebSocket, the default of Uri-Host there (RFC 8323, Section 8.5); else ""
	TLS    *tls.ConnectionState // of TLS; else nil
	Peer   PeerCredential       // of DTLS
	Local  net.Addr
	Remote net.Addr // for people; never an identity
}
