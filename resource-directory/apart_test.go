package resourcedirectory

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/bus"
	"github.com/coaphub/coaphub/internal/bus/bustest"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// town is directories and gateways in processes of their own, but for the store that they share.
type town struct {
	t   testing.TB
	url string
	st  store.Store
}

func newTown(t testing.TB) *town {
	s, err := pebblestore.Open(t.TempDir(), pebblestore.Options{MinFree: -1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, err := Verify(context.Background(), s, func(dev hub.DeviceID, problem string) { t.Errorf("device %s: %s", dev, problem) })
		if err != nil {
			t.Errorf("verify: %v", err)
		}
		if err := s.Close(); err != nil {
			t.Errorf("close the store: %v", err)
		}
	})
	return &town{t, bustest.Server(t, nil).ClientURL(), s}
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// process is one of them.
type process struct {
	d       *Directory // or
	c       *Client
	bus     *bus.Bus
	members *bus.Members
	// stop ends it in order, kill takes its connection away first.
	stop, kill func()
}

// start starts a process of a part.
func (w *town) start(part, name string) *process {
	w.t.Helper()
	return w.startAt(w.url, part, name)
}

func (w *town) startAt(url, part, name string) *process {
	w.t.Helper()
	reg := prometheus.NewRegistry()
	b, err := bus.Connect(bus.Config{URLs: []string{url}}, "00000000-0000-4000-8000-00000000000b", "v1", name, quiet, reg)
	if err != nil {
		w.t.Fatal(err)
	}
	p := &process{bus: b}
	var load func() bus.Load
	if part == Part {
		load = func() bus.Load { return p.d.Load() }
	}
	p.members = b.Members(bus.Member{Part: part, Instance: name}, load, quiet)
	var run func(context.Context, func()) error
	if part == Part {
		if p.d, err = New(Default(), w.st, quiet, reg, name); err != nil {
			w.t.Fatal(err)
		}
		p.d.Apart(b, p.members, name)
		run = p.d.Run
	} else {
		reader, err := NewReader(w.st, reg)
		if err != nil {
			w.t.Fatal(err)
		}
		p.c = NewClient(b, reader, name, p.members, quiet)
		run = p.c.Run
	}
	ctx, cancel := context.WithCancel(context.Background())
	all, over := context.WithCancel(context.Background())
	var parts sync.WaitGroup
	ready := make(chan struct{}, 2)
	start := func(ctx context.Context, f func(context.Context, func()) error) {
		parts.Go(func() {
			if err := f(ctx, func() { ready <- struct{}{} }); err != nil {
				w.t.Errorf("%s: %v", name, err)
			}
		})
		<-ready
	}
	start(all, p.members.Run)
	start(ctx, run)
	p.stop = sync.OnceFunc(func() {
		cancel()
		time.AfterFunc(2*time.Second, over) // the members hear of it first
		parts.Wait()
		b.Close()
	})
	p.kill = func() {
		b.Close()
		over()
		p.stop()
	}
	w.t.Cleanup(p.stop)
	return p
}

// directories starts so many, and waits until each knows all.
func (w *town) directories(n int) []*process {
	w.t.Helper()
	var all []*process
	for i := range n {
		all = append(all, w.start(Part, fmt.Sprintf("rd-%d", i)))
	}
	w.settled(all...)
	return all
}

// settled waits until these share the partitions.
func (w *town) settled(all ...*process) {
	w.t.Helper()
	w.eventually("the partitions are shared", func() bool {
		sum, some := 0, true
		for _, p := range all {
			sum += p.d.Partitions()
			some = some && p.d.Partitions() > 0
		}
		return sum == partitions && some
	})
}

func (w *town) eventually(what string, ok func() bool) {
	w.t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			w.t.Fatalf("it never happened: %s", what)
		}
	}
}

// at is a device of which one of them is the home.
func (w *town) at(p *process) hub.DeviceID {
	w.t.Helper()
	for i := range 10_000 {
		if dev := testID(i); p.d.serves(dev) {
			return dev
		}
	}
	w.t.Fatal("it has no partition")
	return ""
}

