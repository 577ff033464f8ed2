package e2e_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// lives has a device come and stay, until the test ends or leave is called.
func lives(t *testing.T, cfg device.Config, code string) (leave func()) {
	t.Helper()
	d, err := device.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { // ends with cancel
		defer close(ended)
		_ = d.Run(ctx, func(context.Context) (string, error) { return code, nil })
	}()
	leave = func() { cancel(); <-ended }
	t.Cleanup(leave)
	return leave
}

// again restarts the hub where it is: the devices have no other address.
func again(t *testing.T, h *hubtest.Hub) {
	t.Helper()
	hubtest.WithConfig("coapGateway.api.coap.address=" + h.CoAPS)(h)
	h.Restart(t)
}

func sum(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

// TestEndOfTrust: whatever ends the trust in a device ends its session, and no other's; it tries to come again, in vain, also after
// the hub has started anew; and who was only disabled or denied for a while comes back with what it has.
func TestEndOfTrust(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls"), transportOf("psk")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			ctx := t.Context()
			deny := func(of hub.DenialOf, value func(*x509.Certificate) string) func(string, *x509.Certificate) error {
				return func(id string, leaf *x509.Certificate) error {
					v := id
					if value != nil {
						v = value(leaf)
					}
					_, err := h.Control.Deny(ctx, bundle.Denial{Of: of, Value: v, Reason: "a test"})
					return err
				}
			}
			ends := []struct {
				name, reason, refusal string
				end                   func(id string, leaf *x509.Certificate) error
				certificate           bool
			}{
				{"disabled by its owner", "device-disabled", "the device is disabled", func(id string, _ *x509.Certificate) error {
					if status := a.ask(http.MethodPut, "/api/v1/devices/"+id+"/access", `{"state":"disabled"}`, nil); status != http.StatusOK {
						return fmt.Errorf("status %d", status)
					}
					return nil
				}, false},
				{"deleted by its owner", "deleted", map[bool]string{true: "the key is not that of the identity", false: "certificate was revoked"}[tr.name == "psk"], func(id string, _ *x509.Certificate) error {
					if status := a.ask(http.MethodDelete, "/api/v1/devices/"+id, "", nil); status != http.StatusOK {
						return fmt.Errorf("status %d", status)
					}
					return nil
				}, false},
				{"denied by its ID", "device-denied", "the device is on the hub's deny list", deny(hub.DenyDevice, nil), false},
				{"revoked", "certificate-revoked", "certificate was revoked", func(id string, _ *x509.Certificate) error {
					_, err := h.Control.RevokeCertificates(ctx, bundle.CertificatesRequest{DeviceID: id})
					return err
				}, true},
				{"denied by its key", "key-denied", "key is on the hub's deny list", deny(hub.DenyKey, func(c *x509.Certificate) string {
					return sum(c.RawSubjectPublicKeyInfo)
				}), true},
				{"denied by its certificate", "certificate-denied", "certificate is on the hub's deny list", deny(hub.DenyCertificate, func(c *x509.Certificate) string {
					return sum(c.Raw)
				}), true},
			}
			bystander := deviceID(1)
			ids := []string{bystander}
			leaves := map[string]*x509.Certificate{}
			for i, e := range ends {
				if !e.certificate || tr.name != "psk" {
					ids = append(ids, deviceID(2+i))
				}
			}
			for _, id := range ids {
				cfg := simulation(t, h, tr, id)
				if cfg.TLS != nil {
					leaves[id] = cfg.TLS.Certificates[0].Leaf
				}
				lives(t, cfg, h.Code(t, id))
			}
			sessions := map[string]uint64{}
			for _, id := range ids {
				a.until(id+" to be in sync", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })
				d, err := h.Control.Device(ctx, id)
				if err != nil {
					t.Fatal(err)
				}
				sessions[id] = d.Session
			}
			for i, e := range ends {
				id := deviceID(2 + i)
				if !slices.Contains(ids, id) {
					continue
				}
				if err := e.end(id, leaves[id]); err != nil {
					t.Fatalf("%s: %v", e.name, err)
				}
				delete(sessions, id)
				a.until(e.name+": its end", func() bool {
					d, err := h.Control.Device(ctx, id)
					return err == nil && !d.Online && d.EndReason == e.reason
				})
				for other, session := range sessions {
					if d, err := h.Control.Device(ctx, other); err != nil || !d.Online || d.Session != session {
						t.Errorf("%s: another device is %+v, %v", e.name, d, err)
					}
				}
			}
			cs, err := h.Control.Certificates(ctx, bundle.CertificatesRequest{DeviceID: deviceID(3)})
			if err != nil || slices.ContainsFunc(cs, func(c bundle.Certificate) bool { return c.Reason != "cessationOfOperation" }) {
				t.Errorf("the certificates of the deleted device are %+v, %v", cs, err)
			}
			for _, when := range []string{"now", "after a restart"} {
				if when != "now" {
					again(t, h)
					a.base, a.token = h.HTTP, h.Token(t)
					a.until("the bystander to be back", func() bool { return a.twin(bystander) == "ONLINE IN_SYNC" })
				}
				// Over DTLS a device with a wrong key learns nothing until it gives up, and waits longer each time.
				a.within(2*time.Minute, when+" all to be turned away", func() bool {
					refused, err := h.Control.Refused(ctx)
					if err != nil {
						return false
					}
					for i, e := range ends {
						if slices.Contains(ids, deviceID(2+i)) && !slices.ContainsFunc(refused, func(r bundle.Refusal) bool { return strings.Contains(r.Reason, e.refusal) }) {
							return false
						}
					}
					return true
				})
				for _, id := range ids[1:] {
					if d, err := h.Control.Device(ctx, id); err == nil && d.Online {
						t.Errorf("%s: %s is here: %+v", when, id, d)
					}
				}
			}
			// Those that may come back do so by themselves.
			disabled, denied := deviceID(2), deviceID(4)
			if _, err := h.Control.EnableDevice(ctx, disabled); err != nil {
				t.Fatal(err)
			}
			if err := h.Control.Undeny(ctx, hub.DenyDevice, denied); err != nil {
				t.Fatal(err)
			}
			for _, id := range []string{disabled, denied} {
				a.until(id+" to be back", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })
			}
			// And who was deleted, and is reset and onboarded by somebody else, simply works.
			h.User(t, "bob", "a long enough password", "user")
			deleted := deviceID(3)
			o := h.Onboard(t, deleted, "bob")
			cfg := simulation(t, h, tr, deleted) // a new key or certificate, too
			b := application(t, h)
			b.token = h.TokenOf(t, "bob")
			lives(t, cfg, o.Code)
			b.until("the deleted device to be bob's", func() bool { return b.twin(deleted) == "ONLINE IN_SYNC" })
		})
	}
}

