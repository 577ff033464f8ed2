package main

import (
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
)

func newMigrate(p process) *cobra.Command {
	return group("migrate", "Move the hub from the data folder to a cluster's database, or back",
		newMigration(p, true, "to-cluster", "Copy the hub of the data folder to MongoDB",
			"to-cluster copies all that the hub of the data folder has stored to the database that the configuration of the cluster\n"+
				"names, and compares both. The database must be empty, and cluster.hubId in the configuration the hub's ID. The keys of the\n"+
				"certificate authority stay files: the command says which folder has them."),
		newMigration(p, false, "from-cluster", "Copy the hub of a cluster to the data folder",
			"from-cluster copies all that the hub of a cluster has stored to the data folder, and compares both. Nothing may be in it but\n"+
				"the folder keys, of the process with the certificate-authority, which must be there before."),
	)
}

func newMigration(p process, toCluster bool, name, short, long string) *cobra.Command {
	var file string
	var newKeys, asJSON bool
	cmd := &cobra.Command{
		Use:   name,
		Short: short,
		Long: long + "\n\n" +
			"No hub may run on either of the two. If it is broken off, run the same again: it goes on where it was. What it copies to\n" +
			"is no hub's before it is whole; what it copies from stays as it is. Subscribers start from the current state.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, warnings, err := bundle.LoadConfig(file, p.env)
			if err != nil {
				return err
			}
			say := func(s string) { _, _ = fmt.Fprintln(p.err, s) }
			for _, w := range warnings {
				say("warning: " + w)
			}
			cfg.Data = dataFlag(cmd)
			show := &pace{w: p.err, on: terminal(p.err)}
			out, err := bundle.Migrate(cmd.Context(), bundle.Migration{
				Data: cfg.Data, Config: cfg, ToCluster: toCluster, NewKeys: newKeys, Progress: show.at,
				Say: func(s string) { show.end(); say(s) },
			})
			show.end()
			if err != nil {
				if cmd.Context().Err() != nil {
					say("broken off; run the same again to go on")
					return errSaid
				}
				return err
			}
			if asJSON {
				return printJSON(p.out, out)
			}
			_, err = fmt.Fprintf(p.out, "hub %s moved from %s to %s: %d devices, %d events, %d documents\n%s, of both\n",
				out.HubID, out.From, out.To, out.Devices, out.Events, out.Documents, out.Digest)
			if err == nil && out.Keys != "" {
				_, err = fmt.Fprintf(p.out, "the keys of the certificate authority are in %s: copy the folder to the data folder of the process with the certificate-authority before its first start, or start it on %s\n",
					out.Keys, cfg.Data)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file of the cluster (YAML)")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	if !toCluster {
		cmd.Flags().BoolVar(&newKeys, "new-keys", false, "without the keys of the certificate authority: the next start makes new ones, and every device must be onboarded again")
	}
	return cmd
}

// pace shows how far a migration is: a line that is written over each second on a terminal, nothing where nobody looks.
type pace struct {
	w     io.Writer
	on    bool
	began time.Time // of the step
	step  string
	first bundle.Tally // at the beginning of the step
	shown time.Time
	open  bool // the line has no end yet
}

func (s *pace) at(p bundle.MigrationProgress) {
	now := time.Now()
	if !s.on {
		return
	}
	if p.Step != s.step {
		s.end()
		s.step, s.began, s.first = p.Step, now, p.Tally
	} else if now.Sub(s.shown) < time.Second {
		return
	}
	s.shown, s.open = now, true
	seconds := max(now.Sub(s.began).Seconds(), 0.001)
	text := fmt.Sprintf("%s: %d of %d devices, %d events, %.0f events/s", p.Step, p.Devices, p.Of, p.Events, float64(p.Events-s.first.Events)/seconds)
	switch p.Step {
	case "copying documents":
		text = fmt.Sprintf("%s: %d, %.0f/s", p.Step, p.Documents, float64(p.Documents-s.first.Documents)/seconds)
	case "comparing":
		text = fmt.Sprintf("%s: %d of %d devices", p.Step, p.Devices, p.Of)
	}
	_, _ = fmt.Fprintf(s.w, "\r\x1b[K%s ", text)
}

func (s *pace) end() {
	if s.open {
		_, _ = fmt.Fprintln(s.w)
		s.open = false
	}
}
