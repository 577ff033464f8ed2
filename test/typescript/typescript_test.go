//go:build typescript

// Package typescript compiles the TypeScript client and runs its example against a hub with a device. It needs node, npm and the
// network for npm's packages, so it is of make nightly, which sets the tag.
package typescript

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/test/hubtest"
)

const lamp = "d0000000-0000-4000-8000-00000000000a"

func run(t *testing.T, env []string, name string, args ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = "../../api/typescript"
	cmd.Env = append(os.Environ(), env...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// build compiles the client, once.
var build = sync.OnceFunc(func() {
	for _, args := range [][]string{{"npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"}, {"npx", "--no-install", "tsc"}} {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Dir = "../../api/typescript"
		if out, err := cmd.CombinedOutput(); err != nil {
			panic(fmt.Sprintf("%s: %v\n%s", args, err, out))
		}
	}
})

// What a hub says that breaks off, is busy, lost what came next, and refuses; and a list in two pages, the second cut off.
func TestFaults(t *testing.T) {
	build()
	frame := func(id, what string) string { return "id: " + id + "\ndata: {\"result\":" + what + "}\n\n" }
	const processed, lagged = `{"operationProcessed":{"errorStatus":{"code":"OK"}}}`, `{"operationProcessed":{"errorStatus":{"code":"OK"},"lagged":true}}`
	changed := func(n int) string { return fmt.Sprintf(`{"resourceChanged":{"content":%d}}`, n) }
	answers := []string{
		":\n\n" + frame("A1", processed) + frame("A2", changed(1)) + "id: A3\ndata: {\"resu",
		"503",
		frame("B1", processed) + frame("B2", changed(2)) + `data: {"error":{"code":14,"message":"stopping","details":[{"reason":"hub-stopping"}]}}` + "\n\n",
		frame("C1", lagged) + frame("C2", changed(3)),
		"400",
	}
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/api/v1/devices" {
			if r.URL.Query().Get("cursor") == "" {
				_, _ = w.Write([]byte(`{"result":{"id":"a"}}` + "\n" + `{"result":{"id":"b","cursor":"next"}}` + "\n"))
				return
			}
			_, _ = w.Write([]byte(`{"result":{"id":"c"}}` + "\n" + `{"error":{"code":14,"message":"stopping","details":[{"reason":"hub-stopping"}]}}` + "\n"))
			return
		}
		asked = append(asked, r.Header.Get("Last-Event-ID")+" "+r.URL.RawQuery)
		switch a := answers[len(asked)-1]; a {
		case "503":
			w.WriteHeader(http.StatusServiceUnavailable)
		case "400":
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"code":3,"message":"it is not one of this hub","details":[{"reason":"resume-token-invalid"}]}`))
		default:
			_, _ = w.Write([]byte(a))
		}
	}))
	defer srv.Close()
	out := run(t, []string{"COAPHUB_SERVER=" + srv.URL}, "node", "--input-type=module", "--eval", `
		import { Hub } from "./dist/index.js";
		const hub = new Hub(process.env.COAPHUB_SERVER, "token");
		let breaks = 0;
		try {
			for await (const told of hub.watch({ eventFilter: ["X", "Y"], resumeToken: "A0" }, { broken: () => breaks++ }))
				console.log(told.resourceChanged?.content ?? told.operationProcessed.lagged ?? "live");
		} catch (error) { console.log(breaks, error.status, error.code); }
		try {
			for await (const device of hub.list("/api/v1/devices")) console.log(JSON.stringify(device));
		} catch (error) { console.log(error.status, error.code); }
		await hub.watch({}, { signal: AbortSignal.abort(new Error("before")) }).next().catch((error) => console.log(error.message));
	`)
	if want := "live\n1\n2\ntrue\n3\n4 400 resume-token-invalid\n" + `{"id":"a"}` + "\n" + `{"id":"b"}` + "\n" + `{"id":"c"}` + "\n0 hub-stopping\nbefore\n"; out != want {
		t.Errorf("it printed\n%s\nwant\n%s", out, want)
	}
	if want := []string{"A0 ", "A2 ", "A2 ", "B2 ", "C2 "}; len(asked) != len(want) {
		t.Errorf("asked %q", asked)
	} else {
		for i, a := range asked {
			if a != want[i]+"eventFilter=X&eventFilter=Y" {
				t.Errorf("asked %q, want %q", a, want[i])
			}
		}
	}
}

func TestTypeScriptClient(t *testing.T) {
	build()
	h := hubtest.Start(t)
	h.Device(t, lamp, "lamp")
	token := h.Token(t)
	c, err := client.New(client.Config{Server: h.HTTP, Token: client.Static(token)})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	poll := time.NewTicker(50 * time.Millisecond)
	defer poll.Stop()
	for deadline := time.After(30 * time.Second); ; {
		got, err := c.GetDevice(t.Context(), lamp)
		if err == nil && got.Metadata.Twin.State == "IN_SYNC" {
			break
		}
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("the device is not synchronised: %+v, %v", got, err)
		}
	}
	out := run(t, []string{"COAPHUB_SERVER=" + h.HTTP, "COAPHUB_TOKEN=" + token}, "node", "dist/example.js")
	want := regexp.MustCompile(`(?s)^device lamp IN_SYNC\nanswer \{"data":\{.*"power":42.*\nevent OK \{.*"power":42.*\}\ncontent \{.*"power":42.*\}\nerror 404 not-found\n$`)
	if !want.MatchString(out) {
		t.Errorf("the example printed\n%s", out)
	}
}
