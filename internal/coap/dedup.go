package coap

import (
	"time"
)

// reception is a confirmable or non-confirmable message of the peer, remembered for its duplicates (RFC 7252, Section 4.5).
type reception struct {
	id     uint16
	con    bool
	held   bool // reply waits for the proof of the address
	state  receptionState
	sum    uint64 // of the datagram: another one under the same ID is no duplicate but of a peer that rebooted
	at     time.Duration
	ackDue time.Duration // when a request that has no answer gets an empty ACK; 0: there is no such time
	reply  []byte        // what a duplicate gets again
	size   int           // of the datagram
	taken  int           // bytes of the budget
}

type receptionState uint8

const (
	received     receptionState = iota // nothing has been said
	acknowledged                       // by an empty ACK
	answered                           // reply is the whole answer: a piggybacked response or a RST
	given                              // the answer is a message of its own; reply is the empty ACK
)

// receptionSize is what a reception costs besides its reply.
const receptionSize = 128

// receptions are the messages of one session that may come again. Bounded in number and bytes: the oldest gives way, and is
// then handled like a new one. The session's lock guards it.
type receptions struct {
	byID    map[uint16]*reception
	order   []*reception // by arrival
	pending []*reception // requests without answer or ACK, by arrival; some have got one meanwhile
	size    int
}

// find returns the reception of which the datagram is a duplicate.
func (x *receptions) find(id uint16, sum uint64, now, lifetime time.Duration) *reception {
	r := x.byID[id]
	if r == nil || r.sum != sum || now-r.at >= lifetime {
		return nil
	}
	return r
}

// add remembers a message that is no duplicate.
func (x *receptions) add(p packet, sum uint64, now time.Duration, cfg *Config, b *budget) *reception {
	r := &reception{id: p.id, con: p.typ == confirmable, sum: sum, at: now}
	if x.byID == nil {
		x.byID = make(map[uint16]*reception)
	}
	x.byID[p.id] = r
	x.order = append(x.order, r)
	x.size += receptionSize
	x.shrink(cfg, b)
	return r
}

// shrink keeps the bounds; the newest always stays.
func (x *receptions) shrink(cfg *Config, b *budget) {
	for len(x.order) > 1 && (len(x.order) > cfg.MaxDuplicates || x.size > cfg.DuplicateBytes) {
		x.drop(x.order[0], b)
		x.order[0] = nil
		x.order = x.order[1:]
	}
}

// drop forgets r but for its place in order.
func (x *receptions) drop(r *reception, b *budget) {
	if x.byID[r.id] == r {
		delete(x.byID, r.id)
	}
	x.size -= receptionSize + r.taken
	b.give(r.taken)
	r.taken = 0
	if !r.held {
		r.reply = nil
	}
}

// forget forgets r, which is one of the newest.
func (x *receptions) forget(r *reception, b *budget) {
	for i := len(x.order) - 1; i >= 0; i-- {
		if x.order[i] == r {
			x.order = append(x.order[:i], x.order[i+1:]...)
			x.drop(r, b)
			return
		}
	}
}

// keep sets what r gets, and remembers it for r's duplicates. When the common budget is used up it is not paid for, and is
// forgotten once it is sent (datagram.reply): then duplicates get nothing, which the peer takes for loss.
func (x *receptions) keep(r *reception, reply []byte, cfg *Config, b *budget) {
	r.reply = reply
	if r.taken != 0 || x.byID[r.id] != r || !b.take(len(reply)) {
		return
	}
	r.taken = len(reply)
	x.size += r.taken
	x.shrink(cfg, b)
}

// spend forgets a reply that nobody has paid for, after it was sent or when it will not be.
func (r *reception) spend() {
	if r.taken == 0 {
		r.reply = nil
	}
}

// await makes r, a request, one that gets an empty ACK at due.
func (x *receptions) await(r *reception, due time.Duration) {
	r.ackDue = due
	x.pending = append(x.pending, r)
}

// acknowledgeDue sends the empty ACKs that are due (RFC 7252, Section 5.2.2).
func (x *receptions) acknowledgeDue(d *datagram, now time.Duration) {
	for len(x.pending) > 0 {
		r := x.pending[0]
		if r.state == received {
			if r.ackDue > now {
				return
			}
			d.ack(r)
		}
		x.pending[0] = nil
		x.pending = x.pending[1:]
	}
	x.pending = nil
}

// expire forgets what cannot come again, and gives back the memory when nothing is left.
func (x *receptions) expire(now time.Duration, cfg *Config, b *budget) {
	lifetime := cfg.exchangeLifetime()
	for len(x.order) > 0 && now-x.order[0].at >= lifetime {
		x.drop(x.order[0], b)
		x.order[0] = nil
		x.order = x.order[1:]
	}
	if len(x.order) == 0 {
		x.byID, x.order = nil, nil
	}
}

// next is when there is something to do; 0 for never.
func (x *receptions) next(now time.Duration, cfg *Config) time.Duration {
	var at time.Duration
	if len(x.order) > 0 {
		at = max(x.order[0].at+cfg.exchangeLifetime(), now+10*time.Second) // many at once, not each at its time
	}
	if len(x.pending) > 0 {
		return x.pending[0].ackDue
	}
	return at
}

func (x *receptions) clear(b *budget) {
	for _, r := range x.order {
		x.drop(r, b)
	}
	*x = receptions{}
}
