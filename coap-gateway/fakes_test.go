package coapgateway

import (
	"cmp"
	"context"
	"fmt"
	"iter"
	"maps"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// The fakes are structs of functions; a world gives each of them a simple default and keeps what happened.

type fakeDirectory struct {
	mu *sync.Mutex // the world's

	signIn    func(context.Context, hub.Ownership, hub.Connection, string, Deliverer) (hub.Session, error)
	signOut   func(context.Context, hub.Stamp) error
	offline   func(context.Context, hub.Stamp) error
	publish   func(context.Context, hub.Stamp, []hub.Link) ([]hub.Link, error)
	unpublish func(context.Context, hub.Stamp, []hub.Href) ([]hub.Href, error)
	notify    func(context.Context, hub.Stamp, []hub.Change) error
	setTwin   func(context.Context, hub.Stamp, hub.TwinState) error
	setLocal  func(context.Context, hub.Stamp, []string) error
	expect    func(context.Context, hub.Stamp, hub.Contact) error
	device    func(context.Context, hub.Owner, hub.DeviceID) (*hub.Device, error)
	devices   func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error]
	etags     func(context.Context, hub.DeviceID, int) ([][]byte, error)
	take      func(context.Context, hub.Stamp, []hub.Taken, int) ([]hub.Command, bool, error)
	end       func(context.Context, hub.Stamp, string, hub.Answer) error
	command   func(context.Context, hub.Owner, hub.Order) (hub.Outcome, error)
	head      func(context.Context) (hub.Cursor, error)
	feed      func(context.Context, hub.Owner, hub.Cursor) iter.Seq2[hub.Fed, error]
	state     func(context.Context, hub.Owner, []hub.DeviceID) iter.Seq2[*hub.Device, error]
}

// now reads a function that a test may replace, with the world locked, while the gateway runs.
func now[F any](mu *sync.Mutex, f *F) F {
	mu.Lock()
	defer mu.Unlock()
	return *f
}

func (f *fakeDirectory) Command(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error) {
	return now(f.mu, &f.command)(ctx, owner, o)
}

func (f *fakeDirectory) FeedHead(ctx context.Context) (hub.Cursor, error) {
	return now(f.mu, &f.head)(ctx)
}

func (f *fakeDirectory) Feed(ctx context.Context, owner hub.Owner, from hub.Cursor, _ hub.Position) iter.Seq2[hub.Fed, error] {
	return now(f.mu, &f.feed)(ctx, owner, from)
}

func (f *fakeDirectory) State(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return now(f.mu, &f.state)(ctx, owner, ids)
}

func (f *fakeDirectory) TakeCommands(ctx context.Context, from hub.Stamp, have []hub.Taken, n int) ([]hub.Command, bool, error) {
	return now(f.mu, &f.take)(ctx, from, have, n)
}

func (f *fakeDirectory) EndCommand(ctx context.Context, from hub.Stamp, id string, a hub.Answer) error {
	return now(f.mu, &f.end)(ctx, from, id, a)
}

func (f *fakeDirectory) SignIn(ctx context.Context, own hub.Ownership, c hub.Connection, user string, to Deliverer) (hub.Session, error) {
	return now(f.mu, &f.signIn)(ctx, own, c, user, to)
}

func (f *fakeDirectory) SignOut(ctx context.Context, from hub.Stamp) error {
	return now(f.mu, &f.signOut)(ctx, from)
}

func (f *fakeDirectory) Offline(ctx context.Context, from hub.Stamp) error {
	return now(f.mu, &f.offline)(ctx, from)
}

func (f *fakeDirectory) Publish(ctx context.Context, from hub.Stamp, l []hub.Link) ([]hub.Link, error) {
	return now(f.mu, &f.publish)(ctx, from, l)
}

func (f *fakeDirectory) Unpublish(ctx context.Context, from hub.Stamp, h []hub.Href) ([]hub.Href, error) {
	return now(f.mu, &f.unpublish)(ctx, from, h)
}

