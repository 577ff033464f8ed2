package certificateauthority

import (
	"testing"

	"github.com/coaphub/coaphub/hub"
)

// renew asks for another certificate under one that a device has.
func (o *office) renew(out hub.Enrolled) (hub.Enrolled, error) {
	o.t.Helper()
	return o.Enrol(o.t.Context(), shown(out.Chain[0]), csrOf(o.t, newKey(o.t), named("uuid:"+string(out.Device))), true)
}

// terms are what the ledger says that a certificate stands on: the version, and who accepted it.
func (o *office) terms(serial string) string {
	o.t.Helper()
	c := o.list(hub.CertificateFilter{All: true, Serials: []string{serial}})
	if len(c) != 1 || c[0].Terms.Version != "" && c[0].Terms.Time.IsZero() {
		o.t.Fatalf("the ledger has %+v", c)
	}
	return c[0].Terms.Version + " by " + c[0].Terms.User
}

func (o *office) state(dev hub.DeviceID) string {
	o.t.Helper()
	es := o.enrolled(hub.EnrolmentFilter{Devices: []hub.DeviceID{dev}})
	if len(es) != 1 {
		o.t.Fatalf("enrolments: %+v", es)
	}
	return string(es[0].State) + " " + string(es[0].Waits) + es[0].Problem
}

func (o *office) accept(owner hub.Owner, g hub.EnrolmentGroup, version, user string) {
	o.t.Helper()
	if got, err := o.AcceptTerms(o.t.Context(), owner, g.ID, version, user); err != nil || got.Accepted.Version != version {
		o.t.Fatalf("accepted %+v, %v", got.Accepted, err)
	}
}

