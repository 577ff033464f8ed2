package identitystore

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/store/storetest"
)

// heard collects what Barred tells.
func heard(s *Store) *[]hub.DeviceID {
	var out []hub.DeviceID
	s.Barred(func(dev hub.DeviceID) { out = append(out, dev) })
	return &out
}

func wantAccess(t *testing.T, s *Store, dev hub.DeviceID, owner hub.Owner, want hub.AccessState) hub.Access {
	t.Helper()
	a, err := s.Access(t.Context(), dev, owner)
	if err != nil || a.State != want {
		t.Fatalf("%s is %+v, %v; want %s", dev, a, err, want)
	}
	return a
}

// TestDisableAndEnable: by its owner or an operator, and by nobody else; it holds in another process, and after a restart.
func TestDisableAndEnable(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := newStore(t, docs, dir)
	told := heard(s)
	wantKind(t, s.Disable(t.Context(), lamp, "", "root", ""), hub.NotFound, "device-not-owned")
	signUp(t, s, lamp, alice)
	signUp(t, s, meter, alice)
	wantKind(t, s.Disable(t.Context(), lamp, bob, "bob", ""), hub.NotFound, "device-not-owned")
	if err := s.Denied(lamp, nil); err != nil || len(*told) != 0 {
		t.Fatalf("%v, told %v", err, *told)
	}
	for _, reason := range []string{"stolen", "again"} {
		if err := s.Disable(t.Context(), lamp, alice, "alice", reason); err != nil {
			t.Fatal(err)
		}
	}
	if len(*told) != 2 || (*told)[0] != lamp {
		t.Errorf("told %v", *told)
	}
	for _, s := range []*Store{s, newStore(t, docs, dir)} {
		wantKind(t, s.Denied(lamp, nil), hub.Denied, "device-disabled")
		if err := s.Denied(meter, nil); err != nil {
			t.Errorf("another device: %v", err)
		}
		if a := wantAccess(t, s, lamp, alice, hub.AccessDisabled); a.Reason != "stolen" || a.User != "alice" || a.Since.IsZero() {
			t.Errorf("%+v", a)
		}
		wantKind(t, s.Reachable(t.Context(), lamp, alice), hub.Precondition, "device-disabled")
		if err := s.Reachable(t.Context(), lamp, bob); err != nil { // whom the directory tells what he may know
			t.Errorf("another owner: %v", err)
		}
		_, err := s.Access(t.Context(), lamp, bob)
		wantKind(t, err, hub.NotFound, "device-not-owned")
		wantKind(t, s.Admits(t.Context(), lamp, nil), hub.Denied, "device-disabled")
		_, err = s.SignUp(t.Context(), lamp, alice, "pin", "user", time.Now())
		wantKind(t, err, hub.Denied, "device-disabled")
		if own, err := s.Owner(t.Context(), lamp); err != nil || own.Owner != alice {
			t.Errorf("its owner is %+v, %v", own, err)
		}
	}
	wantKind(t, s.Enable(t.Context(), lamp, bob), hub.NotFound, "device-not-owned")
	for range 2 {
		if err := s.Enable(t.Context(), lamp, ""); err != nil {
			t.Fatal(err)
		}
	}
	for _, s := range []*Store{s, newStore(t, docs, dir)} {
		if err := s.Denied(lamp, nil); err != nil {
			t.Error(err)
		}
		wantAccess(t, s, lamp, alice, hub.AccessAdmitted)
	}
}

// A device that is removed while it is disabled is not disabled for whoever onboards it next.
func TestDisabledEndsWithTheOwner(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := newStore(t, docs, dir)
	signUp(t, s, lamp, alice)
	if err := s.Disable(t.Context(), lamp, alice, "alice", ""); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), lamp, alice, "alice", ""); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Store{s, newStore(t, docs, dir)} {
		if err := s.Denied(lamp, nil); err != nil {
			t.Error(err)
		}
	}
	if _, err := s.SignUp(t.Context(), lamp, bob, "pin", "user", time.Now()); err != nil {
		t.Fatal(err)
	}
	wantAccess(t, s, lamp, bob, hub.AccessAdmitted)
}

