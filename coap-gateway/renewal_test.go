package coapgateway

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/plgd-dev/go-coap/v3/message"
	"github.com/plgd-dev/go-coap/v3/message/codes"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/coaphub/coaphub/hub"
)

// registrar gives everybody the certificate that it has.
type registrar struct {
	at   time.Time // of RenewAt
	ours bool
	out  hub.Enrolled
	err  error

	mu     sync.Mutex // guards what follows
	csrs   []string
	serial []string // of the certificates that were shown
}

func (r *registrar) RenewAt(*x509.Certificate) (time.Time, bool) { return r.at, r.ours }
func (r *registrar) Anchors() []*x509.Certificate                { return r.out.Chain }

func (r *registrar) Enrol(_ context.Context, proof hub.EnrolmentProof, csr []byte, renew bool) (hub.Enrolled, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !renew {
		return hub.Enrolled{}, errors.New("this is no renewal")
	}
	r.csrs = append(r.csrs, string(csr))
	r.serial = append(r.serial, hub.SerialOf(proof.Chain[0].SerialNumber))
	return r.out, r.err
}

func (r *registrar) asked() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.csrs)
}

// A device whose certificate nears its end is asked for a request once it is signed in, and gets the certificate into its
// credentials. Others are left alone.
func TestTheHubRenews(t *testing.T) {
	t.Parallel()
	const request = "-----BEGIN CERTIFICATE REQUEST-----"
	for name, c := range map[string]struct {
		at       time.Duration // from now
		foreign  bool
		csr      any
		cred     codes.Code
		err      error
		asks     bool
		outcome  string
		requests int
	}{
		"due":                                {at: -time.Minute, csr: request, cred: codes.Changed, asks: true, outcome: "ok", requests: 1},
		"due, a request in DER":              {at: -time.Minute, csr: []byte(request), cred: codes.Created, asks: true, outcome: "ok", requests: 1},
		"not due":                            {at: time.Hour, csr: request},
		"another authority's":                {at: -time.Minute, foreign: true, csr: request},
		"a device that has no such resource": {at: -time.Minute, asks: true, outcome: "refused"},
		"a device that takes no certificate": {at: -time.Minute, csr: request, cred: codes.Forbidden, asks: true, outcome: "refused", requests: 1},
		"a device that was refused": {
			at: -time.Minute, csr: request, err: hub.NewError(hub.Denied, "enrolment-refused", ""), asks: true, outcome: "failed", requests: 1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := &registrar{at: time.Now().Add(c.at), ours: !c.foreign, err: c.err}
			h := start(t, func(_ *Config, d *Deps) { d.Renewals = r })
			r.out = hub.Enrolled{Device: lampID, Serial: "0a", Chain: []*x509.Certificate{h.ca.cert}}
			d := h.device(lampID)
			if c.csr != nil {
				d.res[csrHref] = resource{format: hub.FormatOCFCBOR, body: cborOf(t, map[string]any{"csr": c.csr, "encoding": "oic.sec.encoding.pem"})}
			}
			if c.cred != 0 {
				d.res[credHref] = resource{code: c.cred}
			}
			h.connect(d, h.gw.Addresses().Secure, h.tlsFor(h.ca.identity(t, lampID, nil)))
			h.w.own(lampID, "alice")
			d.want(d.signIn(h.w.grant("token", hub.Claims{})), "2.04", "")
			if !c.asks {
				d.alive()
				if got := d.asks(); slices.ContainsFunc(got, func(s string) bool { return strings.Contains(s, csrHref) }) {
					t.Errorf("the hub asked %q", got)
				}
				return
			}
			h.w.await(t, "the renewal to be over", func() bool { return testutil.ToFloat64(h.gw.metrics.renewals.WithLabelValues("hub", c.outcome)) == 1 })
			if got := r.asked(); len(got) != c.requests || c.requests > 0 && got[0] != request {
				t.Errorf("the authority was asked %q", got)
			}
			if again := h.gw.renewals.aDayLater(); again != (c.outcome != "ok") {
				t.Errorf("a day later the device is asked again: %v", again)
			}
			if c.outcome == "ok" {
				d.mu.Lock()
				body := d.got[credHref]
				d.mu.Unlock()
				var creds credentials
				if err := decoding.Unmarshal(body, &creds); err != nil || len(creds.Creds) != 1 || creds.Creds[0].Subject != string(lampID) ||
					!strings.Contains(creds.Creds[0].Public.Data, strings.TrimSpace(h.ca.pem())) {
					t.Errorf("the device got %q, %v", body, err)
				}
			}
			d.alive()
		})
	}
}

// aDayLater looks through the sessions as if the last look were a day ago, and reports whether one is tried again.
func (r *renewals) aDayLater() (again bool) {
	for _, s := range r.gw.live.withCertificate() {
		r.mu.Lock()
		before := r.tried[s].Add(-renewalAgain)
		r.tried[s] = before
		r.mu.Unlock()
		r.watch(s)
		r.mu.Lock()
		again = again || !r.tried[s].Equal(before)
		r.mu.Unlock()
	}
	return again
}

