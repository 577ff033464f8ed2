// Package openapitest checks answers of the HTTP API against its OpenAPI description, for the tests of the door and those
// that see the hub from outside.
//
// It must not know how the API is served: it sees requests and answers only.
package openapitest

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"github.com/fxamacker/cbor/v2"
	"github.com/getkin/kin-openapi/openapi3"
	"github.com/klauspost/compress/zstd"
)

// Checker checks answers. It is safe for concurrent use.
type Checker struct {
	doc   *openapi3.T
	paths []path // most specific first
}

type path struct {
	template string
	match    *regexp.Regexp
	item     *openapi3.PathItem
}

// literal is how much of the template is no variable.
func (p path) literal() int {
	return len(regexp.MustCompile(`\{[^}]*\}`).ReplaceAllString(p.template, ""))
}

// New reads a description, as /api/v1/openapi.json serves it. It must be valid OpenAPI.
//
// Clients should pass over members they do not know, so the description leaves its objects open; the checker closes every
// object that names its members, so that a member nobody described is found.
func New(description []byte) (*Checker, error) {
	loader := openapi3.NewLoader()
	doc, err := loader.LoadFromData(description)
	if err != nil {
		return nil, fmt.Errorf("load the description: %w", err)
	}
	if err := doc.Validate(loader.Context); err != nil {
		return nil, fmt.Errorf("validate the description: %w", err)
	}
	c := &Checker{doc: doc}
	closed := map[*openapi3.Schema]bool{}
	for template, item := range doc.Paths.Map() {
		// An href may hold slashes, and so may base64.
		pattern := regexp.MustCompile(`\\\{[^}]*\\\}`).ReplaceAllStringFunc(regexp.QuoteMeta(template), func(v string) string {
			if strings.Contains(v, "href") || strings.Contains(v, "request") {
				return ".+"
			}
			return "[^/]+"
		})
		c.paths = append(c.paths, path{template, regexp.MustCompile("^" + pattern + "/*$"), item})
		for _, op := range item.Operations() {
			for _, r := range op.Responses.Map() {
				for _, m := range r.Value.Content {
					closeObjects(m.Schema, closed)
				}
			}
		}
	}
	slices.SortFunc(c.paths, func(a, b path) int { return b.literal() - a.literal() }) // …/{href}/events before …/{href}
	return c, nil
}

func closeObjects(ref *openapi3.SchemaRef, done map[*openapi3.Schema]bool) {
	if ref == nil || ref.Value == nil || done[ref.Value] {
		return
	}
	s := ref.Value
	done[s] = true
	if len(s.Properties) > 0 && s.AdditionalProperties.Has == nil && s.AdditionalProperties.Schema == nil {
		no := false
		s.AdditionalProperties.Has = &no
	}
	for _, p := range s.Properties {
		closeObjects(p, done)
	}
	closeObjects(s.Items, done)
	for _, list := range []openapi3.SchemaRefs{s.OneOf, s.AnyOf, s.AllOf} {
		for _, r := range list {
			closeObjects(r, done)
		}
	}
}

// Operations lists the described operations as "METHOD template".
func (c *Checker) Operations() []string {
	var out []string
	for _, p := range c.paths {
		for m := range p.item.Operations() {
			out = append(out, m+" "+p.template)
		}
	}
	slices.Sort(out)
	return out
}

// Operation returns the operation of a method and an escaped path, nil if none is described.
func (c *Checker) Operation(method, escapedPath string) *openapi3.Operation {
	op, _ := c.find(method, escapedPath)
	return op
}

// Name returns the operation of a method and an escaped path as Operations has it, empty if none is described.
func (c *Checker) Name(method, escapedPath string) string {
	op, template := c.find(method, escapedPath)
	if op == nil {
		return ""
	}
	if method == http.MethodHead {
		method = http.MethodGet
	}
	return method + " " + template
}

func (c *Checker) find(method, escapedPath string) (op *openapi3.Operation, template string) {
	if method == http.MethodHead {
		method = http.MethodGet
	}
	for _, p := range c.paths {
		if p.match.MatchString(escapedPath) {
			// The last segment decides between an href and what is below it.
			return p.item.GetOperation(method), p.template
		}
	}
	return nil, ""
}

