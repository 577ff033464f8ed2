package resourcedirectory

import (
	"bytes"
	"fmt"
	"sync"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

func TestNotificationsThatChangeNothingMakeNoEvent(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	base := value("/light", 1)
	base.ETag, base.Types = []byte{1}, []string{"x.light"}
	h.must(x.notify(base))
	h.must(x.notify(base))
	n := len(h.commits(lamp))
	for name, change := range map[string]func(*hub.Change){
		"status":     func(c *hub.Change) { c.Status = hub.StatusError },
		"bytes":      func(c *hub.Change) { c.Content.Data = []byte("2") },
		"format":     func(c *hub.Change) { c.Content.Format = hub.FormatCBOR },
		"media type": func(c *hub.Change) { c.Content.Type = "text/plain" },
		"ETag alone": func(c *hub.Change) { c.ETag = []byte{2} },
		"types":      func(c *hub.Change) { c.Types = []string{"x.other"} },
	} {
		t.Run(name, func(t *testing.T) {
			c := base
			change(&c)
			h.must(x.notify(c))
			h.must(x.notify(c))
			h.must(x.notify(base))
			if now := len(h.commits(lamp)); now != n+2 {
				t.Errorf("%d commits, want 2", now-n)
			}
			n += 2
		})
	}
}

func TestTypesOfTheLinkStandForMissingOnes(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	h.must(x.notify(value("/light", 1))) // reported before it is published: stored without types
	_, err := x.publish(link("/light", "x.light"))
	h.must(err)
	h.must(x.notify(value("/light", 1))) // the types changed, so this is a change
	h.must(x.notify(value("/light", 1)))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "changed 0 /light 1 1", "published 0 [/light]", "changed 1 /light 1 1")
	own := value("/light", 1)
	own.Types = []string{"x.body"}
	h.must(x.notify(own))
	if r, _ := h.device(alice, lamp).Resources.Get("/light"); len(r.Types) != 1 || r.Types[0] != "x.body" {
		t.Errorf("types %v", r.Types)
	}
}

func TestBatchOfChangesIsOneCommit(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	before := len(h.commits(lamp))
	h.must(x.notify(value("/a", 1), value("/b", 1), value("/a", 2), value("/a", 2), value("/a", 1)))
	cs := h.commits(lamp)[before:]
	if len(cs) != 1 || len(cs[0].Events) != 4 {
		t.Fatalf("%d commits: %+v", len(cs), cs)
	}
	if v := cs[0].Events[3].Version; v != 2 {
		t.Errorf("the last version of /a is %d", v)
	}
	if got := twinOf(t, h.device(alice, lamp), "/a"); got != "1" {
		t.Errorf("/a is %s", got)
	}
}

func TestLargeNotifyIsSplitAndNumberedAtItsEnd(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	before := len(h.commits(lamp))
	var changes []hub.Change
	for i := range 700 {
		changes = append(changes, value(hub.Href(fmt.Sprintf("/r/%d", i)), i))
	}
	h.must(x.notify(changes...))
	big := bytes.Repeat([]byte("x"), hub.MaxContent)
	for i := range changes[:5] {
		changes[i].Content.Data = big
	}
	h.must(x.notify(changes[:5]...))
	cs := h.commits(lamp)[before:]
	if len(cs) != 3+5 {
		t.Errorf("%d commits", len(cs))
	}
	// Only the last commit of a request carries its number: if a crash took the others' successors, the repeat is not "done".
	for i, c := range cs {
		last := i == 2 || i == len(cs)-1
		if got := c.Events[0].Message != 0; got != last {
			t.Errorf("commit %d carries message %d", i, c.Events[0].Message)
		}
	}
	if n := h.device(alice, lamp).Resources.Len(); n != 700 {
		t.Errorf("%d twins", n)
	}
}

