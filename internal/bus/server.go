package bus

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"golang.org/x/sync/semaphore"

	"github.com/coaphub/coaphub/hub"
)

const (
	// working is how many questions of a server are worked on at a time.
	working = 1024
	// talking bounds the bytes of questions and answers that come and go in parts and wait for the next.
	talking = 128 << 20
	// talkTime is how long a talk waits for its next part, and leaving how long questions have to be answered when the server ends: a
	// process has five seconds for all that it does then.
	talkTime, leaving = 10 * time.Second, 2 * time.Second
	// longest is for how long a question is worked on, whatever it says.
	longest = 10 * time.Minute
)

// Server answers questions. It is made with Handle's methods first and then run.
type Server struct {
	bus     *Bus
	shared  bool
	methods map[string]handler
	log     *slog.Logger

	slots  chan struct{} // has one for each question that is worked on
	room   *semaphore.Weighted
	under  sync.WaitGroup
	talkTo string // the subject of talks, up to their names

	mu    sync.Mutex // guards all below
	talks map[string]*talk
	// subs are of the subjects that are served; nil where one is to be and the server does not run.
	subs map[string]*nats.Subscription
	take func(*nats.Msg) // nil while the server does not run
}

type handler func(ctx context.Context, body []byte) ([]byte, error)

// talk is a question or an answer that takes more than one message. Whoever takes it out of talks has it for itself.
type talk struct {
	q     question
	body  []byte // of the question, as far as it came
	out   []byte // what is left of the answer; nil: the question is not worked on yet
	taken int    // of the server's room
	until *time.Timer
}

// Server makes a server for subjects below the hub's; none is a server that serves nothing yet. With shared each question is answered by
// one of all servers of its subject, else by each of them.
func (b *Bus) Server(shared bool, log *slog.Logger, subjects ...string) *Server {
	s := &Server{
		bus: b, shared: shared, methods: map[string]handler{}, log: log, slots: make(chan struct{}, working), room: semaphore.NewWeighted(talking),
		talkTo: b.prefix + "inbox.talk." + rand.Text() + ".", talks: map[string]*talk{}, subs: map[string]*nats.Subscription{},
	}
	for _, subject := range subjects {
		s.subs[subject] = nil
	}
	return s
}

// Serve has the server answer on these subjects and on no others. What came on those that it gives up is still answered. It may be called
// at any time. After an error it answers on some of them; call it again.
func (s *Server) Serve(subjects []string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for subject, sub := range s.subs {
		if slices.Contains(subjects, subject) {
			continue
		}
		delete(s.subs, subject)
		if sub != nil {
			_ = sub.Drain() // of a connection that is closed there is nothing left
		}
	}
	for _, subject := range subjects {
		if s.subs[subject] != nil {
			continue
		}
		s.subs[subject] = nil
		if err := s.open(subject); err != nil {
			return err
		}
	}
	return nil
}

// open takes what comes on a subject, if the server runs. s.mu is held.
func (s *Server) open(subject string) (err error) {
	if s.take == nil {
		return nil
	}
	var sub *nats.Subscription
	if s.shared {
		sub, err = s.bus.conn.QueueSubscribe(s.bus.prefix+subject, "parts", s.take)
	} else {
		sub, err = s.bus.conn.Subscribe(s.bus.prefix+subject, s.take)
	}
	if err != nil {
		return fmt.Errorf("serve %s: %w", subject, err)
	}
	s.subs[subject] = sub
	return nil
}

// Handle has f answer a method. It must not be called once the server runs. An *hub.Error of f's goes to whoever asked, anything else
// goes to the log.
func Handle[Req, Resp any](s *Server, m Method[Req, Resp], f func(context.Context, Req) (Resp, error)) {
	s.methods[string(m)] = func(ctx context.Context, body []byte) ([]byte, error) {
		var req Req
		if err := decoding.Unmarshal(body, &req); err != nil {
			return nil, fmt.Errorf("decode: %w", err)
		}
		resp, err := f(ctx, req)
		if err != nil {
			return nil, err
		}
		return encoding.Marshal(resp)
	}
}