// Devices that do not answer keep no other waiting.
func TestSilentDevicesHoldNoRenewalUp(t *testing.T) {
	t.Parallel()
	r := &registrar{ours: true, at: time.Now().Add(-time.Minute)}
	h := start(t, func(_ *Config, d *Deps) { d.Renewals = r })
	r.out = hub.Enrolled{Device: lampID, Serial: "0a", Chain: []*x509.Certificate{h.ca.cert}}
	signIn := func(id hub.DeviceID, csr resource) *device {
		d := h.device(id)
		d.res[csrHref], d.res[credHref] = csr, resource{code: codes.Changed}
		h.connect(d, h.gw.Addresses().Secure, h.tlsFor(h.ca.identity(t, id, nil)))
		h.w.own(id, "alice")
		d.want(d.signIn(h.w.grant("token"+string(id), hub.Claims{})), "2.04", "")
		return d
	}
	for i := range 40 {
		d := signIn(hub.DeviceID(fmt.Sprintf("5e1e0000-0000-4000-8000-%012d", i)), resource{silent: true})
		h.w.await(t, "a silent device to be asked", func() bool {
			return slices.ContainsFunc(d.asks(), func(s string) bool { return strings.Contains(s, csrHref) })
		})
	}
	signIn(lampID, resource{format: hub.FormatOCFCBOR, body: cborOf(t, map[string]any{"csr": "csr"})})
	h.w.await(t, "the renewal behind them", func() bool {
		return testutil.ToFloat64(h.gw.metrics.renewals.WithLabelValues("hub", "ok")) == 1
	})
	if n := testutil.ToFloat64(h.gw.metrics.renewals.WithLabelValues("hub", "unanswered")); n != 0 {
		t.Errorf("%v silent devices were given up first", n)
	}
}

// A device renews by itself over its connection, under the certificate of its handshake, signed in or not.
func TestADeviceRenews(t *testing.T) {
	t.Parallel()
	r := &registrar{ours: true, at: time.Now().Add(time.Hour)}
	h := start(t, func(_ *Config, d *Deps) { d.Renewals = r })
	r.out = hub.Enrolled{Device: lampID, Serial: "0a", Chain: []*x509.Certificate{h.ca.cert}}
	d := h.device(lampID)
	id := h.ca.identity(t, lampID, nil)
	h.connect(d, h.gw.Addresses().Secure, h.tlsFor(id))
	const sren = "/.well-known/est/sren"
	got := d.want(d.do(codes.POST, sren, []byte("csr"), format(hub.FormatCSR), accept(hub.FormatCert)), "2.04", "")
	if got.format != hub.FormatCert || !bytes.Equal(got.body, h.ca.cert.Raw) {
		t.Errorf("got %x in %d", got.body, got.format)
	}
	if r.asked()[0] != "csr" || r.serial[0] != hub.SerialOf(id.Leaf.SerialNumber) {
		t.Errorf("the authority was asked %q under %q", r.csrs, r.serial)
	}
	if got := d.want(d.do(codes.GET, "/.well-known/est/crts", nil), "2.05", ""); got.format != hub.FormatCertsOnly {
		t.Errorf("anchors in %d", got.format)
	}
	d.want(d.do(codes.GET, "/.well-known/est/att", nil), "2.05", "")
	d.want(d.do(codes.GET, "/.well-known/est/crts", nil, accept(50)), "4.06", "not-acceptable: ")
	d.want(d.do(codes.POST, sren, []byte("csr"), format(60)), "4.15", "format-unsupported: ")
	d.want(d.do(codes.GET, sren, nil), "4.05", "")
	r.err = hub.NewError(hub.Unauthenticated, "enrolment-unproven", "no")
	d.want(d.do(codes.POST, sren, []byte("csr"), format(hub.FormatCSR)), "4.03", "enrolment-unproven: ")
	r.err = hub.NewError(hub.Unavailable, "disk-full", "full")
	d.want(d.do(codes.POST, sren, []byte("csr"), format(hub.FormatCSR)), "5.03", "disk-full: ")
	d.alive()
	plain := h.plain(fanID)
	plain.want(plain.do(codes.POST, sren, []byte("csr"), format(hub.FormatCSR)), "4.03", "renewal-without-certificate: ")
	without := start(t, nil).plain(fanID)
	without.want(without.do(codes.POST, sren, []byte("csr"), format(hub.FormatCSR)), "4.04", "path-unknown: ")
	without.want(without.do(codes.GET, "/.well-known/est/crts", nil), "4.04", "path-unknown: ")
}

func format(f int32) option {
	return option{ID: message.ContentFormat, Value: uintOption(uint32(f))}
}
