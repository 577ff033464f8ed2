// Command build builds the MongoDB server of the folder above into the file that its argument names.
//
// FerretDB 1.24 hands to SQLite only what asks for one `_id` and for nothing else. All other commands read and decode the whole table:
// each write of one device then costs as much as all devices have, and no cluster with a few of them gets anywhere. So the program is built
// with one function of FerretDB's changed: it has SQLite leave out documents whose `_id` cannot be meant (pushdown.go.txt). FerretDB still
// filters what it gets as before, so what commands mean stays as it is. The change is made in a copy of FerretDB's module that is gone
// after the build; when another version of FerretDB has other text in that place, the build says so.
//
// It must not know the hub.
package main

import (
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

//go:embed pushdown.go.txt
var pushdown []byte

const ferret = "github.com/FerretDB/FerretDB"

// In FerretDB's file, what a query does with its filter, and what it is to do.
const (
	before = `	if params.Filter.Len() == 1 {
		v, _ := params.Filter.Get("_id")
		switch v.(type) {
		case string, types.ObjectID:
			whereClause = fmt.Sprintf(` + "` WHERE %s = ?`" + `, metadata.IDColumn)
			args = []any{string(must.NotFail(sjson.MarshalSingleValue(v)))}
		}
	}

	q += whereClause
`
	after = `	whereClause, args = meant(params.Filter)

	q += whereClause
`
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "build:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return errors.New("usage: build FILE")
	}
	out, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", ferret).Output()
	if err != nil {
		return fmt.Errorf("look for FerretDB: %w", err)
	}
	tmp, err := os.MkdirTemp("", "coaphub-mongo-build")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	module := filepath.Join(tmp, "ferretdb")
	if err := errors.Join(change(strings.TrimSpace(string(out)), module), use(module, tmp)); err != nil {
		return err
	}
	// With -trimpath the go command keeps what it built for the next time, whatever the folder is called then.
	build := exec.Command("go", "build", "-trimpath", "-modfile", filepath.Join(tmp, "go.mod"), "-ldflags", "-s -w", "-o", os.Args[1], ".")
	build.Stdout, build.Stderr = os.Stdout, os.Stderr
	return build.Run()
}

// change copies FerretDB's module, and changes the copy.
func change(from, to string) error {
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return err
	}
	folder := filepath.Join(to, "internal", "backends", "sqlite")
	file := filepath.Join(folder, "collection.go")
	text, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if strings.Count(string(text), before) != 1 {
		return fmt.Errorf("%s is not as it was: see what its Query does with its filter now", file)
	}
	return errors.Join(
		os.WriteFile(file, []byte(strings.Replace(string(text), before, after, 1)), 0o600),
		os.WriteFile(filepath.Join(folder, "pushdown.go"), pushdown, 0o600),
	)
}

// use writes this module's go.mod and go.sum into tmp, with another folder for FerretDB.
func use(module, tmp string) error {
	for _, name := range []string{"go.mod", "go.sum"} {
		text, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		if name == "go.mod" {
			text = fmt.Appendf(text, "\nreplace %s => %s\n", ferret, module)
		}
		if err := os.WriteFile(filepath.Join(tmp, name), text, 0o600); err != nil {
			return err
		}
	}
	return nil
}
