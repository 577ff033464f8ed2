package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/coaphub/coaphub/test/hubtest"
)

// openTerminal opens a terminal for a command: its person types what is written to them, and reads what the command shows.
func openTerminal(t *testing.T) (person, tty *os.File) {
	t.Helper()
	person, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = person.Close() })
	if err := unix.IoctlSetPointerInt(int(person.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(person.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	if tty, err = os.OpenFile(fmt.Sprint("/dev/pts/", n), os.O_RDWR|unix.O_NOCTTY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = tty.Close() })
	return person, tty
}

// What an answer has was made by a device, too: it does not steer the terminal it is shown on.
func TestCallOnATerminal(t *testing.T) {
	t.Parallel()
	for _, s := range []struct{ kind, body, shows string }{
		{"text/plain", "a\tb\n\x1b[2Jc\u009b2Jd\u202e\n", "a\tb\n\ufffd[2Jc\ufffd2Jd\ufffd\n"},
		{"application/octet-stream", "\x9b2J\xff\x00", "\ufffd2J\ufffd\ufffd"},
		{"text/plain", strings.Repeat("é", 100_000), strings.Repeat("é", 100_000)},
		{"application/json", `{"a":"` + "\u009b2J" + `"}`, "{\n  \"a\": \"\ufffd2J\"\n}\n"},
	} {
		api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", s.kind)
			_, _ = io.WriteString(w, s.body)
		}))
		args := []string{"call", "GET", "/x", "--server", api.URL, "--token", "x"}
		person, tty := openTerminal(t)
		shown := make(chan string, 1)
		go func() { // ends with the terminal
			b, _ := io.ReadAll(person) // the error of a terminal that nobody has open any more
			shown <- strings.ReplaceAll(string(b), "\r\n", "\n")
		}()
		code := execute(t.Context(), args, process{strings.NewReader(""), tty, io.Discard, nil})
		if err := tty.Close(); err != nil {
			t.Fatal(err)
		}
		if got := <-shown; code != exitOK || got != s.shows {
			t.Errorf("%s %.40q is shown as %.80q, with %d", s.kind, s.body, got, code)
		}
		// Files and pipes get it as it is.
		if r := runs(t, append(args, "--json")...); r.code != exitOK || strings.TrimSuffix(r.out, "\n") != strings.TrimSuffix(s.body, "\n") {
			t.Errorf("%s %.40q is written as %.80q, with %d", s.kind, s.body, r.out, r.code)
		}
		api.Close()
	}
}

// Who types no password is asked for one: the hub would take none for a wish for a one-time password.
func TestPasswordOnATerminal(t *testing.T) {
	t.Parallel()
	h := hubtest.Start(t)
	for typed, want := range map[string]result{
		"\n":                      {exitUsage, "^$", `^password: \ncoaphub: --password-stdin: no password was typed`},
		"correct horse battery\n": {exitOK, `^added alice \(user\)\n$`, "^password: \n$"},
	} {
		person, tty := openTerminal(t)
		if _, err := io.WriteString(person, typed); err != nil {
			t.Fatal(err)
		}
		var out, errs bytes.Buffer
		code := execute(t.Context(), []string{"user", "add", "alice", "--password-stdin", "--data", h.Data}, process{tty, &out, &errs, nil})
		result{code, out.String(), errs.String()}.want(t, want.code, want.out, want.err)
	}
}
