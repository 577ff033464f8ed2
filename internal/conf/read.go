package conf

import (
	"encoding"
	"errors"
	"fmt"
	"io"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
)

// maxFile bounds a configuration file; a larger one is refused, it is something else.
const maxFile = 4 << 20

// Source says where the values come from.
type Source struct {
	Name string // of the file, for messages
	YAML []byte // may be empty
	// Env is the environment as os.Environ gives it; variables that begin with Prefix are read.
	Env    []string
	Prefix string   // "COAPHUB_"
	Except []string // variables with the prefix that are no keys (COAPHUB_DATA)
	// Foreign maps keys that other hubs have to what to write here. It is looked up by whole path, then by the last key.
	Foreign map[string]string
}

// Read puts the source's values over those that are in into, a pointer to a struct. All mistakes come together as Problems;
// warnings are about variables that look like ours and are no keys, which an orchestrator may set without being asked.
func Read(into any, src Source) (warnings []string, err error) {
	r := &reader{src: src}
	root := reflect.ValueOf(into).Elem()
	r.file(root)
	r.environment(root)
	return r.warnings, r.problems.Err()
}

type reader struct {
	src      Source
	problems Problems
	warnings []string
}

func (r *reader) bad(path, from, format string, args ...any) {
	r.problems = append(r.problems, Problem{path, from, fmt.Sprintf(format, args...)})
}

func (r *reader) line(n *yaml.Node) string { return r.src.Name + " line " + strconv.Itoa(n.Line) }

func (r *reader) file(root reflect.Value) {
	if len(r.src.YAML) > maxFile {
		r.bad("", r.src.Name, "the file is larger than %s", Size(maxFile))
		return
	}
	dec := yaml.NewDecoder(strings.NewReader(string(r.src.YAML)))
	var doc yaml.Node
	switch err := dec.Decode(&doc); {
	case errors.Is(err, io.EOF): // empty, or comments only
		return
	case err != nil:
		r.bad("", r.src.Name, "this is not YAML: %s", strings.TrimPrefix(err.Error(), "yaml: "))
		return
	}
	if err := dec.Decode(new(yaml.Node)); !errors.Is(err, io.EOF) {
		r.bad("", r.src.Name, "there is more than one document in the file")
	}
	if len(doc.Content) == 1 {
		r.value(root, doc.Content[0], "", "")
	}
}

// value decodes one node into v. from is set when the node did not come from the file.
func (r *reader) value(v reflect.Value, n *yaml.Node, path, from string) {
	if from == "" {
		from = r.line(n)
	}
	if n.Kind == yaml.AliasNode {
		// Aliases make small files that become huge; nothing here is worth repeating.
		r.bad(path, from, "anchors and aliases are not supported")
		return
	}
	if n.Kind == yaml.ScalarNode && n.Tag == "!!null" {
		return // "key:" without a value keeps the default
	}
	for v.Kind() == reflect.Pointer {
		if v.IsNil() {
			v.Set(reflect.New(v.Type().Elem()))
		}
		v = v.Elem()
	}
	t := v.Type()
	switch {
	case t == secretType && n.Kind == yaml.MappingNode:
		r.secretFile(v, n, path, from)
	case leaf(t) && t.Kind() != reflect.Slice && t.Kind() != reflect.Map:
		if n.Kind != yaml.ScalarNode {
			r.bad(path, from, "expected a single value")
			return
		}
		if err := scalar(v, n.Value); err != nil {
			r.bad(path, from, "%s", err)
		}
	case t.Kind() == reflect.Struct:
		r.mapping(v, n, path, from)
	case t.Kind() == reflect.Slice && !reflect.PointerTo(t).Implements(unmarshalerType):
		r.list(v, n, path, from)
	case t.Kind() == reflect.Map:
		if n.Kind != yaml.MappingNode {
			r.bad(path, from, "expected keys and values")
			return
		}
		out := reflect.MakeMapWithSize(t, len(n.Content)/2)
		for i := 0; i+1 < len(n.Content); i += 2 {
			e := reflect.New(t.Elem()).Elem()
			r.value(e, n.Content[i+1], join(path, n.Content[i].Value), "")
			out.SetMapIndex(reflect.ValueOf(n.Content[i].Value).Convert(t.Key()), e)
		}
		v.Set(out)
	default:
		if err := scalar(v, n.Value); err != nil {
			r.bad(path, from, "%s", err)
		}
	}
}

func (r *reader) mapping(v reflect.Value, n *yaml.Node, path, from string) {
	if n.Kind != yaml.MappingNode {
		r.bad(path, from, "expected keys below this one")
		return
	}
	fs := fields(v.Type())
	seen := map[string]bool{}
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		if seen[key.Value] {
			r.bad(at, r.line(key), "the key is there twice")
			continue
		}
		seen[key.Value] = true
		j := slices.IndexFunc(fs, func(f field) bool { return f.key == key.Value })
		if j < 0 {
			r.bad(at, r.line(key), "%s", r.unknown(at, key.Value, fs))
			continue
		}
		r.value(v.FieldByIndex(fs[j].index), value, at, "")
	}
}

// unknown says what to do about a key that is none.
func (r *reader) unknown(path, key string, fs []field) string {
	ours, ok := r.src.Foreign[path]
	if !ok {
		ours, ok = r.src.Foreign[key]
	}
	if ok {
		return "not a key of coaphub but of another hub; " + ours
	}
	for _, f := range fs {
		if near(key, f.key) {
			return fmt.Sprintf("unknown key; did you mean %q?", f.key)
		}
	}
	names := make([]string, len(fs))
	for i, f := range fs {
		names[i] = f.key
	}
	return "unknown key; here may be: " + strings.Join(names, ", ")
}

