package coap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
)

// The framing of RFC 8323, Section 3.2: a nibble of length and one of token length, up to four bytes of extended length, the
// code, the token, then options and payload, which is what the length counts.

const (
	maxHeader     = 6 // without the token
	maxToken      = 8 // RFC 8323, Section 3.2
	maxBodyLength = 1<<31 - 1 - maxHeader - maxToken
	maxOptions    = 256 // an option costs its sender one byte and us 32: more than any real message has
)

// header is the fixed part of a frame.
type header struct {
	code codes.Code
	size int // of the header itself, without the token
	tkl  int
	body int // options, marker and payload
}

// whole is the size of the frame that h begins.
func (h header) whole() int { return h.size + h.tkl + h.body }

var errTokenLength = errors.New("token length over 8")

// parseHeader reads the header at the start of b. ok is false while b is too short to tell. It reads nothing behind the
// code.
func parseHeader(b []byte) (h header, ok bool, err error) {
	if len(b) == 0 {
		return h, false, nil
	}
	h.tkl = int(b[0] & 0x0f)
	if h.tkl > maxToken {
		return h, false, errTokenLength // RFC 8323, Section 3.2: 9 to 15 are reserved
	}
	ext := 0
	switch n := int(b[0] >> 4); n {
	case 13:
		ext = 1
	case 14:
		ext = 2
	case 15:
		ext = 4
	default:
		h.body = n
	}
	h.size = 2 + ext
	if len(b) < h.size {
		return h, false, nil
	}
	switch ext {
	case 1:
		h.body = int(b[1]) + 13
	case 2:
		h.body = int(binary.BigEndian.Uint16(b[1:])) + 269
	case 4:
		// Bounded, so that whole() is right where an int has 32 bits, and over every limit.
		h.body = int(min(uint64(binary.BigEndian.Uint32(b[1:]))+65805, maxBodyLength)) //nolint:gosec // see above
	}
	h.code = codes.Code(b[1+ext])
	return h, true, nil
}

// frameSize is the size of the frame appendFrame writes for m.
func frameSize(m *Message) int {
	body := bodySize(m)
	n := 2 + len(m.Token) + body
	switch {
	case body < 13:
	case body < 269:
		n++
	case body < 65805:
		n += 2
	default:
		n += 4
	}
	return n
}

func bodySize(m *Message) int {
	n, last := 0, message.OptionID(0)
	for i := range m.Options {
		o := &m.Options[i]
		n += 1 + extSize(int(o.ID-last)) + extSize(len(o.Value)) + len(o.Value)
		last = o.ID
	}
	if len(m.Payload) > 0 {
		n += 1 + len(m.Payload)
	}
	return n
}

func extSize(n int) int {
	switch {
	case n < 13:
		return 0
	case n < 269:
		return 1
	}
	return 2
}

// appendFrame appends the frame of m to b. The options must be sorted, the token at most 8 bytes.
func appendFrame(b []byte, m *Message) []byte {
	body := bodySize(m)
	tkl := byte(len(m.Token))
	switch {
	case body < 13:
		b = append(b, byte(body)<<4|tkl)
	case body < 269:
		b = append(b, 13<<4|tkl, byte(body-13))
	case body < 65805:
		b = append(b, 14<<4|tkl)
		b = binary.BigEndian.AppendUint16(b, uint16(body-269)) //nolint:gosec // bounded by the case
	default:
		b = append(b, 15<<4|tkl)
		b = binary.BigEndian.AppendUint32(b, uint32(body-65805)) //nolint:gosec // callers bound messages far below
	}
	b = append(b, byte(m.Code))
	b = append(b, m.Token...)
	return appendBody(b, m)
}

// appendBody appends options, marker and payload (RFC 7252, Section 3.1), the same for every transport.
func appendBody(b []byte, m *Message) []byte {
	last := message.OptionID(0)
	for i := range m.Options {
		o := &m.Options[i]
		at := len(b)
		b = append(b, 0)
		var d, l byte
		b, d = appendExt(b, int(o.ID-last))
		b, l = appendExt(b, len(o.Value))
		b[at] = d<<4 | l
		b = append(b, o.Value...)
		last = o.ID
	}
	if len(m.Payload) > 0 {
		b = append(b, 0xff)
		b = append(b, m.Payload...)
	}
	return b
}

func appendExt(b []byte, n int) ([]byte, byte) {
	switch {
	case n < 13:
		return b, byte(n)
	case n < 269:
		return append(b, byte(n-13)), 13
	}
	return binary.BigEndian.AppendUint16(b, uint16(n-269)), 14 //nolint:gosec // option numbers and lengths are below 2^16
}

// sortOptions sorts options by number if they are not; equal numbers keep their order, which carries meaning. It never
// changes the slice it was given.
func sortOptions(opts message.Options) message.Options {
	byID := func(a, b message.Option) int { return int(a.ID) - int(b.ID) }
	if slices.IsSortedFunc(opts, byID) {
		return opts
	}
	opts = slices.Clone(opts)
	slices.SortStableFunc(opts, byID)
	return opts
}

// fault is what is wrong with the options of a message that is well formed.
type fault struct {
	option message.OptionID // the first critical option that is not understood; 0 if none
	many   bool             // more than maxOptions
	proxy  bool             // Proxy-Uri or Proxy-Scheme
	hops   bool             // a Hop-Limit that is not 1 to 255
}

