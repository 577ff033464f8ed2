package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/internal/conf"
)

func newToken(p process) *cobra.Command {
	var q bundle.TokenRequest
	var ttl string
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "token",
		Short: "Print an access token for the API",
		Long: "token prints an access token for the API, bare, for the first administrator unless --owner names another account:\n" +
			"  curl -H \"Authorization: Bearer $(coaphub token)\" http://127.0.0.1:8080/api/v1/devices",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if ttl != "" {
				d, err := conf.ParseDuration(ttl)
				if err != nil || d <= 0 {
					return usage("--ttl: %q is not a duration above zero; write for example 1h or 30d", ttl)
				}
				q.TTL = d
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			t, err := c.Token(cmd.Context(), q)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, t)
			}
			_, err = fmt.Fprintln(p.out, t.AccessToken)
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&q.Owner, "owner", "", "account the token acts for (default the first administrator)")
	f.StringSliceVar(&q.Scopes, "scope", nil, "scope of the token; repeat for several (default all the account may have)")
	f.StringVar(&ttl, "ttl", "", "how long the token lasts, up to 30d (default 1h)")
	f.BoolVar(&asJSON, "json", false, "print JSON with the time it ends")
	return cmd
}
