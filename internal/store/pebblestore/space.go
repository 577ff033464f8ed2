package pebblestore

import (
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coaphub/coaphub/hub"
)

const (
	defaultMinFree = 128 << 20
	// ballastBytes is the size of a file that only takes up space. It is given back when the disk is nearly full, so that
	// the store can still be opened, read and trimmed then: all of these need to write a little.
	ballastBytes = 32 << 20
	ballastName  = "ballast"
	// spaceInterval is how often the free space is asked for. What can be written meanwhile has to fit into MinFree; if
	// somebody else fills the disk faster, the write-ahead log fails and the hub restarts into refusing.
	spaceInterval = time.Second
)

// space watches the free space of the disk, so that writes can be refused before they fail: a failed write of the log ends
// the process, a refused one is only told "later".
type space struct {
	fs      vfs.FS
	ballast string
	dir     string
	log     *slog.Logger
	minFree int64
	full    *atomic.Bool
	free    *atomic.Uint64 // for the metric
}

func newSpace(fs vfs.FS, dir string, log *slog.Logger, minFree int64) space {
	if minFree == 0 {
		minFree = defaultMinFree
	}
	return space{
		fs: fs, dir: dir, ballast: fs.PathJoin(dir, ballastName), log: log, minFree: minFree,
		full: new(atomic.Bool), free: new(atomic.Uint64),
	}
}

var errDiskFull = hub.NewError(hub.Unavailable, "disk-full", "the hub's disk is full, reading goes on").
	With("pebblestore", nil)

// refuse returns the error for writes while the disk is nearly full.
func (sp space) refuse() error {
	if sp.full.Load() {
		return errDiskFull
	}
	return nil
}

// Full reports whether writes are refused because the disk is nearly full. Reads go on.
func (s *Store) Full() bool { return s.space.full.Load() }

// prepare makes room before the database is opened.
func (sp space) prepare() { sp.check() }

// check asks for the free space and sets the switch. Only one goroutine calls it at a time: Open's, then the committer.
func (sp space) check() {
	if sp.minFree < 0 {
		return
	}
	usage, err := sp.fs.GetDiskUsage(sp.dir)
	if errors.Is(err, vfs.ErrUnsupported) {
		return // an in-memory file system
	}
	if err != nil {
		sp.log.Warn("the free space of the disk cannot be read", "dir", sp.dir, "error", err)
		return
	}
	free := usage.AvailBytes
	sp.free.Store(free)
	low := free < uint64(sp.minFree)
	if was := sp.full.Swap(low); was != low {
		if low {
			sp.log.Error("the disk is nearly full: writes are refused until there is room", "dir", sp.dir, "free", free, "needed", sp.minFree)
		} else {
			sp.log.Info("the disk has room again: writes go on", "dir", sp.dir, "free", free)
		}
	}
	_, err = sp.fs.Stat(sp.ballast)
	switch have := err == nil; {
	case low && have:
		if err := sp.fs.Remove(sp.ballast); err != nil {
			sp.log.Warn("the ballast file cannot be removed", "path", sp.ballast, "error", err)
		}
	case !have && free > uint64(sp.minFree)+4*ballastBytes:
		if err := sp.makeBallast(); err != nil {
			sp.log.Warn("the ballast file cannot be written", "path", sp.ballast, "error", errors.Join(err, sp.fs.Remove(sp.ballast)))
		}
	}
}

// makeBallast reserves real blocks; a file with a hole would give nothing back.
func (sp space) makeBallast() error {
	f, err := sp.fs.Create(sp.ballast, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	return errors.Join(f.Preallocate(0, ballastBytes), f.Close())
}
