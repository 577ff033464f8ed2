package coapgateway

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// decoding is how bodies of devices are read. Everything a device sends is bounded by the message's size already; nesting
// and lengths are bounded here so that a short body cannot ask for much memory. Invalid UTF-8 is refused where we need text.
var decoding = func() cbor.DecMode {
	m, err := cbor.DecOptions{
		MaxNestedLevels:  64,
		MaxArrayElements: 1 << 17,
		MaxMapPairs:      1 << 17,
		UTF8:             cbor.UTF8RejectInvalid,
	}.DecMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

// encoding is how our own bodies are written: definite lengths, members in the order of the struct's fields.
var encoding = func() cbor.EncMode {
	m, err := cbor.EncOptions{}.EncMode()
	if err != nil {
		panic(err) // the options are constants
	}
	return m
}()

// decodeBody reads a request's body as a CBOR map, whatever its Content-Format says: devices leave the option out or send a
// wrong one (compat: the option is ignored). Unknown members are ignored, wrong types are Invalid, and so is no body at all.
func decodeBody(body []byte, into any) error {
	if len(body) == 0 {
		return invalid("body-missing", "the request needs a body")
	}
	if body[0]>>5 != 5 { // RFC 8949, Section 3.1: major type 5 is a map
		return invalid("body-invalid", "the body is not a CBOR map")
	}
	rest, err := decoding.UnmarshalFirst(body, into)
	switch {
	case err != nil:
		var wrong *cbor.UnmarshalTypeError
		if errors.As(err, &wrong) {
			return invalid("body-invalid", "a member of the body has a wrong type").(*hub.Error).With("decode body", err)
		}
		return invalid("body-invalid", "the body is not valid CBOR").(*hub.Error).With("decode body", err)
	case len(rest) > 0:
		return invalid("body-invalid", "there is something behind the CBOR map")
	}
	return nil
}

// acceptable returns the format of a body for the request, OCF's CBOR if it does not say.
func acceptable(req *coap.Message) (int32, error) {
	return coap.Acceptable(req, hub.FormatOCFCBOR, hub.FormatCBOR, hub.FormatJSON)
}

// encodeBody encodes one of our own bodies; JSON for format 50, CBOR for the other two.
func encodeBody(format int32, body any) ([]byte, error) {
	if format == hub.FormatJSON {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(body); err != nil {
			return nil, err
		}
		return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
	}
	return encoding.Marshal(body)
}

// success makes a response with a body and its Content-Format.
func success(code codes.Code, format int32, body any) (coap.Response, error) {
	b, err := encodeBody(format, body)
	if err != nil {
		return coap.Response{}, err
	}
	return withFormat(code, format, b), nil
}

func withFormat(code codes.Code, format int32, body []byte) coap.Response {
	return coap.Response{
		Code:    code,
		Options: message.Options{{ID: message.ContentFormat, Value: uintOption(uint32(format))}},
		Payload: body,
	}
}

// contentOf returns the content of a message that a device sent. The bytes are kept as they are.
func contentOf(m *coap.Message) hub.Content {
	format := hub.FormatNone
	if v, err := m.Options.GetUint32(message.ContentFormat); err == nil {
		format = int32(v)
	}
	return hub.Content{Type: hub.MediaType(format), Format: format, Data: m.Payload}
}

// typesOf returns the resource types in a representation, nil if it does not decode or has none.
func typesOf(format int32, data []byte) []string {
	var body struct {
		Types []string `cbor:"rt" json:"rt"`
	}
	switch format {
	case hub.FormatCBOR, hub.FormatOCFCBOR:
		if len(data) == 0 || data[0]>>5 != 5 || !bytes.Contains(data, []byte("\x62rt")) { // cheaper than decoding each reading
			return nil
		}
		if decoding.Unmarshal(data, &body) != nil {
			return nil
		}
	case hub.FormatJSON:
		if !bytes.Contains(data, []byte(`"rt"`)) {
			return nil
		}
		d := json.NewDecoder(bytes.NewReader(data))
		if d.Decode(&body) != nil {
			return nil
		}
		if _, err := d.Token(); !errors.Is(err, io.EOF) {
			return nil
		}
	}
	return body.Types
}