// A device of a group with terms waits until somebody accepts them, and its certificates say who did. New terms are asked for with
// new devices.
func TestTermsOfAGroup(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) {
		g.Terms = hub.Terms{Version: "2026-1", URL: "https://terms.example/2026-1"}
		g.Accepted = hub.Acceptance{Version: "2026-1", User: "nobody"} // which says nothing
	})
	lamp := shown(f.device("uuid:"+string(testDev), nil))
	csr := csrOf(t, newKey(t), named(""))
	for range 3 {
		_, err := o.Enrol(t.Context(), lamp, csr, false)
		wantCode(t, "before somebody accepted", err, hub.Unavailable, "enrolment-waiting")
		if retry := err.(interface{ Unwrap() error }).Unwrap().(*hub.Error).RetryAfter; retry != askAgain {
			t.Errorf("it may ask again after %v", retry)
		}
		o.start(o.a)
	}
	if got := o.state(testDev); got != "waiting terms" {
		t.Errorf("it is %q", got)
	}
	if es, err := o.Decide(t.Context(), "alice", []hub.DeviceID{testDev}, true, "eve"); err != nil || len(es) > 0 {
		t.Errorf("to allow the device changed %+v, %v", es, err)
	}
	for version, code := range map[string]string{"2026-2": "terms-version", "": "terms-version"} {
		_, err := o.AcceptTerms(t.Context(), "alice", g.ID, version, "eve")
		wantCode(t, "another version", err, hub.Precondition, code)
	}
	_, err := o.AcceptTerms(t.Context(), "bob", g.ID, "2026-1", "bob")
	wantCode(t, "another owner", err, hub.NotFound, "group-unknown")
	_, err = o.Enrol(t.Context(), lamp, csr, false)
	wantCode(t, "after what changes nothing", err, hub.Unavailable, "enrolment-waiting")

	o.accept("alice", g, "2026-1", "eve")
	o.accept("", g, "2026-1", "mallory") // once more, which changes nothing
	if es := o.enrolled(hub.EnrolmentFilter{States: []hub.EnrolmentState{hub.EnrolmentAllowed}}); len(es) != 1 || es[0].Waits != "" {
		t.Errorf("allowed: %+v", es)
	}
	if es := o.enrolled(hub.EnrolmentFilter{States: []hub.EnrolmentState{hub.EnrolmentWaiting}}); len(es) > 0 {
		t.Errorf("waiting: %+v", es)
	}
	o.start(o.a)
	out, err := o.Enrol(t.Context(), lamp, csr, false)
	if err != nil {
		t.Fatal(err)
	}
	if got := o.terms(out.Serial); got != "2026-1 by eve" {
		t.Errorf("the ledger has %s", got)
	}
	if again, err := o.Enrol(t.Context(), lamp, csr, false); err != nil || again.Serial != out.Serial {
		t.Errorf("the same request once more: %s, %v", again.Serial, err)
	}

	// The next version: who has enrolled goes on, and others wait.
	g.Terms.Version, g.Name = "2026-2", "renamed"
	if g, err = o.SetGroup(t.Context(), g); err != nil || g.Accepted.User != "eve" {
		t.Fatalf("changed: %+v, %v", g, err)
	}
	next, err := o.renew(out)
	if err != nil || o.terms(next.Serial) != "2026-1 by eve" {
		t.Errorf("a renewal: %v", err)
	}
	if out, err = o.enrol(lamp, ""); err != nil || o.terms(out.Serial) != "2026-1 by eve" {
		t.Errorf("the factory key once more: %v", err)
	}
	fan := shown(f.device("uuid:"+string(otherDev), nil))
	_, err = o.enrol(fan, "")
	wantCode(t, "another device", err, hub.Unavailable, "enrolment-waiting")
	if _, err := o.Forget(t.Context(), hub.EnrolmentFilter{Devices: []hub.DeviceID{testDev}}); err != nil {
		t.Fatal(err)
	}
	_, err = o.enrol(lamp, "")
	wantCode(t, "one that begins anew", err, hub.Unavailable, "enrolment-waiting")
	o.accept("", g, "2026-2", "operator")
	if out, err = o.enrol(fan, ""); err != nil || o.terms(out.Serial) != "2026-2 by operator" {
		t.Errorf("after they were accepted: %v", err)
	}

	// Without terms nobody waits, and a token, which is of no group, stands on none.
	g.Terms = hub.Terms{}
	if g, err = o.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	if out, err = o.enrol(lamp, ""); err != nil || o.terms(out.Serial) != " by " {
		t.Errorf("without terms: %v", err)
	}
	token, _ := o.token("alice", otherDev)
	if out, err = o.enrol(hub.EnrolmentProof{Token: token}, ""); err != nil || o.terms(out.Serial) != " by " {
		t.Errorf("with a token: %v", err)
	}
	g.Terms = hub.Terms{Version: "2026-3"}
	if g, err = o.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	_, err = o.enrol(fan, "")
	wantCode(t, "a factory key after a token", err, hub.Unavailable, "enrolment-waiting")
	for _, bad := range []hub.Terms{
		{Version: "a\nb"}, {URL: "https://terms.example"}, {Version: "1", URL: "javascript:alert(1)"}, {Version: "1", URL: "terms.txt"}, {Version: "1", URL: "https:///x"},
	} {
		g.Terms = bad
		_, err = o.SetGroup(t.Context(), g)
		wantCode(t, bad.URL, err, hub.Invalid, "group-terms-invalid")
	}
}

// A person allows the device first, and that stays so while it waits for the terms.
func TestTermsAndApproval(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Approval, g.Terms.Version = true, "1" })
	lamp := shown(f.device("uuid:"+string(testDev), nil))
	waits := func(what, want string) {
		t.Helper()
		_, err := o.enrol(lamp, "")
		wantCode(t, what, err, hub.Unavailable, "enrolment-waiting")
		if got := o.state(testDev); got != "waiting "+want {
			t.Errorf("%s: it is %q", what, got)
		}
	}
	decide := func(allow bool) {
		t.Helper()
		if es, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, allow, "eve"); err != nil || len(es) != 1 {
			t.Fatalf("decided on %d, %v", len(es), err)
		}
	}
	waits("at first", "approval")
	decide(true)
	waits("allowed", "terms")
	waits("allowed", "terms")
	decide(false)
	_, err := o.enrol(lamp, "")
	wantCode(t, "refused while it waits for the terms", err, hub.Denied, "enrolment-refused")
	decide(true)
	waits("allowed again", "terms")
	o.accept("", g, "1", "adam")
	out, err := o.enrol(lamp, "")
	if err != nil {
		t.Fatal(err)
	}
	c := o.list(hub.CertificateFilter{All: true, Serials: []string{out.Serial}})
	if c[0].User != "eve" || c[0].Terms.User != "adam" {
		t.Errorf("allowed by %q, terms accepted by %q", c[0].User, c[0].Terms.User)
	}

	// One that needed nobody while it waited for terms needs somebody now.
	g.Approval, g.Terms.Version = false, "2"
	if g, err = o.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	fan := shown(f.device("uuid:"+string(otherDev), nil))
	_, err = o.enrol(fan, "")
	wantCode(t, "another one", err, hub.Unavailable, "enrolment-waiting")
	g.Approval = true
	if g, err = o.SetGroup(t.Context(), g); err != nil {
		t.Fatal(err)
	}
	o.accept("", g, "2", "adam")
	_, err = o.enrol(fan, "")
	wantCode(t, "after its group asks a person", err, hub.Unavailable, "enrolment-waiting")
	if got := o.state(otherDev); got != "waiting approval" {
		t.Errorf("it is %q", got)
	}
}

