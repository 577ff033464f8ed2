package bundle

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
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
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// assembly is the parts of one process, put together and not started yet.
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
	external    string // host
	httpURL     string // base address of the HTTP door
	grpcAddress string // where gRPC is reached
	first       firstLogin

	store         *pebblestore.Store
	documents     store.Documents // of the store, but secrets are files
	authority     *certificateauthority.Authority
	rolling       sync.Mutex // held by who changes it, until all use what there is then
	certificates  *certificateauthority.Service
	audit         *audit.Log
	bus           *bus.Bus       // nil: the parts call each other
	members       []*bus.Members // of the parts that run here
	directories   *resourcedirectory.Directory
	remote        *resourcedirectory.Client // nil without a bus
	directory     directory                 // one of them
	identityStore *identitystore.Store
	answers       *bus.Server           // for it; nil without a bus
	knows         *identitystore.Client // nil without a bus
	identities    identities            // one of them
	quarantine    *quarantine.Store
	provider      *oauthserver.Server // nil with external providers
	clients       []*auth.Client      // of external providers
	verifier      *auth.Verifier
	psk           *preShared
	devices       *coapgateway.Gateway
	apps          *grpcgateway.Gateway

	enrol *enrolmentgateway.Gateway

	enrolCoAP, enrolHTTP, enrolSocket net.Listener // nil: none
	enrolDTLS                         net.PacketConn

	listeners  []io.Closer  // all of them
	admin      net.Listener // nil: none
	http, grpc net.Listener
}

// firstLogin is the first account, and its one-time password if this start made one.
type firstLogin struct{ name, password string }

