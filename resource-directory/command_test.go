package resourcedirectory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

func update(v any) hub.Order {
	return hub.Order{
		Device: lamp, Kind: hub.CommandUpdate, Href: "/light", User: "user-2", Connection: "app-1",
		Content: hub.Content{Type: "application/json", Format: hub.FormatJSON, Data: fmt.Append(nil, v)},
	}
}

// updateOf is update for another resource, which need not be there.
func updateOf(href hub.Href, v any) hub.Order {
	o := update(v)
	o.Href, o.Force = href, true
	return o
}

// asked is a command whose end somebody waits for.
type asked struct {
	out  hub.Outcome
	err  error
	done chan struct{}
}

func (h *house) ask(o hub.Order) *asked {
	a := &asked{done: make(chan struct{})}
	go func() {
		defer close(a.done)
		a.out, a.err = h.d.Command(context.Background(), alice, o)
	}()
	return a
}

func (a *asked) wait(t tb) (hub.Outcome, error) {
	t.Helper()
	select {
	case <-a.done:
	case <-time.After(20 * time.Second):
		t.Fatal("nobody was told how the command ended")
	}
	return a.out, a.err
}

func (h *house) async(o hub.Order) {
	h.t.Helper()
	o.Async = true
	_, err := h.d.Command(h.t.Context(), alice, o)
	h.must(err)
}

// commandable is a device with a resource.
func (h *house) commandable() *device {
	h.t.Helper()
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 0)))
	return x
}

func (x *device) take(n int, have ...hub.Taken) []hub.Command {
	x.h.t.Helper()
	cs, _ := x.takeMore(n, have...)
	return cs
}

func (x *device) takeMore(n int, have ...hub.Taken) (_ []hub.Command, more bool) {
	x.h.t.Helper()
	cs, more, err := x.h.d.TakeCommands(x.h.t.Context(), hub.Stamp{Device: x.sess.Device, Session: x.sess.Number, User: "user-1"}, have, n)
	x.h.must(err)
	return cs, more
}

func (x *device) answer(id, v string) error {
	a := hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK, Content: plain(v)}
	return x.h.d.EndCommand(x.h.t.Context(), x.stamp(), id, a)
}

func (e *end) next(t tb) hub.Command {
	t.Helper()
	select {
	case c := <-e.got:
		return c
	case <-time.After(20 * time.Second):
		t.Fatal("no command was delivered")
		return hub.Command{}
	}
}

func TestCommandIsSentAndAnswered(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	a := h.ask(update(1))
	c := x.end.next(t)
	if c.Session != x.sess.Number || string(c.Content.Data) != "1" || c.Kind != hub.CommandUpdate || c.Href != "/light" {
		t.Errorf("delivered %+v", c)
	}
	if d := h.device(alice, lamp); len(d.Commands) != 1 || d.Commands[0].ID != c.ID || d.Commands[0].Cause.User != "user-2" {
		t.Errorf("the picture has %+v", d.Commands)
	}
	h.must(x.answer(c.ID, "done"))
	out, err := a.wait(t)
	h.must(err)
	if out.End != hub.CommandCompleted || out.Status != hub.StatusOK || string(out.Content.Data) != "done" || out.Cause.Correlation != c.ID {
		t.Errorf("outcome %+v", out)
	}
	h.must(h.d.EndCommand(t.Context(), x.same(), c.ID, hub.Answer{End: hub.CommandCompleted})) // the answer to the first was lost
	h.must(x.notify(value("/light", 1)))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 0", "pending 1 3 /light", "ended 2 1 /light 1",
		"changed 3 /light 1 1")
	// Whoever was asked after that end is told that it is late.
	h.must(x.answer(c.ID, "again"))
	if ev := h.events(lamp); ev[len(ev)-1] != "late" {
		t.Errorf("events %q", ev)
	}
}

