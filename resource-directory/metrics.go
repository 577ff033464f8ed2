package resourcedirectory

import (
	"errors"

	"github.com/prometheus/client_golang/prometheus"
)

const ns, sub = "coaphub", "directory"

type metrics struct {
	commits, events, conflicts, loads, trimmed, evicted   prometheus.Counter
	refused                                               *prometheus.CounterVec
	loaded, loadedBytes, waiting, shortened, kept, former prometheus.Gauge
	commands, formerCommands                              prometheus.Gauge
	append, batch                                         prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	histogram := func(name, help string, buckets []float64) prometheus.Histogram {
		return prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help, Buckets: buckets})
	}
	m := &metrics{
		commits: counter("commits_total", "Commits stored. It rises with the fleet's work; a sudden jump is a device that changes without pause: look at the log of debug level."),
		events:  counter("events_total", "Events stored. Divided by commits_total it says how much waits together; above 50 the disk is the bottleneck."),
		conflicts: counter("conflicts_total", "Commits that another writer was faster with and that were decided again. In one process it "+
			"must stay 0: look for a second process on the same store."),
		loads:   counter("loads_total", "Devices read from the store for a write. When it rises with a steady fleet, coldAfter is too short for how often devices write, or see evicted_total."),
		trimmed: counter("trimmed_commits_total", "Commits that retention removed. When it stands still while the disk fills, look for errors of the trimmer in the log."),
		evicted: counter("evicted_total", "Devices that left memory before coldAfter because of limits.loadedBytes. When it rises all the time together with "+
			"loads_total, the devices that write do not fit: raise limits.loadedBytes if the machine has the memory."),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: ns, Subsystem: sub, Name: "refused_total",
			Help: "Writes that were refused, by kind of error. unavailable and exhausted: look at the store and its disk; queue: raise workers or the disk is too slow; others are the callers' mistakes.",
		}, []string{"kind"}),
		loaded: gauge("devices_in_memory", "Devices whose state is in memory. When memory is short, lower limits.loadedBytes or coldAfter."),
		loadedBytes: gauge("loaded_bytes", "What the devices in memory take, about. At limits.loadedBytes the coldest leave early, which costs loads; far above it, "+
			"writes under way hold that much: look at append_seconds."),
		waiting:        gauge("waiting_requests", "Writes that callers wait for. When it stays high the store is too slow for the fleet."),
		shortened:      gauge("history_shortened", "1 while history is shorter than configured because maxBytes was exceeded. Raise maxBytes, add disk, or lower retention."),
		kept:           gauge("history_kept_seconds", "How long events are kept now. When it is below retention, see history_shortened."),
		former:         gauge("former_sessions", "Devices of former processes that may still be shown online. It falls to 0 soon after a start; if not, the store refuses writes."),
		commands:       gauge("commands", "Commands that wait for their devices or are under way. When it rises, devices that are given commands are away or do not answer: GET /api/v1/pending-commands names them."),
		formerCommands: gauge("former_commands", "Devices whose commands from before the start may not end at their time yet. It falls to 0 soon after a start; if not, the store cannot be read."),
		append:         histogram("append_seconds", "How long the store takes to make a batch durable. When it rises, the disk is slow or shared.", prometheus.ExponentialBuckets(0.0002, 2, 14)),
		batch:          histogram("append_commits", "Commits in a batch. It rises under load; at 1 the store answers faster than requests arrive.", prometheus.ExponentialBuckets(1, 2, 11)),
	}
	var errs []error
	for _, c := range []prometheus.Collector{
		m.commits, m.events, m.conflicts, m.loads, m.trimmed, m.evicted, m.refused, m.loaded, m.loadedBytes, m.waiting, m.shortened, m.kept, m.former, m.commands,
		m.formerCommands, m.append, m.batch,
	} {
		errs = append(errs, reg.Register(c))
	}
	return m, errors.Join(errs...)
}
