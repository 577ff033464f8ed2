package e2e_test

import (
	"context"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/bundle"
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
