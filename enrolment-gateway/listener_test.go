package enrolmentgateway

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"syscall"
	"testing"
	"time"

	"github.com/coaphub/coaphub/internal/est"
)

// One network that keeps connections open and says nothing keeps nobody else out, and itself only until it closes one.
func TestConnectionsOfOneNetwork(t *testing.T) {
	cfg := Default()
	cfg.API.HTTP.MaxConnections, cfg.API.HTTP.MaxConnectionsPerNetwork = 4, 3
	d := start(t, cfg, &fake{}, Deps{})
	from := func(ip string) *net.Dialer { return &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}} }
	dial := func(ip string) net.Conn {
		t.Helper()
		c, err := from(ip).DialContext(t.Context(), "tcp", d.http)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		return c
	}
	ask := func(ip string) error {
		tr := &http.Transport{TLSClientConfig: d.conf(nil), DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return from(ip).DialContext(ctx, network, address)
		}}
		defer tr.CloseIdleConnections()
		resp, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("https://" + d.http + est.Path + "cacerts")
		if err == nil {
			_ = resp.Body.Close()
		}
		return err
	}
	silent := []net.Conn{dial("127.0.7.1"), dial("127.0.7.2"), dial("127.0.7.3")}
	for _, ip := range []string{"127.0.7.1", "127.0.7.250"} {
		// The connections that are open keep it out, and it is told by an end.
		if _, err := dial(ip).Read(make([]byte, 1)); !errors.Is(err, io.EOF) && !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("one more from %s: %v", ip, err)
		}
	}
	d.wantRefused("too-many-connections-of-network")
	if err := ask("127.0.8.1"); err != nil {
		t.Errorf("another network: %v", err)
	}
	_ = silent[0].Close()
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(time.Millisecond) {
		err := ask("127.0.7.9")
		if err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after one was closed: %v", err)
		}
	}
}