func (f *fakeDirectory) Notify(ctx context.Context, from hub.Stamp, c []hub.Change) error {
	return now(f.mu, &f.notify)(ctx, from, c)
}

func (f *fakeDirectory) SetTwin(ctx context.Context, from hub.Stamp, s hub.TwinState) error {
	return now(f.mu, &f.setTwin)(ctx, from, s)
}

func (f *fakeDirectory) SetLocalEndpoints(ctx context.Context, from hub.Stamp, at []string) error {
	return now(f.mu, &f.setLocal)(ctx, from, at)
}

func (f *fakeDirectory) SetContact(ctx context.Context, from hub.Stamp, c hub.Contact) error {
	return now(f.mu, &f.expect)(ctx, from, c)
}

func (f *fakeDirectory) Device(ctx context.Context, o hub.Owner, d hub.DeviceID) (*hub.Device, error) {
	return now(f.mu, &f.device)(ctx, o, d)
}

func (f *fakeDirectory) Devices(ctx context.Context, o hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return now(f.mu, &f.devices)(ctx, o, ids)
}

func (f *fakeDirectory) ETags(ctx context.Context, d hub.DeviceID, limit int) ([][]byte, error) {
	return now(f.mu, &f.etags)(ctx, d, limit)
}

type fakeIdentities struct {
	signUp  func(context.Context, hub.DeviceID, hub.Owner, string, string, time.Time) (hub.Ownership, error)
	owner   func(context.Context, hub.DeviceID) (hub.Ownership, error)
	signOff func(context.Context, hub.DeviceID, hub.Owner, string) error
	devices func(context.Context, hub.Owner) ([]hub.DeviceID, error)

	reachable func(hub.DeviceID) error // nil: all are
}

func (f *fakeIdentities) SignUp(ctx context.Context, d hub.DeviceID, o hub.Owner, pin, user string, authorized time.Time) (hub.Ownership, error) {
	return f.signUp(ctx, d, o, pin, user, authorized)
}

func (f *fakeIdentities) Owner(ctx context.Context, d hub.DeviceID) (hub.Ownership, error) {
	return f.owner(ctx, d)
}

func (f *fakeIdentities) SignOff(ctx context.Context, d hub.DeviceID, o hub.Owner, user string) error {
	return f.signOff(ctx, d, o, user)
}

func (f *fakeIdentities) Reachable(_ context.Context, d hub.DeviceID, _ hub.Owner) error {
	if f.reachable == nil {
		return nil
	}
	return f.reachable(d)
}

func (f *fakeIdentities) Devices(ctx context.Context, o hub.Owner) ([]hub.DeviceID, error) {
	return f.devices(ctx, o)
}

type fakeVerifier struct {
	verify func(context.Context, string) (hub.Claims, error)
}

func (f *fakeVerifier) Verify(ctx context.Context, token string) (hub.Claims, error) {
	return f.verify(ctx, token)
}

type fakeProvider struct {
	exchange func(context.Context, hub.DeviceID, string, string) (hub.Tokens, error)
	refresh  func(context.Context, hub.DeviceID, string) (hub.Tokens, error)
	revoke   func(context.Context, hub.Tokens) error
}

func (f *fakeProvider) Exchange(ctx context.Context, d hub.DeviceID, credential, code string) (hub.Tokens, error) {
	return f.exchange(ctx, d, credential, code)
}

func (f *fakeProvider) Refresh(ctx context.Context, d hub.DeviceID, token string) (hub.Tokens, error) {
	return f.refresh(ctx, d, token)
}
func (f *fakeProvider) Revoke(ctx context.Context, t hub.Tokens) error { return f.revoke(ctx, t) }

// links and resources are hub's sets over a map.
type links map[hub.Href]hub.Link

