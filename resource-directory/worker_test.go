package resourcedirectory

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
)

// Another process writes the same device behind the directory's back, again and again: each request is decided once more on
// what is really there, nothing is lost and no seq is written twice.
func TestConflictIsDecidedAgain(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	for i := range 10 {
		h.must(x.notify(value("/light", i)))
		h.behind(lamp, hub.Event{Kind: hub.ResourceChanged, Href: "/other", Version: uint64(i), Content: hub.Content{Data: fmt.Append(nil, i)}})
	}
	h.must(x.notify(value("/light", "end")))
	d := h.device(alice, lamp)
	if twinOf(t, d, "/light") != "end" || twinOf(t, d, "/other") != "9" {
		t.Errorf("%s and %s", twinOf(t, d, "/light"), twinOf(t, d, "/other"))
	}
}

// The other process signs the device in: what this one's session still writes is refused after the conflict.
func TestConflictWithANewerSession(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	meta := h.device(alice, lamp).Metadata
	meta.Connection.ID = "elsewhere"
	h.behind(lamp, hub.Event{Kind: hub.MetadataUpdated, Metadata: &meta, Session: 3, Version: 1})
	wantKind(t, x.notify(value("/light", 1)), hub.Precondition, "session-superseded")
	h.must(h.d.Offline(t.Context(), x.stamp()))
	if m := h.device(alice, lamp).Metadata; !m.Connection.Online || m.Connection.ID != "elsewhere" {
		t.Errorf("metadata %+v", m)
	}
}

func TestEndlessConflictIsUnavailable(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	x := h.registered(lamp)
	f.set(func(f *fake) {
		f.append = func(_ context.Context, entries []store.Entry) []error {
			errs := make([]error, len(entries))
			for i := range errs {
				errs[i] = &hub.Error{Kind: hub.Conflict}
			}
			return errs
		}
	})
	wantKind(t, x.notify(value("/light", 1)), hub.Unavailable, "device-contended")
	f.set(func(f *fake) { f.append = nil })
	h.must(h.d.Notify(t.Context(), x.same(), []hub.Change{value("/light", 1)}))
	if got := twinOf(t, h.device(alice, lamp), "/light"); got != "1" {
		t.Errorf("the twin is %s", got)
	}
}

// What the store refuses is refused to the caller with the store's code, as Unavailable unless it is too large, nothing of it
// is shown, reads go on, and the same message number succeeds later.
func TestStoreFails(t *testing.T) {
	t.Parallel()
	for _, kind := range []hub.Kind{hub.Unavailable, hub.Exhausted, hub.Internal, hub.TooLarge} {
		t.Run(kind.String(), func(t *testing.T) {
			f := &fake{}
			h := open(t, faked(f))
			x := h.registered(lamp)
			h.must(x.notify(value("/light", 1)))
			f.set(func(f *fake) {
				f.append = func(_ context.Context, entries []store.Entry) []error {
					errs := make([]error, len(entries))
					for i := range errs {
						errs[i] = hub.NewError(kind, "the-code", "")
					}
					return errs
				}
			})
			want := hub.Unavailable
			if kind == hub.TooLarge {
				want = kind
			}
			wantKind(t, x.notify(value("/light", 2)), want, "the-code")
			_, err := h.d.Publish(t.Context(), x.same(), []hub.Link{link("/a")})
			wantKind(t, err, want, "the-code")
			if got := twinOf(t, h.device(alice, lamp), "/light"); got != "1" {
				t.Errorf("the twin is %s", got)
			}
			// A repeat of what is stored is true whatever the store does now.
			h.must(h.d.Notify(t.Context(), hub.Stamp{Device: lamp, Session: x.sess.Number, Message: 1}, []hub.Change{value("/light", 1)}))
			f.set(func(f *fake) { f.append = nil })
			h.must(h.d.Notify(t.Context(), x.same(), []hub.Change{value("/light", 2)}))
			if got := twinOf(t, h.device(alice, lamp), "/light"); got != "2" {
				t.Errorf("the twin is %s", got)
			}
		})
	}
}

