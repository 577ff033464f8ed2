package coap

import (
	"fmt"
	"net/netip"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coaphub/coaphub/internal/coap/simnet"
)

// listener is that of the sim, which has one session then.
func (s *dtlsSim) listener(t *testing.T) *dtlsListener {
	t.Helper()
	synctest.Wait()
	s.dialPSK(t, "203.0.113.200:5000", false)
	l := s.conn(t).dg.link.(*association).l
	synctest.Wait() // it has called in who waits
	return l
}

func (l *dtlsListener) waitingNow(s stage) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	w := &l.waiting[s]
	n := 0
	for _, in := range w.prefix {
		n += in
	}
	if w.hellos.Len() != len(w.from) || n != len(w.from) {
		panic(fmt.Sprintf("%d in the list, %d in the map, %d counted", w.hellos.Len(), len(w.from), n))
	}
	return n
}

func endsAt(addr string) endpoints { return endpoints{remote: netip.MustParseAddrPort(addr)} }

func helloRecord(t *testing.T, n int) record {
	t.Helper()
	r, _, ok := nextRecord(hello(n))
	if !ok {
		t.Fatal("this is no record")
	}
	return r
}

// fleet has n devices come at once, behind one address, and returns after how long the last was in, and how many were not.
func (s *dtlsSim) fleet(t *testing.T, n int) (took time.Duration, failed int) {
	t.Helper()
	begun := time.Now()
	nat := s.net.NAT("203.0.113.1", 0)
	var all sync.WaitGroup
	var mu sync.Mutex
	for i := range n {
		sock := behind(t, nat, fmt.Sprintf("10.0.0.%d:5000", i+1))
		all.Go(func() {
			_, err := s.shake(t, sock, pskOptions("lamp", testKey, true)...)
			mu.Lock()
			defer mu.Unlock()
			if err != nil {
				failed++
				return
			}
			took = time.Since(begun)
		})
	}
	all.Wait()
	return took, failed
}

// What one network has waiting keeps no other's devices out.
func TestDTLSWaitingOfOneNetwork(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.MaxPerPrefix = 8 }, func(t *testing.T, s *dtlsSim) {
		l := s.listener(t)
		for i := range 8 + maxWaiting { // one host, its ports
			s.forge(t, fmt.Sprintf("198.51.100.1:%d", 1000+i), hello(i))
		}
		synctest.Wait()
		if n := l.waitingNow(unverified); n != 8 {
			t.Errorf("%d of one network wait, want 8", n)
		}
		s.net.SetPath(simnet.Path{Delay: 100 * time.Millisecond})
		if took, failed := s.fleet(t, 30); took > 6*time.Second || failed > 0 {
			t.Errorf("the last of another network was in after %v, %d never", took, failed)
		}
	})
}

// The radio of a device may be slow: its handshake goes on, however many wait for it to end.
func TestDTLSFleetWithSlowRadios(t *testing.T) {
	for _, delay := range []time.Duration{300 * time.Millisecond, time.Second} {
		dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.MaxPerPrefix = 8 }, func(t *testing.T, s *dtlsSim) {
			s.listener(t)
			s.net.SetPath(simnet.Path{Delay: delay})
			took, failed := s.fleet(t, 30)
			if failed > 0 {
				t.Errorf("with %v %d were not in; the last that was after %v", delay, failed, took)
			}
		})
	}
}

// A hello that came again and got in waits no more: else it would begin something that nobody goes on with.
func TestDTLSWaitingIsForgotten(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.MaxPerPrefix = 16 }, func(t *testing.T, s *dtlsSim) {
		l := s.listener(t)
		for i := range 8 { // from now on the network is crowded, and hellos have to come again
			s.forge(t, fmt.Sprintf("203.0.113.%d:9", 50+i), hello(i))
		}
		synctest.Wait()
		if _, failed := s.fleet(t, 8); failed > 0 {
			t.Errorf("%d were not in", failed)
		}
		synctest.Wait()
		if n := l.waitingNow(unverified) + l.waitingNow(verified); n != 0 {
			t.Errorf("%d wait", n)
		}
		l.mu.Lock()
		for _, a := range l.fresh {
			a.cancel(errEvictedHalf)
		}
		l.mu.Unlock()
		synctest.Wait()
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.fresh)+len(l.shaking) != 0 {
			t.Errorf("%d handshakes that nobody asked for", len(l.fresh)+len(l.shaking))
		}
	})
}