// Commands for a device that is away go out in order at its next sign-in, each once.
func TestCommandsWaitForTheDevice(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	h.must(h.d.SignOut(t.Context(), x.stamp()))
	for i := range 3 {
		h.async(update(i))
	}
	h.restart()
	y := h.signIn(lamp, alice, 1, "conn-2")
	for i := range 3 {
		cs := y.take(1)
		if len(cs) != 1 || string(cs[0].Content.Data) != fmt.Sprint(i) {
			t.Fatalf("command %d is %+v", i, cs)
		}
		// The answer was lost: asking again gives the same one; who has it gets the next.
		if again := y.take(1); len(again) != 1 || again[0].ID != cs[0].ID {
			t.Fatalf("command %d again is %+v", i, again)
		}
		h.must(y.answer(cs[0].ID, ""))
	}
	if cs := y.take(8); len(cs) != 0 {
		t.Errorf("taken %+v", cs)
	}
}

// A method of RFC 8132 stays with its command until it is sent, and what the device answered with its end.
func TestCommandByAMethodOfItsOwn(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	h.must(h.d.SignOut(t.Context(), x.stamp()))
	orders := []hub.Order{update("p"), update("i"), update("f")}
	for i := range orders {
		orders[i].Method = []uint8{hub.MethodPatch, hub.MethodIPatch, hub.MethodFetch}[i]
	}
	orders[2].Kind = hub.CommandRetrieve
	for _, o := range orders {
		h.async(o)
	}
	h.restart()
	y := h.signIn(lamp, alice, 1, "conn-2")
	for i, o := range orders {
		cs := y.take(1)
		if len(cs) != 1 || cs[0].Code != o.Method || cs[0].Kind != o.Kind || string(cs[0].Content.Data) != []string{"p", "i", "f"}[i] {
			t.Fatalf("command %d is %+v", i, cs)
		}
		h.must(h.d.EndCommand(t.Context(), y.stamp(), cs[0].ID, hub.Answer{End: hub.CommandCompleted, Status: hub.StatusError, Code: 0x89}))
		if out, err := h.d.outcome(t.Context(), lamp, cs[0].ID, 0); err != nil || out.Code != 0x89 {
			t.Errorf("outcome %+v, %v", out, err)
		}
	}
	o := update(1)
	o.Key = "k"
	h.async(o)
	o.Method = hub.MethodPatch
	_, err := h.d.Command(t.Context(), alice, o)
	wantKind(t, err, hub.Invalid, "idempotency-key-reused")
}

// What was sent to a session that is over ends UNAVAILABLE and goes to no other; what was not sent waits on.
func TestSentCommandsEndWithTheirSession(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(h *house, x *device){
		"offline":  func(h *house, x *device) { h.must(h.d.Offline(h.t.Context(), x.stamp())) },
		"sign-out": func(h *house, x *device) { h.must(h.d.SignOut(h.t.Context(), x.stamp())) },
		"sign-in":  func(h *house, _ *device) { h.signIn(lamp, alice, 1, "conn-2") },
	} {
		t.Run(name, func(t *testing.T) {
			h := open(t)
			x := h.commandable()
			x.end.window.Store(2)
			both := []*asked{h.ask(update("sent"))}
			c := x.end.next(t)
			both = append(both, h.ask(updateOf("/fan", "beside")))
			if beside := x.end.next(t); string(beside.Content.Data) != "beside" {
				t.Errorf("beside the first went %+v", beside)
			}
			h.async(update("waits"))
			end(h, x)
			for _, a := range both {
				out, err := a.wait(t)
				h.must(err)
				if out.End != hub.CommandUnavailable || out.Status != hub.StatusUnavailable {
					t.Errorf("outcome %+v", out)
				}
			}
			d := h.device(alice, lamp)
			if len(d.Commands) != 1 || string(d.Commands[0].Content.Data) != "waits" || d.Commands[0].Session != 0 {
				t.Errorf("left %+v", d.Commands)
			}
			err := x.answer(c.ID, "late")
			if name == "offline" { // it may come back with the same number
				h.must(err)
			} else {
				wantKind(t, err, hub.Precondition, "session-superseded")
			}
			y := h.signIn(lamp, alice, 1, "conn-3")
			if cs := y.take(8); len(cs) != 1 || string(cs[0].Content.Data) != "waits" {
				t.Errorf("taken %+v", cs)
			}
		})
	}
}

