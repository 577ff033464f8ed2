package certificateauthority

import (
	"crypto/x509"
	"crypto/x509/pkix"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// units has a factory certificate name organizational units.
func units(names ...string) func(*x509.Certificate) {
	return func(c *x509.Certificate) { c.Subject.OrganizationalUnit = names }
}

// A group may be for some device types. It is the manufacturer who says of which one a device is, not the device.
func TestDeviceTypesOfAGroup(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Types = []string{"oic.d.light", "x.com.example.fan"} })
	lamp := shown(f.device("uuid:"+string(testDev), units("works 7", "oic.d.switch", "oic.d.light")))
	claims := named("uuid:" + string(testDev))
	claims.Subject.OrganizationalUnit = []string{"x.com.example.fan"}
	out, err := o.Enrol(t.Context(), lamp, csrOf(t, newKey(t), claims), false)
	if err != nil || out.Chain[0].Subject.String() != "CN=uuid:"+string(testDev) {
		t.Fatalf("a lamp: %v, %v", out.Chain, err)
	}
	if es := o.enrolled(hub.EnrolmentFilter{}); len(es) != 1 || es[0].Type != "oic.d.light" {
		t.Errorf("enrolments: %+v", es)
	}

	door := shown(f.device("uuid:"+string(otherDev), units("oic.d.door")))
	claims = named("uuid:" + string(otherDev))
	claims.Subject.OrganizationalUnit = []string{"oic.d.light"}
	csr := csrOf(t, newKey(t), claims)
	for range 3 {
		_, err = o.Enrol(t.Context(), door, csr, false)
		wantCode(t, "a door that says that it is a lamp", err, hub.Denied, "enrolment-type-not-allowed")
		o.start(o.a)
	}
	refused := hub.EnrolmentFilter{Owner: "alice", States: []hub.EnrolmentState{hub.EnrolmentRefused}}
	if es := o.enrolled(refused); len(es) != 1 || es[0].Device != otherDev || es[0].Type != "oic.d.door" || es[0].Problem != "enrolment-type-not-allowed" || es[0].User != "" {
		t.Errorf("refused: %+v", es)
	}
	for what, change := range map[string]func(*x509.Certificate){"no type": nil, "what is none": units("light", "OIC.D.LIGHT", "oic.d.light "), "only a part": units("oic.d.ligh")} {
		_, err = o.enrol(shown(f.device("serial", change)), "")
		wantCode(t, what, err, hub.Denied, "enrolment-type-not-allowed")
	}

	// Another group, another verdict; with another key, too, since that one got nothing.
	g.Types = append(g.Types, "oic.d.door")
	if g, err = o.SetGroup(t.Context(), g); err != nil || !slices.Contains(g.Types, "oic.d.door") {
		t.Fatalf("changed: %+v, %v", g, err)
	}
	if _, err := o.enrol(shown(f.device("uuid:"+string(otherDev), units("oic.d.door"))), ""); err != nil {
		t.Errorf("a door, where they are let in: %v", err)
	}

	// Who has enrolled renews, and gets nothing for its factory key once its group is for others. A token is of no group.
	g.Types = []string{"oic.d.door"}
	if g, err = o.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if _, err := o.renew(out); err != nil {
		t.Errorf("a renewal: %v", err)
	}
	_, err = o.enrol(lamp, "")
	wantCode(t, "the factory key", err, hub.Denied, "enrolment-type-not-allowed")
	if got := o.state(testDev); got != "issued enrolment-type-not-allowed" {
		t.Errorf("it is %q", got)
	}
	token, _ := o.token("alice", testDev)
	if _, err := o.enrol(hub.EnrolmentProof{Token: token}, ""); err != nil {
		t.Errorf("a token: %v", err)
	}
	for _, bad := range [][]string{{"light"}, {""}, {"oic.d.Light"}, {"oic.d.light,oic.d.door"}, slices.Repeat([]string{"oic.d.light"}, 65)} {
		g.Types = bad
		_, err = o.SetGroup(t.Context(), g)
		wantCode(t, "types", err, hub.Invalid, "group-types-invalid")
	}
}

// A device that comes again and again is written down once, as one that waits is.
func TestRefusedTypesAreWrittenOnce(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Types = []string{"oic.d.light"} })
	door, csr := shown(f.device("uuid:"+string(testDev), units("oic.d.door"))), csrOf(t, newKey(t), named(""))
	written := 0
	o.docs.Mu.Lock()
	o.docs.Fail = func(op, _, _ string) error {
		if op == "put" {
			written++
		}
		return nil
	}
	o.docs.Mu.Unlock()
	for range 3 {
		_, err := o.Enrol(t.Context(), door, csr, false)
		wantCode(t, "a door", err, hub.Denied, "enrolment-type-not-allowed")
	}
	if written != 1 {
		t.Errorf("written %d times", written)
	}
	if got := o.state(testDev); got != "refused enrolment-type-not-allowed" {
		t.Errorf("it is %q", got)
	}
}

// What a person decided stays where a device is of another type, and what nobody decided is forgotten.
func TestDeviceTypesAndDecisions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, f := newOffice(t), newFactory(t)
		g := o.group(f, func(g *hub.EnrolmentGroup) { g.Types, g.Approval = []string{"oic.d.light"}, true })
		door := shown(f.device("uuid:"+string(testDev), units("oic.d.door")))
		_, err := o.enrol(door, "")
		wantCode(t, "a door", err, hub.Denied, "enrolment-type-not-allowed")
		if es, err := o.Decide(t.Context(), "alice", []hub.DeviceID{testDev}, false, "eve"); err != nil || len(es) != 1 {
			t.Fatalf("a person refuses it, too: %+v, %v", es, err)
		}
		g.Types = nil
		if g, err = o.SetGroup(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		_, err = o.enrol(door, "")
		wantCode(t, "refused by a person", err, hub.Denied, "enrolment-refused")
		g.Types = []string{"oic.d.light"}
		if g, err = o.SetGroup(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		_, err = o.enrol(shown(f.device("uuid:"+string(otherDev), nil)), "")
		wantCode(t, "one of no type", err, hub.Denied, "enrolment-type-not-allowed")
		// Under an ID that a device only says nothing is kept: it may be another's.
		g.Named = true
		if g, err = o.SetGroup(t.Context(), g); err != nil {
			t.Fatal(err)
		}
		_, err = o.Admit(t.Context(), []*x509.Certificate{f.device("serial", nil)}, thirdDev)
		wantCode(t, "one that says its ID", err, hub.Denied, "enrolment-type-not-allowed")
		if n := len(o.enrolled(hub.EnrolmentFilter{})); n != 2 {
			t.Errorf("%d enrolments, want 2", n)
		}
		if _, err := o.Admit(t.Context(), []*x509.Certificate{f.make(&x509.Certificate{
			Subject: pkix.Name{CommonName: "serial 2", OrganizationalUnit: []string{"oic.d.light"}}, BasicConstraintsValid: true,
		}, f.root, &newKey(t).PublicKey, f.rootKey)}, thirdDev); !hub.IsKind(err, hub.Unavailable) {
			t.Errorf("a lamp of that ID: %v, and it should wait", err)
		}
		time.Sleep(waitsFor + time.Hour)
		if err := o.sweep(t.Context()); err != nil {
			t.Fatal(err)
		}
		if es := o.enrolled(hub.EnrolmentFilter{}); len(es) != 1 || es[0].Device != testDev || es[0].User != "eve" {
			t.Errorf("left: %+v", es)
		}
	})
}
