// Command testrun runs the tests of every module of the repository with the race detector, reads go test's JSON, and ends
// with what ran and what did not. A skipped test, a package whose tests did not run, or a test that docs/ name and that did
// not pass is a left-out: it is named on one line, and fails the run when CI is set.
//
// With -fuzz D it runs each fuzzer of the repository for D instead.
//
// It must not know what the tests are about.
package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

func main() {
	root := flag.String("root", "..", "the repository, relative to tools/")
	timeout := flag.String("timeout", "10m", "limit of one package")
	fuzz := flag.String("fuzz", "", "run each fuzzer for this long instead of the tests")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if *fuzz != "" {
		err = fuzzAll(ctx, *root, *fuzz)
	} else {
		err = testAll(ctx, *root, *timeout)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "testrun:", err)
		os.Exit(1)
	}
}

// modules returns the folders with a go.mod, the root first.
func modules(root string) ([]string, error) {
	var out []string
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "testdata" || d.Name() == "node_modules" || d.Name() == "data" ||
			strings.HasPrefix(d.Name(), ".") && d.Name() != "." && d.Name() != ".."):
			return fs.SkipDir
		case d.Name() == "go.mod":
			out = append(out, filepath.Dir(path))
		}
		return nil
	})
	slices.SortFunc(out, func(a, b string) int { return len(a) - len(b) })
	return out, err
}

// event is one line of go test -json (go doc test2json).
type event struct {
	Action, Package, Test, Output string
	Elapsed                       float64
}

// tally is what a whole run came to.
type tally struct {
	passed, failed, skipped map[string]bool // "package Test"
	broken                  []string        // packages that failed without a failing test: build errors, timeouts, panics
	ran                     map[string]bool // packages with a result
	output                  map[string][]string
}

// alone are the packages of the root module whose tests have the machine for themselves, after all others: what they start are many
// processes, and what they measure is how soon these are there again.
var alone = []string{"test/cluster"}

func testAll(ctx context.Context, root, timeout string) error {
	mods, err := modules(root)
	if err != nil {
		return err
	}
	sum := tally{
		passed: map[string]bool{}, failed: map[string]bool{}, skipped: map[string]bool{}, ran: map[string]bool{},
		output: map[string][]string{},
	}
	var leftOut []string
	for _, dir := range mods {
		all, want, err := packages(ctx, dir)
		if err != nil {
			return err
		}
		if len(want) == 0 {
			continue
		}
		args := slices.DeleteFunc(all, isAlone)
		if dir != filepath.Clean(root) {
			args = append([]string{"-count=1"}, args...) // go's cache does not see what such a module builds and runs of the product
		}
		if err := sum.run(ctx, dir, timeout, "", args...); err != nil {
			return err
		}
		for _, p := range slices.DeleteFunc(slices.Clone(want), func(p string) bool { return !isAlone(p) }) {
			if err := sum.run(ctx, dir, timeout, "", p); err != nil {
				return err
			}
		}
		for _, p := range want {
			if !sum.ran[p] {
				leftOut = append(leftOut, p+" (did not run)")
			}
		}
	}
	// A hub whose parts are asked over a bus is to look the same from outside.
	if err := sum.run(ctx, root, timeout, "bus", "./test/e2e"); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	named, err := namedInDocs(root)
	if err != nil {
		return err
	}
	return sum.verdict(leftOut, named, os.Getenv("CI") != "")
}

// verdict prints what the run came to. leftOut are packages that did not run, named the tests that docs/ name; with strict a
// left-out is an error, a failure always is.
func (s *tally) verdict(leftOut, named []string, strict bool) error {
	for t := range s.skipped {
		leftOut = append(leftOut, t+" (skipped)")
	}
	for _, n := range named {
		if !s.passedNamed(n) {
			leftOut = append(leftOut, n+" (named in docs/, did not pass)")
		}
	}
	slices.Sort(leftOut)
	fmt.Printf("\n%d passed, %d failed, %d skipped\n", len(s.passed), len(s.failed)+len(s.broken), len(s.skipped))
	if len(leftOut) > 0 {
		fmt.Println("left out:", strings.Join(leftOut, "; "))
	} else {
		fmt.Println("left out: nothing")
	}
	switch {
	case len(s.failed)+len(s.broken) > 0:
		return errors.New("tests failed")
	case len(leftOut) > 0 && strict:
		return errors.New("something was left out")
	}
	return nil
}