// Whatever operation of the store fails, nobody has a certificate before the terms are accepted, and the device gets one afterwards.
func TestTermsWhenTheStoreFails(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Terms.Version = "1" })
	lamp, csr := shown(f.device("uuid:"+string(testDev), nil)), csrOf(t, newKey(t), named(""))
	down := &hub.Error{Kind: hub.Unavailable, Code: "disk-full", Text: "full"}
	// eachFails has the first operation fail, then the second, until none does.
	eachFails := func(what string, do func() error) {
		t.Helper()
		for n := 1; ; n++ {
			count := 0
			o.docs.Mu.Lock()
			o.docs.Fail = func(string, string, string) error {
				if count++; count == n {
					return down
				}
				return nil
			}
			o.docs.Mu.Unlock()
			o.groups.Store(nil) // they are read, too
			err := do()
			o.docs.Mu.Lock()
			o.docs.Fail = nil
			o.docs.Mu.Unlock()
			if count < n {
				if n < 3 {
					t.Fatalf("%s: only %d operations of the store", what, count)
				}
				return
			}
			if n > 50 {
				t.Fatalf("%s: it does not end: %v", what, err)
			}
		}
	}
	eachFails("it waits", func() error {
		_, err := o.Enrol(t.Context(), lamp, csr, false)
		if err == nil || !hub.IsKind(err, hub.Unavailable) {
			t.Fatalf("before the terms are accepted: %v", err)
		}
		return err
	})
	if got := o.state(testDev); got != "waiting terms" {
		t.Errorf("it is %q", got)
	}
	eachFails("they are accepted", func() error { // the last time by whom
		_, err := o.AcceptTerms(t.Context(), "alice", g.ID, "1", "eve")
		return err
	})
	eachFails("it enrols", func() error {
		_, err := o.Enrol(t.Context(), lamp, csr, false)
		return err
	})
	out, err := o.Enrol(t.Context(), lamp, csr, false)
	if err != nil || o.terms(out.Serial) != "1 by eve" {
		t.Errorf("enrolled: %v", err)
	}
	if n := len(o.list(hub.CertificateFilter{All: true})); n != 1 {
		t.Errorf("the ledger has %d certificates for one key", n)
	}
}

// By SCEP the device polls with the same transaction until the terms are accepted.
func TestTermsBySCEP(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	g := o.group(f, func(g *hub.EnrolmentGroup) { g.Terms.Version = "1" })
	proof := shown(f.device("uuid:"+string(testDev), nil))
	proof.Transaction = "transaction"
	_, err := o.scep(proof, rsaKey(t, 2048), "", false)
	wantCode(t, "at first", err, hub.Unavailable, "enrolment-waiting")
	_, err = o.Enrol(t.Context(), proof, nil, false)
	wantCode(t, "polled", err, hub.Unavailable, "enrolment-waiting")
	o.accept("", g, "1", "eve")
	if out, err := o.Enrol(t.Context(), proof, nil, false); err != nil || o.terms(out.Serial) != "1 by eve" {
		t.Errorf("polled after they were accepted: %v", err)
	}
}
