package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

const (
	// refreshTimeout bounds a refresh of a login, which others wait for.
	refreshTimeout = 20 * time.Second
	// lockTimeout bounds how long they do: longer, so that they have what it brings.
	lockTimeout = 30 * time.Second
)

// login is one hub's, in a file of its own that only this user reads.
type login struct {
	client.Grant
	Server string `json:"server"`
	CA     string `json:"ca,omitempty"` // PEM; whom to trust besides the system's authorities
}

// loginFile is where the login of a server is kept.
func loginFile(p process, server string) (string, error) {
	dir := p.getenv("XDG_CONFIG_HOME")
	if home := p.getenv("HOME"); dir == "" && home != "" {
		dir = filepath.Join(home, ".config")
	}
	if dir == "" {
		return "", usage("neither HOME nor XDG_CONFIG_HOME is set: there is no place for logins")
	}
	return filepath.Join(dir, "coaphub", "logins", url.PathEscape(strings.TrimRight(strings.ToLower(server), "/"))+".json"), nil
}

// readLogin reads the login of a server. There being none is a mistake in the command line: something else was to name a token.
func readLogin(p process, server string) (in login, err error) {
	missing := usage("--server needs a token: --token, --token-file, or once coaphub login --server %s (on the hub's machine: coaphub token)", server)
	file, err := loginFile(p, server)
	if err != nil {
		return in, missing
	}
	b, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return in, missing
	}
	if err == nil {
		err = json.Unmarshal(b, &in)
	}
	if err != nil {
		return in, fmt.Errorf("read the login: %s: %w", file, err)
	}
	return in, nil
}

// lockLogin keeps other programs from replacing the login of a server, until unlock.
func lockLogin(ctx context.Context, p process, server string) (unlock func(), err error) {
	file, err := loginFile(p, server)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		return nil, fmt.Errorf("lock the login: %w", err)
	}
	f, err := os.OpenFile(file+".lock", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock the login: %w", err)
	}
	defer func() {
		if err != nil {
			_ = f.Close()
		}
	}()
	poll := time.NewTicker(20 * time.Millisecond)
	defer poll.Stop()
	late := time.NewTimer(lockTimeout)
	defer late.Stop()
	for {
		// flock goes with the process, however it ends: there are no stale locks.
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return func() { _ = f.Close() }, nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return nil, fmt.Errorf("lock the login: %w", err)
		}
		select {
		case <-poll.C:
		case <-late.C:
			return nil, &client.Error{Kind: client.Unavailable, Code: "login-busy", Message: "another coaphub does not let go of the login at " + server}
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// source gives the access tokens of a login that other programs of this user have, too. A refresh token is good once, and one
// that comes back may end the login for all (RFC 9700, Section 4.14.2): one program at a time refreshes what is newest, and the
// others take what it kept.
func (in login) source(p process) client.TokenSource {
	given := "" // the access token that this program had last: asked again, it needs another
	newest := func() (now login, good bool, err error) {
		now, err = readLogin(p, in.Server)
		if errors.As(err, new(usageError)) {
			err = &client.Error{Kind: client.Unauthenticated, Code: client.ErrLogin, Message: "the login has ended: sign in again"}
		}
		now.TLS = in.TLS
		return now, now.Access != given && (now.Expires.IsZero() || time.Until(now.Expires) > 30*time.Second), err
	}
	return func(ctx context.Context) (client.Token, error) {
		now, good, err := newest() // without the lock: the file is whole at any time
		if err == nil && !good {
			var unlock func()
			if unlock, err = lockLogin(ctx, p, in.Server); err != nil {
				return client.Token{}, err
			}
			defer unlock()
			now, good, err = newest()
		}
		if err != nil {
			return client.Token{}, err
		}
		if !good {
			now.Expires = time.Now() // whatever it says: it was refused
			late := &client.Error{Kind: client.Unavailable, Code: client.ErrUnreachable, Message: "the provider at " + now.Issuer + " gave no answer in time"}
			ctx, cancel := context.WithTimeoutCause(ctx, refreshTimeout, late)
			defer cancel()
			refresh := now.Source(func(g client.Grant) error {
				now.Grant = g
				return now.write(p)
			})
			if _, err := refresh(ctx); err != nil {
				return client.Token{}, err
			}
		}
		given = now.Access
		return now.Token, nil
	}
}

// write keeps a login, for whoever has its lock. The file is whole at any time, for those who only read it.
func (in login) write(p process) error {
	file, err := loginFile(p, in.Server)
	if err != nil {
		return err
	}
	b, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("keep the login: %w", err)
	}
	if err := writeFile(file, b, 0o600); err != nil {
		return fmt.Errorf("keep the login: %w", err)
	}
	return nil
}

