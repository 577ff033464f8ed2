package grpcgateway

import (
	"context"
	"errors"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/coaphub/coaphub/hub"
)

// domain is the ErrorInfo.domain of all our errors.
const domain = "coaphub"

// defaultRetry is told to callers when an error brings no time of its own.
const defaultRetry = 5 * time.Second

// codeOf is the door's table for gRPC.
var codeOf = map[hub.Kind]codes.Code{
	hub.Internal:         codes.Internal,
	hub.Invalid:          codes.InvalidArgument,
	hub.Unauthenticated:  codes.Unauthenticated,
	hub.Denied:           codes.PermissionDenied,
	hub.NotFound:         codes.NotFound,
	hub.MethodNotAllowed: codes.Unimplemented,
	hub.NotAcceptable:    codes.InvalidArgument,
	hub.Unsupported:      codes.Unimplemented,
	hub.BadOption:        codes.InvalidArgument,
	hub.Precondition:     codes.FailedPrecondition,
	hub.TooLarge:         codes.InvalidArgument, // not ResourceExhausted: that would invite to try again
	hub.Conflict:         codes.Aborted,
	hub.Exhausted:        codes.ResourceExhausted,
	hub.Unavailable:      codes.Unavailable,
	hub.Deadline:         codes.DeadlineExceeded,
}

// statusOf is the door's table for HTTP.
var statusOf = map[hub.Kind]int{
	hub.Internal:         http.StatusInternalServerError,
	hub.Invalid:          http.StatusBadRequest,
	hub.Unauthenticated:  http.StatusUnauthorized,
	hub.Denied:           http.StatusForbidden,
	hub.NotFound:         http.StatusNotFound,
	hub.MethodNotAllowed: http.StatusNotImplemented, // 405 would be RFC 9110's, but clients know 501 with code 12
	hub.NotAcceptable:    http.StatusNotAcceptable,
	hub.Unsupported:      http.StatusNotImplemented,
	hub.BadOption:        http.StatusBadRequest,
	hub.Precondition:     http.StatusBadRequest, // as all of google.rpc's FAILED_PRECONDITION
	hub.TooLarge:         http.StatusRequestEntityTooLarge,
	hub.Conflict:         http.StatusConflict,
	hub.Exhausted:        http.StatusTooManyRequests,
	hub.Unavailable:      http.StatusServiceUnavailable,
	hub.Deadline:         http.StatusGatewayTimeout,
}

// The errors that the door itself finds.
var (
	errTokenMissing = hub.NewError(hub.Unauthenticated, "token-missing", "an access token is needed: Authorization: Bearer <token>")
	errDeviceToken  = hub.NewError(hub.Denied, "device-token", "a device's token is good for CoAP only")
	errScopeMissing = hub.NewError(hub.Denied, "scope-missing", "the token lacks the scope for this")
	errNoRoute      = hub.NewError(hub.NotFound, "no-such-path", "Not Found")
	errNoMethod     = hub.NewError(hub.MethodNotAllowed, "method-not-allowed", "Method Not Allowed")
	errNoCall       = hub.NewError(hub.MethodNotAllowed, "no-such-call", "this hub does not know the call")
	errNotFound     = hub.NewError(hub.NotFound, "not-found", "not found")
	errNotYours     = hub.NewError(hub.Denied, "device-not-yours", "there is no such device, or it is not yours")
	errDeleteAll    = hub.NewError(hub.Invalid, "filter-empty", "name the devices to delete, or ask for all of them with all=true")
	errRevokeAll    = hub.NewError(hub.Invalid, "filter-empty", "name the certificates to revoke, or ask for all of them with all=true")
	errDeleteBoth   = hub.NewError(hub.Invalid, "filter-and-all", "all=true and a filter exclude each other")
	errCursor       = hub.NewError(hub.Invalid, "cursor-invalid", "the cursor is not one of this call and this caller")
	errHost         = hub.NewError(hub.Denied, "host-not-allowed", "this host name is not one of the hub's")
	errCrossOrigin  = hub.NewError(hub.Denied, "cross-origin", "requests from pages of another origin are not allowed")
	errBody         = hub.NewError(hub.TooLarge, "body-too-large", "the body is larger than the limit")
)

// noResource names the resource that a read did not find: the same sentence for a device that is unknown, or another owner's.
// The href is cut where it is too long for a sentence.
func noResource(href hub.Href) error {
	return hub.NewError(hub.NotFound, "not-found", fmt.Sprintf("not found: %.128q", string(href)))
}

func invalid(code, text string) error { return hub.NewError(hub.Invalid, code, text) }

