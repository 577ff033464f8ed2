package coapgateway

import (
	"context"
	"encoding/base64"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// resHref is where a device lists its resources and, if it can, reports all of them at once.
const resHref hub.Href = "/oic/res"

// twin keeps the directory's picture of a session's device up to date: it observes /oic/res in batch, or one resource after
// the other. Its work is done by one goroutine beside the connection's, which exists only while there is work, so that no
// answer to the device ever waits for the device.
type twin struct {
	s    *session
	done sync.WaitGroup // the goroutine, while it runs

	mu      sync.Mutex // guards all below
	running bool
	off     bool // switched off: nothing is asked, and what comes is not stored
	turning bool // being switched off: the goroutine is waited for and does not start
	full    bool // a synchronisation of everything is asked for
	anew    bool // what was observed is observed anew then, and no ETags are sent
	each    bool // resources are observed one by one
	// wait has the links that are to be observed, by href, and order their order; at most MaxLinks, then further ones are
	// left to the next synchronisation.
	wait  map[hub.Href]hub.Link
	order []hub.Href
	// seen has what was observed or read on this session; bounded as wait is.
	seen map[hub.Href]watched
	// over are observations of resources that are not published any more.
	over []*coap.Observation
	// stale is one that was not reported for long, to be asked for; turn is the session's place in the queue for that, set
	// once, nil if it has none.
	stale *coap.Observation
	turn  *turn
	// told has what the device published since the question to it that is under way was asked, and, as nil, what it
	// unpublished. The answer to the question is older than that, whichever of them arrives first. At most MaxLinks; with
	// more, deaf is set, and the answer unpublishes nothing.
	told map[hub.Href]*hub.Link
	deaf bool
	// missing has what did not answer when it was asked, until it does or is unpublished; at most MaxLinks, then further ones
	// are left to the next synchronisation. timer asks for them again; it is set only while the goroutine does not run and
	// something is missing.
	missing map[hub.Href]absent
	// failed has what answered that it cannot be observed now, so that it is tried again; bounded as missing is.
	failed map[hub.Href]absent
	timer  *time.Timer
	behind bool // SYNCING was reported and IN_SYNC not yet
}

// absent is a resource that did not answer, or by an error.
type absent struct {
	link  hub.Link
	tries int       // how often
	due   time.Time // when to ask again
}

// askAgain is how long a resource is left alone that did not answer once, twice, and so on; the last one repeats. A lost
// answer is soon made up for, and what is broken for good costs one request in half an hour.
var askAgain = [...]time.Duration{time.Minute, 5 * time.Minute, 30 * time.Minute}

// watched is a resource that was observed or read.
type watched struct {
	link hub.Link
	obs  *coap.Observation // nil if it was only read
}

func newTwin(s *session, on bool) *twin {
	return &twin{s: s, off: !on, wait: map[hub.Href]hub.Link{}, seen: map[hub.Href]watched{}}
}

func (t *twin) isOff() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.off
}

// turnOff ends all work of the twin and returns the observations that are to be cancelled. It waits for the question that is
// under way.
func (t *twin) turnOff() []*coap.Observation {
	t.mu.Lock()
	t.off, t.turning = true, true
	t.disarm()
	t.mu.Unlock()
	t.done.Wait()
	t.mu.Lock()
	defer t.mu.Unlock()
	t.full, t.anew, t.behind, t.missing, t.failed, t.told, t.stale = false, false, false, nil, nil, nil, nil
	t.wait, t.order = map[hub.Href]hub.Link{}, nil
	t.turning = false
	t.start() // the directory may have to be told something
	return t.takeAll()
}

// turnOn has everything synchronised; anew, also what is observed already.
func (t *twin) turnOn(anew bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.off && !anew {
		return
	}
	t.off, t.full, t.anew = false, true, anew
	t.start()
}

// takeAll takes all observations out of the books. t.mu is held.
func (t *twin) takeAll() []*coap.Observation {
	all := t.over
	for _, w := range t.seen {
		if w.obs != nil {
			all = append(all, w.obs)
		}
	}
	t.over, t.seen = nil, map[hub.Href]watched{}
	return all
}

// resync asks for a synchronisation of everything.
func (t *twin) resync() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.full = !t.off
	t.start()
}

// question begins a question to the device. The twin's goroutine asks one at a time.
func (t *twin) question() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.told, t.deaf = nil, false
}

