package audit

import "github.com/prometheus/client_golang/prometheus"

type metrics struct{ entries *prometheus.CounterVec }

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "coaphub_audit_entries_total",
		Help: "Entries of the audit log by outcome (ok, failed). If failed rises, calls change things that nobody will find in " +
			"the log: look at the store and at the free space.",
	}, []string{"outcome"})}
	reg.MustRegister(m.entries)
	return m
}
