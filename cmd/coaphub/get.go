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
		Long: "get shows the values that a device reported last, from the hub's memory: the device may be asleep or away.\n" +
			"Without HREF it shows all resources whose value is known.",
		Args: between(1, 2), ValidArgsFunction: completeResources(&f, p),
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
			if hub.IsKind(err, hub.NotFound) && len(args) == 2 {
				return &hub.Error{
					Kind: hub.NotFound, Code: "not-found", Err: err,
					Text: "the hub knows no value of " + args[1] + " of this device; coaphub get " + args[0] + " shows what it knows",
				}
			}
			if err == nil && t.rows == 1 {
				t.note = "the hub knows no values of this device; coaphub devices lists the devices"
			}
			return t.finish(p.err, err)
		},
	}
	f.add(cmd)
	return cmd
}