// A process that died between delivery and answer: the commands end at the next start, and nobody sends them again.
func TestSentCommandEndsWithItsProcess(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	x.end.window.Store(2)
	h.async(update("sent"))
	h.async(updateOf("/fan", "sent"))
	cs := []hub.Command{x.end.next(t), x.end.next(t)}
	h.restart()
	h.eventually("the commands ended", func() bool { return len(h.device(alice, lamp).Commands) == 0 })
	for _, c := range cs {
		out, err := h.d.outcome(t.Context(), lamp, c.ID, 0)
		h.must(err)
		if out.End != hub.CommandUnavailable {
			t.Errorf("outcome %+v", out)
		}
	}
	if cs := h.signIn(lamp, alice, 1, "conn-2").take(8); len(cs) != 0 {
		t.Errorf("sent again: %+v", cs)
	}
}

// A session gets no more at once than it says that its device takes, and of one resource never two, nor a later one before an
// earlier one.
func TestCommandsTakenAtOnce(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	x.end.window.Store(2)
	h.async(update("first"))
	first := x.end.next(t)
	h.async(update("same resource"))
	h.async(updateOf("/fan", "behind what waits"))
	x.end.window.Store(8)
	h.async(updateOf("/tv", "all the same"))
	h.async(update("last"))
	if n := len(x.end.got); n != 0 {
		t.Fatalf("%d were delivered", n)
	}
	take := func(most int, wantMore bool, want string, have ...hub.Taken) []hub.Command {
		t.Helper()
		cs, more := x.takeMore(most, have...)
		var got []string
		for _, c := range cs {
			got = append(got, string(c.Content.Data))
		}
		if strings.Join(got, ", ") != want || more != wantMore {
			t.Fatalf("taken %q, more %t; want %s", got, more, want)
		}
		return cs
	}
	the := func(c hub.Command) hub.Taken { return hub.Taken{ID: c.ID, Href: c.Href} }
	fan := take(1, true, "behind what waits", the(first))[0]
	tv := take(8, true, "all the same", the(first), the(fan))[0]
	take(8, true, "", the(first), the(fan), the(tv))
	take(8, true, "all the same", the(first), the(fan)) // its answer was lost
	h.must(x.answer(first.ID, ""))
	take(8, true, "", the(first), the(fan), the(tv)) // it has ended, but the session is still at it
	second := take(8, true, "same resource", the(fan), the(tv))[0]
	h.must(x.answer(second.ID, ""))
	take(8, false, "last", the(fan), the(tv))
}

// What was sent is not superseded, nor what is of another kind or resource; whoever supersedes goes out in the place of the
// newest, and those who waited for the others are told.
func TestSupersede(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	h.async(update("sent"))
	sent := x.end.next(t)
	retrieve := update("other kind")
	retrieve.Kind, retrieve.Method = hub.CommandRetrieve, hub.MethodFetch
	old := []*asked{}
	for _, o := range []hub.Order{update(1), update(2)} {
		n := len(h.device(alice, lamp).Commands)
		old = append(old, h.ask(o))
		h.eventually("it waits", func() bool { return len(h.device(alice, lamp).Commands) > n })
	}
	h.async(retrieve)
	h.async(updateOf("/fan", "other resource"))
	newest := update(3)
	newest.Supersede, newest.User = true, "user-3"
	h.async(newest)
	for _, a := range old {
		if out, err := a.wait(t); err != nil || out.End != hub.CommandCancelled || out.Status != hub.StatusCanceled || out.Cause.User != "user-3" {
			t.Errorf("one that was superseded: %+v, %v", out, err)
		}
	}
	var left []string
	for _, c := range h.device(alice, lamp).Commands {
		left = append(left, string(c.Content.Data))
	}
	if want := []string{"sent", "other kind", "other resource", "3"}; !slices.Equal(left, want) {
		t.Errorf("left %q, want %q", left, want)
	}
	h.must(x.answer(sent.ID, "")) // it goes on
	for _, want := range []string{"other kind", "other resource", "3"} {
		cs := x.take(1)
		if len(cs) != 1 || string(cs[0].Content.Data) != want {
			t.Fatalf("taken %+v, want %s", cs, want)
		}
		h.must(x.answer(cs[0].ID, ""))
	}
	// One that finds only what it supersedes is sent at once, and after a restart there is only the newest.
	x.end.busy.Store(true)
	h.async(update(4))
	x.end.busy.Store(false)
	h.async(newest)
	if c := x.end.next(t); string(c.Content.Data) != "3" {
		t.Errorf("delivered %+v", c)
	}
	h.must(h.d.SignOut(t.Context(), x.stamp()))
	h.async(update(5))
	h.async(newest)
	h.restart()
	if cs := h.signIn(lamp, alice, 1, "conn-2").take(8); len(cs) != 1 || string(cs[0].Content.Data) != "3" {
		t.Errorf("after a restart %+v", cs)
	}
}

