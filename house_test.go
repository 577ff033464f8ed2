// Package coaphub_test holds the tests of the house itself: which way imports point, that packages say what they are for,
// and that documents name tests that exist.
package coaphub_test

import (
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"go/types"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/hub"
)

const module = "github.com/coaphub/coaphub"

type goPackage struct {
	ImportPath string
	Dir        string
	Doc        string
	Imports    []string
	Standard   bool
}

func ours(t *testing.T) []goPackage {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "list", "-json=ImportPath,Dir,Doc,Imports", "./...")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var pkgs []goPackage
	for dec := json.NewDecoder(strings.NewReader(string(out))); dec.More(); {
		var p goPackage
		if err := dec.Decode(&p); err != nil {
			t.Fatal(err)
		}
		p.ImportPath = strings.TrimPrefix(strings.TrimPrefix(p.ImportPath, module), "/")
		pkgs = append(pkgs, p)
	}
	if len(pkgs) < 10 {
		t.Fatalf("only %d packages found", len(pkgs))
	}
	return pkgs
}

// arrows lists what must not be imported by whom. Both sides are path prefixes within the module; a target with a dot in
// its first element is another module.
var arrows = []struct{ from, to, why string }{
	{"hub", "", "the vocabulary imports nothing of ours"},
	{"internal", "coap-gateway", "ground does not know services"},
	{"internal", "resource-directory", "ground does not know services"},
	{"internal", "identity-store", "ground does not know services"},
	{"internal", "grpc-gateway", "ground does not know services"},
	{"internal", "oauth-server", "ground does not know services"},
	{"internal", "certificate-authority", "ground does not know services"},
	{"hub", "github.com/nats-io", "NATS ends at internal/bus and internal/store/jetfeed"},
	{"internal/store/jetfeed", "internal/store/pebblestore", "the feed does not know which store has the commits"},
	{"internal/bus", "internal/store", "the bus carries, it keeps nothing"},
	{"internal/bus", "internal/coap", "the bus does not know who talks over it"},
	{"internal", "bundle", "only cmd and test/hubtest know the whole"},
	{"coap-gateway", "resource-directory", "services do not import each other: directory.go says what is needed"},
	{"coap-gateway", "identity-store", "services do not import each other"},
	{"coap-gateway", "oauth-server", "services do not import each other"},
	{"coap-gateway", "grpc-gateway", "services do not import each other"},
	{"coap-gateway", "certificate-authority", "services do not import each other"},
	{"coap-gateway", "internal/store", "the devices' door knows no stores"},
	{"coap-gateway", "net/http", "the devices' door knows no HTTP"},
	{"coap-gateway", "google.golang.org", "protobuf ends in grpc-gateway"},
	{"resource-directory", "coap-gateway", "services do not import each other"},
	{"resource-directory", "identity-store", "services do not import each other"},
	{"resource-directory", "grpc-gateway", "services do not import each other"},
	{"resource-directory", "internal/coap", "the directory does not know CoAP"},
	{"resource-directory", "net/http", "the directory does not know HTTP"},
	{"resource-directory", "google.golang.org", "protobuf ends in grpc-gateway"},
	{"identity-store", "coap-gateway", "services do not import each other"},
	{"identity-store", "resource-directory", "services do not import each other"},
	{"identity-store", "internal/coap", "the identity store does not know CoAP"},
	{"identity-store", "net/http", "the identity store does not know HTTP"},
	{"grpc-gateway", "coap-gateway", "services do not import each other"},
	{"grpc-gateway", "resource-directory", "services do not import each other"},
	{"grpc-gateway", "identity-store", "services do not import each other"},
	{"grpc-gateway", "internal/coap", "the applications' door does not know CoAP"},
	{"grpc-gateway", "internal/store", "the applications' door knows no stores"},
	{"oauth-server", "coap-gateway", "the provider does not know devices' door"},
	{"oauth-server", "resource-directory", "services do not import each other"},
	{"certificate-authority", "internal/coap", "the authority does not know CoAP"},
	{"certificate-authority", "net/http", "the authority does not know HTTP"},
	{"enrolment-gateway", "certificate-authority", "services do not import each other: gateway.go says what is needed"},
	{"enrolment-gateway", "coap-gateway", "services do not import each other"},
	{"enrolment-gateway", "grpc-gateway", "services do not import each other"},
	{"enrolment-gateway", "internal/store", "the door knows no stores"},
	{"enrolment-gateway", "google.golang.org", "protobuf ends in grpc-gateway"},
	{"client", "", "applications import it: it adds nothing of ours but itself"},
	{"test/device", "internal/coap", "simulated devices are built on another engine: we must not only agree with ourselves"},
	{"test/device", "bundle", "simulated devices see the hub from outside only"},
	{"test/device", "coap-gateway", "simulated devices see the hub from outside only"},
}

