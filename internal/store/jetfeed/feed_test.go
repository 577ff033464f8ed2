package jetfeed

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus/testutil"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/bus/bustest"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

func TestMain(m *testing.M) {
	const server = "github.com/nats-io/nats-server/v2/server"
	goleak.VerifyTestMain(m,
		// The server's own: it measures itself now and then, and forgets a stream that is made or deleted while it stops.
		goleak.IgnoreAnyFunction(server+"/pse.periodic"), goleak.IgnoreAnyFunction(server+"/ats.Register.func1"),
		goleak.IgnoreAnyFunction(server+".(*fileStore).flushStreamStateLoop"),
	)
}

// node is a NATS server with JetStream, which can be stopped and started again at its port.
type node struct {
	tb   testing.TB
	dir  string
	port int
	off  bool // JetStream
	// Of a cluster.
	name    string
	cluster int
	routes  []*url.URL
	srv     *server.Server
}

func startNode(tb testing.TB) *node {
	tb.Helper()
	n := &node{tb: tb, dir: tb.TempDir(), port: bustest.Port(tb)}
	n.start()
	return n
}

func (n *node) start() {
	n.tb.Helper()
	n.srv = bustest.Server(n.tb, func(o *server.Options) {
		o.Port, o.ServerName = n.port, n.name
		o.JetStream, o.StoreDir, o.JetStreamMaxMemory, o.JetStreamMaxStore = !n.off, n.dir, 64<<20, 64<<30
		if n.cluster != 0 {
			o.Routes, o.Cluster = n.routes, server.ClusterOpts{Name: "test", Host: "127.0.0.1", Port: n.cluster}
		}
	})
}

func (n *node) stop() { n.srv.Shutdown(); n.srv.WaitForShutdown() }

func (n *node) url() string { return fmt.Sprintf("nats://127.0.0.1:%d", n.port) }

// admin is an operator's connection.
func (n *node) admin() jetstream.JetStream {
	n.tb.Helper()
	conn, err := nats.Connect(n.url())
	if err != nil {
		n.tb.Fatal(err)
	}
	n.tb.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	if err != nil {
		n.tb.Fatal(err)
	}
	return js
}

func testConfig() Config {
	cfg := DefaultConfig()
	cfg.Replicas, cfg.MaxBytes = 1, 0
	return cfg
}

const hubID = "00000000-0000-4000-8000-00000000000b"

func options(url string) Options {
	return Options{Bus: bus.Config{URLs: []string{url}}, HubID: hubID, Name: "test"}
}

// openFeed opens a feed that must come up; change changes it before it starts.
func openFeed(tb testing.TB, o Options, change func(*Feed)) *Feed {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), time.Minute)
	defer cancel()
	f, err := prepare(testConfig(), o)
	if err != nil {
		tb.Fatal(err)
	}
	if change != nil {
		change(f)
	}
	if err := f.open(ctx, o); err != nil {
		tb.Fatalf("open: %v", err)
	}
	tb.Cleanup(func() {
		if err := f.Close(); err != nil {
			tb.Errorf("close: %v", err)
		}
	})
	return f
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func await(t *testing.T, what string, is func() bool) {
	t.Helper()
	for end := time.Now().Add(2 * time.Minute); !is(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s in vain", what)
		}
	}
}

func publish(t *testing.T, f *Feed, dev int, first, last uint64) {
	t.Helper()
	for seq := first; seq <= last; seq++ {
		if err := f.Publish(within(t), []hub.Commit{storetest.Commit(storetest.Device(dev), seq)})[0]; err != nil {
			t.Fatalf("publish %d/%d: %v", dev, seq, err)
		}
	}
}

// read reads from a position to the end.
func read(t *testing.T, f *Feed, at hub.Position) (out []store.FeedEntry, end hub.Position) {
	t.Helper()
	for {
		entries, next, lagged, err := f.ReadFeed(within(t), at, 1<<20)
		if err != nil || lagged {
			t.Fatalf("from %v: lagged %v, %v", at, lagged, err)
		}
		if len(entries) == 0 {
			return out, at
		}
		out, at = append(out, entries...), next
	}
}