func TestCommandExpires(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := open(t)
		x := h.commandable()
		begun := time.Now()
		o := update("sent")
		o.TTL = 3 * time.Second
		sent := h.ask(o)
		c := x.end.next(t)
		waits := h.ask(update("waits")) // 10 s
		synctest.Wait()
		_, err := sent.wait(t)
		wantKind(t, err, hub.Deadline, "command-expired")
		if d := time.Since(begun); d != 3*time.Second {
			t.Errorf("it ended after %s", d)
		}
		h.must(x.answer(c.ID, "late"))
		if ev := h.events(lamp); !slices.Contains(ev, "late") {
			t.Errorf("the late answer is not there: %q", ev)
		}
		// A start finds what waits by its index, also when nobody touches the device.
		h.must(h.d.Offline(t.Context(), x.stamp()))
		h.close()
		<-waits.done
		h.start()
		synctest.Wait()
		<-time.After(10*time.Second - time.Since(begun) + time.Millisecond)
		synctest.Wait()
		if d := h.device(alice, lamp); len(d.Commands) != 0 {
			t.Errorf("after its end it waits: %+v", d.Commands)
		}
		if ev := h.events(lamp); ev[len(ev)-1] != "ended 4 3 /light 12" {
			t.Errorf("events %q", ev)
		}
		h.close()
	})
}

// One that expired, and whose end cannot be stored, is not handed out over and over, and holds up nothing.
func TestExpiredCommandIsNotHandedOut(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		f := &fake{}
		h := open(t, faked(f))
		x := h.commandable()
		o := update("sent")
		o.TTL = 3 * time.Second
		h.async(o)
		c := x.end.next(t)
		h.async(update("waits")) // for 10 s
		f.set(func(f *fake) {
			f.append = func(ctx context.Context, entries []store.Entry) []error {
				ends := slices.ContainsFunc(entries, func(e store.Entry) bool { return e.Commit.Events[0].Kind == hub.CommandEnded })
				if !ends {
					return f.Store.Append(ctx, entries)
				}
				errs := make([]error, len(entries))
				for i := range errs {
					errs[i] = hub.NewError(hub.Unavailable, "disk-full", "")
				}
				return errs
			}
		})
		<-time.After(4 * time.Second)
		synctest.Wait()
		if d := h.device(alice, lamp); len(d.Commands) != 2 {
			t.Fatalf("%d commands, want the one that cannot end, too", len(d.Commands))
		}
		if cs, more := x.takeMore(8, hub.Taken{ID: c.ID, Href: c.Href}); len(cs) != 0 || !more { // the session is still at it
			t.Errorf("taken %+v, more %t", cs, more)
		}
		if cs, more := x.takeMore(8); len(cs) != 1 || string(cs[0].Content.Data) != "waits" || more {
			t.Errorf("taken %+v, more %t", cs, more)
		}
		f.set(func(f *fake) { f.append = nil })
		h.close()
	})
}

