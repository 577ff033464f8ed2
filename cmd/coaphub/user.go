package main

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/coaphub/coaphub/bundle"
)

func newUser(p process) *cobra.Command {
	var asJSON, stdin bool
	var roles []string

	add := &cobra.Command{
		Use:   "add NAME",
		Short: "Make an account; without --password-stdin it gets a one-time password",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			password, err := readPassword(p, stdin)
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			a, err := c.AddUser(cmd.Context(), bundle.UserRequest{Name: args[0], Password: password, Roles: roles})
			return printUser(p, a, err, asJSON, "added")
		},
	}
	add.Flags().StringSliceVar(&roles, "role", []string{"user"}, "role of the account; repeat for several")
	passwd := &cobra.Command{
		Use:   "passwd NAME",
		Short: "Give an account another password; without --password-stdin a one-time password",
		Args:  exactly(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			password, err := readPassword(p, stdin)
			if err != nil {
				return err
			}
			c, err := control(cmd)
			if err != nil {
				return err
			}
			a, err := c.SetPassword(cmd.Context(), bundle.UserRequest{Name: args[0], Password: password})
			return printUser(p, a, err, asJSON, "changed")
		},
	}
	for _, c := range []*cobra.Command{add, passwd} {
		c.Flags().BoolVar(&stdin, "password-stdin", false, "read the password from standard input (asked for on a terminal)")
	}
	setRoles := &cobra.Command{
		Use:   "roles NAME ROLE...",
		Short: "Give an account these roles and no others",
		Args:  between(2, math.MaxInt),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			a, err := c.SetRoles(cmd.Context(), bundle.UserRequest{Name: args[0], Roles: args[1:]})
			return printUser(p, a, err, asJSON, "changed")
		},
	}
	list := &cobra.Command{
		Use:   "list",
		Short: "List the accounts",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			c, err := control(cmd)
			if err != nil {
				return err
			}
			us, err := c.Users(cmd.Context())
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(p.out, us)
			}
			t := newTable(p.out, "NAME", "ROLES", "STATE")
			for _, u := range us {
				t.row(u.Name, strings.Join(u.Roles, ","), userState(u))
			}
			return t.end()
		},
	}
	for _, c := range []*cobra.Command{add, passwd, setRoles, list} {
		c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	}
	return group("user", "Accounts of the embedded provider", add, list, passwd, setRoles)
}

func userState(u bundle.User) string {
	switch {
	case u.Disabled:
		return "disabled"
	case u.MustChange:
		return "must change the password"
	}
	return "active"
}

func printUser(p process, a bundle.UserAnswer, err error, asJSON bool, did string) error {
	if err != nil {
		return err
	}
	if asJSON {
		return printJSON(p.out, a)
	}
	_, err = fmt.Fprintf(p.out, "%s %s (%s)\n", did, plain(a.User.Name), strings.Join(a.User.Roles, ","))
	if err == nil && a.Password != "" {
		_, err = fmt.Fprintf(p.out, "one-time password: %s\n", a.Password)
	}
	return err
}

// readPassword reads a password from standard input, without echo on a terminal. Passwords are never arguments: those show
// up in the list of processes and in the shell's history.
func readPassword(p process, want bool) (string, error) {
	if !want {
		return "", nil
	}
	if f, ok := p.in.(*os.File); ok && term.IsTerminal(int(f.Fd())) {
		_, _ = fmt.Fprint(p.err, "password: ")
		b, err := term.ReadPassword(int(f.Fd()))
		_, _ = fmt.Fprintln(p.err)
		if err != nil {
			return "", fmt.Errorf("read the password: %w", err)
		}
		if len(b) == 0 {
			return "", usage("--password-stdin: no password was typed; without the flag the account gets a one-time password")
		}
		return string(b), nil
	}
	line, err := bufio.NewReader(io.LimitReader(p.in, 4096)).ReadString('\n')
	if err != nil && err != io.EOF {
		return "", fmt.Errorf("read the password: %w", err)
	}
	line = strings.TrimRight(line, "\r\n")
	if line == "" {
		return "", usage("--password-stdin: standard input is empty")
	}
	return line, nil
}