func (l links) Len() int                        { return len(l) }
func (l links) Get(h hub.Href) (hub.Link, bool) { x, ok := l[h]; return x, ok }
func (l links) All() iter.Seq[hub.Link] {
	return func(yield func(hub.Link) bool) {
		for _, h := range slices.Sorted(maps.Keys(l)) {
			if !yield(l[h]) {
				return
			}
		}
	}
}

// resources is hub's set over a map.
type resources map[hub.Href]hub.Resource

func (r resources) Len() int                             { return len(r) }
func (r resources) Get(h hub.Href) (*hub.Resource, bool) { x, ok := r[h]; return &x, ok }
func (r resources) All() iter.Seq[*hub.Resource] {
	return func(yield func(*hub.Resource) bool) {
		for _, x := range r {
			if !yield(&x) {
				return
			}
		}
	}
}

// world is everything behind the gateway, in memory. The tokens it knows are texts that map to claims.
type world struct {
	dir  fakeDirectory
	ids  fakeIdentities
	ver  fakeVerifier
	prov fakeProvider

	mu       sync.Mutex // guards all below
	bump     chan struct{}
	tokens   map[string]hub.Claims
	codes    map[string]hub.Tokens
	refresh  map[string]hub.Tokens
	owned    map[hub.DeviceID]hub.Ownership
	pins     map[hub.DeviceID]string
	links    map[hub.DeviceID]links
	current  map[hub.DeviceID]uint64 // session numbers
	last     map[hub.DeviceID]uint64 // highest message number of the session
	to       map[hub.DeviceID]Deliverer
	twin     map[hub.DeviceID]resources
	commits  []*hub.Commit // the feed
	contacts map[hub.DeviceID]hub.Contact
	etag     [][]byte
	changes  []hub.Change // all, in order
	stamps   []hub.Stamp  // of all writes, in order
	log      []string     // what happened, in order
	conns    []hub.Connection
	revoked  []string
	seq      uint64

	queue  []hub.Command // that wait for their session
	orders []hub.Order
	feeds  int // that are being read
	fed    int // commits that were read by the one that is furthest
	ends   map[string]hub.Answer
	off    map[hub.DeviceID]bool // twins that are switched off
}

func newWorld() *world {
	w := &world{
		bump: make(chan struct{}), tokens: map[string]hub.Claims{}, codes: map[string]hub.Tokens{}, refresh: map[string]hub.Tokens{},
		owned: map[hub.DeviceID]hub.Ownership{}, pins: map[hub.DeviceID]string{}, links: map[hub.DeviceID]links{},
		current: map[hub.DeviceID]uint64{}, last: map[hub.DeviceID]uint64{}, to: map[hub.DeviceID]Deliverer{},
		twin: map[hub.DeviceID]resources{}, contacts: map[hub.DeviceID]hub.Contact{}, ends: map[string]hub.Answer{},
		off: map[hub.DeviceID]bool{},
	}
	w.dir = fakeDirectory{
		mu:     &w.mu,
		signIn: w.signIn, signOut: w.signOut, offline: w.offline, publish: w.publish, unpublish: w.unpublish, notify: w.notify,
		take: w.take, end: w.end, command: w.command, head: w.head, feed: w.feed,
		setTwin: w.setTwin, setLocal: w.setLocal, expect: w.expect, device: w.device, devices: w.devices, etags: func(context.Context, hub.DeviceID, int) ([][]byte, error) {
			w.mu.Lock()
			defer w.mu.Unlock()
			return w.etag, nil
		},
	}
	w.dir.state = w.devices
	w.ids = fakeIdentities{signUp: w.signUp, owner: w.owner, signOff: w.signOff, devices: w.deviceIDs}
	w.ver = fakeVerifier{verify: w.verify}
	w.prov = fakeProvider{exchange: w.exchange, refresh: w.refreshToken, revoke: func(_ context.Context, t hub.Tokens) error {
		defer w.lock()()
		w.revoked = append(w.revoked, t.Access)
		return nil
	}}
	return w
}

