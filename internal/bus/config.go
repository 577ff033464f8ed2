package bus

import (
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"

	"github.com/nats-io/nats.go"
)

// Config is how the parts of a hub that run apart reach each other.
type Config struct {
	// URLs are the NATS servers, for example nats://nats:4222 or tls://nats:4222. One is enough, it names the others.
	URLs []string `yaml:"urls"`
	// CredentialsFile has this process's JWT and NKEY, as nsc writes it. It is read again whenever the connection is made.
	CredentialsFile string `yaml:"credentialsFile"`
	// NKeyFile has this process's NKEY seed, for servers that know its public key by their configuration.
	NKeyFile string    `yaml:"nkeyFile"`
	TLS      TLSConfig `yaml:"tls"`

	dial func() (net.Conn, error) // nil: over TCP
}

// Over is the configuration with connections that dial makes, for tests that have a network of their own. The addresses of the servers
// must then be IP addresses, so that nobody looks them up.
func (c Config) Over(dial func() (net.Conn, error)) Config {
	c.dial = dial
	return c
}

// dialer is Config.dial for NATS.
type dialer func() (net.Conn, error)

// Dial implements nats.CustomDialer.
func (d dialer) Dial(string, string) (net.Conn, error) { return d() }

// TLSConfig is how a connection to NATS is kept from others; with any of it, and with tls:// in an address, it is over TLS only.
type TLSConfig struct {
	// CAFiles are the CAs of the servers' certificates. Empty: those of the system.
	CAFiles []string `yaml:"caFiles"`
	// CertFile and KeyFile are this process's certificate, for servers that ask for one.
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`
}

// Validate returns everything that is wrong with the configuration. No addresses are no mistake: then there is no bus.
func (c Config) Validate() []error {
	var errs []error
	for i, s := range c.URLs {
		u, err := url.Parse(s)
		switch {
		case err != nil || u.Host == "" || u.Scheme != "nats" && u.Scheme != "tls":
			errs = append(errs, fmt.Errorf("urls[%d]: it is no address like nats://host:4222 or tls://host:4222", i)) // it may have a password in it
		case u.User != nil:
			errs = append(errs, fmt.Errorf("urls[%d]: credentials go into credentialsFile or nkeyFile", i))
		}
	}
	if c.CredentialsFile != "" && c.NKeyFile != "" {
		errs = append(errs, errors.New("nkeyFile: it is in credentialsFile already, give one of them"))
	}
	if (c.TLS.CertFile == "") != (c.TLS.KeyFile == "") {
		errs = append(errs, errors.New("tls: certFile and keyFile belong together"))
	}
	return errs
}

func (c Config) addresses() string { return strings.Join(c.URLs, ",") }

func (c Config) options() ([]nats.Option, error) {
	var opts []nats.Option
	if c.CredentialsFile != "" {
		opts = append(opts, nats.UserCredentials(c.CredentialsFile))
	}
	if c.NKeyFile != "" {
		o, err := nats.NkeyOptionFromSeed(c.NKeyFile)
		if err != nil {
			return nil, fmt.Errorf("the NKEY of the bus: %w", err)
		}
		opts = append(opts, o)
	}
	if c.dial != nil {
		opts = append(opts, nats.SetCustomDialer(dialer(c.dial)))
	}
	if len(c.TLS.CAFiles) > 0 {
		opts = append(opts, nats.RootCAs(c.TLS.CAFiles...))
	}
	if c.TLS.CertFile != "" {
		opts = append(opts, nats.ClientCert(c.TLS.CertFile, c.TLS.KeyFile))
	}
	return opts, nil
}
