package e2e_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// TestTour types the README's tour as it stands, in an empty folder, and compares what it prints with what the README shows:
// line by line, where "…" stands for any further lines or the rest of a line. Only the ports are others, and the hub's name
// for this machine is the loopback address, so that a test listens nowhere else.
func TestTour(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("coap-client-openssl"); err != nil {
		t.Skip("coap-client-openssl is not installed (Debian: libcoap3-bin)")
	}
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, tour, ok := strings.Cut(string(readme), "## Five minutes\n")
	if !ok {
		t.Fatal("the README has no tour")
	}
	tour, _, _ = strings.Cut(tour, "\n## ")
	home := t.TempDir()
	if err := os.Mkdir(filepath.Join(home, "bin"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(hubProgram(t), filepath.Join(home, "bin", "coaphub")); err != nil {
		t.Fatal(err)
	}
	p := serve(t, filepath.Join(home, "data"))
	here := func(p *process) *strings.Replacer {
		return strings.NewReplacer("127.0.0.1:5684", p.coaps(), "http://127.0.0.1:8080", p.ready["http"], "coaps://127.0.0.1:15684", p.ready["enrolment"])
	}
	steps := tourStep.FindAllStringSubmatch(tour, -1)
	if len(steps) < 8 {
		t.Fatalf("the tour has %d steps", len(steps))
	}
	starts := 0
	value := "" // of the light, which must be the same after the hub was killed
	for i, s := range steps {
		commands, shown := s[1], s[2]
		if strings.TrimSpace(commands) == "make run" { // builds, and starts "coaphub serve"
			if starts++; starts > 1 {
				<-p.ended // a step killed it
				p.ended <- nil
				p = serve(t, p.data)
			}
			if shown != "" {
				compareTour(t, commands, shown, p.line)
			}
			continue
		}
		if i == 0 {
			t.Fatalf("the tour begins with %q", commands)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		sh := exec.CommandContext(ctx, "sh", "-c", `PATH="$PWD/bin:$PATH"`+"\n"+here(p).Replace(commands))
		sh.Dir = home
		var out, errs bytes.Buffer
		sh.Stdout, sh.Stderr = &out, &errs
		err := sh.Run()
		cancel()
		if err != nil {
			t.Errorf("%s\n%v\n%s%s", commands, err, out.String(), errs.String())
			continue
		}
		compareTour(t, commands, shown, out.String())
		if found := lightValue.FindStringSubmatch(out.String()); found != nil {
			if value != "" && found[1] != value {
				t.Errorf("%s\nprints %s, it was %s", commands, found[1], value)
			}
			value = found[1]
		}
	}
	if starts != 2 || value == "" {
		t.Errorf("the tour started the hub %d times and showed the light as %q", starts, value)
	}
}

// lightValue is the light's whole value, on a line of its own or at its end; history shows older ones beside it.
var lightValue = regexp.MustCompile(`(?m)^(?:/light/1 +OK +)?(\{"name":"Light".*\})$`)

// A step is what is typed, and what is shown for it if anything is.
var tourStep = regexp.MustCompile("(?s)```sh\n(.*?)```\n(?:```\n(.*?)```\n)?")

// compareTour compares word by word, after values that differ from run to run became words in capitals.
func compareTour(t *testing.T, commands, shown, printed string) {
	t.Helper()
	var pattern strings.Builder
	for _, line := range everyLine(shown) {
		if line == "…" {
			pattern.WriteString(`(?:.*\n)*?`)
			continue
		}
		line = regexp.QuoteMeta(line)
		line = strings.ReplaceAll(line, "…", ".*")
		pattern.WriteString(line)
		pattern.WriteString(`\n`)
	}
	var text strings.Builder
	for _, line := range everyLine(printed) {
		text.WriteString(line)
		text.WriteString("\n")
	}
	if !regexp.MustCompile(`\A` + pattern.String() + `\z`).MatchString(text.String()) {
		t.Errorf("%s\nprints\n%s\nand the README shows\n%s", commands, printed, shown)
	}
}

// everyLine is the lines of a text as every run has them. How often something that takes long tells of its progress is not the
// same in every run.
func everyLine(text string) []string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for i, line := range lines {
		lines[i] = everyRun(line)
	}
	return slices.CompactFunc(lines, func(a, b string) bool { return a == b && strings.HasPrefix(a, "Ns devices") })
}

// everyRun replaces what differs from run to run.
func everyRun(line string) string {
	for _, v := range varying {
		line = v.find.ReplaceAllString(line, v.word)
	}
	return strings.Join(strings.Fields(line), " ")
}

var varying = []struct {
	find *regexp.Regexp
	word string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z?`), "TIME"},
	{regexp.MustCompile(`^[A-Z][a-z]{2} \d\d \d\d:\d\d:\d\d\.\d{3} `), "TIME "},
	{regexp.MustCompile(`(hub=|hub +|hub )[0-9a-f]{8}-[0-9a-f-]{27}`), "${1}HUB"},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), "127.0.0.1:PORT"},
	{regexp.MustCompile(`(/[\w.-]+)+/data`), "/DATA"},
	{regexp.MustCompile(`^version .*`), "version V"},
	{regexp.MustCompile(`^running .*`), "running R"},
	{regexp.MustCompile(`^code +\S+`), "code C"},
	{regexp.MustCompile(`"accesstoken":"eyJ[\w.-]+(…|.*)`), `"accesstoken":TOKEN`},
	{regexp.MustCompile(`^ *\d+s  devices`), "Ns devices"},
	{regexp.MustCompile(`notified \d+ \(\d+/s\)  requests \d+`), "notified N"},
	{regexp.MustCompile(`"power":\d+,"state":(true|false)`), `"power":N,"state":B`},
	{regexp.MustCompile(`[\d.]+ KiB`), "SIZE"},
}
