package identitystore

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

const (
	// askEvery is how often a Client asks what changed when nobody wakes it, and askTime how long it waits for the answer, so that
	// several may be missing before it does not believe what it keeps any more.
	askEvery, askTime = 500 * time.Millisecond, 2 * time.Second
	// reachTime is how long whoever decides waits for the Client itself to hear of it.
	reachTime = time.Second
)

// Client is a Store in another process: its methods do what those of the same name do there. A call whose outcome is not known
// ("part-silent") may be repeated as after any other trouble of the Store's; nobody is kept out before a decision is stored. It has in
// memory what Denied, Quarantined, InQuarantine and Denials say, and the lists of Devices. Of what is decided elsewhere it hears
// within a second; of what it has asked for itself it knows when the call returns. When no Store was heard for 10 s, Denied lets
// nobody in whom it does not know to be kept out; lists are what they were.
type Client struct {
	kept
	bus   *bus.Bus
	ask   func(context.Context, asked) (news, error)
	lists *lists
	log   *slog.Logger
	wake  chan struct{} // has one when there may be something to ask for

	// seen and wrote are numbers of records of changes: the last that was heard of, before anything is done about it, and the
	// highest that a call of this Client's has made.
	seen, wrote atomic.Uint64

	moving sync.Mutex    // guards all below
	at     uint64        // the last that all was done about
	moved  chan struct{} // closed when it goes up
}

// NewClient makes a Client of the Stores that serve on b; cfg is that of a Store. It knows nothing, and lets nobody in, until Run is
// ready.
func NewClient(cfg Config, b *bus.Bus, log *slog.Logger) *Client {
	c := newClient(cfg, log)
	c.bus = b
	c.ask = func(ctx context.Context, q asked) (news, error) { return callChanges.Call(ctx, b, subject, q) }
	return c
}

func newClient(cfg Config, log *slog.Logger) *Client {
	e := newEverything()
	return &Client{
		kept:  kept{disabled: e.disabled, apart: e.apart, denied: e.denied, shared: true},
		lists: newLists(cfg.CachedDevices), log: log, wake: make(chan struct{}, 1), moved: make(chan struct{}),
	}
}

// Run keeps in memory what Stores tell, until ctx ends. It calls ready when it knows who is not let in. The error is always nil.
func (c *Client) Run(ctx context.Context, ready func()) error {
	if c.bus != nil {
		stop, err := changed.Listen(c.bus, wakes, func(struct{}) { c.woken() })
		if err != nil {
			c.log.WarnContext(ctx, "changes of identities are heard of a little later: nobody wakes us", "error", err)
		} else {
			defer stop()
		}
	}
	tick := time.NewTicker(askEvery)
	defer tick.Stop()
	known, away := false, false
	for {
		more, err := c.hearNews(ctx, !known)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil && !away:
			c.log.WarnContext(ctx, "no identity-store says what changed; after 10 s no devices are let in", "error", err)
		case err == nil && away:
			c.log.InfoContext(ctx, "an identity-store says what changed")
		}
		if away = err != nil; !away && !known {
			known = true
			ready()
		}
		if more {
			continue
		}
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		case <-c.wake:
			if away { // whoever wakes us is not always who answers
				select {
				case <-ctx.Done():
					return nil
				case <-tick.C:
				}
			}
		}
	}
}

// woken does not block.
func (c *Client) woken() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// hearNews asks once what changed, and reports whether more did. All asks for everything.
func (c *Client) hearNews(ctx context.Context, all bool) (more bool, err error) {
	began := time.Now() // all that was announced before is in the answer
	within, cancel := context.WithTimeout(ctx, askTime)
	defer cancel()
	after := c.last()
	n, err := c.ask(within, asked{After: after, All: all})
	if err != nil {
		return false, err
	}
	// Lists that are asked for from now on must not be older than what drops those of before.
	c.seen.Store(n.At)
	if n.At < after { // other documents, with other numbers
		c.wrote.Store(0)
	}
	if n.All {
		c.lists.dropAll()
	}
	for _, owner := range n.Owners {
		c.lists.drop(owner)
	}
	for _, dev := range c.take(n, began) {
		c.tell(dev)
	}
	for _, dev := range n.Keys {
		c.tellKey(dev)
	}
	if n.All {
		c.tellKey("")
	}
	c.moving.Lock()
	c.at = n.At
	close(c.moved)
	c.moved = make(chan struct{})
	c.moving.Unlock()
	return n.More, nil
}

// take keeps news, and returns of whom to tell.
func (c *Client) take(n news, began time.Time) (told []hub.DeviceID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !n.More {
		c.heard = began
	}
	if n.All {
		e := newEverything()
		for _, st := range n.Devices {
			if st.Disabled {
				e.disabled[st.Device] = struct{}{}
			}
			if st.Apart {
				e.apart[st.Device] = st.Generation
			}
		}
		for _, d := range n.Denials {
			e.denied[denialKey(d.Of, d.Value)] = d
		}
		if c.replace(e) {
			told = append(told, "")
		}
		return told
	}
	for _, st := range n.Devices {
		if c.stand(st) {
			told = append(told, st.Device)
		}
	}
	for _, d := range n.Denials {
		if c.list(d) {
			told = append(told, concerns(d))
		}
	}
	for _, key := range n.Undenied {
		delete(c.denied, key)
	}
	return told
}

func (c *Client) last() uint64 {
	c.moving.Lock()
	defer c.moving.Unlock()
	return c.at
}

