package resourcedirectory

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	"github.com/coaphub/coaphub/test/dose"
)

func TestMain(m *testing.M) {
	// -rapid.checks=N on the command line comes later and wins.
	if err := flag.Set("rapid.checks", dose.Of("4", "12", "500")); err != nil {
		panic(err)
	}
	goleak.VerifyTestMain(m)
}

const (
	lamp  hub.DeviceID = "d0000000-0000-4000-8000-000000000001"
	stove hub.DeviceID = "d0000000-0000-4000-8000-000000000002"
	alice hub.Owner    = "alice"
	bob   hub.Owner    = "bob"
)

// tb is what tests, benchmarks and rapid have in common.
type tb interface {
	Helper()
	Cleanup(func())
	Context() context.Context
	Error(args ...any)
	Errorf(format string, args ...any)
	Fatal(args ...any)
	Fatalf(format string, args ...any)
}

// house is a directory over a store, both of which can be restarted.
type house struct {
	t    tb
	fs   vfs.FS
	cfg  Config
	base *pebblestore.Store
	st   store.Store // what the directory sees: base, or a fake around it
	wrap func(store.Store) store.Store
	d    *Directory
	stop func()
	log  *logBuffer
}

func open(t tb, change ...func(*house)) *house {
	h := &house{t: t, fs: vfs.NewMem(), cfg: Default(), log: &logBuffer{}}
	for _, f := range change {
		f(h)
	}
	h.start()
	t.Cleanup(func() { h.close() })
	return h
}

func (h *house) start() {
	h.t.Helper()
	s, err := pebblestore.Open("data", pebblestore.Options{FS: h.fs, MinFree: -1})
	if err != nil {
		h.t.Fatal(err)
	}
	h.base, h.st = s, s
	if h.wrap != nil {
		h.st = h.wrap(s)
	}
	h.d, h.stop = run(h.t, h.cfg, h.st, h.log)
}

