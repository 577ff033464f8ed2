package main

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/bundle"
)

// TestMigrationProgress: on a terminal there is a line for each step, written over once a second; elsewhere nothing.
func TestMigrationProgress(t *testing.T) {
	t.Parallel()
	steps := func(p *pace) {
		for n := range int64(3) {
			p.at(bundle.MigrationProgress{Step: "copying devices", Of: 3, Tally: bundle.Tally{Devices: n + 1, Events: 10 * (n + 1)}})
		}
		p.shown = p.shown.Add(-time.Second) // as if one had gone by
		p.at(bundle.MigrationProgress{Step: "copying devices", Of: 3, Tally: bundle.Tally{Devices: 3, Events: 30}})
		p.at(bundle.MigrationProgress{Step: "copying documents", Of: 3, Tally: bundle.Tally{Devices: 3, Events: 30, Documents: 7}})
		p.at(bundle.MigrationProgress{Step: "comparing", Of: 3, Tally: bundle.Tally{Devices: 2}})
		p.end()
		p.end()
	}
	var seen, quiet bytes.Buffer
	steps(&pace{w: &seen, on: true})
	steps(&pace{w: &quiet})
	if quiet.Len() > 0 {
		t.Errorf("without a terminal it prints %q", &quiet)
	}
	lines := strings.Split(seen.String(), "\n")
	if len(lines) != 4 || strings.Count(lines[0], "\r") != 2 || lines[3] != "" {
		t.Fatalf("it prints %q", &seen)
	}
	for i, want := range []string{"copying devices: 3 of 3 devices, 30 events, ", "copying documents: 7, ", "comparing: 2 of 3 devices"} {
		if !strings.Contains(lines[i], want) {
			t.Errorf("line %d is %q, want %q", i, lines[i], want)
		}
	}
}

func TestMigrateWantsADirection(t *testing.T) {
	t.Parallel()
	var out, said bytes.Buffer
	code := execute(t.Context(), []string{"migrate", "sideways"}, process{in: strings.NewReader(""), out: &out, err: &said})
	if code != exitUsage || !strings.Contains(said.String(), "sideways") {
		t.Errorf("it ends with %d and says %q", code, &said)
	}
}
