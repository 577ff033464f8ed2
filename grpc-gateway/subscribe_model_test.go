package grpcgateway

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"testing"
	"testing/synctest"

	"pgregory.net/rapid"

	pb "github.com/coaphub/coaphub/api/gen/grpcgatewaypb"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/dose"
)

// subscriber is an application that listens as slowly as it likes, goes away in the middle and comes back with the newest
// token that it has seen.
type subscriber struct {
	m     *pb.SubscribeToEvents_CreateSubscription
	state bool
	token string

	st  *stream // nil: away
	out chan told
	// What it heard since it was live, or the current state had been told whole, which was there. It is whole again after a gap,
	// which the hub must have told it of.
	from  hub.Cursor
	whole bool
	heard []string
	// The version that each resource was last told in: the next event must follow it. Where a current state took the place of
	// events, which perhaps has no such resource, that holds for those only that were told since: tight has them; nil: all.
	versions map[resourcePlace]uint64
	tight    map[resourcePlace]bool
}

func (s *subscriber) connect(g *Gateway, claims hub.Claims) error {
	s.st, s.out = g.newStream(context.Background(), "test", claims, "alice"), make(chan told)
	st, out := s.st, s.out
	st.send = func(t told) error { // it waits for the subscriber, as a full connection does
		select {
		case out <- t:
			return nil
		case <-st.ctx.Done():
			return context.Cause(st.ctx)
		}
	}
	m := &pb.SubscribeToEvents_CreateSubscription{
		EventFilter: s.m.GetEventFilter(), DeviceIdFilter: s.m.GetDeviceIdFilter(), HrefFilter: s.m.GetHrefFilter(), ResumeToken: s.token,
		IncludeCurrentState: s.state,
	}
	u, err := st.open(m, "")
	if err != nil {
		return err
	}
	go func() { _ = st.start(u) }()
	return nil
}

func (s *subscriber) leave() {
	if s.st != nil {
		s.st.close()
		s.st = nil
	}
}

func saying(dev hub.DeviceID, ev *hub.Event) string {
	return fmt.Sprintf("%s %d %s %d", dev[34:], ev.Kind, ev.Href, ev.Version)
}

// hear takes one message, if there is one.
func (s *subscriber) hear(rt *rapid.T) bool {
	synctest.Wait()
	var t told
	select {
	case t = <-s.out:
	default:
		return false
	}
	first := s.token == ""
	s.token = t.token
	at, err := s.st.g.resumeAt(alice, t.token)
	if err != nil {
		rt.Fatal(err)
	}
	if at.state && s.whole && !t.processed.GetLagged() {
		rt.Fatalf("the state is told anew without a word: %+v", t)
	}
	switch {
	case t.processed != nil:
		if t.processed.GetLagged() || first && at.state {
			s.whole, s.tight = false, map[resourcePlace]bool{}
		}
		if t.processed.GetErrorStatus().GetCode() != pb.Event_OperationProcessed_ErrorStatus_OK {
			rt.Fatalf("refused: %v", t.processed)
		}
	case t.event.commit != nil:
		dev, ev := t.event.commit.Device, &t.event.commit.Events[t.event.index]
		s.heard = append(s.heard, saying(dev, ev))
		at := resourcePlace{dev, ev.Href}
		switch known, ok := s.versions[at]; {
		case ev.Kind != hub.ResourceChanged:
		case !t.shared && ok && ev.Version < known:
			rt.Fatalf("the state has version %d of %v, which was told in version %d", ev.Version, at, known)
		case t.shared && (s.tight == nil || s.tight[at]) && ev.Version != known+1, t.shared && ok && ev.Version <= known:
			rt.Fatalf("version %d of %v follows version %d", ev.Version, at, known)
		}
		if ev.Kind == hub.ResourceChanged {
			s.versions[at] = ev.Version
			if s.tight != nil {
				s.tight[at] = true
			}
		}
	default:
		rt.Fatalf("told nothing: %+v", t)
	}
	if !s.whole && !at.state {
		s.whole, s.from, s.heard = true, at.at, nil
	}
	return true
}

// Every subscriber hears each event of its filter once, in order, from its place on, whatever writers, slow and vanishing
// readers, restarts of the hub, transfers of devices and retention do. What retention took is told as current state, and
// afterwards again each event once.
func TestSubscriptionModel(t *testing.T) {
	dose.Seeds(t, 100, 1000, 100_000)
	base := newWorld(t)
	synctest.Test(t, func(t *testing.T) {
		rapid.Check(struct{ testing.TB }{t}, func(rt *rapid.T) { modelSubscriptions(rt, base) }) // without the deadline, which no bubble has
	})
}

var modelFilters = []*pb.SubscribeToEvents_CreateSubscription{
	{},
	{EventFilter: []apiKind{pb.SubscribeToEvents_CreateSubscription_RESOURCE_CHANGED}},
	{DeviceIdFilter: []string{string(lampA)}},
	{HrefFilter: []string{"/0"}},
	{EventFilter: []apiKind{pb.SubscribeToEvents_CreateSubscription_RESOURCE_UPDATE_PENDING, pb.SubscribeToEvents_CreateSubscription_RESOURCE_DELETED}},
	{DeviceIdFilter: []string{string(lampB)}, HrefFilter: []string{"/0", "/1"}},
	{EventFilter: []apiKind{pb.SubscribeToEvents_CreateSubscription_REGISTERED, pb.SubscribeToEvents_CreateSubscription_UNREGISTERED}},
}

