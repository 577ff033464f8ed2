package enrolmentgateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"
	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/est"
	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/revocation"
	"github.com/coaphub/coaphub/internal/scep"
)

// Authority decides who gets a certificate.
type Authority interface {
	est.Authority
	// Vouch is asked in the handshake about the certificates that a peer showed, of which it has the first one's key: an error if
	// nobody can enrol with them.
	Vouch(ctx context.Context, chain []*x509.Certificate) error
	// Applicant finds out who comes with a factory certificate.
	Applicant(ctx context.Context, chain []*x509.Certificate) (hub.Applicant, error)
	// Admit is Enrol for such a one without its end: the device that says that it is named may have a certificate then, and all else.
	Admit(ctx context.Context, chain []*x509.Certificate, named hub.DeviceID) (hub.Applicant, error)
	// ListOf returns the revocation list, DER, that a certificate would be on which is named by its issuer's name, DER, and its serial
	// number; NotFound for issuers of others.
	ListOf(ctx context.Context, issuer []byte, serial *big.Int) ([]byte, error)
	// Provisioned keeps how a step of device provisioning ended.
	Provisioned(ctx context.Context, chain []*x509.Certificate, to hub.Applicant, p hub.Provisioned) error
}

// Registrar is what clients of SCEP encrypt to, and take answers from. Its key is RSA and does not leave it.
type Registrar interface {
	scep.Key
	Certificate() (*x509.Certificate, error)
}

// Deps is what a gateway needs of others.
type Deps struct {
	Authority Authority
	// Registrar is for SCEP; nil: there is none.
	Registrar Registrar
	// HubID is this hub's.
	HubID hub.DeviceID
	// Cloud is where an owner's device signs up, with a token for it; there is at least one way. While no token can be made it is
	// Unavailable.
	Cloud func(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (hub.Cloud, error)
	// Certificate is the hub's certificate towards devices. It is asked at each handshake.
	Certificate func() (*tls.Certificate, error)
	// PSK returns the pre-shared key of a device, nil if it has none.
	PSK func(context.Context, hub.DeviceID) ([]byte, error)
	// Refused is told of connections that did not become one. It must not block.
	Refused func(remote net.Addr, reason string)
	// Lists is the folder in which revocation lists of manufacturers are kept for the next start. "": they are not kept.
	Lists string
	// EngineMetrics are those of the CoAP engine, which others may use, too.
	EngineMetrics *coap.Metrics
	// The listeners were opened before; nil for one that is off. Socket is that for proxies on this machine.
	CoAP   net.Listener
	DTLS   net.PacketConn
	HTTP   net.Listener
	Socket net.Listener
}

// Gateway is the door.
type Gateway struct {
	cfg     Config
	deps    Deps
	log     *slog.Logger
	engine  *coap.Server
	tls     *tls.Config
	proxies proxies
	opening *admission.Queue // of SCEP's messages
	listing *admission.Queue // of revocation lists
	crowd   networks         // of connections over CoAP
	answers *prometheus.CounterVec
	// revocation knows what manufacturers have revoked; nil where nobody is to be asked.
	revocation *revocation.Checker
}

// Revocation is who says which factory certificates were revoked, for the authority; nil if the configuration names no CA sets.
func (g *Gateway) Revocation() *revocation.Checker { return g.revocation }

// answerTime bounds how long a device waits for its certificate: it gives up on a request over UDP after 93 s (MAX_TRANSMIT_WAIT,
// RFC 7252, Section 4.8.2), and has a person's patience before.
const answerTime = 30 * time.Second

// idleTime ends a connection that asks for nothing: whoever got his certificate has nothing more to do here.
const idleTime = time.Minute

// New makes a gateway of a valid configuration. It fails if a file cannot be read.
func New(cfg Config, deps Deps, log *slog.Logger, reg prometheus.Registerer) (*Gateway, error) {
	g := &Gateway{
		cfg: cfg, deps: deps, log: log, answers: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_enrolment_requests_total",
			Help: "Requests of devices that enrol, by door, operation and answer. coaphub_enrolments_total has the reasons.",
		}, []string{"door", "operation", "answer"}), opening: admission.NewQueue(maxOpening, openQueue, openPatience),
		listing: admission.NewQueue(maxLists, listQueue, openPatience),
		crowd:   networks{most: cfg.API.CoAP.MaxConnectionsPerNetwork},
	}
	var err error
	if g.proxies, err = newProxies(cfg.API.HTTP.Proxies); err != nil {
		return nil, err
	}
	if len(cfg.TLS.CASets) > 0 {
		sets, err := revocation.ReadSets(cfg.TLS.CASets)
		if err != nil {
			return nil, fmt.Errorf("enrolmentGateway.tls.%w", err)
		}
		if g.revocation, err = revocation.New(sets, deps.Lists, log, prometheus.WrapRegistererWith(prometheus.Labels{"part": "enrolment-gateway"}, reg)); err != nil {
			return nil, fmt.Errorf("enrolmentGateway.tls.caSets: %w", err)
		}
	}
	if reg != nil {
		reg.MustRegister(g.answers)
	}
	ec := coap.DefaultConfig()
	ec.MaxConnections = cfg.API.CoAP.MaxConnections
	ec.MaxMessageSize, ec.MaxBody = 64<<10, maxBody
	ec.MaxSilence = idleTime
	ec.MaxBuffered = 32 << 20
	ec.Refused = func(remote net.Addr, reason, detail string) {
		switch {
		case detail == errCrowded.Error(): // as over HTTPS
			reason = detail
		case detail != "":
			reason += ": " + detail
		}
		deps.Refused(remote, reason)
	}
	g.engine = coap.NewServer(ec, g, log, deps.EngineMetrics)
	g.tls = &tls.Config{
		MinVersion:             tls.VersionTLS12,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return deps.Certificate() },
		SessionTicketsDisabled: true, // a resumed session would bring a certificate past today's groups
		// Asked for and not demanded: a device with a one-time token has none.
		ClientAuth: tls.RequestClientCert,
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return nil
			}
			return deps.Authority.Vouch(context.Background(), s.PeerCertificates)
		},
	}
	return g, nil
}

