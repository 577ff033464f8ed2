package oauthserver

import (
	"net"
	"net/http"
	"net/netip"
	"sync"
	"time"
)

// limits is a token bucket for each key: burst at once, then one each every. At most max keys are kept; when it is full, the
// key that was quiet for longest makes room, which is the one whose bucket is fullest.
type limits struct {
	burst float64
	every time.Duration
	max   int

	mu      sync.Mutex // guards buckets
	buckets map[string]bucket
}

type bucket struct {
	left float64
	at   time.Time
}

func newLimits(burst int, every time.Duration, max int) *limits {
	return &limits{burst: float64(burst), every: every, max: max, buckets: make(map[string]bucket)}
}

// allow takes one from the key's bucket. If there is none it returns how long to wait for one.
func (l *limits) allow(key string) (wait time.Duration, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	now := time.Now()
	b, known := l.buckets[key]
	if !known {
		if len(l.buckets) >= l.max {
			l.makeRoom(now)
		}
		b = bucket{left: l.burst, at: now}
	}
	b.left = min(l.burst, b.left+float64(now.Sub(b.at))/float64(l.every))
	b.at = now
	if b.left < 1 {
		l.buckets[key] = b
		return time.Duration((1 - b.left) * float64(l.every)), false
	}
	b.left--
	l.buckets[key] = b
	return 0, true
}

// refund gives back what allow took, for what turned out not to be worth counting.
func (l *limits) refund(key string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b, ok := l.buckets[key]; ok {
		b.left = min(l.burst, b.left+1)
		l.buckets[key] = b
	}
}

// makeRoom drops all full buckets, or the quietest one if none is full.
func (l *limits) makeRoom(now time.Time) {
	var quietest string
	var at time.Time
	for key, b := range l.buckets {
		if b.left+float64(now.Sub(b.at))/float64(l.every) >= l.burst {
			delete(l.buckets, key)
			continue
		}
		if quietest == "" || b.at.Before(at) {
			quietest, at = key, b.at
		}
	}
	if len(l.buckets) >= l.max {
		delete(l.buckets, quietest)
	}
}

// serverLimits are all limits of a server, each with its own reason. They are of this process: in a cluster, who is led to another one
// each time has as many times more tries as there are. A count in the store would cost each sign-in a write, and whoever guesses would
// have the store to fill.
type serverLimits struct {
	accounts       *limits // wrong passwords of one account: ten, then two a minute
	sources        *limits // wrong passwords from one source: thirty, then one every two seconds
	pages          *limits // authorize requests from one source
	tokens         *limits // requests with client credentials, codes and tokens from one source
	deviceCodes    *limits // device grants from one source: each is a document
	allDeviceCodes *limits // device grants from all sources
	polls          *limits // polls of one device grant (RFC 8628, Section 3.5)
}

// limitedKeys bounds the memory of each limit: about 1 MiB.
const limitedKeys = 10_000

func newServerLimits() serverLimits {
	return serverLimits{
		accounts:       newLimits(10, 30*time.Second, limitedKeys),
		sources:        newLimits(30, 2*time.Second, limitedKeys),
		pages:          newLimits(100, 100*time.Millisecond, limitedKeys),
		tokens:         newLimits(200, 50*time.Millisecond, limitedKeys),
		deviceCodes:    newLimits(10, 6*time.Second, limitedKeys),
		allDeviceCodes: newLimits(200, time.Second, 1),
		polls:          newLimits(2, pollInterval*4/5, limitedKeys),
	}
}

// source is whom a request is counted for: the address, or the /64 of an IPv6 one, which one person has whole. A proxy in
// front makes all of its users one source; its own limits then have to tell them apart.
func source(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return host
	}
	if addr = addr.Unmap().WithZone(""); addr.Is6() {
		if p, err := addr.Prefix(64); err == nil {
			return p.String()
		}
	}
	return addr.String()
}