func head(t *testing.T, f *Feed) hub.Position {
	t.Helper()
	at, err := f.Head(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return at
}

func wantLagged(t *testing.T, f *Feed, at hub.Position) {
	t.Helper()
	if entries, _, lagged, err := f.ReadFeed(within(t), at, 10); err != nil || !lagged || len(entries) != 0 {
		t.Errorf("from %v: %d entries, lagged %v, %v; it should lag", at, len(entries), lagged, err)
	}
}

func wantCode(t *testing.T, what string, err error, kind hub.Kind, code string) {
	t.Helper()
	if got, _ := hub.Public(err); !hub.IsKind(err, kind) || got != code {
		t.Errorf("%s: got %v (%s), want %s", what, err, got, code)
	}
}

func streamInfo(t *testing.T, js jetstream.JetStream) *jetstream.StreamInfo {
	t.Helper()
	s, err := js.Stream(within(t), "coaphub-"+hubID+"-feed")
	if err != nil {
		t.Fatal(err)
	}
	return s.CachedInfo()
}

func TestConformance(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	var mu sync.Mutex
	hubs := 0
	storetest.RunPublished(t, func(t *testing.T) store.PublishedFeed {
		mu.Lock()
		defer mu.Unlock()
		hubs++
		o := options(n.url())
		o.HubID = fmt.Sprintf("00000000-0000-4000-9000-%012d", hubs)
		return openFeed(t, o, nil)
	})
}

// proxy stands between a feed and its server, and can hold back what either says.
type proxy struct {
	to   string
	l    net.Listener
	mu   sync.Mutex // guards what follows
	hold map[string]chan struct{}
	open map[net.Conn]bool
	wg   sync.WaitGroup
}

const up, down = "to the server", "to the feed"

func startProxy(t *testing.T, n *node) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{to: fmt.Sprintf("127.0.0.1:%d", n.port), l: l, hold: map[string]chan struct{}{}, open: map[net.Conn]bool{}}
	p.wg.Go(func() {
		for {
			in, err := l.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", p.to)
			if err != nil {
				in.Close()
				continue
			}
			p.mu.Lock()
			p.open[in], p.open[out] = true, true
			p.mu.Unlock()
			p.wg.Go(func() { p.pump(down, in, out) })
			p.wg.Go(func() { p.pump(up, out, in) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.let(up)
		p.let(down)
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) url() string { return "nats://" + p.l.Addr().String() }

func (p *proxy) pump(way string, to, from net.Conn) {
	defer to.Close()
	defer from.Close()
	buf := make([]byte, 64<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		p.mu.Lock()
		hold := p.hold[way]
		p.mu.Unlock()
		if hold != nil {
			<-hold
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// stop holds back what goes a way, let lets it go on.
func (p *proxy) stop(way string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hold[way] = make(chan struct{})
}

func (p *proxy) let(way string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.hold[way] != nil {
		close(p.hold[way])
		p.hold[way] = nil
	}
}

// cut ends all connections; what is held back in them is lost.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.open {
		c.Close()
	}
	clear(p.open)
}

// An acknowledgement that comes too late, or not at all because the connection ends: the commit is sent again, and the feed has it once.
func TestLostAcknowledgement(t *testing.T) {
	t.Parallel()
	for name, after := range map[string]func(t *testing.T, f *Feed, p *proxy){
		"late": func(t *testing.T, f *Feed, p *proxy) {
			await(t, "it to be sent again", func() bool { return testutil.ToFloat64(f.metrics.repeated) >= 2 })
			p.let(down)
		},
		"never": func(t *testing.T, f *Feed, p *proxy) {
			p.cut()
			p.let(down)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t)
			js := n.admin()
			p := startProxy(t, n)
			f := openFeed(t, options(p.url()), func(f *Feed) {
				if f.times.ack = 100 * time.Millisecond; name == "never" {
					f.times.ack = time.Hour
				}
			})
			p.stop(down)
			got := make(chan error, 1)
			go func() {
				got <- errors.Join(f.Publish(within(t), []hub.Commit{storetest.Commit(storetest.Device(1), 1), storetest.Commit(storetest.Device(1), 2)})...)
			}()
			await(t, "the server to have it", func() bool { return streamInfo(t, js).State.Msgs == 1 })
			after(t, f, p)
			if err := <-got; err != nil {
				t.Fatal(err)
			}
			all, _ := read(t, f, hub.Position{})
			if len(all) != 2 || all[0].Commit.Seq != 1 || all[1].Commit.Seq != 2 || testutil.ToFloat64(f.metrics.duplicates) == 0 {
				t.Errorf("the feed has %d commits, and knew %v for duplicates", len(all), testutil.ToFloat64(f.metrics.duplicates))
			}
			if used := f.flights.room.taken(); used != 0 || len(f.flights.all) != 0 {
				t.Errorf("%d bytes and %d messages are under way for ever", used, len(f.flights.all))
			}
		})
	}
}

// A server that restarts has what it had: places stay good, whoever waited goes on, and what was published meanwhile comes.
func TestServerRestarts(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	f := openFeed(t, options(n.url()), nil)
	publish(t, f, 1, 1, 5)
	id := f.LogID()
	_, at := read(t, f, hub.Position{})
	waited := make(chan error, 1)
	go func() { waited <- f.WaitFeed(within(t), at) }()
	await(t, "the feed to be followed", f.following)
	n.stop()
	await(t, "the connection to be lost", func() bool { return f.Health(t.Context()) != nil })
	published := make(chan error, 1)
	go func() { published <- f.Publish(within(t), []hub.Commit{storetest.Commit(storetest.Device(1), 6)})[0] }()
	n.start()
	for _, c := range []chan error{published, waited} {
		if err := <-c; err != nil {
			t.Fatal(err)
		}
	}
	if rest, _ := read(t, f, at); len(rest) != 1 || rest[0].Commit.Seq != 6 || f.LogID() != id {
		t.Errorf("%d commits came after the restart, the log is %s and was %s", len(rest), f.LogID(), id)
	}
	if again := openFeed(t, options(n.url()), nil); again.LogID() != id || head(t, again) != head(t, f) {
		t.Errorf("another process has log %s and head %v, the first %s and %v", again.LogID(), head(t, again), id, head(t, f))
	}
}

// following reports whether the ring follows the stream.
func (f *Feed) following() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ring.on
}

// keepWaiting has somebody wait at the feed's end all the time.
func keepWaiting(t *testing.T, f *Feed) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	t.Cleanup(func() { cancel(); wg.Wait() })
	wg.Go(func() {
		for ctx.Err() == nil {
			f.mu.Lock()
			at := f.position(f.seen)
			f.mu.Unlock()
			_ = f.WaitFeed(ctx, at)
		}
	})
	await(t, "the feed to be followed", f.following)
}

// A stream that was deleted is made anew, whoever notices: its readers lag, also those who wait and those who have read nothing yet.
func TestStreamDeleted(t *testing.T) {
	t.Parallel()
	for name, notice := range map[string]func(t *testing.T, f *Feed){
		"publishing": func(t *testing.T, f *Feed) { publish(t, f, 1, 6, 6) },
		"reading":    func(t *testing.T, f *Feed) { wantLagged(t, f, hub.Position{}) },
		"head":       func(t *testing.T, f *Feed) { head(t, f) },
		"waiting":    func(*testing.T, *Feed) {},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t)
			js := n.admin()
			f, other := openFeed(t, options(n.url()), nil), openFeed(t, options(n.url()), nil)
			publish(t, f, 1, 1, 5)
			all, end := read(t, f, hub.Position{})
			id := f.LogID()
			waited := make(chan error, 1)
			if name == "waiting" {
				go func() { waited <- f.WaitFeed(within(t), end) }()
				await(t, "the feed to be followed", f.following)
			} else {
				waited <- nil
			}
			if err := js.DeleteStream(within(t), f.name); err != nil {
				t.Fatal(err)
			}
			notice(t, f)
			if err := <-waited; err != nil {
				t.Fatal(err)
			}
			if now := f.LogID(); now == id {
				t.Errorf("the log's ID is still %s", now)
			}
			publish(t, other, 2, 1, 10) // more than the old one had
			for _, at := range []hub.Position{{}, all[0].Position, end} {
				wantLagged(t, f, at)
				wantLagged(t, other, at)
			}
			if f.LogID() != other.LogID() {
				t.Errorf("one process has log %s, the other %s", f.LogID(), other.LogID())
			}
			at := head(t, f)
			if at.Compare(end) <= 0 {
				t.Errorf("the head went back from %v to %v", end, at)
			}
			publish(t, other, 3, 1, 1)
			if rest, _ := read(t, f, at); len(rest) != 1 || rest[0].Commit.Device != storetest.Device(3) {
				t.Errorf("%d commits came after the head", len(rest))
			}
			if third := openFeed(t, options(n.url()), nil); third.LogID() != f.LogID() {
				t.Errorf("a new process has log %s, the others %s", third.LogID(), f.LogID())
			}
		})
	}
}

