package resourcedirectory

import (
	"context"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
)

const (
	// attempt is how long one answer is waited for. Whoever should have given it may be gone, so what may be repeated is, and what may
	// not is waited for to the caller's end.
	attempt = 3 * time.Second
	// window is how many devices are read ahead of the caller, and readers how many partitions are asked at a time.
	window, readers = 256, 16
	// endAgain is when the end of a session is told again that no directory took.
	endAgain = 2 * time.Second
	// maxDoubts bounds the sign-ins of which nobody knows what became of them; beyond it such a device is shown online until it comes
	// again or the gateway ends.
	maxDoubts = 1 << 16
)

// Client is a Directory that runs elsewhere, with its contracts. While nobody serves a device's partition its calls wait for that, to the
// end of their context or ten seconds, and are Unavailable then.
type Client struct {
	*Reader
	bus     *bus.Bus
	writes  *bus.Batches
	homes   atomic.Pointer[[partitions]string] // the directory that has a partition, as far as is known here: what goes together
	service string
	log     *slog.Logger
	changed atomic.Uint64

	members *bus.Members  // nil where no sessions are
	silent  chan struct{} // one place: a directory says that it did not hear of this gateway

	mu       sync.Mutex // guards all below
	sessions map[sessionKey]*held
	// ends are sessions of this process that are over and not known to be stored as such: bounded by the sessions that it had.
	ends map[sessionKey]hub.Stamp
	// doubts are connections whose sign-in was not answered: there may be a session of them that nobody holds.
	doubts map[string]hub.DeviceID
	// signing counts the sign-ins of a device that are under way, and early is what was said meanwhile of sessions that are not known yet.
	signing map[hub.DeviceID]int
	early   map[sessionKey]sessionTold
}

// held is a session of this process.
type held struct {
	to   hub.Deliverer
	conn hub.Connection
	user string
	twin hub.TwinState // as it was told last
}

type sessionKey struct {
	dev    hub.DeviceID
	number uint64
}

// NewClient makes a client; feed is read by itself. service is the instance of the gateway in this process, as its connections have it, and
// members what it is a member by; "" and nil where no sessions are.
func NewClient(b *bus.Bus, feed *Reader, service string, members *bus.Members, log *slog.Logger) *Client {
	return &Client{
		Reader: feed, bus: b, writes: b.NewBatches(), service: service, members: members, log: log,
		silent: make(chan struct{}, 1), sessions: map[sessionKey]*held{}, ends: map[sessionKey]hub.Stamp{}, doubts: map[string]hub.DeviceID{},
		signing: map[hub.DeviceID]int{}, early: map[sessionKey]sessionTold{},
	}
}

// Run takes word of this process's sessions from the directories, and tells them again of those that have ended, until ctx ends.
func (c *Client) Run(ctx context.Context, ready func()) error {
	if c.service == "" {
		ready()
		<-ctx.Done()
		return nil
	}
	s := c.bus.Server(true, c.log, gatewayOf(c.service))
	handle(s, tellSession, func(_ context.Context, q sessionTold) error {
		c.told(q)
		return nil
	})
	var again sync.WaitGroup
	defer again.Wait()
	again.Go(func() { c.follow(ctx) })
	again.Go(func() {
		tick := time.NewTicker(endAgain)
		defer tick.Stop()
		since := c.members.Since()
		for {
			select {
			case <-c.silent:
				c.announce(ctx)
			case <-tick.C:
				c.endAgain(ctx)
				if now := c.members.Since(); now != since {
					if !since.IsZero() {
						c.announce(ctx)
					}
					since = now
				}
			case <-ctx.Done():
				return
			}
		}
	})
	return s.Run(ctx, ready)
}

