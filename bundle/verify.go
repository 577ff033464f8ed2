package bundle

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"path/filepath"
	"strings"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/mongostore"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
	resourcedirectory "github.com/coaphub/coaphub/resource-directory"
)

// Verified is what Verify has looked at.
type Verified struct {
	Tally
	// Digest is equal for hubs that have the same stored, wherever they are kept; see atRest.digest. Empty where something cannot be read,
	// and of a cluster that runs, for there is no moment of all of it.
	Digest string `json:"digest,omitempty"`
}

// Verify checks every invariant of a hub's data, on a consistent copy when the hub runs: those of the store (seqs without
// holes, a feed that refers to what is there, documents not newer than their log) and that each device is what its events
// say. Problems are reported as they are found, and progress (nil: none) counts the devices, twice, once
// the store itself was checked. The error says that it could not look.
func Verify(ctx context.Context, data string, report func(problem string), progress Progress) (v Verified, err error) {
	err = withCheckpoint(ctx, data, func(dir string) (err error) {
		s, err := pebblestore.Open(dir, pebblestore.Options{MinFree: -1})
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, s.Close()) }()
		problems := 0
		said := func(problem string) { problems++; report(problem) }
		if err := s.Verify(ctx, func(p pebblestore.Problem) { said(p.Where + ": " + p.What) }); err != nil {
			if err := unreadable(ctx, "the store", err, said); err != nil {
				return err
			}
		}
		r, err := folderAtRest(ctx, s, filepath.Join(data, keysFolder))
		if err != nil {
			return err
		}
		v, err = r.verify(ctx, true, problems, report, progress)
		return err
	})
	return v, err
}

// VerifyShared is Verify for a cluster's database. Of a hub that runs there is no digest.
func VerifyShared(ctx context.Context, cfg Config, report func(problem string), progress Progress) (v Verified, err error) {
	if err := cfg.Validate(); err != nil {
		return v, err
	}
	e, err := openDatabaseEnd(ctx, cfg, false)
	if err != nil {
		return v, err
	}
	defer func() { err = errors.Join(err, e.close()) }()
	if half, err := e.mark(ctx, mongostore.MarkInto); err != nil || half != nil {
		return v, errors.Join(err, &hub.Error{
			Kind: hub.Precondition, Code: "migration-unfinished", Text: e.where() + " has half of a hub: finish it with coaphub migrate",
		})
	}
	before, err := e.Alive(ctx)
	if err != nil {
		return v, err
	}
	v, err = e.rest().verify(ctx, len(before) == 0, 0, report, progress)
	if err != nil || len(before) > 0 {
		return v, err
	}
	if later, err := e.Alive(ctx); err != nil || len(later) > 0 { // it was started meanwhile
		v.Digest = ""
		return v, err
	}
	return v, nil
}

// unreadable reports what cannot be read: what the disk does not give back is damage found, and no reason not to look at the rest.
func unreadable(ctx context.Context, what string, err error, report func(string)) error {
	if code, _ := hub.Public(err); code != "store-read-failed" && code != "data-damaged" || ctx.Err() != nil {
		return fmt.Errorf("verify %s: %w", what, err)
	}
	detail, _, _ := strings.Cut(err.Error(), "\n") // Pebble's go on with a stack
	report(what + " cannot be read to the end, restore a backup: " + detail)
	return nil
}

// verify checks that each device is what its events say, and weighs what is stored, if nobody changes it. Where there were problems one
// more about what cannot be weighed says nothing new.
func (r *atRest) verify(ctx context.Context, still bool, problems int, report func(string), progress Progress) (v Verified, err error) {
	var kept resourcedirectory.Kept = r
	var count func(int64)
	if progress != nil {
		counted := &countedDevices{Kept: r, progress: progress}
		for _, err := range r.Devices(ctx, "") {
			if err != nil {
				return v, fmt.Errorf("count the devices: %w", err)
			}
			counted.total++
		}
		devices := counted.total
		if still {
			counted.total *= 2
		}
		progress(0, counted.total)
		kept = counted
		count = func(n int64) { progress(devices+n, counted.total) }
	}
	devices, err := resourcedirectory.Verify(ctx, kept, func(dev hub.DeviceID, problem string) {
		problems++
		report("device " + string(dev) + ": " + problem)
	})
	v.Devices = int64(devices)
	if err != nil {
		return v, unreadable(ctx, "the devices", err, report)
	}
	if !still {
		return v, nil
	}
	digest, tally, err := r.digest(ctx, count)
	switch {
	case err == nil:
		v.Digest, v.Tally = digest, tally
	case problems == 0:
		return v, unreadable(ctx, "what is stored", err, report)
	case ctx.Err() != nil:
		return v, ctx.Err()
	}
	return v, nil
}

// countedDevices tells how far somebody is who goes through the devices.
type countedDevices struct {
	resourcedirectory.Kept
	progress Progress
	total    int64
}

// Devices is of resourcedirectory.Kept.
func (c *countedDevices) Devices(ctx context.Context, last hub.DeviceID) iter.Seq2[hub.DeviceID, error] {
	return func(yield func(hub.DeviceID, error) bool) {
		var done int64
		for dev, err := range c.Kept.Devices(ctx, last) {
			if !yield(dev, err) {
				return
			}
			done++
			c.progress(done, c.total)
		}
	}
}
