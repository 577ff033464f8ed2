package resourcedirectory

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store"
	"github.com/coaphub/coaphub/internal/store/pebblestore"
)

// inBubble runs a test on simulated time.
func inBubble(t *testing.T, cfg Config, test func(t *testing.T, h *house, f *fake)) {
	synctest.Test(t, func(t *testing.T) {
		s, err := pebblestore.Open("data", pebblestore.Options{FS: vfs.NewMem(), MinFree: -1})
		if err != nil {
			t.Fatal(err)
		}
		f := &fake{Store: s}
		h := &house{t: t, base: s, st: f, cfg: cfg, log: &logBuffer{}}
		h.d, h.stop = run(t, cfg, f, h.log)
		test(t, h, f)
		h.stop()
		h.verify()
		h.must(s.Close())
	})
}

func (h *house) at(owner hub.Owner, when time.Time) (*hub.Device, error) {
	return h.d.DeviceAt(h.t.Context(), owner, lamp, when)
}

func TestDeviceAtEachMoment(t *testing.T) {
	inBubble(t, Default(), func(t *testing.T, h *house, _ *fake) {
		start := time.Now()
		time.Sleep(time.Second)
		x := h.registered(lamp)
		_, err := x.publish(link("/light", "x.light"))
		h.must(err)
		for i := range 10 {
			h.must(x.notify(value("/light", i)))
			time.Sleep(time.Minute)
		}
		_, err = h.d.Unpublish(t.Context(), x.stamp(), nil)
		h.must(err)
		time.Sleep(time.Minute)
		h.must(h.d.Unregister(t.Context(), own(lamp, alice, 1), ""))
		time.Sleep(time.Minute)
		h.must(h.d.Register(t.Context(), own(lamp, bob, 2), ""))
		time.Sleep(time.Minute)

		check := func() {
			t.Helper()
			for i := range 10 {
				d, err := h.at(alice, start.Add(time.Second+time.Duration(i)*time.Minute+30*time.Second))
				h.must(err)
				if got := twinOf(t, d, "/light"); got != fmt.Sprint(i) || d.Links.Len() != 1 {
					t.Errorf("after minute %d: %s, %d links", i, got, d.Links.Len())
				}
			}
			d, err := h.at(alice, start.Add(10*time.Minute+30*time.Second))
			h.must(err)
			if r, _ := d.Resources.Get("/light"); r.Status != hub.StatusNotFound || d.Links.Len() != 0 {
				t.Errorf("unpublished: %+v", r)
			}
			for name, c := range map[string]struct {
				owner hub.Owner
				at    time.Duration
			}{
				"before it was there":        {alice, 0},
				"before it was another's":    {bob, 5 * time.Minute},
				"after it was deleted":       {alice, 11*time.Minute + 30*time.Second},
				"nobody's":                   {"", 11*time.Minute + 30*time.Second},
				"after it became another's":  {alice, 13 * time.Minute},
				"now, which is another's":    {alice, time.Hour},
				"of a device without events": {"carol", time.Hour},
			} {
				_, err := h.at(c.owner, start.Add(c.at))
				if !hub.IsKind(err, hub.NotFound) {
					t.Errorf("%s: %v", name, err)
				}
			}
			if d, err := h.at(bob, time.Now()); err != nil || d.Resources.Len() != 0 {
				t.Errorf("bob now: %v", err)
			}
		}
		check()
		if n := len(h.history(alice, time.Time{})); n != 15 {
			t.Errorf("alice's history has %d commits", n)
		}
		if n := len(h.history(alice, start.Add(9*time.Minute+30*time.Second))); n != 2 {
			t.Errorf("alice's last two minutes have %d commits", n)
		}
		if n := len(h.history("", time.Time{})); n != 0 {
			t.Errorf("nobody's history has %d commits", n)
		}
		h.stop()
		h.d, h.stop = run(t, h.cfg, h.st, h.log)
		check()
	})
}

