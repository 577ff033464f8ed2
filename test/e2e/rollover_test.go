package e2e_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/test/device"
	"github.com/coaphub/coaphub/test/hubtest"
)

// TestAuthorityRollsOver: while devices are in, the hub gets another issuing key, the former one is retired, and the same happens to
// the root. A device goes out when what vouches for it is retired and not before, comes in with what came after as the device it
// was, and believes the hub by either root.
func TestAuthorityRollsOver(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(tr.config()...))
			a := application(t, h)
			early, late := deviceID(1), deviceID(2)
			cfg := simulation(t, h, tr, early)
			live := func(id string, from hubtest.Onboarding, ca string, creds device.Credentials) (d *device.Device, leave func()) {
				t.Helper()
				cfg.ID = id
				var err error
				if cfg.TLS, err = device.TLS([]byte(ca), []byte(from.Identity.Chain), []byte(from.Identity.Key), h.ID); err != nil {
					t.Fatal(err)
				}
				if d, err = device.New(cfg); err != nil {
					t.Fatal(err)
				}
				d.SetCredentials(creds)
				ctx, cancel := context.WithCancel(t.Context())
				ended := make(chan error, 1)
				go func() { ended <- d.Run(ctx, func(context.Context) (string, error) { return h.Code(t, id), nil }) }()
				return d, func() { cancel(); <-ended }
			}
			in := func(id string) {
				t.Helper()
				a.until(id+" to be in sync", func() bool { return a.twin(id) == "ONLINE IN_SYNC" })
			}
			roll := func(step string) (is []bundle.AuthorityPart) {
				t.Helper()
				is, err := h.Control.Roll(t.Context(), bundle.RollRequest{Which: "device", Step: step})
				if err != nil {
					t.Fatal(err)
				}
				return is
			}
			retire := func(kind string) {
				t.Helper()
				all, err := h.Control.Authorities(t.Context())
				if err != nil {
					t.Fatal(err)
				}
				for _, p := range all {
					if p.Root == "device" && p.Kind == kind && p.State == "believed" {
						if _, err := h.Control.Retire(t.Context(), p.ID, ""); err != nil {
							t.Fatal(err)
						}
					}
				}
			}
			// swap has what vouches for the early device taken back, and gives it another certificate; the late one notices nothing.
			swap := func(kind string, before *device.Device, leave func()) (*device.Device, func()) {
				t.Helper()
				if a.twin(early) != "ONLINE IN_SYNC" {
					t.Errorf("the %s that was in use is believed, and the device is %s", kind, a.twin(early))
				}
				retire(kind)
				a.until("the device to be gone", func() bool { return strings.HasPrefix(a.twin(early), "OFFLINE") })
				leave()
				o := h.Onboard(t, early)
				d, leave := live(early, o, o.CA, before.Credentials())
				in(early)
				if d.Credentials().UID != before.Credentials().UID || a.twin(late) != "ONLINE IN_SYNC" {
					t.Errorf("the %s: another noticed it: %s", kind, a.twin(late))
				}
				return d, leave
			}

			first := h.Onboard(t, early)
			d, leave := live(early, first, first.CA, device.Credentials{})
			in(early)
			roll("issuing")
			o := h.Onboard(t, late)
			l, leaveLate := live(late, o, first.CA, device.Credentials{}) // knows the root of before only
			in(late)
			d, leave = swap("issuing", d, leave)

			roll("root")
			o = h.Onboard(t, late)
			oldRoot, newRoot, ok := strings.Cut(strings.TrimSpace(o.CA), "-----END CERTIFICATE-----\n")
			oldRoot += "-----END CERTIFICATE-----\n"
			if !ok || oldRoot != first.CA || strings.Count(newRoot, "BEGIN CERTIFICATE") != 1 {
				t.Fatalf("an onboarding does not give both roots, that in use first: %s", o.CA)
			}
			roll("finish")
			o = h.Onboard(t, late)
			gone := func() {
				t.Helper()
				leaveLate()
				a.until("it to be gone", func() bool { return strings.HasPrefix(a.twin(late), "OFFLINE") })
			}
			gone()
			l, leaveLate = live(late, o, oldRoot, l.Credentials()) // a certificate under the new root, and knows the former one only
			in(late)
			gone()
			_, leaveLate = live(late, o, newRoot, l.Credentials())
			in(late)
			_, leave = swap("root", d, leave)
			leave()
			leaveLate()
		})
	}
}

