package bundle

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	enrolmentgateway "github.com/coaphub/coaphub/enrolment-gateway"
	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/audit"
	"github.com/coaphub/coaphub/internal/auth"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/coap"
	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/quarantine"
	"github.com/coaphub/coaphub/internal/revocation"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/jetfeed"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// assembly is the parts of one process, put together and not started yet. What does not run here is nil.
type assembly struct {
	cfg         Config
	folder      *Folder
	log         *slog.Logger
	registry    *prometheus.Registry
	health      *obs.Health
	build       obs.Build
	started     time.Time
	terminal    bool
	hubID       string
	instance    string // of this process: it names what it writes, and its parts on the bus
	external    string // host
	httpAt      string // where the HTTP door listens, here or elsewhere
	httpURL     string // base address of the HTTP door
	grpcAddress string // where gRPC is reached
	first       firstLogin

	pebble    *pebblestore.Store // nil in a cluster
	store     store.Store
	closers   []io.Closer     // of the store, what was opened first in front
	documents store.Documents // of the store, but secrets are files, or sealed
	audit     *audit.Log
	bus       *bus.Bus                // nil: the parts call each other
	members   map[string]*bus.Members // of the parts that run here

	// The parts that others ask: as they run here, what answers for them on the bus and asks there, and which of the two others have.
	directories        *resourcedirectory.Directory
	sessions           *resourcedirectory.Client
	directory          directory
	identityStore      *identitystore.Store
	answersIdentities  *bus.Server
	identityClient     *identitystore.Client
	identities         identities
	authorityKeys      *certificateauthority.Authority
	certificateService *certificateauthority.Service
	certificateClient  *certificateauthority.Client
	authority          authority
	certificates       certificates
	factories          *revocation.Checker // nil where the door for enrolment has it
	trusting           sync.Mutex          // held by who has the gateway believe the authority
	rolling            sync.Mutex          // held by who changes the authority, until all use what there is then

	background sync.WaitGroup // what runs before the parts do, until stop
	stop       context.CancelFunc

	quarantine  *quarantine.Store
	provider    *oauthserver.Server // nil with external providers
	providers   []coapgateway.NamedProvider
	clients     []*auth.Client // of external providers
	verifier    *auth.Verifier
	psk         *preShared
	certificate func() (*tls.Certificate, error) // of the hub, towards devices
	engine      *coap.Metrics
	devices     *coapgateway.Gateway
	doors       gateways
	apps        *grpcgateway.Gateway
	enrol       *enrolmentgateway.Gateway

	enrolCoAP, enrolHTTP, enrolSocket net.Listener // nil: none
	enrolDTLS                         net.PacketConn

	listeners  []io.Closer  // all of them
	admin      net.Listener // nil: none
	http, grpc net.Listener
}

// firstLogin is the first account, and its one-time password if this start made one.
type firstLogin struct{ name, password string }

// wire makes the parts that run here, and hands each the others: themselves, or what reaches them over the bus. It is the only function
// that knows who runs where. What it opened is closed again when it fails.
func wire(ctx context.Context, cfg Config, folder *Folder, o Options, log *slog.Logger) (_ *assembly, err error) {
	a := &assembly{
		cfg: cfg, folder: folder, log: log, health: &obs.Health{}, build: obs.ReadBuild(o.Version), started: time.Now(),
		terminal: o.Terminal, external: externalHost(cfg.ExternalAddress),
		// The same all along, another one after each start.
		instance: uuid.NewString(),
	}
	a.doors = gateways{a}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	a.registry = obs.NewRegistry(a.build)
	steps := []func(context.Context) error{
		a.listenAll, // addresses first: a port that is taken is found before anything was opened
		a.openStore,
		a.wireDirectory,
	}
	if !slices.Equal(cfg.Target, []string{TargetResourceDirectory}) {
		steps = append(steps,
			a.wireIdentities,
			a.wireCertificates,
			a.wireProvider,
			a.wireSecrets,
			a.wireDevices,
			a.wireEnrolment,
			a.wireApps,
		)
	} else if admin := cfg.Admin.API.HTTP.Address; admin != "" && !loopback(admin) {
		// It asks nobody, but for the certificate of its probes.
		steps = append(steps, a.wireCertificates)
	}
	for _, step := range steps {
		if err := step(ctx); err != nil {
			return nil, err
		}
	}
	return a, nil
}

