package resourcedirectory

import (
	"context"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// onlineIndex is the collection of devices that may be online: one document a device that signed in, with the run of the
// process that took it. A start looks there for the sessions of former processes instead of reading the whole fleet.
const onlineIndex = "online"

// markOnline puts the device into the index of this run. It is written once a run, not once a session.
func (d *Directory) markOnline(ctx context.Context, dev hub.DeviceID) error {
	for {
		doc, err := d.store.Get(ctx, onlineIndex, string(dev))
		if err != nil {
			return err
		}
		if doc.Rev != 0 && string(doc.Value) == d.run {
			return nil
		}
		doc = store.Doc{Key: string(dev), Value: []byte(d.run), Rev: doc.Rev}
		_, err = d.store.Put(ctx, onlineIndex, doc)
		if !hub.IsKind(err, hub.Conflict) { // Conflict: endFormerSessions deleted it, or another sign-in was faster
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// endFormerSessions sets the devices offline whose sessions ended with former processes. It goes on until all are, also
// over an outage of the store.
func (d *Directory) endFormerSessions(ctx context.Context) {
	const (
		together = 64 // share the batches of the log, and leave room in the queues for living devices
		pause    = 5 * time.Second
	)
	for {
		var left int
		var err error
		batch := make([]store.Doc, 0, together)
		flush := func() {
			left += d.endSessions(ctx, batch)
			batch = batch[:0]
		}
		for doc, e := range d.store.Range(ctx, onlineIndex, "", "") {
			if err = e; err != nil || ctx.Err() != nil {
				break
			}
			if string(doc.Value) == d.run {
				continue
			}
			if batch = append(batch, doc); len(batch) == together {
				flush()
			}
		}
		flush()
		d.metrics.former.Set(float64(left))
		switch {
		case ctx.Err() != nil, err == nil && left == 0:
			return
		case err != nil:
			d.log.Warn("devices of former processes cannot be listed, trying again", "error", err)
		default:
			d.log.Warn("devices of former processes cannot be set offline, trying again", "devices", left)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// endSessions returns how many could not be ended.
func (d *Directory) endSessions(ctx context.Context, docs []store.Doc) int {
	var wait sync.WaitGroup
	failed := make([]bool, len(docs))
	for i, doc := range docs {
		wait.Go(func() { failed[i] = d.endSession(ctx, doc) != nil })
	}
	wait.Wait()
	n := 0
	for _, f := range failed {
		if f {
			n++
		}
	}
	return n
}

// endSession sets a device offline if it is online in a session of a former process.
func (d *Directory) endSession(ctx context.Context, doc store.Doc) error {
	dev := hub.DeviceID(doc.Key)
	s, err := d.read(ctx, dev)
	if err != nil {
		return err
	}
	// A sign-in writes the index before its commit. So if the document is still a former run's after the read, the session
	// in s is a former process's, and a session that came since has a higher number.
	now, err := d.store.Get(ctx, onlineIndex, doc.Key)
	if err != nil || now.Rev != doc.Rev {
		return err
	}
	if s.meta.Connection.Online {
		if err := d.do(ctx, offline(hub.Stamp{Device: dev, Session: s.session})); err != nil {
			return err
		}
	}
	if err := d.store.Delete(ctx, onlineIndex, doc.Key, doc.Rev); err != nil && !hub.IsKind(err, hub.Conflict) {
		return err
	}
	return nil
}
