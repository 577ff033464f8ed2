package resourcedirectory

import (
	"testing"

	"github.com/coaphub/coaphub/hub"
)

func TestLifeOfADevice(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/light", "oic.r.light"), link("/oic/d", "oic.wk.d"))
	h.must(err)
	h.must(x.notify(value("/light", 1)))
	h.must(x.notify(value("/light", 2), value("/oic/d", "d")))
	h.must(h.d.Offline(t.Context(), x.stamp()))
	h.must(h.d.Unregister(t.Context(), own(lamp, alice, 1), "user-1"))
	h.expect(lamp, "registered", "meta 0 online out-of-sync", "published 0 [/light /oic/d]", "changed 0 /light 1 1",
		"changed 1 /light 1 2", "changed 0 /oic/d 1 d", "meta 1 offline out-of-sync", "unregistered")
	_, err = h.d.Device(t.Context(), alice, lamp)
	wantKind(t, err, hub.NotFound, "")
}

func TestPictureSurvivesARestart(t *testing.T) {
	t.Parallel()
	h := open(t)
	x := h.registered(lamp)
	_, err := x.publish(link("/light", "oic.r.light"))
	h.must(err)
	h.must(x.notify(value("/light", 1)))
	before := h.device(alice, lamp)
	h.restart()
	after := h.device(alice, lamp)
	if after.Links.Len() != 1 || twinOf(t, after, "/light") != "1" || after.Owner != alice || after.Seq < before.Seq {
		t.Errorf("after the restart: %+v", after)
	}
	r, _ := after.Resources.Get("/light")
	if len(r.Types) != 1 || r.Types[0] != "oic.r.light" || r.Session != x.sess.Number || r.Message != 2 || r.Connection != "conn-1" {
		t.Errorf("twin after the restart: %+v", r)
	}
}
