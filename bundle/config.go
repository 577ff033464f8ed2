package bundle

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"

	coapgateway "github.com/coaphub/coaphub/coap-gateway"
	enrolmentgateway "github.com/coaphub/coaphub/enrolment-gateway"
	grpcgateway "github.com/coaphub/coaphub/grpc-gateway"
	"github.com/coaphub/coaphub/hub"
	identitystore "github.com/coaphub/coaphub/identity-store"
	"github.com/coaphub/coaphub/internal/auth"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/obs"
	"github.com/coaphub/coaphub/internal/store/jetfeed"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	oauthserver "github.com/coaphub/coaphub/oauth-server"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// EnvPrefix is what the environment variables of keys begin with; EnvData is the data folder's and no key, nor is EnvToken,
// an access token for the command line.
const (
	EnvPrefix = "COAPHUB_"
	EnvData   = EnvPrefix + "DATA"
	EnvToken  = EnvPrefix + "TOKEN"
)

//go:generate go test -run ^TestConfigReference$ -count=1 . -update

// Config is the whole configuration: one section a part, and what is said once for all.
type Config struct {
	// Data is the data folder. It comes from --data or COAPHUB_DATA, not from the file, which may lie in it.
	Data string `yaml:"-"`
	// ExternalAddress is the host name or IP address, without port, under which devices and people reach this machine. It goes
	// into endpoints, discovery, certificates and the list of allowed Host headers. Default: the machine's first address that
	// is not loopback.
	ExternalAddress string        `yaml:"externalAddress"`
	Log             obs.LogConfig `yaml:"log"`
	Admin           AdminConfig   `yaml:"admin"`
	Store           StoreConfig   `yaml:"store"`
	// Target is which parts run in this process. Empty: all. It comes from --target, too, with commas between.
	Target []string `yaml:"target"`
	// Cluster is what the processes of one hub have in common. One machine needs none of it.
	Cluster ClusterConfig `yaml:"cluster"`
	// Bus is how the parts reach each other. Without addresses they are in one process and call each other there.
	Bus bus.Config `yaml:"bus"`

	CoAPGateway       coapgateway.Config       `yaml:"coapGateway"`
	GRPCGateway       grpcgateway.Config       `yaml:"grpcGateway"`
	EnrolmentGateway  enrolmentgateway.Config  `yaml:"enrolmentGateway"`
	ResourceDirectory resourcedirectory.Config `yaml:"resourceDirectory"`
	IdentityStore     identitystore.Config     `yaml:"identityStore"`
	OAuthServer       oauthserver.Config       `yaml:"oauthServer"`
	// Authorization says whose tokens are accepted. With issuers the embedded provider is off; without, it is the only one.
	Authorization auth.Config `yaml:"authorization"`
}

// Runs reports whether a part runs in this process.
func (c Config) Runs(target string) bool {
	return len(c.Target) == 0 || slices.Contains(c.Target, target)
}

// Embedded reports whether the hub is its own OpenID provider.
func (c Config) Embedded() bool { return len(c.Authorization.Issuers) == 0 }

// AdminConfig is the listener for probes and metrics.
type AdminConfig struct {
	API AdminAPIConfig `yaml:"api"`
}

// AdminAPIConfig is everything below admin.api.
type AdminAPIConfig struct {
	HTTP AdminHTTPConfig `yaml:"http"`
}

// AdminHTTPConfig is everything below admin.api.http.
type AdminHTTPConfig struct {
	// Address to listen on for /live, /ready and /metrics. Plain on loopback, TLS anywhere else. Empty: no such listener.
	Address string `yaml:"address"`
}

