package client

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"io"
	"iter"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	// maxLine bounds one element of a list and one event: content of 256 KiB in JSON, many links.
	maxLine = 16 << 20
	// maxError bounds the body of an error answer, which has the event of a command in it.
	maxError = 1 << 20
	// pageSize is how many elements of a list are asked for at once. A page is in memory before its first element is handed on:
	// the hub does not wait for readers who think about each element.
	pageSize = 200
)

// Config says which hub, and who asks.
type Config struct {
	// Server is the base URL of the hub's HTTP API, such as https://hub.example:8080.
	Server string
	// Locate replaces Server where the address may change: it is asked before the first call, and again after the hub could not
	// be reached. Nil: it does not change.
	Locate func(ctx context.Context) (server string, err error)
	// Token gives the access token. Nil: none, which is enough for Configuration only.
	Token TokenSource
	// TLS says whom to trust (RootCAs); nil: the system's authorities. A hub without a certificate of one of those has its own
	// root, which "coaphub ca root https" prints.
	TLS *tls.Config
}

// Client speaks with one hub. Any goroutine may use it; Close it at the end.
type Client struct {
	tokens *tokens // nil: none
	http   *http.Client
	locate func(ctx context.Context) (string, error)

	mu     sync.Mutex // guards server
	server string     // without a final slash; empty: ask locate
}