// tell notes what the device published or, with links that only have an href, unpublished. It is called within the turn of
// the write that stored it: who has the turn later knows of it, and who had it before was overruled by it.
func (t *twin) tell(links []hub.Link, published bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.off {
		return
	}
	for i := range links {
		l := &links[i]
		if _, ok := t.told[l.Href]; !ok && len(t.told) >= t.s.gw.cfg.API.CoAP.MaxLinks {
			t.deaf = true
			continue
		}
		if t.told == nil {
			t.told = map[hub.Href]*hub.Link{}
		}
		t.told[l.Href] = nil
		if published {
			t.told[l.Href] = l
		}
	}
}

// republished reports whether the device may have published a resource since it was asked.
func (t *twin) republished(h hub.Href) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.deaf || t.told[h] != nil
}

// dropped reports whether the device unpublished a resource since it was asked. t.mu is held.
func (t *twin) dropped(h hub.Href) bool {
	l, ok := t.told[h]
	return ok && l == nil
}

// again asks for a resource once more, because what was said of it is outdated.
func (t *twin) again(l hub.Link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if newer := t.told[l.Href]; newer != nil {
		l = *newer
	}
	t.enqueue(l)
}

// published has new resources observed, unless they come with the batch.
func (t *twin) published(links []hub.Link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.each || t.off {
		return // the batch brings them, or the synchronisation that has not got so far yet
	}
	for _, l := range links {
		if w, ok := t.seen[l.Href]; ok && (w.obs != nil || l.Policy&hub.Observable == 0) {
			continue
		}
		delete(t.seen, l.Href) // it was only read, and is observable now
		t.enqueue(l)
	}
	t.start()
}

// ended says that the device ended an observation. After a representation without Observe option (RFC 7641, Section 3.2) the
// resource is there but no longer reported, so it is observed anew; after an error it is, too, but later.
func (t *twin) ended(o *coap.Observation, href hub.Href, batch bool, code codes.Code) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.seen[href]
	if w.obs != o {
		return
	}
	delete(t.seen, href)
	switch {
	case batch:
		t.full = true // whatever the reason: without the batch nothing would be reported any more
	case code>>5 == 2:
		t.enqueue(w.link)
	case code != codes.NotFound: // that one is unpublished
		t.failed = t.later(t.failed, w.link)
	}
	t.start()
}

// lose is ended for an observation of which the device, asked, knows nothing.
func (t *twin) lose(o *coap.Observation) {
	href, err := hub.ParseHref(o.Path())
	if err != nil {
		return
	}
	t.mu.Lock()
	t.over = append(t.over, o)
	t.mu.Unlock()
	t.ended(o, href, t.isBatch(href), codes.Empty)
}

// renew observes anew although the observation is not over: what it brought could not be used.
func (t *twin) renew(o *coap.Observation, href hub.Href, batch bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	w := t.seen[href]
	if w.obs != o {
		return
	}
	t.over = append(t.over, o)
	delete(t.seen, href)
	if batch {
		t.full = true
	} else {
		t.enqueue(w.link)
	}
	t.start()
}

// isBatch reports whether an observation is that of the batch, which has the path of a resource that may also be observed
// for itself.
func (t *twin) isBatch(href hub.Href) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return href == resHref && !t.each
}

func (t *twin) enqueue(l hub.Link) {
	if _, ok := t.wait[l.Href]; !ok {
		if len(t.wait)+len(t.seen) >= t.s.gw.cfg.API.CoAP.MaxLinks {
			t.s.log.Debug("resource is not observed: the session has too many", "href", l.Href)
			return
		}
		if len(t.order) > 2*len(t.wait) { // places of what was unpublished meanwhile
			t.order = slices.DeleteFunc(t.order, func(h hub.Href) bool { _, ok := t.wait[h]; return !ok })
		}
		t.order = append(t.order, l.Href)
	}
	t.wait[l.Href] = l
}

// unpublished forgets resources.
func (t *twin) unpublished(hrefs []hub.Href) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, h := range hrefs {
		delete(t.wait, h) // its place in order is skipped
		delete(t.missing, h)
		delete(t.failed, h)
		if w := t.seen[h]; w.obs != nil {
			t.over = append(t.over, w.obs)
		}
		delete(t.seen, h)
	}
	if len(t.over) > 0 || t.caughtUp() {
		t.start()
	}
}

// silent notes that a resource did not answer, unless the device unpublished it meanwhile.
func (t *twin) silent(l hub.Link) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.dropped(l.Href) {
		t.missing = t.later(t.missing, l)
	}
}