func TestNotifyRefusesWhatIsTooLarge(t *testing.T) {
	t.Parallel()
	h := open(t, func(h *house) { h.cfg.Limits.Resources, h.cfg.Limits.TwinBytes = 3, 300<<10 })
	x := h.registered(lamp)
	whole := value("/big", 0)
	whole.Content.Data = make([]byte, hub.MaxContent)
	h.must(x.notify(whole)) // exactly the limit
	over, etag := whole, value("/a", 1)
	over.Content.Data = make([]byte, hub.MaxContent+1)
	etag.ETag = make([]byte, 256)
	many := whole
	many.Href = "/second"
	for name, c := range map[string]struct {
		changes []hub.Change
		kind    hub.Kind
		code    string
	}{
		"one byte more":      {[]hub.Change{over}, hub.TooLarge, "content-too-large"},
		"a long ETag":        {[]hub.Change{etag}, hub.TooLarge, "change-too-large"},
		"too many bytes":     {[]hub.Change{many}, hub.TooLarge, "twin-limit"},
		"too many resources": {[]hub.Change{value("/1", 1), value("/2", 1), value("/3", 1)}, hub.TooLarge, "twin-limit"},
		"a bad href":         {[]hub.Change{value("/good", 1), value("/../bad", 1)}, hub.Invalid, "href-invalid"},
	} {
		t.Run(name, func(t *testing.T) { wantKind(t, x.notify(c.changes...), c.kind, c.code) })
	}
	if n := h.device(alice, lamp).Resources.Len(); n != 1 {
		t.Errorf("%d twins: something half done is stored", n)
	}
	small := value("/big", 0)
	h.must(x.notify(small)) // what makes the twin smaller is always taken
}

// A burst on one session, as fast as it goes: the twin shows the last one.
func TestLastValueOfABurstWins(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	for burst := range 20 {
		var last string
		for i := range 20 {
			last = fmt.Sprintf("%d-%d", burst, i)
			h.must(x.notify(value("/light", last)))
		}
		if got := twinOf(t, h.device(alice, lamp), "/light"); got != last {
			t.Fatalf("the twin shows %s after %s", got, last)
		}
	}
}

func TestManyDevicesAtOnce(t *testing.T) {
	t.Parallel()
	h := open(t)
	var wait sync.WaitGroup
	for i := range 64 {
		wait.Go(func() {
			dev := testID(i)
			if err := h.d.Register(t.Context(), own(dev, alice, 1), ""); err != nil {
				t.Error(err)
				return
			}
			sess, err := h.d.SignIn(t.Context(), own(dev, alice, 1), conn("c"), "", newEnd())
			if err != nil {
				t.Error(err)
				return
			}
			for n := range 20 {
				from := hub.Stamp{Device: dev, Session: sess.Number, Message: uint64(n + 1)}
				if err := h.d.Notify(t.Context(), from, []hub.Change{value("/light", n)}); err != nil {
					t.Error(err)
				}
				d, err := h.d.Device(t.Context(), alice, dev) // what was acknowledged is seen at once
				if err != nil || twinOf(t, d, "/light") != fmt.Sprint(n) {
					t.Errorf("device %s: %v", dev, err)
				}
			}
		})
	}
	wait.Wait()
	ids := make([]hub.DeviceID, 0, 70)
	for i := range 70 {
		ids = append(ids, testID(69-i))
	}
	var got []hub.DeviceID
	for d, err := range h.d.Devices(t.Context(), alice, append(ids, testID(3))) {
		h.must(err)
		got = append(got, d.ID)
	}
	if len(got) != 64 || got[0] != testID(0) || got[63] != testID(63) {
		t.Errorf("listed %d: %v", len(got), got)
	}
}

func TestETagsComeNewestFirst(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	tagged := func(href hub.Href, v int, tag string) hub.Change {
		c := value(href, v)
		c.ETag = []byte(tag)
		return c
	}
	h.must(x.notify(tagged("/a", 1, "A")))
	h.must(x.notify(tagged("/c", 1, "C"), value("/none", 1), tagged("/b", 1, "B"))) // the last of a batch is the newest
	h.must(x.notify(tagged("/d", 1, "C")))                                          // each once
	check := func(limit int, want string) {
		t.Helper()
		tags, err := h.d.ETags(t.Context(), lamp, limit)
		if err != nil || fmt.Sprintf("%s", tags) != want {
			t.Errorf("ETags %s, %v, want %s", tags, err, want)
		}
	}
	check(8, "[C B A]")
	check(2, "[C B]")
	check(0, "[]")
	h.restart()
	check(8, "[C B A]")
	if tags, err := h.d.ETags(t.Context(), stove, 8); err != nil || len(tags) != 0 {
		t.Errorf("an unknown device has %v, %v", tags, err)
	}
}
