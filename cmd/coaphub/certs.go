package main

import (
	"bufio"
	"cmp"
	"encoding/csv"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"slices"
	"strings"
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
	var search bundle.CertificatesRequest
	var since, until string
	var limit int
	searches := func(cmd *cobra.Command) {
		f := cmd.Flags()
		f.StringVar(&search.DeviceID, "device-id", "", "only those of this device")
		f.StringVar(&search.Owner, "owner", "", "only those that were signed for this owner")
		f.StringVar(&search.Name, "name", "", "only those of this common name")
		f.StringVar(&search.Method, "method", "", "only those that were requested in this way: csr, operator, unknown")
		f.StringVar(&search.State, "state", "", "only those that are good, ended or revoked")
		f.StringVar(&since, "since", "", "only what was made since: a duration such as 1h or 7d, or a time such as 2026-05-01T12:00:00Z")
		f.StringVar(&until, "until", "", "only what was made before, likewise")
	}
	times := func() (err error) {
		if since != "" {
			if search.Since, err = sinceTime("--since", since, time.Now()); err != nil {
				return err
			}
		}
		if until != "" {
			search.Until, err = sinceTime("--until", until, time.Now())
		}
		return err
	}
	list := &cobra.Command{
		Use:   "list",
		Short: "List the certificates that the hub has signed, newest first",
		Long: "list shows the ledger: each certificate that the hub has signed for devices, applications and services, until 90 days after its\n" +
			"end. Certificates of other authorities are not in it.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := times(); err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			search.Limit = limit
			cs, err := c.Certificates(cmd.Context(), search)
			return printCertificates(p, cs, err, asJSON, "there is no certificate")
		},
	}
	searches(list)
	list.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	list.Flags().IntVar(&limit, "limit", 1000, "at most so many, up to 10000")
	var format string
	export := &cobra.Command{
		Use:   "export",
		Short: "Write the whole ledger, or what is looked for in it, for other programs",
		Long: "export writes all certificates that list would show, however many, in no order: one JSON object a line, or CSV with heads. When it\n" +
			"fails, what was written before is not all.",
		Example: "  coaphub certs export --format csv > certificates.csv\n  coaphub certs export --state revoked --since 30d",
		Args:    none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if format != "jsonl" && format != "csv" {
				return usage("--format: jsonl or csv")
			}
			if err := times(); err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			return exportCertificates(p.out, c.ExportCertificates(cmd.Context(), search), format, search.PEM)
		},
	}
	searches(export)
	export.Flags().StringVar(&format, "format", "jsonl", "jsonl or csv")
	export.Flags().BoolVar(&search.PEM, "pem", false, "with the certificates themselves")
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
	return group("certs", "The certificates that the hub has signed", list, show, export, revoke, report)
}

// exportCertificates writes certificates as they come.
func exportCertificates(w io.Writer, cs iter.Seq2[bundle.Certificate, error], format string, withPEM bool) (err error) {
	out := bufio.NewWriter(w)
	defer func() { err = errors.Join(err, out.Flush()) }()
	if format == "jsonl" {
		enc := json.NewEncoder(out)
		enc.SetEscapeHTML(false)
		for c, err := range cs {
			if err != nil {
				return err
			}
			if err := enc.Encode(c); err != nil {
				return err
			}
		}
		return nil
	}
	rows := csv.NewWriter(out)
	defer rows.Flush() // before out's
	heads := []string{
		"serial", "deviceId", "commonName", "profile", "owner", "requestMethod", "requestedBy", "publicKey", "issuerId", "created", "notBefore",
		"notAfter", "revoked", "reason", "termsVersion", "termsAcceptedBy",
	}
	if withPEM {
		heads = append(heads, "pem")
	}
	if err := rows.Write(heads); err != nil {
		return err
	}
	at := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	for c, err := range cs {
		if err != nil {
			return err
		}
		row := []string{
			c.Serial, c.DeviceID, c.Name, c.Profile, c.Owner, c.Method, c.User, c.Key, c.Issuer, at(c.Created), at(c.NotBefore), at(c.NotAfter), "", c.Reason, "", "",
		}
		if c.Terms != nil {
			row[14], row[15] = c.Terms.Version, c.Terms.User
		}
		if c.Revoked != nil {
			row[12] = at(*c.Revoked)
		}
		if withPEM {
			row = append(row, c.PEM)
		}
		if err := rows.Write(row); err != nil {
			return err
		}
	}
	return nil
}

func printReport(p process, r bundle.CertificateReport, within string) error {
	_, _ = fmt.Fprintf(p.out, "good %d  ended %d  revoked %d  end within %s %d  shared keys %d  weak keys %d\n",
		r.Good, r.Ended, r.Revoked, within, r.Expires, r.SharedKeys, r.WeakKeys)
	for _, kind := range slices.Sorted(maps.Keys(r.Keys)) {
		_, _ = fmt.Fprintf(p.out, "keys of %s: %d\n", kind, r.Keys[kind])
	}
	for _, s := range r.Sessions {
		how := strings.TrimSpace(s.TLS + " " + s.Suite)
		if how == "" {
			how = "no encryption"
		}
		if s.Old {
			how += " (old)"
		}
		_, _ = fmt.Fprintf(p.out, "sessions with %s: %d\n", how, s.Sessions)
	}
	if len(r.Expiring)+len(r.Shared)+len(r.Weak) == 0 {
		return nil
	}
	t := newTable(p.out, "WHAT", "DEVICE", "SERIAL", "UNTIL")
	for _, c := range r.Expiring {
		t.row("ends soon", c.DeviceID, c.Serial, c.NotAfter.Local().Format(time.DateTime))
	}
	for _, c := range r.Shared {
		t.row("key "+c.Key, c.DeviceID, c.Serial, c.NotAfter.Local().Format(time.DateTime))
	}
	for _, c := range r.Weak {
		t.row("weak key", c.DeviceID, c.Serial, c.NotAfter.Local().Format(time.DateTime))
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
	t := newTable(p.out, "SERIAL", "DEVICE OR NAME", "OWNER", "REQUESTED", "SINCE", "UNTIL", "STATE")
	for _, c := range cs {
		state := c.State(time.Now())
		if c.Revoked != nil {
			state = fmt.Sprintf("revoked %s: %s", c.Revoked.Local().Format(time.DateTime), c.Reason)
		}
		by := c.Method
		if c.User != "" {
			by += " by " + c.User
		}
		t.row(c.Serial, cmp.Or(c.DeviceID, c.Name), c.Owner, by, c.NotBefore.Local().Format(time.DateOnly), c.NotAfter.Local().Format(time.DateOnly), state)
	}
	if len(cs) == 0 {
		t.note = none
	}
	return t.finish(p.err, nil)
}
