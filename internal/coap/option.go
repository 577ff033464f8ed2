package coap

import (
	"slices"
	"strings"

	"github.com/plgd-dev/go-coap/v3/message"

	"github.com/coaphub/coaphub/hub"
)

// Option numbers (RFC 7252, 7641, 7959, 7967, 8768, 9175; 2049 and 2053 are OCF's).
const (
	IfMatch           message.OptionID = 1
	URIHost           message.OptionID = 3
	ETagOption        message.OptionID = 4
	IfNoneMatch       message.OptionID = 5
	ObserveOption     message.OptionID = 6
	URIPort           message.OptionID = 7
	LocationPath      message.OptionID = 8
	URIPath           message.OptionID = 11
	ContentFormatOpt  message.OptionID = 12
	MaxAge            message.OptionID = 14
	URIQuery          message.OptionID = 15
	HopLimit          message.OptionID = 16
	AcceptOption      message.OptionID = 17
	LocationQuery     message.OptionID = 20
	Block2            message.OptionID = 23
	Block1            message.OptionID = 27
	Size2             message.OptionID = 28
	ProxyURI          message.OptionID = 35
	ProxyScheme       message.OptionID = 39
	Size1             message.OptionID = 60
	EchoOption        message.OptionID = 252
	NoResponse        message.OptionID = 258
	RequestTag        message.OptionID = 292
	OCFAcceptVersion  message.OptionID = 2049
	OCFContentVersion message.OptionID = 2053
)

// Option returns the value of the first option with that number. An option may be there with an empty value.
func (m *Message) Option(id message.OptionID) ([]byte, bool) {
	for i := range m.Options {
		if m.Options[i].ID == id {
			return m.Options[i].Value, true
		}
	}
	return nil, false
}

// Uint returns the first option with that number as an unsigned integer (RFC 7252, Section 3.2); false if there is none or
// it is longer than 4 bytes.
func (m *Message) Uint(id message.OptionID) (uint32, bool) {
	v, ok := m.Option(id)
	if !ok || len(v) > 4 {
		return 0, false
	}
	var n uint32
	for _, b := range v {
		n = n<<8 | uint32(b)
	}
	return n, true
}

// Path returns the segments of Uri-Path joined by slashes, with a leading slash; "/" when there is none. A slash inside a
// segment cannot be told from one between two: callers that care compare segments.
func Path(m *Message) string {
	var sb strings.Builder
	for i := range m.Options {
		if m.Options[i].ID == URIPath {
			sb.WriteByte('/')
			sb.Write(m.Options[i].Value)
		}
	}
	if sb.Len() == 0 {
		return "/"
	}
	return sb.String()
}

// Queries returns the values of Uri-Query in order, each usually "name=value".
func Queries(m *Message) []string {
	var out []string
	for i := range m.Options {
		if m.Options[i].ID == URIQuery {
			out = append(out, string(m.Options[i].Value))
		}
	}
	return out
}

// ContentFormat returns the Content-Format, if there is one.
func ContentFormat(m *Message) (int32, bool) {
	v, ok := m.Uint(ContentFormatOpt)
	return int32(v & 0xffff), ok //nolint:gosec // the decoder admits at most two bytes
}

// Accept returns the content format that is asked for, if one is.
func Accept(m *Message) (int32, bool) {
	v, ok := m.Uint(AcceptOption)
	return int32(v & 0xffff), ok //nolint:gosec // the decoder admits at most two bytes
}

// Acceptable returns the format of an answer: the one that is asked for, if it is one of those that there are, the first of them if
// none is asked for. Else the error is NotAcceptable (RFC 7252, Section 5.10.4).
func Acceptable(m *Message, formats ...int32) (int32, error) {
	wanted, ok := Accept(m)
	switch {
	case !ok:
		return formats[0], nil
	case slices.Contains(formats, wanted):
		return wanted, nil
	}
	return 0, &hub.Error{Kind: hub.NotAcceptable}
}

// ETag returns the first ETag, nil when there is none.
func ETag(m *Message) []byte {
	v, _ := m.Option(ETagOption)
	return v
}

// ETags returns all ETags of a request.
func ETags(m *Message) [][]byte {
	var out [][]byte
	for i := range m.Options {
		if m.Options[i].ID == ETagOption {
			out = append(out, m.Options[i].Value)
		}
	}
	return out
}

// AddOption returns opts with one more option, after those of the same and lower numbers. opts itself is not changed if it
// has no spare capacity; do not use it any more.
func AddOption(opts message.Options, id message.OptionID, value []byte) message.Options {
	i := len(opts)
	for i > 0 && opts[i-1].ID > id {
		i--
	}
	return slices.Insert(opts, i, message.Option{ID: id, Value: value})
}

// AddUint returns opts with one more option that holds n in as few bytes as possible (RFC 7252, Section 3.2).
func AddUint(opts message.Options, id message.OptionID, n uint32) message.Options {
	return AddOption(opts, id, appendUint(nil, n))
}

// AddPath returns opts with one Uri-Path for each segment of a path like "/oic/rd"; "/" adds none.
func AddPath(opts message.Options, path string) message.Options {
	path = strings.TrimPrefix(path, "/")
	if path == "" {
		return opts
	}
	for seg := range strings.SplitSeq(path, "/") {
		opts = AddOption(opts, URIPath, []byte(seg))
	}
	return opts
}

func appendUint(b []byte, n uint32) []byte {
	switch {
	case n == 0:
		return b
	case n < 1<<8:
		return append(b, byte(n))
	case n < 1<<16:
		return append(b, byte(n>>8), byte(n))
	case n < 1<<24:
		return append(b, byte(n>>16), byte(n>>8), byte(n))
	}
	return append(b, byte(n>>24), byte(n>>16), byte(n>>8), byte(n))
}
