// Package mongostore keeps the hub's log and documents in MongoDB: what the processes of a cluster share. A commit is one
// document whose key is its fence; state documents follow behind the log, in versions of which readers see those that make a
// whole; the feed is somebody else's and told of every commit after it is stored. It uses plain commands only (insert, find with
// ranges, update and replace with upsert, delete, createIndexes), so that any server that has them will do.
//
// It must not know what events and documents mean, and nothing else in the hub may know MongoDB.
package mongostore

import (
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.mongodb.org/mongo-driver/v2/bson"
	"go.mongodb.org/mongo-driver/v2/mongo"
	"go.mongodb.org/mongo-driver/v2/mongo/options"
	"golang.org/x/sync/semaphore"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/store"
)

// schema is the version of what is in the database. A later one is refused by name, an earlier one is brought forward.
const schema = 1

// migrations bring the database from the schema that is their index to the next. Each may be run again after it broke off, and
// by several processes at a time.
var migrations = [schema]func(context.Context, *Store) error{
	func(context.Context, *Store) error { return nil }, // nothing was ever stored under 0
}

// Options says how to open a store.
type Options struct {
	// HubID and ClusterSecret are what all processes of a cluster have in common and no other cluster has: the first that opens
	// the database writes them down (the secret only as a proof that it was known), and others are refused.
	HubID         string
	ClusterSecret conf.Secret
	// Feed is told of every commit. The store does not close it.
	Feed       store.PublishedFeed
	Log        *slog.Logger          // nil: nothing is logged
	Registerer prometheus.Registerer // nil: metrics are counted but not shown
	Name       string                // of this process, for people who look into the database
}

// Store is a store.Store on MongoDB and a feed. Make one with Open.
type Store struct {
	cfg     Config
	log     *slog.Logger
	metrics *metrics
	client  *mongo.Client
	times   times

	commits, devices, state, documents, writers, hub *mongo.Collection

	logID    string
	writerID string // of this opening of the store
	offline  bool   // it has no feed and does no work of its own: see Offline
	existing bool   // a database that is nobody's is refused
	name     string
	feed     store.PublishedFeed
	limits   limits
	noted    uint64 // how far the feed had come by what was written down last; of the goroutine that beats, and then of Close

	// room bounds what callers are just writing, in bytes.
	room *semaphore.Weighted
	// folding is held by who writes state documents, one at a time.
	folding chan struct{}
	// turns are taken by who changes a document: those of one process queue for it, instead of colliding in the database.
	turns [256]chan struct{}
	wake  chan struct{} // capacity 1: callers wait until there is less to fold

	mu      sync.Mutex // guards what follows
	closing bool
	calls   sync.WaitGroup // under way; added to under mu while not closing
	known   map[hub.DeviceID]*device
	dirty   map[*device]struct{} // have segments, a backlog or doubts
	number  uint64               // last running number
	open    map[uint64]struct{}  // numbers of commits that are not known to be refused, or published and folded
	lag     lag
	eased   chan struct{} // closed when lag gets less; nil while nobody waits

	life context.Context // ends when the store closes
	kill context.CancelFunc
	done sync.WaitGroup // of the store's own goroutines, work and beats
}

var (
	_ store.Store = (*Store)(nil)
	_ store.Sizer = (*Store)(nil)
)

// lag is what is stored and not yet published and folded.
type lag struct {
	events int
	bytes  int64
}

// limits bound lag: beyond it appends wait as long as patience, and are then refused.
type limits struct {
	lag
	patience time.Duration
}

// times of the store's own work.
type times struct {
	fold    time.Duration // documents follow the log this often
	beat    time.Duration // the writer's own document is written this often
	dead    int           // beats that a writer may miss before others take over
	publish time.Duration // how long an append waits for the feed
	fresh   time.Duration // how long a device's last seq is taken for known
}

const (
	maxRoom    = 32 << 20
	entryCost  = 1 << 10
	maxDevices = 1 << 16 // remembered, but for those with work to do
)

func defaultLimits() limits { return limits{lag{20_000, 64 << 20}, 2 * time.Second} }

