package resourcedirectory

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

func TestSessionNumberIsTheSeqOfTheSignInsCommit(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	cs := h.commits(lamp)
	last := cs[len(cs)-1]
	if x.sess.Number != last.Seq || last.Events[0].Session != last.Seq || x.sess.Owner != alice || !x.sess.TwinEnabled {
		t.Errorf("session %+v of commit %+v", x.sess, last)
	}
	m := h.device(alice, lamp)
	want := conn("conn-1")
	want.Online = true
	if c := m.Metadata.Connection; c.ID != want.ID || !c.Online || c.Service != want.Service || c.Protocol != want.Protocol ||
		c.ConnectedAt != want.ConnectedAt {
		t.Errorf("connection %+v", c)
	}
	if m.MetaCause.User != "user-1" || m.MetaCause.Connection != "conn-1" || m.MetaCause.Owner != alice {
		t.Errorf("cause %+v", m.MetaCause)
	}
}

// A gateway learns whose place its session took.
func TestSignInSaysWhereTheDeviceWas(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	if x.sess.Former != "" {
		t.Errorf("a device that was offline was at %q", x.sess.Former)
	}
	y := h.signIn(lamp, alice, 1, "conn-2")
	if y.sess.Former != "gateway-1" {
		t.Errorf("it was at %q", y.sess.Former)
	}
	h.must(h.d.Offline(t.Context(), hub.Stamp{Device: lamp, Session: y.sess.Number, Message: 1}))
	if z := h.signIn(lamp, alice, 1, "conn-3"); z.sess.Former != "" {
		t.Errorf("a device that went was at %q", z.sess.Former)
	}
}

func TestSignInNeedsTheCurrentOwnership(t *testing.T) {
	t.Parallel()
	h := open(t)
	h.must(h.d.Register(t.Context(), own(lamp, alice, 2), ""))
	releasing := own(lamp, alice, 2)
	releasing.Releasing = true
	for name, o := range map[string]hub.Ownership{
		"another owner": own(lamp, bob, 2), "an older generation": own(lamp, alice, 1), "a later generation": own(lamp, alice, 3),
		"a device nobody registered": own(stove, alice, 1), "nobody": own(lamp, "", 2), "an ownership that ends": releasing,
	} {
		t.Run(name, func(t *testing.T) {
			_, err := h.d.SignIn(t.Context(), o, conn("c"), "", newEnd())
			wantKind(t, err, hub.Denied, "ownership-stale")
		})
	}
	h.expect(lamp, "registered")
}

func TestSecondSessionTakesOver(t *testing.T) {
	h := open(t)
	first := h.registered(lamp)
	h.must(first.notify(value("/light", 1)))
	second := h.signIn(lamp, alice, 1, "conn-2")
	if got := first.end.why(t); got != "second-session" {
		t.Errorf("the first session was closed with %q", got)
	}
	if second.sess.Number <= first.sess.Number {
		t.Errorf("session numbers %d, then %d", first.sess.Number, second.sess.Number)
	}
	before := len(h.commits(lamp))

	wantKind(t, first.notify(value("/light", 0)), hub.Precondition, "session-superseded")
	_, err := first.publish(link("/old"))
	wantKind(t, err, hub.Precondition, "session-superseded")
	_, err = h.d.Unpublish(t.Context(), first.stamp(), nil)
	wantKind(t, err, hub.Precondition, "session-superseded")
	wantKind(t, h.d.SetTwin(t.Context(), first.stamp(), hub.TwinInSync), hub.Precondition, "session-superseded")
	wantKind(t, h.d.SignOut(t.Context(), first.stamp()), hub.Precondition, "session-superseded")
	h.must(h.d.Offline(t.Context(), first.stamp())) // ignored

	d := h.device(alice, lamp)
	if !d.Metadata.Connection.Online || d.Metadata.Connection.ID != "conn-2" || twinOf(t, d, "/light") != "1" {
		t.Errorf("the old session changed the device: %+v", d.Metadata)
	}
	if after := len(h.commits(lamp)); after != before {
		t.Errorf("the old session made %d commits", after-before)
	}
	select {
	case r := <-second.end.reason:
		t.Errorf("the second session was closed: %s", r)
	default:
	}
}