// later puts a resource among those that are asked for again, ever more rarely. t.mu is held.
func (t *twin) later(among map[hub.Href]absent, l hub.Link) map[hub.Href]absent {
	a, known := among[l.Href]
	switch {
	case !known && len(among) >= t.s.gw.cfg.API.CoAP.MaxLinks:
		t.s.log.Debug("a resource is not asked again: the session has too many", "href", l.Href)
		return among
	case among == nil:
		among = map[hub.Href]absent{}
	}
	a.due = time.Now().Add(askAgain[min(a.tries, len(askAgain)-1)])
	a.tries++
	a.link = l
	among[l.Href] = a
	return among
}

// arm sets the timer for what is to be asked again first, in place of the one before. While the device is not in reach that
// is when it is tried again, which may be never: then its next message has everything go on. t.mu is held.
func (t *twin) arm() {
	t.disarm()
	var first time.Time
	for _, among := range []map[hub.Href]absent{t.missing, t.failed} {
		for _, a := range among {
			if first.IsZero() || a.due.Before(first) {
				first = a.due
			}
		}
	}
	if len(t.missing) == 0 {
		t.missing = nil // an idle session keeps no room for it
	}
	if ok, again := t.s.rhythm.inReach(time.Now()); !ok && (t.pending() || !first.IsZero()) {
		if again.IsZero() {
			return
		}
		first = again
	}
	if first.IsZero() {
		return
	}
	t.timer = time.AfterFunc(time.Until(first), t.retry)
}

// disarm stops the timer. t.mu is held.
func (t *twin) disarm() {
	if t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
}

// retry has what is due asked for again.
func (t *twin) retry() {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := time.Now()
	due := func(a absent) bool { return !a.due.After(now) }
	t.askFor(t.missing, due)
	t.askFor(t.failed, due)
	t.start()
}

// askFor has some of what is to be asked for again asked for now. t.mu is held.
func (t *twin) askFor(among map[hub.Href]absent, which func(absent) bool) {
	now := time.Now()
	for h, a := range among {
		if !which(a) {
			continue
		}
		if w := t.seen[h]; w.obs == nil {
			delete(t.seen, h) // it was seen to fail
		}
		if _, waits := t.wait[h]; !waits { // else it was published meanwhile, maybe with another policy
			t.enqueue(a.link)
		}
		// Its answer, or its silence, changes this. Where it is not asked after all, because the session has too many, the
		// timer must not fire over and over.
		a.due = now.Add(askAgain[len(askAgain)-1])
		among[h] = a
	}
}

// pending reports whether something waits to be asked. t.mu is held.
func (t *twin) pending() bool { return t.full || len(t.over) > 0 || len(t.wait) > 0 }

// caughtUp reports that all has answered of which the directory still thinks that something is missing. t.mu is held.
func (t *twin) caughtUp() bool { return t.behind && len(t.missing) == 0 && !t.full && len(t.wait) == 0 }

// stop ends the timer and waits for the goroutine. The session's context is over, so nothing starts any more.
func (t *twin) stop() {
	t.s.gw.quiet.leave(t)
	t.mu.Lock()
	t.disarm()
	t.mu.Unlock()
	t.done.Wait()
}

// start runs the goroutine unless it runs. t.mu is held.
func (t *twin) start() {
	if t.running || t.turning || t.s.ctx.Err() != nil {
		return
	}
	t.running = true
	t.done.Go(func() {
		if !t.s.conn.Guard("twin", t.run) {
			t.s.conn.Close(coap.ErrPanic) // nobody knows what is stored; on its next connection the device reports again
		}
	})
}

func (t *twin) run() {
	for {
		t.mu.Lock()
		var link hub.Link
		var over, stale *coap.Observation
		// What the device must answer waits until it listens; what is for the directory does not.
		reach, _ := t.s.rhythm.inReach(time.Now())
		full, some, synced := t.full && reach, false, false
		contact, news := t.s.rhythm.news(time.Now())
		switch {
		case t.s.ctx.Err() != nil || t.off && !news:
			t.running = false
			t.mu.Unlock()
			return
		case news:
			full = false
		case full:
			t.full = false
		case len(t.over) > 0 && reach:
			over = t.over[0]
			t.over = t.over[1:]
		case t.stale != nil && reach:
			stale, t.stale = t.stale, nil
		default:
			if reach {
				if link, some = t.next(); some {
					break
				}
			}
			if synced = t.caughtUp(); !synced {
				t.arm()
				if !t.pending() {
					t.order, t.over, t.told = nil, nil, nil // an idle session keeps no room for them
				}
				t.stale = nil
				t.running = false
				t.mu.Unlock()
				return
			}
		}
		t.mu.Unlock()
		var err error
		switch {
		case news:
			err = t.expect(contact)
		case full:
			err = t.sync()
		case over != nil:
			t.cancel(t.s.ctx, over)
		case stale != nil:
			t.refresh(stale)
		case some:
			err = t.observe(link)
		case synced:
			t.s.gw.metrics.syncs.WithLabelValues("resource", "late").Inc()
			err = t.inSync()
		}
		if err != nil && t.s.ctx.Err() == nil {
			t.s.notStored(err)
			return // the connection is over; running stays true, so nothing starts again
		}
	}
}

