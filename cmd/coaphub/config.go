package main

import (
	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
)

func newConfig(p process) *cobra.Command {
	var file string
	var diff bool
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the effective configuration, or what differs from the defaults",
		Long: "config prints what serve would run with: defaults, then the file, then the environment, then flags. Secrets are\n" +
			"shown as ***. All mistakes are reported together.",
		Args: none,
	}
	cmd.Flags().StringVar(&file, "config", "", "configuration file (YAML)")
	cmd.Flags().BoolVar(&diff, "diff", false, "only what differs from the defaults")
	overrides := addressFlags(cmd)
	cmd.RunE = func(*cobra.Command, []string) error {
		cfg, warnings, err := bundle.LoadConfig(file, p.env)
		if err != nil {
			return err
		}
		for _, w := range warnings {
			cmd.PrintErrln("warning: " + w)
		}
		overrides(&cfg)
		if err := cfg.Validate(); err != nil {
			return err
		}
		if diff {
			return conf.WriteDiff(p.out, cfg, bundle.Default())
		}
		return conf.Write(p.out, cfg)
	}
	return cmd
}
