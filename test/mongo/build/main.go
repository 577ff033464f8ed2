// Command build builds the MongoDB server of the folder above into the file that its argument names.
//
// FerretDB 1.24 on SQLite reads, and decodes, the whole table for every command, so each write of one device costs as much as all devices
// have, and a cluster with a few dozen of them gets nowhere. It has two reasons: SQLite has an index of `_id`, but is asked with another
// expression than the index is made of, so never uses it; and only what asks for one `_id` and nothing else is handed on to SQLite at all. So
// the program is built with both changed: the expression is the index's, and SQLite leaves out documents whose `_id` cannot be meant
// (pushdown.go.txt). FerretDB still filters what it gets as before, so what commands mean stays as it is. The changes are made in a copy of
// FerretDB's module that is gone after the build; when another version of FerretDB has other text in these places, the build says so.
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

// changes are what is changed: a file below the folder of SQLite's back end, what it has, and what it is to have.
var changes = []struct{ file, before, after string }{
	{"metadata/metadata.go", "IDColumn = DefaultColumn + \"->'$._id'\"", "IDColumn = DefaultColumn + `->\"_id\"`"},
	{"collection.go", `	if params.Filter.Len() == 1 {
		v, _ := params.Filter.Get("_id")
		switch v.(type) {
		case string, types.ObjectID:
			whereClause = fmt.Sprintf(` + "` WHERE %s = ?`" + `, metadata.IDColumn)
			args = []any{string(must.NotFail(sjson.MarshalSingleValue(v)))}
		}
	}

	q += whereClause
`, `	whereClause, args = meant(params.Filter)

	q += whereClause
`},
}

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
	for _, c := range changes {
		file := filepath.Join(folder, filepath.FromSlash(c.file))
		text, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		if strings.Count(string(text), c.before) != 1 {
			return fmt.Errorf("FerretDB's %s is not as it was: see whether SQLite finds documents by their _id now", c.file)
		}
		if err := os.WriteFile(file, []byte(strings.Replace(string(text), c.before, c.after, 1)), 0o600); err != nil {
			return err
		}
	}
	return os.WriteFile(filepath.Join(folder, "pushdown.go"), pushdown, 0o600)
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