// New makes a client; it does not connect yet. A Server that is no http or https URL is Invalid.
func New(cfg Config) (*Client, error) {
	c := &Client{http: newHTTP(cfg.TLS), locate: cfg.Locate}
	if cfg.Token != nil {
		c.tokens = &tokens{source: cfg.Token, turn: make(chan struct{}, 1)}
	}
	if cfg.Locate == nil {
		var err error
		if c.server, err = baseURL(cfg.Server); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// newHTTP makes the client of a Client and of a login.
func newHTTP(trust *tls.Config) *http.Client {
	if trust = trust.Clone(); trust == nil {
		trust = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	return &http.Client{
		Transport: &http.Transport{
			TLSClientConfig: trust, Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, TLSHandshakeTimeout: 30 * time.Second,
			// Longer than the hub waits for any device.
			ResponseHeaderTimeout: 6 * time.Minute, IdleConnTimeout: 90 * time.Second, MaxIdleConnsPerHost: 16,
		},
		// A redirect would carry the token to wherever it points.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

func baseURL(s string) (string, error) {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" || u.User != nil {
		return "", &Error{Kind: Invalid, Code: "server-invalid", Message: strconv.Quote(s) + " is not a URL like https://hub.example:8080"}
	}
	return strings.TrimRight(s, "/"), nil
}

// Close closes connections that nobody uses. Calls that are under way go on.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// at is where the hub is.
func (c *Client) at(ctx context.Context) (string, error) {
	c.mu.Lock()
	server := c.server
	c.mu.Unlock()
	if server != "" {
		return server, nil
	}
	found, err := c.locate(ctx)
	if err != nil {
		return "", err
	}
	if found, err = baseURL(found); err != nil {
		return "", err
	}
	c.mu.Lock()
	c.server = found
	c.mu.Unlock()
	return found, nil
}

// lost forgets where the hub was, if it is looked for.
func (c *Client) lost() {
	if c.locate == nil {
		return
	}
	c.mu.Lock()
	c.server = ""
	c.mu.Unlock()
}

// Request is one call of the API as it stands in docs/api.md, for what this package has no method for.
type Request struct {
	Method string // empty: GET
	Path   string // below the server, escaped: /api/v1/…, never without its slash; DevicePath and ResourcePath make some
	Query  url.Values
	Header http.Header // Authorization is the client's; Accept is application/json by default
	Body   []byte      // in JSON, unless Header has another Content-Type; nil: none

	open bool // without a token
}

// Do makes a call and returns its answer, whose body the caller closes. An answer of 400 and above is an *Error. A token that
// the hub refuses is replaced once, if the source has another.
func (c *Client) Do(ctx context.Context, r Request) (*http.Response, error) {
	if c.tokens == nil || r.open {
		return c.once(ctx, r, "")
	}
	token, err := c.tokens.get(ctx, "")
	if err != nil {
		return nil, err
	}
	resp, err := c.once(ctx, r, token)
	// A device that answers 4.01 is Unauthenticated, too, but has had the command: another token changes nothing of that.
	if !errors.Is(err, Unauthenticated) || errors.Is(err, deviceError) {
		return resp, err
	}
	// Nothing was done (the hub looks at the token first), so asking again with another one is safe.
	next, tokenErr := c.tokens.get(ctx, token)
	if tokenErr != nil {
		return nil, tokenErr
	}
	if next == token {
		return nil, err
	}
	return c.once(ctx, r, next)
}

func (c *Client) once(ctx context.Context, r Request, token string) (*http.Response, error) {
	server, err := c.at(ctx)
	if err != nil {
		return nil, err
	}
	if !strings.HasPrefix(r.Path, "/") { // "@other.example" or ".other.example" would bring the token to another host
		return nil, &Error{Kind: Invalid, Code: "request-invalid", Message: "the request makes no sense: its path does not begin with a slash"}
	}
	target := server + r.Path
	if len(r.Query) > 0 {
		target += "?" + r.Query.Encode()
	}
	var body io.Reader
	if r.Body != nil {
		body = bytes.NewReader(r.Body)
	}
	req, err := http.NewRequestWithContext(ctx, r.Method, target, body)
	if err != nil {
		return nil, &Error{Kind: Invalid, Code: "request-invalid", Message: "the request makes no sense: " + err.Error(), Err: err}
	}
	req.Header.Set("Accept", "application/json")
	if r.Body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for name, values := range r.Header {
		req.Header[http.CanonicalHeaderKey(name)] = values
	}
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		c.lost()
		var u *url.Error
		if errors.As(err, &u) {
			err = u.Err
		}
		return nil, unreachable(server, err)
	}
	if resp.StatusCode < http.StatusMultipleChoices || resp.StatusCode == http.StatusNotModified {
		return resp, nil
	}
	defer func() { _ = resp.Body.Close() }()
	b, _ := io.ReadAll(io.LimitReader(resp.Body, maxError))
	return nil, failure(resp, b)
}

// value makes a call whose answer is one JSON document; with 304 there is none.
func value[T any, P document[T]](ctx context.Context, c *Client, r Request) (v T, header http.Header, err error) {
	resp, err := c.Do(ctx, r)
	if err != nil {
		return v, nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	if resp.StatusCode == http.StatusNotModified {
		return v, resp.Header, nil
	}
	b, err := io.ReadAll(io.LimitReader(resp.Body, maxLine))
	if err != nil {
		return v, nil, c.brokeOff(ctx, err)
	}
	v, err = decode[T, P](b)
	return v, resp.Header, err
}

// brokeOff is the error of an answer that did not come to its end.
func (c *Client) brokeOff(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	server, _ := c.at(ctx)
	c.lost()
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	if errors.Is(err, bufio.ErrTooLong) {
		return strange(err)
	}
	return &Error{Kind: Unavailable, Code: ErrUnreachable, Message: "the hub at " + server + " broke off", Err: err}
}

// list reads a list page by page: at most limit elements, 0 = all.
func list[T any, P document[T]](ctx context.Context, c *Client, path string, q url.Values, limit int) iter.Seq2[T, error] {
	return func(yield func(T, error) bool) {
		left := limit
		for cursor := ""; ; {
			ask := url.Values{}
			for name, values := range q {
				ask[name] = values
			}
			n := pageSize
			if limit > 0 {
				n = min(n, left)
			}
			ask.Set("limit", strconv.Itoa(n))
			if cursor != "" {
				ask.Set("cursor", cursor)
			}
			elements, next, err := page(ctx, c, Request{Path: path, Query: ask})
			for _, raw := range elements { // what came before a failure is handed on
				v, err := decode[T, P](raw)
				if !yield(v, err) || err != nil {
					return
				}
			}
			left -= len(elements)
			if err != nil {
				var none T
				yield(none, err)
				return
			}
			if next == "" || limit > 0 && left <= 0 {
				return
			}
			cursor = next
		}
	}
}

// page reads the elements of one answer, and the cursor to go on with: empty if that was all.
func page(ctx context.Context, c *Client, r Request) (elements []json.RawMessage, cursor string, err error) {
	resp, err := c.Do(ctx, r)
	if err != nil {
		return nil, "", err
	}
	defer func() { _ = resp.Body.Close() }()
	for raw, err := range c.Elements(resp) {
		if err != nil {
			return elements, "", err
		}
		elements = append(elements, raw)
	}
	if n := len(elements); n > 0 {
		elements[n-1], cursor, err = withoutCursor(elements[n-1])
	}
	return elements, cursor, err
}

// Elements reads an answer of Do in JSON, or as server-sent events: the elements of a list, the messages of a stream, or the
// one document that it is. What has a member "result" is that, and an "error" ends it: for a content alone (onlyContent),
// which may have such members of its own, it is the wrong reader. The caller closes the body.
func (c *Client) Elements(resp *http.Response) iter.Seq2[json.RawMessage, error] {
	return func(yield func(json.RawMessage, error) bool) {
		body := &bounded{r: resp.Body}
		next := json.NewDecoder(body).Decode
		if strings.HasPrefix(resp.Header.Get("Content-Type"), "text/event-stream") {
			next = messages(resp.Body)
		}
		for {
			body.n = 0
			var raw json.RawMessage
			if err := next(&raw); err != nil {
				var syntax *json.SyntaxError
				switch {
				case errors.Is(err, io.EOF):
					return
				case errors.As(err, &syntax):
					err = strange(err)
				default:
					err = c.brokeOff(resp.Request.Context(), err)
				}
				yield(nil, err)
				return
			}
			var element struct {
				Result json.RawMessage `json:"result"`
				Error  *status         `json:"error"`
			}
			if raw[0] == '{' {
				if err := json.Unmarshal(raw, &element); err != nil {
					yield(nil, strange(err))
					return
				}
			}
			switch {
			case element.Error != nil:
				yield(nil, element.Error.err())
				return
			case element.Result != nil:
				raw = element.Result
			}
			if !yield(raw, nil) {
				return
			}
		}
	}
}

// bounded reads so much for one document.
type bounded struct {
	r io.Reader
	n int
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.n > maxLine {
		return 0, bufio.ErrTooLong
	}
	n, err := b.r.Read(p)
	b.n += n
	return n, err
}

// messages reads the data of server-sent events: one line each, as the hub writes them.
func messages(r io.Reader) func(any) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(nil, maxLine)
	return func(v any) error {
		for lines.Scan() {
			if data, ok := bytes.CutPrefix(lines.Bytes(), []byte("data:")); ok {
				return json.Unmarshal(data, v)
			}
		}
		if err := lines.Err(); err != nil {
			return err
		}
		return io.EOF
	}
}

// withoutCursor takes the cursor out of the last element of a page: it is of the page, not of what the element is about.
func withoutCursor(raw json.RawMessage) (json.RawMessage, string, error) {
	var members map[string]json.RawMessage
	if err := json.Unmarshal(raw, &members); err != nil {
		return raw, "", strange(err)
	}
	var cursor string
	if members["cursor"] == nil || json.Unmarshal(members["cursor"], &cursor) != nil {
		return raw, "", nil
	}
	// The hub has it last; the others stay in their order.
	if rest, ok := bytes.CutSuffix(raw, slices.Concat([]byte(`,"cursor":`), members["cursor"], []byte("}"))); ok {
		return append(rest, '}'), cursor, nil
	}
	delete(members, "cursor")
	raw, err := encode(members)
	return raw, cursor, err
}

// encode writes members as they came.
func encode(members map[string]json.RawMessage) (json.RawMessage, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	err := enc.Encode(members)
	return bytes.TrimSpace(b.Bytes()), err
}

// DevicePath is the API's path of a device, or what is below it, escaped.
func DevicePath(deviceID string, below ...string) string {
	path := "/api/v1/devices/" + url.PathEscape(deviceID)
	for _, s := range below {
		path += "/" + s
	}
	return path
}

// ResourcePath is the API's path of a resource, escaped. kind is "resources" or "resource-links". An href that is empty or
// only slashes is Invalid: its path would be that of all resources.
func ResourcePath(deviceID, kind, href string) (string, error) {
	segments := strings.FieldsFunc(href, func(r rune) bool { return r == '/' }) // the hub takes a run of slashes for one, too
	if len(segments) == 0 {
		return "", &Error{Kind: Invalid, Code: "href-invalid", Message: "the href is empty"}
	}
	slash := "/"
	for i := max(len(segments)-2, 1); i < len(segments); i++ {
		// Behind an href these would name its events and its commands; with its slashes escaped the href is one segment.
		if s := segments[i]; s == "events" || s == "pending-commands" {
			slash = "%2F"
		}
	}
	for i, s := range segments {
		segments[i] = url.PathEscape(s)
	}
	return DevicePath(deviceID, kind, strings.Join(segments, slash)), nil
}
