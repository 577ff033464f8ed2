package grpcgateway

import (
	"context"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
	"github.com/coaphub/coaphub/internal/admission"
)

var (
	errOwnerRequests = hub.NewError(hub.Exhausted, "owner-requests", "too many requests of the owner are under way")
	errOwnerRate     = hub.NewError(hub.Exhausted, "owner-rate", "the owner asks for more than one may")
	errOwnerStreams  = hub.NewError(hub.Exhausted, "owner-streams", "the owner has too many streams of events open")
	errHubBusy       = hub.NewError(hub.Unavailable, "hub-busy", "too many requests are under way")
)

// maxOwners is how many owners are remembered before those who have nothing under way are forgotten.
const maxOwners = 10_000

// admissions decide what may begin: first whether the owner may, so that one who asks too much takes no place that others wait
// for, then whether there is a place among all requests under way.
type admissions struct {
	limits  *LimitsConfig
	metrics *metrics
	rate    admission.Rate
	all     *admission.Queue

	mu     sync.Mutex // guards all below
	owners map[hub.Owner]*share
}

// share is what an owner has under way, and has left of the rate. Commands that wait for their devices are counted apart: they
// must not keep the owner from reading, and from ending them.
type share struct {
	bucket                     admission.Bucket
	requests, streams, waiting int
}

// admitted is a request or a stream that was let in; it must leave.
type admitted struct {
	a     *admissions
	owner hub.Owner
	count func(*share) *int // which of the owner's numbers it is in
	place admission.Place
}

func requests(s *share) *int { return &s.requests }
func streams(s *share) *int  { return &s.streams }
func waiting(s *share) *int  { return &s.waiting }

type admittedKey struct{}

// waits is called when the request of the context begins to wait for a device: it gives its place back, and is refused if the
// owner has as many waiting as it may have requests under way.
func waits(ctx context.Context) error {
	in, ok := ctx.Value(admittedKey{}).(*admitted)
	if !ok {
		return nil
	}
	in.place.Leave()
	in.place = admission.Place{}
	a := in.a
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.owners[in.owner]
	if s.waiting >= a.limits.OwnerRequests {
		a.metrics.refused.WithLabelValues(errOwnerRequests.Code).Inc()
		again := *errOwnerRequests
		again.RetryAfter = admission.Again(0)
		return &again
	}
	s.requests--
	s.waiting++
	in.count = waiting
	return nil
}

func newAdmissions(c *LimitsConfig, m *metrics, all *admission.Queue) *admissions {
	return &admissions{
		limits: c, metrics: m, rate: admission.NewRate(c.OwnerRate, c.OwnerBurst), all: all, owners: map[hub.Owner]*share{},
	}
}

// enter lets in a request, or a stream, which goes on for as long as somebody listens and is therefore counted apart.
func (a *admissions) enter(ctx context.Context, owner hub.Owner, stream bool) (*admitted, error) {
	if err := a.count(owner, stream); err != nil {
		return nil, err
	}
	in := &admitted{a: a, owner: owner, count: requests}
	if stream {
		in.count = streams
		return in, nil
	}
	place, again := a.all.Enter(ctx)
	if again > 0 {
		in.leave()
		if gone(ctx) {
			return nil, ctx.Err()
		}
		a.metrics.refused.WithLabelValues(errHubBusy.Code).Inc()
		busy := *errHubBusy
		busy.RetryAfter = again
		return nil, &busy
	}
	in.place = place
	return in, nil
}

// count counts one more for the owner, unless that has enough.
func (a *admissions) count(owner hub.Owner, stream bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	s := a.owners[owner]
	if s == nil {
		if len(a.owners) >= maxOwners {
			a.forget()
		}
		s = &share{}
		a.owners[owner] = s
	}
	over, wait := (*hub.Error)(nil), time.Duration(0)
	switch {
	case stream && s.streams >= a.limits.OwnerStreams:
		over = errOwnerStreams
	case stream:
		s.streams++
		return nil
	case s.requests >= a.limits.OwnerRequests:
		over = errOwnerRequests
	default:
		if wait = a.rate.Take(&s.bucket, 1); wait == 0 {
			s.requests++
			return nil
		}
		over = errOwnerRate
	}
	a.metrics.refused.WithLabelValues(over.Code).Inc()
	again := *over
	again.RetryAfter = admission.Again(wait)
	return &again
}

// forget forgets who has nothing under way. Such an owner has its whole burst again; the others are bounded by what is under
// way. a.mu is held.
func (a *admissions) forget() {
	for owner, s := range a.owners {
		if s.requests+s.streams+s.waiting == 0 {
			delete(a.owners, owner)
		}
	}
}

// leave ends what was let in.
func (in *admitted) leave() {
	in.place.Leave()
	in.a.mu.Lock()
	defer in.a.mu.Unlock()
	*in.count(in.a.owners[in.owner])--
}
