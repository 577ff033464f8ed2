package coapgateway

import (
	"bytes"
	"context"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/coap"
)

// watches are the observations that devices have of each other's resources (RFC 7641). What is observed is the twin: a device
// hears nothing of who watches it. The feed of an owner is read once for all watches of that owner's devices; what it tells of
// wakes those watches that it concerns, and each looks how its resource is then. So a watch that is slow misses states in
// between, and never the last one, holds nothing, and is held up by nobody.
type watches struct {
	gw   *Gateway
	done sync.WaitGroup // those who read feeds

	mu   sync.Mutex // guards all below, and what watches and sessions say
	ears map[hub.Owner]*ear
	n    int // watches in all
}

// ear reads the feed of an owner, as long as there is a watch of it.
type ear struct {
	owner   hub.Owner
	cancel  context.CancelFunc
	n       int // watches
	devices map[hub.DeviceID]map[hub.Href]map[*watch]struct{}
}

// watch is one such observation.
type watch struct {
	s     *session
	p     *peer
	ear   *ear
	at    place
	req   *coap.Message // that registered
	token []byte

	// What the peer was told last: the commit that brought it and its format. Set by whoever answers the registration, then the
	// goroutine's.
	told   uint64
	format []byte

	// Guarded by watches.mu.
	obs     *coap.Observer // nil until the registration is answered
	woken   bool           // something happened since it looked
	running bool           // its goroutine, one of session.telling
	over    bool
	news    chan struct{} // of whoever waits to answer the registration; holds one
}

// watch registers the device for a resource of another. The answer is the resource as it is; if nothing is known of it yet,
// the answer waits until something is.
func (p *peer) watch(ctx context.Context, req *coap.Message, at place) (coap.Response, error) {
	w, err := p.gw.watches.add(ctx, p, req, at)
	if err != nil {
		return coap.Response{}, err
	}
	r, err := w.look(ctx)
	if r != nil || err != nil {
		return w.begin(r, err)
	}
	err = p.aside(func(ctx context.Context) (coap.Response, error) {
		ctx, cancel := context.WithTimeout(ctx, p.gw.cfg.API.CoAP.KeepAlive.Timeout)
		defer cancel()
		for {
			select {
			case <-w.news:
				if r, err := w.look(ctx); r != nil || err != nil {
					return w.begin(r, err)
				}
			case <-ctx.Done():
				return w.begin(nil, &coded{coap.CodeOf(hub.Unavailable), hub.NewError(hub.Unavailable, "resource-silent",
					"nothing is known of the resource yet, try again later")})
			}
		}
	})
	if err != nil {
		return w.begin(nil, err)
	}
	return coap.Response{}, nil
}

// add makes a watch, which hears of everything that happens from now on.
func (x *watches) add(ctx context.Context, p *peer, req *coap.Message, at place) (*watch, error) {
	s := p.sess
	w := &watch{s: s, p: p, at: at, req: req, token: req.Token, news: make(chan struct{}, 1)}
	owner := s.own.Owner
	var head hub.Cursor
	for known := false; ; known = true {
		x.mu.Lock()
		limits := x.gw.cfg.DeviceToDevice
		e := x.ears[owner]
		switch {
		case s.ctx.Err() != nil:
			x.mu.Unlock()
			return nil, &hub.Error{Kind: hub.Unavailable}
		case (len(s.watching) >= limits.MaxObservations || x.n >= limits.MaxObservationsInAll) && x.find(s, req.Token) == nil: // else it takes that one's place
			x.mu.Unlock()
			return nil, x.gw.over(errObservations)
		case e != nil || known:
			if e == nil {
				e = x.listen(owner, head)
			}
			x.enter(e, w)
			x.mu.Unlock()
			return w, nil
		}
		x.mu.Unlock()
		var err error
		if head, err = x.gw.deps.Directory.FeedHead(ctx); err != nil {
			return nil, err
		}
	}
}

// enter puts w into the books. x.mu is held.
func (x *watches) enter(e *ear, w *watch) {
	w.ear = e
	hrefs := e.devices[w.at.device]
	if hrefs == nil {
		hrefs = map[hub.Href]map[*watch]struct{}{}
		e.devices[w.at.device] = hrefs
	}
	if hrefs[w.at.href] == nil {
		hrefs[w.at.href] = map[*watch]struct{}{}
	}
	hrefs[w.at.href][w] = struct{}{}
	if w.s.watching == nil {
		w.s.watching = map[*watch]struct{}{}
	}
	w.s.watching[w] = struct{}{}
	e.n++
	x.n++
	x.gw.metrics.watches.Inc()
}