// The store stored a commit and could not say so: readers see what is stored, and the repeat finds it done.
func TestUnknownOutcomeIsReadFromTheStore(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	x := h.registered(lamp)
	f.set(func(f *fake) {
		f.append = func(ctx context.Context, entries []store.Entry) []error {
			errs := f.Store.Append(ctx, entries)
			for i := range errs {
				errs[i] = &hub.Error{Kind: hub.Internal}
			}
			return errs
		}
	})
	wantKind(t, x.notify(value("/light", 1)), hub.Unavailable, "")
	f.set(func(f *fake) { f.append = nil })
	if got := twinOf(t, h.device(alice, lamp), "/light"); got != "1" {
		t.Errorf("the twin is %s", got)
	}
	h.must(h.d.Notify(t.Context(), x.same(), []hub.Change{value("/light", 1)}))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1")
}

// Of several commits in one append the first are stored and the others not: the callers of the first are answered, those of
// the others are not told that it was done, and what rests on an unstored commit is refused with it.
func TestAppendFailsInTheMiddle(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	h.must(h.d.Register(t.Context(), own(lamp, alice, 1), ""))
	hold, held := make(chan struct{}), make(chan struct{})
	f.set(func(f *fake) {
		f.append = func(ctx context.Context, entries []store.Entry) []error {
			close(held)
			<-hold
			f.set(func(f *fake) {
				f.append = func(ctx context.Context, entries []store.Entry) []error {
					f.set(func(f *fake) { f.append = nil })
					errs := f.Store.Append(ctx, entries[:1])
					return append(errs, away(ctx, entries[1:])...)
				}
			})
			return f.Store.Append(ctx, entries)
		}
	})
	var wait sync.WaitGroup
	ask := func(do func() error) *error {
		err := new(error)
		wait.Go(func() { *err = do() })
		return err
	}
	// The first append is held on another device of the same worker, so that the next requests collect in this order.
	other := sameWorker(h.d, lamp)
	first := ask(func() error { return h.d.Register(t.Context(), own(other, alice, 1), "") })
	<-held
	var sess [2]hub.Session
	var signIns [2]*error
	for i := range signIns {
		before := h.waiting()
		signIns[i] = ask(func() (err error) {
			sess[i], err = h.d.SignIn(t.Context(), own(lamp, alice, 1), conn("c"), "", newEnd())
			return err
		})
		h.eventually("the request waits", func() bool { return h.waiting() > before })
	}
	close(hold)
	wait.Wait()
	h.must(*first)
	good, bad := 0, 0
	for _, err := range signIns {
		if *err == nil {
			good++
		} else {
			wantKind(t, *err, hub.Unavailable, "")
			bad++
		}
	}
	if good != 1 || bad != 1 {
		t.Fatalf("%d sign-ins succeeded, %d failed", good, bad)
	}
	h.expect(lamp, "registered", "meta 0 online out-of-sync")
	x := h.signIn(lamp, alice, 1, "again")
	h.must(x.notify(value("/light", 1)))
}

// waiting is how many callers wait for an answer.
func (h *house) waiting() int {
	reg := prometheus.NewRegistry()
	h.must(reg.Register(h.d.metrics.waiting))
	families, err := reg.Gather()
	h.must(err)
	return int(families[0].GetMetric()[0].GetGauge().GetValue())
}

func sameWorker(d *Directory, dev hub.DeviceID) hub.DeviceID {
	for i := 100; ; i++ {
		if id := testID(i); d.worker(id) == d.worker(dev) {
			return id
		}
	}
}