// misplaced notes the critical options that say something of a request alone when they are in a response (RFC 7252, Section
// 5.4: they are treated as not recognised). OCF's version options may be in both.
func (f *fault) misplaced(code codes.Code, opts message.Options) {
	if code>>5 == 0 || f.option != 0 {
		return
	}
	for i := range opts {
		switch id := opts[i].ID; id {
		case IfMatch, URIHost, IfNoneMatch, URIPort, URIPath, URIQuery, AcceptOption, ProxyURI, ProxyScheme:
			f.option = id
			return
		}
	}
}

func (f fault) bad() bool { return f.option != 0 || f.many }

func (f fault) String() string {
	switch {
	case f.many:
		return fmt.Sprintf("more than %d options", maxOptions)
	case f.option != 0:
		return fmt.Sprintf("critical option %d is not understood", f.option)
	case f.hops:
		return "Hop-Limit must be between 1 and 255"
	case f.proxy:
		return "this is no proxy"
	}
	return ""
}

var (
	errOptionHeader = errors.New("reserved value in an option's header")
	errOptionShort  = errors.New("option runs over the end of the message")
	errOptionNumber = errors.New("option number over 65535")
	errNoPayload    = errors.New("payload marker without payload")
)

// decodeBody reads options and payload from b, which becomes theirs. Values and payload are parts of b. With signal the
// options belong to a signalling code (RFC 8323, Section 5.2) and are only split, not judged.
//
// An error means b is malformed. A fault does not: the caller decides by what kind of message it is (RFC 7252, Section
// 5.4.1).
func decodeBody(b []byte, opts message.Options, signal bool) (_ message.Options, payload []byte, f fault, err error) {
	number, last := 0, -1
	count := 0
	for len(b) > 0 {
		if b[0] == 0xff {
			if len(b) == 1 {
				return nil, nil, f, errNoPayload // RFC 7252, Section 3
			}
			return opts, b[1:len(b):len(b)], f, nil
		}
		d, l := int(b[0]>>4), int(b[0]&0x0f)
		b = b[1:]
		if d, b, err = parseExt(d, b); err != nil {
			return nil, nil, f, err
		}
		if l, b, err = parseExt(l, b); err != nil {
			return nil, nil, f, err
		}
		number += d
		if number > 0xffff {
			return nil, nil, f, errOptionNumber
		}
		if l > len(b) {
			return nil, nil, f, errOptionShort
		}
		value := b[:l:l]
		b = b[l:]
		id := message.OptionID(number) //nolint:gosec // checked above
		if count++; count > maxOptions {
			f.many = true // go on only to tell a malformed message from one that asks too much
			continue
		}
		if !signal && id == HopLimit && number != last && (l != 1 || value[0] == 0) {
			f.hops = true
		}
		if !signal && !understood(id, l, number == last) {
			// RFC 7252, Sections 5.4.1 and 5.4.3: a wrong length makes an option unrecognised; Section 5.4.5: so does a
			// repetition that its definition does not allow.
			if number&1 == 1 {
				if f.option == 0 {
					f.option = id
				}
				continue
			}
			if _, known := definitions[id]; known {
				continue // elective: ignored; kept away from handlers, which may trust lengths
			}
		}
		if !signal && (id == ProxyURI || id == ProxyScheme) {
			f.proxy = true
		}
		last = number
		opts = append(opts, message.Option{ID: id, Value: value})
	}
	return opts, nil, f, nil
}

// parseExt resolves the nibble of an option's delta or length (RFC 7252, Section 3.1).
func parseExt(n int, b []byte) (int, []byte, error) {
	switch n {
	case 13:
		if len(b) < 1 {
			return 0, nil, errOptionShort
		}
		return int(b[0]) + 13, b[1:], nil
	case 14:
		if len(b) < 2 {
			return 0, nil, errOptionShort
		}
		return int(binary.BigEndian.Uint16(b)) + 269, b[2:], nil
	case 15:
		return 0, nil, errOptionHeader
	}
	return n, b, nil
}

// definition is what an option may look like.
type definition struct {
	min, max int
	repeat   bool
}

// definitions are the options that the engine or its handlers understand (RFC 7252, Section 5.10; RFC 7641, Section 2; RFC
// 7959, Sections 2.1 and 4; RFC 7967; RFC 8768; RFC 9175). OCF's version options are critical and iotivity-lite sends them in
// requests and responses.
var definitions = map[message.OptionID]definition{
	IfMatch:           {0, 8, true},
	URIHost:           {1, 255, false},
	ETagOption:        {1, 8, true},
	IfNoneMatch:       {0, 0, false},
	ObserveOption:     {0, 3, false},
	URIPort:           {0, 2, false},
	LocationPath:      {0, 255, true},
	URIPath:           {0, 255, true},
	ContentFormatOpt:  {0, 2, false},
	MaxAge:            {0, 4, false},
	URIQuery:          {0, 255, true},
	HopLimit:          {1, 1, false}, // for proxies: an endpoint only sees to its range
	AcceptOption:      {0, 2, false},
	LocationQuery:     {0, 255, true},
	Block2:            {0, 3, false},
	Block1:            {0, 3, false},
	Size2:             {0, 4, false},
	ProxyURI:          {1, 1034, false},
	ProxyScheme:       {1, 255, false},
	Size1:             {0, 4, false},
	EchoOption:        {1, 40, false},
	NoResponse:        {0, 1, false},
	RequestTag:        {0, 8, true},
	OCFAcceptVersion:  {0, 2, false},
	OCFContentVersion: {0, 2, false},
}

func understood(id message.OptionID, length int, repeated bool) bool {
	d, ok := definitions[id]
	return ok && length >= d.min && length <= d.max && (d.repeat || !repeated)
}