// remove ends a watch. x.mu is held.
func (x *watches) remove(w *watch) {
	if w.over {
		return
	}
	w.over = true
	e := w.ear
	hrefs := e.devices[w.at.device]
	delete(hrefs[w.at.href], w)
	if len(hrefs[w.at.href]) == 0 {
		delete(hrefs, w.at.href)
	}
	if len(hrefs) == 0 {
		delete(e.devices, w.at.device)
	}
	delete(w.s.watching, w)
	e.n--
	x.n--
	x.gw.metrics.watches.Dec()
	if e.n == 0 {
		e.cancel()
		delete(x.ears, e.owner)
	}
}

// end ends a watch, from any goroutine.
func (w *watch) end() {
	x := w.p.gw.watches
	x.mu.Lock()
	x.remove(w)
	obs := w.obs
	x.mu.Unlock()
	if obs != nil {
		obs.Cancel()
	}
}

// find returns the session's watch with that token that was answered, nil if there is none. x.mu is held.
func (x *watches) find(s *session, token []byte) *watch {
	for w := range s.watching {
		if w.obs != nil && bytes.Equal(w.token, token) {
			return w
		}
	}
	return nil
}

// cancel ends the session's watch with that token, if there is one (RFC 7641, Section 3.6).
func (x *watches) cancel(s *session, token []byte) {
	x.mu.Lock()
	w := x.find(s, token)
	x.mu.Unlock()
	if w != nil {
		w.end()
	}
}

// leave ends all watches of a session, whose context is over, and waits for their goroutines.
func (x *watches) leave(s *session) {
	var all []*coap.Observer
	x.mu.Lock()
	for w := range s.watching {
		if w.obs != nil {
			all = append(all, w.obs)
		}
		x.remove(w)
	}
	x.mu.Unlock()
	for _, o := range all {
		o.Cancel() // the connection may go on, after a sign-out
	}
	s.telling.Wait()
}

// listen begins to read the owner's feed behind head. x.mu is held.
func (x *watches) listen(owner hub.Owner, head hub.Cursor) *ear {
	ctx, cancel := context.WithCancel(context.Background()) // ended with the last watch
	e := &ear{owner: owner, cancel: cancel, devices: map[hub.DeviceID]map[hub.Href]map[*watch]struct{}{}}
	x.ears[owner] = e
	x.done.Go(func() { x.read(ctx, e, head) })
	return e
}

// read is the goroutine of an ear. When the feed cannot be read, or has lost its place, it goes on at its end, and every
// watch looks how its resource is.
func (x *watches) read(ctx context.Context, e *ear, head hub.Cursor) {
	for {
		x.gw.engine.Guard("feed", func() {
			for fed, err := range x.gw.deps.Directory.Feed(ctx, e.owner, head, hub.Position{}) {
				if err != nil {
					if ctx.Err() == nil {
						x.gw.log.Warn("the feed of an owner cannot be read, trying again", "error", err)
					}
					return
				}
				x.heed(e, fed.Commit)
			}
		})
		for {
			t := time.NewTimer(askDirectoryAgain)
			select {
			case <-t.C:
			case <-ctx.Done():
				t.Stop()
				return
			}
			var err error
			if head, err = x.gw.deps.Directory.FeedHead(ctx); err == nil {
				break
			}
		}
		x.mu.Lock()
		for _, hrefs := range e.devices {
			x.wakeAll(hrefs)
		}
		x.mu.Unlock()
	}
}

// heed wakes the watches that a commit concerns.
func (x *watches) heed(e *ear, c *hub.Commit) {
	x.mu.Lock()
	defer x.mu.Unlock()
	hrefs := e.devices[c.Device]
	if hrefs == nil {
		return
	}
	for i := range c.Events {
		switch ev := &c.Events[i]; ev.Kind {
		case hub.ResourceChanged:
			x.wake(hrefs[ev.Href])
		case hub.LinksUnpublished:
			for _, h := range ev.Hrefs {
				x.wake(hrefs[h])
			}
		case hub.Registered, hub.Unregistered:
			x.wakeAll(hrefs)
		default: // says nothing of a resource
		}
	}
}

func (x *watches) wakeAll(hrefs map[hub.Href]map[*watch]struct{}) {
	for _, ws := range hrefs {
		x.wake(ws)
	}
}

// wake has watches look how their resource is. x.mu is held.
func (x *watches) wake(ws map[*watch]struct{}) {
	for w := range ws {
		w.woken = true
		if w.obs != nil {
			w.start()
			continue
		}
		select {
		case w.news <- struct{}{}:
		default:
		}
	}
}

// start runs the watch's goroutine unless it runs; it exists only while there is something to look at. watches.mu is held, and
// the watch is not over.
func (w *watch) start() {
	if w.running {
		return
	}
	w.running = true
	w.s.telling.Go(func() {
		if !w.p.conn.Guard("watch", w.run) {
			w.p.conn.Close(coap.ErrPanic) // the peer would take an old state for the last one
		}
	})
}

