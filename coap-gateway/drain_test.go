package coapgateway

import (
	"context"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// beside starts another gateway with the same world behind it.
func (h *hall) beside(t *testing.T) *hall {
	t.Helper()
	other := start(t, func(_ *Config, d *Deps) {
		d.Directory, d.Identities, d.Verifier, d.Service = &h.w.dir, &h.w.ids, &h.w.ver, "gateway-2"
	})
	other.w = h.w
	return other
}

// presence is what of the log says who is there.
func (w *world) presence() []string {
	return slices.DeleteFunc(w.soFar(), func(s string) bool { return !strings.Contains(s, "online ") && !strings.Contains(s, "offline ") })
}

// A device that is sent elsewhere, and comes back there, is never shown offline.
func TestDrain(t *testing.T) {
	t.Parallel()
	h := start(t, nil)
	other := h.beside(t)
	d := h.online(lampID, nil)
	drained := make(chan struct{})
	go func() { defer close(drained); h.gw.Drain(t.Context()) }()
	d.awaitClosed()
	other.online(lampID, nil)
	<-drained
	if err := h.device(fanID).dial(h.gw.Addresses().Plain, nil); err == nil {
		t.Error("a gateway that drains let a device in")
	}
	if got, want := h.w.presence(), []string{"online " + string(lampID), "online " + string(lampID)}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	h.gw.absences.mu.Lock()
	defer h.gw.absences.mu.Unlock()
	if n := len(h.gw.absences.waiting); n != 0 {
		t.Errorf("%d devices are still waited for", n)
	}
}

// One that does not come back is offline in the end: after its time, or, if the gateway has stopped by then, when the directories see to it.
func TestDrainOfADeviceThatStaysAway(t *testing.T) {
	t.Parallel()
	for _, stops := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld()
			f := newField(t, w, 1, nil)
			defer f.end()
			d := &day{field: f, w: w}
			lamp := d.come(12)
			defer lamp.vanish()
			f.gw.Drain(t.Context())
			synctest.Wait()
			if got := w.presence(); len(got) != 1 {
				t.Fatalf("%q", got)
			}
			if stops {
				f.end()
				f.gw.absences.end()
			}
			after(comeBackTime + time.Second)
			want := []string{"online " + string(lamp.id), "offline " + string(lamp.id)}
			if stops {
				want = want[:1]
			}
			if got := w.presence(); !slices.Equal(got, want) {
				t.Errorf("%q, want %q", got, want)
			}
		})
	}
}

// What a device has been sent comes to its end before it goes; what it has not been sent waits for its next session.
func TestDrainFinishesCommands(t *testing.T) {
	t.Parallel()
	h := start(t, func(c *Config, _ *Deps) { c.Drain.Commands = time.Minute })
	h.w.off[lampID] = true
	ending, proceed := make(chan struct{}), make(chan struct{})
	h.w.dir.end = func(ctx context.Context, from hub.Stamp, id string, a hub.Answer) error {
		close(ending)
		<-proceed
		return h.w.end(ctx, from, id, a)
	}
	d := h.online(lampID, func(d *device) { d.res["/light"] = value(t, 1, false) })
	h.give(command("1", hub.CommandUpdate, "/light"))
	<-ending
	drained := make(chan struct{})
	go func() { defer close(drained); h.gw.Drain(t.Context()) }()
	h.w.await(t, "the drain", func() bool { return !h.w.to[lampID].Ready("/other", nil) })
	h.give(command("2", hub.CommandUpdate, "/light"))
	d.alive()
	close(proceed)
	d.awaitClosed()
	<-drained
	if a := h.awaitEnd("1"); a.Status != hub.StatusOK {
		t.Errorf("the command ended with %+v", a)
	}
	if got := d.commands(); !slices.Equal(got, []string{"0.02 /light"}) {
		t.Errorf("the device was asked %q", got)
	}
}
