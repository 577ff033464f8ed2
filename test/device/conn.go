package device

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"sync/atomic"
	"time"

	"github.com/pion/dtls/v3"
	netpacket "github.com/pion/dtls/v3/pkg/net"
	coapdtls "github.com/plgd-dev/go-coap/v3/dtls"
	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/message/pool"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/net/blockwise"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/udp"
	udpclient "github.com/plgd-dev/go-coap/v3/udp/client"
)

// scheme is a way to the hub.
type scheme struct {
	name              string
	port              string // when the address names none
	secure, datagrams bool
	webSocket         bool
}

// schemes: RFC 7252, 6.1 and 6.2; RFC 8323, 8.1 to 8.4.
var schemes = map[string]scheme{
	"coap":      {name: "coap", port: "5683", datagrams: true},
	"coaps":     {name: "coaps", port: "5684", datagrams: true, secure: true},
	"coap+tcp":  {name: "coap+tcp", port: "5683"},
	"coaps+tcp": {name: "coaps+tcp", port: "5684", secure: true},
	"coap+ws":   {name: "coap+ws", port: "80", webSocket: true},
	"coaps+ws":  {name: "coaps+ws", port: "443", webSocket: true, secure: true},
}

// PSK is a pre-shared key for DTLS (RFC 4279), as the hub gives it out.
type PSK struct {
	Identity string
	Key      []byte
}

// conn is a connection of go-coap's, of any scheme.
type conn interface {
	mux.Conn
	LocalAddr() net.Addr
	CheckExpirations(now time.Time)
}

const (
	dialTimeout = 10 * time.Second
	// handshakeTimeout is for DTLS over a radio that is slow and loses some of it (RFC 7925, 11).
	handshakeTimeout = time.Minute
)

// retransmits is how often a connection of datagrams looks for what was not acknowledged; go-coap sends it again after two
// seconds, and gives it up after ten.
const retransmits = 500 * time.Millisecond

// Connect opens a connection to the hub, after closing the one before.
func (d *Device) Connect(ctx context.Context) error {
	d.Close()
	d.released.Store(false)
	open, patience := d.stream, dialTimeout
	if d.over.datagrams {
		open, patience = d.association, handshakeTimeout
	}
	ctx, stop := context.WithTimeout(ctx, patience)
	defer stop()
	cc, err := open(ctx)
	if err != nil {
		return fmt.Errorf("connect to the hub: %w", err)
	}
	d.connMu.Lock()
	defer d.connMu.Unlock()
	d.conn = cc
	return nil
}

// stream is a connection over TCP, TLS or a WebSocket.
func (d *Device) stream(ctx context.Context) (conn, error) {
	raw, err := d.dial(ctx)
	if err != nil {
		return nil, err
	}
	opts := []tcp.Option{
		options.WithMux(mux.HandlerFunc(d.serve)),
		options.WithErrors(func(err error) { d.log.Debug("connection", "error", err) }),
		options.WithMaxMessageSize(maxMessage),
		options.WithBlockwise(d.cfg.Blockwise, blockwise.SZX1024, 10*time.Second),
		options.WithConnectionCacheSize(1024),
		options.WithReceivedMessageQueueSize(16),
		options.WithLimitClientParallelRequest(8),
		options.WithLimitClientEndpointParallelRequest(8),
		options.WithCloseSocket(),
		// go-coap would keep a goroutine for this beyond the connection's end; Run and Do expire instead.
		options.WithPeriodicRunner(func(func(time.Time) bool) {}),
	}
	if !d.cfg.NoCSMOptions {
		opts = append(opts, options.WithDisableTCPSignalMessageCSM())
		if err := sendCSM(raw, d.cfg.Blockwise); err != nil {
			_ = raw.Close()
			return nil, fmt.Errorf("send the CSM: %w", err)
		}
	}
	cc, err := tcp.Client(raw, opts...)
	if err != nil {
		_ = raw.Close()
		return nil, err
	}
	cc.SetTCPSignalReceivedHandler(func(code codes.Code) {
		if code == codes.Release { // RFC 8323, 5.5
			d.released.Store(true)
			_ = cc.Close()
		}
	})
	return cc, nil
}

func (d *Device) dial(ctx context.Context) (net.Conn, error) {
	if d.over.webSocket {
		var conf *tls.Config
		if d.over.secure {
			conf = d.identity()
		}
		return DialWebSocket(ctx, d.addr, conf)
	}
	var raw net.Conn
	var err error
	if d.over.secure {
		raw, err = (&tls.Dialer{Config: d.identity()}).DialContext(ctx, "tcp", d.addr)
	} else {
		raw, err = (&net.Dialer{}).DialContext(ctx, "tcp", d.addr)
	}
	if err != nil {
		return nil, err
	}
	return deadlineConn{raw}, nil
}

// sendCSM says what the device takes (RFC 8323, 5.3): Max-Message-Size, and Block-Wise-Transfer if it does that. The options
// are encoded here because go-coap sends an empty CSM only.
func sendCSM(w net.Conn, blockwise bool) error {
	// RFC 8323, 3.2: Len and TKL, code 7.01, options. Max-Message-Size is option 2 with 3 bytes, Block-Wise-Transfer option 4.
	opts := []byte{2<<4 | 3, maxMessage >> 16 & 0xff, maxMessage >> 8 & 0xff, maxMessage & 0xff}
	if blockwise {
		opts = append(opts, 2<<4)
	}
	_, err := w.Write(append([]byte{byte(len(opts) << 4), byte(codes.CSM)}, opts...))
	return err
}

