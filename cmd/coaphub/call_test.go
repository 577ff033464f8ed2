package main

import (
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/hubtest"
)

func TestCall(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { t.Helper(); return runs(t, append(args, "--data", h.Data)...) }
	runs(t, "simulate", "--devices", "1", "--duration", "2s", "--data", h.Data).want(t, exitOK, "devices 1 ", "^$")
	var dev struct{ ID string }
	if err := json.Unmarshal([]byte(on("devices", "--json").out), &dev); err != nil {
		t.Fatal(err)
	}

	on("call").want(t, exitOK, `(?s)^OPERATION +METHOD +PATH +WHAT\n.*getResource +GET +/api/v1/devices/\{deviceId\}/resources/\{href\} +Twin of one resource`, "^$")
	on("call", "--json").want(t, exitOK, `(?m)^\{"method":"GET","operation":"getDevice","parameters":\["deviceId",.*\}$`, "^$")
	// By operation, and by method and path; for people, and for scripts.
	on("call", "getDevice", "deviceId="+dev.ID).want(t, exitOK, `(?s)^\{\n  "id": "`+dev.ID+`",\n`, "^$")
	on("call", "getResource", "deviceId="+dev.ID, "href=/light/1", "onlyContent=true").want(t, exitOK, `^\{.*"power":\d+.*\}\n?$`, "^$")
	on("call", "GET", "/api/v1/devices/"+dev.ID+"/resources/light/1?onlyContent=1").want(t, exitOK, `^\{.*"power":\d+.*\}\n?$`, "^$")
	on("call", "GET", "/api/v1/devices?statusFilter=ONLINE", "typeFilter=x").want(t, exitOK, `^$`, "^$")
	on("call", "getDevices", "statusFilter=OFFLINE", "statusFilter=ONLINE", "--json").want(t, exitOK, `^\{"id":"`+dev.ID+`".*\}\n$`, "^$")
	on("call", "getDevices", "statusfilter=OFFLINE").want(t, exitOK, `^\{\n  "id": "`+dev.ID+`"`, "^$")
	on("call", "getEventsOfResource", "deviceId="+dev.ID, "href=light/1", "limit=1", "--json", "--accept", "application/protojson").want(t, exitOK, `^\{"resourceChanged":.*"data":".*\n$`, "^$")
	on("call", "getDocs").want(t, exitOK, `(?i)<!doctype html>`, "^$")
	on("call", "root").want(t, exitOK, `"name": "coaphub"`, "^$")

	// Bodies.
	on("call", "patchLabels", "deviceId="+dev.ID, "--body", `{"labels":{"room":"kitchen"}}`).want(t, exitOK, `"room": "kitchen"`, "^$")
	runsWith(t, `{"labels":{"floor":"1"}}`, nil, "call", "PATCH", "/api/v1/devices/"+dev.ID+"/labels", "--body", "-", "--data", h.Data).want(t, exitOK, `(?s)"floor": "1".*"room": "kitchen"`, "^$")
	file := filepath.Join(t.TempDir(), "body")
	if err := os.WriteFile(file, []byte("\xa1\x66labels\xa1\x64room\xf6"), 0o600); err != nil { // CBOR: the room goes
		t.Fatal(err)
	}
	on("call", "patchLabels", "deviceId="+dev.ID, "--body", "@"+file, "--content-type", "application/cbor", "--json").want(t, exitOK, `^\{"labels":\{"floor":"1"\}\}\n$`, "^$")
	on("call", "addAccount", "--body", `{"name":"carol","roles":["user"],"password":"correct horse battery"}`).want(t, exitOK, `"name": "carol"`, "^$")

	// Errors, of the hub and of people.
	on("call", "getDevice", "deviceId="+lamp).want(t, exitNotFound, "^$", `^coaphub: not found \[not-found\]\n$`)
	on("call", "deleteDevices").want(t, exitFailure, "^$", `\[filter-empty\]`)
	on("call", "getResource", "deviceId="+dev.ID, "href=/none", "twin=false").want(t, exitNotFound, "^$", `\[resource-unknown\]`)
	on("call", "getDevices", "--header", "If-None-Match: *").want(t, exitOK, "^$", "^$")
	on("call", "updateResource", "deviceId="+dev.ID, "href=/light/1", "timeToLive=100000000", "--body", "{}").want(t, exitLater, "^$", `\[command-expired\]`)
	runs(t, "call", "getDevices", "--server", h.HTTP, "--token", "nonsense").want(t, exitDenied, "^$", `\[token-invalid\]`)
	runs(t, "call", "deleteDevices", "all=true", "--server", h.HTTP, "--token", h.Token(t, hub.ScopeRead)).want(t, exitDenied, "^$", `\[scope-missing\]`)
	for args, err := range map[string]string{
		"call nonsense":                    `no operation "nonsense"`,
		"call GET":                         `write a path behind GET`,
		"call GET api":                     `write a path behind GET`,
		"call getDevice":                   `getDevice needs deviceId=VALUE`,
		"call getDevice deviceId=":         `deviceId has one value`,
		"call getDevice lamp":              `"lamp" is not NAME=VALUE`,
		"call getDevice deviceId=x colour": `"colour" is not NAME=VALUE`,
		"call getDevice color=x":           `getDevice has no parameter "color"; it has deviceId, `,
		"call GET /?%zz":                   `has no good query`,
		"call root --header nonsense":      `--header: "nonsense" is not NAME: VALUE`,
	} {
		on(strings.Fields(args)...).want(t, exitUsage, "^$", err)
	}
	runs(t, "__complete", "--data", h.Data, "call", "getRes").want(t, exitOK, "(?m)^getResource\t", "")
	runs(t, "__complete", "--data", h.Data, "call", "getDevice", "dev").want(t, exitOK, "(?m)^deviceId=$", "")

	// The Web of Things.
	on("things").want(t, exitOK, `^THING +TITLE +PROPERTIES\n`+dev.ID+` +simulated .*/light/1.*\n$`, "^$")
	on("things", dev.ID).want(t, exitOK, `(?s)^PROPERTY +TITLE +ACCESS\n.*/light/1 .*read, write`, "^$")
	on("things", "--json").want(t, exitOK, `^\{.*"@context":.*\}\n$`, "^$")
	on("things", lamp).want(t, exitNotFound, "^$", `\[not-found\]`)
	// What a stream says is shown as it comes; it ends when it is interrupted.
	out, _, stop := executing(t, "call", "subscribeEvents", "includeCurrentState=true", "eventFilter=RESOURCE_CHANGED", "--json", "--data", h.Data)
	out.until(t, `(?m)^\{.*"resourceChanged":\{.*\}$`)
	if code := stop(); code != exitOK {
		t.Errorf("interrupted, it ended with %d", code)
	}
}

