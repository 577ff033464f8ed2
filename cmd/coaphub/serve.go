package main

import (
	"context"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/run"
)

func newServe(p process) *cobra.Command {
	var file, target string
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the hub",
		Long: "serve runs the whole hub in one process. It needs no configuration; everything it keeps is in the data\n" +
			"folder. With --target it runs some parts of a hub that is kept in MongoDB (store.mongodb) and whose parts\n" +
			"reach each other over NATS (bus). When it serves it prints one line that begins with \"ready\" and names every endpoint. Keys of the\n" +
			"configuration can be environment variables too: " + bundle.EnvPrefix + "LOG_LEVEL=debug is log.level (coaphub config\n" +
			"prints all keys). SIGTERM and Ctrl-C stop the hub in order, within five seconds; the second one at once.",
		Args: none,
	}
	f := cmd.Flags()
	f.StringVar(&file, "config", "", "configuration file (YAML)")
	f.StringVar(&target, "target", "all", "which parts to run, with commas between: "+strings.Join(bundle.Targets(), ", "))
	overrides := addressFlags(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, warnings, err := bundle.LoadConfig(file, p.env)
		if err != nil {
			return err
		}
		if cfg.Target, err = targets(cmd, target, cfg.Target); err != nil {
			return err
		}
		cfg.Data = dataFlag(cmd)
		overrides(&cfg)
		ctx, cancel := context.WithCancel(cmd.Context())
		var helper sync.WaitGroup
		defer helper.Wait()
		defer cancel()
		helper.Go(func() { run.GiveBackMemory(ctx) }) // the process's matter, not the hub's: there may be several in one
		return bundle.Run(cmd.Context(), cfg, bundle.Options{
			Out: p.out, Log: p.err, Terminal: terminal(p.out), Version: version, Warnings: warnings,
		})
	}
	return cmd
}

// targets is what --target means: all is no list, and without the flag it is the configuration's.
func targets(cmd *cobra.Command, flag string, configured []string) ([]string, error) {
	if !cmd.Flags().Changed("target") {
		return configured, nil
	}
	if flag == "all" {
		return nil, nil
	}
	list := strings.Split(flag, ",")
	for _, t := range list {
		if !slices.Contains(bundle.Targets(), t) {
			return nil, usage("--target=%s: there is no part %q; there are all, %s", flag, t, strings.Join(bundle.Targets(), ", "))
		}
	}
	return list, nil
}

// addressFlags adds the flags that stand for keys of the configuration, and returns what puts those that were given into
// one.
func addressFlags(cmd *cobra.Command) func(*bundle.Config) {
	def := bundle.Default()
	var apply []func(*bundle.Config)
	add := func(name, usage string, key func(*bundle.Config) *string) {
		v := cmd.Flags().String(name, *key(&def), usage)
		apply = append(apply, func(c *bundle.Config) {
			if cmd.Flags().Changed(name) {
				*key(c) = *v
			}
		})
	}
	add("coap-address", "address for CoAP over TLS; empty: none", func(c *bundle.Config) *string { return &c.CoAPGateway.API.CoAP.Address })
	add("coap-plain-address", "address for CoAP over TCP without TLS (default none)", func(c *bundle.Config) *string { return &c.CoAPGateway.API.CoAP.PlainAddress })
	add("enrolment-address", "address for enrolment over CoAP with DTLS and TLS; empty: none", func(c *bundle.Config) *string { return &c.EnrolmentGateway.API.CoAP.Address })
	add("enrolment-http-address", "address for enrolment over HTTPS; empty: none", func(c *bundle.Config) *string { return &c.EnrolmentGateway.API.HTTP.Address })
	add("http-address", "address for HTTP/JSON", func(c *bundle.Config) *string { return &c.GRPCGateway.API.HTTP.Address })
	add("grpc-address", "address for gRPC", func(c *bundle.Config) *string { return &c.GRPCGateway.API.GRPC.Address })
	add("admin-address", "address for probes and metrics; empty: none", func(c *bundle.Config) *string { return &c.Admin.API.HTTP.Address })
	add("external-address", "host name or IP address under which others reach this machine (default its first address)", func(c *bundle.Config) *string { return &c.ExternalAddress })
	return func(c *bundle.Config) {
		for _, f := range apply {
			f(c)
		}
	}
}