func TestRetentionKeepsEachLastValue(t *testing.T) {
	t.Parallel()
	cfg := Default()
	cfg.History.Retention, cfg.Workers = time.Hour, 1
	inBubble(t, cfg, func(t *testing.T, h *house, _ *fake) {
		start := time.Now()
		x := h.registered(lamp)
		_, err := x.publish(link("/once"), link("/often"), link("/gone"))
		h.must(err)
		h.must(x.notify(value("/once", "kept"), value("/gone", "lost")))
		_, err = h.d.Unpublish(t.Context(), x.stamp(), []hub.Href{"/gone"})
		h.must(err)
		for i := range 72 {
			h.must(x.notify(value("/often", i)))
			time.Sleep(150 * time.Second)
		}
		cs := h.commits(lamp)
		// An hour, and at most a sixteenth more; the trimmer comes by every minute.
		if first := time.Since(time.Unix(0, cs[0].Time)); first > time.Hour*18/16 || first < time.Hour-150*time.Second {
			t.Errorf("the oldest commit is %v old", first)
		}
		if cs[0].Seq < 40 {
			t.Errorf("the log begins at seq %d", cs[0].Seq)
		}
		d, err := h.at(alice, start.Add(151*time.Minute))
		h.must(err)
		if twinOf(t, d, "/once") != "kept" || twinOf(t, d, "/often") != "60" || d.Links.Len() != 2 {
			t.Errorf("half an hour ago: %s, %s, %d links", twinOf(t, d, "/once"), twinOf(t, d, "/often"), d.Links.Len())
		}
		if r, _ := d.Resources.Get("/gone"); r.Status != hub.StatusNotFound {
			t.Errorf("the unpublished resource: %+v", r)
		}
		_, err = h.at(alice, start.Add(15*time.Minute))
		wantKind(t, err, hub.NotFound, "history-trimmed")
		if got := h.history(alice, time.Time{}); len(got) != len(cs) || got[0].Seq != cs[0].Seq {
			t.Errorf("history has %d commits from seq %d", len(got), got[0].Seq)
		}
		// An idle device keeps its newest commit, however old. Simulating that day minute by minute takes too long.
		trim := &trimmer{d: h.d, keep: cfg.History.Retention}
		h.must(trim.step(t.Context(), time.Now(), 0))
		h.must(trim.step(t.Context(), time.Now().Add(26*time.Hour), 26*time.Hour))
		if cs := h.commits(lamp); len(cs) != 1 {
			t.Errorf("an idle device has %d commits", len(cs))
		}
		if d := h.device(alice, lamp); twinOf(t, d, "/once") != "kept" || twinOf(t, d, "/often") != "71" {
			t.Error("the current values are lost")
		}
		// The feed is trimmed by day.
		_, _, lagged, err := h.base.ReadFeed(t.Context(), hub.Position{Day: 1}, 10)
		if err != nil || !lagged {
			t.Errorf("the feed still has its first day: %v", err)
		}
		h.must(x.notify(value("/often", "after"))) // seq and session go on
	})
}

// A device of which much is trimmed at once is trimmed in steps; a device with a twin of many megabytes too.
func TestTrimInSteps(t *testing.T) {
	t.Parallel()
	h := open(t)
	h.d.trimDocs = 100 << 10
	x := h.registered(lamp)
	big := strings.Repeat("x", 10<<10)
	for i := range 36 {
		h.must(x.notify(value(hub.Href(fmt.Sprintf("/big/%d", i)), big)))
	}
	h.must(x.notify(value("/last", 1)))
	n, err := h.d.trimDevice(t.Context(), lamp, time.Now().Add(30*24*time.Hour), 24*time.Hour)
	if err != nil || n != 38 {
		t.Errorf("%d commits trimmed, %v", n, err)
	}
	h.restart()
	h.eventually("offline", func() bool { return !h.device(alice, lamp).Metadata.Connection.Online })
	if d := h.device(alice, lamp); d.Resources.Len() != 37 {
		t.Errorf("%d twins", d.Resources.Len())
	}
}

func TestTheLastTenMinutesAreNeverTrimmed(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	for i := range 10 {
		h.must(x.notify(value("/light", i)))
	}
	n, err := h.d.trimDevice(t.Context(), lamp, time.Now().Add(5*time.Minute), time.Second)
	if err != nil || n != 0 {
		t.Errorf("%d commits trimmed, %v", n, err)
	}
	n, err = h.d.trimDevice(t.Context(), lamp, time.Now().Add(time.Hour), time.Second)
	if err != nil || n != 11 {
		t.Errorf("%d commits trimmed after an hour, %v", n, err)
	}
}

