package bundle

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"strings"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// Verify checks every invariant of a hub's data, on a consistent copy when the hub runs: those of the store (seqs without
// holes, a feed that refers to what is there, documents not newer than their log) and that each device is what its events
// say. Problems are reported as they are found, and progress (nil: none) counts the devices once
// the store itself was checked. The error says that it could not look.
func Verify(ctx context.Context, data string, report func(problem string), progress Progress) (devices int, err error) {
	// What the disk does not give back is damage found, and no reason not to look at the rest.
	unreadable := func(what string, err error) error {
		if code, _ := hub.Public(err); code != "store-read-failed" || ctx.Err() != nil {
			return fmt.Errorf("verify %s: %w", what, err)
		}
		detail, _, _ := strings.Cut(err.Error(), "\n") // Pebble's go on with a stack
		report(what + " cannot be read to the end, restore a backup: " + detail)
		return nil
	}
	err = withCheckpoint(ctx, data, func(dir string) (err error) {
		s, err := pebblestore.Open(dir, pebblestore.Options{MinFree: -1})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		if err := s.Verify(ctx, func(p pebblestore.Problem) { report(p.Where + ": " + p.What) }); err != nil {
			if err := unreadable("the store", err); err != nil {
				return err
			}
		}
		var st store.Store = s
		if progress != nil {
			counted := &countedDevices{Store: s, progress: progress}
			for _, err := range s.Devices(ctx, "") {
				if err != nil {
					return fmt.Errorf("count the devices: %w", err)
				}
				counted.total++
			}
			progress(0, counted.total)
			st = counted
		}
		devices, err = resourcedirectory.Verify(ctx, st, func(dev hub.DeviceID, problem string) {
			report("device " + string(dev) + ": " + problem)
		})
		if err != nil {
			return unreadable("the devices", err)
		}
		return nil
	})
	return devices, err
}

// countedDevices is a store that tells how far somebody is who goes through its devices.
type countedDevices struct {
	store.Store
	progress Progress
	total    int64
}

// Devices is of store.Store.
func (c *countedDevices) Devices(ctx context.Context, last hub.DeviceID) iter.Seq2[hub.DeviceID, error] {
	return func(yield func(hub.DeviceID, error) bool) {
		var done int64
		for dev, err := range c.Store.Devices(ctx, last) {
			if !yield(dev, err) {
				return
			}
			done++
			c.progress(done, c.total)
		}
	}
}