// lock returns the unlocking, which wakes everybody who awaits something.
func (w *world) lock() func() {
	w.mu.Lock()
	return func() {
		close(w.bump)
		w.bump = make(chan struct{})
		w.mu.Unlock()
	}
}

// soFar returns a copy of the log.
func (w *world) soFar() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.log)
}

func (w *world) note(format string, args ...any) { w.log = append(w.log, fmt.Sprintf(format, args...)) }

// await waits until cond, which runs under the lock, holds.
func (w *world) await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	again := time.NewTicker(5 * time.Millisecond)
	defer again.Stop()
	for {
		w.mu.Lock()
		ok, bump := cond(), w.bump
		log := slices.Clone(w.log)
		w.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-bump:
		case <-again.C: // what is not the world's, diagnostics for one, wakes nobody
		case <-timeout:
			t.Fatalf("waited in vain for %s; what happened: %q", what, log)
		}
	}
}

func (w *world) awaitLog(t *testing.T, line string) {
	t.Helper()
	w.await(t, line, func() bool { return slices.Contains(w.log, line) })
}

func (w *world) count(line string) (n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, l := range w.log {
		if l == line {
			n++
		}
	}
	return n
}

// grant makes a token known; the zero expiry is an hour from now.
func (w *world) grant(token string, c hub.Claims) string {
	defer w.lock()()
	c.Owner = cmp.Or(c.Owner, "alice")
	c.Subject = cmp.Or(c.Subject, "sub-of-"+string(c.Owner))
	if c.Expiry.IsZero() {
		c.Expiry = time.Now().Add(time.Hour)
	}
	w.tokens[token] = c
	return token
}

// own makes a device alice's.
func (w *world) own(dev hub.DeviceID, owner hub.Owner) {
	defer w.lock()()
	w.owned[dev] = hub.Ownership{Device: dev, Owner: owner, Generation: w.owned[dev].Generation + 1}
}

func (w *world) verify(_ context.Context, token string) (hub.Claims, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	c, ok := w.tokens[token]
	if !ok || time.Now().After(c.Expiry) {
		return hub.Claims{}, hub.NewError(hub.Unauthenticated, "token-invalid", "the token is not valid")
	}
	return c, nil
}

func (w *world) exchange(_ context.Context, dev hub.DeviceID, _, code string) (hub.Tokens, error) {
	defer w.lock()()
	w.note("exchange %s", dev)
	t, ok := w.codes[code]
	if !ok {
		return hub.Tokens{}, &hub.Error{Kind: hub.Unauthenticated}
	}
	return t, nil
}

func (w *world) refreshToken(_ context.Context, _ hub.DeviceID, token string) (hub.Tokens, error) {
	defer w.lock()()
	t, ok := w.refresh[token]
	if !ok {
		return hub.Tokens{}, &hub.Error{Kind: hub.Unauthenticated}
	}
	return t, nil
}

// pin is what dev's first sign-up pinned.
func (w *world) pin(dev hub.DeviceID) string {
	defer w.lock()()
	return w.pins[dev]
}

func (w *world) signUp(_ context.Context, dev hub.DeviceID, owner hub.Owner, pin, _ string, _ time.Time) (hub.Ownership, error) {
	defer w.lock()()
	if own, ok := w.owned[dev]; ok && own.Owner != owner {
		return own, hub.NewError(hub.Denied, "device-owned-by-other", "the device belongs to another owner")
	}
	if old, ok := w.pins[dev]; ok && old != pin {
		return hub.Ownership{}, hub.NewError(hub.Denied, "device-pinned", "the device is pinned to another credential")
	}
	w.pins[dev] = pin
	w.owned[dev] = hub.Ownership{Device: dev, Owner: owner, Generation: 1, Pin: pin}
	w.note("signed-up %s %s", dev, owner)
	return w.owned[dev], nil
}

