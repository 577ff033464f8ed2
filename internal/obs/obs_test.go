package obs_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/internal/obs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func get(t *testing.T, h http.Handler, method, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	r := httptest.NewRequest(method, path, nil)
	r.Host = "anything.example" // probes use any name
	h.ServeHTTP(w, r)
	return w.Code, w.Body.String()
}

func TestAdminAnswersProbes(t *testing.T) {
	var health obs.Health
	var trouble error
	health.Check("store", func(context.Context) error { return trouble })
	h := obs.AdminHandler(&health, obs.NewRegistry(obs.ReadBuild("v1")), slog.New(slog.DiscardHandler))

	step := func(what string, path string, code int, body string) {
		t.Helper()
		if c, b := get(t, h, http.MethodGet, path); c != code || !strings.Contains(b, body) {
			t.Errorf("%s: GET %s = %d %s, want %d with %q", what, path, c, b, code, body)
		}
	}
	step("starting", "/live", 200, "live")
	step("starting", "/ready", 503, `"hub":"starting or stopping"`)
	health.SetReady(true)
	step("started", "/ready", 200, "ready")
	trouble = errors.New("disk full")
	step("disk full", "/ready", 503, `"store":"disk full"`)
	step("disk full", "/live", 200, "live")
	step("any time", "/metrics", 200, `coaphub_build_info{commit="`)
	step("any time", "/metrics", 200, "go_goroutines")
	step("any time", "/other", 404, "")
	if c, _ := get(t, h, http.MethodPost, "/live"); c != http.StatusMethodNotAllowed {
		t.Errorf("POST /live = %d", c)
	}
}

func TestACheckThatHangsIsNotReady(t *testing.T) {
	var health obs.Health
	health.SetReady(true)
	health.Check("slow", func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() })
	ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
	defer cancel()
	if not := health.Ready(ctx); not["slow"] == "" {
		t.Errorf("ready although a check hangs: %v", not)
	}
}

func TestLogger(t *testing.T) {
	for _, c := range []struct {
		cfg   obs.LogConfig
		line  string
		lines int
	}{
		{obs.LogConfig{Level: "info", Format: "text"}, "level=INFO msg=hello device=d", 1},
		{obs.LogConfig{Level: "debug", Format: "json"}, `"msg":"detail"`, 2},
		{obs.LogConfig{Level: "ERROR", Format: "json"}, "", 0},
	} {
		var b bytes.Buffer
		if ps := c.cfg.Validate("log"); len(ps) > 0 {
			t.Errorf("%+v: %v", c.cfg, ps)
		}
		l := obs.NewLogger(&b, c.cfg)
		l.Info("hello", "device", "d")
		l.Debug("detail")
		if !strings.Contains(b.String(), c.line) || strings.Count(b.String(), "\n") != c.lines {
			t.Errorf("%+v logs %q", c.cfg, b.String())
		}
	}
	for _, bad := range []obs.LogConfig{{Level: "loud", Format: "text"}, {Level: "info", Format: "xml"}, {Level: "info+3", Format: "text"}} {
		if ps := bad.Validate("log"); len(ps) != 1 {
			t.Errorf("%+v: %v, want one problem", bad, ps)
		}
	}
	if ps := obs.DefaultLog().Validate("log"); len(ps) != 0 {
		t.Errorf("the default is refused: %v", ps)
	}
}

func TestServeHTTPFinishesRequestsUnderWay(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	entered, finish := make(chan struct{}), make(chan struct{})
	h := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		close(entered)
		<-finish
		_, _ = io.WriteString(w, "done")
	})
	ctx, stop := context.WithCancel(t.Context())
	ready, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		ended <- obs.ServeHTTP(ctx, ln, h, 10*time.Second, slog.New(slog.DiscardHandler), func() { close(ready) })
	}()
	<-ready
	got := make(chan string, 1)
	go func() {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get("http://" + ln.Addr().String())
		if err != nil {
			got <- err.Error()
			return
		}
		defer func() { _ = resp.Body.Close() }()
		b, _ := io.ReadAll(resp.Body)
		got <- string(b)
	}()
	<-entered
	stop()
	close(finish)
	if s := <-got; s != "done" {
		t.Errorf("the request under way got %q", s)
	}
	if err := <-ended; err != nil {
		t.Errorf("err = %v", err)
	}
}

func TestServeHTTPCutsWhatDoesNotFinish(t *testing.T) {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	entered := make(chan struct{})
	h := http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { close(entered); <-r.Context().Done() })
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- obs.ServeHTTP(ctx, ln, h, time.Millisecond, slog.New(slog.DiscardHandler), func() {})
	}()
	failed := make(chan error, 1)
	go func() {
		client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get("http://" + ln.Addr().String())
		if err == nil {
			err = resp.Body.Close()
		}
		failed <- err
	}()
	<-entered
	stop()
	if err := <-ended; err != nil {
		t.Errorf("err = %v", err)
	}
	if err := <-failed; err == nil {
		t.Error("the endless request was answered")
	}
}
