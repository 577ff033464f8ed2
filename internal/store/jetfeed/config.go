package jetfeed

import (
	"fmt"
	"time"

	"github.com/coaphub/coaphub/internal/conf"
)

// Config is how the feed's stream is kept. The servers are those of the bus. Each process brings the stream to its own
// configuration when it starts, so all should have the same.
type Config struct {
	// Replicas is on how many servers the stream is: 1, 3 or 5, and not more than the cluster has. With one, a server that is lost
	// takes the feed with it, and every subscriber starts again from the current state; such a server has to write through
	// (sync_interval: always), or what it acknowledged is lost when its machine loses power.
	Replicas int `yaml:"replicas"`
	// MaxAge and MaxBytes bound the stream, whichever is reached first: what is over them is dropped from its old end, and
	// subscribers who were away for longer lag. MaxBytes 0 is no bound.
	MaxAge   time.Duration `yaml:"maxAge"`
	MaxBytes conf.Size     `yaml:"maxBytes"`
	// DuplicateWindow is for how long the servers know a commit that is published again, and do not add it a second time.
	DuplicateWindow time.Duration `yaml:"duplicateWindow"`
}

// DefaultConfig is what holds where the file says nothing.
func DefaultConfig() Config {
	return Config{Replicas: 3, MaxAge: 7 * 24 * time.Hour, MaxBytes: 8 << 30, DuplicateWindow: 2 * time.Minute}
}

// Problems returns what is wrong with the configuration, by path and text.
func (c *Config) Problems() (out []conf.Problem) {
	bad := func(path, format string, args ...any) {
		out = append(out, conf.Problem{Path: path, Text: fmt.Sprintf(format, args...)})
	}
	if c.Replicas != 1 && c.Replicas != 3 && c.Replicas != 5 {
		bad("replicas", "%d is not 1, 3 or 5", c.Replicas)
	}
	if c.MaxAge < 10*time.Minute {
		bad("maxAge", "%s is less than 10m", conf.FormatDuration(c.MaxAge))
	}
	if c.MaxBytes != 0 && c.MaxBytes < 16<<20 {
		bad("maxBytes", "%s is less than 16MiB; 0 is no bound", c.MaxBytes)
	}
	if c.DuplicateWindow < 10*time.Second || c.DuplicateWindow > min(time.Hour, c.MaxAge) {
		bad("duplicateWindow", "%s is not between 10s and 1h, or more than maxAge", conf.FormatDuration(c.DuplicateWindow))
	}
	return out
}
