package certificateauthority

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// IDs that a group names are kept for its owner, from all ways by which others get certificates.
func TestAnAllowListKeepsItsIDs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, f, other := newOffice(t), newFactory(t), newFactory(t)
		const before = hub.DeviceID("77777777-2222-4333-8444-555555555555")
		if _, err := o.sign("carol", before); err != nil {
			t.Fatal(err)
		}
		g := o.group(f, func(g *hub.EnrolmentGroup) { g.Allow = []hub.DeviceID{testDev, otherDev, before} })
		o.start(o.a)
		denied := func(what string, err error) {
			t.Helper()
			wantCode(t, what, err, hub.Denied, "device-owned-by-other")
		}
		_, err := o.sign("bob", testDev)
		denied("a request", err)
		token, _ := o.token("bob", testDev)
		_, err = o.enrol(hub.EnrolmentProof{Token: token}, "")
		denied("a token", err)
		token, _ = o.token("bob", "")
		_, err = o.enrol(hub.EnrolmentProof{Token: token}, "uuid:"+string(testDev))
		denied("a token for any device", err)
		bobs := o.group(other, func(g *hub.EnrolmentGroup) { g.Owner, g.Named = "bob", true })
		_, err = o.enrol(shown(other.device("uuid:"+string(testDev), nil)), "")
		denied("a device of another group", err)
		_, err = o.enrol(shown(other.device("serial", nil)), "uuid:"+string(testDev))
		denied("a device that says that it is it", err)
		if _, err := o.sign("bob", thirdDev); err != nil {
			t.Errorf("an ID that nobody names: %v", err)
		}
		if _, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), ""); err != nil {
			t.Errorf("the device: %v", err)
		}
		if _, err := o.sign("alice", otherDev); err != nil {
			t.Errorf("a request of whom it is kept for: %v", err)
		}

		// Nobody else names them, and whoever was there before the list has his time, and no more.
		bobs.Allow = []hub.DeviceID{testDev, thirdDev}
		_, err = o.SetGroup(t.Context(), bobs)
		wantCode(t, "another list", err, hub.Precondition, "group-allow-taken")
		bobs.Allow = []hub.DeviceID{thirdDev}
		if _, err = o.SetGroup(t.Context(), bobs); err != nil {
			t.Errorf("another list of other devices: %v", err)
		}
		_, err = o.sign("alice", before)
		denied("one that somebody came for before", err)
		time.Sleep(reservedFor / 2)
		if _, err := o.sign("carol", before); err != nil {
			t.Errorf("who came for it before: %v", err)
		}
		time.Sleep(reservedFor/2 + time.Minute)
		_, err = o.sign("carol", before)
		denied("who came for it before, a day later", err)
		if _, err := o.sign("alice", before); err != nil {
			t.Errorf("and whom the list keeps it for: %v", err)
		}

		// An owner is one, whatever a list says; and off the list, an ID is as any other.
		o.own[otherDev] = "bob"
		if _, err := o.sign("bob", otherDev); err != nil {
			t.Errorf("its owner: %v", err)
		}
		g.Allow = []hub.DeviceID{otherDev, before}
		if _, err := o.SetGroup(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		time.Sleep(reservedFor + time.Minute)
		if _, err := o.sign("bob", testDev); err != nil {
			t.Errorf("off the list: %v", err)
		}
	})
}

// How many an owner's lists keep is bounded; a list that is over it may get shorter.
func TestAllowListsOfAnOwnerAreBounded(t *testing.T) {
	t.Parallel()
	ids := make([]hub.DeviceID, maxAllow)
	for i := range ids {
		ids[i] = hub.DeviceID(fmt.Sprintf("aaaaaaaa-0000-4000-8000-%012d", i))
	}
	list := func(id string, owner hub.Owner, allow []hub.DeviceID) *group {
		return &group{EnrolmentGroup: hub.EnrolmentGroup{ID: id, Owner: owner, Allow: allow}}
	}
	gs := []*group{list("bob's", "bob", nil)}
	for i := range maxNamed / maxAllow {
		gs = append(gs, list(fmt.Sprint(i), "alice", ids))
	}
	if err := gs[1].mayName(gs, ids[1:]); err != nil {
		t.Errorf("the last one: %v", err)
	}
	more := list("more", "alice", ids[:1])
	wantCode(t, "one more", more.mayName(gs, nil), hub.Exhausted, "group-allow-limit")
	gs = append(gs, list("over", "alice", ids))
	if err := list("over", "alice", ids[2:]).mayName(gs, ids); err != nil {
		t.Errorf("a shorter one: %v", err)
	}
	if err := list("bob's", "bob", []hub.DeviceID{thirdDev}).mayName(gs, nil); err != nil {
		t.Errorf("another owner's: %v", err)
	}
}
