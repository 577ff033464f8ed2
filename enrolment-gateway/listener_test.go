package enrolmentgateway

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/internal/est"
	"github.com/coaphub/coaphub/test/device"
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

// So it is over CoAP, where a connection stays for as long as something is asked now and then.
func TestCoAPConnectionsOfOneNetwork(t *testing.T) {
	cfg := Default()
	cfg.API.CoAP.MaxConnections, cfg.API.CoAP.MaxConnectionsPerNetwork = 8, 3 // who is refused counts until he has gone
	d := start(t, cfg, &fake{}, Deps{})
	come := func(ip string) (c net.Conn, served bool) {
		t.Helper()
		dialer := &tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}, Config: d.conf(nil)}
		c, err := dialer.DialContext(t.Context(), "tcp", strings.TrimPrefix(d.secure, "coaps+tcp://"))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		_, _ = c.Write([]byte{0x01, byte(codes.Ping), 1}) // with a token, which the answer has, too (RFC 8323, Section 5.4)
		if err := c.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		for b, chunk := []byte{}, make([]byte, 4<<10); ; {
			n, err := c.Read(chunk)
			b = append(b, chunk[:n]...)
			switch {
			case bytes.HasSuffix(b, []byte{0x01, byte(codes.Pong), 1}):
				return c, true
			case errors.Is(err, os.ErrDeadlineExceeded):
				t.Fatalf("from %s: nothing but %x", ip, b)
			case err != nil:
				return c, false
			}
		}
	}
	var silent []net.Conn
	for _, ip := range []string{"127.0.7.1", "127.0.7.2", "127.0.7.3"} {
		c, served := come(ip)
		if !served {
			t.Fatalf("%s is not served", ip)
		}
		silent = append(silent, c)
	}
	if _, served := come("127.0.7.250"); served {
		t.Error("one more of the network is served")
	}
	d.wantRefused("too-many-connections-of-network")
	if _, served := come("127.0.8.1"); !served {
		t.Error("another network is not served")
	}
	_ = silent[0].Close()
	for deadline := time.Now().Add(10 * time.Second); ; <-time.After(time.Millisecond) {
		if _, served := come("127.0.7.9"); served {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("after one was closed nobody is served")
		}
	}
}

// Over DTLS, too.
func TestDTLSConnectionsOfOneNetwork(t *testing.T) {
	cfg := Default()
	cfg.API.CoAP.MaxConnectionsPerNetwork = 2
	d := start(t, cfg, &fake{}, Deps{})
	served := func() (*device.Device, error) {
		dev, err := d.connected(d.dtls, nil)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err = dev.Do(ctx, device.Request{Code: codes.GET, Path: est.Path + "crts"})
		return dev, err
	}
	first, err := served()
	if err == nil {
		_, err = served()
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := served(); err == nil {
		t.Error("a third one is served")
	}
	d.wantRefused("too-many-connections-of-network")
	first.Close()
	for deadline := time.Now().Add(20 * time.Second); ; <-time.After(time.Millisecond) {
		if _, err := served(); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("after one was closed: %v", err)
		}
	}
}

func TestNetworkOf(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"192.0.2.77": "192.0.2.0/24", "::ffff:192.0.2.1": "192.0.2.0/24", "2001:db8:1:2ff::6": "2001:db8:1:200::/56", "fe80::1": "fe80::/56",
	} {
		for _, a := range []net.Addr{&net.TCPAddr{IP: net.ParseIP(in), Zone: "lo"}, &net.UDPAddr{IP: net.ParseIP(in), Zone: "lo"}} {
			if got, ok := networkOf(a); !ok || got.String() != want {
				t.Errorf("%s is of %s, want %s", a, got, want)
			}
		}
	}
	if got, ok := networkOf(&net.UnixAddr{Name: "@"}); ok {
		t.Errorf("a Unix socket is of %s", got)
	}
}