// modelCommands are told, but for the second: it is no event of the API.
var modelCommands = []hub.Event{
	ordered(hub.CommandPending, hub.CommandUpdate, "/0"), ordered(hub.CommandBound, hub.CommandUpdate, "/0"),
	ordered(hub.CommandEnded, hub.CommandDelete, "/1"), ordered(hub.CommandPending, hub.CommandTwinSync, ""),
}

func modelSubscriptions(rt *rapid.T, base *world) {
	feed := newFakeFeed(base)
	claims := base.tokens["alice"]
	identities := &fakeIdentities{devices: func(context.Context, hub.Owner) ([]hub.DeviceID, error) {
		return []hub.DeviceID{lampA, lampB, fresh, nameless, bobs}, nil // the stamps decide
	}}
	start := func() *Gateway {
		deps := base.deps
		deps.Directory, deps.Identities = &fakeDirectory{fakeFeed: feed}, identities
		return &Gateway{cfg: base.cfg, deps: deps, log: base.Gateway.log, metrics: base.metrics, closing: make(chan struct{})}
	}
	g := start()
	var truth []hub.Fed                                                    // all that ever happened
	versions := map[hub.Owner]map[resourcePlace]uint64{alice: {}, bob: {}} // what another owner sees is no gap
	devices := []hub.DeviceID{lampA, lampB, bobs}
	pick := func() hub.DeviceID { return rapid.SampledFrom(devices).Draw(rt, "device") }
	note := func() { truth = append(truth, feed.entries[len(feed.entries)-1]) }
	happen := func(dev hub.DeviceID, n int) {
		var events []hub.Event
		for range n {
			if rapid.IntRange(0, 4).Draw(rt, "command") == 0 {
				events = append(events, rapid.SampledFrom(modelCommands).Draw(rt, "of"))
				continue
			}
			h := hub.Href("/" + strconv.Itoa(rapid.IntRange(0, 2).Draw(rt, "href")))
			of := versions[feed.owners[dev]]
			of[resourcePlace{dev, h}]++
			events = append(events, reports(h, int(of[resourcePlace{dev, h}])))
		}
		feed.happen(dev, events...)
		note()
	}
	var subs []*subscriber
	defer func() {
		for _, s := range subs {
			s.leave()
		}
	}()
	for range rapid.IntRange(1, 4).Draw(rt, "subscribers") {
		s := &subscriber{m: rapid.SampledFrom(modelFilters).Draw(rt, "filter"), state: rapid.Bool().Draw(rt, "state"), versions: map[resourcePlace]uint64{}}
		subs = append(subs, s)
		if err := s.connect(g, claims); err != nil {
			rt.Fatal(err)
		}
		if !s.hear(rt) {
			rt.Fatal("it is not acknowledged")
		}
	}
	some := func() *subscriber { return rapid.SampledFrom(subs).Draw(rt, "subscriber") }
	back := func(s *subscriber) {
		if s.st == nil {
			if err := s.connect(g, claims); err != nil {
				rt.Fatalf("with token %q: %v", s.token, err)
			}
		}
	}
	rt.Repeat(map[string]func(*rapid.T){
		"something happens": func(rt *rapid.T) { happen(pick(), rapid.IntRange(1, 4).Draw(rt, "events")) },
		"more happens":      func(rt *rapid.T) { happen(pick(), rapid.IntRange(1, 4).Draw(rt, "events")) },
		"a device changes hands": func(rt *rapid.T) {
			dev := pick()
			feed.transfer(dev, rapid.SampledFrom([]hub.Owner{alice, bob}).Draw(rt, "to"))
			truth = append(truth, feed.entries[len(feed.entries)-2:]...)
		},
		"a subscriber listens": func(rt *rapid.T) {
			s := some()
			back(s)
			for range rapid.IntRange(1, 5).Draw(rt, "messages") {
				s.hear(rt)
			}
		},
		"a subscriber vanishes": func(*rapid.T) { some().leave() },
		"the hub restarts": func(*rapid.T) {
			for _, s := range subs {
				s.leave()
			}
			g = start()
		},
		"retention": func(rt *rapid.T) {
			if rapid.IntRange(0, 3).Draw(rt, "seldom") == 0 {
				feed.trim()
			}
		},
	})
	for _, s := range subs {
		back(s)
		for s.hear(rt) {
		}
	}
	for i, s := range subs {
		f, err := newEventFilter(s.m)
		if err != nil {
			rt.Fatal(err)
		}
		var all []string
		last := map[resourcePlace]uint64{}
		for _, e := range truth {
			for k := range e.Commit.Events {
				ev := &e.Commit.Events[k]
				kind, told := subscribables[kindOfEvent(ev)]
				if !told || e.Commit.Owner != alice || !f.wants(&kind, e.Commit.Device, ev) {
					continue
				}
				if e.At.Compare(s.from.After) > 0 && (e.Before != s.from.After || k >= int(s.from.Skip)) {
					all = append(all, saying(e.Commit.Device, ev))
				}
				if ev.Kind == hub.ResourceChanged && feed.owners[e.Commit.Device] == alice && feed.twins[e.Commit.Device][ev.Href].Version == ev.Version {
					last[resourcePlace{e.Commit.Device, ev.Href}] = ev.Version
				}
			}
		}
		if s.whole && !slices.Equal(s.heard, all) {
			rt.Fatalf("subscriber %d heard\n%q\nof\n%q", i, s.heard, all)
		}
		for at, v := range last { // and whatever happened, it ends with what is
			if s.versions[at] != v {
				rt.Fatalf("subscriber %d ends with version %d of %v, which is %d", i, s.versions[at], at, v)
			}
		}
	}
}
