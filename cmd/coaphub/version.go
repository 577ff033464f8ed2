package main

import (
	"fmt"
	"slices"
	"strings"

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
			words := []string{"coaphub", b.Version, b.Commit, b.Go}
			_, err := fmt.Fprintln(p.out, strings.Join(slices.DeleteFunc(words, func(w string) bool { return w == "" }), " "))
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}
