package grpcgateway

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// fakeOnboarding onboards devices that are alice's, and any.
type fakeOnboarding struct{ asked []ToOnboard }

func (f *fakeOnboarding) Onboard(_ context.Context, owner hub.Owner, user string, q ToOnboard) (Onboarding, error) {
	f.asked = append(f.asked, q)
	switch {
	case q.DeviceID == "" && !q.Any:
		return Onboarding{}, hub.NewError(hub.Invalid, "device-id-missing", "name one")
	case q.DeviceID == string(bobs):
		return Onboarding{}, hub.NewError(hub.Denied, "device-owned-by-other", "no")
	}
	o := Onboarding{
		HubID: hubID, DeviceID: q.DeviceID, Owner: string(owner), Endpoints: Endpoints{CoAPSTCP: "coaps+tcp://localhost:5684"}, AuthorizationProvider: "coaphub",
		AuthorizationCode: "secret-code", CA: "-----BEGIN CERTIFICATE-----\n", ExpiresAt: time.Unix(0, t0).UTC(),
	}
	if q.Certificate {
		o.Identity = &Identity{Chain: "chain of " + user, Key: "secret-key", CA: o.CA}
	}
	if q.PSK {
		o.PSKIdentity, o.PSK = q.DeviceID, "secret-psk"
	}
	return o, nil
}

// What a device is given is in the answer and nowhere else, and is always for the caller's owner.
func TestOnboardingOverTheAPI(t *testing.T) {
	t.Parallel()
	log, made := &fakeAudit{}, &fakeOnboarding{}
	w := newWorld(t, func(_ *Config, d *Deps) { d.Audit, d.Onboarding = log, made })
	const path = "/api/v1/onboarding"
	a := w.send(t, "alice", "POST", path, `{"deviceId":"`+string(lampA)+`","certificate":true,"preSharedKey":true}`)
	want(t, "status", a.Code, 200)
	want(t, "nobody keeps it", a.Header().Get("Cache-Control"), "no-store")
	o := a.json()
	for member, value := range map[string]string{
		"hubId": hubID, "deviceId": string(lampA), "owner": "alice", "authorizationProvider": "coaphub", "authorizationCode": "secret-code",
		"expiresAt": "2023-11-14T22:13:20Z", "pskIdentity": string(lampA), "psk": "secret-psk",
	} {
		want(t, member, o[member], any(value))
	}
	want(t, "endpoint", o["endpoints"].(map[string]any)["coaps+tcp"], any("coaps+tcp://localhost:5684"))
	want(t, "key", o["identity"].(map[string]any)["key"], any("secret-key"))
	want(t, "what was asked for", made.asked[0], ToOnboard{DeviceID: string(lampA), Certificate: true, PSK: true})

	bare := w.send(t, "bob", "POST", path, `{"anyDevice":true}`).json()
	want(t, "of another owner", bare["owner"], any("bob"))
	want(t, "no certificate", bare["identity"], nil)
	want(t, "no device", bare["deviceId"], nil)

	for body, reason := range map[string]string{
		`{}`:                                     "device-id-missing",
		`{"anyDevice":true,"owner":"bob"}`:       "body-invalid",
		`{"anyDevice":1}`:                        "body-invalid",
		`{"deviceId":"` + string(bobs) + `"}`:    "device-owned-by-other",
		`{"deviceId":"` + string(lampA) + `"} x`: "body-invalid",
	} {
		want(t, body, w.send(t, "alice", "POST", path, body).reason(), reason)
	}
	want(t, "who may read only", w.send(t, "reader", "POST", path, `{"anyDevice":true}`).reason(), "scope-missing")
	want(t, "a device", w.send(t, "lamp", "POST", path, `{"anyDevice":true}`).reason(), "device-token")

	lines := log.lines()
	want(t, "entry", lines[0], "http onboard "+path+" device="+string(lampA)+" preSharedKey alice-sub alice  ok")
	want(t, "entry", lines[1], "http onboard "+path+" any device bob-sub bob  ok")
	for _, text := range append(lines, w.log.String()) {
		if strings.Contains(text, "secret") {
			t.Errorf("a secret is in a log: %s", text)
		}
	}
	without := newWorld(t)
	want(t, "nothing behind it", without.send(t, "alice", "POST", path, `{"anyDevice":true}`).reason(), "no-such-path")
}

type fakeConnections map[hub.DeviceID]DeviceStatus

func (f fakeConnections) Connection(_ context.Context, dev hub.DeviceID, owner hub.Owner) (DeviceStatus, error) {
	s, ok := f[dev]
	if !ok || owner == "" {
		return s, hub.NewError(hub.NotFound, "device-not-seen", "the device has not signed in since the hub started")
	}
	return s, nil
}

// How a device is attached is its owner's to know.
func TestConnectionOverTheAPI(t *testing.T) {
	t.Parallel()
	at := time.Unix(0, t0).UTC()
	w := newWorld(t, func(_ *Config, d *Deps) {
		d.Connections = fakeConnections{lampA: {
			DeviceID: string(lampA), Online: true, Protocol: "coaps", TLS: "DTLS 1.2", Remote: "192.0.2.1:5684", Session: 7, ConnectedSince: at, BytesIn: 12,
			BytesOut: 13, RoundTrip: 0.25, LastError: "twin-limit", NextContact: &at, ContactInterval: 60, EndedAt: &at, EndReason: "idle", RivalsAt: &at, Rivals: "a and b",
		}}
	})
	path := "/api/v1/devices/" + string(lampA) + "/connection"
	a := w.get(t, path)
	want(t, "all of it", sameJSON(t, a.Body.Bytes()), `{"bytesIn":12,"bytesOut":13,"connectedSince":"2023-11-14T22:13:20Z","contactIntervalSeconds":60,`+
		`"deviceId":"`+string(lampA)+`","endReason":"idle","endedAt":"2023-11-14T22:13:20Z","lastError":"twin-limit","nextContact":"2023-11-14T22:13:20Z",`+
		`"online":true,"protocol":"coaps","remote":"192.0.2.1:5684","rivals":"a and b","rivalsAt":"2023-11-14T22:13:20Z","roundTripSeconds":0.25,"session":7,"tls":"DTLS 1.2"}`)
	want(t, "another owner's", w.do(t, "bob", "GET", path).reason(), "not-found")
	want(t, "no UUID", w.get(t, "/api/v1/devices/lamp/connection").reason(), "not-found")
	want(t, "never here", w.get(t, "/api/v1/devices/"+string(lampB)+"/connection").reason(), "device-not-seen")
	want(t, "below it", w.get(t, path+"/x").reason(), "no-such-path")
}
