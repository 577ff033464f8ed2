package grpcgateway

import (
	"context"
	"net/http"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// fakeKeys has a key for every device.
type fakeKeys struct{}

func (*fakeKeys) Key(_ context.Context, dev hub.DeviceID) (PreSharedKey, error) {
	return PreSharedKey{Identity: string(dev), User: "alice"}, nil
}

func (*fakeKeys) NewKey(_ context.Context, dev hub.DeviceID, user string) (PreSharedKey, error) {
	return PreSharedKey{Identity: string(dev), Key: "secret", User: user}, nil
}

func (*fakeKeys) ForgetKey(context.Context, hub.DeviceID) error { return nil }

// A key is its owner's to make, and in no answer but the one that makes it, which nobody keeps.
func TestPreSharedKeys(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	path := "/api/v1/devices/" + string(lampA) + "/pre-shared-key"
	if a := w.do(t, "alice", http.MethodGet, path); a.Code != 200 || strings.Contains(a.Body.String(), "secret") {
		t.Errorf("reading: %d %s", a.Code, a.Body.String())
	}
	if a := w.do(t, "alice", http.MethodPost, path); a.Code != 200 || !strings.Contains(a.Body.String(), `"key":"secret"`) || a.Header().Get("Cache-Control") != "no-store" {
		t.Errorf("making: %d %s, %q", a.Code, a.Body.String(), a.Header().Get("Cache-Control"))
	}
	for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodDelete} {
		if a := w.do(t, "bob", method, path); a.Code != 404 {
			t.Errorf("%s by another owner: %d %s", method, a.Code, a.Body.String())
		}
	}
}
