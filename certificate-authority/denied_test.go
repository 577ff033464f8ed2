package certificateauthority

import (
	"context"
	"crypto/x509"
	"testing"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Nobody gets a certificate for a device that is not let in, not even an operator; not for one, either, that is removed while
// the certificate is made.
func TestNoCertificateForADeviceThatIsNotLetIn(t *testing.T) {
	o := newOffice(t)
	o.own[testDev] = refused
	_, err := o.sign("alice", testDev)
	wantCode(t, "sign", err, hub.Denied, "device-removed")
	_, err = o.IssueDevice(t.Context(), testDev, time.Hour, "", "root")
	wantCode(t, "issue", err, hub.Denied, "device-removed")
	if all := o.list(hub.CertificateFilter{All: true}); len(all) != 0 {
		t.Errorf("in the ledger: %+v", all)
	}

	o.own[testDev] = "alice"
	o.docs.Fail = func(op, collection, _ string) error {
		if op == "put" && collection == collCertificates && o.own[testDev] == "alice" {
			o.own[testDev] = refused // its removal looks for certificates before this one is there
		}
		return nil
	}
	_, err = o.IssueDevice(t.Context(), testDev, time.Hour, "", "root")
	wantCode(t, "removed meanwhile", err, hub.Denied, "device-removed")
	if all := o.list(hub.CertificateFilter{All: true}); len(all) != 1 || all[0].Revoked.IsZero() {
		t.Errorf("in the ledger: %+v", all)
	}
}

// TestHandOver: what former owners had signed ends, but for what the device came with; what is its owner's and what operators
// made stays.
func TestHandOver(t *testing.T) {
	o := newOffice(t)
	sign := func(owner hub.Owner) string {
		t.Helper()
		o.own[testDev] = owner
		c, err := o.sign(owner, testDev)
		if err != nil {
			t.Fatal(err)
		}
		return hub.SerialOf(c.SerialNumber)
	}
	lost, brought := sign("alice"), sign("alice")
	sign("bob")
	_, err := o.IssueDevice(t.Context(), testDev, time.Hour, "", "root")
	if err != nil {
		t.Fatal(err)
	}
	for i := range 2 { // once more changes nothing
		ended, err := o.HandOver(context.Background(), testDev, "bob", brought)
		if err != nil || len(ended) != 1-i {
			t.Fatalf("%+v, %v", ended, err)
		}
	}
	for _, c := range o.list(hub.CertificateFilter{All: true}) {
		gone := c.Serial == lost
		if !c.Revoked.IsZero() != gone || gone && c.Reason != hub.RevokedAffiliation {
			t.Errorf("%+v", c)
		}
	}
}

// Nobody enrols or renews by what is denied: the certificate that is shown, or a CA above it that the peer does not even send.
func TestNoEnrolmentByWhatIsDenied(t *testing.T) {
	for name, c := range map[string]struct {
		denied string
		by     func(*office, *factory) *x509.Certificate
	}{
		"a factory certificate": {"uuid:" + string(testDev), func(_ *office, f *factory) *x509.Certificate {
			return f.device("uuid:"+string(testDev), nil)
		}},
		"a factory's CA": {"factory root", func(_ *office, f *factory) *x509.Certificate { return f.device("uuid:"+string(testDev), nil) }},
		"our own root": {"", func(o *office, _ *factory) *x509.Certificate {
			id, err := o.IssueDevice(t.Context(), testDev, time.Hour, "", "root")
			if err != nil {
				t.Fatal(err)
			}
			return firstOf(t, id.Chain)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			o, f := newOffice(t), newFactory(t)
			o.group(f, nil)
			cert := c.by(o, f)
			if err := o.Vouch(t.Context(), []*x509.Certificate{cert}); err != nil {
				t.Fatal(err)
			}
			if c.denied == "" {
				c.denied = o.Anchors()[0].Subject.CommonName
			}
			o.own[hub.DeviceID(c.denied)] = refused
			wantCode(t, "handshake", o.Vouch(t.Context(), []*x509.Certificate{cert}), hub.Denied, "ca-denied")
			_, err := o.enrol(shown(cert), "uuid:"+string(testDev))
			wantCode(t, "enrolment", err, hub.Denied, "ca-denied")
		})
	}
}

// A device that was removed does not enrol again by itself.
func TestRemovedDeviceDoesNotEnrol(t *testing.T) {
	o, f := newOffice(t), newFactory(t)
	o.group(f, nil)
	o.own[testDev] = refused
	_, err := o.enrol(shown(f.device("uuid:"+string(testDev), nil)), "uuid:"+string(testDev))
	wantCode(t, "enrolment", err, hub.Denied, "device-removed")
}
