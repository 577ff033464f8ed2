package main

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/coaphub/coaphub/test/hubtest"
)

var update = flag.Bool("update", false, "write what the commands printed into the script")

// varies are what is another in each run; it is a word in the script.
var varies = []struct {
	re   *regexp.Regexp
	with string
}{
	{regexp.MustCompile(`"(timestamp|connectedAt|syncingAt|inSyncAt|validUntil|forceSynchronizationAt|currentTime)": ?"?\d{3,}"?`), `"$1": TIME`},
	{regexp.MustCompile(`"(version|sequence|number)": ?"\d+"`), `"$1": N`},
	{regexp.MustCompile(`"(id|connectionId|correlationId|hubId|serviceId|cursor)": ?"([0-9a-f-]{36}|[A-Z2-7]{26}|[\w-]{60,})"`), `"$1": ID`},
	{regexp.MustCompile(`"etag": ?"[^"]*"`), `"etag": ETAG`},
	// What the hub saw of a device before its publish came has no types yet.
	{regexp.MustCompile(`("etag": ETAG),"resourceTypes":\[[^\]]*\]`), `$1`},
	{regexp.MustCompile(`"coaps\+tcp://[^"]*"`), `ENDPOINT`},
	{regexp.MustCompile(`\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.\d+)?Z?`), `TIME`},
	{regexp.MustCompile(`127\.0\.0\.1:\d+`), `ADDRESS`},
}

// TestClientScript plays testdata/client.txt, a session at a shell, against a hub with one device. A line "$ coaphub …" is what
// somebody types, what follows is what it prints, standard error behind standard output, and "exit N" unless N is 0. LAMP is
// the device; "~" in place of "$" asks again until it prints what the script has.
func TestClientScript(t *testing.T) {
	t.Parallel()
	const file = "testdata/client.txt"
	h := hubtest.Start(t)
	h.Device(t, lamp, "lamp")
	env := []string{"COAPHUB_DATA=" + h.Data}
	types := func(line string) string {
		args := strings.Fields(strings.ReplaceAll(line, "LAMP", lamp))
		r := runsWith(t, "", env, args[1:]...)
		text := strings.ReplaceAll(r.out+r.err, lamp, "LAMP")
		for _, v := range varies {
			text = v.re.ReplaceAllString(text, v.with)
		}
		if text != "" && !strings.HasSuffix(text, "\n") {
			text += "\n"
		}
		if r.code != exitOK {
			text += fmt.Sprintf("exit %d\n", r.code)
		}
		return text
	}
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for part := range strings.SplitSeq(string(b), "\n\n") {
		part = strings.TrimRight(part, "\n") + "\n"
		line, want, _ := strings.Cut(part, "\n")
		command, typed := strings.CutPrefix(line, "$ ")
		patient := false
		if !typed {
			command, patient = strings.CutPrefix(line, "~ ")
		}
		if !typed && !patient { // a comment
			out.WriteString(part + "\n")
			continue
		}
		got := types(command)
		poll := time.NewTicker(20 * time.Millisecond)
		for deadline := time.Now().Add(10 * time.Second); patient && got != want && time.Now().Before(deadline); {
			<-poll.C
			got = types(command)
		}
		poll.Stop()
		if got != want && !*update {
			t.Errorf("%s\nprinted\n%swant\n%s", line, got, want)
		}
		out.WriteString(line + "\n" + got + "\n")
	}
	if *update {
		if err := os.WriteFile(file, []byte(strings.TrimRight(out.String(), "\n")+"\n"), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
