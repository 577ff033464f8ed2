package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

// apiFlags are where the hub is and who asks: the hub of this data folder, or any with --server and a token or a login.
type apiFlags struct {
	server, token, tokenFile, ca string
	asJSON                       bool
}

func (f *apiFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.server, "server", "", "base URL of a hub's HTTP API (default the hub of this data folder)")
	cmd.Flags().StringVar(&f.token, "token", "", "access token for --server (default "+bundle.EnvToken+", else the login of coaphub login); other users of this machine may see it")
	cmd.Flags().StringVar(&f.tokenFile, "token-file", "", "file with the access token for --server; - is standard input")
	cmd.Flags().StringVar(&f.ca, "ca", "", "file with the CA of --server's certificate (PEM), besides the system's")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print JSON, one object a line")
}

// open makes a client of the hub. Scopes are what a token of this data folder's hub is for.
func (f *apiFlags) open(cmd *cobra.Command, p process, scopes ...string) (*client.Client, error) {
	if f.server == "" {
		if f.token != "" || f.tokenFile != "" || f.ca != "" {
			return nil, usage("--token, --token-file and --ca belong to --server")
		}
		return openLocal(cmd, scopes)
	}
	cfg, err := f.elsewhere(p)
	if err != nil {
		return nil, err
	}
	c, err := client.New(cfg)
	if err != nil {
		return nil, f.malformed()
	}
	return c, nil
}

func (f *apiFlags) malformed() error {
	return usage("--server: %q is not a URL like https://hub.example:8080", f.server)
}

// elsewhere says where the hub of --server is, and who asks.
func (f *apiFlags) elsewhere(p process) (cfg client.Config, err error) {
	token, err := f.givenToken(p)
	if err != nil {
		return cfg, err
	}
	ca, err := readCA(f.ca)
	if err != nil {
		return cfg, err
	}
	cfg = client.Config{Server: f.server, Token: client.Static(token)}
	if token == "" {
		in, err := readLogin(p, f.server)
		if err != nil {
			return cfg, err
		}
		if ca == "" {
			ca = in.CA
		}
		if in.TLS, err = trust(ca); err != nil {
			return cfg, err
		}
		cfg.Token = in.source(p)
	}
	cfg.TLS, err = trust(ca)
	return cfg, err
}

// givenToken is the token that the command line or the environment has, empty if none.
func (f *apiFlags) givenToken(p process) (string, error) {
	var b []byte
	var err error
	switch {
	case f.token != "" && f.tokenFile != "":
		return "", usage("--token and --token-file exclude each other")
	case f.token != "":
		return f.token, nil
	case f.tokenFile == "-":
		b, err = io.ReadAll(io.LimitReader(p.in, 64<<10))
	case f.tokenFile != "":
		b, err = os.ReadFile(f.tokenFile)
	default:
		return strings.TrimSpace(p.getenv(bundle.EnvToken)), nil
	}
	if err != nil {
		return "", fmt.Errorf("read the token: %w", err)
	}
	token := strings.TrimSpace(string(b))
	if token == "" {
		return "", usage("--token-file: there is no token in it")
	}
	return token, nil
}

// readCA reads a file of certificates; no name gives none.
func readCA(file string) (string, error) {
	if file == "" {
		return "", nil
	}
	pem, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the CA: %w", err)
	}
	if !x509.NewCertPool().AppendCertsFromPEM(pem) {
		return "", fmt.Errorf("--ca: %s has no certificate", file)
	}
	return string(pem), nil
}