type guest struct {
	w    *town
	gw   *process
	sess hub.Session
	end  *end
	msg  uint64
}

func (w *town) signIn(gw *process, name string, dev hub.DeviceID, id string) *guest {
	w.t.Helper()
	x := &guest{w: w, gw: gw, end: newEnd()}
	c := conn(id)
	c.Service = name
	var err error
	if x.sess, err = gw.c.SignIn(w.t.Context(), own(dev, alice, 1), c, "user-1", x.end); err != nil {
		w.t.Fatal(err)
	}
	return x
}

func (x *guest) stamp() hub.Stamp {
	x.msg++
	return hub.Stamp{Device: x.sess.Device, Session: x.sess.Number, Message: x.msg, User: "user-1"}
}

func (w *town) device(from *process, dev hub.DeviceID) *hub.Device {
	w.t.Helper()
	d, err := from.c.Device(w.t.Context(), alice, dev)
	if err != nil {
		w.t.Fatal(err)
	}
	return d
}

func (w *town) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// A device signs in at one gateway and then at another, publishes, notifies and is commanded, and every door sees the same, wherever its
// directory is.
func TestApart(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	rds := w.directories(2)
	one, two := w.start(GatewayPart, "gw-1"), w.start(GatewayPart, "gw-2")
	ctx := t.Context()
	for _, rd := range rds {
		dev := w.at(rd)
		w.must(one.c.Register(ctx, own(dev, alice, 1), "user-1"))
		w.must(one.c.Register(ctx, own(dev, alice, 1), "user-1")) // again, as after a lost answer
		first := w.signIn(one, "gw-1", dev, "conn-1")
		x := w.signIn(two, "gw-2", dev, "conn-2")
		if why := first.end.why(t); why != "second-session" {
			t.Errorf("the first session is closed for %q", why)
		}
		if err := one.c.Notify(ctx, first.stamp(), []hub.Change{value("/light", 0)}); !hub.IsKind(err, hub.Precondition) {
			t.Errorf("the first session writes: %v", err)
		}
		w.must(one.c.Offline(ctx, first.stamp()))
		links, err := two.c.Publish(ctx, x.stamp(), []hub.Link{link("/light", "core.light")})
		if err != nil || len(links) != 1 || links[0].Href != "/light" || links[0].Types[0] != "core.light" {
			t.Fatalf("published %+v, %v", links, err)
		}
		w.must(two.c.Notify(ctx, x.stamp(), []hub.Change{value("/light", 1)}))
		w.must(two.c.SetTwin(ctx, x.stamp(), hub.TwinInSync))
		w.must(two.c.SetLocalEndpoints(ctx, x.stamp(), []string{"coap://192.0.2.1:5683"}))

		d := w.device(one, dev)
		c := d.Metadata.Connection
		if !c.Online || c.Service != "gw-2" || d.Metadata.Twin.State != hub.TwinInSync || len(c.LocalEndpoints) != 1 || d.Links.Len() != 1 || twinOf(t, d, "/light") != "1" {
			t.Errorf("the device is %+v", d)
		}
		if tags, err := one.c.ETags(ctx, dev, 4); err != nil || len(tags) != 0 {
			t.Errorf("ETags %q, %v", tags, err)
		}

		// A command by way of the other gateway: the session is woken, takes it, and answers.
		told := make(chan hub.Outcome, 1)
		go func() {
			out, err := one.c.Command(ctx, alice, orderFor(dev, 2))
			if err != nil {
				t.Errorf("the command: %v", err)
			}
			told <- out
		}()
		select {
		case <-x.end.woken:
		case <-time.After(20 * time.Second):
			t.Fatal("the session is not woken")
		}
		taken, more, err := two.c.TakeCommands(ctx, x.stamp(), nil, 4)
		if err != nil || more || len(taken) != 1 || taken[0].Href != "/light" || string(taken[0].Content.Data) != "2" {
			t.Fatalf("taken %+v, more %v, %v", taken, more, err)
		}
		w.must(two.c.EndCommand(ctx, x.stamp(), taken[0].ID, hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK, Code: 0x44}))
		if out := <-told; out.End != hub.CommandCompleted || out.Code != 0x44 || out.Device != dev {
			t.Errorf("the command ends as %+v", out)
		}

		labels, err := one.c.SetLabels(ctx, alice, dev, hub.LabelChange{Set: hub.Labels{"room": "kitchen"}}, "user-1")
		if err != nil || labels["room"] != "kitchen" {
			t.Errorf("labels %v, %v", labels, err)
		}
		_, err = one.c.CancelCommands(ctx, alice, dev, hub.CommandPick{All: true}, "user-1", "")
		wantKind(t, err, hub.NotFound, "command-unknown")
		_, err = one.c.Device(ctx, bob, dev)
		wantKind(t, err, hub.NotFound, "")
		var events []string
		for c, err := range one.c.History(ctx, alice, dev, time.Time{}) {
			w.must(err)
			for _, ev := range c.Events {
				events = append(events, word(ev))
			}
		}
		want := []string{
			"registered", "meta 0 online out-of-sync", "meta 1 online out-of-sync", "published 0 [/light]", "changed 0 /light 1 1",
			"meta 2 online in-sync", "meta 3 online in-sync", "pending 1 3 /light", "bound /light", "ended 2 1 /light 1", "?",
		}
		if !slices.Equal(events, want) {
			t.Errorf("history %q", events)
		}
		was, err := one.c.DeviceAt(ctx, alice, dev, time.Unix(0, w.device(one, dev).Metadata.Twin.InSyncAt))
		if err != nil || twinOf(t, was, "/light") != "1" {
			t.Errorf("as it was: %+v, %v", was, err)
		}

		w.must(two.c.SignOut(ctx, x.stamp()))
		if d := w.device(one, dev); d.Metadata.Connection.Online {
			t.Error("it is online after its sign-out")
		}
		fenced := w.signIn(one, "gw-1", dev, "conn-3")
		wantKind(t, two.c.EndSession(ctx, bob, dev, "hub"), hub.Denied, "")
		w.must(two.c.EndSession(ctx, alice, dev, "hub"))
		if err := one.c.Notify(ctx, fenced.stamp(), []hub.Change{value("/light", 9)}); !hub.IsKind(err, hub.Precondition) {
			t.Errorf("a session that was ended writes: %v", err)
		}
		w.must(one.c.Offline(ctx, fenced.stamp()))
		last := w.signIn(one, "gw-1", dev, "conn-4")
		w.must(two.c.Unregister(ctx, own(dev, alice, 1), "user-1"))
		if why := last.end.why(t); why != "deleted" {
			t.Errorf("the session is closed for %q", why)
		}
	}
}

