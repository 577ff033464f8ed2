package certificateauthority

import (
	"bytes"
	"context"
	"crypto/x509"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

const thirdDev = hub.DeviceID("99999999-2222-4333-8444-555555555555")

// Where its group lets it, a device says its own ID, and its factory key stands for that one from then on.
func TestADeviceSaysItsID(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Named = true })
	mine := shown(f.device("serial 1", nil))
	if a, err := o.Applicant(t.Context(), mine.Chain); err != nil || a.Device != "" || a.Owner != "alice" || a.Group != g.ID {
		t.Errorf("before it says anything: %+v, %v", a, err)
	}
	if a, err := o.Admit(t.Context(), mine.Chain, testDev); err != nil || a.Device != testDev {
		t.Fatalf("admitted: %+v, %v", a, err)
	}
	if es := o.enrolled(hub.EnrolmentFilter{}); len(es) != 1 || es[0].Device != testDev || es[0].State != hub.EnrolmentAllowed {
		t.Errorf("enrolments: %+v", es)
	}
	out, err := o.enrol(mine, "uuid:"+string(testDev))
	if err != nil || out.Device != testDev {
		t.Fatalf("enrolled: %+v, %v", out, err)
	}
	_, err = o.Admit(t.Context(), mine.Chain, otherDev)
	wantCode(t, "another ID", err, hub.Invalid, "csr-name")
	_, err = o.enrol(mine, "uuid:"+string(otherDev))
	wantCode(t, "a request for another ID", err, hub.Invalid, "csr-name")
	o.start(o.a)
	if out, err := o.enrol(mine, "whatever"); err != nil || out.Device != testDev {
		t.Errorf("a request that says nothing, after a restart: %+v, %v", out, err)
	}
	if a, err := o.Applicant(t.Context(), mine.Chain); err != nil || a.Device != testDev {
		t.Errorf("afterwards: %+v, %v", a, err)
	}
	// Its manufacturer's word is the last, and so is what it enrolled as before it could say anything.
	named := shown(f.device("uuid:"+string(otherDev), nil))
	_, err = o.enrol(named, "uuid:"+string(thirdDev))
	wantCode(t, "another ID than the manufacturer's", err, hub.Invalid, "csr-name")
	silent := shown(f.device("serial 2", nil))
	made, err := o.enrol(silent, "serial 2")
	if err != nil {
		t.Fatal(err)
	}
	_, err = o.enrol(silent, "uuid:"+string(thirdDev))
	wantCode(t, "another ID than that of its key", err, hub.Invalid, "csr-name")
	if a, err := o.Admit(t.Context(), silent.Chain, made.Device); err != nil || a.Device != made.Device {
		t.Errorf("the ID that is made of its key: %+v, %v", a, err)
	}
	g.Named = false
	if _, err := o.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if out, err := o.enrol(mine, "uuid:"+string(testDev)); err != nil || out.Device != testDev {
		t.Errorf("after its group lets nobody say it any more: %+v, %v", out, err)
	}
}

// No device says that it is one that somebody else is, or may be.
func TestADeviceTakesNobodysID(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Named = true })
	if _, err := o.enrol(shown(f.device("serial 1", nil)), "uuid:"+string(testDev)); err != nil {
		t.Fatal(err)
	}
	issued := hub.DeviceID("99999999-0000-4000-8000-000000000001")
	if _, err := o.IssueDevice(t.Context(), issued, DeviceValidity, "", "operator"); err != nil {
		t.Fatal(err)
	}
	kept := hub.DeviceID("99999999-0000-4000-8000-000000000002")
	if _, err := o.Sign(t.Context(), "bob", "bob", csrOf(t, newKey(t), named("uuid:"+string(kept)))); err != nil {
		t.Fatal(err)
	}
	if _, err := o.Revoke(t.Context(), hub.CertificateFilter{Owner: "bob", Devices: []hub.DeviceID{kept}}, hub.RevokedUnspecified); err != nil {
		t.Fatal(err)
	}
	gone := hub.DeviceID("99999999-0000-4000-8000-000000000004")
	o.own[otherDev], o.own[thirdDev], o.own[gone] = "bob", "alice", refused
	impostor := shown(f.device("serial 2", nil))
	for what, c := range map[string]struct {
		dev  hub.DeviceID
		code string
	}{
		"of another factory key":       {testDev, "enrolment-device-taken"},
		"another owner's":              {otherDev, "enrolment-device-taken"},
		"another device of the owner":  {thirdDev, "enrolment-device-taken"},
		"that somebody has a key for":  {issued, "enrolment-device-taken"},
		"that is kept for another":     {kept, "device-owned-by-other"},
		"of a device that was removed": {gone, "device-removed"},
		"the hub's":                    {o.a.hubID, "device-id-of-hub"},
	} {
		_, err := o.enrol(impostor, "uuid:"+string(c.dev))
		wantCode(t, "an ID "+what, err, hub.Denied, c.code)
		_, err = o.Admit(t.Context(), impostor.Chain, c.dev)
		wantCode(t, "to be admitted with an ID "+what, err, hub.Denied, c.code)
	}
	free := hub.DeviceID("99999999-0000-4000-8000-000000000003")
	if out, err := o.enrol(impostor, "uuid:"+string(free)); err != nil || out.Device != free {
		t.Errorf("none of which binds it: %+v, %v", out, err)
	}
	// What was known of a device can be forgotten, but not by that whose key is good.
	if _, err := o.Forget(t.Context(), hub.EnrolmentFilter{Devices: []hub.DeviceID{testDev}}); err != nil {
		t.Fatal(err)
	}
	_, err := o.enrol(shown(f.device("serial 3", nil)), "uuid:"+string(testDev))
	wantCode(t, "a device that has a certificate and was forgotten", err, hub.Denied, "enrolment-device-taken")
}

