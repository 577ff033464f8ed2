package scep

import (
	"encoding/asn1"
	"errors"
)

// maxDepth bounds how deep a message's elements are nested. A certificate within a message has about a dozen levels.
const maxDepth = 32

var errBER = errors.New("the message is no BER")

// toDER writes BER, with which some clients answer for what CMS allows (RFC 5652, Section 2), with definite and shortest lengths, as
// encoding/asn1 wants them. It is at most as long as what it is made of, less what followed the first element.
func toDER(ber []byte) ([]byte, error) {
	out, _, err := element(make([]byte, 0, len(ber)), ber, 0)
	return out, err
}

// element appends the first element of ber to out, and returns what is behind it.
func element(out, ber []byte, depth int) (_, rest []byte, err error) {
	if depth > maxDepth || len(ber) < 2 {
		return nil, nil, errBER
	}
	tag := 1
	if ber[0]&0x1f == 0x1f { // a high tag number
		for tag < len(ber) && ber[tag]&0x80 != 0 {
			tag++
		}
		tag++
	}
	if tag >= len(ber) {
		return nil, nil, errBER
	}
	constructed := ber[0]&0x20 != 0
	out = append(out, ber[:tag]...)
	length, rest := int(ber[tag]), ber[tag+1:]
	if length == 0x80 { // the indefinite form, until two zeros
		if !constructed {
			return nil, nil, errBER
		}
		begin := len(out)
		for len(rest) < 2 || rest[0] != 0 || rest[1] != 0 {
			if out, rest, err = element(out, rest, depth+1); err != nil {
				return nil, nil, err
			}
		}
		return insertLength(out, begin), rest[2:], nil
	}
	if n := length - 0x80; n > 0 {
		if n > 4 || n > len(rest) {
			return nil, nil, errBER
		}
		length = 0
		for _, b := range rest[:n] {
			length = length<<8 | int(b)
		}
		rest = rest[n:]
	}
	if length < 0 || length > len(rest) { // an int may have 32 bits
		return nil, nil, errBER
	}
	content, rest := rest[:length], rest[length:]
	begin := len(out)
	if !constructed {
		return insertLength(append(out, content...), begin), rest, nil
	}
	for len(content) > 0 {
		if out, content, err = element(out, content, depth+1); err != nil {
			return nil, nil, err
		}
	}
	return insertLength(out, begin), rest, nil
}

// insertLength puts the length of all that is from begin on before it.
func insertLength(out []byte, begin int) []byte {
	n := len(out) - begin
	var length []byte
	if n < 0x80 {
		length = []byte{byte(n)}
	} else {
		for m := n; m > 0; m >>= 8 {
			length = append([]byte{byte(m)}, length...)
		}
		length = append([]byte{0x80 | byte(len(length))}, length...)
	}
	out = append(out, length...)
	copy(out[begin+len(length):], out[begin:begin+n])
	copy(out[begin:], length)
	return out
}

// octets is the content of an octet string, which may come in pieces.
func octets(v asn1.RawValue) ([]byte, error) {
	if !v.IsCompound {
		return v.Bytes, nil
	}
	var out []byte
	for rest := v.Bytes; len(rest) > 0; {
		var piece []byte
		var err error
		if rest, err = asn1.Unmarshal(rest, &piece); err != nil {
			return nil, errBER
		}
		out = append(out, piece...)
	}
	return out, nil
}