// call asks a Store that knows what this Client knows of.
func (c *Client) call(ctx context.Context, m bus.Method[request, answer], q request) (answer, error) {
	q.After = max(c.seen.Load(), c.wrote.Load())
	return m.Call(ctx, c.bus, subject, q)
}

// change is call of what changes something: what this Client asks for afterwards has it in it.
func (c *Client) change(ctx context.Context, m bus.Method[request, answer], q request) (answer, error) {
	a, err := c.call(ctx, m, q)
	for old := c.wrote.Load(); a.At > old && !c.wrote.CompareAndSwap(old, a.At); old = c.wrote.Load() {
	}
	return a, err
}

// decide is change, and waits until this Client has heard of it: who reads it then may rely on what it keeps. When that takes too
// long, what was decided is decided all the same.
func (c *Client) decide(ctx context.Context, m bus.Method[request, answer], q request) (answer, error) {
	a, err := c.change(ctx, m, q)
	if err != nil {
		return a, err
	}
	over := time.NewTimer(reachTime)
	defer over.Stop()
	for {
		c.moving.Lock()
		at, moved := c.at, c.moved
		c.moving.Unlock()
		if at >= a.At {
			return a, nil
		}
		c.woken()
		select {
		case <-moved:
		case <-over.C:
			return a, nil
		case <-ctx.Done():
			return a, nil
		}
	}
}

// SignUp is Store's.
func (c *Client) SignUp(ctx context.Context, dev hub.DeviceID, owner hub.Owner, pin, user string, authorized time.Time) (hub.Ownership, error) {
	a, err := c.change(ctx, callSignUp, request{Device: dev, Owner: owner, Pin: pin, User: user, Authorized: authorized})
	c.lists.drop(owner) // also after an error: what was done then is unknown
	return a.Ownership, err
}

// Owner is Store's.
func (c *Client) Owner(ctx context.Context, dev hub.DeviceID) (hub.Ownership, error) {
	a, err := c.call(ctx, callOwner, request{Device: dev})
	return a.Ownership, err
}

// SignOff is Store's.
func (c *Client) SignOff(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user string) error {
	_, err := c.change(ctx, callSignOff, request{Device: dev, Owner: owner, User: user})
	c.lists.drop(owner)
	return err
}

// Remove is Store's.
func (c *Client) Remove(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error {
	_, err := c.decide(ctx, callRemove, request{Device: dev, Owner: owner, User: user, Reason: reason})
	c.lists.drop(owner)
	return err
}

// Devices is Store's.
func (c *Client) Devices(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error) {
	ids, epoch, ok := c.lists.get(owner)
	if ok {
		return ids, nil
	}
	a, err := c.call(ctx, callDevices, request{Owner: owner})
	if err != nil {
		return nil, err
	}
	ids = append([]hub.DeviceID{}, a.Devices...)
	c.lists.put(owner, ids, epoch)
	return ids, nil
}

// EventsOwned is Store's.
func (c *Client) EventsOwned(ctx context.Context, owner hub.Owner) ([]hub.DeviceID, error) {
	a, err := c.call(ctx, callEventsOwned, request{Owner: owner})
	return a.Devices, err
}

// Access is Store's.
func (c *Client) Access(ctx context.Context, dev hub.DeviceID, owner hub.Owner) (hub.Access, error) {
	a, err := c.call(ctx, callAccess, request{Device: dev, Owner: owner})
	return a.Access, err
}

// Disable is Store's.
func (c *Client) Disable(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error {
	_, err := c.decide(ctx, callDisable, request{Device: dev, Owner: owner, User: user, Reason: reason})
	return err
}

// Enable is Store's.
func (c *Client) Enable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	_, err := c.decide(ctx, callEnable, request{Device: dev, Owner: owner})
	return err
}

// Quarantine is Store's.
func (c *Client) Quarantine(ctx context.Context, dev hub.DeviceID, owner hub.Owner, user, reason string) error {
	_, err := c.decide(ctx, callQuarantine, request{Device: dev, Owner: owner, User: user, Reason: reason})
	return err
}

// Reachable is Store's. A Store is only asked about devices against which something is known: a command waits for nobody else.
func (c *Client) Reachable(ctx context.Context, dev hub.DeviceID, owner hub.Owner) error {
	if err := c.unreachable(dev); err == nil || hub.IsKind(err, hub.Unavailable) {
		return err
	}
	_, err := c.call(ctx, callReachable, request{Device: dev, Owner: owner})
	return err
}

// Admits is Store's.
func (c *Client) Admits(ctx context.Context, dev hub.DeviceID, spki []byte) error {
	_, err := c.call(ctx, callAdmits, request{Device: dev, SPKI: spki})
	return err
}

// Deny is Store's.
func (c *Client) Deny(ctx context.Context, d hub.Denial) (hub.Denial, error) {
	a, err := c.decide(ctx, callDeny, request{Denial: d})
	if err != nil {
		return d, err
	}
	return a.Denial, nil
}

// Undeny is Store's.
func (c *Client) Undeny(ctx context.Context, of hub.DenialOf, value string) error {
	_, err := c.decide(ctx, callUndeny, request{Denial: hub.Denial{Of: of, Value: value}})
	return err
}

// EndKey is Store's.
func (c *Client) EndKey(ctx context.Context, dev hub.DeviceID) error {
	_, err := c.decide(ctx, callEndKey, request{Device: dev})
	return err
}