// retryAfter is when a caller may try again; 0 for errors that do not go away.
func retryAfter(err error) time.Duration {
	switch hub.KindOf(err) {
	case hub.Unavailable, hub.Exhausted:
	default:
		return 0
	}
	var e *hub.Error
	if errors.As(err, &e) && e.RetryAfter > 0 {
		return e.RetryAfter
	}
	return defaultRetry
}

// codeOfError is the gRPC code of an error.
func codeOfError(err error) codes.Code {
	var device *deviceError
	if errors.As(err, &device) {
		if code, _, ok := device.codes(); ok {
			return code
		}
	}
	return codeOf[hub.KindOf(err)]
}

// toStatus makes of an error what outsiders may see of it.
func toStatus(err error) *status.Status {
	code, text := hub.Public(err)
	s := status.New(codeOfError(err), text)
	info := &errdetails.ErrorInfo{Reason: code, Domain: domain}
	var device *deviceError
	if errors.As(err, &device) { // first: clients of other hubs look there
		if d, err := s.WithDetails(protoadapt.MessageV1Of(device.event())); err == nil {
			s = d
		}
	}
	if after := retryAfter(err); after > 0 {
		if d, err := s.WithDetails(info, &errdetails.RetryInfo{RetryDelay: durationpb.New(after)}); err == nil {
			return d
		}
	}
	if d, err := s.WithDetails(info); err == nil {
		return d
	}
	return s
}

// appendError appends the google.rpc.Status of an error as JSON. Both forms are the same but for the event of a command.
func appendError(b []byte, err error, proto bool) []byte {
	code, text := hub.Public(err)
	b = append(b, `{"code":`...)
	b = strconv.AppendInt(b, int64(codeOfError(err)), 10)
	b = append(b, `,"message":`...)
	b = appendString(b, text)
	b = append(b, `,"details":[`...)
	var device *deviceError
	if errors.As(err, &device) {
		b = append(device.appendDetail(b, proto), ',')
	}
	b = append(b, `{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":`...)
	b = appendString(b, code)
	b = append(b, `,"domain":"`+domain+`"}`...)
	if after := retryAfter(err); after > 0 {
		if detail, err := anypb.New(&errdetails.RetryInfo{RetryDelay: durationpb.New(after)}); err == nil {
			if j, err := protojson.Marshal(detail); err == nil {
				b = append(append(b, ','), j...)
			}
		}
	}
	return append(b, "]}"...)
}

// writeError answers a request with an error whose answer has not begun yet.
func writeError(w http.ResponseWriter, err error) { writeErrorAs(w, httpStatus(err), err) }

// writeErrorAs is for errors whose status was decided elsewhere.
func writeErrorAs(w http.ResponseWriter, status int, err error) {
	proto := false
	if o, ok := w.(*writer); ok {
		proto = o.proto
	}
	h := w.Header()
	h.Set("Content-Type", "application/json")
	h.Set("X-Content-Type-Options", "nosniff")
	h.Set("Cache-Control", "no-store")
	h.Del("ETag")
	code, _ := hub.Public(err)
	var device *deviceError
	switch kind := hub.KindOf(err); {
	case kind == hub.Unauthenticated && (code == errTokenMissing.Code || errors.As(err, &device)):
		// RFC 6750, Section 3.1: no error code if nothing was presented; nor if it is the device that wants something else.
		h.Set("WWW-Authenticate", `Bearer realm="coaphub"`)
	case kind == hub.Unauthenticated:
		h.Set("WWW-Authenticate", `Bearer realm="coaphub", error="invalid_token"`)
	case code == errScopeMissing.Code:
		h.Set("WWW-Authenticate", `Bearer realm="coaphub", error="insufficient_scope"`)
	}
	if after := retryAfter(err); after > 0 {
		h.Set("Retry-After", strconv.Itoa(int(math.Ceil(after.Seconds()))))
	}
	w.WriteHeader(status)
	_, _ = w.Write(append(appendError(nil, err, proto), '\n')) // a client that has gone needs no answer
}

func httpStatus(err error) int {
	if errors.Is(err, errHost) {
		return http.StatusMisdirectedRequest // RFC 9110, Section 15.5.20
	}
	var device *deviceError
	if errors.As(err, &device) {
		if _, status, ok := device.codes(); ok {
			return status
		}
	}
	if code, _ := hub.Public(err); code == "etag-mismatch" {
		return http.StatusPreconditionFailed // RFC 9110, Section 13.1.1
	}
	return statusOf[hub.KindOf(err)]
}

// errGone ends a stream whose peer went away: its end is nobody's fault and nothing to log.
var errGone = errors.New("the peer is gone")

// gone reports whether the caller went away, which is nobody's fault and no error to log.
func gone(ctx context.Context) bool { return errors.Is(context.Cause(ctx), context.Canceled) }