// StoreConfig is the event log's and the documents' place on the disk.
type StoreConfig struct {
	// MinFree is the free space on the disk below which writes are refused while reads go on.
	MinFree conf.Size `yaml:"minFree"`
	// Cache is the size of the cache of blocks read from the disk. Two write buffers of 8 MiB come on top; as long as they are
	// smaller the cache has the rest of their room.
	Cache conf.Size `yaml:"cache"`
	// MongoDB is where a hub is kept whose parts run in several processes. With an address in it nothing is kept in the data folder.
	MongoDB mongostore.Config `yaml:"mongodb"`
	// Feed is how the order of all events is kept on the servers of the bus, with MongoDB.
	Feed jetfeed.Config `yaml:"feed"`
}

// ClusterConfig is what no two hubs have in common.
type ClusterConfig struct {
	// HubID is the hub's own ID, a UUID; devices are told it. It never changes.
	HubID string `yaml:"hubId"`
	// Secret is at least 16 characters that only the processes of this hub know. Its secrets in the database are sealed with it.
	Secret conf.Secret `yaml:"secret"`
}

// Default is the configuration of a hub that nobody configured.
func Default() Config {
	return Config{
		Data:  "data",
		Log:   obs.DefaultLog(),
		Admin: AdminConfig{API: AdminAPIConfig{HTTP: AdminHTTPConfig{Address: "127.0.0.1:8081"}}},
		Store: StoreConfig{MinFree: 128 << 20, Cache: 8 << 20, MongoDB: mongostore.DefaultConfig(), Feed: jetfeed.DefaultConfig()},

		CoAPGateway:       coapgateway.Default(),
		GRPCGateway:       grpcgateway.Default(),
		EnrolmentGateway:  enrolmentgateway.Default(),
		ResourceDirectory: resourcedirectory.Default(),
		IdentityStore:     identitystore.Default(),
		OAuthServer:       oauthserver.Default(),
		Authorization:     auth.Default(),
	}
}

// Validate returns every mistake, each with its full path. Nil means that the configuration can be used, as far as that can
// be known before files are read and addresses bound.
func (c Config) Validate() error {
	var ps conf.Problems
	ps = append(ps, c.Log.Validate("log")...)
	if a := c.Admin.API.HTTP.Address; a != "" {
		if _, _, err := net.SplitHostPort(a); err != nil {
			ps = append(ps, conf.Problem{Path: "admin.api.http.address", Text: fmt.Sprintf("%q is not host:port", a)})
		}
	}
	if h := c.ExternalAddress; h != "" && net.ParseIP(h) == nil && (strings.ContainsAny(h, ":/ []") || len(h) > 253) {
		ps = append(ps, conf.Problem{Path: "externalAddress", Text: fmt.Sprintf("%q is neither a host name nor an IP address; write it without scheme and port", h)})
	}
	for i, t := range c.Target {
		if !slices.Contains(Targets(), t) {
			ps = append(ps, conf.Problem{Path: fmt.Sprintf("target[%d]", i), Text: fmt.Sprintf("%q is no part; there are %s", t, strings.Join(Targets(), ", "))})
		}
	}
	ps = append(ps, c.shared()...)
	ps = append(ps, gather("bus", c.Bus.Validate()...)...)
	ps = append(ps, gather("coapGateway", c.CoAPGateway.Validate()...)...)
	ps = append(ps, gather("enrolmentGateway", c.EnrolmentGateway.Validate()...)...)
	ps = append(ps, gather("grpcGateway", c.GRPCGateway.Validate()...)...)
	ps = append(ps, gather("resourceDirectory", c.ResourceDirectory.Check())...)
	ps = append(ps, gather("identityStore", c.IdentityStore.Validate()...)...)
	ps = append(ps, gather("oauthServer", c.OAuthServer.Validate()...)...)
	ps = append(ps, gather("authorization", c.Authorization.Validate()...)...)
	ps = append(ps, c.together()...)
	return ps.Err()
}

// Shared reports whether the hub is kept where several processes can reach it.
func (c Config) Shared() bool { return c.Store.MongoDB.URI != "" }