// wire makes all parts. It is the only function that knows who runs where: everything in this process, so that each part is
// handed the others themselves. What it opened is closed again when it fails.
func wire(ctx context.Context, cfg Config, folder *Folder, o Options, log *slog.Logger) (_ *assembly, err error) {
	a := &assembly{
		cfg: cfg, folder: folder, log: log, health: &obs.Health{}, build: obs.ReadBuild(o.Version), started: time.Now(),
		terminal: o.Terminal, external: externalHost(cfg.ExternalAddress),
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.close())
		}
	}()
	a.registry = obs.NewRegistry(a.build)

	// Addresses first: a port that is taken is found before anything was opened.
	if address := cfg.Admin.API.HTTP.Address; address != "" {
		if a.admin, err = a.listen(ctx, address, "--admin-address", "admin.api.http.address"); err != nil {
			return nil, err
		}
	}

	if a.http, err = a.listen(ctx, cfg.GRPCGateway.API.HTTP.Address, "--http-address", "grpcGateway.api.http.address"); err != nil {
		return nil, err
	}
	if a.grpc, err = a.listen(ctx, cfg.GRPCGateway.API.GRPC.Address, "--grpc-address", "grpcGateway.api.grpc.address"); err != nil {
		return nil, err
	}
	a.httpURL, a.grpcAddress = a.url(a.http.Addr().String(), cfg.GRPCGateway.API.HTTP.TLS), reach(a.grpc.Addr().String(), a.external)

	if err := a.listenForEnrolment(ctx); err != nil {
		return nil, err
	}

	if err := os.RemoveAll(folder.sub(scratchFolder)); err != nil {
		return nil, fmt.Errorf("empty the scratch folder: %w", err)
	}
	if a.store, err = openStore(folder, cfg.Store, log.With("part", "store"), a.registry); err != nil {
		return nil, err
	}
	a.health.Check("store", func(ctx context.Context) error {
		_, err := a.store.Head(ctx) // an error once the disk failed for good
		return err
	})
	if a.hubID, err = hubID(ctx, a.store); err != nil {
		return nil, err
	}
	lists := ""
	at := a.http.Addr().String()
	if own := cfg.GRPCGateway.API.HTTP.TLS && loopback(net.JoinHostPort(a.external, "0")); cfg.ExternalAddress != "" && (own || !loopback(at)) {
		// Else nobody but this machine knows where the hub is.
		lists = a.httpURL
	}
	if a.authority, err = certificateauthority.OpenWith(folder.sub(keysFolder), a.hubID, nil, lists); err != nil {
		return nil, fmt.Errorf("certification authorities: %w", err)
	}
	a.documents = &withSecrets{Documents: a.store, dir: folder.sub(keysFolder)}

	if a.audit, err = audit.Open(ctx, a.store, log.With("part", "audit"), a.registry); err != nil {
		return nil, err
	}
	// The same writer all along, another one after each start.
	writer := uuid.NewString()
	if a.directories, err = resourcedirectory.New(a.directoryConfig(), a.store, log.With("part", "resource-directory"), a.registry, writer); err != nil {
		return nil, err
	}
	a.directory = a.directories
	if err := a.apart(writer); err != nil {
		return nil, err
	}
	// Former owners look for their events as long as there are any.
	cfg.IdentityStore.Retention = max(cfg.IdentityStore.Retention, cfg.ResourceDirectory.History.Retention)
	if a.identityStore, err = identitystore.New(ctx, cfg.IdentityStore, a.store, a.directory, log.With("part", "identity-store"), a.registry); err != nil {
		return nil, err
	}
	a.identities = a.identityStore
	if a.bus != nil {
		if err := a.askForIdentities(ctx, cfg.IdentityStore); err != nil {
			return nil, err
		}
	}
	if a.quarantine, err = quarantine.Open(ctx, a.store, a.identityStore.Quarantined, a.registry); err != nil {
		return nil, err
	}
	a.identityStore.Released(a.quarantine.Discard)
	a.certificates, err = certificateauthority.NewService(ctx, a.authority, a.store, a.identities, lists, log.With("part", "certificate-authority"), a.registry)
	if err != nil {
		return nil, fmt.Errorf("certification authorities: %w", err)
	}
	providers, err := a.authorization(ctx)
	if err != nil {
		return nil, err
	}
	if err := a.keepFirstLogin(ctx); err != nil {
		return nil, err
	}
	certificate, err := a.hubCertificate()
	if err != nil {
		return nil, err
	}
	gatewayConfig := cfg.CoAPGateway
	if gatewayConfig.API.CoAP.Authorization.DeviceIDClaim == "" && !a.cfg.Embedded() {
		gatewayConfig.API.CoAP.Authorization.DeviceIDClaim = cfg.Authorization.DeviceIDClaim
	}
	secret, err := secretKey(ctx, a.documents, "psk")
	if err != nil {
		return nil, err
	}
	a.psk = &preShared{a.documents, secret}
	sealing, err := secretKey(ctx, a.documents, "enrolment")
	if err != nil {
		return nil, err
	}
	if err := a.certificates.Secret(sealing); err != nil {
		return nil, err
	}
	engine := coap.NewMetrics(a.registry)
	a.devices, err = coapgateway.New(gatewayConfig, coapgateway.Deps{
		Directory: a.directory, Identities: a.identities, Verifier: a.verifier, Providers: providers,
		Certificate: certificate, ClientCAs: a.authority.DevicePool(), ClientIntermediates: a.authority.DeviceIntermediates(),
		ClientRoots: a.authority.DeviceRoots(), PSK: a.psk.key, Revoked: a.certificates.Revoked, Denied: a.identities.Denied, Quarantine: a.quarantine, HandedOver: a.handedOver, Rivals: a.rivals,
		HubID: hub.DeviceID(a.hubID), Service: writer, EngineMetrics: engine, Renewals: a.certificates,
		Lists: folder.sub(listsFolder),
		Reach: func(address string) string { return reach(address, a.external) },
	}, log.With("part", "coap-gateway"), a.registry)
	if err != nil {
		return nil, err
	}
	a.certificates.Ended(a.devices.EndCertificate)
	a.identities.Barred(a.devices.EndDenied)
	a.identityStore.EndCredentials(a.endCredentials)
	a.enrol, err = enrolmentgateway.New(cfg.EnrolmentGateway, enrolmentgateway.Deps{
		Authority: a.certificates, Registrar: a.authority.Registrar(), Certificate: certificate, PSK: a.psk.key, EngineMetrics: engine,
		HubID: hub.DeviceID(a.hubID), Cloud: a.cloud, Lists: folder.sub(filepath.Join(listsFolder, "enrolment")),
		Refused: func(remote net.Addr, reason string) {
			a.devices.Refuse(coapgateway.Refusal{Remote: remote.String(), What: "enrolment", Reason: reason})
		},
		CoAP: a.enrolCoAP, DTLS: a.enrolDTLS, HTTP: a.enrolHTTP, Socket: a.enrolSocket,
	}, log.With("part", "enrolment-gateway"), a.registry)
	if err != nil {
		return nil, err
	}
	a.certificates.Factories(a.enrol.Revocation())
	https, err := a.httpsConfig()
	if err != nil {
		return nil, err
	}
	// It signs the cursors of lists, so that a client goes on where it was, also after a restart.
	cursors, err := secretKey(ctx, a.documents, "cursor")
	if err != nil {
		return nil, err
	}
	a.apps, err = grpcgateway.New(cfg.GRPCGateway, grpcgateway.Deps{
		Directory: a.directory, Identities: a.identities, Verifier: a.verifier, HubID: a.hubID, HubInfo: a.hubInfo,
		Administration: administration{a}, Certificates: a.certificates, Enrolments: enrolments{a.certificates, a}, PreSharedKeys: deviceKeys{a}, Quarantine: keptWrites{a}, Audit: a.audit,
		Hosts: []string{a.external}, Pages: a.pages(), TLS: https, Listen: a.opened, CursorKey: cursors,
	}, log.With("part", "grpc-gateway"), a.registry)
	if err != nil {
		return nil, err
	}
	return a, nil
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
	for _, ln := range a.listeners {
		_ = ln.Close() // most are closed already; a part that never ran left its own
	}
	if a.verifier != nil {
		a.verifier.Close()
	}
	if a.bus != nil {
		a.bus.Close()
	}
	for _, c := range a.clients {
		c.Close()
	}
	if a.store == nil {
		return nil
	}
	if err := a.store.Close(); err != nil {
		return fmt.Errorf("close the store: %w", err)
	}
	return nil
}

func openStore(folder *Folder, cfg StoreConfig, log *slog.Logger, reg prometheus.Registerer) (*pebblestore.Store, error) {
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
