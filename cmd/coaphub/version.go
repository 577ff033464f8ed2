package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/internal/obs"
)

func newVersion(p process) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  none,
		RunE: func(*cobra.Command, []string) error {
			b := obs.ReadBuild(version)
			if asJSON {
				return printJSON(p.out, b)
			}
			_, err := fmt.Fprintf(p.out, "coaphub %s %s %s\n", b.Version, b.Commit, b.Go)
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
