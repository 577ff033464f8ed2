package coapgateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/revocation"
)

// NamedProvider is a provider as devices name it.
type NamedProvider struct {
	Name string // authprovider
	// ClientCredentials: devices sign up with a JWT for this hub of scope device:signup in place of a code.
	ClientCredentials bool
	Provider          Provider
}

// Deps is what a gateway needs of others.
type Deps struct {
	Directory  Directory
	Identities Identities
	Verifier   Verifier
	// Providers has at least one; the first is that of devices that name none.
	Providers []NamedProvider
	// Certificate is the hub's certificate, unless the configuration names files. It is asked at each handshake.
	Certificate func() (*tls.Certificate, error)
	// ClientCAs are the CAs of device certificates, unless the configuration names some.
	ClientCAs *x509.CertPool
	// ClientIntermediates are certificates under ClientCAs that issue devices' certificates, for clients that send their own
	// certificate and not its chain. They admit nobody whom ClientCAs would not; a configured caPool replaces them too.
	ClientIntermediates []*x509.Certificate
	// ClientRoots are one set of credentials, which the first of them names: a device that signed up under one is the same under
	// another. Those that ClientCAs does not have let nobody in.
	ClientRoots []*x509.Certificate
	// Revoked reports whether a device's certificate was revoked; the chain was verified. It knows those of the hub's own
	// authority only, and does not block. It must say so of a certificate before EndCertificate is told of it. Nil: none was.
	Revoked func(*x509.Certificate) bool
	// Denied refuses a device that is not to be let in, or whoever comes with a verified chain in which something is not: Denied then.
	// The device may be "", and the chain nil. It does not block, and must say so before EndDenied is told. Nil: nobody is.
	Denied func(dev hub.DeviceID, chain []*x509.Certificate) error
	// Quarantine keeps apart what devices in quarantine write. Nil: none is in quarantine.
	Quarantine Quarantine
	// HandedOver is told of each sign-up: the device is owner's, and came with the certificate, or with none. Nil: nobody is told.
	HandedOver func(ctx context.Context, dev hub.DeviceID, owner hub.Owner, cert *x509.Certificate) error
	// Rivals is told of a device that is in two places at once, and of where. Nil: nobody is.
	Rivals func(ctx context.Context, dev hub.DeviceID, where string)
	// Turns asks another gateway, by its Service, for what Gateway.Turns says there. Nil: there are no others.
	Turns func(ctx context.Context, gateway string, dev hub.DeviceID) (Turns, error)
	// Lists is the folder in which revocation lists of other authorities are kept for the next start. "": they are not kept.
	Lists string
	// PSK returns the pre-shared key of a device, nil if it has none. Nil: devices have certificates only.
	PSK   func(context.Context, hub.DeviceID) ([]byte, error)
	HubID hub.DeviceID
	// Renewals gives devices another certificate before theirs ends. Nil: nobody does.
	Renewals Renewals
	// EngineMetrics may be shared with other engines. Nil: the gateway registers its own.
	EngineMetrics *coap.Metrics
	// Service names this gateway in the connections it records.
	Service string
	// Bus reaches other gateways behind the same address. Nil: there are none.
	Bus *bus.Bus
	// Reach returns host and port under which devices reach the listener of an address. Nil: under that address.
	Reach func(address string) string
}

// Gateway is the devices' door.
type Gateway struct {
	cfg     Config
	deps    Deps
	log     *slog.Logger
	metrics *metrics
	engine  *coap.Server
	web     *coap.WebSocket         // nil when it is off
	relay   *coap.Relay             // nil without a bus
	tls     *tls.Config             // nil when there is no secure listener
	trusted atomic.Pointer[trusted] // who vouches for devices there; nil with tls
	// revocation knows what other authorities have revoked, sets who they are; nil where nobody is to be asked.
	revocation *revocation.Checker
	sets       []revocation.Set
	refused    refusals
	devices    *diagnostics
	live       *live
	absences   absences
	keys       keyChecks
	quiet      *quietQueue
	watches    *watches
	renewals   *renewals
	rates      *rates
	// signIns has sign-ins, and exchanges the sign-ups and refreshes of each provider. Those wait for it, and one that hangs must
	// keep nobody out who has a token, or another provider.
	signIns     *admission.Queue
	exchanges   map[string]*admission.Queue // by the providers' names
	discoveries *admission.Queue
	patience    time.Duration // how long a write is tried again before a session is given up

	mu        sync.Mutex // guards addresses
	addresses Addresses
}

// Addresses are where a gateway listens; "" for a listener that is off.
type Addresses struct {
	Secure    string // coaps+tcp
	SecureUDP string // coaps
	Plain     string // coap+tcp
	PlainUDP  string // coap
}

