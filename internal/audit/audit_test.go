package audit

import (
	"context"
	"encoding/json"
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
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// start opens a log on a store, and runs it; keep 0 is the default.
func start(t *testing.T, docs store.Documents, keep int) (l *Log, stop func()) {
	t.Helper()
	if keep == 0 {
		keep = Keep
	}
	l, err := open(t.Context(), docs, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), keep)
	if err != nil {
		t.Fatal(err)
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
	l, stop := start(t, s, 0)
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
	l, stop = start(t, s, 0)
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
	l, stop := start(t, s, 100)
	defer stop()
	for i := range 1000 {
		record(t, l, fmt.Sprint(i))
	}
	es, err := l.List(t.Context(), 0, 1000)
	if err != nil {
		t.Fatal(err)
	}
	if len(es) < 100 || len(es) >= 100+2*perPage {
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
	l, stop := start(t, s, 0)
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
	a, stopA := start(t, s, 0)
	defer stopA()
	b, stopB := start(t, s, 0)
	defer stopB()
	for i := range 40 {
		record(t, a, fmt.Sprint("a", i))
		record(t, b, fmt.Sprint("b", i))
	}
	fresh, stop := start(t, s, 0)
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
	l, stop := start(t, s, 0)
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
	l, stop := start(t, f, 0)
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
	if _, err := s.Put(t.Context(), collection, store.Doc{Key: "000000", Value: []byte("{")}); err != nil {
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
	l, stop := start(t, s, 0)
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

// TestSeveralWriters, each with many callers, give each entry a number of its own, without gaps, and each of them lists all.
func TestSeveralWriters(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	var logs []*Log
	for range 3 {
		l, stop := start(t, docs, 0)
		defer stop()
		logs = append(logs, l)
	}
	var callers sync.WaitGroup
	for i, l := range logs {
		for j := range 20 {
			callers.Go(func() {
				for k := range 20 {
					if err := l.Record(context.Background(), hub.AuditEntry{Call: fmt.Sprint(i, j, k)}); err != nil {
						t.Error(err)
					}
				}
			})
		}
	}
	callers.Wait()
	for _, l := range logs {
		es, err := l.List(t.Context(), 0, 2000)
		if err != nil || len(es) != 1200 {
			t.Fatalf("%d entries, %v", len(es), err)
		}
		seen := map[string]bool{}
		for i, e := range es {
			if e.Number != uint64(1200-i) || seen[e.Call] {
				t.Fatalf("entry %d is %+v", i, e)
			}
			seen[e.Call] = true
		}
	}
	record(t, logs[0], "the last")
	same(t, "what another one wrote", calls(t, logs[1], 0, 1), "1201the last")
}

// TestPausedWriter: whoever believes that nothing happened, while others wrote more than is kept, takes the place of nothing.
func TestPausedWriter(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	paused, stop := start(t, docs, 100)
	defer stop()
	other, stopOther := start(t, docs, 100)
	defer stopOther()
	for _, n := range []int{perPage, 192, 200, 1000} { // it knows of a page that is full, and of one that is not
		record(t, paused, "before")
		for i := range n - 1 {
			record(t, other, fmt.Sprint(i))
		}
	}
	record(t, paused, "after")
	total := perPage + 192 + 200 + 1000 + 1
	for _, l := range []*Log{paused, other} {
		same(t, "the last", calls(t, l, 0, 2), fmt.Sprintf("%dafter %d998", total, total-1))
		es, err := l.List(t.Context(), 0, 1000)
		if err != nil || len(es) < 100 || len(es) >= 100+2*perPage {
			t.Fatalf("%d entries, %v", len(es), err)
		}
		for i, e := range es {
			if e.Number != uint64(total-i) { //nolint:gosec // it is above 0
				t.Fatalf("entry %d is %+v", i, e)
			}
		}
	}
	fresh, stopFresh := start(t, docs, 100)
	defer stopFresh()
	same(t, "after a restart", calls(t, fresh, 0, 1), fmt.Sprintf("%dafter", total))
}

// TestEveryLengthIsFound again by a log that is opened.
func TestEveryLengthIsFound(t *testing.T) {
	t.Parallel()
	docs := storetest.NewMemory()
	l, stop := start(t, docs, 300)
	defer stop()
	for i := range 30 * perPage {
		record(t, l, "x")
		if i%13 > 0 && i%perPage < perPage-1 {
			continue
		}
		fresh, err := open(t.Context(), docs, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), 300)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "the newest", calls(t, fresh, 0, 1), fmt.Sprintf("%dx", i+1))
	}
}

// TestEntriesOfBeforeTheRing are moved, also by a process that begins again after another one died over it.
func TestEntriesOfBeforeTheRing(t *testing.T) {
	t.Parallel()
	for _, dies := range []bool{false, true} {
		docs := storetest.NewMemory()
		for first := 100; first < 1000; first += 30 {
			var entries []hub.AuditEntry
			for n := first; n < first+30; n++ {
				entries = append(entries, hub.AuditEntry{Number: uint64(n), Call: "old"}) //nolint:gosec // it is above 0
			}
			value, err := json.Marshal(entries)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := docs.Put(t.Context(), former, store.Doc{Key: fmt.Sprintf("%016x", first), Value: value}); err != nil {
				t.Fatal(err)
			}
		}
		if dies {
			puts := 0
			docs.Fail = func(op, _, _ string) error {
				if op == "put" {
					puts++
				}
				if puts > 3 {
					return hub.NewError(hub.Unavailable, "disk-full", "full")
				}
				return nil
			}
			if _, err := open(t.Context(), docs, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), Keep); err == nil {
				t.Fatal("it is there, and could not be moved")
			}
			docs.Fail = nil
		}
		l, stop := start(t, docs, 0)
		defer stop()
		record(t, l, "new")
		same(t, "the newest", calls(t, l, 0, 2), "1000new 999old")
		es, err := l.List(t.Context(), 0, 2000)
		if err != nil || len(es) != 901 || es[900].Number != 100 {
			t.Errorf("%d entries, %v", len(es), err)
		}
		if len(docs.Docs[former]) != 0 {
			t.Error("they are in both places")
		}
	}
}
