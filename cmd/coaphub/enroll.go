package main

import (
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/conf"
)

func newEnroll(p process) *cobra.Command {
	var q bundle.EnrolmentsRequest
	var asJSON bool
	jsonFlag := func(cmd *cobra.Command) *cobra.Command {
		cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
		return cmd
	}
	list := jsonFlag(&cobra.Command{
		Use:   "list [DEVICE...]",
		Short: "List which devices have enrolled, and which wait to be allowed",
		Args:  cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			q.DeviceIDs = args
			c, err := control(cmd)
			if err != nil {
				return err
			}
			es, err := c.Enrolments(cmd.Context(), q)
			return printEnrolments(p, es, err, asJSON, "no device has asked to enrol")
		},
	})
	list.Flags().StringVar(&q.State, "state", "", "only those that are waiting, allowed, refused or issued")
	list.Flags().StringVar(&q.Group, "group", "", "only those of the group of this ID")
	list.Flags().StringVar(&q.Owner, "owner", "", "only those that enrol for this owner")
	list.Flags().IntVar(&q.Limit, "limit", 1000, "at most so many, up to 10000")
	decide := func(name, short, long string, allow bool) *cobra.Command {
		return jsonFlag(&cobra.Command{
			Use: name + " DEVICE...", Short: short, Long: long, Args: cobra.MinimumNArgs(1),
			RunE: func(cmd *cobra.Command, args []string) error {
				c, err := control(cmd)
				if err != nil {
					return err
				}
				es, err := c.DecideEnrolments(cmd.Context(), bundle.EnrolmentsRequest{DeviceIDs: args, Allow: allow})
				return printEnrolments(p, es, err, asJSON, "nothing to do: it was so before")
			},
		})
	}
	forget := jsonFlag(&cobra.Command{
		Use:   "forget DEVICE...",
		Short: "Have devices begin anew, also with another factory key",
		Long: "forget removes what is known of devices' enrolments. A device whose factory key was replaced can enrol again then, and one\n" +
			"that was refused may ask once more. Certificates stay good: see coaphub certs revoke.",
		Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			es, err := c.ForgetEnrolments(cmd.Context(), bundle.EnrolmentsRequest{DeviceIDs: args})
			return printEnrolments(p, es, err, asJSON, "nothing is known of these devices")
		},
	})
	return group("enroll", "Which devices may get an identity by themselves: factory groups, one-time tokens, approvals",
		newEnrollToken(p), newEnrollGroup(p), list,
		decide("approve", "Allow devices that wait", "approve lets devices have a certificate that wait for it, or were refused; they come for it by themselves.", true),
		decide("refuse", "Refuse devices", "refuse keeps devices from getting a certificate, the next one included. The one that they have stays good: see coaphub certs revoke.", false),
		forget)
}

func printEnrolments(p process, es []bundle.Enrolment, err error, asJSON bool, none string) error {
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, es)
	}
	t := newTable(p.out, "DEVICE", "STATE", "OWNER", "SHOWED", "TYPE", "SINCE", "CERTIFICATE", "PROBLEM")
	for _, e := range es {
		state := e.State
		if e.Waits != "" {
			state += ": " + e.Waits
		}
		switch {
		case e.User == "":
		case e.Waits != "": // a person allowed it, and then it waits for something else
			state += ", allowed by " + e.User
		default:
			state += " by " + e.User
		}
		t.row(e.DeviceID, state, e.Owner, e.Proof, e.Type, e.Changed.Local().Format(time.DateTime), e.Serial, e.Problem)
	}
	if len(es) == 0 {
		t.note = none
	}
	return t.finish(p.err, nil)
}

