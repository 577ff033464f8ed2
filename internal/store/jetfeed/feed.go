// Package jetfeed is the feed of a hub whose parts run apart: a NATS JetStream stream with one message a commit, to which the
// directories publish what the store has and from which every process reads. A commit's place is its number in the stream. Each
// process that listens follows the whole feed with one consumer; messages go to a subject for each of 1024 buckets of owners, so
// that it may listen to some only, once that pays.
//
// What is lost is noticed by whoever knew of it: a stream that ends before what a process of the hub has read or published, or before
// what one had when it wrote that down (Known, Remember), gets another identity. So a stream that is restored from a backup, or lost and
// made anew, is another log for those who have a place in it. What was published after the last writing down, two seconds before all
// processes ended, is not known of: a stream that ends between is taken for whole. So one of a single replica needs servers that write
// through (sync_interval: always).
//
// It must not know who reads, what events mean, or which store has the commits; and it is no truth: what a lost stream had is
// in the store, and readers whose place is gone are told that they lag.
package jetfeed

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/conf"
	"github.com/coaphub/coaphub/internal/store"
)

// Options are what a feed needs besides its configuration.
type Options struct {
	Bus        bus.Config // the servers, and how to connect to them
	HubID      string
	Name       string                // of this process, for the operator of the servers
	Log        *slog.Logger          // nil: nothing is logged
	Registerer prometheus.Registerer // nil: metrics are counted but not shown
}

// Feed is a store.PublishedFeed on a JetStream stream, which all processes of the hub share. Make one with Open.
type Feed struct {
	cfg      Config
	log      *slog.Logger
	metrics  *metrics
	times    times
	name     string // of the stream
	subjects string // of its messages, up to the bucket
	conn     *nats.Conn
	js       jetstream.JetStream

	// connected is what the connection said last. To ask it would mean to wait for whoever writes to it.
	connected atomic.Bool
	flights   flights
	out       chan outgoing // to the sender; whoever finds it full waits with its call's context
	reading   chan struct{} // has one for each reader that reads back
	renewing  chan struct{} // capacity 1
	wake      chan struct{} // capacity 1: somebody waits for commits

	mu      sync.Mutex // guards what follows
	closing bool
	calls   sync.WaitGroup // under way; added to under mu while not closing
	lost    chan struct{}  // closed when the connection is lost, and made anew
	// The stream as far as it is known.
	id      string
	start   uint64 // its first number
	kept    uint64 // of its messages the first; earlier ones are gone
	seen    uint64 // the highest number that any of its messages was known to have
	renewed bool   // this is not the one that Open found
	suspect bool   // it gave a number that it had given before
	ring    ring

	life     context.Context // ends when the feed closes
	kill     context.CancelFunc
	done     sync.WaitGroup // of the feed's own goroutines, send and follow
	attempts sync.WaitGroup // that may outlast their callers; added to while a call or a goroutine of the feed's own is under way
}

var _ store.PublishedFeed = (*Feed)(nil)

// times of the feed's own; tests have others.
type times struct {
	patience time.Duration // bounds a call whose context has no earlier end
	attempt  time.Duration // for how long one question to the servers is waited for
	ack      time.Duration // for how long nothing is acknowledged before all that was not is sent again
	idle     time.Duration // how long the feed is followed when nobody waits for it
	confirm  int           // how often a stream that seems to be set back is asked again
}

const (
	maxFlight  = 16 << 20 // bytes that are sent and not acknowledged
	maxReading = 8        // readers that read back at the same time; others wait
)

// Open connects to the servers and makes the stream, or brings the one that is there to the configuration. It waits for the servers
// as long as ctx lets it. Errors of kind hub.Precondition say what to do.
func Open(ctx context.Context, cfg Config, o Options) (*Feed, error) {
	f, err := prepare(cfg, o)
	if err == nil {
		err = f.open(ctx, o)
	}
	if err != nil {
		return nil, err
	}
	return f, nil
}

func prepare(cfg Config, o Options) (*Feed, error) {
	if p := cfg.Problems(); len(p) > 0 {
		return nil, hub.NewError(hub.Precondition, "feed-config-invalid", "the feed's configuration is not right: "+p[0].Path+" "+p[0].Text).With("jetfeed.Open", conf.Problems(p).Err())
	}
	if errs := o.Bus.Validate(); len(errs) > 0 || len(o.Bus.URLs) == 0 || o.HubID == "" {
		return nil, hub.NewError(hub.Precondition, "feed-config-invalid", "the feed needs the bus: its servers are missing, or not right").With("jetfeed.Open", errors.Join(errs...))
	}
	f := &Feed{
		cfg: cfg, log: o.Log, name: "coaphub-" + o.HubID + "-feed", subjects: bus.Prefix(o.HubID) + "feed.",
		times: times{patience: 10 * time.Second, attempt: 2 * time.Second, ack: 2 * time.Second, idle: time.Minute, confirm: 8},
		out:   make(chan outgoing, 256), reading: make(chan struct{}, maxReading),
		renewing: make(chan struct{}, 1), wake: make(chan struct{}, 1), lost: make(chan struct{}),
	}
	f.flights.room.free = maxFlight
	f.ring.most = ringBytes
	if f.log == nil {
		f.log = slog.New(slog.DiscardHandler)
	}
	return f, nil
}

