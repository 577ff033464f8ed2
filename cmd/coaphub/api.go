package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/coaphub/coaphub/bundle"
	"github.com/coaphub/coaphub/hub"
)

// api is a client of a hub's HTTP API: of the hub of this data folder, or of any with --server and a token.
type api struct {
	base  string
	token string
	http  *http.Client
}

// apiFlags are where the hub is and who asks.
type apiFlags struct {
	server, token, tokenFile, ca string
	asJSON                       bool
}

func (f *apiFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.server, "server", "", "base URL of a hub's HTTP API (default the hub of this data folder)")
	cmd.Flags().StringVar(&f.token, "token", "", "access token for --server; other users of this machine may see it, see --token-file")
	cmd.Flags().StringVar(&f.tokenFile, "token-file", "", "file with the access token for --server; - is standard input")
	cmd.Flags().StringVar(&f.ca, "ca", "", "file with the CA of --server's certificate (PEM), besides the system's")
	cmd.Flags().BoolVar(&f.asJSON, "json", false, "print JSON, one object a line")
}

// open finds the hub and gets a token.
func (f *apiFlags) open(cmd *cobra.Command, p process, scopes ...string) (*api, error) {
	if f.server == "" {
		if f.token != "" || f.tokenFile != "" {
			return nil, usage("--token and --token-file belong to --server")
		}
		return openLocal(cmd, scopes)
	}
	u, err := url.Parse(f.server)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, usage("--server: %q is not a URL like https://hub.example:8080", f.server)
	}
	token := f.token
	switch f.tokenFile {
	case "":
	case "-":
		b, err := io.ReadAll(io.LimitReader(p.in, 64<<10))
		if err != nil {
			return nil, fmt.Errorf("read the token: %w", err)
		}
		token = strings.TrimSpace(string(b))
	default:
		b, err := os.ReadFile(f.tokenFile)
		if err != nil {
			return nil, fmt.Errorf("read the token: %w", err)
		}
		token = strings.TrimSpace(string(b))
	}
	if token == "" {
		return nil, usage("--server needs a token: --token or --token-file (on the hub's machine: coaphub token)")
	}
	var pool *x509.CertPool
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return nil, fmt.Errorf("read the CA: %w", err)
		}
		if pool, err = x509.SystemCertPool(); err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--ca: %s has no certificate", f.ca)
		}
	}
	return newAPI(f.server, token, pool), nil
}

func openLocal(cmd *cobra.Command, scopes []string) (*api, error) {
	c, err := control(cmd)
	if err != nil {
		return nil, err
	}
	s, err := c.Status(cmd.Context())
	if err != nil {
		return nil, err
	}
	t, err := c.Token(cmd.Context(), bundle.TokenRequest{Scopes: scopes, TTL: 5 * time.Minute})
	if code, text := hub.Public(err); code == "no-embedded-provider" {
		return nil, &hub.Error{Kind: hub.Precondition, Code: code, Text: text + "; get one there, and name it with --server " + s.Endpoints.HTTP + " --token-file FILE", Err: err}
	}
	if err != nil {
		return nil, err
	}
	var pool *x509.CertPool
	if strings.HasPrefix(s.Endpoints.HTTP, "https:") {
		pem, err := c.Root(cmd.Context(), "https")
		if err != nil {
			return nil, err
		}
		pool = x509.NewCertPool()
		pool.AppendCertsFromPEM([]byte(pem))
	}
	return newAPI(s.Endpoints.HTTP, t.AccessToken, pool), nil
}

func newAPI(base, token string, pool *x509.CertPool) *api {
	return &api{strings.TrimRight(base, "/"), token, &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}, Proxy: http.ProxyFromEnvironment,
			// Longer than the hub waits for any device.
			ResponseHeaderTimeout: 6 * time.Minute, DisableKeepAlives: true,
		},
		// A redirect would carry the token to wherever it points.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
}

// failure is the body of an error answer, and the error in a stream.
type failure struct {
	Code    int    `json:"code"`
	Message string `json:"message"`
	Details []struct {
		Reason string `json:"reason"`
	} `json:"details"`
}

func (f failure) err() error {
	e := &hub.Error{Kind: hub.Invalid, Code: "hub-refused", Text: f.Message}
	switch codes.Code(f.Code) {
	case codes.NotFound:
		e.Kind = hub.NotFound
	case codes.Unauthenticated:
		e.Kind = hub.Unauthenticated
	case codes.Unavailable, codes.ResourceExhausted:
		e.Kind = hub.Unavailable
	}
	for _, d := range f.Details {
		if d.Reason != "" {
			e.Code = d.Reason
		}
	}
	return e
}

