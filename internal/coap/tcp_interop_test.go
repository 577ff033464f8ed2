package coap

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"testing"
	"time"
)

// TestLibcoapClientTCP lets libcoap's clients ask over TCP, and over TLS with a certificate.
func TestLibcoapClientTCP(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	hub, device := ca.issue(t, "hub", time.Time{}), ca.issue(t, "device", time.Time{})
	secure := &tls.Config{
		MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{hub}, ClientCAs: ca.pool, ClientAuth: tls.RequireAndVerifyClientCert,
	}
	certificate := []string{
		"-c", pemFile(t, "CERTIFICATE", device.Certificate[0]), "-j", keyFile(t, device), "-C", pemFile(t, "CERTIFICATE", ca.cert.Raw),
	}
	for _, c := range []struct {
		name, scheme string
		conf         *tls.Config
		args         []string
	}{
		{"coap-client-notls", "coap+tcp", nil, nil},
		{"coap-client-openssl", "coap+tcp", nil, nil},
		{"coap-client-openssl", "coaps+tcp", secure, certificate},
		{"coap-client-gnutls", "coaps+tcp", secure, certificate},
	} {
		t.Run(c.name+"/"+c.scheme, func(t *testing.T) {
			t.Parallel()
			ts := newTestServer()
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			srv := NewServer(DefaultConfig(), ts, slog.New(slog.DiscardHandler), NewMetrics(nil))
			ctx, cancel := context.WithCancel(context.Background())
			done := make(chan error, 1)
			go func() { done <- srv.ServeTCP(ctx, ln, c.conf) }()
			t.Cleanup(func() {
				cancel()
				if err := <-done; err != nil {
					t.Errorf("ServeTCP: %v", err)
				}
			})
			libcoapAsks(t, ts, c.name, c.scheme+"://"+ln.Addr().String(), c.args...)
		})
	}
}