// told does what a directory says of a session. One that is not known has ended, and its end is told, or on its way.
func (c *Client) told(q sessionTold) {
	if q.Device == "" { // directories did not hear of this gateway for a while
		select {
		case c.silent <- struct{}{}:
		default:
		}
		return
	}
	key := sessionKey{q.Device, q.Session}
	c.mu.Lock()
	to := c.sessions[key].deliverer()
	switch {
	case to != nil && q.Close:
		delete(c.sessions, key)
	case to == nil && c.signing[q.Device] > 0 && !c.early[key].Close: // of a former session, or the answer is on its way
		c.early[key] = q
	}
	c.mu.Unlock()
	switch {
	case to == nil:
	case q.Close:
		to.Close(q.Reason)
	default:
		to.Wake()
	}
}

// endAgain tells of sessions that have ended what could not be told before.
func (c *Client) endAgain(ctx context.Context) {
	c.mu.Lock()
	var ends []hub.Stamp
	for _, from := range c.ends {
		ends = append(ends, from)
	}
	doubts := map[string]hub.DeviceID{}
	for conn, dev := range c.doubts {
		doubts[conn] = dev
	}
	c.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, attempt)
	defer cancel()
	var all errgroup.Group
	all.SetLimit(readers)
	for _, from := range ends {
		all.Go(func() error {
			_ = c.Offline(ctx, from) // it stays where it is
			return nil
		})
	}
	for conn, dev := range doubts {
		all.Go(func() error {
			if _, err := callAbandon.Call(ctx, c.bus, writesOf(partitionOf(dev)), abandoned{dev, conn}); !unknown(err) {
				c.mu.Lock()
				defer c.mu.Unlock()
				delete(c.doubts, conn)
			}
			return nil
		})
	}
	_ = all.Wait()
}

func (h *held) deliverer() hub.Deliverer {
	if h == nil {
		return nil
	}
	return h.to
}

// announce tells of all sessions again, since this process was not heard for a while: directories may have taken it for gone. A session
// that is not its device's any more is closed.
func (c *Client) announce(ctx context.Context) {
	c.mu.Lock()
	all := maps.Clone(c.sessions)
	c.mu.Unlock()
	c.log.Info("nobody heard of this gateway for a while, it tells of its sessions again", "sessions", len(all))
	var under errgroup.Group
	under.SetLimit(readers)
	for key, h := range all {
		under.Go(func() error {
			holds := func() bool {
				c.mu.Lock()
				defer c.mu.Unlock()
				return c.sessions[key] == h
			}
			if !holds() {
				return nil
			}
			c.mu.Lock()
			q := announced{hub.Stamp{Device: key.dev, Session: key.number, User: h.user}, h.conn, h.twin}
			c.mu.Unlock()
			is, err := change(ctx, c, callAnnounce, key.dev, q)
			switch {
			case !holds():
				if is || err != nil { // it ended meanwhile, and may be shown online again now
					_ = c.Offline(ctx, q.From) // it is tried until it is stored
				}
			case err != nil && ctx.Err() == nil:
				// The device comes again, and then it is known.
				c.log.Warn("a session cannot be told of again, it is closed", "device", key.dev, "error", err)
				h.to.Close("directory-away")
			case err == nil && !is:
				h.to.Close("second-session")
			}
			return nil
		})
	}
	_ = under.Wait()
}

