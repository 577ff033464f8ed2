package coapgateway

import (
	"fmt"
	"net"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/revocation"
)

// Config is everything below coapGateway. An address of "" switches a listener off.
type Config struct {
	API            APIConfig            `yaml:"api"`
	DeviceTwin     TwinConfig           `yaml:"deviceTwin"`
	DeviceToDevice DeviceToDeviceConfig `yaml:"deviceToDevice"`
	Limits         LimitsConfig         `yaml:"limits"`
	Drain          DrainConfig          `yaml:"drain"`
	// Rivals is what becomes of a device that is found to be in two places at once: two addresses that take its session from each
	// other, several times within ten minutes. report (default): it is in the audit log and in coaphub status --refused, and the
	// last to sign in has the session. quarantine: its commands stop and what it writes is kept apart, too, until its owner or an
	// operator enables it.
	Rivals string `yaml:"rivals"`
}

// APIConfig is everything below coapGateway.api.
type APIConfig struct {
	CoAP CoAPConfig `yaml:"coap"`
}

// CoAPConfig is everything below coapGateway.api.coap.
type CoAPConfig struct {
	// Address to listen on for CoAP over TLS (RFC 8323) and, on the same port of UDP, over DTLS (RFC 7252).
	Address string `yaml:"address"`
	// PlainAddress to listen on for CoAP over TCP and UDP without encryption; off by default. Anybody who can reach it may
	// claim to be any device that has a good token.
	PlainAddress string `yaml:"plainAddress"`
	// Protocols are those of both addresses: tcp (TLS and plain TCP), udp (DTLS and plain UDP). Default: both.
	Protocols []string `yaml:"protocols"`
	// ExternalAddress is host and port under which devices reach the listener of address; it goes into endpoints and discovery.
	// Empty: the hub's externalAddress with the port of the listener.
	ExternalAddress string `yaml:"externalAddress"`
	// MaxMessageSize in bytes, everything counted. Larger messages end the connection.
	MaxMessageSize int `yaml:"maxMessageSize"`
	// MaxConnections in all; further ones are closed at once. Over plain UDP the oldest whose address was never proven gives way.
	MaxConnections int `yaml:"maxConnections"`
	// MaxLinks is how many links one publish may have, and how many resources of a session are observed.
	MaxLinks  int             `yaml:"maxLinks"`
	KeepAlive KeepAliveConfig `yaml:"keepAlive"`
	// MaxSilence ends a session over DTLS whose device has said nothing for so long: such devices are not pinged, they may
	// sleep. A session over plain UDP ends so, too, if its address has proven to be the device's.
	MaxSilence time.Duration `yaml:"maxSilence"`
	TLS        TLSConfig     `yaml:"tls"`
	DTLS       DTLSConfig    `yaml:"dtls"`
	// WebSocket lets browsers be devices, on the applications' HTTP listener.
	WebSocket WebSocketConfig `yaml:"webSocket"`
	// Authorization says how devices prove who they are.
	Authorization AuthorizationConfig `yaml:"authorization"`
}

// KeepAliveConfig is everything below coapGateway.api.coap.keepAlive.
type KeepAliveConfig struct {
	// Timeout after which a silent connection over TCP or TLS is over; half of it without a message brings a Ping. Over any
	// protocol it is how long the hub waits for a device's answer to one request.
	Timeout time.Duration `yaml:"timeout"`
}

// TLSConfig is everything below coapGateway.api.coap.tls.
type TLSConfig struct {
	// ClientCertificateRequired makes devices show an identity certificate. False: no certificate is asked for.
	ClientCertificateRequired bool `yaml:"clientCertificateRequired"`
	// IdentityPropertiesRequired refuses certificates without common name uuid:<id> and the OCF identity usage in the
	// handshake. False: such a connection has no device ID of its own and can only ask for the time.
	IdentityPropertiesRequired bool `yaml:"identityPropertiesRequired"`
	// PSK lets devices prove their ID over DTLS by a pre-shared key instead of a certificate. Only devices that were given one
	// have one (coaphub onboard --psk).
	PSK bool `yaml:"psk"`
	// CAPool is files or PEM texts of the CAs of device certificates. Empty, and no caSets: the hub's own device CA.
	CAPool []string `yaml:"caPool"`
	// CASets are further CAs of device certificates, in sets that say where to find what they have revoked. With any of them the
	// hub's own device CA is trusted only if caPool names it.
	CASets []revocation.CASetConfig `yaml:"caSets"`
	// CertFile and KeyFile are the hub's certificate. Both empty: one by the hub's own CA.
	CertFile string `yaml:"certFile"`
	KeyFile  string `yaml:"keyFile"`
	// DisconnectOnExpiredCertificate ends a session when the device's certificate expires, if that is before its token does.
	DisconnectOnExpiredCertificate bool `yaml:"disconnectOnExpiredCertificate"`
}

