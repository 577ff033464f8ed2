package coapgateway

import (
	"encoding/binary"
	"errors"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// failure makes the response for err, with the kind's code or its own.
func failure(err error) coap.Response {
	code := coap.CodeOf(hub.KindOf(err))
	if own := (*coded)(nil); errors.As(err, &own) {
		code = own.code
	}
	return coap.Failure(code, err)
}

// problem is an error in the form of RFC 9290, Section 2.
type problem struct {
	Title  string `cbor:"-1,keyasint"` // the stable code
	Detail string `cbor:"-2,keyasint"` // the sentence
	Code   uint8  `cbor:"-4,keyasint"` // the response code as a number
}

// failure makes the response for err to a request on the route. It is a diagnostic payload, which every client can show, but
// problem details for one that asks for them, or on our own paths for CBOR: on OCF's, devices name CBOR whatever they can read.
// There 4.12 would be taken for success; elsewhere it is what RFC 7252, Section 5.10.8 demands.
func (r route) failure(req *coap.Message, err error) coap.Response {
	resp := failure(err)
	if r.own && hub.IsKind(err, hub.Precondition) {
		resp.Code = codes.PreconditionFailed
	}
	format, ok := coap.Accept(req)
	if !ok || format != hub.FormatProblem && (format != hub.FormatCBOR || !r.own) {
		return resp
	}
	code, text := hub.Public(err)
	body, encodeErr := encoding.Marshal(problem{code, text, uint8(resp.Code)})
	if encodeErr != nil {
		return resp
	}
	resp.Options = coap.AddUint(resp.Options, message.ContentFormat, uint32(hub.FormatProblem))
	resp.Payload = body
	return resp
}

// uintOption is the shortest form of an unsigned option value (RFC 7252, Section 3.2).
func uintOption(v uint32) []byte {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], v)
	i := 0
	for i < 4 && b[i] == 0 {
		i++
	}
	return append([]byte(nil), b[i:]...)
}

// ours reports trouble of the hub, as opposed to a fault of the request or its credential.
func ours(err error) bool {
	own := (*coded)(nil)
	return coap.CodeOf(hub.KindOf(err)) == codes.ServiceUnavailable && !errors.As(err, &own)
}

// transient reports errors after which the same write may be tried again with the same message number: it may or may not
// have been stored.
func transient(err error) bool {
	switch hub.KindOf(err) {
	case hub.Unavailable, hub.Exhausted, hub.Deadline, hub.Conflict:
		return true
	default:
		return false
	}
}

// accountError is err as the three account paths show it. There a refusal of the device (owned by somebody else, pinned to
// another credential) is 4.01: the device holds a credential that is no good for this device, and has to sign up anew. One that
// is not let in is to keep its credentials: it may be let in again, and a new sign-up would not help it.
func accountError(err error) error {
	if hub.KindOf(err) != hub.Denied {
		return err
	}
	code, text := hub.Public(err)
	switch code {
	case "device-disabled", "device-quarantined", "device-removed", "device-denied", "key-denied", "certificate-denied", "ca-denied":
		return err
	}
	return &hub.Error{Kind: hub.Unauthenticated, Code: code, Text: text, Err: err}
}

func invalid(code, text string) error { return hub.NewError(hub.Invalid, code, text) }

func unauthenticated(code, text string) error { return hub.NewError(hub.Unauthenticated, code, text) }
