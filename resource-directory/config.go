package resourcedirectory

import (
	"errors"
	"fmt"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// Config says how the directory behaves. Default has the values of an installation that configures nothing.
type Config struct {
	// Workers is how many goroutines decide; each device belongs to one of them. Default 4.
	Workers int `json:"workers" yaml:"workers"`
	// Queue is how many requests may wait for one worker; callers beyond it wait up to QueueWait and are then refused with
	// Unavailable. Default 4096.
	Queue int `json:"queue" yaml:"queue"`
	// QueueWait bounds the wait for a place in a full queue. Default 2s.
	QueueWait time.Duration `json:"queueWait" yaml:"queueWait"`
	// ColdAfter is how long after its last write a device's state leaves memory; it is loaded again when it is written next.
	// See also limits.loadedBytes. Default 10m.
	ColdAfter time.Duration `json:"coldAfter" yaml:"coldAfter"`
	// DefaultCommandTimeToLive is how long a command waits for its device's answer if whoever gave it says nothing. Default 10s,
	// between 100ms and 8784h.
	DefaultCommandTimeToLive time.Duration `json:"defaultCommandTimeToLive" yaml:"defaultCommandTimeToLive"`
	// History is what the log keeps.
	History History `json:"history" yaml:"history"`
	// Limits bound what one device may store, beyond them a request is refused with TooLarge, and what all together take of
	// memory.
	Limits Limits `json:"limits" yaml:"limits"`
}

// History is how long events are kept.
type History struct {
	// Retention is how long events are kept; the last value of each resource before it is kept for ever. Default 168h
	// (7 days), at least 10m.
	Retention time.Duration `json:"retention" yaml:"retention"`
	// MaxBytes is how many bytes the store may take on disk; when it takes more, history gets shorter than its retention, with
	// an alarm. 0: a tenth of the disk (whoever makes a Directory puts the number in; here 0 is no bound). Of MongoDB it is what the
	// database takes of the servers' disks, counted once of all copies, and 0 is no bound. Default 0.
	MaxBytes int64 `json:"maxBytes" yaml:"maxBytes"`
}

// Limits bound one device, LoadedBytes all of them.
type Limits struct {
	Links     int `json:"links" yaml:"links"`         // published links; default 20000
	LinkBytes int `json:"linkBytes" yaml:"linkBytes"` // of all links together; default 8 MiB, at most 12 MiB
	Resources int `json:"resources" yaml:"resources"` // twins, published or not; default 20000
	TwinBytes int `json:"twinBytes" yaml:"twinBytes"` // of all twins together; default 64 MiB
	Commands  int `json:"commands" yaml:"commands"`   // that wait or are under way; default 64, at most 128
	// LoadedBytes is how much memory the states of all devices may take together, as far as it can be counted; beyond it those
	// that were not written for the longest leave memory before coldAfter, and are loaded again when they are written next. A
	// write under way keeps its device in memory, and what is being loaded, at most two devices a worker, comes on top.
	// Nothing is refused. Default 256 MiB.
	LoadedBytes int64 `json:"loadedBytes" yaml:"loadedBytes"`
}

// Default is the configuration of an installation that configures nothing.
func Default() Config {
	return Config{
		Workers: 4, Queue: 4096, QueueWait: 2 * time.Second, ColdAfter: 10 * time.Minute,
		DefaultCommandTimeToLive: 10 * time.Second,
		History:                  History{Retention: 7 * 24 * time.Hour},
		Limits:                   Limits{Links: 20000, LinkBytes: 8 << 20, Resources: 20000, TwinBytes: 64 << 20, Commands: 64, LoadedBytes: 256 << 20},
	}
}

// Check reports everything that is wrong, each with the field's path.
func (c Config) Check() error {
	var errs []error
	bad := func(ok bool, path, want string) {
		if !ok {
			errs = append(errs, fmt.Errorf("%s: must be %s", path, want))
		}
	}
	bad(c.Workers >= 1 && c.Workers <= 256, "workers", "between 1 and 256")
	bad(c.Queue >= 1 && c.Queue <= 1<<20, "queue", "between 1 and 1048576")
	bad(c.QueueWait >= 0 && c.QueueWait <= time.Minute, "queueWait", "between 0 and 1m")
	bad(c.ColdAfter >= time.Second, "coldAfter", "at least 1s")
	bad(c.History.Retention >= neverYounger, "history.retention", "at least 10m")
	bad(c.History.MaxBytes >= 0, "history.maxBytes", "0 or more")
	bad(c.Limits.Links >= 1, "limits.links", "at least 1")
	// One commit may touch every page of links, and the store takes 16 MiB of documents with a commit.
	bad(c.Limits.LinkBytes >= 1<<10 && c.Limits.LinkBytes <= 12<<20, "limits.linkBytes", "between 1 KiB and 12 MiB")
	bad(c.Limits.Resources >= 1, "limits.resources", "at least 1")
	bad(c.Limits.TwinBytes >= 1<<10, "limits.twinBytes", "at least 1 KiB")
	// Their ends go into one commit with what ends them.
	bad(c.Limits.Commands >= 1 && c.Limits.Commands <= 128, "limits.commands", "between 1 and 128")
	bad(c.DefaultCommandTimeToLive >= hub.MinCommandTTL && c.DefaultCommandTimeToLive <= hub.MaxCommandTTL, "defaultCommandTimeToLive", "between 100ms and 8784h")
	bad(c.Limits.LoadedBytes >= 1<<10, "limits.loadedBytes", "at least 1 KiB")
	return errors.Join(errs...)
}