// Forged hellos that come once begin nothing while there is a flood of them from everywhere, also when others time out.
func TestDTLSForgedOnce(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.HandshakeTimeout = time.Minute }, func(t *testing.T, s *dtlsSim) {
		l := s.listener(t)
		for i := range 512 { // half of what there is
			s.forge(t, fmt.Sprintf("10.%d.%d.1:9", i>>8, i&255), hello(i))
		}
		<-time.After(time.Minute - 5*time.Second)
		for i := range 1024 {
			s.forge(t, fmt.Sprintf("11.%d.%d.1:9", i>>8, i&255), hello(5000+i))
		}
		synctest.Wait()
		if n := l.waitingNow(unverified); n != 0 {
			t.Errorf("%d wait", n)
		}
		<-time.After(30 * time.Second)
		l.mu.Lock()
		defer l.mu.Unlock()
		if len(l.fresh) != 0 {
			t.Errorf("%d handshakes", len(l.fresh))
		}
	})
}

// What waits is bounded: in number, by network, in bytes, and in time; of an address it is the newest.
func TestDTLSWaitingRoom(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		l := s.listener(t)
		lost := func() float64 { return s.count("messages_dropped_total", "crowded") }
		for i := range maxWaiting {
			l.putOff(helloRecord(t, i), unverified, endsAt(fmt.Sprintf("10.%d.%d.1:9", i>>8, i&255)))
		}
		last := endsAt("192.0.2.1:5000")
		l.putOff(helloRecord(t, 5000), unverified, last)
		if n := l.waitingNow(unverified); n != maxWaiting || lost() != 1 {
			t.Errorf("%d wait, %v were lost", n, lost())
		}
		l.putOff(helloRecord(t, 5000), verified, last) // whose cookie is proven needs no room among them
		large := helloRecord(t, 5001)
		large.raw = append(make([]byte, maxWaitingHello), large.raw...)
		l.putOff(large, verified, endsAt("192.0.2.2:5000"))
		if n := l.waitingNow(verified); n != 1 || lost() != 2 {
			t.Errorf("%d wait, %v were lost", n, lost())
		}
		<-time.After(helloWaits - time.Second)
		again := endsAt("10.0.0.1:9")
		l.putOff(helloRecord(t, 0), unverified, again)
		<-time.After(helloWaits - time.Second)
		l.putOff(helloRecord(t, 5000), unverified, last)
		l.mu.Lock()
		ok := l.waiting[unverified].from[again] != nil && l.waiting[unverified].from[last] != nil
		l.mu.Unlock()
		if n := l.waitingNow(unverified); n != 2 || !ok || lost() != 2+maxWaiting-1 {
			t.Errorf("%d wait, %v were lost", n, lost())
		}
		for i := range l.conf.MaxPerPrefix + 1 {
			l.putOff(helloRecord(t, i), verified, endsAt(fmt.Sprintf("198.51.100.1:%d", 1000+i)))
		}
		if n := l.waitingNow(verified); n != l.conf.MaxPerPrefix {
			t.Errorf("%d of one network wait", n)
		}
	})
}

// Who has shown its cookie is called in as soon as whoever came now would be let in, before those who have not.
func TestDTLSWaitingInTurn(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, nil, func(t *testing.T, s *dtlsSim) {
		l := s.listener(t)
		e := endsAt("198.51.100.1:1000")
		prefix := Network(e.remote.Addr())
		l.mu.Lock()
		var as []*association
		for range l.conf.MaxPerPrefix {
			a := &association{prefix: prefix}
			l.halfOpen[verified].add(a, l.srv.now())
			as = append(as, a)
		}
		l.mu.Unlock()
		l.putOff(helloRecord(t, 2), unverified, endsAt("192.0.2.1:1000"))
		l.putOff(helloRecord(t, 1), verified, e)
		if h := l.called(); h == nil || h.e == e {
			t.Errorf("%v is called into a full network", h)
		}
		l.mu.Lock()
		as[0].unlist()
		l.mu.Unlock()
		if h := l.called(); h == nil || h.e != e {
			t.Errorf("there is room, and %v is called", h)
		}
		for _, a := range as[1:] {
			l.mu.Lock()
			a.unlist()
			l.mu.Unlock()
		}
	})
}

// A hello that comes again while the one that waited is called in begins one handshake, and not two.
func TestDTLSHelloTwice(t *testing.T) {
	dtlsBubble(t, handlerFuncs{}, func(_ *Config, c *DTLSConfig) { c.MaxHandshakes = 1 << 20 }, func(t *testing.T, s *dtlsSim) {
		l := s.listener(t)
		var e endpoints
		l.mu.Lock()
		for e = range l.open { // for our own address
		}
		l.mu.Unlock()
		for i := range 500 {
			e.remote = netip.MustParseAddrPort(fmt.Sprintf("172.%d.%d.1:77", i>>8, i&255))
			var both sync.WaitGroup
			for range 2 {
				both.Go(func() { l.hello([]record{helloRecord(t, i)}, e) })
			}
			both.Wait()
		}
		synctest.Wait()
		if n := s.count("handshakes_total", "restarted"); n != 0 {
			t.Errorf("%v were restarted", n)
		}
	})
}
