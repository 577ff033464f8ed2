package bundle

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
)

func TestCallsThatGoWrong(t *testing.T) {
	t.Parallel()
	type question struct {
		Name string `json:"name"`
	}
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	mux := http.NewServeMux()
	mux.HandleFunc("POST /ask", call(func(_ context.Context, q question) (string, error) {
		switch q.Name {
		case "panic":
			panic("oh no")
		case "secret":
			return "", errors.New("database password is hunter2")
		case "missing":
			return "", hub.NewError(hub.NotFound, "thing-missing", "there is no such thing here")
		}
		return "hello " + q.Name, nil
	}, logger))
	m := newSocketMetrics(prometheus.NewRegistry())
	var entries []hub.AuditEntry
	h := audited(mux, m, func(_ context.Context, e hub.AuditEntry) error {
		entries = append(entries, e)
		return nil
	}, logger)

	for _, c := range []struct {
		name, method, path, body string
		code                     int
		answer, outcome          string
	}{
		{"good", "POST", "/ask", `{"name":"you"}`, 200, `"hello you"`, "ok"},
		{"no body", "POST", "/ask", "", 200, `"hello "`, "ok"},
		{"no JSON", "POST", "/ask", "{", 400, `"code":"request-malformed"`, "refused"},
		{"an unknown field", "POST", "/ask", `{"nam":"x"}`, 400, `"code":"request-malformed"`, "refused"},
		{"a body without end", "POST", "/ask", `{"name":"` + strings.Repeat("x", maxCall) + `"}`, 400, `"code":"request-malformed"`, "refused"},
		{"nothing found", "POST", "/ask", `{"name":"missing"}`, 404, `"code":"thing-missing","message":"there is no such thing here"`, "refused"},
		{"trouble of ours", "POST", "/ask", `{"name":"secret"}`, 500, `"code":"internal"`, "failed"},
		{"a panic", "POST", "/ask", `{"name":"panic"}`, 500, `"code":"internal"`, "panic"},
		{"another method", "GET", "/ask", "", 405, "", "refused"},
	} {
		t.Run(c.name, func(t *testing.T) {
			name := "POST /ask"
			if c.method == http.MethodGet {
				name = "unknown"
			}
			before := testutil.ToFloat64(m.calls.WithLabelValues(name, c.outcome))
			w := httptest.NewRecorder()
			r := httptest.NewRequest(c.method, c.path, strings.NewReader(c.body))
			r.RemoteAddr = "uid=0,pid=7"
			h.ServeHTTP(w, r)
			if w.Code != c.code || !strings.Contains(w.Body.String(), c.answer) {
				t.Errorf("answered %d %s, want %d with %s", w.Code, w.Body, c.code, c.answer)
			}
			if strings.Contains(w.Body.String(), "hunter2") {
				t.Error("the cause goes out")
			}
			if n := testutil.ToFloat64(m.calls.WithLabelValues(name, c.outcome)); n != before+1 {
				t.Errorf("%s is counted %v times", c.outcome, n-before)
			}
		})
	}
	var outcomes []string
	for _, e := range entries { // all but the call that does not exist
		if e.Door != "socket" || e.Call != "POST /ask" || e.User != "root" {
			t.Errorf("in the audit log: %+v", e)
		}
		outcomes = append(outcomes, e.Outcome)
	}
	want := []string{"ok", "ok", "request-malformed", "request-malformed", "request-malformed", "thing-missing", "internal", "internal"}
	if !slices.Equal(outcomes, want) {
		t.Errorf("outcomes in the audit log: %v, want %v", outcomes, want)
	}
	for _, want := range []string{"hunter2", "oh no", "socket_test.go", "user=root"} {
		if !strings.Contains(log.String(), want) {
			t.Errorf("the log has no %q", want)
		}
	}
}

func TestEveryKindHasAStatusOnTheSocket(t *testing.T) {
	t.Parallel()
	for _, k := range hub.Kinds() {
		if code := statusOf(k); code < 400 || (code == http.StatusInternalServerError) != (k == hub.Internal) {
			t.Errorf("%v is %d", k, code)
		}
	}
}

func TestErrorsKeepTheirKindOverTheSocket(t *testing.T) {
	t.Parallel()
	for _, k := range hub.Kinds() {
		w := httptest.NewRecorder()
		refuse(w, &hub.Error{Kind: k, Code: "some-code", Text: "some sentence"})
		if !strings.Contains(w.Body.String(), `"code":"some-code","message":"some sentence"`) {
			t.Errorf("%v is %s", k, w.Body)
		}
	}
}
