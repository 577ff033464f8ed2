package pebblestore

import (
	"context"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"

	"github.com/coaphub/coaphub/hub"
)

// Checkpoint makes a consistent copy of the running store in dir, which must not exist. Everything acknowledged before the
// call is in it. Files that do not change any more are linked, so that it is fast and small on the same file system; a
// backup copies them from there. The copy has the log ID of the original: use Renew before it serves in its place.
func (s *Store) Checkpoint(ctx context.Context, dir string) error {
	return s.read(ctx, "Checkpoint", func(*view) error {
		if _, err := s.fs.Stat(dir); err == nil {
			return hub.NewError(hub.Precondition, "backup-exists", "the folder for the copy exists already").
				With("pebblestore.Checkpoint", errors.New(dir))
		}
		if err := s.db.Checkpoint(dir, pebble.WithFlushedWAL()); err != nil {
			return fmt.Errorf("copy the store to %s: %w", dir, err)
		}
		return nil
	})
}

// Renew gives the store in dir, a restored copy, a new log ID: what was written after the copy was made is not in it, so that
// cursors into the original must not go on here. They are answered as lagged.
func Renew(dir string) error {
	s, err := Open(dir, Options{MinFree: -1})
	if err != nil {
		return err
	}
	if err := s.db.Set(metaLogID, []byte(newLogID()), pebble.Sync); err != nil {
		return errors.Join(fmt.Errorf("renew the log ID of %s: %w", dir, err), s.Close())
	}
	return s.Close()
}