// An empty stream that was made anew lags for who stood before everything in the old one, and has a head that does not.
func TestEmptyAfterDeletion(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	f := openFeed(t, options(n.url()), nil)
	if at := head(t, f); at != (hub.Position{}) {
		t.Errorf("the head of an empty feed is %v", at)
	}
	if err := n.admin().DeleteStream(within(t), f.name); err != nil {
		t.Fatal(err)
	}
	at := head(t, f)
	wantLagged(t, f, hub.Position{})
	if rest, next := read(t, f, at); len(rest) != 0 || next != at {
		t.Errorf("at the head there are %d commits", len(rest))
	}
	publish(t, f, 1, 1, 1)
	if rest, _ := read(t, f, at); len(rest) != 1 {
		t.Errorf("%d commits came after the head", len(rest))
	}
}

// A stream that comes back from a copy has lost its end, and would give the same numbers again: it gets another identity.
func TestStreamSetBack(t *testing.T) {
	t.Parallel()
	for name, notice := range map[string]func(t *testing.T, f *Feed){
		"publishing": func(t *testing.T, f *Feed) { publish(t, f, 1, 21, 21) },
		"head":       func(t *testing.T, f *Feed) { head(t, f) },
		"reading": func(t *testing.T, f *Feed) {
			f.mu.Lock()
			at := f.position(f.seen)
			f.mu.Unlock()
			wantLagged(t, f, at)
		},
		"waiting": func(t *testing.T, f *Feed) {
			id := f.LogID()
			keepWaiting(t, f)
			await(t, "another identity", func() bool { return f.LogID() != id })
		},
		"others publish more first": func(t *testing.T, f *Feed) {
			o := options(f.conn.Opts.Servers[0])
			young := openFeed(t, o, nil) // it has not seen what is lost
			publish(t, young, 7, 1, 14)
			publish(t, f, 1, 21, 21)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := startNode(t)
			short := func(f *Feed) { f.times.confirm = 2 }
			f, other := openFeed(t, options(n.url()), short), openFeed(t, options(n.url()), short)
			publish(t, f, 1, 1, 5)
			n.stop()
			backup := filepath.Join(t.TempDir(), "backup")
			if err := os.CopyFS(backup, os.DirFS(n.dir)); err != nil {
				t.Fatal(err)
			}
			n.start()
			publish(t, f, 1, 6, 20)
			all, end := read(t, f, hub.Position{})
			if _, end2 := read(t, other, hub.Position{}); end2 != end {
				t.Fatalf("two processes see different ends: %v, %v", end, end2)
			}
			id := f.LogID()
			n.stop()
			n.dir = backup
			n.start()
			if st := streamInfo(t, n.admin()).State; st.LastSeq != all[4].Position.N {
				t.Fatalf("the copy ends at %d", st.LastSeq)
			}
			notice(t, f)
			if f.LogID() == id {
				t.Errorf("the log's ID is still %s", id)
			}
			publish(t, f, 2, 1, 40)
			for _, at := range []hub.Position{{}, all[0].Position, all[4].Position, all[10].Position, end} {
				wantLagged(t, f, at)
				wantLagged(t, other, at)
			}
			if f.LogID() != other.LogID() {
				t.Errorf("one process has log %s, the other %s", f.LogID(), other.LogID())
			}
			at := head(t, f)
			publish(t, other, 3, 1, 1)
			if rest, _ := read(t, f, at); len(rest) != 1 {
				t.Errorf("%d commits came after the head", len(rest))
			}
		})
	}
}

// A stream that was set back, or lost, while no process of the hub lived is noticed by the first one that is told how far it had come.
func TestStreamSetBackWhileNobodyLived(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	short := func(f *Feed) { f.times.confirm = 2 }
	f := openFeed(t, options(n.url()), short)
	publish(t, f, 1, 1, 5)
	n.stop()
	backup := filepath.Join(t.TempDir(), "backup")
	if err := os.CopyFS(backup, os.DirFS(n.dir)); err != nil {
		t.Fatal(err)
	}
	n.start()
	publish(t, f, 1, 6, 20)
	all, _ := read(t, f, hub.Position{})
	known, id := f.Known(), f.LogID()
	for _, c := range [][2]string{{"as it was", n.dir}, {"set back", backup}, {"lost", t.TempDir()}} {
		what, dir := c[0], c[1]
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		n.stop()
		n.dir = dir
		n.start()
		f = openFeed(t, options(n.url()), short)
		if err := f.Remember(within(t), known); err != nil {
			t.Fatal(err)
		}
		if what == "as it was" {
			if rest, _ := read(t, f, all[9].Position); len(rest) != 10 || f.LogID() != id {
				t.Errorf("%s: %d commits behind the tenth, and the log is %s", what, len(rest), f.LogID())
			}
			continue
		}
		if f.LogID() == id {
			t.Errorf("%s: the log's ID is still %s", what, id)
		}
		publish(t, f, 2, 1, 40)
		for _, at := range []hub.Position{all[0].Position, all[4].Position, all[10].Position, known} {
			wantLagged(t, f, at)
		}
	}
}

// What was dropped while it was on its way is no hole that is passed over: in front of it a page ends, behind it a reader lags.
func TestDroppedOnTheWay(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		n, first uint64
		have     []uint64
		want     int
	}{
		{5, 1, []uint64{6, 7}, 2},     // nothing is missing
		{5, 1, []uint64{6, 9, 10}, 3}, // what is missing was removed by hand: the stream still begins before it
		{5, 7, []uint64{6, 9}, 2},     // 6 was dropped after it was read, 7 is still there
		{5, 8, []uint64{6, 9}, 1},
		{5, 7, []uint64{7, 8}, 0},
	} {
		var entries []entry
		for _, n := range c.have {
			entries = append(entries, entry{n: n})
		}
		if got := whole(c.n, c.first, entries); len(got) != c.want {
			t.Errorf("%+v: %d entries", c, len(got))
		}
	}

	n := startNode(t)
	f := openFeed(t, options(n.url()), nil)
	publish(t, f, 1, 1, 10)
	all, end := read(t, f, hub.Position{})
	s, err := n.admin().Stream(within(t), f.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Purge(within(t), jetstream.WithPurgeSequence(end.N)); err != nil {
		t.Fatal(err)
	}
	f.mu.Lock()
	f.clear(all[2].Position.N) // a consumer stood here
	f.mu.Unlock()
	data, err := encode(&all[9].Commit)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.arrived(within(t), f.LogID(), end.N, data); err != nil {
		t.Fatal(err)
	}
	wantLagged(t, f, all[2].Position)
	if rest, _ := read(t, f, all[8].Position); len(rest) != 1 {
		t.Errorf("%d commits behind what was dropped", len(rest))
	}
}