// follow keeps homes as the membership is, until ctx ends.
func (c *Client) follow(ctx context.Context) {
	tick := time.NewTicker(watchEvery)
	defer tick.Stop()
	var known []string
	for {
		moved := c.members.Moved()
		if living := c.members.Living(Part); !slices.Equal(living, known) {
			homes := new([partitions]string)
			for p := range homes {
				homes[p] = bus.Home(p, living)
			}
			known = living
			c.homes.Store(homes)
		}
		select {
		case <-moved:
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// change makes a call that may be repeated when no answer comes. It goes together with others to the same directory; when that was the
// wrong one, which says so, with those to the same partition, whoever has it.
func change[Req, Resp any](ctx context.Context, c *Client, m bus.Method[Req, Resp], dev hub.DeviceID, q Req) (Resp, error) {
	p := partitionOf(dev)
	subject := writesOf(p)
	lane := subject
	if homes := c.homes.Load(); homes != nil && homes[p] != "" {
		lane = homes[p]
	}
	return repeated(ctx, func(ctx context.Context) (Resp, error) {
		resp, err := m.Join(ctx, c.writes, lane, subject, q)
		lane = subject
		return resp, err
	})
}

func read[Req, Resp any](ctx context.Context, c *Client, m bus.Method[Req, Resp], dev hub.DeviceID, q Req) (Resp, error) {
	subject := readsOf(partitionOf(dev))
	return repeated(ctx, func(ctx context.Context) (Resp, error) { return m.Call(ctx, c.bus, subject, q) })
}

func repeated[Resp any](ctx context.Context, call func(context.Context) (Resp, error)) (resp Resp, err error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	var doubt error // an attempt of which nobody knows what became of it
	err = persist(ctx, unknown, func(ctx context.Context) (err error) {
		ctx, cancel := context.WithTimeout(ctx, attempt)
		defer cancel()
		resp, err = call(ctx)
		if unknown(err) && !bus.NotDone(err) {
			doubt = err
		}
		return err
	})
	if doubt != nil && bus.NotDone(err) {
		err = doubt
	}
	return resp, err
}

// bounded is ctx, with an end.
func bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeout(ctx, 10*time.Second)
}

// once makes a call that must not be carried out twice: it is repeated only while it is known that nothing was done.
func once[Req, Resp any](ctx context.Context, c *Client, m bus.Method[Req, Resp], subject string, q Req) (resp Resp, err error) {
	err = persist(ctx, bus.NotDone, func(ctx context.Context) (err error) {
		resp, err = m.Call(ctx, c.bus, subject, q)
		return err
	})
	return resp, err
}

// SignIn implements what gateways need. When it is not known whether there is a session, it is seen to that there is none.
func (c *Client) SignIn(ctx context.Context, own hub.Ownership, conn hub.Connection, user string, to hub.Deliverer) (hub.Session, error) {
	c.mu.Lock()
	c.signing[own.Device]++
	c.mu.Unlock()
	got, err := change(ctx, c, callSignIn, own.Device, signInAsked{own, conn, user})
	key := sessionKey{own.Device, got.Number}
	c.mu.Lock()
	switch {
	case err == nil:
		c.sessions[key] = &held{to: to, conn: conn, user: user, twin: outOfSync(hub.Twin{Enabled: got.TwinEnabled})}
	case unknown(err) && !bus.NotDone(err) && len(c.doubts) < maxDoubts:
		c.doubts[conn.ID] = own.Device
	}
	early, is := c.early[key]
	if c.signing[own.Device]--; c.signing[own.Device] == 0 {
		delete(c.signing, own.Device)
		maps.DeleteFunc(c.early, func(k sessionKey, _ sessionTold) bool { return k.dev == own.Device })
	}
	c.mu.Unlock()
	if err == nil && is {
		c.told(early)
	}
	return got, err
}

// SignOut implements what gateways need.
func (c *Client) SignOut(ctx context.Context, from hub.Stamp) error {
	_, err := change(ctx, c, callSignOut, from.Device, from)
	if err == nil {
		c.over(from)
	}
	return err
}

// Offline implements what gateways need.
func (c *Client) Offline(ctx context.Context, from hub.Stamp) error {
	key := sessionKey{from.Device, from.Session}
	c.mu.Lock()
	delete(c.sessions, key)
	c.ends[key] = from
	c.mu.Unlock()
	_, err := change(ctx, c, callOffline, from.Device, from)
	if err == nil {
		c.over(from)
	}
	return err
}

// over forgets a session.
func (c *Client) over(from hub.Stamp) {
	key := sessionKey{from.Device, from.Session}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.sessions, key)
	delete(c.ends, key)
}

// Publish implements what gateways need.
func (c *Client) Publish(ctx context.Context, from hub.Stamp, links []hub.Link) ([]hub.Link, error) {
	return change(ctx, c, callPublish, from.Device, publishAsked{from, links})
}

// Unpublish implements what gateways need.
func (c *Client) Unpublish(ctx context.Context, from hub.Stamp, hrefs []hub.Href) ([]hub.Href, error) {
	return change(ctx, c, callUnpublish, from.Device, unpublishAsked{from, hrefs})
}

// Notify implements what gateways need.
func (c *Client) Notify(ctx context.Context, from hub.Stamp, changes []hub.Change) error {
	_, err := change(ctx, c, callNotify, from.Device, notified{from, changes})
	return err
}

// SetTwin implements what gateways need.
func (c *Client) SetTwin(ctx context.Context, from hub.Stamp, to hub.TwinState) error {
	_, err := change(ctx, c, callSetTwin, from.Device, twinSet{from, to})
	if err == nil {
		c.mu.Lock()
		defer c.mu.Unlock()
		if h := c.sessions[sessionKey{from.Device, from.Session}]; h != nil {
			h.twin = to
		}
	}
	return err
}

// SetLocalEndpoints implements what gateways need.
func (c *Client) SetLocalEndpoints(ctx context.Context, from hub.Stamp, endpoints []string) error {
	_, err := change(ctx, c, callSetEndpoints, from.Device, endpointsSet{from, endpoints})
	return err
}

// SetContact implements what gateways need.
func (c *Client) SetContact(ctx context.Context, from hub.Stamp, to hub.Contact) error {
	_, err := change(ctx, c, callSetContact, from.Device, contactSet{from, to})
	return err
}

// TakeCommands implements what gateways need.
func (c *Client) TakeCommands(ctx context.Context, from hub.Stamp, have []hub.Taken, n int) (taken []hub.Command, more bool, _ error) {
	a, err := change(ctx, c, callTakeCommands, from.Device, takeAsked{from, have, n})
	return a.Taken, a.More, err
}

// EndCommand implements what gateways need.
func (c *Client) EndCommand(ctx context.Context, from hub.Stamp, id string, a hub.Answer) error {
	_, err := change(ctx, c, callEndCommand, from.Device, commandAnswered{from, id, a})
	return err
}

// Register implements what an identity store needs.
func (c *Client) Register(ctx context.Context, own hub.Ownership, user string) error {
	_, err := change(ctx, c, callRegister, own.Device, ownershipTold{own, user})
	return err
}

// Unregister implements what an identity store needs.
func (c *Client) Unregister(ctx context.Context, own hub.Ownership, user string) error {
	_, err := change(ctx, c, callUnregister, own.Device, ownershipTold{own, user})
	return err
}

// EndSession implements what an identity store needs.
func (c *Client) EndSession(ctx context.Context, owner hub.Owner, dev hub.DeviceID, user string) error {
	_, err := change(ctx, c, callEndSession, dev, endSessionAsked{owner, dev, user})
	return err
}

// CancelCommands implements what doors need. It is not repeated when no answer came: it would say that there was nothing to cancel.
func (c *Client) CancelCommands(
	ctx context.Context, owner hub.Owner, dev hub.DeviceID, pick hub.CommandPick, user, connection string,
) ([]string, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	return once(ctx, c, callCancelCommands, writesOf(partitionOf(dev)), cancelAsked{owner, dev, pick, user, connection})
}

// SetLabels implements what doors need.
func (c *Client) SetLabels(ctx context.Context, owner hub.Owner, dev hub.DeviceID, to hub.LabelChange, user string) (hub.Labels, error) {
	return change(ctx, c, callSetLabels, dev, labelsAsked{owner, dev, to, user})
}

// Command implements what doors need.
func (c *Client) Command(ctx context.Context, owner hub.Owner, o hub.Order) (out hub.Outcome, err error) {
	if _, ok := ctx.Deadline(); !ok { // the command has an end, and the caller no other
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, max(o.TTL, 10*time.Second)+attempt)
		defer cancel()
	}
	// A directory that stops waits no longer for the device. With a key the next one is asked for the outcome; without, the command would
	// be another one.
	again := func(err error) bool {
		code, _ := hub.Public(err)
		return bus.NotDone(err) || o.Key != "" && code == errStopping.Code
	}
	err = persist(ctx, again, func(ctx context.Context) (err error) {
		out, err = callCommand.Call(ctx, c.bus, commandsOf(partitionOf(o.Device)), commandAsked{owner, o})
		return err
	})
	return out, err
}

