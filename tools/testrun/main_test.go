package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func newTally() tally {
	return tally{
		passed: map[string]bool{}, failed: map[string]bool{}, skipped: map[string]bool{}, ran: map[string]bool{},
		output: map[string][]string{},
	}
}

// feed gives a tally lines as go test -json writes them.
func feed(t *testing.T, lines string) tally {
	t.Helper()
	s := newTally()
	for line := range strings.Lines(lines) {
		var e event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		s.take(e)
	}
	return s
}

const passes = `{"Time":"2026-01-02T03:04:05Z","Action":"start","Package":"m/a"}
{"Action":"run","Package":"m/a","Test":"TestGood"}
{"Action":"output","Package":"m/a","Test":"TestGood","Output":"--- PASS: TestGood (0.00s)\n"}
{"Action":"pass","Package":"m/a","Test":"TestGood/sub","Elapsed":0}
{"Action":"pass","Package":"m/a","Test":"TestGood","Elapsed":0.1}
{"Action":"pass","Package":"m/a","Elapsed":0.2}
`

func TestTakePass(t *testing.T) {
	s := feed(t, passes)
	if len(s.passed) != 2 || len(s.failed)+len(s.skipped)+len(s.broken) != 0 || !s.ran["m/a"] {
		t.Errorf("%+v", s)
	}
	if len(s.output) != 0 && s.output["m/a TestGood"] != nil {
		t.Errorf("the output of a test that passed is kept: %q", s.output)
	}
	if !s.passedNamed("TestGood") || !s.passedNamed("TestGood/sub") || s.passedNamed("Good") || s.passedNamed("TestGoo") {
		t.Error("names are compared in whole")
	}
}

// A package that breaks off has its stacks in the output of a test that has no end.
func TestUnfinished(t *testing.T) {
	s := feed(t, passes+`{"Action":"run","Package":"m/b","Test":"TestHangs"}
{"Action":"output","Package":"m/b","Test":"TestHangs","Output":"goroutine 7 [sleep]\n"}
{"Action":"output","Package":"m/b","Test":"TestFails","Output":"seen before\n"}
{"Action":"fail","Package":"m/b","Test":"TestFails","Elapsed":1}
{"Action":"fail","Package":"m/b","Elapsed":60}
`)
	if got := s.unfinished("m/b"); got != "TestHangs did not end:\ngoroutine 7 [sleep]\n" {
		t.Errorf("%q", got)
	}
	if got := s.unfinished("m/a"); got != "" {
		t.Errorf("%q", got)
	}
}

func TestTakeSkip(t *testing.T) {
	s := feed(t, `{"Action":"skip","Package":"m/a","Test":"TestLazy","Elapsed":0}
{"Action":"pass","Package":"m/a","Elapsed":0.2}
{"Action":"skip","Package":"m/none","Elapsed":0}
`)
	if !s.skipped["m/a TestLazy"] || len(s.skipped) != 1 || s.passedNamed("TestLazy") {
		t.Errorf("%+v", s)
	}
	if s.ran["m/none"] {
		t.Error("a package without tests counts as one whose tests ran")
	}
}

func TestTakeFailure(t *testing.T) {
	s := feed(t, `{"Action":"fail","Package":"m/a","Test":"TestBad","Elapsed":0}
{"Action":"fail","Package":"m/a","Elapsed":0.2}
`)
	if !s.failed["m/a TestBad"] || len(s.broken) != 0 || s.passedNamed("TestBad") {
		t.Errorf("%+v", s)
	}
}

// A package that does not compile, and one that ends by a panic or a timeout, fail without a test that does. One whose name
// begins another's is not excused by it.
func TestTakeBroken(t *testing.T) {
	s := feed(t, `{"ImportPath":"m/b [m/b.test]","Action":"build-output","Output":"b_test.go:3:1: syntax error\n"}
{"ImportPath":"m/b [m/b.test]","Action":"build-fail"}
{"Action":"start","Package":"m/b"}
{"Action":"output","Package":"m/b","Output":"FAIL\tm/b [build failed]\n"}
{"Action":"fail","Package":"m/b","Elapsed":0,"FailedBuild":"m/b [m/b.test]"}
{"Action":"fail","Package":"m/cd","Test":"TestBad","Elapsed":0}
{"Action":"fail","Package":"m/cd","Elapsed":0}
{"Action":"output","Package":"m/c","Output":"panic: test timed out after 10m0s\n"}
{"Action":"fail","Package":"m/c","Elapsed":600}
`)
	if !slices.Equal(s.broken, []string{"m/b", "m/c"}) {
		t.Errorf("broken: %q", s.broken)
	}
}

