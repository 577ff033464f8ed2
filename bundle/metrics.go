package bundle

import (
	"github.com/prometheus/client_golang/prometheus"
)

// socketMetrics counts calls over the socket. Both labels come from small sets: the calls that exist, and how they ended.
type socketMetrics struct{ calls *prometheus.CounterVec }

func newSocketMetrics(reg prometheus.Registerer) *socketMetrics {
	m := &socketMetrics{prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "coaphub", Subsystem: "socket", Name: "calls_total",
		Help: "Administrators' calls over the data folder's socket by outcome. Each is in the log with its user; failed and panic " +
			"are trouble of the hub's: look at the log's errors.",
	}, []string{"call", "outcome"})}
	reg.MustRegister(m.calls)
	return m
}

// outcome names how a call ended.
func outcome(status int) string {
	switch {
	case status < 400:
		return "ok"
	case status < 500:
		return "refused"
	}
	return "failed"
}
