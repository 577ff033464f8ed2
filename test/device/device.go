package device

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/plgd-dev/go-coap/v3/mux"
	"github.com/plgd-dev/go-coap/v3/net/blockwise"
	"github.com/plgd-dev/go-coap/v3/options"
	"github.com/plgd-dev/go-coap/v3/tcp"
	"github.com/plgd-dev/go-coap/v3/tcp/client"
)

const (
	// maxMessage is what the device takes in one message, and says so (RFC 8323, 5.3.1).
	maxMessage = (256 + 64) << 10
	// writeTimeout ends a connection whose other side does not read.
	writeTimeout = 10 * time.Second
	// maxObservers bounds the observations of one device; a further one gets the value once and no Observe option.
	maxObservers = 256
)

// Config says what a device is.
type Config struct {
	ID   string // UUID
	Name string // n of /oic/d; empty: "simulated"
	// HubAddr is coaps+tcp://host:port or coaps+ws://host:port, without TLS coap+tcp://host:port or coap+ws://host:port.
	HubAddr string
	TLS     *tls.Config // for coaps+tcp, see TLS and TLSFiles, and for coaps+ws, where the hub is known by its host's name
	// Provider is the authprovider of sign-up and refresh; empty: not sent.
	Provider string
	// Resources is how many /sensor/N there are besides /light/1 and /info.
	Resources int
	// Errors are response codes such as 404: each makes a published resource /err/<code> that answers every request with it.
	Errors []int
	// PerResource makes /oic/res a resource without batch interface that cannot be observed.
	PerResource bool
	// Silent makes the device read requests and never answer one.
	Silent bool
	// Blockwise makes it offer and use block-wise transfer (RFC 7959). Without, messages are whole, as iotivity-lite's are
	// over TCP.
	Blockwise bool
	// NoCSMOptions makes it send an empty CSM, as go-coap does by itself: the base size 1152 holds for what it takes.
	NoCSMOptions bool
	// Log takes what goes wrong; nil: nowhere.
	Log *slog.Logger
	// Stats counts what happens; nil: the device counts for itself. Devices may share one.
	Stats *Stats
}

// Device is one simulated device. Any goroutine may use it.
type Device struct {
	cfg   Config
	log   *slog.Logger
	stats *Stats
	addr  string // host:port
	tls   bool
	ws    bool
	lost  string // code of a sign-up without answer; of Run's goroutine

	mu        sync.Mutex // guards all below; held while writing to the hub, for writeTimeout at most
	conn      *client.Conn
	creds     Credentials
	resources map[string]*resource
	order     []string // hrefs in the order they were made
	etag      uint64   // of the last change of any resource
	observers map[string]*observer
	instances map[string]int64 // ins by href, as the hub answered
}

// Credentials are what sign-up and refresh gave.
type Credentials struct {
	UID     string
	Access  string
	Refresh string
	Expires time.Time // of Access; zero: never
}

// Stats counts.
type Stats struct {
	Online     atomic.Int64 // signed in now
	SignUps    atomic.Int64
	SignIns    atomic.Int64
	Refreshes  atomic.Int64
	Published  atomic.Int64 // links
	Notified   atomic.Int64 // notifications sent, first answers to observations not counted
	Requests   atomic.Int64 // the hub's
	Reconnects atomic.Int64
	Failures   atomic.Int64 // attempts to get online that failed, connections that broke
}

// New makes a device; it does not connect.
func New(cfg Config) (*Device, error) {
	u, err := url.Parse(cfg.HubAddr)
	// RFC 8323, 8.1 to 8.4.
	ports := map[string]string{"coaps+tcp": "5684", "coap+tcp": "5683", "coap+ws": "80", "coaps+ws": "443"}
	if err != nil || u.Host == "" || ports[u.Scheme] == "" {
		return nil, fmt.Errorf("the hub's address %q is not coaps+tcp://host:port, coap+tcp://host:port, or one with +ws", cfg.HubAddr)
	}
	secure := strings.HasPrefix(u.Scheme, "coaps")
	if secure && cfg.TLS == nil {
		return nil, fmt.Errorf("%s needs a TLS configuration", u.Scheme)
	}
	host, port := u.Hostname(), u.Port()
	if port == "" {
		port = ports[u.Scheme]
	}
	if cfg.ID == "" {
		return nil, errors.New("a device needs an ID")
	}
	if cfg.Name == "" {
		cfg.Name = "simulated"
	}
	d := &Device{
		cfg: cfg, log: cfg.Log, stats: cfg.Stats, addr: net.JoinHostPort(host, port), tls: secure,
		ws:        strings.HasSuffix(u.Scheme, "+ws"),
		observers: map[string]*observer{}, instances: map[string]int64{},
		// ETags of a device that starts again must be new ones, or the hub would take old values for current.
		etag: uint64(time.Now().UnixNano()),
	}
	if d.log == nil {
		d.log = slog.New(slog.DiscardHandler)
	}
	d.log = d.log.With("device", cfg.ID)
	if d.stats == nil {
		d.stats = &Stats{}
	}
	d.makeResources()
	return d, nil
}

// ID returns the device's ID.
func (d *Device) ID() string { return d.cfg.ID }

// Stats returns the device's counters.
func (d *Device) Stats() *Stats { return d.stats }

// Credentials returns what sign-up or refresh gave last.
func (d *Device) Credentials() Credentials {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.creds
}

// SetCredentials replaces them, for a device that kept them or for one that lies.
func (d *Device) SetCredentials(c Credentials) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.creds = c
}

// Connect opens a connection to the hub, after closing the one before.
func (d *Device) Connect(ctx context.Context) error {
	d.Close()
	raw, err := d.dial(ctx)
	if err != nil {
		return fmt.Errorf("connect to the hub: %w", err)
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
			return fmt.Errorf("send the CSM: %w", err)
		}
	}
	cc, err := tcp.Client(raw, opts...)
	if err != nil {
		_ = raw.Close()
		return fmt.Errorf("connect to the hub: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conn, d.observers = cc, map[string]*observer{}
	return nil
}

func (d *Device) dial(ctx context.Context) (net.Conn, error) {
	ctx, stop := context.WithTimeout(ctx, 10*time.Second)
	defer stop()
	var raw net.Conn
	var err error
	if d.ws {
		var conf *tls.Config
		if d.tls {
			conf = d.cfg.TLS
		}
		return DialWebSocket(ctx, d.addr, conf)
	}
	if d.tls {
		raw, err = (&tls.Dialer{Config: d.cfg.TLS}).DialContext(ctx, "tcp", d.addr)
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

// Close closes the connection, if there is one, and waits for its end.
func (d *Device) Close() {
	d.mu.Lock()
	cc := d.conn
	d.conn = nil
	d.observers = map[string]*observer{}
	d.mu.Unlock()
	if cc != nil {
		_ = cc.Close()
		<-cc.Done()
	}
}

// Done is closed when the current connection has ended. Without a connection it is closed already.
func (d *Device) Done() <-chan struct{} {
	if cc := d.current(); cc != nil {
		return cc.Done()
	}
	ended := make(chan struct{})
	close(ended)
	return ended
}

func (d *Device) current() *client.Conn {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.conn
}

// Ping sends a Ping and waits for the Pong (RFC 8323, 5.4).
func (d *Device) Ping(ctx context.Context) error {
	cc := d.current()
	if cc == nil {
		return errNotConnected
	}
	return cc.Ping(ctx)
}

var errNotConnected = errors.New("the device is not connected")

// ocf is the format of everything the device sends with a body.
var ocf = message.AppOcfCbor
