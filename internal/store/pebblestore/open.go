// Package pebblestore keeps the hub's log, feed and documents in one Pebble database in the data folder: what a single
// machine stands on. Commits, feed positions and documents of all callers go to the disk in shared, synced batches.
//
// It must not know what events and documents mean, and nothing else in the hub may know Pebble.
package pebblestore

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sync/semaphore"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// schema is the version of the keys and values below. A store written by a later one is refused by name.
const schema = 1

// writeBuffers is how many write buffers there are at most.
const writeBuffers = 2

// Options says how to open a store. The zero value is good.
type Options struct {
	FS         vfs.FS                // nil: the disk. Tests pass an in-memory or failing one.
	Log        *slog.Logger          // nil: nothing is logged
	Registerer prometheus.Registerer // nil: metrics are counted but not shown
	// Writer names this process in errors and logs; it is not stored. Empty is fine.
	Writer string
	// MinFree is the free space in bytes below which writes are refused with "disk-full" while reads go on; 0 = 128 MiB,
	// negative = never refuse.
	MinFree int64
	// Fatal is called once when the disk failed in a way after which nothing may be acknowledged any more. It must end the
	// process; if it returns, the store stays failed: all writes are refused and Close gives up what cannot be closed. nil:
	// log and os.Exit(1).
	Fatal func(error)
	// CacheBytes is the size of the block cache, 0 = 8 MiB. MemTableBytes is the size of one of at most two write buffers,
	// 0 = 8 MiB.
	CacheBytes    int64
	MemTableBytes uint64
}

// Store is a store.Store on Pebble. Make one with Open.
type Store struct {
	db      *pebble.DB
	lock    *pebble.Lock
	fs      vfs.FS
	dir     string
	log     *slog.Logger
	fatal   func(error)
	metrics *metrics
	logID   string
	space   space

	// room bounds what waits for the committer, in bytes: when it is full, writers wait until their context ends.
	room *semaphore.Weighted
	wake chan struct{} // capacity 1: there is work, or the store closes

	mu      sync.Mutex // guards what follows
	pending []*request
	closing bool
	readers sync.WaitGroup // views given out and not released yet; added to under mu while view is not nil
	view    *view          // what readers may see: everything in it is durable
	moved   chan struct{}  // closed when view gets a new head; nil while nobody waits
	recent  []recent       // the newest of the feed up to view's head, all of it after before
	before  hub.Position
	bytes   int // of recent

	remembers int // bound of bytes, but for a half more

	opened    atomic.Bool // from here on, the write-ahead log must not fail
	failOnce  sync.Once
	failed    chan struct{} // closed when the disk failed for good
	failure   atomic.Pointer[error]
	committer chan struct{} // closed when the committer has ended
}

var (
	_ store.Store = (*Store)(nil)
	_ store.Sizer = (*Store)(nil)
)

// Open opens the store in dir, and makes it if there is none. Errors of kind hub.Precondition: "data-folder-in-use" when
// another process has it open, "data-too-new" when a newer version wrote it.
func Open(dir string, opts Options) (*Store, error) {
	s := &Store{
		fs: opts.FS, dir: dir, log: opts.Log, fatal: opts.Fatal,
		remembers: recentBytes, room: semaphore.NewWeighted(maxPending), wake: make(chan struct{}, 1),
		failed: make(chan struct{}), committer: make(chan struct{}),
	}
	if s.fs == nil {
		s.fs = vfs.Default
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if opts.Writer != "" {
		s.log = s.log.With("writer", opts.Writer)
	}
	if s.fatal == nil {
		s.fatal = func(err error) {
			s.log.Error("the store cannot go on; nothing more is acknowledged, the process ends", "dir", dir, "error", err)
			if opts.Log == nil { // no process ends without a word
				_, _ = fmt.Fprintf(os.Stderr, "the store %s cannot go on: %v\n", dir, err)
			}
			os.Exit(1)
		}
	}
	s.space = newSpace(s.fs, dir, s.log, opts.MinFree)
	if err := s.fs.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make store folder %s: %w", dir, err)
	}
	var err error
	if s.lock, err = pebble.LockDirectory(dir, s.fs); err != nil {
		return nil, hub.NewError(hub.Precondition, "data-folder-in-use", "another process uses this data folder").
			With("pebblestore.Open", fmt.Errorf("lock %s: %w", dir, err))
	}
	s.metrics = newMetrics(opts.Registerer, s) // before the database, whose listener counts
	if err := s.open(opts); err != nil {
		s.metrics.unregister()
		return nil, errors.Join(fmt.Errorf("open store %s: %w", dir, err), s.lock.Close())
	}
	go s.commitLoop()
	return s, nil
}

// open does what happens under the lock, and leaves no database open when it fails.
func (s *Store) open(opts Options) error {
	s.space.prepare()
	db, err := pebble.Open(s.dir, s.pebbleOptions(opts))
	if err != nil {
		return err
	}
	s.db = db
	s.opened.Store(true)
	if err := s.start(); err != nil {
		return errors.Join(err, db.Close())
	}
	return nil
}

// start reads the store's own records, or writes them into a new one.
func (s *Store) start() error {
	v, err := s.meta(metaSchema)
	if err != nil {
		return err
	}
	switch {
	case v == nil:
		if err := s.create(); err != nil {
			return err
		}
	case len(v) != 4:
		return errors.New("the schema record is damaged")
	case binary.BigEndian.Uint32(v) > schema:
		return hub.NewError(hub.Precondition, "data-too-new", "the data folder was written by a newer version of coaphub").
			With("pebblestore.Open", fmt.Errorf("schema %d, this version knows %d", binary.BigEndian.Uint32(v), schema))
	}
	id, err := s.meta(metaLogID)
	if err != nil {
		return err
	}
	s.logID = string(id)
	snap := s.db.NewSnapshot()
	st, err := readState(snap)
	if err != nil {
		return errors.Join(err, snap.Close())
	}
	s.view = &view{snap: snap, state: st, refs: 1}
	return nil
}