// Changes implements what doors need: nobody here knows of changes before they ask, so whatever was read is to be read again.
func (c *Client) Changes(hub.DeviceID) uint64 { return c.changed.Add(1) }

// Device implements what gateways need.
func (c *Client) Device(ctx context.Context, owner hub.Owner, dev hub.DeviceID) (*hub.Device, error) {
	for d, err := range c.Devices(ctx, owner, []hub.DeviceID{dev}) {
		return d, err
	}
	return nil, &hub.Error{Kind: hub.NotFound, Op: "directory.Device"}
}

// Devices implements what doors need.
func (c *Client) Devices(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	if !slices.IsSorted(ids) {
		ids = slices.Clone(ids)
		slices.Sort(ids)
	}
	return c.pictures(ctx, devicesAsked{Owner: owner, IDs: slices.Compact(slices.Clone(ids))})
}

// State implements what doors need.
func (c *Client) State(ctx context.Context, owner hub.Owner, ids []hub.DeviceID) iter.Seq2[*hub.Device, error] {
	return c.pictures(ctx, devicesAsked{Owner: owner, IDs: ids, All: true})
}

// pictures yields devices in the order of q's IDs, some read ahead.
func (c *Client) pictures(ctx context.Context, q devicesAsked) iter.Seq2[*hub.Device, error] {
	return func(yield func(*hub.Device, error) bool) {
		for ids := range slices.Chunk(q.IDs, window) {
			got, err := c.some(ctx, q, ids)
			if err != nil {
				yield(nil, err)
				return
			}
			for _, id := range ids {
				if d := got[id]; d != nil && !yield(d, nil) {
					return
				}
			}
		}
	}
}

