package mongostore

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
)

type metrics struct {
	reg      prometheus.Registerer
	all      []prometheus.Collector
	events   prometheus.Counter
	repeated prometheus.Counter
	settled  *prometheus.CounterVec // by outcome: stored, refused, unknown
	refused  *prometheus.CounterVec // by kind: bounded by hub's kinds
}

func newMetrics(reg prometheus.Registerer, s *Store) *metrics {
	m := &metrics{
		reg: reg,
		events: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "coaphub_store_events_total",
			Help: "Events that were stored durably. Follows the load; when it stays flat under load, look at coaphub_store_refused_total.",
		}),
		repeated: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "coaphub_store_repeated_total",
			Help: "Commands that were sent to the database again. When it rises, connections break or the primary moves: look at the database and the network.",
		}),
		settled: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_store_settled_total",
			Help: "Commits whose outcome had to be asked for after a connection broke, by what came out. unknown: the database did not answer in time.",
		}, []string{"outcome"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_store_refused_total",
			Help: "Commits that were refused, by kind. conflict: writers race for devices, harmless in small numbers; exhausted: the database is too slow for the load; unavailable: it is away or does not keep up, see the log; deadline: it did not say in time.",
		}, []string{"kind"}),
	}
	for _, k := range []hub.Kind{hub.Conflict, hub.Exhausted, hub.Unavailable, hub.Deadline} {
		m.refused.WithLabelValues(k.String())
	}
	for _, o := range []string{"stored", "refused", "unknown"} {
		m.settled.WithLabelValues(o)
	}
	m.all = []prometheus.Collector{m.events, m.repeated, m.settled, m.refused, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "coaphub_store_lag_events",
		Help: "Events that are stored but not yet published and folded into documents. When it stays near 20000, appends are slowed down and refused: the database or the feed does not keep up.",
	}, func() float64 {
		s.mu.Lock()
		defer s.mu.Unlock()
		return float64(s.lag.events)
	})}
	if reg != nil {
		for _, c := range m.all {
			reg.MustRegister(c)
		}
	}
	return m
}

func (m *metrics) unregister() {
	if m.reg != nil {
		for _, c := range m.all {
			m.reg.Unregister(c)
		}
	}
}