func defaultTimes() times {
	return times{
		fold: 250 * time.Millisecond, beat: 2 * time.Second, dead: 5, publish: 5 * time.Second,
		// Shorter, by more than any wait, than the ten minutes for which no commit is trimmed: what was the newest commit then is
		// still there to conflict with.
		fresh: 5 * time.Minute,
	}
}

// Open connects to the database, makes in it what is missing, and starts to work. Errors of kind hub.Precondition say what to do.
func Open(ctx context.Context, cfg Config, opts Options) (*Store, error) {
	s, err := prepare(cfg, opts)
	if err != nil {
		return nil, err
	}
	if err := s.start(ctx, opts, migrations[:]); err != nil {
		return nil, err
	}
	return s, nil
}

func prepare(cfg Config, opts Options) (*Store, error) {
	if p := cfg.Problems(); len(p) > 0 {
		return nil, configError("store-config-invalid", "the database's configuration is not right: "+p[0].Path+" "+p[0].Text, conf.Problems(p).Err())
	}
	if opts.Feed == nil || opts.HubID == "" {
		return nil, &hub.Error{Kind: hub.Internal, Op: "mongostore.Open", Err: errors.New("a feed and a hub ID are needed")}
	}
	if len(opts.ClusterSecret) < 16 {
		return nil, configError("store-config-invalid", "the cluster's secret needs 16 characters at least", nil)
	}
	s := &Store{
		cfg: cfg, log: opts.Log, feed: opts.Feed, writerID: randomID(), name: opts.Name, limits: defaultLimits(), times: defaultTimes(),
		room: semaphore.NewWeighted(maxRoom), folding: make(chan struct{}, 1), wake: make(chan struct{}, 1),
		known: map[hub.DeviceID]*device{}, dirty: map[*device]struct{}{}, open: map[uint64]struct{}{},
	}
	for i := range s.turns {
		s.turns[i] = make(chan struct{}, 1)
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	return s, nil
}

// start connects. It leaves nothing open when it fails.
func (s *Store) start(ctx context.Context, opts Options, steps []func(context.Context, *Store) error) (err error) {
	o, err := s.cfg.options()
	if err != nil {
		return configError("store-config-invalid", "the database's configuration is not right; the log has the details", err)
	}
	if s.client, err = mongo.Connect(o); err != nil {
		return configError("store-config-invalid", "the database's configuration is not right; the log has the details", err)
	}
	s.metrics = newMetrics(opts.Registerer, s)
	defer func() {
		if err != nil {
			s.metrics.unregister()
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.cfg.Timeout)
			defer cancel()
			_ = s.client.Disconnect(end) // the error that counts is known
		}
	}()
	db := s.client.Database(s.cfg.Database)
	s.commits, s.devices, s.state = db.Collection(nameCommits), db.Collection(nameDevices), db.Collection(nameState)
	s.documents, s.writers, s.hub = db.Collection(nameDocuments), db.Collection(nameWriters), db.Collection(nameHub)
	if err := s.again(ctx, "Open", func(ctx context.Context) error { return s.checkServer(ctx, db) }); err != nil {
		return s.explain(err)
	}
	if err := s.identify(ctx, opts, steps); err != nil {
		return s.explain(err)
	}
	if !s.existing {
		if err := s.again(ctx, "Open", s.makeIndexes); err != nil {
			return s.explain(err)
		}
	}
	if !s.offline {
		err := s.remember(ctx)
		if err == nil {
			err = s.checkFeeds(ctx)
		}
		if err == nil {
			err = s.beat(ctx, 0)
		}
		if err == nil {
			err = s.checkMarks(ctx)
		}
		if err != nil {
			return s.explain(err)
		}
	}
	s.life, s.kill = context.WithCancel(context.WithoutCancel(ctx))
	if s.offline {
		return nil
	}
	s.done.Go(s.work)
	s.done.Go(s.beats)
	return nil
}

// address is what people know the database by: the URI's hosts.
func (s *Store) address() string {
	_, at, _ := strings.Cut(s.cfg.URI, "://")
	at, _, _ = strings.Cut(at, "/")
	at, _, _ = strings.Cut(at, "?")
	return at
}

