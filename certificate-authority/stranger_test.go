package certificateauthority

import (
	"crypto/rsa"
	"crypto/x509"
	"math/big"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Whoever cannot have a device changes nothing of its enrolment, whatever he shows: it stays its owner's to decide on, it renews, and
// its factory key is good.
func TestAStrangerLeavesAnEnrolmentAsItIs(t *testing.T) {
	for name, shows := range map[string]func(o *office) hub.EnrolmentProof{
		"a token": func(o *office) hub.EnrolmentProof {
			text, _ := o.token("mallory", "")
			return hub.EnrolmentProof{Token: text}
		},
		"a factory of his": func(o *office) hub.EnrolmentProof {
			m := newFactory(t)
			o.group(m, func(g *hub.EnrolmentGroup) { g.Owner = "mallory" })
			return shown(m.device("uuid:"+string(testDev), nil))
		},
		"a factory of his, and a person is asked": func(o *office) hub.EnrolmentProof {
			m := newFactory(t)
			o.group(m, func(g *hub.EnrolmentGroup) { g.Owner, g.Approval = "mallory", true })
			return shown(m.device("uuid:"+string(testDev), nil))
		},
	} {
		for _, enrolled := range []bool{true, false} {
			o, f := newOffice(t), newFactory(t)
			o.group(f, nil)
			proof := shown(f.device("uuid:"+string(testDev), nil))
			if enrolled {
				if _, err := o.enrol(proof, ""); err != nil {
					t.Fatal(err)
				}
			}
			o.own[testDev] = "alice"
			before := o.enrolled(hub.EnrolmentFilter{})
			if _, err := o.enrol(shows(o), "uuid:"+string(testDev)); !hub.IsKind(err, hub.Denied) {
				t.Errorf("%s: %v", name, err)
			}
			if after := o.enrolled(hub.EnrolmentFilter{}); len(after) != len(before) || enrolled && after[0] != before[0] {
				t.Errorf("%s: the enrolment was %+v, and is %+v", name, before, after)
			}
			_, err := o.Decide(t.Context(), "mallory", []hub.DeviceID{testDev}, false, "mallory")
			wantCode(t, name+": a decision of his", err, hub.NotFound, "enrolment-unknown")
			out, err := o.enrol(proof, "")
			if err != nil {
				t.Fatalf("%s: the device once more: %v", name, err)
			}
			if _, err := o.Enrol(t.Context(), shown(out.Chain...), csrOf(t, newKey(t), named("uuid:"+string(testDev))), true); err != nil {
				t.Errorf("%s: the device's renewal: %v", name, err)
			}
		}
	}
}

// Who had a device before has no say in its renewals.
func TestAFormerOwnerDecidesNothing(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	if _, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), ""); err != nil {
		t.Fatal(err)
	}
	o.own[testDev] = "bob"
	_, err := o.Decide(t.Context(), "alice", []hub.DeviceID{testDev}, false, "alice")
	wantCode(t, "a former owner's decision", err, hub.NotFound, "enrolment-unknown")
	if es, err := o.Decide(t.Context(), "", []hub.DeviceID{testDev}, false, "operator"); err != nil || len(es) != 1 {
		t.Errorf("an operator's decision: %v, %v", es, err)
	}
}

// A token is worth nothing against a refusal that came after it, and gives nothing more once what it gave was revoked.
func TestATokenIsNotAskedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o, f := newOffice(t), newFactory(t)
		o.group(f, func(g *hub.EnrolmentGroup) { g.Approval = true })
		early, _ := o.token("alice", "")
		time.Sleep(time.Minute)
		_, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), "")
		wantCode(t, "a device that has to wait", err, hub.Unavailable, "enrolment-waiting")
		if _, err := o.Decide(t.Context(), "alice", []hub.DeviceID{testDev}, false, "alice"); err != nil {
			t.Fatal(err)
		}
		_, err = o.enrol(hub.EnrolmentProof{Token: early}, "uuid:"+string(testDev))
		wantCode(t, "a token of before the refusal", err, hub.Denied, "enrolment-refused")
		time.Sleep(time.Minute)
		late, _ := o.token("alice", testDev)
		csr := csrOf(t, newKey(t), named(""))
		out, err := o.Enrol(t.Context(), hub.EnrolmentProof{Token: late}, csr, false)
		if err != nil {
			t.Fatalf("a token of after the refusal: %v", err)
		}
		if again, err := o.Enrol(t.Context(), hub.EnrolmentProof{Token: late}, csr, false); err != nil || again.Serial != out.Serial {
			t.Errorf("the same request: %s, %v; want %s", again.Serial, err, out.Serial)
		}
		if _, err := o.Revoke(t.Context(), hub.CertificateFilter{All: true, Serials: []string{out.Serial}}, hub.RevokedSuperseded); err != nil {
			t.Fatal(err)
		}
		_, err = o.Enrol(t.Context(), hub.EnrolmentProof{Token: late}, csr, false)
		wantCode(t, "the same request after its certificate was revoked", err, hub.Unauthenticated, "certificate-revoked")
	})
}

