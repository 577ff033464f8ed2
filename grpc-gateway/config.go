package grpcgateway

import (
	"fmt"
	"net"
	"strings"
	"time"
)

// Config is the section `grpcGateway` of the configuration.
type Config struct {
	API    APIConfig    `yaml:"api"`
	Limits LimitsConfig `yaml:"limits"`
}

// APIConfig says where the doors are.
type APIConfig struct {
	HTTP HTTPConfig `yaml:"http"`
	GRPC GRPCConfig `yaml:"grpc"`
}

// HTTPConfig is the door for HTTP/JSON.
type HTTPConfig struct {
	// Address to listen on. Plain on loopback, TLS anywhere else. Default 127.0.0.1:8080.
	Address string `yaml:"address"`
	// TLS has it on loopback, too, for a proxy or a forwarded port on this machine that hands connections on as they come. Default
	// false.
	TLS bool `yaml:"tls"`
	// Hosts are further names, without port, that requests may carry in Host, for example the name of a proxy in front. Others
	// get 421. Loopback names and the external address are always allowed. Default empty.
	Hosts []string   `yaml:"hosts"`
	CORS  CORSConfig `yaml:"cors"`
}

// GRPCConfig is the door for gRPC.
type GRPCConfig struct {
	// Address to listen on. Plain on loopback, TLS anywhere else. Default 127.0.0.1:8082.
	Address string `yaml:"address"`
}

// LimitsConfig bounds what one caller can make the door do.
type LimitsConfig struct {
	// HeaderTimeout is how long a client may take to send the head of a request. Default 10s.
	HeaderTimeout time.Duration `yaml:"headerTimeout"`
	// IdleTimeout is how long a connection may wait for its next request. Default 2m.
	IdleTimeout time.Duration `yaml:"idleTimeout"`
	// StallTimeout ends an answer whose reader takes nothing for so long; a slow reader that keeps reading is never cut off.
	// Default 30s.
	StallTimeout time.Duration `yaml:"stallTimeout"`
	// RequestTimeout is how long reading and answering one request may take. Default 5m.
	RequestTimeout time.Duration `yaml:"requestTimeout"`
	// MaxConnections bounds the connections of each door, those of subscribers included; more wait in the system's queue. Default
	// 4096.
	MaxConnections int `yaml:"maxConnections"`
	// MaxHeaderBytes bounds the head of an HTTP request, with its path, query and token. Default 65536.
	MaxHeaderBytes int `yaml:"maxHeaderBytes"`
	// MaxBodyBytes bounds the body of a request; one byte more is 413. Default 1048576.
	MaxBodyBytes int `yaml:"maxBodyBytes"`
	// MaxStreams bounds the concurrent calls of one HTTP/2 connection, gRPC's included. Default 250.
	MaxStreams int `yaml:"maxStreams"`
	// MaxRequests is how many requests of all owners are under way at a time, over HTTP and gRPC together. Streams of events,
	// which stay open, are none of them. Default 4096.
	MaxRequests int `yaml:"maxRequests"`
	// MaxWaiting is how many more may wait for one of these places; further ones are refused with a time to come again. Default
	// 1024.
	MaxWaiting int `yaml:"maxWaiting"`
	// MaxWait is how long one may wait. Default 1s.
	MaxWait time.Duration `yaml:"maxWait"`
	// OwnerRequests is how many requests of one owner are under way at a time, so that others find a place. As many commands more
	// may wait for their devices, which takes no place. Default 1024.
	OwnerRequests int `yaml:"ownerRequests"`
	// OwnerStreams is how many streams of events one owner may have open: WebSockets, server-sent events, and gRPC's. Default
	// 1024.
	OwnerStreams int `yaml:"ownerStreams"`
	// OwnerRate is how many requests of one owner may begin each second in the long run. 0: no limit, which is the default,
	// because how many the machine takes nobody knows before, and ownerRequests keeps them from others.
	OwnerRate int `yaml:"ownerRate"`
	// OwnerBurst is how many of them may begin at once after a time of rest. Default 0.
	OwnerBurst int `yaml:"ownerBurst"`
}

// Default returns the configuration of a hub without a configuration file.
func Default() Config {
	return Config{
		API: APIConfig{HTTP: HTTPConfig{Address: "127.0.0.1:8080"}, GRPC: GRPCConfig{Address: "127.0.0.1:8082"}},
		Limits: LimitsConfig{
			HeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute, StallTimeout: 30 * time.Second,
			RequestTimeout: 5 * time.Minute, MaxConnections: 4096, MaxHeaderBytes: 64 << 10, MaxBodyBytes: 1 << 20, MaxStreams: 250,
			MaxRequests: 4096, MaxWaiting: 1024, MaxWait: time.Second, OwnerRequests: 1024, OwnerStreams: 1024,
		},
	}
}

// Validate reports all mistakes, each with the key's path below the section.
func (c Config) Validate() []error {
	var errs []error
	for _, a := range []struct{ key, value string }{{"api.http.address", c.API.HTTP.Address}, {"api.grpc.address", c.API.GRPC.Address}} {
		if _, _, err := net.SplitHostPort(a.value); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", a.key, err))
		}
	}
	for i, h := range c.API.HTTP.Hosts {
		if h == "" || strings.ContainsAny(h, "/ *") || strings.Contains(h, ":") && net.ParseIP(h) == nil {
			errs = append(errs, fmt.Errorf("api.http.hosts[%d]: %q is not a host name without port", i, h))
		}
	}
	for i, o := range c.API.HTTP.CORS.Origins {
		if err := checkOrigin(o); err != nil {
			errs = append(errs, fmt.Errorf("api.http.cors.origins[%d]: %w", i, err))
		}
	}
	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"headerTimeout", c.Limits.HeaderTimeout},
		{"idleTimeout", c.Limits.IdleTimeout},
		{"stallTimeout", c.Limits.StallTimeout},
		{"requestTimeout", c.Limits.RequestTimeout},
		{"maxWait", c.Limits.MaxWait},
	} {
		if d.value <= 0 {
			errs = append(errs, fmt.Errorf("limits.%s: %s is not positive", d.key, d.value))
		}
	}
	for _, n := range []struct {
		key        string
		value, min int
	}{
		{"maxConnections", c.Limits.MaxConnections, 1},
		{"maxHeaderBytes", c.Limits.MaxHeaderBytes, 4096},
		{"maxBodyBytes", c.Limits.MaxBodyBytes, 1024},
		{"maxStreams", c.Limits.MaxStreams, 1},
		{"maxRequests", c.Limits.MaxRequests, 1},
		{"maxWaiting", c.Limits.MaxWaiting, 0},
		{"ownerRequests", c.Limits.OwnerRequests, 1},
		{"ownerStreams", c.Limits.OwnerStreams, 0},
		{"ownerRate", c.Limits.OwnerRate, 0},
		{"ownerBurst", c.Limits.OwnerBurst, min(c.Limits.OwnerRate, 1)},
	} {
		if n.value < n.min {
			errs = append(errs, fmt.Errorf("limits.%s: %d is below %d", n.key, n.value, n.min))
		}
	}
	return errs
}
