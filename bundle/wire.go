package bundle

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"

	certificateauthority "github.com/coaphub/coaphub/certificate-authority"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// assembly is the parts of one process, put together and not started yet.
type assembly struct {
	cfg      Config
	folder   *Folder
	log      *slog.Logger
	registry *prometheus.Registry
	health   *obs.Health
	build    obs.Build
	started  time.Time
	terminal bool
	hubID    string
	external string // host
	first    firstLogin

	store     *pebblestore.Store
	authority *certificateauthority.Authority

	listeners []net.Listener // closed when wiring fails; afterwards by whoever serves them
	admin     net.Listener   // nil: none
}

// firstLogin is the first account, on the hub's first start only.
type firstLogin struct{ name, password string }

// wire makes all parts. It is the only function that knows who runs where: everything in this process, so that each part is
// handed the others themselves. What it opened is closed again when it fails.
func wire(ctx context.Context, cfg Config, folder *Folder, o Options, log *slog.Logger) (a *assembly, err error) {
	a = &assembly{
		cfg: cfg, folder: folder, log: log, health: &obs.Health{}, build: obs.ReadBuild(o.Version), started: time.Now(),
		terminal: o.Terminal, external: externalHost(cfg.ExternalAddress),
	}
	defer func() {
		if err != nil {
			for _, ln := range a.listeners {
				_ = ln.Close()
			}
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

	if err := os.RemoveAll(folder.sub(scratchFolder)); err != nil {
		return nil, fmt.Errorf("empty the scratch folder: %w", err)
	}
	if a.store, err = openStore(folder, cfg.Store, log.With("part", "store"), a.registry); err != nil {
		return nil, err
	}
	if a.hubID, err = hubID(ctx, a.store); err != nil {
		return nil, err
	}
	if a.authority, err = certificateauthority.Open(folder.sub(keysFolder), a.hubID); err != nil {
		return nil, fmt.Errorf("certification authorities: %w", err)
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

// close closes what outlives the parts.
func (a *assembly) close() error {
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
