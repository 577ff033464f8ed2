package main

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

// accessCommands are what an operator does to a device over the socket, whosever it is.
func accessCommands(p process) []*cobra.Command {
	var reason string
	var asJSON bool
	one := func(use, short, long string, do func(*cobra.Command, *bundle.Control, string) (bundle.DeviceAccess, error)) *cobra.Command {
		cmd := &cobra.Command{
			Use: use + " DEVICE", Short: short, Long: long, Args: exactly(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				id, err := deviceArg(args[0])
				if err != nil {
					return err
				}
				c, err := control(cmd)
				if err != nil {
					return err
				}
				a, err := do(cmd, c, id)
				if err == nil && asJSON {
					return printJSON(p.out, a)
				}
				if err == nil {
					err = printAccess(p, a)
				}
				return err
			},
		}
		cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
		return cmd
	}
	because := func(cmd *cobra.Command) *cobra.Command {
		cmd.Flags().StringVar(&reason, "reason", "", "why, for those who wonder later")
		return cmd
	}
	return []*cobra.Command{
		one("access", "Show whether the hub lets a device in", "", func(cmd *cobra.Command, c *bundle.Control, id string) (bundle.DeviceAccess, error) {
			return c.Access(cmd.Context(), id)
		}),
		because(one("disable", "Keep a device out: its session ends, and commands for it are refused",
			"disable keeps a device out until it is enabled again. It stays its owner's, who can read what it said before, and enable it.\n"+
				"To keep a device out whatever its owner wants, see coaphub deny.",
			func(cmd *cobra.Command, c *bundle.Control, id string) (bundle.DeviceAccess, error) {
				return c.DisableDevice(cmd.Context(), id, reason)
			})),
		newQuarantine(p, &asJSON, because(one("add", "Put a device into quarantine: commands for it are refused, and what it writes is kept apart",
			"add has a device's session end. It may come back, also in two places at once, and says what it has to say; but nothing of that is\n"+
				"in its twin, and commands for it are refused, until coaphub devices enable.",
			func(cmd *cobra.Command, c *bundle.Control, id string) (bundle.DeviceAccess, error) {
				return c.QuarantineDevice(cmd.Context(), id, reason)
			}))),
		one("enable", "Let a device in again that was disabled or removed, or end its quarantine",
			"enable ends what disable, remove and quarantine add began. What was kept of a device in quarantine is forgotten; it signs in\n"+
				"anew and reports what it has.", func(cmd *cobra.Command, c *bundle.Control, id string) (bundle.DeviceAccess, error) {
				return c.EnableDevice(cmd.Context(), id)
			}),
		because(one("remove", "Delete a device: its session ends, and it does not come back by itself",
			"remove takes a device from its owner, with all that the hub knows of it but its history. Its certificates, pre-shared key and\n"+
				"tokens are worth nothing any more (identityStore.revokeAtRemoval). It signs up again once it is onboarded anew.",
			func(cmd *cobra.Command, c *bundle.Control, id string) (bundle.DeviceAccess, error) {
				return c.RemoveDevice(cmd.Context(), id, reason)
			})),
	}
}

func printAccess(p process, a bundle.DeviceAccess) error {
	t := newTable(p.out, "device", a.DeviceID)
	t.row("access", string(a.State))
	for _, r := range [][2]string{{"by", a.User}, {"reason", a.Reason}} {
		if r[1] != "" {
			t.row(r[0], r[1])
		}
	}
	if !a.Since.IsZero() {
		t.row("since", a.Since.Local().Format(time.DateTime))
	}
	if !a.Until.IsZero() {
		t.row("until", a.Until.Local().Format(time.DateTime))
	}
	return t.end()
}