// next takes the next link to be observed, and begins the question about it. t.mu is held.
func (t *twin) next() (hub.Link, bool) {
	for len(t.order) > 0 && !t.off {
		l, ok := t.wait[t.order[0]]
		delete(t.wait, t.order[0])
		t.order = t.order[1:]
		if w, seen := t.seen[l.Href]; ok && seen && (w.obs != nil || l.Policy&hub.Observable == 0) {
			// It was published while it was being observed. A second observation would bring its answer before what the first
			// one has reported and nobody has stored yet.
			delete(t.missing, l.Href)
			continue
		}
		if ok {
			t.told, t.deaf = nil, false
			return l, true
		}
	}
	return hub.Link{}, false
}

// report tells the directory how far the twin is.
func (t *twin) report(state hub.TwinState) error {
	return t.s.write(t.s.ctx, func(ctx context.Context, from hub.Stamp) error {
		return t.s.records.SetTwin(ctx, from, state)
	})
}

// inSync reports that all has answered.
func (t *twin) inSync() error {
	t.mu.Lock()
	t.behind = false
	t.mu.Unlock()
	return t.report(hub.TwinInSync)
}

// sync brings the whole twin up to date. Errors are the directory's; what the device does not answer is left out and asked
// again later.
func (t *twin) sync() error {
	s := t.s
	t.mu.Lock()
	t.behind = true
	anew := t.anew
	t.anew = false
	var over []*coap.Observation
	if anew {
		over = t.takeAll()
	}
	t.mu.Unlock()
	for _, o := range over { // first: the device may know them by the resource only
		t.cancel(s.ctx, o)
	}
	if err := t.report(hub.TwinSyncing); err != nil {
		return err
	}
	t.question()
	offered, listed := t.list()
	if t.fellAsleep(anew) {
		return nil
	}
	if listed {
		if err := t.prune(offered); err != nil {
			return err
		}
		// Only of a device that answers: another would keep its twin waiting for nothing.
		if err := s.learnEndpoints(s.gw.cfg.API.CoAP.KeepAlive.Timeout); err != nil {
			return err
		}
	}
	mode, complete := "batch", false
	if wantsBatch(offered, listed) {
		t.question()
		var err error
		if complete, err = t.observeBatch(!anew); err != nil {
			return err
		}
	}
	if !complete {
		if t.fellAsleep(anew) {
			return nil
		}
		mode = "resource"
		var err error
		if complete, err = t.observeEach(); err != nil {
			return err
		}
	}
	if !complete {
		// A resource did not answer, so the twin is not in sync; it stays SYNCING, which is true, until that one did.
		s.gw.metrics.syncs.WithLabelValues(mode, "incomplete").Inc()
		return nil
	}
	s.gw.metrics.syncs.WithLabelValues(mode, "in-sync").Inc()
	return t.inSync()
}

// observeEach observes all that is published, one after the other. False means that something is missing.
func (t *twin) observeEach() (complete bool, _ error) {
	t.mu.Lock()
	t.each, t.told, t.deaf = true, nil, false
	t.mu.Unlock()
	// Read only now: what was published before is in the directory, what comes later is told to published. What is
	// unpublished while they are read is in told, or still in wait when unpublished takes it out.
	links, err := t.links()
	if err != nil {
		return false, err
	}
	t.mu.Lock()
	for _, l := range links {
		if _, ok := t.seen[l.Href]; !ok && !t.dropped(l.Href) {
			t.enqueue(l)
		}
	}
	t.mu.Unlock()
	for {
		if ok, _ := t.s.rhythm.inReach(time.Now()); !ok {
			return false, nil // the rest is asked for when the device is back
		}
		t.mu.Lock()
		l, ok := t.next()
		complete = len(t.missing) == 0 && !t.off
		t.mu.Unlock()
		if !ok {
			return complete, nil
		}
		if err = t.observe(l); err != nil {
			return false, err
		}
	}
}

