package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/hubtest"
)

// shown is what a command that goes on has printed so far.
type shown struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *shown) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(b)
}

func (s *shown) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// until polls until what was printed matches.
func (s *shown) until(t *testing.T, pattern string) {
	t.Helper()
	re := regexp.MustCompile(pattern)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	deadline := time.After(30 * time.Second)
	for !re.MatchString(s.String()) {
		select {
		case <-poll.C:
		case <-deadline:
			t.Fatalf("it never printed %s:\n%s", pattern, s)
		}
	}
}

// executing runs a command that goes on; stop interrupts it and returns its exit code.
func executing(t *testing.T, args ...string) (out, errs *shown, stop func() int) {
	t.Helper()
	return executingWith(t, nil, args...)
}

func executingWith(t *testing.T, env []string, args ...string) (out, errs *shown, stop func() int) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	out, errs = &shown{}, &shown{}
	ended := make(chan int, 1)
	go func() { ended <- execute(ctx, args, process{strings.NewReader(""), out, errs, env}) }() // ends with cancel
	stop = sync.OnceValue(func() int { cancel(); return <-ended })
	t.Cleanup(func() { stop() })
	return out, errs, stop
}

// live waits until so many streams are: what happens from then on is in them.
func live(t *testing.T, h *hubtest.Hub, streams int) {
	t.Helper()
	want := fmt.Sprintf("coaphub_api_subscriptions{door=\"sse\"} %d\n", streams)
	poll := time.NewTicker(10 * time.Millisecond)
	defer poll.Stop()
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); <-poll.C {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, h.Admin+"/metrics", http.NoBody)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), want) {
			return
		}
	}
	t.Fatalf("there are not %d streams", streams)
}

// A watch goes on behind what it showed, across a restart of the hub on other ports.
func TestWatch(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	simulate := func() {
		t.Helper()
		runs(t, "simulate", "--devices", "1", "--duration", "2s", "--rate", "20", "--data", h.Data).want(t, exitOK, "devices 1 ", "^$")
	}
	out, errs, stop := executing(t, "watch", "--data", h.Data, "--state")
	asJSON, _, stopJSON := executing(t, "watch", "--data", h.Data, "--state", "--kind", "resource-changed", "--json")
	live(t, h, 2)
	simulate()
	const at, id = `(?m)^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}  `, `[0-9a-f-]{36}`
	for _, what := range []string{`deviceRegistered$`, `deviceMetadataUpdated  ONLINE, twin [A-Z_]+$`, `resourcePublished +/.*/light/1.*$`, `resourceChanged +/light/1 OK \{.*\}$`, `deviceMetadataUpdated  OFFLINE.*$`} {
		out.until(t, at+id+`  `+what)
	}
	asJSON.until(t, `(?m)^\{"resourceChanged":\{.*\}$`)
	before := strings.Count(out.String(), "OFFLINE")
	h.Restart(t)
	simulate()
	errs.until(t, `the stream broke off \(hub-stopping\), coming back\n`)
	out.until(t, fmt.Sprintf(`(?s)(OFFLINE.*){%d}`, before+1))
	if strings.Count(out.String(), "deviceRegistered") != 1 { // it is the same device
		t.Errorf("registered:\n%s", out)
	}
	if code := stop(); code != exitOK {
		t.Errorf("interrupted, it ended with %d: %s", code, errs)
	}
	if code := stopJSON(); code != exitOK {
		t.Errorf("interrupted, it ended with %d", code)
	}
	seen := map[string]bool{}
	for line := range strings.Lines(asJSON.String()) {
		if seen[line] { // each has the version of its resource; lines for people may be equal within a millisecond
			t.Errorf("printed twice: %s", line)
		}
		seen[line] = true
		var m map[string]json.RawMessage
		if err := json.Unmarshal([]byte(line), &m); err != nil || len(m) != 1 || m["resourceChanged"] == nil {
			t.Errorf("%v in %s", err, line)
		}
	}
}

func TestWatchMistakes(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	runs(t, "watch", "lamp", "--data", h.Data).want(t, exitUsage, "^$", "is not a device ID")
	runs(t, "watch", lamp, "/a/../b", "--data", h.Data).want(t, exitUsage, "^$", "dot segment")
	runs(t, "watch", "--kind", "nope", "--data", h.Data).want(t, exitFailure, "^$", `no kind of events \[query-invalid\]`)
	runs(t, "watch", "--server", h.HTTP, "--token", "nonsense").want(t, exitDenied, "^$", `\[`)
	runs(t, "watch", "--server", "http://127.0.0.1:1", "--token", "x").want(t, exitLater, "^$", `hub-unreachable`)
}

// What a hub says that lost what came next, and that refuses to go on.
func TestWatchLagsAndEnds(t *testing.T) {
	t.Parallel()
	var asked []string
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = append(asked, r.URL.Query().Get("hrefFilter")+" "+r.Header.Get("Last-Event-ID"))
		if len(asked) == 2 {
			w.WriteHeader(http.StatusBadRequest)
			_, _ = w.Write([]byte(`{"code":3,"message":"it is not one of this hub","details":[{"reason":"resume-token-invalid"}]}`))
			return
		}
		_, _ = w.Write([]byte(":\n\nid: A1\ndata: {\"result\":{\"operationProcessed\":{\"errorStatus\":{\"code\":\"OK\"},\"lagged\":true},\"resumeToken\":\"A1\"}}\n\n" +
			"id: A2\ndata: {\"result\":{\"resourceChanged\":{\"resourceId\":{\"deviceId\":\"" + lamp + "\",\"href\":\"/a\"},\"status\":\"OK\",\"content\":\"\\u001b[31m\"},\"resumeToken\":\"A2\"}}\n\n" +
			"id: A3\ndata: {\"result\":{\"resour")) // it breaks off
	}))
	t.Cleanup(srv.Close)
	r := runs(t, "watch", lamp, "a/", "--server", srv.URL, "--token", "x")
	r.want(t, exitFailure, `  `+lamp+`  resourceChanged +/a OK "\\u001b\[31m"\n$`, `(?s)no longer keeps.*coming back.*not one of this hub \[resume-token-invalid\]`)
	if !slices.Equal(asked, []string{"/a ", "/a A2"}) {
		t.Errorf("asked %q", asked)
	}
}
