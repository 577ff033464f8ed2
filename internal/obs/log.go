package obs

import (
	"fmt"
	"io"
	"log/slog"
	"strings"

	"github.com/coaphub/coaphub/internal/conf"
)

// LogConfig says what is logged and how.
type LogConfig struct {
	// Level is the least that is logged: debug, info, warn or error. Debug has one line per request. Default info.
	Level string `yaml:"level"`
	// Format is the form of a line: json or text. Default text.
	Format string `yaml:"format"`
}

// DefaultLog is the log without configuration.
func DefaultLog() LogConfig { return LogConfig{Level: "info", Format: "text"} }

// Validate returns the mistakes, with paths below the one given.
func (c LogConfig) Validate(path string) (ps conf.Problems) {
	if _, err := c.level(); err != nil {
		ps = append(ps, conf.Problem{Path: path + ".level", Text: fmt.Sprintf("%q is not a level; write debug, info, warn or error", c.Level)})
	}
	if c.Format != "json" && c.Format != "text" {
		ps = append(ps, conf.Problem{Path: path + ".format", Text: fmt.Sprintf("%q is not a format; write json or text", c.Format)})
	}
	return ps
}

func (c LogConfig) level() (l slog.Level, err error) {
	if strings.ContainsAny(c.Level, "+-") { // slog would take INFO+3
		return 0, fmt.Errorf("%q is not a level", c.Level)
	}
	err = l.UnmarshalText([]byte(c.Level))
	return l, err
}

// NewLogger makes the logger of a valid configuration.
func NewLogger(w io.Writer, c LogConfig) *slog.Logger {
	level, _ := c.level() // validated
	o := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, o))
	}
	return slog.New(slog.NewTextHandler(w, o))
}
