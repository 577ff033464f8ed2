package coap

import "github.com/prometheus/client_golang/prometheus"

// Metrics is what an engine counts. Several servers may share one.
type Metrics struct {
	connections  prometheus.Gauge
	opened       prometheus.Counter
	closed       *prometheus.CounterVec
	refused      *prometheus.CounterVec
	handshakes   *prometheus.CounterVec
	in, out      [numKinds]prometheus.Counter
	bytesIn      prometheus.Counter
	bytesOut     prometheus.Counter
	queueFull    prometheus.Counter
	panics       prometheus.Counter
	dropped      *prometheus.CounterVec
	buffered     prometheus.Gauge
	acceptErrors prometheus.Counter

	retransmitted  prometheus.Counter
	unacknowledged prometheus.Counter
	relayed        *prometheus.CounterVec
}

// kind sorts messages for counting.
type kind uint8

const (
	kindRequest kind = iota
	kindResponse
	kindSignal
	kindEmpty
	kindOther
	numKinds
)

var kindNames = [numKinds]string{"request", "response", "signal", "empty", "other"}

// NewMetrics registers the engine's metrics with reg; nil registers them nowhere.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	const ns, sub = "coaphub", "coap"
	counter := func(name, help string) prometheus.Counter {
		return prometheus.NewCounter(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	vec := func(name, help, label string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help}, []string{label})
	}
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Namespace: ns, Subsystem: sub, Name: name, Help: help})
	}
	in := vec("messages_received_total", "Messages received by kind. A sudden rise of requests: look for a device in a loop.", "kind")
	out := vec("messages_sent_total", "Messages sent by kind. Compare with received requests: a gap means answers that cannot be written.", "kind")
	m := &Metrics{
		connections:  gauge("connections", "Connections that are open. Near maxConnections: raise it or add a gateway."),
		opened:       counter("connections_opened_total", "Connections opened. Rising faster than devices: they reconnect; see connections_closed_total for the reason."),
		closed:       vec("connections_closed_total", "Connections closed by reason. overload: the store is too slow; keepalive: bad links; malformed: a broken device.", "reason"),
		refused:      vec("connections_refused_total", "Connections refused by reason. max-connections: raise the limit; the others: see `coaphub status --refused`.", "reason"),
		handshakes:   vec("handshakes_total", "TLS and DTLS handshakes by outcome. failed: wrong certificates or keys; timeout, evicted: slow or hostile peers; restarted: devices that reboot.", "outcome"),
		bytesIn:      counter("received_bytes_total", "Bytes of CoAP received. A rise without more devices: look for large or too frequent notifications."),
		bytesOut:     counter("sent_bytes_total", "Bytes of CoAP sent. A rise without more devices: look for large answers."),
		queueFull:    counter("queue_full_total", "Times a connection was not read because its queue or the common buffer was full. Rising: the hub is overloaded, look at the store's latency."),
		panics:       counter("panics_total", "Panics of handlers. Any: a fault of the hub, the log has the stack; report it."),
		dropped:      vec("messages_dropped_total", "Messages dropped by reason. late: answers nobody waits for any more, raise time-outs; pong: peers that do not read; ring: more datagrams of one peer than its handshake, or the beginning of its session, can take; crowded: hellos that found no room, and must come again; unproven: a peer that moved and does not answer; relay: more than is passed on to other gateways; others: broken devices, or strangers.", "reason"),
		buffered:     gauge("buffered_bytes", "Bytes queued and in block-wise transfers. Near maxBuffered: the hub is overloaded or somebody leaves transfers unfinished."),
		acceptErrors: counter("accept_errors_total", "Failed accepts. Rising: the process has no file descriptors left, raise its limit."),
	}
	m.retransmitted = counter("retransmissions_total", "Confirmable messages sent again. Rising: lossy links, or devices that sleep without saying so.")
	m.unacknowledged = counter("unacknowledged_total", "Confirmable messages given up after the last retransmission. Rising: devices went away, or are behind a NAT that forgot them.")
	m.relayed = vec("relayed_total", "Datagrams of DTLS that reached another gateway than the one with their session. passed: to that one; taken: from others; answer: to devices, for others. Rising: the load balancer changes its mind; give it longer memory, or let it read connection IDs.", "way")
	for k, name := range kindNames {
		m.in[k], m.out[k] = in.WithLabelValues(name), out.WithLabelValues(name)
	}
	if reg != nil {
		reg.MustRegister(m.connections, m.opened, m.closed, m.refused, m.handshakes, in, out, m.bytesIn, m.bytesOut,
			m.queueFull, m.panics, m.dropped, m.buffered, m.acceptErrors, m.retransmitted, m.unacknowledged, m.relayed)
	}
	return m
}
