package resourcedirectory

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/store"
)

// Directory is the resource directory of one process. Its methods may be called from any goroutine. Writes wait until Run
// serves and are refused with Unavailable once it ends; reads work without Run.
type Directory struct {
	*Reader
	cfg     Config
	store   store.Store
	log     *slog.Logger
	metrics *metrics
	codec   codec
	writer  string // names this process in commits
	apart   *apart // nil: the directory is the only one
	run     string // random, names this run in the index of online devices
	marked  marked
	number  atomic.Uint64 // running number of the newest commit

	workers []*worker
	// devices holds the published state of the devices in memory: *entry by hub.DeviceID. Workers write, readers read.
	devices sync.Map
	// loadedBytes is the sum of the workers' bytes.
	loadedBytes atomic.Int64
	waiters     waiters
	changes     changes
	trimDocs    int           // bytes of base documents that one step of the trimmer writes; beyond the constant the store refuses
	closing     chan struct{} // closed when Run begins to end: nothing new is taken
	stopped     chan struct{} // closed when no worker runs any more: nobody will answer
}

// New makes a directory over the store. writer names the process in the commits that it writes. The configuration must pass
// Check. Nothing runs before Run.
func New(cfg Config, st store.Store, log *slog.Logger, reg prometheus.Registerer, writer string) (*Directory, error) {
	if err := cfg.Check(); err != nil {
		return nil, fmt.Errorf("configure the resource directory: %w", err)
	}
	k, err := newCodec()
	if err != nil {
		return nil, err
	}
	m, err := newMetrics(reg)
	if err != nil {
		return nil, err
	}
	reader, err := NewReader(st, reg)
	if err != nil {
		return nil, err
	}
	d := &Directory{
		Reader: reader, cfg: cfg, store: st, log: log, metrics: m, codec: k, writer: writer, run: rand.Text(),
		closing: make(chan struct{}), stopped: make(chan struct{}), trimDocs: trimDocs,
	}
	for range cfg.Workers {
		d.workers = append(d.workers, newWorker(d))
	}
	return d, nil
}

// Run serves until ctx ends, then carries out what was already asked for and returns. It can be called once. Sessions of
// former processes are set offline and commands that wait are found beside serving; ready does not wait for them.
func (d *Directory) Run(ctx context.Context, ready func()) error {
	// What was begun is finished although ctx has ended: a commit under way is answered truthfully.
	own := context.WithoutCancel(ctx)
	var workers, helpers sync.WaitGroup
	for _, w := range d.workers {
		workers.Go(func() { w.run(own) })
	}
	helpers.Go(func() { d.trim(ctx) })
	if d.apart != nil {
		d.serveApart(ctx, ready)
	} else {
		helpers.Go(func() {
			d.former(ctx, onlineIndex, d.metrics.former, "devices of former processes cannot be set offline, trying again", d.gone, d.endSession)
		})
		helpers.Go(func() {
			d.former(ctx, commandIndex, d.metrics.formerCommands, "commands of former processes cannot be looked up, trying again", d.gone, d.findCommands)
		})
		ready()
		<-ctx.Done()
	}
	helpers.Wait()
	close(d.closing)
	workers.Wait()
	close(d.stopped)
	if d.apart != nil {
		d.apart.end()
		d.apart.under.Wait()
	}
	return nil
}

// request is one thing that a caller wants of one device.
type request struct {
	ctx context.Context // its end before the decision drops the request
	dev hub.DeviceID
	op  string
	// fresh requests begin a commit: they start or end a session or an ownership, and the commit's seq or stamp says which.
	fresh bool
	// owner stamps the commit of a fresh request; the zero value keeps the device's stamp.
	owner hub.Ownership
	// decide says which events s and the request make, without their versions; now is the time of their commit. It may be
	// called again after a conflict, and must not change anything but its own results. No events and no error means done.
	decide func(s *state, now int64) ([]hub.Event, error)
	// taken runs on the worker when it takes the request, before anything can fail. Optional.
	taken func(w *worker)
	// stored runs on the worker after the commit, before the answer. Optional.
	stored func(w *worker)
	// orphaned runs on the worker instead of a good answer when the caller has gone. Optional.
	orphaned func(w *worker)

	answer  chan error  // one place, so that the worker never waits
	settled atomic.Bool // the answer was given or the caller went: whoever sets it first decides which
	tries   int
	reread  bool   // it was decided once more on what the store has
	holds   *entry // the device that was loaded for this request and waits in memory for its decision
}

// do hands the request to the device's worker and waits for the answer. When ctx ends first the outcome is not known: the
// caller repeats with the same message number.
func (d *Directory) do(ctx context.Context, r *request) error {
	r.ctx, r.answer = ctx, make(chan error, 1)
	w := d.worker(r.dev)
	if err := d.enqueue(ctx, w, r); err != nil {
		return err
	}
	d.metrics.waiting.Inc()
	defer d.metrics.waiting.Dec()
	select {
	case err := <-r.answer:
		return err
	case <-ctx.Done():
		if r.settled.CompareAndSwap(false, true) {
			return wrap(r.op, ctx.Err())
		}
		return <-r.answer
	case <-d.stopped:
		select {
		case err := <-r.answer:
			return err
		default:
			return errStopping.With(r.op, nil)
		}
	}
}

func (d *Directory) enqueue(ctx context.Context, w *worker, r *request) error {
	select {
	case <-d.closing:
		return errStopping.With(r.op, nil)
	default:
	}
	select {
	case w.in <- r:
		return nil
	default:
	}
	// The queue is full. Waiting here costs the caller, not the worker; a caller that waits too long is told so.
	full := time.NewTimer(d.cfg.QueueWait)
	defer full.Stop()
	select {
	case w.in <- r:
		return nil
	case <-ctx.Done():
		return wrap(r.op, ctx.Err())
	case <-d.closing:
		return errStopping.With(r.op, nil)
	case <-full.C:
		d.metrics.refused.WithLabelValues("queue").Inc()
		busy := errBusy.With(r.op, nil)
		busy.RetryAfter = admission.Again(d.cfg.QueueWait) // not the same for all who are refused now
		return busy
	}
}

var (
	errStopping = hub.NewError(hub.Unavailable, "directory-stopping", "the hub is stopping, try again later")
	// It is the hub that has too much to do: whoever is refused did not ask for too much.
	errBusy = hub.NewError(hub.Unavailable, "directory-busy", "too many requests are waiting, try again later")
)

func (d *Directory) worker(dev hub.DeviceID) *worker {
	return d.workers[int(crc32.ChecksumIEEE([]byte(dev))%uint32(len(d.workers)))]
}

// refused is what the store did not take or give. To whoever asked the hub is not available, whatever limit or fault it met:
// they did not ask too much, and shall come again.
func refused(op string, err error) error {
	err = wrap(op, err)
	var e *hub.Error
	if errors.As(err, &e) && (e.Kind == hub.Exhausted || e.Kind == hub.Internal) {
		e.Kind = hub.Unavailable // wrap made a copy
	}
	return err
}

// wrap says what was being done; kind, code and sentence of the cause stay.
func wrap(op string, err error) error {
	var e *hub.Error
	if errors.As(err, &e) {
		return e.With(op, err)
	}
	return &hub.Error{Kind: hub.KindOf(err), Op: op, Err: err}
}