func TestLoadFails(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f))
	h.registered(lamp)
	h.restart()
	h.eventually("offline", func() bool { return !h.device(alice, lamp).Metadata.Connection.Online })
	h.restart()
	f.set(func(f *fake) {
		f.load = func(context.Context, hub.DeviceID) (store.State, error) {
			return store.State{}, &hub.Error{Kind: hub.Unavailable}
		}
	})
	_, err := h.d.SignIn(t.Context(), own(lamp, alice, 1), conn("c"), "", newEnd())
	wantKind(t, err, hub.Unavailable, "")
	_, err = h.d.Device(t.Context(), alice, lamp)
	wantKind(t, err, hub.Unavailable, "")
	for _, err = range h.d.Devices(t.Context(), alice, []hub.DeviceID{lamp, stove}) {
		wantKind(t, err, hub.Unavailable, "")
	}
	_, err = h.d.ETags(t.Context(), lamp, 8)
	wantKind(t, err, hub.Unavailable, "")
	_, err = h.d.DeviceAt(t.Context(), alice, lamp, time.Now())
	wantKind(t, err, hub.Unavailable, "")
	f.set(func(f *fake) { f.load = nil })
	h.signIn(lamp, alice, 1, "c")
}

// A device that loads slowly holds up nobody else, of the same worker either.
func TestSlowLoadBlocksNoOtherDevice(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f), func(h *house) { h.cfg.Workers = 1 })
	slow, entered := make(chan struct{}), make(chan struct{})
	f.set(func(f *fake) {
		f.load = func(ctx context.Context, dev hub.DeviceID) (store.State, error) {
			if dev == stove {
				close(entered)
				<-slow
			}
			return f.Store.Load(ctx, dev)
		}
	})
	done := make(chan error, 1)
	go func() { done <- h.d.Register(t.Context(), own(stove, alice, 1), "") }()
	<-entered
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1)))
	close(slow)
	h.must(<-done)
}

func TestFullQueueIsRefused(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f), func(h *house) { h.cfg.Workers, h.cfg.Queue, h.cfg.QueueWait = 1, 2, 10*time.Millisecond })
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
	var refused atomic.Int32
	register := func(i int) {
		wait.Go(func() {
			err := h.d.Register(t.Context(), own(testID(i), alice, 1), "")
			if err == nil {
				return
			}
			refused.Add(1)
			wantKind(t, err, hub.Unavailable, "directory-busy")
			if e := (*hub.Error)(nil); !errors.As(err, &e) || e.RetryAfter < time.Second {
				t.Errorf("%v does not say when to come again", err)
			}
		})
	}
	register(0)
	<-held
	for i := range 10 {
		register(i + 1)
	}
	// Two are taken and two wait in the queue; the one under way is one of those taken.
	h.eventually("the others are refused", func() bool { return refused.Load() == 7 })
	close(hold)
	wait.Wait()
	if n := refused.Load(); n != 7 {
		t.Errorf("%d were refused", n)
	}
}

func TestCallerThatLeavesIsNotWaitedFor(t *testing.T) {
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
	ctx, cancel := context.WithDeadline(t.Context(), time.Now().Add(50*time.Millisecond))
	defer cancel()
	err := h.d.Notify(ctx, x.stamp(), []hub.Change{value("/light", 1)})
	wantKind(t, err, hub.Deadline, "")
	<-held
	// A request whose caller left before it was decided is dropped: nothing is stored for it.
	gone, leave := context.WithCancel(t.Context())
	done := make(chan error, 1)
	late := hub.Stamp{Device: lamp, Session: x.sess.Number, Message: 7}
	before := h.waiting()
	go func() { done <- h.d.Notify(gone, late, []hub.Change{value("/late", 1)}) }()
	h.eventually("it waits", func() bool { return h.waiting() > before })
	leave()
	wantKind(t, <-done, hub.Unavailable, "")
	close(hold)
	h.must(h.d.Notify(t.Context(), x.same(), []hub.Change{value("/light", 1)})) // the outcome is settled with the same number
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1")

	cancelled, stop := context.WithCancel(t.Context())
	stop()
	wantKind(t, h.d.Notify(cancelled, x.stamp(), []hub.Change{value("/never", 1)}), hub.Unavailable, "")
}

func TestStopAnswersEverybody(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	var wait sync.WaitGroup
	for i := range 50 {
		wait.Go(func() {
			for n := range 100 {
				err := h.d.Register(context.Background(), own(testID(100*i+n+10), alice, 1), "")
				if err != nil {
					wantKind(t, err, hub.Unavailable, "directory-stopping")
					return
				}
			}
		})
	}
	h.stop()
	wait.Wait()
	wantKind(t, x.notify(value("/light", 1)), hub.Unavailable, "directory-stopping")
	if d := h.device(alice, lamp); d.ID != lamp { // reads work without Run
		t.Error("no picture")
	}
}

