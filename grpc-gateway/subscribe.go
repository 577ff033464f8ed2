package grpcgateway

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/google/uuid"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
)

const (
	// maxSubscriptions bounds the subscriptions of one stream.
	maxSubscriptions = 100
	// checkEvery is how often a stream's token is looked at again: a token that ended or was revoked ends its stream.
	checkEvery = time.Second
	// linksPiece bounds the links of one event of a current state, so that it fits the message of a client with small limits.
	linksPiece = 1000
	// lagged is the code of a gap: the directory's when what comes next is no longer kept.
	lagged = "feed-lagged"
)

var (
	// errHalfState: nobody knows what of it was told, nor what happened since.
	errHalfState = hub.NewError(hub.Precondition, lagged, "the current state had not been told whole; it follows anew")

	errStopping = hub.NewError(hub.Unavailable, "hub-stopping", "the hub is stopping, come again and resume")
	errTooMany  = hub.NewError(hub.Exhausted, "subscriptions-limit", "a stream has at most 100 subscriptions")
	errNoAction = hub.NewError(hub.Invalid, "action-missing", "neither createSubscription nor cancelSubscription is set")
)

// stream is what an application has open: its subscriptions, whatever door they came through. It knows how to send and
// nothing of the door.
type stream struct {
	g       *Gateway
	claims  hub.Claims
	token   string
	door    string
	ctx     context.Context //nolint:containedctx // it is the stream's life, which its subscriptions share
	end     context.CancelCauseFunc
	sending sync.Mutex // guards send, which is for one at a time
	send    func(told) error
	work    sync.WaitGroup

	mu     sync.Mutex // guards all below
	subs   map[string]*subscription
	closed bool // close waits for those that run: no more begin
}

// newStream begins a stream. It ends when ctx does, when its token is no longer good, when the hub stops, or when something
// cannot be sent; context.Cause(s.ctx) says why. The caller must close it.
func (g *Gateway) newStream(ctx context.Context, door string, claims hub.Claims, token string) *stream {
	s := &stream{g: g, claims: claims, token: token, door: door, subs: map[string]*subscription{}}
	s.ctx, s.end = context.WithCancelCause(ctx)
	s.work.Go(s.guard)
	return s
}

// close ends all subscriptions and waits for them.
func (s *stream) close() {
	s.end(context.Canceled)
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.work.Wait()
}

// guard ends the stream with its token, or with the hub.
func (s *stream) guard() {
	tick := time.NewTicker(checkEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-s.g.closing:
			s.end(errStopping)
			return
		case <-tick.C:
		}
		// That it cannot be found out is no reason to end: the token was good.
		if _, err := s.g.deps.Verifier.Verify(s.ctx, s.token); hub.IsKind(err, hub.Unauthenticated) || hub.IsKind(err, hub.Denied) {
			s.end(err)
			return
		}
	}
}

// tell sends one message. What cannot be sent ends the stream: its reader resumes.
func (s *stream) tell(t told) error {
	s.sending.Lock()
	defer s.sending.Unlock()
	if err := context.Cause(s.ctx); err != nil {
		return err
	}
	if err := s.send(t); err != nil {
		s.end(err)
		return err
	}
	s.g.metrics.told.WithLabelValues(s.door).Inc()
	return nil
}

