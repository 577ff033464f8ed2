package coapgateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pion/dtls/v3"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// bouncer is who is not let in: devices, and certificates in a chain, each with a code.
type bouncer struct {
	mu    sync.Mutex // guards all below
	devs  map[hub.DeviceID]string
	certs map[string]string
}

func (b *bouncer) deny(dev hub.DeviceID, code string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.devs == nil {
		b.devs = map[hub.DeviceID]string{}
	}
	b.devs[dev] = code
}

func (b *bouncer) denyCert(c *x509.Certificate, code string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.certs == nil {
		b.certs = map[string]string{}
	}
	b.certs[string(c.Raw)] = code
}

func (b *bouncer) denied(dev hub.DeviceID, chain []*x509.Certificate) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	code := b.devs[dev]
	for _, c := range chain {
		if code == "" {
			code = b.certs[string(c.Raw)]
		}
	}
	if code == "" {
		return nil
	}
	return hub.NewError(hub.Denied, code, "it is not let in")
}

// TestDeniedDeviceIsKeptOut, on a connection that was there before, too: its session ends, and each account request is answered
// 4.03, which leaves it its credentials, and closes.
func TestDeniedDeviceIsKeptOut(t *testing.T) {
	t.Parallel()
	for name, secure := range map[string]bool{"by what it says": false, "by its certificate": true} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var b bouncer
			h := start(t, func(_ *Config, deps *Deps) { deps.Denied = b.denied })
			h.w.own(lampID, "alice")
			h.w.own(fanID, "alice")
			h.w.grant("token", hub.Claims{})
			connect := func(id hub.DeviceID) *device {
				t.Helper()
				if secure {
					return h.secure(id)
				}
				return h.plain(id)
			}
			lamp, fan := connect(lampID), connect(fanID)
			lamp.want(lamp.signIn("token"), "2.04", "")
			fan.want(fan.signIn("token"), "2.04", "")
			waiting := map[string]*device{}
			asks := map[string]func(*device) reply{
				"sign-up": func(d *device) reply { return d.signUp("code") },
				"sign-in": func(d *device) reply { return d.signIn("token") },
				"refresh": func(d *device) reply {
					return d.post("/oic/sec/tokenrefresh", body{"di": string(lampID), "uid": "alice", "refreshtoken": "r"})
				},
				"sign-off": func(d *device) reply {
					return d.do(codes.DELETE, "/oic/sec/account", nil, query("di="+string(lampID)), query("uid=alice"), query("accesstoken=token"))
				},
			}
			for what := range asks {
				if secure { // its handshake was before, and none is possible after
					waiting[what] = connect(lampID)
					waiting[what].alive() // in TLS 1.3 a client is done before the server has looked at it
				}
			}
			h.issue("code", "token", hub.Claims{})
			b.deny(lampID, "device-disabled")
			h.gw.EndDenied(lampID)
			h.awaitEnded(lamp, "device-disabled")
			for what, ask := range asks {
				d := waiting[what]
				if d == nil {
					d = connect(lampID)
				}
				d.want(ask(d), "4.03", "device-disabled: ")
				d.awaitClosed()
			}
			if !slices.ContainsFunc(h.gw.Refused(), func(r Refusal) bool {
				return r.Device == lampID && strings.HasPrefix(r.Reason, "device-disabled: ")
			}) {
				t.Errorf("refused: %+v", h.gw.Refused())
			}
			if own := h.w.owned[lampID]; own.Owner != "alice" {
				t.Error("it signed off")
			}
			h.gw.EndDenied("") // nobody else is
			fan.alive()
			fan.want(fan.signIn("token"), "2.04", "")
		})
	}
}

// While nobody knows who is let in, whoever comes is told to come again, over a connection that stands, and whoever is in stays.
func TestNobodyKnowsWhoIsDenied(t *testing.T) {
	t.Parallel()
	var away atomic.Bool
	h := start(t, func(_ *Config, deps *Deps) {
		deps.Denied = func(hub.DeviceID, []*x509.Certificate) error {
			if away.Load() {
				return hub.NewError(hub.Unavailable, "identities-away", "who may come in cannot be found out now")
			}
			return nil
		}
	})
	h.w.own(lampID, "alice")
	h.w.own(fanID, "alice")
	h.w.grant("token", hub.Claims{})
	fan := h.secure(fanID)
	fan.want(fan.signIn("token"), "2.04", "")
	away.Store(true)
	h.gw.EndDenied("")
	conn, err := h.shake(t, dtls.WithCertificates(h.ca.identity(t, lampID, nil)))
	if err != nil {
		t.Fatalf("over DTLS: %v", err)
	}
	_ = conn.Close()
	lamp := h.secure(lampID)
	lamp.alive()
	lamp.want(lamp.signIn("token"), "5.03", "identities-away: ")
	lamp.awaitClosed()
	fan.alive()
	if n := h.w.count("offline " + string(fanID)); n > 0 {
		t.Error("a session ended because nobody knew")
	}
	away.Store(false)
	lamp = h.secure(lampID)
	lamp.want(lamp.signIn("token"), "2.04", "")
}