// TestStolenIssuingKey: an issuing key that somebody else has is worth nothing at once, also while the root's key is far away: one that
// signed before by retiring it, one that signs now by the deny list. Who verifies devices by the root's revocation list, which he finds
// by the issuing certificate alone, learns of it when the key is brought.
func TestStolenIssuingKey(t *testing.T) {
	t.Parallel()
	for _, tr := range []transport{transportOf("tls"), transportOf("dtls")} {
		t.Run(tr.name, func(t *testing.T) {
			t.Parallel()
			h := hubtest.Start(t, hubtest.WithConfig(append(tr.config(), "grpcGateway.api.http.tls=true")...))
			ctx := t.Context()
			id := deviceID(1)
			online := func() int {
				t.Helper()
				s, err := h.Control.Status(ctx)
				if err != nil {
					t.Fatal(err)
				}
				return s.Online
			}
			comes := func() (o hubtest.Onboarding, issuing *x509.Certificate, leave func()) {
				t.Helper()
				o = h.Onboard(t, id)
				cfg := simulation(t, h, tr, id)
				var err error
				if cfg.TLS, err = device.TLS([]byte(o.CA), []byte(o.Identity.Chain), []byte(o.Identity.Key), h.ID); err != nil {
					t.Fatal(err)
				}
				leave = lives(t, cfg, o.Code)
				if !eventually(ctx, 20*time.Second, func() bool { return online() == 1 }) {
					t.Fatal("the device does not come")
				}
				_, rest := pem.Decode([]byte(o.Identity.Chain))
				block, _ := pem.Decode(rest)
				if issuing, err = x509.ParseCertificate(block.Bytes); err != nil {
					t.Fatal(err)
				}
				return o, issuing, leave
			}
			gone := func(why string) {
				t.Helper()
				if !eventually(ctx, 20*time.Second, func() bool { return online() == 0 }) {
					t.Fatalf("%s: the device stays", why)
				}
				// It tries to come again, in vain.
				since := time.Now()
				if !eventually(ctx, 30*time.Second, func() bool {
					refused, err := h.Control.Refused(ctx)
					return err == nil && slices.ContainsFunc(refused, func(r bundle.Refusal) bool { return r.Time.After(since) })
				}) {
					t.Errorf("%s: it is not turned away", why)
				}
				if online() != 0 {
					t.Errorf("%s: it is in", why)
				}
			}
			roots := x509.NewCertPool()
			text, err := h.Control.Root(ctx, "https")
			if err != nil || !roots.AppendCertsFromPEM([]byte(text)) {
				t.Fatal(err)
			}
			transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
			defer transport.CloseIdleConnections()
			// list fetches what a certificate leads to, and looks whether that is the root's.
			list := func(issuing *x509.Certificate, ca string) *x509.RevocationList {
				t.Helper()
				if len(issuing.CRLDistributionPoints) != 1 {
					t.Fatalf("the issuing certificate leads to %q", issuing.CRLDistributionPoints)
				}
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, issuing.CRLDistributionPoints[0], http.NoBody)
				if err != nil {
					t.Fatal(err)
				}
				resp, err := transport.RoundTrip(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				der, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != http.StatusOK || resp.Header.Get("Content-Type") != "application/pkix-crl" {
					t.Fatalf("%s %q %v", resp.Status, resp.Header.Get("Content-Type"), err)
				}
				l, err := x509.ParseRevocationList(der)
				if err != nil {
					t.Fatal(err)
				}
				block, _ := pem.Decode([]byte(ca))
				root, err := x509.ParseCertificate(block.Bytes)
				if err != nil {
					t.Fatal(err)
				}
				if err := l.CheckSignatureFrom(root); err != nil {
					t.Error(err)
				}
				return l
			}
			has := func(l *x509.RevocationList, c *x509.Certificate) bool {
				return slices.ContainsFunc(l.RevokedCertificateEntries, func(e x509.RevocationListEntry) bool { return e.SerialNumber.Cmp(c.SerialNumber) == 0 })
			}
			root := func(as []bundle.AuthorityPart) bundle.AuthorityPart {
				t.Helper()
				i := slices.IndexFunc(as, func(p bundle.AuthorityPart) bool { return p.Root == "device" && p.Kind == "root" })
				return as[i]
			}

			o, first, leave := comes()
			keys, err := h.Control.RootKeys(ctx, "device")
			if err != nil {
				t.Fatal(err)
			}
			if err := h.Control.ForgetRootKeys(ctx, "device", keys); err != nil {
				t.Fatal(err)
			}
			as, err := h.Control.Roll(ctx, bundle.RollRequest{Which: "device", Step: "issuing", RootKey: keys})
			if err != nil {
				t.Fatal(err)
			}
			before := list(first, o.CA)
			if p := root(as); p.ListLacks != 0 || p.ListUntil == nil || !p.ListUntil.Equal(before.NextUpdate) || has(before, first) {
				t.Errorf("before, the list until %v is told as %+v", before.NextUpdate, p)
			}
			former := as[slices.IndexFunc(as, func(p bundle.AuthorityPart) bool { return p.Root == "device" && p.State == "believed" })]
			if as, err = h.Control.Retire(ctx, former.ID, ""); err != nil {
				t.Fatal(err)
			}
			gone("retired")
			leave()
			if p, l := root(as), list(first, o.CA); p.ListLacks != 1 || has(l, first) {
				t.Errorf("without the key the list has %v and is told as %+v", l.RevokedCertificateEntries, p)
			}
			due := func() string {
				return regexp.MustCompile(`(?m)^coaphub_root_lists_due .*`).FindString((&app{t: t}).metrics(h))
			}
			if got := due(); got != "coaphub_root_lists_due 1" {
				t.Errorf("without the key the metric is %q", got)
			}
			if as, err = h.Control.Roll(ctx, bundle.RollRequest{Which: "device", Step: "list", RootKey: keys}); err != nil {
				t.Fatal(err)
			}
			if p, l := root(as), list(first, o.CA); p.ListLacks != 0 || !has(l, first) || l.Number.Cmp(before.Number) <= 0 {
				t.Errorf("with the key list %v behind %v has %v and is told as %+v", l.Number, before.Number, l.RevokedCertificateEntries, p)
			}

			if got := due(); got != "coaphub_root_lists_due 0" {
				t.Errorf("with the key the metric is %q", got)
			}

			o, second, _ := comes()
			if second.Equal(first) || has(list(second, o.CA), second) {
				t.Error("the issuing certificate is what it was, or on the list")
			}
			if _, err := h.Control.Deny(ctx, bundle.Denial{Of: hub.DenyCA, Value: sum(second.RawSubjectPublicKeyInfo)}); err != nil {
				t.Fatal(err)
			}
			gone("denied")
		})
	}
}
