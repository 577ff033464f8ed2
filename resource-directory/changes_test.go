package resourcedirectory

import (
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// Whatever makes a device look different in a list changes its number; readings do not.
func TestChangesAreCounted(t *testing.T) {
	t.Parallel()
	h := open(t)
	ctx := t.Context()
	last := h.d.Changes(lamp)
	step := func(what string, counts bool) {
		t.Helper()
		now := h.d.Changes(lamp)
		if (now != last) != counts {
			t.Errorf("%s: the number went from %d to %d", what, last, now)
		}
		last = now
	}
	h.must(h.d.Register(ctx, own(lamp, alice, 1), "u"))
	step("registered", true)
	x := &device{h: h, end: newEnd()}
	var err error
	x.sess, err = h.d.SignIn(ctx, own(lamp, alice, 1), conn("c"), "u", x.end)
	h.must(err)
	step("signed in", true)
	_, err = x.publish(link("/light/1"))
	h.must(err)
	step("published", true)
	h.must(x.notify(value("/light/1", "1")))
	step("a reading", false)
	h.must(x.notify(value(deviceHref, "name")))
	step("its name", true)
	_, err = h.d.SetLabels(ctx, alice, lamp, hub.LabelChange{Set: hub.Labels{"room": "hall"}}, "u")
	h.must(err)
	step("labelled", true)
	_, err = h.d.SetLabels(ctx, alice, lamp, hub.LabelChange{Set: hub.Labels{"room": "hall"}}, "u")
	h.must(err)
	step("labelled alike", false)
	o := update(1)
	o.Href = "/light/1"
	asked := h.ask(o)
	step("a command", false)
	h.must(x.answer(x.end.next(t).ID, "done"))
	_, err = asked.wait(t)
	h.must(err)
	step("its end", false)
	asked = h.ask(hub.Order{Device: lamp, Kind: hub.CommandTwinOff})
	h.must(x.answer(x.end.next(t).ID, ""))
	_, err = asked.wait(t)
	h.must(err)
	step("its twin switched off", true)
	h.must(h.d.Offline(ctx, x.stamp()))
	step("offline", true)
	h.must(h.d.Unregister(ctx, own(lamp, alice, 1), "u"))
	step("unregistered", true)
	step("nothing", false)
}