func (a *assembly) listenAll(ctx context.Context) (err error) {
	if address := a.cfg.Admin.API.HTTP.Address; address != "" {
		if a.admin, err = a.listen(ctx, address, "--admin-address", "admin.api.http.address"); err != nil {
			return err
		}
	}
	http, grpc := &a.cfg.GRPCGateway.API.HTTP, &a.cfg.GRPCGateway.API.GRPC
	httpAt, grpcAt := http.Address, grpc.Address // of the processes that listen there, if this one does not
	if a.cfg.Runs(TargetGRPCGateway) {
		if a.http, err = a.listen(ctx, http.Address, "--http-address", "grpcGateway.api.http.address"); err != nil {
			return err
		}
		if a.grpc, err = a.listen(ctx, grpc.Address, "--grpc-address", "grpcGateway.api.grpc.address"); err != nil {
			return err
		}
		httpAt, grpcAt = a.http.Addr().String(), a.grpc.Addr().String()
	}
	a.httpURL, a.grpcAddress = a.url(httpAt, http.TLS), reach(grpcAt, a.external)
	a.httpAt = httpAt
	if a.cfg.Runs(TargetEnrolmentGateway) {
		return a.listenForEnrolment(ctx)
	}
	return nil
}

// openStore opens what is durable, and all that is kept there and needs no other part.
func (a *assembly) openStore(ctx context.Context) (err error) {
	if err := os.RemoveAll(a.folder.sub(scratchFolder)); err != nil {
		return fmt.Errorf("empty the scratch folder: %w", err)
	}
	if a.cfg.Shared() {
		err = a.openShared(ctx)
	} else {
		err = a.openOwn(ctx)
	}
	if err != nil {
		return err
	}
	a.health.Check("store", func(ctx context.Context) error {
		_, err := a.store.Head(ctx) // an error once the disk failed for good
		return err
	})
	a.audit, err = audit.Open(ctx, a.store, a.log.With("part", "audit"), a.registry)
	return err
}

// openOwn opens the store in the data folder.
func (a *assembly) openOwn(ctx context.Context) (err error) {
	if err := removeFile(a.folder.sub(fromFile)); err != nil { // whoever was copying it has an old picture from here on
		return err
	}
	if a.pebble, err = openPebble(a.folder, a.cfg.Store, a.log.With("part", "store"), a.registry); err != nil {
		return err
	}
	a.store = a.pebble
	a.closers = append(a.closers, a.pebble)
	a.documents = &withSecrets{Documents: a.store, dir: a.folder.sub(keysFolder)}
	if a.hubID, err = hubID(ctx, a.store); err != nil {
		return err
	}
	return a.connect()
}

// openShared opens the store of a cluster. It waits for its servers, and says so.
func (a *assembly) openShared(ctx context.Context) (err error) {
	id, err := hub.ParseDeviceID(a.cfg.Cluster.HubID)
	if err != nil {
		return err
	}
	a.hubID = string(id)
	if err := a.connect(); err != nil {
		return err
	}
	feed, err := waited(ctx, a.log, "the NATS servers with JetStream", func(ctx context.Context) (*jetfeed.Feed, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second) // it waits as long as it may, and does not say so
		defer cancel()
		return jetfeed.Open(ctx, a.cfg.Store.Feed, jetfeed.Options{
			Bus: a.cfg.Bus, HubID: a.hubID, Name: a.processName(), Log: a.log.With("part", "feed"), Registerer: a.registry,
		})
	})
	if err != nil {
		return err
	}
	a.closers = append(a.closers, feed)
	a.health.Check("feed", feed.Health)
	s, err := waited(ctx, a.log, "MongoDB", func(ctx context.Context) (*mongostore.Store, error) {
		return mongostore.Open(ctx, a.cfg.Store.MongoDB, mongostore.Options{
			HubID: a.hubID, ClusterSecret: a.cfg.Cluster.Secret, Feed: feed, Log: a.log.With("part", "store"), Registerer: a.registry,
			Name: a.processName(),
		})
	})
	if err != nil {
		return err
	}
	a.store = s
	a.closers = append(a.closers, s)
	a.documents, err = sealed(s, a.cfg.Cluster.Secret, a.hubID)
	return err
}

// waited opens something on servers, again while they are away, until ctx ends.
func waited[T any](ctx context.Context, log *slog.Logger, what string, open func(context.Context) (T, error)) (T, error) {
	for {
		began := time.Now()
		v, err := open(ctx)
		if err == nil || !hub.IsKind(err, hub.Unavailable) || ctx.Err() != nil {
			return v, err
		}
		log.Warn("the start waits for "+what, "error", err)
		select {
		case <-time.After(max(0, time.Second-time.Since(began))):
		case <-ctx.Done():
			return v, err
		}
	}
}

