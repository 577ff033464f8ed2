package grpcgateway

import (
	"context"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/obs"
)

type fakeSystem struct{ apart bool }

func (fakeSystem) Status(context.Context) (SystemStatus, error) {
	return SystemStatus{
		HubID: hubID, Version: "v1", Build: obs.Build{Version: "v1", Go: "go1.26"}, Started: time.Unix(0, t0).UTC(), Endpoints: Endpoints{HTTP: "http://localhost:8080"},
		Devices: 3, Online: 2, Feed: Feed{LogID: "l", Day: 1, N: 5}, NotReady: map[string]string{"bus": "away"}, ReadOnly: "full",
	}, nil
}

func (f fakeSystem) Parts(context.Context) ([]Part, error) {
	if f.apart {
		return nil, hub.NewError(hub.Precondition, "parts-unknown", "ask another one")
	}
	at := time.Unix(0, t0).UTC()
	return []Part{{Target: "grpc-gateway", Name: "host", Instance: "i", Version: "v1", Started: at, Heard: at, State: "serves", Sessions: 2}}, nil
}

func (fakeSystem) Metrics() ([]byte, error) { return []byte("# HELP a b\na 1\n"), nil }

func (fakeSystem) Configuration() (SystemConfiguration, error) {
	return SystemConfiguration{Configuration: "a: \"***\"\n", Differs: "{}\n"}, nil
}

func TestSystemOverTheAPI(t *testing.T) {
	t.Parallel()
	w, log, _ := newAdminWorld(t)
	w.deps.System = fakeSystem{}
	get := func(path string, headers ...string) answer {
		t.Helper()
		return w.do(t, "admin", "GET", "/api/v1/system"+path, headers...)
	}
	want(t, "status", sameJSON(t, get("").Body.Bytes()), `{"build":{"go":"go1.26","version":"v1"},"devices":3,"endpoints":{"http":"http://localhost:8080"},`+
		`"feed":{"day":1,"logId":"l","n":5},"hubId":"`+hubID+`","notReady":{"bus":"away"},"online":2,"readOnly":"full","started":"2023-11-14T22:13:20Z","version":"v1"}`)
	want(t, "parts", sameJSON(t, get("/parts").Body.Bytes()), `[{"heard":"2023-11-14T22:13:20Z","instance":"i","name":"host","sessions":2,`+
		`"started":"2023-11-14T22:13:20Z","state":"serves","target":"grpc-gateway","version":"v1"}]`)
	want(t, "parts in CBOR", get("/parts", "Accept: application/cbor").Header().Get("Content-Type"), "application/cbor")
	m := get("/metrics", "Accept: application/cbor")
	want(t, "metrics", m.Body.String(), "# HELP a b\na 1\n")
	want(t, "their type", m.Header().Get("Content-Type"), "text/plain; version=0.0.4")
	want(t, "configuration", sameJSON(t, get("/configuration").Body.Bytes()), `{"configuration":"a: \"***\"\n","differs":"{}\n"}`)
	want(t, "reading is in no audit log", len(log.entries), 0)
	w.deps.System = fakeSystem{apart: true}
	want(t, "a process that hears of nobody", get("/parts").reason(), "parts-unknown")
}
