package mongostore

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"regexp"
	"strings"
	"time"

	"go.mongodb.org/mongo-driver/v2/mongo/options"
	"go.mongodb.org/mongo-driver/v2/mongo/readconcern"
	"go.mongodb.org/mongo-driver/v2/mongo/readpref"
	"go.mongodb.org/mongo-driver/v2/mongo/writeconcern"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

// Config says which database to use and how.
type Config struct {
	// URI names the servers, mongodb://HOST[:PORT],HOST…/?replicaSet=NAME or mongodb+srv://HOST. Name the replica set, so that the
	// primary is found after it moved. User and password do not belong here, since URIs end up in logs.
	URI string `yaml:"uri"`
	// Database is where the hub keeps everything; nobody else may write there. Default coaphub.
	Database string `yaml:"database"`
	// User signs in to the servers; it needs the role readWrite on the database. Empty: no sign-in, or the client certificate of tls if
	// the URI says authMechanism=MONGODB-X509.
	User string `yaml:"user"`
	// Password is the user's.
	Password conf.Secret `yaml:"password"`
	// AuthDatabase is the database in which the user is defined. Default admin.
	AuthDatabase string `yaml:"authDatabase"`
	// TLS is how connections are kept from others.
	TLS TLSConfig `yaml:"tls"`
	// Pool bounds the connections.
	Pool PoolConfig `yaml:"pool"`
	// ConnectTimeout is how long a connection may take to come up. Default 5s.
	ConnectTimeout time.Duration `yaml:"connectTimeout"`
	// SelectTimeout is how long an operation waits for a primary before it is refused. Longer than an election, shorter than a device
	// waits. Default 5s.
	SelectTimeout time.Duration `yaml:"selectTimeout"`
	// Timeout is how long one command may take. Default 10s.
	Timeout time.Duration `yaml:"timeout"`
	// SettleTimeout is how long the hub asks what became of a write whose answer did not come; who waits for it waits that much longer.
	// Default 30s.
	SettleTimeout time.Duration `yaml:"settleTimeout"`

	dial dialer // nil: over TCP
}

type dialer func(context.Context) (net.Conn, error)

// DialContext implements options.ContextDialer.
func (d dialer) DialContext(ctx context.Context, _, _ string) (net.Conn, error) { return d(ctx) }

// Over is the configuration with connections that dial makes, for tests that have a network of their own.
func (c Config) Over(dial func(context.Context) (net.Conn, error)) Config {
	c.dial = dial
	return c
}

// TLSConfig is everything below tls.
type TLSConfig struct {
	// Enabled makes connections TLS, as tls=true in the URI does.
	Enabled bool `yaml:"enabled"`
	// CAs are files with the certificates that the servers' must come from, or certificates themselves (PEM). Empty: the system's.
	CAs []string `yaml:"cas"`
	// CertFile is the hub's own certificate, for servers that ask for one. It is read again for each connection.
	CertFile string `yaml:"certFile"`
	// KeyFile is the key of certFile.
	KeyFile string `yaml:"keyFile"`
}

// PoolConfig is everything below pool.
type PoolConfig struct {
	// Max is how many connections to one server there are at most. Default 32.
	Max uint64 `yaml:"max"`
	// Idle is how long a connection without work is kept. Default 4m.
	Idle time.Duration `yaml:"idle"`
}

// DefaultConfig is what holds where the file says nothing.
func DefaultConfig() Config {
	return Config{
		Database: "coaphub", AuthDatabase: "admin",
		Pool:           PoolConfig{Max: 32, Idle: 4 * time.Minute},
		ConnectTimeout: 5 * time.Second, SelectTimeout: 5 * time.Second,
		Timeout: 10 * time.Second, SettleTimeout: 30 * time.Second,
	}
}

// longestWait bounds Timeout and SettleTimeout: an insert that is still under way after the commit behind it was trimmed would
// no longer be fenced, and history keeps ten minutes at least.
const longestWait = 2 * time.Minute

var databaseName = regexp.MustCompile(`^[a-zA-Z0-9_-]{1,63}$`)