// What the consumer was sent and did not get is read back.
func TestLostOnTheWay(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	js := n.admin()
	f := openFeed(t, options(n.url()), nil)
	keepWaiting(t, f)
	for range 5 {
		at := head(t, f)
		await(t, "the feed to be followed", f.following)
		s, err := js.Stream(within(t), f.name)
		if err != nil {
			t.Fatal(err)
		}
		for name := range s.ConsumerNames(within(t)).Name() {
			cons, err := s.Consumer(within(t), name)
			if err != nil {
				continue // it has just ended
			}
			if _, err := cons.Fetch(2, jetstream.FetchMaxWait(5*time.Second)); err != nil { // a thief
				t.Fatal(err)
			}
		}
		var got []hub.Commit
		for seq := uint64(1); seq <= 10; seq++ {
			c := storetest.Commit(storetest.Device(1), seq)
			binary.BigEndian.PutUint64(c.ID[:], at.N)
			if err := f.Publish(within(t), []hub.Commit{c})[0]; err != nil {
				t.Fatal(err)
			}
		}
		for len(got) < 10 {
			if err := f.WaitFeed(within(t), at); err != nil {
				t.Fatal(err)
			}
			entries, next, lagged, err := f.ReadFeed(within(t), at, 100)
			if err != nil || lagged {
				t.Fatal(lagged, err)
			}
			for _, e := range entries {
				got = append(got, e.Commit)
				if e.Commit.Seq != uint64(len(got)) {
					t.Fatalf("commit %d came as number %d", e.Commit.Seq, len(got))
				}
			}
			at = next
		}
	}
}

// Who stands behind the stream's end has read what it has lost: that is told, not waited for.
func TestBeyondTheEnd(t *testing.T) {
	t.Parallel()
	f := openFeed(t, options(startNode(t).url()), nil)
	publish(t, f, 1, 1, 1)
	at := head(t, f)
	at.N++
	if err := f.WaitFeed(within(t), at); err != nil {
		t.Fatal(err)
	}
	wantLagged(t, f, at)
}

// newCluster makes three servers that know each other.
func newCluster(t *testing.T) []*node {
	t.Helper()
	var routes []*url.URL
	nodes := make([]*node, 3)
	for i := range nodes {
		nodes[i] = &node{tb: t, dir: t.TempDir(), port: bustest.Port(t), name: fmt.Sprintf("n%d", i), cluster: bustest.Port(t)}
		routes = append(routes, &url.URL{Scheme: "nats", Host: fmt.Sprintf("127.0.0.1:%d", nodes[i].cluster)})
	}
	for _, n := range nodes {
		n.routes = routes
	}
	return nodes
}

// inCluster is for three copies of the stream in a cluster.
func inCluster(nodes []*node) (Config, Options) {
	cfg, o := testConfig(), options("")
	cfg.Replicas, o.Bus.URLs = 3, nil
	for _, n := range nodes {
		o.Bus.URLs = append(o.Bus.URLs, n.url())
	}
	return cfg, o
}

// In a cluster servers come and go, the one that leads the stream too: what is published is there, in order, once, and places stay good.
func TestCluster(t *testing.T) {
	t.Parallel()
	nodes := newCluster(t)
	for _, n := range nodes {
		n.start()
	}
	cfg, o := inCluster(nodes)
	f, err := Open(within(t), cfg, o)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// How long elections take is the servers' and the machine's affair: what is tested is what comes of them.
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	id := f.LogID()
	const writers, each, batch = 8, 10, 4
	var stored atomic.Int64
	var all sync.WaitGroup
	for w := range writers {
		all.Go(func() {
			for first := uint64(1); first <= each*batch; first += batch {
				var left []hub.Commit
				for seq := first; seq < first+batch; seq++ {
					left = append(left, storetest.Commit(storetest.Device(w), seq))
				}
				for len(left) > 0 {
					errs := f.Publish(ctx, left)
					k := 0
					for k < len(errs) && errs[k] == nil {
						k++
					}
					if k < len(errs) && (!hub.IsKind(errs[k], hub.Unavailable) || ctx.Err() != nil) {
						t.Errorf("publishing %d/%d: %v", w, left[k].Seq, errs[k])
						return
					}
					left = left[k:]
					stored.Add(int64(k))
				}
			}
		})
	}
	for range 3 {
		all.Go(func() {
			at, last, total := hub.Position{}, map[hub.DeviceID]uint64{}, 0
			for total < writers*each*batch {
				err := f.WaitFeed(ctx, at)
				var entries []store.FeedEntry
				var lagged bool
				next := at
				if err == nil {
					entries, next, lagged, err = f.ReadFeed(ctx, at, 50)
				}
				if lagged || err != nil && (!hub.IsKind(err, hub.Unavailable) || ctx.Err() != nil) {
					t.Errorf("reading behind %d of %d: lagged %v, %v", total, writers*each*batch, lagged, err)
					return
				}
				for _, e := range entries {
					if e.Commit.Seq != last[e.Commit.Device]+1 {
						t.Errorf("%s/%d after %d", e.Commit.Device, e.Commit.Seq, last[e.Commit.Device])
						return
					}
					last[e.Commit.Device]++
				}
				total, at = total+len(entries), next
			}
		})
	}
	for i := range 2 {
		await(t, "a third of it to be stored", func() bool { return stored.Load() >= int64(i+1)*writers*each*batch/3 })
		var leader string
		await(t, "a leader", func() bool {
			s, err := f.js.Stream(within(t), f.name)
			if err == nil {
				leader = s.CachedInfo().Cluster.Leader
			}
			return leader != ""
		})
		for _, n := range nodes {
			if n.name == leader {
				n.stop()
				n.start()
			}
		}
	}
	all.Wait()
	if t.Failed() {
		return
	}
	if f.LogID() != id {
		t.Errorf("the log's ID is %s, and was %s", f.LogID(), id)
	}
	if all, _ := read(t, f, hub.Position{}); len(all) != writers*each*batch {
		t.Errorf("%d of %d commits", len(all), writers*each*batch)
	}
	t.Logf("sent again: %v, duplicates: %v, connections lost: %v", testutil.ToFloat64(f.metrics.repeated), testutil.ToFloat64(f.metrics.duplicates), testutil.ToFloat64(f.metrics.disconnects))
}