// shared checks what several processes need.
func (c Config) shared() (ps conf.Problems) {
	bad := func(path, text string) { ps = append(ps, conf.Problem{Path: path, Text: text}) }
	if !c.Shared() {
		if len(c.Target) > 0 {
			bad("store.mongodb.uri", "parts in processes of their own need a database that they share; write its address, or leave target empty")
		}
		return ps
	}
	for _, p := range c.Store.MongoDB.Problems() {
		bad("store.mongodb."+p.Path, p.Text)
	}
	for _, p := range c.Store.Feed.Problems() {
		bad("store.feed."+p.Path, p.Text)
	}
	if len(c.Bus.URLs) == 0 {
		bad("bus.urls", "with MongoDB the feed and the parts need NATS servers; write their addresses")
	}
	if c.ExternalAddress == "" {
		bad("externalAddress", "processes on several machines need to be told under which name or address devices and people reach the hub")
	}
	if _, err := hub.ParseDeviceID(c.Cluster.HubID); err != nil {
		bad("cluster.hubId", "it is no UUID; make one with uuidgen, once, for all processes of the hub")
	}
	if len(c.Cluster.Secret) < 16 {
		bad("cluster.secret", "it needs at least 16 characters, the same for all processes of the hub; make it with openssl rand -base64 32")
	}
	return ps
}

// together checks what no section can see by itself.
func (c Config) together() (ps conf.Problems) {
	bad := func(path, format string, args ...any) {
		ps = append(ps, conf.Problem{Path: path, Text: fmt.Sprintf(format, args...)})
	}
	const coap = "coapGateway.api.coap.authorization."
	authorization := c.CoAPGateway.API.CoAP.Authorization
	switch claim := authorization.DeviceIDClaim; {
	case claim == "":
	case c.Embedded() && claim != c.OAuthServer.DeviceIDClaim:
		// Every sign-in would fail, since the claim the gateway asks for is in no token.
		bad(coap+"deviceIDClaim", "%q is not the claim of the embedded provider's tokens; write %q, or change oauthServer.deviceIDClaim", claim, c.OAuthServer.DeviceIDClaim)
	case !c.Embedded() && c.Authorization.DeviceIDClaim != "" && c.Authorization.DeviceIDClaim != claim:
		bad(coap+"deviceIDClaim", "%q is not authorization.deviceIDClaim, which is %q", claim, c.Authorization.DeviceIDClaim)
	}
	switch {
	case c.Embedded() && len(authorization.Providers) > 0:
		bad(coap+"providers", "external providers need authorization.issuers, so that their tokens can be checked")
	case !c.Embedded() && len(authorization.Providers) == 0:
		bad(coap+"providers", "with authorization.issuers devices need a provider to sign up with; name at least one")
	}
	for i, p := range authorization.Providers {
		at := fmt.Sprintf("%sproviders[%d].", coap, i)
		if p.GrantType == coapgateway.GrantClientCredentials {
			continue // nothing is asked of it
		}
		if p.Authority == "" {
			bad(at+"authority", "must be set")
		}
		if p.ClientID == "" {
			bad(at+"clientID", "must be set")
		}
	}
	return ps
}

// gather turns the mistakes a section found into problems with full paths: some say their own path, some theirs below the
// section.
func gather(section string, errs ...error) (ps conf.Problems) {
	for _, err := range errs {
		if err == nil {
			continue
		}
		if many, ok := err.(interface{ Unwrap() []error }); ok {
			ps = append(ps, gather(section, many.Unwrap()...)...)
			continue
		}
		path, text, ok := strings.Cut(err.Error(), ": ")
		if !ok || strings.Contains(path, " ") {
			path, text = section, err.Error()
		}
		if path != section && !strings.HasPrefix(path, section+".") {
			path = section + "." + path
		}
		ps = append(ps, conf.Problem{Path: path, Text: text})
	}
	return ps
}