func (a *assembly) wireDirectory(context.Context) (err error) {
	log := a.log.With("part", "resource-directory")
	var reader *resourcedirectory.Reader
	if a.cfg.Runs(TargetResourceDirectory) {
		if a.directories, err = resourcedirectory.New(a.directoryConfig(), a.store, log, a.registry, a.instance); err != nil {
			return err
		}
		a.directory, reader = a.directories, a.directories.Reader
	} else if reader, err = resourcedirectory.NewReader(a.store, a.registry); err != nil {
		return err
	}
	if a.bus == nil {
		return nil
	}
	if a.directories != nil {
		a.directories.Apart(a.bus, a.members[TargetResourceDirectory], a.instance)
	}
	sessions := ""
	if a.cfg.Runs(TargetCoAPGateway) {
		sessions = a.instance
	}
	a.sessions = resourcedirectory.NewClient(a.bus, reader, sessions, a.members[TargetCoAPGateway], log)
	a.directory = a.sessions
	return nil
}

func (a *assembly) wireIdentities(ctx context.Context) (err error) {
	log, cfg := a.log.With("part", "identity-store"), a.cfg.IdentityStore
	// Former owners look for their events as long as there are any.
	cfg.Retention = max(cfg.Retention, a.cfg.ResourceDirectory.History.Retention)
	if a.cfg.Runs(TargetIdentityStore) {
		if a.identityStore, err = identitystore.New(ctx, cfg, a.store, a.directory, log, a.registry); err != nil {
			return err
		}
		a.identities = a.identityStore
		if a.bus != nil {
			if a.answersIdentities, err = a.identityStore.Serve(ctx, a.bus, log); err != nil {
				return err
			}
		}
		a.identityStore.EndCredentials(a.endCredentials)
	}
	if a.bus != nil {
		a.identityClient = identitystore.NewClient(cfg, a.bus, log)
		a.identities = a.identityClient
	}
	in := a.identities.Quarantined
	if a.identityStore != nil {
		in = a.identityStore.Quarantined
	}
	if a.quarantine, err = quarantine.Open(ctx, a.store, in, a.registry); err != nil {
		return err
	}
	if a.identityStore != nil {
		a.identityStore.Released(a.quarantine.Discard)
	}
	return nil
}

func (a *assembly) wireCertificates(ctx context.Context) error {
	if a.cfg.Runs(TargetCertificateAuthority) {
		if err := a.openAuthority(ctx); err != nil {
			return err
		}
	}
	if a.bus == nil {
		return nil
	}
	log := a.log.With("part", "certificate-authority")
	if a.certificateService != nil {
		// The parts of this process need certificates before they run.
		if err := a.wireFactories(); err != nil { // before anybody can ask
			return err
		}
		hosts := []string{a.external}
		if h, _, err := net.SplitHostPort(a.cfg.CoAPGateway.API.CoAP.ExternalAddress); err == nil && h != "" {
			hosts = append(hosts, h)
		}
		server := certificateauthority.NewServer(a.bus, a.certificateService, hosts, log)
		ready := make(chan struct{})
		failed := make(chan error, 1)
		a.inBackground(func(ctx context.Context) { failed <- server.Run(ctx, func() { close(ready) }) })
		select {
		case <-ready:
		case err := <-failed:
			return fmt.Errorf("the authority cannot be asked: %w", err)
		}
	}
	c, err := waited(ctx, log, "a certificate-authority", func(ctx context.Context) (*certificateauthority.Client, error) {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		return certificateauthority.NewClient(ctx, a.bus, log)
	})
	if err != nil {
		return err
	}
	a.certificateClient, a.certificates, a.authority = c, c, c
	c.Changed(func() {
		if a.devices == nil {
			return
		}
		if err := a.trust(); err != nil {
			log.Error("devices' certificates are believed as before", "error", err)
		}
	})
	return nil
}

// openAuthority opens the authority with its keys.
func (a *assembly) openAuthority(ctx context.Context) (err error) {
	lists := ""
	if own := a.cfg.GRPCGateway.API.HTTP.TLS && loopback(net.JoinHostPort(a.external, "0")); a.cfg.ExternalAddress != "" && (own || !loopback(a.httpAt)) {
		// Else nobody but this machine knows where the hub is.
		lists = a.httpURL
	}
	if a.authorityKeys, err = certificateauthority.OpenWith(a.folder.sub(keysFolder), a.hubID, nil, lists); err != nil {
		return fmt.Errorf("certification authorities: %w", err)
	}
	a.certificateService, err = certificateauthority.NewService(
		ctx, a.authorityKeys, a.store, a.identities, lists, a.log.With("part", "certificate-authority"), a.registry)
	if err != nil {
		return fmt.Errorf("certification authorities: %w", err)
	}
	a.authority, a.certificates = a.authorityKeys, a.certificateService
	sealing, err := secretKey(ctx, a.documents, "enrolment")
	if err != nil {
		return err
	}
	return a.certificateService.Secret(sealing)
}