// A stream ends by being interrupted; anything else was not read to its end then.
func TestCallIsInterrupted(t *testing.T) {
	t.Parallel()
	for kind, want := range map[string]int{"text/event-stream": exitOK, "application/json": exitFailure, "text/plain": exitFailure} {
		api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.Header().Set("Content-Type", kind)
			if kind == "text/event-stream" {
				_, _ = io.WriteString(w, "data:")
			}
			_, _ = io.WriteString(w, "{\"begun\":1}\n\n")
			_ = http.NewResponseController(w).Flush()
			<-r.Context().Done()
		}))
		out, errs, stop := executing(t, "call", "GET", "/x", "--server", api.URL, "--token", "x", "--json")
		out.until(t, `begun`)
		if code := stop(); code != want {
			t.Errorf("%s: interrupted, it ended with %d: %s", kind, code, errs)
		}
		api.Close()
	}
}

// Every command that is a client works against a hub elsewhere, with a token of the environment and with a login.
func TestAHubElsewhere(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	runs(t, "simulate", "--devices", "1", "--duration", "2s", "--data", h.Data).want(t, exitOK, "devices 1 ", "^$")
	var dev struct{ ID string }
	if err := json.Unmarshal([]byte(runs(t, "devices", "--json", "--data", h.Data).out), &dev); err != nil {
		t.Fatal(err)
	}
	runsWith(t, "", nil, "user", "passwd", "admin", "--data", h.Data).want(t, exitOK, "one-time", "^$")
	h.User(t, "carol", "correct horse battery", "admin", "user")
	home := t.TempDir()
	env := []string{"HOME=" + home}
	elsewhere := func(env []string, args ...string) result {
		t.Helper()
		return runsWith(t, "", env, append(args, "--server", h.HTTP+"/")...)
	}
	commands := func(env []string, owner bool) {
		t.Helper()
		found := `(?s)` + dev.ID
		if !owner { // carol sees her own devices, and as administrator all of the hub's calls
			found = `^DEVICE .*\n$`
		}
		elsewhere(env, "devices").want(t, exitOK, found, "")
		elsewhere(env, "audit").want(t, exitOK, `(?s)^TIME .*socket`, "^$")
		elsewhere(env, "audit", "--json", "--limit", "1").want(t, exitOK, `^\{"number":"\d+",.*\}\n$`, "^$")
		elsewhere(env, "commands").want(t, exitOK, `^ID .*\n$`, "^no commands wait\n$")
		elsewhere(env, "things").want(t, exitOK, `^THING`, "")
		elsewhere(env, "history", dev.ID).want(t, exitOK, `^TIME`, "")
		elsewhere(env, "call", "getDevices").want(t, exitOK, "", "^$")
		status := exitLater // the device is away
		if !owner {
			status = exitDenied
		}
		for _, args := range [][]string{{"set", dev.ID, "/light/1", "{}"}, {"create", dev.ID, "/light/1", "{}"}, {"delete", dev.ID, "/light/1"}} {
			elsewhere(env, append(args, "--ttl", "100ms")...).want(t, status, "^$", `\[(command-expired|device-not-yours)\]\n$`)
		}
		if owner {
			elsewhere(env, "get", dev.ID, "/light/1").want(t, exitOK, `power`, "^$")
		}
		out, errs, stop := executingWith(t, env, "watch", "--state", "--server", h.HTTP)
		if owner {
			out.until(t, `resourceChanged`)
		}
		if code := stop(); code != exitOK {
			t.Errorf("watch ended with %d: %s", code, errs)
		}
	}
	token := []string{"COAPHUB_TOKEN=" + h.Token(t) + "\n", "HOME=" + home}
	elsewhere(env, "devices").want(t, exitUsage, "^$", `needs a token: .*coaphub login --server `+h.HTTP)
	elsewhere(nil, "devices").want(t, exitUsage, "^$", `needs a token`)
	commands(token, true)

	var out, errs shown
	ended := make(chan int, 1)
	go func() { // ends with the login
		ended <- execute(t.Context(), []string{"login", "--server", h.HTTP}, process{strings.NewReader(""), &out, &errs, env})
	}()
	errs.until(t, `(?s)^open \S+\nand type \S+, until \d\d:\d\d:\d\d\nor open \S+\n$`)
	said := regexp.MustCompile(`open (\S+)\nand type (\S+),`).FindStringSubmatch(errs.String())
	h.Approve(t, said[1], said[2], "carol", "correct horse battery")
	if code := <-ended; code != exitOK || out.String() != "signed in at "+h.HTTP+"\n" {
		t.Fatalf("it ended with %d: %s %s", code, &out, &errs)
	}
	kept, err := filepath.Glob(filepath.Join(home, ".config", "coaphub", "logins", "*.json"))
	if err != nil || len(kept) != 1 {
		t.Fatalf("%v, %v", kept, err)
	}
	for name, want := range map[string]os.FileMode{kept[0]: 0o600, filepath.Dir(kept[0]): 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", name, info.Mode(), err)
		}
	}
	commands(env, false)

	// Its access token ends: it is replaced, and the login with its new secret is kept.
	before, err := os.ReadFile(kept[0])
	if err != nil {
		t.Fatal(err)
	}
	old := regexp.MustCompile(`"expires":"[^"]*"`).ReplaceAll(before, []byte(`"expires":"2001-01-01T00:00:00Z"`))
	if err := os.WriteFile(kept[0], old, 0o600); err != nil {
		t.Fatal(err)
	}
	elsewhere(env, "devices").want(t, exitOK, `^DEVICE`, "")
	after, err := os.ReadFile(kept[0])
	if err != nil || string(after) == string(old) || !strings.Contains(string(after), `"server":"`+h.HTTP+`"`) {
		t.Errorf("%s, %v", after, err)
	}
	elsewhere(env, "logout").want(t, exitOK, "^signed out at "+h.HTTP+"/\n$", "^$")
	elsewhere(env, "logout").want(t, exitFailure, "^$", "no login")
	elsewhere(env, "devices").want(t, exitUsage, "^$", `needs a token`)
	// A login that was ended at the hub says so.
	if err := os.WriteFile(kept[0], old, 0o600); err != nil {
		t.Fatal(err)
	}
	elsewhere(env, "devices").want(t, exitDenied, "^$", `the provider refused.*\[grant-refused\]`)
	for args, code := range map[string]int{
		"login": exitUsage, "logout": exitUsage, "login --server nonsense": exitUsage, "login --server http://127.0.0.1:1": exitLater,
		"login --server http://127.0.0.1:1 --ca /does/not/exist": exitFailure, "devices --ca x": exitUsage,
		"devices --server http://127.0.0.1:1 --token x --token-file y": exitUsage,
	} {
		runsWith(t, "", env, strings.Fields(args)...).want(t, code, "^$", "coaphub: ")
	}
}