func TestColdDevicesLeaveMemory(t *testing.T) {
	inBubble(t, Default(), func(t *testing.T, h *house, base *fake) {
		d := h.d
		x := h.registered(lamp)
		h.must(x.notify(value("/light", 1)))
		inMemory := func(dev hub.DeviceID) bool {
			_, ok := d.devices.Load(dev)
			return ok
		}
		time.Sleep(9 * time.Minute)
		h.must(x.notify(value("/light", 2))) // used again: the ten minutes begin anew
		time.Sleep(9 * time.Minute)
		if !inMemory(lamp) {
			t.Error("a device in use left memory")
		}
		time.Sleep(2 * time.Minute)
		if inMemory(lamp) {
			t.Error("a cold device stayed in memory")
		}
		if got := twinOf(t, h.device(alice, lamp), "/light"); got != "2" {
			t.Errorf("the twin of a cold device is %s", got)
		}
		if inMemory(lamp) {
			t.Error("reading warmed the device")
		}
		// The session outlives the cold: it goes on, and a second one still closes it.
		h.must(x.notify(value("/light", 3)))
		time.Sleep(time.Hour)
		h.signIn(lamp, alice, 1, "conn-2")
		if got := x.end.why(t); got != "second-session" {
			t.Errorf("closed with %q", got)
		}
		// A device whose commit is under way is dirty and stays, however long that takes.
		hold := make(chan struct{})
		base.set(func(f *fake) {
			f.append = func(ctx context.Context, entries []store.Entry) []error {
				<-hold
				return f.Store.Append(ctx, entries)
			}
		})
		done := make(chan error, 1)
		go func() { done <- d.Register(context.Background(), own(stove, alice, 1), "") }()
		time.Sleep(time.Hour)
		if !inMemory(stove) {
			t.Error("a device with a commit under way left memory")
		}
		close(hold)
		h.must(<-done)
	})
}

// The clock of the machine steps back: times of a device do not.
func TestTimesNeverGoBack(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	future := time.Now().Add(time.Hour).UnixNano()
	k, err := newCodec()
	h.must(err)
	s, err := k.load(t.Context(), h.base, lamp)
	h.must(err)
	c := hub.Commit{Device: lamp, Seq: s.seq + 1, Time: future, Owner: alice, Generation: 1, Events: []hub.Event{{
		Kind: hub.ResourceChanged, Href: "/light", Status: hub.StatusOK,
	}}}
	next, changed := s.fold(&c)
	docs, err := k.docs(next, changed, "")
	h.must(err)
	h.must(h.base.Append(t.Context(), []store.Entry{{Commit: c, Docs: docs}})[0])
	h.must(x.notify(value("/light", 1)))
	h.must(h.d.SetTwin(t.Context(), x.stamp(), hub.TwinSyncing))
	cs := h.commits(lamp)
	for _, c := range cs[len(cs)-2:] {
		if c.Time != future {
			t.Errorf("seq %d has time %d, want %d", c.Seq, c.Time, future)
		}
	}
	if at := h.device(alice, lamp).Metadata.Twin.SyncingAt; at != future {
		t.Errorf("syncing since %d", at)
	}
}

