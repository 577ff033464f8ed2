package grpcgateway

import "github.com/prometheus/client_golang/prometheus"

type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	panics   *prometheus.CounterVec
	refused  *prometheus.CounterVec

	subscriptions *prometheus.GaugeVec
	told          *prometheus.CounterVec
	lagged        prometheus.Counter
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_api_requests_total",
			Help: "Requests of applications by door (http, grpc), call and outcome (ok, the name of an error's kind, or gone " +
				"when the caller went away). If unavailable or internal rises, look at store, identity store and provider; if unauthenticated rises, at clients " +
				"with old tokens.",
		}, []string{"door", "call", "outcome"}),
		seconds: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "coaphub_api_request_seconds",
			Help: "How long requests of applications took, with sending the answer. If it rises for single reads, the machine " +
				"is overloaded; for lists, ask for pages with limit.",
			Buckets: []float64{.0005, .001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 10, 60},
		}, []string{"door", "call"}),
		panics: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_api_panics_total",
			Help: "Requests that ended in a panic; each is logged with its stack. Any is a bug: report it.",
		}, []string{"door"}),
		refused: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_api_refused_total",
			Help: "HTTP requests refused before routing: host (a name that is not in grpcGateway.api.http.hosts) or origin (a " +
				"page of another origin). If host rises after a change of names or proxies, add the name to the list.",
		}, []string{"why"}),
	}
	m.subscriptions = prometheus.NewGaugeVec(prometheus.GaugeOpts{
		Name: "coaphub_api_subscriptions",
		Help: "Subscriptions by door (grpc, websocket, sse). A sudden fall is a lost network or provider: look at the log of debug level.",
	}, []string{"door"})
	m.told = prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "coaphub_api_subscription_messages_total",
		Help: "Messages sent to subscribers by door (grpc, websocket, sse).",
	}, []string{"door"})
	m.lagged = prometheus.NewCounter(prometheus.CounterOpts{
		Name: "coaphub_api_subscriptions_lagged_total",
		Help: "Times that a subscriber came so late that what it had not seen was no longer kept; it got the current state. If it " +
			"rises, keep more history (resourceDirectory.history) or find out which reader is too slow.",
	})
	reg.MustRegister(m.requests, m.seconds, m.panics, m.refused, m.subscriptions, m.told, m.lagged)
	return m
}
