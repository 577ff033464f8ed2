package hostile_test

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"
)

// What hostile peers have in common: bytes and sockets, no engine.

// dial opens a connection that is closed when the test ends.
func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	d := net.Dialer{Timeout: patience}
	c, err := d.DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// write writes with a deadline and reports whether the other side took it.
func write(c net.Conn, b []byte) bool {
	_ = c.SetWriteDeadline(time.Now().Add(patience))
	_, err := c.Write(b)
	return err == nil
}

// ended reads, and reports whether the other side ended the connection. What it had said before is returned too.
func ended(c net.Conn) (said []byte, over bool) {
	_ = c.SetReadDeadline(time.Now().Add(patience))
	said, err := io.ReadAll(c)
	return said, !errors.Is(err, os.ErrDeadlineExceeded)
}

// hello is the beginning of a TLS handshake as a client would say it.
func hello(t *testing.T) []byte {
	t.Helper()
	near, far := net.Pipe()
	defer func() { _ = near.Close(); _ = far.Close() }()
	ctx, stop := context.WithTimeout(t.Context(), patience)
	defer stop()
	shaken := make(chan struct{})
	go func() { // ends when far is closed
		defer close(shaken)
		_ = tls.Client(far, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS12}).HandshakeContext(ctx)
	}()
	b := make([]byte, 4<<10)
	n, err := near.Read(b)
	if err != nil {
		t.Fatal(err)
	}
	_ = far.Close()
	<-shaken
	return b[:n]
}

// socket is a UDP socket that talks to the hub's.
func socket(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := new(net.Dialer).DialContext(t.Context(), "udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// receive reads one datagram; nil if none comes in time.
func receive(c net.Conn, within time.Duration) []byte {
	_ = c.SetReadDeadline(time.Now().Add(within))
	b := make([]byte, 64<<10)
	n, err := c.Read(b)
	if err != nil {
		return nil
	}
	return b[:n]
}

// record is a DTLS record of epoch 0 (RFC 6347, Section 4.1).
func record(typ byte, seq uint16, body []byte) []byte {
	b := []byte{typ, 0xfe, 0xfd, 0, 0, 0, 0, 0, 0}
	b = binary.BigEndian.AppendUint16(b, seq)
	b = binary.BigEndian.AppendUint16(b, uint16(len(body)))
	return append(b, body...)
}

const (
	recordAlert     = 21
	recordHandshake = 22

	clientHello        = 1
	serverHello        = 2
	helloVerifyRequest = 3
)

// helloDTLS is a ClientHello (RFC 6347, Section 4.3.2) of a client that is told apart by n, with a cookie and extensions.
func helloDTLS(n int, cookie, extensions []byte) []byte {
	body := []byte{0xfe, 0xfd}
	random := make([]byte, 32)
	binary.BigEndian.PutUint64(random, uint64(n))
	body = append(append(body, random...), 0, byte(len(cookie)))
	body = append(body, cookie...)
	body = append(body, 0, 2, 0xc0, 0xae, 1, 0) // TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8, no compression
	if extensions != nil {
		body = append(binary.BigEndian.AppendUint16(body, uint16(len(extensions))), extensions...)
	}
	seq := uint16(0)
	if cookie != nil {
		seq = 1
	}
	return record(recordHandshake, seq, fragment(clientHello, seq, body))
}

// fragment is a handshake message in one piece (RFC 6347, Section 4.2.2).
func fragment(typ byte, seq uint16, body []byte) []byte {
	size := []byte{byte(len(body) >> 16), byte(len(body) >> 8), byte(len(body))}
	b := binary.BigEndian.AppendUint16(append([]byte{typ}, size...), seq)
	return append(append(append(b, 0, 0, 0), size...), body...)
}

// ellipticCurves are the extensions without which no suite of the hub's with certificates works (RFC 8422, Section 5.1): P-256,
// uncompressed points, and ECDSA with SHA-256.
var ellipticCurves = []byte{
	0, 10, 0, 4, 0, 2, 0, 23,
	0, 11, 0, 2, 1, 0,
	0, 13, 0, 4, 0, 2, 4, 3,
}

// cookieOf is the cookie of a HelloVerifyRequest; nil if it is none.
func cookieOf(b []byte) []byte {
	const at = 13 + 12 + 2 // record, handshake message, version
	if len(b) <= at || b[0] != recordHandshake || b[13] != helloVerifyRequest || len(b) < at+1+int(b[at]) {
		return nil
	}
	return b[at+1 : at+1+int(b[at])]
}