func TestCommandIsCancelled(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	x.end.busy.Store(true)
	a, b := h.ask(update(1)), h.ask(hub.Order{Device: lamp, Kind: hub.CommandTwinOff})
	h.eventually("both wait", func() bool { return len(h.device(alice, lamp).Commands) == 2 })
	_, err := h.d.CancelCommands(t.Context(), bob, lamp, hub.CommandPick{Href: "/light"}, "u", "")
	wantKind(t, err, hub.Denied, "device-not-yours")
	_, err = h.d.CancelCommands(t.Context(), alice, lamp, hub.CommandPick{Href: "/light", IDs: []string{"x"}}, "u", "")
	wantKind(t, err, hub.NotFound, "command-unknown")
	ids, err := h.d.CancelCommands(t.Context(), alice, lamp, hub.CommandPick{Href: "/light"}, "u", "")
	h.must(err)
	out, err := a.wait(t)
	h.must(err)
	if out.End != hub.CommandCancelled || out.Status != hub.StatusCanceled || !slices.Equal(ids, []string{out.Cause.Correlation}) {
		t.Errorf("outcome %+v, cancelled %q", out, ids)
	}
	_, err = h.d.CancelCommands(t.Context(), alice, lamp, hub.CommandPick{Twin: true}, "u", "")
	h.must(err)
	if out, err := b.wait(t); err != nil || out.End != hub.CommandCancelled || out.Metadata == nil || !out.Metadata.Twin.Enabled {
		t.Errorf("outcome %+v, %v", out, err)
	}
	_, err = h.d.CancelCommands(t.Context(), alice, lamp, hub.CommandPick{Href: "/light"}, "u", "")
	wantKind(t, err, hub.NotFound, "command-unknown")
	a, b = h.ask(update(1)), h.ask(hub.Order{Device: lamp, Kind: hub.CommandTwinOff})
	h.eventually("both wait", func() bool { return len(h.device(alice, lamp).Commands) == 2 })
	if ids, err := h.d.CancelCommands(t.Context(), alice, lamp, hub.CommandPick{All: true}, "u", ""); err != nil || len(ids) != 2 {
		t.Errorf("of all: %q, %v", ids, err)
	}
	for _, of := range []*asked{a, b} {
		if out, err := of.wait(t); err != nil || out.End != hub.CommandCancelled {
			t.Errorf("outcome %+v, %v", out, err)
		}
	}
}

func TestTwinCommandsChangeTheMetadata(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	for _, step := range []struct {
		kind    hub.CommandKind
		enabled bool
		state   hub.TwinState
	}{
		{hub.CommandTwinOff, false, hub.TwinDisabled},
		{hub.CommandTwinOn, true, hub.TwinOutOfSync},
		{hub.CommandTwinOff, false, hub.TwinDisabled},
		{hub.CommandTwinSync, true, hub.TwinOutOfSync},
	} {
		a := h.ask(hub.Order{Device: lamp, Kind: step.kind})
		h.must(x.answer(x.end.next(t).ID, ""))
		out, err := a.wait(t)
		h.must(err)
		now := h.device(alice, lamp)
		if m := out.Metadata; m == nil || m.Twin.Enabled != step.enabled || m.Twin.State != step.state || now.Metadata.Twin != m.Twin {
			t.Errorf("after command %d the metadata is %+v, now %+v", step.kind, m, now.Metadata)
		}
		if now.Metadata.Twin.ForcedAt != 0 != (step.kind == hub.CommandTwinSync) || now.MetaCause.Correlation != out.Cause.Correlation {
			t.Errorf("after command %d: %+v, %+v", step.kind, now.Metadata.Twin, now.MetaCause)
		}
	}
}

// While the store refuses writes, commands fail as unavailable and leave nothing; reads go on.
func TestCommandsWhileTheStoreRefuses(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	x := h.commandable()
	h.must(x.notify(value("/light", 1)))
	x.end.busy.Store(true)
	o := update(2)
	o.Async = true
	for _, refusal := range []error{
		hub.NewError(hub.Unavailable, "disk-full", ""), hub.NewError(hub.Exhausted, "store-busy", ""), &hub.Error{Kind: hub.Internal}, errors.New("broken"),
	} {
		f.set(func(f *fake) {
			f.append = func(_ context.Context, entries []store.Entry) []error {
				errs := make([]error, len(entries))
				for i := range errs {
					errs[i] = refusal
				}
				return errs
			}
		})
		_, err := h.d.Command(t.Context(), alice, o)
		var of *hub.Error
		_ = errors.As(refusal, &of)
		code := ""
		if of != nil {
			code = of.Code
		}
		wantKind(t, err, hub.Unavailable, code)
		d := h.device(alice, lamp)
		if got := twinOf(t, d, "/light"); got != "1" || len(d.Commands) != 0 {
			t.Errorf("after %v the twin is %s, %d commands wait", refusal, got, len(d.Commands))
		}
	}
	f.set(func(f *fake) { f.append = nil })
	_, err := h.d.Command(t.Context(), alice, o)
	h.must(err)
	if n := len(h.device(alice, lamp).Commands); n != 1 {
		t.Errorf("%d commands wait", n)
	}
}