// Many devices are listed in order, whoever has them.
func TestApartLists(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	w.directories(3)
	gw := w.start(GatewayPart, "gw")
	var ids []hub.DeviceID
	for i := range 2*window + 7 {
		ids = append(ids, testID(i))
	}
	var all sync.WaitGroup
	for part := range slices.Chunk(ids, 64) {
		all.Go(func() {
			for _, dev := range part {
				if err := gw.c.Register(t.Context(), own(dev, alice, 1), "user-1"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	slices.Reverse(ids)
	var got []hub.DeviceID
	for d, err := range gw.c.Devices(t.Context(), alice, append(ids, ids[0], "d0000000-0000-4000-8000-ffffffffffff")) {
		w.must(err)
		got = append(got, d.ID)
	}
	slices.Reverse(ids)
	if !slices.Equal(got, ids) {
		t.Errorf("%d devices of %d, or in another order", len(got), len(ids))
	}
	head, err := gw.c.FeedHead(t.Context())
	w.must(err)
	n := 0
	for f, err := range gw.c.Feed(t.Context(), alice, hub.Cursor{Log: head.Log}, head.After) {
		w.must(err)
		n += len(f.Commit.Events)
	}
	if n != len(ids) {
		t.Errorf("%d events in the feed", n)
	}
}

// Directories come and go, in order and not; no write that was acknowledged is lost, none is carried out twice, and none fails.
func TestDirectoriesComeAndGo(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	rds := w.directories(2)
	gw := w.start(GatewayPart, "gw")
	const devices = 16
	ctx, stop := context.WithCancel(t.Context())
	counts := make([]int, devices)
	var all sync.WaitGroup
	var guests []*guest
	for i := range devices {
		dev := testID(i)
		w.must(gw.c.Register(ctx, own(dev, alice, 1), "user-1"))
		guests = append(guests, w.signIn(gw, "gw", dev, fmt.Sprint("conn-", i)))
	}
	for i, x := range guests {
		all.Go(func() {
			for ctx.Err() == nil {
				from, change := x.stamp(), []hub.Change{value("/light", counts[i]+1)}
				// As a gateway does: the same number again until it is known what became of it.
				err := persist(t.Context(), unknown, func(ctx context.Context) error { return gw.c.Notify(ctx, from, change) })
				if err != nil {
					t.Errorf("device %d: %v", i, err)
					return
				}
				counts[i]++
			}
		})
	}
	third := w.start(Part, "rd-2")
	w.settled(rds[0], rds[1], third)
	rds[0].stop()
	w.settled(rds[1], third)
	rds[1].kill()
	w.settled(third)
	stop()
	all.Wait()
	for i, x := range guests {
		d := w.device(gw, x.sess.Device)
		if got := twinOf(t, d, "/light"); got != fmt.Sprint(counts[i]) || counts[i] == 0 {
			t.Errorf("device %d has %s after %d writes", i, got, counts[i])
		}
		if r, _ := d.Resources.Get("/light"); int(r.Version) != counts[i]-1 {
			t.Errorf("device %d: %d writes make version %d", i, counts[i], r.Version)
		}
		if !d.Metadata.Connection.Online {
			t.Errorf("device %d is shown offline", i)
		}
		if len(x.end.reason) > 0 {
			t.Errorf("the session of device %d was closed: %s", i, <-x.end.reason)
		}
	}
}

// Devices of a gateway that is gone are shown offline, and no others; what waited in a directory that is gone ends at its time.
func TestGoneGatewaysAndDirectories(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	rds := w.directories(2)
	lost, stays := w.start(GatewayPart, "gw-1"), w.start(GatewayPart, "gw-2")
	dev, other := w.at(rds[0]), w.at(rds[1])
	for _, d := range []hub.DeviceID{dev, other} {
		w.must(stays.c.Register(t.Context(), own(d, alice, 1), "user-1"))
	}
	w.signIn(lost, "gw-1", dev, "conn-1")
	w.signIn(stays, "gw-2", other, "conn-2")
	o := orderFor(dev, 1)
	o.TTL, o.Async = 8*time.Second, true
	_, err := stays.c.Command(t.Context(), alice, o)
	w.must(err)
	lost.kill()
	rds[0].kill() // which had the device, and its command
	w.eventually("the device is offline and its command has ended", func() bool {
		d, err := stays.c.Device(t.Context(), alice, dev)
		return err == nil && !d.Metadata.Connection.Online && len(d.Commands) == 0
	})
	if d := w.device(stays, other); !d.Metadata.Connection.Online {
		t.Error("a device of a gateway that lives is offline")
	}
}

// A gateway that nobody heard for a while has its devices offline, and online again in the same sessions once it is back; a session that
// another took over meanwhile is closed.
func TestGatewayIsBack(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	w.directories(2)
	line := newLine(t, w.url)
	away, other := w.startAt(line.url, GatewayPart, "gw-1"), w.start(GatewayPart, "gw-2")
	stays, moves := testID(1), testID(2)
	for _, dev := range []hub.DeviceID{stays, moves} {
		w.must(other.c.Register(t.Context(), own(dev, alice, 1), "user-1"))
	}
	x, y := w.signIn(away, "gw-1", stays, "conn-1"), w.signIn(away, "gw-1", moves, "conn-2")
	w.must(away.c.SetTwin(t.Context(), x.stamp(), hub.TwinInSync))
	line.cut()
	offline := func(dev hub.DeviceID) bool { return !w.device(other, dev).Metadata.Connection.Online }
	w.eventually("both are offline", func() bool { return offline(stays) && offline(moves) })
	w.signIn(other, "gw-2", moves, "conn-3")
	line.mend()
	w.eventually("it is online again", func() bool { return !offline(stays) })
	d := w.device(other, stays)
	if d.Metadata.Connection.ID != "conn-1" || d.Metadata.Connection.Service != "gw-1" || d.Metadata.Twin.State != hub.TwinInSync {
		t.Errorf("it is back as %+v", d.Metadata)
	}
	if why := y.end.why(t); why != "second-session" {
		t.Errorf("the session that another took over is closed for %q", why)
	}
	w.must(away.c.Notify(t.Context(), x.stamp(), []hub.Change{value("/light", 7)}))
	if got := twinOf(t, w.device(other, stays), "/light"); got != "7" {
		t.Errorf("the session goes on, and the twin is %s", got)
	}
	if d := w.device(other, moves); d.Metadata.Connection.Service != "gw-2" {
		t.Errorf("the other is at %s", d.Metadata.Connection.Service)
	}
}

// line is a connection to a server that can be cut.
type line struct {
	url, to string
	mu      sync.Mutex // guards all below
	down    bool
	conns   []net.Conn
}

func newLine(t *testing.T, url string) *line {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &line{url: "nats://" + ln.Addr().String(), to: strings.TrimPrefix(url, "nats://")}
	var all sync.WaitGroup
	t.Cleanup(func() { _ = ln.Close(); l.cut(); all.Wait() })
	all.Go(func() {
		for {
			in, err := ln.Accept()
			if err != nil {
				return
			}
			out, err := net.Dial("tcp", l.to)
			if err != nil || !l.take(in, out) {
				_ = in.Close()
				if err == nil {
					_ = out.Close()
				}
				continue
			}
			for _, pair := range [][2]net.Conn{{in, out}, {out, in}} {
				all.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					_, _ = pair[0].Close(), pair[1].Close()
				})
			}
		}
	})
	return l
}

func (l *line) take(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.down {
		return false
	}
	l.conns = append(l.conns, conns...)
	return true
}

func (l *line) cut() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = true
	for _, c := range l.conns {
		_ = c.Close()
	}
	l.conns = nil
}

func (l *line) mend() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = false
}

// A directory that stops does not wait for commands that wait for devices: their callers hear of it at once, and those that may ask again
// do so where the device is now.
func TestCommandsOfADirectoryThatStops(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	rds := w.directories(2)
	gw := w.start(GatewayPart, "gw")
	dev := w.at(rds[0])
	w.must(gw.c.Register(t.Context(), own(dev, alice, 1), "user-1"))
	answers := map[string]chan error{"": make(chan error, 1), "a key": make(chan error, 1)}
	for key, answer := range answers {
		o := orderFor(dev, 1)
		o.TTL, o.Key, o.Force = time.Minute, key, true
		go func() {
			_, err := gw.c.Command(t.Context(), alice, o)
			answer <- err
		}()
	}
	commands := func() []hub.Command { return w.device(gw, dev).Commands }
	w.eventually("the commands wait", func() bool { return len(commands()) == 2 })
	rds[0].stop()
	var e *hub.Error
	if err := <-answers[""]; !errors.As(err, &e) || e.Code != errStopping.Code {
		t.Errorf("a caller without a key was told %v", err)
	}
	x := w.signIn(gw, "gw", dev, "conn-1")
	for range answers { // one at a time for an href, whichever came first
		taken, _, err := gw.c.TakeCommands(t.Context(), x.stamp(), nil, 4)
		w.must(err)
		for _, c := range taken {
			w.must(gw.c.EndCommand(t.Context(), x.stamp(), c.ID, hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK, Code: 0x44}))
		}
	}
	w.must(<-answers["a key"])
}