// fellAsleep reports that the device is not in reach in the middle of a synchronisation, which begins again, and as it was
// asked for, when it is.
func (t *twin) fellAsleep(anew bool) bool {
	if ok, _ := t.s.rhythm.inReach(time.Now()); ok {
		return false
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.full, t.anew = true, t.anew || anew
	t.s.gw.metrics.syncs.WithLabelValues("none", "incomplete").Inc()
	return true
}

// list asks the device for its own links; false if it does not say.
func (t *twin) list() ([]link, bool) {
	m, err := t.s.ask(&coap.Message{Code: codes.GET, Options: requestTo(resHref, "if=oic.if.ll")})
	if err != nil || m.Code != codes.Content {
		t.s.log.Debug("the device did not list its links", "error", err)
		return nil, false
	}
	var links []link
	if err := decoding.Unmarshal(m.Payload, &links); err != nil {
		t.s.log.Debug("the device's links do not decode", "error", err)
		return nil, false
	}
	return links, true
}

// prune unpublishes what the device does not have any more.
func (t *twin) prune(offered []link) error {
	s := t.s
	published, err := t.links()
	if err != nil {
		return err
	}
	has := make(map[hub.Href]bool, len(offered))
	for _, l := range offered {
		if h, ok := batchHref(l.Href); ok {
			has[h] = true
		}
	}
	var gone []hub.Href
	for _, l := range published {
		if !has[l.Href] {
			gone = append(gone, l.Href)
		}
	}
	if len(gone) == 0 {
		return nil
	}
	select {
	case s.turn <- struct{}{}:
	case <-s.ctx.Done():
		return s.ctx.Err()
	}
	defer func() { <-s.turn }()
	// In the turn, where no publish can come between: what the device published after it was asked it has.
	if gone = slices.DeleteFunc(gone, t.republished); len(gone) == 0 {
		return nil // an empty list would mean all
	}
	t.mu.Lock()
	for _, h := range gone {
		delete(t.missing, h)
		delete(t.failed, h)
	}
	t.mu.Unlock()
	return s.writeInTurn(s.ctx, func(ctx context.Context, from hub.Stamp) error {
		_, err := s.records.Unpublish(ctx, from, gone)
		return err
	})
}

// links reads the published links from the directory.
func (t *twin) links() ([]hub.Link, error) {
	s := t.s
	var dev *hub.Device
	err := retry(s.ctx, s.gw.patience, func() (err error) {
		dev, err = s.records.Device(s.ctx, s.own.Owner, s.own.Device)
		return err
	})
	if err != nil {
		return nil, err
	}
	return slices.Collect(dev.Links.All()), nil
}

// wantsBatch tells whether to try the batch: the device says so, or does not say what it has.
func wantsBatch(offered []link, listed bool) bool {
	if !listed {
		return true
	}
	for _, l := range offered {
		if h, ok := batchHref(l.Href); ok && h == resHref {
			return l.Policy != nil && int32(l.Policy.Bits)&hub.Observable != 0 && slices.Contains(l.Ifs, "oic.if.b")
		}
	}
	return true
}

// observeBatch observes /oic/res in batch; false if the device does not do it properly after all.
func (t *twin) observeBatch(useETags bool) (bool, error) {
	s := t.s
	options := requestTo(resHref, "if=oic.if.b")
	if c := s.gw.cfg.DeviceTwin; useETags && c.UseETags && c.MaxETagsCountInRequest > 0 {
		var etags [][]byte
		err := retry(s.ctx, s.gw.patience, func() (err error) {
			etags, err = s.records.ETags(s.ctx, s.own.Device, c.MaxETagsCountInRequest)
			return err
		})
		if err != nil {
			return false, err
		}
		options = addETags(options, etags)
	}
	o, m, err := s.observe(&coap.Message{Code: codes.GET, Options: options})
	if err != nil {
		s.log.Debug("the device did not answer the batch observation", "error", err)
		return false, nil
	}
	if o == nil {
		s.log.Debug("the device does not observe in batch", "code", coap.Dotted(m.Code))
		return false, nil
	}
	var changes []hub.Change
	switch m.Code {
	case codes.Valid: // nothing changed since the ETags
	case codes.Content:
		var skipped int
		c := contentOf(m)
		changes, skipped, err = parseBatch(c.Format, c.Data, coap.ETag(m))
		s.gw.metrics.batchSkipped.Add(float64(skipped))
		if err != nil {
			s.log.Debug("the device's batch does not decode", "error", err)
			t.cancel(s.ctx, o)
			return false, nil
		}
	default:
		t.cancel(s.ctx, o)
		return false, nil
	}
	t.mu.Lock()
	t.each = false
	t.missing, t.failed = nil, nil // the batch has it, or it comes with a notification
	t.seen[resHref] = watched{obs: o}
	t.mu.Unlock()
	return true, s.storeFirst(o, changes)
}

// observe brings the twin of one resource, which next gave out, up to date and, if the device can, keeps it so. If the device
// does not answer, it is missing.
func (t *twin) observe(l hub.Link) error {
	s := t.s
	req := &coap.Message{Code: codes.GET, Options: requestTo(l.Href)}
	var o *coap.Observation
	var m *coap.Message
	var err error
	if l.Policy&hub.Observable != 0 {
		o, m, err = s.observe(req)
	} else {
		m, err = s.ask(req)
	}
	switch {
	case hub.IsKind(err, hub.TooLarge):
		// The device has more to say than we take: a status the application can see. The session lives.
		s.gw.metrics.tooLarge.Inc()
		m = &coap.Message{Code: codes.RequestEntityTooLarge}
	case err != nil:
		s.log.Debug("the device did not answer for a resource", "href", l.Href, "error", err)
		t.silent(l)
		return nil
	}
	t.mu.Lock()
	delete(t.missing, l.Href)
	dropped := t.dropped(l.Href)
	switch {
	case !dropped:
		t.seen[l.Href] = watched{l, o}
		if err == nil && m.Code>>5 > 2 && m.Code != codes.NotFound && l.Policy&hub.Observable != 0 {
			t.failed = t.later(t.failed, l) // it cannot be observed now
		} else {
			delete(t.failed, l.Href)
		}
	case o != nil:
		t.over = append(t.over, o)
	}
	t.mu.Unlock()
	switch {
	case dropped || m.Code == codes.Valid:
		return s.storeFirst(o, nil)
	case m.Code == codes.NotFound:
		t.mu.Lock()
		delete(t.seen, l.Href)
		t.mu.Unlock()
		return s.gone(l)
	}
	return s.storeFirst(o, []hub.Change{s.changeOf(l.Href, m)})
}

// forget cancels all observations without anybody waiting for it.
func (t *twin) forget(p *peer) {
	t.mu.Lock()
	all := t.takeAll()
	t.mu.Unlock()
	ctx := p.conn.Context()
	if len(all) == 0 || ctx.Err() != nil {
		return
	}
	p.helpers.Go(func() {
		for _, o := range all {
			t.cancel(ctx, o)
		}
	})
}

// cancel ends an observation, at best also at the device.
func (t *twin) cancel(ctx context.Context, o *coap.Observation) {
	if err := t.s.request(ctx, o.Cancel); err != nil {
		t.s.log.Debug("the device did not answer a deregistration", "path", o.Path(), "error", err)
	}
}

// requestTo makes the options of a request to a resource of the device.
func requestTo(h hub.Href, query ...string) message.Options {
	o := coap.AddPath(nil, string(h))
	for _, q := range query {
		o = coap.AddOption(o, message.URIQuery, []byte(q))
	}
	return o
}

// maxIncChanges is the length from which on a further incChanges query is started; Uri-Query ends at 255 bytes.
const maxIncChanges = 239

// addETags asks for what changed since the ETags, newest first: the first is an ETag option, so that a device without changes
// can say 2.03; the others go into incChanges, which lets the device tell how far back we are.
func addETags(o message.Options, etags [][]byte) message.Options {
	var usable [][]byte
	for _, e := range etags {
		if len(e) > 0 && len(e) <= 8 { // RFC 7252, Section 5.10
			usable = append(usable, e)
		}
	}
	if len(usable) == 0 {
		return o
	}
	o = coap.AddOption(o, message.ETag, usable[0])
	var b strings.Builder
	flush := func() {
		if b.Len() > 0 {
			o = coap.AddOption(o, message.URIQuery, []byte(b.String()))
			b.Reset()
		}
	}
	for _, e := range usable[1:] {
		if b.Len() >= maxIncChanges {
			flush()
		}
		if b.Len() == 0 {
			b.WriteString("incChanges=")
		} else {
			b.WriteByte(',')
		}
		b.WriteString(base64.RawURLEncoding.EncodeToString(e))
	}
	flush()
	return o
}
