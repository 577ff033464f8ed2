package main

import (
	"fmt"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
)

func newOnboard(p process) *cobra.Command {
	var q bundle.OnboardRequest
	var out string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "onboard (--device-id ID | --any-device)",
		Short: "Make what a device needs to sign up",
		Long: "onboard makes what a device needs to sign up: where the hub is, whom to trust, and a code that lives 15 minutes and\n" +
			"works once, or where another provider gives such codes. With --out it also writes an identity certificate and prints\n" +
			"command lines that use it.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case (q.DeviceID == "") == !q.AnyDevice:
				return usage("exactly one of --device-id and --any-device is needed")
			case out != "" && q.AnyDevice:
				return usage("--out needs --device-id: a certificate names its device")
			case q.PSK && q.AnyDevice:
				return usage("--psk needs --device-id: a pre-shared key is of one device")
			}
			q.Certificate = out != ""
			c, err := control(cmd)
			if err != nil {
				return err
			}
			if out != "" { // the hub forgets the device's former key as soon as it makes another
				if err := makeFolder(out); err != nil {
					return err
				}
			}
			o, err := c.Onboard(cmd.Context(), q)
			if err != nil {
				return err
			}
			if o.Identity != nil {
				if err := writeIdentity(out, *o.Identity); err != nil {
					return err
				}
				o.Identity.Key = "" // it is in the folder; nobody wants it in a log
			}
			if asJSON {
				return printJSON(p.out, struct {
					bundle.Onboarding
					Identity any    `json:"identity,omitempty"`
					Out      string `json:"out,omitempty"`
				}{Onboarding: o, Out: out})
			}
			return printOnboarding(p, o, out)
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.DeviceID, "device-id", "", "the device's ID, a UUID")
	f.BoolVar(&q.AnyDevice, "any-device", false, "the code is good for any device")
	f.StringVar(&q.Owner, "owner", "", "account that will own the device (default the first administrator)")
	f.BoolVar(&q.PSK, "psk", false, "a pre-shared key for DTLS, too; the device's former one is worth nothing then")
	f.StringVar(&out, "out", "", "folder for cert.pem, key.pem and ca.pem")
	f.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func printOnboarding(p process, o bundle.Onboarding, out string) error {
	t := newTable(p.out, "hub", o.HubID)
	for _, uri := range []string{o.Endpoints.CoAPSTCP, o.Endpoints.CoAPS, o.Endpoints.CoAPTCP, o.Endpoints.CoAP, o.Endpoints.CoAPSWS, o.Endpoints.CoAPWS} {
		if uri != "" {
			t.row("endpoint", uri)
		}
	}
	if o.DeviceID != "" {
		t.row("device", o.DeviceID)
	}
	t.row("owner", o.Owner)
	t.row("provider", o.AuthorizationProvider)
	if o.AuthorizeURL != "" {
		t.row("authorize", o.AuthorizeURL)
	} else {
		t.row("code", o.AuthorizationCode)
		t.row("good until", o.ExpiresAt.Local().Format(time.DateTime))
	}
	if o.PSK != "" {
		t.row("psk identity", o.PSKIdentity)
		t.row("psk", o.PSK)
	}
	if err := t.end(); err != nil {
		return err
	}
	if o.AuthorizeURL != "" {
		if _, err := fmt.Fprint(p.out, `
to sign up, open the authorize address in a browser and sign in there: the address that it ends at has a code. The device
signs up with that code and the provider's name above.
`); err != nil {
			return err
		}
	}
	if o.PSK != "" {
		if _, err := fmt.Fprintf(p.out, `
libcoap, ask for the hub's time with the pre-shared key:
  coap-client-openssl -m get -u %s -k %s '%s/x.plgd.dev/time'
`, o.PSKIdentity, quote(o.PSK), o.Endpoints.CoAPS); err != nil {
			return err
		}
	}
	if o.PSK != "" && o.AuthorizationCode != "" {
		if _, err := fmt.Fprintf(p.out, `
the simulator, sign up, publish and notify:
  coaphub simulate --device-id %s --key %s --code %s --server '%s'
`, o.DeviceID, quote(o.PSK), o.AuthorizationCode, o.Endpoints.CoAPS); err != nil {
			return err
		}
	}
	if out == "" {
		_, err := fmt.Fprint(p.out, "\n", o.CA)
		return err
	}
	return printRecipes(p, o, out)
}

// printRecipes writes command lines that work as they stand, and the body of a sign-up for one of them. Without a code there are
// none for the sign-up.
func printRecipes(p process, o bundle.Onboarding, out string) error {
	u, err := url.Parse(o.Endpoints.CoAPSTCP)
	if err != nil {
		return fmt.Errorf("the hub's endpoint: %w", err)
	}
	wrote, body := "cert.pem, key.pem and ca.pem", filepath.Join(out, "signup.cbor")
	if o.AuthorizationCode != "" {
		// libcoap's client reads bodies from a file. The code is a secret for 15 minutes.
		text, err := cbor.Marshal(map[string]string{"di": o.DeviceID, "accesstoken": o.AuthorizationCode, "authprovider": o.AuthorizationProvider})
		if err != nil {
			return fmt.Errorf("encode the sign-up: %w", err)
		}
		if err := writeFile(body, text, 0o600); err != nil {
			return err
		}
		wrote = "cert.pem, key.pem, ca.pem and signup.cbor"
	}
	if _, err := fmt.Fprintf(p.out, "\nwrote %s to %s\n", wrote, out); err != nil {
		return err
	}
	if o.Endpoints.CoAPSTCP == "" { // a hub without TLS has no use for the certificate
		return nil
	}
	at := func(name string) string { return quote(filepath.Join(out, name)) }
	if _, err := fmt.Fprintf(p.out, `
libcoap, ask for the hub's time:
  coap-client-openssl -m get -c %s -j %s -R %s 'coaps+tcp://%s/x.plgd.dev/time'
`, at("cert.pem"), at("key.pem"), at("ca.pem"), u.Host); err != nil {
		return err
	}
	if o.Endpoints.CoAPS != "" {
		if _, err := fmt.Fprintf(p.out, `
libcoap, the same over DTLS:
  coap-client-openssl -m get -c %s -j %s -R %s '%s/x.plgd.dev/time'
`, at("cert.pem"), at("key.pem"), at("ca.pem"), o.Endpoints.CoAPS); err != nil {
			return err
		}
	}
	if o.AuthorizationCode == "" {
		return nil
	}
	_, err = fmt.Fprintf(p.out, `
libcoap, sign up (the answer has the device's tokens):
  coap-client-openssl -m post -t 60 -A 50 -c %s -j %s -R %s -f %s 'coaps+tcp://%s/oic/sec/account'

the simulator, sign up, publish and notify:
  coaphub simulate --device-id %s --cert %s --code %s --server '%s'

iotivity-lite's cloud_server (name, code, hub's address, hub's ID, provider):
  cloud_server lamp '%s' '%s' %s %s
`, at("cert.pem"), at("key.pem"), at("ca.pem"), quote(body), u.Host,
		o.DeviceID, quote(out), o.AuthorizationCode, o.Endpoints.CoAPSTCP,
		o.AuthorizationCode, o.Endpoints.CoAPSTCP, o.HubID, o.AuthorizationProvider)
	return err
}

// quote makes one word of a text for a POSIX shell.
func quote(s string) string {
	if s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !strings.ContainsRune("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_./:@%+=,", r)
	}) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
