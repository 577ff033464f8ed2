package coap

import "context"

// Do sends a request to the peer and returns its answer, whole even if one or the other went in blocks (RFC 7959). The
// token of req is ignored; the engine makes its own. req is not changed and may be shared. Error responses are answers, not
// errors. At most Config.MaxOutstanding requests are under way, further ones wait for ctx. Errors are of kind Deadline or
// Unavailable (ctx ended, connection gone), TooLarge (the peer or our limit), Invalid or BadOption (an answer that breaks
// the protocol).
func (c *Conn) Do(ctx context.Context, req *Message) (*Message, error) { return nil, errGone }

// Observe registers for a resource (RFC 7641, Section 3.1): it sends req, a GET or FETCH, with Observe 0 and returns the
// first answer, an error code included. The observation is nil if the answer has no Observe option. Notifications may reach
// ConnHandler.Notifications before Observe returns; Observation.Path tells them apart even then. A notification whose blocks
// come to more than Config.MaxBody arrives as 4.13 without payload, not ended; one with a critical option that is not
// understood as 4.02, ended.
func (c *Conn) Observe(ctx context.Context, req *Message) (*Observation, *Message, error) {
	return nil, nil, errGone
}

// Observation is an entry in the peer's list of observers. It ends by Cancel, by a notification with Ended, or with its
// connection.
type Observation struct{ path string }

// Path returns the path that is observed, with a leading slash.
func (o *Observation) Path() string { return o.path }

// SetTag attaches a value of the handler's own.
func (o *Observation) SetTag(v any) {}

// Tag returns what SetTag attached, nil before.
func (o *Observation) Tag() any { return nil }

// Cancel ends the observation: no notifications are delivered from now on, and the peer is told by a GET with Observe 1 and
// the token of the observation (RFC 7641, Section 3.6). Errors are those of Do; the observation is over in any case.
// Cancelling one that is over does nothing.
func (o *Observation) Cancel(ctx context.Context) error { return nil }