func TestStampsOfNoSessionAreRefused(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	for name, c := range map[string]struct {
		stamp hub.Stamp
		kind  hub.Kind
		code  string
	}{
		"no session":      {hub.Stamp{Device: lamp, Message: 1}, hub.Invalid, "stamp-invalid"},
		"no message":      {hub.Stamp{Device: lamp, Session: x.sess.Number}, hub.Invalid, "stamp-invalid"},
		"a later session": {hub.Stamp{Device: lamp, Session: x.sess.Number + 1, Message: 1}, hub.Precondition, "session-unknown"},
		"unknown device":  {hub.Stamp{Device: stove, Session: 1, Message: 1}, hub.Precondition, "session-unknown"},
	} {
		t.Run(name, func(t *testing.T) {
			wantKind(t, h.d.Notify(t.Context(), c.stamp, []hub.Change{value("/light", 1)}), c.kind, c.code)
		})
	}
}

func TestMessageNumberNotAboveTheStoredIsDone(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1)))
	h.must(h.d.Notify(t.Context(), x.same(), []hub.Change{value("/light", 99)})) // a repeat, whatever it brings
	h.must(x.notify(value("/light", 2)))
	h.restart() // numbers are stored
	h.must(h.d.Notify(t.Context(), x.same(), []hub.Change{value("/light", 98)}))
	if got := twinOf(t, h.device(alice, lamp), "/light"); got != "2" {
		t.Errorf("the twin is %s", got)
	}
}

func TestOfflineKeepsTheConnectionsFacts(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(h.d.SetLocalEndpoints(t.Context(), x.stamp(), []string{"coaps://192.0.2.1:5684"}))
	h.must(h.d.SetTwin(t.Context(), x.stamp(), hub.TwinSyncing))
	h.must(h.d.SetTwin(t.Context(), x.stamp(), hub.TwinInSync))
	h.must(h.d.Offline(t.Context(), x.stamp()))
	h.must(h.d.Offline(t.Context(), x.stamp())) // no second event
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "meta 1 online out-of-sync", "meta 2 online syncing",
		"meta 3 online in-sync", "meta 4 offline out-of-sync")
	m := h.device(alice, lamp).Metadata
	if c := m.Connection; c.ID != "conn-1" || c.ConnectedAt != 1000 || c.Protocol != hub.ProtocolCoAPSTCP ||
		c.Service != "" || !slices.Equal(c.LocalEndpoints, []string{"coaps://192.0.2.1:5684"}) {
		t.Errorf("connection %+v", c)
	}
	if m.Twin.SyncingAt == 0 || m.Twin.InSyncAt < m.Twin.SyncingAt {
		t.Errorf("twin %+v", m.Twin)
	}
	// The session goes on: what was on its way when the connection broke is stored.
	h.must(x.notify(value("/light", 3)))
	if got := twinOf(t, h.device(alice, lamp), "/light"); got != "3" {
		t.Errorf("the twin is %s", got)
	}
}

func TestSignOutEndsTheSession(t *testing.T) {
	h := open(t)
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1)))
	wantKind(t, h.d.SignOut(t.Context(), x.same()), hub.Precondition, "message-number-old")
	h.must(h.d.SignOut(t.Context(), x.stamp()))
	h.must(h.d.SignOut(t.Context(), x.same())) // its answer was lost
	h.restart()
	h.must(h.d.SignOut(t.Context(), x.same()))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1", "meta 1 offline out-of-sync")
	wantKind(t, h.d.SignOut(t.Context(), x.stamp()), hub.Precondition, "session-superseded")
	wantKind(t, x.notify(value("/light", 2)), hub.Precondition, "session-superseded")
	y := h.signIn(lamp, alice, 1, "conn-1")
	h.must(y.notify(value("/light", 3)))
	select {
	case r := <-x.end.reason:
		t.Errorf("signing out closed the connection: %s", r) // it stays open (compat, 5)
	default:
	}
}

