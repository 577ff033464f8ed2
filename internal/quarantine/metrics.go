package quarantine

import "github.com/prometheus/client_golang/prometheus"

type metrics struct{ dropped prometheus.Counter }

func newMetrics(reg prometheus.Registerer, s *Store) *metrics {
	m := &metrics{prometheus.NewCounter(prometheus.CounterOpts{
		Name: "coaphub_quarantine_dropped_total",
		Help: "Writes of devices in quarantine that made room for newer ones. If it rises, somebody writes much: look at what is kept, " +
			"and end the quarantine or disable the device.",
	})}
	reg.MustRegister(m.dropped, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "coaphub_quarantine_writes",
		Help: "Writes of devices in quarantine that are kept apart, as this process counted them last. Above 0 a person is to decide: coaphub devices quarantine list.",
	}, s.all))
	return m
}
