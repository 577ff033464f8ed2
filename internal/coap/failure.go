package coap

import (
	"errors"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// codeOf is the one table from hub's kinds to CoAP codes (RFC 7252, Section 12.1.2). It is made for OCF paths:
// iotivity-lite takes 4.08, 4.12 and 4.29 for success and drops its credentials on 4.01, so trouble of ours is always 5.03
// with Max-Age as the time to retry (RFC 7252, Section 5.9.3.4).
var codeOf = map[hub.Kind]codes.Code{
	hub.Internal:         codes.ServiceUnavailable,
	hub.Invalid:          codes.BadRequest,
	hub.Unauthenticated:  codes.Unauthorized,
	hub.Denied:           codes.Forbidden,
	hub.NotFound:         codes.NotFound,
	hub.MethodNotAllowed: codes.MethodNotAllowed,
	hub.NotAcceptable:    codes.NotAcceptable,
	hub.Unsupported:      codes.UnsupportedMediaType,
	hub.BadOption:        codes.BadOption,
	hub.Precondition:     codes.BadRequest,
	hub.TooLarge:         codes.RequestEntityTooLarge,
	hub.Conflict:         codes.ServiceUnavailable,
	hub.Exhausted:        codes.ServiceUnavailable,
	hub.Unavailable:      codes.ServiceUnavailable,
	hub.Deadline:         codes.ServiceUnavailable,
}

// CodeOf is the code with which errors of a kind are answered.
func CodeOf(k hub.Kind) codes.Code { return codeOf[k] }

// retryAfter is the Max-Age of a 5.03 whose error does not say how long to wait.
const retryAfter = 5 * time.Second

// Failure answers an error with a code and a diagnostic payload of its stable code and sentence, which has no Content-Format (RFC
// 7252, Section 5.5.2). With 5.03 and 4.29 (RFC 8516, Section 3) Max-Age is when to try again.
func Failure(code codes.Code, err error) Response {
	name, text := hub.Public(err)
	r := Response{Code: code, Payload: []byte(name + ": " + text)}
	if code == codes.ServiceUnavailable || code == codes.TooManyRequests {
		wait := retryAfter
		var e *hub.Error
		if errors.As(err, &e) && e.RetryAfter > 0 {
			wait = e.RetryAfter
		}
		r.Options = AddUint(nil, message.MaxAge, uint32((wait+time.Second-1)/time.Second))
	}
	return r
}

// Dotted writes a code as RFC 7252, Section 5.1 does: "4.04".
func Dotted(c codes.Code) string {
	return string([]byte{'0' + byte(c>>5&7), '.', '0' + byte(c&31)/10, '0' + byte(c&31)%10})
}
