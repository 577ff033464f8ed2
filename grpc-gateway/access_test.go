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
