package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"mime"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/coaphub/coaphub/client"
	"github.com/coaphub/coaphub/hub"
)

// maxAnswer bounds a body, and the hub's description.
const maxAnswer = 16 << 20

func newCall(p process) *cobra.Command {
	var f apiFlags
	var body, contentType, accept string
	var headers []string
	cmd := &cobra.Command{
		Use:   "call [OPERATION | METHOD PATH] [NAME=VALUE …]",
		Short: "Make any call of the API",
		Long: "call makes a call of the API and shows the answer: by its operation, whose parameters (in path, query or header) are\n" +
			"NAME=VALUE, or by method and path, with NAME=VALUE for the query. A name may be repeated for several values. Without\n" +
			"arguments it lists the operations that the hub has; docs/api.md and the hub's page /api/v1/docs describe them.",
		Example: "  coaphub call getResource deviceId=46239566-ce3e-558c-936e-94e34a3c62b5 href=/light/1 twin=false\n" +
			"  coaphub call GET /api/v1/devices statusFilter=ONLINE\n" +
			"  coaphub call addAccount --body '{\"name\":\"carol\",\"roles\":[\"user\"]}'",
		Args: cobra.ArbitraryArgs, ValidArgsFunction: completeOperations(&f, p),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := f.open(cmd, p) // all scopes that the caller may have
			if err != nil {
				return err
			}
			defer c.Close()
			if len(args) == 0 {
				return listOperations(cmd, p, c, f.asJSON)
			}
			r := client.Request{Header: http.Header{"Accept": {"application/json"}}}
			if method := args[0]; method == strings.ToUpper(method) {
				if len(args) < 2 || !strings.HasPrefix(args[1], "/") {
					return usage("write a path behind %s, such as /api/v1/devices", method)
				}
				r.Method, r.Path = method, args[1]
				if r.Query, err = pairs(args[2:]); err != nil {
					return err
				}
			} else {
				ops, err := operations(cmd, c)
				if err != nil {
					return err
				}
				i := slices.IndexFunc(ops, func(o operation) bool { return o.ID == args[0] })
				if i < 0 {
					return usage("the hub has no operation %q; coaphub call lists them", args[0])
				}
				given, err := pairs(args[1:])
				if err != nil {
					return err
				}
				if err := ops[i].fill(&r, given); err != nil {
					return err
				}
			}
			if cmd.Flags().Changed("body") {
				if r.Body, err = bodyArg(p, body); err != nil {
					return err
				}
				r.Header.Set("Content-Type", contentType)
			}
			if accept != "" {
				r.Header.Set("Accept", accept)
			}
			for _, h := range headers {
				name, value, ok := strings.Cut(h, ":")
				if !ok {
					return usage("--header: %q is not NAME: VALUE", h)
				}
				r.Header.Add(name, strings.TrimSpace(value))
			}
			// A path may have its query with it; names behind it are added.
			if path, query, ok := strings.Cut(r.Path, "?"); ok {
				more, err := url.ParseQuery(query)
				if err != nil {
					return usage("%q has no good query: %w", r.Path, err)
				}
				for name, values := range r.Query {
					more[name] = append(more[name], values...)
				}
				r.Path, r.Query = path, more
			}
			resp, err := c.Do(cmd.Context(), r)
			if err != nil {
				return err
			}
			defer func() { _ = resp.Body.Close() }()
			err = showAnswer(p, c, resp, f.asJSON)
			if err != nil && cmd.Context().Err() != nil && kindOfAnswer(resp) == stream {
				return nil // it was interrupted, which is how it ends
			}
			return err
		},
	}
	f.add(cmd)
	cmd.Flags().StringVar(&body, "body", "", "body of the call; - is standard input, @FILE a file")
	cmd.Flags().StringVar(&contentType, "content-type", "application/json", "what --body is")
	cmd.Flags().StringVar(&accept, "accept", "", "what the answer shall be, for example application/protojson")
	cmd.Flags().StringArrayVar(&headers, "header", nil, "a further header, as NAME: VALUE; may be repeated")
	return cmd
}

