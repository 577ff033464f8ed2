package api_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/api"
)

var update = flag.Bool("update", false, "write docs/api.md")

const reference = "../docs/api.md"

type object = map[string]any

// TestReference makes the reference of the HTTP API from the OpenAPI description, and fails when docs/api.md is another one.
// An operation without tag or summary, or a tag that is not listed, fails too: people would not find it.
func TestReference(t *testing.T) {
	b, err := api.JSON()
	if err != nil {
		t.Fatal(err)
	}
	var doc object
	if err := json.Unmarshal(b, &doc); err != nil {
		t.Fatal(err)
	}
	r := &writer{t: t, doc: doc}
	text := r.write()
	if *update {
		if err := os.WriteFile(reference, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(reference)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != text {
		t.Error("docs/api.md is stale: run make gen")
	}
}

type writer struct {
	strings.Builder
	t   *testing.T
	doc object
}

func (w *writer) printf(format string, args ...any) { fmt.Fprintf(w, format, args...) }

func text(o object, name string) string { s, _ := o[name].(string); return strings.TrimSpace(s) }

func member(o object, name string) object { m, _ := o[name].(object); return m }

func list(o object, name string) []any { l, _ := o[name].([]any); return l }

// follow replaces a reference by what it names.
func (w *writer) follow(v any) object {
	o, _ := v.(object)
	for {
		ref := text(o, "$ref")
		if ref == "" {
			return o
		}
		o = w.doc
		for part := range strings.SplitSeq(strings.TrimPrefix(ref, "#/"), "/") {
			o = member(o, part)
		}
		if o == nil {
			w.t.Fatalf("%s leads nowhere", ref)
		}
	}
}

var cell = strings.NewReplacer("\n", " ", "|", `\|`)

// kind says in a few words what a schema is; what has a name is a link to it.
func (w *writer) kind(v any) string {
	o, _ := v.(object)
	if ref := text(o, "$ref"); ref != "" {
		name := ref[strings.LastIndexByte(ref, '/')+1:]
		return "[" + name + "](#" + strings.ToLower(name) + ")"
	}
	for _, of := range []string{"oneOf", "anyOf"} {
		var kinds []string
		for _, s := range list(o, of) {
			kinds = append(kinds, w.kind(s))
		}
		if len(kinds) > 0 {
			return strings.Join(kinds, " or ")
		}
	}
	var values []string
	for _, e := range list(o, "enum") {
		values = append(values, fmt.Sprintf("`%v`", e))
	}
	if c, ok := o["const"]; ok {
		values = append(values, fmt.Sprintf("`%v`", c))
	}
	if len(values) > 0 {
		return strings.Join(values, ", ")
	}
	switch typ := o["type"].(type) {
	case string:
		switch {
		case typ == "array":
			return "list of " + w.kind(o["items"])
		case typ == "object" && len(member(o, "properties")) > 0:
			var members []string
			for _, name := range slices.Sorted(maps.Keys(member(o, "properties"))) {
				members = append(members, "`"+name+"`: "+w.kind(member(o, "properties")[name]))
			}
			return strings.Join(members, ", ")
		case typ == "object" && member(o, "additionalProperties") != nil:
			return "object of " + w.kind(o["additionalProperties"])
		}
		return typ
	case []any:
		var types []string
		for _, one := range typ {
			types = append(types, fmt.Sprint(one))
		}
		return strings.Join(types, " or ")
	}
	return "any"
}

func (w *writer) table(head string, rows [][]string) {
	if len(rows) == 0 {
		return
	}
	w.printf("| %s |\n|%s\n", head, strings.Repeat("---|", strings.Count(head, "|")+1))
	for _, r := range rows {
		for i := range r {
			if r[i] = cell.Replace(strings.TrimSpace(r[i])); r[i] == "" {
				r[i] = "–"
			}
		}
		w.printf("| %s |\n", strings.Join(r, " | "))
	}
	w.printf("\n")
}

func (w *writer) write() string {
	info := member(w.doc, "info")
	w.printf("# The HTTP API\n\nMade from `api/openapi.yaml` by `make gen`; do not edit. A hub serves the description at `/api/v1/openapi.json`, and at\n" +
		"`/api/v1/docs` as a page that also sends requests. The same calls over gRPC are in `api/proto`.\n\n")
	w.printf("%s\n\n", text(info, "description"))
	paths := member(w.doc, "paths")
	seen := map[string]bool{}
	for _, v := range list(w.doc, "tags") {
		tag := v.(object)
		name := text(tag, "name")
		w.printf("## %s\n\n", strings.ToUpper(name[:1])+name[1:])
		if d := text(tag, "description"); d != "" {
			w.printf("%s\n\n", d)
		}
		for _, path := range slices.Sorted(maps.Keys(paths)) {
			for _, method := range []string{"get", "post", "put", "patch", "delete"} {
				op := member(member(paths, path), method)
				if op == nil || !slices.Contains(list(op, "tags"), any(name)) {
					continue
				}
				seen[method+" "+path] = true
				w.operation(method, path, member(paths, path), op)
			}
		}
	}
	for path, item := range paths {
		for method := range item.(object) {
			if method != "parameters" && !seen[method+" "+path] {
				w.t.Errorf("%s %s has no tag of the list", method, path)
			}
		}
	}
	w.printf("## Schemas\n\n")
	schemas := member(member(w.doc, "components"), "schemas")
	for _, name := range slices.Sorted(maps.Keys(schemas)) {
		s := member(schemas, name)
		w.printf("### %s\n\n", name)
		if d := text(s, "description"); d != "" {
			w.printf("%s\n\n", d)
		}
		var rows [][]string
		for _, m := range slices.Sorted(maps.Keys(member(s, "properties"))) {
			p := member(s, "properties")[m]
			needed := ""
			if slices.Contains(list(s, "required"), any(m)) {
				needed = "always"
			}
			rows = append(rows, []string{"`" + m + "`", w.kind(p), needed, text(w.follow(p), "description")})
		}
		if len(rows) == 0 {
			w.printf("%s\n\n", w.kind(s))
			continue
		}
		w.table("member | kind | there | meaning", rows)
	}
	return strings.TrimRight(w.String(), "\n") + "\n"
}

func (w *writer) operation(method, path string, item, op object) {
	if text(op, "summary") == "" {
		w.t.Errorf("%s %s has no summary", method, path)
	}
	w.printf("### %s %s\n\n%s.", strings.ToUpper(method), path, strings.TrimSuffix(text(op, "summary"), "."))
	if open, ok := op["security"].([]any); ok && len(open) == 0 {
		w.printf(" Needs no token.")
	}
	w.printf("\n\n")
	if d := text(op, "description"); d != "" {
		w.printf("%s\n\n", d)
	}
	var rows [][]string
	for _, p := range append(slices.Clone(list(item, "parameters")), list(op, "parameters")...) {
		p := w.follow(p)
		rows = append(rows, []string{"`" + text(p, "name") + "`", text(p, "in"), w.kind(p["schema"]), text(p, "description")})
	}
	w.table("parameter | in | kind | meaning", rows)
	rows = nil
	bodies := func(what string, o object) {
		for _, media := range slices.Sorted(maps.Keys(member(o, "content"))) {
			m := member(member(o, "content"), media)
			kind := "–"
			if m["schema"] != nil {
				kind = w.kind(m["schema"])
			}
			if lines, _ := m["x-lines"].(bool); media == "application/cbor-seq" {
				kind = "items of " + kind
			} else if lines {
				kind = "lines of " + kind
			}
			rows = append(rows, []string{what, "`" + media + "`", kind, text(o, "description")})
			what = ""
		}
		if len(member(o, "content")) == 0 {
			rows = append(rows, []string{what, "", "", text(o, "description")})
		}
	}
	if body := w.follow(op["requestBody"]); body != nil {
		bodies("body", body)
	}
	responses := member(op, "responses")
	for _, status := range slices.Sorted(maps.Keys(responses)) {
		if status == "default" || status == "304" { // the same everywhere
			continue
		}
		bodies(status, w.follow(responses[status]))
	}
	w.table("body | media type | kind | meaning", rows)
}
