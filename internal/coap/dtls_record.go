package coap

import (
	"encoding/binary"
)

// What the listener reads of DTLS: no more than where a record goes. All else is pion's.
const (
	recordChange    = 20 // change_cipher_spec
	recordAlert     = 21
	recordHandshake = 22
	recordData      = 23
	recordCID       = 25 // tls12_cid: what it is stands inside, encrypted (RFC 9146, Section 4)

	recordHeader    = 13
	handshakeHeader = 12

	helloRequest = 1 // client_hello
	helloAnswer  = 2 // server_hello
	helloVerify  = 3 // hello_verify_request
	certificate  = 11
	certVerify   = 15
	keyExchange  = 16 // client_key_exchange

	alertWarning = 1
	alertFatal   = 2

	// Descriptions of alerts (RFC 5246, Section 7.2).
	alertClose          = 0  // close_notify
	alertHandshake      = 40 // handshake_failure
	alertBadCertificate = 42
	alertUnsupported    = 43 // unsupported_certificate
	alertRevoked        = 44 // certificate_revoked
	alertExpired        = 45 // certificate_expired
	alertUnknownCA      = 48
	alertDenied         = 49 // access_denied
	alertDecrypt        = 51 // decrypt_error
)

// cidSize is the size of our connection IDs: two bytes of the gateway, six random ones. It is the same for all, so that a
// record can be read without knowing whose it is (RFC 9146, Section 4).
const cidSize = 8

// connectionID is one of our connection IDs.
type connectionID [cidSize]byte

// gateway is who has given it.
func (id connectionID) gateway() uint16 { return binary.BigEndian.Uint16(id[:]) }

// record is one record of a datagram (RFC 6347, Section 4.1).
type record struct {
	typ   byte
	epoch uint16
	seq   uint64
	cid   connectionID // of a recordCID
	raw   []byte       // all of it
	body  []byte
}

// nextRecord takes the first record off a datagram. It returns false when the datagram goes on with none; what follows
// cannot be read then (RFC 6347, Section 4.1.2.7: such bytes are discarded silently).
func nextRecord(b []byte) (r record, rest []byte, ok bool) {
	header := recordHeader
	if len(b) > 0 && b[0] == recordCID {
		header += cidSize
	}
	// The second byte of the version is left to pion: a ClientHello may carry that of DTLS 1.0.
	if len(b) <= header || b[0] < recordChange || b[0] > recordCID || b[1] != 0xfe {
		return r, nil, false
	}
	size := header + int(binary.BigEndian.Uint16(b[header-2:]))
	if size > len(b) || size == header {
		return r, nil, false
	}
	r = record{typ: b[0], epoch: binary.BigEndian.Uint16(b[3:]), seq: uint48(b[5:]), raw: b[:size], body: b[header:size]}
	if r.typ == recordCID {
		copy(r.cid[:], b[11:])
	}
	return r, b[size:], true
}

func uint48(b []byte) uint64 {
	return uint64(b[0])<<40 | uint64(b[1])<<32 | uint64(binary.BigEndian.Uint32(b[2:]))
}

func putUint48(b []byte, n uint64) {
	b[0], b[1] = byte(n>>40), byte(n>>32)
	binary.BigEndian.PutUint32(b[2:], uint32(n)) //nolint:gosec // the upper part stands before
}

// helloRandom tells one ClientHello from another: a client repeats it after the HelloVerifyRequest, and takes a new one for
// each handshake.
type helloRandom [32]byte

// clientHello is what the listener needs of one.
type clientHello struct {
	random helloRandom
	cookie []byte // empty: the first of a handshake
}

// isClientHello reports whether the body of a handshake record begins with a ClientHello.
func isClientHello(body []byte) bool { return body[0] == helloRequest }

// isClientFlight reports whether the body of a handshake record has only whole fragments of what a client sends in the clear
// after its ClientHello. pion would take a Finished in the clear for the one that is due, and lose that.
func isClientFlight(b []byte) bool {
	for len(b) > 0 {
		if len(b) < handshakeHeader || b[0] != certificate && b[0] != certVerify && b[0] != keyExchange {
			return false
		}
		n := uint24(b[9:])
		if n > len(b)-handshakeHeader || uint24(b[6:])+n > uint24(b[1:]) {
			return false
		}
		b = b[handshakeHeader+n:]
	}
	return true
}

// parseClientHello reads one that came in a single fragment, alone in its record; else false. RFC 6347, Section 4.2.1 wants
// a server to answer it without keeping anything, which one in pieces does not allow.
func parseClientHello(b []byte) (h clientHello, ok bool) {
	const fixed = handshakeHeader + 2 + 32 // version, random
	if len(b) < fixed+1 || b[0] != helloRequest {
		return h, false
	}
	length := uint24(b[1:])
	if uint24(b[6:]) != 0 || uint24(b[9:]) != length || length != len(b)-handshakeHeader {
		return h, false
	}
	copy(h.random[:], b[handshakeHeader+2:])
	rest := b[fixed:]
	session := int(rest[0])
	if len(rest) < 1+session+1 {
		return h, false
	}
	rest = rest[1+session:]
	cookie := int(rest[0])
	if len(rest) < 1+cookie {
		return h, false
	}
	h.cookie = rest[1 : 1+cookie]
	return h, true
}

func uint24(b []byte) int { return int(b[0])<<16 | int(b[1])<<8 | int(b[2]) }

// verifyCookie returns the cookie of a HelloVerifyRequest (RFC 6347, Section 4.2.1), or nil.
func verifyCookie(body []byte) []byte {
	const fixed = handshakeHeader + 2 // version
	if len(body) < fixed+1 || body[0] != helloVerify || len(body) < fixed+1+int(body[fixed]) {
		return nil
	}
	return body[fixed+1 : fixed+1+int(body[fixed])]
}

// plainAlert is a fatal alert in a record of epoch 0.
func plainAlert(seq uint64, description byte) []byte {
	b := make([]byte, recordHeader, recordHeader+2)
	b[0], b[1], b[2] = recordAlert, 0xfe, 0xfd
	putUint48(b[5:], seq)
	b[12] = 2
	return append(b, alertFatal, description)
}