func isAlone(pkg string) bool {
	return slices.ContainsFunc(alone, func(a string) bool { return strings.HasSuffix(pkg, "/"+a) })
}

// packages lists a module's packages, and those of them that have tests.
func packages(ctx context.Context, dir string) (all, tested []string, err error) {
	cmd := exec.CommandContext(ctx, "go", "list", "-f", "{{.ImportPath}}{{if or .TestGoFiles .XTestGoFiles}} tested{{end}}", "./...")
	cmd.Dir, cmd.Stderr = dir, os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, nil, fmt.Errorf("list packages of %s: %w", dir, err)
	}
	for line := range strings.Lines(string(out)) {
		p, has, _ := strings.Cut(strings.TrimSpace(line), " ")
		if all = append(all, p); has != "" {
			tested = append(tested, p)
		}
	}
	return all, tested, nil
}

// run runs tests of one module, with arguments for go test, prints a line per package as it ends and the output of what failed. wiring
// is how the parts of the hubs are put together, as test/hubtest understands it.
func (s *tally) run(ctx context.Context, dir, timeout, wiring string, more ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"test", "-race", "-json", "-timeout", timeout}, more...)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "COAPHUB_TEST_WIRING="+wiring)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var e event
		if json.Unmarshal(lines.Bytes(), &e) != nil {
			fmt.Println(lines.Text()) // not JSON: the go command's own words
			continue
		}
		if wiring != "" && e.Package != "" {
			e.Package += " over the " + wiring
		}
		s.take(e)
	}
	if err := cmd.Wait(); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			return err
		}
		os.Stderr.Write(stderr.Bytes())
		if len(s.failed)+len(s.broken) == 0 {
			s.broken = append(s.broken, dir)
		}
	}
	return lines.Err()
}

// unfinished is what the tests of a package said that did not end, since it broke off: one of them has the stacks.
func (s *tally) unfinished(pkg string) string {
	var b strings.Builder
	for _, key := range slices.Sorted(maps.Keys(s.output)) {
		_, test, ok := strings.Cut(key, " ")
		if ok && strings.HasPrefix(key, pkg+" ") && !s.passed[key] && !s.failed[key] && !s.skipped[key] {
			fmt.Fprintf(&b, "%s did not end:\n%s", test, strings.Join(s.output[key], ""))
		}
	}
	return b.String()
}

func (s *tally) take(e event) {
	key := e.Package
	if e.Test != "" {
		key += " " + e.Test
	}
	switch e.Action {
	case "output", "build-output":
		s.output[key] = append(s.output[key], e.Output)
		return
	case "build-fail":
		fmt.Print(strings.Join(s.output[key], ""))
		return
	case "pass", "fail", "skip":
	default:
		return
	}
	switch {
	case e.Test == "": // the package's own result; "skip" means it has no tests
		if e.Action != "skip" {
			s.ran[e.Package] = true
			fmt.Printf("%s\t%s\t%.1fs\n", map[string]string{"pass": "ok", "fail": "FAIL"}[e.Action], e.Package, e.Elapsed)
		}
		if e.Action == "fail" {
			fmt.Print(strings.Join(s.output[key], ""))
			fmt.Print(s.unfinished(e.Package))
			if !s.failedIn(e.Package) {
				s.broken = append(s.broken, e.Package)
			}
		}
	case e.Action == "pass":
		s.passed[key] = true
	case e.Action == "skip":
		s.skipped[key] = true
	default:
		s.failed[key] = true
		fmt.Print(strings.Join(s.output[key], ""))
	}
	delete(s.output, key)
}

