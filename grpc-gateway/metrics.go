package grpcgateway

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/internal/admission"
)

type metrics struct {
	requests *prometheus.CounterVec
	seconds  *prometheus.HistogramVec
	panics   *prometheus.CounterVec
	refused  *prometheus.CounterVec

	subscriptions *prometheus.GaugeVec
	told          *prometheus.CounterVec
	lagged        prometheus.Counter
}

func newMetrics(reg prometheus.Registerer, all *admission.Queue) *metrics {
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
			Help: "Requests refused before they were carried out: host (a name that is not in grpcGateway.api.http.hosts) or origin (a " +
				"page of another origin) over HTTP; over all doors owner-requests, owner-rate, owner-streams (an owner asks for more " +
				"than grpcGateway.limits allow), subscriptions-limit (one stream has too many) or hub-busy (all together do). If host rises after a change of names or proxies, add " +
				"the name to the list; if hub-busy rises, look at store and machine.",
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
	underWay := func(state string, n func() int) prometheus.GaugeFunc {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "coaphub_api_requests", ConstLabels: prometheus.Labels{"state": state},
			Help: "Requests of applications that are under way or waiting for that. If some wait, devices that are asked answer " +
				"slowly, or the machine is overloaded: see grpcGateway.limits.maxRequests.",
		}, func() float64 { return float64(n()) })
	}
	reg.MustRegister(underWay("under-way", func() int { n, _ := all.State(); return n }),
		underWay("waiting", func() int { _, n := all.State(); return n }))
	reg.MustRegister(m.requests, m.seconds, m.panics, m.refused, m.subscriptions, m.told, m.lagged)
	return m
}