// Trimming drops what the servers took before an edge, and only that.
func TestTrim(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	f := openFeed(t, options(n.url()), nil)
	publish(t, f, 1, 1, 20)
	all, end := read(t, f, hub.Position{})
	waited := make(chan error, 1)
	go func() { waited <- f.WaitFeed(within(t), end) }()
	await(t, "the feed to be followed", f.following)
	s, err := n.admin().Stream(within(t), f.name)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.DeleteMsg(within(t), all[9].Position.N); err != nil {
		t.Fatal(err)
	}
	edge, err := s.GetMsg(within(t), all[12].Position.N)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.trim(within(t), edge.Time); err != nil {
		t.Fatal(err)
	}
	for i := range all {
		switch {
		case i < 11:
			wantLagged(t, f, all[i].Position)
		default:
			if rest, _ := read(t, f, all[i].Position); len(rest) != 19-i {
				t.Errorf("after commit %d there are %d", i+1, len(rest))
			}
		}
	}
	if err := f.TrimFeed(within(t), end.Day+2); err != nil {
		t.Fatal(err)
	}
	if at := head(t, f); at != end {
		t.Errorf("the head is %v, it was %v", at, end)
	}
	publish(t, f, 1, 21, 21)
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	if rest, _ := read(t, f, end); len(rest) != 1 || rest[0].Position.N != end.N+1 {
		t.Errorf("after the trimmed end there is %v", rest)
	}
}

// What is gone in the middle, by the hand of an operator, is passed over; a message that is no commit lets its readers lag, never pass.
func TestHolesAndStrangers(t *testing.T) {
	t.Parallel()
	for _, live := range []bool{false, true} {
		t.Run(fmt.Sprintf("live=%v", live), func(t *testing.T) {
			t.Parallel()
			n := startNode(t)
			js := n.admin()
			f := openFeed(t, options(n.url()), nil)
			publish(t, f, 1, 1, 4)
			all, _ := read(t, f, hub.Position{})
			if live {
				keepWaiting(t, f)
			}
			publish(t, f, 1, 5, 6)
			s, err := js.Stream(within(t), f.name)
			if err != nil {
				t.Fatal(err)
			}
			if err := s.DeleteMsg(within(t), all[1].Position.N); err != nil {
				t.Fatal(err)
			}
			for _, bad := range []string{"\x02of a newer version", "\x01\x05", ""} {
				if _, err := js.Publish(within(t), f.subject("alice"), []byte(bad)); err != nil {
					t.Fatal(err)
				}
			}
			publish(t, f, 1, 7, 8)
			entries, next, lagged, err := f.ReadFeed(within(t), all[0].Position, 1<<20)
			for err == nil && !lagged && len(entries) > 0 && next.N < all[0].Position.N+5 {
				var more []store.FeedEntry
				more, next, lagged, err = f.ReadFeed(within(t), next, 1<<20)
				entries = append(entries, more...)
			}
			if err != nil || lagged || len(entries) != 4 || entries[3].Commit.Seq != 6 {
				t.Errorf("%d commits up to %v, lagged %v, %v", len(entries), next, lagged, err)
			}
			wantLagged(t, f, next)
			behind := next
			behind.N += 3
			if rest, _ := read(t, f, behind); len(rest) != 2 || rest[0].Commit.Seq != 7 {
				t.Errorf("%d commits behind what cannot be read", len(rest))
			}
			if testutil.ToFloat64(f.metrics.unreadable) == 0 {
				t.Error("nobody counted what cannot be read")
			}
		})
	}
}

// Many wait and one consumer serves them; when nobody waits any more it goes.
func TestWaitersShareAConsumer(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	js := n.admin()
	f := openFeed(t, options(n.url()), func(f *Feed) { f.times.idle = 50 * time.Millisecond })
	for round := range uint64(3) {
		at := head(t, f)
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				if err := f.WaitFeed(within(t), at); err != nil {
					t.Error(err)
					return
				}
				entries, _, lagged, err := f.ReadFeed(within(t), at, 10)
				if err != nil || lagged || len(entries) != 1 || entries[0].Commit.Seq != round+1 {
					t.Errorf("%d entries, lagged %v, %v", len(entries), lagged, err)
				}
			})
		}
		await(t, "all to wait, and the feed to be followed", func() bool {
			f.mu.Lock()
			defer f.mu.Unlock()
			return f.ring.waiting == 100 && f.ring.on
		})
		await(t, "one consumer to serve them", func() bool { return streamInfo(t, js).State.Consumers == 1 })
		publish(t, f, 1, round+1, round+1)
		all.Wait()
		await(t, "the consumer to go", func() bool { return streamInfo(t, js).State.Consumers == 0 && !f.following() })
	}
	if n := testutil.ToFloat64(f.metrics.caughtUp); n > 100 { // a slow server may have cost one round the consumer
		t.Errorf("%v commits were read back, though all readers were at the end", n)
	}
}

// Waits end: with their context, whose error they return, and with the feed.
func TestWaitFeedEnds(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	f := openFeed(t, options(n.url()), nil)
	publish(t, f, 1, 1, 1)
	at := head(t, f)
	ctx, cancel := context.WithCancel(t.Context())
	got := make(chan error, 2)
	go func() { got <- f.WaitFeed(ctx, at) }()
	await(t, "the feed to be followed", f.following)
	n.stop()
	await(t, "the connection to be lost", func() bool { return !f.following() && f.Health(t.Context()) != nil })
	cancel()
	if err := <-got; !errors.Is(err, context.Canceled) {
		t.Errorf("after the context's end: %v", err)
	}
	go func() { got <- f.WaitFeed(within(t), at) }()
	await(t, "it to wait", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.ring.waiting == 1 })
	published := make(chan error, 1)
	go func() { published <- f.Publish(within(t), []hub.Commit{storetest.Commit(storetest.Device(1), 2)})[0] }()
	if err := f.Close(); err != nil {
		t.Error(err)
	}
	wantCode(t, "a wait when the feed closes", <-got, hub.Unavailable, "store-closed")
	wantCode(t, "a publication when the feed closes", <-published, hub.Unavailable, "store-closed")
	_, err := f.Head(t.Context())
	wantCode(t, "a call of a closed feed", err, hub.Unavailable, "store-closed")
}

