package main

import (
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
)

func newParts(p process) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "parts",
		Short: "List the parts of the hub: who lives, serves what, and lags how far",
		Long: "parts lists the parts of the hub of this data folder. In a cluster it asks any process of it: each hears of all\n" +
			"others. BEHIND is how many events are stored that subscribers or documents do not have yet; it falls to 0 when a\n" +
			"part has nothing to do. A part that is silent was not heard for ten seconds: it is gone, or cannot be reached.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			parts, err := c.Parts(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, parts)
			}
			t := newTable(p.out, "PART", "PROCESS", "VERSION", "STATE", "HEARD", "RUNS FOR", "PARTITIONS", "SESSIONS", "BEHIND")
			for _, x := range parts {
				t.row(x.Target, x.Name, x.Version, x.State, ago(x.Heard), time.Since(x.Started).Round(time.Second).String(), count(x.Partitions), count(x.Sessions), behind(x))
			}
			return t.end()
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func ago(at time.Time) string { return time.Since(at).Round(time.Second).String() + " ago" }

func count(n int) string {
	if n == 0 {
		return ""
	}
	return strconv.Itoa(n)
}

// behind is 0, too, where it can be more.
func behind(p bundle.Part) string {
	if p.Target != bundle.TargetResourceDirectory {
		return ""
	}
	return strconv.Itoa(p.Behind)
}
