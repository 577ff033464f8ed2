package mongostore_test

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"
	"go.uber.org/goleak"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// uri is of the server that the tests run against, and login what it wants: the one that COAPHUB_TEST_MONGODB_URI names, without
// TLS, or one that is started for them.
var (
	uri   string
	login *url.Userinfo
)

func TestMain(m *testing.M) {
	code, err := withServer(m.Run)
	if err != nil {
		fmt.Fprintln(os.Stderr, "the MongoDB server for the tests:", err)
		os.Exit(1)
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// withServer builds test/mongo, a module of its own, and runs f while it serves.
func withServer(f func() int) (code int, err error) {
	if given := os.Getenv("COAPHUB_TEST_MONGODB_URI"); given != "" {
		u, err := url.Parse(given)
		if err != nil {
			return 0, err
		}
		login, u.User = u.User, nil
		uri = u.String()
		return f(), nil
	}
	dir, err := os.MkdirTemp("", "coaphub-mongo-")
	if err != nil {
		return 0, err
	}
	defer os.RemoveAll(dir)
	data := filepath.Join(dir, "data")
	if err := os.Mkdir(data, 0o700); err != nil {
		return 0, err
	}
	program := filepath.Join(dir, "mongo")
	build := exec.Command("go", "run", "-C", "../../../test/mongo", "./build", program)
	if out, err := build.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build test/mongo: %w\n%s", err, out)
	}
	cmd := exec.Command(program, data)
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe() // its end is the server's
	if err != nil {
		return 0, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err == nil {
		uri = strings.TrimSpace(line)
		code = f()
	}
	return code, errors.Join(err, in.Close(), cmd.Wait())
}

var databases atomic.Int32

// database returns the name of an empty database, which is dropped afterwards.
func database(tb testing.TB) string {
	tb.Helper()
	// The tests' results count until one of these changes: go test notes which files a test reads.
	for _, pattern := range []string{"../../../test/mongo/*.*", "../../../test/mongo/build/*"} {
		sources, err := filepath.Glob(pattern)
		for _, file := range sources {
			_, readErr := os.ReadFile(file)
			err = errors.Join(err, readErr)
		}
		must(tb, err)
	}
	name := fmt.Sprintf("coaphub-test-%d-%d", os.Getpid(), databases.Add(1))
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		c := connect(tb)
		if err := errors.Join(c.Database(name).Drop(ctx), c.Disconnect(ctx)); err != nil {
			tb.Errorf("drop the database: %v", err)
		}
	})
	return name
}

// connect connects the test itself.
func connect(tb testing.TB) *mongo.Client {
	tb.Helper()
	o := options.Client().ApplyURI(uri)
	if login != nil {
		password, ok := login.Password()
		o.SetAuth(options.Credential{Username: login.Username(), Password: password, PasswordSet: ok})
	}
	c, err := mongo.Connect(o)
	must(tb, err)
	return c
}

// config is for a database at the server or a proxy before it.
func config(at, database string) mongostore.Config {
	cfg := mongostore.DefaultConfig()
	cfg.URI, cfg.Database = at, database
	if login != nil {
		password, _ := login.Password()
		cfg.User, cfg.Password = login.Username(), conf.Secret(password)
	}
	return cfg
}

const secret = "0123456789abcdef"

func opts(feed store.PublishedFeed) mongostore.Options {
	return mongostore.Options{HubID: "hub-1", ClusterSecret: secret, Feed: feed}
}

// fast makes a store do its own work often.
var fast = mongostore.Tuning{Fold: 5 * time.Millisecond, Beat: 20 * time.Millisecond}

// open opens a store that must come up.
func open(tb testing.TB, cfg mongostore.Config, o mongostore.Options, t mongostore.Tuning) *mongostore.Store {
	tb.Helper()
	s, err := mongostore.OpenTuned(tb.Context(), cfg, o, t)
	if err != nil {
		tb.Fatalf("open: %v", err)
	}
	tb.Cleanup(s.Kill) // for tests that end early
	return s
}

func closeStore(tb testing.TB, s *mongostore.Store) {
	tb.Helper()
	if err := s.Close(); err != nil {
		tb.Errorf("close: %v", err)
	}
}

func TestConformance(t *testing.T) {
	t.Parallel()
	storetest.Run(t, func(t *testing.T) store.Store {
		s := open(t, config(uri, database(t)), opts(storetest.NewFeed()), mongostore.Tuning{})
		t.Cleanup(func() { closeStore(t, s) })
		return s
	})
}

// TestDiskBytes: what is trimmed no longer counts, whether or not the files get smaller.
func TestDiskBytes(t *testing.T) {
	t.Parallel()
	s := open(t, config(uri, database(t)), opts(storetest.NewFeed()), fast)
	defer closeStore(t, s)
	const dev, commits, size = hub.DeviceID("d0000000-0000-4000-8000-000000000001"), 20, 100_000
	for seq := range uint64(commits) {
		e := entry(dev, seq+1)
		e.Commit.Events[0].Content.Data = make([]byte, size)
		_, _ = rand.Read(e.Commit.Events[0].Content.Data) // nothing to compress
		must(t, s.Append(t.Context(), []store.Entry{e})[0])
	}
	takes := func() uint64 {
		n, err := s.DiskBytes(t.Context())
		must(t, err)
		return n
	}
	eventually(t, "all is on disk", func() bool { return takes() > commits*size })
	eventually(t, "all but the newest commit is trimmed", func() bool {
		must(t, s.Trim(t.Context(), dev, commits, nil))
		return takes() < commits*size/2
	})
}