func (w *world) owner(_ context.Context, dev hub.DeviceID) (hub.Ownership, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	own, ok := w.owned[dev]
	if !ok {
		return own, &hub.Error{Kind: hub.NotFound}
	}
	return own, nil
}

func (w *world) signOff(_ context.Context, dev hub.DeviceID, owner hub.Owner, _ string) error {
	unlock := w.lock()
	if w.owned[dev].Owner != owner {
		unlock()
		return &hub.Error{Kind: hub.NotFound}
	}
	w.unregister(dev)
	delete(w.current, dev)
	w.note("signed-off %s", dev)
	to := w.to[dev]
	delete(w.to, dev)
	unlock()
	if to != nil {
		to.Close("deleted")
	}
	return nil
}

func (w *world) deviceIDs(_ context.Context, owner hub.Owner) (ids []hub.DeviceID, _ error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, id := range slices.Sorted(maps.Keys(w.owned)) {
		if w.owned[id].Owner == owner {
			ids = append(ids, id)
		}
	}
	return ids, nil
}

func (w *world) signIn(_ context.Context, own hub.Ownership, c hub.Connection, _ string, to Deliverer) (hub.Session, error) {
	unlock := w.lock()
	if w.owned[own.Device] != own {
		unlock()
		return hub.Session{}, &hub.Error{Kind: hub.Denied}
	}
	w.seq++
	w.current[own.Device], w.last[own.Device] = w.seq, 0
	w.conns = append(w.conns, c)
	w.note("online %s", own.Device)
	old := w.to[own.Device]
	w.to[own.Device] = to
	s := hub.Session{
		Device: own.Device, Owner: own.Owner, Number: w.seq, TwinEnabled: !w.off[own.Device], Commands: len(w.queue) > 0,
		Contact: w.contacts[own.Device],
	}
	if old != nil && len(w.conns) > 1 {
		s.Former = w.conns[len(w.conns)-2].Service // of one device
	}
	unlock()
	if old != nil {
		old.Close("second-session")
	}
	return s, nil
}

// fence is the directory's: false for a message that was done already.
func (w *world) fence(from hub.Stamp) (bool, error) {
	if w.current[from.Device] != from.Session {
		return false, hub.NewError(hub.Precondition, "session-superseded", "a newer session of the device exists")
	}
	if from.Message <= w.last[from.Device] {
		return false, nil
	}
	w.last[from.Device] = from.Message
	w.stamps = append(w.stamps, from)
	return true, nil
}

func (w *world) signOut(_ context.Context, from hub.Stamp) error {
	defer w.lock()()
	if _, err := w.fence(from); err != nil {
		return err
	}
	delete(w.current, from.Device)
	delete(w.to, from.Device)
	w.note("signed-out %s", from.Device)
	return nil
}

func (w *world) offline(_ context.Context, from hub.Stamp) error {
	defer w.lock()()
	if w.current[from.Device] == from.Session {
		delete(w.to, from.Device)
		w.note("offline %s", from.Device)
	} else {
		w.note("stale offline %s", from.Device)
	}
	return nil
}

func (w *world) publish(_ context.Context, from hub.Stamp, ls []hub.Link) ([]hub.Link, error) {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return ls, err
	}
	if w.links[from.Device] == nil {
		w.links[from.Device] = links{}
	}
	for _, l := range ls {
		w.links[from.Device][l.Href] = l
	}
	w.commit(from.Device, hub.Event{Kind: hub.LinksPublished, Links: ls})
	w.note("published %d", len(ls))
	return ls, nil
}

func (w *world) unpublish(_ context.Context, from hub.Stamp, hrefs []hub.Href) (removed []hub.Href, _ error) {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return nil, err
	}
	if len(hrefs) == 0 {
		hrefs = slices.Sorted(maps.Keys(w.links[from.Device]))
	}
	for _, h := range hrefs {
		if _, ok := w.links[from.Device][h]; ok {
			delete(w.links[from.Device], h)
			removed = append(removed, h)
			w.store(from.Device, hub.Change{Href: h, Status: hub.StatusNotFound})
			w.note("unpublished %s", h)
		}
	}
	return removed, nil
}