// Run answers until ctx ends, then takes no more questions and ends when those it has are answered. ready is called once the servers of
// the bus know of it, or, while there is none, at once.
func (s *Server) Run(ctx context.Context, ready func()) error {
	work, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	talks, err := s.bus.conn.Subscribe(s.talkTo+"*", func(msg *nats.Msg) { s.accept(work, msg, msg.Subject[len(s.talkTo):]) })
	if err != nil {
		return fmt.Errorf("serve: %w", err)
	}
	defer func() { _ = talks.Unsubscribe() }() // of a connection that is closed there is nothing to take back
	if err := s.start(func(msg *nats.Msg) { s.accept(work, msg, "") }); err != nil {
		return err
	}
	if s.bus.conn.IsConnected() {
		wait, cancel := context.WithTimeout(ctx, patience)
		if err := s.bus.conn.FlushWithContext(wait); err != nil {
			s.log.Warn("the bus does not answer", "error", err)
		}
		cancel()
	}
	ready()
	<-ctx.Done()
	over := time.AfterFunc(leaving, stop)
	defer over.Stop()
	s.end(work)
	s.under.Wait()
	return nil
}

func (s *Server) start(take func(*nats.Msg)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.take = take
	for subject := range s.subs {
		if err := s.open(subject); err != nil {
			return err
		}
	}
	return nil
}

// end takes no more questions than were sent before, and waits for these as long as there is work.
func (s *Server) end(work context.Context) {
	s.mu.Lock()
	s.take = nil
	var gone []<-chan nats.SubStatus
	for subject, sub := range s.subs {
		s.subs[subject] = nil
		if sub == nil {
			continue
		}
		closed := sub.StatusChanged(nats.SubscriptionClosed)
		if sub.Drain() == nil {
			gone = append(gone, closed)
		}
	}
	s.mu.Unlock()
	for _, closed := range gone {
		select {
		case <-closed:
		case <-work.Done():
			return
		}
	}
}

// accept has a message worked on. It must not block: all messages of the subject wait for it.
func (s *Server) accept(ctx context.Context, msg *nats.Msg, name string) {
	var q question
	switch err := decoding.Unmarshal(msg.Data, &q); {
	case err != nil:
		s.log.Error("a question that cannot be read", "subject", msg.Subject, "error", err)
		s.answer(msg, answer{Failure: failureOf(err)})
		return
	case q.Version == batchVersion && name == "":
		s.batch(ctx, msg, q)
		return
	case q.Version != version:
		err := strangers(s.bus.build, q.Build, q.Version)
		s.log.Error("a part of another version asks", "error", err)
		s.answer(msg, answer{Failure: failureOf(err)})
		return
	}
	var t *talk
	if name != "" {
		if t = s.claim(name); t == nil {
			s.answer(msg, answer{Failure: failureOf(partSilent.With("talk", nil))}) // it took too long, or this was said before
			return
		}
		if t.out != nil { // the work is done
			s.under.Go(func() { s.answer(msg, s.part(t)) })
			return
		}
	} else {
		t = &talk{q: q}
	}
	select {
	case s.slots <- struct{}{}:
	default:
		s.free(t)
		s.answer(msg, answer{Failure: failureOf(partBusy)})
		return
	}
	s.under.Go(func() {
		defer func() { <-s.slots }()
		s.answer(msg, s.turn(ctx, t, q.Part, q.More))
	})
}

// batch has the questions of a message worked on, each for itself. It must not block.
func (s *Server) batch(ctx context.Context, msg *nats.Msg, q question) {
	r := &outcomes{s: s, msg: msg}
	for _, i := range q.Batch {
		if !s.serves(msg, i.Subject) {
			r.add(outcome{At: i.At, Failure: failureOf(partAway)})
			continue
		}
		select {
		case s.slots <- struct{}{}:
		default:
			r.add(outcome{At: i.At, Failure: failureOf(partBusy)})
			continue
		}
		s.under.Go(func() {
			defer func() { <-s.slots }()
			a := s.turn(ctx, &talk{q: question{Build: q.Build, Method: i.Method, Within: i.Within}}, i.Body, false)
			r.add(outcome{At: i.At, Part: a.Part, Next: a.Next, Failure: a.Failure})
		})
	}
}

// serves reports whether a question that came with a message is for this server.
func (s *Server) serves(msg *nats.Msg, subject string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, is := s.subs[subject]
	return is || msg.Subject == s.bus.prefix+subject
}

// outcomes is what is known of a batch and not answered. What becomes known at the same time goes into one message, and nothing waits for
// what is not known.
type outcomes struct {
	s   *Server
	msg *nats.Msg

	mu      sync.Mutex // guards all below
	known   []outcome
	sending bool
}