// some reads devices from the partitions that have them.
func (c *Client) some(ctx context.Context, q devicesAsked, ids []hub.DeviceID) (map[hub.DeviceID]*hub.Device, error) {
	of := map[int][]hub.DeviceID{}
	for _, id := range ids {
		of[partitionOf(id)] = append(of[partitionOf(id)], id)
	}
	got := make(map[hub.DeviceID]*hub.Device, len(ids))
	var mu sync.Mutex // guards got
	all, ctx := errgroup.WithContext(ctx)
	all.SetLimit(readers)
	for _, ids := range of {
		all.Go(func() error {
			for q := q; len(ids) > 0; {
				q.IDs = ids
				a, err := read(ctx, c, callDevices, ids[0], q)
				if err != nil {
					return err
				}
				mu.Lock()
				for i := range a.Devices {
					got[a.Devices[i].ID] = a.Devices[i].device()
				}
				mu.Unlock()
				ids = ids[len(ids)-min(a.Left, len(ids)-1):]
			}
			return nil
		})
	}
	return got, all.Wait()
}

// DeviceAt implements what doors need.
func (c *Client) DeviceAt(ctx context.Context, owner hub.Owner, dev hub.DeviceID, t time.Time) (*hub.Device, error) {
	p, err := read(ctx, c, callDeviceAt, dev, deviceAtAsked{owner, dev, t.UnixNano()})
	if err != nil {
		return nil, err
	}
	return p.device(), nil
}

// ETags implements what gateways need.
func (c *Client) ETags(ctx context.Context, dev hub.DeviceID, limit int) ([][]byte, error) {
	return read(ctx, c, callETags, dev, etagsAsked{dev, limit})
}

// History implements what doors need.
func (c *Client) History(ctx context.Context, owner hub.Owner, dev hub.DeviceID, after time.Time) iter.Seq2[hub.Commit, error] {
	return func(yield func(hub.Commit, error) bool) {
		q := historyAsked{Owner: owner, Device: dev}
		if !after.IsZero() {
			q.After = after.UnixNano()
		}
		for {
			a, err := read(ctx, c, callHistory, dev, q)
			if err != nil {
				yield(hub.Commit{}, err)
				return
			}
			for _, commit := range a.Commits {
				if !yield(commit, nil) {
					return
				}
			}
			if a.Next == 0 {
				return
			}
			q.From = a.Next
		}
	}
}
