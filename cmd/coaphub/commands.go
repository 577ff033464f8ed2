package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

// commandFlags are what all commands to devices have in common.
type commandFlags struct {
	apiFlags
	ttl, key, iface         string
	async, force, supersede bool
}

func (f *commandFlags) add(cmd *cobra.Command) {
	f.apiFlags.add(cmd)
	cmd.Flags().StringVar(&f.ttl, "ttl", "", "how long the device may take, such as 30s; it may be away until then (default the hub's)")
	cmd.Flags().StringVar(&f.key, "key", "", "idempotency key: a repeat with the same one within 24 hours does nothing and has the first outcome")
	cmd.Flags().BoolVar(&f.async, "async", false, "do not wait for the device")
	cmd.Flags().BoolVar(&f.force, "force", false, "also for a resource that the hub does not know")
}

// options are the flags as the API takes them.
func (f *commandFlags) options() (o client.CommandOptions, err error) {
	if f.ttl != "" {
		o.TTL, err = conf.ParseDuration(f.ttl)
		if err != nil || o.TTL < hub.MinCommandTTL || o.TTL > hub.MaxCommandTTL {
			return o, usage("--ttl: %q is not a duration from 100ms to a year", f.ttl)
		}
	}
	o.Key, o.Interface, o.Async, o.Force, o.Supersede = f.key, f.iface, f.async, f.force, f.supersede
	return o, nil
}

// order gives one command.
type order func(c *client.Client, device, href string, o client.CommandOptions) (*client.Change, error)

// run reads the arguments, gives the command and says what came of it.
func (f *commandFlags) run(cmd *cobra.Command, p process, args []string, give order) error {
	device, href, err := resourceArgs(args[:2])
	if err != nil {
		return err
	}
	o, err := f.options()
	if err != nil {
		return err
	}
	c, err := f.open(cmd, p, hub.ScopeWrite)
	if err != nil {
		return err
	}
	defer c.Close()
	r, err := give(c, device, href, o)
	switch {
	case err != nil:
		return err
	case f.asJSON && r == nil:
		return line(p.out, json.RawMessage("{}"))
	case f.asJSON:
		return line(p.out, slices.Concat(json.RawMessage(`{"data":`), r.Raw, json.RawMessage("}"))) // as the API has it
	}
	text := "accepted; coaphub commands shows whether it still waits"
	if r != nil {
		text = r.Status
		if c := string(r.Content); c != "" && !strings.HasPrefix(c, `{"coapContentFormat":-1`) {
			text += " " + c
		}
	}
	_, err = fmt.Fprintln(p.out, plain(text))
	return err
}

// contentArg reads a content: JSON as it stands, - for standard input, and a bare word for a text.
func contentArg(p process, arg string) (json.RawMessage, error) {
	b := []byte(arg)
	if arg == "-" {
		var err error
		if b, err = io.ReadAll(io.LimitReader(p.in, hub.MaxContent+1)); err != nil {
			return nil, fmt.Errorf("read the content: %w", err)
		}
	}
	if !json.Valid(b) {
		return nil, usage("%q is not JSON; write for example '{\"state\":true}'", bytes.TrimSpace(b[:min(len(b), 40)]))
	}
	return b, nil
}