func (r *reader) list(v reflect.Value, n *yaml.Node, path, from string) {
	if n.Kind == yaml.ScalarNode { // one value stands for a list of one
		n = &yaml.Node{Kind: yaml.SequenceNode, Content: []*yaml.Node{n}, Line: n.Line}
	}
	if n.Kind != yaml.SequenceNode {
		r.bad(path, from, "expected a list")
		return
	}
	out := reflect.MakeSlice(v.Type(), len(n.Content), len(n.Content))
	for i, c := range n.Content {
		r.value(out.Index(i), c, fmt.Sprintf("%s[%d]", path, i), "")
	}
	v.Set(out)
}

func (r *reader) secretFile(v reflect.Value, n *yaml.Node, path, from string) {
	if len(n.Content) != 2 || n.Content[0].Value != "file" || n.Content[1].Kind != yaml.ScalarNode {
		r.bad(path, from, "expected the secret itself or {file: PATH}")
		return
	}
	s, err := secretFrom(n.Content[1].Value)
	if err != nil {
		r.bad(path, from, "%s", err)
		return
	}
	v.SetString(s)
}

func secretFrom(file string) (string, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("read the secret: %w", err)
	}
	return strings.TrimRight(string(b), "\r\n"), nil
}

func scalar(v reflect.Value, s string) error {
	t := v.Type()
	if t == durationType {
		d, err := ParseDuration(s)
		if err == nil {
			v.SetInt(int64(d))
		}
		return err
	}
	if u, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		return u.UnmarshalText([]byte(s))
	}
	switch t.Kind() {
	case reflect.String:
		v.SetString(s)
	case reflect.Bool:
		b, err := strconv.ParseBool(s)
		if err != nil {
			return fmt.Errorf("%q is neither true nor false", s)
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		i, err := strconv.ParseInt(s, 10, t.Bits())
		if err != nil {
			return fmt.Errorf("%q is not a whole number that fits", s)
		}
		v.SetInt(i)
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		i, err := strconv.ParseUint(s, 10, t.Bits())
		if err != nil {
			return fmt.Errorf("%q is not a whole number from 0 that fits", s)
		}
		v.SetUint(i)
	case reflect.Float32, reflect.Float64:
		f, err := strconv.ParseFloat(s, t.Bits())
		if err != nil {
			return fmt.Errorf("%q is not a number", s)
		}
		v.SetFloat(f)
	default:
		return fmt.Errorf("values of type %s cannot be configured", t)
	}
	return nil
}

func (r *reader) environment(root reflect.Value) {
	type target struct {
		v    reflect.Value
		path string
	}
	targets := map[string]target{}
	walk(root, "", func(path string, v reflect.Value) {
		targets[Variable(r.src.Prefix, path)] = target{v, path}
	})
	for _, kv := range r.src.Env {
		name, text, _ := strings.Cut(kv, "=")
		if !strings.HasPrefix(name, r.src.Prefix) || slices.Contains(r.src.Except, name) {
			continue
		}
		if t, ok := targets[name]; ok {
			r.variable(t.v, text, t.path, name)
			continue
		}
		if base, ok := strings.CutSuffix(name, "_FILE"); ok {
			if t, ok := targets[base]; ok && t.v.Type() == secretType {
				s, err := secretFrom(text)
				if err != nil {
					r.bad(t.path, name, "%s", err)
				}
				t.v.SetString(s)
				continue
			}
		}
		r.warnings = append(r.warnings, fmt.Sprintf("the environment variable %s names no key and is ignored", name))
	}
}

func (r *reader) variable(v reflect.Value, text, path, name string) {
	if v.Kind() != reflect.Slice && v.Kind() != reflect.Map {
		r.value(v, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: text}, path, name)
		return
	}
	// Lists and maps are written as YAML; a plain text is a list with commas.
	var n yaml.Node
	if err := yaml.Unmarshal([]byte(text), &n); err != nil || len(n.Content) != 1 {
		r.bad(path, name, "expected a value as YAML, for example [a, b]")
		return
	}
	value := n.Content[0]
	if v.Kind() == reflect.Slice && value.Kind == yaml.ScalarNode {
		list := &yaml.Node{Kind: yaml.SequenceNode}
		for part := range strings.SplitSeq(text, ",") {
			if part = strings.TrimSpace(part); part != "" {
				list.Content = append(list.Content, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: part})
			}
		}
		value = list
	}
	r.value(v, value, path, name)
}

// walk visits every leaf below a struct, in order.
func walk(v reflect.Value, path string, visit func(path string, v reflect.Value)) {
	for _, f := range fields(v.Type()) {
		fv, at := v.FieldByIndex(f.index), join(path, f.key)
		if leaf(fv.Type()) {
			visit(at, fv)
			continue
		}
		for fv.Kind() == reflect.Pointer {
			if fv.IsNil() {
				fv.Set(reflect.New(fv.Type().Elem()))
			}
			fv = fv.Elem()
		}
		walk(fv, at, visit)
	}
}

// near reports whether two keys differ by case or by at most two letters, one in short words (Levenshtein).
func near(a, b string) bool {
	a, b = strings.ToLower(a), strings.ToLower(b)
	if a == b {
		return true
	}
	if len(a) < 3 || len(b) < 3 || len(a) > 64 {
		return false
	}
	most := 2
	if len(a) < 5 || len(b) < 5 {
		most = 1
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := diagonal
			if a[i-1] != b[j-1] {
				cost++
			}
			diagonal = row[j]
			row[j] = min(cost, row[j]+1, row[j-1]+1)
		}
	}
	return row[len(b)] <= most
}
