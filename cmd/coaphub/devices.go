package main

import (
	"encoding/json"
	"fmt"
	"net/url"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/hub"
)

func newDevices(p process) *cobra.Command {
	var f apiFlags
	var online, offline bool
	var types []string
	cmd := &cobra.Command{
		Use:   "devices",
		Short: "List devices",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if online && offline {
				return usage("--online and --offline together are no filter; leave both out")
			}
			q := url.Values{}
			for _, t := range types {
				q.Add("typeFilter", t)
			}
			if online {
				q.Add("statusFilter", "ONLINE")
			}
			if offline {
				q.Add("statusFilter", "OFFLINE")
			}
			a, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			path := "/api/v1/devices"
			if len(q) > 0 {
				path += "?" + q.Encode()
			}
			if f.asJSON {
				return a.each(cmd.Context(), path, line(p.out))
			}
			t := newTable(p.out, "DEVICE", "NAME", "STATUS", "TWIN", "TYPES")
			err = a.each(cmd.Context(), path, func(m json.RawMessage) error {
				var d struct {
					ID       string   `json:"id"`
					Name     string   `json:"name"`
					Types    []string `json:"types"`
					Metadata struct {
						Connection struct {
							Status string `json:"status"`
						} `json:"connection"`
						Twin struct {
							State string `json:"state"`
						} `json:"twinSynchronization"`
						NextContact     int64 `json:"nextContact,string"`
						ContactInterval int64 `json:"contactInterval,string"`
					} `json:"metadata"`
				}
				if err := json.Unmarshal(m, &d); err != nil {
					return fmt.Errorf("the hub's answer was not understood: %w", err)
				}
				status := strings.ToLower(d.Metadata.Connection.Status)
				if m := d.Metadata; m.ContactInterval > 0 {
					status += ", " + expected(time.Unix(0, m.NextContact), time.Duration(m.ContactInterval), time.Now())
				}
				t.row(d.ID, d.Name, status, strings.ToLower(strings.ReplaceAll(d.Metadata.Twin.State, "_", "-")), strings.Join(d.Types, " "))
				return nil
			})
			if err == nil && t.rows == 1 {
				t.note = "no devices; coaphub onboard makes what a device needs to sign up"
				if len(q) > 0 {
					t.note = "no such devices"
				}
			}
			return t.finish(p.err, err)
		},
	}
	f.add(cmd)
	cmd.Flags().BoolVar(&online, "online", false, "only devices that are online")
	cmd.Flags().BoolVar(&offline, "offline", false, "only devices that are offline")
	cmd.Flags().StringSliceVar(&types, "type", nil, "only devices of this resource type; repeat for several")
	return cmd
}
