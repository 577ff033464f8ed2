package grpcgateway

import (
	"bufio"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"
)

// A connection that somebody took over is none of the door's any more: its place is free, once, and it can still end one
// direction before the other.
func TestHandedOverConnectionsTakeNoPlace(t *testing.T) {
	t.Parallel()
	for _, secure := range []bool{false, true} {
		taken := make(chan net.Conn, 1)
		hs := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/take" {
				return
			}
			c, _, err := http.NewResponseController(w).Hijack()
			if err != nil {
				t.Error(err)
			}
			taken <- c
		}))
		slots := make(chan struct{}, 1)
		hs.Listener = &limitListener{Listener: hs.Listener, slots: slots, done: make(chan struct{})}
		hs.Config.ConnState = handedOver
		dial := func() net.Conn {
			t.Helper()
			c, err := net.Dial("tcp", hs.Listener.Addr().String())
			if err != nil {
				t.Fatal(err)
			}
			if secure {
				c = tls.Client(c, &tls.Config{InsecureSkipVerify: true})
			}
			_ = c.SetDeadline(time.Now().Add(10 * time.Second))
			return c
		}
		if secure {
			hs.StartTLS()
		} else {
			hs.Start()
		}
		first := dial()
		if _, err := io.WriteString(first, "GET /take HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		c := <-taken
		second := dial() // there is one place
		if _, err := io.WriteString(second, "GET / HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if res, err := http.ReadResponse(bufio.NewReader(second), nil); err != nil || res.StatusCode != http.StatusOK {
			t.Fatalf("secure %v: %v, %v", secure, res, err)
		}
		raw := c
		if tc, ok := c.(*tls.Conn); ok {
			raw = tc.NetConn()
			_ = tc.CloseWrite()
		}
		if err := raw.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
			t.Error(err)
		}
		if n, err := first.Read(make([]byte, 1)); n != 0 || err != io.EOF {
			t.Errorf("secure %v: after half a close %d, %v", secure, n, err)
		}
		if _, err := io.WriteString(first, "x"); err != nil {
			t.Errorf("secure %v: the other half: %v", secure, err)
		}
		if n, err := c.Read(make([]byte, 1)); n != 1 || err != nil {
			t.Errorf("secure %v: the other half: %d, %v", secure, n, err)
		}
		_ = c.Close()
		if len(slots) != 1 { // that of the second one, which is still open
			t.Errorf("secure %v: %d places are taken", secure, len(slots))
		}
		_ = first.Close()
		_ = second.Close()
		hs.Close()
	}
}