// foreignCA is somebody else's authority.
func foreignCA(t *testing.T, name string) (ca tls.Certificate, text []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, c, c, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	if c, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: c}, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// TestDeniedCAEndsItsDevices, and not those that another one vouches for.
func TestDeniedCAEndsItsDevices(t *testing.T) {
	t.Parallel()
	bad, badPEM := foreignCA(t, "bad")
	good, goodPEM := foreignCA(t, "good")
	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, slices.Concat(badPEM, goodPEM), 0o600); err != nil {
		t.Fatal(err)
	}
	h := hubtest.Start(t, hubtest.WithConfig("coapGateway.api.coap.tls.caPool="+file))
	a := application(t, h)
	var ids []string
	for i, c := range []struct {
		ca tls.Certificate
		tr transport
	}{{bad, transportOf("tls")}, {bad, transportOf("dtls")}, {good, transportOf("tls")}, {good, transportOf("dtls")}} {
		id := deviceID(1 + i)
		ids = append(ids, id)
		chain, key, err := device.Issue(c.ca, id)
		if err != nil {
			t.Fatal(err)
		}
		cfg := simulation(t, h, c.tr, id)
		if cfg.TLS, err = device.TLS([]byte(h.Onboard(t, id).CA), chain, key, h.ID); err != nil {
			t.Fatal(err)
		}
		lives(t, cfg, h.Code(t, id))
	}
	online := func(want ...bool) func() bool {
		return func() bool {
			for i, id := range ids {
				if strings.HasPrefix(a.twin(id), "ONLINE") != want[i] {
					return false
				}
			}
			return true
		}
	}
	a.until("all to be there", online(true, true, true, true))
	if _, err := h.Control.Deny(t.Context(), bundle.Denial{Of: hub.DenyCA, Value: sum(bad.Leaf.RawSubjectPublicKeyInfo)}); err != nil {
		t.Fatal(err)
	}
	a.until("the bad authority's to go", online(false, false, true, true))
	for _, id := range ids[2:] {
		if d, err := h.Control.Device(t.Context(), id); err != nil || d.EndReason != "" {
			t.Errorf("the good authority's device was gone: %+v, %v", d, err)
		}
	}
	again(t, h)
	a.base, a.token = h.HTTP, h.Token(t)
	a.until("the good authority's to be back", online(false, false, true, true))
}