func (w *world) store(dev hub.DeviceID, c hub.Change) {
	seq := w.commit(dev, hub.Event{Kind: hub.ResourceChanged, Href: c.Href, Status: c.Status, Content: c.Content, ETag: c.ETag})
	w.twin[dev] = maps.Clone(w.twin[dev]) // pictures never change
	if w.twin[dev] == nil {
		w.twin[dev] = resources{}
	}
	w.twin[dev][c.Href] = hub.Resource{Href: c.Href, Status: c.Status, Content: c.Content, ETag: c.ETag, Seq: seq}
	w.changes = append(w.changes, c)
	w.note("changed %s %d", c.Href, c.Status)
}

func (w *world) notify(_ context.Context, from hub.Stamp, cs []hub.Change) error {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return err
	}
	for _, c := range cs {
		w.store(from.Device, c)
	}
	return nil
}

func (w *world) setTwin(_ context.Context, from hub.Stamp, s hub.TwinState) error {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return err
	}
	if w.off[from.Device] {
		return hub.NewError(hub.Precondition, "twin-disabled", "the device's twin is switched off")
	}
	w.note("twin %d", s)
	return nil
}

func (w *world) take(_ context.Context, from hub.Stamp, have []hub.Taken, n int) (out []hub.Command, more bool, _ error) {
	defer w.lock()()
	if w.current[from.Device] != from.Session {
		return nil, false, hub.NewError(hub.Precondition, "session-superseded", "a newer session of the device exists")
	}
	busy := map[hub.Href]bool{}
	for _, h := range have {
		busy[h.Href] = true
	}
	var left []hub.Command
	for _, c := range w.queue {
		if c.Device != from.Device || len(out) >= n || busy[c.Href] {
			more = more || c.Device == from.Device
			left = append(left, c)
			continue
		}
		busy[c.Href] = true
		c.Session = from.Session
		out = append(out, c)
		w.note("taken %s", c.ID)
	}
	w.queue = left
	return out, more, nil
}

// command is the directory's, for commands that a device gives another.
func (w *world) command(ctx context.Context, owner hub.Owner, o hub.Order) (hub.Outcome, error) {
	unlock := w.lock()
	_, published := w.links[o.Device][o.Href]
	r, reported := w.twin[o.Device][o.Href]
	var err error
	switch {
	case w.owned[o.Device].Owner != owner:
		err = hub.NewError(hub.Denied, "device-not-yours", "there is no such device, or it is not yours")
	case !published && !reported:
		err = hub.NewError(hub.NotFound, "resource-unknown", "the device has no resource "+string(o.Href))
	case len(o.IfMatch) > 0 && !(reported && slices.ContainsFunc(o.IfMatch, func(e []byte) bool { return len(e) == 0 || string(e) == string(r.ETag) })):
		err = hub.NewError(hub.Precondition, "etag-mismatch", "the resource has another ETag than the condition names")
	}
	if err != nil {
		unlock()
		return hub.Outcome{}, err
	}
	w.orders = append(w.orders, o)
	c := hub.Command{
		CommandEvent: hub.CommandEvent{
			Kind: o.Kind, Interface: o.Interface, ETags: o.ETags, ValidUntil: time.Now().Add(10 * time.Second).UnixNano(), Code: o.Method,
		},
		Device: o.Device, ID: fmt.Sprintf("order-%d", len(w.orders)), Href: o.Href, Content: o.Content,
	}
	w.queue = append(w.queue, c)
	to := w.to[o.Device]
	unlock()
	if to != nil {
		to.Wake()
	}
	for {
		w.mu.Lock()
		a, ok := w.ends[c.ID]
		bump := w.bump
		w.mu.Unlock()
		if ok {
			return hub.Outcome{Answer: a, Kind: o.Kind, Device: o.Device, Href: o.Href}, nil
		}
		select {
		case <-bump:
		case <-ctx.Done():
			return hub.Outcome{}, ctx.Err()
		}
	}
}

