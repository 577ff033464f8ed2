package bus

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	// batchQuestions bounds the questions of a message, and batchQuestion the bytes of one that goes with others; a larger one goes alone.
	batchQuestions, batchQuestion = 256, 64 << 10
	// linger is how long the first answer to a message is waited for before the next one goes out anyhow: whatever is asked of a slow
	// device keeps those that are asked later no longer than this.
	linger = 10 * time.Millisecond
	// alone is for how long questions go to a server one by one that is of a version without batches.
	alone = time.Minute
)

// Batches collects questions, so that a message carries many while there is much to ask and one while there is not: of each lane one
// message is waited for while the next collects. Each question has its own outcome, which comes when it is known, together with those
// that are known at that time. Nothing is promised about the order in which questions are worked on that are asked at the same time.
type Batches struct {
	bus    *Bus
	inbox  string // of the answers, up to the batch's token
	linger time.Duration

	mu    sync.Mutex // guards all below
	sub   *nats.Subscription
	lanes map[string]*lane     // that wait, or have something to send
	solo  map[string]time.Time // lanes whose questions go alone, until when
	sent  map[uint64]*batch    // by token: not all is answered
	token uint64
}

// lane is questions to one server.
type lane struct {
	name  string
	wait  []*entry // in the order in which they came; at most one for each caller
	first *batch   // sent, and nothing of it answered; nil: the next goes at once
}

// batch is a message that was sent.
type batch struct {
	token uint64
	lane  *lane
	all   []*entry // nil: answered, or nobody waits any more
	left  int
	late  *time.Timer
}

// entry is a question, whose caller waits.
type entry struct {
	item item
	in   *batch // nil: it was not sent
	at   int    // in it
	done chan outcome
}

// errAlone is an outcome that no server gives: the question was not read, and is to be asked by itself.
var errAlone = errors.New("a part of a version without batches")

// NewBatches makes the batches of a part that asks.
func (b *Bus) NewBatches() *Batches {
	return &Batches{bus: b, inbox: b.conn.NewInbox() + ".", linger: linger, lanes: map[string]*lane{}, solo: map[string]time.Time{}, sent: map[uint64]*batch{}}
}

// Join is Call, together with others that are asked in the same lane. Its name says that their subjects have the same server, as far as
// the caller knows: whoever gets a question of a subject that it does not serve answers that it is "part-away".
func (m Method[Req, Resp]) Join(ctx context.Context, s *Batches, lane, subject string, req Req) (Resp, error) {
	var resp Resp
	body, err := encoding.Marshal(req)
	if err != nil {
		return resp, fmt.Errorf("encode %s: %w", m, err)
	}
	return answered[Resp](s.bus, string(m), body, func() ([]byte, error) {
		if len(body) > batchQuestion || s.goesAlone(lane) {
			return s.bus.ask(ctx, s.bus.prefix+subject, string(m), body)
		}
		out, err := s.ask(ctx, lane, item{Subject: subject, Method: string(m), Body: body})
		if errors.Is(err, errAlone) {
			return s.bus.ask(ctx, s.bus.prefix+subject, string(m), body)
		}
		return out, err
	})
}

func (s *Batches) goesAlone(lane string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Now().Before(s.solo[lane])
}

func (s *Batches) ask(ctx context.Context, lane string, q item) ([]byte, error) {
	ctx, cancel := bounded(ctx)
	defer cancel()
	deadline, _ := ctx.Deadline()
	e := &entry{item: q, done: make(chan outcome, 1)}
	e.item.until = deadline
	if err := s.put(lane, e); err != nil {
		return nil, err
	}
	var o outcome
	select {
	case o = <-e.done:
	case <-ctx.Done():
		if sent := s.leave(lane, e); !sent {
			return nil, partBusy.With(q.Method, ctx.Err())
		}
		select {
		case o = <-e.done:
		default:
			return nil, partSilent.With(q.Method, ctx.Err())
		}
	}
	switch {
	case o.err != nil:
		return nil, o.err
	case o.Failure != nil:
		return nil, o.Failure.err(q.Method)
	case o.Next != "":
		return s.bus.talk(ctx, o.Next, q.Method, nil, o.Part)
	}
	return o.Part, nil
}

// put has a question sent, at once or with the lane's next message.
func (s *Batches) put(name string, e *entry) error {
	s.mu.Lock()
	if s.sub == nil {
		sub, err := s.bus.conn.Subscribe(s.inbox+"*", s.arrived)
		if err != nil {
			s.mu.Unlock()
			return busAway.With(e.item.Method, err)
		}
		s.sub = sub
	}
	l := s.lanes[name]
	if l == nil {
		l = &lane{name: name}
		s.lanes[name] = l
	}
	l.wait = append(l.wait, e)
	b := s.next(l)
	s.mu.Unlock()
	s.send(b)
	return nil
}