// A CA that is above or below that of another owner's group is as the same one: its devices would be anybody's. An owner's own groups
// may be of both.
func TestAGroupAboveAnothers(t *testing.T) {
	f := newFactory(t)
	key := newKey(t)
	issuing := f.make(caOf("factory issuing"), f.root, &key.PublicKey, f.rootKey)
	lower := newKey(t)
	line := (&factory{t, issuing, key}).make(caOf("factory line 2"), issuing, &lower.PublicKey, key)
	for what, chains := range map[string][2][]byte{
		"above":                         {certPEM(issuing), certPEM(f.root)},
		"below":                         {certPEM(f.root), certPEM(issuing)},
		"far above, as the chain tells": {append(certPEM(line), certPEM(issuing)...), certPEM(f.root)},
		"far below, as its chain tells": {certPEM(f.root), append(certPEM(line), certPEM(issuing)...)},
		"the same":                      {certPEM(issuing), certPEM(issuing)},
	} {
		o := newOffice(t)
		if _, err := o.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: "alice", Chain: string(chains[0])}); err != nil {
			t.Fatal(err)
		}
		theirs := hub.EnrolmentGroup{Owner: "bob", Chain: string(chains[1]), Allow: []hub.DeviceID{testDev}}
		_, err := o.SetGroup(t.Context(), theirs)
		wantCode(t, what, err, hub.Precondition, "group-ca-taken")
		theirs.Owner = "alice"
		if _, err := o.SetGroup(t.Context(), theirs); err != nil {
			t.Errorf("%s, of the same owner: %v", what, err)
		}
	}
	// Two manufacturers under one root have nothing to do with each other.
	o, other := newOffice(t), newKey(t)
	second := f.make(caOf("another issuing"), f.root, &other.PublicKey, f.rootKey)
	for owner, ca := range map[hub.Owner][]byte{"alice": certPEM(issuing), "bob": certPEM(second)} {
		if _, err := o.SetGroup(t.Context(), hub.EnrolmentGroup{Owner: owner, Chain: string(append(ca, certPEM(f.root)...))}); err != nil {
			t.Errorf("%s's CA beside another: %v", owner, err)
		}
	}
}

// What comes behind a factory certificate is bounded, since everybody's is verified. The keys are, too.
func TestALongChainIsNotVerified(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	leaf := f.device("uuid:"+string(testDev), nil)
	proof := shown(leaf)
	for len(proof.Chain) < 1+maxBehind {
		proof.Chain = append(proof.Chain, f.root)
	}
	if err := o.Vouch(t.Context(), proof.Chain); err != nil {
		t.Errorf("%d certificates: %v", len(proof.Chain), err)
	}
	wantCode(t, "one more", o.Vouch(t.Context(), append(proof.Chain, f.root)), hub.Unauthenticated, "enrolment-unproven")
	for bits, taken := range map[int]bool{maxRSA: true, maxRSA + 8: false} {
		n := new(big.Int).Lsh(big.NewInt(1), uint(bits-1))
		large := f.make(caOf("factory issuing"), f.root, &rsa.PublicKey{N: n.SetBit(n, 0, 1), E: 65537}, f.rootKey)
		if err := o.Vouch(t.Context(), []*x509.Certificate{leaf, large}); (err == nil) != taken {
			t.Errorf("a key of %d bits beside a good chain: %v", bits, err)
		}
	}
}

// A device that is not let in any more does not get once more what it got before, either.
func TestNothingAgainForADeviceThatIsNotLetIn(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	proof, csr := shown(f.device("uuid:"+string(testDev), nil)), csrOf(t, newKey(t), named(""))
	if _, err := o.Enrol(t.Context(), proof, csr, false); err != nil {
		t.Fatal(err)
	}
	o.own[testDev] = refused
	_, err := o.Enrol(t.Context(), proof, csr, false)
	wantCode(t, "the same request", err, hub.Denied, "device-removed")
}
