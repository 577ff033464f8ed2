package identitystore

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	signUps *prometheus.CounterVec
	pending prometheus.Gauge
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		signUps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_identity_sign_ups_total",
			Help: "Claims of devices by outcome. If owned-by-other or pinned rises, somebody tries devices that are not theirs, " +
				"or a device changed hands without a sign-off: look at refused sign-ups. If failed rises, look at store and directory.",
		}, []string{"outcome"}),
		pending: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "coaphub_identity_pending",
			Help: "Sign-ups and sign-offs that could not be finished at the last try. If it stays above 0, look in the log for " +
				"why the directory refuses them.",
		}),
	}
	reg.MustRegister(m.signUps, m.pending)
	return m
}