// pairs reads NAME=VALUE.
func pairs(args []string) (url.Values, error) {
	v := url.Values{}
	for _, a := range args {
		name, value, ok := strings.Cut(a, "=")
		if !ok || name == "" {
			return nil, usage("%q is not NAME=VALUE", a)
		}
		v.Add(name, value)
	}
	return v, nil
}

func bodyArg(p process, arg string) ([]byte, error) {
	if arg == "-" {
		b, err := io.ReadAll(io.LimitReader(p.in, maxAnswer))
		if err != nil {
			return nil, fmt.Errorf("read the body: %w", err)
		}
		return b, nil
	}
	if name, ok := strings.CutPrefix(arg, "@"); ok {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read the body: %w", err)
		}
		return b, nil
	}
	return []byte(arg), nil
}

// operation is one call of the API, as the hub's own description has it: the hub may be newer or older than this program.
type operation struct {
	ID         string
	Method     string
	Path       string
	Summary    string
	Parameters []parameter
}

type parameter struct {
	Ref  string `json:"$ref"`
	Name string `json:"name"`
	In   string `json:"in"`
}

// operations reads the hub's OpenAPI document.
func operations(cmd *cobra.Command, c *client.Client) ([]operation, error) {
	resp, err := c.Do(cmd.Context(), client.Request{Path: "/api/v1/openapi.json"})
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	var doc struct {
		Paths      map[string]map[string]json.RawMessage `json:"paths"`
		Components struct {
			Parameters map[string]parameter `json:"parameters"`
		} `json:"components"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&doc); err != nil {
		return nil, fmt.Errorf("read the hub's description: %w", err)
	}
	resolve := func(ps []parameter) []parameter {
		for i, q := range ps {
			if name, ok := strings.CutPrefix(q.Ref, "#/components/parameters/"); ok {
				ps[i] = doc.Components.Parameters[name]
			}
		}
		return ps
	}
	var ops []operation
	for _, path := range slices.Sorted(maps.Keys(doc.Paths)) {
		var common []parameter
		if raw := doc.Paths[path]["parameters"]; raw != nil {
			if err := json.Unmarshal(raw, &common); err != nil {
				return nil, fmt.Errorf("read the hub's description of %s: %w", path, err)
			}
		}
		for _, method := range []string{"get", "post", "put", "patch", "delete"} {
			raw := doc.Paths[path][method]
			if raw == nil {
				continue
			}
			var o struct {
				ID         string      `json:"operationId"`
				Summary    string      `json:"summary"`
				Parameters []parameter `json:"parameters"`
			}
			if err := json.Unmarshal(raw, &o); err != nil {
				return nil, fmt.Errorf("read the hub's description of %s: %w", path, err)
			}
			ops = append(ops, operation{o.ID, strings.ToUpper(method), path, o.Summary, resolve(slices.Concat(common, o.Parameters))})
		}
	}
	return ops, nil
}

// fill makes the request of an operation with these parameters.
func (o operation) fill(r *client.Request, given url.Values) error {
	r.Method, r.Path, r.Query = o.Method, o.Path, url.Values{}
	for name, values := range given {
		i := slices.IndexFunc(o.Parameters, func(q parameter) bool { return q.Name == name }) // etag and ETag are two
		if i < 0 {
			i = slices.IndexFunc(o.Parameters, func(q parameter) bool { return strings.EqualFold(q.Name, name) })
		}
		if i < 0 {
			return usage("%s has no parameter %q; it has %s", o.ID, name, o.names())
		}
		switch q := o.Parameters[i]; q.In {
		case "path":
			if len(values) > 1 || values[0] == "" {
				return usage("%s has one value", q.Name)
			}
			text := url.PathEscape(values[0])
			if q.Name == "href" { // the path has its leading slash; %2F keeps its last segments from being taken for something else
				text = url.PathEscape(strings.Trim(values[0], "/"))
			}
			r.Path = strings.ReplaceAll(r.Path, "{"+q.Name+"}", text)
		case "header":
			r.Header[http.CanonicalHeaderKey(q.Name)] = values
		default:
			r.Query[q.Name] = values
		}
	}
	if _, rest, ok := strings.Cut(r.Path, "{"); ok {
		name, _, _ := strings.Cut(rest, "}")
		return usage("%s needs %s=VALUE", o.ID, name)
	}
	return nil
}

// names lists the parameters, those of the path first.
func (o operation) names() string {
	var names []string
	for _, q := range o.Parameters {
		names = append(names, q.Name)
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

func listOperations(cmd *cobra.Command, p process, c *client.Client, asJSON bool) error {
	ops, err := operations(cmd, c)
	if err != nil {
		return err
	}
	t := newTable(p.out, "OPERATION", "METHOD", "PATH", "WHAT")
	for _, o := range ops {
		if !asJSON {
			t.row(o.ID, o.Method, o.Path, o.Summary)
			continue
		}
		names := make([]string, 0, len(o.Parameters))
		for _, q := range o.Parameters {
			names = append(names, q.Name)
		}
		b, err := json.Marshal(map[string]any{"operation": o.ID, "method": o.Method, "path": o.Path, "summary": o.Summary, "parameters": names})
		if err == nil {
			err = line(p.out, b)
		}
		if err != nil {
			return err
		}
	}
	if asJSON {
		return nil
	}
	return t.end()
}

// showAnswer prints an answer: JSON in lines of its own for people and one object a line for scripts, lists and streams as
// they come, and everything else, contents alone too, as it stands. On a terminal all of it is plain.
func showAnswer(p process, c *client.Client, resp *http.Response, asJSON bool) error {
	write := func(r io.Reader) error {
		_, err := io.Copy(p.out, r)
		return err
	}
	if terminal(p.out) {
		write = func(r io.Reader) error { return copyPlain(p.out, r) }
	}
	kind := kindOfAnswer(resp)
	structured := kind == stream || strings.HasSuffix(kind, "json") || strings.HasSuffix(kind, "jsonpb")
	if !structured || resp.Request.URL.Query().Get("onlyContent") != "" {
		return write(resp.Body)
	}
	for raw, err := range c.Elements(resp) {
		if err != nil {
			return err
		}
		var b bytes.Buffer
		if asJSON {
			err = json.Compact(&b, raw)
		} else {
			err = json.Indent(&b, raw, "", "  ")
		}
		if err == nil {
			b.WriteByte('\n')
			err = write(&b)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// stream is the kind of an answer that goes on until it is interrupted.
const stream = "text/event-stream"

// kindOfAnswer is the media type of an answer, without parameters.
func kindOfAnswer(resp *http.Response) string {
	kind, _, _ := mime.ParseMediaType(resp.Header.Get("Content-Type"))
	return kind
}

// completeOperations completes the name of an operation and then its parameters.
func completeOperations(f *apiFlags, p process) cobra.CompletionFunc {
	return func(cmd *cobra.Command, args []string, begun string) (found []string, _ cobra.ShellCompDirective) {
		const none = cobra.ShellCompDirectiveNoFileComp
		c, err := f.open(cmd, p, hub.ScopeRead)
		if err != nil {
			return nil, none
		}
		defer c.Close()
		ops, err := operations(cmd, c)
		if err != nil {
			return nil, none
		}
		for _, o := range ops {
			switch {
			case len(args) == 0 && strings.HasPrefix(o.ID, begun):
				found = append(found, cobra.CompletionWithDesc(o.ID, o.Summary))
			case len(args) > 0 && o.ID == args[0]:
				for _, q := range o.Parameters {
					if strings.HasPrefix(q.Name, begun) {
						found = append(found, q.Name+"=")
					}
				}
				return found, none | cobra.ShellCompDirectiveNoSpace
			}
		}
		return found, none
	}
}