// Whoever may say his own ID may say one of another owner's devices: so a CA whose devices may is one owner's alone.
func TestACAWhoseDevicesSayTheirIDsIsOneOwners(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Named, g.Allow = true, []hub.DeviceID{testDev} })
	_, err := o.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: "bob", Chain: string(certPEM(f.root)), Allow: []hub.DeviceID{otherDev}})
	wantCode(t, "another owner's group", err, hub.Precondition, "group-ca-taken")
	o.group(f, func(g *hub.EnrolmentGroup) { g.Allow = []hub.DeviceID{otherDev} })
	_, err = o.enrol(shown(f.device("serial 1", nil)), "uuid:"+string(thirdDev))
	wantCode(t, "a device that no group names", err, hub.Denied, "enrolment-not-allowed")
	if out, err := o.enrol(shown(f.device("serial 2", nil)), "uuid:"+string(testDev)); err != nil || out.Device != testDev {
		t.Errorf("a device that its group names: %+v, %v", out, err)
	}
}

// What a person has to allow is one key as one device: nothing else lets it in meanwhile.
func TestNothingButAPersonAllowsAKeyThatWaits(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, func(g *hub.EnrolmentGroup) { g.Named, g.Approval = true, true })
	waits := shown(f.device("serial 1", nil))
	_, err := o.Admit(t.Context(), waits.Chain, testDev)
	wantCode(t, "admitted", err, hub.Unavailable, "enrolment-waiting")
	_, err = o.Admit(t.Context(), waits.Chain, otherDev)
	wantCode(t, "another ID while it waits", err, hub.Invalid, "csr-name")
	// Somebody gives the device a certificate by another way, and it renews that.
	own, err := o.sign("alice", testDev)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.Enrol(t.Context(), shown(own), csrOf(t, newKey(t), named("uuid:"+string(testDev))), true); err != nil {
		t.Fatal(err)
	}
	_, err = o.enrol(waits, "")
	wantCode(t, "after a renewal", err, hub.Unavailable, "enrolment-waiting")
	text, _, err := o.NewToken(t.Context(), "alice", testDev, 0, "alice")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := o.enrol(hub.EnrolmentProof{Token: text}, ""); err != nil {
		t.Fatal(err)
	}
	_, err = o.enrol(waits, "")
	wantCode(t, "after a token", err, hub.Unavailable, "enrolment-waiting")
	if _, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, true, "eve"); err != nil {
		t.Fatal(err)
	}
	if out, err := o.enrol(waits, ""); err != nil || out.Device != testDev {
		t.Errorf("once it is allowed: %+v, %v", out, err)
	}
}

