package coapgateway

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
)

// awaitEnded waits until a device's session ended for a reason and the device is offline.
func (h *hall) awaitEnded(d *device, reason string) {
	h.t.Helper()
	d.awaitClosed()
	h.w.awaitLog(h.t, "offline "+string(d.id))
	h.w.await(h.t, "the reason "+reason, func() bool { x, _ := h.gw.Diagnostics(d.id); return x.EndReason == reason })
}

func TestRevokedGrantEndsTheSession(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.w.own(fanID, "alice")
	h.w.grant("of-lamp", hub.Claims{Issuer: "i", Grant: "1"})
	h.w.grant("of-fan", hub.Claims{Issuer: "i", Grant: "2"})
	h.w.grant("newer-of-fan", hub.Claims{Issuer: "i", Grant: "3"})
	lamp, fan := h.plain(lampID), h.plain(fanID)
	lamp.want(lamp.signIn("of-lamp"), "2.04", "")
	fan.want(fan.signIn("of-fan"), "2.04", "")
	h.gw.EndGrant("i", "1")
	h.awaitEnded(lamp, "revoked")
	fan.alive()
	h.gw.EndGrant("another", "2") // a principal is of one issuer
	fan.want(fan.signIn("newer-of-fan"), "2.04", "")
	h.gw.EndGrant("i", "2") // the session stands on another grant now
	fan.alive()
	h.gw.EndGrant("i", "3")
	h.awaitEnded(fan, "revoked")
	if n := len(h.gw.live.grants) + len(h.gw.live.keys); n != 0 {
		t.Errorf("%d entries are left of sessions that are over", n)
	}
}