func newDeny(p process) *cobra.Command {
	var asJSON bool
	var reason, lasts, issuer string
	const what = "WHAT is device, key, certificate or ca. VALUE is a device ID, a SHA-256 in hexadecimal, or a file with a certificate (PEM):\n" +
		"of a key or ca the SHA-256 of its SubjectPublicKeyInfo (of a ca also that of its certificate), of a certificate that of\n" +
		"itself. With --issuer, the PEM file of a CA's certificate, VALUE is the serial number of one that this CA signed."
	entry := func(args []string) (hub.Denial, error) {
		value, err := denialValue(hub.DenialOf(args[0]), args[1], issuer)
		if err != nil {
			return hub.Denial{}, err
		}
		d, err := hub.ParseDenial(hub.DenialOf(args[0]), value)
		if err != nil {
			_, text := hub.Public(err)
			return d, usage("%s", text)
		}
		return d, nil
	}
	list := &cobra.Command{
		Use: "list", Short: "List what is denied", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			ds, err := c.Denials(cmd.Context())
			return printDenials(p, ds, err, asJSON)
		},
	}
	add := &cobra.Command{
		Use: "add WHAT VALUE", Short: "Deny something: who comes with it is not let in, and who is in goes", Long: "add puts an entry on the deny list. " + what,
		Example: "  coaphub deny add device 6ba7b810-9dad-41d1-80b4-00c04fd430c8 --reason \"stolen, case 42\"\n" +
			"  coaphub deny add ca factory.pem --reason \"key leaked\" --for 30d",
		Args: exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := entry(args)
			if err != nil {
				return err
			}
			d.Reason = reason
			if lasts != "" {
				long, err := conf.ParseDuration(lasts)
				if err != nil || long <= 0 {
					return usage("--for: a time is needed, such as 30d")
				}
				d.Until = time.Now().Add(long).UTC()
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			d, err = c.Deny(cmd.Context(), d)
			if err == nil && asJSON {
				return printJSON(p.out, d)
			}
			return printDenials(p, []bundle.Denial{d}, err, false)
		},
	}
	add.Flags().StringVar(&reason, "reason", "", "why, for those who wonder later")
	add.Flags().StringVar(&lasts, "for", "", "how long, such as 30d; otherwise until it is removed")
	remove := &cobra.Command{
		Use: "remove WHAT VALUE", Short: "Take something off the deny list", Long: "remove takes an entry off the deny list. " + what, Args: exactly(2),
		RunE: func(cmd *cobra.Command, args []string) error {
			d, err := entry(args)
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			if err := c.Undeny(cmd.Context(), d.Of, d.Value); err != nil || !asJSON {
				return err
			}
			return printJSON(p.out, struct{}{})
		},
	}
	for _, cmd := range []*cobra.Command{list, add, remove} {
		cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	}
	for _, cmd := range []*cobra.Command{add, remove} {
		cmd.Flags().StringVar(&issuer, "issuer", "", "the `FILE` of the CA's certificate whose serial number VALUE is")
	}
	return group("deny", "The deny list: devices, keys, certificates and CAs that the hub lets nobody in with", list, add, remove)
}

// denialValue takes what is denied from a certificate, if value is a file with one.
func denialValue(of hub.DenialOf, value, issuer string) (string, error) {
	sum := func(b []byte) string { s := sha256.Sum256(b); return hex.EncodeToString(s[:]) }
	if issuer != "" {
		ca, err := certificateIn(issuer)
		if err != nil {
			return "", err
		}
		return sum(ca.RawSubjectPublicKeyInfo) + "/" + value, nil
	}
	if _, err := os.Stat(value); err != nil || of == hub.DenyDevice {
		return value, nil
	}
	c, err := certificateIn(value)
	switch {
	case err != nil:
		return "", err
	case of == hub.DenyCertificate:
		return sum(c.Raw), nil
	}
	return sum(c.RawSubjectPublicKeyInfo), nil
}

// certificateIn reads the first certificate of a file.
func certificateIn(file string) (*x509.Certificate, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, usage("%s", err)
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, usage("%s holds no certificate (PEM)", file)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, usage("%s: %s", file, err)
	}
	return c, nil
}

func printDenials(p process, ds []bundle.Denial, err error, asJSON bool) error {
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, ds)
	}
	t := newTable(p.out, "WHAT", "VALUE", "SINCE", "UNTIL", "BY", "REASON")
	for _, d := range ds {
		until := ""
		if !d.Until.IsZero() {
			until = d.Until.Local().Format(time.DateTime)
		}
		t.row(string(d.Of), d.Value, d.Since.Local().Format(time.DateTime), until, d.User, strings.TrimSpace(d.Reason))
	}
	if len(ds) == 0 {
		t.note = "nothing is denied"
	}
	return t.finish(p.err, nil)
}
