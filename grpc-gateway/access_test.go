package grpcgateway

import (
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// TestAccess: an owner disables a device of his and lets it in again; others' are not there. It is in the audit log.
func TestAccess(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := "/api/v1/devices/" + string(lampA) + "/access"
	for _, c := range []struct {
		method, who, body string
		code              int
		want              string
	}{
		{"GET", "alice", "", 200, `{"state":"admitted"}`},
		{"PUT", "alice", `{"state":"disabled","reason":"stolen"}`, 200, `{"state":"disabled","reason":"stolen","user":"alice-sub","since":"2023-11-14T22:13:20Z"}`},
		{"GET", "alice", "", 200, `{"state":"disabled",`},
		{"GET", "bob", "", 404, "not-found"},
		{"PUT", "bob", `{"state":"admitted"}`, 404, "not-found"},
		{"PUT", "alice", `{"state":"quarantined"}`, 200, `{"state":"quarantined","user":"alice-sub"`},
		{"PUT", "bob", `{"state":"quarantined"}`, 404, "not-found"},
		{"PUT", "alice", `{"state":"removed"}`, 400, "access-invalid"},
		{"PUT", "alice", `{"state":"denied"}`, 400, "access-invalid"},
		{"PUT", "alice", `{}`, 400, "access-invalid"},
		{"PUT", "alice", `{"stat":"disabled"}`, 400, "body-invalid"},
		{"PUT", "alice", `{"state":"admitted"}`, 200, `{"state":"admitted"}`},
	} {
		a := w.send(t, c.who, c.method, path, c.body)
		if got := a.Body.String(); a.Code != c.code || !strings.Contains(got, c.want) {
			t.Errorf("%s by %s %s: %d %s", c.method, c.who, c.body, a.Code, got)
		}
	}
	if a := w.send(t, "alice", "PUT", "/api/v1/devices/lamp/access", `{"state":"admitted"}`); a.Code != 404 {
		t.Errorf("no UUID: %d", a.Code)
	}
}

// TestQuarantine: what is kept of a device is its owner's to see, and says where it came from.
func TestQuarantine(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := "/api/v1/devices/" + string(lampA)
	if a := w.send(t, "alice", "GET", path+"/quarantine", ""); a.Code != 200 || a.Body.String() != `{"writes":[],"dropped":0}`+"\n" {
		t.Errorf("none: %d %s", a.Code, a.Body)
	}
	w.send(t, "alice", "PUT", path+"/access", `{"state":"quarantined"}`)
	want := `{"writes":[{"number":5,"time":"2023-11-14T22:13:20Z","session":4,"message":1,"kind":"changed",` +
		`"from":{"remote":"192.0.2.1:5683","connection":"c","protocol":"coaps","credential":"certificate 00ff"},` +
		`"changes":[{"href":"/light","status":0,"contentType":"application/cbor","coapContentFormat":60,"data":"oA=="}]}],"dropped":3}`
	if a := w.send(t, "alice", "GET", path+"/quarantine", ""); a.Code != 200 || a.Body.String() != want+"\n" {
		t.Errorf("some: %d %s", a.Code, a.Body)
	}
	for _, other := range []string{path + "/quarantine", "/api/v1/devices/lamp/quarantine"} {
		if a := w.send(t, "bob", "GET", other, ""); a.Code != 404 {
			t.Errorf("%s of another: %d %s", other, a.Code, a.Body)
		}
	}
}

// Commands for a device that is not let in are refused; those of its twin, which the hub carries out, are not.
func TestNoCommandsForADisabledDevice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.identities.reachable = func(dev hub.DeviceID) error {
		if dev == lampA {
			return hub.NewError(hub.Precondition, "device-disabled", "the device is disabled")
		}
		return nil
	}
	device := "/api/v1/devices/" + string(lampA)
	for _, c := range []struct{ method, path, body string }{
		{"PUT", device + "/resources/light/1", `{"power":1}`},
		{"GET", device + "/resources/light/1?twin=false", ""},
		{"DELETE", device + "/resource-links/light/1", ""},
	} {
		if a := w.send(t, "alice", c.method, c.path, c.body); a.Code != 400 || !strings.Contains(a.Body.String(), "device-disabled") {
			t.Errorf("%s %s: %d %s", c.method, c.path, a.Code, a.Body)
		}
	}
	if a := w.send(t, "alice", "PUT", device+"/metadata", `{"twinEnabled":false}`); a.Code != 200 {
		t.Errorf("the twin: %d %s", a.Code, a.Body)
	}
	if a := w.send(t, "alice", "GET", device+"/resources/light/1", ""); a.Code != 200 {
		t.Errorf("reading: %d %s", a.Code, a.Body)
	}
}
