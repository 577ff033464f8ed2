package simulation

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/coaphub/coaphub/test/dose"
)

var (
	only  = flag.Uint64("seed", 0, "play this seed alone, and tell its story")
	first = flag.Uint64("first", 0, "play the seeds from this one on")
	last  = flag.Uint64("last", 0, "and up to this one")
	story = flag.Bool("story", false, "tell the story of a seed that fails")
)

// TestMain has one goroutine run at a time, so that a seed plays out again as far as that goes.
func TestMain(m *testing.M) {
	flag.Parse()
	runtime.GOMAXPROCS(1)
	os.Exit(m.Run())
}

// beside is how many seeds are played under the race detector, which costs six times the time; all others are played without.
const beside = 5

// Whatever happens, what design and decisions promise holds.
func TestInvariants(t *testing.T) {
	seeds := dose.Of[uint64](beside, 1000, 10_000)
	from, to := uint64(1), uint64(beside)
	switch {
	case *only != 0:
		from, to = *only, *only
	case *first != 0:
		from, to = *first, *last
	}
	for seed := from; seed <= to && !t.Failed(); seed++ {
		report(t, seed, simulate(t, seed, broken{}, *only != 0 || *story))
	}
	if *only != 0 || *first != 0 || seeds <= beside {
		return
	}
	program := filepath.Join(t.TempDir(), "simulation.test")
	if out, err := exec.CommandContext(t.Context(), "go", "test", "-c", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("build without the race detector: %v\n%s", err, out)
	}
	rest := exec.CommandContext(t.Context(), program, "-test.run=^TestInvariants$", "-test.timeout=0", "-story", fmt.Sprint("-first=", beside+1), fmt.Sprint("-last=", seeds))
	if out, err := rest.CombinedOutput(); err != nil {
		t.Errorf("%v\n%s", err, out)
	}
}

func report(t *testing.T, seed uint64, w *world) {
	if *only != 0 || *story && len(w.faults) > 0 {
		fmt.Println(strings.Join(w.story, "\n"))
	}
	for _, f := range w.faults {
		t.Errorf("seed %d: %s", seed, f)
	}
}

// What is broken is noticed, for what it is: each of these is a promise less.
func TestBrokenPromisesAreNoticed(t *testing.T) {
	const most = 40
	for name, c := range map[string]struct {
		broken
		says string
	}{
		"two commits of one seq":                        {broken{unfenced: true}, "are in the feed and not in the log"},
		"an acknowledged commit is lost":                {broken{forgetful: true}, "was acknowledged and is lost"},
		"a commit is not in the feed":                   {broken{dropped: true}, "is not in the feed"},
		"an old session's write passes for a new one's": {broken{oldSessions: true}, "and is stored as said in session"},
		"a write that may be done is done again":        {broken{newNumbers: true}, "is stored 2 times"},
		"a subscriber is told again what he was told":   {broken{repeated: true}, "the subscriber of"},
		"a subscriber passes over what is new":          {broken{skipping: true}, "the subscriber of"},
		"a command goes to the next session, too":       {broken{handedOn: true}, "went out in session"},
	} {
		t.Run(strings.ReplaceAll(name, " ", "-"), func(t *testing.T) {
			for seed := uint64(1); seed <= most; seed++ {
				w := simulate(t, seed, c.broken, false)
				for _, f := range w.faults {
					if strings.Contains(f, c.says) {
						t.Logf("seed %d: %s", seed, f)
						return
					}
				}
			}
			t.Errorf("nobody noticed in %d seeds", most)
		})
	}
}