// The clock is set forward by a year and back again. Nothing is lost by that, unless it stays there.
func TestClockSetForwardTrimsNothing(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	for i := range 10 {
		h.must(x.notify(value("/light", i)))
	}
	all := len(h.commits(lamp))
	trim := &trimmer{d: h.d, keep: h.cfg.History.Retention}
	now, year := time.Now(), 365*24*time.Hour
	for _, step := range []struct {
		up, ahead time.Duration
		left      int
	}{
		{0, 0, all},
		{time.Minute, 0, all},
		{2 * time.Minute, year, all},
		{30 * time.Minute, year, all},
		{31 * time.Minute, 0, all}, // set right
		{90 * time.Minute, 0, all},
		{91 * time.Minute, year, all},
		{150 * time.Minute, year, all},
		{152 * time.Minute, year, 1}, // it has been so for an hour
	} {
		h.must(trim.step(t.Context(), now.Add(step.up+step.ahead), step.up))
		if n := len(h.commits(lamp)); n != step.left {
			t.Errorf("after %s, with a clock %s ahead: %d commits, want %d", step.up, step.ahead, n, step.left)
		}
	}
	if !strings.Contains(h.log.String(), "the clock was set forward") {
		t.Error("nobody was told")
	}
}

func TestBytesWinOverDaysWithAnAlarm(t *testing.T) {
	t.Parallel()
	cfg := Default()
	cfg.Workers, cfg.History = 1, History{Retention: 8 * time.Hour, MaxBytes: 1000}
	inBubble(t, cfg, func(t *testing.T, h *house, f *fake) {
		size := uint64(500)
		f.set(func(f *fake) { f.bytes = func() uint64 { return size } })
		x := h.registered(lamp)
		for i := range 40 {
			h.must(x.notify(value("/light", i)))
			time.Sleep(10 * time.Minute)
		}
		if n := len(h.commits(lamp)); n != 42 {
			t.Fatalf("%d commits although there is room", n)
		}
		f.set(func(*fake) { size = 2000 })
		time.Sleep(time.Hour)
		if n := len(h.commits(lamp)); n > 4 {
			t.Errorf("%d commits are left", n)
		}
		if !strings.Contains(h.log.String(), "history.maxBytes") {
			t.Error("there was no alarm")
		}
		if got := twinOf(t, h.device(alice, lamp), "/light"); got != "39" {
			t.Errorf("the twin is %s", got)
		}
		f.set(func(*fake) { size = 100 })
		time.Sleep(3 * time.Hour)
		if !strings.Contains(h.log.String(), "as long as configured again") {
			t.Error("the alarm did not end")
		}
		h.must(x.notify(value("/light", "more")))
	})
}

// The trimmer removes commits between a reader's look at the bases and its look at the log.
func TestDeviceAtWhileTheLogIsTrimmed(t *testing.T) {
	t.Parallel()
	cfg := Default()
	cfg.History.Retention = time.Hour
	inBubble(t, cfg, func(t *testing.T, h *house, f *fake) {
		x := h.registered(lamp)
		for i := range 30 {
			h.must(x.notify(value("/light", i)))
			time.Sleep(2 * time.Minute)
		}
		when := time.Now().Add(-time.Minute)
		h.must(x.notify(value("/light", "now")))
		trims := 0
		f.set(func(f *fake) {
			f.load = func(ctx context.Context, dev hub.DeviceID) (store.State, error) {
				st, err := f.Store.Load(ctx, dev)
				if trims++; trims == 1 {
					// The trimmer's own load comes through here as well; this one is the reader's.
					if n, err := h.d.trimDevice(ctx, dev, time.Now().Add(20*time.Minute), time.Hour); err != nil || n == 0 {
						t.Errorf("%d trimmed, %v", n, err)
					}
				}
				return st, err
			}
		})
		d, err := h.at(alice, when)
		h.must(err)
		if got := twinOf(t, d, "/light"); got != "29" || trims < 3 {
			t.Errorf("the twin was %s, after %d loads", got, trims)
		}
		f.set(func(f *fake) { f.load = nil })
	})
}