// commit feeds an event; w.mu is held.
func (w *world) commit(dev hub.DeviceID, ev hub.Event) uint64 {
	seq := uint64(len(w.commits) + 1)
	w.commits = append(w.commits, &hub.Commit{Device: dev, Owner: w.owned[dev].Owner, Seq: seq, Events: []hub.Event{ev}})
	return seq
}

// unregister takes a device from its owner; w.mu is held.
func (w *world) unregister(dev hub.DeviceID) {
	w.commit(dev, hub.Event{Kind: hub.Unregistered})
	delete(w.owned, dev)
	delete(w.links, dev)
	delete(w.twin, dev)
}

func (w *world) head(context.Context) (hub.Cursor, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return hub.Cursor{After: hub.Position{N: uint64(len(w.commits))}}, nil
}

func (w *world) feed(ctx context.Context, owner hub.Owner, from hub.Cursor) iter.Seq2[hub.Fed, error] {
	return func(yield func(hub.Fed, error) bool) {
		defer w.lock()()
		w.feeds++
		defer func() { w.feeds-- }()
		for at := from.After.N; ; {
			for ; at < uint64(len(w.commits)); at++ {
				c := w.commits[at]
				w.fed = max(w.fed, int(at)) // those before it were taken
				if c.Owner != owner {
					continue
				}
				w.mu.Unlock()
				ok := yield(hub.Fed{Commit: c}, nil)
				w.mu.Lock()
				if !ok {
					return
				}
			}
			w.fed = max(w.fed, len(w.commits))
			bump := w.bump
			w.mu.Unlock()
			select {
			case <-bump:
			case <-ctx.Done():
			}
			w.mu.Lock()
			if err := ctx.Err(); err != nil {
				w.mu.Unlock()
				yield(hub.Fed{}, err)
				w.mu.Lock()
				return
			}
		}
	}
}

func (w *world) end(_ context.Context, from hub.Stamp, id string, a hub.Answer) error {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return err
	}
	w.ends[id] = a
	switch id { // of these the ID says what they do
	case "off", "on", "sync":
		w.off[from.Device] = id == "off"
	}
	w.note("ended %s %d", id, a.Status)
	return nil
}

func (w *world) setLocal(_ context.Context, from hub.Stamp, at []string) error {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return err
	}
	w.note("local %q", at)
	return nil
}

func (w *world) expect(_ context.Context, from hub.Stamp, c hub.Contact) error {
	defer w.lock()()
	if fresh, err := w.fence(from); err != nil || !fresh {
		return err
	}
	w.contacts[from.Device] = c
	w.note("sleeps %v", c.Interval.Round(time.Minute))
	return nil
}

func (w *world) picture(id hub.DeviceID) *hub.Device {
	return &hub.Device{
		ID: id, Owner: w.owned[id].Owner, Links: maps.Clone(w.links[id]), Resources: w.twin[id], Metadata: hub.Metadata{Twin: hub.Twin{Enabled: !w.off[id]}},
	}
}

func (w *world) device(_ context.Context, owner hub.Owner, id hub.DeviceID) (*hub.Device, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.owned[id].Owner != owner {
		return nil, &hub.Error{Kind: hub.NotFound}
	}
	return w.picture(id), nil
}

func (w *world) devices(_ context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return func(yield func(*hub.Device, error) bool) {
		for _, id := range ids {
			w.mu.Lock()
			d := w.picture(id)
			w.mu.Unlock()
			if d.Owner == owner && !yield(d, nil) {
				return
			}
		}
	}
}
