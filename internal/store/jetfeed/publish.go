package jetfeed

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/coaphub/coaphub/hub"
)

// Publish adds commits to the stream; store.PublishedFeed has the contract. Those of different devices are under way together. Of
// one device only one is: its next is sent when it is acknowledged, since a server that loses one message may take the one behind it.
// What is not acknowledged is sent again, with the same ID, until ctx ends; of a commit that fails then it is not known whether
// the feed has it. Those that fail are of kind hub.Unavailable, or break hub's limits.
func (f *Feed) Publish(ctx context.Context, commits []hub.Commit) []error {
	errs := make([]error, len(commits))
	if len(commits) == 0 {
		return errs
	}
	began := time.Now()
	defer func() { f.metrics.done(errs, time.Since(began)) }()
	ctx, leave, err := f.enter(ctx, "Publish")
	if err != nil {
		for i := range errs {
			errs[i] = err
		}
		return errs
	}
	defer leave()
	p := newPublication(f, commits, errs)
	p.run(ctx)
	if p.suspicious {
		// Readers find out by themselves as well; those of this process would rather know at once.
		if _, err := once(ctx, f, f.look); err != nil {
			f.log.Warn("the feed's stream was set back, and could not be set forward yet", "error", err)
		}
	}
	return errs
}

// publication is one call of Publish.
type publication struct {
	f          *Feed
	commits    []hub.Commit
	errs       []error
	lanes      []lane
	ready      []int    // lanes whose commit can be sent
	acks       chan ack // one for each lane, since each has one commit under way
	left       int      // lanes that are not at their end
	last       error    // the last trouble
	suspicious bool
}

// lane is a device's commits of a call.
type lane struct {
	at   []int  // indexes of those that are not acknowledged, in order
	data []byte // of the first, nil: not made yet
	sent uint64 // token of the first, 0: it is not under way
	seen uint64 // the feed's when it was sent
}

// ack is what became of a commit that was sent.
type ack struct {
	lane      int
	seq       uint64
	duplicate bool
	err       error
}

func newPublication(f *Feed, commits []hub.Commit, errs []error) *publication {
	p := &publication{f: f, commits: commits, errs: errs}
	of := make(map[hub.DeviceID]int, len(commits))
	for i := range commits {
		l, ok := of[commits[i].Device]
		if !ok {
			l = len(p.lanes)
			of[commits[i].Device] = l
			p.lanes = append(p.lanes, lane{})
			p.ready = append(p.ready, l)
		}
		p.lanes[l].at = append(p.lanes[l].at, i)
	}
	p.left = len(p.lanes)
	p.acks = make(chan ack, len(p.lanes))
	return p
}

func (p *publication) run(ctx context.Context) {
	f := p.f
	var (
		next  *outgoing     // registered, and not with the sender yet
		more  chan struct{} // closed when there is room again
		rest  <-chan time.Time
		tries int // in a row without an acknowledgement
		lost  = f.lostConnection()
	)
	quiet := time.NewTimer(f.times.ack)
	defer quiet.Stop()
	slow := func() { // nothing is sent for a while
		if rest == nil {
			rest = time.After(pause(tries))
			tries++
		}
	}
	for p.left > 0 {
		for next == nil && more == nil && rest == nil && len(p.ready) > 0 {
			next, more = p.prepare(p.ready[0])
			if more == nil {
				p.ready = p.ready[1:]
			}
		}
		var out chan<- outgoing
		var msg outgoing
		if next != nil {
			out, msg = f.out, *next
		}
		select {
		case out <- msg:
			next = nil
		case <-more:
			more = nil
		case <-rest:
			rest = nil
		case a := <-p.acks:
			quiet.Reset(f.times.ack)
			if p.take(a) {
				tries = 0
				continue
			}
			if errors.Is(a.err, nats.ErrNoResponders) {
				_, _ = once(ctx, f, f.look) // makes a stream that is gone; what else it finds is found again
			}
			slow()
		case <-lost:
			lost = f.lostConnection()
			p.last = nats.ErrDisconnected
			p.takeBack()
			next = nil
			slow()
		case <-quiet.C:
			quiet.Reset(f.times.ack)
			if p.takeBack() {
				p.last = context.DeadlineExceeded
				next = nil
				slow()
			}
		case <-ctx.Done():
			p.end(ctx.Err())
			return
		}
	}
}

// prepare makes the first commit of a lane ready to be sent and counts it as under way. Without room for it it returns what is closed
// when there is some again. Both are nil when the commit breaks a limit: its lane is at its end.
func (p *publication) prepare(l int) (*outgoing, chan struct{}) {
	ln := &p.lanes[l]
	c := &p.commits[ln.at[0]]
	if ln.data == nil {
		var err error
		if ln.data, err = encode(c); err != nil {
			for _, i := range ln.at {
				p.errs[i] = err
			}
			p.left--
			ln.at = nil
			return nil, nil
		}
	}
	p.f.mu.Lock()
	ln.seen = p.f.seen
	p.f.mu.Unlock()
	token, more := p.f.flights.begin(p.acks, l, int64(len(ln.data)))
	if more != nil {
		return nil, more
	}
	ln.sent = token
	return &outgoing{lane: l, token: token, msg: &nats.Msg{
		Subject: p.f.subject(c.Owner), Reply: p.f.flights.inbox + strconv.FormatUint(token, 36),
		Header: nats.Header{jetstream.MsgIDHeader: []string{messageID(c)}}, Data: ln.data,
	}}, nil
}

