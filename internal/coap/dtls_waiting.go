package coap

import (
	"bytes"
	"container/list"
	"net/netip"
	"time"
)

const (
	// maxWaiting bounds the ClientHellos that wait, and maxWaitingHello the bytes of each.
	maxWaiting      = 1024
	maxWaitingHello = 1 << 10
	// helloWaits is for how long: as devices with a slow radio wait before they send it again (RFC 7925, Section 11).
	helloWaits = 9 * time.Second
)

// waitingRoom has ClientHellos that came while their network, or all together, had too many handshakes. Each begins when others
// have come to their end, so a fleet that comes back at once, behind one address, comes in as fast as the machine can, and not
// as rarely as its devices ask again (RFC 6347, Section 4.2.4.1). Forged ones wait in vain: a flood brings nothing to its end.
// The listener's lock guards it.
type waitingRoom struct {
	hellos list.List // of *waitingHello, oldest first
	from   map[endpoints]*list.Element
}

type waitingHello struct {
	rec    record
	e      endpoints
	stage  stage // that it would begin
	prefix netip.Prefix
	since  time.Duration
}

// putOff has a ClientHello wait. The newest of an address takes the place of the one before.
func (l *dtlsListener) putOff(rec record, s stage, e endpoints) {
	l.drop("crowded")
	if len(rec.raw) > maxWaitingHello {
		return
	}
	raw := bytes.Clone(rec.raw)
	rec.raw, rec.body = raw, raw[len(raw)-len(rec.body):]
	h := &waitingHello{rec: rec, e: e, stage: s, prefix: prefixOf(e.remote.Addr()), since: l.srv.now()}
	l.mu.Lock()
	defer l.mu.Unlock()
	w := &l.waiting
	if at := w.from[e]; at != nil {
		at.Value = h
		return
	}
	if at := w.hellos.Front(); at != nil && w.hellos.Len() >= maxWaiting && h.since-at.Value.(*waitingHello).since >= helloWaits {
		w.remove(at)
	}
	if w.hellos.Len() >= maxWaiting {
		return // the device sends it again
	}
	if w.from == nil {
		w.from = make(map[endpoints]*list.Element)
	}
	w.from[e] = w.hellos.PushBack(h)
}

func (w *waitingRoom) remove(at *list.Element) *waitingHello {
	h := w.hellos.Remove(at).(*waitingHello)
	delete(w.from, h.e)
	return h
}

// callIn begins what waits and has room now. It is called when a handshake has come to an end, or one stage farther.
func (l *dtlsListener) callIn() {
	for {
		h := l.called()
		if h == nil {
			return
		}
		l.hello([]record{h.rec}, h.e)
	}
}

// called takes the first that has room.
func (l *dtlsListener) called() *waitingHello {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := l.srv.now()
	w := &l.waiting
	for at := w.hellos.Front(); at != nil; {
		h, next := at.Value.(*waitingHello), at.Next()
		switch half := &l.halfOpen[h.stage]; {
		case now-h.since >= helloWaits:
			w.remove(at)
		case !half.crowded(h.prefix, &l.conf):
			return w.remove(at)
		}
		at = next
	}
	return nil
}
