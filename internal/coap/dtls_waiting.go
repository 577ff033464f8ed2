package coap

import (
	"bytes"
	"container/list"
	"net/netip"
	"time"
)

const (
	// maxWaiting bounds the ClientHellos of a stage that wait, and maxWaitingHello the bytes of each. A network has no more of them
	// than it may have handshakes.
	maxWaiting      = 1024
	maxWaitingHello = 1 << 10
	// helloWaits is for how long: as devices with a slow radio wait before they send it again (RFC 7925, Section 11).
	helloWaits = 9 * time.Second
)

// waitingRoom has ClientHellos that came while their network had too many handshakes of a stage. Each begins, or goes on, when
// others have come to their end, so a fleet that comes back at once, behind one address, comes in as fast as it can, and not as
// rarely as its devices ask again (RFC 6347, Section 4.2.4.1). The listener's lock guards it.
type waitingRoom struct {
	hellos list.List // of *waitingHello, by the time at which they came
	from   map[endpoints]*list.Element
	prefix map[netip.Prefix]int // how many of each network
}

type waitingHello struct {
	rec    record
	e      endpoints
	prefix netip.Prefix
	since  time.Duration
}

// putOff has a ClientHello wait, or drops it when there is no room. The newest of an address takes the place of the one before.
func (l *dtlsListener) putOff(rec record, s stage, e endpoints) {
	h := &waitingHello{e: e, prefix: Network(e.remote.Addr()), since: l.srv.now()}
	l.mu.Lock()
	w := &l.waiting[s]
	lost := w.expire(h.since)
	w.forget(e)
	if len(rec.raw) <= maxWaitingHello && w.hellos.Len() < maxWaiting && w.prefix[h.prefix] < l.conf.MaxPerPrefix {
		h.rec = rec
		h.rec.raw = bytes.Clone(rec.raw)
		h.rec.body = h.rec.raw[len(rec.raw)-len(rec.body):]
		w.add(h)
	} else {
		lost++
	}
	l.mu.Unlock()
	l.lose(lost)
}

func (w *waitingRoom) add(h *waitingHello) {
	if w.from == nil {
		w.from, w.prefix = make(map[endpoints]*list.Element), make(map[netip.Prefix]int)
	}
	w.from[h.e] = w.hellos.PushBack(h)
	w.prefix[h.prefix]++
}

func (w *waitingRoom) remove(at *list.Element) *waitingHello {
	h := w.hellos.Remove(at).(*waitingHello)
	delete(w.from, h.e)
	if w.prefix[h.prefix]--; w.prefix[h.prefix] == 0 {
		delete(w.prefix, h.prefix)
	}
	return h
}

// forget drops what waits of an address: it has come again, or got in.
func (w *waitingRoom) forget(e endpoints) {
	if at := w.from[e]; at != nil {
		w.remove(at)
	}
}

// expire removes those that have waited too long, and counts them.
func (w *waitingRoom) expire(now time.Duration) (n int) {
	for at := w.hellos.Front(); at != nil && now-at.Value.(*waitingHello).since >= helloWaits; at = w.hellos.Front() {
		w.remove(at)
		n++
	}
	return n
}

func (l *dtlsListener) lose(n int) { l.srv.metrics.dropped.WithLabelValues("crowded").Add(float64(n)) }

// callIn goes on with what waits and has room now. It is called when a handshake has come to an end, or one stage farther.
func (l *dtlsListener) callIn() {
	for {
		h := l.called()
		if h == nil {
			return
		}
		l.hello([]record{h.rec}, h.e)
	}
}

// called takes the first that has room; those that have shown their cookie go first.
func (l *dtlsListener) called() (h *waitingHello) {
	l.mu.Lock()
	now, lost := l.srv.now(), 0
	for _, s := range []stage{verified, unverified} {
		w, half := &l.waiting[s], &l.halfOpen[s]
		lost += w.expire(now)
		for at := w.hellos.Front(); at != nil && h == nil; at = at.Next() {
			prefix := at.Value.(*waitingHello).prefix
			// As whoever comes now: with a cookie until the network is full, without one while it is not crowded.
			if s == verified && half.of(prefix) < l.conf.MaxPerPrefix || s == unverified && !half.crowded(prefix, &l.conf) {
				h = w.remove(at)
				break
			}
		}
	}
	l.mu.Unlock()
	l.lose(lost)
	return h
}