// A refresh puts the session on the new token's grant, and nothing ends that still stands: the older token may be the only one
// that the device got to know of.
func TestRefreshMovesTheSessionToItsGrant(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.w.grant("first", hub.Claims{Issuer: "i", Grant: "1"})
	h.w.grant("same", hub.Claims{Issuer: "i", Grant: "1"})
	h.w.grant("other", hub.Claims{Issuer: "i", Grant: "2"})
	h.w.mu.Lock()
	h.w.refresh["to-same"] = hub.Tokens{Access: "same", Refresh: "to-other", Expiry: time.Now().Add(time.Hour)}
	h.w.refresh["to-other"] = hub.Tokens{Access: "other", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
	h.w.mu.Unlock()
	d := h.plain(lampID)
	d.want(d.signIn("first"), "2.04", "")
	for _, token := range []string{"to-same", "to-other"} {
		d.want(d.post("/oic/sec/tokenrefresh", body{"di": string(lampID), "uid": "alice", "refreshtoken": token}), "2.04", "")
		d.want(d.do(codes.GET, "/oic/rd", nil), "2.05", "")
	}
	h.gw.EndGrant("i", "1")
	d.alive()
	h.gw.EndGrant("i", "2")
	h.awaitEnded(d, "revoked")
}

// A grant may end between the moment its token was found good and the one the session could be found by it.
func TestGrantEndsDuringSignIn(t *testing.T) {
	t.Parallel()
	var h *hall
	during := func() {}
	h = start(t, func(_ *Config, deps *Deps) {
		world := deps.Verifier.(*fakeVerifier).verify
		deps.Verifier = &fakeVerifier{verify: func(ctx context.Context, token string) (hub.Claims, error) {
			c, err := world(ctx, token)
			during()
			return c, err
		}}
	})
	h.w.own(lampID, "alice")
	h.w.own(fanID, "alice")
	revoke := func(token, id string) func() {
		return func() {
			unlock := h.w.lock()
			delete(h.w.tokens, token)
			unlock()
			h.gw.EndGrant("i", id)
			during = func() {}
		}
	}
	h.w.grant("first", hub.Claims{Issuer: "i", Grant: "1"})
	during = revoke("first", "1")
	d := h.plain(lampID)
	d.want(d.signIn("first"), "4.01", "token-invalid: ")
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
	// The end of another's grant at the same moment costs one more look and nothing else.
	h.w.grant("second", hub.Claims{Issuer: "i", Grant: "2"})
	during = revoke("unknown", "3")
	d = h.plain(fanID)
	d.want(d.signIn("second"), "2.04", "")
	// A refresh on the session is looked at in the same way.
	h.w.grant("third", hub.Claims{Issuer: "i", Grant: "4"})
	unlock := h.w.lock()
	h.w.refresh["r"] = hub.Tokens{Access: "third", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
	unlock()
	during = revoke("third", "4")
	d.want(d.post("/oic/sec/tokenrefresh", body{"di": string(fanID), "uid": "alice", "refreshtoken": "r"}), "4.01", "token-invalid: ")
	d.awaitClosed()
}

// TestRevokedCertificateEndsItsSession: that one, and no other's with the same device or, of another authority, the same serial.
func TestRevokedCertificateEndsItsSession(t *testing.T) {
	t.Parallel()
	var l ledger
	foreign := newCA(t)
	h := start(t, func(_ *Config, deps *Deps) {
		deps.Revoked = l.revoked
		deps.ClientCAs = house.ca.pool()
		deps.ClientCAs.AddCert(foreign.cert)
	})
	h.w.own(lampID, "alice")
	h.w.own(fanID, "alice")
	h.w.grant("token", hub.Claims{})
	enter := func(id hub.DeviceID, cert tls.Certificate) *device {
		t.Helper()
		d := h.connect(h.device(id), h.gw.Addresses().Secure, h.tlsFor(cert))
		d.want(d.signIn("token"), "2.04", "")
		return d
	}
	first, second := h.ca.identity(t, lampID, nil), h.ca.identity(t, lampID, nil)
	lamp := enter(lampID, first)
	fan := enter(fanID, foreign.identity(t, fanID, func(c *x509.Certificate) { c.SerialNumber = first.Leaf.SerialNumber }))
	h.gw.EndCertificate(l.revoke(first))
	h.awaitEnded(lamp, "certificate-revoked")
	fan.alive()
	lamp = enter(lampID, second)
	h.gw.EndCertificate(l.revoke(first)) // told once more
	lamp.alive()
	h.gw.EndCertificate(l.revoke(second))
	h.awaitEnded(lamp, "certificate-revoked")
	fan.want(fan.signIn("token"), "2.04", "")
	_ = fan.conn.Close()
	h.w.awaitLog(t, "offline "+string(fanID))
	h.w.await(t, "empty books", func() bool {
		h.gw.live.mu.Lock()
		defer h.gw.live.mu.Unlock()
		return len(h.gw.live.certs) == 0
	})
}

// A gateway that nobody tells of revocations ends no session for one.
func TestNobodyKnowsOfRevocations(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	cert := h.ca.identity(t, lampID, nil)
	d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(cert))
	d.want(d.signIn("token"), "2.04", "")
	h.gw.EndCertificate(new(ledger).revoke(cert))
	d.want(d.signIn("token"), "2.04", "")
}

// The same over DTLS, where the certificate comes another way.
func TestRevokedCertificateEndsItsAssociation(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		f := newField(t, w, 1, nil)
		defer f.end()
		d := &day{field: f, w: w}
		lamp, fan := d.come(12), d.come(16)
		end := time.Now()
		f.gw.EndCertificate(f.ledger.revoke(lamp.cert))
		after(time.Second)
		if x, _ := f.gw.Diagnostics(lamp.id); x.Online || x.EndReason != "certificate-revoked" || x.EndedAt.Sub(end) > time.Second {
			t.Errorf("the lamp: online %v, %q after %v", x.Online, x.EndReason, x.EndedAt.Sub(end))
		}
		if x, _ := f.gw.Diagnostics(fan.id); !x.Online {
			t.Errorf("the fan went: %q", x.EndReason)
		}
		fan.must(codes.Content, fan.request(codes.GET, "/oic/rd", nil))
		lamp.vanish()
		fan.vanish()
	})
}