func (w *watch) run() {
	x := w.p.gw.watches
	for {
		x.mu.Lock()
		if w.over || !w.woken || w.s.ctx.Err() != nil { // then leave follows
			w.running = false
			x.mu.Unlock()
			return
		}
		w.woken = false
		x.mu.Unlock()
		if w.tell() {
			continue
		}
		t := time.NewTimer(askDirectoryAgain)
		select {
		case <-t.C:
		case <-w.s.ctx.Done():
			t.Stop()
		}
		x.mu.Lock()
		w.woken = true
		x.mu.Unlock()
	}
}

// tell notifies the peer of the resource if it is another than it was told of last; false if that is to be tried again.
func (w *watch) tell() bool {
	ctx := w.s.ctx
	r, err := w.look(ctx)
	switch {
	case err == nil && r == nil: // it went and came again, and has reported nothing yet
		return true
	case err == nil && r.Seq == w.told:
		return true
	case err != nil && ours(err):
		w.s.log.Debug("an observed resource cannot be read, trying again", "device", w.at.device, "href", w.at.href, "error", err)
		return false
	}
	resp, err := w.notification(r, err)
	if notified := w.obs.Notify(ctx, resp); notified != nil {
		w.s.log.Debug("a notification could not be sent", "device", w.at.device, "href", w.at.href, "error", notified)
		return ctx.Err() != nil // over UDP there may be room later
	}
	if err != nil { // the observer ends by itself, with what it was told now
		x := w.p.gw.watches
		x.mu.Lock()
		x.remove(w)
		x.mu.Unlock()
		return true
	}
	w.told = r.Seq
	return true
}

// notification is what the peer is told of the resource, or of its end: then err is not nil, and the observation is over.
func (w *watch) notification(r *hub.Resource, err error) (coap.Response, error) {
	if err != nil { // as other hubs do: it may come again (RFC 7641, Section 3.2)
		err = &coded{coap.CodeOf(hub.Unavailable), hub.NewError(hub.Unavailable, "resource-gone", "the resource or its device went away")}
	}
	var resp coap.Response
	if err == nil {
		resp, err = shown(r, w.bare())
	}
	if err == nil && !bytes.Equal(formatOf(resp), w.format) {
		// RFC 7641, Section 4.2: all notifications have the format of the answer that registered.
		err = &hub.Error{Kind: hub.NotAcceptable}
	}
	if err != nil {
		resp = route{}.failure(w.req, err)
	}
	return resp, err
}

// bare is the registration without what was asked of the state that it was answered with.
func (w *watch) bare() *coap.Message {
	m := &coap.Message{Code: w.req.Code}
	if v, ok := w.req.Option(message.Accept); ok {
		m.Options = message.Options{{ID: message.Accept, Value: v}}
	}
	return m
}

func formatOf(r coap.Response) []byte {
	for _, o := range r.Options {
		if o.ID == message.ContentFormat {
			return o.Value
		}
	}
	return nil
}

// look says how the resource is: nil if nothing is known of it yet, NotFound if it is not there, or not the owner's any more.
func (w *watch) look(ctx context.Context) (*hub.Resource, error) {
	for dev, err := range w.p.gw.deps.Directory.State(ctx, w.ear.owner, []hub.DeviceID{w.at.device}) {
		if err != nil {
			return nil, err
		}
		return resourceOf(dev, w.at.href)
	}
	return nil, errNoResource
}

// begin answers the registration with the resource, or with err, and then the watch is over.
func (w *watch) begin(r *hub.Resource, err error) (coap.Response, error) {
	var resp coap.Response
	if err == nil {
		resp, err = shown(r, w.req)
	}
	if err != nil {
		w.end()
		return resp, err
	}
	w.told = r.Seq
	if whole, err := shown(r, w.bare()); err == nil { // the answer itself may be 2.03, which has no format
		w.format = formatOf(whole)
	}
	x := w.p.gw.watches
	obs, err := w.p.conn.AddObserver(w.req, w.state, w.end)
	if err != nil {
		w.end()
		return coap.Response{}, err
	}
	x.mu.Lock()
	over := w.over
	if w.obs = obs; w.woken && !over {
		w.start()
	}
	x.mu.Unlock()
	if over { // its session ended meanwhile
		obs.Cancel()
		return coap.Response{}, &hub.Error{Kind: hub.Unavailable}
	}
	resp.Options = coap.AddUint(resp.Options, message.Observe, obs.Number())
	return resp, nil
}

// state is what the peer is told when it was told nothing for long.
func (w *watch) state() coap.Response {
	ctx, cancel := context.WithTimeout(w.s.ctx, w.p.gw.cfg.API.CoAP.KeepAlive.Timeout)
	defer cancel()
	r, err := w.look(ctx)
	if err != nil || r == nil {
		return coap.Response{Silent: true} // whoever finds it gone says so
	}
	resp, err := w.notification(r, nil)
	if err != nil {
		return coap.Response{Silent: true}
	}
	return resp
}