// maxLine bounds one element of a list: content of 256 KiB, in JSON.
const maxLine = 4 << 20

// request asks the hub; a body comes in JSON, header is further names and values. An answer that is no success is an error.
func (a *api) request(ctx context.Context, method, path, accept string, body []byte, header ...string) (*http.Response, error) {
	r, err := http.NewRequestWithContext(ctx, method, a.base+path, bytes.NewReader(body))
	if err != nil {
		return nil, usage("%s: %w", a.base, err)
	}
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	r.Header.Set("Authorization", "Bearer "+a.token)
	r.Header.Set("Accept", accept)
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	resp, err := a.http.Do(r)
	if err != nil {
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, &hub.Error{Kind: hub.Unavailable, Code: "hub-unreachable", Text: "the hub at " + a.base + " cannot be reached: " + err.Error(), Err: err}
	}
	if resp.StatusCode == http.StatusOK {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	var f failure
	b, _ := io.ReadAll(io.LimitReader(resp.Body, 64<<10))
	if err := json.Unmarshal(b, &f); err != nil || f.Message == "" {
		return nil, &hub.Error{Kind: hub.Invalid, Code: "hub-refused", Text: "the hub answered " + resp.Status}
	}
	return nil, f.err()
}

// each reads a list or a single object and hands on each element. An error in the middle of a list ends it.
func (a *api) each(ctx context.Context, path string, do func(json.RawMessage) error) error {
	return a.call(ctx, http.MethodGet, path, nil, do)
}

// call is each for any method, with a body in JSON if it is not nil.
func (a *api) call(ctx context.Context, method, path string, body []byte, do func(json.RawMessage) error) error {
	resp, err := a.request(ctx, method, path, "application/json", body)
	if err != nil {
		return err
	}
	defer func() { _ = resp.Body.Close() }()
	lines := bufio.NewScanner(resp.Body)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		if len(bytes.TrimSpace(lines.Bytes())) == 0 {
			continue
		}
		var element struct {
			Result json.RawMessage `json:"result"`
			Error  *failure        `json:"error"`
		}
		if err := json.Unmarshal(lines.Bytes(), &element); err != nil {
			return fmt.Errorf("the hub's answer is not JSON: %w", err)
		}
		switch {
		case element.Error != nil:
			return element.Error.err()
		case element.Result == nil: // one object, not an element of a list
			element.Result = bytes.Clone(lines.Bytes())
		}
		if err := do(element.Result); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("the hub's answer was cut short: %w", err)
	}
	return nil
}

// line prints an element as it came, for scripts.
func line(w io.Writer) func(json.RawMessage) error {
	return func(m json.RawMessage) error {
		_, err := fmt.Fprintf(w, "%s\n", bytes.TrimSpace(m))
		return err
	}
}

// devicePath is the API's path of a device; the ID is checked, so that a slip is not taken for a strange answer.
func devicePath(id string) (string, error) {
	dev, err := hub.ParseDeviceID(id)
	if err != nil {
		return "", usage("%q is not a device ID (a UUID); coaphub devices lists them", id)
	}
	return "/api/v1/devices/" + string(dev), nil
}

// hrefPath is a resource's href in a path. Its slashes stay; everything else that means something in a URL is escaped.
func hrefPath(href string) (string, error) {
	h, err := hub.ParseHref(href)
	if err != nil {
		_, text := hub.Public(err)
		return "", usage("%q: %s", href, text)
	}
	var b strings.Builder
	for seg := range strings.SplitSeq(strings.TrimPrefix(string(h), "/"), "/") {
		b.WriteByte('/')
		b.WriteString(url.PathEscape(seg))
	}
	return b.String(), nil
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
		a, err := f.open(cmd, p, hub.ScopeRead)
		if err != nil {
			return nil, none
		}
		path := "/api/v1/devices"
		if len(args) == 1 {
			if path, err = devicePath(args[0]); err != nil {
				return nil, none
			}
			path += "/resources"
		}
		_ = a.each(ctx, path, func(m json.RawMessage) error { // what was read until an error is better than nothing
			var one struct {
				ID   string `json:"id"`
				Name string `json:"name"`
				Data change `json:"data"`
			}
			if err := json.Unmarshal(m, &one); err != nil {
				return err
			}
			text := one.ID
			if len(args) == 1 {
				text = one.Data.ResourceID.Href
			}
			if !strings.HasPrefix(text, begun) {
				return nil
			}
			found = append(found, cobra.CompletionWithDesc(plain(text), plain(one.Name)))
			return nil
		})
		return found, none
	}
}