// While the servers are away, say nothing or take nothing, calls end with their contexts, and say why. When they are back all goes on.
func TestTrouble(t *testing.T) {
	t.Parallel()
	big := storetest.Commit(storetest.Device(9), 1)
	big.Events[0].Content.Data = make([]byte, 400<<10)
	check := func(t *testing.T, f *Feed, code string) {
		var commits []hub.Commit
		for i := range 60 {
			c := big
			c.Device, c.ID[0] = storetest.Device(100+i), byte(i)
			commits = append(commits, c)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 500*time.Millisecond)
		defer cancel()
		var all sync.WaitGroup
		all.Go(func() {
			for _, err := range f.Publish(ctx, commits) {
				wantCode(t, "publish", err, hub.Unavailable, code)
			}
		})
		all.Go(func() {
			_, err := f.Head(ctx)
			wantCode(t, "head", err, hub.Unavailable, code)
		})
		all.Go(func() {
			_, _, _, err := f.ReadFeed(ctx, hub.Position{}, 1)
			wantCode(t, "read", err, hub.Unavailable, code)
		})
		all.Go(func() { wantCode(t, "trim", f.TrimFeed(ctx, 1), hub.Unavailable, code) })
		all.Wait()
		if used := f.flights.room.taken(); used != 0 {
			t.Errorf("%d bytes are under way, and nobody waits for them", used)
		}
	}
	n := startNode(t)
	p := startProxy(t, n)
	f := openFeed(t, options(p.url()), func(f *Feed) { f.times.ack = 100 * time.Millisecond })
	publish(t, f, 1, 1, 1)
	for way, code := range map[string]string{down: "feed-silent", up: "feed-silent"} {
		t.Run(way, func(t *testing.T) {
			p.stop(way)
			check(t, f, code)
			p.let(way)
			p.cut()
			await(t, "the feed to be back", func() bool { _, err := f.Head(within(t)); return err == nil })
		})
	}
	t.Run("away", func(t *testing.T) {
		n.stop()
		await(t, "the connection to be lost", func() bool { return f.Health(t.Context()) != nil })
		check(t, f, "feed-away")
		n.start()
		publish(t, f, 1, 2, 2)
	})
}

// A connection that takes nothing holds up whoever writes to it, but no call beyond its context.
func TestCallsEndWhileTheConnectionIsStuck(t *testing.T) {
	t.Parallel()
	f := openFeed(t, options(startNode(t).url()), func(f *Feed) { f.out = nil }) // the sender is stuck
	stuck := make(chan struct{})
	defer close(stuck)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	for _, err := range f.Publish(ctx, []hub.Commit{storetest.Commit(storetest.Device(1), 1), storetest.Commit(storetest.Device(1), 2)}) {
		wantCode(t, "publish", err, hub.Unavailable, "feed-silent")
	}
	_, err := again(ctx, f, "test", func(context.Context) (struct{}, error) { <-stuck; return struct{}{}, nil })
	wantCode(t, "another call", err, hub.Unavailable, "feed-silent")
	if used := f.flights.room.taken(); used != 0 {
		t.Errorf("%d bytes are under way", used)
	}
}

// The ring keeps the newest, within its bounds, and gives only what has no hole in front of it.
func TestRing(t *testing.T) {
	t.Parallel()
	for _, size := range []int{1, 100, 10_000} {
		r := ring{most: 100_000, base: 7, end: 7}
		for n := uint64(8); n < 30_000; n++ {
			if n%10 == 0 {
				continue // removed by hand
			}
			r.add(entry{n: n, size: size})
			if most := min(ringCommits, r.most/size); len(r.entries) > most+most/4+1 || r.bytes != size*len(r.entries) || n > 20_000 && len(r.entries) < most-1 {
				t.Fatalf("%d entries of %d bytes, counted as %d", len(r.entries), size, r.bytes)
			}
			first := r.entries[0].n
			if got := r.behind(r.base, 3); len(got) == 0 || got[0].n != first || len(got) > 3 {
				t.Fatalf("behind the base %d: %v, the first is %d", r.base, got, first)
			}
			if got := r.behind(n-1, 3); len(got) != 1 || got[0].n != n {
				t.Fatalf("behind %d: %v", n-1, got)
			}
			if len(r.behind(r.base-1, 3)) != 0 || len(r.behind(n, 3)) != 0 {
				t.Fatal("it gives what it does not have")
			}
		}
	}
}

// What is under way is bounded, however much is to be published by however many; and so is what is kept for readers.
func TestBounds(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	js := n.admin()
	f := openFeed(t, options(n.url()), func(f *Feed) { f.times.patience, f.times.ack = time.Minute, time.Hour })
	at := head(t, f)
	keepWaiting(t, f)
	f.flights.inbox = f.conn.NewInbox() + "."
	hold := make(chan struct{})
	if _, err := f.conn.Subscribe(f.flights.inbox+"*", func(m *nats.Msg) { <-hold; f.acknowledged(m) }); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for w := range 8 {
		all.Go(func() {
			var commits []hub.Commit
			for i := range 20 {
				c := storetest.Commit(storetest.Device(100*w+i), 1)
				c.Events[0].Content.Data = make([]byte, 200<<10)
				commits = append(commits, c)
			}
			if err := errors.Join(f.Publish(within(t), commits)...); err != nil {
				t.Error(err)
			}
		})
	}
	await(t, "all room to be taken", func() bool { return f.flights.room.taken() > maxFlight-(256<<10) })
	await(t, "the server to have all that was sent", func() bool { return streamInfo(t, js).State.Bytes > maxFlight-(1<<20) })
	if used := f.flights.room.taken(); used > maxFlight {
		t.Errorf("%d bytes are under way", used)
	}
	close(hold)
	all.Wait()
	await(t, "all to arrive", func() bool { f.mu.Lock(); defer f.mu.Unlock(); return f.ring.end == f.seen })
	f.mu.Lock()
	if f.ring.bytes > ringBytes+ringBytes/4 || len(f.ring.entries) > 32 {
		t.Errorf("%d commits, %d bytes are kept", len(f.ring.entries), f.ring.bytes)
	}
	f.mu.Unlock()
	if rest, _ := read(t, f, at); len(rest) != 160 {
		t.Errorf("a slow reader got %d commits", len(rest))
	}
}

