package coapgateway

import (
	"context"
	"sync"
	"time"

	"github.com/plgd-dev/go-coap/v3/message/codes"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
	"github.com/coaphub/coaphub/internal/coap"
)

// maxPause is for how long a device's notifications are held up at a time. Over a stream nothing is read meanwhile once the
// queue is full, and devices wait 4 s for a Pong (iotivity-lite); storing needs its time, too.
const maxPause = 2 * time.Second

var (
	errDeviceRate = hub.NewError(hub.Exhausted, "device-rate", "the device asks for more than one may")
	errOwnerRate  = hub.NewError(hub.Exhausted, "owner-rate", "the owner's devices ask for more than they may together")
	errHubRate    = hub.NewError(hub.Unavailable, "hub-rate", "the hub is asked for more than it may do")
	errSignIns    = hub.NewError(hub.Unavailable, "sign-ins-full", "too many devices come at the same time")

	errDiscoveries = hub.NewError(hub.Unavailable, "discoveries-full", "too many devices ask for the links of others at the same time")

	errRequests     = hub.NewError(hub.Exhausted, "too-many-requests", "too many requests of the device wait for other devices")
	errObservations = hub.NewError(hub.Exhausted, "too-many-observations", "too many resources of other devices are observed")
)

// rates are how much devices may ask for. One of them is a connection, which has its own bucket: who comes again to have a
// full one pays with a handshake.
type rates struct {
	device, owner, hub admission.Rate
	all                admission.Bucket

	mu     sync.Mutex // guards owners and the numbers in them
	owners map[hub.Owner]*share
}

// share is what the devices of an owner have left together. It is kept while one of them has a session.
type share struct {
	bucket   admission.Bucket
	sessions int
}

func newRates(c LimitsConfig) *rates {
	return &rates{
		device: c.Device.rate(), owner: c.Owner.rate(), hub: c.Hub.rate(), owners: map[hub.Owner]*share{},
	}
}

func (c SignInsConfig) queue() *admission.Queue {
	return admission.NewQueue(c.UnderWay, c.Waiting, c.MaxWait)
}

func (c RateConfig) rate() admission.Rate { return admission.NewRate(c.Rate, c.Burst) }

// join returns the owner's share for one more session.
func (r *rates) join(owner hub.Owner) *share {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.owners[owner]
	if s == nil {
		s = &share{}
		r.owners[owner] = s
	}
	s.sessions++
	return s
}

func (r *rates) leave(owner hub.Owner) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s := r.owners[owner]
	if s.sessions--; s.sessions == 0 {
		delete(r.owners, owner)
	}
}

// take takes n from what device, owner and hub have left, or nothing: then it says whose rate it is, and how long it takes
// until they are there.
func (p *peer) take(n int) (*hub.Error, time.Duration) {
	r := p.gw.rates
	if wait := r.device.Take(&p.bucket, n); wait > 0 {
		return errDeviceRate, wait
	}
	if p.sess != nil {
		if wait := r.owner.Take(&p.sess.share.bucket, n); wait > 0 {
			r.device.Return(&p.bucket, n)
			return errOwnerRate, wait
		}
	}
	if wait := r.hub.Take(&r.all, n); wait > 0 {
		r.device.Return(&p.bucket, n)
		if p.sess != nil {
			r.owner.Return(&p.sess.share.bucket, n)
		}
		return errHubRate, wait
	}
	return nil, 0
}

// admit refuses a request that is beyond a rate. On OCF paths that is 5.03, since iotivity-lite takes 4.29 for success;
// elsewhere it is 4.29 for whoever asks too much (RFC 8516, Section 3), and 5.03 when it is the hub that does not want more.
func (p *peer) admit(r route) error {
	over, wait := p.take(1)
	if over == nil {
		return nil
	}
	code := codes.ServiceUnavailable
	if (r.own || r.foreign) && over.Kind == hub.Exhausted {
		code = codes.TooManyRequests
	}
	again := *p.gw.over(over)
	again.RetryAfter = admission.Again(wait)
	return &coded{code, &again}
}

// over counts a refusal of what is beyond a limit, and returns it.
func (g *Gateway) over(e *hub.Error) *hub.Error {
	g.metrics.overload.WithLabelValues(e.Code).Inc()
	return e
}

var _ coap.Pacer = (*peer)(nil)

// Pace implements coap.Pacer: notifications come as fast as the rates allow, but one in maxPause in any case.
func (p *peer) Pace(n int) (int, time.Duration) {
	if over, _ := p.take(n); over == nil {
		return n, 0
	}
	r := p.gw.rates
	some := r.hub.Left(&r.all, r.device.Left(&p.bucket, n))
	if p.sess != nil {
		some = r.owner.Left(&p.sess.share.bucket, some)
	}
	some = max(1, some)
	over, wait := p.take(some)
	if over == nil {
		return some, 0
	}
	p.gw.metrics.slowed.WithLabelValues(over.Code).Inc()
	r.device.Owe(&p.bucket, 1)
	if p.sess != nil {
		r.owner.Owe(&p.sess.share.bucket, 1)
	}
	r.hub.Owe(&r.all, 1)
	return 1, min(wait, maxPause)
}

// enter takes a place among the requests of the queue that are under way, or says that it is full; whoever has one must leave
// it. Over its waiting connection a device cannot ask for anything else.
func (p *peer) enter(ctx context.Context, q *admission.Queue, full *hub.Error) (admission.Place, error) {
	place, wait := q.Enter(ctx)
	if wait > 0 {
		if ctx.Err() == nil {
			full = p.gw.over(full)
		}
		again := *full
		again.RetryAfter = wait
		return place, &coded{codes.ServiceUnavailable, &again}
	}
	if p.conn.Closing() { // it has given up, and would only be signed in to go offline
		place.Leave()
		return admission.Place{}, &hub.Error{Kind: hub.Unavailable, Op: "wait for a place"}
	}
	return place, nil
}