// A certificate may end between its handshake and a request. Whoever is not signed in may stay until it asks for something that
// needs one.
func TestCertificateRevokedBehindItsHandshake(t *testing.T) {
	t.Parallel()
	for name, ask := range map[string]func(*device) reply{
		"sign-in": func(d *device) reply { return d.signIn("token") },
		"sign-up": func(d *device) reply { return d.signUp("code") },
		"sign-out": func(d *device) reply {
			return d.post("/oic/sec/session", body{"uid": "alice", "accesstoken": "token", "login": false})
		},
		"refresh": func(d *device) reply {
			return d.post("/oic/sec/tokenrefresh", body{"uid": "alice", "refreshtoken": "r"})
		},
		"sign-off": func(d *device) reply {
			return d.do(codes.DELETE, "/oic/sec/account", nil, query("uid=alice"), query("accesstoken=token"))
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var l ledger
			h := start(t, func(_ *Config, deps *Deps) { deps.Revoked = l.revoked })
			h.w.own(lampID, "alice")
			h.issue("code", "token", hub.Claims{})
			unlock := h.w.lock()
			h.w.refresh["r"] = hub.Tokens{Access: "token", Refresh: "r", Expiry: time.Now().Add(time.Hour)}
			unlock()
			cert := h.ca.identity(t, lampID, nil)
			d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(cert))
			d.alive()
			h.gw.EndCertificate(l.revoke(cert))
			d.alive()
			d.want(ask(d), "4.01", "certificate-revoked: ")
			d.awaitClosed()
			for _, what := range []string{"online " + string(lampID), "signed-up " + string(lampID) + " alice", "signed-off " + string(lampID)} {
				if h.w.count(what) > 0 {
					t.Errorf("%s although it was refused", what)
				}
			}
		})
	}
}

// Or between the moment it was found good and the one the session could be found by it.
func TestCertificateRevokedDuringSignIn(t *testing.T) {
	t.Parallel()
	var l ledger
	var h *hall
	during := func() {}
	h = start(t, func(_ *Config, deps *Deps) {
		deps.Revoked = l.revoked
		world := deps.Verifier.(*fakeVerifier).verify
		deps.Verifier = &fakeVerifier{verify: func(ctx context.Context, token string) (hub.Claims, error) {
			during()
			return world(ctx, token)
		}}
	})
	h.w.own(lampID, "alice")
	h.w.grant("token", hub.Claims{})
	first, second := h.ca.identity(t, lampID, nil), h.ca.identity(t, lampID, nil)
	during = func() { h.gw.EndCertificate(l.revoke(first)) }
	d := h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(first))
	d.want(d.signIn("token"), "4.01", "certificate-revoked: ")
	d.awaitClosed()
	h.w.awaitLog(t, "offline "+string(lampID))
	// The end of another one at the same moment costs one more look and nothing else.
	d = h.connect(h.device(lampID), h.gw.Addresses().Secure, h.tlsFor(second))
	d.want(d.signIn("token"), "2.04", "")
	d.alive()
}

// BenchmarkLive has 100 000 sessions; entering and leaving is what each of them costs, ending what a revocation does.
func BenchmarkLive(b *testing.B) {
	const fleet = 100_000
	l := newLive()
	all := make([]session, fleet)
	for i := range all {
		all[i].claims = hub.Claims{Issuer: "https://hub.example/oauth", Grant: fmt.Sprintf("%032x", i)}
		l.enter(&all[i], "")
	}
	b.Run("session", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			s := &all[i%fleet]
			l.leave(s)
			l.enter(s, "")
		}
	})
	b.Run("revocation", func(b *testing.B) {
		for i := range b.N {
			s := &all[i%fleet]
			if len(ended(l, l.grants, s.grant)) != 1 {
				b.Fatal("the session is not found")
			}
		}
	})
}

// The end of a pre-shared key ends whoever came with it, and nobody who is back with another: word of it may come late, or say nothing of
// whose it was, and the keys may not be there to compare for a while.
func TestEndedKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		w := newWorld()
		f := newField(t, w, 1, nil)
		defer f.end()
		d := &day{field: f, w: w}
		lamp := d.come(2)
		online := func(want bool, what string) {
			t.Helper()
			after(time.Second)
			if x, _ := f.gw.Diagnostics(lamp.id); x.Online != want {
				t.Fatalf("%s: online %v, %q", what, x.Online, x.EndReason)
			}
		}
		f.gw.EndKey(lamp.id)
		f.gw.EndKey("")
		online(true, "the key is its own")
		f.mu.Lock()
		f.keys = errors.New("the store is away")
		f.mu.Unlock()
		f.replaceKey()
		f.gw.EndKey("")
		online(true, "nobody knows")
		f.mu.Lock()
		f.keys = nil
		f.mu.Unlock()
		after(keyAgain)
		online(false, "the key is another one's")
		if x, _ := f.gw.Diagnostics(lamp.id); x.EndReason != "key-replaced" {
			t.Errorf("it ended with %q", x.EndReason)
		}
		lamp.vanish()
	})
}
