package coap

import (
	"context"
	"errors"
	"io"
	"net"

	"github.com/coaphub/coaphub/hub"
)

// CloseError is a reason for the end of a connection that the engine itself knows. Its name is stable, for logs and metrics.
type CloseError struct{ name, text string }

// Error returns the reason as a sentence.
func (e *CloseError) Error() string { return e.text }

// Name returns the reason's stable short name.
func (e *CloseError) Name() string { return e.name }

// Why the engine ends a connection. Compare with errors.Is: most are wrapped with details.
var (
	ErrIdle      = &CloseError{"idle", "the peer never said anything"}
	ErrKeepAlive = &CloseError{"keepalive", "the peer did not answer a ping"}
	ErrSlow      = &CloseError{"slow-message", "the peer took too long to send one message"}
	ErrStuck     = &CloseError{"write-timeout", "the peer stopped reading"}
	ErrOverload  = &CloseError{"overload", "the peer sent more than the hub could handle in time"}
	ErrMalformed = &CloseError{"malformed", "the peer sent bytes that are no CoAP message"}
	ErrTooLarge  = &CloseError{"too-large", "the peer sent a message over the limit"}
	ErrBadSignal = &CloseError{"bad-signal", "the peer sent a signalling option that is not understood or makes no sense"}
	ErrReleased  = &CloseError{"released", "the peer released the connection"}
	ErrAborted   = &CloseError{"aborted", "the peer aborted the connection"}
	ErrAnswered  = &CloseError{"answered", "closed after an answer that ends the connection"}
	ErrShutdown  = &CloseError{"shutdown", "the hub stops"}
	ErrSilent    = &CloseError{"silent", "the peer said nothing for too long"}
	ErrEvicted   = &CloseError{"evicted", "there were too many sessions, and the peer had not proven its address"}
	ErrReplaced  = &CloseError{"replaced", "the peer made a new session from the same address"}
	ErrPanic     = &CloseError{"panic", "a handler of notifications failed"}
	ErrClosed    = &CloseError{"closed", "the connection was closed by the hub"}
)

// Reason names why a connection ended, from a small set: the name of a CloseError, "eof", "canceled" or "network".
func Reason(err error) string {
	var ce *CloseError
	switch {
	case errors.As(err, &ce):
		return ce.name
	case err == nil, errors.Is(err, io.EOF):
		return "eof"
	case errors.Is(err, context.Canceled):
		return "canceled"
	}
	var ne net.Error
	if errors.As(err, &ne) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, net.ErrClosed) {
		return "network"
	}
	return "closed" // a reason given to Conn.Close by the handler; its text is in the log
}

// What a request to a peer may come back with besides the context's end.
var (
	errGone        = hub.NewError(hub.Unavailable, "device-gone", "the device's connection ended")
	errPeerLimit   = hub.NewError(hub.TooLarge, "too-large-for-device", "the device does not take messages this large")
	errBody        = hub.NewError(hub.TooLarge, "answer-too-large", "the device's answer is larger than the limit")
	errBuffered    = hub.NewError(hub.Exhausted, "answer-not-buffered", "the hub has no room for the device's answer now, try again later")
	errAnswer      = hub.NewError(hub.Invalid, "bad-answer", "the device's answer breaks the protocol")
	errAnswerOpt   = hub.NewError(hub.BadOption, "bad-answer-option", "the device's answer has a critical option that is not understood")
	errObservation = hub.NewError(hub.Exhausted, "too-many-observations", "too many observations on one connection")
)

// contextError gives a context's end the kind it has in the hub.
func contextError(ctx context.Context, op string) error {
	kind := hub.Unavailable
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		kind = hub.Deadline
	}
	return &hub.Error{Kind: kind, Op: op, Err: ctx.Err()}
}