// create writes the records of a new store, all in one batch: a store has all of them or is new.
func (s *Store) create() error {
	b := s.db.NewBatch()
	defer b.Close()
	err := errors.Join(
		b.Set(metaSchema, binary.BigEndian.AppendUint32(nil, schema), nil),
		b.Set(metaLogID, []byte(newLogID()), nil),
	)
	if err != nil {
		return err
	}
	return s.db.Apply(b, pebble.Sync)
}

func newLogID() string {
	var id [16]byte
	_, _ = rand.Read(id[:]) // never fails (crypto/rand)
	return hex.EncodeToString(id[:])
}

// meta reads a record of the store itself; nil if there is none.
func (s *Store) meta(key []byte) ([]byte, error) { return get(s.db, key, clone) }

func (s *Store) pebbleOptions(opts Options) *pebble.Options {
	cache, mem := opts.CacheBytes, opts.MemTableBytes
	if cache == 0 {
		cache = 8 << 20
	}
	if mem == 0 {
		mem = 8 << 20
	}
	o := &pebble.Options{
		FS: guard{s.fs, s}, Lock: s.lock, Logger: pebbleLogger{s},
		FormatMajorVersion: pebble.FormatNewest,
		// Pebble takes its write buffers out of this: with no more than the cache's own share nothing would be left of it.
		CacheSize:    cache + writeBuffers*int64(mem),
		MemTableSize: mem,
		// One is written while the other is flushed.
		MemTableStopWritesThreshold: writeBuffers,
		MaxOpenFiles:                256,
		// One compaction at a time, two when it falls behind: the hub shares a small machine.
		CompactionConcurrencyRange: func() (int, int) { return 1, 2 },
		// Many small appends and few reads of old data: compacting less often costs reads a little, and halves the CPU of
		// an event.
		L0CompactionThreshold: 8,
		L0StopWritesThreshold: 24,
		LBaseMaxBytes:         64 << 20,
	}
	// Pebble complains about slow disks through its event listener; errors it survives are worth a line.
	o.EventListener = &pebble.EventListener{
		BackgroundError: func(err error) {
			s.metrics.backgroundErrors.Inc()
			s.log.Warn("the store's background work failed and will be tried again", "dir", s.dir, "error", err)
		},
		// Pebble would end the process whenever it reads a damaged block, and a hub would do so again after each restart. The
		// read fails, which loses nothing: whatever does not need the block goes on.
		DataCorruption: func(info pebble.DataCorruptionInfo) {
			s.metrics.damaged.Inc()
			s.log.Error("a file of the store is damaged: what needs it fails; restore a backup", "path", info.Path, "error", info.Details)
		},
		DiskSlow: func(info pebble.DiskSlowInfo) {
			s.metrics.slowDisk.Inc()
			s.log.Warn("the disk is slow", "dir", s.dir, "path", info.Path, "duration", info.Duration)
		},
	}
	return o
}

// pebbleLogger stands between Pebble and the hub. Pebble ends the process through Fatalf on errors of the write-ahead log
// and of the manifest; if a logger returned instead, a lost write would be reported as success.
type pebbleLogger struct{ s *Store }

func (pebbleLogger) Infof(string, ...any) {}

func (l pebbleLogger) Errorf(format string, args ...any) {
	l.s.log.Warn("pebble: "+fmt.Sprintf(format, args...), "dir", l.s.dir)
}

func (l pebbleLogger) Fatalf(format string, args ...any) {
	l.s.fail(fmt.Errorf(format, args...))
	select {} // never return to Pebble, even if Fatal did
}

// fail makes the store refuse everything from now on, answers all who wait, and ends the process through Fatal.
func (s *Store) fail(err error) {
	s.failOnce.Do(func() {
		s.failure.Store(&err)
		close(s.failed)
		s.fatal(err)
	})
}

// broken is what callers get once the store failed. Whether their write reached the disk is not known: the process is about
// to end, and whoever reads the log after the restart finds out.
func (s *Store) broken() error {
	return hub.NewError(hub.Unavailable, "store-failed", "the store failed, the hub restarts").
		With("pebblestore", *s.failure.Load())
}

var errClosed = hub.NewError(hub.Unavailable, "store-closed", "the hub is stopping")

// LogID names this log.
func (s *Store) LogID() string { return s.logID }

// Close finishes what waits, and closes the store. Afterwards all calls are refused with hub.Unavailable, and iterations end
// with it. A store that failed is not closed, since its disk does not answer: Close returns the failure.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closing {
		s.mu.Unlock()
		return nil
	}
	s.closing = true
	s.mu.Unlock()
	s.poke()
	select {
	case <-s.committer:
	case <-s.failed:
		return s.broken()
	}
	s.mu.Lock()
	v := s.view
	s.view = nil
	if s.moved != nil { // whoever waits for the feed learns that nothing comes any more
		close(s.moved)
		s.moved = nil
	}
	s.mu.Unlock()
	s.readers.Wait() // bounded: nobody keeps a view while a caller works
	s.metrics.unregister()
	return errors.Join(v.snap.Close(), s.db.Close(), s.lock.Close())
}

// DiskBytes is the space the store takes on disk, without the ballast.
func (s *Store) DiskBytes(context.Context) (uint64, error) {
	v, err := s.acquire() // keeps the database open meanwhile
	if err != nil {
		return 0, err
	}
	defer func() { _ = s.release(v) }()
	return s.db.Metrics().DiskSpaceUsage(), nil
}