// handle carries out what the application asked for. An error ends the stream; what is wrong with the request is answered.
func (s *stream) handle(m *pb.SubscribeToEvents) error {
	corr := m.GetCorrelationId()
	switch {
	case m.GetCreateSubscription() != nil:
		u, err := s.open(m.GetCreateSubscription(), corr)
		if err != nil {
			return s.tell(refused("", corr, pb.Event_OperationProcessed_ErrorStatus_ERROR, err))
		}
		return s.start(u)
	case m.GetCancelSubscription() != nil:
		id := m.GetCancelSubscription().GetSubscriptionId()
		s.mu.Lock()
		u := s.subs[id]
		s.mu.Unlock()
		if u == nil {
			return s.tell(refused(id, corr, pb.Event_OperationProcessed_ErrorStatus_NOT_FOUND,
				hub.NewError(hub.NotFound, "subscription-unknown", "the stream has no such subscription")))
		}
		u.cancel()
		<-u.done
		if err := s.tell(told{sub: id, corr: corr, canceled: true}); err != nil {
			return err
		}
		return s.tell(told{sub: id, corr: corr, processed: &pb.Event_OperationProcessed{ErrorStatus: &pb.Event_OperationProcessed_ErrorStatus{}}})
	}
	return s.tell(refused("", corr, pb.Event_OperationProcessed_ErrorStatus_ERROR, errNoAction))
}

// refused answers a request that was not carried out. The protocol has one text for it: it begins with the stable code, as
// over CoAP.
func refused(id, corr string, code pb.Event_OperationProcessed_ErrorStatus_Code, err error) told {
	reason, text := hub.Public(err)
	return told{sub: id, corr: corr, processed: &pb.Event_OperationProcessed{
		ErrorStatus: &pb.Event_OperationProcessed_ErrorStatus{Code: code, Message: reason + ": " + text},
	}}
}

// subscription is one of a stream's. Its goroutine alone touches what is below cancel.
type subscription struct {
	s        *stream
	id, corr string
	filter   *eventFilter
	cancel   context.CancelFunc
	done     chan struct{}

	resume
	back hub.Cursor // where the feed was when it came back without the whole state; zero: it did not
	gap  error      // nil, or why not everything since the place will be told: that is said before all else
}

// open makes a subscription that does not run yet. Where it begins is decided here: everything that happens from now on will
// be told, so it is live before anybody hears of it.
func (s *stream) open(m *pb.SubscribeToEvents_CreateSubscription, corr string) (*subscription, error) {
	u := &subscription{s: s, id: uuid.NewString(), corr: corr, done: make(chan struct{})}
	var err error
	if u.filter, err = newEventFilter(m); err != nil {
		return nil, err
	}
	s.mu.Lock()
	n := len(s.subs)
	s.mu.Unlock()
	if n >= maxSubscriptions {
		s.g.metrics.refused.WithLabelValues(errTooMany.Code).Inc()
		return nil, errTooMany
	}
	if token := m.GetResumeToken(); token != "" {
		if u.resume, err = s.g.resumeAt(s.claims.Owner, token); err == nil && u.state {
			u.back, err = s.g.deps.Directory.FeedHead(s.ctx)
		}
		return u, err
	}
	u.state = m.GetIncludeCurrentState()
	u.at, err = s.g.deps.Directory.FeedHead(s.ctx)
	return u, err
}

// start acknowledges the subscription and lets it run.
func (s *stream) start(u *subscription) error {
	ctx, cancel := context.WithCancel(s.ctx)
	u.cancel = cancel
	if err := s.tell(told{sub: u.id, corr: u.corr, token: u.token(), processed: &pb.Event_OperationProcessed{
		ErrorStatus: &pb.Event_OperationProcessed_ErrorStatus{},
	}}); err != nil {
		cancel()
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		cancel()
		return context.Cause(s.ctx)
	}
	s.subs[u.id] = u
	s.g.metrics.subscriptions.WithLabelValues(s.door).Inc()
	s.work.Go(func() {
		defer close(u.done)
		defer cancel()
		defer func() {
			s.mu.Lock()
			delete(s.subs, u.id)
			s.mu.Unlock()
			s.g.metrics.subscriptions.WithLabelValues(s.door).Dec()
		}()
		if err := s.g.guarded("subscription", func() error { return u.run(ctx) }); ctx.Err() == nil {
			s.end(err)
		}
	})
	return nil
}

