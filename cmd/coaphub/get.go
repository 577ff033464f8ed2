package main

import (
	"encoding/json"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/hub"
)

// change is a resource_changed as the API's simple JSON has it.
type change struct {
	ResourceID struct {
		DeviceID string `json:"deviceId"`
		Href     string `json:"href"`
	} `json:"resourceId"`
	Status  string          `json:"status"`
	Content json.RawMessage `json:"content"`
}

func newGet(p process) *cobra.Command {
	var f apiFlags
	cmd := &cobra.Command{
		Use:   "get DEVICE [HREF]",
		Short: "Show what a device's resources are now, as the hub knows them",
		Args:  between(1, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			path, err := devicePath(args[0])
			if err != nil {
				return err
			}
			path += "/resources"
			if len(args) == 2 {
				href, err := hrefPath(args[1])
				if err != nil {
					return err
				}
				path += href
			}
			a, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			if f.asJSON {
				return a.each(cmd.Context(), path, line(p.out))
			}
			t := newTable(p.out, "HREF", "STATUS", "CONTENT")
			err = a.each(cmd.Context(), path, func(m json.RawMessage) error {
				var r struct {
					Data change `json:"data"`
				}
				if err := json.Unmarshal(m, &r); err != nil {
					return fmt.Errorf("the hub's answer was not understood: %w", err)
				}
				t.row(r.Data.ResourceID.Href, r.Data.Status, string(r.Data.Content))
				return nil
			})
			return t.finish(err)
		},
	}
	f.add(cmd)
	return cmd
}