func TestCommandsThatAreRefused(t *testing.T) {
	t.Parallel()
	h := open(t, func(h *house) { h.cfg.Limits.Commands = 2 })
	x := h.commandable()
	_, err := x.publish(link("/silent"))
	h.must(err)
	change := func(f func(*hub.Order)) hub.Order {
		o := update(1)
		o.Async = true
		f(&o)
		return o
	}
	for name, c := range map[string]struct {
		o    hub.Order
		by   hub.Owner
		kind hub.Kind
		code string
	}{
		"foreign":      {update(1), bob, hub.Denied, "device-not-yours"},
		"nobody":       {update(1), "", hub.Denied, "device-not-yours"},
		"unknown":      {change(func(o *hub.Order) { o.Device = stove }), alice, hub.Denied, "device-not-yours"},
		"resource":     {change(func(o *hub.Order) { o.Href = "/none" }), alice, hub.NotFound, "resource-unknown"},
		"href":         {change(func(o *hub.Order) { o.Href = "none/" }), alice, hub.Invalid, "href-invalid"},
		"short":        {change(func(o *hub.Order) { o.TTL = 50 * time.Millisecond }), alice, hub.Invalid, "time-to-live-invalid"},
		"negative":     {change(func(o *hub.Order) { o.TTL = -1 }), alice, hub.Invalid, "time-to-live-invalid"},
		"endless":      {change(func(o *hub.Order) { o.TTL = 1<<63 - 1 }), alice, hub.Invalid, "time-to-live-invalid"},
		"kind":         {change(func(o *hub.Order) { o.Kind = 99 }), alice, hub.Invalid, "command-invalid"},
		"method":       {change(func(o *hub.Order) { o.Method = hub.MethodFetch }), alice, hub.Invalid, "command-invalid"},
		"other method": {change(func(o *hub.Order) { o.Kind, o.Method = hub.CommandRetrieve, hub.MethodPatch }), alice, hub.Invalid, "command-invalid"},
		"no method":    {change(func(o *hub.Order) { o.Method = 2 }), alice, hub.Invalid, "command-invalid"},
		"interface":    {change(func(o *hub.Order) { o.Interface = string(make([]byte, 251)) }), alice, hub.Invalid, "interface-invalid"},
		"ETag":         {change(func(o *hub.Order) { o.ETags = [][]byte{make([]byte, 9)} }), alice, hub.Invalid, "etag-invalid"},
		"content":      {change(func(o *hub.Order) { o.Content.Data = make([]byte, hub.MaxContent+1) }), alice, hub.TooLarge, "content-too-large"},
		"condition":    {change(func(o *hub.Order) { o.IfMatch = [][]byte{{1}} }), alice, hub.Precondition, "etag-mismatch"},
		"no condition": {change(func(o *hub.Order) { o.Href, o.IfMatch = "/silent", [][]byte{{}} }), alice, hub.Precondition, "etag-mismatch"},
	} {
		_, err := h.d.Command(t.Context(), c.by, c.o)
		if got, _ := hub.Public(err); !hub.IsKind(err, c.kind) || got != c.code {
			t.Errorf("%s: %v, want %s", name, err, c.code)
		}
	}
	if doc, err := h.base.Get(t.Context(), commandIndex, string(stove)); err != nil || doc.Rev != 0 {
		t.Errorf("a foreign device is in the index: %+v, %v", doc, err)
	}
	h.async(change(func(o *hub.Order) { o.Href, o.Force = "/none", true }))
	h.async(change(func(o *hub.Order) { o.Href, o.Kind = "/silent", hub.CommandRetrieve }))
	_, err = h.d.Command(t.Context(), alice, change(func(*hub.Order) {}))
	wantKind(t, err, hub.Exhausted, "commands-full")
	// Whoever supersedes makes room.
	y := change(func(o *hub.Order) { o.Href, o.Kind, o.Supersede = "/silent", hub.CommandRetrieve, true })
	h.async(y)
	var left []string
	for _, c := range h.device(alice, lamp).Commands {
		left = append(left, string(c.Href))
	}
	if !slices.Equal(left, []string{"/none", "/silent"}) {
		t.Errorf("left %q", left)
	}
}

func TestConditionOnTheTwin(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	c := value("/light", 0)
	c.ETag = []byte{7}
	h.must(x.notify(c))
	for _, tags := range [][][]byte{{{7}}, {{1}, {7}}, {{}}} {
		o := update(1)
		o.IfMatch = tags
		h.async(o)
	}
}

