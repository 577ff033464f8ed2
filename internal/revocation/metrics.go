package revocation

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

type metrics struct {
	failures *prometheus.CounterVec
	unknown  *prometheus.CounterVec
}

func newMetrics(reg prometheus.Registerer, sets []*set) *metrics {
	m := &metrics{
		failures: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "coaphub", Subsystem: "revocation", Name: "failures_total",
			Help: "Revocation lists, and answers about certificates (ocsp), of other authorities that could not be had or were not taken, by CA set and " +
				"reason. unreachable: look at the network; late: the authority is; invalid, early, back: look at the log, somebody may be forging.",
		}, []string{"set", "kind", "reason"}),
		unknown: prometheus.NewCounterVec(prometheus.CounterOpts{
			Namespace: "coaphub", Subsystem: "revocation", Name: "unknown_total",
			Help: "Requests to sign up, in or off, or to enrol, with a certificate of which nobody knows whether it was revoked, by CA set and what came of it: refused with 5.03 (503), or " +
				"let-in where the set is open. It should not rise; failures_total says why.",
		}, []string{"set", "outcome"}),
	}
	if reg == nil {
		return m
	}
	reg.MustRegister(m.failures, m.unknown)
	for _, s := range sets {
		if len(s.sources) == 0 {
			continue
		}
		gauge := func(name, help string, f func() float64) {
			reg.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
				Namespace: "coaphub", Subsystem: "revocation", Name: name, Help: help, ConstLabels: prometheus.Labels{"set": s.Name},
			}, f))
		}
		gauge("list_age_seconds", "How old the oldest revocation list of a CA set is. More than its authority takes between two: see failures_total.", func() float64 {
			age, _ := s.lists(time.Now())
			return age.Seconds()
		})
		gauge("lists_missing", "Places of revocation lists of a CA set that have none that is good now. Not 0: devices are refused, or let in unchecked.", func() float64 {
			_, missing := s.lists(time.Now())
			return float64(missing)
		})
	}
	return m
}

// lists returns the age of the oldest list, and how many places have none that is good.
func (s *set) lists(now time.Time) (age time.Duration, missing int) {
	for _, src := range s.sources {
		src.mu.Lock()
		good := len(src.lists) > 0
		for _, l := range src.lists {
			age = max(age, now.Sub(l.from))
			good = good && l.fresh(now)
		}
		src.mu.Unlock()
		if !good {
			missing++
		}
	}
	return age, missing
}

func (m *metrics) failed(s *set, kind string, err error) {
	why := unreachable
	if r := (*refusal)(nil); errors.As(err, &r) {
		why = r.why
	}
	m.failures.WithLabelValues(s.Name, kind, string(why)).Inc()
}