// TestRemovedDeviceStaysAway until its former owner or an operator lets it in, or somebody authorizes it anew.
func TestRemovedDeviceStaysAway(t *testing.T) {
	t.Parallel()
	before := time.Now()
	for name, c := range map[string]struct {
		back  func(*Store) error
		owner hub.Owner
	}{
		"authorized since, same owner": {func(*Store) error { return nil }, alice},
		"authorized since, another":    {func(*Store) error { return nil }, bob},
		"let in by its former owner":   {func(s *Store) error { return s.Enable(t.Context(), lamp, alice) }, alice},
		"let in by an operator":        {func(s *Store) error { return s.Enable(t.Context(), lamp, "") }, bob},
	} {
		t.Run(name, func(t *testing.T) {
			docs, dir := storetest.NewMemory(), newDirectory()
			s := newStore(t, docs, dir)
			signUp(t, s, lamp, alice)
			wantKind(t, s.Remove(t.Context(), lamp, bob, "bob", ""), hub.NotFound, "device-not-owned")
			if err := s.Remove(t.Context(), lamp, alice, "alice", "sold"); err != nil {
				t.Fatal(err)
			}
			s = newStore(t, docs, dir)
			for _, authorized := range []time.Time{{}, before} {
				_, err := s.SignUp(t.Context(), lamp, alice, "pin", "user", authorized)
				wantKind(t, err, hub.Denied, "device-removed")
			}
			wantKind(t, s.Admits(t.Context(), lamp, nil), hub.Denied, "device-removed")
			if a := wantAccess(t, s, lamp, alice, hub.AccessRemoved); a.Reason != "sold" || a.User != "alice" {
				t.Errorf("%+v", a)
			}
			_, err := s.Access(t.Context(), lamp, bob)
			wantKind(t, err, hub.NotFound, "")
			wantKind(t, s.Enable(t.Context(), lamp, bob), hub.NotFound, "")
			if err := c.back(s); err != nil {
				t.Fatal(err)
			}
			authorized := time.Now()
			if name[0] == 'l' {
				authorized = time.Time{}
			}
			if own, err := s.SignUp(t.Context(), lamp, c.owner, "pin", "user", authorized); err != nil || own.Generation != 2 {
				t.Fatalf("%+v, %v", own, err)
			}
			if err := s.Admits(t.Context(), lamp, nil); err != nil {
				t.Error(err)
			}
			wantAccess(t, s, lamp, c.owner, hub.AccessAdmitted)
		})
	}
}

func TestSignOffLeavesNoTombstone(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	s.EndCredentials(func(context.Context, hub.Ownership) error { t.Error("its credentials were ended"); return nil })
	signUp(t, s, lamp, alice)
	if err := s.SignOff(t.Context(), lamp, alice, "user"); err != nil {
		t.Fatal(err)
	}
	signUp(t, s, lamp, bob)
	if err := s.Remove(t.Context(), meter, "", "root", ""); !hub.IsKind(err, hub.NotFound) {
		t.Errorf("removed a device that nobody has: %v", err)
	}
}

// TestRemovalEndsCredentials before it is done, and as often as it takes; not when the configuration says otherwise.
func TestRemovalEndsCredentials(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := newStore(t, docs, dir)
	var ended []hub.Ownership
	away := errors.New("the ledger is away")
	s.EndCredentials(func(_ context.Context, own hub.Ownership) error { ended = append(ended, own); return away })
	signUp(t, s, lamp, alice)
	wantKind(t, s.Remove(t.Context(), lamp, "", "root", ""), hub.Unavailable, "")
	_, err := s.Owner(t.Context(), lamp) // tries as well, and does not depend on it
	wantKind(t, err, hub.NotFound, "")
	away = nil
	start(t, s)
	if len(ended) != 3 || ended[2].Device != lamp || ended[2].Owner != alice {
		t.Errorf("%+v", ended)
	}
	_, err = s.SignUp(t.Context(), lamp, bob, "pin", "user", time.Time{})
	wantKind(t, err, hub.Denied, "device-removed")

	s.cfg.RevokeAtRemoval = false
	signUp(t, s, meter, alice)
	if err := s.Remove(t.Context(), meter, alice, "alice", ""); err != nil || len(ended) != 3 {
		t.Errorf("%v, %+v", err, ended)
	}
}