// A condition that the device is to check goes with its command, without what no device can have; the twin is asked first.
func TestConditionForTheDevice(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	c := value("/light", 0)
	c.ETag = []byte{7}
	h.must(x.notify(c))
	h.must(h.d.SignOut(t.Context(), x.stamp()))
	o := update(1)
	o.IfMatch, o.Key = [][]byte{{7}, make([]byte, 9), {}}, "k"
	h.async(o)
	o.ForwardIfMatch = true
	_, err := h.d.Command(t.Context(), alice, o)
	wantKind(t, err, hub.Invalid, "idempotency-key-reused")
	o.Key = ""
	h.async(o)
	for _, tags := range [][][]byte{nil, {make([]byte, 9)}} {
		bad := o
		bad.IfMatch, bad.IfSeq = tags, []uint64{1}
		_, err = h.d.Command(t.Context(), alice, bad)
		wantKind(t, err, hub.Invalid, "condition-invalid")
	}
	o.IfMatch = [][]byte{{8}}
	_, err = h.d.Command(t.Context(), alice, o)
	wantKind(t, err, hub.Precondition, "etag-mismatch")
	h.restart()
	y := h.signIn(lamp, alice, 1, "conn-2")
	for i, want := range []string{"[]", "[07 ]"} {
		cs := y.take(1)
		if len(cs) != 1 || fmt.Sprintf("%x", cs[0].IfMatch) != want {
			t.Fatalf("command %d is %+v, want condition %s", i, cs, want)
		}
		h.must(y.answer(cs[0].ID, ""))
	}
}

func TestIdempotencyKey(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		h := open(t)
		x := h.commandable()
		o := update(1)
		o.Key = "k"
		a, b := h.ask(o), h.ask(o)
		c := x.end.next(t)
		synctest.Wait()
		h.must(x.answer(c.ID, "once"))
		for _, w := range []*asked{a, b} {
			if out, err := w.wait(t); err != nil || string(out.Content.Data) != "once" || out.Cause.Correlation != c.ID {
				t.Errorf("outcome %+v, %v", out, err)
			}
		}
		other := o
		other.Content.Data = []byte("2")
		_, err := h.d.Command(t.Context(), alice, other)
		wantKind(t, err, hub.Invalid, "idempotency-key-reused")
		h.must(h.d.Offline(t.Context(), x.stamp()))
		h.close() // a running directory would look around 40 000 times
		<-time.After(23 * time.Hour)
		h.start()
		if out, err := h.d.Command(t.Context(), alice, o); err != nil || string(out.Content.Data) != "once" {
			t.Errorf("after a restart: %+v, %v", out, err)
		}
		h.close()
		<-time.After(2 * time.Hour)
		h.start()
		h.async(o) // a day later it is a new one
		if s, err := h.d.read(t.Context(), lamp); err != nil || len(s.commands) != 1 || s.keys.byKey.n != 1 || s.keys.byAge.n != 1 {
			t.Errorf("%+v, %v", s, err)
		}
		h.close()
	})
}

// Deleting a device ends its commands, for the owner who gave them.
// A repeat is known by what was asked for, whatever was made of it.
func TestIdempotencyKeyOfWhatWasAskedFor(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	json := func(s string) hub.Content {
		return hub.Content{Type: "application/json", Format: hub.FormatNone, Data: []byte(s)}
	}
	o := update(1)
	o.Key, o.Asked = "k", json("{}")
	a := h.ask(o)
	h.must(x.answer(x.end.next(t).ID, "once"))
	_, err := a.wait(t)
	h.must(err)
	same := func(o hub.Order) {
		t.Helper()
		if out, err := h.d.Command(t.Context(), alice, o); err != nil || string(out.Content.Data) != "once" {
			t.Errorf("%+v, %v", out, err)
		}
	}
	again := o
	again.Content = hub.Content{Type: "application/vnd.ocf+cbor", Format: hub.FormatOCFCBOR, Data: []byte{0xa0}}
	same(again)
	again.Content, again.Repeat = again.Asked, true // it can be made into nothing any more
	same(again)
	h.restart()
	same(again)
	other := o
	other.Asked = json("[]")
	_, err = h.d.Command(t.Context(), alice, other)
	wantKind(t, err, hub.Invalid, "idempotency-key-reused")
	again.Key = "new"
	_, err = h.d.Command(t.Context(), alice, again)
	wantKind(t, err, hub.NotFound, "")
	if n := len(h.device(alice, lamp).Commands); n != 0 {
		t.Errorf("%d commands wait", n)
	}
}

