package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
)

func newStatus(p process) *cobra.Command {
	var asJSON, refused bool
	var device string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show how the hub of this data folder is; exit code 1 if none runs",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			if refused {
				rs, err := c.Refused(cmd.Context())
				if err != nil || asJSON {
					if err == nil {
						err = printJSON(p.out, rs)
					}
					return err
				}
				t := newTable(p.out, "TIME", "FROM", "WHAT", "DEVICE", "REASON")
				for _, r := range rs {
					t.row(r.Time.Local().Format(time.DateTime), r.Remote, r.What, r.Device, r.Reason)
				}
				if len(rs) == 0 {
					_, _ = fmt.Fprintln(p.err, "nothing was refused since the hub started")
				}
				return t.end()
			}
			if device != "" {
				return deviceStatus(cmd.Context(), p, c, device, asJSON)
			}
			s, err := c.Status(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, s)
			}
			t := newTable(p.out, "hub", s.HubID)
			t.row("version", s.Version)
			t.row("running", fmt.Sprintf("for %s, process %d", time.Since(s.Started).Round(time.Second), s.PID))
			t.row("data", s.Data)
			for _, e := range []struct{ name, uri string }{
				{"coaps+tcp", s.Endpoints.CoAPSTCP},
				{"coaps", s.Endpoints.CoAPS},
				{"coap+tcp", s.Endpoints.CoAPTCP},
				{"coap", s.Endpoints.CoAP},
				{"coaps+ws", s.Endpoints.CoAPSWS},
				{"coap+ws", s.Endpoints.CoAPWS},
				{"http", s.Endpoints.HTTP},
				{"grpc", s.Endpoints.GRPC},
				{"admin", s.Endpoints.Admin},
				{"oauth", s.Endpoints.OAuth},
				{"enrolment", s.Endpoints.Enrolment},
				{"enrolment", s.Endpoints.EnrolmentHTTP},
			} {
				if e.uri != "" {
					t.row(e.name, e.uri)
				}
			}
			if s.Issuer != s.Endpoints.OAuth { // the hub moved, or is behind a proxy
				t.row("issuer", s.Issuer)
			}
			t.row("devices", fmt.Sprintf("%d, %d of them online", s.Devices, s.Online))
			t.row("feed", "day "+strconv.FormatUint(uint64(s.Feed.Day), 10)+", commit "+strconv.FormatUint(s.Feed.N, 10))
			for _, name := range slices.Sorted(maps.Keys(s.NotReady)) {
				t.row("not ready", name+": "+s.NotReady[name])
			}
			if s.ReadOnly != "" {
				t.row("read only", s.ReadOnly)
			}
			if s.FirstLogin != "" {
				t.row("first login", "name and one-time password are in "+s.FirstLogin)
			}
			return t.end()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&refused, "refused", false, "list the newest refused connections and sign-ups with their reason")
	cmd.Flags().StringVar(&device, "device", "", "show how the device of this `ID` is attached, or why it went")
	cmd.MarkFlagsMutuallyExclusive("refused", "device")
	return cmd
}

// expected says when a device that sleeps should be back. It may be late by a quarter of its sleep, at least a minute, before
// that is worth a word: clocks of small devices are no good.
func expected(next time.Time, interval time.Duration, now time.Time) string {
	word := "expected at "
	if now.After(next.Add(max(interval/4, time.Minute))) {
		word = "overdue since "
	}
	return word + next.Local().Format(time.DateTime)
}

func deviceStatus(ctx context.Context, p process, c *bundle.Control, id string, asJSON bool) error {
	d, err := c.Device(ctx, id)
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, d)
	}
	return printDevice(p, d)
}

func printDevice(p process, d bundle.DeviceStatus) error {
	state := "offline"
	if d.Online {
		state = "online"
	}
	protocol := d.Protocol
	if d.TLS != "" {
		protocol += ", " + d.TLS
	}
	t := newTable(p.out, "device", d.DeviceID)
	if d.NextContact != nil {
		interval := time.Duration(d.ContactInterval * float64(time.Second))
		state += ", " + expected(*d.NextContact, interval, time.Now())
		t.row("state", state)
		t.row("sleeps", "for "+interval.Round(time.Second).String()+" at a time")
	} else {
		t.row("state", state)
	}
	t.row("protocol", protocol)
	t.row("from", d.Remote)
	t.row("connected", "since "+d.ConnectedSince.Local().Format(time.DateTime)+", session "+strconv.FormatUint(d.Session, 10))
	if d.Quarantined {
		t.row("quarantine", "what it writes is kept apart: coaphub devices quarantine show "+d.DeviceID)
	}
	t.row("bytes", fmt.Sprintf("%d from the device, %d to it", d.BytesIn, d.BytesOut))
	if d.RoundTrip > 0 {
		t.row("round trip", (time.Duration(d.RoundTrip * float64(time.Second))).Round(time.Microsecond).String())
	}
	if d.LastError != "" {
		t.row("last error", d.LastError)
	}
	if d.EndedAt != nil {
		t.row("last end", d.EndedAt.Local().Format(time.DateTime)+", "+d.EndReason)
	}
	if d.RivalsAt != nil {
		t.row("rivals", "the same identity in two places at once: "+d.Rivals+", noticed "+d.RivalsAt.Local().Format(time.DateTime))
	}
	return t.end()
}
