package resourcedirectory

import (
	"context"
	"errors"
	"iter"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// errTrimmed says that the trimmer was faster than a reader of bases and log: read again.
var errTrimmed = errors.New("the log was trimmed while it was read")

// DeviceAt returns the device as it was at t: NotFound if it had no owner's stamp then, or t is before what retention kept.
func (d *Directory) DeviceAt(ctx context.Context, owner hub.Owner, dev hub.DeviceID, t time.Time) (*hub.Device, error) {
	const op = "directory.DeviceAt"
	at := t.UnixNano()
	s, err := d.read(ctx, dev)
	if err == nil && s.time > at {
		s, err = d.replay(ctx, dev, func(c *hub.Commit) bool { return c.Time <= at })
		if err == nil && s.time > at {
			// The base is younger than t: what was before it is gone.
			return nil, &hub.Error{Kind: hub.NotFound, Op: op, Code: "history-trimmed", Text: "this is before what history keeps"}
		}
	}
	if err != nil {
		return nil, wrap(op, err)
	}
	if owner == "" || s.owner != owner {
		return nil, &hub.Error{Kind: hub.NotFound, Op: op}
	}
	return s.picture(), nil
}

// replay folds the commits that more accepts, up to the first that it does not, onto the device's base.
func (d *Directory) replay(ctx context.Context, dev hub.DeviceID, more func(*hub.Commit) bool) (*state, error) {
	for try := 0; ; try++ {
		s, err := d.replayOnce(ctx, dev, more)
		// Each trim moves the edge far, so losing this race several times means that something else is wrong.
		if try < 4 && errors.Is(err, errTrimmed) {
			continue
		}
		return s, err
	}
}

func (d *Directory) replayOnce(ctx context.Context, dev hub.DeviceID, more func(*hub.Commit) bool) (*state, error) {
	st, err := d.store.Load(ctx, dev)
	if err != nil {
		return nil, err
	}
	s, err := d.codec.read(dev, st.Docs, basePrefix)
	if err != nil {
		return nil, err
	}
	for c, err := range d.store.Commits(ctx, dev, s.seq+1) {
		switch {
		case err != nil:
			return nil, err
		case c.Seq != s.seq+1:
			return nil, errTrimmed
		case !more(&c):
			return s, nil
		}
		s, _ = s.fold(&c)
	}
	return s, nil
}

// History yields the commits of the device that carry owner's stamp and are newer than after (zero: from the start), in
// order. An error is the last element.
func (d *Directory) History(
	ctx context.Context, owner hub.Owner, dev hub.DeviceID, after time.Time,
) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		var from uint64
		if owner != "" && !after.IsZero() {
			seq, err := d.store.SeqAt(ctx, dev, after)
			if err != nil {
				yield(hub.Commit{}, wrap(opHistory, err))
				return
			}
			from = seq + 1
		}
		for c, err := range d.historyFrom(ctx, owner, dev, from) {
			if !yield(c, err) {
				return
			}
		}
	}
}

const opHistory = "directory.History"

// historyFrom is History from a seq on.
func (d *Directory) historyFrom(ctx context.Context, owner hub.Owner, dev hub.DeviceID, from uint64) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		if owner == "" {
			return
		}
		for c, err := range d.store.Commits(ctx, dev, from) {
			if err != nil {
				yield(hub.Commit{}, wrap(opHistory, err))
				return
			}
			if c.Owner == owner && !yield(c, nil) {
				return
			}
		}
	}
}