// denied is Identities.Denied, and does not let anybody in while nobody knows what was revoked.
func (a *assembly) denied(dev hub.DeviceID, chain []*x509.Certificate) error {
	err := a.identities.Denied(dev, chain)
	if err == nil && a.certificateClient != nil {
		err = a.certificateClient.Behind()
	}
	return err
}

func (a *assembly) wireProvider(ctx context.Context) (err error) {
	if a.providers, err = a.authorization(ctx); err != nil {
		return err
	}
	return a.keepFirstLogin(ctx)
}

// wireSecrets makes what is derived from the hub's secrets.
func (a *assembly) wireSecrets(ctx context.Context) error {
	secret, err := secretKey(ctx, a.documents, "psk")
	if err != nil {
		return err
	}
	a.psk = &preShared{a.documents, secret}
	a.certificate, err = a.hubCertificate()
	return err
}

func (a *assembly) wireDevices(context.Context) (err error) {
	a.engine = coap.NewMetrics(a.registry)
	if !a.cfg.Runs(TargetCoAPGateway) {
		return nil
	}
	cfg := a.cfg.CoAPGateway
	if cfg.API.CoAP.Authorization.DeviceIDClaim == "" && !a.cfg.Embedded() {
		cfg.API.CoAP.Authorization.DeviceIDClaim = a.cfg.Authorization.DeviceIDClaim
	}
	var turns func(context.Context, string, hub.DeviceID) (coapgateway.Turns, error)
	if a.bus != nil {
		turns = a.doors.turns
	}
	a.devices, err = coapgateway.New(cfg, coapgateway.Deps{
		Directory: a.directory, Identities: a.identities, Verifier: a.verifier, Providers: a.providers,
		Certificate: a.certificate, ClientCAs: a.authority.DevicePool(), ClientIntermediates: a.authority.DeviceIntermediates(),
		ClientRoots: a.authority.DeviceRoots(), PSK: a.psk.key, Revoked: a.certificates.Revoked, Denied: a.denied, Quarantine: a.quarantine, HandedOver: a.handedOver, Rivals: a.rivals, Turns: turns,
		HubID: hub.DeviceID(a.hubID), Service: a.instance, Bus: a.bus, EngineMetrics: a.engine, Renewals: a.certificates,
		Lists: a.folder.sub(listsFolder),
		Reach: func(address string) string { return reach(address, a.external) },
	}, a.log.With("part", "coap-gateway"), a.registry)
	if err != nil {
		return err
	}
	a.certificates.Ended(a.devices.EndCertificate)
	a.identities.Barred(a.devices.EndDenied)
	a.identities.KeysEnded(a.devices.EndKey)
	return nil
}

func (a *assembly) wireEnrolment(context.Context) (err error) {
	if !a.cfg.Runs(TargetEnrolmentGateway) {
		return nil
	}
	a.enrol, err = enrolmentgateway.New(a.cfg.EnrolmentGateway, enrolmentgateway.Deps{
		Authority: a.certificates, Registrar: a.authority.Registrar(), Certificate: a.certificate, PSK: a.enrolmentKey, EngineMetrics: a.engine,
		HubID: hub.DeviceID(a.hubID), Cloud: a.cloud, Lists: a.folder.sub(filepath.Join(listsFolder, "enrolment")),
		Refused: func(remote net.Addr, reason string) {
			if a.devices != nil {
				a.devices.Refuse(coapgateway.Refusal{Remote: remote.String(), What: "enrolment", Reason: reason})
			}
		},
		CoAP: a.enrolCoAP, DTLS: a.enrolDTLS, HTTP: a.enrolHTTP, Socket: a.enrolSocket,
	}, a.log.With("part", "enrolment-gateway"), a.registry)
	if err != nil {
		return err
	}
	if a.certificateService != nil && a.bus == nil {
		a.certificateService.Factories(a.enrol.Revocation())
	}
	return nil
}

