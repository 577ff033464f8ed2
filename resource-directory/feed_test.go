package resourcedirectory

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/dose"
)

// follower is a subscriber of the feed: where it stands and what it got, one word an event.
type follower struct {
	owner hub.Owner
	at    hub.Cursor
	got   []string
}

func (h *house) follower(owner hub.Owner) *follower {
	h.t.Helper()
	at, err := h.d.FeedHead(h.t.Context())
	h.must(err)
	return &follower{owner: owner, at: at}
}

func place(c *hub.Commit, i int) string {
	return fmt.Sprintf("%s %d.%d %s", c.Device[len(c.Device)-1:], c.Seq, i, word(c.Events[i]))
}

// read takes n more events and goes away, wherever in a commit that is.
func (f *follower) read(ctx context.Context, d *Directory, n int) error {
	if n <= 0 {
		return nil
	}
	for fed, err := range d.Feed(ctx, f.owner, f.at, hub.Position{}) {
		if err != nil {
			return err
		}
		for i := fed.Skip; i < len(fed.Commit.Events); i++ {
			f.got = append(f.got, place(fed.Commit, i))
			f.at = fed.Cursor(f.at.Log, i)
			if n--; n == 0 {
				return nil
			}
		}
	}
	return errors.New("the feed ended without an error")
}

// readTo takes all events up to a place, at which the feed ends.
func (f *follower) readTo(ctx context.Context, d *Directory, to hub.Cursor) error {
	for fed, err := range d.Feed(ctx, f.owner, f.at, to.After) {
		if err != nil {
			return err
		}
		for i := fed.Skip; i < len(fed.Commit.Events); i++ {
			f.got = append(f.got, place(fed.Commit, i))
		}
	}
	f.at = to
	return nil
}

// truth is the events behind a position as the store has them, by owner; it remembers how far it has read.
type truth struct {
	h      *house
	at     hub.Position
	events map[hub.Owner][]string
}

func (h *house) truth(after hub.Position) *truth {
	return &truth{h: h, at: after, events: map[hub.Owner][]string{}}
}

func (tr *truth) of(owner hub.Owner) []string {
	tr.h.t.Helper()
	for {
		entries, next, lagged, err := tr.h.base.ReadFeed(context.Background(), tr.at, 1000)
		tr.h.must(err)
		if lagged {
			tr.h.t.Fatal("the feed was trimmed under the test")
		}
		if len(entries) == 0 {
			return tr.events[owner]
		}
		for i := range entries {
			c := &entries[i].Commit
			for k := range c.Events {
				tr.events[c.Owner] = append(tr.events[c.Owner], place(c, k))
			}
		}
		tr.at = next
	}
}

