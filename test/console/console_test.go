package console_test

import (
	"encoding/json"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const web = "../../web"

// installed skips where node, the browser or the packages of the console are not there.
func installed(t *testing.T) {
	t.Helper()
	for _, program := range []string{"node", "/usr/bin/chromium"} {
		if _, err := exec.LookPath(program); err != nil {
			t.Skip(program + " is not installed (Debian: nodejs, chromium)")
		}
	}
	if _, err := os.Stat(web + "/node_modules/playwright-core"); err != nil {
		t.Skip("the console's packages are not installed (npm ci --prefix web)")
	}
	// go remembers what a test came to by the files that it opened: those that other programs open for it are looked at here.
	err := filepath.WalkDir("../..", func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == "node_modules" || d.Name() == ".git" || d.Name() == "bin" || d.Name() == "data"):
			return fs.SkipDir
		case slices.Contains([]string{".go", ".mod", ".sum", ".ts", ".tsx", ".css", ".js", ".html", ".json"}, filepath.Ext(path)):
			_, err = os.ReadFile(path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// vitest runs tests of the console and gives each a place in Go's list.
func vitest(t *testing.T, config string, env ...string) {
	t.Helper()
	out := filepath.Join(t.TempDir(), "results.json")
	args := []string{"node_modules/vitest/vitest.mjs", "run", "--reporter=json", "--reporter=default", "--outputFile=" + out}
	if config != "" {
		args = append(args, "--config", config)
	}
	cmd := exec.CommandContext(t.Context(), "node", args...)
	cmd.Dir = web
	cmd.Env = append(append(os.Environ(), "NO_COLOR=1"), env...)
	said, failed := cmd.CombinedOutput()
	text, err := os.ReadFile(out)
	if err != nil {
		t.Fatalf("%v, %v:\n%s", failed, err, said)
	}
	var results struct {
		TestResults []struct {
			Message          string
			Status           string
			AssertionResults []struct {
				AncestorTitles  []string
				Title, Status   string
				FailureMessages []string
			}
		}
	}
	if err := json.Unmarshal(text, &results); err != nil {
		t.Fatal(err)
	}
	tests := 0
	for _, file := range results.TestResults {
		if file.Status != "passed" && file.Message != "" {
			t.Error(file.Message)
		}
		for _, a := range file.AssertionResults {
			tests++
			t.Run(strings.Join(append(a.AncestorTitles, a.Title), "/"), func(t *testing.T) {
				switch a.Status {
				case "passed":
				case "failed":
					t.Error(strings.Join(a.FailureMessages, "\n"))
				default:
					t.Skip(a.Status)
				}
			})
		}
	}
	if tests == 0 || failed != nil && !t.Failed() {
		t.Errorf("%d tests, %v:\n%s", tests, failed, said)
	}
}

// The logic of the console, without a browser.
func TestConsoleLogic(t *testing.T) {
	installed(t)
	vitest(t, "")
}

// build makes the hub's program.
func build(t *testing.T) string {
	t.Helper()
	program := filepath.Join(t.TempDir(), "coaphub")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../../cmd/coaphub").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return program
}

// The console in Chromium, against a hub with simulated devices.
func TestConsole(t *testing.T) {
	installed(t)
	vitest(t, "vitest.e2e.config.ts", "COAPHUB_PROGRAM="+build(t))
}