// run tells what there is to tell until ctx ends; it returns with an error.
func (u *subscription) run(ctx context.Context) error {
	if u.gap = u.missed(ctx); u.back != (hub.Cursor{}) {
		u.at = u.back
	}
	for {
		if u.gap != nil {
			if code, _ := hub.Public(u.gap); code != lagged {
				return u.gap
			}
			if err := u.tellGap(ctx); err != nil {
				return err
			}
		}
		var err error
		if u.state {
			err = u.tellState(ctx)
		}
		if err == nil {
			err = u.follow(ctx)
		}
		if code, _ := hub.Public(err); code != lagged {
			return err
		}
		u.gap = err
	}
}

// missed says that a reader that comes back without the whole state misses something that happened since its place, and that it
// was not told of. It is nil if there is nothing of that, for instance because the state had nothing to tell.
func (u *subscription) missed(ctx context.Context) error {
	if u.back == u.at || u.back == (hub.Cursor{}) {
		return nil
	}
	for f, err := range u.s.g.deps.Directory.Feed(ctx, u.s.claims.Owner, u.at, u.back.After) {
		if err != nil {
			return err
		}
		for i := f.Skip; i < len(f.Commit.Events); i++ {
			if u.wants(f.Commit, i) {
				return errHalfState
			}
		}
	}
	return nil
}

// tellGap says that events are missing, which is never passed over; the current state, from now on, has what is worth knowing of
// them.
func (u *subscription) tellGap(ctx context.Context) error {
	head, err := u.s.g.deps.Directory.FeedHead(ctx)
	if err != nil {
		return err
	}
	u.s.g.metrics.lagged.Inc()
	code, text := hub.Public(u.gap)
	u.at, u.state, u.gap = head, true, nil
	yes := true
	return u.s.tell(told{sub: u.id, corr: u.corr, token: u.token(), processed: &pb.Event_OperationProcessed{
		ErrorStatus: &pb.Event_OperationProcessed_ErrorStatus{Message: code + ": " + text}, Lagged: &yes,
	}})
}

// token is where a reader goes on that has all that was told so far.
func (u *subscription) token() string { return u.s.g.resumeToken(u.s.claims.Owner, u.resume) }

// follow tells the events behind u.at, as they come. It returns with an error.
func (u *subscription) follow(ctx context.Context) error {
	for f, err := range u.s.g.deps.Directory.Feed(ctx, u.s.claims.Owner, u.at, hub.Position{}) {
		if err != nil {
			return err
		}
		for i := f.Skip; i < len(f.Commit.Events); i++ {
			if !u.wants(f.Commit, i) {
				continue
			}
			u.at = f.Cursor(u.at.Log, i)
			if err := u.tellEvent(ctx, f.Commit, i, true); err != nil {
				return err
			}
		}
	}
	return fmt.Errorf("follow the feed: %w", errors.Join(ctx.Err(), errors.New("it ended")))
}

func (u *subscription) wants(c *hub.Commit, i int) bool {
	k, ok := subscribables[kindOfEvent(&c.Events[i])]
	return ok && u.filter.wants(&k, c.Device, &c.Events[i])
}

// tellEvent tells an event of a commit; shared says that it is one of the feed, which others are told as well.
func (u *subscription) tellEvent(ctx context.Context, c *hub.Commit, i int, shared bool) error {
	if err := ctx.Err(); err != nil { // it was cancelled
		return err
	}
	return u.s.tell(told{sub: u.id, corr: u.corr, token: u.token(), event: eventElement{c, i, u.s.g.deps.HubID}, shared: shared})
}