// A session can be ended without it: what it has on its way is not stored any more, and a session after it writes as ever.
func TestEndSession(t *testing.T) {
	h := open(t)
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1)))
	wantKind(t, h.d.EndSession(t.Context(), bob, lamp, "hub"), hub.Denied, "")
	wantKind(t, h.d.EndSession(t.Context(), "", lamp, "hub"), hub.Denied, "")
	h.must(x.notify(value("/light", 2)))
	for range 2 {
		h.must(h.d.EndSession(t.Context(), alice, lamp, "hub"))
		h.restart()
	}
	wantKind(t, x.notify(value("/light", 3)), hub.Precondition, "session-superseded")
	wantKind(t, h.d.SignOut(t.Context(), x.stamp()), hub.Precondition, "session-superseded")
	h.must(h.d.Offline(t.Context(), x.stamp()))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1", "changed 1 /light 1 2", "meta 1 offline out-of-sync")
	y := h.signIn(lamp, alice, 1, "conn-1")
	h.must(y.notify(value("/light", 3)))
	h.must(h.d.Offline(t.Context(), y.stamp()))
	h.must(h.d.EndSession(t.Context(), alice, lamp, "hub")) // it has gone by itself: there is nothing to tell
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1", "changed 1 /light 1 2", "meta 1 offline out-of-sync",
		"meta 2 online out-of-sync", "changed 2 /light 1 3", "meta 3 offline out-of-sync")
}

// That is so among its writes, too, of which many are stored at a time: those before it are, and those after it are not.
func TestEndSessionAmongWrites(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	x := h.registered(lamp)
	hold, held := make(chan struct{}), make(chan struct{})
	f.set(func(f *fake) {
		f.append = func(ctx context.Context, entries []store.Entry) []error {
			f.set(func(f *fake) { f.append = nil })
			close(held)
			<-hold
			return f.Store.Append(ctx, entries)
		}
	})
	var wait sync.WaitGroup
	var errs []*error
	ask := func(do func() error) {
		err, before := new(error), h.waiting()
		errs = append(errs, err)
		wait.Go(func() { *err = do() })
		h.eventually("the request waits", func() bool { return h.waiting() > before })
	}
	// The first append is held on another device of the same worker, so that the next requests collect in this order.
	ask(func() error { return h.d.Register(t.Context(), own(sameWorker(h.d, lamp), alice, 1), "") })
	<-held
	write := func(v int) {
		from := x.stamp()
		ask(func() error { return h.d.Notify(t.Context(), from, []hub.Change{value("/light", v)}) })
	}
	write(1)
	ask(func() error { return h.d.EndSession(t.Context(), alice, lamp, "hub") })
	write(2)
	close(hold)
	wait.Wait()
	for _, err := range errs[:3] {
		h.must(*err)
	}
	wantKind(t, *errs[3], hub.Precondition, "session-superseded")
	wantKind(t, x.notify(value("/light", 3)), hub.Precondition, "session-superseded")
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1", "meta 1 offline out-of-sync")
}

func TestTwinStates(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(h.d.SetTwin(t.Context(), x.stamp(), hub.TwinSyncing))
	at := h.device(alice, lamp).Metadata.Twin.SyncingAt
	h.must(h.d.SetTwin(t.Context(), x.stamp(), hub.TwinSyncing)) // the earlier start stays
	if got := h.device(alice, lamp).Metadata.Twin.SyncingAt; got != at || at == 0 {
		t.Errorf("syncing since %d, then %d", at, got)
	}
	h.must(h.d.SetTwin(t.Context(), x.stamp(), hub.TwinOutOfSync))
	wantKind(t, h.d.SetTwin(t.Context(), x.stamp(), hub.TwinDisabled), hub.Invalid, "twin-state-invalid")
	h.must(h.d.Offline(t.Context(), x.stamp()))
	wantKind(t, h.d.SetTwin(t.Context(), x.stamp(), hub.TwinInSync), hub.Precondition, "device-offline")
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "meta 1 online syncing", "meta 2 online out-of-sync",
		"meta 3 offline out-of-sync")
}

