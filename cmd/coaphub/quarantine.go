package main

import (
	"strconv"
	"strings"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/hub"
)

// newQuarantine are the commands about devices in quarantine; add is made by others.
func newQuarantine(p process, asJSON *bool, add *cobra.Command) *cobra.Command {
	list := &cobra.Command{
		Use: "list", Short: "List the devices in quarantine", Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			ds, err := c.Quarantine(cmd.Context())
			if err != nil {
				return err
			}
			if *asJSON {
				return printJSON(p.out, ds)
			}
			t := newTable(p.out, "DEVICE", "ACCESS", "SINCE", "BY", "WRITES", "DROPPED", "REASON")
			for _, d := range ds {
				t.row(d.DeviceID, string(d.State), d.Since.Local().Format(time.DateTime), d.User, strconv.Itoa(d.Writes),
					strconv.FormatUint(d.Dropped, 10), strings.TrimSpace(d.Reason))
			}
			if len(ds) == 0 {
				t.note = "no device is in quarantine"
			}
			return t.finish(p.err, nil)
		},
	}
	show := &cobra.Command{
		Use: "show DEVICE", Short: "Show what a device in quarantine wrote, and by which connections",
		Long: "show lists what is kept of a device, oldest first. SESSION and FROM tell one of two rivals from the other; CREDENTIAL is what\n" +
			"the connection has proven, of a certificate its SHA-256, as coaphub deny add certificate takes it.",
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			id, err := deviceArg(args[0])
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			k, err := c.Kept(cmd.Context(), id)
			if err != nil {
				return err
			}
			if *asJSON {
				return printJSON(p.out, k)
			}
			t := newTable(p.out, "TIME", "SESSION", "FROM", "CREDENTIAL", "WHAT", "RESOURCE", "CONTENT")
			for i := range k.Writes {
				w := &k.Writes[i]
				for _, r := range keptRows(w) {
					t.row(w.Time.Local().Format(time.DateTime), strconv.FormatUint(w.Session, 10), w.From.Protocol+"://"+w.From.Remote,
						w.From.Credential, string(w.Kind), r[0], r[1])
				}
			}
			switch {
			case len(k.Writes) == 0:
				t.note = "nothing is kept; coaphub devices access " + id + " says how the device stands"
			case k.Dropped > 0:
				t.note = strconv.FormatUint(k.Dropped, 10) + " older ones made room for these"
			}
			return t.finish(p.err, nil)
		},
	}
	for _, cmd := range []*cobra.Command{list, show} {
		cmd.Flags().BoolVar(asJSON, "json", false, "print JSON, for scripts")
	}
	return group("quarantine", "Devices that are in, but kept apart", list, show, add)
}

// keptRows is what a write says, a resource a row.
func keptRows(w *hub.KeptWrite) [][2]string {
	if w.Kind == hub.KeptSignedIn {
		return [][2]string{{}}
	}
	var rows [][2]string
	for _, c := range w.Changes {
		rows = append(rows, [2]string{string(c.Href), keptContent(c)})
	}
	for _, l := range w.Links {
		rows = append(rows, [2]string{string(l.Href), strings.Join(l.Types, " ")})
	}
	for _, h := range w.Hrefs {
		rows = append(rows, [2]string{string(h), ""})
	}
	return rows
}

// maxShown bounds a content in a table; --json has all of it.
const maxShown = 200

// keptContent is a content for people: of CBOR its diagnostic notation (RFC 8949, Section 8), of others their text.
func keptContent(c hub.KeptChange) string {
	s := string(c.Data)
	if c.Format == hub.FormatCBOR || c.Format == hub.FormatOCFCBOR {
		if d, err := cbor.Diagnose(c.Data); err == nil {
			s = d
		}
	}
	if len(s) > maxShown {
		s = strings.ToValidUTF8(s[:maxShown], "") + "…"
	}
	return s
}