// DTLSConfig is everything below coapGateway.api.coap.dtls. Certificates and CAs are those of tls.
type DTLSConfig struct {
	// HandshakeTimeout ends a handshake that takes longer; slow radio needs its time.
	HandshakeTimeout time.Duration `yaml:"handshakeTimeout"`
	// FlightInterval is the first time before messages of a handshake that were not answered are sent again, doubled each
	// time (RFC 7925, Section 11).
	FlightInterval time.Duration `yaml:"flightInterval"`
	// MaxHandshakes bounds the handshakes under way; beyond it the oldest is given up.
	MaxHandshakes int `yaml:"maxHandshakes"`
	// MaxHandshakesPerNetwork is the same for one network (IPv4 /24, IPv6 /56), whose oldest goes on for nine seconds all the same:
	// whoever begins meanwhile waits until others are done.
	MaxHandshakesPerNetwork int `yaml:"maxHandshakesPerNetwork"`
	// Gateway is the first part of connection IDs, by which a load balancer, and gateways among each other, can tell whose they are. Of
	// several gateways each needs another one; 0: one by chance at each start.
	Gateway uint16 `yaml:"gateway"`
}

// WebSocketConfig is everything below coapGateway.api.coap.webSocket.
type WebSocketConfig struct {
	// Enabled opens /.well-known/coap of grpcGateway.api.http for CoAP over WebSocket (RFC 8323). Off by default: no
	// certificate is asked for there, so a token alone says which device it is, as on plainAddress.
	Enabled bool `yaml:"enabled"`
	// Origins are those of web pages that may connect, exactly as browsers send them, such as https://console.example.com;
	// the hub's own pages always may. Programs that send no Origin are not browsers and need none.
	Origins []string `yaml:"origins"`
}

// AuthorizationConfig is everything below coapGateway.api.coap.authorization.
type AuthorizationConfig struct {
	// DeviceIDClaim is the literal name of the top-level claim that has the device's ID; URIs are usual. Empty: none.
	DeviceIDClaim string `yaml:"deviceIDClaim"`
	// StrictDeviceID refuses requests whose di names another device than the certificate or claim. False: di is ignored then.
	StrictDeviceID bool `yaml:"strictDeviceID"`
	// Providers that devices may name in authprovider. The first is the one of devices that name none. Empty: the embedded
	// provider.
	Providers []ProviderConfig `yaml:"providers"`
}

// Values of CoAPConfig.Protocols.
const (
	ProtocolTCP = "tcp"
	ProtocolUDP = "udp"
)

// Grant types of a provider.
const (
	GrantAuthorizationCode = "authorizationCode"
	GrantClientCredentials = "clientCredentials"
)

// ProviderConfig is a provider of authorization codes. Whoever makes the Provider reads all but Name and GrantType.
type ProviderConfig struct {
	// Name is what devices send as authprovider; unique.
	Name string `yaml:"name"`
	// GrantType authorizationCode (default): devices sign up with a code. clientCredentials: with a JWT for this hub of scope
	// device:signup.
	GrantType string `yaml:"grantType"`
	// Authority is the provider's issuer URL, for discovery.
	Authority string `yaml:"authority"`
	// ClientID and ClientSecretFile are the hub's account at the provider.
	ClientID         string `yaml:"clientID"`
	ClientSecretFile string `yaml:"clientSecretFile"`
	// Scopes, Audience and RedirectURL go into the token request.
	Scopes      []string `yaml:"scopes"`
	Audience    string   `yaml:"audience"`
	RedirectURL string   `yaml:"redirectURL"`
}

// TwinConfig is everything below coapGateway.deviceTwin.
type TwinConfig struct {
	// UseETags lets a device that comes back send only what changed since.
	UseETags bool `yaml:"useETags"`
	// MaxETagsCountInRequest is how many of the newest ETags it is told.
	MaxETagsCountInRequest int `yaml:"maxETagsCountInRequest"`
	// AskQuietAfter is how long, on average, after the Max-Age of what it reported last (60 s if it says none) a device over UDP
	// or DTLS is asked for an observed resource: a report may be lost there. 0: never. Devices that sleep are not asked.
	AskQuietAfter time.Duration `yaml:"askQuietAfter"`
}