// When a device that sleeps is expected is kept over sessions and restarts, until it is told otherwise.
func TestContact(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	six := hub.Contact{Interval: 6 * time.Hour, Next: 7}
	h.must(h.d.SetContact(t.Context(), x.stamp(), six))
	h.must(h.d.SetContact(t.Context(), x.same(), hub.Contact{Interval: 1, Next: 1})) // a repeat is no second event
	h.must(h.d.SetContact(t.Context(), x.stamp(), six))
	for _, bad := range []hub.Contact{{Interval: -1, Next: 1}, {Interval: 1}, {Next: 1}} {
		wantKind(t, h.d.SetContact(t.Context(), x.stamp(), bad), hub.Invalid, "contact-invalid")
	}
	h.must(h.d.Offline(t.Context(), x.stamp()))
	wantKind(t, h.d.SetContact(t.Context(), x.stamp(), six), hub.Precondition, "device-offline")
	h.restart()
	if got := h.device(alice, lamp).Metadata.Contact; got != six {
		t.Errorf("after a restart %+v", got)
	}
	y := h.signIn(lamp, alice, 1, "conn-2")
	if y.sess.Contact != six {
		t.Errorf("the sign-in says %+v", y.sess.Contact)
	}
	wantKind(t, h.d.SetContact(t.Context(), x.stamp(), hub.Contact{}), hub.Precondition, "session-superseded")
	h.must(h.d.SetContact(t.Context(), y.stamp(), hub.Contact{}))
	if got := h.device(alice, lamp).Metadata.Contact; got != (hub.Contact{}) {
		t.Errorf("it does not sleep any more: %+v", got)
	}
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "meta 1 online out-of-sync", "meta 2 offline out-of-sync",
		"meta 3 online out-of-sync", "meta 4 online out-of-sync")
}

func TestTwinThatIsOffStaysDisabled(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(h.d.Offline(t.Context(), x.stamp()))
	meta := h.device(alice, lamp).Metadata
	meta.Twin.Enabled, meta.Twin.State = false, hub.TwinDisabled
	h.behind(lamp, hub.Event{Kind: hub.MetadataUpdated, Metadata: &meta, Version: 2})
	y := h.signIn(lamp, alice, 1, "conn-2")
	if y.sess.TwinEnabled {
		t.Error("the session says that the twin is on")
	}
	wantKind(t, h.d.SetTwin(t.Context(), y.stamp(), hub.TwinSyncing), hub.Precondition, "twin-disabled")
	h.must(h.d.Offline(t.Context(), y.stamp()))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "meta 1 offline out-of-sync", "meta 2 offline disabled",
		"meta 3 online disabled", "meta 4 offline disabled")
}

// behind appends a commit that the directory knows nothing of, as another process would.
func (h *house) behind(dev hub.DeviceID, events ...hub.Event) {
	h.t.Helper()
	k, err := newCodec()
	h.must(err)
	s, err := k.load(context.Background(), h.base, dev)
	h.must(err)
	c := hub.Commit{
		Device: dev, Seq: s.seq + 1, Writer: "other", Time: max(time.Now().UnixNano(), s.time), Owner: s.owner,
		Generation: s.generation, Events: events,
	}
	next, changed := s.fold(&c)
	docs, err := k.docs(next, changed, "")
	h.must(err)
	h.must(h.base.Append(context.Background(), []store.Entry{{Commit: c, Docs: docs}})[0])
}

func TestStartSetsFormerSessionsOffline(t *testing.T) {
	t.Parallel()
	h := open(t)
	for i := range 3 {
		h.registered(testID(i))
	}
	x := h.signIn(testID(0), alice, 1, "conn-2")
	h.must(h.d.Offline(t.Context(), x.stamp()))
	h.restart()
	for i := range 3 {
		h.eventually("offline", func() bool { return !h.device(alice, testID(i)).Metadata.Connection.Online })
	}
	h.eventually("the index is empty", func() bool {
		for range h.base.Range(t.Context(), onlineIndex, "", "") {
			return false
		}
		return true
	})
	h.expect(testID(1), "registered", "meta 0 online out-of-sync", "meta 1 offline out-of-sync")
	h.expect(testID(0), "registered", "meta 0 online out-of-sync", "meta 1 online out-of-sync", "meta 2 offline out-of-sync")
}

func TestStartLeavesNewSessionsAlone(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(h.d.Offline(t.Context(), x.stamp()))
	var former store.Doc
	var err error
	former, err = h.base.Get(t.Context(), onlineIndex, string(lamp))
	h.must(err)
	h.restart()
	y := h.signIn(lamp, alice, 1, "conn-2")
	// As if the start had come to this device only now.
	if n := h.d.formerBatch(t.Context(), onlineIndex, []store.Doc{former}, h.d.endSession); n != 0 {
		t.Errorf("%d devices could not be done", n)
	}
	if !h.device(alice, lamp).Metadata.Connection.Online {
		t.Error("the new session was set offline")
	}
	doc, err := h.base.Get(t.Context(), onlineIndex, string(lamp))
	h.must(err)
	if string(doc.Value) != h.d.run {
		t.Error("the device left the index of those that may be online")
	}
	h.must(y.notify(value("/light", 1)))
}