// kept is what the API tells of a device in quarantine.
func (a *app) kept(id string) (k hub.Kept) {
	a.t.Helper()
	if status := a.ask(http.MethodGet, "/api/v1/devices/"+id+"/quarantine", "", &k); status != http.StatusOK {
		a.t.Fatalf("what is kept: %d", status)
	}
	return k
}

// TestQuarantine: a device in quarantine comes back, is observed, and what it says is kept apart, also over restarts, until its owner
// lets it in; commands for it end, and are refused meanwhile; and whoever has it next is shown nothing of it.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			id := deviceID(1)
			at := "/api/v1/devices/" + id
			d, err := device.New(simulation(t, h, tr, id))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan struct{})
			code := h.Code(t, id)
			go func() { // ends with cancel
				defer close(ended)
				_ = d.Run(ctx, func(context.Context) (string, error) { return code, nil })
			}()
			t.Cleanup(func() { cancel(); <-ended })
			a.until("the device to be in sync", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })
			before := a.light(id)
			status := a.ask(http.MethodPut, at+"/access", `{"state":"quarantined","reason":"a copy"}`, nil)
			if status != http.StatusOK {
				t.Fatal(status)
			}
			says := func(name string) {
				t.Helper()
				a.until("what it says to be kept", func() bool {
					if _, err := d.Set("/light/1", map[string]any{"name": name}); err != nil {
						return false
					}
					return slices.ContainsFunc(a.kept(id).Writes, func(w hub.KeptWrite) bool {
						return w.From.Protocol == tr.scheme && strings.HasPrefix(w.From.Credential, "certificate ") &&
							slices.ContainsFunc(w.Changes, func(c hub.KeptChange) bool { return strings.Contains(string(c.Data), name) })
					})
				})
			}
			says("apart")
			if w := a.kept(id).Writes[0]; w.Kind != hub.KeptSignedIn || w.Session != w.Number || !strings.HasPrefix(w.From.Remote, "127.0.0.1:") {
				t.Errorf("the first that is kept: %+v", w)
			}
			if status := a.ask(http.MethodPut, at+"/resources/light/1", `{"power":1}`, nil); status != http.StatusBadRequest {
				t.Errorf("a command: %d", status)
			}
			again(t, h)
			a.base, a.token = h.HTTP, h.Token(t)
			says("after a restart")
			if all := a.kept(id).Writes; all[0].Kind != hub.KeptSignedIn || all[0].Number != 1 || all[len(all)-1].Session == 1 {
				t.Errorf("before and after the restart are kept: %+v", all)
			}
			if got := a.light(id); got != before || !strings.HasPrefix(a.twin(id), "OFFLINE") {
				t.Errorf("the twin is %+v, %s; before %+v", got, a.twin(id), before)
			}
			if ds, err := h.Control.Quarantine(t.Context()); err != nil || len(ds) != 1 || ds[0].DeviceID != id || ds[0].Writes == 0 || ds[0].Reason != "a copy" {
				t.Errorf("in quarantine: %+v, %v", ds, err)
			}
			if _, err := h.Control.EnableDevice(t.Context(), id); err != nil {
				t.Fatal(err)
			}
			a.until("the device to report anew", func() bool { return a.twin(id) == "ONLINE IN_SYNC" && a.light(id).Name == "after a restart" })
			if k := a.kept(id); len(k.Writes) != 0 {
				t.Errorf("still kept: %+v", k)
			}
			// In quarantine again, and then somebody else's.
			if _, err := h.Control.QuarantineDevice(t.Context(), id, ""); err != nil {
				t.Fatal(err)
			}
			a.until("it to be back", func() bool { return len(a.kept(id).Writes) > 1 })
			if status := a.ask(http.MethodDelete, at, "", nil); status != http.StatusOK {
				t.Fatal(status)
			}
			h.User(t, "bob", "a long enough password", "user")
			cfg := simulation(t, h, tr, id)
			o := h.Onboard(t, id, "bob")
			if cfg.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), h.ID); err != nil {
				t.Fatal(err)
			}
			b := application(t, h)
			b.token = h.TokenOf(t, "bob")
			lives(t, cfg, o.Code)
			b.until("it to be bob's", func() bool { return b.twin(id) == "ONLINE IN_SYNC" })
			if k := b.kept(id); len(k.Writes) != 0 || k.Dropped != 0 {
				t.Errorf("bob is shown %+v", k)
			}
			if status := a.ask(http.MethodGet, at+"/quarantine", "", nil); status != http.StatusNotFound {
				t.Errorf("its former owner is shown %d", status)
			}
		})
	}
}