func orderFor(dev hub.DeviceID, v any) hub.Order {
	o := updateOf("/light", v)
	o.Device = dev
	return o
}

// Without directories a call waits for one, and ends with its caller's time.
func TestNoDirectory(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	gw := w.start(GatewayPart, "gw")
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	err := gw.c.Register(ctx, own(lamp, alice, 1), "user-1")
	if !hub.IsKind(err, hub.Unavailable) {
		t.Errorf("without a directory: %v", err)
	}
	done := make(chan error, 1)
	go func() { done <- gw.c.Register(t.Context(), own(lamp, alice, 1), "user-1") }()
	w.directories(1)
	w.must(<-done)
}

// Each device's history is trimmed by the directory that serves it, and by no other.
func TestEachTrimsItsOwn(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	rds := w.directories(2)
	gw := w.start(GatewayPart, "gw")
	later := time.Now().Add(2 * Default().History.Retention)
	for i, rd := range rds {
		dev := w.at(rd)
		w.must(gw.c.Register(t.Context(), own(dev, alice, 1), "user-1"))
		x := w.signIn(gw, "gw", dev, "conn-1")
		for n := range 64 {
			w.must(gw.c.Notify(t.Context(), x.stamp(), []hub.Change{value("/light", n)}))
		}
		commits := func() (n int) {
			for _, err := range w.st.Commits(t.Context(), dev, 0) {
				w.must(err)
				n++
			}
			return n
		}
		before := commits()
		for _, who := range []*process{rds[1-i], rd} {
			// Made anew, so that it believes the clock.
			trim := &trimmer{d: who.d, keep: who.d.cfg.History.Retention}
			w.must(trim.step(t.Context(), later, 0))
			switch now := commits(); {
			case who != rd && now != before:
				t.Errorf("%d of %d commits are left after a step of a directory that does not serve the device", now, before)
			case who == rd && now >= before:
				t.Errorf("none of %d commits was trimmed", before)
			}
		}
	}
}

