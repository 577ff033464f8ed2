package main

import (
	"encoding/json"
	"reflect"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

func newDevices(p process) *cobra.Command {
	var f apiFlags
	var online, offline bool
	var q client.DeviceQuery
	cmd := &cobra.Command{
		Use:   "devices",
		Short: "List devices; keep them out, and let them in again",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if online && offline {
				return usage("--online and --offline together are no filter; leave both out")
			}
			if online {
				q.Status = []string{"ONLINE"}
			}
			if offline {
				q.Status = []string{"OFFLINE"}
			}
			c, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			defer c.Close()
			t := newTable(p.out, "DEVICE", "NAME", "STATUS", "TWIN", "TYPES")
			err = lines(p, f.asJSON, c.ListDevices(cmd.Context(), q), func(d *client.Device) json.RawMessage { return d.Raw }, func(d *client.Device) {
				m := d.Metadata
				status := strings.ToLower(m.Connection.Status)
				if m.ContactInterval > 0 {
					status += ", " + expected(m.NextContact.Time, m.ContactInterval, time.Now())
				}
				t.row(d.ID, d.Name, status, strings.ToLower(strings.ReplaceAll(m.Twin.State, "_", "-")), strings.Join(d.Types, " "))
			})
			if f.asJSON {
				return err
			}
			if err == nil && t.rows == 1 {
				t.note = "no devices; coaphub onboard makes what a device needs to sign up"
				if q.Sort = ""; !reflect.ValueOf(q).IsZero() {
					t.note = "no such devices"
				}
			}
			return t.finish(p.err, err)
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&online, "online", false, "only devices that are online")
	cmd.Flags().BoolVar(&offline, "offline", false, "only devices that are offline")
	cmd.Flags().StringSliceVar(&q.Types, "type", nil, "only devices of this resource type; repeat for several")
	cmd.Flags().StringVar(&q.Search, "search", "", "only devices with these words in ID, name, type or a label")
	cmd.Flags().StringVar(&q.Sort, "sort", "", "id, name, modelNumber, connectedAt or status; with a minus from the largest down")
	cmd.Flags().IntVar(&q.Limit, "limit", 0, "at most so many")
	cmd.AddCommand(accessCommands(p)...)
	return cmd
}