func newEnrollToken(p process) *cobra.Command {
	var q bundle.NewTokenRequest
	var names bundle.NamesRequest
	var anyDevice, asJSON bool
	var ttl string
	add := &cobra.Command{
		Use:   "add (--device-id ID | --any-device)",
		Short: "Make a one-time token, with which one device gets its certificate",
		Long: "add makes a token with which a device gets an identity certificate for a key that it makes itself, once. It is shown here and\n" +
			"nowhere else.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			if (q.DeviceID == "") == !anyDevice {
				return usage("exactly one of --device-id and --any-device is needed")
			}
			if q.TTL, err = conf.ParseDuration(ttl); err != nil || q.TTL <= 0 {
				return usage("--ttl: a time is needed, such as 12h or 7d")
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			t, err := c.NewEnrolmentToken(cmd.Context(), q)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, t)
			}
			return printEnrolmentToken(p, t)
		},
	}
	f := add.Flags()
	f.StringVar(&q.DeviceID, "device-id", "", "the device's ID, a UUID")
	f.BoolVar(&anyDevice, "any-device", false, "whichever device comes first")
	f.StringVar(&q.Owner, "owner", "", "account that will own the device (default the first administrator)")
	f.StringVar(&ttl, "ttl", "24h", "how long it is good, up to 90d")
	list := &cobra.Command{
		Use:   "list",
		Short: "List one-time tokens, newest first",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			ts, err := c.EnrolmentTokens(cmd.Context(), names)
			return printEnrolmentTokens(p, ts, err, asJSON, "there is no one-time token")
		},
	}
	list.Flags().StringVar(&names.Owner, "owner", "", "only those for devices of this owner")
	remove := &cobra.Command{
		Use:   "remove ID...",
		Short: "Remove one-time tokens, so that nobody enrols with them",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			ts, err := c.DeleteEnrolmentTokens(cmd.Context(), bundle.NamesRequest{IDs: args})
			if err == nil && len(ts) == 0 {
				return hub.NewError(hub.NotFound, "token-unknown", "there is no such one-time token; coaphub enroll token list shows their IDs")
			}
			return printEnrolmentTokens(p, ts, err, asJSON, "")
		},
	}
	for _, cmd := range []*cobra.Command{add, list, remove} {
		cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	}
	return group("token", "One-time tokens for devices without a manufacturer's certificate", add, list, remove)
}

func printEnrolmentToken(p process, t bundle.EnrolmentToken) error {
	out := newTable(p.out, "token", t.Token)
	out.row("id", t.ID)
	if t.DeviceID != "" {
		out.row("device", t.DeviceID)
	}
	out.row("owner", t.Owner)
	out.row("good until", t.Expires.Local().Format(time.DateTime))
	if err := out.end(); err != nil {
		return err
	}
	if t.Endpoints.Enrolment == "" {
		return nil
	}
	// The fingerprint goes the way of the token; a file would have to be carried besides.
	block, _ := pem.Decode([]byte(t.CA))
	if block == nil {
		return errors.New("the hub's root is not PEM")
	}
	_, err := fmt.Fprintf(p.out, "\non the device (--ca-sha256 names the hub's root; coaphub ca root > ca.pem and --ca ca.pem do, too):\n"+
		"  coaphub agent enroll --server %s --ca-sha256 %x --token %s --out DIR\n", t.Endpoints.Enrolment, sha256.Sum256(block.Bytes), t.Token)
	return err
}

func printEnrolmentTokens(p process, ts []bundle.EnrolmentToken, err error, asJSON bool, none string) error {
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, ts)
	}
	t := newTable(p.out, "ID", "DEVICE", "OWNER", "BY", "UNTIL", "USED")
	for _, tok := range ts {
		dev, used := tok.DeviceID, ""
		if dev == "" {
			dev = "any"
		}
		switch {
		case tok.Used != nil:
			used = tok.Used.Local().Format(time.DateTime) + " by " + tok.UsedBy
		case time.Now().After(tok.Expires):
			used = "no, and it has ended"
		}
		t.row(tok.ID, dev, tok.Owner, tok.User, tok.Expires.Local().Format(time.DateTime), used)
	}
	if len(ts) == 0 {
		t.note = none
	}
	return t.finish(p.err, nil)
}