// ends lists modules that only one package of ours may import.
var ends = []struct{ module, only, why string }{
	{"go.mongodb.org/mongo-driver", "internal/store/mongostore", "MongoDB ends at its store, all others see the interface"},
}

func TestArrows(t *testing.T) {
	for _, p := range ours(t) {
		for _, imp := range p.Imports {
			for _, e := range ends {
				if within(imp, e.module) && !within(p.ImportPath, e.only) {
					t.Errorf("%s imports %s: %s", p.ImportPath, imp, e.why)
				}
			}
			own, isOurs := strings.CutPrefix(imp, module+"/")
			for _, a := range arrows {
				if !within(p.ImportPath, a.from) || within(own, a.from) {
					continue
				}
				if isOurs && (a.to == "" || within(own, a.to)) || !isOurs && a.to != "" && within(imp, a.to) {
					t.Errorf("%s imports %s: %s", p.ImportPath, imp, a.why)
				}
			}
		}
	}
}

func within(path, prefix string) bool {
	return path == prefix || strings.HasPrefix(path, prefix+"/")
}

func TestPackagesSayWhatTheyAreFor(t *testing.T) {
	for _, p := range ours(t) {
		if p.ImportPath == "" || strings.HasPrefix(p.ImportPath, "api/gen") {
			continue
		}
		if p.Doc == "" {
			t.Errorf("%s has no package comment: say what it is for and what it must not know", p.ImportPath)
		}
		n := 0
		files, err := filepath.Glob(filepath.Join(p.Dir, "*.go"))
		if err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if strings.HasSuffix(f, "_test.go") {
				continue
			}
			parsed, err := parser.ParseFile(token.NewFileSet(), f, nil, parser.ParseComments|parser.PackageClauseOnly)
			if err != nil {
				t.Fatal(err)
			}
			if parsed.Doc != nil {
				n++
			}
		}
		if n > 1 {
			t.Errorf("%s has %d package comments: one is enough", p.ImportPath, n)
		}
	}
}

var namedTest = regexp.MustCompile("`((?:Test|Fuzz|Example)[A-Za-z0-9_]*)(?:/[^`|]+)?`")

// TestDocsNameRealTests finds each test that the documents name among the test functions; that it ran and passed is what
// tools/testrun checks.
func TestDocsNameRealTests(t *testing.T) {
	have := map[string]bool{}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil {
				have[fn.Name.Name] = true
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range []string{"docs/capabilities.md", "docs/protocol.md", "docs/conformance.md", "docs/divergences.md"} {
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Fatal(err)
		}
		names := namedTest.FindAllStringSubmatch(string(b), -1)
		if len(names) == 0 {
			t.Errorf("%s names no test", doc)
		}
		for _, m := range names {
			if !have[m[1]] {
				t.Errorf("%s names %s, which does not exist", doc, m[1])
			}
		}
	}
}

var namedFile = regexp.MustCompile("`([a-zA-Z][a-zA-Z0-9_.-]*/[a-zA-Z0-9_./-]*\\.(?:go|md|yaml|proto|txt))`")

func TestDocsNameRealFiles(t *testing.T) {
	docs, err := filepath.Glob("docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range append(docs, "README.md", "CONTRIBUTING.md") {
		b, err := os.ReadFile(doc)
		if err != nil {
			t.Error(err)
			continue
		}
		for _, m := range namedFile.FindAllStringSubmatch(string(b), -1) {
			if _, err := os.Stat(m[1]); err != nil {
				t.Errorf("%s names %s, which does not exist", doc, m[1])
			}
		}
	}
}

var (
	errorCode = regexp.MustCompile(`^[a-z]+(-[a-z0-9]+)+$`)
	errorRow  = regexp.MustCompile("(?m)^\\| `([a-z0-9-]+)` \\| ([a-z, -]+) \\|")
)

