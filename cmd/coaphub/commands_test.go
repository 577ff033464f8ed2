package main

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

func TestMistakesInCommands(t *testing.T) {
	t.Parallel()
	for args, err := range map[string]string{
		"set " + lamp + " /light":                       `an argument is missing; write coaphub set DEVICE HREF JSON`,
		"set lamp /light {}":                            `"lamp" is not a device ID`,
		"set " + lamp + " .. {}":                        `dot segment`,
		"set " + lamp + " /light on":                    `"on" is not JSON`,
		"set " + lamp + " /light {} --ttl 10ms":         `--ttl: "10ms" is not a duration from 100ms`,
		"create " + lamp + " /light {} --interface x":   `unknown flag: --interface`,
		"delete " + lamp:                                `an argument is missing`,
		"commands --cancel all":                         `--cancel needs DEVICE and HREF`,
		"commands " + lamp + " --cancel all":            `--cancel needs DEVICE and HREF`,
		"commands a b c":                                `"c" is one argument too many`,
		"set " + lamp + " /light {} --token x":          `belong to --server`,
		"delete " + lamp + " /light --supersede --json": `unknown flag: --supersede`,
	} {
		runs(t, strings.Fields(args)...).want(t, exitUsage, "^$", err)
	}
}

// People act on a device of another make (the simulator's engine is go-coap's).
func TestCommandsOfPeople(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	on := func(args ...string) result { return runs(t, append(args, "--data", h.Data)...) }
	o := h.Onboard(t, lamp)
	d, err := device.New(device.Config{ID: lamp, HubAddr: h.Endpoints.CoAPSTCP, TLS: o.TLS})
	if err != nil {
		t.Fatal(err)
	}
	enter := func() {
		t.Helper()
		if err := d.Connect(t.Context()); err != nil {
			t.Fatal(err)
		}
		if d.Credentials().Access == "" {
			if a, err := d.SignUp(t.Context(), o.Code); err != nil {
				t.Fatal(a, err)
			}
		}
		if a, err := d.SignIn(t.Context()); err != nil {
			t.Fatal(a, err)
		}
	}
	enter()
	defer d.Close()
	if a, err := d.Publish(t.Context()); err != nil {
		t.Fatal(a, err)
	}
	eventually(t, "the twin", func() bool { return strings.Contains(on("get", lamp).out, `"power":0`) })

	on("set", lamp, "/light/1", `{"power":5}`).want(t, exitOK, `^OK .*"power":5.*\n$`, "^$")
	on("set", lamp, "light/1", `{"power":6}`, "--json", "--interface", "oic.if.a", "--supersede").want(t, exitOK, `^\{"data":.*"correlationId"`, "^$")
	runsWith(t, `{"power":7}`, nil, "set", lamp, "/light/1", "-", "--data", h.Data).want(t, exitOK, `"power":7`, "^$")
	eventually(t, "the notification", func() bool { return strings.Contains(on("get", lamp, "/light/1").out, `"power":7`) })
	on("set", lamp, "/info", `{}`).want(t, exitFailure, "^$", `error response from device: [A-Z_]+ \[device-error\]`)
	on("set", lamp, "/none", `{}`).want(t, exitNotFound, "^$", `the device has no resource /none \[resource-unknown\]`)
	on("set", lamp, "/none", `{}`, "--force").want(t, exitNotFound, "^$", `device-error`)
	on("create", lamp, "/info", `{}`).want(t, exitFailure, "^$", `device-error`)
	on("delete", lamp, "/light/1").want(t, exitFailure, "^$", `device-error`)
	on("history", lamp, "/light/1").want(t, exitOK, `(?s)resourceUpdatePending .*resourceUpdated +/light/1 OK .*resourceDeleted +/light/1 METHOD_NOT_ALLOWED`, "^$")

	// The device is away: what is asked waits, in order.
	d.Close()
	eventually(t, "the device to go", func() bool { return strings.Contains(on("devices").out, "offline") })
	on("commands").want(t, exitOK, "^ID .*\n$", "^no commands wait\n$")
	on("set", lamp, "/light/1", `{"power":8}`, "--ttl", "200ms").want(t, exitLater, "^$", `did not answer in time \[command-expired\]`)
	on("set", lamp, "/light/1", `{"power":9}`, "--async", "--ttl", "1h", "--key", "once").want(t, exitOK, `^accepted; coaphub commands`, "^$")
	on("set", lamp, "/light/1", `{"power":9}`, "--async", "--ttl", "1h", "--key", "once").want(t, exitOK, `^accepted`, "^$")
	on("delete", lamp, "/light/1", "--async", "--ttl", "1h").want(t, exitOK, `^accepted`, "^$")
	on("create", lamp, "/info", `{"a":1}`, "--async", "--ttl", "1h").want(t, exitOK, `^accepted`, "^$")
	on("commands").want(t, exitOK, `^ID .*\n.*update +/light/1 .*"power":9.*\n.*delete +/light/1 .*\n.*create +/info .*"a":1.*\n$`, "^$")
	on("commands", lamp, "--json").want(t, exitOK, `resourceUpdatePending.*\n.*resourceDeletePending.*\n.*resourceCreatePending`, "^$")
	id := strings.Fields(strings.Split(on("commands", lamp, "/info").out, "\n")[1])[0]
	on("commands", lamp, "/info", "--cancel", "nonsense").want(t, exitNotFound, "^$", `command-unknown`)
	on("commands", lamp, "/info", "--cancel", id).want(t, exitOK, `^cancelled `+id+`\n$`, "^$")
	enter()
	eventually(t, "what waited", func() bool { return on("commands").err == "no commands wait\n" })
	if v, _ := d.Value("/light/1").(map[string]any); v["power"] != uint64(9) {
		t.Errorf("the device has %v", v)
	}
}

// What a device answers says nothing of the caller's token.
func TestDevicesThatRefuse(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		status, code int
		reason       string
		exit         int
	}{
		{http.StatusUnauthorized, 16, "device-error", exitFailure},
		{http.StatusForbidden, 7, "device-error", exitFailure},
		{http.StatusNotFound, 5, "device-error", exitNotFound},
		{http.StatusUnauthorized, 16, "token-expired", exitDenied},
		{http.StatusForbidden, 7, "device-not-yours", exitDenied},
	} {
		api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(c.status)
			_, _ = fmt.Fprintf(w, `{"code":%d,"message":"no","details":[{"reason":%q}]}`, c.code, c.reason)
		}))
		runs(t, "set", lamp, "/light/1", "{}", "--server", api.URL, "--token", "x").want(t, c.exit, "^$", c.reason)
		api.Close()
	}
}

// eventually polls what the hub will make true.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	deadline := time.After(30 * time.Second)
	for !ok() {
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("it never came: %s", what)
		}
	}
}