// New makes a gateway of a valid configuration. It fails if a file cannot be read or something is missing in deps.
func New(cfg Config, deps Deps, log *slog.Logger, reg prometheus.Registerer) (*Gateway, error) {
	if errs := cfg.Validate(); len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	if len(deps.Providers) == 0 {
		return nil, errors.New("coap-gateway needs at least one provider")
	}
	if deps.Revoked == nil {
		deps.Revoked = func(*x509.Certificate) bool { return false }
	}
	if deps.Denied == nil {
		deps.Denied = func(hub.DeviceID, []*x509.Certificate) error { return nil }
	}
	g := &Gateway{
		cfg: cfg, deps: deps, log: log, devices: newDiagnostics(), live: newLive(), rates: newRates(cfg.Limits),
		signIns: cfg.Limits.SignIns.queue(), exchanges: map[string]*admission.Queue{},
		discoveries: admission.NewQueue(discoveriesUnderWay, discoveriesWaiting, discoveryMaxWait),
		quiet:       newQuietQueue(cfg.DeviceTwin.AskQuietAfter),
		keys:        keyChecks{wake: make(chan struct{}, 1), waiting: sessions{}},
		// Devices wait 4 s for a Pong and reconnect then (iotivity-lite); whatever is not stored by 3 s is better sent again.
		patience: 3 * time.Second,
	}
	for _, p := range deps.Providers {
		g.exchanges[p.Name] = cfg.Limits.SignIns.queue()
	}
	g.metrics = newMetrics(reg, g.signIns, g.exchanges)
	g.renewals = newRenewals(g)
	g.watches = &watches{gw: g, ears: map[hub.Owner]*ear{}}
	if cfg.API.CoAP.Address != "" {
		conf, is, err := g.tlsConfig()
		if err != nil {
			return nil, err
		}
		g.tls = conf
		g.trusted.Store(&is)
		if len(g.sets) > 0 {
			if g.revocation, err = revocation.New(g.sets, deps.Lists, log, prometheus.WrapRegistererWith(prometheus.Labels{"part": "coap-gateway"}, reg)); err != nil {
				return nil, fmt.Errorf("coapGateway.api.coap.tls.caSets: %w", err)
			}
			g.revocation.Changed(g.endRevoked)
		}
	}
	ec := coap.DefaultConfig()
	ec.MaxMessageSize = cfg.API.CoAP.MaxMessageSize
	ec.MaxConnections = cfg.API.CoAP.MaxConnections
	ec.KeepAlive = cfg.API.CoAP.KeepAlive.Timeout
	ec.MaxSilence = cfg.API.CoAP.MaxSilence
	ec.MaxObservations = max(cfg.API.CoAP.MaxLinks+1, cfg.DeviceToDevice.MaxObservations) // and /oic/res itself; of either side
	ec.Refused = func(remote net.Addr, reason, detail string) {
		if detail != "" {
			reason += ": " + detail
		}
		g.Refuse(Refusal{Remote: remote.String(), What: "connection", Reason: reason})
	}
	if deps.EngineMetrics == nil {
		deps.EngineMetrics = coap.NewMetrics(reg)
	}
	g.engine = coap.NewServer(ec, g, log, deps.EngineMetrics)
	if deps.Bus != nil {
		g.relay = newRelay(cfg.API.CoAP.DTLS.Gateway)
	}
	if ws := cfg.API.CoAP.WebSocket; ws.Enabled {
		g.web = g.engine.NewWebSocket(ws.Origins)
	}
	return g, nil
}

// Run listens, calls ready once, and serves until ctx ends; then every connection is released, every device recorded
// offline, unless Drain was called, and everything it started has ended. A listener that cannot be opened is an error.
func (g *Gateway) Run(ctx context.Context, ready func()) error {
	stopRelay, err := g.relayRecords()
	if err != nil {
		return err
	}
	defer stopRelay()
	group, ctx := errgroup.WithContext(ctx)
	co := &g.cfg.API.CoAP
	secure, err := listen(ctx, co, co.Address)
	if err != nil {
		return err
	}
	plain, err := listen(ctx, co, co.PlainAddress)
	if err != nil {
		secure.close()
		return err
	}
	var at Addresses
	at.Secure, at.SecureUDP = secure.addresses()
	at.Plain, at.PlainUDP = plain.addresses()
	g.mu.Lock()
	g.addresses = at
	g.mu.Unlock()
	if secure.tcp != nil {
		group.Go(func() error { return g.engine.ServeTCP(ctx, secure.tcp, g.tls) })
	}
	if secure.udp != nil {
		group.Go(func() error { return g.engine.ServeDTLS(ctx, secure.udp, g.dtlsConfig()) })
	}
	if plain.tcp != nil {
		group.Go(func() error { return g.engine.ServeTCP(ctx, plain.tcp, nil) })
	}
	if plain.udp != nil {
		group.Go(func() error { return g.engine.ServeUDP(ctx, plain.udp) })
	}
	group.Go(func() error { g.quiet.run(ctx); return nil })
	group.Go(func() error { g.renewals.run(ctx); return nil })
	group.Go(func() error { g.checkKeys(ctx); return nil })
	if g.revocation != nil {
		group.Go(func() error { return g.revocation.Run(ctx, func() {}) })
	}
	if g.web != nil {
		open := make(chan struct{}) // else somebody who was told that we are ready is answered 503
		group.Go(func() error { g.web.Serve(ctx, func() { close(open) }); return nil })
		<-open
	}
	ready()
	err = group.Wait()
	g.watches.done.Wait() // they ended with the sessions
	g.absences.end()
	if err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("serve CoAP: %w", err)
	}
	return nil
}

