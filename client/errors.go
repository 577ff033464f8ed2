package client

import (
	"encoding/json"
	"net/http"
	"strconv"
	"strings"
	"time"
)

// Kind is a sort of failure. It is an error, for errors.Is.
type Kind string

// The sorts of failures. Callers can act on each of them, except for Internal.
const (
	Invalid         Kind = "invalid"         // the request makes no sense to the hub, or the hub's answer none to us
	Unauthenticated Kind = "unauthenticated" // there is no token, or it is bad, expired or revoked; or the device answered 4.01
	Denied          Kind = "denied"          // the caller may not do this, or not to this device
	NotFound        Kind = "not-found"       // there is no such thing
	Unsupported     Kind = "unsupported"     // the hub or the device cannot do this
	Precondition    Kind = "precondition"    // a condition is not met, CommandOptions.IfMatch for one
	TooLarge        Kind = "too-large"       // the content is larger than the hub takes
	Conflict        Kind = "conflict"        // somebody else was faster: read again, then decide again
	Exhausted       Kind = "exhausted"       // too much at once: try again after Error.RetryAfter
	Unavailable     Kind = "unavailable"     // it cannot be done now: try again after Error.RetryAfter
	Deadline        Kind = "deadline"        // the device did not answer in time
	Internal        Kind = "internal"        // a fault of the hub
)

// Error is k's name.
func (k Kind) Error() string { return string(k) }

// Code is the stable name of one failure, such as "command-expired". It is an error, for errors.Is.
type Code string

// Error is c's text.
func (c Code) Error() string { return string(c) }

// Codes that this package itself gives; all others come from the hub.
const (
	// ErrUnreachable says that the hub gave no answer, or broke off in the middle of one.
	ErrUnreachable Code = "hub-unreachable"
	// ErrRefused says that something gave an answer that no hub gives: a proxy, or another program.
	ErrRefused Code = "hub-refused"
	// ErrLogin says that the provider refused a login, or the refresh of one.
	ErrLogin Code = "grant-refused"
)

// deviceError is the hub's code for a device that was of another mind.
const deviceError Code = "device-error"

// Error is why a call failed.
type Error struct {
	Kind    Kind
	Code    Code
	Message string // a sentence for people
	// Status is that of the HTTP answer, 0 if there was none or the failure came later.
	Status int
	// RetryAfter is when it may be tried again; 0 when the hub did not say.
	RetryAfter time.Duration
	// Outcome is what a device answered that was of another mind (Code "device-error"); else nil.
	Outcome *Change
	// Err is the cause, if it was not the hub's answer.
	Err error
}

// Error is the message with the code.
func (e *Error) Error() string { return e.Message + " [" + string(e.Code) + "]" }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is e's kind or code.
func (e *Error) Is(target error) bool {
	switch t := target.(type) {
	case Kind:
		return t == e.Kind
	case Code:
		return t == e.Code
	}
	return false
}

// status is a google.rpc.Status in JSON: the body of an error answer, and the error in a stream.
type status struct {
	Code    int               `json:"code"`
	Message string            `json:"message"`
	Details []json.RawMessage `json:"details"`
}

// kinds are those of google.rpc.Code, and of 4097, which is ours: the device does not allow the method.
var kinds = map[int]Kind{
	1: Precondition, 3: Invalid, 4: Deadline, 5: NotFound, 6: Conflict, 7: Denied, 8: Exhausted, 9: Precondition, 10: Conflict,
	11: Invalid, 12: Unsupported, 13: Internal, 14: Unavailable, 15: Internal, 16: Unauthenticated, 4097: Unsupported,
}

// kindOf is the kind of an answer without a google.rpc.Code, or whose status says more than that.
func kindOf(httpStatus int) (kind Kind, exact bool) {
	switch httpStatus {
	case http.StatusConflict:
		return Conflict, true
	case http.StatusPreconditionFailed:
		return Precondition, true
	case http.StatusRequestEntityTooLarge:
		return TooLarge, true
	case http.StatusUnauthorized:
		return Unauthenticated, false
	case http.StatusForbidden, http.StatusMisdirectedRequest:
		return Denied, false
	case http.StatusNotFound, http.StatusGone:
		return NotFound, false
	case http.StatusMethodNotAllowed, http.StatusNotAcceptable, http.StatusUnsupportedMediaType, http.StatusNotImplemented:
		return Unsupported, false
	case http.StatusTooManyRequests:
		return Exhausted, false
	case http.StatusBadGateway, http.StatusServiceUnavailable:
		return Unavailable, false
	case http.StatusGatewayTimeout, http.StatusRequestTimeout:
		return Deadline, false
	}
	if httpStatus >= http.StatusInternalServerError {
		return Internal, false
	}
	return Invalid, false
}

// failure reads an error answer. What is no google.rpc.Status did not come from the hub.
func failure(resp *http.Response, body []byte) *Error {
	e := &Error{Code: ErrRefused, Message: "the answer was " + resp.Status}
	var s status
	if json.Unmarshal(body, &s) == nil && s.Message != "" {
		e = s.err()
	}
	if kind, exact := kindOf(resp.StatusCode); exact || e.Kind == "" {
		e.Kind = kind
	}
	e.Status = resp.StatusCode
	// RFC 9110, Section 10.2.3: seconds, or a date, which the hub never sends.
	if n, err := strconv.Atoi(resp.Header.Get("Retry-After")); err == nil && n > 0 && n < 1<<20 {
		e.RetryAfter = time.Duration(n) * time.Second
	}
	return e
}

func (s status) err() *Error {
	e := &Error{Kind: kinds[s.Code], Code: ErrRefused, Message: s.Message}
	if e.Kind == "" {
		e.Kind = Internal
	}
	for _, raw := range s.Details {
		var d struct {
			Type       string `json:"@type"`
			Reason     Code   `json:"reason"`
			RetryDelay string `json:"retryDelay"`
		}
		if json.Unmarshal(raw, &d) != nil {
			continue
		}
		switch {
		case d.Reason != "":
			e.Code = d.Reason
		case d.RetryDelay != "":
			if after, err := time.ParseDuration(d.RetryDelay); err == nil {
				e.RetryAfter = after
			}
		case strings.Contains(d.Type, "/resourceaggregate.pb.Resource"):
			if c, err := decode[Change](raw); err == nil {
				e.Outcome = &c
			}
		}
	}
	return e
}

// strange is an answer that was not understood.
func strange(err error) error {
	return &Error{Kind: Invalid, Code: ErrRefused, Message: "the hub's answer was not understood: " + err.Error(), Err: err}
}

// unreachable is a hub that gave no answer.
func unreachable(server string, err error) error {
	return &Error{Kind: Unavailable, Code: ErrUnreachable, Message: "the hub at " + server + " cannot be reached: " + err.Error(), Err: err}
}
