package grpcgateway

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"math"
	"math/big"
	"slices"
	"strconv"
	"unicode/utf8"

	"github.com/coaphub/coaphub/hub"
)

// Bounds of a conversion. What exceeds them is shown as the bytes it came in.
const (
	maxDepth  = 64  // nested arrays, maps and tags
	maxBignum = 512 // bytes of a tag 2 or 3: turning n digits into decimal costs n² (RFC 8949, Section 3.4.3)
)

var errCBOR = errors.New("not CBOR that JSON can show")

// appendCBOR appends one CBOR item (RFC 8949) as JSON, in one line. It works on the bytes directly, since this is most of
// what a read of a twin costs. Decisions, beside the advice of RFC 8949, Section 6.1:
//   - map keys become strings (integers in decimal); keys that are the same afterwards cannot be shown;
//   - byte strings become base64 text, with padding;
//   - integers keep all digits, bignums too; floats have the shortest digits that give the same 64-bit value;
//   - NaN and the infinities become "NaN", "Infinity" and "-Infinity", as in protobuf's JSON;
//   - undefined becomes null, tags are dropped.
//
// On an error b is returned as it was.
func appendCBOR(b, data []byte) ([]byte, error) {
	c := cborReader{data: data}
	out, err := c.item(b, 0)
	if err != nil || c.at != len(data) || len(data) > hub.MaxContent {
		return b, errCBOR
	}
	return out, nil
}

type cborReader struct {
	data []byte
	at   int
}

const indefinite = 31

// head reads an initial byte and its argument. Additional information 28 to 30 is not well-formed (Section 3).
func (c *cborReader) head() (major, info byte, arg uint64, err error) {
	if c.at >= len(c.data) {
		return 0, 0, 0, errCBOR
	}
	major, info = c.data[c.at]>>5, c.data[c.at]&31
	c.at++
	rest := c.data[c.at:]
	size := 0
	switch info {
	case 24:
		size = 1
	case 25:
		size = 2
	case 26:
		size = 4
	case 27:
		size = 8
	case 28, 29, 30:
		return 0, 0, 0, errCBOR
	case indefinite:
		if major < 2 || major == 6 {
			return 0, 0, 0, errCBOR
		}
		return major, info, 0, nil
	default:
		return major, info, uint64(info), nil
	}
	if len(rest) < size {
		return 0, 0, 0, errCBOR
	}
	switch size {
	case 1:
		arg = uint64(rest[0])
	case 2:
		arg = uint64(binary.BigEndian.Uint16(rest))
	case 4:
		arg = uint64(binary.BigEndian.Uint32(rest))
	case 8:
		arg = binary.BigEndian.Uint64(rest)
	}
	c.at += size
	return major, info, arg, nil
}

// breaks consumes a "break" stop code if it is next.
func (c *cborReader) breaks() bool {
	if c.at < len(c.data) && c.data[c.at] == 0xff {
		c.at++
		return true
	}
	return false
}

// text reads the content of a byte or text string whose head was read. Each chunk of a text string must be valid by itself
// (Section 3.2.3).
func (c *cborReader) text(major, info byte, arg uint64) ([]byte, error) {
	if info != indefinite {
		if arg > uint64(len(c.data)-c.at) {
			return nil, errCBOR
		}
		s := c.data[c.at : c.at+int(arg)]
		c.at += int(arg)
		if major == 3 && !utf8.Valid(s) {
			return nil, errCBOR
		}
		return s, nil
	}
	var all []byte
	for !c.breaks() {
		m, i, a, err := c.head()
		if err != nil || m != major || i == indefinite {
			return nil, errCBOR
		}
		s, err := c.text(m, i, a)
		if err != nil {
			return nil, err
		}
		all = append(all, s...)
	}
	return all, nil
}

func (c *cborReader) item(b []byte, depth int) ([]byte, error) {
	if depth > maxDepth {
		return b, errCBOR
	}
	major, info, arg, err := c.head()
	if err != nil {
		return b, err
	}
	switch major {
	case 0:
		return strconv.AppendUint(b, arg, 10), nil
	case 1:
		return appendNegative(b, arg), nil
	case 2, 3:
		s, err := c.text(major, info, arg)
		if err != nil {
			return b, err
		}
		if major == 2 {
			return appendBase64(b, s), nil
		}
		return appendString(b, s), nil
	case 4:
		return c.array(b, info, arg, depth)
	case 5:
		return c.object(b, info, arg, depth)
	case 6:
		if arg == 2 || arg == 3 {
			return c.bignum(b, arg == 3)
		}
		return c.item(b, depth+1)
	}
	return c.simple(b, info, arg)
}

func (c *cborReader) array(b []byte, info byte, n uint64, depth int) ([]byte, error) {
	var err error
	b = append(b, '[')
	for i := uint64(0); ; i++ {
		if info == indefinite && c.breaks() || info != indefinite && i == n {
			return append(b, ']'), nil
		}
		if i > 0 {
			b = append(b, ',')
		}
		if b, err = c.item(b, depth+1); err != nil {
			return b, err
		}
	}
}

