package enrolmentgateway

import (
	"fmt"
	"net"

	"github.com/coaphub/coaphub/internal/revocation"
)

// Config is everything below enrolmentGateway. An address of "" switches a listener off.
type Config struct {
	API APIConfig `yaml:"api"`
	TLS TLSConfig `yaml:"tls"`
}

// TLSConfig is everything below enrolmentGateway.tls.
type TLSConfig struct {
	// CASets are manufacturers' CAs, in sets that say where to find what they have revoked. That a CA is in one of them lets nobody
	// in: enrolment groups do, and whoever makes one names no addresses.
	CASets []revocation.CASetConfig `yaml:"caSets"`
}

// APIConfig is everything below enrolmentGateway.api.
type APIConfig struct {
	CoAP CoAPConfig `yaml:"coap"`
	HTTP HTTPConfig `yaml:"http"`
}

// CoAPConfig is everything below enrolmentGateway.api.coap.
type CoAPConfig struct {
	// Address to listen on for EST over CoAP, with DTLS (RFC 9148) and, on the same port of TCP, with TLS.
	Address string `yaml:"address"`
	// MaxConnections in all; further ones are closed at once.
	MaxConnections int `yaml:"maxConnections"`
	// MaxConnectionsPerNetwork is the same for one network (IPv4 /24, IPv6 /56), so that none keeps all others out. Behind a load
	// balancer or router that hides their addresses devices are one network.
	MaxConnectionsPerNetwork int `yaml:"maxConnectionsPerNetwork"`
}

// HTTPConfig is everything below enrolmentGateway.api.http.
type HTTPConfig struct {
	// Address to listen on for EST over HTTPS (RFC 7030) and SCEP (RFC 8894); always TLS, with the hub's certificate towards devices.
	Address string `yaml:"address"`
	// MaxConnections in all; more wait in the system's queue.
	MaxConnections int `yaml:"maxConnections"`
	// MaxConnectionsPerNetwork is the same for one network (IPv4 /24, IPv6 /56), so that none keeps all others out; further ones of
	// it are closed at once. A proxy's network needs as many as devices come through it at a time.
	MaxConnectionsPerNetwork int           `yaml:"maxConnectionsPerNetwork"`
	Proxies                  ProxiesConfig `yaml:"proxies"`
}

// ProxiesConfig is everything below enrolmentGateway.api.http.proxies: who may end a device's TLS in front of the hub, and say which
// certificate the device has shown (Client-Cert and Client-Cert-Chain, RFC 9440). Nobody else may.
type ProxiesConfig struct {
	// CAPool is files or PEM texts of the CAs of proxies' client certificates. They must sign for nobody else. Empty: no proxy comes
	// over TLS.
	CAPool []string `yaml:"caPool"`
	// Socket is the path of a Unix socket for a proxy on this machine, without TLS; whoever may open it is one. Its group may (0660).
	// Empty: none.
	Socket string `yaml:"socket"`
}

// Default returns the configuration of a hub without a configuration file.
func Default() Config {
	return Config{API: APIConfig{
		CoAP: CoAPConfig{Address: "[::]:15684", MaxConnections: 4096, MaxConnectionsPerNetwork: 1024},
		HTTP: HTTPConfig{Address: "[::]:8443", MaxConnections: 1024, MaxConnectionsPerNetwork: 256},
	}}
}

// Validate reports all mistakes, each with the key's path below the section.
func (c Config) Validate() []error {
	var errs []error
	for _, l := range []struct {
		key, address     string
		most, perNetwork int
	}{
		{"api.coap", c.API.CoAP.Address, c.API.CoAP.MaxConnections, c.API.CoAP.MaxConnectionsPerNetwork},
		{"api.http", c.API.HTTP.Address, c.API.HTTP.MaxConnections, c.API.HTTP.MaxConnectionsPerNetwork},
	} {
		if _, _, err := net.SplitHostPort(l.address); err != nil && l.address != "" {
			errs = append(errs, fmt.Errorf("%s.address: %w", l.key, err))
		}
		if l.most <= 0 {
			errs = append(errs, fmt.Errorf("%s.maxConnections: %d is not positive", l.key, l.most))
		}
		if l.perNetwork <= 0 {
			errs = append(errs, fmt.Errorf("%s.maxConnectionsPerNetwork: %d is not positive", l.key, l.perNetwork))
		}
	}
	revocation.CheckSets(c.TLS.CASets, func(path, text string) { errs = append(errs, fmt.Errorf("tls.%s: %s", path, text)) })
	if _, err := newProxies(c.API.HTTP.Proxies); err != nil {
		errs = append(errs, err)
	}
	return errs
}
