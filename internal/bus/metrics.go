package bus

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/hub"
)

type metrics struct {
	calls, answers *prometheus.HistogramVec
	batch          prometheus.Histogram
	disconnects    prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		calls: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "coaphub_bus_call_seconds", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
			Help: "Time of calls to other parts by method and what came of them. unavailable: another part or the bus is away or overloaded; the log of this part says which.",
		}, []string{"method", "outcome"}),
		answers: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "coaphub_bus_answer_seconds", Buckets: prometheus.ExponentialBuckets(0.0001, 4, 9),
			Help: "Time that this part worked on calls of others by method and what came of them. internal: its log says what went wrong.",
		}, []string{"method", "outcome"}),
		batch: prometheus.NewHistogram(prometheus.HistogramOpts{
			Name: "coaphub_bus_batch_questions", Buckets: prometheus.ExponentialBuckets(1, 2, 9),
			Help: "Questions to other parts that went out in one message. It grows with what there is to ask; always 256: the part that is asked is too slow.",
		}),
		disconnects: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "coaphub_bus_disconnects_total",
			Help: "How often the connection to the bus was lost. When it rises, look at the NATS servers and the network between.",
		}),
	}
	reg.MustRegister(m.calls, m.answers, m.batch, m.disconnects)
	return m
}

func (m *metrics) changed(connected bool) {
	if !connected {
		m.disconnects.Inc()
	}
}

func result(err error) string {
	if err == nil {
		return "ok"
	}
	return hub.KindOf(err).String()
}

func (m *metrics) asked(method string, err error, took time.Duration) {
	m.calls.WithLabelValues(method, result(err)).Observe(took.Seconds())
}

func (m *metrics) answered(method string, err error, took time.Duration) {
	m.answers.WithLabelValues(method, result(err)).Observe(took.Seconds())
}
