package grpcgateway

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"

	"github.com/coaphub/coaphub/api"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
)

// Deps is what the door needs of the rest of the hub. All fields without a remark must be set.
type Deps struct {
	Directory  Directory
	Identities Identities
	Verifier   Verifier
	// Administration is what administrators see and do. nil: their calls are 404.
	Administration Administration
	// Certificates is the device side of the certificate authority. nil: its calls are 404.
	Certificates Certificates
	// Quarantine is what is kept apart of devices in quarantine. nil: its calls are 404.
	Quarantine Quarantine
	// PreSharedKeys gives devices keys. nil: its calls are 404.
	PreSharedKeys PreSharedKeys
	// Onboarding makes what devices need to sign up. nil: its call is 404.
	Onboarding Onboarder
	// Connections says how devices are attached. nil: its call is 404.
	Connections Connections
	// System is the hub itself, for administrators. nil: its calls are 404.
	System System
	// Enrolments is who gets an identity by himself. nil: its calls are 404.
	Enrolments Enrolments
	// Audit keeps which calls changed something. nil: nobody does.
	Audit Audit
	// HubID goes into the metadata of events.
	HubID string
	// HubInfo is asked for each GetHubConfiguration; it must be cheap.
	HubInfo func() HubConfiguration
	// Hosts are names under which the hub is reachable, besides loopback and Config.API.HTTP.Hosts. May be nil.
	Hosts []string
	// Pages answers HTTP requests that are none of the API's, for example the login page. nil: they are 404.
	Pages http.Handler
	// CursorKey signs cursors. All instances of a hub need the same; nil makes a random one, and a restart makes clients with
	// a cursor begin again.
	CursorKey []byte
	// TLS is used by listeners that are not on loopback. nil: such an address is an error.
	TLS *tls.Config
	// Listen opens a TCP listener for an address of the configuration. nil opens it when the door runs; whoever wires the
	// parts may have opened it before, to know its port.
	Listen func(ctx context.Context, address string) (net.Listener, error)
}

// Gateway is the door. Make one with New.
type Gateway struct {
	cfg          Config
	deps         Deps
	log          *slog.Logger
	metrics      *metrics
	openapi      []byte // the description as JSON
	hosts        map[string]bool
	origins      map[string]bool // of pages that may call the API
	handler      http.Handler
	grpc         *grpc.Server
	health       *health.Server
	index        index
	descriptions descriptions
	admit        *admissions
	addrs        atomic.Pointer[[2]net.Addr]

	encodings encodings
	closing   chan struct{}  // closed when the doors close: streams end
	sockets   sync.WaitGroup // of WebSockets, which net/http does not wait for
}

// New makes a door that does not listen yet. The configuration must be valid.
func New(cfg Config, deps Deps, log *slog.Logger, reg prometheus.Registerer) (*Gateway, error) {
	doc, err := api.JSON()
	if err != nil {
		return nil, fmt.Errorf("read the OpenAPI description: %w", err)
	}
	if deps.CursorKey == nil {
		deps.CursorKey = make([]byte, 32)
		_, _ = rand.Read(deps.CursorKey) // never fails
	}
	g := &Gateway{
		cfg: cfg, deps: deps, log: log, openapi: doc, hosts: map[string]bool{}, origins: map[string]bool{},
		closing: make(chan struct{}),
	}
	all := admission.NewQueue(cfg.Limits.MaxRequests, cfg.Limits.MaxWaiting, cfg.Limits.MaxWait)
	g.metrics = newMetrics(reg, all)
	g.admit = newAdmissions(&g.cfg.Limits, g.metrics, all)
	for _, o := range cfg.API.HTTP.CORS.Origins {
		g.origins[o] = true
	}
	for _, h := range append(append([]string{"localhost", "127.0.0.1", "::1"}, cfg.API.HTTP.Hosts...), deps.Hosts...) {
		g.hosts[canonicalHost(h)] = true
	}
	g.handler = g.newHandler()
	g.grpc, g.health = g.newGRPC()
	return g, nil
}

// HTTPHandler answers the API over HTTP, with all its checks, and everything else through Deps.Pages.
func (g *Gateway) HTTPHandler() http.Handler { return g.handler }

// GRPCServer is the server with the service, health and reflection registered.
func (g *Gateway) GRPCServer() *grpc.Server { return g.grpc }

