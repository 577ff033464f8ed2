package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/hub"
)

// description is what people see of a W3C Thing Description 1.1.
type description struct {
	Title      string `json:"title"`
	Properties map[string]struct {
		Title    string `json:"title"`
		ReadOnly bool   `json:"readOnly"`
	} `json:"properties"`
}

func newThings(p process) *cobra.Command {
	var f apiFlags
	cmd := &cobra.Command{
		Use:   "things [DEVICE]",
		Short: "Show devices as things of the Web of Things",
		Long: "things lists the devices that have a W3C Thing Description, or shows the properties of one. With --json it prints\n" +
			"the Thing Descriptions themselves.",
		Args: between(0, 1), ValidArgsFunction: func(cmd *cobra.Command, args []string, begun string) ([]string, cobra.ShellCompDirective) {
			if len(args) > 0 {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return completeResources(&f, p)(cmd, args, begun)
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			device, _, err := resourceArgs(args)
			if err != nil {
				return err
			}
			c, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			defer c.Close()
			read := func(id string) (d description, err error) {
				td, err := c.GetThing(cmd.Context(), id)
				if err != nil {
					return d, err
				}
				if f.asJSON {
					var one bytes.Buffer // one object a line
					if err := json.Compact(&one, td); err != nil {
						return d, err
					}
					return d, line(p.out, one.Bytes())
				}
				if err := json.Unmarshal(td, &d); err != nil {
					return d, fmt.Errorf("the hub's answer was not understood: %w", err)
				}
				return d, nil
			}
			if device != "" {
				d, err := read(device)
				if err != nil || f.asJSON {
					return err
				}
				t := newTable(p.out, "PROPERTY", "TITLE", "ACCESS")
				for _, name := range slices.Sorted(maps.Keys(d.Properties)) {
					access, q := "read, write", d.Properties[name]
					if q.ReadOnly {
						access = "read"
					}
					t.row(name, q.Title, access)
				}
				return t.end()
			}
			t := newTable(p.out, "THING", "TITLE", "PROPERTIES")
			for id, err := range c.ListThings(cmd.Context()) {
				var d description
				if err == nil {
					d, err = read(id)
				}
				if err != nil {
					return t.finish(p.err, err)
				}
				t.row(id, d.Title, strings.Join(slices.Sorted(maps.Keys(d.Properties)), " "))
			}
			if f.asJSON {
				return nil
			}
			if t.rows == 1 {
				t.note = "no things: no device has published anything"
			}
			return t.finish(p.err, nil)
		},
	}
	f.add(cmd)
	return cmd
}
