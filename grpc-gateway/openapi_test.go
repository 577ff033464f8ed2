package grpcgateway

import (
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/coaphub/coaphub/api"
	"github.com/coaphub/coaphub/grpc-gateway/openapitest"
)

var checker = sync.OnceValues(func() (*openapitest.Checker, error) {
	doc, err := api.JSON()
	if err != nil {
		return nil, err
	}
	return openapitest.New(doc)
})

func checkAnswer(t testing.TB, r *http.Request, rec *httptest.ResponseRecorder) {
	t.Helper()
	c, err := checker()
	if err != nil {
		t.Fatal(err)
	}
	if r.URL.Path == "/login" || rec.Header().Get("Content-Type") == "text/plain; charset=utf-8" { // pages of others
		return
	}
	if err := c.Check(r.Method, r.URL, rec.Code, rec.Header(), rec.Body.Bytes()); err != nil {
		t.Error(err)
	}
}

// Every route is described and every described operation is routed, under the same operationId.
func TestRoutesAndOpenAPIAgree(t *testing.T) {
	t.Parallel()
	c, err := checker()
	if err != nil {
		t.Fatal(err)
	}
	var routed []string
	for template, methods := range routes {
		for method, op := range methods {
			routed = append(routed, method+" "+template)
			described := c.Operation(method, example(template))
			if described == nil {
				continue // reported below
			}
			want(t, "operationId of "+method+" "+template, described.OperationID, op.id)
			want(t, "public: "+template, described.Security != nil && len(*described.Security) == 0, op.scope == "")
		}
	}
	slices.Sort(routed)
	wantList(t, "operations", c.Operations(), routed...)
}

func example(template string) string {
	return regexp.MustCompile(`\{[^}]*\}`).ReplaceAllStringFunc(template, func(v string) string {
		if v == "{href}" {
			return "light/1"
		}
		return string(lampA)
	})
}

// Each query parameter that the door reads is described somewhere, and the other way round.
func TestQueryParametersAndOpenAPIAgree(t *testing.T) {
	t.Parallel()
	c, err := checker()
	if err != nil {
		t.Fatal(err)
	}
	described := map[string]bool{}
	for template, methods := range routes {
		for method := range methods {
			op := c.Operation(method, example(template))
			if op == nil {
				continue
			}
			for _, p := range op.Parameters {
				if p.Value.In == "query" {
					described[p.Value.Name] = true
				}
			}
		}
	}
	read := map[string]bool{}
	for _, name := range queryNames {
		read[name] = true
		if !described[name] {
			t.Errorf("%s is not described", name)
		}
	}
	for name := range described {
		if !read[name] {
			t.Errorf("%s is described and not read", name)
		}
	}
}

func TestCheckerFindsDamage(t *testing.T) {
	t.Parallel()
	c, err := checker()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	list := w.get(t, "/api/v1/resources?deviceIdFilter="+string(lampA))
	lines := slices.Collect(strings.Lines(list.Body.String()))
	check := func(path string, status int, contentType, body string) error {
		return c.Check("GET", &url.URL{Path: path}, status, http.Header{"Content-Type": {contentType}}, []byte(body))
	}
	const path = "/api/v1/resources"
	if err := check(path, 200, "application/json", strings.Join(lines, "")); err != nil {
		t.Fatalf("a good list: %v", err)
	}
	for what, err := range map[string]error{
		"cut second line":   check(path, 200, "application/json", lines[0]+lines[1][:len(lines[1])/2]+"\n"+lines[2]),
		"other second line": check(path, 200, "application/json", lines[0]+"{\"x\":1}\n"),
		"wrong type inside": check(path, 200, "application/json", lines[0]+strings.Replace(lines[1], `"version":"4"`, `"version":4`, 1)),
		"unknown member":    check(path, 200, "application/json", lines[0]+strings.Replace(lines[1], `"version":`, `"revision":"1","version":`, 1)),
		"missing member":    check(path, 200, "application/json", lines[0]+strings.Replace(lines[1], `"status":"OK",`, ``, 1)),
		"unknown status":    check(path, 200, "application/json", strings.Replace(lines[0], `"status":"OK"`, `"status":"FINE"`, 1)),
		"empty line":        check(path, 200, "application/json", lines[0]+"\n"+lines[1]),
		"no end":            check(path, 200, "application/json", strings.TrimSuffix(lines[0], "\n")),
		"two in a line":     check(path, 200, "application/json", strings.TrimSuffix(lines[0], "\n")+lines[1]),
		"content type":      check(path, 200, "text/html", lines[0]),
		"status":            check(path, 204, "application/json", ""),
		"no operation":      check("/api/v1/nothing", 200, "application/json", "{}"),
		"error form":        check(path, 404, "application/json", `{"code":5,"message":"x"}`),
		"error code":        check(path, 404, "application/json", `{"code":5,"message":"x","details":[{"@type":"type.googleapis.com/google.rpc.ErrorInfo","reason":"Bad Code","domain":"coaphub"}]}`),
		"whole resource":    check(light, 200, "application/json", `{"power":1}`),
		"device":            check("/api/v1/devices/"+string(lampA), 200, "application/json", `{"id":"x"}`),
	} {
		if err == nil {
			t.Errorf("%s was not found", what)
		}
	}
	if err := check(path, 200, "application/json", ""); err != nil {
		t.Errorf("an empty list: %v", err)
	}
}

// The transport is what the end-to-end suite puts under its clients.
func TestCheckingTransport(t *testing.T) {
	t.Parallel()
	c, err := checker()
	if err != nil {
		t.Fatal(err)
	}
	w := newWorld(t)
	w.run(t)
	h, _ := w.Addresses()
	var reports []error
	base := &damage{RoundTripper: client(t).Transport}
	hc := &http.Client{Transport: &openapitest.Transport{Checker: c, Base: base, Report: func(err error) { reports = append(reports, err) }, Skip: func(r *http.Request) bool { return r.URL.Path == "/login" }}}
	ask := func(path string) {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+h.String()+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Authorization", "Bearer alice")
		resp, err := hc.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
	}
	ask("/api/v1/devices")   // compressed and uncompressed again by net/http
	ask("/api/v1/resources") // large enough for it
	ask("/api/v1/nothing")
	if len(reports) > 0 {
		t.Errorf("good answers: %v", reports)
	}
	base.on = true
	ask("/api/v1/resources")
	want(t, "a damaged second line", len(reports), 1)
	ask("/login")
	want(t, "skipped", len(reports), 1)
}

// damage breaks the second line of answers.
type damage struct {
	http.RoundTripper
	on bool
}

func (d *damage) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := d.RoundTripper.RoundTrip(r)
	if err != nil || !d.on {
		return resp, err
	}
	b, err := io.ReadAll(resp.Body)
	_ = resp.Body.Close()
	if err != nil {
		return nil, err
	}
	lines := strings.SplitAfter(string(b), "\n")
	if len(lines) > 1 {
		lines[1] = "{\"result\":{\"types\":5}}\n"
	}
	resp.Body = io.NopCloser(strings.NewReader(strings.Join(lines, "")))
	return resp, nil
}