func (c *cborReader) object(b []byte, info byte, n uint64, depth int) ([]byte, error) {
	var keys keySet
	b = append(b, '{')
	for i := uint64(0); ; i++ {
		if info == indefinite && c.breaks() || info != indefinite && i == n {
			return append(b, '}'), nil
		}
		if i > 0 {
			b = append(b, ',')
		}
		from := len(b)
		major, in, arg, err := c.head()
		if err != nil {
			return b, err
		}
		switch {
		case major == 0:
			b = append(strconv.AppendUint(append(b, '"'), arg, 10), '"')
		case major == 1:
			b = append(appendNegative(append(b, '"'), arg), '"')
		case major == 2 || major == 3:
			s, err := c.text(major, in, arg)
			if err != nil {
				return b, err
			}
			if major == 2 {
				b = appendBase64(b, s)
			} else {
				b = appendString(b, s)
			}
		case major == 7 && in >= 20 && in <= 23: // false, true, null, undefined
			b = append(b, '"')
			if b, err = c.simple(b, in, arg); err != nil {
				return b, err
			}
			b = append(b, '"')
		default: // JSON has no text for arrays, maps, tags and floats as keys
			return b, errCBOR
		}
		if !keys.add(b, from) {
			return b, errCBOR
		}
		b = append(b, ':')
		if b, err = c.item(b, depth+1); err != nil {
			return b, err
		}
	}
}

// keySet finds keys that occur twice in one object: readers of JSON would each drop another one of them.
type keySet struct {
	spans [][2]int // of the first keys, in the output
	more  map[string]struct{}
}

// add remembers b[from:], the key just written, and reports whether it is new.
func (k *keySet) add(b []byte, from int) bool {
	key := b[from:]
	if k.more != nil {
		if _, twice := k.more[string(key)]; twice {
			return false
		}
		k.more[string(key)] = struct{}{}
		return true
	}
	for _, s := range k.spans {
		if string(b[s[0]:s[1]]) == string(key) {
			return false
		}
	}
	k.spans = append(k.spans, [2]int{from, len(b)})
	if len(k.spans) > 16 { // comparing each with each pays for small objects only
		k.more = make(map[string]struct{}, 2*len(k.spans))
		for _, s := range k.spans {
			k.more[string(b[s[0]:s[1]])] = struct{}{}
		}
	}
	return true
}

func (c *cborReader) bignum(b []byte, negative bool) ([]byte, error) {
	major, info, arg, err := c.head()
	if err != nil || major != 2 {
		return b, errCBOR
	}
	s, err := c.text(major, info, arg)
	if err != nil || len(s) > maxBignum {
		return b, errCBOR
	}
	n := new(big.Int).SetBytes(s)
	if negative {
		n.Not(n) // -1 - n
	}
	return n.Append(b, 10), nil
}

func (c *cborReader) simple(b []byte, info byte, arg uint64) ([]byte, error) {
	switch info {
	case 20:
		return append(b, "false"...), nil
	case 21:
		return append(b, "true"...), nil
	case 22, 23:
		return append(b, "null"...), nil
	case 25:
		return appendFloat(b, half(uint16(arg))), nil
	case 26:
		return appendFloat(b, float64(math.Float32frombits(uint32(arg)))), nil
	case 27:
		return appendFloat(b, math.Float64frombits(arg)), nil
	}
	return b, errCBOR // unassigned simple values, and a break where an item belongs
}

// half decodes IEEE 754 binary16 (RFC 8949, Appendix D).
func half(h uint16) float64 {
	exp, mant := int(h>>10&0x1f), float64(h&0x3ff)
	var v float64
	switch exp {
	case 0:
		v = math.Ldexp(mant, -24)
	case 31:
		if v = math.Inf(1); mant != 0 {
			v = math.NaN()
		}
	default:
		v = math.Ldexp(mant+1024, exp-25)
	}
	if h&0x8000 != 0 {
		v = math.Copysign(v, -1)
	}
	return v
}

func appendNegative(b []byte, arg uint64) []byte {
	if arg == math.MaxUint64 { // -1 - arg does not fit
		return append(b, "-18446744073709551616"...)
	}
	return strconv.AppendUint(append(b, '-'), arg+1, 10)
}

func appendFloat(b []byte, f float64) []byte {
	switch {
	case math.IsNaN(f):
		return append(b, `"NaN"`...)
	case math.IsInf(f, 1):
		return append(b, `"Infinity"`...)
	case math.IsInf(f, -1):
		return append(b, `"-Infinity"`...)
	}
	format := byte('f')
	if a := math.Abs(f); a != 0 && (a < 1e-6 || a >= 1e21) { // as ECMAScript writes numbers
		format = 'e'
	}
	return strconv.AppendFloat(b, f, format, -1, 64)
}

func appendBase64(b, s []byte) []byte {
	b = append(b, '"')
	n := base64.StdEncoding.EncodedLen(len(s))
	b = slices.Grow(b, n+1)
	base64.StdEncoding.Encode(b[len(b):len(b)+n], s)
	return append(b[:len(b)+n], '"')
}

const hexDigits = "0123456789abcdef"

// appendString appends valid UTF-8 as a JSON string. <, > and & are escaped, so that a browser that takes an answer for HTML
// finds no tags in it; so are the line separators that end a line in JavaScript.
func appendString[S string | []byte](b []byte, s S) []byte {
	b = append(b, '"')
	from := 0
	for i := 0; i < len(s); i++ {
		c := s[i]
		switch {
		case c >= 0x20 && c != '"' && c != '\\' && c != '<' && c != '>' && c != '&' && c != 0x7f && c != 0xe2:
			continue
		case c == 0xe2:
			if !(i+2 < len(s) && s[i+1] == 0x80 && s[i+2]&^1 == 0xa8) { // U+2028, U+2029
				continue
			}
			b = append(b, s[from:i]...)
			b = append(b, `\u202`...)
			b = append(b, hexDigits[s[i+2]&15])
			i += 2
			from = i + 1
			continue
		}
		b = append(b, s[from:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\n':
			b = append(b, '\\', 'n')
		case '\r':
			b = append(b, '\\', 'r')
		case '\t':
			b = append(b, '\\', 't')
		default:
			b = append(b, '\\', 'u', '0', '0', hexDigits[c>>4], hexDigits[c&15])
		}
		from = i + 1
	}
	b = append(b, s[from:]...)
	return append(b, '"')
}
