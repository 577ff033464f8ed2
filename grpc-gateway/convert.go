package grpcgateway

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math"
	"math/big"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/fxamacker/cbor/v2"

	"github.com/coaphub/coaphub/hub"
)

const (
	mediaJSON    = "application/json"
	mediaOCFCBOR = "application/vnd.ocf+cbor"
)

// convert makes of what an application sends what the device takes: the type in which the resource reported last (twin, nil if
// it never did), if both are JSON or CBOR. Contents of other types must be of the resource's own.
func convert(c hub.Content, twin *hub.Resource) (hub.Content, error) {
	from := mediaType(c)
	_, known := hub.FormatOf(from)
	switch {
	case len(c.Data) == 0:
		return c, invalid("content-missing", "the command needs a content")
	case len(c.Data) > hub.MaxContent:
		return c, hub.NewError(hub.TooLarge, "content-too-large", "the content is larger than 256 KiB")
	case !known:
		return c, invalid("content-type-unknown", "the content type is not one that CoAP has a format for")
	}
	to := from
	if twin != nil {
		to = mediaType(twin.Content)
	}
	switch {
	case !decodes(from) && to != from:
		return c, invalid("content-type-unsupported", "the content cannot be converted to the type of the resource")
	case !decodes(to) && from == mediaJSON: // the last report was empty, an error, or a text: OCF devices take CBOR
		to = mediaOCFCBOR
	case !decodes(to):
		to = from
	}
	format, _ := hub.FormatOf(to)
	out := hub.Content{Type: hub.MediaType(format), Format: format, Data: c.Data}
	var err error
	switch {
	case from == mediaJSON:
		if out.Data, err = cborOfJSON(c.Data); err == nil && to == mediaJSON {
			out.Data = c.Data // as it came
		}
	case !decodes(from):
	case to == mediaJSON:
		out.Data, err = appendCBOR(nil, c.Data)
	default:
		err = cbor.Wellformed(c.Data)
	}
	switch {
	case err != nil:
		return c, hub.NewError(hub.Invalid, "content-invalid", "the content is not valid "+from).With("convert", err)
	case len(out.Data) > hub.MaxContent:
		return c, hub.NewError(hub.TooLarge, "content-too-large", "the content is larger than 256 KiB")
	}
	return out, nil
}

func decodes(media string) bool {
	return media == mediaJSON || isCBOR(media)
}

var errJSON = errors.New("not JSON that CBOR can show")

// cborOfJSON makes CBOR of one JSON value (RFC 8949, Section 6.2): integers stay integers, with all digits; every other number
// is a 64-bit float. Members keep their order; names that occur twice are refused, since CBOR has no such maps.
func cborOfJSON(data []byte) ([]byte, error) {
	if !utf8.Valid(data) { // RFC 8259, Section 8.1; the decoder would replace it
		return nil, errJSON
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	out, err := appendJSONItem(nil, d, 0)
	if err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errJSON
	}
	return out, nil
}

func appendJSONItem(b []byte, d *json.Decoder, depth int) ([]byte, error) {
	t, err := d.Token()
	if err != nil {
		return nil, err
	}
	switch v := t.(type) {
	case json.Delim:
		if depth >= maxDepth || v != '[' && v != '{' {
			return nil, errJSON
		}
		return appendJSONMembers(b, d, v == '{', depth)
	case string:
		return append(appendHead(b, 3, uint64(len(v))), v...), nil
	case json.Number:
		return appendNumber(b, string(v))
	case bool:
		if v {
			return append(b, 0xf5), nil
		}
		return append(b, 0xf4), nil
	}
	return append(b, 0xf6), nil // null
}

// appendJSONMembers appends an array or map of definite length, which is known only at its end.
func appendJSONMembers(b []byte, d *json.Decoder, object bool, depth int) ([]byte, error) {
	var items []byte
	var err error
	names := map[string]bool{}
	n := uint64(0)
	for ; d.More(); n++ {
		if object {
			t, err := d.Token()
			name, ok := t.(string)
			if err != nil || !ok || names[name] {
				return nil, errJSON
			}
			names[name] = true
			items = append(appendHead(items, 3, uint64(len(name))), name...)
		}
		if items, err = appendJSONItem(items, d, depth+1); err != nil {
			return nil, err
		}
	}
	if _, err := d.Token(); err != nil { // the closing bracket
		return nil, err
	}
	major := byte(4)
	if object {
		major = 5
	}
	return append(appendHead(b, major, n), items...), nil
}

func appendNumber(b []byte, s string) ([]byte, error) {
	if !strings.ContainsAny(s, ".eE") && s != "-0" { // which is no integer
		if u, err := strconv.ParseUint(s, 10, 64); err == nil {
			return appendHead(b, 0, u), nil
		}
		n, ok := new(big.Int).SetString(s, 10)
		if !ok || n.BitLen() > 8*maxBignum {
			return nil, errJSON
		}
		major, tag := byte(0), byte(0xc2)
		if n.Sign() < 0 {
			n.Not(n) // -1 - n
			major, tag = 1, 0xc3
		}
		if n.IsUint64() {
			return appendHead(b, major, n.Uint64()), nil
		}
		raw := n.Bytes()
		return append(appendHead(append(b, tag), 2, uint64(len(raw))), raw...), nil
	}
	f, err := strconv.ParseFloat(s, 64)
	if err != nil {
		return nil, errJSON
	}
	return binary.BigEndian.AppendUint64(append(b, 0xfb), math.Float64bits(f)), nil
}

// appendHead appends an initial byte with its argument in the shortest form (RFC 8949, Section 4.2.1).
func appendHead(b []byte, major byte, arg uint64) []byte {
	major <<= 5
	switch {
	case arg < 24:
		return append(b, major|byte(arg))
	case arg <= math.MaxUint8:
		return append(b, major|24, byte(arg))
	case arg <= math.MaxUint16:
		return binary.BigEndian.AppendUint16(append(b, major|25), uint16(arg))
	case arg <= math.MaxUint32:
		return binary.BigEndian.AppendUint32(append(b, major|26), uint32(arg))
	}
	return binary.BigEndian.AppendUint64(append(b, major|27), arg)
}