// TestErrorsAreCatalogued compares the codes in the source with those in docs/errors.md, both ways. A code is the Code of a
// hub.Error, or the argument of a function that makes one. Where the source says the kind beside the code, the catalogue
// must say it too.
func TestErrorsAreCatalogued(t *testing.T) {
	type maker struct {
		code int    // which argument it is
		kind string // "" = the argument before the code
	}
	makers := map[string]maker{
		"hub.NewError": {1, ""}, "invalid": {0, "Invalid"}, "unauthenticated": {0, "Unauthenticated"}, "tooLarge": {0, "TooLarge"},
		"configError": {0, "Precondition"},
	}
	kindOf := map[string]string{} // Go name -> kind
	for _, k := range hub.Kinds() {
		var name string
		for part := range strings.SplitSeq(k.String(), "-") {
			name += strings.ToUpper(part[:1]) + part[1:]
		}
		kindOf[name] = k.String()
	}
	used := map[string]string{}
	kinds := map[string]map[string]bool{}
	take := func(code, kind ast.Expr, where string) {
		lit, ok := code.(*ast.BasicLit)
		if !ok || lit.Kind != token.STRING {
			return
		}
		s, err := strconv.Unquote(lit.Value)
		if err != nil || !errorCode.MatchString(s) {
			return
		}
		used[s] = where
		if kinds[s] == nil {
			kinds[s] = map[string]bool{}
		}
		if kind == nil {
			return
		}
		if k, ok := kindOf[strings.TrimPrefix(types.ExprString(kind), "hub.")]; ok { // not a variable
			kinds[s][k] = true
		}
	}
	err := filepath.WalkDir(".", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && slices.Contains([]string{"test", "tools", "gen", "storetest", "bustest", "node_modules", ".git", "data", "bin"}, d.Name()):
			return fs.SkipDir
		case !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go"):
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CallExpr:
				m, ok := makers[types.ExprString(n.Fun)]
				switch {
				case !ok || m.code >= len(n.Args):
				case m.kind == "":
					take(n.Args[m.code], n.Args[m.code-1], path)
				default:
					take(n.Args[m.code], ast.NewIdent(m.kind), path)
				}
			case *ast.CompositeLit:
				members := map[string]ast.Expr{}
				for _, e := range n.Elts {
					if kv, ok := e.(*ast.KeyValueExpr); ok {
						members[types.ExprString(kv.Key)] = kv.Value
					}
				}
				take(members["Code"], members["Kind"], path)
			case *ast.AssignStmt: // e.Code = "address-in-use"
				for i, left := range n.Lhs {
					if sel, ok := left.(*ast.SelectorExpr); ok && sel.Sel.Name == "Code" && i < len(n.Rhs) {
						take(n.Rhs[i], nil, path)
					}
				}
			case *ast.ValueSpec: // const ErrNoHub = "hub-not-running"
				for i, name := range n.Names {
					if strings.HasPrefix(name.Name, "Err") && i < len(n.Values) {
						take(n.Values[i], nil, path)
					}
				}
			}
			return true
		})
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("docs/errors.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string][]string{}
	for _, m := range errorRow.FindAllStringSubmatch(string(b), -1) {
		if listed[m[1]] != nil {
			t.Errorf("docs/errors.md lists %s twice", m[1])
		}
		listed[m[1]] = strings.Split(m[2], ", ")
	}
	for code, path := range used {
		if listed[code] == nil {
			t.Errorf("%s uses the error code %s, which docs/errors.md does not list", path, code)
			continue
		}
		for kind := range kinds[code] {
			if !slices.Contains(listed[code], kind) {
				t.Errorf("%s uses the error code %s with the kind %s, which docs/errors.md does not say", path, code, kind)
			}
		}
	}
	for code, names := range listed {
		if used[code] == "" {
			t.Errorf("docs/errors.md lists %s, which is not in the source", code)
		}
		for _, k := range names {
			if !slices.Contains(slices.Collect(maps.Values(kindOf)), k) {
				t.Errorf("docs/errors.md gives %s the kind %q, which does not exist", code, k)
			}
		}
	}
	if len(used) < 100 {
		t.Errorf("only %d codes were found: does this test still read the source?", len(used))
	}
}

func TestNothingPointsOutside(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "git", "ls-files")
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("git ls-files: %v", err)
	}
	outside := []string{"../" + "shared", "/work" + "/main", "proxy.golang" + ".org"}
	for f := range strings.Lines(string(out)) {
		f = strings.TrimSpace(f)
		if slices.Contains([]string{".png", ".ico", ".pem"}, filepath.Ext(f)) {
			continue
		}
		b, err := os.ReadFile(f)
		if err != nil {
			continue // deleted in the work tree
		}
		for _, s := range outside {
			if strings.Contains(string(b), s) {
				t.Errorf("%s mentions %s", f, s)
			}
		}
	}
}
