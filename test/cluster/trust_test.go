package cluster_test

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
)

// guest is a device in a session at one of the gateways.
type guest struct {
	*simulated
	id      string
	leaf    *x509.Certificate // nil with a pre-shared key
	session uint64
}

// enters has a device come to a gateway, 1 or 2, by TLS or, with a pre-shared key, by DTLS, for an owner.
func (w *world) enters(id string, gateway int, psk bool, owner string) *guest {
	w.t.Helper()
	o, err := w.parts["app-1"].control.Onboard(w.t.Context(), bundle.OnboardRequest{DeviceID: id, Owner: owner, Certificate: !psk, PSK: psk})
	if err != nil {
		w.t.Fatal(err)
	}
	g := &guest{id: id, simulated: &simulated{code: o.AuthorizationCode}}
	cfg := device.Config{ID: id, HubAddr: fmt.Sprintf("coaps+tcp://127.0.0.%d:%s", gateway, w.coap)}
	if psk {
		cfg.HubAddr = fmt.Sprintf("coaps://127.0.0.%d:%s", gateway, w.coap)
		cfg.PSK = &device.PSK{Identity: o.PSKIdentity, Key: []byte(o.PSK)}
	} else {
		if cfg.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), o.HubID); err != nil {
			w.t.Fatal(err)
		}
		g.leaf = leafOf(w.t, cfg.TLS)
	}
	if g.Device, err = device.New(cfg); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(g.Close)
	if !eventually(patience, func() bool {
		if err = g.enter(w.t.Context()); err != nil {
			g.Close()
		}
		return err == nil
	}) {
		w.t.Fatal(err)
	}
	until(w.t, patience, id+" to be there", func() bool {
		d, err := w.parts["app-1"].control.Device(w.t.Context(), id)
		g.session = d.Session
		return err == nil && d.Online
	})
	return g
}