// Every subscriber gets each event of its owner once, in the feed's order, from its cursor on: however writers, its own
// breaks, other readers and restarts are mixed.
func TestFeedModel(t *testing.T) {
	dose.Seeds(t, 3, 10, 1000)
	rapid.Check(t, func(rt *rapid.T) {
		h := open(rt)
		ctx := rt.Context()
		devices := []hub.DeviceID{lamp, stove}
		owners := map[hub.DeviceID]hub.Ownership{}
		sessions := map[hub.DeviceID]*device{}
		pick := func() hub.DeviceID { return rapid.SampledFrom(devices).Draw(rt, "device") }
		take := func(dev hub.DeviceID, owner hub.Owner) {
			gen := owners[dev].Generation + 1
			owners[dev] = own(dev, owner, gen)
			h.must(h.d.Register(ctx, owners[dev], "user-1"))
			sessions[dev] = h.signIn(dev, owner, gen, "conn-1")
		}
		for _, dev := range devices {
			take(dev, alice)
		}
		begin, err := h.d.FeedHead(ctx)
		h.must(err)
		truth := h.truth(begin.After)
		var readers []*follower
		for range rapid.IntRange(1, 4).Draw(rt, "readers") {
			f := h.follower(rapid.SampledFrom([]hub.Owner{alice, bob}).Draw(rt, "owner"))
			f.at = begin
			readers = append(readers, f)
		}
		last := 0 // what does not change makes no event
		notify := func(dev hub.DeviceID, n int) {
			var changes []hub.Change
			for i := range n {
				last++
				changes = append(changes, value(hub.Href("/"+strconv.Itoa(i)), last))
			}
			h.must(sessions[dev].notify(changes...))
		}
		rt.Repeat(map[string]func(*rapid.T){
			"notify": func(rt *rapid.T) { notify(pick(), rapid.IntRange(1, 5).Draw(rt, "events")) },
			"transfer": func(rt *rapid.T) {
				dev := pick()
				h.must(h.d.Unregister(ctx, owners[dev], "user-1"))
				take(dev, rapid.SampledFrom([]hub.Owner{alice, bob}).Draw(rt, "to"))
			},
			"restart": func(*rapid.T) {
				h.restart()
				h.eventually("the sessions of the run before are ended", func() bool {
					for _, dev := range devices {
						if h.device(owners[dev].Owner, dev).Metadata.Connection.Online {
							return false
						}
					}
					return true
				})
				for _, dev := range devices {
					sessions[dev] = h.signIn(dev, owners[dev].Owner, owners[dev].Generation, "conn-1")
				}
			},
			"read a piece": func(rt *rapid.T) {
				f := rapid.SampledFrom(readers).Draw(rt, "reader")
				rest := len(truth.of(f.owner)) - len(f.got)
				h.must(f.read(ctx, h.d, rapid.IntRange(0, rest).Draw(rt, "n")))
			},
			"read to a place": func(rt *rapid.T) {
				f := rapid.SampledFrom(readers).Draw(rt, "reader")
				to, err := h.d.FeedHead(ctx)
				h.must(err)
				want := len(truth.of(f.owner))
				if rapid.Bool().Draw(rt, "more") { // which is not for this reading
					notify(pick(), 1)
				}
				if to.After.Compare(f.at.After) > 0 {
					h.must(f.readTo(ctx, h.d, to))
				}
				if len(f.got) != want {
					rt.Fatalf("%d events up to a place, want %d", len(f.got), want)
				}
			},
		})
		// Now all at once, while a device goes on reporting: some are in the middle, some at the beginning, all end at the end.
		live := rapid.IntRange(0, 20).Draw(rt, "live")
		totals := map[hub.Owner]int{alice: len(truth.of(alice)), bob: len(truth.of(bob))}
		totals[owners[lamp].Owner] += live
		limit, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		var wg sync.WaitGroup
		errs := make([]error, len(readers))
		for i, f := range readers {
			wg.Go(func() { errs[i] = f.read(limit, h.d, totals[f.owner]-len(f.got)) })
		}
		for range live {
			notify(lamp, 1)
		}
		wg.Wait()
		for i, f := range readers {
			h.must(errs[i])
			if want := truth.of(f.owner); !slices.Equal(f.got, want) {
				rt.Fatalf("reader of %s got\n%q\nwant\n%q", f.owner, f.got, want)
			}
		}
		if h.d.tail.readers != 0 || h.d.tail.entries != nil {
			rt.Fatalf("%d readers and %d commits are left behind", h.d.tail.readers, len(h.d.tail.entries))
		}
	})
}

// However sizes change, a page is no larger than it may be, and nothing is left out or read twice.
func TestPagesOfTheFeed(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	f := h.follower(alice)
	large := strings.Repeat("x", 100<<10)
	for i := range 60 { // one large one among small ones, then only large ones
		if i == 20 || i > 50 {
			h.must(x.notify(value("/large", fmt.Sprint(i, large))))
			continue
		}
		h.must(x.notify(value("/small", i)))
	}
	want := h.truth(f.at.After).of(alice)
	r := &feedReader{of: h.d.Reader, owner: alice, at: f.at.After, limit: 16}
	for {
		page, more, err := r.catchUp(t.Context())
		h.must(err)
		if !more {
			break
		}
		size := 0
		for _, fed := range page {
			size += commitSize(fed.Commit)
			for i := range fed.Commit.Events {
				f.got = append(f.got, place(fed.Commit, i))
			}
		}
		if size > pageBytes && len(page) > 1 || len(page) > pageCommits {
			t.Errorf("a page of %d commits has %d bytes", len(page), size)
		}
	}
	if !slices.Equal(f.got, want) || len(want) != 60 {
		t.Errorf("read %d of %d", len(f.got), len(want))
	}
}

