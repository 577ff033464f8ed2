package coapgateway

import (
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/internal/revocation"
)

func TestDefaultIsValid(t *testing.T) {
	if errs := Default().Validate(); len(errs) > 0 {
		t.Error(errs)
	}
	c := Default().API.CoAP
	if c.WebSocket.Enabled || !c.TLS.ClientCertificateRequired || !c.TLS.IdentityPropertiesRequired || c.PlainAddress != "" || c.Authorization.StrictDeviceID {
		t.Errorf("the defaults are not the safe ones: %+v", c)
	}
}

// A hub may be there for browsers alone.
func TestWebSocketAloneIsValid(t *testing.T) {
	c := Default()
	c.API.CoAP.Address, c.API.CoAP.WebSocket = "", WebSocketConfig{Enabled: true, Origins: []string{"https://console.example:8443"}}
	if errs := c.Validate(); len(errs) > 0 {
		t.Error(errs)
	}
}

func TestValidateNamesThePath(t *testing.T) {
	testCA := newCA(t).pem()
	aSet := func(spoil func(*revocation.CASetConfig)) revocation.CASetConfig {
		s := revocation.CASetConfig{Name: "a", CAs: []string{testCA}, Lists: []string{"https://lists.example/a.crl", "file:///x", "/y"}, Responder: "http://x"}
		if spoil != nil {
			spoil(&s)
		}
		return s
	}
	for path, spoil := range map[string]func(*Config){
		"coapGateway.api.coap.address":         func(c *Config) { c.API.CoAP.Address = "" },
		"coapGateway.api.coap.plainAddress":    func(c *Config) { c.API.CoAP.PlainAddress = "nonsense" },
		"coapGateway.api.coap.externalAddress": func(c *Config) { c.API.CoAP.ExternalAddress = "hub:0" },
		"coapGateway.api.coap.protocols":       func(c *Config) { c.API.CoAP.Protocols = nil },
		"coapGateway.api.coap.protocols[0]":    func(c *Config) { c.API.CoAP.Protocols = []string{"sctp"} },
		"coapGateway.api.coap.protocols[1]":    func(c *Config) { c.API.CoAP.Protocols = []string{"udp", "udp"} },
		"coapGateway.api.coap.maxSilence":      func(c *Config) { c.API.CoAP.MaxSilence = time.Second },
		"coapGateway.api.coap.dtls.handshakeTimeout": func(c *Config) {
			c.API.CoAP.DTLS.HandshakeTimeout = 0
		},
		"coapGateway.api.coap.dtls.flightInterval": func(c *Config) { c.API.CoAP.DTLS.FlightInterval = 0 },
		"coapGateway.api.coap.dtls.maxHandshakes":  func(c *Config) { c.API.CoAP.DTLS.MaxHandshakes = 0 },
		"coapGateway.api.coap.dtls.maxHandshakesPerNetwork": func(c *Config) {
			c.API.CoAP.DTLS.MaxHandshakesPerNetwork = 0
		},
		"coapGateway.api.coap.webSocket.origins": func(c *Config) { c.API.CoAP.WebSocket.Origins = []string{"https://a.example"} },
		"coapGateway.api.coap.webSocket.origins[0]": func(c *Config) {
			c.API.CoAP.WebSocket = WebSocketConfig{Enabled: true, Origins: []string{"*"}}
		},
		"coapGateway.api.coap.webSocket.origins[1]": func(c *Config) {
			c.API.CoAP.WebSocket = WebSocketConfig{Enabled: true, Origins: []string{"https://a.example:8443", "https://a.example/"}}
		},
		"coapGateway.api.coap.maxMessageSize":     func(c *Config) { c.API.CoAP.MaxMessageSize = 12 },
		"coapGateway.api.coap.maxConnections":     func(c *Config) { c.API.CoAP.MaxConnections = 0 },
		"coapGateway.api.coap.maxLinks":           func(c *Config) { c.API.CoAP.MaxLinks = 0 },
		"coapGateway.api.coap.keepAlive.timeout":  func(c *Config) { c.API.CoAP.KeepAlive.Timeout = time.Millisecond },
		"coapGateway.api.coap.tls.certFile":       func(c *Config) { c.API.CoAP.TLS.KeyFile = "key.pem" },
		"coapGateway.api.coap.tls.caPool":         func(c *Config) { c.API.CoAP.TLS.CAPool = []string{"/does/not/exist"} },
		"coapGateway.api.coap.tls.caSets[0].name": func(c *Config) { c.API.CoAP.TLS.CASets = []revocation.CASetConfig{{CAs: []string{testCA}}} },
		"coapGateway.api.coap.tls.caSets[1].name": func(c *Config) { c.API.CoAP.TLS.CASets = []revocation.CASetConfig{aSet(nil), aSet(nil)} },
		"coapGateway.api.coap.tls.caSets[0].cas": func(c *Config) {
			c.API.CoAP.TLS.CASets = []revocation.CASetConfig{aSet(func(s *revocation.CASetConfig) { s.CAs[0] = "/x" })}
		},
		"coapGateway.api.coap.tls.caSets[0].lists": func(c *Config) {
			c.API.CoAP.TLS.CASets = []revocation.CASetConfig{aSet(func(s *revocation.CASetConfig) { s.Lists = []string{"ldap://x/y"} })}
		},
		"coapGateway.api.coap.tls.caSets[0].responder": func(c *Config) {
			c.API.CoAP.TLS.CASets = []revocation.CASetConfig{aSet(func(s *revocation.CASetConfig) { s.Responder = "x" })}
		},
		"coapGateway.api.coap.tls.caSets[0].policy": func(c *Config) {
			c.API.CoAP.TLS.CASets = []revocation.CASetConfig{aSet(func(s *revocation.CASetConfig) { s.Policy = "ajar" })}
		},
		"coapGateway.api.coap.tls.caSets[0].refresh": func(c *Config) {
			c.API.CoAP.TLS.CASets = []revocation.CASetConfig{aSet(func(s *revocation.CASetConfig) { s.Refresh = time.Second })}
		},
		"coapGateway.api.coap.tls.caSets": func(c *Config) { c.API.CoAP.TLS.CASets = make([]revocation.CASetConfig, revocation.MaxSets+1) },
		"coapGateway.api.coap.authorization.deviceIDClaim": func(c *Config) {
			c.API.CoAP.Authorization.DeviceIDClaim, c.API.CoAP.TLS.IdentityPropertiesRequired = "x", false
		},
		"coapGateway.api.coap.authorization.providers[0].name": func(c *Config) {
			c.API.CoAP.Authorization.Providers = []ProviderConfig{{}}
		},
		"coapGateway.api.coap.authorization.providers[1].name": func(c *Config) {
			c.API.CoAP.Authorization.Providers = []ProviderConfig{{Name: "a"}, {Name: "a"}}
		},
		"coapGateway.api.coap.authorization.providers[0].grantType": func(c *Config) {
			c.API.CoAP.Authorization.Providers = []ProviderConfig{{Name: "a", GrantType: "implicit"}}
		},
		"coapGateway.deviceTwin.maxETagsCountInRequest":   func(c *Config) { c.DeviceTwin.MaxETagsCountInRequest = -1 },
		"coapGateway.deviceToDevice.mode":                 func(c *Config) { c.DeviceToDevice.Mode = "" },
		"coapGateway.deviceToDevice.maxRequests":          func(c *Config) { c.DeviceToDevice.MaxRequests = 0 },
		"coapGateway.deviceToDevice.maxObservations":      func(c *Config) { c.DeviceToDevice.MaxObservations = -1 },
		"coapGateway.deviceToDevice.maxObservationsInAll": func(c *Config) { c.DeviceToDevice.MaxObservationsInAll = -1 },
		"coapGateway.limits.device.rate":                  func(c *Config) { c.Limits.Device.Rate = -1 },
		"coapGateway.limits.device.burst":                 func(c *Config) { c.Limits.Device.Burst = 0 },
		"coapGateway.limits.owner.burst":                  func(c *Config) { c.Limits.Owner.Rate = 1 },
		"coapGateway.limits.hub.rate":                     func(c *Config) { c.Limits.Hub.Rate = -1 },
		"coapGateway.limits.signIns.underWay":             func(c *Config) { c.Limits.SignIns.UnderWay = 0 },
		"coapGateway.limits.signIns.waiting":              func(c *Config) { c.Limits.SignIns.Waiting = -1 },
		"coapGateway.limits.signIns.maxWait":              func(c *Config) { c.Limits.SignIns.MaxWait = time.Hour },
	} {
		t.Run(path, func(t *testing.T) {
			c := Default()
			spoil(&c)
			errs := c.Validate()
			if len(errs) != 1 || !strings.HasPrefix(errs[0].Error(), path+": ") {
				t.Errorf("got %v, want one error at %s", errs, path)
			}
		})
	}
	all := Default()
	all.API.CoAP.MaxLinks, all.API.CoAP.MaxConnections = 0, 0
	if errs := all.Validate(); len(errs) != 2 {
		t.Errorf("mistakes are not reported together: %v", errs)
	}
}
