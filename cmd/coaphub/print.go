package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
)

// printJSON writes v for scripts: one object or array, indented.
func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(v)
}

// table writes rows in columns, with heads above them.
type table struct {
	w    *tabwriter.Writer
	rows int    // with the heads
	note string // about an empty table; goes where scripts do not look
}

func newTable(w io.Writer, heads ...string) *table {
	t := &table{w: tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)}
	t.row(heads...)
	return t
}

func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = plain(c)
	}
	t.rows++
	_, _ = fmt.Fprintln(t.w, strings.Join(cells, "\t"))
}

func (t *table) end() error { return t.w.Flush() }

// finish ends the table of a list that was read until err; if that was at once, there is nothing to show but the error.
func (t *table) finish(notes io.Writer, err error) error {
	if err != nil && t.rows == 1 {
		return err
	}
	err = errors.Join(err, t.end())
	if err == nil && t.note != "" {
		_, _ = fmt.Fprintln(notes, t.note)
	}
	return err
}

// plain takes control characters out of a text that came from a device or an application, so that it cannot steer the
// terminal it is shown on.
func plain(s string) string {
	return strings.Map(func(r rune) rune {
		if r < 0x20 || r == 0x7f || r >= 0x80 && r < 0xa0 || r == '\u202e' {
			return '\ufffd'
		}
		return r
	}, s)
}

// copyPlain copies a text of several lines as plain does: line feeds and tabs stay, what is not UTF-8 becomes U+FFFD.
func copyPlain(w io.Writer, r io.Reader) error {
	in, out := bufio.NewReader(r), bufio.NewWriter(w)
	for {
		c, _, err := in.ReadRune()
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = nil
			}
			return errors.Join(err, out.Flush())
		}
		text := string(c)
		if c != '\n' && c != '\t' {
			text = plain(text)
		}
		if _, err := out.WriteString(text); err != nil {
			return err
		}
		if in.Buffered() == 0 { // the next may take its time
			if err := out.Flush(); err != nil {
				return err
			}
		}
	}
}