// Check reports what is wrong with an answer. Requests that no operation describes must be answered with an error. body is
// the whole body as it came, perhaps compressed.
func (c *Checker) Check(method string, target *url.URL, status int, header http.Header, body []byte) error {
	escapedPath := target.EscapedPath()
	var response *openapi3.Response
	if op := c.Operation(method, escapedPath); op != nil {
		if r := op.Responses.Status(status); r != nil {
			response = r.Value
		} else if d := op.Responses.Default(); d != nil && status >= 400 {
			response = d.Value
		}
		if response == nil {
			return fmt.Errorf("%s %s: status %d is not described", method, escapedPath, status)
		}
	} else {
		if method == http.MethodOptions && status == http.StatusNoContent && header.Get("Access-Control-Allow-Origin") != "" && len(body) == 0 {
			return nil // a preflight is between a browser and the hub (Fetch, Section 4.8), not a call of the API
		}
		if status < 400 {
			return fmt.Errorf("%s %s: answered with %d, but no operation describes it", method, escapedPath, status)
		}
		response = c.doc.Components.Responses["Error"].Value
	}
	fail := func(err error) error {
		return fmt.Errorf("%s %s: answer %d: %w", method, escapedPath, status, err)
	}
	for name, h := range response.Headers {
		if v := header.Get(name); v != "" {
			if err := h.Value.Schema.Value.VisitJSON(v); err != nil {
				return fail(fmt.Errorf("header %s: %w", name, err))
			}
		}
	}
	if len(response.Content) == 0 {
		if len(body) > 0 {
			return fail(errors.New("a body where none is described"))
		}
		return nil
	}
	if status == http.StatusSwitchingProtocols { // what is described are the messages, see CheckMessage
		return nil
	}
	mediaType, _, err := mime.ParseMediaType(header.Get("Content-Type"))
	if err != nil {
		return fail(fmt.Errorf("content type: %w", err))
	}
	media := response.Content[mediaType]
	if media == nil {
		return fail(fmt.Errorf("content type %s is not described", mediaType))
	}
	if method == http.MethodHead || media.Schema == nil { // pages for people are no JSON
		return nil
	}
	if body, err = decompress(header.Get("Content-Encoding"), body); err != nil {
		return fail(err)
	}
	schema := media.Schema.Value
	// Any JSON value may be a content; without onlyContent the answer must be the whole message.
	if whole, ok := media.Extensions["x-without-onlyContent"].(string); ok && !onlyContent(target) {
		schema = c.doc.Components.Schemas[whole].Value
	}
	if events, _ := media.Extensions["x-events"].(bool); events {
		if err := checkEvents(schema, body); err != nil {
			return fail(err)
		}
		return nil
	}
	switch mediaType {
	case "application/cbor":
		doc, rest, err := jsonOf(body)
		if err == nil && len(rest) > 0 {
			err = errors.New("more than one CBOR item")
		}
		if err != nil {
			return fail(err)
		}
		return wrap(fail, schema, doc)
	case "application/cbor-seq":
		for n := 1; len(body) > 0; n++ {
			doc, rest, err := jsonOf(body)
			if err != nil {
				return fail(fmt.Errorf("item %d: %w", n, err))
			}
			if err := wrap(fail, schema, doc); err != nil {
				return fmt.Errorf("item %d: %w", n, err)
			}
			body = rest
		}
		return nil
	}
	if lines, _ := media.Extensions["x-lines"].(bool); !lines {
		return wrap(fail, schema, body)
	}
	if len(body) > 0 && body[len(body)-1] != '\n' {
		return fail(errors.New("the last line has no end"))
	}
	n := 0
	for line := range bytes.Lines(body) { // each by itself: a damaged second line must not hide behind the first
		n++
		if err := wrap(fail, schema, line); err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
	return nil
}

// CheckMessage reports what is wrong with one message that came over a WebSocket of an operation.
func (c *Checker) CheckMessage(escapedPath string, message []byte) error {
	op := c.Operation(http.MethodGet, escapedPath)
	if op == nil || op.Responses.Status(http.StatusSwitchingProtocols) == nil {
		return fmt.Errorf("%s: no WebSocket is described there", escapedPath)
	}
	media := op.Responses.Status(http.StatusSwitchingProtocols).Value.Content["application/json"]
	return wrap(func(err error) error { return fmt.Errorf("message of %s: %w", escapedPath, err) }, media.Schema.Value, message)
}

// checkEvents checks server-sent events (WHATWG HTML, Section 9.2.6), each by itself. The last one may be cut off.
func checkEvents(schema *openapi3.Schema, body []byte) error {
	for n := 1; ; n++ {
		event, rest, whole := bytes.Cut(body, []byte("\n\n"))
		if !whole {
			return nil
		}
		body = rest
		var data []byte
		for line := range bytes.SplitSeq(event, []byte("\n")) {
			switch name, value, _ := bytes.Cut(line, []byte(": ")); {
			case len(line) > 0 && line[0] == ':': // a comment
			case string(name) == "data" && data == nil:
				data = value
			case string(name) == "id" && len(value) > 0:
			default:
				return fmt.Errorf("event %d: line %q", n, line)
			}
		}
		if data == nil {
			continue
		}
		if err := wrap(func(err error) error { return fmt.Errorf("event %d: %w", n, err) }, schema, data); err != nil {
			return err
		}
	}
}

// jsonOf makes JSON of the first CBOR item.
func jsonOf(b []byte) (doc, rest []byte, err error) {
	mode, err := cbor.DecOptions{DefaultMapType: reflect.TypeFor[map[string]any]()}.DecMode()
	if err != nil {
		return nil, nil, err
	}
	var v any
	if rest, err = mode.UnmarshalFirst(b, &v); err != nil {
		return nil, nil, fmt.Errorf("no CBOR: %w", err)
	}
	doc, err = json.Marshal(v)
	return doc, rest, err
}

func onlyContent(target *url.URL) bool {
	for name := range target.Query() {
		if strings.EqualFold(name, "onlyContent") {
			return true
		}
	}
	return false
}

func wrap(fail func(error) error, schema *openapi3.Schema, doc []byte) error {
	d := json.NewDecoder(bytes.NewReader(doc))
	d.UseNumber()
	var v any
	if err := d.Decode(&v); err != nil {
		return fail(fmt.Errorf("no JSON: %w", err))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return fail(errors.New("more than one JSON document"))
	}
	if err := schema.VisitJSON(numbers(v), openapi3.VisitAsResponse()); err != nil {
		return fail(err)
	}
	return nil
}

// numbers makes plain numbers of the digits that were kept while looking for a second document.
func numbers(v any) any {
	switch v := v.(type) {
	case json.Number:
		f, _ := v.Float64() // the schemas ask for no digits
		return f
	case []any:
		for i := range v {
			v[i] = numbers(v[i])
		}
	case map[string]any:
		for k := range v {
			v[k] = numbers(v[k])
		}
	}
	return v
}

func decompress(coding string, body []byte) ([]byte, error) {
	switch coding {
	case "":
		return body, nil
	case "gzip":
		r, err := gzip.NewReader(bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		return io.ReadAll(r)
	case "zstd":
		r, err := zstd.NewReader(bytes.NewReader(body))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return io.ReadAll(r)
	}
	return nil, fmt.Errorf("content coding %s was never offered", coding)
}

// Transport is an HTTP client's transport that checks every answer whose body was read to its end, and reports what is
// wrong to Report.
type Transport struct {
	Checker *Checker
	Base    http.RoundTripper // nil: http.DefaultTransport
	Report  func(error)
	// Skip says which requests are none of the API's (nil: none), for example those of the provider.
	Skip func(*http.Request) bool
}

// RoundTrip implements http.RoundTripper.
func (t *Transport) RoundTrip(r *http.Request) (*http.Response, error) {
	base := t.Base
	if base == nil {
		base = http.DefaultTransport
	}
	resp, err := base.RoundTrip(r)
	if err != nil || t.Skip != nil && t.Skip(r) {
		return resp, err
	}
	resp.Body = &recorder{ReadCloser: resp.Body, done: func(body []byte) {
		header := resp.Header
		if resp.Uncompressed { // by the base transport
			header = header.Clone()
			header.Del("Content-Encoding")
		}
		if err := t.Checker.Check(r.Method, r.URL, resp.StatusCode, header, body); err != nil {
			t.Report(err)
		}
	}}
	return resp, nil
}

type recorder struct {
	io.ReadCloser
	body []byte
	done func([]byte)
}

func (r *recorder) Read(b []byte) (int, error) {
	n, err := r.ReadCloser.Read(b)
	r.body = append(r.body, b[:n]...)
	if errors.Is(err, io.EOF) && r.done != nil {
		r.done(r.body)
		r.done = nil
	}
	return n, err
}