// TestIdentityInTwoPlaces: a copy of a device that signs in from elsewhere, in turns with it, is reported; where it is so configured
// both are let in from then on, and kept apart, so that somebody can compare them.
func TestIdentityInTwoPlaces(t *testing.T) {
	t.Parallel()
	for _, what := range []string{"report", "quarantine"} {
		t.Run(what, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig("coapGateway.rivals="+what))
			id := deviceID(1)
			o := h.Onboard(t, id)
			ctx := t.Context()
			var acc signedUp
			come := func(host string) (*peer, error) {
				t.Helper()
				d := tls.Dialer{NetDialer: &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(host)}}, Config: o.TLS}
				conn, err := d.DialContext(ctx, "tcp", h.CoAPS)
				if err != nil {
					t.Fatal(err)
				}
				p, err := startPeer(conn)
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(p.close)
				if acc.UID == "" {
					body, _ := cbor.Marshal(map[string]any{"di": id, "accesstoken": o.Code})
					res, _, err := p.do(ctx, request(codes.POST, "/oic/sec/account", body))
					if err != nil || res.Code != codes.Changed {
						t.Fatalf("sign-up: %v, %v", res.Code, err)
					}
					if err := cbor.Unmarshal(res.Payload, &acc); err != nil {
						t.Fatal(err)
					}
				}
				return p, signIn(ctx, p, id, acc)
			}
			for i := range 4 {
				if _, err := come([]string{"127.0.0.1", "127.0.0.2"}[i%2]); err != nil {
					t.Fatalf("sign-in %d: %v", i, err)
				}
			}
			if refused, err := h.Control.Refused(ctx); err != nil || len(refused) != 0 {
				t.Errorf("reported too soon: %+v, %v", refused, err)
			}
			_, err := come("127.0.0.1")
			if (err != nil) != (what == "quarantine") || err != nil && !strings.Contains(err.Error(), "quarantine-changed") {
				t.Errorf("the last sign-in: %v", err)
			}
			if what == "quarantine" { // both come, and neither throws the other out
				var both []*peer
				for _, host := range []string{"127.0.0.1", "127.0.0.2"} {
					p, err := come(host)
					if err != nil {
						t.Fatal(err)
					}
					both = append(both, p)
				}
				for _, p := range both {
					if acked, err := publish(ctx, p, id, 1, "/light"); err != nil || !acked {
						t.Errorf("published: %v, %v", acked, err)
					}
				}
				k, err := h.Control.Kept(ctx, id)
				from := map[string]bool{}
				for _, w := range k.Writes {
					if host, _, _ := net.SplitHostPort(w.From.Remote); w.Kind == hub.KeptPublished {
						from[host] = true
					}
				}
				if err != nil || !from["127.0.0.1"] || !from["127.0.0.2"] {
					t.Errorf("kept: %+v, %v", k, err)
				}
			}
			if refused, err := h.Control.Refused(ctx); err != nil || !slices.ContainsFunc(refused, func(r bundle.Refusal) bool {
				return r.What == "rivals" && r.Device == id && strings.Contains(r.Reason, "127.0.0.2 and 127.0.0.1")
			}) {
				t.Errorf("%+v, %v", refused, err)
			}
			if d, err := h.Control.Device(ctx, id); err != nil || d.RivalsAt == nil {
				t.Errorf("%+v, %v", d, err)
			}
			if es, err := h.Control.Audit(ctx, 0, 1); err != nil || len(es) != 1 || es[0].Call != "rivals" || es[0].Outcome != what {
				t.Errorf("%+v, %v", es, err)
			}
			access, err := h.Control.Access(ctx, id)
			if want := map[string]hub.AccessState{"report": hub.AccessAdmitted, "quarantine": hub.AccessQuarantined}[what]; err != nil || access.State != want {
				t.Errorf("%+v, %v", access, err)
			}
		})
	}
}
