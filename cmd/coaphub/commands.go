package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

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

// path is that of a command: the device's, kind and the href, with the flags as its query.
func (f *commandFlags) path(device, kind, href string) (string, error) {
	path, err := devicePath(device)
	if err != nil {
		return "", err
	}
	if href, err = hrefPath(href); err != nil {
		return "", err
	}
	q := url.Values{}
	if f.ttl != "" {
		d, err := conf.ParseDuration(f.ttl)
		if err != nil || d < hub.MinCommandTTL || d > hub.MaxCommandTTL {
			return "", usage("--ttl: %q is not a duration from 100ms to a year", f.ttl)
		}
		q.Set("timeToLive", strconv.FormatInt(int64(d), 10))
	}
	for name, value := range map[string]string{"idempotencyKey": f.key, "resourceInterface": f.iface} {
		if value != "" {
			q.Set(name, value)
		}
	}
	for name, on := range map[string]bool{"async": f.async, "force": f.force, "supersede": f.supersede} {
		if on {
			q.Set(name, "true")
		}
	}
	path += "/" + kind + href
	if len(q) > 0 {
		path += "?" + q.Encode()
	}
	return path, nil
}

// run gives the command and says what came of it.
func (f *commandFlags) run(cmd *cobra.Command, p process, method, path string, content []byte) error {
	a, err := f.open(cmd, p, hub.ScopeWrite)
	if err != nil {
		return err
	}
	if f.asJSON {
		return a.call(cmd.Context(), method, path, content, line(p.out))
	}
	return a.call(cmd.Context(), method, path, content, func(m json.RawMessage) error {
		var r struct {
			Data *change `json:"data"`
		}
		if err := json.Unmarshal(m, &r); err != nil {
			return fmt.Errorf("the hub's answer was not understood: %w", err)
		}
		text := "accepted; coaphub commands shows whether it still waits"
		if r.Data != nil {
			text = r.Data.Status
			if c := string(r.Data.Content); c != "" && !strings.HasPrefix(c, `{"coapContentFormat":-1`) {
				text += " " + c
			}
		}
		_, err := fmt.Fprintln(p.out, plain(text))
		return err
	})
}

// contentArg reads a content: JSON as it stands, - for standard input, and a bare word for a text.
func contentArg(p process, arg string) ([]byte, error) {
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
			path, err := f.path(args[0], "resources", args[1])
			if err != nil {
				return err
			}
			content, err := contentArg(p, args[2])
			if err != nil {
				return err
			}
			return f.run(cmd, p, http.MethodPut, path, content)
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
			path, err := f.path(args[0], "resource-links", args[1])
			if err != nil {
				return err
			}
			content, err := contentArg(p, args[2])
			if err != nil {
				return err
			}
			return f.run(cmd, p, http.MethodPost, path, content)
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
			path, err := f.path(args[0], "resource-links", args[1])
			if err != nil {
				return err
			}
			return f.run(cmd, p, http.MethodDelete, path, nil)
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&f.iface, "interface", "", "OCF interface of the resource, such as oic.if.rw")
	return cmd
}

// pending is a command as the API's simple JSON has it.
type pending struct {
	ResourceID struct {
		DeviceID string `json:"deviceId"`
		Href     string `json:"href"`
	} `json:"resourceId"`
	DeviceID string          `json:"deviceId"` // of one about the twin
	Content  json.RawMessage `json:"content"`
	Twin     *bool           `json:"twinEnabled"`
	Until    string          `json:"validUntil"`
	Audit    struct {
		ID string `json:"correlationId"`
	} `json:"auditContext"`
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
			path, scope := "/api/v1/pending-commands?includeHiddenResources=true", hub.ScopeRead
			if len(args) > 0 {
				device, err := devicePath(args[0])
				if err != nil {
					return err
				}
				path += "&deviceIdFilter=" + strings.TrimPrefix(device, "/api/v1/devices/")
				if len(args) == 2 {
					href, err := hrefPath(args[1])
					if err != nil {
						return err
					}
					path = device + "/resources" + href + "/pending-commands"
				}
			}
			if cancel != "" {
				scope = hub.ScopeWrite
				if len(args) < 2 {
					return usage("--cancel needs DEVICE and HREF")
				}
				if cancel != "all" {
					path += "/" + url.PathEscape(cancel)
				}
			}
			a, err := f.open(cmd, p, scope)
			if err != nil {
				return err
			}
			if cancel != "" {
				return cancelCommands(cmd, p, a, path, f.asJSON)
			}
			if f.asJSON {
				return a.each(cmd.Context(), path, line(p.out))
			}
			t := newTable(p.out, "ID", "DEVICE", "COMMAND", "HREF", "ENDS", "CONTENT")
			err = a.each(cmd.Context(), path, func(m json.RawMessage) error { return pendingRow(t, m) })
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

func pendingRow(t *table, m json.RawMessage) error {
	var one map[string]json.RawMessage
	if err := json.Unmarshal(m, &one); err != nil {
		return fmt.Errorf("the hub's answer was not understood: %w", err)
	}
	for kind, raw := range one {
		var c pending
		if json.Unmarshal(raw, &c) != nil { // a member beside the command
			continue
		}
		ns, err := strconv.ParseInt(c.Until, 10, 64)
		if err != nil {
			continue
		}
		kind = strings.TrimSuffix(strings.TrimPrefix(kind, "resource"), "Pending")
		device, what := c.ResourceID.DeviceID, string(c.Content)
		if c.DeviceID != "" {
			device, kind = c.DeviceID, "twin"
			what = "synchronise"
			if c.Twin != nil {
				what = map[bool]string{true: "on", false: "off"}[*c.Twin]
			}
		}
		t.row(c.Audit.ID, device, strings.ToLower(kind), c.ResourceID.Href, time.Unix(0, ns).Local().Format("2006-01-02 15:04:05"), what)
	}
	return nil
}

func cancelCommands(cmd *cobra.Command, p process, a *api, path string, asJSON bool) error {
	return a.call(cmd.Context(), http.MethodDelete, path, nil, func(m json.RawMessage) error {
		if asJSON {
			return line(p.out)(m)
		}
		var r struct {
			IDs []string `json:"correlationIds"`
		}
		if err := json.Unmarshal(m, &r); err != nil {
			return fmt.Errorf("the hub's answer was not understood: %w", err)
		}
		for _, id := range r.IDs {
			if _, err := fmt.Fprintln(p.out, "cancelled "+plain(id)); err != nil {
				return err
			}
		}
		return nil
	})
}
