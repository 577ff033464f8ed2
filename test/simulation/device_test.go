package simulation

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/coaphub/coaphub/hub"
)

// note is something that a device said and that has to be in the log, once, if it was acknowledged.
type note struct {
	href    hub.Href
	link    bool // it was published, not reported
	value   string
	session uint64
	acked   bool
}

// device is one simulated device, wherever it is connected.
type device struct {
	*chance
	w  *world
	id hub.DeviceID

	mu    sync.Mutex    // guards what follows
	own   hub.Ownership // as the identity store has it
	n     int           // values so far
	notes []*note       // in the order in which they were said, session by session
	last  *session      // the newest
	conns int
}

var hrefs = []hub.Href{"/light", "/heat", "/door"}

// session is a session of a device at a gateway.
type session struct {
	d      *device
	g      *process
	sess   hub.Session
	conn   hub.Connection
	msg    uint64
	closed chan struct{}
	close  func()
	wakes  chan struct{}
	have   []hub.Taken
	done   map[string]bool
}

// Close implements hub.Deliverer.
func (s *session) Close(reason string) {
	s.d.w.tell("%s: %s is closed: %s", s.d.id[len(s.d.id)-1:], s.conn.ID, reason)
	s.close()
}

// Ready implements hub.Deliverer.
func (s *session) Ready(hub.Href, []string) bool { return false }

// Deliver implements hub.Deliverer.
func (s *session) Deliver(hub.Command) { s.Wake() }

// Wake implements hub.Deliverer.
func (s *session) Wake() {
	select {
	case s.wakes <- struct{}{}:
	default:
	}
}

// patience is how long a gateway waits for the directory.
const patience = 10 * time.Second

// signIn begins a session at a gateway; nil: there is none.
func (d *device) signIn(g *process) *session {
	d.mu.Lock()
	d.conns++
	s := &session{
		d: d, g: g, closed: make(chan struct{}), wakes: make(chan struct{}, 1), done: map[string]bool{},
		conn: hub.Connection{
			ID: fmt.Sprintf("conn-%s-%d", d.id[len(d.id)-1:], d.conns), ConnectedAt: time.Now().UnixNano(), Protocol: hub.ProtocolCoAPSTCP, Service: g.name,
		},
	}
	d.mu.Unlock()
	s.close = sync.OnceFunc(func() { close(s.closed) })
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	sess, err := g.client.SignIn(ctx, d.ownership(), s.conn, "user", s)
	if !g.said() {
		return nil
	}
	d.w.tell("%s signs in at %s: session %d %v", d.id[len(d.id)-1:], g.name, sess.Number, err)
	if err != nil {
		return nil
	}
	d.mu.Lock()
	s.sess = sess
	d.last = s
	d.mu.Unlock()
	if d.w.broken.handedOn {
		d.w.handOn(s)
	}
	if sess.Commands {
		s.Wake()
	}
	return s
}

// over reports whether the session has ended, as far as its gateway knows.
func (s *session) over() bool {
	select {
	case <-s.closed:
		return true
	case <-s.g.over:
		return true
	default:
		return false
	}
}

func doubtful(err error) bool {
	return hub.IsKind(err, hub.Unavailable) || hub.IsKind(err, hub.Deadline)
}

// write has the gateway write something: under one number until it is known what became of it.
func (s *session) write(what string, f func(ctx context.Context, from hub.Stamp) error) (acked bool) {
	s.msg++
	from := hub.Stamp{Device: s.d.id, Session: s.sess.Number, Message: s.msg, User: "user"}
	if s.d.w.broken.oldSessions { // mutation
		s.d.mu.Lock()
		from.Session = s.d.last.sess.Number
		from.Message += 1000 * uint64(s.d.n)
		s.d.mu.Unlock()
	}
	for {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		err := f(ctx, from)
		cancel()
		if !s.g.said() {
			return false
		}
		s.d.w.tell("%s %s in session %d, message %d: %v", s.d.id[len(s.d.id)-1:], what, from.Session, from.Message, err)
		switch {
		case err == nil && s.d.w.broken.newNumbers && s.d.one(4): // mutation: the answer gets lost
		case err == nil:
			return true
		case hub.IsKind(err, hub.Precondition), s.over():
			s.close()
			return false
		case !doubtful(err):
			s.d.w.wrong("device %s cannot %s: %v", s.d.id, what, err)
			s.close()
			return false
		case s.d.one(4): // the gateway gives up, and so the session
			s.close()
			return false
		}
		if s.d.w.broken.newNumbers { // mutation
			from.Message++
			s.msg++
		}
		time.Sleep(s.d.between(50*time.Millisecond, 500*time.Millisecond))
	}
}

// value makes what nobody said before.
func (s *session) value(href hub.Href, link bool) *note {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	s.d.n++
	n := &note{href: href, link: link, value: fmt.Sprintf("v%d", s.d.n), session: s.sess.Number}
	s.d.notes = append(s.d.notes, n)
	return n
}

func (s *session) acknowledged(notes []*note) {
	s.d.mu.Lock()
	defer s.d.mu.Unlock()
	for _, n := range notes {
		n.acked = true
	}
}

// report has the gateway store changes of some resources.
func (s *session) report(which ...hub.Href) bool {
	var notes []*note
	var changes []hub.Change
	for _, href := range which {
		n := s.value(href, false)
		notes = append(notes, n)
		changes = append(changes, hub.Change{
			Href: href, Status: hub.StatusOK, Content: hub.Content{Type: "application/json", Format: hub.FormatJSON, Data: []byte(`"` + n.value + `"`)},
		})
	}
	acked := s.write("reports "+notes[0].value, func(ctx context.Context, from hub.Stamp) error { return s.g.client.Notify(ctx, from, changes) })
	if acked {
		s.acknowledged(notes)
	}
	return acked
}