func TestTestsNamedInDocs(t *testing.T) {
	root := t.TempDir()
	if err := os.Mkdir(filepath.Join(root, "docs"), 0o700); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"capabilities.md": "| `TestGood`, `TestGood/sub` | TestUnquoted |", "protocol.md": "| `FuzzX` | `TestGood` |",
		"conformance.md": "| `TestOther` |", "divergences.md": "`notATest`",
	} {
		if err := os.WriteFile(filepath.Join(root, "docs", name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	named, err := namedInDocs(root)
	if want := []string{"FuzzX", "TestGood", "TestGood/sub", "TestOther"}; err != nil || !slices.Equal(named, want) {
		t.Errorf("%q, %v, want %q", named, err, want)
	}
	if err := os.Remove(filepath.Join(root, "docs", "protocol.md")); err != nil {
		t.Fatal(err)
	}
	if _, err := namedInDocs(root); err == nil {
		t.Error("a missing document is nothing to complain about")
	}
}

// What is left out fails a strict run, which CI's is, and is only named elsewhere; a failure fails each.
func TestVerdict(t *testing.T) {
	const skips = `{"Action":"skip","Package":"m/a","Test":"TestLazy"}` + "\n"
	const fails = `{"Action":"fail","Package":"m/a","Test":"TestBad"}` + "\n"
	const builds = `{"Action":"fail","Package":"m/b"}` + "\n"
	for _, c := range []struct {
		name, lines    string
		leftOut, named []string
		strict, loose  string
	}{
		{"good", passes, nil, []string{"TestGood", "TestGood/sub"}, "", ""},
		{"skipped", passes + skips, nil, nil, "something was left out", ""},
		{"package did not run", passes, []string{"m/x (did not run)"}, nil, "something was left out", ""},
		{"named but missing", passes, nil, []string{"TestGone"}, "something was left out", ""},
		{"named but failed", passes + fails, nil, []string{"TestBad"}, "tests failed", "tests failed"},
		{"failed", passes + fails, nil, nil, "tests failed", "tests failed"},
		{"does not compile", passes + builds, nil, nil, "tests failed", "tests failed"},
	} {
		for _, strict := range []bool{true, false} {
			s, want, got := feed(t, c.lines), c.loose, ""
			if strict {
				want = c.strict
			}
			if err := s.verdict(c.leftOut, c.named, strict); err != nil {
				got = err.Error()
			}
			if got != want {
				t.Errorf("%s, strict %v: %q, want %q", c.name, strict, got, want)
			}
		}
	}
}

// Only the end of a fuzzer's time is forgiven, and only when nothing else is said.
func TestEndedInTime(t *testing.T) {
	const running = "fuzz: elapsed: 3s, execs: 40304 (13431/sec), new interesting: 104 (total: 108)\n"
	for name, c := range map[string]struct {
		out  string
		want bool
	}{
		"nothing":          {"", false},
		"does not compile": {"# m/a\na.go:1:1: context deadline exceeded\n", false},
		"end of its time":  {running + "--- FAIL: FuzzX (3.20s)\n    context deadline exceeded\nFAIL\nexit status 1\n", true},
		"an input":         {running + "--- FAIL: FuzzX (1.0s)\n    --- FAIL: FuzzX (0.00s)\n        x_test.go:1: bad\n", false},
		"an input that hung": {
			running + "--- FAIL: FuzzX (3.20s)\n    context deadline exceeded\n    Failing input written to testdata/fuzz/FuzzX/1\n", false,
		},
		"the test's own words": {running + "--- FAIL: FuzzX (0.1s)\n    x_test.go:9: context deadline exceeded\n", false},
	} {
		if got := endedInTime(c.out); got != c.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestAloneIsThere(t *testing.T) {
	for _, a := range alone {
		tests, err := filepath.Glob(filepath.Join("../..", a, "*_test.go"))
		if err != nil || len(tests) == 0 {
			t.Errorf("%s has no tests: %v", a, err)
		}
	}
	if !isAlone("github.com/coaphub/coaphub/test/cluster") || isAlone("github.com/coaphub/coaphub/test/e2e") {
		t.Error("the wrong packages run alone")
	}
}