func run(t tb, cfg Config, st store.Store, log *logBuffer) (d *Directory, stop func()) {
	t.Helper()
	d, err := New(cfg, st, slog.New(slog.NewTextHandler(log, nil)), prometheus.NewRegistry(), "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ready, done := make(chan struct{}), make(chan error, 1)
	go func() { done <- d.Run(ctx, func() { close(ready) }) }()
	<-ready
	return d, sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (h *house) close() {
	if h.stop == nil {
		return
	}
	h.stop()
	h.verify()
	if err := h.base.Close(); err != nil {
		h.t.Errorf("close the store: %v", err)
	}
	h.stop = nil
}

func (h *house) restart() {
	h.t.Helper()
	h.close()
	h.start()
}

// verify checks the invariants of everything that is stored.
func (h *house) verify() {
	h.t.Helper()
	st := store.Store(h.base)
	if l, ok := h.st.(*late); ok { // has documents of its own
		st = l
	}
	_, err := Verify(context.Background(), st, func(dev hub.DeviceID, problem string) {
		h.t.Errorf("device %s: %s", dev, problem)
	})
	if err != nil {
		h.t.Errorf("verify: %v", err)
	}
}

func (h *house) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

func own(dev hub.DeviceID, owner hub.Owner, gen uint64) hub.Ownership {
	return hub.Ownership{Device: dev, Owner: owner, Generation: gen}
}

// device is a session of a simulated gateway.
type device struct {
	h    *house
	sess hub.Session
	msg  uint64
	end  *end
}

// end is a Deliverer that remembers why it was closed, and what it was given.
type end struct {
	reason chan string
	got    chan hub.Command
	woken  chan struct{}
	busy   atomic.Bool
	window atomic.Int32 // how many commands the device takes at once; 0 = 1
}

func newEnd() *end {
	return &end{reason: make(chan string, 4), got: make(chan hub.Command, 256), woken: make(chan struct{}, 1)}
}

func (e *end) Close(reason string)   { e.reason <- reason }
func (e *end) Deliver(c hub.Command) { e.got <- c }

func (e *end) Ready(_ hub.Href, bound []string) bool {
	return !e.busy.Load() && len(bound) < max(1, int(e.window.Load()))
}

func (e *end) Wake() {
	select {
	case e.woken <- struct{}{}:
	default:
	}
}

func (e *end) why(t tb) string {
	t.Helper()
	select {
	case r := <-e.reason:
		return r
	case <-time.After(5 * time.Second):
		t.Fatal("the session was not closed")
		return ""
	}
}

func conn(id string) hub.Connection {
	return hub.Connection{
		ID: id, ConnectedAt: 1000, Protocol: hub.ProtocolCoAPSTCP, Service: "gateway-1",
	}
}

// registered registers the device of alice with generation 1 and signs it in.
func (h *house) registered(dev hub.DeviceID) *device {
	h.t.Helper()
	h.must(h.d.Register(h.t.Context(), own(dev, alice, 1), "user-1"))
	return h.signIn(dev, alice, 1, "conn-1")
}

func (h *house) signIn(dev hub.DeviceID, owner hub.Owner, gen uint64, id string) *device {
	h.t.Helper()
	x := &device{h: h, end: newEnd()}
	var err error
	x.sess, err = h.d.SignIn(h.t.Context(), own(dev, owner, gen), conn(id), "user-1", x.end)
	h.must(err)
	return x
}

func (x *device) stamp() hub.Stamp {
	x.msg++
	return x.same()
}

func (x *device) same() hub.Stamp {
	return hub.Stamp{Device: x.sess.Device, Session: x.sess.Number, Message: x.msg, User: "user-1"}
}

func value(href hub.Href, v any) hub.Change {
	return hub.Change{
		Href: href, Status: hub.StatusOK,
		Content: hub.Content{Type: "application/json", Format: hub.FormatJSON, Data: fmt.Append(nil, v)},
	}
}

func (x *device) notify(changes ...hub.Change) error {
	return x.h.d.Notify(x.h.t.Context(), x.stamp(), changes)
}

func (x *device) publish(links ...hub.Link) ([]hub.Link, error) {
	return x.h.d.Publish(x.h.t.Context(), x.stamp(), links)
}

func link(href hub.Href, types ...string) hub.Link {
	return hub.Link{Href: href, Types: types, Interfaces: []string{"oic.if.baseline"}, Policy: 3}
}

func (h *house) device(owner hub.Owner, dev hub.DeviceID) *hub.Device {
	h.t.Helper()
	d, err := h.d.Device(h.t.Context(), owner, dev)
	h.must(err)
	return d
}

// commits is the device's whole log.
func (h *house) commits(dev hub.DeviceID) []hub.Commit {
	h.t.Helper()
	var out []hub.Commit
	for c, err := range h.base.Commits(context.Background(), dev, 0) {
		h.must(err)
		out = append(out, c)
	}
	return out
}

// events is what the log says happened, one word an event.
func (h *house) events(dev hub.DeviceID) []string {
	h.t.Helper()
	var out []string
	for _, c := range h.commits(dev) {
		for _, ev := range c.Events {
			out = append(out, word(ev))
		}
	}
	return out
}

func word(ev hub.Event) string {
	switch ev.Kind {
	case hub.Registered:
		return "registered"
	case hub.Unregistered:
		return "unregistered"
	case hub.MetadataUpdated:
		on := map[bool]string{true: "online", false: "offline"}[ev.Metadata.Connection.Online]
		return fmt.Sprintf("meta %d %s %s", ev.Version, on, [...]string{"out-of-sync", "disabled", "syncing", "in-sync"}[ev.Metadata.Twin.State])
	case hub.LinksPublished:
		var hrefs []hub.Href
		for _, l := range ev.Links {
			hrefs = append(hrefs, l.Href)
		}
		return fmt.Sprintf("published %d %v", ev.Version, hrefs)
	case hub.LinksUnpublished:
		return fmt.Sprintf("unpublished %d %v", ev.Version, ev.Hrefs)
	case hub.ResourceChanged:
		return fmt.Sprintf("changed %d %s %d %s", ev.Version, ev.Href, ev.Status, ev.Content.Data)
	case hub.CommandPending:
		return fmt.Sprintf("pending %d %d %s", ev.Version, ev.Command.Kind, ev.Href)
	case hub.CommandBound:
		return fmt.Sprintf("bound %s", ev.Href)
	case hub.CommandEnded:
		return fmt.Sprintf("ended %d %d %s %d", ev.Version, ev.Command.End, ev.Href, ev.Status)
	case hub.CommandLate:
		return "late"
	}
	return "?"
}

func (h *house) expect(dev hub.DeviceID, want ...string) {
	h.t.Helper()
	if got := h.events(dev); !slices.Equal(got, want) {
		h.t.Errorf("events of the device:\n got %q\nwant %q", got, want)
	}
}

func wantKind(t tb, err error, kind hub.Kind, code string) {
	t.Helper()
	got, _ := hub.Public(err)
	if !hub.IsKind(err, kind) || code != "" && got != code {
		t.Errorf("error %v (%v, %s), want kind %v with code %q", err, hub.KindOf(err), got, kind, code)
	}
}

func twinOf(t tb, d *hub.Device, href hub.Href) string {
	t.Helper()
	r, ok := d.Resources.Get(href)
	if !ok {
		t.Fatalf("no twin of %s", href)
	}
	return string(r.Content.Data)
}

// eventually polls what a goroutine of the directory will make true.
func (h *house) eventually(what string, ok func() bool) {
	h.t.Helper()
	poll := time.NewTicker(5 * time.Millisecond)
	defer poll.Stop()
	deadline := time.After(20 * time.Second)
	for !ok() {
		select {
		case <-poll.C:
		case <-deadline:
			h.t.Fatalf("it never happened: %s", what)
		}
	}
}

func testID(i int) hub.DeviceID {
	return hub.DeviceID(fmt.Sprintf("d0000000-0000-4000-8000-%012x", i+1))
}