// wireFactories gives the authority what manufacturers have revoked, where the door that asks it, too, may be in another process.
func (a *assembly) wireFactories() error {
	sources := a.cfg.EnrolmentGateway.TLS.CASets
	if len(sources) == 0 {
		return nil
	}
	sets, err := revocation.ReadSets(sources)
	if err != nil {
		return fmt.Errorf("enrolmentGateway.tls.caSets: %w", err)
	}
	a.factories, err = revocation.New(sets, a.folder.sub(filepath.Join(listsFolder, "authority")), a.log.With("part", "certificate-authority"),
		prometheus.WrapRegistererWith(prometheus.Labels{"part": TargetCertificateAuthority}, a.registry))
	if err != nil {
		return fmt.Errorf("enrolmentGateway.tls.caSets: %w", err)
	}
	a.certificateService.Factories(a.factories)
	return nil
}

func (a *assembly) wireApps(ctx context.Context) error {
	if !a.cfg.Runs(TargetGRPCGateway) {
		return nil
	}
	https, err := a.httpsConfig()
	if err != nil {
		return err
	}
	// It signs the cursors of lists, so that a client goes on where it was, also after a restart.
	cursors, err := secretKey(ctx, a.documents, "cursor")
	if err != nil {
		return err
	}
	pages, err := a.pages()
	if err != nil {
		return err
	}
	a.apps, err = grpcgateway.New(a.cfg.GRPCGateway, grpcgateway.Deps{
		Directory: a.directory, Identities: a.identities, Verifier: a.verifier, HubID: a.hubID, HubInfo: a.hubInfo,
		Administration: administration{a}, Onboarding: onboarder{a}, Connections: connections{a}, System: system{a}, Certificates: a.certificates, Enrolments: enrolments{a.certificates, a}, PreSharedKeys: deviceKeys{a}, Quarantine: keptWrites{a}, Audit: a.audit,
		Hosts: []string{a.external}, Pages: pages, TLS: https, Listen: a.opened, CursorKey: cursors,
	}, a.log.With("part", "grpc-gateway"), a.registry)
	return err
}

// inBackground runs f from now until the assembly is closed, which is after all parts have ended.
func (a *assembly) inBackground(f func(context.Context)) {
	ctx, stop := context.WithCancel(context.Background())
	a.stop = stop
	a.background.Go(func() { f(ctx) })
}

func (a *assembly) listen(ctx context.Context, address, flag, key string) (net.Listener, error) {
	ln, err := listen(ctx, address, flag, key)
	if err == nil {
		a.listeners = append(a.listeners, ln)
	}
	return ln, err
}

// opened hands out the listeners of the applications' door, which were opened first; HTTP is asked for first.
func (a *assembly) opened(_ context.Context, address string) (net.Listener, error) {
	for _, ln := range []*net.Listener{&a.http, &a.grpc} {
		if *ln != nil {
			out := *ln
			*ln = nil
			return out, nil
		}
	}
	return nil, fmt.Errorf("no listener was opened for %s", address)
}

// close closes what outlives the parts.
func (a *assembly) close() error {
	if a.stop != nil {
		a.stop()
		a.background.Wait()
	}
	for _, ln := range a.listeners {
		_ = ln.Close() // most are closed already; a part that never ran left its own
	}
	if a.verifier != nil {
		a.verifier.Close()
	}
	for _, c := range a.clients {
		c.Close()
	}
	var errs []error
	for _, c := range slices.Backward(a.closers) {
		if err := c.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close the store: %w", err))
		}
	}
	if a.bus != nil {
		a.bus.Close()
	}
	return errors.Join(errs...)
}

func openPebble(folder *Folder, cfg StoreConfig, log *slog.Logger, reg prometheus.Registerer) (*pebblestore.Store, error) {
	minFree := int64(cfg.MinFree)
	if minFree == 0 {
		minFree = -1 // zero in the file means never refuse; zero in the options means their default
	}
	return pebblestore.Open(folder.sub(storeFolder), pebblestore.Options{
		Log: log, Registerer: reg, MinFree: minFree, CacheBytes: int64(cfg.Cache),
	})
}

// The hub's ID is a document, so that it goes with the data and into backups.
const (
	hubCollection = "hub"
	hubIDKey      = "id"
)

// hubID reads the hub's ID, and makes one in a new store.
func hubID(ctx context.Context, docs store.Documents) (string, error) {
	doc, err := docs.Get(ctx, hubCollection, hubIDKey)
	if err == nil && doc.Rev == 0 {
		doc = store.Doc{Key: hubIDKey, Value: []byte(uuid.NewString())}
		_, err = docs.Put(ctx, hubCollection, doc)
	}
	if err != nil {
		return "", fmt.Errorf("the hub's ID: %w", err)
	}
	if _, err := hub.ParseDeviceID(string(doc.Value)); err != nil {
		return "", &hub.Error{Kind: hub.Internal, Code: "data-damaged", Text: "the hub's ID in the store is damaged", Err: err}
	}
	return string(doc.Value), nil
}
