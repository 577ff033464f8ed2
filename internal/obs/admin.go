package obs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/common/expfmt"
)

// Health is whether the process lives and serves. The zero value lives and is not ready.
type Health struct {
	ready  atomic.Bool
	mu     sync.Mutex // guards checks
	checks map[string]func(context.Context) error
}

// SetReady says whether all parts serve.
func (h *Health) SetReady(ready bool) { h.ready.Store(ready) }

// Check adds a question that must be answered with nil for the process to be ready. It gets at most a second. The error's
// text is shown on the admin listener.
func (h *Health) Check(name string, ask func(context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.checks == nil {
		h.checks = map[string]func(context.Context) error{}
	}
	h.checks[name] = ask
}

// Ready returns what keeps the process from being ready; empty when it is.
func (h *Health) Ready(ctx context.Context) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	h.mu.Lock()
	checks := maps.Clone(h.checks)
	h.mu.Unlock()
	out := map[string]string{}
	if !h.ready.Load() {
		out["hub"] = "starting or stopping"
	}
	for _, name := range slices.Sorted(maps.Keys(checks)) {
		if err := checks[name](ctx); err != nil {
			out[name] = err.Error()
		}
	}
	return out
}

// AdminHandler answers /live, /ready and /metrics. These three carry nothing that a page in a browser may not see, and are
// asked by probes under any name: there is no Host allow-list here.
func AdminHandler(h *Health, g prometheus.Gatherer, log *slog.Logger) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /live", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, http.StatusOK, map[string]string{"status": "live"})
	})
	mux.HandleFunc("GET /ready", func(w http.ResponseWriter, r *http.Request) {
		if not := h.Ready(r.Context()); len(not) > 0 {
			answer(w, http.StatusServiceUnavailable, map[string]any{"status": "not ready", "because": not})
			return
		}
		answer(w, http.StatusOK, map[string]string{"status": "ready"})
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(g, promhttp.HandlerOpts{
		ErrorLog: promLog{log}, ErrorHandling: promhttp.ContinueOnError, MaxRequestsInFlight: 4, // more scrapers than four wait for nothing good
	}))
	return mux
}

// WriteMetrics writes what AdminHandler answers at /metrics to whoever names no other form: Prometheus' text format, version 0.0.4. What
// cannot be gathered is left out, as there.
func WriteMetrics(w io.Writer, g prometheus.Gatherer) error {
	families, err := g.Gather()
	if len(families) == 0 && err != nil {
		return fmt.Errorf("gather metrics: %w", err)
	}
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(w, f); err != nil {
			return fmt.Errorf("write metrics: %w", err)
		}
	}
	return nil
}

type promLog struct{ log *slog.Logger }

func (p promLog) Println(v ...any) { p.log.Warn("metrics could not be gathered", "errors", v) }

func answer(w http.ResponseWriter, code int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(code)
	_ = json.NewEncoder(w).Encode(v) // the caller is gone, nobody to tell
}

// ServeHTTP serves a handler on a listener until ctx ends; requests under way then get drain to finish before they are cut.
// ready is called once connections are accepted. Limits are those of a door that strangers knock at: ten seconds for a
// header, two minutes of idling, 64 KiB of headers; there is no write timeout, since answers may stream.
func ServeHTTP(ctx context.Context, ln net.Listener, h http.Handler, drain time.Duration, log *slog.Logger, ready func()) error {
	srv := &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    64 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug), // strangers' broken handshakes
		BaseContext:       func(net.Listener) context.Context { return context.WithoutCancel(ctx) },
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(ln) }() // ends with Shutdown or Close below, or by itself with an error
	ready()
	select {
	case err := <-served:
		_ = srv.Close()
		return err
	case <-ctx.Done():
	}
	last, cancel := context.WithTimeout(context.WithoutCancel(ctx), drain)
	defer cancel()
	if err := srv.Shutdown(last); err != nil {
		_ = srv.Close() // long streams are cut; their readers resume
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}