// DeviceToDeviceConfig is everything below coapGateway.deviceToDevice: what the devices of an owner may do with each other
// through the hub.
type DeviceToDeviceConfig struct {
	// Mode is full (default), read: they only find, read and observe each other, or off: they only find themselves.
	Mode string `yaml:"mode"`
	// MaxRequests is how many requests of one device may wait for other devices at a time.
	MaxRequests int `yaml:"maxRequests"`
	// MaxObservations is how many resources of others one device may observe at a time.
	MaxObservations int `yaml:"maxObservations"`
	// MaxObservationsInAll is the same for all devices together.
	MaxObservationsInAll int `yaml:"maxObservationsInAll"`
}

// LimitsConfig is everything below coapGateway.limits: how much devices may ask for. Requests beyond a rate are refused with a
// time to come again; notifications cannot be refused and are taken more slowly. Account requests have their own bound, and
// GET /oic/rd, by which devices keep a session alive, has none.
type LimitsConfig struct {
	// Device is what one device may ask for. The default lets a bridge report 10 000 resources once a minute, and all at once.
	Device RateConfig `yaml:"device"`
	// Owner is what all devices of one owner may ask for together. By default there is no such limit: on most hubs one owner
	// has most devices.
	Owner RateConfig `yaml:"owner"`
	// Hub is what all devices may ask for together. By default there is no such limit: how much the machine can do it shows by
	// itself, when its queues fill.
	Hub     RateConfig    `yaml:"hub"`
	SignIns SignInsConfig `yaml:"signIns"`
}

// RateConfig is a number of requests and notifications.
type RateConfig struct {
	// Rate is how many requests and notifications a second in the long run. 0: no limit.
	Rate int `yaml:"rate"`
	// Burst is how many of them at once after a time of rest.
	Burst int `yaml:"burst"`
}

// SignInsConfig is everything below coapGateway.limits.signIns: two queues, of devices that sign in, and of those that sign up or
// refresh their token, for which a provider is asked. When all of them come at once, for instance after a power cut, they are
// served in the order in which they came, sign-ins when their tokens are verified.
type SignInsConfig struct {
	// UnderWay is how many sign-ins are served at a time, and how many sign-ups and refreshes.
	UnderWay int `yaml:"underWay"`
	// Waiting is how many more of each may wait. Further ones are told when to come again, each at another time.
	Waiting int `yaml:"waiting"`
	// MaxWait is for how long one may wait, at most api.coap.keepAlive.timeout: devices give up on an answer after a while.
	MaxWait time.Duration `yaml:"maxWait"`
}

// DrainConfig is everything below coapGateway.drain: how a gateway stops while others of the hub go on. One that is alone stops at
// once, since there is nowhere to go.
type DrainConfig struct {
	// Spread is over how much time it tells its devices, one after the other, to come back elsewhere. Short serves everybody soon; a
	// gateway with many devices needs as many seconds as the others need for that many sign-ins.
	Spread time.Duration `yaml:"spread"`
	// Commands is how long after that it waits for devices' answers to commands that they have been sent. A device with such a command
	// goes when it has answered.
	Commands time.Duration `yaml:"commands"`
}

// Values of Config.Rivals.
const (
	RivalsReport     = "report"
	RivalsQuarantine = "quarantine"
)

// Values of DeviceToDeviceConfig.Mode.
const (
	ModeOff  = "off"
	ModeRead = "read"
	ModeFull = "full"
)

// Default returns the configuration of a hub that nobody configured.
func Default() Config {
	return Config{
		API: APIConfig{CoAP: CoAPConfig{
			Address:        "[::]:5684",
			Protocols:      []string{ProtocolTCP, ProtocolUDP},
			MaxMessageSize: (256 + 64) << 10,
			MaxConnections: 100_000,
			MaxLinks:       10_000,
			KeepAlive:      KeepAliveConfig{Timeout: 20 * time.Second},
			MaxSilence:     25 * time.Hour, // a device may report once a day
			TLS: TLSConfig{
				ClientCertificateRequired: true, IdentityPropertiesRequired: true, DisconnectOnExpiredCertificate: true,
				PSK: true,
			},
			DTLS: DTLSConfig{
				HandshakeTimeout: 120 * time.Second, FlightInterval: 9 * time.Second, MaxHandshakes: 1024, MaxHandshakesPerNetwork: 256,
			},
		}},
		DeviceTwin: TwinConfig{UseETags: true, MaxETagsCountInRequest: 8, AskQuietAfter: 10 * time.Second},
		Rivals:     RivalsReport,
		DeviceToDevice: DeviceToDeviceConfig{
			Mode: ModeFull, MaxRequests: 16, MaxObservations: 256, MaxObservationsInAll: 100_000,
		},
		Limits: LimitsConfig{
			Device:  RateConfig{Rate: 200, Burst: 10_000},
			SignIns: SignInsConfig{UnderWay: 64, Waiting: 10_000, MaxWait: 10 * time.Second},
		},
		Drain: DrainConfig{Spread: 500 * time.Millisecond, Commands: 2 * time.Second},
	}
}

