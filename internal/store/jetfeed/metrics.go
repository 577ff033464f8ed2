package jetfeed

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
)

type metrics struct {
	reg         prometheus.Registerer
	all         []prometheus.Collector
	published   *prometheus.CounterVec // by outcome: bounded by hub's kinds
	took        prometheus.Histogram
	duplicates  prometheus.Counter
	repeated    prometheus.Counter
	caughtUp    prometheus.Counter
	unreadable  prometheus.Counter
	renewed     prometheus.Counter
	disconnects prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, room *room) *metrics {
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	}
	m := &metrics{
		reg: reg,
		published: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_feed_published_total",
			Help: "Commits that were published to the feed, by what came of it. unavailable: the NATS servers are away, too slow or refuse; the error's code in the log says which.",
		}, []string{"outcome"}),
		took: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "coaphub_feed_publish_seconds", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
			Help: "Time until the feed has a batch of commits. When it rises, look at the disks of the NATS servers and the network between them.",
		}),
		duplicates: counter("coaphub_feed_duplicates_total",
			"Commits that the feed had already. Harmless: an acknowledgement was lost, or a writer took over from another."),
		repeated: counter("coaphub_feed_repeated_total",
			"Commits that were sent again because no acknowledgement came. When it rises, the NATS servers are slow or the stream's leader moves."),
		caughtUp: counter("coaphub_feed_catch_up_commits_total",
			"Commits that were read back for readers that are not at the feed's end. When it rises with the load, readers are too slow."),
		unreadable: counter("coaphub_feed_unreadable_total",
			"Messages of the feed that are no commits this version can read; their readers lag. Finish the update, and see that nobody else writes there."),
		renewed: counter("coaphub_feed_renewed_total",
			"How often the stream was found to be another one, lost or set back; all cursors lag then. See what happened to the NATS servers' disks."),
		disconnects: counter("coaphub_feed_disconnects_total",
			"How often the connection of the feed was lost. When it rises, look at the NATS servers and the network between."),
	}
	for _, o := range []string{"ok", hub.Unavailable.String()} {
		m.published.WithLabelValues(o)
	}
	m.all = []prometheus.Collector{
		m.published, m.took, m.duplicates, m.repeated, m.caughtUp, m.unreadable, m.renewed, m.disconnects,
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "coaphub_feed_in_flight_bytes",
			Help: "Bytes that were sent to the feed and not acknowledged yet. Near 16 MiB publishing waits: the NATS servers are too slow for the load.",
		}, func() float64 { return float64(room.taken()) }),
	}
	if reg != nil {
		for _, c := range m.all {
			reg.MustRegister(c)
		}
	}
	return m
}

// done counts the outcomes of one Publish.
func (m *metrics) done(errs []error, took time.Duration) {
	ok := 0
	for _, err := range errs {
		if err == nil {
			ok++
			continue
		}
		m.published.WithLabelValues(hub.KindOf(err).String()).Inc()
	}
	m.published.WithLabelValues("ok").Add(float64(ok))
	m.took.Observe(took.Seconds())
}

// unregister takes the metrics back, so that a feed can be opened again under the same registerer.
func (m *metrics) unregister() {
	if m.reg == nil {
		return
	}
	for _, c := range m.all {
		m.reg.Unregister(c)
	}
}