// explain turns an error of the start into one that says what to do.
func (s *Store) explain(err error) error {
	he := (*hub.Error)(nil)
	if errors.As(err, &he) && (he.Kind == hub.Precondition || he.Kind == hub.NotFound) {
		return err
	}
	at := s.address()
	switch code := serverCode(err); {
	case badLogin(err), code == codeAuthFailed:
		return configError("store-login-refused",
			fmt.Sprintf("the database at %s refuses the user %q: check user, password and authDatabase", at, s.cfg.User), err)
	case code == codeUnauthorized:
		return configError("store-login-refused",
			fmt.Sprintf("the database at %s does not let the user %q write: grant it the role readWrite on %s", at, s.cfg.User, s.cfg.Database), err)
	case code == codeNotWritablePrimary, code == codeNotPrimaryNoSecond:
		return configError("store-read-only",
			fmt.Sprintf("the database at %s takes no writes: name the whole replica set in the URI, without directConnection", at), err)
	case notSent(err):
		// It may be on its way: whoever opens the store decides whether to wait.
		return &hub.Error{
			Kind: hub.Unavailable, Op: "mongostore.Open", Code: errUnreachable.Code, Err: err,
			Text: fmt.Sprintf("no primary of the database answers at %s: check the URI, the replica set's name, the network and TLS", at),
		}
	}
	return fmt.Errorf("open the database at %s: %w", at, err)
}

// checkServer refuses a server that takes no writes, and a log that is sharded by anything but its key, since then its key would
// not be unique.
func (s *Store) checkServer(ctx context.Context, db *mongo.Database) error {
	var hello struct {
		Msg      string `bson:"msg"`
		ReadOnly bool   `bson:"readOnly"`
		Primary  bool   `bson:"isWritablePrimary"` // routers say so, too
	}
	if err := db.RunCommand(ctx, bson.D{{Key: "hello", Value: 1}}).Decode(&hello); err != nil {
		return err
	}
	if hello.ReadOnly || !hello.Primary {
		return configError("store-read-only",
			fmt.Sprintf("the database at %s takes no writes: name the whole replica set in the URI, without directConnection", s.address()), nil)
	}
	if hello.Msg != "isdbgrid" { // not a router of a sharded cluster
		return nil
	}
	for _, c := range []*mongo.Collection{s.commits, s.devices, s.state, s.documents, s.writers, s.hub} {
		var sharded struct {
			Key bson.D `bson:"key"`
		}
		err := s.client.Database("config").Collection("collections").
			FindOne(ctx, bson.D{{Key: "_id", Value: db.Name() + "." + c.Name()}}).Decode(&sharded)
		if errors.Is(err, mongo.ErrNoDocuments) {
			continue
		}
		if err != nil {
			return err
		}
		if len(sharded.Key) > 0 && (len(sharded.Key) != 1 || sharded.Key[0].Key != "_id") {
			return configError("store-sharded-wrongly", fmt.Sprintf("the collection %s is sharded by another key than _id: shard it by _id or not at all", c.Name()), nil)
		}
	}
	return nil
}

// identity is the document that says whose database this is.
type identity struct {
	ID     string `bson:"_id"`
	Schema int32  `bson:"schema"`
	HubID  string `bson:"hubId"`
	LogID  string `bson:"logId"`
	Salt   []byte `bson:"salt"`
	Proof  []byte `bson:"proof"`
}

func proof(secret conf.Secret, salt []byte, hubID string) []byte {
	h := hmac.New(sha256.New, []byte(secret.Reveal()))
	h.Write(salt)
	h.Write([]byte(hubID))
	return h.Sum(nil)
}

