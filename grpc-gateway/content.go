package grpcgateway

import (
	"bytes"
	"encoding/json"
	"strconv"
	"strings"
	"unicode/utf8"

	"github.com/coaphub/coaphub/hub"
)

// mediaType returns the content's media type in lower case and without parameters.
func mediaType(c hub.Content) string {
	t := c.Type
	if t == "" {
		t = hub.MediaType(c.Format)
	}
	t, _, _ = strings.Cut(t, ";")
	return strings.ToLower(strings.TrimSpace(t))
}

// appendContent appends a content in the simple JSON form: decoded where its type says how (CBOR, OCF's CBOR, JSON, plain
// text), otherwise, and when it fails to decode, as the bytes it came in. Empty members are left out of the latter.
func appendContent(b []byte, c hub.Content) []byte {
	if out, ok := appendDecoded(b, c); ok {
		return out
	}
	b = append(b, '{')
	if c.Type != "" {
		b = append(b, `"contentType":`...)
		b = append(appendString(b, strings.ToValidUTF8(c.Type, "\ufffd")), ',')
	}
	b = append(b, `"coapContentFormat":`...)
	b = strconv.AppendInt(b, int64(c.Format), 10)
	if len(c.Data) > 0 {
		b = append(b, `,"data":`...)
		b = appendBase64(b, c.Data)
	}
	return append(b, '}')
}

// appendDecoded appends the decoded content, or reports false and returns b as it was.
func appendDecoded(b []byte, c hub.Content) ([]byte, bool) {
	if len(c.Data) == 0 {
		return b, false
	}
	switch mediaType(c) {
	case "application/cbor", "application/vnd.ocf+cbor":
		out, err := appendCBOR(b, c.Data)
		return out, err == nil
	case "application/json":
		if !utf8.Valid(c.Data) { // RFC 8259, Section 8.1
			return b, false
		}
		var line bytes.Buffer // a device's JSON may have line breaks, which separate the elements of a list
		if json.Compact(&line, c.Data) != nil {
			return b, false
		}
		out := bytes.NewBuffer(b)
		json.HTMLEscape(out, line.Bytes()) // digits stay as they are
		return out.Bytes(), true
	case "text/plain":
		if !utf8.Valid(c.Data) {
			return b, false
		}
		return appendString(b, c.Data), true
	}
	return b, false
}