// chain is a device's certificate under an issuing CA under a root.
func chain(t *testing.T) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	var parent *x509.Certificate
	var signer *ecdsa.PrivateKey
	for i, name := range []string{"root", "issuing", "uuid:" + string(lamp)} {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		c := &x509.Certificate{
			SerialNumber: big.NewInt(int64(1000 + i)), Subject: pkix.Name{CommonName: name}, IsCA: i < 2, BasicConstraintsValid: true,
			NotAfter: time.Now().Add(time.Hour),
		}
		if parent == nil {
			parent, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, key.Public(), signer)
		if err != nil {
			t.Fatal(err)
		}
		if parent, err = x509.ParseCertificate(der); err != nil {
			t.Fatal(err)
		}
		signer = key
		out = append([]*x509.Certificate{parent}, out...)
	}
	return out
}

// TestDenyList: each kind of entry keeps out who comes with what it names, and nobody else; so it does after a restart.
func TestDenyList(t *testing.T) {
	t.Parallel()
	mine, other := chain(t), chain(t)
	for name, c := range map[string]struct {
		of    hub.DenialOf
		value string
		code  string
	}{
		"device":                      {hub.DenyDevice, string(lamp), "device-denied"},
		"key":                         {hub.DenyKey, sum(mine[0].RawSubjectPublicKeyInfo), "key-denied"},
		"certificate":                 {hub.DenyCertificate, sum(mine[0].Raw), "certificate-denied"},
		"certificate by its serial":   {hub.DenyCertificate, sum(mine[1].RawSubjectPublicKeyInfo) + "/" + hub.SerialOf(mine[0].SerialNumber), "certificate-denied"},
		"root by its key":             {hub.DenyCA, sum(mine[2].RawSubjectPublicKeyInfo), "ca-denied"},
		"issuing CA by certificate":   {hub.DenyCA, sum(mine[1].Raw), "ca-denied"},
		"a device's key is no CA's":   {hub.DenyCA, sum(mine[0].RawSubjectPublicKeyInfo), ""},
		"a CA's key is no device's":   {hub.DenyKey, sum(mine[1].RawSubjectPublicKeyInfo), ""},
		"another issuer, same serial": {hub.DenyCertificate, sum(other[1].RawSubjectPublicKeyInfo) + "/" + hub.SerialOf(mine[0].SerialNumber), ""},
	} {
		t.Run(name, func(t *testing.T) {
			docs, dir := storetest.NewMemory(), newDirectory()
			s := newStore(t, docs, dir)
			told := heard(s)
			d, err := hub.ParseDenial(c.of, c.value)
			if err != nil {
				t.Fatal(err)
			}
			d.Reason, d.User = "lost", "root"
			if d, err = s.Deny(t.Context(), d); err != nil || d.Since.IsZero() {
				t.Fatalf("%+v, %v", d, err)
			}
			if len(*told) != 1 || (*told)[0] != "" && (*told)[0] != lamp {
				t.Errorf("told %q", *told)
			}
			for _, s := range []*Store{s, newStore(t, docs, dir)} {
				got, _ := hub.Public(s.Denied(lamp, mine))
				if c.code == "" {
					if err := s.Denied(lamp, mine); err != nil {
						t.Errorf("refused: %v", err)
					}
				} else if got != c.code {
					t.Errorf("got %q, want %q", got, c.code)
				}
				if err := s.Denied(meter, other); err != nil && c.code != "" {
					t.Errorf("another device: %v", err)
				}
				if list := s.Denials(); len(list) != 1 || list[0] != d {
					t.Errorf("%+v", list)
				}
			}
			if err := s.Undeny(t.Context(), d.Of, d.Value); err != nil {
				t.Fatal(err)
			}
			wantKind(t, s.Undeny(t.Context(), d.Of, d.Value), hub.NotFound, "denial-unknown")
			if err := s.Denied(lamp, mine); err != nil || len(newStore(t, docs, dir).Denials()) != 0 {
				t.Errorf("taken off the list: %v", err)
			}
		})
	}
}