func (s *tally) failedIn(pkg string) bool {
	for k := range s.failed {
		if strings.HasPrefix(k, pkg+" ") {
			return true
		}
	}
	return false
}

// passedNamed reports whether a test of that name (TestX or TestX/sub) passed in some package.
func (s *tally) passedNamed(name string) bool {
	for k := range s.passed {
		if strings.HasSuffix(k, " "+name) {
			return true
		}
	}
	return false
}

var testName = regexp.MustCompile("`((?:Test|Fuzz|Example)[A-Za-z0-9_]*(?:/[^`|]+)?)`")

// namedInDocs returns the tests that the tables of docs/ name in backquotes.
func namedInDocs(root string) ([]string, error) {
	seen := map[string]bool{}
	for _, f := range []string{"capabilities.md", "protocol.md", "conformance.md", "divergences.md"} {
		b, err := os.ReadFile(filepath.Join(root, "docs", f))
		if err != nil {
			return nil, err
		}
		for _, m := range testName.FindAllStringSubmatch(string(b), -1) {
			seen[m[1]] = true
		}
	}
	var out []string
	for n := range seen {
		out = append(out, n)
	}
	slices.Sort(out)
	return out, nil
}

var fuzzFunc = regexp.MustCompile(`(?m)^func (Fuzz\w+)\(`)

func fuzzAll(ctx context.Context, root, d string) error {
	mods, err := modules(root)
	if err != nil {
		return err
	}
	var failed []string
	n := 0
	for _, dir := range mods {
		pkgs, err := fuzzers(dir, mods)
		if err != nil {
			return err
		}
		for pkg, names := range pkgs {
			for _, name := range names {
				n++
				fmt.Printf("fuzz %s %s for %s\n", pkg, name, d)
				// Each input that covers something new would be made smaller for a minute, which is all the time there is.
				cmd := exec.CommandContext(
					ctx, "go", "test", "-run", "^$", "-fuzz", "^"+name+"$", "-fuzztime", d, "-fuzzminimizetime", "10x", "./"+pkg)
				var out bytes.Buffer
				cmd.Dir, cmd.Stdout, cmd.Stderr = dir, io.MultiWriter(os.Stdout, &out), os.Stderr
				switch err := cmd.Run(); {
				case err != nil && endedInTime(out.String()):
					fmt.Println("no input failed: go test took the end of its time for a failure (go.dev/issue/75804)")
				case err != nil:
					failed = append(failed, pkg+" "+name)
				}
				if ctx.Err() != nil {
					return ctx.Err()
				}
			}
		}
	}
	fmt.Printf("%d fuzzers ran, %d failed\n", n, len(failed))
	if len(failed) > 0 {
		return errors.New("failed: " + strings.Join(failed, "; "))
	}
	return nil
}

// endedInTime reports whether what a fuzzer printed says of its failure only that its time was over. Until Go 1.27 the
// coordinator sometimes loses the race between that deadline and its own clean end.
func endedInTime(out string) bool {
	_, why, failed := strings.Cut(out, "--- FAIL: ")
	lines := strings.Split(why, "\n")
	return failed && len(lines) > 1 && strings.TrimSpace(lines[1]) == context.DeadlineExceeded.Error() &&
		!strings.Contains(why, "Failing input")
}

// fuzzers maps the packages of the module in dir, but not of nested ones, to their fuzz functions.
func fuzzers(dir string, mods []string) (map[string][]string, error) {
	out := map[string][]string{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && path != dir && (slices.Contains(mods, path) || strings.HasPrefix(d.Name(), ".")) {
			return fs.SkipDir
		}
		if !strings.HasSuffix(path, "_test.go") {
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		for _, m := range fuzzFunc.FindAllStringSubmatch(string(b), -1) {
			rel, err := filepath.Rel(dir, filepath.Dir(path))
			if err != nil {
				return err
			}
			out[rel] = append(out[rel], m[1])
		}
		return nil
	})
	return out, err
}