// deadlineConn gives each write its time; go-coap's own writes have none.
type deadlineConn struct{ net.Conn }

func (c deadlineConn) Write(b []byte) (int, error) {
	if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return 0, err
	}
	return c.Conn.Write(b)
}

// association is what stands for a connection over UDP or DTLS.
func (d *Device) association(ctx context.Context) (conn, error) {
	raw, err := (&net.Dialer{}).DialContext(ctx, "udp", d.addr)
	if err != nil {
		return nil, err
	}
	opts := []udp.Option{
		options.WithMux(mux.HandlerFunc(d.serve)),
		options.WithErrors(func(err error) { d.log.Debug("connection", "error", err) }),
		options.WithMaxMessageSize(maxMessage),
		options.WithBlockwise(true, blockwise.SZX1024, 10*time.Second),
		// Nothing is read from the socket while this is full, and acknowledgements neither; the hub asks a few things at once.
		options.WithReceivedMessageQueueSize(64),
		options.WithLimitClientParallelRequest(8),
		options.WithLimitClientEndpointParallelRequest(8),
		monitor(func(m *pool.Message) {
			if m.Type() == message.Reset {
				d.rejected.Store(m.MessageID())
			}
		}),
		options.WithCloseSocket(),
		options.WithPeriodicRunner(func(func(time.Time) bool) {}), // see below
	}
	var cc *udpclient.Conn
	if d.over.secure {
		sock := &polite{PacketConn: netpacket.PacketConnFromConn(raw)}
		shaken, err := dtls.ClientWithOptions(sock, raw.RemoteAddr(), DTLSOptions(d.identity(), d.cfg.PSK, !d.cfg.NoConnectionID)...)
		if err == nil {
			if err = shaken.HandshakeContext(ctx); err != nil {
				_ = shaken.Close()
			}
		}
		if err != nil {
			_ = raw.Close()
			return nil, err
		}
		sock.shaken.Store(true)
		cc = coapdtls.Client(shaken, opts...)
	} else {
		cc = udp.Client(raw.(*net.UDPConn), opts...)
	}
	// go-coap's own runner would live on after the connection.
	d.runners.Go(func() {
		tick := time.NewTicker(retransmits)
		defer tick.Stop()
		for {
			select {
			case now := <-tick.C:
				cc.CheckExpirations(now)
			case <-cc.Done():
				return
			}
		}
	})
	return cc, nil
}

// polite lets pion say its close_notify: its reader is told to end before, by this deadline, and closes the socket.
type polite struct {
	net.PacketConn
	shaken atomic.Bool
}

func (p *polite) SetReadDeadline(t time.Time) error {
	if p.shaken.Load() {
		return nil
	}
	return p.PacketConn.SetReadDeadline(t)
}

// monitor sees each message that comes; go-coap has this option for servers only.
type monitor func(*pool.Message)

// UDPClientApply implements udp.Option.
func (see monitor) UDPClientApply(cfg *udpclient.Config) {
	cfg.RequestMonitor = func(_ *udpclient.Conn, m *pool.Message) (bool, error) {
		see(m)
		return false, nil
	}
}

// DTLSOptions is a device's side of the handshake, with a pre-shared key or a certificate.
func DTLSOptions(conf *tls.Config, k *PSK, connectionID bool) []dtls.ClientOption {
	var out []dtls.ClientOption
	if connectionID {
		// Devices behind NAT ask for a connection ID, which outlives a change of their address (RFC 9146).
		out = append(out, dtls.WithConnectionIDGenerator(dtls.OnlySendCIDGenerator()))
	}
	if k != nil {
		return append(out, dtls.WithPSK(func([]byte) ([]byte, error) { return k.Key, nil }),
			dtls.WithPSKIdentityHint([]byte(k.Identity)), dtls.WithCipherSuites(dtls.TLS_PSK_WITH_AES_128_CCM_8))
	}
	out = append(out, dtls.WithRootCAs(conf.RootCAs), dtls.WithServerName(conf.ServerName),
		dtls.WithInsecureSkipVerify(conf.InsecureSkipVerify), dtls.WithCipherSuites(dtls.TLS_ECDHE_ECDSA_WITH_AES_128_CCM_8))
	if len(conf.Certificates) > 0 {
		out = append(out, dtls.WithCertificates(conf.Certificates...))
	}
	if conf.VerifyConnection != nil {
		out = append(out, dtls.WithVerifyConnection(func(s *dtls.State) error {
			var cs tls.ConnectionState
			for _, der := range s.PeerCertificates {
				c, err := x509.ParseCertificate(der)
				if err != nil {
					return fmt.Errorf("the hub's certificate: %w", err)
				}
				cs.PeerCertificates = append(cs.PeerCertificates, c)
			}
			return conf.VerifyConnection(cs)
		}))
	}
	return out
}
