package pebblestore

import (
	"context"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
)

type metrics struct {
	reg              prometheus.Registerer
	all              []prometheus.Collector
	events           prometheus.Counter
	bytes            prometheus.Counter
	waits            prometheus.Counter
	refused          *prometheus.CounterVec // by kind: bounded by hub's kinds
	batchSeconds     prometheus.Histogram
	batchRequests    prometheus.Histogram
	backgroundErrors prometheus.Counter
	damaged          prometheus.Counter
	slowDisk         prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, s *Store) *metrics {
	m := &metrics{reg: reg}
	counter := func(name, help string) prometheus.Counter {
		c := prometheus.NewCounter(prometheus.CounterOpts{Name: "coaphub_store_" + name, Help: help})
		m.all = append(m.all, c)
		return c
	}
	m.events = counter("events_total", "Events that were stored durably. Follows the load; when it stays flat under load, look at coaphub_store_refused_total.")
	m.bytes = counter("written_bytes_total", "Bytes given to the write-ahead log. When it rises faster than events do, contents have grown: check retention against the disk.")
	m.waits = counter("waits_total", "Writes that had to wait for room in front of the store. When it rises, the disk is slower than the load: use a faster disk or fewer notifications.")
	m.backgroundErrors = counter("background_errors_total", "Flushes and compactions that failed and are tried again. When it rises, look at the log and at the disk's health.")
	m.damaged = counter("damaged_reads_total", "Reads that found a damaged file. When it is not 0, the disk lost data: run coaphub verify, and restore a backup.")
	m.slowDisk = counter("slow_disk_total", "Disk operations that took unusually long. When it rises, something else uses the disk or it is about to fail.")
	m.refused = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "coaphub_store_refused_total",
		Help: "Commits that were refused, by kind. conflict: writers race for devices, harmless in small numbers; exhausted: the disk is too slow for the load; unavailable: the disk is full or failed, see the log.",
	}, []string{"kind"})
	for _, k := range []hub.Kind{hub.Conflict, hub.Exhausted, hub.Unavailable} {
		m.refused.WithLabelValues(k.String())
	}
	m.batchSeconds = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "coaphub_store_batch_seconds", Buckets: prometheus.ExponentialBuckets(0.0001, 2.5, 12),
		Help: "Time to write and sync one batch. When it rises, the disk is slow; every acknowledgement waits for it.",
	})
	m.batchRequests = prometheus.NewHistogram(prometheus.HistogramOpts{
		Name: "coaphub_store_batch_requests", Buckets: prometheus.ExponentialBuckets(1, 4, 8),
		Help: "Writes that shared one synced batch. It rises with the load by design; together with long batches it means the disk is the limit.",
	})
	m.all = append(m.all, m.refused, m.batchSeconds, m.batchRequests,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "coaphub_store_full",
			Help: "1 while writes are refused because the disk is nearly full: make room or shorten history.retention.",
		}, func() float64 {
			if s.space.full.Load() {
				return 1
			}
			return 0
		}),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "coaphub_store_free_bytes",
			Help: "Free space on the data folder's disk. When it falls towards the threshold, make room: below it writes are refused.",
		}, func() float64 { return float64(s.space.free.Load()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "coaphub_store_disk_bytes",
			Help: "Space the store takes on disk. When it rises towards history.maxBytes, history is cut there.",
		}, func() float64 {
			n, _ := s.DiskBytes(context.Background()) // 0 once it is closed or failed
			return float64(n)
		}),
	)
	if reg != nil {
		for _, c := range m.all {
			reg.MustRegister(c)
		}
	}
	return m
}

// unregister takes the metrics back, so that a store can be opened again under the same registerer.
func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