// Problems returns what is wrong with the configuration, by path and text.
func (c *Config) Problems() (out []conf.Problem) {
	bad := func(path, format string, args ...any) {
		out = append(out, conf.Problem{Path: path, Text: fmt.Sprintf(format, args...)})
	}
	switch u, err := url.Parse(c.URI); {
	case c.URI == "":
		bad("uri", "is missing; write for example mongodb://db1,db2,db3/?replicaSet=rs0")
	case !strings.HasPrefix(c.URI, "mongodb://") && !strings.HasPrefix(c.URI, "mongodb+srv://"):
		bad("uri", "does not begin with mongodb:// or mongodb+srv://")
	case err == nil && u.User != nil, err != nil && strings.Contains(c.URI, "@"):
		bad("uri", "has a user in it; use the keys user and password")
	case strings.HasPrefix(c.URI, "mongodb+srv://"): // the rest of it is in the DNS, which is asked at the start
	default:
		if err := options.Client().ApplyURI(c.URI).Validate(); err != nil {
			bad("uri", "%s", err)
		}
	}
	if !databaseName.MatchString(c.Database) {
		bad("database", "%q is not a name of at most 63 letters, digits, - and _", c.Database)
	}
	if c.User == "" && c.Password != "" {
		bad("user", "is missing, but there is a password")
	}
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		bad("tls", "certFile and keyFile go together")
	}
	if !c.tls() && (len(c.TLS.CAs) > 0 || c.TLS.CertFile != "") {
		bad("tls", "has certificates, but TLS is not enabled")
	}
	if c.Pool.Max < 2 || c.Pool.Max > 1024 {
		bad("pool.max", "%d is not between 2 and 1024", c.Pool.Max)
	}
	for path, d := range map[string]time.Duration{
		"connectTimeout": c.ConnectTimeout, "selectTimeout": c.SelectTimeout, "timeout": c.Timeout, "settleTimeout": c.SettleTimeout,
	} {
		if d < time.Millisecond || d > longestWait {
			bad(path, "%s is not between 1ms and %s", d, longestWait)
		}
	}
	return out
}

func (c *Config) tls() bool {
	return c.TLS.Enabled || strings.Contains(c.URI, "tls=true") || strings.Contains(c.URI, "ssl=true") ||
		strings.HasPrefix(c.URI, "mongodb+srv://") && !strings.Contains(c.URI, "tls=false")
}

// options are the driver's. The driver does not repeat writes: whether one has to be is decided where its outcome is settled.
func (c *Config) options() (*options.ClientOptions, error) {
	journal := true
	o := options.Client().ApplyURI(c.URI).
		SetAppName("coaphub").
		SetWriteConcern(&writeconcern.WriteConcern{W: writeconcern.WCMajority, Journal: &journal}).
		SetReadConcern(readconcern.Majority()).
		SetReadPreference(readpref.Primary()).
		SetRetryWrites(false).SetRetryReads(true).
		SetMaxPoolSize(c.Pool.Max).SetMaxConnIdleTime(c.Pool.Idle).
		SetConnectTimeout(c.ConnectTimeout).SetServerSelectionTimeout(c.SelectTimeout)
	if c.dial != nil {
		o.SetDialer(c.dial)
	}
	if c.User != "" {
		cred := options.Credential{}
		if o.Auth != nil {
			cred = *o.Auth // the mechanism, from the URI
		}
		cred.Username, cred.Password, cred.PasswordSet = c.User, c.Password.Reveal(), c.Password != ""
		cred.AuthSource = c.AuthDatabase
		o.SetAuth(cred)
	}
	if c.tls() {
		t, err := c.tlsConfig()
		if err != nil {
			return nil, err
		}
		o.SetTLSConfig(t)
	}
	return o, o.Validate()
}

func (c *Config) tlsConfig() (*tls.Config, error) {
	t := &tls.Config{MinVersion: tls.VersionTLS12}
	if len(c.TLS.CAs) > 0 {
		certs, err := conf.Certificates(c.TLS.CAs)
		if err != nil {
			return nil, fmt.Errorf("tls.cas: %w", err)
		}
		t.RootCAs = x509.NewCertPool()
		for _, cert := range certs {
			t.RootCAs.AddCert(cert)
		}
	}
	if c.TLS.CertFile != "" {
		// Read anew for each connection, so that a renewed certificate needs no restart.
		load := func() (*tls.Certificate, error) {
			cert, err := tls.LoadX509KeyPair(c.TLS.CertFile, c.TLS.KeyFile)
			return &cert, err
		}
		if _, err := load(); err != nil {
			if errors.Is(err, os.ErrNotExist) {
				return nil, fmt.Errorf("tls.certFile or tls.keyFile: %w", err)
			}
			return nil, fmt.Errorf("tls.certFile %s with tls.keyFile %s: %w", c.TLS.CertFile, c.TLS.KeyFile, err)
		}
		t.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return t, nil
}

// configError is an error of the operator's: what is wrong, and what to do.
func configError(code, text string, err error) error {
	return hub.NewError(hub.Precondition, code, text).With("mongostore.Open", err)
}
