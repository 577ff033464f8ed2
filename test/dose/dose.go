// Package dose says how much of a long test is to be done: little for bare `go test`, which somebody waits for, more for `make
// test`, and all of it for `make nightly`. COAPHUB_DOSE says which: nothing, day or night. Whatever the dose, a test shows the
// same thing, only more or less often.
//
// It must not know the tests.
package dose

import (
	"flag"
	"fmt"
	"os"
	"strconv"
	"testing"
)

// Night reports whether the night's dose was asked for.
func Night() bool { return env() == "night" }

// Of returns the one of three amounts that was asked for: rounds, devices, seconds.
func Of[T any](little, day, night T) T {
	switch env() {
	case "":
		return little
	case "day":
		return day
	}
	return night
}

// Seeds sets how many random cases rapid.Check tries until t ends. Tests that run beside t, and do the same, disturb it.
func Seeds(t *testing.T, little, day, night int) {
	t.Helper()
	checks := flag.Lookup("rapid.checks")
	before := checks.Value.String()
	if err := checks.Value.Set(strconv.Itoa(Of(little, day, night))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = checks.Value.Set(before) })
}

func env() string {
	d := os.Getenv("COAPHUB_DOSE")
	if d != "" && d != "day" && d != "night" {
		panic(fmt.Sprintf("COAPHUB_DOSE is %q: it must be day, night or empty", d)) // a typing error must not make a night short
	}
	return d
}