func newSet(p process) *cobra.Command {
	var f commandFlags
	cmd := &cobra.Command{
		Use:   "set DEVICE HREF JSON",
		Short: "Change a resource of a device",
		Long: "set sends JSON to a resource of a device (- reads it from standard input), in the format that the resource reports, and\n" +
			"shows what the device answered. A device that is away gets it when it comes back, within --ttl.",
		Example: `  coaphub set 46239566-ce3e-558c-936e-94e34a3c62b5 /light/1 '{"state":true}'`,
		Args:    exactly(3), ValidArgsFunction: completeResources(&f.apiFlags, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			content, err := contentArg(p, args[2])
			if err != nil {
				return err
			}
			return f.run(cmd, p, args, func(c *client.Client, device, href string, o client.CommandOptions) (*client.Change, error) {
				return c.UpdateResource(cmd.Context(), device, href, content, o)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.iface, "interface", "", "OCF interface of the resource, such as oic.if.rw")
	cmd.Flags().BoolVar(&f.supersede, "supersede", false, "cancel changes of the resource that wait")
	return cmd
}

func newCreate(p process) *cobra.Command {
	var f commandFlags
	cmd := &cobra.Command{
		Use:   "create DEVICE HREF JSON",
		Short: "Create a resource in a collection of a device",
		Long:  "create sends JSON (- reads it from standard input) to a collection of a device and shows what the device made of it.",
		Args:  exactly(3), ValidArgsFunction: completeResources(&f.apiFlags, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			content, err := contentArg(p, args[2])
			if err != nil {
				return err
			}
			return f.run(cmd, p, args, func(c *client.Client, device, href string, o client.CommandOptions) (*client.Change, error) {
				return c.CreateResource(cmd.Context(), device, href, content, o)
			})
		},
	}
	f.add(cmd)
	return cmd
}

func newDelete(p process) *cobra.Command {
	var f commandFlags
	cmd := &cobra.Command{
		Use:   "delete DEVICE HREF",
		Short: "Delete a resource on a device",
		Long:  "delete asks a device to delete one of its resources. It does not delete the device from the hub.",
		Args:  exactly(2), ValidArgsFunction: completeResources(&f.apiFlags, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			return f.run(cmd, p, args, func(c *client.Client, device, href string, o client.CommandOptions) (*client.Change, error) {
				return c.DeleteResource(cmd.Context(), device, href, o)
			})
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.iface, "interface", "", "OCF interface of the resource, such as oic.if.rw")
	return cmd
}

func newCommands(p process) *cobra.Command {
	var f apiFlags
	var cancel string
	cmd := &cobra.Command{
		Use:   "commands [DEVICE [HREF]]",
		Short: "Show the commands that wait for their devices, or cancel them",
		Long: "commands shows the commands that have not ended: of all devices, of one, or of one of its resources. With --cancel it\n" +
			"ends one of a resource, or all of it with --cancel all. One that was sent may be carried out all the same.",
		Args: between(0, 2), ValidArgsFunction: completeResources(&f, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			device, href, err := resourceArgs(args)
			if err != nil {
				return err
			}
			scope := hub.ScopeRead
			if cancel != "" {
				scope = hub.ScopeWrite
				if href == "" {
					return usage("--cancel needs DEVICE and HREF")
				}
			}
			c, err := f.open(cmd, p, scope)
			if err != nil {
				return err
			}
			defer c.Close()
			if cancel != "" {
				return cancelCommands(cmd, p, c, device, href, cancel, f.asJSON)
			}
			var q client.CommandQuery
			q.DeviceIDs, q.Resources = about(device, href)
			t := newTable(p.out, "ID", "DEVICE", "COMMAND", "HREF", "ENDS", "CONTENT")
			raw := func(w *client.Command) json.RawMessage { return w.Raw }
			err = lines(p, f.asJSON, c.ListCommands(cmd.Context(), q), raw, func(w *client.Command) {
				kind := strings.ToLower(strings.TrimSuffix(strings.TrimPrefix(string(w.Kind), "resource"), "Pending"))
				content := string(w.Content)
				if w.Kind == client.MetadataUpdatePending {
					kind, content = "twin", twinCommand(w)
				}
				t.row(w.By.CorrelationID, w.Resource.DeviceID, kind, w.Resource.Href, w.Until.Local().Format("2006-01-02 15:04:05"), content)
			})
			if f.asJSON {
				return err
			}
			if err == nil && t.rows == 1 {
				t.note = "no commands wait"
			}
			return t.finish(p.err, err)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&cancel, "cancel", "", "ID of the command to cancel, or all")
	return cmd
}

// twinCommand says what a command about a twin asks for.
func twinCommand(c *client.Command) string {
	switch {
	case c.TwinEnabled == nil:
		return "synchronise"
	case *c.TwinEnabled:
		return "on"
	}
	return "off"
}

func cancelCommands(cmd *cobra.Command, p process, c *client.Client, device, href, which string, asJSON bool) error {
	var ids []string // none: all
	if which != "all" {
		ids = []string{which}
	}
	ids, err := c.CancelCommands(cmd.Context(), device, href, ids...)
	if err != nil {
		return err
	}
	for _, id := range ids {
		text := "cancelled " + plain(id)
		if asJSON {
			b, err := json.Marshal(map[string]string{"correlationId": id})
			if err != nil {
				return err
			}
			text = string(b)
		}
		if _, err := fmt.Fprintln(p.out, text); err != nil {
			return err
		}
	}
	return nil
}
