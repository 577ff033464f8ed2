package grpcgateway

import (
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// Every read has an ETag of its own, and a caller that has it already gets 304 and no body; a change gets the new answer.
func TestReadsAreConditional(t *testing.T) {
	t.Parallel()
	w := newWorld(t, func(_ *Config, d *Deps) {
		d.Administration, d.Connections = &fakeAdministration{}, fakeConnections{lampA: {DeviceID: string(lampA), Protocol: "coaps"}}
	})
	history(w)
	for template, methods := range routes {
		op, ok := methods[http.MethodGet]
		if !ok || op.serve == nil || op.stream || op.scope == hub.ScopeAdmin || slices.Contains([]string{"root", "getConfiguration", "getHubConfiguration"}, op.id) {
			continue
		}
		target := example(template)
		if strings.HasSuffix(target, "/resources") || strings.HasSuffix(template, "/api/v1/resources") {
			target += "?typeFilter=core.light"
		}
		a := w.get(t, target)
		want(t, target, a.Code, 200)
		tag := a.Header().Get("ETag")
		if !strings.HasPrefix(tag, `W/"`) {
			t.Errorf("%s has the ETag %q", target, tag)
			continue
		}
		want(t, target+" again", w.get(t, target).Header().Get("ETag"), tag)
		for _, method := range []string{"GET", "HEAD"} {
			b := w.do(t, "alice", method, target, "If-None-Match: \"x\", "+tag)
			want(t, method+" "+target, b.Code, 304)
			want(t, method+" "+target, b.Body.Len(), 0)
			want(t, method+" "+target, b.Header().Get("ETag"), tag)
		}
		want(t, target+" of another state", w.get(t, target, `If-None-Match: W/"#x"`).Code, 200)
	}
	const list = "/api/v1/devices"
	before := w.get(t, list).Header().Get("ETag")
	if other := w.get(t, list, "Accept: application/protojson").Header().Get("ETag"); other == before {
		t.Error("both forms have one ETag")
	}
	w.pictures[lampB] = lamp(lampB, "another name", false)
	after := w.get(t, list, "If-None-Match: "+before)
	want(t, "a changed list", after.Code, 200)
	if after.Header().Get("ETag") == before {
		t.Error("the ETag did not change with the list")
	}
}

// What was deleted, and errors, have no ETag.
func TestOnlyReadsHaveAnETag(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	want(t, "deleted", w.do(t, "alice", "DELETE", "/api/v1/devices/"+string(lampA)).Header().Get("ETag"), "")
	want(t, "error", w.get(t, "/api/v1/devices/"+string(unknown), "If-None-Match: *").Header().Get("ETag"), "")
}

// A list that is longer than a chunk is on its way before its end is known.
func TestLongListsHaveNoETagButTheirPagesHave(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	a := w.get(t, "/api/v1/resources")
	if a.Body.Len() <= 4096 {
		t.Fatalf("only %d bytes", a.Body.Len())
	}
	w.identities.devices = manyLamps(w, 40)
	want(t, "long", w.get(t, "/api/v1/resources").Header().Get("ETag"), "")
	if tag := w.get(t, "/api/v1/resources?limit=3").Header().Get("ETag"); tag == "" {
		t.Error("a page has no ETag")
	}
}

// The errors of pages that are none of the API's are ours for a client that asks for JSON.
func TestPagesSpeakJSONToThoseWhoAskForIt(t *testing.T) {
	w := newWorld(t, func(_ *Config, d *Deps) {
		d.Pages = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			switch r.URL.Path {
			case "/login":
				_, _ = w.Write([]byte("<html>"))
			case "/token":
				http.Error(w, "Method Not Allowed", http.StatusMethodNotAllowed)
			case "/oauth":
				w.Header().Set("Content-Type", "application/json")
				w.WriteHeader(http.StatusNotFound)
				_, _ = w.Write([]byte("{}"))
			default:
				http.NotFound(w, r)
			}
		})
	})
	a := w.get(t, "/devices", "Accept: application/json, text/plain")
	want(t, "status", a.Code, 404)
	want(t, "reason", a.reason(), "no-such-path")
	a = w.get(t, "/token", "Accept: application/json")
	want(t, "status", a.Code, 405)
	want(t, "reason", a.reason(), "method-not-allowed")
	want(t, "for people", w.get(t, "/devices", "Accept: text/html").Body.String(), "404 page not found\n")
	want(t, "a page", w.get(t, "/login", "Accept: application/json").Body.String(), "<html>")
	// Who speaks JSON already is not corrected.
	r := newRecorder()
	w.HTTPHandler().ServeHTTP(r, newRequest("GET", "/oauth", "Accept: application/json"))
	want(t, "the page's own JSON", r.Body.String(), "{}")
}