// Addresses returns where the doors listen; nil before Run is ready.
func (g *Gateway) Addresses() (http, grpc net.Addr) {
	if a := g.addrs.Load(); a != nil {
		return a[0], a[1]
	}
	return nil, nil
}

// stopTime is how long requests under way may take to end when the door closes; a list that is still being read is cut off
// then, and its reader sees that it is not complete.
const stopTime = 3 * time.Second

// Run listens on both addresses, calls ready, and serves until ctx ends. It returns nil then, after all
// requests ended. It can be called once.
func (g *Gateway) Run(ctx context.Context, ready func()) error {
	hl, err := g.listen(ctx, "grpcGateway.api.http.address (--http-address)", g.cfg.API.HTTP.Address, g.cfg.API.HTTP.TLS, []string{"h2", "http/1.1"})
	if err != nil {
		return err
	}
	gl, err := g.listen(ctx, "grpcGateway.api.grpc.address (--grpc-address)", g.cfg.API.GRPC.Address, false, []string{"h2"})
	if err != nil {
		_ = hl.Close()
		return err
	}
	g.addrs.Store(&[2]net.Addr{hl.Addr(), gl.Addr()})
	srv := &http.Server{
		Handler:           g.handler,
		ReadHeaderTimeout: g.cfg.Limits.HeaderTimeout,
		IdleTimeout:       g.cfg.Limits.IdleTimeout,
		MaxHeaderBytes:    g.cfg.Limits.MaxHeaderBytes,
		HTTP2:             &http.HTTP2Config{MaxConcurrentStreams: g.cfg.Limits.MaxStreams},
		ErrorLog:          slog.NewLogLogger(g.log.Handler(), slog.LevelDebug), // handshakes of strangers and the like
		ConnState:         handedOver,
		ConnContext:       withPlace,
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
		// No WriteTimeout: it would end long answers. Each write has a deadline of its own instead.
	}
	failed := make(chan error, 2) // both servers, so that neither blocks
	go func() { failed <- srv.Serve(hl) }()
	go func() { failed <- g.grpc.Serve(gl) }()
	ready()
	running := 2
	select {
	case <-ctx.Done():
		err = nil
	case err = <-failed:
		running--
	}
	g.health.Shutdown() // watchers are told, before their streams end
	close(g.closing)
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTime)
	defer cancel()
	hard := context.AfterFunc(stop, g.grpc.Stop)
	if srv.Shutdown(stop) != nil {
		_ = srv.Close()
	}
	g.grpc.GracefulStop()
	hard()
	g.sockets.Wait() // each ends soon after closing, see lastWords
	for range running {
		if e := <-failed; err == nil && e != nil && !errors.Is(e, http.ErrServerClosed) && !errors.Is(e, grpc.ErrServerStopped) {
			err = e
		}
	}
	return err
}

// listen opens a door: plain on loopback unless always says that it has TLS there, too, which it has anywhere else.
func (g *Gateway) listen(ctx context.Context, what, address string, always bool, protocols []string) (net.Listener, error) {
	open := g.deps.Listen
	if open == nil {
		open = func(ctx context.Context, address string) (net.Listener, error) {
			return new(net.ListenConfig).Listen(ctx, "tcp", address)
		}
	}
	addr, err := net.ResolveTCPAddr("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w", what, err)
	}
	plain := addr.IP.IsLoopback() && !always
	if !plain && g.deps.TLS == nil {
		return nil, fmt.Errorf("listen for %s: %s needs TLS and there is no certificate for it", what, address)
	}
	l, err := open(ctx, address)
	if err != nil {
		return nil, fmt.Errorf("listen for %s: %w", what, err)
	}
	l = &limitListener{Listener: l, slots: make(chan struct{}, g.cfg.Limits.MaxConnections), done: make(chan struct{})}
	if plain {
		return l, nil
	}
	cfg := g.deps.TLS.Clone()
	cfg.NextProtos = protocols
	return tls.NewListener(l, cfg), nil
}

// guarded runs what belongs to a stream: a panic ends that stream alone.
func (g *Gateway) guarded(what string, do func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			g.metrics.panics.WithLabelValues(what).Inc()
			g.log.Error("a stream ended in a panic", "what", what, "panic", p, "stack", string(debug.Stack()))
			err = &hub.Error{Kind: hub.Internal, Op: what}
		}
	}()
	return do()
}