func TestDenyListKeepsKeysFromCertificates(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	mine, other := chain(t), chain(t)
	d := hub.Denial{Of: hub.DenyKey, Value: sum(mine[0].RawSubjectPublicKeyInfo)}
	if _, err := s.Deny(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	wantKind(t, s.Admits(t.Context(), meter, mine[0].RawSubjectPublicKeyInfo), hub.Denied, "key-denied")
	if err := s.Admits(t.Context(), meter, other[0].RawSubjectPublicKeyInfo); err != nil {
		t.Error(err)
	}
}

// An entry ends by itself, and goes from the list then.
func TestDenialEnds(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		docs, dir := storetest.NewMemory(), newDirectory()
		s := newStore(t, docs, dir)
		d := hub.Denial{Of: hub.DenyDevice, Value: string(lamp), Until: time.Now().Add(time.Hour)}
		if _, err := s.Deny(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour - time.Second)
		wantKind(t, s.Denied(lamp, nil), hub.Denied, "device-denied")
		time.Sleep(time.Second)
		if err := s.Denied(lamp, nil); err != nil {
			t.Error(err)
		}
		s.sweep(t.Context())
		if len(s.Denials()) != 0 || len(docs.Docs[collDenied]) != 0 {
			t.Errorf("left: %v", s.Denials())
		}
		_, err := s.Deny(t.Context(), d)
		wantKind(t, err, hub.Invalid, "denial-ended")
	})
}

func TestDenyListIsBounded(t *testing.T) {
	t.Parallel()
	s := newStore(t, storetest.NewMemory(), newDirectory())
	for i := range maxDenied {
		s.denied[fmt.Sprint(i)] = hub.Denial{}
	}
	_, err := s.Deny(t.Context(), hub.Denial{Of: hub.DenyDevice, Value: string(lamp)})
	wantKind(t, err, hub.Exhausted, "denials-limit")
	_, err = s.Deny(t.Context(), hub.Denial{Of: hub.DenyDevice, Value: string(lamp), Reason: string(make([]byte, maxReason+1))})
	wantKind(t, err, hub.Invalid, "reason-too-long")
}

// What the store did not take holds until the next start: whoever is not to be let in does not stay for want of room.
func TestTroubleOfTheStoreLetsNobodyIn(t *testing.T) {
	t.Parallel()
	docs, dir := storetest.NewMemory(), newDirectory()
	s := newStore(t, docs, dir)
	signUp(t, s, lamp, alice)
	told := heard(s)
	docs.Fail = func(op, _, _ string) error {
		if op == "put" {
			return &hub.Error{Kind: hub.Exhausted}
		}
		return nil
	}
	wantKind(t, s.Disable(t.Context(), lamp, alice, "alice", ""), hub.Exhausted, "")
	wantKind(t, s.Denied(lamp, nil), hub.Denied, "device-disabled")
	_, err := s.Deny(t.Context(), hub.Denial{Of: hub.DenyDevice, Value: string(meter)})
	wantKind(t, err, hub.Exhausted, "")
	wantKind(t, s.Denied(meter, nil), hub.Denied, "device-denied")
	if len(*told) != 2 {
		t.Errorf("told %v", *told)
	}
	docs.Fail = nil
	if err := s.Enable(t.Context(), lamp, alice); err != nil {
		t.Fatal(err)
	}
	if err := s.Undeny(t.Context(), hub.DenyDevice, string(meter)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.Denied(lamp, nil), s.Denied(meter, nil)); err != nil {
		t.Error(err)
	}
}
