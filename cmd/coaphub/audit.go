package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"
)

func newAudit(p process) *cobra.Command {
	var asJSON bool
	var limit int
	cmd := &cobra.Command{
		Use:   "audit",
		Short: "Show who changed what through the API and the command line, newest first",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			es, err := c.Audit(cmd.Context(), 0, limit)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, es)
			}
			t := newTable(p.out, "TIME", "USER", "DOOR", "CALL", "TARGET", "OUTCOME")
			for _, e := range es {
				t.row(e.Time.Local().Format(time.DateTime), e.User, e.Door, e.Call, e.Target, e.Outcome)
			}
			if len(es) == 0 {
				_, _ = fmt.Fprintln(p.err, "nothing was changed yet")
			}
			return t.end()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().IntVar(&limit, "limit", 100, "at most so many entries, up to 10000")
	return cmd
}