// trust is the system's authorities and those of ca (PEM); nil if there is none.
func trust(ca string) (*tls.Config, error) {
	if ca == "" {
		return nil, nil
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM([]byte(ca)) {
		return nil, fmt.Errorf("the CA of the hub's certificate is not PEM")
	}
	return &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, nil
}

// openLocal makes a client of the hub of this data folder. Its ports may change when it restarts, and its tokens are short:
// both are asked for again when need be.
func openLocal(cmd *cobra.Command, scopes []string) (*client.Client, error) {
	c, err := control(cmd)
	if err != nil {
		return nil, err
	}
	s, err := c.Status(cmd.Context())
	if err != nil {
		return nil, err
	}
	if s.Endpoints.OAuth == "" {
		return nil, &hub.Error{
			Kind: hub.Precondition, Code: "no-embedded-provider",
			Text: "the hub's tokens come from another provider: sign in with coaphub login --server " + s.Endpoints.HTTP + ", then use --server",
		}
	}
	cfg := client.Config{
		Locate: func(ctx context.Context) (string, error) {
			s, err := c.Status(ctx)
			return s.Endpoints.HTTP, gone(err)
		},
		Token: func(ctx context.Context) (client.Token, error) {
			t, err := c.Token(ctx, bundle.TokenRequest{Scopes: scopes, TTL: 5 * time.Minute})
			return client.Token{Access: t.AccessToken, Expires: t.ExpiresAt}, gone(err)
		},
	}
	if strings.HasPrefix(s.Endpoints.HTTP, "https:") {
		pem, err := c.Root(cmd.Context(), "https")
		if err != nil {
			return nil, err
		}
		if cfg.TLS, err = trust(pem); err != nil {
			return nil, err
		}
	}
	return client.New(cfg)
}

// gone makes of a hub that does not answer on its socket what a client takes for one: it may come back.
func gone(err error) error {
	if !hub.IsKind(err, hub.Unavailable) {
		return err
	}
	code, text := hub.Public(err)
	return &client.Error{Kind: client.Unavailable, Code: client.Code(code), Message: text, Err: err}
}

// lines prints what a list brought: as the hub sent it if asJSON, else by row.
func lines[T any](p process, asJSON bool, seq func(func(T, error) bool), raw func(*T) json.RawMessage, row func(*T)) error {
	for v, err := range seq {
		if err != nil {
			return err
		}
		if !asJSON {
			row(&v)
			continue
		}
		if err := line(p.out, raw(&v)); err != nil {
			return err
		}
	}
	return nil
}

// line prints one JSON document as it came, for scripts.
func line(w io.Writer, raw json.RawMessage) error {
	_, err := fmt.Fprintf(w, "%s\n", raw)
	return err
}

// deviceArg checks a device's ID, so that a slip is not taken for a strange answer.
func deviceArg(id string) (string, error) {
	dev, err := hub.ParseDeviceID(id)
	if err != nil {
		return "", usage("%q is not a device ID (a UUID); coaphub devices lists them", id)
	}
	return string(dev), nil
}

func hrefArg(href string) (string, error) {
	h, err := hub.ParseHref(href)
	if err != nil {
		_, text := hub.Public(err)
		return "", usage("%q: %s", href, text)
	}
	return string(h), nil
}

// resourceArgs reads [DEVICE [HREF]]; what is missing is empty.
func resourceArgs(args []string) (device, href string, err error) {
	if len(args) > 0 {
		if device, err = deviceArg(args[0]); err != nil {
			return "", "", err
		}
	}
	if len(args) > 1 {
		href, err = hrefArg(args[1])
	}
	return device, href, err
}

// about is a device, one of its resources, or with neither everything, as queries have it.
func about(device, href string) (devices []string, resources []client.ResourceID) {
	switch {
	case href != "":
		return nil, []client.ResourceID{{DeviceID: device, Href: href}}
	case device != "":
		return []string{device}, nil
	}
	return nil, nil
}

// completeResources completes a device's ID, with its name beside it, and then an href: nobody types a UUID. A shell waits for
// it, so it gives up soon, and says nothing when there is no hub.
func completeResources(f *apiFlags, p process) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) (found []string, _ cobra.ShellCompDirective) {
		const none = cobra.ShellCompDirectiveNoFileComp
		if len(args) > 1 || f.tokenFile == "-" {
			return nil, none
		}
		ctx, cancel := context.WithTimeout(cmd.Context(), 2*time.Second)
		defer cancel()
		cmd.SetContext(ctx)
		c, err := f.open(cmd, p, hub.ScopeRead)
		if err != nil {
			return nil, none
		}
		defer c.Close()
		add := func(text, about string) {
			if strings.HasPrefix(text, begun) {
				found = append(found, cobra.CompletionWithDesc(plain(text), plain(about)))
			}
		}
		if len(args) == 0 { // what was read until an error is better than nothing
			for d, err := range c.ListDevices(ctx, client.DeviceQuery{}) {
				if err != nil {
					break
				}
				add(d.ID, d.Name)
			}
			return found, none
		}
		for r, err := range c.ListResources(ctx, client.ResourceQuery{DeviceIDs: args[:1]}) {
			if err != nil {
				break
			}
			if r.Data != nil {
				add(r.Data.Resource.Href, "")
			}
		}
		return found, none
	}
}