// A reader that is slower than the feed gets every commit, in order, from the ring or from the stream.
func TestSlowReader(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	f := openFeed(t, options(n.url()), func(f *Feed) { f.ring.most = 8 << 10 })
	const devices, each = 20, 100
	var writers sync.WaitGroup
	writers.Go(func() {
		for seq := uint64(1); seq <= each; seq++ {
			var commits []hub.Commit
			for d := range devices {
				commits = append(commits, storetest.Commit(storetest.Device(d), seq))
			}
			if err := errors.Join(f.Publish(within(t), commits)...); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for limit := range 3 {
		writers.Go(func() {
			at, last, total := hub.Position{}, map[hub.DeviceID]uint64{}, 0
			for total < devices*each {
				if err := f.WaitFeed(within(t), at); err != nil {
					t.Error(err)
					return
				}
				entries, next, lagged, err := f.ReadFeed(within(t), at, 1+limit*30)
				if err != nil || lagged || len(entries) == 0 {
					t.Errorf("%d entries, lagged %v, %v", len(entries), lagged, err)
					return
				}
				for _, e := range entries {
					if e.Commit.Seq != last[e.Commit.Device]+1 {
						t.Errorf("%s/%d after %d", e.Commit.Device, e.Commit.Seq, last[e.Commit.Device])
						return
					}
					last[e.Commit.Device]++
				}
				total, at = total+len(entries), next
			}
		})
	}
	writers.Wait()
	f.mu.Lock()
	kept := len(f.ring.entries)
	f.mu.Unlock()
	before := testutil.ToFloat64(f.metrics.caughtUp)
	if all, _ := read(t, f, hub.Position{}); len(all) != devices*each || testutil.ToFloat64(f.metrics.caughtUp)-before < float64(devices*each-kept) || kept > 100 {
		t.Errorf("who comes late got %d commits, of which %v were read back; %d are kept", len(all), testutil.ToFloat64(f.metrics.caughtUp)-before, kept)
	}
}

// Connections break all the time, and still each device's commits come in order, none twice, none lost.
func TestOrderInTrouble(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	p := startProxy(t, n)
	f := openFeed(t, options(p.url()), func(f *Feed) { f.times.ack = 200 * time.Millisecond })
	const writers, each, batch = 8, 10, 4
	var stored atomic.Int64
	var all, cutter sync.WaitGroup
	cutter.Go(func() {
		for n := int64(1); n < 8; n++ {
			await(t, "an eighth of it to be stored", func() bool { return stored.Load() >= n*writers*each*batch/8 })
			p.cut()
		}
	})
	for w := range writers {
		all.Go(func() {
			for first := uint64(1); first <= each*batch; first += batch {
				var commits []hub.Commit
				for seq := first; seq < first+batch; seq++ {
					commits = append(commits, storetest.Commit(storetest.Device(w), seq))
				}
				for left := commits; len(left) > 0; { // as a store does: what failed comes again before anything newer
					errs := f.Publish(within(t), left)
					k := 0
					for k < len(errs) && errs[k] == nil {
						k++
					}
					left = left[k:]
					stored.Add(int64(k))
				}
			}
		})
	}
	all.Wait()
	cutter.Wait()
	last := map[hub.DeviceID]uint64{}
	entries, _ := read(t, f, hub.Position{})
	for _, e := range entries {
		if e.Commit.Seq != last[e.Commit.Device]+1 {
			t.Fatalf("%s/%d after %d", e.Commit.Device, e.Commit.Seq, last[e.Commit.Device])
		}
		last[e.Commit.Device]++
	}
	if len(entries) != writers*each*batch {
		t.Errorf("%d of %d commits", len(entries), writers*each*batch)
	}
	t.Logf("sent again: %v, duplicates: %v, connections lost: %v", testutil.ToFloat64(f.metrics.repeated), testutil.ToFloat64(f.metrics.duplicates), testutil.ToFloat64(f.metrics.disconnects))
}

// A commit that breaks a limit is refused, and with it the later ones of its device, but not those of others.
func TestRefusedCommits(t *testing.T) {
	t.Parallel()
	f := openFeed(t, options(startNode(t).url()), nil)
	big := storetest.Commit(storetest.Device(1), 2)
	big.Events[0].Content.Data = make([]byte, hub.MaxCommitBytes)
	errs := f.Publish(within(t), []hub.Commit{
		storetest.Commit(storetest.Device(1), 1), big, storetest.Commit(storetest.Device(1), 3), storetest.Commit(storetest.Device(2), 1), {Device: storetest.Device(3)},
	})
	for i, want := range []hub.Kind{hub.Internal, hub.TooLarge, hub.TooLarge, hub.Internal, hub.Invalid} {
		if (errs[i] != nil) != (want != hub.Internal) || hub.KindOf(errs[i]) != want {
			t.Errorf("commit %d: %v", i, errs[i])
		}
	}
	if all, _ := read(t, f, hub.Position{}); len(all) != 2 {
		t.Errorf("%d commits", len(all))
	}
}

// Processes that start together make one stream; one that starts with another configuration brings it to that.
func TestManyMakeOneStream(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	feeds := make([]*Feed, 6)
	var all sync.WaitGroup
	for i := range feeds {
		all.Go(func() {
			f, err := Open(within(t), testConfig(), options(n.url()))
			if err != nil {
				t.Error(err)
				return
			}
			feeds[i] = f
			t.Cleanup(func() { _ = f.Close() })
		})
	}
	all.Wait()
	if t.Failed() {
		return
	}
	for _, f := range feeds {
		if f.LogID() == "" || f.LogID() != feeds[0].LogID() {
			t.Errorf("one process has log %q, another %q", f.LogID(), feeds[0].LogID())
		}
	}
	publish(t, feeds[0], 1, 1, 3)
	cfg := testConfig()
	cfg.MaxAge, cfg.MaxBytes, cfg.DuplicateWindow = time.Hour, 32<<20, time.Minute
	f, err := Open(within(t), cfg, options(n.url()))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if c := streamInfo(t, n.admin()).Config; c.MaxAge != time.Hour || c.MaxBytes != 32<<20 || c.Duplicates != time.Minute || f.LogID() != feeds[0].LogID() {
		t.Errorf("the stream is kept for %s, %d bytes, its duplicates for %s", c.MaxAge, c.MaxBytes, c.Duplicates)
	}
	if all, _ := read(t, f, hub.Position{}); len(all) != 3 {
		t.Errorf("%d commits are left", len(all))
	}
}

// What the operator has to change is said, and nothing of somebody else's is touched.
func TestOpenSaysWhatToDo(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	js := n.admin()
	open := func(cfg Config, o Options) error {
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		f, err := Open(ctx, cfg, o)
		if err == nil {
			f.Close()
		}
		return err
	}
	for name, c := range map[string]jetstream.StreamConfig{
		"another's":  {Subjects: []string{"coaphub." + hubID + ".feed.*"}},
		"subjects":   {Subjects: []string{"x.*"}, Metadata: map[string]string{metaID: "x", metaStart: "7"}},
		"work queue": {Subjects: []string{"coaphub." + hubID + ".feed.*"}, Metadata: map[string]string{metaID: "x", metaStart: "7"}, Retention: jetstream.WorkQueuePolicy},
		"memory":     {Subjects: []string{"coaphub." + hubID + ".feed.*"}, Metadata: map[string]string{metaID: "x", metaStart: "7"}, Storage: jetstream.MemoryStorage},
		"refuses":    {Subjects: []string{"coaphub." + hubID + ".feed.*"}, Metadata: map[string]string{metaID: "x", metaStart: "7"}, Discard: jetstream.DiscardNew},
	} {
		c.Name = "coaphub-" + hubID + "-feed"
		if _, err := js.CreateStream(within(t), c); err != nil {
			t.Fatal(err)
		}
		wantCode(t, name, open(testConfig(), options(n.url())), hub.Precondition, "feed-stream-unfit")
		if err := js.DeleteStream(within(t), c.Name); err != nil {
			t.Fatal(err)
		}
	}
	three := testConfig()
	three.Replicas = 3
	wantCode(t, "more replicas than servers", open(three, options(n.url())), hub.Precondition, "feed-stream-refused")
	huge := testConfig()
	huge.MaxBytes = 1 << 50
	wantCode(t, "more bytes than there are", open(huge, options(n.url())), hub.Precondition, "feed-stream-refused")
	wantCode(t, "no servers", open(testConfig(), Options{HubID: hubID}), hub.Precondition, "feed-config-invalid")
	wantCode(t, "a bad configuration", open(Config{}, options(n.url())), hub.Precondition, "feed-config-invalid")
	wantCode(t, "a key that is not there", open(testConfig(), Options{HubID: hubID, Bus: bus.Config{URLs: []string{n.url()}, NKeyFile: "none"}}), hub.Precondition, "feed-config-invalid")

	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := Open(ctx, testConfig(), options("nats://127.0.0.1:1"))
	wantCode(t, "no server", err, hub.Unavailable, "feed-away")
	n.off = true
	n.stop()
	n.start()
	ctx, cancel = context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	_, err = Open(ctx, testConfig(), options(n.url()))
	wantCode(t, "no JetStream", err, hub.Unavailable, "feed-refused")
	for version, can := range map[string]bool{"2.10.29": false, "2.11.0": true, "2.12.3": true, "3.0.0": true, "1.4.1": false} {
		if canReadBack(version) != can {
			t.Errorf("a server of version %s: %v", version, !can)
		}
	}
}

// A hub starts before its servers.
func TestServersComeLater(t *testing.T) {
	t.Parallel()
	n := startNode(t)
	n.stop()
	opened, o := make(chan error, 1), options(n.url())
	go func() {
		f, err := Open(within(t), testConfig(), o)
		if err == nil {
			err = errors.Join(f.Publish(within(t), []hub.Commit{storetest.Commit(storetest.Device(1), 1)})[0], f.Close())
		}
		opened <- err
	}()
	n.start()
	if err := <-opened; err != nil {
		t.Fatal(err)
	}
}

func TestConfig(t *testing.T) {
	t.Parallel()
	if c := DefaultConfig(); len(c.Problems()) != 0 {
		t.Errorf("the defaults have problems: %v", c.Problems())
	}
	for path, change := range map[string]func(*Config){
		"replicas":        func(c *Config) { c.Replicas = 2 },
		"maxAge":          func(c *Config) { c.MaxAge = time.Minute; c.DuplicateWindow = 30 * time.Second },
		"maxBytes":        func(c *Config) { c.MaxBytes = 1 },
		"duplicateWindow": func(c *Config) { c.DuplicateWindow = 2 * time.Hour },
	} {
		c := DefaultConfig()
		change(&c)
		if p := c.Problems(); len(p) != 1 || p[0].Path != path {
			t.Errorf("%s: %v", path, p)
		}
	}
}

// Owners' subjects are part of the format: these never change.
func TestBuckets(t *testing.T) {
	t.Parallel()
	for owner, want := range map[hub.Owner]uint64{"": 805, "alice": 263, "bob": 596} {
		if got := bucketOf(owner); got != want {
			t.Errorf("%q is in bucket %d, and was in %d", owner, got, want)
		}
	}
	f := &Feed{subjects: bus.Prefix(hubID) + "feed."}
	if s := f.subject(""); !strings.HasPrefix(s, "coaphub."+hubID+".feed.") {
		t.Errorf("the subject is %s", s)
	}
}

func FuzzDecode(f *testing.F) {
	full := storetest.FullCommit(storetest.Device(1), 7)
	b, err := encode(&full)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Add(b[:len(b)/2])
	f.Add([]byte{format, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1})
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := decode(data)
		if err != nil {
			return
		}
		again, _ := encode(&c)
		c2, err := decode(again)
		if err != nil {
			t.Fatal(err)
		}
		storetest.SameCommit(t, c2, c)
	})
}

// Processes that start at the same time find one stream, whoever made it.
func TestManyMakeTheStream(t *testing.T) {
	t.Parallel()
	for range 20 {
		n := startNode(t)
		var all sync.WaitGroup
		ids := make([]string, 8)
		for i := range ids {
			all.Go(func() {
				cfg := testConfig()
				cfg.MaxBytes = 40 << 30 // the server has room for one of these
				f, err := Open(t.Context(), cfg, options(n.url()))
				if err != nil {
					t.Errorf("%v: %+v", err, errors.Unwrap(err))
					return
				}
				ids[i] = f.LogID()
				if err := f.Close(); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		for _, id := range ids {
			if id != ids[0] {
				t.Errorf("they know different streams: %q", ids)
			}
		}
	}
}
