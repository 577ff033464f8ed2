package bundle

import (
	"context"
	"errors"
	"fmt"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// Verify checks every invariant of a hub's data, on a consistent copy when the hub runs: those of the store (seqs without
// holes, a feed that refers to what is there, documents not newer than their log) and that each device is what its events
// say. Problems are reported as they are found; the error says that it could not look.
func Verify(ctx context.Context, data string, report func(problem string)) (devices int, err error) {
	err = withCheckpoint(ctx, data, func(dir string) (err error) {
		s, err := pebblestore.Open(dir, pebblestore.Options{MinFree: -1})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		if err := s.Verify(ctx, func(p pebblestore.Problem) { report(p.Where + ": " + p.What) }); err != nil {
			return fmt.Errorf("verify the store: %w", err)
		}
		devices, err = resourcedirectory.Verify(ctx, s, func(dev hub.DeviceID, problem string) {
			report("device " + string(dev) + ": " + problem)
		})
		if err != nil {
			return fmt.Errorf("verify the devices: %w", err)
		}
		return nil
	})
	return devices, err
}
