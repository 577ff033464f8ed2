package resourcedirectory

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/clock"
	"github.com/coaphub/coaphub/internal/store"
)

const (
	// neverYounger is longer than any request may take: a commit that is younger still fences a paused writer.
	neverYounger = 10 * time.Minute
	// trimEvery is how often the trimmer works, at most trimDevices devices or trimBudget each time, so that it never competes
	// with the fleet for long.
	trimEvery   = 5 * time.Second
	trimDevices = 256
	trimBudget  = 250 * time.Millisecond
	// trimDocs bounds the base documents of one step; the store takes 16 MiB.
	trimDocs = 6 << 20
	// passEvery is the pause from one pass over all devices to the next.
	passEvery = time.Minute
	// trimSteps divides what is kept: a device is trimmed once a sixteenth of it can go, since each time reads its bases.
	trimSteps = 16
	// leap is how far the clock may run ahead of the time that has passed. Beyond it somebody set it, rightly or not, and for
	// as long as mistrust nothing is trimmed: a clock that is set wrong by a year must not cost a year of history before it is
	// set right again. Tokens are doubted by the same measure (internal/clock).
	leap     = clock.Leap
	mistrust = clock.Mistrust
	// adaptEvery is how long the back end gets to give back the space of what was removed.
	adaptEvery = 5 * time.Minute
)

// trim removes what is older than retention, device by device, until ctx ends.
func (d *Directory) trim(ctx context.Context) {
	t := &trimmer{d: d, keep: d.cfg.History.Retention}
	start := time.Now()
	d.metrics.kept.Set(t.keep.Seconds())
	next := time.NewTimer(trimEvery)
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-next.C:
			if err := t.step(ctx, now, time.Since(start)); err != nil && ctx.Err() == nil {
				d.log.Warn("history cannot be trimmed, trying again", "device", t.next, "error", err)
			}
			if t.next == "" {
				next.Reset(passEvery)
			} else {
				next.Reset(trimEvery)
			}
		}
	}
}

// trimmer walks through all devices in ID order, over and over.
type trimmer struct {
	d       *Directory
	keep    time.Duration // at most retention; less while the store is over maxBytes
	next    hub.DeviceID  // the pass goes on after it
	day     uint32        // the feed was trimmed before this day
	adapted time.Time     // when keep was last looked at

	// What the clock said at the last step, when that was, and until when it is not trusted; the last two on monotonic time.
	clock        time.Time
	seen, doubts time.Duration
}

// step does a piece of a pass. now is what the clock says, up how long the trimmer has been running.
func (t *trimmer) step(ctx context.Context, now time.Time, up time.Duration) error {
	if !t.trusts(now, up) {
		return nil
	}
	if t.next == "" {
		t.adapt(ctx, now)
		if err := t.feed(ctx, now); err != nil {
			return err
		}
	}
	begin, n := time.Now(), 0
	for dev, err := range t.d.store.Devices(ctx, t.next) {
		if err != nil {
			return fmt.Errorf("list devices: %w", err)
		}
		if n++; n > trimDevices || time.Since(begin) > trimBudget {
			return nil
		}
		t.next = dev          // also when it fails: one damaged device must not stop the others
		if !t.d.serves(dev) { // whoever does trims it
			continue
		}
		if _, err := t.d.trimDevice(ctx, dev, now, t.keep); err != nil {
			return err
		}
	}
	t.next = ""
	return nil
}

// trusts reports whether the clock goes as time does. What it said at the start is believed: there is nothing to compare with.
func (t *trimmer) trusts(now time.Time, up time.Duration) bool {
	now = now.Round(0) // Sub must not use the monotonic time in it
	if ahead := now.Sub(t.clock) - (up - t.seen); !t.clock.IsZero() && ahead > leap {
		t.doubts = up + mistrust
		t.d.log.Warn("the clock was set forward: history is not trimmed until it has proved right", "by", ahead, "for", mistrust)
	}
	t.clock, t.seen = now, up
	return up >= t.doubts
}