// Addresses returns where the gateway listens, once Run called ready.
func (g *Gateway) Addresses() Addresses {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.addresses
}

// Endpoint is the URI under which devices reach the gateway over a protocol, once Run called ready; "" for one that is off.
func (g *Gateway) Endpoint(over hub.Protocol) string {
	return g.cfg.Endpoint(over, g.Addresses(), g.deps.Reach)
}

// Configured is where a gateway with this configuration is to listen.
func (c *Config) Configured() (at Addresses) {
	co := &c.API.CoAP
	if co.speaks(ProtocolTCP) {
		at.Secure, at.Plain = co.Address, co.PlainAddress
	}
	if co.speaks(ProtocolUDP) {
		at.SecureUDP, at.PlainUDP = co.Address, co.PlainAddress
	}
	return at
}

// Endpoint is the URI under which devices reach a gateway with this configuration that listens at these addresses. reach says how an
// address is reached from outside; nil: as it is.
func (c *Config) Endpoint(over hub.Protocol, at Addresses, reach func(address string) string) string {
	external := c.API.CoAP.ExternalAddress
	var address string
	switch over {
	case hub.ProtocolCoAPSTCP:
		address = at.Secure
	case hub.ProtocolCoAPS:
		address = at.SecureUDP
	case hub.ProtocolCoAPTCP:
		address, external = at.Plain, "" // it has another port, which says nothing about the one outside
	case hub.ProtocolCoAP:
		address, external = at.PlainUDP, ""
	case hub.ProtocolUnknown, hub.ProtocolC2C:
	}
	switch {
	case address == "":
		return ""
	case external != "":
		address = external
	case reach != nil:
		address = reach(address)
	}
	return over.String() + "://" + address
}

// WebSocket is the way in over WebSocket, for an HTTP server to mount at coap.WebSocketPath; nil when it is off. While the
// gateway does not run it answers 503.
func (g *Gateway) WebSocket() *coap.WebSocket { return g.web }

// Refused returns the last refusals, newest first, at most 1000. Equal ones of one host are one, with their number.
func (g *Gateway) Refused() []Refusal { return g.refused.newest() }

// Diagnostics returns what is known of a device's attachment; false if it has not been here lately.
func (g *Gateway) Diagnostics(dev hub.DeviceID) (Diagnostics, bool) { return g.devices.get(dev) }

// Sessions is how many devices are signed in here.
func (g *Gateway) Sessions() int { return int(g.metrics.signedIn.Load()) }

// Security counts the sessions that there are, by how they are encrypted.
func (g *Gateway) Security() map[Security]int { return g.devices.security() }

// Refuse records a refusal, its Time apart, and counts it; those of other doors for devices, too.
func (g *Gateway) Refuse(r Refusal) {
	r.Time = time.Now()
	g.metrics.refused.WithLabelValues(r.What).Inc()
	g.refused.add(r)
}

// provider returns the provider a device named.
func (g *Gateway) provider(name string) (NamedProvider, error) {
	if name == "" {
		return g.deps.Providers[0], nil
	}
	for _, p := range g.deps.Providers {
		if p.Name == name {
			return p, nil
		}
	}
	return NamedProvider{}, unauthenticated("provider-unknown", "the authorization provider is not known here")
}

// rules are those of a connection: on a plain one nobody can show a certificate, nor over WebSocket, whose TLS is that of the
// HTTP server. A pre-shared key counts as one, also where none is asked for.
func (p *peer) rules() rules {
	co, info := &p.gw.cfg.API.CoAP, p.conn.Info()
	return rules{
		certificate: info.Secure && info.Host == "" && co.TLS.ClientCertificateRequired || p.cred.psk,
		claim:       co.Authorization.DeviceIDClaim != "",
		strict:      co.Authorization.StrictDeviceID,
	}
}