func leafOf(t *testing.T, cfg *tls.Config) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(cfg.Certificates[0].Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func sum(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }

// TestEndOfTrustInACluster: whatever ends the trust in a device ends its session, whichever gateway has it and whichever process was
// told, and no other session.
func TestEndOfTrustInACluster(t *testing.T) {
	w := run(t)
	app := w.app(1, w.token())
	ctx := t.Context()
	told := func(part string) *bundle.Control { return w.parts[part].control }
	if _, err := told("is").AddUser(ctx, bundle.UserRequest{Name: "bob", Password: "a long enough password", Roles: []string{"user"}}); err != nil {
		t.Fatal(err)
	}
	ask := func(r client.Request) error {
		resp, err := app.Do(ctx, r)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	}
	deny := func(part string, of hub.DenialOf, value string) error {
		_, err := told(part).Deny(ctx, bundle.Denial{Of: of, Value: value, Reason: "a test"})
		return err
	}
	issuer := ""
	if s, err := told("app-1").Status(ctx); err != nil {
		t.Fatal(err)
	} else {
		issuer = s.Issuer
	}
	ends := []struct {
		name, reason string
		psk          bool
		end          func(g *guest) error
	}{
		{"disabled by its owner", "device-disabled", false, func(g *guest) error {
			return ask(client.Request{Method: http.MethodPut, Path: client.DevicePath(g.id, "access"), Body: []byte(`{"state":"disabled"}`)})
		}},
		{"deleted by its owner", "deleted", false, func(g *guest) error {
			_, err := app.DeleteDevices(ctx, g.id)
			return err
		}},
		{"denied by its ID", "device-denied", false, func(g *guest) error { return deny("ca", hub.DenyDevice, g.id) }},
		{"denied by its ID, with a pre-shared key", "device-denied", true, func(g *guest) error { return deny("gw-1", hub.DenyDevice, g.id) }},
		{"revoked", "certificate-revoked", false, func(g *guest) error {
			_, err := told("is").RevokeCertificates(ctx, bundle.CertificatesRequest{DeviceID: g.id})
			return err
		}},
		{"denied by its key", "key-denied", false, func(g *guest) error { return deny("is", hub.DenyKey, sum(g.leaf.RawSubjectPublicKeyInfo)) }},
		{"denied by its certificate", "certificate-denied", false, func(g *guest) error { return deny("app-2", hub.DenyCertificate, sum(g.leaf.Raw)) }},
		{"its token revoked", "revoked", false, func(g *guest) error {
			return post(ctx, issuer+"/revoke", url.Values{"token": {g.Credentials().Access}, "client_id": {"coaphub-device"}})
		}},
		{"its pre-shared key replaced", "key-replaced", true, func(g *guest) error {
			_, err := told("ca").Onboard(ctx, bundle.OnboardRequest{DeviceID: g.id, PSK: true})
			return err
		}},
	}
	var guests, bystanders []*guest
	for i := range 4 {
		bystanders = append(bystanders, w.enters(name("bystander", i), 1+i%2, i >= 2, ""))
	}
	for i, e := range ends {
		guests = append(guests, w.enters(name("guest", i), 1+i%2, e.psk, ""))
	}
	for _, part := range w.order { // whoever is asked knows of all
		var s bundle.Status
		until(t, patience, part+" to count all devices", func() bool {
			s, _ = told(part).Status(ctx)
			return s.Online == len(guests)+len(bystanders)
		})
		if s.Devices != s.Online {
			t.Errorf("%s says that of %d devices %d are online", part, s.Devices, s.Online)
		}
	}
	w.shown(app, append(bystanders, guests...))
	for i, e := range ends {
		g, watch := guests[i], told("app-2")
		began := time.Now() // the processes have the same clock
		if err := e.end(g); err != nil {
			t.Errorf("%s: %v", e.name, err)
			continue
		}
		answered := time.Since(began)
		var last bundle.DeviceStatus
		if !eventually(patience, func() bool {
			d, err := watch.Device(ctx, g.id)
			last = d
			return err == nil && d.EndReason == e.reason && (!d.Online || d.Session != g.session)
		}) {
			t.Errorf("%s: after %v the device is %+v", e.name, patience, last)
			continue
		}
		t.Logf("%s: the session at gateway %d ended after %v, the answer came after %v",
			e.name, 1+i%2, last.EndedAt.Sub(began).Round(time.Millisecond), answered.Round(time.Millisecond))
		for _, other := range append(bystanders, guests[i+1:]...) {
			if d, err := watch.Device(ctx, other.id); err != nil || !d.Online || d.Session != other.session {
				t.Errorf("%s: another device is %+v, %v", e.name, d, err)
			}
		}
	}
	// Who was deleted may be somebody else's, at the other gateway.
	w.enters(guests[1].id, 1, false, "bob")
}

// shown asks, in a process that has no gateway, how devices are attached that are at those of others, and how the hub is.
func (w *world) shown(app *client.Client, guests []*guest) {
	w.t.Helper()
	ask := func(path string, answer any) {
		w.t.Helper()
		resp, err := app.Do(w.t.Context(), client.Request{Method: http.MethodGet, Path: path})
		if err != nil {
			w.t.Fatalf("%s: %v", path, err)
		}
		defer func() { _ = resp.Body.Close() }()
		if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
			w.t.Fatalf("%s: %v", path, err)
		}
	}
	for _, g := range guests {
		var d bundle.DeviceStatus
		ask(client.DevicePath(g.id, "connection"), &d)
		if !d.Online || d.Session != g.session || d.Remote == "" {
			w.t.Errorf("a device is %+v", d)
		}
	}
	var s bundle.Status
	ask("/api/v1/system", &s)
	if s.Online != len(guests) || s.Devices < len(guests) || len(s.NotReady) > 0 {
		w.t.Errorf("the hub is %+v, with %d devices", s, len(guests))
	}
	gateways := 0
	var ps []bundle.Part
	ask("/api/v1/system/parts", &ps)
	for _, p := range ps {
		if p.Target == bundle.TargetCoAPGateway && p.State == bundle.PartServes {
			gateways++
		}
	}
	if gateways != 2 {
		w.t.Errorf("the parts are %+v", ps)
	}
}

func name(what string, i int) string {
	return uuid.NewSHA1(uuid.NameSpaceURL, fmt.Appendf(nil, "cluster %s %d", what, i)).String()
}

func post(ctx context.Context, to string, form url.Values) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, to, strings.NewReader(form.Encode()))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	if resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s", to, resp.Status)
	}
	_ = resp.Body.Close()
	return err
}
