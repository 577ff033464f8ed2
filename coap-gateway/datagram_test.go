package coapgateway

import (
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// What a device over DTLS sees of the hub's message layer (RFC 7252, Sections 4.2, 4.3, 4.5 and 5.2), byte by byte.
func TestMessagesOverDTLS(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := newField(t, newWorld(), 1, nil)
		defer f.end()
		sock, err := f.net.Listen("192.0.2.2:5000")
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = sock.Close() }()
		conn := f.shake(sock)
		defer func() { _ = conn.Close() }()
		hears := func(what, want string, among int) {
			t.Helper()
			b := make([]byte, 1200)
			if err := conn.SetReadDeadline(time.Now().Add(10 * time.Minute)); err != nil {
				t.Fatal(err)
			}
			n, err := conn.Read(b)
			var timeout net.Error
			switch {
			case errors.As(err, &timeout) && timeout.Timeout() || errors.Is(err, os.ErrDeadlineExceeded):
				n = 0
			case err != nil:
				t.Fatal(err)
			}
			if got := fmt.Sprintf("%x", b[:min(n, among)]); got != want {
				t.Errorf("%s: it hears %q, want %q", what, got, want)
			}
		}
		say := func(b ...byte) {
			t.Helper()
			if _, err := conn.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		request := func(first byte, id byte) []byte {
			return append([]byte{first, 1, 0, id, 0xaa}, "\xbax.plgd.dev\x04time"...)
		}
		hears("behind the handshake", "", 4)
		say(0x40, 0, 0, 7)
		hears("a ping", "70000007", 4)
		say(request(0x41, 8)...)
		hears("CON", "61450008aa", 5) // an ACK with the answer in it
		say(request(0x41, 8)...)
		hears("CON again", "61450008aa", 5)
		say(request(0x51, 9)...)
		hears("NON", "5145", 2) // a NON as well
		hears("behind all that", "", 4)
	})
}