// identify makes the database this cluster's, or finds out whether it is, and brings it forward.
func (s *Store) identify(ctx context.Context, opts Options, steps []func(context.Context, *Store) error) error {
	newest := int32(len(steps))
	fresh := identity{ID: "hub", Schema: newest, HubID: opts.HubID, LogID: randomID(), Salt: []byte(randomID())}
	fresh.Proof = proof(opts.ClusterSecret, fresh.Salt, fresh.HubID)
	var is identity
	err := s.again(ctx, "Open", func(ctx context.Context) error {
		err := s.hub.FindOne(ctx, bson.D{{Key: "_id", Value: "hub"}}).Decode(&is)
		if !errors.Is(err, mongo.ErrNoDocuments) {
			return err
		}
		if s.existing {
			return &hub.Error{Kind: hub.NotFound, Op: "mongostore.Open", Code: ErrNoHub, Text: "there is no hub in the database " + s.where() + ": check uri and database"}
		}
		// Whoever is first makes it; all read it back.
		if _, err := s.hub.InsertOne(ctx, fresh); err != nil && !mongo.IsDuplicateKeyError(err) {
			return err
		}
		return s.hub.FindOne(ctx, bson.D{{Key: "_id", Value: "hub"}}).Decode(&is)
	})
	if err != nil {
		return err
	}
	switch {
	case is.Schema > newest:
		return configError("data-too-new", "the database was written by a newer version of coaphub",
			fmt.Errorf("schema %d, this version knows %d", is.Schema, newest))
	case is.HubID != opts.HubID:
		return configError("store-of-another-hub", fmt.Sprintf("the database %s is of the hub %s: give this hub one of its own", s.cfg.Database, is.HubID), nil)
	case !hmac.Equal(is.Proof, proof(opts.ClusterSecret, is.Salt, opts.HubID)):
		return configError("store-of-another-cluster",
			fmt.Sprintf("the database %s is of another cluster with this hub's ID: give this one its own database and ID, or the cluster's secret if it is part of it", s.cfg.Database), nil)
	}
	for is.Schema < newest {
		if err := steps[is.Schema](ctx, s); err != nil {
			return fmt.Errorf("bring the database from schema %d to %d: %w", is.Schema, is.Schema+1, err)
		}
		err := s.again(ctx, "Open", func(ctx context.Context) error {
			filter := bson.D{{Key: "_id", Value: "hub"}, {Key: "schema", Value: is.Schema}}
			_, err := s.hub.UpdateOne(ctx, filter, bson.D{{Key: "$set", Value: bson.D{{Key: "schema", Value: is.Schema + 1}}}})
			return err
		})
		if err != nil {
			return err
		}
		is.Schema++
	}
	s.logID = is.LogID
	return nil
}

func (s *Store) makeIndexes(ctx context.Context) error {
	index := func(c *mongo.Collection, keys ...string) error {
		var d bson.D
		for _, k := range keys {
			d = append(d, bson.E{Key: k, Value: 1})
		}
		_, err := c.Indexes().CreateOne(ctx, mongo.IndexModel{Keys: d, Options: options.Index().SetName(strings.Join(keys, "_"))})
		return err
	}
	return errors.Join(
		index(s.commits, "w", "n"), // what a dead writer left
		index(s.documents, "x", "_id"),
		index(s.documents, "del"),
	)
}

func randomID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	return hex.EncodeToString(id[:])
}

// enter begins a call; the caller leaves with s.calls.Done.
func (s *Store) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closing {
		return errClosed
	}
	s.calls.Add(1)
	return nil
}

// Close lets calls that are under way end, folds and publishes what is left as far as the servers let it within Timeout, and
// disconnects. Afterwards all calls are refused with hub.Unavailable.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return nil
	}
	s.closing = true
	s.mu.Unlock()
	s.calls.Wait() // each is bounded by its timeouts
	s.kill()
	s.done.Wait()
	end, cancel := context.WithTimeout(context.Background(), s.cfg.Timeout)
	defer cancel()
	if s.offline {
		// Nothing is left to do.
	} else if err := s.settleAll(end); err != nil {
		s.log.Warn("documents could not be brought up to the log; whoever loads the devices next does so", "error", err)
	} else if err := s.retire(end); err != nil {
		s.log.Warn("the writer could not sign off; others will look after what it wrote", "error", err)
	}
	s.metrics.unregister()
	return s.client.Disconnect(end)
}