// Validate returns everything that is wrong, each with the full path of its key.
func (c Config) Validate() []error {
	var errs []error
	const api = "coapGateway.api.coap."
	bad := func(path, format string, args ...any) {
		errs = append(errs, fmt.Errorf("%s: %s", path, fmt.Sprintf(format, args...)))
	}
	co := c.API.CoAP
	if co.Address == "" && co.PlainAddress == "" && !co.WebSocket.Enabled {
		bad(api+"address", "at least one of address, plainAddress and webSocket.enabled must be set")
	}
	for i, o := range co.WebSocket.Origins {
		// A pattern, or a path, would never be equal to what a browser sends.
		if u, err := url.Parse(o); err != nil || u.Scheme == "" || u.Host == "" || strings.ContainsAny(o, "*@?# ") || u.Path != "" {
			bad(fmt.Sprintf("%swebSocket.origins[%d]", api, i), "%q is no origin; write scheme://host or scheme://host:port", o)
		}
	}
	if len(co.WebSocket.Origins) > 0 && !co.WebSocket.Enabled {
		bad(api+"webSocket.origins", "nobody reads them unless webSocket.enabled is true")
	}
	for _, a := range []struct{ path, value string }{
		{"address", co.Address}, {"plainAddress", co.PlainAddress}, {"externalAddress", co.ExternalAddress},
	} {
		if a.value == "" {
			continue
		}
		_, port, err := net.SplitHostPort(a.value)
		if err != nil {
			bad(api+a.path, "%q is not host:port", a.value)
		} else if n, err := strconv.ParseUint(port, 10, 16); err != nil || a.path == "externalAddress" && n == 0 {
			bad(api+a.path, "%q has no usable port", a.value)
		}
	}
	if len(co.Protocols) == 0 {
		bad(api+"protocols", "at least one of %s and %s must be named", ProtocolTCP, ProtocolUDP)
	}
	for i, p := range co.Protocols {
		if p != ProtocolTCP && p != ProtocolUDP {
			bad(fmt.Sprintf("%sprotocols[%d]", api, i), "%q is neither %s nor %s", p, ProtocolTCP, ProtocolUDP)
		} else if slices.Contains(co.Protocols[:i], p) {
			bad(fmt.Sprintf("%sprotocols[%d]", api, i), "%q is named twice", p)
		}
	}
	if co.MaxMessageSize < 2048 || co.MaxMessageSize > 16<<20 {
		bad(api+"maxMessageSize", "%d is not between 2048 and %d", co.MaxMessageSize, 16<<20)
	}
	if co.MaxConnections < 1 {
		bad(api+"maxConnections", "%d must be at least 1", co.MaxConnections)
	}
	if co.MaxLinks < 1 || co.MaxLinks > 1_000_000 {
		bad(api+"maxLinks", "%d is not between 1 and 1000000", co.MaxLinks)
	}
	if co.KeepAlive.Timeout < time.Second {
		bad(api+"keepAlive.timeout", "%v is less than 1s", co.KeepAlive.Timeout)
	}
	// A device that says something once in a while must not lose its session between its own retransmissions.
	if co.MaxSilence < time.Minute {
		bad(api+"maxSilence", "%v is less than 1m", co.MaxSilence)
	}
	if co.DTLS.HandshakeTimeout < time.Second {
		bad(api+"dtls.handshakeTimeout", "%v is less than 1s", co.DTLS.HandshakeTimeout)
	}
	if co.DTLS.FlightInterval < 100*time.Millisecond {
		bad(api+"dtls.flightInterval", "%v is less than 100ms", co.DTLS.FlightInterval)
	}
	if co.DTLS.MaxHandshakes < 1 {
		bad(api+"dtls.maxHandshakes", "%d must be at least 1", co.DTLS.MaxHandshakes)
	}
	if co.DTLS.MaxHandshakesPerNetwork < 1 {
		bad(api+"dtls.maxHandshakesPerNetwork", "%d must be at least 1", co.DTLS.MaxHandshakesPerNetwork)
	}
	if (co.TLS.CertFile == "") != (co.TLS.KeyFile == "") {
		bad(api+"tls.certFile", "certFile and keyFile must be given together")
	}
	if _, err := conf.Certificates(co.TLS.CAPool); err != nil {
		bad(api+"tls.caPool", "%v", err)
	}
	revocation.CheckSets(co.TLS.CASets, func(path, text string) { bad(api+"tls."+path, "%s", text) })
	if co.TLS.ClientCertificateRequired && !co.TLS.IdentityPropertiesRequired && co.Authorization.DeviceIDClaim != "" {
		// There would be nothing to compare the claim with, and leaving the comparison out would let any device's token be used
		// from any device's connection.
		bad(api+"authorization.deviceIDClaim", "cannot be used with tls.identityPropertiesRequired: false")
	}
	var names []string
	for i, p := range co.Authorization.Providers {
		path := fmt.Sprintf("%sauthorization.providers[%d].", api, i)
		if p.Name == "" {
			bad(path+"name", "must be set")
		} else if slices.Contains(names, p.Name) {
			bad(path+"name", "%q is used twice", p.Name)
		}
		names = append(names, p.Name)
		if g := p.GrantType; g != "" && g != GrantAuthorizationCode && g != GrantClientCredentials {
			bad(path+"grantType", "%q is neither %s nor %s", g, GrantAuthorizationCode, GrantClientCredentials)
		}
	}
	if n := c.DeviceTwin.MaxETagsCountInRequest; n < 0 || n > 64 {
		bad("coapGateway.deviceTwin.maxETagsCountInRequest", "%d is not between 0 and 64", n)
	}
	if d := c.DeviceTwin.AskQuietAfter; d != 0 && d < time.Second {
		bad("coapGateway.deviceTwin.askQuietAfter", "%v is neither 0 nor at least 1s", d)
	}
	if c.Rivals != RivalsReport && c.Rivals != RivalsQuarantine {
		bad("coapGateway.rivals", "%q is neither %s nor %s", c.Rivals, RivalsReport, RivalsQuarantine)
	}
	dd := c.DeviceToDevice
	if dd.Mode != ModeOff && dd.Mode != ModeRead && dd.Mode != ModeFull {
		bad("coapGateway.deviceToDevice.mode", "%q is none of %s, %s and %s", dd.Mode, ModeOff, ModeRead, ModeFull)
	}
	if dd.MaxRequests < 1 || dd.MaxRequests > 1024 {
		bad("coapGateway.deviceToDevice.maxRequests", "%d is not between 1 and 1024", dd.MaxRequests)
	}
	if dd.MaxObservations < 0 || dd.MaxObservations > 10_000 {
		bad("coapGateway.deviceToDevice.maxObservations", "%d is not between 0 and 10000", dd.MaxObservations)
	}
	if dd.MaxObservationsInAll < 0 {
		bad("coapGateway.deviceToDevice.maxObservationsInAll", "%d is negative", dd.MaxObservationsInAll)
	}
	for _, r := range []struct {
		path string
		RateConfig
	}{{"device", c.Limits.Device}, {"owner", c.Limits.Owner}, {"hub", c.Limits.Hub}} {
		if r.Rate < 0 || r.Rate > 1_000_000 {
			bad("coapGateway.limits."+r.path+".rate", "%d is not between 0 and 1000000", r.Rate)
		}
		if r.Rate > 0 && r.Burst < 1 || r.Burst < 0 || r.Burst > 10_000_000 {
			bad("coapGateway.limits."+r.path+".burst", "%d is not between 1 and 10000000", r.Burst)
		}
	}
	if n := c.Limits.SignIns.UnderWay; n < 1 || n > 10_000 {
		bad("coapGateway.limits.signIns.underWay", "%d is not between 1 and 10000", n)
	}
	if n := c.Limits.SignIns.Waiting; n < 0 || n > 1_000_000 {
		bad("coapGateway.limits.signIns.waiting", "%d is not between 0 and 1000000", n)
	}
	if d := c.Limits.SignIns.MaxWait; d < 0 || d > time.Minute {
		bad("coapGateway.limits.signIns.maxWait", "%v is not between 0s and 1m", d)
	}
	if d := c.Drain.Spread; d < 0 || d > time.Hour {
		bad("coapGateway.drain.spread", "%v is not between 0s and 1h", d)
	}
	if d := c.Drain.Commands; d < 0 || d > time.Hour {
		bad("coapGateway.drain.commands", "%v is not between 0s and 1h", d)
	}
	return errs
}

// speaks tells whether a protocol is configured.
func (c *CoAPConfig) speaks(protocol string) bool { return slices.Contains(c.Protocols, protocol) }