// take takes what became of a commit, and reports whether the feed has it.
func (p *publication) take(a ack) bool {
	ln := &p.lanes[a.lane]
	ln.sent = 0
	if a.err != nil {
		p.last = a.err
		p.ready = append(p.ready, a.lane)
		return false
	}
	if a.duplicate {
		p.f.metrics.duplicates.Inc()
	}
	if p.f.gave(a.seq, a.duplicate, ln.seen) {
		p.suspicious = true
	}
	ln.at, ln.data = ln.at[1:], nil
	if len(ln.at) == 0 {
		p.left--
	} else {
		p.ready = append(p.ready, a.lane)
	}
	return true
}

// takeBack makes all that is under way ready to be sent again, and reports whether there was any.
func (p *publication) takeBack() (any bool) {
	for l := range p.lanes {
		ln := &p.lanes[l]
		if ln.sent != 0 && p.f.flights.end(ln.sent) { // else its acknowledgement is in acks
			ln.sent, any = 0, true
			p.ready = append(p.ready, l)
			p.f.metrics.repeated.Inc()
		}
	}
	return any
}

// end gives an outcome to all that has none.
func (p *publication) end(err error) {
	for l := range p.lanes {
		if ln := &p.lanes[l]; ln.sent != 0 && p.f.flights.end(ln.sent) {
			ln.sent = 0
		}
	}
	for len(p.acks) > 0 {
		p.take(<-p.acks)
	}
	if p.last != nil {
		err = fmt.Errorf("%w, after: %w", err, p.last)
	}
	err = p.f.failure("Publish", err)
	for l := range p.lanes {
		for _, i := range p.lanes[l].at {
			p.errs[i] = err
		}
	}
}

// gave takes note of the number that a commit got. It reports whether the stream was set back: a commit that is new got a number that
// was known to be given before it was sent.
func (f *Feed) gave(seq uint64, duplicate bool, seen uint64) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !duplicate && seq <= seen && seq >= f.start { // below start it is of a stream that is known to be gone
		f.suspect = true
		return true
	}
	f.seen = max(f.seen, seq)
	return false
}

func (f *Feed) lostConnection() <-chan struct{} {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.lost
}

// outgoing is a message for the sender.
type outgoing struct {
	lane  int
	token uint64
	msg   *nats.Msg
}

// send sends. It is a goroutine of its own because a connection whose other side takes nothing holds it up, and calls have to
// end when their context does.
func (f *Feed) send() {
	for {
		select {
		case o := <-f.out:
			if !f.flights.under(o.token) {
				continue // its call has ended: late is worse than not at all
			}
			if err := f.conn.PublishMsg(o.msg); err != nil {
				f.flights.arrive(o.token, ack{err: err})
			}
		case <-f.life.Done():
			return
		}
	}
}

// acknowledged takes what the servers answer.
func (f *Feed) acknowledged(m *nats.Msg) {
	token, err := strconv.ParseUint(m.Subject[len(f.flights.inbox):], 36, 64)
	if err != nil {
		return
	}
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		f.flights.arrive(token, ack{err: nats.ErrNoResponders})
		return
	}
	var said struct {
		Seq       uint64              `json:"seq"`
		Duplicate bool                `json:"duplicate"`
		Error     *jetstream.APIError `json:"error"`
	}
	err = json.Unmarshal(m.Data, &said)
	switch {
	case err != nil:
		err = fmt.Errorf("an acknowledgement that cannot be read: %w", err)
	case said.Error != nil:
		err = said.Error
	case said.Seq == 0:
		err = errors.New("an acknowledgement without a number")
	}
	f.flights.arrive(token, ack{seq: said.Seq, duplicate: said.Duplicate, err: err})
}

// flights is all that is sent and not acknowledged.
type flights struct {
	inbox string // its own, up to the token
	room  room
	mu    sync.Mutex // guards what follows
	last  uint64     // token
	all   map[uint64]flight
}

type flight struct {
	acks chan<- ack // has room
	lane int
	size int64
}

// begin counts a message as under way, or returns what is closed when there is room for it.
func (fl *flights) begin(acks chan<- ack, lane int, size int64) (token uint64, more chan struct{}) {
	if more := fl.room.take(size); more != nil {
		return 0, more
	}
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.all == nil {
		fl.all = map[uint64]flight{}
	}
	fl.last++
	fl.all[fl.last] = flight{acks, lane, size}
	return fl.last, nil
}

// end forgets a message, and reports whether it was under way still.
func (fl *flights) end(token uint64) bool {
	_, ok := fl.remove(token)
	return ok
}

func (fl *flights) remove(token uint64) (flight, bool) {
	fl.mu.Lock()
	fly, ok := fl.all[token]
	delete(fl.all, token)
	fl.mu.Unlock()
	if ok {
		fl.room.give(fly.size)
	}
	return fly, ok
}

func (fl *flights) under(token uint64) bool {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	_, ok := fl.all[token]
	return ok
}

// arrive hands on what became of a message, if somebody waits for that.
func (fl *flights) arrive(token uint64, a ack) {
	if fly, ok := fl.remove(token); ok {
		a.lane = fly.lane
		fly.acks <- a // a lane has one message under way, and this was it
	}
}

// room is bytes of which no more than there are can be taken.
type room struct {
	mu   sync.Mutex // guards what follows
	free int64
	used int64
	more chan struct{} // closed when some are given back; nil while nobody waits
}

// take takes n, or returns what is closed when some are given back. What is more than all is let through when nothing else is taken.
func (r *room) take(n int64) chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.free >= n || r.used == 0 {
		r.free -= n
		r.used += n
		return nil
	}
	if r.more == nil {
		r.more = make(chan struct{})
	}
	return r.more
}

func (r *room) give(n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free += n
	r.used -= n
	if r.more != nil {
		close(r.more)
		r.more = nil
	}
}

func (r *room) taken() int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.used
}
