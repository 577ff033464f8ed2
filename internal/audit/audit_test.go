package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// open starts a log on a store; keep 0 is the default.
func open(t *testing.T, docs store.Documents, keep int) (l *Log, stop func()) {
	t.Helper()
	l, err := Open(t.Context(), docs, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	if err != nil {
		t.Fatal(err)
	}
	if keep != 0 {
		l.keep = keep
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- l.Run(ctx, func() { close(ready) }) }()
	<-ready
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return l, stop
}

func pebble(t *testing.T, fs vfs.FS) *pebblestore.Store {
	t.Helper()
	s, err := pebblestore.Open("data", pebblestore.Options{FS: fs, MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func calls(t *testing.T, l *Log, before uint64, limit int) string {
	t.Helper()
	es, err := l.List(t.Context(), before, limit)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range es {
		out = append(out, fmt.Sprint(e.Number, e.Call))
	}
	return strings.Join(out, " ")
}

func record(t *testing.T, l *Log, call string) {
	t.Helper()
	if err := l.Record(t.Context(), hub.AuditEntry{Call: call, User: "u", Outcome: "ok"}); err != nil {
		t.Fatal(err)
	}
}

func same(t *testing.T, what, got, want string) {
	t.Helper()
	if got != want {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

func TestEntriesSurviveARestart(t *testing.T) {
	t.Parallel()
	fs := vfs.NewMem()
	s := pebble(t, fs)
	l, stop := open(t, s, 0)
	for _, call := range []string{"a", "b", "c"} {
		record(t, l, call)
	}
	same(t, "newest first", calls(t, l, 0, 10), "3c 2b 1a")
	same(t, "limit", calls(t, l, 0, 2), "3c 2b")
	same(t, "from there on", calls(t, l, 2, 10), "1a")
	same(t, "the end", calls(t, l, 1, 10), "")
	stop()
	if err := l.Record(t.Context(), hub.AuditEntry{Call: "late"}); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("after the end: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = pebble(t, fs)
	defer func() { _ = s.Close() }()
	l, stop = open(t, s, 0)
	defer stop()
	record(t, l, "d")
	same(t, "after a restart", calls(t, l, 0, 10), "4d 3c 2b 1a")
	es, err := l.List(t.Context(), 0, 1)
	if err != nil || time.Since(es[0].Time) > time.Hour || es[0].Time.Location() != time.UTC {
		t.Errorf("%+v, %v", es, err)
	}
}

func TestOldEntriesGoPageByPage(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer func() { _ = s.Close() }()
	l, stop := open(t, s, 100)
	defer stop()
	for i := range 1000 {
		record(t, l, fmt.Sprint(i))
	}
	es, err := l.List(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if len(es) < 100 || len(es) >= 100+perPage {
		t.Errorf("%d entries are left of 1000, 100 are to be kept", len(es))
	}
	for i, e := range es {
		if e.Number != uint64(1000-i) || e.Call != fmt.Sprint(999-i) {
			t.Fatalf("entry %d is %+v", i, e)
		}
	}
	n := 0
	for _, err := range s.Range(t.Context(), collection, "", "") {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	if n > 100/perPage+2 {
		t.Errorf("%d documents", n)
	}
}

// Callers that wait together share a write, and each entry is there once.
func TestManyCallersAtOnce(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer func() { _ = s.Close() }()
	l, stop := open(t, s, 0)
	defer stop()
	var wait sync.WaitGroup
	for i := range 500 {
		wait.Go(func() {
			if err := l.Record(context.Background(), hub.AuditEntry{Call: fmt.Sprint(i)}); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	es, err := l.List(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for i, e := range es {
		if e.Number != uint64(500-i) || seen[e.Call] {
			t.Fatalf("entry %d is %+v", i, e)
		}
		seen[e.Call] = true
	}
	if len(seen) != 500 {
		t.Errorf("%d entries", len(seen))
	}
}

// Two processes on the same documents find out by the conflict and give no number twice.
func TestTwoWritersGiveNoNumberTwice(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer func() { _ = s.Close() }()
	a, stopA := open(t, s, 0)
	defer stopA()
	b, stopB := open(t, s, 0)
	defer stopB()
	for i := range 40 {
		record(t, a, fmt.Sprint("a", i))
		record(t, b, fmt.Sprint("b", i))
	}
	fresh, stop := open(t, s, 0)
	defer stop()
	es, err := fresh.List(t.Context(), 0, 1000)
	if err != nil || len(es) != 80 {
		t.Fatalf("%d entries, %v", len(es), err)
	}
	for i, e := range es {
		if e.Number != uint64(80-i) {
			t.Fatalf("entry %d is %+v", i, e)
		}
	}
}

func TestTextsAreBounded(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer func() { _ = s.Close() }()
	l, stop := open(t, s, 0)
	defer stop()
	long := strings.Repeat("ü", 400)
	if err := l.Record(t.Context(), hub.AuditEntry{Call: "x", Target: long, User: "a\xff", Remote: strings.Repeat("x", 511) + "ü"}); err != nil {
		t.Fatal(err)
	}
	es, err := l.List(t.Context(), 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	same(t, "target", es[0].Target, long[:maxText])
	same(t, "user", es[0].User, "a\uFFFD")
	if len(es[0].Remote) > maxText+2 || strings.Contains(es[0].Remote, "\xc3") && !strings.Contains(es[0].Remote, "ü") {
		t.Errorf("remote %q", es[0].Remote)
	}
}

// failing refuses writes.
type failing struct {
	store.Documents
	fail bool
}

func (f *failing) Put(ctx context.Context, c string, d store.Doc) (uint64, error) {
	if f.fail {
		return 0, hub.NewError(hub.Unavailable, "disk-full", "full")
	}
	return f.Documents.Put(ctx, c, d)
}

func TestWhatCannotBeWrittenIsAnError(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer func() { _ = s.Close() }()
	f := &failing{Documents: s}
	l, stop := open(t, f, 0)
	defer stop()
	record(t, l, "a")
	f.fail = true // nobody writes now: Record has answered
	if err := l.Record(t.Context(), hub.AuditEntry{Call: "lost"}); !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("got %v", err)
	}
	f.fail = false
	record(t, l, "b")
	same(t, "no number is lost", calls(t, l, 0, 10), "2b 1a")
}

func TestDamagedPagesAreNoticed(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer func() { _ = s.Close() }()
	if _, err := s.Put(t.Context(), collection, store.Doc{Key: "x", Value: []byte("{")}); err != nil {
		t.Fatal(err)
	}
	_, err := Open(t.Context(), s, slog.New(slog.DiscardHandler), prometheus.NewRegistry())
	var e *hub.Error
	if !errors.As(err, &e) || e.Kind != hub.Internal {
		t.Errorf("got %v", err)
	}
}

// What a caller did who has gone meanwhile is recorded too.
func TestCallerThatHasGone(t *testing.T) {
	t.Parallel()
	s := pebble(t, vfs.NewMem())
	defer s.Close()
	l, stop := open(t, s, 0)
	defer stop()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Record(ctx, hub.AuditEntry{Call: "done"}); err != nil {
		t.Fatal(err)
	}
	if es, err := l.List(t.Context(), 0, 10); err != nil || len(es) != 1 || es[0].Call != "done" {
		t.Errorf("recorded: %+v, %v", es, err)
	}
}
