package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

func newWatch(p process) *cobra.Command {
	var f apiFlags
	var kinds []string
	var state bool
	cmd := &cobra.Command{
		Use:   "watch [DEVICE [HREF]]",
		Short: "Show what happens to devices, as it happens",
		Long: "watch shows each event of all devices, of one, or of one of its resources, from now on, until it is interrupted.\n" +
			"When the connection breaks it comes back and goes on behind the last event it showed: nothing is missed, also\n" +
			"across a restart of the hub, for as long as the hub keeps its history.",
		Args: between(0, 2), ValidArgsFunction: completeResources(&f, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			device, href, err := resourceArgs(args)
			if err != nil {
				return err
			}
			q := client.EventFilter{State: state, Broken: func(err error) {
				var e *client.Error
				errors.As(err, &e) // it is one: Watch comes back after no others
				_, _ = fmt.Fprintf(p.err, "coaphub: the stream broke off (%s), coming back\n", e.Code)
			}}
			if device != "" {
				q.DeviceIDs = []string{device}
			}
			if href != "" {
				q.Hrefs = []string{href}
				if len(kinds) == 0 {
					kinds = []string{"resource-changed"} // the others are about the whole device
				}
			}
			for _, k := range kinds {
				q.Kinds = append(q.Kinds, kindOf(k))
			}
			c, err := f.open(cmd, p, hub.ScopeRead)
			if err != nil {
				return err
			}
			defer c.Close()
			for e, err := range c.Watch(cmd.Context(), q) {
				switch {
				case cmd.Context().Err() != nil:
					return nil // it was interrupted, which is how it ends
				case err != nil:
					return err
				}
				if err := show(p, &e, f.asJSON); err != nil {
					return err
				}
			}
			return nil
		},
	}
	f.add(cmd)
	cmd.Flags().StringArrayVar(&kinds, "kind", nil, "only this kind of events, for example resource-changed or device-metadata-updated; may be repeated")
	cmd.Flags().BoolVar(&state, "state", false, "show the current state first")
	return cmd
}

// kindOf is the kind of events that a person writes as in resource-changed, RESOURCE_CHANGED or resourceChanged.
func kindOf(s string) client.EventKind {
	if !strings.ContainsAny(s, "-_") && s != strings.ToUpper(s) {
		return client.EventKind(s)
	}
	parts := strings.FieldsFunc(strings.ToLower(s), func(r rune) bool { return r == '-' || r == '_' })
	for i, part := range parts {
		if i > 0 {
			parts[i] = strings.ToUpper(part[:1]) + part[1:]
		}
	}
	switch kind := client.EventKind(strings.Join(parts, "")); kind {
	case "registered":
		return client.Registered
	case "unregistered":
		return client.Unregistered
	default:
		return kind
	}
}

// show prints one event. That the stream begins is not worth a line.
func show(p process, e *client.Event, asJSON bool) error {
	switch {
	case e.Kind == client.Live:
		return nil
	case e.Kind == client.Lagged:
		_, _ = fmt.Fprintln(p.err, "coaphub: the hub no longer keeps all that happened meanwhile; what follows first is the current state")
		return nil
	case asJSON:
		return line(p.out, e.Raw)
	}
	at := e.Time
	if at.IsZero() { // that a device came or went has no time of its own
		at = time.Now()
	}
	_, err := fmt.Fprintln(p.out, strings.TrimRight(plain(at.Local().Format("2006-01-02 15:04:05.000")+"  "+strings.Join(e.DeviceIDs, " ")+"  "+
		fmt.Sprintf("%-21s", e.Kind)+"  "+what(e)), " "))
	return err
}