func (r *outcomes) add(o outcome) {
	r.mu.Lock()
	r.known = append(r.known, o)
	sending := r.sending
	r.sending = true
	r.mu.Unlock()
	if sending {
		return
	}
	for {
		runtime.Gosched() // to those that are awake with an outcome, too: one append has ended for all of them
		some := r.some()
		if some == nil {
			return
		}
		r.s.answer(r.msg, answer{Batch: some})
	}
}

// some takes outcomes for a message; nil: there are none, and whoever has the next one sends.
func (r *outcomes) some() []outcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, size := 0, 0
	for ; n < len(r.known); n++ {
		if size += len(r.known[n].Part) + 64; n > 0 && size > maxPart {
			break
		}
	}
	out := r.known[:n:n]
	r.known = r.known[n:]
	r.sending = n > 0
	if n == 0 {
		return nil
	}
	return out
}

// turn takes a part of a question, and says what goes back: where the next part goes, or the answer to all of it.
func (s *Server) turn(ctx context.Context, t *talk, part []byte, more bool) answer {
	t.body = append(t.body, part...)
	if len(t.body) > maxQuestion {
		s.free(t)
		return answer{Failure: failureOf(hub.NewError(hub.TooLarge, "", ""))}
	}
	if more {
		if !s.room.TryAcquire(int64(len(part))) {
			s.free(t)
			return answer{Failure: failureOf(partBusy)}
		}
		t.taken += len(part)
		return s.keep(t, answer{})
	}
	until, cancel := context.WithTimeout(ctx, min(t.q.Within, longest))
	defer cancel()
	out, err := s.work(until, t.q, t.body)
	s.free(t)
	if err == nil && len(out) > maxPart {
		// From here on it is not "busy": it was done.
		if err = s.room.Acquire(until, int64(min(len(out), talking))); err == nil {
			t.taken = min(len(out), talking)
		} else {
			err = partSilent.With(t.q.Method, err)
		}
	}
	if err != nil {
		return answer{Failure: failureOf(err)}
	}
	t.out, t.body = out, nil
	return s.part(t)
}

// part is the next part of an answer.
func (s *Server) part(t *talk) answer {
	var a answer
	a.Part, t.out = cut(t.out)
	if len(t.out) == 0 {
		s.free(t)
		return a
	}
	return s.keep(t, a)
}

// free gives back what a talk has taken of the room.
func (s *Server) free(t *talk) {
	s.room.Release(int64(t.taken))
	t.taken = 0
}

// keep remembers a talk for what follows, and says where that goes.
func (s *Server) keep(t *talk, a answer) answer {
	name := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.talks[name] = t
	t.until = time.AfterFunc(talkTime, func() {
		if t := s.claim(name); t != nil {
			s.free(t)
		}
	})
	a.Next = s.talkTo + name
	return a
}

// claim takes a talk out; nil if it is not there.
func (s *Server) claim(name string) *talk {
	s.mu.Lock()
	defer s.mu.Unlock()
	t := s.talks[name]
	if t != nil {
		delete(s.talks, name)
		t.until.Stop()
	}
	return t
}

// work has a whole question answered.
func (s *Server) work(ctx context.Context, q question, body []byte) (out []byte, err error) {
	f, ok := s.methods[q.Method]
	if !ok { // a newer one asks
		return nil, hub.NewError(hub.Unsupported, "", "").With(q.Method, fmt.Errorf("coaphub %s asks for what coaphub %s does not have", q.Build, s.bus.build))
	}
	began := time.Now()
	defer func() {
		if r := recover(); r != nil {
			s.log.Error("panic", "method", q.Method, "panic", r, "stack", string(debug.Stack()))
			err = &hub.Error{Op: q.Method}
		}
		s.bus.metrics.answered(q.Method, err, time.Since(began))
	}()
	out, err = f(ctx, body)
	if e := (*hub.Error)(nil); err != nil && errors.Is(err, ctx.Err()) && !errors.As(err, &e) {
		return nil, partSilent.With(q.Method, err) // the same that the caller finds at its own end of that time
	}
	if hub.IsKind(err, hub.Internal) {
		s.log.Error("a question was not answered", "method", q.Method, "error", err)
	}
	return out, err
}

func (s *Server) answer(msg *nats.Msg, a answer) {
	a.Version, a.Build = version, s.bus.build
	if a.Batch != nil {
		a.Version = batchVersion
	}
	data, err := encoding.Marshal(a)
	if err == nil {
		err = msg.Respond(data)
	}
	if err != nil {
		s.log.Warn("an answer could not be sent", "subject", msg.Subject, "error", err)
	}
}
