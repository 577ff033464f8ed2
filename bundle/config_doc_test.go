package bundle

import (
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/internal/conf"
)

var update = flag.Bool("update", false, "write docs/config.md")

const module = "github.com/coaphub/coaphub/"

// TestConfigReference makes the reference of all keys from the structs and their comments, and fails when docs/config.md is
// another one. A key without a comment fails too.
func TestConfigReference(t *testing.T) {
	def := Default()
	docs := &comments{t: t, packages: map[string]map[string]string{}}
	var b strings.Builder
	b.WriteString(`# Configuration

Made from the code by ` + "`make gen`" + `; do not edit. No file at all gives a working hub: every key has a default. One YAML file
(` + "`coaphub serve --config FILE`" + `) holds all sections. Unknown keys are errors, and all mistakes are reported together with their
path. Each key can also be set by an environment variable: ` + "`COAPHUB_`" + ` and the path in capitals with underscores, such as
` + "`" + conf.Variable(EnvPrefix, "coapGateway.api.coap.address") + "`" + `; for secrets the same name with ` + "`_FILE`" + ` names a file. Order: defaults, file, environment,
flags. ` + "`coaphub config`" + ` prints what results, ` + "`coaphub config --diff`" + ` what differs from the defaults.

Durations are written like 10s, 5m, 36h or 7d, sizes like 64KiB or 8MiB, lists as [a, b] or one item a line. A secret is its
text or {file: PATH}.
`)
	section := ""
	for _, k := range conf.Keys(&def) {
		top, _, nested := strings.Cut(k.Path, ".")
		if !nested {
			top = "general"
		}
		if top != section {
			section = top
			fmt.Fprintf(&b, "\n## %s\n\n| key | kind | default | meaning |\n|---|---|---|---|\n", section)
		}
		text := docs.of(k)
		if text == "" {
			t.Errorf("%s (%s.%s) has no comment", k.Path, k.Struct, k.Field)
		}
		value := "`" + strings.ReplaceAll(k.Default, "\n", " ") + "`"
		if k.Default == "" {
			value = "–"
		}
		fmt.Fprintf(&b, "| `%s` | %s | %s | %s |\n", k.Path, k.Type, value, strings.ReplaceAll(text, "|", `\|`))
	}
	const file = "../docs/config.md"
	if *update {
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if string(got) != b.String() {
		t.Error("docs/config.md is stale: run make gen")
	}
}

// comments are what the structs' fields say, by package, then "Struct.Field".
type comments struct {
	t        *testing.T
	packages map[string]map[string]string
}

func (c *comments) of(k conf.Key) string {
	fields, ok := c.packages[k.Package]
	if !ok {
		fields = c.parse(k.Package)
		c.packages[k.Package] = fields
	}
	text := fields[k.Struct+"."+k.Field]
	// A comment begins with the field's name, which readers of the reference know as the key, in front of it.
	if names := severalNames.FindString(text); names != "" {
		keys := oneName.ReplaceAllStringFunc(names, func(name string) string { return "`" + strings.ToLower(name[:1]) + name[1:] + "`" })
		return keys + text[len(names):]
	}
	rest, ok := strings.CutPrefix(text, k.Field+" ")
	if !ok {
		return text
	}
	for _, verb := range []string{"is ", "are "} {
		if said, ok := strings.CutPrefix(rest, verb); ok {
			return strings.ToUpper(said[:1]) + said[1:]
		}
	}
	return "`" + k.Path[strings.LastIndexByte(k.Path, '.')+1:] + "` " + rest
}

var (
	severalNames = regexp.MustCompile(`^[A-Z]\w+(, [A-Z]\w+)* and [A-Z]\w+`)
	oneName      = regexp.MustCompile(`[A-Z]\w+`)
)

func (c *comments) parse(pkg string) map[string]string {
	dir := filepath.Join("..", strings.TrimPrefix(pkg, module))
	files, err := filepath.Glob(filepath.Join(dir, "*.go"))
	if err != nil || len(files) == 0 {
		c.t.Fatalf("no sources of %s: %v", pkg, err)
	}
	out := map[string]string{}
	for _, f := range files {
		tree, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			c.t.Fatal(err)
		}
		ast.Inspect(tree, func(n ast.Node) bool {
			spec, ok := n.(*ast.TypeSpec)
			if !ok {
				return true
			}
			s, ok := spec.Type.(*ast.StructType)
			if !ok {
				return true
			}
			shared := "" // a comment above "CertFile and KeyFile" holds for both
			for _, f := range s.Fields.List {
				text := f.Doc.Text()
				if text == "" {
					text = f.Comment.Text()
				}
				for _, name := range f.Names {
					if text == "" && yamlKey(f) && strings.Contains(shared, name.Name) {
						text = shared
					}
					out[spec.Name.Name+"."+name.Name] = strings.Join(strings.Fields(text), " ")
				}
				if text != "" {
					shared = text
				}
			}
			return true
		})
	}
	return out
}

func yamlKey(f *ast.Field) bool {
	return f.Tag != nil && reflect.StructTag(strings.Trim(f.Tag.Value, "`")).Get("yaml") != ""
}