// A reader that stalls holds its page and nothing else: the tail moves on, and what it missed comes from the store.
func TestFeedOfAStalledReader(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	const most = 512
	h.d.tail.most = most
	quick, slow := h.follower(alice), h.follower(alice)
	begin := slow.at.After
	const many = most + most/4 + 100
	stalled, resume, done := make(chan struct{}), make(chan struct{}), make(chan error, 2)
	go func() {
		n := 0
		for fed, err := range h.d.Feed(t.Context(), alice, slow.at, hub.Position{}) {
			if err != nil {
				done <- err
				return
			}
			for i := range fed.Commit.Events {
				slow.got = append(slow.got, place(fed.Commit, i))
			}
			if n++; n == 1 {
				close(stalled)
				<-resume
			}
			if n == many {
				break
			}
		}
		done <- nil
	}()
	h.must(x.notify(value("/a", 0)))
	<-stalled
	go func() { done <- quick.read(t.Context(), h.d, many) }()
	for i := 1; i < many; i++ {
		h.must(x.notify(value("/a", i)))
	}
	h.must(<-done) // the quick one, while the slow one stands still
	h.d.tail.mu.Lock()
	held, base := len(h.d.tail.entries), h.d.tail.base
	h.d.tail.mu.Unlock()
	if held > most+most/4 || base.Compare(begin) <= 0 {
		t.Errorf("the tail holds %d commits", held)
	}
	close(resume)
	h.must(<-done)
	want := h.truth(begin).of(alice)
	if len(want) != many || !slices.Equal(quick.got, want) || !slices.Equal(slow.got, want) {
		t.Errorf("%d events were written, %d and %d read", len(want), len(quick.got), len(slow.got))
	}
}

func TestFeedLags(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	first := h.follower(alice)
	h.must(x.notify(value("/a", 1)))
	h.must(x.notify(value("/a", 2)))
	last := h.follower(alice)
	lagged := func(what string, at hub.Cursor) {
		t.Helper()
		f := &follower{owner: alice, at: at}
		err := f.read(t.Context(), h.d, 1)
		if err == nil {
			t.Errorf("%s: read %q", what, f.got)
			return
		}
		wantKind(t, err, hub.Precondition, "feed-lagged")
	}
	lagged("another log", hub.Cursor{Log: "other", After: first.at.After})
	lagged("a place beyond the head", hub.Cursor{Log: first.at.Log, After: hub.Position{Day: last.at.After.Day + 1, N: 1}})
	h.must(h.base.TrimFeed(t.Context(), last.at.After.Day+1))
	lagged("a place that was trimmed", first.at)
	// What nothing was trimmed behind is good.
	h.must(x.notify(value("/a", 3)))
	h.must(last.read(t.Context(), h.d, 1))
}

// The leader's end is not that of the others.
func TestFeedGoesOnWithoutItsLeader(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	ctx, cancel := context.WithCancel(t.Context())
	leader, other := h.follower(alice), h.follower(alice)
	led, read := make(chan error, 1), make(chan error, 1)
	go func() { led <- leader.read(ctx, h.d, 1) }()
	h.eventually("the first reader leads", func() bool {
		h.d.tail.mu.Lock()
		defer h.d.tail.mu.Unlock()
		return h.d.tail.leading
	})
	go func() { read <- other.read(t.Context(), h.d, 1) }()
	h.eventually("the second one waits", func() bool {
		h.d.tail.mu.Lock()
		defer h.d.tail.mu.Unlock()
		return h.d.tail.moved != nil
	})
	cancel()
	if err := <-led; !errors.Is(err, context.Canceled) {
		t.Errorf("the leader ended with %v", err)
	}
	h.must(x.notify(value("/a", 1)))
	h.must(<-read)
	if len(other.got) != 1 || len(leader.got) != 0 {
		t.Errorf("%q and %q", leader.got, other.got)
	}
}

// State has what the feed's head has, also when the worker has not published it yet.
func TestStateIsNotBehindTheFeed(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(x.notify(value("/a", 1)))
	h.behind(lamp, hub.Event{Kind: hub.ResourceChanged, Href: "/a", Status: hub.StatusOK, Version: 1, Content: value("/a", 2).Content})
	if d := h.device(alice, lamp); twinOf(t, d, "/a") != "1" {
		t.Fatal("the published state knows what another wrote")
	}
	n := 0
	for d, err := range h.d.State(t.Context(), alice, []hub.DeviceID{lamp, stove}) {
		h.must(err)
		n++
		if got := twinOf(t, d, "/a"); got != "2" {
			t.Errorf("the state has %s", got)
		}
	}
	if n != 1 {
		t.Errorf("%d devices", n)
	}
	for range h.d.State(t.Context(), bob, []hub.DeviceID{lamp}) {
		t.Error("another's device")
	}
}