func newEnrollGroup(p process) *cobra.Command {
	var g bundle.EnrolmentGroup
	var names bundle.NamesRequest
	var ca, allow string
	var terms hub.Terms
	var asJSON bool
	read := func() error {
		if ca != "" {
			b, err := os.ReadFile(ca)
			if err != nil {
				return fmt.Errorf("read the CA's certificate: %w", err)
			}
			g.Chain = string(b)
		}
		if allow != "" {
			b, err := os.ReadFile(allow)
			if err != nil {
				return fmt.Errorf("read the list of devices: %w", err)
			}
			g.Allow = strings.Fields(string(b))
		}
		return nil
	}
	flags := func(cmd *cobra.Command) {
		cmd.Flags().StringVar(&ca, "ca", "", "file (PEM): the CA that signs the factory certificates, then what is above it")
		cmd.Flags().StringVar(&allow, "allow", "", "file of the IDs of the devices that may enrol, one a line; else all of that CA may")
		cmd.Flags().BoolVar(&g.Approval, "approval", false, "a person decides on each device: coaphub enroll approve")
		cmd.Flags().BoolVar(&g.Named, "named", false, "a device says its own ID when it comes for the first time, as those of plgd's device provisioning do")
		cmd.Flags().BoolVar(&g.Expired, "accept-expired", false, "factory certificates that have ended are good, too")
		cmd.Flags().StringSliceVar(&g.Types, "device-type", nil, "device types that may enrol, such as oic.d.light: the factory certificate has it as an organizational unit; none: all")
		cmd.Flags().StringVar(&terms.Version, "terms", "", "version of terms, a licence for one, that somebody has to accept before devices enrol: coaphub enroll group accept")
		cmd.Flags().StringVar(&terms.URL, "terms-url", "", "where the text of that version is")
	}
	add := &cobra.Command{
		Use:   "add NAME --ca FILE",
		Short: "Let devices enrol that a manufacturer's CA vouches for",
		Long: "add makes a group: a device that shows a certificate of the CA, and has its key, gets an identity certificate. Its ID is that of\n" +
			"its factory certificate (common name uuid:<ID>), or else one that stands for its factory key. With --named it may say another,\n" +
			"which nobody has: its factory key stands for that one from then on.",
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if ca == "" {
				return usage("--ca is missing: which certificates are good?")
			}
			if err := read(); err != nil {
				return err
			}
			g.Name, g.Terms = args[0], &terms
			c, err := control(cmd)
			if err != nil {
				return err
			}
			made, err := c.SetEnrolmentGroup(cmd.Context(), g)
			return printGroups(p, []bundle.EnrolmentGroup{made}, err, asJSON, "")
		},
	}
	flags(add)
	add.Flags().StringVar(&g.Owner, "owner", "", "account that will own the devices (default the first administrator)")
	change := &cobra.Command{
		Use:   "change ID",
		Short: "Change a group: what is given replaces what it was",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			asked := g
			if err := read(); err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			gs, err := c.EnrolmentGroups(cmd.Context(), bundle.NamesRequest{})
			if err != nil {
				return err
			}
			i := slices.IndexFunc(gs, func(o bundle.EnrolmentGroup) bool { return o.ID == args[0] })
			if i < 0 {
				return hub.NewError(hub.NotFound, "group-unknown", "there is no such enrolment group; coaphub enroll group list shows their IDs")
			}
			next := gs[i]
			if ca != "" {
				next.Chain = g.Chain
			}
			if cmd.Flags().Changed("allow") {
				next.Allow = g.Allow
			}
			if cmd.Flags().Changed("approval") {
				next.Approval = asked.Approval
			}
			if cmd.Flags().Changed("named") {
				next.Named = asked.Named
			}
			if cmd.Flags().Changed("accept-expired") {
				next.Expired = asked.Expired
			}
			if cmd.Flags().Changed("device-type") {
				next.Types = slices.DeleteFunc(asked.Types, func(t string) bool { return t == "" })
			}
			if cmd.Flags().Changed("terms") {
				next.Terms = &terms // with the URL of its text
			} else if cmd.Flags().Changed("terms-url") {
				return usage("--terms-url: which version is it? --terms is missing")
			}
			if cmd.Flags().Changed("name") {
				next.Name = asked.Name
			}
			made, err := c.SetEnrolmentGroup(cmd.Context(), next)
			return printGroups(p, []bundle.EnrolmentGroup{made}, err, asJSON, "")
		},
	}
	flags(change)
	change.Flags().StringVar(&g.Name, "name", "", "another name")
	var version string
	accept := &cobra.Command{
		Use:   "accept ID --terms VERSION",
		Short: "Accept the terms of a group, so that its devices may enrol",
		Long: "accept keeps that you agree to the terms of a group, for its owner. Devices that wait for it come for their certificates by themselves,\n" +
			"and the ledger has with each who accepted what. coaphub enroll group list shows the terms.",
		Args: exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if version == "" {
				return usage("--terms is missing: which version is accepted?")
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			g, err := c.AcceptTerms(cmd.Context(), bundle.AcceptTermsRequest{ID: args[0], Version: version})
			return printGroups(p, []bundle.EnrolmentGroup{g}, err, asJSON, "")
		},
	}
	accept.Flags().StringVar(&version, "terms", "", "the version of the group's terms")
	list := &cobra.Command{
		Use:   "list",
		Short: "List the groups, oldest first",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			gs, err := c.EnrolmentGroups(cmd.Context(), names)
			return printGroups(p, gs, err, asJSON, "there is no enrolment group")
		},
	}
	list.Flags().StringVar(&names.Owner, "owner", "", "only those of this owner's devices")
	remove := &cobra.Command{
		Use:   "remove ID...",
		Short: "Remove groups, so that no more of their devices enrol; certificates stay good",
		Args:  cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			gs, err := c.DeleteEnrolmentGroups(cmd.Context(), bundle.NamesRequest{IDs: args})
			if err == nil && len(gs) == 0 {
				return hub.NewError(hub.NotFound, "group-unknown", "there is no such enrolment group; coaphub enroll group list shows their IDs")
			}
			return printGroups(p, gs, err, asJSON, "")
		},
	}
	for _, cmd := range []*cobra.Command{add, change, accept, list, remove} {
		cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON, for scripts")
	}
	return group("group", "Groups of devices that a manufacturer's CA vouches for", add, change, accept, list, remove)
}

func printGroups(p process, gs []bundle.EnrolmentGroup, err error, asJSON bool, none string) error {
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, gs)
	}
	t := newTable(p.out, "ID", "NAME", "OWNER", "DEVICES", "APPROVAL", "TERMS", "SINCE")
	for _, g := range gs {
		devices, approval, terms := "all of its CA", "none", "none"
		if len(g.Allow) > 0 {
			devices = fmt.Sprintf("%d that are named", len(g.Allow))
		}
		if len(g.Types) > 0 {
			devices += ", " + strings.Join(g.Types, ", ")
		}
		if g.Approval {
			approval = "by a person"
		}
		switch {
		case g.Terms == nil:
		case g.Accepted != nil && g.Accepted.Version == g.Terms.Version:
			terms = g.Terms.Version + ", accepted by " + g.Accepted.User
		default:
			terms = strings.TrimSpace(g.Terms.Version+" "+g.Terms.URL) + ", to be accepted"
		}
		t.row(g.ID, g.Name, g.Owner, devices, approval, terms, g.Created.Local().Format(time.DateTime))
	}
	if len(gs) == 0 {
		t.note = none
	}
	return t.finish(p.err, nil)
}