// A directory that others have written behind refuses nothing, and takes nothing for done, because of what it remembers: it looks first.
func TestOldPictureDecidesNothing(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	one := w.directories(1)[0]
	gw := w.start(GatewayPart, "gw")
	dev := w.at(one)
	w.must(gw.c.Register(t.Context(), own(dev, alice, 1), "user-1"))
	first := w.signIn(gw, "gw", dev, "conn-1")
	w.must(gw.c.Notify(t.Context(), first.stamp(), []hub.Change{value("/light", 1)}))
	// Another that serves nothing here writes the device behind its back: a sign-in, and another value.
	other, stop := run(t, Default(), w.st, &logBuffer{})
	defer stop()
	sess, err := other.SignIn(t.Context(), own(dev, alice, 1), conn("conn-2"), "user-1", newEnd())
	w.must(err)
	from := hub.Stamp{Device: dev, Session: sess.Number, User: "user-1"}
	from.Message++
	w.must(other.Notify(t.Context(), from, []hub.Change{value("/light", 2)}))
	from.Message++
	w.must(gw.c.Notify(t.Context(), from, []hub.Change{value("/light", 1)})) // as it remembers it, in a session that it does not know
	if got := twinOf(t, w.device(gw, dev), "/light"); got != "1" {
		t.Errorf("the last value was 1, and the twin has %s", got)
	}
}