func (s *session) publish(href hub.Href) bool {
	n := s.value(href, true)
	acked := s.write("publishes "+n.value, func(ctx context.Context, from hub.Stamp) error {
		_, err := s.g.client.Publish(ctx, from, []hub.Link{{Href: href, Types: []string{"core.light"}, Interfaces: []string{"oic.if.baseline"}, Title: n.value, Policy: 3}})
		return err
	})
	if acked {
		s.acknowledged([]*note{n})
	}
	return acked
}

// commands takes what waits and carries it out.
func (s *session) commands() {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	taken, more, err := s.g.client.TakeCommands(ctx, hub.Stamp{Device: s.d.id, Session: s.sess.Number, User: "user"}, s.have, 2)
	cancel()
	if !s.g.said() || s.over() {
		return
	}
	switch {
	case hub.IsKind(err, hub.Precondition):
		s.close()
		return
	case err != nil:
		time.AfterFunc(time.Second, s.Wake)
		return
	}
	for _, c := range taken {
		s.d.w.delivered(c, s)
		if !s.done[c.ID] { // the session remembers what it had
			s.done[c.ID] = true
			s.have = append(s.have, hub.Taken{ID: c.ID, Href: c.Href})
		}
	}
	for len(s.have) > 0 {
		c := s.have[0]
		time.Sleep(s.d.between(time.Millisecond, 300*time.Millisecond))
		answer := hub.Answer{End: hub.CommandCompleted, Status: hub.StatusOK, Content: hub.Content{Type: "text/plain", Data: []byte("done")}}
		if !s.write("ends "+c.ID, func(ctx context.Context, from hub.Stamp) error { return s.g.client.EndCommand(ctx, from, c.ID, answer) }) {
			return
		}
		s.have = s.have[1:]
	}
	if more {
		s.Wake()
	}
}

// step is one thing that a device does.
func (s *session) step() {
	w := s.d.w
	t := time.NewTimer(s.d.between(20*time.Millisecond, w.pace))
	defer t.Stop()
	select {
	case <-s.closed:
	case <-s.g.over:
	case <-s.wakes:
		s.commands()
	case <-t.C:
		switch s.d.pick(6) {
		case 0:
			s.publish(hrefs[s.d.pick(len(hrefs))])
		case 1:
			s.report(hrefs[0], hrefs[1], hrefs[0])
		default:
			s.report(hrefs[s.d.pick(len(hrefs))])
		}
	}
}

// offline is what a gateway does when the connection has ended.
func (s *session) offline() {
	if !s.g.said() {
		return
	}
	s.close()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s.msg++
	_ = s.g.client.Offline(ctx, hub.Stamp{Device: s.d.id, Session: s.sess.Number, Message: s.msg, User: "user"}) // it is told again
}

// visit is one session, from its begin to its end.
func (d *device) visit() {
	w := d.w
	g := w.gateway(d.chance)
	if g == nil {
		time.Sleep(500 * time.Millisecond)
		return
	}
	s := d.signIn(g)
	if s == nil {
		time.Sleep(d.between(100*time.Millisecond, 2*time.Second))
		return
	}
	for n := 2 + d.pick(12); n > 0 && !s.over() && !w.calm(); n-- {
		s.step()
	}
	switch {
	case s.over():
		w.all.Go(s.offline)
	case d.one(3):
		s.write("signs out", s.g.client.SignOut)
		s.close()
	case d.one(2): // the gateway does not notice, and has something left to store
		w.all.Go(func() {
			for n := d.pick(4); n > 0 && !s.over(); n-- {
				time.Sleep(d.between(time.Millisecond, 2*time.Second))
				s.report(hrefs[s.d.pick(len(hrefs))])
			}
			s.offline()
		})
	default:
		w.all.Go(s.offline)
	}
	if d.one(6) {
		d.transfer()
	}
}

// transfer gives the device to another owner, as an identity store does.
func (d *device) transfer() {
	own := d.ownership()
	d.insist("unregister", func(ctx context.Context, g *process) error { return g.client.Unregister(ctx, own, "user") })
	own.Generation++
	own.Owner = owners[(slices.Index(owners, own.Owner)+1)%len(owners)]
	d.mu.Lock()
	d.own = own
	d.mu.Unlock()
	d.register()
}

func (d *device) register() {
	own := d.ownership()
	d.insist("register", func(ctx context.Context, g *process) error { return g.client.Register(ctx, own, "user") })
}

// insist does something until it is done.
func (d *device) insist(what string, do func(ctx context.Context, g *process) error) {
	for {
		if g := d.w.gateway(d.chance); g != nil {
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			err := do(ctx, g)
			cancel()
			d.w.tell("%s: %s as %s, %d: %v", d.id[len(d.id)-1:], what, d.ownership().Owner, d.ownership().Generation, err)
			switch {
			case !g.said():
			case err == nil:
				return
			case !doubtful(err):
				d.w.wrong("device %s: %s: %v", d.id, what, err)
				return
			}
		}
		time.Sleep(300 * time.Millisecond)
	}
}

// settle has a last session, in which everything is reported once more; nil: it cannot.
func (d *device) settle() *session {
	for try := 0; try < 30; try++ {
		if g := d.w.gateway(d.chance); g != nil {
			if s := d.signIn(g); s != nil {
				if s.report(hrefs...) && s.publish(hrefs[0]) && !s.over() {
					return s
				}
				s.offline()
			}
		}
		time.Sleep(500 * time.Millisecond)
	}
	return nil
}
