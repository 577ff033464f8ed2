package resourcedirectory

import (
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
)

func TestRegisterOncePerGeneration(t *testing.T) {
	t.Parallel()
	h := open(t)
	h.must(h.d.Register(t.Context(), own(lamp, alice, 2), "u"))
	h.must(h.d.Register(t.Context(), own(lamp, alice, 2), "u"))
	h.restart()
	h.must(h.d.Register(t.Context(), own(lamp, alice, 2), "u"))
	h.expect(lamp, "registered")
	wantKind(t, h.d.Register(t.Context(), own(lamp, alice, 1), ""), hub.Precondition, "generation-stale")
	wantKind(t, h.d.Register(t.Context(), own(lamp, bob, 2), ""), hub.Precondition, "generation-stale")
	wantKind(t, h.d.Register(t.Context(), own(lamp, "", 3), ""), hub.Invalid, "ownership-invalid")
	wantKind(t, h.d.Register(t.Context(), own(lamp, alice, 0), ""), hub.Invalid, "ownership-invalid")
	if d := h.device(alice, lamp); d.Generation != 2 || d.MetaCause.Known || d.LinksCause.Known || !d.Metadata.Twin.Enabled {
		t.Errorf("a device that was never there: %+v", d)
	}
}

func TestRegisterAgainKeepsALiveSession(t *testing.T) {
	h := open(t)
	x := h.registered(lamp)
	h.must(h.d.Register(t.Context(), own(lamp, alice, 1), "u")) // sign-up repeated while signed in
	h.must(x.notify(value("/light", 1)))
	select {
	case r := <-x.end.reason:
		t.Errorf("the session was closed: %s", r)
	default:
	}
}

func TestUnregisterDeletesAllButTheLog(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/light"))
	h.must(err)
	h.must(x.notify(value("/light", 1)))
	h.must(h.d.Unregister(t.Context(), own(lamp, bob, 1), ""))   // not bob's: nothing happens
	h.must(h.d.Unregister(t.Context(), own(lamp, alice, 2), "")) // nor of this generation
	h.must(h.d.Unregister(t.Context(), own(lamp, alice, 1), "user-1"))
	if got := x.end.why(t); got != "deleted" {
		t.Errorf("the session was closed with %q", got)
	}
	h.must(h.d.Unregister(t.Context(), own(lamp, alice, 1), "user-1"))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "published 0 [/light]", "changed 0 /light 1 1", "unregistered")
	wantKind(t, x.notify(value("/light", 2)), hub.Precondition, "session-superseded")
	h.must(h.d.Offline(t.Context(), x.stamp())) // the gateway's end comes late: no event
	_, err = h.d.SignIn(t.Context(), own(lamp, alice, 1), conn("c"), "", newEnd())
	wantKind(t, err, hub.Denied, "ownership-stale")
	h.must(h.d.Register(t.Context(), own(lamp, alice, 1), "")) // that generation was there
	seq := h.commits(lamp)[4].Seq

	// The next owner starts with nothing of the former one, and the former one keeps his events.
	h.must(h.d.Register(t.Context(), own(lamp, bob, 2), ""))
	y := h.signIn(lamp, bob, 2, "conn-2")
	h.must(y.notify(value("/light", 3)))
	d := h.device(bob, lamp)
	if d.Links.Len() != 0 || d.Resources.Len() != 1 || d.Seq != seq+3 {
		t.Errorf("bob's device: %+v with %d links", d, d.Links.Len())
	}
	if r, _ := d.Resources.Get("/light"); r.Version != 0 || r.Owner != bob {
		t.Errorf("twin %+v", r)
	}
	_, err = h.d.Device(t.Context(), alice, lamp)
	wantKind(t, err, hub.NotFound, "")
	if a, b := h.history(alice, time.Time{}), h.history(bob, time.Time{}); len(a) != 5 || len(b) != 3 {
		t.Errorf("alice sees %d commits, bob %d", len(a), len(b))
	}
}

func TestTransferWithoutUnregisterLeavesNothing(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/light"))
	h.must(err)
	h.must(x.notify(value("/light", 1)))
	h.must(h.d.Register(t.Context(), own(lamp, bob, 2), "")) // the unregister was lost in a crash
	if got := x.end.why(t); got != "deleted" {
		t.Errorf("the session was closed with %q", got)
	}
	if d := h.device(bob, lamp); d.Links.Len() != 0 || d.Resources.Len() != 0 || d.Metadata.Connection.ID != "" {
		t.Errorf("bob sees %+v", d)
	}
	wantKind(t, x.notify(value("/light", 2)), hub.Precondition, "session-superseded")
}

func (h *house) history(owner hub.Owner, after time.Time) []hub.Commit {
	h.t.Helper()
	var out []hub.Commit
	for c, err := range h.d.History(h.t.Context(), owner, lamp, after) {
		h.must(err)
		out = append(out, c)
	}
	return out
}