func newLogin(p process) *cobra.Command {
	var server, ca, issuer, id string
	var scopes []string
	cmd := &cobra.Command{
		Use:   "login --server URL",
		Short: "Sign in at a hub elsewhere, for all later commands with --server",
		Long: "login shows a page and a code. Open the page in any browser, on any machine, sign in there and type the code. Later\n" +
			"commands with the same --server need no token then, and no --ca, until coaphub logout. The hub of this machine's data\n" +
			"folder needs no login.",
		Args: none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if server == "" {
				return usage("login needs --server; the hub of this machine's data folder needs no login")
			}
			pem, err := readCA(ca)
			if err != nil {
				return err
			}
			conf, err := trust(pem)
			if err != nil {
				return err
			}
			if issuer == "" {
				c, err := client.New(client.Config{Server: server, TLS: conf})
				if err != nil {
					return usage("--server: %q is not a URL like https://hub.example:8080", server)
				}
				defer c.Close()
				known, err := c.GetConfiguration(cmd.Context())
				if err != nil {
					return err
				}
				issuer = known.Authority
			}
			g, err := client.Login(cmd.Context(), client.Provider{Issuer: issuer, ClientID: id, TLS: conf}, scopes, func(q client.Prompt) error {
				_, err := fmt.Fprintf(p.err, "open %s\nand type %s, until %s\n", plain(q.URL), plain(q.Code), q.Expires.Local().Format("15:04:05"))
				if err == nil && q.Complete != "" {
					_, err = fmt.Fprintf(p.err, "or open %s\n", plain(q.Complete))
				}
				return err
			})
			if err != nil {
				return err
			}
			unlock, err := lockLogin(cmd.Context(), p, server)
			if err != nil {
				return err
			}
			defer unlock()
			if err := (login{Grant: g, Server: server, CA: pem}).write(p); err != nil {
				return err
			}
			_, err = fmt.Fprintln(p.out, "signed in at "+plain(server))
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&server, "server", "", "base URL of the hub's HTTP API")
	f.StringVar(&ca, "ca", "", "file with the CA of --server's certificate (PEM), besides the system's")
	f.StringVar(&issuer, "issuer", "", "OpenID provider (default the one that the hub names)")
	f.StringVar(&id, "client-id", "", "this program's client ID there (default coaphub-cli)")
	f.StringSliceVar(&scopes, "scope", []string{hub.ScopeRead, hub.ScopeWrite, hub.ScopeAdmin}, "scope to ask for; the account may have fewer")
	return cmd
}

func newLogout(p process) *cobra.Command {
	var server string
	cmd := &cobra.Command{
		Use:   "logout --server URL",
		Short: "End the login of coaphub login",
		Args:  none,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if server == "" {
				return usage("logout needs --server")
			}
			in, err := readLogin(p, server)
			var u usageError
			if errors.As(err, &u) {
				return errors.New("there is no login at " + server)
			}
			if err != nil {
				return err
			}
			if in.TLS, err = trust(in.CA); err != nil {
				return err
			}
			unlock, err := lockLogin(cmd.Context(), p, server)
			if err != nil {
				return err
			}
			defer unlock()
			// The file goes in any case; that the tokens live on is said.
			revoked := in.Revoke(cmd.Context())
			file, err := loginFile(p, server)
			if err == nil {
				err = os.Remove(file)
			}
			if err := errors.Join(err, revoked); err != nil {
				return err
			}
			_, err = fmt.Fprintln(p.out, "signed out at "+plain(server))
			return err
		},
	}
	cmd.Flags().StringVar(&server, "server", "", "base URL of the hub's HTTP API")
	return cmd
}
