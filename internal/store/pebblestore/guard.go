package pebblestore

import (
	"fmt"
	"strings"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// guard is the file system as Pebble sees it: once the database is open, an error of a write-ahead log's file ends the
// process before Pebble learns of it. Pebble itself calls Fatalf for most of them, but panics with its mutex unlocked when it
// cannot change to a new log file, and the runtime then dies of the mutex without a word about the disk.
type guard struct {
	vfs.FS
	s *Store
}

func (g guard) Create(name string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.Create(name, c)
	return g.file(f, name, err)
}

func (g guard) ReuseForWrite(from, to string, c vfs.DiskWriteCategory) (vfs.File, error) {
	f, err := g.FS.ReuseForWrite(from, to, c)
	return g.file(f, to, err)
}

func (g guard) file(f vfs.File, name string, err error) (vfs.File, error) {
	// A checkpoint's copy of a log is in a folder of its own, and may fail.
	if !strings.HasSuffix(name, ".log") || g.PathDir(name) != g.PathJoin(g.s.dir) {
		return f, err
	}
	if err := g.check(name, err); err != nil {
		return nil, err
	}
	return guarded{f, g, name}, nil
}

// check does not return an error once the database is open.
func (g guard) check(name string, err error) error {
	if err != nil && g.s.opened.Load() {
		g.s.fail(fmt.Errorf("write-ahead log %s: %w", name, err))
		select {} // never return to Pebble, even if Fatal did
	}
	return err
}

// guarded is one file of the write-ahead log.
type guarded struct {
	vfs.File
	g    guard
	name string
}

func (f guarded) Write(p []byte) (int, error) {
	n, err := f.File.Write(p)
	return n, f.g.check(f.name, err)
}

func (f guarded) Sync() error     { return f.g.check(f.name, f.File.Sync()) }
func (f guarded) SyncData() error { return f.g.check(f.name, f.File.SyncData()) }
func (f guarded) Close() error    { return f.g.check(f.name, f.File.Close()) }

func (f guarded) SyncTo(length int64) (full bool, err error) {
	full, err = f.File.SyncTo(length)
	return full, f.g.check(f.name, err)
}
