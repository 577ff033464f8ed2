package auth

import "github.com/prometheus/client_golang/prometheus"

// metrics counts what the verifier does. A nil *metrics counts nothing.
type metrics struct {
	tokens  *prometheus.CounterVec
	fetches *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer) (*metrics, error) {
	if reg == nil {
		return nil, nil
	}
	m := &metrics{
		tokens: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_auth_tokens_total",
			Help: "Access tokens checked, by result. If unavailable rises, look at the identity provider; if refused rises, at who calls.",
		}, []string{"result"}),
		fetches: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "coaphub_auth_key_fetches_total",
			Help: "Fetches of identity providers' keys, by result. If failed rises, check the provider and the way to it.",
		}, []string{"result"}),
	}
	for _, c := range []prometheus.Collector{m.tokens, m.fetches} {
		if err := reg.Register(c); err != nil {
			return nil, err
		}
	}
	return m, nil
}

func (m *metrics) token(result string) {
	if m != nil {
		m.tokens.WithLabelValues(result).Inc()
	}
}

func (m *metrics) fetched(result string) {
	if m != nil {
		m.fetches.WithLabelValues(result).Inc()
	}
}
