package coapgateway

import (
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/coaphub/coaphub/internal/admission"
)

type metrics struct {
	signedIn      atomic.Int64 // devices, what sessions tells
	sessions      prometheus.GaugeFunc
	requests      *prometheus.CounterVec
	refused       *prometheus.CounterVec
	rivals        prometheus.Counter
	changes       prometheus.Counter
	batchSkipped  prometheus.Counter
	tooLarge      prometheus.Counter
	notStored     prometheus.Counter
	syncs         *prometheus.CounterVec
	quiet         *prometheus.CounterVec
	sessionsEnded *prometheus.CounterVec
	overload      *prometheus.CounterVec
	slowed        *prometheus.CounterVec

	renewals       *prometheus.CounterVec
	watches        prometheus.Gauge
	commands       *prometheus.CounterVec
	commandSeconds prometheus.Histogram
}

func newMetrics(reg prometheus.Registerer, signIns *admission.Queue, exchanges map[string]*admission.Queue) *metrics {
	opts := func(name, help string) prometheus.CounterOpts {
		return prometheus.CounterOpts{Namespace: "coaphub", Subsystem: "coap_gateway", Name: name, Help: help}
	}
	m := &metrics{
		requests: prometheus.NewCounterVec(opts("requests_total",
			"Requests of devices by route and answer code; refused: by the engine, for options, blocks or size. Rising 4.01: "+
				"devices with bad credentials, see `coaphub status --refused`; rising 5.03: a part of the hub or a provider is in trouble, see its metrics."), []string{"route", "code"}),
		rivals: prometheus.NewCounter(opts("rivals_total",
			"Devices that were found to be in two places at once, taking their session from each other. Each is a copied identity until "+
				"somebody knows better: see `coaphub status --refused`, and coapGateway.rivals.")),
		refused: prometheus.NewCounterVec(opts("refused_total",
			"Connections and account requests that were refused. When it rises see `coaphub status --refused` for the reasons."),
			[]string{"what"}),
		changes: prometheus.NewCounter(opts("changes_total",
			"Representations that devices reported. When it rises without new devices, look for one that reports too often.")),
		batchSkipped: prometheus.NewCounter(opts("batch_elements_skipped_total",
			"Elements of batches that could not be used. When it rises, a device's firmware sends broken batches.")),
		tooLarge: prometheus.NewCounter(opts("content_too_large_total",
			"Representations over 256 KiB, stored as an error status. When it rises, a device has a resource the hub cannot show.")),
		notStored: prometheus.NewCounter(opts("changes_not_stored_total",
			"Changes that could not be stored; the connection was closed so that the device reports again. When it rises, look at "+
				"the resource directory and the store.")),
		syncs: prometheus.NewCounterVec(opts("twin_syncs_total",
			"Synchronisations of twins by mode and outcome; late: what an incomplete one missed has answered since. Rising "+
				"incomplete: devices do not answer, see the debug log."),
			[]string{"mode", "outcome"}),
		quiet: prometheus.NewCounterVec(opts("quiet_asked_total",
			"Observed resources over UDP and DTLS that were not reported for longer than their Max-Age and were asked for, by outcome. "+
				"Many: devices that could say a longer Max-Age. Rising refused: devices forget who observes them."),
			[]string{"outcome"}),
		sessionsEnded: prometheus.NewCounterVec(opts("sessions_ended_total",
			"Sessions by why they ended. Rising second-session: devices reconnect without closing, or two share an identity; rising "+
				"expired: devices do not refresh their tokens; revoked, key-replaced, certificate-revoked: their credentials were ended by somebody."), []string{"reason"}),
		overload: prometheus.NewCounterVec(opts("overload_refused_total",
			"Requests that were refused and told when to come again, by the code of the reason. device-rate: a device in a loop, or "+
				"limits.device is too low; owner-rate, hub-rate: as configured; sign-ins-full: more devices come than can be served, see account_requests; "+
				"discoveries-full: devices look for others too often, or the store is slow; too-many-requests, too-many-observations: of other "+
				"devices, see deviceToDevice."),
			[]string{"reason"}),
		slowed: prometheus.NewCounterVec(opts("notifications_slowed_total",
			"Pauses in taking a device's notifications, by the code of the reason, as in overload_refused_total. When it rises, look "+
				"for devices that report too often."), []string{"reason"}),
		renewals: prometheus.NewCounterVec(opts("renewals_total",
			"Certificates that were renewed over devices' connections, by who asked (device, hub) and what came of it. Rising refused: devices "+
				"that do neither; see coaphub certs report for those whose certificates end soon."), []string{"by", "outcome"}),
		watches: prometheus.NewGauge(prometheus.GaugeOpts{
			Namespace: "coaphub", Subsystem: "coap_gateway", Name: "observations",
			Help: "Resources that devices observe at each other. Near deviceToDevice.maxObservationsInAll further ones are refused.",
		}),
		commands: prometheus.NewCounterVec(opts("commands_total",
			"Commands that were sent to devices, by kind and what came of it. Rising unanswered: devices are overloaded, or begin to "+
				"sleep; rising failed: their answers are errors or break the protocol, see the debug log."), []string{"kind", "outcome"}),
		commandSeconds: prometheus.NewHistogram(prometheus.HistogramOpts{
			Namespace: "coaphub", Subsystem: "coap_gateway", Name: "command_seconds",
			Help:    "How long devices take to answer a command. When it rises, devices or their networks are slow; the hub's own time is not in it.",
			Buckets: prometheus.ExponentialBuckets(0.001, 2, 15),
		}),
	}
	accounts := func(kind, provider, state string, n func() int) prometheus.GaugeFunc {
		return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Namespace: "coaphub", Subsystem: "coap_gateway", Name: "account_requests",
			ConstLabels: prometheus.Labels{"kind": kind, "provider": provider, "state": state},
			Help: "Account requests by kind (sign-in; exchange: sign-ups and refreshes, by provider) that are under way or waiting for that. Many " +
				"wait for long: identity store, store, or for exchange the provider is slow, or limits.signIns.underWay is too low.",
		}, func() float64 { return float64(n()) })
	}
	m.sessions = prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Namespace: "coaphub", Subsystem: "coap_gateway", Name: "sessions",
		Help: "Devices that are signed in here. A sudden fall: look at the reasons in coap_gateway_sessions_ended_total.",
	}, func() float64 { return float64(m.signedIn.Load()) })
	if reg != nil {
		queue := func(kind, provider string, q *admission.Queue) {
			reg.MustRegister(accounts(kind, provider, "under-way", func() int { n, _ := q.State(); return n }),
				accounts(kind, provider, "waiting", func() int { _, n := q.State(); return n }))
		}
		queue("sign-in", "", signIns)
		for provider, q := range exchanges {
			queue("exchange", provider, q)
		}
		reg.MustRegister(m.overload, m.slowed, m.renewals)
		reg.MustRegister(m.sessions, m.requests, m.refused, m.rivals, m.changes, m.batchSkipped, m.tooLarge, m.notStored, m.syncs, m.quiet,
			m.sessionsEnded, m.watches, m.commands, m.commandSeconds)
	}
	return m
}