func TestCommandsEndWithTheirDevice(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	x.end.busy.Store(true)
	a := h.ask(update(1))
	h.eventually("it waits", func() bool { return len(h.device(alice, lamp).Commands) == 1 })
	h.must(h.d.Unregister(t.Context(), own(lamp, alice, 1), "u"))
	if out, err := a.wait(t); err != nil || out.End != hub.CommandCancelled {
		t.Errorf("outcome %+v, %v", out, err)
	}
	h.must(h.d.Register(t.Context(), own(lamp, alice, 2), "u"))
	o := update(1)
	o.Force = true
	b := h.ask(o)
	h.eventually("it waits", func() bool { return len(h.device(alice, lamp).Commands) == 1 })
	h.must(h.d.Register(t.Context(), own(lamp, bob, 3), "u"))
	if out, err := b.wait(t); err != nil || out.End != hub.CommandCancelled || out.Cause.Owner != alice {
		t.Errorf("outcome %+v, %v", out, err)
	}
	if d := h.device(bob, lamp); len(d.Commands) != 0 {
		t.Errorf("left %+v", d.Commands)
	}
}

// Another process ended the command: whoever waits is told what the log says.
func TestCommandEndsElsewhere(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	a := h.ask(update(1))
	c := x.end.next(t)
	h.behind(lamp, hub.Event{
		Kind: hub.CommandEnded, Href: "/light", Version: 2, Correlation: c.ID, Status: hub.StatusCreated,
		Command: &hub.CommandEvent{Kind: hub.CommandUpdate, End: hub.CommandCompleted},
	})
	h.must(x.notify(value("/light", 1))) // finds out by the conflict
	out, err := a.wait(t)
	h.must(err)
	if out.Status != hub.StatusCreated {
		t.Errorf("outcome %+v", out)
	}
}

// A caller that goes does not take the command with it, nor leave anything behind.
func TestCallerGoes(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := h.d.Command(ctx, alice, update(1))
		done <- err
	}()
	c := x.end.next(t)
	cancel()
	wantKind(t, <-done, hub.Unavailable, "")
	h.must(x.answer(c.ID, "done"))
	if out, err := h.d.outcome(t.Context(), lamp, c.ID, 0); err != nil || string(out.Content.Data) != "done" {
		t.Errorf("outcome %+v, %v", out, err)
	}
	if n := len(h.d.waiters.of); n != 0 {
		t.Errorf("%d devices have waiters", n)
	}
}

func TestVerifyFindsCommandsThatEndTwice(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.commandable()
	h.async(update(1))
	c := x.end.next(t)
	h.must(x.answer(c.ID, ""))
	for problem, change := range map[string]func(*hub.Event){
		"ends twice":   func(*hub.Event) {},
		"bound twice":  func(ev *hub.Event) { ev.Kind = hub.CommandBound },
		"left behind":  nil,
		"begins twice": nil,
	} {
		bad := damaged{Store: h.base, commits: func(k hub.Commit) (hub.Commit, bool) {
			var out []hub.Event
			for _, ev := range k.Events {
				out = append(out, ev)
				switch {
				case change != nil && ev.Kind == hub.CommandEnded:
					change(&ev)
					out = append(out, ev)
				case problem == "begins twice" && ev.Kind == hub.CommandPending:
					out = append(out, ev)
				case problem == "left behind" && ev.Kind == hub.CommandPending:
					out = append(out, hub.Event{Kind: hub.Unregistered})
				}
			}
			k.Events = out
			return k, true
		}}
		var found []string
		_, err := Verify(t.Context(), bad, func(_ hub.DeviceID, p string) { found = append(found, p) })
		h.must(err)
		if !slices.ContainsFunc(found, func(p string) bool { return strings.Contains(p, problem) }) {
			t.Errorf("%q was not found: %q", problem, found)
		}
	}
}