// A directory that comes does not take what belongs to others before it has heard of them: two would write the same devices, and one of
// them show an old picture until it wrote again.
func TestNewDirectoryTakesItsShare(t *testing.T) {
	t.Parallel()
	w := newTown(t)
	w.directories(2)
	all := 0
	for i := range 3 {
		if w.start(Part, fmt.Sprintf("late-%d", i)).d.Partitions() == partitions {
			all++ // on a busy machine it may be told too late
		}
	}
	if all == 3 {
		t.Error("beside others it starts with all partitions")
	}
}

// What another directory wrote, who did not know better or had it under way when it stood still, does not stay hidden behind the picture
// that a device's home has in memory.
func TestOthersWritesAreSeen(t *testing.T) {
	w := newTown(t)
	both := w.directories(2)
	home, other := both[0], both[1]
	w.start(GatewayPart, "gateway-1") // the session's, which goes on
	dev := w.at(home)
	if err := home.d.Register(t.Context(), own(dev, alice, 1), "user-1"); err != nil {
		t.Fatal(err)
	}
	sess, err := home.d.SignIn(t.Context(), own(dev, alice, 1), conn("conn-1"), "user-1", nil)
	if err != nil {
		t.Fatal(err)
	}
	report := func(p *process, message uint64, v int) {
		t.Helper()
		from := hub.Stamp{Device: dev, Session: sess.Number, Message: message, User: "user-1"}
		if err := p.d.Notify(t.Context(), from, []hub.Change{value("/light", v)}); err != nil {
			t.Fatal(err)
		}
	}
	report(home, 1, 1)
	report(other, 2, 2)
	w.eventually("the device's home shows what another directory wrote", func() bool {
		d, err := home.d.Device(t.Context(), alice, dev)
		return err == nil && twinOf(t, d, "/light") == "2"
	})
}

