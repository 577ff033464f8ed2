package main

import (
	"encoding/json"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

func newHistory(p process) *cobra.Command {
	var f apiFlags
	var since string
	cmd := &cobra.Command{
		Use:   "history DEVICE [HREF]",
		Short: "Show what happened to a device, oldest first",
		Long: "history shows every event that the hub keeps of a device, or of one of its resources: what it published, each value\n" +
			"it reported, when it came and went. How long events are kept is resourceDirectory.history in the configuration.",
		Args: between(1, 2), ValidArgsFunction: completeResources(&f, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			device, href, err := resourceArgs(args)
			if err != nil {
				return err
			}
			var q client.EventQuery
			q.DeviceIDs, q.Resources = about(device, href)
			if since != "" {
				if q.After, err = sinceTime("--since", since, time.Now()); err != nil {
					return err
				}
			}
			c, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			defer c.Close()
			t := newTable(p.out, "TIME", "EVENT", "WHAT")
			raw := func(e *client.Event) json.RawMessage { return e.Raw }
			err = lines(p, f.asJSON, c.ListEvents(cmd.Context(), q), raw, func(e *client.Event) {
				t.row(e.Time.Local().Format("2006-01-02 15:04:05.000"), string(e.Kind), what(e))
			})
			if f.asJSON {
				return err
			}
			if err == nil && t.rows == 1 {
				t.note = "no events; coaphub devices lists the devices"
				if since != "" {
					t.note = "no events since then"
				}
			}
			return t.finish(p.err, err)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&since, "since", "", "only what is newer: a duration such as 1h or 7d, or a time such as 2026-05-01T12:00:00Z")
	return cmd
}

// sinceTime reads a flag such as --since.
func sinceTime(flag, s string, now time.Time) (time.Time, error) {
	// The API's times are nanoseconds since 1970 in 64 bits, which end in 2262.
	if at, err := time.Parse(time.RFC3339Nano, s); err == nil && at.Year() > 1970 && at.Year() < 2262 {
		return at, nil
	}
	d, err := conf.ParseDuration(s)
	if err != nil || d < 0 {
		return time.Time{}, usage("%s: %q is neither a duration like 1h or 7d nor a time like 2026-05-01T12:00:00Z", flag, s)
	}
	return now.Add(-d), nil
}

// what says what an event tells.
func what(e *client.Event) string {
	switch {
	case e.Change != nil:
		return strings.TrimSpace(e.Href() + " " + e.Change.Status + " " + string(e.Change.Content))
	case e.Command != nil && e.Href() != "":
		return strings.TrimSpace(e.Href() + "  " + string(e.Command.Content))
	case e.Command != nil:
		return twinCommand(e.Command)
	case e.Links != nil:
		var hrefs []string
		for _, l := range e.Links.Resources {
			hrefs = append(hrefs, l.Href)
		}
		return strings.Join(hrefs, " ")
	case e.Metadata != nil:
		return e.Metadata.Connection.Status + ", twin " + e.Metadata.Twin.State
	}
	return strings.Join(e.Unpublished, " ")
}
