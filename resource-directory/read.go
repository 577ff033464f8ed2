package resourcedirectory

import (
	"bytes"
	"cmp"
	"context"
	"iter"
	"slices"

	"github.com/coaphub/coaphub/hub"
)

// Device returns the current picture of a device if owner's stamp is on it, else NotFound.
func (d *Directory) Device(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (*hub.Device, error) {
	const op = "directory.Device"
	s, err := d.read(ctx, dev)
	if err != nil {
		return nil, wrap(op, err)
	}
	if owner == "" || s.owner != owner {
		return nil, &hub.Error{Kind: hub.NotFound, Op: op}
	}
	return s.picture(), nil
}

// Devices yields pictures of those of the given devices that carry owner's stamp, in ID order, each once. An error is the
// last element.
func (d *Directory) Devices(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return func(yield func(*hub.Device, error) bool) {
		if !slices.IsSorted(ids) {
			ids = slices.Clone(ids)
			slices.Sort(ids)
		}
		for i, id := range ids {
			if i > 0 && id == ids[i-1] {
				continue
			}
			dev, err := d.Device(ctx, owner, id)
			if hub.IsKind(err, hub.NotFound) {
				continue
			}
			if !yield(dev, err) || err != nil {
				return
			}
		}
	}
}

// ETags returns the newest ETags of the device's resources, newest first, each once, at most limit.
func (d *Directory) ETags(ctx context.Context, dev hub.DeviceID, limit int) ([][]byte, error) {
	s, err := d.read(ctx, dev)
	if err != nil {
		return nil, wrap("directory.ETags", err)
	}
	var twins []*twin
	for t := range s.twins.all() {
		if len(t.ETag) > 0 {
			twins = append(twins, t)
		}
	}
	slices.SortFunc(twins, func(a, b *twin) int {
		return cmp.Or(cmp.Compare(b.Seq, a.Seq), cmp.Compare(b.index, a.index))
	})
	var out [][]byte
	for _, t := range twins {
		if len(out) >= limit {
			break
		}
		if !slices.ContainsFunc(out, func(e []byte) bool { return bytes.Equal(e, t.ETag) }) {
			out = append(out, t.ETag)
		}
	}
	return out, nil
}

// read returns the device's state on the caller's goroutine: the published one, or the store's without warming the device.
func (d *Directory) read(ctx context.Context, dev hub.DeviceID) (*state, error) {
	if e, ok := d.devices.Load(dev); ok {
		if s := e.(*entry).public.Load(); s != nil {
			return s, nil
		}
	}
	return d.codec.load(ctx, d.store, dev)
}