// foreign are keys of plgd's services, and what is written here instead.
var foreign = map[string]string{
	"apis":                       `listeners are coapGateway.api, grpcGateway.api and admin.api here`,
	"clients":                    `the parts know each other, there is nothing to connect`,
	"hubID":                      `the hub makes its ID at the first start and keeps it (coaphub status shows it)`,
	"hubId":                      `the hub makes its ID at the first start and keeps it (coaphub status shows it)`,
	"eventStore":                 `the event log is in the data folder; see store and resourceDirectory`,
	"eventBus":                   `one process needs no bus`,
	"storage":                    `everything is in the data folder; see store`,
	"mongoDB":                    `everything is in the data folder; see store`,
	"cqlDB":                      `everything is in the data folder; see store`,
	"nats":                       `one process needs no bus`,
	"requireBatchObserveEnabled": `batch observation is used when a device offers it, and never required`,
	"inactivityMonitor":          `write coapGateway.api.coap.keepAlive.timeout`,
	"ownerCacheExpiration":       `caches are invalidated when ownership changes, there is nothing to set`,
	"subscriptionBufferSize":     `slow readers go on from the event log, there is no buffer to size`,
	"messagePoolSize":            `messages are not pooled by number, there is nothing to set`,
	"messageQueueSize":           `queues are bounded by the engine, there is nothing to set`,
	"blockwiseTransfer":          `block-wise transfer is always on, in the sizes the device asks for`,
	"protocols":                  `write the addresses that are wanted: coapGateway.api.coap.address`,
	"taskQueue":                  `there is no task queue to size`,
	"serviceHeartbeat":           `one process needs no heartbeat`,
	"tokenTrustVerification":     `validated tokens are remembered until they end or are revoked`,
	"publicConfiguration":        `write externalAddress and authorization; the rest is derived`,
	"webConfiguration":           `write externalAddress and authorization; the rest is derived`,
	"ui":                         `there is no console to configure yet`,
	"openTelemetryCollector":     `traces cannot be exported yet`,
	"signer":                     `the hub keeps its own authorities in the data folder (coaphub ca root)`,
	"oauthSigner":                `the embedded provider keeps its own keys; see oauthServer`,
	"crl":                        `write coapGateway.api.coap.tls.caSets, which names where lists are: what certificates name is not fetched`,
	"encoding":                   `write log.format: json or text`,
	"encoderConfig":              `times are RFC 3339 with nanoseconds, there is nothing to set`,
	"stacktrace":                 `stacks are logged for panics only, there is nothing to set`,
	"dumpBody":                   `bodies are never logged`,
	"endpoints":                  `write authorization.issuers`,
	"snapshotThreshold":          `there are no snapshots; see resourceDirectory`,
	"messageSize":                `write coapGateway.api.coap.maxMessageSize`,
}

// LoadConfig reads a configuration: defaults, then the file (none when file is empty), then the environment. What flags say
// is put over it by the caller, who then calls Validate. Warnings are for the log.
func LoadConfig(file string, env []string) (c Config, warnings []string, err error) {
	c = Default()
	src := conf.Source{Name: file, Env: env, Prefix: EnvPrefix, Except: []string{EnvData, EnvToken}, Foreign: foreign}
	if file != "" {
		if src.YAML, err = os.ReadFile(file); err != nil {
			return c, nil, &hub.Error{Kind: hub.Invalid, Code: "config-unreadable", Text: "the configuration file cannot be read: " + cause(err), Err: err}
		}
	}
	warnings, err = conf.Read(&c, src)
	// Mistakes of form and of meaning together: whoever mends the one should not meet the other on the next try. A key that was
	// not understood has its default here.
	var form, meaning conf.Problems
	if errors.As(err, &form) && errors.As(c.Validate(), &meaning) {
		err = append(form, meaning...)
	}
	return c, warnings, err
}

// cause is the innermost text of an error of the file system, with its path.
func cause(err error) string {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Path + ": " + p.Err.Error()
	}
	return err.Error()
}