func TestConfigIsChecked(t *testing.T) {
	if err := Default().Check(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*Config){
		"workers": func(c *Config) { c.Workers = 0 }, "queue": func(c *Config) { c.Queue = 0 },
		"queueWait": func(c *Config) { c.QueueWait = -1 }, "coldAfter": func(c *Config) { c.ColdAfter = 0 },
		"history.retention":  func(c *Config) { c.History.Retention = time.Minute },
		"history.maxBytes":   func(c *Config) { c.History.MaxBytes = -1 },
		"limits.links":       func(c *Config) { c.Limits.Links = 0 },
		"limits.linkBytes":   func(c *Config) { c.Limits.LinkBytes = 13 << 20 },
		"limits.resources":   func(c *Config) { c.Limits.Resources = 0 },
		"limits.twinBytes":   func(c *Config) { c.Limits.TwinBytes = 0 },
		"limits.loadedBytes": func(c *Config) { c.Limits.LoadedBytes = 0 },
		"limits.commands":    func(c *Config) { c.Limits.Commands = 0 }, "defaultCommandTimeToLive": func(c *Config) { c.DefaultCommandTimeToLive = time.Millisecond },
	} {
		t.Run(name, func(t *testing.T) {
			c := Default()
			change(&c)
			_, err := New(c, nil, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), "")
			if err == nil || !bytes.Contains([]byte(err.Error()), []byte(name+":")) {
				t.Errorf("error %v does not name %s", err, name)
			}
		})
	}
}

// The queue is full when a connection ends: nobody calls Offline again, so the directory must remember by itself.
func TestOfflineSurvivesAFullQueue(t *testing.T) {
	t.Parallel()
	f := &fake{}
	h := open(t, faked(f), func(h *house) { h.cfg.Workers, h.cfg.Queue, h.cfg.QueueWait = 1, 2, 10*time.Millisecond })
	x, y := h.registered(lamp), h.registered(stove)
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
	register := func(i int) {
		wait.Go(func() {
			if err := h.d.Register(t.Context(), own(testID(100+i), alice, 1), ""); err != nil {
				t.Errorf("filler %d: %v", i, err)
			}
		})
		h.eventually("the filler to wait", func() bool { return h.waiting() == i })
	}
	w := h.d.workers[0]
	register(1)
	<-held
	register(2)
	h.eventually("the second to be taken", func() bool { return len(w.in) == 0 })
	register(3)
	register(4)

	wantKind(t, h.d.Offline(t.Context(), x.stamp()), hub.Unavailable, "directory-busy")
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if err := h.d.Offline(over, y.stamp()); err == nil {
		t.Error("an ended context with a full queue made no error")
	}
	close(hold)
	wait.Wait()
	for _, dev := range []hub.DeviceID{lamp, stove} {
		h.eventually(string(dev)+" to be offline", func() bool { return !h.device(alice, dev).Metadata.Connection.Online })
	}
}

// A directory ends although a device is being loaded that no request waits for, as its sweep does for those who wait for a command.
func TestEndsWhileLoading(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		begun, goOn := make(chan struct{}), make(chan struct{})
		f := &fake{load: func(context.Context, hub.DeviceID) (store.State, error) {
			close(begun)
			<-goOn
			return store.State{}, nil
		}}
		d, err := New(Default(), f, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), "test")
		if err != nil {
			t.Fatal(err)
		}
		w := newWorker(d)
		w.fetch(w.entry(lamp))
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			w.run(t.Context())
		}()
		<-begun
		close(d.closing)
		synctest.Wait() // the worker has nothing to do and ends
		close(goOn)
		<-ended
	})
}

// A directory whose store is away ends when it has answered, and begins nothing more by itself that the store will not take either.
func TestEndsWhileStoreIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fake{load: func(_ context.Context, dev hub.DeviceID) (store.State, error) {
			wait := 3 * time.Second
			if dev == stove {
				wait = 5 * time.Second // so that there is always one of them under way
			}
			time.Sleep(wait)
			return store.State{}, &hub.Error{Kind: hub.Unavailable}
		}}
		d, err := New(Default(), f, slog.New(slog.DiscardHandler), prometheus.NewRegistry(), "test")
		if err != nil {
			t.Fatal(err)
		}
		w := newWorker(d)
		for _, dev := range []hub.DeviceID{lamp, stove} {
			w.live[dev] = &live{session: 1}
			w.gone[dev] = w.live[dev]
		}
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			w.run(t.Context())
		}()
		time.Sleep(sweepEvery + time.Second) // both are being set offline
		close(d.closing)
		select {
		case <-ended:
		case <-time.After(5 * time.Second):
			t.Error("it goes on trying")
			<-ended
		}
	})
}