// adapt shortens what is kept while the store is over its limit, and lengthens it again when there is room. It runs between
// passes, so that what one pass freed is seen before the next step.
//
// In a cluster each directory does so for the devices it serves, by the size of the whole store: all come to about the same.
func (t *trimmer) adapt(ctx context.Context, now time.Time) {
	if now.Sub(t.adapted) < adaptEvery {
		return
	}
	t.adapted = now
	limit, whole := t.d.cfg.History.MaxBytes, t.d.cfg.History.Retention
	sizer, ok := t.d.store.(store.Sizer)
	if limit == 0 || !ok {
		return
	}
	bytes, err := sizer.DiskBytes(ctx)
	if err != nil {
		t.d.log.Warn("the store does not say how large it is: history is kept as long as before", "error", err)
		return
	}
	size := int64(bytes)
	before := t.keep
	switch {
	case size > limit:
		t.keep = max(t.keep/4*3, neverYounger)
	case size < limit/10*9:
		t.keep = min(t.keep/4*5, whole)
	}
	switch {
	case before == whole && t.keep < whole:
		t.d.log.Error("history is shorter than configured: the store is over history.maxBytes",
			"bytes", size, "maxBytes", limit, "retention", whole, "kept", t.keep)
	case before < whole && t.keep == whole:
		t.d.log.Info("history is as long as configured again", "bytes", size, "retention", whole)
	}
	shortened := 0.0
	if t.keep < whole {
		shortened = 1
	}
	t.d.metrics.shortened.Set(shortened)
	t.d.metrics.kept.Set(t.keep.Seconds())
}

// feed removes the days of the feed that are wholly older than what is kept.
func (t *trimmer) feed(ctx context.Context, now time.Time) error {
	day := uint32(max(0, now.Add(-t.keep).Unix()/(24*60*60)))
	if day <= t.day {
		return nil
	}
	if err := t.d.store.TrimFeed(ctx, day); err != nil {
		return fmt.Errorf("trim the feed: %w", err)
	}
	t.day = day
	return nil
}

// trimDevice removes the device's commits that are older than keep and returns how many. It keeps the newest one, and moves
// the values that the removed ones brought into the bases first, in the same batch.
func (d *Directory) trimDevice(ctx context.Context, dev hub.DeviceID, now time.Time, keep time.Duration) (int, error) {
	edge := now.Add(-max(keep, neverYounger))
	enough, err := d.store.SeqAt(ctx, dev, edge.Add(-keep/trimSteps))
	if err != nil || enough == 0 {
		return 0, err
	}
	for first, err := range d.store.Commits(ctx, dev, 0) {
		if err != nil {
			return 0, err
		}
		if first.Seq >= enough {
			return 0, nil // the newest commit alone is left: an idle device costs no more than this
		}
		break
	}
	upTo, err := d.store.SeqAt(ctx, dev, edge)
	if err != nil {
		return 0, err
	}
	st, err := d.store.Load(ctx, dev)
	if err != nil {
		return 0, err
	}
	// What no document contains is not trimmed. Its writer may be gone without anybody asking for the device since: the next pass
	// finds it folded.
	if _, err := d.codec.fold(ctx, d.store, dev, &st); err != nil {
		return 0, err
	}
	upTo = min(upTo, st.LastSeq-1, st.FoldedTo)
	s, err := d.codec.read(dev, st.Docs, basePrefix)
	if err != nil {
		return 0, err
	}
	var (
		changed []string
		size    int
		total   int
		flushed = s.seq
	)
	flush := func() error {
		if s.seq == flushed {
			return nil
		}
		docs, err := d.codec.docs(s, changed, basePrefix)
		if err != nil {
			return err
		}
		if err := d.store.Trim(ctx, dev, s.seq+1, docs); err != nil {
			return fmt.Errorf("trim device: %w", err)
		}
		d.metrics.trimmed.Add(float64(s.seq - flushed))
		total += int(s.seq - flushed)
		changed, size, flushed = nil, 0, s.seq
		return nil
	}
	for c, err := range d.store.Commits(ctx, dev, s.seq+1) {
		if err != nil {
			return total, err
		}
		if c.Seq > upTo {
			break
		}
		if c.Seq != s.seq+1 {
			return total, &hub.Error{Kind: hub.Internal, Op: "directory.trimDevice", Err: errors.New("the log has a hole")}
		}
		var keys []string
		s, keys = s.fold(&c)
		changed = append(changed, keys...)
		for i := range c.Events {
			size += eventSize(&c.Events[i]) + s.linkBytes/linkPages*len(c.Events[i].Links)
		}
		if size > d.trimDocs {
			if err := flush(); err != nil {
				return total, err
			}
		}
	}
	return total, flush()
}