// open leaves nothing open when it fails.
func (f *Feed) open(ctx context.Context, o Options) (err error) {
	f.metrics = newMetrics(o.Registerer, &f.flights.room)
	f.life, f.kill = context.WithCancel(context.WithoutCancel(ctx))
	defer func() {
		if err == nil {
			return
		}
		f.kill()
		if f.conn != nil {
			f.conn.Close()
		}
		f.attempts.Wait()
		f.metrics.unregister()
	}()
	if f.conn, err = bus.Dial(o.Bus, o.HubID, o.Name, f.log.With("connection", "feed"), f.changed); err != nil {
		return hub.NewError(hub.Precondition, "feed-config-invalid", "the feed cannot use the configuration of the bus; the log has the details").With("jetfeed.Open", err)
	}
	if f.js, err = jetstream.New(f.conn); err != nil {
		return err
	}
	if _, err = again(ctx, f, "Open", f.settle); err != nil {
		return err
	}
	f.flights.inbox = f.conn.NewInbox() + "."
	if _, err := f.conn.Subscribe(f.flights.inbox+"*", f.acknowledged); err != nil {
		return fmt.Errorf("take acknowledgements: %w", err)
	}
	f.done.Go(f.send)
	f.done.Go(f.follow)
	return nil
}

// settle makes the stream, or brings the one that is there to the configuration.
func (f *Feed) settle(ctx context.Context) (stream, error) {
	st, err := f.look(ctx)
	if err == nil && !f.adjusted(st.config) {
		c := st.config
		f.adjust(&c)
		if _, err = f.js.UpdateStream(ctx, c); err == nil {
			f.log.Info("the feed's stream was brought to the configuration", "stream", f.name)
		}
	}
	var api *jetstream.APIError
	var unfit unfitError
	switch {
	case errors.As(err, &unfit):
		err = hub.NewError(hub.Precondition, "feed-stream-unfit", err.Error()).With("jetfeed.Open", nil)
	case errors.As(err, &api) && api.Code != 503: // 503: not now
		err = hub.NewError(hub.Precondition, "feed-stream-refused", "the NATS servers refuse the feed's stream: see that JetStream is on, has room for maxBytes and as many servers as replicas").With("jetfeed.Open", err)
	case err == nil && !canReadBack(f.conn.ConnectedServerVersion()):
		err = hub.NewError(hub.Precondition, "feed-stream-refused", "the NATS servers are of version "+f.conn.ConnectedServerVersion()+": the feed needs 2.11 or later").With("jetfeed.Open", nil)
	case err == nil && f.conn.MaxPayload() < hub.MaxCommitBytes+(16<<10):
		err = hub.NewError(hub.Precondition, "feed-stream-refused", fmt.Sprintf("the NATS servers take no messages of %d bytes: raise max_payload", hub.MaxCommitBytes+(16<<10))).With("jetfeed.Open", nil)
	}
	return st, err
}

// canReadBack reports whether servers of a version answer a directGet with more than one message.
func canReadBack(version string) bool {
	var major, minor int
	_, err := fmt.Sscanf(version, "%d.%d", &major, &minor)
	return err != nil || major > 2 || major == 2 && minor >= 11
}

// enter begins a call: the context that it returns ends with the feed, and has a bound. The caller ends it with leave.
func (f *Feed) enter(ctx context.Context, op string) (_ context.Context, leave func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closing {
		return nil, nil, errClosed.With("jetfeed."+op, nil)
	}
	f.calls.Add(1)
	ctx, cancel := context.WithTimeout(ctx, f.times.patience)
	stop := context.AfterFunc(f.life, cancel)
	return ctx, func() { stop(); cancel(); f.calls.Done() }, nil
}

// LogID names the stream. It changes when the stream was found to be another one, or to have lost its end; readers of the one before
// lag then.
func (f *Feed) LogID() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.id
}

// Health returns an error while no server is reached.
func (f *Feed) Health(context.Context) error {
	if f.connected.Load() {
		return nil
	}
	return errors.New("the feed is not connected")
}

// changed is told when the servers are reached, and lost.
func (f *Feed) changed(connected bool) {
	f.connected.Store(connected)
	if connected {
		return
	}
	f.metrics.disconnects.Inc()
	f.mu.Lock()
	defer f.mu.Unlock()
	close(f.lost)
	f.lost = make(chan struct{})
}

// Close ends the calls that are under way, and the connection. Afterwards all calls are refused with hub.Unavailable.
func (f *Feed) Close() error {
	f.mu.Lock()
	closing := f.closing
	f.closing = true
	if f.ring.idle != nil {
		f.ring.idle.Stop()
	}
	f.mu.Unlock()
	if closing {
		return nil
	}
	f.kill()
	f.calls.Wait()
	f.done.Wait()
	f.conn.Close()
	f.attempts.Wait()
	f.metrics.unregister()
	return nil
}
