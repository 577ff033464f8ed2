package coapgateway

import (
	"context"
	"crypto/tls"
	"log/slog"
	"net"
	"sync"
	"testing"

	"github.com/pion/dtls/v3"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// Where the gateway of a field is.
var fieldDTLS, fieldUDP = simnet.Addr("192.0.2.1:5684"), simnet.Addr("192.0.2.1:5683")

// field is a gateway on a simulated network, for a bubble, with the lamp's pre-shared key.
type field struct {
	t       *testing.T
	gw      *Gateway
	net     *simnet.Network
	mu      sync.Mutex // guards key and keys
	key     []byte
	keys    error // of looking it up
	ca      *ca
	ledger  ledger          // of ca
	ctx     context.Context // ends with the gateway
	cancel  context.CancelFunc
	running sync.WaitGroup // whoever ends with ctx or with its socket; end waits for them
}

func newField(t *testing.T, w *world, seed uint64, change func(*Config)) *field {
	t.Helper()
	f := &field{t: t, net: simnet.New(seed, nil), key: []byte("0123456789abcdef"), ca: newCA(t)}
	certificate := f.ca.identity(t, hubID, nil)
	cfg := Default()
	cfg.API.CoAP.PlainAddress = "127.0.0.1:0" // plain connections are allowed; nobody listens there
	if change != nil {
		change(&cfg)
	}
	var err error
	f.gw, err = New(cfg, Deps{
		Directory: &w.dir, Identities: &w.ids, Verifier: &w.ver, HubID: hubID, Service: "gateway-1",
		Providers: []NamedProvider{{Name: "main", Provider: &w.prov}}, ClientCAs: f.ca.pool(), Revoked: f.ledger.revoked,
		Certificate: func() (*tls.Certificate, error) { return &certificate, nil },
		PSK:         func(context.Context, hub.DeviceID) ([]byte, error) { return f.lampKey() },
	}, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	secure, err := f.net.Listen(fieldDTLS.String())
	if err != nil {
		t.Fatal(err)
	}
	plain, err := f.net.Listen(fieldUDP.String())
	if err != nil {
		t.Fatal(err)
	}
	f.ctx, f.cancel = context.WithCancel(t.Context())
	f.running.Go(func() {
		if err := f.gw.engine.ServeDTLS(f.ctx, secure, f.gw.dtlsConfig()); err != nil {
			t.Errorf("the engine ended with %v", err)
		}
	})
	f.running.Go(func() { f.gw.checkKeys(f.ctx) })
	f.running.Go(func() {
		if err := f.gw.engine.ServeUDP(f.ctx, plain); err != nil {
			t.Errorf("the engine ended with %v", err)
		}
	})
	return f
}

func (f *field) lampKey() ([]byte, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.key, f.keys
}

// replaceKey gives the lamp another key, and says so.
func (f *field) replaceKey() {
	f.mu.Lock()
	f.key = []byte("another key, 16.")
	f.mu.Unlock()
	f.gw.EndKey(lampID)
}

// end stops the gateway. The devices' sockets must be closed, or be about to be.
func (f *field) end() {
	f.cancel()
	f.running.Wait()
}

// shake makes the lamp's association, with a connection ID.
func (f *field) shake(sock net.PacketConn) *dtls.Conn {
	f.t.Helper()
	return f.shakeAs(sock, lampID)
}

func (f *field) shakeAs(sock net.PacketConn, dev hub.DeviceID) *dtls.Conn {
	f.t.Helper()
	return f.shakeWith(sock, dtls.WithPSK(func([]byte) ([]byte, error) { return f.lampKey() }), dtls.WithPSKIdentityHint([]byte(dev)),
		dtls.WithCipherSuites(dtls.TLS_PSK_WITH_AES_128_CCM_8))
}

func (f *field) shakeWith(sock net.PacketConn, opts ...dtls.ClientOption) *dtls.Conn {
	f.t.Helper()
	conn, err := dtls.ClientWithOptions(sock, fieldDTLS,
		append(opts, dtls.WithMTU(1200), dtls.WithConnectionIDGenerator(dtls.OnlySendCIDGenerator()))...)
	if err != nil {
		f.t.Fatal(err)
	}
	if err := conn.HandshakeContext(f.ctx); err != nil {
		f.t.Fatal(err)
	}
	return conn
}

// plainSocket is a device's end over plain UDP.
type plainSocket struct{ net.PacketConn }

func (p plainSocket) Write(b []byte) (int, error) { return p.WriteTo(b, fieldUDP) }
func (p plainSocket) Read(b []byte) (int, error)  { n, _, err := p.ReadFrom(b); return n, err }
