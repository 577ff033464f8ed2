package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

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
			path, err := devicePath(args[0])
			if err != nil {
				return err
			}
			if len(args) == 2 {
				href, err := hrefPath(args[1])
				if err != nil {
					return err
				}
				path += "/resources" + href
			}
			path += "/events"
			if since != "" {
				at, err := sinceTime(since, time.Now())
				if err != nil {
					return err
				}
				path += "?" + url.Values{"timestampFilter": {strconv.FormatInt(at.UnixNano(), 10)}}.Encode()
			}
			a, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			if f.asJSON {
				return a.each(cmd.Context(), path, line(p.out))
			}
			t := newTable(p.out, "TIME", "EVENT", "WHAT")
			err = a.each(cmd.Context(), path, func(m json.RawMessage) error {
				at, kind, what, err := event(m)
				if err != nil {
					return err
				}
				t.row(at.Local().Format("2006-01-02 15:04:05.000"), kind, what)
				return nil
			})
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

// sinceTime reads --since.
func sinceTime(s string, now time.Time) (time.Time, error) {
	// The API's times are nanoseconds since 1970 in 64 bits, which end in 2262.
	if at, err := time.Parse(time.RFC3339Nano, s); err == nil && at.Year() > 1970 && at.Year() < 2262 {
		return at, nil
	}
	d, err := conf.ParseDuration(s)
	if err != nil || d < 0 {
		return time.Time{}, usage("--since: %q is neither a duration like 1h or 7d nor a time like 2026-05-01T12:00:00Z", s)
	}
	return now.Add(-d), nil
}

// event reads one event of the API: an object with one key, its kind.
func event(m json.RawMessage) (at time.Time, kind, what string, err error) {
	var one map[string]json.RawMessage
	if err := json.Unmarshal(m, &one); err != nil {
		return at, "", "", fmt.Errorf("the hub's answer was not understood: %w", err)
	}
	for _, key := range slices.Sorted(maps.Keys(one)) {
		var e struct {
			change
			Resources []struct {
				Href string `json:"href"`
			} `json:"resources"`
			Hrefs      []string `json:"hrefs"`
			Connection struct {
				Status string `json:"status"`
			} `json:"connection"`
			Twin struct {
				State string `json:"state"`
			} `json:"twinSynchronization"`
			Metadata struct {
				Timestamp json.Number `json:"timestamp"`
			} `json:"eventMetadata"`
		}
		if json.Unmarshal(one[key], &e) != nil { // a field beside the event
			continue
		}
		ns, _ := strconv.ParseInt(strings.Trim(e.Metadata.Timestamp.String(), `"`), 10, 64)
		what := e.Connection.Status
		if e.Twin.State != "" {
			what += ", twin " + e.Twin.State
		}
		switch {
		case e.ResourceID.Href != "":
			what = strings.TrimSpace(e.ResourceID.Href + " " + e.Status + " " + string(e.Content))
		case len(e.Hrefs) > 0:
			what = strings.Join(e.Hrefs, " ")
		case len(e.Resources) > 0:
			var hrefs []string
			for _, r := range e.Resources {
				hrefs = append(hrefs, r.Href)
			}
			what = strings.Join(hrefs, " ")
		}
		return time.Unix(0, ns), key, what, nil
	}
	return at, "", "", fmt.Errorf("the hub sent an event of no kind: %s", m)
}