// leave forgets a question of which nobody awaits the outcome any more, and reports whether it was sent.
func (s *Batches) leave(name string, e *entry) (sent bool) {
	s.mu.Lock()
	if e.in == nil {
		defer s.mu.Unlock()
		if l := s.lanes[name]; l != nil {
			l.wait = slices.DeleteFunc(l.wait, func(o *entry) bool { return o == e })
		}
		return false
	}
	var b *batch
	if e.in.all[e.at] != nil {
		b = s.forget(e.in, e.at)
	}
	s.mu.Unlock()
	s.send(b)
	return true
}

// next takes the lane's next message if it is to go; nil: it is not. s.mu is held.
func (s *Batches) next(l *lane) *batch {
	if l.first != nil {
		return nil
	}
	n, size := 0, 0
	for ; n < len(l.wait) && n < batchQuestions; n++ {
		if size += l.wait[n].item.size(); n > 0 && size > maxPart {
			break
		}
	}
	if n == 0 {
		delete(s.lanes, l.name)
		return nil
	}
	s.token++
	b := &batch{token: s.token, lane: l, all: slices.Clone(l.wait[:n]), left: n}
	l.wait = slices.Delete(l.wait, 0, n) // it clears what it leaves behind
	for i, e := range b.all {
		e.in, e.at = b, i
	}
	l.first, s.sent[b.token] = b, b
	b.late = time.AfterFunc(s.linger, func() {
		s.mu.Lock()
		next := s.begun(b)
		s.mu.Unlock()
		s.send(next)
	})
	return b
}

// begun lets the lane's next message go, which it returns, if it waits for this one. s.mu is held.
func (s *Batches) begun(b *batch) *batch {
	if b.lane.first != b {
		return nil
	}
	b.lane.first = nil
	b.late.Stop()
	return s.next(b.lane)
}

// forget is the end of a question, and returns the lane's next message if it was waited for. s.mu is held.
func (s *Batches) forget(b *batch, at int) *batch {
	b.all[at] = nil
	if b.left--; b.left > 0 {
		return nil
	}
	delete(s.sent, b.token)
	return s.begun(b)
}

// send sends a message, if there is one, and those that go since one could not be sent.
func (s *Batches) send(b *batch) {
	for b != nil {
		q := question{Version: batchVersion, Build: s.bus.build}
		s.mu.Lock()
		for _, e := range b.all {
			if e != nil {
				i := e.item
				i.At, i.Within = e.at, time.Until(i.until)
				q.Batch = append(q.Batch, i)
			}
		}
		s.mu.Unlock()
		if len(q.Batch) == 0 {
			return
		}
		s.bus.metrics.batch.Observe(float64(len(q.Batch)))
		data, err := encoding.Marshal(q)
		if err == nil {
			err = s.bus.conn.PublishRequest(s.bus.prefix+q.Batch[0].Subject, s.inbox+strconv.FormatUint(b.token, 36), data)
		}
		if err == nil {
			return
		}
		b = s.fail(b, func(method string) error { return unsent(method, err) })
	}
}

// fail ends all of a batch that has no outcome, and returns the lane's next message if it was waited for.
func (s *Batches) fail(b *batch, why func(method string) error) (next *batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, e := range b.all {
		if e != nil {
			e.done <- outcome{err: why(e.item.Method)}
			if n := s.forget(b, i); n != nil {
				next = n
			}
		}
	}
	return next
}

// arrived takes outcomes.
func (s *Batches) arrived(msg *nats.Msg) {
	token, err := strconv.ParseUint(msg.Subject[len(s.inbox):], 36, 64)
	if err != nil {
		return
	}
	s.mu.Lock()
	b := s.sent[token]
	s.mu.Unlock()
	if b == nil { // nobody waits for it any more
		return
	}
	if len(msg.Data) == 0 && msg.Header.Get("Status") == "503" {
		s.send(s.fail(b, func(method string) error { return unsent(method, nats.ErrNoResponders) }))
		return
	}
	var a answer
	err = decoding.Unmarshal(msg.Data, &a)
	switch {
	case err != nil:
		err = fmt.Errorf("decode an answer: %w", err)
	case a.Version == version && a.Failure != nil && a.Failure.Code == strange.Code:
		s.mu.Lock()
		maps.DeleteFunc(s.solo, func(_ string, until time.Time) bool { return time.Now().After(until) })
		s.solo[b.lane.name] = time.Now().Add(alone)
		s.mu.Unlock()
		err = errAlone
	case a.Version != batchVersion:
		err = strangers(s.bus.build, a.Build, a.Version)
	}
	if err != nil || a.Failure != nil {
		s.send(s.fail(b, func(method string) error {
			if err != nil {
				return err
			}
			return a.Failure.err(method)
		}))
		return
	}
	s.mu.Lock()
	next := s.begun(b)
	for _, o := range a.Batch {
		if o.At < 0 || o.At >= len(b.all) || b.all[o.At] == nil {
			continue
		}
		b.all[o.At].done <- o
		s.forget(b, o.At)
	}
	s.mu.Unlock()
	s.send(next)
}