// eventually waits until ok, or fails the test.
func eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			tb.Fatalf("not in time: %s", what)
		}
	}
}

func must(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// wantError wants an error of a kind and with a code.
func wantError(tb testing.TB, what string, err error, kind hub.Kind, code string) {
	tb.Helper()
	var he *hub.Error
	if !errors.As(err, &he) || he.Kind != kind || he.Code != code {
		tb.Errorf("%s: got %v, want kind %s with the code %q", what, err, kind, code)
	}
}

// entry is the commit of a device with the state documents last, which it changes, and first, if it is the first.
func entry(dev hub.DeviceID, seq uint64, more ...string) store.Entry {
	e := store.Entry{Commit: storetest.Commit(dev, seq), Docs: []store.StateDoc{{Key: "last", Value: fmt.Append(nil, seq)}}}
	if seq == 1 {
		e.Docs = append(e.Docs, store.StateDoc{Key: "first", Value: []byte("1")})
	}
	for _, m := range more {
		copy(e.Commit.ID[:8], m) // somebody else's
	}
	return e
}

func add(ctx context.Context, s store.Store, dev hub.DeviceID, seq uint64) error {
	return s.Append(ctx, []store.Entry{entry(dev, seq)})[0]
}

// wantLog wants the device to have the commits up to last, each as entry makes it, with documents that follow, and each of them
// in the feed, in order.
func wantLog(tb testing.TB, s store.Store, feed *storetest.Feed, dev hub.DeviceID, last uint64) {
	tb.Helper()
	next := uint64(1)
	for c, err := range s.Commits(tb.Context(), dev, 1) {
		if err != nil {
			tb.Fatal(err)
		}
		storetest.SameCommit(tb, c, storetest.Commit(dev, next))
		next++
	}
	if next != last+1 {
		tb.Errorf("device %s has %d commits, want %d", dev, next-1, last)
	}
	st, err := s.Load(tb.Context(), dev)
	if err != nil || st.LastSeq != last || len(st.Docs) > 0 && string(st.Docs[len(st.Docs)-1].Value) != fmt.Sprint(st.FoldedTo) {
		tb.Errorf("device %s was loaded as %+v, %v; want seq %d", dev, st, err, last)
	}
	told := uint64(0)
	for _, e := range feed.All() {
		if e.Commit.Device != dev {
			continue
		}
		if told++; e.Commit.Seq != told {
			tb.Errorf("the feed has seq %d of device %s, want %d", e.Commit.Seq, dev, told)
		}
	}
	if told != last {
		tb.Errorf("the feed has %d commits of device %s, want %d", told, dev, last)
	}
}

// writer is what is known of who writes to a database, or did without an orderly end.
type writer struct {
	ID   string `bson:"_id"`
	Beat int64  `bson:"beat"`
}

func writers(tb testing.TB, database string) (all []writer) {
	tb.Helper()
	c := connect(tb)
	defer func() { must(tb, c.Disconnect(context.Background())) }()
	cur, err := c.Database(database).Collection("writers").Find(tb.Context(), bson.D{})
	must(tb, err)
	must(tb, cur.All(tb.Context(), &all))
	return all
}

// told is a feed that says what it is told to remember.
type told struct {
	*storetest.Feed
	known hub.Position
}

func (f *told) Remember(ctx context.Context, known hub.Position) error {
	f.known = known
	return f.Feed.Remember(ctx, known)
}

// Whoever opens the store tells the feed how far it had come, however the processes before have ended, so that one that was set back
// meanwhile is another log.
func TestFeedIsTold(t *testing.T) {
	t.Parallel()
	db, feed := database(t), &told{Feed: storetest.NewFeed()}
	s := open(t, config(uri, db), opts(feed), mongostore.Tuning{Beat: time.Hour})
	for seq := range uint64(3) {
		must(t, add(t.Context(), s, storetest.Device(1), seq+1))
	}
	closeStore(t, s)
	if feed.known.N != 0 {
		t.Errorf("a feed that is new is told of %v", feed.known)
	}
	s = open(t, config(uri, db), opts(feed), fast)
	if feed.known != feed.Known() || feed.known.N != 3 {
		t.Errorf("after an orderly end the feed is told of %v, and was at %v", feed.known, feed.Known())
	}
	must(t, add(t.Context(), s, storetest.Device(1), 4))
	eventually(t, "the fourth to be published and folded", s.Done)
	done := writers(t, db)[0].Beat + 2 // a whole beat begins after it
	eventually(t, "a beat", func() bool { return writers(t, db)[0].Beat >= done })
	s.Kill()
	id := s.LogID()
	s = open(t, config(uri, db), opts(feed), fast)
	if feed.known.N != 4 || s.LogID() != id {
		t.Errorf("after a crash the feed is told of %v, and was at %v", feed.known, feed.Known())
	}
	s.Kill()

	old := storetest.NewFeed() // has less
	s = open(t, config(uri, db), opts(old), fast)
	defer closeStore(t, s)
	must(t, add(t.Context(), s, storetest.Device(2), 1))
	if entries, _, lagged, err := s.ReadFeed(t.Context(), feed.known, 10); err != nil || !lagged {
		t.Errorf("in a feed that was set back there are %d entries, lagged %v, %v", len(entries), lagged, err)
	}
}
