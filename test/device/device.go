package device

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
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
	// HubAddr says where the hub is and how the device gets there: coaps+tcp://host:port for TLS, coaps:// for DTLS, coaps+ws://
	// for a WebSocket inside TLS; coap+tcp://, coap:// and coap+ws:// are the same without encryption.
	HubAddr string
	TLS     *tls.Config // for coaps+tcp and coaps, see TLS and TLSFiles, and for coaps+ws, where the hub is known by its host's name
	PSK     *PSK        // in place of TLS, for coaps
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
	// over TCP. Over UDP and DTLS it always does: a datagram holds no more than a block or two.
	Blockwise bool
	// NoCSMOptions makes it send an empty CSM, as go-coap does by itself: the base size 1152 holds for what it takes. There is
	// none over UDP and DTLS.
	NoCSMOptions bool
	// NoConnectionID makes it ask for no connection ID over DTLS (RFC 9146): another address of it is then another device's.
	NoConnectionID bool
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
	over  scheme
	addr  string // host:port
	lost  string // code of a sign-up without answer; of Run's goroutine

	released atomic.Bool // the hub released the connection

	// Of UDP and DTLS: the ID of the message that the hub rejected last, and who sends again what it did not acknowledge.
	rejected atomic.Int32
	runners  sync.WaitGroup

	connMu sync.Mutex // guards conn; whoever asks for it does not wait for what is just being written
	conn   conn

	mu        sync.Mutex  // guards all below; held while writing to the hub, for writeTimeout at most
	tls       *tls.Config // with the certificate that it has now
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
	if err != nil {
		return nil, fmt.Errorf("the hub's address %q: %w", cfg.HubAddr, err)
	}
	over, known := schemes[u.Scheme]
	switch {
	case !known || u.Host == "":
		return nil, fmt.Errorf("the hub's address %q is not host:port behind coaps+tcp://, coaps:// or coaps+ws://, or one without s", cfg.HubAddr)
	case cfg.PSK != nil && (!over.secure || !over.datagrams):
		return nil, fmt.Errorf("a pre-shared key is for coaps, not for %s", u.Scheme)
	case over.secure && cfg.TLS == nil && cfg.PSK == nil:
		return nil, fmt.Errorf("%s needs a TLS configuration", u.Scheme)
	}
	host, port := u.Hostname(), u.Port()
	if port == "" {
		port = over.port
	}
	cfg.Blockwise = cfg.Blockwise || over.datagrams
	if cfg.ID == "" {
		return nil, errors.New("a device needs an ID")
	}
	if cfg.Name == "" {
		cfg.Name = "simulated"
	}
	d := &Device{
		cfg: cfg, tls: cfg.TLS, log: cfg.Log, stats: cfg.Stats, over: over, addr: net.JoinHostPort(host, port),
		observers: map[string]*observer{}, instances: map[string]int64{},
		// ETags of a device that starts again must be new ones, or the hub would take old values for current.
		etag: uint64(time.Now().UnixNano()),
	}
	d.rejected.Store(-1)
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

// Close closes the connection, if there is one, and waits for its end.
func (d *Device) Close() {
	d.connMu.Lock()
	cc := d.conn
	d.conn = nil
	d.connMu.Unlock()
	if cc != nil {
		_ = cc.Close() // ends what is just being written to it
		<-cc.Done()
		d.runners.Wait()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.observers = map[string]*observer{}
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

func (d *Device) current() conn {
	d.connMu.Lock()
	defer d.connMu.Unlock()
	return d.conn
}

// Ping asks whether the hub is there: over TCP and TLS with a Ping (RFC 8323, 5.4). Over UDP and DTLS it asks whether the
// session is: any CoAP endpoint answers an empty message, also one that has forgotten the device.
func (d *Device) Ping(ctx context.Context) error {
	if d.over.datagrams {
		return d.settle(d.Do(ctx, Request{Code: codes.GET, Path: "/oic/rd"}))
	}
	cc := d.current()
	if cc == nil {
		return errNotConnected
	}
	return cc.Ping(ctx)
}

var errNotConnected = errors.New("the device is not connected")

// ocf is the format of everything the device sends with a body.
var ocf = message.AppOcfCbor