// Who ends a device's session when its gateway is gone is looked up each time: another directory may have written somebody else down.
func TestIndexIsNotRemembered(t *testing.T) {
	w := newTown(t)
	both := w.directories(2)
	dev := w.at(both[0])
	if err := both[0].d.Register(t.Context(), own(dev, alice, 1), "user-1"); err != nil {
		t.Fatal(err)
	}
	for i, at := range []*process{both[0], both[1], both[0]} {
		c := conn(fmt.Sprint("conn-", i))
		c.Service = fmt.Sprint("gateway-", i%2)
		if _, err := at.d.SignIn(t.Context(), own(dev, alice, 1), c, "user-1", nil); err != nil {
			t.Fatal(err)
		}
		if doc, err := w.st.Get(t.Context(), onlineIndex, string(dev)); err != nil || string(doc.Value) != c.Service {
			t.Errorf("the index has the session on %s as one of %q: %v", c.Service, doc.Value, err)
		}
	}
}

// A gateway that tells again of a session that a newer one took over from is not written down as who has the device.
func TestOldSessionIsNotIndexed(t *testing.T) {
	w := newTown(t)
	d := w.directories(1)[0].d
	if err := d.Register(t.Context(), own(lamp, alice, 1), "user-1"); err != nil {
		t.Fatal(err)
	}
	var first announced
	for i := range 2 {
		c := conn(fmt.Sprint("conn-", i))
		c.Service = fmt.Sprint("gateway-", i)
		sess, err := d.SignIn(t.Context(), own(lamp, alice, 1), c, "user-1", nil)
		if err != nil {
			t.Fatal(err)
		}
		if i == 0 {
			first = announced{From: hub.Stamp{Device: lamp, Session: sess.Number}, Connection: c}
		}
	}
	if is, err := d.announce(t.Context(), first); err != nil || is {
		t.Errorf("the old session is the device's: %t, %v", is, err)
	}
	if doc, err := w.st.Get(t.Context(), onlineIndex, string(lamp)); err != nil || string(doc.Value) != "gateway-1" {
		t.Errorf("the index has the device at %q: %v", doc.Value, err)
	}
}

// A gateway that takes a device and is gone before anybody has heard of it leaves nobody online.
func TestUnheardGatewayIsGone(t *testing.T) {
	w := newTown(t)
	d := w.directories(1)[0].d
	for i := range 3 { // the last one when the directory has already looked for all who were never heard of
		dev := testID(i)
		if err := d.Register(t.Context(), own(dev, alice, 1), "user-1"); err != nil {
			t.Fatal(err)
		}
		c := conn("conn-1")
		c.Service = fmt.Sprint("unheard-", i)
		if _, err := d.SignIn(t.Context(), own(dev, alice, 1), c, "user-1", nil); err != nil {
			t.Fatal(err)
		}
		w.eventually("the device is offline", func() bool {
			got, err := d.Device(t.Context(), alice, dev)
			return err == nil && !got.Metadata.Connection.Online
		})
	}
}