// A group's pre-shared key reaches its devices and nobody else: it is not in the store, and nobody is shown it.
func TestPreSharedKeyOfAGroup(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	if err := o.Secret(make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	const psk = "0123456789abcdef and more"
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.PSK = psk })
	if g.PSK != "" || !g.HasPSK {
		t.Errorf("made: %+v", g)
	}
	gs, err := o.Groups(t.Context(), "alice")
	if err != nil || len(gs) != 1 || gs[0].PSK != "" || !gs[0].HasPSK {
		t.Errorf("groups: %+v, %v", gs, err)
	}
	for doc, err := range o.docs.Range(t.Context(), collGroups, "", "") {
		if err != nil || bytes.Contains(doc.Value, []byte(psk[:8])) || bytes.Contains(doc.Value, []byte("MDEyMzQ1Njc4")) {
			t.Errorf("the store has %s, %v", doc.Value, err)
		}
	}
	leaf := f.device("serial 1", nil)
	gets := func() string {
		t.Helper()
		a, err := o.Applicant(t.Context(), []*x509.Certificate{leaf})
		if err != nil {
			t.Fatal(err)
		}
		return a.PSK
	}
	if got := gets(); got != psk[:16] {
		t.Errorf("a device gets %q", got)
	}
	g.Name = "renamed"
	if g, err = o.SetGroup(t.Context(), g); err != nil || gets() != psk[:16] {
		t.Errorf("after a change that keeps it: %q, %v", gets(), err)
	}
	g.HasPSK = false
	if g, err = o.SetGroup(t.Context(), g); err != nil || g.HasPSK || gets() != "" {
		t.Errorf("after it was removed: %+v, %v", g, err)
	}
	g.PSK = "short"
	_, err = o.SetGroup(t.Context(), g)
	wantCode(t, "a short one", err, hub.Invalid, "group-psk-invalid")
}

// How each step ended is kept for its owner, the newest of each, until somebody removes it.
func TestProvisioningRecords(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Named = true })
	leaf := f.device("serial 1", nil)
	to := hub.Applicant{Owner: "alice", Group: g.ID}
	keep := func(p hub.Provisioned) {
		t.Helper()
		if err := o.Provisioned(t.Context(), []*x509.Certificate{leaf}, to, p); err != nil {
			t.Fatal(err)
		}
	}
	list := func(f hub.ProvisioningFilter) (out []hub.ProvisioningRecord) {
		t.Helper()
		for r, err := range o.ProvisioningRecords(context.Background(), f) {
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, r)
		}
		return out
	}
	keep(hub.Provisioned{Step: hub.StepOwnership, Code: 69})
	keep(hub.Provisioned{Step: hub.StepCloud, Device: testDev, Code: 163, Problem: "enrolment-waiting"})
	keep(hub.Provisioned{Step: hub.StepCloud, Device: testDev, Code: 68, Cloud: hub.Cloud{Provider: "coaphub", Gateways: []string{"coaps+tcp://a:1"}}})
	keep(hub.Provisioned{Step: hub.StepCredentials, Device: testDev, Code: 68, Identity: "PEM", PSK: true})
	keep(hub.Provisioned{Step: hub.StepCredentials, Device: testDev, Code: 163, Problem: "store-full"})
	keep(hub.Provisioned{Step: hub.StepACLs, Code: 69})
	rs := list(hub.ProvisioningFilter{Owner: "alice"})
	if len(rs) != 1 {
		t.Fatalf("%d records", len(rs))
	}
	r := rs[0]
	if r.Device != testDev || r.Group != g.ID || r.Name != "serial 1" || !strings.Contains(r.Certificate, "BEGIN CERTIFICATE") || r.Identity != "PEM" || !r.PSK ||
		r.Cloud.Gateways[0] != "coaps+tcp://a:1" || r.Steps[hub.StepCloud].Code != 68 || r.Steps[hub.StepCloud].Problem != "" ||
		r.Steps[hub.StepCredentials].Problem != "store-full" || r.Steps[hub.StepACLs].Code != 69 {
		t.Errorf("%+v", r)
	}
	for what, c := range map[string]struct {
		f hub.ProvisioningFilter
		n int
	}{
		"of another owner":          {hub.ProvisioningFilter{Owner: "bob", IDs: []string{r.ID}}, 0},
		"of its ID":                 {hub.ProvisioningFilter{Owner: "alice", IDs: []string{r.ID}}, 1},
		"of its device":             {hub.ProvisioningFilter{Owner: "alice", Devices: []hub.DeviceID{testDev}}, 1},
		"of its device and a group": {hub.ProvisioningFilter{Owner: "alice", Devices: []hub.DeviceID{testDev}, Groups: []string{"other"}}, 0},
		"of another device":         {hub.ProvisioningFilter{Owner: "alice", Devices: []hub.DeviceID{otherDev}}, 0},
	} {
		if got := list(c.f); len(got) != c.n {
			t.Errorf("%s: %d records", what, len(got))
		}
	}
	if gone, err := o.DeleteProvisioningRecords(t.Context(), hub.ProvisioningFilter{Owner: "bob"}); err != nil || len(gone) != 0 {
		t.Errorf("another owner removed %v, %v", gone, err)
	}
	if gone, err := o.DeleteProvisioningRecords(t.Context(), hub.ProvisioningFilter{Owner: "alice"}); err != nil || len(gone) != 1 {
		t.Errorf("removed %v, %v", gone, err)
	}
	if got := list(hub.ProvisioningFilter{Owner: "alice"}); len(got) != 0 {
		t.Errorf("%d records are left", len(got))
	}
}
