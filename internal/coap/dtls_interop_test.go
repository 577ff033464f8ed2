package coap

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// listenDTLS starts an engine on a loopback socket. Its end waits for everything.
func listenDTLS(t testing.TB, h Handler, conf DTLSConfig) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := pc.LocalAddr().String()
	srv := NewServer(DefaultConfig(), h, slog.New(slog.DiscardHandler), NewMetrics(nil))
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- srv.ServeDTLS(ctx, pc, conf) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("ServeDTLS: %v", err)
		}
	})
	return addr
}

// pemFile writes blocks to a file.
func pemFile(t *testing.T, kind string, der []byte) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "pem")
	if err := os.WriteFile(name, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func keyFile(t *testing.T, cert tls.Certificate) string {
	t.Helper()
	der, err := x509.MarshalECPrivateKey(cert.PrivateKey.(*ecdsa.PrivateKey))
	if err != nil {
		t.Fatal(err)
	}
	return pemFile(t, "EC PRIVATE KEY", der)
}

// TestLibcoapClientDTLS lets libcoap's clients ask, with a pre-shared key and with a certificate, on one port.
func TestLibcoapClientDTLS(t *testing.T) {
	t.Parallel()
	ca := newAuthority(t)
	cert := ca.issue(t, "device", time.Time{})
	certFile, caFile := pemFile(t, "CERTIFICATE", cert.Certificate[0]), pemFile(t, "CERTIFICATE", ca.cert.Raw)
	credentials := map[string][]string{
		"key":         {"-u", "lamp", "-k", string(testKey)},
		"certificate": {"-c", certFile, "-j", keyFile(t, cert), "-C", caFile},
	}
	for _, name := range []string{"coap-client-openssl", "coap-client-gnutls"} {
		for kind, args := range credentials {
			t.Run(name+"/"+kind, func(t *testing.T) {
				t.Parallel()
				ts := newTestServer()
				libcoapAsks(t, ts, name, "coaps://"+listenDTLS(t, ts, dtlsConfig(t, ca)), args...)
			})
		}
	}
}