// tellState tells the current state of the owner's devices, and whatever happened meanwhile, up to one place of the feed, from
// which it goes on: u.at. The last message of all that has this place as its token; who breaks off before it, and resumes, has a
// gap and gets the state anew.
//
// It begins at u.at, where the subscription was live, so nothing is missed; of the commits that the feed has behind it, a
// picture's seq says which are in there.
func (u *subscription) tellState(ctx context.Context) error {
	g, owner, head := u.s.g, u.s.claims.Owner, u.at
	ids, err := g.deps.Identities.Devices(ctx, owner)
	if err != nil {
		return err
	}
	var held struct { // the newest event, nil at first: the last one of all carries another token
		*hub.Commit
		event  int
		shared bool
	}
	tell := func() error {
		if held.Commit == nil {
			return nil
		}
		return u.tellEvent(ctx, held.Commit, held.event, held.shared)
	}
	hold := func(c *hub.Commit, i int, shared bool) error {
		if !u.wants(c, i) {
			return nil
		}
		err := tell()
		held.Commit, held.event, held.shared = c, i, shared
		return err
	}
	seen := map[hub.DeviceID]uint64{}
	for d, err := range g.deps.Directory.State(ctx, owner, ids) {
		if err != nil {
			return err
		}
		seen[d.ID] = d.Seq
		for c := range stateOf(d) {
			if err := hold(c, 0, false); err != nil {
				return err
			}
		}
	}
	until, err := g.deps.Directory.FeedHead(ctx)
	if err != nil {
		return err
	}
	if until != head {
		for f, err := range g.deps.Directory.Feed(ctx, owner, head, until.After) {
			if err != nil {
				return err
			}
			for i := range f.Commit.Events {
				if f.Commit.Seq <= seen[f.Commit.Device] && !endsCommand(&f.Commit.Events[i]) {
					continue
				}
				if err := hold(f.Commit, i, true); err != nil {
					return err
				}
			}
		}
	}
	u.at, u.state = until, false
	return tell()
}

// endsCommand reports whether an event is a command's end, which no picture has: whoever waits for it must hear it. One of the
// twin ends with metadata, which it has.
func endsCommand(ev *hub.Event) bool {
	return ev.Kind == hub.CommandEnded && !ev.Command.Kind.OfTwin()
}

// stateOf makes events of a device's picture: that it is the owner's, its metadata, its links, the last representation of each
// of its resources, and the commands that wait. Their versions are those of the events that they come from.
func stateOf(d *hub.Device) iter.Seq[*hub.Commit] {
	return func(yield func(*hub.Commit) bool) {
		event := func(c hub.Cause, ev hub.Event) bool {
			ev.Version, ev.Session, ev.Message = c.Version, c.Session, c.Message
			ev.Connection, ev.User, ev.Correlation = c.Connection, c.User, c.Correlation
			return yield(&hub.Commit{Device: d.ID, Seq: d.Seq, Time: c.Time, Owner: d.Owner, Generation: d.Generation, Events: []hub.Event{ev}})
		}
		if !event(hub.Cause{}, hub.Event{Kind: hub.Registered}) {
			return
		}
		if d.MetaCause.Known && !event(d.MetaCause, hub.Event{Kind: hub.MetadataUpdated, Metadata: &d.Metadata}) {
			return
		}
		var links []hub.Link
		for l := range d.Links.All() {
			if links = append(links, l); len(links) == linksPiece {
				if !event(d.LinksCause, hub.Event{Kind: hub.LinksPublished, Links: links}) {
					return
				}
				links = nil
			}
		}
		if len(links) > 0 && !event(d.LinksCause, hub.Event{Kind: hub.LinksPublished, Links: links}) {
			return
		}
		for r := range d.Resources.All() {
			c := hub.Cause{
				Version: r.Version, Time: r.Time, Session: r.Session, Message: r.Message, Connection: r.Connection, User: r.User, Correlation: r.Correlation,
			}
			if !event(c, hub.Event{Kind: hub.ResourceChanged, Href: r.Href, Status: r.Status, Content: r.Content, ETag: r.ETag, Types: r.Types}) {
				return
			}
		}
		for i := range d.Commands {
			c := &d.Commands[i]
			if !event(c.Cause, hub.Event{Kind: hub.CommandPending, Href: c.Href, Content: c.Content, Types: c.Types, Command: &c.CommandEvent}) {
				return
			}
		}
	}
}
