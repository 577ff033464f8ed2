package main

import (
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

func newCerts(p process) *cobra.Command {
	var q bundle.CertificatesRequest
	var asJSON bool
	filters := func(cmd *cobra.Command) {
		cmd.Flags().StringVar(&q.DeviceID, "device-id", "", "only those of this device")
		cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	}
	list := &cobra.Command{
		Use:   "list",
		Short: "List the certificates of devices, newest first",
		Long: "list shows the ledger of the hub's device authority: each certificate that it has signed, until 90 days after its end.\n" +
			"Certificates of other authorities are not in it.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			cs, err := c.Certificates(cmd.Context(), q)
			return printCertificates(p, cs, err, asJSON, "there is no certificate")
		},
	}
	filters(list)
	list.Flags().StringVar(&q.Owner, "owner", "", "only those that were signed for this owner")
	list.Flags().IntVar(&q.Limit, "limit", 1000, "at most so many, up to 10000")
	show := &cobra.Command{
		Use:   "show SERIAL",
		Short: "Show a certificate: what the ledger knows, and the certificate (PEM)",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			serial, err := serialArg(args[0])
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			cs, err := c.Certificates(cmd.Context(), bundle.CertificatesRequest{Serials: []string{serial}, PEM: true})
			switch {
			case err != nil:
				return err
			case len(cs) == 0:
				return hub.NewError(hub.NotFound, "certificate-unknown", "there is no certificate with this serial; coaphub certs list shows those there are")
			case asJSON:
				return printJSON(p.out, cs[0])
			}
			if err := printCertificates(p, cs, nil, false, ""); err != nil {
				return err
			}
			_, err = io.WriteString(p.out, cs[0].PEM)
			return err
		},
	}
	show.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	revoke := &cobra.Command{
		Use:   "revoke [SERIAL...]",
		Short: "Revoke certificates: nobody comes in with them any more, and who is in goes",
		Long: "revoke ends certificates before their time, those that are named or all of a device. Sessions that stand on them end, they let\n" +
			"nobody in any more, and they are on the revocation list. It cannot be taken back: the device needs another certificate.",
		Example: "  coaphub certs revoke 5f0c2a… --reason keyCompromise\n  coaphub certs revoke --device-id 7c9…",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 && q.DeviceID == "" {
				return usage("name certificates, or a device by --device-id")
			}
			for _, arg := range args {
				serial, err := serialArg(arg)
				if err != nil {
					return err
				}
				q.Serials = append(q.Serials, serial)
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			cs, err := c.RevokeCertificates(cmd.Context(), q)
			if err == nil && len(cs) == 0 { // what was revoked before is shown as it is: a script may come again
				cs, err = c.Certificates(cmd.Context(), q)
				cs = slices.DeleteFunc(cs, func(c bundle.Certificate) bool { return c.Revoked == nil })
			}
			if err == nil && len(cs) == 0 {
				return hub.NewError(hub.NotFound, "certificate-unknown", "none of these certificates was good; coaphub certs list shows those there are")
			}
			return printCertificates(p, cs, err, asJSON, "")
		},
	}
	filters(revoke)
	revoke.Flags().StringVar(&q.Reason, "reason", "unspecified", "unspecified, keyCompromise, affiliationChanged, superseded or cessationOfOperation (RFC 5280, 5.3.1)")
	var within string
	report := &cobra.Command{
		Use:   "report",
		Short: "Report which devices need a certificate soon, and which share a key",
		Long: "report counts the certificates of devices, and lists those whose last good certificate ends soon, and those that share their key\n" +
			"with another device: whoever has one of them can be all of them.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			soon, err := conf.ParseDuration(within)
			if err != nil || soon < 0 {
				return usage("--within: a time is needed, such as 30d")
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			r, err := c.CertificateReport(cmd.Context(), bundle.ReportRequest{Within: soon})
			if err == nil && asJSON {
				return printJSON(p.out, r)
			}
			if err == nil {
				err = printReport(p, r, within)
			}
			return err
		},
	}
	report.Flags().StringVar(&within, "within", "30d", "what ends in this time ends soon")
	report.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	return group("certs", "The certificates of devices that the hub has signed", list, show, revoke, report)
}

func printReport(p process, r bundle.CertificateReport, within string) error {
	_, _ = fmt.Fprintf(p.out, "good %d  ended %d  revoked %d  end within %s %d  shared keys %d\n", r.Good, r.Ended, r.Revoked, within, r.Expires, r.SharedKeys)
	if len(r.Expiring)+len(r.Shared) == 0 {
		return nil
	}
	t := newTable(p.out, "WHAT", "DEVICE", "SERIAL", "UNTIL")
	for _, c := range r.Expiring {
		t.row("ends soon", c.DeviceID, c.Serial, c.NotAfter.Local().Format(time.DateTime))
	}
	for _, c := range r.Shared {
		t.row("key "+c.Key, c.DeviceID, c.Serial, c.NotAfter.Local().Format(time.DateTime))
	}
	return t.finish(p.err, nil)
}

// serialArg takes a serial as other programs print it, too: in capitals, with colons.
func serialArg(s string) (string, error) {
	serial, err := hub.ParseSerial(s)
	if err != nil {
		return "", usage("%q is no serial number in hexadecimal", s)
	}
	return serial, nil
}

func printCertificates(p process, cs []bundle.Certificate, err error, asJSON bool, none string) error {
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, cs)
	}
	t := newTable(p.out, "SERIAL", "DEVICE", "OWNER", "REQUESTED", "SINCE", "UNTIL", "STATE")
	for _, c := range cs {
		state := "good"
		switch now := time.Now(); {
		case c.Revoked != nil:
			state = fmt.Sprintf("revoked %s: %s", c.Revoked.Local().Format(time.DateTime), c.Reason)
		case now.After(c.NotAfter):
			state = "ended"
		}
		by := c.Method
		if c.User != "" {
			by += " by " + c.User
		}
		t.row(c.Serial, c.DeviceID, c.Owner, by, c.NotBefore.Local().Format(time.DateOnly), c.NotAfter.Local().Format(time.DateOnly), state)
	}
	if len(cs) == 0 {
		t.note = none
	}
	return t.finish(p.err, nil)
}
