package main

import (
	"encoding/json"
	"errors"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

func newGet(p process) *cobra.Command {
	var f apiFlags
	cmd := &cobra.Command{
		Use:   "get DEVICE [HREF]",
		Short: "Show what a device's resources are now, as the hub knows them",
		Long: "get shows the values that a device reported last, from the hub's memory: the device may be asleep or away.\n" +
			"Without HREF it shows all resources whose value is known.",
		Args: between(1, 2), ValidArgsFunction: completeResources(&f, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			device, href, err := resourceArgs(args)
			if err != nil {
				return err
			}
			c, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			defer c.Close()
			t := newTable(p.out, "HREF", "STATUS", "CONTENT")
			row := func(r *client.Resource) {
				if r.Data != nil { // else it never reported
					t.row(r.Data.Resource.Href, r.Data.Status, string(r.Data.Content))
				}
			}
			if href != "" {
				r, err := c.GetResource(cmd.Context(), device, href)
				switch {
				case errors.Is(err, client.NotFound):
					return &hub.Error{
						Kind: hub.NotFound, Code: "not-found", Err: err,
						Text: "the hub knows no value of " + args[1] + " of this device; coaphub get " + args[0] + " shows what it knows",
					}
				case err != nil:
					return err
				case f.asJSON:
					return line(p.out, r.Raw)
				}
				row(&r)
				if t.rows == 1 {
					t.note = "the device has not reported this resource yet"
				}
				return t.finish(p.err, nil)
			}
			seq := c.ListResources(cmd.Context(), client.ResourceQuery{DeviceIDs: []string{device}})
			err = lines(p, f.asJSON, seq, func(r *client.Resource) json.RawMessage { return r.Raw }, row)
			if f.asJSON {
				return err
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
