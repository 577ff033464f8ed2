package oauthserver

import (
	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	logins  *prometheus.CounterVec
	grants  *prometheus.CounterVec
	replays prometheus.Counter
	panics  prometheus.Counter
	limited *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) *metrics {
	m := &metrics{
		logins: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_oauth_logins_total",
			Help: "Passwords that were tried, by outcome. If refused rises, somebody guesses: look in the log for the source.",
		}, []string{"outcome"}),
		grants: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_oauth_token_requests_total",
			Help: "Token requests by grant and outcome. If refused rises for devices, look at refused sign-ups; if failed rises, " +
				"look at the store.",
		}, []string{"grant", "outcome"}),
		replays: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "coaphub_oauth_refresh_replays_total",
			Help: "Used-up refresh tokens that came back, each ending its grant. If it rises, look in the log for whose they are: " +
				"a token was copied, or a device restores old storage.",
		}),
		panics: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "coaphub_oauth_panics_total",
			Help: "Requests that ended in a panic. Any is a fault of ours: report the stack in the log.",
		}),
		limited: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_oauth_limited_total",
			Help: "Requests refused by a limit, by which one. If it rises without an attack, a proxy hides its users' addresses.",
		}, []string{"limit"}),
	}
	reg.MustRegister(m.logins, m.grants, m.replays, m.panics, m.limited)
	return m
}

func (m *metrics) issued(grant string, err error) {
	outcome := "ok"
	switch {
	case ours(err):
		outcome = "failed"
	case err != nil:
		outcome = "refused"
	}
	m.grants.WithLabelValues(grant, outcome).Inc()
}