func TestOfflineIsStoredOnceTheStoreIsBack(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	x := h.registered(lamp)
	f.set(func(f *fake) { f.append = away })
	wantKind(t, h.d.Offline(t.Context(), x.stamp()), hub.Unavailable, "")
	f.set(func(f *fake) { f.append = nil })
	h.eventually("offline", func() bool { return !h.device(alice, lamp).Metadata.Connection.Online })
}

func TestSignInThatNobodyWaitedForGoesOffline(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	h.must(h.d.Register(t.Context(), own(lamp, alice, 1), ""))
	ctx, cancel := context.WithCancel(t.Context())
	answered := make(chan struct{})
	f.set(func(f *fake) {
		f.append = func(c context.Context, entries []store.Entry) []error {
			cancel()
			<-answered // the caller has gone before the commit is stored
			f.set(func(f *fake) { f.append = nil })
			return f.Store.Append(c, entries)
		}
	})
	_, err := h.d.SignIn(ctx, own(lamp, alice, 1), conn("conn-1"), "", newEnd())
	close(answered)
	wantKind(t, err, hub.Unavailable, "")
	h.eventually("offline", func() bool {
		d := h.device(alice, lamp)
		return d.MetaCause.Version == 1 && !d.Metadata.Connection.Online
	})
}

func TestSignInNeedsTheIndex(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	h.must(h.d.Register(t.Context(), own(lamp, alice, 1), ""))
	f.set(func(f *fake) {
		f.put = func(context.Context, string, store.Doc) (uint64, error) {
			return 0, &hub.Error{Kind: hub.Unavailable, Op: "fake.Put"}
		}
	})
	_, err := h.d.SignIn(t.Context(), own(lamp, alice, 1), conn("conn-1"), "", newEnd())
	wantKind(t, err, hub.Unavailable, "")
	h.expect(lamp, "registered") // nothing half done
}

// What a device said of its own network stays over sessions and restarts, is recorded again only when it differs, and is the
// owner's: the next one does not see it.
func TestLocalEndpoints(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	want := func(what string, events int, endpoints ...string) {
		t.Helper()
		if got := h.device(alice, lamp).Metadata.Connection.LocalEndpoints; !slices.Equal(got, endpoints) {
			t.Errorf("%s: the endpoints are %q, want %q", what, got, endpoints)
		}
		if got := len(h.events(lamp)); got != events {
			t.Errorf("%s: %d events, want %d: %q", what, got, events, h.events(lamp))
		}
	}
	h.must(h.d.SetLocalEndpoints(t.Context(), x.stamp(), nil))
	want("none, as before", 2)
	h.must(h.d.SetLocalEndpoints(t.Context(), x.stamp(), []string{"coap://192.0.2.1:5683", "coaps://192.0.2.1:5684"}))
	want("two", 3, "coap://192.0.2.1:5683", "coaps://192.0.2.1:5684")
	h.must(h.d.SetLocalEndpoints(t.Context(), x.stamp(), []string{"coap://192.0.2.1:5683", "coaps://192.0.2.1:5684"}))
	want("the same", 3, "coap://192.0.2.1:5683", "coaps://192.0.2.1:5684")
	if ev := h.commits(lamp)[2].Events[0]; ev.Metadata == nil || !ev.Metadata.Connection.Online || ev.Session != x.sess.Number {
		t.Errorf("the event is %+v", ev)
	}
	h.must(h.d.SignOut(t.Context(), x.stamp()))
	h.restart()
	y := h.signIn(lamp, alice, 1, "conn-2")
	want("another session", 5, "coap://192.0.2.1:5683", "coaps://192.0.2.1:5684")
	wantKind(t, h.d.SetLocalEndpoints(t.Context(), x.stamp(), nil), hub.Precondition, "session-superseded")
	h.must(h.d.SetLocalEndpoints(t.Context(), y.stamp(), []string{}))
	want("nowhere", 6)
	h.must(h.d.SetLocalEndpoints(t.Context(), y.stamp(), []string{"coap://192.0.2.7"}))
	h.must(h.d.Register(t.Context(), own(lamp, alice, 2), ""))
	want("registered anew", 8)
}
