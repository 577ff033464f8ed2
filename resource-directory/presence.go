package resourcedirectory

import (
	"context"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// onlineIndex is the collection of devices that may be online: one document a device that signed in, with who ends its session when
// its process is gone (see Directory.keeper). A start looks there for the sessions of former processes instead of reading the whole fleet.
const onlineIndex = "online"

// maxMarked bounds what is remembered of the marks of this run; beyond, they are looked up again.
const maxMarked = 16 << 10

// marked remembers what the indexes have of which devices, in a directory that is the only one: nobody else takes them out or changes that.
type marked struct {
	mu sync.Mutex
	as map[string]string // what was written, by index and device
}

func (m *marked) has(key, as string) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	was, ok := m.as[key]
	return ok && was == as
}

func (m *marked) add(key, as string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.as == nil || len(m.as) >= maxMarked {
		m.as = map[string]string{}
	}
	m.as[key] = as
}

// mark puts the device into an index, as somebody's. It is written once, not each time. One of several directories looks each time: another,
// who took itself for the device's home, may have changed it a moment ago, and a session that the index has as another gateway's would
// stay online after its own is gone.
func (d *Directory) mark(ctx context.Context, index string, dev hub.DeviceID, as string) (err error) {
	if d.apart != nil && index == onlineIndex {
		d.apart.names(as)
	}
	key := index + " " + string(dev)
	if d.apart == nil && d.marked.has(key, as) {
		return nil
	}
	defer func() {
		if err == nil && d.apart == nil {
			d.marked.add(key, as)
		}
	}()
	for {
		doc, err := d.store.Get(ctx, index, string(dev))
		if err != nil {
			return err
		}
		if doc.Rev != 0 && string(doc.Value) == as {
			return nil
		}
		doc = store.Doc{Key: string(dev), Value: []byte(as), Rev: doc.Rev}
		_, err = d.store.Put(ctx, index, doc)
		if !hub.IsKind(err, hub.Conflict) { // Conflict: former deleted it, or another request was faster
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
	}
}

// remark has the index name the gateway of the device's current session, where there are several: what marked the device before its commit
// may have been overtaken by another's mark, and an old session that is told of again marks it too. Who commits last looks last.
func (d *Directory) remark(ctx context.Context, dev hub.DeviceID) {
	if d.apart == nil {
		return
	}
	for {
		s, err := d.read(ctx, dev)
		if err == nil && s.meta.Connection.Online {
			err = d.mark(ctx, onlineIndex, dev, d.keeper(s.meta.Connection.Service))
		}
		if err != nil {
			d.log.Warn("nobody may notice when this device's gateway is gone", "device", dev, "error", err)
			return
		}
		if now, err := d.read(ctx, dev); err != nil || now.session == s.session {
			return
		}
	}
}

// former does what is to be done for the devices that those left in an index who are gone, as far as they are the directory's. It goes on
// until all are done, also over an outage of the store.
func (d *Directory) former(
	ctx context.Context, index string, waiting prometheus.Gauge, failed string, gone func(string) bool, do former,
) {
	const (
		together = 64 // share the batches of the log, and leave room in the queues for living devices
		pause    = 5 * time.Second
	)
	for {
		var left int
		var err error
		batch := make([]store.Doc, 0, together)
		flush := func() {
			left += d.formerBatch(ctx, index, batch, do)
			batch = batch[:0]
		}
		for doc, e := range d.store.Range(ctx, index, "", "") {
			if err = e; err != nil || ctx.Err() != nil {
				break
			}
			if !d.serves(hub.DeviceID(doc.Key)) || !gone(string(doc.Value)) {
				continue
			}
			if batch = append(batch, doc); len(batch) == together {
				flush()
			}
		}
		flush()
		if index == onlineIndex && !d.sure() {
			left++ // some may have been passed over because nobody could say who is gone
		}
		waiting.Set(float64(left))
		switch {
		case ctx.Err() != nil, err == nil && left == 0:
			return
		case err != nil:
			d.log.Warn("devices of former processes cannot be listed, trying again", "error", err)
		default:
			d.log.Warn(failed, "devices", left)
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// former is what is done for one device; forget reports that its document is not needed any more.
type former func(ctx context.Context, doc store.Doc) (forget bool, err error)

// formerBatch returns how many could not be done.
func (d *Directory) formerBatch(ctx context.Context, index string, docs []store.Doc, do former) int {
	var wait sync.WaitGroup
	failed := make([]bool, len(docs))
	for i, doc := range docs {
		wait.Go(func() {
			forget, err := do(ctx, doc)
			if err == nil && forget {
				// The revision says that nobody marked the device since the document was read.
				if err = d.store.Delete(ctx, index, doc.Key, doc.Rev); hub.IsKind(err, hub.Conflict) {
					err = nil
				}
			}
			failed[i] = err != nil
		})
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

// endSession sets a device offline if it is online in a session of a process that is gone.
func (d *Directory) endSession(ctx context.Context, doc store.Doc) (forget bool, err error) {
	dev := hub.DeviceID(doc.Key)
	s, err := d.read(ctx, dev)
	if err != nil {
		return false, err
	}
	// A sign-in writes the index before its commit. So if the document is still theirs after the read, the session in s is a process's
	// that is gone, and a session that came since has a higher number.
	now, err := d.store.Get(ctx, onlineIndex, doc.Key)
	if err != nil || now.Rev != doc.Rev {
		return false, err
	}
	if s.meta.Connection.Online {
		if d.apart != nil && !d.gone(s.meta.Connection.Service) {
			return false, nil // the document is older than what another directory wrote
		}
		if err := d.do(ctx, offline(hub.Stamp{Device: dev, Session: s.session})); err != nil {
			return false, err
		}
	}
	return true, nil
}

// findCommands loads a device that may have commands, so that they end at their time. Of those that have none the index
// forgets.
func (d *Directory) findCommands(ctx context.Context, doc store.Doc) (forget bool, err error) {
	dev := hub.DeviceID(doc.Key)
	s, err := d.read(ctx, dev)
	if err != nil || len(s.commands) == 0 {
		return err == nil, err
	}
	nothing := func(*state, int64) ([]hub.Event, error) { return nil, nil }
	return false, d.do(ctx, &request{dev: dev, op: "directory.findCommands", decide: nothing})
}
