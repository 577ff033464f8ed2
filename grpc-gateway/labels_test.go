package grpcgateway

import (
	"net/http"
	"strings"
	"testing"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

func TestLabelsOfADevice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	const path = "/api/v1/devices/" + string(lampA) + "/labels"
	send := func(token, method, target, body string) answer { return w.send(t, token, method, target, body) }
	want(t, "none yet", w.get(t, path).Body.String(), `{"labels":{}}`+"\n")
	want(t, "set", send("alice", "PUT", path, `{"labels":{"room":"kitchen","floor":"1"}}`).Body.String(), `{"labels":{"floor":"1","room":"kitchen"}}`+"\n")
	want(t, "read", w.get(t, path).Body.String(), `{"labels":{"floor":"1","room":"kitchen"}}`+"\n")
	want(t, "patch", send("alice", "PATCH", path, `{"labels":{"room":"hall","floor":null,"none":null}}`).Body.String(), `{"labels":{"room":"hall"}}`+"\n")
	want(t, "in the list", w.get(t, "/api/v1/devices/"+string(lampA)).json()["labels"].(map[string]any)["room"], any("hall"))
	devices, err := all(pb.NewGrpcGatewayClient(w.dial(t)).GetDevices(as(t, "alice"), &pb.GetDevicesRequest{Search: "room=hall"}))
	if err != nil || len(devices) != 1 || devices[0].GetLabels()["room"] != "hall" {
		t.Errorf("gRPC: %v, %v", devices, err)
	}
	want(t, "replace", send("alice", "PUT", path, `{"labels":{}}`).Body.String(), `{"labels":{}}`+"\n")

	for body, reason := range map[string]string{
		"": "body-invalid", "[]": "body-invalid", "{}": "body-incomplete", `{"labels":5}`: "body-invalid", `{"labels":{"a":1}}`: "body-invalid",
		`{"labels":{}} {}`: "body-invalid", `{"label":{}}`: "body-invalid", `{"labels":{"a":null}}`: "label-invalid",
		`{"labels":{"a/b":"x"}}`: "label-invalid", `{"labels":{"a":"` + strings.Repeat("x", 257) + `"}}`: "label-invalid",
	} {
		a := send("alice", "PUT", path, body)
		want(t, body, a.reason(), reason)
		want(t, body, a.Code, 400)
	}
	many := make([]string, hub.MaxLabels+1)
	for i := range many {
		many[i] = `"n` + strings.Repeat("x", i) + `":"v"`
	}
	want(t, "too many", send("alice", "PUT", path, `{"labels":{`+strings.Join(many, ",")+`}}`).Code, http.StatusRequestEntityTooLarge)
	want(t, "a reader", send("reader", "PUT", path, `{"labels":{}}`).reason(), "scope-missing")
	for _, id := range []string{string(unknown), string(bobs), "abc"} {
		want(t, id, send("alice", "PATCH", "/api/v1/devices/"+id+"/labels", `{"labels":{}}`).Code, 404)
		want(t, id, w.get(t, "/api/v1/devices/"+id+"/labels").Code, 404)
	}
	want(t, "nothing was set", len(w.pictures[lampA].Labels), 0)
}
