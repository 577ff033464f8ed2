package conf

import (
	"strings"
)

// Problem is one mistake in a configuration.
type Problem struct {
	Path string // of the key, with dots: coapGateway.api.coap.address; empty: the whole
	From string // where it was said: a line of the file, an environment variable, a flag; may be empty
	Text string // what is wrong and, where it helps, what to write instead
}

// Error is path, place and text on one line.
func (p Problem) Error() string {
	s := p.Path
	switch {
	case s == "":
		s = p.From
	case p.From != "":
		s += " (" + p.From + ")"
	}
	if s != "" {
		s += ": "
	}
	return s + p.Text
}

// Problems is all mistakes of a configuration together, as an error.
type Problems []Problem

// Error lists the problems, one a line.
func (ps Problems) Error() string {
	if len(ps) == 1 {
		return "the configuration has a mistake: " + ps[0].Error()
	}
	var b strings.Builder
	b.WriteString("the configuration has mistakes:")
	for _, p := range ps {
		b.WriteString("\n  " + p.Error())
	}
	return b.String()
}

// Err returns ps, or nil if there is no problem.
func (ps Problems) Err() error {
	if len(ps) == 0 {
		return nil
	}
	return ps
}