// A device may be disabled between the moment it was looked at and the one its session could be found.
func TestDeniedDuringSignIn(t *testing.T) {
	t.Parallel()
	var b bouncer
	var h *hall
	h = start(t, func(_ *Config, deps *Deps) {
		deps.Denied = b.denied
		world := deps.Directory.(*fakeDirectory).signIn
		deps.Directory.(*fakeDirectory).signIn = func(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
			got, err := world(ctx, own, c, user, to)
			b.deny(lampID, "device-disabled")
			h.gw.EndDenied(lampID)
			return got, err
		}
	})
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	d := h.plain(lampID)
	d.want(d.signIn("token"), "4.03", "device-disabled: ")
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
}

// TestDeniedInTheHandshake: over TLS and DTLS, by the device, its certificate, and any CA above it, also one that neither the
// device has sent nor the verified chain reaches.
func TestDeniedInTheHandshake(t *testing.T) {
	t.Parallel()
	root := newCA(t)
	issuing, other := root.issuing(t, nil), root.issuing(t, nil)
	for name, deny := range map[string]func(*bouncer, tls.Certificate){
		"device":      func(b *bouncer, _ tls.Certificate) { b.deny(lampID, "device-denied") },
		"certificate": func(b *bouncer, c tls.Certificate) { b.denyCert(c.Leaf, "certificate-denied") },
		"issuing CA":  func(b *bouncer, _ tls.Certificate) { b.denyCert(issuing.cert, "ca-denied") },
		"root":        func(b *bouncer, _ tls.Certificate) { b.denyCert(root.cert, "ca-denied") },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var b bouncer
			h := start(t, func(_ *Config, d *Deps) {
				d.ClientCAs, d.ClientIntermediates = root.pool(), []*x509.Certificate{issuing.cert, other.cert}
				d.Denied = b.denied
			})
			h.w.own(lampID, "alice")
			h.w.own(fanID, "alice")
			h.w.grant("token", hub.Claims{})
			bad, good := issuing.identity(t, lampID, nil), other.identity(t, fanID, nil)
			lamp := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(bad))
			lamp.want(lamp.signIn("token"), "2.04", "")
			fan := h.connect(h.device(fanID), h.gw.Addresses().Secure, h.tlsFor(good))
			fan.want(fan.signIn("token"), "2.04", "")
			deny(&b, bad)
			h.gw.EndDenied("")
			lamp.awaitClosed()
			h.refusedInHandshake(t, bad, "it is not let in")
			if _, err := h.shake(t, dtls.WithCertificates(bad)); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
				t.Errorf("the DTLS handshake ended with %v, want the alert access_denied", err)
			}
			if name != "root" {
				fan.alive()
				h.connect(h.device(fanID), h.gw.Addresses().Secure, h.tlsFor(good)).alive()
			}
		})
	}
}

// With a pre-shared key, too, once the device has shown that it has it.
func TestDeniedPreSharedKey(t *testing.T) {
	t.Parallel()
	var b bouncer
	key := []byte("a key of sixteen")
	h := start(t, func(_ *Config, d *Deps) {
		d.PSK = func(context.Context, hub.DeviceID) ([]byte, error) { return key, nil }
		d.Denied = b.denied
	})
	shake := func(id hub.DeviceID) error {
		c, err := h.shake(t, dtls.WithPSK(func([]byte) ([]byte, error) { return key, nil }), dtls.WithPSKIdentityHint([]byte(id)),
			dtls.WithCipherSuites(dtls.TLS_PSK_WITH_AES_128_CCM_8))
		if err == nil {
			_ = c.Close()
		}
		return err
	}
	b.deny(lampID, "device-denied")
	begun := time.Now()
	if err := shake(lampID); err == nil || !strings.Contains(err.Error(), "AccessDenied") {
		t.Errorf("the handshake ended with %v, want the alert access_denied", err)
	}
	h.recorded(t, begun, "it is not let in")
	if err := shake(fanID); err != nil {
		t.Error(err)
	}
}

// Another device's commands do not reach it; what it said before is there.
func TestDeniedDeviceGetsNoCommands(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.published("/light")
	h.report("/light", hub.FormatOCFCBOR, "\xa0", "\xe7\x01")
	h.w.ids.reachable = func(dev hub.DeviceID) error {
		if dev == lampID {
			return hub.NewError(hub.Precondition, "device-disabled", "the device is disabled")
		}
		return nil
	}
	d := h.online(fanID, mute)
	d.want(d.do(codes.POST, at(lampID, "/light"), []byte{0xa0}), "4.00", "device-disabled: ")
	d.want(d.do(codes.GET, at(lampID, "/light"), nil), "2.05", "")
	if len(h.w.orders) != 0 {
		t.Errorf("ordered: %+v", h.w.orders)
	}
}