// Run calls ready and serves until ctx ends; then everything it started has ended.
func (g *Gateway) Run(ctx context.Context, ready func()) error {
	group, ctx := errgroup.WithContext(ctx)
	if g.deps.CoAP != nil {
		conf := g.tls.Clone()
		conf.NextProtos = []string{"coap"} // RFC 8323, Section 8.2
		group.Go(func() error { return g.engine.ServeTCP(ctx, g.deps.CoAP, conf) })
	}
	if g.deps.DTLS != nil {
		group.Go(func() error { return g.engine.ServeDTLS(ctx, g.deps.DTLS, g.dtlsConfig()) })
	}
	if g.deps.HTTP != nil {
		conf := g.tls.Clone()
		conf.NextProtos = []string{"http/1.1"} // a device asks one thing at a time
		conf.VerifyConnection = func(s tls.ConnectionState) error {
			if g.proxies.include(&s) {
				return nil
			}
			return g.tls.VerifyConnection(s)
		}
		conf.GetConfigForClient = g.refusing(conf.Clone())
		http := g.cfg.API.HTTP
		ln := tls.NewListener(&fairListener{
			Listener: netutil.LimitListener(g.deps.HTTP, http.MaxConnections),
			networks: &networks{most: http.MaxConnectionsPerNetwork}, refused: g.deps.Refused,
		}, conf)
		group.Go(func() error { return obs.ServeHTTP(ctx, ln, g.handler(), time.Second, g.log, func() {}) })
	}
	if g.deps.Socket != nil {
		ln := netutil.LimitListener(g.deps.Socket, g.cfg.API.HTTP.MaxConnections)
		group.Go(func() error { return obs.ServeHTTP(ctx, ln, g.handler(), time.Second, g.log, func() {}) })
	}
	if g.revocation != nil {
		group.Go(func() error { return g.revocation.Run(ctx, func() {}) })
	}
	group.Go(func() error { <-ctx.Done(); return nil }) // also with no listener at all
	ready()
	if err := group.Wait(); err != nil {
		return fmt.Errorf("serve enrolment: %w", err)
	}
	return nil
}

// refusing has who was refused for his certificate be told of; the engine does that for CoAP, and net/http does not.
func (g *Gateway) refusing(conf *tls.Config) func(*tls.ClientHelloInfo) (*tls.Config, error) {
	return func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		own := conf.Clone()
		own.VerifyConnection = func(s tls.ConnectionState) error {
			err := conf.VerifyConnection(s)
			if err != nil {
				g.deps.Refused(hello.Conn.RemoteAddr(), "handshake-failed: "+err.Error())
			}
			return err
		}
		return own, nil
	}
}

func (g *Gateway) dtlsConfig() coap.DTLSConfig {
	conf := coap.DefaultDTLSConfig()
	conf.AnyCertificate = true
	conf.Credentials = func() (tls.Certificate, *x509.CertPool, error) {
		cert, err := g.deps.Certificate()
		if err != nil {
			return tls.Certificate{}, nil, err
		}
		return *cert, nil, nil
	}
	if g.deps.PSK != nil {
		conf.PSK = coap.DeviceKeys(g.deps.PSK)
	}
	conf.Verify = func(peer coap.PeerCredential) error {
		if peer.PSKIdentity != nil || len(peer.Chain) == 0 {
			return nil
		}
		err := g.deps.Authority.Vouch(context.Background(), peer.Chain)
		if code, _ := hub.Public(err); err != nil && code == "certificate-revoked" {
			return coap.ErrRevoked // which has an alert of its own
		}
		return err
	}
	return conf
}

// count is called for each answer.
func (g *Gateway) count(door, operation, answer string) {
	g.answers.WithLabelValues(door, operation, answer).Inc()
}
