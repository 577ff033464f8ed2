package hub

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// Kind says what a caller can do about an error. Each door has one table from kinds to its own codes; kinds cross every
// boundary inside the hub unchanged. The zero kind is Internal: an error nobody can act on is our own fault.
type Kind uint8

// The kinds. Their names are what docs/errors.md and the metrics call them.
const (
	Internal         Kind = iota // our fault; details stay in the log
	Invalid                      // the request is malformed; repeating it will not help
	Unauthenticated              // the credential is missing, bad or expired; never used for trouble of ours
	Denied                       // the credential is good, the act is not allowed
	NotFound                     // no such thing, or not visible to the caller
	MethodNotAllowed             // the path exists, the method does not
	NotAcceptable                // none of the formats asked for can be produced
	Unsupported                  // a content format or feature that is not supported
	BadOption                    // a critical option that is not understood (CoAP)
	Precondition                 // the state of the target does not allow it
	TooLarge                     // a body, list or text over its limit
	Conflict                     // somebody else was faster; reload and decide again
	Exhausted                    // a limit, quota or queue is full; later it may work
	Unavailable                  // a part of ours or a provider is away; later it will work
	Deadline                     // time ran out before an answer was there
)

const numKinds = int(Deadline) + 1

var kindNames = [numKinds]string{
	"internal", "invalid", "unauthenticated", "denied", "not-found", "method-not-allowed", "not-acceptable", "unsupported",
	"bad-option", "precondition", "too-large", "conflict", "exhausted", "unavailable", "deadline",
}

// String returns the stable lower-case name of the kind.
func (k Kind) String() string {
	if int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// Kinds returns all kinds in order; tests use it to prove that a door's table is complete.
func Kinds() []Kind {
	out := make([]Kind, numKinds)
	for i := range out {
		out[i] = Kind(i)
	}
	return out
}

// Error is an error that a caller can act on.
type Error struct {
	Kind Kind
	Op   string // what was being done: "directory.Publish"; for logs
	// Code is the stable code of the error catalogue (docs/errors.md), for example "device-owned-by-other". Empty means the
	// kind's name.
	Code string
	// Text is one short sentence that may be shown to outsiders. Empty means the kind's sentence.
	Text string
	// RetryAfter is how long to wait before trying again; zero leaves it to the door.
	RetryAfter time.Duration
	Err        error // the cause; for logs only, never shown to outsiders
}

// Error returns the whole chain, for logs.
func (e *Error) Error() string {
	s := e.Op
	if s != "" {
		s += ": "
	}
	if t := e.Text; t != "" {
		s += t
	} else {
		s += e.Kind.Sentence()
	}
	if e.Err != nil {
		s += ": " + e.Err.Error()
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// NewError makes an *Error with a stable code and a sentence that outsiders may see.
func NewError(kind Kind, code, text string) *Error { return &Error{Kind: kind, Code: code, Text: text} }

// With returns a copy of e with op and cause set. The cause may be nil.
func (e *Error) With(op string, cause error) *Error {
	c := *e
	c.Op, c.Err = op, cause
	return &c
}

// KindOf returns the kind of the first *Error in err's chain. A context's deadline is Deadline, its cancellation
// Unavailable; nil and everything else is Internal.
func KindOf(err error) Kind {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e.Kind
	case errors.Is(err, context.DeadlineExceeded):
		return Deadline
	case errors.Is(err, context.Canceled):
		return Unavailable
	}
	return Internal
}

// IsKind reports whether err is not nil and of kind k.
func IsKind(err error, k Kind) bool { return err != nil && KindOf(err) == k }

// Public returns what an outsider may see of err: the stable code and one short sentence. An *Error that brings neither and
// wraps one of the same kind only says where that passed; one of another kind hides what it wraps.
func Public(err error) (code, text string) {
	kind := KindOf(err)
	code, text = kind.String(), kind.Sentence()
	var e *Error
	for errors.As(err, &e) && e.Kind == kind {
		if e.Code == "" && e.Text == "" {
			err = e.Err
			continue
		}
		if e.Code != "" {
			code = e.Code
		}
		if e.Text != "" {
			text = e.Text
		}
		break
	}
	return code, text
}

// Sentence returns the sentence that outsiders see when an error of this kind brings none of its own.
func (k Kind) Sentence() string {
	switch k {
	case Internal:
		return "something went wrong in the hub"
	case Invalid:
		return "the request is malformed"
	case Unauthenticated:
		return "the credential is missing, bad or expired"
	case Denied:
		return "this is not allowed"
	case NotFound:
		return "there is no such thing"
	case MethodNotAllowed:
		return "this method is not allowed here"
	case NotAcceptable:
		return "none of the accepted formats can be produced"
	case Unsupported:
		return "this is not supported"
	case BadOption:
		return "a critical option is not understood"
	case Precondition:
		return "the state of the target does not allow this"
	case TooLarge:
		return "this is larger than the limit"
	case Conflict:
		return "somebody else changed it first"
	case Exhausted:
		return "a limit is reached, try again later"
	case Unavailable:
		return "temporarily unavailable, try again later"
	case Deadline:
		return "no answer in time"
	}
	return "unknown error"
}
